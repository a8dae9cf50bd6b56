//! Who sees what.

use lodge_vm_tests::metald::Server;
use serde_json::json;

#[test]
fn cases_22_to_24_callers_and_what_is_theirs() {
    let settings = "auth = true\ndevelopment_tokens = true\nforeign = 'permission_denied'\n\
        [[metald.token]]\nsha256 = '2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b'\n\
        customer = 'a'\n[metald.quota.a]\nvms = 2\n[metald.quota.c]\nvcpus = 2\nmemory = '300MiB'\n";
    let server = Server::new(settings);
    for (token, message) in [
        (None, "authorization header required"),
        (Some("Basic x"), "authorization must be 'Bearer <token>'"),
        (
            Some("Bearer zzz"),
            "invalid token format - use 'dev_customer_<customer_id>' for development",
        ),
        (Some("Bearer dev_customer_"), "invalid development token format"),
    ] {
        let answer = server.call_as("ListVms", json!({}), token);
        assert_eq!(answer.status, 401);
        assert_eq!(answer.error(), ("unauthenticated".into(), message.into()));
    }
    let (a, b, c) =
        (Some("Bearer secret"), Some("Bearer dev_customer_b"), Some("Bearer dev_customer_c"));
    let good = json!({"config": server.good()});
    let made = server.call_as("CreateVm", good.clone(), a);
    let id = made.json()["vmId"].as_str().unwrap().to_owned();
    for method in ["GetVmInfo", "BootVm", "DeleteVm"] {
        let answer = server.call_as(method, json!({"vm_id": id}), b);
        assert_eq!(answer.status, 403);
        assert_eq!(answer.error().1, "access denied: VM not owned by customer");
    }
    assert_eq!(server.call_as("ListVms", json!({}), b).body, b"{}");
    let list = server.call_as("ListVms", json!({}), Some("Bearer dev_customer_a")).json();
    assert_eq!(list["vms"][0]["customerId"], "a");
    let mut other = good.clone();
    other["customer_id"] = json!("b");
    let answer = server.call_as("CreateVm", other, a);
    assert_eq!((answer.status, answer.error().1.as_str()), (403, "customer_id mismatch"));
    // Quotas, of machines and of what they have.
    assert_eq!(server.call_as("CreateVm", good.clone(), a).status, 200);
    let answer = server.call_as("CreateVm", good.clone(), a);
    assert_eq!((answer.status, answer.error().0.as_str()), (429, "resource_exhausted"));
    for status in [200, 200, 429] {
        assert_eq!(server.call_as("CreateVm", good.clone(), c).status, status);
    }
    let metrics = server.curl("/metrics", &[], b"");
    assert_eq!(metrics.status, 401);
    // Who did what is written down, tokens are not.
    let audit = std::fs::read_to_string(server.lab.home().join("audit.jsonl")).unwrap();
    assert!(
        audit.contains("\"customer\":\"a\"") && audit.contains("\"call\":\"CreateVm\""),
        "{audit}"
    );
    assert!(audit.contains("permission_denied") && !audit.contains("secret"), "{audit}");
    assert!(!audit.contains("ListVms"));
}

#[test]
fn somebody_elses_machine_is_none_by_default() {
    let server = Server::new("auth = true\ndevelopment_tokens = true");
    let good = json!({"config": server.good(), "vm_id": "mine_1"});
    let made = server.call_as("CreateVm", good.clone(), Some("Bearer dev_customer_a"));
    assert_eq!(made.json()["vmId"], "mine_1");
    let answer =
        server.call_as("GetVmInfo", json!({"vm_id": "mine_1"}), Some("Bearer dev_customer_b"));
    assert_eq!(answer.status, 404);
    assert_eq!(answer.error().1, "VM not found: mine_1");
    let again = server.call_as("CreateVm", good, Some("Bearer dev_customer_a"));
    assert_eq!((again.status, again.error().0.as_str()), (409, "already_exists"));
    for bad in ["-x", "a b", "../x"] {
        let body = json!({"config": server.good(), "vm_id": bad});
        assert_eq!(server.call_as("CreateVm", body, Some("Bearer dev_customer_a")).status, 400);
    }
}

#[test]
fn case_37_a_wrong_setting_ends_the_daemon_by_name() {
    let lab = lodge_vm_tests::Lab::new();
    let refused = |name: &str, value: &str| {
        let output = lab.command(&["serve"]).env(name, value).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(name), "{said}");
    };
    refused("UNKEY_METALD_BACKEND", "xen");
    refused("UNKEY_METALD_PORT", "eighty");
    let said = lab.fails(&["serve", "--metald", "0.0.0.0:0"]);
    assert!(said.contains("open to other hosts"), "{said}");
    // Two doors on one port: the second names the first.
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = holder.local_addr().unwrap().to_string();
    let said = lab.fails(&["serve", "--metald", &at]);
    assert!(said.contains("already in use by"), "{said}");
    lab.ok(&["ls"]);
}
