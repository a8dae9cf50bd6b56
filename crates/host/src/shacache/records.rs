//! Records of an index: which of them can be believed, which of them are meant.

use serde_json::{Map, Value};

use super::{Config, MAX_INDEX, SHORT, agent};

/// A condition `KEY op VALUE`.
#[derive(Clone, Debug, PartialEq)]
pub struct Filter {
    key: String,
    op: Op,
    value: Value,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Equal,
    AtMost,
    AtLeast,
    Below,
    Above,
    /// The lowest of those that are above.
    Lowest,
    /// The highest of those that are below.
    Highest,
}

const OPS: &[(&str, Op)] = &[
    ("==", Op::Equal),
    ("<=", Op::AtMost),
    (">=", Op::AtLeast),
    ("<<", Op::Lowest),
    (">>", Op::Highest),
    ("<", Op::Below),
    (">", Op::Above),
];

impl std::str::FromStr for Filter {
    type Err = String;

    /// The value is JSON, or a plain word.
    fn from_str(text: &str) -> Result<Self, String> {
        let at = text.find(['=', '<', '>']).ok_or_else(|| {
            format!("{text:?} is not KEY op VALUE, as in distribution==debian or version>=12")
        })?;
        let found = OPS.iter().find_map(|(word, op)| Some((*op, text[at..].strip_prefix(word)?)));
        let (op, value) =
            found.ok_or_else(|| format!("{text:?} has no ==, <=, >=, <, >, << or >>"))?;
        let value = value.trim();
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
        Ok(Self { key: text[..at].trim().to_owned(), op, value })
    }
}

/// How two values compare, where they are of a kind.
fn compare(a: &Value, b: &Value) -> Option<std::cmp::Ordering> {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64()?.partial_cmp(&b.as_f64()?),
        (Value::String(a), Value::String(b)) => Some(a.cmp(b)),
        (Value::Bool(a), Value::Bool(b)) => Some(a.cmp(b)),
        (_, _) => None,
    }
}

impl Filter {
    /// Keeps the records that are meant.
    fn keep(
        &self,
        records: Vec<Map<String, Value>>,
        warnings: &mut Vec<String>,
    ) -> Vec<Map<String, Value>> {
        use std::cmp::Ordering::{Equal, Greater, Less};
        let mut kept: Vec<(std::cmp::Ordering, Map<String, Value>)> = Vec::new();
        for record in records {
            let Some(value) = record.get(&self.key) else { continue };
            match compare(value, &self.value) {
                Some(order) => kept.push((order, record)),
                None => warnings
                    .push(format!("{}: {value} cannot be compared with {}", self.key, self.value)),
            }
        }
        kept.retain(|(order, _)| match self.op {
            Op::Equal => *order == Equal,
            Op::AtMost | Op::Highest => *order != Greater,
            Op::AtLeast | Op::Lowest => *order != Less,
            Op::Below => *order == Less,
            Op::Above => *order == Greater,
        });
        let kept: Vec<_> = kept.into_iter().map(|(_, record)| record).collect();
        let wanted = match self.op {
            Op::Lowest => Less,
            Op::Highest => Greater,
            Op::Equal | Op::AtMost | Op::AtLeast | Op::Below | Op::Above => return kept,
        };
        let value = |record: &Map<String, Value>| record[&self.key].clone();
        let best = kept
            .iter()
            .map(value)
            .reduce(|a, b| if compare(&a, &b) == Some(wanted) { a } else { b });
        kept.into_iter().filter(|record| Some(&record[&self.key]) == best.as_ref()).collect()
    }
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Pick {
    pub metadata: Map<String, Value>,
    /// The file's digest, hexadecimal.
    pub sha512: String,
    /// Records that were passed over, and why.
    pub warnings: Vec<String>,
}

/// Asks for the records of a key and takes the first one that is signed by somebody who is trusted
/// and that all filters let pass. `unsigned`: whoever says so is believed.
pub fn pick(
    config: &Config,
    key: &str,
    filters: &[Filter],
    unsigned: bool,
) -> Result<Pick, String> {
    let base = config.download_dir.as_deref().ok_or("download-dir-url is not set")?;
    if !unsigned && !config.trusts_somebody() {
        return Err("signature-certificate-list names nobody, so no record can be believed; \
                    --insecure believes all"
            .into());
    }
    let url = format!("{base}/{key}");
    let text = |e: ureq::Error| format!("{url}: {e}");
    let mut answer = agent(config.dir_tls.as_ref(), SHORT)?.get(&url).call().map_err(text)?;
    match answer.status().as_u16() {
        200 => {}
        404 => return Err(format!("{url}: nothing is known under this key")),
        status => return Err(format!("{url}: the server answered {status}")),
    }
    let body = answer.body_mut().with_config().limit(MAX_INDEX).read_to_vec().map_err(text)?;
    let Ok(Value::Array(list)) = serde_json::from_slice::<Value>(&body) else {
        return Err(format!("{url}: what the server sent is no list of records"));
    };
    choose(&list, config, filters, unsigned)
}

fn choose(
    list: &[Value],
    config: &Config,
    filters: &[Filter],
    unsigned: bool,
) -> Result<Pick, String> {
    let mut warnings = Vec::new();
    let mut records: Vec<Map<String, Value>> = Vec::new();
    for (number, record) in list.iter().enumerate() {
        match believed(record, config, unsigned) {
            // One that is there twice is there once.
            Ok(record) if records.contains(&record) => {}
            Ok(record) => records.push(record),
            Err(why) => warnings.push(format!("record {}: {why}", number + 1)),
        }
    }
    for filter in filters {
        records = filter.keep(records, &mut warnings);
    }
    let Some(metadata) = records.into_iter().next() else {
        let why = warnings.iter().map(|w| format!("\n  {w}")).collect::<String>();
        return Err(format!("No result found with given criteria.{why}"));
    };
    let sha512 = metadata["sha512"].as_str().unwrap_or_default().to_owned();
    Ok(Pick { metadata, sha512, warnings })
}

/// A record whose signature is right, before anything in it is looked at.
fn believed(record: &Value, config: &Config, unsigned: bool) -> Result<Map<String, Value>, String> {
    let parts = record.as_array().map(Vec::as_slice);
    let Some([Value::String(text), Value::String(signature)]) = parts else {
        return Err("it is no pair of texts".into());
    };
    if !unsigned && signature.is_empty() {
        return Err("it is not signed".into());
    }
    if !unsigned && !config.certificates.verify(text, signature) {
        return Err("nobody who is trusted signed it as it is".into());
    }
    let parsed = serde_json::from_str::<Value>(text).map_err(|_| "what it says is not JSON")?;
    let Value::Object(metadata) = parsed else { return Err("what it says is no object".into()) };
    match metadata.get("sha512").and_then(Value::as_str) {
        None => Err("it has no sha512".into()),
        Some(digest) if super::download::is_hex(digest, 128) => Ok(metadata),
        Some(_) => Err("its sha512 is no such digest".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record(metadata: Value) -> Value {
        json!([metadata.to_string(), ""])
    }

    #[test]
    fn case_d8_records_that_do_not_fit_are_passed_over() {
        let digest = "ab".repeat(64);
        let of = |version: Value| record(json!({"sha512": digest, "version": version}));
        let list = [of(json!(12)), of(json!(12)), of(json!("x")), of(json!(11)), of(json!(13))];
        let choose = |filters: &[&str]| {
            let filters: Vec<Filter> = filters.iter().map(|f| f.parse().unwrap()).collect();
            choose(&list, &Config::default(), &filters, true)
        };
        assert_eq!(choose(&[]).unwrap().metadata["version"], 12);
        let found = choose(&["version>12"]).unwrap();
        assert_eq!(found.metadata["version"], 13);
        assert!(found.warnings[0].contains("cannot be compared"));
        assert_eq!(choose(&["version<<1"]).unwrap().metadata["version"], 11);
        assert_eq!(choose(&["version>>100"]).unwrap().metadata["version"], 13);
        assert_eq!(choose(&["version<=11"]).unwrap().metadata["version"], 11);
        assert_eq!(choose(&["version==\"x\""]).unwrap().metadata["version"], "x");
        assert!(choose(&["version==99"]).unwrap_err().starts_with("No result found"));
        assert!("version".parse::<Filter>().is_err());
        assert!("version=3".parse::<Filter>().is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_record_makes_it_panic(text: String, signature: String) {
            let _ = believed(&json!([text, signature]), &Config::default(), false);
            let _ = text.parse::<Filter>();
        }
    }
}
