//! HTTP over a Unix socket, as the small hypervisors speak it: one request, one answer, one
//! connection. Knows the wire, not what the calls mean.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::fdpass::WithFd;

/// An answer takes at most this long before the hypervisor counts as stuck.
const PATIENCE: Duration = Duration::from_secs(30);
/// The socket of a hypervisor that has just been started is there within this.
const BEGINNING: Duration = Duration::from_secs(5);
const MAX_ANSWER: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("the hypervisor's control socket: {0}")]
    Io(#[from] io::Error),
    #[error("the hypervisor's control socket: {0}")]
    Http(#[from] hyper::Error),
    #[error("the hypervisor refused {call}: {text}")]
    Refused { call: String, status: u16, text: String },
    #[error("the hypervisor did not answer {0}")]
    Silent(String),
}

/// A hypervisor's API.
#[derive(Clone, Debug)]
pub struct Api {
    socket: PathBuf,
}

impl Api {
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Waits until the socket is there and accepts.
    pub async fn await_socket(&self) -> Result<(), ApiError> {
        let mut pause = Duration::from_micros(500);
        let deadline = tokio::time::Instant::now() + BEGINNING;
        loop {
            match UnixStream::connect(&self.socket).await {
                Ok(_) => return Ok(()),
                Err(error) if tokio::time::Instant::now() > deadline => return Err(error.into()),
                // Nothing tells of a socket that another process makes but looking for it.
                Err(_) => tokio::time::sleep(pause).await,
            }
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    /// One call. The answer is null where there is none.
    pub async fn call(&self, verb: &str, path: &str, body: &Value) -> Result<Value, ApiError> {
        self.ask_soon(verb, path, body, None).await
    }

    /// One call that takes as long as it takes: the hypervisor's end is its end too.
    pub async fn call_for_long(
        &self,
        verb: &str,
        path: &str,
        body: &Value,
    ) -> Result<Value, ApiError> {
        self.ask(verb, path, body, None).await
    }

    /// One call that hands over a descriptor.
    pub async fn call_with_fd(
        &self,
        verb: &str,
        path: &str,
        body: &Value,
        fd: OwnedFd,
    ) -> Result<Value, ApiError> {
        self.ask_soon(verb, path, body, Some(fd)).await
    }

    /// Waits no longer than a hypervisor that is not stuck would take.
    async fn ask_soon(
        &self,
        verb: &str,
        path: &str,
        body: &Value,
        fd: Option<OwnedFd>,
    ) -> Result<Value, ApiError> {
        let silent = || ApiError::Silent(format!("{verb} {path}"));
        let asking = self.ask(verb, path, body, fd);
        tokio::time::timeout(PATIENCE, asking).await.map_err(|_| silent())?
    }

    async fn ask(
        &self,
        verb: &str,
        path: &str,
        body: &Value,
        fd: Option<OwnedFd>,
    ) -> Result<Value, ApiError> {
        let stream = WithFd::new(UnixStream::connect(&self.socket).await?, fd);
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // It ends with the answer; what goes wrong in between is the answer's error.
        let conversation = tokio::spawn(connection);
        let content =
            if body.is_null() { Vec::new() } else { serde_json::to_vec(body).unwrap_or_default() };
        let request = http::Request::builder()
            .method(verb)
            .uri(path)
            .header("host", "localhost")
            .header("accept", "application/json")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(content)))
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        let whole = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        let whole = whole.map_err(io::Error::other)?.to_bytes();
        conversation.abort();
        if status.is_success() {
            return Ok(serde_json::from_slice(&whole).unwrap_or(Value::Null));
        }
        let text = String::from_utf8_lossy(&whole).into_owned();
        // One of them wraps its reason, the other sends a list of them.
        let value: Value = serde_json::from_str(&text).unwrap_or_default();
        let reasons = value.as_array().into_iter().flatten().filter_map(Value::as_str);
        let reasons: Vec<&str> = reasons.collect();
        let text = match value["fault_message"].as_str() {
            Some(fault) => fault.to_owned(),
            None if !reasons.is_empty() => reasons.join(": "),
            None => text,
        };
        Err(ApiError::Refused { call: format!("{verb} {path}"), status: status.as_u16(), text })
    }
}
