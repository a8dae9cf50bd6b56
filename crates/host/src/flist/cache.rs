//! The blocks that this host has, as plain bytes in files named by the block. One folder for all
//! machines and flists. Nobody is trusted to have kept them: every reader checks a block against
//! its digest before it uses it, and what does not match is thrown away.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use lodge_formats::flist::{Block, Cipher};

const DAY: Duration = Duration::from_secs(86_400);

pub struct Cache {
    root: PathBuf,
}

impl Cache {
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    fn path(&self, block: &Block) -> PathBuf {
        let name = crate::image::store::hex(&block.id);
        self.root.join(&name[..2]).join(name)
    }

    /// A block's file, if what is in it is the block.
    pub fn checked(&self, cipher: Cipher, block: &Block) -> Option<File> {
        let path = self.path(block);
        let mut file = File::open(&path).ok()?;
        let mut bytes = Vec::new();
        let most = u64::from(lodge_formats::flist::MAX_BLOCK);
        (&mut file).take(most + 1).read_to_end(&mut bytes).ok()?;
        if !cipher.holds(block, &bytes) {
            // Damaged or tampered with; whoever needs it fetches it anew.
            let _ = fs::remove_file(&path);
            return None;
        }
        // Who used a block lately is told by its time; to the day is near enough.
        let old = |meta: fs::Metadata| meta.modified().ok()?.elapsed().ok();
        if file.metadata().ok().and_then(old).is_some_and(|age| age > DAY) {
            let _ = file.set_modified(SystemTime::now());
        }
        Some(file)
    }

    /// Keeps a block that was just checked. It appears whole or not at all; a host that dies
    /// meanwhile may leave less, which `checked` finds out.
    pub fn put(&self, block: &Block, plain: &[u8]) -> io::Result<File> {
        let path = self.path(block);
        let folder = path.parent().expect("in a folder");
        if !folder.is_dir() {
            fs::create_dir_all(folder)?;
        }
        let mut part = tempfile::NamedTempFile::new_in(folder)?;
        part.write_all(plain)?;
        part.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
        part.persist(&path).map_err(|e| e.error)
    }

    /// Takes the blocks away that nobody has used for longest, until all are no larger together
    /// than `most` bytes; how many bytes that are. Whoever is using one keeps it.
    pub fn trim(&self, most: u64, dry_run: bool) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        let mut all = Vec::new();
        for folder in fs::read_dir(&self.root)?.flatten() {
            for entry in fs::read_dir(folder.path()).into_iter().flatten().flatten() {
                if let Ok(meta) = entry.metadata() {
                    all.push((meta.mtime(), meta.blocks() * 512, entry.path()));
                }
            }
        }
        let mut total: u64 = all.iter().map(|(_, bytes, _)| bytes).sum();
        let mut freed = 0;
        all.sort();
        for (_, bytes, path) in all {
            if total <= most {
                break;
            }
            if dry_run || fs::remove_file(path).is_ok() {
                total -= bytes;
                freed += bytes;
            }
        }
        Ok(freed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_changed_is_gone_and_what_is_too_much_goes_oldest_first() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path());
        let cipher = Cipher::AesGcm;
        let blocks: Vec<(Block, Vec<u8>)> = (0..4u8)
            .map(|byte| {
                let plain = vec![byte; 8192];
                (cipher.seal(&plain).0, plain)
            })
            .collect();
        for (age, (block, plain)) in blocks.iter().enumerate() {
            let file = cache.put(block, plain).unwrap();
            let time = SystemTime::now() - DAY * (10 - age as u32);
            file.set_modified(time).unwrap();
        }
        assert!(cache.checked(cipher, &blocks[0].0).is_some(), "used, and so not the oldest");
        fs::write(cache.path(&blocks[3].0), b"other").unwrap();
        assert!(cache.checked(cipher, &blocks[3].0).is_none());
        assert!(!cache.path(&blocks[3].0).exists());
        assert_eq!(cache.trim(16_384, true).unwrap(), 8192);
        assert_eq!(cache.trim(16_384, false).unwrap(), 8192);
        let there = |i: usize| cache.path(&blocks[i].0).exists();
        assert_eq!((there(0), there(1), there(2)), (true, false, true));
    }
}
