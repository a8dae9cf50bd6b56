//! The serial port: lines out, lines in.

use crate::io::{inb, outb};

const PORT: u16 = 0x3f8;
const LINE_STATUS: u16 = PORT + 5;
/// A port that is never ready is written to all the same.
const PATIENCE: u32 = 100_000;

fn put(byte: u8) {
    let mut left = PATIENCE;
    while inb(LINE_STATUS) & 0x20 == 0 && left > 0 {
        left -= 1;
    }
    outb(PORT, byte);
}

/// What can be part of a line.
pub(crate) trait Say {
    fn say(&self);
}

impl Say for &str {
    fn say(&self) {
        self.bytes().for_each(put);
    }
}

/// Text of somebody else's: to its first byte that is none.
impl Say for &[u8] {
    fn say(&self) {
        self.iter().copied().take_while(|b| (32..127).contains(b)).for_each(put);
    }
}

impl Say for bool {
    fn say(&self) {
        if *self { "true" } else { "false" }.say();
    }
}

impl Say for u64 {
    fn say(&self) {
        if *self >= 10 {
            (self / 10).say();
        }
        put(b'0' + (self % 10) as u8);
    }
}

/// Writes a line.
macro_rules! say {
    ($($part:expr),+) => {{
        $($crate::console::Say::say(&$part);)+
        $crate::console::Say::say(&"\r\n");
    }};
}
pub(crate) use say;

/// A line as it is typed.
pub(crate) struct Typed {
    bytes: [u8; 128],
    length: usize,
}

impl Typed {
    pub(crate) const fn new() -> Self {
        Self { bytes: [0; 128], length: 0 }
    }

    /// The whole line, once it is one.
    pub(crate) fn poll(&mut self) -> Option<&[u8]> {
        while inb(LINE_STATUS) & 1 != 0 {
            let byte = inb(PORT);
            if matches!(byte, b'\r' | b'\n') {
                let length = core::mem::take(&mut self.length);
                if length > 0 {
                    return self.bytes.get(..length);
                }
            } else if let Some(place) = self.bytes.get_mut(self.length) {
                *place = byte;
                self.length += 1;
            }
        }
        None
    }
}
