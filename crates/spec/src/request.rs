//! The closed list of what may be asked of Lodge and how it answers. Doors translate to and from
//! these; policy is behind them. They are also the messages of the native socket, one JSON object
//! a line, which is why this file, besides `draft`, knows serde.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::draft::{DiskDraft, Draft, NicDraft, PortDraft};
use crate::machine::Segment;
use crate::migration::{Expected, Migration};
use crate::names::{ImageName, MachineId, NetName};
use crate::problem::Problem;
use crate::state::{Detail, Ends, Event, State, Summary, Usage};
use crate::throttle::DiskLimits;

/// A machine as people name it: its name, its UUID or an unambiguous start of the UUID.
pub type Target = String;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    Ping,
    Create {
        draft: Box<Draft>,
    },
    Plan {
        draft: Box<Draft>,
    },
    Start {
        target: Target,
    },
    /// Starts with devices and an order that hold until the hypervisor ends.
    Boot {
        target: Target,
        with: OneBoot,
    },
    Stop {
        target: Target,
        force: bool,
        timeout_ms: u64,
    },
    Restart {
        target: Target,
        timeout_ms: u64,
    },
    Reset {
        target: Target,
    },
    Pause {
        target: Target,
    },
    Resume {
        target: Target,
    },
    /// Saves the guest's memory to a file and ends the hypervisor; the next start goes on there.
    Suspend {
        target: Target,
    },
    /// Moves a running machine to another host, where its guest goes on; ends when it is gone here.
    Migrate {
        target: Target,
        /// `migration::Destination`.
        to: String,
    },
    /// What to do differently for a machine that will come from another host.
    Expect(Box<Expected>),
    /// Takes in a machine that comes from another host: a document with `memory`, a pipe into which
    /// its memory is to be written, then, when it runs here, a `Summary`.
    Arrive(Box<Migration>),
    Remove {
        target: Target,
        force: bool,
    },
    Update {
        target: Target,
        change: Box<Change>,
    },
    /// Replaces the description. What a running machine can take over at once it does; the rest
    /// waits for its next start.
    Redefine {
        target: Target,
        draft: Box<Draft>,
        /// Refused where the machine has changed since.
        unchanged_since_us: Option<i64>,
    },
    /// What the hypervisor itself says of a running machine: a document with a member for each.
    Monitor {
        target: Target,
        questions: Vec<Question>,
    },
    /// Interrupts the guest as a service processor does.
    Nmi {
        target: Target,
    },
    /// Puts what is on the screen into a file (PPM); a document with its `path`.
    Screenshot {
        target: Target,
    },
    /// Keeps a copy of a machine's own disks, goes back to one, or forgets one. A document with
    /// the copy's `bytes` and its moment, `at_us`.
    Snapshot {
        target: Target,
        name: String,
        verb: SnapshotVerb,
    },
    /// The files of a machine's own disks: `name`, `path`, `owner`, and `bytes` where there are any.
    DiskFiles {
        target: Target,
    },
    /// Makes an empty disk of the format `raw` or `qcow2` where there is no file yet.
    MakeDisk {
        path: PathBuf,
        format: String,
        bytes: u64,
    },
    /// Writes what a disk holds into a new file, in another format.
    ConvertDisk {
        from: PathBuf,
        to: PathBuf,
        format: String,
    },
    /// Sends a signal to the hypervisor.
    Signal {
        target: Target,
        signal: i32,
    },
    List {
        all: bool,
    },
    /// The machines that came through one door, the youngest first.
    Page(Page),
    /// One machine with where it came from.
    Fetch {
        target: Target,
    },
    /// What a machine uses now; `each_cpu` for the time that each virtual CPU had.
    Usage {
        target: Target,
        #[serde(default)]
        each_cpu: bool,
    },
    /// Where a running machine meets its host.
    Ends {
        target: Target,
    },
    Inspect {
        target: Target,
    },
    Why {
        target: Target,
    },
    Timeline {
        target: Target,
    },
    /// Ends with one `Summary` when the condition holds, or a refusal when it cannot any more.
    Wait {
        target: Target,
        until: Condition,
        timeout_ms: Option<u64>,
    },
    /// A stream of `Event` replies: the past ones where `past` is set, then, where `follow` is,
    /// those to come. Without the past, a first `Done` says that nothing is missed any more.
    Events {
        target: Option<Target>,
        follow: bool,
        past: bool,
    },
    /// Where the machine's console and its log are.
    Console {
        target: Target,
    },
    /// Changes a network, made where it is not there yet. A document with the `pid` of a process
    /// that lives in it.
    Network {
        name: NetName,
        ask: NetworkAsk,
    },
    Doctor,
    /// Puts the jail to the test. A document: a list of `{way, closed}`.
    Trial,
    Gc {
        dry_run: bool,
    },
    /// A stream of `Progress`, then `Image`.
    ImageBuild {
        name: ImageName,
        size: Option<u64>,
        packages: Vec<String>,
    },
    ImageAdd {
        path: String,
        name: Option<ImageName>,
    },
    /// Puts an image's kernel and disk into a host folder, as plain files.
    ImageExport {
        name: ImageName,
        folder: String,
    },
    ImageList,
    ImageInspect {
        name: ImageName,
    },
    ImageRemove {
        name: ImageName,
    },
    ImageVerify {
        name: Option<ImageName>,
    },
}

/// What is different about one start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OneBoot {
    /// Kinds of device to try in turn, in place of the machine's own.
    pub order: Option<Vec<String>>,
    /// The kind to try first until the guest resets.
    pub once: Option<String>,
    /// Attached after the machine's own.
    pub disks: Vec<DiskDraft>,
}

crate::words!(
    /// What a hypervisor can be asked about a machine that runs.
    Question {
        Block = "block",
        BlockStats = "blockstats",
        Chardev = "chardev",
        Cpus = "cpus",
        Kvm = "kvm",
        Pci = "pci",
        Status = "status",
        Version = "version",
        Vnc = "vnc",
    }
);

/// What is asked of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkAsk {
    /// To stay although no machine is attached, or no longer.
    Hold { stay: bool },
    /// To have a segment, its router at these addresses.
    Segment { segment: Segment, gateway: Option<(Ipv4Addr, u8)> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotVerb {
    Take,
    Restore,
    Drop,
}

/// Which machines to list, and from where on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page {
    pub door: String,
    pub owner: Option<String>,
    /// Empty: in any state.
    pub states: Vec<State>,
    /// Moment of creation and identity of the last machine of the page before.
    pub after: Option<(i64, MachineId)>,
    pub limit: usize,
}

/// One change to a machine, live where it runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "snake_case")]
pub enum Change {
    Cpus {
        count: u32,
    },
    Memory {
        bytes: u64,
    },
    AddDisk {
        disk: DiskDraft,
    },
    RemoveDisk {
        name: String,
    },
    /// None lifts them.
    DiskLimits {
        name: String,
        limits: Option<DiskLimits>,
    },
    AddNic {
        nic: Box<NicDraft>,
    },
    RemoveNic {
        name: String,
    },
    AddPort {
        port: PortDraft,
    },
    /// The one with this host port and protocol.
    RemovePort {
        port: PortDraft,
    },
    /// What the machine's origin keeps with it; nothing else changes.
    Document {
        document: String,
    },
}

impl Change {
    /// The guest sees it as a change of its hardware.
    pub const fn concerns_hardware(&self) -> bool {
        match self {
            Change::Cpus { .. }
            | Change::Memory { .. }
            | Change::AddDisk { .. }
            | Change::RemoveDisk { .. }
            | Change::AddNic { .. }
            | Change::RemoveNic { .. } => true,
            Change::DiskLimits { .. }
            | Change::AddPort { .. }
            | Change::RemovePort { .. }
            | Change::Document { .. } => false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Condition {
    Running,
    Ready,
    Stopped,
    /// The script that sets the guest up has succeeded.
    Bootstrap,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    Done,
    Pong {
        version: String,
        pid: u32,
        /// Somebody started it on purpose; one that a command started yields to such a one.
        attended: bool,
    },
    Summary {
        machine: Summary,
    },
    List {
        machines: Vec<Summary>,
    },
    Page {
        machines: Vec<Detail>,
        /// How many there are in all, on all pages.
        total: usize,
        more: bool,
    },
    Detail {
        machine: Box<Detail>,
    },
    Usage {
        usage: Box<Usage>,
    },
    Ends {
        ends: Ends,
    },
    /// A document with a shape documented beside its command.
    Document {
        value: Value,
    },
    Event {
        event: Event,
    },
    Progress {
        message: String,
        done: u64,
        total: u64,
    },
    Console {
        socket: String,
        log: String,
    },
    Refused {
        refusal: Refusal,
    },
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Refusal {
    #[error("there is no machine {target}{}", hint(.near))]
    NotFound { target: Target, near: Option<String> },
    #[error("{target} could be any of {}", .candidates.join(", "))]
    Ambiguous { target: Target, candidates: Vec<String> },
    #[error("there is no image {name}{}", hint(.near))]
    NoImage { name: String, near: Option<String> },
    #[error("{what} {value} is already in use by {holder}")]
    Taken { what: String, value: String, holder: String },
    #[error("{}", lines(.problems))]
    Invalid { problems: Vec<Problem> },
    #[error("cannot {verb} {name}: it is {state}{}", way_out(*.state))]
    State { verb: String, name: String, state: State },
    #[error("{name} has changed meanwhile; look at it again")]
    Changed { name: String },
    #[error("{message}")]
    Unsupported { message: String },
    #[error("{name} was not {what} after {seconds} s")]
    Timeout { name: String, what: String, seconds: u64 },
    #[error("{message}")]
    Failed { message: String },
}

/// What can be done with a machine in a state that allows little.
fn way_out(state: State) -> &'static str {
    if state == State::Suspended {
        "; starting it goes on where it was, stopping it by force gives its memory up"
    } else {
        ""
    }
}

fn hint(near: &Option<String>) -> String {
    near.as_ref().map(|n| format!("; did you mean {n}?")).unwrap_or_default()
}

fn lines(problems: &[Problem]) -> String {
    let lines: Vec<String> = problems.iter().map(Problem::to_string).collect();
    lines.join("\n")
}

impl Refusal {
    pub fn failed(error: impl std::fmt::Display) -> Self {
        Refusal::Failed { message: error.to_string() }
    }

    pub fn invalid(path: impl Into<String>, message: impl std::fmt::Display) -> Self {
        Refusal::Invalid { problems: vec![Problem::new(path, message)] }
    }
}
