//! A lesser jail for build scripts that users bring: they read the host as their user does, write
//! only where they are told to, and reach no network and no service of the host. For programs that must find compilers and
//! libraries; a hypervisor never runs in this one.

use std::ffi::{CString, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, RestrictionStatus, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus,
};
use rustix::process::Signal;
use rustix::thread::UnshareFlags;

use crate::enter::{Error, at, step};
use crate::syscalls;

/// What a script keeps, besides its environment and its standard streams.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScriptPlan {
    /// Host path of the program.
    pub program: PathBuf,
    pub args: Vec<OsString>,
    /// Folders and files that it may write to. Those that do not exist are left out.
    pub writable: Vec<PathBuf>,
    /// It stays in the caller's network; otherwise it has none.
    pub network: bool,
}

impl ScriptPlan {
    /// From the words of `lodge-jail script [--network] [--write PATH]... PROGRAM [ARG]...`.
    pub fn from_args(mut words: impl Iterator<Item = OsString>) -> Option<Self> {
        let mut plan = Self::default();
        loop {
            let word = words.next()?;
            match word.to_str() {
                Some("--network") => plan.network = true,
                Some("--write") => plan.writable.push(words.next()?.into()),
                _ => {
                    plan.program = word.into();
                    plan.args = words.collect();
                    return Some(plan);
                }
            }
        }
    }

    /// The words that `from_args` understands.
    pub fn to_args(&self) -> Vec<OsString> {
        let Self { program, args, writable, network } = self;
        let mut words: Vec<OsString> = network.then(|| "--network".into()).into_iter().collect();
        for path in writable {
            words.extend(["--write".into(), path.clone().into_os_string()]);
        }
        words.push(program.clone().into_os_string());
        words.extend(args.iter().cloned());
        words
    }
}

/// Confines the calling process, which has one thread, and runs the program as its child. What the
/// program leaves at work ends with it, and all ends with the caller's parent. Returns the exit
/// status.
pub fn run(plan: &ScriptPlan) -> Result<u8, Error> {
    if !plan.network {
        leave_network()?;
    }
    write_only(&plan.writable)?;
    if !plan.network {
        seccompiler::apply_filter(&syscalls::no_local_sockets()?)?;
    }
    // Everything that ends us is waited for, so that the program is ended before.
    let signals = [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGHUP];
    let set = block(&signals)?;
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM))
        .map_err(step("end with the parent"))?;
    // SAFETY: a fork of a single-threaded process; the child has its own copy of everything.
    let child = unsafe { libc::fork() };
    match child {
        0 => {
            // SAFETY: plain numbers; the mask is that of this process alone.
            unsafe {
                libc::setpgid(0, 0);
                libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
            }
            become_program(plan).map(|()| 0)
        }
        child if child > 0 => Ok(attend(child, &set)),
        _ => Err(step("start the program")(io::Error::last_os_error())),
    }
}

/// Blocks signals, so that they can be waited for.
fn block(signals: &[i32]) -> Result<libc::sigset_t, Error> {
    // SAFETY: the set is filled before it is read, and all numbers are those of signals.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in signals {
            libc::sigaddset(&raw mut set, *signal);
        }
        match libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) {
            0 => Ok(set),
            _ => Err(step("wait for signals")(io::Error::last_os_error())),
        }
    }
}

/// Waits for the program's end, or for a signal to end it.
fn attend(child: i32, set: &libc::sigset_t) -> u8 {
    let mut status = 0;
    loop {
        // SAFETY: waits for signals that are blocked; nothing is written.
        let signal = unsafe { libc::sigwaitinfo(set, std::ptr::null_mut()) };
        // SAFETY: the child is ours, and the status is a number of our own.
        let ended = unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == child;
        if !ended && (signal == libc::SIGCHLD || signal < 0) {
            continue;
        }
        // SAFETY: the group is the one that the child made for itself.
        unsafe { libc::kill(-child, libc::SIGKILL) };
        return match ended {
            true if libc::WIFEXITED(status) => libc::WEXITSTATUS(status) as u8,
            true => 128 + libc::WTERMSIG(status) as u8,
            false => 128 + signal as u8,
        };
    }
}

/// Replaces this process. Comes back only with an error.
fn become_program(plan: &ScriptPlan) -> Result<(), Error> {
    let words = std::iter::once(plan.program.as_os_str()).chain(plan.args.iter().map(|a| &**a));
    let words = words.map(|w| CString::new(w.as_bytes())).collect::<Result<Vec<_>, _>>()?;
    let mut argv: Vec<_> = words.iter().map(|text| text.as_ptr()).collect();
    argv.push(std::ptr::null());
    // SAFETY: the vector is terminated by a null pointer and points to terminated strings, all of
    // which outlive the call.
    unsafe { libc::execv(argv[0], argv.as_ptr()) };
    Err(at::<io::Error>("run", &plan.program)(io::Error::last_os_error()))
}

/// An empty network namespace, in a user namespace that changes nobody where not root.
fn leave_network() -> Result<(), Error> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let user = if uid == 0 { UnshareFlags::empty() } else { UnshareFlags::NEWUSER };
    // SAFETY: the process has one thread and nothing in it relies on what these flags change.
    unsafe { rustix::thread::unshare_unsafe(user | UnshareFlags::NEWNET) }
        .map_err(step("leave the network"))?;
    if uid != 0 {
        for (path, text) in [
            ("/proc/self/setgroups", "deny".to_owned()),
            ("/proc/self/uid_map", format!("{uid} {uid} 1")),
            ("/proc/self/gid_map", format!("{gid} {gid} 1")),
        ] {
            fs::write(path, text).map_err(at("write", Path::new(path)))?;
        }
    }
    Ok(())
}

/// From here on this thread and its children write only below these paths. Also of use to a
/// program that is about to read foreign bytes itself.
pub fn write_only(writable: &[PathBuf]) -> Result<(), Error> {
    let failed = |e: &dyn std::fmt::Display| Error::Step {
        what: "restrict what is written",
        source: io::Error::other(e.to_string()),
    };
    let abi = ABI::V3;
    let writes = AccessFs::from_write(abi);
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(writes)
        .and_then(|r| r.create())
        .map_err(|e| failed(&e))?;
    let devices = ["/dev/null", "/dev/zero", "/dev/full", "/dev/tty", "/dev/ptmx", "/dev/pts"];
    let all = devices.iter().map(Path::new).chain(writable.iter().map(PathBuf::as_path));
    let mut ruleset = ruleset;
    for path in all {
        let Ok(fd) = PathFd::new(path) else { continue };
        let folder = path.is_dir();
        let access = if folder { writes } else { writes & AccessFs::from_file(abi) };
        ruleset = ruleset.add_rule(PathBeneath::new(fd, access)).map_err(|e| failed(&e))?;
    }
    enforced(ruleset.restrict_self().map_err(|e| failed(&e))?)
}

/// A kernel without Landlock confines nobody, and is not to be relied upon.
pub(crate) fn enforced(status: RestrictionStatus) -> Result<(), Error> {
    match status.ruleset {
        RulesetStatus::NotEnforced => Err(Error::Step {
            what: "restrict which files are used",
            source: io::Error::other("the kernel has no Landlock; it came with Linux 5.13"),
        }),
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(()),
    }
}
