//! Firecracker's API.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixListener;

use serde_json::{Value, json};

use crate::wire::{Call, serve};
use crate::{
    Machine, Shared, State, boot, die, known, open_disk, open_kernel, open_tap, press, text,
};

pub(crate) fn run(args: &[String], machine: &Shared) {
    let [api, socket, id, _] = args else { die(&format!("arguments: {args:?}")) };
    if api != "--api-sock" || id != "--id" {
        die(&format!("arguments: {args:?}"));
    }
    let listener = UnixListener::bind(socket).unwrap_or_else(|e| die(&format!("{socket}: {e}")));
    serve(&listener, |Call { verb, path, body, .. }| match call(machine, verb, path, body) {
        Ok(said) if said.is_null() => (204, said),
        Ok(said) => (200, said),
        Err(why) => (400, json!({"fault_message": why})),
    });
}

/// What the machine is to be; nothing of it can be said once it runs.
fn describe(machine: &mut Machine, path: &str, body: &Value) -> Result<(), String> {
    let name = path.rsplit('/').next().unwrap_or("");
    match path {
        "/machine-config" => {
            known(body, &["vcpu_count", "mem_size_mib", "smt", "track_dirty_pages", "huge_pages"])?;
            let count = body["vcpu_count"].as_u64().unwrap_or(0);
            if count == 0 || count > 32 || (count > 1 && count % 2 == 1) {
                return Err("The vCPU number is invalid! The vCPU number can only be 1 or an even number when SMT is enabled.".into());
            }
            if body["mem_size_mib"].as_u64().unwrap_or(0) == 0 {
                return Err("The memory size (MiB) is invalid.".into());
            }
        }
        "/boot-source" => {
            known(body, &["kernel_image_path", "initrd_path", "boot_args"])?;
            open_kernel(text(body, "kernel_image_path")?)?;
            if let Some(initrd) = body["initrd_path"].as_str() {
                File::open(initrd).map_err(|e| format!("The initrd file cannot be opened: {e}"))?;
            }
            machine.cmdline = body["boot_args"].as_str().unwrap_or("").to_owned();
            if machine.cmdline.contains("refuse") {
                return Err("the command line is not to its taste".into());
            }
        }
        p if p.starts_with("/drives/") => {
            known(
                body,
                &[
                    "drive_id",
                    "path_on_host",
                    "is_root_device",
                    "is_read_only",
                    "rate_limiter",
                    "cache_type",
                    "io_engine",
                    "partuuid",
                ],
            )?;
            let id = text(body, "drive_id")?;
            if id != name || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
                return Err(format!(
                    "The id from the path [{name}] does not match the id from the body [{id}]!"
                ));
            }
            let writable = body["is_read_only"] != json!(true);
            let file = open_disk(text(body, "path_on_host")?, writable)?;
            machine.disks.push((id.to_owned(), file, writable));
        }
        p if p.starts_with("/network-interfaces/") => {
            known(
                body,
                &["iface_id", "guest_mac", "host_dev_name", "rx_rate_limiter", "tx_rate_limiter"],
            )?;
            for side in ["rx_rate_limiter", "tx_rate_limiter"] {
                if body[side].is_object() {
                    known(&body[side], &["bandwidth", "ops"])?;
                    known(&body[side]["bandwidth"], &["size", "refill_time", "one_time_burst"])?;
                }
            }
            let tap = open_tap(text(body, "host_dev_name")?)?;
            machine.taps.push(tap);
        }
        "/hotplug/memory" => pluggable(machine, body)?,
        "/entropy" => known(body, &["rate_limiter"])?,
        "/balloon" => known(body, &["amount_mib", "deflate_on_oom", "stats_polling_interval_s"])?,
        "/metrics" => {
            known(body, &["metrics_path"])?;
            let open = File::options().read(true).write(true).open(text(body, "metrics_path")?);
            machine.metrics = Some(open.map_err(|e| format!("Cannot initialize metrics: {e}"))?);
        }
        _ => return Err(format!("Invalid request method and/or path: PUT {path}.")),
    }
    Ok(())
}

/// Room for memory to be plugged in.
fn pluggable(machine: &mut Machine, body: &Value) -> Result<(), String> {
    known(body, &["total_size_mib", "slot_size_mib", "block_size_mib"])?;
    let size = |name: &str| body[name].as_u64().ok_or(format!("missing field `{name}`"));
    let total = size("total_size_mib")?;
    let (slot, block) = (size("slot_size_mib")?, size("block_size_mib")?);
    if block < 2 || !block.is_power_of_two() || slot < 128 || slot % block != 0 {
        return Err("Slot or block size is invalid".into());
    }
    if total < slot || total % slot != 0 {
        return Err("Total size must be a multiple of slot size".into());
    }
    machine.memory = (0, total);
    Ok(())
}

/// Memory that can be plugged in, once it runs.
fn plugged(machine: &mut Machine, verb: &str, body: &Value) -> Result<Value, String> {
    let (now, total) = machine.memory;
    if total == 0 {
        return Err("No memory hotplug device".into());
    }
    if verb == "GET" {
        return Ok(json!({"total_size_mib": total, "slot_size_mib": 128, "block_size_mib": 2,
            "plugged_size_mib": now, "requested_size_mib": now}));
    }
    known(body, &["requested_size_mib"])?;
    let wanted = body["requested_size_mib"].as_u64().ok_or("missing field")?;
    if wanted > total || wanted % 2 != 0 {
        return Err("Requested size is invalid".into());
    }
    machine.memory.0 = wanted;
    println!("plugged {wanted}\r");
    Ok(Value::Null)
}

fn act(shared: &Shared, machine: &mut Machine, action: &str) -> Result<(), String> {
    match action {
        "InstanceStart" => {
            if !machine.told.contains_key("/boot-source") {
                return Err("Cannot start microvm without kernel configuration.".into());
            }
            machine.state = State::Running;
            boot(shared, true);
        }
        "SendCtrlAltDel" => press(&machine.cmdline),
        "FlushMetrics" => {
            let written = std::mem::take(&mut machine.written);
            let block =
                json!({"write_bytes": written, "write_count": written / 512, "read_bytes": 0});
            let file = machine.metrics.as_mut().ok_or("no metrics")?;
            writeln!(file, "{}", json!({"block": block})).map_err(|e| e.to_string())?;
        }
        other => return Err(format!("unknown variant `{other}`")),
    }
    Ok(())
}

fn call(shared: &Shared, verb: &str, path: &str, body: &Value) -> Result<Value, String> {
    let mut machine = shared.lock().unwrap();
    let before = |machine: &Machine| match machine.state {
        State::NotStarted => Ok(()),
        _ => Err("The requested operation is not supported after starting the microVM.".to_owned()),
    };
    let running = |machine: &Machine| match machine.state {
        State::NotStarted => {
            Err("The requested operation is not supported before starting the microVM.".to_owned())
        }
        _ => Ok(()),
    };
    match (verb, path) {
        ("GET", "/") => {
            let state = match machine.state {
                State::NotStarted => "Not started",
                State::Running => "Running",
                State::Paused => "Paused",
            };
            return Ok(
                json!({"id": "x", "state": state, "vmm_version": "1.16.1", "app_name": "Firecracker"}),
            );
        }
        ("PUT", "/actions") => {
            known(body, &["action_type"])?;
            let action = text(body, "action_type")?;
            match action {
                "InstanceStart" => before(&machine)?,
                _ => running(&machine)?,
            }
            act(shared, &mut machine, action)?;
        }
        ("PATCH", "/vm") => {
            running(&machine)?;
            known(body, &["state"])?;
            machine.state = match text(body, "state")? {
                "Paused" => State::Paused,
                "Resumed" => State::Running,
                other => return Err(format!("unknown variant `{other}`")),
            };
        }
        ("PUT", "/snapshot/create") => {
            if machine.state != State::Paused {
                return Err("Create snapshot error: the microVM is not paused".into());
            }
            return save(&machine, body);
        }
        ("PUT", "/snapshot/load") => {
            before(&machine)?;
            load(&mut machine, body)?;
            machine.state = match body["resume_vm"] == json!(true) {
                true => State::Running,
                false => State::Paused,
            };
            boot(shared, false);
            return Ok(Value::Null);
        }
        ("GET" | "PATCH", "/hotplug/memory") => {
            running(&machine)?;
            return plugged(&mut machine, verb, body);
        }
        ("PUT", _) => {
            before(&machine)?;
            describe(&mut machine, path, body)?;
        }
        _ => return Err(format!("Invalid request method and/or path: {verb} {path}.")),
    }
    machine.told.insert(path.to_owned(), body.clone());
    Ok(Value::Null)
}

fn save(machine: &Machine, body: &Value) -> Result<Value, String> {
    known(body, &["snapshot_type", "snapshot_path", "mem_file_path"])?;
    if !matches!(text(body, "snapshot_type")?, "Full" | "Diff") {
        return Err("unknown variant".into());
    }
    let told: serde_json::Map<String, Value> = machine
        .told
        .iter()
        .filter(|(path, _)| is_described(path))
        .map(|(p, b)| (p.clone(), b.clone()))
        .collect();
    let state = json!({"told": told, "ticks": machine.ticks, "memory": machine.memory});
    let write = |field: &str, content: &[u8]| {
        std::fs::write(text(body, field)?, content)
            .map_err(|e| format!("Create snapshot error: Cannot open snapshot file: {e}"))
    };
    write("snapshot_path", state.to_string().as_bytes())?;
    write("mem_file_path", b"MEMORY")?;
    Ok(Value::Null)
}

/// Part of the machine itself.
fn is_described(path: &str) -> bool {
    !["/metrics", "/actions", "/vm"].contains(&path)
}

fn load(machine: &mut Machine, body: &Value) -> Result<(), String> {
    known(
        body,
        &["snapshot_path", "mem_backend", "resume_vm", "track_dirty_pages", "network_overrides"],
    )?;
    if let Some(path) = machine.told.keys().find(|path| is_described(path)) {
        return Err(format!(
            "Load snapshot error: Loading a microVM snapshot not allowed after configuring \
             boot-specific resources ({path})."
        ));
    }
    let backend = &body["mem_backend"];
    known(backend, &["backend_path", "backend_type"])?;
    if text(backend, "backend_type")? != "File" {
        return Err("unknown variant".into());
    }
    let read =
        |path: &str| std::fs::read(path).map_err(|e| format!("Load snapshot error: {path}: {e}"));
    if read(text(backend, "backend_path")?)? != b"MEMORY" {
        return Err("Load snapshot error: the memory is not what was saved".into());
    }
    let state: Value = serde_json::from_slice(&read(text(body, "snapshot_path")?)?)
        .map_err(|e| format!("Load snapshot error: {e}"))?;
    let told = state["told"].as_object().ok_or("no state")?;
    for (path, body) in told {
        // The kernel is in the memory.
        if path != "/boot-source" && path != "/machine-config" {
            describe(machine, path, body)?;
        }
        machine.told.insert(path.clone(), body.clone());
    }
    machine.ticks = state["ticks"].as_u64().ok_or("no clock")?;
    machine.memory = serde_json::from_value(state["memory"].clone()).map_err(|e| e.to_string())?;
    Ok(())
}
