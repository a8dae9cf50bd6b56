//! Host ports that lead into the guest. The host's side is bound here, in the host's namespace;
//! the guest's side is dialled by the network's keeper, which hands the socket over.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::{Rc, Weak};
use std::time::Duration;

use lodge_spec::machine::{Peers, Protocol};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use super::start::Bound;
use crate::net::client;

/// A UDP conversation that was silent for so long is over.
const UDP_IDLE: Duration = Duration::from_secs(60);
/// More conversations at once than this are not begun.
const MAX_UDP: usize = 512;

/// Where the guest is.
#[derive(Clone)]
pub(super) struct Guest {
    pub(super) network: PathBuf,
    pub(super) address: SocketAddr,
}

/// Serves one forwarded port for as long as the machine lives.
pub(super) async fn serve(bound: Bound, guest: Guest, peers: Option<Peers>) {
    match bound {
        Bound::Tcp(listener) => {
            if listener.set_nonblocking(true).is_ok()
                && let Ok(listener) = TcpListener::from_std(listener)
            {
                tcp(listener, guest, peers).await;
            }
        }
        Bound::Udp(socket) => {
            if socket.set_nonblocking(true).is_ok()
                && let Ok(socket) = UdpSocket::from_std(socket)
            {
                udp(Rc::new(socket), guest, peers).await;
            }
        }
    }
}

async fn tcp(listener: TcpListener, guest: Guest, peers: Option<Peers>) {
    loop {
        let Ok((mut outside, peer)) = listener.accept().await else {
            // Out of descriptors, most likely; conversations that end give some back.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        if !admitted(peers.as_ref(), peer) {
            continue;
        }
        let guest = guest.clone();
        tokio::task::spawn_local(async move {
            let Ok(mut inside) = dial(&guest).await else { return };
            let _ = outside.set_nodelay(true);
            let _ = inside.set_nodelay(true);
            let _ = tokio::io::copy_bidirectional(&mut outside, &mut inside).await;
        });
    }
}

fn admitted(peers: Option<&Peers>, peer: SocketAddr) -> bool {
    peers.is_none_or(|peers| peers.admit(peer.ip()))
}

/// A connection to the guest.
pub(super) async fn dial(guest: &Guest) -> std::io::Result<TcpStream> {
    let fd = client::dial(&guest.network, guest.address, Protocol::Tcp).await?;
    let stream = std::net::TcpStream::from(fd);
    stream.set_nonblocking(true)?;
    TcpStream::from_std(stream)
}

async fn udp(outside: Rc<UdpSocket>, guest: Guest, peers: Option<Peers>) {
    let mut conversations: HashMap<SocketAddr, Rc<UdpSocket>> = HashMap::new();
    let mut buffer = vec![0; 65_536];
    loop {
        let Ok((count, from)) = outside.recv_from(&mut buffer).await else { continue };
        if !admitted(peers.as_ref(), from) {
            continue;
        }
        conversations.retain(|_, inside| Rc::strong_count(inside) > 1);
        if !conversations.contains_key(&from) && conversations.len() < MAX_UDP {
            let Ok(fd) = client::dial(&guest.network, guest.address, Protocol::Udp).await else {
                continue;
            };
            let socket = std::net::UdpSocket::from(fd);
            let socket = socket.set_nonblocking(true).and_then(|()| UdpSocket::from_std(socket));
            let Ok(inside) = socket.map(Rc::new) else { continue };
            tokio::task::spawn_local(answer(Rc::downgrade(&outside), inside.clone(), from));
            conversations.insert(from, inside);
        }
        if let Some(inside) = conversations.get(&from) {
            let _ = inside.send(&buffer[..count]).await;
        }
    }
}

/// Carries answers back while the port is open; it does not keep it open.
async fn answer(outside: Weak<UdpSocket>, inside: Rc<UdpSocket>, to: SocketAddr) {
    let mut buffer = vec![0; 65_536];
    while let Ok(Ok(count)) = tokio::time::timeout(UDP_IDLE, inside.recv(&mut buffer)).await {
        let Some(outside) = outside.upgrade() else { return };
        let _ = outside.send_to(&buffer[..count], to).await;
    }
}
