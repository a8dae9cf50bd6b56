//! Driving a running Firecracker. It tells nothing unasked, so what an accepted call means for the
//! machine's life is said here; its end is seen by the warden.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use lodge_machine::Seen;
use lodge_machine::host::Command;
use lodge_spec::state::Traffic;
use serde_json::{Value, json};

use super::plan::{CONTENTS, STATE};
use crate::backend::api::{Api, ApiError};

/// A running Firecracker.
#[derive(Clone)]
pub struct Control {
    api: Api,
    /// Where it writes what it has counted since it last wrote.
    metrics: PathBuf,
    counted: Arc<Mutex<Traffic>>,
}

impl Control {
    /// `folder`: of the host, where its socket is.
    pub fn new(folder: &Path) -> Self {
        let api = Api::new(&socket(folder));
        Self { api, metrics: folder.join("metrics"), counted: Arc::default() }
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
        let told = std::fs::read_to_string(&self.metrics).unwrap_or_default();
        // Read once: each line is the difference to the one before.
        let _ = std::fs::File::options().write(true).truncate(true).open(&self.metrics);
        let mut counted = self.counted.lock().expect("not poisoned");
        for line in told.lines() {
            let line: Value = serde_json::from_str(line).unwrap_or_default();
            let count = |name: &str| line["block"][name].as_u64().unwrap_or(0);
            counted.in_bytes += count("read_bytes");
            counted.out_bytes += count("write_bytes");
            counted.in_operations += count("read_count");
            counted.out_operations += count("write_count");
        }
        Ok(*counted)
    }
}

/// The socket that it makes itself, as the host sees it.
pub fn socket(folder: &Path) -> PathBuf {
    folder.join("api.sock")
}
