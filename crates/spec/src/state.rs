//! The states of a machine's life and what is published about one. Knows no transition; those are
//! in the machine crate.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::draft::MdataDraft;
use crate::machine::{Accel, BackendKind, Origin};
use crate::names::{MachineId, Name};

/// Where a machine is in its life. `failed` and `broken` always come with a reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Defined, never started.
    Created,
    /// Its hypervisor is being prepared.
    Starting,
    /// The hypervisor runs guest code.
    Running,
    /// The hypervisor is there, the guest stands still.
    Paused,
    /// Asked to end.
    Stopping,
    /// Ended as asked, or by itself with success.
    Stopped,
    /// Its memory lies in a file, from which the next start goes on.
    Suspended,
    /// Ended otherwise.
    Failed,
    /// Its record could not be read; it can only be inspected and removed.
    Broken,
}

impl State {
    pub const fn as_str(self) -> &'static str {
        match self {
            State::Created => "created",
            State::Starting => "starting",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopping => "stopping",
            State::Stopped => "stopped",
            State::Suspended => "suspended",
            State::Failed => "failed",
            State::Broken => "broken",
        }
    }

    /// A hypervisor process belongs to the machine.
    pub const fn is_live(self) -> bool {
        match self {
            State::Starting | State::Running | State::Paused | State::Stopping => true,
            State::Created | State::Stopped | State::Suspended | State::Failed | State::Broken => {
                false
            }
        }
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// One line of `lodge ls`; the stable JSON shape of `lodge ls -o json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub id: MachineId,
    pub name: Name,
    pub state: State,
    /// Why the state is what it is, where that is not plain.
    pub reason: Option<String>,
    /// What runs it, or ran it last.
    pub backend: Option<BackendKind>,
    pub accel: Option<Accel>,
    pub cpus: u32,
    pub memory_bytes: u64,
    /// The guest met its readiness condition since the last start.
    pub ready: bool,
    pub address: Option<String>,
    /// RFC 3339, UTC.
    pub created_at: String,
}

/// A machine with its moments and where it came from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Detail {
    pub summary: Summary,
    /// Microseconds since 1970-01-01 UTC.
    pub created_us: i64,
    /// When its state or its description last changed.
    pub modified_us: i64,
    /// When its hypervisor was started, and as which process; 0 where none runs.
    pub since_us: i64,
    pub pid: u32,
    pub origin: Option<Origin>,
    /// What its guest may read and write, where it may.
    pub mdata: Option<MdataDraft>,
    pub bootstrap: Option<Bootstrap>,
}

crate::words!(
    /// How far a guest's setting up has come.
    Stage {
        Running = "running",
        Failed = "failed",
        Succeeded = "succeeded",
        GivenUp = "given-up",
    }
);

/// What a guest has told of the script that sets it up; the stable JSON shape of `bootstrap` in
/// `lodge inspect`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bootstrap {
    /// `running`, `failed` (it will run again), `succeeded` or `given-up`.
    pub stage: Stage,
    pub runs: u32,
    /// How many runs there may be.
    pub limit: u32,
    /// The last exit status.
    pub exit: Option<i32>,
    /// The end of the guest's log.
    pub log: String,
}

/// What a running machine uses. Counters are since its start; all zero where it does not run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// The hypervisor's process; 0 where there is none.
    pub pid: u32,
    /// Nanoseconds of processor time, of the hypervisor as a whole.
    pub cpu_ns: u64,
    /// Percent of all the machine's virtual CPUs since the question before, 0 to 100.
    pub cpu_percent: f64,
    pub memory_bytes: u64,
    pub uptime_ms: u64,
    /// Nanoseconds of processor time of each virtual CPU that is online, where that was asked for.
    pub cpus_ns: Vec<u64>,
    /// Of all disks, and of each.
    pub disk: Traffic,
    pub disks: Vec<Device>,
    /// Of all interfaces, and of each.
    pub network: Traffic,
    pub nics: Vec<Device>,
    /// Control socket of the hypervisor.
    pub socket: Option<String>,
    pub interface: Option<Interface>,
}

/// Where a running machine meets its host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ends {
    /// Names of its interfaces' ends.
    pub interfaces: Vec<String>,
    /// Where its screen is shown over VNC.
    pub screen: Option<SocketAddr>,
}

/// As the guest sees it: what it received or read, what it sent or wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    pub in_bytes: u64,
    pub out_bytes: u64,
    pub in_operations: u64,
    pub out_operations: u64,
}

/// What one device has carried.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// A disk's name, or that of an interface's end on the host; empty where the hypervisor tells
    /// of all its disks at once.
    pub name: String,
    pub traffic: Traffic,
}

/// A machine's first interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    pub address: String,
    pub mac: String,
    /// Name of the host's end.
    pub tap: String,
    pub network: String,
    pub gateway: String,
    pub resolvers: Vec<String>,
}

/// One thing that happened; the stable JSON shape of `lodge events -o json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Rises by one with each event of the host.
    pub seq: i64,
    /// Microseconds since 1970-01-01 UTC.
    pub at_us: i64,
    pub id: MachineId,
    pub name: String,
    /// A word: `start`, `running`, `exited`, …
    pub kind: String,
    pub detail: String,
}
