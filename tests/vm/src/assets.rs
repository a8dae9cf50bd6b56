//! Guests: Debian's cloud kernel with small initial RAM disks made here, a bootable CD, and the
//! image `debian-12`. Made once, kept in `LODGE_TEST_CACHE` (default `~/.cache/lodge-test`).

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use lodge_formats::cpio;
use sha2::{Digest, Sha256};

use crate::lab::{command, program};

pub fn cache() -> PathBuf {
    let named = std::env::var_os("LODGE_TEST_CACHE").map(PathBuf::from);
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/tmp".into()));
    let dir = named.unwrap_or_else(|| home().join(".cache/lodge-test"));
    fs::create_dir_all(&dir).unwrap();
    dir
}

fn must(program: &str, args: &[&str], dir: &Path) {
    let output = command(program).args(args).current_dir(dir).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {said}");
}

/// The unpacked package of Debian's cloud kernel.
fn kernel_tree() -> &'static PathBuf {
    static TREE: OnceLock<PathBuf> = OnceLock::new();
    TREE.get_or_init(|| {
        let package = {
            let args =
                ["-s", "-qq", "--no-install-recommends", "install", "linux-image-cloud-amd64"];
            let output = command("apt-get").args(args).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let words = text.lines().filter_map(|l| l.strip_prefix("Inst ")?.split(' ').next());
            let found = words.into_iter().find(|w| w.starts_with("linux-image-6"));
            let shown = || {
                let args = ["-W", "-f=${Package}\n", "linux-image-6*-cloud-amd64"];
                let output = command("dpkg-query").args(args).output().unwrap();
                String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
            };
            found.map(str::to_owned).or_else(shown).expect("a cloud kernel among the packages")
        };
        let tree = cache().join(&package);
        if !tree.exists() {
            let work = tempfile::tempdir_in(cache()).unwrap();
            must("apt-get", &["download", &package], work.path());
            let deb = fs::read_dir(work.path()).unwrap().next().unwrap().unwrap().path();
            let part = work.path().join("tree");
            must("dpkg-deb", &["-x", deb.to_str().unwrap(), part.to_str().unwrap()], work.path());
            let _ = fs::rename(part, &tree);
        }
        tree
    })
}

pub fn kernel() -> String {
    let boot = kernel_tree().join("boot");
    let mut names = fs::read_dir(boot).unwrap().flatten().map(|e| e.path());
    let found = names.find(|p| p.file_name().unwrap().to_string_lossy().starts_with("vmlinuz"));
    found.unwrap().to_string_lossy().into_owned()
}

/// The files of kernel modules and of what they depend on, in the order to load them.
fn modules(wanted: &[&str]) -> Vec<PathBuf> {
    let tree = kernel_tree();
    let base = ["lib/modules", "usr/lib/modules"].map(|p| tree.join(p));
    let base = base.into_iter().find(|p| p.exists()).unwrap();
    let version = fs::read_dir(base).unwrap().next().unwrap().unwrap().path();
    must(
        "depmod",
        &["-b", tree.to_str().unwrap(), version.file_name().unwrap().to_str().unwrap()],
        tree,
    );
    let table = fs::read_to_string(version.join("modules.dep")).unwrap();
    let mut list: Vec<PathBuf> = Vec::new();
    for name in wanted {
        let line =
            table.lines().find(|l| l.split(':').next().unwrap().ends_with(&format!("/{name}.ko")));
        let Some((module, needs)) = line.and_then(|l| l.split_once(':')) else { continue };
        for path in needs.split_whitespace().rev().chain([module]) {
            let path = version.join(path);
            if !list.contains(&path) {
                list.push(path);
            }
        }
    }
    list
}

const PRELUDE: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /etc
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
export PATH=/bin
for module in $(cat /modules); do insmod $module; done
";

const DHCP: &str = "#!/bin/busybox sh
[ \"$1\" = bound ] || exit 0
ip addr add $ip/24 dev $interface
ip route add default via $router
echo nameserver $dns > /etc/resolv.conf
echo search lodge >> /etc/resolv.conf
echo DHCP-GOT $ip
";

/// A small guest: busybox, the modules that it needs, and an init that goes on with `script`.
pub fn guest(script: &str) -> String {
    static MAKING: Mutex<()> = Mutex::new(());
    let _one = MAKING.lock().unwrap_or_else(|e| e.into_inner());
    let key: String = Sha256::digest([PRELUDE, DHCP, script].concat())
        .iter()
        .take(8)
        .map(|b| format!("{b:02x}"))
        .collect();
    let path = cache().join(format!("guest-{key}.cpio.gz"));
    if !path.exists() {
        let wanted = [
            "virtio_pci",
            "virtio_mmio",
            "virtio_blk",
            "virtio_net",
            "virtio_balloon",
            "virtio_rng",
            "sr_mod",
            "ahci",
            "ata_piix",
            "isofs",
            "button",
            "evdev",
        ];
        let out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let mut archive = cpio::Writer::new(out);
        archive.file("bin/busybox", 0o755, &fs::read("/bin/busybox").unwrap()).unwrap();
        archive.file("init", 0o755, format!("{PRELUDE}{script}").as_bytes()).unwrap();
        archive.file("dhcp", 0o755, DHCP.as_bytes()).unwrap();
        let mut list = String::new();
        for module in modules(&wanted) {
            let name = format!("lib/{}", module.file_name().unwrap().to_string_lossy());
            archive.file(&name, 0o644, &fs::read(&module).unwrap()).unwrap();
            list += &format!("/{name} ");
        }
        archive.file("modules", 0o644, list.as_bytes()).unwrap();
        let bytes = archive.finish().unwrap().finish().unwrap();
        let mut part = tempfile::NamedTempFile::new_in(cache()).unwrap();
        part.write_all(&bytes).unwrap();
        part.persist(&path).unwrap();
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    }
    path.to_string_lossy().into_owned()
}

/// A guest that says that it is there and then is a shell.
pub fn shell() -> String {
    let path = guest("echo GUEST-READY\nsh\n");
    // Under a name of its own, by which `make bench` finds it.
    let own = path.replace("guest-", "shell-");
    let _ = fs::hard_link(&path, own);
    path
}

/// A guest that takes an address, serves its name over HTTP, and then is a shell.
pub fn networked() -> String {
    guest(
        "ip link set lo up\nip link set eth0 up\nudhcpc -q -n -i eth0 -s /dhcp\n\
         mkdir -p /www && echo served-by-$(ip -4 addr show eth0 | sed -n 's/.*inet \\([0-9.]*\\).*/\\1/p') > /www/index.html\n\
         httpd -p 80 -h /www\necho GUEST-READY\nsh\n",
    )
}

/// A CD that boots the kernel with a shell guest, by isolinux.
pub fn cdrom() -> Option<String> {
    bootable(&shell(), "")
}

/// A CD that boots the kernel with a guest, by isolinux; `more` is put before its configuration.
pub fn bootable(initrd: &str, more: &str) -> Option<String> {
    let isolinux = Path::new("/usr/lib/ISOLINUX/isolinux.bin");
    let ldlinux = Path::new("/usr/lib/syslinux/modules/bios/ldlinux.c32");
    if !isolinux.exists() || !ldlinux.exists() {
        return None;
    }
    static MAKING: Mutex<()> = Mutex::new(());
    let _one = MAKING.lock().unwrap_or_else(|e| e.into_inner());
    let config = format!(
        "serial 0\n{more}default l\nlabel l\n kernel linux\n append initrd=initrd \
         console=ttyS0 quiet cryptomgr.notests\n"
    );
    let key: String = Sha256::digest([&kernel(), initrd, &config].concat())
        .iter()
        .take(8)
        .map(|b| format!("{b:02x}"))
        .collect();
    let path = cache().join(format!("boot-{key}.iso"));
    if !path.exists() {
        let work = tempfile::tempdir_in(cache()).unwrap();
        let at = |name: &str| work.path().join(name);
        fs::copy(isolinux, at("isolinux.bin")).unwrap();
        fs::copy(ldlinux, at("ldlinux.c32")).unwrap();
        fs::copy(kernel(), at("linux")).unwrap();
        fs::copy(initrd, at("initrd")).unwrap();
        fs::write(at("isolinux.cfg"), config).unwrap();
        let part = cache().join(format!("boot-{}.part", std::process::id()));
        let args = [
            "-quiet",
            "-o",
            part.to_str().unwrap(),
            "-b",
            "isolinux.bin",
            "-c",
            "boot.cat",
            "-no-emul-boot",
            "-boot-load-size",
            "4",
            "-boot-info-table",
            "-R",
            ".",
        ];
        must("genisoimage", &args, work.path());
        fs::rename(part, &path).unwrap();
    }
    Some(path.to_string_lossy().into_owned())
}

/// A disk whose boot sector prints a text on the serial port and halts.
pub fn boot_sector(text: &str) -> Vec<u8> {
    // cli; xor ax, ax; mov ds, ax; mov si, text
    // next: lodsb; test al, al; jz halt; mov dx, 0x3f8; out dx, al; jmp next
    // halt: hlt; jmp halt
    let mut sector = vec![
        0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0xbe, 0x16, 0x7c, 0xac, 0x84, 0xc0, 0x74, 0x06, 0xba, 0xf8,
        0x03, 0xee, 0xeb, 0xf5, 0xf4, 0xeb, 0xfd,
    ];
    sector.extend(text.bytes());
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector.resize(1 << 20, 0);
    sector
}

/// Puts the image `debian-12` into an instance; builds it once for each recipe.
pub fn debian_into(home: &Path) {
    debian_with(home, "");
}

/// The same with more packages, a comma between each two.
pub fn debian_with(home: &Path, packages: &str) {
    static MAKING: Mutex<()> = Mutex::new(());
    let _one = MAKING.lock().unwrap_or_else(|e| e.into_inner());
    let recipe = concat!(
        include_str!("../../../crates/host/src/image/recipe.rs"),
        include_str!("../../../crates/host/src/image/build.rs"),
        include_str!("../../../crates/host/src/image/debian.rs"),
    );
    let key: String = Sha256::digest([recipe, packages].concat())
        .iter()
        .take(8)
        .map(|b| format!("{b:02x}"))
        .collect();
    let made = cache().join(format!("debian-{key}"));
    if !made.join("done").exists() {
        let _ = fs::remove_dir_all(&made);
        fs::create_dir_all(&made).unwrap();
        let lodge = |args: &[&str]| command(program()).args(args).env("LODGE_HOME", &made).output();
        let more: &[&str] = if packages.is_empty() { &[] } else { &["--packages", packages] };
        let built = lodge(&[&["image", "build", "debian-12"], more].concat()).unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let lab = std::os::unix::net::UnixStream::connect(made.join("run/lodge.sock")).unwrap();
        let daemon = rustix::net::sockopt::socket_peercred(&lab).unwrap().pid;
        let _ = rustix::process::kill_process(daemon, rustix::process::Signal::KILL);
        fs::write(made.join("done"), "").unwrap();
    }
    fs::create_dir_all(home.join("images/sha256")).unwrap();
    for blob in fs::read_dir(made.join("images/sha256")).unwrap().flatten() {
        let target = home.join("images/sha256").join(blob.file_name());
        let args = ["--sparse=always", "--reflink=auto"];
        let linked = fs::hard_link(blob.path(), &target).is_ok();
        if !linked {
            let (from, to) = (blob.path(), target);
            must("cp", &[args[0], args[1], from.to_str().unwrap(), to.to_str().unwrap()], home);
        }
    }
    for name in ["lodge.db", "lodge.db-wal"] {
        let _ = fs::copy(made.join(name), home.join(name));
    }
}

/// Whether KVM opens; what it can run is another question.
pub fn kvm_opens() -> bool {
    std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

/// The guest that needs no Linux, as it was built beside `lodge`.
pub fn probe() -> String {
    crate::lab::program().with_file_name("probe").to_string_lossy().into_owned()
}
