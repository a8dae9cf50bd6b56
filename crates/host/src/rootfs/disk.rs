//! Disks without a partition table, read as trees and written from trees. A disk appears whole or
//! not at all: whoever had the old one open keeps it, and nobody sees half of a new one.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{BufReader, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

pub use lodge_formats::ext4::Style;
use lodge_formats::ext4::{self, Summary};
use lodge_formats::qcow2::volume;
use lodge_formats::sniff::{self, Kind};
use lodge_formats::tree::{self, Tree};
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};

use super::ahead::Ahead;
use super::content::{Content, Source};
use crate::backend::DiskFormat;

/// Where GRUB's first sector is kept on a disk that boots, so that it still does when it is written
/// anew.
pub const FIRST_SECTOR: &str = "boot/grub/boot.img";

/// What does not follow from a tree.
#[derive(Clone, Debug)]
pub struct Make {
    /// Bytes, as the guest sees the disk.
    pub size: u64,
    pub format: DiskFormat,
    pub style: Style,
    pub label: String,
    pub uuid: [u8; 16],
}

/// A disk that was read.
pub struct Read {
    pub make: Make,
    pub tree: Tree<Content>,
}

/// Reads the names on a disk; contents are read when they are needed.
pub fn read(path: &Path) -> Result<Read, String> {
    let text = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    let mut file = File::open(path).map_err(|e| text(&e))?;
    let kind = sniff::read(&mut file).map_err(|e| text(&e))?;
    file.seek(SeekFrom::Start(0)).map_err(|e| text(&e))?;
    let file = BufReader::with_capacity(1 << 16, file);
    let (mut source, format): (Box<dyn Source>, _) = match kind {
        Kind::Qcow2 => {
            let volume = volume::Reader::open(file).map_err(|e| text(&e))?;
            (Box::new(volume), DiskFormat::Qcow2)
        }
        Kind::Ext4 => (Box::new(file), DiskFormat::Raw),
        other => {
            let what = "an image holds a file system from its first block on";
            return Err(format!("{} is {other}; {what}", path.display()));
        }
    };
    let size = source.seek(SeekFrom::End(0)).map_err(|e| text(&e))?;
    let ext4::read::Contents { label, uuid, style, tree, .. } =
        ext4::read::read(&mut source).map_err(|e| text(&e))?;
    let disk = Rc::new(RefCell::new(source));
    let tree = tree.map(|pieces| Content::Pieces(disk.clone(), pieces.into()));
    Ok(Read { make: Make { size, format, style, label, uuid }, tree })
}

/// What a disk begins with that boots by itself: its tree holds it.
fn first_sector(tree: &Tree<Content>) -> std::io::Result<Option<Vec<u8>>> {
    match tree.get(FIRST_SECTOR).map(|node| &node.kind) {
        Some(tree::Kind::File { contents, size }) => contents.read((*size).min(512)).map(Some),
        _ => Ok(None),
    }
}

/// Keeps others from making disks in the same folder for as long as it lives. Waits for those who
/// are at it.
pub struct Lock {
    _folder: File,
    /// The file that is meant, where its name is a link.
    pub path: PathBuf,
}

impl Lock {
    pub fn take(path: &Path) -> Result<Self, String> {
        let path = fs::canonicalize(path)
            .or_else(|_| std::path::absolute(path))
            .map_err(|e| format!("{}: {e}", path.display()))?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        let text = |e: std::io::Error| format!("{}: {e}", folder.display());
        let folder_file = File::open(folder).map_err(text)?;
        rustix::fs::flock(&folder_file, FlockOperation::LockExclusive)
            .map_err(|e| text(e.into()))?;
        Ok(Self { _folder: folder_file, path })
    }

    /// Puts a new disk in the place of whatever is there.
    pub fn write(&self, tree: &Tree<Content>, make: &Make) -> Result<Summary, String> {
        let path = &self.path;
        let text = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let folder = path.parent().unwrap_or(Path::new("/"));
        // Without a name it is gone if we are.
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::open(folder, flags, Mode::from_raw_mode(0o666));
        let file = File::from(file.map_err(|e| text(&std::io::Error::from(e)))?);
        let options = ext4::Options {
            size: make.size,
            label: make.label.clone(),
            uuid: make.uuid,
            time: super::epoch(),
            style: make.style,
            boot: first_sector(tree).map_err(|e| text(&e))?,
        };
        let mut ahead = Ahead::new(tree);
        let open = |size, content: &Content| ahead.open(size, content);
        let summary = match make.format {
            DiskFormat::Raw => {
                file.set_len(make.size).map_err(|e| text(&e))?;
                ext4::write_tree(tree, &file, &options, open).map_err(|e| text(&e))?
            }
            DiskFormat::Qcow2 => {
                let mut volume = volume::Writer::new(&file, make.size);
                let summary = ext4::write_tree(tree, &mut volume, &options, open);
                let summary = summary.map_err(|e| text(&e))?;
                volume.finish().map_err(|e| text(&e))?;
                summary
            }
        };
        if let Ok(old) = path.metadata() {
            let mode = fs::Permissions::from_mode(old.mode() & 0o7777);
            file.set_permissions(mode).map_err(|e| text(&e))?;
            // What is there is not given up before the new one is safe.
            file.sync_data().map_err(|e| text(&e))?;
        }
        self.name(&file, folder).map_err(|e| text(&e))?;
        Ok(summary)
    }

    /// Gives the new file its name in one step.
    fn name(&self, file: &File, folder: &Path) -> std::io::Result<()> {
        let part = folder.join(format!(".{}.part", std::process::id()));
        let _ = fs::remove_file(&part);
        let own = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file.as_fd()));
        rustix::fs::linkat(rustix::fs::CWD, own, rustix::fs::CWD, &part, AtFlags::SYMLINK_FOLLOW)?;
        fs::rename(&part, &self.path)?;
        File::open(folder)?.sync_all()
    }
}
