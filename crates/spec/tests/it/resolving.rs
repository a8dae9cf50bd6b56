//! `resolve`: all problems together, defaults, and drafts that come back unchanged.

use expect_test::expect;
use lodge_spec::draft::{CpusDraft, DiskDraft, NicDraft, PortDraft, Size};
use lodge_spec::machine::{Boot, DiskSource, Machine};
use lodge_spec::resolve::{Defaults, resolve};
use lodge_spec::{Bytes, Draft, Problems, document};
use proptest::prelude::*;

fn machine(text: &str) -> Result<Machine, Problems> {
    let id = "b8ab5fc1-8576-45ef-bb51-9826b52a4651".parse().unwrap();
    resolve(document::parse(text)?, Defaults { id })
}

fn check(text: &str, problems: expect_test::Expect) {
    problems.assert_eq(&machine(text).unwrap_err().to_string());
}

#[test]
fn every_fault_is_reported_at_once() {
    check(
        "name: -x\nuuid: '12'\ncpus: {count: 4, max: 2}\nmemory: 3\nimage: ../x\n\
         boot: {initrd: i, firmware: cmos, order: [disk, tape]}\n\
         disks: [{size: 5}, {source: rel, image: x}, {}, {name: disk0, size: 1G}]\n\
         nics: [{mac: '01:00:00:00:00:01', model: ne2000, network: much-too-long}]\n\
         ports: ['1', '0:2', '70000:1', '5:6/sctp']\nready: sometime\nbackend: bochs\n\
         restart: perhaps\nhostname: a..b\nresolvers: [x]\n\
         files: [{path: a, content: x}, {path: /a/../b, content: x}, {path: /c}]\n\
         limits: {cpu_weight: 0}\nssh_keys: [x]\n",
        expect![[r#"
            uuid: "12" is not a UUID (8-4-4-4-12 hex digits)
            name: "-x" is not a machine name (1 to 63 letters, digits and inner hyphens)
            image: "../x" is not an image name (letters, digits and . _ - + :, a letter or digit first)
            cpus.max: 2 is less than the 4 CPUs at boot
            memory.size: 3 is out of range; 1MiB to 4TiB is possible
            memory.size: 3 is not a whole number of MiB
            memory.max: 3 is out of range; 1MiB to 4TiB is possible
            memory.max: 3 is not a whole number of MiB
            boot.initrd: an initrd needs `boot.kernel`
            boot.order[1]: "tape" is not known here; known are disk, cdrom, network
            boot.firmware: "cmos" is not known here; known are bios, uefi
            disks[0].size: 5 is out of range; 1MiB to 64TiB is possible
            disks[0].size: 5 is not a whole number of 512-byte sectors
            disks[1].image: a disk comes from `source` or from `image`, not from both
            disks[2]: a disk needs a `source`, an `image` or a `size`
            nics[0].network: "much-too-long" is not a network name (1 to 11 letters, digits and inner hyphens)
            nics[0].model: "ne2000" is not known here; known are virtio, e1000, rtl8139
            nics[0].mac: "01:00:00:00:00:01" is not a unicast Ethernet address (six hex octets with colons)
            ports[0]: "1" is not [IP:]HOST:GUEST[/udp]
            ports[1].host: 0 is not a port; 1 to 65535 is possible
            ports[2].host: 70000 is not a port; 1 to 65535 is possible
            ports[3].protocol: "sctp" is not known here; known are tcp, udp
            files[0].path: "a" is not an absolute path of a file in the guest
            files[1].path: "/a/../b" is not an absolute path of a file in the guest
            files[2]: a file needs either `source` or `content`
            disks: disk0 appears twice
            ports: a machine without interfaces on a network has no ports to lead to
            ready: "sometime" is not console:REGEX, port:N or dhcp
            hostname: "a..b" is not a host name
            ssh_keys[0]: this is not one line of a public SSH key
            resolvers[0]: invalid IPv4 address syntax
            restart.policy: "perhaps" is not known here; known are never, on-failure, always
            backend: "bochs" is not known here; known are qemu, firecracker, cloud-hypervisor
            limits.cpu_weight: 0 is out of range; 1 to 10000 is possible"#]],
    );
}

#[test]
fn an_empty_document_is_a_machine() {
    let machine = machine("{}").unwrap();
    assert_eq!(machine.name.as_str(), "m-b8ab5fc1");
    assert_eq!(machine.memory.size, Bytes::mib(512));
    assert_eq!(machine.nics.len(), 1);
    assert!(matches!(machine.boot, Boot::Firmware { .. }));
}

#[test]
fn an_image_brings_its_disk_first() {
    let machine = machine("{image: debian-12, image_size: 4GB, disks: [{size: 1GB}]}").unwrap();
    let names: Vec<_> = machine.disks.iter().map(|d| d.name.as_str()).collect();
    assert_eq!(names, ["root", "disk0"]);
    assert!(matches!(machine.disks[0].source, DiskSource::Image { size: Some(_), .. }));
}

#[test]
fn private_keys_are_not_taken() {
    let text = "{ssh_keys: ['-----BEGIN OPENSSH PRIVATE KEY----- b3Bl']}";
    check(text, expect!["ssh_keys[0]: this is a private key; give the public one"]);
}

#[test]
fn ports_as_people_write_them() {
    let machine = machine("{ports: ['2222:22', '0.0.0.0:80:8080', '[::1]:53:53/udp']}").unwrap();
    let ports: Vec<_> = machine.ports.iter().map(ToString::to_string).collect();
    assert_eq!(ports, ["127.0.0.1:2222:22/tcp", "0.0.0.0:80:8080/tcp", "[::1]:53:53/udp"]);
}

fn drafts() -> impl Strategy<Value = Draft> {
    let disk = (1u64..64, any::<bool>(), prop::sample::select(vec!["virtio", "scsi"])).prop_map(
        |(gib, read_only, bus)| DiskDraft {
            size: Some(Size::Bytes(gib << 30)),
            read_only: Some(read_only),
            bus: Some(bus.into()),
            ..DiskDraft::default()
        },
    );
    let nic = prop::sample::select(vec!["virtio", "e1000"])
        .prop_map(|model| NicDraft { model: Some(model.into()), ..NicDraft::default() });
    (
        prop::option::of("[a-z][a-z0-9]{0,20}"),
        1u32..=8,
        prop::collection::vec(disk, 0..4),
        prop::collection::vec(nic, 1..4),
        prop::option::of(Just("debian-12".to_owned())),
        prop::option::of(Just("dhcp".to_owned())),
        1u16..,
    )
        .prop_map(|(name, cpus, disks, nics, image, ready, port)| Draft {
            name,
            cpus: Some(CpusDraft::Count(cpus)),
            disks: Some(disks),
            nics: Some(nics),
            image,
            ready,
            ports: Some(vec![PortDraft::Text(format!("{port}:22"))]),
            ..Draft::default()
        })
}

proptest! {
    /// What the store keeps is the machine: rendering and resolving changes nothing.
    #[test]
    fn a_rendered_machine_resolves_to_itself(draft in drafts()) {
        let id = "b8ab5fc1-8576-45ef-bb51-9826b52a4651".parse().unwrap();
        let other = "00000000-0000-4000-8000-000000000001".parse().unwrap();
        let machine = resolve(draft, Defaults { id }).unwrap();
        let text = serde_json::to_string(&machine.to_draft()).unwrap();
        let again = resolve(document::parse(&text).unwrap(), Defaults { id: other }).unwrap();
        prop_assert_eq!(again, machine);
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in ".{0,200}") {
        let _ = document::parse(&text);
    }
}
