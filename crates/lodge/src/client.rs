//! Reaching the daemon, and starting it where none runs.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lodge_doors::native::wire::Client;
use lodge_host::paths::Paths;
use lodge_host::proc::Tool;
use lodge_spec::request::Request;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};

/// A daemon that has to take up its machines first has this long.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to the daemon of these paths.
pub(crate) async fn connect(paths: &Paths) -> Result<Client> {
    let socket = paths.socket();
    if let Ok(client) = greet(&socket).await {
        return Ok(client);
    }
    start().await?;
    greet(&socket).await.with_context(|| socket.display().to_string())
}

/// A daemon that was killed a moment ago may still have a socket; only an answer counts.
async fn greet(socket: &Path) -> Result<Client> {
    let mut client = Client::connect(socket).await?;
    client.ask(&Request::Ping).await??;
    Ok(client)
}

/// Starts a daemon that stays when this command ends.
async fn start() -> Result<()> {
    let own = std::env::current_exe()?;
    let mut tool = Tool::new(own).args(["serve", "--unattended"]);
    for name in [
        "LODGE_HOME",
        "HOME",
        "XDG_STATE_HOME",
        "XDG_RUNTIME_DIR",
        "LODGE_QEMU",
        "LODGE_FIRECRACKER",
        "LODGE_CLOUD_HYPERVISOR",
        "http_proxy",
        "https_proxy",
    ] {
        if let Some(value) = std::env::var_os(name) {
            tool = tool.env(name, value);
        }
    }
    let mut command = tool.command();
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut daemon = command.spawn().context("starting the daemon")?;
    let mut stdout = BufReader::new(daemon.stdout.take().context("piped")?);
    let mut stderr = daemon.stderr.take().context("piped")?;
    let mut line = String::new();
    tokio::time::timeout(PATIENCE, stdout.read_line(&mut line))
        .await
        .context("the daemon does not come up")??;
    if line.trim() == "ready" {
        return Ok(());
    }
    let mut said = String::new();
    stderr.read_to_string(&mut said).await?;
    let said = said.trim().trim_start_matches("lodge: ");
    // Another command may have started one in the same moment; that one serves us too.
    if said.contains("in use by another lodge daemon") {
        tokio::time::sleep(Duration::from_millis(200)).await;
        return Ok(());
    }
    bail!("the daemon did not start: {said}")
}
