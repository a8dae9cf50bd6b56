//! Where devices are: on the PCI buses, and where the command line or the description of the machine
//! names them.

use crate::io::{Place, inl, outl, reach};
use crate::tables::Tables;
use crate::virtio::Transport;

const VIRTIO: u32 = 0x1af4;

/// A virtio device that is there. Its registers are looked for when it is to be used.
pub(crate) struct Found {
    /// No other device's.
    pub(crate) name: u64,
    pub(crate) kind: u32,
    at: At,
}

enum At {
    Mmio(Place),
    /// Behind a bridge that lets this memory through.
    Pci(Function, u32),
}

impl Found {
    pub(crate) fn transport(&self) -> Option<Transport> {
        match self.at {
            At::Mmio(base) => Some(Transport::Mmio(base)),
            At::Pci(function, window) => function.transport(window),
        }
    }
}

/// A place on the buses: bus, device, function, as the address port takes them.
#[derive(Clone, Copy)]
struct Function(u32);

impl Function {
    fn read(self, register: u32) -> u32 {
        outl(0xcf8, 1 << 31 | self.0 << 8 | register & 0xfc);
        inl(0xcfc)
    }

    fn write(self, register: u32, value: u32) {
        outl(0xcf8, 1 << 31 | self.0 << 8 | register & 0xfc);
        outl(0xcfc, value);
    }

    fn byte(self, register: u32) -> u32 {
        self.read(register) >> (8 * (register & 3)) & 0xff
    }

    /// Where a base address register leads.
    fn region(self, number: u32) -> u64 {
        let low = self.read(0x10 + 4 * number);
        let high = if low & 6 == 4 { self.read(0x14 + 4 * number) } else { 0 };
        u64::from(high) << 32 | u64::from(low & !0xf)
    }

    /// Gives a region an address, if it has none; a device that was plugged in may have none.
    fn place(self, number: u32, window: u32) {
        if window != 0 && self.region(number) == 0 {
            let register = 0x10 + 4 * number;
            let wide = self.read(register) & 6 == 4;
            self.write(register, window);
            if wide {
                self.write(register + 4, 0);
            }
        }
    }

    /// Its registers. `window` is memory that the bridge before it lets through.
    fn transport(self, window: u32) -> Option<Transport> {
        let (mut common, mut notify, mut config, mut multiplier) = (None, None, Place(0), 0);
        let mut at = self.byte(0x34) & 0xfc;
        for _ in 0..48 {
            if at == 0 {
                break;
            }
            let head = self.read(at);
            if head & 0xff == 9 && head >> 24 == 1 {
                self.place(self.byte(at + 4), window);
            }
            let region = self.region(self.byte(at + 4));
            if head & 0xff == 9 && region != 0 {
                let place = reach(region + u64::from(self.read(at + 8)));
                match head >> 24 {
                    1 if common.is_none() => common = Some(place),
                    2 if notify.is_none() => {
                        notify = Some(place);
                        multiplier = self.read(at + 16);
                    }
                    4 if config.0 == 0 => config = place,
                    _ => {}
                }
            }
            at = head >> 8 & 0xfc;
        }
        // Memory and mastery of the bus.
        self.write(4, self.read(4) | 6);
        Some(Transport::Pci { common: common?, notify: notify?, multiplier, config })
    }
}

/// Whether the board is one of QEMU's with a firmware.
pub(crate) fn is_pc() -> bool {
    matches!(Function(0).read(0), 0x29c0_8086 | 0x1237_8086)
}

/// Shows every virtio device on the buses.
pub(crate) fn pci(see: &mut dyn FnMut(Found)) {
    bus(0, 0, see);
}

fn bus(bus: u32, window: u32, see: &mut dyn FnMut(Found)) {
    for device in 0..32 {
        for function in 0..8 {
            let function = Function(bus << 8 | device << 3 | function);
            let id = function.read(0);
            if id == u32::MAX || id == 0 {
                if function.0 & 7 == 0 {
                    break;
                }
                continue;
            }
            let header = function.byte(0x0e);
            let behind = function.byte(0x19);
            if header & 0x7f == 1 && behind > bus {
                let memory = function.read(0x20);
                let open = memory >> 16 >= memory & 0xffff;
                self::bus(behind, if open { memory << 16 & 0xfff0_0000 } else { 0 }, see);
            }
            if id & 0xffff == VIRTIO {
                // Older numbers say the kind elsewhere.
                let kind = match id >> 16 {
                    id @ 0x1040..=0x107f => id - 0x1040,
                    _ => function.read(0x2c) >> 16,
                };
                let name = 1 << 63 | u64::from(function.0);
                see(Found { name, kind, at: At::Pci(function, window) });
            }
            if function.0 & 7 == 0 && header & 0x80 == 0 {
                break;
            }
        }
    }
}

/// Shows the devices that `virtio_mmio.device=SIZE@ADDRESS:INTERRUPT` names, and those that the
/// description of the machine has memory for.
pub(crate) fn mmio(cmdline: &[u8], tables: &Tables, see: &mut dyn FnMut(Found)) {
    let named = values(cmdline, b"virtio_mmio.device=").filter_map(|value| {
        let address = value.split(|b| *b == b'@').nth(1)?;
        address.split(|b| *b == b':').next().map(number)
    });
    // A resource of 32-bit memory; whether it can be written, then its address.
    let described = tables.find(*b"\x86\x09\x00");
    let described = described.map(|at| u64::from(at.plus(4).read_unaligned::<u32>()));
    for address in named.chain(described).filter(|address| *address != 0) {
        let base = reach(address);
        // "virt", and the version without legacy.
        if base.read::<u32>() == 0x7472_6976 && base.plus(4).read::<u32>() == 2 {
            see(Found { name: address, kind: base.plus(8).read(), at: At::Mmio(base) });
        }
    }
}

/// What the words of a command line that begin so go on with.
pub(crate) fn values<'a>(cmdline: &'a [u8], name: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
    cmdline.split(|b| *b == b' ').filter_map(move |word| word.strip_prefix(name))
}

/// Decimal, or hexadecimal after `0x`; up to what is no digit.
pub(crate) fn number(text: &[u8]) -> u64 {
    let (digits, base) = match text.strip_prefix(b"0x") {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    let digits = digits.iter().map_while(|b| (*b as char).to_digit(base));
    digits.fold(0_u64, |n, digit| n.wrapping_mul(u64::from(base)).wrapping_add(u64::from(digit)))
}
