//! What `xcadmin` does: looks at the host, builds everything, makes overlays.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use lodge_host::paths::find_program;
use lodge_host::proc::Tool;

use super::{Session, print, say, told};

/// What is used, and the package that has it. The first list is needed.
const NEEDED: &[(&str, &str)] =
    &[("qemu-system-x86_64", "qemu-system-x86"), ("ssh", "openssh-client")];
const USEFUL: &[(&str, &str)] = &[
    ("tmux", "tmux"),
    ("make", "build-essential"),
    ("gcc", "build-essential"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("busybox", "busybox"),
    ("dropbear", "dropbear-bin"),
    ("tcpdump", "tcpdump"),
    ("strace", "strace"),
    ("jq", "jq"),
];

impl Session {
    pub(super) fn admin(&self) -> Result<u8> {
        match self.line.command.name {
            "env_check" => self.env_check(),
            "base_archives" => self.base_archives(),
            "build_base" => self.build_base(),
            "mkovl" => self.mkovl(),
            "ovlindex" => self.index().map(|()| 0),
            other => bail!("{other} is in the table and nowhere else"),
        }
    }

    fn env_check(&self) -> Result<u8> {
        let mut missing = 0;
        for (list, needed) in [(NEEDED, true), (USEFUL, false)] {
            for (program, package) in list {
                if find_program(program).is_none() {
                    let word = if needed { "ERROR" } else { "WARNING" };
                    print(&format!(
                        "{word}: {program} is not installed; `apt-get install {package}` adds it\n"
                    ))?;
                    missing += u8::from(needed);
                }
            }
        }
        if missing == 0 {
            print("Everything that is needed is there; `lodge doctor` says more\n")?;
        }
        Ok(missing.min(1))
    }

    fn base_archives(&self) -> Result<u8> {
        let value = |name: &str| self.settings.text(name).unwrap_or_default().to_owned();
        print(&format!(
            "{}.tar.xz\n{}.tar.bz2\ndropbear-{}.tar.bz2\niproute2-{}.tar.xz\n",
            value("__kver"),
            value("__bbver"),
            value("__dropbearver"),
            value("__ipver")
        ))?;
        Ok(0)
    }

    /// Kernel, programs and image into a workspace that is not there yet.
    fn build_base(&self) -> Result<u8> {
        let workspace = match self.line.words.first() {
            Some(word) => PathBuf::from(word),
            None => self.settings.path("XCLUSTER_WORKSPACE"),
        };
        if workspace.exists() {
            bail!("Workspace exists [{}]", workspace.display());
        }
        let workspace = std::path::absolute(workspace)?;
        let begun = Instant::now();
        let archive = self.settings.path("ARCHIVE");
        let there = |name: &str| {
            fs::read_dir(&archive)
                .into_iter()
                .flatten()
                .flatten()
                .any(|e| e.file_name().to_string_lossy().starts_with(&format!("{name}.tar.")))
        };
        let value = |name: &str| self.settings.text(name).unwrap_or_default().to_owned();
        let mut steps = vec![("kernel_build", vec![])];
        for (command, name) in [
            ("busybox_build", value("__bbver")),
            ("dropbear_build", format!("dropbear-{}", value("__dropbearver"))),
            ("iproute2_build", format!("iproute2-{}", value("__ipver"))),
        ] {
            match there(&name) {
                true => steps.push((command, vec![])),
                false => say(&format!("{name}: no archive; Debian's program is taken")),
            }
        }
        steps.push(("mkimage", vec!["--size=8G"]));
        for (command, words) in steps {
            let own = std::env::current_exe()?;
            let mut tool = Tool::new(own).arg("xc").arg(command).args(words);
            for (name, value) in std::env::vars_os() {
                let Some(name) = name.to_str() else { continue };
                tool = tool.env(name, value);
            }
            let tool = tool.env("XCLUSTER_WORKSPACE", &workspace).env("XCLUSTER_HOME", "");
            let status = tool.command().into_std().status()?;
            if !status.success() {
                bail!("{command} ended with {status}");
            }
            print(&format!("{:6.1} {command}\n", begun.elapsed().as_secs_f32()))?;
        }
        Ok(0)
    }

    /// A copy of an overlay under another name, which takes the place of the old one inside too.
    fn mkovl(&self) -> Result<u8> {
        let name = self.word(0, "a name")?;
        let sound = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
        if name.is_empty() || !name.bytes().all(sound) {
            bail!("[{name}] cannot be the name of an overlay");
        }
        let template = self.settings.text("__template").unwrap_or("template");
        let from = told(self.search().folder(template))?;
        let home = self.settings.text("HOME").unwrap_or("/").to_owned();
        let folder = match self.settings.text("__ovldir") {
            Some(dir) => PathBuf::from(dir),
            None => Path::new(&home).join("tmp/ovl"),
        };
        let to = folder.join(name);
        if to.exists() {
            bail!("Already exists [{}]", to.display());
        }
        copy_renamed(&from, &to, template, name)?;
        print(&format!("{}\n", to.display()))?;
        Ok(0)
    }
}

fn copy_renamed(from: &Path, to: &Path, old: &str, new: &str) -> Result<()> {
    fs::create_dir_all(to).with_context(|| to.display().to_string())?;
    for entry in fs::read_dir(from)?.flatten() {
        let path = entry.path();
        let target = to.join(entry.file_name().to_string_lossy().replace(old, new));
        if path.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(&path)?, &target)?;
        } else if path.is_dir() {
            copy_renamed(&path, &target, old, new)?;
        } else {
            let bytes = fs::read(&path)?;
            match String::from_utf8(bytes) {
                Ok(text) => fs::write(&target, text.replace(old, new))?,
                Err(odd) => fs::write(&target, odd.into_bytes())?,
            }
            let mode = path.metadata()?.permissions().mode();
            fs::set_permissions(&target, fs::Permissions::from_mode(mode))?;
        }
    }
    Ok(())
}
