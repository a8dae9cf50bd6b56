//! The kernel: built from Debian's source, once; configurations of others take new symbols by
//! themselves; archives are what is recorded of them.

use std::fs;

use lodge_vm_tests::lab::command;
use lodge_vm_tests::xcluster::{Xc, at_kernels, kernel};

#[test]
fn a_kernel_is_built_once_and_knows_its_modules() {
    let (kernel, objects) = kernel();
    let again = at_kernels(&["kernel_build"], &[]);
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(again.status.success() && said.contains("built before"), "{said}");
    assert!(kernel.with_file_name("bzImage").is_file());
    let modules = objects.join("modules/lib/modules");
    let version = fs::read_dir(modules).unwrap().next().unwrap().unwrap().path();
    assert!(fs::read_to_string(version.join("modules.dep")).unwrap().contains("dummy.ko"));
}

#[test]
fn case_20_new_symbols_take_their_defaults_and_are_told() {
    let (_, objects) = kernel();
    let config = fs::read_to_string(objects.join("modules/../config")).unwrap_or_default();
    let config = if config.is_empty() {
        fs::read_to_string(objects.join(".config")).unwrap()
    } else {
        config
    };
    // A symbol that the configuration has never heard of; its default is what it was.
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("config");
    let line = "# CONFIG_BONDING is not set\n";
    assert!(config.contains(line));
    fs::write(&own, config.replace(line, "")).unwrap();
    let built = at_kernels(&["kernel_build"], &[("__kcfg", own.to_str().unwrap())]);
    let said = String::from_utf8_lossy(&built.stderr).into_owned();
    assert!(built.status.success(), "{said}");
    assert!(said.contains("1 new symbols take their defaults:\n  CONFIG_BONDING=n"), "{said}");
    assert!(said.contains("built before"), "{said}");
}

#[test]
fn cases_17_to_19_what_is_missing_or_wrong_is_refused_before_anything_is_made() {
    let mut xc = Xc::bare();
    let absent = xc.fails(&["kernel_build", "--kver=linux-9.9.9"]);
    assert!(absent.starts_with("ERROR: Kernel archive not found ["), "{absent}");
    let config = xc.fails(&["kernel_build", "--kcfg=/nowhere/config"]);
    assert!(config.starts_with("ERROR: Kernel config not found [/nowhere/config]"), "{config}");
    let menu = xc.fails(&["kernel_build", "--menuconfig"]);
    assert!(menu.contains("--menuconfig needs a terminal"), "{menu}");
    let archive = xc.path("archive");
    fs::create_dir_all(&archive).unwrap();
    xc.set("ARCHIVE", archive.to_str().unwrap());
    fs::write(archive.join("linux-9.9.9.tar.xz"), "<html>404</html>").unwrap();
    let page = xc.fails(&["kernel_build", "--kver=linux-9.9.9"]);
    assert!(page.contains("not an archive"), "{page}");
    let sums = format!("{}  linux-9.9.9.tar.xz\n", "0".repeat(64));
    fs::write(archive.join("SHA256SUMS"), sums).unwrap();
    let wrong = xc.fails(&["kernel_build", "--kver=linux-9.9.9"]);
    assert!(wrong.contains("Archive checksum mismatch [linux-9.9.9.tar.xz]"), "{wrong}");
    assert!(wrong.contains("expected 0000") && wrong.contains("found    "), "{wrong}");
    // Nothing was unpacked, and nothing is there by halves.
    assert!(!xc.path("ws/linux/linux-9.9.9").exists());
}

#[test]
fn a_kernel_is_given_in_the_form_that_a_hypervisor_takes() {
    kernel();
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("vmlinux");
    let home = lodge_vm_tests::assets::cache().join("kernels");
    // The same build serves both doors.
    let work = home.join("home/cache/kernel-build/sources");
    fs::create_dir_all(&work).unwrap();
    let _ = std::os::unix::fs::symlink(home.join("ws/linux/linux-6.1"), work.join("linux-6.1"));
    let output = command(lodge_vm_tests::lab::program())
        .args(["kernel", "build", "--for", "firecracker", "--to"])
        .arg(&at)
        .env("LODGE_HOME", home.join("home"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(fs::read(&at).unwrap().starts_with(b"\x7fELF"));
}
