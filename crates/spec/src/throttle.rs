//! Limits on what a guest may ask of a disk: bytes and operations each second, with bursts.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The longest name of a group.
const MAX_GROUP: usize = 60;
/// No larger number is given to a hypervisor.
const MOST: u64 = 1_000_000_000_000_000;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct DiskLimits {
    /// Bytes each second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Rates>,
    /// Operations each second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operations: Option<Rates>,
    /// An operation of more bytes than this counts as several. Each counts once when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operation_bytes: Option<u64>,
    /// Disks of one machine that name the same group share its limits. Each is alone when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
}

/// Either in all, or each way for itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct Rates {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total: Option<Rate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read: Option<Rate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write: Option<Rate>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(inline)]
pub struct Rate {
    /// Each second, in the long run.
    pub rate: u64,
    /// Each second, during a burst. No bursts when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<u64>,
    /// How long a burst may be. 1 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst_seconds: Option<u64>,
}

impl Rates {
    /// Each with its name.
    pub fn each(&self) -> [(&'static str, Option<&Rate>); 3] {
        [
            ("total", self.total.as_ref()),
            ("read", self.read.as_ref()),
            ("write", self.write.as_ref()),
        ]
    }
}

impl DiskLimits {
    /// What is wrong with them: where below them, and why.
    pub fn faults(&self) -> Vec<(String, String)> {
        let mut list = Vec::new();
        for (kind, rates) in [("bytes", &self.bytes), ("operations", &self.operations)] {
            let Some(rates) = rates else { continue };
            if rates.total.is_some() && (rates.read.is_some() || rates.write.is_some()) {
                let why = "`total` is for both ways, so it excludes `read` and `write`";
                list.push((kind.to_owned(), why.to_owned()));
            }
            for (name, rate) in rates.each() {
                if let Some(why) = rate.and_then(Rate::fault) {
                    list.push((format!("{kind}.{name}"), why.to_owned()));
                }
            }
        }
        if self.operation_bytes.is_some_and(|bytes| bytes == 0 || bytes > MOST) {
            list.push(("operation_bytes".into(), "it is a number of bytes above 0".into()));
        }
        if self.group.as_ref().is_some_and(|name| !is_group(name)) {
            let why = format!(
                "a group's name has up to {MAX_GROUP} letters, digits, hyphens, dots or underscores"
            );
            list.push(("group".into(), why));
        }
        list
    }
}

impl Rate {
    fn fault(&self) -> Option<&'static str> {
        let Self { rate, burst, burst_seconds } = self;
        match (burst, burst_seconds) {
            _ if *rate == 0 || *rate > MOST => Some("`rate` is above 0 and at most 10^15"),
            (Some(burst), _) if burst < rate || *burst > MOST => {
                Some("`burst` is at least the rate and at most 10^15")
            }
            (None, Some(_)) => {
                Some("`burst_seconds` says how long a `burst` may be; there is none")
            }
            (_, Some(0 | 3601..)) => Some("`burst_seconds` is from 1 to 3600"),
            _ => None,
        }
    }
}

fn is_group(name: &str) -> bool {
    let sound = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    !name.is_empty() && name.len() <= MAX_GROUP && name.bytes().all(sound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_named() {
        let limits: DiskLimits = serde_json::from_value(serde_json::json!({
            "bytes": {"total": {"rate": 5}, "read": {"rate": 0}},
            "operations": {"write": {"rate": 5, "burst": 4}, "read": {"rate": 5, "burst_seconds": 2}},
            "operation_bytes": 0, "group": "a b",
        }))
        .unwrap();
        let places: Vec<String> = limits.faults().into_iter().map(|(at, _)| at).collect();
        assert_eq!(
            places,
            [
                "bytes",
                "bytes.read",
                "operations.read",
                "operations.write",
                "operation_bytes",
                "group"
            ]
        );
        let limits: DiskLimits = serde_json::from_value(serde_json::json!({
            "bytes": {"total": {"rate": 5, "burst": 10, "burst_seconds": 3600}}, "group": "a",
        }))
        .unwrap();
        assert_eq!(limits.faults(), []);
    }
}
