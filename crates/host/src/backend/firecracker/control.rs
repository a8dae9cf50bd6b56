//! Driving a running Firecracker. It tells nothing unasked, so what an accepted call means for the
//! machine's life is said here; its end is seen by the warden.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use lodge_machine::Seen;
use lodge_machine::host::Command;
use lodge_spec::state::Traffic;
use serde_json::{Value, json};
use tokio::net::unix::pipe;

use super::plan::{CONTENTS, STATE};
use crate::backend::api::{Api, ApiError};

/// A line of what it has counted is not longer.
const MAX_LINE: usize = 1 << 20;

/// A running Firecracker.
#[derive(Clone)]
pub struct Control {
    api: Api,
    counter: Arc<Counter>,
}

/// Counts until nobody wants to know any more.
struct Counter {
    counted: Arc<Counted>,
    task: tokio::task::AbortHandle,
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What it has counted. It writes the difference to what it wrote before into a pipe, when asked
/// and each minute; whoever reads adds it up.
#[derive(Default)]
struct Counted {
    pipe: Option<pipe::Receiver>,
    sum: Mutex<(Traffic, Vec<u8>)>,
}

impl Control {
    /// `folder`: of the host, where its socket is.
    pub fn new(folder: &Path) -> Self {
        let api = Api::new(&socket(folder));
        // A machine that an earlier version started has none.
        let pipe = open_pipe(&metrics(folder)).ok();
        let counted = Arc::new(Counted { pipe, sum: Mutex::default() });
        let task = tokio::spawn(keep_reading(counted.clone())).abort_handle();
        Self { api, counter: Arc::new(Counter { counted, task }) }
    }

    pub async fn is_paused(&self) -> Result<bool, ApiError> {
        let told = self.api.call("GET", "/", &Value::Null).await?;
        Ok(told["state"] == json!("Paused"))
    }

    /// What is done, and what follows from it at once.
    pub async fn command(&self, command: Command) -> Result<Option<Seen>, String> {
        let text = |e: ApiError| e.to_string();
        let (verb, path, body, seen) = match command {
            Command::Pause => ("PATCH", "/vm", json!({"state": "Paused"}), Some(Seen::Paused)),
            Command::Resume => ("PATCH", "/vm", json!({"state": "Resumed"}), Some(Seen::Resumed)),
            Command::Powerdown => {
                // It has no power button; guests that know a keyboard take this for one.
                ("PUT", "/actions", json!({"action_type": "SendCtrlAltDel"}), None)
            }
            Command::Quit => return Err("firecracker ends when it is ended".into()),
            Command::Reset => {
                return Err("firecracker has no reset button; restart the machine".into());
            }
        };
        self.api.call(verb, path, &body).await.map_err(text)?;
        Ok(seen)
    }

    /// Stops the guest and writes its memory to the folder that its jail has for this.
    pub async fn save(&self) -> Result<(), String> {
        let text = |e: ApiError| e.to_string();
        if !self.is_paused().await.map_err(text)? {
            self.api.call("PATCH", "/vm", &json!({"state": "Paused"})).await.map_err(text)?;
        }
        let body = json!({
            "snapshot_type": "Full",
            "snapshot_path": STATE,
            "mem_file_path": CONTENTS,
        });
        self.api.call_for_long("PUT", "/snapshot/create", &body).await.map(drop).map_err(text)
    }

    /// Plugs memory in, or asks the guest for some back. Bytes: in all, and the most that was said
    /// when it was started.
    pub async fn set_memory(&self, bytes: u64, most: u64) -> Result<(), String> {
        let text = |e: ApiError| e.to_string();
        let told = self.api.call("GET", "/hotplug/memory", &Value::Null).await.map_err(text)?;
        let room = told["total_size_mib"].as_u64().unwrap_or(0);
        let start = (most >> 20).saturating_sub(room);
        let more = (bytes >> 20).checked_sub(start);
        let more = more.ok_or_else(|| format!("it was started with {start} MiB, which stay"))?;
        let body = json!({"requested_size_mib": more});
        self.api.call("PATCH", "/hotplug/memory", &body).await.map(drop).map_err(text)
    }

    /// What the disks have carried since this daemon knows the machine.
    pub async fn disk_traffic(&self) -> Result<Traffic, ApiError> {
        self.api.call("PUT", "/actions", &json!({"action_type": "FlushMetrics"})).await?;
        // It has written before it has answered.
        Ok(self.counter.counted.take_in())
    }
}

impl Counted {
    /// Adds up what lies in the pipe.
    fn take_in(&self) -> Traffic {
        let mut sum = self.sum.lock().expect("not poisoned");
        let (traffic, rest) = &mut *sum;
        let mut buffer = [0; 8192];
        while let Some(Ok(count @ 1..)) = self.pipe.as_ref().map(|pipe| pipe.try_read(&mut buffer))
        {
            rest.extend_from_slice(&buffer[..count]);
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                add(traffic, &rest[..end]);
                rest.drain(..=end);
            }
            if rest.len() > MAX_LINE {
                rest.clear();
            }
        }
        *traffic
    }
}

fn add(traffic: &mut Traffic, line: &[u8]) {
    let line: Value = serde_json::from_slice(line).unwrap_or_default();
    let count = |name: &str| line["block"][name].as_u64().unwrap_or(0);
    let more = |sum: &mut u64, name: &str| *sum = sum.saturating_add(count(name));
    more(&mut traffic.in_bytes, "read_bytes");
    more(&mut traffic.out_bytes, "write_bytes");
    more(&mut traffic.in_operations, "read_count");
    more(&mut traffic.out_operations, "write_count");
}

/// Keeps the pipe from filling up.
async fn keep_reading(counted: Arc<Counted>) {
    let Some(pipe) = &counted.pipe else { return };
    while pipe.readable().await.is_ok() {
        counted.take_in();
    }
}

/// The pipe lies in a folder of the hypervisor's: nothing else that lies there instead is opened.
fn open_pipe(path: &Path) -> io::Result<pipe::Receiver> {
    use rustix::fs::{FileType, Mode, OFlags};
    // For writing too, so that it does not end while nobody writes.
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let pipe = rustix::fs::open(path, flags, Mode::empty())?;
    match FileType::from_raw_mode(rustix::fs::fstat(&pipe)?.st_mode) {
        FileType::Fifo => pipe::Receiver::from_owned_fd_unchecked(pipe),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Where it writes what it has counted, as the host sees it.
pub fn metrics(folder: &Path) -> PathBuf {
    folder.join("metrics")
}

/// The socket that it makes itself, as the host sees it.
pub fn socket(folder: &Path) -> PathBuf {
    folder.join("api.sock")
}
