//! The real Python client, over the versions of its library that people have.

use std::path::{Path, PathBuf};

use lodge_vm_tests::assets::cache;
use lodge_vm_tests::lab::command;
use lodge_vm_tests::zero_os::{Door, Flist};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/zero-os").canonicalize().unwrap()
}

/// Runs one of our programs in an environment with the client and one version of its library.
pub(super) fn run(
    program: &str,
    library: &str,
    args: &[&str],
    variables: &[(&str, &str)],
) -> String {
    static MAKING: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let one = MAKING.lock().unwrap_or_else(|e| e.into_inner());
    let list = std::fs::read_to_string(folder().join("requirements.txt")).unwrap();
    let packages: Vec<&str> = list.lines().chain([library]).collect();
    let key = packages.join("-").replace(['=', '.'], "_");
    let dir = cache().join(format!("zero-os-{key}"));
    let must = |output: std::io::Result<std::process::Output>| {
        let output = output.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{program} with {library}: {out}\n{err}");
        out
    };
    if !dir.join("done").exists() {
        let _ = std::fs::remove_dir_all(&dir);
        must(command("python3").args(["-m", "venv"]).arg(&dir).output());
        // Only the client itself is a version before the first.
        let pip = |args: &[&str]| must(command(dir.join("bin/pip")).args(args).output());
        pip(&[&["install", "-q", "--no-deps"], &packages[..]].concat());
        std::fs::write(dir.join("done"), "").unwrap();
    }
    drop(one);
    let mut python = command(dir.join("bin/python"));
    python.arg(folder().join(program)).args(args).envs(variables.iter().copied());
    must(python.output())
}

#[test]
fn every_version_of_the_library_is_served_case_37() {
    let door = Door::new("");
    let flist = Flist::new(&door.lab, "a.flist", |_| {});
    let port = door.port.to_string();
    for library in ["redis==2.10.6", "redis==5.0.8", "redis==7.1.0", "redis==8.1.0"] {
        let free = lodge_vm_tests::zero_os::free_port().to_string();
        let args = [&*port, flist.path(), &*flist.store, &*free];
        let said = run("client.py", library, &args, &[]);
        assert!(said.contains("ALL FINE"), "{library}: {said}");
    }
}
