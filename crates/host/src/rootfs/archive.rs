//! Archives that become layers of a tree: spooled whole, checked before anything is taken from
//! them, known by the digest of what they hold. Foreign bytes: sizes are bounded, names stay inside.

use std::fs::File;
use std::io::{self, BufReader, Cursor, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use lodge_formats::cpio;
use lodge_formats::sniff::{self, Kind as FileKind};
use lodge_formats::tree::{self, Entry, Kind, Node, Tree};

use super::content::Content;
use super::provenance;

/// Larger archives are refused.
const MAX_BYTES: u64 = 64 << 30;
/// What tells a cpio archive is in its first bytes.
const MAGIC: usize = 6;
/// So many zero bytes end an archive, at least.
const END: usize = 512;

/// A checked archive.
#[derive(Clone)]
pub struct Layer {
    /// What people know it by.
    pub name: String,
    /// Of names, modes and contents: the same files give the same, whenever they were packed.
    pub sha256: String,
    pub bytes: u64,
    pub entries: usize,
    file: Arc<File>,
}

impl Layer {
    /// Takes an uncompressed tar stream.
    pub fn take(name: &str, mut stream: impl Read) -> Result<Self, String> {
        let error = |e: io::Error| format!("{name}: {e}");
        let mut file = tempfile::tempfile().map_err(error)?;
        let mut buffer = vec![0; 1 << 18];
        let mut bytes = 0;
        let mut zeroes = 0;
        loop {
            let count = match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(error(e)),
            };
            let chunk = &buffer[..count];
            file.write_all(chunk).map_err(error)?;
            bytes += count as u64;
            let tail = chunk.iter().rev().take_while(|b| **b == 0).count();
            zeroes = if tail == count { zeroes + tail } else { tail };
            if bytes > MAX_BYTES {
                return Err(format!("{name}: the archive is larger than {MAX_BYTES} bytes"));
            }
        }
        if bytes == 0 {
            return Err(format!("{name}: it wrote nothing, not even an empty archive"));
        }
        let layer = Self {
            name: name.to_owned(),
            sha256: String::new(),
            bytes,
            entries: 0,
            file: Arc::new(file),
        };
        layer.check(zeroes)
    }

    /// Takes an archive from a file, whatever it is packed with.
    pub fn open(name: &str, path: &Path) -> Result<Self, String> {
        let mut stream = unpacked(path).map_err(|e| format!("{name}: {e}"))?;
        let error = |e: io::Error| format!("{name}: {e}");
        let mut start = Vec::with_capacity(MAGIC);
        stream.by_ref().take(MAGIC as u64).read_to_end(&mut start).map_err(error)?;
        let is_cpio = sniff::kind(&start) == FileKind::Cpio;
        let stream = Cursor::new(start).chain(stream);
        if !is_cpio {
            return Self::take(name, stream);
        }
        let mut tar = tempfile::tempfile().map_err(error)?;
        cpio::to_tar(stream.take(MAX_BYTES), io::BufWriter::new(&tar)).map_err(error)?;
        tar.rewind().map_err(error)?;
        Self::take(name, tar)
    }

    fn check(mut self, zeroes: usize) -> Result<Self, String> {
        let mut tree: Tree<Content> = Tree::new(0);
        let first = self.start().map_err(|e| format!("{}: {e}", self.name))?;
        match self.lay_into(&mut tree, 0) {
            Ok(entries) if zeroes >= END => {
                self.entries = entries;
                self.sha256 = provenance::digest(&tree)?.0;
                Ok(self)
            }
            Ok(_) => Err(format!("{}: the archive is cut off", self.name)),
            Err(error) => match first.get(257..262) == Some(b"ustar") {
                true => Err(error),
                false => Err(format!(
                    "{}: what it wrote is no tar archive; it begins with {:?}",
                    self.name,
                    String::from_utf8_lossy(&first[..first.len().min(40)])
                )),
            },
        }
    }

    fn start(&self) -> io::Result<Vec<u8>> {
        let mut start = vec![0; self.bytes.min(512) as usize];
        std::os::unix::fs::FileExt::read_exact_at(&*self.file, &mut start, 0)?;
        Ok(start)
    }

    /// Lays all entries over a tree, owned by root and of one time; how many there were.
    pub fn lay_into(&self, tree: &mut Tree<Content>, time: u32) -> Result<usize, String> {
        self.lay(tree, Some(time))
    }

    /// Lays all entries over a tree with the owners and times that they have.
    pub fn lay_as_packed(&self, tree: &mut Tree<Content>) -> Result<usize, String> {
        self.lay(tree, None)
    }

    /// `of_root`: all belong to root and have this time.
    fn lay(&self, tree: &mut Tree<Content>, of_root: Option<u32>) -> Result<usize, String> {
        let text = |e: &dyn std::fmt::Display| format!("{}: {e}", self.name);
        let mut count = 0;
        let reader = BufReader::with_capacity(1 << 16, At { file: &*self.file, at: 0 });
        let mut archive = tar::Archive::new(reader);
        for entry in archive.entries_with_seek().map_err(|e| text(&e))? {
            let mut entry = entry.map_err(|e| text(&e))?;
            count += 1;
            let node = match tree::read_entry(&mut entry).map_err(|e| text(&e))? {
                Entry::Link { path, target } => {
                    tree.lay_link(&path, &target).map_err(|e| text(&e))?;
                    continue;
                }
                Entry::Node(node) => node,
            };
            // The root of the archive is not the root of the image.
            if node.path.is_empty() {
                continue;
            }
            let size = node.size();
            let content = if entry.header().entry_type().is_gnu_sparse() {
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).map_err(|e| text(&e))?;
                Content::of(bytes)
            } else {
                let at = entry.raw_file_position();
                if at.checked_add(size).is_none_or(|end| end > self.bytes) {
                    return Err(format!("{}: {} is cut off", self.name, node.path));
                }
                Content::Within(self.file.clone(), at)
            };
            let node = node.with(|()| content);
            let node = match of_root {
                Some(time) => Node { uid: 0, gid: 0, time, ..node },
                None => node,
            };
            tree.lay(node).map_err(|e| text(&e))?;
        }
        Ok(count)
    }

    /// One file of the archive, if it is there.
    pub fn file(&self, path: &str) -> Option<Vec<u8>> {
        let mut tree = Tree::new(0);
        self.lay_into(&mut tree, 0).ok()?;
        match &tree.get(path)?.kind {
            Kind::File { size, contents } => contents.read(*size).ok(),
            _ => None,
        }
    }

    /// The same archive with one file in place of another.
    pub fn replace(&self, path: &str, content: &[u8]) -> Result<Self, String> {
        let text = |e: io::Error| format!("{}: {e}", self.name);
        let mut out = tar::Builder::new(Vec::new());
        let mut archive = tar::Archive::new(At { file: &*self.file, at: 0 });
        for entry in archive.entries().map_err(text)? {
            let mut entry = entry.map_err(text)?;
            let mut header = entry.header().clone();
            let name = entry.path().map_err(text)?.into_owned();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).map_err(text)?;
            if name == Path::new(path) {
                bytes = content.to_vec();
                header.set_size(bytes.len() as u64);
            }
            match entry.link_name().map_err(text)? {
                Some(target) => out.append_link(&mut header, name, target).map_err(text)?,
                None => out.append_data(&mut header, name, bytes.as_slice()).map_err(text)?,
            }
        }
        Self::take(&self.name, Cursor::new(out.into_inner().map_err(text)?))
    }

    /// Packs the archive into a file, whole or not at all.
    pub fn pack(&self, path: &Path) -> Result<(), String> {
        let text = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let dir = path.parent().unwrap_or(Path::new("/"));
        std::fs::create_dir_all(dir).map_err(|e| text(&e))?;
        let part = tempfile::Builder::new().prefix(".part-").tempfile_in(dir);
        let part = part.map_err(|e| text(&e))?;
        let options = lzma_rust2::XzOptions::with_preset(6);
        let out = io::BufWriter::new(part.as_file());
        let mut packed = lzma_rust2::XzWriter::new(out, options).map_err(|e| text(&e))?;
        io::copy(&mut self.stream(), &mut packed).map_err(|e| text(&e))?;
        packed.finish().and_then(|mut out| out.flush()).map_err(|e| text(&e))?;
        part.persist(path).map(drop).map_err(|e| text(&e))
    }

    /// The archive itself.
    pub fn stream(&self) -> impl Read {
        At { file: self.file.clone(), at: 0 }
    }
}

/// A file read from its own place, so that several may read it.
struct At<F> {
    file: F,
    at: u64,
}

impl<F: std::ops::Deref<Target = File>> Read for At<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = std::os::unix::fs::FileExt::read_at(&*self.file, buffer, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl<F: std::ops::Deref<Target = File>> Seek for At<F> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let end = self.file.metadata()?.len();
        let place = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => end.checked_add_signed(by),
        };
        self.at = place.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

/// A tar or cpio archive, whatever it is packed with: told by its content.
pub fn unpacked(path: &Path) -> Result<Box<dyn Read>, String> {
    let text = |e: io::Error| format!("{}: {e}", path.display());
    let mut file = File::open(path).map_err(text)?;
    let kind = sniff::read(&mut file).map_err(text)?;
    file.seek(SeekFrom::Start(0)).map_err(text)?;
    let file = BufReader::with_capacity(1 << 16, file);
    Ok(match kind {
        FileKind::Tar | FileKind::Cpio => Box::new(file),
        FileKind::Gzip => Box::new(flate2::read::MultiGzDecoder::new(file)),
        FileKind::Bzip2 => Box::new(bzip2::read::MultiBzDecoder::new(file)),
        FileKind::Xz => Box::new(lzma_rust2::XzReader::new(file, true)),
        FileKind::Zstd => Box::new(
            ruzstd::decoding::StreamingDecoder::new(file)
                .map_err(|e| format!("{}: {e}", path.display()))?,
        ),
        // An empty archive is a block of zeroes.
        FileKind::Unknown if path.metadata().is_ok_and(|m| m.len() >= END as u64) => Box::new(file),
        other => return Err(format!("{} is {other}, not an archive", path.display())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar(files: &[(&str, &str)]) -> Vec<u8> {
        let mut out = tar::Builder::new(Vec::new());
        for (name, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            header.set_uid(1000);
            out.append_data(&mut header, name, content.as_bytes()).unwrap();
        }
        out.into_inner().unwrap()
    }

    fn why(bytes: &[u8]) -> String {
        Layer::take("ovl", bytes).err().unwrap()
    }

    #[test]
    fn whole_archives_are_taken_and_belong_to_root() {
        let layer = Layer::take("ovl", &tar(&[("etc/x", "1"), ("etc/y", "22")])[..]).unwrap();
        assert_eq!(layer.entries, 2);
        assert_eq!(layer.file("etc/y").unwrap(), b"22");
        let mut tree = Tree::new(0);
        layer.lay_into(&mut tree, 7).unwrap();
        let node = tree.get("etc/x").unwrap();
        assert_eq!((node.uid, node.gid, node.time), (0, 0, 7));
        let other = layer.replace("etc/x", b"other").unwrap();
        assert_eq!(other.file("etc/x").unwrap(), b"other");
        assert_eq!(other.file("etc/y").unwrap(), b"22");
    }

    #[test]
    fn empty_archives_are_allowed_and_nothing_is_not() {
        assert_eq!(Layer::take("ovl", &[0; 10240][..]).unwrap().entries, 0);
        assert_eq!(why(b""), "ovl: it wrote nothing, not even an empty archive");
    }

    #[test]
    fn what_is_cut_off_or_mixed_with_words_is_refused() {
        let whole = tar(&[("a", "1"), ("b", &"2".repeat(5000))]);
        for cut in [100, 512, 600, 1024, 2000, 6000, whole.len() - 1024] {
            let message = why(&whole[..cut]);
            assert!(message.starts_with("ovl: "), "{cut}: {message}");
        }
        let mixed = [&b"Building now...\n"[..], &whole].concat();
        let message = why(&mixed);
        assert!(message.contains("no tar archive; it begins with \"Building now"), "{message}");
        assert!(why(b"hello\n").contains("it begins with \"hello\\n\""));
    }
}
