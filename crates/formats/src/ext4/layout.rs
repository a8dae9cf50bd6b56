//! Where everything is: groups, tables, bitmaps, the superblock and its copies. The tables of
//! sixteen groups lie together (`flex_bg`), so files lie in long runs behind them.

use std::io::{self, Seek, SeekFrom, Write};

use super::inode::Extent;
use super::{Options, Style};

pub(super) const BLOCK: u64 = 4096;
const BLOCKS_PER_GROUP: u64 = 8 * BLOCK;
pub(super) const INODE_SIZE: u64 = 256;
/// Bytes of file system per inode, as usual for general use.
const BYTES_PER_INODE: u64 = 16384;
/// Groups whose tables lie in the first of them.
const FLEX: u64 = 16;

pub(super) struct Layout {
    pub(super) blocks: u64,
    pub(super) groups: u64,
    pub(super) inodes_per_group: u64,
    pub(super) journal_blocks: u64,
    descriptor_blocks: u64,
    /// Groups whose tables lie in the first of them.
    flex: u64,
}

impl Layout {
    pub(super) fn new(size: u64, style: Style) -> Option<Self> {
        let flex = if style == Style::Ext4 { FLEX } else { 1 };
        if !size.is_multiple_of(BLOCK) || !((16 << 20)..=(16 << 40)).contains(&size) {
            return None;
        }
        let mut blocks = size / BLOCK;
        // A last group too small for a copy of the descriptors stays unused.
        if blocks % BLOCKS_PER_GROUP < 2048 && blocks > BLOCKS_PER_GROUP {
            blocks -= blocks % BLOCKS_PER_GROUP;
        }
        let groups = blocks.div_ceil(BLOCKS_PER_GROUP);
        let inodes_per_group =
            (size / BYTES_PER_INODE).div_ceil(groups).next_multiple_of(16).clamp(256, 8192);
        let descriptor_blocks = (groups * 32).div_ceil(BLOCK);
        let journal_blocks = (blocks / 64).clamp(1024, 16384);
        Some(Self { blocks, groups, inodes_per_group, journal_blocks, descriptor_blocks, flex })
    }

    pub(super) fn inodes(&self) -> u64 {
        self.groups * self.inodes_per_group
    }

    pub(super) fn inode_position(&self, number: u32) -> u64 {
        let index = u64::from(number) - 1;
        let within = index % self.inodes_per_group;
        self.inode_table(index / self.inodes_per_group) * BLOCK + within * INODE_SIZE
    }

    fn table_blocks(&self) -> u64 {
        self.inodes_per_group * INODE_SIZE / BLOCK
    }

    /// First block of the tables of the sixteen groups around `group`, and how many they are.
    fn flex(&self, group: u64) -> (u64, u64) {
        let first = group / self.flex * self.flex;
        let start = first * BLOCKS_PER_GROUP + self.copy_blocks(first);
        (start, self.flex.min(self.groups - first))
    }

    fn block_bitmap(&self, group: u64) -> u64 {
        self.flex(group).0 + group % self.flex
    }

    fn inode_bitmap(&self, group: u64) -> u64 {
        let (start, groups) = self.flex(group);
        start + groups + group % self.flex
    }

    fn inode_table(&self, group: u64) -> u64 {
        let (start, groups) = self.flex(group);
        start + 2 * groups + group % self.flex * self.table_blocks()
    }

    /// Blocks at the start of a group that hold no files.
    fn reserved(&self, group: u64) -> u64 {
        let tables = match group % self.flex {
            0 => self.flex(group).1 * (2 + self.table_blocks()),
            _ => 0,
        };
        self.copy_blocks(group) + tables
    }

    fn group_blocks(&self, group: u64) -> u64 {
        (self.blocks - group * BLOCKS_PER_GROUP).min(BLOCKS_PER_GROUP)
    }

    /// Blocks at the start of a group that hold a copy of the superblock and descriptors.
    fn copy_blocks(&self, group: u64) -> u64 {
        if has_copy(group) { 1 + self.descriptor_blocks } else { 0 }
    }
}

/// `sparse_super`: groups 0, 1 and the powers of 3, 5 and 7.
fn has_copy(group: u64) -> bool {
    let power_of = |base: u64| {
        let mut n = base;
        while n < group {
            n *= base;
        }
        n == group
    };
    group <= 1 || power_of(3) || power_of(5) || power_of(7)
}

/// Hands out blocks in rising order, around the copies of the superblock.
pub(super) struct Allocator<'a> {
    layout: &'a Layout,
    next: u64,
    /// Ranges taken, the tables first.
    used: Vec<(u64, u64)>,
}

impl<'a> Allocator<'a> {
    pub(super) fn new(layout: &'a Layout) -> Self {
        let reserved = (0..layout.groups).map(|g| (g * BLOCKS_PER_GROUP, layout.reserved(g)));
        let used = reserved.filter(|(_, n)| *n > 0).map(|(start, n)| (start, start + n)).collect();
        Self { layout, next: 0, used }
    }

    /// The next free run of at most `wanted` blocks.
    fn take(&mut self, wanted: u64) -> Option<Extent> {
        loop {
            let group = self.next / BLOCKS_PER_GROUP;
            let within = self.next % BLOCKS_PER_GROUP;
            if group >= self.layout.groups {
                return None;
            }
            let reserved = self.layout.reserved(group);
            if within < reserved {
                self.next += reserved - within;
                continue;
            }
            // A run ends before the next group that starts with something else.
            let next = (group + 1..self.layout.groups).find(|g| self.layout.reserved(*g) > 0);
            let end = next.map_or(self.layout.blocks, |g| g * BLOCKS_PER_GROUP);
            if self.next >= end {
                return None;
            }
            let length = wanted.min(end - self.next).min(32768);
            let start = self.next;
            self.next += length;
            self.used.push((start, start + length));
            return Some(Extent { start, length });
        }
    }

    /// `blocks` blocks in as few runs as possible.
    pub(super) fn extents(&mut self, mut blocks: u64) -> Option<Vec<Extent>> {
        let mut list = Vec::new();
        while blocks > 0 {
            let extent = self.take(blocks)?;
            blocks -= extent.length;
            list.push(extent);
        }
        Some(list)
    }

    /// One run of exactly `blocks` blocks; shorter runs on the way stay free.
    pub(super) fn run(&mut self, blocks: u64) -> Option<Extent> {
        loop {
            let extent = self.take(blocks)?;
            if extent.length == blocks {
                return Some(extent);
            }
            self.used.pop();
        }
    }

    pub(super) fn used(&self) -> u64 {
        self.used.iter().map(|(start, end)| end - start).sum()
    }

    /// One bitmap over all blocks.
    fn bitmap(&self) -> Vec<u8> {
        let mut bits = vec![0u8; (self.layout.groups * BLOCK) as usize];
        for (start, end) in &self.used {
            set_bits(&mut bits, *start, *end);
        }
        set_bits(&mut bits, self.layout.blocks, self.layout.groups * BLOCKS_PER_GROUP);
        bits
    }
}

fn set_bits(bits: &mut [u8], start: u64, end: u64) {
    for i in start..end {
        bits[(i / 8) as usize] |= 1 << (i % 8);
    }
}

fn count_ones(bits: &[u8]) -> u64 {
    bits.iter().map(|b| u64::from(b.count_ones())).sum()
}

/// Writes bitmaps, group descriptors and superblocks. `files` is the number of inodes behind the
/// eleven reserved ones; `directories` their inode numbers where they are directories.
pub(super) fn write_metadata(
    out: &mut (impl Write + Seek),
    layout: &Layout,
    allocator: &Allocator<'_>,
    options: &Options,
    files: usize,
    directories: &[u32],
) -> io::Result<()> {
    let blocks = allocator.bitmap();
    let used_inodes = files as u64 + 10;
    let mut descriptors = vec![0u8; (layout.descriptor_blocks * BLOCK) as usize];
    let mut free_blocks = 0;
    for group in 0..layout.groups {
        let map = &blocks[(group * BLOCK) as usize..((group + 1) * BLOCK) as usize];
        write_block(out, layout.block_bitmap(group), map)?;
        let padding = BLOCKS_PER_GROUP - layout.group_blocks(group);
        let group_free = layout.group_blocks(group) - (count_ones(map) - padding);
        free_blocks += group_free;
        let first = group * layout.inodes_per_group;
        let used_here = used_inodes.saturating_sub(first).min(layout.inodes_per_group);
        let mut inode_map = vec![0u8; BLOCK as usize];
        set_bits(&mut inode_map, 0, used_here);
        set_bits(&mut inode_map, layout.inodes_per_group, 8 * BLOCK);
        write_block(out, layout.inode_bitmap(group), &inode_map)?;
        let here = |n: &&u32| (u64::from(**n) - 1) / layout.inodes_per_group == group;
        let directories_here = directories.iter().filter(here).count() as u64;
        let at = (group * 32) as usize;
        let descriptor = &mut descriptors[at..at + 32];
        put(descriptor, 0, &(layout.block_bitmap(group) as u32).to_le_bytes());
        put(descriptor, 4, &(layout.inode_bitmap(group) as u32).to_le_bytes());
        put(descriptor, 8, &(layout.inode_table(group) as u32).to_le_bytes());
        put(descriptor, 12, &(group_free as u16).to_le_bytes());
        let free_inodes = layout.inodes_per_group - used_here;
        put(descriptor, 14, &(free_inodes as u16).to_le_bytes());
        put(descriptor, 16, &(directories_here as u16).to_le_bytes());
    }
    for group in (0..layout.groups).filter(|g| has_copy(*g)) {
        let free = (free_blocks, layout.inodes() - used_inodes);
        let superblock = superblock(layout, options, group, free);
        let start = group * BLOCKS_PER_GROUP;
        if group == 0 {
            let mut block = vec![0; 1024];
            block.extend_from_slice(&superblock);
            write_block(out, 0, &block)?;
        } else {
            write_block(out, start, &superblock)?;
        }
        write_block(out, start + 1, &descriptors)?;
    }
    // The file system is as long as it says, whatever was written last.
    out.seek(SeekFrom::Start(layout.blocks * BLOCK - 1))?;
    out.write_all(&[0])
}

fn write_block(out: &mut (impl Write + Seek), block: u64, bytes: &[u8]) -> io::Result<()> {
    out.seek(SeekFrom::Start(block * BLOCK))?;
    out.write_all(bytes)
}

pub(super) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn superblock(layout: &Layout, options: &Options, group: u64, free: (u64, u64)) -> Vec<u8> {
    const COMPAT: u32 = 0x4 | 0x8; // has_journal, ext_attr
    let (incompat, ro_compat): (u32, u32) = match options.style {
        // filetype, extents, flex_bg; sparse_super, large_file, huge_file, dir_nlink, extra_isize
        Style::Ext4 => (0x2 | 0x40 | 0x200, 0x1 | 0x2 | 0x8 | 0x20 | 0x40),
        // filetype; sparse_super, large_file
        Style::Ext3 => (0x2, 0x1 | 0x2),
    };
    let mut s = vec![0u8; 1024];
    let mut u32_at = |at: usize, value: u64| put(&mut s, at, &(value as u32).to_le_bytes());
    u32_at(0, layout.inodes());
    u32_at(4, layout.blocks);
    u32_at(8, layout.blocks / 20);
    u32_at(12, free.0);
    u32_at(16, free.1);
    u32_at(20, 0);
    u32_at(24, 2);
    u32_at(28, 2);
    u32_at(32, BLOCKS_PER_GROUP);
    u32_at(36, BLOCKS_PER_GROUP);
    u32_at(40, layout.inodes_per_group);
    u32_at(48, u64::from(options.time));
    u32_at(64, u64::from(options.time));
    u32_at(72, 0);
    u32_at(76, 1);
    u32_at(84, 11);
    u32_at(92, u64::from(COMPAT));
    u32_at(96, u64::from(incompat));
    u32_at(100, u64::from(ro_compat));
    u32_at(224, u64::from(super::inode::JOURNAL));
    u32_at(264, u64::from(options.time));
    u32_at(352, 1); // flags: signed directory hash
    let mut u16_at = |at: usize, value: u64| put(&mut s, at, &(value as u16).to_le_bytes());
    u16_at(54, 0xffff);
    u16_at(56, 0xef53);
    u16_at(58, 1);
    u16_at(60, 1);
    u16_at(88, INODE_SIZE);
    u16_at(90, group);
    u16_at(348, 32);
    u16_at(350, 32);
    s[252] = 1; // half MD4
    s[372] = layout.flex.ilog2() as u8;
    put(&mut s, 104, &options.uuid);
    put(&mut s, 236, &options.uuid);
    let label = &options.label.as_bytes()[..options.label.len().min(16)];
    put(&mut s, 120, label);
    s
}

/// The first block of an empty journal; its numbers are big-endian.
pub(super) fn journal_superblock(layout: &Layout, options: &Options) -> Vec<u8> {
    let mut s = vec![0u8; 1024];
    let mut u32_at = |at: usize, value: u64| put(&mut s, at, &(value as u32).to_be_bytes());
    u32_at(0, 0xc03b_3998);
    u32_at(4, 4);
    u32_at(12, BLOCK);
    u32_at(16, layout.journal_blocks);
    u32_at(20, 1);
    u32_at(24, 1);
    u32_at(64, 1);
    put(&mut s, 48, &options.uuid);
    s
}
