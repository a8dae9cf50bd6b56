//! A machine that moves to another host while it runs: where to, what it takes along, and what a
//! host was told to expect. Plain data and one grammar; knows nothing of how it travels.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::draft::{Draft, PortDraft};
use crate::names::MachineId;
use crate::state::Bootstrap;

/// Of what hosts say to each other. One that does not know it refuses.
pub const VERSION: u32 = 1;

/// A machine on its way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Migration {
    pub version: u32,
    pub draft: Draft,
    /// Its guest has been ready.
    pub ready: bool,
    pub bootstrap: Option<Bootstrap>,
    pub passport: Passport,
}

/// What must be the same on both hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Passport {
    /// The hypervisor, its processor and all that it was told, a line each.
    pub shape: Vec<String>,
    pub disks: Vec<SharedDisk>,
}

/// A disk that both hosts must see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedDisk {
    /// Of the disk, on both hosts.
    pub path: PathBuf,
    pub bytes: u64,
    /// For one that is written to: a file beside it, and what is in that. Only who sees the same
    /// folder can read it.
    pub proof: Option<(String, String)>,
}

/// What a host was told of a machine that is to come.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Expected {
    pub id: MachineId,
    /// Where its interfaces lead here, in their order.
    pub nics: Vec<Leads>,
    /// In place of the ports that it had there.
    pub ports: Vec<PortDraft>,
    /// What to put in the places of its origin's document that these JSON pointers name.
    pub document: BTreeMap<String, Value>,
}

/// Where an interface leads, as in a description.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leads {
    pub network: Option<String>,
    pub wire: Option<String>,
}

/// The daemon of another host, reached over SSH.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    pub user: Option<String>,
    pub host: String,
    pub port: Option<u16>,
    /// The private key to show.
    pub key: Option<PathBuf>,
    /// Where the host's own key is known from.
    pub known_hosts: Option<PathBuf>,
}

/// `ssh://[USER@]HOST[:PORT]`, or libvirt's spelling of it, `qemu+ssh://…/system`, either with
/// `?keyfile=PATH` and `&known_hosts=PATH`.
impl FromStr for Destination {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("{text}: {why}");
        let example = "write ssh://[USER@]HOST[:PORT], or qemu+ssh://[USER@]HOST[:PORT]/system";
        let rest = text.strip_prefix("qemu+").unwrap_or(text);
        let Some(rest) = rest.strip_prefix("ssh://") else {
            return Err(wrong(&format!("other hosts are reached over SSH; {example}")));
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (place, path) = rest.split_once('/').unwrap_or((rest, ""));
        if !matches!(path, "" | "system" | "session") {
            return Err(wrong(example));
        }
        let (user, place) = match place.rsplit_once('@') {
            Some((user, place)) => (Some(user.to_owned()), place),
            None => (None, place),
        };
        let (host, port) = match place.strip_prefix('[').and_then(|p| p.split_once(']')) {
            Some((host, "")) => (host, None),
            Some((host, port)) => (host, Some(port.strip_prefix(':').unwrap_or("?"))),
            None => match place.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (place, None),
            },
        };
        let plain = |text: &str| {
            let fits = |b: u8| b.is_ascii_alphanumeric() || b"._-:%".contains(&b);
            !text.is_empty() && !text.starts_with('-') && text.bytes().all(fits)
        };
        if !plain(host) || !user.as_deref().is_none_or(plain) {
            return Err(wrong(example));
        }
        let port = port.map(|port| port.parse::<u16>().ok().filter(|port| *port > 0));
        let port = match port {
            Some(None) => return Err(wrong("its port is not a number from 1 to 65535")),
            port => port.flatten(),
        };
        let (mut key, mut known_hosts) = (None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let place = match name {
                "keyfile" => &mut key,
                "known_hosts" => &mut known_hosts,
                other => return Err(wrong(&format!("{other} means nothing here"))),
            };
            if !value.starts_with('/') {
                return Err(wrong(&format!("{name} is not an absolute path")));
            }
            *place = Some(PathBuf::from(value));
        }
        Ok(Self { user, host: host.to_owned(), port, key, known_hosts })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_named_as_libvirt_names_them() {
        let read = |text: &str| text.parse::<Destination>();
        let far = read("qemu+ssh://root@10.0.0.2/system").unwrap();
        assert_eq!(
            (far.user.as_deref(), far.host.as_str(), far.port),
            (Some("root"), "10.0.0.2", None)
        );
        let own = read("ssh://[fe80::1%eth0]:2222?keyfile=/k&known_hosts=/h").unwrap();
        assert_eq!((own.host.as_str(), own.port), ("fe80::1%eth0", Some(2222)));
        assert_eq!((own.key, own.known_hosts), (Some("/k".into()), Some("/h".into())));
        for (text, why) in [
            ("qemu+tcp://h/system", "over SSH"),
            ("10.0.0.2", "over SSH"),
            ("ssh://", "write ssh"),
            ("ssh://-oProxyCommand=x", "write ssh"),
            ("ssh://-l@h", "write ssh"),
            ("ssh://h:0", "from 1 to 65535"),
            ("ssh://h:x", "from 1 to 65535"),
            ("ssh://h/elsewhere", "write ssh"),
            ("ssh://h?no_verify=1", "no_verify means nothing"),
            ("ssh://h?keyfile=k", "not an absolute path"),
            ("ssh://h;reboot", "write ssh"),
        ] {
            assert!(read(text).unwrap_err().contains(why), "{text}: {}", read(text).unwrap_err());
        }
    }
}
