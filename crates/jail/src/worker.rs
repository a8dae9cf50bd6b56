//! A lesser jail for processes of our own that read foreign bytes: from here on they start no
//! program, have no capabilities, are nobody in particular, and see no file but those they name.
//! They stay in their network, for those whose work is to fetch.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use crate::enter::{Error, become_user, drop_capabilities, step};
use crate::script;

/// What the calling process keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkerPlan {
    /// User and group to become, where the caller is root.
    pub uid: Option<u32>,
    /// Files, and folders with all that is in them. Those that do not exist are left out.
    pub readable: Vec<PathBuf>,
    /// The same, to be written to as well.
    pub writable: Vec<PathBuf>,
}

/// What the C library reads to find the address of a name.
const NAMES: &[&str] = &[
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/run/systemd/resolve",
    "/dev/null",
    "/dev/urandom",
];

/// Confines the calling process, which has one thread yet.
pub fn confine(plan: &WorkerPlan) -> Result<(), Error> {
    rustix::thread::set_no_new_privs(true).map_err(step("forbid new privileges"))?;
    if rustix::process::geteuid().is_root() {
        if let Some(id) = plan.uid {
            become_user(id, id)?;
        }
        drop_capabilities()?;
    }
    restrict(plan)?;
    // Others of the same user neither look into this one nor stop it.
    // SAFETY: takes plain numbers and concerns only the caller.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
    seccompiler::apply_filter(&filter()?)?;
    Ok(())
}

fn restrict(plan: &WorkerPlan) -> Result<(), Error> {
    let failed = |e: &dyn std::fmt::Display| Error::Step {
        what: "restrict which files are seen",
        source: io::Error::other(e.to_string()),
    };
    let abi = ABI::V3;
    let (reads, all) = (AccessFs::ReadFile | AccessFs::ReadDir, AccessFs::from_all(abi));
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)
        .and_then(|r| r.create())
        .map_err(|e| failed(&e))?;
    let names = NAMES.iter().map(PathBuf::from);
    let readable = names.chain(plan.readable.iter().cloned()).map(|path| (path, reads));
    let writable = plan.writable.iter().cloned().map(|path| (path, all & !AccessFs::Execute));
    for (path, access) in readable.chain(writable) {
        let Ok(fd) = PathFd::new(&path) else { continue };
        let file = AccessFs::from_file(abi);
        let access = if Path::new(&path).is_dir() { access } else { access & file };
        ruleset = ruleset.add_rule(PathBeneath::new(fd, access)).map_err(|e| failed(&e))?;
    }
    script::enforced(ruleset.restrict_self().map_err(|e| failed(&e))?)
}

/// Nothing that starts programs, looks into others, or changes the system.
fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let calls = [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_kill,
        libc::SYS_tkill,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_getfd,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_fsopen,
        libc::SYS_open_tree,
        libc::SYS_move_mount,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_setns,
        libc::SYS_unshare,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_io_uring_setup,
        libc::SYS_userfaultfd,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_kexec_load,
        libc::SYS_reboot,
        libc::SYS_swapon,
        libc::SYS_open_by_handle_at,
        libc::SYS_personality,
    ];
    let rules: BTreeMap<i64, Vec<_>> = calls.iter().map(|call| (*call, Vec::new())).collect();
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM as u32),
        TargetArch::x86_64,
    )?;
    filter.try_into()
}
