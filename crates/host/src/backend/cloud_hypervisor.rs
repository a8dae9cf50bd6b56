//! Cloud Hypervisor: what the installed one can do. `plan` says how to start it, `control` drives a
//! running one over its API.

pub mod control;
pub mod plan;

use lodge_spec::machine::BackendKind;

use super::vmm::Search;

pub const SEARCH: Search = Search {
    backend: BackendKind::CloudHypervisor,
    program: "cloud-hypervisor",
    variable: "LODGE_CLOUD_HYPERVISOR",
    oldest: (38, 0),
    home: "github.com/cloud-hypervisor/cloud-hypervisor",
};
