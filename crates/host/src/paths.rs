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

/// Makes a folder and those above it, for the owner only.
pub fn make_dir(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o711).create(path)
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

/// Looks along PATH and where system programs are.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(extra)
        .map(|dir| dir.join(name))
        .find(|p| p.is_file() && rustix::fs::access(p, rustix::fs::Access::EXEC_OK).is_ok())
}

/// Writes a file as a whole or not at all.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let part = path.with_extension("part");
    std::fs::write(&part, bytes)?;
    std::fs::File::open(&part)?.sync_all()?;
    std::fs::rename(&part, path)
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
