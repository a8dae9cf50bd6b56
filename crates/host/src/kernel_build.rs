//! Builds Linux kernels: finds and checks the source, settles the configuration without asking
//! anybody, runs `make`, and keeps what came out by the digest of all that went in.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use sha2::{Digest, Sha256};

use crate::image::store::hex;
use crate::paths::find_program;
use crate::proc::Tool;
use crate::rootfs::archive;

/// What a small kernel for virtual machines needs; all else is off.
pub const SMALL: &str = include_str!("kernel_build/small.config");

/// Archives that are known to be what they are called.
const KNOWN: &[(&str, &str)] = &[(
    "linux-source-6.1_6.1.192-2.tar.xz",
    "4d415b3d364834fd818270e88813e90323bbfce4f519a0e6bd4940ddcd7df693",
)];

/// What to build from what, and where it goes.
#[derive(Clone, Debug)]
pub struct Build {
    /// `linux-X.Y` or `linux-X.Y.Z`: the archive's stem.
    pub version: String,
    /// Folders of archives.
    pub archives: Vec<PathBuf>,
    /// Below which sources are unpacked.
    pub sources: PathBuf,
    /// Where `make` works.
    pub objects: PathBuf,
    /// A configuration; the small one where absent.
    pub config: Option<PathBuf>,
    /// Where an edited configuration goes.
    pub save_config: PathBuf,
    pub patch: Option<PathBuf>,
    pub menuconfig: bool,
    pub clean: bool,
    /// The kernel's file.
    pub out: PathBuf,
    /// Folder of kernels built before, and of what is fetched.
    pub cache: PathBuf,
    /// Digests of archives, as `sha256sum` writes them; added to.
    pub record: PathBuf,
    /// From where `VERSION.tar.xz` can be fetched.
    pub base_url: Option<String>,
}

/// What came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    pub kernel: PathBuf,
    /// The same, uncompressed.
    pub elf: PathBuf,
    /// A folder with `lib/modules`.
    pub modules: PathBuf,
    /// Nothing was compiled: the same had been built before.
    pub cached: bool,
}

type Say<'a> = &'a dyn Fn(&str);

impl Build {
    /// Builds, or finds what was built.
    pub fn run(&self, say: Say) -> Result<Built, String> {
        if let Some(patch) = self.patch.as_ref().filter(|p| !p.is_file()) {
            return Err(format!("Kernel patch not found [{}]", patch.display()));
        }
        if let Some(config) = self.config.as_ref().filter(|c| !c.is_file()) {
            return Err(format!("Kernel config not found [{}]", config.display()));
        }
        if self.menuconfig && !io::IsTerminal::is_terminal(&io::stdin()) {
            return Err("--menuconfig needs a terminal".into());
        }
        for program in ["make", "gcc", "flex", "bison", "bc"] {
            if find_program(program).is_none() {
                let what = "`apt-get install build-essential flex bison bc libelf-dev`";
                return Err(format!("{program} is not installed; {what} adds what is needed"));
            }
        }
        let (source, identity) = self.source(say)?;
        if self.clean {
            remove(&self.objects)?;
        }
        fs::create_dir_all(&self.objects).map_err(at(&self.objects))?;
        self.configure(&source, say)?;
        let key = self.key(&identity)?;
        let kept = self.cache.join("kernels").join(&key);
        let cached = kept.join("bzImage").is_file();
        if !cached {
            self.compile(&source, &kept, say)?;
        }
        if let Some(parent) = self.out.parent() {
            fs::create_dir_all(parent).map_err(at(parent))?;
        }
        let part = self.out.with_extension("part");
        fs::copy(kept.join("bzImage"), &part).map_err(at(&part))?;
        fs::rename(&part, &self.out).map_err(at(&self.out))?;
        let modules = self.objects.join("modules");
        let _ = fs::remove_file(&modules);
        std::os::unix::fs::symlink(kept.join("modules"), &modules).map_err(at(&modules))?;
        Ok(Built { kernel: self.out.clone(), elf: kept.join("vmlinux"), modules, cached })
    }

    /// The unpacked source, and what it is.
    fn source(&self, say: Say) -> Result<(PathBuf, String), String> {
        let dir = self.sources.join(&self.version);
        let stamp = dir.join(".lodge-source");
        if self.patch.is_some() {
            remove(&dir)?;
        }
        if dir.join("Makefile").is_file() {
            let identity = fs::read_to_string(&stamp).unwrap_or_else(|_| "as found".into());
            return Ok((dir, identity));
        }
        let archive = self.archive(say)?;
        let mut identity = verify(&archive, &self.archives, &self.record, say)?;
        say(&format!("Unpacking {}", archive.display()));
        let part = unpack(&archive, &self.sources)?;
        if let Some(patch) = &self.patch {
            let program = find_program("patch").ok_or("patch is not installed")?;
            let tool = Tool::new(program)
                .args(["-p1", "--batch", "-d"])
                .arg(part.path())
                .arg("-i")
                .arg(std::path::absolute(patch).map_err(at(patch))?);
            quietly(&tool, "patching the kernel")?;
            identity += &format!(" patched {}", digest_of(patch)?);
        }
        fs::write(part.path().join(".lodge-source"), &identity).map_err(at(part.path()))?;
        fs::rename(part.keep(), &dir).map_err(at(&dir))?;
        Ok((dir, identity))
    }

    /// The archive: where people keep them, else Debian's, else fetched.
    fn archive(&self, say: Say) -> Result<PathBuf, String> {
        let name = format!("{}.tar.xz", self.version);
        if let Some(path) = self.archives.iter().map(|dir| dir.join(&name)).find(|p| p.is_file()) {
            return Ok(path);
        }
        if let Some(base) = &self.base_url {
            return fetch(
                &format!("{}/{name}", base.trim_end_matches('/')),
                &self.cache,
                say,
                |path| self.verify_fetched(path, &name),
            );
        }
        self.debian(say).map_err(|why| {
            let first = self.archives.first().map(|d| d.join(&name)).unwrap_or_default();
            format!("Kernel archive not found [{}]; {why}", first.display())
        })
    }

    /// Debian carries the source of its own kernels in packages that `apt` verifies.
    fn debian(&self, say: Say) -> Result<PathBuf, String> {
        let mut parts = self.version.trim_start_matches("linux-").split('.');
        let (Some(major), Some(minor), None) = (parts.next(), parts.next(), parts.next()) else {
            return Err("Debian's packages carry versions of two numbers, such as linux-6.1".into());
        };
        let package = format!("linux-source-{major}.{minor}");
        let installed = PathBuf::from(format!("/usr/src/{package}.tar.xz"));
        if installed.is_file() {
            return Ok(installed);
        }
        let kept = self.cache.join("sources");
        fs::create_dir_all(&kept).map_err(at(&kept))?;
        let found = fs::read_dir(&kept).map_err(at(&kept))?.flatten().map(|e| e.path());
        let ours = |p: &PathBuf| {
            let name = p.file_name().unwrap_or_default().to_string_lossy().into_owned();
            name.starts_with(&format!("{package}_")) && name.ends_with(".tar.xz")
        };
        if let Some(path) = found.into_iter().filter(ours).max() {
            return Ok(path);
        }
        say(&format!("Fetching Debian's package {package}"));
        let dir = debian_package(&package)?;
        let version = fs::read_to_string(dir.path().join("version")).unwrap_or_default();
        let unpacked = dir.path().join(format!("tree/usr/src/{package}.tar.xz"));
        let path = kept.join(format!("{package}_{version}.tar.xz"));
        let part = path.with_extension("part");
        fs::copy(&unpacked, &part).map_err(at(&unpacked))?;
        fs::rename(&part, &path).map_err(at(&path))?;
        Ok(path)
    }

    fn verify_fetched(&self, path: &Path, name: &str) -> Result<(), String> {
        let found = digest_of(path)?;
        let expected = recorded(name, &self.archives, &self.record).ok_or_else(|| {
            let record = self.record.display();
            format!("{name} is not taken unseen: put its SHA-256 into {record} (found: {found})")
        })?;
        compare(name, &expected, &found)
    }

    /// Settles the configuration: nothing is asked, new symbols take their defaults.
    fn configure(&self, source: &Path, say: Say) -> Result<(), String> {
        let dot_config = self.objects.join(".config");
        match &self.config {
            Some(config) => {
                let text = fs::read_to_string(config).map_err(at(config))?;
                // Modules travel in the image; a list of files for the kernel's own archive, as
                // newer configurations name it, has no place here.
                let line = "CONFIG_INITRAMFS_SOURCE=\"cpio_list\"";
                if text.contains(line) {
                    say("The configuration names cpio_list; modules go into the image instead");
                }
                let text = text.replace(line, "CONFIG_INITRAMFS_SOURCE=\"\"");
                fs::write(&dot_config, text).map_err(at(&dot_config))?;
                let new = self.make(source).arg("listnewconfig");
                let new = output(&new, "looking for new symbols")?;
                let new: Vec<&str> = new.lines().filter(|l| l.starts_with("CONFIG_")).collect();
                if !new.is_empty() {
                    say(&format!("{} new symbols take their defaults:", new.len()));
                    new.iter().for_each(|line| say(&format!("  {line}")));
                }
                quietly(&self.make(source).arg("olddefconfig"), "configuring the kernel")?;
            }
            None => {
                let small = self.objects.join("small.config");
                fs::write(&small, SMALL).map_err(at(&small))?;
                let tool = self
                    .make(source)
                    .arg(format!("KCONFIG_ALLCONFIG={}", small.display()))
                    .arg("allnoconfig");
                quietly(&tool, "configuring the kernel")?;
            }
        }
        if self.menuconfig {
            let mut command = self.make(source).arg("menuconfig").command().into_std();
            command.env("TERM", std::env::var_os("TERM").unwrap_or_default());
            command.stdin(Stdio::inherit()).stdout(Stdio::inherit()).stderr(Stdio::inherit());
            let status = command.status().map_err(|e| format!("make: {e}"))?;
            if !status.success() {
                return Err(format!("menuconfig ended with {status}"));
            }
            let to = &self.save_config;
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent).map_err(at(parent))?;
            }
            fs::copy(&dot_config, to).map_err(at(to))?;
            say(&format!("The configuration is kept in {}", to.display()));
        }
        Ok(())
    }

    /// What the result depends on: source, configuration and compiler.
    fn key(&self, identity: &str) -> Result<String, String> {
        let gcc = find_program("gcc").ok_or("gcc is not installed")?;
        let mut hash = Sha256::new();
        hash.update(identity);
        if identity == "as found" {
            // Nobody knows what was done to it.
            hash.update(self.sources.as_os_str().as_encoded_bytes());
            hash.update(format!("{:?}", std::time::SystemTime::now()));
        }
        hash.update(output(&Tool::new(gcc).arg("--version"), "asking the compiler")?);
        let dot_config = self.objects.join(".config");
        let config = fs::read_to_string(&dot_config).map_err(at(&dot_config))?;
        // The head names the moment and the compiler.
        for line in config.lines().filter(|l| !l.starts_with("# ") || l.contains(" is not set")) {
            hash.update(line);
            hash.update("\n");
        }
        Ok(hex(&hash.finalize()))
    }

    fn make(&self, source: &Path) -> Tool {
        let make = find_program("make").unwrap_or_else(|| "make".into());
        Tool::new(make)
            .args(["-s", "-C"])
            .arg(source)
            .arg(format!("O={}", self.objects.display()))
            .env("KBUILD_BUILD_TIMESTAMP", "2020-01-01")
            .env("KBUILD_BUILD_USER", "lodge")
            .env("KBUILD_BUILD_HOST", "lodge")
    }

    fn compile(&self, source: &Path, kept: &Path, say: Say) -> Result<(), String> {
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        say(&format!("Building {} on {jobs} cores; this takes minutes", self.version));
        let tool = self.make(source).arg(format!("-j{jobs}")).args(["bzImage", "modules"]);
        quietly(&tool, "building the kernel")?;
        let parent = kept.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent).map_err(at(parent))?;
        let part = tempfile::Builder::new().prefix(".part-").tempdir_in(parent);
        let part = part.map_err(at(parent))?;
        let modules = part.path().join("modules");
        fs::create_dir_all(modules.join("lib/modules")).map_err(at(&modules))?;
        let tool = self.make(source).arg(format!("INSTALL_MOD_PATH={}", modules.display())).args([
            "INSTALL_MOD_STRIP=1",
            "DEPMOD=true",
            "modules_install",
        ]);
        quietly(&tool, "installing the modules")?;
        for link in ["build", "source"] {
            for dir in fs::read_dir(modules.join("lib/modules")).map_err(at(&modules))?.flatten() {
                let _ = fs::remove_file(dir.path().join(link));
            }
        }
        // Guests that find this done need not do it at every start.
        if let (Some(depmod), Ok(dirs)) =
            (find_program("depmod"), fs::read_dir(modules.join("lib/modules")))
        {
            for dir in dirs.flatten() {
                let tool = Tool::new(&depmod).arg("-b").arg(&modules).arg(dir.file_name());
                quietly(&tool, "listing the modules")?;
            }
        }
        for (from, name) in
            [("arch/x86/boot/bzImage", "bzImage"), ("vmlinux", "vmlinux"), (".config", "config")]
        {
            let from = self.objects.join(from);
            fs::copy(&from, part.path().join(name)).map_err(at(&from))?;
        }
        fs::rename(part.keep(), kept).map_err(at(kept))
    }
}

/// The digest of an archive that lies here, compared with what is recorded of its name: in
/// `record`, or beside the archives. One that nobody recorded is recorded now, and said so.
pub fn verify(
    archive: &Path,
    folders: &[PathBuf],
    record: &Path,
    say: Say,
) -> Result<String, String> {
    let name = archive.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let found = digest_of(archive)?;
    if let Some(expected) = recorded(&name, folders, record) {
        return compare(&name, &expected, &found).map(|()| found);
    }
    // What is no archive at all is not recorded as one.
    let mut start = [0; 512];
    archive::unpacked(archive)?
        .read_exact(&mut start)
        .map_err(|e| format!("{}: {e}", archive.display()))?;
    let mut text = fs::read_to_string(record).unwrap_or_default();
    text += &format!("{found}  {name}\n");
    if let Some(parent) = record.parent() {
        fs::create_dir_all(parent).map_err(at(parent))?;
    }
    fs::write(record, text).map_err(at(record))?;
    say(&format!(
        "WARNING: nothing is recorded of {name}; from now on its SHA-256 is {found} ({})",
        record.display()
    ));
    Ok(found)
}

/// The digest that is recorded of a name.
fn recorded(name: &str, folders: &[PathBuf], record: &Path) -> Option<String> {
    let lists =
        folders.iter().flat_map(|dir| ["SHA256SUMS", "sha256sums.asc"].map(|list| dir.join(list)));
    let texts = std::iter::once(record.to_owned()).chain(lists);
    let texts = texts.filter_map(|path| fs::read_to_string(path).ok());
    let mut known: BTreeMap<String, String> =
        KNOWN.iter().map(|(name, sum)| ((*name).to_owned(), (*sum).to_owned())).collect();
    for text in texts {
        for line in text.lines() {
            let mut words = line.split_whitespace();
            if let (Some(sum), Some(name)) = (words.next(), words.next())
                && sum.len() == 64
            {
                known.insert(name.trim_start_matches('*').to_owned(), sum.to_lowercase());
            }
        }
    }
    known.remove(name)
}

/// Unpacks an archive, without its first folder, into a new folder below another.
pub fn unpack(archive: &Path, below: &Path) -> Result<tempfile::TempDir, String> {
    fs::create_dir_all(below).map_err(at(below))?;
    let part = tempfile::Builder::new().prefix(".part-").tempdir_in(below).map_err(at(below))?;
    let tar = find_program("tar").ok_or("tar is not installed")?;
    let tool = Tool::new(tar)
        .args(["--strip-components=1", "--no-same-owner", "-xf"])
        .arg(archive)
        .arg("-C")
        .arg(part.path());
    quietly(&tool, &format!("unpacking {}", archive.display()))?;
    Ok(part)
}

fn compare(name: &str, expected: &str, found: &str) -> Result<(), String> {
    match expected == found {
        true => Ok(()),
        false => Err(format!(
            "Archive checksum mismatch [{name}]\n  expected {expected}\n  found    {found}"
        )),
    }
}

/// Fetches a file: under its own name only when it is whole and accepted.
fn fetch(
    url: &str,
    folder: &Path,
    say: Say,
    accept: impl Fn(&Path) -> Result<(), String>,
) -> Result<PathBuf, String> {
    let folder = folder.join("sources");
    fs::create_dir_all(&folder).map_err(at(&folder))?;
    let name = url.rsplit('/').next().unwrap_or("archive");
    let path = folder.join(name);
    if path.is_file() && accept(&path).is_ok() {
        return Ok(path);
    }
    let curl =
        find_program("curl").ok_or("curl is not installed; `apt-get install curl` adds it")?;
    say(&format!("Fetching {url}"));
    let part = tempfile::Builder::new().prefix(".part-").tempfile_in(&folder);
    let part = part.map_err(at(&folder))?;
    let mut tool = Tool::new(curl);
    for proxy in ["http_proxy", "https_proxy", "no_proxy"] {
        if let Some(value) = std::env::var_os(proxy) {
            tool = tool.env(proxy, value);
        }
    }
    let tool = tool
        .args(["--fail", "--location", "--silent", "--show-error", "--proto", "=http,https", "-o"])
        .arg(part.path())
        .arg(url);
    quietly(&tool, &format!("fetching {url}"))?;
    accept(part.path())?;
    part.persist(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(path)
}

/// Downloads a Debian package, which `apt` verifies, and unpacks it: `tree` below the folder, and
/// its `version` in a file.
pub fn debian_package(package: &str) -> Result<tempfile::TempDir, String> {
    let (Some(apt), Some(dpkg)) = (find_program("apt-get"), find_program("dpkg-deb")) else {
        return Err("this host has no Debian packages".into());
    };
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let mut command = Tool::new(apt).args(["download", package]).command().into_std();
    command.current_dir(dir.path()).stderr(Stdio::piped()).stdout(Stdio::null());
    for proxy in ["http_proxy", "https_proxy", "no_proxy"] {
        command.envs(std::env::var_os(proxy).map(|value| (proxy, value)));
    }
    let done = command.output().map_err(|e| format!("apt-get: {e}"))?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr).trim().to_owned();
        return Err(format!("apt-get download {package}: {said}"));
    }
    let files = fs::read_dir(dir.path()).map_err(at(dir.path()))?.flatten().map(|e| e.path());
    let deb = files.into_iter().find(|p| p.extension().is_some_and(|e| e == "deb"));
    let deb = deb.ok_or_else(|| format!("apt-get download {package} brought nothing"))?;
    let tree = dir.path().join("tree");
    quietly(&Tool::new(&dpkg).arg("-x").arg(&deb).arg(&tree), "unpacking a package")?;
    let version =
        output(&Tool::new(&dpkg).arg("-f").arg(&deb).arg("Version"), "reading a package")?;
    fs::write(dir.path().join("version"), version.trim()).map_err(at(dir.path()))?;
    Ok(dir)
}

/// Runs a tool to its end; what it said is in the error.
pub fn quietly(tool: &Tool, what: &str) -> Result<(), String> {
    output(tool, what).map(drop)
}

fn output(tool: &Tool, what: &str) -> Result<String, String> {
    let done = tool.command().into_std().output();
    let done = done.map_err(|e| format!("{what}: {}", tool.start_error(e)))?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    let lines: Vec<&str> = said.lines().filter(|l| !l.trim().is_empty()).collect();
    let last = lines[lines.len().saturating_sub(15)..].join("\n  ");
    Err(format!("{what} failed ({}):\n  {last}", done.status))
}

fn digest_of(path: &Path) -> Result<String, String> {
    let mut hash = Sha256::new();
    let mut file = File::open(path).map_err(at(path))?;
    io::copy(&mut file, &mut hash).map_err(at(path))?;
    Ok(hex(&hash.finalize()))
}

fn remove(dir: &Path) -> Result<(), String> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(at(dir)(e)),
        _ => Ok(()),
    }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> String {
    let path = path.to_owned();
    move |error| format!("{}: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(dir: &Path) -> Build {
        Build {
            version: "linux-9.9".into(),
            archives: vec![dir.join("archive")],
            sources: dir.join("src"),
            objects: dir.join("obj"),
            config: None,
            save_config: dir.join("config"),
            patch: None,
            menuconfig: false,
            clean: false,
            out: dir.join("bzImage"),
            cache: dir.join("cache"),
            record: dir.join("archives.sha256"),
            base_url: None,
        }
    }

    #[test]
    fn case_18_an_archive_is_what_is_recorded_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let own = build(dir.path());
        fs::create_dir(&own.archives[0]).unwrap();
        let archive = own.archives[0].join("linux-9.9.tar.xz");
        fs::write(&archive, "<html>404 Not Found</html>").unwrap();
        let why = own.source(&|_| {}).unwrap_err();
        assert!(why.contains("not an archive"), "{why}");
        assert!(!own.record.exists());
        let wrong = "0".repeat(64);
        fs::write(own.archives[0].join("SHA256SUMS"), format!("{wrong}  linux-9.9.tar.xz\n"))
            .unwrap();
        let why = own.source(&|_| {}).unwrap_err();
        assert!(why.starts_with("Archive checksum mismatch [linux-9.9.tar.xz]"), "{why}");
        assert!(why.contains(&wrong) && why.contains(&digest_of(&archive).unwrap()), "{why}");
        assert!(!own.sources.exists());
    }

    #[test]
    fn cases_17_19_what_is_missing_is_named_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let mut own = build(dir.path());
        own.version = "linux-9.9.9".into();
        let why = own.source(&|_| {}).unwrap_err();
        assert!(why.starts_with("Kernel archive not found ["), "{why}");
        own.base_url = Some("http://127.0.0.1:9/nothing".into());
        assert!(own.source(&|_| {}).unwrap_err().contains("fetching http://127.0.0.1:9/nothing"));
        assert_eq!(fs::read_dir(dir.path().join("cache/sources")).unwrap().count(), 0);
        own.config = Some(dir.path().join("nothing"));
        assert!(own.run(&|_| {}).unwrap_err().starts_with("Kernel config not found ["));
    }
}
