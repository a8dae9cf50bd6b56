//! Whether a document could be carried out: which properties may not stand in it, which values are
//! none, what is missing. Looks at each by itself; what concerns several machines is elsewhere.

use std::collections::BTreeMap;

use lodge_spec::problem::nearest;
use serde_json::{Value, json};

use super::properties::{Brand, DISK, Kind, MACHINE, NIC, Property, find};
use super::values::{Object, is_true, number, take, text};

/// An image on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Image {
    /// Its name here.
    pub(super) name: String,
    /// MiB.
    pub(super) size: i64,
    /// It brings a kernel of its own, which is booted without firmware.
    pub(super) direct: bool,
}

/// By their identity.
pub(super) type Images = BTreeMap<String, Image>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Create,
    Update,
    /// Nothing may be said.
    Unknown,
}

impl Action {
    pub(super) fn of(text: &str) -> Self {
        match text {
            "create" => Self::Create,
            "update" => Self::Update,
            _ => Self::Unknown,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) values: Vec<String>,
    pub(super) properties: Vec<String>,
    pub(super) missing: Vec<String>,
}

impl Verdict {
    pub(super) fn is_good(&self) -> bool {
        self == &Self::default()
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "bad_values": self.values,
            "bad_properties": self.properties,
            "missing_properties": self.missing,
        })
    }

    fn note(list: &mut Vec<String>, name: String) {
        if !list.contains(&name) {
            list.push(name);
        }
    }
}

/// Judges a document.
pub(super) fn check(action: Action, brand: Brand, payload: &Object, images: &Images) -> Verdict {
    let mut verdict = Verdict::default();
    for (name, value) in payload {
        let property = find(MACHINE, name);
        let allowed = property.is_some_and(|p| p.owners.holds(brand) && stands(p, action));
        if !allowed {
            Verdict::note(&mut verdict.properties, name.clone());
        }
        let Some(property) = property.filter(|_| action != Action::Unknown) else { continue };
        if take(property.kind, value).is_err() {
            Verdict::note(&mut verdict.values, name.clone());
            continue;
        }
        if property.kind == Kind::Objects {
            let list = value.as_array().into_iter().flatten().filter_map(Value::as_object);
            for (i, item) in list.enumerate() {
                check_item(&mut verdict, brand, payload, images, (name, i), item);
            }
        }
    }
    verdict
}

fn stands(property: &Property, action: Action) -> bool {
    match action {
        Action::Create => property.create,
        Action::Update => property.update,
        Action::Unknown => false,
    }
}

fn check_item(
    verdict: &mut Verdict,
    brand: Brand,
    payload: &Object,
    images: &Images,
    (list, i): (&str, usize),
    item: &Object,
) {
    let (family, table) = match list.rsplit('_').next() {
        Some("disks") => ("disks", DISK),
        Some("nics") => ("nics", NIC),
        _ => return,
    };
    let update = list.starts_with("update_");
    for (name, value) in item {
        let property = find(table, name);
        let grows = name == "size" && brand == Brand::Bhyve && family == "disks";
        let stands = property.is_some_and(|p| {
            p.owners.holds(brand) && if update { p.update || grows } else { p.create }
        });
        if !stands {
            Verdict::note(&mut verdict.properties, format!("{family}.*.{name}"));
        } else if property.is_some_and(|p| take(p.kind, value).is_err()) {
            Verdict::note(&mut verdict.values, format!("{family}.*.{name}"));
        }
    }
    if family == "disks" && !update {
        check_disk(verdict, payload, images, &|name| format!("{list}.{i}.{name}"), item);
    }
}

/// What a new disk's properties say of each other.
fn check_disk(
    verdict: &mut Verdict,
    payload: &Object,
    images: &Images,
    at: &dyn Fn(&str) -> String,
    disk: &Object,
) {
    let has = |name: &str| disk.get(name).is_some_and(|value| !value.is_null());
    if text(disk, "media") == Some("cdrom") {
        return;
    }
    let Some(image) = text(disk, "image_uuid") else {
        if has("image_size") {
            Verdict::note(&mut verdict.properties, at("image_size"));
        }
        let there = disk.get("nocreate").is_some_and(|v| super::values::boolean(v) == Some(true));
        if !has("size") && !there {
            Verdict::note(&mut verdict.missing, at("size"));
        }
        return;
    };
    if has("size") && !payload.contains_key("flexible_disk_size") {
        Verdict::note(&mut verdict.properties, at("size"));
    }
    if has("block_size") {
        Verdict::note(&mut verdict.properties, at("block_size"));
    }
    let asked = disk.get("image_size").and_then(|v| take(Kind::Integer(1, i64::MAX), v).ok()?);
    match (images.get(image), asked.and_then(|v| v.as_i64())) {
        (None, asked) => {
            Verdict::note(&mut verdict.values, at("image_uuid"));
            if asked.is_none() {
                Verdict::note(&mut verdict.missing, at("image_size"));
            }
        }
        (Some(image), Some(asked)) if asked != image.size => {
            Verdict::note(&mut verdict.values, at("image_size"));
        }
        (Some(_), _) => {}
    }
}

/// The document with values of their types and without what may not stand there; what was left out
/// is told, with what may have been meant.
pub(super) fn clean(action: Action, brand: Brand, payload: &Object) -> (Object, Vec<String>) {
    let mut left_out = Vec::new();
    let stands = |p: &Property| stands(p, action);
    let mut cleaned = clean_with(MACHINE, brand, payload, &stands, "", &mut left_out);
    for (name, value) in &mut cleaned {
        let table = match name.rsplit('_').next() {
            Some("disks") if value.is_array() && name != "remove_disks" => DISK,
            Some("nics") if value.is_array() && name != "remove_nics" => NIC,
            _ => continue,
        };
        let update = name.starts_with("update_");
        let stands = |p: &Property| {
            let grows = p.name == "size" && brand == Brand::Bhyve;
            if update { p.update || grows } else { p.create || p.name == "size" }
        };
        for item in value.as_array_mut().into_iter().flatten() {
            let Some(object) = item.as_object() else { continue };
            let prefix = format!("{name}.*.");
            let cleaned = clean_with(table, brand, object, &stands, &prefix, &mut left_out);
            *item = Value::Object(cleaned);
        }
    }
    (cleaned, left_out)
}

fn clean_with(
    table: &'static [Property],
    brand: Brand,
    object: &Object,
    stands: &dyn Fn(&Property) -> bool,
    prefix: &str,
    left_out: &mut Vec<String>,
) -> Object {
    let mut cleaned = Object::new();
    for (name, value) in object {
        let known = find(table, name).filter(|p| p.owners.holds(brand) && stands(p));
        let Some(property) = known else {
            let names = table.iter().filter(|p| p.owners.holds(brand) && stands(p));
            let near = nearest(name, names.map(|p| p.name));
            left_out.push(match near {
                Some(near) => format!("{prefix}{name} (did you mean {near}?)"),
                None => format!("{prefix}{name}"),
            });
            continue;
        };
        let value = match take(property.kind, value) {
            Ok(Some(value)) => value,
            // Says that there is none; an update takes it away.
            Ok(None) | Err(()) => Value::Null,
        };
        cleaned.insert(name.clone(), value);
    }
    cleaned
}

/// Faults that end a creation at once.
pub(super) fn refuse(verdict: &Verdict) -> Result<(), String> {
    if !verdict.values.is_empty() {
        return Err(format!("Invalid value(s) for: {}", verdict.values.join(",")));
    }
    // A disk that only lacks its image's size is filled in.
    if !verdict.missing.is_empty() {
        return Err(format!("Missing required properties: {}", verdict.missing.join(",")));
    }
    Ok(())
}

/// Warnings about what is kept and has no effect.
pub(super) fn inert(payload: &Object) -> Vec<&'static str> {
    let given = |name: &&&str| payload.get(**name).is_some_and(|value| !value.is_null());
    let spice_off = number(payload, "spice_port").is_some_and(|port| port <= 0);
    let list = super::properties::INERT.iter().filter(given).copied();
    list.filter(|name| !(spice_off && *name == "spice_port")).collect()
}

/// Whether a machine may not be taken away.
pub(super) fn protected(doc: &Object) -> Option<&'static str> {
    ["indestructible_zoneroot", "indestructible_delegated"].into_iter().find(|n| is_true(doc, n))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &str = "01b2c898-945f-11e1-a523-af1afbe22822";
    const OTHER: &str = "11b2c898-945f-11e1-a523-af1afbe22822";

    fn judge(action: Action, brand: Brand, text: &str) -> Verdict {
        let payload: Value = serde_json::from_str(text).unwrap();
        let image = Image { name: "a".into(), size: 5120, direct: false };
        let images = [(KNOWN.to_owned(), image)].into();
        check(action, brand, payload.as_object().unwrap(), &images)
    }

    fn create(text: &str) -> Verdict {
        judge(Action::Create, Brand::Kvm, text)
    }

    fn verdict(values: &[&str], properties: &[&str], missing: &[&str]) -> Verdict {
        let list = |names: &[&str]| {
            let mut list: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
            list.sort();
            list
        };
        Verdict { values: list(values), properties: list(properties), missing: list(missing) }
    }

    fn same(left: Verdict, right: Verdict) {
        let sort = |mut v: Verdict| {
            v.values.sort();
            v.properties.sort();
            v.missing.sort();
            v
        };
        assert_eq!(sort(left), right);
    }

    #[test]
    fn cases_25_28_to_32_disks() {
        let disks = |disk: &str| create(&format!(r#"{{"brand":"kvm","disks":[{disk}]}}"#));
        same(create(r#"{"brand":"kvm"}"#), verdict(&[], &[], &[]));
        same(disks(r#"{"model":"virtio"}"#), verdict(&[], &[], &["disks.0.size"]));
        same(
            disks(&format!(r#"{{"model":"virtio","image_uuid":"{OTHER}","size":10}}"#)),
            verdict(&["disks.0.image_uuid"], &["disks.0.size"], &["disks.0.image_size"]),
        );
        same(
            disks(r#"{"model":"virtio","size":5,"image_size":10}"#),
            verdict(&[], &["disks.0.image_size"], &[]),
        );
        same(
            disks(&format!(r#"{{"model":"virtio","image_uuid":"{OTHER}","image_size":5120}}"#)),
            verdict(&["disks.0.image_uuid"], &[], &[]),
        );
        same(
            disks(&format!(r#"{{"image_uuid":"{KNOWN}","image_size":5121}}"#)),
            verdict(&["disks.0.image_size"], &[], &[]),
        );
        assert!(disks(&format!(r#"{{"image_uuid":"{KNOWN}"}}"#)).is_good());
        let sized = format!(r#"{{"image_uuid":"{KNOWN}","image_size":5120,"block_size":8192}}"#);
        same(disks(&sized), verdict(&[], &["disks.0.block_size"], &[]));
        assert!(disks(r#"{"media":"cdrom","path":"/a.iso","model":"ide"}"#).is_good(), "case 46");
    }

    #[test]
    fn cases_33_to_41_values_and_names() {
        let bad = r#"{"brand":"kvm","vcpus":1.5,"ram":"abc","autoboot":"aardvark","alias":42}"#;
        same(create(bad), verdict(&["vcpus", "ram", "autoboot", "alias"], &[], &[]));
        let good = r#"{"brand":"kvm","ram":"1024","vcpus":"2","autoboot":"true"}"#;
        assert!(create(good).is_good(), "case 34");
        same(create(r#"{"brand":"kvm","vcpus":0}"#), verdict(&["vcpus"], &[], &[]));
        same(
            create(r#"{"brand":"kvm","nics":[{"vlan_id":4096,"mtu":500,"mac":"zz"}]}"#),
            verdict(&["nics.*.vlan_id", "nics.*.mtu", "nics.*.mac"], &[], &[]),
        );
        for nested in [r#"{"a":{"b":1}}"#, r#"{"a":null}"#] {
            let text = format!(r#"{{"brand":"kvm","customer_metadata":{nested}}}"#);
            same(create(&text), verdict(&["customer_metadata"], &[], &[]));
        }
        let flat = r#"{"brand":"kvm","customer_metadata":{"a":"x","b":true,"c":42}}"#;
        assert!(create(flat).is_good(), "case 37");
        let resolvers = |list: &str| create(&format!(r#"{{"brand":"kvm","resolvers":{list}}}"#));
        same(resolvers(r#"["8.8.8.8","nope"]"#), verdict(&["resolvers"], &[], &[]));
        assert!(resolvers(r#""8.8.8.8,8.8.4.4""#).is_good(), "case 38");
        let upper = format!(r#"{{"brand":"kvm","uuid":"{}"}}"#, KNOWN.to_uppercase());
        same(create(&upper), verdict(&["uuid"], &[], &[]));
        same(
            create(r#"{"brand":"kvm","max_swap":128,"vnc_port":-2}"#),
            verdict(&["max_swap", "vnc_port"], &[], &[]),
        );
        same(
            create(r#"{"brand":"kvm","bootrom":"uefi","dns_domain":"a","tmpfs":1,"nosuch":2}"#),
            verdict(&[], &["bootrom", "dns_domain", "tmpfs", "nosuch"], &[]),
        );
    }

    #[test]
    fn cases_42_to_45_updates() {
        let update = |brand, text: &str| judge(Action::Update, brand, text);
        let uuid = r#"{"uuid":"doogle","alias":"foo"}"#;
        same(update(Brand::Kvm, uuid), verdict(&["uuid"], &["uuid"], &[]));
        let grow = r#"{"update_disks":[{"path":"/x","size":5}]}"#;
        same(update(Brand::Kvm, grow), verdict(&[], &["disks.*.size"], &[]));
        let shrink = r#"{"update_disks":[{"path":"/x","size":5,"dangerous_allow_shrink":true}]}"#;
        assert!(update(Brand::Bhyve, shrink).is_good());
        let plain = r#"{"customer_metadata":{"a":"b"}}"#;
        same(update(Brand::Kvm, plain), verdict(&[], &["customer_metadata"], &[]));
        let unknown = judge(Action::Unknown, Brand::Kvm, r#"{"brand":"kvm","ram":"abc"}"#);
        same(unknown, verdict(&[], &["brand", "ram"], &[]));
    }

    #[test]
    fn what_is_left_out_is_named_with_what_was_meant() {
        let payload: Value = serde_json::from_str(
            r#"{"brand":"kvm","rma":5,"ram":"64","nics":[{"nic_tga":"x","primary":1}]}"#,
        )
        .unwrap();
        let (cleaned, left_out) = clean(Action::Create, Brand::Kvm, payload.as_object().unwrap());
        assert_eq!(cleaned["ram"], 64);
        assert_eq!(cleaned["nics"][0]["primary"], true);
        assert_eq!(left_out, ["rma (did you mean ram?)", "nics.*.nic_tga (did you mean nic_tag?)"]);
    }
}
