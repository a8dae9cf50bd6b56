//! The names of an flist in little memory: fixed-size nodes, each directory's side by side and
//! sorted, texts and blocks in one piece each. Built once, then only read.

use std::ops::Range;

use super::{BLOCK, Block, Cipher, Error, MAX_BLOCK, MAX_NODES, Pieces, bad};
use crate::tree::{self, Tree};

/// The number of the root directory.
pub const ROOT: u32 = 0;

pub(super) const PAGE: u32 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Directory,
    File,
    Symlink,
    BlockDevice,
    CharDevice,
    Fifo,
    Socket,
}

impl Kind {
    /// The type bits of `st_mode`.
    pub fn bits(self) -> u32 {
        match self {
            Kind::Fifo => 0o010_000,
            Kind::CharDevice => 0o020_000,
            Kind::Directory => 0o040_000,
            Kind::BlockDevice => 0o060_000,
            Kind::File => 0o100_000,
            Kind::Symlink => 0o120_000,
            Kind::Socket => 0o140_000,
        }
    }

    pub fn of_mode(mode: u32) -> Option<Self> {
        let all = [
            Kind::Directory,
            Kind::File,
            Kind::Symlink,
            Kind::BlockDevice,
            Kind::CharDevice,
            Kind::Fifo,
            Kind::Socket,
        ];
        all.into_iter().find(|kind| kind.bits() == mode & 0o170_000)
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Node {
    pub kind: Kind,
    /// Permission bits, at most 0o7777.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Bytes of a file; zero for all else.
    pub size: u64,
    /// Seconds since 1970.
    pub time: i64,
    /// The root is its own.
    pub parent: u32,
    /// Pages of 4096 bytes in a block of this file.
    pages: u16,
    name: (u32, u16),
    /// Children, blocks or text, or a device's two numbers.
    first: u32,
    count: u32,
}

impl Node {
    /// Bytes in each of a file's blocks but the last.
    pub fn block_size(&self) -> u32 {
        u32::from(self.pages) * PAGE
    }

    /// Of a device: major and minor.
    pub fn device(&self) -> (u32, u32) {
        (self.first, self.count)
    }
}

#[derive(Debug)]
pub struct Index {
    cipher: Cipher,
    nodes: Vec<Node>,
    text: Vec<u8>,
    /// Id and key of each block, one behind the other.
    blocks: Vec<u8>,
}

impl Index {
    pub fn cipher(&self) -> Cipher {
        self.cipher
    }

    /// How many files, directories and links there are.
    pub fn len(&self) -> u32 {
        self.nodes.len() as u32
    }

    pub fn is_empty(&self) -> bool {
        self.nodes.len() == 1
    }

    pub fn node(&self, number: u32) -> Option<&Node> {
        self.nodes.get(number as usize)
    }

    pub fn name(&self, node: &Node) -> &[u8] {
        let (from, length) = node.name;
        &self.text[from as usize..from as usize + usize::from(length)]
    }

    /// The numbers of what is in a directory, sorted by name.
    pub fn children(&self, node: &Node) -> Range<u32> {
        match node.kind {
            Kind::Directory => node.first..node.first + node.count,
            _ => 0..0,
        }
    }

    pub fn lookup(&self, parent: u32, name: &[u8]) -> Option<u32> {
        let range = self.children(self.node(parent)?);
        let all = &self.nodes[range.start as usize..range.end as usize];
        let found = all.binary_search_by(|node| self.name(node).cmp(name)).ok()?;
        Some(range.start + found as u32)
    }

    /// Where a symbolic link points.
    pub fn target(&self, node: &Node) -> &[u8] {
        match node.kind {
            Kind::Symlink => &self.text[node.first as usize..(node.first + node.count) as usize],
            _ => &[],
        }
    }

    /// The blocks of a file, as numbers for `block`.
    pub fn blocks(&self, node: &Node) -> Range<u32> {
        match node.kind {
            Kind::File => node.first..node.first + node.count,
            _ => 0..0,
        }
    }

    /// How many blocks all files have together, those of equal files counted anew.
    pub fn block_count(&self) -> u32 {
        (self.blocks.len() / (2 * self.cipher.digest_size())) as u32
    }

    pub fn block(&self, number: u32) -> Block {
        let size = self.cipher.digest_size();
        let at = number as usize * 2 * size;
        let (id, key) = self.blocks[at..at + 2 * size].split_at(size);
        Block { id: id.into(), key: key.into() }
    }

    /// A node's path, without a slash before it.
    pub fn path(&self, number: u32) -> String {
        let mut parts = Vec::new();
        let mut at = number;
        while at != ROOT {
            let Some(node) = self.node(at) else { break };
            parts.push(String::from_utf8_lossy(self.name(node)));
            at = node.parent;
        }
        parts.reverse();
        parts.join("/")
    }

    /// The same names as a tree, to be written anew.
    pub fn to_tree(&self) -> Result<Tree<Pieces>, tree::Error> {
        let root = &self.nodes[0];
        let mut tree = Tree::new(root.time as u32);
        for (number, node) in self.nodes.iter().enumerate() {
            let path = self.path(number as u32);
            let kind = match node.kind {
                Kind::Directory => tree::Kind::Directory,
                Kind::File => {
                    let blocks = self.blocks(node).map(|n| self.block(n)).collect();
                    let contents = Pieces { bytes: node.block_size(), blocks };
                    tree::Kind::File { size: node.size, contents }
                }
                Kind::Symlink => tree::Kind::Symlink(self.target(node).to_vec()),
                Kind::BlockDevice | Kind::CharDevice => {
                    let (major, minor) = node.device();
                    tree::Kind::Device { character: node.kind == Kind::CharDevice, major, minor }
                }
                // A socket is nothing without the process that listens on it.
                Kind::Fifo => tree::Kind::Fifo,
                Kind::Socket => continue,
            };
            let (uid, gid) = (node.uid, node.gid);
            let plain = tree::Node::new(&path, kind, node.mode, node.time as u32);
            tree.insert(tree::Node { uid, gid, ..plain })?;
        }
        Ok(tree)
    }
}

/// What a reader says of one node.
pub(super) struct Found<'a> {
    pub(super) name: &'a [u8],
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) time: i64,
    pub(super) what: What<'a>,
}

pub(super) enum What<'a> {
    Directory,
    /// Pages in a block.
    File {
        size: u64,
        pages: u16,
    },
    Symlink(&'a [u8]),
    Device {
        character: bool,
        major: u32,
        minor: u32,
    },
    Fifo,
    Socket,
}

/// Takes nodes in; those of one directory one after the other.
pub(super) struct Builder {
    index: Index,
}

impl Builder {
    pub(super) fn new(cipher: Cipher) -> Self {
        let index = Index { cipher, nodes: Vec::new(), text: Vec::new(), blocks: Vec::new() };
        Self { index }
    }

    pub(super) fn len(&self) -> u32 {
        self.index.len()
    }

    /// Adds a node, the root first. Names may come in any order; `close` sorts them.
    pub(super) fn add(&mut self, parent: u32, found: &Found<'_>) -> Result<u32, Error> {
        let number = self.index.nodes.len();
        if number >= MAX_NODES {
            return bad(format!("it has more than {MAX_NODES} files"));
        }
        if number > 0 {
            check_name(found.name)?;
        }
        let (kind, first, count, size, pages) = match found.what {
            What::Directory => (Kind::Directory, 0, 0, 0, 0),
            What::File { size, pages } => {
                let block = u32::from(pages).checked_mul(PAGE).filter(|b| *b <= MAX_BLOCK);
                if block.is_none_or(|b| b == 0 && size > 0) {
                    return bad(format!(
                        "{}: blocks of {pages} pages are impossible",
                        String::from_utf8_lossy(found.name)
                    ));
                }
                (Kind::File, self.index.block_count(), 0, size, pages)
            }
            What::Symlink(target) => {
                if target.is_empty() || target.len() > 4095 || target.contains(&0) {
                    return bad("a symbolic link of an impossible length");
                }
                let (first, count) = (self.index.text.len() as u32, target.len() as u32);
                self.index.text.extend_from_slice(target);
                (Kind::Symlink, first, count, 0, 0)
            }
            What::Device { character: true, major, minor } => {
                (Kind::CharDevice, major, minor, 0, 0)
            }
            What::Device { character: false, major, minor } => {
                (Kind::BlockDevice, major, minor, 0, 0)
            }
            What::Fifo => (Kind::Fifo, 0, 0, 0, 0),
            What::Socket => (Kind::Socket, 0, 0, 0, 0),
        };
        let name = (self.index.text.len() as u32, found.name.len() as u16);
        self.index.text.extend_from_slice(found.name);
        if u32::try_from(self.index.text.len()).is_err() {
            return bad("its names are too long together");
        }
        let Found { mode, uid, gid, time, .. } = *found;
        let mode = mode & 0o7777;
        self.index.nodes.push(Node {
            kind,
            mode,
            uid,
            gid,
            size,
            time,
            parent,
            pages,
            name,
            first,
            count,
        });
        Ok(number as u32)
    }

    /// Adds a block to the file that was added last.
    pub(super) fn block(&mut self, id: &[u8], key: &[u8]) -> Result<(), Error> {
        let size = self.index.cipher.digest_size();
        if id.len() != size || key.len() != size {
            return bad(format!(
                "a block's name of {} and key of {} bytes; both have {size}",
                id.len(),
                key.len()
            ));
        }
        self.index.blocks.extend_from_slice(id);
        self.index.blocks.extend_from_slice(key);
        self.index.nodes.last_mut().expect("a file was added").count += 1;
        Ok(())
    }

    /// The file that was added last has all its blocks: as many as its size takes.
    pub(super) fn end_file(&self) -> Result<(), Error> {
        let node = self.index.nodes.last().expect("a file was added");
        let block = u64::from(node.block_size().max(1));
        match node.size.div_ceil(block) == u64::from(node.count) {
            true => Ok(()),
            false => bad(format!(
                "{}: {} bytes in {} blocks of {block}",
                String::from_utf8_lossy(self.index.name(node)),
                node.size,
                node.count
            )),
        }
    }

    /// A directory has these nodes, which were added one after the other.
    pub(super) fn close(&mut self, directory: u32, range: Range<u32>) -> Result<(), Error> {
        let Index { nodes, text, .. } = &mut self.index;
        let name = |node: &Node| &text[node.name.0 as usize..][..usize::from(node.name.1)];
        let all = &mut nodes[range.start as usize..range.end as usize];
        all.sort_by(|a, b| name(a).cmp(name(b)));
        if let Some(pair) = all.windows(2).find(|pair| name(&pair[0]) == name(&pair[1])) {
            let name = String::from_utf8_lossy(name(&pair[0])).into_owned();
            return bad(format!("{name} is twice in one directory"));
        }
        let node = &mut nodes[directory as usize];
        (node.first, node.count) = (range.start, range.end - range.start);
        Ok(())
    }

    pub(super) fn node(&self, number: u32) -> &Node {
        &self.index.nodes[number as usize]
    }

    pub(super) fn children(&self, number: u32) -> Range<u32> {
        self.index.children(self.node(number))
    }

    /// A node of a closed directory by its name.
    pub(super) fn find(&self, directory: u32, name: &[u8]) -> Option<u32> {
        self.index.lookup(directory, name)
    }

    pub(super) fn set_parent(&mut self, number: u32, parent: u32) {
        self.index.nodes[number as usize].parent = parent;
    }

    pub(super) fn finish(mut self) -> Index {
        self.index.nodes.shrink_to_fit();
        self.index.text.shrink_to_fit();
        self.index.blocks.shrink_to_fit();
        self.index
    }
}

fn check_name(name: &[u8]) -> Result<(), Error> {
    let wrong = name.is_empty()
        || name.len() > 255
        || name == b"."
        || name == b".."
        || name.iter().any(|b| *b == b'/' || *b == 0);
    match wrong {
        true => bad(format!("{:?} is no name of a file", String::from_utf8_lossy(name))),
        false => Ok(()),
    }
}

/// Pages of the blocks that files are cut into.
pub(super) const PAGES: u16 = (BLOCK / PAGE) as u16;
