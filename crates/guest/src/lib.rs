//! What the first-boot runner tells the host about its script: the one thing that guest and host
//! both know. Data only.

use serde::{Deserialize, Serialize};

/// A server that wants reports says in this header of its answer where to send them: a path on
/// itself, to which each report is posted as JSON.
pub const REPORT_HEADER: &str = "lodge-report";

/// In an answer without a script: the run counts all the same.
pub const REQUIRE_HEADER: &str = "lodge-require-script";

/// Bytes of the log that a report carries at most.
pub const TAIL: usize = 4096;

/// How far the runner has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// The script runs.
    Running,
    /// It has failed and will run again.
    Failed,
    /// It has ended well; it does not run again.
    Succeeded,
    /// It has failed as often as it may.
    GivenUp,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub stage: Stage,
    /// Runs so far, this one included.
    pub runs: u32,
    /// How many there may be.
    pub limit: u32,
    /// The script's exit status; 128 and the signal's number where one ended it.
    pub exit: Option<i32>,
    /// The end of the log.
    #[serde(default)]
    pub tail: String,
}
