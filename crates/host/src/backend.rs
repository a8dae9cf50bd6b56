//! What the hypervisors have in common: a pure plan in, a list of steps and one process out.
//! Nothing happens at a start that its `Launch` does not list.

pub mod api;
pub mod choose;
pub mod cloud_hypervisor;
pub mod firecracker;
pub mod qemu;
pub mod vmm;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use lodge_jail::JailPlan;
use lodge_jail::cgroup::Limits;
use lodge_spec::capability::Need;
use lodge_spec::draft::GuardDraft;
use lodge_spec::extras::{Guard, Lease};
use lodge_spec::machine::{Accel, BackendKind, Board, Machine, Peers, Port, Protocol, Segment};
use lodge_spec::names::Mac;
use lodge_spec::remote::Remote;
use lodge_spec::wire::Wire;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::facts::Facts;
use crate::flist::root::Root;
use crate::flist::server;

/// Descriptors that the plan names start here; everything below belongs to the warden.
pub const FIRST_FD: i32 = 100;

/// How a machine is started. `lodge plan` prints it, `lodge start` carries it out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    pub backend: BackendKind,
    pub accel: Accel,
    /// `None`: the hypervisor has only one.
    pub board: Option<Board>,
    /// Why these.
    pub notes: Vec<String>,
    /// Files to make, in order.
    pub steps: Vec<Step>,
    pub warden: WardenPlan,
    /// Control calls once the hypervisor answers.
    pub calls: Vec<Value>,
    /// What makes it this machine and no other: memory that was saved fits launches of the same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shape: Vec<String>,
    /// The folder of the saved memory from which it goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<PathBuf>,
}

/// Where a machine's memory is saved. A hypervisor that writes it itself finds it as `MEMORY`.
pub fn memory_folder(home: &std::path::Path) -> PathBuf {
    home.join("memory")
}

pub(crate) const MEMORY: &str = "/memory";
/// The file in that folder that QEMU is handed.
pub(crate) const QEMU_MEMORY: &str = "qemu";

impl Launch {
    /// Notes down its shape.
    pub(crate) fn sealed(mut self) -> Self {
        let argv = self.warden.jail.argv.iter().skip(1);
        // A kernel that has been started does not look at its command line again.
        let mut last = "";
        let told = argv.filter(|part| std::mem::replace(&mut last, part.as_str()) != "-append");
        let calls = self.calls.iter().map(Value::to_string);
        self.shape = std::iter::once(format!("{} {:?}", self.backend, self.accel))
            .chain(told.cloned())
            .chain(calls)
            .collect();
        self
    }

    /// Goes on from saved memory, in place of starting the guest anew.
    pub fn go_on(&mut self, home: &std::path::Path) {
        self.memory = Some(memory_folder(home));
        match self.backend {
            BackendKind::Qemu => qemu::plan::go_on(self),
            BackendKind::Firecracker => firecracker::plan::go_on(self),
            BackendKind::CloudHypervisor => cloud_hypervisor::plan::go_on(self),
        }
    }

    /// For those who only look at it.
    pub fn hide_secrets(&mut self) {
        if let Some(root) = &mut self.warden.root
            && let Some(store) = &mut root.config.store
        {
            *store = crate::flist::store::without_secret(store);
        }
        for file in &mut self.warden.files {
            if let Some(Remote::Zdb(zdb)) = &mut file.server {
                zdb.url = zdb.shown();
            }
        }
    }
}

/// A host object to make before the start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "make", rename_all = "snake_case")]
pub enum Step {
    Folder {
        path: PathBuf,
    },
    /// A folder in which the hypervisor itself makes files, which are nobody else's to see.
    OwnFolder {
        path: PathBuf,
        owner: u32,
    },
    /// A named pipe into which the hypervisor writes.
    Pipe {
        path: PathBuf,
        owner: u32,
    },
    /// A raw disk, empty or with the bytes of another; kept if it is there.
    Raw {
        path: PathBuf,
        bytes: u64,
        from: Option<PathBuf>,
        owner: u32,
    },
    /// A qcow2 layer; kept if it is there.
    Layer {
        path: PathBuf,
        bytes: u64,
        /// What lies below, and as what it is read.
        above: Option<(PathBuf, DiskFormat)>,
        owner: u32,
    },
    /// A copy; kept if it is there.
    Copy {
        from: PathBuf,
        path: PathBuf,
        owner: u32,
    },
    /// The ELF file out of a bzImage, in the cache.
    UnpackedKernel {
        from: PathBuf,
        path: PathBuf,
    },
    /// An initial RAM disk with files for the guest behind it.
    Initrd {
        from: PathBuf,
        path: PathBuf,
        files: usize,
    },
    /// A disk that is an archive of files for the guest.
    FilesDisk {
        path: PathBuf,
        files: usize,
    },
    /// What the guest may read over its second serial port, for the warden.
    /// The script that the guest is served.
    Bootstrap {
        path: PathBuf,
    },
    Mdata {
        path: PathBuf,
    },
    /// A disk with files for cloud-init.
    Cidata {
        path: PathBuf,
    },
    /// The password of the screen, for the hypervisor alone.
    VncPassword {
        path: PathBuf,
        owner: u32,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Folder { path } | Step::OwnFolder { path, .. } => {
                write!(f, "folder {}", path.display())
            }
            Step::Pipe { path, .. } => write!(f, "pipe {}", path.display()),
            Step::Raw { path, bytes, from: Some(from), .. } => {
                write!(f, "raw disk {} of {bytes} bytes from {}", path.display(), from.display())
            }
            Step::Raw { path, bytes, from: None, .. } => {
                write!(f, "raw disk {} of {bytes} bytes", path.display())
            }
            Step::Layer { path, bytes, above: Some((above, _)), .. } => {
                write!(f, "layer {} of {bytes} bytes above {}", path.display(), above.display())
            }
            Step::Layer { path, bytes, above: None, .. } => {
                write!(f, "disk {} of {bytes} bytes", path.display())
            }
            Step::Copy { from, path, .. } => {
                write!(f, "copy {} of {}", path.display(), from.display())
            }
            Step::UnpackedKernel { from, path } => {
                write!(f, "unpacked kernel {} from {}", path.display(), from.display())
            }
            Step::Initrd { from, path, files } => {
                write!(f, "initrd {} from {} with {files} files", path.display(), from.display())
            }
            Step::FilesDisk { path, files } => {
                write!(f, "disk {} with {files} files", path.display())
            }
            Step::Mdata { path } => write!(f, "metadata {}", path.display()),
            Step::Bootstrap { path } => write!(f, "first-boot script {}", path.display()),
            Step::Cidata { path } => write!(f, "disk {} for cloud-init", path.display()),
            Step::VncPassword { path, .. } => write!(f, "screen password {}", path.display()),
        }
    }
}

/// What the warden opens, binds and starts. Given to it as JSON on its standard input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WardenPlan {
    pub id: String,
    pub name: String,
    pub run: PathBuf,
    pub console_log: PathBuf,
    pub console: ConsoleEnd,
    pub files: Vec<OpenFile>,
    pub sockets: Vec<Listen>,
    pub taps: Vec<Tap>,
    pub ports: Vec<Forward>,
    pub screen: Option<Screen>,
    pub mdata: Option<MdataEnd>,
    /// What the guest is served for its first boot.
    #[serde(default)]
    pub bootstrap: BootstrapEnd,
    /// A root that a process serves.
    #[serde(default)]
    pub root: Option<RootServer>,
    /// `console:REGEX`, `port:N` or `dhcp`.
    pub ready: Option<String>,
    pub cgroup: Cgroup,
    pub jail: JailPlan,
}

/// A screen that the hypervisor shows to whoever is handed to it over its second monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Screen {
    pub monitor: PathBuf,
    /// Nobody is let in where it is absent.
    pub at: Option<ScreenPort>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScreenPort {
    pub address: IpAddr,
    pub port: u16,
    /// The port is only where to begin looking for a free one.
    pub or_next: bool,
}

impl Screen {
    /// Where VNC ports of machines that name none begin, and how many there are.
    const PORTS: (u16, u16) = (20_000, 20_000);

    pub fn of(machine: &Machine, run: &std::path::Path) -> Option<Self> {
        let display = machine.display.as_ref()?;
        let at = display.vnc.as_ref().map(|vnc| {
            let (first, count) = Self::PORTS;
            let [a, b, ..] = *machine.id.0.as_bytes();
            let own = first + u16::from_be_bytes([a, b]) % count;
            let (port, or_next) = if vnc.port == 0 { (own, true) } else { (vnc.port, false) };
            ScreenPort { address: vnc.address, port, or_next }
        });
        Some(Self { monitor: run.join("screen.sock"), at })
    }
}

/// The second serial port: the hypervisor's end, and what is told over it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MdataEnd {
    pub fd: i32,
    pub file: PathBuf,
}

impl MdataEnd {
    pub fn file(run: &std::path::Path) -> PathBuf {
        run.join("mdata.json")
    }
}

/// What a guest finds where scripts for the first boot are looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootstrapEnd {
    /// There may be no such file.
    pub script: PathBuf,
    /// A run without a script counts.
    pub require: bool,
    /// Folder of what the guest sends.
    pub uploads: PathBuf,
}

impl BootstrapEnd {
    pub fn file(run: &std::path::Path) -> PathBuf {
        run.join("vm-bootstrap")
    }

    pub fn of(machine: &Machine, run: &std::path::Path, state: &std::path::Path) -> Self {
        let require = machine.bootstrap.as_ref().is_some_and(|bootstrap| bootstrap.require);
        Self { script: Self::file(run), require, uploads: state.join("uploads") }
    }
}

/// The process behind a root that is an flist.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootServer {
    pub config: server::Config,
    /// Under this number the jail, or the hypervisor in it, finds its end of the socket. Absent:
    /// the hypervisor connects to the socket itself, by its path.
    pub jail: Option<i32>,
    /// Under this one the process does.
    pub own: i32,
    /// What it says on its standard error.
    pub log: PathBuf,
}

impl RootServer {
    /// Where the process listens for the hypervisor.
    pub fn socket(run: &std::path::Path) -> PathBuf {
        run.join("root.sock")
    }
}

/// What the hypervisor sees of its serial console, and under which number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConsoleEnd {
    Socket(i32),
    /// A terminal, which becomes its standard input and output.
    Terminal(i32),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFile {
    pub fd: i32,
    pub path: PathBuf,
    pub writable: bool,
    /// A connection to this instead.
    #[serde(default)]
    pub server: Option<Remote>,
}

/// A Unix socket to listen on; the hypervisor accepts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listen {
    pub fd: i32,
    pub path: PathBuf,
}

/// A tap interface in a network's namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tap {
    pub fd: i32,
    pub interface: String,
    /// The network's folder, with the socket of its keeper.
    pub network: PathBuf,
    pub mac: Mac,
    /// Of no meaning where it is wired to a link of the host.
    pub address: Ipv4Addr,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wire: Option<Wire>,
    /// Prefix and router, where the address is not of the network's own plan.
    pub subnet: Option<(u8, Option<Ipv4Addr>)>,
    /// The bridge that it is on, where that is not the network's common one.
    #[serde(default)]
    pub segment: Option<Segment>,
    /// Bytes, where not 1500.
    #[serde(default)]
    pub mtu: Option<u16>,
    pub lease: Lease,
    pub guard: Option<GuardDraft>,
    /// The name under which neighbours find the machine.
    pub hostname: String,
    /// Name servers to tell the guest in place of the network's own.
    pub resolvers: Vec<Ipv4Addr>,
    /// The user whose hypervisor opens the interface by its name. Then `fd` is the network's
    /// namespace, which it lives in, and not the interface.
    pub opened_by: Option<u32>,
}

impl Tap {
    /// The one by which a machine is reached.
    pub fn reached(taps: &[Self]) -> Option<&Self> {
        taps.iter().find(|tap| tap.wire.is_none())
    }

    /// The interface of a machine's `index`th nic.
    pub fn of(machine: &Machine, survey: &Survey, fd: i32, index: usize) -> Self {
        let (nic, place) = (&machine.nics[index], &survey.nics[index]);
        Self {
            fd,
            interface: place.interface.clone(),
            network: place.network.clone(),
            mac: nic.mac,
            address: place.address,
            wire: nic.wire.clone(),
            subnet: nic.subnet.map(|s| (s.prefix, s.gateway)),
            segment: nic.segment,
            mtu: nic.mtu,
            lease: nic.lease,
            guard: nic.guard.as_deref().map(Guard::to_draft),
            hostname: machine.hostname.clone(),
            resolvers: machine.resolvers.clone(),
            opened_by: None,
        }
    }
}

/// A host port that leads to a guest's port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    pub ip: IpAddr,
    pub host: u16,
    pub guest: u16,
    pub protocol: Protocol,
    /// Who may use it, as `Peers` is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    pub name: String,
    pub hierarchy: lodge_jail::cgroup::Hierarchy,
    pub limits: Limits,
}

impl Cgroup {
    /// The group of a machine's hypervisor, with the machine's limits.
    pub fn of(machine: &Machine, facts: &Facts) -> Self {
        Self {
            name: machine.id.to_string(),
            hierarchy: facts.cgroups.clone(),
            limits: Limits {
                cpu_percent: machine.limits.cpu_percent,
                cpu_weight: machine.limits.cpu_weight,
                memory_bytes: machine.limits.memory.map(|b| b.0),
                threads: machine.limits.threads,
            },
        }
    }
}

impl Forward {
    pub fn all(machine: &Machine) -> Vec<Self> {
        let forward = |p: &Port| Self {
            ip: p.ip,
            host: p.host,
            guest: p.guest,
            protocol: p.protocol,
            from: p.from.as_ref().map(Peers::to_string),
        };
        machine.ports.iter().map(forward).collect()
    }
}

/// Something asked for that a backend cannot do here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unsupported {
    /// The field, empty for the backend as a whole.
    pub path: String,
    pub backend: BackendKind,
    pub why: String,
}

impl Unsupported {
    pub fn new(path: &str, backend: BackendKind, why: impl Into<String>) -> Self {
        Self { path: path.into(), backend, why: why.into() }
    }

    /// Something that the machine asks for, rather than something that the host lacks.
    pub fn is_about_field(&self) -> bool {
        !matches!(self.path.as_str(), "" | "accel" | "nics" | "board")
    }

    pub fn need(need: &Need, backend: BackendKind, board: Option<Board>) -> Self {
        let why = match board {
            Some(board) => format!("the {board} board lacks {}", need.feature.describe()),
            None => format!("{backend} lacks {}", need.feature.describe()),
        };
        Self::new(&need.path, backend, why)
    }
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Unsupported { path, backend, why } = self;
        match path.as_str() {
            "" => write!(f, "{backend}: {why}"),
            path => write!(f, "{path}: {backend}: {why}"),
        }
    }
}

/// What was found on the host for a machine: real paths in place of names. Made by `survey`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    pub boot: BootFiles,
    /// The guest's root, where that is an flist.
    pub root: Option<Root>,
    /// One for each of the machine's disks, in order.
    pub disks: Vec<DiskFiles>,
    /// One for each of the machine's interfaces, in order.
    pub nics: Vec<NicPlace>,
    /// The disk that carries files into the guest.
    pub files_disk: Option<PathBuf>,
    pub steps: Vec<Step>,
    pub run: PathBuf,
    pub state: PathBuf,
    pub uid: u32,
    /// When the guest is ready: what the machine says, else what its image says.
    pub ready: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BootFiles {
    Kernel {
        kernel: PathBuf,
        initrd: Option<PathBuf>,
        cmdline: String,
        /// The kernel is an ELF file.
        elf: bool,
        /// The kernel has a PVH entry, so a board without firmware can start it.
        pvh: bool,
        /// The guest is known to find virtio devices without PCI.
        virtio_mmio: bool,
        /// The guest looks for PCI devices, unless its command line forbids it.
        pci: bool,
    },
    Firmware,
}

/// The layers of a disk, the uppermost first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskFiles {
    pub layers: Vec<Layer>,
    /// The guest's view, in bytes; 0 where it was not looked at.
    pub bytes: u64,
    /// The uppermost layer is the machine's own and was written by an earlier start.
    pub kept: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// A server's address, where it is a server's.
    pub path: PathBuf,
    pub format: DiskFormat,
    pub block_device: bool,
    pub remote: Option<Remote>,
}

impl Layer {
    pub fn file(path: PathBuf, format: DiskFormat) -> Self {
        Self { path, format, block_device: false, remote: None }
    }

    /// What a server's disk holds is taken as it is.
    pub fn remote(remote: &Remote) -> Self {
        let path = remote.shown().into();
        Self { remote: Some(remote.clone()), ..Self::file(path, DiskFormat::Raw) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    Raw,
    Qcow2,
}

impl DiskFormat {
    pub const fn as_str(self) -> &'static str {
        match self {
            DiskFormat::Raw => "raw",
            DiskFormat::Qcow2 => "qcow2",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicPlace {
    pub network: PathBuf,
    pub interface: String,
    pub address: Ipv4Addr,
}
