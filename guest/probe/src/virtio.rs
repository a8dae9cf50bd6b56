//! Virtio 1.x: one device behind either transport, and queues that are polled. Knows no kind of
//! device.

use core::sync::atomic::{Ordering, compiler_fence};

use crate::io::{Place, cycles};

/// Entries of a queue.
pub(crate) const SIZE: u16 = 8;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
/// The upper half of the features says that the device keeps to the standard.
const VERSION_1: u32 = 1;
/// Cycles after which a device is taken to be dead: a second or some.
const PATIENCE: u64 = 4_000_000_000;

/// Where a device's registers are.
#[derive(Clone, Copy)]
pub(crate) enum Transport {
    Mmio(Place),
    Pci { common: Place, notify: Place, multiplier: u32, config: Place },
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

/// A queue's memory.
#[repr(C, align(4096))]
pub(crate) struct Rings {
    table: [Descriptor; SIZE as usize],
    available: [u16; SIZE as usize + 3],
    used: Used,
}

#[repr(C, align(4))]
struct Used {
    flags: u16,
    index: u16,
    ring: [[u32; 2]; SIZE as usize],
    event: u16,
}

/// A queue in use.
pub(crate) struct Queue {
    rings: Place,
    number: u16,
    notify: Place,
    wide: bool,
    given: u16,
    taken: u16,
}

const AVAILABLE: u64 = 16 * SIZE as u64;
const USED: u64 = core::mem::offset_of!(Rings, used) as u64;

impl Transport {
    fn status(self) -> u8 {
        match self {
            Self::Mmio(base) => base.plus(0x70).read::<u32>() as u8,
            Self::Pci { common, .. } => common.plus(20).read(),
        }
    }

    fn set_status(self, status: u8) {
        match self {
            Self::Mmio(base) => base.plus(0x70).write(u32::from(status)),
            Self::Pci { common, .. } => common.plus(20).write(status),
        }
    }

    pub(crate) fn features(self, half: u32) -> u32 {
        match self {
            Self::Mmio(base) => {
                base.plus(0x14).write(half);
                base.plus(0x10).read()
            }
            Self::Pci { common, .. } => {
                common.write(half);
                common.plus(4).read()
            }
        }
    }

    fn set_features(self, half: u32, features: u32) {
        match self {
            Self::Mmio(base) => {
                base.plus(0x24).write(half);
                base.plus(0x20).write(features);
            }
            Self::Pci { common, .. } => {
                common.plus(8).write(half);
                common.plus(12).write(features);
            }
        }
    }

    /// What a kind of device says of itself.
    pub(crate) fn config(self, at: u64) -> Place {
        match self {
            Self::Mmio(base) => base.plus(0x100 + at),
            Self::Pci { config, .. } => config.plus(at),
        }
    }

    /// Up to where queues are set up; false if the device is not one of ours.
    pub(crate) fn begin(self) -> bool {
        self.set_status(0);
        let begun = cycles();
        while self.status() != 0 {
            if cycles() - begun > PATIENCE {
                return false;
            }
        }
        self.set_status(ACKNOWLEDGE | DRIVER);
        if self.features(1) & VERSION_1 == 0 {
            return false;
        }
        self.set_features(0, 0);
        self.set_features(1, VERSION_1);
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.status() & FEATURES_OK != 0
    }

    pub(crate) fn go(self) {
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    pub(crate) fn queue(self, number: u16, rings: *mut Rings) -> Option<Queue> {
        let rings = Place(rings as u64);
        let parts = [rings.0, rings.0 + AVAILABLE, rings.0 + USED];
        let notify = match self {
            Self::Mmio(base) => {
                base.plus(0x30).write(u32::from(number));
                if base.plus(0x34).read::<u32>() < u32::from(SIZE) {
                    return None;
                }
                base.plus(0x38).write(u32::from(SIZE));
                for (at, part) in [0x80, 0x90, 0xa0].into_iter().zip(parts) {
                    base.plus(at).write(part as u32);
                    base.plus(at + 4).write((part >> 32) as u32);
                }
                base.plus(0x44).write(1_u32);
                base.plus(0x50)
            }
            Self::Pci { common, notify, multiplier, .. } => {
                common.plus(22).write(number);
                if common.plus(24).read::<u16>() < SIZE {
                    return None;
                }
                common.plus(24).write(SIZE);
                for (at, part) in [32, 40, 48].into_iter().zip(parts) {
                    common.plus(at).write(part as u32);
                    common.plus(at + 4).write((part >> 32) as u32);
                }
                common.plus(28).write(1_u16);
                let offset = u64::from(common.plus(30).read::<u16>());
                notify.plus(offset * u64::from(multiplier))
            }
        };
        // One transport's register is wider than the other's.
        let wide = matches!(self, Self::Mmio(_));
        Some(Queue { rings, number, notify, wide, given: 0, taken: 0 })
    }
}

/// A piece of memory that a device reads, or writes.
#[derive(Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) address: u64,
    pub(crate) length: u32,
    pub(crate) write: bool,
}

impl Queue {
    /// Gives pieces to the device, as one; the first of them is descriptor `first`.
    pub(crate) fn give(&mut self, first: u16, pieces: &[Piece]) {
        for (at, piece) in (first..).zip(pieces) {
            let more = usize::from(at - first) + 1 < pieces.len();
            let flags = u16::from(more) | u16::from(piece.write) << 1;
            let Piece { address, length, .. } = *piece;
            let descriptor = Descriptor { address, length, flags, next: at + 1 };
            self.rings.plus(16 * u64::from(at)).write(descriptor);
        }
        let available = self.rings.plus(AVAILABLE);
        available.plus(4 + 2 * u64::from(self.given % SIZE)).write(first);
        compiler_fence(Ordering::SeqCst);
        self.given = self.given.wrapping_add(1);
        available.plus(2).write(self.given);
        compiler_fence(Ordering::SeqCst);
        match self.wide {
            true => self.notify.write(u32::from(self.number)),
            false => self.notify.write(self.number),
        }
    }

    /// What has come back: its first descriptor, and how many bytes were written.
    pub(crate) fn take(&mut self) -> Option<(u16, u32)> {
        let used = self.rings.plus(USED);
        if used.plus(2).read::<u16>() == self.taken {
            return None;
        }
        compiler_fence(Ordering::SeqCst);
        let entry = used.plus(4 + 8 * u64::from(self.taken % SIZE));
        self.taken = self.taken.wrapping_add(1);
        Some((entry.read::<u32>() as u16, entry.plus(4).read()))
    }

    /// Waits for it; nothing where the device is dead.
    pub(crate) fn wait(&mut self) -> Option<(u16, u32)> {
        let begun = cycles();
        loop {
            if let Some(back) = self.take() {
                return Some(back);
            }
            if cycles() - begun > PATIENCE {
                return None;
            }
        }
    }
}
