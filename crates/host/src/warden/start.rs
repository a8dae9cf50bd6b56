//! From a plan to a running hypervisor, step by step, before there is any concurrency. What fails
//! here is said to the daemon and leaves nothing: what was opened closes with the process.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Stdio;

use lodge_jail::cgroup;
use lodge_spec::machine::{Peers, Protocol};

use super::message::HeldTap;
use super::{message, root, screen};
use crate::backend::{ConsoleEnd, Forward, OpenFile, WardenPlan};
use crate::net::client;
use crate::paths;
use crate::proc::Tool;
use crate::remote;

/// A hypervisor that runs, and everything that belongs to it.
pub(super) struct Started {
    pub(super) plan: WardenPlan,
    pub(super) pid: u32,
    /// Our end of the console; does not block.
    pub(super) console: OwnedFd,
    pub(super) log: File,
    pub(super) warden: UnixListener,
    pub(super) attach: UnixListener,
    pub(super) stderr: std::process::ChildStderr,
    pub(super) networks: Vec<(HeldTap, UnixStream)>,
    pub(super) listeners: Vec<(Forward, Bound)>,
    pub(super) screen: Option<TcpListener>,
    /// Our end of the second serial port.
    pub(super) mdata: Option<UnixStream>,
    /// The process that serves the root.
    pub(super) root: Option<std::process::Child>,
}

pub(super) enum Bound {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

fn text<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> String {
    move |error| format!("{what}: {error}")
}

pub(super) fn start() -> Result<Started, String> {
    let mut input = String::new();
    io::stdin().read_to_string(&mut input).map_err(text("reading the plan"))?;
    let plan: WardenPlan = serde_json::from_str(&input).map_err(text("reading the plan"))?;
    // A session of its own: what ends the daemon's session is not meant for the machine.
    rustix::process::setsid().map_err(text("leaving the session"))?;
    let listeners = bind_ports(&plan.ports)?;
    let screen = plan.screen.as_ref().and_then(|s| s.at).map(screen::bind).transpose()?;
    let warden = listen(&message::socket(&plan.run))?;
    let attach = listen(&message::console_socket(&plan.run))?;
    // What a guest prints is its owner's alone.
    let log = File::options().create(true).append(true).mode(0o600).open(&plan.console_log);
    let log = log.map_err(text(plan.console_log.display()))?;
    let mut networks = Vec::new();
    for tap in &plan.taps {
        let (connection, fd) = client::attach(tap)?;
        place(fd, tap.fd)?;
        networks.push((HeldTap::of(tap), connection));
    }
    let own = plan.console_log.parent().map(paths::own_folder_in);
    for file in &plan.files {
        match own.as_ref().filter(|own| file.path.starts_with(own)) {
            Some(own) => place(open_own(own, file)?, file.fd)?,
            None => place(open_file(file)?, file.fd)?,
        }
    }
    for socket in &plan.sockets {
        place(listen(&socket.path)?, socket.fd)?;
    }
    let console = open_console(plan.console).map_err(text("console"))?;
    let mdata = match &plan.mdata {
        Some(end) => {
            let (ours, theirs) = UnixStream::pair().map_err(text("second serial port"))?;
            place(theirs, end.fd)?;
            Some(ours)
        }
        None => None,
    };
    let root = plan.root.as_ref().map(|root| root::start(root, &plan.run)).transpose()?;
    let (status, theirs) = UnixStream::pair().map_err(text("status"))?;
    place(theirs, plan.jail.status_fd)?;
    let limits = &plan.cgroup;
    let cgroups = cgroup::create(&limits.hierarchy, &limits.name, &limits.limits)
        .map_err(text("making the control group"))?;
    let (mut stderr, jail) = spawn_jail(&plan, cgroups)?;
    for fd in lent(&plan) {
        // SAFETY: these numbers were placed above and belong to nobody else in this process.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    let pid = await_entry(status, jail).map_err(|why| {
        format!("the jail did not close behind the hypervisor: {}", why_jail(why, &mut stderr))
    })?;
    Ok(Started {
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
    })
}

/// Makes the console and places the hypervisor's end; returns ours.
fn open_console(end: ConsoleEnd) -> io::Result<OwnedFd> {
    let placed = |fd: OwnedFd, number| place(fd, number).map_err(io::Error::other);
    let ours: OwnedFd = match end {
        ConsoleEnd::Socket(number) => {
            let (ours, theirs) = UnixStream::pair()?;
            placed(theirs.into(), number)?;
            ours.into()
        }
        ConsoleEnd::Terminal(number) => {
            use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
            let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
            let ours = openpt(flags)?;
            grantpt(&ours)?;
            unlockpt(&ours)?;
            let theirs = ioctl_tiocgptpeer(&ours, flags)?;
            // Bytes pass as they are: the guest has a terminal of its own.
            let mut raw = rustix::termios::tcgetattr(&theirs)?;
            raw.make_raw();
            rustix::termios::tcsetattr(&theirs, rustix::termios::OptionalActions::Now, &raw)?;
            placed(theirs, number)?;
            ours
        }
    };
    let flags = rustix::fs::fcntl_getfl(&ours)?;
    rustix::fs::fcntl_setfl(&ours, flags | rustix::fs::OFlags::NONBLOCK)?;
    Ok(ours)
}

/// Numbers that were placed for the jail alone.
fn lent(plan: &WardenPlan) -> Vec<i32> {
    let mut list = plan.jail.keep_fds.clone();
    list.push(plan.jail.status_fd);
    list.extend(plan.jail.fuse.iter().map(|fuse| fuse.socket));
    list.extend(plan.taps.iter().filter(|tap| tap.opened_by.is_some()).map(|tap| tap.fd));
    if let ConsoleEnd::Terminal(fd) = plan.console {
        list.push(fd);
    }
    list
}

/// A port that somebody else has, and who.
pub(super) fn taken(address: SocketAddr, protocol: Protocol) -> String {
    let holder = crate::net::holder::of(address.port(), protocol);
    format!("host port {address}/{protocol} is already in use by {holder}")
}

pub(super) fn bind_ports(ports: &[Forward]) -> Result<Vec<(Forward, Bound)>, String> {
    let mut list = Vec::new();
    for port in ports {
        let address = SocketAddr::new(port.ip, port.host);
        let by = match port.from.as_deref().map(str::parse).transpose()? {
            Some(Peers::Interface(name)) => Some(name),
            Some(Peers::Net(..)) | None => None,
        };
        let bound = match (by, port.protocol) {
            (None, Protocol::Tcp) => TcpListener::bind(address).map(Bound::Tcp),
            (None, Protocol::Udp) => UdpSocket::bind(address).map(Bound::Udp),
            (Some(name), protocol) => bind_to(address, protocol, &name),
        };
        let bound = bound.map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => taken(address, port.protocol),
            _ => format!("host port {address}/{} cannot be taken: {error}", port.protocol),
        })?;
        list.push((port.clone(), bound));
    }
    Ok(list)
}

/// Takes a port on one interface of the host: nobody reaches it by another, from the first moment.
fn bind_to(address: SocketAddr, protocol: Protocol, interface: &str) -> io::Result<Bound> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let kind = match protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    if protocol == Protocol::Tcp {
        // As the standard library does.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    bind_to_interface(&socket, interface)?;
    bind(&socket, &address)?;
    Ok(match protocol {
        Protocol::Tcp => {
            listen(&socket, 128)?;
            Bound::Tcp(socket.into())
        }
        Protocol::Udp => Bound::Udp(socket.into()),
    })
}

fn bind_to_interface(socket: &OwnedFd, name: &str) -> io::Result<()> {
    let length = name.len() as libc::socklen_t;
    // SAFETY: the kernel reads as many bytes of the name as it is told there are.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_BINDTODEVICE,
            name.as_ptr().cast(),
            length,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

pub(super) fn listen(path: &Path) -> Result<UnixListener, String> {
    // A socket left by a process that is gone; whoever runs would hold the run folder's machine.
    let _ = fs::remove_file(path);
    UnixListener::bind(path).map_err(text(path.display()))
}

/// A file in the machine's own folder, into which others may write too.
fn open_own(own: &Path, file: &OpenFile) -> Result<OwnedFd, String> {
    use rustix::fs::OFlags;
    let how = if file.writable { OFlags::RDWR } else { OFlags::RDONLY };
    paths::open_beneath(own, &file.path, how)
}

fn open_file(file: &OpenFile) -> Result<OwnedFd, String> {
    if let Some(server) = &file.server {
        return remote::dial(server, !file.writable);
    }
    let open = File::options().read(true).write(file.writable).open(&file.path);
    open.map(OwnedFd::from).map_err(text(file.path.display()))
}

/// Gives a descriptor the number that the plan says, and lets it be inherited.
pub(super) fn place(fd: impl Into<OwnedFd>, number: i32) -> Result<(), String> {
    let fd: OwnedFd = fd.into();
    // SAFETY: `dup2` onto a number of the plan's range, which nothing in this process uses.
    let placed = unsafe { libc::dup2(fd.as_raw_fd(), number) };
    if placed == number { Ok(()) } else { Err(format!("descriptor {number} cannot be placed")) }
}

type Jail = std::process::Child;

fn spawn_jail(
    plan: &WardenPlan,
    cgroups: Vec<std::path::PathBuf>,
) -> Result<(std::process::ChildStderr, Jail), String> {
    let program = paths::sibling_program("lodge-jail").map_err(text("lodge-jail"))?;
    let jail = lodge_jail::JailPlan { cgroups, ..plan.jail.clone() };
    let mut command = Tool::new(program).command().into_std();
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(text("lodge-jail"))?;
    let mut stdin = child.stdin.take().expect("piped");
    let plan = serde_json::to_vec(&jail).map_err(text("lodge-jail"))?;
    stdin.write_all(&plan).map_err(text("lodge-jail"))?;
    drop(stdin);
    Ok((child.stderr.take().expect("piped"), child))
}

/// Waits until the hypervisor's process says that it enters and the jail's own says which one that
/// is, in whichever order, and reaps the jail's own.
fn await_entry(mut status: UnixStream, mut jail: Jail) -> Result<u32, String> {
    let mut said = String::new();
    let mut buffer = [0; 64];
    let pid = loop {
        if let (Some(pid), true) = (pid_of(&said), said.contains("enter\n")) {
            break Some(pid);
        }
        match status.read(&mut buffer) {
            Ok(0) => break None,
            Ok(n) => said.push_str(&String::from_utf8_lossy(&buffer[..n])),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break None,
        }
    };
    let ended = jail.wait();
    match (pid, ended) {
        (Some(pid), _) => Ok(pid),
        (None, Ok(status)) => Err(format!("it broke off ({status})")),
        (None, Err(error)) => Err(format!("it broke off ({error})")),
    }
}

/// The number in a whole line `pid N`.
fn pid_of(said: &str) -> Option<u32> {
    let lines = said.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
    lines.filter_map(|line| line.strip_prefix("pid ")).find_map(|pid| pid.parse().ok())
}

fn why_jail(why: String, stderr: &mut std::process::ChildStderr) -> String {
    // Whoever held the other end has ended, so this ends too.
    let mut said = String::new();
    let flags = rustix::fs::fcntl_getfl(stderr.as_fd());
    let nonblocking =
        flags.map(|f| rustix::fs::fcntl_setfl(stderr.as_fd(), f | rustix::fs::OFlags::NONBLOCK));
    if nonblocking.is_ok() {
        let _ = stderr.read_to_string(&mut said);
    }
    match said.lines().last() {
        Some(line) => line.trim_start_matches("lodge-jail: ").to_owned(),
        None => why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_is_known_in_whichever_order_it_is_told() {
        for (said, pid) in [
            ("pid 42\nenter\n", Some(42)),
            ("enter\npid 42\n", Some(42)),
            ("pid 4", None),
            ("enter\n", None),
        ] {
            assert_eq!(pid_of(said), pid, "{said:?}");
        }
    }
}
