//! SQLite databases in memory: those of strangers opened so that they can do nothing but answer,
//! own ones made so that the same rows give the same bytes.

use std::io::Cursor;

use rusqlite::config::DbConfig;
use rusqlite::limits::Limit;
use rusqlite::{Connection, MAIN_DB};

use super::{Error, bad};

/// Steps of SQLite's machine for one database; a query that needs more was made to hang.
const MAX_STEPS: u64 = 4_000_000_000;

/// Opens a database that a stranger wrote. All of these must be its tables; of these that may be
/// absent, the ones that are there.
pub(super) fn open(
    bytes: &[u8],
    tables: &[&str],
    perhaps: &[&str],
) -> Result<(Connection, Vec<String>), Error> {
    let mut db = Connection::open_in_memory()?;
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_VIEW, false)?;
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
    db.deserialize_read_exact(MAIN_DB, Cursor::new(bytes), bytes.len(), true)?;
    db.set_limit(Limit::SQLITE_LIMIT_LENGTH, 64 << 20)?;
    db.pragma_update(None, "cell_size_check", true)?;
    let mut steps = 0u64;
    db.progress_handler(
        100_000,
        Some(move || {
            steps += 100_000;
            steps > MAX_STEPS
        }),
    )?;
    let mut found = Vec::new();
    {
        let mut query = db.prepare("SELECT name, type FROM sqlite_master")?;
        let mut rows = query.query([])?;
        while let Some(row) = rows.next()? {
            let (name, kind): (String, String) = (row.get(0)?, row.get(1)?);
            if kind == "table" && (tables.contains(&&*name) || perhaps.contains(&&*name)) {
                found.push(name);
            }
        }
    }
    if let Some(missing) = tables.iter().find(|t| !found.iter().any(|f| f == *t)) {
        return bad(format!("its database has no table {missing}"));
    }
    Ok((db, found))
}

/// A database to be written.
pub(super) fn new(schema: &str) -> Result<Connection, Error> {
    let db = Connection::open_in_memory()?;
    db.pragma_update(None, "page_size", 4096)?;
    db.execute_batch(schema)?;
    Ok(db)
}

pub(super) fn bytes(db: &mut Connection) -> Result<Vec<u8>, Error> {
    Ok(db.serialize(MAIN_DB)?.to_vec())
}
