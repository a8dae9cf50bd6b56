//! vmadm as its users call it.

mod conformance;
mod data;
mod network;
mod screen;
mod walk;
