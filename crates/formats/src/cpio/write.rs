//! Writes archives in the form that Linux takes as an initial RAM disk.

use std::collections::BTreeSet;
use std::io::{self, Write};

/// An archive being written. Parents of files are added where they are missing.
pub struct Writer<W> {
    out: W,
    position: u64,
    inode: u32,
    folders: BTreeSet<String>,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;

impl<W: Write> Writer<W> {
    pub fn new(out: W) -> Self {
        Self { out, position: 0, inode: 0, folders: BTreeSet::new() }
    }

    /// Adds a regular file; `path` is relative to the root or absolute, `mode` its permissions.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        for (at, _) in path.match_indices('/') {
            if self.folders.insert(path[..at].to_owned()) {
                self.entry(&path[..at], DIRECTORY | 0o755, &[])?;
            }
        }
        self.entry(path, REGULAR | (mode & 0o7777), content)
    }

    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.pad()?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let too_large = |_| io::Error::new(io::ErrorKind::InvalidInput, "file is 4 GiB or larger");
        let size = u32::try_from(content.len()).map_err(too_large)?;
        self.inode += 1;
        let links = if mode & DIRECTORY != 0 { 2 } else { 1 };
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, path.len() as u32 + 1, 0];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        header.push_str(path);
        header.push('\0');
        self.write(header.as_bytes())?;
        self.pad()?;
        self.write(content)?;
        self.pad()
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.position += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let gap = (4 - self.position % 4) % 4;
        self.write(&[0; 3][..gap as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_come_first_and_everything_is_aligned() {
        let mut writer = Writer::new(Vec::new());
        writer.file("/a/b/c", 0o600, b"hello").unwrap();
        writer.file("/a/b/d", 0o644, b"").unwrap();
        let bytes = writer.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let names: Vec<_> = ["a\0", "a/b\0", "a/b/c\0", "a/b/d\0", "TRAILER!!!\0"]
            .iter()
            .map(|name| text.find(name).unwrap())
            .collect();
        assert!(names.is_sorted(), "{names:?}");
    }
}
