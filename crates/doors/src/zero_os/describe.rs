//! Machines and what they use, in that system's words.

use lodge_spec::state::{Detail, Device, Ends, State, Usage};
use serde_json::{Value, json};

use super::create::{Kept, Params};
use super::nics;

/// A machine of this door.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    pub(super) uuid: String,
    /// As it is called here.
    pub(super) name: String,
    pub(super) state: State,
    pub(super) sequence: u16,
    pub(super) params: Params,
}

impl Machine {
    pub(super) fn of(detail: &Detail) -> Option<Self> {
        let origin = detail.origin.as_ref().filter(|o| o.door == super::DOOR)?;
        let Kept { sequence, params } = serde_json::from_str(&origin.document).ok()?;
        Some(Self {
            uuid: detail.summary.id.to_string(),
            name: origin.id.clone(),
            state: detail.summary.state,
            sequence,
            params,
        })
    }

    /// The Ethernet address of an interface, where it is known here.
    pub(super) fn mac(&self, index: usize) -> Option<String> {
        let nic = self.params.nics.get(index)?;
        match nic.kind.as_str() {
            "default" => Some(nics::mac(self.sequence)),
            _ => Some(nic.hwaddr.clone()).filter(|mac| !mac.is_empty()),
        }
    }

    /// What `kvm.list` and `kvm.get` say.
    pub(super) fn value(&self, ends: &Ends) -> Value {
        let mut params = self.params.clone();
        for nic in params.nics.iter_mut().filter(|nic| nic.kind == "default") {
            nic.hwaddr = nics::mac(self.sequence);
        }
        for media in params.media.iter_mut().flatten() {
            media.disk.clear();
        }
        json!({
            "id": self.sequence,
            "uuid": self.uuid,
            "name": self.name,
            "state": state(self.state),
            "vnc": ends.screen.map_or(-1, |at| i32::from(at.port())),
            "tags": self.params.tags,
            "ifctargets": ends.interfaces,
            "default_ip": nics::address(self.sequence).to_string(),
            "params": params,
        })
    }
}

fn state(state: State) -> &'static str {
    match state {
        State::Running => "running",
        State::Paused => "paused",
        State::Stopping => "shutdown",
        State::Stopped | State::Suspended => "shutoff",
        State::Failed => "crashed",
        State::Created | State::Starting | State::Broken => "nostate",
    }
}

/// What `kvm.info` says.
pub(super) fn info(machine: &Machine, usage: &Usage) -> Value {
    let running = i64::from(machine.state == State::Running);
    let vcpu = usage.cpus_ns.iter().map(|time| json!({"State": running, "Time": time}));
    let net = usage.nics.iter().map(|Device { name, traffic }| {
        json!({
            "Name": name,
            "RxBytes": traffic.in_bytes, "RxPkts": traffic.in_operations, "RxErrs": 0, "RxDrop": 0,
            "TxBytes": traffic.out_bytes, "TxPkts": traffic.out_operations, "TxErrs": 0, "TxDrop": 0,
        })
    });
    let block = usage.disks.iter().map(|Device { name, traffic }| {
        json!({
            "Name": disk_name(name),
            "RdBytes": traffic.in_bytes, "RdTimes": traffic.in_operations,
            "WrBytes": traffic.out_bytes, "WrTimes": traffic.out_operations,
        })
    });
    json!({"Vcpu": Value::from_iter(vcpu), "Net": Value::from_iter(net), "Block": Value::from_iter(block)})
}

/// Where a hypervisor tells of all disks at once, they go by the first one's name.
pub(super) fn disk_name(name: &str) -> &str {
    if name.is_empty() { "vda" } else { name }
}
