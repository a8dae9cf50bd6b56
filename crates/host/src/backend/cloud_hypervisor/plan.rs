//! How Cloud Hypervisor is started for a machine: one process whose arguments describe the machine
//! whole. Interfaces and its own control socket are descriptors. Pure, like every plan.

use std::path::{Path, PathBuf};

use lodge_jail::JailPlan;
use lodge_spec::capability::{Feature, needs};
use lodge_spec::flist::Transport;
use lodge_spec::machine::{Accel, BackendKind, Machine, RateLimit};
use serde_json::json;

use crate::backend::vmm::{self, Prepared};
use crate::backend::{BootFiles, Launch, Listen, RootServer, Step, Survey, Tap, Unsupported};
use crate::facts::Facts;

const CLOUD: BackendKind = BackendKind::CloudHypervisor;
/// What it has beyond CPUs, memory and virtio devices.
const FEATURES: [Feature; 5] = [
    Feature::KernelBoot,
    Feature::CpuHotplug,
    Feature::MemoryHotplug,
    Feature::RateLimits,
    Feature::FlistRoot,
];
/// Inside the jail: the disks that are plugged in while it runs, by their names.
const PLUGGED: &str = "/plugged";
/// Inside the jail: where its memory is saved.
pub(super) const MEMORY_URL: &str = "file:///memory";
/// The socket of whoever serves the root, inside.
const ROOT: &str = "/root.sock";

/// Plans the start, or says everything that is in the way.
pub fn plan(machine: &Machine, survey: &Survey, facts: &Facts) -> Result<Launch, Vec<Unsupported>> {
    let found = facts.cloud_hypervisor.as_ref();
    let vmm = found.map_err(|why| vec![Unsupported::new("", CLOUD, why)])?;
    let lacks = obstacles(machine, survey, facts);
    let prepared = vmm::prepare(machine, survey, facts, (CLOUD, vmm), lacks)?;
    let Prepared { notes, mut steps, disks, mut binds } = prepared;
    binds.push(vmm::device("/dev/urandom"));
    let folder = plugged(&survey.state);
    binds.push(vmm::file(&folder, PLUGGED.into(), true));
    steps.push(Step::Folder { path: folder });
    if survey.root.is_some() {
        binds.push(vmm::file(&RootServer::socket(&survey.run), ROOT.into(), true));
    }
    let tap = |i: usize| Tap::of(machine, survey, vmm::FIRST_TAP + i as i32, i);
    let taps: Vec<Tap> = (0..machine.nics.len()).map(tap).collect();
    let mut keep_fds = vec![vmm::API];
    keep_fds.extend(taps.iter().map(|tap| tap.fd));
    let argv = arguments(machine, survey, disks);
    let jail = JailPlan { keep_fds, ..vmm::jail(survey, vmm, argv, binds) };
    let sockets = vec![Listen { fd: vmm::API, path: survey.run.join("api.sock") }];
    let mut warden = vmm::warden(machine, survey, facts, (sockets, taps), jail);
    warden.root = survey.root.as_ref().map(|root| RootServer {
        config: root.config(vmm::ROOT, survey.uid),
        jail: None,
        own: vmm::ROOT,
        log: survey.state.join("flist.log"),
    });
    let calls = vec![json!({"method": "GET", "path": "/api/v1/vm.info"})];
    let (backend, accel, board) = (CLOUD, Accel::Kvm, None);
    let (shape, memory) = (Vec::new(), None);
    let launch = Launch { backend, accel, board, notes, steps, warden, calls, shape, memory };
    Ok(launch.sealed())
}

/// Described by what was saved, but for the descriptors of its interfaces; it stands still
/// afterwards.
pub(crate) fn go_on(launch: &mut Launch) {
    let argv = &mut launch.warden.jail.argv;
    let nets = argv.iter().filter_map(|value| value.strip_prefix("fd=")?.split_once(",id="));
    let fds: Vec<String> = nets
        .map(|(fd, rest)| format!("{}@[{fd}]", rest.split(',').next().unwrap_or_default()))
        .collect();
    // Its own name and its socket stay.
    argv.truncate(3);
    let nets = match fds.is_empty() {
        true => String::new(),
        false => format!(",net_fds=[{}]", fds.join(",")),
    };
    argv.extend(["--restore".to_owned(), format!("source_url={MEMORY_URL}{nets}")]);
}

fn obstacles(machine: &Machine, survey: &Survey, facts: &Facts) -> Vec<Unsupported> {
    let lack = |path: &str, why: &str| Unsupported::new(path, CLOUD, why);
    let mut list: Vec<Unsupported> = needs(machine)
        .iter()
        .filter(|need| !FEATURES.contains(&need.feature))
        .map(|need| Unsupported::need(need, CLOUD, None))
        .collect();
    if machine.board.is_some() {
        list.push(lack("board", "cloud-hypervisor has only its own board"));
    }
    if survey.root.as_ref().is_some_and(|root| root.transport == Transport::NineP) {
        list.push(lack("flist.transport", "it has virtio-fs and no 9p"));
    }
    match &survey.boot {
        BootFiles::Firmware if machine.disks.is_empty() => {}
        BootFiles::Firmware => {
            list.push(lack("boot", "booting without a kernel takes its own firmware"));
        }
        BootFiles::Kernel { pvh: false, .. } => {
            list.push(lack("boot.kernel", "the kernel has no PVH entry"));
        }
        BootFiles::Kernel { pci: false, .. } if !machine.disks.is_empty() => {
            list.push(lack("boot.cmdline", "pci=off hides all its devices"));
        }
        BootFiles::Kernel { .. } => {}
    }
    for (i, nic) in machine.nics.iter().enumerate() {
        if nic.rx_limit != nic.tx_limit {
            let at = format!("nics[{i}].tx_limit");
            list.push(lack(&at, "one limit holds for both directions; make them the same"));
        }
    }
    if let (false, Err(why)) = (machine.nics.is_empty(), &facts.tun) {
        list.push(lack("nics", &format!("no tap interfaces: {why}")));
    }
    list
}

/// Where disks that are plugged in are shown to a machine's hypervisor.
pub(crate) fn plugged(state: &Path) -> PathBuf {
    state.join("plugged")
}

/// The same, as the hypervisor sees one.
pub(super) fn plugged_inside(name: &str) -> String {
    format!("{PLUGGED}/{name}")
}

/// What it calls a disk.
pub(crate) fn disk_id(name: &str) -> String {
    format!("disk-{name}")
}

/// What it calls an interface.
pub(crate) fn nic_id(name: &str) -> String {
    format!("nic-{name}")
}

fn arguments(machine: &Machine, survey: &Survey, disks: usize) -> Vec<String> {
    let mut argv = vec!["cloud-hypervisor".to_owned()];
    let mut add = |option: &str, value: String| argv.extend([option.to_owned(), value]);
    add("--api-socket", format!("fd={}", vmm::API));
    if let BootFiles::Kernel { initrd, cmdline, .. } = &survey.boot {
        add("--kernel", "/kernel".into());
        if initrd.is_some() {
            add("--initramfs", "/initrd".into());
        }
        add("--cmdline", cmdline.clone());
    }
    let lodge_spec::machine::Cpus { count, max, threads, cores } = machine.cpus;
    let cores = cores.unwrap_or(max / threads);
    let sockets = max / (cores * threads);
    add("--cpus", format!("boot={count},max={max},topology={threads}:{cores}:1:{sockets}"));
    let (size, most) = (machine.memory.size.0, machine.memory.max.0);
    // Whoever serves the root answers in the guest's own memory.
    let shared = if survey.root.is_some() { ",shared=on" } else { "" };
    add(
        "--memory",
        match most > size {
            true => format!("size={size},hotplug_method=acpi,hotplug_size={}{shared}", most - size),
            false => format!("size={size}{shared}"),
        },
    );
    if let Some(root) = &survey.root {
        add("--fs", format!("tag={},socket={ROOT},num_queues=1,queue_size=512", root.tag()));
    }
    for i in 0..disks {
        let rights = if vmm::is_writable(machine, i) { "" } else { ",readonly=on" };
        let serial = machine.disks.get(i).map_or("lodge-files", |disk| disk.serial.as_str());
        let id = disk_id(machine.disks.get(i).map_or("files", |disk| disk.name.as_str()));
        add("--disk", format!("path=/disks/{i},id={id},serial={serial}{rights}"));
    }
    for (i, nic) in machine.nics.iter().enumerate() {
        let limit = nic.rx_limit.as_ref().map(RateLimit::bucket);
        let limit = limit.map(|bucket| {
            format!(
                ",bw_size={},bw_refill_time={},bw_one_time_burst={}",
                bucket.size, bucket.refill_time, bucket.one_time_burst
            )
        });
        let fd = vmm::FIRST_TAP + i as i32;
        let id = nic_id(nic.name.as_str());
        add("--net", format!("fd={fd},id={id},mac={}{}", nic.mac, limit.unwrap_or_default()));
    }
    add("--rng", "src=/dev/urandom".into());
    add("--balloon", "size=0,deflate_on_oom=on".into());
    add("--serial", "tty".into());
    add("--console", "off".into());
    argv
}
