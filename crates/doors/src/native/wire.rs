//! The native socket: one request a line, then one reply a line until the connection closes. Both
//! are the JSON of `lodge_spec::request`. Only the socket's owner and root may ask.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lodge_spec::request::{Refusal, Reply, Request};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use crate::control::Control;

/// A request longer than this is refused.
const MAX_REQUEST: u64 = 8 << 20;

/// Serves until the listener fails.
pub async fn serve(listener: UnixListener, control: Arc<impl Control>) -> io::Result<()> {
    let own = rustix::process::geteuid().as_raw();
    loop {
        let (stream, _) = listener.accept().await?;
        let peer = stream.peer_cred().map(|c| c.uid());
        if !matches!(peer, Ok(uid) if uid == own || uid == 0) {
            continue;
        }
        let control = control.clone();
        tokio::spawn(async move {
            // A client that goes away in the middle is no fault of ours.
            let _ = converse(stream, control).await;
        });
    }
}

async fn converse(stream: UnixStream, control: Arc<impl Control>) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader).take(MAX_REQUEST);
    let mut line = Vec::new();
    loop {
        line.clear();
        reader.set_limit(MAX_REQUEST);
        if reader.read_until(b'\n', &mut line).await? == 0 {
            return Ok(());
        }
        let request: Request = match serde_json::from_slice(&line) {
            Ok(request) => request,
            Err(error) => {
                let refusal = Refusal::failed(format!("not a request: {error}"));
                return send(&mut writer, &Reply::Refused { refusal }).await;
            }
        };
        let (replies, mut received) = mpsc::channel(16);
        let control = control.clone();
        // What was asked is done even if nobody waits for the answer.
        tokio::spawn(async move { control.ask(request, replies).await });
        let mut ended = [0; 1];
        loop {
            tokio::select! {
                reply = received.recv() => match reply {
                    Some(reply) => send(&mut writer, &reply).await?,
                    None => break,
                },
                // Nothing is asked while something is answered: this is the end.
                _ = reader.read(&mut ended) => return Ok(()),
            }
        }
        writer.write_all(b"\n").await?;
    }
}

async fn send(writer: &mut (impl AsyncWriteExt + Unpin), reply: &Reply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    writer.write_all(&line).await
}

/// The client's side of the socket.
pub struct Client {
    reader: BufReader<tokio::net::unix::OwnedReadHalf>,
    writer: tokio::net::unix::OwnedWriteHalf,
    path: PathBuf,
}

impl Client {
    pub async fn connect(path: &Path) -> io::Result<Self> {
        let (reader, writer) = UnixStream::connect(path).await?.into_split();
        Ok(Self { reader: BufReader::new(reader), writer, path: path.to_owned() })
    }

    /// A second conversation with the same daemon.
    pub async fn another(&self) -> io::Result<Self> {
        Self::connect(&self.path).await
    }

    pub async fn send(&mut self, request: &Request) -> io::Result<()> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.writer.write_all(&line).await
    }

    /// The next reply. `None`: there are no more to this request.
    pub async fn next(&mut self) -> io::Result<Option<Reply>> {
        let mut line = String::new();
        if self.reader.read_line(&mut line).await? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the daemon went away"));
        }
        if line == "\n" {
            return Ok(None);
        }
        Ok(Some(serde_json::from_str(&line)?))
    }

    /// One request, one reply.
    pub async fn ask(&mut self, request: &Request) -> io::Result<Result<Reply, Refusal>> {
        self.send(request).await?;
        let mut last = Ok(Reply::Done);
        while let Some(reply) = self.next().await? {
            last = match reply {
                Reply::Refused { refusal } => Err(refusal),
                reply => Ok(reply),
            };
        }
        Ok(last)
    }
}
