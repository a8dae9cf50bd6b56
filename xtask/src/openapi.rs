//! The Connect door's interface as OpenAPI, made from its definition: `docs/metald.openapi.json`.
//! Reads definitions as they are written here: one declaration a line, comments above.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

const SOURCE: &str = "crates/doors/proto/vmprovisioner/v1/vm.proto";
const TARGET: &str = "docs/metald.openapi.json";

/// Spellings that only the JSON page knows: message, key, what it is.
const ALIASES: &[(&str, &str, &str)] = &[
    ("StorageDevice", "readonly", "The same as readOnly."),
    ("MemoryConfig", "hotplug_size_bytes", "So many bytes more than sizeBytes may be plugged in."),
];

/// Writes the file, or with `check` says that it is not what the definition makes.
pub(crate) fn openapi(check: bool) -> Result<()> {
    let text = fs::read_to_string(SOURCE).context(SOURCE)?;
    let made = format!("{}\n", serde_json::to_string_pretty(&document(&text))?);
    if check {
        let kept = fs::read_to_string(TARGET).unwrap_or_default();
        ensure!(kept == made, "{TARGET} is not what {SOURCE} makes; run `cargo xtask openapi`");
        return Ok(());
    }
    fs::write(TARGET, made).context(TARGET)
}

fn document(text: &str) -> Value {
    let (mut schemas, mut paths) = (Map::new(), Map::new());
    let mut comment: Vec<&str> = Vec::new();
    let mut inside: Option<(&str, &str)> = None;
    for line in text.lines().map(str::trim) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["//", ..] => {
                comment.push(line.strip_prefix("// ").unwrap_or(""));
                continue;
            }
            [kind @ ("message" | "enum" | "service"), name, "{"] => {
                inside = Some((kind, name));
                if *kind != "service" {
                    let schema = match *kind {
                        "message" => json!({"type": "object", "properties": {}}),
                        _ => json!({"type": "string", "enum": []}),
                    };
                    schemas.insert((*name).to_owned(), described(schema, &comment));
                }
            }
            ["}"] => inside = None,
            ["rpc", call, "returns", answer] => rpc(&mut paths, call, answer, &comment),
            [] => {}
            _ => match inside {
                Some(("enum", name)) => {
                    let list = schemas.get_mut(name).and_then(|s| s["enum"].as_array_mut());
                    list.into_iter().for_each(|list| list.push(json!(words[0])));
                }
                Some(("message", name)) => {
                    let (key, schema) = field(line);
                    schemas[name]["properties"][key] = described(schema, &comment);
                }
                Some(_) | None => {}
            },
        }
        comment.clear();
    }
    for (message, key, what) in ALIASES {
        let like = if *key == "readonly" { "boolean" } else { "string" };
        schemas[*message]["properties"][*key] = json!({"type": like, "description": what});
    }
    schemas.insert(
        "Error".into(),
        json!({"type": "object", "properties": {"code": {"type": "string"}, "message": {"type": "string"}}}),
    );
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Lodge: vmprovisioner.v1.VmService", "version": env!("CARGO_PKG_VERSION")},
        "servers": [{"url": "http://localhost:8080"}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    })
}

fn described(mut schema: Value, comment: &[&str]) -> Value {
    if !comment.is_empty() {
        schema["description"] = json!(comment.join(" "));
    }
    schema
}

/// `CreateVm(CreateVmRequest)` and `(CreateVmResponse);`
fn rpc(paths: &mut Map<String, Value>, call: &str, answer: &str, comment: &[&str]) {
    let (name, request) = call.split_once('(').unwrap_or((call, ""));
    let reference = |name: &str| {
        let name = name.trim_matches(|c: char| !c.is_alphanumeric());
        let schema = json!({"$ref": format!("#/components/schemas/{name}")});
        json!({"application/json": {"schema": schema}})
    };
    let operation = json!({
        "operationId": name,
        "summary": comment.join(" "),
        "requestBody": {"required": true, "content": reference(request)},
        "responses": {
            "200": {"description": "Done.", "content": reference(answer)},
            "default": {"description": "Refused; the status follows from the code.", "content": reference("Error")},
        },
    });
    paths.insert(format!("/vmprovisioner.v1.VmService/{name}"), json!({"post": operation}));
}

/// `repeated string dns_servers = 4;` as its JSON name and its schema.
fn field(line: &str) -> (String, Value) {
    let declared = line.split('=').next().unwrap_or("").trim();
    let (kind, name) = declared.rsplit_once(' ').unwrap_or(("string", declared));
    let mut key = String::new();
    for (i, part) in name.split('_').enumerate() {
        let mut letters = part.chars();
        match letters.next() {
            Some(first) if i > 0 => key.extend(first.to_uppercase()),
            first => key.extend(first),
        }
        key.extend(letters);
    }
    let schema = match kind.strip_prefix("repeated ") {
        Some(item) => json!({"type": "array", "items": scalar(item)}),
        None => scalar(kind),
    };
    (key, schema)
}

fn scalar(kind: &str) -> Value {
    match kind {
        "string" => json!({"type": "string"}),
        "bool" => json!({"type": "boolean"}),
        "double" => json!({"type": "number"}),
        "int32" => json!({"type": "integer", "format": "int32"}),
        // Digits in quotes; a number is taken too.
        "int64" => json!({"type": "string", "format": "int64"}),
        kind if kind.starts_with("map<") => {
            json!({"type": "object", "additionalProperties": {"type": "string"}})
        }
        message => json!({"$ref": format!("#/components/schemas/{message}")}),
    }
}
