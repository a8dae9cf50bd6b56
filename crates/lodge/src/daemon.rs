//! The daemon: opens the store, takes machines up, serves the native socket. Crash-only: nothing
//! happens at its end that a `kill -9` would miss.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use lodge_doors::native::wire;
use lodge_host::linux::Linux;
use lodge_host::paths::{self, Paths};
use lodge_machine::{Keeper, Store};
use tokio::net::UnixListener;

use crate::answer::Answer;

/// Serves until it is killed. Says `ready` on standard output when it can be asked.
pub(crate) fn serve() -> Result<()> {
    // Whoever started us may have left descriptors open that we would hold for ever.
    lodge_host::proc::close_inherited();
    lodge_host::proc::stay_small();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_stack_size(512 << 10)
        .max_blocking_threads(8)
        .enable_all()
        .build()?;
    runtime.block_on(run())
}

async fn run() -> Result<()> {
    let paths = Paths::find();
    paths.make().with_context(|| format!("making {}", paths.state.display()))?;
    let store = Store::open(&paths.state)?;
    let fresh = fresh_boot(&paths.state.join("boot-id"));
    let host = Arc::new(Linux::new(paths.clone(), store.clone()));
    let keeper = Keeper::open(store, host.clone(), fresh).await?;
    let socket = paths.socket();
    // Ours to replace: the lock on the store says that no other daemon is there.
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).with_context(|| socket.display().to_string())?;
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))?;
    use std::io::Write;
    let mut stdout = std::io::stdout();
    // Nobody may be reading.
    let _ = writeln!(stdout, "ready").and_then(|()| stdout.flush());
    tokio::spawn(async move { host.facts().await.tsc_khz });
    wire::serve(listener, Arc::new(Answer::new(keeper))).await?;
    Ok(())
}

/// True once after each boot of the host.
fn fresh_boot(marker: &Path) -> bool {
    let boot = paths::boot_id();
    let seen = std::fs::read_to_string(marker).is_ok_and(|id| id == boot);
    if !seen {
        // At worst machines that should start with the host are asked to start once more.
        let _ = std::fs::write(marker, boot);
    }
    !seen
}
