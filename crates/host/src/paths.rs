//! Where things are. The one place that knows folders; every path of the host crate starts here.

use std::io;
use std::path::{Path, PathBuf};

use lodge_spec::names::{Digest, MachineId};

/// The folders of one instance. Two instances with different folders never meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// Survives the host's reboot.
    pub state: PathBuf,
    /// Does not need to.
    pub run: PathBuf,
}

impl Paths {
    /// `LODGE_HOME` if set, else the system's folders for root and the user's own otherwise.
    pub fn find() -> Self {
        let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        if let Some(home) = var("LODGE_HOME") {
            let home = std::path::absolute(&home).unwrap_or(home);
            return Self { run: home.join("run"), state: home };
        }
        let uid = rustix::process::geteuid();
        if uid.is_root() {
            return Self { state: "/var/lib/lodge".into(), run: "/run/lodge".into() };
        }
        let home = var("HOME").unwrap_or_else(|| "/".into());
        let state = var("XDG_STATE_HOME").unwrap_or_else(|| home.join(".local/state"));
        let run =
            var("XDG_RUNTIME_DIR").unwrap_or_else(|| format!("/tmp/lodge-{}", uid.as_raw()).into());
        Self { state: state.join("lodge"), run: run.join("lodge") }
    }

    /// Makes the folders, for their owner only: they hold disks, consoles and sockets.
    pub fn make(&self) -> io::Result<()> {
        for dir in [&self.state, &self.run, &self.machines(), &self.blobs(), &self.cache()] {
            make_dir(dir)?;
            // A folder that somebody else prepared for us in a public place is a trap.
            use std::os::unix::fs::MetadataExt;
            if std::fs::metadata(dir)?.uid() != rustix::process::geteuid().as_raw() {
                let what = format!("{} belongs to another user", dir.display());
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
            }
        }
        Ok(())
    }

    /// What the host's owner has decided; read when the daemon starts.
    pub fn settings(&self) -> PathBuf {
        let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        if var("LODGE_HOME").is_some() {
            return self.state.join("lodge.toml");
        }
        if rustix::process::geteuid().is_root() {
            return "/etc/lodge/lodge.toml".into();
        }
        let home = var("HOME").unwrap_or_else(|| "/".into());
        let config = var("XDG_CONFIG_HOME").unwrap_or_else(|| home.join(".config"));
        config.join("lodge/lodge.toml")
    }

    /// Where the daemon listens.
    pub fn socket(&self) -> PathBuf {
        self.run.join("lodge.sock")
    }

    pub fn machines(&self) -> PathBuf {
        self.state.join("machines")
    }

    /// What a machine keeps between its runs.
    pub fn machine(&self, id: MachineId) -> PathBuf {
        self.machines().join(id.to_string())
    }

    /// What the machine shows under `zones`: `config`, and `root` with its media.
    pub fn zone(&self, id: MachineId) -> PathBuf {
        self.machine(id).join("zone")
    }

    /// The folder of `own:` files.
    pub fn own_folder(&self, id: MachineId) -> PathBuf {
        own_folder_in(&self.machine(id))
    }

    /// Where people look for machines' folders: below the root where that can be written to.
    pub fn zones(&self) -> PathBuf {
        let (zones, root) = (Path::new("/zones"), Path::new("/"));
        let possible = || rustix::fs::access(root, rustix::fs::Access::WRITE_OK).is_ok();
        match self.state == Path::new("/var/lib/lodge") && (zones.is_dir() || possible()) {
            true => zones.to_owned(),
            false => self.state.join("zones"),
        }
    }

    /// What a machine has while it runs.
    pub fn running(&self, id: MachineId) -> PathBuf {
        // Short, because socket paths must fit in 108 bytes.
        self.run.join("m").join(id.0.simple().to_string())
    }

    pub fn network(&self, name: &str) -> PathBuf {
        self.run.join("net").join(name)
    }

    pub fn console_log(&self, id: MachineId) -> PathBuf {
        self.machine(id).join("console.log")
    }

    pub fn blobs(&self) -> PathBuf {
        self.state.join("images").join("sha256")
    }

    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.as_str())
    }

    /// What can be made again.
    pub fn cache(&self) -> PathBuf {
        self.state.join("cache")
    }
}

/// The folder of `own:` files of a machine that keeps its state in `state`.
pub fn own_folder_in(state: &Path) -> PathBuf {
    state.join("zone/root")
}

/// Makes a folder and those above it, for the owner only.
pub fn make_dir(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o711).create(path)
}

/// This very program, also after another one has taken its place.
pub fn own_program() -> io::Result<PathBuf> {
    let own = std::env::current_exe()?;
    Ok(if own.exists() { own } else { "/proc/self/exe".into() })
}

/// The program beside this one, or on PATH.
pub fn sibling_program(name: &str) -> io::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let beside = own.with_file_name(name);
    if beside.exists() {
        Ok(beside)
    } else {
        find_program(name).ok_or(io::ErrorKind::NotFound.into())
    }
}

/// The program that a variable names, else the one on PATH; an empty variable names none.
pub fn named_program(variable: &str, name: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).filter(|value| !value.is_empty());
    named.map(PathBuf::from).or_else(|| find_program(name))
}

/// Looks along PATH and where system programs are.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(extra)
        .map(|dir| dir.join(name))
        .find(|p| p.is_file() && rustix::fs::access(p, rustix::fs::Access::EXEC_OK).is_ok())
}

/// Whether a file lies below a folder, no link on the way leading out of it.
pub fn lies_beneath(root: &Path, path: &Path) -> Result<(), String> {
    open_beneath(root, path, rustix::fs::OFlags::PATH).map(drop)
}

/// Opens a file below a folder, no link on the way leading out of it: looked at and opened in one
/// step, so that nobody can exchange it in between.
pub fn open_beneath(
    root: &Path,
    path: &Path,
    how: rustix::fs::OFlags,
) -> Result<std::os::fd::OwnedFd, String> {
    use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
    let text = |e: rustix::io::Errno| match e {
        rustix::io::Errno::XDEV => {
            format!("{}: a link leads out of {}", path.display(), root.display())
        }
        e => format!("{}: {e}", path.display()),
    };
    let rest = path.strip_prefix(root).map_err(|_| format!("{} is elsewhere", path.display()))?;
    let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, root, folder, Mode::empty()).map_err(text)?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let flags = how | OFlags::CLOEXEC;
    rustix::fs::openat2(&root, rest, flags, Mode::empty(), resolve).map_err(text)
}

/// Writes a file as a whole or not at all.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_whole(path, bytes, 0o644)
}

/// The same for what is nobody else's to read.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_whole(path, bytes, 0o600)
}

fn write_whole(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    // A name of its own, so that two who write the same file do not share it.
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut part = tempfile::Builder::new().prefix("part-").tempfile_in(folder)?;
    std::io::Write::write_all(&mut part, bytes)?;
    part.as_file().sync_all()?;
    use std::os::unix::fs::PermissionsExt;
    part.as_file().set_permissions(std::fs::Permissions::from_mode(mode))?;
    part.persist(path).map(drop).map_err(|e| e.error)
}

/// Bytes that the file system of a folder holds, used and free.
pub fn capacity(folder: &Path) -> u64 {
    rustix::fs::statvfs(folder).map_or(0, |found| found.f_blocks.saturating_mul(found.f_frsize))
}

/// Identifies this installation of the host, in the form of a UUID.
pub fn host_id() -> String {
    let id = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let id = id.trim();
    match id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()) {
        true => [&id[..8], &id[8..12], &id[12..16], &id[16..20], &id[20..]].join("-"),
        false => "00000000-0000-0000-0000-000000000000".to_owned(),
    }
}

/// Identifies this boot of the host.
pub fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

impl Paths {
    /// A name that this instance gave to something: the folder of its machine is or was here.
    pub fn machine_known(&self, name: &str) -> bool {
        name.parse::<MachineId>().is_ok_and(|id| self.machine(id).exists())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lead_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        std::fs::write(root.join("a"), "").unwrap();
        std::fs::write(dir.path().join("secret"), "").unwrap();
        let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, root.join(name)).unwrap();
        link("a", "inside");
        link("../secret", "out");
        link("/etc/passwd", "far");
        for good in ["a", "inside"] {
            assert_eq!(lies_beneath(&root, &root.join(good)), Ok(()), "{good}");
        }
        for bad in ["out", "far", "none"] {
            assert!(lies_beneath(&root, &root.join(bad)).is_err(), "{bad}");
        }
    }
}
