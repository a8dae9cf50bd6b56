//! Puts pieces where they belong, neighbours in one write.

use std::io::{self, Seek, SeekFrom, Write};

/// Pieces are gathered up to this size.
const ENOUGH: usize = 1 << 20;
/// Between neighbours there may be so many zeroes: the rest of a block.
const GAP: u64 = 4096;

pub(super) struct Sink<W> {
    out: W,
    /// Where `pending` begins.
    at: u64,
    pending: Vec<u8>,
}

impl<W: Write + Seek> Sink<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, at: 0, pending: Vec::with_capacity(ENOUGH) }
    }

    pub(super) fn put(&mut self, position: u64, bytes: &[u8]) -> io::Result<()> {
        let end = self.at + self.pending.len() as u64;
        let gap = position.checked_sub(end).filter(|gap| *gap < GAP && !self.pending.is_empty());
        match gap {
            Some(gap) if self.pending.len() + gap as usize + bytes.len() <= ENOUGH => {
                self.pending.resize(self.pending.len() + gap as usize, 0);
            }
            _ => {
                self.write()?;
                self.at = position;
            }
        }
        self.pending.extend_from_slice(bytes);
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        if !self.pending.is_empty() {
            self.out.seek(SeekFrom::Start(self.at))?;
            self.out.write_all(&self.pending)?;
            self.pending.clear();
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> io::Result<W> {
        self.write()?;
        Ok(self.out)
    }
}
