//! Writes small FAT16 volumes: what cloud-init looks for on a disk labelled CIDATA, and what UEFI
//! firmware boots from. Deterministic; writes only, reads nothing.

use std::borrow::Cow;
use std::io::{self, Write};

const SECTOR: usize = 512;
const PER_CLUSTER: usize = 4;
const CLUSTER: usize = SECTOR * PER_CLUSTER;
const SECTORS: usize = (16 << 20) / SECTOR;
const FAT_SECTORS: usize = 32;
const ROOT_ENTRIES: usize = 512;
const ENTRY: usize = 32;
/// Clusters for files.
const CLUSTERS: usize =
    (SECTORS - 1 - 2 * FAT_SECTORS - ROOT_ENTRIES * ENTRY / SECTOR) / PER_CLUSTER;
/// 1980-01-01: the earliest day that there is.
const DAY: [u8; 2] = [0x21, 0];

/// Bytes of every volume.
pub const SIZE: u64 = (SECTORS * SECTOR) as u64;

/// Writes a volume of 16 MiB. A file's path has its folders before it, each named once with all
/// that is in it. Names are ASCII, at most 26 characters and differ in their first six.
pub fn write(mut out: impl Write, label: &str, files: &[(&str, &[u8])]) -> io::Result<()> {
    let mut volume = Volume { table: vec![0xfff8, 0xffff], contents: Vec::new() };
    let paths: Vec<(&str, &[u8])> = files.to_vec();
    let mut root = short_entry(&padded(label, 11), 0x08, 0, 0);
    root.extend(volume.folder(&paths, None)?);
    let wanted = volume.table.len() - 2;
    if wanted > CLUSTERS {
        let why = format!("{wanted} clusters of files do not fit in {CLUSTERS}");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    if root.len() > ROOT_ENTRIES * ENTRY {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many files"));
    }
    root.resize(ROOT_ENTRIES * ENTRY, 0);
    let mut table: Vec<u8> = volume.table.iter().flat_map(|n| n.to_le_bytes()).collect();
    table.resize(FAT_SECTORS * SECTOR, 0);
    out.write_all(&boot_sector(label))?;
    out.write_all(&table)?;
    out.write_all(&table)?;
    out.write_all(&root)?;
    let mut written = 1 + 2 * FAT_SECTORS + ROOT_ENTRIES * ENTRY / SECTOR;
    volume.contents.sort_by_key(|(cluster, _)| *cluster);
    for (_, bytes) in volume.contents {
        out.write_all(&bytes)?;
        out.write_all(&vec![0; bytes.len().next_multiple_of(CLUSTER) - bytes.len()])?;
        written += bytes.len().div_ceil(CLUSTER) * PER_CLUSTER;
    }
    let rest = vec![0; SECTOR];
    (written..SECTORS).try_for_each(|_| out.write_all(&rest))
}

struct Volume<'a> {
    /// For each cluster the one after it.
    table: Vec<u16>,
    /// What begins at a cluster.
    contents: Vec<(u16, Cow<'a, [u8]>)>,
}

impl<'a> Volume<'a> {
    /// Takes clusters for so many bytes; none for none.
    fn take(&mut self, bytes: usize) -> u16 {
        let (first, count) = (self.table.len(), bytes.div_ceil(CLUSTER));
        self.table.extend((1..count).map(|i| (first + i) as u16));
        self.table.extend((count > 0).then_some(0xffff));
        if count > 0 { first as u16 } else { 0 }
    }

    /// The entries of a folder, whose own cluster and whose parent's are told unless it is the
    /// root.
    fn folder(
        &mut self,
        files: &[(&str, &'a [u8])],
        own: Option<(u16, u16)>,
    ) -> io::Result<Vec<u8>> {
        let mut entries = Vec::new();
        if let Some((own, parent)) = own {
            entries.extend(short_entry(b".          ", 0x10, own, 0));
            entries.extend(short_entry(b"..         ", 0x10, parent, 0));
        }
        let mut rest = files;
        while let Some((path, bytes)) = rest.first() {
            let Some((name, _)) = path.split_once('/') else {
                let first = self.take(bytes.len());
                self.contents.push((first, Cow::Borrowed(bytes)));
                entries.extend(named(path, 0x20, first, bytes.len() as u32));
                rest = &rest[1..];
                continue;
            };
            let below = |path: &str| path.strip_prefix(name).is_some_and(|p| p.starts_with('/'));
            let count = rest.iter().take_while(|(path, _)| below(path)).count();
            let inner: Vec<(&str, &[u8])> = rest[..count]
                .iter()
                .map(|(path, bytes)| (&path[name.len() + 1..], *bytes))
                .collect();
            let cluster = self.take(CLUSTER);
            let content = self.folder(&inner, Some((cluster, own.map_or(0, |(own, _)| own))))?;
            if content.len() > CLUSTER {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many files"));
            }
            self.contents.push((cluster, Cow::Owned(content)));
            entries.extend(named(name, 0x10, cluster, 0));
            rest = &rest[count..];
        }
        Ok(entries)
    }
}

/// Everything that names a file: its short name alone where it is one.
fn named(name: &str, attributes: u8, cluster: u16, size: u32) -> Vec<u8> {
    let (stem, extension) = name.split_once('.').unwrap_or((name, ""));
    let fits = |part: &str, length| {
        part.len() <= length && part.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit())
    };
    if !stem.is_empty() && fits(stem, 8) && fits(extension, 3) {
        let short = [padded(stem, 8), padded(extension, 3)].concat();
        return short_entry(&short, attributes, cluster, size);
    }
    let short = alias(name);
    let mut entries = long_entries(name, checksum(&short));
    entries.extend(short_entry(&short, attributes, cluster, size));
    entries
}

fn padded(text: &str, length: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = text.bytes().take(length).map(|b| b.to_ascii_uppercase()).collect();
    bytes.resize(length, b' ');
    bytes
}

fn boot_sector(label: &str) -> Vec<u8> {
    let mut sector = vec![0; SECTOR];
    let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0xeb, 0x3c, 0x90]);
    put(3, b"LODGE   ");
    put(11, &(SECTOR as u16).to_le_bytes());
    put(13, &[PER_CLUSTER as u8]);
    put(14, &1_u16.to_le_bytes());
    put(16, &[2]);
    put(17, &(ROOT_ENTRIES as u16).to_le_bytes());
    put(19, &(SECTORS as u16).to_le_bytes());
    put(21, &[0xf8]);
    put(22, &(FAT_SECTORS as u16).to_le_bytes());
    put(24, &32_u16.to_le_bytes());
    put(26, &64_u16.to_le_bytes());
    put(36, &[0x80, 0, 0x29]);
    put(39, b"LODG");
    put(43, &padded(label, 11));
    put(54, b"FAT16   ");
    put(510, &[0x55, 0xaa]);
    sector
}

/// Six letters, `~1`, no extension.
fn alias(name: &str) -> Vec<u8> {
    let letters: String = name.chars().filter(char::is_ascii_alphanumeric).take(6).collect();
    padded(&format!("{letters}~1"), 11)
}

fn checksum(short: &[u8]) -> u8 {
    short.iter().fold(0_u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte))
}

fn short_entry(name: &[u8], attributes: u8, cluster: u16, size: u32) -> Vec<u8> {
    let mut entry = vec![0; ENTRY];
    entry[..11].copy_from_slice(name);
    entry[11] = attributes;
    entry[16..18].copy_from_slice(&DAY);
    entry[18..20].copy_from_slice(&DAY);
    entry[24..26].copy_from_slice(&DAY);
    entry[26..28].copy_from_slice(&cluster.to_le_bytes());
    entry[28..].copy_from_slice(&size.to_le_bytes());
    entry
}

/// The long name in pieces of thirteen letters, the last one first.
fn long_entries(name: &str, checksum: u8) -> Vec<u8> {
    const PLACES: [usize; 13] = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30];
    let letters: Vec<u16> = name.encode_utf16().collect();
    let pieces = letters.len().div_ceil(PLACES.len());
    let mut out = Vec::new();
    for nth in (0..pieces).rev() {
        let mut entry = [0_u8; ENTRY];
        entry[0] = (nth + 1) as u8 | if nth + 1 == pieces { 0x40 } else { 0 };
        entry[11] = 0x0f;
        entry[13] = checksum;
        for (i, at) in PLACES.iter().enumerate() {
            let index = nth * PLACES.len() + i;
            let letter = match index.cmp(&letters.len()) {
                std::cmp::Ordering::Less => letters[index],
                std::cmp::Ordering::Equal => 0,
                std::cmp::Ordering::Greater => 0xffff,
            };
            entry[*at..at + 2].copy_from_slice(&letter.to_le_bytes());
        }
        out.extend(entry);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_published_one() {
        // The example of the specification's own sum: FILENAMETXT.
        let slow = b"FILENAMETXT"
            .iter()
            .fold(0_u32, |sum, byte| (((sum & 1) << 7) + (sum >> 1) + u32::from(*byte)) & 0xff);
        assert_eq!(u32::from(checksum(b"FILENAMETXT")), slow);
    }

    #[test]
    fn a_volume_has_its_size_its_label_and_its_files() {
        let mut out = Vec::new();
        let long = vec![b'x'; 5000];
        write(&mut out, "CIDATA", &[("meta-data", b"id"), ("user-data", &long), ("empty", b"")])
            .unwrap();
        assert_eq!(out.len(), 16 << 20);
        assert_eq!(&out[43..54], b"CIDATA     ");
        let data = (1 + 2 * FAT_SECTORS) * SECTOR + ROOT_ENTRIES * ENTRY;
        assert_eq!(&out[data..data + 2], b"id");
        assert_eq!(&out[data + CLUSTER..data + CLUSTER + 5000], &long[..]);
        let table =
            |at: usize| u16::from_le_bytes([out[SECTOR + at * 2], out[SECTOR + at * 2 + 1]]);
        assert_eq!([table(2), table(3), table(4), table(5), table(6)], [0xffff, 4, 5, 0xffff, 0]);
        let many = vec![0; 17 << 20];
        assert!(write(io::sink(), "X", &[("a", &many)]).is_err());
    }
}
