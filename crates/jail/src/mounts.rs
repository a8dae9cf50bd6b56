//! The new root: an empty read-only file system with the plan's paths in it, one mount each. Uses
//! the descriptor-based mount calls, so no path is looked up twice.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};

use crate::enter::{Error, at};
use crate::owners::Owners;
use crate::plan::{Bind, FuseMount, JailPlan};

const RDONLY: u64 = 1;
const NOSUID: u64 = 2;
const NODEV: u64 = 4;
const NOEXEC: u64 = 8;
const IDMAP: u64 = 0x0010_0000;

/// `struct mount_attr` of `mount_setattr(2)`.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Makes the new root and enters it; afterwards no host path can be named.
pub(crate) fn enter_root(plan: &JailPlan, owners: &Owners, rootless: bool) -> Result<(), Error> {
    let root = Path::new("/");
    rustix::mount::mount_change(root, MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(at("make mounts private", root))?;
    // Root makes device nodes anew, owned by the user inside; others bind what they may open.
    let (nodes, binds): (Vec<&Bind>, Vec<&Bind>) =
        plan.binds.iter().partition(|bind| bind.device && !rootless);
    let cloned = binds.iter().map(|bind| clone_tree(bind, owners.mapping(bind, plan.uid)?));
    let trees = cloned.collect::<Result<Vec<_>, _>>()?;
    let devices = nodes.iter().map(|bind| device_number(bind)).collect::<Result<Vec<_>, _>>()?;
    let stage = plan.stage.as_path();
    mount_empty(stage, nodes.is_empty())?;
    for (bind, tree) in binds.iter().zip(&trees) {
        place(stage, bind, tree)?;
    }
    for (bind, number) in nodes.iter().zip(devices) {
        make_node(stage, bind, number, plan)?;
    }
    if let Some(fuse) = &plan.fuse {
        mount_fuse(stage, fuse, plan)?;
    }
    let mounted = open_path(stage)?;
    let nodev = if nodes.is_empty() { NODEV } else { 0 };
    set_attributes(mounted.as_fd(), RDONLY | NOSUID | nodev).map_err(at("seal", stage))?;
    rustix::process::chdir(stage).map_err(at("enter", stage))?;
    rustix::process::pivot_root(".", ".").map_err(at("pivot into", stage))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(at("leave", root))?;
    rustix::process::chdir("/").map_err(at("enter", root))
}

fn clone_tree(bind: &Bind, owner: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
    let tree = rustix::mount::open_tree(
        rustix::fs::CWD,
        &bind.source,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )
    .map_err(at("open", &bind.source))?;
    let mut attributes = NOSUID;
    attributes |= if bind.writable { 0 } else { RDONLY };
    attributes |= if bind.device { 0 } else { NODEV };
    attributes |= if bind.executable { 0 } else { NOEXEC };
    set_attributes(tree.as_fd(), attributes).map_err(at("restrict", &bind.source))?;
    if let Some(owner) = owner {
        // Not every file system can; there the program is told that it may not open the file.
        let _ = show_as_own(tree.as_fd(), owner);
    }
    Ok(tree)
}

fn device_number(bind: &Bind) -> Result<u64, Error> {
    rustix::fs::stat(&bind.source).map(|s| s.st_rdev).map_err(at("look at", &bind.source))
}

fn make_node(stage: &Path, bind: &Bind, number: u64, plan: &JailPlan) -> Result<(), Error> {
    use rustix::fs::{CWD, FileType, Gid, Mode, Uid};
    let target = stage.join(bind.target.strip_prefix("/").unwrap_or(&bind.target));
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).map_err(|e| Error::io("make", parent, e))?;
    }
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(CWD, &target, FileType::CharacterDevice, mode, number)
        .map_err(at("make", &target))?;
    let owner = (Some(Uid::from_raw(plan.uid)), Some(Gid::from_raw(plan.gid)));
    rustix::fs::chown(&target, owner.0, owner.1).map_err(at("give away", &target))
}

fn mount_empty(stage: &Path, nodev: bool) -> Result<(), Error> {
    let devices = if nodev { MountAttrFlags::MOUNT_ATTR_NODEV } else { MountAttrFlags::empty() };
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(at("make a root for", stage))?;
    for (key, value) in [("mode", "0755"), ("size", "1m"), ("nr_inodes", "4096")] {
        rustix::mount::fsconfig_set_string(context.as_fd(), key, value)
            .map_err(at("configure the root on", stage))?;
    }
    rustix::mount::fsconfig_create(context.as_fd()).map_err(at("make a root for", stage))?;
    let mount = rustix::mount::fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID | devices,
    )
    .map_err(at("make a root for", stage))?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(mount.as_fd(), "", rustix::fs::CWD, stage, flags)
        .map_err(at("mount the root on", stage))
}

fn place(stage: &Path, bind: &Bind, tree: &OwnedFd) -> Result<(), Error> {
    let inside = bind.target.strip_prefix("/").unwrap_or(&bind.target);
    let target = stage.join(inside);
    let is_dir = rustix::fs::fstat(tree)
        .map(|s| rustix::fs::FileType::from_raw_mode(s.st_mode).is_dir())
        .map_err(at("look at", &bind.source))?;
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).map_err(|e| Error::io("make", parent, e))?;
    }
    if is_dir {
        fs::create_dir_all(&target).map_err(|e| Error::io("make", &target, e))?;
    } else {
        fs::File::create(&target).map_err(|e| Error::io("make", &target, e))?;
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(tree.as_fd(), "", rustix::fs::CWD, &target, flags)
        .map_err(at("bind", &bind.source))
}

/// Mounts the file system for the jail's user alone and gives the other end away. Its server says
/// what the owners of files are, so nobody here needs a privilege to be told.
fn mount_fuse(stage: &Path, fuse: &FuseMount, plan: &JailPlan) -> Result<(), Error> {
    use rustix::fs::{Mode, OFlags};
    use rustix::mount::{MountFlags, mount};
    let device = Path::new("/dev/fuse");
    let end = rustix::fs::open(device, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(at("open", device))?;
    let inside = |path: &Path| stage.join(path.strip_prefix("/").unwrap_or(path));
    let (target, proc) = (inside(&fuse.target), inside(Path::new("/proc")));
    for path in [&target, &proc] {
        fs::create_dir_all(path).map_err(|e| Error::io("make", path, e))?;
    }
    let (uid, gid) = (plan.uid, plan.gid);
    let options = format!("fd={},rootmode=40000,user_id={uid},group_id={gid}", end.as_raw_fd());
    let options = c_path(Path::new(&options))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("lodge", &target, "fuse", flags, Some(options.as_c_str()))
        .map_err(at("mount the root on", &target))?;
    mount("proc", &proc, "proc", flags, Some(c"hidepid=2")).map_err(at("mount", &proc))?;
    give(fuse.socket, &end).map_err(at("give away", device))
}

/// Sends a descriptor over a socket.
fn give(socket: i32, fd: &OwnedFd) -> io::Result<()> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    // SAFETY: whoever wrote the plan opened this descriptor for us and names it there.
    let socket = unsafe { BorrowedFd::borrow_raw(socket) };
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let bytes = [io::IoSlice::new(&[0])];
    sendmsg(socket, &bytes, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn open_path(path: &Path) -> Result<OwnedFd, Error> {
    use rustix::fs::{Mode, OFlags};
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(at("open", path))
}

fn set_attributes(fd: impl AsFd, set: u64) -> io::Result<()> {
    set_attr(fd, MountAttr { set, clear: 0, propagation: 0, userns_fd: 0 })
}

fn show_as_own(fd: BorrowedFd<'_>, owner: BorrowedFd<'_>) -> io::Result<()> {
    let userns_fd = owner.as_raw_fd().unsigned_abs().into();
    set_attr(fd, MountAttr { set: IDMAP, clear: 0, propagation: 0, userns_fd })
}

fn set_attr(fd: impl AsFd, attr: MountAttr) -> io::Result<()> {
    let empty = CString::default();
    // SAFETY: the path is a terminated empty string, `attr` lives through the call and its size is
    // passed with it; the kernel only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_fd().as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A path as a C string; plans are JSON, so a NUL is possible.
pub(crate) fn c_path(path: &Path) -> Result<CString, Error> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::io("use", path, io::ErrorKind::InvalidInput.into()))
}
