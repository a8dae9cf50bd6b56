//! A machine's root, from the daemon's side: the flist is fetched and kept, a confined process puts
//! the machine's files in and takes out what boots. Afterwards everything is in the machine's
//! folder, and the machine stays with the flist that it was made from.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use lodge_spec::flist::{Flist, Source, Transport};
use lodge_spec::machine::{Boot, Machine};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use super::prepare::{Found, Order, Put, Whole};
pub use super::server::UID;
use super::server::{Config, Said, Task, WORD};
use super::whole::{self, Place};
use crate::image::layer;
use crate::paths::{self, Paths};
use crate::proc::Tool;

/// An flist itself is fetched within this.
const FETCH: Duration = Duration::from_secs(120);
/// What boots is found and taken out within this, and a disk is made.
const PREPARE: Duration = Duration::from_secs(300);

/// What a machine boots, and how its root is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    pub found: Found,
    pub flist: PathBuf,
    pub cache: PathBuf,
    pub layer: PathBuf,
    pub store: Option<String>,
    pub transport: Transport,
    /// The root itself, where it is a disk.
    pub disk: Option<PathBuf>,
    /// What the first disk is a layer above, where the flist holds a whole disk and no root.
    pub below: Option<PathBuf>,
}

/// What a kernel is told that nobody wrote a command line for.
const BARE: &str = "rw console=ttyS0 reboot=k panic=1";

impl Root {
    /// What a process is told that serves this root to QEMU.
    pub fn config(&self, socket: i32, owner: u32) -> Config {
        self.order(match self.transport {
            Transport::VirtioFs => Task::VirtioFs { socket },
            // A disk needs nobody who serves it.
            Transport::NineP | Transport::Disk => Task::Fuse { socket, owner },
        })
    }

    /// What the guest calls its root.
    pub fn tag(&self) -> &'static str {
        match self.transport {
            Transport::NineP | Transport::Disk => "root",
            Transport::VirtioFs => "vroot",
        }
    }

    fn order(&self, task: Task) -> Config {
        let Self { flist, cache, layer, store, .. } = self.clone();
        Config { flist, cache, layer, store, uid: user(), task }
    }

    /// The flist says all that is to be on the command line.
    pub fn says_all(&self) -> bool {
        self.found.nodefault
    }

    /// The kernel's command line, by the flist's own rules.
    pub fn cmdline(&self, added: &str) -> String {
        let (common, root) = match (self.found.nodefault, self.found.by_yaml, self.transport) {
            (true, _, _) => ("", ""),
            (false, true, Transport::NineP) => {
                ("", "rootfstype=9p rootflags=rw,trans=virtio,cache=loose root=root")
            }
            (false, true, Transport::VirtioFs) => ("", "rootfstype=virtiofs root=vroot rw"),
            (false, true, Transport::Disk) => ("", "root=/dev/vda rw"),
            (false, false, Transport::Disk) => (BARE, "root=/dev/vda"),
            (false, false, Transport::NineP) => {
                (BARE, "root=root rootfstype=9p rootflags=trans=virtio,cache=loose")
            }
            (false, false, Transport::VirtioFs) => (BARE, "root=vroot rootfstype=virtiofs"),
        };
        let parts = [common, root, &self.found.cmdline, added].map(str::trim);
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
    }
}

/// The user of the processes that read flists.
fn user() -> Option<u32> {
    rustix::process::geteuid().is_root().then_some(UID)
}

/// A folder of theirs.
fn folder(path: &Path) -> Result<(), String> {
    let text = |e: std::io::Error| format!("{}: {e}", path.display());
    paths::make_dir(path).map_err(text)?;
    match user() {
        Some(uid) => layer::give_folder(path, uid).map_err(text),
        None => Ok(()),
    }
}

/// The cache of all flists and their blocks.
pub fn cache(paths: &Paths) -> PathBuf {
    paths.cache().join("flist")
}

/// Readies a machine's root in `home`, again and again: what is there stays, files are put in anew.
/// `keep`: it is to be used, and not only to be looked at.
pub async fn prepare(
    paths: &Paths,
    machine: &Machine,
    flist: &Flist,
    home: &Path,
    keep: bool,
) -> Result<Root, String> {
    let cache = cache(paths);
    let (layer, out) = (home.join("root"), home.join("boot"));
    for path in [&cache, &cache.join("blocks"), &cache.join("starts"), &layer, &out] {
        folder(path)?;
    }
    let pinned = home.join("flist");
    if !pinned.exists() {
        let (source, keep, to) = (flist.source.clone(), cache.join("flists"), pinned.clone());
        let work = move || pin(&source, &keep, &to);
        tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string())??;
    }
    let put = |(path, mode, content)| Put { path, mode, content };
    let files = layer::guest_files(machine, false)?.into_iter().map(put).collect();
    let mut root = Root {
        kernel: out.join("kernel"),
        initrd: None,
        found: Found {
            by_yaml: false,
            initrd: false,
            cmdline: String::new(),
            nodefault: false,
            files: 0,
            whole: None,
        },
        flist: pinned,
        cache,
        layer,
        store: flist.store.clone(),
        transport: flist.transport.unwrap_or(Transport::NineP),
        // Under this name every start finds the machine's disk of that name.
        disk: (flist.transport == Some(Transport::Disk)).then(|| home.join("root.raw")),
        below: None,
    };
    // It is the machine's own once it is made, and what is in it its guest's.
    let missing = root.disk.as_ref().filter(|disk| !disk.exists());
    if let Some(disk) = missing.filter(|_| !keep) {
        // Whoever only looks is shown where it will be.
        File::create(disk).and_then(|file| file.set_len(1 << 30)).map_err(|e| e.to_string())?;
    }
    let disk = missing.filter(|_| keep).map(|_| out.join("disk"));
    let (place, below) = (Place::of(machine), home.join("image.raw"));
    let room = place.as_ref().ok().and_then(Place::room).filter(|_| keep);
    let whole = room.filter(|_| !below.exists()).map(|most| (out.join("image"), most));
    let order = Order { files, out: out.clone(), disk: disk.clone(), whole: whole.clone() };
    let config = root.order(Task::Prepare(order));
    let said = tokio::time::timeout(PREPARE, ask(&config)).await;
    let said = said.map_err(|_| "the flist's stores did not answer in time".to_owned())??;
    for name in ["kernel", "initrd", "disk", "image"] {
        is_plain(&out.join(name))?;
    }
    if let (Some(made), Some(disk)) = (&disk, &root.disk) {
        let text = |e: std::io::Error| format!("{}: {e}", disk.display());
        layer::give(made, crate::survey::user_of(machine.id)).map_err(text)?;
        fs::rename(made, disk).map_err(text)?;
    }
    root.found = said.ok_or("the process that reads flists said nothing")?;
    if let Some(Whole { bytes, .. }) = root.found.whole {
        let (machine, place) = (machine.clone(), place?);
        let work = move || taken_out(&machine, &place, bytes, whole, below);
        let done = tokio::task::spawn_blocking(work).await;
        root.below = done.map_err(|e| e.to_string())??;
        return Ok(root);
    }
    let usual = if root.found.by_yaml { Transport::NineP } else { Transport::VirtioFs };
    root.transport = flist.transport.unwrap_or(usual);
    root.initrd = root.found.initrd.then(|| out.join("initrd"));
    Ok(root)
}

/// What the confined process has made is opened by others from here on; one that was taken over by
/// what it read could have made a link to somebody else's file.
fn is_plain(path: &Path) -> Result<(), String> {
    use std::os::unix::fs::MetadataExt;
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.is_file() || meta.nlink() != 1 => {
            Err(format!("{} is a link, or no file", path.display()))
        }
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Puts the disk that an flist holds where the machine wants it. What its first disk is a layer
/// above from then on, if it is one.
fn taken_out(
    machine: &Machine,
    place: &Place,
    bytes: u64,
    made: Option<(PathBuf, u64)>,
    below: PathBuf,
) -> Result<Option<PathBuf>, String> {
    let Boot::Flist { flist, cmdline } = &machine.boot else { return Ok(None) };
    if flist.transport.is_some() || !cmdline.is_empty() {
        let what = if cmdline.is_empty() { "transport" } else { "command line" };
        return Err(format!("it boots from the disk in it, {}, and has no {what}", whole::NAME));
    }
    if let Some(most) = place.room().filter(|most| bytes > *most) {
        let name = whole::NAME;
        return Err(format!("{name} has {bytes} bytes, and the machine's first disk {most}"));
    }
    let layered = matches!(place, Place::Below { .. });
    match made {
        Some((made, _)) => place.fill(&made, &below)?,
        // Whoever only looks is shown where it will be.
        None if layered && !below.exists() => {
            File::create(&below).and_then(|f| f.set_len(bytes)).map_err(|e| e.to_string())?;
        }
        None => {}
    }
    Ok(layered.then_some(below))
}

async fn ask(config: &Config) -> Said {
    let text = |e: std::io::Error| format!("the process that reads flists: {e}");
    let own = paths::own_program().map_err(text)?;
    let mut command = Tool::new(own).arg(WORD).arg(&config.flist).command();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn().map_err(text)?;
    let order = serde_json::to_vec(config).map_err(|e| e.to_string())?;
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(&order).await.map_err(text)?;
    drop(stdin);
    let mut line = String::new();
    let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
    stdout.read_line(&mut line).await.map_err(text)?;
    let ended = child.wait().await.map_err(text)?;
    serde_json::from_str(&line)
        .unwrap_or_else(|_| Err(format!("the process that reads flists ended with {ended}")))
}

/// Gives a machine its own name for the flist's content, fetched if it is elsewhere.
fn pin(source: &Source, keep: &Path, to: &Path) -> Result<(), String> {
    let from = match source {
        Source::Path(path) => PathBuf::from(path),
        Source::Url(url) => fetch(url, keep)?,
    };
    let text = |e: std::io::Error| format!("{}: {e}", from.display());
    let meta = fs::metadata(&from).map_err(text)?;
    if !meta.is_file() {
        return Err(format!("{} is not a file", from.display()));
    }
    let part = to.with_extension("part");
    let _ = fs::remove_file(&part);
    // The content must stay what it is, so a file that others can write to is copied.
    let linked = matches!(source, Source::Url(_)) && fs::hard_link(&from, &part).is_ok();
    if !linked {
        let out = File::create(&part).map_err(text)?;
        layer::share_or_copy(&from, &out).map_err(text)?;
        use std::os::unix::fs::PermissionsExt;
        out.set_permissions(fs::Permissions::from_mode(0o444)).map_err(text)?;
    }
    fs::rename(&part, to).map_err(text)
}

/// An flist's file in the cache. Asked for anew each time, sent only if it has changed; one that
/// cannot be asked for is taken as it was.
fn fetch(url: &str, keep: &Path) -> Result<PathBuf, String> {
    paths::make_dir(keep).map_err(|e| format!("{}: {e}", keep.display()))?;
    let name = {
        use sha2::{Digest, Sha256};
        crate::image::store::hex(&Sha256::digest(url.as_bytes()))
    };
    let (file, tag) = (keep.join(&name), keep.join(format!("{name}.tag")));
    let known = fs::read_to_string(&tag).ok().filter(|_| file.exists());
    let failed = |why: String| format!("failed to download flist: {why}");
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(FETCH))
        .timeout_connect(Some(Duration::from_secs(10)))
        .http_status_as_error(false)
        .user_agent(concat!("lodge/", env!("CARGO_PKG_VERSION")))
        .build()
        .into();
    let mut request = agent.get(url);
    if let Some((header, value)) = known.as_deref().and_then(|known| known.split_once(' ')) {
        request = request.header(header, value);
    }
    let mut answer = match request.call() {
        Ok(answer) => answer,
        Err(_) if file.exists() => return Ok(file),
        Err(error) => return Err(failed(error.to_string())),
    };
    let status = answer.status();
    if status.as_u16() == 304 {
        return Ok(file);
    }
    if status.as_u16() != 200 {
        let reason = status.canonical_reason().unwrap_or("");
        return Err(failed(format!("{} {reason}", status.as_u16()).trim().to_owned()));
    }
    let header = |name: &str| answer.headers().get(name)?.to_str().ok().map(str::to_owned);
    let etag = header("etag").map(|value| format!("if-none-match {value}"));
    let mark = etag.or_else(|| header("last-modified").map(|v| format!("if-modified-since {v}")));
    let io = |e: std::io::Error| failed(e.to_string());
    let mut part = tempfile::NamedTempFile::new_in(keep).map_err(io)?;
    let limit = lodge_formats::flist::MAX_DATABASE;
    let mut body = answer.body_mut().with_config().limit(limit).reader();
    std::io::copy(&mut body, part.as_file_mut()).map_err(io)?;
    part.as_file_mut().flush().map_err(io)?;
    use std::os::unix::fs::PermissionsExt;
    part.as_file().set_permissions(fs::Permissions::from_mode(0o444)).map_err(io)?;
    let _ = fs::remove_file(&tag);
    part.persist(&file).map_err(|e| io(e.error))?;
    if let Some(mark) = mark {
        fs::write(&tag, mark).map_err(io)?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_not_taken_for_what_was_made() {
        let dir = tempfile::tempdir().unwrap();
        let [file, soft, hard] = ["file", "soft", "hard"].map(|name| dir.path().join(name));
        fs::write(&file, "x").unwrap();
        assert_eq!(is_plain(&file), Ok(()));
        assert_eq!(is_plain(&dir.path().join("absent")), Ok(()));
        std::os::unix::fs::symlink("file", &soft).unwrap();
        assert!(is_plain(&soft).is_err());
        fs::hard_link(&file, &hard).unwrap();
        assert!(is_plain(&hard).is_err());
        assert!(is_plain(dir.path()).is_err());
    }
}
