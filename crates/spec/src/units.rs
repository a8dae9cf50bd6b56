//! Sizes with their unit in the type. Knows how people write sizes; never rounds one.

use std::fmt;
use std::str::FromStr;

/// A number of bytes. Written as a bare number of bytes or with a unit: `KB MB GB TB` are powers
/// of 1000, `K M G T` and `KiB MiB GiB TiB` are powers of 1024.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

impl Bytes {
    pub const KIB: u64 = 1 << 10;
    pub const MIB: u64 = 1 << 20;
    pub const GIB: u64 = 1 << 30;

    /// `n` times 1024 × 1024 bytes.
    pub const fn mib(n: u64) -> Self {
        Self(n * Self::MIB)
    }

    /// Whole mebibytes, rounded down.
    pub const fn as_mib(self) -> u64 {
        self.0 / Self::MIB
    }
}

/// Why a text is no size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SizeError {
    #[error(
        "{0:?} is not a size; write a number of bytes or a number with KiB, MiB, GiB, KB, MB or GB"
    )]
    Shape(String),
    #[error("{0:?} does not fit in 64 bits")]
    TooLarge(String),
}

impl FromStr for Bytes {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let trimmed = text.trim();
        let digits = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
        let shape = || SizeError::Shape(text.to_owned());
        if digits == 0 {
            return Err(shape());
        }
        let large = || SizeError::TooLarge(text.to_owned());
        let number: u64 = trimmed[..digits].parse().map_err(|_| large())?;
        let unit = match trimmed[digits..].trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "t" | "tib" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return Err(shape()),
        };
        number.checked_mul(unit).map(Bytes).ok_or_else(large)
    }
}

impl fmt::Display for Bytes {
    /// The largest binary unit that divides the number exactly, so that parsing gives it back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
        for (name, unit) in units {
            if self.0 >= unit && self.0.is_multiple_of(unit) {
                return write!(f, "{}{name}", self.0 / unit);
            }
        }
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("134217728", 134_217_728),
            ("128M", 134_217_728),
            ("128 MiB", 134_217_728),
            ("4GB", 4_000_000_000),
            ("4g", 4 << 30),
            ("1TiB", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "G", "-1", "1.5G", "1 parsec", "0x10"] {
            assert!(matches!(text.parse::<Bytes>(), Err(SizeError::Shape(_))), "{text}");
        }
        assert!(matches!("99999999999999999999".parse::<Bytes>(), Err(SizeError::TooLarge(_))));
        assert!(matches!("99999999T".parse::<Bytes>(), Err(SizeError::TooLarge(_))));
    }

    proptest::proptest! {
        #[test]
        fn display_parses_back(n: u64) {
            proptest::prop_assert_eq!(Bytes(n).to_string().parse(), Ok(Bytes(n)));
        }
    }
}
