//! Plans for QEMU: what is chosen, why, and the arguments. No hypervisor is needed; the facts are
//! those of hosts that were seen.

use std::collections::BTreeSet;
use std::path::PathBuf;

use expect_test::{Expect, expect};
use lodge_host::backend::qemu::QemuFacts;
use lodge_host::backend::qemu::plan::plan;
use lodge_host::backend::{BootFiles, DiskFiles, DiskFormat, Launch, Layer, NicPlace, Survey};
use lodge_host::facts::{Facts, Hierarchy, Program};
use lodge_host::kvm::KvmFact;
use lodge_spec::document;
use lodge_spec::machine::{Board, Boot, DiskSource, Machine};
use lodge_spec::resolve::{Defaults, resolve};

pub(crate) const FAST: KvmFact = KvmFact::Proven { speed: 3_000_000_000, arch_capabilities: true };
/// A `/dev/kvm` that emulates long mode.
pub(crate) const SLOW: KvmFact = KvmFact::Proven { speed: 1_726_368, arch_capabilities: false };

pub(crate) fn facts(kvm: KvmFact, version: (u32, u32, u32)) -> Facts {
    let set = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<BTreeSet<_>>();
    Facts {
        kvm,
        tsc_khz: 2_596_000,
        qemu: Ok(QemuFacts {
            program: Program { path: "/usr/bin/qemu-system-x86_64".into(), files: Vec::new() },
            version,
            boards: set(&["microvm", "q35", "pc"]),
            devices: set(&["VGA", "cirrus-vga"]),
            accels: set(&["kvm", "tcg"]),
            data: Vec::new(),
            uefi: Some(("/ovmf/code.fd".into(), "/ovmf/vars.fd".into())),
        }),
        firecracker: Err("not in this test".into()),
        cloud_hypervisor: Err("not in this test".into()),
        cgroups: Hierarchy::None("a test".into()),
        rootless: false,
        tun: Ok(()),
    }
}

pub(crate) fn machine(text: &str) -> Machine {
    let id = "b8ab5fc1-8576-45ef-bb51-9826b52a4651".parse().unwrap();
    resolve(document::parse(text).unwrap(), Defaults { id }).unwrap()
}

/// What a host would have for the machine; kernels have a PVH entry unless told otherwise.
pub(crate) fn survey(machine: &Machine, pvh: bool, virtio_mmio: bool) -> Survey {
    let layer = |path: &str, format| Layer::file(path.into(), format);
    let boot = match &machine.boot {
        Boot::Kernel { kernel, initrd, cmdline } => BootFiles::Kernel {
            kernel: kernel.clone(),
            initrd: initrd.clone(),
            cmdline: cmdline.clone(),
            elf: pvh,
            pvh,
            virtio_mmio,
            pci: !cmdline.contains("pci=off"),
        },
        Boot::Firmware { .. } | Boot::Image { .. } | Boot::Flist { .. } => BootFiles::Firmware,
    };
    let disks = machine.disks.iter().map(|disk| DiskFiles {
        bytes: 1 << 30,
        kept: false,
        layers: match &disk.source {
            DiskSource::Path(path) => vec![layer(path.to_str().unwrap(), DiskFormat::Raw)],
            DiskSource::Own(path) => {
                vec![layer(&format!("/m/own/{}", path.display()), DiskFormat::Raw)]
            }
            DiskSource::Above(path) => vec![
                layer("/m/top.qcow2", DiskFormat::Qcow2),
                layer(path.to_str().unwrap(), DiskFormat::Raw),
            ],
            DiskSource::Blank { .. } => vec![layer("/m/blank.qcow2", DiskFormat::Qcow2)],
            DiskSource::Flist => vec![layer("/m/root.raw", DiskFormat::Raw)],
            DiskSource::Remote(remote) => vec![Layer::remote(remote)],
            DiskSource::Image { .. } => {
                vec![layer("/m/top.qcow2", DiskFormat::Qcow2), layer("/i/base", DiskFormat::Raw)]
            }
        },
    });
    let nics = machine.nics.iter().map(|_| NicPlace {
        network: "/run/net/default".into(),
        interface: "tap".into(),
        address: "10.0.2.15".parse().unwrap(),
    });
    Survey {
        root: None,
        boot,
        disks: disks.collect(),
        nics: nics.collect(),
        files_disk: None,
        steps: Vec::new(),
        run: PathBuf::from("/run/m"),
        state: PathBuf::from("/m"),
        uid: 7,
        ready: None,
    }
}

fn launch(text: &str, facts: &Facts) -> Launch {
    let machine = machine(text);
    plan(&machine, &survey(&machine, true, true), facts).unwrap()
}

/// The arguments, an option with its value on one line, without what all have.
fn check(text: &str, facts: &Facts, arguments: Expect) {
    let common = [
        "-name",
        "-uuid",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "-vga",
        "-rtc",
        "-sandbox",
    ];
    let argv = launch(text, facts).warden.jail.argv;
    let mut lines = String::new();
    let mut args = argv.iter().skip(1).peekable();
    while let Some(option) = args.next() {
        let value = args.next_if(|v| !v.starts_with('-')).cloned().unwrap_or_default();
        if !common.contains(&option.as_str()) {
            lines += format!("{option} {value}").trim_end();
            lines.push('\n');
        }
    }
    arguments.assert_eq(&lines);
}

fn refusal(text: &str, facts: &Facts) -> String {
    let machine = machine(text);
    let list = plan(&machine, &survey(&machine, true, true), facts).unwrap_err();
    list.iter().map(|u| format!("{u}\n")).collect()
}

const KERNEL: &str = "boot: {kernel: /k, initrd: /i, cmdline: console=ttyS0}";

#[test]
fn a_kernel_with_a_disk_and_a_nic_under_tcg() {
    check(
        &format!("{KERNEL}\ndisks: [{{image: base}}]\n"),
        &facts(SLOW, (7, 2, 22)),
        expect![[r#"
            -global virtio-mmio.force-legacy=false
            -machine type=microvm
            -accel tcg,thread=multi
            -cpu max
            -smp cpus=1,maxcpus=1,sockets=1,cores=1,threads=1
            -m size=512M
            -kernel /kernel
            -initrd /initrd
            -append console=ttyS0 no_timer_check tsc_early_khz=2596000
            -object rng-builtin,id=rng0
            -device virtio-rng-device,rng=rng0
            -device virtio-balloon-device,id=balloon0,deflate-on-oom=on
            -add-fd fd=100,set=1,opaque=disk-disk0
            -add-fd fd=101,set=2,opaque=disk-disk0
            -blockdev {"discard":"unmap","driver":"file","filename":"/dev/fdset/1","node-name":"f-disk0-1","read-only":true}
            -blockdev {"discard":"unmap","driver":"raw","file":"f-disk0-1","node-name":"d-disk0-1","read-only":true}
            -blockdev {"discard":"unmap","driver":"file","filename":"/dev/fdset/2","node-name":"f-disk0-0","read-only":false}
            -blockdev {"backing":"d-disk0-1","discard":"unmap","driver":"qcow2","file":"f-disk0-0","node-name":"d-disk0","read-only":false}
            -device virtio-blk-device,id=disk-disk0,drive=d-disk0,serial=disk0
            -netdev tap,id=n-nic0,fd=102
            -device virtio-net-device,id=nic-nic0,netdev=n-nic0,mac=52:4c:b5:2a:46:51
            -chardev socket,id=qmp,fd=103,server=on,wait=off
            -mon chardev=qmp,mode=control
            -chardev socket,id=console,fd=104
            -serial chardev:console
        "#]],
    );
}

#[test]
fn firmware_disks_and_hotplug_room_under_kvm() {
    check(
        "cpus: {count: 2, max: 8, threads: 2}\nmemory: {size: 1GiB, max: 2GiB}\nnics: [{model: e1000}]\n\
         boot: {order: [cdrom, disk], once: network}\n\
         disks: [{size: 1GiB, bus: scsi}, {source: /cd.iso, media: cdrom, bus: scsi}]\n",
        &facts(FAST, (10, 0, 2)),
        expect![[r#"
            -machine type=q35
            -accel kvm
            -cpu host
            -smp cpus=2,maxcpus=8,sockets=1,cores=4,threads=2
            -m size=1024M,slots=16,maxmem=2048M
            -boot order=dc,once=n,menu=off
            -object rng-builtin,id=rng0
            -device virtio-rng-pci,rng=rng0
            -device virtio-balloon-pci,id=balloon0,deflate-on-oom=on
            -add-fd fd=100,set=1,opaque=disk-disk0
            -blockdev {"discard":"unmap","driver":"file","filename":"/dev/fdset/1","node-name":"f-disk0-0","read-only":false}
            -blockdev {"backing":null,"discard":"unmap","driver":"qcow2","file":"f-disk0-0","node-name":"d-disk0","read-only":false}
            -device virtio-scsi-pci,id=scsi
            -device scsi-hd,id=disk-disk0,drive=d-disk0,serial=disk0,bus=scsi.0
            -add-fd fd=101,set=2,opaque=disk-disk1
            -blockdev {"discard":"unmap","driver":"file","filename":"/dev/fdset/2","node-name":"f-disk1-0","read-only":true}
            -blockdev {"discard":"unmap","driver":"raw","file":"f-disk1-0","node-name":"d-disk1","read-only":true}
            -device scsi-cd,id=disk-disk1,drive=d-disk1,serial=disk1,bus=scsi.0
            -netdev tap,id=n-nic0,fd=102
            -device e1000,id=nic-nic0,netdev=n-nic0,mac=52:4c:b5:2a:46:51
            -device pcie-root-port,id=port0,chassis=1,slot=0
            -device pcie-root-port,id=port1,chassis=2,slot=1
            -device pcie-root-port,id=port2,chassis=3,slot=2
            -device pcie-root-port,id=port3,chassis=4,slot=3
            -chardev socket,id=qmp,fd=103,server=on,wait=off
            -mon chardev=qmp,mode=control
            -chardev socket,id=console,fd=104
            -serial chardev:console
        "#]],
    );
}

#[test]
fn a_screen_a_second_serial_port_and_a_name_for_the_guest() {
    check(
        "disks: [{size: 1GiB}, {source: 'own:/image.iso', media: cdrom}, {source: 'own:/d.img', \
         bus: ide, first: true}]\n\
         boot: {order: [disk, cdrom], once: cdrom}\n\
         display: {vga: cirrus, password: secret}\n\
         smbios: {manufacturer: Joyent, product: 'SmartDC HVM', family: 'a,b'}\n\
         mdata: {customer: {k: v}}\nnics: []",
        &facts(KvmFact::Absent { why: "there is no /dev/kvm".into() }, (7, 2, 22)),
        expect![[r#"
            -machine type=pc
            -accel tcg,thread=multi
            -cpu max
            -smp cpus=1,maxcpus=1,sockets=1,cores=1,threads=1
            -m size=512M
            -boot order=cd,once=d,menu=off
            -object rng-builtin,id=rng0
            -device virtio-rng-pci,rng=rng0
            -device virtio-balloon-pci,id=balloon0,deflate-on-oom=on
            -add-fd fd=100,set=1,opaque=disk-disk0
            -blockdev {"discard":"unmap","driver":"file","filename":"/dev/fdset/1","node-name":"f-disk0-0","read-only":false}
            -blockdev {"backing":null,"discard":"unmap","driver":"qcow2","file":"f-disk0-0","node-name":"d-disk0","read-only":false}
            -device virtio-blk-pci,id=disk-disk0,drive=d-disk0,serial=disk0
            -add-fd fd=101,set=2,opaque=disk-disk1
            -blockdev {"discard":"unmap","driver":"file","filename":"/dev/fdset/2","node-name":"f-disk1-0","read-only":true}
            -blockdev {"discard":"unmap","driver":"raw","file":"f-disk1-0","node-name":"d-disk1","read-only":true}
            -device ide-cd,id=disk-disk1,drive=d-disk1,serial=disk1,bus=ide.0,unit=0
            -add-fd fd=102,set=3,opaque=disk-disk2
            -blockdev {"discard":"unmap","driver":"file","filename":"/dev/fdset/3","node-name":"f-disk2-0","read-only":false}
            -blockdev {"discard":"unmap","driver":"raw","file":"f-disk2-0","node-name":"d-disk2","read-only":false}
            -device ide-hd,id=disk-disk2,drive=d-disk2,serial=disk2,bus=ide.0,unit=1,bootindex=0
            -smbios type=1,manufacturer=Joyent,product=SmartDC HVM,family=a,,b
            -device cirrus-vga
            -usb
            -device usb-tablet
            -object secret,id=vnc,format=raw,file=/vnc-password
            -vnc none,password-secret=vnc
            -chardev socket,id=qmp,fd=103,server=on,wait=off
            -mon chardev=qmp,mode=control
            -chardev socket,id=console,fd=104
            -serial chardev:console
            -chardev socket,id=mdata,fd=105
            -serial chardev:mdata
            -chardev socket,id=screen,fd=106,server=on,wait=off
            -mon chardev=screen,mode=control
        "#]],
    );
    let launched = launch(
        "uuid: 00010000-0000-4000-8000-000000000000\ndisplay: {password: secret}\nnics: []",
        &facts(KvmFact::Absent { why: "there is no /dev/kvm".into() }, (7, 2, 22)),
    );
    let screen = launched.warden.screen.clone().unwrap().at.unwrap();
    assert_eq!((screen.port, screen.or_next), (20_001, true));
    // What the plan says is shown to people; the password is not in it.
    assert!(!serde_json::to_string(&launched).unwrap().contains("secret\""), "{launched:?}");
    let lacks = refusal("board: microvm\nboot: {kernel: /k}\ndisplay: {}", &{
        facts(KvmFact::Absent { why: "there is no /dev/kvm".into() }, (7, 2, 22))
    });
    assert!(lacks.contains("display: qemu: the microvm board lacks a screen"), "{lacks}");
}

fn has(text: &str, facts: &Facts, part: &str) -> bool {
    launch(text, facts).warden.jail.argv.iter().any(|a| a.contains(part))
}

#[test]
fn kvm_is_used_where_it_is_proven_and_nowhere_else() {
    let text = format!("{KERNEL}\nnics: []\n");
    let absent = KvmFact::Absent { why: "there is no /dev/kvm".into() };
    for (kvm, accel) in [(FAST, "kvm"), (SLOW, "tcg"), (absent.clone(), "tcg")] {
        let launch = launch(&text, &facts(kvm.clone(), (7, 2, 22)));
        assert_eq!(launch.accel.as_str(), accel, "{kvm:?}");
        assert!(launch.notes.iter().any(|n| n.starts_with(accel)), "{:?}", launch.notes);
    }
    let insists = format!("{text}accel: kvm\n");
    assert_eq!(launch(&insists, &facts(SLOW, (7, 2, 22))).accel.as_str(), "kvm");
    expect!["accel: qemu: there is no /dev/kvm\n"]
        .assert_eq(&refusal(&insists, &facts(absent, (7, 2, 22))));
}

/// QEMU aborts when it sets a register that this KVM refuses.
#[test]
fn a_refused_register_is_left_out() {
    let text = format!("{KERNEL}\nnics: []\naccel: kvm\n");
    assert!(has(&text, &facts(SLOW, (7, 2, 22)), "host,-arch-capabilities"));
    assert!(!has(&text, &facts(FAST, (7, 2, 22)), "-arch-capabilities"));
}

/// The guest's clock calibration hangs on a busy host; the old interrupt controller faults on 10.
#[test]
fn microvm_traps_are_stepped_around_under_tcg_only() {
    let text = format!("{KERNEL}\nnics: []\n");
    assert!(has(&text, &facts(SLOW, (7, 2, 22)), "no_timer_check tsc_early_khz=2596000"));
    assert!(!has(&text, &facts(FAST, (7, 2, 22)), "tsc_early_khz"));
    assert!(has(&text, &facts(SLOW, (10, 0, 2)), "type=microvm,pic=off"));
    assert!(!has(&text, &facts(SLOW, (7, 2, 22)), "pic=off"));
    assert!(!has(&text, &facts(FAST, (10, 0, 2)), "pic=off"));
    let q35 = format!("{text}board: q35\n");
    assert!(!has(&q35, &facts(SLOW, (7, 2, 22)), "tsc_early_khz"));
    assert!(has(&q35, &facts(SLOW, (7, 2, 22)), "no_timer_check"));
    assert!(!has(&q35, &facts(FAST, (7, 2, 22)), "no_timer_check"));
}

/// QEMU is given a connection, and never learns where it leads.
#[test]
fn a_servers_disk_is_a_connection_that_was_made_before() {
    let text = format!("{KERNEL}\nnics: []\ndisks: [{{source: 'nbd://store:7/a'}}]\n");
    let launch = launch(&text, &facts(SLOW, (7, 2, 22)));
    let argv = launch.warden.jail.argv.join(" ");
    let file = launch.warden.files.iter().find(|file| file.server.is_some()).unwrap();
    let server = format!(r#""server":{{"str":"{}","type":"fd"}}"#, file.fd);
    assert!(argv.contains(&server) && argv.contains(r#""export":"a""#), "{argv}");
    assert!(!argv.contains("store"), "{argv}");
    assert!(launch.warden.jail.keep_fds.contains(&file.fd));
    let refused = |more: &str| {
        let text = format!("{KERNEL}\nnics: []\ndisks: [{{source: 'nbd://store/a', {more}}}]\n");
        let draft = document::parse(&text).unwrap();
        let id = "b8ab5fc1-8576-45ef-bb51-9826b52a4651".parse().unwrap();
        resolve(draft, Defaults { id }).unwrap_err().to_string()
    };
    assert!(refused("layered: true").contains("used in place"));
    assert!(refused("media: cdrom").contains("used in place"));
    assert!(refused("size: 1GiB").contains("the size of its source"));
}

/// Several emulated processors run code that another one has just changed, before 8.1.
#[test]
fn emulated_processors_take_turns_where_they_must() {
    let two = format!("{KERNEL}\nnics: []\ncpus: 2\n");
    assert!(has(&two, &facts(SLOW, (7, 2, 22)), "tcg,thread=single"));
    assert!(has(&two, &facts(SLOW, (8, 1, 0)), "tcg,thread=multi"));
    assert!(!has(&two, &facts(FAST, (7, 2, 22)), "thread="));
    let grows = format!("{KERNEL}\nnics: []\ncpus: {{count: 1, max: 4}}\n");
    assert!(has(&grows, &facts(SLOW, (7, 2, 22)), "tcg,thread=single"));
}

#[test]
fn the_board_is_the_least_that_suffices() {
    let facts = facts(SLOW, (7, 2, 22));
    let board = |text: &str, pvh, mmio| {
        let machine = machine(text);
        let launch = plan(&machine, &survey(&machine, pvh, mmio), &facts).unwrap();
        (launch.board.unwrap().as_str(), launch.notes[1].clone())
    };
    let bare = format!("{KERNEL}\nnics: []\n");
    assert_eq!(board(&bare, true, false).0, "microvm");
    let (name, why) = board(&bare, false, false);
    assert_eq!(name, "q35");
    assert!(why.contains("no PVH entry"), "{why}");
    let (name, why) = board(KERNEL, true, false);
    assert_eq!(name, "q35");
    assert!(why.contains("not known to find devices"), "{why}");
    assert_eq!(board(KERNEL, true, true).0, "microvm");
    assert_eq!(board("disks: [{size: 1GiB, bus: ide}]", true, true).0, "pc");
    assert_eq!(board("disks: [{size: 1GiB}]", true, true).0, "q35");
}

#[test]
fn everything_that_is_in_the_way_is_named() {
    let text = "board: microvm\ncpus: {count: 1, max: 2}\nshares: [{source: /s, tag: s}]\n\
                disks: [{source: /cd, media: cdrom}]\nnics: [{model: rtl8139}]\n";
    expect![[r#"
        boot: qemu: the microvm board lacks booting through a BIOS
        disks.disk0: qemu: the microvm board lacks CD-ROM drives
        disks.disk0: qemu: the microvm board lacks disks on an ide bus
        nics.nic0: qemu: the microvm board lacks e1000 or rtl8139 interfaces
        cpus.max: qemu: the microvm board lacks plugging in CPUs
        shares.s: qemu: the microvm board lacks shared folders
        boot: qemu: the microvm board boots kernels only
    "#]]
    .assert_eq(&refusal(text, &facts(SLOW, (7, 2, 22))));
    let mut without = facts(SLOW, (7, 2, 22));
    without.qemu = Err("qemu-system-x86_64 is not installed".into());
    without.tun = Err("no tun".into());
    expect!["qemu: qemu-system-x86_64 is not installed\n"].assert_eq(&refusal(KERNEL, &without));
}

#[test]
fn a_guest_without_pci_is_not_put_where_there_is_nothing_else() {
    let facts = facts(SLOW, (7, 2, 22));
    let text = "boot: {kernel: /k, cmdline: pci=off}\ndisks: [{size: 1GiB}]\nmemory: {size: 256MiB, max: 512MiB}\n";
    let expected = expect![[r#"
        memory.max: qemu: the microvm board lacks plugging in memory
        boot.cmdline: qemu: pci=off hides the devices of the q35 board
    "#]];
    expected.assert_eq(&refusal(text, &facts));
    let text = "boot: {kernel: /k, cmdline: pci=off}\ndisks: [{size: 1GiB}]\n";
    assert_eq!(launch(text, &facts).board, Some(Board::Microvm));
}
