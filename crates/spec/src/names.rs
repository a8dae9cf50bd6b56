//! Names and addresses, each with the one parser that admits it. Never looks anything up.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

/// Why a text is no name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not {what}")]
pub struct NameError {
    text: String,
    what: &'static str,
}

/// A machine's identity; host objects are named after it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct MachineId(pub Uuid);

impl MachineId {
    /// The first eight hex digits: what fits in an interface name.
    pub fn short(self) -> String {
        self.0.simple().to_string()[..8].to_owned()
    }
}

impl fmt::Display for MachineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for MachineId {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let error = || NameError { text: text.to_owned(), what: "a UUID (8-4-4-4-12 hex digits)" };
        if text.len() != 36 {
            return Err(error());
        }
        Uuid::try_parse(text).map(MachineId).map_err(|_| error())
    }
}

macro_rules! checked_text {
    ($(#[$doc:meta])* $name:ident, $what:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[derive(serde::Serialize, serde::Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                let valid: fn(&str) -> bool = $valid;
                match valid(text) {
                    true => Ok(Self(text.to_owned())),
                    false => Err(NameError { text: text.to_owned(), what: $what }),
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

fn dns_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-')
        && bytes[0] != b'-'
        && bytes[bytes.len() - 1] != b'-'
}

fn plain_word(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=128).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"._-+:".contains(b))
}

checked_text! {
    /// A machine's name: a DNS label, because its neighbours reach it by that name.
    Name, "a machine name (1 to 63 letters, digits and inner hyphens)", dns_label
}
checked_text! {
    /// A network's name; short, because the bridge is named after it.
    NetName, "a network name (1 to 11 letters, digits and inner hyphens)",
    |text| text.len() <= 11 && dns_label(text)
}
checked_text! {
    /// A device inside a machine: what `disks[].name` and `nics[].name` say.
    DeviceName, "a device name (1 to 31 letters, digits, hyphens or underscores, a letter first)",
    |text| {
        (1..=31).contains(&text.len())
            && text.as_bytes()[0].is_ascii_alphabetic()
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    }
}
checked_text! {
    /// The name of a stored image.
    ImageName, "an image name (letters, digits and . _ - + :, a letter or digit first)", plain_word
}
checked_text! {
    /// A SHA-256 digest, 64 lower-case hex digits.
    Digest, "a SHA-256 digest (64 lower-case hex digits)",
    |text| text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// An Ethernet address that a guest's interface may carry: six octets, not multicast, not zero.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address of the `index`th interface of a machine: locally administered, the same at
    /// every start, different between machines.
    pub fn derived(id: MachineId, index: usize) -> Self {
        let bytes = id.0.as_bytes();
        Mac([0x52, 0x4c, bytes[12], bytes[13], bytes[14], bytes[15] ^ index as u8])
    }
}

impl FromStr for Mac {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let error = || NameError {
            text: text.to_owned(),
            what: "a unicast Ethernet address (six hex octets with colons)",
        };
        let mut octets = [0u8; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().filter(|p| (1..=2).contains(&p.len())).ok_or_else(error)?;
            *octet = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() || octets[0] & 1 == 1 || octets == [0; 6] {
            return Err(error());
        }
        Ok(Mac(octets))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for Mac {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> String {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels() {
        for good in ["a", "web-1", "A9", &"x".repeat(63)] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "a_b", "a.b", "a b", "é", &"x".repeat(64), "../x"] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }

    #[test]
    fn macs_are_unicast() {
        assert_eq!("0:0:0:1:0:c9".parse::<Mac>().unwrap().to_string(), "00:00:00:01:00:c9");
        for bad in ["", "00:00:00:00:00:00", "01:00:00:00:00:01", "1:2:3:4:5", "1:2:3:4:5:6:7"] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn derived_macs_differ_by_index_and_stay() {
        let id: MachineId = "b8ab5fc1-8576-45ef-bb51-9826b52a4651".parse().unwrap();
        assert_eq!(Mac::derived(id, 0), Mac::derived(id, 0));
        assert_ne!(Mac::derived(id, 0), Mac::derived(id, 1));
        assert!(Mac::derived(id, 0).to_string().parse::<Mac>().is_ok());
    }
}
