//! Host ports that lead to a guest, and who may use them. Pure.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::draft::{PortDraft, PortFields};
use crate::machine::Protocol;
use crate::problem::Problems;
use crate::resolve::parse;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub ip: IpAddr,
    pub host: u16,
    pub guest: u16,
    pub protocol: Protocol,
    pub from: Option<Peers>,
}

/// Those who may use a port that is not for all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peers {
    /// Who has an address in this network: one of its addresses, and the length of its prefix.
    Net(IpAddr, u8),
    /// Who comes in by this interface of the host.
    Interface(String),
}

impl Peers {
    /// Whether a peer may use the port, as far as its address tells.
    pub fn admit(&self, peer: IpAddr) -> bool {
        let bits = |ip: IpAddr| match ip {
            IpAddr::V4(v4) => (u128::from(u32::from(v4)) << 96, 32),
            IpAddr::V6(v6) => (u128::from(v6), 128),
        };
        match self {
            Peers::Interface(_) => true,
            Peers::Net(net, prefix) => {
                let ((net, width), (peer, other)) = (bits(*net), bits(peer.to_canonical()));
                let rest = 128 - u32::from(*prefix);
                width == other && (net ^ peer).checked_shr(rest).unwrap_or(0) == 0
            }
        }
    }
}

impl FromStr for Peers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error =
            || format!("{text:?} is not an address, a network such as 10.0.0.0/8, or an interface");
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        if let Ok(ip) = address.parse::<IpAddr>() {
            let widest = if ip.is_ipv4() { 32 } else { 128 };
            let prefix = prefix.map_or(Ok(widest), |p| p.parse::<u8>().map_err(|_| error()))?;
            return if prefix <= widest { Ok(Peers::Net(ip, prefix)) } else { Err(error()) };
        }
        let named = |b: u8| b.is_ascii_alphanumeric() || b"-_.@".contains(&b);
        // As the kernel wants its names.
        let fits = (1..16).contains(&text.len()) && text != "." && text != "..";
        match fits && text.bytes().all(named) && text.bytes().any(|b| b.is_ascii_alphabetic()) {
            true => Ok(Peers::Interface(text.to_owned())),
            false => Err(error()),
        }
    }
}

impl fmt::Display for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peers::Net(ip, prefix) => write!(f, "{ip}/{prefix}"),
            Peers::Interface(name) => f.write_str(name),
        }
    }
}

impl Port {
    pub(crate) fn to_draft(&self) -> PortDraft {
        let Port { ip, host, guest, protocol, from } = self;
        PortDraft::Detailed(PortFields {
            ip: Some(ip.to_string()),
            host: Some(u32::from(*host)),
            guest: Some(u32::from(*guest)),
            protocol: Some(protocol.to_string()),
            from: from.as_ref().map(Peers::to_string),
        })
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Port { ip, host, guest, protocol, from } = self;
        let ip = match ip {
            IpAddr::V4(v4) => v4.to_string(),
            IpAddr::V6(v6) => format!("[{v6}]"),
        };
        write!(f, "{ip}:{host}:{guest}/{protocol}")?;
        from.as_ref().map_or(Ok(()), |from| write!(f, " from {from}"))
    }
}

/// `[IP:]HOST:GUEST[/udp]`; an IPv6 address stands in brackets.
fn parse_text(text: &str) -> Option<PortFields> {
    let (rest, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let (rest, guest) = rest.rsplit_once(':')?;
    let (ip, host) = match rest.rsplit_once(':') {
        Some((ip, host)) => (Some(ip.trim_start_matches('[').trim_end_matches(']')), host),
        None => (None, rest),
    };
    Some(PortFields {
        ip: ip.map(str::to_owned),
        host: Some(host.parse().ok()?),
        guest: Some(guest.parse().ok()?),
        protocol: Some(protocol.to_owned()),
        from: None,
    })
}

pub(crate) fn resolve(p: &mut Problems, i: usize, draft: PortDraft) -> Option<Port> {
    let here = format!("ports[{i}]");
    let PortFields { ip, host, guest, protocol, from } = match draft {
        PortDraft::Detailed(fields) => fields,
        PortDraft::Text(text) => match parse_text(&text) {
            Some(fields) => fields,
            None => {
                p.add(here, format!("{text:?} is not [IP:]HOST:GUEST[/udp]"));
                return None;
            }
        },
    };
    let mut number = |field: &str, value: Option<u32>| match value {
        Some(n @ 1..=65535) => Some(n as u16),
        Some(n) => {
            p.add(format!("{here}.{field}"), format!("{n} is not a port; 1 to 65535 is possible"));
            None
        }
        None => {
            p.add(&here, format!("`{field}` is missing"));
            None
        }
    };
    let (host, guest) = (number("host", host), number("guest", guest));
    let ip = parse(p, &format!("{here}.ip"), Some(ip.unwrap_or_else(|| "127.0.0.1".into())))?;
    let protocol = parse(p, &format!("{here}.protocol"), protocol).unwrap_or(Protocol::Tcp);
    let from = parse(p, &format!("{here}.from"), from);
    Some(Port { ip, host: host?, guest: guest?, protocol, from })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_networks_or_interfaces() {
        for (text, printed) in [
            ("10.1.2.3", "10.1.2.3/32"),
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("fd00::/8", "fd00::/8"),
            ("eth0", "eth0"),
            ("br-12.3", "br-12.3"),
        ] {
            assert_eq!(text.parse::<Peers>().unwrap().to_string(), printed);
        }
        for text in
            ["", "10.0.0.0/33", "10.0.0/8", "a b", "averyveryverylongname", "eth0/8", "..", "12"]
        {
            assert!(text.parse::<Peers>().is_err(), "{text}");
        }
    }

    #[test]
    fn peers_are_admitted_by_their_address() {
        for (text, peer, admitted) in [
            ("10.0.0.0/8", "10.255.1.2", true),
            ("10.0.0.0/8", "11.0.0.1", false),
            ("10.1.2.3", "10.1.2.3", true),
            ("10.1.2.3", "10.1.2.2", false),
            ("10.0.0.0/8", "::ffff:10.0.0.1", true),
            ("10.0.0.0/8", "fd00::1", false),
            ("fd00::/8", "fd12::1", true),
            ("fd00::/8", "fe80::1", false),
            ("0.0.0.0/0", "8.8.8.8", true),
            ("0.0.0.0/0", "::1", false),
            ("eth0", "1.1.1.1", true),
        ] {
            let peers: Peers = text.parse().unwrap();
            assert_eq!(peers.admit(peer.parse().unwrap()), admitted, "{text} {peer}");
        }
    }
}
