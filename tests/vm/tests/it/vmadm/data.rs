//! Metadata over the second serial port, asked for by a guest.

use lodge_formats::mdata::frame;
use lodge_vm_tests::vmadm::Vmadm;
use lodge_vm_tests::{assets, need};
use serde_json::json;

const UUID: &str = "b8ab5fc1-8576-45ef-bb51-9826b52a4651";

/// Asks line after line, says each answer, and then is a shell with `ask` for more.
fn asking(lines: &[String]) -> String {
    let mut script = String::from(
        "stty -F /dev/ttyS1 raw -echo\nexec 3<>/dev/ttyS1\n\
         ask() { printf '%s\\n' \"$1\" >&3; line=; IFS= read -r -t 4 line <&3; \
         echo \"MD{$1}={$line}\"; }\n\
         first() { printf '%s\\n' GET\\ \"$1\" >&3; IFS= read -r -t 4 line <&3; \
         IFS= read -r -t 4 value <&3; IFS= read -r -t 4 end <&3; echo \"V1{$1}={$line,$value,$end}\"; }\n",
    );
    for line in lines {
        script += &format!("ask '{line}'\n");
    }
    script
        + "first greeting\necho GUEST-READY\nwhile IFS= read -r typed; do eval \"$typed\"; done\n"
}

fn v2(body: &str) -> String {
    String::from_utf8(frame(body)).unwrap().trim_end().to_owned()
}

fn b64(text: &str) -> String {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in text.as_bytes().chunks(3) {
        let bits = chunk.iter().fold(0_u32, |bits, b| bits << 8 | u32::from(*b))
            << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let letter = LETTERS[(bits >> (18 - 6 * i) & 63) as usize] as char;
            out.push(if i <= chunk.len() { letter } else { '=' });
        }
    }
    out
}

#[test]
fn cases_82_to_88_a_guest_reads_and_writes() {
    let put = |key: &str, value: &str| {
        v2(&format!("0badcafe PUT {}", b64(&format!("{} {}", b64(key), b64(value)))))
    };
    let lines = [
        String::new(),
        "NEGOTIATE V2".into(),
        "V2 25 3a426b73 deadbeef GET c2RjOnV1aWQ=".into(),
        "V2 25 3a426b74 deadbeef GET c2RjOnV1aWQ=".into(),
        v2(&format!("deadbeef GET {}", b64("nokey"))),
        put("k", "v"),
        put("foo:bar", "mine"),
        v2(&format!("deadbeef GET {}", b64("sdc:vnc_password"))),
        v2("00c0ffee KEYS"),
    ];
    let iso = assets::bootable(&assets::guest(&asking(&lines)), "");
    need!(iso.is_some(), "isolinux");
    let v = Vmadm::new();
    let uuid = v.create(&format!(
        r#"{{"brand":"kvm","uuid":"{UUID}","autoboot":false,"ram":512,"boot":"order=d",
        "vnc_password":"secret","customer_metadata":{{"greeting":"hello"}},
        "internal_metadata":{{"foo:bar":"i","hidden":"x"}},"internal_metadata_namespaces":"baz,foo",
        "disks":[{{"media":"cdrom","path":"/i.iso","model":"ide"}}]}}"#
    ));
    v.bring(&uuid, &iso.unwrap(), "i.iso");
    v.ok(&["start", &uuid]);
    let said = v.console(&uuid, "GUEST-READY");
    let answer = |asked: &str| {
        let line = said.lines().find_map(|l| l.strip_prefix(&format!("MD{{{asked}}}={{")));
        let line = line.unwrap_or_else(|| panic!("no answer to {asked} in {said}"));
        line.trim_end().trim_end_matches('}').to_owned()
    };
    assert_eq!(answer(&lines[0]), "invalid command");
    assert_eq!(answer(&lines[1]), "V2_OK");
    assert_eq!(
        answer(&lines[2]),
        "V2 65 4b635364 deadbeef SUCCESS YjhhYjVmYzEtODU3Ni00NWVmLWJiNTEtOTgyNmI1MmE0NjUx"
    );
    assert_eq!(answer(&lines[3]), "", "a damaged frame has no answer, and the next one has");
    assert_eq!(answer(&lines[4]), "V2 17 3dc88642 deadbeef NOTFOUND");
    assert_eq!(answer(&lines[5]), v2("0badcafe SUCCESS T0s="));
    let refused = b64("Cannot update the \"foo\" Namespace.");
    assert_eq!(answer(&lines[6]), v2(&format!("0badcafe FAILURE {refused}")));
    assert_eq!(answer(&lines[7]), "V2 17 3dc88642 deadbeef NOTFOUND");
    let keys = b64("greeting\nk\nfoo:bar");
    assert_eq!(answer(&lines[8]), v2(&format!("00c0ffee SUCCESS {keys}")));
    assert!(said.contains("V1{greeting}={SUCCESS,hello,.}"), "{said}");
    v.lab.until("what the guest wrote", || v.get(&uuid)["customer_metadata"]["k"] == "v");
    // What the host changes is seen at once, also after its daemon was killed.
    v.lab.kill_daemon();
    v.feed(&["update", &uuid], r#"{"set_customer_metadata":{"greeting":"anew"}}"#);
    v.lab.type_and_see(&uuid, "first greeting\n", "V1{greeting}={SUCCESS,anew,.}");
    assert_eq!(v.get(&uuid)["customer_metadata"], json!({"greeting": "anew", "k": "v"}));
    // What the guest writes while there is no daemon is kept for the next one.
    v.lab.kill_daemon();
    let mut console = std::os::unix::net::UnixStream::connect(
        v.lab.home().join("run/m").join(UUID.replace('-', "")).join("console.sock"),
    )
    .unwrap();
    let typed = format!("ask '{}'\n", put("late", "news"));
    std::io::Write::write_all(&mut console, typed.as_bytes()).unwrap();
    let log = v.lab.home().join("machines").join(UUID).join("console.log");
    v.lab.until("the answer", || {
        let log = std::fs::read(&log).unwrap();
        String::from_utf8_lossy(&log).matches("0badcafe SUCCESS T0s=").count() > 1
    });
    v.lab.until("the late news", || v.get(&uuid)["customer_metadata"]["late"] == "news");
    flood(&v, &uuid);
    v.ok(&["delete", &uuid]);
}

/// A line without end costs no memory, and the next one is answered.
fn flood(v: &Vmadm, uuid: &str) {
    let warden = || {
        let pid = v.lab.pid_of_hypervisor(uuid);
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let parent = stat.rsplit(") ").next().unwrap().split(' ').nth(1).unwrap().to_owned();
        let status = std::fs::read_to_string(format!("/proc/{parent}/status")).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap().to_owned();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    let before = warden();
    v.lab.type_and_see(
        uuid,
        "head -c 3000000 /dev/zero | tr '\\0' x >&3; echo SENT-$((1+1))\n",
        "SENT-2",
    );
    v.lab.type_and_see(uuid, "ask ''\nask 'NEGOTIATE V2'\n", "MD{NEGOTIATE V2}={V2_OK}");
    let after = warden();
    assert!(after < before + 8192, "{before} KiB became {after} KiB");
}

/// Debian's cloud-init finds the channel by itself and does what it is told over it.
#[test]
fn a_guest_with_cloud_init_configures_itself() {
    let v = Vmadm::new();
    assets::debian_with(v.lab.home(), "cloud-init");
    let image = v.lab.json(&["image", "inspect", "debian-12"])["uuid"].as_str().unwrap().to_owned();
    let document = json!({
        "brand": "kvm", "autoboot": false, "ram": 1024, "vcpus": 2, "hostname": "cloudy",
        "resolvers": ["10.88.88.1"],
        "disks": [{"image_uuid": image, "boot": true, "model": "virtio"}],
        "nics": [{"nic_tag": "admin", "model": "virtio", "ip": "10.88.88.60",
            "netmask": "255.255.255.0", "gateway": "10.88.88.1", "primary": true}],
        "customer_metadata": {
            "root_authorized_keys": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAtestkey somebody@home",
            // Through the kernel's log: a login prompt that takes the terminal over loses lines.
            "user-script": "#!/bin/sh\nsay() { echo \"<0>$*\" > /dev/kmsg; }\n\
                say SCRIPT host=$(hostname)\n\
                say ADDRESS $(ip -4 -o addr show scope global)\n\
                say KEYS $(grep -l testkey /home/*/.ssh/authorized_keys /root/.ssh/authorized_keys)\n",
        },
    });
    let uuid = v.create(&document.to_string());
    v.ok(&["start", &uuid]);
    let said = v.console(&uuid, "Datasource DataSourceSmartOS");
    let line = |name: &str| {
        let found = said.lines().find_map(|l| Some(l.trim_end().split_once(name)?.1));
        found.unwrap_or_else(|| panic!("no {name} in {said}")).to_owned()
    };
    assert_eq!(line("SCRIPT "), "host=cloudy");
    assert!(line("ADDRESS ").contains("10.88.88.60/24"), "{said}");
    assert!(line("KEYS ").contains("authorized_keys"), "{said}");
    v.ok(&["stop", &uuid, "-F"]);
    v.ok(&["delete", &uuid]);
}

/// The brand without DHCP: everything comes from a disk, the address included.
#[test]
fn a_guest_of_the_brand_bhyve_configures_itself_from_a_disk() {
    let v = Vmadm::new();
    assets::debian_with(v.lab.home(), "cloud-init");
    let image = v.lab.json(&["image", "inspect", "debian-12"])["uuid"].as_str().unwrap().to_owned();
    let document = json!({
        "brand": "bhyve", "autoboot": false, "ram": 1024, "vcpus": 2, "alias": "dusty",
        "disks": [{"image_uuid": image, "boot": true, "model": "virtio"}],
        "nics": [{"nic_tag": "admin", "ip": "10.88.88.61",
            "netmask": "255.255.255.0", "gateway": "10.88.88.1", "primary": true}],
        "internal_metadata": {"cloudinit_datasource": "nocloud"},
        "customer_metadata": {
            "cloud-init:user-data": "#cloud-config\nruncmd:\n\
                - [sh, -c, 'echo \"<0>RUN host=$(hostname) $(ip -4 -o addr show scope global)\" > /dev/kmsg']\n",
        },
    });
    let uuid = v.create(&document.to_string());
    v.ok(&["start", &uuid]);
    let said = v.console(&uuid, "Datasource DataSourceNoCloud");
    let run = said.lines().find(|line| line.contains("RUN host=")).unwrap_or(&said);
    assert!(run.contains("host=dusty"), "{run}");
    assert!(run.contains("10.88.88.61/24"), "{run}");
    v.ok(&["stop", &uuid, "-F"]);
    v.ok(&["delete", &uuid]);
}
