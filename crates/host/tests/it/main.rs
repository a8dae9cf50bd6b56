//! The host's pure parts, on any host.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod plans;
mod small;
