//! The image `debian-12`: built from packages, booted, reached over ssh.

use lodge_vm_tests::lab::command;
use lodge_vm_tests::{Lab, assets};

fn ssh(key: &std::path::Path, port: u16, line: &str) -> String {
    let output = command("timeout")
        .args(["100", "ssh"])
        .args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"])
        .args(["-o", "LogLevel=ERROR", "-o", "ConnectTimeout=60", "-i"])
        .arg(key)
        .args(["-p", &port.to_string(), "root@127.0.0.1", line])
        .output()
        .unwrap();
    assert!(output.status.success(), "ssh: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn debian_boots_takes_its_files_and_shuts_down() {
    let lab = Lab::with_debian();
    let key = lab.home().join("key");
    let made =
        command("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
    assert!(made.unwrap().success());
    let public = format!("{}.pub", key.display());
    let motd = lab.home().join("motd");
    std::fs::write(&motd, "from the host\n").unwrap();
    lab.ok(&[
        "run",
        "debian-12",
        "--name",
        "web",
        "--ssh-key",
        &public,
        "--port",
        "18434:22",
        "--port",
        "18433:7000/udp",
        "--file",
        &format!("/etc/motd={}", motd.display()),
        "--wait",
        "ready",
        "--timeout",
        "175",
    ]);
    let said = ssh(
        &key,
        18434,
        "hostname; cat /etc/motd; stat -c %a /root/.ssh/authorized_keys; \
                                 cat /proc/sys/kernel/random/boot_id; echo kept > /root/kept; sync",
    );
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[..3], ["web", "from the host", "600"]);
    let failed = ssh(&key, 18434, "systemctl --failed --no-legend; df --output=fstype / | tail -1");
    assert_eq!(failed.trim(), "ext4");
    let echo = "perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalPort => 7000, Proto => \
                \"udp\"); $s->recv($b, 99); $s->send(uc $b)'";
    let answer = std::thread::scope(|scope| {
        let served = scope.spawn(|| ssh(&key, 18434, echo));
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect("127.0.0.1:18433").unwrap();
        socket.set_read_timeout(Some(std::time::Duration::from_millis(500))).unwrap();
        let mut answer = [0; 99];
        while !served.is_finished() {
            socket.send(b"over udp").unwrap();
            if let Ok(count) = socket.recv(&mut answer) {
                return String::from_utf8_lossy(&answer[..count]).into_owned();
            }
        }
        String::new()
    });
    assert_eq!(answer, "OVER UDP");
    // Its memory goes to the disk and comes back, with what runs in it.
    ssh(&key, 18434, "setsid sleep 1000 > /dev/null 2>&1 < /dev/null & echo $! > /run/sleeper");
    let begun = std::time::Instant::now();
    lab.ok(&["suspend", "web"]);
    let saved = begun.elapsed();
    lab.ok(&["start", "web"]);
    let back = begun.elapsed() - saved;
    let on = ssh(
        &key,
        18434,
        "cat /proc/sys/kernel/random/boot_id /proc/$(cat /run/sleeper)/comm; echo on > /root/on",
    );
    assert_eq!(on, format!("{}\nsleep\n", lines[3]), "{saved:?} {back:?}");
    println!("suspended in {saved:?}, back in {back:?}");
    // The guest hears its power button and ends by itself.
    lab.ok(&["stop", "web", "--timeout", "120"]);
    let events = lab.ok(&["events", "web"]);
    assert!(!events.contains("stop-timed-out"), "{events}");
    lab.ok(&["start", "web", "--wait", "ready", "--timeout", "175"]);
    let again = ssh(&key, 18434, "cat /root/kept; cat /proc/sys/kernel/random/boot_id");
    assert!(again.starts_with("kept\n") && !again.contains(lines[3]), "{again}");
    lab.ok(&["image", "verify", "debian-12"]);
}

#[test]
fn a_layer_can_be_larger_than_its_image() {
    let lab = Lab::with_debian();
    let file = lab.home().join("machine");
    std::fs::write(&file, "{name: a, image: debian-12, image_size: 6GB, nics: []}").unwrap();
    lab.ok(&["create", file.to_str().unwrap()]);
    lab.ok(&["start", "a", "--wait", "ready", "--timeout", "175"]);
    let kernel = assets::kernel();
    assert!(!kernel.is_empty());
    let text = "{name: b, image: debian-12, image_size: 1GB}";
    std::fs::write(&file, text).unwrap();
    let complaint = lab.fails(&["create", file.to_str().unwrap()]);
    assert!(complaint.contains("a layer cannot be smaller"), "{complaint}");
}
