//! The keeper against the strict fake host and a real store.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod lifecycle;
mod migration;
mod suspend;
