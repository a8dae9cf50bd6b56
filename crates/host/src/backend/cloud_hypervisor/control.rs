//! Driving a running Cloud Hypervisor. What an accepted call means for the machine's life is said
//! here; its end is seen by the warden.

use std::os::fd::OwnedFd;
use std::path::Path;

use lodge_machine::Seen;
use lodge_machine::host::Command;
use lodge_spec::machine::{Disk, DiskBus, Nic};
use lodge_spec::state::Traffic;
use serde_json::{Value, json};

use super::plan::{MEMORY_URL, disk_id, nic_id, plugged_inside};
use crate::backend::api::{Api, ApiError};

/// A running Cloud Hypervisor.
#[derive(Clone)]
pub struct Control {
    api: Api,
}

impl Control {
    pub fn new(socket: &Path) -> Self {
        Self { api: Api::new(socket) }
    }

    async fn put(&self, call: &str, body: &Value) -> Result<Value, ApiError> {
        self.api.call("PUT", &format!("/api/v1/{call}"), body).await
    }

    async fn get(&self, call: &str) -> Result<Value, ApiError> {
        self.api.call("GET", &format!("/api/v1/{call}"), &Value::Null).await
    }

    pub async fn is_paused(&self) -> Result<bool, ApiError> {
        Ok(self.get("vm.info").await?["state"] == json!("Paused"))
    }

    /// What is done, and what follows from it at once.
    pub async fn command(&self, command: Command) -> Result<Option<Seen>, String> {
        let (call, seen) = match command {
            Command::Pause => ("vm.pause", Some(Seen::Paused)),
            Command::Resume => ("vm.resume", Some(Seen::Resumed)),
            Command::Powerdown => ("vm.power-button", None),
            Command::Quit => ("vmm.shutdown", None),
            Command::Reset => ("vm.reboot", Some(Seen::GuestReset)),
        };
        self.put(call, &Value::Null).await.map_err(|e| e.to_string())?;
        Ok(seen)
    }

    /// Stops the guest and writes its memory to the folder that its jail has for this.
    pub async fn save(&self) -> Result<(), String> {
        let text = |e: ApiError| e.to_string();
        if !self.is_paused().await.map_err(text)? {
            self.put("vm.pause", &Value::Null).await.map_err(text)?;
        }
        let body = json!({"destination_url": MEMORY_URL});
        let saving = self.api.call_for_long("PUT", "/api/v1/vm.snapshot", &body);
        saving.await.map(drop).map_err(text)
    }

    pub async fn set_cpus(&self, count: u32) -> Result<(), String> {
        let body = json!({"desired_vcpus": count});
        self.put("vm.resize", &body).await.map(drop).map_err(|e| e.to_string())
    }

    pub async fn set_memory(&self, bytes: u64) -> Result<(), String> {
        let body = json!({"desired_ram": bytes});
        self.put("vm.resize", &body).await.map(drop).map_err(|e| e.to_string())
    }

    /// Plugs in a disk that is shown under its name among those that are plugged in.
    pub async fn add_disk(&self, disk: &Disk) -> Result<(), String> {
        if disk.bus != DiskBus::Virtio {
            return Err(format!("{}: only virtio disks can be plugged in", disk.name));
        }
        let name = disk.name.as_str();
        let body = json!({
            "path": plugged_inside(name),
            "id": disk_id(name),
            "serial": disk.serial,
            "readonly": disk.read_only,
        });
        self.put("vm.add-disk", &body).await.map(drop).map_err(|e| e.to_string())
    }

    pub async fn add_nic(&self, nic: &Nic, tap: OwnedFd) -> Result<(), String> {
        let mut body = json!({"id": nic_id(nic.name.as_str()), "mac": nic.mac.to_string()});
        if let Some(limit) = &nic.rx_limit {
            body["rate_limiter_config"] = json!({"bandwidth": limit.bucket()});
        }
        let asked = self.api.call_with_fd("PUT", "/api/v1/vm.add-net", &body, tap).await;
        asked.map(drop).map_err(|e| e.to_string())
    }

    /// Asks the guest to let go of a device.
    pub async fn remove(&self, id: &str) -> Result<(), String> {
        let asked = self.put("vm.remove-device", &json!({"id": id})).await;
        asked.map(drop).map_err(|e| e.to_string())
    }

    /// What the disks have carried since the start.
    pub async fn disk_traffic(&self) -> Result<Traffic, ApiError> {
        let counters = self.get("vm.counters").await?;
        let mut sum = Traffic::default();
        for (name, device) in counters.as_object().into_iter().flatten() {
            if !name.starts_with("disk") {
                continue;
            }
            let count = |name: &str| device[name].as_u64().unwrap_or(0);
            sum.in_bytes += count("read_bytes");
            sum.out_bytes += count("write_bytes");
            sum.in_operations += count("read_ops");
            sum.out_operations += count("write_ops");
        }
        Ok(sum)
    }
}
