//! The process behind a machine's root: confined, it reads the flist, fetches blocks and answers
//! the file system's requests. Its standard input says what to do, its standard output that it is
//! ready; what guests could not be given is said on its standard error.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};
use lodge_formats::flist::{self, Flist, Format};
use lodge_jail::worker::{self, WorkerPlan};
use serde::{Deserialize, Serialize};

use super::cache::Cache;
use super::fetch::{self, Fetcher};
use super::fuse::{Fuse, View};
use super::tree::Tree;
use super::{prepare, virtio};

/// The first argument of a process that is one of these; the second is the flist, for those who
/// look at processes.
pub const WORD: &str = "flistd";
/// A guest's request waits for a block no longer than this.
const PATIENCE: Duration = Duration::from_secs(20);
/// What is read in this time after the start is fetched ahead at the next.
const START: Duration = Duration::from_secs(60);
/// Requests that are answered at once; all but a few of these wait for stores.
pub(super) const THREADS: usize = 24;
/// As large as a request can be, with room for its head.
const REQUEST: usize = (1 << 20) + 4096;
/// Complaints that are written down; a guest could cause any number.
const MAX_COMPLAINTS: u32 = 1000;

/// What the process is to serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    pub flist: PathBuf,
    pub cache: PathBuf,
    /// The machine's own changes.
    pub layer: PathBuf,
    /// A store to ask before those that the flist names.
    pub store: Option<String>,
    /// The user to become, for root.
    pub uid: Option<u32>,
    pub task: Task,
}

impl Config {
    /// The root is a mount, which the hypervisor's jail makes.
    pub fn is_mounted(&self) -> bool {
        matches!(self.task, Task::Fuse { .. })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Task {
    /// Puts files in and takes out what boots. Answers with `prepare::Found`.
    Prepare(prepare::Order),
    /// Serves the tree to QEMU's 9p server, which runs as this user, over the FUSE device that
    /// comes over the descriptor.
    Fuse { socket: i32, owner: u32 },
    /// Serves the tree as a virtio-fs device to the hypervisor that connects to this descriptor.
    VirtioFs { socket: i32 },
}

/// What the process says once: `Ok` with what was found, if anything was looked for.
pub type Said = Result<Option<prepare::Found>, String>;

/// The user of these processes, where root starts them.
pub const UID: u32 = 0x6bff_ffff;

static LAST: Mutex<String> = Mutex::new(String::new());

/// What was last complained about, for those who are told only that something failed.
pub(super) fn last_complaint() -> String {
    LAST.lock().expect("not poisoned").clone()
}

pub(super) fn complain(path: &str, number: u32, why: &str) {
    static SAID: AtomicU32 = AtomicU32::new(0);
    *LAST.lock().expect("not poisoned") = why.to_owned();
    if SAID.fetch_add(1, Ordering::Relaxed) < MAX_COMPLAINTS {
        let _ = writeln!(io::stderr(), "{path}: block {number}: {why}");
    }
}

/// The whole of a process that `WORD` starts.
pub fn main() -> ExitCode {
    let mut text = String::new();
    let said = match io::stdin().read_to_string(&mut text) {
        Ok(_) => serde_json::from_str(&text).map_err(|e| format!("reading the order: {e}")),
        Err(error) => Err(format!("reading the order: {error}")),
    };
    let done = said.and_then(|config: Config| run(&config));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            say(&Err(why));
            ExitCode::FAILURE
        }
    }
}

fn say(said: &Said) {
    let line = serde_json::to_string(said).unwrap_or_default();
    // Whoever started us may be gone.
    let _ = writeln!(io::stdout(), "{line}");
}

fn run(config: &Config) -> Result<(), String> {
    close_others(match config.task {
        Task::Prepare(_) => None,
        Task::Fuse { socket, .. } | Task::VirtioFs { socket } => Some(socket),
    });
    // What a guest writes is its machine's alone.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    // SAFETY: sets one number of the allocator. Threads that wait for stores need no heap each.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 2) };
    let mut plan = WorkerPlan {
        uid: config.uid,
        readable: vec![config.flist.clone()],
        writable: vec![config.cache.clone(), config.layer.clone()],
    };
    if let Task::Prepare(order) = &config.task {
        plan.writable.push(order.out.clone());
    }
    // A store that is a folder of this host.
    let folder = |url: &str| url.strip_prefix("dir://").map(PathBuf::from);
    plan.readable.extend(config.store.as_deref().and_then(folder));
    worker::confine(&plan).map_err(|e| e.to_string())?;
    // Set after the identity has changed, which would clear it.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
        .map_err(|e| e.to_string())?;
    let tree = Arc::new(open(config)?);
    match &config.task {
        Task::Prepare(order) => {
            let found = prepare::prepare(&tree, order)?;
            tree.sync().map_err(|e| e.to_string())?;
            say(&Ok(Some(found)));
            Ok(())
        }
        Task::Fuse { socket, owner } => {
            say(&Ok(None));
            let device = receive(*socket).map_err(|e| format!("the file system's device: {e}"))?;
            let server =
                Arc::new(Server::new(Fuse::new(tree.clone(), View::Mapped { uid: *owner })));
            attend(config, &tree, || serve(&server, &device));
            Ok(())
        }
        Task::VirtioFs { socket } => {
            // SAFETY: whoever started us opened this descriptor for us and names it in the order.
            let listener = unsafe { UnixListener::from_raw_fd(*socket) };
            let server = Arc::new(Server::new(Fuse::new(tree.clone(), View::Plain)));
            say(&Ok(None));
            let mut served = Ok(());
            attend(config, &tree, || served = virtio::serve(server, listener));
            served
        }
    }
}

/// Closes what whoever started us had open for others: as long as we had the other end of a socket
/// too, we would never hear that it is gone.
fn close_others(socket: Option<i32>) {
    let close = |first: u32, last: u32| {
        // SAFETY: closes descriptors that nothing in this process has wrapped yet.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    };
    match socket.and_then(|fd| u32::try_from(fd).ok()).filter(|fd| *fd > 2) {
        Some(fd) => {
            if fd > 3 {
                close(3, fd - 1);
            }
            close(fd + 1, u32::MAX);
        }
        None => close(3, u32::MAX),
    }
}

fn read(config: &Config) -> Result<Flist, String> {
    let text = |e: &dyn std::fmt::Display| format!("{}: {e}", config.flist.display());
    let file = File::open(&config.flist).map_err(|e| text(&e))?;
    flist::read(file).map_err(|e| text(&e))
}

fn open(config: &Config) -> Result<Tree, String> {
    let Flist { index, routes, format, .. } = read(config)?;
    let blocks = config.cache.join("blocks").join(match format {
        Format::Flist => "flist",
        Format::Fl => "fl",
    });
    let mut stores = fetch::routes(&routes, config.store.as_deref())?;
    // What a stranger wrote does not lead into this host.
    let own = |url: &str| !fetch::is_local(url) || config.store.as_deref() == Some(url);
    let foreign = stores.iter().find(|(_, _, url)| !own(url)).map(|(_, _, url)| url.clone());
    stores.retain(|(_, _, url)| own(url));
    match foreign {
        Some(url) if stores.is_empty() => {
            return Err(format!("its store {url} is on this host; name it yourself to allow it"));
        }
        _ => {}
    }
    // The flist itself is no longer needed; only what was made of it stays in memory.
    drop(routes);
    // SAFETY: gives memory back that nobody uses; takes a plain number.
    unsafe { libc::malloc_trim(0) };
    let fetcher = Fetcher::new(Cache::new(&blocks), &stores, PATIENCE)?;
    Tree::open(Arc::new(index), Arc::new(fetcher), &config.layer)
        .map_err(|e| format!("{}: {e}", config.layer.display()))
}

/// Waits for a descriptor.
fn receive(socket: i32) -> io::Result<OwnedFd> {
    // SAFETY: whoever started us opened this descriptor for us and names it in the order.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    crate::fdpass::receive_fd(&socket)
}

/// Does what goes along with serving.
fn attend(config: &Config, tree: &Arc<Tree>, serve: impl FnOnce()) {
    let profile = config.cache.join("starts").join(profile_name(config));
    // What ended does not wait for these; the process does not either.
    spawn(ahead(tree.clone(), profile.clone()));
    let safe = tree.clone();
    spawn(move || safe.keep_safe());
    serve();
    let _ = tree.sync();
    let counters = &tree.fetcher.counters;
    let number = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let (blocks, bytes) = (number(&counters.blocks), number(&counters.bytes));
    let failures = number(&counters.failures);
    let _ = writeln!(io::stderr(), "fetched {blocks} blocks, {bytes} bytes; {failures} failures");
    keep_start(tree, &profile);
}

/// Answers until nobody has the file system mounted any more.
fn serve(server: &Arc<Server<Fuse>>, device: &OwnedFd) {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .filter_map(|_| {
                let server: Arc<Server<Fuse>> = server.clone();
                let answer = move || answer(&server, device);
                std::thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, answer).ok()
            })
            .collect();
        threads.into_iter().for_each(|t| drop(t.join()));
    });
}

pub(super) fn spawn(work: impl FnOnce() + Send + 'static) {
    let builder = std::thread::Builder::new().stack_size(256 << 10);
    // Without it the work is not done, which costs time and safety and nothing else.
    let _ = builder.spawn(work);
}

/// Which blocks a start of this flist reads is kept by what the flist is.
fn profile_name(config: &Config) -> String {
    crate::image::store::digest_of(&config.flist).unwrap_or_default()
}

/// Fetches what the last start has read, then writes down what this one reads.
fn ahead(tree: Arc<Tree>, profile: PathBuf) -> impl FnOnce() + Send + 'static {
    move || {
        let numbers: Vec<u32> = fs::read(&profile)
            .unwrap_or_default()
            .chunks_exact(4)
            .map(|four| u32::from_le_bytes(four.try_into().expect("four")))
            .collect();
        tree.fetcher.ahead(&tree.index, &numbers);
        std::thread::sleep(START);
        keep_start(&tree, &profile);
    }
}

fn keep_start(tree: &Tree, profile: &std::path::Path) {
    let numbers = tree.fetcher.used_first();
    if numbers.is_empty() {
        return;
    }
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    // The next start is slower without.
    let _ = crate::paths::write_private(profile, &bytes);
}

/// One thread's part of the requests.
fn answer(server: &Server<Fuse>, device: &OwnedFd) {
    let mut request = vec![0; REQUEST];
    let mut reply = vec![0; REQUEST];
    loop {
        let length = match rustix::io::read(device, &mut request) {
            Ok(length) => length,
            // Given up before we came to it.
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN | rustix::io::Errno::NOENT) => {
                continue;
            }
            // Unmounted.
            Err(_) => return,
        };
        let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(&mut request[..length]));
        let writer = FuseDevWriter::new(device.as_raw_fd(), &mut reply);
        if let (Ok(reader), Ok(writer)) = (reader, writer) {
            // What could not be answered was answered with an error.
            let _ = server.handle_message(reader, Writer::FuseDev(writer), None, None);
        }
    }
}
