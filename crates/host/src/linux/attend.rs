//! What is done for a machine beside its life: its folder, questions to its hypervisor, its
//! screen, and what it takes over of a new description while it runs.

use std::fs;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;

use lodge_jail::cgroup;
use lodge_spec::machine::{Disk, DiskSource, Machine};
use lodge_spec::names::MachineId;
use lodge_spec::problem::Problems;
use lodge_spec::request::Question;
use lodge_spec::state::Ends;
use serde_json::{Map, Value, json};

use super::Linux;
use super::drive::Drive;
use super::launch::write_mdata;
use super::live::Live;
use crate::backend::qemu::control::Control;
use crate::backend::{Cgroup, Screen};
use crate::facts::Facts;
use crate::net::client;
use crate::paths::{self, Paths};
use crate::warden::message::Ask;

/// Brings what a machine has between its runs in line with its description.
pub(super) fn settle(paths: &Paths, machine: &Machine) -> Result<(), String> {
    let text = |path: &Path| {
        let path = path.display().to_string();
        move |e: std::io::Error| format!("{path}: {e}")
    };
    let home = paths.machine(machine.id);
    if machine.own_folder {
        let (zone, root) = (paths.zone(machine.id), paths.own_folder(machine.id));
        let tmp = root.join("tmp");
        for (path, mode) in [
            (&home, 0o711),
            (&zone, 0o755),
            (&zone.join("config"), 0o755),
            (&root, 0o755),
            (&tmp, 0o1777),
        ] {
            paths::make_dir(path).map_err(text(path))?;
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(text(path))?;
        }
        link_zone(paths, machine.id, &zone);
    }
    for entry in fs::read_dir(&home).into_iter().flatten().flatten() {
        let path = entry.path();
        let disk = path.extension().is_some_and(|e| e == "qcow2" || e == "raw");
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let own = machine.disks.iter().find(|d| d.name.as_str() == stem).map(|d| &d.source);
        match own {
            None if disk => fs::remove_file(&path).map_err(text(&path))?,
            Some(DiskSource::Blank { size } | DiskSource::Image { size: Some(size), .. })
                if disk =>
            {
                grow(&path, size.0)?;
            }
            Some(_) | None => {}
        }
    }
    Ok(())
}

/// Problems but for media that can still be brought into the machine's own folder.
pub(super) fn without_media(machine: &Machine, problems: Problems) -> Problems {
    let own = |(i, disk): (usize, &Disk)| {
        matches!(disk.source, DiskSource::Own(_)).then(|| format!("disks[{i}].source"))
    };
    let media: Vec<String> = machine.disks.iter().enumerate().filter_map(own).collect();
    Problems(problems.0.into_iter().filter(|p| !media.contains(&p.path)).collect())
}

/// The folder where people look for it; where that may not be made, `inspect` tells the real one.
fn link_zone(paths: &Paths, id: MachineId, zone: &Path) {
    let zones = paths.zones();
    let link = zones.join(id.to_string());
    if fs::symlink_metadata(&link).is_ok() {
        return;
    }
    let made = fs::create_dir_all(&zones)
        .and_then(|()| fs::set_permissions(&zones, fs::Permissions::from_mode(0o755)));
    if made.is_ok() {
        let _ = symlink(zone, link);
    }
}

/// A disk that was made larger in the description is made larger where it lies.
fn grow(path: &Path, bytes: u64) -> Result<(), String> {
    let open = || fs::File::options().read(true).write(true).open(path);
    let text = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    let file = open().map_err(|e| text(&e))?;
    match path.extension().is_some_and(|e| e == "qcow2") {
        true => lodge_formats::qcow2::grow(file, bytes).map_err(|e| text(&e)),
        false if file.metadata().is_ok_and(|meta| meta.len() < bytes) => {
            file.set_len(bytes).map_err(|e| text(&e))
        }
        false => Ok(()),
    }
}

impl Linux {
    fn qemu(&self, id: MachineId, what: &str) -> Result<(Live, Control), String> {
        let live = self.live(id)?;
        match live.drive.clone() {
            Drive::Qemu(control) => Ok((live, control)),
            Drive::Firecracker(_) | Drive::CloudHypervisor(_) => {
                Err(format!("{} has no {what}", live.launch.backend))
            }
        }
    }

    /// What the hypervisor says of itself, a member for each question.
    pub async fn monitor(&self, id: MachineId, questions: &[Question]) -> Result<Value, String> {
        let mut said = Map::new();
        for question in questions {
            let value = match question {
                Question::Vnc => {
                    let place =
                        |at: std::net::SocketAddr| json!({"host": at.ip(), "port": at.port()});
                    self.live(id)?.status().await?.screen.map_or(Value::Null, place)
                }
                Question::Block
                | Question::BlockStats
                | Question::Chardev
                | Question::Cpus
                | Question::Kvm
                | Question::Pci
                | Question::Status
                | Question::Version => {
                    let (_, control) = self.qemu(id, "monitor that could be asked")?;
                    control.question(*question).await.map_err(|e| e.to_string())?
                }
            };
            said.insert(question.to_string(), value);
        }
        Ok(Value::Object(said))
    }

    /// Where a machine meets its host; nowhere where it does not run.
    pub async fn ends(&self, id: MachineId) -> Ends {
        let Ok(live) = self.live(id) else { return Ends::default() };
        // One that is just ending has none either.
        let status = live.status().await.unwrap_or_default();
        let interfaces = status.taps.into_iter().map(|tap| tap.interface).collect();
        Ends { interfaces, screen: status.screen }
    }

    pub async fn nmi(&self, id: MachineId) -> Result<(), String> {
        let (_, control) = self.qemu(id, "such interrupt")?;
        control.nmi().await.map_err(|e| e.to_string())
    }

    /// Puts what is on the screen into the machine's own folder; returns the file.
    pub async fn screenshot(&self, id: MachineId) -> Result<String, String> {
        let (_, control) = self.qemu(id, "screen")?;
        let folder = self.paths.own_folder(id).join("tmp");
        let folder = if folder.is_dir() { folder } else { self.paths.machine(id) };
        let path = folder.join("vm.ppm");
        // A new file each time, so that nothing that lies there is followed or half overwritten.
        let _ = fs::remove_file(&path);
        let file = fs::File::options().create_new(true).write(true).mode(0o644).open(&path);
        let file = file.map_err(|e| format!("{}: {e}", path.display()))?;
        control.screenshot(file.into()).await.map_err(|e| e.to_string())?;
        Ok(path.display().to_string())
    }

    /// Sends the hypervisor a signal, as its parent does.
    pub async fn signal(&self, id: MachineId, signal: i32) -> Result<(), String> {
        self.live(id)?.ask(Ask::Signal { signal }).await
    }
}

impl Live {
    /// Takes over what can be taken over while the guest runs: metadata, where and to whom the
    /// screen is shown, what interfaces may send.
    pub(super) async fn refresh(&self, machine: &Machine, facts: &Facts) -> Result<(), String> {
        let plan = &self.launch.warden;
        let mut group = Cgroup::of(machine, facts);
        let mut limits = self.limits.lock().await;
        // The guest keeps the memory that it was started with, so what it needs is not taken away.
        group.limits.memory_bytes =
            limits.memory_bytes.zip(group.limits.memory_bytes).map(|(now, then)| now.max(then));
        if *limits != group.limits {
            cgroup::change(&group.hierarchy, &group.name, &group.limits)
                .map_err(|e| format!("limits: {e}"))?;
            *limits = group.limits;
        }
        drop(limits);
        if let Some(end) = plan.mdata.as_ref().filter(|_| machine.mdata.is_some()) {
            write_mdata(machine, &end.file).map_err(|e| format!("metadata: {e}"))?;
            self.ask(Ask::Mdata).await?;
        }
        let screen = Screen::of(machine, &plan.run);
        if let (Some(new), Some(_)) = (&screen, &plan.screen) {
            let mut shown = self.shown.lock().await;
            if *shown != new.at {
                self.ask(Ask::Screen { at: new.at }).await?;
                *shown = new.at;
            }
            if let (Some(password), Drive::Qemu(control)) = (machine.vnc_password(), &self.drive) {
                // Refused where the machine was started without one; its next start has it.
                let _ = control.set_vnc_password(password).await;
            }
        }
        for tap in &plan.taps {
            let nic = machine.nics.iter().find(|nic| nic.mac == tap.mac);
            let Some(guard) = nic.and_then(|nic| nic.guard.as_ref()) else { continue };
            let new = crate::backend::Tap { guard: Some(guard.to_draft()), ..tap.clone() };
            let mut guarded = self.guarded.lock().await;
            if guarded.get(&tap.mac).or(tap.guard.as_ref()) != new.guard.as_ref() {
                client::guard(new.clone()).await?;
                guarded.extend(new.guard.map(|guard| (tap.mac, guard)));
            }
        }
        Ok(())
    }
}
