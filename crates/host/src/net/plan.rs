//! The addresses of a network. Pure: a name gives the same plan on every host.

use std::net::Ipv4Addr;
use std::path::Path;

use lodge_spec::names::{Mac, NetName};
use serde::{Deserialize, Serialize};

/// Where everything of a network is. The default one follows the plan that user-mode networking
/// made customary: gateway .2, names .3, first-boot script .100.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetPlan {
    pub name: NetName,
    /// First address of the /24.
    pub base: Ipv4Addr,
    /// The host's and the namespace's end of the link between them (a /30).
    pub uplink: (Ipv4Addr, Ipv4Addr),
    /// Interface on the host's side; at most 15 characters.
    pub host_interface: String,
}

pub const PREFIX: u8 = 24;
/// The mask of a prefix of that length.
pub(super) fn mask(prefix: u8) -> Ipv4Addr {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0).into()
}

pub const BRIDGE: &str = "br0";
/// What the network's own addresses have on the wire; always the same, so that a guest that was
/// moved finds its router where it was.
pub const BRIDGE_MAC: &str = "52:55:55:55:55:55";
/// Where guests look for the script of their first boot, on every network.
pub const SCRIPT: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 100);
/// Where guests look for metadata.
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

impl NetPlan {
    /// The plan of the network `name` whose folder is `dir`. Guests' addresses depend on the name
    /// alone; what the host sees also on the folder, so that instances do not meet.
    pub fn of(name: &NetName, dir: &Path) -> Self {
        let hash = |bytes: &[u8]| {
            bytes.iter().fold(0x811c_9dc5_u32, |h, b| (h ^ u32::from(*b)).wrapping_mul(0x0100_0193))
        };
        let third = match name.as_str() {
            "default" => 2,
            other => 3 + (hash(other.as_bytes()) % 250) as u8,
        };
        let own = hash(dir.as_os_str().as_encoded_bytes());
        // One of the 2^20 links of four addresses in 100.64.0.0/10.
        let link = u32::from(Ipv4Addr::new(100, 64, 0, 0)) + (own >> 12) * 4;
        let short: String = name.as_str().chars().take(8).collect();
        Self {
            name: name.clone(),
            base: Ipv4Addr::new(10, 0, third, 0),
            uplink: ((link + 1).into(), (link + 2).into()),
            host_interface: format!("lg{:04x}-{short}", own & 0xffff),
        }
    }

    fn at(&self, last: u8) -> Ipv4Addr {
        let [a, b, c, _] = self.base.octets();
        Ipv4Addr::new(a, b, c, last)
    }

    pub fn gateway(&self) -> Ipv4Addr {
        self.at(2)
    }

    pub fn names(&self) -> Ipv4Addr {
        self.at(3)
    }

    /// What is handed out to machines.
    pub fn range(&self) -> (Ipv4Addr, Ipv4Addr) {
        (self.at(15), self.at(99))
    }

    pub fn holds(&self, address: Ipv4Addr) -> bool {
        let [a, b, c, last] = address.octets();
        self.at(0).octets()[..3] == [a, b, c] && (4..255).contains(&last) && last != 100
    }
}

/// The tap interface of a machine: the machine's identity and the end of the interface's address.
pub fn tap_name(id: lodge_spec::names::MachineId, mac: Mac) -> String {
    let [.., before, last] = mac.0;
    format!("t{}{before:02x}{last:02x}", id.short())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_network_is_where_guests_expect_it() {
        let plan = NetPlan::of(&"default".parse().unwrap(), Path::new("/run/lodge/net/default"));
        assert_eq!(plan.gateway().to_string(), "10.0.2.2");
        assert_eq!(plan.names().to_string(), "10.0.2.3");
        assert!(!plan.holds(SCRIPT));
        assert!(plan.holds("10.0.2.15".parse().unwrap()));
        for no in ["10.0.2.2", "10.0.2.100", "10.0.3.15", "10.0.2.255"] {
            assert!(!plan.holds(no.parse().unwrap()), "{no}");
        }
    }

    proptest::proptest! {
        #[test]
        fn other_networks_stay_in_their_ranges(name in "[a-z][a-z0-9]{0,10}") {
            let plan = NetPlan::of(&name.parse().unwrap(), Path::new(&format!("/run/{name}")));
            let (host, inside) = plan.uplink;
            proptest::prop_assert_eq!(u32::from(host) + 1, u32::from(inside));
            proptest::prop_assert_eq!(u32::from(host) % 4, 1);
            let shared = u32::from(Ipv4Addr::new(100, 64, 0, 0));
            proptest::prop_assert_eq!(u32::from(host) & 0xffc0_0000, shared);
            proptest::prop_assert!(plan.host_interface.len() <= 15);
        }
    }
}
