//! Machines and what they use, in that system's words.

use lodge_spec::state::{Detail, State, Usage};
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

    /// What `kvm.list` and `kvm.get` say. `taps`: names of its interfaces on the host.
    pub(super) fn value(&self, taps: &[String]) -> Value {
        let mut params = json!(self.params);
        if let Some(all) = params["nics"].as_array_mut() {
            for nic in all.iter_mut().filter(|nic| nic["type"] == "default") {
                nic["hwaddr"] = json!(nics::mac(self.sequence));
            }
        }
        json!({
            "id": self.sequence,
            "uuid": self.uuid,
            "name": self.name,
            "state": state(self.state),
            "vnc": -1,
            "tags": self.params.tags,
            "ifctargets": taps,
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
    let cpus = machine.params.cpu.max(1) as u64;
    let running = i64::from(machine.state == State::Running);
    let vcpu: Vec<Value> =
        (0..cpus).map(|_| json!({"State": running, "Time": usage.cpu_ns / cpus})).collect();
    let net = usage.interface.as_ref().map(|interface| {
        json!({
            "Name": interface.tap,
            "RxBytes": usage.network.in_bytes, "RxPkts": usage.network.in_operations,
            "RxErrs": 0, "RxDrop": 0,
            "TxBytes": usage.network.out_bytes, "TxPkts": usage.network.out_operations,
            "TxErrs": 0, "TxDrop": 0,
        })
    });
    let block = machine.params.media.iter().flatten().next().map(|_| {
        json!({
            "Name": "vda",
            "RdBytes": usage.disk.in_bytes, "RdTimes": usage.disk.in_operations,
            "WrBytes": usage.disk.out_bytes, "WrTimes": usage.disk.out_operations,
        })
    });
    json!({"Vcpu": vcpu, "Net": list(net), "Block": list(block)})
}

fn list(one: Option<Value>) -> Vec<Value> {
    one.into_iter().collect()
}
