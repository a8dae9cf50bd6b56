//! Values as people write them, and what they are taken for: `"1024"` is a number, `"true"` is
//! true, a list may be one text with commas. Pure.

use std::net::{IpAddr, Ipv4Addr};

use serde_json::{Map, Value};

use super::properties::Kind;

pub(super) type Object = Map<String, Value>;

/// The value as it is kept; `Ok(None)`: it says that there is none. `Err`: it is none of the kind.
pub(super) fn take(kind: Kind, value: &Value) -> Result<Option<Value>, ()> {
    let blank = |text: &str| text.trim().is_empty();
    match kind {
        Kind::Text => match value {
            Value::Null => Ok(None),
            Value::String(text) if blank(text) => Ok(None),
            Value::String(_) => Ok(Some(value.clone())),
            _ => Err(()),
        },
        Kind::Integer(low, high) | Kind::Optional(low, high) => match integer(value)? {
            Some(n) if n < low || n > high => Err(()),
            n => Ok(n.map(Value::from)),
        },
        Kind::PowerOfTwo(low, high) => match integer(value)? {
            Some(n) if n < low || n > high || n.count_ones() != 1 => Err(()),
            n => Ok(n.map(Value::from)),
        },
        Kind::Boolean => boolean(value).map(|b| Some(Value::Bool(b))).ok_or(()),
        Kind::Uuid => match value {
            Value::Null => Ok(None),
            Value::String(text) if blank(text) => Ok(None),
            Value::String(text) if is_uuid(text) => Ok(Some(value.clone())),
            _ => Err(()),
        },
        Kind::Flat => match value {
            Value::Null => Ok(Some(Value::Object(Map::new()))),
            Value::Object(map) if map.values().all(is_scalar) => Ok(Some(value.clone())),
            _ => Err(()),
        },
        Kind::Objects => match value {
            Value::Array(list) if list.iter().all(Value::is_object) => Ok(Some(value.clone())),
            Value::Null => Ok(None),
            _ => Err(()),
        },
        Kind::Word(words) => match value {
            Value::Null => Ok(None),
            Value::String(text) if blank(text) => Ok(None),
            Value::String(text) if words.contains(&text.as_str()) => Ok(Some(value.clone())),
            _ => Err(()),
        },
        Kind::Mac => match value {
            Value::String(text) => mac(text).map(|mac| Some(mac.into())).ok_or(()),
            _ => Err(()),
        },
        Kind::List => list(value, |_| true),
        Kind::Addresses => list(value, |text| text.parse::<IpAddr>().is_ok()),
        Kind::Cidrs => list(value, |text| matches!(text, "dhcp" | "addrconf") || is_cidr(text)),
        Kind::Clients => list(value, |text| {
            let hex = text.strip_prefix("0x").unwrap_or("");
            !hex.is_empty() && hex.len() % 2 == 0 && hex.bytes().all(|b| b.is_ascii_hexdigit())
        }),
        Kind::PciSlot => match value {
            Value::String(text) if is_pci_slot(text) => Ok(Some(value.clone())),
            _ => Err(()),
        },
        Kind::BlockSize => match value {
            Value::String(text) if text.split('/').all(is_power_of_two) => Ok(Some(value.clone())),
            _ => Err(()),
        },
    }
}

fn is_scalar(value: &Value) -> bool {
    matches!(value, Value::String(_) | Value::Number(_) | Value::Bool(_))
}

fn is_power_of_two(text: &str) -> bool {
    text.parse::<u64>().is_ok_and(u64::is_power_of_two)
}

fn integer(value: &Value) -> Result<Option<i64>, ()> {
    match value {
        Value::Null => Ok(None),
        Value::Number(n) => {
            let whole = n.as_f64().filter(|f| f.fract() == 0.0 && f.abs() < 9e15);
            n.as_i64().or(whole.map(|f| f as i64)).map(Some).ok_or(())
        }
        Value::String(text) if text.trim().is_empty() => Ok(None),
        Value::String(text) => text.trim().parse().map(Some).map_err(drop),
        Value::Bool(_) | Value::Array(_) | Value::Object(_) => Err(()),
    }
}

pub(super) fn boolean(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(value) => Some(*value),
        Value::String(text) if text == "true" || text == "1" => Some(true),
        Value::String(text) if text == "false" => Some(false),
        Value::Number(n) if n.as_i64() == Some(1) => Some(true),
        _ => None,
    }
}

/// 8-4-4-4-12 lower-case hex digits.
pub(super) fn is_uuid(text: &str) -> bool {
    has_uuid_shape(text)
        && text.bytes().all(|b| b == b'-' || b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// 36 characters with hyphens where a UUID has them.
pub(super) fn has_uuid_shape(text: &str) -> bool {
    text.chars().count() == 36
        && text.chars().enumerate().all(|(i, c)| (c == '-') == matches!(i, 8 | 13 | 18 | 23))
}

/// Six octets, each with one or two digits, as two digits each.
pub(super) fn mac(text: &str) -> Option<String> {
    let parts: Vec<&str> = text.split(':').collect();
    let octet = |part: &&str| {
        let sound = (1..=2).contains(&part.len());
        u8::from_str_radix(part, 16).ok().filter(|_| sound).map(|n| format!("{n:02x}"))
    };
    let octets: Option<Vec<String>> = parts.iter().map(octet).collect();
    octets.filter(|octets| octets.len() == 6).map(|octets| octets.join(":"))
}

pub(super) fn is_cidr(text: &str) -> bool {
    let (address, length) = text.split_once('/').unwrap_or((text, ""));
    match address.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => length.is_empty() || length.parse::<u8>().is_ok_and(|n| n <= 32),
        Ok(IpAddr::V6(_)) => length.is_empty() || length.parse::<u8>().is_ok_and(|n| n <= 128),
        Err(_) => false,
    }
}

/// A netmask's length; masks have no holes.
pub(super) fn prefix_of(mask: &str) -> Option<u32> {
    let bits = u32::from(mask.parse::<Ipv4Addr>().ok()?);
    let length = bits.leading_ones();
    (bits == u32::from(mask_of(length)) && (8..=32).contains(&length)).then_some(length)
}

pub(super) fn mask_of(prefix: u32) -> Ipv4Addr {
    u32::MAX.checked_shl(32_u32.saturating_sub(prefix)).unwrap_or(0).into()
}

fn is_pci_slot(text: &str) -> bool {
    let limits = [[31, 0, 0], [31, 7, 0], [255, 31, 7]];
    let parts: Vec<Option<u32>> = text.split(':').map(|part| part.parse().ok()).collect();
    parts.len() <= 3
        && parts.iter().zip(limits[parts.len() - 1]).all(|(n, most)| n.is_some_and(|n| n <= most))
}

fn list(value: &Value, valid: impl Fn(&str) -> bool) -> Result<Option<Value>, ()> {
    let texts: Vec<String> = match value {
        Value::Null => return Ok(None),
        Value::String(text) => {
            text.split(',').map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()).collect()
        }
        Value::Array(items) => {
            let text = |item: &Value| match item {
                Value::String(text) => Some(text.clone()),
                Value::Number(n) => Some(n.to_string()),
                _ => None,
            };
            items.iter().map(text).collect::<Option<_>>().ok_or(())?
        }
        Value::Bool(_) | Value::Number(_) | Value::Object(_) => return Err(()),
    };
    match texts.iter().all(|text| valid(text)) {
        true => Ok(Some(texts.into())),
        false => Err(()),
    }
}

/// A value as filters and columns see it.
pub(super) fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
        Value::Array(items) => Some(items.iter().filter_map(text_of).collect::<Vec<_>>().join(",")),
        Value::Object(_) => Some(value.to_string()),
    }
}

pub(super) fn text<'a>(object: &'a Object, name: &str) -> Option<&'a str> {
    object.get(name).and_then(Value::as_str)
}

pub(super) fn number(object: &Object, name: &str) -> Option<i64> {
    object.get(name).and_then(Value::as_i64)
}

pub(super) fn is_true(object: &Object, name: &str) -> bool {
    object.get(name).and_then(Value::as_bool).unwrap_or(false)
}

/// The members of a list, as texts.
pub(super) fn texts(object: &Object, name: &str) -> Vec<String> {
    let list = object.get(name).and_then(Value::as_array).into_iter().flatten();
    list.filter_map(Value::as_str).map(str::to_owned).collect()
}

pub(super) fn objects(object: &Object, name: &str) -> Vec<Object> {
    let list = object.get(name).and_then(Value::as_array).into_iter().flatten();
    list.filter_map(Value::as_object).cloned().collect()
}
