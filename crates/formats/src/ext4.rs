//! Writes and reads ext4 file systems: without mounting, without root, and the same bytes for the
//! same input. What is written has a journal, extents and large inodes (or, as ext3, block maps);
//! file contents are written once, one behind the other.

mod directory;
mod inode;
mod layout;
pub mod read;
mod sink;

use std::collections::HashMap;
use std::io::{self, Read, Seek, SeekFrom, Write};

use inode::{Extent, Inode};
use layout::{Allocator, BLOCK, Layout};
use sink::Sink;

use crate::grub;
use crate::tree::{self, Entry, Kind, Node, Tree};

/// Which of the family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Style {
    #[default]
    Ext4,
    /// Block maps, no extents: what older kernels mount.
    Ext3,
}

/// What cannot be derived from the contents.
#[derive(Clone, Debug)]
pub struct Options {
    /// Size of the file system in bytes; a whole number of 4096-byte blocks.
    pub size: u64,
    /// At most 16 bytes.
    pub label: String,
    pub uuid: [u8; 16],
    /// Seconds since 1970; the time of creation and of folders that the archive does not name.
    pub time: u32,
    pub style: Style,
    /// GRUB's first sector: the file system is a disk that boots, and `CORE` is in it.
    pub boot: Option<Vec<u8>>,
}

/// Where GRUB's core lies on a disk that boots, in one piece.
pub const CORE: &str = "boot/grub/core.img";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the contents do not fit into {0} bytes")]
    Full(u64),
    #[error("a file system of {0} bytes is not possible; 16 MiB to 16 TiB in 4096-byte blocks is")]
    Size(u64),
    #[error(transparent)]
    Entry(#[from] tree::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Error {
    fn entry(path: &str, what: impl Into<String>) -> Self {
        Error::Entry(tree::Error::new(path, what))
    }
}

/// How much a file system holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    pub files: usize,
    pub used_bytes: u64,
}

/// Writes the tar stream `archive` as a file system. `out` must read as zeroes where nothing is
/// written and be at least `options.size` long afterwards (a sparse file of that length).
/// `progress` is called with the bytes of file contents so far.
pub fn write_tar(
    archive: impl Read,
    out: impl Write + Seek,
    options: &Options,
    mut progress: impl FnMut(u64),
) -> Result<Summary, Error> {
    let layout = Layout::new(options.size, options.style).ok_or(Error::Size(options.size))?;
    let mut writer = Writer::new(out, &layout, options)?;
    let mut contents = 0;
    let mut archive = tar::Archive::new(archive);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let node = match tree::read_entry(&mut entry)? {
            Entry::Node(node) => node,
            Entry::Link { path, target } => {
                writer.tree.link(&path, &target)?;
                continue;
            }
        };
        let size = node.size();
        writer.add(node, &mut entry)?;
        contents += size;
        progress(contents);
    }
    writer.finish()
}

/// Writes a tree as a file system, in the order of its names; `out` as for `write_tar`. `open`
/// gives what a file of a size contains, at least as many bytes; it is called in the order of the
/// names, for files that are not empty.
pub fn write_tree<C, R: Read>(
    tree: &Tree<C>,
    out: impl Write + Seek,
    options: &Options,
    mut open: impl FnMut(u64, &C) -> io::Result<R>,
) -> Result<Summary, Error> {
    let layout = Layout::new(options.size, options.style).ok_or(Error::Size(options.size))?;
    let mut writer = Writer::new(out, &layout, options)?;
    let mut seen: HashMap<usize, String> = HashMap::new();
    for (path, index) in tree.walk() {
        if let Some(first) = seen.get(&index) {
            writer.tree.link(&path, first)?;
            continue;
        }
        let node = &tree.nodes()[index];
        if tree.names_of(index) > 1 {
            seen.insert(index, path.clone());
        }
        let named = Node { path, ..node.plain() };
        match &node.kind {
            Kind::File { contents, size } if *size > 0 => {
                writer.add(named, &mut open(*size, contents)?)?
            }
            _ => writer.add(named, &mut io::empty())?,
        }
    }
    writer.finish()
}

/// A file system under way: contents are there, names and numbers come last.
struct Writer<'a, W> {
    sink: Sink<W>,
    layout: &'a Layout,
    allocator: Allocator<'a>,
    options: &'a Options,
    tree: Tree<Vec<Extent>>,
    buffer: Vec<u8>,
    /// GRUB's first sector, once it is known where its core is.
    first_sector: Option<Vec<u8>>,
}

impl<'a, W: Write + Seek> Writer<'a, W> {
    fn new(out: W, layout: &'a Layout, options: &'a Options) -> Result<Self, Error> {
        let mut tree = Tree::new(options.time);
        tree.insert(Node::new("lost+found", Kind::Directory, 0o700, options.time))?;
        let buffer = vec![0u8; 256 * BLOCK as usize];
        let allocator = Allocator::new(layout);
        let sink = Sink::new(out);
        Ok(Self { sink, layout, allocator, options, tree, buffer, first_sector: None })
    }

    /// Takes a node with its contents.
    fn add(&mut self, node: Node<()>, input: &mut impl Read) -> Result<(), Error> {
        let extents = match &self.options.boot {
            Some(boot) if node.path == CORE => self.core(boot, node.size(), input)?,
            _ => self.contents(node.size(), input)?,
        };
        self.tree.insert(node.with(|()| extents))?;
        Ok(())
    }

    /// Takes GRUB's core, which is told where it lies, and so is the first sector.
    fn core(
        &mut self,
        boot: &[u8],
        size: u64,
        input: &mut impl Read,
    ) -> Result<Vec<Extent>, Error> {
        let mut core = Vec::new();
        input.take(size.min(grub::MAX_CORE as u64 + 1)).read_to_end(&mut core)?;
        let extents = self.allocate(size.div_ceil(BLOCK))?;
        let [extent] = extents.as_slice() else {
            return Err(Error::entry(CORE, "does not lie in one piece"));
        };
        let at = extent.start * (BLOCK / 512);
        self.first_sector = Some(grub::first_sector(boot, at)?);
        self.sink.put(extent.start * BLOCK, &grub::core(&core, at)?)?;
        Ok(extents)
    }

    /// Copies `size` bytes into newly allocated blocks; long runs of zeroes stay holes in `out`.
    fn contents(&mut self, size: u64, input: &mut impl Read) -> Result<Vec<Extent>, Error> {
        let extents = self.allocate(size.div_ceil(BLOCK))?;
        let mut left = size;
        for extent in &extents {
            let mut block = extent.start;
            let end = extent.start + extent.length;
            while block < end {
                let blocks = (end - block).min(256);
                let bytes = left.min(blocks * BLOCK) as usize;
                let buffer = &mut self.buffer[..bytes];
                input.read_exact(buffer)?;
                if buffer.iter().any(|b| *b != 0) {
                    self.sink.put(block * BLOCK, buffer)?;
                }
                left -= bytes as u64;
                block += blocks;
            }
        }
        Ok(extents)
    }

    fn allocate(&mut self, blocks: u64) -> Result<Vec<Extent>, Error> {
        self.allocator.extents(blocks).ok_or(Error::Full(self.options.size))
    }

    fn finish(mut self) -> Result<Summary, Error> {
        let (layout, options) = (self.layout, self.options);
        let journal = self.allocator.run(layout.journal_blocks).ok_or(Error::Full(options.size))?;
        let files = self.tree.nodes().len() - 1;
        if files as u64 + 11 > layout.inodes() {
            return Err(Error::Full(options.size));
        }
        let mut inodes = self.nodes()?;
        let journal_node: Node<()> =
            Node::new("journal", Kind::File { size: 0, contents: () }, 0o600, options.time);
        let inode = Inode::of(&journal_node, layout.journal_blocks * BLOCK, 1);
        inodes.push((inode::JOURNAL, self.place(inode, &[journal], "journal")?));
        inodes.sort_by_key(|(number, _)| *number);
        for (number, bytes) in inodes {
            self.sink.put(layout.inode_position(number), &bytes)?;
        }
        self.sink.put(journal.start * BLOCK, &layout::journal_superblock(layout, options))?;
        let used_bytes = self.allocator.used() * BLOCK;
        let nodes = self.tree.nodes().iter().enumerate();
        let directories: Vec<u32> =
            nodes.filter(|(_, n)| n.is_directory()).map(|(i, _)| number(i)).collect();
        let mut out = self.sink.finish()?;
        layout::write_metadata(&mut out, layout, &self.allocator, options, files, &directories)?;
        match (&options.boot, self.first_sector) {
            (None, _) => {}
            (Some(_), Some(sector)) => {
                out.seek(SeekFrom::Start(0))?;
                out.write_all(&sector)?;
            }
            (Some(_), None) => return Err(Error::entry(CORE, "is not there, so nothing boots")),
        }
        out.flush()?;
        Ok(Summary { files, used_bytes })
    }

    /// Writes directories and long links; gives back all inodes with their numbers.
    fn nodes(&mut self) -> Result<Vec<(u32, Vec<u8>)>, Error> {
        let tree = std::mem::replace(&mut self.tree, Tree::new(0));
        let mut inodes = Vec::with_capacity(tree.nodes().len() + 1);
        for (index, node) in tree.nodes().iter().enumerate() {
            let (size, data) = match &node.kind {
                Kind::Directory => {
                    let bytes = directory::blocks(&tree, &node.path, number);
                    (bytes.len() as u64, self.data(&bytes)?)
                }
                Kind::File { size, contents } => (*size, contents.clone()),
                Kind::Symlink(target) if target.len() >= 60 => {
                    (target.len() as u64, self.data(target)?)
                }
                Kind::Symlink(target) => (target.len() as u64, Vec::new()),
                Kind::Device { .. } | Kind::Fifo => (0, Vec::new()),
            };
            let links = match node.is_directory() {
                true => directory::links(&tree, &node.path),
                false => tree.names_of(index) as u16,
            };
            let inode = Inode::of(node, size, links);
            let mapped = matches!(node.kind, Kind::File { .. } | Kind::Directory);
            let bytes = match mapped || !data.is_empty() {
                true => self.place(inode, &data, &node.path)?,
                false => inode.bytes(&node.path)?,
            };
            inodes.push((number(index), bytes));
        }
        self.tree = tree;
        Ok(inodes)
    }

    fn data(&mut self, bytes: &[u8]) -> Result<Vec<Extent>, Error> {
        self.contents(bytes.len() as u64, &mut &bytes[..])
    }

    /// Tells an inode where its data is, in the way of the style.
    fn place(&mut self, mut inode: Inode, data: &[Extent], path: &str) -> Result<Vec<u8>, Error> {
        let blocks = match self.options.style {
            Style::Ext4 => inode::extent_leaves(data) as u64,
            Style::Ext3 => inode::map_blocks(data.iter().map(|e| e.length).sum()),
        };
        let more = self.allocate(blocks)?;
        let more: Vec<u64> = more.iter().flat_map(|e| e.start..e.start + e.length).collect();
        let written = match self.options.style {
            Style::Ext4 => inode.set_extents(data, &more),
            Style::Ext3 => inode.set_map(data, &more),
        };
        for (block, bytes) in written {
            self.sink.put(block * BLOCK, &bytes)?;
        }
        inode.bytes(path)
    }
}

/// The inode of a node: the root's, then in order of arrival; `lost+found` is the first.
fn number(index: usize) -> u32 {
    match index {
        0 => inode::ROOT,
        i => inode::FIRST_FREE + i as u32 - 1,
    }
}
