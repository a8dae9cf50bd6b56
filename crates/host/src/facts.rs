//! What this host can do, found out once and kept for as long as it holds: probes of programs by
//! file, probes of the processor by boot.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use lodge_jail::cgroup::Hierarchy;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::backend::qemu::QemuFacts;
use crate::backend::vmm::VmmFacts;
use crate::backend::{cloud_hypervisor, firecracker};
use crate::kvm::{self, KvmFact};
use crate::paths::{self, Paths};

/// Everything that planning needs to know about the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    pub kvm: KvmFact,
    /// Kilohertz of the time stamp counter.
    pub tsc_khz: u64,
    /// The error says why QEMU cannot be used.
    pub qemu: Result<QemuFacts, String>,
    pub firecracker: Result<VmmFacts, String>,
    pub cloud_hypervisor: Result<VmmFacts, String>,
    pub cgroups: Hierarchy,
    pub rootless: bool,
    /// Whether tap interfaces can be made; the error says why not.
    pub tun: Result<(), String>,
}

impl Facts {
    /// Looks at the host; takes what was found before from the cache where it still holds.
    pub async fn gather(paths: &Paths) -> Self {
        let boot = paths::boot_id();
        let cache = paths.cache();
        let (kvm, tsc_khz) = match load(&cache.join("processor.json"), &boot) {
            Some(found) => found,
            None => {
                let probed = tokio::task::spawn_blocking(|| (kvm::probe(), tsc_khz())).await;
                let found = probed.unwrap_or_else(|e| {
                    (KvmFact::Unproven { why: format!("the proof broke off: {e}") }, 0)
                });
                save(&cache.join("processor.json"), &boot, &found);
                found
            }
        };
        Self {
            kvm: still_there(kvm),
            tsc_khz,
            qemu: QemuFacts::find(&cache).await,
            firecracker: VmmFacts::find(&firecracker::SEARCH, &cache).await,
            cloud_hypervisor: VmmFacts::find(&cloud_hypervisor::SEARCH, &cache).await,
            cgroups: Hierarchy::detect(Path::new("/sys/fs/cgroup")),
            rootless: !rustix::process::geteuid().is_root(),
            tun: openable(Path::new("/dev/net/tun")),
        }
    }
}

/// The proof holds for a boot, the permission to open the device does not.
fn still_there(kvm: KvmFact) -> KvmFact {
    match (&kvm, openable(Path::new("/dev/kvm"))) {
        (KvmFact::Absent { .. }, Ok(())) => kvm::probe(),
        (_, Err(why)) => KvmFact::Absent { why },
        (KvmFact::Unproven { .. } | KvmFact::Proven { .. }, Ok(())) => kvm,
    }
}

fn openable(path: &Path) -> Result<(), String> {
    match fs::File::options().read(true).write(true).open(path) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Err(format!("there is no {}", path.display()))
        }
        Err(e) => Err(format!("{} cannot be opened: {e}", path.display())),
    }
}

#[derive(Serialize, Deserialize)]
struct Cached<T> {
    version: String,
    key: String,
    value: T,
}

/// A cached value, if it was found under the same key by the same version of this program.
pub(crate) fn load<T: DeserializeOwned>(path: &Path, key: &str) -> Option<T> {
    let cached: Cached<T> = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    (cached.key == key && cached.version == env!("CARGO_PKG_VERSION")).then_some(cached.value)
}

/// Keeps a value; losing it only costs the time to find it again.
pub(crate) fn save<T: Serialize>(path: &Path, key: &str, value: &T) {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    if let Ok(text) = serde_json::to_vec(&Cached { version, key: key.to_owned(), value }) {
        let _ = paths::write_atomically(path, &text);
    }
}

/// Names a file's content without reading it: the same key means the same bytes.
pub(crate) fn file_key(path: &Path) -> io::Result<String> {
    let meta = fs::metadata(path)?;
    let (dev, ino, size) = (meta.dev(), meta.ino(), meta.size());
    Ok(format!("{dev:x}-{ino:x}-{size:x}-{:x}.{:x}", meta.mtime(), meta.mtime_nsec()))
}

/// Where a program really is, and the key that what it said of itself is kept under.
pub(crate) fn identify(program: &Path) -> Result<(PathBuf, String), String> {
    let identify = || {
        let path = program.canonicalize()?;
        let key = format!("{} {}", path.display(), file_key(&path)?);
        Ok((path, key))
    };
    identify().map_err(|e: io::Error| format!("{}: {e}", program.display()))
}

/// Measures the time stamp counter against the clock.
fn tsc_khz() -> u64 {
    // SAFETY: reading the counter has no effect; x86-64 always has it.
    let now = || unsafe { core::arch::x86_64::_rdtsc() };
    let (begun, first) = (Instant::now(), now());
    std::thread::sleep(Duration::from_millis(10));
    let (took, last) = (begun.elapsed(), now());
    let per_ms = u128::from(last - first) * 1_000_000 / took.as_nanos().max(1);
    u64::try_from(per_ms).unwrap_or(0)
}

/// A program and the files it needs to start, for its jail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    pub path: PathBuf,
    /// Interpreter, libraries and modules, at their own paths.
    pub files: Vec<PathBuf>,
}

impl Program {
    /// Everything that it needs is where it was.
    pub(crate) fn is_whole(&self) -> bool {
        self.files.iter().all(|file| file.exists())
    }
}
