//! The process between QEMU and a namespace of 0-db: NBD on its standard input, the Redis protocol
//! to the server. Confined before it reads a byte of either. Each block lies under its number, eight
//! bytes, the lowest first; one that is not there is zeroes. Nothing is kept here: what is answered
//! as written, the server has taken.

use std::io::{self, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{ExitCode, Stdio};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use lodge_formats::nbd::{self, Ask, Export, Failure, Request};
use lodge_jail::worker::{self, WorkerPlan};
use lodge_spec::zdb::Zdb;
use serde::{Deserialize, Serialize};

use crate::flist::server::UID;
use crate::flist::store::redis::Redis;
use crate::paths;
use crate::proc::Tool;

/// The first argument of such a process.
pub const WORD: &str = "zdbd";
/// A guest's request waits for the server no longer than this.
const PATIENCE: Duration = Duration::from_secs(20);
/// So many requests are carried out at a time.
const THREADS: usize = 8;
/// Writers of the same block wait for each other; so many locks are shared by all blocks.
const LOCKS: usize = 64;
/// An order is no longer.
const MAX_ORDER: u64 = 64 << 10;

#[derive(Serialize, Deserialize)]
struct Order {
    disk: Zdb,
    read_only: bool,
}

/// Starts one, and waits until it has reached its server. It ends with the connection.
pub(super) fn start(disk: &Zdb, read_only: bool) -> Result<OwnedFd, String> {
    let text = |e: io::Error| format!("the process that serves the disk: {e}");
    let (mut ours, theirs) = UnixStream::pair().map_err(text)?;
    let own = paths::own_program().map_err(text)?;
    let mut command = Tool::new(own).arg(WORD).command().into_std();
    command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null()).stderr(Stdio::null());
    let mut first = command.spawn().map_err(text)?;
    drop(command);
    let order = Order { disk: disk.clone(), read_only };
    let mut line = serde_json::to_vec(&order).map_err(|e| e.to_string())?;
    line.push(b'\n');
    ours.write_all(&line).map_err(text)?;
    // It has left another behind, which is nobody's child.
    first.wait().map_err(text)?;
    // What comes after this line is for the hypervisor.
    let said = line_of(&mut ours).map_err(text)?;
    let said: Result<(), String> = serde_json::from_slice(&said)
        .map_err(|_| "the process that serves the disk ended without a word".to_owned())?;
    said.map(|()| ours.into())
}

/// A line, and not a byte more.
fn line_of(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while from.read(&mut byte)? == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
        if line.len() as u64 > MAX_ORDER {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok(line)
}

/// The whole of a process that `WORD` starts.
pub fn main() -> ExitCode {
    // SAFETY: there is one thread, and nothing is open but the three that we were given.
    match unsafe { libc::fork() } {
        0 => {}
        -1 => return ExitCode::FAILURE,
        _ => return ExitCode::SUCCESS,
    }
    // What ends the session of whoever started us is not meant for the disk.
    let _ = rustix::process::setsid();
    // SAFETY: closes what whoever started us had open for others; nothing here has wrapped it.
    unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) };
    // SAFETY: sets one number of the allocator; threads that wait need no heap each.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 2) };
    let Ok(stdin) = rustix::io::dup(rustix::stdio::stdin()) else { return ExitCode::FAILURE };
    let mut stream = UnixStream::from(stdin);
    let begun = line_of(&mut stream).map_err(|e| e.to_string()).and_then(|line| begin(&line));
    let said = begun.as_ref().map(|_| ()).map_err(String::clone);
    let line = serde_json::to_string(&said).unwrap_or_default();
    if writeln!(stream, "{line}").is_err() {
        return ExitCode::FAILURE;
    }
    let Ok((disk, export)) = begun else { return ExitCode::FAILURE };
    // The client's end is the end.
    let _ = serve(&disk, &stream, &export);
    ExitCode::SUCCESS
}

fn begin(line: &[u8]) -> Result<(Disk, Export), String> {
    let order: Order = serde_json::from_slice(line).map_err(|e| e.to_string())?;
    let uid = rustix::process::geteuid().is_root().then_some(UID);
    worker::confine(&WorkerPlan { uid, ..WorkerPlan::default() }).map_err(|e| e.to_string())?;
    let Order { disk: Zdb { url, size, block }, read_only } = order;
    let url = url::Url::parse(&url).map_err(|e| e.to_string())?;
    let disk = Disk::new(Redis::of(&url)?, block);
    // Whether it is there and lets us in.
    disk.read(0, block)?;
    Ok((disk, Export { bytes: size, read_only, block }))
}

fn serve(disk: &Disk, stream: &UnixStream, export: &Export) -> io::Result<()> {
    let mut from = BufReader::with_capacity(64 << 10, stream.try_clone()?);
    if !nbd::shake_hands(&mut from, &mut stream.try_clone()?, export)? {
        return Ok(());
    }
    let to = Mutex::new(stream.try_clone()?);
    let (sender, receiver) = mpsc::sync_channel::<Request>(THREADS);
    let receiver = Mutex::new(receiver);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let next = receiver.lock().expect("not poisoned").recv();
                    let Ok(Request { cookie, offset, ask }) = next else { return };
                    let done = carry_out(disk, export, offset, &ask);
                    let mut to = to.lock().expect("not poisoned");
                    let done = done.as_deref().map_err(|failure| *failure);
                    if nbd::reply(&mut *to, cookie, done).is_err() {
                        // Ends who reads, too.
                        let _ = to.shutdown(std::net::Shutdown::Both);
                        return;
                    }
                }
            });
        }
        let result = loop {
            match nbd::request(&mut from) {
                Ok(Request { ask: Ask::Disconnect, .. }) => break Ok(()),
                Ok(request) => {
                    if sender.send(request).is_err() {
                        break Ok(());
                    }
                }
                Err(error) => break Err(error),
            }
        };
        // What was asked before is done all the same.
        drop(sender);
        result
    })
}

fn carry_out(disk: &Disk, export: &Export, offset: u64, ask: &Ask) -> Result<Vec<u8>, Failure> {
    let length = match ask {
        Ask::Read { length } => u64::from(*length),
        Ask::Write(data) => data.len() as u64,
        // The server has what it has answered.
        Ask::Flush => return Ok(Vec::new()),
        Ask::Disconnect | Ask::Unknown => return Err(Failure::Invalid),
    };
    if offset.checked_add(length).is_none_or(|end| end > export.bytes) {
        return Err(Failure::Invalid);
    }
    match ask {
        Ask::Read { length } => disk.read(offset, *length).map_err(|_| Failure::Io),
        Ask::Write(_) if export.read_only => Err(Failure::NotPermitted),
        Ask::Write(data) => disk.write(offset, data).map(|()| Vec::new()).map_err(|_| Failure::Io),
        Ask::Flush | Ask::Disconnect | Ask::Unknown => Err(Failure::Invalid),
    }
}

struct Disk {
    server: Redis,
    block: u64,
    locks: Vec<Mutex<()>>,
}

/// A block and the part of it that is meant: where it begins there, and where in the whole.
struct Part {
    number: u64,
    within: usize,
    at: usize,
    length: usize,
}

impl Disk {
    fn new(server: Redis, block: u32) -> Self {
        let locks = (0..LOCKS).map(|_| Mutex::default()).collect();
        Self { server, block: block.into(), locks }
    }

    fn parts(&self, offset: u64, length: usize) -> Vec<Part> {
        let (mut list, mut at) = (Vec::new(), 0);
        while at < length {
            let place = offset + at as u64;
            let (number, within) = (place / self.block, (place % self.block) as usize);
            let part = (self.block as usize - within).min(length - at);
            list.push(Part { number, within, at, length: part });
            at += part;
        }
        list
    }

    /// Blocks as they lie there, in the order of their numbers.
    fn fetch(&self, numbers: &[u64]) -> Result<Vec<Vec<u8>>, String> {
        let keys: Vec<[u8; 8]> = numbers.iter().map(|number| number.to_le_bytes()).collect();
        let asks: Vec<Vec<&[u8]>> = keys.iter().map(|key| vec![&b"GET"[..], key]).collect();
        let said = self.server.all(&asks, Instant::now() + PATIENCE)?;
        let size = self.block as usize;
        said.into_iter()
            .map(|said| match said {
                Some(bytes) if bytes.len() > size => {
                    Err(format!("a block of {} bytes, where blocks have {size}", bytes.len()))
                }
                bytes => {
                    let mut bytes = bytes.unwrap_or_default();
                    bytes.resize(size, 0);
                    Ok(bytes)
                }
            })
            .collect()
    }

    fn read(&self, offset: u64, length: u32) -> Result<Vec<u8>, String> {
        let mut whole = vec![0; length as usize];
        let parts = self.parts(offset, whole.len());
        let numbers: Vec<u64> = parts.iter().map(|part| part.number).collect();
        for (part, block) in parts.iter().zip(self.fetch(&numbers)?) {
            whole[part.at..][..part.length].copy_from_slice(&block[part.within..][..part.length]);
        }
        Ok(whole)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), String> {
        let parts = self.parts(offset, data.len());
        // In the order of the locks, so that two who wait do not wait for each other.
        let locks: std::collections::BTreeSet<usize> =
            parts.iter().map(|part| part.number as usize % LOCKS).collect();
        let _held: Vec<_> =
            locks.iter().map(|lock| self.locks[*lock].lock().expect("not poisoned")).collect();
        // Of blocks that are written in part, the rest stays.
        let cut = |part: &&Part| part.length < self.block as usize;
        let numbers: Vec<u64> = parts.iter().filter(cut).map(|part| part.number).collect();
        let mut kept = self.fetch(&numbers)?.into_iter();
        let blocks: Vec<([u8; 8], Vec<u8>)> = parts
            .iter()
            .map(|part| {
                let new = &data[part.at..][..part.length];
                let block = match cut(&part) {
                    false => new.to_vec(),
                    true => {
                        let mut block = kept.next().unwrap_or_default();
                        block[part.within..][..part.length].copy_from_slice(new);
                        block
                    }
                };
                (part.number.to_le_bytes(), block)
            })
            .collect();
        let asks: Vec<Vec<&[u8]>> =
            blocks.iter().map(|(key, block)| vec![&b"SET"[..], key, block]).collect();
        // 0-db answers with the name, or with nothing where it has the same already.
        self.server.all(&asks, Instant::now() + PATIENCE).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_at_blocks() {
        let url = url::Url::parse("zdb://127.0.0.1:1").unwrap();
        let disk = Disk::new(Redis::of(&url).unwrap(), 512);
        let cut = |offset, length| {
            let parts = disk.parts(offset, length).into_iter();
            parts.map(|p| (p.number, p.within, p.at, p.length)).collect::<Vec<_>>()
        };
        assert_eq!(cut(0, 512), [(0, 0, 0, 512)]);
        assert_eq!(cut(500, 600), [(0, 500, 0, 12), (1, 0, 12, 512), (2, 0, 524, 76)]);
        assert_eq!(cut(1024, 0), []);
        let export = Export { bytes: 4096, read_only: true, block: 512 };
        let done = |offset, ask| carry_out(&disk, &export, offset, &ask).unwrap_err();
        assert_eq!(done(4096, Ask::Read { length: 1 }), Failure::Invalid);
        assert_eq!(done(u64::MAX, Ask::Read { length: 2 }), Failure::Invalid);
        assert_eq!(done(0, Ask::Write(vec![1])), Failure::NotPermitted);
        // Nobody listens there.
        assert_eq!(done(0, Ask::Read { length: 1 }), Failure::Io);
    }
}
