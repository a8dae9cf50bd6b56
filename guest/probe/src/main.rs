//! The probe guest: what a hypervisor is given to show that it runs and that its devices work,
//! where Linux would take long or come to nothing. It says its command line, finds disks and
//! interfaces, reads the first sector of each disk, answers on the network, does what is typed, and
//! counts for ever, so that whoever stops it, keeps it or starts it again sees whether it goes on.
//!
//! Everything is polled. No interrupts, no floating point, no user space; nothing of Linux.

#![no_std]
#![no_main]

mod boot;
mod console;
mod disk;
mod find;
mod io;
mod net;
mod power;
mod tables;
mod virtio;

use console::{Typed, say};
use disk::{Disk, Request};
use find::Found;
use io::{Place, cycles};
use net::{Frames, Net};
use power::Power;
use tables::Tables;
use virtio::{Rings, Transport};

/// Devices of each kind.
const MANY: usize = 8;
/// Between two numbers: some hundredths of a second.
const TICK: u64 = 60_000_000;

/// What it has drivers for, in the form in which a kernel carries its configuration.
#[used]
#[unsafe(link_section = ".rodata")]
static DRIVERS: Carried<{ include_bytes!("config.gz").len() }> =
    Carried { begin: *b"IKCFG_ST", config: *include_bytes!("config.gz"), end: *b"IKCFG_ED" };

#[repr(C)]
struct Carried<const N: usize> {
    begin: [u8; 8],
    config: [u8; N],
    end: [u8; 8],
}

/// Memory that devices are shown.
struct Shown {
    rings: [[Rings; 2]; 2 * MANY],
    requests: [Request; MANY],
    frames: [Frames; MANY],
}

static mut SHOWN: core::mem::MaybeUninit<Shown> = core::mem::MaybeUninit::zeroed();
static mut PROBE: Probe = Probe::new();

struct Probe {
    cmdline: [u8; 2048],
    length: usize,
    /// What names the devices that are known.
    known: [u64; 4 * MANY],
    devices: usize,
    disks: [Option<Disk>; MANY],
    nets: [Option<Net>; MANY],
}

impl Probe {
    const fn new() -> Self {
        Self {
            cmdline: [0; 2048],
            length: 0,
            known: [0; 4 * MANY],
            devices: 0,
            disks: [const { None }; MANY],
            nets: [const { None }; MANY],
        }
    }

    fn cmdline(&self) -> &[u8] {
        self.cmdline.get(..self.length).unwrap_or_default()
    }

    fn keep_cmdline(&mut self, at: u64) {
        for (index, place) in self.cmdline.iter_mut().enumerate() {
            let byte: u8 = if at == 0 { 0 } else { Place(at + index as u64).read() };
            if byte == 0 {
                break;
            }
            *place = byte;
            self.length = index + 1;
        }
    }

    /// Takes what is there and not known yet.
    fn find(&mut self, tables: &Tables) {
        let (text, length) = (self.cmdline, self.length);
        let text = text.get(..length).unwrap_or_default();
        find::mmio(text, tables, &mut |found| self.meet(&found));
        self.find_plugged();
    }

    /// Takes what is on the buses, where things are plugged in.
    fn find_plugged(&mut self) {
        find::pci(&mut |found| self.meet(&found));
    }

    fn meet(&mut self, found: &Found) {
        let Found { name, kind, .. } = *found;
        let known = self.known.get(..self.devices).unwrap_or_default();
        if known.contains(&name) || !matches!(kind, 1 | 2) {
            return;
        }
        let Some(transport) = found.transport() else { return };
        let Some(place) = self.known.get_mut(self.devices) else { return };
        *place = name;
        let own = self.devices;
        self.devices += 1;
        let over = match transport {
            Transport::Mmio(_) => " mmio",
            Transport::Pci { .. } => " pci",
        };
        if own >= 2 * MANY || !transport.begin() {
            say!("device of kind ", u64::from(kind), over, ": not taken");
            return;
        }
        let shown = (&raw mut SHOWN).cast::<Shown>();
        // SAFETY: each device has memory of its own, and there are as many as devices are taken.
        let rings = unsafe { [0, 1].map(|queue| &raw mut (*shown).rings[own][queue]) };
        let free = match kind {
            1 => self.nets.iter().position(Option::is_none),
            _ => self.disks.iter().position(Option::is_none),
        };
        let Some(free) = free else { return };
        match kind {
            1 => {
                // SAFETY: as above.
                let frames = unsafe { &raw mut (*shown).frames[free] };
                self.nets[free] = Net::new(transport, rings, frames, self.address(free));
            }
            _ => {
                // SAFETY: as above.
                let request = unsafe { &raw mut (*shown).requests[free] };
                self.disks[free] = Disk::new(transport, rings[0], request);
                self.show_disk(free);
            }
        }
    }

    /// The address of an interface: what `probe.ip=` says, and the ones after it.
    fn address(&self, number: usize) -> [u8; 4] {
        let mut address = [0; 4];
        if let Some(text) = find::values(self.cmdline(), b"probe.ip=").next() {
            let parts = text.split(|b| *b == b'.');
            address.iter_mut().zip(parts).for_each(|(byte, part)| *byte = find::number(part) as u8);
            address[3] = address[3].wrapping_add(number as u8);
        }
        address
    }

    /// How it begins.
    fn show_disk(&mut self, number: usize) {
        let Some(disk) = self.disks.get_mut(number).and_then(Option::as_mut) else { return };
        let writable = disk.writable;
        match disk.read(0) {
            Ok(data) => {
                let first = data.get(..4).unwrap_or_default();
                say!("PROBE disk", number as u64, ": ", first, " writable=", writable);
            }
            Err(status) => say!("PROBE disk", number as u64, " failed ", status),
        }
    }

    fn show_sector(&mut self, disk: usize, sector: u64) {
        let number = disk as u64;
        match self.disks.get_mut(disk).and_then(Option::as_mut).map(|disk| disk.read(sector)) {
            Some(Ok(data)) => say!("disk ", number, " sector ", sector, ": ", data),
            Some(Err(status)) => say!("disk ", number, " sector ", sector, " failed ", status),
            None => say!("disk ", number, " is not there"),
        }
    }

    /// Does what was typed: `read DISK SECTOR`, `write [DISK SECTOR WORD]`, `poweroff`, `reset`,
    /// `crash`, `panic`; anything else it only repeats.
    fn obey(&mut self, line: &[u8], power: &Power) {
        let mut words = line.split(|b| *b == b' ');
        let verb = words.next().unwrap_or_default();
        match verb {
            b"read" => {
                let mut number = || words.next().map_or(0, find::number);
                let (disk, sector) = (number() as usize, number());
                self.show_sector(disk, sector);
            }
            b"write" => {
                let mut word = || words.next().filter(|word| !word.is_empty());
                let disk = word().map_or(0, find::number) as usize;
                let sector = word().map_or(1, find::number);
                let text = word().unwrap_or(b"WROTE");
                let disk = self.disks.get_mut(disk).and_then(Option::as_mut);
                match disk.map(|disk| disk.write(sector, text)) {
                    Some(Ok(())) => say!("written"),
                    Some(Err(status)) => say!("not written ", status),
                    None => say!("there is no such disk"),
                }
            }
            b"poweroff" => power.off(),
            b"reset" => power::reset(),
            b"crash" => io::die(),
            b"panic" => say!("[    0.5] Kernel panic - not syncing: simulated"),
            _ => say!("typed: ", line),
        }
    }

    /// Disks whose size is another now.
    fn measure(&mut self) {
        for (number, disk) in self.disks.iter_mut().enumerate() {
            let Some(disk) = disk else { continue };
            let size = disk.size();
            if size != disk.sectors {
                disk.sectors = size;
                say!("disk ", number as u64, " now ", size, " sectors");
            }
        }
    }
}

/// `info` is where a hypervisor describes the machine: `hvm_start_info`, or what Linux is given.
#[unsafe(no_mangle)]
extern "C" fn probe(info: u64, linux: u32) -> ! {
    // SAFETY: nothing else runs, and this is the only one there is.
    let probe = unsafe { (&raw mut PROBE).as_mut_unchecked() };
    let cmdline = match linux {
        0 => Place(info).plus(24).read(),
        _ => u64::from(Place(info).plus(0x228).read::<u32>()),
    };
    let tables = Tables::new(if linux == 0 { Place(info).plus(32).read() } else { 0 });
    probe.keep_cmdline(cmdline);
    say!("PROBE cmdline: ", probe.cmdline());
    probe.find(&tables);
    say!("PROBE nets: ", probe.nets.iter().flatten().count() as u64);
    let power = Power::new(find::is_pc(), &tables);
    let deaf = probe.cmdline().split(|b| *b == b' ').any(|word| word == b"deaf");
    say!("GUEST-READY");
    let (mut count, mut last, mut typed) = (0_u64, cycles(), Typed::new());
    loop {
        for net in probe.nets.iter_mut().flatten() {
            net.poll();
        }
        if let Some(line) = typed.poll() {
            probe.obey(line, &power);
        }
        if cycles().wrapping_sub(last) >= TICK {
            last = cycles();
            if power.asked() && !deaf {
                say!("guest powers off");
                power.off();
            }
            count += 1;
            say!("tick ", count);
            probe.measure();
            probe.find_plugged();
        }
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    say!("panic");
    loop {}
}
