//! The real client libraries, each in its own language.

use lodge_vm_tests::assets::cache;
use lodge_vm_tests::lab::command;
use lodge_vm_tests::metald::Server;
use lodge_vm_tests::need;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn must(output: std::process::Output, what: &str) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{what}: {out}\n{err}");
    out
}

/// A folder with the client's packages, made once for each list of them.
fn prepared(name: &str, list: &str, make: impl FnOnce(&Path)) -> PathBuf {
    use sha2::Digest;
    static MAKING: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one = MAKING.lock().unwrap_or_else(|e| e.into_inner());
    let key: String =
        sha2::Sha256::digest(list).iter().take(6).map(|b| format!("{b:02x}")).collect();
    let dir = cache().join(format!("{name}-{key}"));
    if !dir.join("done").exists() {
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        make(&dir);
        std::fs::write(dir.join("done"), "").unwrap();
    }
    dir
}

#[test]
fn grpcio_and_connectrpc_in_python() {
    let requirements = include_str!("../../../clients/python/requirements.txt");
    let dir = prepared("python", requirements, |dir| {
        let venv = command("python3").args(["-m", "venv"]).arg(dir.join("venv")).output();
        must(venv.unwrap(), "venv");
        let list = root().join("tests/vm/clients/python/requirements.txt");
        let pip =
            command(dir.join("venv/bin/pip")).args(["install", "-q", "-r"]).arg(list).output();
        must(pip.unwrap(), "pip");
    });
    let server = Server::new("");
    let output = command(dir.join("venv/bin/python"))
        .arg(root().join("tests/vm/clients/python/client.py"))
        .arg(server.url(""))
        .arg(root().join("crates/doors/proto"))
        .arg(server.good().to_string())
        .output();
    let said = must(output.unwrap(), "python");
    assert!(said.contains("ALL FINE"), "{said}");
}

#[test]
fn connect_node() {
    need!(command("node").arg("--version").output().is_ok(), "nodejs and npm");
    let manifest = include_str!("../../../clients/node/package.json");
    let dir = prepared("node", manifest, |dir| {
        std::fs::write(dir.join("package.json"), manifest).unwrap();
        let npm =
            command("npm").args(["install", "--silent", "--no-audit"]).current_dir(dir).output();
        must(npm.unwrap(), "npm");
    });
    let server = Server::new("");
    // Modules are looked for beside the program that asks for them.
    let program = server.lab.home().join("client.mjs");
    std::fs::copy(root().join("tests/vm/clients/node/client.mjs"), &program).unwrap();
    std::os::unix::fs::symlink(dir.join("node_modules"), server.lab.home().join("node_modules"))
        .unwrap();
    let generated = server.lab.home().join("gen");
    std::fs::create_dir(&generated).unwrap();
    let proto = root().join("crates/doors/proto");
    let made = command("protoc")
        .arg(format!("--plugin={}", dir.join("node_modules/.bin/protoc-gen-es").display()))
        .args(["--es_opt=target=js,import_extension=js", "-I"])
        .arg(&proto)
        .arg(format!("--es_out={}", generated.display()))
        .args(["vmprovisioner/v1/vm.proto", "lodge/v1/watch.proto"])
        .output();
    must(made.unwrap(), "protoc");
    let output =
        command("node").arg(program).arg(server.url("")).arg(server.good().to_string()).output();
    let said = must(output.unwrap(), "node");
    assert!(said.contains("ALL FINE"), "{said}");
}
