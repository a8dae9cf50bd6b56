//! Disks that come over a connection: reaching their servers. QEMU speaks NBD over the descriptor
//! that it is handed, and sees no network; for what is not NBD, a process of ours stands between.

pub mod zdb;

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use lodge_formats::nbd::INIT;
use lodge_spec::nbd::Server;
use lodge_spec::remote::Remote;

/// A server of disks takes a connection within this.
const CONNECT: Duration = Duration::from_secs(5);
/// One that takes nothing for so long is gone; the guest's requests fail then.
const SILENCE: Duration = Duration::from_secs(30);

/// A connection over which the disk is served by NBD. Waits for it.
pub fn dial(remote: &Remote, read_only: bool) -> Result<OwnedFd, String> {
    let dialled = match remote {
        Remote::Nbd(nbd) => connect(&nbd.server)
            .map_err(|e| e.to_string())
            .and_then(|server| greeted(&server).map(|()| server)),
        Remote::Zdb(zdb) => zdb::start(zdb, read_only),
    };
    dialled.map_err(|why| format!("{}: {why}", remote.shown()))
}

/// Such servers speak first. One that says nothing, because it is busy with others or is something
/// else, would keep the hypervisor waiting, and everything with it.
fn greeted(server: &OwnedFd) -> Result<(), String> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let limit = Timespec { tv_sec: CONNECT.as_secs() as i64, tv_nsec: 0 };
    let mut wait = [PollFd::new(server, PollFlags::IN)];
    let silent = || "it takes connections and does not greet; is it busy with another?".to_owned();
    if poll(&mut wait, Some(&limit)).map_err(|e| e.to_string())? == 0 {
        return Err(silent());
    }
    let mut greeting = [0; INIT.len()];
    let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::WAITALL;
    match rustix::net::recv(server, &mut greeting, flags) {
        Ok(_) if greeting == *INIT => Ok(()),
        Ok((0, _)) => Err(silent()),
        Ok(_) => Err("what listens there does not speak NBD".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// A connection that tells when the other end is gone, also while nothing is said.
fn connect(server: &Server) -> io::Result<OwnedFd> {
    let (host, port) = match server {
        Server::Unix(path) => return UnixStream::connect(path).map(OwnedFd::from),
        Server::Tcp { host, port } => (host.as_str(), *port),
    };
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
                let unheard = SILENCE.as_millis() as u32;
                rustix::net::sockopt::set_tcp_user_timeout(&stream, unheard)?;
                return Ok(stream.into());
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}
