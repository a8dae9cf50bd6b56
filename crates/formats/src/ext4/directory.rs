//! Directories as blocks of entries.

use super::layout::BLOCK;
use crate::tree::{Kind, Tree};

/// The type byte of a directory entry.
fn entry_type<C>(kind: &Kind<C>) -> u8 {
    match kind {
        Kind::File { .. } => 1,
        Kind::Directory => 2,
        Kind::Device { character: true, .. } => 3,
        Kind::Device { character: false, .. } => 4,
        Kind::Fifo => 5,
        Kind::Symlink(_) => 7,
    }
}

/// The entries of a directory, in whole blocks. `number` gives a node's inode.
pub(super) fn blocks<C>(tree: &Tree<C>, path: &str, number: impl Fn(usize) -> u32) -> Vec<u8> {
    let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
    let own = |path: &str| number(tree.index_of(path).unwrap_or(0));
    let mut entries = vec![(own(path), 2u8, "."), (own(parent), 2, "..")];
    for (name, index) in tree.children(path) {
        entries.push((number(index), entry_type(&tree.nodes()[index].kind), name));
    }
    // lost+found keeps room for what a repair puts there.
    let least = if path == "lost+found" { 4 } else { 1 };
    pack(&entries, least)
}

/// Two for the directory itself and one for each below; above what fits, `dir_nlink` says 1.
pub(super) fn links<C>(tree: &Tree<C>, path: &str) -> u16 {
    let below = tree.children(path).filter(|(_, index)| tree.nodes()[*index].is_directory());
    match below.count() {
        many if many > 64_998 => 1,
        few => few as u16 + 2,
    }
}

fn pack(entries: &[(u32, u8, &str)], least: usize) -> Vec<u8> {
    let block = BLOCK as usize;
    let mut bytes: Vec<u8> = Vec::new();
    let mut last = 0;
    for (inode, kind, name) in entries {
        let length = 8 + name.len().next_multiple_of(4);
        if bytes.len() / block != (bytes.len() + length - 1) / block {
            let end = bytes.len().next_multiple_of(block);
            stretch(&mut bytes, last, end);
        }
        last = bytes.len();
        bytes.extend_from_slice(&inode.to_le_bytes());
        bytes.extend_from_slice(&(length as u16).to_le_bytes());
        bytes.extend_from_slice(&[name.len() as u8, *kind]);
        bytes.extend_from_slice(name.as_bytes());
        bytes.resize(last + length, 0);
    }
    let end = bytes.len().next_multiple_of(block);
    stretch(&mut bytes, last, end);
    while bytes.len() < least * block {
        let empty = bytes.len();
        bytes.resize(empty + 8, 0);
        stretch(&mut bytes, empty, empty + block);
    }
    bytes
}

/// The last entry of a block reaches to the block's end.
fn stretch(bytes: &mut Vec<u8>, last: usize, end: usize) {
    bytes.resize(end, 0);
    bytes[last + 4..last + 6].copy_from_slice(&((end - last) as u16).to_le_bytes());
}
