//! Disks: a sector at a time.

use crate::virtio::{Piece, Queue, Rings, Transport};

const READ: u32 = 0;
const WRITE: u32 = 1;
const READ_ONLY: u32 = 1 << 5;
pub(crate) const SECTOR: usize = 512;

/// What a disk's requests are made of.
#[repr(C, align(4096))]
pub(crate) struct Request {
    kind: u32,
    reserved: u32,
    sector: u64,
    data: [u8; SECTOR],
    status: u8,
}

pub(crate) struct Disk {
    transport: Transport,
    queue: Queue,
    request: *mut Request,
    pub(crate) sectors: u64,
    pub(crate) writable: bool,
}

impl Disk {
    pub(crate) fn new(
        transport: Transport,
        rings: *mut Rings,
        request: *mut Request,
    ) -> Option<Self> {
        let queue = transport.queue(0, rings)?;
        transport.go();
        let writable = transport.features(0) & READ_ONLY == 0;
        let mut disk = Self { transport, queue, request, sectors: 0, writable };
        disk.sectors = disk.size();
        Some(disk)
    }

    /// In sectors, as it is now.
    pub(crate) fn size(&self) -> u64 {
        let halves = [0, 4].map(|at| u64::from(self.transport.config(at).read::<u32>()));
        halves[1] << 32 | halves[0]
    }

    fn ask(&mut self, kind: u32, sector: u64) -> Option<u8> {
        let request = self.request;
        // SAFETY: the memory is this disk's alone, and the device has given back what it had.
        unsafe {
            (&raw mut (*request).kind).write_volatile(kind);
            (&raw mut (*request).reserved).write_volatile(0);
            (&raw mut (*request).sector).write_volatile(sector);
            (&raw mut (*request).status).write_volatile(0xff);
        }
        let base = request as u64;
        let data = base + core::mem::offset_of!(Request, data) as u64;
        let status = base + core::mem::offset_of!(Request, status) as u64;
        let pieces = [
            Piece { address: base, length: 16, write: false },
            Piece { address: data, length: SECTOR as u32, write: kind == READ },
            Piece { address: status, length: 1, write: true },
        ];
        self.queue.give(0, &pieces);
        self.queue.wait()?;
        // SAFETY: as above.
        Some(unsafe { (&raw const (*request).status).read_volatile() })
    }

    /// The sector, or the device's complaint; 255 where it has not answered.
    pub(crate) fn read(&mut self, sector: u64) -> Result<&[u8], u64> {
        match self.ask(READ, sector) {
            // SAFETY: the device has given it back.
            Some(0) => Ok(unsafe { &(*self.request).data }),
            status => Err(u64::from(status.unwrap_or(255))),
        }
    }

    /// Writes a text; the rest of the sector is zero.
    pub(crate) fn write(&mut self, sector: u64, text: &[u8]) -> Result<(), u64> {
        for at in 0..SECTOR {
            let byte = text.get(at).copied().unwrap_or(0);
            // SAFETY: within the sector, which is ours.
            unsafe { (&raw mut (*self.request).data).cast::<u8>().add(at).write_volatile(byte) };
        }
        match self.ask(WRITE, sector) {
            Some(0) => Ok(()),
            status => Err(u64::from(status.unwrap_or(255))),
        }
    }
}
