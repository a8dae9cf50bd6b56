//! Disk files of a machine: empty disks, layers above images, disks and archives that carry files
//! into the guest.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use lodge_formats::{cpio, qcow2, sniff};
use lodge_spec::machine::{FileContent, Machine};

use crate::backend::{DiskFormat, Layer};

/// What a file is as a disk.
pub struct Looked {
    pub layer: Layer,
    /// The guest's view.
    pub bytes: u64,
    pub kind: sniff::Kind,
}

/// Looks at a file as a disk. Errors are whole sentences.
pub fn look(path: &Path) -> Result<Looked, String> {
    let error = |e: io::Error| format!("{}: {e}", path.display());
    let meta = fs::metadata(path).map_err(error)?;
    use std::os::unix::fs::FileTypeExt;
    let block_device = meta.file_type().is_block_device();
    if meta.is_dir() {
        return Err(format!("{} is a folder, not a disk", path.display()));
    }
    if !meta.is_file() && !block_device {
        return Err(format!("{} is neither a file nor a block device", path.display()));
    }
    if meta.is_file() && meta.len() == 0 {
        return Err(format!("{} is empty", path.display()));
    }
    let mut file = File::open(path).map_err(error)?;
    let kind = sniff::read(&mut file).map_err(error)?;
    if kind != sniff::Kind::Qcow2 {
        let bytes = file.seek(SeekFrom::End(0)).map_err(error)?;
        let layer = Layer { block_device, ..Layer::file(path.to_owned(), DiskFormat::Raw) };
        return Ok(Looked { layer, bytes, kind });
    }
    let header = qcow2::read(&mut file).map_err(|e| format!("{}: {e}", path.display()))?;
    let refuse = |what: &str| Err(format!("{}: {what}", path.display()));
    if let Some(backing) = header.backing_file {
        return refuse(&format!(
            "it is a layer above {backing:?}, and what lies below is never followed; flatten it \
             with `qemu-img convert -O qcow2`"
        ));
    }
    if header.encrypted || header.external_data {
        return refuse("encrypted images and images with external data are not supported");
    }
    let layer = Layer { block_device, ..Layer::file(path.to_owned(), DiskFormat::Qcow2) };
    Ok(Looked { layer, bytes: header.virtual_size, kind })
}

/// Makes an empty qcow2 file, above a file of its kind where there is one, unless it is there.
pub fn make(
    path: &Path,
    bytes: u64,
    above: Option<(&Path, DiskFormat)>,
    owner: u32,
) -> io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    let part = path.with_extension("part");
    let backing = above.map(|(path, format)| (path.to_string_lossy(), format.as_str()));
    let mut file = File::create(&part)?;
    let backing = backing.as_ref().map(|(path, format)| (path.as_ref(), *format));
    qcow2::write_empty(&mut file, bytes, backing)?;
    give(&part, owner)?;
    fs::rename(part, path)
}

/// Makes a raw disk, with the bytes of another where there is one, unless it is there. Shares
/// them with it where the file system can.
pub fn make_raw(path: &Path, bytes: u64, from: Option<&Path>, owner: u32) -> io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    let part = path.with_extension("part");
    let out = File::create(&part)?;
    if let Some(from) = from {
        share_or_copy(from, &out)?;
    }
    out.set_len(bytes)?;
    give(&part, owner)?;
    fs::rename(part, path)
}

/// Fills a new file with the bytes of another, shared with it where the file system can.
pub(crate) fn share_or_copy(from: &Path, out: &File) -> io::Result<()> {
    match rustix::fs::ioctl_ficlone(out, File::open(from)?) {
        Ok(()) => Ok(()),
        Err(_) => super::store::copy_sparse(File::open(from)?, out, |_| {}).map(drop),
    }
}

/// Makes a named pipe.
pub fn make_pipe(path: &Path, owner: u32) -> io::Result<()> {
    use rustix::fs::{CWD, FileType, Mode};
    let _ = fs::remove_file(path);
    rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    give(path, owner)
}

/// Gives a folder to the user who makes files in it.
pub fn give_folder(path: &Path, owner: u32) -> io::Result<()> {
    match rustix::process::geteuid().is_root() {
        true => chown(path, Some(owner), Some(owner)),
        false => Ok(()),
    }
}

/// Makes a copy, unless it is there.
pub fn copy(from: &Path, path: &Path, owner: u32) -> io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    let part = path.with_extension("part");
    fs::copy(from, &part)?;
    give(&part, owner)?;
    fs::rename(part, path)
}

/// Root's machines run as users of their own, who own their files.
pub(crate) fn give(path: &Path, owner: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    if fs::metadata(path)?.uid() != owner && rustix::process::geteuid().is_root() {
        chown(path, Some(owner), Some(owner))?;
    }
    Ok(())
}

/// The files that a machine puts into its guest: path, mode, content. `with_identity`: also its
/// host name, for guests that take it from a file.
pub fn guest_files(
    machine: &Machine,
    with_identity: bool,
) -> Result<Vec<(String, u32, Vec<u8>)>, String> {
    let mut list = Vec::new();
    for file in &machine.files {
        list.push((file.path.clone(), file.mode, content(&file.content)?));
    }
    list.extend(made_files(machine, with_identity));
    Ok(list)
}

/// What a file contains.
pub fn content(content: &FileContent) -> Result<Vec<u8>, String> {
    match content {
        FileContent::Text(text) => Ok(text.clone().into_bytes()),
        FileContent::Source(path) => fs::read(path).map_err(|e| format!("{}: {e}", path.display())),
    }
}

/// How many files `guest_files` gives, without reading any.
pub fn guest_file_count(machine: &Machine, with_identity: bool) -> usize {
    machine.files.len() + made_files(machine, with_identity).len()
}

/// The files that nobody wrote: keys, metadata and identity, unless the machine brings its own.
fn made_files(machine: &Machine, with_identity: bool) -> Vec<(String, u32, Vec<u8>)> {
    let own = |path: &str| machine.files.iter().any(|f| f.path == path);
    let mut list = Vec::new();
    let keys = "/root/.ssh/authorized_keys";
    if !machine.ssh_keys.is_empty() && !own(keys) {
        let lines: String = machine.ssh_keys.iter().map(|k| format!("{}\n", k.trim())).collect();
        list.push((keys.to_owned(), 0o600, lines.into_bytes()));
    }
    let metadata = "/etc/lodge/metadata.json";
    if !machine.metadata.is_empty() && !own(metadata) {
        let text = serde_json::to_vec_pretty(&machine.metadata).unwrap_or_default();
        list.push((metadata.to_owned(), 0o600, text));
    }
    if with_identity && !own("/etc/hostname") {
        let line = format!("{}\n", machine.hostname);
        list.push(("/etc/hostname".to_owned(), 0o644, line.into_bytes()));
    }
    list
}

/// A disk whose content is a tar archive.
pub fn write_files_disk(path: &Path, files: &[(String, u32, Vec<u8>)]) -> io::Result<()> {
    let mut tar = tar::Builder::new(BufWriter::new(File::create(path)?));
    for (name, mode, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(*mode);
        header.set_entry_type(tar::EntryType::Regular);
        tar.append_data(&mut header, name.trim_start_matches('/'), content.as_slice())?;
    }
    tar.into_inner()?.flush()
}

/// An initial RAM disk with an archive of files behind it.
pub fn write_initrd(from: &Path, path: &Path, files: &[(String, u32, Vec<u8>)]) -> io::Result<()> {
    let mut out = File::create(path)?;
    let length = io::copy(&mut File::open(from)?, &mut out)?;
    out.write_all(&[0; 3][..((4 - length % 4) % 4) as usize])?;
    let mut archive = cpio::Writer::new(BufWriter::new(out));
    for (name, mode, content) in files {
        archive.file(name, *mode, content)?;
    }
    archive.finish()?.flush()
}
