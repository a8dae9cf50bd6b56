//! Images of cluster nodes: made from a base, extended with overlays. Each says of what it was made.

use std::fs;
use std::path::{Path, PathBuf};

use lodge_formats::ext4::{self, Summary};
use lodge_formats::tree::{Kind, Node, Tree};
use lodge_jail::script;
use sha2::{Digest, Sha256};

use super::archive::Layer;
use super::base::Base;
use super::content::Content;
use super::disk::{self, Lock, Make, Style, read};
use super::epoch;
use super::provenance::{self, Made};
use crate::backend::DiskFormat;
use crate::image::grub::{CONSOLES, WholeDisk};

/// What was made.
pub struct New {
    pub summary: Summary,
    /// Libraries in the image, as absolute paths.
    pub libraries: Vec<String>,
}

/// What lets an image boot by itself.
pub struct Boot<'a> {
    pub grub: &'a WholeDisk,
    /// A bzImage.
    pub kernel: &'a Path,
    pub cmdline: &'a str,
}

impl Boot<'_> {
    fn lay_into(&self, tree: &mut Tree<Content>) -> Result<(), String> {
        let Self { grub: WholeDisk { boot, core }, kernel, cmdline } = self;
        let menu = format!("{CONSOLES}linux /boot/bzImage {cmdline}\nboot\n");
        let size = fs::metadata(kernel).map_err(|e| format!("{}: {e}", kernel.display()))?.len();
        let files = [
            (disk::FIRST_SECTOR, Content::of(&boot[..]), boot.len() as u64),
            (ext4::CORE, Content::of(&core[..]), core.len() as u64),
            ("boot/grub/grub.cfg", Content::of(menu.as_bytes()), menu.len() as u64),
            ("boot/bzImage", Content::Path((*kernel).to_owned()), size),
        ];
        for folder in ["boot", "boot/grub"] {
            let node = Node::new(folder, Kind::Directory, 0o755, epoch());
            tree.lay(node).map_err(|e| e.to_string())?;
        }
        for (path, contents, size) in files {
            let node = Node::new(path, Kind::File { contents, size }, 0o644, epoch());
            tree.lay(node).map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}

/// Makes an image from a base, in the place of whatever is there. The identity in `make` is
/// replaced by one that follows from the contents.
pub fn make(
    path: &Path,
    base: &Base,
    boot: Option<&Boot<'_>>,
    mut make: Make,
) -> Result<New, String> {
    let mut tree = base.tree(epoch())?;
    if let Some(boot) = boot {
        boot.lay_into(&mut tree)?;
    }
    let (sha256, bytes, entries) = provenance::digest(&tree)?;
    let layers = [Made { name: "base".into(), sha256, bytes, entries }];
    make.uuid = provenance::put(&mut tree, &layers, epoch())?;
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    }
    let summary = Lock::take(path)?.write(&tree, &make)?;
    let paths = tree.walk().into_iter().map(|(path, _)| path);
    let libraries = paths.filter(|p| p.starts_with("lib") && p.contains(".so"));
    Ok(New { summary, libraries: libraries.map(|p| format!("/{p}")).collect() })
}

/// Writes a folder of the host as a disk; all belongs to root, and hidden files are files. Sized
/// for its contents where `size` is nothing.
pub fn folder(
    path: &Path,
    from: &Path,
    size: Option<u64>,
    format: DiskFormat,
) -> Result<Summary, String> {
    let mut tree = Tree::new(epoch());
    super::base::lay_folder(&mut tree, from, "", epoch())?;
    let mut hash = Sha256::new();
    let (mut bytes, mut names) = (0, 0);
    for (name, index) in tree.walk() {
        let node = &tree.nodes()[index];
        hash.update(format!("{name}\0{}\0", node.size()));
        bytes += node.size().next_multiple_of(4096) + 512;
        names += 1;
    }
    // Room for the tables, the journal, and something to add.
    let least = bytes + bytes / 4 + names * 16_384 / 8 + (160 << 20);
    let digest = hash.finalize();
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&digest[..16]);
    let make = Make {
        size: size.unwrap_or(least.max(names * 16_384 + (64 << 20))) / 4096 * 4096,
        format,
        style: Style::Ext4,
        label: String::new(),
        uuid,
    };
    Lock::take(path)?.write(&tree, &make)
}

/// Lays layers over an image, which stays as it is if anything goes wrong. The calling thread
/// reads foreign bytes for that: from then on it writes only beside the image and to `writable`.
pub fn extend(
    path: &Path,
    layers: &[Layer],
    mut writable: Vec<PathBuf>,
) -> Result<Summary, String> {
    let lock = Lock::take(path)?;
    writable.extend(lock.path.parent().map(Path::to_owned));
    script::write_only(&writable).map_err(|e| e.to_string())?;
    let mut found = read(&lock.path)?;
    let mut made = provenance::of(&found.tree);
    let modules = |tree: &Tree<Content>| -> Vec<String> {
        let paths = tree.walk().into_iter().map(|(path, _)| path);
        paths.filter(|p| p.starts_with("lib/modules/") && p.contains(".ko")).collect()
    };
    let before = modules(&found.tree);
    for layer in layers {
        layer.lay_into(&mut found.tree, epoch())?;
        made.push(Made::from(layer));
    }
    if modules(&found.tree) != before {
        // Guests find out by themselves what there is now.
        let dirs: Vec<String> = found.tree.children("lib/modules").map(|(n, _)| n.into()).collect();
        dirs.iter().for_each(|n| found.tree.forget(&format!("lib/modules/{n}/modules.dep")));
    }
    found.make.uuid = provenance::put(&mut found.tree, &made, epoch())?;
    lock.write(&found.tree, &found.make)
}

/// Of what an image says that it was made. Empty for those that do not say. The calling thread
/// writes to no file from then on.
pub fn layers(path: &Path) -> Result<Vec<Made>, String> {
    script::write_only(&[]).map_err(|e| e.to_string())?;
    read(path).map(|found| provenance::of(&found.tree))
}
