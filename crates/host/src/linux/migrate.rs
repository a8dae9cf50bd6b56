//! A machine that moves to another host while its guest runs. Its memory goes as it is written,
//! the rest when the guest stands still; what both hosts must have alike is compared before
//! anything moves. The last piece is sent only when nothing can fail here any more: whoever has it
//! may let the guest run.

use std::fs;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lodge_machine::host::{Command, Leaving};
use lodge_spec::machine::{Accel, Boot, Disk, DiskSource, Machine, Media};
use lodge_spec::migration::{Destination, Passport, SharedDisk};
use lodge_spec::request::{Question, Reply};
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use super::Linux;
use super::drive::Drive;
use super::live::Live;
use super::peer::Peer;
use super::suspend::{self, difference};
use crate::backend::qemu::control::{Control, Stands};
use crate::backend::{QEMU_MEMORY, memory_folder};
use crate::frames::LONGEST;
use crate::image::layer;
use crate::paths;

/// From the last piece until the other host says that the guest runs.
const ARRIVAL: Duration = Duration::from_secs(120);

/// What a guest sees of the hypervisor that its launch does not say.
fn program(version: &str, accel: Accel) -> Vec<String> {
    let mut list = vec![format!("QEMU {version}")];
    if accel == Accel::Kvm {
        list.push(processor(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()));
    }
    list
}

/// The processor as its guests see it; `text` is `/proc/cpuinfo`.
fn processor(text: &str) -> String {
    let first = text.split("\n\n").next().unwrap_or_default();
    let value = |name: &str| {
        let mut lines = first.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim()).unwrap_or_default()
    };
    let mut flags: Vec<&str> = value("flags").split(' ').collect();
    flags.sort_unstable();
    let digest = Sha256::digest(flags.join(" "));
    let features: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    format!("{} {}, features {features}", value("vendor_id"), value("model name"))
}

/// Files beside a machine's disks, taken away when this is dropped.
#[derive(Default)]
struct Proofs(Vec<PathBuf>);

impl Drop for Proofs {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

impl Proofs {
    /// Describes a disk that both hosts see, or says why they cannot.
    fn disk(&mut self, disk: &Disk) -> Result<Option<SharedDisk>, String> {
        let stays = |why: &str| Err(format!("its disk {} stays here: {why}", disk.name));
        let path = match &disk.source {
            DiskSource::Remote(_) => return Ok(None),
            DiskSource::Path(path) => path,
            DiskSource::Own(_)
            | DiskSource::Above(_)
            | DiskSource::Image { .. }
            | DiskSource::Blank { .. }
            | DiskSource::Flist => {
                return stays(
                    "it is the machine's own; disks that move are files that both hosts see, or \
                     come from a server (nbd://)",
                );
            }
        };
        let at = |e: io::Error| format!("{}: {e}", path.display());
        let about = fs::metadata(path).map_err(at)?;
        if !about.is_file() {
            return stays("nobody can tell whether a block device is the same on both hosts");
        }
        let bytes = about.len();
        let read_only = disk.read_only || disk.media == Media::Cdrom;
        let proof = (!read_only).then(|| self.leave(path)).transpose().map_err(at)?;
        Ok(Some(SharedDisk { path: path.clone(), bytes, proof }))
    }

    fn leave(&mut self, disk: &Path) -> io::Result<(String, String)> {
        let (name, word) = (uuid::Uuid::new_v4(), uuid::Uuid::new_v4().to_string());
        let name = format!(".lodge-{name}");
        let path = disk.with_file_name(&name);
        let mut options = fs::File::options();
        let mut file = options.create_new(true).write(true).mode(0o600).open(&path)?;
        self.0.push(path);
        file.write_all(word.as_bytes())?;
        file.sync_all()?;
        Ok((name, word))
    }
}

/// That a disk is here what it was there.
fn same_disk(disk: &SharedDisk) -> Result<(), String> {
    let SharedDisk { path, bytes, proof } = disk;
    let here = path.display();
    let about = fs::metadata(path).map_err(|e| format!("{here}: {e}"))?;
    if about.len() != *bytes {
        return Err(format!("{here} has {} bytes here and {bytes} there", about.len()));
    }
    let Some((name, word)) = proof else { return Ok(()) };
    let plain = Path::new(name).file_name().is_some_and(|only| only == name.as_str());
    let said = plain.then(|| fs::read_to_string(path.with_file_name(name)).ok()).flatten();
    match said.as_ref() == Some(word) {
        true => Ok(()),
        false => Err(format!(
            "{here} is another file on this host: its folder is not shared between the two"
        )),
    }
}

impl Linux {
    /// Moves a machine to another host.
    pub(super) async fn migrate_to(
        &self,
        machine: &Machine,
        leaving: Leaving,
    ) -> Result<(), String> {
        let Leaving { to, mut migration } = leaving;
        let to: Destination = to.parse()?;
        let live = self.live(machine.id)?;
        let Drive::Qemu(control) = &live.drive else {
            return Err(format!("{} does not move machines; QEMU does", live.launch.backend));
        };
        if matches!(machine.boot, Boot::Flist { .. }) {
            return Err("its root is an flist, which this host serves while it runs".into());
        }
        if !machine.shares.is_empty() {
            return Err("it has folders of this host".into());
        }
        let said = control.question(Question::Version).await.map_err(|e| e.to_string())?;
        let number = |part: &str| said["qemu"][part].as_u64().unwrap_or_default();
        let version = format!("{}.{}.{}", number("major"), number("minor"), number("micro"));
        let mut shape = program(&version, live.launch.accel);
        shape.extend(live.launch.shape.iter().cloned());
        let mut proofs = Proofs::default();
        let disks = machine.disks.iter().filter_map(|disk| proofs.disk(disk).transpose());
        migration.passport = Passport { shape, disks: disks.collect::<Result<_, _>>()? };
        let mut peer = Peer::dial(&to)?;
        peer.greet(&migration).await?;
        drop(proofs);
        match travel(control, &mut peer).await {
            Travel::Arrived => Ok(()),
            Travel::Failed(why) => {
                go_on_here(&live).await?;
                Err(why)
            }
            Travel::Lost(why) => Err(format!(
                "{why}. All of it had been sent, so the guest may run there by now: here it stands \
                 still. Look there; if it does not run, `lodge resume` lets it go on here, if it \
                 does, `lodge rm --force` takes it away here"
            )),
        }
    }

    /// Readies the way in for a machine of another host.
    pub(super) async fn let_in(
        &self,
        machine: &Machine,
        passport: &Passport,
    ) -> Result<PathBuf, String> {
        let home = self.paths.machine(machine.id);
        let choice = self.plan_in(machine, &home, true).await.map_err(|p| p.to_string())?;
        let launch = choice.chosen().map_err(|list| Self::unsupported(&list).to_string())?;
        let qemu = self.facts().await.qemu.as_ref().map_err(Clone::clone)?;
        let mut here = program(&qemu.version_text(), launch.accel);
        here.extend(launch.shape.iter().cloned());
        if let Some((there, here)) = difference(&passport.shape, &here) {
            return Err(format!("it would be another machine here: {there} there, {here} here"));
        }
        passport.disks.iter().try_for_each(same_disk)?;
        let folder = memory_folder(&home);
        let path = folder.join(QEMU_MEMORY);
        let at = |e: io::Error| format!("{}: {e}", path.display());
        paths::make_dir(&folder).map_err(at)?;
        layer::make_pipe(&path, rustix::process::geteuid().as_raw()).map_err(at)?;
        suspend::note_shape(&home, launch.shape).map_err(at)?;
        Ok(path)
    }
}

enum Travel {
    Arrived,
    /// It did not, and cannot any more.
    Failed(String),
    /// Nobody here can know.
    Lost(String),
}

async fn travel(control: &Control, peer: &mut Peer) -> Travel {
    let last = match send(control, peer).await {
        Ok(last) => last,
        Err(why) => {
            control.stop_sending().await;
            return Travel::Failed(why);
        }
    };
    // From the first byte of this on the other host may have all that it needs.
    let sent = async {
        peer.send(&last).await?;
        peer.send(&[]).await
    };
    if sent.await.is_err() {
        return Travel::Lost(peer.why_gone().await);
    }
    match tokio::time::timeout(ARRIVAL, peer.next()).await {
        Ok(Some(Reply::Summary { .. })) => Travel::Arrived,
        Ok(Some(Reply::Refused { refusal })) => Travel::Failed(format!("over there: {refusal}")),
        Ok(Some(other)) => Travel::Lost(format!("not an answer: {other:?}")),
        Ok(None) => Travel::Lost(peer.why_gone().await),
        Err(_) => Travel::Lost(format!("no word came in {} s", ARRIVAL.as_secs())),
    }
}

/// Sends all but the last piece, which is returned when the hypervisor has no more to say.
async fn send(control: &Control, peer: &mut Peer) -> Result<Vec<u8>, String> {
    let text = |e: io::Error| e.to_string();
    let (mut ours, theirs) = UnixStream::pair().map_err(text)?;
    let theirs = theirs.into_std().map_err(text)?;
    let pump = async {
        let (mut kept, mut next) = (Vec::new(), vec![0; LONGEST]);
        loop {
            next.resize(LONGEST, 0);
            let bytes = ours.read(&mut next).await.map_err(text)?;
            if bytes == 0 {
                return Ok(kept);
            }
            next.truncate(bytes);
            if !kept.is_empty() && peer.send(&kept).await.is_err() {
                return Err(peer.why_gone().await);
            }
            std::mem::swap(&mut kept, &mut next);
        }
    };
    let sending = async {
        let done = control.send(theirs.as_fd()).await;
        // The hypervisor has its own; this one would keep the other end from ending.
        drop(theirs);
        done
    };
    tokio::try_join!(pump, sending).map(|(last, ())| last)
}

/// Lets a guest go on that was to leave.
async fn go_on_here(live: &Live) -> Result<(), String> {
    match live.drive.stands().await {
        Stands::Still => live.command(Command::Resume).await,
        Stands::Running | Stands::Broken(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_differ_in_what_guests_see() {
        let text = |flags: &str, mhz: &str| {
            format!(
                "processor\t: 0\nvendor_id\t: X\nmodel name\t: Y 9\ncpu MHz\t: {mhz}\nflags\t: \
                 {flags}\n\nprocessor\t: 1\nvendor_id\t: Z\n"
            )
        };
        let one = processor(&text("fpu sse avx", "1000"));
        assert!(one.starts_with("X Y 9, features "), "{one}");
        assert_eq!(one, processor(&text("avx fpu sse", "2000")));
        assert_ne!(one, processor(&text("fpu sse", "1000")));
    }

    #[test]
    fn a_shared_folder_is_proven_by_what_lies_in_it() {
        let (there, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for folder in [&there, &here] {
            fs::write(folder.path().join("disk"), [0; 100]).unwrap();
        }
        let mut proofs = Proofs::default();
        let (disk, far) = (there.path().join("disk"), here.path().join("disk"));
        let proof = Some(proofs.leave(&disk).unwrap());
        let mut shared = SharedDisk { path: disk, bytes: 100, proof };
        assert_eq!(same_disk(&shared), Ok(()));
        shared.bytes = 99;
        assert!(same_disk(&shared).unwrap_err().contains("100 bytes here and 99 there"));
        (shared.bytes, shared.path) = (100, far);
        assert!(same_disk(&shared).unwrap_err().contains("not shared"));
        // A name that leads elsewhere is not followed.
        shared.proof = Some(("../disk".into(), String::new()));
        assert!(same_disk(&shared).unwrap_err().contains("not shared"));
        shared.proof = None;
        assert_eq!(same_disk(&shared), Ok(()));
        drop(proofs);
        assert_eq!(fs::read_dir(there.path()).unwrap().count(), 1);
    }
}
