//! Inodes and their extent trees as bytes.

use super::Error;
use super::layout::{BLOCK, INODE_SIZE, put};
use crate::tree::{Kind, Node};

pub(super) const ROOT: u32 = 2;
pub(super) const JOURNAL: u32 = 8;
pub(super) const FIRST_FREE: u32 = 11;

/// Names of attributes begin so, and are stored with the number instead.
pub(super) const XATTR_PREFIXES: [(&str, u8); 3] =
    [("user.", 1), ("trusted.", 4), ("security.", 6)];

/// A run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) start: u64,
    pub(super) length: u64,
}

const EXTENTS_IN_INODE: usize = 4;
const EXTENTS_IN_BLOCK: usize = (BLOCK as usize - 12) / 12;

/// How many blocks the extent tree needs besides the inode.
pub(super) fn extent_leaves(extents: &[Extent]) -> usize {
    match extents.len() {
        0..=EXTENTS_IN_INODE => 0,
        n => n.div_ceil(EXTENTS_IN_BLOCK),
    }
}

/// How many blocks a block map needs besides the inode.
pub(super) fn map_blocks(data: u64) -> u64 {
    let mut left = data.saturating_sub(DIRECT);
    let mut blocks = 0;
    for depth in 1..=3 {
        let now = left.min(NUMBERS.pow(depth));
        let mut level = now;
        for _ in 0..depth {
            level = level.div_ceil(NUMBERS);
            blocks += level;
        }
        left -= now;
    }
    blocks
}

const DIRECT: u64 = 12;
/// Block numbers in a block.
const NUMBERS: u64 = BLOCK / 4;

pub(super) struct Inode {
    bytes: Vec<u8>,
    xattrs: Vec<(String, Vec<u8>)>,
    blocks: u64,
}

impl Inode {
    pub(super) fn of<C>(node: &Node<C>, size: u64, links: u16) -> Self {
        let mut b = vec![0u8; INODE_SIZE as usize];
        let mode = mode_bits(&node.kind) | (node.mode & 0o7777);
        put(&mut b, 0, &mode.to_le_bytes());
        put(&mut b, 2, &(node.uid as u16).to_le_bytes());
        put(&mut b, 4, &(size as u32).to_le_bytes());
        for at in [8, 12, 16, 144] {
            put(&mut b, at, &node.time.to_le_bytes());
        }
        put(&mut b, 24, &(node.gid as u16).to_le_bytes());
        put(&mut b, 26, &links.to_le_bytes());
        put(&mut b, 108, &((size >> 32) as u32).to_le_bytes());
        put(&mut b, 120, &((node.uid >> 16) as u16).to_le_bytes());
        put(&mut b, 122, &((node.gid >> 16) as u16).to_le_bytes());
        put(&mut b, 128, &32u16.to_le_bytes());
        match &node.kind {
            Kind::Symlink(target) if target.len() < 60 => put(&mut b, 40, target),
            Kind::Device { major, minor, .. } => {
                let new = (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12);
                put(&mut b, 44, &new.to_le_bytes());
            }
            Kind::Symlink(_) | Kind::File { .. } | Kind::Directory | Kind::Fifo => {}
        }
        Self { bytes: b, xattrs: node.xattrs.clone(), blocks: 0 }
    }

    /// Stores the extents; returns the leaf blocks to write, where the inode has no room.
    pub(super) fn set_extents(
        &mut self,
        extents: &[Extent],
        leaves: &[u64],
    ) -> Vec<(u64, Vec<u8>)> {
        const EXTENTS_FLAG: u32 = 0x8_0000;
        put(&mut self.bytes, 32, &EXTENTS_FLAG.to_le_bytes());
        let data: u64 = extents.iter().map(|e| e.length).sum();
        self.blocks = data + leaves.len() as u64;
        if leaves.is_empty() {
            let node = tree_node(extents, 0, EXTENTS_IN_INODE);
            put(&mut self.bytes, 40, &node);
            return Vec::new();
        }
        let mut root = header(leaves.len(), EXTENTS_IN_INODE, 1);
        let mut written = Vec::new();
        let mut logical = 0;
        for (chunk, block) in extents.chunks(EXTENTS_IN_BLOCK).zip(leaves) {
            root.extend_from_slice(&(logical as u32).to_le_bytes());
            root.extend_from_slice(&(*block as u32).to_le_bytes());
            root.extend_from_slice(&((block >> 32) as u32).to_le_bytes());
            written.push((*block, tree_node(chunk, logical, EXTENTS_IN_BLOCK)));
            logical += chunk.iter().map(|e| e.length).sum::<u64>();
        }
        put(&mut self.bytes, 40, &root);
        written
    }

    /// Stores the extents as ext2 and ext3 do: twelve numbers of blocks, then blocks of numbers.
    /// `meta` are as many blocks as `map_blocks` says. Returns the blocks to write.
    pub(super) fn set_map(&mut self, extents: &[Extent], meta: &[u64]) -> Vec<(u64, Vec<u8>)> {
        let data: Vec<u64> = extents.iter().flat_map(|e| e.start..e.start + e.length).collect();
        self.blocks = (data.len() + meta.len()) as u64;
        let (direct, mut rest) = data.split_at(data.len().min(DIRECT as usize));
        for (i, block) in direct.iter().enumerate() {
            put(&mut self.bytes, 40 + 4 * i, &(*block as u32).to_le_bytes());
        }
        let (mut meta, mut written) = (meta.iter().copied(), Vec::new());
        for depth in 0..3 {
            let reach = NUMBERS.pow(depth + 1).min(rest.len() as u64) as usize;
            if reach == 0 {
                break;
            }
            let (now, later) = rest.split_at(reach);
            let top = indirect(depth, now, &mut meta, &mut written);
            put(&mut self.bytes, 40 + 4 * (12 + depth as usize), &(top as u32).to_le_bytes());
            rest = later;
        }
        written
    }

    pub(super) fn bytes(mut self, path: &str) -> Result<Vec<u8>, Error> {
        put(&mut self.bytes, 28, &((self.blocks * BLOCK / 512) as u32).to_le_bytes());
        if !self.xattrs.is_empty() {
            let area = pack_xattrs(&self.xattrs)
                .ok_or_else(|| Error::entry(path, "its extended attributes take too much room"))?;
            put(&mut self.bytes, 160, &area);
        }
        Ok(self.bytes)
    }
}

/// One block of numbers with all below it; returns where it is.
fn indirect(
    depth: u32,
    blocks: &[u64],
    meta: &mut impl Iterator<Item = u64>,
    written: &mut Vec<(u64, Vec<u8>)>,
) -> u64 {
    let own = meta.next().expect("as many as were counted");
    let numbers: Vec<u64> = match depth {
        0 => blocks.to_vec(),
        _ => {
            let below = blocks.chunks(NUMBERS.pow(depth) as usize);
            below.map(|part| indirect(depth - 1, part, meta, written)).collect()
        }
    };
    let mut bytes: Vec<u8> = numbers.iter().flat_map(|n| (*n as u32).to_le_bytes()).collect();
    bytes.resize(BLOCK as usize, 0);
    written.push((own, bytes));
    own
}

fn mode_bits<C>(kind: &Kind<C>) -> u16 {
    match kind {
        Kind::Directory => 0o040_000,
        Kind::File { .. } => 0o100_000,
        Kind::Symlink(_) => 0o120_000,
        Kind::Device { character: true, .. } => 0o020_000,
        Kind::Device { character: false, .. } => 0o060_000,
        Kind::Fifo => 0o010_000,
    }
}

fn header(entries: usize, max: usize, depth: u16) -> Vec<u8> {
    let mut bytes = 0xf30au16.to_le_bytes().to_vec();
    bytes.extend_from_slice(&(entries as u16).to_le_bytes());
    bytes.extend_from_slice(&(max as u16).to_le_bytes());
    bytes.extend_from_slice(&depth.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes
}

fn tree_node(extents: &[Extent], mut logical: u64, max: usize) -> Vec<u8> {
    let mut bytes = header(extents.len(), max, 0);
    for extent in extents {
        bytes.extend_from_slice(&(logical as u32).to_le_bytes());
        bytes.extend_from_slice(&(extent.length as u16).to_le_bytes());
        bytes.extend_from_slice(&((extent.start >> 32) as u16).to_le_bytes());
        bytes.extend_from_slice(&(extent.start as u32).to_le_bytes());
        logical += extent.length;
    }
    bytes
}

/// The area behind the inode's fields: entries grow up, values grow down. `None`: no room.
fn pack_xattrs(list: &[(String, Vec<u8>)]) -> Option<Vec<u8>> {
    const AREA: usize = INODE_SIZE as usize - 160;
    // Access control lists have another form on disk; the permission bits stand in for them.
    let known = |name: &str| {
        XATTR_PREFIXES
            .iter()
            .find_map(|(p, index)| Some((*index, name.strip_prefix(p)?.to_owned())))
    };
    let known = |(name, value): &(String, Vec<u8>)| Some((known(name)?, value.clone()));
    let mut sorted: Vec<((u8, String), Vec<u8>)> = list.iter().filter_map(known).collect();
    sorted.sort_by_key(|((index, name), _)| (*index, name.len(), name.clone()));
    let mut area = vec![0u8; AREA];
    put(&mut area, 0, &0xea02_0000u32.to_le_bytes());
    let (mut entry, mut value_end) = (4usize, AREA);
    for ((index, name), value) in &sorted {
        let value_at = value_end.checked_sub(value.len().next_multiple_of(4))?;
        let entry_end = entry + (16 + name.len()).next_multiple_of(4);
        // Four zero bytes end the entries.
        if entry_end + 4 > value_at || name.len() > 255 {
            return None;
        }
        area[entry] = name.len() as u8;
        area[entry + 1] = *index;
        // Offsets count from the first entry.
        put(&mut area, entry + 2, &((value_at - 4) as u16).to_le_bytes());
        put(&mut area, entry + 8, &(value.len() as u32).to_le_bytes());
        put(&mut area, entry + 16, name.as_bytes());
        put(&mut area, value_at, value);
        (entry, value_end) = (entry_end, value_at);
    }
    Some(area)
}
