//! Numbered cases that need no guest: words, documents, messages, exit statuses.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use lodge_vm_tests::vmadm::{SEED, Vmadm};
use serde_json::{Value, json};

const NOBODY: &str = "b8ab5fc1-8576-45ef-bb51-9826b52a4651";

#[test]
fn cases_4_to_7_20_to_24_and_words_that_are_none() {
    let v = Vmadm::new();
    let uuid = v.create(SEED);
    let u = uuid.as_str();
    for (words, why) in [
        (vec!["boot", u, "cdrom=/image.iso"], "Parameter to cdrom must be: path,model"),
        (
            vec!["boot", u, "order=c", "order=d"],
            "You can only specify 'order' once when starting a VM",
        ),
        (vec!["boot", u, "foo=1"], "Invalid argument to start: foo"),
        (vec!["get", "xyz"], "Invalid or missing UUID for get"),
        (vec!["frobnicate"], "Invalid command: \"frobnicate\"."),
        (vec!["get", u, "-x"], "Unknown option: -x"),
        (vec!["update", u, "{\"ram\":5}"], "is not property=value"),
    ] {
        let said = v.says(&words, "");
        assert_eq!((said.code, said.out.as_str()), (2, ""), "{words:?}");
        assert!(said.err.lines().next().unwrap().contains(why), "{words:?}: {}", said.err);
        assert!(said.err.contains("Usage: lodge vmadm <command> [options]"));
    }
    assert_eq!(v.says(&[], "").code, 2);
    let help = v.says(&["help"], "");
    assert!(help.code == 0 && help.out.contains("Usage: "), "{help:?}");
    let nvme = v.fails(&["boot", u, "disk=/x.img,nvme"], "");
    assert_eq!(
        nvme,
        format!(
            "Unable to start VM {u}: \"nvme\" is not a valid disk model for kvm brand. Valid are: \
             virtio,scsi,ide"
        )
    );
    let out = v.fails(&["boot", u, "disk=/../../../etc/passwd,ide"], "");
    assert!(out.ends_with("Cannot find disk: /../../../etc/passwd"), "{out}");
    let root = v.get(u)["zonepath"].as_str().unwrap().to_owned() + "/root/";
    std::os::unix::fs::symlink("/etc/passwd", root + "out.iso").unwrap();
    let link = v.fails(&["boot", u, "cdrom=/out.iso,ide"], "");
    assert!(link.ends_with("Cannot find disk: /out.iso"), "{link}");
    v.ok(&["update", u, "indestructible_zoneroot=true"]);
    let protected = v.fails(&["delete", u], "");
    assert_eq!(
        protected,
        format!("Failed to delete VM {u}: indestructible_zoneroot is set, cannot delete")
    );
    v.ok(&["update", u, "indestructible_zoneroot=false"]);
    let snapshot = v.fails(&["create-snapshot", u, "s1"], "");
    assert_eq!(snapshot, "snapshots for kvm VMs currently unsupported");
    assert_eq!(v.get(u)["snapshots"], json!([]));
    // What is deleted is kept in the archive, where there is one.
    v.ok(&["update", u, "archive_on_delete=true", "alias=kept"]);
    let archive = v.lab.home().join("zones/archive");
    std::fs::create_dir(&archive).unwrap();
    v.ok(&["delete", u]);
    let kept = std::fs::read(archive.join(u).join("vm.json")).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&kept).unwrap()["alias"], "kept");
    let unknown = v.fails(&["get", NOBODY], "");
    assert_eq!(unknown, format!("zoneadm: {NOBODY}: No such zone configured"));
    for words in [["stop", NOBODY], ["console", NOBODY], ["kill", NOBODY], ["reboot", NOBODY]] {
        assert_eq!(v.fails(&words, ""), format!("VM {NOBODY} not found"), "{words:?}");
    }
    let start = v.fails(&["start", NOBODY], "");
    assert_eq!(start, format!("Unable to start VM {NOBODY}: VM {NOBODY} not found"));
}

/// The cases of `validate` themselves are beside the code; here are its streams and its words.
#[test]
fn cases_24_to_27_and_45_validate() {
    let v = Vmadm::new();
    let good = v.says(&["validate", "create"], SEED);
    assert_eq!(good.err, "VALID 'create' payload for kvm brand VMs.\n");
    assert_eq!((good.code, good.out.as_str()), (0, ""));
    assert_eq!(v.says(&["validate", "create"], r#"{"brand":"kvm"}"#).code, 0);
    let bad = |words: &[&str], text: &str| -> Value {
        serde_json::from_str(&v.fails(words, text)).unwrap()
    };
    assert_eq!(bad(&["validate", "create"], "{}"), json!({"bad_brand": "undefined"}));
    let gorilla = bad(&["validate", "create"], r#"{"brand":"gorilla"}"#);
    assert_eq!(gorilla, json!({"bad_brand": "gorilla"}));
    let action = bad(&["validate", "detonate"], r#"{"brand":"kvm","ram":1}"#);
    assert_eq!(action["bad_properties"], json!(["brand", "ram"]));
    let unknown = format!(
        r#"{{"brand":"kvm","disks":[{{"model":"ide","image_uuid":"{NOBODY}","image_size":5120}}]}}"#
    );
    let image = bad(&["validate", "create"], &unknown);
    assert_eq!(image["bad_values"], json!(["disks.0.image_uuid"]));
    assert_eq!(v.says(&["validate", "update"], "{}").code, 2);
    let update = v.says(&["validate", "update", "kvm"], r#"{"alias":"a"}"#);
    assert_eq!(update.err, "VALID 'update' payload for kvm brand VMs.\n");
}

#[test]
fn cases_47_to_57_documents_that_make_no_machine() {
    let v = Vmadm::new();
    let a = r#""nic_tag":"admin","model":"virtio""#;
    for (document, why) in [
        ("{".to_owned(), "Invalid JSON payload: "),
        ("[]".into(), "Invalid JSON payload: "),
        (r#"{"brand":"gorilla"}"#.into(), "Invalid brand: \"gorilla\""),
        (r#"{"brand":"kvm","disks":{}}"#.into(), "Invalid value(s) for: disks"),
        (r#"{"brand":"kvm","nics":"x"}"#.into(), "Invalid value(s) for: nics"),
        (r#"{"brand":"kvm","disks":[{"model":"ide"}]}"#.into(), "Missing required properties: disks.0.size"),
        (
            format!(r#"{{"brand":"kvm","nics":[{{{a},"ip":"10.0.0.1"}}]}}"#),
            "Missing .netmask option for NIC: ",
        ),
        (
            r#"{"brand":"kvm","nics":[{"nic_tag":"admin"}]}"#.into(),
            "missing .model option for NIC: ",
        ),
        (
            r#"{"brand":"kvm","nics":[{"nic_tag":"does_not_exist","model":"virtio"}]}"#.into(),
            "Invalid nic tag \"does_not_exist\"; known are admin, external",
        ),
        (
            r#"{"brand":"kvm","disks":[{"size":10,"model":"ide"},{"size":9000000000,"model":"ide"}]}"#
                .into(),
            "cannot create volume",
        ),
        (r#"{"brand":"kvm","quota":"much"}"#.into(), "Invalid value(s) for: quota"),
    ] {
        let said = v.fails(&["create"], &document);
        assert!(said.starts_with(why), "{document}: {said}");
    }
    assert_eq!(v.ok(&["lookup"]), "", "nothing is left behind");
    assert!(v.lab.ok(&["gc", "--dry-run"]).contains("nothing to remove"));
    let file = v.fails(&["create", "-f", "/nope"], "");
    assert_eq!(file, "File: /nope does not exist.");
    let dhcp =
        v.create(&format!(r#"{{"brand":"kvm","autoboot":false,"nics":[{{{a},"ip":"dhcp"}}]}}"#));
    let odd = v.says(
        &["create"],
        r#"{"brand":"kvm","autoboot":false,"rma":5,"alias":"odd","qemu_extra_opts":"-S"}"#,
    );
    assert_eq!(odd.code, 0);
    assert!(odd.err.contains("rma (did you mean ram?)"), "{}", odd.err);
    assert!(odd.err.contains("no effect here: qemu_extra_opts"), "{}", odd.err);
    let uuid = v.ok(&["lookup", "alias=odd"]).trim().to_owned();
    assert!(v.get(&uuid).get("rma").is_none());
    let fixed = r#"{"brand":"kvm","autoboot":false,"vnc_port":12345}"#;
    v.create(fixed);
    let clash = v.fails(&["create"], fixed);
    assert!(clash.starts_with("Conflict detected with another vm"), "{clash}");
    let same = v.fails(&["create"], &format!(r#"{{"brand":"kvm","uuid":"{dhcp}"}}"#));
    assert_eq!(same, format!("VM with UUID {dhcp} already exists"));
}

#[test]
fn cases_58_to_66_updates_are_kept() {
    let v = Vmadm::new();
    let uuid = v.create(SEED);
    let u = uuid.as_str();
    assert_eq!(v.ok(&["update", u, "ram=512"]), format!("Successfully updated VM {u}"));
    let vm = v.get(u);
    assert_eq!((&vm["ram"], &vm["max_physical_memory"]), (&json!(512), &json!(1536)));
    v.feed(&["update", u], r#"{"add_disks":[{"size":1024}],"set_tags":{"a":"b"}}"#);
    let vm = v.get(u);
    assert_eq!(vm["disks"][1]["model"], "virtio");
    assert_eq!(vm["tags"], json!({"a": "b"}));
    v.ok(&["start", u]);
    let path = vm["disks"][1]["path"].as_str().unwrap();
    let remove = json!({"remove_disks": [path]}).to_string();
    let running = v.fails(&["update", u], &remove);
    assert!(running.contains("only allowed when state is \"stopped\""), "{running}");
    v.ok(&["stop", u, "-F"]);
    let files = |v: &Vmadm| {
        let home = v.lab.home().join("machines").join(u);
        let names = std::fs::read_dir(home).unwrap().flatten();
        let names = names.map(|e| e.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.ends_with(".qcow2")).count()
    };
    assert_eq!(files(&v), 2);
    v.feed(&["update", u], &remove);
    assert_eq!(files(&v), 1, "the volume is gone");
    let mac = v.get(u)["nics"][0]["mac"].as_str().unwrap().to_owned();
    let primary = json!({"update_nics": [{"mac": mac, "primary": false}]}).to_string();
    let why = v.fails(&["update", u], &primary);
    assert_eq!(why, "first of 1 error: invalid value for NIC's primary flag: false (must be true)");
    let none = v.says(&["update", u], r#"{"tags":{"c":"d"}}"#);
    assert!(none.err.contains("left out: tags"), "{}", none.err);
    assert_eq!(v.get(u)["tags"], json!({"a": "b"}));
    v.ok(&["delete", u]);
}

#[test]
fn cases_70_to_81_lists() {
    let v = Vmadm::new();
    let uuid = v.create(
        r#"{"brand":"kvm","autoboot":false,"ram":1024,"uuid":"b8ab5fc1-8576-45ef-bb51-9826b52a4651"}"#,
    );
    assert_eq!(
        v.ok(&["list"]),
        format!(
            "UUID                                  TYPE  RAM      STATE             ALIAS\n\
             {uuid}  KVM   1024     stopped           -\n"
        )
    );
    assert_eq!(v.ok(&["list", "-p"]), format!("{uuid}:KVM:1024:stopped:\n"));
    assert_eq!(v.fails(&["list", "foo=1"], ""), "Invalid filter key: \"foo\"");
    assert_eq!(v.ok(&["lookup", "ram=~^10"]), format!("{uuid}\n"));
    let unique = v.fails(&["lookup", "-1", "alias=none"], "");
    assert_eq!(unique, "Requested unique lookup but found 0 results.");
    assert_eq!(v.fails(&["lookup", "-o", "uuid"], ""), "Cannot specify -o without -j");
    assert_eq!(v.ok(&["lookup", "-j", "uuid=none"]), "[]\n");
}

#[test]
fn events_tell_what_changes() {
    let v = Vmadm::new();
    v.ok(&["list"]);
    let mut command = v.command(&["events", "-jr"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut events = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    let mut next = |kind: &str| {
        let found = events.by_ref().find(|event| event["type"] == kind);
        found.unwrap_or_else(|| panic!("no {kind}"))
    };
    next("ready");
    let uuid = v.create(SEED);
    assert_eq!(next("create")["uuid"], json!(uuid));
    v.ok(&["update", &uuid, "ram=256"]);
    let changes = next("modify")["changes"].clone();
    let ram =
        changes.as_array().unwrap().iter().find(|c| c["prettyPath"] == "ram").unwrap().clone();
    assert_eq!((&ram["oldValue"], &ram["newValue"]), (&json!(1024), &json!(256)));
    v.ok(&["delete", &uuid]);
    assert_eq!(next("delete")["vm"]["uuid"], json!(uuid));
    lodge_vm_tests::lab::end(child);
}

#[test]
fn the_brand_bhyve_has_snapshots_and_a_stream_carries_a_machine() {
    let v = Vmadm::new();
    let uuid = v.create(
        r#"{"brand":"bhyve","autoboot":false,"ram":256,"alias":"b","customer_metadata":{"k":"v"},
        "disks":[{"model":"virtio","size":64,"boot":true}]}"#,
    );
    let u = uuid.as_str();
    v.ok(&["start", u]);
    let disk = v.lab.home().join(format!("machines/{u}/disk0.qcow2"));
    assert_eq!(v.ok(&["create-snapshot", u, "s1"]), format!("Created snapshot s1 for VM {u}"));
    assert_eq!(v.state(u), "running");
    let twice = v.fails(&["create-snapshot", u, "s1"], "");
    assert_eq!(twice, "snapshot with name \"s1\" already exists.");
    v.ok(&["stop", u, "-F"]);
    let before = std::fs::read(&disk).unwrap();
    v.ok(&["create-snapshot", u, "s2"]);
    assert_eq!(v.get(u)["snapshots"][0]["name"], "s2");
    let mut changed = before.clone();
    changed.extend([0; 65_536]);
    std::fs::write(&disk, changed).unwrap();
    assert_eq!(
        v.ok(&["rollback-snapshot", u, "s1"]),
        format!("Rolled back snapshot s1 for VM {u}")
    );
    assert_eq!(v.state(u), "running");
    v.ok(&["stop", u, "-F"]);
    assert!(std::fs::read(&disk).unwrap() == before, "the disk is what it was");
    assert_eq!(v.get(u)["snapshots"].as_array().unwrap().len(), 1);
    let missing = v.fails(&["delete-snapshot", u, "s2"], "");
    assert_eq!(missing, format!("No snapshot named \"s2\" for {u}"));
    v.ok(&["delete-snapshot", u, "s1"]);
    assert_eq!(v.fails(&["create-snapshot", u, "a/b"], ""), "Invalid snapshot name");
    // As one stream to another host.
    let bundle = v.command(&["send", u]).stdin(Stdio::null()).output().unwrap();
    assert!(bundle.status.success());
    let other = Vmadm::new();
    let mut child = other.command(&["receive"]).stdin(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), &bundle.stdout).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(other.state(u), "receiving");
    let early = other.fails(&["start", u], "");
    assert!(early.contains("Cannot start vm from state \"receiving\""), "{early}");
    other.ok(&["install", u]);
    let vm = other.get(u);
    assert_eq!(vm["state"], "stopped");
    assert_eq!(vm["customer_metadata"], json!({"k": "v"}));
    let copy = other.lab.home().join(format!("machines/{u}/disk0.qcow2"));
    assert!(std::fs::read(copy).unwrap() == before, "the disk came whole");
    other.ok(&["start", u]);
    let cut = &bundle.stdout[..bundle.stdout.len() / 2];
    other.ok(&["delete", u]);
    let mut child = other.command(&["receive"]).stdin(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), cut).unwrap();
    assert!(!child.wait().unwrap().success());
    assert_eq!(other.ok(&["lookup"]), "", "half a machine is none");
    // A disk grows, and does not shrink.
    let path = v.get(u)["disks"][0]["path"].as_str().unwrap().to_owned();
    let size = |size: u32| json!({"update_disks": [{"path": path, "size": size}]}).to_string();
    v.feed(&["update", u], &size(128));
    let shrink = v.fails(&["update", u], &size(64));
    assert!(shrink.contains("new size must be greater than current size. (128 > 64)"), "{shrink}");
    let grown = lodge_formats::qcow2::read(std::fs::File::open(&disk).unwrap()).unwrap();
    assert_eq!(grown.virtual_size, 128 << 20);
    v.ok(&["start", u]);
    v.ok(&["delete", u]);
}

#[test]
fn the_jail_is_put_to_the_test_on_the_users_host() {
    let v = Vmadm::new();
    let report = v.lab.json(&["doctor", "--escape"]);
    let ways = report.as_array().unwrap();
    assert!(ways.len() >= 40, "{report}");
    assert!(ways.iter().all(|way| way["closed"] == true), "{report}");
}

/// What was to run runs again when the host has booted, and nothing else does.
#[test]
fn machines_start_with_the_host_where_they_are_to() {
    let v = Vmadm::new();
    let wanted = v.create(r#"{"brand":"kvm","ram":64,"alias":"wanted"}"#);
    assert_eq!(v.state(&wanted), "running", "a machine that boots with the host boots at once");
    let other = v.create(r#"{"brand":"kvm","ram":64,"autoboot":false}"#);
    let home = v.lab.home().to_owned();
    let run = home.join("run/m").join(wanted.replace('-', ""));
    let pid = v.lab.pid_of_hypervisor(&wanted);
    v.lab.kill_daemon();
    lodge_vm_tests::lab::kill(pid, 9);
    v.lab.until("the warden's end", || run.join("exit.json").exists());
    // As a reboot leaves it: of an earlier boot, and nobody there.
    std::fs::remove_file(run.join("exit.json")).unwrap();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let earlier = "00000000-0000-4000-8000-000000000000";
    for file in [run.join("launch.json"), home.join("boot-id")] {
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.contains(boot.trim()), "{}", file.display());
        std::fs::write(&file, text.replace(boot.trim(), earlier)).unwrap();
    }
    v.lab.until("the start", || v.state(&wanted) == "running");
    assert_eq!(v.state(&other), "stopped");
    for uuid in [&wanted, &other] {
        v.ok(&["delete", uuid]);
    }
}

/// Nobody's work is lost, and what is refused takes nothing.
#[test]
fn many_at_once_do_not_overtake_each_other() {
    let v = Vmadm::new();
    let uuid = v.create(SEED);
    std::thread::scope(|scope| {
        for i in 0..40 {
            let (v, uuid) = (&v, &uuid);
            let tag = json!({"set_tags": {format!("k{i}"): i}}).to_string();
            scope.spawn(move || v.feed(&["update", uuid], &tag));
        }
    });
    assert_eq!(v.get(&uuid)["tags"].as_object().unwrap().len(), 40);
    let nic =
        r#""nics":[{"nic_tag":"admin","model":"virtio","ip":"10.9.9.9","netmask":"255.0.0.0"}]"#;
    // Refused for its disk, when its address was looked at already.
    let disk = r#""disks":[{"model":"virtio","nocreate":true,"path":"/nowhere","size":1}]"#;
    v.fails(&["create"], &format!(r#"{{"brand":"kvm","autoboot":false,{nic},{disk}}}"#));
    let document = format!(r#"{{"brand":"kvm","autoboot":false,{nic}}}"#);
    let made = std::thread::scope(|scope| {
        let all: Vec<_> =
            (0..10).map(|_| scope.spawn(|| v.says(&["create"], &document).code == 0)).collect();
        all.into_iter().filter_map(|one| one.join().unwrap().then_some(())).count()
    });
    assert_eq!(made, 1, "an address has one machine");
}

#[test]
fn the_brand_bhyve_is_provisioned_anew() {
    let v = Vmadm::new();
    let sector = v.lab.home().join("sector.img");
    std::fs::write(&sector, lodge_vm_tests::assets::boot_sector("FROM-THE-IMAGE\r\n")).unwrap();
    let made = v.lab.json(&["image", "add", sector.to_str().unwrap(), "--name", "sector"]);
    assert!(!made.is_null());
    let image = v.lab.json(&["image", "inspect", "sector"])["uuid"].as_str().unwrap().to_owned();
    let payload = json!({"image_uuid": image}).to_string();
    let kvm = v.create(SEED);
    let why = v.fails(&["reprovision", &kvm], &payload);
    assert_eq!(
        why,
        format!("Failed to reprovision VM {kvm}: brand \"kvm\" does not yet support reprovision")
    );
    let uuid = v
        .create(r#"{"brand":"bhyve","ram":64,"disks":[{"model":"virtio","size":16,"boot":true}]}"#);
    let why = v.fails(&["reprovision", &uuid], "{}");
    assert_eq!(why, format!("Failed to reprovision VM {uuid}: payload is missing image_uuid"));
    let done = v.feed(&["reprovision", &uuid], &payload);
    assert_eq!(done, format!("Successfully reprovisioned VM {uuid}"));
    let vm = v.get(&uuid);
    assert_eq!((&vm["state"], &vm["disks"][0]["image_uuid"]), (&json!("running"), &json!(image)));
    assert_eq!(vm["disks"][0]["size"], 16);
    v.console(&uuid, "FROM-THE-IMAGE");
    for uuid in [&kvm, &uuid] {
        v.ok(&["delete", uuid]);
    }
}
