//! What people do with an flist without booting it: look at it, list it, take files out, see that
//! all its blocks are there, lay several over each other.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lodge_formats::flist::{self, Flist, Format, Index, Kind, Node, ROOT};
use lodge_formats::tree::Tree;
use serde_json::{Value, json};

use super::cache::Cache;
use super::fetch::{self, Fetcher};
use super::store;

/// A block is waited for no longer.
const PATIENCE: Duration = Duration::from_secs(60);
const THREADS: usize = 8;

/// Reads an flist. The calling thread reads foreign bytes for that: from then on it writes only
/// below these paths.
pub fn open(path: &Path, writable: &[std::path::PathBuf]) -> Result<Flist, String> {
    let text = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    let file = File::open(path).map_err(|e| text(&e))?;
    lodge_jail::script::write_only(writable).map_err(|e| e.to_string())?;
    flist::read(file).map_err(|e| text(&e))
}

/// The format that a name asks for.
pub fn format_of(path: &Path) -> Format {
    match path.extension().is_some_and(|e| e == "fl") {
        true => Format::Fl,
        false => Format::Flist,
    }
}

/// What fetches an flist's blocks, without keeping any.
pub fn fetcher(flist: &Flist, store: Option<&str>) -> Result<Fetcher, String> {
    let stores = fetch::routes(&flist.routes, store)?;
    Fetcher::new(Cache::new(Path::new("/nonexistent")), &stores, PATIENCE)
}

/// Everything about an flist.
pub fn inspect(flist: &Flist) -> Value {
    let index = &flist.index;
    let mut counts = [0u64; 4];
    let mut bytes = 0;
    for number in 0..index.len() {
        let Some(node) = index.node(number) else { continue };
        let place = match node.kind {
            Kind::Directory => 0,
            Kind::File => 1,
            Kind::Symlink => 2,
            _ => 3,
        };
        counts[place] += 1;
        bytes += node.size;
    }
    let unique: HashSet<Box<[u8]>> = (0..index.block_count()).map(|n| index.block(n).id).collect();
    let routes: Vec<Value> = fetch::routes(&flist.routes, None)
        .unwrap_or_default()
        .iter()
        .map(|(first, last, url)| {
            json!({"from": format!("{first:02x}"), "to": format!("{last:02x}"),
                   "store": store::without_secret(url)})
        })
        .collect();
    let tags: serde_json::Map<String, Value> =
        flist.tags.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
    let there = |path: &str| find(index, path).is_ok();
    json!({
        "format": match flist.format { Format::Flist => "flist", Format::Fl => "fl" },
        "directories": counts[0], "files": counts[1], "links": counts[2], "special": counts[3],
        "bytes": bytes, "blocks": index.block_count(), "different_blocks": unique.len(),
        "stores": routes, "tags": tags,
        "boots": match (there("boot/boot.yaml"), there("boot/vmlinuz")) {
            (true, _) => json!("boot/boot.yaml"),
            (false, true) => json!("boot/vmlinuz"),
            (false, false) => Value::Null,
        },
    })
}

/// The node at a path, links not followed.
fn find(index: &Index, path: &str) -> Result<u32, String> {
    let mut at = ROOT;
    for part in path.split('/').filter(|p| !p.is_empty() && *p != ".") {
        at = index.lookup(at, part.as_bytes()).ok_or_else(|| format!("{path}: there is none"))?;
    }
    Ok(at)
}

/// The node that a path leads to, links followed within the root.
fn resolve(index: &Index, path: &str) -> Result<u32, String> {
    let found = super::walk::walk(ROOT, path, |dir, name| {
        let number = index.lookup(dir, name).ok_or("there is none")?;
        let node = index.node(number).ok_or("there is none")?;
        let link = node.kind == Kind::Symlink;
        Ok((number, link.then(|| index.target(node).to_vec())))
    });
    found.map_err(|why| format!("{path}: {why}"))
}

/// Writes the contents of the file that a path leads to.
pub fn cat(
    flist: &Flist,
    fetcher: &Fetcher,
    path: &str,
    out: &mut dyn Write,
) -> Result<(), String> {
    let number = resolve(&flist.index, path)?;
    let node = flist.index.node(number).expect("was found");
    match node.kind {
        Kind::File => contents(&flist.index, fetcher, node, out),
        _ => Err(format!("{path}: it is not a file")),
    }
}

/// Lines about a node, or about what is in it, as `ls -l` writes them.
pub fn list(index: &Index, path: &str) -> Result<String, String> {
    let number = find(index, path)?;
    let node = index.node(number).expect("was found");
    let mut text = String::new();
    match node.kind {
        Kind::Directory => {
            for child in index.children(node) {
                text.push_str(&line(index, index.node(child).expect("a child")));
            }
        }
        _ => text.push_str(&line(index, node)),
    }
    Ok(text)
}

fn line(index: &Index, node: &Node) -> String {
    let letter = match node.kind {
        Kind::Directory => 'd',
        Kind::File => '-',
        Kind::Symlink => 'l',
        Kind::BlockDevice => 'b',
        Kind::CharDevice => 'c',
        Kind::Fifo => 'p',
        Kind::Socket => 's',
    };
    let bit = |shift: u16| {
        let bits = node.mode >> shift & 7;
        let (r, w) = (if bits & 4 != 0 { 'r' } else { '-' }, if bits & 2 != 0 { 'w' } else { '-' });
        let special = match shift {
            6 => (0o4000, 's', 'S'),
            3 => (0o2000, 's', 'S'),
            _ => (0o1000, 't', 'T'),
        };
        let x = match (bits & 1 != 0, node.mode & special.0 != 0) {
            (true, false) => 'x',
            (false, false) => '-',
            (true, true) => special.1,
            (false, true) => special.2,
        };
        format!("{r}{w}{x}")
    };
    let size = match node.kind {
        Kind::BlockDevice | Kind::CharDevice => {
            let (major, minor) = node.device();
            format!("{major}, {minor}")
        }
        _ => node.size.to_string(),
    };
    let name = shown(index.name(node));
    let target = match node.kind {
        Kind::Symlink => format!(" -> {}", shown(index.target(node))),
        _ => String::new(),
    };
    let rights = format!("{}{}{}", bit(6), bit(3), bit(0));
    format!("{letter}{rights} {:>5} {:>5} {size:>12} {name}{target}\n", node.uid, node.gid)
}

/// A foreign name as a terminal may be shown it.
fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name)
        .chars()
        .flat_map(|c| {
            let control = c.is_control();
            let escaped = control.then(|| c.escape_default());
            escaped.into_iter().flatten().chain((!control).then_some(c))
        })
        .collect()
}

/// Writes a file's contents.
fn contents(
    index: &Index,
    fetcher: &Fetcher,
    node: &Node,
    out: &mut dyn Write,
) -> Result<(), String> {
    for number in index.blocks(node) {
        let plain = fetcher.plain(index, number, node.block_size())?;
        out.write_all(&plain).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// Takes everything out into a folder, which is made or is empty. What only root can make is left
/// out for others; how many those are.
pub fn extract(flist: &Flist, fetcher: &Fetcher, to: &Path) -> Result<usize, String> {
    let index = &flist.index;
    let text = |e: io::Error| format!("{}: {e}", to.display());
    if to.exists() && fs::read_dir(to).map_err(text)?.next().is_some() {
        return Err(format!("{} is not empty", to.display()));
    }
    fs::create_dir_all(to).map_err(text)?;
    let root = rustix::process::geteuid().is_root();
    let mut left = 0;
    for number in 0..index.len() {
        let node = index.node(number).expect("in range");
        // Every part was checked to be a name, and none of them leads through a link: each
        // directory here was made by us.
        let path = path_of(index, number, to);
        let made = make(index, fetcher, node, &path, root);
        match made.map_err(|why| format!("{}: {why}", path.display()))? {
            true => {}
            false => left += 1,
        }
    }
    // Last, because making files changes directories.
    for number in (0..index.len()).rev() {
        let node = index.node(number).expect("in range");
        if node.kind == Kind::Directory {
            let path = path_of(index, number, to);
            finish(node, &path, root).map_err(|e| format!("{}: {e}", path.display()))?;
        }
    }
    Ok(left)
}

fn path_of(index: &Index, number: u32, to: &Path) -> std::path::PathBuf {
    let mut parts = Vec::new();
    let mut at = number;
    while at != ROOT {
        let node = index.node(at).expect("in range");
        parts.push(std::ffi::OsStr::from_bytes(index.name(node)));
        at = node.parent;
    }
    parts.reverse();
    to.join(parts.iter().collect::<std::path::PathBuf>())
}

fn make(
    index: &Index,
    fetcher: &Fetcher,
    node: &Node,
    path: &Path,
    root: bool,
) -> Result<bool, String> {
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    let text = |e: io::Error| e.to_string();
    match node.kind {
        Kind::Directory => {
            if !path.is_dir() {
                fs::create_dir(path).map_err(text)?;
            }
            return Ok(true);
        }
        Kind::File => {
            let mut file = File::create_new(path).map_err(text)?;
            contents(index, fetcher, node, &mut file)?;
        }
        Kind::Symlink => {
            let target = std::ffi::OsStr::from_bytes(index.target(node));
            std::os::unix::fs::symlink(target, path).map_err(text)?;
        }
        Kind::Fifo => {
            mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
                .map_err(|e| text(e.into()))?;
        }
        Kind::BlockDevice | Kind::CharDevice if root => {
            let kind = match node.kind {
                Kind::BlockDevice => FileType::BlockDevice,
                _ => FileType::CharacterDevice,
            };
            let (major, minor) = node.device();
            mknodat(CWD, path, kind, Mode::RUSR | Mode::WUSR, makedev(major, minor))
                .map_err(|e| text(e.into()))?;
        }
        Kind::BlockDevice | Kind::CharDevice | Kind::Socket => return Ok(false),
    }
    finish(node, path, root).map(|()| true).map_err(text)
}

/// Owner, mode and time.
fn finish(node: &Node, path: &Path, root: bool) -> io::Result<()> {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
    if root {
        std::os::unix::fs::lchown(path, Some(node.uid), Some(node.gid))?;
    }
    if node.kind != Kind::Symlink {
        fs::set_permissions(path, fs::Permissions::from_mode(u32::from(node.mode)))?;
    }
    let time = Timespec { tv_sec: node.time, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Fetches every block and looks into it. Returns how many there are, and those that are wrong
/// with the first file each is of.
pub fn verify(flist: &Flist, fetcher: &Fetcher) -> (usize, Vec<(String, String)>) {
    let index = &flist.index;
    let mut seen: HashSet<Box<[u8]>> = HashSet::new();
    let mut all: Vec<(u32, u32)> = Vec::new();
    for number in 0..index.len() {
        let node = index.node(number).expect("in range");
        let blocks = index.blocks(node).filter(|n| seen.insert(index.block(*n).id));
        all.extend(blocks.map(|n| (number, n)));
    }
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some((file, block)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let node = index.node(*file).expect("in range");
                    if let Err(why) = fetcher.plain(index, *block, node.block_size()) {
                        wrong.lock().expect("not poisoned").push((index.path(*file), why));
                    }
                }
            });
        }
    });
    let mut wrong = wrong.into_inner().expect("not poisoned");
    wrong.sort();
    (all.len(), wrong)
}

/// Lays flists over each other and writes the result, with what the first one says about itself.
pub fn merge_into(flists: &[Flist], out: &Path, route: Option<&str>) -> Result<u64, String> {
    let tree = merge(flists)?;
    let first = &flists[0];
    let routes = match route {
        Some(url) => super::create::routes(first.format, Some(url)),
        None => first.routes.clone(),
    };
    super::create::write(&tree, out, first.format, &routes, &first.tags)
}

/// Lays flists over each other, later ones on top: files replace, directories are united.
fn merge(flists: &[Flist]) -> Result<Tree<flist::Pieces>, String> {
    let [first, rest @ ..] = flists else { return Err("there is nothing to merge".into()) };
    let mut tree = first.index.to_tree().map_err(|e| e.to_string())?;
    for other in rest {
        if other.format != first.format {
            return Err("flists of the two formats encrypt their blocks in different ways and \
                        cannot be merged"
                .into());
        }
        let above = other.index.to_tree().map_err(|e| e.to_string())?;
        for node in above.nodes().iter().skip(1) {
            tree.lay(node.clone()).map_err(|e| e.to_string())?;
        }
    }
    Ok(tree)
}
