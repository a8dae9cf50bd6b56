//! HTTP over a Unix socket, with descriptors. Knows the wire, not what the calls mean.

use std::fs::File;
use std::io::{BufRead, BufReader, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::Value;

/// A request: verb, path, body, and the descriptors that came with it.
pub(crate) struct Call<'a> {
    pub(crate) verb: &'a str,
    pub(crate) path: &'a str,
    pub(crate) body: &'a Value,
    pub(crate) files: Vec<File>,
}

/// Keeps the descriptors that come with the bytes.
struct Incoming {
    stream: UnixStream,
    files: Vec<File>,
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(buffer)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = rustix::net::recvmsg(&self.stream, &mut slices, &mut control, flags)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.files.extend(fds.map(File::from));
            }
        }
        Ok(received.bytes)
    }
}

/// One request after another on each connection; the answer's status and body.
pub(crate) fn serve(listener: &UnixListener, answer: impl Fn(Call) -> (u16, Value)) {
    for stream in listener.incoming() {
        // A caller that breaks off is none of ours.
        let _ = converse(stream.unwrap(), &answer);
    }
}

fn converse(mut stream: UnixStream, answer: &impl Fn(Call) -> (u16, Value)) -> std::io::Result<()> {
    let mut reader = BufReader::new(Incoming { stream: stream.try_clone()?, files: Vec::new() });
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split_whitespace();
        let (verb, path) =
            (words.next().unwrap_or("").to_owned(), words.next().unwrap_or("").to_owned());
        let mut length = 0;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            if header.trim().is_empty() {
                break;
            }
            if let Some(value) = header.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body)? };
        println!("API {verb} {path} {body}\r");
        let files = std::mem::take(&mut reader.get_mut().files);
        let call = Call { verb: &verb, path: &path, body: &body, files };
        let (status, said) = answer(call);
        let said = if said.is_null() { String::new() } else { said.to_string() };
        write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{said}", said.len())?;
    }
}
