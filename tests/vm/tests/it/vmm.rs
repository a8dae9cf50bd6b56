//! Firecracker and Cloud Hypervisor: the same life over both, in the same jail. Against a simulator
//! of their interfaces, and with the real ones where they are found; their guest is the probe.

use std::process::Stdio;

use lodge_vm_tests::lab::command;
use lodge_vm_tests::metald::Server;
use lodge_vm_tests::{Lab, assets, need};
use serde_json::{Value, json};

const BOTH: [&str; 2] = ["firecracker", "cloud-hypervisor"];

/// An instance that finds both hypervisors in its own folder.
fn lab() -> Lab {
    with_disk(Lab::with_simulators(env!("CARGO_BIN_EXE_vmm-simulator")))
}

fn with_disk(lab: Lab) -> Lab {
    let disk = lab.home().join("disk.img");
    std::fs::write(&disk, [b"DISK".repeat(128), vec![0; 1 << 20]].concat()).unwrap();
    lab
}

/// The real one, where it is named or on PATH; says aloud that it is not.
fn real(backend: &str) -> Option<Lab> {
    let variable = format!("LODGE_{}", backend.replace('-', "_").to_uppercase());
    let named = std::env::var_os(&variable).map(std::path::PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(backend));
    let Some(program) = named.into_iter().chain(found).find(|program| program.is_file()) else {
        eprintln!("SKIPPED {}: needs {backend}, on PATH or named by {variable}", module_path!());
        return None;
    };
    let mut lab = Lab::new();
    lab.set(&variable, program.to_str().unwrap());
    Some(with_disk(lab))
}

/// Both as they are simulated, then those that are there.
fn each() -> impl Iterator<Item = (&'static str, Lab)> {
    let simulated = BOTH.into_iter().map(|backend| (backend, lab()));
    simulated.chain(BOTH.into_iter().filter_map(|backend| Some((backend, real(backend)?))))
}

fn document(lab: &Lab, name: &str, backend: &str, more: &str) -> String {
    let kernel = assets::probe();
    let memory = if more.contains("memory:") { "" } else { "memory: 128MiB\n" };
    let text = format!(
        "name: {name}\nbackend: {backend}\naccel: kvm\n{memory}ready: console:GUEST-READY\n\
         boot: {{kernel: {kernel}, cmdline: 'console=ttyS0 from.the=caller'}}\n{more}"
    );
    let file = lab.home().join(format!("{name}.yaml"));
    std::fs::write(&file, text).unwrap();
    file.to_string_lossy().into_owned()
}

fn start(lab: &Lab, name: &str, backend: &str, more: &str) {
    lab.ok(&["create", &document(lab, name, backend, more)]);
    lab.ok(&["start", name, "--wait", "ready", "--timeout", "60"]);
}

#[test]
fn the_whole_life_over_both() {
    need!(assets::kvm_opens(), "a /dev/kvm that opens");
    for (backend, lab) in each() {
        let disk = format!(
            "nics: [{{}}]\ndisks:\n- {{source: {}, layered: true}}\n- {{size: 1MiB}}\n- {{source: {}, read_only: true}}\n",
            lab.home().join("disk.img").display(),
            lab.home().join("disk.img").display(),
        );
        let name = &backend[..5];
        start(&lab, name, backend, &disk);
        let machine = lab.machine(name);
        assert_eq!((&machine["backend"], &machine["accel"]), (&backend.into(), &"kvm".into()));
        let text = lab.console_text(name);
        for part in [
            "PROBE cmdline: console=ttyS0 from.the=caller",
            "PROBE disk0: DISK writable=true",
            "PROBE disk1:  writable=true",
            "PROBE disk2: DISK writable=false",
            "PROBE nets: 1",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        let runs = lab.json(&["inspect", name])["runs"].clone();
        let held = &runs["confinement"];
        assert_eq!(held["seccomp_mode"], 2);
        assert_eq!(held["capabilities"]["CapEff"], "0000000000000000");
        assert!(held["uid"].as_u64().unwrap() > 60_000);
        assert!(held["own_namespaces"].as_array().unwrap().iter().any(|n| n == "net"));
        lab.type_and_see(name, "hello\n", "typed: hello");
        // It counts, stands still, and goes on where it stood; a new daemon finds it standing.
        lab.until("ticks", || lab.ticks(name) > 3);
        lab.ok(&["pause", name]);
        let stood = lab.ticks(name);
        lab.kill_daemon();
        assert_eq!(lab.state(name), "paused");
        assert_eq!(lab.ticks(name), stood);
        lab.ok(&["resume", name]);
        lab.until("ticks again", || lab.ticks(name) > stood);
        // What it writes goes to its own copy, which the next start finds.
        lab.type_and_see(name, "write\n", "written");
        lab.ok(&["stop", name, "--timeout", "30"]);
        assert!(!lab.ok(&["events", name]).contains("stop-timed-out"));
        assert!(lab.console_text(name).contains("guest powers off"));
        let id = machine["id"].as_str().unwrap();
        let raw = std::fs::read(lab.home().join(format!("machines/{id}/disk0.raw"))).unwrap();
        assert_eq!(&raw[512..517], b"WROTE");
        assert_eq!(std::fs::read(lab.home().join("disk.img")).unwrap()[512], 0);
        lab.ok(&["start", name, "--wait", "ready"]);
        lab.ok(&["stop", name, "--force"]);
        lab.ok(&["rm", name]);
        assert!(lab.ok(&["gc", "--dry-run"]).contains("network default"));
    }
}

/// Memory goes to the disk and comes back.
#[test]
fn memory_is_saved_by_both() {
    need!(assets::kvm_opens(), "a /dev/kvm that opens");
    for (backend, lab) in each() {
        let name = &backend[..5];
        let image = lab.home().join("disk.img");
        let more =
            format!("nics: [{{}}]\ndisks: [{{source: {}, layered: true}}]\n", image.display());
        start(&lab, name, backend, &more);
        lab.until("ticks", || lab.ticks(name) > 3);
        // Running, then standing still: it runs afterwards.
        for pause in [false, true] {
            if pause {
                lab.ok(&["pause", name]);
            }
            let mut suspend = lab.command(&["suspend", name]);
            let output = suspend.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            if said.contains("NestedState") {
                // One of them saves none where KVM lacks nested virtualisation, and says so.
                eprintln!("SKIPPED {}: {said}", module_path!());
                lab.until("running", || lab.state(name) == "running");
                break;
            }
            assert!(output.status.success(), "{said}");
            let stood = lab.ticks(name);
            lab.kill_daemon();
            assert_eq!((lab.state(name).as_str(), lab.ticks(name)), ("suspended", stood));
            lab.ok(&["start", name]);
            assert_eq!(lab.machine(name)["ready"], true);
            lab.until("ticks again", || lab.ticks(name) > stood);
            let text = lab.console_text(name);
            assert_eq!(text.matches("GUEST-READY").count(), 1, "{text}");
            assert!(text.contains(&format!("tick {}\r", stood + 1)), "{text}");
        }
        let home = lab.home().join("machines").join(lab.machine(name)["id"].as_str().unwrap());
        assert_eq!(std::fs::read_dir(home.join("memory")).unwrap().count(), 0);
        lab.type_and_see(name, "write\n", "written");
        lab.ok(&["stop", name, "--force"]);
        lab.ok(&["rm", name]);
        assert!(!home.exists());
    }
}

/// A file of the host's is written to as it lies, whoever's it is, and stays theirs.
#[test]
fn files_of_others_are_lent() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    need!(assets::kvm_opens(), "a /dev/kvm that opens");
    for (backend, lab) in each() {
        let name = &backend[..5];
        let lent = |file: &str| {
            let path = lab.home().join(file);
            std::fs::copy(lab.home().join("disk.img"), &path).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            std::os::unix::fs::chown(&path, Some(1234), Some(1235)).unwrap();
            path
        };
        let (own, read) = (lent("own.img"), lent("read.img"));
        let disks = format!(
            "nics: []\ndisks:\n- {{source: {}}}\n- {{source: {}, read_only: true}}\n",
            own.display(),
            read.display()
        );
        start(&lab, name, backend, &disks);
        let text = lab.console_text(name);
        assert!(text.contains("PROBE disk0: DISK writable=true"), "{text}");
        assert!(text.contains("PROBE disk1: DISK writable=false"), "{text}");
        lab.type_and_see(name, "write\n", "written");
        lab.ok(&["stop", name, "--force"]);
        assert_eq!(&std::fs::read(&own).unwrap()[512..517], b"WROTE");
        let found = std::fs::metadata(&own).unwrap();
        assert_eq!((found.uid(), found.gid(), found.mode() & 0o777), (1234, 1235, 0o600));
        lab.ok(&["rm", name]);
    }
}

#[test]
fn ends_of_every_kind_are_told_apart() {
    need!(assets::kvm_opens(), "a /dev/kvm that opens");
    for (backend, lab) in each() {
        let name = &backend[..5];
        start(&lab, name, backend, "nics: []\n");
        let end = |typed: &str, state: &str| {
            // Nobody reads here what it prints.
            let mut console = lab.command(&["console", name]);
            console.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
            let mut console = console.spawn().unwrap();
            use std::io::Write;
            console.stdin.as_mut().unwrap().write_all(typed.as_bytes()).unwrap();
            lab.until(state, || lab.state(name) == state);
            lodge_vm_tests::lab::end(console);
            lab.machine(name)["reason"].clone()
        };
        assert_eq!(end("poweroff\n", "stopped"), Value::Null);
        lab.ok(&["start", name, "--wait", "ready"]);
        let reason = end("crash\n", "failed");
        assert!(reason.as_str().unwrap().contains("status 1"), "{reason}");
        lab.ok(&["start", name, "--wait", "ready"]);
        let reason = end("panic\n", "failed");
        assert_eq!(reason, "Kernel panic - not syncing: simulated");
        lab.ok(&["start", name, "--wait", "ready"]);
        lodge_vm_tests::lab::kill(lab.pid_of_hypervisor(name), 9);
        lab.until("failed", || lab.state(name) == "failed");
        // A guest that does not listen is ended all the same.
        lab.ok(&["rm", name]);
        let deaf = document(&lab, name, backend, "nics: []\n");
        let text = std::fs::read_to_string(&deaf).unwrap().replace("from.the=caller", "deaf");
        std::fs::write(&deaf, text).unwrap();
        lab.ok(&["create", &deaf]);
        lab.ok(&["start", name, "--wait", "ready"]);
        lab.ok(&["stop", name, "--timeout", "1"]);
        assert!(lab.ok(&["events", name]).contains("stop-timed-out"));
        lab.ok(&["rm", name]);
    }
}

#[test]
fn each_is_told_what_was_asked_or_refuses_it_by_name() {
    need!(assets::kvm_opens(), "a /dev/kvm that opens");
    let lab = lab();
    let limits = "nics:\n- {rx_limit: {bandwidth: 1000000, refill_ms: 100, burst: 5000}, tx_limit: {bandwidth: 1000000, refill_ms: 100, burst: 5000}}\n";
    start(&lab, "f", "firecracker", limits);
    let text = lab.console_text("f");
    assert!(text.contains(r#""rx_rate_limiter":{"bandwidth":{"one_time_burst":5000,"refill_time":100,"size":100000}}"#), "{text}");
    start(&lab, "c", "cloud-hypervisor", limits);
    assert!(
        lab.console_text("c").contains("bw_size=100000,bw_refill_time=100,bw_one_time_burst=5000")
    );
    let refused = |name: &str, backend: &str, more: &str| {
        lab.fails(&["create", &document(&lab, name, backend, more)])
    };
    let said = refused("x", "qemu", limits);
    assert!(said.contains("nics.nic0.rx_limit") && said.contains("qemu"), "{said}");
    let said = refused("x", "firecracker", "cpus: {count: 1, max: 2}\n");
    assert!(said.contains("cpus.max: firecracker: firecracker lacks plugging in CPUs"), "{said}");
    let said = refused("x", "firecracker", "cpus: 3\n");
    assert!(said.contains("cpus.count: firecracker: 3 CPUs are not 1 or an even number"), "{said}");
    let said = refused("x", "cloud-hypervisor", "nics: [{tx_limit: {bandwidth: 1}}]\n");
    assert!(said.contains("nics[0].tx_limit: cloud-hypervisor"), "{said}");
    let said = refused("x", "cloud-hypervisor", "shares: [{source: /, tag: s}]\n");
    assert!(
        said.contains("shares.s: cloud-hypervisor: cloud-hypervisor lacks shared folders"),
        "{said}"
    );
    // Room for more, used while it runs.
    start(&lab, "grows", "cloud-hypervisor", "nics: []\ncpus: {count: 1, max: 4}\n");
    lab.ok(&["set", "grows", "--cpus", "3"]);
    assert!(lab.console_text("grows").contains("resized to 3 134217728"));
    // Devices come and go, and come back with the next start.
    let disk = lab.home().join("disk.img");
    let said = lab.fails(&["set", "grows", "--add-disk", disk.to_str().unwrap()]);
    assert!(said.contains("for reading only"), "{said}");
    lab.ok(&["set", "grows", "--add-disk", &format!("{}:ro", disk.display())]);
    assert!(lab.console_text("grows").contains("PROBE disk0: DISK writable=false"));
    lab.ok(&["set", "grows", "--add-disk", "1MiB"]);
    assert!(lab.console_text("grows").contains("PROBE disk1:  writable=true"));
    lab.ok(&["set", "grows", "--add-nic", "default"]);
    assert!(lab.console_text("grows").contains("PROBE nets: 1"));
    let said = lab.fails(&["suspend", "grows"]);
    assert!(said.contains("its next start differs from this one"), "{said}");
    lab.ok(&["restart", "grows", "--timeout", "30"]);
    let anew = || lab.console_text("grows").matches("GUEST-READY").count() > 1;
    lab.until("the next start", anew);
    let text = lab.console_text("grows");
    let last = &text[text.rfind("PROBE cmdline").unwrap()..];
    assert!(last.contains("disk0: DISK") && last.contains("disk1:") && last.contains("nets: 1"));
    lab.ok(&["set", "grows", "--remove-disk", "disk0"]);
    lab.ok(&["set", "grows", "--remove-nic", "nic0"]);
    let text = lab.console_text("grows");
    assert!(text.contains("unplugged disk-disk0") && text.contains("unplugged nic-nic0"));
    start(&lab, "more", "firecracker", "nics: []\nmemory: {size: 128MiB, max: 384MiB}\n");
    lab.ok(&["set", "more", "--memory", "256MiB"]);
    assert!(lab.console_text("more").contains("plugged 128"));
    let said = lab.fails(&["set", "more", "--add-disk", "1MiB"]);
    assert!(said.contains("firecracker"), "{said}");
    // The plan says what each of them can, and is what is carried out.
    let plan = lab.json(&["plan", &document(&lab, "any", "auto", "nics: []\n")]);
    assert_eq!(plan["chosen"]["backend"], "firecracker");
    assert_eq!(plan["backends"]["qemu"]["can"], true);
    let calls = plan["chosen"]["calls"].as_array().unwrap();
    assert_eq!(calls.last().unwrap()["body"]["action_type"], "InstanceStart");
    let text = lab.ok(&["plan", &document(&lab, "any", "auto", "nics: []\n")]);
    assert!(text.contains("firecracker: yes") && text.contains("cloud-hypervisor: yes"), "{text}");
}

#[test]
fn a_hypervisor_that_refuses_its_description_leaves_nothing() {
    need!(assets::kvm_opens(), "a /dev/kvm that opens");
    let lab = lab();
    for backend in BOTH {
        let name = &backend[..5];
        let file = document(&lab, name, backend, "nics: []\n");
        let text = std::fs::read_to_string(&file).unwrap().replace("from.the=caller", "refuse");
        std::fs::write(&file, text).unwrap();
        lab.ok(&["create", &file]);
        let said = lab.fails(&["start", name]);
        assert!(said.contains("the command line is not to its taste"), "{said}");
        assert_eq!(lab.state(name), "failed");
        let mut pgrep = command("pgrep");
        let output = pgrep.args(["-x", "firecracker|cloud-hyperviso"]).stdout(Stdio::piped());
        let output = output.output().unwrap();
        let home = lab.home().to_string_lossy().into_owned();
        for pid in String::from_utf8_lossy(&output.stdout).lines() {
            let line =
                std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
            assert!(!line.contains(&home), "{pid} is left");
        }
        lab.ok(&["rm", name]);
    }
    assert!(lab.ok(&["gc", "--dry-run"]).contains("nothing to remove"));
}

/// In each kind of jail: with a network's namespace and a folder to make a socket in, and without.
#[test]
fn no_way_leads_out_of_the_jail() {
    need!(assets::kvm_opens(), "a /dev/kvm that opens");
    let lab = lab();
    for backend in BOTH {
        let name = &backend[..5];
        let file = document(&lab, name, backend, "nics: [{}]\ndisks: [{size: 1MiB}]\n");
        let text = std::fs::read_to_string(&file).unwrap().replace("from.the=caller", "escape");
        std::fs::write(&file, text).unwrap();
        lab.ok(&["create", &file]);
        lab.ok(&["start", name, "--wait", "ready", "--timeout", "60"]);
        let text = lab.console_text(name);
        let open: Vec<&str> = text.lines().filter(|line| line.starts_with("OPEN")).collect();
        assert_eq!(open, Vec::<&str>::new(), "{backend}");
        assert!(text.lines().filter(|line| line.starts_with("CLOSED")).count() > 30, "{text}");
    }
}

#[test]
fn many_at_once() {
    need!(assets::kvm_opens(), "a /dev/kvm that opens");
    let names: Vec<String> = (0..64).map(|i| format!("m{i}")).collect();
    let simulated = lab();
    for (i, name) in names.iter().enumerate() {
        simulated.ok(&["create", &document(&simulated, name, BOTH[i % 2], "nics: []\n")]);
    }
    start_all(&simulated, &names);
    for backend in BOTH {
        let Some(lab) = real(backend) else { continue };
        for name in &names {
            lab.ok(&["create", &document(&lab, name, backend, "nics: []\n")]);
        }
        start_all(&lab, &names);
    }
}

fn start_all(lab: &Lab, names: &[String]) {
    std::thread::scope(|scope| {
        for chunk in names.chunks(16) {
            scope.spawn(move || {
                for name in chunk {
                    lab.ok(&["start", name, "--wait", "ready", "--timeout", "100"]);
                }
            });
        }
    });
    let list = lab.json(&["ls"]);
    assert_eq!(list.as_array().unwrap().len(), 64);
    let mut args = vec!["rm", "--force"];
    args.extend(names.iter().map(String::as_str));
    lab.ok(&args);
    assert!(lab.ok(&["gc", "--dry-run"]).contains("nothing to remove"));
}

#[test]
fn the_connect_door_opens_on_both() {
    need!(assets::kvm_opens(), "a /dev/kvm that opens");
    for backend in BOTH {
        let lab = Lab::with_simulators(env!("CARGO_BIN_EXE_vmm-simulator"));
        let settings = format!("backend = '{backend}'\naccel = 'kvm'\n");
        let server = Server::of(lab, &settings);
        let id = server.create(|config| {
            config["boot"]["kernel_args"] = json!("console=ttyS0 from.the=caller");
            config["network"] = json!([{"id": "eth0",
                "rx_rate_limit": {"bandwidth": 1_000_000, "refill_time": 100},
                "tx_rate_limit": {"bandwidth": 1_000_000, "refill_time": 100}}]);
        });
        let by_id = json!({"vm_id": id});
        server.ok("BootVm", by_id.clone());
        server.await_console(&id, "PROBE disk0: RRRR writable=true");
        server.lab.type_and_see(&id, "write\n", "written");
        let info = server.ok("GetVmInfo", by_id.clone());
        assert_eq!(info["backendInfo"]["backend_type"], backend);
        assert_eq!(info["metrics"]["storageStats"]["bytesWritten"], "512", "{info}");
        assert_eq!(server.ok("PauseVm", by_id.clone())["state"], "VM_STATE_PAUSED");
        assert_eq!(server.ok("ResumeVm", by_id.clone())["state"], "VM_STATE_RUNNING");
        let ready = || server.lab.console_text(&id).matches("GUEST-READY").count();
        let before = ready();
        assert_eq!(
            server.ok("RebootVm", json!({"vm_id": id, "force": true}))["state"],
            "VM_STATE_RUNNING"
        );
        server.lab.until("the next boot", || ready() > before);
        assert_eq!(server.ok("ShutdownVm", by_id.clone())["state"], "VM_STATE_SHUTDOWN");
        assert!(server.lab.console_text(&id).contains("guest powers off"));
        let limited = json!({"config": {
            "cpu": {"vcpu_count": 1, "max_vcpu_count": 4}, "memory": {"size_bytes": 134_217_728},
            "boot": {"kernel_path": server.asset("vmlinux"), "kernel_args": "console=ttyS0"},
            "storage": [{"path": server.asset("rootfs.ext4")}],
        }});
        let answer = server.call("CreateVm", limited);
        match backend {
            "firecracker" => {
                let (code, message) = answer.error();
                assert_eq!(code, "invalid_argument");
                assert!(message.starts_with("cpu.max_vcpu_count: firecracker"), "{message}");
            }
            _ => assert_eq!(answer.status, 200),
        }
    }
}
