//! What is wrong is refused with a clear message, and nothing is left behind.

use lodge_vm_tests::{Lab, assets};
use serde_json::json;

fn create(lab: &Lab, text: &str) -> String {
    let file = lab.home().join("machine");
    std::fs::write(&file, text).unwrap();
    lab.fails(&["create", file.to_str().unwrap()])
}

#[test]
fn documents_with_faults_are_refused_whole() {
    let lab = Lab::new();
    let complaint = create(&lab, "nmae: a\nmemory: 1 parsec\ncpus: {count: many}\n");
    assert!(complaint.contains("nmae: unknown field; did you mean `name`?"), "{complaint}");
    let complaint = create(&lab, "memory: 9999TiB\ncpus: 100000\n");
    assert!(complaint.contains("memory.size") && complaint.contains("cpus.count"), "{complaint}");
    let complaint = create(&lab, "name: a\nboot: {kernel: /nowhere/vmlinuz}\n");
    assert!(complaint.contains("boot.kernel: /nowhere/vmlinuz: No such file"), "{complaint}");
    let complaint = create(&lab, &format!("boot: {{kernel: {}}}\n", lab.home().display()));
    assert!(complaint.contains("is a folder"), "{complaint}");
    let empty = lab.home().join("empty");
    std::fs::write(&empty, "").unwrap();
    let complaint = create(&lab, &format!("disks: [{{source: {}}}]\n", empty.display()));
    assert!(complaint.contains("empty is empty"), "{complaint}");
    let complaint = create(&lab, &format!("disks: [{{source: {}}}]\n", lab.home().display()));
    assert!(complaint.contains("is a folder, not a disk"), "{complaint}");
    let complaint = create(&lab, "image: debian-13\n");
    assert!(complaint.contains("image: there is no image debian-13"), "{complaint}");
    let complaint = create(&lab, "ready: 'console:('\n");
    assert!(complaint.contains("is not a regular expression"), "{complaint}");
    let complaint = create(&lab, "nics: [{address: 192.168.1.1}]\n");
    assert!(complaint.contains("is not on the network default"), "{complaint}");
    assert_eq!(lab.json(&["ls", "-a"]), json!([]));
    assert_eq!(lab.json(&["gc", "--dry-run"]), json!([]));
}

#[test]
fn unsupported_combinations_name_backend_and_field() {
    let lab = Lab::new();
    let kernel = assets::kernel();
    let file = lab.home().join("machine");
    let text = format!(
        "board: microvm\nboot: {{kernel: {kernel}}}\ncpus: {{count: 1, max: 4}}\nnics: []\n"
    );
    std::fs::write(&file, text).unwrap();
    let plan = lab.run(&["plan", file.to_str().unwrap()]);
    assert!(!plan.status.success());
    let text = String::from_utf8_lossy(&plan.stdout).into_owned();
    let line = "cpus.max: qemu: the microvm board lacks plugging in CPUs";
    assert!(text.contains("qemu: no") && text.contains(line), "{text}");
    let complaint = lab.fails(&["create", file.to_str().unwrap()]);
    assert!(complaint.contains(line), "{complaint}");
    assert_eq!(lab.json(&["ls", "-a"]), json!([]));
}

#[test]
fn names_and_images_in_use_are_kept() {
    let lab = Lab::new();
    let disk = lab.home().join("disk.raw");
    std::fs::write(&disk, vec![1; 1 << 20]).unwrap();
    lab.ok(&["image", "add", disk.to_str().unwrap(), "--name", "mine"]);
    let file = lab.home().join("machine");
    std::fs::write(&file, "name: a\nimage: mine\n").unwrap();
    let file = file.to_str().unwrap();
    lab.ok(&["create", file]);
    let complaint = lab.fails(&["create", file]);
    assert!(complaint.contains("the name a is already in use by machine"), "{complaint}");
    let complaint = lab.fails(&["image", "rm", "mine"]);
    assert!(complaint.contains("image mine is already in use by machine a"), "{complaint}");
    lab.ok(&["image", "verify"]);
    let blobs = lab.home().join("images/sha256");
    let blob = std::fs::read_dir(&blobs).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&blob).unwrap();
    bytes[7] ^= 1;
    std::fs::remove_file(&blob).unwrap();
    std::fs::write(&blob, &bytes).unwrap();
    let complaint = lab.fails(&["image", "verify", "mine"]);
    assert!(complaint.contains("changed or damaged"), "{complaint}");
    std::fs::write(&blob, &bytes[..1000]).unwrap();
    let complaint = lab.fails(&["start", "a"]);
    assert!(complaint.contains("no longer matches its digest"), "{complaint}");
    lab.ok(&["rm", "a"]);
    lab.ok(&["image", "rm", "mine"]);
    assert_eq!(std::fs::read_dir(&blobs).unwrap().count(), 0);
}

#[test]
fn a_full_disk_leaves_no_half_image() {
    let lab = Lab::new();
    lab.ok(&["ls"]);
    let store = lab.home().join("images");
    let mount = lodge_vm_tests::lab::command("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
        .arg(&store)
        .status();
    assert!(mount.unwrap().success());
    std::fs::create_dir(store.join("sha256")).unwrap();
    let disk = lab.home().join("disk.raw");
    std::fs::write(&disk, vec![1; 4 << 20]).unwrap();
    let complaint = lab.fails(&["image", "add", disk.to_str().unwrap()]);
    let left = std::fs::read_dir(store.join("sha256")).unwrap().count();
    let unmount = lodge_vm_tests::lab::command("umount").arg(&store).status();
    assert!(unmount.unwrap().success());
    assert!(complaint.contains("No space left on device"), "{complaint}");
    assert_eq!(left, 0);
}

#[test]
fn a_full_disk_in_the_middle_of_a_build_leaves_nothing() {
    let lab = Lab::new();
    lab.ok(&["ls"]);
    let (daemon, cache) = (lab.daemon(), lab.home().join("cache"));
    let mount = lodge_vm_tests::lab::command("mount")
        .args(["-t", "tmpfs", "-o", "size=150m", "tmpfs"])
        .arg(&cache)
        .status();
    assert!(mount.unwrap().success());
    let complaint = lab.fails(&["image", "build", "debian-12"]);
    let left = std::fs::read_dir(&cache).unwrap().flatten().map(|e| e.file_name());
    let left: Vec<_> = left.filter(|n| n.to_string_lossy().starts_with("build-")).collect();
    // What fails ends its whole process group, which must not be the daemon's.
    let same = lab.daemon() == daemon;
    let unmount = lodge_vm_tests::lab::command("umount").arg(&cache).status();
    assert!(unmount.unwrap().success());
    assert!(complaint.contains("No space left on device"), "{complaint}");
    assert!(same && left.is_empty(), "{left:?}");
}

#[test]
fn foreign_qcow2_files_do_not_name_host_files() {
    let lab = Lab::new();
    let disk = lab.home().join("evil.qcow2");
    let mut bytes = Vec::new();
    lodge_formats::qcow2::write_empty(&mut bytes, 1 << 30, Some(("/etc/shadow", "raw"))).unwrap();
    std::fs::write(&disk, bytes).unwrap();
    let complaint = create(&lab, &format!("disks: [{{source: {}}}]\n", disk.display()));
    assert!(complaint.contains("what lies below is never followed"), "{complaint}");
}

#[test]
fn the_command_line_corrects_slips() {
    let lab = Lab::new();
    assert!(lab.fails(&["strat", "a"]).contains("start"));
    assert!(lab.fails(&["run", "--memroy", "1G"]).contains("--memory"));
    assert!(lab.fails(&["run", "x", "--file", "nonsense"]).contains("GUESTPATH=HOSTFILE"));
    for shell in ["bash", "zsh", "fish"] {
        assert!(lab.ok(&["completions", shell]).contains("lodge"));
    }
    assert!(lab.ok(&["schema"]).contains("\"Lodge machine\""));
    lab.ok(&["man", lab.home().join("man").to_str().unwrap()]);
    assert!(lab.home().join("man/lodge-run.1").exists());
}
