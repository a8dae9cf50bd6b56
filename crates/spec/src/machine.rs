//! What was checked: a machine in which every value is present, in range and of its own type.
//! Public fields, no methods that decide. Not serializable: the store keeps the `Draft` that
//! `to_draft` renders, so that no format ever grows out of this type.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use crate::draft::{
    BootDraft, CpusDraft, CpusFields, DiskDraft, Draft, FileDraft, LimitsDraft, MemoryDraft,
    MemoryFields, NicDraft, OriginDraft, RateLimitDraft, RestartDraft, RestartFields, Scalar,
    ShareDraft, Size,
};
use crate::extras::{self, Bootstrap, Display, Guard, Lease, Mdata, Smbios};
use crate::flist::Flist;
use crate::names::{DeviceName, ImageName, Mac, MachineId, Name, NetName};
use crate::remote::Remote;
use crate::throttle::DiskLimits;
use crate::units::Bytes;
use crate::wire::Wire;

#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    pub id: MachineId,
    pub name: Name,
    pub cpus: Cpus,
    pub memory: Memory,
    pub boot: Boot,
    /// In the guest's order; the image's disk, if any, is the first.
    pub disks: Vec<Disk>,
    pub nics: Vec<Nic>,
    pub ports: Vec<Port>,
    pub shares: Vec<Share>,
    pub files: Vec<GuestFile>,
    pub ssh_keys: Vec<String>,
    pub hostname: String,
    /// Told to the guest by DHCP in place of the network's own.
    pub resolvers: Vec<Ipv4Addr>,
    pub metadata: BTreeMap<String, Scalar>,
    pub tags: BTreeMap<String, Scalar>,
    pub autostart: bool,
    pub ephemeral: bool,
    pub restart: Restart,
    pub ready: Option<Readiness>,
    pub backend: Option<BackendKind>,
    pub accel: Option<Accel>,
    pub board: Option<Board>,
    pub limits: Limits,
    // Boxed: most machines have none of these.
    pub display: Option<Box<Display>>,
    pub smbios: Option<Box<Smbios>>,
    pub mdata: Option<Box<Mdata>>,
    /// Files for cloud-init on a disk of their own; none where it is empty.
    pub cidata: BTreeMap<String, String>,
    pub bootstrap: Option<Box<Bootstrap>>,
    /// It has a folder of its own for media.
    pub own_folder: bool,
    pub origin: Option<Origin>,
}

/// A machine as another system's interface knows it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Origin {
    /// The interface.
    pub door: String,
    /// The machine's name there.
    pub id: String,
    pub owner: String,
    /// What was asked for, in that interface's own form.
    pub document: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpus {
    pub count: u32,
    /// At least `count`; more means that CPUs can be plugged in.
    pub max: u32,
    pub threads: u32,
    /// Per socket; `None` puts all into one.
    pub cores: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub size: Bytes,
    /// At least `size`; more means that memory can be plugged in.
    pub max: Bytes,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Boot {
    /// A kernel loaded by the hypervisor, no firmware.
    Kernel { kernel: PathBuf, initrd: Option<PathBuf>, cmdline: String },
    /// Firmware that finds something to boot on the machine's devices.
    Firmware { firmware: Firmware, order: Vec<BootDevice>, once: Option<BootDevice> },
    /// What the image's record says; `cmdline` is added to its own.
    Image { image: ImageName, cmdline: String },
    /// What the flist says, with it as the root; `cmdline` is added to its own.
    Flist { flist: Flist, cmdline: String },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    pub name: DeviceName,
    pub source: DiskSource,
    pub bus: DiskBus,
    pub media: Media,
    pub read_only: bool,
    pub serial: String,
    /// Firmware tries it before everything else.
    pub first: bool,
    pub limits: Option<DiskLimits>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskSource {
    /// A file or block device of the host, used in place.
    Path(PathBuf),
    /// A server's disk, used in place.
    Remote(Remote),
    /// A file in the machine's own folder, used in place; relative to that folder.
    Own(PathBuf),
    /// A layer of the machine's own above a file of the host, which is only read.
    Above(PathBuf),
    /// A layer of the machine's own above a stored image, at least as large as the image.
    Image { image: ImageName, size: Option<Bytes> },
    /// An empty disk kept with the machine.
    Blank { size: Bytes },
    /// Made of the machine's flist before the first start.
    Flist,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    pub name: DeviceName,
    pub network: NetName,
    /// Wired to a link of the host; it has no address of ours then.
    pub wire: Option<Wire>,
    pub model: NicModel,
    pub mac: Mac,
    /// What DHCP hands out; `None` takes the network's next free address.
    pub address: Option<Ipv4Addr>,
    /// Present where the address is not of the network's own plan.
    pub subnet: Option<Subnet>,
    pub segment: Option<Segment>,
    /// Bytes, where not 1500.
    pub mtu: Option<u16>,
    pub lease: Lease,
    pub guard: Option<Box<Guard>>,
    /// What the guest may receive.
    pub rx_limit: Option<RateLimit>,
    /// What the guest may send.
    pub tx_limit: Option<RateLimit>,
}

/// Where an address lies that is not of its network's plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    /// 8 to 32.
    pub prefix: u8,
    pub gateway: Option<Ipv4Addr>,
}

/// A bridge of its own inside a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Segment {
    pub number: u8,
    /// With the length of its prefix.
    pub gateway6: Option<(Ipv6Addr, u8)>,
}

/// A limit on bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// Bytes per second.
    pub bandwidth: u64,
    /// Milliseconds in which the allowance is filled up again.
    pub refill_ms: u64,
    /// Bytes beyond the limit, once.
    pub burst: u64,
}

/// A limit as hypervisors are told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Bucket {
    pub size: u64,
    pub refill_time: u64,
    pub one_time_burst: u64,
}

impl RateLimit {
    pub fn bucket(&self) -> Bucket {
        let Self { bandwidth, refill_ms, burst } = *self;
        let size = u128::from(bandwidth) * u128::from(refill_ms) / 1000;
        let size = u64::try_from(size).unwrap_or(u64::MAX);
        Bucket { size, refill_time: refill_ms, one_time_burst: burst }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    pub source: PathBuf,
    pub tag: DeviceName,
    pub read_only: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFile {
    /// Absolute, without `.` or `..` parts.
    pub path: String,
    pub content: FileContent,
    /// Permission bits, at most 0o7777.
    pub mode: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileContent {
    Text(String),
    /// Read from the host when the machine starts.
    Source(PathBuf),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restart {
    pub policy: RestartPolicy,
    /// Restarts in a row before giving up.
    pub max: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// A regular expression that a console line matches.
    Console(String),
    /// A TCP port of the guest's first interface that accepts a connection.
    Port(u16),
    /// A DHCP lease was taken.
    Dhcp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Percent of one CPU.
    pub cpu_percent: Option<u32>,
    /// 1 to 10000; 100 is what others have.
    pub cpu_weight: u32,
    pub memory: Option<Bytes>,
    pub threads: u32,
}

/// A closed set of words: the type, its spellings and its parser in one table.
#[macro_export]
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[derive(serde::Serialize, serde::Deserialize)]
        pub enum $name { $(#[serde(rename = $word)] $variant),+ }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                Self::ALL.iter().copied().find(|v| v.as_str() == text).ok_or_else(|| {
                    let known: Vec<_> = Self::ALL.iter().map(|v| v.as_str()).collect();
                    format!("{text:?} is not known here; known are {}", known.join(", "))
                })
            }
        }
    };
}

words!(Firmware { Bios = "bios", Uefi = "uefi" });
words!(
    /// A kind of device that firmware can boot from.
    BootDevice { Disk = "disk", Cdrom = "cdrom", Network = "network" }
);
words!(DiskBus { Virtio = "virtio", Scsi = "scsi", Ide = "ide" });
words!(Media { Disk = "disk", Cdrom = "cdrom" });
words!(NicModel { Virtio = "virtio", E1000 = "e1000", Rtl8139 = "rtl8139" });
pub use crate::ports::{Peers, Port};

words!(Protocol { Tcp = "tcp", Udp = "udp" });
words!(RestartPolicy { Never = "never", OnFailure = "on-failure", Always = "always" });
words!(
    /// A hypervisor that Lodge can drive.
    BackendKind {
        Qemu = "qemu",
        Firecracker = "firecracker",
        CloudHypervisor = "cloud-hypervisor",
    }
);
words!(
    /// How guest code is executed.
    Accel { Kvm = "kvm", Tcg = "tcg" }
);
words!(
    /// The virtual board.
    Board { Microvm = "microvm", Q35 = "q35", Pc = "pc" }
);

impl std::fmt::Display for Readiness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Readiness::Console(regex) => write!(f, "console:{regex}"),
            Readiness::Port(port) => write!(f, "port:{port}"),
            Readiness::Dhcp => f.write_str("dhcp"),
        }
    }
}

impl Machine {
    /// The document that resolves to this very machine; nothing in it is left to a default.
    pub fn to_draft(&self) -> Draft {
        let Machine {
            id,
            name,
            cpus: Cpus { count, max, threads, cores },
            memory: Memory { size: memory_size, max: memory_max },
            boot,
            disks,
            nics,
            ports,
            shares,
            files,
            ssh_keys,
            hostname,
            resolvers,
            metadata,
            tags,
            autostart,
            ephemeral,
            restart: Restart { policy, max: restart_max },
            ready,
            backend,
            accel,
            board,
            limits: Limits { cpu_percent, cpu_weight, memory: memory_limit, threads: max_threads },
            display,
            smbios,
            mdata,
            cidata,
            bootstrap,
            own_folder,
            origin,
        } = self;
        let flist = match boot {
            Boot::Flist { flist, .. } => Some(flist.to_draft()),
            Boot::Kernel { .. } | Boot::Firmware { .. } | Boot::Image { .. } => None,
        };
        let (image, boot) = boot_to_draft(boot);
        // The disk of an image or of an flist follows from those.
        let made = |disk: &Disk| disk.source == DiskSource::Flist;
        let own_disks = match image.is_some() || disks.first().is_some_and(made) {
            true => &disks[1..],
            false => &disks[..],
        };
        let image_size = match disks.first().filter(|_| image.is_some()).map(|d| &d.source) {
            Some(DiskSource::Image { size, .. }) => size.map(text_size),
            Some(
                DiskSource::Path(_)
                | DiskSource::Remote(_)
                | DiskSource::Own(_)
                | DiskSource::Above(_)
                | DiskSource::Blank { .. }
                | DiskSource::Flist,
            )
            | None => None,
        };
        let auto = |word: Option<&'static str>| Some(word.unwrap_or("auto").to_owned());
        Draft {
            name: Some(name.to_string()),
            uuid: Some(id.to_string()),
            cpus: Some(CpusDraft::Detailed(CpusFields {
                count: Some(*count),
                max: Some(*max),
                threads: Some(*threads),
                cores: *cores,
            })),
            memory: Some(MemoryDraft::Detailed(MemoryFields {
                size: Some(text_size(*memory_size)),
                max: Some(text_size(*memory_max)),
            })),
            image,
            image_size,
            flist,
            boot,
            disks: Some(own_disks.iter().map(disk_to_draft).collect()),
            nics: Some(nics.iter().map(nic_to_draft).collect()),
            ports: Some(ports.iter().map(Port::to_draft).collect()),
            shares: Some(shares.iter().map(share_to_draft).collect()),
            files: Some(files.iter().map(file_to_draft).collect()),
            ssh_keys: Some(ssh_keys.clone()),
            hostname: Some(hostname.clone()),
            resolvers: Some(resolvers.iter().map(Ipv4Addr::to_string).collect()),
            metadata: Some(metadata.clone()),
            tags: Some(tags.clone()),
            autostart: Some(*autostart),
            ephemeral: Some(*ephemeral),
            restart: Some(RestartDraft::Detailed(RestartFields {
                policy: Some(policy.to_string()),
                max: Some(*restart_max),
            })),
            ready: ready.as_ref().map(Readiness::to_string),
            backend: auto(backend.map(BackendKind::as_str)),
            accel: auto(accel.map(Accel::as_str)),
            board: auto(board.map(Board::as_str)),
            limits: Some(LimitsDraft {
                cpu_percent: *cpu_percent,
                cpu_weight: Some(*cpu_weight),
                memory: memory_limit.map(text_size),
                threads: Some(*max_threads),
            }),
            display: display.as_deref().map(Display::to_draft),
            smbios: smbios.as_deref().map(Smbios::to_draft),
            mdata: mdata.as_deref().map(Mdata::to_draft),
            cidata: Some(cidata.clone()).filter(|files| !files.is_empty()),
            bootstrap: bootstrap.as_deref().map(Bootstrap::to_draft),
            own_folder: Some(*own_folder),
            origin: origin.as_ref().map(|Origin { door, id, owner, document }| OriginDraft {
                door: Some(door.clone()),
                id: Some(id.clone()),
                owner: Some(owner.clone()),
                document: Some(document.clone()),
            }),
        }
    }
}

fn text_size(bytes: Bytes) -> Size {
    Size::Text(bytes.to_string())
}

fn path_text(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}

fn boot_to_draft(boot: &Boot) -> (Option<String>, Option<BootDraft>) {
    let empty = BootDraft::default();
    match boot {
        Boot::Kernel { kernel, initrd, cmdline } => (
            None,
            Some(BootDraft {
                kernel: Some(path_text(kernel)),
                initrd: initrd.as_deref().map(path_text),
                cmdline: Some(cmdline.clone()),
                ..empty
            }),
        ),
        Boot::Firmware { firmware, order, once } => (
            None,
            Some(BootDraft {
                firmware: Some(firmware.to_string()),
                order: Some(order.iter().map(BootDevice::to_string).collect()),
                once: once.map(|device| device.to_string()),
                ..empty
            }),
        ),
        Boot::Image { image, cmdline } => {
            (Some(image.to_string()), Some(BootDraft { cmdline: Some(cmdline.clone()), ..empty }))
        }
        Boot::Flist { cmdline, .. } => {
            (None, Some(BootDraft { cmdline: Some(cmdline.clone()), ..empty }))
        }
    }
}

fn disk_to_draft(disk: &Disk) -> DiskDraft {
    let Disk { name, source, bus, media, read_only, serial, first, limits } = disk;
    let (path, image, size) = match source {
        DiskSource::Own(path) => (Some(extras::own_text(path)), None, None),
        DiskSource::Remote(remote) => (Some(remote.to_string()), None, None),
        DiskSource::Path(path) | DiskSource::Above(path) => (Some(path_text(path)), None, None),
        DiskSource::Image { image, size } => (None, Some(image.to_string()), *size),
        DiskSource::Blank { size } => (None, None, Some(*size)),
        DiskSource::Flist => (None, None, None),
    };
    DiskDraft {
        name: Some(name.to_string()),
        source: path,
        layered: matches!(source, DiskSource::Above(_)).then_some(true),
        image,
        size: size.map(text_size),
        bus: Some(bus.to_string()),
        media: Some(media.to_string()),
        read_only: Some(*read_only),
        serial: Some(serial.clone()),
        first: first.then_some(true),
        limits: limits.clone(),
    }
}

fn nic_to_draft(nic: &Nic) -> NicDraft {
    let Nic {
        name,
        network,
        wire,
        model,
        mac,
        address,
        subnet,
        segment,
        mtu,
        lease,
        guard,
        rx_limit,
        tx_limit,
    } = nic;
    let limit = |limit: &Option<RateLimit>| {
        limit.map(|RateLimit { bandwidth, refill_ms, burst }| RateLimitDraft {
            bandwidth: Some(Size::Bytes(bandwidth)),
            refill_ms: Some(refill_ms),
            burst: Some(Size::Bytes(burst)),
        })
    };
    NicDraft {
        name: Some(name.to_string()),
        network: Some(network.to_string()),
        wire: wire.as_ref().map(Wire::to_string),
        model: Some(model.to_string()),
        mac: Some(mac.to_string()),
        address: address.map(|a| a.to_string()),
        prefix: subnet.map(|s| u32::from(s.prefix)),
        gateway: subnet.and_then(|s| s.gateway).map(|g| g.to_string()),
        segment: segment.map(|s| u32::from(s.number)),
        gateway6: segment.and_then(|s| s.gateway6).map(|(ip, prefix)| format!("{ip}/{prefix}")),
        mtu: mtu.map(u32::from),
        lease: Some(lease.to_string()),
        guard: guard.as_deref().map(Guard::to_draft),
        rx_limit: limit(rx_limit),
        tx_limit: limit(tx_limit),
    }
}

fn share_to_draft(share: &Share) -> ShareDraft {
    let Share { source, tag, read_only } = share;
    ShareDraft {
        source: Some(path_text(source)),
        tag: Some(tag.to_string()),
        read_only: Some(*read_only),
    }
}

fn file_to_draft(file: &GuestFile) -> FileDraft {
    let GuestFile { path, content, mode } = file;
    let (source, content) = content.to_draft();
    FileDraft { path: Some(path.clone()), source, content, mode: Some(format!("{mode:04o}")) }
}

impl FileContent {
    /// Either of `source` and `content`.
    pub(crate) fn to_draft(&self) -> (Option<String>, Option<String>) {
        match self {
            FileContent::Text(text) => (None, Some(text.clone())),
            FileContent::Source(source) => (Some(path_text(source)), None),
        }
    }
}
