//! The guide's walk, line by line, with a real CD and a real guest.

use lodge_vm_tests::vmadm::{SEED, Vmadm};
use lodge_vm_tests::{assets, need};

/// A guest that obeys its power button.
const OBEYS: &str = "i=5; for event in /dev/input/event*; do eval \"exec $i<$event\"; \
    (head -c 24 <&$i > /dev/null; poweroff -f) & i=$((i+1)); done\necho GUEST-READY\nsh\n";

#[test]
fn cases_1_to_3_and_8_to_19_from_an_empty_machine_to_a_running_one() {
    let iso = assets::bootable(&assets::guest(OBEYS), "");
    need!(iso.is_some(), "isolinux");
    let iso = iso.unwrap();
    let v = Vmadm::new();
    let uuid = v.create(SEED);
    let u = uuid.as_str();
    let vm = v.get(u);
    assert_eq!(vm["state"], "stopped");
    assert_eq!(vm["max_physical_memory"], 2048);
    assert_eq!(vm["disks"][0]["size"], 40_960);
    assert!(vm["disks"][0]["path"].as_str().unwrap().ends_with(&format!("{u}-disk0")));
    assert_eq!(vm["nics"][0]["ips"][0], "10.88.88.51/24");
    let boot = ["boot", u, "order=cd,once=d", "cdrom=/image.iso,ide"];
    let absent = v.fails(&boot, "");
    assert_eq!(absent, format!("Unable to start VM {u}: Cannot find disk: /image.iso"));
    assert_eq!(v.state(u), "stopped");
    let early = v.fails(&["info", u], "");
    assert!(early.ends_with(
        "Unable to get info for vm from state \"stopped\", must be \"running\" or \"stopping\"."
    ));
    v.bring(u, &iso, "image.iso");
    assert_eq!(v.ok(&boot), format!("Successfully started VM {u}"));
    assert_eq!(v.state(u), "running");
    assert_eq!(v.get(u)["autoboot"], true);
    let again = v.says(&["boot", u], "");
    assert_eq!(again.err, format!("Unable to start VM {u}: VM {u} is already 'running'\n"));
    assert_eq!(again.code, 0);
    info(&v, u);
    v.console(u, "GUEST-READY");
    let before = v.get(u)["boot_timestamp"].clone();
    assert_eq!(v.ok(&["reboot", u, "-F"]), format!("Successfully completed reboot for VM {u}"));
    assert_eq!(v.get(u)["boot_timestamp"], before);
    assert_eq!(v.state(u), "running");
    // The medium was for the first boot only, and nothing else boots.
    assert_eq!(v.ok(&["stop", u, "-t", "1"]), format!("Successfully completed stop for VM {u}"));
    assert_eq!(v.get(u)["autoboot"], false);
    let stopped = v.says(&["stop", u], "");
    assert_eq!(stopped.err, format!("VM {u} is already not 'running' (currently: stopped)\n"));
    assert_eq!(stopped.code, 0);
    let reboot = v.fails(&["reboot", u], "");
    assert_eq!(reboot, "Cannot reboot vm from state \"stopped\", must be \"running\"");
    let reset = v.fails(&["reboot", u, "-F"], "");
    assert_eq!(reset, "Cannot reset vm from state \"stopped\", must be \"running\".");
    power_button(&v, u);
    let image = v.get(u)["zonepath"].as_str().unwrap().to_owned() + "/root/image.iso";
    assert!(std::path::Path::new(&image).exists());
    assert_eq!(v.ok(&["delete", u]), format!("Successfully deleted VM {u}"));
    assert!(!std::path::Path::new(&image).exists());
}

fn info(v: &Vmadm, u: &str) {
    let vnc = v.info(u, "vnc");
    assert_eq!(vnc.as_object().unwrap().len(), 1);
    let port = vnc["vnc"]["port"].as_u64().unwrap();
    assert_eq!(vnc["vnc"]["display"], port - 5900);
    assert_eq!(vnc["vnc"]["host"], "127.0.0.1");
    let names = |kinds: &str| {
        let value = v.info(u, kinds);
        value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(",")
    };
    assert_eq!(names("block,blockstats,chardev"), "block,blockstats,chardev");
    assert_eq!(names("all"), "block,blockstats,chardev,cpus,kvm,pci,spice,status,version,vnc");
    let all = v.info(u, "all");
    assert_eq!(all["status"]["running"], true);
    assert!(all["version"]["qemu"]["major"].as_u64().unwrap() >= 7);
    assert!(all["cpus"][0]["pc"].as_u64().is_some(), "{}", all["cpus"]);
    assert_eq!(all["block"][1]["device"], "boot0");
    let bogus = v.fails(&["info", u, "bogus"], "");
    assert_eq!(bogus, format!("Unable to get VM info for VM {u}: unknown info type bogus"));
}

/// A guest that obeys; and a restart that asks it, too.
fn power_button(v: &Vmadm, u: &str) {
    let boots = || v.lab.console_text(u).matches("GUEST-READY").count();
    let seen = boots();
    v.ok(&["boot", u, "order=d", "cdrom=/image.iso,ide"]);
    v.lab.until("the next boot", || boots() > seen);
    let before = v.get(u)["boot_timestamp"].clone();
    v.feed(&["update", u], r#"{"boot":"order=d"}"#);
    assert_eq!(
        v.ok(&["reboot", u, "-t", "60"]),
        format!("Successfully completed reboot for VM {u}")
    );
    assert_ne!(v.get(u)["boot_timestamp"], before);
    assert_eq!(v.state(u), "running");
    let signal = v.ok(&["kill", "-9", u]);
    assert_eq!(signal, format!("Sent signal \"SIGKILL\" to init process for VM {u}"));
    v.lab.until("the end", || v.state(u) == "stopped");
    let gone = v.fails(&["kill", u], "");
    assert_eq!(gone, format!("Cannot find running init PID for VM {u}"));
}

/// The guide's second way: a raw image beside an empty disk boots by itself.
#[test]
fn a_raw_image_boots_where_the_machines_own_disk_is_empty() {
    let v = Vmadm::new();
    let uuid = v.create(SEED);
    let image = v.lab.home().join("sector.img");
    std::fs::write(&image, assets::boot_sector("BOOTED-FROM-THE-IMAGE\r\n")).unwrap();
    v.bring(&uuid, image.to_str().unwrap(), "debian.img");
    v.ok(&["boot", &uuid, "disk=/debian.img,ide"]);
    v.console(&uuid, "BOOTED-FROM-THE-IMAGE");
    // The console is left by one key.
    let mut console = v.command(&["console", &uuid]);
    console.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut console = console.spawn().unwrap();
    lodge_vm_tests::lab::wait_for_text(&mut console, "BOOTED-FROM-THE-IMAGE");
    std::io::Write::write_all(console.stdin.as_mut().unwrap(), b"x\x1d").unwrap();
    assert!(console.wait().unwrap().success());
    v.ok(&["stop", &uuid, "-F"]);
    let closed = v.fails(&["console", &uuid], "");
    assert!(closed.starts_with("cannot connect to console when state is \"stopped\""), "{closed}");
    v.ok(&["destroy", &uuid]);
}

/// Ends by its own button: the guest powers off, and the intent to run is remembered.
#[test]
fn case_14_a_guest_that_obeys() {
    let iso = assets::bootable(&assets::guest(OBEYS), "");
    need!(iso.is_some(), "isolinux");
    let v = Vmadm::new();
    let uuid = v.create(
        r#"{"brand":"kvm","autoboot":false,"ram":512,"boot":"order=d","alias":"button",
        "disks":[{"media":"cdrom","path":"/i.iso","model":"ide"}]}"#,
    );
    v.bring(&uuid, &iso.unwrap(), "i.iso");
    // Machines are also named by their alias, and by the start of their identity.
    v.ok(&["start", "button"]);
    v.console(&uuid, "GUEST-READY");
    let begun = std::time::Instant::now();
    assert_eq!(v.ok(&["stop", &uuid[..8]]), format!("Successfully completed stop for VM {uuid}"));
    assert!(begun.elapsed().as_secs() < 170, "it was not the button that ended it");
    assert_eq!(v.state(&uuid), "stopped");
    v.ok(&["delete", "button"]);
}
