//! What goes into an image besides its packages: the files that make a Debian system a good guest.
//! Data only.

/// A file of the image: path, mode, content.
pub(super) type Overlay = (&'static str, u32, &'static str);

pub(super) const SUITE: &str = "bookworm";

/// Packages of every image; `--packages` adds to them.
const PACKAGES: &[&str] = &[
    "systemd-sysv",
    "udev",
    "dbus",
    "linux-image-cloud-amd64",
    "zstd",
    "openssh-server",
    "iproute2",
    "iputils-ping",
    "systemd-resolved",
    "ca-certificates",
];

pub(super) const CMDLINE: &str = "console=ttyS0 root=/dev/vda rw quiet";

/// What the guest prints when it can be used.
pub(super) const READY: &str = "console:^lodge-ready";

/// Kernel modules of the initial RAM disk: what finds the root on every board, a shared one too.
/// Those that a kernel does not have are left out.
const MODULES: &str = "virtio_pci\nvirtio_mmio\nvirtio_blk\nvirtio_scsi\nsd_mod\next4\n\
                       crc32c_generic\n9p\n9pnet\n9pnet_virtio\nvirtiofs\n";

/// What an image is made of. A kernel among what is added takes the place of the usual one.
pub(super) fn packages(added: &[String]) -> Vec<&str> {
    let own_kernel = added.iter().any(|p| p.starts_with("linux-image-"));
    let usual = PACKAGES.iter().copied();
    let usual = usual.filter(|p| !own_kernel || !p.starts_with("linux-image-"));
    usual.chain(added.iter().map(String::as_str)).collect()
}

/// There before the kernel's package is, which builds the initial RAM disk.
pub(super) const EARLY: &[Overlay] = &[
    ("etc/initramfs-tools/conf.d/lodge", 0o644, "MODULES=list\nCOMPRESS=zstd\nRESUME=none\n"),
    ("usr/share/initramfs-tools/modules.d/lodge", 0o644, MODULES),
];

/// Put in at the end.
pub(super) const LATE: &[Overlay] = &[
    ("etc/fstab", 0o644, "/dev/vda / ext4 x-systemd.growfs 0 1\n"),
    ("etc/hostname", 0o644, "debian\n"),
    ("etc/machine-id", 0o444, ""),
    ("etc/systemd/network/50-lodge.network", 0o644, NETWORK),
    // One key, made at first boot; the slow kinds are nobody's need.
    (
        "etc/ssh/sshd_config.d/lodge.conf",
        0o644,
        "HostKey /etc/ssh/ssh_host_ed25519_key\nUseDNS no\n",
    ),
    ("usr/lib/lodge/guest-setup", 0o755, SETUP),
    ("etc/systemd/system/lodge-setup.service", 0o644, SETUP_UNIT),
    ("etc/systemd/system/lodge-ready.service", 0o644, READY_UNIT),
];

/// Links of the image: path and target.
pub(super) const LINKS: &[(&str, &str)] = &[
    (
        "etc/systemd/system/sysinit.target.wants/lodge-setup.service",
        "/etc/systemd/system/lodge-setup.service",
    ),
    (
        "etc/systemd/system/multi-user.target.wants/lodge-ready.service",
        "/etc/systemd/system/lodge-ready.service",
    ),
    (
        "etc/systemd/system/multi-user.target.wants/systemd-networkd.service",
        "/lib/systemd/system/systemd-networkd.service",
    ),
];

/// Units that do nothing for a guest but take its time.
pub(super) const IDLE: &[&str] = &[
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "systemd-networkd-wait-online.service",
    "e2scrub_reap.service",
];

pub(super) const NETWORK: &str = "\
[Match]
Type=ether

[Network]
DHCP=ipv4
LinkLocalAddressing=no

[DHCPv4]
UseDomains=yes
";

const SETUP: &str = r#"#!/bin/sh
# Takes this machine's files from its disk of files, and gives it keys of its own.
for serial in /sys/block/vd*/serial; do
    if [ "$(cat "$serial" 2>/dev/null)" = lodge-files ]; then
        disk=${serial%/serial}
        tar -C / --no-same-owner -xpf "/dev/${disk##*/}"
        hostname "$(cat /etc/hostname)"
    fi
done
[ -d /root/.ssh ] && chmod 700 /root/.ssh
[ -s /etc/ssh/ssh_host_ed25519_key ] || ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
exit 0
"#;

const SETUP_UNIT: &str = "\
[Unit]
Description=Take this machine's files and identity
DefaultDependencies=no
After=systemd-remount-fs.service systemd-udevd.service
Before=sysinit.target systemd-networkd.service ssh.service

[Service]
Type=oneshot
ExecStart=/usr/lib/lodge/guest-setup
RemainAfterExit=yes
";

pub(super) const READY_UNIT: &str = "\
[Unit]
Description=Tell the host that this machine is ready
After=ssh.service systemd-networkd.service

[Service]
Type=oneshot
StandardOutput=tty
TTYPath=/dev/console
ExecStart=/bin/echo lodge-ready
RemainAfterExit=yes
";
