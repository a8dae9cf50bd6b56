//! The real Python client, over the versions of its library that people have.

use std::path::{Path, PathBuf};

use lodge_vm_tests::lab::command;
use lodge_vm_tests::python::{environment, must};
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
