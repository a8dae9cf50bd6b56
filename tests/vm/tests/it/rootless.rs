//! The same without root: a user's own instance, confined and connected.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;

use lodge_vm_tests::lab::command;
use lodge_vm_tests::{Lab, assets, need};

const USER: u32 = 61_234;

/// Readable by everyone: the kernel and guests that root made, and the program.
fn open_up() -> (String, String) {
    let dir = tempfile::Builder::new().prefix("lodge-rootless-").tempdir().unwrap().keep();
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    let take = |from: String, name: &str| {
        let to = dir.join(name);
        std::fs::copy(from, &to).unwrap();
        std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o755)).unwrap();
        to.to_string_lossy().into_owned()
    };
    let kernel = take(assets::kernel(), "kernel");
    let initrd = take(assets::networked(), "initrd");
    (kernel, initrd)
}

fn user_namespaces() -> bool {
    let uid = USER.to_string();
    let args = ["--reuid", &uid, "--regid", &uid, "--clear-groups", "unshare", "-U", "true"];
    command("setpriv").args(args).status().unwrap().success()
}

#[test]
fn a_user_runs_machines_in_a_jail_and_on_a_network() {
    need!(user_namespaces(), "user namespaces for ordinary users");
    let (kernel, initrd) = open_up();
    let lab = Lab::of_user(USER);
    for (name, port) in [("a", "18435:80"), ("b", "18436:80")] {
        lab.boot_kernel(name, &kernel, &initrd, &["--port", port]);
    }
    let held = lab.json(&["inspect", "a"])["runs"]["confinement"].clone();
    assert_eq!(held["seccomp_mode"], 2);
    assert_eq!(held["capabilities"]["CapEff"], "0000000000000000");
    let own = held["own_namespaces"].as_array().unwrap();
    assert!(own.iter().any(|n| n == "user") && own.iter().any(|n| n == "net"), "{own:?}");
    assert_eq!(held["uid"], USER);
    let mut stream = TcpStream::connect("127.0.0.1:18435").unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text);
    assert!(text.contains("served-by-"), "{text}");
    lab.type_and_see("b", "wget -q -O - http://a/\n", "served-by-10.0.2.");
    lab.kill_daemon();
    assert_eq!(lab.state("a"), "running");
    let ways = lab.json(&["doctor", "--escape"]);
    assert!(ways.as_array().unwrap().iter().all(|way| way["closed"] == true), "{ways}");
    // In other words, and with a screen and an interface that is guarded.
    let made = lab.command(&["vmadm", "create"]).stdin(seed(&lab)).output().unwrap();
    let said = String::from_utf8_lossy(&made.stderr).into_owned();
    let uuid =
        said.trim().strip_prefix("Successfully created VM ").unwrap_or_else(|| panic!("{said}"));
    let info: serde_json::Value =
        serde_json::from_str(&lab.ok(&["vmadm", "info", uuid, "vnc"])).unwrap();
    let at = format!("127.0.0.1:{}", info["vnc"]["port"]);
    assert!(lodge_vm_tests::rfb::Viewer::connect(&at, None).is_ok(), "{info}");
    lab.ok(&["vmadm", "delete", uuid]);
    let dir = std::path::Path::new(&kernel).parent().unwrap().to_owned();
    drop(lab);
    std::fs::remove_dir_all(dir).unwrap();
}

/// A machine that starts at once.
fn seed(lab: &Lab) -> std::fs::File {
    let path = lab.home().join("vmspec.json");
    std::fs::write(&path, lodge_vm_tests::vmadm::SEED.replace("false", "true")).unwrap();
    std::fs::File::open(path).unwrap()
}
