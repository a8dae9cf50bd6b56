//! How Firecracker is started for a machine: one process, then the calls that describe the machine
//! to it. Pure, like every plan.

use lodge_jail::JailPlan;
use lodge_spec::capability::{Feature, needs};
use lodge_spec::machine::{Accel, BackendKind, Machine};
use serde_json::{Value, json};

use super::control::metrics;
use crate::backend::vmm::{self, Prepared, VmmFacts};
use crate::backend::{BootFiles, Launch, Step, Survey, Tap, Unsupported};
use crate::facts::Facts;

const FIRECRACKER: BackendKind = BackendKind::Firecracker;
/// What it has beyond CPUs, memory and virtio devices.
const FEATURES: [Feature; 2] = [Feature::KernelBoot, Feature::RateLimits];
const MAX_CPUS: u32 = 32;
/// The first version that plugs memory in.
const PLUGS_MEMORY: (u32, u32) = (1, 14);
/// Room for more is a multiple of the first, wherever it is; the guest is given blocks of the
/// second. MiB.
const SLOT_MIB: u64 = 128;
const BLOCK_MIB: u64 = 2;
/// Inside the jail: the files of its saved memory, of its devices and of what the memory holds.
pub(super) const STATE: &str = "/memory/state";
pub(super) const CONTENTS: &str = "/memory/contents";
/// Inside the jail: where it makes its socket.
const SOCKET: &str = "/run/api.sock";

/// Plans the start, or says everything that is in the way.
pub fn plan(machine: &Machine, survey: &Survey, facts: &Facts) -> Result<Launch, Vec<Unsupported>> {
    let found = facts.firecracker.as_ref();
    let vmm = found.map_err(|why| vec![Unsupported::new("", FIRECRACKER, why)])?;
    let mut lacks = obstacles(machine, survey, facts);
    lacks.extend(memory_obstacle(machine, vmm));
    let prepared = vmm::prepare(machine, survey, facts, (FIRECRACKER, vmm), lacks)?;
    let Prepared { notes, mut steps, disks, mut binds } = prepared;
    let api = survey.run.join("api");
    steps.push(Step::OwnFolder { path: api.clone(), owner: survey.uid });
    steps.push(Step::Pipe { path: metrics(&api), owner: survey.uid });
    let taps = taps(machine, survey);
    let calls = calls(machine, survey, disks, &taps);
    if !taps.is_empty() {
        binds.push(vmm::device("/dev/net/tun"));
    }
    binds.push(vmm::file(&api, "/run".into(), true));
    let argv = ["firecracker", "--api-sock", SOCKET, "--id", &machine.id.to_string()];
    let jail = JailPlan {
        binds_sockets: true,
        network: taps.first().map(|tap| tap.fd),
        ..vmm::jail(survey, vmm, argv.map(str::to_owned).into(), binds)
    };
    let warden = vmm::warden(machine, survey, facts, (Vec::new(), taps), jail);
    let (backend, accel, board) = (FIRECRACKER, Accel::Kvm, None);
    let (shape, memory) = (Vec::new(), None);
    let launch = Launch { backend, accel, board, notes, steps, warden, calls, shape, memory };
    Ok(launch.sealed())
}

/// Told of nothing but where its memory is; it stands still afterwards.
pub(crate) fn go_on(launch: &mut Launch) {
    launch.calls.retain(|call| call["path"] == json!("/metrics"));
    launch.calls.push(put(
        "/snapshot/load",
        json!({
            "snapshot_path": STATE,
            "mem_backend": {"backend_type": "File", "backend_path": CONTENTS},
            "resume_vm": false,
        }),
    ));
}

fn obstacles(machine: &Machine, survey: &Survey, facts: &Facts) -> Vec<Unsupported> {
    let lack = |path: &str, why: String| Unsupported::new(path, FIRECRACKER, why);
    let mut list: Vec<Unsupported> = needs(machine)
        .iter()
        .filter(|need| !FEATURES.contains(&need.feature))
        // It depends on the version.
        .filter(|need| need.feature != Feature::MemoryHotplug)
        .map(|need| Unsupported::need(need, FIRECRACKER, None))
        .collect();
    if machine.board.is_some() {
        list.push(lack("board", "firecracker has only its own board".into()));
    }
    if machine.cpus.count > MAX_CPUS || (machine.cpus.count > 1 && machine.cpus.count % 2 == 1) {
        let why =
            format!("{} CPUs are not 1 or an even number up to {MAX_CPUS}", machine.cpus.count);
        list.push(lack("cpus.count", why));
    }
    if machine.cpus.threads > 2 {
        list.push(lack("cpus.threads", "a core has one or two threads".into()));
    }
    if matches!(survey.boot, BootFiles::Firmware) && !machine.disks.is_empty() {
        list.push(lack("boot", "firecracker boots kernels only".into()));
    }
    if let BootFiles::Kernel { elf: false, .. } = survey.boot {
        list.push(lack(
            "boot.kernel",
            "no uncompressed kernel could be taken out of this one".into(),
        ));
    }
    if survey.files_disk.is_some() {
        // The guest finds the disk by its serial number, and disks here have none.
        let why = "its disks have no serial number, by which a guest finds its files";
        list.push(lack("files", why.into()));
    }
    let networks: std::collections::BTreeSet<_> = machine.nics.iter().map(|n| &n.network).collect();
    if networks.len() > 1 {
        list.push(lack("nics", "all interfaces are on one network".into()));
    }
    if !machine.nics.is_empty() && facts.rootless {
        list.push(lack("nics", "firecracker opens its interfaces itself, which takes root".into()));
    }
    if let (false, Err(why)) = (machine.nics.is_empty(), &facts.tun) {
        list.push(lack("nics", format!("no tap interfaces: {why}")));
    }
    list
}

/// What is in the way of room for more memory, if it is asked for.
fn memory_obstacle(machine: &Machine, vmm: &VmmFacts) -> Option<Unsupported> {
    let (major, minor) = PLUGS_MEMORY;
    if room_mib(machine).is_none() || vmm.is_at_least(major, minor) {
        return None;
    }
    let this = vmm.version_text();
    let why = format!("plugging in memory takes version {major}.{minor}; this one is {this}");
    Some(Unsupported::new("memory.max", FIRECRACKER, why))
}

/// MiB that can be plugged in; nothing where none can.
fn room_mib(machine: &Machine) -> Option<u64> {
    let (size, most) = (machine.memory.size.as_mib(), machine.memory.max.as_mib());
    most.checked_sub(size).filter(|room| *room > 0)
}

fn taps(machine: &Machine, survey: &Survey) -> Vec<Tap> {
    let tap = |i: usize| Tap {
        opened_by: Some(survey.uid),
        ..Tap::of(machine, survey, vmm::FIRST_TAP + i as i32, i)
    };
    (0..machine.nics.len()).map(tap).collect()
}

fn put(path: impl Into<String>, body: Value) -> Value {
    json!({"method": "PUT", "path": path.into(), "body": body})
}

/// The machine as Firecracker is told of it; the last call starts it.
fn calls(machine: &Machine, survey: &Survey, disks: usize, taps: &[Tap]) -> Vec<Value> {
    let mut list = vec![put(
        "/machine-config",
        json!({
            "vcpu_count": machine.cpus.count,
            "mem_size_mib": machine.memory.size.as_mib(),
            "smt": machine.cpus.threads == 2,
        }),
    )];
    if let BootFiles::Kernel { initrd, cmdline, .. } = &survey.boot {
        let mut source = json!({"kernel_image_path": "/kernel", "boot_args": cmdline});
        if initrd.is_some() {
            source["initrd_path"] = json!("/initrd");
        }
        list.push(put("/boot-source", source));
    }
    for i in 0..disks {
        list.push(put(
            format!("/drives/disk{i}"),
            json!({
                "drive_id": format!("disk{i}"),
                "path_on_host": format!("/disks/{i}"),
                // The command line names the root; nothing is to be added to it.
                "is_root_device": false,
                "is_read_only": !vmm::is_writable(machine, i),
            }),
        ));
    }
    for (i, (nic, tap)) in machine.nics.iter().zip(taps).enumerate() {
        let mut interface = json!({
            "iface_id": format!("nic{i}"),
            "guest_mac": nic.mac.to_string(),
            "host_dev_name": tap.interface,
        });
        for (name, limit) in [("rx_rate_limiter", nic.rx_limit), ("tx_rate_limiter", nic.tx_limit)]
        {
            if let Some(limit) = limit {
                interface[name] = json!({"bandwidth": limit.bucket()});
            }
        }
        list.push(put(format!("/network-interfaces/nic{i}"), interface));
    }
    if let Some(room) = room_mib(machine) {
        let body = json!({
            "total_size_mib": room,
            "slot_size_mib": SLOT_MIB,
            "block_size_mib": BLOCK_MIB,
        });
        list.push(put("/hotplug/memory", body));
    }
    list.push(put("/entropy", json!({})));
    list.push(put("/balloon", json!({"amount_mib": 0, "deflate_on_oom": true})));
    list.push(put("/metrics", json!({"metrics_path": "/run/metrics"})));
    list.push(put("/actions", json!({"action_type": "InstanceStart"})));
    list
}
