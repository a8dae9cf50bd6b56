//! Reads files of the host ahead of whoever writes them, several at once, in the order in which
//! they are wanted.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Cursor, Read};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};

use lodge_formats::tree::{Kind, Tree};

use super::content::{Content, Opened};

/// Larger files are read when their turn comes.
const SMALL: u64 = 1 << 20;
/// So many files are taken by a reader at once, and so many lie ready at most.
const BATCH: usize = 64;
const READY: usize = 64;

struct Wanted {
    path: PathBuf,
    size: u64,
}

/// Batches of files, each read or still to be.
struct State {
    /// Number of the next batch that a reader takes.
    next: usize,
    /// Number of the batch that is handed out.
    shown: usize,
    ready: Vec<Option<Vec<io::Result<Vec<u8>>>>>,
    over: bool,
}

struct Shared {
    batches: Vec<Vec<Wanted>>,
    state: Mutex<State>,
    changed: Condvar,
}

/// The contents of a tree's files, one after the other.
pub(super) struct Ahead {
    shared: Arc<Shared>,
    batch: VecDeque<io::Result<Vec<u8>>>,
    number: usize,
    readers: Vec<std::thread::JoinHandle<()>>,
}

pub(super) enum Bytes {
    Read(Cursor<Vec<u8>>),
    Opened(Opened),
}

impl Read for Bytes {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Bytes::Read(bytes) => bytes.read(buffer),
            Bytes::Opened(opened) => opened.read(buffer),
        }
    }
}

impl Ahead {
    /// Begins to read what `open` will be asked for: the tree's files in the order of their names.
    pub(super) fn new(tree: &Tree<Content>) -> Self {
        let mut seen = std::collections::HashSet::new();
        let mut wanted = Vec::new();
        for (_, index) in tree.walk() {
            if tree.names_of(index) > 1 && !seen.insert(index) {
                continue;
            }
            if let Kind::File { size: size @ 1..=SMALL, contents: Content::Path(path) } =
                &tree.nodes()[index].kind
            {
                wanted.push(Wanted { path: path.clone(), size: *size });
            }
        }
        let mut batches: Vec<Vec<Wanted>> = Vec::new();
        for file in wanted {
            match batches.last_mut() {
                Some(batch) if batch.len() < BATCH => batch.push(file),
                _ => batches.push(vec![file]),
            }
        }
        let ready = batches.iter().map(|_| None).collect();
        let state = Mutex::new(State { next: 0, shown: 0, ready, over: false });
        let shared = Arc::new(Shared { batches, state, changed: Condvar::new() });
        let threads = match shared.batches.len() {
            // Not worth a thread.
            0 | 1 => 0,
            _ => std::thread::available_parallelism().map_or(1, usize::from).min(8),
        };
        let reader = |_| {
            let shared = shared.clone();
            std::thread::spawn(move || shared.read())
        };
        let readers = (0..threads).map(reader).collect();
        Self { shared, batch: VecDeque::new(), number: 0, readers }
    }

    /// A file's contents. Called in the order of the files' names.
    pub(super) fn open(&mut self, size: u64, content: &Content) -> io::Result<Bytes> {
        let Content::Path(path) = content else { return content.open().map(Bytes::Opened) };
        if size > SMALL {
            return content.open().map(Bytes::Opened);
        }
        if self.batch.is_empty() {
            self.batch = match self.readers.is_empty() {
                true => self.shared.take(self.number),
                false => self.shared.wait(self.number),
            }
            .into();
            self.number += 1;
        }
        let bytes = self.batch.pop_front().unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()));
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
        bytes.map(|bytes| Bytes::Read(Cursor::new(bytes))).map_err(named)
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.shared.state.lock().expect("not poisoned").over = true;
        self.shared.changed.notify_all();
        for reader in self.readers.drain(..) {
            // A reader that failed has left its files unread, which was noticed.
            let _ = reader.join();
        }
    }
}

impl Shared {
    fn read(&self) {
        loop {
            let number = {
                let mut state = self.state.lock().expect("not poisoned");
                while !state.over
                    && state.next < self.batches.len()
                    && state.next >= state.shown + READY
                {
                    state = self.changed.wait(state).expect("not poisoned");
                }
                if state.over || state.next >= self.batches.len() {
                    return;
                }
                state.next += 1;
                state.next - 1
            };
            let bytes = self.take(number);
            self.state.lock().expect("not poisoned").ready[number] = Some(bytes);
            self.changed.notify_all();
        }
    }

    fn take(&self, number: usize) -> Vec<io::Result<Vec<u8>>> {
        self.batches.get(number).into_iter().flatten().map(read_one).collect()
    }

    fn wait(&self, number: usize) -> Vec<io::Result<Vec<u8>>> {
        let mut state = self.state.lock().expect("not poisoned");
        state.shown = number;
        self.changed.notify_all();
        loop {
            match state.ready.get_mut(number) {
                None => return Vec::new(),
                Some(slot) => {
                    if let Some(bytes) = slot.take() {
                        return bytes;
                    }
                }
            }
            state = self.changed.wait(state).expect("not poisoned");
        }
    }
}

fn read_one(file: &Wanted) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(file.size as usize);
    File::open(&file.path)?.take(file.size).read_to_end(&mut bytes)?;
    Ok(bytes)
}
