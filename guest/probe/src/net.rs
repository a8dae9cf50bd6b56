//! Interfaces: answers who asks for the address, pings, and sends datagrams to port 7 back.

use crate::virtio::{Piece, Queue, Rings, Transport};

/// What stands before every frame.
const HEAD: usize = 12;
const ROOM: usize = 2048;
const BUFFERS: u16 = 4;
/// Protocols.
const ICMP: u8 = 1;
const UDP: u8 = 17;
const ECHO: u16 = 7;

/// Frames that come in, and the one that goes out.
#[repr(C, align(4096))]
pub(crate) struct Frames([[u8; ROOM]; BUFFERS as usize + 1]);

pub(crate) struct Net {
    inwards: Queue,
    outwards: Queue,
    frames: *mut Frames,
    pub(crate) mac: [u8; 6],
    address: [u8; 4],
}

fn word(frame: &[u8], at: usize) -> u16 {
    match frame.get(at..at + 2) {
        Some(&[high, low]) => u16::from_be_bytes([high, low]),
        _ => 0,
    }
}

/// Exchanges two parts of a frame.
fn exchange(frame: &mut [u8], a: usize, b: usize, length: usize) {
    (0..length).for_each(|i| frame.swap(a + i, b + i));
}

impl Net {
    pub(crate) fn new(
        transport: Transport,
        rings: [*mut Rings; 2],
        frames: *mut Frames,
        address: [u8; 4],
    ) -> Option<Self> {
        let [inwards, outwards] = rings;
        let inwards = transport.queue(0, inwards)?;
        let outwards = transport.queue(1, outwards)?;
        transport.go();
        let mut mac = [0; 6];
        for (at, byte) in mac.iter_mut().enumerate() {
            *byte = transport.config(at as u64).read();
        }
        let mut net = Self { inwards, outwards, frames, mac, address };
        (0..BUFFERS).for_each(|buffer| net.offer(buffer));
        Some(net)
    }

    fn place(&self, buffer: u16) -> u64 {
        self.frames as u64 + u64::from(buffer) * ROOM as u64
    }

    fn offer(&mut self, buffer: u16) {
        let piece = Piece { address: self.place(buffer), length: ROOM as u32, write: true };
        self.inwards.give(buffer, &[piece]);
    }

    /// Answers a frame, if there is one that is to be answered.
    pub(crate) fn poll(&mut self) -> bool {
        let Some((buffer, length)) = self.inwards.take() else { return false };
        if buffer >= BUFFERS {
            return false;
        }
        let length = (length as usize).min(ROOM);
        let out = self.place(BUFFERS) as *mut u8;
        // SAFETY: the device has given this buffer back; the outgoing one is not with it either.
        let frame = unsafe {
            core::ptr::copy(self.place(buffer) as *const u8, out, length);
            core::slice::from_raw_parts_mut(out, length)
        };
        let answered = length >= HEAD + 42 && self.answer(frame);
        if answered {
            frame[..HEAD].fill(0);
            let address = out as u64;
            self.outwards.give(0, &[Piece { address, length: length as u32, write: false }]);
            self.outwards.wait();
        }
        self.offer(buffer);
        answered
    }

    /// Makes an answer of a frame.
    fn answer(&self, frame: &mut [u8]) -> bool {
        let frame = &mut frame[HEAD..];
        match word(frame, 12) {
            // Who has the address.
            0x0806 if word(frame, 20) == 1 && frame[38..42] == self.address => {
                frame[21] = 2;
                exchange(frame, 22, 32, 10);
                frame[22..28].copy_from_slice(&self.mac);
            }
            // Without options, and in one piece.
            0x0800 if frame[14] == 0x45 && frame[30..34] == self.address => {
                if word(frame, 20) & 0x3fff != 0 {
                    return false;
                }
                match frame[23] {
                    ICMP if frame[34] == 8 => {
                        frame[34] = 0;
                        let (sum, over) = word(frame, 36).overflowing_add(0x0800);
                        let sum = sum + u16::from(over);
                        frame[36..38].copy_from_slice(&sum.to_be_bytes());
                    }
                    UDP if word(frame, 36) == ECHO => exchange(frame, 34, 36, 2),
                    _ => return false,
                }
                exchange(frame, 26, 30, 4);
            }
            _ => return false,
        }
        exchange(frame, 0, 6, 6);
        frame[6..12].copy_from_slice(&self.mac);
        true
    }
}
