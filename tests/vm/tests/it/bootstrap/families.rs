//! Families of images: built, built again, broken off; booted by every firmware, from every disk,
//! under both inits.

use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use lodge_vm_tests::bootstrap::{Asked, Qemu, Reply, Web, build, family_home, unpack};
use lodge_vm_tests::lab::{command, program};
use lodge_vm_tests::python::{environment, must};
use lodge_vm_tests::{Lab, need};

const SYSTEMD: &str = "images: [{distro: debian12, sizes: [50, 3]}]\n";
const SYSVINIT: &str = "name: sysv-bootstrap\ncompress: [zstd]\nimages: [{distro: debian12, sizes: \
                        [2], init: sysvinit}]\n";

/// The folder of a family that is built once.
fn family(name: &str, document: &str) -> PathBuf {
    static BUILDING: Mutex<()> = Mutex::new(());
    let _one = BUILDING.lock().unwrap_or_else(|e| e.into_inner());
    let folder = family_home().join(name);
    build(&family_home(), &folder, document, &[]);
    folder
}

fn digest(folder: &Path, image: &str) -> String {
    let text = fs::read_to_string(folder.join("SHA512SUM.txt")).unwrap();
    text.lines().find(|l| l.ends_with(&format!("/packer-{image}.gz"))).unwrap()[..128].to_owned()
}

fn inputs(folder: &Path, image: &str) -> String {
    let path = folder.join(format!("output-{image}/packer-{image}.provenance.json"));
    let text = fs::read_to_string(path).unwrap();
    let provenance: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(provenance["packages"].as_array().unwrap().len() > 100);
    assert!(provenance["packages"][0]["sha256"].is_string(), "{}", provenance["packages"][0]);
    provenance["inputs_sha256"].as_str().unwrap().to_owned()
}

#[test]
fn cases_b1_b2_and_b5_the_same_inputs_give_the_same_bytes() {
    let known = family("debian", SYSTEMD);
    let lab = Lab::new();
    let folder = lab.home().join("out");
    // Broken off: nothing has a name that it should not have, and nobody is left at work.
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("build-vm-bootstrap.yml"), SYSTEMD).unwrap();
    let mut lodge = command(program());
    lodge.args(["image", "matrix"]).arg(folder.join("build-vm-bootstrap.yml"));
    let mut child = lodge.env("LODGE_HOME", lab.home()).process_group(0).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(6));
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&child),
        rustix::process::Signal::INT,
    )
    .unwrap();
    assert!(!child.wait().unwrap().success());
    assert!(!folder.join("SHA512SUM.txt").exists());
    assert!(!folder.join("output-debian12-50G-vm-bootstrap").exists());
    let said = build(lab.home(), &folder, SYSTEMD, &[]);
    assert!(said.contains("debian12-50G-vm-bootstrap: built in"), "{said}");
    for image in ["debian12-50G-vm-bootstrap", "debian12-3G-vm-bootstrap"] {
        // A mirror may have changed between the two.
        if inputs(&known, image) == inputs(&folder, image) {
            assert_eq!(digest(&known, image), digest(&folder, image), "{image}");
        } else {
            let before = digest(&folder, image);
            build(lab.home(), &folder, SYSTEMD, &["--afresh"]);
            assert_eq!(before, digest(&folder, image), "{image}");
        }
    }
    for (tool, list) in [("sha512sum", "SHA512SUM.txt"), ("md5sum", "MD5SUM.txt")] {
        must(command(tool).args(["-c", list]).current_dir(&folder).output());
    }
    let said = build(lab.home(), &folder, SYSTEMD, &[]);
    assert_eq!(said.matches(": unchanged").count(), 2, "{said}");
    // One that is taken away is made again, the other is not.
    fs::remove_dir_all(folder.join("output-debian12-3G-vm-bootstrap")).unwrap();
    let said = build(lab.home(), &folder, SYSTEMD, &[]);
    assert!(said.contains("50G-vm-bootstrap: unchanged"), "{said}");
    assert!(said.contains("3G-vm-bootstrap: built"), "{said}");
}

/// A user with subordinate identities, as every distribution gives its users, and no rights besides.
#[test]
fn case_b3_an_ordinary_users_build_has_the_same_bytes() {
    const NOBODY: u32 = 65534;
    need!(command("newuidmap").output().is_ok(), "uidmap");
    let known = family("debian", SYSTEMD);
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let folder = home.join("out");
    fs::create_dir_all(&folder).unwrap();
    let file = folder.join("build-vm-bootstrap.yml");
    fs::write(&file, SYSTEMD).unwrap();
    let ids = home.join("ids");
    fs::write(&ids, "nobody:200000:65536\n").unwrap();
    for path in [home, &folder, &file] {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let script = "mount --bind \"$1\" /etc/subuid; mount --bind \"$1\" /etc/subgid; shift; exec \
                  setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\"";
    let mut lodge = command("unshare");
    lodge.args(["-m", "sh", "-e", "-c", script, "sh"]).arg(&ids).arg(program());
    lodge.args(["image", "matrix"]).arg(&file).env("LODGE_HOME", home);
    must(lodge.env("HOME", home).output());
    let image = "debian12-3G-vm-bootstrap";
    if inputs(&known, image) != inputs(&folder, image) {
        // A mirror has changed between the two.
        build(&family_home(), &known, SYSTEMD, &[]);
    }
    assert_eq!(inputs(&known, image), inputs(&folder, image));
    assert_eq!(digest(&known, image), digest(&folder, image));
}

#[test]
fn case_b4_what_cannot_be_built_says_why_and_leaves_nothing() {
    let lab = Lab::new();
    let file = lab.home().join("m.yml");
    let fails = |document: &str| {
        fs::write(&file, document).unwrap();
        lab.fails(&["image", "matrix", file.to_str().unwrap()])
    };
    assert!(fails("images: [{distro: debain12, sizes: [5]}]").contains("did you mean debian12?"));
    assert!(fails("images: [{distro: debian12, sizes: [0]}]").contains("0 is not a size"));
    // A full disk.
    let out = lab.home().join("full");
    fs::create_dir_all(&out).unwrap();
    family("debian", SYSTEMD);
    let script = format!(
        "mount -t tmpfs -o size=20m none {out}; {lodge} image matrix {file} --out {out}; s=$?; \
         find {out} -name 'packer-*'; exit $s",
        out = out.display(),
        lodge = program().display(),
        file = file.display()
    );
    fs::write(&file, SYSTEMD).unwrap();
    let mut full = command("unshare");
    full.args(["-m", "sh", "-c", &script]).env("LODGE_HOME", family_home());
    let output = full.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!output.status.success());
    assert!(said.contains("FAILED: ") && said.contains("No space left"), "{said}");
    assert!(!said.contains("/packer-"), "{said}");
}

/// Serves a script that says on the console what it found: through the kernel's log, as what is
/// written to the terminal itself is lost when a login prompt takes it over.
fn served() -> Web {
    let script = "#!/bin/bash\nsay() { echo \"<0>$*\" > /dev/kmsg; }\n\
                  say \"SIZE $(df -B1 --output=size / | tail -1) $(cat /proc/1/comm) $(hostname) \
                  EFI-$([ -d /sys/firmware/efi ] && echo yes)\"\n\
                  say \"$(passwd -S root | cut -d' ' -f1,2)\"\n[ -e /once ] && say SECOND-RUN\n\
                  touch /once; sync\nsay SET-UP\n(sleep 1; reboot) &\n";
    Web::new(move |asked: &Asked| match asked.path.as_str() {
        "/vm-bootstrap" => Reply::Ok(script.into()),
        _ => Reply::Close,
    })
}

fn size(text: &str) -> u64 {
    // A prompt may stand before it.
    let rest = text.split("SIZE ").nth(1).unwrap();
    rest.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn cases_b6_and_g19_bios_and_virtio_grow_and_run_once() {
    let folder = family("debian", SYSTEMD);
    let dir = tempfile::tempdir().unwrap();
    let disk = unpack(&folder, "debian12-3G-vm-bootstrap", dir.path());
    // Larger than it was built.
    must(command("qemu-img").arg("resize").arg(&disk).arg("50000000000").output());
    let web = served();
    let drive = format!("file={},if=virtio,format=qcow2", disk.display());
    let guest = Qemu::start(dir.path(), Some((web.port, false)), &["-drive", &drive]);
    let text = guest.until("SET-UP");
    assert!(size(&text) >= 49_000_000_000, "{text}");
    assert!(text.contains("systemd packer-debian12-vm-bootstrap EFI-\r"), "{text}");
    assert!(text.contains("root L"), "nobody has a password: {text}");
    // It reboots, and has nothing more to do.
    let begun = Instant::now();
    while guest.text().matches("lodge-ready").count() < 2 {
        assert!(begun.elapsed() < Duration::from_secs(180), "{}", guest.text());
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(web.count("GET", "/vm-bootstrap"), 1);
    assert!(!guest.text().contains("SECOND-RUN"));
}

#[test]
fn case_b6_uefi_and_nvme() {
    let folder = family("debian", SYSTEMD);
    let dir = tempfile::tempdir().unwrap();
    let disk = unpack(&folder, "debian12-50G-vm-bootstrap", dir.path());
    let vars = dir.path().join("vars.fd");
    fs::copy("/usr/share/OVMF/OVMF_VARS_4M.fd", &vars).unwrap();
    let web = served();
    let code = "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd";
    let vars = format!("if=pflash,format=raw,file={}", vars.display());
    let drive = format!("file={},if=none,id=d,format=qcow2", disk.display());
    let nvme = ["-device", "nvme,drive=d,serial=1"];
    let args = ["-machine", "q35", "-drive", code, "-drive", &vars, "-drive", &drive];
    let guest = Qemu::start(dir.path(), Some((web.port, false)), &[&args[..], &nvme[..]].concat());
    let text = guest.until("SET-UP");
    assert!(text.contains("EFI-yes"), "{text}");
    assert!(size(&text) >= 49_000_000_000, "{text}");
}

#[test]
fn sysvinit_starts_the_runner_as_well() {
    let folder = family("sysv", SYSVINIT);
    let dir = tempfile::tempdir().unwrap();
    let disk = unpack(&folder, "debian12-2G-sysv-bootstrap", dir.path());
    let web = served();
    let drive = format!("file={},if=virtio,format=qcow2", disk.display());
    let guest = Qemu::start(dir.path(), Some((web.port, false)), &["-drive", &drive]);
    let text = guest.until("SET-UP");
    assert!(text.contains(" init packer-debian12-sysv-bootstrap"), "{text}");
}

/// The release before and the one after, from mirrors that are named and from Debian's own.
#[test]
fn other_releases_run_the_script_as_well() {
    const OTHERS: &str = "compress: [zstd]\nimages:\n  - {distro: debian11, sizes: [2], mirrors: \
                          ['http://deb.debian.org/debian']}\n  - {distro: debian13, sizes: [2]}\n";
    let folder = family("others", OTHERS);
    for distro in ["debian11", "debian13"] {
        let dir = tempfile::tempdir().unwrap();
        let disk = unpack(&folder, &format!("{distro}-2G-vm-bootstrap"), dir.path());
        let web = served();
        let drive = format!("file={},if=virtio,format=qcow2", disk.display());
        let guest = Qemu::start(dir.path(), Some((web.port, false)), &["-drive", &drive]);
        let text = guest.until("SET-UP");
        assert!(text.contains(&format!("systemd packer-{distro}-vm-bootstrap EFI-\r")), "{text}");
        assert!(text.contains("root L"), "nobody has a password: {text}");
        assert_eq!(web.count("GET", "/vm-bootstrap"), 1);
    }
}

/// The lines of the guide, with the playbook as it is installed but for its distributions.
#[test]
fn ansible_builds_what_lodge_builds() {
    let folder = family("debian", SYSTEMD);
    let lab = Lab::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest/vm-bootstrap");
    let play = fs::read_to_string(root.join("build-vm-bootstrap.yml")).unwrap();
    let from = play.find("        - distro: debian11").unwrap();
    let to = play.find("  tasks:").unwrap();
    let one = "        - {distro: debian12, sizes: [50, 3]}\n";
    fs::write(folder.join("play.yml"), [&play[..from], one, &play[to..]].concat()).unwrap();
    let out = lab.home().join("play");
    fs::create_dir_all(&out).unwrap();
    fs::rename(folder.join("play.yml"), out.join("build-vm-bootstrap.yml")).unwrap();
    fs::copy(root.join("hosts"), out.join("hosts")).unwrap();
    let python = environment(&["ansible-core==2.18.6"], false);
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", program().parent().unwrap().display());
    let mut ansible = command(python.join("bin/ansible-playbook"));
    ansible.args(["build-vm-bootstrap.yml", "-i", "hosts"]).current_dir(&out);
    ansible.env("PATH", path).env("LODGE_HOME", family_home()).env("LC_ALL", "C.UTF-8");
    let said = must(ansible.output());
    assert!(said.contains("debian12-50G-vm-bootstrap: built in"), "{said}");
    let image = "debian12-50G-vm-bootstrap";
    assert_eq!(digest(&out, image), digest(&folder, image));
}
