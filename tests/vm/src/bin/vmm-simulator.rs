//! Stands in for Firecracker and Cloud Hypervisor, by the name it is called, where neither is
//! installed. Stricter than they are: it knows no field and no option that they do not document,
//! opens everything that it is given, and refuses in their words. Its guest counts.

#![allow(clippy::unwrap_used, reason = "a simulator that cannot go on ends")]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "that is its console")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    NotStarted,
    Running,
    Paused,
}

/// What both have.
struct Machine {
    state: State,
    told: BTreeMap<String, Value>,
    cmdline: String,
    disks: Vec<(String, File, bool)>,
    taps: Vec<File>,
    ticks: u64,
    written: u64,
    metrics: Option<File>,
    cpus: (u64, u64),
    memory: (u64, u64),
}

type Shared = Arc<Mutex<Machine>>;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let own = std::env::current_exe().ok();
    let called = std::path::Path::new(&args[0]).file_name().unwrap().to_string_lossy().into_owned();
    if args.get(1).is_some_and(|a| a == "--version") {
        match called.as_str() {
            "firecracker" => println!("Firecracker v1.16.1\n"),
            _ => println!("cloud-hypervisor v53.0"),
        }
        return;
    }
    // Inside its jail it has no file of its own to name.
    drop(own);
    let machine = Arc::new(Mutex::new(Machine {
        state: State::NotStarted,
        told: BTreeMap::new(),
        cmdline: String::new(),
        disks: Vec::new(),
        taps: Vec::new(),
        ticks: 0,
        written: 0,
        metrics: None,
        cpus: (1, 1),
        memory: (0, 0),
    }));
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        die(&format!("Error creating KVM object: {error}"));
    }
    match called.as_str() {
        "firecracker" => firecracker(&args[1..], &machine),
        "cloud-hypervisor" => cloud_hypervisor(&args[1..], &machine),
        other => die(&format!("called as {other}")),
    }
}

fn die(why: &str) -> ! {
    eprintln!("{why}");
    std::process::exit(1)
}

/// The guest: prints what it was given, then counts for as long as it runs.
fn boot(machine: &Shared) {
    let own = machine.clone();
    std::thread::spawn(move || {
        {
            let mut machine = own.lock().unwrap();
            println!("PROBE cmdline: {}\r", machine.cmdline);
            for (name, file, writable) in &mut machine.disks {
                let mut first = [0; 4];
                file.read_exact(&mut first).unwrap();
                let text = first.iter().take_while(|b| b.is_ascii_graphic()).map(|b| *b as char);
                println!("PROBE {name}: {} writable={writable}\r", text.collect::<String>());
            }
            println!("PROBE nets: {}\r", machine.taps.len());
            if machine.cmdline.contains("escape") {
                for (way, closed) in lodge_host::escape::attempts("/etc/passwd") {
                    println!("{} {way}\r", if closed { "CLOSED" } else { "OPEN" });
                }
            }
            println!("GUEST-READY\r");
        }
        loop {
            std::thread::sleep(Duration::from_millis(20));
            let mut machine = own.lock().unwrap();
            if machine.state == State::Running {
                machine.ticks += 1;
                println!("tick {}\r", machine.ticks);
            }
        }
    });
    let own = machine.clone();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            match line.trim() {
                "poweroff" => std::process::exit(0),
                "crash" => die("Unexpected exit reason on vcpu run: InternalError"),
                "panic" => println!("[    0.5] Kernel panic - not syncing: simulated\r"),
                "write" => {
                    let mut machine = own.lock().unwrap();
                    for (_, file, _) in machine.disks.iter_mut().filter(|d| d.2) {
                        use std::os::unix::fs::FileExt;
                        file.write_all_at(b"WROTE", 512).unwrap();
                    }
                    machine.written += 512;
                    println!("written\r");
                }
                other => println!("typed: {other}\r"),
            }
        }
    });
}

/// What a guest with a keyboard or a power button does when it is pressed.
fn press(machine: &Shared) {
    let deaf = machine.lock().unwrap().cmdline.contains("deaf");
    if !deaf {
        std::thread::spawn(|| {
            std::thread::sleep(Duration::from_millis(50));
            println!("guest powers off\r");
            std::process::exit(0);
        });
    }
}

fn open_disk(path: &str, writable: bool) -> Result<File, String> {
    let open = File::options().read(true).write(writable).open(path);
    open.map_err(|e| format!("Error manipulating the backing file: {e} {path}"))
}

fn open_kernel(path: &str) -> Result<(), String> {
    let mut magic = [0; 4];
    let mut file =
        File::open(path).map_err(|e| format!("The kernel file cannot be opened: {e}"))?;
    file.read_exact(&mut magic).map_err(|e| e.to_string())?;
    match &magic {
        b"\x7fELF" => Ok(()),
        _ => Err("Cannot load kernel due to invalid memory configuration or invalid kernel image: Kernel Loader: failed to load ELF kernel image".into()),
    }
}

/// Opens a tap by its name, as Firecracker does.
fn open_tap(name: &str) -> Result<File, String> {
    let tun = File::options().read(true).write(true).open("/dev/net/tun");
    let tun = tun.map_err(|e| format!("Open tap device failed: {e}"))?;
    // SAFETY: all bytes zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = 0x5002;
    // SAFETY: the structure is the one that TUNSETIFF takes.
    match unsafe { libc::ioctl(tun.as_raw_fd(), 0x4004_54ca, &raw mut request) } {
        0 => Ok(tun),
        _ => Err(format!("Open tap device failed: {} {name}", std::io::Error::last_os_error())),
    }
}

fn known(body: &Value, fields: &[&str]) -> Result<(), String> {
    let object = body.as_object().ok_or("expected an object")?;
    match object.keys().find(|key| !fields.contains(&key.as_str())) {
        Some(key) => Err(format!(
            "An error occurred when deserializing the json body of a request: unknown field `{key}`."
        )),
        None => Ok(()),
    }
}

fn text<'a>(body: &'a Value, field: &str) -> Result<&'a str, String> {
    body[field].as_str().ok_or(format!(
        "An error occurred when deserializing the json body of a request: missing field `{field}`."
    ))
}

/// One request after another on each connection; the answer's status and body.
fn serve(listener: &UnixListener, answer: impl Fn(&str, &str, &Value) -> (u16, Value)) {
    for stream in listener.incoming() {
        // A caller that breaks off is none of ours.
        let _ = converse(stream.unwrap(), &answer);
    }
}

fn converse(
    mut stream: UnixStream,
    answer: &impl Fn(&str, &str, &Value) -> (u16, Value),
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split_whitespace();
        let (verb, path) =
            (words.next().unwrap_or("").to_owned(), words.next().unwrap_or("").to_owned());
        let mut length = 0;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            if header.trim().is_empty() {
                break;
            }
            if let Some(value) = header.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body)? };
        println!("API {verb} {path} {body}\r");
        let (status, said) = answer(&verb, &path, &body);
        let said = if said.is_null() { String::new() } else { said.to_string() };
        write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{said}", said.len())?;
    }
}

fn firecracker(args: &[String], machine: &Shared) {
    let [api, socket, id, _] = args else { die(&format!("arguments: {args:?}")) };
    if api != "--api-sock" || id != "--id" {
        die(&format!("arguments: {args:?}"));
    }
    let listener = UnixListener::bind(socket).unwrap_or_else(|e| die(&format!("{socket}: {e}")));
    serve(&listener, |verb, path, body| match firecracker_call(machine, verb, path, body) {
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
            let open = File::options().create(true).append(true).open(text(body, "metrics_path")?);
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

fn firecracker_call(
    shared: &Shared,
    verb: &str,
    path: &str,
    body: &Value,
) -> Result<Value, String> {
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
            match text(body, "action_type")? {
                "InstanceStart" => {
                    before(&machine)?;
                    if !machine.told.contains_key("/boot-source") {
                        return Err("Cannot start microvm without kernel configuration.".into());
                    }
                    machine.state = State::Running;
                    boot(shared);
                }
                "SendCtrlAltDel" => {
                    running(&machine)?;
                    drop(machine);
                    press(shared);
                    return Ok(Value::Null);
                }
                "FlushMetrics" => {
                    running(&machine)?;
                    let written = std::mem::take(&mut machine.written);
                    let line = json!({"block": {"write_bytes": written, "write_count": written / 512, "read_bytes": 0}});
                    let file = machine.metrics.as_mut().ok_or("no metrics")?;
                    writeln!(file, "{line}").map_err(|e| e.to_string())?;
                }
                other => return Err(format!("unknown variant `{other}`")),
            }
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

/// `key=value,key=value`; a value may have colons.
fn options<'a>(text: &'a str, fields: &[&str]) -> BTreeMap<&'a str, &'a str> {
    let pairs = text.split(',').map(|pair| pair.split_once('=').unwrap_or_else(|| die(text)));
    let map: BTreeMap<&str, &str> = pairs.collect();
    if let Some(odd) = map.keys().find(|key| !fields.contains(key)) {
        die(&format!("Error parsing config: unknown option {odd} in {text}"));
    }
    map
}

fn cloud_hypervisor(args: &[String], machine: &Shared) {
    let mut api = None;
    let number = |text: &str| text.parse::<u64>().unwrap_or_else(|_| die(text));
    {
        let mut machine = machine.lock().unwrap();
        for pair in args.chunks(2) {
            let [option, value] = pair else { die(&format!("arguments: {args:?}")) };
            match option.as_str() {
                "--api-socket" => api = value.strip_prefix("fd=").map(number),
                "--kernel" => open_kernel(value).unwrap_or_else(|e| die(&e)),
                "--initramfs" => drop(File::open(value).unwrap_or_else(|e| die(&e.to_string()))),
                "--cmdline" if value.contains("refuse") => {
                    die("the command line is not to its taste")
                }
                "--cmdline" => machine.cmdline.clone_from(value),
                "--cpus" => {
                    let map =
                        options(value, &["boot", "max", "topology", "kvm_hyperv", "features"]);
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
                    // SAFETY: all bytes zero is a valid `ifreq`, which TUNGETIFF fills.
                    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
                    // SAFETY: as above.
                    if unsafe { libc::ioctl(tap.as_raw_fd(), 0x8004_54d2, &raw mut request) } != 0 {
                        die("The descriptor is no tap");
                    }
                    println!("API net {value}\r");
                    machine.taps.push(tap);
                }
                "--rng" => drop(
                    File::open(value.trim_start_matches("src="))
                        .unwrap_or_else(|e| die(&e.to_string())),
                ),
                "--balloon" => {
                    drop(options(value, &["size", "deflate_on_oom", "free_page_reporting"]))
                }
                "--serial" if value == "tty" => {}
                "--console" if value == "off" => {}
                other => die(&format!("unexpected argument '{other}' {value}")),
            }
        }
        machine.state = State::Running;
    }
    boot(machine);
    let fd = i32::try_from(api.unwrap_or_else(|| die("no --api-socket"))).unwrap();
    // SAFETY: the descriptor was handed to this process under this number.
    let listener = unsafe { UnixListener::from_raw_fd(fd) };
    serve(&listener, |verb, path, body| match cloud_call(machine, verb, path, body) {
        Ok(said) if said.is_null() => (204, said),
        Ok(said) => (200, said),
        Err(why) => (500, json!(["Error from API", why])),
    });
}

fn cloud_call(shared: &Shared, verb: &str, path: &str, body: &Value) -> Result<Value, String> {
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
        ("PUT", "vm.reboot") => {
            machine.ticks = 0;
            println!("GUEST-READY\r");
        }
        ("PUT", "vm.power-button") => {
            drop(machine);
            press(shared);
        }
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
