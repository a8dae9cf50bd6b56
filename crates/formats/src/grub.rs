//! GRUB's first parts, as firmware of the old kind loads them: each is told where the next one lies.

use std::io;

const SECTOR: usize = 512;
/// No core is larger.
pub const MAX_CORE: usize = 1 << 20;

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("GRUB: {what}"))
}

/// The first sector of a disk, told at which sector the core begins. It has room for a table of
/// partitions, and none.
pub fn first_sector(boot: &[u8], core_at: u64) -> io::Result<Vec<u8>> {
    let code = boot.get(..440).ok_or_else(|| damaged("its first sector is too short"))?;
    let mut sector = vec![0; SECTOR];
    sector[..440].copy_from_slice(code);
    sector[0x5c..0x64].copy_from_slice(&core_at.to_le_bytes());
    // The drive is the one that the firmware names.
    sector[0x64] = 0xff;
    sector[0x66..0x68].copy_from_slice(&[0x90, 0x90]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    Ok(sector)
}

/// The core, whole sectors of it, told where the rest of it is: behind its own first sector.
pub fn core(core: &[u8], at: u64) -> io::Result<Vec<u8>> {
    if core.len() < SECTOR || core.len() > MAX_CORE {
        return Err(damaged("its core has an impossible size"));
    }
    let mut core = core.to_vec();
    core.resize(core.len().next_multiple_of(SECTOR), 0);
    let rest = core.len() / SECTOR - 1;
    core[0x1f4..0x1fc].copy_from_slice(&(at + 1).to_le_bytes());
    core[0x1fc..0x1fe].copy_from_slice(&(rest as u16).to_le_bytes());
    core[0x1fe..0x200].copy_from_slice(&0x0820_u16.to_le_bytes());
    Ok(core)
}
