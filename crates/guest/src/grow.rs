//! Growing the root into its disk: the partition table, what the kernel knows of it, the file
//! system. Online, in this order, each step safe to repeat. No program is needed for it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use gpt::GptConfig;
use gpt::disk::LogicalBlockSize;

const EXT4: u64 = 0xef53;
/// Partitions end where all kinds of disks can write well.
const ALIGN: u64 = 1 << 20;
/// Less than this is not worth touching a partition table.
const LEAST: u64 = 16 << 20;

/// Grows `/`. What it did, or nothing where there was nothing to do.
pub(crate) fn root() -> Result<Option<String>, String> {
    let text = |what: &'static str| move |e: std::io::Error| format!("{what}: {e}");
    let meta = fs::metadata("/").map_err(text("/"))?;
    let dev = meta.dev();
    let place = format!("/sys/dev/block/{}:{}", libc::major(dev), libc::minor(dev));
    // A root that is no block device has nothing to grow into.
    let Ok(place) = fs::canonicalize(place) else { return Ok(None) };
    let mut done = Vec::new();
    if place.join("partition").exists() {
        done.extend(partition(&place)?);
    }
    done.extend(file_system(&place)?);
    Ok((!done.is_empty()).then(|| done.join("; ")))
}

fn number(path: PathBuf) -> Result<u64, String> {
    let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    text.trim().parse().map_err(|e| format!("{}: {e}", path.display()))
}

/// Makes the root's partition as large as its disk lets it be.
fn partition(place: &Path) -> Result<Option<String>, String> {
    let disk = place.parent().ok_or("a partition without a disk")?;
    let name = disk.file_name().unwrap_or_default();
    let (own, bytes) = (number(place.join("partition"))? as u32, number(disk.join("size"))? * 512);
    let sector = number(disk.join("queue/logical_block_size")).unwrap_or(512);
    let size = if sector == 4096 { LogicalBlockSize::Lb4096 } else { LogicalBlockSize::Lb512 };
    let device = Path::new("/dev").join(name);
    let text = |e: &dyn std::fmt::Display| format!("{}: {e}", device.display());
    let mut file = File::options().read(true).write(true).open(&device).map_err(|e| text(&e))?;
    let Some((start, length)) = widen(&mut file, size, own, bytes).map_err(|e| text(&e))? else {
        return Ok(None);
    };
    file.sync_all().map_err(|e| text(&e))?;
    resize(&file, own, start, length).map_err(|e| text(&e))?;
    Ok(Some(format!("partition {own} of {} has {length} bytes now", device.display())))
}

/// Lets a partition reach to the end of a disk of `bytes`. Its first byte and its length, if it
/// changed.
fn widen<D: gpt::DiskDevice>(
    device: &mut D,
    sector: LogicalBlockSize,
    own: u32,
    bytes: u64,
) -> Result<Option<(u64, u64)>, String> {
    let unit = sector.as_u64();
    let config = GptConfig::new().writable(true).logical_block_size(sector);
    // Its second copy is not at the end any more once the disk has grown.
    let mut table = config.open_from_device(device).map_err(|e| e.to_string())?;
    let mut partitions: BTreeMap<_, _> = table.partitions().clone();
    let known = partitions.get(&own).ok_or("the partition table does not know the root")?;
    let (first, last) = (known.first_lba, known.last_lba);
    if partitions.values().any(|p| p.is_used() && p.first_lba > last) {
        // Something lies behind it.
        return Ok(None);
    }
    // Behind the last partition: the table's second copy, 33 sectors, or fewer large ones.
    let end = (bytes / unit - 34) * unit / ALIGN * ALIGN / unit - 1;
    if end * unit < last * unit + LEAST {
        return Ok(None);
    }
    if let Some(partition) = partitions.get_mut(&own) {
        partition.last_lba = end;
    }
    table.update_partitions(partitions).map_err(|e| e.to_string())?;
    table.write_inplace().map_err(|e| e.to_string())?;
    Ok(Some((first * unit, (end + 1 - first) * unit)))
}

#[repr(C)]
struct BlkpgPartition {
    start: i64,
    length: i64,
    number: i32,
    names: [u8; 128],
}

#[repr(C)]
struct BlkpgArg {
    op: i32,
    flags: i32,
    length: i32,
    data: *mut BlkpgPartition,
}

/// Tells the kernel, which has the partition in use.
fn resize(disk: &File, number: u32, start: u64, length: u64) -> std::io::Result<()> {
    const BLKPG: libc::c_ulong = 0x1269;
    const RESIZE: i32 = 3;
    let (start, length) = (start as i64, length as i64);
    let mut data = BlkpgPartition { start, length, number: number as i32, names: [0; 128] };
    let size = size_of::<BlkpgPartition>() as i32;
    let arg = BlkpgArg { op: RESIZE, flags: 0, length: size, data: &raw mut data };
    // SAFETY: both live until the call is over, and the kernel only reads them.
    let done = unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG as _, &raw const arg) };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Makes the root's file system as large as what it lies on.
fn file_system(place: &Path) -> Result<Option<String>, String> {
    let root = File::open("/").map_err(|e| format!("/: {e}"))?;
    let look = || rustix::fs::fstatfs(root.as_fd()).map_err(|e| format!("/: {e}"));
    let before = look()?;
    if before.f_type as u64 != EXT4 {
        return Ok(None);
    }
    let block = before.f_bsize as u64;
    // _IOW('f', 16, __u64); what is as large already stays.
    const RESIZE_FS: libc::c_ulong = 0x4008_6610;
    let blocks: u64 = number(place.join("size"))? * 512 / block;
    // SAFETY: the kernel reads one number of this width.
    let done = unsafe { libc::ioctl(root.as_raw_fd(), RESIZE_FS as _, &raw const blocks) };
    if done != 0 {
        return Err(format!("the file system: {}", std::io::Error::last_os_error()));
    }
    let grown = look()?.f_blocks > before.f_blocks;
    Ok(grown.then(|| format!("the root's file system has {} bytes now", blocks * block)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn disk(bytes: usize, parts: &[(u64, u64)]) -> Cursor<Vec<u8>> {
        let mut device = Cursor::new(vec![0; bytes]);
        let config = GptConfig::new().writable(true).logical_block_size(LogicalBlockSize::Lb512);
        let mut table = config.create_from_device(&mut device, None).unwrap();
        for (number, (first, sectors)) in parts.iter().enumerate() {
            let (id, kind) = (number as u32 + 1, gpt::partition_types::LINUX_FS);
            table.add_partition_at("x", id, *first, *sectors, kind, 0).unwrap();
        }
        table.write().unwrap();
        device
    }

    #[test]
    fn case_g19_the_last_partition_reaches_to_the_end() {
        let mut device = disk(64 << 20, &[(2048, 2048), (4096, 8192)]);
        device.get_mut().resize(256 << 20, 0);
        let grown = widen(&mut device, LogicalBlockSize::Lb512, 2, 256 << 20).unwrap();
        assert_eq!(grown, Some((2 << 20, 253 << 20)));
        let again = widen(&mut device, LogicalBlockSize::Lb512, 2, 256 << 20).unwrap();
        assert_eq!(again, None);
        let config = GptConfig::new().only_valid_headers(true);
        let table = config.open_from_device(&mut device).unwrap();
        assert_eq!(table.primary_header().unwrap().backup_lba, (256 << 20) / 512 - 1);
        assert!(table.backup_header().is_ok());
        assert_eq!(table.partitions()[&1].last_lba, 4095);
    }

    #[test]
    fn what_has_a_neighbour_stays() {
        let mut device = disk(64 << 20, &[(2048, 2048), (4096, 8192)]);
        device.get_mut().resize(256 << 20, 0);
        assert_eq!(widen(&mut device, LogicalBlockSize::Lb512, 1, 256 << 20).unwrap(), None);
        assert!(widen(&mut device, LogicalBlockSize::Lb512, 7, 256 << 20).is_err());
        let mut none = Cursor::new(vec![0; 1 << 20]);
        assert!(widen(&mut none, LogicalBlockSize::Lb512, 1, 1 << 20).is_err());
    }
}
