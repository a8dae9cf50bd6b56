//! Flists: the metadata of a file tree whose contents lie as blocks in stores elsewhere. Two
//! formats: `.flist` (a database of Cap'n Proto messages in a gzipped tar archive) and `.fl` (a
//! database of rows). Both become one index. Knows no store and fetches nothing; every number and
//! name comes from strangers.

pub mod block;
mod database;
mod index;
mod legacy;
mod rows;

use std::io::{Read, Write};

pub use block::{Block, Cipher};
pub use index::{Index, Kind, Node, ROOT};

use crate::sniff;
use crate::tree::Tree;

/// A database larger than this is refused.
pub const MAX_DATABASE: u64 = 512 << 20;
/// More files, directories and links than this are refused.
pub const MAX_NODES: usize = 8 << 20;
/// How many bytes a block holds where nothing else is said.
pub const BLOCK: u32 = 512 << 10;
/// Larger blocks are refused.
pub const MAX_BLOCK: u32 = 8 << 20;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Bad(String),
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("its database: {0}")]
    Database(#[from] rusqlite::Error),
    #[error("a message in its database: {0}")]
    Message(#[from] capnp::Error),
}

fn bad<T>(what: impl Into<String>) -> Result<T, Error> {
    Err(Error::Bad(what.into()))
}

/// The two formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `.flist`
    Flist,
    /// `.fl`
    Fl,
}

impl Format {
    pub fn cipher(self) -> Cipher {
        match self {
            Format::Flist => Cipher::Xxtea,
            Format::Fl => Cipher::AesGcm,
        }
    }
}

/// A file's contents: blocks that hold the same number of bytes, the last one what is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pieces {
    pub bytes: u32,
    pub blocks: Vec<Block>,
}

/// Where blocks are, as an flist says it. Nothing in here is to be trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    /// First and last first byte of the ids, and the store's URL. In order.
    pub ranges: Vec<(u8, u8, String)>,
    /// The text of a `router.yaml` beside the database.
    pub router: Option<String>,
}

/// An flist that was read.
#[derive(Debug)]
pub struct Flist {
    pub format: Format,
    pub index: Index,
    pub routes: Routes,
    /// What it says about itself, by name.
    pub tags: Vec<(String, String)>,
}

/// Reads an flist, told by its content.
pub fn read(mut input: impl Read) -> Result<Flist, Error> {
    let mut start = Vec::new();
    (&mut input).take(sniff::LOOK as u64).read_to_end(&mut start)?;
    let kind = sniff::kind(&start);
    let whole = start.as_slice().chain(input);
    match kind {
        sniff::Kind::Sqlite => rows::read(&take(whole)?),
        sniff::Kind::Gzip => legacy::read(flate2::read::GzDecoder::new(whole)),
        sniff::Kind::Tar => legacy::read(whole),
        other => bad(format!(
            "it is {other}; an flist is a gzipped tar archive with a database, or a database"
        )),
    }
}

fn take(input: impl Read) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    input.take(MAX_DATABASE + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > MAX_DATABASE {
        true => bad(format!("its database is larger than {} MiB", MAX_DATABASE >> 20)),
        false => Ok(bytes),
    }
}

/// Writes an flist. The same tree, routes and tags give the same bytes.
pub fn write(
    out: impl Write,
    format: Format,
    tree: &Tree<Pieces>,
    routes: &Routes,
    tags: &[(String, String)],
) -> Result<(), Error> {
    match format {
        Format::Flist => legacy::write(out, tree, routes, tags),
        Format::Fl => rows::write(out, tree, routes, tags),
    }
}
