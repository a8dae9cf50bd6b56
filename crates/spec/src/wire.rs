//! Links of the host that an interface of a machine can be wired to, in place of a network of
//! Lodge's own. What is on such a link, addresses included, is somebody else's affair.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The network whose keeper looks after wires where nobody names one: no machine has addresses
/// there.
pub const NETWORK: &str = "wires";

const VLANS: std::ops::RangeInclusive<u32> = 1..=4094;
const VXLANS: std::ops::RangeInclusive<u32> = 1..=0xff_ffff;
/// What a VXLAN takes of each packet, in bytes.
const VXLAN_HEAD: u16 = 50;

/// Written as `KIND:INTERFACE`, or `KIND:NUMBER@INTERFACE`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Wire {
    /// One of the host's bridges.
    Bridge(String),
    /// A VLAN on one of the host's interfaces.
    Vlan { id: u16, on: String },
    /// A VXLAN over one of the host's interfaces; its members find each other by multicast.
    Vxlan { id: u32, on: String },
    /// One of the host's interfaces, shared with the host; each machine is there by its own address.
    Macvlan(String),
    /// One of the host's interfaces, for these machines alone.
    Passthrough(String),
}

impl Wire {
    /// The host's interface.
    pub fn interface(&self) -> &str {
        match self {
            Wire::Bridge(name) | Wire::Macvlan(name) | Wire::Passthrough(name) => name,
            Wire::Vlan { on, .. } | Wire::Vxlan { on, .. } => on,
        }
    }

    /// Bytes of the largest packet, where that is not what an Ethernet carries.
    pub fn mtu(&self) -> Option<u16> {
        matches!(self, Wire::Vxlan { .. }).then_some(1500 - VXLAN_HEAD)
    }
}

/// A name that the kernel takes, and that means nothing else to whoever is told it.
fn interface(text: &str) -> Option<String> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    let good = (1..16).contains(&text.len()) && text.bytes().all(fits);
    (good && !text.starts_with(['-', '.'])).then(|| text.to_owned())
}

impl FromStr for Wire {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is no link of a host; write bridge:NAME, vlan:ID@INTERFACE, \
                 vxlan:ID@INTERFACE, macvlan:INTERFACE or passthrough:INTERFACE"
            )
        };
        let (kind, rest) = text.split_once(':').ok_or_else(wrong)?;
        let named = || interface(rest).ok_or_else(wrong);
        let numbered = |range: std::ops::RangeInclusive<u32>| {
            let (id, on) = rest.split_once('@').ok_or_else(wrong)?;
            let id = id.parse().ok().filter(|id| range.contains(id)).ok_or_else(wrong)?;
            Ok::<_, String>((id, interface(on).ok_or_else(wrong)?))
        };
        Ok(match kind {
            "bridge" => Wire::Bridge(named()?),
            "macvlan" => Wire::Macvlan(named()?),
            "passthrough" => Wire::Passthrough(named()?),
            "vlan" => {
                let (id, on) = numbered(VLANS)?;
                Wire::Vlan { id: id as u16, on }
            }
            "vxlan" => {
                let (id, on) = numbered(VXLANS)?;
                Wire::Vxlan { id, on }
            }
            _ => return Err(wrong()),
        })
    }
}

impl TryFrom<String> for Wire {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Wire> for String {
    fn from(wire: Wire) -> Self {
        wire.to_string()
    }
}

impl fmt::Display for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wire::Bridge(name) => write!(f, "bridge:{name}"),
            Wire::Vlan { id, on } => write!(f, "vlan:{id}@{on}"),
            Wire::Vxlan { id, on } => write!(f, "vxlan:{id}@{on}"),
            Wire::Macvlan(name) => write!(f, "macvlan:{name}"),
            Wire::Passthrough(name) => write!(f, "passthrough:{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_read_and_written() {
        for text in [
            "bridge:br0",
            "vlan:4094@eth0.1",
            "vxlan:16777215@en-o1",
            "macvlan:e",
            "passthrough:eth0",
        ] {
            assert_eq!(text.parse::<Wire>().unwrap().to_string(), text);
        }
        for text in [
            "br0",
            "bridge:",
            "bridge:a/b",
            "bridge:-x",
            "bridge:a b",
            "bridge:0123456789abcdef",
            "vlan:0@eth0",
            "vlan:4095@eth0",
            "vlan:5",
            "vlan:x@eth0",
            "vxlan:16777216@eth0",
            "macvlan:a\nb",
            "tap:x",
            "bridge:..",
        ] {
            assert!(text.parse::<Wire>().is_err(), "{text}");
        }
        assert_eq!("vxlan:1@a".parse::<Wire>().unwrap().mtu(), Some(1450));
    }
}
