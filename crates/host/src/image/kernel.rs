//! Kernels for boards without firmware: the ELF file inside a bzImage, unpacked once and kept for
//! as long as the bzImage is the same file.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use lodge_formats::{kernel, sniff};

use crate::facts::file_key;
use crate::paths;

/// A kernel file and what to load of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// What the hypervisor loads: the file itself, or the ELF unpacked from it.
    pub path: PathBuf,
    pub pvh: bool,
    /// It says itself that it finds devices on a board without PCI.
    pub virtio_mmio: bool,
    /// What is loaded is an ELF file.
    pub elf: bool,
    /// The unpacked file is not there yet.
    pub to_unpack: bool,
}

/// Looks at a kernel; unpacks nothing. A kernel never seen before is taken for one with a PVH
/// entry only after it has been unpacked.
pub fn look(path: &Path, cache: &Path) -> Result<Kernel, String> {
    let error = |e: std::io::Error| format!("{}: {e}", path.display());
    let mut file = fs::File::open(path).map_err(error)?;
    if file.metadata().map_err(error)?.is_dir() {
        return Err(format!("{} is a folder", path.display()));
    }
    let kind = sniff::read(&mut file).map_err(error)?;
    let key = file_key(path).map_err(error)?;
    let kept = |suffix: &str| cache.join("kernels").join(format!("{key}.{suffix}"));
    match kind {
        sniff::Kind::Elf | sniff::Kind::BzImage => {}
        other => return Err(format!("{} is {other}, not a Linux kernel", path.display())),
    }
    if kept("pvh").exists() {
        let path = if kind == sniff::Kind::Elf { path.to_owned() } else { kept("pvh") };
        let virtio_mmio = kept("mmio").exists();
        return Ok(Kernel { path, pvh: true, virtio_mmio, elf: true, to_unpack: false });
    }
    let known_not = kept("plain").exists();
    let elf = kind == sniff::Kind::Elf;
    let path = path.to_owned();
    Ok(Kernel { path, pvh: false, virtio_mmio: false, elf, to_unpack: !known_not })
}

/// Unpacks a kernel that was never seen before and remembers what it is.
pub fn unpack(path: &Path, cache: &Path) -> Result<(), String> {
    let error = |e: std::io::Error| format!("{}: {e}", path.display());
    let key = file_key(path).map_err(error)?;
    let dir = cache.join("kernels");
    paths::make_dir(&dir).map_err(error)?;
    // One at a time; whoever comes second finds it done, and a file that is in use is not replaced.
    static UNPACKING: Mutex<()> = Mutex::new(());
    let _one = UNPACKING.lock().expect("not poisoned");
    if ["pvh", "plain"].iter().any(|s| dir.join(format!("{key}.{s}")).exists()) {
        return Ok(());
    }
    let bytes = fs::read(path).map_err(error)?;
    let elf = match bytes.starts_with(b"\x7fELF") {
        true => None,
        false => kernel::unpack(&bytes).ok(),
    };
    let pvh = kernel::has_pvh_entry(elf.as_deref().unwrap_or(&bytes));
    let (suffix, content) = match (pvh, &elf) {
        (true, Some(elf)) => ("pvh", elf.as_slice()),
        (true, None) => ("pvh", &[][..]),
        (false, _) => ("plain", &[][..]),
    };
    let config = kernel::config(elf.as_deref().unwrap_or(&bytes)).unwrap_or_default();
    let set = |symbol: &str| config.lines().any(|line| line == format!("CONFIG_{symbol}=y"));
    if ["VIRTIO_MMIO", "VIRTIO_MMIO_CMDLINE_DEVICES", "VIRTIO_BLK", "VIRTIO_NET"]
        .into_iter()
        .all(set)
    {
        // Before the file that says that all is known.
        paths::write_atomically(&dir.join(format!("{key}.mmio")), &[]).map_err(error)?;
    }
    let target = dir.join(format!("{key}.{suffix}"));
    paths::write_atomically(&target, content).map_err(error)
}
