//! Changes to a running machine, whichever hypervisor it has: CPUs, memory, disks and interfaces
//! that come and go while the guest runs.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use lodge_spec::machine::{BackendKind, Disk, Machine};
use lodge_spec::request::Change;
use tokio::sync::Mutex;

use super::drive::Drive;
use super::live::Live;
use crate::backend::cloud_hypervisor::plan as cloud;
use crate::backend::qemu::control::Control;
use crate::backend::{FIRST_FD, Forward, Step, Survey, Tap, Unsupported, cloud_hypervisor, vmm};
use crate::facts::Facts;
use crate::remote;
use crate::warden::message::Ask;

/// The files to make for a machine that runs, so that a disk can be plugged in.
pub(super) fn steps(
    machine: &Machine,
    survey: &Survey,
    backend: BackendKind,
) -> Result<Vec<Step>, String> {
    match backend {
        BackendKind::Qemu => Ok(survey.steps.clone()),
        BackendKind::Firecracker | BackendKind::CloudHypervisor => {
            raw_disks(machine, survey, backend).map(|(steps, _)| steps)
        }
    }
}

fn raw_disks(
    machine: &Machine,
    survey: &Survey,
    backend: BackendKind,
) -> Result<(Vec<Step>, Vec<PathBuf>), String> {
    let text = |list: Vec<Unsupported>| {
        list.iter().map(Unsupported::to_string).collect::<Vec<_>>().join("\n")
    };
    vmm::raw_disks(machine, survey, backend).map_err(text)
}

impl Live {
    /// Applies a change to the running hypervisor; `machine` and `survey` are after the change.
    pub(super) async fn change(
        &self,
        machine: &Machine,
        survey: &Survey,
        change: Change,
        facts: &Facts,
        networks: &Mutex<()>,
    ) -> Result<(), String> {
        let nic_goes = matches!(change, Change::RemoveNic { .. });
        match (&change, &self.drive) {
            (Change::AddPort { .. } | Change::RemovePort { .. }, _) => {
                self.set_ports(Forward::all(machine)).await
            }
            (Change::Document { .. }, _) => Ok(()),
            (_, Drive::Qemu(control)) => {
                self.change_qemu(control, machine, survey, change, facts, networks).await
            }
            (_, Drive::CloudHypervisor(control)) => {
                self.change_cloud(control, machine, survey, change, networks).await
            }
            (Change::Memory { bytes }, Drive::Firecracker(control)) => {
                control.set_memory(*bytes, machine.memory.max.0).await
            }
            (_, Drive::Firecracker(_)) => Err("firecracker takes nothing in or out while it runs \
                                               here; stop the machine first"
                .into()),
        }?;
        if nic_goes { self.keep_taps(&survey.nics).await } else { Ok(()) }
    }

    async fn change_qemu(
        &self,
        control: &Control,
        machine: &Machine,
        survey: &Survey,
        change: Change,
        facts: &Facts,
        networks: &Mutex<()>,
    ) -> Result<(), String> {
        let board = self.launch.board.ok_or("the board is unknown")?;
        match change {
            Change::Cpus { count } => {
                let qemu = facts.qemu.as_ref().map_err(Clone::clone)?;
                control.set_cpus(count, self.launch.accel, qemu).await
            }
            Change::Memory { .. } => self.grow_memory(control, machine).await,
            Change::AddDisk { .. } => {
                let disk = machine.disks.last().ok_or("no disk")?;
                let files = survey.disks.last().ok_or("no disk")?;
                let open = |depth: usize, writable: bool| {
                    let layer = &files.layers[depth];
                    if let Some(server) = &layer.remote {
                        return tokio::task::block_in_place(|| remote::dial(server, !writable));
                    }
                    let file = fs::File::options().read(true).write(writable).open(&layer.path);
                    file.map(Into::into).map_err(|e| format!("{}: {e}", layer.path.display()))
                };
                control.add_disk(disk, files, board, open).await
            }
            Change::RemoveDisk { name } => control.remove_disk(&name).await,
            Change::DiskLimits { name, .. } => {
                let disk = machine.disks.iter().find(|disk| disk.name.as_str() == name);
                control.limit_disk(disk.ok_or("no disk")?, board).await
            }
            Change::AddNic { .. } => {
                let nic = machine.nics.last().ok_or("no nic")?;
                let add = |fd| control.add_nic(nic, board, fd);
                self.with_new_tap(machine, survey, networks, add).await
            }
            Change::RemoveNic { name } => control.remove_nic(&name).await,
            Change::AddPort { .. } | Change::RemovePort { .. } | Change::Document { .. } => Ok(()),
        }
    }

    async fn change_cloud(
        &self,
        control: &cloud_hypervisor::control::Control,
        machine: &Machine,
        survey: &Survey,
        change: Change,
        networks: &Mutex<()>,
    ) -> Result<(), String> {
        match change {
            Change::Cpus { count } => control.set_cpus(count).await,
            Change::Memory { bytes } => control.set_memory(bytes).await,
            Change::AddDisk { .. } => {
                let disk = machine.disks.last().ok_or("no disk")?;
                let (_, files) = raw_disks(machine, survey, BackendKind::CloudHypervisor)?;
                let file = files.get(machine.disks.len() - 1).ok_or("the disk has no file")?;
                let place = cloud::plugged(&survey.state).join(disk.name.as_str());
                own_or_read(file, disk, survey.uid)?;
                link(file, &place)?;
                let added = control.add_disk(disk).await;
                if added.is_err() {
                    let _ = fs::remove_file(place);
                }
                added
            }
            Change::RemoveDisk { name } => {
                control.remove(&cloud::disk_id(&name)).await?;
                // There is none where it was there from the start.
                let _ = fs::remove_file(cloud::plugged(&survey.state).join(name));
                Ok(())
            }
            Change::AddNic { .. } => {
                let nic = machine.nics.last().ok_or("no nic")?;
                self.with_new_tap(machine, survey, networks, |fd| control.add_nic(nic, fd)).await
            }
            Change::RemoveNic { name } => control.remove(&cloud::nic_id(&name)).await,
            Change::DiskLimits { .. } => {
                Err("cloud-hypervisor takes limits of disks only when it \
                                              is started; stop the machine first"
                    .into())
            }
            Change::AddPort { .. } | Change::RemovePort { .. } | Change::Document { .. } => Ok(()),
        }
    }

    /// Makes the interface of the last nic, and takes it away again where nobody wants it.
    async fn with_new_tap<F: Future<Output = Result<(), String>>>(
        &self,
        machine: &Machine,
        survey: &Survey,
        networks: &Mutex<()>,
        add: impl FnOnce(std::os::fd::OwnedFd) -> F,
    ) -> Result<(), String> {
        let (nic, place) = machine.nics.last().zip(survey.nics.last()).ok_or("no nic")?;
        let _one = networks.lock().await;
        crate::net::uplink::ensure(&place.network, &nic.network).await?;
        let tap = Tap::of(machine, survey, FIRST_FD, machine.nics.len() - 1);
        let interface = tap.interface.clone();
        let added = add(self.new_tap(tap).await?).await;
        if added.is_err() {
            self.ask(Ask::Untap { interface }).await?;
        }
        added
    }

    async fn grow_memory(&self, control: &Control, machine: &Machine) -> Result<(), String> {
        let argv = &self.launch.warden.jail.argv;
        let option = argv.iter().skip_while(|a| *a != "-m").nth(1).cloned().unwrap_or_default();
        let size = option.strip_prefix("size=").and_then(|s| s.split('M').next());
        let at_boot: u64 = size.and_then(|s| s.parse().ok()).ok_or("the memory is unknown")?;
        let modules = control.memory_modules().await?;
        let now = at_boot + (control.plugged_memory().await? >> 20);
        let wanted = machine.memory.size.as_mib();
        match wanted.checked_sub(now) {
            Some(0) => Ok(()),
            Some(more) => control.add_memory(more << 20, modules).await,
            None => Err("memory that runs cannot be taken away; stop the machine first".into()),
        }
    }
}

/// A hypervisor that runs opens what it is shown as its own user.
fn own_or_read(file: &Path, disk: &Disk, user: u32) -> Result<(), String> {
    let owner = fs::metadata(file).map_err(|e| format!("{}: {e}", file.display()))?.uid();
    let runs_as_user = rustix::process::geteuid().is_root();
    match runs_as_user && !disk.read_only && owner != user {
        true => Err(format!(
            "{} is somebody else's, and a hypervisor that runs cannot be let write to it; stop \
             the machine first, or add the disk for reading only",
            file.display()
        )),
        false => Ok(()),
    }
}

/// Makes a file visible in a folder that a jail has; both are on one file system.
fn link(file: &Path, place: &Path) -> Result<(), String> {
    let _ = fs::remove_file(place);
    fs::hard_link(file, place).map_err(|e| match e.kind() {
        std::io::ErrorKind::CrossesDevices => format!(
            "{} is on another file system than the machines, so it cannot be shown to a \
             hypervisor that runs; stop the machine first, or give the disk `layered: true`",
            file.display()
        ),
        _ => format!("{}: {e}", place.display()),
    })
}
