//! What a change makes of a machine's description. Pure; whether the result is a machine is asked
//! afterwards.

use lodge_spec::draft::{
    CpusDraft, CpusFields, DiskDraft, Draft, MemoryDraft, MemoryFields, NicDraft, PortDraft, Size,
};
use lodge_spec::names::{Mac, MachineId};
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
        Change::AddDisk { disk } => {
            let disks = draft.disks.get_or_insert_default();
            let used = |n: &usize| {
                let name = Some(format!("disk{n}"));
                disks.iter().any(|disk| disk.name == name)
            };
            let number = (disks.len()..).find(|n| !used(n)).unwrap_or(disks.len());
            let name = disk.name.clone().or_else(|| Some(format!("disk{number}")));
            disks.push(DiskDraft { name, ..disk.clone() });
        }
        Change::AddNic { nic } => {
            let id = draft.uuid.as_deref().and_then(|id| id.parse::<MachineId>().ok());
            let nics = draft.nics.get_or_insert_default();
            // Those that were taken away have left gaps: the next number may be somebody's.
            let own = |n: usize| {
                let mac = id.map(|id| Mac::derived(id, n).to_string());
                (Some(format!("nic{n}")), mac)
            };
            let used = |n: &usize| {
                let (name, mac) = own(*n);
                nics.iter().any(|nic| nic.name == name || (nic.mac == mac && mac.is_some()))
            };
            let (name, mac) = own((nics.len()..).find(|n| !used(n)).unwrap_or(nics.len()));
            let nic = (**nic).clone();
            nics.push(NicDraft { name: nic.name.or(name), mac: nic.mac.or(mac), ..nic });
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_after_something_went_is_somebody_new() {
        let id = MachineId("b8ab5fc1-8576-45ef-bb51-9826b52a4651".parse().unwrap());
        let mut draft = Draft { uuid: Some(id.to_string()), ..Draft::default() };
        let nic = || Change::AddNic { nic: Box::default() };
        let disk = || Change::AddDisk { disk: DiskDraft::default() };
        for change in [nic(), nic(), disk(), disk()] {
            apply(&mut draft, &change).unwrap();
        }
        apply(&mut draft, &Change::RemoveNic { name: "nic0".into() }).unwrap();
        apply(&mut draft, &Change::RemoveDisk { name: "disk0".into() }).unwrap();
        for change in [nic(), disk()] {
            apply(&mut draft, &change).unwrap();
        }
        let nics = draft.nics.unwrap();
        let names: Vec<_> = nics.iter().map(|nic| nic.name.as_deref().unwrap()).collect();
        let macs: Vec<_> = nics.iter().map(|nic| nic.mac.clone().unwrap()).collect();
        assert_eq!(names, ["nic1", "nic2"]);
        assert_eq!(macs, [1, 2].map(|n| Mac::derived(id, n).to_string()));
        let disks = draft.disks.unwrap();
        let names: Vec<_> = disks.iter().map(|disk| disk.name.as_deref().unwrap()).collect();
        assert_eq!(names, ["disk1", "disk2"]);
    }
}
