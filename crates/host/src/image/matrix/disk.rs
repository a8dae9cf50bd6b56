//! From a tree to a disk that boots: partitions, loaders and file system, written straight into a
//! qcow2 image. No mount, no loop device, no root.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use lodge_formats::ext4;
use lodge_formats::gpt::{self, Loader, Part};
use lodge_formats::qcow2::volume;

use crate::image::debian::EPOCH;
use crate::image::grub::Grub;

const MIB: u64 = 1 << 20;
/// A root has at least this, where the disk does: it grows into larger disks at first boot.
const USUAL_ROOT: u64 = 2048 * MIB;

/// A disk to be made.
pub(super) struct Plan<'a> {
    /// The archive of the root.
    pub(super) tree: &'a Path,
    /// Bytes of all files in it.
    pub(super) contents: u64,
    /// Bytes of the disk.
    pub(super) size: u64,
    pub(super) identities: gpt::Identities,
    /// The root's identity.
    pub(super) root: [u8; 16],
}

impl Plan<'_> {
    /// Bytes of the root: room for the contents, their tables, and something to add.
    fn root_size(&self) -> Result<u64, String> {
        let whole = gpt::root_size(self.size).unwrap_or(0);
        let wanted = (self.contents + self.contents / 4 + 256 * MIB).next_multiple_of(MIB);
        let least = self.contents + self.contents / 10 + 64 * MIB;
        if whole < least {
            return Err(format!(
                "a disk of {} bytes is too small: what is installed needs {least}",
                self.size
            ));
        }
        Ok(whole.min(wanted.max(USUAL_ROOT)))
    }

    /// Writes the disk into an empty file; `done` hears the bytes of contents so far.
    pub(super) fn write(
        &self,
        out: File,
        grub: &Grub,
        done: impl FnMut(u64),
    ) -> Result<(), String> {
        let root = self.root_size()?;
        let text = |e: std::io::Error| e.to_string();
        let mut disk = volume::Writer::new(out, self.size);
        let loader = Loader { boot: &grub.boot, core: &grub.core, efi: &grub.efi };
        gpt::write(&mut disk, self.size, root, self.identities, &loader).map_err(text)?;
        let options = ext4::Options {
            size: root,
            label: "root".into(),
            uuid: self.root,
            time: EPOCH,
            style: ext4::Style::Ext4,
            boot: None,
        };
        let archive = File::open(self.tree).map_err(text)?;
        let archive = BufReader::with_capacity(1 << 20, archive);
        let part = Part::new(&mut disk, gpt::ROOT_AT);
        ext4::write_tar(archive, part, &options, done).map_err(|e| e.to_string())?;
        let out = disk.finish().map_err(text)?;
        out.sync_all().map_err(text)
    }
}
