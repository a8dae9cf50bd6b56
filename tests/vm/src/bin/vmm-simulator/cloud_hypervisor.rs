//! Cloud Hypervisor's arguments and API.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use serde_json::{Value, json};

use crate::wire::{Call, serve};
use crate::{Machine, Shared, State, boot, die, known, look, open_disk, open_kernel, press, text};

/// `key=value,key=value`; a value may have colons.
fn options<'a>(text: &'a str, fields: &[&str]) -> BTreeMap<&'a str, &'a str> {
    let pairs = text.split(',').map(|pair| pair.split_once('=').unwrap_or_else(|| die(text)));
    let map: BTreeMap<&str, &str> = pairs.collect();
    if let Some(odd) = map.keys().find(|key| !fields.contains(key)) {
        die(&format!("Error parsing config: unknown option {odd} in {text}"));
    }
    map
}

pub(crate) fn run(args: &[String], machine: &Shared) {
    let anew = {
        let mut machine = machine.lock().unwrap();
        match args.iter().position(|arg| arg == "--restore") {
            None => {
                configure(&mut machine, args);
                machine.state = State::Running;
                machine.args = args.to_vec();
                true
            }
            Some(2) if args.len() == 4 => {
                restore(&mut machine, &args[3]);
                machine.state = State::Paused;
                false
            }
            Some(_) => die("the argument '--restore <restore>' cannot be used with the others"),
        }
    };
    boot(machine, anew);
    let socket = args[1].strip_prefix("fd=").filter(|_| args[0] == "--api-socket");
    let fd = socket.and_then(|fd| fd.parse().ok()).unwrap_or_else(|| die("no --api-socket"));
    // SAFETY: the descriptor was handed to this process under this number.
    let listener = unsafe { UnixListener::from_raw_fd(fd) };
    serve(&listener, |asked| match call(machine, asked) {
        Ok(said) if said.is_null() => (204, said),
        Ok(said) => (200, said),
        Err(why) => (500, json!(["Error from API", why])),
    });
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|_| die(text))
}

/// Becomes what the arguments describe.
fn configure(machine: &mut Machine, args: &[String]) {
    for pair in args.chunks(2) {
        let [option, value] = pair else { die(&format!("arguments: {args:?}")) };
        match option.as_str() {
            "--api-socket" => {}
            "--kernel" => open_kernel(value).unwrap_or_else(|e| die(&e)),
            "--initramfs" => drop(File::open(value).unwrap_or_else(|e| die(&e.to_string()))),
            "--cmdline" if value.contains("refuse") => die("the command line is not to its taste"),
            "--cmdline" => machine.cmdline.clone_from(value),
            "--cpus" => {
                let map = options(value, &["boot", "max", "topology", "kvm_hyperv", "features"]);
                machine.cpus = (number(map["boot"]), number(map["max"]));
                let product: u64 = map["topology"].split(':').map(number).product();
                if product != machine.cpus.1 {
                    die("The product of the topology does not match the maximum of vCPUs");
                }
            }
            "--memory" => {
                let map = options(
                    value,
                    &["size", "hotplug_method", "hotplug_size", "shared", "hugepages"],
                );
                let room = map.get("hotplug_size").map_or(0, |n| number(n));
                machine.memory = (number(map["size"]), number(map["size"]) + room);
            }
            "--disk" => {
                let map = options(value, &["path", "readonly", "id", "serial"]);
                let writable = map.get("readonly") != Some(&"on");
                let file = open_disk(map["path"], writable).unwrap_or_else(|e| die(&e));
                machine.disks.push((map["id"].to_owned(), file, writable));
            }
            "--net" => {
                let map = options(
                    value,
                    &["fd", "id", "mac", "bw_size", "bw_refill_time", "bw_one_time_burst"],
                );
                let fd = i32::try_from(number(map["fd"])).unwrap();
                // SAFETY: the descriptor was handed to this process under this number.
                let tap = unsafe { File::from_raw_fd(fd) };
                check_tap(&tap);
                println!("API net {value}\r");
                machine.taps.push(tap);
            }
            "--rng" => drop(
                File::open(value.trim_start_matches("src="))
                    .unwrap_or_else(|e| die(&e.to_string())),
            ),
            "--balloon" => drop(options(value, &["size", "deflate_on_oom", "free_page_reporting"])),
            "--serial" if value == "tty" => {}
            "--console" if value == "off" => {}
            other => die(&format!("unexpected argument '{other}' {value}")),
        }
    }
}

/// Interfaces come anew, all else as it was saved.
fn restore(machine: &mut Machine, option: &str) {
    let (folder, nets) = option.split_once(",net_fds=").unwrap_or((option, "[]"));
    let folder = folder.strip_prefix("source_url=file://").unwrap_or_else(|| die(option));
    let text = std::fs::read_to_string(format!("{folder}/state.json"))
        .unwrap_or_else(|e| die(&format!("Error restoring VM: {e}")));
    let state: Value = serde_json::from_str(&text).unwrap_or_else(|e| die(&e.to_string()));
    let nets = nets.strip_prefix('[').and_then(|n| n.strip_suffix(']'));
    let mut nets: BTreeMap<&str, &str> = nets
        .unwrap_or_else(|| die(option))
        .split(',')
        .filter_map(|net| net.split_once('@'))
        .collect();
    let mut args: Vec<String> = serde_json::from_value(state["args"].clone()).unwrap();
    for value in args.iter_mut().filter(|arg| arg.starts_with("fd=") && arg.contains(",mac=")) {
        let (_, rest) = value.split_once(',').unwrap();
        let id = rest.strip_prefix("id=").and_then(|r| r.split(',').next()).unwrap();
        let fd = nets.remove(id).unwrap_or_else(|| die(&format!("no descriptor for {id}")));
        let fd = fd.trim_matches(['[', ']']);
        *value = format!("fd={fd},{rest}");
    }
    if let Some((id, _)) = nets.first_key_value() {
        die(&format!("Error restoring VM: unknown net_id {id}"));
    }
    configure(machine, &args);
    machine.args = args;
    machine.ticks = state["ticks"].as_u64().unwrap();
    machine.cpus = serde_json::from_value(state["cpus"].clone()).unwrap();
    machine.memory = serde_json::from_value(state["memory"].clone()).unwrap();
}

fn save(machine: &Machine, body: &Value) -> Result<Value, String> {
    known(body, &["destination_url"])?;
    let folder = text(body, "destination_url")?.strip_prefix("file://").ok_or("no file: URL")?;
    let state = json!({"args": machine.args, "ticks": machine.ticks, "cpus": machine.cpus,
        "memory": machine.memory});
    let options = || std::fs::File::options().write(true).create_new(true).clone();
    for (name, content) in [("state.json", state.to_string()), ("memory-ranges", "MEMORY".into())] {
        let file = options().open(format!("{folder}/{name}"));
        file.and_then(|mut file| file.write_all(content.as_bytes()))
            .map_err(|e| format!("The VM could not be snapshotted: {e}"))?;
    }
    Ok(Value::Null)
}

/// Something more, while the guest runs.
fn plug(
    machine: &mut Machine,
    what: &str,
    body: &Value,
    files: Vec<File>,
) -> Result<Value, String> {
    let id = text(body, "id")?.to_owned();
    if machine.args.iter().any(|arg| arg.split(',').any(|part| part == format!("id={id}"))) {
        return Err(format!("The device could not be added: identifier {id} is not unique"));
    }
    if what == "vm.add-disk" {
        known(body, &["path", "readonly", "id", "serial"])?;
        let writable = body["readonly"] != json!(true);
        let mut file = open_disk(text(body, "path")?, writable)?;
        look(machine.disks.len(), &mut file, writable);
        machine.disks.push((id.clone(), file, writable));
    } else {
        known(body, &["id", "mac", "rate_limiter_config"])?;
        text(body, "mac")?;
        let [tap]: [File; 1] = files.try_into().map_err(|_| "no descriptor came with it")?;
        check_tap(&tap);
        machine.taps.push(tap);
        println!("PROBE nets: {}\r", machine.taps.len());
    }
    machine.args.push(format!("plugged,id={id}"));
    Ok(json!({"id": id, "bdf": "0000:00:07.0"}))
}

fn unplug(machine: &mut Machine, body: &Value) -> Result<Value, String> {
    known(body, &["id"])?;
    let id = text(body, "id")?;
    let named = |arg: &String| arg.split(',').any(|part| part == format!("id={id}"));
    if !machine.args.iter().any(named) {
        return Err(format!("The device could not be removed: {id} is not known"));
    }
    machine.args.retain(|arg| !named(arg));
    machine.disks.retain(|(disk, _, _)| disk != id);
    println!("unplugged {id}\r");
    Ok(Value::Null)
}

fn check_tap(tap: &File) {
    // SAFETY: all bytes zero is a valid `ifreq`, which TUNGETIFF fills.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    if unsafe { libc::ioctl(tap.as_raw_fd(), 0x8004_54d2, &raw mut request) } != 0 {
        die("The descriptor is no tap");
    }
}

fn call(shared: &Shared, asked: Call) -> Result<Value, String> {
    let Call { verb, path, body, files } = asked;
    let mut machine = shared.lock().unwrap();
    let call = path.strip_prefix("/api/v1/").ok_or("no such path")?;
    match (verb, call) {
        ("GET", "vm.info") => {
            let state = if machine.state == State::Paused { "Paused" } else { "Running" };
            return Ok(
                json!({"state": state, "config": {}, "memory_actual_size": machine.memory.0}),
            );
        }
        ("GET", "vm.counters") => {
            let mut all = json!({});
            for (id, _, writable) in &machine.disks {
                let written = if *writable { machine.written } else { 0 };
                all[id] = json!({"read_bytes": 0, "write_bytes": written, "read_ops": 0, "write_ops": written / 512});
            }
            return Ok(all);
        }
        ("PUT", "vm.pause") if machine.state == State::Running => machine.state = State::Paused,
        ("PUT", "vm.resume") if machine.state == State::Paused => machine.state = State::Running,
        ("PUT", "vm.snapshot") if machine.state != State::Paused => {
            return Err("The VM could not be snapshotted: it is not paused".into());
        }
        ("PUT", "vm.snapshot") => return save(&machine, body),
        ("PUT", "vm.add-disk" | "vm.add-net") => return plug(&mut machine, call, body, files),
        ("PUT", "vm.remove-device") => return unplug(&mut machine, body),
        ("PUT", "vm.reboot") => {
            machine.ticks = 0;
            println!("GUEST-READY\r");
        }
        ("PUT", "vm.power-button") => press(&machine.cmdline),
        ("PUT", "vmm.shutdown") => {
            std::thread::spawn(|| {
                std::thread::sleep(Duration::from_millis(10));
                std::process::exit(0)
            });
        }
        ("PUT", "vm.resize") => {
            known(body, &["desired_vcpus", "desired_ram", "desired_balloon"])?;
            let cpus = body["desired_vcpus"].as_u64().unwrap_or(machine.cpus.0);
            let ram = body["desired_ram"].as_u64().unwrap_or(machine.memory.0);
            if cpus == 0 || cpus > machine.cpus.1 {
                return Err("Cannot resize CPUs: Desired number of CPUs exceeds the maximum".into());
            }
            if ram > machine.memory.1 {
                return Err(
                    "Cannot resize memory: Not enough space in the hotplug RAM region".into()
                );
            }
            (machine.cpus.0, machine.memory.0) = (cpus, ram);
            println!("resized to {cpus} {ram}\r");
        }
        ("PUT", "vm.pause" | "vm.resume") => {
            return Err("The VM could not change its state: Invalid transition".into());
        }
        _ => return Err(format!("no such call: {verb} {call}")),
    }
    Ok(Value::Null)
}
