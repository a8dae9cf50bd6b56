//! Many at once, slowly, half, and through crashes.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use lodge_vm_tests::metald::Server;
use serde_json::{Value, json};

/// One call on a connection of its own, without a process for it.
fn post(port: u16, method: &str, body: &Value) -> std::io::Result<(u16, Value)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(170)))?;
    let body = body.to_string();
    write!(
        stream,
        "POST /vmprovisioner.v1.VmService/{method} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
         Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let status = text.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    // Small answers come in one chunk.
    let begin = text.find('{').unwrap_or(text.len());
    let end = text.rfind('}').map_or(begin, |at| at + 1);
    Ok((status, serde_json::from_str(&text[begin..end]).unwrap_or_default()))
}

#[test]
fn case_41_many_lives_at_once() {
    let server = Server::new("");
    // A kernel that panics at once keeps the processor free for the others.
    let port = server.port;
    let config = server.good();
    let one = |customer: usize| -> Result<String, String> {
        let body = json!({"config": config, "customer_id": format!("c{customer}")});
        let (status, made) = post(port, "CreateVm", &body).map_err(|e| e.to_string())?;
        let id = made["vmId"].as_str().ok_or(format!("{status} {made}"))?.to_owned();
        for (method, body) in [
            ("BootVm", json!({"vm_id": id})),
            ("ShutdownVm", json!({"vm_id": id, "force": true})),
            ("DeleteVm", json!({"vm_id": id})),
        ] {
            let (status, said) = post(port, method, &body).map_err(|e| e.to_string())?;
            if status != 200 {
                return Err(format!("{method} {id}: {status} {said}"));
            }
        }
        Ok(id)
    };
    let mut ids: Vec<String> = std::thread::scope(|scope| {
        let lives: Vec<_> = (0..200).map(|i| scope.spawn(move || one(i % 5))).collect();
        lives.into_iter().map(|life| life.join().unwrap().unwrap()).collect()
    });
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 200);
    assert_eq!(server.call("ListVms", json!({})).body, b"{}");
    assert!(server.lab.ok(&["gc", "--dry-run"]).contains("nothing to remove"));
}

#[test]
fn a_thousand_creations_survive_a_daemon_that_is_killed() {
    let mut server = Server::new("");
    let config = server.good();
    let (mut promised, mut deleted) = (Vec::new(), Vec::new());
    // The first look at the host takes longer than the daemons of this test live.
    server.create(|_| {});
    for round in 0..5 {
        let port = server.port;
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let config = config.clone();
                std::thread::spawn(move || {
                    let (mut made, mut gone) = (Vec::new(), Vec::new());
                    for i in 0..50 {
                        let id = format!("r{round}-t{thread}-{i}");
                        let body = json!({"config": config, "vm_id": id});
                        let Ok((status, _)) = post(port, "CreateVm", &body) else {
                            // The daemon is away for a moment.
                            std::thread::sleep(Duration::from_millis(10));
                            continue;
                        };
                        if status != 200 {
                            continue;
                        }
                        if i % 3 != 0 {
                            made.push(id);
                        } else if let Ok((200, _)) = post(port, "DeleteVm", &json!({"vm_id": id})) {
                            gone.push(id);
                        }
                    }
                    (made, gone)
                })
            })
            .collect();
        // Killed in the middle, at a moment that differs from round to round.
        std::thread::sleep(Duration::from_millis(60 + 70 * round));
        server.restart();
        for thread in threads {
            let (made, gone) = thread.join().unwrap();
            promised.extend(made);
            deleted.extend(gone);
        }
    }
    let mut listed = Vec::new();
    let mut token = String::new();
    loop {
        let page = server.ok("ListVms", json!({"page_size": 1000, "page_token": token}));
        let vms = page["vms"].as_array().cloned().unwrap_or_default();
        listed.extend(vms.iter().map(|vm| vm["vmId"].as_str().unwrap().to_owned()));
        match page["nextPageToken"].as_str() {
            Some(next) => token = next.to_owned(),
            None => break,
        }
    }
    assert!(promised.len() > 100, "{}", promised.len());
    for id in &promised {
        assert!(listed.contains(id), "{id} was promised and is lost");
    }
    for id in &deleted {
        assert!(!listed.contains(id), "{id} was deleted and is back");
    }
    assert!(server.lab.ok(&["gc", "--dry-run"]).contains("nothing to remove"));
}

/// The store lies on a file system of its own, which is full for a while.
#[test]
fn case_40_what_cannot_be_kept_is_not_there() {
    use lodge_vm_tests::lab::command;
    let store = tempfile::tempdir().unwrap();
    let mounted =
        command("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(store.path()).status();
    assert!(mounted.unwrap().success());
    {
        let lab = lodge_vm_tests::Lab::new();
        let database = lab.home().join("lodge.db");
        std::os::unix::fs::symlink(store.path().join("lodge.db"), database).unwrap();
        let server = Server::of(lab, "");
        let kept = server.create(|_| {});
        let filler = store.path().join("filler");
        let _ = std::fs::write(&filler, vec![1; 2 << 20]);
        let config = server.good();
        let mut refused = 0;
        // What has room already is still taken; then nothing more.
        for _ in 0..200 {
            let answer = server.call("CreateVm", json!({"config": config}));
            if answer.status != 200 {
                assert_eq!(answer.error().0, "internal");
                refused += 1;
            }
            if refused == 3 {
                break;
            }
        }
        assert_eq!(refused, 3);
        let count = || server.ok("ListVms", json!({"page_size": 1000}))["totalCount"].clone();
        let before = count();
        std::fs::remove_file(filler).unwrap();
        server.create(|_| {});
        assert_eq!(count(), json!(before.as_u64().unwrap() + 1));
        assert_eq!(server.state(&kept), "VM_STATE_CREATED");
        assert!(server.lab.ok(&["gc", "--dry-run"]).contains("nothing to remove"));
    }
    let unmounted = command("umount").arg(store.path()).status();
    assert!(unmounted.unwrap().success());
}

#[test]
fn slow_and_half_clients_hold_nobody_up() {
    let server = Server::new("");
    let connect = || TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    let mut slow: Vec<TcpStream> = (0..500).map(|_| connect()).collect();
    for (i, stream) in slow.iter_mut().enumerate() {
        let start: &[u8] = match i % 3 {
            0 => b"POST /vmprovisioner.v1.VmService/ListVms HTTP/1.1\r\nHost: x\r\nX-Slow: ",
            1 => b"POST /vmprovisioner.v1.VmService/ListVms HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
            _ => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        };
        stream.write_all(start).unwrap();
    }
    for stream in slow.iter().step_by(2) {
        stream.shutdown(std::net::Shutdown::Write).unwrap();
    }
    for _ in 0..20 {
        let (status, _) = post(server.port, "ListVms", &json!({})).unwrap();
        assert_eq!(status, 200);
    }
    drop(slow);
    assert_eq!(server.call("ListVms", json!({})).status, 200);
}
