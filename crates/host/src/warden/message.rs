//! What daemon and warden say to each other: JSON lines on the warden's socket.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use lodge_machine::host::Wrote;
use lodge_spec::state::Bootstrap;
use serde::{Deserialize, Serialize};

use crate::backend::{Forward, ScreenPort, Tap};

/// The warden's first and only line on its standard output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Started {
    Ok { pid: u32 },
    Error { error: String },
}

/// What a warden tells whoever connects: first its `Status`, then what happens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "tell", rename_all = "snake_case")]
pub enum Tell {
    Status(Status),
    Ready {
        at_us: i64,
    },
    Panic {
        line: String,
    },
    Mark {
        kind: String,
        detail: String,
        at_us: i64,
    },
    Exited(Exit),
    /// The answer to `Ask::Tap`; the descriptor comes with it.
    Tap {
        error: Option<String>,
    },
    /// The answer to `Ask::Ports`.
    Ports {
        error: Option<String>,
    },
    /// How far the guest's setting up has come.
    Bootstrap {
        told: Bootstrap,
    },
    /// The guest has written into its metadata.
    Wrote {
        wrote: Wrote,
    },
}

/// What has happened so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The hypervisor's process, as the host sees it.
    pub pid: u32,
    pub ready: bool,
    pub panic: Option<String>,
    /// Where the screen can be seen.
    #[serde(default)]
    pub screen: Option<SocketAddr>,
    /// The interfaces that the machine has now, in the order in which they came.
    #[serde(default)]
    pub taps: Vec<HeldTap>,
    /// What the guest has written since its metadata was last set.
    #[serde(default)]
    pub wrote: Vec<Wrote>,
    /// What the guest has told of its setting up.
    #[serde(default)]
    pub bootstrap: Option<Bootstrap>,
}

/// An interface that a warden holds for its machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldTap {
    pub interface: String,
    /// The network's folder, with the socket of its keeper.
    pub network: PathBuf,
}

impl HeldTap {
    pub fn of(tap: &Tap) -> Self {
        Self { interface: tap.interface.clone(), network: tap.network.clone() }
    }
}

/// How the hypervisor ended. Kept in a file for daemons that were not there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    /// Its last lines on standard error.
    pub stderr: Vec<String>,
    pub panic: Option<String>,
}

impl Exit {
    /// `Err` says what went wrong.
    pub fn outcome(&self) -> Result<(), String> {
        if let Some(line) = &self.panic {
            return Err(line.clone());
        }
        let how = match (self.code, self.signal) {
            (Some(0), _) => return Ok(()),
            (Some(code), _) => format!("the hypervisor ended with status {code}"),
            (None, Some(signal)) => format!("the hypervisor was killed by signal {signal}"),
            (None, None) => "the hypervisor ended in an unknown way".to_owned(),
        };
        match self.stderr.last() {
            Some(line) => Err(format!("{how}: {line}")),
            None => Err(how),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum Ask {
    /// End the hypervisor now.
    Kill,
    /// Make one more tap interface and hand it over.
    Tap { tap: Box<Tap> },
    /// Forward these host ports and no others.
    Ports { ports: Vec<Forward> },
    /// Give an interface back to its network.
    Untap { interface: String },
    /// Send the hypervisor a signal.
    Signal { signal: i32 },
    /// Read the metadata again.
    Mdata,
    /// Listen elsewhere for those who want to see the screen.
    Screen { at: Option<ScreenPort> },
}

pub fn socket(run: &Path) -> PathBuf {
    run.join("warden.sock")
}

pub fn console_socket(run: &Path) -> PathBuf {
    run.join("console.sock")
}

pub fn exit_file(run: &Path) -> PathBuf {
    run.join("exit.json")
}
