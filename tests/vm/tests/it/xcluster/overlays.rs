//! Overlays: what their programs are given, what they may do, and what becomes of it.

use std::fs;

use lodge_vm_tests::lab::command;
use lodge_vm_tests::xcluster::Xc;

fn isoinfo(xc: &Xc, args: &[&str]) -> String {
    let iso = xc.path("ws/tmp/cdrom.iso");
    let output = command("isoinfo").args(args).arg("-i").arg(iso).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn cases_3_5_6_7_cdroms_hold_overlays_in_order() {
    let mut xc = Xc::bare();
    xc.files("A", &[("etc/x", "a")]);
    xc.files("B", &[("etc/x", "b")]);
    assert_eq!(xc.ok(&["mkcdrom", "A", "A", "B"]), "00A.tar\n01B.tar\n");
    xc.set("XOVLS", "B A");
    assert_eq!(xc.ok(&["mkcdrom", "A"]), "00A.tar\n01B.tar\n");
    let list = isoinfo(&xc, &["-R", "-f"]);
    assert_eq!(list.lines().collect::<Vec<_>>(), ["/00A.tar", "/01B.tar"]);
    assert!(isoinfo(&xc, &["-d"]).contains("Volume id: xcluster"));
    let before = fs::read(xc.path("ws/tmp/cdrom.iso")).unwrap();
    let said = xc.fails(&["mkcdrom", "A", "nosuch"]);
    assert_eq!(said, "ERROR: Ovl not found [nosuch]\n");
    assert!(fs::read(xc.path("ws/tmp/cdrom.iso")).unwrap() == before);
    assert_eq!(xc.ok(&["mkcdrom"]), "");
    assert!(!xc.path("ws/tmp/cdrom.iso").exists());
}

#[test]
fn programs_are_given_everything_and_reach_nothing_else() {
    let mut xc = Xc::bare();
    xc.files("helper", &[("etc/x", "a")]);
    let outside = tempfile::tempdir_in("/var").unwrap();
    xc.set("xcluster_FOO", "a b");
    xc.set("SETUP", "one,two");
    xc.overlay(
        "asks",
        &format!(
            "set -e; tmp=$(mktemp -d); cd $tmp; mkdir etc\n\
             env | sort >etc/env; $XCLUSTER ovld helper >etc/ovld; pwd >etc/cwd\n\
             $XCLUSTER install_prog --dest=$tmp true nosuch; $XCLUSTER cploader --dest=$tmp\n\
             $XCLUSTER libs true >etc/libs\n\
             ip -o link >etc/links; touch {0}/x 2>etc/denied || true\n\
             python3 -c 'import socket; socket.socket(socket.AF_UNIX)' 2>etc/socket || true\n\
             touch $XCLUSTER_WORKSPACE/here\n\
             tar -cf - *; rm -r $tmp",
            outside.path().display()
        ),
    );
    let said = xc.says(&["mkcdrom", "--mem=77", "asks"]);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.err.contains("WARNING: Not found [nosuch]"), "{said:?}");
    isoinfo(&xc, &["-d"]);
    let tar = xc.path("asks.tar");
    let bytes = command("isoinfo")
        .args(["-R", "-x", "/00asks.tar", "-i"])
        .arg(xc.path("ws/tmp/cdrom.iso"))
        .output()
        .unwrap()
        .stdout;
    fs::write(&tar, bytes).unwrap();
    let file = |name: &str| {
        let output = command("tar").args(["-xOf"]).arg(&tar).arg(name).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let env = file("etc/env");
    for line in ["xcluster_FOO=a b", "__mem=77", "SETUP=one,two", "__kver=linux-6.1"] {
        assert!(env.lines().any(|l| l == line), "{line}: {env}");
    }
    for name in ["ARCHIVE", "XCLUSTER_WORKSPACE", "USER", "KERNELDIR", "__image"] {
        assert!(env.lines().any(|l| l.starts_with(&format!("{name}="))), "{name}: {env}");
    }
    assert_eq!(file("etc/ovld").trim(), xc.path("ovl/helper").to_str().unwrap());
    assert!(file("etc/libs").contains("libc.so.6"));
    let links = file("etc/links");
    assert!(links.lines().count() == 1 && links.contains("lo:"), "{links}");
    assert!(file("etc/denied").contains("Permission denied"), "{}", file("etc/denied"));
    // The daemon's socket is a way in for whoever can connect to it.
    assert!(file("etc/socket").contains("Permission denied"), "{}", file("etc/socket"));
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    assert!(xc.path("ws/here").exists());
    let names = command("tar").arg("-tf").arg(&tar).output().unwrap().stdout;
    let names = String::from_utf8_lossy(&names).into_owned();
    assert!(names.contains("bin/true") && names.contains("ld-linux-x86-64.so.2"), "{names}");
}

#[test]
fn cases_25_to_27_the_cache_and_the_path() {
    let mut xc = Xc::bare();
    xc.overlay(
        "o",
        "d=$(mktemp -d); cd $d; mkdir etc; echo ${SETUP:-none} >etc/setup; tar -cf - etc; rm -r $d",
    );
    xc.ok(&["cache", "o"]);
    xc.set("SETUP", "x");
    xc.ok(&["cache", "o"]);
    xc.set("SETUP", "a,b");
    let many = xc.fails(&["cache", "o"]);
    assert_eq!(many, "ERROR: SETUP has many items [a,b]\n");
    xc.unset("SETUP");
    let listed = xc.ok(&["cache", "--list"]);
    let dir = xc.path("ws/xcluster/cache");
    assert_eq!(listed, format!("Cache dir [{}];\ndefault/o.tar.xz\nx/o.tar.xz\n", dir.display()));
    let path = xc.ok(&["cached_tar", "o"]);
    assert_eq!(path.trim(), dir.join("default/o.tar.xz").to_str().unwrap());
    let said = xc.says(&["mkcdrom", "o"]);
    assert!(said.err.contains("Use Cached ["), "{said:?}");
    xc.set("SETUP", "y,x");
    assert!(xc.ok(&["cached_tar", "o"]).contains("/x/o.tar.xz"));
    let unpacked = xc.says(&["cat_tar", dir.join("x/o.tar.xz").to_str().unwrap()]);
    assert!(unpacked.out.contains("etc/setup"));
    assert_eq!(xc.says(&["cached_tar", "nosuch"]).code, 1);
    xc.ok(&["cache", "--clear"]);
    assert!(!dir.exists());
    assert_eq!(xc.fails(&["ovld"]), "ERROR: No ovl\n");
    // Here wins over the path.
    fs::create_dir_all(xc.path("o")).unwrap();
    fs::copy(xc.path("ovl/o/tar"), xc.path("o/tar")).unwrap();
    assert_eq!(xc.ok(&["mkcdrom", "o"]), "00o.tar\n");
}

#[test]
fn the_command_line_is_strict_and_helps() {
    let xc = Xc::bare();
    assert!(xc.ok(&[]).starts_with("Usage: xc COMMAND"));
    assert!(xc.ok(&["help"]).contains("\n  mkimage"));
    assert_eq!(xc.fails(&["strat"]), "ERROR: Invalid command [strat]; did you mean start?\n");
    let typo = xc.fails(&["start", "--nvmm=3"]);
    assert_eq!(typo, "ERROR: Unknown option --nvmm; did you mean --nvm?\n");
    assert_eq!(xc.ok(&["completion", "sca"]), "scaleout\nscalein\n");
    let env = xc.ok(&["env"]);
    assert!(env.contains("\n__image='") && !env.contains("__nvm="), "{env}");
    // Called by its own name it is the same.
    let link = xc.path("xc");
    std::os::unix::fs::symlink(lodge_vm_tests::lab::program(), &link).unwrap();
    let output = command(&link).arg("completion").arg("boot").output().unwrap();
    assert_eq!(output.stdout, b"boot_vm\n");
    let made = xc.lab.run(&["xcadmin", "mkovl", "--template=template", "--ovldir=/tmp/x/y", "a/b"]);
    assert!(!made.status.success());
    let mut words = xc.lab.command(&["xcadmin", "mkovl", "--template=template", "mine"]);
    words.env("XCLUSTER_OVLPATH", lodge_vm_tests::xcluster::shipped());
    let own = words.env("__ovldir", xc.path("made")).output().unwrap();
    assert!(own.status.success(), "{own:?}");
    assert!(xc.path("made/mine/default/bin/mine_test").is_file());
}

/// A user's own commands, beside those of `xc` and in their place.
#[test]
fn a_hook_adds_commands_and_replaces_them() {
    let mut xc = Xc::bare();
    xc.files("A", &[("etc/x", "a")]);
    let hook = xc.path("hook.sh");
    let text = "##  mine [words]  What it does\n\
                cmd_mine() {\n    log noted\n    test \"$__no_words\" = yes && set --\n    \
                echo \"$__kver,$__a_b,$#,$1\"\n    cmd_mkcdrom A\n}\n\
                cmd_env () { echo replaced; XCLUSTER_HOOK= $XCLUSTER env | grep ^__kver; }\n\
                cmd_bad() { die \"it is bad\"; }\n";
    fs::write(&hook, text).unwrap();
    xc.set("XCLUSTER_HOOK", hook.to_str().unwrap());
    let said = xc.says(&["mine", "--a-b=$(id) 'x'", "--kver=linux-1.2", "two words", "; id"]);
    assert_eq!((said.code, said.err.as_str()), (0, "noted\n"), "{said:?}");
    assert_eq!(said.out, "linux-1.2,$(id) 'x',2,two words\n00A.tar\n");
    let said = xc.ok(&["env"]);
    assert!(said.starts_with("replaced\n__kver='"), "{said}");
    assert_eq!(xc.fails(&["bad"]), "ERROR: it is bad\n");
    assert!(xc.ok(&["help"]).contains("  mine [words]  What it does\n"));
    // The others are as strict as ever.
    assert!(xc.fails(&["mkcdrom", "--nosuch=1"]).contains("Unknown option --nosuch"));
    assert!(xc.fails(&["nosuch"]).contains("Invalid command [nosuch]"));
    assert!(xc.fails(&["mine", "--a;b=1"]).contains("is no name of a variable"));
    xc.set("XCLUSTER_HOOK", "/nowhere/hook");
    assert!(xc.fails(&["mkcdrom"]).contains("XCLUSTER_HOOK=/nowhere/hook"));
}

/// What was packed with cpio is laid like what was packed with tar.
#[test]
fn cpio_archives_are_overlays_too() {
    let xc = Xc::bare();
    let mut writer = lodge_formats::cpio::Writer::new(Vec::new());
    writer.file("/etc/deep/x", 0o640, b"from cpio").unwrap();
    let plain = writer.finish().unwrap();
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut packer, &plain).unwrap();
    for (name, bytes) in [("one.cpio", plain.clone()), ("two.cpio.gz", packer.finish().unwrap())] {
        let path = xc.path(name);
        fs::write(&path, bytes).unwrap();
        xc.ok(&["mkcdrom", path.to_str().unwrap()]);
        let label = name.split('.').next().unwrap();
        let output = command("isoinfo")
            .args(["-R", "-x", &format!("/00{label}.tar"), "-i"])
            .arg(xc.path("ws/tmp/cdrom.iso"))
            .output()
            .unwrap();
        let tar = xc.path("out.tar");
        fs::write(&tar, output.stdout).unwrap();
        let listed = command("tar").args(["-tvf"]).arg(&tar).output().unwrap();
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        assert!(listed.contains("-rw-r----- ") && listed.contains(" etc/deep/x"), "{listed}");
    }
    let cut = xc.path("cut.cpio");
    fs::write(&cut, &plain[..plain.len() - 200]).unwrap();
    let said = xc.fails(&["mkcdrom", cut.to_str().unwrap()]);
    assert!(said.contains("the cpio archive: it is cut off"), "{said}");
}
