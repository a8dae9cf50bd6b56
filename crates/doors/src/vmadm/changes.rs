//! What has changed between two sights of a machine, and how `events` tells it. Pure.

use serde_json::{Value, json};

use super::values::{Object, text};
use super::view::timestamp;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Change {
    path: Vec<Value>,
    action: &'static str,
    old: Value,
    new: Value,
}

/// All differences, by path.
pub(super) fn between(old: &Object, new: &Object) -> Vec<Change> {
    let mut list = Vec::new();
    objects(&[], old, new, &mut list);
    list
}

fn objects(path: &[Value], old: &Object, new: &Object, list: &mut Vec<Change>) {
    let mut names: Vec<&String> = old.keys().chain(new.keys()).collect();
    names.sort();
    names.dedup();
    for name in names {
        let here: Vec<Value> = path.iter().cloned().chain([name.clone().into()]).collect();
        values(&here, old.get(name), new.get(name), list);
    }
}

fn values(path: &[Value], old: Option<&Value>, new: Option<&Value>, list: &mut Vec<Change>) {
    let mut add = |action, old: Option<&Value>, new: Option<&Value>| {
        let value = |value: Option<&Value>| value.cloned().unwrap_or_default();
        list.push(Change { path: path.to_vec(), action, old: value(old), new: value(new) });
    };
    match (old, new) {
        (Some(old), Some(new)) if old == new => {}
        (Some(Value::Object(old)), Some(Value::Object(new))) => objects(path, old, new, list),
        (Some(Value::Array(old)), Some(Value::Array(new))) => {
            for i in 0..old.len().max(new.len()) {
                let here: Vec<Value> = path.iter().cloned().chain([i.into()]).collect();
                values(&here, old.get(i), new.get(i), list);
            }
        }
        (Some(_), Some(_)) => add("changed", old, new),
        (None, Some(_)) => add("added", old, new),
        (Some(_), None) => add("removed", old, new),
        (None, None) => {}
    }
}

impl Change {
    fn pretty_path(&self) -> String {
        let parts: Vec<String> =
            self.path.iter().map(|p| p.as_str().map_or(p.to_string(), str::to_owned)).collect();
        parts.join(".")
    }

    fn to_json(&self) -> Value {
        json!({
            "path": self.path,
            "prettyPath": self.pretty_path(),
            "action": self.action,
            "oldValue": self.old,
            "newValue": self.new,
        })
    }
}

/// Something that `events` tells.
pub(super) struct Told<'a> {
    /// `create`, `modify`, `delete` or `ready`.
    pub(super) kind: &'a str,
    pub(super) at_us: i64,
    pub(super) uuid: &'a str,
    pub(super) vm: Option<&'a Object>,
    pub(super) changes: &'a [Change],
}

impl Told<'_> {
    pub(super) fn to_json(&self) -> Value {
        let mut event = json!({"type": self.kind, "date": timestamp(self.at_us)});
        if self.kind != "ready" {
            event["zonename"] = self.uuid.into();
            event["uuid"] = self.uuid.into();
        }
        if let Some(vm) = self.vm {
            event["vm"] = Value::Object(vm.clone());
        }
        if !self.changes.is_empty() {
            event["changes"] = self.changes.iter().map(Change::to_json).collect();
        }
        event
    }

    /// Lines for people; `full`: nothing is cut.
    pub(super) fn to_text(&self, full: bool) -> String {
        let date = timestamp(self.at_us);
        let alias = self.vm.and_then(|vm| text(vm, "alias")).unwrap_or("-");
        let base = match full {
            true => format!("[{date}] {} {alias} {}", self.uuid, self.kind),
            false => {
                let time = date.split('T').nth(1).unwrap_or(&date);
                let group = self.uuid.split('-').next().unwrap_or("");
                let cut = match alias.chars().count() > 30 {
                    true => alias.chars().take(27).collect::<String>() + "...",
                    false => alias.to_owned(),
                };
                format!("[{time}] {group} {cut} {}", self.kind)
            }
        };
        if self.changes.is_empty() {
            return base + "\n";
        }
        let line = |change: &Change| {
            let (old, new) = (&change.old, &change.new);
            format!("{base}: {} {} :: {old} -> {new}\n", change.pretty_path(), change.action)
        };
        self.changes.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::build::tests::object;
    use super::*;

    #[test]
    fn changes_are_told_by_path() {
        let old = object(r#"{"ram":1,"nics":[{"ip":"a"}],"gone":1,"same":[1]}"#);
        let new = object(r#"{"ram":2,"nics":[{"ip":"b"},{"ip":"c"}],"same":[1],"tags":{}}"#);
        let changes = between(&old, &new);
        let vm = object(r#"{"alias":"an alias that is longer than thirty characters"}"#);
        let uuid = "b8ab5fc1-8576-45ef-bb51-9826b52a4651";
        let told = Told { kind: "modify", at_us: 0, uuid, vm: Some(&vm), changes: &changes };
        assert_eq!(
            told.to_text(false),
            "[00:00:00.000Z] b8ab5fc1 an alias that is longer tha... modify: gone removed :: 1 -> null\n\
             [00:00:00.000Z] b8ab5fc1 an alias that is longer tha... modify: nics.0.ip changed :: \"a\" -> \"b\"\n\
             [00:00:00.000Z] b8ab5fc1 an alias that is longer tha... modify: nics.1 added :: null -> {\"ip\":\"c\"}\n\
             [00:00:00.000Z] b8ab5fc1 an alias that is longer tha... modify: ram changed :: 1 -> 2\n\
             [00:00:00.000Z] b8ab5fc1 an alias that is longer tha... modify: tags added :: null -> {}\n"
        );
        let json = told.to_json();
        assert_eq!(json["changes"][1]["prettyPath"], "nics.0.ip");
        assert_eq!(json["changes"][1]["path"], json!(["nics", 0, "ip"]));
    }
}
