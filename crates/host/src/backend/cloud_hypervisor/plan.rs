//! How Cloud Hypervisor is started for a machine: one process whose arguments describe the machine
//! whole. Interfaces and its own control socket are descriptors. Pure, like every plan.

use lodge_jail::JailPlan;
use lodge_spec::capability::{Feature, needs};
use lodge_spec::machine::{Accel, BackendKind, Machine, RateLimit};
use serde_json::json;

use crate::backend::vmm::{self, VmmFacts};
use crate::backend::{
    BootFiles, Cgroup, ConsoleEnd, FIRST_FD, Forward, Launch, Listen, Survey, Tap, Unsupported,
    WardenPlan,
};
use crate::facts::Facts;

const CLOUD: BackendKind = BackendKind::CloudHypervisor;
/// What it has beyond CPUs, memory and virtio devices.
const FEATURES: [Feature; 4] =
    [Feature::KernelBoot, Feature::CpuHotplug, Feature::MemoryHotplug, Feature::RateLimits];

/// Plans the start, or says everything that is in the way.
pub fn plan(machine: &Machine, survey: &Survey, facts: &Facts) -> Result<Launch, Vec<Unsupported>> {
    let found = facts.cloud_hypervisor.as_ref();
    let vmm = found.map_err(|why| vec![Unsupported::new("", CLOUD, why)])?;
    let mut notes = Vec::new();
    let mut lacks = obstacles(machine, survey, facts);
    lacks.extend(vmm::accel(machine, facts, CLOUD, &mut notes).err());
    let (steps, files) = match vmm::raw_disks(machine, survey, CLOUD) {
        Ok(raw) if lacks.is_empty() => raw,
        Ok(_) => return Err(lacks),
        Err(more) => {
            lacks.extend(more);
            return Err(lacks);
        }
    };
    notes.push(format!("cloud-hypervisor {}: the least that can do it all", vmm.version_text()));
    let mut binds = vmm::code(&vmm.program);
    binds.extend([vmm::device("/dev/kvm"), vmm::device("/dev/urandom")]);
    if let BootFiles::Kernel { kernel, initrd, .. } = &survey.boot {
        binds.push(vmm::file(kernel, "/kernel".into(), false));
        binds.extend(initrd.as_ref().map(|path| vmm::file(path, "/initrd".into(), false)));
    }
    for (i, path) in files.iter().enumerate() {
        let writable = machine.disks.get(i).is_some_and(|disk| !disk.read_only);
        binds.push(vmm::file(path, format!("/disks/{i}"), writable));
    }
    let calls = vec![json!({"method": "GET", "path": "/api/v1/vm.info"})];
    let warden = warden(machine, survey, facts, vmm, binds, files.len());
    Ok(Launch { backend: CLOUD, accel: Accel::Kvm, board: None, notes, steps, warden, calls })
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

/// Numbers of the descriptors that it is given.
struct Numbers {
    terminal: i32,
    api: i32,
    status: i32,
    first_tap: i32,
}

const NUMBERS: Numbers = Numbers {
    terminal: FIRST_FD,
    api: FIRST_FD + 1,
    status: FIRST_FD + 2,
    first_tap: FIRST_FD + 10,
};

fn arguments(machine: &Machine, survey: &Survey, disks: usize) -> Vec<String> {
    let mut argv = vec!["cloud-hypervisor".to_owned()];
    let mut add = |option: &str, value: String| argv.extend([option.to_owned(), value]);
    add("--api-socket", format!("fd={}", NUMBERS.api));
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
    add(
        "--memory",
        match most > size {
            true => format!("size={size},hotplug_method=acpi,hotplug_size={}", most - size),
            false => format!("size={size}"),
        },
    );
    for i in 0..disks {
        let read_only = machine.disks.get(i).is_none_or(|disk| disk.read_only);
        let rights = if read_only { ",readonly=on" } else { "" };
        let serial = machine.disks.get(i).map_or("lodge-files", |disk| disk.serial.as_str());
        add("--disk", format!("path=/disks/{i},id=disk{i},serial={serial}{rights}"));
    }
    for (i, nic) in machine.nics.iter().enumerate() {
        let limit = nic.rx_limit.as_ref().map(RateLimit::bucket);
        let limit = limit.map(|bucket| {
            format!(
                ",bw_size={},bw_refill_time={},bw_one_time_burst={}",
                bucket.size, bucket.refill_time, bucket.one_time_burst
            )
        });
        let fd = NUMBERS.first_tap + i as i32;
        add("--net", format!("fd={fd},id=nic{i},mac={}{}", nic.mac, limit.unwrap_or_default()));
    }
    add("--rng", "src=/dev/urandom".into());
    add("--balloon", "size=0,deflate_on_oom=on".into());
    add("--serial", "tty".into());
    add("--console", "off".into());
    argv
}

fn warden(
    machine: &Machine,
    survey: &Survey,
    facts: &Facts,
    vmm: &VmmFacts,
    binds: Vec<lodge_jail::Bind>,
    disks: usize,
) -> WardenPlan {
    let taps: Vec<Tap> = (0..machine.nics.len())
        .map(|i| Tap::of(machine, survey, NUMBERS.first_tap + i as i32, i))
        .collect();
    let mut keep_fds = vec![NUMBERS.api];
    keep_fds.extend(taps.iter().map(|tap| tap.fd));
    let jail = JailPlan {
        program: vmm.program.path.clone(),
        argv: arguments(machine, survey, disks),
        env: Vec::new(),
        binds,
        keep_fds,
        uid: survey.uid,
        gid: survey.uid,
        stage: survey.run.clone(),
        cgroups: Vec::new(),
        status_fd: NUMBERS.status,
        writes_files: false,
        binds_sockets: false,
        network: None,
        terminal: Some(NUMBERS.terminal),
    };
    WardenPlan {
        id: machine.id.to_string(),
        name: machine.name.to_string(),
        run: survey.run.clone(),
        console_log: survey.state.join("console.log"),
        console: ConsoleEnd::Terminal(NUMBERS.terminal),
        files: Vec::new(),
        sockets: vec![Listen { fd: NUMBERS.api, path: survey.run.join("api.sock") }],
        taps,
        ports: Forward::all(machine),
        ready: survey.ready.clone(),
        cgroup: Cgroup::of(machine, facts),
        jail,
    }
}
