//! Writes ISO 9660 volumes with one folder: short names for everybody, the real ones as Rock Ridge
//! and as Joliet. The same files give the same bytes.

use std::io::{self, Read, Write};

const SECTOR: usize = 2048;
/// Longer names do not fit beside the other fields of an entry.
pub const MAX_NAME: usize = 128;

/// A file of the volume.
pub struct File<R> {
    /// At most `MAX_NAME` bytes, without a slash.
    pub name: String,
    /// Permission bits.
    pub mode: u32,
    pub size: u32,
    pub contents: R,
}

/// Writes a volume; returns its bytes. `label` is cut to 16 characters, the least that both
/// forms of it can take.
pub fn write<R: Read>(mut out: impl Write, label: &str, files: Vec<File<R>>) -> io::Result<u64> {
    for file in &files {
        if file.name.is_empty() || file.name.len() > MAX_NAME || file.name.contains('/') {
            let what = format!("{:?} cannot be a name on an ISO 9660 volume", file.name);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
    }
    let names: Vec<(&str, u32, u32)> =
        files.iter().map(|f| (f.name.as_str(), f.mode, f.size)).collect();
    let layout = Layout::of(&names);
    let label: String = label.chars().take(16).collect();
    out.write_all(&vec![0; 16 * SECTOR])?;
    out.write_all(&descriptor(&label, &layout, false))?;
    out.write_all(&descriptor(&label, &layout, true))?;
    out.write_all(&sector(b"\xffCD001\x01"))?;
    for (big, joliet) in [(false, false), (true, false), (false, true), (true, true)] {
        out.write_all(&sector(&path_table(layout.folder(joliet).0, big)))?;
    }
    out.write_all(&layout.plain)?;
    out.write_all(&layout.joliet)?;
    out.write_all(&sector(&extensions_reference()))?;
    let mut written = layout.first_file * SECTOR as u64;
    for file in files {
        let size = u64::from(file.size);
        if io::copy(&mut file.contents.take(size), &mut out)? != size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let padding = size.next_multiple_of(SECTOR as u64) - size;
        out.write_all(&vec![0; padding as usize])?;
        written += size + padding;
    }
    out.flush()?;
    Ok(written)
}

/// Sectors: 16 to 18 descriptors, 19 to 22 path tables, the folder in both forms, the name of the
/// extensions, then the files.
struct Layout {
    plain: Vec<u8>,
    joliet: Vec<u8>,
    first_file: u64,
    /// Sectors in all.
    total: u64,
}

const FOLDERS: u64 = 23;

impl Layout {
    fn of(names: &[(&str, u32, u32)]) -> Self {
        // Lengths do not depend on places, so the first look at them gives the places.
        let sectors = |bytes: &[u8]| (bytes.len() / SECTOR) as u64;
        let (plain, joliet) = (folder(names, (0, 0, 0), false), folder(names, (0, 0, 0), true));
        let joliet_at = FOLDERS + sectors(&plain);
        let reference = joliet_at + sectors(&joliet);
        let first_file = reference + 1;
        let total = names.iter().map(|(_, _, size)| u64::from(*size).div_ceil(SECTOR as u64));
        let total = first_file + total.sum::<u64>();
        let plain = folder(names, (FOLDERS, first_file, reference), false);
        let joliet = folder(names, (joliet_at, first_file, reference), true);
        Self { plain, joliet, first_file, total }
    }

    /// First sector and bytes of a folder.
    fn folder(&self, joliet: bool) -> (u64, usize) {
        match joliet {
            false => (FOLDERS, self.plain.len()),
            true => (FOLDERS + (self.plain.len() / SECTOR) as u64, self.joliet.len()),
        }
    }
}

fn sector(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
    bytes
}

fn both16(n: u16) -> [u8; 4] {
    let ([a, b], [c, d]) = (n.to_le_bytes(), n.to_be_bytes());
    [a, b, c, d]
}

fn both32(n: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&n.to_le_bytes());
    bytes[4..].copy_from_slice(&n.to_be_bytes());
    bytes
}

/// One entry of a folder.
fn record(at: u64, size: usize, folder: bool, name: &[u8], system: &[u8]) -> Vec<u8> {
    let name_end = (33 + name.len()).next_multiple_of(2);
    let mut r = vec![0u8; name_end];
    r[2..10].copy_from_slice(&both32(at as u32));
    r[10..18].copy_from_slice(&both32(size as u32));
    // 1 January 1980, the same for all: what matters is in the archives.
    r[18..21].copy_from_slice(&[80, 1, 1]);
    r[25] = if folder { 2 } else { 0 };
    r[28..32].copy_from_slice(&both16(1));
    r[32] = name.len() as u8;
    r[33..33 + name.len()].copy_from_slice(name);
    r.extend_from_slice(system);
    r.resize(r.len().next_multiple_of(2), 0);
    r[0] = r.len() as u8;
    r
}

fn folder(
    names: &[(&str, u32, u32)],
    (own, first_file, reference): (u64, u64, u64),
    joliet: bool,
) -> Vec<u8> {
    // Readers count on the order of the names as they are written here.
    let mut entries: Vec<(Vec<u8>, usize, u64)> = Vec::new();
    let mut at = first_file;
    for (i, (name, _, size)) in names.iter().enumerate() {
        let short = match joliet {
            true => name.encode_utf16().take(64).flat_map(u16::to_be_bytes).collect(),
            false => format!("F{i:07}.;1").into_bytes(),
        };
        entries.push((short, i, at));
        at += u64::from(*size).div_ceil(SECTOR as u64);
    }
    entries.sort();
    let mut records = Vec::new();
    for (name, first) in [(&[0u8][..], true), (&[1], false)] {
        let mut system = Vec::new();
        if !joliet {
            if first {
                system.extend_from_slice(&[b'S', b'P', 7, 1, 0xbe, 0xef, 0]);
            }
            system.extend(attributes(0o040_755));
            if first {
                system.extend_from_slice(b"CE\x1c\x01");
                system.extend(both32(reference as u32));
                system.extend(both32(0));
                system.extend(both32(extensions_reference().len() as u32));
            }
        }
        records.push((name.to_vec(), None, own, system));
    }
    for (short, i, at) in entries {
        let (name, mode, size) = names[i];
        let mut system = Vec::new();
        if !joliet {
            system.extend(attributes(0o100_000 | mode & 0o7777));
            system.extend_from_slice(&[b'N', b'M', 5 + name.len() as u8, 1, 0]);
            system.extend_from_slice(name.as_bytes());
        }
        records.push((short, Some(size), at, system));
    }
    // A record does not cross the end of a sector; the folder's own records say its whole length.
    let lengths = records.iter().map(|(name, _, _, s)| record(0, 0, false, name, s).len());
    let total = lengths.fold(0, |end, n| {
        if end / SECTOR == (end + n - 1) / SECTOR {
            end + n
        } else {
            end.next_multiple_of(SECTOR) + n
        }
    });
    let total = total.next_multiple_of(SECTOR);
    let mut bytes = Vec::new();
    for (name, size, at, system) in records {
        let r = record(at, size.map_or(total, |n| n as usize), size.is_none(), &name, &system);
        if bytes.len() / SECTOR != (bytes.len() + r.len() - 1) / SECTOR {
            bytes = sector(&bytes);
        }
        bytes.extend(r);
    }
    sector(&bytes)
}

/// Rock Ridge: mode, links, user and group of an entry.
fn attributes(mode: u32) -> Vec<u8> {
    let mut bytes = vec![b'P', b'X', 36, 1];
    for number in [mode, 1, 0, 0] {
        bytes.extend(both32(number));
    }
    bytes
}

/// Says that the fields above are Rock Ridge.
fn extensions_reference() -> Vec<u8> {
    const ID: &[u8] = b"RRIP_1991A";
    const WHAT: &[u8] =
        b"THE ROCK RIDGE INTERCHANGE PROTOCOL PROVIDES SUPPORT FOR POSIX FILE SYSTEM SEMANTICS";
    const WHERE: &[u8] = b"PLEASE CONTACT DISC PUBLISHER FOR SPECIFICATION SOURCE.";
    let length = 8 + ID.len() + WHAT.len() + WHERE.len();
    let mut bytes = vec![b'E', b'R', length as u8, 1];
    bytes.extend([ID.len() as u8, WHAT.len() as u8, WHERE.len() as u8, 1]);
    bytes.extend(ID.iter().chain(WHAT).chain(WHERE));
    bytes
}

/// The one folder, as the tables of folders list it.
fn path_table(folder: u64, big: bool) -> Vec<u8> {
    let at = folder as u32;
    let mut bytes = vec![1, 0];
    bytes.extend(if big { at.to_be_bytes() } else { at.to_le_bytes() });
    bytes.extend(if big { 1_u16.to_be_bytes() } else { 1_u16.to_le_bytes() });
    bytes.extend([0, 0]);
    bytes
}

fn descriptor(label: &str, layout: &Layout, joliet: bool) -> Vec<u8> {
    let text = |text: &str, length: usize| -> Vec<u8> {
        let mut bytes: Vec<u8> = match joliet {
            true => text.encode_utf16().flat_map(u16::to_be_bytes).collect(),
            false => text.bytes().collect(),
        };
        while bytes.len() < length {
            bytes.extend_from_slice(if joliet { &[0, b' '] } else { b" " });
        }
        bytes.truncate(length);
        bytes
    };
    let mut d = vec![0u8; SECTOR];
    let mut put = |at: usize, bytes: &[u8]| d[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[if joliet { 2 } else { 1 }]);
    put(1, b"CD001\x01");
    put(8, &text("LINUX", 32));
    put(40, &text(label, 32));
    put(80, &both32(layout.total as u32));
    if joliet {
        // The level that allows all of UCS-2.
        put(88, b"%/E");
    }
    put(120, &both16(1));
    put(124, &both16(1));
    put(128, &both16(SECTOR as u16));
    put(132, &both32(path_table(0, false).len() as u32));
    let tables = if joliet { 21_u32 } else { 19 };
    put(140, &tables.to_le_bytes());
    put(148, &(tables + 1).to_be_bytes());
    let (at, length) = layout.folder(joliet);
    put(156, &record(at, length, true, &[0], &[]));
    for (at, length) in
        [(190, 128), (318, 128), (446, 128), (574, 128), (702, 37), (739, 37), (776, 37)]
    {
        put(at, &text("", length));
    }
    for at in [813, 830, 847, 864] {
        let date: &[u8] = if at < 847 { b"1980010100000000\0" } else { b"0000000000000000\0" };
        put(at, date);
    }
    put(881, &[1]);
    d
}
