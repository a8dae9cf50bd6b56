//! Networks: a namespace each, with a bridge, the machines' taps, and a keeper that answers DHCP
//! and DNS there. Root and rootless differ only in how the namespace meets the world.

pub(crate) mod client;
mod dhcp;
mod dns;
mod gateways;
mod guard;
pub mod holder;
pub mod keeper;
mod names;
pub mod plan;
mod segments;
mod setup;
pub(crate) mod tap;
pub mod uplink;
pub(crate) mod wires;
