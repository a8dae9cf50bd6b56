//! The native door: the command line, and the Unix socket between it and the daemon.

pub mod flist;
pub mod grammar;
pub mod image;
pub mod render;
pub mod wire;
