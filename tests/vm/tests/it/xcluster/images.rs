//! Images: made, extended, and left as they are when something goes wrong.

use std::fs;
use std::time::Duration;

use lodge_vm_tests::lab::{command, kill};
use lodge_vm_tests::xcluster::Xc;

#[test]
fn an_image_is_made_twice_with_the_same_bytes_and_no_fault() {
    let mut xc = Xc::new();
    let said = xc.says(&["mkimage", "--version=1.2.3"]);
    assert_eq!(said.code, 0, "{said:?}");
    // Where its programs are from.
    for name in ["busybox: /", "dropbear: /", "ip: /"] {
        assert!(said.err.contains(name), "{said:?}");
    }
    let first = fs::read(xc.image()).unwrap();
    xc.ok(&["mkimage", "--version=1.2.3"]);
    assert!(fs::read(xc.image()).unwrap() == first);
    assert!(xc.debugfs("cat /etc/os-release").contains("VERSION_ID=1.2.3"));
    assert!(xc.debugfs("stat /init").contains("Mode:  0755"));
    assert!(xc.debugfs("ls /lib/modules").contains("6.1"));
    assert!(xc.debugfs("stat /bin/busybox").contains("User:     0   Group:     0"));
    // What a build script made a moment later is no different.
    xc.overlay(
        "fresh",
        "d=$(mktemp -d); cd $d; mkdir etc; echo x >etc/fresh; tar -cf - etc; rm -r $d",
    );
    xc.ok(&["ximage", "fresh"]);
    let extended = fs::read(xc.image()).unwrap();
    xc.ok(&["mkimage", "--version=1.2.3"]);
    std::thread::sleep(Duration::from_millis(1100));
    xc.ok(&["ximage", "fresh"]);
    assert!(fs::read(xc.image()).unwrap() == extended);
    let list = fs::read_to_string(xc.path("ws/xcluster/base-libs.txt")).unwrap();
    assert!(list.lines().any(|l| l.ends_with("/libc.so.6")), "{list}");
    xc.ok(&["mkimage", "--fs=ext3", "--size=300M"]);
    let about = xc.debugfs("show_super_stats -h");
    assert!(about.contains("has_journal") && !about.contains("extent"), "{about}");
    xc.set("__image", xc.path("raw.img").to_str().unwrap());
    xc.ok(&["mkimage", "--format=raw", "--size=100M"]);
    assert_eq!(xc.path("raw.img").metadata().unwrap().len(), 100 << 20);
    for odd in ["--size=lots", "--format=vmdk", "--fs=xfs", "--size=1K"] {
        xc.fails(&["mkimage", odd]);
    }
}

#[test]
fn cases_1_2_later_overlays_lie_over_earlier_ones() {
    let xc = Xc::with_image();
    xc.files("a", &[("etc/x", "a"), ("etc/onlya", "a")]);
    xc.files("b", &[("etc/x", "b"), ("etc/issue", "ours")]);
    xc.ok(&["ximage", "a", "b"]);
    assert_eq!(xc.debugfs("cat /etc/x"), "b");
    assert_eq!(xc.debugfs("cat /etc/onlya"), "a");
    assert_eq!(xc.debugfs("cat /etc/issue"), "ours");
    assert!(xc.debugfs("stat /etc/x").contains("User:     0   Group:     0"));
    xc.ok(&["ximage", "a"]);
    assert_eq!(xc.debugfs("cat /etc/x"), "a");
    let text = xc.lab.ok(&["image", "inspect", xc.image().to_str().unwrap()]);
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    let names: Vec<&str> = value["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| layer["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["base", "a", "b", "a"]);
    assert_eq!(value["layers"][1]["sha256"], value["layers"][3]["sha256"]);
}

#[test]
fn cases_8_to_13_24_37_whatever_goes_wrong_leaves_the_image() {
    let xc = Xc::with_image();
    xc.ok(&["ximage", "--image=ws/xcluster/hd.img", "template"]);
    let before = fs::read(xc.image()).unwrap();
    xc.files("good", &[("etc/good", "x")]);
    let odd = xc.overlay("odd", "");
    fs::set_permissions(odd.join("tar"), std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .unwrap();
    xc.overlay("one", "echo it went wrong >&2; exit 1");
    xc.overlay("three", "cd \"$(dirname \"$0\")\"; tar -cf - tar; exit 3");
    xc.overlay("empty", "true");
    xc.overlay("cut", "cd \"$(dirname \"$0\")\"; tar -cf - tar | head -c 700");
    xc.overlay("chatty", "echo Building...; cd \"$(dirname \"$0\")\"; tar -cf - tar");
    xc.overlay(
        "full",
        "d=$(mktemp -d); cd $d; head -c 2100000000 /dev/zero >big; tar -cSf - big; rm -r $d",
    );
    xc.overlay(
        "leaves",
        "d=$(mktemp -d); cd $d; echo x >x; tar -P --transform 's,x,../../x,' -cf - x",
    );
    let refused = [
        ("nosuch", "ERROR: Ovl not found [nosuch]"),
        ("odd", "ERROR: Not executable ["),
        ("one", "it went wrong\nERROR: one: its tar ended with exit status: 1"),
        ("three", "ERROR: three: its tar ended with exit status: 3"),
        ("empty", "ERROR: empty: it wrote nothing"),
        ("cut", "ERROR: cut: "),
        (
            "chatty",
            "ERROR: chatty: what it wrote is no tar archive; it begins with \"Building...\\n",
        ),
        ("full", "do not fit into"),
        ("leaves", "a path that leaves the root"),
    ];
    for (name, complaint) in refused {
        let said = xc.fails(&["ximage", "good", name]);
        assert!(said.contains(complaint), "{name}: {said}");
        assert!(fs::read(xc.image()).unwrap() == before, "{name}");
    }
    assert!(xc.fails(&["ximage", "--script=x", "good"]).contains("--script is not supported"));
    xc.overlay("none", "tar -cf - -T /dev/null");
    let said = xc.says(&["ximage", "none"]);
    assert!(said.code == 0 && said.err.contains("WARNING: none is empty"), "{said:?}");
}

#[test]
fn cases_14_15_what_is_not_there_is_missed_before_anything_is_made() {
    let mut xc = Xc::bare();
    let said = xc.fails(&["mkimage"]);
    assert!(said.starts_with("ERROR: Kernel not built ["), "{said}");
    assert!(!xc.image().exists());
    xc.files("a", &[("etc/x", "a")]);
    assert!(xc.fails(&["ximage", "a"]).starts_with("ERROR: Image not found ["));
    assert!(xc.fails(&["start"]).starts_with("ERROR: Kernel not built ["));
    xc.set("__kbin", "/bin/true");
    assert!(xc.fails(&["boot_vm", "1"]).starts_with("ERROR: Image not found ["));
    assert_eq!(xc.ok(&["status"]).lines().last(), Some("Active VMs; 0, Highest pl; 0"));
}

#[test]
fn cases_21_22_36_builds_beside_each_other_and_many_overlays() {
    let mut xc = Xc::with_image();
    for n in 0..120 {
        xc.files(&format!("o{n}"), &[("etc/order", &n.to_string()), (&format!("etc/o{n}"), "x")]);
    }
    let names: Vec<String> = (0..120).map(|n| format!("o{n}")).collect();
    let mut words: Vec<&str> = vec!["ximage"];
    words.extend(names.iter().map(String::as_str));
    xc.ok(&words);
    assert_eq!(xc.debugfs("cat /etc/order"), "119");
    words[0] = "mkcdrom";
    let listed = xc.ok(&words);
    let mut sorted: Vec<&str> = listed.lines().collect();
    sorted.sort_unstable();
    assert!(listed.lines().eq(sorted));
    assert!(listed.ends_with("119o119.tar\n"), "{listed}");
    // Two builds of the same image take turns; those of others do not disturb.
    let mut both: Vec<_> = ["o1", "o2"].map(|o| xc.command(&["ximage", o]).spawn().unwrap()).into();
    xc.set("__image", xc.path("other.img").to_str().unwrap());
    both.push(xc.command(&["mkimage"]).spawn().unwrap());
    for mut child in both {
        assert!(child.wait().unwrap().success());
    }
    let text = xc.lab.ok(&["image", "inspect", xc.image().to_str().unwrap()]);
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["layers"].as_array().unwrap().len(), 123);
}

#[test]
fn an_interrupted_build_leaves_the_old_image_and_nothing_else() {
    let xc = Xc::with_image();
    let before = fs::read(xc.image()).unwrap();
    let list = || {
        let mut names: Vec<_> = fs::read_dir(xc.path("ws/xcluster"))
            .unwrap()
            .flatten()
            .map(|e| e.file_name())
            .collect();
        names.sort();
        names
    };
    xc.files("a", &[("etc/x", "a")]);
    xc.overlay("slow", "touch \"$XCLUSTER_TMP/slow\"; sleep 60");
    let names = list();
    let mut child = xc.command(&["ximage", "a", "slow"]).spawn().unwrap();
    xc.lab.until("the slow overlay", || xc.path("ws/tmp/slow").exists());
    kill(child.id(), 2);
    assert!(!child.wait().unwrap().success());
    std::thread::sleep(Duration::from_millis(100));
    assert!(fs::read(xc.image()).unwrap() == before);
    assert_eq!(list(), names);
}

#[test]
fn case_16_images_of_other_tools_are_extended_too() {
    let mut xc = Xc::new();
    xc.files("a", &[("etc/x", "a")]);
    let root = xc.path("root/etc");
    fs::create_dir_all(&root).unwrap();
    fs::write(root.join("old"), "old").unwrap();
    let raw = xc.path("raw.img");
    fs::File::create(&raw).unwrap().set_len(64 << 20).unwrap();
    let made = command("mke2fs")
        .args(["-q", "-t", "ext3", "-d"])
        .arg(xc.path("root"))
        .arg(&raw)
        .status()
        .unwrap();
    assert!(made.success());
    // Relative to where the caller is.
    xc.set("__image", "raw.img");
    xc.ok(&["ximage", "a"]);
    let checked = command("e2fsck").arg("-fn").arg(&raw).status().unwrap();
    assert!(checked.success());
    let packed = xc.image();
    let packed_text = packed.to_str().unwrap().to_owned();
    let mut convert = command("qemu-img");
    convert.args(["convert", "-c", "-O", "qcow2"]).arg(&raw).arg(&packed);
    assert!(convert.status().unwrap().success());
    xc.set("__image", &packed_text);
    xc.files("b", &[("etc/y", "b")]);
    xc.ok(&["ximage", "b"]);
    assert_eq!(
        xc.debugfs("cat /etc/old") + &xc.debugfs("cat /etc/x") + &xc.debugfs("cat /etc/y"),
        "oldab"
    );
    fs::write(&packed, "this is no disk").unwrap();
    assert!(xc.fails(&["ximage", "b"]).contains("an image holds a file system"));
}
