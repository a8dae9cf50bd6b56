//! A running hypervisor whichever it is: reaching it, driving it, changing it. The one place
//! beside the choice that knows them all.

use lodge_machine::Seen;
use lodge_machine::host::Command;
use lodge_spec::machine::BackendKind;
use lodge_spec::state::Device;
use serde_json::Value;
use tokio::sync::mpsc;

use crate::backend::api::{Api, ApiError};
use crate::backend::qemu::control::Stands;
use crate::backend::qemu::qmp::{Qmp, QmpError, QmpEvent};
use crate::backend::{Launch, QEMU_MEMORY};
use crate::backend::{cloud_hypervisor, firecracker, qemu};

#[derive(Clone)]
pub(super) enum Drive {
    Qemu(qemu::control::Control),
    Firecracker(firecracker::control::Control),
    CloudHypervisor(cloud_hypervisor::control::Control),
}

/// What it tells unasked; those that tell nothing have none.
pub(super) type Told = Option<mpsc::UnboundedReceiver<QmpEvent>>;

/// Why a hypervisor could not be reached.
pub(super) struct Unreached {
    pub(super) why: String,
    /// It listens, and does not take what it was told.
    pub(super) refused: bool,
}

impl From<ApiError> for Unreached {
    fn from(error: ApiError) -> Self {
        let refused = matches!(error, ApiError::Refused { .. });
        Self { why: error.to_string(), refused }
    }
}

impl From<QmpError> for Unreached {
    fn from(error: QmpError) -> Self {
        Self { why: error.to_string(), refused: false }
    }
}

/// Connects to a hypervisor. `begin`: also makes the launch's calls, with which it begins.
pub(super) async fn reach(launch: &Launch, begin: bool) -> Result<(Drive, Told), Unreached> {
    let socket = control_socket(launch);
    match launch.backend {
        BackendKind::Qemu => {
            let (qmp, mut events) = Qmp::connect(&socket).await?;
            let control = qemu::control::Control::new(qmp);
            if begin {
                let refused = |e: QmpError| Unreached { why: e.to_string(), refused: true };
                control.begin(&launch.calls).await.map_err(refused)?;
            }
            if let (true, Some(folder)) = (begin, &launch.memory) {
                let path = folder.join(QEMU_MEMORY);
                let refused = |why: String| Unreached { why, refused: true };
                let file = open_memory(&path);
                let file = file.map_err(|e| refused(format!("{}: {e}", path.display())))?;
                control.load(&file, &mut events).await.map_err(|error| match error {
                    // Its last words say more.
                    QmpError::Gone => error.into(),
                    error => refused(error.to_string()),
                })?;
            }
            Ok((Drive::Qemu(control), Some(events)))
        }
        BackendKind::Firecracker => {
            let folder = launch.warden.run.join("api");
            call(&Api::new(&socket), launch, begin).await?;
            Ok((Drive::Firecracker(firecracker::control::Control::new(&folder)), None))
        }
        BackendKind::CloudHypervisor => {
            call(&Api::new(&socket), launch, begin).await?;
            Ok((Drive::CloudHypervisor(cloud_hypervisor::control::Control::new(&socket)), None))
        }
    }
}

/// A file, or a pipe from another host. Nobody waits for one who has already gone.
fn open_memory(path: &std::path::Path) -> std::io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = std::fs::File::options().read(true).custom_flags(nonblock).open(path)?;
    rustix::fs::fcntl_setfl(&file, rustix::fs::OFlags::empty())?;
    Ok(file)
}

async fn call(api: &Api, launch: &Launch, begin: bool) -> Result<(), ApiError> {
    api.await_socket().await?;
    let calls = if begin { launch.calls.as_slice() } else { &[] };
    for call in calls {
        let part = |name: &str| call[name].as_str().unwrap_or_default();
        let body = call.get("body").unwrap_or(&Value::Null);
        api.call(part("method"), part("path"), body).await?;
    }
    Ok(())
}

/// Where the hypervisor listens.
pub(super) fn control_socket(launch: &Launch) -> std::path::PathBuf {
    let run = &launch.warden.run;
    match launch.backend {
        BackendKind::Qemu => run.join("qmp.sock"),
        BackendKind::Firecracker => firecracker::control::socket(&run.join("api")),
        BackendKind::CloudHypervisor => run.join("api.sock"),
    }
}

impl Drive {
    /// What is done, and what follows from it where nothing else will tell.
    pub(super) async fn command(&self, command: Command) -> Result<Option<Seen>, String> {
        match self {
            Drive::Qemu(control) => {
                control.command(command).await.map(|()| None).map_err(|e| e.to_string())
            }
            Drive::Firecracker(control) => control.command(command).await,
            Drive::CloudHypervisor(control) => control.command(command).await,
        }
    }

    /// How the guest stands; who cannot say is taken to run it.
    pub(super) async fn stands(&self) -> Stands {
        let paused = match self {
            Drive::Qemu(control) => return control.stands().await.unwrap_or(Stands::Running),
            Drive::Firecracker(control) => control.is_paused().await.unwrap_or(false),
            Drive::CloudHypervisor(control) => control.is_paused().await.unwrap_or(false),
        };
        if paused { Stands::Still } else { Stands::Running }
    }

    /// What the disks have carried; nothing where the hypervisor does not answer.
    pub(super) async fn disk_traffic(&self) -> Vec<Device> {
        let all = |traffic| vec![Device { name: String::new(), traffic }];
        match self {
            Drive::Qemu(control) => control.disk_traffic().await.unwrap_or_default(),
            Drive::Firecracker(control) => {
                control.disk_traffic().await.map(all).unwrap_or_default()
            }
            Drive::CloudHypervisor(control) => {
                control.disk_traffic().await.map(all).unwrap_or_default()
            }
        }
    }

    /// The threads of the virtual CPUs among those of the hypervisor.
    pub(super) async fn cpu_threads(&self) -> CpuThreads {
        match self {
            Drive::Qemu(control) => {
                CpuThreads::Numbered(control.cpu_threads().await.unwrap_or_default())
            }
            Drive::Firecracker(_) => CpuThreads::Named("fc_vcpu "),
            Drive::CloudHypervisor(_) => CpuThreads::Named("vcpu"),
        }
    }
}

/// How a hypervisor's threads that are virtual CPUs are told from others.
pub(super) enum CpuThreads {
    /// As in the hypervisor's own namespace.
    Numbered(Vec<u32>),
    /// The CPU's number follows.
    Named(&'static str),
}
