//! Trees of Debian packages, and of what is built like Debian: `mmdebstrap` makes them, without an
//! installer, without root where need be; the same packages give the same bytes.

use std::fs::{self, File as HostFile};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader};

use super::build::Tell;
use super::recipe;
use crate::paths::find_program;
use crate::proc::Tool;

/// The moment that everything in an image bears, seconds since 1970.
pub(crate) const EPOCH: u32 = 1_700_000_000;

/// Where packages come from.
#[derive(Clone, Debug, Default)]
pub(crate) struct Suite<'a> {
    pub(crate) name: &'a str,
    /// URLs or whole lines of a sources list; Debian's own where empty.
    pub(crate) mirrors: &'a [String],
    /// Whose signatures count; the host's keys where absent.
    pub(crate) keyring: Option<&'a Path>,
    pub(crate) components: &'a [String],
}

/// A file to be laid into a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct File {
    pub(crate) path: String,
    pub(crate) mode: u32,
    pub(crate) content: Vec<u8>,
}

impl From<&recipe::Overlay> for File {
    fn from((path, mode, content): &recipe::Overlay) -> Self {
        Self { path: (*path).into(), mode: *mode, content: content.as_bytes().to_vec() }
    }
}

/// What goes into a tree.
#[derive(Clone, Debug, Default)]
pub(crate) struct Contents {
    pub(crate) packages: Vec<String>,
    /// There before packages are installed.
    pub(crate) early: Vec<File>,
    /// Put in afterwards.
    pub(crate) late: Vec<File>,
    /// Paths and where they lead.
    pub(crate) links: Vec<(String, String)>,
    /// Programs of the tree, with their arguments, run in it at the end in this order.
    pub(crate) run: Vec<Vec<String>>,
}

/// One tree to be made.
pub(crate) struct Make<'a> {
    pub(crate) suite: &'a Suite<'a>,
    pub(crate) contents: &'a Contents,
    /// A folder where fetched packages are kept from one time to the next.
    pub(crate) cache: Option<&'a Path>,
    /// Where all that is said goes.
    pub(crate) log: Option<HostFile>,
}

/// The link that keeps a unit from ever starting.
pub(crate) fn masked(unit: &&str) -> (String, String) {
    (format!("etc/systemd/system/{unit}"), "/dev/null".into())
}

/// Whether it can be the name of a package.
pub(crate) fn is_package(name: &str) -> bool {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b);
    name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric()) && name.bytes().all(letter)
}

impl Make<'_> {
    /// Makes the tree as an archive. Works in `work`.
    pub(crate) async fn tree(&self, work: &Path, tree: &Path, tell: &Tell) -> Result<(), String> {
        let text = |e: io::Error| e.to_string();
        let (early, late) = (work.join("early.tar"), work.join("late.tar"));
        let contents = self.contents;
        write_overlay(&early, &contents.early, &[]).map_err(text)?;
        write_overlay(&late, &contents.late, &contents.links).map_err(text)?;
        let mut tool = self.tool(work)?.arg("--format=tar");
        if let Some(cache) = self.cache {
            fs::create_dir_all(cache).map_err(text)?;
            let archives = "/var/cache/apt/archives";
            // What is fetched comes from the cache where it is there, checked as if it were new.
            tool = tool
                .arg("--skip=essential/unlink")
                .arg(format!("--setup-hook=mkdir -p \"$1\"{archives}"))
                .arg(format!("--setup-hook=sync-in {} {archives}", cache.display()))
                .arg(format!("--customize-hook=sync-out {archives} {}", cache.display()));
        }
        tool = tool
            .arg(format!("--essential-hook=tar-in {} /", early.display()))
            .arg(format!("--customize-hook=tar-in {} /", late.display()));
        for words in &contents.run {
            tool = tool.arg(format!("--customize-hook=chroot \"$1\" {}", quoted(words)?));
        }
        let clean = "rm -f /etc/ssh/ssh_host_* /var/log/*.log /var/log/apt/* \
                     /var/cache/ldconfig/aux-cache";
        let tool = tool
            .arg(format!("--customize-hook=chroot \"$1\" sh -c '{clean}'"))
            .arg(self.suite.name)
            .arg(tree)
            .args(self.suite.mirrors);
        self.run(&tool, |line| {
            if let Some(step) = line.strip_prefix("I: ") {
                // Its own scratch and hooks are nobody's business.
                if !step.contains(['/', '\'']) {
                    tell(step.trim_end_matches("..."), 0, 0);
                }
            }
        })
        .await?;
        settle_owners(tree).map_err(|e| format!("{}: {e}", tree.display()))
    }

    /// Which packages, in which versions, the tree would be made of now: `NAME VERSION`, sorted.
    pub(crate) async fn resolve(&self, work: &Path) -> Result<Vec<String>, String> {
        let tool = self.tool(work)?.args(["--simulate", "--verbose"]).arg(self.suite.name);
        let tool = tool.arg("/dev/null").args(self.suite.mirrors);
        let mut list = Vec::new();
        self.run(&tool, |line| {
            let mut words = line.strip_prefix("Inst ").unwrap_or("").split(' ');
            if let (Some(name), Some(version)) = (words.next(), words.find(|w| w.starts_with('(')))
            {
                list.push(format!("{name} {}", &version[1..]));
            }
        })
        .await?;
        list.sort();
        list.dedup();
        Ok(list)
    }

    fn tool(&self, work: &Path) -> Result<Tool, String> {
        let program = find_program("mmdebstrap")
            .ok_or("mmdebstrap is not installed; `apt-get install mmdebstrap` adds it")?;
        // Its mounts are in a namespace that ends with it, and its tree is in our scratch; without
        // root it makes a namespace itself, in which our scratch is not its own.
        let root = rustix::process::geteuid().is_root();
        let mode = if root { "root" } else { "unshare" };
        let tool = match root {
            true => Tool::new("/usr/bin/unshare").arg("--mount").arg(program).env("TMPDIR", work),
            false => Tool::new(program),
        };
        let mut tool = tool
            .args([&format!("--mode={mode}"), "--variant=minbase"])
            .arg(format!("--include={}", self.contents.packages.join(",")))
            .args(["--aptopt=Acquire::Languages \"none\"", "--aptopt=Acquire::Retries \"3\""])
            .args(
                ["doc", "man", "locale", "info"]
                    .map(|d| format!("--dpkgopt=path-exclude=/usr/share/{d}/*")),
            )
            .env("SOURCE_DATE_EPOCH", EPOCH.to_string());
        if let Some(keyring) = self.suite.keyring {
            tool = tool.arg(format!("--keyring={}", keyring.display()));
        }
        if !self.suite.components.is_empty() {
            tool = tool.arg(format!("--components={}", self.suite.components.join(",")));
        }
        for proxy in ["http_proxy", "https_proxy", "no_proxy"] {
            if let Some(value) = std::env::var_os(proxy) {
                tool = tool.env(proxy, value);
            }
        }
        Ok(tool)
    }

    async fn run(&self, tool: &Tool, mut hear: impl FnMut(&str)) -> Result<(), String> {
        let mut command = tool.command();
        // A group of its own: when it fails, it ends its whole group.
        command.process_group(0);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| tool.start_error(e).to_string())?;
        let group = Group(child.id());
        let mut said = BufReader::new(child.stderr.take().expect("piped")).lines();
        let mut told = BufReader::new(child.stdout.take().expect("piped")).lines();
        let (mut why, mut open) = (Why::default(), (true, true));
        while open.0 || open.1 {
            let line = tokio::select! {
                line = said.next_line(), if open.0 => {
                    open.0 = matches!(line, Ok(Some(_)));
                    line
                }
                line = told.next_line(), if open.1 => {
                    open.1 = matches!(line, Ok(Some(_)));
                    line
                }
            };
            let Ok(Some(line)) = line else { continue };
            if let Some(mut log) = self.log.as_ref() {
                let _ = writeln!(log, "{line}");
            }
            hear(&line);
            why.hear(line);
        }
        let status = child.wait().await.map_err(|e| tool.start_error(e).to_string())?;
        drop(group);
        match status.success() {
            true => Ok(()),
            false => Err(format!("mmdebstrap failed: {}", why.said())),
        }
    }
}

/// What of a failed tool's words says why it failed: its first complaints, and what the programs that
/// it runs said just before them.
#[derive(Default)]
struct Why {
    complaints: Vec<String>,
    before: Vec<String>,
    last: Vec<String>,
}

impl Why {
    fn hear(&mut self, line: String) {
        /// How apt, dpkg and mmdebstrap tell how far they are.
        const PROGRESS: &[&str] = &[
            "I: ",
            "Inst ",
            "Get:",
            "Hit:",
            "Ign:",
            "Fetched ",
            "Reading ",
            "(Reading ",
            "Building ",
            "Selecting ",
            "Preparing ",
            "Unpacking ",
            "Setting up ",
            "Processing ",
            "Need to get ",
            "After this ",
        ];
        if PROGRESS.iter().any(|progress| line.starts_with(progress)) {
            return;
        }
        let complaint = line.strip_prefix("E: ").or_else(|| line.strip_prefix("dpkg: error "));
        if let Some(complaint) = complaint {
            if self.complaints.is_empty() {
                let from = self.last.len().saturating_sub(2);
                self.before = self.last.split_off(from);
            }
            if self.complaints.len() < 2 {
                self.complaints.push(complaint.to_owned());
            }
            return;
        }
        self.last.push(line);
        let excess = self.last.len().saturating_sub(8);
        self.last.drain(..excess);
    }

    fn said(&self) -> String {
        match self.complaints.is_empty() {
            true => self.last.join("; "),
            false => [&self.before[..], &self.complaints[..]].concat().join("; "),
        }
    }
}

/// Folders that apt gives to a user of its own where that user could reach our scratch, and the one
/// into which the cache's owner is copied with the cache: they belong to root wherever the tree was
/// made, and whoever made it. Apt gives them away again when it needs to.
fn settle_owners(tree: &Path) -> io::Result<()> {
    const FOLDERS: [&[u8]; 3] = [
        b"./var/lib/apt/lists/partial",
        b"./var/cache/apt/archives",
        b"./var/cache/apt/archives/partial",
    ];
    let file = HostFile::options().read(true).write(true).open(tree)?;
    let mut headers = Vec::new();
    for entry in tar::Archive::new(io::BufReader::new(&file)).entries_with_seek()? {
        let entry = entry?;
        let path = entry.path_bytes();
        if FOLDERS.contains(&path.strip_suffix(b"/").unwrap_or(&path)) {
            let mut header = entry.header().clone();
            header.set_uid(0);
            header.set_gid(0);
            header.set_cksum();
            headers.push((entry.raw_header_position(), header));
        }
    }
    for (at, header) in headers {
        std::os::unix::fs::FileExt::write_all_at(&file, header.as_bytes(), at)?;
    }
    Ok(())
}

/// Words for a hook, which a shell reads: only such as it cannot take for anything else.
fn quoted(words: &[String]) -> Result<String, String> {
    let plain = |w: &String| {
        !w.is_empty() && w.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-,:=".contains(&b))
    };
    match words.iter().find(|w| !plain(w)) {
        Some(odd) => Err(format!("{odd:?} cannot be part of a command")),
        None => Ok(words.join(" ")),
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

fn write_overlay(path: &PathBuf, files: &[File], links: &[(String, String)]) -> io::Result<()> {
    let mut tar = tar::Builder::new(HostFile::create(path)?);
    let header = |kind, mode, size| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header.set_mtime(EPOCH.into());
        header
    };
    for File { path, mode, content } in files {
        let kind = match path.ends_with('/') {
            true => tar::EntryType::Directory,
            false => tar::EntryType::Regular,
        };
        tar.append_data(&mut header(kind, *mode, content.len() as u64), path, content.as_slice())?;
    }
    for (name, target) in links {
        tar.append_link(&mut header(tar::EntryType::Symlink, 0o777, 0), name, target)?;
    }
    tar.into_inner()?.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(lines: &[&str]) -> String {
        let mut why = Why::default();
        lines.iter().for_each(|line| why.hear((*line).to_owned()));
        why.said()
    }

    #[test]
    fn the_cause_is_said_and_not_what_follows_from_it() {
        let full = [
            "Get:1 x",
            "I: extracting archives...",
            "tar: ./usr/x: Cannot write: No space left on device",
            "tar: Exiting with failure status",
            "E: tar --extract failed: 512",
            "E: mmdebstrap failed",
            "E: more",
            "I: main() received signal PIPE",
        ];
        assert_eq!(
            said(&full),
            "tar: ./usr/x: Cannot write: No space left on device; tar: Exiting with failure status; \
             tar --extract failed: 512; mmdebstrap failed"
        );
        assert_eq!(
            said(&["Get:1 x", "E: Failed to fetch y  404", "E: z"]),
            "Failed to fetch y  404; z"
        );
        assert_eq!(said(&["Get:1 x", "one", "two"]), "one; two");
    }
}
