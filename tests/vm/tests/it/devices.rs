//! Boards, firmware and hotplug.

use lodge_vm_tests::{Lab, assets, need};

fn start(lab: &Lab, name: &str, text: &str) {
    let file = lab.home().join(format!("{name}.yaml"));
    std::fs::write(&file, format!("name: {name}\n{text}")).unwrap();
    lab.ok(&["create", file.to_str().unwrap()]);
    lab.ok(&["start", name, "--wait", "ready", "--timeout", "170"]);
}

/// Whether a machine's hypervisor has a file open whose path has `part`.
fn holds(lab: &Lab, name: &str, part: &str) -> bool {
    let open = std::fs::read_dir(format!("/proc/{}/fd", lab.pid_of_hypervisor(name))).unwrap();
    let mut paths = open.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    paths.any(|path| path.to_string_lossy().contains(part))
}

fn kernel_boot(more: &str) -> String {
    let (kernel, initrd) = (assets::kernel(), assets::shell());
    format!(
        "memory: {{size: 256MiB, max: 768MiB}}\ncpus: {{count: 1, max: 4}}\nnics: []\n\
         ready: console:GUEST-READY\n\
         boot: {{kernel: {kernel}, initrd: {initrd}, cmdline: console=ttyS0 quiet cryptomgr.notests}}\n{more}"
    )
}

#[test]
fn devices_come_and_go_while_the_machine_runs() {
    let lab = Lab::new();
    start(&lab, "a", &kernel_boot(""));
    assert_eq!(lab.json(&["inspect", "a"])["runs"]["board"], "q35");
    lab.ok(&["set", "a", "--add-disk", "1GiB"]);
    let sees = |typed: &str, answer: &str| lab.type_and_see("a", typed, answer);
    sees("sleep 2; echo disk-$(cat /sys/block/vda/size)\n", "disk-2097152");
    sees("echo written > /dev/vda; sync; echo read-$(head -c 7 /dev/vda)\n", "read-written");
    assert!(holds(&lab, "a", "disk0"));
    lab.ok(&["set", "a", "--remove-disk", "disk0"]);
    assert!(!holds(&lab, "a", "disk0"), "its space is held");
    sees("ls /sys/block/vda || echo gone-$((4 + 4))\n", "gone-8");
    lab.ok(&["set", "a", "--add-nic", "default"]);
    sees("sleep 2; echo nic-$(cat /sys/class/net/eth0/address)\n", "nic-52:4c:");
    lab.ok(&["set", "a", "--remove-nic", "nic0"]);
    sees("sleep 1; ls /sys/class/net/eth0 || echo gone-$((5 + 5))\n", "gone-10");
    lab.ok(&["set", "a", "--cpus", "3"]);
    sees(
        "sleep 2; for c in 1 2; do echo 1 > /sys/devices/system/cpu/cpu$c/online; done; echo cpus-$(nproc)\n",
        "cpus-3",
    );
    lab.ok(&["set", "a", "--memory", "512MiB"]);
    sees(
        "sleep 2; for m in /sys/devices/system/memory/memory*; do grep -q offline $m/state && echo online > $m/state; done; echo mem-$(free -m | awk '/Mem/ {print ($2 > 400)}')\n",
        "mem-1",
    );
    // The guest must never see what crashes this QEMU.
    let refused = lab.run(&["set", "a", "--cpus", "1"]);
    let complaint = String::from_utf8_lossy(&refused.stderr).into_owned();
    let doctor = lab.ok(&["doctor"]);
    let old = doctor.contains("QEMU             7.");
    assert_eq!(refused.status.success(), !old, "{complaint}");
    assert!(!old || complaint.contains("crashes when a CPU is removed under TCG"), "{complaint}");
    assert_eq!(lab.state("a"), "running");
    let complaint = lab.fails(&["set", "a", "--memory", "4GiB"]);
    assert!(complaint.contains("memory.max"), "{complaint}");
}

#[test]
fn the_newer_board_keeps_what_was_there_from_the_start() {
    let lab = Lab::new();
    let text = kernel_boot("board: q35\n").replace("nics: []", "nics: [{}]");
    start(&lab, "a", &text);
    let complaint = lab.fails(&["set", "a", "--remove-nic", "nic0"]);
    assert!(complaint.contains("nic-nic0 was there from the start"), "{complaint}");
    assert_eq!(lab.json(&["inspect", "a"])["machine"]["nics"].as_array().unwrap().len(), 1);
}

/// The old board lets go of what was there from the start.
#[test]
fn devices_go_that_were_there_from_the_start() {
    let lab = Lab::new();
    let more = "board: pc\ndisks: [{size: 1MiB}, {size: 2MiB}]\n";
    let text = kernel_boot(more).replace("nics: []", "nics: [{}, {}]");
    start(&lab, "a", &text);
    let sees = |typed: &str, answer: &str| lab.type_and_see("a", typed, answer);
    sees(
        "echo blk-$(ls /sys/block | grep -c vd) net-$(ls /sys/class/net | grep -c eth)\n",
        "blk-2 net-2",
    );
    assert!(holds(&lab, "a", "disk0"));
    lab.ok(&["set", "a", "--remove-disk", "disk0"]);
    assert!(!holds(&lab, "a", "disk0"), "its space is held");
    lab.ok(&["set", "a", "--remove-nic", "nic0"]);
    sees("echo now-$(ls /sys/block | grep -c vd)-$(ls /sys/class/net | grep -c eth)\n", "now-1-1");
    lab.ok(&["set", "a", "--add-nic", "default"]);
    sees("sleep 2; echo again-$(ls /sys/class/net | grep -c eth)\n", "again-2");
    let names: Vec<String> = lab.json(&["inspect", "a"])["machine"]["nics"]
        .as_array()
        .unwrap()
        .iter()
        .map(|nic| nic["name"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(names, ["nic1", "nic2"]);
}

#[test]
fn a_microvm_says_that_it_takes_no_devices() {
    let lab = Lab::new();
    let (kernel, initrd) = (assets::kernel(), assets::shell());
    start(
        &lab,
        "a",
        &format!(
            "memory: 256MiB\nnics: []\nready: console:GUEST-READY\n\
         boot: {{kernel: {kernel}, initrd: {initrd}, cmdline: console=ttyS0 quiet cryptomgr.notests}}\n"
        ),
    );
    assert_eq!(lab.json(&["inspect", "a"])["runs"]["board"], "microvm");
    let complaint = lab.fails(&["set", "a", "--add-disk", "1GiB"]);
    assert!(complaint.contains("takes no devices while it runs"), "{complaint}");
    assert!(lab.json(&["inspect", "a"])["machine"]["disks"].as_array().unwrap().is_empty());
}

#[test]
fn disks_of_every_bus_are_seen() {
    let lab = Lab::new();
    let raw = lab.home().join("raw.img");
    std::fs::write(&raw, vec![b'R'; 1 << 20]).unwrap();
    start(
        &lab,
        "a",
        &kernel_boot(&format!(
            "board: q35\ndisks:\n- {{size: 64MiB}}\n- {{source: {}, read_only: true}}\n- {{size: 32MiB, bus: ide}}\n",
            raw.display()
        )),
    );
    lab.type_and_see(
        "a",
        "sleep 1; echo $(cat /sys/block/vda/size)-$(cat /sys/block/vdb/ro)-$(head -c 3 /dev/vdb)\n",
        "131072-1-RRR",
    );
    lab.type_and_see("a", "echo serial-$(cat /sys/block/vdb/serial)\n", "serial-disk1");
}

#[test]
fn a_cd_boots_through_the_bios_once() {
    let cd = assets::cdrom();
    need!(cd.is_some(), "isolinux and syslinux-common");
    let lab = Lab::new();
    start(
        &lab,
        "a",
        &format!(
            "memory: 256MiB\nnics: []\nready: console:GUEST-READY\nboot: {{order: [disk, cdrom], once: cdrom}}\n\
         disks:\n- {{size: 64MiB}}\n- {{source: {}, media: cdrom}}\n",
            cd.unwrap()
        ),
    );
    let inspected = lab.json(&["inspect", "a"]);
    assert_eq!(inspected["runs"]["board"], "pc");
    let argv = inspected["runs"]["argv"].to_string();
    assert!(argv.contains("order=cd,once=d"), "{argv}");
    // It was for that boot only.
    assert_eq!(inspected["machine"]["boot"]["once"], serde_json::Value::Null);
    lab.type_and_see("a", "echo cd-$(cat /sys/block/sr0/size | wc -l)\n", "cd-1");
}

#[test]
fn a_disk_boots_through_the_bios_on_every_bus_it_knows() {
    let lab = Lab::new();
    let disk = lab.home().join("disk.img");
    std::fs::write(&disk, assets::boot_sector("booted-from-disk\r\n")).unwrap();
    for (name, bus) in [("a", "virtio"), ("b", "ide"), ("c", "scsi")] {
        let text = format!(
            "memory: 64MiB\nnics: []\nready: console:booted-from-disk\nboot: {{order: [cdrom, disk]}}\n\
             disks:\n- {{source: {}, bus: {bus}, read_only: {}}}\n",
            disk.display(),
            bus != "ide",
        );
        start(&lab, name, &text);
        lab.ok(&["stop", "--force", name]);
    }
}

#[test]
fn uefi_firmware_comes_up_with_variables_of_its_own() {
    need!(std::path::Path::new("/usr/share/OVMF").exists(), "ovmf");
    let lab = Lab::new();
    start(
        &lab,
        "a",
        "memory: 256MiB\nnics: []\nready: 'console:BdsDxe|Shell'\nboot: {firmware: uefi}\ndisks: [{size: 64MiB}]\n",
    );
    let id = lab.machine("a")["id"].as_str().unwrap().to_owned();
    assert!(lab.home().join(format!("machines/{id}/uefi-vars.fd")).exists());
}

/// The cloud kernel has no 9p, so the guest's side ends at the device; the host's side is whole.
#[test]
fn shared_folders_are_devices_of_the_guest() {
    let lab = Lab::new();
    for name in ["kept", "open"] {
        std::fs::create_dir(lab.home().join(name)).unwrap();
    }
    let home = lab.home().display();
    let shares = format!(
        "shares:\n- {{source: {home}/kept, tag: kept}}\n- {{source: {home}/open, tag: open, read_only: false}}\n"
    );
    start(&lab, "a", &kernel_boot(&shares));
    let count = "echo shares-$(cat /sys/bus/virtio/devices/*/device | grep -c 0x0009)\n";
    lab.type_and_see("a", count, "shares-2");
}
