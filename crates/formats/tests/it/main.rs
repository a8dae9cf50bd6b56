//! Formats checked by the programs that everyone else uses for them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod ext4;
mod flist;
mod iso9660;
mod qcow2;
