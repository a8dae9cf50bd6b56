//! What a file is, told by its first bytes, never by its name.

use std::io::{self, Read};

/// A kind of file that Lodge can boot from or attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A Linux kernel with its boot loader header.
    BzImage,
    Elf,
    Qcow2,
    Iso9660,
    Cpio,
    Tar,
    Gzip,
    Bzip2,
    Xz,
    Zstd,
    /// An SQLite database, as some flists are.
    Sqlite,
    /// An ext2, ext3 or ext4 file system without a partition table.
    Ext4,
    /// A partitioned disk (MBR or GPT).
    Partitioned,
    /// Nothing known: a disk as the guest made it, or zeroes.
    Unknown,
}

/// How much of a file `kind` looks at.
pub const LOOK: usize = 0x8806;

const MAGICS: &[(usize, &[u8], Kind)] = &[
    (0, b"QFI\xfb", Kind::Qcow2),
    (0x202, b"HdrS", Kind::BzImage),
    (0, b"\x7fELF", Kind::Elf),
    (0x8001, b"CD001", Kind::Iso9660),
    (0, b"070701", Kind::Cpio),
    (0, b"070702", Kind::Cpio),
    (257, b"ustar", Kind::Tar),
    (0, b"\x1f\x8b\x08", Kind::Gzip),
    (0, b"BZh", Kind::Bzip2),
    (0, b"\xfd7zXZ\0", Kind::Xz),
    (0, b"\x28\xb5\x2f\xfd", Kind::Zstd),
    (0, b"SQLite format 3\0", Kind::Sqlite),
    (0x438, b"\x53\xef", Kind::Ext4),
    (0x1fe, b"\x55\xaa", Kind::Partitioned),
];

/// Tells a file by its start, wherever it is read from.
pub fn read(from: &mut impl Read) -> io::Result<Kind> {
    let mut start = Vec::with_capacity(LOOK);
    from.take(LOOK as u64).read_to_end(&mut start)?;
    Ok(kind(&start))
}

/// Tells a file by its first `LOOK` bytes (fewer if it has fewer).
pub fn kind(start: &[u8]) -> Kind {
    let matches = |at: usize, magic: &[u8]| start.get(at..at + magic.len()) == Some(magic);
    let known = MAGICS.iter().find(|(at, magic, _)| matches(*at, magic));
    known.map_or(Kind::Unknown, |(_, _, kind)| *kind)
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Kind::BzImage => "a Linux kernel (bzImage)",
            Kind::Elf => "an ELF file",
            Kind::Qcow2 => "a qcow2 disk image",
            Kind::Iso9660 => "an ISO 9660 image",
            Kind::Cpio => "a cpio archive",
            Kind::Tar => "a tar archive",
            Kind::Gzip => "gzip-compressed data",
            Kind::Bzip2 => "bzip2-compressed data",
            Kind::Xz => "xz-compressed data",
            Kind::Zstd => "zstd-compressed data",
            Kind::Sqlite => "an SQLite database",
            Kind::Ext4 => "an ext4 file system",
            Kind::Partitioned => "a partitioned disk",
            Kind::Unknown => "a raw disk",
        })
    }
}
