//! What a machine boots: a kernel, firmware, an image or an flist, of which only some go together.

use super::{host_path, parse};
use crate::draft::BootDraft;
use crate::flist::Flist;
use crate::machine::{Boot, BootDevice, Firmware};
use crate::names::ImageName;
use crate::problem::Problems;

pub(super) fn resolve(
    p: &mut Problems,
    image: Option<ImageName>,
    flist: Option<Flist>,
    draft: Option<BootDraft>,
) -> Boot {
    let BootDraft { kernel, initrd, cmdline, firmware, order, once } = draft.unwrap_or_default();
    let asks_firmware = firmware.is_some() || order.is_some() || once.is_some();
    if kernel.is_some() && asks_firmware {
        p.add("boot", "`kernel` boots without firmware; `firmware`, `order` and `once` exclude it");
    }
    if kernel.is_none() && initrd.is_some() {
        p.add("boot.initrd", "an initrd needs `boot.kernel`");
    }
    if kernel.is_none() && image.is_none() && flist.is_none() && cmdline.is_some() {
        p.add("boot.cmdline", "a kernel command line needs `boot.kernel`, `image` or `flist`");
    }
    let cmdline = cmdline.unwrap_or_default();
    if cmdline.len() > 2000 || cmdline.chars().any(char::is_control) {
        p.add("boot.cmdline", "a command line has at most 2000 bytes and no control characters");
    }
    if let Some(flist) = flist {
        if kernel.is_some() || asks_firmware {
            p.add("boot", "an flist brings its own kernel; only `cmdline` can be added");
        }
        return Boot::Flist { flist, cmdline };
    }
    if let Some(kernel) = kernel {
        let kernel = host_path(p, "boot.kernel", kernel);
        let initrd = initrd.map(|path| host_path(p, "boot.initrd", path));
        return Boot::Kernel { kernel, initrd, cmdline };
    }
    if let Some(image) = image.filter(|_| !asks_firmware) {
        return Boot::Image { image, cmdline };
    }
    let mut devices: Vec<BootDevice> = Vec::new();
    for (i, word) in order.unwrap_or_else(|| vec!["disk".into(), "cdrom".into()]).iter().enumerate()
    {
        match p.take(&format!("boot.order[{i}]"), word.parse()) {
            Some(device) if devices.contains(&device) => {
                p.add(format!("boot.order[{i}]"), format!("{device} is already in the order"));
            }
            Some(device) => devices.push(device),
            None => {}
        }
    }
    Boot::Firmware {
        firmware: parse(p, "boot.firmware", firmware).unwrap_or(Firmware::Bios),
        order: devices,
        once: parse(p, "boot.once", once),
    }
}
