//! Copies of a machine's own disks, kept beside them: taken while the machine runs or not, gone
//! back to, forgotten. Sharing bytes with the disks where the file system can.

use std::fs;
use std::path::{Path, PathBuf};

use lodge_machine::host::Command;
use lodge_machine::store::now_us;
use lodge_spec::machine::{DiskSource, Machine};
use lodge_spec::request::SnapshotVerb;
use lodge_spec::state::State;
use serde_json::{Value, json};

use super::Linux;
use crate::image::layer;
use crate::paths::make_dir;
use crate::survey::user_of;

impl Linux {
    fn snapshot_folder(&self, machine: &Machine, name: &str) -> Result<PathBuf, String> {
        let plain = !name.is_empty()
            && !name.starts_with('.')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:%".contains(&b));
        match plain {
            true => Ok(self.paths.machine(machine.id).join("snapshots").join(name)),
            false => Err(format!("{name:?} is no name of a snapshot")),
        }
    }

    /// The machine's own disks that have been made.
    fn own_disks(&self, machine: &Machine) -> Vec<(String, PathBuf)> {
        let home = self.paths.machine(machine.id);
        let own = machine.disks.iter().filter(|disk| match disk.source {
            DiskSource::Path(_) | DiskSource::Remote(_) | DiskSource::Own(_) => false,
            DiskSource::Above(_)
            | DiskSource::Image { .. }
            | DiskSource::Blank { .. }
            | DiskSource::Flist => true,
        });
        own.map(|disk| {
            let raw = home.join(format!("{}.raw", disk.name));
            let path = if raw.exists() { raw } else { home.join(format!("{}.qcow2", disk.name)) };
            (disk.name.to_string(), path)
        })
        .collect()
    }

    /// The files of a machine's own disks; those that were never started with have no bytes.
    pub fn disk_files(&self, machine: &Machine) -> Value {
        let owner = user_of(machine.id);
        let file = |(name, path): (String, PathBuf)| {
            let bytes = fs::metadata(&path).ok().map(|meta| meta.len());
            json!({"name": name, "path": path, "owner": owner, "bytes": bytes})
        };
        self.own_disks(machine).into_iter().map(file).collect()
    }

    pub async fn snapshot(
        &self,
        machine: &Machine,
        state: State,
        name: &str,
        verb: SnapshotVerb,
    ) -> Result<Value, String> {
        let folder = self.snapshot_folder(machine, name)?;
        match verb {
            SnapshotVerb::Take => self.take(machine, state, folder).await,
            SnapshotVerb::Restore if state.is_live() => Err("the machine still runs".into()),
            SnapshotVerb::Restore if state == State::Suspended => {
                Err("the machine is suspended, and its memory would not fit other disks".into())
            }
            SnapshotVerb::Restore => self.restore(machine, folder).await,
            SnapshotVerb::Drop => {
                let removed = tokio::fs::remove_dir_all(&folder).await;
                removed.map_err(|e| format!("{}: {e}", folder.display()))?;
                Ok(Value::Null)
            }
        }
    }

    async fn take(&self, machine: &Machine, state: State, to: PathBuf) -> Result<Value, String> {
        if to.exists() {
            return Err(format!("{} is there already", to.display()));
        }
        let disks = self.own_disks(machine);
        let owner = user_of(machine.id);
        // A hypervisor that stands still has written everything that its guest wrote.
        let running = state == State::Running;
        if running {
            self.live(machine.id)?.command(Command::Pause).await?;
        }
        let work = move || {
            let part = to.with_extension("part");
            let _ = fs::remove_dir_all(&part);
            let copied = copy_all(&disks, &part, owner);
            match copied.and_then(|bytes| fs::rename(&part, &to).map(|()| bytes)) {
                Ok(bytes) => Ok(json!({"bytes": bytes, "at_us": now_us()})),
                Err(error) => {
                    let _ = fs::remove_dir_all(&part);
                    Err(format!("{}: {error}", to.display()))
                }
            }
        };
        let taken = tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string())?;
        if running {
            self.live(machine.id)?.command(Command::Resume).await?;
        }
        taken
    }

    async fn restore(&self, machine: &Machine, from: PathBuf) -> Result<Value, String> {
        let disks = self.own_disks(machine);
        let owner = user_of(machine.id);
        let work = move || {
            for (_, path) in &disks {
                let text = |e: std::io::Error| format!("{}: {e}", path.display());
                let kept = from.join(path.file_name().unwrap_or_default());
                let part = path.with_extension("back");
                let _ = fs::remove_file(&part);
                if kept.exists() {
                    copy_one(&kept, &part, owner).map_err(text)?;
                    fs::rename(&part, path).map_err(text)?;
                } else {
                    // It had no bytes yet when the snapshot was taken.
                    let _ = fs::remove_file(path);
                }
            }
            Ok(Value::Null)
        };
        tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string())?
    }
}

fn copy_all(disks: &[(String, PathBuf)], to: &Path, owner: u32) -> std::io::Result<u64> {
    make_dir(to)?;
    let mut bytes = 0;
    for (_, path) in disks.iter().filter(|(_, path)| path.exists()) {
        bytes += copy_one(path, &to.join(path.file_name().unwrap_or_default()), owner)?;
    }
    Ok(bytes)
}

/// A copy that shares its bytes with the original where that is possible; how many it has.
fn copy_one(from: &Path, to: &Path, owner: u32) -> std::io::Result<u64> {
    let out = fs::File::create_new(to)?;
    layer::share_or_copy(from, &out)?;
    layer::give(to, owner)?;
    use std::os::unix::fs::MetadataExt;
    out.metadata().map(|meta| meta.blocks() * 512)
}
