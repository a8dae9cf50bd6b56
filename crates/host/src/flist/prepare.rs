//! Before a machine boots from an flist: files are put into its layer, and what boots is found and
//! taken out. Every path is the guest's and is resolved within the guest's root.

use std::ffi::CString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use lodge_formats::gpt;
use lodge_spec::flist::within_root;
use serde::{Deserialize, Serialize};

use super::layer::Attr;
use super::tree::{ROOT, Tree, now};
use super::whole;

/// Kernels and initial RAM disks are smaller than this.
const MAX_BOOT_FILE: u64 = 1 << 30;
const MAX_YAML: u64 = 1 << 20;
const STEP: usize = 1 << 20;

/// Files to put in, and where what is taken out goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    pub files: Vec<Put>,
    /// A folder for `kernel` and `initrd`.
    pub out: PathBuf,
    /// Where in it a disk of everything goes, if one is wanted.
    pub disk: Option<PathBuf>,
    /// Where a disk goes that is all that the flist holds, and how many bytes it may have.
    pub whole: Option<(PathBuf, u64)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Put {
    pub path: String,
    /// Permission bits of a file that is not there yet.
    pub mode: u32,
    pub content: Vec<u8>,
}

/// How the flist boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// It says so itself in `boot/boot.yaml`.
    pub by_yaml: bool,
    pub initrd: bool,
    /// What it adds to the kernel's command line.
    pub cmdline: String,
    /// It wants nothing else on the command line.
    pub nodefault: bool,
    /// Files that were put in.
    pub files: usize,
    /// The disk that is all that it holds.
    pub whole: Option<Whole>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whole {
    pub bytes: u64,
    /// It has a partition for UEFI.
    pub uefi: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct BootYaml {
    kernel: String,
    initrd: String,
    cmdline: String,
    nodefault: bool,
}

pub(super) fn prepare(tree: &Tree, order: &Order) -> Result<Found, String> {
    for file in &order.files {
        put(tree, file)
            .map_err(|why| format!("cannot put {:?} into the root: {why}", file.path))?;
    }
    let mut found = find(tree, order)?;
    if let Some(disk) = &order.disk {
        super::disk::write(tree, disk)
            .map_err(|why| format!("writing the root as a disk: {why}"))?;
    }
    found.files = order.files.len();
    Ok(found)
}

fn find(tree: &Tree, order: &Order) -> Result<Found, String> {
    let out = order.out.as_path();
    let none = |why: String| format!("failed to open boot/boot.yaml: {why}");
    let yaml = match walk(tree, "/boot/boot.yaml") {
        Ok(ino) => ino,
        Err(why) => match walk(tree, "/boot/vmlinuz") {
            Ok(kernel) => return found_kernel(tree, kernel, out),
            Err(_) => {
                let image = walk(tree, whole::NAME).map_err(|_| {
                    none(format!("{why}; nor is there a /boot/vmlinuz or an {}", whole::NAME))
                })?;
                return found_whole(tree, image, order);
            }
        },
    };
    let text = read_whole(tree, yaml, MAX_YAML).map_err(none)?;
    let text = String::from_utf8(text).map_err(|e| none(e.to_string()))?;
    let boot: BootYaml =
        serde_saphyr::from_str(&text).map_err(|e| format!("boot/boot.yaml: {e}"))?;
    if boot.kernel.is_empty() {
        return Err("boot/boot.yaml: the key `kernel` is missing; it names the kernel".into());
    }
    let take = |key: &str, path: &str, name: &str| {
        let path = within_root(path);
        let taken = walk(tree, &path).and_then(|ino| copy(tree, ino, &out.join(name)));
        taken.map_err(|why| format!("boot/boot.yaml: {key} {path}: {why}"))
    };
    take("kernel", &boot.kernel, "kernel")?;
    let initrd = !boot.initrd.is_empty();
    if initrd {
        take("initrd", &boot.initrd, "initrd")?;
    }
    let BootYaml { cmdline, nodefault, .. } = boot;
    Ok(Found { by_yaml: true, initrd, cmdline, nodefault, files: 0, whole: None })
}

fn found_kernel(tree: &Tree, kernel: u64, out: &Path) -> Result<Found, String> {
    let at = |name: &str| {
        let name = name.to_owned();
        move |why: String| format!("/boot/{name}: {why}")
    };
    copy(tree, kernel, &out.join("kernel")).map_err(at("vmlinuz"))?;
    let initrd = walk(tree, "/boot/initrd.img").ok();
    if let Some(ino) = initrd {
        copy(tree, ino, &out.join("initrd")).map_err(at("initrd.img"))?;
    }
    let (initrd, cmdline) = (initrd.is_some(), String::new());
    Ok(Found { by_yaml: false, initrd, cmdline, nodefault: false, files: 0, whole: None })
}

/// No root at all, but a disk.
fn found_whole(tree: &Tree, image: u64, order: &Order) -> Result<Found, String> {
    let at = |why: String| format!("{}: {why}", whole::NAME);
    let attr = tree.attr(image).map_err(|e| at(e.to_string()))?;
    if !attr.is(libc::S_IFREG) {
        return Err(at("it is not a file".into()));
    }
    if let Some((to, most)) = &order.whole {
        if attr.size == 0 || attr.size > *most {
            let size = attr.size;
            return Err(at(format!("it has {size} bytes, and the machine's first disk {most}")));
        }
        take_out(tree, image, attr.size, to).map_err(at)?;
    }
    let head = tree.read(image, 0, gpt::TABLE).map_err(|e| at(unread(e)))?;
    let whole = Some(Whole { bytes: attr.size, uefi: gpt::has_efi_system(&head) });
    let cmdline = String::new();
    Ok(Found { by_yaml: false, initrd: false, cmdline, nodefault: false, files: 0, whole })
}

/// The inode of a path, links in it followed within the root.
fn walk(tree: &Tree, path: &str) -> Result<u64, String> {
    super::walk::walk(ROOT, path, |dir, name| {
        let layer = tree.layer();
        let ino = tree.lookup_in(&layer, dir, name).map_err(|e| e.to_string())?;
        let attr = tree.attr_in(&layer, ino).map_err(|e| e.to_string())?;
        let link = attr.is(libc::S_IFLNK);
        Ok((ino, link.then_some(attr.target)))
    })
}

fn read_whole(tree: &Tree, ino: u64, most: u64) -> Result<Vec<u8>, String> {
    let attr = tree.attr(ino).map_err(|e| e.to_string())?;
    if !attr.is(libc::S_IFREG) {
        return Err("it is not a file".into());
    }
    if attr.size > most {
        return Err(format!("it is larger than {most} bytes"));
    }
    tree.read(ino, 0, attr.size as usize).map_err(unread)
}

/// Why a file could not be read, in more words than the guest is told.
fn unread(error: std::io::Error) -> String {
    match (error.raw_os_error(), super::server::last_complaint()) {
        (Some(libc::EIO), why) if !why.is_empty() => format!("its contents: {why}"),
        _ => error.to_string(),
    }
}

fn copy(tree: &Tree, ino: u64, to: &Path) -> Result<(), String> {
    let attr = tree.attr(ino).map_err(|e| e.to_string())?;
    if !attr.is(libc::S_IFREG) {
        return Err("it is not a file".into());
    }
    if attr.size == 0 || attr.size > MAX_BOOT_FILE {
        return Err(format!("a file of {} bytes does not boot", attr.size));
    }
    take_out(tree, ino, attr.size, to)
}

/// Writes a file's contents to a new file; what is zero in it is left out.
fn take_out(tree: &Tree, ino: u64, size: u64, to: &Path) -> Result<(), String> {
    let text = |e: std::io::Error| format!("{}: {e}", to.display());
    let _ = std::fs::remove_file(to);
    let out = File::create_new(to).map_err(text)?;
    // The hypervisor has a user of its own.
    use std::os::unix::fs::PermissionsExt;
    out.set_permissions(std::fs::Permissions::from_mode(0o644)).map_err(text)?;
    out.set_len(size).map_err(text)?;
    tree.bring(ino);
    let mut at = 0;
    while at < size {
        let bytes = tree.read(ino, at, STEP).map_err(unread)?;
        if bytes.is_empty() {
            return Err("it ends early".into());
        }
        if bytes.iter().any(|byte| *byte != 0) {
            out.write_all_at(&bytes, at).map_err(text)?;
        }
        at += bytes.len() as u64;
    }
    Ok(())
}

fn attr(mode: u32) -> Attr {
    let time = now();
    Attr {
        mode,
        uid: 0,
        gid: 0,
        size: if mode & libc::S_IFMT == libc::S_IFDIR { 4096 } else { 0 },
        rdev: 0,
        nlink: 1,
        below: 0,
        target: Vec::new(),
        atime: time,
        mtime: time,
        ctime: time,
    }
}

/// Puts one file in, in the place of what is there, whose owner and mode stay. Folders that are
/// missing are made, for root alone where the file is.
fn put(tree: &Tree, file: &Put) -> Result<(), String> {
    let path = within_root(&file.path);
    let Some((parent, name)) = path.rsplit_once('/').filter(|(_, name)| !name.is_empty()) else {
        return Err("it names no file".into());
    };
    let text = |e: std::io::Error| e.to_string();
    let mode = if file.mode & 0o077 == 0 { 0o700 } else { 0o755 };
    let mut at = String::new();
    let mut dir = ROOT;
    for part in parent.split('/').filter(|p| !p.is_empty()) {
        at = format!("{at}/{part}");
        dir = match walk(tree, &at) {
            Ok(ino) => ino,
            Err(_) => {
                let name = CString::new(part).map_err(|e| e.to_string())?;
                // What is there and leads nowhere is not replaced.
                tree.make(dir, &name, attr(libc::S_IFDIR | mode)).map_err(text)?.0
            }
        };
        if !tree.attr(dir).map_err(text)?.is(libc::S_IFDIR) {
            return Err(format!("{at} is not a directory"));
        }
    }
    let there = tree.lookup_in(&tree.layer(), dir, name.as_bytes()).ok();
    let ino = match there {
        Some(_) => {
            let ino = walk(tree, &path)?;
            if !tree.attr(ino).map_err(text)?.is(libc::S_IFREG) {
                return Err("it is there and is not a file".into());
            }
            ino
        }
        None => {
            let name = CString::new(name).map_err(|e| e.to_string())?;
            tree.make(dir, &name, attr(libc::S_IFREG | file.mode & 0o7777)).map_err(text)?.0
        }
    };
    tree.resize(ino, 0).map_err(text)?;
    match file.content.is_empty() {
        true => Ok(()),
        false => tree.write(ino, 0, &file.content).map_err(text),
    }
}
