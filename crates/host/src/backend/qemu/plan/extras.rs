//! What most machines do without, as QEMU arguments: a screen with its keyboard and pointer, a
//! second serial port, a name for the guest to see.

use lodge_spec::extras::{Display, Smbios, Vga};
use lodge_spec::flist::Transport;
use lodge_spec::machine::{BackendKind, Machine};

use super::devices::Arguments;
use crate::backend::qemu::QemuFacts;
use crate::backend::{MdataEnd, RootServer, Screen, Survey, Unsupported};

/// Where a root that is an flist is mounted, inside.
pub(super) const ROOT: &str = "/root";
const RAM: &str = "ram";
/// The file with the screen's password, inside.
const PASSWORD: &str = "/vnc-password";

const fn device(vga: Vga) -> &'static str {
    match vga {
        Vga::Std => "VGA",
        Vga::Cirrus => "cirrus-vga",
        Vga::Vmware => "vmware-svga",
        Vga::Qxl => "qxl-vga",
        Vga::Virtio => "virtio-vga",
    }
}

/// A card that this QEMU does not have.
pub(super) fn obstacle(machine: &Machine, qemu: &QemuFacts) -> Option<Unsupported> {
    let vga = machine.display.as_ref()?.vga;
    let name = device(vga);
    let why = || format!("this QEMU has no {vga} graphics card ({name})");
    (!qemu.devices.contains(name))
        .then(|| Unsupported::new("display.vga", BackendKind::Qemu, why()))
}

pub(super) fn all(args: &mut Arguments, machine: &Machine, survey: &Survey) {
    if let Some(smbios) = &machine.smbios {
        args.add("-smbios", identity(smbios));
    }
    let Some(Display { vga, .. }) = machine.display.as_deref() else { return };
    args.add("-device", device(*vga));
    // The pointer of a screen that is looked at from afar has a place, not a movement.
    args.flag("-usb");
    args.add("-device", "usb-tablet");
    let mut listen = "none".to_owned();
    if machine.vnc_password().is_some() {
        args.bind_file(PASSWORD, &survey.run.join("vnc-password"));
        args.add("-object", format!("secret,id=vnc,format=raw,file={PASSWORD}"));
        listen.push_str(",password-secret=vnc");
    }
    args.add("-vnc", listen);
}

fn identity(smbios: &Smbios) -> String {
    let Smbios { manufacturer, product, version, serial, sku, family } = smbios;
    let fields = [
        ("manufacturer", manufacturer),
        ("product", product),
        ("version", version),
        ("serial", serial),
        ("sku", sku),
        ("family", family),
    ];
    let mut option = "type=1".to_owned();
    for (name, value) in fields.into_iter().filter(|(_, value)| !value.is_empty()) {
        // Two commas are one within a value.
        option.push_str(&format!(",{name}={}", value.replace(',', ",,")));
    }
    option
}

/// A serial port for metadata; whoever made the other end answers on it.
pub(super) fn second_serial(
    args: &mut Arguments,
    machine: &Machine,
    survey: &Survey,
) -> Option<MdataEnd> {
    machine.mdata.as_ref()?;
    let fd = args.next_fd();
    args.kept.push(fd);
    args.add("-chardev", format!("socket,id=mdata,fd={fd}"));
    args.add("-serial", "chardev:mdata");
    Some(MdataEnd { fd, file: MdataEnd::file(&survey.run) })
}

/// A second monitor, over which those who want to see the screen are handed in.
pub(super) fn screen(
    args: &mut Arguments,
    machine: &Machine,
    survey: &Survey,
) -> Option<(Screen, i32)> {
    let screen = Screen::of(machine, &survey.run)?;
    let fd = args.next_fd();
    args.kept.push(fd);
    args.add("-chardev", format!("socket,id=screen,fd={fd},server=on,wait=off"));
    args.add("-mon", "chardev=screen,mode=control");
    Some((screen, fd))
}

/// A root that is an flist. As a 9p share, owners and modes are attributes by name, so the
/// hypervisor needs no privilege to keep them; as virtio-fs, it only hands the guest's memory on.
pub(super) fn root(args: &mut Arguments, machine: &Machine, survey: &Survey) -> Option<RootServer> {
    let root = survey.root.as_ref()?;
    let (jail, own) = (args.next_fd(), args.next_fd());
    let tag = root.tag();
    match root.transport {
        Transport::NineP | Transport::Disk => {
            let options = "multidevs=forbid,security_model=mapped-xattr";
            args.add("-fsdev", format!("local,id=root,path={ROOT},{options}"));
            args.add("-device", format!("virtio-9p-pci,id=fs-root,fsdev=root,mount_tag={tag}"));
        }
        Transport::VirtioFs => {
            args.kept.push(jail);
            let size = machine.memory.size.as_mib();
            args.add("-object", format!("memory-backend-memfd,id={RAM},size={size}M,share=on"));
            args.add("-chardev", format!("socket,id=root,fd={jail}"));
            args.add("-device", format!("vhost-user-fs-pci,id=fs-root,chardev=root,tag={tag}"));
        }
    }
    let log = survey.state.join("flist.log");
    Some(RootServer { config: root.config(own, survey.uid), jail: Some(jail), own, log })
}

/// Where the guest's memory comes from, if others are to see it too.
pub(super) fn memory_backend(survey: &Survey) -> &'static str {
    match survey.root.as_ref().map(|root| root.transport) {
        Some(Transport::VirtioFs) => ",memory-backend=ram",
        Some(Transport::NineP | Transport::Disk) | None => "",
    }
}
