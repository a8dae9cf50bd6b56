//! What is decided before a call is one: content types, methods, paths, encodings, bytes.

use lodge_vm_tests::metald::Server;
use serde_json::json;

const JSON: &str = "Content-Type: application/json";
const SERVICE: &str = "/vmprovisioner.v1.VmService";

#[test]
fn case_01_the_first_line_of_the_guide_works_without_a_header() {
    let server = Server::new("");
    let body = json!({"config": server.good()}).to_string();
    for path in [SERVICE, "/metal.vmprovisioner.v1.VmService"] {
        let answer = server.curl(&format!("{path}/CreateVm"), &["-X", "POST"], body.as_bytes());
        assert_eq!(answer.status, 200, "{answer:?}");
        assert!(answer.head.contains("content-type: application/json"), "{}", answer.head);
        let value = answer.json();
        assert_eq!(value["state"], "VM_STATE_CREATED");
        // Case 26: what it is called.
        let id = value["vmId"].as_str().unwrap();
        assert!(id.len() == 19 && id.starts_with("ud-"), "{id}");
        assert!(id[3..].bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)), "{id}");
    }
    // A page in a browser says where it comes from, and is not listened to.
    let form = ["-X", "POST", "-H", "Origin: http://evil.example"];
    assert_eq!(server.curl(&format!("{SERVICE}/ListVms"), &form, b"{}").status, 415);
}

#[test]
fn case_02_the_second_line_means_what_it_says() {
    let server = Server::new("");
    let config = json!({
        "cpu": {"vcpu_count": 2}, "memory": {"size_bytes": 536_870_912},
        "boot": {"kernel_path": server.asset("vmlinux"), "kernel_args": "console=ttyS0"},
        "storage": [
            {"path": server.asset("rootfs.ext4"), "readonly": false, "is_root_device": true},
            {"path": server.asset("app.ext4"), "readonly": true},
        ],
    });
    let body = json!({"config": config}).to_string();
    let answer = server.curl(&format!("{SERVICE}/CreateVm"), &["-X", "POST"], body.as_bytes());
    let id = answer.json()["vmId"].as_str().unwrap().to_owned();
    let info = server.ok("GetVmInfo", json!({"vmId": id}));
    assert_eq!(info["config"]["storage"][1]["readOnly"], true);
    assert_eq!(info["config"]["storage"][0]["isRootDevice"], true);
    assert_eq!(info["config"]["storage"][0].get("readOnly"), None);
}

#[test]
fn cases_03_to_05_names_numbers_and_defaults() {
    let server = Server::new("");
    assert_eq!(server.call("ListVms", json!({})).body, b"{}");
    let id = server.create(|_| {});
    for key in ["vmId", "vm_id"] {
        let info = server.ok("GetVmInfo", json!({key: id}));
        assert_eq!(info["config"]["memory"]["sizeBytes"], "134217728");
        assert_eq!(info["state"], "VM_STATE_CREATED");
        let text = info.to_string();
        for zero in [":0", ":\"\"", ":false", ":[]", ":{}", "null"] {
            assert!(!text.contains(zero), "{zero} in {text}");
        }
    }
    let list = server.ok("ListVms", json!({}));
    assert_eq!(list["totalCount"], 1);
    let vm = &list["vms"][0];
    assert_eq!((&vm["vmId"], &vm["vcpuCount"]), (&json!(id), &json!(1)));
    assert_eq!(vm["memorySizeBytes"], "134217728");
    for moment in ["createdTimestamp", "modifiedTimestamp"] {
        let text = vm[moment].as_str().unwrap();
        assert!(text.len() == 10 && text.bytes().all(|b| b.is_ascii_digit()), "{text}");
    }
}

#[test]
fn cases_07_27_32_36_bytes_that_are_no_message() {
    let server = Server::new("auth = true\ndevelopment_tokens = true");
    for body in
        ["{\"config\":", "[]", "null", "{} x", "{\"config\":{\"cpu\":{\"vcpu_count\":2 // x\n}}}"]
    {
        let args = ["-X", "POST", "-H", JSON];
        let answer = server.curl(&format!("{SERVICE}/CreateVm"), &args, body.as_bytes());
        let (code, message) = answer.error();
        assert_eq!((answer.status, code.as_str()), (400, "invalid_argument"), "{body}");
        assert!(message.starts_with("unmarshal message:"), "{body}: {message}");
    }
    let empty = server.curl(&format!("{SERVICE}/CreateVm"), &["-X", "POST", "-H", JSON], b"");
    assert!(empty.error().1.starts_with("unmarshal message: zero-length payload"), "{empty:?}");
}

#[test]
fn case_19_methods_paths_and_content_types() {
    let server = Server::new("");
    let list = format!("{SERVICE}/ListVms");
    for verb in ["GET", "PUT", "OPTIONS", "DELETE"] {
        let answer = server.curl(&list, &["-X", verb], b"");
        assert_eq!(answer.status, 405, "{verb}");
        assert!(answer.head.contains("allow: post") && answer.body.is_empty());
    }
    for path in [&format!("{SERVICE}/NoSuch"), "/x", &format!("{list}/"), "/other.v1.S/ListVms"] {
        let answer = server.curl(path, &["-X", "POST", "-H", JSON], b"{}");
        assert_eq!(answer.status, 404, "{path}");
        assert_eq!(answer.body, b"404 page not found\n");
        assert!(answer.head.contains("content-type: text/plain; charset=utf-8"));
    }
    for kind in [
        "text/plain",
        "application/json; charset=latin1",
        "application/grpc-web-text",
        "application/connect+json",
        "application/connect+proto",
    ] {
        let header = format!("Content-Type: {kind}");
        let answer = server.curl(&list, &["-X", "POST", "-H", &header], b"{}");
        assert_eq!(answer.status, 415, "{kind}");
        assert!(answer.head.contains("accept-post: application/grpc, "), "{}", answer.head);
    }
    let header = "Content-Type: application/json; charset=utf-8";
    let answer = server.curl(&list, &["-X", "POST", "-H", header], b"{}");
    assert_eq!(answer.status, 200);
    assert!(answer.head.contains("content-type: application/json; charset=utf-8"));
    for (header, status, code, begins) in [
        (
            "Connect-Protocol-Version: 2",
            400,
            "invalid_argument",
            "Connect-Protocol-Version must be \"1\": got \"2\"",
        ),
        ("Connect-Timeout-Ms: soon", 400, "invalid_argument", "parse timeout:"),
        ("Connect-Timeout-Ms: 12345678901", 400, "invalid_argument", "parse timeout:"),
        (
            "Content-Encoding: br",
            501,
            "unimplemented",
            "unknown compression \"br\": supported encodings are gzip",
        ),
    ] {
        let answer = server.curl(&list, &["-X", "POST", "-H", JSON, "-H", header], b"{}");
        let (found, message) = answer.error();
        assert_eq!((answer.status, found.as_str()), (status, code), "{header}");
        assert!(message.starts_with(begins), "{header}: {message}");
    }
    let fine = [
        "-X",
        "POST",
        "-H",
        JSON,
        "-H",
        "Connect-Protocol-Version: 1",
        "-H",
        "Connect-Timeout-Ms: 5000",
    ];
    assert_eq!(server.curl(&list, &fine, b"{}").status, 200);
}

#[test]
fn case_20_binary_is_answered_in_binary_and_errors_in_json() {
    let server = Server::new("");
    let id = server.create(|_| {});
    let mut body = vec![0x0a, id.len() as u8];
    body.extend(id.bytes());
    let args = ["-X", "POST", "-H", "Content-Type: application/proto"];
    let path = format!("{SERVICE}/GetVmInfo");
    let answer = server.curl(&path, &args, &body);
    assert_eq!(answer.status, 200);
    assert!(answer.head.contains("content-type: application/proto"), "{}", answer.head);
    assert_eq!(answer.body[..body.len()], body[..]);
    let answer = server.curl(&path, &args, b"\xff\xff\xff");
    assert_eq!((answer.status, answer.error().0.as_str()), (400, "invalid_argument"));
    assert!(answer.head.contains("content-type: application/json"));
}

#[test]
fn cases_21_and_35_grpc_and_grpc_web_frames() {
    let server = Server::new("");
    let grpc = |path: &str, more: &[&str], body: &[u8]| {
        let mut args = vec!["-X", "POST", "-H", "TE: trailers"];
        args.extend(more);
        server.curl(&format!("{SERVICE}/{path}"), &args, body)
    };
    let h2 = ["--http2-prior-knowledge", "-H", "Content-Type: application/grpc"];
    let answer = grpc("PauseVm", &h2, b"\0\0\0\0\x06\x0a\x04nope");
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(answer.head.contains("grpc-status: 5"), "{}", answer.head);
    let web = ["-H", "Content-Type: application/grpc-web+proto"];
    let answer = grpc("ListVms", &web, b"\0\0\0\0\0");
    assert_eq!(answer.status, 200);
    assert_eq!(answer.body[..5], [0, 0, 0, 0, 0]);
    assert_eq!(answer.body[5], 0x80);
    let trailer = String::from_utf8_lossy(&answer.body[10..]).to_lowercase();
    assert!(trailer.contains("grpc-status: 0") || trailer.contains("grpc-status:0"), "{trailer}");
}

#[test]
fn bodies_beyond_the_limit_are_refused_in_every_protocol() {
    let server = Server::new("");
    let large = vec![b' '; (4 << 20) + 10];
    let list = format!("{SERVICE}/ListVms");
    let answer = server.curl(&list, &["-X", "POST", "-H", JSON], &large);
    assert_eq!((answer.status, answer.error().0.as_str()), (429, "resource_exhausted"));
    let mut frame = vec![0];
    frame.extend(u32::try_from(large.len()).unwrap().to_be_bytes());
    frame.extend(&large);
    let args = ["-X", "POST", "--http2-prior-knowledge", "-H", "Content-Type: application/grpc"];
    let answer = server.curl(&list, &args, &frame);
    assert!(answer.head.contains("grpc-status: 8"), "{}", answer.head);
    // Gzip is understood both ways, and what it unpacks to counts.
    let zip = |bytes: &[u8]| {
        use std::io::Write;
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    };
    let args = ["-X", "POST", "-H", JSON, "-H", "Content-Encoding: gzip"];
    assert_eq!(server.curl(&list, &args, &zip(b"{}")).status, 200);
    let answer = server.curl(&list, &args, &zip(&large));
    assert_eq!(answer.error().0, "resource_exhausted");
    // Deep nesting is refused, not followed.
    let deep = format!("{{\"x\":{}", "[".repeat(100_000));
    let answer = server.curl(&list, &["-X", "POST", "-H", JSON], deep.as_bytes());
    assert_eq!(answer.error().0, "invalid_argument");
    assert_eq!(server.call("ListVms", json!({})).status, 200);
}

#[test]
fn case_25_health_and_metrics() {
    let server = Server::new("");
    let answer = server.curl("/health", &[], b"");
    assert_eq!((answer.status, answer.json()["status"].as_str()), (200, Some("ok")));
    let up = || server.curl("/_/health", &[], b"");
    server.lab.until("health", || up().status == 200);
    assert_eq!(up().json()["backend"]["type"], "qemu");
    server.call("ListVms", json!({}));
    let text = String::from_utf8(server.curl("/metrics", &[], b"").body).unwrap();
    assert!(text.contains("rpc_server_requests_total{rpc_method=\"ListVms\",rpc_status=\"ok\"}"));
    assert!(text.ends_with("# EOF\n"));
}
