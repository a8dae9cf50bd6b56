//! Builds an image out of Debian packages: `mmdebstrap` makes the tree, our own writer the file
//! system. No installer, no mount, no loop device, no root; the same packages give the same bytes.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use lodge_formats::ext4;
use lodge_machine::keeper::rfc3339;
use lodge_machine::store::now_us;
use lodge_spec::names::ImageName;
use lodge_spec::request::Refusal;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncBufReadExt, BufReader as AsyncBufReader};

use super::store::{Images, hex};
use super::{Blob, Disk, Manifest, recipe};
use crate::paths::find_program;
use crate::proc::Tool;

/// Size of an image where nobody says.
pub const DEFAULT_SIZE: u64 = 2_000_000_000 / 4096 * 4096;

/// Steps of a build, told as they are reached.
pub type Tell = Arc<dyn Fn(&str, u64, u64) + Send + Sync>;

/// The images that can be built.
pub const RECIPES: &[&str] = &["debian-12"];

impl Images {
    /// Builds the image `name` (one of `RECIPES`) of `size` bytes with more packages.
    pub async fn build(
        &self,
        name: &ImageName,
        size: Option<u64>,
        packages: &[String],
        tell: Tell,
    ) -> Result<Manifest, Refusal> {
        if !RECIPES.contains(&name.as_str()) {
            let known = RECIPES.join(", ");
            let message = format!("there is no recipe for {name}; there is one for {known}");
            return Err(Refusal::invalid("name", message));
        }
        let sound = |p: &String| {
            !p.is_empty()
                && p.bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b))
        };
        if let Some(odd) = packages.iter().find(|p| !sound(p)) {
            return Err(Refusal::invalid("packages", format!("{odd:?} is not a package name")));
        }
        let size = size.unwrap_or(DEFAULT_SIZE) / 4096 * 4096;
        let work = tempfile::Builder::new().prefix("build-").tempdir_in(self.paths.cache());
        let work = work.map_err(Refusal::failed)?;
        let tree = work.path().join("tree.tar");
        self.bootstrap(work.path(), &tree, packages, &tell).await?;
        let (own, name, blobs) = (self.clone(), name.clone(), tell.clone());
        let list = recipe::packages(packages);
        let made_from = format!("Debian {} packages: {}", recipe::SUITE, list.join(" "));
        let made = move || own.assemble(&tree, size, &blobs);
        let made = tokio::task::spawn_blocking(made).await.map_err(Refusal::failed)?;
        let (kernel, initrd, disk) =
            made.map_err(|e| Refusal::failed(format!("building {name}: {e}")))?;
        let kernel_path = self.path(&kernel);
        let manifest = Manifest {
            name,
            kernel: Some(kernel),
            initrd: Some(initrd),
            disk: Some(disk),
            cmdline: recipe::CMDLINE.into(),
            virtio_mmio: true,
            takes_files: true,
            ready: Some(recipe::READY.into()),
            made_from,
            created_at: rfc3339(now_us()),
        };
        self.put(&manifest).await?;
        // The first start finds its kernel unpacked; one that cannot be boots as it is.
        let _ = super::kernel::unpack(&kernel_path, &self.paths.cache());
        Ok(manifest)
    }

    async fn bootstrap(
        &self,
        work: &Path,
        tree: &Path,
        packages: &[String],
        tell: &Tell,
    ) -> Result<(), Refusal> {
        let program = find_program("mmdebstrap").ok_or_else(|| {
            Refusal::failed("mmdebstrap is not installed; `apt-get install mmdebstrap` adds it")
        })?;
        let (early, late) = (work.join("early.tar"), work.join("late.tar"));
        write_overlay(&early, recipe::EARLY, &[]).map_err(Refusal::failed)?;
        write_overlay(&late, recipe::LATE, recipe::LINKS).map_err(Refusal::failed)?;
        let all = recipe::packages(packages);
        // Its mounts are in a namespace that ends with it, and its tree is in our scratch; without
        // root it makes a namespace itself, in which our scratch is not its own.
        let root = rustix::process::geteuid().is_root();
        let mode = if root { "root" } else { "unshare" };
        let tool = match root {
            true => Tool::new("/usr/bin/unshare").arg("--mount").arg(program).env("TMPDIR", work),
            false => Tool::new(program),
        };
        let tool = tool
            .args([&format!("--mode={mode}"), "--variant=minbase", "--format=tar"])
            .arg(format!("--include={}", all.join(",")))
            .args(["--aptopt=Acquire::Languages \"none\"", "--aptopt=Acquire::Retries \"3\""])
            .args(["doc", "man", "locale", "info"].map(|d| format!("--dpkgopt=path-exclude=/usr/share/{d}/*")))
            .arg(format!("--essential-hook=tar-in {} /", early.display()))
            .arg(format!("--customize-hook=tar-in {} /", late.display()))
            .arg("--customize-hook=chroot \"$1\" sh -c 'rm -f /etc/ssh/ssh_host_* /var/log/*.log /var/log/apt/* /var/cache/ldconfig/aux-cache'")
            .arg(recipe::SUITE)
            .arg(tree)
            .env("SOURCE_DATE_EPOCH", "1700000000");
        let mut command = tool.command();
        for proxy in ["http_proxy", "https_proxy", "no_proxy"] {
            if let Some(value) = std::env::var_os(proxy) {
                command.env(proxy, value);
            }
        }
        // A group of its own: when it fails, it ends its whole group.
        command.process_group(0);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| Refusal::failed(tool.start_error(e)))?;
        let group = Group(child.id());
        let mut lines = AsyncBufReader::new(child.stderr.take().expect("piped")).lines();
        let mut last = Vec::new();
        while let Ok(Some(line)) = lines.next_line().await {
            if let Some(step) = line.strip_prefix("I: ") {
                // Its own scratch and hooks are nobody's business.
                if !step.contains(['/', '\'']) {
                    tell(step.trim_end_matches("..."), 0, 0);
                }
            } else {
                last.push(line);
                let excess = last.len().saturating_sub(8);
                last.drain(..excess);
            }
        }
        let status = child.wait().await.map_err(|e| Refusal::failed(tool.start_error(e)))?;
        drop(group);
        match status.success() {
            true => Ok(()),
            false => Err(Refusal::failed(format!("mmdebstrap failed: {}", last.join("; ")))),
        }
    }

    /// From the tree to the three blobs.
    fn assemble(&self, tree: &Path, size: u64, tell: &Tell) -> Result<(Blob, Blob, Disk), String> {
        let text = |e: io::Error| e.to_string();
        let identity = super::store::digest_of(tree).map_err(text)?;
        let total = tree.metadata().map_err(text)?.len();
        let part = tempfile::Builder::new().prefix("part-").tempfile_in(self.paths.blobs());
        let part = part.map_err(text)?;
        part.as_file().set_len(size).map_err(text)?;
        let mut uuid = [0; 16];
        for (byte, pair) in uuid.iter_mut().zip(identity.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).unwrap_or("00");
            *byte = u8::from_str_radix(pair, 16).unwrap_or(0);
        }
        let options = ext4::Options {
            size,
            label: "root".into(),
            uuid,
            time: 1_700_000_000,
            style: ext4::Style::Ext4,
        };
        let archive = BufReader::with_capacity(1 << 20, File::open(tree).map_err(text)?);
        ext4::write_tar(archive, part.as_file(), &options, |done| {
            tell("writing the file system", done, total);
        })
        .map_err(|e| e.to_string())?;
        let Boots { kernel, initrd } = pick(tree).map_err(text)?;
        tell("computing digests", 0, 0);
        let digest = super::store::digest_of(part.path()).map_err(text)?;
        let blob = self.settle(part, digest, size).map_err(text)?;
        let disk = Disk { blob, format: "raw".into(), virtual_bytes: size };
        let keep = |bytes: Option<Vec<u8>>, what: &str| {
            let bytes = bytes.ok_or_else(|| format!("the packages brought no {what}"))?;
            self.keep(&bytes).map_err(text)
        };
        Ok((keep(kernel, "kernel")?, keep(initrd, "initial RAM disk")?, disk))
    }

    fn keep(&self, bytes: &[u8]) -> io::Result<Blob> {
        let part = tempfile::Builder::new().prefix("part-").tempfile_in(self.paths.blobs())?;
        part.as_file().write_all(bytes)?;
        self.settle(part, hex(&Sha256::digest(bytes)), bytes.len() as u64)
    }
}

/// A process group that ends with whoever holds this: a build that is given up leaves nobody at
/// work in its tree.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        use rustix::process::{Pid, Signal, kill_process_group};
        if let Some(group) = self.0.and_then(|pid| Pid::from_raw(pid as i32)) {
            // Empty already where the build has ended as it should.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// What a tree boots with.
#[derive(Default)]
struct Boots {
    kernel: Option<Vec<u8>>,
    initrd: Option<Vec<u8>>,
}

/// Takes the kernel and its initial RAM disk out of the tree.
fn pick(tree: &Path) -> io::Result<Boots> {
    let mut found = Boots::default();
    let mut archive = tar::Archive::new(BufReader::with_capacity(1 << 20, File::open(tree)?));
    for entry in archive.entries_with_seek()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let path = path.to_string_lossy();
        let path = path.trim_start_matches("./");
        let slot = if path.starts_with("boot/vmlinuz-") {
            &mut found.kernel
        } else if path.starts_with("boot/initrd.img-") {
            &mut found.initrd
        } else {
            continue;
        };
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        *slot = Some(bytes);
    }
    Ok(found)
}

fn write_overlay(
    path: &PathBuf,
    files: &[recipe::Overlay],
    links: &[(&str, &str)],
) -> io::Result<()> {
    let mut tar = tar::Builder::new(File::create(path)?);
    let header = |kind, mode, size| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header.set_mtime(1_700_000_000);
        header
    };
    for (name, mode, content) in files {
        let mut header = header(tar::EntryType::Regular, *mode, content.len() as u64);
        tar.append_data(&mut header, name, content.as_bytes())?;
    }
    for (name, target) in links {
        tar.append_link(&mut header(tar::EntryType::Symlink, 0o777, 0), name, target)?;
    }
    tar.into_inner()?.flush()
}
