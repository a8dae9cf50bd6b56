//! Where the contents of a tree's files are: in memory, in an archive, on the host, on a disk.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Cursor, Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use lodge_formats::ext4::read::{Piece, Stream};

/// Something that can be read anywhere.
pub trait Source: Read + Seek {}
impl<T: Read + Seek> Source for T {}

pub type Disk = Rc<RefCell<Box<dyn Source>>>;

#[derive(Clone)]
pub enum Content {
    Bytes(Arc<[u8]>),
    /// From this byte of an archive on.
    Within(Arc<File>, u64),
    /// A file of the host.
    Path(PathBuf),
    /// Pieces of a file system.
    Pieces(Disk, Rc<[Piece]>),
}

impl Content {
    pub fn of(bytes: impl Into<Arc<[u8]>>) -> Self {
        Content::Bytes(bytes.into())
    }

    /// The bytes, in order; perhaps more than the file has.
    pub fn open(&self) -> io::Result<Opened> {
        Ok(match self {
            Content::Bytes(bytes) => Opened::Bytes(Cursor::new(bytes.clone())),
            Content::Within(file, at) => Opened::Within(file.clone(), *at),
            Content::Path(path) => {
                let error =
                    |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
                Opened::File(File::open(path).map_err(error)?)
            }
            Content::Pieces(disk, pieces) => {
                Opened::Pieces { disk: disk.clone(), pieces: pieces.clone(), read: 0 }
            }
        })
    }

    pub fn read(&self, size: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open()?.take(size).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

pub enum Opened {
    Bytes(Cursor<Arc<[u8]>>),
    Within(Arc<File>, u64),
    File(File),
    Pieces { disk: Disk, pieces: Rc<[Piece]>, read: u64 },
}

impl Read for Opened {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Opened::Bytes(bytes) => bytes.read(buffer),
            Opened::Within(file, at) => {
                let count = file.read_at(buffer, *at)?;
                *at += count as u64;
                Ok(count)
            }
            Opened::File(file) => file.read(buffer),
            Opened::Pieces { disk, pieces, read } => {
                // Only one is read at a time, so each takes up where it was.
                let mut skip = *read;
                let mut rest = &pieces[..];
                while let [first, later @ ..] = rest
                    && skip >= first.length
                {
                    skip -= first.length;
                    rest = later;
                }
                let Some(first) = rest.first() else { return Ok(0) };
                let at = first.at.map(|at| at + skip);
                let piece = [Piece { at, length: first.length - skip }];
                let mut disk = disk.borrow_mut();
                let count = Stream::new(&mut *disk, &piece).read(buffer)?;
                *read += count as u64;
                Ok(count)
            }
        }
    }
}
