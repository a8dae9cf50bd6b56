//! QEMU and the probe guest: disks, interfaces, power and clock on every board, in a fraction of a
//! second; and with KVM also where the host's cannot run Linux.

use std::net::UdpSocket;
use std::time::Duration;

use lodge_vm_tests::lab::wait_for_text;
use lodge_vm_tests::{Lab, assets, need};

pub(crate) fn document(lab: &Lab, name: &str, board: &str, accel: &str, more: &str) -> String {
    let kernel = assets::probe();
    let text = format!(
        "name: {name}\nbackend: qemu\nboard: {board}\naccel: {accel}\nmemory: 64MiB\n\
         ready: console:GUEST-READY\n\
         boot: {{kernel: {kernel}, cmdline: probe.ip=10.0.2.15}}\n{more}"
    );
    let file = lab.home().join(format!("{name}.yaml"));
    std::fs::write(&file, text).unwrap();
    file.to_string_lossy().into_owned()
}

/// A datagram there and back.
pub(crate) fn echo(port: u16) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut back = [0; 64];
    for _ in 0..10 {
        socket.send_to(b"there and back", ("127.0.0.1", port)).unwrap();
        if let Ok(length) = socket.recv(&mut back) {
            assert_eq!(&back[..length], b"there and back");
            return;
        }
    }
    panic!("nothing came back");
}

fn whole_life(board: &str, accel: &str) {
    let lab = Lab::new();
    let image = lab.home().join("disk.img");
    std::fs::write(&image, [b"DISK".repeat(128), vec![0; 1 << 20]].concat()).unwrap();
    let image = image.display();
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let more = format!(
        "nics: [{{}}]\nports: [{{host: {port}, guest: 7, protocol: udp}}]\n\
         disks:\n- {{source: {image}, layered: true, limits: {{operations: {{total: {{rate: 900}}}}}}}}\n\
         - {{source: {image}, read_only: true}}\n"
    );
    lab.ok(&["create", &document(&lab, "p", board, accel, &more)]);
    lab.ok(&["start", "p", "--wait", "ready", "--timeout", "60"]);
    let machine = lab.machine("p");
    assert_eq!((&machine["backend"], &machine["accel"]), (&"qemu".into(), &accel.into()));
    let text = lab.console_text("p");
    for part in ["disk0: DISK writable=true", "disk1: DISK writable=false", "nets: 1"] {
        assert!(text.contains(&format!("PROBE {part}")), "{part} in {text}");
    }
    echo(port);
    // It stands still, and goes on where it stood.
    lab.until("ticks", || lab.ticks("p") > 3);
    lab.ok(&["pause", "p"]);
    let stood = lab.ticks("p");
    lab.kill_daemon();
    assert_eq!((lab.state("p").as_str(), lab.ticks("p")), ("paused", stood));
    lab.ok(&["resume", "p"]);
    lab.until("ticks again", || lab.ticks("p") > stood);
    assert!(lab.ticks("p") >= stood);
    // What is written is there the next time, and nowhere else.
    lab.type_and_see("p", "write 0 5 kept\n", "written");
    lab.type_and_see("p", "write 1 5 never\n", "not written");
    lab.type_and_see("p", "write 0 99999 beyond\n", "not written");
    lab.ok(&["stop", "p", "--timeout", "30"]);
    assert!(!lab.ok(&["events", "p"]).contains("stop-timed-out"));
    lab.ok(&["start", "p", "--wait", "ready"]);
    lab.type_and_see("p", "read 0 5\n", "disk 0 sector 5: kept");
    // It ends itself.
    let mut console = lab.attach("p");
    use std::io::Write;
    console.stdin.as_mut().unwrap().write_all(b"poweroff\n").unwrap();
    lab.until("the end", || lab.state("p") == "stopped");
    lodge_vm_tests::lab::end(console);
}

#[test]
fn the_whole_life_on_the_q35_board() {
    whole_life("q35", "tcg");
}

#[test]
fn the_whole_life_on_the_microvm_board() {
    whole_life("microvm", "tcg");
}

#[test]
fn the_whole_life_with_kvm() {
    need!(assets::kvm_opens(), "a /dev/kvm that opens");
    whole_life("microvm", "kvm");
}

/// Some distributions keep kernels from all but root; a machine boots one all the same.
#[test]
fn a_kernel_that_is_roots_alone_boots() {
    use std::os::unix::fs::PermissionsExt;
    let lab = Lab::new();
    let kernel = lab.home().join("vmlinuz");
    std::fs::copy(assets::probe(), &kernel).unwrap();
    std::fs::set_permissions(&kernel, std::fs::Permissions::from_mode(0o600)).unwrap();
    let file = document(&lab, "p", "q35", "tcg", "nics: []\n");
    let text = std::fs::read_to_string(&file).unwrap();
    let text = text.replace(&assets::probe(), kernel.to_str().unwrap());
    std::fs::write(&file, text).unwrap();
    lab.ok(&["create", &file]);
    lab.ok(&["start", "p", "--wait", "ready", "--timeout", "60"]);
}

/// What KVM cannot carry out ends the machine, with the reason.
#[test]
fn a_hypervisor_that_cannot_go_on_is_a_failure_with_a_reason() {
    need!(assets::kvm_opens(), "a /dev/kvm that opens");
    let lab = Lab::new();
    lab.ok(&["create", &document(&lab, "p", "microvm", "kvm", "nics: []\n")]);
    lab.ok(&["start", "p", "--wait", "ready", "--timeout", "60"]);
    let mut console = lab.attach("p");
    wait_for_text(&mut console, "tick");
    use std::io::Write;
    console.stdin.as_mut().unwrap().write_all(b"crash\n").unwrap();
    // Where the instruction is carried out, the fault after it starts the guest anew.
    let anew = || lab.ok(&["events", "p"]).contains("guest-reset");
    lab.until("the end", || lab.state("p") == "failed" || anew());
    lodge_vm_tests::lab::end(console);
    let reason = lab.machine("p")["reason"].clone();
    let emulated = reason.as_str().is_some_and(|reason| reason.contains("internal-error"));
    assert!(emulated || anew(), "{reason}");
}

/// What is plugged in is found and used.
#[test]
fn a_disk_that_is_plugged_in_is_read() {
    let lab = Lab::new();
    let image = lab.home().join("more.img");
    std::fs::write(&image, [b"MORE".repeat(128), vec![0; 1 << 20]].concat()).unwrap();
    lab.ok(&["create", &document(&lab, "p", "q35", "tcg", "nics: []\n")]);
    lab.ok(&["start", "p", "--wait", "ready", "--timeout", "60"]);
    lab.ok(&["set", "p", "--add-disk", image.to_str().unwrap()]);
    lab.until("the disk", || lab.console_text("p").contains("PROBE disk0: MORE"));
}

/// Ends with the test.
struct Server(std::process::Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server's disk, over TCP and over a socket of the host's; the hypervisor has neither.
#[test]
fn a_servers_disk_is_read_and_written() {
    let lab = Lab::new();
    let (image, socket) = (lab.home().join("served.img"), lab.home().join("served.sock"));
    std::fs::write(&image, [b"DISK".repeat(128), vec![0; 1 << 20]].concat()).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let by_tcp = ["--bind=127.0.0.1".to_owned(), format!("--port={port}")];
    let by_socket = [format!("--socket={}", socket.display()), "--shared=2".to_owned()];
    let over_tcp = format!("nbd://127.0.0.1:{port}/a/b");
    let over_socket = format!("nbd+unix:///a/b?socket={}", socket.display());
    for (name, board, how, source) in
        [("t", "q35", by_tcp, over_tcp), ("u", "microvm", by_socket, over_socket)]
    {
        let more = format!("nics: []\ndisks: [{{source: '{source}'}}]\n");
        lab.ok(&["create", &document(&lab, name, board, "tcg", &more)]);
        // Nobody is there yet.
        let said = lab.fails(&["start", name]);
        assert!(said.contains(&source), "{said}");
        let mut server = lodge_vm_tests::lab::command("qemu-nbd");
        server.args(["--persistent", "--format=raw", "--export-name=a/b"]).args(how).arg(&image);
        let server = Server(server.spawn().unwrap());
        lab.until("the server", || lab.run(&["start", name]).status.success());
        lab.until("the disk", || lab.console_text(name).contains("PROBE disk0: DISK"));
        lab.type_and_see(name, "write 0 5 kept\n", "written");
        let written = || std::fs::read(&image).unwrap()[5 * 512..].starts_with(b"kept");
        lab.until("what was written", written);
        let more = |address: &str| lab.fails(&["set", name, "--add-disk", address]);
        assert!(more(&source).contains("appears twice"));
        let said = more(&source.replace("/a/b", "/other"));
        // It has one client at a time.
        let why = if board == "q35" { "does not greet" } else { "microvm" };
        assert!(said.contains(why), "{said}");
        // A server that goes takes nobody with it.
        drop(server);
        let stood = lab.ticks(name);
        lab.until("ticks", || lab.ticks(name) > stood + 2);
        lab.ok(&["stop", "--force", name]);
        let mut bytes = std::fs::read(&image).unwrap();
        bytes[5 * 512..][..4].fill(0);
        std::fs::write(&image, bytes).unwrap();
    }
}

/// Also to a machine that runs already.
#[test]
fn a_servers_disk_is_plugged_in() {
    let lab = Lab::new();
    let (image, socket) = (lab.home().join("served.img"), lab.home().join("served.sock"));
    std::fs::write(&image, [b"MORE".repeat(128), vec![0; 1 << 20]].concat()).unwrap();
    lab.ok(&["create", &document(&lab, "p", "q35", "tcg", "nics: []\n")]);
    lab.ok(&["start", "p", "--wait", "ready", "--timeout", "60"]);
    let source = format!("nbd+unix:///x?socket={}", socket.display());
    assert!(lab.fails(&["set", "p", "--add-disk", &source]).contains("No such file"));
    let other = lodge_vm_tests::zero_os::Server::redis();
    let mute = format!("nbd://127.0.0.1:{}/x", other.port);
    let said = lab.fails(&["set", "p", "--add-disk", &mute]);
    assert!(said.contains("does not greet"), "{said}");
    let mut server = lodge_vm_tests::lab::command("qemu-nbd");
    server.args(["--persistent", "--format=raw", "--export-name=x"]);
    server.arg(format!("--socket={}", socket.display())).arg(&image);
    let _server = Server(server.spawn().unwrap());
    lab.until("the disk", || lab.run(&["set", "p", "--add-disk", &source]).status.success());
    lab.until("the disk", || lab.console_text("p").contains("PROBE disk0: MORE"));
    lab.type_and_see("p", "write 0 5 kept\n", "written");
    let written = || std::fs::read(&image).unwrap()[5 * 512..].starts_with(b"kept");
    lab.until("what was written", written);
}

/// A disk whose blocks lie in a server of the Redis protocol, the real one.
#[test]
fn a_disk_of_blocks_is_read_and_written() {
    let lab = Lab::new();
    let redis = lodge_vm_tests::zero_os::Server::redis();
    // As its own client does it.
    let cli = |words: &[&str]| {
        let mut cli = lodge_vm_tests::lab::command("redis-cli");
        cli.args(["-p", &redis.port.to_string(), "-n", "3", "--raw"]).args(words);
        lodge_vm_tests::python::must(cli.output())
    };
    let source = |size: &str, more: &str| {
        format!("zdb://127.0.0.1:{}?size={size}&namespace=3{more}", redis.port)
    };
    let start = |name: &str, board: &str, source: &str| {
        let more = format!("nics: []\ndisks: [{{source: '{source}'}}]\n");
        lab.ok(&["create", &document(&lab, name, board, "tcg", &more)]);
        lab.run(&["start", name, "--wait", "ready", "--timeout", "60"])
    };
    let refused = |name: &str, source: &str| {
        let said = String::from_utf8(start(name, "q35", source).stderr).unwrap();
        lab.ok(&["rm", name]);
        said
    };
    let said = refused("a", "zdb://127.0.0.1:1?size=1MiB&password=secret");
    assert!(said.contains("zdb://127.0.0.1:1?size=1MiB: Connection refused"), "{said}");
    // The server says what it thinks of a password.
    let said = refused("b", &source("1MiB", "&password=secret"));
    assert!(said.contains("wrong number of arguments") && !said.contains("secret"), "{said}");
    let (first, more) = (source("2MiB", "&blocksize=1024"), source("1MiB", ""));
    assert!(start("p", "q35", &first).status.success());
    lab.until("the disk", || lab.console_text("p").contains("PROBE disk0: "));
    let typed = "write 0 5 kept\nwrite 0 4000 far\nread 0 4000\n";
    lab.type_and_see("p", typed, "disk 0 sector 4000: far");
    // What was never written is nowhere.
    lab.until("two blocks", || cli(&["DBSIZE"]).trim() == "2");
    lab.ok(&["set", "p", "--add-disk", &more.replace("namespace=3", "namespace=4")]);
    lab.until("the second disk", || lab.console_text("p").contains("PROBE disk1: "));
    lab.ok(&["stop", "p", "--force"]);
    assert!(lab.run(&["start", "p", "--wait", "ready"]).status.success());
    lab.type_and_see("p", "read 0 5\n", "disk 0 sector 5: kept");
    lab.type_and_see("p", "read 0 4000\n", "disk 0 sector 4000: far");
    // A server that goes takes nobody with it.
    drop(redis);
    lab.type_and_see("p", "read 0 5\n", "disk 0 sector 5 failed");
    let stood = lab.ticks("p");
    lab.until("ticks", || lab.ticks("p") > stood + 2);
}

/// Memory goes to the disk and comes back: the guest counts on where it stood, its disks and its
/// interfaces work, and nothing is left of what was saved.
fn there_and_back(board: &str, accel: &str) {
    let lab = Lab::new();
    let image = lab.home().join("disk.img");
    std::fs::write(&image, [b"DISK".repeat(128), vec![0; 1 << 20]].concat()).unwrap();
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let more = format!(
        "nics: [{{}}]\nports: [{{host: {port}, guest: 7, protocol: udp}}]\n\
         disks: [{{source: {}, layered: true, limits: {{operations: {{total: {{rate: 900}}}}}}}}]\n",
        image.display()
    );
    lab.ok(&["create", &document(&lab, "p", board, accel, &more)]);
    lab.ok(&["start", "p", "--wait", "ready", "--timeout", "60"]);
    lab.until("ticks", || lab.ticks("p") > 3);
    lab.type_and_see("p", "write 0 5 kept\n", "written");
    let before = lab.pid_of_hypervisor("p");
    lab.ok(&["suspend", "p"]);
    let stood = lab.ticks("p");
    assert_eq!(lab.state("p"), "suspended");
    assert!(!std::path::Path::new(&format!("/proc/{before}")).exists());
    let home = lab.home().join("machines").join(lab.machine("p")["id"].as_str().unwrap());
    assert!(std::fs::metadata(home.join("memory/qemu")).unwrap().len() > 1 << 16);
    // A daemon that comes later knows it too.
    lab.kill_daemon();
    assert_eq!((lab.state("p").as_str(), lab.ticks("p")), ("suspended", stood));
    let said = lab.fails(&["stop", "p"]);
    assert!(said.contains("starting it goes on where it was"), "{said}");
    let said = lab.fails(&["set", "p", "--add-disk", "1MiB"]);
    assert!(said.contains("cannot change p: it is suspended"), "{said}");
    lab.ok(&["start", "p"]);
    assert_eq!(lab.machine("p")["ready"], true);
    lab.until("ticks again", || lab.ticks("p") > stood + 3);
    // It was not started anew.
    let text = lab.console_text("p");
    assert_eq!(text.matches("GUEST-READY").count(), 1, "{text}");
    assert!(text.contains(&format!("tick {}\r", stood + 1)), "{text}");
    lab.type_and_see("p", "read 0 5\n", "disk 0 sector 5: kept");
    echo(port);
    assert!(!home.join("memory/qemu").exists() && !home.join("memory.json").exists());
    // Once more, standing still; then its memory is given up.
    lab.ok(&["pause", "p"]);
    lab.ok(&["suspend", "p"]);
    lab.ok(&["stop", "p", "--force"]);
    assert_eq!(lab.state("p"), "stopped");
    assert!(!home.join("memory.json").exists());
    lab.ok(&["start", "p", "--wait", "ready"]);
    assert_eq!(lab.console_text("p").matches("GUEST-READY").count(), 2);
    lab.ok(&["suspend", "p"]);
    lab.ok(&["rm", "p"]);
    assert!(!home.exists());
}

#[test]
fn memory_is_saved_on_the_q35_board() {
    there_and_back("q35", "tcg");
}

#[test]
fn memory_is_saved_on_the_microvm_board() {
    there_and_back("microvm", "tcg");
}

#[test]
fn memory_is_saved_with_kvm() {
    need!(assets::kvm_opens(), "a /dev/kvm that opens");
    there_and_back("microvm", "kvm");
}

/// A guest that cannot come back as it was is not suspended, and runs on.
#[test]
fn what_cannot_come_back_is_not_suspended() {
    let lab = Lab::new();
    lab.ok(&["create", &document(&lab, "p", "q35", "tcg", "nics: []\ndisks: [{size: 1MiB}]\n")]);
    lab.ok(&["start", "p", "--wait", "ready", "--timeout", "60"]);
    // What was saved cannot be noted down.
    let home = lab.home().join("machines").join(lab.machine("p")["id"].as_str().unwrap());
    std::fs::create_dir(home.join("memory.json")).unwrap();
    let said = lab.fails(&["suspend", "p"]);
    assert!(said.contains("Is a directory"), "{said}");
    assert_eq!(std::fs::read_dir(home.join("memory")).unwrap().count(), 0);
    lab.until("running", || lab.state("p") == "running");
    let stood = lab.ticks("p");
    lab.until("ticks", || lab.ticks("p") > stood);
    // Nor what was changed since.
    lab.ok(&["create", &document(&lab, "q", "q35", "tcg", "nics: []\n")]);
    lab.ok(&["start", "q", "--wait", "ready", "--timeout", "60"]);
    lab.ok(&["set", "q", "--add-disk", "1MiB"]);
    let said = lab.fails(&["suspend", "q"]);
    assert!(said.contains("its next start differs from this one"), "{said}");
    assert_eq!(lab.state("q"), "running");
    // What is saved fits only what it was.
    lab.ok(&["create", &document(&lab, "r", "q35", "tcg", "nics: []\n")]);
    lab.ok(&["start", "r", "--wait", "ready", "--timeout", "60"]);
    lab.ok(&["suspend", "r"]);
    let home = lab.home().join("machines").join(lab.machine("r")["id"].as_str().unwrap());
    let memory = home.join("memory/qemu");
    let whole = std::fs::read(&memory).unwrap();
    std::fs::write(&memory, &whole[..whole.len() / 2]).unwrap();
    let said = lab.fails(&["start", "r"]);
    assert!(said.contains("load of migration failed"), "{said}");
    assert_eq!(lab.state("r"), "suspended");
    std::fs::write(&memory, &whole).unwrap();
    lab.ok(&["start", "r"]);
    let stood = lab.ticks("r");
    lab.until("ticks", || lab.ticks("r") > stood);
}

/// A port may be for some alone: told by where they come from, or by which interface.
#[test]
fn ports_may_be_for_some_alone() {
    let lab = Lab::new();
    let free = || UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (near, far, lo) = (free(), free(), free());
    let port = |host: u16, from: &str| {
        format!("{{host: {host}, guest: 7, protocol: udp, ip: 0.0.0.0, from: {from}}}")
    };
    let ports = [port(near, "127.0.0.0/8"), port(far, "10.99.0.0/16"), port(lo, "lo")].join(", ");
    let more = format!("nics: [{{}}]\nports: [{ports}]\n");
    lab.ok(&["create", &document(&lab, "p", "microvm", "tcg", &more)]);
    lab.ok(&["start", "p", "--wait", "ready", "--timeout", "60"]);
    echo(near);
    echo(lo);
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    socket.send_to(b"let me in", ("127.0.0.1", far)).unwrap();
    assert!(socket.recv(&mut [0; 64]).is_err(), "the port was for others");
    lab.ok(&["rm", "p", "--force"]);
    let more = format!("nics: [{{}}]\nports: [{}]\n", port(near, "nosuch0"));
    lab.ok(&["create", &document(&lab, "q", "microvm", "tcg", &more)]);
    let said = lab.fails(&["start", "q"]);
    assert!(said.contains(&format!("{near}/udp")) && said.contains("No such device"), "{said}");
    let more = format!("nics: [{{}}]\nports: [{}]\n", port(near, "10.0.0.0/99"));
    let said = lab.fails(&["create", &document(&lab, "r", "microvm", "tcg", &more)]);
    assert!(said.contains("ports[0].from") && said.contains("10.0.0.0/8"), "{said}");
}
