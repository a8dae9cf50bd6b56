//! The Connect door: the conformance cases, each named after its number, over real machines.

mod calls;
mod clients;
mod load;
mod operation;
mod tenants;
mod wire;
