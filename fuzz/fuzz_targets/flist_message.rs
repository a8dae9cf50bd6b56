//! Messages: the bytes are those of the root directory in an archive that is right otherwise.

#![no_main]

use lodge_formats::flist;
use rusqlite::{Connection, MAIN_DB};

/// The key of the root directory.
const ROOT: &str = "cae66941d9efbd404e4d88758ea67670";

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut db = Connection::open_in_memory().expect("in memory");
    db.execute_batch("CREATE TABLE entries (key VARCHAR(64) PRIMARY KEY, value BLOB)")
        .expect("a table");
    db.execute("INSERT INTO entries VALUES (?1, ?2)", (ROOT, bytes)).expect("a row");
    let database = db.serialize(MAIN_DB).expect("its bytes").to_vec();
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(database.len() as u64);
    header.set_mode(0o644);
    archive.append_data(&mut header, "flistdb.sqlite3", &database[..]).expect("a member");
    let _ = flist::read(&archive.into_inner().expect("an archive")[..]);
});
