//! The kernel: built from Debian's source, once; configurations of others take new symbols by
//! themselves; archives are what is recorded of them.

use std::fs;
use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use lodge_vm_tests::lab::{command, program};
use lodge_vm_tests::xcluster::{Xc, at_kernels, kernel, kernel_variables};

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
    let config = fs::read_to_string(objects.join("modules/../config")).unwrap();
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
    let output = command(program())
        .args(["kernel", "build", "--for", "firecracker", "--to"])
        .arg(&at)
        .env("LODGE_HOME", home.join("home"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(fs::read(&at).unwrap().starts_with(b"\x7fELF"));
}

/// A program of pages and keys; it ends with this.
struct Pages {
    child: Child,
    keys: ChildStdin,
    shown: Receiver<Vec<u8>>,
    seen: String,
}

impl Pages {
    /// Presses keys and waits for what they lead to.
    fn press(&mut self, keys: &str, until: &str) {
        self.seen.clear();
        self.keys.write_all(keys.as_bytes()).unwrap();
        self.see(until);
    }

    fn see(&mut self, until: &str) {
        let end = Instant::now() + Duration::from_secs(120);
        while !self.seen.contains(until) {
            let left = end.saturating_duration_since(Instant::now());
            let more = self.shown.recv_timeout(left);
            let more = more.unwrap_or_else(|_| panic!("no {until:?} in {:?}", self.seen));
            self.seen += &String::from_utf8_lossy(&more);
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn what_is_chosen_in_the_menus_is_built_and_kept() {
    let (_, objects) = kernel();
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("config");
    let built = fs::read_to_string(objects.join("modules/../config")).unwrap();
    // One driver more than what was built; taken away again in the menus.
    let (without, with) = ("# CONFIG_BONDING is not set\n", "CONFIG_BONDING=m\n");
    assert!(built.contains(without));
    fs::write(&own, built.replace(without, with)).unwrap();
    // A terminal for it.
    let mut terminal = command("script");
    let line = format!("{} xc kernel_build --menuconfig", program().display());
    terminal.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
    kernel_variables(&mut terminal);
    terminal.env("__kobj", dir.path().join("objects")).env("__kbin", dir.path().join("bzImage"));
    terminal.env("__kcfg", &own).env("TERM", "vt100");
    let mut child = terminal.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut screen = child.stdout.take().unwrap();
    let (show, shown) = channel();
    let reader = std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(n @ 1..) = screen.read(&mut bytes) {
            let _ = show.send(bytes[..n].to_vec());
        }
    });
    let keys = child.stdin.take().unwrap();
    let mut pages = Pages { child, keys, shown, seen: String::new() };
    pages.see("rrow keys navigate");
    pages.press("/", "Search Configuration Parameter");
    pages.press("BONDING\r", "Symbol: BONDING [=m]");
    pages.press("1", "<M>   Bonding driver support");
    pages.press("n", "< >   Bonding driver support");
    // Two steps back; the last way out asks.
    pages.press("\x1b\x1b", "Symbol: BONDING [=n]");
    pages.press("\x1b\x1b", "rrow keys navigate");
    pages.press("\x1b\x1b", "save your new configuration");
    pages.press("\r", "The configuration is kept in");
    pages.see("built before");
    assert!(pages.child.wait().unwrap().success());
    reader.join().unwrap();
    let kept = fs::read_to_string(&own).unwrap();
    assert!(kept.contains(without) && !kept.contains(with));
    assert!(dir.path().join("bzImage").is_file());
}
