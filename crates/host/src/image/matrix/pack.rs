//! Packing images and taking them out again: gzip that is made on all processors and read by
//! everybody, zstd beside it; the same bytes every time. Digests on the way.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::sync::mpsc;

use flate2::{Compress as Deflate, Compression, FlushCompress, Status};
use md5::Md5;
use sha2::{Digest, Sha512};

use super::Compress;
use crate::image::store::hex;

/// Packed on its own, so that processors can share the work.
const PIECE: usize = 1 << 20;
const GZIP_LEVEL: u32 = 6;
const ZSTD_LEVEL: i32 = 3;

/// Digests of a file, in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Sums {
    pub sha512: String,
    pub md5: String,
    pub bytes: u64,
}

/// Packs a file into another.
pub(super) fn pack(from: &Path, to: &Path, how: Compress) -> io::Result<()> {
    let input = BufReader::with_capacity(PIECE, File::open(from)?);
    let out = BufWriter::with_capacity(PIECE, File::create(to)?);
    let out = match how {
        Compress::Gzip => gzip(input, out)?,
        Compress::Zstd => zstd(input, out)?,
    };
    let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.sync_all()
}

fn zstd<W: Write>(mut input: impl Read, out: W) -> io::Result<W> {
    let mut packer = zstd::Encoder::new(out, ZSTD_LEVEL)?;
    // The bytes are the same for every number of threads but none.
    packer.multithread(processors() as u32)?;
    packer.include_checksum(true)?;
    io::copy(&mut input, &mut packer)?;
    packer.finish()
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// One gzip member, whose pieces are packed side by side and joined in order.
fn gzip<W: Write + Send>(mut input: impl Read, mut out: W) -> io::Result<W> {
    // Deflate, no name, no moment.
    out.write_all(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255])?;
    let (mut sum, mut length) = (crc32fast::Hasher::new(), 0_u32);
    let workers = processors();
    let (mut pieces, mut ended) = (Vec::new(), false);
    while !ended {
        pieces.clear();
        while pieces.len() < 2 * workers && !ended {
            let mut piece = Vec::with_capacity(PIECE);
            input.by_ref().take(PIECE as u64).read_to_end(&mut piece)?;
            sum.update(&piece);
            length = length.wrapping_add(piece.len() as u32);
            ended = piece.len() < PIECE;
            pieces.push(piece);
        }
        let last = pieces.len() - 1;
        let packed = side_by_side(&pieces, workers, |i, piece| deflate(piece, ended && i == last))?;
        packed.iter().try_for_each(|bytes| out.write_all(bytes))?;
    }
    out.write_all(&sum.finalize().to_le_bytes())?;
    out.write_all(&length.to_le_bytes())?;
    Ok(out)
}

/// Does the same with each piece, on so many threads; the results are in the order of the pieces.
fn side_by_side(
    pieces: &[Vec<u8>],
    workers: usize,
    work: impl Fn(usize, &[u8]) -> io::Result<Vec<u8>> + Sync,
) -> io::Result<Vec<Vec<u8>>> {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let (done, results) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..workers.min(pieces.len()) {
            let (done, next, work) = (done.clone(), &next, &work);
            scope.spawn(move || {
                loop {
                    let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let Some(piece) = pieces.get(i) else { return };
                    if done.send((i, work(i, piece))).is_err() {
                        return;
                    }
                }
            });
        }
    });
    drop(done);
    let mut all: Vec<(usize, io::Result<Vec<u8>>)> = results.into_iter().collect();
    all.sort_by_key(|(i, _)| *i);
    all.into_iter().map(|(_, result)| result).collect()
}

fn deflate(piece: &[u8], last: bool) -> io::Result<Vec<u8>> {
    let mut packer = Deflate::new(Compression::new(GZIP_LEVEL), false);
    let mut out = Vec::with_capacity(piece.len() + piece.len() / 1000 + 64);
    let how = if last { FlushCompress::Finish } else { FlushCompress::Sync };
    loop {
        let taken = packer.total_in() as usize;
        let room = out.capacity() - out.len();
        let status =
            packer.compress_vec(&piece[taken..], &mut out, how).map_err(io::Error::other)?;
        let all_in = packer.total_in() as usize == piece.len();
        match (status, last) {
            (Status::StreamEnd, _) => return Ok(out),
            // What was to be said has been said: there was room for more.
            (Status::Ok | Status::BufError, false) if all_in && out.len() < out.capacity() => {
                return Ok(out);
            }
            _ => out.reserve(room.max(1 << 16)),
        }
    }
}

pub(super) fn sums(path: &Path) -> io::Result<Sums> {
    let mut file = File::open(path)?;
    let (mut sha512, mut md5, mut bytes) = (Sha512::new(), Md5::new(), 0);
    let mut buffer = vec![0; PIECE];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => {
                sha512.update(&buffer[..count]);
                md5.update(&buffer[..count]);
                bytes += count as u64;
            }
        }
    }
    Ok(Sums { sha512: hex(&sha512.finalize()), md5: hex(&md5.finalize()), bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Unpacks gzip, of one or many members, to its end: what is cut off, damaged or followed by
    /// something else is refused.
    fn gunzip(input: impl Read, mut out: impl Write) -> io::Result<u64> {
        let mut reader = flate2::bufread::MultiGzDecoder::new(BufReader::new(input));
        io::copy(&mut reader, &mut out)
    }

    fn bytes(length: usize) -> Vec<u8> {
        let mut state = 7_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8 & 0x1f
        };
        (0..length).map(|_| next()).collect()
    }

    #[test]
    fn what_is_packed_is_unpacked_and_always_the_same() {
        for length in [0, 1, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE + 77] {
            let plain = bytes(length);
            let packed = gzip(&plain[..], Vec::new()).unwrap();
            assert_eq!(packed, gzip(&plain[..], Vec::new()).unwrap());
            let mut again = Vec::new();
            gunzip(&packed[..], &mut again).unwrap();
            assert!(again == plain, "{length}");
            let packed = zstd(&plain[..], Vec::new()).unwrap();
            assert_eq!(packed, zstd(&plain[..], Vec::new()).unwrap());
            assert!(zstd::decode_all(&packed[..]).unwrap() == plain, "{length}");
        }
        let noise: Vec<u8> = (0..3 * PIECE).map(|i| (i * i / 7) as u8).collect();
        let mut again = Vec::new();
        gunzip(&gzip(&noise[..], Vec::new()).unwrap()[..], &mut again).unwrap();
        assert!(again == noise);
    }

    #[test]
    fn case_d9_what_is_cut_off_or_has_more_behind_it_is_refused() {
        let packed = gzip(&bytes(100_000)[..], Vec::new()).unwrap();
        let cut = &packed[..packed.len() / 2];
        assert!(gunzip(cut, io::sink()).is_err());
        let more = [&packed[..], b"garbage"].concat();
        assert!(gunzip(&more[..], io::sink()).is_err());
    }
}
