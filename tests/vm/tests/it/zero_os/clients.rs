//! The real Python client, over the versions of its library that people have.

use std::path::{Path, PathBuf};

use lodge_vm_tests::assets::cache;
use lodge_vm_tests::lab::command;
use lodge_vm_tests::zero_os::{Door, Flist};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/zero-os").canonicalize().unwrap()
}

fn must(output: std::io::Result<std::process::Output>) -> String {
    let output = output.unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    out
}

/// A Python environment with these packages, made once. `alone`: without what they ask for.
pub(super) fn environment(packages: &[&str], alone: bool) -> PathBuf {
    static MAKING: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one = MAKING.lock().unwrap_or_else(|e| e.into_inner());
    let key = packages.join("-").replace(['=', '.', '[', ']'], "_");
    let dir = cache().join(format!("zero-os-{key}"));
    if !dir.join("done").exists() {
        let _ = std::fs::remove_dir_all(&dir);
        must(command("python3").args(["-m", "venv"]).arg(&dir).output());
        let mut pip = command(dir.join("bin/pip"));
        pip.args(["install", "-q"]).args(alone.then_some("--no-deps")).args(packages);
        must(pip.output());
        std::fs::write(dir.join("done"), "").unwrap();
    }
    dir
}

/// Runs one of our programs in an environment with the client and one version of its library.
pub(super) fn run(
    program: &str,
    library: &str,
    args: &[&str],
    variables: &[(&str, &str)],
) -> String {
    let list = std::fs::read_to_string(folder().join("requirements.txt")).unwrap();
    let packages: Vec<&str> = list.lines().chain([library]).collect();
    let mut python = command(environment(&packages, true).join("bin/python"));
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
