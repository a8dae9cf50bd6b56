//! The warden's life beside its hypervisor: console, ports, readiness, and those who ask.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use lodge_jail::cgroup;
use lodge_machine::store::now_us;
use lodge_spec::extras::Mdata;
use regex_lite::Regex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast;

use super::console::{Log, Sign, Watcher};
use super::forward::{self, Guest};
use super::message::{Ask, Exit, HeldTap, Status, Tell, exit_file};
use super::start::{Bound, Started, bind_ports};
use super::{bootstrap, mdata, screen};
use crate::backend::{Forward, Tap, WardenPlan};
use crate::fdpass::{self, Lines};
use crate::net::client::{self, Notice};
use crate::paths;

/// What the parts of a warden share; one thread, so cells suffice.
pub(super) struct Shared {
    pub(super) plan: WardenPlan,
    pub(super) status: RefCell<Status>,
    pub(super) mdata: RefCell<Mdata>,
    /// Lets in those who want to see the screen.
    screen: RefCell<Option<tokio::task::JoinHandle<()>>>,
    log: RefCell<Log>,
    output: broadcast::Sender<Rc<[u8]>>,
    tells: broadcast::Sender<Tell>,
    /// Who holds each interface, by its name.
    networks: RefCell<HashMap<String, tokio::task::JoinHandle<()>>>,
    forwards: RefCell<Vec<(Forward, tokio::task::JoinHandle<()>)>>,
    /// How many guests' connections are served at once.
    pub(super) visitors: Cell<usize>,
    /// Held while one of the guest's reports is taken in.
    pub(super) reporting: tokio::sync::Mutex<()>,
}

impl Shared {
    fn new(plan: WardenPlan, pid: u32, log: std::fs::File) -> Self {
        // Room for the messages of a moment; a reader that falls behind skips.
        Self {
            mdata: RefCell::default(),
            screen: RefCell::default(),
            status: RefCell::new(Status { pid, ..Status::default() }),
            log: RefCell::new(Log::new(plan.console_log.clone(), log)),
            output: broadcast::channel(64).0,
            tells: broadcast::channel(64).0,
            networks: RefCell::default(),
            forwards: RefCell::default(),
            visitors: Cell::default(),
            reporting: tokio::sync::Mutex::default(),
            plan,
        }
    }

    pub(super) fn tell(&self, tell: Tell) {
        // Nobody may be connected; the status keeps what matters.
        let _ = self.tells.send(tell);
    }

    fn ready(&self) {
        if !std::mem::replace(&mut self.status.borrow_mut().ready, true) {
            self.tell(Tell::Ready { at_us: now_us() });
        }
    }

    fn mark(&self, kind: &str, detail: &str) {
        let (kind, detail) = (kind.to_owned(), detail.to_owned());
        self.tell(Tell::Mark { kind, detail, at_us: now_us() });
    }
}

/// What a guest has written to its root is safe within this, or may be lost.
const ROOT_PATIENCE: Duration = Duration::from_secs(30);

/// Serves until the hypervisor has ended, then leaves its exit status behind.
pub(super) fn serve(started: Started) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let Ok(runtime) = runtime else { return };
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, run(started));
}

async fn run(started: Started) {
    let Started {
        plan,
        pid,
        console,
        log,
        warden,
        attach,
        stderr,
        networks,
        listeners,
        screen,
        mdata,
        root,
    } = started;
    let ready = plan.ready.as_deref().unwrap_or("");
    let regex = ready.strip_prefix("console:").and_then(|r| Regex::new(r).ok());
    let shared = Rc::new(Shared::new(plan.clone(), pid, log));
    let Ok((from_guest, to_guest)) = split(console) else { return };
    let to_guest = Rc::new(tokio::sync::Mutex::new(to_guest));
    show(&shared, screen);
    if let (Some(end), Some(ours)) = (&plan.mdata, mdata) {
        mdata::read(&shared, &end.file);
        tokio::task::spawn_local(mdata::serve(shared.clone(), ours));
    }
    let watch = Watcher::new(regex);
    let console = tokio::task::spawn_local(read_console(shared.clone(), from_guest, watch));
    tokio::task::spawn_local(accept_attach(shared.clone(), attach, to_guest));
    tokio::task::spawn_local(accept_asks(shared.clone(), warden));
    for (tap, connection) in networks {
        watch_network(&shared, tap, connection, ready == "dhcp");
    }
    forward_ports(&shared, listeners);
    if let Some(tap) = Tap::reached(&plan.taps) {
        let guest =
            |port| Guest { network: tap.network.clone(), address: (tap.address, port).into() };
        if let Some(port) = ready.strip_prefix("port:").and_then(|p| p.parse().ok()) {
            tokio::task::spawn_local(await_port(shared.clone(), guest(port)));
        }
    }
    let stderr = tokio::task::spawn_local(read_stderr(stderr));
    let root = root.map(|child| tokio::task::spawn_local(watch_root(shared.clone(), child.id())));
    let exit = await_exit(pid).await;
    // Whoever hears of the end finds the ports free.
    for (_, forward) in shared.forwards.take() {
        forward.abort();
        let _ = forward.await;
    }
    // What the hypervisor wrote last is still in its socket and pipe.
    let patience = Duration::from_secs(2);
    let _ = tokio::time::timeout(patience, console).await;
    let stderr = tokio::time::timeout(patience, stderr).await;
    let stderr = stderr.ok().and_then(Result::ok).unwrap_or_default();
    if let Some(root) = root {
        // It ends by itself when nobody has the file system mounted, everything safe on the disk.
        let _ = tokio::time::timeout(ROOT_PATIENCE, root).await;
    }
    let panic = shared.status.borrow().panic.clone();
    let (code, signal) = exit;
    let exit = Exit { code, signal, stderr, panic };
    if let Ok(text) = serde_json::to_vec(&exit) {
        let _ = paths::write_atomically(&exit_file(&plan.run), &text);
    }
    let _ = cgroup::remove(&plan.cgroup.hierarchy, &plan.cgroup.name);
    shared.tell(Tell::Exited(exit));
    // Lets those who are connected hear it.
    tokio::task::yield_now().await;
    tokio::time::sleep(Duration::from_millis(10)).await;
}

/// Begins to forward ports to the guest.
fn forward_ports(shared: &Rc<Shared>, listeners: Vec<(Forward, Bound)>) {
    let Some(tap) = Tap::reached(&shared.plan.taps) else { return };
    for (port, bound) in listeners {
        let guest =
            Guest { network: tap.network.clone(), address: (tap.address, port.guest).into() };
        let peers = port.from.as_deref().and_then(|from| from.parse().ok());
        let task = tokio::task::spawn_local(forward::serve(bound, guest, peers));
        shared.forwards.borrow_mut().push((port, task));
    }
}

/// Forwards these ports and no others. If one cannot be had, all stays as it was.
async fn set_ports(shared: &Rc<Shared>, ports: Vec<Forward>) -> Result<(), String> {
    let known: Vec<Forward> = shared.forwards.borrow().iter().map(|(p, _)| p.clone()).collect();
    let fresh: Vec<Forward> = ports.iter().filter(|p| !known.contains(p)).cloned().collect();
    let bound = bind_ports(&fresh)?;
    let (stay, gone): (Vec<_>, Vec<_>) =
        shared.forwards.take().into_iter().partition(|(port, _)| ports.contains(port));
    shared.forwards.replace(stay);
    for (_, task) in gone {
        task.abort();
        let _ = task.await;
    }
    forward_ports(shared, bound);
    Ok(())
}

/// Waits for the end of the process that serves the root, which is to come after the hypervisor's.
async fn watch_root(shared: Rc<Shared>, pid: u32) {
    let (code, _) = await_exit(pid).await;
    if code != Some(0) {
        shared.mark("root-lost", "the process that serves the root ended; the guest cannot read");
    }
}

/// Lets people see the screen at a place, or nowhere.
fn show(shared: &Rc<Shared>, listener: Option<std::net::TcpListener>) {
    if let Some(task) = shared.screen.take() {
        task.abort();
    }
    let address = listener.as_ref().and_then(|l| l.local_addr().ok());
    shared.status.borrow_mut().screen = address;
    if let (Some(listener), Some(screen)) = (listener, &shared.plan.screen) {
        let serving = screen::serve(listener, screen.monitor.clone());
        shared.screen.replace(Some(tokio::task::spawn_local(serving)));
    }
}

/// Both directions of the console, which may be a socket or a terminal.
fn split(console: OwnedFd) -> std::io::Result<(pipe::Receiver, pipe::Sender)> {
    let twin = console.try_clone()?;
    Ok((
        pipe::Receiver::from_owned_fd_unchecked(console)?,
        pipe::Sender::from_owned_fd_unchecked(twin)?,
    ))
}

pub(super) fn to_async(stream: std::os::unix::net::UnixStream) -> std::io::Result<UnixStream> {
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

async fn read_console(shared: Rc<Shared>, mut from_guest: pipe::Receiver, mut watch: Watcher) {
    let mut buffer = vec![0; 8192];
    let mut first = true;
    while let Ok(count @ 1..) = from_guest.read(&mut buffer).await {
        let bytes = &buffer[..count];
        if std::mem::take(&mut first) {
            shared.mark("first-output", "");
        }
        shared.log.borrow_mut().write(bytes);
        let _ = shared.output.send(bytes.into());
        for sign in watch.look(bytes) {
            match sign {
                Sign::Ready => shared.ready(),
                Sign::Panic(line) => {
                    shared.status.borrow_mut().panic.get_or_insert(line.clone());
                    shared.tell(Tell::Panic { line });
                }
            }
        }
    }
}

type ToGuest = Rc<tokio::sync::Mutex<pipe::Sender>>;

async fn accept_attach(
    shared: Rc<Shared>,
    listener: std::os::unix::net::UnixListener,
    to_guest: ToGuest,
) {
    let Some(listener) = to_listener(listener) else { return };
    while let Ok((stream, _)) = listener.accept().await {
        tokio::task::spawn_local(attached(shared.clone(), stream, to_guest.clone()));
    }
}

/// One reader of the console: history first, then what comes, and its typing the other way.
async fn attached(shared: Rc<Shared>, stream: UnixStream, to_guest: ToGuest) {
    let mut output = shared.output.subscribe();
    let history = shared.log.borrow().history();
    let (mut typed, mut shown) = stream.into_split();
    if shown.write_all(&history).await.is_err() {
        return;
    }
    let mut buffer = [0; 1024];
    loop {
        tokio::select! {
            bytes = output.recv() => match bytes {
                Ok(bytes) => if shown.write_all(&bytes).await.is_err() { return },
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            },
            count = typed.read(&mut buffer) => match count {
                Ok(count @ 1..) => {
                    if to_guest.lock().await.write_all(&buffer[..count]).await.is_err() {
                        return;
                    }
                }
                Ok(0) | Err(_) => return,
            },
        }
    }
}

async fn accept_asks(shared: Rc<Shared>, listener: std::os::unix::net::UnixListener) {
    let Some(listener) = to_listener(listener) else { return };
    while let Ok((stream, _)) = listener.accept().await {
        tokio::task::spawn_local(asked(shared.clone(), stream));
    }
}

fn to_listener(listener: std::os::unix::net::UnixListener) -> Option<UnixListener> {
    listener.set_nonblocking(true).ok()?;
    UnixListener::from_std(listener).ok()
}

async fn asked(shared: Rc<Shared>, stream: UnixStream) {
    let mut tells = shared.tells.subscribe();
    let status = shared.status.borrow().clone();
    if fdpass::send(&stream, &Tell::Status(status), None).await.is_err() {
        return;
    }
    let mut lines = Lines::default();
    loop {
        tokio::select! {
            tell = tells.recv() => match tell {
                Ok(tell) => if fdpass::send(&stream, &tell, None).await.is_err() { return },
                // What was missed and matters is in the status.
                Err(broadcast::error::RecvError::Lagged(_)) => {
                    let status = Tell::Status(shared.status.borrow().clone());
                    if fdpass::send(&stream, &status, None).await.is_err() { return }
                }
                Err(broadcast::error::RecvError::Closed) => return,
            },
            ask = lines.next::<Ask>(&stream) => match ask {
                Ok(Some((ask, _))) => if !answer(&shared, &stream, ask).await { return },
                Ok(None) | Err(_) => return,
            },
        }
    }
}

async fn answer(shared: &Rc<Shared>, stream: &UnixStream, ask: Ask) -> bool {
    use std::os::fd::AsFd;
    match ask {
        Ask::Kill => {
            signal(shared, libc::SIGKILL);
            true
        }
        Ask::Signal { signal: number } => {
            signal(shared, number);
            true
        }
        Ask::Mdata => {
            if let Some(end) = &shared.plan.mdata {
                mdata::read(shared, &end.file);
            }
            true
        }
        Ask::Screen { at } => {
            let bound = at.map(screen::bind).transpose();
            match bound {
                Ok(listener) => show(shared, listener),
                Err(why) => shared.mark("error", &why),
            }
            true
        }
        Ask::Tap { tap } => {
            let made = client::attach(&tap);
            let fd: Option<&OwnedFd> = made.as_ref().ok().map(|(_, fd)| fd);
            let tell = Tell::Tap { error: made.as_ref().err().cloned() };
            let sent = fdpass::send(stream, &tell, fd.map(AsFd::as_fd)).await;
            if let (Ok(()), Ok((connection, _))) = (&sent, made) {
                watch_network(shared, HeldTap::of(&tap), connection, false);
            }
            sent.is_ok()
        }
        Ask::Ports { ports } => {
            let error = set_ports(shared, ports).await.err();
            fdpass::send(stream, &Tell::Ports { error }, None).await.is_ok()
        }
        Ask::Untap { interface } => {
            if let Some(task) = shared.networks.borrow_mut().remove(&interface) {
                task.abort();
            }
            shared.status.borrow_mut().taps.retain(|tap| tap.interface != interface);
            true
        }
    }
}

fn signal(shared: &Shared, number: i32) {
    let pid = shared.status.borrow().pid;
    let signal = rustix::process::Signal::from_named_raw(number);
    if let Some((pid, signal)) = rustix::process::Pid::from_raw(pid as i32).zip(signal) {
        // It is our child and not reaped yet, so the number is still its own.
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Holds the connection that holds the interface, and hears of leases.
fn watch_network(
    shared: &Rc<Shared>,
    tap: HeldTap,
    connection: std::os::unix::net::UnixStream,
    lease_is_ready: bool,
) {
    let Ok(stream) = to_async(connection) else { return };
    let watched = shared.clone();
    let task = tokio::task::spawn_local(async move {
        let mut lines = Lines::default();
        // A descriptor may be handed over a message early; only visitors bring one.
        let mut brought = None;
        while let Ok(Some((notice, fd))) = lines.next::<Notice>(&stream).await {
            brought = fd.or(brought);
            match notice {
                Notice::Visitor => {
                    if let Some(visitor) = brought.take() {
                        bootstrap::receive(&watched, visitor);
                    }
                }
                Notice::Leased { address } => {
                    watched.mark("dhcp-lease", &address.to_string());
                    if lease_is_ready {
                        watched.ready();
                    }
                }
                Notice::Attached
                | Notice::Dialled
                | Notice::Counted { .. }
                | Notice::Guarded
                | Notice::Done
                | Notice::Refused { .. } => {}
            }
        }
        watched.mark("network-lost", "the network's keeper is gone");
    });
    shared.networks.borrow_mut().insert(tap.interface.clone(), task);
    shared.status.borrow_mut().taps.push(tap);
}

/// There is no event for a port that opens in a guest; asking again is all there is.
async fn await_port(shared: Rc<Shared>, guest: Guest) {
    const PAUSE: Duration = Duration::from_millis(100);
    // A guest that is not there yet does not answer, and a lost first packet is sent again only
    // after a second: so the first attempts are short, and later ones patient.
    let mut patience = Duration::from_millis(200);
    loop {
        let dialled = tokio::time::timeout(patience, forward::dial(&guest)).await;
        if matches!(dialled, Ok(Ok(_))) {
            shared.ready();
            return;
        }
        tokio::time::sleep(PAUSE).await;
        patience = (patience * 11 / 10).min(Duration::from_secs(5));
    }
}

async fn await_exit(pid: u32) -> (Option<i32>, Option<i32>) {
    use rustix::process::{Pid, WaitOptions};
    crate::proc::ended(pid).await;
    let Some(pid) = Pid::from_raw(pid as i32) else { return (None, None) };
    match rustix::process::waitpid(Some(pid), WaitOptions::empty()) {
        Ok(Some((_, status))) => (status.exit_status(), status.terminating_signal()),
        Ok(None) | Err(_) => (None, None),
    }
}

/// Keeps the end of what the hypervisor says on standard error, until it ends.
async fn read_stderr(stderr: std::process::ChildStderr) -> Vec<String> {
    const KEPT: usize = 16 << 10;
    let mut kept = Vec::new();
    let mut buffer = [0; 1024];
    let Ok(mut pipe) = pipe::Receiver::from_owned_fd(stderr.into()) else {
        return Vec::new();
    };
    while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
        kept.extend_from_slice(&buffer[..count]);
        let excess = kept.len().saturating_sub(KEPT);
        kept.drain(..excess);
    }
    let text = String::from_utf8_lossy(&kept).into_owned();
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(20)..].iter().map(|l| (*l).to_owned()).collect()
}
