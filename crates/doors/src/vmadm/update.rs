//! What an update makes of a machine. Pure: document in, document out, or why not.

use serde_json::{Value, json};

use super::build::{Metadata, World, limits, overhead, set_memory};
use super::disks::{self, Disks};
use super::nics::{self, Nics, complete};
use super::properties::Brand;
use super::values::{Object, is_true, mac, number, objects, text, texts};

/// A machine, the state that it is in included.
pub(super) struct Subject {
    pub(super) doc: Object,
    pub(super) metadata: Metadata,
    /// Shown in refusals.
    pub(super) state: String,
    pub(super) stopped: bool,
}

/// Applies a cleaned document.
pub(super) fn apply(
    brand: Brand,
    subject: Subject,
    mut payload: Object,
    world: &World,
) -> Result<(Object, Metadata), String> {
    let Subject { mut doc, mut metadata, state, stopped } = subject;
    lists(&payload)?;
    let mut maps = [
        ("customer_metadata", std::mem::take(&mut metadata.customer)),
        ("internal_metadata", std::mem::take(&mut metadata.internal)),
        ("tags", object_of(&mut doc, "tags")),
        ("routes", object_of(&mut doc, "routes")),
    ];
    for (name, map) in &mut maps {
        for key in texts(&payload, &format!("remove_{name}")) {
            map.remove(&key);
        }
        if let Some(Value::Object(set)) = payload.remove(&format!("set_{name}")) {
            map.extend(set);
        }
        payload.remove(&format!("remove_{name}"));
    }
    let [(_, customer), (_, internal), (_, tags), (_, routes)] = maps;
    doc.insert("tags".into(), tags.into());
    doc.insert("routes".into(), routes.into());
    disks(brand, &mut doc, &mut payload, world, (stopped, &state))?;
    nics(brand, &mut doc, &mut payload, world)?;
    if payload.contains_key("pci_devices") && !stopped {
        return Err(format!(
            "updates to pci_devices are only allowed when state is \"stopped\", \
                            currently: {state} ({state})"
        ));
    }
    for (name, value) in &payload {
        match value {
            Value::Null => drop(doc.remove(name)),
            value => drop(doc.insert(name.clone(), value.clone())),
        }
    }
    memory(brand, &payload, &mut doc)?;
    limits(&doc)?;
    nics::conflicts(&doc, &objects(&doc, "nics"), world)?;
    Ok((doc, Metadata { customer, internal }))
}

fn lists(payload: &Object) -> Result<(), String> {
    for name in
        ["add_disks", "update_disks", "remove_disks", "add_nics", "update_nics", "remove_nics"]
    {
        if payload.get(name).is_some_and(|value| !value.is_array()) {
            return Err(format!("{name} must be an array."));
        }
    }
    Ok(())
}

fn object_of(doc: &mut Object, name: &str) -> Object {
    match doc.remove(name) {
        Some(Value::Object(map)) => map,
        Some(_) | None => Object::new(),
    }
}

fn memory(brand: Brand, payload: &Object, doc: &mut Object) -> Result<(), String> {
    let asked = |name: &str| number(payload, name);
    let ram = number(doc, "ram").unwrap_or(256);
    let of = |doc: &Object, name: &str| number(doc, name).unwrap_or(0);
    let follow = asked("ram").map(|ram| ram + overhead(brand));
    let value = |name: &str| asked(name).or(follow).unwrap_or_else(|| of(doc, name));
    let physical = value("max_physical_memory");
    let locked = value("max_locked_memory").min(physical);
    let swap = value("max_swap").max(physical);
    for (name, value) in
        [("max_physical_memory", physical), ("max_locked_memory", locked), ("max_swap", swap)]
    {
        if value < ram {
            return Err(format!("vm.{name} ({value}) cannot be lower than vm.ram ({ram})"));
        }
    }
    set_memory(doc, physical, locked, swap);
    Ok(())
}

fn disks(
    brand: Brand,
    doc: &mut Object,
    payload: &mut Object,
    world: &World,
    (stopped, state): (bool, &str),
) -> Result<(), String> {
    let adds = objects(payload, "add_disks");
    let removes = texts(payload, "remove_disks");
    let updates = objects(payload, "update_disks");
    for name in ["add_disks", "remove_disks", "update_disks"] {
        payload.remove(name);
    }
    let moves = !adds.is_empty() || !removes.is_empty();
    if moves && !stopped {
        return Err(format!(
            "updates to disks are only allowed when state is \"stopped\", currently: {state} ({state})"
        ));
    }
    let live = |disk: &Object| {
        disk.keys().all(|k| matches!(k.as_str(), "compression" | "path" | "refreservation"))
    };
    if !stopped && !updates.iter().all(live) {
        return Err(format!(
            "at least one specified update to disks is only allowed when state is \"stopped\", \
             currently: {state} ({state})"
        ));
    }
    let mut list = objects(doc, "disks");
    for update in updates {
        let path = text(&update, "path").ok_or("disk object needs a .path property to update")?;
        let at = list.iter().position(|disk| text(disk, "path") == Some(path));
        let at = at.ok_or_else(|| format!("There is no existing disk with the path {path}"))?;
        update_disk(brand, &mut list[at], update.clone())?;
    }
    list.retain(|disk| !removes.iter().any(|path| text(disk, "path") == Some(path)));
    let uuid = text(doc, "uuid").unwrap_or("").to_owned();
    let driver = text(payload, "disk_driver").or(text(doc, "disk_driver")).map(str::to_owned);
    let mut all = Disks { brand, uuid: &uuid, driver, world, list };
    for disk in adds {
        all.add(disk)?;
    }
    disks::check(brand, &all.list)?;
    doc.insert("disks".into(), json!(all.list));
    Ok(())
}

fn update_disk(brand: Brand, disk: &mut Object, mut update: Object) -> Result<(), String> {
    let shrink = update.remove("dangerous_allow_shrink").is_some_and(|v| v == true);
    if let (Some(old), Some(new)) = (number(disk, "size"), number(&update, "size"))
        && new < old
        && !shrink
    {
        return Err(format!(
            "cannot resize disk: new size must be greater than current size. ({old} > {new})"
        ));
    }
    if number(disk, "size").is_some_and(|old| number(&update, "size").is_some_and(|n| n < old)) {
        return Err("a disk cannot be made smaller here; add a new one and copy".into());
    }
    if let Some(model) = text(&update, "model") {
        disks::check_model(brand, model)?;
    }
    for (name, value) in update {
        match value {
            Value::Null => drop(disk.remove(&name)),
            value => drop(disk.insert(name, value)),
        }
    }
    Ok(())
}

fn nics(brand: Brand, doc: &mut Object, payload: &mut Object, world: &World) -> Result<(), String> {
    let adds = objects(payload, "add_nics");
    let removes: Vec<String> =
        texts(payload, "remove_nics").iter().filter_map(|text| mac(text)).collect();
    let updates = objects(payload, "update_nics");
    for name in ["add_nics", "remove_nics", "update_nics"] {
        payload.remove(name);
    }
    let driver = text(payload, "nic_driver").or(text(doc, "nic_driver")).map(str::to_owned);
    let mut all = Nics { brand, driver, world, list: objects(doc, "nics") };
    for update in updates {
        let mac = text(&update, "mac").ok_or("NIC object needs a .mac property to update")?;
        let at = all.list.iter().position(|nic| text(nic, "mac") == Some(mac));
        let at = at.ok_or("There is no existing NIC with that mac address")?;
        if let Some(primary) = update.get("primary") {
            if *primary != true {
                let why = format!("invalid value for NIC's primary flag: {primary} (must be true)");
                return Err(why);
            }
            demote(&mut all.list);
        }
        all.list[at] = complete(brand, merged(&all.list[at], update.clone()), None, world)?;
    }
    let before = all.list.len();
    all.list.retain(|nic| !removes.iter().any(|mac| text(nic, "mac") == Some(mac)));
    let removed = before != all.list.len();
    for nic in adds {
        if is_true(&nic, "primary") {
            demote(&mut all.list);
        }
        all.add(nic)?;
    }
    if removed && !all.list.iter().any(|nic| is_true(nic, "primary")) {
        nics::promote(&mut all.list);
    }
    all.check()?;
    all.settle_primary()?;
    doc.insert("nics".into(), json!(all.list));
    Ok(())
}

fn demote(list: &mut [Object]) {
    for nic in list {
        nic.remove("primary");
    }
}

/// An interface with what was said of it; addresses are taken from the newer of their two forms.
fn merged(nic: &Object, update: Object) -> Object {
    let mut nic = nic.clone();
    if update.contains_key("ip") || update.contains_key("netmask") {
        nic.remove("ips");
    }
    if update.contains_key("ips") {
        nic.remove("ip");
        nic.remove("netmask");
    }
    if update.contains_key("gateway") || update.contains_key("gateways") {
        nic.remove("gateway");
        nic.remove("gateways");
    }
    for (name, value) in update {
        match value {
            Value::Null => drop(nic.remove(&name)),
            value => drop(nic.insert(name, value)),
        }
    }
    nic
}

#[cfg(test)]
mod tests {
    use super::super::build::tests::{make, object, world};
    use super::super::validate::{Action, clean};
    use super::*;

    const BASE: &str = r#"{"brand":"kvm","ram":256,"alias":"web","quota":5,
        "uuid":"b8ab5fc1-8576-45ef-bb51-9826b52a4651",
        "disks":[{"size":1024,"model":"virtio"}],
        "nics":[{"nic_tag":"admin","model":"virtio","mac":"02:08:20:00:00:01","ip":"10.0.0.1",
        "netmask":"255.0.0.0"},{"nic_tag":"admin","mac":"02:08:20:00:00:02","ip":"8.8.8.8",
        "netmask":"255.0.0.0"}]}"#;

    fn subject(stopped: bool) -> Subject {
        let state = if stopped { "stopped" } else { "running" };
        Subject {
            doc: make(BASE).unwrap(),
            metadata: Metadata { customer: object(r#"{"k":"v"}"#), internal: Object::new() },
            state: state.into(),
            stopped,
        }
    }

    fn update(stopped: bool, text: &str) -> Result<Object, String> {
        let (payload, _) = clean(Action::Update, Brand::Kvm, &object(text));
        apply(Brand::Kvm, subject(stopped), payload, &world()).map(|(doc, _)| doc)
    }

    #[test]
    fn cases_58_59_69_disks() {
        let doc = update(true, r#"{"add_disks":[{"size":1024}]}"#).unwrap();
        let disk = doc["disks"][1].as_object().unwrap();
        assert_eq!(disk["model"], "virtio");
        assert!(text(disk, "path").unwrap().ends_with("-disk1"));
        let path = subject(true).doc["disks"][0]["path"].clone();
        let remove = json!({"remove_disks": [path]}).to_string();
        let running = update(false, &remove).unwrap_err();
        assert!(running.contains("currently: running (running)"), "{running}");
        assert_eq!(update(true, &remove).unwrap()["disks"], json!([]));
        for size in ["256", "132096", "31337"] {
            let add = format!(r#"{{"add_disks":[{{"size":10,"block_size":{size}}}]}}"#);
            assert!(update(true, &add).unwrap_err().contains("power of 2"), "{size}");
        }
        let quoted = update(true, r#"{"add_disks":[{"size":10,"block_size":"65536"}]}"#).unwrap();
        assert_eq!(quoted["disks"][1]["block_size"], 65_536);
        let live = json!({"update_disks": [{"path": path, "compression": "lz4"}]}).to_string();
        assert_eq!(update(false, &live).unwrap()["disks"][0]["compression"], "lz4");
        let boot = json!({"update_disks": [{"path": path, "boot": true}]}).to_string();
        assert!(update(false, &boot).unwrap_err().starts_with("at least one specified update"));
    }

    #[test]
    fn cases_60_to_64_numbers_and_nothing() {
        let of = |text: &str, name: &str| number(&update(true, text).unwrap(), name);
        for name in ["max_physical_memory", "max_locked_memory", "max_swap"] {
            assert_eq!(of(r#"{"ram":"512"}"#, name), Some(1536), "{name}");
        }
        assert_eq!(of(r#"{"max_swap":1216}"#, "max_swap"), Some(1280));
        assert_eq!(of(r#"{"max_locked_memory":1536}"#, "max_locked_memory"), Some(1280));
        assert_eq!(of(r#"{"quota":0}"#, "quota"), Some(0));
        assert!(!update(true, r#"{"alias":null}"#).unwrap().contains_key("alias"));
        let low = update(true, r#"{"max_physical_memory":128}"#).unwrap_err();
        assert_eq!(low, "vm.max_physical_memory (128) cannot be lower than vm.ram (256)");
    }

    #[test]
    fn cases_65_66_primaries() {
        let first = r#"{"update_nics":[{"mac":"02:08:20:00:00:01","primary":false}]}"#;
        let why = update(true, first).unwrap_err();
        assert_eq!(why, "invalid value for NIC's primary flag: false (must be true)");
        let second = r#"{"update_nics":[{"mac":"02:08:20:00:00:02","primary":true}]}"#;
        let doc = update(true, second).unwrap();
        assert!(doc["nics"][0].get("primary").is_none() && doc["nics"][1]["primary"] == true);
        let gone = update(true, r#"{"remove_nics":["2:8:20:0:0:1"]}"#).unwrap();
        assert_eq!(gone["nics"].as_array().unwrap().len(), 1);
        assert_eq!(gone["nics"][0]["primary"], true);
        let none = update(true, r#"{"update_nics":[{"mac":"02:08:20:00:00:09","ip":"dhcp"}]}"#);
        assert_eq!(none.unwrap_err(), "There is no existing NIC with that mac address");
        let moved = update(
            false,
            r#"{"update_nics":[{"mac":"02:08:20:00:00:01","ip":"10.0.0.9","gateway":"10.0.0.254"}]}"#,
        );
        let moved = moved.unwrap();
        assert_eq!(moved["nics"][0]["ips"], json!(["10.0.0.9/8"]));
        assert_eq!(moved["nics"][0]["gateways"], json!(["10.0.0.254"]));
    }

    #[test]
    fn maps_are_merged_and_setting_wins() {
        let payload = r#"{"set_tags":{"a":1,"b":"x"},"remove_customer_metadata":["k","none"],
            "set_customer_metadata":{"n":true},"set_routes":{"10.2.0.0/16":"10.0.0.7"}}"#;
        let (payload, _) = clean(Action::Update, Brand::Kvm, &object(payload));
        let (doc, metadata) = apply(Brand::Kvm, subject(false), payload, &world()).unwrap();
        assert_eq!(doc["tags"], json!({"a": 1, "b": "x"}));
        assert_eq!(Value::Object(metadata.customer), json!({"n": true}));
        assert_eq!(doc["routes"], json!({"10.2.0.0/16": "10.0.0.7"}));
    }
}
