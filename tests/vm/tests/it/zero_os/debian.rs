//! A whole Debian from an flist: made from the image, served by a real web server and a real Redis,
//! fetched as it is read, booted to ssh.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use lodge_vm_tests::Lab;
use lodge_vm_tests::lab::{PATIENCE, command};
use lodge_vm_tests::zero_os::{Server, free_port, text};

#[test]
fn debian_boots_to_ssh_with_nothing_but_a_url() {
    let lab = Lab::new();
    // The usual kernel of images is without 9p.
    lodge_vm_tests::assets::debian_with(lab.home(), "linux-image-amd64");
    let web = lab.home().join("web");
    fs::create_dir_all(&web).unwrap();
    let (nginx, redis) = (Server::nginx(&web), Server::redis());
    let file = web.join("debian.flist");
    let store = format!("redis://127.0.0.1:{}", redis.port);
    let made = lab.ok(&["flist", "create", "debian-12", text(&file), "--store", &store]);
    let made: serde_json::Value = serde_json::from_str(&made).unwrap();
    let key = lab.home().join("id");
    let keygen =
        command("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
    assert!(keygen.unwrap().success());
    let port = free_port();
    let url = format!("http://127.0.0.1:{}/debian.flist", nginx.port);
    lab.ok(&[
        "run",
        &url,
        "--name",
        "ubuntu",
        "--memory",
        "1GiB",
        "--ready",
        "console:^lodge-ready",
        "--file",
        &format!("/root/.ssh/authorized_keys={}.pub", key.display()),
        "--port",
        &format!("{port}:22"),
        "--wait",
        "ready",
        "--timeout",
        "170",
    ]);
    let ssh = |script: &str| {
        let options =
            ["-q", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"];
        let at = ["-p", &port.to_string(), "root@127.0.0.1", script];
        let mut ssh = command("ssh");
        ssh.args(options).arg("-i").arg(&key).args(at).stdin(Stdio::null());
        ssh.output().unwrap()
    };
    let begun = Instant::now();
    let said = loop {
        let output = ssh("findmnt -no FSTYPE,SOURCE /; systemctl --failed --no-legend; id -u");
        if output.status.success() {
            break String::from_utf8_lossy(&output.stdout).into_owned();
        }
        assert!(begun.elapsed() < PATIENCE, "{output:?}");
        std::thread::sleep(Duration::from_millis(500));
    };
    let words: Vec<&str> = said.split_whitespace().collect();
    assert_eq!(words, ["9p", "root", "0"], "{said}");
    // Little of it was needed.
    let cache = lab.home().join("cache/flist/blocks/flist");
    let fetched =
        fs::read_dir(cache).unwrap().flatten().flat_map(|d| fs::read_dir(d.path()).unwrap());
    let fetched = fetched.count() as u64;
    let all = made["blocks"].as_u64().unwrap();
    assert!(fetched > 0 && fetched * 2 < all, "{fetched} of {all} blocks");
}
