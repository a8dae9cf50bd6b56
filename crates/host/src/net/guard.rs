//! What a guarded interface may send, enforced on the host's side of it: rules of the bridge, a
//! chain for each interface. Others are not looked at. Works in the namespace of its caller.

use std::fmt::Write;
use std::net::{IpAddr, Ipv6Addr};

use lodge_spec::draft::GuardDraft;
use lodge_spec::names::Mac;

use super::setup::{SetupError, nft};
use crate::backend::Tap;

/// Made with the network: where interfaces find their chain.
pub(super) const TABLE: &str = "table bridge lodge {\n \
     map guarded { type ifname : verdict; }\n \
     chain in { type filter hook prerouting priority -300; iifname vmap @guarded; }\n}\n";

/// Puts an interface's rules in force, in place of those it had; one atomic batch.
pub(super) async fn set(tap: &Tap) -> Result<(), SetupError> {
    let Some(guard) = &tap.guard else { return Ok(()) };
    nft(&rules(tap, guard)).await
}

/// Takes an interface's rules away.
pub(super) async fn forget(interface: &str) {
    let _ = nft(&format!(
        "delete element bridge lodge guarded {{ \"{interface}\" }}\n\
         delete chain bridge lodge g-{interface}\n"
    ))
    .await;
}

fn rules(tap: &Tap, guard: &GuardDraft) -> String {
    let allows = |word: &str| guard.allow.iter().flatten().any(|allowed| allowed == word);
    let Tap { interface, mac, address, .. } = tap;
    let mut out = format!(
        "add chain bridge lodge g-{interface}\n\
         flush chain bridge lodge g-{interface}\n\
         add element bridge lodge guarded {{ \"{interface}\" : jump g-{interface} }}\n"
    );
    let mut rule = |text: &str| {
        let _ = writeln!(out, "add rule bridge lodge g-{interface} {text}");
    };
    if !allows("mac") {
        rule(&format!("ether saddr != {mac} drop"));
        rule(&format!("ether type arp arp saddr ether != {mac} drop"));
    }
    if !allows("other") {
        rule("ether type != { ip, ip6, arp } drop");
    }
    if !allows("dhcp") {
        rule("udp sport { 67, 547 } drop");
        // A client asks in its own name: the hardware address in the packet's 28th byte.
        rule(&format!("udp sport 68 udp dport 67 @th,288,48 != 0x{} drop", hex(*mac)));
    }
    if !allows("ip") && !allows("dhcp") {
        let own = guard.addresses.iter().flatten();
        let (v4, v6): (Vec<&String>, Vec<&String>) = own.partition(|a| !a.contains(':'));
        let v4: Vec<String> = v4.into_iter().cloned().chain([address.to_string()]).collect();
        let v6: Vec<String> =
            v6.into_iter().cloned().chain([link_local(*mac).to_string(), "::".into()]).collect();
        let (v4, v6) = (v4.join(", "), v6.join(", "));
        rule(&format!("arp saddr ip != {{ 0.0.0.0, {v4} }} drop"));
        rule("ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept");
        rule(&format!("ip saddr != {{ {v4} }} drop"));
        rule(&format!("ip6 saddr != {{ {v6} }} drop"));
    }
    let ports: Vec<String> = guard.blocked_ports.iter().flatten().map(u16::to_string).collect();
    if !ports.is_empty() {
        rule(&format!("tcp dport {{ {} }} drop", ports.join(", ")));
    }
    out
}

fn hex(mac: Mac) -> String {
    mac.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The address that an interface gives itself.
fn link_local(mac: Mac) -> IpAddr {
    let [a, b, c, d, e, f] = mac.0.map(u16::from);
    let parts = [0xfe80, 0, 0, 0, (a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f];
    Ipv6Addr::from(parts).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_local_addresses_are_those_that_guests_take() {
        let mac = "52:54:00:12:34:56".parse().unwrap();
        assert_eq!(link_local(mac).to_string(), "fe80::5054:ff:fe12:3456");
    }
}
