//! xcluster's words: `xc` and `xcadmin`. What a command line means, where things are, and which
//! machines a cluster has; pure. Carrying it out is the program's.

pub mod document;
pub mod grammar;
pub mod machines;
pub mod nodes;
pub mod settings;

/// The name of this interface in a machine's origin.
pub const DOOR: &str = "xcluster";
