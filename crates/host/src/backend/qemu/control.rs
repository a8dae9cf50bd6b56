//! Driving a running QEMU: verbs, hotplug, and what its events mean. Events carry the state; the
//! answers to verbs only say that they were taken.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use lodge_machine::Seen;
use lodge_machine::host::Command;
use lodge_spec::machine::{Accel, Board, Disk, DiskBus, Nic};
use lodge_spec::request::Question;
use lodge_spec::state::{Device, Traffic};
use serde_json::{Value, json};
use tokio::sync::broadcast;

use super::QemuFacts;
use super::plan::{block_nodes, disk_device, disk_id, nic_device};
use super::qmp::{Qmp, QmpError, QmpEvent};
use super::throttle;
use crate::backend::DiskFiles;

/// A guest has this long to let go of a device.
const UNPLUG_PATIENCE: Duration = Duration::from_secs(10);

/// A running QEMU.
#[derive(Clone)]
pub struct Control {
    qmp: Arc<Qmp>,
    events: broadcast::Sender<QmpEvent>,
}

/// How a guest stands.
pub enum Stands {
    Running,
    /// Until it is resumed.
    Still,
    /// It can never go on; why.
    Broken(String),
}

/// What an event says of a disk that cannot be read or written.
pub fn disk_error(event: &QmpEvent) -> Option<String> {
    if event.name != "BLOCK_IO_ERROR" {
        return None;
    }
    let text = |key: &str| event.data[key].as_str().unwrap_or_default();
    let after = match text("action") {
        "stop" => "; the guest stands still until it is resumed",
        _ => "",
    };
    Some(format!("{} of {}: {}{after}", text("operation"), text("node-name"), text("reason")))
}

/// What an event means for the machine's life; most mean nothing. That it stands still may have a
/// cause, which is asked for.
pub fn meaning(event: &QmpEvent) -> Option<Seen> {
    match event.name.as_str() {
        "STOP" => Some(Seen::Paused),
        "RESUME" => Some(Seen::Resumed),
        "RESET" => Some(Seen::GuestReset),
        "GUEST_PANICKED" => Some(Seen::Panicked("the guest reported a panic".into())),
        _ => None,
    }
}

impl Control {
    pub fn new(qmp: Arc<Qmp>) -> Self {
        Self { qmp, events: broadcast::channel(64).0 }
    }

    pub(super) fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Events from now on.
    pub(super) fn events(&self) -> broadcast::Receiver<QmpEvent> {
        self.events.subscribe()
    }

    /// Passes an event on to those who wait for one.
    pub fn saw(&self, event: &QmpEvent) {
        let _ = self.events.send(event.clone());
    }

    pub async fn stands(&self) -> Result<Stands, QmpError> {
        let status = self.qmp.ask("query-status", Value::Null).await?;
        Ok(match (&status["status"], &status["running"]) {
            (Value::String(status), _) if status == "internal-error" => Stands::Broken(
                "KVM cannot carry out what the guest does next, and QEMU has stopped it \
                 (internal-error)"
                    .into(),
            ),
            (_, Value::Bool(false)) => Stands::Still,
            _ => Stands::Running,
        })
    }

    pub async fn command(&self, command: Command) -> Result<(), QmpError> {
        let name = match command {
            Command::Powerdown => "system_powerdown",
            Command::Quit => "quit",
            Command::Pause => "stop",
            Command::Resume => "cont",
            Command::Reset => "system_reset",
        };
        self.qmp.ask(name, Value::Null).await.map(drop)
    }

    /// What QEMU answers to a question, as it is.
    pub async fn question(&self, question: Question) -> Result<Value, QmpError> {
        let command = match question {
            Question::Block => "query-block",
            Question::BlockStats => "query-blockstats",
            Question::Chardev => "query-chardev",
            Question::Cpus => return self.cpus().await,
            Question::Kvm => "query-kvm",
            Question::Pci => "query-pci",
            Question::Status => "query-status",
            Question::Version => "query-version",
            Question::Vnc => "query-vnc",
        };
        self.qmp.ask(command, Value::Null).await
    }

    /// The virtual CPUs, each with its `pc` and whether it is `halted`.
    async fn cpus(&self) -> Result<Value, QmpError> {
        let mut list = self.qmp.ask("query-cpus-fast", Value::Null).await?;
        let asked = json!({"command-line": "info registers -a"});
        let said = self.qmp.ask("human-monitor-command", asked).await?;
        let each = said.as_str().unwrap_or("").split("CPU#").skip(1);
        for (cpu, registers) in list.as_array_mut().into_iter().flatten().zip(each) {
            let word = |name: &str| {
                registers.split_whitespace().find_map(|w| w.strip_prefix(name)?.strip_prefix('='))
            };
            let pc = word("RIP").or(word("EIP")).and_then(|pc| u64::from_str_radix(pc, 16).ok());
            cpu["pc"] = json!(pc);
            cpu["halted"] = json!(word("HLT") == Some("1"));
        }
        Ok(list)
    }

    pub async fn nmi(&self) -> Result<(), QmpError> {
        self.qmp.ask("inject-nmi", Value::Null).await.map(drop)
    }

    /// Writes the screen into a file as PPM. A key is pressed first, which wakes a blank one.
    pub async fn screenshot(&self, file: OwnedFd) -> Result<(), QmpError> {
        let shift = json!({"keys": [{"type": "qcode", "data": "shift"}]});
        self.qmp.ask("send-key", shift).await?;
        let added = self.qmp.ask_with_fd("add-fd", json!({}), file.as_fd()).await?;
        let set = added["fdset-id"].clone();
        let named = json!({"filename": format!("/dev/fdset/{set}")});
        let done = self.qmp.ask("screendump", named).await.map(drop);
        let _ = self.qmp.ask("remove-fd", json!({"fdset-id": set})).await;
        done
    }

    /// What viewers of the screen are asked for from now on.
    pub async fn set_vnc_password(&self, password: &str) -> Result<(), QmpError> {
        let arguments = json!({"protocol": "vnc", "password": password});
        self.qmp.ask("set_password", arguments).await.map(drop)
    }

    /// What the disks have carried since the start.
    pub async fn disk_traffic(&self) -> Result<Vec<Device>, QmpError> {
        let stats = self.qmp.ask("query-blockstats", Value::Null).await?;
        // Only what the guest itself asked for; the nodes below are listed within.
        let disks = stats.as_array().into_iter().flatten().map(|disk| {
            let count = |name: &str| disk["stats"][name].as_u64().unwrap_or(0);
            let parts = disk["qdev"].as_str().unwrap_or_default().split('/');
            let name = parts.filter_map(|part| part.strip_prefix("disk-")).next();
            let traffic = Traffic {
                in_bytes: count("rd_bytes"),
                out_bytes: count("wr_bytes"),
                in_operations: count("rd_operations"),
                out_operations: count("wr_operations"),
            };
            Device { name: name.unwrap_or_default().to_owned(), traffic }
        });
        Ok(disks.collect())
    }

    /// The threads of the virtual CPUs, numbered as the hypervisor sees them; those that take turns
    /// have the same one.
    pub async fn cpu_threads(&self) -> Result<Vec<u32>, QmpError> {
        let list = self.qmp.ask("query-cpus-fast", Value::Null).await?;
        let thread = |cpu: &Value| cpu["thread-id"].as_u64()?.try_into().ok();
        Ok(list.as_array().into_iter().flatten().filter_map(thread).collect())
    }

    /// Brings the number of CPUs to `count`.
    pub async fn set_cpus(
        &self,
        count: u32,
        accel: Accel,
        facts: &QemuFacts,
    ) -> Result<(), String> {
        let text = |e: QmpError| e.to_string();
        let slots = self.qmp.ask("query-hotpluggable-cpus", Value::Null).await.map_err(text)?;
        let mut slots = slots.as_array().cloned().unwrap_or_default();
        // QEMU lists the highest first.
        slots.reverse();
        let plugged = slots.iter().filter(|s| s.get("qom-path").is_some()).count();
        let wanted = count as usize;
        if wanted < plugged && accel == Accel::Tcg && !facts.can_unplug_cpus_under_tcg() {
            return Err(format!(
                "QEMU {} crashes when a CPU is removed under TCG; 8.0 or newer is needed, or stop \
                 the machine first",
                facts.version_text()
            ));
        }
        let free = slots.iter().filter(|s| s.get("qom-path").is_none());
        for slot in free.take(wanted.saturating_sub(plugged)) {
            let mut device = slot["props"].clone();
            device["driver"] = slot["type"].clone();
            device["id"] = json!(format!("cpu-{}", cpu_key(&slot["props"])));
            self.qmp.ask("device_add", device).await.map_err(text)?;
        }
        let taken = slots.iter().rev().filter(|s| s.get("qom-path").is_some());
        for slot in taken.take(plugged.saturating_sub(wanted)) {
            self.unplug(&format!("cpu-{}", cpu_key(&slot["props"]))).await?;
        }
        Ok(())
    }

    /// Makes the calls of a plan that have arguments: connecting has made the others.
    pub async fn begin(&self, calls: &[Value]) -> Result<(), QmpError> {
        for call in calls.iter().filter(|call| call["arguments"].is_object()) {
            let name = call["execute"].as_str().unwrap_or_default();
            self.qmp.ask(name, call["arguments"].clone()).await?;
        }
        Ok(())
    }

    /// Puts a disk's limits in force, or lifts them.
    pub async fn limit_disk(&self, disk: &Disk, board: Board) -> Result<(), String> {
        let arguments = throttle::arguments(disk, board);
        self.qmp.ask(throttle::COMMAND, arguments).await.map(drop).map_err(|e| e.to_string())
    }

    /// Plugs in `bytes` more memory, as module number `nth`.
    pub async fn add_memory(&self, bytes: u64, nth: usize) -> Result<(), String> {
        let (memory, module) = (format!("mem-{nth}"), format!("dimm-{nth}"));
        let object = json!({"qom-type": "memory-backend-ram", "id": memory, "size": bytes});
        self.qmp.ask("object-add", object).await.map_err(|e| e.to_string())?;
        let device = json!({"driver": "pc-dimm", "id": module, "memdev": memory});
        if let Err(error) = self.qmp.ask("device_add", device).await {
            let _ = self.qmp.ask("object-del", json!({"id": memory})).await;
            return Err(error.to_string());
        }
        Ok(())
    }

    /// Bytes of memory plugged in since the start.
    pub async fn plugged_memory(&self) -> Result<u64, String> {
        let summary = self.qmp.ask("query-memory-size-summary", Value::Null).await;
        let summary = summary.map_err(|e| e.to_string())?;
        Ok(summary["plugged-memory"].as_u64().unwrap_or(0))
    }

    pub async fn memory_modules(&self) -> Result<usize, String> {
        let list = self.qmp.ask("query-memory-devices", Value::Null).await;
        Ok(list.map_err(|e| e.to_string())?.as_array().map_or(0, Vec::len))
    }

    /// Plugs in a disk; `open` gives the descriptor of a layer.
    pub async fn add_disk(
        &self,
        disk: &Disk,
        files: &DiskFiles,
        board: Board,
        open: impl Fn(usize, bool) -> Result<OwnedFd, String>,
    ) -> Result<(), String> {
        if disk.bus != DiskBus::Virtio {
            return Err(format!("{}: only virtio disks can be plugged in", disk.name));
        }
        let bus = self.free_port(board).await?;
        let id = disk_id(disk.name.as_str());
        let mut names = Vec::new();
        for (depth, layer) in files.layers.iter().enumerate() {
            let fd = open(depth, depth == 0 && !disk.read_only)?;
            if layer.remote.is_some() {
                let lent = self.qmp.ask_with_fd("getfd", json!({"fdname": id}), fd.as_fd()).await;
                lent.map_err(|e| e.to_string())?;
                names.push(id.clone());
                continue;
            }
            let added = self.qmp.ask_with_fd("add-fd", json!({"opaque": id}), fd.as_fd()).await;
            let set = added.map_err(|e| e.to_string())?["fdset-id"].clone();
            names.push(format!("/dev/fdset/{set}"));
        }
        let mut depths = (0..files.layers.len()).rev();
        let nodes = block_nodes(disk.name.as_str(), &files.layers, disk.read_only, |_, _| {
            let depth = depths.next().expect("one call for each layer");
            names[depth].clone()
        });
        let mut added: Vec<Value> = Vec::new();
        let mut result = Ok(());
        for node in nodes {
            result = self.qmp.ask("blockdev-add", node.clone()).await.map(drop);
            if result.is_err() {
                break;
            }
            added.push(node["node-name"].clone());
        }
        if result.is_ok() {
            let device = to_object(&disk_device(disk, "virtio-blk-pci"), &bus);
            result = self.qmp.ask("device_add", device).await.map(drop);
        }
        if result.is_err() {
            for node in added.iter().rev() {
                let _ = self.qmp.ask("blockdev-del", json!({"node-name": node})).await;
            }
            self.let_go_of_files(&id).await;
        }
        result.map_err(|e| e.to_string())?;
        if disk.limits.is_some() { self.limit_disk(disk, board).await } else { Ok(()) }
    }

    /// Takes a disk away, with all its layers.
    pub async fn remove_disk(&self, name: &str) -> Result<(), String> {
        let id = disk_id(name);
        self.unplug(&id).await?;
        let deleted = self.delete_nodes(name).await;
        self.let_go_of_files(&id).await;
        deleted
    }

    async fn delete_nodes(&self, name: &str) -> Result<(), String> {
        for depth in 0.. {
            let node = if depth == 0 { format!("d-{name}") } else { format!("d-{name}-{depth}") };
            for node in [node, format!("f-{name}-{depth}")] {
                let deleted = self.qmp.ask("blockdev-del", json!({"node-name": node})).await;
                match deleted {
                    Ok(_) => {}
                    // There is no layer below the last one.
                    Err(QmpError::Refused { .. }) if depth > 0 => return Ok(()),
                    Err(error) => return Err(error.to_string()),
                }
            }
        }
        Ok(())
    }

    /// QEMU holds what it was handed for a device until it is told not to, and with it the space of
    /// files that are deleted.
    async fn let_go_of_files(&self, device: &str) {
        let sets = self.qmp.ask("query-fdsets", Value::Null).await.unwrap_or_default();
        for set in sets.as_array().into_iter().flatten() {
            if set["fds"][0]["opaque"] == device {
                let _ = self.qmp.ask("remove-fd", json!({"fdset-id": set["fdset-id"]})).await;
            }
        }
    }

    pub async fn add_nic(&self, nic: &Nic, board: Board, tap: OwnedFd) -> Result<(), String> {
        let text = |e: QmpError| e.to_string();
        let bus = self.free_port(board).await?;
        let (id, handle) = (format!("n-{}", nic.name), format!("tap-{}", nic.name));
        let named = json!({"fdname": handle});
        self.qmp.ask_with_fd("getfd", named, tap.as_fd()).await.map_err(text)?;
        let netdev = json!({"type": "tap", "id": id, "fd": handle});
        self.qmp.ask("netdev_add", netdev).await.map_err(text)?;
        let device = to_object(&nic_device(nic, "virtio-net-pci"), &bus);
        if let Err(error) = self.qmp.ask("device_add", device).await {
            let _ = self.qmp.ask("netdev_del", json!({"id": id})).await;
            return Err(error.to_string());
        }
        Ok(())
    }

    pub async fn remove_nic(&self, name: &str) -> Result<(), String> {
        self.unplug(&format!("nic-{name}")).await?;
        let id = format!("n-{name}");
        self.qmp.ask("netdev_del", json!({"id": id})).await.map(drop).map_err(|e| e.to_string())
    }

    /// Asks the guest to let go and waits until it has. QEMU says so twice for virtio devices,
    /// first without the name; only the one with the name counts.
    async fn unplug(&self, id: &str) -> Result<(), String> {
        let mut events = self.events.subscribe();
        self.qmp.ask("device_del", json!({"id": id})).await.map_err(|error| match error {
            QmpError::Refused { text, .. } if text.contains("does not support hotplugging") => {
                format!(
                    "{id} was there from the start, and the q35 board lets go only of what came \
                     later; stop the machine first, or give it `board: pc`"
                )
            }
            other => other.to_string(),
        })?;
        let gone = async {
            while let Ok(event) = events.recv().await {
                let named = event.data["device"] == json!(id);
                match event.name.as_str() {
                    "DEVICE_DELETED" if named => return Ok(()),
                    "DEVICE_UNPLUG_GUEST_ERROR" if named => {
                        return Err(format!("the guest refused to let go of {id}"));
                    }
                    _ => {}
                }
            }
            Err("QEMU is gone".to_owned())
        };
        let late = |_| Err(format!("the guest did not let go of {id}; is its driver loaded?"));
        tokio::time::timeout(UNPLUG_PATIENCE, gone).await.unwrap_or_else(late)
    }

    /// A bus that takes one more device.
    async fn free_port(&self, board: Board) -> Result<String, String> {
        match board {
            Board::Pc => return Ok("pci.0".into()),
            Board::Microvm => {
                return Err("the microvm board takes no devices while it runs; stop the machine, \
                            or give it `board: q35`"
                    .into());
            }
            Board::Q35 => {}
        }
        let buses = self.qmp.ask("query-pci", Value::Null).await.map_err(|e| e.to_string())?;
        let devices = buses[0]["devices"].as_array().cloned().unwrap_or_default();
        let free = devices.iter().find(|d| {
            let is_port = d["qdev_id"].as_str().is_some_and(|id| id.starts_with("port"));
            let behind = d["pci_bridge"]["devices"].as_array();
            is_port && behind.is_none_or(Vec::is_empty)
        });
        let port = free.and_then(|d| d["qdev_id"].as_str());
        port.map(str::to_owned).ok_or_else(|| "no socket for one more device is free".into())
    }
}

fn cpu_key(props: &Value) -> String {
    let part = |name: &str| props[name].as_u64().unwrap_or(0);
    format!("{}-{}-{}", part("socket-id"), part("core-id"), part("thread-id"))
}

/// `model,key=value,…` as the arguments of `device_add`.
fn to_object(device: &str, bus: &str) -> Value {
    let mut parts = device.split(',');
    let mut object = json!({"driver": parts.next(), "bus": bus});
    for (key, value) in parts.filter_map(|p| p.split_once('=')) {
        object[key] = json!(value);
    }
    object
}
