//! The daemon as a service: its manager, its settings, its collector, its certificates.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::process::Stdio;

use lodge_vm_tests::keys::{authority, signed};
use lodge_vm_tests::lab::command;
use lodge_vm_tests::metald::Server;
use lodge_vm_tests::{Lab, need};
use serde_json::{Value, json};

#[test]
fn the_service_manager_is_told_and_gives_the_socket() {
    let lab = Lab::new();
    let told = lab.home().join("notify");
    let manager = UnixDatagram::bind(&told).unwrap();
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    let script = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" serve 3<&0 </dev/null";
    let mut serve = command("sh");
    serve.args(["-c", script]).arg(lodge_vm_tests::lab::program());
    serve.env("LODGE_HOME", lab.home()).env("NOTIFY_SOCKET", &told);
    serve.stdin(Stdio::from(std::os::fd::OwnedFd::from(socket))).stderr(Stdio::null());
    let child = serve.stdout(Stdio::null()).spawn().unwrap();
    let mut said = [0; 64];
    let count = manager.recv(&mut said).unwrap();
    assert_eq!(&said[..count], b"READY=1");
    let curl = command("curl").arg(format!("http://127.0.0.1:{port}/health")).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&curl.stdout), r#"{"status":"ok"}"#);
    lodge_vm_tests::lab::end(child);
    lab.ok(&["ls"]);
}

#[test]
fn settings_are_read_again_and_mistakes_change_nothing() {
    let server = Server::new("");
    assert_eq!(server.call("ListVms", json!({})).status, 200);
    let file = server.lab.home().join("lodge.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{text}auth = true\ndevelopment_tokens = true\n")).unwrap();
    lodge_vm_tests::lab::kill(server.lab.daemon(), 1);
    server.lab.until("the settings", || server.call("ListVms", json!({})).status == 401);
    std::fs::write(&file, "[metald]\nauth = perhaps\n").unwrap();
    lodge_vm_tests::lab::kill(server.lab.daemon(), 1);
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert_eq!(server.call("ListVms", json!({})).status, 401);
    let token = Some("Bearer dev_customer_a");
    assert_eq!(server.call_as("ListVms", json!({}), token).status, 200);
}

/// What a collector is sent, request by request.
fn collect(listener: &TcpListener) -> Value {
    let (mut stream, _) = listener.accept().unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut length = 0;
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert_eq!(line, "POST /v1/traces HTTP/1.1\r\n");
    while line != "\r\n" {
        line.clear();
        reader.read_line(&mut line).unwrap();
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").unwrap();
    serde_json::from_slice(&body).unwrap()
}

#[test]
fn calls_are_traced_where_somebody_collects() {
    let collector = TcpListener::bind("127.0.0.1:0").unwrap();
    let settings = format!("[metald.traces]\nendpoint = '{}'\n", collector.local_addr().unwrap());
    let server = Server::new(&settings);
    let parent = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let args = ["-X", "POST", "-H", "Content-Type: application/json", "-H", parent];
    let path = "/vmprovisioner.v1.VmService/BootVm";
    assert_eq!(server.curl(path, &args, br#"{"vm_id":"nope"}"#).status, 404);
    let told = collect(&collector);
    let span = &told["resourceSpans"][0]["scopeSpans"][0]["spans"][0];
    assert_eq!(span["traceId"], "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(span["name"], "vmprovisioner.v1.VmService/BootVm");
    assert_eq!(span["status"], json!({"code": 2, "message": "VM not found: nope"}));
}

#[test]
fn certificates_on_both_sides() {
    need!(command("openssl").arg("version").output().is_ok(), "openssl");
    let keys = tempfile::tempdir().unwrap();
    let [ca, other] = ["ca", "other"].map(|name| authority(keys.path(), name));
    for (by, name) in [(&ca, "server"), (&ca, "client"), (&other, "stranger")] {
        signed(by, keys.path(), name);
    }
    let at = |name: &str| keys.path().join(name).to_string_lossy().into_owned();
    let settings = format!(
        "[metald.tls]\ncert = '{}'\nkey = '{}'\nclient_ca = '{}'\n",
        at("server.pem"),
        at("server.key"),
        at("ca.pem")
    );
    let server = Server::new(&settings);
    let ask = |who: &str, version: &str| {
        let mut curl = command("curl");
        curl.args(["-s", version, "--cacert", &at("ca.pem"), "-X", "POST", "-d", "{}"]);
        if !who.is_empty() {
            curl.args(["--cert", &at(&format!("{who}.pem")), "--key", &at(&format!("{who}.key"))]);
        }
        let url = format!("https://127.0.0.1:{}/vmprovisioner.v1.VmService/ListVms", server.port);
        let output = curl.args(["-w", "%{http_version}"]).arg(url).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    assert_eq!(ask("client", "--http2"), (true, "{}2".into()));
    assert_eq!(ask("client", "--http1.1"), (true, "{}1.1".into()));
    assert!(!ask("stranger", "--http2").0);
    assert!(!ask("", "--http2").0);
}
