//! What a machine needs and what a backend has, as data; choosing is comparing the two.
//! Knows no binary: capabilities are filled in by whoever probed one.

use crate::flist::Transport;
use crate::machine::{Boot, DiskBus, Firmware, Machine, Media, NicModel};

/// Something that a backend has or lacks. The order is that of explanations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Feature {
    KernelBoot,
    BiosBoot,
    UefiBoot,
    NetworkBoot,
    IdeDisks,
    ScsiDisks,
    Cdrom,
    LegacyNics,
    CpuHotplug,
    MemoryHotplug,
    DiskLimits,
    Shares,
    RateLimits,
    Display,
    Smbios,
    SecondSerial,
    Cidata,
    FlistRoot,
}

impl Feature {
    pub const fn describe(self) -> &'static str {
        match self {
            Feature::KernelBoot => "booting a kernel directly",
            Feature::BiosBoot => "booting through a BIOS",
            Feature::UefiBoot => "booting through UEFI",
            Feature::NetworkBoot => "booting from the network",
            Feature::IdeDisks => "disks on an ide bus",
            Feature::ScsiDisks => "disks on a scsi bus",
            Feature::Cdrom => "CD-ROM drives",
            Feature::LegacyNics => "e1000 or rtl8139 interfaces",
            Feature::CpuHotplug => "plugging in CPUs",
            Feature::MemoryHotplug => "plugging in memory",
            Feature::DiskLimits => "limits on disks",
            Feature::Shares => "shared folders",
            Feature::RateLimits => "limits on what an interface carries",
            Feature::Display => "a screen",
            Feature::Smbios => "a name of its own for the guest to see",
            Feature::Cidata => "a disk for cloud-init",
            Feature::FlistRoot => "a root that is an flist",
            Feature::SecondSerial => "a second serial port",
        }
    }
}

/// A need and the field that asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    pub path: String,
    pub feature: Feature,
}

/// Everything that a machine asks of its backend beyond CPUs, memory and virtio devices.
pub fn needs(machine: &Machine) -> Vec<Need> {
    let mut list = Vec::new();
    let mut need = |path: String, feature| list.push(Need { path, feature });
    match &machine.boot {
        Boot::Kernel { .. } | Boot::Image { .. } => need("boot".into(), Feature::KernelBoot),
        Boot::Flist { flist, .. } => {
            need("boot".into(), Feature::KernelBoot);
            if flist.transport != Some(Transport::Disk) {
                need("flist".into(), Feature::FlistRoot);
            }
        }
        Boot::Firmware { firmware: Firmware::Bios, .. } => need("boot".into(), Feature::BiosBoot),
        Boot::Firmware { firmware: Firmware::Uefi, .. } => need("boot".into(), Feature::UefiBoot),
    }
    for disk in &machine.disks {
        let path = format!("disks.{}", disk.name);
        if disk.media == Media::Cdrom {
            need(path.clone(), Feature::Cdrom);
        }
        if disk.limits.is_some() {
            need(format!("{path}.limits"), Feature::DiskLimits);
        }
        match disk.bus {
            DiskBus::Virtio => {}
            DiskBus::Ide => need(path, Feature::IdeDisks),
            DiskBus::Scsi => need(path, Feature::ScsiDisks),
        }
    }
    for nic in &machine.nics {
        match nic.model {
            NicModel::Virtio => {}
            NicModel::E1000 | NicModel::Rtl8139 => {
                need(format!("nics.{}", nic.name), Feature::LegacyNics);
            }
        }
    }
    for nic in &machine.nics {
        for (side, limit) in [("rx_limit", nic.rx_limit), ("tx_limit", nic.tx_limit)] {
            if limit.is_some() {
                need(format!("nics.{}.{side}", nic.name), Feature::RateLimits);
            }
        }
    }
    if machine.cpus.max > machine.cpus.count {
        need("cpus.max".into(), Feature::CpuHotplug);
    }
    if machine.memory.max > machine.memory.size {
        need("memory.max".into(), Feature::MemoryHotplug);
    }
    for share in &machine.shares {
        need(format!("shares.{}", share.tag), Feature::Shares);
    }
    let extras = [
        ("display", machine.display.is_some(), Feature::Display),
        ("smbios", machine.smbios.is_some(), Feature::Smbios),
        ("mdata", machine.mdata.is_some(), Feature::SecondSerial),
        ("cidata", !machine.cidata.is_empty(), Feature::Cidata),
    ];
    for (path, _, feature) in extras.into_iter().filter(|(_, asked, _)| *asked) {
        need(path.into(), feature);
    }
    list
}
