//! `.flist`: a tar archive, usually gzipped, with an SQLite database of Cap'n Proto messages, one
//! for each directory and each set of rights.

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};

use capnp::message::{ReaderOptions, TypedReader};
use capnp::serialize::OwnedSegments;
use rusqlite::{Connection, OptionalExtension, params};

use super::database;
use super::index::{Builder, Found, PAGE, PAGES, What};
use super::{Block, Cipher, Error, Flist, Format, MAX_DATABASE, Pieces, ROOT, Routes, bad};
use crate::flist_capnp::{a_c_i, dir, inode, special};
use crate::tree::{self, Tree};

const DATABASE: &str = "flistdb.sqlite3";
const ROUTER: &str = "router.yaml";
const MAX_ROUTER: u64 = 1 << 20;

const SCHEMA: &str = "
CREATE TABLE entries (key VARCHAR(64) PRIMARY KEY, value BLOB);
CREATE TABLE metadata (key VARCHAR(64) PRIMARY KEY, value TEXT);
";

type Message<T> = TypedReader<OwnedSegments, T>;

pub(super) fn read(input: impl Read) -> Result<Flist, Error> {
    let (bytes, router) = unpack(input)?;
    let (db, tables) = database::open(&bytes, &["entries"], &["metadata"])?;
    let mut reader = Reader { db: &db, rights: HashMap::new(), seen: HashMap::new() };
    let index = reader.read()?;
    let mut tags: Vec<(String, String)> = Vec::new();
    if tables.iter().any(|t| t == "metadata") {
        let mut query = db.prepare("SELECT key, value FROM metadata ORDER BY key")?;
        let rows = query.query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?;
        tags = rows.collect::<Result<_, _>>()?;
    }
    let routes = Routes { ranges: Vec::new(), router };
    Ok(Flist { format: Format::Flist, index, routes, tags })
}

/// The database and the router of an archive, which holds nothing else.
fn unpack(input: impl Read) -> Result<(Vec<u8>, Option<String>), Error> {
    let (mut database, mut router) = (None, None);
    // What is skipped counts too: nobody needs a database in a gigabyte of zeroes.
    let mut archive = tar::Archive::new(input.take(MAX_DATABASE + (16 << 20)));
    for entry in archive.entries()? {
        let entry = entry?;
        let raw = entry.path_bytes().into_owned();
        let text = String::from_utf8_lossy(&raw).into_owned();
        if text.starts_with('/') {
            return bad(format!("its archive holds the absolute path {text}"));
        }
        let name = tree::clean(&raw).map_err(|e| Error::Bad(e.to_string()))?;
        match entry.header().entry_type() {
            tar::EntryType::Directory if name.is_empty() => {}
            tar::EntryType::Regular | tar::EntryType::Continuous => {
                let size = entry.size();
                match &*name {
                    DATABASE if database.is_some() => return bad("it has two databases"),
                    DATABASE if size > MAX_DATABASE => {
                        return bad(format!(
                            "its database is larger than {} MiB",
                            MAX_DATABASE >> 20
                        ));
                    }
                    DATABASE => database = Some(super::take(entry)?),
                    ROUTER => {
                        let mut text = String::new();
                        entry.take(MAX_ROUTER).read_to_string(&mut text)?;
                        router = Some(text);
                    }
                    name if name == "CURRENT"
                        || name.starts_with("MANIFEST-")
                        || name.ends_with(".sst") =>
                    {
                        return bad(
                            "it is a RocksDB flist of before August 2018, which is not supported; \
                             make it anew from its files",
                        );
                    }
                    _ => {
                        return bad(format!(
                            "its archive holds {name}, which is no part of an flist"
                        ));
                    }
                }
            }
            other => return bad(format!("its archive holds {name} of the kind {other:?}")),
        }
    }
    match database {
        Some(database) => Ok((database, router)),
        None => bad(format!("its archive holds no {DATABASE}")),
    }
}

/// The key of a directory: the digest of its path.
fn directory_key(path: &str) -> String {
    hex(blake2b_simd::Params::new().hash_length(16).hash(path.as_bytes()).as_bytes())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[derive(Clone, Copy)]
struct Rights {
    mode: u16,
    uid: u32,
    gid: u32,
}

/// What files have whose rights are missing.
const NO_RIGHTS: Rights = Rights { mode: 0o400, uid: 1000, gid: 1000 };

struct Reader<'a> {
    db: &'a Connection,
    rights: HashMap<String, Rights>,
    /// Directories that were read, so that none is in itself.
    seen: HashMap<String, ()>,
}

impl Reader<'_> {
    fn read(&mut self) -> Result<super::Index, Error> {
        let mut builder = Builder::new(Cipher::Xxtea);
        let root_key = directory_key("");
        let mut queue: VecDeque<(u32, String)> = VecDeque::new();
        let root = self.directory(&root_key)?;
        let message = root.get()?;
        let Rights { mode, uid, gid } = self.rights(message.get_aclkey()?)?;
        let time = i64::from(message.get_modification_time());
        let found = Found { name: b"", mode, uid, gid, time, what: What::Directory };
        builder.add(ROOT, &found)?;
        queue.push_back((ROOT, root_key));
        while let Some((number, key)) = queue.pop_front() {
            if self.seen.insert(key.clone(), ()).is_some() {
                return bad("a directory that is in two places, or in itself");
            }
            let message = self.directory(&key)?;
            let first = builder.len();
            let contents = message.get()?.get_contents()?;
            let mut below: Vec<(Vec<u8>, String)> = Vec::new();
            for entry in contents {
                let name = entry.get_name()?.as_bytes().to_vec();
                if let Some(key) = self.entry(&mut builder, number, &name, entry)? {
                    below.push((name, key));
                }
            }
            let end = builder.len();
            builder.close(number, first..end)?;
            for (name, key) in below {
                let child = builder.find(number, &name).expect("was added");
                queue.push_back((child, key));
            }
        }
        Ok(builder.finish())
    }

    /// Adds one entry of a directory; returns the key of what is itself a directory.
    fn entry(
        &mut self,
        builder: &mut Builder,
        parent: u32,
        name: &[u8],
        entry: inode::Reader<'_>,
    ) -> Result<Option<String>, Error> {
        use inode::attributes::Which;
        let time = i64::from(entry.get_modification_time());
        let mut rights = self.rights(entry.get_aclkey()?)?;
        let mut key = None;
        let target;
        let what = match entry.get_attributes().which() {
            Ok(Which::Dir(below)) => {
                let text = below?.get_key()?.to_str().map_err(capnp::Error::from)?.to_owned();
                // A directory's own entry is the one that counts.
                rights = self.rights(self.directory(&text)?.get()?.get_aclkey()?)?;
                key = Some(text);
                What::Directory
            }
            Ok(Which::File(file)) => {
                let pages = match file?.get_block_size() {
                    0 => PAGES,
                    pages => pages,
                };
                What::File { size: entry.get_size(), pages }
            }
            Ok(Which::Link(link)) => {
                target = link?.get_target()?;
                What::Symlink(target.as_bytes())
            }
            Ok(Which::Special(special)) => special_of(special?)?,
            Err(number) => return bad(format!("a file of the unknown kind {number:?}")),
        };
        let Rights { mode, uid, gid } = rights;
        builder.add(parent, &Found { name, mode, uid, gid, time, what })?;
        if let Ok(Which::File(file)) = entry.get_attributes().which() {
            for block in file?.get_blocks()? {
                builder.block(block.get_hash()?, block.get_key()?)?;
            }
            builder.end_file()?;
        }
        Ok(key)
    }

    fn value(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        let mut query = self.db.prepare_cached("SELECT value FROM entries WHERE key = ?1")?;
        Ok(query.query_row([key], |row| row.get(0)).optional()?)
    }

    fn directory(&self, key: &str) -> Result<Message<dir::Owned>, Error> {
        match self.value(key)? {
            Some(bytes) => message(&bytes).map(Message::new),
            None => bad(format!("the directory {key} is missing from its database")),
        }
    }

    fn rights(&mut self, key: capnp::text::Reader<'_>) -> Result<Rights, Error> {
        let key = key.to_str().map_err(capnp::Error::from)?;
        if let Some(rights) = self.rights.get(key) {
            return Ok(*rights);
        }
        let rights = match self.value(key)? {
            None => NO_RIGHTS,
            Some(bytes) => {
                let message: Message<a_c_i::Owned> = Message::new(message(&bytes)?);
                let aci = message.get()?;
                let id = |number: i64, name: capnp::text::Reader<'_>| match u32::try_from(number) {
                    Ok(id) => id,
                    Err(_) if name.as_bytes() == b"root" => 0,
                    Err(_) => 1000,
                };
                let (uid, gid) =
                    (id(aci.get_uid(), aci.get_uname()?), id(aci.get_gid(), aci.get_gname()?));
                Rights { mode: aci.get_mode() & 0o7777, uid, gid }
            }
        };
        self.rights.insert(key.to_owned(), rights);
        Ok(rights)
    }
}

/// A message, read in a bounded number of steps however its pointers are tied together.
fn message(mut bytes: &[u8]) -> Result<capnp::message::Reader<OwnedSegments>, Error> {
    let words = bytes.len() / 8 + 1;
    let options = ReaderOptions {
        traversal_limit_in_words: Some(words.saturating_mul(4).max(1024)),
        nesting_limit: 16,
    };
    Ok(capnp::serialize::read_message(&mut bytes, options)?)
}

/// What the writers of these files say of special files is not to be relied upon: the kind is
/// always a socket, but a device has its two numbers.
fn special_of(special: special::Reader<'_>) -> Result<What<'static>, Error> {
    let data = special.get_data()?;
    let numbers = std::str::from_utf8(data).ok().and_then(|text| {
        let (major, minor) = text.trim_end_matches('\0').split_once(',')?;
        Some((major.trim().parse().ok()?, minor.trim().parse().ok()?))
    });
    Ok(match (special.get_type(), numbers) {
        (Ok(special::Type::Block), Some((major, minor))) => {
            What::Device { character: false, major, minor }
        }
        (_, Some((major, minor))) => What::Device { character: true, major, minor },
        (Ok(special::Type::Fifopipe), None) => What::Fifo,
        (_, None) => What::Socket,
    })
}

pub(super) fn write(
    out: impl Write,
    tree: &Tree<Pieces>,
    routes: &Routes,
    tags: &[(String, String)],
) -> Result<(), Error> {
    let mut db = database::new(SCHEMA)?;
    let transaction = db.transaction()?;
    {
        let mut insert = transaction.prepare("INSERT OR IGNORE INTO entries VALUES (?1, ?2)")?;
        let mut put = |key: &str, value: Vec<u8>| insert.execute(params![key, value]).map(drop);
        let directories = tree.walk().into_iter().filter(|(_, i)| tree.nodes()[*i].is_directory());
        for (path, index) in std::iter::once((String::new(), 0)).chain(directories) {
            let (key, value) = rights_entry(&tree.nodes()[index]);
            put(&key, value)?;
            for (_, child) in tree.children(&path) {
                let (key, value) = rights_entry(&tree.nodes()[child]);
                put(&key, value)?;
            }
            put(&directory_key(&path), directory_entry(tree, &path, index))?;
        }
        for (key, value) in tags {
            transaction.execute("INSERT INTO metadata VALUES (?1, ?2)", params![key, value])?;
        }
    }
    transaction.commit()?;
    let gzip = flate2::GzBuilder::new().mtime(0).write(out, flate2::Compression::default());
    let mut archive = tar::Builder::new(gzip);
    let mut add = |name: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_entry_type(tar::EntryType::Regular);
        archive.append_data(&mut header, name, bytes)
    };
    add(DATABASE, &database::bytes(&mut db)?)?;
    if let Some(router) = &routes.router {
        add(ROUTER, router.as_bytes())?;
    }
    Ok(archive.into_inner()?.finish()?.flush()?)
}

fn encode(message: &capnp::message::Builder<capnp::message::HeapAllocator>) -> Vec<u8> {
    capnp::serialize::write_message_to_words(message)
}

/// A message that will be in one piece.
fn new_message(words: usize) -> capnp::message::Builder<capnp::message::HeapAllocator> {
    let allocator = capnp::message::HeapAllocator::new().first_segment_words(words as u32);
    capnp::message::Builder::new(allocator)
}

/// Names of owners that every system has.
fn owner_name(id: u32) -> &'static str {
    if id == 0 { "root" } else { "" }
}

fn rights_key<C>(node: &tree::Node<C>) -> String {
    let (user, group) = (owner_name(node.uid), owner_name(node.gid));
    let text = format!(
        "user:{user}\ngroup:{group}\nmode:0o{:o}\nuid:{}\ngid:{}",
        node.mode, node.uid, node.gid
    );
    hex(blake2b_simd::Params::new().hash_length(8).hash(text.as_bytes()).as_bytes())
}

fn rights_entry<C>(node: &tree::Node<C>) -> (String, Vec<u8>) {
    let mut message = new_message(64);
    let mut aci = message.init_root::<a_c_i::Builder<'_>>();
    aci.set_uname(owner_name(node.uid));
    aci.set_gname(owner_name(node.gid));
    aci.set_mode(node.mode);
    aci.set_uid(i64::from(node.uid));
    aci.set_gid(i64::from(node.gid));
    (rights_key(node), encode(&message))
}

fn directory_entry(tree: &Tree<Pieces>, path: &str, index: usize) -> Vec<u8> {
    let node = &tree.nodes()[index];
    let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
    let children: Vec<(&str, usize)> = tree.children(path).collect();
    let blocks: usize = children
        .iter()
        .map(|(_, i)| match &tree.nodes()[*i].kind {
            tree::Kind::File { contents, .. } => contents.blocks.len(),
            _ => 0,
        })
        .sum();
    let mut message = new_message(128 + path.len() + children.len() * 48 + blocks * 8);
    let mut entry = message.init_root::<dir::Builder<'_>>();
    entry.set_name(name);
    entry.set_location(path);
    entry.set_parent(directory_key(parent).as_str());
    entry.set_size(4096);
    entry.set_aclkey(rights_key(node).as_str());
    entry.set_modification_time(node.time);
    entry.set_creation_time(node.time);
    let mut contents = entry.init_contents(children.len() as u32);
    for (i, (name, child)) in children.iter().enumerate() {
        let node = &tree.nodes()[*child];
        let mut inode = contents.reborrow().get(i as u32);
        inode.set_name(*name);
        inode.set_size(if node.is_directory() { 4096 } else { node.size() });
        inode.set_aclkey(rights_key(node).as_str());
        inode.set_modification_time(node.time);
        inode.set_creation_time(node.time);
        let attributes = inode.init_attributes();
        match &node.kind {
            tree::Kind::Directory => {
                let full =
                    if path.is_empty() { (*name).to_owned() } else { format!("{path}/{name}") };
                attributes.init_dir().set_key(directory_key(&full).as_str());
            }
            tree::Kind::File { contents, .. } => {
                let mut file = attributes.init_file();
                file.set_block_size((contents.bytes / PAGE) as u16);
                let mut blocks = file.init_blocks(contents.blocks.len() as u32);
                for (n, Block { id, key }) in contents.blocks.iter().enumerate() {
                    let mut block = blocks.reborrow().get(n as u32);
                    block.set_hash(id);
                    block.set_key(key);
                }
            }
            tree::Kind::Symlink(target) => {
                let mut link = attributes.init_link();
                link.set_target(String::from_utf8_lossy(target).as_ref());
            }
            tree::Kind::Device { character, major, minor } => {
                let mut special = attributes.init_special();
                special.set_type(if *character {
                    special::Type::Chardev
                } else {
                    special::Type::Block
                });
                special.set_data(format!("{major},{minor}").as_bytes());
            }
            tree::Kind::Fifo => {
                let mut special = attributes.init_special();
                special.set_type(special::Type::Fifopipe);
                special.set_data(b"(nothing)");
            }
        }
    }
    encode(&message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_that_other_writers_make() {
        assert_eq!(directory_key(""), "cae66941d9efbd404e4d88758ea67670");
        assert_eq!(directory_key("boot"), "48e6d32ab2a2973cb68025d876abde6e");
        assert_eq!(directory_key("usr/bin"), "46c939da162118cf47886fe40f8b5600");
        for (mode, key) in [
            (0o644, "5f64cf1389d15471"),
            (0o755, "d7683de000c13689"),
            (0o777, "73e6e9d75d19d7da"),
            (0o1777, "e09bc332f4a1ff3e"),
            (0o4755, "2d28e41ae14a6bcf"),
        ] {
            let node: tree::Node<()> = tree::Node::new("x", tree::Kind::Directory, mode, 0);
            assert_eq!(rights_key(&node), key);
        }
    }

    fn unhex(text: &str) -> Vec<u8> {
        let digits = text.as_bytes().chunks(2);
        digits.map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
    }

    #[test]
    fn messages_of_other_writers_are_understood() {
        let aci = unhex(
            "00000000090000000000000003000300a401000000000000ffffffffffffffffffffffffffffffff\
             090000002a000000090000002a0000000000000000000000726f6f7400000000726f6f7400000000",
        );
        let aci: Message<a_c_i::Owned> = Message::new(message(&aci).unwrap());
        let aci = aci.get().unwrap();
        assert_eq!((aci.get_mode(), aci.get_uid(), aci.get_gid()), (0o644, 0, 0));
        let dir = unhex(
            "00000000130000000400000002000500000000000300030000100000000000000813006b0813006b1100\
             0000220000001100000022000000e9ffffff070000000d0000000a0100001d0000008a000000746d7000\
             00000000746d707800000000",
        );
        // Cut short: refused, not followed.
        assert!(message(&dir).is_err());
        let dir = unhex(
            "00000000130000000400000002000500000000000300030000100000000000000813006b0813006b1100\
             0000220000001100000022000000e9ffffff070000000d0000000a0100001d0000008a000000746d7000\
             00000000746d70000000000063616536363934316439656662643430346534643838373538656136373637\
             300000000000000000653039626333333266346131666633650000000000000000",
        );
        let dir: Message<dir::Owned> = Message::new(message(&dir).unwrap());
        let dir = dir.get().unwrap();
        assert_eq!(dir.get_location().unwrap().to_str().unwrap(), "tmp");
        assert_eq!(dir.get_aclkey().unwrap().to_str().unwrap(), "e09bc332f4a1ff3e");
        assert_eq!(dir.get_contents().unwrap().len(), 0);
        assert_eq!(dir.get_modification_time(), 0x6b00_1308);
    }
}
