//! Disks that come over a connection, whatever is spoken there.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::nbd::Nbd;
use crate::zdb::Zdb;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remote {
    Nbd(Nbd),
    Zdb(Zdb),
}

impl Remote {
    /// Whether somebody who names this means such a disk.
    pub fn is_meant(text: &str) -> bool {
        Nbd::is_meant(text) || Zdb::is_meant(text)
    }

    /// The address, with nothing in it that is secret.
    pub fn shown(&self) -> String {
        match self {
            Remote::Nbd(nbd) => nbd.to_string(),
            Remote::Zdb(zdb) => zdb.shown(),
        }
    }
}

impl FromStr for Remote {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match Zdb::is_meant(text) {
            true => text.parse().map(Remote::Zdb),
            false => text.parse().map(Remote::Nbd),
        }
    }
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Remote::Nbd(nbd) => nbd.fmt(f),
            Remote::Zdb(zdb) => zdb.fmt(f),
        }
    }
}
