//! The network's name service on the wire: questions by UDP and by TCP, those about neighbours
//! answered here, the rest asked of the host's resolvers. What an answer is, `dns` knows.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use super::dns::{self, Verdict};

/// A question by TCP and its answer take at most this long.
const PATIENCE: Duration = Duration::from_secs(10);
/// Conversations by TCP at once.
const MAX_STREAMS: usize = 32;

/// Where the host's resolvers are reached from.
pub(super) struct World {
    /// The host's namespace and the network's; `None`: only the latter may be entered, and its
    /// way out leads to the resolvers.
    pub(super) namespaces: Option<(File, File)>,
    pub(super) resolvers: Vec<SocketAddr>,
}

/// Goes into a namespace with the whole process, which has one thread.
pub(super) fn enter(namespace: &File) {
    use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
    let kind = Some(LinkNameSpaceType::Network);
    move_into_link_name_space(namespace.as_fd(), kind).expect("both namespaces are held open");
}

impl World {
    /// A socket that belongs to the host's namespace for as long as it lives.
    fn tcp_socket(&self, to: SocketAddr) -> io::Result<TcpSocket> {
        let make = || match to {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        };
        let Some((host, own)) = &self.namespaces else { return make() };
        enter(host);
        let made = make();
        enter(own);
        made
    }

    /// The same for packets.
    pub(super) fn udp_socket(&self) -> io::Result<UdpSocket> {
        let make = || std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0));
        let made = match &self.namespaces {
            None => make(),
            Some((host, own)) => {
                enter(host);
                let made = make();
                enter(own);
                made
            }
        }?;
        made.set_nonblocking(true)?;
        UdpSocket::from_std(made)
    }

    /// A connection to the first resolver that takes one.
    async fn dial(&self) -> io::Result<TcpStream> {
        let mut last = io::ErrorKind::NotConnected.into();
        for resolver in &self.resolvers {
            match self.tcp_socket(*resolver)?.connect(*resolver).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

/// Who is known by a name.
pub(super) type Find = Rc<dyn Fn(&str) -> Option<Ipv4Addr>>;

/// Answers by UDP for as long as the network lives. `outside` belongs to the host's namespace.
pub(super) async fn serve_udp(world: Rc<World>, find: Find, inside: UdpSocket, outside: UdpSocket) {
    // Questions passed on: our number, their number and address. Bounded by the numbers' width.
    let mut asked: HashMap<u16, (u16, SocketAddr)> = HashMap::new();
    let (mut query, mut reply) = ([0; 4096], [0; 4096]);
    let mut next = 1u16;
    loop {
        tokio::select! {
            received = inside.recv_from(&mut query) => {
                let Ok((count @ 12.., from)) = received else { continue };
                match dns::judge(&query[..count], &*find) {
                    Verdict::Answer(answer) => drop(inside.send_to(&answer, from).await),
                    Verdict::PassOn => {
                        next = next.wrapping_add(1);
                        let theirs = u16::from_be_bytes([query[0], query[1]]);
                        asked.insert(next, (theirs, from));
                        query[..2].copy_from_slice(&next.to_be_bytes());
                        for resolver in &world.resolvers {
                            let _ = outside.send_to(&query[..count], resolver).await;
                        }
                    }
                    Verdict::Ignore => {}
                }
            }
            received = outside.recv_from(&mut reply) => {
                let Ok((count @ 12.., from)) = received else { continue };
                // Only those who were asked may answer, and only once.
                let number = u16::from_be_bytes([reply[0], reply[1]]);
                let known = asked.remove(&number).filter(|_| world.resolvers.contains(&from));
                if let Some((theirs, to)) = known {
                    reply[..2].copy_from_slice(&theirs.to_be_bytes());
                    let _ = inside.send_to(&reply[..count], to).await;
                }
            }
        }
    }
}

/// Answers by TCP, where answers are too large for a packet.
pub(super) async fn serve_tcp(world: Rc<World>, find: Find, listener: TcpListener) {
    let places = Arc::new(Semaphore::new(MAX_STREAMS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else { continue };
        let (world, find) = (world.clone(), find.clone());
        tokio::task::spawn_local(async move {
            // A guest that breaks off, or a resolver that does, ends only this conversation.
            let _ = converse(&world, &find, stream).await;
            drop(place);
        });
    }
}

/// Question after question, each with its length before it.
async fn converse(world: &World, find: &Find, mut stream: TcpStream) -> io::Result<()> {
    loop {
        let query = tokio::time::timeout(PATIENCE, read(&mut stream)).await??;
        let answer = match dns::judge(&query, &**find) {
            Verdict::Answer(answer) => answer,
            Verdict::PassOn => {
                let asking = async {
                    let mut resolver = world.dial().await?;
                    write(&mut resolver, &query).await?;
                    read(&mut resolver).await
                };
                tokio::time::timeout(PATIENCE, asking).await??
            }
            Verdict::Ignore => return Ok(()),
        };
        write(&mut stream, &answer).await?;
    }
}

async fn read(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    let mut whole = length.to_be_bytes().to_vec();
    whole.extend_from_slice(message);
    stream.write_all(&whole).await
}
