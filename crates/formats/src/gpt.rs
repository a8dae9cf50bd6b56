//! Writes disks that PCs boot, with the old firmware and with the new: a partition table, room
//! for GRUB, a partition for UEFI and the root behind them, last, so that it can grow.
//! Deterministic. Of other disks it tells whether firmware for UEFI finds a partition there.

use std::io::{self, Seek, SeekFrom, Write};

use crate::{fat, grub};

const SECTOR: u64 = 512;
const ENTRIES: usize = 128;
const ENTRY: usize = 128;
/// Sectors of the list of partitions.
const LIST: u64 = (ENTRIES * ENTRY) as u64 / SECTOR;
const MIB: u64 = 1 << 20;

const BIOS_BOOT: u128 = 0x21686148_6449_6e6f_744e_656564454649;
const EFI_SYSTEM: u128 = 0xc12a7328_f81f_11d2_ba4b_00a0c93ec93b;
const LINUX_ROOT: u128 = 0x4f68bce3_e8cd_4db1_96e7_fbcaf984b709;

/// Where GRUB's core lies: the first partition.
const CORE_AT: u64 = MIB;
const EFI_AT: u64 = CORE_AT + MIB;
/// Where the root lies: behind the others, at whole MiB.
pub const ROOT_AT: u64 = EFI_AT + fat::SIZE;
/// What a disk has besides its root: all before it, and the table's copy at the end.
pub const OVERHEAD: u64 = ROOT_AT + MIB;

/// What firmware loads.
pub struct Loader<'a> {
    /// GRUB's first sector for BIOS.
    pub boot: &'a [u8],
    /// GRUB's core for BIOS.
    pub core: &'a [u8],
    /// A program for UEFI.
    pub efi: &'a [u8],
}

/// The identities of a disk and of its three partitions; the last is the root's.
pub type Identities = [u128; 4];

/// How large the root of a disk of `size` bytes can be: whole MiB. `None`: there is no room.
pub fn root_size(size: u64) -> Option<u64> {
    size.checked_sub(OVERHEAD).map(|rest| rest / MIB * MIB).filter(|rest| *rest > 0)
}

/// How much of a disk's beginning says what partitions it has.
pub const TABLE: usize = 2 * SECTOR as usize + ENTRIES * ENTRY;

/// Whether a disk that begins so has a partition for UEFI, by either kind of table.
pub fn has_efi_system(head: &[u8]) -> bool {
    let sector = SECTOR as usize;
    if head.get(sector..).is_some_and(|rest| rest.starts_with(b"EFI PART")) {
        // Where the list is, is said too; nobody puts it elsewhere.
        let list = head.get(2 * sector..).unwrap_or_default();
        return list.chunks_exact(ENTRY).take(ENTRIES).any(|e| e.starts_with(&guid(EFI_SYSTEM)));
    }
    let signed = head.get(510..512).is_some_and(|end| end == [0x55, 0xaa]);
    signed && head[446..510].chunks_exact(16).any(|entry| entry[4] == 0xef)
}

/// Writes all of a disk but its root. `root` is the root's size in bytes; `out` reads as zeroes
/// where nothing is written.
pub fn write(
    mut out: impl Write + Seek,
    size: u64,
    root: u64,
    identities: Identities,
    loader: &Loader<'_>,
) -> io::Result<()> {
    let sectors = size / SECTOR;
    let core = grub::core(loader.core, CORE_AT / SECTOR)?;
    let [disk, bios, efi, own] = identities;
    let partitions = [
        (BIOS_BOOT, bios, CORE_AT, MIB, "grub"),
        (EFI_SYSTEM, efi, EFI_AT, fat::SIZE, "esp"),
        (LINUX_ROOT, own, ROOT_AT, root, "root"),
    ];
    let mut list = vec![0; ENTRIES * ENTRY];
    for (entry, (kind, own, at, bytes, name)) in list.chunks_exact_mut(ENTRY).zip(partitions) {
        entry[..16].copy_from_slice(&guid(kind));
        entry[16..32].copy_from_slice(&guid(own));
        entry[32..40].copy_from_slice(&(at / SECTOR).to_le_bytes());
        entry[40..48].copy_from_slice(&((at + bytes) / SECTOR - 1).to_le_bytes());
        for (place, letter) in entry[56..].chunks_exact_mut(2).zip(name.encode_utf16()) {
            place.copy_from_slice(&letter.to_le_bytes());
        }
    }
    let mut put = |at: u64, bytes: &[u8]| {
        out.seek(SeekFrom::Start(at))?;
        out.write_all(bytes)
    };
    put(0, &first_sector(loader.boot, sectors)?)?;
    put(SECTOR, &header(1, sectors - 1, 2, sectors, disk, &list))?;
    put(2 * SECTOR, &list)?;
    put(CORE_AT, &core)?;
    let mut volume = Vec::with_capacity(fat::SIZE as usize);
    fat::write(&mut volume, "ESP", &[("EFI/BOOT/BOOTX64.EFI", loader.efi)])?;
    // What is zero is not written: it takes no room.
    let used = volume.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
    put(EFI_AT, &volume[..used])?;
    let copy = sectors - 1 - LIST;
    put(copy * SECTOR, &list)?;
    put((sectors - 1) * SECTOR, &header(sectors - 1, 1, copy, sectors, disk, &list))
}

/// Identities are written with their first three parts turned round.
fn guid(number: u128) -> [u8; 16] {
    let mut bytes = number.to_be_bytes();
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

fn header(own: u64, other: u64, list_at: u64, sectors: u64, disk: u128, list: &[u8]) -> Vec<u8> {
    let mut head = vec![0; SECTOR as usize];
    let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"EFI PART");
    put(8, &0x0001_0000_u32.to_le_bytes());
    put(12, &92_u32.to_le_bytes());
    put(24, &own.to_le_bytes());
    put(32, &other.to_le_bytes());
    put(40, &(2 + LIST).to_le_bytes());
    put(48, &(sectors - 2 - LIST).to_le_bytes());
    put(56, &guid(disk));
    put(72, &list_at.to_le_bytes());
    put(80, &(ENTRIES as u32).to_le_bytes());
    put(84, &(ENTRY as u32).to_le_bytes());
    put(88, &crc32fast::hash(list).to_le_bytes());
    let sum = crc32fast::hash(&head[..92]);
    head[16..20].copy_from_slice(&sum.to_le_bytes());
    head
}

/// GRUB's first sector, with the entry that keeps others away.
fn first_sector(boot: &[u8], sectors: u64) -> io::Result<Vec<u8>> {
    let mut sector = grub::first_sector(boot, CORE_AT / SECTOR)?;
    let protective = [0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff];
    sector[446..454].copy_from_slice(&protective);
    sector[454..458].copy_from_slice(&1_u32.to_le_bytes());
    let length = u32::try_from(sectors - 1).unwrap_or(u32::MAX);
    sector[458..462].copy_from_slice(&length.to_le_bytes());
    Ok(sector)
}

/// A part of something larger, as something of its own.
pub struct Part<W> {
    whole: W,
    at: u64,
    position: u64,
}

impl<W: Seek> Part<W> {
    /// From byte `at` on.
    pub fn new(whole: W, at: u64) -> Self {
        Self { whole, at, position: 0 }
    }
}

impl<W: Write + Seek> Write for Part<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.whole.seek(SeekFrom::Start(self.at + self.position))?;
        let written = self.whole.write(bytes)?;
        self.position += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.whole.flush()
    }
}

impl<W> Seek for Part<W> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let place = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(_) => None,
        };
        self.position = place.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    #[test]
    fn a_disk_has_its_table_twice_and_its_loaders() {
        let size = 200_000_000;
        let (boot, core, efi) = (vec![1; 512], vec![2; 5000], vec![3; 100_000]);
        let loader = Loader { boot: &boot, core: &core, efi: &efi };
        let root = root_size(size).unwrap();
        let mut out = Cursor::new(vec![0; size as usize]);
        write(&mut out, size, root, [1, 2, 3, 4], &loader).unwrap();
        let disk = out.into_inner();
        let last = (size / 512 - 1) as usize;
        for sector in [1, last] {
            let head = &disk[sector * 512..][..92];
            assert_eq!(&head[..8], b"EFI PART");
            let mut summed = head.to_vec();
            summed[16..20].fill(0);
            assert_eq!(head[16..20], crc32fast::hash(&summed).to_le_bytes());
        }
        assert_eq!(&disk[510..512], &[0x55, 0xaa]);
        assert_eq!(disk[1 << 20], 2);
        assert_eq!(&disk[2 << 20..][43..46], b"ESP");
        assert!(ROOT_AT + root + 33 * 512 <= size);
        assert!(has_efi_system(&disk[..TABLE]));
        assert_eq!(root_size(OVERHEAD + 100), None);
    }

    #[test]
    fn tables_without_a_partition_for_uefi_are_told_apart() {
        let mut disk = vec![0; TABLE];
        assert!(!has_efi_system(&disk));
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        // Linux, then the old table's kind for UEFI.
        disk[446 + 4] = 0x83;
        assert!(!has_efi_system(&disk));
        disk[462 + 4] = 0xef;
        assert!(has_efi_system(&disk));
        // The newer table decides, where there is one.
        disk[512..520].copy_from_slice(b"EFI PART");
        assert!(!has_efi_system(&disk));
        for length in [0, 1, 511, 512, 520, 1100] {
            has_efi_system(&disk[..length]);
        }
    }

    #[test]
    fn what_is_no_loader_is_refused() {
        let loader = Loader { boot: &[0; 100], core: &[0; 600], efi: &[] };
        let mut out = Cursor::new(vec![0; 30 << 20]);
        assert!(write(&mut out, 30 << 20, 1 << 20, [0; 4], &loader).is_err());
        assert!(grub::core(&[0; 100], 1).is_err());
        assert!(grub::core(&vec![0; 2 << 20], 1).is_err());
    }
}
