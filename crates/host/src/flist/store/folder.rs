//! A folder with a file for each block, in subfolders by the first byte of its name.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use url::Url;

use super::{MAX_BODY, Store, hex};

pub(super) struct Folder {
    root: PathBuf,
}

impl Folder {
    pub(super) fn of(url: &Url) -> Result<Self, String> {
        match url.path() {
            "" | "/" => Err("the folder's path is missing".into()),
            path => {
                let path = percent(path);
                Ok(Self { root: PathBuf::from(path) })
            }
        }
    }
}

/// A path as the file system knows it.
fn percent(path: &str) -> String {
    let mut query = url::form_urlencoded::parse(path.as_bytes());
    // Without `=` all is one key; plus signs are themselves in a path.
    match path.contains(['+', '&', '=']) {
        true => path.to_owned(),
        false => query.next().map_or_else(|| path.to_owned(), |(key, _)| key.into_owned()),
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, String> {
    let text = |e: std::io::Error| format!("{}: {e}", path.display());
    match fs::File::open(path) {
        Ok(file) => {
            let mut bytes = Vec::new();
            file.take(MAX_BODY).read_to_end(&mut bytes).map_err(text)?;
            Ok(Some(bytes))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(text(error)),
    }
}

impl Store for Folder {
    fn get(&self, id: &[u8], _: Instant) -> Result<Option<Vec<u8>>, String> {
        let name = hex(id);
        match read(&self.root.join(&name[..2]).join(&name))? {
            Some(body) => Ok(Some(body)),
            // As older writers laid them out.
            None => read(&self.root.join(&name)),
        }
    }

    fn put(&self, id: &[u8], body: &[u8], _: Instant) -> Result<(), String> {
        let name = hex(id);
        let folder = self.root.join(&name[..2]);
        let path = folder.join(&name);
        let text = |e: std::io::Error| format!("{}: {e}", path.display());
        if path.exists() {
            return Ok(());
        }
        fs::create_dir_all(&folder).map_err(text)?;
        let mut part = tempfile::NamedTempFile::new_in(&folder).map_err(text)?;
        part.write_all(body).map_err(text)?;
        use std::os::unix::fs::PermissionsExt;
        part.as_file().set_permissions(fs::Permissions::from_mode(0o644)).map_err(text)?;
        part.persist(&path).map(drop).map_err(|e| text(e.error))
    }
}
