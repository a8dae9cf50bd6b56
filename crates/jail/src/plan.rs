//! What a confined process is given; all else is taken away. Plain data, no effects.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Descriptors at and above this number are out of a jailed program's reach: its limit is set to
/// this, so the one descriptor above it (the program itself) can never be made again.
pub const FD_LIMIT: u32 = 1000;

/// Everything a program keeps when it enters its jail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JailPlan {
    /// Host path of the program.
    pub program: PathBuf,
    /// The arguments, the program's own name first.
    pub argv: Vec<String>,
    pub env: Vec<(String, String)>,
    /// Host files and folders that exist inside, and nothing else does.
    pub binds: Vec<Bind>,
    /// Descriptors that stay open besides 0, 1 and 2.
    pub keep_fds: Vec<i32>,
    /// User and group inside. For root also those outside; otherwise mapped to the caller.
    pub uid: u32,
    pub gid: u32,
    /// An existing folder, hidden during set-up under the new root.
    pub stage: PathBuf,
    /// `cgroup.procs` files to join before anything else.
    pub cgroups: Vec<PathBuf>,
    /// A stream socket that receives `pid N\n` and then `enter\n` just before the program runs.
    pub status_fd: i32,
    /// Some binds are writable folders: the calls that make, rename and remove files are kept.
    pub writes_files: bool,
    /// The program listens on a socket that it makes itself, in a writable folder.
    #[serde(default)]
    pub binds_sockets: bool,
    /// A descriptor of the network namespace to live in, in place of an empty one.
    #[serde(default)]
    pub network: Option<i32>,
    /// A file system that another process serves. The program also sees itself in `/proc`.
    #[serde(default)]
    pub fuse: Option<FuseMount>,
    /// What standard input and output are; nothing where absent.
    #[serde(default)]
    pub terminal: Option<i32>,
}

/// One host path inside the jail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    pub source: PathBuf,
    /// Absolute path inside.
    pub target: PathBuf,
    #[serde(default)]
    pub writable: bool,
    /// The file is a device node that must work as one.
    #[serde(default)]
    pub device: bool,
    /// The file is code.
    #[serde(default)]
    pub executable: bool,
}

/// A file system inside the jail whose requests a process outside answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FuseMount {
    /// Absolute path inside.
    pub target: PathBuf,
    /// A socket over which that process is given its end, as a descriptor with one byte.
    pub socket: i32,
}
