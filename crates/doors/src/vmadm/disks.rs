//! Disks in their full form. Knows what a disk needs and how its path is made; makes nothing.

use serde_json::Value;

use super::build::World;
use super::properties::{Brand, POOL};
use super::values::{Object, is_true, number, text};

/// A pool promises its disks no more than this many times what it holds.
const PROMISE: u64 = 16;

/// Disks of one machine, as they come together.
pub(super) struct Disks<'a> {
    pub(super) brand: Brand,
    pub(super) uuid: &'a str,
    /// The model of a disk that names none.
    pub(super) driver: Option<String>,
    pub(super) world: &'a World,
    pub(super) list: Vec<Object>,
}

impl Disks<'_> {
    pub(super) fn add(&mut self, mut disk: Object) -> Result<(), String> {
        disk.retain(|_, value| !value.is_null());
        let shown = Value::Object(disk.clone()).to_string();
        let media = text(&disk, "media").unwrap_or("disk").to_owned();
        let first_model = self.list.first().and_then(|d| text(d, "model")).map(str::to_owned);
        let model = text(&disk, "model").map(str::to_owned).or(self.driver.clone()).or(first_model);
        let model = model.ok_or_else(|| format!("missing .model option for disk: {shown}"))?;
        check_model(self.brand, &model)?;
        let elsewhere = media == "cdrom" || is_true(&disk, "nocreate");
        if text(&disk, "path").is_some() && !elsewhere {
            let why = "you cannot specify a path for a disk unless you set nocreate=true";
            return Err(why.into());
        }
        if elsewhere && text(&disk, "path").is_none() {
            return Err(format!("missing .path option for disk: {shown}"));
        }
        block_size(&disk)?;
        if !elsewhere {
            self.fill(&mut disk)?;
        }
        disk.insert("media".into(), media.into());
        disk.insert("model".into(), model.into());
        disk.entry("boot").or_insert(false.into());
        if self.brand == Brand::Bhyve {
            let uuid = uuid::Uuid::new_v4().to_string();
            disk.entry("uuid").or_insert(uuid.into());
        }
        self.list.push(disk);
        Ok(())
    }

    /// A disk of the machine's own.
    fn fill(&mut self, disk: &mut Object) -> Result<(), String> {
        if let Some(image) = text(disk, "image_uuid") {
            let known = self.world.images.get(image).map(|image| image.size);
            let size = number(disk, "image_size").or(known);
            let size = size.ok_or_else(|| format!("there is no image {image} here"))?;
            if known.is_some_and(|known| number(disk, "size").is_some_and(|s| s < known)) {
                return Err("Invalid value(s) for: size".into());
            }
            disk.insert("image_size".into(), size.into());
            disk.entry("size").or_insert(size.into());
        }
        let size = number(disk, "size").unwrap_or(0);
        let most = self.world.pool_mib.saturating_mul(PROMISE);
        if u64::try_from(size).unwrap_or(0) > most {
            return Err(format!(
                "cannot create volume: {size} MiB are more than the pool {POOL} can promise \
                 ({most} MiB)"
            ));
        }
        let path = |n: usize| {
            let separator = if self.brand == Brand::Kvm { '-' } else { '/' };
            format!("/dev/zvol/rdsk/{POOL}/{}{separator}disk{n}", self.uuid)
        };
        let taken = |path: &String| self.list.iter().any(|d| text(d, "path") == Some(path));
        let free = (0..).map(path).find(|path| !taken(path)).unwrap_or_default();
        let filesystem = free.trim_start_matches("/dev/zvol/rdsk/").to_owned();
        disk.insert("path".into(), free.into());
        disk.insert("zfs_filesystem".into(), filesystem.into());
        disk.insert("zpool".into(), POOL.into());
        disk.entry("block_size").or_insert(8192.into());
        disk.entry("compression").or_insert("off".into());
        disk.entry("refreservation").or_insert(size.into());
        Ok(())
    }
}

pub(super) fn check_model(brand: Brand, model: &str) -> Result<(), String> {
    let valid = brand.disk_models();
    if !valid.contains(&model) {
        return Err(format!(
            "\"{model}\" is not a valid disk model for {} brand. Valid are: {}",
            brand.as_str(),
            valid.join(",")
        ));
    }
    if model == "nvme" {
        return Err("no hypervisor here offers nvme disks; take virtio or ahci".into());
    }
    Ok(())
}

fn block_size(disk: &Object) -> Result<(), String> {
    match number(disk, "block_size") {
        Some(n) if !(512..=131_072).contains(&n) || n.count_ones() != 1 => {
            Err(format!("invalid .block_size({n}), must be 512-131072 and a power of 2."))
        }
        Some(_) | None => Ok(()),
    }
}

/// What holds of all disks together.
pub(super) fn check(brand: Brand, list: &[Object]) -> Result<(), String> {
    let boots: Vec<&str> =
        list.iter().filter(|d| is_true(d, "boot")).filter_map(|d| text(d, "path")).collect();
    if boots.len() > 1 {
        return Err(format!("multiple boot disks: {}", boots.join(", ")));
    }
    if brand == Brand::Bhyve {
        let mut seen = Vec::new();
        for uuid in list.iter().filter_map(|d| text(d, "uuid")) {
            if seen.contains(&uuid) {
                return Err(format!("duplicate disk uuid {uuid}"));
            }
            seen.push(uuid);
        }
        slots(list)?;
    }
    let ide = list.iter().filter(|d| matches!(text(d, "model"), Some("ide" | "ahci"))).count();
    if ide > 4 {
        return Err(format!("{ide} disks are on ide, which has room for 4"));
    }
    Ok(())
}

fn slots(list: &[Object]) -> Result<(), String> {
    let mut seen = Vec::new();
    for slot in list.iter().filter_map(|d| text(d, "pci_slot")) {
        let mut parts: Vec<u32> = slot.split(':').filter_map(|part| part.parse().ok()).collect();
        match parts.len() {
            1 => parts = vec![0, parts[0], 0],
            2 => parts.insert(0, 0),
            _ => {}
        }
        if parts[0] == 0 && [0, 6, 30, 31].contains(&parts[1]) {
            let device = parts[1];
            return Err(format!("pci_slot \"{slot}\" invalid: PCI device {device} is reserved"));
        }
        if seen.contains(&parts) {
            return Err(format!("VM has multiple disks in pci_slot \"{slot}\""));
        }
        seen.push(parts);
    }
    Ok(())
}

/// The disk's name within the machine: what its path ends with, or which medium it is.
pub(super) fn name(disk: &Object, index: usize) -> String {
    let path = text(disk, "path").unwrap_or("");
    match path.starts_with("/dev/zvol/") {
        true => path.rsplit(['/', '-']).next().unwrap_or("").to_owned(),
        false => format!("m{index}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::build::tests::make;
    use super::*;

    fn with(disks: &str) -> Result<Vec<Object>, String> {
        let doc = make(&format!(r#"{{"brand":"kvm","disks":{disks}}}"#))?;
        Ok(super::super::values::objects(&doc, "disks"))
    }

    #[test]
    fn paths_are_made_and_given_only_for_what_is_there() {
        let list = with(
            r#"[{"model":"virtio","size":10,"boot":true},{"model":"ide","size":20},
            {"media":"cdrom","path":"/foo.iso","model":"ide"}]"#,
        )
        .unwrap();
        let paths: Vec<&str> = list.iter().filter_map(|d| text(d, "path")).collect();
        assert!(paths[0].ends_with("-disk0") && paths[1].ends_with("-disk1"), "{paths:?}");
        assert_eq!(paths[2], "/foo.iso");
        assert_eq!(name(&list[1], 1), "disk1");
        assert_eq!(name(&list[2], 2), "m2");
        let why = with(r#"[{"model":"virtio","size":10,"path":"/dev/sda"}]"#).unwrap_err();
        assert_eq!(why, "you cannot specify a path for a disk unless you set nocreate=true");
    }

    #[test]
    fn disks_that_cannot_be() {
        for (disks, why) in [
            (r#"[{"size":10}]"#, "missing .model option for disk: {\"size\":10}"),
            (
                r#"[{"size":10,"model":"nvme"}]"#,
                "\"nvme\" is not a valid disk model for kvm brand. Valid are: virtio,scsi,ide",
            ),
            (
                r#"[{"size":10,"model":"virtio","block_size":31337}]"#,
                "invalid .block_size(31337), must be 512-131072 and a power of 2.",
            ),
            (
                r#"[{"size":10,"model":"virtio"},{"size":1073741824,"model":"virtio"}]"#,
                "cannot create volume",
            ),
            (
                r#"[{"size":1,"model":"ide","boot":true},{"size":1,"model":"ide","boot":true}]"#,
                "multiple boot disks: ",
            ),
        ] {
            let said = with(disks).unwrap_err();
            assert!(said.starts_with(why), "{said}");
        }
        let good = with(r#"[{"size":10,"model":"virtio","block_size":"65536"}]"#).unwrap();
        assert_eq!(good[0]["block_size"], 65_536);
    }
}
