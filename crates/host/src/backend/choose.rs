//! Which hypervisor a machine gets: the one that is named, else the first that can do all that is
//! asked. The one place that knows them all; they do not know each other.

use lodge_spec::machine::{BackendKind, Machine};

use crate::backend::{Launch, Survey, Unsupported, cloud_hypervisor, firecracker, qemu};
use crate::facts::Facts;

/// The order of preference: the least first.
const ORDER: [BackendKind; 3] =
    [BackendKind::Firecracker, BackendKind::CloudHypervisor, BackendKind::Qemu];

/// What each hypervisor says to a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    pub verdicts: Vec<(BackendKind, Result<Launch, Vec<Unsupported>>)>,
    wanted: Option<BackendKind>,
}

impl Choice {
    pub fn of(machine: &Machine, survey: &Survey, facts: &Facts) -> Self {
        let plan = |backend| match backend {
            BackendKind::Firecracker => firecracker::plan::plan(machine, survey, facts),
            BackendKind::CloudHypervisor => cloud_hypervisor::plan::plan(machine, survey, facts),
            BackendKind::Qemu => qemu::plan::plan(machine, survey, facts),
        };
        let verdicts = ORDER.map(|backend| (backend, plan(backend))).into();
        Self { verdicts, wanted: machine.backend }
    }

    /// The launch to carry out, or what is in the way: of the hypervisor that is named, else of
    /// those that are installed, else of all.
    pub fn chosen(self) -> Result<Launch, Vec<Unsupported>> {
        let wanted = self.wanted;
        let mut lacks: Vec<Vec<Unsupported>> = Vec::new();
        for (backend, verdict) in self.verdicts {
            if wanted.is_some_and(|wanted| wanted != backend) {
                continue;
            }
            match verdict {
                Ok(launch) => return Ok(launch),
                Err(list) => lacks.push(list),
            }
        }
        let missing = |list: &Vec<Unsupported>| list.iter().any(|u| u.path.is_empty());
        if lacks.iter().any(|list| !missing(list)) {
            lacks.retain(|list| !missing(list));
        }
        Err(lacks.into_iter().flatten().collect())
    }
}
