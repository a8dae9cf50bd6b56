//! A machine's life through the command line.

use std::io::Write;

use lodge_vm_tests::lab::{end, wait_for_text};
use lodge_vm_tests::{Lab, assets};

fn run(lab: &Lab, name: &str) {
    lab.boot(name, &assets::shell(), &["--net", "none"]);
}

#[test]
fn a_bare_kernel_boots_and_obeys() {
    let lab = Lab::new();
    run(&lab, "a");
    let machine = lab.machine("a");
    for field in [
        "id",
        "name",
        "state",
        "reason",
        "backend",
        "accel",
        "cpus",
        "memory_bytes",
        "ready",
        "created_at",
    ] {
        assert!(machine.get(field).is_some(), "{field} is missing: {machine}");
    }
    assert_eq!(machine["state"], "running");
    assert_eq!(machine["memory_bytes"], 256 << 20);
    assert_eq!(machine["ready"], true);
    lab.ok(&["pause", "a"]);
    assert_eq!(lab.state("a"), "paused");
    lab.ok(&["pause", "a"]);
    assert!(lab.fails(&["start", "a"]).contains("cannot start a: it is paused"));
    lab.ok(&["resume", "a"]);
    lab.type_and_see("a", "echo $((6 * 7))\n", "42");
    lab.ok(&["reset", "a"]);
    lab.until("the second boot", || lab.console_text("a").matches("GUEST-READY").count() >= 2);
    assert!(lab.fails(&["rm", "a"]).contains("it is running"));
    // This guest does not know its power button.
    lab.ok(&["stop", "a", "--timeout", "1"]);
    assert_eq!(lab.state("a"), "stopped");
    lab.ok(&["stop", "a"]);
    lab.ok(&["start", "a", "--wait", "ready"]);
    lab.ok(&["restart", "a", "--timeout", "1"]);
    lab.ok(&["wait", "a", "--for", "ready", "--timeout", "170"]);
    lab.ok(&["stop", "a", "--force"]);
    let kinds: Vec<String> = lab
        .ok(&["-o", "json", "events", "a"])
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["kind"].to_string())
        .collect();
    for kind in ["created", "start", "running", "ready", "paused", "guest-reset", "exited"] {
        assert!(kinds.contains(&format!("{kind:?}")), "{kind}: {kinds:?}");
    }
    assert!(lab.ok(&["timeline", "a"]).contains("entered"));
    lab.ok(&["rm", "a"]);
    assert_eq!(lab.json(&["gc", "--dry-run"]), serde_json::json!([]));
}

#[test]
fn what_confines_the_hypervisor_is_read_back() {
    let lab = Lab::new();
    run(&lab, "a");
    let inspected = lab.json(&["inspect", "a"]);
    let held = &inspected["runs"]["confinement"];
    assert_eq!(held["no_new_privs"], true);
    assert_eq!(held["seccomp_mode"], 2);
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(held["capabilities"][set], "0000000000000000", "{set}");
    }
    for namespace in ["cgroup", "ipc", "mnt", "net", "pid", "uts"] {
        let own = held["own_namespaces"].as_array().unwrap();
        assert!(own.iter().any(|n| n == namespace), "{namespace}: {own:?}");
    }
    assert!(held["uid"].as_u64().unwrap() > 0x6c00_0000);
    // Nothing of the host but what the plan binds.
    let root: Vec<&str> =
        held["root"].as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
    for name in &root {
        assert!(["dev", "initrd", "kernel", "lib", "lib64", "usr"].contains(name), "{root:?}");
    }
    let plan = lab.ok(&["plan", "--kernel", &assets::kernel(), "--net", "none"]);
    assert!(plan.contains("-sandbox on"), "{plan}");
    assert!(plan.contains("type=microvm"), "{plan}");
}

#[test]
fn the_console_has_history_many_readers_and_a_way_out() {
    let lab = Lab::new();
    run(&lab, "a");
    let mut first = lab.attach("a");
    let mut second = lab.attach("a");
    wait_for_text(&mut first, "GUEST-READY");
    wait_for_text(&mut second, "GUEST-READY");
    first.stdin.as_mut().unwrap().write_all(b"echo seen-by-$((1 + 1))\n").unwrap();
    wait_for_text(&mut first, "seen-by-2");
    wait_for_text(&mut second, "seen-by-2");
    first.stdin.as_mut().unwrap().write_all(b"\r~.").unwrap();
    assert!(first.wait().unwrap().success());
    end(second);
    let mut follow = lab.command(&["logs", "a", "-f", "--tail", "1"]);
    let mut follow = follow.stdout(std::process::Stdio::piped()).spawn().unwrap();
    lab.type_and_see("a", "echo later-$((2 + 2))\n", "later-4");
    wait_for_text(&mut follow, "later-4");
    end(follow);
}

#[test]
fn several_machines_start_at_once() {
    let lab = Lab::new();
    let names = ["a", "b", "c", "d"];
    std::thread::scope(|scope| {
        for name in names {
            scope.spawn(|| run(&lab, name));
        }
    });
    for name in names {
        assert_eq!(lab.state(name), "running");
    }
}

#[test]
fn an_ephemeral_machine_leaves_nothing() {
    let lab = Lab::new();
    let (kernel, initrd) = (assets::kernel(), assets::guest("poweroff -f\n"));
    lab.ok(&[
        "run",
        "--rm",
        "--name",
        "a",
        "--kernel",
        &kernel,
        "--initrd",
        &initrd,
        "--append",
        "console=ttyS0 quiet cryptomgr.notests",
        "--net",
        "none",
        "--memory",
        "256MiB",
    ]);
    lab.until("its end", || lab.state("a") == "absent");
    assert_eq!(lab.json(&["gc", "--dry-run"]), serde_json::json!([]));
}

#[test]
fn files_reach_a_guest_that_has_no_disk() {
    let lab = Lab::new();
    let file = lab.home().join("hello");
    std::fs::write(&file, "hello from the host\n").unwrap();
    let initrd = assets::guest("cat /etc/hello\necho GUEST-READY\nsh\n");
    let put = format!("/etc/hello={}", file.display());
    lab.boot("a", &initrd, &["--net", "none", "--file", &put]);
    assert!(lab.console_text("a").contains("hello from the host"));
    let (kernel, initrd) =
        (assets::kernel(), assets::guest("cat /etc/lodge/metadata.json\necho GUEST-READY\nsh\n"));
    let text = format!(
        "name: b\nmemory: 256MiB\nnics: []\nready: console:GUEST-READY\nmetadata: {{role: web, port: 80}}\n\
         boot: {{kernel: {kernel}, initrd: {initrd}, cmdline: console=ttyS0 quiet cryptomgr.notests}}\n"
    );
    std::fs::write(&file, text).unwrap();
    lab.ok(&["create", file.to_str().unwrap()]);
    lab.ok(&["start", "b", "--wait", "ready", "--timeout", "170"]);
    let said = lab.console_text("b");
    assert!(said.contains("\"role\": \"web\"") && said.contains("\"port\": 80"), "{said}");
}
