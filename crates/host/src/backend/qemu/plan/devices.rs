//! The devices of a machine as QEMU arguments. Knows buses and the names of device models.

use std::path::{Path, PathBuf};

use lodge_jail::Bind;
use lodge_spec::machine::{
    Board, Boot, BootDevice, Disk, DiskBus, Firmware, Machine, Media, Nic, NicModel, Share,
};
use lodge_spec::remote::Remote;
use serde_json::{Value, json};

use crate::backend::{DiskFiles, DiskFormat, Layer, OpenFile, Survey};

/// Sockets on a PCI Express board into which devices can be plugged later.
pub(crate) const HOTPLUG_PORTS: usize = 4;

/// The arguments so far, and what they refer to.
pub(super) struct Arguments {
    board: Board,
    pub(super) argv: Vec<String>,
    pub(super) binds: Vec<Bind>,
    pub(super) files: Vec<OpenFile>,
    /// Descriptor and index of the interface.
    pub(super) taps: Vec<(i32, usize)>,
    pub(super) kept: Vec<i32>,
    fd: i32,
    ide_units: usize,
    scsi: bool,
}

impl Arguments {
    pub(super) fn new(board: Board, first_fd: i32) -> Self {
        Self {
            board,
            argv: vec!["qemu-system-x86_64".into()],
            binds: Vec::new(),
            files: Vec::new(),
            taps: Vec::new(),
            kept: Vec::new(),
            fd: first_fd,
            ide_units: 0,
            scsi: false,
        }
    }

    pub(super) fn flag(&mut self, flag: &str) {
        self.argv.push(flag.into());
    }

    pub(super) fn add(&mut self, option: &str, value: impl Into<String>) {
        self.argv.extend([option.to_owned(), value.into()]);
    }

    pub(super) fn next_fd(&mut self) -> i32 {
        self.fd += 1;
        self.fd - 1
    }

    pub(super) fn bind_file(&mut self, inside: &str, path: &Path) {
        self.binds.push(Bind {
            source: path.to_owned(),
            target: inside.into(),
            writable: false,
            device: false,
            executable: false,
        });
    }

    /// Hands a file of a device over as a descriptor; returns the name by which QEMU opens it.
    fn file(&mut self, path: &Path, writable: bool, device: &str) -> String {
        let fd = self.open(path, writable, None);
        let set = self.files.len();
        self.add("-add-fd", format!("fd={fd},set={set},opaque={device}"));
        format!("/dev/fdset/{set}")
    }

    /// Has a file or a connection opened before QEMU starts; returns its number.
    fn open(&mut self, path: &Path, writable: bool, server: Option<Remote>) -> i32 {
        let fd = self.next_fd();
        self.files.push(OpenFile { fd, path: path.to_owned(), writable, server });
        self.kept.push(fd);
        fd
    }

    /// Hands a layer over; returns the name by which QEMU knows it.
    fn layer(&mut self, layer: &Layer, writable: bool, device: &str) -> String {
        match &layer.remote {
            None => self.file(&layer.path, writable, device),
            Some(remote) => self.open(&layer.path, writable, Some(remote.clone())).to_string(),
        }
    }

    /// `virtio-X-pci`, or `virtio-X-device` on a board without PCI.
    fn virtio(&self, kind: &str) -> String {
        match self.board {
            Board::Microvm => format!("virtio-{kind}-device"),
            Board::Q35 | Board::Pc => format!("virtio-{kind}-pci"),
        }
    }
}

pub(super) fn all(args: &mut Arguments, machine: &Machine, survey: &Survey) {
    args.add("-object", "rng-builtin,id=rng0");
    args.add("-device", format!("{},rng=rng0", args.virtio("rng")));
    args.add("-device", format!("{},id=balloon0,deflate-on-oom=on", args.virtio("balloon")));
    let boots = boot_ranks(machine);
    for (disk, files) in machine.disks.iter().zip(&survey.disks) {
        add_disk(args, disk, files, &boots);
    }
    if let Some(path) = &survey.files_disk {
        read_only_disk(args, path, "files", "lodge-files");
    }
    if !machine.cidata.is_empty() {
        read_only_disk(args, &survey.run.join("cidata.img"), "cidata", "cidata");
    }
    for (index, nic) in machine.nics.iter().enumerate() {
        add_nic(args, index, nic, &boots);
    }
    for share in &machine.shares {
        add_share(args, share);
    }
    if args.board == Board::Q35 {
        for port in 0..HOTPLUG_PORTS {
            args.add(
                "-device",
                format!("pcie-root-port,id=port{port},chassis={},slot={port}", port + 1),
            );
        }
    }
}

/// For UEFI, which knows no boot letters: the kinds of device in the order of this boot.
fn boot_ranks(machine: &Machine) -> Vec<BootDevice> {
    match &machine.boot {
        Boot::Firmware { firmware: Firmware::Uefi, order, once } => {
            let first = once.iter().copied();
            let rest = order.iter().copied().filter(|d| Some(*d) != *once);
            first.chain(rest).collect()
        }
        Boot::Firmware { firmware: Firmware::Bios, .. }
        | Boot::Kernel { .. }
        | Boot::Image { .. }
        | Boot::Flist { .. } => Vec::new(),
    }
}

fn boot_index(ranks: &[BootDevice], kind: BootDevice, nth: usize) -> String {
    match ranks.iter().position(|rank| *rank == kind) {
        Some(rank) => format!(",bootindex={}", rank * 100 + nth + 1),
        None => String::new(),
    }
}

/// What a disk is called as a device; whose its files are is told by this.
pub(crate) fn disk_id(disk: &str) -> String {
    format!("disk-{disk}")
}

/// The block nodes of a disk, the lowest layer first; the uppermost is named after the disk.
pub(crate) fn block_nodes(
    disk: &str,
    layers: &[Layer],
    read_only: bool,
    mut open: impl FnMut(&Layer, bool) -> String,
) -> Vec<Value> {
    let mut nodes: Vec<Value> = Vec::new();
    let name = |depth: usize| match depth {
        0 => format!("d-{disk}"),
        n => format!("d-{disk}-{n}"),
    };
    for (depth, layer) in layers.iter().enumerate().rev() {
        let read_only = read_only || depth > 0;
        let file = format!("f-{disk}-{depth}");
        let opened = open(layer, !read_only);
        let mut lowest = json!({"node-name": file, "read-only": read_only, "discard": "unmap"});
        match &layer.remote {
            None => {
                let driver = if layer.block_device { "host_device" } else { "file" };
                lowest["driver"] = driver.into();
                lowest["filename"] = opened.into();
            }
            Some(remote) => {
                lowest["driver"] = "nbd".into();
                lowest["server"] = json!({"type": "fd", "str": opened});
                lowest["export"] = match remote {
                    Remote::Nbd(nbd) => nbd.export.as_str().into(),
                    // A process of ours, which serves nothing else.
                    Remote::Zdb(_) => "".into(),
                };
            }
        }
        nodes.push(lowest);
        let mut node = json!({
            "driver": layer.format.as_str(),
            "node-name": name(depth),
            "file": file,
            "read-only": read_only,
            "discard": "unmap",
        });
        if layer.format == DiskFormat::Qcow2 {
            // Named or refused here, never taken from the image's own header.
            node["backing"] = match depth + 1 < layers.len() {
                true => Value::String(name(depth + 1)),
                false => Value::Null,
            };
        }
        nodes.push(node);
    }
    nodes
}

/// The device of a disk, without the bus it goes to.
pub(crate) fn disk_device(disk: &Disk, virtio: &str) -> String {
    let model = match (disk.bus, disk.media) {
        (DiskBus::Virtio, _) => virtio,
        (DiskBus::Ide, Media::Disk) => "ide-hd",
        (DiskBus::Ide, Media::Cdrom) => "ide-cd",
        (DiskBus::Scsi, Media::Disk) => "scsi-hd",
        (DiskBus::Scsi, Media::Cdrom) => "scsi-cd",
    };
    let name = disk.name.as_str();
    format!("{model},id={},drive=d-{name},serial={}", disk_id(name), disk.serial)
}

fn add_disk(args: &mut Arguments, disk: &Disk, files: &DiskFiles, boots: &[BootDevice]) {
    let (name, id) = (disk.name.as_str(), disk_id(disk.name.as_str()));
    let nodes = block_nodes(name, &files.layers, disk.read_only, |layer, writable| {
        args.layer(layer, writable, &id)
    });
    for node in nodes {
        args.add("-blockdev", node.to_string());
    }
    let mut device = disk_device(disk, &args.virtio("blk"));
    match disk.bus {
        DiskBus::Virtio => {}
        DiskBus::Ide => {
            // Each bus counts for itself: two units on each of the two old channels, one on each
            // channel of the newer controller.
            let unit = args.ide_units;
            args.ide_units += 1;
            device.push_str(&match args.board {
                Board::Pc => format!(",bus=ide.{},unit={}", unit / 2, unit % 2),
                Board::Q35 | Board::Microvm => format!(",bus=ide.{unit}"),
            });
        }
        DiskBus::Scsi => {
            if !std::mem::replace(&mut args.scsi, true) {
                args.add("-device", "virtio-scsi-pci,id=scsi");
            }
            device.push_str(",bus=scsi.0");
        }
    }
    let kind = match disk.media {
        Media::Disk => BootDevice::Disk,
        Media::Cdrom => BootDevice::Cdrom,
    };
    match disk.first {
        true => device.push_str(",bootindex=0"),
        false => device.push_str(&boot_index(boots, kind, args.files.len())),
    }
    args.add("-device", device);
}

fn read_only_disk(args: &mut Arguments, path: &Path, name: &str, serial: &str) {
    let layer = Layer::file(path.to_owned(), DiskFormat::Raw);
    let id = disk_id(name);
    let nodes = block_nodes(name, &[layer], true, |layer, _| args.file(&layer.path, false, &id));
    for node in nodes {
        args.add("-blockdev", node.to_string());
    }
    let model = args.virtio("blk");
    args.add("-device", format!("{model},id={id},drive=d-{name},serial={serial}"));
}

/// The device of an interface, without the bus it goes to.
pub(crate) fn nic_device(nic: &Nic, virtio: &str) -> String {
    let model = match nic.model {
        NicModel::Virtio => virtio,
        NicModel::E1000 => "e1000",
        NicModel::Rtl8139 => "rtl8139",
    };
    let mtu = nic.mtu.filter(|_| nic.model == NicModel::Virtio);
    let mtu = mtu.map(|mtu| format!(",host_mtu={mtu}")).unwrap_or_default();
    format!("{model},id=nic-{0},netdev=n-{0},mac={1}{mtu}", nic.name, nic.mac)
}

fn add_nic(args: &mut Arguments, index: usize, nic: &Nic, boots: &[BootDevice]) {
    let fd = args.next_fd();
    args.taps.push((fd, index));
    args.kept.push(fd);
    args.add("-netdev", format!("tap,id=n-{},fd={fd}", nic.name));
    let mut device = nic_device(nic, &args.virtio("net"));
    device.push_str(&boot_index(boots, BootDevice::Network, index));
    args.add("-device", device);
}

fn add_share(args: &mut Arguments, share: &Share) {
    let Share { source, tag, read_only } = share;
    let inside = PathBuf::from(format!("/shares/{tag}"));
    let (rights, model) = if *read_only { (",readonly=on", "none") } else { ("", "mapped-file") };
    args.add(
        "-fsdev",
        format!("local,id=s-{tag},path={},security_model={model}{rights}", inside.display()),
    );
    args.add("-device", format!("virtio-9p-pci,fsdev=s-{tag},mount_tag={tag}"));
    args.binds.push(Bind {
        source: source.clone(),
        target: inside,
        writable: !read_only,
        device: false,
        executable: false,
    });
}

/// The firmware's code, shared by all, and its variables, which are the machine's own.
pub(super) fn uefi(args: &mut Arguments, code: &Path, survey: &Survey) {
    let vars = survey.state.join("uefi-vars.fd");
    for (name, path, writable) in [("uefi-code", code, false), ("uefi-vars", vars.as_path(), true)]
    {
        let filename = args.file(path, writable, name);
        let node = json!({
            "driver": "file",
            "node-name": name,
            "filename": filename,
            "read-only": !writable,
        });
        args.add("-blockdev", node.to_string());
    }
}
