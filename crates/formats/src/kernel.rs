//! Linux kernels: what is in a bzImage, and the ELF file inside it, so that it is unpacked once
//! instead of at every boot. Trusts no offset and bounds every expansion.

use std::io::Read;

/// Kernels larger than this when unpacked are refused.
const MAX_ELF: usize = 512 << 20;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("this is not a Linux kernel")]
    NotKernel,
    #[error("the kernel is cut short")]
    Short,
    #[error("the kernel inside is packed in a way that is not known here")]
    Packing,
    #[error("the kernel inside cannot be unpacked: {0}")]
    Unpack(String),
    #[error("the kernel inside is larger than 512 MiB")]
    TooLarge,
}

/// The ELF file inside a bzImage.
pub fn unpack(image: &[u8]) -> Result<Vec<u8>, Error> {
    let payload = payload(image)?;
    let elf = match payload {
        [0x02, 0x21, 0x4c, 0x18, rest @ ..] => lz4_legacy(rest)?,
        [0xfd, b'7', b'z', b'X', b'Z', ..] => bounded(lzma_rust2::XzReader::new(payload, false))?,
        [0x1f, 0x8b, ..] => bounded(flate2::read::GzDecoder::new(payload))?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(payload);
            bounded(decoder.map_err(|e| Error::Unpack(e.to_string()))?)?
        }
        [0x7f, b'E', b'L', b'F', ..] => payload.to_vec(),
        _ => return Err(Error::Packing),
    };
    if elf.starts_with(b"\x7fELF") { Ok(elf) } else { Err(Error::NotKernel) }
}

/// The configuration that a kernel carries, if it does (`CONFIG_IKCONFIG`).
pub fn config(elf: &[u8]) -> Option<String> {
    let find = |mark: &[u8]| elf.windows(mark.len()).position(|w| w == mark);
    let packed = &elf[find(b"IKCFG_ST\x1f\x8b")? + 8..];
    let mut text = String::new();
    let decoder = flate2::read::GzDecoder::new(packed);
    decoder.take(16 << 20).read_to_string(&mut text).ok()?;
    Some(text)
}

/// The `payload_offset` and `payload_length` of the boot protocol, from version 2.08 on.
fn payload(image: &[u8]) -> Result<&[u8], Error> {
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err(Error::NotKernel);
    }
    let version = u16::from_le_bytes(array(image, 0x206)?);
    if version < 0x208 {
        return Err(Error::Packing);
    }
    let sectors = match image[0x1f1] {
        0 => 4,
        n => usize::from(n),
    };
    let offset = u32::from_le_bytes(array(image, 0x248)?) as usize;
    let length = u32::from_le_bytes(array(image, 0x24c)?) as usize;
    let start = (sectors + 1) * 512 + offset;
    let payload = image.get(start..start.saturating_add(length)).ok_or(Error::Short)?;
    match payload {
        // It ends with the unpacked size by itself.
        [0x1f, 0x8b, ..] => Ok(payload),
        // The last four bytes are the unpacked size, not part of the packed stream.
        _ => payload.get(..payload.len().saturating_sub(4)).ok_or(Error::Short),
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Error> {
    bytes.get(at..at.saturating_add(N)).and_then(|slice| slice.try_into().ok()).ok_or(Error::Short)
}

fn bounded(reader: impl Read) -> Result<Vec<u8>, Error> {
    let mut out = Vec::new();
    reader
        .take(MAX_ELF as u64 + 1)
        .read_to_end(&mut out)
        .map_err(|e| Error::Unpack(e.to_string()))?;
    if out.len() > MAX_ELF { Err(Error::TooLarge) } else { Ok(out) }
}

/// The legacy LZ4 form: blocks of at most 8 MiB, each with its packed length before it.
fn lz4_legacy(mut rest: &[u8]) -> Result<Vec<u8>, Error> {
    const BLOCK: usize = 8 << 20;
    let mut out = Vec::new();
    let mut block = vec![0; BLOCK];
    while rest.len() >= 4 {
        let length = u32::from_le_bytes(array(rest, 0)?) as usize;
        let packed = rest.get(4..4usize.saturating_add(length)).ok_or(Error::Short)?;
        let size = lz4_flex::block::decompress_into(packed, &mut block)
            .map_err(|e| Error::Unpack(e.to_string()))?;
        out.extend_from_slice(&block[..size]);
        if out.len() > MAX_ELF {
            return Err(Error::TooLarge);
        }
        rest = &rest[4 + length..];
    }
    Ok(out)
}

/// Kernels have a handful of segments and little in their notes; no more of a file is looked at,
/// however much it claims to have.
const MAX_SEGMENTS: u64 = 64;
const MAX_NOTES: usize = 1 << 20;

/// The ELF has the note that tells hypervisors its PVH entry point (name `Xen`, type 18).
pub fn has_pvh_entry(elf: &[u8]) -> bool {
    pvh_note(elf).unwrap_or(false)
}

fn pvh_note(elf: &[u8]) -> Result<bool, Error> {
    if elf.get(..5) != Some(b"\x7fELF\x02") {
        return Err(Error::NotKernel);
    }
    let table = u64::from_le_bytes(array(elf, 32)?);
    let entry_size = u64::from(u16::from_le_bytes(array(elf, 54)?));
    let count = u64::from(u16::from_le_bytes(array(elf, 56)?)).min(MAX_SEGMENTS);
    for i in 0..count {
        let at = usize::try_from(table.saturating_add(i * entry_size)).map_err(|_| Error::Short)?;
        let kind = u32::from_le_bytes(array(elf, at)?);
        if kind != 4 {
            continue;
        }
        let field = |offset| array(elf, at.saturating_add(offset)).map(u64::from_le_bytes);
        let (offset, size) = (field(8)? as usize, (field(32)? as usize).min(MAX_NOTES));
        let notes = elf.get(offset..offset.saturating_add(size)).ok_or(Error::Short)?;
        if notes_hold_pvh(notes)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn notes_hold_pvh(mut notes: &[u8]) -> Result<bool, Error> {
    while notes.len() >= 12 {
        let word = |at| array(notes, at).map(|b| u32::from_le_bytes(b) as usize);
        let (name, description, kind) = (word(0)?, word(4)?, word(8)?);
        let aligned = |n: usize| n.checked_next_multiple_of(4).ok_or(Error::Short);
        if kind == 18 && notes.get(12..16) == Some(b"Xen\0") {
            return Ok(true);
        }
        let next = aligned(name)?.saturating_add(aligned(description)?).saturating_add(12);
        notes = notes.get(next..).unwrap_or_default();
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage around `packed`, as the boot protocol lays it out.
    fn bz_image(packed: &[u8]) -> Vec<u8> {
        let size: &[u8] = if packed.starts_with(&[0x1f, 0x8b]) { &[] } else { &[0; 4] };
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&((packed.len() + size.len()) as u32).to_le_bytes());
        image.extend_from_slice(packed);
        image.extend_from_slice(size);
        image
    }

    fn elf() -> Vec<u8> {
        let mut elf = b"\x7fELF\x02".to_vec();
        elf.resize(100_000, 7);
        elf
    }

    #[test]
    fn lz4_kernels_in_several_blocks_unpack() {
        let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
        for part in elf().chunks(60_000) {
            let block = lz4_flex::block::compress(part);
            packed.extend_from_slice(&(block.len() as u32).to_le_bytes());
            packed.extend_from_slice(&block);
        }
        assert_eq!(unpack(&bz_image(&packed)).unwrap(), elf());
    }

    #[test]
    fn gzip_kernels_unpack() {
        use std::io::Write;
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(&elf()).unwrap();
        assert_eq!(unpack(&bz_image(&packer.finish().unwrap())).unwrap(), elf());
    }

    #[test]
    fn damaged_kernels_are_refused() {
        assert_eq!(unpack(b"").unwrap_err(), Error::NotKernel);
        assert_eq!(unpack(&bz_image(b"what is this")).unwrap_err(), Error::Packing);
        let mut cut = bz_image(&[0x02, 0x21, 0x4c, 0x18, 0xff, 0xff, 0xff, 0x7f]);
        assert_eq!(unpack(&cut).unwrap_err(), Error::Short);
        cut.truncate(0x24e);
        assert_eq!(unpack(&cut).unwrap_err(), Error::Short);
        // A table of segments at the end of all numbers.
        let mut far = elf();
        far[32..64].fill(0xff);
        assert!(!has_pvh_entry(&far));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes: Vec<u8>, packed: Vec<u8>) {
            let _ = unpack(&bz_image(&packed));
            bytes.splice(0..0, *b"\x7fELF\x02");
            let _ = has_pvh_entry(&bytes);
        }
    }
}
