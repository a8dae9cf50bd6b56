//! Carrying out a launch: makes the files that the plan lists, brings networks up, starts the
//! warden. What a launch makes lies in the machine's folders, where `release` finds it.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use lodge_machine::host::Sink;
use lodge_spec::machine::Machine;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use super::live::mark;
use crate::backend::{Launch, Step};
use crate::image::{kernel, layer};
use crate::net::uplink;
use crate::paths::{self, Paths};
use crate::proc::Tool;
use crate::warden::message::Started;

/// Where a launch is written down, for the daemon that comes after this one.
pub(super) fn launch_file(run: &Path) -> PathBuf {
    run.join("launch.json")
}

/// Unpacks the kernels that the steps name. True: there was one.
pub(super) async fn unpack_kernels(steps: &[Step], paths: &Paths) -> bool {
    let mut any = false;
    for step in steps {
        if let Step::UnpackedKernel { from, .. } = step {
            let (from, cache) = (from.clone(), paths.cache());
            // A kernel that cannot be unpacked boots as it is, on a board with firmware.
            let _ = tokio::task::spawn_blocking(move || kernel::unpack(&from, &cache)).await;
            any = true;
        }
    }
    any
}

pub(super) async fn carry_out(
    machine: &Machine,
    launch: &Launch,
    paths: &Paths,
    sink: &Sink,
    networks: &tokio::sync::Mutex<()>,
) -> Result<(), String> {
    make(machine, &launch.steps).await?;
    let run = &launch.warden.run;
    let text = serde_json::to_vec(&(paths::boot_id(), launch)).map_err(|e| e.to_string())?;
    write_launch(&launch_file(run), &text).map_err(|e| format!("{}: {e}", run.display()))?;
    for nic in &machine.nics {
        let _one = networks.lock().await;
        uplink::ensure(&paths.network(nic.network.as_str()), &nic.network).await?;
    }
    mark(sink, "prepared", "");
    let pid = start_warden(launch).await?;
    mark(sink, "entered", &format!("process {pid} in its jail"));
    Ok(())
}

/// Not for others to read: it may hold the password of a store.
fn write_launch(path: &Path, text: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(path)?.write_all(text)
}

/// Makes files. Those that are there are kept, so a step may be repeated.
pub(super) async fn make(machine: &Machine, steps: &[Step]) -> Result<(), String> {
    let (machine, steps) = (machine.clone(), steps.to_vec());
    let work = move || steps.iter().try_for_each(|step| make_one(&machine, step));
    tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string())?
}

fn make_one(machine: &Machine, step: &Step) -> Result<(), String> {
    let at = |path: &Path| {
        let path = path.display().to_string();
        move |e: std::io::Error| format!("{path}: {e}")
    };
    match step {
        Step::Folder { path } => paths::make_dir(path).map_err(at(path)),
        Step::OwnFolder { path, owner } => {
            use std::os::unix::fs::PermissionsExt;
            let private = std::fs::Permissions::from_mode(0o700);
            paths::make_dir(path)
                .and_then(|()| std::fs::set_permissions(path, private))
                .and_then(|()| layer::give_folder(path, *owner))
                .map_err(at(path))
        }
        Step::Pipe { path, owner } => layer::make_pipe(path, *owner).map_err(at(path)),
        Step::Raw { path, bytes, from, owner } => {
            layer::make_raw(path, *bytes, from.as_deref(), *owner).map_err(at(path))
        }
        Step::Layer { path, bytes, above, owner } => {
            let above = above.as_ref().map(|(path, format)| (path.as_path(), *format));
            layer::make(path, *bytes, above, *owner).map_err(at(path))
        }
        Step::Copy { from, path, owner } => layer::copy(from, path, *owner).map_err(at(path)),
        // Done before the plan, which depends on it.
        Step::UnpackedKernel { .. } => Ok(()),
        Step::Initrd { from, path, .. } => {
            let files = layer::guest_files(machine, false)?;
            layer::write_initrd(from, path, &files).map_err(at(path))
        }
        Step::FilesDisk { path, .. } => {
            let files = layer::guest_files(machine, true)?;
            layer::write_files_disk(path, &files).map_err(at(path))
        }
        Step::Cidata { path } => write_cidata(machine, path).map_err(at(path)),
        Step::Bootstrap { path } => {
            let script = machine.bootstrap.as_ref().and_then(|b| b.script.as_ref());
            let script = script.map(layer::content).transpose()?.unwrap_or_default();
            paths::write_private(path, &script).map_err(at(path))
        }
        Step::Mdata { path } => write_mdata(machine, path).map_err(at(path)),
        Step::VncPassword { path, owner } => {
            let password = machine.vnc_password().unwrap_or("");
            paths::write_private(path, password.as_bytes())
                .and_then(|()| layer::give(path, *owner))
                .map_err(at(path))
        }
    }
}

fn write_cidata(machine: &Machine, path: &Path) -> std::io::Result<()> {
    let files: Vec<(&str, &[u8])> =
        machine.cidata.iter().map(|(name, text)| (name.as_str(), text.as_bytes())).collect();
    let mut image = Vec::new();
    lodge_formats::fat::write(&mut image, "CIDATA", &files)?;
    paths::write_private(path, &image)
}

/// What the warden tells the guest; written as a whole, so that it can be read at any moment.
pub(super) fn write_mdata(machine: &Machine, path: &Path) -> std::io::Result<()> {
    let Some(mdata) = &machine.mdata else { return Ok(()) };
    let text = serde_json::to_vec(&mdata.to_draft())?;
    paths::write_private(path, &text)
}

async fn start_warden(launch: &Launch) -> Result<u32, String> {
    let text = |e: std::io::Error| format!("the machine's warden: {e}");
    let own = paths::own_program().map_err(text)?;
    let mut command = Tool::new(own).arg("warden").command();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(text)?;
    let plan = serde_json::to_vec(&launch.warden).map_err(|e| e.to_string())?;
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(&plan).await.map_err(text)?;
    drop(stdin);
    let mut line = String::new();
    let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
    stdout.read_line(&mut line).await.map_err(text)?;
    // Reaps it whenever it ends; its end is not ours to wait for.
    tokio::spawn(async move { child.wait().await });
    match serde_json::from_str(&line) {
        Ok(Started::Ok { pid }) => Ok(pid),
        Ok(Started::Error { error }) => Err(error),
        Err(_) => Err("the machine's warden ended without a word".into()),
    }
}
