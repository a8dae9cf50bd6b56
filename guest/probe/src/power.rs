//! Power: how a host asks for the end, and how a guest brings it about. Each hypervisor has its own
//! way of both; what belongs to another one does nothing.

use crate::io::{Place, inb, inw, outb, outw, reach};
use crate::tables::{Register, Tables};

/// The keyboard controller.
const KEYS: u16 = 0x60;
const KEYS_STATUS: u16 = 0x64;
/// The delete key, of which Ctrl-Alt-Del is the last one.
const DELETE: u8 = 0x71;
/// Power management of QEMU's boards with a firmware.
const EVENTS: u16 = 0x600;
const ENABLED: u16 = 0x602;
const CONTROL: u16 = 0x604;
const BUTTON: u16 = 1 << 8;

/// How the host may ask.
pub(crate) struct Power {
    /// A board with a power button that is an event.
    pc: bool,
    happened: Option<Happened>,
    sleep: Option<Register>,
}

/// Where what has happened is read, which takes it away.
struct Happened {
    place: Place,
    wide: bool,
}

impl Happened {
    fn button(&self) -> bool {
        match self.wide {
            true => self.place.read::<u32>() & 2 != 0,
            false => self.place.read::<u8>() & 8 != 0,
        }
    }
}

impl Power {
    pub(crate) fn new(pc: bool, tables: &Tables) -> Self {
        if pc {
            outw(ENABLED, BUTTON);
        }
        Self { pc, happened: happened(tables), sleep: tables.sleep() }
    }

    /// Whether the host asks for the end.
    pub(crate) fn asked(&self) -> bool {
        let mut asked = self.pc && inw(EVENTS) & BUTTON != 0;
        for _ in 0..8 {
            // Where there is no controller, all bits are set.
            let status = inb(KEYS_STATUS);
            if status == 0xff || status & 1 == 0 {
                break;
            }
            asked |= inb(KEYS) == DELETE;
        }
        asked | self.happened.as_ref().is_some_and(Happened::button)
    }

    /// Ends the machine.
    pub(crate) fn off(&self) {
        const SLEEP: u8 = 1 << 5 | 5 << 2;
        match self.sleep {
            Some(Register { port: true, address }) => outb(address as u16, SLEEP),
            Some(Register { port: false, address }) => reach(address).write(SLEEP),
            None if self.pc => outw(CONTROL, 1 << 13),
            None => {}
        }
        // Where there is no such thing, the machine ends when it starts anew.
        reset();
    }
}

/// Starts the machine anew.
pub(crate) fn reset() {
    outb(KEYS_STATUS, 0xfe);
}

/// An event device's register: Cloud Hypervisor calls its own `GDST`, QEMU `EREG`. The kind of
/// space, memory being 0, and a number of 4 or of 8 bytes follow.
fn happened(tables: &Tables) -> Option<Happened> {
    let cloud = tables.find(*b"\x5b\x80GDST").next().map(|at| (at, false));
    let (at, wide) = cloud.or_else(|| Some((tables.find(*b"\x5b\x80EREG").next()?, true)))?;
    let (space, number) = (at.plus(6), at.plus(7));
    let address = match (space.read::<u8>(), number.read::<u8>()) {
        (0, 0x0c) => u64::from(number.plus(1).read_unaligned::<u32>()),
        (0, 0x0e) => number.plus(1).read_unaligned(),
        _ => return None,
    };
    Some(Happened { place: reach(address), wide })
}
