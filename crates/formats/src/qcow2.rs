//! qcow2 headers: reads what a foreign image claims, and writes empty images, with or without a
//! backing file. Never follows a backing file.

pub mod volume;

use std::io::{self, Read, Seek, SeekFrom, Write};

const MAGIC: &[u8; 4] = b"QFI\xfb";
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Disks larger than this are refused.
const MAX_SIZE: u64 = 64 << 40;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("this is not a qcow2 image")]
    NotQcow2,
    #[error("qcow2 version {0} is not known here")]
    Version(u32),
    #[error("the header is damaged: {0}")]
    Damaged(&'static str),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What the header of an image says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The guest's view, in bytes.
    pub virtual_size: u64,
    /// The file it says it is a layer above.
    pub backing_file: Option<String>,
    pub encrypted: bool,
    /// Guest data lies in another file.
    pub external_data: bool,
}

/// Reads the header.
pub fn read(mut input: impl Read + Seek) -> Result<Header, Error> {
    let mut bytes = [0; 104];
    input.seek(SeekFrom::Start(0))?;
    let mut filled = 0;
    while filled < bytes.len() {
        match input.read(&mut bytes[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    if filled < 72 || &bytes[..4] != MAGIC {
        return Err(Error::NotQcow2);
    }
    let u32_at = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    let u64_at = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let version = u32_at(4);
    if !(2..=3).contains(&version) {
        return Err(Error::Version(version));
    }
    if !(9..=21).contains(&u32_at(20)) {
        return Err(Error::Damaged("impossible cluster size"));
    }
    let virtual_size = u64_at(24);
    if virtual_size > MAX_SIZE {
        return Err(Error::Damaged("a size above 64 TiB"));
    }
    let (backing_at, backing_length) = (u64_at(8), u32_at(16) as usize);
    let backing_file = match (backing_at, backing_length) {
        (0, _) => None,
        (at, length @ 1..=1023) => {
            let mut name = vec![0; length];
            input.seek(SeekFrom::Start(at))?;
            input.read_exact(&mut name)?;
            Some(String::from_utf8(name).map_err(|_| Error::Damaged("backing file name"))?)
        }
        (_, _) => return Err(Error::Damaged("backing file name of an impossible length")),
    };
    let incompatible = if version == 3 { u64_at(72) } else { 0 };
    Ok(Header {
        virtual_size,
        backing_file,
        encrypted: u32_at(32) != 0,
        external_data: incompatible & 4 != 0,
    })
}

/// Makes an image larger where it lies, if its table of tables has room: one cluster of it covers
/// 4 TiB. Guest data stays as it is; an image that is as large already is left alone.
pub fn grow(mut file: impl Read + Write + Seek, virtual_size: u64) -> Result<(), Error> {
    let header = read(&mut file)?;
    if header.virtual_size >= virtual_size {
        return Ok(());
    }
    let mut fields = [0; 24];
    file.seek(SeekFrom::Start(20))?;
    file.read_exact(&mut fields)?;
    let bits = u32::from_be_bytes(fields[..4].try_into().expect("4 bytes"));
    let entries = u32::from_be_bytes(fields[16..20].try_into().expect("4 bytes"));
    let cluster = 1_u64 << bits;
    let room = (u64::from(entries) * 8).div_ceil(cluster).max(1) * cluster / 8;
    let wanted = virtual_size.div_ceil(cluster * (cluster / 8));
    if wanted > room || virtual_size > MAX_SIZE {
        return Err(Error::Damaged("its table has no room for so large a disk"));
    }
    file.seek(SeekFrom::Start(24))?;
    file.write_all(&virtual_size.to_be_bytes())?;
    file.seek(SeekFrom::Start(36))?;
    file.write_all(&(wanted as u32).to_be_bytes())?;
    Ok(())
}

/// Writes an empty image of `virtual_size` bytes; `backing` is the path and the format (`raw`,
/// `qcow2`) of the image below it. Starts at the writer's beginning; takes four clusters.
pub fn write_empty(
    mut out: impl Write,
    virtual_size: u64,
    backing: Option<(&str, &str)>,
) -> io::Result<()> {
    let per_l2 = CLUSTER * (CLUSTER / 8);
    let l1_entries = virtual_size.div_ceil(per_l2).max(1);
    let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER);
    let (table, block, l1) = (CLUSTER, 2 * CLUSTER, 3 * CLUSTER);
    let mut head = vec![0u8; CLUSTER as usize];
    let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, MAGIC);
    put(4, &3u32.to_be_bytes());
    put(20, &CLUSTER_BITS.to_be_bytes());
    put(24, &virtual_size.to_be_bytes());
    put(36, &(l1_entries as u32).to_be_bytes());
    put(40, &l1.to_be_bytes());
    put(48, &table.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    if let Some((path, format)) = backing {
        // The extension that names the backing format, then the end of extensions.
        put(104, &0xe279_2acau32.to_be_bytes());
        put(108, &(format.len() as u32).to_be_bytes());
        put(112, format.as_bytes());
        let name_at = 112 + format.len().next_multiple_of(8) + 8;
        put(8, &(name_at as u64).to_be_bytes());
        put(16, &(path.len() as u32).to_be_bytes());
        put(name_at, path.as_bytes());
    }
    out.write_all(&head)?;
    let mut cluster = vec![0u8; CLUSTER as usize];
    cluster[..8].copy_from_slice(&block.to_be_bytes());
    out.write_all(&cluster)?;
    cluster.fill(0);
    let used = 3 + l1_clusters as usize;
    for count in cluster.chunks_exact_mut(2).take(used) {
        count.copy_from_slice(&1u16.to_be_bytes());
    }
    out.write_all(&cluster)?;
    cluster.fill(0);
    for _ in 0..l1_clusters {
        out.write_all(&cluster)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    #[test]
    fn what_is_written_is_read() {
        for size in [1 << 20, 40 << 30, MAX_SIZE] {
            let mut bytes = Vec::new();
            write_empty(&mut bytes, size, Some(("/images/a", "raw"))).unwrap();
            let header = read(Cursor::new(&bytes)).unwrap();
            assert_eq!(header.virtual_size, size);
            assert_eq!(header.backing_file.as_deref(), Some("/images/a"));
            assert!(!header.encrypted && !header.external_data);
        }
    }

    #[test]
    fn impossible_headers_are_refused() {
        let mut bytes = Vec::new();
        write_empty(&mut bytes, 1 << 30, None).unwrap();
        assert!(matches!(read(Cursor::new(b"QFI")), Err(Error::NotQcow2)));
        let mut odd = bytes.clone();
        odd[7] = 9;
        assert!(matches!(read(Cursor::new(&odd)), Err(Error::Version(9))));
        let mut odd = bytes.clone();
        odd[24] = 0xff;
        assert!(matches!(read(Cursor::new(&odd)), Err(Error::Damaged(_))));
        let mut odd = bytes;
        odd[15] = 8;
        odd[16] = 0xff;
        assert!(matches!(read(Cursor::new(&odd)), Err(Error::Damaged(_))));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes: Vec<u8>) {
            let _ = read(Cursor::new(&bytes));
            bytes.splice(0..0, *b"QFI\xfb\0\0\0\x03");
            bytes.resize(200, 1);
            let _ = read(Cursor::new(&bytes));
        }
    }
}
