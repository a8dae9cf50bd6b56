//! Disks: the bytes say what is changed in one that is right otherwise, an ext4 file system or a
//! qcow2 image.

#![no_main]

use std::io::{Cursor, Read, Seek, SeekFrom, Write};
use std::sync::{LazyLock, Mutex};

use lodge_formats::ext4::{self, Options, Style};
use lodge_formats::qcow2::volume;
use lodge_formats::tree::{Kind, Node, Tree};

fn file_system() -> Vec<u8> {
    let mut tree = Tree::new(0);
    for folder in ["etc", "etc/deep"] {
        tree.insert(Node::new(folder, Kind::Directory, 0o755, 0)).expect("a folder");
    }
    for (path, size) in [("etc/small", 10), ("etc/deep/large", 70_000), ("name", 5000)] {
        let kind = Kind::File { contents: (), size };
        tree.insert(Node::new(path, kind, 0o644, 0)).expect("a file");
    }
    let size = 64 << 20;
    let options = Options { size, label: "x".into(), uuid: [7; 16], time: 0, style: Style::Ext4, boot: None };
    let mut out = Cursor::new(vec![0; size as usize]);
    ext4::write_tree(&tree, &mut out, &options, |size, ()| Ok(std::io::repeat(3).take(size)))
        .expect("is written");
    out.into_inner()
}

fn image() -> Vec<u8> {
    let mut writer = volume::Writer::new(Cursor::new(Vec::new()), 1 << 30);
    for at in [0, 1 << 20, 1 << 29] {
        writer.seek(SeekFrom::Start(at)).expect("a place");
        writer.write_all(&[5; 3000]).expect("is written");
    }
    writer.finish().expect("is written").into_inner()
}

static FILE_SYSTEM: LazyLock<Mutex<Vec<u8>>> = LazyLock::new(|| Mutex::new(file_system()));
static IMAGE: LazyLock<Mutex<Vec<u8>>> = LazyLock::new(|| Mutex::new(image()));

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((kind, changes)) = bytes.split_first() else { return };
    let disk = if kind % 2 == 0 { &FILE_SYSTEM } else { &IMAGE };
    let mut disk = disk.lock().expect("one thread");
    let length = disk.len();
    let mut undo = Vec::new();
    for change in changes.chunks_exact(5) {
        let at = u32::from_le_bytes([change[0], change[1], change[2], 0]) as usize;
        for (at, byte) in [(at % length, change[3]), ((at + 1) % length, change[4])] {
            undo.push((at, std::mem::replace(&mut disk[at], byte)));
        }
    }
    match kind % 2 {
        0 => drop(ext4::read::read(&mut Cursor::new(&disk[..]))),
        _ => look(&disk),
    }
    for (at, byte) in undo.into_iter().rev() {
        disk[at] = byte;
    }
});

fn look(disk: &[u8]) {
    let Ok(mut reader) = volume::Reader::open(Cursor::new(disk)) else { return };
    for at in [0, 1 << 20, 1 << 29] {
        let _ = reader.seek(SeekFrom::Start(at));
        let _ = reader.read(&mut [0; 5000]);
    }
}
