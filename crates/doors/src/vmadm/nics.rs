//! Interfaces in their full form: both ways of writing addresses, one that is primary, and nothing
//! that two would fight over.

use std::net::Ipv4Addr;

use serde_json::Value;

use super::build::World;
use super::properties::Brand;
use super::values::{Object, is_true, mask_of, number, prefix_of, text, texts};

const MODELS: [&str; 3] = ["virtio", "e1000", "rtl8139"];
const MAX_ADDRESSES: usize = 20;
const MAX_ALLOWED: usize = 13;
const MAX_IN_ALL: usize = 32;
const MAX_CLIENT_IDS: usize = 20;
const MAX_CLIENT_TEXT: usize = 1024;

/// Interfaces of one machine, as they come together.
pub(super) struct Nics<'a> {
    pub(super) brand: Brand,
    /// The model of an interface that names none.
    pub(super) driver: Option<String>,
    pub(super) world: &'a World,
    pub(super) list: Vec<Object>,
}

impl Nics<'_> {
    pub(super) fn add(&mut self, mut nic: Object) -> Result<(), String> {
        nic.retain(|_, value| !value.is_null());
        let free = |n: &usize| {
            let name = format!("net{n}");
            self.list.iter().all(|other| text(other, "interface") != Some(&name))
        };
        if text(&nic, "interface").is_none() {
            let n = (0..).find(free).unwrap_or(0);
            nic.insert("interface".into(), format!("net{n}").into());
        }
        let first_model = self.list.first().and_then(|n| text(n, "model")).map(str::to_owned);
        let nic = complete(self.brand, nic, self.driver.clone().or(first_model), self.world)?;
        self.list.push(nic);
        self.check()
    }

    /// What holds of all interfaces together.
    pub(super) fn check(&self) -> Result<(), String> {
        for (i, nic) in self.list.iter().enumerate() {
            for other in &self.list[..i] {
                if let Some(mac) = text(nic, "mac").filter(|mac| text(other, "mac") == Some(mac)) {
                    return Err(format!("Cannot add multiple NICs with the same MAC: {mac}"));
                }
                let ip = address(nic).filter(|ip| address(other) == Some(*ip));
                if let Some(ip) = ip {
                    return Err(format!("Cannot add multiple NICs with the same IP: {ip}"));
                }
            }
        }
        Ok(())
    }

    /// Exactly one is primary; the first where none is.
    pub(super) fn settle_primary(&mut self) -> Result<(), String> {
        let primary = self.list.iter().filter(|nic| is_true(nic, "primary")).count();
        if primary > 1 {
            return Err("payload specifies more than 1 primary NIC".into());
        }
        if primary == 0 {
            promote(&mut self.list);
        }
        for nic in &mut self.list {
            if !is_true(nic, "primary") {
                nic.remove("primary");
            }
        }
        Ok(())
    }
}

/// Makes one primary: the first with a public address, else the first.
pub(super) fn promote(list: &mut [Object]) {
    let public = |nic: &Object| {
        address(nic).is_some_and(|ip| !ip.is_private() && !ip.is_link_local() && !ip.is_loopback())
    };
    let at = list.iter().position(public).filter(|_| list.len() > 1).unwrap_or(0);
    if let Some(nic) = list.get_mut(at) {
        nic.insert("primary".into(), true.into());
    }
}

/// The static IPv4 address.
pub(super) fn address(nic: &Object) -> Option<Ipv4Addr> {
    text(nic, "ip")?.parse().ok()
}

/// A tag's link and, for an overlay, its number.
pub(super) fn network<'a>(world: &'a World, tag: &str) -> Option<&'a String> {
    world.tags.get(tag.split('/').next().unwrap_or(tag))
}

/// Checks one interface and writes its addresses out in both forms.
pub(super) fn complete(
    brand: Brand,
    mut nic: Object,
    driver: Option<String>,
    world: &World,
) -> Result<Object, String> {
    let shown = Value::Object(nic.clone()).to_string();
    let Some(tag) = text(&nic, "nic_tag") else {
        return Err(format!("invalid or missing .nic_tag option for NIC: {shown}"));
    };
    known_tag(world, tag)?;
    let model = text(&nic, "model").map(str::to_owned).or(driver);
    match (brand, model) {
        (Brand::Kvm, None) => return Err(format!("missing .model option for NIC: {shown}")),
        (Brand::Kvm, Some(model)) if !MODELS.contains(&model.as_str()) => {
            let valid = MODELS.join(",");
            return Err(format!("\"{model}\" is not a valid NIC model. Valid are: {valid}"));
        }
        (_, Some(model)) => drop(nic.insert("model".into(), model.into())),
        (Brand::Bhyve, None) => {}
    }
    addresses(&mut nic, &shown)?;
    let allowed = texts(&nic, "allowed_ips").len();
    let own = texts(&nic, "ips").len();
    if own > MAX_ADDRESSES {
        let why = format!("nic.*.ips contains {own} addresses, but is limited to {MAX_ADDRESSES}");
        return Err(why);
    }
    if allowed > MAX_ALLOWED {
        return Err(format!("Maximum of {MAX_ALLOWED} allowed_ips per nic"));
    }
    if own + allowed + usize::from(nic.contains_key("vrrp_primary_ip")) > MAX_IN_ALL {
        return Err(format!("More than {MAX_IN_ALL} IPs cannot be associated with a NIC"));
    }
    let clients = texts(&nic, "allowed_dhcp_cids");
    if clients.len() > MAX_CLIENT_IDS || clients.join(",").len() >= MAX_CLIENT_TEXT {
        return Err(format!("Maximum of {MAX_CLIENT_IDS} allowed_dhcp_cids per nic"));
    }
    for port in texts(&nic, "blocked_outgoing_ports") {
        if !port.parse::<u16>().is_ok_and(|port| port > 0) {
            return Err(format!("Invalid port in blocked_outgoing_ports: {port}"));
        }
    }
    if text(&nic, "mac").is_none() {
        nic.insert("mac".into(), random_mac().into());
    }
    Ok(nic)
}

pub(super) fn known_tag(world: &World, tag: &str) -> Result<(), String> {
    match network(world, tag) {
        Some(_) => Ok(()),
        None => {
            let known: Vec<&str> = world.tags.keys().map(String::as_str).collect();
            Err(format!("Invalid nic tag \"{tag}\"; known are {}", known.join(", ")))
        }
    }
}

fn addresses(nic: &mut Object, shown: &str) -> Result<(), String> {
    let ips = texts(nic, "ips");
    let gateways = texts(nic, "gateways");
    let gateway = text(nic, "gateway").map(str::to_owned);
    for gateway in gateways.iter().chain(&gateway) {
        if gateway.parse::<Ipv4Addr>().is_err() {
            return Err(format!("Static gateways must be IPv4 addresses: {gateway}"));
        }
    }
    let (ip, ips) = match (text(nic, "ip").map(str::to_owned), ips) {
        (Some(ip), _) if ip == "dhcp" => (Some(ip.clone()), vec![ip]),
        (Some(ip), mut ips) => {
            let Some(mask) = text(nic, "netmask") else {
                return Err(format!("Missing .netmask option for NIC: {shown}"));
            };
            let wrong = || format!("Specified netmask value is invalid: {mask}");
            let prefix = prefix_of(mask).ok_or_else(wrong)?;
            if ip.parse::<Ipv4Addr>().is_err() {
                return Err(format!("Invalid IP for NIC: {ip}"));
            }
            let first = format!("{ip}/{prefix}");
            ips.retain(|other| *other != first);
            ips.insert(0, first);
            (Some(ip), ips)
        }
        (None, ips) => {
            let first = ips.iter().find(|ip| *ip == "dhcp" || !ip.contains(':'));
            let (ip, prefix) = match first.map(|ip| (ip, ip.split_once('/'))) {
                Some((_, Some((ip, prefix)))) => (Some(ip.to_owned()), prefix.parse().ok()),
                Some((ip, None)) if ip == "dhcp" || ip == "addrconf" => (Some(ip.clone()), None),
                Some((_, None)) => return Err(format!("Missing .netmask option for NIC: {shown}")),
                None => (None, None),
            };
            if let Some(prefix) = prefix {
                nic.insert("netmask".into(), mask_of(prefix).to_string().into());
            }
            (ip, ips)
        }
    };
    if let Some(ip) = ip {
        nic.insert("ip".into(), ip.into());
        nic.insert("ips".into(), ips.into());
    }
    let mut all: Vec<String> = gateway.iter().cloned().collect();
    all.extend(gateways.into_iter().filter(|g| Some(g) != gateway.as_ref()));
    if let Some(first) = all.first() {
        nic.insert("gateway".into(), first.clone().into());
        nic.insert("gateways".into(), all.into());
    }
    Ok(())
}

/// First octet `[1-f]2`, the others not zero.
fn random_mac() -> String {
    let random = uuid::Uuid::new_v4();
    let [a, b, c, d, e, f, ..] = random.into_bytes();
    let octets = [b, c, d, e, f].map(|octet| format!("{:02x}", octet.max(1)));
    format!("{:x}2:{}", (a & 0xf).max(1), octets.join(":"))
}

/// Whether another machine has an address, or a port of the screen, of this one.
pub(super) fn conflicts(doc: &Object, nics: &[Object], world: &World) -> Result<(), String> {
    const WHY: &str = "Conflict detected with another vm, please check the MAC, IP, and VRID";
    let uuid = text(doc, "uuid");
    for other in world.others.iter().filter(|other| text(other, "uuid") != uuid) {
        let holder = text(other, "uuid").unwrap_or("");
        let port = number(doc, "vnc_port").filter(|port| *port > 0);
        if port.is_some() && port == number(other, "vnc_port") {
            let port = port.unwrap_or(0);
            return Err(format!("{WHY} (vnc_port {port} belongs to {holder})"));
        }
        for theirs in super::values::objects(other, "nics") {
            for nic in nics {
                let place = |nic: &Object| {
                    let vlan = number(nic, "vlan_id").unwrap_or(0);
                    (text(nic, "nic_tag").map(str::to_owned), vlan)
                };
                if place(nic) != place(&theirs) {
                    continue;
                }
                let vrid = |nic: &Object| number(nic, "vrrp_vrid");
                let mac = text(nic, "mac").filter(|mac| text(&theirs, "mac") == Some(mac));
                let ip = address(nic).filter(|ip| address(&theirs) == Some(*ip));
                if let Some(what) = mac
                    .map(|mac| format!("MAC {mac}"))
                    .or(ip.map(|ip| format!("IP {ip}")))
                    .or(vrid(nic)
                        .filter(|v| vrid(&theirs) == Some(*v))
                        .map(|v| format!("VRID {v}")))
                {
                    return Err(format!("{WHY} ({what} belongs to {holder})"));
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::build::tests::{make, object, world};
    use super::*;

    const SEED: &str = r#"{"brand":"kvm","vcpus":1,"autoboot":false,"ram":1024,
        "resolvers":["208.67.222.222","208.67.220.220"],
        "disks":[{"boot":true,"model":"virtio","size":40960}],
        "nics":[{"nic_tag":"admin","model":"virtio","ip":"10.88.88.51","netmask":"255.255.255.0",
        "gateway":"10.88.88.1","primary":1}]}"#;

    fn with(nics: &str) -> Result<Vec<Object>, String> {
        let doc = make(&format!(r#"{{"brand":"kvm","nics":{nics}}}"#))?;
        Ok(super::super::values::objects(&doc, "nics"))
    }

    #[test]
    fn case_1_the_guides_interface_in_both_forms() {
        let doc = make(SEED).unwrap();
        assert_eq!(doc["max_physical_memory"], 2048);
        let nic = doc["nics"][0].as_object().unwrap();
        assert_eq!(nic["primary"], true);
        assert_eq!(nic["interface"], "net0");
        assert_eq!(texts(nic, "ips"), ["10.88.88.51/24"]);
        assert_eq!(texts(nic, "gateways"), ["10.88.88.1"]);
        let mac = text(nic, "mac").unwrap();
        assert!(mac.as_bytes()[1] == b'2' && !mac.contains("00:"), "{mac}");
        let cidr = with(r#"[{"nic_tag":"admin","model":"virtio","ips":["10.1.2.3/20"]}]"#).unwrap();
        assert_eq!(cidr[0]["ip"], "10.1.2.3");
        assert_eq!(cidr[0]["netmask"], "255.255.240.0");
    }

    #[test]
    fn cases_49_to_54_interfaces_that_cannot_be() {
        let a = r#""nic_tag":"admin","model":"virtio""#;
        for (nics, why) in [
            (format!(r#"[{{{a},"ip":"10.0.0.1"}}]"#), "Missing .netmask option for NIC: "),
            (
                format!(r#"[{{{a},"ip":"10.0.0.1","netmask":"255.0.255.0"}}]"#),
                "Specified netmask value is invalid: 255.0.255.0",
            ),
            (r#"[{"nic_tag":"admin"}]"#.into(), "missing .model option for NIC: "),
            (r#"[{"model":"virtio"}]"#.into(), "invalid or missing .nic_tag option for NIC: "),
            (
                r#"[{"nic_tag":"does_not_exist","model":"virtio"}]"#.into(),
                "Invalid nic tag \"does_not_exist\"; known are admin, external",
            ),
            (
                format!(
                    r#"[{{{a},"primary":true}},{{{a},"primary":true}},{{{a},"primary":true}}]"#
                ),
                "payload specifies more than 1 primary NIC",
            ),
            (
                format!(r#"[{{{a},"mac":"2:8:20:a:b:c"}},{{{a},"mac":"02:08:20:0a:0b:0c"}}]"#),
                "Cannot add multiple NICs with the same MAC: 02:08:20:0a:0b:0c",
            ),
            (
                format!(
                    r#"[{{{a},"ips":["10.0.0.1/8"]}},
                       {{{a},"ip":"10.0.0.1","netmask":"255.0.0.0"}}]"#
                ),
                "Cannot add multiple NICs with the same IP: 10.0.0.1",
            ),
        ] {
            let said = with(&nics).unwrap_err();
            assert!(said.starts_with(why), "{said}");
        }
        let dhcp = with(&format!(r#"[{{{a},"ip":"dhcp"}}]"#)).unwrap();
        assert_eq!(texts(&dhcp[0], "ips"), ["dhcp"]);
        let driver = r#"{"brand":"kvm","nic_driver":"e1000","nics":[{"nic_tag":"admin"}]}"#;
        assert_eq!(make(driver).unwrap()["nics"][0]["model"], "e1000");
        let first = with(&format!("[{{{a}}},{{{a}}},{{{a}}}]")).unwrap();
        assert!(is_true(&first[0], "primary") && !first[1].contains_key("primary"));
    }

    #[test]
    fn case_55_what_another_machine_has() {
        let mut world = world();
        world.others.push(object(
            r#"{"uuid":"x","vnc_port":12345,"nics":[{"nic_tag":"admin","mac":"02:08:20:0a:0b:0c",
            "ip":"10.0.0.1","vrrp_vrid":7}]}"#,
        ));
        let check = |doc: &str, nic: &str| conflicts(&object(doc), &[object(nic)], &world);
        let none = r#"{"nic_tag":"external"}"#;
        assert!(check(r#"{"vnc_port":12345}"#, none).unwrap_err().contains("vnc_port 12345"));
        for nic in [
            r#"{"nic_tag":"admin","mac":"02:08:20:0a:0b:0c"}"#,
            r#"{"nic_tag":"admin","ip":"10.0.0.1"}"#,
            r#"{"nic_tag":"admin","vrrp_vrid":7}"#,
        ] {
            assert!(check("{}", nic).unwrap_err().starts_with("Conflict detected"), "{nic}");
        }
        let elsewhere = r#"{"nic_tag":"admin","vlan_id":5,"ip":"10.0.0.1"}"#;
        assert_eq!(check("{}", elsewhere), Ok(()));
    }
}
