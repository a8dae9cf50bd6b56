//! `.fl`: an SQLite database with a row for each file, each block and each route.

use std::collections::HashMap;
use std::io::Write;

use rusqlite::types::ValueRef;
use rusqlite::{Row, params};

use super::database;
use super::index::{Builder, Found, PAGES, What};
use super::{BLOCK, Block, Cipher, Error, Flist, Format, Kind, Pieces, Routes, bad};
use crate::tree::{self, Tree};

const SCHEMA: &str = "
CREATE TABLE inode (
    ino INTEGER PRIMARY KEY AUTOINCREMENT, parent INTEGER, name VARCHAR(255), size INTEGER,
    uid INTEGER, gid INTEGER, mode INTEGER, rdev INTEGER, ctime INTEGER, mtime INTEGER);
CREATE INDEX parents ON inode (parent);
CREATE INDEX names ON inode (name);
CREATE TABLE extra (ino INTEGER PRIMARY KEY, data VARCHAR(4096));
CREATE TABLE block (ino INTEGER, id VARCHAR(32), key VARCHAR(32));
CREATE INDEX block_ino ON block (ino);
CREATE TABLE tag (key VARCHAR(10) PRIMARY KEY, value VARCHAR(255));
CREATE TABLE route (start INTEGER, end INTEGER, url VARCHAR(2048));
";

const ROOT_INO: i64 = 1;

pub(super) fn read(bytes: &[u8]) -> Result<Flist, Error> {
    let tables = ["inode", "block", "extra"];
    let (db, found) = database::open(bytes, &tables, &["tag", "route"])?;
    let mut builder = Builder::new(Cipher::AesGcm);
    // Numbers of the database to those of the index.
    let mut numbers: HashMap<i64, u32> = HashMap::new();
    {
        let mut blocks = db.prepare("SELECT id, key FROM block WHERE ino = ?1 ORDER BY rowid")?;
        let mut extra = db.prepare("SELECT data FROM extra WHERE ino = ?1")?;
        let mut query = db.prepare(
            "SELECT ino, parent, name, size, uid, gid, mode, rdev, mtime FROM inode
             ORDER BY parent, name",
        )?;
        let mut rows = query.query([])?;
        // Of the directory that the rows at hand are in.
        let mut open: Option<(i64, u32)> = None;
        let mut directories: Vec<(i64, u32, u32)> = Vec::new();
        while let Some(row) = rows.next()? {
            let (ino, parent): (i64, i64) = (row.get(0)?, row.get(1)?);
            let root = builder.len() == 0;
            if root != (ino == ROOT_INO) || root != (parent == 0) {
                return bad("it has no root, or more than one");
            }
            let target: Vec<u8> = match extra.query_row([ino], |r| Ok(bytes_of(r, 0)?.to_vec())) {
                Ok(target) => target,
                Err(rusqlite::Error::QueryReturnedNoRows) => Vec::new(),
                Err(error) => return Err(error.into()),
            };
            let found = found_in(row, &target)?;
            // Its parent's number is known when all have been read.
            let number = builder.add(0, &found)?;
            if numbers.insert(ino, number).is_some() {
                return bad("two files have the same number");
            }
            if matches!(found.what, What::File { .. }) {
                let mut rows = blocks.query([ino])?;
                while let Some(row) = rows.next()? {
                    builder.block(bytes_of(row, 0)?, bytes_of(row, 1)?)?;
                }
                builder.end_file()?;
            }
            if !root && open.is_none_or(|(at, _)| at != parent) {
                if let Some((at, first)) = open {
                    directories.push((at, first, number));
                }
                open = Some((parent, number));
            }
        }
        let end = builder.len();
        directories.extend(open.map(|(at, first)| (at, first, end)));
        if builder.len() == 0 {
            return bad("it has no root");
        }
        place(&mut builder, &numbers, &directories)?;
    }
    let mut routes = Routes::default();
    if found.iter().any(|t| t == "route") {
        let mut query = db.prepare("SELECT start, end, url FROM route ORDER BY rowid")?;
        let rows = query.query_map([], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?)))?;
        routes.ranges = rows.collect::<Result<_, _>>()?;
    }
    let mut tags = Vec::new();
    if found.iter().any(|t| t == "tag") {
        let mut query = db.prepare("SELECT key, value FROM tag ORDER BY key")?;
        let rows = query.query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?;
        tags = rows.collect::<Result<_, _>>()?;
    }
    Ok(Flist { format: Format::Fl, index: builder.finish(), routes, tags })
}

/// Text or bytes of a column.
fn bytes_of<'a>(row: &'a Row<'_>, column: usize) -> Result<&'a [u8], rusqlite::Error> {
    Ok(match row.get_ref(column)? {
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => bytes,
        ValueRef::Null | ValueRef::Integer(_) | ValueRef::Real(_) => &[],
    })
}

fn found_in<'a>(row: &'a Row<'_>, target: &'a [u8]) -> Result<Found<'a>, Error> {
    let (size, mode, rdev): (i64, u32, i64) = (row.get(3)?, row.get(6)?, row.get(7)?);
    let Ok(size) = u64::try_from(size) else { return bad("a file of a negative size") };
    // As glibc puts a device's two numbers into one.
    let rdev = rdev as u64;
    let major = (rdev >> 8 & 0xfff) as u32 | (rdev >> 32 & !0xfff) as u32;
    let minor = (rdev & 0xff) as u32 | (rdev >> 12 & !0xff) as u32;
    let what = match Kind::of_mode(mode) {
        Some(Kind::Directory) => What::Directory,
        Some(Kind::File) => What::File { size, pages: PAGES },
        Some(Kind::Symlink) => What::Symlink(target),
        Some(Kind::CharDevice) => What::Device { character: true, major, minor },
        Some(Kind::BlockDevice) => What::Device { character: false, major, minor },
        Some(Kind::Fifo) => What::Fifo,
        Some(Kind::Socket) => What::Socket,
        None => return bad(format!("a file of the unknown mode {mode:o}")),
    };
    let (uid, gid, time) = (row.get(4)?, row.get(5)?, row.get(8)?);
    Ok(Found { name: bytes_of(row, 2)?, mode: mode as u16, uid, gid, time, what })
}

/// Gives the directories what is in them, and sees that all hangs together.
fn place(
    builder: &mut Builder,
    numbers: &HashMap<i64, u32>,
    directories: &[(i64, u32, u32)],
) -> Result<(), Error> {
    for (ino, first, end) in directories {
        let Some(number) = numbers.get(ino).copied() else {
            return bad(format!("files in the directory {ino}, which is not there"));
        };
        if builder.node(number).kind != Kind::Directory {
            return bad(format!("files in {ino}, which is no directory"));
        }
        (*first..*end).for_each(|child| builder.set_parent(child, number));
        builder.close(number, *first..*end)?;
    }
    // What cannot be reached from the root is in a circle of directories.
    let mut reached = 1u32;
    let mut queue = vec![super::ROOT];
    let mut seen = vec![false; builder.len() as usize];
    while let Some(number) = queue.pop() {
        if std::mem::replace(&mut seen[number as usize], true) {
            return bad("a directory that is in itself");
        }
        for child in builder.children(number) {
            reached += 1;
            if builder.node(child).kind == Kind::Directory {
                queue.push(child);
            }
        }
    }
    match reached == builder.len() {
        true => Ok(()),
        false => bad("a directory that is in itself"),
    }
}

pub(super) fn write(
    mut out: impl Write,
    tree: &Tree<Pieces>,
    routes: &Routes,
    tags: &[(String, String)],
) -> Result<(), Error> {
    let mut db = database::new(SCHEMA)?;
    let transaction = db.transaction()?;
    {
        let mut numbers = HashMap::from([(String::new(), ROOT_INO)]);
        let mut inode = transaction
            .prepare("INSERT INTO inode VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?9)")?;
        let mut extra = transaction.prepare("INSERT INTO extra VALUES (?1, ?2)")?;
        let mut block = transaction.prepare("INSERT INTO block VALUES (?1, ?2, ?3)")?;
        let all = std::iter::once((String::new(), 0)).chain(tree.walk());
        for (number, (path, index)) in (ROOT_INO..).zip(all) {
            let node = &tree.nodes()[index];
            let (parent, name) = path.rsplit_once('/').unwrap_or(("", &path));
            let (parent, name) = match number {
                ROOT_INO => (0, "/"),
                _ => (numbers[parent], name),
            };
            let (kind, rdev) = match &node.kind {
                tree::Kind::Directory => (Kind::Directory, 0),
                tree::Kind::File { .. } => (Kind::File, 0),
                tree::Kind::Symlink(_) => (Kind::Symlink, 0),
                tree::Kind::Device { character: true, major, minor } => {
                    (Kind::CharDevice, rdev(*major, *minor))
                }
                tree::Kind::Device { character: false, major, minor } => {
                    (Kind::BlockDevice, rdev(*major, *minor))
                }
                tree::Kind::Fifo => (Kind::Fifo, 0),
            };
            let mode = kind.bits() | u32::from(node.mode);
            let size = node.size() as i64;
            inode.execute(params![
                number, parent, name, size, node.uid, node.gid, mode, rdev, node.time
            ])?;
            match &node.kind {
                tree::Kind::Symlink(target) => drop(extra.execute(params![number, target])?),
                tree::Kind::File { contents: Pieces { bytes, blocks }, .. } => {
                    if *bytes != BLOCK && (blocks.len() > 1 || node.size() > u64::from(BLOCK)) {
                        return bad(format!(
                            "{path}: its blocks hold {bytes} bytes, and those of an .fl {BLOCK}"
                        ));
                    }
                    for Block { id, key } in blocks {
                        block.execute(params![number, &**id, &**key])?;
                    }
                }
                tree::Kind::Directory => drop(numbers.insert(path, number)),
                tree::Kind::Device { .. } | tree::Kind::Fifo => {}
            }
        }
        for (key, value) in tags {
            transaction.execute("INSERT INTO tag VALUES (?1, ?2)", params![key, value])?;
        }
        for (start, end, url) in &routes.ranges {
            transaction
                .execute("INSERT INTO route VALUES (?1, ?2, ?3)", params![start, end, url])?;
        }
    }
    transaction.commit()?;
    Ok(out.write_all(&database::bytes(&mut db)?)?)
}

fn rdev(major: u32, minor: u32) -> i64 {
    let (major, minor) = (u64::from(major), u64::from(minor));
    let number =
        (major & 0xfff) << 8 | (major & !0xfff) << 32 | minor & 0xff | (minor & !0xff) << 12;
    number as i64
}
