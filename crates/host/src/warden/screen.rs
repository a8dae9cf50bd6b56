//! The screen over VNC: listens on the host, and hands the hypervisor one end of a socket pair for
//! each who comes. The hypervisor itself never holds a socket of the network.

use std::net::{SocketAddr, TcpListener as StdListener};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lodge_spec::machine::Protocol;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream, UnixStream};

use super::start::taken;
use crate::backend::ScreenPort;
use crate::backend::qemu::qmp::Qmp;

/// So many ports are tried where none is named.
const TRIES: u16 = 200;
const HANDLE: &str = "viewer";

pub(super) fn bind(at: ScreenPort) -> Result<StdListener, String> {
    let ScreenPort { address, port, or_next } = at;
    let tries = if or_next { TRIES } else { 1 };
    let ports = (0..tries).filter_map(|n| port.checked_add(n));
    let mut bound = None;
    for port in ports {
        let at = SocketAddr::new(address, port);
        match StdListener::bind(at) {
            Ok(listener) => return Ok(listener),
            Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
                bound.get_or_insert_with(|| taken(at, Protocol::Tcp));
            }
            Err(e) => return Err(format!("the screen cannot be shown at {at}: {e}")),
        }
    }
    Err(bound.unwrap_or_else(|| "no port for the screen is free".into()))
}

pub(super) async fn serve(listener: StdListener, monitor: PathBuf) {
    if listener.set_nonblocking(true).is_err() {
        return;
    }
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    loop {
        let Ok((viewer, _)) = listener.accept().await else {
            // Out of descriptors, most likely; viewers that leave give some back.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        // One after the other: the monitor talks to one at a time.
        if let Ok(inside) = let_in(&monitor).await {
            tokio::task::spawn_local(carry(viewer, inside));
        }
    }
}

/// Our end of a connection to the screen.
async fn let_in(monitor: &Path) -> Result<UnixStream, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let (ours, theirs) = StdStream::pair().map_err(|e| text(&e))?;
    let (qmp, _events) = Qmp::connect(monitor).await.map_err(|e| text(&e))?;
    let handle = json!({"fdname": HANDLE});
    qmp.ask_with_fd("getfd", handle, theirs.as_fd()).await.map_err(|e| text(&e))?;
    let client = json!({"protocol": "vnc", "fdname": HANDLE});
    qmp.ask("add_client", client).await.map_err(|e| text(&e))?;
    ours.set_nonblocking(true).map_err(|e| text(&e))?;
    UnixStream::from_std(ours).map_err(|e| text(&e))
}

async fn carry(mut viewer: TcpStream, mut inside: UnixStream) {
    let _ = viewer.set_nodelay(true);
    let _ = tokio::io::copy_bidirectional(&mut viewer, &mut inside).await;
}
