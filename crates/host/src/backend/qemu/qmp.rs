//! QEMU's control protocol over a Unix socket: requests with answers, and events as they come.
//! Knows the wire, not what the commands mean.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

use crate::fdpass;

/// An answer takes at most this long before QEMU counts as stuck.
const PATIENCE: Duration = Duration::from_secs(30);
/// One that is just starting among hundreds has more; its end is noticed by others.
const BEGINNING: Duration = Duration::from_secs(120);
/// A line longer than this is not QEMU's.
const MAX_LINE: u64 = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    #[error("QEMU's control socket: {0}")]
    Io(#[from] std::io::Error),
    #[error("QEMU refused {command}: {text}")]
    Refused { command: String, text: String },
    #[error("QEMU did not answer {0}")]
    Silent(String),
    #[error("QEMU is gone")]
    Gone,
}

/// Something that QEMU tells unasked.
#[derive(Clone, Debug, PartialEq)]
pub struct QmpEvent {
    pub name: String,
    pub data: Value,
}

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<Value, String>>>>>;

/// A connection that has agreed on its capabilities.
pub struct Qmp {
    // Locked for one line at a time, so that requests do not mix.
    writer: tokio::sync::Mutex<(OwnedWriteHalf, u64)>,
    waiting: Waiting,
    /// Closed when QEMU is gone.
    gone: tokio::sync::watch::Receiver<()>,
}

impl Qmp {
    /// Connects; events go to the receiver, which ends when QEMU does.
    pub async fn connect(
        path: &Path,
    ) -> Result<(Arc<Self>, mpsc::UnboundedReceiver<QmpEvent>), QmpError> {
        let stream = UnixStream::connect(path).await?;
        let (reader, writer) = stream.into_split();
        let (events, receiver) = mpsc::unbounded_channel();
        let waiting = Waiting::default();
        let (there, gone) = tokio::sync::watch::channel(());
        let reading = read(BufReader::new(reader), waiting.clone(), events);
        tokio::spawn(async move {
            reading.await;
            drop(there);
        });
        let writer = tokio::sync::Mutex::new((writer, 0));
        let qmp = Arc::new(Self { writer, waiting, gone });
        qmp.send("qmp_capabilities", Value::Null, None, BEGINNING).await?;
        Ok((qmp, receiver))
    }

    /// Waits for QEMU's end.
    pub async fn gone(&self) {
        // Nothing is ever sent.
        let _ = self.gone.clone().changed().await;
    }

    pub async fn ask(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.send(command, arguments, None, PATIENCE).await
    }

    /// Hands a descriptor over with the command, as `add-fd` and `getfd` want it.
    pub async fn ask_with_fd(
        &self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, QmpError> {
        self.send(command, arguments, Some(fd), PATIENCE).await
    }

    async fn send(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        patience: Duration,
    ) -> Result<Value, QmpError> {
        let (sender, answer) = oneshot::channel();
        let mut locked = self.writer.lock().await;
        let (writer, last) = &mut *locked;
        *last += 1;
        let id = *last;
        let mut request = json!({"execute": command, "id": id});
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let line = format!("{request}\n");
        self.waiting.lock().expect("not poisoned").insert(id, sender);
        fdpass::send_bytes(writer.as_ref(), line.as_bytes(), fd).await?;
        drop(locked);
        match tokio::time::timeout(patience, answer).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(text))) => Err(QmpError::Refused { command: command.to_owned(), text }),
            Ok(Err(_)) => Err(QmpError::Gone),
            Err(_) => Err(QmpError::Silent(command.to_owned())),
        }
    }
}

async fn read(
    mut reader: BufReader<OwnedReadHalf>,
    waiting: Waiting,
    events: mpsc::UnboundedSender<QmpEvent>,
) {
    use tokio::io::AsyncReadExt;
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line).await;
        if !matches!(read, Ok(n) if n > 0) {
            break;
        }
        let Ok(mut message) = serde_json::from_slice::<Value>(&line) else { break };
        if let Some(name) = message["event"].as_str() {
            let event = QmpEvent { name: name.to_owned(), data: message["data"].take() };
            // Nobody may be listening any more; answers still matter.
            let _ = events.send(event);
        } else if let Some(id) = message["id"].as_u64() {
            let asked = waiting.lock().expect("not poisoned").remove(&id);
            let answer = match message["error"]["desc"].as_str() {
                Some(text) => Err(text.to_owned()),
                None => Ok(message["return"].take()),
            };
            if let Some(asked) = asked {
                let _ = asked.send(answer);
            }
        }
    }
    // Dropping the senders tells everyone who waits that QEMU is gone.
    waiting.lock().expect("not poisoned").clear();
}
