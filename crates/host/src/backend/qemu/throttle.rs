//! Limits on a disk as QEMU is told of them. Pure.

use lodge_spec::machine::{Board, Disk, DiskBus};
use lodge_spec::throttle::{DiskLimits, Rates};
use serde_json::{Value, json};

use super::plan::disk_id;

/// The command that sets them.
pub(super) const COMMAND: &str = "block_set_io_throttle";

/// Its arguments. What is absent is unlimited; nothing of earlier limits stays.
pub(super) fn arguments(disk: &Disk, board: Board) -> Value {
    let (unlimited, none) = (DiskLimits::default(), Rates::default());
    let limits = disk.limits.as_ref().unwrap_or(&unlimited);
    // A virtio disk on PCI is a device within a device, and the inner one has the blocks.
    let id = disk_id(disk.name.as_str());
    let id = match (disk.bus, board) {
        (DiskBus::Virtio, Board::Q35 | Board::Pc) => {
            format!("/machine/peripheral/{id}/virtio-backend")
        }
        _ => id,
    };
    let mut all = json!({"id": id});
    for (kind, rates) in [("bps", &limits.bytes), ("iops", &limits.operations)] {
        for (way, rate) in rates.as_ref().unwrap_or(&none).each() {
            let name = match way {
                "read" => format!("{kind}_rd"),
                "write" => format!("{kind}_wr"),
                _ => kind.to_owned(),
            };
            if let Some(burst) = rate.and_then(|rate| rate.burst) {
                all[format!("{name}_max")] = json!(burst);
            }
            if let Some(seconds) = rate.and_then(|rate| rate.burst_seconds) {
                all[format!("{name}_max_length")] = json!(seconds);
            }
            all[name] = json!(rate.map_or(0, |rate| rate.rate));
        }
    }
    if let Some(bytes) = limits.operation_bytes {
        all["iops_size"] = json!(bytes);
    }
    // Of another machine's groups QEMU knows nothing.
    if let Some(group) = &limits.group {
        all["group"] = json!(group);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use lodge_spec::machine::{DiskSource, Media};

    #[test]
    fn what_is_absent_is_unlimited() {
        let mut disk = Disk {
            name: "vda".parse().unwrap(),
            source: DiskSource::Path("/x".into()),
            bus: DiskBus::Scsi,
            media: Media::Disk,
            read_only: false,
            serial: "x".into(),
            first: false,
            limits: None,
        };
        let none = json!({"id": "disk-vda", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0,
            "iops_rd": 0, "iops_wr": 0});
        assert_eq!(arguments(&disk, Board::Q35), none);
        disk.limits = serde_json::from_value(json!({
            "bytes": {"read": {"rate": 5, "burst": 10, "burst_seconds": 2}},
            "operations": {"total": {"rate": 7}}, "operation_bytes": 4096, "group": "g",
        }))
        .unwrap();
        let mut wanted = none;
        for (name, value) in [
            ("bps_rd", 5),
            ("bps_rd_max", 10),
            ("bps_rd_max_length", 2),
            ("iops", 7),
            ("iops_size", 4096),
        ] {
            wanted[name] = json!(value);
        }
        wanted["group"] = json!("g");
        wanted["id"] = json!("/machine/peripheral/disk-vda/virtio-backend");
        disk.bus = DiskBus::Virtio;
        assert_eq!(arguments(&disk, Board::Q35), wanted);
        wanted["id"] = json!("disk-vda");
        assert_eq!(arguments(&disk, Board::Microvm), wanted);
    }
}
