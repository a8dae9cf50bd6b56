//! What we know of a machine, in their words. Pure.

use lodge_spec::request::Refusal;
use lodge_spec::state::{Detail, State, Traffic, Usage};

use super::proto::vmprovisioner::v1::{
    GetVmInfoResponse, NetworkStats, StorageStats, VmConfig, VmInfo, VmMetrics, VmNetworkInfo,
    VmState,
};

/// A machine that is being started is not running yet, one that is being stopped still is. One
/// that is suspended has its memory, as one that is paused.
pub(super) fn state(state: State) -> VmState {
    match state {
        State::Created | State::Starting => VmState::Created,
        State::Running | State::Stopping => VmState::Running,
        State::Paused | State::Suspended => VmState::Paused,
        State::Stopped | State::Failed => VmState::Shutdown,
        State::Broken => VmState::Unspecified,
    }
}

/// Our states that are theirs.
pub(super) fn states(theirs: VmState) -> &'static [State] {
    match theirs {
        VmState::Created => &[State::Created, State::Starting],
        VmState::Running => &[State::Running, State::Stopping],
        VmState::Paused => &[State::Paused, State::Suspended],
        VmState::Shutdown => &[State::Stopped, State::Failed],
        VmState::Unspecified => &[],
    }
}

/// Their identity of a machine that came through their door.
pub(super) fn vm_id(detail: &Detail) -> String {
    detail.origin.as_ref().map(|o| o.id.clone()).unwrap_or_default()
}

/// What was asked for when it was created.
pub(super) fn config(detail: &Detail) -> Result<VmConfig, Refusal> {
    let document = detail.origin.as_ref().map_or("{}", |o| o.document.as_str());
    serde_json::from_str(document).map_err(Refusal::failed)
}

pub(super) fn listed(detail: &Detail) -> VmInfo {
    let config = config(detail).unwrap_or_default();
    VmInfo {
        vm_id: vm_id(detail),
        state: state(detail.summary.state).into(),
        vcpu_count: i32::try_from(detail.summary.cpus).unwrap_or(i32::MAX),
        memory_size_bytes: signed(detail.summary.memory_bytes),
        created_timestamp: detail.created_us.div_euclid(1_000_000),
        modified_timestamp: detail.modified_us.div_euclid(1_000_000),
        metadata: config.metadata,
        customer_id: detail.origin.as_ref().map(|o| o.owner.clone()).unwrap_or_default(),
    }
}

pub(super) fn info(detail: &Detail, usage: &Usage) -> Result<GetVmInfoResponse, Refusal> {
    let mut backend = std::collections::BTreeMap::new();
    let mut note = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            backend.insert(key.to_owned(), value);
        }
    };
    let summary = &detail.summary;
    note("backend_type", summary.backend.map(|b| b.to_string()));
    note("accelerator", summary.accel.map(|a| a.to_string()));
    note("process_id", (usage.pid != 0).then(|| usage.pid.to_string()));
    note("socket_path", usage.socket.clone());
    note("reason", summary.reason.clone());
    let mut response = GetVmInfoResponse {
        vm_id: vm_id(detail),
        config: Some(config(detail)?).into(),
        state: state(summary.state).into(),
        backend_info: backend,
        ..GetVmInfoResponse::default()
    };
    if usage.pid != 0 {
        response.metrics = Some(metrics(usage)).into();
    }
    if let Some(interface) = &usage.interface {
        let network = VmNetworkInfo {
            ip_address: interface.address.clone(),
            mac_address: interface.mac.clone(),
            tap_device: interface.tap.clone(),
            network_namespace: interface.network.clone(),
            gateway: interface.gateway.clone(),
            dns_servers: interface.resolvers.clone(),
            port_mappings: Vec::new(),
        };
        response.network_info = Some(network).into();
    }
    Ok(response)
}

fn metrics(usage: &Usage) -> VmMetrics {
    let Traffic { in_bytes, out_bytes, in_operations, out_operations } = usage.network;
    let network = NetworkStats {
        bytes_received: signed(in_bytes),
        bytes_transmitted: signed(out_bytes),
        packets_received: signed(in_operations),
        packets_transmitted: signed(out_operations),
    };
    let Traffic { in_bytes, out_bytes, in_operations, out_operations } = usage.disk;
    let storage = StorageStats {
        bytes_read: signed(in_bytes),
        bytes_written: signed(out_bytes),
        read_operations: signed(in_operations),
        write_operations: signed(out_operations),
    };
    VmMetrics {
        cpu_usage_percent: usage.cpu_percent,
        memory_usage_bytes: signed(usage.memory_bytes),
        network_stats: Some(network).into(),
        storage_stats: Some(storage).into(),
        uptime_seconds: signed(usage.uptime_ms / 1000),
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
