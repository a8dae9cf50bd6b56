//! Stands in for Firecracker and Cloud Hypervisor, by the name it is called, where neither is
//! installed. Stricter than they are: it knows no field and no option that they do not document,
//! opens everything that it is given, and refuses in their words. Its guest counts.

#![allow(clippy::unwrap_used, reason = "a simulator that cannot go on ends")]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "that is its console")]

mod cloud_hypervisor;
mod firecracker;
mod wire;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, Read};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;

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
    /// With which it was started; what is plugged in later adds to them.
    args: Vec<String>,
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
        args: Vec::new(),
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
        "firecracker" => firecracker::run(&args[1..], &machine),
        "cloud-hypervisor" => cloud_hypervisor::run(&args[1..], &machine),
        other => die(&format!("called as {other}")),
    }
}

fn die(why: &str) -> ! {
    eprintln!("{why}");
    std::process::exit(1)
}

/// What the guest says of a disk.
fn look(number: usize, file: &mut File, writable: bool) {
    let mut first = [0; 4];
    file.read_exact(&mut first).unwrap();
    let text = first.iter().take_while(|b| b.is_ascii_graphic()).map(|b| *b as char);
    println!("PROBE disk{number}: {} writable={writable}\r", text.collect::<String>());
}

/// The guest: prints what it was given, unless it goes on from its memory, then counts for as long
/// as it runs.
fn boot(machine: &Shared, anew: bool) {
    let own = machine.clone();
    std::thread::spawn(move || {
        if anew {
            let mut machine = own.lock().unwrap();
            println!("PROBE cmdline: {}\r", machine.cmdline);
            for (number, (_, file, writable)) in machine.disks.iter_mut().enumerate() {
                look(number, file, *writable);
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
fn press(cmdline: &str) {
    if !cmdline.contains("deaf") {
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
