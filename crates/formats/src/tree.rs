//! A tree of files: names, kinds, hard links, as an archive holds them or as layers laid over each
//! other make them. Knows no storage: what a file contains is the caller's type. Names come from
//! foreign bytes: none may leave the root.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;

/// Longer targets of symbolic links are refused.
const MAX_TARGET: usize = 4095;
/// Symbolic links that are followed in one path.
const MAX_HOPS: usize = 40;

/// What is wrong with one entry.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {what}")]
pub struct Error {
    pub path: String,
    pub what: String,
}

impl Error {
    pub fn new(path: &str, what: impl Into<String>) -> Self {
        Self { path: path.to_owned(), what: what.into() }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind<C> {
    Directory,
    /// `size` in bytes.
    File {
        size: u64,
        contents: C,
    },
    Symlink(Vec<u8>),
    Device {
        character: bool,
        major: u32,
        minor: u32,
    },
    Fifo,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node<C> {
    /// Relative to the root, without a leading slash; empty for the root. The first of its names.
    pub path: String,
    pub kind: Kind<C>,
    /// Permission bits, at most 0o7777.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970.
    pub time: u32,
    /// Full names (`user.mime`, `security.capability`) and values.
    pub xattrs: Vec<(String, Vec<u8>)>,
}

impl<C> Node<C> {
    pub fn new(path: &str, kind: Kind<C>, mode: u16, time: u32) -> Self {
        let (path, xattrs) = (path.to_owned(), Vec::new());
        Self { path, kind, mode, uid: 0, gid: 0, time, xattrs }
    }

    pub fn is_directory(&self) -> bool {
        matches!(self.kind, Kind::Directory)
    }

    /// Bytes of contents; zero for what has none.
    pub fn size(&self) -> u64 {
        match self.kind {
            Kind::File { size, .. } => size,
            _ => 0,
        }
    }

    /// The node without its contents.
    pub fn plain(&self) -> Node<()> {
        let kind = match &self.kind {
            Kind::File { size, .. } => Kind::File { size: *size, contents: () },
            Kind::Directory => Kind::Directory,
            Kind::Symlink(target) => Kind::Symlink(target.clone()),
            Kind::Device { character, major, minor } => {
                Kind::Device { character: *character, major: *major, minor: *minor }
            }
            Kind::Fifo => Kind::Fifo,
        };
        let (path, xattrs) = (self.path.clone(), self.xattrs.clone());
        let Node { mode, uid, gid, time, .. } = *self;
        Node { path, kind, mode, uid, gid, time, xattrs }
    }

    /// The same node with other contents.
    pub fn with<D>(self, change: impl FnOnce(C) -> D) -> Node<D> {
        let Node { path, kind, mode, uid, gid, time, xattrs } = self;
        let kind = match kind {
            Kind::File { size, contents } => Kind::File { size, contents: change(contents) },
            Kind::Directory => Kind::Directory,
            Kind::Symlink(target) => Kind::Symlink(target),
            Kind::Device { character, major, minor } => Kind::Device { character, major, minor },
            Kind::Fifo => Kind::Fifo,
        };
        Node { path, kind, mode, uid, gid, time, xattrs }
    }
}

/// One entry of an archive: a node, or another name for one.
#[derive(Debug)]
pub enum Entry {
    Node(Node<()>),
    Link { path: String, target: String },
}

/// Reads the header of a tar entry; its contents are still to be read.
pub fn read_entry<R: Read>(entry: &mut tar::Entry<'_, R>) -> Result<Entry, Error> {
    let raw = entry.path_bytes().into_owned();
    let path = clean(&raw)?;
    let xattrs = read_xattrs(entry, &path)?;
    let header = entry.header();
    // Fields that a writer left empty stand for zero; the header's checksum was right.
    let numbers = |what: std::io::Result<u64>| what.unwrap_or(0) as u32;
    let kind = match header.entry_type() {
        tar::EntryType::Directory => Kind::Directory,
        tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => {
            Kind::File { size: entry.size(), contents: () }
        }
        tar::EntryType::Symlink => {
            let target = entry.link_name_bytes().unwrap_or_default().into_owned();
            if target.is_empty() || target.len() > MAX_TARGET {
                return Err(Error::new(&path, "a symbolic link of an impossible length"));
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
        other => return Err(Error::new(&path, format!("tar entry type {other:?} is not known"))),
    };
    Ok(Entry::Node(Node {
        kind,
        mode: header.mode().map_err(|e| Error::new(&path, e.to_string()))? as u16 & 0o7777,
        uid: numbers(header.uid()),
        gid: numbers(header.gid()),
        time: numbers(header.mtime()),
        xattrs,
        path,
    }))
}

/// `./usr//bin/` is `usr/bin`; what would leave the root is refused.
pub fn clean(raw: &[u8]) -> Result<String, Error> {
    let text = String::from_utf8_lossy(raw);
    let error = |what: &str| Err(Error::new(&text, what));
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
) -> Result<Vec<(String, Vec<u8>)>, Error> {
    let mut list = Vec::new();
    let extensions = entry.pax_extensions().map_err(|e| Error::new(path, e.to_string()))?;
    let Some(extensions) = extensions else { return Ok(list) };
    for extension in extensions {
        let extension = extension.map_err(|e| Error::new(path, e.to_string()))?;
        if let Some(name) = extension.key().ok().and_then(|k| k.strip_prefix("SCHILY.xattr.")) {
            list.push((name.to_owned(), extension.value_bytes().to_vec()));
        }
    }
    Ok(list)
}

/// Files by their names. The root is always there.
#[derive(Debug)]
pub struct Tree<C> {
    /// In order of arrival; what was replaced stays without a name.
    nodes: Vec<Node<C>>,
    by_path: HashMap<String, usize>,
    /// For each directory its names, sorted, with the index of the node.
    children: BTreeMap<String, BTreeMap<String, usize>>,
    /// How many names a node has, where that is not one.
    links: HashMap<usize, u32>,
    time: u32,
}

impl<C> Tree<C> {
    /// A root alone; `time` is that of directories that no archive names.
    pub fn new(time: u32) -> Self {
        Self {
            nodes: vec![Node::new("", Kind::Directory, 0o755, time)],
            by_path: HashMap::from([(String::new(), 0)]),
            children: BTreeMap::from([(String::new(), BTreeMap::new())]),
            links: HashMap::new(),
            time,
        }
    }

    /// Adds what must not be there yet; directories may be.
    pub fn insert(&mut self, node: Node<C>) -> Result<usize, Error> {
        if let Some(index) = self.by_path.get(&node.path).copied() {
            return match self.nodes[index].is_directory() && node.is_directory() {
                true => {
                    self.nodes[index] = node;
                    Ok(index)
                }
                false => Err(Error::new(&node.path, "appears twice in the archive")),
            };
        }
        self.make_parents(&node.path)?;
        Ok(self.attach(node))
    }

    /// Gives a file another name, which must not be there yet.
    pub fn link(&mut self, path: &str, target: &str) -> Result<(), Error> {
        let index = self.linkable(path, target)?;
        if self.by_path.contains_key(path) {
            return Err(Error::new(path, "appears twice in the archive"));
        }
        self.make_parents(path)?;
        self.name(path, index);
        *self.links.entry(index).or_insert(1) += 1;
        Ok(())
    }

    /// Lays a node over what is there, as an unpacking `tar` does: files replace, directories
    /// merge, links to directories are followed within the root.
    pub fn lay(&mut self, mut node: Node<C>) -> Result<(), Error> {
        node.path = self.resolve_parent(&node.path)?;
        match self.by_path.get(&node.path).copied() {
            Some(index) if node.is_directory() => match self.nodes[index].kind {
                Kind::Directory => {
                    self.nodes[index] = node;
                    Ok(())
                }
                // A link to a directory stays what it is.
                Kind::Symlink(_) if self.follow(&node.path, 0)?.1 => Ok(()),
                _ => Err(Error::new(&node.path, "a directory in place of a file")),
            },
            found => {
                if found.is_some() {
                    self.remove(&node.path)?;
                }
                self.make_parents(&node.path)?;
                self.attach(node);
                Ok(())
            }
        }
    }

    /// Lays another name for a file over what is there.
    pub fn lay_link(&mut self, path: &str, target: &str) -> Result<(), Error> {
        let (path, target) = (self.resolve_parent(path)?, self.resolve_parent(target)?);
        let index = self.linkable(&path, &target)?;
        if self.by_path.get(&path) == Some(&index) {
            return Ok(());
        }
        if self.by_path.contains_key(&path) {
            self.remove(&path)?;
        }
        self.link(&path, &target)
    }

    /// The same names with other contents.
    pub fn map<D>(self, mut change: impl FnMut(C) -> D) -> Tree<D> {
        let Tree { nodes, by_path, children, links, time } = self;
        let nodes = nodes.into_iter().map(|node| node.with(&mut change)).collect();
        Tree { nodes, by_path, children, links, time }
    }

    fn linkable(&self, path: &str, target: &str) -> Result<usize, Error> {
        let found = self.by_path.get(target).copied().filter(|i| !self.nodes[*i].is_directory());
        found.ok_or_else(|| Error::new(path, format!("links to {target}, which is no file")))
    }

    /// Takes a file's name away, if it is there.
    pub fn forget(&mut self, path: &str) {
        if self.get(path).is_some_and(|node| !node.is_directory()) {
            // A file has nothing below it.
            let _ = self.remove(path);
        }
    }

    /// Takes a name away; a directory's only if it is empty.
    fn remove(&mut self, path: &str) -> Result<(), Error> {
        if path.is_empty() {
            return Err(Error::new("/", "the root is a directory and nothing else"));
        }
        let index = self.by_path[path];
        if self.children.get(path).is_some_and(|below| !below.is_empty()) {
            return Err(Error::new(path, "a file in place of a directory that is not empty"));
        }
        self.children.remove(path);
        self.by_path.remove(path);
        let (parent, name) = split(path);
        if let Some(names) = self.children.get_mut(parent) {
            names.remove(name);
        }
        *self.links.entry(index).or_insert(1) -= 1;
        Ok(())
    }

    fn make_parents(&mut self, path: &str) -> Result<(), Error> {
        let (parent, _) = split(path);
        if self.children.contains_key(parent) {
            return Ok(());
        }
        if self.by_path.contains_key(parent) {
            return Err(Error::new(path, "lies below something that is no directory"));
        }
        self.make_parents(parent)?;
        self.attach(Node::new(parent, Kind::Directory, 0o755, self.time));
        Ok(())
    }

    /// Puts a node where its directory is.
    fn attach(&mut self, node: Node<C>) -> usize {
        let index = self.nodes.len();
        self.name(&node.path.clone(), index);
        if node.is_directory() {
            self.children.insert(node.path.clone(), BTreeMap::new());
        }
        self.nodes.push(node);
        index
    }

    fn name(&mut self, path: &str, index: usize) {
        let (parent, name) = split(path);
        self.children.entry(parent.to_owned()).or_default().insert(name.to_owned(), index);
        self.by_path.insert(path.to_owned(), index);
    }

    /// The path with all links in its parent followed.
    fn resolve_parent(&self, path: &str) -> Result<String, Error> {
        let (parent, name) = split(path);
        if parent.is_empty() || self.children.contains_key(parent) {
            return Ok(path.to_owned());
        }
        let (parent, _) = self.follow(parent, 0)?;
        Ok(join(&parent, name))
    }

    /// Where a path leads when all its links are followed, and whether a directory is there.
    /// What is missing is taken as it is written.
    fn follow(&self, path: &str, hops: usize) -> Result<(String, bool), Error> {
        if hops > MAX_HOPS {
            return Err(Error::new(path, "too many symbolic links"));
        }
        let mut at = String::new();
        let mut parts = path.split('/').filter(|p| !p.is_empty() && *p != ".");
        while let Some(part) = parts.next() {
            if part == ".." {
                at.truncate(at.rfind('/').unwrap_or(0));
                continue;
            }
            let next = join(&at, part);
            let target = match self.get(&next).map(|node| &node.kind) {
                Some(Kind::Symlink(target)) => String::from_utf8_lossy(target).into_owned(),
                _ => {
                    at = next;
                    continue;
                }
            };
            let from = if target.starts_with('/') { String::new() } else { at };
            let rest: Vec<&str> = parts.collect();
            return self.follow(&format!("{from}/{target}/{}", rest.join("/")), hops + 1);
        }
        let directory = self.children.contains_key(&at);
        Ok((at, directory))
    }

    pub fn index_of(&self, path: &str) -> Option<usize> {
        self.by_path.get(path).copied()
    }

    pub fn get(&self, path: &str) -> Option<&Node<C>> {
        self.by_path.get(path).map(|i| &self.nodes[*i])
    }

    /// The file that a path leads to, its links followed within the root.
    pub fn find(&self, path: &str) -> Option<&Node<C>> {
        self.follow(path, 0).ok().and_then(|(path, _)| self.get(&path))
    }

    /// By index, the root first, in order of arrival. Some may have lost their names.
    pub fn nodes(&self) -> &[Node<C>] {
        &self.nodes
    }

    /// How many names a node has.
    pub fn names_of(&self, index: usize) -> u32 {
        self.links.get(&index).copied().unwrap_or(1)
    }

    /// The names in a directory, sorted, each with its node's index.
    pub fn children(&self, path: &str) -> impl Iterator<Item = (&str, usize)> {
        self.children.get(path).into_iter().flatten().map(|(name, index)| (name.as_str(), *index))
    }

    /// Every name but the root's, sorted, directories before what is in them.
    pub fn walk(&self) -> Vec<(String, usize)> {
        let mut list = Vec::with_capacity(self.by_path.len());
        let mut queue = vec![String::new()];
        while let Some(path) = queue.pop() {
            let from = queue.len();
            for (name, index) in self.children(&path) {
                let full = join(&path, name);
                if self.nodes[index].is_directory() {
                    queue.push(full.clone());
                }
                list.push((full, index));
            }
            queue[from..].reverse();
        }
        list
    }
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

fn join(parent: &str, name: &str) -> String {
    if parent.is_empty() { name.to_owned() } else { format!("{parent}/{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, contents: u8) -> Node<u8> {
        Node::new(path, Kind::File { size: 1, contents }, 0o644, 0)
    }

    fn link(path: &str, target: &str) -> Node<u8> {
        Node::new(path, Kind::Symlink(target.into()), 0o777, 0)
    }

    fn content(tree: &Tree<u8>, path: &str) -> Option<u8> {
        match tree.find(path)?.kind {
            Kind::File { contents, .. } => Some(contents),
            _ => None,
        }
    }

    #[test]
    fn the_root_stays_a_directory() {
        let mut tree = Tree::new(0);
        tree.lay(file("a", 1)).unwrap();
        tree.forget("a");
        assert!(tree.lay(file("", 2)).is_err());
        assert!(tree.lay(link("", "a")).is_err());
        tree.lay(file("b", 3)).unwrap();
        assert!(tree.lay_link("", "b").is_err());
        assert!(tree.insert(file("", 4)).is_err());
        assert_eq!(content(&tree, "b"), Some(3));
    }

    #[test]
    fn later_layers_replace_files_and_merge_directories() {
        let mut tree = Tree::new(0);
        for node in [file("etc/x", 1), file("etc/a", 1), file("etc/x", 2)] {
            tree.lay(node).unwrap();
        }
        assert_eq!((content(&tree, "etc/x"), content(&tree, "etc/a")), (Some(2), Some(1)));
        let names: Vec<String> = tree.walk().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["etc", "etc/a", "etc/x"]);
    }

    #[test]
    fn links_to_directories_are_followed_within_the_root() {
        let mut tree = Tree::new(0);
        tree.lay(Node::new("usr/lib", Kind::Directory, 0o755, 0)).unwrap();
        tree.lay(link("lib", "usr/lib")).unwrap();
        tree.lay(link("out", "../../../usr")).unwrap();
        tree.lay(Node::new("lib", Kind::Directory, 0o755, 0)).unwrap();
        tree.lay(file("lib/a", 1)).unwrap();
        tree.lay(file("out/lib/b", 2)).unwrap();
        assert!(matches!(tree.get("lib").unwrap().kind, Kind::Symlink(_)));
        assert_eq!(content(&tree, "usr/lib/a"), Some(1));
        assert_eq!(content(&tree, "usr/lib/b"), Some(2));
        tree.lay(link("one", "two")).unwrap();
        tree.lay(link("two", "one")).unwrap();
        assert!(tree.lay(file("one/x", 3)).is_err());
    }

    #[test]
    fn a_link_keeps_what_its_other_name_loses() {
        let mut tree = Tree::new(0);
        tree.lay(file("a", 1)).unwrap();
        tree.lay_link("b", "a").unwrap();
        tree.lay(file("a", 2)).unwrap();
        assert_eq!((content(&tree, "a"), content(&tree, "b")), (Some(2), Some(1)));
        let index = tree.walk().iter().find(|(name, _)| name == "b").unwrap().1;
        assert_eq!(tree.names_of(index), 1);
        assert!(tree.lay_link("c", "nothing").is_err());
    }

    #[test]
    fn a_full_directory_is_not_replaced_by_a_file() {
        let mut tree = Tree::new(0);
        tree.lay(file("a/b", 1)).unwrap();
        assert!(tree.lay(file("a", 2)).is_err());
        assert!(tree.lay(file("a/b/c", 2)).is_err());
        assert!(tree.lay(Node::new("a/b", Kind::Directory, 0o755, 0)).is_err());
    }
}
