//! Checks a document's shape against the schema generated from `Draft`, so that every unknown
//! field and every value of a wrong type is reported in one go. Knows the part of JSON Schema
//! that the generator writes; knows no rule about machines.

use std::sync::OnceLock;

use serde_json::Value;

use crate::draft::Draft;
use crate::problem::{Problem, Problems, nearest};

/// The JSON Schema of the native document (draft 2020-12).
pub(crate) fn schema() -> &'static Value {
    static SCHEMA: OnceLock<Value> = OnceLock::new();
    SCHEMA.get_or_init(|| schemars::schema_for!(Draft).into())
}

pub(crate) fn check(document: &Value) -> Problems {
    let mut problems = Problems::default();
    walk(schema(), document, "", &mut problems);
    problems
}

fn walk(schema: &Value, value: &Value, path: &str, problems: &mut Problems) {
    if let Some(Value::Array(options)) = schema.get("anyOf") {
        return walk_any(options, value, path, problems);
    }
    if !type_matches(schema, value) {
        let wanted = describe(schema);
        problems.add(path, format!("{} is not {wanted}", kind_of(value)));
        return;
    }
    match value {
        Value::Object(fields) => {
            let known = schema.get("properties").and_then(Value::as_object);
            for (key, field) in fields {
                let here = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                match (known.and_then(|k| k.get(key)), schema.get("additionalProperties")) {
                    (Some(inner), _) => walk(inner, field, &here, problems),
                    (None, Some(inner @ Value::Object(_))) => walk(inner, field, &here, problems),
                    (None, Some(_) | None) => {
                        let names = known.into_iter().flatten().map(|(name, _)| name.as_str());
                        problems.0.push(unknown(here, key, names));
                    }
                }
            }
        }
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                if let Some(inner) = schema.get("items") {
                    walk(inner, item, &format!("{path}[{i}]"), problems);
                }
            }
        }
        Value::Number(n) => {
            let below = schema.get("minimum").and_then(Value::as_f64);
            if below.is_some_and(|minimum| n.as_f64().is_some_and(|n| n < minimum)) {
                problems.add(path, format!("{n} is below zero"));
            }
        }
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

/// Reports against the alternative that has the value's type, if there is one.
fn walk_any(options: &[Value], value: &Value, path: &str, problems: &mut Problems) {
    match options.iter().find(|option| type_matches(option, value)) {
        Some(option) => walk(option, value, path, problems),
        None => {
            problems.add(path, format!("{} is not {}", kind_of(value), describe_any(options)));
        }
    }
}

fn unknown<'a>(path: String, key: &str, known: impl Iterator<Item = &'a str>) -> Problem {
    match nearest(key, known) {
        Some(near) => Problem::new(path, format!("unknown field; did you mean `{near}`?")),
        None => Problem::new(path, "unknown field"),
    }
}

fn type_names(schema: &Value) -> Vec<&str> {
    match schema.get("type") {
        Some(Value::String(name)) => vec![name],
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        Some(_) | None => Vec::new(),
    }
}

fn type_matches(schema: &Value, value: &Value) -> bool {
    if let Some(Value::Array(options)) = schema.get("anyOf") {
        return options.iter().any(|option| type_matches(option, value));
    }
    let names = type_names(schema);
    names.is_empty()
        || names.iter().any(|name| match *name {
            "integer" => value.is_i64() || value.is_u64(),
            "number" => value.is_number(),
            "string" => value.is_string(),
            "boolean" => value.is_boolean(),
            "array" => value.is_array(),
            "object" => value.is_object(),
            "null" => value.is_null(),
            _ => false,
        })
}

fn describe_any(options: &[Value]) -> String {
    let mut wanted: Vec<String> = options.iter().map(describe).collect();
    wanted.dedup();
    wanted.retain(|w| w != "null");
    wanted.join(" or ")
}

fn describe(schema: &Value) -> String {
    if let Some(Value::Array(options)) = schema.get("anyOf") {
        return describe_any(options);
    }
    let names = type_names(schema);
    let names = names.into_iter().filter(|name| *name != "null").map(|name| match name {
        "integer" => "a whole number",
        "number" => "a number",
        "string" => "a text",
        "boolean" => "true or false",
        "array" => "a list",
        "object" => "a group of fields",
        other => other,
    });
    let text = names.collect::<Vec<_>>().join(" or ");
    if text.is_empty() { "null".to_owned() } else { text }
}

fn kind_of(value: &Value) -> String {
    match value {
        Value::Null => "nothing".into(),
        Value::Bool(b) => format!("{b}"),
        Value::Number(n) => format!("{n}"),
        Value::String(s) => format!("{s:?}"),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "a group of fields".into(),
    }
}
