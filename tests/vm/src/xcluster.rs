//! An instance spoken to as `xc`, with a workspace of its own, and the kernel that nodes boot:
//! built once, kept outside the tree.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use sha2::{Digest, Sha256};

use crate::Lab;
use crate::assets::cache;
use crate::lab::{command, program};
use crate::vmadm::Said;

pub struct Xc {
    pub lab: Lab,
    variables: Vec<(String, String)>,
}

/// The folder of overlays that Lodge ships.
pub fn shipped() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest/xcluster/ovl").canonicalize().unwrap()
}

/// Debian's package, where this host has another busybox.
const BUSYBOX: &str = "ws/xcluster/packages/busybox";

fn busybox() -> PathBuf {
    cache().join("xcluster-busybox")
}

/// Where kernels are built for all tests: it holds the sources and what came out.
fn kernels() -> PathBuf {
    let dir = cache().join("kernels");
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// What whoever runs the tests has set for clusters of their own is not the tests'.
fn forget_own(command: &mut Command) {
    let meant = |name: &str| ["__", "XCLUSTER", "xcluster_"].iter().any(|p| name.starts_with(p));
    for (name, _) in std::env::vars().filter(|(name, _)| meant(name)) {
        command.env_remove(name);
    }
}

/// The variables under which a kernel that was built before is found.
pub fn kernel_variables(command: &mut Command) {
    forget_own(command);
    let dir = kernels();
    command.env("LODGE_HOME", dir.join("home")).env("XCLUSTER_WORKSPACE", dir.join("ws"));
    command.env("HOME", &dir);
}

/// Runs `xc` where kernels are built.
pub fn at_kernels(words: &[&str], more: &[(&str, &str)]) -> Output {
    let mut command = command(program());
    command.arg("xc").args(words).stdin(Stdio::null());
    kernel_variables(&mut command);
    command.envs(more.iter().copied());
    command.output().unwrap()
}

/// The kernel and the folder of its objects. Built by whoever comes first; others wait.
pub fn kernel() -> (PathBuf, PathBuf) {
    let dir = kernels();
    let lock = fs::File::create(dir.join("lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let home = dir.join("ws/xcluster");
    let (kernel, objects) = (home.join("bzImage-linux-6.1"), home.join("obj-linux-6.1"));
    let config = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../crates/host/src/kernel_build/small.config");
    let digest = format!("{:x}", Sha256::digest(fs::read(config).unwrap()));
    let stamp = dir.join("stamp");
    if fs::read_to_string(&stamp).ok().as_deref() != Some(&digest) || !kernel.is_file() {
        let built = at_kernels(&["kernel_build"], &[]);
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        fs::write(stamp, digest).unwrap();
    }
    (kernel, objects)
}

impl Xc {
    /// With the built kernel, and without an image.
    pub fn new() -> Self {
        let (kernel, objects) = kernel();
        let mut own = Self::bare();
        own.set("__kbin", kernel.to_str().unwrap());
        own.set("__kobj", objects.to_str().unwrap());
        own
    }

    /// Of an ordinary user, with the kernel.
    pub fn of_user(uid: u32) -> Self {
        let (kernel, _) = kernel();
        let mut own = Self::in_lab(Lab::of_user(uid));
        let copy = own.path("bzImage");
        fs::copy(kernel, &copy).unwrap();
        own.set("__kbin", copy.to_str().unwrap());
        // Root's folders are not theirs.
        let packages = own.path(BUSYBOX);
        let _ = fs::remove_file(&packages);
        if busybox().exists() {
            let copied = command("cp").arg("-a").arg(busybox()).arg(&packages).status();
            assert!(copied.unwrap().success());
        }
        let owner = format!("{uid}:{uid}");
        let given = command("chown").args(["-R", &owner]).arg(own.path("ws")).arg(copy).status();
        assert!(given.unwrap().success());
        own
    }

    /// With nothing built at all.
    pub fn bare() -> Self {
        Self::in_lab(Lab::new())
    }

    fn in_lab(lab: Lab) -> Self {
        let mut own = Self { lab, variables: Vec::new() };
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        own.set("HOME", &text(own.path("user")));
        own.set("XCLUSTER_WORKSPACE", &text(own.path("ws")));
        own.set("XCLUSTER_OVLPATH", &format!("{}:{}", text(own.path("ovl")), text(shipped())));
        // Clusters of tests run beside each other.
        // Below the ports that outgoing connections take.
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 40;
        let base = 20_000 + number * 300;
        own.set("XCLUSTER_SSH_BASE", &base.to_string());
        own.set("XCLUSTER_TELNET_BASE", &(base + 5).to_string());
        // Fetched once for all tests.
        fs::create_dir_all(own.path("ws/xcluster/packages")).unwrap();
        if busybox().exists() {
            std::os::unix::fs::symlink(busybox(), own.path(BUSYBOX)).unwrap();
        }
        own
    }

    /// With an image too.
    pub fn with_image() -> Self {
        let own = Self::new();
        own.ok(&["mkimage"]);
        let fetched = own.path(BUSYBOX);
        if fetched.is_dir() && !busybox().exists() {
            let part = tempfile::tempdir_in(cache()).unwrap();
            let copied = command("cp").arg("-a").arg(fetched).arg(part.path()).status();
            assert!(copied.unwrap().success());
            // Another test may have been faster.
            let _ = fs::rename(part.path().join("busybox"), busybox());
        }
        own
    }

    pub fn set(&mut self, name: &str, value: &str) {
        self.variables.retain(|(known, _)| known != name);
        self.variables.push((name.to_owned(), value.to_owned()));
    }

    pub fn variable(&self, name: &str) -> &str {
        let own = self.variables.iter().find(|(known, _)| known == name);
        own.map_or("", |(_, value)| value)
    }

    pub fn unset(&mut self, name: &str) {
        self.variables.retain(|(known, _)| known != name);
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.lab.home().join(below)
    }

    pub fn image(&self) -> PathBuf {
        self.path("ws/xcluster/hd.img")
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut all = vec!["xc"];
        all.extend(words);
        let mut command = self.lab.command(&all);
        forget_own(&mut command);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command.current_dir(self.lab.home());
        command
    }

    pub fn says(&self, words: &[&str]) -> Said {
        let output = self.command(words).stdin(Stdio::null()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let code = output.status.code().unwrap_or(-1);
        Said { out: text(&output.stdout), err: text(&output.stderr), code }
    }

    /// Runs a command that must succeed; what it printed.
    pub fn ok(&self, words: &[&str]) -> String {
        let said = self.says(words);
        assert_eq!(said.code, 0, "{words:?}: {said:?}");
        said.out
    }

    /// Runs a command that must fail; its complaint.
    pub fn fails(&self, words: &[&str]) -> String {
        let said = self.says(words);
        assert_eq!(said.code, 1, "{words:?}: {said:?}");
        said.err
    }

    /// Makes an overlay whose program `tar` is this script.
    pub fn overlay(&self, name: &str, script: &str) -> PathBuf {
        let dir = self.path("ovl").join(name);
        fs::create_dir_all(&dir).unwrap();
        let tar = dir.join("tar");
        fs::write(&tar, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&tar, fs::Permissions::from_mode(0o755)).unwrap();
        dir
    }

    /// Makes an overlay of these files.
    pub fn files(&self, name: &str, files: &[(&str, &str)]) {
        let dir = self.overlay(name, "cd \"$(dirname \"$0\")/default\" && tar -cf \"$1\" -- *");
        for (path, content) in files {
            let path = dir.join("default").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
    }

    /// A command on a VM.
    pub fn rsh(&self, id: u8, script: &str) -> String {
        let id = id.to_string();
        self.ok(&["rsh", &id, script])
    }

    /// A file of the image, by the reference tools.
    pub fn debugfs(&self, request: &str) -> String {
        let raw = self.raw();
        let output = command("debugfs").args(["-R", request]).arg(raw.path()).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The image as a raw disk, found clean.
    pub fn raw(&self) -> tempfile::NamedTempFile {
        let raw = tempfile::NamedTempFile::new_in(self.lab.home()).unwrap();
        let convert = command("qemu-img")
            .args(["convert", "-O", "raw"])
            .arg(self.image())
            .arg(raw.path())
            .status();
        assert!(convert.unwrap().success());
        let checked = command("e2fsck").arg("-fn").arg(raw.path()).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
        raw
    }
}

impl Default for Xc {
    fn default() -> Self {
        Self::new()
    }
}
