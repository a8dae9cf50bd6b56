//! What `lodge doctor` says: each thing a machine may need, whether this host has it, and the
//! exact command that adds it.

use lodge_host::facts::Facts;
use lodge_host::paths::find_program;
use serde_json::{Value, json};

/// A JSON array of `{what, ok, detail, fix}`; `fix` only where something can be done.
pub(crate) fn examine(facts: &Facts) -> Value {
    let mut list = Vec::new();
    let mut say = |what: &str, ok: bool, detail: String, fix: Option<&str>| {
        let fix = fix.filter(|_| !ok);
        list.push(json!({"what": what, "ok": ok, "detail": detail, "fix": fix}));
    };
    match &facts.qemu {
        Ok(qemu) => {
            let path = qemu.program.path.display();
            say("QEMU", true, format!("{} at {path}", qemu.version_text()), None);
            let uefi = match &qemu.uefi {
                Some((code, _)) => (true, code.display().to_string()),
                None => (false, "no UEFI firmware for disk boot".to_owned()),
            };
            say("UEFI firmware", uefi.0, uefi.1, Some("apt-get install ovmf"));
        }
        Err(why) => say("QEMU", false, why.clone(), Some("apt-get install qemu-system-x86")),
    }
    for (what, found) in
        [("Firecracker", &facts.firecracker), ("Cloud Hypervisor", &facts.cloud_hypervisor)]
    {
        match found {
            Ok(vmm) => {
                let path = vmm.program.path.display();
                say(what, true, format!("{} at {path}", vmm.version_text()), None);
            }
            Err(why) => say(what, false, why.clone(), None),
        }
    }
    let kvm = &facts.kvm;
    let fix = match kvm.opens() {
        true => None,
        false if facts.rootless => Some("sudo usermod -aG kvm $USER  (then log in again)"),
        false => Some("modprobe kvm_intel || modprobe kvm_amd"),
    };
    say("KVM", kvm.runs_linux(), kvm.describe(), fix);
    let tun = match &facts.tun {
        Ok(()) => (true, "interfaces for guests can be made".to_owned()),
        Err(why) => (false, why.clone()),
    };
    let fix = if facts.rootless { "sudo chmod 666 /dev/net/tun" } else { "modprobe tun" };
    say("tap interfaces", tun.0, tun.1, Some(fix));
    use lodge_host::facts::Hierarchy;
    let (ok, detail) = match &facts.cgroups {
        Hierarchy::V2(path) => (true, format!("version 2 below {}", path.display())),
        Hierarchy::V1(list) => {
            let names: Vec<&str> = list.iter().map(|(name, _)| name.as_str()).collect();
            (true, format!("version 1: {}", names.join(", ")))
        }
        Hierarchy::None(why) => (false, why.clone()),
    };
    say(
        "resource limits",
        ok,
        detail,
        Some("sudo loginctl enable-linger $USER  (systemd delegates a cgroup)"),
    );
    let mut tools = vec![
        ("ip", "iproute2", "makes networks"),
        ("nft", "nftables", "lets guests reach the world"),
        ("mmdebstrap", "mmdebstrap", "builds images"),
        (
            "grub-mkimage",
            "grub-common grub-pc-bin grub-efi-amd64-bin",
            "makes images of families bootable",
        ),
    ];
    if facts.rootless {
        tools.push(("slirp4netns", "slirp4netns", "lets guests reach the world without root"));
        tools.push(("newuidmap", "uidmap", "builds images without root"));
    }
    for (program, package, why) in tools {
        let found = find_program(program);
        let detail = match &found {
            Some(path) => path.display().to_string(),
            None => why.to_owned(),
        };
        say(program, found.is_some(), detail, Some(&format!("apt-get install {package}")));
    }
    json!(list)
}
