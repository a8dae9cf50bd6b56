//! Disks that a server gives by the protocol NBD: which server, and which of its disks.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where servers listen that say nothing else.
const PORT: u16 = 10809;
const TCP: [&str; 2] = ["nbd://", "nbd+tcp://"];
const UNIX: &str = "nbd+unix://";

/// `nbd://HOST[:PORT]/[EXPORT]`, or `nbd+unix:///[EXPORT]?socket=PATH`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nbd {
    pub server: Server,
    /// May be empty: the server's own choice.
    pub export: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Server {
    /// A name or an address, without brackets.
    Tcp { host: String, port: u16 },
    /// An absolute path of the host.
    Unix(PathBuf),
}

impl Nbd {
    /// Whether somebody who names this means such a disk.
    pub fn is_meant(text: &str) -> bool {
        TCP.iter().chain([&UNIX]).any(|scheme| text.starts_with(scheme))
    }
}

impl FromStr for Nbd {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| Err(format!("{text}: {why}"));
        if text.bytes().any(|b| b.is_ascii_control() || b == b'%' || b == b'#') {
            return wrong("an NBD address has no `%`, `#` or control characters here");
        }
        if let Some(rest) = text.strip_prefix(UNIX) {
            let (export, socket) = rest.split_once("?socket=").unwrap_or((rest, ""));
            let Some(export) = export.strip_prefix('/') else {
                return wrong("write nbd+unix:///EXPORT?socket=PATH");
            };
            if !socket.starts_with('/') {
                return wrong("its `socket` is not an absolute path");
            }
            return Ok(Self { server: Server::Unix(socket.into()), export: export.into() });
        }
        let Some(rest) = TCP.iter().find_map(|scheme| text.strip_prefix(scheme)) else {
            return wrong("it is not an NBD address");
        };
        let (place, export) = rest.split_once('/').unwrap_or((rest, ""));
        let (host, port) = match place.strip_prefix('[').and_then(|p| p.split_once(']')) {
            Some((host, port)) => (host, port.strip_prefix(':').or(port.is_empty().then_some(""))),
            None => match place.split_once(':') {
                Some((host, port)) => (host, Some(port).filter(|port| !port.is_empty())),
                None => (place, Some("")),
            },
        };
        let port = match port {
            Some("") => Some(PORT),
            Some(port) => port.parse().ok().filter(|port| *port > 0),
            None => None,
        };
        let Some(port) = port else { return wrong("its port is not a number from 1 to 65535") };
        if host.is_empty() || host.contains(['@', '?', ' ']) || export.contains('?') {
            return wrong("write nbd://HOST[:PORT]/EXPORT");
        }
        Ok(Self { server: Server::Tcp { host: host.into(), port }, export: export.into() })
    }
}

impl fmt::Display for Nbd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { server, export } = self;
        match server {
            Server::Tcp { host, port } if host.contains(':') => {
                write!(f, "nbd://[{host}]:{port}/{export}")
            }
            Server::Tcp { host, port } => write!(f, "nbd://{host}:{port}/{export}"),
            Server::Unix(path) => write!(f, "{UNIX}/{export}?socket={}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        for (text, same) in [
            ("nbd://10.0.0.1", "nbd://10.0.0.1:10809/"),
            ("nbd://store:7/a/b", "nbd://store:7/a/b"),
            ("nbd+tcp://store/disk", "nbd://store:10809/disk"),
            ("nbd://[fd00::1]/x", "nbd://[fd00::1]:10809/x"),
            ("nbd://[fd00::1]:9/x", "nbd://[fd00::1]:9/x"),
            ("nbd+unix:///x?socket=/run/a b.sock", "nbd+unix:///x?socket=/run/a b.sock"),
        ] {
            assert!(Nbd::is_meant(text));
            let read: Nbd = text.parse().unwrap();
            assert_eq!(read.to_string(), same);
            assert_eq!(same.parse::<Nbd>().unwrap(), read);
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "nbd://",
            "nbd:///x",
            "nbd://h:0/x",
            "nbd://h:70000/x",
            "nbd://h:/x",
            "nbd://[::1]x/y",
            "nbd://user@h/x",
            "nbd://h/x?a=b",
            "nbd://h/%20",
            "nbd://h/\n",
            "nbd+unix://x?socket=/s",
            "nbd+unix:///x",
            "nbd+unix:///x?socket=s",
            "zdb://h/x",
        ] {
            assert!(text.parse::<Nbd>().is_err(), "{text}");
        }
    }
}
