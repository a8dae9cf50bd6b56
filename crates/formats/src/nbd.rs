//! The server's half of the NBD protocol (fixed newstyle, simple replies), for one export and one
//! client: handshake, requests, replies. Pure over a reader and a writer; knows no disk.
//! Source: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>.

use std::io::{self, Read, Write};

/// The first that a server says.
pub const INIT: &[u8; 8] = b"NBDMAGIC";
const OPTION: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;

/// Fixed newstyle, and no zeroes behind an export's description.
const HANDSHAKE_FLAGS: u16 = 0b11;
const NO_ZEROES: u32 = 0b10;

const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const LIST: u32 = 3;
const INFO: u32 = 6;
const GO: u32 = 7;

const ACK: u32 = 1;
const SERVER: u32 = 2;
const TOLD: u32 = 3;
const UNSUPPORTED: u32 = (1 << 31) | 1;
const INVALID: u32 = (1 << 31) | 3;

const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const HAS_FLAGS: u16 = 1;
const READ_ONLY: u16 = 1 << 1;
const SEND_FLUSH: u16 = 1 << 2;
const SEND_FUA: u16 = 1 << 3;

/// An option's data beyond this are not read.
const MAX_OPTION: u32 = 8 << 10;
/// No request reads or writes more bytes; clients are told.
pub const MAX_LENGTH: u32 = 1 << 20;

/// What is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    pub bytes: u64,
    pub read_only: bool,
    /// What requests should be aligned to, in bytes; they need not be.
    pub block: u32,
}

impl Export {
    fn flags(&self) -> u16 {
        HAS_FLAGS | SEND_FLUSH | SEND_FUA | if self.read_only { READ_ONLY } else { 0 }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    Read {
        length: u32,
    },
    Write(Vec<u8>),
    Flush,
    /// The client goes; there is no reply.
    Disconnect,
    /// Not among what was offered.
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Given back with the reply.
    pub cookie: u64,
    pub offset: u64,
    pub ask: Ask,
}

/// Why a request failed; numbers of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Failure {
    NotPermitted = 1,
    Io = 5,
    Invalid = 22,
}

fn number<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes).map(|()| bytes)
}

fn strange(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the client of a disk: {what}"))
}

/// Agrees with a client on the export. `false`: it has gone away again.
pub fn shake_hands(from: &mut impl Read, to: &mut impl Write, export: &Export) -> io::Result<bool> {
    to.write_all(INIT)?;
    to.write_all(OPTION)?;
    to.write_all(&HANDSHAKE_FLAGS.to_be_bytes())?;
    to.flush()?;
    let flags = u32::from_be_bytes(number(from)?);
    if flags & !u32::from(HANDSHAKE_FLAGS) != 0 {
        return Err(strange(format_args!("flags {flags:#x}")));
    }
    loop {
        if number::<8>(from)? != *OPTION {
            return Err(strange("no option where one was due"));
        }
        let option = u32::from_be_bytes(number(from)?);
        let length = u32::from_be_bytes(number(from)?);
        if length > MAX_OPTION {
            return Err(strange(format_args!("an option of {length} bytes")));
        }
        let mut data = vec![0; length as usize];
        from.read_exact(&mut data)?;
        match option {
            EXPORT_NAME => {
                to.write_all(&export.bytes.to_be_bytes())?;
                to.write_all(&export.flags().to_be_bytes())?;
                if flags & NO_ZEROES == 0 {
                    to.write_all(&[0; 124])?;
                }
                to.flush()?;
                return Ok(true);
            }
            ABORT => {
                answer(to, option, ACK, &[])?;
                return Ok(false);
            }
            LIST => {
                // One export, and it has no name.
                answer(to, option, SERVER, &[0; 4])?;
                answer(to, option, ACK, &[])?;
            }
            INFO | GO if !is_information(&data) => answer(to, option, INVALID, &[])?,
            INFO | GO => {
                let mut told = INFO_EXPORT.to_be_bytes().to_vec();
                told.extend(export.bytes.to_be_bytes());
                told.extend(export.flags().to_be_bytes());
                answer(to, option, TOLD, &told)?;
                let mut told = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
                for bytes in [1, export.block, MAX_LENGTH] {
                    told.extend(bytes.to_be_bytes());
                }
                answer(to, option, TOLD, &told)?;
                answer(to, option, ACK, &[])?;
                if option == GO {
                    return Ok(true);
                }
            }
            _ => answer(to, option, UNSUPPORTED, &[])?,
        }
    }
}

/// A name and a list of what is wanted to be known, both of which may be anything.
fn is_information(data: &[u8]) -> bool {
    let Some((length, rest)) = data.split_first_chunk::<4>() else { return false };
    let Some(rest) = rest.get(u32::from_be_bytes(*length) as usize..) else { return false };
    let Some((count, rest)) = rest.split_first_chunk::<2>() else { return false };
    rest.len() == usize::from(u16::from_be_bytes(*count)) * 2
}

fn answer(to: &mut impl Write, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    to.write_all(&OPTION_REPLY.to_be_bytes())?;
    to.write_all(&option.to_be_bytes())?;
    to.write_all(&kind.to_be_bytes())?;
    to.write_all(&(data.len() as u32).to_be_bytes())?;
    to.write_all(data)?;
    to.flush()
}

/// The next request. An error ends the conversation.
pub fn request(from: &mut impl Read) -> io::Result<Request> {
    let magic = u32::from_be_bytes(number(from)?);
    if magic != REQUEST {
        return Err(strange(format_args!("{magic:#x} where a request was due")));
    }
    let _flags: [u8; 2] = number(from)?;
    let kind = u16::from_be_bytes(number(from)?);
    let cookie = u64::from_be_bytes(number(from)?);
    let offset = u64::from_be_bytes(number(from)?);
    let length = u32::from_be_bytes(number(from)?);
    let ask = match kind {
        0 | 1 if length > MAX_LENGTH => {
            return Err(strange(format_args!("a request for {length} bytes")));
        }
        0 => Ask::Read { length },
        1 => {
            let mut data = vec![0; length as usize];
            from.read_exact(&mut data)?;
            Ask::Write(data)
        }
        2 => Ask::Disconnect,
        3 => Ask::Flush,
        _ => Ask::Unknown,
    };
    Ok(Request { cookie, offset, ask })
}

/// Answers a request; `data` is what was read.
pub fn reply(to: &mut impl Write, cookie: u64, done: Result<&[u8], Failure>) -> io::Result<()> {
    let error = done.map_or_else(|failure| failure as u32, |_| 0);
    let mut whole = REPLY.to_be_bytes().to_vec();
    whole.extend(error.to_be_bytes());
    whole.extend(cookie.to_be_bytes());
    whole.extend(done.unwrap_or_default());
    to.write_all(&whole)?;
    to.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EXPORT: Export = Export { bytes: 1 << 30, read_only: false, block: 4096 };

    fn option(number: u32, data: &[u8]) -> Vec<u8> {
        let length = (data.len() as u32).to_be_bytes();
        [OPTION.as_slice(), &number.to_be_bytes(), &length, data].concat()
    }

    #[test]
    fn a_client_asks_for_what_is_there_and_goes_on() {
        let wanted = [0, 0, 0, 1, b'x', 0, 1, 0, 3];
        let said = [
            vec![0, 0, 0, 3],
            option(8, &[]),
            option(GO, &wanted[..6]),
            option(LIST, &[]),
            option(GO, &wanted),
        ];
        let mut heard = Vec::new();
        assert!(shake_hands(&mut said.concat().as_slice(), &mut heard, &EXPORT).unwrap());
        let kinds: Vec<u32> = heard[18..]
            .windows(16)
            .filter(|w| w[..8] == OPTION_REPLY.to_be_bytes())
            .map(|w| u32::from_be_bytes(w[12..16].try_into().unwrap()))
            .collect();
        assert_eq!(kinds, [UNSUPPORTED, INVALID, SERVER, ACK, TOLD, TOLD, ACK]);
        // The old way, with its zeroes.
        let mut heard = Vec::new();
        let said = [vec![0, 0, 0, 1], option(EXPORT_NAME, b"any")].concat();
        assert!(shake_hands(&mut said.as_slice(), &mut heard, &EXPORT).unwrap());
        assert_eq!(heard.len(), 18 + 8 + 2 + 124);
        let said = [vec![0, 0, 0, 3], option(ABORT, &[])].concat();
        assert!(!shake_hands(&mut said.as_slice(), &mut Vec::new(), &EXPORT).unwrap());
        let said = [vec![0, 0, 0, 3], option(GO, &[0; 9000])].concat();
        assert!(shake_hands(&mut said.as_slice(), &mut Vec::new(), &EXPORT).is_err());
    }

    #[test]
    fn requests_are_read_and_answered() {
        let head = |kind: u16, length: u32| {
            let mut head = REQUEST.to_be_bytes().to_vec();
            head.extend([0, 0]);
            head.extend(kind.to_be_bytes());
            head.extend(7_u64.to_be_bytes());
            head.extend(512_u64.to_be_bytes());
            head.extend(length.to_be_bytes());
            head
        };
        let read = |bytes: Vec<u8>| request(&mut bytes.as_slice()).map(|r| r.ask);
        assert_eq!(read(head(0, 9)).unwrap(), Ask::Read { length: 9 });
        let write = [head(1, 2), vec![1, 2]].concat();
        assert_eq!(read(write.clone()).unwrap(), Ask::Write(vec![1, 2]));
        assert_eq!(read(head(3, 0)).unwrap(), Ask::Flush);
        assert_eq!(read(head(4, 0)).unwrap(), Ask::Unknown);
        assert!(read(head(0, MAX_LENGTH + 1)).is_err());
        assert!(read(head(1, u32::MAX)).is_err());
        assert!(read(write[..29].to_vec()).is_err());
        let mut said = Vec::new();
        reply(&mut said, 7, Ok(b"ab")).unwrap();
        reply(&mut said, 8, Err(Failure::Io)).unwrap();
        assert_eq!(said.len(), 16 + 2 + 16);
        assert_eq!((&said[16..18], said[25]), (b"ab".as_slice(), 5));
    }

    proptest! {
        #[test]
        fn whatever_is_said_ends(said in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = shake_hands(&mut said.as_slice(), &mut Vec::new(), &EXPORT);
            let _ = request(&mut said.as_slice());
        }
    }
}
