//! The files of an archive as a tree: names, kinds, hard links, and the numbers they get.
//! Names come from foreign bytes: none may leave the root.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;

use super::Error;
use super::inode::{Extent, FIRST_FREE, ROOT};
use super::layout::BLOCK;

pub(super) enum Kind {
    Directory,
    File { size: u64, extents: Vec<Extent> },
    Symlink(Vec<u8>),
    Device { character: bool, major: u32, minor: u32 },
    Fifo,
}

impl Kind {
    pub(super) fn mode_bits(&self) -> u16 {
        match self {
            Kind::Directory => 0o040_000,
            Kind::File { .. } => 0o100_000,
            Kind::Symlink(_) => 0o120_000,
            Kind::Device { character: true, .. } => 0o020_000,
            Kind::Device { character: false, .. } => 0o060_000,
            Kind::Fifo => 0o010_000,
        }
    }

    /// The type byte of a directory entry.
    fn entry_type(&self) -> u8 {
        match self {
            Kind::File { .. } => 1,
            Kind::Directory => 2,
            Kind::Device { character: true, .. } => 3,
            Kind::Device { character: false, .. } => 4,
            Kind::Fifo => 5,
            Kind::Symlink(_) => 7,
        }
    }
}

pub(super) struct Node {
    /// Relative to the root, without a leading slash; empty for the root.
    pub(super) path: String,
    pub(super) kind: Kind,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) time: u32,
    /// Name index, name without its prefix, value.
    pub(super) xattrs: Vec<(u8, String, Vec<u8>)>,
    pub(super) inode: u32,
}

impl Node {
    fn directory(path: &str, mode: u16, time: u32) -> Self {
        Self {
            path: path.to_owned(),
            kind: Kind::Directory,
            mode,
            uid: 0,
            gid: 0,
            time,
            xattrs: Vec::new(),
            inode: 0,
        }
    }

    pub(super) fn journal(time: u32) -> Self {
        let kind = Kind::File { size: 0, extents: Vec::new() };
        Self { kind, ..Self::directory("journal", 0o600, time) }
    }
}

/// One entry of the archive: a node, or another name for one.
pub(super) enum Entry {
    Node(Node),
    Link { path: String, target: String },
}

pub(super) fn read_entry<R: Read>(entry: &mut tar::Entry<'_, R>) -> Result<Entry, Error> {
    let raw = entry.path_bytes().into_owned();
    let path = clean(&raw)?;
    let xattrs = read_xattrs(entry, &path)?;
    let header = entry.header();
    let numbers = |what: std::io::Result<u64>| what.map_err(|e| Error::entry(&path, e.to_string()));
    let kind = match header.entry_type() {
        tar::EntryType::Directory => Kind::Directory,
        tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => {
            Kind::File { size: entry.size(), extents: Vec::new() }
        }
        tar::EntryType::Symlink => {
            let target = entry.link_name_bytes().unwrap_or_default().into_owned();
            if target.is_empty() || target.len() >= BLOCK as usize {
                return Err(Error::entry(&path, "a symbolic link of an impossible length"));
            }
            Kind::Symlink(target)
        }
        tar::EntryType::Link => {
            let target = entry.link_name_bytes().unwrap_or_default();
            return Ok(Entry::Link { target: clean(&target)?, path });
        }
        kind @ (tar::EntryType::Char | tar::EntryType::Block) => {
            let part = |n: std::io::Result<Option<u32>>| n.ok().flatten().unwrap_or(0);
            Kind::Device {
                character: kind == tar::EntryType::Char,
                major: part(header.device_major()),
                minor: part(header.device_minor()),
            }
        }
        tar::EntryType::Fifo => Kind::Fifo,
        other => return Err(Error::entry(&path, format!("tar entry type {other:?} is not known"))),
    };
    Ok(Entry::Node(Node {
        kind,
        mode: header.mode().map_err(|e| Error::entry(&path, e.to_string()))? as u16 & 0o7777,
        uid: numbers(header.uid())? as u32,
        gid: numbers(header.gid())? as u32,
        time: numbers(header.mtime())? as u32,
        xattrs,
        inode: 0,
        path,
    }))
}

/// `./usr//bin/` is `usr/bin`; what would leave the root is refused.
fn clean(raw: &[u8]) -> Result<String, Error> {
    let text = String::from_utf8_lossy(raw);
    let error = |what: &str| Err(Error::entry(&text, what));
    let mut parts = Vec::new();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." => return error("a path that leaves the root"),
            name if name.len() > 255 || name.contains('\0') => return error("an impossible name"),
            name => parts.push(name),
        }
    }
    Ok(parts.join("/"))
}

fn read_xattrs<R: Read>(
    entry: &mut tar::Entry<'_, R>,
    path: &str,
) -> Result<Vec<(u8, String, Vec<u8>)>, Error> {
    const PREFIXES: [(&str, u8); 3] = [("user.", 1), ("trusted.", 4), ("security.", 6)];
    let mut list = Vec::new();
    let Some(extensions) = entry.pax_extensions()? else { return Ok(list) };
    for extension in extensions {
        let extension = extension.map_err(|e| Error::entry(path, e.to_string()))?;
        let Some(key) = extension.key().ok().and_then(|k| k.strip_prefix("SCHILY.xattr.")) else {
            continue;
        };
        let known = PREFIXES.iter().find_map(|(p, index)| Some((*index, key.strip_prefix(p)?)));
        // Access control lists have another form on disk; the permission bits stand in for them.
        if let Some((index, name)) = known {
            list.push((index, name.to_owned(), extension.value_bytes().to_vec()));
        }
    }
    Ok(list)
}

pub(super) struct Tree {
    nodes: Vec<Node>,
    by_path: HashMap<String, usize>,
    /// For each directory its names, sorted, with the index of the node.
    children: BTreeMap<String, BTreeMap<String, usize>>,
    links: HashMap<usize, u16>,
    time: u32,
}

impl Tree {
    pub(super) fn new(time: u32) -> Self {
        let mut tree = Self {
            nodes: vec![Node::directory("", 0o755, time)],
            by_path: HashMap::from([(String::new(), 0)]),
            children: BTreeMap::from([(String::new(), BTreeMap::new())]),
            links: HashMap::new(),
            time,
        };
        tree.insert(Node::directory("lost+found", 0o700, time)).expect("the tree is empty");
        tree
    }

    /// Settles links at once; gives back the node whose contents, if any, come next.
    pub(super) fn place(&mut self, entry: Entry) -> Result<Option<Node>, Error> {
        match entry {
            Entry::Node(node) => Ok(Some(node)),
            Entry::Link { path, target } => {
                let found = self.by_path.get(&target).copied();
                let found = found.filter(|i| !matches!(self.nodes[*i].kind, Kind::Directory));
                let index = found.ok_or_else(|| {
                    Error::entry(&path, format!("links to {target}, which is no file"))
                })?;
                self.name(&path, index)?;
                *self.links.entry(index).or_insert(1) += 1;
                Ok(None)
            }
        }
    }

    pub(super) fn insert(&mut self, node: Node) -> Result<(), Error> {
        if let Some(index) = self.by_path.get(&node.path).copied() {
            return match (&self.nodes[index].kind, &node.kind) {
                (Kind::Directory, Kind::Directory) => {
                    self.nodes[index] = node;
                    Ok(())
                }
                (_, _) => Err(Error::entry(&node.path, "appears twice in the archive")),
            };
        }
        let index = self.nodes.len();
        self.name(&node.path.clone(), index)?;
        if matches!(node.kind, Kind::Directory) {
            self.children.insert(node.path.clone(), BTreeMap::new());
        }
        self.nodes.push(node);
        Ok(())
    }

    fn name(&mut self, path: &str, index: usize) -> Result<(), Error> {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        if !self.children.contains_key(parent) {
            if self.by_path.contains_key(parent) {
                return Err(Error::entry(path, "lies below something that is no directory"));
            }
            self.insert(Node::directory(parent, 0o755, self.time))?;
            // The directory took the place that this node was to have.
            let index = if index == self.nodes.len() - 1 { self.nodes.len() } else { index };
            return self.name(path, index);
        }
        let names = self.children.get_mut(parent).expect("looked up above");
        if names.insert(name.to_owned(), index).is_some() {
            return Err(Error::entry(path, "appears twice in the archive"));
        }
        self.by_path.insert(path.to_owned(), index);
        Ok(())
    }

    /// Without the root, which has a reserved number.
    pub(super) fn len(&self) -> usize {
        self.nodes.len() - 1
    }

    pub(super) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Gives every node its inode number: `lost+found` the first, then in order of arrival.
    pub(super) fn number(&mut self) {
        self.nodes[0].inode = ROOT;
        for (i, node) in self.nodes.iter_mut().enumerate().skip(1) {
            node.inode = FIRST_FREE + i as u32 - 1;
        }
    }

    pub(super) fn links(&self, node: &Node) -> u16 {
        match node.kind {
            Kind::Directory => {
                let names = self.children.get(&node.path);
                let below = names.into_iter().flat_map(|n| n.values());
                let directories =
                    below.filter(|i| matches!(self.nodes[**i].kind, Kind::Directory)).count();
                // Above what fits, `dir_nlink` says 1.
                if directories > 64_998 { 1 } else { directories as u16 + 2 }
            }
            Kind::File { .. } | Kind::Symlink(_) | Kind::Device { .. } | Kind::Fifo => {
                self.by_path.get(&node.path).and_then(|i| self.links.get(i)).copied().unwrap_or(1)
            }
        }
    }

    pub(super) fn directories_by_inode(&self) -> Vec<u32> {
        let directories = self.nodes.iter().filter(|n| matches!(n.kind, Kind::Directory));
        directories.map(|n| n.inode).collect()
    }

    /// The entries of a directory, in whole blocks.
    pub(super) fn directory_blocks(&self, node: &Node) -> Vec<u8> {
        let parent = node.path.rsplit_once('/').map_or("", |(parent, _)| parent);
        let parent = self.nodes[self.by_path[parent]].inode;
        let mut entries = vec![(node.inode, 2u8, "."), (parent, 2, "..")];
        for (name, index) in &self.children[&node.path] {
            let child = &self.nodes[*index];
            entries.push((child.inode, child.kind.entry_type(), name));
        }
        // lost+found keeps room for what a repair puts there.
        let least = if node.path == "lost+found" { 4 } else { 1 };
        pack_directory(&entries, least)
    }
}

fn pack_directory(entries: &[(u32, u8, &str)], least: usize) -> Vec<u8> {
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
