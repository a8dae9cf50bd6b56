//! Host objects that belong to no machine: what a crash at any moment can leave, found by the
//! names that everything carries.

use std::path::{Path, PathBuf};

use lodge_jail::cgroup;
use lodge_spec::names::MachineId;
use lodge_spec::request::Refusal;
use serde::Serialize;
use tokio::net::UnixStream;

use super::Linux;
use crate::fdpass;
use crate::flist;
use crate::net::uplink;
use crate::warden::message::{self, Ask};

/// Blocks of flists take no more room than this, for each of the two formats.
const MAX_BLOCKS: u64 = 20 << 30;

/// Something that nobody needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stray {
    /// `folder`, `process`, `cgroup`, `blob`, `network`, `scratch` or `cache`.
    pub kind: &'static str,
    pub name: String,
    pub why: String,
}

impl Linux {
    /// Finds strays and, unless `dry_run`, removes them. `known`: the machines that there are;
    /// `live`: those with a hypervisor.
    pub async fn collect(
        &self,
        known: &[MachineId],
        live: &[MachineId],
        dry_run: bool,
    ) -> Result<Vec<Stray>, Refusal> {
        let mut strays = Vec::new();
        for (path, name) in entries(&self.paths.machines()) {
            if !known.iter().any(|id| id.to_string() == name) {
                let why = "no machine has this identity".to_owned();
                strays.push(Stray { kind: "folder", name: path.display().to_string(), why });
                remove(dry_run, &path).await;
            }
        }
        for (path, name) in entries(&self.paths.run.join("m")) {
            if live.iter().any(|id| id.0.simple().to_string() == name) {
                continue;
            }
            if let Ok(warden) = UnixStream::connect(message::socket(&path)).await {
                let why = "a hypervisor runs for no machine that lives".to_owned();
                strays.push(Stray { kind: "process", name: name.clone(), why });
                if !dry_run {
                    let _ = fdpass::send(&warden, &Ask::Kill, None).await;
                }
            }
            let why = "no machine with this identity lives".to_owned();
            strays.push(Stray { kind: "folder", name: path.display().to_string(), why });
            remove(dry_run, &path).await;
        }
        self.collect_groups(live, dry_run, &mut strays).await;
        for path in self.images.strays().await? {
            let why = "no image names it".to_owned();
            strays.push(Stray { kind: "blob", name: path.display().to_string(), why });
            remove(dry_run, &path).await;
        }
        for (path, name) in entries(&self.paths.cache()) {
            if name.starts_with("build-") || name.starts_with("part-") || name.ends_with(".part") {
                let why = "a build that did not end".to_owned();
                strays.push(Stray { kind: "scratch", name: path.display().to_string(), why });
                remove(dry_run, &path).await;
            }
        }
        self.trim_blocks(dry_run, &mut strays).await;
        if live.is_empty() {
            self.collect_networks(dry_run, &mut strays).await;
        }
        Ok(strays)
    }

    /// Blocks of flists beyond what is kept of them, those that nobody used for longest.
    async fn trim_blocks(&self, dry_run: bool, strays: &mut Vec<Stray>) {
        for folder in ["flist", "fl"] {
            let path = flist::root::cache(&self.paths).join("blocks").join(folder);
            let cache = flist::cache::Cache::new(&path);
            let trim = move || cache.trim(MAX_BLOCKS, dry_run);
            // There is nothing where no flist was ever used.
            let freed = tokio::task::spawn_blocking(trim).await.ok().and_then(Result::ok);
            if let Some(freed) = freed.filter(|freed| *freed > 0) {
                let why = format!("{freed} bytes of blocks that nobody used for longest");
                strays.push(Stray { kind: "cache", name: path.display().to_string(), why });
            }
        }
    }

    async fn collect_groups(&self, live: &[MachineId], dry_run: bool, strays: &mut Vec<Stray>) {
        let hierarchy = &self.facts().await.cgroups;
        for name in cgroup::list(hierarchy) {
            // Groups of other instances hold processes and cannot be removed; ours are empty.
            let ours = self.paths.machine_known(&name);
            if live.iter().any(|id| id.to_string() == name) || !ours {
                continue;
            }
            let why = "its machine does not live".to_owned();
            strays.push(Stray { kind: "cgroup", name: name.clone(), why });
            if !dry_run {
                let _ = cgroup::remove(hierarchy, &name);
            }
        }
    }

    async fn collect_networks(&self, dry_run: bool, strays: &mut Vec<Stray>) {
        for (path, name) in entries(&self.paths.run.join("net")) {
            let kept = UnixStream::connect(crate::net::client::socket(&path)).await.is_ok();
            let why = if kept { "no machine is on it" } else { "its keeper is gone" };
            strays.push(Stray { kind: "network", name, why: why.to_owned() });
            if !dry_run {
                uplink::leave(&path).await;
                remove(false, &path).await;
            }
        }
    }
}

fn entries(dir: &Path) -> Vec<(PathBuf, String)> {
    let list = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut list: Vec<_> =
        list.map(|e| (e.path(), e.file_name().to_string_lossy().into_owned())).collect();
    list.sort();
    list
}

async fn remove(dry_run: bool, path: &Path) {
    if !dry_run {
        let removed = tokio::fs::remove_dir_all(path).await;
        if removed.is_err() {
            let _ = tokio::fs::remove_file(path).await;
        }
    }
}
