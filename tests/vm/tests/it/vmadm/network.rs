//! Leases, routers, and what an interface may send, seen from inside guests.

use std::sync::atomic::{AtomicU32, Ordering};

use lodge_vm_tests::vmadm::Vmadm;
use lodge_vm_tests::{assets, need};
use serde_json::json;

/// Takes an address, says what it was told, serves a page, and then is a shell.
const GUEST: &str = "printf '#!/bin/sh\\n[ \"$1\" = bound ] || exit 0\\nip addr add $ip/24 dev $interface\\n\
    [ -n \"$router\" ] && ip route add default via $router\\n\
    echo \"LEASE ip=$ip router=$router dns=$dns lease=$lease server=$serverid host=$hostname\"\\n' \
    | sed 's/^[ ]*//' > /d\nchmod +x /d\nip link set lo up\nip link set eth0 up\n\
    udhcpc -q -n -t 10 -T 2 -i eth0 -O hostname -s /d\nmkdir /www\necho page > /www/index.html\n\
    httpd -p 80 -h /www\necho GUEST-READY\nsh\n";

fn machine(last: u8, more: &str) -> String {
    format!(
        r#"{{"brand":"kvm","autoboot":false,"ram":256,"boot":"order=d",
        "resolvers":["208.67.222.222","208.67.220.220"],
        "disks":[{{"media":"cdrom","path":"/i.iso","model":"ide"}}],
        "nics":[{{"nic_tag":"admin","model":"virtio","ip":"10.88.88.{last}","netmask":"255.255.255.0",
        "gateway":"10.88.88.1","mac":"02:08:20:00:00:{last:02}"{more}}}]}}"#
    )
}

#[test]
fn case_89_leases_and_case_6_4_what_an_interface_may_send() {
    let iso = assets::bootable(&assets::guest(GUEST), "");
    need!(iso.is_some(), "isolinux");
    let iso = iso.unwrap();
    let v = Vmadm::new();
    let a = v.create(&machine(51, ""));
    let b = v.create(&machine(52, ""));
    let taken = v.fails(&["create"], &machine(52, ""));
    assert!(taken.starts_with("Conflict detected with another vm"), "{taken}");
    for uuid in [&a, &b] {
        v.bring(uuid, &iso, "i.iso");
        v.ok(&["start", uuid]);
    }
    let said = v.console(&a, "GUEST-READY");
    let lease = said.lines().find(|line| line.starts_with("LEASE")).unwrap_or(&said).trim();
    assert_eq!(
        lease,
        format!(
            "LEASE ip=10.88.88.51 router=10.88.88.1 dns=208.67.222.222 208.67.220.220 lease=86400 \
             server=169.254.169.254 host={a}"
        )
    );
    v.console(&b, "GUEST-READY");
    let tries = |what: &str| succeeds(&v, &a, what);
    assert!(tries("ping -c 1 -W 5 10.88.88.52"), "neighbours reach each other");
    assert!(tries("ping -c 1 -W 5 10.88.88.1"), "the router answers");
    assert!(tries("timeout 20 wget -q -O - http://10.88.88.52/"));
    tries("ip addr add 10.88.88.77/24 dev eth0");
    let foreign = "ping -c 1 -W 2 -I 10.88.88.77 10.88.88.52";
    assert!(!tries(foreign), "another address does not pass");
    let own = "02:08:20:00:00:51";
    let other_mac = "ip link set eth0 down; ip link set eth0 address 02:08:20:00:00:99; \
                     ip link set eth0 up; sleep 1; ping -c 2 -W 2 10.88.88.52";
    assert!(!tries(other_mac), "another Ethernet address does not pass");
    tries(&format!(
        "ip link set eth0 down; ip link set eth0 address {own}; ip link set eth0 up; sleep 1"
    ));
    assert!(tries("ping -c 3 -W 5 10.88.88.52"));
    let update = |change: serde_json::Value| {
        let mut nic = json!({"mac": own});
        nic.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        v.feed(&["update", &a], &json!({"update_nics": [nic]}).to_string());
    };
    // Live, without a restart.
    update(json!({"allow_ip_spoofing": true}));
    assert!(tries(foreign), "what is allowed passes at once");
    update(json!({"allow_ip_spoofing": false, "allowed_ips": ["10.88.88.77"]}));
    assert!(tries(foreign), "an address of its own passes");
    update(json!({"allowed_ips": null, "blocked_outgoing_ports": [80]}));
    assert!(!tries(foreign));
    assert!(!tries("timeout 4 wget -q -O - http://10.88.88.52/"), "a blocked port does not pass");
    assert!(tries("ping -c 1 -W 5 10.88.88.52"));
    for uuid in [&a, &b] {
        v.ok(&["delete", uuid]);
    }
}

/// Whether a command in a guest succeeds.
fn succeeds(v: &Vmadm, uuid: &str, what: &str) -> bool {
    static NTH: AtomicU32 = AtomicU32::new(0);
    let nth = NTH.fetch_add(1, Ordering::Relaxed);
    // The echo of what is typed must not look like the answer.
    let typed =
        format!("{what} > /dev/null 2>&1 && echo try-{nth}-y\"\"es || echo try-{nth}-n\"\"o\n");
    let mut console = v.lab.attach(uuid);
    std::io::Write::write_all(console.stdin.as_mut().unwrap(), typed.as_bytes()).unwrap();
    let begun = std::time::Instant::now();
    let yes = loop {
        let text = v.lab.console_text(uuid);
        if text.contains(&format!("try-{nth}-yes")) {
            break true;
        }
        if text.contains(&format!("try-{nth}-no")) {
            break false;
        }
        assert!(begun.elapsed().as_secs() < 100, "{what}: {text}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    };
    lodge_vm_tests::lab::end(console);
    yes
}

/// A guest that gives out addresses reaches nobody, until it may.
#[test]
fn only_who_may_answers_for_the_dhcp_server() {
    let iso = assets::bootable(&assets::guest(GUEST), "");
    need!(iso.is_some(), "isolinux");
    let iso = iso.unwrap();
    let v = Vmadm::new();
    let server = v.create(&machine(61, ""));
    // Nobody else answers this one.
    let client = v.create(&machine(62, "").replace("kvm", "bhyve").replace("\"ide\"", "\"ahci\""));
    for uuid in [&server, &client] {
        v.bring(uuid, &iso, "i.iso");
        v.ok(&["start", uuid]);
    }
    v.console(&server, "GUEST-READY");
    v.console(&client, "GUEST-READY");
    let serve = "printf 'start 10.88.88.70\\nend 10.88.88.75\\ninterface eth0\\nlease_file /l\\n' > /u; \
                 touch /l; udhcpd /u";
    assert!(succeeds(&v, &server, serve));
    let ask = "udhcpc -n -q -t 3 -T 3 -i eth0 -s /bin/true";
    assert!(!succeeds(&v, &client, ask), "a foreign lease reached the guest");
    let allow = r#"{"update_nics":[{"mac":"02:08:20:00:00:61","allow_dhcp_spoofing":true}]}"#;
    v.feed(&["update", &server], allow);
    assert!(succeeds(&v, &client, ask), "what is allowed does not pass");
    for uuid in [&server, &client] {
        v.ok(&["delete", uuid]);
    }
}

/// Only the primary interface is told of the world; the brand bhyve is told nothing.
#[test]
fn other_interfaces_and_brands_are_told_less() {
    let script = GUEST.replace("-i eth0 -O", "-i eth1 -O").replace("set eth0", "set eth1");
    let iso = assets::bootable(&assets::guest(&script), "");
    need!(iso.is_some(), "isolinux");
    let iso = iso.unwrap();
    let v = Vmadm::new();
    let nic = |n: u8| {
        format!(
            r#"{{"nic_tag":"external","vlan_id":5,"model":"virtio","ip":"10.9.0.{n}",
            "netmask":"255.255.0.0","gateway":"10.9.0.1"}}"#
        )
    };
    let document = |brand: &str, n: u8| {
        format!(
            r#"{{"brand":"{brand}","autoboot":false,"ram":256,"boot":"order=d",
            "disks":[{{"media":"cdrom","path":"/i.iso","model":"{}"}}],"nics":[{},{}]}}"#,
            if brand == "kvm" { "ide" } else { "ahci" },
            nic(n),
            nic(n + 1)
        )
    };
    let kvm = v.create(&document("kvm", 10));
    let bhyve = v.create(&document("bhyve", 20));
    for uuid in [&kvm, &bhyve] {
        v.bring(uuid, &iso, "i.iso");
        v.ok(&["start", uuid]);
    }
    let said = v.console(&kvm, "GUEST-READY");
    let lease = said.lines().find(|line| line.starts_with("LEASE")).unwrap_or(&said).trim();
    assert_eq!(lease, "LEASE ip=10.9.0.11 router= dns= lease=86400 server=169.254.169.254 host=");
    let said = v.console(&bhyve, "GUEST-READY");
    assert!(!said.contains("LEASE"), "{said}");
    for uuid in [&kvm, &bhyve] {
        v.ok(&["delete", uuid]);
    }
}
