//! Kernels and programs: built from their archives, or taken from Debian's packages.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use lodge_host::kernel_build::{self, Build};
use lodge_host::paths::find_program;
use lodge_host::proc::Tool;
use lodge_host::rootfs::base::{Base, Program};
use lodge_host::rootfs::programs;

use super::{Session, say, told};

/// Where a program goes, what it is called here, and the package that has it.
const OPTIONAL: &[(&str, &str, &str)] = &[
    ("bin/tcpdump", "tcpdump", "tcpdump"),
    ("bin/strace", "strace", "strace"),
    ("bin/jq", "jq", "jq"),
    ("bin/scp", "scp", "openssh-client"),
    ("usr/libexec/sftp-server", "/usr/lib/openssh/sftp-server", "openssh-sftp-server"),
];

impl Session {
    /// The kernel that VMs are started with: by its version, or as it was called before.
    pub(super) fn kernel(&self) -> Result<PathBuf> {
        let path = self.settings.path("__kbin");
        let old = self.settings.path("XCLUSTER_HOME").join("bzImage");
        [&path, &old].into_iter().find(|p| p.is_file()).cloned().ok_or_else(|| {
            anyhow!("Kernel not built [{}]; xc kernel_build builds it", path.display())
        })
    }

    pub(super) fn kernel_build(&self) -> Result<u8> {
        let s = &self.settings;
        let home = s.text("HOME").unwrap_or("/").to_owned();
        let given =
            self.line.options.contains_key("__kcfg") || std::env::var_os("__kcfg").is_some();
        let config = s.path("__kcfg");
        let build = Build {
            version: s.text("__kver").unwrap_or_default().to_owned(),
            archives: vec![s.path("ARCHIVE"), Path::new(&home).join("Downloads")],
            sources: s.path("KERNELDIR"),
            objects: s.path("__kobj"),
            config: (given || config.is_file()).then(|| config.clone()),
            save_config: config,
            patch: s.text("__kpatch").map(PathBuf::from),
            menuconfig: s.flag("__menuconfig"),
            clean: s.flag("__clean"),
            out: s.path("__kbin"),
            cache: lodge_host::paths::Paths::find().cache(),
            record: s.path("XCLUSTER_WORKSPACE").join("archives.sha256"),
            base_url: s.text("__kurl").map(str::to_owned),
        };
        let built = told(build.run(&say))?;
        // The name that it had when there was one kernel only.
        let old = s.path("XCLUSTER_HOME").join("bzImage");
        if built.kernel != old {
            let _ = fs::remove_file(&old);
            let linked = fs::hard_link(&built.kernel, &old);
            linked.or_else(|_| fs::copy(&built.kernel, &old).map(drop))?;
        }
        let how = if built.cached { "built before" } else { "built" };
        say(&format!("{}: {how}", built.kernel.display()));
        Ok(0)
    }

    /// What an image is made of.
    pub(super) fn base(&self) -> Result<Base> {
        let workspace = self.settings.path("XCLUSTER_WORKSPACE");
        let version = |name: &str| self.settings.text(name).unwrap_or_default().to_owned();
        let bb = workspace.join(version("__bbver")).join("busybox");
        let dropbear = workspace.join(format!("dropbear-{}", version("__dropbearver")));
        let ip = workspace.join(format!("iproute2-{}/ip/ip", version("__ipver")));
        let mut list = Vec::new();
        let mut add = |target, built: &Path, name: &str, package: &str| -> Result<()> {
            let source = match built.is_file() {
                true => built.to_owned(),
                false => self.debian_program(name, package)?,
            };
            say(&format!("{name}: {}", source.display()));
            list.push(Program { target, source });
            Ok(())
        };
        add("bin/busybox", &bb, "busybox", "busybox")?;
        add("bin/dropbear", &dropbear.join("dropbear"), "dropbear", "dropbear-bin")?;
        add("bin/dbclient", &dropbear.join("dbclient"), "dbclient", "dropbear-bin")?;
        add("bin/dropbearkey", &dropbear.join("dropbearkey"), "dropbearkey", "dropbear-bin")?;
        add("sbin/ip", &ip, "ip", "iproute2")?;
        for (target, name, package) in OPTIONAL {
            match programs::find(name) {
                Some(source) => list.push(Program { target, source }),
                None => say(&format!(
                    "WARNING: the image is without {name}; `apt-get install {package}` adds it"
                )),
            }
        }
        for ldconfig in ["/sbin/ldconfig.real", "/sbin/ldconfig"].map(PathBuf::from) {
            if ldconfig.is_file() {
                list.push(Program { target: "sbin/ldconfig", source: ldconfig });
                break;
            }
        }
        let modules = self.settings.path("__kobj").join("modules");
        let modules = modules.join("lib/modules").is_dir().then_some(modules);
        let version = match self.settings.text("__version") {
            Some(version) => version.to_owned(),
            None => today(),
        };
        Ok(Base { programs: list, modules, version })
    }

    /// A program of a Debian package: the installed one, else the package is fetched and kept.
    fn debian_program(&self, name: &str, package: &str) -> Result<PathBuf> {
        // The static busybox of the host runs its own commands before those of other packages.
        let own = find_program(name);
        if let Some(path) = own.filter(|p| name != "busybox" || !lodge_host::elf::is_static(p)) {
            return Ok(path);
        }
        let kept = self.settings.path("XCLUSTER_HOME").join("packages").join(package);
        let places = ["bin", "sbin", "usr/bin", "usr/sbin"].map(|dir| kept.join(dir).join(name));
        let look = || places.iter().find(|p| p.is_file()).cloned();
        if let Some(path) = look() {
            return Ok(path);
        }
        say(&format!("Fetching Debian's package {package}"));
        let dir = told(kernel_build::debian_package(package)).with_context(|| {
            format!("{name} is not installed and its package cannot be fetched")
        })?;
        fs::create_dir_all(kept.parent().context("a path")?)?;
        let cp = find_program("cp").context("cp is not installed")?;
        let tool = Tool::new(cp).arg("-a").arg(dir.path().join("tree")).arg(&kept);
        told(kernel_build::quietly(&tool, "keeping a package"))?;
        look().ok_or_else(|| anyhow!("Debian's package {package} has no {name}"))
    }

    pub(super) fn busybox_build(&self) -> Result<u8> {
        let name = self.settings.text("__bbver").unwrap_or_default().to_owned();
        let dir = self.unpack(&name, &["tar.bz2", "tar.xz", "tar.gz"])?;
        if self.settings.flag("__menuconfig") {
            bail!("--menuconfig is for the kernel; edit {}/.config", dir.display());
        }
        // Everything that busybox offers by default, linked as the host links.
        if !dir.join(".config").is_file() {
            self.make(&dir, &["defconfig"])?;
            // Its traffic control speaks to kernels of long ago.
            let config = fs::read_to_string(dir.join(".config"))?;
            let config = config.replace("CONFIG_TC=y", "# CONFIG_TC is not set");
            fs::write(dir.join(".config"), config)?;
        }
        self.make(&dir, &["busybox"])?;
        self.built(&dir.join("busybox"))
    }

    pub(super) fn dropbear_build(&self) -> Result<u8> {
        let version = self.settings.text("__dropbearver").unwrap_or_default();
        let dir = self.unpack(&format!("dropbear-{version}"), &["tar.bz2", "tar.xz", "tar.gz"])?;
        if dir.join("dropbear").is_file() {
            bail!("Already built [{}]", dir.display());
        }
        let path = "#define DEFAULT_PATH \"/usr/bin:/bin:/sbin:/usr/sbin\"\n\
                    #define DEFAULT_ROOT_PATH \"/usr/bin:/bin:/sbin:/usr/sbin\"\n";
        fs::write(dir.join("localoptions.h"), path)?;
        self.configure(&dir, &["--disable-lastlog", "--disable-wtmp", "--disable-utmp"])?;
        self.make(&dir, &["PROGRAMS=dropbear scp dbclient dropbearkey dropbearconvert", "all"])?;
        self.built(&dir.join("dropbear"))
    }

    pub(super) fn iproute2_build(&self) -> Result<u8> {
        let version = self.settings.text("__ipver").unwrap_or_default();
        let dir = self.unpack(&format!("iproute2-{version}"), &["tar.xz", "tar.bz2", "tar.gz"])?;
        self.configure(&dir, &[])?;
        self.make(&dir, &["SUBDIRS=lib ip"])?;
        self.built(&dir.join("ip/ip"))
    }

    fn built(&self, program: &Path) -> Result<u8> {
        if !program.is_file() {
            bail!("the build made no {}", program.display());
        }
        say(&format!("{}: built", program.display()));
        Ok(0)
    }

    /// Unpacks an archive into the workspace, unless it is there.
    fn unpack(&self, name: &str, endings: &[&str]) -> Result<PathBuf> {
        let workspace = self.settings.path("XCLUSTER_WORKSPACE");
        let dir = workspace.join(name);
        if self.settings.flag("__clean") {
            let _ = fs::remove_dir_all(&dir);
        }
        if dir.is_dir() {
            return Ok(dir);
        }
        let home = PathBuf::from(self.settings.text("HOME").unwrap_or("/")).join("Downloads");
        let folders = [self.settings.path("ARCHIVE"), home];
        let names: Vec<String> = endings.iter().map(|e| format!("{name}.{e}")).collect();
        let found = folders.iter().flat_map(|f| names.iter().map(move |n| f.join(n)));
        let Some(archive) = found.into_iter().find(|p| p.is_file()) else {
            let first = folders[0].join(&names[0]);
            bail!("Archive not found [{}]; without it images take Debian's", first.display());
        };
        let record = workspace.join("archives.sha256");
        told(kernel_build::verify(&archive, &folders, &record, &say))?;
        let part = told(kernel_build::unpack(&archive, &workspace))?;
        fs::rename(part.keep(), &dir)?;
        Ok(dir)
    }

    fn make(&self, dir: &Path, words: &[&str]) -> Result<()> {
        let make = find_program("make").context("make is not installed")?;
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        let tool = Tool::new(make).arg("-C").arg(dir).arg(format!("-j{jobs}")).args(words);
        told(kernel_build::quietly(&tool, "make"))
    }

    fn configure(&self, dir: &Path, words: &[&str]) -> Result<()> {
        let sh = find_program("sh").context("sh is not installed")?;
        let tool = Tool::new(sh).args(["./configure"]).args(words).within(dir);
        told(kernel_build::quietly(&tool, "configure"))
    }
}

/// The date, as versions of images have it.
fn today() -> String {
    let seconds = i64::from(lodge_host::rootfs::epoch());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seconds = match std::env::var_os("SOURCE_DATE_EPOCH") {
        Some(_) => seconds,
        None => now.map_or(seconds, |d| d.as_secs() as i64),
    };
    let text = lodge_machine::keeper::rfc3339(seconds * 1_000_000);
    text.chars().take(10).map(|c| if c == '-' { '.' } else { c }).collect()
}
