//! A machine's memory on the disk: written when it is suspended, read when it goes on, deleted as
//! soon as it is read. It fits launches of one shape only, which is written down beside it, last,
//! so that what was written in part is never taken for whole.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use lodge_machine::host::{Command, Report, Sink};
use lodge_machine::life::Seen;
use lodge_spec::machine::{Boot, Machine};
use lodge_spec::names::MachineId;
use serde::{Deserialize, Serialize};

use super::Linux;
use super::drive::Drive;
use super::live::Live;
use crate::backend::qemu::control::Stands;
use crate::backend::{Launch, QEMU_MEMORY, memory_folder};
use crate::paths;
use crate::warden::message::Ask;

/// What is known of the memory that is saved.
#[derive(Serialize, Deserialize)]
struct Kept {
    shape: Vec<String>,
}

/// Beside the folder: a hypervisor may write in there.
fn note(home: &Path) -> PathBuf {
    home.join("memory.json")
}

/// Writes down which launches the memory fits.
pub(super) fn note_shape(home: &Path, shape: Vec<String>) -> io::Result<()> {
    let text = serde_json::to_vec(&Kept { shape })?;
    paths::write_private(&note(home), &text)
}

impl Linux {
    /// Stops the guest and writes its memory.
    pub(super) async fn save_memory(&self, machine: &Machine) -> Result<(), String> {
        if matches!(machine.boot, Boot::Flist { .. }) {
            return Err("a root that is an flist is served while the machine runs, and cannot be \
                        taken up again; its memory cannot be saved"
                .into());
        }
        let live = self.live(machine.id)?;
        let home = self.paths.machine(machine.id);
        let choice = self.plan_in(machine, &home, true).await.map_err(|p| p.to_string())?;
        let next = choice.chosen().map_err(|list| Self::unsupported(&list).to_string())?;
        if let Some((then, now)) = difference(&live.launch.shape, &next.shape) {
            return Err(format!(
                "it could not go on where it was, because its next start differs from this one \
                 ({then} then, {now} now); restart it first"
            ));
        }
        self.discard_memory(machine.id).await;
        let ran = matches!(live.drive.stands().await, Stands::Running);
        let saved = match write(&live, &home).await {
            Ok(()) => note_shape(&home, next.shape).map_err(|e| e.to_string()),
            Err(why) => Err(why),
        };
        if saved.is_err() {
            self.discard_memory(machine.id).await;
            if ran && matches!(live.drive.stands().await, Stands::Still) {
                live.command(Command::Resume).await?;
            }
        }
        saved
    }

    pub(super) async fn discard_memory(&self, id: MachineId) {
        let home = self.paths.machine(id);
        // What cannot be deleted is in nobody's way: without its note it counts for nothing.
        let work = move || {
            let _ = fs::remove_file(note(&home));
            empty(&memory_folder(&home))
        };
        let _ = tokio::task::spawn_blocking(work).await;
    }

    /// Makes a launch one that goes on from the saved memory, if that fits.
    pub(super) fn go_on(&self, id: MachineId, launch: &mut Launch) -> Result<(), String> {
        let home = self.paths.machine(id);
        let text = fs::read(note(&home));
        let gone = |e: &dyn std::fmt::Display| {
            format!("its saved memory is not there any more ({e}); `stop --force` gives it up")
        };
        let text = text.map_err(|e| gone(&e))?;
        let kept: Kept = serde_json::from_slice(&text).map_err(|e| gone(&e))?;
        if let Some((then, now)) = difference(&kept.shape, &launch.shape) {
            return Err(format!(
                "it was suspended as another machine than it would be started as now ({then} then, \
                 {now} now); `stop --force` gives its memory up"
            ));
        }
        launch.go_on(&home);
        Ok(())
    }

    /// Lets a guest run whose memory has been read.
    pub(super) async fn set_going(
        &self,
        live: &Live,
        id: MachineId,
        sink: &Sink,
    ) -> Result<(), String> {
        // From here on the disks change, and the saved memory does not fit them any more.
        self.discard_memory(id).await;
        let _ = sink.send(Report::Seen(Seen::Loaded));
        let going = live.command(Command::Resume).await;
        if going.is_err() {
            live.ask(Ask::Kill).await?;
        }
        going
    }
}

async fn write(live: &Live, home: &Path) -> Result<(), String> {
    let folder = memory_folder(home);
    let at = |path: &Path| {
        let path = path.display().to_string();
        move |e: io::Error| format!("{path}: {e}")
    };
    match &live.drive {
        Drive::Qemu(control) => {
            paths::make_dir(&folder).map_err(at(&folder))?;
            let path = folder.join(QEMU_MEMORY);
            use std::os::unix::fs::OpenOptionsExt;
            let mut options = fs::File::options();
            options.create_new(true).write(true).read(true).mode(0o600);
            let file = options.open(&path).map_err(at(&path))?;
            control.save(&file).await?;
            let sync = tokio::task::spawn_blocking(move || file.sync_all());
            sync.await.map_err(|e| e.to_string())?.map_err(at(&path))
        }
        Drive::Firecracker(control) => {
            control.save().await?;
            sync_all(folder).await
        }
        Drive::CloudHypervisor(control) => {
            control.save().await?;
            sync_all(folder).await
        }
    }
}

/// All that is on its way to the disk that this folder is on; the files in it are not opened, as
/// they are a hypervisor's.
async fn sync_all(folder: PathBuf) -> Result<(), String> {
    let sync = move || {
        let opened = fs::File::open(&folder)?;
        rustix::fs::syncfs(opened).map_err(io::Error::from)
    };
    let synced = tokio::task::spawn_blocking(sync).await.map_err(|e| e.to_string())?;
    synced.map_err(|e| e.to_string())
}

/// Removes what is in a folder, which itself may be in use.
fn empty(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let path = entry.path();
        let _ = if is_folder { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    }
}

/// The first thing that differs, as it is in both.
pub(super) fn difference(one: &[String], other: &[String]) -> Option<(String, String)> {
    let text = |part: Option<&String>| part.cloned().unwrap_or_else(|| "nothing".to_owned());
    let pairs = (0..one.len().max(other.len())).map(|i| (one.get(i), other.get(i)));
    let mut differing = pairs.filter(|(one, other)| one != other);
    differing.next().map(|(one, other)| (text(one), text(other)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_named() {
        let list = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(difference(&list("a b"), &list("a b")), None);
        let found = difference(&list("a b"), &list("a c"));
        assert_eq!(found, Some(("b".into(), "c".into())));
        let found = difference(&list("a"), &list("a c"));
        assert_eq!(found, Some(("nothing".into(), "c".into())));
    }
}
