//! What the parts of one machine would fight over: names, addresses, ports, files, room on a bus.

use std::collections::BTreeSet;

use crate::extras;
use crate::machine::{Disk, DiskBus, DiskSource, GuestFile, Nic, Port, Share};
use crate::problem::Problems;

const MAX_DEVICES: usize = 24;

/// Everything that appears twice, or too often.
pub(crate) fn check_clashes(
    p: &mut Problems,
    disks: &[Disk],
    nics: &[Nic],
    ports: &[Port],
    shares: &[Share],
    files: &[GuestFile],
) {
    unique(p, "disks", disks.iter().map(|d| d.name.as_str().to_owned()));
    unique(p, "nics", nics.iter().map(|n| n.name.as_str().to_owned()));
    unique(p, "nics", nics.iter().map(|n| n.mac.to_string()));
    unique(p, "shares", shares.iter().map(|s| s.tag.as_str().to_owned()));
    unique(p, "files", files.iter().map(|f| f.path.clone()));
    unique(p, "ports", ports.iter().map(|f| format!("{}/{}", f.host, f.protocol)));
    let writable = disks.iter().filter(|d| !d.read_only).filter_map(|d| match &d.source {
        DiskSource::Path(path) => Some(path.display().to_string()),
        DiskSource::Own(path) => Some(extras::own_text(path)),
        DiskSource::Remote(remote) => Some(remote.shown()),
        DiskSource::Above(_)
        | DiskSource::Image { .. }
        | DiskSource::Blank { .. }
        | DiskSource::Flist => None,
    });
    unique(p, "disks", writable);
    for (what, count) in [("disks", disks.len()), ("nics", nics.len()), ("shares", shares.len())] {
        if count > MAX_DEVICES {
            p.add(what, format!("{count} are too many; {MAX_DEVICES} are possible"));
        }
    }
    if disks.iter().filter(|d| d.bus == DiskBus::Ide).count() > 4 {
        p.add("disks", "the ide bus takes four devices; put the others on virtio or scsi");
    }
}

fn unique(p: &mut Problems, path: &str, values: impl Iterator<Item = String>) {
    let mut seen = BTreeSet::new();
    for value in values {
        if seen.contains(&value) {
            p.add(path, format!("{value} appears twice"));
        }
        seen.insert(value);
    }
}
