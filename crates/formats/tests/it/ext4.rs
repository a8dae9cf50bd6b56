//! ext4 images: `e2fsck` finds nothing, `debugfs` finds everything, bytes repeat.

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Command, Output};

use lodge_formats::ext4::read::{self, Stream};
use lodge_formats::ext4::{Error, Options, Style, write_tar, write_tree};
use lodge_formats::tree::Kind;

fn options(size: u64) -> Options {
    Options {
        size,
        label: "test".into(),
        uuid: [7; 16],
        time: 1_700_000_000,
        style: Style::Ext4,
        boot: None,
    }
}

#[expect(clippy::disallowed_methods, reason = "a test runs the reference tools")]
fn tool(name: &str, args: &[&str]) -> Output {
    Command::new(name).args(args).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").output().unwrap()
}

fn header(path: &str, size: u64, kind: tar::EntryType) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_path(path).unwrap();
    header.set_size(size);
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(1000);
    header.set_gid(70_000);
    header.set_mtime(1_600_000_000);
    header.set_cksum();
    header
}

fn add(tar: &mut tar::Builder<Vec<u8>>, path: &str, content: &[u8]) {
    let header = header(path, content.len() as u64, tar::EntryType::Regular);
    tar.append(&header, content).unwrap();
}

fn link(tar: &mut tar::Builder<Vec<u8>>, path: &str, target: &str, kind: tar::EntryType) {
    let mut header = header(path, 0, kind);
    tar.append_link(&mut header, path, target).unwrap();
}

/// Something of everything: long and short links, holes, many names, attributes, devices.
fn archive() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    add(&mut tar, "./etc/hostname", b"lodge\n");
    add(&mut tar, "./big", &vec![0x5a; 20 << 20]);
    add(&mut tar, "./zeroes", &vec![0; 3 << 20]);
    add(&mut tar, "./empty", b"");
    for i in 0..700 {
        add(&mut tar, &format!("./many/a-file-with-a-rather-long-name-{i:04}"), &[b'x'; 10]);
    }
    link(&mut tar, "./short", "etc/hostname", tar::EntryType::Symlink);
    link(&mut tar, "./long", &"very/".repeat(15), tar::EntryType::Symlink);
    link(&mut tar, "./etc/same", "./etc/hostname", tar::EntryType::Link);
    let mut null = header("./dev/null", 0, tar::EntryType::Char);
    null.set_device_major(1).unwrap();
    null.set_device_minor(3).unwrap();
    null.set_cksum();
    tar.append(&null, &[][..]).unwrap();
    tar.append(&header("./pipe", 0, tar::EntryType::Fifo), &[][..]).unwrap();
    let pax = [("SCHILY.xattr.security.capability", &[1u8, 0, 0, 2, 0, 32, 0, 0][..])];
    tar.append_pax_extensions(pax).unwrap();
    add(&mut tar, "./bin/ping", b"#!");
    tar.into_inner().unwrap()
}

fn build(path: &Path, tar: &[u8], size: u64) -> Result<(), Error> {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(size).unwrap();
    write_tar(tar, file, &options(size), |_| {}).map(drop)
}

fn check(path: &Path) {
    let result = tool("e2fsck", &["-fn", path.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&result.stdout).into_owned();
    assert!(result.status.success(), "{text}{}", String::from_utf8_lossy(&result.stderr));
}

fn debugfs(path: &Path, request: &str) -> String {
    let result = tool("debugfs", &["-R", request, path.to_str().unwrap()]);
    String::from_utf8_lossy(&result.stdout).into_owned()
}

#[test]
fn the_reference_tools_find_no_fault_and_every_file() {
    let dir = tempfile::tempdir().unwrap();
    for size in [64 << 20, 300 << 20, 4_000_000_000 / 4096 * 4096, 40 << 30] {
        let path = dir.path().join(format!("{size}.img"));
        build(&path, &archive(), size).unwrap();
        check(&path);
        assert_eq!(debugfs(&path, "cat /etc/same"), "lodge\n");
        assert_eq!(debugfs(&path, "cat /big").len(), 20 << 20);
        assert!(debugfs(&path, "stat /etc/hostname").contains("Links: 2"));
        assert!(debugfs(&path, "stat /short").contains("Fast link dest: \"etc/hostname\""));
        assert!(debugfs(&path, "stat /dev/null").contains("Device major/minor number: 01:03"));
        assert!(debugfs(&path, "stat /bin/ping").contains("security.capability (8)"));
        assert!(debugfs(&path, "stat /empty").contains("Group: 70000"));
        assert!(debugfs(&path, "ls /many").contains("name-0699"));
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|name| {
        let path = dir.path().join(name);
        build(&path, &archive(), 64 << 20).unwrap();
        std::fs::read(path).unwrap()
    });
    assert!(a == b);
}

#[test]
fn holes_stay_holes() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    build(&path, &archive(), 40 << 30).unwrap();
    assert!(path.metadata().unwrap().blocks() * 512 < 60 << 20);
    let mut end = std::fs::File::open(&path).unwrap();
    assert_eq!(end.seek(SeekFrom::End(0)).unwrap(), 40 << 30);
    assert_eq!(end.read(&mut [0]).unwrap(), 0);
}

#[test]
fn what_cannot_be_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    assert!(matches!(build(&path, &archive(), 16 << 20), Err(Error::Full(_))));
    assert!(matches!(build(&path, &archive(), 5000), Err(Error::Size(5000))));
    let with = |entry: &dyn Fn(&mut tar::Builder<Vec<u8>>)| {
        let mut tar = tar::Builder::new(Vec::new());
        add(&mut tar, "./file", b"x");
        entry(&mut tar);
        build(&path, &tar.into_inner().unwrap(), 64 << 20).unwrap_err().to_string()
    };
    let twice = with(&|tar| add(tar, "file", b"y"));
    assert_eq!(twice, "file: appears twice in the archive");
    let below = with(&|tar| add(tar, "file/below", b"y"));
    assert_eq!(below, "file/below: lies below something that is no directory");
    let dangling = with(&|tar| link(tar, "hard", "nothing", tar::EntryType::Link));
    assert_eq!(dangling, "hard: links to nothing, which is no file");
    let outside = with(&|tar| {
        let mut header = header("x", 1, tar::EntryType::Regular);
        header.as_old_mut().name[..9].copy_from_slice(b"../../bad");
        header.set_cksum();
        tar.append(&header, &b"x"[..]).unwrap();
    });
    assert_eq!(outside, "../../bad: a path that leaves the root");
}

/// Reads an image and writes what it holds as another.
fn again(from: &Path, to: &Path, style: Style) -> read::Contents {
    let mut input = std::fs::File::open(from).unwrap();
    let contents = read::read(&mut input).unwrap();
    let out = std::fs::File::create(to).unwrap();
    out.set_len(contents.size).unwrap();
    let options = Options { style, ..options(contents.size) };
    let open = |_, pieces: &Vec<read::Piece>| {
        let mut bytes = Vec::new();
        Stream::new(&mut input, pieces).read_to_end(&mut bytes).map(|_| std::io::Cursor::new(bytes))
    };
    write_tree(&contents.tree, out, &options, open).unwrap();
    contents
}

#[test]
fn what_is_written_is_read_in_both_styles() {
    let dir = tempfile::tempdir().unwrap();
    let [first, second, third] = ["a", "b", "c"].map(|name| dir.path().join(name));
    build(&first, &archive(), 64 << 20).unwrap();
    again(&first, &second, Style::Ext3);
    check(&second);
    assert_eq!(debugfs(&second, "cat /etc/same"), "lodge\n");
    assert_eq!(debugfs(&second, "cat /big").len(), 20 << 20);
    assert!(!debugfs(&second, "show_super_stats").contains("extent"));
    let contents = again(&second, &third, Style::Ext4);
    check(&third);
    assert_eq!(contents.style, Style::Ext3);
    let tree = contents.tree;
    let ping = tree.get("bin/ping").unwrap();
    assert_eq!(ping.xattrs, [("security.capability".to_owned(), vec![1, 0, 0, 2, 0, 32, 0, 0])]);
    assert_eq!((ping.uid, ping.gid, ping.time), (1000, 70_000, 1_600_000_000));
    assert!(matches!(
        tree.get("dev/null").unwrap().kind,
        Kind::Device { character: true, major: 1, minor: 3 }
    ));
    assert_eq!(tree.names_of(tree.index_of("etc/same").unwrap()), 2);
    assert_eq!(debugfs(&third, "cat /big"), debugfs(&first, "cat /big"));
}

#[test]
fn what_the_reference_tool_makes_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    std::fs::create_dir_all(root.join("sub/deep")).unwrap();
    let big: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7) as u8).collect();
    std::fs::write(root.join("sub/big"), &big).unwrap();
    std::fs::write(root.join("sub/deep/small"), "small").unwrap();
    std::os::unix::fs::symlink("sub/deep", root.join("link")).unwrap();
    for (style, block) in
        [("ext2", "1024"), ("ext3", "4096"), ("ext3", "1024"), ("ext4", "1024"), ("ext4", "4096")]
    {
        let path = dir.path().join(format!("{style}-{block}"));
        std::fs::File::create(&path).unwrap().set_len(48 << 20).unwrap();
        let made = tool(
            "mke2fs",
            &["-q", "-t", style, "-b", block, "-d", root.to_str().unwrap(), path.to_str().unwrap()],
        );
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let mut input = std::fs::File::open(&path).unwrap();
        let tree = read::read(&mut input).unwrap().tree;
        let mut text = |path: &str| {
            let Kind::File { contents, .. } = &tree.find(path).unwrap().kind else { panic!() };
            let mut bytes = Vec::new();
            Stream::new(&mut input, contents).read_to_end(&mut bytes).unwrap();
            bytes
        };
        assert!(text("sub/big") == big, "{style} {block}");
        assert_eq!(text("link/small"), b"small");
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(300))]
    /// Bytes are changed where the tables are, not where nobody looks.
    #[test]
    fn no_bytes_make_the_reader_panic(changes: [(u16, u8); 12], block in 0_u64..30) {
        static IMAGE: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
            let mut tar = tar::Builder::new(Vec::new());
            add(&mut tar, "etc/a", &[1; 9000]);
            link(&mut tar, "long", &"very/".repeat(15), tar::EntryType::Symlink);
            let mut out = std::io::Cursor::new(Vec::new());
            let tar = tar.into_inner().unwrap();
            write_tar(&tar[..], &mut out, &options(16 << 20), |_| {}).unwrap();
            out.into_inner()
        });
        let mut bytes = IMAGE.clone();
        for (at, value) in changes {
            let place = match at % 3 {
                0 => 1024 + u64::from(at) % 1024,
                1 => 4096 + u64::from(at) % 64,
                _ => block * 4096 + u64::from(at) % 4096,
            };
            bytes[place as usize] = value;
        }
        let _ = read::read(std::io::Cursor::new(bytes));
    }
}
