//! What Lodge adds to the start of each hypervisor that is here, over the same program started by
//! hand with the same guest: the probe, which runs wherever `/dev/kvm` opens. Nothing is asserted.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::bench::{Row, end, lodge, median, moment};
use crate::run::{command, say};

const ROUNDS: usize = 9;
/// What the probe says when it is up.
const READY: &str = "GUEST-READY";
const CMDLINE: &str = "console=ttyS0";

struct Kind {
    backend: &'static str,
    program: &'static str,
    variable: &'static str,
    figure: &'static str,
    target: &'static str,
}

const KINDS: [Kind; 3] = [
    Kind {
        backend: "qemu",
        program: "qemu-system-x86_64",
        variable: "LODGE_QEMU",
        figure: "added to a start of QEMU with KVM, guest included",
        target: "reported",
    },
    Kind {
        backend: "firecracker",
        program: "firecracker",
        variable: "LODGE_FIRECRACKER",
        figure: "added to a start of Firecracker, guest included",
        target: "15 ms",
    },
    Kind {
        backend: "cloud-hypervisor",
        program: "cloud-hypervisor",
        variable: "LODGE_CLOUD_HYPERVISOR",
        figure: "added to a start of Cloud Hypervisor, guest included",
        target: "15 ms",
    },
];

pub(crate) fn measure(own: &Path, home: &Path) -> Result<Vec<Row>> {
    let probe = own.with_file_name("probe");
    let mut rows = Vec::new();
    for kind in KINDS {
        let Kind { backend, program, variable, figure, target } = kind;
        let Some(found) = find(program, variable) else {
            say(&format!("SKIPPED: {backend} is neither on PATH nor named by {variable}"));
            continue;
        };
        let (mut whole, mut bare) = (Vec::new(), Vec::new());
        let document = json!({
            "name": "bare", "backend": backend, "accel": "kvm", "memory": "128MiB", "nics": [],
            "ready": format!("console:{READY}"),
            "boot": {"kernel": probe, "cmdline": CMDLINE},
        });
        let file = home.join("bare.json");
        fs::write(&file, document.to_string())?;
        lodge(own, home, &["create", &file.to_string_lossy()])?;
        for _ in 0..ROUNDS {
            lodge(own, home, &["start", "bare", "--wait", "ready", "--timeout", "30"])?;
            whole.push(moment(own, home, "bare", "ready")?);
            lodge(own, home, &["stop", "--force", "bare"])?;
            bare.push(by_hand(backend, &found, &probe, home)?);
        }
        lodge(own, home, &["rm", "--force", "bare"])?;
        let (whole, bare) = (median(whole), median(bare));
        let measured = format!("{:.0} ms ({whole:.0} - {bare:.0})", whole - bare);
        rows.push(Row { figure, measured, target });
    }
    Ok(rows)
}

fn find(program: &str, variable: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = std::env::split_paths(&path).map(|f| f.join(program)).collect();
    named.into_iter().chain(folders).find(|found| found.is_file())
}

/// The same by hand, without a jail.
fn by_hand(backend: &str, program: &Path, probe: &Path, home: &Path) -> Result<f64> {
    let mut tool: Command = command(&program.to_string_lossy());
    match backend {
        "qemu" => {
            tool.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]);
            tool.args(["-machine", "microvm", "-accel", "kvm", "-m", "128", "-append", CMDLINE]);
            // Where KVM emulates, this register is refused.
            tool.args(["-cpu", "host,-arch-capabilities", "-kernel"]).arg(probe);
        }
        "firecracker" => {
            let config = json!({
                "boot-source": {"kernel_image_path": probe, "boot_args": CMDLINE},
                "machine-config": {"vcpu_count": 1, "mem_size_mib": 128},
                "drives": [],
            });
            let file = home.join("by-hand.json");
            fs::write(&file, config.to_string())?;
            tool.args(["--no-api", "--config-file"]).arg(file);
        }
        _ => {
            tool.args(["--cpus", "boot=1", "--memory", "size=128M", "--serial", "tty"]);
            tool.args(["--console", "off", "--cmdline", CMDLINE, "--kernel"]).arg(probe);
        }
    }
    let begun = Instant::now();
    let mut child =
        tool.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("piped")?);
    let mut line = Vec::new();
    let took = loop {
        line.clear();
        if lines.read_until(b'\n', &mut line)? == 0 {
            end(child)?;
            bail!("{backend} by hand ended before its guest was up");
        }
        if String::from_utf8_lossy(&line).contains(READY) {
            break begun.elapsed().as_secs_f64() * 1000.0;
        }
    };
    end(child)?;
    Ok(took)
}
