//! Firecracker: what the installed one can do. `plan` says how to start it, `control` drives a
//! running one over its API.

pub mod control;
pub mod plan;

use lodge_spec::machine::BackendKind;

use super::vmm::Search;

pub const SEARCH: Search = Search {
    backend: BackendKind::Firecracker,
    program: "firecracker",
    variable: "LODGE_FIRECRACKER",
    oldest: (1, 7),
    home: "github.com/firecracker-microvm/firecracker",
};
