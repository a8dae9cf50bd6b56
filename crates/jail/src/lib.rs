//! The door to less: what a confined process keeps, how it is made, and what is in force. Knows no
//! machine and no hypervisor; never widens what its plan says. The program `lodge-jail` is single
//! threaded, because only a single thread can enter a user namespace.

pub mod cgroup;
pub mod in_force;
pub mod plan;
pub mod script;
pub mod worker;

mod enter;
mod mounts;
mod owners;
mod syscalls;

pub use enter::Error;
pub use enter::run;
pub use plan::{Bind, FuseMount, JailPlan};
