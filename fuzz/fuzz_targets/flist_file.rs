//! Whole files: databases of rows, archives with a database, and whatever else may come.

#![no_main]

use lodge_formats::flist;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(read) = flist::read(bytes) else { return };
    // What was taken is whole: every part of it can be asked for.
    let index = &read.index;
    for number in 0..index.len() {
        let node = index.node(number).expect("in range");
        index.name(node);
        index.target(node);
        index.children(node).for_each(|child| assert!(index.node(child).is_some()));
        index.blocks(node).for_each(|block| drop(index.block(block)));
        index.path(number);
    }
    let Ok(tree) = index.to_tree() else { return };
    let mut again = Vec::new();
    flist::write(&mut again, read.format, &tree, &read.routes, &read.tags).expect("is written");
});
