//! What an image holds that sets itself up at first boot. Data, and which of it an entry takes.

use uuid::Uuid;

use super::{Entry, Init};
use crate::image::debian::{Contents, File, masked};
use crate::image::grub::CONSOLES;
use crate::image::recipe;

/// For every image, beside its kernel and what starts it.
const PACKAGES: &[&str] = &[
    "ca-certificates",
    "cron",
    "curl",
    "fdisk",
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "kmod",
    "net-tools",
    "openssh-server",
    "sudo",
    "udev",
    "vim-tiny",
    "wget",
    "zstd",
];

const SYSTEMD: &[&str] = &["systemd-sysv", "dbus"];
const SYSVINIT: &[&str] = &["sysvinit-core", "ifupdown", "isc-dhcp-client"];

/// What finds the root on every board and every kind of disk; what a kernel does not have is left
/// out.
const MODULES: &str = "virtio_pci\nvirtio_mmio\nvirtio_blk\nvirtio_scsi\nsd_mod\nahci\nnvme\n\
                       ext4\ncrc32c_generic\n";

/// The kernel's words on every boot. Interfaces keep their old names, and what is plugged in is
/// used.
const CMDLINE: &str = "console=tty0 console=ttyS0 net.ifnames=0 biosdevname=0 \
                       memhp_default_state=online no_timer_check quiet";

const INITRAMFS: &str = "MODULES=list\nCOMPRESS=zstd\nRESUME=none\n";
/// Where its initial RAM disk cannot be packed so.
const INITRAMFS_GZIP: &str = "MODULES=list\nCOMPRESS=gzip\nRESUME=none\n";

const INTERFACES: &str = "auto lo\niface lo inet loopback\n\nallow-hotplug eth0\nauto eth0\niface \
                          eth0 inet dhcp\n";

const UNIT: &str = "\
[Unit]
Description=Set this machine up with the script that its host serves
After=local-fs.target lodge-keys.service
Wants=network.target

[Service]
ExecStart=/root/bootstrap/vm-bootstrap boot
# What the script has left running stays.
KillMode=process

[Install]
WantedBy=multi-user.target
";

const KEYS_UNIT: &str = "\
[Unit]
Description=Give this machine keys of its own
Before=ssh.service sshd.service
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key

[Service]
Type=oneshot
ExecStart=/usr/bin/ssh-keygen -q -t ed25519 -N \"\" -f /etc/ssh/ssh_host_ed25519_key
RemainAfterExit=yes

[Install]
WantedBy=multi-user.target
";

const INIT_SCRIPT: &str = r#"#!/bin/sh
### BEGIN INIT INFO
# Provides:          vm-bootstrap
# Required-Start:    $local_fs
# Required-Stop:
# Default-Start:     2 3 4 5
# Default-Stop:
# Short-Description: Set this machine up with the script that its host serves
### END INIT INFO
key=/etc/ssh/ssh_host_ed25519_key
case "$1" in
start)
    [ -s "$key" ] || { ssh-keygen -q -t ed25519 -N '' -f "$key"; service ssh restart; }
    start-stop-daemon --start --background --exec /root/bootstrap/vm-bootstrap -- boot
    echo lodge-ready >/dev/console
    ;;
esac
exit 0
"#;

const INITTAB: &str = "\
id:2:initdefault:
si::sysinit:/etc/init.d/rcS
~~:S:wait:/sbin/sulogin --force
l0:0:wait:/etc/init.d/rc 0
l1:1:wait:/etc/init.d/rc 1
l2:2:wait:/etc/init.d/rc 2
l6:6:wait:/etc/init.d/rc 6
ca:12345:ctrlaltdel:/sbin/shutdown -t1 -a -r now
pf::powerwait:/sbin/shutdown -h now
T0:23:respawn:/sbin/getty -L ttyS0 115200 vt220
";

fn file(path: &str, mode: u32, content: impl AsRef<[u8]>) -> File {
    File { path: path.into(), mode, content: content.as_ref().to_vec() }
}

/// The identities of an image's disk and its partitions: the same for every build of the same
/// name, and no other's.
pub(super) fn identities(name: &str) -> [u128; 4] {
    ["disk", "grub", "esp", "root"].map(|part| {
        let text = format!("lodge image {name} {part}");
        Uuid::new_v5(&Uuid::NAMESPACE_OID, text.as_bytes()).as_u128()
    })
}

/// What GRUB reads: the kernel that the distribution's packages call the newest one.
fn grub(entry: &Entry, root: Uuid) -> String {
    let words = format!("root=PARTUUID={root} rw {CMDLINE} {}", entry.cmdline);
    let words = words.trim_end();
    format!(
        "{CONSOLES}\
         if [ -e /vmlinuz ]; then\n  linux /vmlinuz {words}\n  initrd /initrd.img\n\
         else\n  linux /boot/vmlinuz {words}\n  initrd /boot/initrd.img\nfi\n\
         boot\n"
    )
}

/// All that goes into the tree of an entry. `family` is the family's name, `runner` the program
/// that fetches and runs the script; `scripts` are the entry's, read.
pub(super) fn of(entry: &Entry, family: &str, runner: &[u8], scripts: &[Vec<u8>]) -> Contents {
    let name = format!("{}-{family}", entry.distro);
    let [.., root] = identities(&name);
    let gzip = matches!(entry.suite().name, "bullseye" | "focal");
    let mut contents = Contents {
        packages: PACKAGES.iter().map(|p| (*p).to_owned()).collect(),
        early: vec![
            file(
                "etc/initramfs-tools/conf.d/lodge",
                0o644,
                if gzip { INITRAMFS_GZIP } else { INITRAMFS },
            ),
            file("usr/share/initramfs-tools/modules.d/lodge", 0o644, MODULES),
        ],
        late: vec![
            file("boot/grub/grub.cfg", 0o644, grub(entry, Uuid::from_u128(root))),
            file(
                "etc/fstab",
                0o644,
                format!("PARTUUID={} / ext4 defaults 0 1\n", Uuid::from_u128(root)),
            ),
            file("etc/hostname", 0o644, format!("packer-{name}\n")),
            file("etc/hosts", 0o644, format!("127.0.0.1 localhost packer-{name}\n::1 localhost\n")),
            file("etc/machine-id", 0o444, ""),
            file(
                "etc/ssh/sshd_config.d/lodge.conf",
                0o644,
                "HostKey /etc/ssh/ssh_host_ed25519_key\nUseDNS no\nPasswordAuthentication no\n",
            ),
            file("root/bootstrap/vm-bootstrap", 0o755, runner),
            file("root/bootstrap/bootstrap-max-retry", 0o644, "10\n"),
            file("root/bootstrap/retry-amount", 0o644, "0\n"),
            file("root/bootstrap/start-bootstrap", 0o644, ""),
        ],
        links: vec![("usr/sbin/vm-bootstrap".into(), "/root/bootstrap/vm-bootstrap".into())],
        run: Vec::new(),
    };
    contents.packages.push(entry.kernel().to_owned());
    if entry.require_script {
        contents.late.push(file("root/bootstrap/require-script", 0o644, ""));
    }
    match entry.init {
        Init::Systemd => systemd(&mut contents, entry.suite().name),
        Init::Sysvinit => sysvinit(&mut contents),
    }
    contents.packages.extend(entry.packages.iter().cloned());
    contents.packages.sort();
    contents.packages.dedup();
    for user in &entry.users {
        let mut words = vec!["useradd", "-m", "-s", "/bin/bash"];
        words.extend(user.sudo.then_some(["-G", "sudo"]).into_iter().flatten());
        contents
            .run
            .push(words.iter().map(|w| (*w).to_owned()).chain([user.name.clone()]).collect());
        let keys = format!("home/{}/.ssh/authorized_keys", user.name);
        if user.sudo {
            let line = format!("{} ALL=(ALL) NOPASSWD: ALL\n", user.name);
            contents.late.push(file(&format!("etc/sudoers.d/{}", user.name), 0o440, line));
        }
        if !user.ssh_keys.is_empty() {
            let lines: String = user.ssh_keys.iter().map(|key| format!("{key}\n")).collect();
            let staged = format!("usr/lib/lodge/keys-{}", user.name);
            contents.late.push(file(&staged, 0o644, lines));
            let owner = format!("--owner={}", user.name);
            let group = format!("--group={}", user.name);
            let install = ["install", "-D", &owner, &group, "-m", "0600"];
            let words = install.iter().map(|w| (*w).to_owned());
            contents.run.push(words.chain([format!("/{staged}"), format!("/{keys}")]).collect());
        }
    }
    for (number, script) in scripts.iter().enumerate() {
        let path = format!("usr/lib/lodge/build-{number}");
        contents.late.push(file(&path, 0o755, script));
        contents.run.push(vec![format!("/{path}")]);
        contents.run.push(vec!["rm".into(), format!("/{path}")]);
    }
    contents
}

fn systemd(contents: &mut Contents, suite: &str) {
    contents.packages.extend(SYSTEMD.iter().map(|p| (*p).to_owned()));
    if !matches!(suite, "bullseye" | "focal" | "jammy") {
        contents.packages.push("systemd-resolved".into());
    }
    let units = "etc/systemd/system";
    contents.late.extend([
        file("etc/systemd/network/50-lodge.network", 0o644, recipe::NETWORK),
        file(&format!("{units}/vm-bootstrap.service"), 0o644, UNIT),
        file(&format!("{units}/lodge-keys.service"), 0o644, KEYS_UNIT),
        file(&format!("{units}/lodge-ready.service"), 0o644, recipe::READY_UNIT),
    ]);
    for unit in ["vm-bootstrap", "lodge-keys", "lodge-ready"] {
        let link = format!("{units}/multi-user.target.wants/{unit}.service");
        contents.links.push((link, format!("/{units}/{unit}.service")));
    }
    let wanted = format!("{units}/multi-user.target.wants/systemd-networkd.service");
    contents.links.push((wanted, "/lib/systemd/system/systemd-networkd.service".into()));
    contents.links.extend(recipe::IDLE.iter().map(masked));
}

fn sysvinit(contents: &mut Contents) {
    contents.packages.extend(SYSVINIT.iter().map(|p| (*p).to_owned()));
    contents.late.extend([
        file("etc/network/interfaces", 0o644, INTERFACES),
        file("etc/inittab", 0o644, INITTAB),
        file("etc/init.d/vm-bootstrap", 0o755, INIT_SCRIPT),
    ]);
    contents.run.push(vec!["update-rc.d".into(), "vm-bootstrap".into(), "defaults".into()]);
}
