//! Disks whose blocks lie in a namespace of 0-db, each under its number: where they lie, and how
//! large the disk and its blocks are, which the server does not know.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

const SCHEMES: [&str; 3] = ["zdb://", "zdb+tcp://", "zdb+unix://"];
/// Bytes of a block where nobody says.
const BLOCK: u32 = 4096;
const BLOCKS: std::ops::RangeInclusive<u64> = 512..=1 << 20;

/// `zdb://HOST[:PORT]?size=…`, or `zdb+unix:///SOCKET?size=…`, either with `blocksize`,
/// `namespace` and `password`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Zdb {
    /// As it was given, with the password.
    pub url: String,
    /// In bytes; a whole number of blocks.
    pub size: u64,
    /// Bytes of a block; a power of two.
    pub block: u32,
}

impl Zdb {
    /// Whether somebody who names this means such a disk.
    pub fn is_meant(text: &str) -> bool {
        SCHEMES.iter().any(|scheme| text.starts_with(scheme))
    }

    /// The address without its password.
    pub fn shown(&self) -> String {
        let (place, query) = self.url.split_once('?').unwrap_or((&self.url, ""));
        let pairs: Vec<&str> =
            query.split('&').filter(|pair| !pair.starts_with("password=")).collect();
        format!("{place}?{}", pairs.join("&"))
    }
}

impl FromStr for Zdb {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (place, query) = text.split_once('?').unwrap_or((text, ""));
        // What was typed may hold a password.
        let wrong = |why: &str| format!("{place}: {why}");
        if text.bytes().any(|b| b.is_ascii_control() || b == b' ' || b == b'#') {
            return Err(wrong("a 0-db address has no spaces, `#` or control characters"));
        }
        let unix = place.strip_prefix("zdb+unix://");
        let tcp = place.strip_prefix("zdb://").or_else(|| place.strip_prefix("zdb+tcp://"));
        let fits = match (unix, tcp) {
            (Some(path), _) => path.starts_with('/') && path.len() > 1,
            (None, Some(host)) => !host.trim_end_matches('/').is_empty() && !host.contains('@'),
            (None, None) => false,
        };
        if !fits {
            return Err(wrong(
                "write zdb://HOST[:PORT]?size=…, or zdb+unix:///SOCKET?size=…; a password is \
                 written behind, as password=…",
            ));
        }
        let (mut size, mut block) = (None, u64::from(BLOCK));
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let bytes = || value.parse::<Bytes>().map(|b| b.0).map_err(|e| wrong(&e.to_string()));
            match name {
                "size" => size = Some(bytes()?),
                "blocksize" => block = bytes()?,
                "namespace" | "password" => {}
                other => return Err(wrong(&format!("{other} means nothing here"))),
            }
        }
        if !BLOCKS.contains(&block) || !block.is_power_of_two() {
            return Err(wrong("its blocksize is not a power of two from 512 to 1 MiB"));
        }
        let Some(size) = size.filter(|size| *size > 0 && size.is_multiple_of(block)) else {
            return Err(wrong(
                "it has no size that is a whole number of its blocks; write ?size=10GiB",
            ));
        };
        Ok(Self { url: text.to_owned(), size, block: block as u32 })
    }
}

impl fmt::Display for Zdb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let read = |text: &str| text.parse::<Zdb>();
        let all = "zdb://h:9900?password=secret&namespace=vm&blocksize=8192&size=10GiB";
        let zdb = read(all).unwrap();
        assert_eq!((zdb.size, zdb.block), (10 << 30, 8192));
        assert_eq!(zdb.to_string(), all);
        assert_eq!(zdb.shown(), "zdb://h:9900?namespace=vm&blocksize=8192&size=10GiB");
        for text in
            ["zdb+tcp://h?size=1M", "zdb+unix:///run/z.sock?size=4096", "zdb://[::1]:1/?size=1M"]
        {
            assert!(Zdb::is_meant(text) && read(text).is_ok(), "{text}");
        }
        for (text, why) in [
            ("zdb://?size=1M", "write zdb://"),
            ("zdb://me:secret@h?size=1M", "password=…"),
            ("zdb+unix://x?size=1M", "write zdb://"),
            ("zdb://h", "no size"),
            ("zdb://h?size=1000", "no size"),
            ("zdb://h?size=0", "no size"),
            ("zdb://h?size=much", "is not a size"),
            ("zdb://h?size=1M&blocksize=1000", "power of two"),
            ("zdb://h?size=4M&blocksize=2M", "power of two"),
            ("zdb://h?size=1M&other=1", "other means nothing"),
            ("nbd://h?size=1M", "write zdb://"),
        ] {
            let said = read(text).unwrap_err();
            assert!(said.contains(why) && !said.contains("secret@h?"), "{text}: {said}");
        }
    }
}
