//! Bringing networks up from the daemon's side: finds the keeper of a network, or starts it, and
//! gives a rootless network its way out.

use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use lodge_spec::names::NetName;
use lodge_spec::request::NetworkAsk;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixStream;

use super::client::{self, NetAsk, Notice};
use super::plan::NetPlan;
use crate::fdpass::{self, Lines};
use crate::paths::{self, find_program};
use crate::proc::Tool;

/// Making a namespace with its bridge takes a fraction of this.
const PATIENCE: Duration = Duration::from_secs(20);

/// Makes sure that the network is there.
pub async fn ensure(dir: &Path, name: &NetName) -> Result<(), String> {
    if UnixStream::connect(client::socket(dir)).await.is_ok() {
        return Ok(());
    }
    let text = |e: io::Error| format!("network {name}: {e}");
    paths::make_dir(dir).map_err(text)?;
    let rootless = !rustix::process::geteuid().is_root();
    // Its far end closes with the keeper and so ends the process that carries the packets.
    let (near, far) = std::io::pipe().map_err(text)?;
    let own = paths::own_program().map_err(text)?;
    let tool = Tool::new(own).arg("netd").arg(dir).arg(name.as_str());
    let mut command = tool.command();
    command.stdin(Stdio::from(far)).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(text)?;
    let pid = child.id();
    let mut said = String::new();
    let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
    let read = tokio::time::timeout(PATIENCE, stdout.read_line(&mut said)).await;
    // Reaps it whenever it ends; it is not ours to end.
    tokio::spawn(async move { child.wait().await });
    match (read, said.trim()) {
        (Ok(Ok(_)), "ready") => {}
        (Ok(Ok(_)), "") => return Err(format!("network {name}: its keeper ended at once")),
        (Ok(Ok(_)), why) => return Err(format!("network {name}: {why}")),
        (Ok(Err(error)), _) => return Err(text(error)),
        (Err(_), _) => return Err(format!("network {name}: its keeper says nothing")),
    }
    if let Some(pid) = pid.filter(|_| rootless) {
        carry_packets(&NetPlan::of(name, dir), pid, near)
            .await
            .map_err(|why| format!("network {name}: {why}"))?;
    }
    Ok(())
}

/// Without root, `slirp4netns` carries packets between the namespace and the host's sockets.
async fn carry_packets(plan: &NetPlan, pid: u32, exit: io::PipeReader) -> Result<(), String> {
    let Some(program) = find_program("slirp4netns") else {
        // Machines still reach each other; `lodge doctor` says what is missing.
        return Ok(());
    };
    let [_, b, c, _] = plan.uplink.0.octets();
    let args = ["--configure", "--mtu=1500", "--disable-host-loopback", "--exit-fd=0"];
    let tool = Tool::new(program)
        .args(args)
        .arg(format!("--cidr=172.{}.{c}.0/24", 16 + b % 16))
        .arg(pid.to_string())
        .arg("tap0");
    let mut command = tool.command();
    command.stdin(Stdio::from(exit)).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|e| tool.start_error(e).to_string())?;
    tokio::spawn(async move { child.wait().await });
    Ok(())
}

/// Asks something of a network, made where it is not there yet; a process that lives in it.
pub async fn ask(dir: &Path, name: &NetName, what: NetworkAsk) -> Result<u32, String> {
    let text = |e: io::Error| format!("network {name}: {e}");
    if what != (NetworkAsk::Hold { stay: false }) {
        ensure(dir, name).await?;
    }
    let stream = UnixStream::connect(client::socket(dir)).await.map_err(text)?;
    let pid = stream.peer_cred().map_err(text)?.pid().unwrap_or(0);
    let ask = match what {
        NetworkAsk::Hold { stay } => NetAsk::Hold { stay },
        NetworkAsk::Segment { segment, gateway } => NetAsk::Segment { segment, gateway },
    };
    fdpass::send(&stream, &ask, None).await.map_err(text)?;
    match Lines::default().next(&stream).await.map_err(text)? {
        Some((Notice::Done, _)) => Ok(pid as u32),
        Some((Notice::Refused { why }, _)) => Err(format!("network {name}: {why}")),
        Some(_) | None => Err(format!("network {name}: its keeper says nothing")),
    }
}

/// Asks the keeper to end if nobody is attached. True: it was there.
pub async fn leave(dir: &Path) -> bool {
    match UnixStream::connect(client::socket(dir)).await {
        Ok(stream) => fdpass::send(&stream, &NetAsk::Leave, None).await.is_ok(),
        Err(_) => false,
    }
}
