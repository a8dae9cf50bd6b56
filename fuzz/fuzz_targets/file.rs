//! Files that people bring: archives and kernels, and what a file is at all. The first byte says
//! which of them the others are.

#![no_main]

use lodge_formats::tree::{self, Entry, Tree};
use lodge_formats::{cpio, kernel, mdata, sniff};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 5 {
        0 => archive(bytes),
        1 => {
            if let Ok(elf) = kernel::unpack(bytes) {
                look(&elf);
            }
            look(bytes);
        }
        2 => drop(sniff::kind(bytes)),
        4 => drop(cpio::to_tar(bytes, std::io::sink())),
        _ => drop(mdata::hear(bytes)),
    }
});

fn look(elf: &[u8]) {
    let _ = kernel::config(elf);
    let _ = kernel::has_pvh_entry(elf);
}

/// A path that is taken leads nowhere else.
fn archive(bytes: &[u8]) {
    let mut tree = Tree::new(0);
    let mut archive = tar::Archive::new(bytes);
    let Ok(entries) = archive.entries() else { return };
    for entry in entries.take(1000) {
        let Ok(mut entry) = entry else { return };
        match tree::read_entry(&mut entry) {
            Ok(Entry::Node(node)) => {
                assert!(!node.path.split('/').any(|part| part == ".."), "{:?}", node.path);
                let _ = tree.lay(node);
            }
            Ok(Entry::Link { path, target }) => drop(tree.lay_link(&path, &target)),
            Err(_) => {}
        }
    }
    for (path, index) in tree.walk() {
        assert!(tree.index_of(&path) == Some(index), "{path}");
    }
}
