//! Interfaces and forwarded ports in that system's words. The default network is one of its own
//! plan: an address and an Ethernet address for each number that machines are given.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use lodge_spec::draft::{NicDraft, PortDraft, PortFields};
use lodge_spec::wire::Wire;
use serde::{Deserialize, Serialize};

use super::jobs::Failure;

/// The network behind `default`.
pub(super) const DEFAULT: &str = "kvm0";
const GATEWAY: &str = "172.19.0.1";
const PREFIX: u32 = 16;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Nic {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) id: String,
    pub(super) hwaddr: String,
}

pub(super) fn address(sequence: u16) -> Ipv4Addr {
    let [high, low] = sequence.to_be_bytes();
    Ipv4Addr::new(172, 19, high, low)
}

pub(super) fn mac(sequence: u16) -> String {
    let [high, low] = sequence.to_be_bytes();
    format!("00:28:06:82:{high:02x}:{low:02x}")
}

/// The number after this one; some are nobody's.
pub(super) fn after(sequence: u16) -> u16 {
    match sequence.wrapping_add(1) {
        0 | 1 | u16::MAX => 2,
        next => next,
    }
}

/// What is wrong with a list of interfaces.
pub(super) fn check(nics: &[Nic]) -> Result<(), Failure> {
    let mut default = false;
    for (i, nic) in nics.iter().enumerate() {
        let again = nics[..i].iter().any(|other| other.kind == nic.kind && other.id == nic.id);
        match nic.kind.as_str() {
            "default" if default => return fail("only one default network is allowed"),
            "default" => default = true,
            "bridge" if nic.id == DEFAULT => {
                return fail(
                    "cannot use bridge kvm0 with nic type 'bridge', please use type default instead",
                );
            }
            kind @ ("bridge" | "vlan" | "vxlan" | "macvlan" | "passthrough") => {
                if again {
                    return fail(format!(
                        "connecting to {kind} '{}' more than one time is not allowed",
                        nic.id
                    ));
                }
            }
            other => return fail(format!("invalid nic type '{other}'")),
        }
    }
    Ok(())
}

fn fail<T>(message: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::new(message))
}

/// What links stand for here.
#[derive(Clone, Debug, Default)]
pub struct Links {
    /// Bridges (`NAME`), VLANs (`vlan:N`) and VXLANs (`vxlan:N`), each with the network of Lodge's own
    /// that is meant.
    pub networks: BTreeMap<String, String>,
    /// The host's interface that carries VLANs.
    pub backplane: Option<String>,
    /// The host's interface that carries VXLANs.
    pub vxbackend: Option<String>,
}

/// What an interface is called on this host: it follows from what it is, as there is one of each.
pub(super) fn name(nic: &Nic) -> String {
    let Nic { kind, id, .. } = nic;
    if kind == "default" {
        return kind.clone();
    }
    let plain =
        id.len() <= 12 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
    if plain {
        return format!("{kind}-{id}");
    }
    // FNV-1a: two of theirs must not become one of ours.
    let step = |h: u32, b: u8| (h ^ u32::from(b)).wrapping_mul(0x0100_0193);
    format!("{kind}-{:08x}", id.bytes().fold(0x811c_9dc5, step))
}

/// An interface as it is asked for.
pub(super) fn draft(nic: &Nic, sequence: u16, links: &Links) -> Result<NicDraft, Failure> {
    let own = Some(nic.hwaddr.clone()).filter(|mac| !mac.is_empty());
    let plain = || NicDraft { name: Some(name(nic)), mac: own.clone(), ..NicDraft::default() };
    // What is meant by a name: a network, or else a link of the host.
    let on = |name: &str, wire: Option<String>| match links.networks.get(name) {
        Some(network) => Some(NicDraft { network: Some(network.clone()), ..plain() }),
        None => {
            let wire = wire.filter(|wire| wire.parse::<Wire>().is_ok())?;
            Some(NicDraft { wire: Some(wire), ..plain() })
        }
    };
    let id = nic.id.as_str();
    let missing = |what: &str| Failure { code: 400, message: format!("{what} '{id}' not found") };
    match nic.kind.as_str() {
        "default" => Ok(NicDraft {
            network: Some(DEFAULT.into()),
            mac: Some(mac(sequence)),
            address: Some(address(sequence).to_string()),
            prefix: Some(PREFIX),
            gateway: Some(GATEWAY.into()),
            ..plain()
        }),
        "bridge" => on(id, Some(format!("bridge:{id}"))).ok_or_else(|| missing("bridge")),
        "vlan" => {
            if !id.parse::<u16>().is_ok_and(|id| id <= 4094) {
                return fail("invalid vlan id (0-4094)");
            }
            let wire = links.backplane.as_ref().map(|on| format!("vlan:{id}@{on}"));
            on(&format!("vlan:{id}"), wire)
                .ok_or_else(|| Failure::new("ovs is needed for VLAN network type"))
        }
        "vxlan" => {
            let wire = links.vxbackend.as_ref().map(|on| format!("vxlan:{id}@{on}"));
            on(&format!("vxlan:{id}"), wire)
                .ok_or_else(|| Failure::new("ovs is needed for VXLAN network type"))
        }
        // The host's interface itself.
        kind => {
            let wire = format!("{kind}:{id}");
            on(&wire, Some(wire.clone())).ok_or_else(|| missing("interface"))
        }
    }
}

/// A forwarded port: `P`, `IP:P`, `NETWORK:P` or `INTERFACE:P`.
pub(super) fn port(host: &str, guest: u32) -> Result<PortDraft, Failure> {
    let number = |text: &str| -> Result<u32, Failure> {
        let valid = text.parse::<u16>().ok().filter(|port| *port > 0);
        valid.map(u32::from).ok_or_else(|| Failure::new("invalid port number"))
    };
    let (from, port) = match host.rsplit_once(':') {
        None | Some(("0.0.0.0", _)) => (None, number(host.rsplit(':').next().unwrap_or(host))?),
        Some((whom, port)) => (Some(whom.to_owned()), number(port)?),
    };
    if guest == 0 || guest > u32::from(u16::MAX) {
        return fail("invalid port number");
    }
    Ok(PortDraft::Detailed(PortFields {
        ip: Some("0.0.0.0".into()),
        host: Some(port),
        guest: Some(guest),
        from,
        ..PortFields::default()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_follow_from_the_number() {
        assert_eq!(
            (address(2).to_string(), mac(2)),
            ("172.19.0.2".into(), "00:28:06:82:00:02".into())
        );
        assert_eq!(address(0x1234).to_string(), "172.19.18.52");
        assert_eq!((after(1), after(2), after(0xfffe), after(0xffff)), (2, 3, 2, 2));
    }

    fn nic(kind: &str, id: &str) -> Nic {
        Nic { kind: kind.into(), id: id.into(), hwaddr: String::new() }
    }

    #[test]
    fn interfaces_are_refused_in_the_words_of_that_system_case_6() {
        for (nics, why) in [
            (vec![nic("default", ""), nic("default", "")], "only one default network is allowed"),
            (vec![nic("foo", "")], "invalid nic type 'foo'"),
            (
                vec![nic("bridge", "kvm0")],
                "cannot use bridge kvm0 with nic type 'bridge', please use type default instead",
            ),
            (
                vec![nic("bridge", "b"), nic("bridge", "b")],
                "connecting to bridge 'b' more than one time is not allowed",
            ),
            (
                vec![nic("vlan", "1"), nic("vxlan", "1"), nic("vlan", "1")],
                "connecting to vlan '1' more than one time is not allowed",
            ),
        ] {
            assert_eq!(check(&nics).unwrap_err().message, why);
        }
        let none = Links::default();
        let unknown = draft(&nic("bridge", "no name"), 2, &none).unwrap_err();
        assert_eq!((unknown.code, unknown.message.as_str()), (400, "bridge 'no name' not found"));
        let unknown = draft(&nic("macvlan", ""), 2, &none).unwrap_err();
        assert_eq!((unknown.code, unknown.message.as_str()), (400, "interface '' not found"));
        for (kind, why) in
            [("vlan", "ovs is needed for VLAN"), ("vxlan", "ovs is needed for VXLAN")]
        {
            assert!(draft(&nic(kind, "7"), 2, &none).unwrap_err().message.starts_with(why));
        }
        let wrong = draft(&nic("vlan", "4095"), 2, &none).unwrap_err();
        assert_eq!(wrong.message, "invalid vlan id (0-4094)");
    }

    #[test]
    fn links_of_the_host_are_wires_and_others_are_networks() {
        let networks = [("br1", "lab"), ("vlan:8", "lab")];
        let links = Links {
            networks: networks.map(|(name, network)| (name.into(), network.into())).into(),
            backplane: Some("eth1".into()),
            vxbackend: Some("eth2".into()),
        };
        for (kind, id, wire, network) in [
            ("bridge", "br0", Some("bridge:br0"), None),
            ("bridge", "br1", None, Some("lab")),
            ("vlan", "7", Some("vlan:7@eth1"), None),
            ("vlan", "8", None, Some("lab")),
            ("vxlan", "9", Some("vxlan:9@eth2"), None),
            ("macvlan", "eth0", Some("macvlan:eth0"), None),
            ("passthrough", "eth0", Some("passthrough:eth0"), None),
            ("passthrough", "eth0.4094-x", Some("passthrough:eth0.4094-x"), None),
        ] {
            let draft = draft(&nic(kind, id), 2, &links).unwrap();
            let name = draft.name.unwrap();
            assert!(name.parse::<lodge_spec::names::DeviceName>().is_ok(), "{name}");
            assert_eq!((draft.wire.as_deref(), draft.network.as_deref()), (wire, network));
        }
    }

    #[test]
    fn ports_are_numbers() {
        assert!(port("8080", 80).is_ok() && port("0.0.0.0:8080", 80).is_ok());
        for (host, guest) in [("80abc", 80), ("0", 80), ("65536", 80), ("80", 0), ("80", 65_536)] {
            assert_eq!(port(host, guest).unwrap_err().message, "invalid port number");
        }
        let PortDraft::Detailed(fields) = port("10.0.0.0/24:80", 80).unwrap() else { panic!() };
        assert_eq!((fields.from.as_deref(), fields.host), (Some("10.0.0.0/24"), Some(80)));
    }
}
