//! An flist that holds no root but a whole disk, `/image.raw`: which disk of a machine takes it, and
//! the machine that boots from there. Knows nothing of how the bytes are fetched.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use lodge_spec::machine::{Board, Boot, BootDevice, Disk, DiskSource, Firmware, Machine, Media};

use super::root::Root;
use crate::backend::DiskFormat;
use crate::image::layer;

/// Where such an flist has it.
pub const NAME: &str = "/image.raw";

/// A disk without a partition table or a file system has nothing here.
const HEAD: usize = 1 << 17;

/// What becomes of the first disk of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// It gets a layer above the image, which is kept with the machine, as large as the disk.
    Below { bytes: u64 },
    /// The image is written to it: it is blank.
    Onto { path: PathBuf, bytes: u64 },
    /// It has something on it already, and boots from that.
    Full,
}

impl Place {
    /// The first disk decides; there has to be one.
    pub fn of(machine: &Machine) -> Result<Self, String> {
        let Some(Disk { name, source, read_only, .. }) = machine.disks.iter().find(|d| is_disk(d))
        else {
            return Err(format!("the flist holds a whole disk, {NAME}; the machine needs one"));
        };
        match source {
            DiskSource::Blank { size } => Ok(Self::Below { bytes: size.0 }),
            DiskSource::Path(path) => {
                let looked = layer::look(path)?;
                if looked.layer.format != DiskFormat::Raw {
                    let path = path.display();
                    return Err(format!("{path}: {NAME} goes onto raw disks; this one is qcow2"));
                }
                match *read_only || !is_blank(path)? {
                    true => Ok(Self::Full),
                    false => Ok(Self::Onto { path: path.clone(), bytes: looked.bytes }),
                }
            }
            DiskSource::Image { .. }
            | DiskSource::Above(_)
            | DiskSource::Remote(_)
            | DiskSource::Own(_) => Ok(Self::Full),
            DiskSource::Flist => Err(format!("{NAME} is a disk itself; {name} cannot hold it")),
        }
    }

    /// How large the image may be; `None` where it is not wanted.
    pub fn room(&self) -> Option<u64> {
        match self {
            Self::Below { bytes } | Self::Onto { bytes, .. } => Some(*bytes),
            Self::Full => None,
        }
    }

    /// Puts the image, which the confined process has taken out to `made`, where it belongs. A
    /// layer's image is `kept` from then on.
    pub fn fill(&self, made: &Path, kept: &Path) -> Result<(), String> {
        let at = |path: &Path| {
            let path = path.display().to_string();
            move |e: std::io::Error| format!("{path}: {e}")
        };
        match self {
            Self::Below { bytes } => {
                let file = OpenOptions::new().write(true).open(made).map_err(at(made))?;
                file.set_len(*bytes).and_then(|()| file.sync_all()).map_err(at(made))?;
                fs::rename(made, kept).map_err(at(kept))
            }
            Self::Onto { path, .. } => {
                onto(made, path).map_err(at(path))?;
                fs::remove_file(made).map_err(at(made))
            }
            Self::Full => Ok(()),
        }
    }
}

/// Writes a disk to another one. What begins it goes last: a disk that was filled by halves is
/// blank still.
fn onto(from: &Path, to: &Path) -> std::io::Result<()> {
    let (from, to) = (File::open(from)?, OpenOptions::new().write(true).open(to)?);
    let length = from.metadata()?.len();
    let mut piece = vec![0; 1 << 20];
    let head = HEAD.min(length as usize);
    let mut at = head as u64;
    while at < length {
        let count = from.read_at(&mut piece, at)?;
        if count == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        if piece[..count].iter().any(|byte| *byte != 0) {
            to.write_all_at(&piece[..count], at)?;
        }
        at += count as u64;
    }
    to.sync_all()?;
    from.read_exact_at(&mut piece[..head], 0)?;
    to.write_all_at(&piece[..head], 0)?;
    to.sync_all()
}

fn is_disk(disk: &Disk) -> bool {
    disk.media == Media::Disk
}

fn is_blank(path: &Path) -> Result<bool, String> {
    let text = |e: std::io::Error| format!("{}: {e}", path.display());
    let mut head = Vec::with_capacity(HEAD);
    File::open(path).map_err(text)?.take(HEAD as u64).read_to_end(&mut head).map_err(text)?;
    Ok(head.iter().all(|byte| *byte == 0))
}

/// The machine that boots from its first disk.
pub fn machine(machine: &Machine, root: &Root) -> Machine {
    let mut own = machine.clone();
    let uefi = root.found.whole.is_some_and(|whole| whole.uefi);
    let firmware = if uefi { Firmware::Uefi } else { Firmware::Bios };
    own.boot = Boot::Firmware { firmware, order: vec![BootDevice::Disk], once: None };
    if uefi && own.board == Some(Board::Pc) {
        // That one knows no UEFI.
        own.board = Some(Board::Q35);
    }
    if let (Some(below), Some(disk)) = (&root.below, own.disks.iter_mut().find(|d| is_disk(d))) {
        disk.source = DiskSource::Above(below.clone());
    }
    own
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_written_to_a_blank_disk_once() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let mut bytes = vec![0; 3 << 20];
        bytes[510..512].copy_from_slice(b"\x55\xaa");
        bytes[(2 << 20) + 7] = 9;
        fs::write(&from, &bytes).unwrap();
        File::create(&to).unwrap().set_len(4 << 20).unwrap();
        assert!(is_blank(&to).unwrap());
        onto(&from, &to).unwrap();
        assert!(!is_blank(&to).unwrap());
        bytes.resize(4 << 20, 0);
        assert!(fs::read(&to).unwrap() == bytes);
    }
}
