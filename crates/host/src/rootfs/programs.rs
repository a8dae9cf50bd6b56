//! Programs of the host for guests: with the libraries and the loader that their headers name.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use lodge_formats::tree::{Kind, Node, Tree};

use super::content::Content;
use crate::{elf, paths};

/// Libraries that are looked up by name while a program runs, so no header names them.
const BY_NAME: &[&str] = &["libnss_files.so.2", "libnss_dns.so.2", "libresolv.so.2"];

/// A program as people name it: a path, or a name that is on the host's path.
pub fn find(name: &str) -> Option<PathBuf> {
    match name.contains('/') {
        true => Some(PathBuf::from(name)).filter(|p| p.is_file()),
        false => paths::find_program(name).or_else(|| {
            let own = std::env::var_os("PATH")?;
            std::env::split_paths(&own).map(|dir| dir.join(name)).find(|p| p.is_file())
        }),
    }
}

/// Shared libraries of programs, without the loader; none of `known`, none below `apart`.
pub fn libraries(
    programs: &[PathBuf],
    known: &BTreeSet<PathBuf>,
    apart: Option<&Path>,
) -> Result<Vec<PathBuf>, String> {
    let all = elf::closure(programs).map_err(|e| format!("reading a program: {e}"))?;
    let loader = |path: &Path| {
        path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"ld-linux"))
    };
    let wanted = |path: &PathBuf| {
        !loader(path) && !known.contains(path) && apart.is_none_or(|dir| !path.starts_with(dir))
    };
    Ok(all.into_iter().filter(wanted).collect())
}

/// The libraries that every guest needs besides those of its programs.
pub fn by_name(among: &[PathBuf]) -> Vec<PathBuf> {
    let folders: BTreeSet<&Path> = among.iter().filter_map(|p| p.parent()).collect();
    let places = BY_NAME.iter().flat_map(|n| folders.iter().map(move |dir| dir.join(n)));
    places.filter(|p| p.exists()).collect()
}

/// A file of the host as a file of the guest.
pub fn file(target: &str, from: &Path, time: u32) -> Result<Node<Content>, String> {
    use std::os::unix::fs::PermissionsExt;
    let text = |e: std::io::Error| format!("{}: {e}", from.display());
    let meta = fs::metadata(from).map_err(text)?;
    let kind = Kind::File { size: meta.len(), contents: Content::Path(from.to_owned()) };
    let mode = if meta.permissions().mode() & 0o111 != 0 { 0o755 } else { 0o644 };
    Ok(Node::new(target.trim_start_matches('/'), kind, mode, time))
}

/// Lays libraries at the paths that they have on the host.
pub fn lay_libraries(
    tree: &mut Tree<Content>,
    libraries: &[PathBuf],
    time: u32,
) -> Result<(), String> {
    for library in libraries {
        let node = file(&library.to_string_lossy(), library, time)?;
        tree.lay(node).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// Copies a file to its path below a folder.
pub fn copy(from: &Path, below: &Path, target: &Path) -> Result<(), String> {
    let to = below.join(target.strip_prefix("/").unwrap_or(target));
    let text = |e: std::io::Error| format!("{}: {e}", to.display());
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).map_err(text)?;
    }
    // A program that runs cannot be written to; its name can be given to another.
    let _ = fs::remove_file(&to);
    fs::copy(from, &to).map(drop).map_err(text)
}
