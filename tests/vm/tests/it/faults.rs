//! What goes wrong, and what Lodge makes of it.

use lodge_vm_tests::lab::kill;
use lodge_vm_tests::{Lab, assets};

fn run_script(lab: &Lab, name: &str, script: &str) {
    lab.boot(name, &assets::guest(script), &["--net", "none"]);
}

const TICKING: &str =
    "echo GUEST-READY\ni=0\nwhile :; do i=$((i + 1)); echo tick-$i; sleep 0.2; done\n";

#[test]
fn guests_outlive_the_daemon_and_keep_their_console() {
    let lab = Lab::new();
    run_script(&lab, "a", TICKING);
    run_script(&lab, "b", TICKING);
    let pid = lab.pid_of_hypervisor("a");
    lab.kill_daemon();
    assert!(std::path::Path::new(&format!("/proc/{pid}")).exists());
    let id = std::fs::read_dir(lab.home().join("machines")).unwrap().next().unwrap().unwrap();
    let log = id.path().join("console.log");
    let before = log.metadata().unwrap().len();
    lab.until("more of the log", || log.metadata().unwrap().len() > before);
    // The next command starts a daemon that finds them.
    assert_eq!(lab.state("a"), "running");
    assert_eq!(lab.pid_of_hypervisor("a"), pid);
    lab.kill_daemon();
    kill(pid, 9);
    lab.until("the loss to be seen", || lab.state("a") == "failed");
    assert_eq!(lab.state("b"), "running");
    lab.ok(&["pause", "b"]);
    lab.kill_daemon();
    assert_eq!(lab.state("b"), "paused");
    lab.ok(&["resume", "b"]);
    lab.ok(&["stop", "b", "--force"]);
}

#[test]
fn a_killed_hypervisor_is_a_failure_with_a_reason() {
    let lab = Lab::new();
    run_script(&lab, "a", TICKING);
    kill(lab.pid_of_hypervisor("a"), 9);
    lab.until("the failure", || lab.state("a") == "failed");
    let reason = lab.machine("a")["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("killed by signal 9"), "{reason}");
    let why = lab.ok(&["why", "a"]);
    assert!(why.contains("GUEST-READY") && why.contains("exited"), "{why}");
    assert!(lab.fails(&["wait", "a", "--for", "ready"]).contains("signal 9"));
    lab.ok(&["start", "a", "--wait", "ready"]);
}

/// As a new version is installed: another file takes the place of the one that runs.
#[test]
fn a_daemon_whose_program_was_replaced_still_starts_machines() {
    let lab = Lab::with_copies();
    lab.ok(&["ls"]);
    let (program, next) = (lab.home().join("lodge"), lab.home().join("next"));
    std::fs::copy(&program, &next).unwrap();
    std::fs::rename(&next, &program).unwrap();
    let daemon = lab.daemon();
    let own = std::fs::read_link(format!("/proc/{daemon}/exe")).unwrap();
    assert!(own.to_string_lossy().ends_with(" (deleted)"), "{own:?}");
    run_script(&lab, "a", TICKING);
    assert_eq!(lab.daemon(), daemon);
}

#[test]
fn a_killed_warden_takes_its_hypervisor_along() {
    let lab = Lab::new();
    run_script(&lab, "a", TICKING);
    let pid = lab.pid_of_hypervisor("a");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let parent = status.lines().find_map(|l| l.strip_prefix("PPid:")).unwrap();
    kill(parent.trim().parse().unwrap(), 9);
    lab.until("the failure", || lab.state("a") == "failed");
    let gone = || !std::path::Path::new(&format!("/proc/{pid}/fd/0")).exists();
    lab.until("the hypervisor's end", gone);
    lab.until("what it had to be given back", || {
        lab.json(&["gc", "--dry-run"]) == serde_json::json!([])
    });
}

#[test]
fn a_kernel_panic_is_a_failure_with_its_line() {
    let lab = Lab::new();
    run_script(&lab, "a", "echo GUEST-READY\nsleep 1\necho c > /proc/sysrq-trigger\nsleep 100\n");
    lab.until("the failure", || lab.state("a") == "failed");
    let reason = lab.machine("a")["reason"].as_str().unwrap().to_owned();
    assert!(reason.starts_with("Kernel panic - not syncing: sysrq triggered crash"), "{reason}");
}

#[test]
fn crashes_are_restarted_as_often_as_the_policy_says() {
    let lab = Lab::new();
    let file = lab.home().join("a.yaml");
    let (kernel, initrd) =
        (assets::kernel(), assets::guest("echo c > /proc/sysrq-trigger\nsleep 100\n"));
    let text = format!(
        "name: a\nmemory: 256MiB\nnics: []\nrestart: {{policy: on-failure, max: 2}}\n\
         boot: {{kernel: {kernel}, initrd: {initrd}, cmdline: console=ttyS0 quiet cryptomgr.notests}}\n"
    );
    std::fs::write(&file, text).unwrap();
    lab.ok(&["create", file.to_str().unwrap()]);
    lab.ok(&["start", "a"]);
    let events = || lab.ok(&["events", "a"]);
    lab.until("the last failure", || {
        events().matches("guest-panic").count() == 3 && lab.state("a") == "failed"
    });
    assert_eq!(events().matches("restart-due").count(), 2);
}

#[test]
fn a_second_daemon_is_refused() {
    let lab = Lab::new();
    let initrd = assets::shell();
    lab.boot("a", &initrd, &[]);
    let (first, guest) = (lab.daemon(), lab.pid_of_hypervisor("a"));
    // One that a command started yields to one that somebody wants, and its guests run on.
    let mut serve = lab.command(&["serve", "--metald", "off"]);
    let mut second = serve.stdout(std::process::Stdio::piped()).spawn().unwrap();
    lodge_vm_tests::lab::wait_for_text(&mut second, "ready");
    assert_ne!(lab.daemon(), first);
    assert_eq!(lab.pid_of_hypervisor("a"), guest);
    for args in [&["serve", "--metald", "off"][..], &["serve", "--unattended"]] {
        let complaint = lab.fails(args);
        assert!(complaint.contains("is in use by another lodge daemon"), "{complaint}");
    }
    assert_eq!(lab.state("a"), "running");
    lab.ok(&["rm", "--force", "a"]);
    lodge_vm_tests::lab::end(second);
    lab.ok(&["ls"]);
}

#[test]
fn ports_in_use_name_their_holder() {
    let lab = Lab::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (kernel, initrd) = (assets::kernel(), assets::shell());
    let run = |name: &str, port: u16| {
        let (port, kernel, initrd) = (format!("{port}:80"), kernel.clone(), initrd.clone());
        let args =
            ["run", "--name", name, "--kernel", &kernel, "--initrd", &initrd, "--port", &port];
        lab.run(&args)
    };
    let refused = run("a", port);
    let complaint = String::from_utf8_lossy(&refused.stderr).into_owned();
    let own = format!("already in use by {}", "it-");
    assert!(complaint.contains(&own), "{complaint}");
    assert!(complaint.contains(&format!("(process {})", std::process::id())), "{complaint}");
    drop(listener);
    assert!(lab.run(&["start", "a"]).status.success());
    let refused = run("b", port);
    let complaint = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(complaint.contains("already in use by machine a"), "{complaint}");
}

#[test]
fn strays_are_explained_and_removed() {
    let lab = Lab::new();
    lab.ok(&["ls"]);
    let stray = lab.home().join("machines/00000000-0000-4000-8000-000000000001");
    std::fs::create_dir_all(&stray).unwrap();
    std::fs::write(lab.home().join("images/sha256/part-x"), "half").unwrap();
    let plan = lab.ok(&["gc", "--dry-run"]);
    assert!(
        plan.contains("no machine has this identity") && plan.contains("no image names it"),
        "{plan}"
    );
    assert!(stray.exists());
    lab.ok(&["gc"]);
    assert!(!stray.exists());
    assert_eq!(lab.json(&["gc", "--dry-run"]), serde_json::json!([]));
}

#[test]
fn a_damaged_record_is_one_broken_machine() {
    let lab = Lab::new();
    for name in ["a", "b"] {
        let file = lab.home().join(name);
        std::fs::write(&file, format!("name: {name}\ndisks: [{{size: 1GiB}}]\n")).unwrap();
        lab.ok(&["create", file.to_str().unwrap()]);
    }
    lab.kill_daemon();
    let spoil = "import sqlite3, sys\n\
                 c = sqlite3.connect(sys.argv[1])\n\
                 c.execute(\"update machines set record = '{' where name = 'a'\")\n\
                 c.commit()\n";
    let database = lab.home().join("lodge.db");
    let spoiled =
        lodge_vm_tests::lab::command("python3").args(["-c", spoil]).arg(database).status();
    assert!(spoiled.unwrap().success());
    assert_eq!(lab.state("a"), "broken");
    assert_eq!(lab.state("b"), "created");
    assert!(lab.ok(&["inspect", "a"]).contains("the record is unreadable"));
    lab.ok(&["rm", "a"]);
    assert_eq!(lab.state("a"), "absent");
}

/// A reboot takes processes and leaves files: their numbers and sockets mean nothing any more.
#[test]
fn what_a_reboot_leaves_is_recognised() {
    let lab = Lab::new();
    run_script(&lab, "a", TICKING);
    let pid = lab.pid_of_hypervisor("a");
    lab.kill_daemon();
    kill(pid, 9);
    let run = std::fs::read_dir(lab.home().join("run/m")).unwrap().next().unwrap().unwrap().path();
    let exit = run.join("exit.json");
    lab.until("the warden's end", || exit.exists());
    std::fs::remove_file(exit).unwrap();
    let launch = run.join("launch.json");
    let text = std::fs::read_to_string(&launch).unwrap();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let other = "00000000-0000-4000-8000-000000000000";
    assert!(text.contains(boot.trim()));
    std::fs::write(&launch, text.replace(boot.trim(), other)).unwrap();
    assert_eq!(lab.state("a"), "failed");
    assert_eq!(lab.machine("a")["reason"], "the host was restarted");
    lab.ok(&["start", "a", "--wait", "ready", "--timeout", "170"]);
}

#[test]
fn a_build_that_is_broken_off_leaves_nothing() {
    let lab = Lab::new();
    lab.ok(&["ls"]);
    let mut build = lab.command(&["image", "build", "debian-12"]).spawn().unwrap();
    let cache = lab.home().join("cache");
    let scratch = || {
        let entries = std::fs::read_dir(&cache).unwrap().flatten();
        let mut names = entries.map(|e| e.file_name().to_string_lossy().into_owned());
        names.any(|n| n.starts_with("build-"))
    };
    lab.until("the build", scratch);
    kill(build.id(), 2);
    assert!(!build.wait().unwrap().success());
    lab.until("the scratch to go", || !scratch());
    // In the middle of the work, when there are mounts in the tree, as well as at its beginning.
    let mut build = lab.command(&["image", "build", "debian-12"]);
    let mut build = build.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let said = std::io::BufReader::new(build.stderr.take().unwrap());
    let mut lines = std::io::BufRead::lines(said).map_while(Result::ok);
    assert!(lines.any(|line| line.contains("installing essential")));
    kill(build.id(), 2);
    assert!(!build.wait().unwrap().success());
    lab.until("the scratch to go", || !scratch());
    let own = lab.home().to_str().unwrap();
    let mounted = || std::fs::read_to_string("/proc/self/mounts").unwrap().contains(own);
    lab.until("the mounts to go", || !mounted());
    assert_eq!(lab.json(&["image", "ls"]), serde_json::json!([]));
    assert_eq!(lab.json(&["gc", "--dry-run"]), serde_json::json!([]));
}
