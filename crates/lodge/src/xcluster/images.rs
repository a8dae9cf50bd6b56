//! Images, CD-ROMs and archives: the commands around overlays.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use lodge_doors::xcluster::machines;
use lodge_host::backend::DiskFormat;
use lodge_host::image::grub::WholeDisk;
use lodge_host::rootfs::archive::{self, Layer};
use lodge_host::rootfs::disk::{Make, Style};
use lodge_host::rootfs::image::Boot;
use lodge_host::rootfs::overlay::{self, Found, Purpose, Runner};
use lodge_host::rootfs::{cdrom, image, programs};

use super::{Session, foreign, print, runtime, say, told};

impl Session {
    pub(super) fn mkimage(&self) -> Result<u8> {
        // Its modules are in the image.
        let kernel = self.kernel()?;
        let base = self.base()?;
        let make = Make {
            size: self.size()?,
            format: match self.settings.text("__format") {
                None | Some("qcow2") => DiskFormat::Qcow2,
                Some("raw") => DiskFormat::Raw,
                Some(other) => bail!("--format: {other:?} is neither qcow2 nor raw"),
            },
            style: match self.settings.text("__fs") {
                None | Some("ext4") => Style::Ext4,
                Some("ext3") => Style::Ext3,
                Some(other) => bail!("--fs: {other:?} is neither ext4 nor ext3"),
            },
            label: "xcluster".into(),
            uuid: [0; 16],
        };
        let path = self.settings.path("__image");
        let grub = match self.settings.flag("__bootable") {
            true => Some(told(runtime()?.block_on(WholeDisk::make()))?),
            false => None,
        };
        let cmdline = machines::CMDLINE.join(" ");
        let boot = grub.as_ref().map(|grub| Boot { grub, kernel: &kernel, cmdline: &cmdline });
        let made = image::make(&path, &base, boot.as_ref(), make);
        let image::New { summary, libraries } = told(made)?;
        let list = self.settings.path("__base_libs");
        fs::write(&list, libraries.join("\n") + "\n")
            .with_context(|| list.display().to_string())?;
        let megabytes = summary.used_bytes as f64 / 1e6;
        say(&format!("{}: {} files, {megabytes:.1} MB", path.display(), summary.files));
        Ok(0)
    }

    fn size(&self) -> Result<u64> {
        let text = self.settings.text("__size").unwrap_or("2G");
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit: u64 = match text[digits.len()..].to_ascii_uppercase().as_str() {
            "" => 1,
            "K" | "KIB" => 1 << 10,
            "M" | "MIB" => 1 << 20,
            "G" | "GIB" => 1 << 30,
            "T" | "TIB" => 1 << 40,
            _ => bail!("--size: {text:?} is not a size; say 2G or 500M"),
        };
        let count: u64 = digits
            .parse()
            .map_err(|_| anyhow!("--size: {text:?} is not a size; say 2G or 500M"))?;
        let size = count.checked_mul(unit).context("--size: too large")?;
        Ok(size / 4096 * 4096)
    }

    fn base_libs(&self) -> BTreeSet<PathBuf> {
        let text = fs::read_to_string(self.settings.path("__base_libs")).unwrap_or_default();
        text.lines().map(PathBuf::from).collect()
    }

    /// The layers of overlays, all taken before anything is changed.
    fn layers(&self, words: &[String], purpose: Purpose) -> Result<Vec<Layer>> {
        let search = self.search();
        let found: Vec<Found> =
            words.iter().map(|w| told(search.resolve(w, purpose))).collect::<Result<_>>()?;
        let runner = self.runner()?;
        let mut layers = Vec::new();
        for found in &found {
            if let Found::Cached(path) = found {
                say(&format!("Use Cached [{}]", path.display()));
            }
            let layer = told(self.runner_for(&runner, found)?.take(found))?;
            if layer.entries == 0 {
                say(&format!("WARNING: {} is empty", layer.name));
            }
            layers.push(layer);
        }
        Ok(layers)
    }

    /// Overlays that Lodge ships may say that they fetch something; others are allowed to by
    /// whoever calls.
    fn runner_for(&self, runner: &Runner, found: &Found) -> Result<Runner> {
        let shipped = super::shared()?;
        let fetches = match found {
            Found::Program(dir) => dir.starts_with(shipped) && dir.join("network").is_file(),
            Found::Cached(_) | Found::Archive(_) | Found::Folder(_) => false,
        };
        Ok(Runner { network: runner.network || fetches, ..runner.clone() })
    }

    pub(super) fn ximage(&self) -> Result<u8> {
        let image = self.settings.path("__image");
        if !image.is_file() {
            bail!("Image not found [{}]", image.display());
        }
        let layers = self.layers(&self.line.words, Purpose::Image)?;
        for layer in &layers {
            say(&format!("Untar [{}]", layer.name));
        }
        let cdrom = self.settings.path("__cdrom");
        told(image::extend(
            &image,
            &layers,
            cdrom.parent().map(Path::to_owned).into_iter().collect(),
        ))?;
        // What was to be added to the old image does not fit the new one.
        let _ = fs::remove_file(&cdrom);
        say("SUCCESS");
        Ok(0)
    }

    pub(super) fn mkcdrom(&self) -> Result<u8> {
        let path = self.settings.path("__cdrom");
        if self.line.words.is_empty() {
            let _ = fs::remove_file(&path);
            return Ok(0);
        }
        let mut words: Vec<String> = Vec::new();
        let more = self.settings.text("XOVLS").unwrap_or("");
        let all = self.line.words.iter().map(String::as_str).chain(more.split_whitespace());
        for word in all {
            if !words.iter().any(|w| w == word) {
                words.push(word.to_owned());
            }
        }
        let layers = self.layers(&words, Purpose::Cdrom)?;
        let label = self.settings.text("__label").unwrap_or("xcluster");
        let names = told(cdrom::write(&path, label, &layers))?;
        print(&(names.join("\n") + "\n"))?;
        Ok(0)
    }

    pub(super) fn cache(&self) -> Result<u8> {
        let cached = self.settings.path("__cached");
        if self.settings.flag("__list") {
            let mut names = Vec::new();
            list(&cached, Path::new(""), &mut names);
            print(&format!("Cache dir [{}];\n{}", cached.display(), names.concat()))?;
            return Ok(0);
        }
        if self.settings.flag("__clear") {
            let _ = fs::remove_dir_all(&cached);
        }
        let setup = self.settings.text("SETUP").unwrap_or("default");
        if setup.contains(',') && !self.line.words.is_empty() {
            bail!("SETUP has many items [{setup}]");
        }
        let dir = cached.join(setup);
        let (search, runner) = (self.search(), self.runner()?);
        for word in &self.line.words {
            let found = Found::Program(told(search.folder(word))?);
            let layer = told(self.runner_for(&runner, &found)?.take(&found))?;
            told(layer.pack(&dir.join(format!("{}.tar.xz", overlay::label(&found)))))?;
        }
        Ok(0)
    }

    pub(super) fn cached_tar(&self) -> Result<u8> {
        match self.search().cached(self.word(0, "an overlay")?) {
            Some(path) => print(&format!("{}\n", path.display())).map(|()| 0),
            None => Ok(1),
        }
    }

    pub(super) fn ovld(&self) -> Result<u8> {
        let Some(name) = self.line.words.first() else { bail!("No ovl") };
        let dir = told(self.search().folder(name))?;
        print(&format!("{}\n", dir.display())).map(|()| 0)
    }

    /// Sends overlays to another host and unpacks them there.
    pub(super) fn inject(&self) -> Result<u8> {
        let address = self.settings.text("__addr").context("No address; say --addr=user@host")?;
        // `--sudo=` wants none.
        let none = self.line.options.get("__sudo").is_some_and(String::is_empty);
        let sudo = match self.settings.text("__sudo") {
            None if none => "",
            Some("yes") | None => "sudo",
            Some(other) => other,
        };
        let key = self.settings.text("__key").map(str::to_owned);
        for layer in self.layers(&self.line.words, Purpose::Cdrom)? {
            let mut tool = foreign("ssh")?;
            if let Some(key) = &key {
                tool = tool.args(["-i", key]);
            }
            let remote = format!("{sudo} tar -C / -x");
            let mut command = tool.arg(address).arg(remote.trim()).command().into_std();
            command.stdin(std::process::Stdio::piped());
            let mut child = command.spawn().context("ssh")?;
            let mut stdin = child.stdin.take().context("piped")?;
            let copied = std::io::copy(&mut layer.stream(), &mut stdin);
            drop(stdin);
            let status = child.wait()?;
            if !status.success() {
                bail!("{}: ssh {address} ended with {status}", layer.name);
            }
            copied?;
        }
        Ok(0)
    }

    fn dest(&self) -> Result<PathBuf> {
        self.settings.text("__dest").map(PathBuf::from).context("No destination; say --dest=dir")
    }

    /// Programs by name or path; what is missing is said and left out.
    fn programs(&self) -> Vec<PathBuf> {
        let find = |name: &String| {
            let found = programs::find(name);
            if found.is_none() {
                say(&format!("WARNING: Not found [{name}]"));
            }
            found
        };
        self.line.words.iter().filter_map(find).collect()
    }

    fn libraries(&self, programs: &[PathBuf]) -> Result<Vec<PathBuf>> {
        let workspace = self.settings.path("XCLUSTER_WORKSPACE");
        told(programs::libraries(programs, &self.base_libs(), Some(&workspace)))
    }

    pub(super) fn install_prog(&self) -> Result<u8> {
        let (dest, programs) = (self.dest()?, self.programs());
        for program in &programs {
            let name = program.file_name().context("a path")?;
            told(programs::copy(program, &dest, &Path::new("bin").join(name)))?;
        }
        for library in self.libraries(&programs)? {
            told(programs::copy(&library, &dest, &library))?;
        }
        Ok(0)
    }

    pub(super) fn cplib(&self) -> Result<u8> {
        let dest = self.dest()?;
        for library in self.libraries(&self.programs())? {
            told(programs::copy(&library, &dest, &library))?;
        }
        Ok(0)
    }

    pub(super) fn cploader(&self) -> Result<u8> {
        let loader = self.settings.path("__loader");
        told(programs::copy(&loader, &self.dest()?, &loader))?;
        Ok(0)
    }

    pub(super) fn libs(&self) -> Result<u8> {
        let list = self.libraries(&self.programs())?;
        print(&list.iter().map(|p| format!("{}\n", p.display())).collect::<String>())?;
        Ok(0)
    }

    pub(super) fn cat_tar(&self) -> Result<u8> {
        let mut stream = told(archive::unpacked(Path::new(self.word(0, "a file")?)))?;
        std::io::copy(&mut stream, &mut std::io::stdout())?;
        Ok(0)
    }

    /// The first paragraph of each overlay's description.
    pub(super) fn index(&self) -> Result<()> {
        for dir in self.settings.ovlpath() {
            let mut names: Vec<PathBuf> =
                fs::read_dir(&dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
            names.sort();
            for path in names.iter().filter(|p| p.join("tar").is_file()) {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let about = File::open(path.join("README.md")).map(|file| {
                    let lines = BufReader::new(file).lines().map_while(std::result::Result::ok);
                    lines
                        .skip_while(|l| l.starts_with('#') || l.is_empty())
                        .take_while(|l| !l.is_empty())
                        .collect::<Vec<_>>()
                        .join(" ")
                });
                print(&format!(
                    "* [{name}]({}) - {}\n",
                    path.display(),
                    about.unwrap_or_default()
                ))?;
            }
        }
        Ok(())
    }
}

fn list(dir: &Path, below: &Path, names: &mut Vec<String>) {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    entries.sort();
    for path in entries {
        let own = below.join(path.file_name().unwrap_or_default());
        match path.is_dir() {
            true => list(&path, &own, names),
            false => names.push(format!("{}\n", own.display())),
        }
    }
}
