//! The native document as text: JSON, TOML or YAML, told apart by content, never by file name.
//! Reports every fault of shape at once; opens no file.

use serde_json::Value;

use crate::draft::Draft;
use crate::problem::{Problem, Problems};
use crate::schema;

/// Documents larger than this are refused unread.
pub const MAX_DOCUMENT: usize = 4 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Json,
    Toml,
    Yaml,
}

/// Reads a document into a draft.
pub fn parse(text: &str) -> Result<Draft, Problems> {
    let value = to_value(text).map_err(|problem| Problems(vec![problem]))?;
    if !value.is_object() {
        return Err(Problems(vec![Problem::new("", "the document is not a group of fields")]));
    }
    schema::check(&value).or(())?;
    serde_json::from_value(value).map_err(|error| Problems(vec![Problem::new("", error)]))
}

/// The JSON Schema of the document, as committed in `docs/machine.schema.json`.
pub fn schema_text() -> String {
    let mut text = serde_json::to_string_pretty(schema::schema()).expect("a schema is plain JSON");
    text.push('\n');
    text
}

/// A document of another kind as plain values.
pub fn value(text: &str) -> Result<Value, Problem> {
    to_value(text)
}

fn to_value(text: &str) -> Result<Value, Problem> {
    if text.len() > MAX_DOCUMENT {
        return Err(Problem::new("", "the document is larger than 4 MiB"));
    }
    match tell(text) {
        Format::Json => {
            serde_json::from_str(text).map_err(|e| Problem::new("", format!("not JSON: {e}")))
        }
        Format::Toml => {
            toml::from_str(text).map_err(|e| Problem::new("", format!("not TOML: {e}")))
        }
        Format::Yaml => {
            serde_saphyr::from_str(text).map_err(|e| Problem::new("", format!("not YAML: {e}")))
        }
    }
}

/// The first line that says something decides: `{` is JSON, `[table]` and `key = value` are TOML,
/// all else is YAML.
fn tell(text: &str) -> Format {
    let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    let Some(line) = lines.next() else { return Format::Yaml };
    if let Some(rest) = line.strip_prefix('{') {
        // `{"` and `{}` open JSON; `{name: …}` is YAML's flow style.
        return match rest.trim_start().chars().next() {
            Some('"' | '}') | None => Format::Json,
            Some(_) => Format::Yaml,
        };
    }
    if line.starts_with('[') {
        return Format::Toml;
    }
    let key = line.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || "_-.\"'".contains(c));
    if key.trim_start().starts_with('=') { Format::Toml } else { Format::Yaml }
}
