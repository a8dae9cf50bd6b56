//! The language that every door speaks: a `Draft` is what was asked, a `Machine` is what was
//! checked, a `Request` is what may be done. Pure: this crate opens no file, starts no process
//! and knows no hypervisor binary.

// A new variant of our own is to be decided about wherever it is matched.
#![deny(clippy::wildcard_enum_match_arm)]

pub mod capability;
mod clashes;
pub mod document;
pub mod draft;
pub mod extras;
pub mod flist;
pub mod machine;
pub mod migration;
pub mod names;
pub mod nbd;
pub mod ports;
pub mod problem;
pub mod remote;
pub mod request;
pub mod resolve;
mod schema;
pub mod state;
pub mod throttle;
pub mod units;
pub mod wire;
pub mod zdb;

pub use draft::Draft;
pub use machine::Machine;
pub use names::{Digest, MachineId, Name};
pub use problem::{Problem, Problems};
pub use units::Bytes;
