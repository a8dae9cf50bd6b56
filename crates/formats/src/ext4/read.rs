//! Reads ext2, ext3 and ext4 file systems as trees. Every number comes from foreign bytes: all are
//! checked, loops end, and what is not understood is refused rather than guessed.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read, Seek, SeekFrom};

use super::inode::{ROOT, XATTR_PREFIXES};
use super::{Error, Style};
use crate::tree::{Kind, Node, Tree};

/// Names that a file system may hold before it is refused.
const MAX_NAMES: usize = 4 << 20;
/// Runs of blocks that one file may have.
const MAX_RUNS: usize = 1 << 20;
/// Bytes, holes included.
const MAX_FILE: u64 = 64 << 40;
/// Directories below each other.
const MAX_DEPTH: usize = 512;

/// Where a piece of a file is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where in the file system; a hole where absent.
    pub at: Option<u64>,
    pub length: u64,
}

/// What a file system says of itself, and what it holds.
#[derive(Debug)]
pub struct Contents {
    pub size: u64,
    pub label: String,
    pub uuid: [u8; 16],
    pub style: Style,
    pub tree: Tree<Vec<Piece>>,
}

/// Reads a whole file system but for what the files contain.
pub fn read(input: impl Read + Seek) -> Result<Contents, Error> {
    let mut reader = Reader::open(input)?;
    let mut tree = Tree::new(0);
    let mut known: HashMap<u32, String> = HashMap::new();
    let mut directories = HashSet::from([ROOT]);
    let mut queue = vec![(String::new(), ROOT)];
    let root = reader.inode(ROOT)?;
    tree.lay(reader.node("", &root)?)?;
    let mut names = 0;
    while let Some((path, number)) = queue.pop() {
        if path.split('/').count() > MAX_DEPTH {
            return damaged(&path, "directories lie too deep");
        }
        let inode = reader.inode(number)?;
        for (name, number) in reader.directory(&path, &inode)? {
            names += 1;
            if names > MAX_NAMES {
                return damaged(&path, "it has too many names");
            }
            let full = if path.is_empty() { name } else { format!("{path}/{name}") };
            if let Some(first) = known.get(&number) {
                tree.link(&full, first)?;
                continue;
            }
            let inode = reader.inode(number)?;
            let node = reader.node(&full, &inode)?;
            if node.is_directory() {
                if !directories.insert(number) {
                    return damaged(&full, "a directory with two names");
                }
                queue.push((full.clone(), number));
            } else {
                known.insert(number, full.clone());
            }
            tree.insert(node)?;
        }
    }
    let Reader { size, label, uuid, style, .. } = reader;
    Ok(Contents { size, label, uuid, style, tree })
}

fn damaged<T>(path: &str, what: &str) -> Result<T, Error> {
    let path = if path.is_empty() { "the file system" } else { path };
    Err(Error::entry(path, format!("damaged: {what}")))
}

struct Inode {
    bytes: Vec<u8>,
    number: u32,
}

impl Inode {
    fn u16(&self, at: usize) -> u16 {
        u16_at(&self.bytes, at)
    }

    fn u32(&self, at: usize) -> u32 {
        u32_at(&self.bytes, at)
    }

    fn mode(&self) -> u16 {
        self.u16(0)
    }

    fn size(&self) -> u64 {
        u64::from(self.u32(4)) | u64::from(self.u32(108)) << 32
    }

    fn has_extents(&self) -> bool {
        self.u32(32) & 0x8_0000 != 0
    }
}

struct Reader<R> {
    input: R,
    block: u64,
    blocks: u64,
    inodes: u32,
    inodes_per_group: u32,
    inode_size: u64,
    /// First block of each group's inode table.
    tables: Vec<u64>,
    size: u64,
    label: String,
    uuid: [u8; 16],
    style: Style,
}

const JOURNAL_TO_REPLAY: u32 = 0x4;
/// filetype, extents, 64bit, flex_bg, checksum seed, large directories.
const UNDERSTOOD: u32 = 0x2 | 0x40 | 0x80 | 0x200 | 0x2000 | 0x4000;

impl<R: Read + Seek> Reader<R> {
    fn open(mut input: R) -> Result<Self, Error> {
        let mut s = [0; 1024];
        input.seek(SeekFrom::Start(1024))?;
        input.read_exact(&mut s)?;
        let (long, short) = (|at| u32_at(&s, at), |at| u16_at(&s, at));
        if short(56) != 0xef53 {
            return Err(Error::entry("the file system", "it is neither ext2, ext3 nor ext4"));
        }
        let incompatible = long(96);
        if incompatible & JOURNAL_TO_REPLAY != 0 {
            let what = "it was not unmounted; `e2fsck -p` replays its journal";
            return Err(Error::entry("the file system", what));
        }
        if incompatible & !UNDERSTOOD != 0 {
            let what = format!("it has features that are not known here ({incompatible:#x})");
            return Err(Error::entry("the file system", what));
        }
        let (log, per_group, inodes) = (long(24), long(40), long(0));
        let wide = incompatible & 0x80 != 0 && short(254) >= 64;
        let descriptor = if wide { u64::from(short(254)) } else { 32 };
        let inode_size = if long(76) == 0 { 128 } else { u64::from(short(88)) };
        let blocks = u64::from(long(4)) | if wide { u64::from(long(336)) << 32 } else { 0 };
        let blocks_per_group = u64::from(long(32));
        let odd = log > 6
            || per_group == 0
            || blocks_per_group == 0
            || !(128..=4096).contains(&inode_size)
            || !(32..=1024).contains(&descriptor)
            || blocks == 0;
        if odd {
            return damaged("", "impossible numbers in its superblock");
        }
        let block = 1024_u64 << log;
        let size = blocks.checked_mul(block).filter(|n| *n <= 16 << 40);
        let Some(size) = size else { return damaged("", "an impossible size") };
        let groups = blocks.div_ceil(blocks_per_group);
        if groups > 1 << 20 || groups * u64::from(per_group) < u64::from(inodes) {
            return damaged("", "an impossible number of groups");
        }
        let first = u64::from(long(20)) + 1;
        let mut descriptors = vec![0; (groups * descriptor) as usize];
        input.seek(SeekFrom::Start(first * block))?;
        input.read_exact(&mut descriptors)?;
        let tables = descriptors.chunks(descriptor as usize).map(|d| {
            u64::from(u32_at(d, 8)) | if wide { u64::from(u32_at(d, 40)) << 32 } else { 0 }
        });
        let label = s[120..136].split(|b| *b == 0).next().unwrap_or_default();
        let (label, mut uuid) = (String::from_utf8_lossy(label).into_owned(), [0; 16]);
        uuid.copy_from_slice(&s[104..120]);
        Ok(Self {
            tables: tables.collect(),
            input,
            block,
            blocks,
            inodes,
            inodes_per_group: per_group,
            inode_size,
            size,
            label,
            uuid,
            style: if incompatible & 0x40 != 0 { Style::Ext4 } else { Style::Ext3 },
        })
    }

    fn at(&mut self, position: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.input.seek(SeekFrom::Start(position))?;
        self.input.read_exact(bytes)?;
        Ok(())
    }

    fn read_block(&mut self, number: u64) -> Result<Vec<u8>, Error> {
        if number == 0 || number >= self.blocks {
            return damaged("", "a block that does not exist");
        }
        let mut bytes = vec![0; self.block as usize];
        self.at(number * self.block, &mut bytes)?;
        Ok(bytes)
    }

    fn inode(&mut self, number: u32) -> Result<Inode, Error> {
        if number == 0 || number > self.inodes {
            return damaged("", &format!("there is no inode {number}"));
        }
        let (group, within) =
            ((number - 1) / self.inodes_per_group, (number - 1) % self.inodes_per_group);
        let table = self.tables.get(group as usize).copied().unwrap_or(0);
        if table == 0 || table >= self.blocks {
            return damaged("", "a table that does not exist");
        }
        let mut bytes = vec![0; self.inode_size as usize];
        self.at(table * self.block + u64::from(within) * self.inode_size, &mut bytes)?;
        Ok(Inode { bytes, number })
    }

    fn node(&mut self, path: &str, inode: &Inode) -> Result<Node<Vec<Piece>>, Error> {
        let size = inode.size();
        let kind = match inode.mode() & 0o170_000 {
            0o040_000 => Kind::Directory,
            0o100_000 => Kind::File { size, contents: self.pieces(path, inode)? },
            0o120_000 => Kind::Symlink(self.target(path, inode)?),
            kind @ (0o020_000 | 0o060_000) => {
                let (old, new) = (inode.u32(40), inode.u32(44));
                let (major, minor) = match old {
                    0 => ((new >> 8) & 0xfff, (new & 0xff) | ((new >> 12) & 0xfff00)),
                    old => ((old >> 8) & 0xff, old & 0xff),
                };
                Kind::Device { character: kind == 0o020_000, major, minor }
            }
            0o010_000 => Kind::Fifo,
            // A socket that somebody left behind is of no use to anybody.
            0o140_000 => Kind::Fifo,
            _ => return damaged(path, &format!("inode {} is of no kind", inode.number)),
        };
        Ok(Node {
            path: path.to_owned(),
            kind,
            mode: inode.mode() & 0o7777,
            uid: u32::from(inode.u16(2)) | u32::from(inode.u16(120)) << 16,
            gid: u32::from(inode.u16(24)) | u32::from(inode.u16(122)) << 16,
            time: inode.u32(16),
            xattrs: self.xattrs(path, inode)?,
        })
    }

    fn target(&mut self, path: &str, inode: &Inode) -> Result<Vec<u8>, Error> {
        let size = inode.size();
        if size == 0 || size > 4095 {
            return damaged(path, "a link of an impossible length");
        }
        let mut target = match size < 60 && !inode.has_extents() {
            true => inode.bytes[40..100].to_vec(),
            false => {
                let pieces = self.pieces(path, inode)?;
                let Some(Piece { at: Some(at), length }) = pieces.first().copied() else {
                    return damaged(path, "a link without a target");
                };
                let mut bytes = vec![0; length.min(size) as usize];
                self.at(at, &mut bytes)?;
                bytes
            }
        };
        if target.len() < size as usize {
            return damaged(path, "a link in pieces");
        }
        target.truncate(size as usize);
        Ok(target)
    }

    fn directory(&mut self, path: &str, inode: &Inode) -> Result<Vec<(String, u32)>, Error> {
        let mut list = Vec::new();
        for piece in self.pieces(path, inode)? {
            let Some(at) = piece.at else { continue };
            for start in (at..at + piece.length).step_by(self.block as usize) {
                let mut block = vec![0; self.block as usize];
                self.at(start, &mut block)?;
                entries(path, &block, &mut list)?;
            }
        }
        Ok(list)
    }

    /// Where a file's bytes are, up to its size.
    fn pieces(&mut self, path: &str, inode: &Inode) -> Result<Vec<Piece>, Error> {
        let (size, block) = (inode.size(), self.block);
        if size > MAX_FILE {
            return damaged(path, "it is larger than can be");
        }
        let blocks = size.div_ceil(block);
        if inode.u32(32) & 0x1000_0000 != 0 {
            return damaged(path, "contents inside the inode are not known here");
        }
        let mut runs = Vec::new();
        match inode.has_extents() {
            true => {
                let root = inode.bytes[40..100].to_vec();
                self.extents(path, &root, None, &mut runs)?;
            }
            false => self.map(path, inode, blocks, &mut runs)?,
        }
        // Runs as (first block of the file, how many, where or a hole); sorted, none overlapping.
        let mut pieces = Vec::new();
        let mut next = 0;
        for (first, count, start) in runs {
            if first >= blocks {
                break;
            }
            if first < next || start.is_some_and(|s| s == 0 || s + count > self.blocks) {
                return damaged(path, "its blocks are in disorder");
            }
            if first > next {
                pieces.push(Piece { at: None, length: (first - next) * block });
            }
            let count = count.min(blocks - first);
            pieces.push(Piece { at: start.map(|s| s * block), length: count * block });
            next = first + count;
        }
        if next < blocks {
            pieces.push(Piece { at: None, length: (blocks - next) * block });
        }
        if let Some(last) = pieces.last_mut() {
            last.length -= blocks * block - size;
        }
        Ok(pieces)
    }

    fn extents(
        &mut self,
        path: &str,
        node: &[u8],
        above: Option<u16>,
        runs: &mut Vec<(u64, u64, Option<u64>)>,
    ) -> Result<(), Error> {
        let (magic, entries, depth) = (u16_at(node, 0), u16_at(node, 2), u16_at(node, 6));
        let expected = above.map(|depth| depth - 1);
        if magic != 0xf30a || depth > 5 || expected.is_some_and(|e| e != depth) {
            return damaged(path, "its tree of extents");
        }
        let entries = usize::from(entries);
        if 12 + entries * 12 > node.len() {
            return damaged(path, "its tree of extents");
        }
        for entry in node[12..12 + entries * 12].chunks(12) {
            let first = u64::from(u32_at(entry, 0));
            if depth > 0 {
                let below = u64::from(u32_at(entry, 4)) | u64::from(u16_at(entry, 8)) << 32;
                let below = self.read_block(below)?;
                self.extents(path, &below, Some(depth), runs)?;
                continue;
            }
            let start = u64::from(u32_at(entry, 8)) | u64::from(u16_at(entry, 6)) << 32;
            // Lengths above 32768 mean space that was set aside and reads as zeroes.
            let (count, start) = match u16_at(entry, 4) {
                n @ ..=32768 => (u64::from(n), Some(start)),
                n => (u64::from(n) - 32768, None),
            };
            runs.push((first, count, start));
            if runs.len() > MAX_RUNS {
                return damaged(path, "it is in too many pieces");
            }
        }
        Ok(())
    }

    /// The block maps of ext2 and ext3.
    fn map(
        &mut self,
        path: &str,
        inode: &Inode,
        blocks: u64,
        runs: &mut Vec<(u64, u64, Option<u64>)>,
    ) -> Result<(), Error> {
        let per = self.block / 4;
        let mut next = 0;
        for slot in 0..15 {
            let depth = (slot as u32).saturating_sub(11);
            let number = inode.u32(40 + 4 * slot);
            self.mapped(path, u64::from(number), depth, (&mut next, blocks), runs)?;
            if next >= blocks {
                return Ok(());
            }
            debug_assert!(per > 0, "blocks hold numbers");
        }
        damaged(path, "it is larger than can be")
    }

    fn mapped(
        &mut self,
        path: &str,
        number: u64,
        depth: u32,
        (next, blocks): (&mut u64, u64),
        runs: &mut Vec<(u64, u64, Option<u64>)>,
    ) -> Result<(), Error> {
        let covers = (self.block / 4).pow(depth);
        if *next >= blocks {
            return Ok(());
        }
        if number == 0 {
            *next += covers;
            return Ok(());
        }
        if depth == 0 {
            match runs.last_mut() {
                Some((first, count, Some(start)))
                    if *first + *count == *next && *start + *count == number =>
                {
                    *count += 1;
                }
                _ => runs.push((*next, 1, Some(number))),
            }
            *next += 1;
            if runs.len() > MAX_RUNS {
                return damaged(path, "it is in too many pieces");
            }
            return Ok(());
        }
        let block = self.read_block(number)?;
        for number in block.chunks(4).map(|n| u64::from(u32_at(n, 0))) {
            self.mapped(path, number, depth - 1, (&mut *next, blocks), runs)?;
        }
        Ok(())
    }

    /// Attributes behind the inode's fields, and those in a block of their own.
    fn xattrs(&mut self, path: &str, inode: &Inode) -> Result<Vec<(String, Vec<u8>)>, Error> {
        let mut list = Vec::new();
        if self.inode_size > 160 {
            let area = 128 + usize::from(inode.u16(128));
            if let Some(area) = inode.bytes.get(area..)
                && area.len() > 4
                && u32_at(area, 0) == 0xea02_0000
            {
                attributes(path, &area[4..], &area[4..], &mut list)?;
            }
        }
        let block = u64::from(inode.u32(104)) | u64::from(inode.u16(118)) << 32;
        if block != 0 {
            let bytes = self.read_block(block)?;
            if u32_at(&bytes, 0) == 0xea02_0000 {
                attributes(path, &bytes[32..], &bytes, &mut list)?;
            }
        }
        Ok(list)
    }
}

/// One block of a directory.
fn entries(path: &str, block: &[u8], list: &mut Vec<(String, u32)>) -> Result<(), Error> {
    let mut at = 0;
    while at + 8 <= block.len() {
        let (inode, length) = (u32_at(block, at), usize::from(u16_at(block, at + 4)));
        let name_length = usize::from(block[at + 6]);
        // A block of 64 KiB says its whole length as zero.
        let length = if length == 0 && block.len() == 65536 { 65536 } else { length };
        if length < 8 || length % 4 != 0 || at + length > block.len() || 8 + name_length > length {
            return damaged(path, "an entry of an impossible length");
        }
        let name = &block[at + 8..at + 8 + name_length];
        at += length;
        if inode == 0 || name == b"." || name == b".." {
            continue;
        }
        let text = std::str::from_utf8(name).ok().filter(|n| !n.is_empty());
        let Some(text) = text.filter(|n| !n.contains(['/', '\0'])) else {
            return damaged(path, "a name that is none");
        };
        list.push((text.to_owned(), inode));
    }
    Ok(())
}

/// A list of attributes; values lie at offsets into `values`.
fn attributes(
    path: &str,
    mut entries: &[u8],
    values: &[u8],
    list: &mut Vec<(String, Vec<u8>)>,
) -> Result<(), Error> {
    while entries.len() >= 16 && entries[..4] != [0; 4] {
        let (name_length, index) = (usize::from(entries[0]), entries[1]);
        let (at, size) = (usize::from(u16_at(entries, 2)), u32_at(entries, 8) as usize);
        let name = entries.get(16..16 + name_length);
        let value = values.get(at..).and_then(|rest| rest.get(..size));
        let (Some(name), Some(value)) = (name, value) else {
            return damaged(path, "an attribute that lies outside");
        };
        // Access control lists have another form on disk; the permission bits stand in for them.
        if let Some((prefix, _)) = XATTR_PREFIXES.iter().find(|(_, n)| *n == index) {
            list.push((format!("{prefix}{}", String::from_utf8_lossy(name)), value.to_vec()));
        }
        let step = (16 + name_length).next_multiple_of(4);
        entries = entries.get(step..).unwrap_or_default();
    }
    Ok(())
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("2 bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

/// A file's bytes, read through its pieces.
pub struct Stream<'a, R> {
    input: &'a mut R,
    pieces: std::slice::Iter<'a, Piece>,
    /// What is left of the piece under way.
    at: Option<u64>,
    left: u64,
}

impl<'a, R: Read + Seek> Stream<'a, R> {
    pub fn new(input: &'a mut R, pieces: &'a [Piece]) -> Self {
        Self { input, pieces: pieces.iter(), at: None, left: 0 }
    }
}

impl<R: Read + Seek> Read for Stream<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.left == 0 {
            let Some(piece) = self.pieces.next() else { return Ok(0) };
            (self.at, self.left) = (piece.at, piece.length);
        }
        let length = self.left.min(buffer.len() as u64) as usize;
        let buffer = &mut buffer[..length];
        match &mut self.at {
            Some(at) => {
                self.input.seek(SeekFrom::Start(*at))?;
                self.input.read_exact(buffer)?;
                *at += length as u64;
            }
            None => buffer.fill(0),
        }
        self.left -= length as u64;
        Ok(length)
    }
}
