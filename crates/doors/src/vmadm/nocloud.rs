//! What cloud-init's NoCloud reads from a disk, for machines whose owner chose it over the serial
//! port: `cloudinit_datasource` among the internal metadata. Pure.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::build::Metadata;
use super::values::{Object, is_true, objects, text, texts};

/// The files by name; `None` where the machine does not take them from there.
pub(super) fn files(doc: &Object, metadata: &Metadata) -> Option<BTreeMap<String, String>> {
    let source = metadata.internal.get("cloudinit_datasource").and_then(Value::as_str);
    if source != Some("nocloud") {
        return None;
    }
    let uuid = text(doc, "uuid").unwrap_or("");
    let hostname = text(doc, "hostname").or(text(doc, "alias")).unwrap_or(uuid);
    let own = |name: &str| {
        let key = format!("cloud-init:{name}");
        metadata.customer.get(&key).and_then(Value::as_str).map(str::to_owned)
    };
    let meta = json!({"instance-id": uuid, "local-hostname": hostname});
    let empty = || "#cloud-config\n{}\n".to_owned();
    let files = [
        ("meta-data", own("meta-data").unwrap_or_else(|| meta.to_string() + "\n")),
        (
            "network-config",
            own("network-config").unwrap_or_else(|| network(doc).to_string() + "\n"),
        ),
        ("user-data", own("user-data").unwrap_or_else(empty)),
        ("vendor-data", own("vendor-data").unwrap_or_else(empty)),
    ];
    Some(files.map(|(name, text)| (name.to_owned(), text)).into())
}

/// Version 2; what is JSON is YAML.
fn network(doc: &Object) -> Value {
    let mut ethernets = serde_json::Map::new();
    for nic in objects(doc, "nics") {
        let (mut fixed, mut entry) = (Vec::new(), serde_json::Map::new());
        for ip in texts(&nic, "ips") {
            match ip.as_str() {
                "dhcp" => drop(entry.insert("dhcp4".into(), true.into())),
                "addrconf" => drop(entry.insert("accept-ra".into(), true.into())),
                _ => fixed.push(ip),
            }
        }
        if texts(&nic, "ips").is_empty() {
            entry.insert("dhcp4".into(), true.into());
        }
        entry.insert("match".into(), json!({"macaddress": text(&nic, "mac")}));
        entry.insert("set-name".into(), json!(text(&nic, "interface")));
        if !fixed.is_empty() {
            entry.insert("addresses".into(), json!(fixed));
        }
        if is_true(&nic, "primary") {
            if let Some(gateway) = text(&nic, "gateway") {
                entry.insert("gateway4".into(), gateway.into());
            }
            let resolvers = texts(doc, "resolvers");
            if !resolvers.is_empty() {
                entry.insert("nameservers".into(), json!({"addresses": resolvers}));
            }
        }
        let name = text(&nic, "interface").unwrap_or("net0").to_owned();
        ethernets.insert(name, Value::Object(entry));
    }
    json!({"version": 2, "ethernets": ethernets})
}

#[cfg(test)]
mod tests {
    use super::super::build::tests::{make, object};
    use super::*;

    #[test]
    fn files_follow_the_machine_and_its_owner() {
        let doc = make(
            r#"{"brand":"bhyve","alias":"web","resolvers":["1.1.1.1"],"nics":[{"nic_tag":"admin",
            "ip":"10.0.0.5","netmask":"255.0.0.0","gateway":"10.0.0.1"},{"nic_tag":"admin","ip":"dhcp"}]}"#,
        )
        .unwrap();
        let mut metadata = Metadata::default();
        assert_eq!(files(&doc, &metadata), None);
        metadata.internal = object(r#"{"cloudinit_datasource":"nocloud"}"#);
        metadata.customer = object(r##"{"cloud-init:user-data":"#cloud-config\nruncmd: [ls]\n"}"##);
        let files = files(&doc, &metadata).unwrap();
        assert!(files["meta-data"].contains(r#""local-hostname":"web""#));
        assert_eq!(files["user-data"], "#cloud-config\nruncmd: [ls]\n");
        assert_eq!(files["vendor-data"], "#cloud-config\n{}\n");
        let network: Value = serde_json::from_str(&files["network-config"]).unwrap();
        let first = &network["ethernets"]["net0"];
        assert_eq!(first["addresses"], json!(["10.0.0.5/8"]));
        assert_eq!(first["gateway4"], "10.0.0.1");
        assert_eq!(network["ethernets"]["net1"]["dhcp4"], true);
    }
}
