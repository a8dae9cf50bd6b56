//! The tree as an ext4 disk, for hypervisors that know nothing else: every block is fetched once, and
//! what was put into the layer is in it. Written without a mount, in the process that reads flists.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use lodge_formats::ext4::{self, Options, Style};
use lodge_formats::flist::Kind;
use lodge_formats::tree::{Kind as NodeKind, Node, Tree as Names};

use super::layer::Attr;
use super::tree::{ROOT, Tree, decode_device};

/// Room for what the guest will write.
const ROOM: u64 = 2 << 30;
const NAMES: usize = 256;

/// One file's bytes, one after the other.
struct Contents<'a> {
    tree: &'a Tree,
    ino: u64,
    at: u64,
}

impl Read for Contents<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.tree.read(self.ino, self.at, buffer.len())?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }
}

pub(super) fn write(tree: &Tree, to: &Path) -> Result<(), String> {
    let names = names(tree)?;
    let (mut bytes, mut count) = (0, 0);
    for (_, index) in names.walk() {
        bytes += names.nodes()[index].size().next_multiple_of(4096) + 512;
        count += 1;
    }
    let size = (bytes + bytes / 4 + count * 16_384 / 8 + ROOM) / 4096 * 4096;
    let text = |e: &dyn std::fmt::Display| match super::server::last_complaint() {
        why if !why.is_empty() => why,
        _ => format!("{}: {e}", to.display()),
    };
    let _ = std::fs::remove_file(to);
    let file = File::create_new(to).map_err(|e| text(&e))?;
    file.set_len(size).map_err(|e| text(&e))?;
    let options = Options {
        size,
        label: "root".into(),
        uuid: [0; 16],
        time: 0,
        style: Style::Ext4,
        boot: None,
    };
    let open = |_, ino: &u64| Ok(Contents { tree, ino: *ino, at: 0 });
    ext4::write_tree(&names, &file, &options, open).map_err(|e| text(&e))?;
    Ok(())
}

/// Every name, with the inode behind it as a file's contents.
fn names(tree: &Tree) -> Result<Names<u64>, String> {
    let text = |e: io::Error| e.to_string();
    let mut names = Names::new(0);
    let mut queue = vec![(ROOT, String::new())];
    while let Some((dir, path)) = queue.pop() {
        put(&mut names, &path, &tree.attr(dir).map_err(text)?, dir)?;
        let mut from = 0;
        loop {
            let listed = tree.list(&tree.layer(), dir, from, NAMES);
            let Some(last) = listed.last() else { break };
            from = last.next;
            for entry in &listed {
                let name = std::str::from_utf8(&entry.name)
                    .map_err(|_| format!("{path}: a name that is not UTF-8"))?;
                let full = if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") };
                let attr = tree.attr(entry.ino).map_err(text)?;
                match attr.is(libc::S_IFDIR) {
                    true => queue.push((entry.ino, full)),
                    false => put(&mut names, &full, &attr, entry.ino)?,
                }
            }
        }
    }
    Ok(names)
}

fn put(names: &mut Names<u64>, path: &str, attr: &Attr, ino: u64) -> Result<(), String> {
    let (major, minor) = decode_device(attr.rdev);
    let kind = match Kind::of_mode(attr.mode) {
        Some(Kind::Directory) => NodeKind::Directory,
        Some(Kind::File) => NodeKind::File { size: attr.size, contents: ino },
        Some(Kind::Symlink) => NodeKind::Symlink(attr.target.clone()),
        Some(Kind::CharDevice) => NodeKind::Device { character: true, major, minor },
        Some(Kind::BlockDevice) => NodeKind::Device { character: false, major, minor },
        Some(Kind::Fifo) => NodeKind::Fifo,
        // A socket is nothing without whoever listens on it.
        Some(Kind::Socket) | None => return Ok(()),
    };
    let node = Node::new(path, kind, (attr.mode & 0o7777) as u16, attr.mtime.0.max(0) as u32);
    let node = Node { uid: attr.uid, gid: attr.gid, ..node };
    names.insert(node).map(drop).map_err(|e| e.to_string())
}
