//! What `info` tells: the hypervisor's own answers in the shapes that this interface has. Pure.

use lodge_spec::request::Question;
use serde_json::{Map, Value, json};

use super::properties::Brand;
use super::values::{Object, text};

const KVM: [&str; 10] =
    ["block", "blockstats", "chardev", "cpus", "kvm", "pci", "spice", "status", "version", "vnc"];
const BHYVE: [&str; 1] = ["vnc"];

/// The kinds asked for; all where none is named.
pub(super) fn kinds(brand: Brand, asked: &[String]) -> Result<Vec<String>, String> {
    let known: &[&str] = match brand {
        Brand::Kvm => &KVM,
        Brand::Bhyve => &BHYVE,
    };
    let odd = asked.iter().find(|kind| *kind != "all" && !known.contains(&kind.as_str()));
    if let Some(odd) = odd {
        return Err(format!("unknown info type {odd}"));
    }
    let all = asked.is_empty() || asked.iter().any(|kind| kind == "all");
    let listed = |kind: &&&str| all || asked.iter().any(|asked| asked == *kind);
    Ok(known.iter().filter(listed).map(|kind| (*kind).to_owned()).collect())
}

/// What to ask the hypervisor for these kinds.
pub(super) fn questions(kinds: &[String]) -> Vec<Question> {
    kinds.iter().filter_map(|kind| kind.parse().ok()).collect()
}

/// The whole answer; `said` has a member for each question.
pub(super) fn shape(kinds: &[String], said: &Value, doc: &Object) -> Value {
    let mut answer = Map::new();
    for kind in kinds {
        let raw = said.get(kind).unwrap_or(&Value::Null);
        let value = match kind.as_str() {
            "vnc" => vnc(raw, doc),
            "spice" => json!({}),
            "status" => json!({
                "running": raw["running"],
                "singlestep": raw["singlestep"].as_bool().unwrap_or(false),
                // The guest is past its firmware's first steps as soon as it runs at all.
                "hwsetup": raw["running"],
            }),
            "version" => {
                json!({"qemu": raw["qemu"], "package": raw["package"].as_str().unwrap_or("")})
            }
            "cpus" => each(raw, cpu),
            "block" => each(raw, block),
            "blockstats" => each(raw, block_stats),
            "chardev" => each(raw, |c| json!({"label": c["label"], "filename": c["filename"]})),
            _ => raw.clone(),
        };
        answer.insert(kind.clone(), value);
    }
    Value::Object(answer)
}

fn each(list: &Value, shape: impl Fn(&Value) -> Value) -> Value {
    list.as_array().into_iter().flatten().map(shape).collect()
}

fn vnc(place: &Value, doc: &Object) -> Value {
    let Some(port) = place["port"].as_u64() else { return json!({}) };
    let mut answer = json!({"host": place["host"], "port": port});
    if let Some(display) = port.checked_sub(5900) {
        answer["display"] = display.into();
    }
    if let Some(password) = text(doc, "vnc_password") {
        answer["password"] = password.into();
    }
    answer
}

fn cpu(cpu: &Value) -> Value {
    let index = cpu["cpu-index"].as_u64().unwrap_or(0);
    json!({"CPU": index, "current": index == 0, "halted": cpu["halted"], "pc": cpu["pc"]})
}

/// The name of a drive here: the device's own, without what Lodge puts before it.
fn device(entry: &Value) -> String {
    let qdev = entry["qdev"].as_str().unwrap_or("");
    let name = qdev.split('/').find_map(|part| part.strip_prefix("disk-"));
    match (entry["device"].as_str(), name) {
        (_, Some(name)) => name.to_owned(),
        (Some(device), None) if !device.is_empty() => device.to_owned(),
        (_, None) => entry["node-name"].as_str().unwrap_or("").to_owned(),
    }
}

fn block(entry: &Value) -> Value {
    let mut answer = json!({
        "device": device(entry),
        "type": entry["type"],
        "locked": entry["locked"],
        "removable": entry["removable"],
    });
    let inserted = &entry["inserted"];
    if inserted.is_object() {
        answer["inserted"] = json!({
            "file": inserted["file"],
            "ro": inserted["ro"],
            "drv": inserted["drv"],
            "encrypted": inserted["encrypted"],
        });
        if let Some(backing) = inserted.get("backing_file") {
            answer["inserted"]["backing_file"] = backing.clone();
        }
    }
    answer
}

fn block_stats(entry: &Value) -> Value {
    let stats = &entry["stats"];
    let mut answer = json!({"device": device(entry), "stats": {
        "rd_bytes": stats["rd_bytes"],
        "wr_bytes": stats["wr_bytes"],
        "rd_operations": stats["rd_operations"],
        "wr_operations": stats["wr_operations"],
        "wr_highest_offset": stats["wr_highest_offset"],
    }});
    if entry["parent"].is_object() {
        answer["parent"] = block_stats(&entry["parent"]);
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_10_11_12_kinds() {
        let words = |list: &[&str]| list.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let three = kinds(Brand::Kvm, &words(&["block", "blockstats", "chardev"]));
        assert_eq!(three, Ok(words(&["block", "blockstats", "chardev"])));
        assert_eq!(kinds(Brand::Kvm, &words(&["all"])), Ok(words(&KVM)));
        assert_eq!(kinds(Brand::Kvm, &[]), Ok(words(&KVM)));
        assert_eq!(kinds(Brand::Bhyve, &[]), Ok(words(&["vnc"])));
        let bogus = kinds(Brand::Kvm, &words(&["bogus"]));
        assert_eq!(bogus, Err("unknown info type bogus".into()));
    }

    #[test]
    fn case_9_a_display_is_counted_from_5900() {
        let said = json!({"vnc": {"host": "127.0.0.1", "port": 20_001}});
        let answer = shape(&["vnc".into()], &said, &Object::new());
        assert_eq!(
            answer,
            json!({"vnc": {"host": "127.0.0.1", "port": 20_001, "display": 14_101}})
        );
        let low =
            shape(&["vnc".into()], &json!({"vnc": {"host": "h", "port": 80}}), &Object::new());
        assert!(low["vnc"].get("display").is_none());
        assert_eq!(shape(&["vnc".into()], &json!({}), &Object::new()), json!({"vnc": {}}));
    }
}
