//! Flists written and read again, and those of strangers that are refused.

use lodge_formats::flist::{self, BLOCK, Block, Cipher, Format, Kind, Pieces, Routes};
use lodge_formats::tree::{self, Node, Tree};
use rusqlite::Connection;

fn block(cipher: Cipher, byte: u8) -> Block {
    cipher.seal(&[byte; 9]).0
}

fn tree(cipher: Cipher) -> Tree<Pieces> {
    let mut tree = Tree::new(7);
    let file = |path: &str, size, blocks| {
        let contents = Pieces { bytes: BLOCK, blocks };
        Node::new(path, tree::Kind::File { size, contents }, 0o4755, 11)
    };
    let two = vec![block(cipher, 1), block(cipher, 2)];
    tree.insert(file("usr/bin/two", (512 << 10) + 9, two)).unwrap();
    tree.insert(file("usr/bin/empty", 0, vec![])).unwrap();
    let link = tree::Kind::Symlink(b"../bin/two".to_vec());
    tree.insert(Node::new("usr/bin/link", link, 0o777, 12)).unwrap();
    let device = tree::Kind::Device { character: true, major: 1, minor: 259 };
    tree.insert(Node { gid: 5, uid: 3, ..Node::new("dev/x", device, 0o620, 1) }).unwrap();
    let device = tree::Kind::Device { character: false, major: 8, minor: 1 };
    tree.insert(Node::new("dev/sda1", device, 0o660, 1)).unwrap();
    tree.insert(Node::new("run/pipe", tree::Kind::Fifo, 0o600, 1)).unwrap();
    for i in 0..1000 {
        tree.insert(file(&format!("many/f{i}"), 9, vec![block(cipher, i as u8)])).unwrap();
    }
    tree
}

fn written(format: Format) -> Vec<u8> {
    let mut out = Vec::new();
    let routes = Routes { ranges: vec![(0, 255, "dir:///x".into())], router: None };
    let tags = [("author".to_owned(), "me".to_owned())];
    flist::write(&mut out, format, &tree(format.cipher()), &routes, &tags).unwrap();
    out
}

#[test]
fn what_was_written_is_read() {
    for format in [Format::Flist, Format::Fl] {
        let bytes = written(format);
        assert_eq!(bytes, written(format), "the same bytes again");
        let read = flist::read(&bytes[..]).unwrap();
        assert_eq!((read.format, read.tags[0].1.as_str()), (format, "me"));
        let index = &read.index;
        let walk = |path: &str| {
            let parts = path.split('/').filter(|p| !p.is_empty());
            let mut parts = parts;
            parts.try_fold(0, |at, part| index.lookup(at, part.as_bytes()))
        };
        let node = |path: &str| index.node(walk(path).unwrap()).unwrap();
        let two = node("usr/bin/two");
        assert_eq!((two.kind, two.mode, two.size, two.time), (Kind::File, 0o4755, 524_297, 11));
        let blocks: Vec<Block> = index.blocks(two).map(|n| index.block(n)).collect();
        let cipher = format.cipher();
        assert_eq!(blocks, [block(cipher, 1), block(cipher, 2)]);
        assert_eq!(index.target(node("usr/bin/link")), b"../bin/two");
        let x = node("dev/x");
        assert_eq!((x.kind, x.device(), x.uid, x.gid), (Kind::CharDevice, (1, 259), 3, 5));
        assert_eq!(node("dev/sda1").kind, Kind::BlockDevice);
        assert_eq!(node("run/pipe").kind, Kind::Fifo);
        assert_eq!(index.children(node("many")).len(), 1000);
        assert_eq!(index.path(walk("many/f7").unwrap()), "many/f7");
        assert_eq!(walk("usr/none"), None);
        // Written anew it is the same.
        let mut again = Vec::new();
        let again_tree = index.to_tree().unwrap();
        flist::write(&mut again, format, &again_tree, &read.routes, &read.tags).unwrap();
        let again = flist::read(&again[..]).unwrap();
        assert_eq!(again.index.len(), index.len());
    }
}

/// A `.fl` after these statements.
fn changed(sql: &str) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), written(Format::Fl)).unwrap();
    Connection::open(file.path()).unwrap().execute_batch(sql).unwrap();
    let bytes = std::fs::read(file.path()).unwrap();
    match flist::read(&bytes[..]) {
        Ok(_) => "was read".into(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn rows_of_strangers_are_refused_case_28() {
    let two = "(SELECT ino FROM inode WHERE name = 'two')";
    for (sql, why) in [
        (format!("UPDATE block SET id = substr(id, 2) WHERE ino = {two}"), "31 and key of 32"),
        (format!("UPDATE inode SET size = 9 WHERE ino = {two}"), "9 bytes in 2 blocks"),
        (format!("UPDATE inode SET name = '..' WHERE ino = {two}"), "no name of a file"),
        (format!("UPDATE inode SET name = 'a/b' WHERE ino = {two}"), "no name of a file"),
        (format!("UPDATE inode SET name = '' WHERE ino = {two}"), "no name of a file"),
        ("UPDATE inode SET name = 'two' WHERE name = 'empty'".into(), "twice in one directory"),
        (
            "UPDATE inode SET parent = (SELECT ino FROM inode WHERE name = 'bin')
             WHERE name = 'usr'"
                .into(),
            "a directory that is in itself",
        ),
        ("UPDATE inode SET parent = 0 WHERE name = 'usr'".into(), "no root, or more than one"),
        (format!("UPDATE inode SET parent = {two} WHERE name = 'empty'"), "no directory"),
        ("UPDATE inode SET parent = 4711 WHERE name = 'usr'".into(), "which is not there"),
        ("UPDATE inode SET mode = 0 WHERE name = 'usr'".into(), "unknown mode"),
        (format!("UPDATE inode SET size = -1 WHERE ino = {two}"), "negative size"),
        ("DROP TABLE block".into(), "no table block"),
        (
            "DROP TABLE block; CREATE VIEW block AS WITH RECURSIVE c(id) AS (VALUES (1) UNION ALL
             SELECT id FROM c) SELECT id, id AS key, id AS ino FROM c"
                .into(),
            "no table block",
        ),
    ] {
        let said = changed(&sql);
        assert!(said.contains(why), "{sql}\n{said}");
    }
}

fn archive(members: &[(&str, &[u8], tar::EntryType)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, bytes, kind) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_entry_type(*kind);
        // `append_data` would refuse what is asked for here.
        let field = &mut header.as_old_mut().name;
        field[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        archive.append(&header, *bytes).unwrap();
    }
    archive.into_inner().unwrap()
}

#[test]
fn archives_of_strangers_are_refused_case_27() {
    use tar::EntryType::{Regular, Symlink};
    for (members, why) in [
        (vec![("../evil", &b"x"[..], Regular)], "leaves the root"),
        (vec![("/etc/evil", b"x", Regular)], "absolute path"),
        (vec![("flistdb.sqlite3", b"", Symlink)], "of the kind Symlink"),
        (
            vec![("flistdb.sqlite3", b"x", Regular), ("./flistdb.sqlite3", b"x", Regular)],
            "two databases",
        ),
        (vec![("other", b"x", Regular)], "no part of an flist"),
        (vec![("router.yaml", b"x", Regular)], "holds no flistdb.sqlite3"),
        (vec![("flistdb.sqlite3", b"no database", Regular)], "not a database"),
    ] {
        let error = flist::read(&archive(&members)[..]).unwrap_err().to_string();
        assert!(error.contains(why), "{members:?}: {error}");
    }
}

#[test]
fn legacy_flists_are_named_case_31() {
    let bytes = archive(&[("CURRENT", b"MANIFEST-000001\n", tar::EntryType::Regular)]);
    let error = flist::read(&bytes[..]).unwrap_err().to_string();
    assert!(error.contains("RocksDB flist"), "{error}");
}

/// The database of a `.flist` after these statements, packed again.
fn repacked(change: impl Fn(&Connection)) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    let bytes = written(Format::Flist);
    let mut archive_in = tar::Archive::new(flate2::read::GzDecoder::new(&bytes[..]));
    let mut entry = archive_in.entries().unwrap().next().unwrap().unwrap();
    std::io::copy(&mut entry, &mut file.as_file()).unwrap();
    change(&Connection::open(file.path()).unwrap());
    let bytes = std::fs::read(file.path()).unwrap();
    let bytes = archive(&[("flistdb.sqlite3", &bytes, tar::EntryType::Regular)]);
    match flist::read(&bytes[..]) {
        Ok(_) => "was read".into(),
        Err(error) => error.to_string(),
    }
}

const ROOT: &str = "cae66941d9efbd404e4d88758ea67670";
const USR_BIN: &str = "46c939da162118cf47886fe40f8b5600";

#[test]
fn messages_of_strangers_are_refused_case_26() {
    let run = |sql: String| repacked(move |db| db.execute_batch(&sql).unwrap());
    let said = run(format!("DELETE FROM entries WHERE key = '{ROOT}'"));
    assert!(said.contains("is missing"), "{said}");
    let said = run(format!("DELETE FROM entries WHERE key = '{USR_BIN}'"));
    assert!(said.contains("is missing"), "{said}");
    // The root in place of one of its descendants: a circle.
    let said = run(format!(
        "UPDATE entries SET value = (SELECT value FROM entries WHERE key = '{ROOT}')
         WHERE key = '{USR_BIN}'"
    ));
    assert!(said.contains("in two places, or in itself"), "{said}");
    let said = run(format!("UPDATE entries SET value = substr(value, 1, 40) WHERE key = '{ROOT}'"));
    assert!(said.contains("message in its database"), "{said}");
    // Its contents: half a milliard structs of no size, a count beyond the segment, a pointer out
    // of it.
    let root =
        |contents: u64, tag: u64| [0, 0x0005_0002_0000_0000, 0, 0, 0, 0, contents, 0, 0, tag];
    for root in [
        root(0x0000_0007_0000_0009, 0x0000_0000_7fff_fffc),
        root(0xffff_fff7_0000_0009, 0x0000_0000_7fff_fffc),
        root(0x0000_000f_8000_0001, 0),
    ] {
        let mut bytes = (root.len() as u64 - 1).to_le_bytes().to_vec();
        bytes.rotate_right(4);
        bytes.extend(root[1..].iter().flat_map(|word| word.to_le_bytes()));
        let said = repacked(|db| {
            db.execute("UPDATE entries SET value = ?1 WHERE key = ?2", (&bytes, ROOT))
                .map(drop)
                .unwrap();
        });
        assert!(
            said.contains("message in its database") || said.contains("no name of a file"),
            "{said}"
        );
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    #[test]
    fn damaged_flists_are_answered(at in 0usize..60_000, bit in 0u8..8, fl: bool) {
        let mut bytes = if fl { written(Format::Fl) } else { written(Format::Flist) };
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        // An answer, whichever: no panic, no endless loop.
        let _ = flist::read(&bytes[..]);
    }
}

#[test]
fn blocks_keep_the_size_that_they_were_cut_to() {
    let of = |cipher: Cipher, bytes: u32, size: u64| {
        let blocks = (0..size.div_ceil(u64::from(bytes))).map(|n| block(cipher, n as u8));
        let contents = Pieces { bytes, blocks: blocks.collect() };
        let mut tree = Tree::new(7);
        tree.insert(Node::new("f", tree::Kind::File { size, contents }, 0o644, 1)).unwrap();
        tree
    };
    let write = |format: Format, tree: &Tree<Pieces>| {
        let mut out = Vec::new();
        flist::write(&mut out, format, tree, &Routes::default(), &[]).map(|()| out)
    };
    for bytes in [64 << 10, 128 << 10, BLOCK, 1 << 20] {
        let out = write(Format::Flist, &of(Cipher::Xxtea, bytes, 3 << 20)).unwrap();
        let read = flist::read(&out[..]).unwrap();
        let node = read.index.node(read.index.lookup(0, b"f").unwrap()).unwrap();
        assert_eq!(node.block_size(), bytes);
        assert_eq!(read.index.blocks(node).len() as u32, (3 << 20) / bytes);
        // Merged or repacked, it is read as it was.
        let again = write(Format::Flist, &read.index.to_tree().unwrap()).unwrap();
        assert_eq!(again, out);
    }
    // The newer format knows one size; what fits into one of its blocks is the same in each.
    let refused = write(Format::Fl, &of(Cipher::AesGcm, 128 << 10, 3 << 20)).unwrap_err();
    assert!(refused.to_string().contains("its blocks hold 131072 bytes"), "{refused}");
    assert!(write(Format::Fl, &of(Cipher::AesGcm, 1 << 20, 1 << 20)).is_err());
    write(Format::Fl, &of(Cipher::AesGcm, 128 << 10, 9)).unwrap();
}
