//! The command line's grammar. Help, completions and man pages come from these definitions; what
//! a command does is elsewhere.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use lodge_spec::draft::{
    BootDraft, BootstrapDraft, DiskDraft, Draft, FileDraft, MemoryDraft, NicDraft, PortDraft, Size,
};
use lodge_spec::remote::Remote;

/// Describe, build, boot, confine and look after virtual machines.
#[derive(Debug, Parser)]
#[command(name = "lodge", version, propagate_version = true, disable_help_subcommand = true)]
#[command(
    after_help = "Example:\n  lodge image build debian-12\n  lodge run debian-12 --name web \
                        --ssh-key ~/.ssh/id_ed25519.pub --port 2222:22"
)]
pub struct Cli {
    /// How to print: for people, or as JSON.
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Text)]
    pub output: Output,
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Create a machine and start it.
    #[command(
        after_help = "Example:\n  lodge run debian-12 --name web --ssh-key ~/.ssh/id_ed25519.pub --port 2222:22\n  lodge run --kernel vmlinuz --initrd initrd --append console=ttyS0 --ready 'console:login:' --wait ready"
    )]
    Run(Box<Run>),
    /// Create a machine from a document (YAML, JSON or TOML; - is standard input).
    #[command(after_help = "Example:\n  lodge create web.yaml")]
    Create {
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
    /// Start a machine.
    #[command(after_help = "Example:\n  lodge start web --wait ready --timeout 60")]
    Start {
        name: String,
        #[arg(long, value_enum, default_value_t = Until::Running)]
        wait: Until,
        /// Seconds to wait at most.
        #[arg(long)]
        timeout: Option<u64>,
    },
    /// Ask a guest to end, and end it when it does not.
    #[command(after_help = "Example:\n  lodge stop web --timeout 10")]
    Stop {
        name: String,
        /// End it at once, as pulling the plug would.
        #[arg(long, short)]
        force: bool,
        /// Seconds that the guest has.
        #[arg(long, default_value_t = 30)]
        timeout: u64,
    },
    /// Stop a machine and start it again.
    #[command(after_help = "Example:\n  lodge restart web")]
    Restart {
        name: String,
        #[arg(long, default_value_t = 30)]
        timeout: u64,
    },
    /// Press the reset button.
    #[command(after_help = "Example:\n  lodge reset web")]
    Reset { name: String },
    /// Let a machine stand still.
    #[command(after_help = "Example:\n  lodge pause web")]
    Pause { name: String },
    /// Let a paused machine go on.
    #[command(after_help = "Example:\n  lodge resume web")]
    Resume { name: String },
    /// Save a machine's memory to the disk and end it; its next start goes on there.
    #[command(after_help = "Example:\n  lodge suspend web\n  lodge start web")]
    Suspend { name: String },
    /// Move a running machine to another host, over SSH; its guest runs on.
    ///
    /// Lodge runs there, and both hosts see its disks: files in a shared folder, or a server's.
    #[command(after_help = "Example:\n  lodge migrate web ssh://root@10.0.0.2\n  \
        lodge migrate web 'qemu+ssh://root@10.0.0.2/system?keyfile=/root/.ssh/move'")]
    Migrate {
        name: String,
        /// ssh://[USER@]HOST[:PORT][?keyfile=PATH&known_hosts=PATH]
        to: String,
    },
    /// What another host's `migrate` runs here, over SSH.
    #[command(hide = true)]
    Receive,
    /// Remove machines and their disks.
    #[command(after_help = "Example:\n  lodge rm web --force")]
    Rm {
        #[arg(required = true)]
        names: Vec<String>,
        /// Also while they run.
        #[arg(long, short)]
        force: bool,
    },
    /// Change a machine: CPUs, memory, disks, interfaces. Live where it runs and its board can.
    #[command(after_help = "Example:\n  lodge set web --cpus 2\n  lodge set web --add-disk 10GB")]
    Set(Set),
    /// List machines: those that live, or all.
    #[command(
        after_help = "Example:\n  lodge ls -a\n  lodge ls -o json\n\nJSON: an array of objects with id, name, state, reason, backend, accel, cpus, memory_bytes, ready, address, created_at."
    )]
    Ls {
        #[arg(long, short)]
        all: bool,
    },
    /// Everything about a machine, as JSON: its document, its state, how it runs, what confines it.
    #[command(after_help = "Example:\n  lodge inspect web")]
    Inspect { name: String },
    /// What the guest printed on its console.
    #[command(after_help = "Example:\n  lodge logs web -f --tail 50")]
    Logs {
        name: String,
        #[arg(long, short)]
        follow: bool,
        /// Lines from the end.
        #[arg(long, default_value_t = 200)]
        tail: usize,
    },
    /// A terminal on the guest's console; `~.` at the start of a line leaves.
    #[command(after_help = "Example:\n  lodge console web")]
    Console { name: String },
    /// Wait until a machine is running, ready or stopped.
    #[command(after_help = "Example:\n  lodge wait web --for ready --timeout 60")]
    Wait {
        name: String,
        #[arg(long = "for", value_enum, default_value_t = Until::Ready)]
        until: Until,
        /// Seconds to wait at most.
        #[arg(long)]
        timeout: Option<u64>,
    },
    /// What happened, of one machine or of all.
    #[command(after_help = "Example:\n  lodge events -f")]
    Events {
        name: Option<String>,
        #[arg(long, short)]
        follow: bool,
    },
    /// The last start, moment by moment.
    #[command(after_help = "Example:\n  lodge timeline web")]
    Timeline { name: String },
    /// How a machine would be started, and what each backend lacks. Changes nothing.
    #[command(
        after_help = "Example:\n  lodge plan web.yaml\n  lodge plan --kernel vmlinuz --initrd initrd"
    )]
    Plan(Box<Plan>),
    /// Why a machine failed: its events, the hypervisor's and the guest's last words.
    #[command(after_help = "Example:\n  lodge why web")]
    Why { name: String },
    /// What this host can do, and how to add what is missing.
    #[command(after_help = "Example:\n  lodge doctor\n  lodge doctor --escape")]
    Doctor {
        /// Put a program into the jail in a hypervisor's place and let it try to get out.
        #[arg(long)]
        escape: bool,
    },
    /// Remove what belongs to no machine.
    #[command(after_help = "Example:\n  lodge gc --dry-run")]
    Gc {
        /// Only say what would be removed, and why.
        #[arg(long)]
        dry_run: bool,
    },
    /// Images: build, add, list, inspect, remove, verify.
    #[command(subcommand)]
    Image(super::image::Image),
    /// Plain files for machines that name their kernel and disk by host path.
    #[command(subcommand)]
    Assets(Assets),
    /// The daemon, with its doors open to other programs. Commands start one without doors
    /// themselves when none runs; this one takes its place.
    #[command(after_help = "Example:\n  lodge serve\n  lodge serve --metald 127.0.0.1:9000")]
    Serve(Serve),
    /// Speak SmartOS's vmadm; the same as calling this program by that name.
    #[command(disable_help_flag = true)]
    Vmadm {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "WORD")]
        words: Vec<String>,
    },
    /// Clusters of machines from one image.
    #[command(subcommand)]
    Cluster(ClusterVerb),
    /// Flists: file trees whose contents are fetched as they are read.
    #[command(subcommand)]
    Flist(super::flist::FlistVerb),
    /// Kernels for machines.
    #[command(subcommand)]
    Kernel(KernelVerb),
    /// Speak xcluster's xc; the same as calling this program by that name.
    #[command(disable_help_flag = true)]
    Xc {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "WORD")]
        words: Vec<String>,
    },
    /// Speak xcluster's xcadmin; the same as calling this program by that name.
    #[command(disable_help_flag = true)]
    Xcadmin {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "WORD")]
        words: Vec<String>,
    },
    /// Completions for a shell.
    #[command(after_help = "Example:\n  lodge completions bash > /etc/bash_completion.d/lodge")]
    Completions { shell: String },
    /// Write man pages into a folder.
    #[command(after_help = "Example:\n  lodge man /usr/local/share/man/man1")]
    Man {
        #[arg(value_hint = ValueHint::DirPath)]
        folder: PathBuf,
    },
    /// Print the JSON Schema of the machine document.
    #[command(after_help = "Example:\n  lodge schema > machine.schema.json")]
    Schema,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Until {
    Running,
    Ready,
    Stopped,
    /// The script of `--bootstrap` has succeeded.
    Bootstrap,
    None,
}

#[derive(Debug, Subcommand)]
pub enum ClusterVerb {
    /// Start the cluster that a file describes, anew where it runs; ends when all answer.
    #[command(after_help = "Example:\n  lodge cluster start lab.yaml")]
    Start {
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
    /// Stop a cluster; its machines go with their disks.
    #[command(after_help = "Example:\n  lodge cluster stop lab")]
    Stop { name: String },
    /// Which machines of a cluster run.
    #[command(after_help = "Example:\n  lodge cluster status lab")]
    Status { name: String },
}

#[derive(Debug, Subcommand)]
pub enum KernelVerb {
    /// Build a small kernel for machines, or one of a configuration of your own. The same is built
    /// once.
    #[command(after_help = "Example:\n  lodge kernel build --for firecracker --to vmlinux")]
    Build {
        /// Of which source: an archive's name without its ending, from $ARCHIVE, else from Debian's
        /// packages.
        #[arg(long, default_value = "linux-6.1")]
        source: String,
        /// A kernel configuration.
        #[arg(long, value_hint = ValueHint::FilePath)]
        config: Option<PathBuf>,
        /// In the form that this hypervisor takes.
        #[arg(long = "for", value_enum, default_value = "qemu")]
        target: Target,
        /// Where to put it; `bzImage` or `vmlinux` when absent.
        #[arg(long, value_hint = ValueHint::FilePath)]
        to: Option<PathBuf>,
        /// Forget what was compiled.
        #[arg(long)]
        clean: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Target {
    Qemu,
    Firecracker,
    CloudHypervisor,
}

/// A machine in flags.
#[derive(Debug, Default, Args)]
pub struct MachineFlags {
    /// Name of the machine.
    #[arg(long)]
    pub name: Option<String>,
    /// Number of CPUs.
    #[arg(long)]
    pub cpus: Option<u32>,
    /// Memory, as in 512MiB.
    #[arg(long)]
    pub memory: Option<String>,
    /// Boot this kernel (bzImage or ELF).
    #[arg(long, value_hint = ValueHint::FilePath)]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for the kernel.
    #[arg(long, value_hint = ValueHint::FilePath)]
    pub initrd: Option<PathBuf>,
    /// Kernel command line; with an image, added to the image's own.
    #[arg(long, value_name = "CMDLINE")]
    pub append: Option<String>,
    /// Attach a disk: raw or qcow2, or a server's (nbd://HOST[:PORT]/NAME,
    /// zdb://HOST[:PORT]?size=SIZE).
    #[arg(long, value_name = "PATH[:ro]")]
    pub disk: Vec<String>,
    /// Attach a CD-ROM.
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub cdrom: Vec<PathBuf>,
    /// Lead a host port into the guest.
    #[arg(long, value_name = "[IP:]HOST:GUEST[/udp]")]
    pub port: Vec<String>,
    /// Put an interface on a network, or wire it to a link of the host (bridge:NAME,
    /// vlan:ID@INTERFACE, vxlan:ID@INTERFACE, macvlan:INTERFACE, passthrough:INTERFACE); `none` for
    /// no interface.
    #[arg(long, value_name = "NAME|LINK|none")]
    pub net: Vec<String>,
    /// The hypervisor.
    #[arg(long, value_name = "auto|qemu|firecracker|cloud-hypervisor")]
    pub backend: Option<String>,
    /// How guest code runs.
    #[arg(long, value_name = "auto|kvm|tcg")]
    pub accel: Option<String>,
    /// Put a host file into the guest.
    #[arg(long, value_name = "GUESTPATH=HOSTFILE")]
    pub file: Vec<String>,
    /// Let the owner of this public key in as root.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub ssh_key: Vec<PathBuf>,
    /// Ask this store for the contents of an flist before those that it names.
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
    /// Serve this script to the guest, at http://10.0.2.100/vm-bootstrap: images that set
    /// themselves up fetch it and run it.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub bootstrap: Option<PathBuf>,
    /// Let the guest fail where there is no script, instead of waiting for one.
    #[arg(long)]
    pub require_script: bool,
    /// When the guest is ready.
    #[arg(long, value_name = "console:REGEX|port:N|dhcp")]
    pub ready: Option<String>,
    /// Remove the machine once it has stopped.
    #[arg(long)]
    pub rm: bool,
}

#[derive(Debug, Args)]
pub struct Run {
    /// Name of a stored image, or path or URL of an flist.
    pub image: Option<String>,
    #[command(flatten)]
    pub machine: MachineFlags,
    /// What to wait for.
    #[arg(long, value_enum, default_value_t = Until::Running)]
    pub wait: Until,
    /// Seconds to wait at most.
    #[arg(long)]
    pub timeout: Option<u64>,
}

#[derive(Debug, Args)]
pub struct Plan {
    /// A document, the name of a stored image, or path or URL of an flist.
    pub source: Option<String>,
    #[command(flatten)]
    pub machine: MachineFlags,
}

#[derive(Debug, Args)]
pub struct Set {
    pub name: String,
    /// Number of CPUs, up to `cpus.max`.
    #[arg(long)]
    pub cpus: Option<u32>,
    /// Memory, up to `memory.max`.
    #[arg(long)]
    pub memory: Option<String>,
    /// Add a disk: a host path, or a size for an empty one.
    #[arg(long, value_name = "PATH[:ro]|SIZE")]
    pub add_disk: Vec<String>,
    /// Remove a disk.
    #[arg(long, value_name = "DISK")]
    pub remove_disk: Vec<String>,
    /// Add an interface on a network, or wired to a link of the host.
    #[arg(long, value_name = "NETWORK|LINK")]
    pub add_nic: Vec<String>,
    /// Remove an interface.
    #[arg(long, value_name = "NIC")]
    pub remove_nic: Vec<String>,
}

pub(super) fn absolute(path: &std::path::Path) -> String {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    path.to_string_lossy().into_owned()
}

/// `PATH[:ro]`, or a server's disk by its address.
pub fn disk_of(text: &str) -> DiskDraft {
    let (path, read_only) = match text.strip_suffix(":ro") {
        Some(path) => (path, Some(true)),
        None => (text, None),
    };
    let source = match Remote::is_meant(path) {
        true => path.to_owned(),
        false => absolute(path.as_ref()),
    };
    DiskDraft { source: Some(source), read_only, ..DiskDraft::default() }
}

impl MachineFlags {
    /// The draft that the flags describe. Reads the key files; errors name the flag.
    pub fn draft(self, image: Option<String>) -> Result<Draft, String> {
        let Self {
            name,
            cpus,
            memory,
            kernel,
            initrd,
            append,
            disk,
            cdrom,
            port,
            net,
            backend,
            accel,
            file,
            ssh_key,
            store,
            bootstrap,
            require_script,
            ready,
            rm,
        } = self;
        let (image, flist) = super::flist::root(image, store)?;
        let boots = kernel.is_some() || initrd.is_some() || append.is_some();
        let boot = boots.then(|| BootDraft {
            kernel: kernel.as_deref().map(absolute),
            initrd: initrd.as_deref().map(absolute),
            cmdline: append,
            ..BootDraft::default()
        });
        let mut disks: Vec<DiskDraft> = disk.iter().map(|d| disk_of(d)).collect();
        disks.extend(cdrom.iter().map(|path| DiskDraft {
            source: Some(absolute(path)),
            media: Some("cdrom".into()),
            ..DiskDraft::default()
        }));
        let mut files = Vec::new();
        for text in &file {
            let (path, source) = text
                .split_once('=')
                .ok_or_else(|| format!("--file {text:?} is not GUESTPATH=HOSTFILE"))?;
            files.push(FileDraft {
                path: Some(path.to_owned()),
                source: Some(absolute(source.as_ref())),
                ..FileDraft::default()
            });
        }
        let keys = read_keys(&ssh_key)?;
        let nics = match net.iter().any(|n| n == "none") {
            true if net.len() > 1 => return Err("--net none excludes other networks".into()),
            true => Some(Vec::new()),
            false if net.is_empty() => None,
            false => Some(net.into_iter().map(nic_on).collect()),
        };
        Ok(Draft {
            name,
            cpus: cpus.map(lodge_spec::draft::CpusDraft::Count),
            memory: memory.map(MemoryDraft::Text),
            image,
            flist,
            boot,
            disks: (!disks.is_empty()).then_some(disks),
            nics,
            ports: (!port.is_empty()).then(|| port.into_iter().map(PortDraft::Text).collect()),
            files: (!files.is_empty()).then_some(files),
            ssh_keys: (!keys.is_empty()).then_some(keys),
            bootstrap: (bootstrap.is_some() || require_script).then(|| BootstrapDraft {
                source: bootstrap.as_deref().map(absolute),
                require: Some(require_script),
                ..BootstrapDraft::default()
            }),
            ephemeral: rm.then_some(true),
            ready,
            backend,
            accel,
            ..Draft::default()
        })
    }
}

/// The public keys in files, one a line.
fn read_keys(files: &[PathBuf]) -> Result<Vec<String>, String> {
    let mut keys = Vec::new();
    for path in files {
        let text = std::fs::read_to_string(path)
            .map_err(|e| format!("--ssh-key {}: {e}", path.display()))?;
        keys.extend(text.lines().filter(|l| !l.trim().is_empty()).map(str::to_owned));
    }
    Ok(keys)
}

/// An interface on a network.
pub fn nic_on(network: String) -> NicDraft {
    // No network has a colon in its name, and every link of the host.
    match network.contains(':') {
        true => NicDraft { wire: Some(network), ..NicDraft::default() },
        false => NicDraft { network: Some(network), ..NicDraft::default() },
    }
}

/// A path, or a size for an empty disk.
pub fn disk_or_size(text: &str) -> DiskDraft {
    match text.parse::<lodge_spec::Bytes>() {
        Ok(size) => DiskDraft { size: Some(Size::Bytes(size.0)), ..DiskDraft::default() },
        Err(_) => disk_of(text),
    }
}

#[derive(Clone, Debug, Default, Args)]
pub struct Serve {
    /// Where the Connect door listens, or `off`. 127.0.0.1:8080 when neither this nor the settings
    /// say.
    #[arg(long, value_name = "IP:PORT")]
    pub metald: Option<String>,
    /// Where the Zero-OS door listens (its clients expect port 6379), or `off`. Shut when neither
    /// this nor the settings say.
    #[arg(long, value_name = "IP:PORT")]
    pub zero_os: Option<String>,
    /// Open doors to other hosts without asking who comes.
    #[arg(long)]
    pub insecure: bool,
    /// No doors but the command line's; how commands start a daemon.
    #[arg(long, hide = true)]
    pub unattended: bool,
}

#[derive(Debug, Subcommand)]
pub enum Assets {
    /// Put a kernel (`vmlinux`, with `vmlinux.initrd` beside it) and a root file system
    /// (`rootfs.ext4`) into a folder; builds the image first where it is not there.
    #[command(after_help = "Example:\n  lodge assets install")]
    Install {
        #[arg(default_value = "/opt/vm-assets", value_hint = ValueHint::DirPath)]
        folder: PathBuf,
        /// The image that they are taken from.
        #[arg(long, default_value = "debian-12")]
        image: String,
    },
}
