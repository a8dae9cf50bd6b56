//! The keeper against the strict fake host and a real store.

mod lifecycle;
