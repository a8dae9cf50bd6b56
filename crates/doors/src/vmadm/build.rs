//! From a checked document to a machine as this interface keeps it: defaults, identities, disks and
//! interfaces in their full form. Pure but for the random parts, which come from `World`.

use serde_json::{Value, json};

use super::disks::{self, Disks};
use super::nics::{self, Nics};
use super::properties::{Brand, POOL};
use super::validate::Images;
use super::values::{Object, number, objects, text};

/// What is known beyond the document.
pub(crate) struct World {
    pub(super) images: Images,
    /// Names of links, each with the network that it stands for.
    pub(super) tags: std::collections::BTreeMap<String, String>,
    /// The other machines.
    pub(super) others: Vec<Object>,
    /// What the pool holds.
    pub(super) pool_mib: u64,
}

/// What the guest may read and write; kept beside the document because the guest changes it too.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Metadata {
    pub(super) customer: Object,
    pub(super) internal: Object,
}

pub(super) const NOBODY: &str = "00000000-0000-0000-0000-000000000000";
/// What the hypervisor itself is allowed beside the guest's memory, in MiB.
pub(super) const fn overhead(brand: Brand) -> i64 {
    match brand {
        Brand::Kvm => 1024,
        Brand::Bhyve => 1280,
    }
}

/// A new machine.
pub(super) fn create(
    brand: Brand,
    mut payload: Object,
    world: &World,
) -> Result<(Object, Metadata), String> {
    payload.retain(|_, value| !value.is_null());
    let mut object_of = |name: &str| match payload.remove(name) {
        Some(Value::Object(map)) => map,
        Some(_) | None => Object::new(),
    };
    let metadata = Metadata {
        customer: object_of("customer_metadata"),
        internal: object_of("internal_metadata"),
    };
    let mut doc = defaults(brand);
    doc.extend(payload.clone());
    let uuid = match text(&doc, "uuid") {
        Some(uuid) => uuid.to_owned(),
        None => uuid::Uuid::new_v4().to_string(),
    };
    if world.others.iter().any(|other| text(other, "uuid") == Some(&uuid)) {
        return Err(format!("VM with UUID {uuid} already exists"));
    }
    doc.insert("uuid".into(), uuid.clone().into());
    doc.entry("zonename").or_insert(uuid.clone().into());
    memory(brand, &payload, &mut doc);
    limits(&doc)?;
    let driver = |name: &str| text(&doc, name).map(str::to_owned);
    let mut disks =
        Disks { brand, uuid: &uuid, driver: driver("disk_driver"), world, list: Vec::new() };
    for disk in objects(&doc, "disks") {
        disks.add(disk)?;
    }
    disks::check(brand, &disks.list)?;
    let mut nics = Nics { brand, driver: driver("nic_driver"), world, list: Vec::new() };
    for nic in objects(&doc, "nics") {
        nics.add(nic)?;
    }
    nics.settle_primary()?;
    let (disks, nics) = (disks.list, nics.list);
    nics::conflicts(&doc, &nics, world)?;
    doc.insert("disks".into(), json!(disks));
    doc.insert("nics".into(), json!(nics));
    Ok((doc, metadata))
}

fn defaults(brand: Brand) -> Object {
    let quota = match brand {
        Brand::Kvm => 10,
        Brand::Bhyve => 1,
    };
    let defaults = json!({
        "brand": brand.as_str(),
        "autoboot": true,
        "billing_id": NOBODY,
        "cpu_shares": 100,
        "disks": [],
        "firewall_enabled": false,
        "limit_priv":
            ["default", "-file_link_any", "-net_access", "-proc_fork", "-proc_info", "-proc_session"],
        "max_lwps": 2000,
        "max_msg_ids": 4096,
        "max_sem_ids": 4096,
        "max_shm_ids": 4096,
        "nics": [],
        "owner_uuid": NOBODY,
        "quota": quota,
        "ram": 256,
        "resolvers": [],
        "routes": {},
        "tags": {},
        "vcpus": 1,
        "zfs_io_priority": 100,
        "zfs_root_recsize": 131_072,
        "zpool": POOL,
    });
    match defaults {
        Value::Object(map) => map,
        _ => Object::new(),
    }
}

/// What follows from the guest's memory where the document does not say.
fn memory(brand: Brand, payload: &Object, doc: &mut Object) {
    let ram = number(doc, "ram").unwrap_or(256);
    let asked = |name: &str| number(payload, name);
    let all = ram + overhead(brand);
    let physical = asked("max_physical_memory").unwrap_or(all);
    let shared = asked("max_shm_memory").unwrap_or(physical);
    let physical = physical.max(ram + 256);
    let locked = asked("max_locked_memory").unwrap_or(physical).min(physical);
    let swap = asked("max_swap").unwrap_or(physical).max(physical);
    set_memory(doc, physical, locked, swap);
    doc.insert("max_shm_memory".into(), shared.into());
}

pub(super) fn set_memory(doc: &mut Object, physical: i64, locked: i64, swap: i64) {
    doc.insert("max_physical_memory".into(), physical.into());
    doc.insert("max_locked_memory".into(), locked.into());
    doc.insert("max_swap".into(), swap.into());
}

/// Values that no machine here could have.
pub(super) fn limits(doc: &Object) -> Result<(), String> {
    for name in ["vnc_password", "spice_password"] {
        if text(doc, name).is_some_and(|password| password.len() > 8) {
            let kind = if name.starts_with("vnc") { "VNC" } else { "SPICE" };
            return Err(format!("{kind} password is too long, maximum length is 8 characters."));
        }
    }
    const CARDS: [&str; 5] = ["cirrus", "std", "vmware", "qxl", "xenfb"];
    if let Some(vga) = text(doc, "vga").filter(|vga| !CARDS.contains(vga)) {
        let known = CARDS.join(", ");
        return Err(format!("Invalid VGA type: \"{vga}\", supported types are: {known}"));
    }
    if let Some(text) = text(doc, "boot") {
        super::draft::boot_order(text)?;
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::vmadm) fn world() -> World {
        let tag = |name: &str| (name.to_owned(), name.to_owned());
        World {
            images: Images::new(),
            tags: [tag("admin"), tag("external")].into(),
            others: Vec::new(),
            pool_mib: 1 << 20,
        }
    }

    pub(in crate::vmadm) fn object(text: &str) -> Object {
        serde_json::from_str::<Value>(text).unwrap().as_object().unwrap().clone()
    }

    pub(in crate::vmadm) fn make(text: &str) -> Result<Object, String> {
        let payload = object(text);
        let brand = Brand::of(payload["brand"].as_str().unwrap()).unwrap();
        let (payload, _) =
            super::super::validate::clean(super::super::validate::Action::Create, brand, &payload);
        create(brand, payload, &world()).map(|(doc, _)| doc)
    }

    #[test]
    fn memory_follows_the_guests() {
        for (text, wanted) in [
            (r#"{"brand":"kvm"}"#, [1280, 1280, 1280, 1280]),
            (r#"{"brand":"kvm","ram":128}"#, [1152; 4]),
            (r#"{"brand":"kvm","ram":1024}"#, [2048; 4]),
            (r#"{"brand":"bhyve","ram":1024}"#, [2304; 4]),
            (
                r#"{"brand":"kvm","ram":256,"max_physical_memory":256,"max_swap":512}"#,
                [512, 512, 512, 256],
            ),
        ] {
            let doc = make(text).unwrap();
            let names = ["max_physical_memory", "max_locked_memory", "max_swap", "max_shm_memory"];
            assert_eq!(names.map(|name| number(&doc, name).unwrap()), wanted, "{text}");
        }
    }

    #[test]
    fn values_that_no_machine_has() {
        let long = make(r#"{"brand":"kvm","vnc_password":"123456789"}"#).unwrap_err();
        assert_eq!(long, "VNC password is too long, maximum length is 8 characters.");
        let vga = make(r#"{"brand":"kvm","vga":"voodoo"}"#).unwrap_err();
        assert!(vga.starts_with("Invalid VGA type: \"voodoo\", supported types are: "), "{vga}");
    }
}
