//! Plans for Firecracker and Cloud Hypervisor: every option, the calls and arguments whole.

use expect_test::{Expect, expect};
use lodge_host::backend::choose::Choice;
use lodge_host::backend::vmm::VmmFacts;
use lodge_host::backend::{Launch, Step, Survey};
use lodge_host::facts::{Facts, Program};
use lodge_host::flist::prepare::Found;
use lodge_host::flist::root::Root;
use lodge_host::kvm::KvmFact;
use lodge_spec::flist::Transport;
use lodge_spec::machine::{BackendKind, DiskSource};

use crate::plans::{FAST, SLOW, facts, machine, survey};

const KERNEL: &str = "boot: {kernel: /k, initrd: /i, cmdline: console=ttyS0}";

fn with_both(kvm: KvmFact) -> Facts {
    let vmm = |path: &str, version| {
        Ok(VmmFacts { program: Program { path: path.into(), files: Vec::new() }, version })
    };
    Facts {
        firecracker: vmm("/usr/bin/firecracker", (1, 16, 1)),
        cloud_hypervisor: vmm("/usr/bin/cloud-hypervisor", (53, 0, 0)),
        ..facts(kvm, (7, 2, 22))
    }
}

/// As the surveyor would have it: a layer for each disk of the machine's own.
fn surveyed(text: &str) -> Survey {
    let machine = machine(text);
    let mut survey = survey(&machine, true, true);
    for (disk, files) in machine.disks.iter().zip(&survey.disks) {
        if let [top, rest @ ..] = files.layers.as_slice()
            && top.path.extension().is_some_and(|e| e == "qcow2")
        {
            survey.steps.push(Step::Layer {
                path: top.path.clone(),
                bytes: 1 << 30,
                above: rest.first().map(|below| (below.path.clone(), below.format)),
                owner: 7,
            });
        }
        assert!(!disk.serial.is_empty());
    }
    survey
}

fn choose(text: &str, facts: &Facts) -> Choice {
    Choice::of(&machine(text), &surveyed(text), facts)
}

fn launch(text: &str, backend: BackendKind) -> Launch {
    let choice = choose(text, &with_both(FAST));
    let (_, verdict) = choice.verdicts.into_iter().find(|(b, _)| *b == backend).unwrap();
    verdict.unwrap()
}

const WHOLE: &str = "cpus: {count: 2, threads: 2}\nmemory: 1GiB\n\
    nics: [{rx_limit: {bandwidth: 1000000, refill_ms: 100, burst: 5}, tx_limit: {bandwidth: 1000000, refill_ms: 100, burst: 5}}]\n\
    disks: [{size: 1GiB}, {source: /data.img, read_only: true}, {image: base}]\n";

#[test]
fn firecracker_is_told_call_by_call() {
    let launch = launch(&format!("{KERNEL}\n{WHOLE}"), BackendKind::Firecracker);
    let calls: String = launch.calls.iter().map(|call| format!("{call}\n")).collect();
    expect![[r#"
        {"body":{"mem_size_mib":1024,"smt":true,"vcpu_count":2},"method":"PUT","path":"/machine-config"}
        {"body":{"boot_args":"console=ttyS0","initrd_path":"/initrd","kernel_image_path":"/kernel"},"method":"PUT","path":"/boot-source"}
        {"body":{"drive_id":"disk0","is_read_only":false,"is_root_device":false,"path_on_host":"/disks/0"},"method":"PUT","path":"/drives/disk0"}
        {"body":{"drive_id":"disk1","is_read_only":true,"is_root_device":false,"path_on_host":"/disks/1"},"method":"PUT","path":"/drives/disk1"}
        {"body":{"drive_id":"disk2","is_read_only":false,"is_root_device":false,"path_on_host":"/disks/2"},"method":"PUT","path":"/drives/disk2"}
        {"body":{"guest_mac":"52:4c:b5:2a:46:51","host_dev_name":"tap","iface_id":"nic0","rx_rate_limiter":{"bandwidth":{"one_time_burst":5,"refill_time":100,"size":100000}},"tx_rate_limiter":{"bandwidth":{"one_time_burst":5,"refill_time":100,"size":100000}}},"method":"PUT","path":"/network-interfaces/nic0"}
        {"body":{},"method":"PUT","path":"/entropy"}
        {"body":{"amount_mib":0,"deflate_on_oom":true},"method":"PUT","path":"/balloon"}
        {"body":{"metrics_path":"/run/metrics"},"method":"PUT","path":"/metrics"}
        {"body":{"action_type":"InstanceStart"},"method":"PUT","path":"/actions"}
    "#]].assert_eq(&calls);
    let steps: String = launch.steps.iter().map(|step| format!("{step}\n")).collect();
    expect![[r#"
        raw disk /m/disk0.raw of 1073741824 bytes
        raw disk /m/disk2.raw of 1073741824 bytes from /i/base
        folder /m/memory
        folder /run/m/api
        pipe /run/m/api/metrics
    "#]]
    .assert_eq(&steps);
    binds(
        &launch,
        expect![[r#"
            /dev/kvm rw /dev/kvm
            /memory rw /m/memory
            /kernel ro /k
            /initrd ro /i
            /disks/0 rw /m/disk0.raw
            /disks/1 ro /data.img
            /disks/2 rw /m/disk2.raw
            /dev/net/tun rw /dev/net/tun
            /run rw /run/m/api
        "#]],
    );
    let jail = &launch.warden.jail;
    assert_eq!(jail.argv[1..3], ["--api-sock", "/run/api.sock"]);
    assert_eq!((jail.network, jail.terminal, jail.binds_sockets), (Some(110), Some(100), true));
    assert_eq!(launch.warden.taps[0].opened_by, Some(7));
}

#[test]
fn firecracker_has_room_for_memory_from_a_version_on() {
    let text = format!("{KERNEL}\nbackend: firecracker\nmemory: {{size: 256MiB, max: 1GiB}}\n");
    let told = launch(&text, BackendKind::Firecracker);
    let calls: Vec<String> = told.calls.iter().map(ToString::to_string).collect();
    let wanted = r#"{"body":{"block_size_mib":2,"slot_size_mib":128,"total_size_mib":768},"method":"PUT","path":"/hotplug/memory"}"#;
    assert!(calls.iter().any(|call| call == wanted), "{calls:?}");
    let mut facts = with_both(FAST);
    if let Ok(found) = &mut facts.firecracker {
        found.version = (1, 13, 0);
    }
    let choice = choose(&text, &facts);
    let why = format!("{:?}", choice.verdicts);
    assert!(why.contains("takes version 1.14; this one is 1.13.0"), "{why}");
}

#[test]
fn cloud_hypervisor_is_told_by_its_arguments() {
    let more = "cpus: {count: 2, max: 8, threads: 2}\nmemory: {size: 1GiB, max: 2GiB}\n";
    let text = format!(
        "{KERNEL}\n{}",
        WHOLE.split_once("nics").map(|(_, rest)| format!("{more}nics{rest}")).unwrap()
    );
    let launch = launch(&text, BackendKind::CloudHypervisor);
    let jail = &launch.warden.jail;
    let pairs: String =
        jail.argv[1..].chunks(2).map(|pair| format!("{}\n", pair.join(" "))).collect();
    expect![[r#"
        --api-socket fd=102
        --kernel /kernel
        --initramfs /initrd
        --cmdline console=ttyS0
        --cpus boot=2,max=8,topology=2:4:1:1
        --memory size=1073741824,hotplug_method=acpi,hotplug_size=1073741824
        --disk path=/disks/0,id=disk-disk0,serial=disk0
        --disk path=/disks/1,id=disk-disk1,serial=disk1,readonly=on
        --disk path=/disks/2,id=disk-disk2,serial=disk2
        --net fd=110,id=nic-nic0,mac=52:4c:b5:2a:46:51,bw_size=100000,bw_refill_time=100,bw_one_time_burst=5
        --rng src=/dev/urandom
        --balloon size=0,deflate_on_oom=on
        --serial tty
        --console off
    "#]].assert_eq(&pairs);
    binds(
        &launch,
        expect![[r#"
            /dev/kvm rw /dev/kvm
            /memory rw /m/memory
            /kernel ro /k
            /initrd ro /i
            /disks/0 rw /m/disk0.raw
            /disks/1 ro /data.img
            /disks/2 rw /m/disk2.raw
            /dev/urandom rw /dev/urandom
            /plugged rw /m/plugged
        "#]],
    );
    assert_eq!((jail.network, jail.terminal, jail.binds_sockets), (None, Some(100), false));
    assert_eq!(jail.keep_fds, [102, 110]);
    assert_eq!(launch.warden.taps[0].opened_by, None);
}

#[test]
fn a_root_over_virtio_fs_is_shared_memory_and_a_socket() {
    let text = "flist: {source: /x.fl}\nnics: []\n";
    let mut survey = surveyed(&format!("{KERNEL}\nnics: []\n"));
    survey.root = Some(root(Transport::VirtioFs));
    let plan = |survey: &Survey| {
        let choice = Choice::of(&machine(text), survey, &with_both(FAST));
        let said = choice.verdicts.into_iter().map(|(_, verdict)| verdict);
        said.collect::<Vec<_>>()
    };
    let verdicts = plan(&survey);
    assert!(verdicts[0].as_ref().is_err_and(|l| l[0].why.contains("a root that is an flist")));
    let cloud = verdicts[1].as_ref().unwrap();
    let argv = cloud.warden.jail.argv.join(" ");
    for part in ["size=536870912,shared=on", "tag=vroot,socket=/root.sock,num_queues=1"] {
        assert!(argv.contains(part), "{argv}");
    }
    let server = cloud.warden.root.as_ref().unwrap();
    assert!(!server.config.is_mounted() && server.jail.is_none());
    let qemu = verdicts[2].as_ref().unwrap();
    let argv = qemu.warden.jail.argv.join(" ");
    for part in ["memory-backend=ram", "share=on", "vhost-user-fs-pci", "tag=vroot"] {
        assert!(argv.contains(part), "{argv}");
    }
    assert_eq!(qemu.warden.jail.fuse, None);
    survey.root = Some(root(Transport::NineP));
    let verdicts = plan(&survey);
    assert!(verdicts[1].as_ref().is_err_and(|l| l[0].why.contains("no 9p")));
    let qemu = verdicts[2].as_ref().unwrap();
    let fuse = qemu.warden.jail.fuse.as_ref().unwrap();
    assert_eq!(Some(fuse.socket), qemu.warden.root.as_ref().unwrap().jail);
    assert!(!qemu.warden.jail.keep_fds.contains(&fuse.socket), "the hypervisor never has it");
}

#[test]
fn firecracker_is_given_a_disk_of_the_flist() {
    let text = "flist: {source: /x.fl}\nbackend: firecracker\nnics: []\n";
    let machine = machine(text);
    assert_eq!(machine.disks[0].source, DiskSource::Flist);
    assert_eq!(machine.to_draft().disks, Some(Vec::new()), "the disk follows from the flist");
    let mut survey = surveyed(text);
    survey.boot = surveyed(KERNEL).boot;
    let launch = Choice::of(&machine, &survey, &with_both(FAST)).chosen().unwrap();
    assert_eq!((launch.backend, &launch.warden.root), (BackendKind::Firecracker, &None));
    let calls: String = launch.calls.iter().map(|call| format!("{call}\n")).collect();
    assert!(calls.contains(r#""drive_id":"disk0","is_read_only":false"#), "{calls}");
}

fn root(transport: Transport) -> Root {
    let found = Found {
        by_yaml: true,
        initrd: false,
        cmdline: String::new(),
        nodefault: false,
        files: 0,
        whole: None,
    };
    Root {
        kernel: "/k".into(),
        initrd: None,
        found,
        flist: "/m/flist".into(),
        cache: "/c".into(),
        layer: "/m/root".into(),
        store: None,
        transport,
        disk: None,
        below: None,
    }
}

fn binds(launch: &Launch, expected: Expect) {
    let line = |bind: &lodge_jail::Bind| {
        let rights = if bind.writable { "rw" } else { "ro" };
        format!("{} {rights} {}\n", bind.target.display(), bind.source.display())
    };
    expected.assert_eq(&launch.warden.jail.binds.iter().map(line).collect::<String>());
}

fn chosen(text: &str, facts: &Facts) -> String {
    match choose(text, facts).chosen() {
        Ok(launch) => launch.backend.to_string(),
        Err(lacks) => lacks.iter().map(|u| format!("{u}\n")).collect(),
    }
}

#[test]
fn the_first_that_can_do_it_all_is_taken() {
    let both = with_both(FAST);
    let plain = format!("{KERNEL}\nnics: []\n");
    assert_eq!(chosen(&plain, &both), "firecracker");
    assert_eq!(chosen(&format!("{plain}cpus: {{count: 1, max: 2}}\n"), &both), "cloud-hypervisor");
    assert_eq!(chosen(&format!("{plain}cpus: 3\n"), &both), "cloud-hypervisor");
    assert_eq!(chosen(&format!("{plain}shares: [{{source: /s, tag: s}}]\n"), &both), "qemu");
    assert_eq!(chosen("disks: [{size: 1GiB}]\n", &both), "qemu");
    assert_eq!(chosen(&format!("{plain}board: q35\n"), &both), "qemu");
    assert_eq!(chosen(&format!("{plain}backend: qemu\n"), &both), "qemu");
    // Where KVM is not proven, only the one that does without is taken, unless somebody insists.
    let slow = with_both(SLOW);
    assert_eq!(chosen(&plain, &slow), "qemu");
    assert_eq!(chosen(&format!("{plain}accel: kvm\n"), &slow), "firecracker");
    assert_eq!(chosen(&format!("{plain}accel: tcg\n"), &both), "qemu");
    expect![[r#"
        accel: firecracker: firecracker needs KVM: /dev/kvm opens, but runs 64-bit code at only 1.7 million instructions per second (hardware: thousands of millions); it emulates long mode, and a stock Linux does not reach user space on it
    "#]].assert_eq(&chosen(&format!("{plain}backend: firecracker\n"), &slow));
}

#[test]
fn what_is_in_the_way_is_named() {
    let text = "boot: {kernel: /k, cmdline: pci=off}\nbackend: cloud-hypervisor\nboard: pc\n\
        disks: [{size: 1GiB, bus: scsi}]\nnics: [{model: e1000, tx_limit: {bandwidth: 1}}]\n";
    expect![[r#"
        disks.disk0: cloud-hypervisor: cloud-hypervisor lacks disks on a scsi bus
        nics.nic0: cloud-hypervisor: cloud-hypervisor lacks e1000 or rtl8139 interfaces
        board: cloud-hypervisor: cloud-hypervisor has only its own board
        boot.cmdline: cloud-hypervisor: pci=off hides all its devices
        nics[0].tx_limit: cloud-hypervisor: one limit holds for both directions; make them the same
    "#]]
    .assert_eq(&chosen(text, &with_both(FAST)));
    let text = "boot: {kernel: /k}\nbackend: firecracker\nboard: pc\ncpus: {count: 5, threads: 5}\n\
        memory: {size: 1GiB, max: 2GiB}\nnics: [{}, {network: other}]\n";
    expect![[r#"
        board: firecracker: firecracker has only its own board
        cpus.count: firecracker: 5 CPUs are not 1 or an even number up to 32
        cpus.threads: firecracker: a core has one or two threads
        nics: firecracker: all interfaces are on one network
    "#]]
    .assert_eq(&chosen(text, &with_both(FAST)));
    let mut files = surveyed("boot: {kernel: /k}\nnics: []\n");
    files.files_disk = Some("/run/m/files.tar".into());
    let text = "boot: {kernel: /k}\nnics: []\n";
    let choice = Choice::of(&machine(text), &files, &with_both(FAST));
    assert_eq!(choice.chosen().unwrap().backend, BackendKind::CloudHypervisor);
    // Disks that an earlier start wrote as qcow2 stay where they can be read.
    let text = "boot: {kernel: /k}\nbackend: firecracker\nnics: []\ndisks: [{size: 1GiB}]\n";
    let mut kept = surveyed(text);
    kept.disks[0].kept = true;
    let lacks = Choice::of(&machine(text), &kept, &with_both(FAST)).chosen().unwrap_err();
    expect![
        "disks[0].source: firecracker: the disk was written as qcow2 by an earlier start under qemu"
    ]
    .assert_eq(&lacks[0].to_string());
    // None of those that are there can: they say why; those that are not there keep quiet.
    let absent = facts(FAST, (7, 2, 22));
    let text = "backend: firecracker\nnics: []\n";
    assert_eq!(chosen(text, &absent), "firecracker: not in this test\n");
}
