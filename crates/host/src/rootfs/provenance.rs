//! What an image was made of, written in the image itself, so that a copy still knows. Says
//! nothing about the host: names and digests only.

use lodge_formats::tree::{Kind, Node, Tree};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::archive::Layer;
use super::content::Content;
use crate::image::store::hex;

/// Where guests and `lodge image inspect` find it.
pub const PATH: &str = "usr/lib/lodge/provenance.json";

/// One layer, the lowest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// `base`, or the overlay's name.
    pub name: String,
    /// Of names, modes and contents.
    pub sha256: String,
    pub bytes: u64,
    /// Files and folders.
    pub entries: usize,
}

impl From<&Layer> for Made {
    fn from(layer: &Layer) -> Self {
        let Layer { name, sha256, bytes, entries, .. } = layer;
        Self { name: name.clone(), sha256: sha256.clone(), bytes: *bytes, entries: *entries }
    }
}

/// The layers that a tree says it has.
pub fn of(tree: &Tree<Content>) -> Vec<Made> {
    let Some(Kind::File { size, contents }) = tree.get(PATH).map(|n| &n.kind) else {
        return Vec::new();
    };
    let bytes = contents.read((*size).min(1 << 22)).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// Writes the layers into the tree; gives back an identity that follows from them.
pub fn put(tree: &mut Tree<Content>, layers: &[Made], time: u32) -> Result<[u8; 16], String> {
    let mut text = serde_json::to_vec_pretty(layers).map_err(|e| e.to_string())?;
    text.push(b'\n');
    let digest = Sha256::digest(&text);
    let kind = Kind::File { size: text.len() as u64, contents: Content::of(text) };
    tree.lay(Node::new(PATH, kind, 0o644, time)).map_err(|e| e.to_string())?;
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&digest[..16]);
    // A UUID made from a digest says so.
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Ok(uuid)
}

/// A digest of a whole tree: names, kinds, modes and contents.
pub fn digest(tree: &Tree<Content>) -> Result<(String, u64, usize), String> {
    let mut hash = Sha256::new();
    let (mut bytes, mut entries) = (0, 0);
    for (path, index) in tree.walk() {
        let node = &tree.nodes()[index];
        entries += 1;
        hash.update(format!("{path}\0{:o}\0", node.mode));
        match &node.kind {
            Kind::File { size, contents } => {
                let read = contents.read(*size).map_err(|e| format!("{path}: {e}"))?;
                bytes += read.len() as u64;
                hash.update(Sha256::digest(&read));
            }
            Kind::Symlink(target) => hash.update(target),
            Kind::Device { character, major, minor } => {
                hash.update(format!("{character} {major} {minor}"));
            }
            Kind::Directory | Kind::Fifo => {}
        }
    }
    Ok((hex(&hash.finalize()), bytes, entries))
}
