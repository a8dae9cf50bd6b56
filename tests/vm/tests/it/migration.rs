//! Machines that move between two instances while they run, over a real SSH server: there, and
//! back to where they were when something is in the way.

use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;

use lodge_vm_tests::ssh::SshServer;
use lodge_vm_tests::zero_os::{Door, free_port};
use lodge_vm_tests::{Lab, assets, need};
use serde_json::{Value, json};

use crate::probe::{document, echo};

fn udp_port() -> u16 {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A disk that both instances see.
fn shared(lab: &Lab) -> String {
    let image = lab.home().join("shared.img");
    std::fs::write(&image, [b"DISK".repeat(128), vec![0; 1 << 20]].concat()).unwrap();
    image.display().to_string()
}

fn start(lab: &Lab, board: &str, accel: &str, more: &str) {
    lab.ok(&["create", &document(lab, "p", board, accel, more)]);
    lab.ok(&["start", "p", "--wait", "ready", "--timeout", "60"]);
    lab.until("ticks", || lab.ticks("p") > 3);
}

/// One request on the native socket.
fn ask(lab: &Lab, request: &Value) -> String {
    let mut socket = UnixStream::connect(lab.home().join("run/lodge.sock")).unwrap();
    writeln!(socket, "{request}").unwrap();
    let mut reply = [0; 1000];
    let count = socket.read(&mut reply).unwrap();
    String::from_utf8_lossy(&reply[..count]).into_owned()
}

fn moves(board: &str, accel: &str) {
    let (from, to) = (Lab::new(), Lab::new());
    let server = SshServer::to(&to);
    let (left, right) = (udp_port(), udp_port());
    let more = format!(
        "nics: [{{}}]\nports: [{{host: {left}, guest: 7, protocol: udp}}]\n\
         disks: [{{source: {}}}]\n",
        shared(&from)
    );
    start(&from, board, accel, &more);
    let id = from.machine("p")["id"].clone();
    echo(left);
    from.type_and_see("p", "write 0 5 kept\n", "written");
    // Both are one host here, on which a port can be had once.
    to.ok(&["ls"]);
    let ports = json!([{"host": right, "guest": 7, "protocol": "udp"}]);
    let expect = json!({"do": "expect", "id": id, "nics": [{"network": "default"}], "ports": ports,
                        "document": {}});
    assert!(ask(&to, &expect).contains("done"));
    let counted = from.ticks("p");
    from.ok(&["migrate", "p", &server.url()]);
    assert_eq!((from.state("p").as_str(), to.state("p").as_str()), ("absent", "running"));
    let there = to.machine("p");
    assert_eq!((&there["id"], &there["ready"]), (&id, &json!(true)));
    to.until("ticks", || to.ticks("p") > counted + 2);
    assert!(!to.console_text("p").contains("GUEST-READY"), "it began anew");
    to.type_and_see("p", "read 0 5\n", "disk 0 sector 5: kept");
    to.type_and_see("p", "write 0 6 there\n", "written");
    echo(right);
    // Nothing is left of it here, nor of its way.
    assert!(!from.home().join("machines").join(id.as_str().unwrap()).exists());
    let beside = std::fs::read_dir(from.home()).unwrap().flatten();
    let proofs = beside.filter(|e| e.file_name().to_string_lossy().starts_with(".lodge-"));
    assert_eq!(proofs.count(), 0);
    // The daemon there finds it again, and it ends like any other.
    to.kill_daemon();
    assert_eq!(to.state("p"), "running");
    to.ok(&["stop", "p", "--force"]);
    to.ok(&["start", "p", "--wait", "ready", "--timeout", "60"]);
    to.type_and_see("p", "read 0 6\n", "disk 0 sector 6: there");
}

#[test]
fn a_guest_runs_on_elsewhere() {
    moves("q35", "tcg");
}

#[test]
fn a_guest_runs_on_elsewhere_with_kvm() {
    need!(assets::kvm_opens(), "a /dev/kvm that opens");
    moves("microvm", "kvm");
}

#[test]
fn what_is_in_the_way_leaves_the_guest_where_it_is() {
    let (from, to) = (Lab::new(), Lab::new());
    let server = SshServer::to(&to);
    let disk = shared(&from);
    start(&from, "q35", "tcg", &format!("nics: []\ndisks: [{{source: {disk}}}]\n"));
    let runs_on = || {
        assert_eq!(from.state("p"), "running");
        let counted = from.ticks("p");
        from.until("ticks", || from.ticks("p") > counted + 1);
        assert_eq!(to.state("p"), "absent");
    };
    let refused = |url: &str, why: &str| {
        let said = from.fails(&["migrate", "p", url]);
        assert!(said.contains(why), "{said}");
        runs_on();
    };
    refused("qemu+tcp://127.0.0.1/system", "reached over SSH");
    refused(&format!("ssh://root@127.0.0.1:{}", free_port()), "Connection refused");
    let stranger = server.url().replace("known_hosts=", "known_hosts=/nowhere");
    refused(&stranger, "Host key verification failed");
    // It stands still: there is nothing that could run on.
    from.ok(&["pause", "p"]);
    assert!(
        from.fails(&["migrate", "p", &server.url()]).contains("cannot migrate p: it is paused")
    );
    from.ok(&["resume", "p"]);
    // The name is somebody else's there.
    to.ok(&["create", &document(&to, "p", "q35", "tcg", "nics: []\n")]);
    let said = from.fails(&["migrate", "p", &server.url()]);
    assert!(said.contains("the name p is already in use by machine"), "{said}");
    to.ok(&["rm", "p"]);
    // A disk of the machine's own stays where it is.
    from.ok(&["create", &document(&from, "own", "q35", "tcg", "disks: [{size: 1MiB}]\n")]);
    from.ok(&["start", "own"]);
    let said = from.fails(&["migrate", "own", &server.url()]);
    assert!(said.contains("its disk disk0 stays here: it is the machine's own"), "{said}");
    runs_on();
    // A folder of the same name is not the same folder.
    let script = format!(
        "exec unshare -m sh -c 'mount -t tmpfs none {0} && head -c 1049088 /dev/zero > {0}/shared.img \
         && LODGE_HOME={1} {2} receive'",
        from.home().display(),
        to.home().display(),
        lodge_vm_tests::lab::program().display(),
    );
    to.kill_daemon();
    let folder = to.home().join("elsewhere");
    std::fs::create_dir(&folder).unwrap();
    refused(&SshServer::new(&folder, &script).url(), "its folder is not shared between the two");
    to.kill_daemon();
    // It moves once nothing is in the way.
    from.ok(&["migrate", "p", &server.url()]);
    assert_eq!(to.state("p"), "running");
}

/// Speaks as the other host would, up to a point.
const IMPOSTOR: &str = r#"
import os, struct, sys, time
sys.stdin.buffer.readline()
print('{"reply":"document","value":{"memory":""}}', flush=True)
# Takes nothing, for as long as its server is there.
while sys.argv[1] == 'never' and os.getppid() != 1:
    time.sleep(0.1)
while sys.argv[1] != 'never':
    size = struct.unpack('>I', sys.stdin.buffer.read(4))[0]
    sys.stdin.buffer.read(size)
    if sys.argv[1] == 'early' or size == 0:
        break
"#;

/// A host that breaks off at a certain moment.
fn impostor(lab: &Lab, when: &str) -> SshServer {
    let folder = lab.home().join(when);
    std::fs::create_dir(&folder).unwrap();
    let script = folder.join("impostor.py");
    std::fs::write(&script, IMPOSTOR).unwrap();
    SshServer::new(&folder, &format!("exec python3 {} {when}", script.display()))
}

#[test]
fn a_guest_runs_on_here_unless_it_may_run_there() {
    let from = Lab::new();
    start(&from, "q35", "tcg", "nics: []\n");
    // The way breaks off: everything is still here.
    let said = from.fails(&["migrate", "p", &impostor(&from, "early").url()]);
    assert!(said.contains("127.0.0.1: the connection was lost"), "{said}");
    let counted = from.ticks("p");
    from.until("ticks", || from.state("p") == "running" && from.ticks("p") > counted + 1);
    // It breaks off when all has been sent.
    let said = from.fails(&["migrate", "p", &impostor(&from, "late").url()]);
    assert!(said.contains("the guest may run there by now"), "{said}");
    from.until("a standstill", || from.state("p") == "paused");
    let counted = from.ticks("p");
    from.ok(&["resume", "p"]);
    from.until("ticks", || from.ticks("p") > counted + 1);
    assert!(from.ok(&["events", "p"]).contains("migrate-failed"));
}

/// Meanwhile it can only be ended; the hypervisor's end is the end of the way.
#[test]
fn a_machine_on_its_way_can_be_ended() {
    let from = Lab::new();
    start(&from, "q35", "tcg", "nics: []\n");
    let slow = impostor(&from, "never");
    let mut migrate = from.command(&["migrate", "p", &slow.url()]).spawn().unwrap();
    from.until("the way", || from.ok(&["events", "p"]).contains("migrate "));
    for words in [&["pause", "p"][..], &["set", "p", "--add-disk", "1MiB"], &["suspend", "p"]] {
        let said = from.fails(words);
        assert!(said.contains("is on its way to ssh://"), "{said}");
    }
    from.ok(&["stop", "p", "--force"]);
    assert!(!migrate.wait().unwrap().success());
    assert_eq!(from.state("p"), "stopped");
}

#[test]
fn a_machine_of_zero_os_moves_with_its_clients_words() {
    let (from, to) = (Door::new(""), Door::new(""));
    let server = SshServer::to(&to.lab);
    let (mut here, mut there) = (from.client(), to.client());
    let media = json!([{"url": shared(&from.lab), "type": "disk"}]);
    let (left, right) = (free_port(), free_port());
    let nics = json!([{"type": "default"}]);
    let create = json!({"name": "My VM", "cpu": 1, "memory": 64, "media": media, "nics": nics,
                        "port": {left.to_string(): 80}});
    let uuid = here.value("kvm.create", create);
    let before = here.value("kvm.get", json!({"uuid": uuid}));
    // What is wrong with the preparation is said there.
    for (arguments, why) in [
        (json!({"nics": nics}), "UUID is a required parameter"),
        (json!({"uuid": uuid, "nics": [{"type": "foo"}]}), "invalid nic type 'foo'"),
        (
            json!({"uuid": uuid, "nics": [{"type": "vlan", "id": "9999"}]}),
            "invalid vlan id (0-4094)",
        ),
        (json!({"uuid": uuid, "nics": nics, "port": {"0": 80}}), "invalid port number"),
    ] {
        assert_eq!(there.error("kvm.prepare_migration_target", arguments).1, why);
    }
    let prepare =
        |nics: &Value| json!({"uuid": uuid, "nics": nics, "port": {right.to_string(): 80}});
    assert_eq!(there.value("kvm.prepare_migration_target", prepare(&json!([]))), Value::Null);
    let go = json!({"uuid": uuid, "desturi": server.libvirt_url()});
    let (_, why) = here.error("kvm.migrate", go.clone());
    assert!(why.contains("0 interfaces were prepared for it here, and it has 1"), "{why}");
    there.value("kvm.prepare_migration_target", prepare(&nics));
    assert_eq!(here.value("kvm.migrate", go.clone()), Value::Null);
    assert_eq!(here.value("kvm.list", json!({})), json!([]));
    let after = there.value("kvm.get", json!({"uuid": uuid}));
    for key in ["uuid", "name", "id", "state", "default_ip"] {
        assert_eq!(after[key], before[key], "{key}");
    }
    assert_eq!(after["params"]["port"], json!({right.to_string(): 80}));
    assert_eq!(after["params"]["nics"], before["params"]["nics"]);
    assert_eq!(after["params"]["media"], before["params"]["media"]);
    let (_, why) = here.error("kvm.migrate", go);
    assert!(why.starts_with("couldn't find domain with the uuid"), "{why}");
    // Its number is taken there from now on.
    let media = json!([{"url": shared(&to.lab)}]);
    let create = json!({"name": "b", "cpu": 1, "memory": 64, "media": media, "nics": nics});
    let next = there.value("kvm.create", create);
    let next = there.value("kvm.get", json!({"uuid": next}));
    assert_eq!(next["default_ip"], "172.19.0.3");
    // Ephemeral as it was, it is gone when it ends.
    there.value("kvm.destroy", json!({"uuid": uuid}));
    assert_eq!(there.value("kvm.list", json!({})).as_array().unwrap().len(), 1);
}
