//! Limits on a disk in the words of this door: for each name `N` a value `N`, which counts where
//! `Nset` is true. Knows no machine.

use lodge_spec::throttle::{DiskLimits, Rate, Rates};
use serde_json::{Map, Value};

use super::jobs::Failure;

const WAYS: [&str; 3] = ["total", "read", "write"];

/// All names.
pub(super) fn names() -> Vec<String> {
    let mut list = Vec::new();
    for kind in ["bytes", "iops"] {
        for way in WAYS {
            for end in ["", "max", "maxlength"] {
                list.push(format!("{way}{kind}sec{end}"));
            }
        }
    }
    list.extend(["sizeiopssec".to_owned(), "groupname".to_owned()]);
    list
}

/// Those of the arguments that are limits and count, as they came.
pub(super) fn kept(arguments: &Value) -> Value {
    let mut all = Map::new();
    for name in names() {
        let set = format!("{name}set");
        if arguments[&set] == true {
            all.insert(set, Value::Bool(true));
            all.insert(name.clone(), arguments[&name].clone());
        }
    }
    Value::Object(all)
}

/// What they mean; nothing where none is set.
pub(super) fn limits(given: &Value) -> Result<Option<DiskLimits>, Failure> {
    let names = names();
    let known = |key: &str| {
        let value = key.strip_suffix("set").unwrap_or(key);
        names.iter().any(|name| name == value)
    };
    if let Some(odd) = given.as_object().into_iter().flat_map(Map::keys).find(|key| !known(key)) {
        return Err(Failure::new(format!("iotune has no {odd}")));
    }
    let set = |name: &str| given[format!("{name}set")] == true;
    let number = |name: String| -> Result<Option<u64>, Failure> {
        match set(&name) {
            false => Ok(None),
            true => given[&name]
                .as_u64()
                .map(Some)
                .ok_or_else(|| Failure::new(format!("{name} is set and is no whole number"))),
        }
    };
    let rates = |kind: &str| -> Result<Option<Rates>, Failure> {
        let rate = |way: &str| {
            let name = format!("{way}{kind}sec");
            let burst = number(format!("{name}max"))?;
            let burst_seconds = number(format!("{name}maxlength"))?;
            match number(name.clone())?.filter(|rate| *rate > 0) {
                Some(rate) => Ok(Some(Rate { rate, burst, burst_seconds })),
                None if burst.is_some_and(|burst| burst > 0) => {
                    Err(Failure::new(format!("{name}max takes a {name} as well")))
                }
                None => Ok(None),
            }
        };
        let [total, read, write] = WAYS;
        let rates = Rates { total: rate(total)?, read: rate(read)?, write: rate(write)? };
        Ok((rates != Rates::default()).then_some(rates))
    };
    let group = match set("groupname") {
        true => given["groupname"].as_str().filter(|name| !name.is_empty()).map(str::to_owned),
        false => None,
    };
    let operation_bytes = number("sizeiopssec".into())?.filter(|bytes| *bytes > 0);
    let limits =
        DiskLimits { bytes: rates("bytes")?, operations: rates("iops")?, operation_bytes, group };
    match limits.faults().first() {
        Some((place, why)) => Err(Failure::new(format!("iotune: {place}: {why}"))),
        None => Ok((limits != DiskLimits::default()).then_some(limits)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_value_counts_where_it_is_set() {
        let given = json!({"totalbytessecset": true, "totalbytessec": 1000,
            "totalbytessecmaxset": true, "totalbytessecmax": 2000, "readiopssecset": false,
            "readiopssec": 5, "writeiopssecset": true, "writeiopssec": 9,
            "groupnameset": true, "groupname": "g"});
        let wanted: DiskLimits = serde_json::from_value(json!({
            "bytes": {"total": {"rate": 1000, "burst": 2000}},
            "operations": {"write": {"rate": 9}}, "group": "g"}))
        .unwrap();
        assert_eq!(limits(&given).unwrap(), Some(wanted));
        assert_eq!(limits(&json!({})).unwrap(), None);
        assert_eq!(limits(&json!({"readiopssec": 5})).unwrap(), None);
        assert_eq!(names().len(), 20);
    }

    #[test]
    fn what_is_no_limit_is_refused() {
        for (given, words) in [
            (json!({"readiopssecset": true, "readiopssec": "5"}), "no whole number"),
            (json!({"readiopssecmaxset": true, "readiopssecmax": 5}), "takes a readiopssec"),
            (json!({"speed": 1}), "iotune has no speed"),
            (
                json!({"totaliopssecset": true, "totaliopssec": 5, "readiopssecset": true,
                "readiopssec": 5}),
                "excludes",
            ),
        ] {
            let said = limits(&given).unwrap_err().message;
            assert!(said.contains(words), "{said}");
        }
    }
}
