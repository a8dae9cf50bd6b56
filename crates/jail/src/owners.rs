//! Files of other users inside the jail: seen through a mount that shows them as the jail's own
//! (an idmapped mount). What they are on the disk does not change, nor what they are elsewhere.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::enter::{Error, at, step};
use crate::plan::{Bind, JailPlan};

/// A user namespace for each owner, by user and group.
#[derive(Default)]
pub(crate) struct Owners(BTreeMap<(u32, u32), OwnedFd>);

impl Owners {
    /// Looks at what the plan lends. Needs root's rights, and `/proc` of this very namespace.
    pub(crate) fn of(plan: &JailPlan) -> Result<Self, Error> {
        let mut owners = Self::default();
        for bind in &plan.binds {
            let Some(owner) = stranger(bind, plan.uid)? else { continue };
            if let Entry::Vacant(place) = owners.0.entry(owner) {
                place.insert(namespace(owner, (plan.uid, plan.gid))?);
            }
        }
        Ok(owners)
    }

    /// What shows this file as the jail's own, where that takes anything.
    pub(crate) fn mapping(&self, bind: &Bind, uid: u32) -> Result<Option<BorrowedFd<'_>>, Error> {
        let owner = stranger(bind, uid)?;
        Ok(owner.and_then(|owner| self.0.get(&owner)).map(AsFd::as_fd))
    }
}

/// The owner of a file that the jail's user could not open as the plan lends it.
fn stranger(bind: &Bind, uid: u32) -> Result<Option<(u32, u32)>, Error> {
    if bind.device || bind.executable {
        return Ok(None);
    }
    let found = rustix::fs::stat(&bind.source).map_err(at("look at", &bind.source))?;
    let is_file = rustix::fs::FileType::from_raw_mode(found.st_mode).is_file();
    let needed = if bind.writable { 0o6 } else { 0o4 };
    let open_to_all = found.st_mode & needed == needed;
    let stranger = is_file && found.st_uid != uid && !open_to_all;
    Ok(stranger.then_some((found.st_uid, found.st_gid)))
}

/// A user namespace in which what is one user's is another's.
fn namespace(owner: (u32, u32), user: (u32, u32)) -> Result<OwnedFd, Error> {
    let (wait, go) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(step("make a pipe"))?;
    let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
    // SAFETY: without CLONE_VM this is a fork of a single-threaded process: the child has its own
    // copy of everything, and a null stack means that it goes on with that copy.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match pid {
        0 => {
            drop(go);
            // Until the namespace has been taken hold of, or nobody is there to do so.
            let _ = rustix::io::read(&wait, &mut [0u8; 1]);
            // SAFETY: ends this process at once, as it shares nothing that would want to be ended.
            unsafe { libc::_exit(0) }
        }
        pid if pid > 0 => {
            drop(wait);
            let held = hold(pid, owner, user);
            drop(go);
            // SAFETY: waits for the child that was made above; it ends now.
            let ended = unsafe { libc::waitpid(pid as i32, std::ptr::null_mut(), 0) };
            match ended {
                -1 => Err(step("wait for a child")(io::Error::last_os_error())),
                _ => held,
            }
        }
        _ => Err(step("make a user namespace")(io::Error::last_os_error())),
    }
}

fn hold(pid: i64, owner: (u32, u32), user: (u32, u32)) -> Result<OwnedFd, Error> {
    let of = |name: &str| format!("/proc/{pid}/{name}");
    for (path, text) in [
        (of("uid_map"), format!("{} {} 1", owner.0, user.0)),
        (of("gid_map"), format!("{} {} 1", owner.1, user.1)),
    ] {
        fs::write(&path, text).map_err(at("write", Path::new(&path)))?;
    }
    let path = of("ns/user");
    fs::File::open(&path).map(OwnedFd::from).map_err(at("open", Path::new(&path)))
}
