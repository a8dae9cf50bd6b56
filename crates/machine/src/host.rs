//! What a machine needs of the world. The host crate implements it for Linux, `fake` for tests;
//! both are held to the same promises.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use lodge_spec::machine::{Accel, BackendKind, Machine};
use lodge_spec::migration::{Migration, Passport};
use lodge_spec::names::MachineId;
use lodge_spec::problem::Problems;
use lodge_spec::request::Change;
use lodge_spec::state::Bootstrap;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::UnboundedSender;

use crate::life::Seen;

/// What is known about a hypervisor that was launched; kept in the store for re-adoption.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    pub backend: BackendKind,
    pub accel: Accel,
    /// The guest's first address, where the network has given it one.
    pub address: Option<String>,
    /// Why this backend, board and accelerator.
    pub notes: Vec<String>,
    /// Microseconds since 1970.
    #[serde(default)]
    pub since_us: i64,
    #[serde(default)]
    pub pid: u32,
}

/// Something that the guest has written into its metadata.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wrote {
    /// Into what the guest does not see again.
    pub internal: bool,
    pub key: String,
    /// `None`: it was deleted.
    pub value: Option<String>,
}

/// Something for the event log that changes no state: a mark on the timeline or a remark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    pub kind: String,
    pub detail: String,
    /// Microseconds since 1970, where the moment was earlier than the report.
    pub at_us: Option<i64>,
}

/// What the host reports about one machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    Seen(Seen),
    Mark(Box<Mark>),
    Wrote(Box<Wrote>),
    /// How far the guest's setting up has come.
    Bootstrap(Box<Bootstrap>),
}

/// Where reports about one machine go. Never blocks; reports after the machine is gone are lost.
pub type Sink = UnboundedSender<Report>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Powerdown,
    Quit,
    Pause,
    Resume,
    Reset,
}

/// A machine that is to leave; its passport is still to be written.
#[derive(Clone, Debug)]
pub struct Leaving {
    /// `lodge_spec::migration::Destination`.
    pub to: String,
    pub migration: Migration,
}

/// What became of a hypervisor while there was no daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    Alive {
        paused: bool,
        ready: bool,
    },
    /// It ended; `Err` says how, where it was not a shutdown by the guest.
    Ended(Result<(), String>),
}

/// How machines meet the world. Every effect is named after the machine's id, so that any of these
/// may be called again after a crash.
pub trait Host: Send + Sync + 'static {
    /// Whether the host has what the machine names (files, images, networks). Changes nothing.
    /// `now`: it is to start, so media that could still be brought must be there.
    fn check(
        &self,
        machine: &Machine,
        now: bool,
    ) -> impl Future<Output = Result<(), Problems>> + Send;

    /// Brings what a machine has between its runs in line with its description: makes its folder,
    /// takes away disks that it no longer has. Safe to repeat; not called while it lives.
    fn settle(&self, machine: &Machine) -> impl Future<Output = Result<(), String>> + Send;

    /// Prepares and starts the hypervisor. On an error nothing is left behind but what `release`
    /// removes. Afterwards its fate is reported to `sink`, ending with `Seen::Exited`.
    ///
    /// `resume`: it goes on from the saved memory, which is given up with `Seen::Loaded` once it is
    /// read and before the guest runs. Without it there is none afterwards.
    fn launch(
        &self,
        machine: Arc<Machine>,
        resume: bool,
        sink: Sink,
    ) -> impl Future<Output = Result<Running, String>> + Send;

    /// Finds the hypervisor that an earlier daemon launched and reports to `sink` from now on.
    fn adopt(&self, machine: Arc<Machine>, sink: Sink) -> impl Future<Output = Found> + Send;

    fn command(
        &self,
        id: MachineId,
        command: Command,
    ) -> impl Future<Output = Result<(), String>> + Send;

    /// Stops the guest and writes its memory to where a launch finds it. The hypervisor is there
    /// afterwards. On an error there is no memory, and the guest goes on if it did before.
    fn save(&self, machine: Arc<Machine>) -> impl Future<Output = Result<(), String>> + Send;

    /// Deletes the saved memory. Safe to repeat.
    fn discard(&self, id: MachineId) -> impl Future<Output = ()> + Send;

    /// Moves a running machine to another host. It runs there afterwards, and the hypervisor that is
    /// still here stands still for ever. On an error the guest goes on here, but where nobody can
    /// know whether it runs there: then it stands still, and the error says so.
    fn depart(
        &self,
        machine: Arc<Machine>,
        leaving: Leaving,
    ) -> impl Future<Output = Result<(), String>> + Send;

    /// Readies the way in for a machine that comes from another host: the pipe into which its
    /// memory is to be written. The launch that follows goes on from there.
    fn admit(
        &self,
        machine: Arc<Machine>,
        passport: Passport,
    ) -> impl Future<Output = Result<PathBuf, String>> + Send;

    /// Applies a change to a running machine; `machine` is the description after it.
    fn change(
        &self,
        machine: Arc<Machine>,
        change: Change,
    ) -> impl Future<Output = Result<(), String>> + Send;

    /// Takes over what a running machine can take over of a new description.
    fn refresh(&self, machine: Arc<Machine>) -> impl Future<Output = Result<(), String>> + Send;

    /// Gives back what a launch took. Safe to repeat; never fails in a way that could be mended.
    fn release(&self, machine: Arc<Machine>) -> impl Future<Output = ()> + Send;

    /// Deletes what the machine owns: disks, logs. Safe to repeat.
    fn forget(&self, id: MachineId) -> impl Future<Output = ()> + Send;
}
