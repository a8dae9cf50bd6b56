//! What an image was made of, beside it: every input with its digest. It also tells whether an
//! image has to be made anew.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::pack::Sums;
use crate::image::debian::Contents;
use crate::image::store::{digest_of, hex};

/// Raised when the same inputs give other bytes than before.
const FORM: u32 = 2;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Provenance {
    pub(super) image: String,
    pub(super) made_by: String,
    pub(super) size_bytes: u64,
    /// Digest of all that decides about its bytes.
    pub(super) inputs_sha256: String,
    pub(super) suite: String,
    pub(super) mirrors: Vec<String>,
    pub(super) packages: Vec<Package>,
    /// What was put in besides packages, and what firmware loads.
    pub(super) files: Vec<Part>,
    pub(super) outputs: Vec<Output>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Package {
    pub(super) name: String,
    pub(super) version: String,
    /// Of the package's file.
    pub(super) sha256: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Part {
    pub(super) path: String,
    pub(super) sha256: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Output {
    pub(super) file: String,
    #[serde(flatten)]
    pub(super) sums: Sums,
}

/// The digests of what is put in besides packages.
pub(super) fn parts(contents: &Contents) -> Vec<Part> {
    let files = contents.early.iter().chain(&contents.late);
    files
        .map(|f| Part {
            path: format!("{}:{:o}", f.path, f.mode),
            sha256: hex(&Sha256::digest(&f.content)),
        })
        .chain(contents.links.iter().map(|(path, target)| Part {
            path: format!("{path} -> {target}"),
            sha256: hex(&Sha256::digest(target)),
        }))
        .chain(contents.run.iter().map(|words| Part {
            path: format!("run {}", words.join(" ")),
            sha256: hex(&Sha256::digest(words.join("\0"))),
        }))
        .collect()
}

/// One digest of many inputs.
pub(super) fn digest(inputs: &[&str]) -> String {
    let mut hash = Sha256::new();
    hash.update(FORM.to_be_bytes());
    for input in inputs {
        hash.update((input.len() as u64).to_be_bytes());
        hash.update(input);
    }
    hex(&hash.finalize())
}

/// The packages in a tree, with the digests of those files that the cache still has.
pub(super) fn packages(tree: &Path, cache: &Path) -> io::Result<Vec<Package>> {
    let mut archive = tar::Archive::new(BufReader::with_capacity(1 << 20, File::open(tree)?));
    let mut status = String::new();
    for entry in archive.entries_with_seek()? {
        let mut entry = entry?;
        if entry.path()?.ends_with("var/lib/dpkg/status") {
            entry.read_to_string(&mut status)?;
            break;
        }
    }
    let field = |paragraph: &str, name: &str| {
        let lines = paragraph.lines().filter_map(|l| l.strip_prefix(name)?.strip_prefix(": "));
        lines.map(str::to_owned).next()
    };
    let mut list = Vec::new();
    for paragraph in status.split("\n\n") {
        let named = field(paragraph, "Package").zip(field(paragraph, "Version"));
        let Some((name, version)) = named else { continue };
        let kind = field(paragraph, "Architecture").unwrap_or_default();
        let file = format!("{name}_{}_{kind}.deb", version.replace(':', "%3a"));
        let sha256 = digest_of(&cache.join(file)).ok();
        list.push(Package { name, version, sha256 });
    }
    list.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(list)
}

/// Bytes of all files in a tree, in whole blocks.
pub(super) fn contents(tree: &Path) -> io::Result<u64> {
    let mut archive = tar::Archive::new(BufReader::with_capacity(1 << 20, File::open(tree)?));
    let mut bytes = 0;
    for entry in archive.entries_with_seek()? {
        bytes += entry?.header().entry_size()?.next_multiple_of(4096) + 256;
    }
    Ok(bytes)
}

impl Provenance {
    pub(super) fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        let mut text = serde_json::to_string_pretty(self).map_err(io::Error::other)?;
        text.push('\n');
        crate::paths::write_atomically(path, text.as_bytes())
    }
}
