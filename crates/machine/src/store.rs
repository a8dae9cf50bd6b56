//! What outlives the daemon, in SQLite. One thread owns the connection; jobs that wait while it
//! commits are committed together, each in a savepoint of its own, so durability costs one flush
//! however many ask at once. Knows rows, not machines.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{SystemTime, UNIX_EPOCH};

use lodge_spec::names::MachineId;
use lodge_spec::state::Event;
use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::oneshot;

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS machines (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, record TEXT NOT NULL
    ) STRICT;
    CREATE TABLE IF NOT EXISTS events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, at_us INTEGER NOT NULL, id TEXT NOT NULL,
        name TEXT NOT NULL, kind TEXT NOT NULL, detail TEXT NOT NULL
    ) STRICT;
    CREATE INDEX IF NOT EXISTS events_by_machine ON events (id, seq);
    CREATE TABLE IF NOT EXISTS images (
        name TEXT PRIMARY KEY, manifest TEXT NOT NULL
    ) STRICT;
    CREATE TABLE IF NOT EXISTS leases (
        network TEXT NOT NULL, address INTEGER NOT NULL, mac TEXT NOT NULL, id TEXT NOT NULL,
        PRIMARY KEY (network, address), UNIQUE (network, mac)
    ) STRICT;
";

/// Events beyond this many are dropped, oldest first.
const KEPT_EVENTS: i64 = 100_000;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{} is in use by another lodge daemon", .0.display())]
    Locked(PathBuf),
    #[error("cannot use {path}: {source}", path = .path.display())]
    Open { path: PathBuf, source: std::io::Error },
    #[error("the store cannot be read or written: {0}")]
    Sqlite(#[from] rusqlite::Error),
    #[error("the store is closed")]
    Closed,
}

type Job = Box<dyn FnOnce(&Connection) -> Reply + Send>;
/// Called after the commit, with its outcome.
type Reply = Box<dyn FnOnce(Result<(), String>) + Send>;

/// A handle to the store; clones share the one thread.
#[derive(Clone)]
pub struct Store {
    jobs: mpsc::Sender<Job>,
    // Held open for its lock; the last handle releases it.
    _lock: std::sync::Arc<std::fs::File>,
}

/// A machine's row as it lies in the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub id: String,
    pub name: String,
    pub record: String,
}

/// Microseconds since 1970-01-01 UTC.
pub fn now_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

impl Store {
    /// Opens the store in `dir`, which must exist. Only one process can.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let lock_path = dir.join("lodge.lock");
        let open = |source| StoreError::Open { path: lock_path.clone(), source };
        let options =
            std::fs::File::options().create(true).truncate(false).write(true).open(&lock_path);
        let lock = options.map_err(open)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                return Err(StoreError::Locked(dir.to_owned()));
            }
            Err(std::fs::TryLockError::Error(e)) => return Err(open(e)),
        }
        let connection = Connection::open(dir.join("lodge.db"))?;
        // Nobody else opens it, so nothing needs to be shared through a mapped file, which a full
        // disk would turn into a signal.
        connection.execute_batch(
            "PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;
             PRAGMA cache_size=-512;",
        )?;
        connection.execute_batch(SCHEMA)?;
        let (jobs, queue) = mpsc::channel();
        let spawned = std::thread::Builder::new().name("store".into()).stack_size(256 << 10);
        let lock = std::sync::Arc::new(lock);
        spawned.spawn(move || serve(connection, &queue)).map_err(open)?;
        Ok(Self { jobs, _lock: lock })
    }

    /// Runs `work` in a transaction and waits until it is durable.
    pub async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (sender, receiver) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            let result = in_savepoint(connection, work);
            Box::new(move |committed| {
                let failed = |why| rusqlite::Error::ToSqlConversionFailure(why);
                let result = match committed {
                    Ok(()) => result,
                    Err(why) => result.and(Err(failed(why.into()))),
                };
                // Whoever asked may have gone away.
                let _ = sender.send(result);
            })
        });
        self.jobs.send(job).map_err(|_| StoreError::Closed)?;
        Ok(receiver.await.map_err(|_| StoreError::Closed)??)
    }

    /// All machines, in the order of their creation.
    pub async fn machines(&self) -> Result<Vec<Row>, StoreError> {
        self.write(|c| {
            let mut all = c.prepare("SELECT id, name, record FROM machines ORDER BY rowid")?;
            let rows = all.query_map([], |r| {
                Ok(Row { id: r.get(0)?, name: r.get(1)?, record: lossy(r, 2)? })
            })?;
            rows.collect()
        })
        .await
    }

    /// Events after `seq`, the oldest first, at most `limit`; of one machine or of all.
    pub async fn events(
        &self,
        of: Option<String>,
        seq: i64,
        limit: u32,
    ) -> Result<Vec<Event>, StoreError> {
        self.write(move |c| {
            let mut query = c.prepare_cached(
                "SELECT * FROM (SELECT seq, at_us, id, name, kind, detail FROM events
                 WHERE seq > ?1 AND (?2 IS NULL OR id = ?2 OR name = ?2)
                 ORDER BY seq DESC LIMIT ?3) ORDER BY seq",
            )?;
            let rows = query.query_map(params![seq, of, limit], |r| {
                let id: String = r.get(2)?;
                Ok(Event {
                    seq: r.get(0)?,
                    at_us: r.get(1)?,
                    id: id.parse().unwrap_or(MachineId(Default::default())),
                    name: r.get(3)?,
                    kind: r.get(4)?,
                    detail: r.get(5)?,
                })
            })?;
            rows.collect()
        })
        .await
    }
}

/// Text that may have been damaged on disk; it is judged later.
fn lossy(row: &rusqlite::Row<'_>, index: usize) -> rusqlite::Result<String> {
    Ok(match row.get_ref(index)? {
        rusqlite::types::ValueRef::Text(bytes) | rusqlite::types::ValueRef::Blob(bytes) => {
            String::from_utf8_lossy(bytes).into_owned()
        }
        rusqlite::types::ValueRef::Null
        | rusqlite::types::ValueRef::Integer(_)
        | rusqlite::types::ValueRef::Real(_) => String::new(),
    })
}

/// Inserts or replaces a machine's row.
pub fn put_machine(c: &Connection, row: &Row) -> rusqlite::Result<()> {
    c.prepare_cached(
        "INSERT INTO machines (id, name, record) VALUES (?1, ?2, ?3)
         ON CONFLICT (id) DO UPDATE SET name = ?2, record = ?3",
    )?
    .execute(params![row.id, row.name, row.record])
    .map(drop)
}

/// Deletes a machine's row and its leases.
pub fn delete_machine(c: &Connection, id: &str) -> rusqlite::Result<()> {
    c.prepare_cached("DELETE FROM machines WHERE id = ?1")?.execute([id])?;
    c.prepare_cached("DELETE FROM leases WHERE id = ?1")?.execute([id]).map(drop)
}

/// Appends an event; gives it its number.
pub fn put_event(c: &Connection, mut event: Event) -> rusqlite::Result<Event> {
    c.prepare_cached(
        "INSERT INTO events (at_us, id, name, kind, detail) VALUES (?1, ?2, ?3, ?4, ?5)",
    )?
    .execute(params![
        event.at_us,
        event.id.to_string(),
        event.name,
        event.kind,
        event.detail
    ])?;
    event.seq = c.last_insert_rowid();
    if event.seq % 1000 == 0 {
        c.execute("DELETE FROM events WHERE seq <= ?1", [event.seq - KEPT_EVENTS])?;
    }
    Ok(event)
}

/// The lease of `mac` on `network`: the one it has, the one it wants, or the first that is free
/// between `first` and `last`. `None`: it is taken, or none is free.
pub fn lease(
    c: &Connection,
    network: &str,
    mac: &str,
    id: &str,
    wanted: Option<u32>,
    range: (u32, u32),
) -> rusqlite::Result<Option<u32>> {
    let held: Option<u32> = c
        .prepare_cached("SELECT address FROM leases WHERE network = ?1 AND mac = ?2")?
        .query_row(params![network, mac], |r| r.get(0))
        .optional()?;
    if let Some(held) = held.filter(|held| wanted.is_none_or(|w| w == *held)) {
        return Ok(Some(held));
    }
    let taken = |address: u32| -> rusqlite::Result<bool> {
        c.prepare_cached("SELECT 1 FROM leases WHERE network = ?1 AND address = ?2")?
            .exists(params![network, address])
    };
    let free = match wanted {
        Some(address) => (!taken(address)?).then_some(address),
        None => {
            let mut free = None;
            for address in range.0..=range.1 {
                if !taken(address)? {
                    free = Some(address);
                    break;
                }
            }
            free
        }
    };
    if let Some(address) = free {
        c.prepare_cached("DELETE FROM leases WHERE network = ?1 AND mac = ?2")?
            .execute(params![network, mac])?;
        c.prepare_cached("INSERT INTO leases (network, address, mac, id) VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![network, address, mac, id])?;
    }
    Ok(free)
}

/// Gives back what a machine's interfaces that are no more had.
pub fn release_leases(c: &Connection, id: &str, macs: &[String]) -> rusqlite::Result<()> {
    let mut held = c.prepare_cached("SELECT network, mac FROM leases WHERE id = ?1")?;
    let held: Vec<(String, String)> =
        held.query_map([id], |r| Ok((r.get(0)?, r.get(1)?)))?.collect::<Result<_, _>>()?;
    for (network, mac) in held.iter().filter(|(_, mac)| !macs.contains(mac)) {
        c.prepare_cached("DELETE FROM leases WHERE network = ?1 AND mac = ?2 AND id = ?3")?
            .execute(params![network, mac, id])?;
    }
    Ok(())
}

fn in_savepoint<T>(
    c: &Connection,
    work: impl FnOnce(&Connection) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    c.execute_batch("SAVEPOINT job")?;
    let result = work(c);
    c.execute_batch(match result {
        Ok(_) => "RELEASE job",
        Err(_) => "ROLLBACK TO job; RELEASE job",
    })?;
    result
}

fn serve(connection: Connection, queue: &mpsc::Receiver<Job>) {
    while let Ok(first) = queue.recv() {
        let begun = connection.execute_batch("BEGIN IMMEDIATE");
        let mut replies = vec![first(&connection)];
        replies.extend(queue.try_iter().take(256).map(|job| job(&connection)));
        let committed = begun.and_then(|()| connection.execute_batch("COMMIT"));
        if committed.is_err() && !connection.is_autocommit() {
            // Nothing of this batch is kept; the jobs are told.
            let _ = connection.execute_batch("ROLLBACK");
        }
        let outcome = committed.map_err(|e| e.to_string());
        for reply in replies {
            reply(outcome.clone());
        }
    }
}
