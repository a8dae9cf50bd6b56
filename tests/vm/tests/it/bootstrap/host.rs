//! The host's side: scripts that are served to one machine alone, what is known of their runs.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use lodge_vm_tests::bootstrap::runner;
use lodge_vm_tests::lab::command;
use lodge_vm_tests::{Lab, assets, need};

/// A guest that takes an address and runs the runner, which is on its disk.
const GUEST: &str = "mkdir -p /root; mount -t ext4 /dev/vda /root; cd /root; chmod +x runner\n\
    ip link set lo up; ip link set eth0 up; udhcpc -q -n -i eth0 -s /dhcp; echo GUEST-READY\n\
    [ -e start-bootstrap ] && ./runner --dir . --log log --lock /lock --url \
    http://10.0.2.100/vm-bootstrap run\nsh\n";

fn disk(lab: &Lab, armed: bool) -> PathBuf {
    let root = lab.home().join(format!("root-{armed}"));
    fs::create_dir_all(&root).unwrap();
    fs::copy(runner(), root.join("runner")).unwrap();
    fs::write(root.join("bootstrap-max-retry"), "2\n").unwrap();
    fs::write(root.join("bootstrap-pause"), "0\n").unwrap();
    if armed {
        fs::write(root.join("start-bootstrap"), "").unwrap();
    }
    let disk = lab.home().join(format!("disk-{armed}.img"));
    let (from, to) = (root.to_str().unwrap(), disk.to_str().unwrap());
    lab.ok(&["image", "make", from, to, "--size", "64MB"]);
    disk
}

/// Something that the instance's user may read and write.
fn own(lab: &Lab, from: impl AsRef<Path>, name: &str) -> String {
    let path = lab.home().join(name);
    let user = fs::metadata(lab.home()).unwrap().uid();
    fs::copy(from, &path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    chown(&path, Some(user), Some(user)).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Starts a machine whose disk is a copy of one that is ready.
fn start(lab: &Lab, name: &str, armed: bool, more: &[&str]) {
    let disk = own(lab, disk(lab, armed), &format!("{name}.img"));
    let kernel = own(lab, assets::kernel(), "kernel");
    let initrd = own(lab, assets::guest(GUEST), "initrd");
    lab.boot_kernel(name, &kernel, &initrd, &[&["--disk", &disk], more].concat());
}

fn script(lab: &Lab, text: &str) -> String {
    let path = lab.home().join("script.sh");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// All that a machine's user sees of a script that fails once and then does not.
fn whole_way(lab: &Lab) {
    let good = "n=$(cat n); echo run-$n; echo 1 > n; [ \"$n\" = 1 ] || exit 5\n";
    let file = script(lab, good);
    start(lab, "good", true, &["--bootstrap", &file]);
    lab.ok(&["wait", "good", "--for", "bootstrap", "--timeout", "170"]);
    let told = lab.json(&["inspect", "good"])["bootstrap"].clone();
    assert_eq!(told["stage"], "succeeded", "{told}");
    assert_eq!((&told["runs"], &told["limit"], &told["exit"]), (&2.into(), &2.into(), &0.into()));
    assert!(told["log"].as_str().unwrap().contains("run-1"), "{told}");
    let events = lab.ok(&["events", "good"]);
    for line in ["run 1 of 2 running", "run 1 of 2 failed, exit status 5", "run 2 of 2 succeeded"] {
        assert!(events.contains(line), "{line}: {events}");
    }
    // Known after a restart of the daemon as well.
    lab.kill_daemon();
    assert_eq!(lab.json(&["inspect", "good"])["bootstrap"]["stage"], "succeeded");
}

#[test]
fn a_script_is_run_and_its_outcome_is_known() {
    let lab = Lab::new();
    whole_way(&lab);
    let bad = script(&lab, "exit 9\n");
    start(&lab, "bad", true, &["--bootstrap", &bad]);
    let output = lab.run(&["wait", "bad", "--for", "bootstrap", "--timeout", "170"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("the script of bad has failed 2 times; its last exit status was 9"),
        "{said}"
    );
    // Without a script it waits; nothing is counted.
    start(&lab, "none", true, &[]);
    lab.until("the guest", || lab.console_text("none").contains("GUEST-READY"));
    let output = lab.run(&["wait", "none", "--for", "bootstrap", "--timeout", "3"]);
    assert_eq!(output.status.code(), Some(124));
    assert!(lab.json(&["inspect", "none"])["bootstrap"].is_null());
    lab.ok(&["stop", "none", "--force"]);
    let said = lab.fails(&["wait", "none", "--for", "bootstrap"]);
    assert!(said.contains("none"), "{said}");
    // Unless one is required.
    start(&lab, "required", true, &["--require-script"]);
    let said = lab.fails(&["wait", "required", "--for", "bootstrap", "--timeout", "170"]);
    assert!(said.contains("has failed 2 times; its last exit status was 1"), "{said}");
    let said = lab.fails(&["run", "--kernel", &assets::kernel(), "--bootstrap", "/nowhere"]);
    assert!(said.contains("bootstrap.source: /nowhere"), "{said}");
}

/// What is not there and what is broken are told apart, at once; that the daemon is gone is nothing
/// to a guest.
#[test]
fn case_h3_a_dead_helper_is_an_answer() {
    let lab = Lab::new();
    let file = script(&lab, "echo still served\n");
    start(&lab, "one", false, &["--bootstrap", &file]);
    lab.until("the shell", || lab.console_text("one").contains("/root #"));
    lab.kill_daemon();
    let fetch = |number: u32, answer: &str| {
        let typed =
            format!("wget -q -O - http://10.0.2.100/vm-bootstrap 2>&1; echo FETCHED-{number}-$?\n");
        lab.type_and_see("one", &typed, answer);
    };
    fetch(1, "still served");
    let id = lab.machine("one")["id"].as_str().unwrap().to_owned();
    let kept = lab.home().join("run/m").join(id.replace('-', "")).join("vm-bootstrap");
    fs::remove_file(&kept).unwrap();
    fetch(2, "404 Not Found");
    fs::create_dir(&kept).unwrap();
    fetch(3, "503 Service Unavailable");
}

#[test]
fn an_ordinary_users_guest_is_served_too() {
    let lab = Lab::of_user(4021);
    need!(command("slirp4netns").arg("--version").output().is_ok(), "slirp4netns");
    whole_way(&lab);
}

#[test]
fn cases_h1_h2_and_h5_to_h7_one_machine_and_no_other() {
    let lab = Lab::new();
    let big: String = (0..200_000).map(|n| format!("# {n}\n")).collect();
    let first = script(&lab, &big);
    start(&lab, "one", false, &["--bootstrap", &first]);
    let kept = lab.home().join("other.sh");
    fs::write(&kept, "echo of the other\n").unwrap();
    start(&lab, "two", false, &["--bootstrap", kept.to_str().unwrap()]);
    for name in ["one", "two"] {
        lab.until("the guest", || lab.console_text(name).contains("GUEST-READY"));
    }
    let sum = command("md5sum").arg(&first).output().unwrap().stdout;
    let sum = String::from_utf8_lossy(&sum[..32]).into_owned();
    lab.type_and_see(
        "one",
        "for i in $(seq 20); do (wget -q -O - http://10.0.2.100/vm-bootstrap | md5sum > /s$i) & done; \
         wait; cat /s* | sort | uniq -c; echo H1-DONE\n",
        &format!("20 {sum}"),
    );
    lab.type_and_see("one", "wget -q -O - http://10.0.2.100/vm-bootstrap | tail -1\n", "# 199999");
    lab.type_and_see("two", "wget -q -O - http://10.0.2.100/vm-bootstrap\n", "of the other");
    lab.type_and_see("two", "wget http://10.0.2.100/other; echo NOT-$?-FOUND\n", "404 Not Found");
    let post = |number: u32, form: &str, status: u32| {
        let typed = format!(
            "wget -q -O - --post-data '{form}' http://10.0.2.100/; echo POST-{number}-$?\n"
        );
        lab.type_and_see("two", &typed, &format!("POST-{number}-{status}"));
    };
    post(1, "path=../x&content=evil", 1);
    post(2, "path=vm-bootstrap&content=evil", 1);
    post(3, "path=ansible/log&content=first+", 0);
    post(4, "path=ansible/log&content=second", 0);
    let id = lab.machine("two")["id"].as_str().unwrap().to_owned();
    let log = lab.home().join("machines").join(id).join("uploads/ansible/log");
    assert_eq!(fs::read_to_string(&log).unwrap(), "first second");
    post(5, "path=ansible/log&content=third&clear=1", 0);
    assert_eq!(fs::read_to_string(&log).unwrap(), "third");
    lab.type_and_see(
        "two",
        "wget -q -O - http://10.0.2.100/vm-bootstrap; echo AGAIN-$?\n",
        "AGAIN-0",
    );
    assert!(lab.json(&["inspect", "one"])["bootstrap"].is_null());
}
