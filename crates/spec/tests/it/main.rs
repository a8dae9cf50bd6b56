//! The language as its users meet it: documents in, machines or lists of problems out.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod documents;
mod resolving;
