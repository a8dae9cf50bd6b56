//! `router.yaml`: pools of stores by ranges of block names, and the order in which they are asked.

use std::collections::BTreeMap;

use serde::Deserialize;

#[derive(Deserialize)]
struct Router {
    #[serde(default)]
    pools: BTreeMap<String, BTreeMap<String, String>>,
    #[serde(default)]
    lookup: Vec<String>,
}

/// First and last first byte of the block names, and the store's URL, in order.
pub fn read(text: &str) -> Result<Vec<(u8, u8, String)>, String> {
    let router: Router = serde_saphyr::from_str(text).map_err(|e| format!("router.yaml: {e}"))?;
    if router.lookup.is_empty() {
        return Err("router.yaml: no lookup table defined".into());
    }
    let mut all = Vec::new();
    for name in &router.lookup {
        let pool = router.pools.get(name);
        let pool = pool.ok_or_else(|| format!("router.yaml: no pool with name '{name}'"))?;
        for (range, url) in pool {
            let (first, last) =
                bounds(range).ok_or_else(|| format!("router.yaml: invalid range {range:?}"))?;
            all.push((first, last, url.clone()));
        }
    }
    Ok(all)
}

/// `AB` or `00:7F`; of longer ones only the first byte is looked at, which may ask more stores
/// than needed and never fewer.
fn bounds(range: &str) -> Option<(u8, u8)> {
    let first_byte = |text: &str, pad: char| -> Option<u8> {
        if text.is_empty() || !text.chars().all(|c| c.is_ascii_hexdigit()) {
            return None;
        }
        let two: String = text.chars().chain(std::iter::repeat(pad)).take(2).collect();
        u8::from_str_radix(&two, 16).ok()
    };
    match range.split_once(':') {
        Some((from, to)) if from.len() == to.len() => {
            let (from, to) = (first_byte(from, '0')?, first_byte(to, 'F')?);
            (from <= to).then_some((from, to))
        }
        Some(_) => None,
        None => Some((first_byte(range, '0')?, first_byte(range, '0')?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routers_are_read() {
        let text = "pools:\n  a:\n    00:7F: zdb://one:9900\n    80:ff: zdb://two:9900\n  b:\n    AB: \
                    dir:///x\nlookup: [b, a]\n";
        let all = read(text).unwrap();
        assert_eq!(all[0], (0xab, 0xab, "dir:///x".into()));
        assert_eq!(all[1], (0, 0x7f, "zdb://one:9900".into()));
        assert_eq!(all[2], (0x80, 0xff, "zdb://two:9900".into()));
    }

    #[test]
    fn wrong_routers_are_refused() {
        for (text, why) in [
            ("pools: {}\n", "no lookup table defined"),
            ("lookup: [x]\n", "no pool with name 'x'"),
            ("pools: {x: {'7F:00': 'dir:///x'}}\nlookup: [x]\n", "invalid range"),
            ("pools: {x: {'zz': 'dir:///x'}}\nlookup: [x]\n", "invalid range"),
            ("pools: {x: {'1:22': 'dir:///x'}}\nlookup: [x]\n", "invalid range"),
            ("- a list\n", "router.yaml"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
