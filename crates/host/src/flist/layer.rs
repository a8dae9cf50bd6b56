//! What a machine has changed above its flist: attributes, names and pieces of files, in memory
//! and, a transaction at a time, in a database in the machine's folder. Bytes lie in one sparse
//! file for each changed file. Knows inode numbers and never looks into the flist.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, params};

/// Numbers from here on are files that the flist does not have.
pub(super) const FIRST_OWN: u64 = 1 << 32;
/// Files that are kept open.
const MAX_OPEN: usize = 64;

const SCHEMA: &str = "
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS node (
    ino INTEGER PRIMARY KEY, mode INTEGER, uid INTEGER, gid INTEGER, size INTEGER, rdev INTEGER,
    nlink INTEGER, below INTEGER, target BLOB, atime_s INTEGER, atime_n INTEGER, mtime_s INTEGER,
    mtime_n INTEGER, ctime_s INTEGER, ctime_n INTEGER);
CREATE TABLE IF NOT EXISTS entry (
    dir INTEGER, name BLOB, ino INTEGER, seq INTEGER, PRIMARY KEY (dir, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS piece (ino INTEGER, number INTEGER, PRIMARY KEY (ino, number))
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS xattr (
    ino INTEGER, name BLOB, value BLOB, PRIMARY KEY (ino, name)) WITHOUT ROWID;
";

/// Seconds since 1970 and nanoseconds.
pub(super) type Time = (i64, u32);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Attr {
    /// The whole `st_mode`.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    pub(super) rdev: u32,
    pub(super) nlink: u32,
    /// Up to here the bytes of the flist count, where they were not replaced.
    pub(super) below: u64,
    /// Of a symbolic link.
    pub(super) target: Vec<u8>,
    pub(super) atime: Time,
    pub(super) mtime: Time,
    pub(super) ctime: Time,
}

impl Attr {
    pub(super) fn is(&self, kind: u32) -> bool {
        self.mode & libc::S_IFMT == kind
    }
}

/// How the names in a directory differ from the flist's.
#[derive(Default)]
pub(super) struct Names {
    /// `None`: the flist's is gone. Otherwise the inode, and the name's place in the listing.
    pub(super) by_name: HashMap<Box<[u8]>, Option<(u64, u64)>>,
    /// In the order in which they came.
    pub(super) by_place: BTreeMap<u64, (Box<[u8]>, u64)>,
}

pub(super) struct Layer {
    folder: PathBuf,
    db: Connection,
    pub(super) attrs: HashMap<u64, Attr>,
    pub(super) names: HashMap<u64, Names>,
    pieces: HashMap<u64, HashSet<u64>>,
    xattrs: HashMap<u64, BTreeMap<Vec<u8>, Vec<u8>>>,
    open: HashMap<u64, Arc<File>>,
    /// Written to since the last commit.
    unsynced: HashSet<u64>,
    next: u64,
    seq: u64,
    changed: bool,
}

fn broken(error: rusqlite::Error) -> io::Error {
    io::Error::other(format!("the machine's layer: {error}"))
}

impl Layer {
    /// What was changed so far, from a folder that is made if it is not there.
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder.join("data"))?;
        let db = Connection::open(folder.join("layer.db")).map_err(broken)?;
        db.execute_batch(SCHEMA).map_err(broken)?;
        db.set_prepared_statement_cache_capacity(32);
        let mut layer = Self {
            folder: folder.to_owned(),
            db,
            attrs: HashMap::new(),
            names: HashMap::new(),
            pieces: HashMap::new(),
            xattrs: HashMap::new(),
            open: HashMap::new(),
            unsynced: HashSet::new(),
            next: FIRST_OWN,
            seq: 1,
            changed: false,
        };
        layer.load().map_err(broken)?;
        layer.db.execute_batch("BEGIN").map_err(broken)?;
        // Nobody has these open any more.
        let gone = layer.attrs.iter().filter(|(_, a)| a.nlink == 0).map(|(ino, _)| *ino);
        for ino in gone.collect::<Vec<_>>() {
            layer.destroy(ino)?;
        }
        Ok(layer)
    }

    fn load(&mut self) -> rusqlite::Result<()> {
        let mut query = self.db.prepare(
            "SELECT ino, mode, uid, gid, size, rdev, nlink, below, target, atime_s, atime_n,
                    mtime_s, mtime_n, ctime_s, ctime_n FROM node",
        )?;
        let mut rows = query.query([])?;
        while let Some(r) = rows.next()? {
            let ino: u64 = r.get(0)?;
            self.next = self.next.max(ino + 1);
            let attr = Attr {
                mode: r.get(1)?,
                uid: r.get(2)?,
                gid: r.get(3)?,
                size: r.get(4)?,
                rdev: r.get(5)?,
                nlink: r.get(6)?,
                below: r.get(7)?,
                target: r.get(8)?,
                atime: (r.get(9)?, r.get(10)?),
                mtime: (r.get(11)?, r.get(12)?),
                ctime: (r.get(13)?, r.get(14)?),
            };
            self.attrs.insert(ino, attr);
        }
        let mut query = self.db.prepare("SELECT dir, name, ino, seq FROM entry")?;
        let mut rows = query.query([])?;
        while let Some(r) = rows.next()? {
            let (dir, name): (u64, Vec<u8>) = (r.get(0)?, r.get(1)?);
            let (ino, seq): (Option<u64>, u64) = (r.get(2)?, r.get(3)?);
            self.seq = self.seq.max(seq + 1);
            let names = self.names.entry(dir).or_default();
            let name = name.into_boxed_slice();
            if let Some(ino) = ino {
                names.by_place.insert(seq, (name.clone(), ino));
            }
            names.by_name.insert(name, ino.map(|ino| (ino, seq)));
        }
        let mut query = self.db.prepare("SELECT ino, number FROM piece")?;
        let mut rows = query.query([])?;
        while let Some(r) = rows.next()? {
            self.pieces.entry(r.get(0)?).or_default().insert(r.get(1)?);
        }
        let mut query = self.db.prepare("SELECT ino, name, value FROM xattr")?;
        let mut rows = query.query([])?;
        while let Some(r) = rows.next()? {
            self.xattrs.entry(r.get(0)?).or_default().insert(r.get(1)?, r.get(2)?);
        }
        Ok(())
    }

    /// A number for a file that the flist does not have.
    pub(super) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    /// Whether there is something that is not safe yet.
    pub(super) fn is_changed(&self) -> bool {
        self.changed
    }

    pub(super) fn set(&mut self, ino: u64, attr: Attr) -> io::Result<()> {
        let a = &attr;
        self.db
            .prepare_cached(
                "INSERT OR REPLACE INTO node VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11,
                 ?12, ?13, ?14, ?15)",
            )
            .and_then(|mut s| {
                s.execute(params![
                    ino, a.mode, a.uid, a.gid, a.size, a.rdev, a.nlink, a.below, a.target,
                    a.atime.0, a.atime.1, a.mtime.0, a.mtime.1, a.ctime.0, a.ctime.1
                ])
            })
            .map_err(broken)?;
        self.changed = true;
        self.attrs.insert(ino, attr);
        Ok(())
    }

    /// Gives a directory a name for an inode, or takes the flist's name away.
    pub(super) fn put_name(&mut self, dir: u64, name: &[u8], ino: Option<u64>) -> io::Result<()> {
        let seq = self.seq;
        self.seq += 1;
        self.db
            .prepare_cached("INSERT OR REPLACE INTO entry VALUES (?1, ?2, ?3, ?4)")
            .and_then(|mut s| s.execute(params![dir, name, ino, seq]))
            .map_err(broken)?;
        self.changed = true;
        let names = self.names.entry(dir).or_default();
        let old = names.by_name.insert(name.into(), ino.map(|ino| (ino, seq)));
        if let Some(Some((_, place))) = old {
            names.by_place.remove(&place);
        }
        if let Some(ino) = ino {
            names.by_place.insert(seq, (name.into(), ino));
        }
        Ok(())
    }

    /// Forgets that a name was ever changed.
    pub(super) fn drop_name(&mut self, dir: u64, name: &[u8]) -> io::Result<()> {
        self.db
            .prepare_cached("DELETE FROM entry WHERE dir = ?1 AND name = ?2")
            .and_then(|mut s| s.execute(params![dir, name]))
            .map_err(broken)?;
        self.changed = true;
        if let Some(names) = self.names.get_mut(&dir)
            && let Some(Some((_, place))) = names.by_name.remove(name)
        {
            names.by_place.remove(&place);
        }
        Ok(())
    }

    pub(super) fn has_piece(&self, ino: u64, number: u64) -> bool {
        self.pieces.get(&ino).is_some_and(|set| set.contains(&number))
    }

    /// From now on this piece of a file is in its data file.
    pub(super) fn put_piece(&mut self, ino: u64, number: u64) -> io::Result<()> {
        if !self.pieces.entry(ino).or_default().insert(number) {
            return Ok(());
        }
        self.changed = true;
        self.db
            .prepare_cached("INSERT OR IGNORE INTO piece VALUES (?1, ?2)")
            .and_then(|mut s| s.execute(params![ino, number]))
            .map(drop)
            .map_err(broken)
    }

    fn path(&self, ino: u64) -> PathBuf {
        self.folder.join("data").join(format!("{ino:x}"))
    }

    /// The file with a file's own bytes; to be read only, `None` where it has none.
    pub(super) fn data(&mut self, ino: u64, write: bool) -> io::Result<Option<Arc<File>>> {
        if write {
            self.unsynced.insert(ino);
            self.changed = true;
        }
        if let Some(file) = self.open.get(&ino) {
            return Ok(Some(file.clone()));
        }
        let open = File::options()
            .read(true)
            .write(true)
            .create(write)
            .truncate(false)
            .open(self.path(ino));
        let file = match open {
            Ok(file) => Arc::new(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if self.open.len() >= MAX_OPEN {
            self.open.clear();
        }
        self.open.insert(ino, file.clone());
        Ok(Some(file))
    }

    /// Takes a file away for good.
    pub(super) fn destroy(&mut self, ino: u64) -> io::Result<()> {
        for table in ["node", "piece", "xattr"] {
            self.db
                .prepare_cached(&format!("DELETE FROM {table} WHERE ino = ?1"))
                .and_then(|mut s| s.execute([ino]))
                .map_err(broken)?;
        }
        self.changed = true;
        self.attrs.remove(&ino);
        self.pieces.remove(&ino);
        self.xattrs.remove(&ino);
        self.drop_data(ino)
    }

    /// Takes a file's own bytes away.
    pub(super) fn drop_data(&mut self, ino: u64) -> io::Result<()> {
        self.open.remove(&ino);
        self.unsynced.remove(&ino);
        match fs::remove_file(self.path(ino)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// A directory that is gone has no names.
    pub(super) fn drop_names(&mut self, dir: u64) -> io::Result<()> {
        self.names.remove(&dir);
        self.db
            .prepare_cached("DELETE FROM entry WHERE dir = ?1")
            .and_then(|mut s| s.execute([dir]))
            .map(drop)
            .map_err(broken)
    }

    pub(super) fn xattr(&self, ino: u64, name: &[u8]) -> Option<&Vec<u8>> {
        self.xattrs.get(&ino)?.get(name)
    }

    pub(super) fn xattr_names(&self, ino: u64) -> Vec<u8> {
        let all = self.xattrs.get(&ino).into_iter().flatten();
        all.flat_map(|(name, _)| name.iter().copied().chain([0])).collect()
    }

    /// `None` takes it away.
    pub(super) fn put_xattr(
        &mut self,
        ino: u64,
        name: &[u8],
        value: Option<&[u8]>,
    ) -> io::Result<()> {
        self.changed = true;
        let all = self.xattrs.entry(ino).or_default();
        match value {
            Some(value) => {
                all.insert(name.to_vec(), value.to_vec());
                self.db
                    .prepare_cached("INSERT OR REPLACE INTO xattr VALUES (?1, ?2, ?3)")
                    .and_then(|mut s| s.execute(params![ino, name, value]))
            }
            None => {
                all.remove(name);
                self.db
                    .prepare_cached("DELETE FROM xattr WHERE ino = ?1 AND name = ?2")
                    .and_then(|mut s| s.execute(params![ino, name]))
            }
        }
        .map(drop)
        .map_err(broken)
    }

    /// Makes everything so far safe: first the bytes, then what says that they count.
    pub(super) fn commit(&mut self) -> io::Result<()> {
        if !std::mem::replace(&mut self.changed, false) {
            return Ok(());
        }
        for ino in std::mem::take(&mut self.unsynced) {
            let file = match self.open.get(&ino) {
                Some(file) => file.clone(),
                None => match File::open(self.path(ino)) {
                    Ok(file) => file.into(),
                    // Taken away since.
                    Err(_) => continue,
                },
            };
            file.sync_data()?;
        }
        self.db.execute_batch("COMMIT; BEGIN").map_err(broken)
    }

    /// How much room there is where the layer lies.
    pub(super) fn room(&self) -> io::Result<libc::statvfs64> {
        let stat = rustix::fs::statvfs(&self.folder)?;
        // SAFETY: all fields are plain numbers, and the ones that matter are filled in below.
        let mut room: libc::statvfs64 = unsafe { std::mem::zeroed() };
        (room.f_bsize, room.f_frsize) = (stat.f_bsize, stat.f_frsize);
        (room.f_blocks, room.f_bfree, room.f_bavail) = (stat.f_blocks, stat.f_bfree, stat.f_bavail);
        (room.f_files, room.f_ffree, room.f_favail) = (stat.f_files, stat.f_ffree, stat.f_favail);
        room.f_namemax = 255;
        Ok(room)
    }
}
