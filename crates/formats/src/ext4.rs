//! Writes ext4 file systems from tar streams: without mounting, without root, and the same bytes
//! for the same input. The result has a journal, extents and large inodes; the file contents are
//! written once, in the order in which they arrive.

mod inode;
mod layout;
mod tree;

use std::io::{self, Read, Seek, SeekFrom, Write};

use inode::{Extent, Inode};
use layout::{Allocator, BLOCK, Layout};
use tree::{Kind, Node, Tree};

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
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the contents do not fit into {0} bytes")]
    Full(u64),
    #[error("a file system of {0} bytes is not possible; 16 MiB to 16 TiB in 4096-byte blocks is")]
    Size(u64),
    #[error("{path}: {what}")]
    Entry { path: String, what: String },
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Error {
    fn entry(path: &str, what: impl Into<String>) -> Self {
        Error::Entry { path: path.to_owned(), what: what.into() }
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
    mut out: impl Write + Seek,
    options: &Options,
    mut progress: impl FnMut(u64),
) -> Result<Summary, Error> {
    let layout = Layout::new(options.size).ok_or(Error::Size(options.size))?;
    let mut allocator = Allocator::new(&layout);
    let mut tree = Tree::new(options.time);
    let mut contents = 0;
    let mut archive = tar::Archive::new(archive);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let header = tree::read_entry(&mut entry)?;
        let Some(mut node) = tree.place(header)? else { continue };
        if let Kind::File { size, extents } = &mut node.kind {
            *extents = write_stream(&mut entry, &mut out, *size, &mut allocator, options.size)?;
            contents += *size;
            progress(contents);
        }
        tree.insert(node)?;
    }
    let journal = allocator.run(layout.journal_blocks).ok_or(Error::Full(options.size))?;
    let files = tree.len();
    if files as u64 + 11 > layout.inodes() {
        return Err(Error::Full(options.size));
    }
    write_nodes(&mut tree, &mut out, &layout, &mut allocator, options)?;
    write_inode(&mut out, &layout, inode::JOURNAL, &journal_inode(journal, &layout, options))?;
    write_block(&mut out, journal.start, &layout::journal_superblock(&layout, options))?;
    let used = allocator.used();
    let directories = tree.directories_by_inode();
    layout::write_metadata(&mut out, &layout, &allocator, options, files, &directories)?;
    out.flush()?;
    Ok(Summary { files, used_bytes: used * BLOCK })
}

fn full(size: u64) -> impl FnOnce() -> Error {
    move || Error::Full(size)
}

fn write_block(out: &mut (impl Write + Seek), block: u64, bytes: &[u8]) -> io::Result<()> {
    out.seek(SeekFrom::Start(block * BLOCK))?;
    out.write_all(bytes)
}

/// Copies `size` bytes into newly allocated blocks; whole blocks of zeroes stay holes in `out`.
fn write_stream(
    input: &mut impl Read,
    out: &mut (impl Write + Seek),
    size: u64,
    allocator: &mut Allocator,
    limit: u64,
) -> Result<Vec<Extent>, Error> {
    let extents = allocator.extents(size.div_ceil(BLOCK)).ok_or_else(full(limit))?;
    let mut left = size;
    let mut buffer = vec![0u8; 256 * BLOCK as usize];
    for extent in &extents {
        let mut block = extent.start;
        let end = extent.start + extent.length;
        while block < end {
            let blocks = (end - block).min(256);
            let bytes = left.min(blocks * BLOCK) as usize;
            input.read_exact(&mut buffer[..bytes])?;
            if buffer[..bytes].iter().any(|b| *b != 0) {
                write_block(out, block, &buffer[..bytes])?;
            }
            left -= bytes as u64;
            block += blocks;
        }
    }
    Ok(extents)
}

fn write_nodes(
    tree: &mut Tree,
    out: &mut (impl Write + Seek),
    layout: &Layout,
    allocator: &mut Allocator,
    options: &Options,
) -> Result<(), Error> {
    tree.number();
    for node in tree.nodes() {
        let (data, extents) = match &node.kind {
            Kind::Directory => {
                let bytes = tree.directory_blocks(node);
                let extents =
                    allocator.extents(bytes.len() as u64 / BLOCK).ok_or_else(full(options.size))?;
                let mut rest = bytes.as_slice();
                for extent in &extents {
                    let (now, later) = rest.split_at((extent.length * BLOCK) as usize);
                    write_block(out, extent.start, now)?;
                    rest = later;
                }
                (bytes.len() as u64, extents)
            }
            Kind::File { size, extents } => (*size, extents.clone()),
            Kind::Symlink(target) if target.len() >= 60 => {
                let extents = allocator.extents(1).ok_or_else(full(options.size))?;
                write_block(out, extents[0].start, target)?;
                (target.len() as u64, extents)
            }
            Kind::Symlink(target) => (target.len() as u64, Vec::new()),
            Kind::Device { .. } | Kind::Fifo => (0, Vec::new()),
        };
        let mut inode = Inode::of(node, data, tree.links(node));
        if !extents.is_empty() || matches!(node.kind, Kind::File { .. } | Kind::Directory) {
            let leaf_blocks = inode::extent_leaves(&extents);
            let leaves = allocator.extents(leaf_blocks as u64).ok_or_else(full(options.size))?;
            let leaves: Vec<u64> =
                leaves.iter().flat_map(|e| e.start..e.start + e.length).collect();
            for (block, bytes) in inode.set_extents(&extents, &leaves) {
                write_block(out, block, &bytes)?;
            }
        }
        write_inode(out, layout, node.inode, &inode.bytes(&node.path)?)?;
    }
    Ok(())
}

fn write_inode(
    out: &mut (impl Write + Seek),
    layout: &Layout,
    number: u32,
    bytes: &[u8],
) -> io::Result<()> {
    out.seek(SeekFrom::Start(layout.inode_position(number)))?;
    out.write_all(bytes)
}

fn journal_inode(journal: Extent, layout: &Layout, options: &Options) -> Vec<u8> {
    let node = Node::journal(options.time);
    let mut inode = Inode::of(&node, layout.journal_blocks * BLOCK, 1);
    let leaves = inode.set_extents(&[journal], &[]);
    debug_assert!(leaves.is_empty(), "one extent fits in the inode");
    inode.bytes("journal").expect("the journal has no attributes")
}
