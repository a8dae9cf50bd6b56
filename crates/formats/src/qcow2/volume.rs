//! What a guest sees of a qcow2 image without layers below it: read, and written anew.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom, Write};

use super::{CLUSTER, CLUSTER_BITS, Error, MAGIC, read};

/// Bits 9 to 55: where a cluster or a table is.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ALL_ZERO: u64 = 1;

/// Reads an image as the disk that it stands for.
pub struct Reader<R> {
    input: R,
    size: u64,
    bits: u32,
    tables: Vec<u64>,
    /// The table read last: its number and its entries.
    table: Option<(usize, Vec<u64>)>,
    /// The compressed cluster read last: its entry and its bytes.
    unpacked: Option<(u64, Vec<u8>)>,
    position: u64,
}

impl<R: Read + Seek> Reader<R> {
    /// Refuses layers, encryption and data in another file.
    pub fn open(mut input: R) -> Result<Self, Error> {
        let header = read(&mut input)?;
        if header.backing_file.is_some() {
            return Err(Error::Damaged("it is a layer above another image"));
        }
        if header.encrypted || header.external_data {
            return Err(Error::Damaged("encrypted, or with data in another file"));
        }
        let mut fields = [0; 28];
        input.seek(SeekFrom::Start(20))?;
        input.read_exact(&mut fields)?;
        let bits = u32_at(&fields, 0);
        let (count, at) = (u32_at(&fields, 16), u64_at(&fields, 20));
        let covers = 1_u64 << (2 * bits - 3);
        if u64::from(count) < header.virtual_size.div_ceil(covers) || count > 1 << 22 {
            return Err(Error::Damaged("a table of tables of an impossible length"));
        }
        let mut bytes = vec![0; count as usize * 8];
        input.seek(SeekFrom::Start(at))?;
        input.read_exact(&mut bytes)?;
        Ok(Self {
            input,
            size: header.virtual_size,
            bits,
            tables: bytes.chunks(8).map(|n| u64_at(n, 0) & OFFSET).collect(),
            table: None,
            unpacked: None,
            position: 0,
        })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn entry(&mut self, cluster: u64) -> io::Result<u64> {
        let per_table = 1_u64 << (self.bits - 3);
        let (number, within) = ((cluster / per_table) as usize, (cluster % per_table) as usize);
        if let Some((loaded, entries)) = &self.table
            && *loaded == number
        {
            return Ok(entries[within]);
        }
        let at = self.tables.get(number).copied().unwrap_or(0);
        if at == 0 {
            return Ok(0);
        }
        let mut bytes = vec![0; 1 << self.bits];
        self.input.seek(SeekFrom::Start(at))?;
        self.input.read_exact(&mut bytes)?;
        let entries: Vec<u64> = bytes.chunks(8).map(|n| u64_at(n, 0)).collect();
        let entry = entries[within];
        self.table = Some((number, entries));
        Ok(entry)
    }

    fn unpack(&mut self, entry: u64) -> io::Result<&[u8]> {
        if self.unpacked.as_ref().is_none_or(|(known, _)| *known != entry) {
            let shift = 62 - (self.bits - 8);
            let at = entry & ((1 << shift) - 1);
            let sectors = ((entry & (COMPRESSED - 1)) >> shift) + 1;
            let length = sectors * 512 - at % 512;
            self.input.seek(SeekFrom::Start(at))?;
            let packed = (&mut self.input).take(length);
            let mut bytes = Vec::new();
            let mut inflate = flate2::read::DeflateDecoder::new(packed);
            (&mut inflate).take(1 << self.bits).read_to_end(&mut bytes)?;
            if bytes.len() != 1 << self.bits {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a cut-off cluster"));
            }
            self.unpacked = Some((entry, bytes));
        }
        Ok(self.unpacked.as_ref().map_or(&[], |(_, bytes)| bytes))
    }
}

impl<R: Read + Seek> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let cluster = 1_u64 << self.bits;
        let within = self.position % cluster;
        let left = self.size.saturating_sub(self.position).min(cluster - within);
        let length = left.min(buffer.len() as u64) as usize;
        if length == 0 {
            return Ok(0);
        }
        let buffer = &mut buffer[..length];
        match self.entry(self.position / cluster)? {
            entry if entry & COMPRESSED != 0 => {
                let from = within as usize;
                let bytes = self.unpack(entry)?;
                buffer.copy_from_slice(&bytes[from..from + length]);
            }
            entry if entry & OFFSET == 0 || entry & ALL_ZERO != 0 => buffer.fill(0),
            entry => {
                self.input.seek(SeekFrom::Start((entry & OFFSET) + within))?;
                self.input.read_exact(buffer)?;
            }
        }
        self.position += length as u64;
        Ok(length)
    }
}

impl<R> Seek for Reader<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.position = target(to, self.position, self.size)?;
        Ok(self.position)
    }
}

fn target(to: SeekFrom, now: u64, end: u64) -> io::Result<u64> {
    let place = match to {
        SeekFrom::Start(at) => Some(at),
        SeekFrom::Current(by) => now.checked_add_signed(by),
        SeekFrom::End(by) => end.checked_add_signed(by),
    };
    place.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Writes a new image: only what is written to takes room, in the order in which it is written.
pub struct Writer<W> {
    out: W,
    size: u64,
    position: u64,
    /// Where each of the disk's clusters is in the file.
    places: BTreeMap<u64, u64>,
    /// Clusters of the file in use; the first is the header's.
    used: u64,
}

impl<W: Write + Seek> Writer<W> {
    /// `out` is empty. The image is not one before `finish`.
    pub fn new(out: W, size: u64) -> Self {
        Self { out, size, position: 0, places: BTreeMap::new(), used: 1 }
    }

    /// Writes the tables and the header.
    pub fn finish(mut self) -> io::Result<W> {
        let per_table = CLUSTER / 8;
        let entries = self.size.div_ceil(CLUSTER * per_table).max(1);
        let mut tables = vec![0u8; (entries * 8).next_multiple_of(CLUSTER) as usize];
        let copied = |at: u64| (at | 1 << 63).to_be_bytes();
        let places = std::mem::take(&mut self.places);
        let mut rest = places.iter().peekable();
        while let Some((cluster, _)) = rest.peek() {
            let number = **cluster / per_table;
            let mut table = vec![0u8; CLUSTER as usize];
            while let Some((cluster, at)) = rest.next_if(|(c, _)| **c / per_table == number) {
                let entry = (cluster % per_table * 8) as usize;
                table[entry..entry + 8].copy_from_slice(&copied(*at));
            }
            let at = self.append(&table)?;
            tables[number as usize * 8..][..8].copy_from_slice(&copied(at));
        }
        let tables_at = self.append(&tables)?;
        // Counts of references: one for each cluster, those of the counts themselves included.
        let per_block = CLUSTER / 2;
        let mut blocks = self.used.div_ceil(per_block);
        let table_clusters = |blocks: u64| (blocks * 8).div_ceil(CLUSTER);
        while (self.used + blocks + table_clusters(blocks)).div_ceil(per_block) > blocks {
            blocks += 1;
        }
        let total = self.used + blocks + table_clusters(blocks);
        let mut counts = vec![0u8; (blocks * CLUSTER) as usize];
        for count in counts.chunks_exact_mut(2).take(total as usize) {
            count.copy_from_slice(&1_u16.to_be_bytes());
        }
        let counts_at = self.append(&counts)?;
        let mut table: Vec<u8> =
            (0..blocks).flat_map(|i| (counts_at + i * CLUSTER).to_be_bytes()).collect();
        table.resize((table_clusters(blocks) * CLUSTER) as usize, 0);
        let table_at = self.append(&table)?;
        let mut head = vec![0u8; CLUSTER as usize];
        let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, MAGIC);
        put(4, &3u32.to_be_bytes());
        put(20, &CLUSTER_BITS.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(36, &(entries as u32).to_be_bytes());
        put(40, &tables_at.to_be_bytes());
        put(48, &table_at.to_be_bytes());
        put(56, &(table_clusters(blocks) as u32).to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &104u32.to_be_bytes());
        self.out.seek(SeekFrom::Start(0))?;
        self.out.write_all(&head)?;
        self.out.flush()?;
        Ok(self.out)
    }

    /// Whole clusters behind what is there; returns where.
    fn append(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let at = self.used * CLUSTER;
        self.out.seek(SeekFrom::Start(at))?;
        self.out.write_all(bytes)?;
        self.used += bytes.len() as u64 / CLUSTER;
        Ok(at)
    }

    /// Where a cluster is, made if it is not there yet.
    fn place(&mut self, cluster: u64) -> u64 {
        let used = &mut self.used;
        *self.places.entry(cluster).or_insert_with(|| {
            *used += 1;
            (*used - 1) * CLUSTER
        })
    }
}

impl<W: Write + Seek> Write for Writer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let left = self.size.saturating_sub(self.position);
        let wanted = (bytes.len() as u64).min(left);
        if wanted == 0 {
            return Ok(0);
        }
        let within = self.position % CLUSTER;
        let first = self.position / CLUSTER;
        let start = self.place(first);
        // Neighbours on the disk that are neighbours in the file too are written at once.
        let mut reach = CLUSTER - within;
        let mut next = first + 1;
        while reach < wanted && self.place(next) == start + (next - first) * CLUSTER {
            reach += CLUSTER;
            next += 1;
        }
        let length = wanted.min(reach);
        self.out.seek(SeekFrom::Start(start + within))?;
        self.out.write_all(&bytes[..length as usize])?;
        self.position += length;
        Ok(length as usize)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl<W> Seek for Writer<W> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.position = target(to, self.position, self.size)?;
        Ok(self.position)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    #[test]
    fn a_disk_is_read_as_it_was_written() {
        let size = 3 << 30;
        let mut writer = Writer::new(Cursor::new(Vec::new()), size);
        let pieces: [(u64, &[u8]); 4] =
            [(1024, b"one"), (200_000, &[7; 300_000]), (70_000, b"two"), (size - 5, b"three")];
        for (at, bytes) in pieces {
            writer.seek(SeekFrom::Start(at)).unwrap();
            writer.write_all(bytes).unwrap();
        }
        assert!(writer.write(b"beyond").is_ok_and(|n| n == 0));
        let file = writer.finish().unwrap().into_inner();
        assert!(file.len() < 2 << 20);
        let mut reader = Reader::open(Cursor::new(file)).unwrap();
        assert_eq!(reader.size(), size);
        for (at, bytes) in pieces {
            let mut read = vec![0; bytes.len()];
            reader.seek(SeekFrom::Start(at)).unwrap();
            reader.read_exact(&mut read).unwrap();
            assert!(read == bytes, "{at}");
        }
        reader.seek(SeekFrom::Start(1 << 30)).unwrap();
        let mut zero = [9; 100];
        reader.read_exact(&mut zero).unwrap();
        assert_eq!(zero, [0; 100]);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(changes: [(u32, u8); 10], start in 0_u64..1 << 21) {
            let mut writer = Writer::new(Cursor::new(Vec::new()), 1 << 21);
            writer.write_all(&[1; 100_000]).unwrap();
            let mut bytes = writer.finish().unwrap().into_inner();
            for (at, value) in changes {
                let at = at as usize % bytes.len();
                bytes[if at.is_multiple_of(2) { at % 104 } else { at }] = value;
            }
            if let Ok(mut reader) = Reader::open(Cursor::new(bytes)) {
                reader.seek(SeekFrom::Start(start)).unwrap();
                let _ = reader.read(&mut [0; 1000]);
            }
        }
    }
}
