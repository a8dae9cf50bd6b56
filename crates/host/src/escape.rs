//! Code that tries to leave its jail by every way that its author could think of, and says
//! which ways were open. What it tries is harmless where it should succeed.

use std::ffi::CString;

/// Name of a way, and whether it is closed.
pub type Attempt = (&'static str, bool);

/// The kernel would not hear of it: a call that is only wrong is no proof.
fn failed(result: libc::c_long) -> bool {
    let why = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
    result < 0 && matches!(why, libc::EPERM | libc::ENOSYS | libc::EACCES)
}

fn denied(result: i32) -> bool {
    failed(libc::c_long::from(result))
}

fn c(text: &str) -> CString {
    CString::new(text).unwrap_or_default()
}

fn opens(path: &str, flags: i32) -> bool {
    // SAFETY: a terminated path; the descriptor is closed with the process.
    unsafe { libc::open(c(path).as_ptr(), flags, 0o600) >= 0 }
}

/// Tries them all. The process must be a confined one: some of these would do harm elsewhere.
/// `canary`: a file of the host, such as another machine's disk.
pub fn attempts(canary: &str) -> Vec<Attempt> {
    let mut list: Vec<Attempt> = Vec::new();
    let mut say = |way, closed| list.push((way, closed));
    files(&mut say);
    say(
        "what belongs to another machine",
        !opens(canary, libc::O_RDONLY)
            && !opens(canary, libc::O_RDWR)
            && !opens("/proc/self/fd/0", 0),
    );
    names(canary, &mut say);
    neighbours(&mut say);
    processes(&mut say);
    standing(&mut say);
    kernel(&mut say);
    threads(&mut say);
    list
}

/// A system call by its number.
///
/// # Safety
/// As safe as the call with these arguments.
unsafe fn call(number: i64, a: u64, b: u64, d: u64) -> bool {
    // SAFETY: whoever calls answers for the arguments.
    failed(unsafe { libc::syscall(number, a, b, d, 0u64, 0u64) })
}

/// Paths that lead to the host, or to places to write in.
fn files(mut say: impl FnMut(&'static str, bool)) {
    let host = [
        "/etc/passwd",
        "/etc/shadow",
        "/root",
        "/home",
        "/var/lib",
        "/usr/bin/env",
        "/bin/sh",
        "/tmp",
    ];
    say("files of the host", host.iter().all(|path| !opens(path, libc::O_RDONLY)));
    say(
        "the list of processes",
        !opens("/proc/1/status", libc::O_RDONLY) && !opens("/proc/self/exe", libc::O_RDONLY),
    );
    say(
        "the kernel's settings",
        !opens("/sys/kernel", libc::O_RDONLY) && !opens("/proc/sys", libc::O_RDONLY),
    );
    say(
        "devices",
        !opens("/dev/mem", libc::O_RDONLY)
            && !opens("/dev/sda", libc::O_RDONLY)
            && !opens("/dev/fuse", libc::O_RDWR),
    );
    say("writing to its root", !opens("/mark", libc::O_WRONLY | libc::O_CREAT));
    say("writing beside its files", !opens("/disks/mark", libc::O_WRONLY | libc::O_CREAT));
    say("the folder above its root", {
        // SAFETY: plain calls with terminated paths.
        unsafe { libc::chdir(c("/..").as_ptr()) };
        !opens("../../../../../../etc/passwd", libc::O_RDONLY)
    });
}

/// Names, links, rights and lengths, of the host's files and of what is inside.
fn names(canary: &str, mut say: impl FnMut(&'static str, bool)) {
    let shut = |result: i32| {
        let why = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        let known =
            [libc::EPERM, libc::EACCES, libc::EROFS, libc::ENOENT, libc::ENOSYS, libc::EXDEV];
        result < 0 && known.contains(&why)
    };
    let inside = ["/", "/lib64", "/dev/null", canary];
    // SAFETY: terminated paths and plain numbers.
    unsafe {
        say(
            "renaming and linking",
            inside.iter().all(|path| {
                shut(libc::rename(c(path).as_ptr(), c("/renamed").as_ptr()))
                    && shut(libc::link(c(path).as_ptr(), c("/linked").as_ptr()))
                    && shut(libc::symlink(c(path).as_ptr(), c("/pointed").as_ptr()))
            }),
        );
        say(
            "rights and owners",
            inside.iter().all(|path| {
                shut(libc::chmod(c(path).as_ptr(), 0o777))
                    && shut(libc::chown(c(path).as_ptr(), 0, 0))
            }),
        );
        say(
            "cutting and removing",
            inside.iter().all(|path| shut(libc::truncate(c(path).as_ptr(), 0)) || *path == "/")
                && shut(libc::unlink(c(canary).as_ptr()))
                && shut(libc::mkdir(c("/made").as_ptr(), 0o777)),
        );
    }
}

/// The name under which the host waits for whoever might come; the kernel keeps it by network.
pub const ABSTRACT: &[u8] = b"\0lodge-canary";

/// Sockets of the host that have no file.
fn neighbours(mut say: impl FnMut(&'static str, bool)) {
    // SAFETY: the address is a plain structure that lives through the calls.
    unsafe {
        let socket = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0);
        let mut address: libc::sockaddr_un = std::mem::zeroed();
        address.sun_family = libc::AF_UNIX as libc::sa_family_t;
        for (to, from) in address.sun_path.iter_mut().zip(ABSTRACT) {
            *to = *from as libc::c_char;
        }
        let length = (size_of::<libc::sa_family_t>() + ABSTRACT.len()) as libc::socklen_t;
        let connected = libc::connect(socket, (&raw const address).cast(), length);
        say("sockets without a file", connected < 0);
    }
}

/// Sockets, processes and programs.
fn processes(mut say: impl FnMut(&'static str, bool)) {
    // SAFETY: every call takes numbers, or pointers to what lives through it; each of them is
    // refused, or changes only this process, which ends when it has reported.
    unsafe {
        let sockets = [
            libc::AF_INET,
            libc::AF_INET6,
            libc::AF_NETLINK,
            libc::AF_PACKET,
            libc::AF_VSOCK,
            libc::AF_ALG,
            libc::AF_BLUETOOTH,
        ];
        say(
            "sockets to anywhere",
            sockets.iter().all(|family| {
                [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_RAW]
                    .iter()
                    .all(|kind| denied(libc::socket(*family, *kind, 0)))
            }),
        );
        say("another process", {
            let child = libc::fork();
            if child == 0 {
                libc::_exit(0);
            }
            denied(child)
        });
        say("a process by vfork", call(libc::SYS_vfork, 0, 0, 0));
        say("a process by clone", call(libc::SYS_clone, libc::SIGCHLD as u64, 0, 0));
        say("a process by clone3", call(libc::SYS_clone3, 0, 0, 0));
        say(
            "a namespace of its own",
            [libc::CLONE_NEWUSER, libc::CLONE_NEWNS, libc::CLONE_NEWNET, libc::CLONE_NEWPID]
                .iter()
                .all(|flag| call(libc::SYS_unshare, *flag as u64, 0, 0)),
        );
        let (shell, nothing) = (c("/bin/sh"), [std::ptr::null::<libc::c_char>()]);
        say(
            "another program",
            denied(libc::execve(shell.as_ptr(), nothing.as_ptr(), nothing.as_ptr())),
        );
        say("itself again by its descriptor", {
            // The filter knows the first number, under which nothing is open any more.
            let again = |fd: i64| {
                let (name, flags) = (c(""), libc::AT_EMPTY_PATH);
                let list = nothing.as_ptr();
                libc::syscall(libc::SYS_execveat, fd, name.as_ptr(), list, list, flags)
            };
            again(1000) < 0 && [3, 4, 5].iter().all(|fd| failed(again(*fd)))
        });
        say("a program from memory", {
            let fd = libc::syscall(libc::SYS_memfd_create, c("x").as_ptr(), 0);
            fd < 0
                || failed(libc::syscall(
                    libc::SYS_execveat,
                    fd,
                    c("").as_ptr(),
                    nothing.as_ptr(),
                    nothing.as_ptr(),
                    libc::AT_EMPTY_PATH,
                ))
        });
        say(
            "the descriptor above the limit",
            libc::dup2(1, 1000) < 0 && libc::fcntl(1, libc::F_DUPFD, 1000) < 0,
        );
        say("a higher limit", {
            let more = libc::rlimit { rlim_cur: 5000, rlim_max: 5000 };
            denied(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const more))
        });
    }
}

/// Mounts, devices, users and capabilities.
fn standing(mut say: impl FnMut(&'static str, bool)) {
    // SAFETY: every call takes numbers, or pointers to what lives through it; each of them is
    // refused, or changes only this process, which ends when it has reported.
    unsafe {
        say(
            "mounts",
            call(libc::SYS_mount, 0, c("/").as_ptr() as u64, 0)
                && call(libc::SYS_umount2, c("/").as_ptr() as u64, 2, 0)
                && call(libc::SYS_open_tree, libc::AT_FDCWD as u64, c("/").as_ptr() as u64, 0)
                && call(libc::SYS_fsopen, c("proc").as_ptr() as u64, 0, 0),
        );
        say(
            "another root",
            denied(libc::chroot(c("/").as_ptr()))
                && call(libc::SYS_pivot_root, c("/").as_ptr() as u64, c("/").as_ptr() as u64, 0),
        );
        say(
            "device nodes",
            libc::mknod(c("/run/x").as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(1, 1)) < 0
                && libc::mknod(c("/x").as_ptr(), libc::S_IFBLK | 0o600, libc::makedev(8, 0)) < 0,
        );
        say(
            "being somebody else",
            denied(libc::setuid(0))
                && denied(libc::setgid(0))
                && denied(libc::setresuid(0, 0, 0))
                && denied(libc::setgroups(0, std::ptr::null())),
        );
        say(
            "capabilities",
            call(libc::SYS_capset, 0, 0, 0)
                && libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, 21, 0, 0) < 0,
        );
    }
}

/// Other processes, and the kernel's own doors.
fn kernel(mut say: impl FnMut(&'static str, bool)) {
    // SAFETY: every call takes numbers, or pointers to what lives through it; each of them is
    // refused, or changes only this process, which ends when it has reported.
    unsafe {
        say(
            "looking into others",
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) < 0
                && call(libc::SYS_process_vm_readv, 1, 0, 0),
        );
        say("signals to others", denied(libc::kill(-1, 0)) && denied(libc::kill(2, 0)));
        say(
            "what others wait for",
            call(libc::SYS_pidfd_open, 1, 0, 0) && call(libc::SYS_pidfd_getfd, 3, 0, 0),
        );
        say(
            "programs in the kernel",
            call(libc::SYS_bpf, 0, 0, 0)
                && call(libc::SYS_perf_event_open, 0, 0, 0)
                && call(libc::SYS_userfaultfd, 0, 0, 0),
        );
        say(
            "the kernel itself",
            call(libc::SYS_init_module, 0, 0, 0)
                && call(libc::SYS_kexec_load, 0, 0, 0)
                && call(libc::SYS_reboot, 0xfee1_dead, 672_274_793, 0)
                && call(libc::SYS_syslog, 3, 0, 0),
        );
        say("keys", call(libc::SYS_keyctl, 0, 0, 0) && call(libc::SYS_add_key, 0, 0, 0));
        say(
            "handles of files",
            call(libc::SYS_open_by_handle_at, libc::AT_FDCWD as u64, 0, 0)
                && call(
                    libc::SYS_name_to_handle_at,
                    libc::AT_FDCWD as u64,
                    c("/").as_ptr() as u64,
                    0,
                ),
        );
        say("rings", call(libc::SYS_io_uring_setup, 8, 0, 0));
        say(
            "the clock and the name",
            denied(libc::sethostname(c("x").as_ptr(), 1)) && call(libc::SYS_settimeofday, 0, 0, 0),
        );
        say("typing into the terminal", {
            let letter = b'x';
            denied(libc::ioctl(0, libc::TIOCSTI, &raw const letter))
        });
        say(
            "scheduling above others",
            denied(libc::setpriority(libc::PRIO_PROCESS, 0, -5)) && {
                let realtime = libc::sched_param { sched_priority: 50 };
                denied(libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const realtime))
            },
        );
        say("memory shared with others", denied(libc::shmget(1, 4096, libc::IPC_CREAT | 0o600)));
    }
}

/// More threads than the group has room for.
fn threads(mut say: impl FnMut(&'static str, bool)) {
    say("more threads than it may have", {
        let mut threads = Vec::new();
        let mut refused = false;
        for _ in 0..600 {
            match std::thread::Builder::new().stack_size(64 << 10).spawn(std::thread::park) {
                Ok(thread) => threads.push(thread),
                Err(_) => {
                    refused = true;
                    break;
                }
            }
        }
        for thread in threads {
            thread.thread().unpark();
        }
        refused
    });
}
