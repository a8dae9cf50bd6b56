//! Flists made from what there is: a folder, an archive, a disk. Contents go to a store block by
//! block, names into the flist. The same source gives the same flist.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lodge_formats::flist::{self, BLOCK, Block, Format, Pieces, Routes};
use lodge_formats::sniff;
use lodge_formats::tree::{Kind, Node, Tree};
use serde::Serialize;

use super::store::{self, Store};
use crate::rootfs::archive::Layer;
use crate::rootfs::content::Content;
use crate::rootfs::disk;

/// A store takes one block within this.
const PATIENCE: Duration = Duration::from_secs(60);
/// Blocks that were read and are not sealed yet, for each thread.
const WAITING: usize = 2;

/// The files of something.
pub type Source = Tree<Content>;

/// What was made.
#[derive(Clone, Debug, Serialize)]
pub struct Made {
    pub files: usize,
    /// Bytes of all files.
    pub bytes: u64,
    /// Different blocks.
    pub blocks: usize,
    /// Their bytes as they are stored.
    pub stored: u64,
    /// Bytes of the flist itself.
    pub flist: u64,
}

/// The files of a folder, an archive or a disk, with the owners that they have there.
pub fn source(path: &Path) -> Result<Source, String> {
    let text = |e: io::Error| format!("{}: {e}", path.display());
    let meta = fs::metadata(path).map_err(text)?;
    if meta.is_dir() {
        let mut tree = Tree::new(meta.mtime().max(0) as u32);
        folder(&mut tree, path, "").map_err(|e| format!("{}: {e}", path.display()))?;
        return Ok(tree);
    }
    let kind = sniff::read(&mut File::open(path).map_err(text)?).map_err(text)?;
    match kind {
        sniff::Kind::Ext4 | sniff::Kind::Qcow2 => disk::read(path).map(|read| read.tree),
        _ => {
            let mut tree = Tree::new(0);
            Layer::open(&path.to_string_lossy(), path)?.lay_as_packed(&mut tree)?;
            Ok(tree)
        }
    }
}

fn folder(tree: &mut Tree<Content>, from: &Path, at: &str) -> Result<(), String> {
    let own = fs::symlink_metadata(from).map_err(|e| e.to_string())?;
    put(tree, at, &own, Kind::Directory)?;
    let mut entries: BTreeMap<_, _> = BTreeMap::new();
    for entry in fs::read_dir(from).map_err(|e| e.to_string())? {
        let entry = entry.map_err(|e| e.to_string())?;
        entries.insert(entry.file_name(), entry.path());
    }
    for (name, path) in entries {
        let text = |e: io::Error| format!("{}: {e}", path.display());
        let Some(name) = name.to_str() else {
            return Err(format!("{}: the name is not UTF-8", path.display()));
        };
        let inside = if at.is_empty() { name.to_owned() } else { format!("{at}/{name}") };
        let meta = fs::symlink_metadata(&path).map_err(text)?;
        let kind = meta.file_type();
        let kind = if kind.is_dir() {
            folder(tree, &path, &inside)?;
            continue;
        } else if kind.is_symlink() {
            let target = fs::read_link(&path).map_err(text)?;
            Kind::Symlink(target.as_os_str().as_bytes().to_vec())
        } else if kind.is_file() {
            Kind::File { size: meta.len(), contents: Content::Path(path.clone()) }
        } else if kind.is_fifo() {
            Kind::Fifo
        } else if kind.is_char_device() || kind.is_block_device() {
            let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
            Kind::Device { character: kind.is_char_device(), major, minor }
        } else {
            // A socket is nothing without whoever listens on it.
            continue;
        };
        put(tree, &inside, &meta, kind)?;
    }
    Ok(())
}

fn put(
    tree: &mut Tree<Content>,
    path: &str,
    meta: &fs::Metadata,
    kind: Kind<Content>,
) -> Result<(), String> {
    let mode = (meta.permissions().mode() & 0o7777) as u16;
    let node = Node::new(path, kind, mode, meta.mtime().max(0) as u32);
    let node = Node { uid: meta.uid(), gid: meta.gid(), ..node };
    tree.insert(node).map(drop).map_err(|e| e.to_string())
}

/// Lays a file of root's over a tree.
pub fn add(tree: &mut Source, path: &str, mode: u16, bytes: Vec<u8>) -> Result<(), String> {
    let kind = Kind::File { size: bytes.len() as u64, contents: Content::of(bytes) };
    let path = lodge_formats::tree::clean(path.as_bytes()).map_err(|e| e.to_string())?;
    tree.lay(Node::new(&path, kind, mode, 0)).map_err(|e| e.to_string())
}

/// Whether a kernel among these files can mount a root over 9p.
pub fn has_9p(tree: &Source) -> bool {
    tree.nodes().iter().any(|node| node.path.contains("/kernel/fs/9p/9p.ko"))
}

/// Puts all contents into a store and writes the flist. `route` is where readers find the blocks,
/// written into it; nothing where that is left to them.
pub fn create(
    tree: Source,
    out: &Path,
    format: Format,
    store: &str,
    route: Option<&str>,
    tags: &[(String, String)],
) -> Result<Made, String> {
    let store = store::open(store)?;
    let sealed = seal(&tree, format, &*store)?;
    let (files, bytes) = {
        let walk = tree.walk();
        (walk.len(), walk.iter().map(|(_, index)| tree.nodes()[*index].size()).sum())
    };
    let Sealed { blocks, stored, mut by_node } = sealed;
    let mut next = 0usize;
    // `map` visits the contents in the order of the nodes.
    let order: Vec<usize> = (0..tree.nodes().len())
        .filter(|i| matches!(tree.nodes()[*i].kind, Kind::File { .. }))
        .collect();
    let tree = tree.map(|_| {
        let index = order[next];
        next += 1;
        Pieces { bytes: BLOCK, blocks: by_node.remove(&index).unwrap_or_default() }
    });
    let flist = write(&tree, out, format, &routes(format, route), tags)?;
    Ok(Made { files, bytes, blocks, stored, flist })
}

/// One store for all blocks, as a format says it; without its password.
pub fn routes(format: Format, url: Option<&str>) -> Routes {
    let mut routes = Routes::default();
    if let Some(url) = url.map(store::without_secret) {
        match format {
            Format::Fl => routes.ranges.push((0, 255, url)),
            Format::Flist => {
                let url = serde_json::Value::String(url);
                let text = format!("pools:\n  store:\n    \"00:FF\": {url}\nlookup:\n  - store\n");
                routes.router = Some(text);
            }
        }
    }
    routes
}

/// Writes an flist whose blocks are in their store already. Returns how many bytes it has.
pub fn write(
    tree: &Tree<Pieces>,
    out: &Path,
    format: Format,
    routes: &Routes,
    tags: &[(String, String)],
) -> Result<u64, String> {
    let text = |e: &dyn std::fmt::Display| format!("{}: {e}", out.display());
    let folder = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut part = tempfile::NamedTempFile::new_in(folder).map_err(|e| text(&e))?;
    let mut buffer = io::BufWriter::new(part.as_file_mut());
    flist::write(&mut buffer, format, tree, routes, tags).map_err(|e| text(&e))?;
    buffer.flush().map_err(|e| text(&e))?;
    drop(buffer);
    part.as_file().set_permissions(fs::Permissions::from_mode(0o644)).map_err(|e| text(&e))?;
    let file = part.persist(out).map_err(|e| text(&e.error))?;
    Ok(file.metadata().map_err(|e| text(&e))?.len())
}

struct Sealed {
    blocks: usize,
    stored: u64,
    by_node: BTreeMap<usize, Vec<Block>>,
}

/// A piece of a file on its way: the file's node, the piece's number, its bytes.
type Piece = (usize, usize, Vec<u8>);

/// Reads in one thread, seals and stores in as many as there are processors.
fn seal(tree: &Tree<Content>, format: Format, store: &dyn Store) -> Result<Sealed, String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let piece = u64::from(BLOCK);
    let (send, receive) = sync_channel::<Piece>(threads * WAITING);
    let receive = Arc::new(Mutex::new(receive));
    let done: Mutex<BTreeMap<(usize, usize), Block>> = Mutex::default();
    let known: Mutex<std::collections::HashSet<Box<[u8]>>> = Mutex::default();
    let stored = AtomicU64::new(0);
    let failed: Mutex<Option<String>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((node, number, bytes)) = next(&receive) {
                    let (block, body) = format.cipher().seal(&bytes);
                    if known.lock().expect("not poisoned").insert(block.id.clone()) {
                        stored.fetch_add(body.len() as u64, Ordering::Relaxed);
                        let put = store.put(&block.id, &body, Instant::now() + PATIENCE);
                        if let Err(why) = put {
                            failed.lock().expect("not poisoned").get_or_insert(why);
                        }
                    }
                    done.lock().expect("not poisoned").insert((node, number), block);
                }
            });
        }
        for (index, node) in tree.nodes().iter().enumerate() {
            let Kind::File { size, contents } = &node.kind else { continue };
            // One that has lost its last name is not in the flist.
            if tree.names_of(index) == 0 {
                continue;
            }
            let text = |e: io::Error| format!("{}: {e}", node.path);
            let mut input = contents.open().map_err(text)?.take(*size);
            for number in 0..size.div_ceil(piece) {
                let length = (size - number * piece).min(piece);
                let mut bytes = vec![0; length as usize];
                input.read_exact(&mut bytes).map_err(text)?;
                if failed.lock().expect("not poisoned").is_some() {
                    break;
                }
                // The threads take until this end is gone.
                let _ = send.send((index, number as usize, bytes));
            }
        }
        drop(send);
        Ok::<(), String>(())
    })?;
    if let Some(why) = failed.into_inner().expect("not poisoned") {
        return Err(format!("the store: {why}"));
    }
    let mut by_node: BTreeMap<usize, Vec<Block>> = BTreeMap::new();
    for ((node, _), block) in done.into_inner().expect("not poisoned") {
        by_node.entry(node).or_default().push(block);
    }
    let blocks = known.into_inner().expect("not poisoned").len();
    Ok(Sealed { blocks, stored: stored.into_inner(), by_node })
}

fn next(receive: &Mutex<Receiver<Piece>>) -> Option<Piece> {
    receive.lock().expect("not poisoned").recv().ok()
}
