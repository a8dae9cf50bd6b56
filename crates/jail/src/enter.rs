//! Entering the jail, step by step, in the only order that works: join cgroups, leave namespaces,
//! build the root, drop identity and capabilities, filter system calls, become the program.

use std::ffi::{CString, NulError};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::process::{Resource, Rlimit, Signal};
use rustix::thread::UnshareFlags;

use crate::mounts;
use crate::owners::Owners;
use crate::plan::{FD_LIMIT, JailPlan};
use crate::syscalls;

/// What failed and on what.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {what} {path}: {source}")]
    Path { what: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot {what}: {source}")]
    Step { what: &'static str, source: io::Error },
    #[error("cannot build the system call filter: {0}")]
    Filter(#[from] seccompiler::BackendError),
    #[error("cannot load the system call filter: {0}")]
    Load(#[from] seccompiler::Error),
    #[error("an argument contains a NUL byte")]
    Nul(#[from] NulError),
}

impl Error {
    pub(crate) fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        Error::Path { what, path: path.to_owned(), source }
    }
}

pub(crate) fn at<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> Error {
    move |error| Error::io(what, path, error.into())
}

pub(crate) fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Step { what, source: error.into() }
}

/// Confines the calling process and becomes the plan's program. Returns in the process that was
/// called, which has nothing left to do; the confined one is a child of that one's parent.
pub fn run(plan: &JailPlan) -> Result<(), Error> {
    for procs in &plan.cgroups {
        fs::write(procs, "0").map_err(at("join", procs))?;
    }
    let program = open_program(&plan.program)?;
    let rootless = !rustix::process::geteuid().is_root();
    if rootless {
        enter_user_namespace(plan.uid, plan.gid)?;
    }
    let owners = if rootless { Owners::default() } else { Owners::of(plan)? };
    let network = enter_network(plan)?;
    // SAFETY: this process has one thread, and nothing here relies on what these flags unshare.
    unsafe {
        rustix::thread::unshare_unsafe(
            UnshareFlags::NEWNS
                | UnshareFlags::NEWPID
                | network
                | UnshareFlags::NEWIPC
                | UnshareFlags::NEWUTS
                | UnshareFlags::NEWCGROUP,
        )
    }
    .map_err(step("leave the host's namespaces"))?;
    // SAFETY: whoever wrote the plan opened this descriptor for us and names it here.
    let status = unsafe { BorrowedFd::borrow_raw(plan.status_fd) };
    if let Some(child) = fork_sibling()? {
        return send(status, &format!("pid {child}\n"));
    }
    confine(plan, program, &owners, rootless)?;
    send(status, "enter\n")?;
    become_program(plan)
}

/// Goes into the namespace that the plan names; otherwise says that an empty one is to be made.
fn enter_network(plan: &JailPlan) -> Result<UnshareFlags, Error> {
    use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
    let Some(fd) = plan.network else { return Ok(UnshareFlags::NEWNET) };
    // SAFETY: whoever wrote the plan opened this descriptor for us and names it here.
    let namespace = unsafe { BorrowedFd::borrow_raw(fd) };
    move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))
        .map_err(step("enter the machine's network"))?;
    Ok(UnshareFlags::empty())
}

fn open_program(path: &Path) -> Result<OwnedFd, Error> {
    use rustix::fs::{Mode, OFlags};
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(at("open", path))?;
    let limit = Rlimit { current: Some(u64::from(FD_LIMIT) + 1), maximum: None };
    let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
    rustix::process::setrlimit(Resource::Nofile, Rlimit { maximum, ..limit })
        .map_err(step("raise the descriptor limit"))?;
    // SAFETY: `dup3` makes a new descriptor from one that is open; the number is free, because
    // inherited descriptors are few and numbered from zero.
    let raw = unsafe { libc::dup3(file.as_raw_fd(), FD_LIMIT as i32, libc::O_CLOEXEC) };
    if raw < 0 {
        return Err(step("keep the program open")(io::Error::last_os_error()));
    }
    // SAFETY: `dup3` has just returned this descriptor and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn enter_user_namespace(uid: u32, gid: u32) -> Result<(), Error> {
    let (outer_uid, outer_gid) = (rustix::process::geteuid(), rustix::process::getegid());
    // SAFETY: as for the other namespaces: one thread, nothing held that this changes.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) }
        .map_err(step("make a user namespace"))?;
    for (path, text) in [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("{uid} {} 1", outer_uid.as_raw())),
        ("/proc/self/gid_map", format!("{gid} {} 1", outer_gid.as_raw())),
    ] {
        fs::write(path, text).map_err(at("write", Path::new(path)))?;
    }
    Ok(())
}

/// Forks a child whose parent is this process's parent, so that whoever asked for the jail is told
/// of its end directly. It is process 1 of the new process namespace.
fn fork_sibling() -> Result<Option<i32>, Error> {
    let flags = libc::CLONE_PARENT | libc::SIGCHLD;
    // SAFETY: without CLONE_VM this is a fork of a single-threaded process: the child has its own
    // copy of everything, and a null stack means that it goes on with that copy.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match pid {
        0 => Ok(None),
        pid if pid > 0 => Ok(Some(pid as i32)),
        _ => Err(step("start the confined process")(io::Error::last_os_error())),
    }
}

fn confine(
    plan: &JailPlan,
    program: OwnedFd,
    owners: &Owners,
    rootless: bool,
) -> Result<(), Error> {
    rustix::process::setsid().map_err(step("leave the session"))?;
    mounts::enter_root(plan, owners, rootless)?;
    rustix::system::sethostname(b"jail").map_err(step("set the host name"))?;
    set_limits()?;
    take_terminal(plan.terminal)?;
    keep_descriptors(&plan.keep_fds)?;
    drop_identity(plan, rootless)?;
    // Set after the identity has changed, which would clear it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(step("end with the parent"))?;
    // From here on `become_program` uses the number; it is closed by the exec.
    let _ = program.into_raw_fd();
    Ok(())
}

fn set_limits() -> Result<(), Error> {
    let fixed = |n| Rlimit { current: Some(n), maximum: Some(n) };
    for (resource, limit) in [
        (Resource::Core, fixed(0)),
        (Resource::Nofile, fixed(u64::from(FD_LIMIT))),
        (Resource::Msgqueue, fixed(0)),
    ] {
        rustix::process::setrlimit(resource, limit).map_err(step("set a resource limit"))?;
    }
    Ok(())
}

/// Makes a descriptor the standard input and output.
fn take_terminal(terminal: Option<i32>) -> Result<(), Error> {
    for stream in [libc::STDIN_FILENO, libc::STDOUT_FILENO] {
        // SAFETY: `dup2` onto the standard streams, which nothing here has wrapped.
        if terminal.is_some_and(|fd| unsafe { libc::dup2(fd, stream) } != stream) {
            return Err(step("take the terminal")(io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// Everything but the standard streams and the plan's descriptors closes when the program starts.
fn keep_descriptors(keep: &[i32]) -> Result<(), Error> {
    // SAFETY: only sets the close-on-exec flag of open descriptors.
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result != 0 {
        return Err(step("mark descriptors")(io::Error::last_os_error()));
    }
    for fd in keep {
        // SAFETY: the number is used for this one call; a wrong one is answered with an error.
        let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())
            .map_err(step("keep a descriptor"))?;
    }
    Ok(())
}

fn drop_identity(plan: &JailPlan, rootless: bool) -> Result<(), Error> {
    for number in 0..64 {
        // SAFETY: takes plain numbers; an unknown capability is answered EINVAL and ends the list.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) } != 0 {
            break;
        }
    }
    if !rootless {
        become_user(plan.uid, plan.gid)?;
    }
    rustix::thread::clear_ambient_capability_set().map_err(step("clear capabilities"))?;
    drop_capabilities()?;
    rustix::thread::set_no_new_privs(true).map_err(step("forbid new privileges"))
}

/// This user and group, and no others, from now on.
pub(crate) fn become_user(uid: u32, gid: u32) -> Result<(), Error> {
    // SAFETY: an empty list is passed as length zero; the pointer is not read.
    let groups = unsafe { libc::setgroups(0, std::ptr::null()) };
    // SAFETY: plain numbers; a single-threaded process changes as a whole.
    let gids = unsafe { libc::setresgid(gid, gid, gid) };
    // SAFETY: as above.
    let uids = unsafe { libc::setresuid(uid, uid, uid) };
    match groups == 0 && gids == 0 && uids == 0 {
        true => Ok(()),
        false => Err(step("change user")(io::Error::last_os_error())),
    }
}

pub(crate) fn drop_capabilities() -> Result<(), Error> {
    use rustix::thread::{CapabilitySet, CapabilitySets};
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: none, permitted: none, inheritable: none },
    )
    .map_err(step("drop capabilities"))
}

fn send(status: BorrowedFd<'_>, text: &str) -> Result<(), Error> {
    rustix::io::write(status, text.as_bytes()).map(drop).map_err(step("report"))
}

/// Replaces this process. Comes back only with an error.
fn become_program(plan: &JailPlan) -> Result<(), Error> {
    let argv = plan.argv.iter().map(|a| CString::new(a.as_str())).collect::<Result<Vec<_>, _>>()?;
    let env = plan.env.iter().map(|(k, v)| CString::new(format!("{k}={v}")));
    let env = env.collect::<Result<Vec<_>, _>>()?;
    let name = mounts::c_path(Path::new(""))?;
    let pointers = |list: &[CString]| {
        let mut pointers: Vec<_> = list.iter().map(|text| text.as_ptr()).collect();
        pointers.push(std::ptr::null());
        pointers
    };
    let (argv, env) = (pointers(&argv), pointers(&env));
    let (main, clone3) =
        (syscalls::filter(plan.writes_files, plan.binds_sockets)?, syscalls::no_clone3()?);
    seccompiler::apply_filter(&main)?;
    // The last filter's answer counts where both refuse.
    seccompiler::apply_filter(&clone3)?;
    // SAFETY: the vectors are terminated by null pointers and point to terminated strings, all of
    // which outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            FD_LIMIT,
            name.as_ptr(),
            argv.as_ptr(),
            env.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Err(at::<io::Error>("run", &plan.program)(io::Error::last_os_error()))
}
