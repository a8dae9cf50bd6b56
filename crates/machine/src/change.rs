//! What a change makes of a machine's description. Pure; whether the result is a machine is asked
//! afterwards.

use lodge_spec::draft::{CpusDraft, CpusFields, Draft, MemoryDraft, MemoryFields, PortDraft, Size};
use lodge_spec::request::{Change, Refusal};

/// Applies a change to a description in which nothing is left to a default.
pub(crate) fn apply(draft: &mut Draft, change: &Change) -> Result<(), Refusal> {
    let missing =
        |list: &str, name: &str| Refusal::invalid(list, format!("there is none named {name}"));
    match change {
        Change::Cpus { count } => {
            if let Some(CpusDraft::Detailed(CpusFields { count: old, .. })) = &mut draft.cpus {
                *old = Some(*count);
            }
        }
        Change::Memory { bytes } => {
            if let Some(MemoryDraft::Detailed(MemoryFields { size, .. })) = &mut draft.memory {
                *size = Some(Size::Bytes(*bytes));
            }
        }
        Change::AddDisk { disk } => draft.disks.get_or_insert_default().push(disk.clone()),
        Change::AddNic { nic } => draft.nics.get_or_insert_default().push((**nic).clone()),
        Change::RemoveDisk { name } => {
            let disks = draft.disks.get_or_insert_default();
            let at = disks.iter().position(|d| d.name.as_ref() == Some(name));
            disks.remove(at.ok_or_else(|| missing("disks", name))?);
        }
        Change::DiskLimits { name, limits } => {
            let disks = draft.disks.get_or_insert_default();
            let disk = disks.iter_mut().find(|d| d.name.as_ref() == Some(name));
            disk.ok_or_else(|| missing("disks", name))?.limits = limits.clone();
        }
        Change::AddPort { port } => draft.ports.get_or_insert_default().push(port.clone()),
        Change::RemovePort { port } => {
            let ports = draft.ports.get_or_insert_default();
            let at = ports.iter().position(|known| same_port(known, port));
            ports.remove(at.ok_or_else(|| missing("ports", "that"))?);
        }
        Change::Document { document } => match &mut draft.origin {
            Some(origin) => origin.document = Some(document.clone()),
            None => return Err(Refusal::invalid("origin", "nobody's interface made this machine")),
        },
        Change::RemoveNic { name } => {
            let nics = draft.nics.get_or_insert_default();
            let at = nics.iter().position(|n| n.name.as_ref() == Some(name));
            nics.remove(at.ok_or_else(|| missing("nics", name))?);
        }
    }
    Ok(())
}

/// Ports are known by the host's side.
fn same_port(a: &PortDraft, b: &PortDraft) -> bool {
    let key = |port: &PortDraft| match port {
        PortDraft::Detailed(fields) => {
            let protocol = fields.protocol.clone().unwrap_or_else(|| "tcp".into());
            Some((fields.host, protocol))
        }
        PortDraft::Text(_) => None,
    };
    key(a).is_some() && key(a) == key(b)
}
