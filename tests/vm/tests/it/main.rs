//! Lodge as its users meet it: the real program, real hypervisors, real guests.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(clippy::print_stderr, reason = "what is skipped is said aloud")]

mod bad_input;
mod bootstrap;
mod debian;
mod devices;
mod faults;
mod lifecycle;
mod metald;
mod migration;
mod network;
mod probe;
mod rootless;
mod vmadm;
mod vmm;
mod wires;
mod xcluster;
mod zero_os;
