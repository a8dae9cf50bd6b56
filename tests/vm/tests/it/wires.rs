//! Machines on links of the host: bridges, interfaces shared or given away, VXLANs, VLANs; each in
//! namespaces that stand for hosts.

use std::process::Output;

use lodge_vm_tests::namespace::Namespace;
use lodge_vm_tests::python::must;
use lodge_vm_tests::zero_os::Door;
use lodge_vm_tests::{Lab, assets, need};
use serde_json::{Value, json};

/// A host and another, with a cable between them.
struct Cable {
    host: Namespace,
    other: Namespace,
}

impl Cable {
    fn new(name: &str) -> Self {
        let (host, other) = (Namespace::new(name), Namespace::new(&format!("{name}-far")));
        host.ip(&format!("link add eth0 type veth peer name eth0 netns {}", other.name()));
        for end in [&host, &other] {
            end.ip("link set eth0 up");
        }
        Self { host, other }
    }
}

fn start(lab: &Lab, name: &str, wire: &str, address: &str) -> Output {
    let kernel = assets::probe();
    let text = format!(
        "name: {name}\nbackend: qemu\naccel: tcg\nmemory: 64MiB\nready: console:GUEST-READY\n\
         boot: {{kernel: {kernel}, cmdline: probe.ip={address}}}\nnics: [{{wire: '{wire}'}}]\n"
    );
    let file = lab.home().join(format!("{name}.yaml"));
    std::fs::write(&file, text).unwrap();
    let created = lab.run(&["create", file.to_str().unwrap()]);
    match created.status.success() {
        true => lab.run(&["start", name, "--wait", "ready", "--timeout", "60"]),
        false => created,
    }
}

/// Names of the interfaces of a host.
fn links(host: &Namespace) -> Vec<String> {
    let told = host.try_ip("-j link show");
    let told: Value = serde_json::from_str(&must(told)).unwrap();
    let mut names: Vec<String> = told
        .as_array()
        .unwrap()
        .iter()
        .map(|link| link["ifname"].as_str().unwrap().to_owned())
        .filter(|name| !name.contains('-'))
        .collect();
    names.sort();
    names
}

#[test]
fn a_bridge_of_the_host_is_joined() {
    let cable = Cable::new("bridge");
    let lab = Lab::within(&cable.host);
    let said = start(&lab, "none", "bridge:lan0", "10.77.0.9");
    assert!(String::from_utf8_lossy(&said.stderr).contains("bridge 'lan0' not found"), "{said:?}");
    cable.host.ip("link add lan0 type bridge");
    cable.host.ip("link set eth0 master lan0");
    cable.host.ip("link set lan0 up");
    cable.other.ip("addr add 10.77.0.1/24 dev eth0");
    let before = links(&cable.host);
    must(Ok(start(&lab, "a", "bridge:lan0", "10.77.0.9")));
    must(Ok(start(&lab, "b", "bridge:lan0", "10.77.0.10")));
    assert!(cable.other.echoes("10.77.0.9") && cable.other.echoes("10.77.0.10"));
    // It has no address that Lodge knows of, and no port leads to it.
    assert_eq!(lab.machine("a")["address"], Value::Null);
    lab.ok(&["inspect", "a"]);
    lab.kill_daemon();
    assert!(cable.other.echoes("10.77.0.9"));
    for name in ["a", "b"] {
        lab.ok(&["stop", "--force", name]);
    }
    lab.until("the port's end", || links(&cable.host) == before);
}

#[test]
fn an_interface_is_shared_or_given_away() {
    let cable = Cable::new("shared");
    cable.host.ip("addr add 10.77.1.2/24 dev eth0");
    cable.other.ip("addr add 10.77.1.1/24 dev eth0");
    let lab = Lab::within(&cable.host);
    for (name, address) in [("a", "10.77.1.9"), ("b", "10.77.1.10")] {
        must(Ok(start(&lab, name, "macvlan:eth0", address)));
        assert!(cable.other.echoes(address), "{address}");
    }
    assert!(cable.other.echoes("10.77.1.9"));
    // Whoever has it whole has it alone.
    let said = start(&lab, "c", "passthrough:eth0", "10.77.1.11");
    assert!(!said.status.success(), "{said:?}");
    for name in ["a", "b"] {
        lab.ok(&["stop", "--force", name]);
    }
    lab.until("the interface", || lab.run(&["start", "c", "--wait", "ready"]).status.success());
    assert!(cable.other.echoes("10.77.1.11"));
    assert!(!cable.other.echoes("10.77.1.9"));
    let said = start(&lab, "d", "macvlan:eth9", "10.77.1.12");
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("interface 'eth9' not found"), "{said}");
}

/// As soon as the guest has let go of it, not only when the machine ends.
#[test]
fn what_is_taken_away_is_given_back() {
    let cable = Cable::new("back");
    let lab = Lab::within(&cable.host);
    let (kernel, initrd) = (assets::kernel(), assets::shell());
    let text = format!(
        "name: a\nboard: pc\nmemory: 256MiB\nready: console:GUEST-READY\n\
         nics: [{{wire: 'passthrough:eth0', mac: '52:54:00:77:05:01'}}]\n\
         boot: {{kernel: {kernel}, initrd: {initrd}, cmdline: console=ttyS0 quiet cryptomgr.notests}}\n"
    );
    let file = lab.home().join("a.yaml");
    std::fs::write(&file, text).unwrap();
    lab.ok(&["create", file.to_str().unwrap()]);
    lab.ok(&["start", "a", "--wait", "ready", "--timeout", "170"]);
    // Whoever has it whole does not share it.
    assert!(!start(&lab, "b", "macvlan:eth0", "10.77.5.9").status.success());
    lab.ok(&["set", "a", "--remove-nic", "nic0"]);
    lab.until("the link", || lab.run(&["start", "b", "--wait", "ready"]).status.success());
    assert!(!lab.run(&["set", "a", "--add-nic", "passthrough:eth0"]).status.success());
    lab.ok(&["stop", "b", "--force"]);
    let add = || lab.run(&["set", "a", "--add-nic", "passthrough:eth0"]).status.success();
    lab.until("the link again", add);
}

#[test]
fn a_vxlan_crosses_to_another_host() {
    let cable = Cable::new("vxlan");
    for (end, last) in [(&cable.host, 1), (&cable.other, 2)] {
        end.ip(&format!("addr add 10.78.0.{last}/24 dev eth0"));
        end.ip("route add 239.0.0.0/8 dev eth0");
    }
    cable.other.ip("link add vx type vxlan id 7 dev eth0 group 239.0.0.7 dstport 4789");
    cable.other.ip("addr add 10.77.2.1/24 dev vx");
    cable.other.ip("link set vx up");
    let lab = Lab::within(&cable.host);
    must(Ok(start(&lab, "a", "vxlan:7@eth0", "10.77.2.9")));
    must(Ok(start(&lab, "other", "vxlan:8@eth0", "10.77.2.10")));
    assert!(cable.other.echoes("10.77.2.9"));
    assert!(!cable.other.echoes("10.77.2.10"), "another number is another net");
}

#[test]
fn a_vlan_is_one_of_many_on_a_cable() {
    let cable = Cable::new("vlan");
    let vlan = cable.other.try_ip("link add link eth0 name v7 type vlan id 7");
    need!(vlan.unwrap().status.success(), "a kernel with 802.1Q");
    cable.other.ip("addr add 10.77.3.1/24 dev v7");
    cable.other.ip("link set v7 up");
    let lab = Lab::within(&cable.host);
    must(Ok(start(&lab, "a", "vlan:7@eth0", "10.77.3.9")));
    must(Ok(start(&lab, "other", "vlan:8@eth0", "10.77.3.10")));
    assert!(cable.other.echoes("10.77.3.9"));
    assert!(!cable.other.echoes("10.77.3.10"), "another number is another net");
}

#[test]
fn zero_os_names_links_in_its_own_words() {
    let cable = Cable::new("zos");
    cable.host.ip("link add lan0 type bridge");
    cable.host.ip("addr add 10.79.0.1/24 dev eth0");
    let door = Door::of(Lab::within(&cable.host), "vxbackend = 'eth0'");
    let mut client = door.client_at(&cable.host);
    let disk = door.lab.home().join("disk.img");
    std::fs::write(&disk, assets::boot_sector("GUEST-READY\r\n")).unwrap();
    let create = |name: &str, nics: Value| {
        json!({"name": name, "cpu": 1, "memory": 64, "nics": nics,
               "media": [{"url": disk.to_str().unwrap()}]})
    };
    let none = json!([{"type": "bridge", "id": "lan9"}]);
    let (code, why) = client.error("kvm.create", create("a", none));
    assert_eq!((code, why.as_str()), (400, "bridge 'lan9' not found"));
    let none = json!([{"type": "vlan", "id": "7"}]);
    let (_, why) = client.error("kvm.create", create("a", none));
    assert_eq!(why, "ovs is needed for VLAN network type");
    let nics = json!([
        {"type": "default"}, {"type": "bridge", "id": "lan0", "hwaddr": "52:54:00:77:00:01"},
        {"type": "vxlan", "id": "7"}, {"type": "macvlan", "id": "eth0"},
    ]);
    let uuid = client.value("kvm.create", create("a", nics.clone()));
    let got = client.value("kvm.get", json!({"uuid": uuid}));
    assert_eq!(
        (got["params"]["nics"].as_array().unwrap().len(), &got["state"]),
        (4, &json!("running"))
    );
    let info = client.value("kvm.info", json!({"uuid": uuid}));
    assert_eq!(info["Net"].as_array().unwrap().len(), 4, "{info}");
    let nic = |kind: &str, id: &str| json!({"uuid": uuid, "type": kind, "id": id});
    let (_, why) = client.error("kvm.add_nic", nic("bridge", "lan0"));
    assert_eq!(why, "This nic is already attached to the vm");
    let (_, why) = client.error("kvm.remove_nic", nic("bridge", "lan9"));
    assert_eq!(why, "The nic you tried is not attached to the vm");
    // More come while the machine runs.
    for id in ["lan1", "lan2"] {
        cable.host.ip(&format!("link add {id} type bridge"));
        assert_eq!(client.value("kvm.add_nic", nic("bridge", id)), Value::Null, "{id}");
    }
    let got = client.value("kvm.get", json!({"uuid": uuid}));
    let ids = got["params"]["nics"].as_array().unwrap().iter().map(|nic| &nic["id"]);
    assert_eq!(ids.collect::<Vec<_>>(), ["", "lan0", "7", "eth0", "lan1", "lan2"]);
    assert_eq!(got["ifctargets"].as_array().unwrap().len(), 6, "{got}");
    let info = client.value("kvm.info", json!({"uuid": uuid}));
    assert_eq!(info["Net"].as_array().unwrap().len(), 6, "{info}");
    let ports = links(&cable.host).iter().filter(|name| name.starts_with("lg")).count();
    assert_eq!(ports, 3, "one for each bridge that is joined");
    client.value("kvm.destroy", json!({"uuid": uuid}));
    assert_eq!(client.value("kvm.list", json!({})), json!([]));
}
