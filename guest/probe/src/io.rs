//! Ports, registers in memory, the clock, and the page tables' window: everything that is unsafe
//! about a machine with nothing on it but us.

use core::arch::asm;
use core::ptr::{read_volatile, write_volatile};

/// Reading and writing ports of one width, by the register that it takes.
macro_rules! ports {
    ($in:ident, $out:ident, $value:ty, $register:tt) => {
        pub(crate) fn $in(port: u16) -> $value {
            let value: $value;
            // SAFETY: reading a port changes none of our memory.
            unsafe {
                asm!(concat!("in ", $register, ", dx"), in("dx") port, out($register) value,
                    options(nomem, nostack));
            }
            value
        }

        pub(crate) fn $out(port: u16, value: $value) {
            // SAFETY: no device behind a port writes memory before its queue is set up.
            unsafe {
                asm!(concat!("out dx, ", $register), in("dx") port, in($register) value,
                    options(nomem, nostack));
            }
        }
    };
}

ports!(inb, outb, u8, "al");
ports!(inw, outw, u16, "ax");
ports!(inl, outl, u32, "eax");

/// Cycles since the processor was started; goes on where a snapshot left it.
pub(crate) fn cycles() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a counter.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Memory that a hypervisor has named: registers, or what it wrote down for us.
#[derive(Clone, Copy)]
pub(crate) struct Place(pub(crate) u64);

impl Place {
    pub(crate) fn plus(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }

    pub(crate) fn read<T: Copy>(self) -> T {
        // SAFETY: all of the first 4 GiB and of the window is mapped, and nobody else is here.
        unsafe { read_volatile(self.0 as *const T) }
    }

    pub(crate) fn read_unaligned<T: Copy>(self) -> T {
        // SAFETY: as for `read`; this is memory and no register.
        unsafe { core::ptr::read_unaligned(self.0 as *const T) }
    }

    pub(crate) fn write<T>(self, value: T) {
        // SAFETY: as for `read`; what is written to are registers.
        unsafe { write_volatile(self.0 as *mut T, value) }
    }
}

unsafe extern "C" {
    static mut window: [u64; 512];
}

const LARGE: u64 = 2 << 20;

/// Makes registers reachable, wherever they are.
pub(crate) fn reach(physical: u64) -> Place {
    if physical < 4 << 30 {
        return Place(physical);
    }
    let table = &raw mut window;
    let page = physical & !(LARGE - 1);
    for index in 0..511 {
        // SAFETY: the table has 512 entries, and we are the only ones who know of it.
        unsafe {
            let entry = (*table).as_mut_ptr().add(index);
            let wanted = page | 0x83;
            if entry.read_volatile() == 0 {
                // What begins in one page may end in the next one.
                entry.write_volatile(wanted);
                entry.add(1).write_volatile(wanted + LARGE);
            }
            if entry.read_volatile() == wanted {
                return Place((4 << 30) + index as u64 * LARGE + (physical - page));
            }
        }
    }
    Place(physical & 0xffff_ffff)
}

/// Does what no hypervisor gets past: first what some cannot emulate, then a fault that nothing
/// handles.
pub(crate) fn die() {
    // SAFETY: nothing comes after it.
    unsafe { asm!("popcnt {0}, {0}", "lidt [{1}]", "ud2", out(reg) _, in(reg) &[0_u64; 2]) };
}
