//! A machine as `get` shows it: what is kept, and what is known of it now. Pure.

use std::borrow::Cow;
use std::time::{Duration, UNIX_EPOCH};

use lodge_spec::draft::Scalar;
use lodge_spec::state::{Detail, State};
use serde::Deserializer;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde_json::{Value, json};

use super::build::Metadata;
use super::draft::Settings;
use super::values::{Object, text};

/// The document that is kept of a machine.
pub(super) fn doc_of(detail: &Detail) -> Result<Object, String> {
    let origin = detail.origin.as_ref().ok_or("it is no machine of this interface")?;
    let value: Value = serde_json::from_str(&origin.document).map_err(|e| e.to_string())?;
    value.as_object().cloned().ok_or_else(|| "its document is no object".into())
}

/// Members of a document by name; the others are passed over unread.
struct Only<'a>(&'a [&'a str]);

impl<'de> Visitor<'de> for Only<'_> {
    type Value = Object;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
        let mut kept = Object::new();
        while let Some(name) = map.next_key::<Cow<'de, str>>()? {
            match self.0.contains(&name.as_ref()) {
                true => drop(kept.insert(name.into_owned(), map.next_value()?)),
                false => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(kept)
    }
}

/// What lists show of a machine: these members, and what others are made from.
pub(super) fn glance(
    detail: &Detail,
    names: &[&str],
    zones: &str,
    settings: &Settings,
) -> Result<Object, String> {
    const ALWAYS: [&str; 5] = ["uuid", "brand", "zpool", "receiving", "do_not_inventory"];
    let origin = detail.origin.as_ref().ok_or("it is no machine of this interface")?;
    let names: Vec<&str> = names.iter().copied().chain(ALWAYS).collect();
    let mut reader = serde_json::Deserializer::from_str(&origin.document);
    let doc = reader.deserialize_map(Only(&names)).map_err(|e| e.to_string())?;
    complete(doc, detail, zones, settings)
}

pub(super) fn metadata_of(detail: &Detail) -> Metadata {
    let mdata = detail.mdata.clone().unwrap_or_default();
    let map = |map: Option<std::collections::BTreeMap<String, Scalar>>| {
        let list = map.unwrap_or_default().into_iter();
        list.map(|(key, value)| (key, value_of(value))).collect()
    };
    Metadata { customer: map(mdata.customer), internal: map(mdata.internal) }
}

fn value_of(scalar: Scalar) -> Value {
    match scalar {
        Scalar::Bool(value) => value.into(),
        Scalar::Integer(value) => value.into(),
        Scalar::Number(value) => value.into(),
        Scalar::Text(value) => value.into(),
    }
}

pub(super) const fn state(state: State) -> &'static str {
    match state {
        State::Created | State::Stopped | State::Suspended | State::Failed | State::Broken => {
            "stopped"
        }
        State::Starting => "ready",
        State::Running | State::Paused => "running",
        State::Stopping => "stopping",
    }
}

const fn zone_state(state: State) -> &'static str {
    match state {
        State::Created | State::Stopped | State::Suspended | State::Failed | State::Broken => {
            "installed"
        }
        State::Starting => "ready",
        State::Running | State::Paused | State::Stopping => "running",
    }
}

/// ISO 8601 with milliseconds, UTC.
pub(super) fn timestamp(us: i64) -> String {
    let at = UNIX_EPOCH + Duration::from_micros(us.max(0).unsigned_abs());
    humantime::format_rfc3339_millis(at).to_string()
}

/// The whole object.
pub(super) fn view(detail: &Detail, zones: &str, settings: &Settings) -> Result<Object, String> {
    complete(doc_of(detail)?, detail, zones, settings)
}

/// Adds what is known of it now.
fn complete(
    mut vm: Object,
    detail: &Detail,
    zones: &str,
    settings: &Settings,
) -> Result<Object, String> {
    let Metadata { customer, internal } = metadata_of(detail);
    let now = detail.summary.state;
    let uuid = text(&vm, "uuid").unwrap_or("").to_owned();
    let pool = text(&vm, "zpool").unwrap_or("zones").to_owned();
    let brand = text(&vm, "brand").unwrap_or("").to_owned();
    let seconds = |us: i64| timestamp(us);
    let listed = vm.remove("limit_priv").map(|list| match list {
        Value::Array(words) => {
            let words: Vec<&str> = words.iter().filter_map(Value::as_str).collect();
            Value::from(words.join(","))
        }
        other => other,
    });
    let more = json!({
        "customer_metadata": customer,
        "internal_metadata": internal,
        "create_timestamp": seconds(detail.created_us),
        "last_modified": seconds(detail.modified_us),
        "hvm": true,
        "init_restarts": 0,
        "limit_priv": listed.unwrap_or_default(),
        "platform_buildstamp": settings.buildstamp,
        "server_uuid": settings.server_uuid,
        "state": state(now),
        "zone_state": zone_state(now),
        "type": brand.to_uppercase(),
        "v": 1,
        "zfs_filesystem": format!("{pool}/{uuid}"),
        "zonedid": zone_number(&uuid),
        "zonepath": format!("{zones}/{uuid}"),
    });
    vm.extend(more.as_object().cloned().unwrap_or_default());
    if vm.remove("receiving").is_some() {
        vm.insert("state".into(), "receiving".into());
    }
    vm.entry("snapshots").or_insert_with(|| json!([]));
    if now.is_live() {
        vm.insert("pid".into(), detail.pid.into());
        vm.insert("zoneid".into(), zone_number(&uuid).into());
        vm.insert("boot_timestamp".into(), seconds(detail.since_us).into());
    }
    if let Some(datacenter) = &settings.datacenter {
        vm.insert("datacenter_name".into(), datacenter.clone().into());
    }
    if !super::values::is_true(&vm, "do_not_inventory") {
        vm.remove("do_not_inventory");
    }
    Ok(vm)
}

/// A number that stays the machine's.
fn zone_number(uuid: &str) -> u32 {
    let digits: String = uuid.chars().filter(char::is_ascii_hexdigit).take(7).collect();
    u32::from_str_radix(&digits, 16).unwrap_or(0)
}

/// The type as lists and filters have it.
pub(super) fn short_type(vm: &Object) -> String {
    text(vm, "type").unwrap_or("").chars().take(4).collect()
}
