//! Reads archives and writes them as tar, entry for entry, so that whoever takes one checks both
//! alike. Foreign bytes: names and link targets are bounded, contents are passed on as they come.

use std::collections::HashMap;
use std::io::{self, Read, Write};

const HEADER: usize = 110;
const LAST: &[u8] = b"TRAILER!!!";
/// Longer names and link targets are refused.
const MAX_NAME: u64 = 4096;
/// Names of one file that come before its contents do.
const MAX_NAMES: usize = 1 << 16;

/// A header: the fields that count.
struct Head {
    inode: (u64, u64, u64),
    mode: u32,
    uid: u64,
    gid: u64,
    names: u64,
    time: u64,
    size: u64,
    device: (u32, u32),
    name_length: u64,
}

/// Where a file with several names stands.
enum Known {
    /// These names wait for its contents, which come with the last of them.
    Waiting(Vec<(Vec<u8>, Head)>),
    /// It is under this name.
    There(Vec<u8>),
}

/// Reads to the end of the archive.
pub fn to_tar(input: impl Read, out: impl Write) -> io::Result<()> {
    let mut input = Aligned { input, position: 0 };
    let mut out = tar::Builder::new(out);
    let mut known: HashMap<(u64, u64, u64), Known> = HashMap::new();
    let mut waiting = 0;
    while let Some((head, name)) = next(&mut input)? {
        let several = head.names > 1 && head.mode & FORMAT == REGULAR;
        let size = head.size;
        match known.get_mut(&head.inode).filter(|_| several) {
            Some(Known::There(first)) => {
                let first = first.clone();
                entry(&mut out, &head, &name, tar::EntryType::Link, Some(&first), io::empty())?;
                input.skip(size)?;
                continue;
            }
            Some(Known::Waiting(list)) if size == 0 => {
                waiting += 1;
                list.push((name, head));
            }
            None if several && size == 0 => {
                waiting += 1;
                known.insert(head.inode, Known::Waiting(vec![(name, head)]));
            }
            Some(Known::Waiting(_)) | None => {
                write(&mut out, &head, &name, &mut input)?;
                if several {
                    let earlier = known.insert(head.inode, Known::There(name.clone()));
                    if let Some(Known::Waiting(list)) = earlier {
                        link_all(&mut out, &list, &name)?;
                    }
                }
            }
        }
        if waiting > MAX_NAMES {
            return Err(wrong("too many names wait for a file"));
        }
    }
    // Files without contents.
    let mut left: Vec<_> = known.into_iter().collect();
    left.sort_by_key(|(inode, _)| *inode);
    for (_, file) in left {
        let Known::Waiting(list) = file else { continue };
        let Some(((name, head), others)) = list.split_first() else { continue };
        entry(&mut out, head, name, tar::EntryType::Regular, None, io::empty())?;
        link_all(&mut out, others, name)?;
    }
    out.finish()
}

const FORMAT: u32 = 0o170_000;
const REGULAR: u32 = 0o100_000;

fn link_all(
    out: &mut tar::Builder<impl Write>,
    list: &[(Vec<u8>, Head)],
    to: &[u8],
) -> io::Result<()> {
    list.iter().try_for_each(|(name, head)| {
        entry(out, head, name, tar::EntryType::Link, Some(to), io::empty())
    })
}

fn write<R: Read>(
    out: &mut tar::Builder<impl Write>,
    head: &Head,
    name: &[u8],
    input: &mut Aligned<R>,
) -> io::Result<()> {
    let kind = match head.mode & FORMAT {
        0o040_000 => tar::EntryType::Directory,
        REGULAR => tar::EntryType::Regular,
        0o120_000 => tar::EntryType::Symlink,
        0o020_000 => tar::EntryType::Char,
        0o060_000 => tar::EntryType::Block,
        0o010_000 => tar::EntryType::Fifo,
        // A socket means nothing in an archive.
        0o140_000 => return input.skip(head.size),
        other => return Err(wrong(format!("a file of kind {other:o} is not known"))),
    };
    if kind == tar::EntryType::Symlink {
        let target = input.bytes(head.size)?;
        input.align()?;
        return entry(out, head, name, kind, Some(&target), io::empty());
    }
    let size = if kind == tar::EntryType::Regular { head.size } else { 0 };
    entry(out, head, name, kind, None, input.by_ref().take(size))?;
    input.skip(head.size - size)?;
    input.align()
}

/// One entry of the tar archive, with as many bytes as the reader has.
fn entry(
    out: &mut tar::Builder<impl Write>,
    head: &Head,
    name: &[u8],
    kind: tar::EntryType,
    target: Option<&[u8]>,
    contents: impl Read,
) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let path = |bytes: &[u8]| std::path::PathBuf::from(std::ffi::OsStr::from_bytes(bytes));
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(head.mode & 0o7777);
    header.set_uid(head.uid);
    header.set_gid(head.gid);
    header.set_mtime(head.time);
    header.set_size(if kind == tar::EntryType::Regular && target.is_none() {
        head.size
    } else {
        0
    });
    if matches!(kind, tar::EntryType::Char | tar::EntryType::Block) {
        header.set_device_major(head.device.0)?;
        header.set_device_minor(head.device.1)?;
    }
    // Absolute names are names below the root.
    let start = name.iter().take_while(|byte| **byte == b'/').count();
    let name = if start == name.len() { b"." } else { &name[start..] };
    match target {
        Some(target) => out.append_link(&mut header, path(name), path(target)),
        None => out.append_data(&mut header, path(name), contents),
    }
}

fn wrong(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the cpio archive: {}", what.into()))
}

/// The next entry; its contents are still to be read.
fn next<R: Read>(input: &mut Aligned<R>) -> io::Result<Option<(Head, Vec<u8>)>> {
    let head = Head::of(&input.bytes(HEADER as u64)?)?;
    let mut name = input.bytes(head.name_length)?;
    input.align()?;
    if name.pop() != Some(0) || name.contains(&0) || name.is_empty() {
        return Err(wrong("a name is not one"));
    }
    Ok((name != LAST).then_some((head, name)))
}

impl Head {
    fn of(bytes: &[u8]) -> io::Result<Self> {
        if !matches!(&bytes[..6], b"070701" | b"070702") {
            return Err(wrong("it is not in the newc form, or is damaged"));
        }
        let text = std::str::from_utf8(&bytes[6..]).map_err(|_| wrong("a header is damaged"))?;
        let field = |i: usize| {
            let digits = text.get(i * 8..i * 8 + 8).filter(|d| !d.contains('+'));
            let number = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
            number.ok_or_else(|| wrong("a header is damaged"))
        };
        let wide = |i: usize| field(i).map(u64::from);
        Ok(Self {
            inode: (wide(0)?, wide(7)?, wide(8)?),
            mode: field(1)?,
            uid: wide(2)?,
            gid: wide(3)?,
            names: wide(4)?,
            time: wide(5)?,
            size: wide(6)?,
            device: (field(9)?, field(10)?),
            name_length: wide(11)?,
        })
    }
}

/// Knows where it is, as headers and contents begin at multiples of four.
struct Aligned<R> {
    input: R,
    position: u64,
}

impl<R: Read> Read for Aligned<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl<R: Read> Aligned<R> {
    /// So many bytes, which are few.
    fn bytes(&mut self, count: u64) -> io::Result<Vec<u8>> {
        if count > MAX_NAME {
            return Err(wrong("a name or a link is too long"));
        }
        let mut bytes = vec![0; count as usize];
        self.read_exact(&mut bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => wrong("it is cut off"),
            _ => error,
        })?;
        Ok(bytes)
    }

    fn skip(&mut self, count: u64) -> io::Result<()> {
        let skipped = io::copy(&mut self.by_ref().take(count), &mut io::sink())?;
        if skipped < count { Err(wrong("it is cut off")) } else { self.align() }
    }

    fn align(&mut self) -> io::Result<()> {
        let gap = (4 - self.position % 4) % 4;
        self.bytes(gap).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Writer;
    use super::*;
    use crate::tree::{Entry, Kind, read_entry};

    /// Fields that count: inode, mode, names, contents.
    fn archive(list: &[(u32, u32, u32, &str, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        let trailer = (0, 0, 1, "TRAILER!!!", &b""[..]);
        for (inode, mode, names, path, content) in list.iter().copied().chain([trailer]) {
            let (size, length) = (content.len() as u32, path.len() as u32 + 1);
            out.extend_from_slice(b"070701");
            for field in [inode, mode, 7, 8, names, 9, size, 0, 0, 5, 1, length, 0] {
                out.extend_from_slice(format!("{field:08X}").as_bytes());
            }
            out.extend_from_slice(path.as_bytes());
            out.push(0);
            out.resize(out.len().next_multiple_of(4), 0);
            out.extend_from_slice(content);
            out.resize(out.len().next_multiple_of(4), 0);
        }
        out
    }

    fn read(bytes: &[u8]) -> io::Result<Vec<String>> {
        let mut out = Vec::new();
        to_tar(bytes, &mut out)?;
        let mut archive = tar::Archive::new(&out[..]);
        let entries = archive.entries()?;
        Ok(entries
            .map(|entry| {
                let mut entry = entry.unwrap();
                let said = match read_entry(&mut entry).unwrap() {
                    Entry::Link { path, target } => format!("{path} = {target}"),
                    Entry::Node(node) => {
                        let kind = match node.kind {
                            Kind::Symlink(to) => format!("-> {}", String::from_utf8_lossy(&to)),
                            Kind::Device { character, major, minor } => {
                                format!("device {character} {major}:{minor}")
                            }
                            Kind::Directory => "folder".into(),
                            Kind::Fifo => "fifo".into(),
                            Kind::File { .. } => "file".into(),
                        };
                        format!("{} {:o} {} {kind}", node.path, node.mode, node.uid)
                    }
                };
                let mut text = String::new();
                entry.read_to_string(&mut text).unwrap();
                format!("{said} {text}").trim_end().to_owned()
            })
            .collect())
    }

    #[test]
    fn everything_that_there_is_comes_through() {
        let bytes = archive(&[
            (1, 0o040_755, 2, ".", b""),
            (2, 0o040_700, 2, "d", b""),
            (3, 0o100_640, 1, "d/f", b"five!"),
            (4, 0o120_777, 1, "d/l", b"f"),
            (5, 0o020_600, 1, "d/c", b""),
            (6, 0o010_600, 1, "d/p", b""),
            (7, 0o140_600, 1, "d/socket", b""),
            (8, 0o100_600, 3, "d/one", b""),
            (8, 0o100_600, 3, "d/two", b""),
            (9, 0o100_600, 2, "d/none", b""),
            (8, 0o100_600, 3, "d/three", b"shared"),
            (9, 0o100_600, 2, "d/neither", b""),
            (10, 0o100_755, 1, "/abs", b"x"),
        ]);
        assert_eq!(
            read(&bytes).unwrap(),
            [
                " 755 7 folder",
                "d 700 7 folder",
                "d/f 640 7 file five!",
                "d/l 777 7 -> f",
                "d/c 600 7 device true 5:1",
                "d/p 600 7 fifo",
                "d/three 600 7 file shared",
                "d/one = d/three",
                "d/two = d/three",
                "abs 755 7 file x",
                "d/none 600 7 file",
                "d/neither = d/none",
            ]
        );
    }

    #[test]
    fn what_is_written_here_is_read() {
        let mut writer = Writer::new(Vec::new());
        writer.file("/a/b", 0o600, b"hello").unwrap();
        let bytes = writer.finish().unwrap();
        assert_eq!(read(&bytes).unwrap(), ["a 755 0 folder", "a/b 600 0 file hello"]);
    }

    #[test]
    fn what_is_damaged_is_refused() {
        let whole = archive(&[(3, 0o100_640, 1, "f", b"five!")]);
        for length in [0, 50, 111, 118, 125, whole.len() - 8] {
            assert!(read(&whole[..length]).is_err(), "{length}");
        }
        for (at, byte) in [(0, b'x'), (5, b'7'), (20, b'+'), (94, b'F'), (110, 0)] {
            let mut bytes = whole.clone();
            bytes[at] = byte;
            assert!(read(&bytes).is_err(), "{at}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(changes in proptest::collection::vec((0usize..600, 0u8..), 0..8)) {
            let mut bytes = archive(&[
                (3, 0o100_640, 2, "f", b""), (3, 0o100_640, 2, "g", b"five!"), (4, 0o120_777, 1, "l", b"f"),
            ]);
            for (at, byte) in changes {
                let length = bytes.len();
                bytes[at % length] = byte;
            }
            let _ = to_tar(&bytes[..], io::sink());
        }
    }
}
