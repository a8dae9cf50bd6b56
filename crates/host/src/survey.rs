//! What the host has for a machine: names become paths, every file is looked at, and what must be
//! made is listed. Reads, and changes nothing but the leases of addresses.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use lodge_machine::store::{Store, lease};
use lodge_spec::machine::{Boot, Disk, DiskSource, FileContent, Machine};
use lodge_spec::names::{ImageName, MachineId};
use lodge_spec::problem::{Problem, Problems};

use crate::backend::{
    BootFiles, BootstrapEnd, DiskFiles, DiskFormat, Layer, MdataEnd, NicPlace, Step, Survey,
};
use crate::flist::root::Root;
use crate::image::store::Images;
use crate::image::{Manifest, kernel, layer};
use crate::net::plan::{NetPlan, tap_name};
use crate::paths::{Paths, lies_beneath};

/// Users of root's machines are numbered from here; nobody else's are.
const FIRST_UID: u32 = 0x6c00_0000;

pub struct Surveyor<'a> {
    pub paths: &'a Paths,
    pub images: &'a Images,
    pub store: &'a Store,
    /// Of a machine whose root is an flist.
    pub root: Option<Root>,
}

/// The user that a machine's hypervisor runs as: one of its own for root, else the caller.
pub fn user_of(id: MachineId) -> u32 {
    let own = rustix::process::geteuid();
    if !own.is_root() {
        return own.as_raw();
    }
    let [.., a, b, c] = *id.0.as_bytes();
    FIRST_UID + u32::from_be_bytes([0, a, b, c])
}

impl Surveyor<'_> {
    /// Everything wrong with what the machine names, each with its field.
    pub async fn survey(&self, machine: &Machine) -> Result<Survey, Problems> {
        let mut p = Problems::default();
        let (state, run) = (self.paths.machine(machine.id), self.paths.running(machine.id));
        let mut steps = Vec::new();
        for path in [&state, &run] {
            steps.push(Step::Folder { path: path.clone() });
        }
        let uid = user_of(machine.id);
        let manifest = match &machine.boot {
            Boot::Image { image, .. } => self.manifest(&mut p, "image", image).await,
            Boot::Kernel { .. } | Boot::Firmware { .. } | Boot::Flist { .. } => None,
        };
        let boot = self.boot(&mut p, machine, manifest.as_ref(), &mut steps, &run, uid);
        let mut disks = Vec::new();
        for (i, disk) in machine.disks.iter().enumerate() {
            let files = self.disk(&mut p, machine, i, disk, &mut steps, uid).await;
            disks.extend(files);
        }
        check_paths(&mut p, machine);
        let takes_files = manifest.as_ref().is_some_and(|m| m.takes_files);
        let files_disk = self.files_disk(machine, takes_files, &run, &mut steps);
        extra_steps(machine, &run, uid, &mut steps);
        let nics = self.nics(&mut p, machine).await;
        let boot = boot.unwrap_or(BootFiles::Firmware);
        let own = machine.ready.as_ref().map(ToString::to_string);
        let ready = own.or_else(|| manifest.and_then(|m| m.ready));
        check_ready(&mut p, ready.as_deref());
        // A disk is a disk; nobody serves it.
        let root = self.root.clone().filter(|root| root.disk.is_none());
        p.or(Survey { boot, root, disks, nics, files_disk, steps, run, state, uid, ready })
    }

    async fn manifest(&self, p: &mut Problems, path: &str, image: &ImageName) -> Option<Manifest> {
        let found = self.images.find(image).await;
        p.take(path, found)
    }

    fn boot(
        &self,
        p: &mut Problems,
        machine: &Machine,
        manifest: Option<&Manifest>,
        steps: &mut Vec<Step>,
        run: &Path,
        uid: u32,
    ) -> Option<BootFiles> {
        let (kernel, initrd, cmdline, known_mmio) = match (&machine.boot, manifest) {
            (Boot::Firmware { .. }, _) => return Some(BootFiles::Firmware),
            (Boot::Kernel { kernel, initrd, cmdline }, _) => {
                (kernel.clone(), initrd.clone(), cmdline.clone(), false)
            }
            (Boot::Image { cmdline, .. }, Some(manifest)) => {
                let Some(kernel) = &manifest.kernel else { return Some(BootFiles::Firmware) };
                let initrd = manifest.initrd.as_ref().map(|b| self.images.path(b));
                let line = format!("{} {cmdline}", manifest.cmdline).trim().to_owned();
                (self.images.path(kernel), initrd, line, manifest.virtio_mmio)
            }
            (Boot::Flist { cmdline, .. }, _) => {
                let root = self.root.as_ref()?;
                (root.kernel.clone(), root.initrd.clone(), root.cmdline(cmdline), false)
            }
            (Boot::Image { .. }, None) => return None,
        };
        let looked = p.take("boot.kernel", kernel::look(&kernel, &self.paths.cache()))?;
        if looked.to_unpack {
            let cache = self.paths.cache().join("kernels");
            steps.push(Step::UnpackedKernel { from: kernel.clone(), path: cache });
        }
        let initrd = match initrd {
            None => None,
            Some(path) => Some(p.take("boot.initrd", readable(&path).map(|()| path))?),
        };
        let own_initrd = |steps: &mut Vec<Step>, from: &Path| {
            let files = layer::guest_file_count(machine, false);
            let path = run.join("initrd");
            if files > 0 && puts_into_initrd(machine) {
                let from = from.to_owned();
                steps.push(Step::Initrd { from, path: path.clone(), files });
                return path;
            }
            visible(from, "initrd", run, uid, steps)
        };
        let initrd = initrd.map(|path| own_initrd(steps, &path));
        let kernel = visible(&looked.path, "kernel", run, uid, steps);
        // Whoever turns PCI off knows that the kernel does without.
        let pci = !cmdline.split_whitespace().any(|word| word == "pci=off");
        let virtio_mmio = known_mmio || looked.virtio_mmio || !pci;
        let (pvh, elf) = (looked.pvh, looked.elf);
        Some(BootFiles::Kernel { kernel, initrd, cmdline, elf, pvh, virtio_mmio, pci })
    }

    async fn disk(
        &self,
        p: &mut Problems,
        machine: &Machine,
        index: usize,
        disk: &Disk,
        steps: &mut Vec<Step>,
        uid: u32,
    ) -> Option<DiskFiles> {
        let at = format!("disks[{index}]");
        let home = self.paths.machine(machine.id);
        let own = |name: &str| home.join(format!("{name}.qcow2"));
        let top = |path: PathBuf| Layer::file(path, DiskFormat::Qcow2);
        if !is_in_place(&disk.source) {
            // An earlier start under a hypervisor that knows only raw disks has made it whole.
            let path = home.join(format!("{}.raw", disk.name));
            if let Ok(meta) = fs::metadata(&path) {
                let layer = Layer::file(path, DiskFormat::Raw);
                return Some(DiskFiles { layers: vec![layer], bytes: meta.len(), kept: true });
            }
        }
        let files = |layers: Vec<Layer>, bytes: u64| {
            let kept = layers.len() > 1 || matches!(disk.source, DiskSource::Blank { .. });
            let kept = kept && layers[0].path.exists();
            Some(DiskFiles { layers, bytes, kept })
        };
        let plain = |p: &mut Problems, looked| {
            let looked: layer::Looked = p.take(&format!("{at}.source"), looked)?;
            files(vec![looked.layer], looked.bytes)
        };
        match &disk.source {
            DiskSource::Path(path) => plain(p, layer::look(path)),
            DiskSource::Remote(remote) => files(vec![Layer::remote(remote)], 0),
            DiskSource::Own(name) => plain(p, self.own_file(machine.id, name)),
            // Before the machine itself is made, it lies elsewhere.
            DiskSource::Flist => plain(p, layer::look(self.root.as_ref()?.disk.as_ref()?)),
            DiskSource::Above(below) => {
                let looked = p.take(&format!("{at}.source"), layer::look(below))?;
                let path = own(disk.name.as_str());
                let (bytes, below) = (looked.bytes, looked.layer);
                let above = Some((below.path.clone(), below.format));
                steps.push(Step::Layer { path: path.clone(), bytes, above, owner: uid });
                files(vec![top(path), below], bytes)
            }
            DiskSource::Blank { size } => {
                let path = own(disk.name.as_str());
                let bytes = size.0;
                steps.push(Step::Layer { path: path.clone(), bytes, above: None, owner: uid });
                files(vec![top(path)], bytes)
            }
            DiskSource::Image { image, size } => {
                let manifest = self.manifest(p, &format!("{at}.image"), image).await?;
                let Some(base) = &manifest.disk else {
                    p.add(format!("{at}.image"), format!("image {image} has no disk"));
                    return None;
                };
                let bytes = size.map_or(base.virtual_bytes, |s| s.0);
                if bytes < base.virtual_bytes {
                    let least = base.virtual_bytes;
                    p.add(
                        format!("{at}.size"),
                        format!("image {image} is {least} bytes large; a layer cannot be smaller"),
                    );
                }
                let below = self.images.path(&base.blob);
                if let Err(why) = intact(&below, base.blob.bytes) {
                    p.add(format!("{at}.image"), format!("image {image}: {why}"));
                }
                let format = match base.format.as_str() {
                    "qcow2" => DiskFormat::Qcow2,
                    _ => DiskFormat::Raw,
                };
                let path = own(disk.name.as_str());
                let above = Some((below.clone(), format));
                steps.push(Step::Layer { path: path.clone(), bytes, above, owner: uid });
                let below = Layer::file(below, format);
                files(vec![top(path), below], bytes)
            }
        }
    }

    /// A file in the machine's own folder, no link on the way leading out of it.
    fn own_file(&self, id: MachineId, name: &Path) -> Result<layer::Looked, String> {
        let root = self.paths.own_folder(id);
        let path = root.join(name);
        lies_beneath(&root, &path).and_then(|()| layer::look(&path))
    }

    /// Guests that take files from a disk get one; guests without disks get them in their initrd.
    fn files_disk(
        &self,
        machine: &Machine,
        takes_files: bool,
        run: &Path,
        steps: &mut Vec<Step>,
    ) -> Option<PathBuf> {
        let files = layer::guest_file_count(machine, takes_files);
        // An flist's files were put into its layer.
        let elsewhere = puts_into_initrd(machine) || self.root.is_some();
        if files == 0 || elsewhere {
            return None;
        }
        let path = run.join("files.tar");
        steps.push(Step::FilesDisk { path: path.clone(), files });
        Some(path)
    }

    async fn nics(&self, p: &mut Problems, machine: &Machine) -> Vec<NicPlace> {
        let mut places = Vec::new();
        for (i, nic) in machine.nics.iter().enumerate() {
            let dir = self.paths.network(nic.network.as_str());
            if nic.wire.is_some() {
                let interface = tap_name(machine.id, nic.mac);
                places.push(NicPlace { network: dir, interface, address: Ipv4Addr::UNSPECIFIED });
                continue;
            }
            let plan = NetPlan::of(&nic.network, &dir);
            let at = format!("nics[{i}].address");
            let foreign = nic.address.filter(|a| !plan.holds(*a));
            if let Some(address) = foreign.filter(|_| nic.subnet.is_none()) {
                p.add(&at, format!("{address} is not on the network {}", nic.network));
                continue;
            }
            let (network, mac, id) =
                (nic.network.to_string(), nic.mac.to_string(), machine.id.to_string());
            let (first, last) = plan.range();
            let range = (u32::from(first), u32::from(last));
            let wanted = nic.address.map(u32::from);
            let leased =
                self.store.write(move |c| lease(c, &network, &mac, &id, wanted, range)).await;
            match leased {
                Ok(Some(address)) => places.push(NicPlace {
                    network: dir,
                    interface: tap_name(machine.id, nic.mac),
                    address: address.into(),
                }),
                Ok(None) => match nic.address {
                    Some(a) => p.add(&at, format!("{a} belongs to another machine")),
                    None => p.add(&at, format!("the network {} has no free address", nic.network)),
                },
                Err(error) => p.add(&at, error),
            }
        }
        places
    }
}

/// What is used where it is, without a file of the machine's own above it.
fn is_in_place(source: &DiskSource) -> bool {
    matches!(source, DiskSource::Path(_) | DiskSource::Remote(_) | DiskSource::Own(_))
}

/// Files go to guests without disks in their initrd.
fn puts_into_initrd(machine: &Machine) -> bool {
    matches!(&machine.boot, Boot::Kernel { .. }) && machine.disks.is_empty()
}

/// Files for the warden and the hypervisor that only some machines have.
fn extra_steps(machine: &Machine, run: &Path, owner: u32, steps: &mut Vec<Step>) {
    if machine.mdata.is_some() {
        steps.push(Step::Mdata { path: MdataEnd::file(run) });
    }
    if machine.bootstrap.as_ref().is_some_and(|bootstrap| bootstrap.script.is_some()) {
        steps.push(Step::Bootstrap { path: BootstrapEnd::file(run) });
    }
    if !machine.cidata.is_empty() {
        steps.push(Step::Cidata { path: run.join("cidata.img") });
    }
    if machine.vnc_password().is_some() {
        steps.push(Step::VncPassword { path: run.join("vnc-password"), owner });
    }
}

fn readable(path: &Path) -> Result<(), String> {
    let error = |e: std::io::Error| format!("{}: {e}", path.display());
    let meta = fs::metadata(path).map_err(error)?;
    if !meta.is_file() {
        return Err(format!("{} is not a file", path.display()));
    }
    if meta.len() == 0 {
        return Err(format!("{} is empty", path.display()));
    }
    fs::File::open(path).map(drop).map_err(error)
}

/// Cheap signs that a stored file is still what it was; `lodge image verify` reads it all.
fn intact(path: &Path, bytes: u64) -> Result<(), String> {
    let meta = fs::metadata(path).map_err(|e| format!("{}: {e}", path.display()))?;
    if meta.len() == bytes {
        return Ok(());
    }
    Err(format!(
        "{} has {} bytes instead of {bytes}; its content no longer matches its digest",
        path.display(),
        meta.len()
    ))
}

/// Files that the machine's own user may not read are copied for it.
fn visible(path: &Path, name: &str, run: &Path, uid: u32, steps: &mut Vec<Step>) -> PathBuf {
    let mode = fs::metadata(path).map_or(0, |m| m.permissions().mode());
    if mode & 0o004 != 0 || !rustix::process::geteuid().is_root() {
        return path.to_owned();
    }
    let copy = run.join(name);
    steps.push(Step::Copy { from: path.to_owned(), path: copy.clone(), owner: uid });
    copy
}

fn check_ready(p: &mut Problems, ready: Option<&str>) {
    if let Some(regex) = ready.and_then(|r| r.strip_prefix("console:"))
        && let Err(why) = regex_lite::Regex::new(regex)
    {
        p.add("ready", format!("{regex:?} is not a regular expression: {why}"));
    }
}

fn check_paths(p: &mut Problems, machine: &Machine) {
    for (i, share) in machine.shares.iter().enumerate() {
        if !share.source.is_dir() {
            let what = format!("{} is not a folder", share.source.display());
            p.0.push(Problem::new(format!("shares[{i}].source"), what));
        }
    }
    let files = machine.files.iter().enumerate();
    let files = files.map(|(i, file)| (format!("files[{i}].source"), &file.content));
    let script = machine.bootstrap.as_ref().and_then(|bootstrap| bootstrap.script.as_ref());
    let script = script.map(|script| ("bootstrap.source".to_owned(), script));
    for (field, content) in files.chain(script) {
        if let FileContent::Source(path) = content
            && let Err(why) = readable(path)
        {
            p.0.push(Problem::new(field, why));
        }
    }
}
