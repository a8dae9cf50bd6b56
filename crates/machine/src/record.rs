//! What the store keeps of a machine: a versioned document. Reading one resolves it again, so a
//! record that no longer makes sense is found out here and not in the middle of a start.

use lodge_spec::draft::Draft;
use lodge_spec::machine::Machine;
use lodge_spec::names::MachineId;
use lodge_spec::resolve::{Defaults, resolve};
use lodge_spec::state::Bootstrap;
use serde::{Deserialize, Serialize};

use crate::host::Running;
use crate::life::Life;

const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct RecordV1 {
    version: u32,
    created_us: i64,
    #[serde(default)]
    modified_us: i64,
    machine: Draft,
    life: Life,
    running: Option<Running>,
    #[serde(default)]
    bootstrap: Option<Bootstrap>,
}

/// Everything that outlives the daemon about one machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    pub created_us: i64,
    /// When its state or its description last changed.
    pub modified_us: i64,
    pub machine: Machine,
    pub life: Life,
    pub running: Option<Running>,
    /// What its guest has told of its setting up.
    pub bootstrap: Option<Bootstrap>,
}

impl Record {
    pub fn to_text(&self) -> String {
        let Record { created_us, modified_us, machine, life, running, bootstrap } = self;
        let record = RecordV1 {
            version: VERSION,
            created_us: *created_us,
            modified_us: *modified_us,
            machine: machine.to_draft(),
            life: life.clone(),
            running: running.clone(),
            bootstrap: bootstrap.clone(),
        };
        serde_json::to_string(&record).expect("a record is plain JSON")
    }

    /// The error says what is wrong with the text.
    pub fn from_text(id: MachineId, text: &str) -> Result<Self, String> {
        let RecordV1 { version, created_us, modified_us, machine, life, running, bootstrap } =
            serde_json::from_str(text).map_err(|e| format!("the record is unreadable: {e}"))?;
        if version != VERSION {
            return Err(format!("the record has version {version}; this program knows {VERSION}"));
        }
        let machine = resolve(machine, Defaults { id })
            .map_err(|p| format!("the record describes no machine: {p}"))?;
        if machine.id != id {
            return Err(format!("the record of {id} describes {}", machine.id));
        }
        let modified_us = modified_us.max(created_us);
        Ok(Self { created_us, modified_us, machine, life, running, bootstrap })
    }
}
