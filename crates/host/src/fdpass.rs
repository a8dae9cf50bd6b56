//! JSON lines over Unix sockets, some with a descriptor attached. The messages between daemon,
//! wardens and network keepers travel this way; nothing here knows what they say.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;

/// Lines longer than this end the conversation.
const MAX_LINE: usize = 8 << 20;

fn send_once(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    let slices = [IoSlice::new(bytes)];
    Ok(rustix::net::sendmsg(socket, &slices, &mut control, SendFlags::NOSIGNAL)?)
}

fn receive_once(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = rustix::net::recvmsg(socket, &mut slices, &mut control, flags)?;
    let mut fd = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            fd = fds.into_iter().next().or(fd);
        }
    }
    Ok((received.bytes, fd))
}

/// Waits for one descriptor, without a runtime.
pub(crate) fn receive_fd(socket: &impl AsFd) -> io::Result<OwnedFd> {
    let (_, fd) = receive_once(socket.as_fd(), &mut [0])?;
    fd.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "nobody sent it"))
}

fn to_line(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// Sends bytes, a descriptor with the first of them.
pub(crate) async fn send_bytes(
    stream: &UnixStream,
    mut bytes: &[u8],
    mut fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    while !bytes.is_empty() {
        let send = || send_once(stream.as_fd(), bytes, fd);
        let sent = stream.async_io(Interest::WRITABLE, send).await?;
        fd = None;
        bytes = &bytes[sent..];
    }
    Ok(())
}

pub(crate) async fn send(
    stream: &UnixStream,
    message: &impl Serialize,
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    send_bytes(stream, &to_line(message)?, fd).await
}

/// A stream that hands a descriptor over with the first bytes written.
pub(crate) struct WithFd {
    stream: UnixStream,
    fd: Option<OwnedFd>,
}

impl WithFd {
    pub(crate) fn new(stream: UnixStream, fd: Option<OwnedFd>) -> Self {
        Self { stream, fd }
    }
}

impl AsyncRead for WithFd {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for WithFd {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let Some(fd) = &this.fd else {
            return Pin::new(&mut this.stream).poll_write(context, bytes);
        };
        loop {
            ready!(this.stream.poll_write_ready(context))?;
            let send = || send_once(this.stream.as_fd(), bytes, Some(fd.as_fd()));
            match this.stream.try_io(Interest::WRITABLE, send) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => {
                    this.fd = None;
                    return Poll::Ready(sent);
                }
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Reads lines and the descriptors that came with them.
#[derive(Default)]
pub(crate) struct Lines {
    buffer: Vec<u8>,
    fd: Option<OwnedFd>,
}

impl Lines {
    /// The next message. `None`: the other side is done.
    pub(crate) async fn next<T: DeserializeOwned>(
        &mut self,
        stream: &UnixStream,
    ) -> io::Result<Option<(T, Option<OwnedFd>)>> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(Some(message));
            }
            let mut chunk = [0; 4096];
            let receive = || receive_once(stream.as_fd(), &mut chunk);
            let (count, fd) = stream.async_io(Interest::READABLE, receive).await?;
            if count == 0 {
                return Ok(None);
            }
            self.put(&chunk[..count], fd)?;
        }
    }

    fn put(&mut self, bytes: &[u8], fd: Option<OwnedFd>) -> io::Result<()> {
        self.buffer.extend_from_slice(bytes);
        self.fd = fd.or(self.fd.take());
        match self.buffer.len() > MAX_LINE {
            true => Err(io::Error::new(io::ErrorKind::InvalidData, "the line is too long")),
            false => Ok(()),
        }
    }

    fn take<T: DeserializeOwned>(&mut self) -> io::Result<Option<(T, Option<OwnedFd>)>> {
        let Some(end) = self.buffer.iter().position(|b| *b == b'\n') else { return Ok(None) };
        let message = serde_json::from_slice(&self.buffer[..end])?;
        self.buffer.drain(..=end);
        Ok(Some((message, self.fd.take())))
    }
}

/// One question and its answer, before there is a runtime.
pub(crate) fn ask_blocking<T: DeserializeOwned>(
    stream: &StdStream,
    question: &impl Serialize,
) -> io::Result<(T, Option<OwnedFd>)> {
    let line = to_line(question)?;
    let mut sent = 0;
    while sent < line.len() {
        sent += send_once(stream.as_fd(), &line[sent..], None)?;
    }
    let mut lines = Lines::default();
    loop {
        let mut chunk = [0; 4096];
        let (count, fd) = receive_once(stream.as_fd(), &mut chunk)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        lines.put(&chunk[..count], fd)?;
        if let Some(message) = lines.take()? {
            return Ok(message);
        }
    }
}
