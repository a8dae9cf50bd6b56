//! The Zero-OS door as its clients meet it: jobs, results, and the commands about machines.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use lodge_vm_tests::lab::command;
use lodge_vm_tests::zero_os::{Client, Door, Flist, Said, free_port, text};
use serde_json::{Value, json};

fn create(flist: &Flist, name: &str, more: Value) -> Value {
    let mut all = json!({
        "name": name, "flist": format!("file://{}", flist.path()), "storage": flist.store,
        "cpu": 1, "memory": 256, "media": null, "nics": [], "port": null, "mount": null,
        "tags": null, "config": null,
    });
    for (key, value) in more.as_object().unwrap() {
        all[key] = value.clone();
    }
    all
}

#[test]
fn the_protocol_is_that_of_redis() {
    let door = Door::new("");
    let mut client = door.client();
    for (line, said) in [
        ("PING", Said::Text("PONG".into())),
        ("SELECT 0", Said::Text("OK".into())),
        ("CLIENT SETINFO LIB-NAME x", Said::Text("OK".into())),
        ("AUTH anything", Said::Text("OK".into())),
        ("AUTH default anything", Said::Text("OK".into())),
        ("EXISTS nothing", Said::Number(0)),
        ("TTL nothing", Said::Number(-2)),
        ("RPUSH list a b", Said::Number(2)),
        ("LLEN list", Said::Number(2)),
        ("LTTL list", Said::Number(-1)),
        ("LKEYEXISTS list", Said::Number(1)),
        (
            "BLPOP other list 1",
            Said::List(vec![Said::Bytes(b"list".to_vec()), Said::Bytes(b"a".to_vec())]),
        ),
        ("BRPOPLPUSH list list 1", Said::Bytes(b"b".to_vec())),
        ("BLPOP other 0.05", Said::Nothing),
        ("DEL list", Said::Number(1)),
    ] {
        assert_eq!(client.say(line), said, "{line}");
    }
    let error = |said: Said, why: &str| match said {
        Said::Error(text) => assert!(text.contains(why), "{text}"),
        other => panic!("{other:?}"),
    };
    error(client.say("AUTH a b c"), "invalid number of arguments");
    error(client.say("FLUSHALL"), "unknown command 'flushall'");
    error(client.say("LLEN"), "wrong number of arguments");
    error(client.say("HELLO 4"), "NOPROTO");
    assert!(matches!(client.say("HELLO 3 AUTH default x"), Said::List(_)));
    assert_eq!(client.say("BLPOP other 0.05"), Said::Nothing);
    error(client.raw(b"*1\r\n$99999999999\r\n"), "Protocol error");
}

#[test]
fn jobs_have_results_that_can_be_read_for_a_while_cases_1_32_33_36() {
    let door = Door::new("");
    let mut client = door.client();
    let pong = client.value("core.ping", json!({}));
    assert!(pong.as_str().unwrap().starts_with("PONG Version: "), "{pong}");
    assert!(client.value("core.state", json!({}))["rss"].as_u64().unwrap() > 1 << 20);
    let unknown = client.job("kvm.nope", json!({}));
    assert_eq!((&unknown["state"], &unknown["data"]), (&json!("UNKNOWN_CMD"), &json!("")));
    assert_ne!(unknown["code"], json!(0));
    // The same name again is not done again.
    let job = |id: &str, command: &str, stream: bool| {
        json!({"id": id, "command": command, "arguments": {}, "queue": "q", "max_time": null,
               "stream": stream, "tags": ["a"]})
    };
    client.hand_in(&job("twice", "core.ping", false));
    let first = client.result("twice");
    client.hand_in(&job("twice", "kvm.list", false));
    assert_eq!(client.result("twice"), first);
    assert_eq!(first["tags"], json!(["a"]));
    let Said::Number(ttl) = client.say("TTL result:twice:flag") else { panic!() };
    assert!((295..=300).contains(&ttl), "{ttl}");
    // What cannot be read is dropped, and the next is done.
    client.send(&[b"RPUSH", b"core:default", b"{not json"]);
    client.hand_in(&json!({"id": "", "command": "core.ping"}));
    client.hand_in(&job("streamed", "kvm.list", true));
    client.result("streamed");
    let Said::List(all) = client.say("BLPOP stream:streamed 5") else { panic!() };
    let Said::Bytes(record) = &all[1] else { panic!() };
    let record: Value = serde_json::from_slice(record).unwrap();
    assert_eq!((&record["core"], &record["command"]), (&json!(0), &json!("streamed")));
    assert_eq!(
        (&record["message"]["meta"], &record["message"]["message"]),
        (&json!(1_310_723), &json!("[]"))
    );
    assert_eq!(client.say("BLPOP stream:streamed 0.05"), Said::Nothing);
    let (code, why) = client.error("core.subscribe", json!({"id": "nobody"}));
    assert_eq!((code, why.as_str()), (500, "job 'nobody' does not exist"));
}

#[test]
fn a_machine_from_its_making_to_its_end_cases_2_and_20_to_24() {
    let mut door = Door::new("");
    let flist = Flist::new(&door.lab, "a.flist", |_| {});
    let mut client = door.client();
    let port = free_port();
    let more = json!({
        "nics": [{"type": "default"}], "port": {port.to_string(): 80},
        "config": {"/www/index.html": "configured\n", "../../etc/hello": "hello from config\n"},
    });
    let uuid = client.value("kvm.create", create(&flist, "My VM", more.clone()));
    let uuid = uuid.as_str().unwrap().to_owned();
    let by = json!({"uuid": uuid});
    let got = client.value("kvm.get", by.clone());
    assert_eq!(got["params"]["port"], json!({port.to_string(): 80}));
    assert_eq!((&got["default_ip"], &got["id"]), (&json!("172.19.0.2"), &json!(2)));
    assert_eq!(got["params"]["nics"][0]["hwaddr"], "00:28:06:82:00:02");
    assert_eq!((&got["name"], &got["state"]), (&json!("My VM"), &json!("running")));
    assert_eq!(got["ifctargets"].as_array().unwrap().len(), 1, "{got}");
    let screen = got["vnc"].as_u64().unwrap();
    let mut greeting = [0; 12];
    TcpStream::connect(("127.0.0.1", screen as u16)).unwrap().read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"RFB 003.008\n");
    assert_eq!(client.value("kvm.get", json!({"name": "My VM"}))["uuid"], uuid.as_str());
    assert!(served(port).ends_with("configured\n"));
    let lodge = door.lab.json(&["ls"])[0]["name"].as_str().unwrap().to_owned();
    let seen = door.lab.console_text(&lodge);
    assert!(seen.contains("hello from config") && seen.contains("DHCP-GOT 172.19.0.2"), "{seen}");
    others_get_nothing(&mut client, &flist, more);
    let [info, statistics] = ports_come_and_go(&mut client, &uuid);
    assert_eq!(info["Vcpu"].as_array().unwrap().len(), 1);
    assert!(info["Vcpu"][0]["Time"].as_u64().unwrap() > 1_000_000, "{info}");
    let processor = &statistics["kvm.vcpu.time/My VM.0"];
    assert!(processor["last_value"].as_f64().unwrap() > 0.001, "{statistics}");
    assert_eq!(processor["tags"][2], json!({"key": "nr", "value": "0"}));
    let net = &statistics["kvm.net.rxbytes/My VM.00:28:06:82:00:02"];
    assert_eq!(net["tags"][2]["value"], info["Net"][0]["Name"]);
    assert!(info["Net"][0]["RxBytes"].as_u64().unwrap() > 0, "{info}");
    assert_eq!(statistics["kvm.cpu.time/My VM"]["op"], "D", "{statistics}");
    for (verb, state) in [("kvm.pause", "paused"), ("kvm.resume", "running")] {
        assert_eq!(client.value(verb, by.clone()), Value::Null);
        assert_eq!(client.value("kvm.get", by.clone())["state"], state);
    }
    door.restart();
    after_a_restart(&door, &flist, &uuid);
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
}

#[test]
fn disks_come_and_go_and_are_limited() {
    let door = Door::new("vnc_address = 'off'");
    let mut client = door.client();
    let file = |name: &str| {
        let path = door.lab.home().join(name);
        std::fs::write(&path, lodge_vm_tests::assets::boot_sector("GUEST-READY\r\n")).unwrap();
        format!("file://{}", path.display())
    };
    let (first, second) = (file("first.img"), file("second.img"));
    let tune = json!({"totaliopssecset": true, "totaliopssec": 500,
        "totaliopssecmaxset": true, "totaliopssecmax": 1000, "readbytessec": 7});
    let media = json!([{"url": first, "type": "disk", "iotune": tune}]);
    let uuid = client
        .value("kvm.create", json!({"name": "limited", "cpu": 1, "memory": 128, "media": media}));
    assert_eq!(client.value("kvm.get", json!({"uuid": uuid}))["vnc"], -1);
    // Each disk is told of, by its name.
    let mut told = Value::Null;
    door.lab.until("reads", || {
        told = client.value("kvm.info", json!({"uuid": uuid}))["Block"][0].clone();
        told["RdBytes"].as_u64().unwrap() > 0
    });
    assert_eq!(told["Name"], "vda");
    let held = |disk: usize| {
        let machine = door.lab.json(&["inspect", "limited"])["machine"].clone();
        machine["disks"][disk]["limits"].clone()
    };
    assert_eq!(held(0), json!({"operations": {"total": {"rate": 500, "burst": 1000}}}));
    let told = client.value("kvm.get", json!({"uuid": uuid}));
    assert_eq!(told["params"]["media"][0]["iotune"], tune);
    let limit = |url: &str| {
        json!({"uuid": uuid, "media": {"url": url}, "readbytessecset": true,
            "readbytessec": 1_000_000, "writebytessecset": false, "writebytessec": 5,
            "groupnameset": true, "groupname": "both"})
    };
    assert_eq!(client.value("kvm.limit_disk_io", limit(&first)), Value::Null);
    let wanted = json!({"bytes": {"read": {"rate": 1_000_000}}, "group": "both"});
    assert_eq!(held(0), wanted);
    let (_, why) = client.error("kvm.limit_disk_io", limit(&second));
    assert_eq!(why, "The disk you tried is not attached to the vm");
    let by = json!({"uuid": uuid, "media": {"url": second, "iotune": tune}});
    let (_, why) = client.error("kvm.detach_disk", by.clone());
    assert_eq!(why, "The disk you tried is not attached to the vm");
    assert_eq!(client.value("kvm.attach_disk", by.clone()), Value::Null);
    let (_, why) = client.error("kvm.attach_disk", by.clone());
    assert_eq!(why, "The disk you tried is already attached to the vm");
    assert_eq!(client.value("kvm.limit_disk_io", limit(&second)), Value::Null);
    assert_eq!(held(1), wanted);
    let lifted = json!({"uuid": uuid, "media": {"url": second}});
    assert_eq!(client.value("kvm.limit_disk_io", lifted), Value::Null);
    assert_eq!(held(1), Value::Null);
    let both = json!({"uuid": uuid, "media": {"url": first}, "totalbytessecset": true,
        "totalbytessec": 5, "readbytessecset": true, "readbytessec": 5});
    let (_, why) = client.error("kvm.limit_disk_io", both);
    assert!(why.contains("excludes"), "{why}");
}

/// Each keeps its own name, whichever others go and come.
#[test]
fn disks_are_not_taken_for_one_another() {
    let door = Door::new("");
    let flist = Flist::new(&door.lab, "a.flist", |_| {});
    let mut client = door.client();
    let file = |name: &str| {
        let path = door.lab.home().join(name);
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        (format!("file://{}", path.display().to_string().replace(' ', "%20")), path)
    };
    let [one, two, three] = ["one.img", "two of them.img", "three.img"].map(file);
    let media = json!([{"url": one.0, "type": "disk"}, {"url": two.0, "type": "disk"}]);
    let uuid = client.value("kvm.create", create(&flist, "many", json!({"media": media})));
    let of = |url: &str| json!({"uuid": uuid, "media": {"url": url}});
    let disks = || {
        let machine = door.lab.json(&["inspect", "many"])["machine"].clone();
        let disk = |disk: &Value| {
            let text = |key: &str| disk[key].as_str().unwrap().to_owned();
            let limited = disk["limits"] != Value::Null;
            (text("name"), std::path::PathBuf::from(text("source")), limited)
        };
        machine["disks"].as_array().unwrap().iter().map(disk).collect::<Vec<_>>()
    };
    let named =
        |name: &str, path: &std::path::Path, limited| (name.to_owned(), path.to_owned(), limited);
    // A guest that is still starting does not hear that something is to go.
    door.lab.until("the guest", || door.lab.console_text("many").contains("GUEST-READY"));
    client.value("kvm.detach_disk", of(&one.0));
    client.value("kvm.attach_disk", of(&three.0));
    let mut limit = of(&two.0);
    limit["totaliopssecset"] = json!(true);
    limit["totaliopssec"] = json!(100);
    client.value("kvm.limit_disk_io", limit);
    assert_eq!(disks(), [named("vdb", &two.1, true), named("vdc", &three.1, false)]);
    client.value("kvm.detach_disk", of(&two.0));
    client.value("kvm.attach_disk", of(&one.0));
    assert_eq!(disks(), [named("vdc", &three.1, false), named("vdb", &one.1, false)]);
    let media = client.value("kvm.get", json!({"uuid": uuid}))["params"]["media"].clone();
    assert_eq!(media[1], json!({"url": one.0, "type": "", "bus": ""}));
}

/// What the guest's web server answers behind a port of this host.
fn served(port: u16) -> String {
    let begun = std::time::Instant::now();
    loop {
        let mut text = String::new();
        if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) {
            let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
            let _ = stream.write_all(b"GET / HTTP/1.0\r\n\r\n");
            let _ = stream.read_to_string(&mut text);
        }
        if text.contains("\r\n\r\n") || begun.elapsed().as_secs() > 120 {
            return text;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Neither a name nor a port that is taken, and nothing happens to the one that has it.
fn others_get_nothing(client: &mut Client, flist: &Flist, more: Value) {
    let (code, why) = client.error("kvm.create", create(flist, "My VM", json!({})));
    assert!(code == 500 && why.starts_with("failed to create machine: "), "{why}");
    let (_, why) = client.error("kvm.create", create(flist, "other", more));
    assert!(why.starts_with("port already in use"), "{why}");
    assert_eq!(client.value("kvm.list", json!({})).as_array().unwrap().len(), 1);
}

/// While the machine runs. Returns what is said about it then.
fn ports_come_and_go(client: &mut Client, uuid: &str) -> [Value; 2] {
    let by = json!({"uuid": uuid});
    let second = free_port();
    let forward = |host: u16, guest: u16| json!({"uuid": uuid, "host_port": host.to_string(), "container_port": guest});
    client.value("kvm.portforward-add", forward(second, 80));
    assert!(served(second).ends_with("configured\n"));
    assert_eq!(client.value("kvm.get", by.clone())["params"]["port"][second.to_string()], 80);
    let (_, why) = client.error("kvm.portforward-add", forward(second, 80));
    assert!(why.starts_with("port already in use"), "{why}");
    let (_, why) = client.error("kvm.portforward-remove", forward(second, 81));
    assert_eq!(why, "permission denied");
    client.value("kvm.portforward-remove", forward(second, 80));
    assert!(TcpStream::connect(("127.0.0.1", second)).is_err());
    let (_, why) = client.error("kvm.portforward-remove", forward(second, 80));
    assert_eq!(why, format!("no port forwrard from host port: {second}"));
    // For some alone: those who are meant, and those who are not.
    let [near, far] =
        [("127.0.0.0/8", free_port()), ("10.99.0.1", free_port())].map(|(whom, port)| {
            let whole = format!("{whom}:{port}");
            let asked = json!({"uuid": uuid, "host_port": whole, "container_port": 80});
            client.value("kvm.portforward-add", asked.clone());
            (port, asked)
        });
    assert!(served(near.0).ends_with("configured\n"));
    let mut text = String::new();
    let mut stream = TcpStream::connect(("127.0.0.1", far.0)).unwrap();
    let _ = stream.write_all(b"GET / HTTP/1.0\r\n\r\n");
    let _ = stream.read_to_string(&mut text);
    assert_eq!(text, "");
    for (_, asked) in [near, far] {
        client.value("kvm.portforward-remove", asked);
    }
    let odd = json!({"uuid": uuid, "host_port": "1.2.3.4/50:80", "container_port": 80});
    let (_, why) = client.error("kvm.portforward-add", odd);
    assert!(why.contains("1.2.3.4/50"), "{why}");
    [client.value("kvm.info", by.clone()), client.value("kvm.infops", by)]
}

/// Disks are made and converted, and nothing that is there is lost.
#[test]
fn images_are_made_and_converted() {
    let door = Door::new("");
    let mut client = door.client();
    let path = |name: &str| door.lab.home().join(name).to_str().unwrap().to_owned();
    let info = |file: &str| -> Value {
        let output = command("qemu-img").args(["info", "--output=json", file]).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let make = |name: &str, format: &str, size: &str| json!({"file_name": path(name), "format": format, "size": size});
    assert_eq!(client.value("kvm.create-image", make("a.qcow2", "qcow2", "3G")), Value::Null);
    let made = info(&path("a.qcow2"));
    assert_eq!((&made["format"], &made["virtual-size"]), (&json!("qcow2"), &json!(3_u64 << 30)));
    assert_eq!(client.value("kvm.create-image", make("a.raw", "raw", "5M")), Value::Null);
    assert_eq!(std::fs::metadata(path("a.raw")).unwrap().len(), 5 << 20);
    for (arguments, words) in [
        (make("a.raw", "raw", "5M"), "exists"),
        (make("b", "vmdk", "5M"), "Unknown file format 'vmdk'"),
        (make("b", "raw", "much"), "Invalid image size"),
        (make("b", "raw", "0"), "Invalid image size"),
        (make("no/such/folder", "raw", "1M"), "No such file"),
        (json!({"file_name": "b", "format": "raw", "size": "1M"}), "whole path"),
    ] {
        let (_, why) = client.error("kvm.create-image", arguments);
        assert!(why.contains(words), "{why}");
    }
    // There and back: the bytes are the same, holes included.
    let bytes = [b"begin".to_vec(), vec![0; 3 << 20], b"end".to_vec(), vec![0; 509]].concat();
    std::fs::write(path("first"), &bytes).unwrap();
    let turn = |from: &str, to: &str, format: &str| json!({"input_file": path(from), "output_file": path(to), "output_format": format});
    assert_eq!(client.value("kvm.convert-image", turn("first", "second", "qcow2")), Value::Null);
    assert_eq!(info(&path("second"))["format"], "qcow2");
    assert_eq!(client.value("kvm.convert-image", turn("second", "third", "raw")), Value::Null);
    assert!(std::fs::read(path("third")).unwrap().starts_with(&bytes));
    // A layer would be read with a file that somebody else has named.
    let mut layered = command("qemu-img");
    layered.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/passwd"]);
    assert!(layered.arg(path("layer")).status().unwrap().success());
    for (arguments, words) in [
        (turn("layer", "out", "raw"), "layer above another image"),
        (turn("first", "second", "raw"), "exists"),
        (turn("nosuch", "out", "raw"), "No such file"),
        (turn("first", "out", "vdi"), "Unknown file format 'vdi'"),
    ] {
        let (_, why) = client.error("kvm.convert-image", arguments);
        assert!(why.contains(words), "{why}");
    }
    let left = std::fs::read_dir(door.lab.home()).unwrap().flatten();
    let left: Vec<_> =
        left.filter(|e| e.file_name().to_string_lossy().contains(".part-")).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Another daemon knows the machine all the same, and gives its number to nobody.
fn after_a_restart(door: &Door, flist: &Flist, uuid: &str) {
    let (by, mut client) = (json!({"uuid": uuid}), door.client());
    let got = client.value("kvm.get", by.clone());
    assert_eq!((&got["state"], &got["id"]), (&json!("running"), &json!(2)));
    let other = client.value("kvm.create", create(flist, "other", json!({})));
    let other = client.value("kvm.get", json!({"uuid": other}));
    assert_eq!(other["default_ip"], "172.19.0.3");
    let port = json!({"uuid": other["uuid"], "host_port": "1", "container_port": 1});
    let (_, why) = client.error("kvm.portforward-add", port);
    assert_eq!(why, "KVM doesn't have a default nic");
    // A guest that turns itself off is gone.
    door.lab.until("the guest", || door.lab.console_text("other").contains("GUEST-READY"));
    door.lab.type_and_see("other", "echo OFF-$?; sleep 1; poweroff -f\n", "OFF-0");
    door.lab.until("the end of the other", || {
        client.value("kvm.list", json!({})).as_array().unwrap().len() == 1
    });
    assert_eq!(client.value("kvm.destroy", by.clone()), Value::Null);
    for command in ["kvm.destroy", "kvm.info", "kvm.pause", "kvm.shutdown"] {
        let (code, why) = client.error(command, by.clone());
        assert_eq!((code, why), (500, format!("couldn't find domain with the uuid {uuid}")));
    }
    let (_, why) = client.error("kvm.get", by);
    assert!(why.starts_with("failed to lookup domain by uuid: "), "{why}");
    let (_, why) = client.error("kvm.get", json!({}));
    assert_eq!(why, "Must supply either Name or UUID");
}

#[test]
fn events_are_told_to_subscribers() {
    let door = Door::new("");
    let flist = Flist::new(&door.lab, "a.flist", |_| {});
    let (mut client, mut watcher) = (door.client(), door.client());
    watcher.hand_in(&json!({"id": "watch", "command": "core.subscribe",
                            "arguments": {"id": "kvm.events"}, "stream": true}));
    let uuid = client.value("kvm.create", create(&flist, "a", json!({})));
    client.value("kvm.pause", json!({"uuid": uuid}));
    client.value("kvm.destroy", json!({"uuid": uuid}));
    let mut seen: Vec<String> = Vec::new();
    while !seen.iter().any(|word| word == "undefined") {
        let Said::List(all) = watcher.say("BLPOP stream:watch 60") else { panic!("{seen:?}") };
        let Said::Bytes(record) = &all[1] else { panic!() };
        let record: Value = serde_json::from_slice(record).unwrap();
        assert_eq!(record["command"], "kvm.events");
        let event: Value =
            serde_json::from_str(record["message"]["message"].as_str().unwrap()).unwrap();
        assert_eq!((&event["uuid"], &event["name"]), (&uuid, &json!("a")));
        assert_eq!(event["sequence"], seen.len() + 1);
        seen.push(event["event"].as_str().unwrap().to_owned());
    }
    for word in ["defined", "started", "suspended", "stopped"] {
        assert!(seen.iter().any(|w| w == word), "{word}: {seen:?}");
    }
}

#[test]
fn what_cannot_be_made_is_said_in_the_words_of_that_system_cases_3_to_13() {
    let door = Door::new("");
    let flist = Flist::new(&door.lab, "a.flist", |root| {
        fs::remove_file(root.join("boot/boot.yaml")).unwrap();
        fs::rename(root.join("boot/vmlinuz"), root.join("boot/kernel")).unwrap();
    });
    let nginx = lodge_vm_tests::zero_os::Server::nginx(&flist.dir);
    let mut client = door.client();
    let url = |rest: &str| format!("http://127.0.0.1:{}/{rest}", nginx.port);
    let with = |more: Value| create(&flist, "a", more);
    for (arguments, code, why) in [
        (json!({"name": "a", "cpu": 1, "memory": 1}), 500, "At least one boot media"),
        (with(json!({"cpu": 0})), 500, "CPU is a required parameter"),
        (with(json!({"memory": 0})), 500, "Memory is a required parameter"),
        (
            with(json!({"mount": [{"source": "/tmp", "target": "root", "readonly": false}]})),
            500,
            "mount target 'root' is reserved",
        ),
        (with(json!({"nics": [{"type": "foo"}]})), 500, "invalid nic type 'foo'"),
        (with(json!({"nics": [{"type": "bridge", "id": "b"}]})), 400, "bridge 'b' not found"),
        (with(json!({"flist": url("none.flist")})), 500, "failed to download flist: 404 Not Found"),
        (with(json!({"flist": "ftp://x/y.flist"})), 500, "invalid flist url (ftp://x/y.flist)"),
        (with(json!({"flist": url("y.zip")})), 500, "unknown flist format .zip"),
        (with(json!({"flist": "file:///nowhere.flist"})), 500, "No such file"),
        (with(json!({})), 500, "failed to open boot/boot.yaml: "),
        (with(json!({"config": {"": "x"}})), 500, "path"),
        (with(json!({"config": {"/boot": "x"}})), 500, "it is there and is not a file"),
        (with(json!({"cpu": "two"})), 500, "invalid type"),
        (Value::Null, 500, "not an object"),
        (with(json!({"flist": null, "media": [{"url": "zdb://x:1"}]})), 500, "it has no size"),
        (with(json!({"flist": null, "media": [{"url": "/nowhere"}]})), 500, "/nowhere"),
    ] {
        let (got, said) = client.error("kvm.create", arguments.clone());
        assert!(
            said.starts_with(why) || !why.ends_with(' ') && said.contains(why),
            "{arguments}: {said}"
        );
        assert_eq!(got, code, "{said}");
    }
    assert_eq!(door.lab.json(&["ls", "-a"]), json!([]), "nothing is left");
    // The same with what was missing put in, over HTTP, boots: case 11.
    let yaml = "kernel: /boot/kernel\ncmdline: console=ttyS0 quiet cryptomgr.notests\n";
    let more = json!({"flist": url("a.flist"), "config": {"/boot/boot.yaml": yaml}});
    let uuid = client.value("kvm.create", with(more));
    door.lab.until("the guest", || door.lab.console_text("a").contains("GUEST-READY"));
    client.value("kvm.destroy", json!({"uuid": uuid}));
}

#[test]
fn members_of_an_organization_come_in_over_tls() {
    let lab = lodge_vm_tests::Lab::new();
    let at = |name: &str| lab.home().join(name);
    let openssl = |args: &[&str]| {
        let output = command("openssl").args(args).current_dir(lab.home()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    openssl(&["ecparam", "-name", "secp384r1", "-genkey", "-noout", "-out", "jwt.key"]);
    openssl(&["ec", "-in", "jwt.key", "-pubout", "-out", "jwt.pub"]);
    openssl(&[
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-keyout",
        "tls.key",
        "-out",
        "tls.crt",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]);
    let settings = format!(
        "organization = 'org'\ntoken_key = '{}'\n[zero_os.tls]\ncert = '{}'\nkey = '{}'",
        text(&at("jwt.pub")),
        text(&at("tls.crt")),
        text(&at("tls.key"))
    );
    let token = token(&at("jwt.key"));
    let crt = at("tls.crt");
    let door = Door::of(lab, &settings);
    let said = super::clients::run(
        "secured.py",
        "redis==7.1.0",
        &[&door.port.to_string(), &token],
        &[("SSL_CERT_FILE", text(&crt))],
    );
    assert!(said.contains("ALL FINE"), "{said}");
}

/// A token of a member, signed by openssl.
fn token(key: &std::path::Path) -> String {
    let script = r#"
import base64, json, subprocess, sys, time
b = lambda x: base64.urlsafe_b64encode(x).rstrip(b'=')
head = b(json.dumps({'alg': 'ES384', 'typ': 'JWT'}).encode())
body = b(json.dumps({'azp': 'org', 'exp': int(time.time()) + 600}).encode())
der = subprocess.run(['openssl', 'dgst', '-sha384', '-sign', sys.argv[1]],
                     input=head + b'.' + body, capture_output=True, check=True).stdout
def number(at):
    length = der[at + 1]
    return der[at + 2:at + 2 + length].lstrip(b'\0').rjust(48, b'\0'), at + 2 + length
at = 3 if der[1] == 0x81 else 2
r, at = number(at)
s, at = number(at)
print((head + b'.' + body + b'.' + b(r + s)).decode())
"#;
    let output = command("python3").args(["-c", script, text(key)]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn strangers_are_not_let_in_by_mistake() {
    let lab = lodge_vm_tests::Lab::new();
    let fails = |args: &[&str], why: &str| {
        let complaint = lab.fails(args);
        assert!(complaint.contains(why), "{complaint}");
    };
    fails(&["serve", "--metald", "off", "--zero-os", "0.0.0.0:1"], "is open to other hosts");
    fails(&["serve", "--metald", "off", "--zero-os", "nonsense"], "is not IP:PORT or off");
    fs::write(lab.home().join("lodge.toml"), "[zero_os]\norganization = 'x'\n").unwrap();
    fails(&["serve", "--metald", "off", "--zero-os", "127.0.0.1:1"], "go together");
}
