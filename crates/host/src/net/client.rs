//! Asking a network's keeper: for a tap, which stays for as long as the connection does, and for
//! sockets inside the network.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};

use lodge_spec::machine::{Protocol, Segment};
use lodge_spec::state::Traffic;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use crate::backend::Tap;
use crate::fdpass::{self, Lines};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub(crate) enum NetAsk {
    Attach {
        tap: Box<Tap>,
    },
    /// What an interface may send from now on.
    Guard {
        tap: Box<Tap>,
    },
    /// What has passed through an interface.
    Count {
        interface: String,
    },
    Dial {
        address: SocketAddr,
        protocol: Protocol,
    },
    /// Stay although nobody is attached, or no longer.
    Hold {
        stay: bool,
    },
    /// Make a segment, with the address of its router.
    Segment {
        segment: Segment,
        gateway: Option<(Ipv4Addr, u8)>,
    },
    /// End if nobody is attached.
    Leave,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "notice", rename_all = "snake_case")]
pub(crate) enum Notice {
    /// The tap comes with it, or the namespace that it is in.
    Attached,
    /// The socket comes with it.
    Dialled,
    Guarded,
    Done,
    Counted {
        traffic: Traffic,
    },
    Refused {
        why: String,
    },
    /// The guest wants to hear of its first boot; the connection comes with it.
    Visitor,
    /// The guest has taken its address.
    Leased {
        address: Ipv4Addr,
    },
}

pub(crate) fn socket(network: &Path) -> PathBuf {
    network.join("net.sock")
}

/// Attaches to a network. The interface goes when the connection does.
pub(crate) fn attach(tap: &Tap) -> Result<(StdStream, OwnedFd), String> {
    let text = |e: std::io::Error| format!("network {}: {e}", tap.network.display());
    let connection = StdStream::connect(socket(&tap.network)).map_err(text)?;
    let ask = NetAsk::Attach { tap: Box::new(tap.clone()) };
    match fdpass::ask_blocking(&connection, &ask).map_err(text)? {
        (Notice::Attached, Some(fd)) => Ok((connection, fd)),
        (Notice::Refused { why }, _) => Err(why),
        (other, _) => Err(format!("network {}: unexpected {other:?}", tap.network.display())),
    }
}

/// What has passed through an interface, as its guest sees it.
pub(crate) async fn count(network: &Path, interface: &str) -> std::io::Result<Traffic> {
    let connection = UnixStream::connect(socket(network)).await?;
    let ask = NetAsk::Count { interface: interface.to_owned() };
    fdpass::send(&connection, &ask, None).await?;
    match Lines::default().next(&connection).await? {
        Some((Notice::Counted { traffic }, _)) => Ok(traffic),
        Some(_) | None => Err(std::io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Changes what an interface may send.
pub(crate) async fn guard(tap: Tap) -> Result<(), String> {
    let text = |e: std::io::Error| format!("network: {e}");
    let connection = UnixStream::connect(socket(&tap.network)).await.map_err(text)?;
    let ask = NetAsk::Guard { tap: Box::new(tap) };
    fdpass::send(&connection, &ask, None).await.map_err(text)?;
    match Lines::default().next(&connection).await.map_err(text)? {
        Some((Notice::Guarded, _)) => Ok(()),
        Some((Notice::Refused { why }, _)) => Err(why),
        Some(_) | None => Err("the network's keeper says nothing".into()),
    }
}

/// A connected socket inside the network.
pub(crate) async fn dial(
    network: &Path,
    address: SocketAddr,
    protocol: Protocol,
) -> std::io::Result<OwnedFd> {
    let connection = UnixStream::connect(socket(network)).await?;
    fdpass::send(&connection, &NetAsk::Dial { address, protocol }, None).await?;
    match Lines::default().next(&connection).await? {
        Some((Notice::Dialled, Some(fd))) => Ok(fd),
        Some((Notice::Refused { why }, _)) => Err(std::io::Error::other(why)),
        Some(_) | None => Err(std::io::ErrorKind::UnexpectedEof.into()),
    }
}
