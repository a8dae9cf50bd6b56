//! How QEMU is started for a machine: which board, which accelerator, and the arguments. Pure:
//! the same machine, survey and facts give the same plan, on any host.

mod devices;
mod extras;

pub(crate) use devices::{block_nodes, disk_device, disk_id, nic_device};

use lodge_jail::{Bind, FuseMount, JailPlan};
use lodge_spec::capability::{Feature, Need, needs};
use lodge_spec::machine::{Accel, BackendKind, Board, Boot, BootDevice, Firmware, Machine};
use serde_json::json;

use crate::backend::qemu::{MODULES, QemuFacts, throttle};
use crate::backend::{
    BootFiles, BootstrapEnd, Cgroup, ConsoleEnd, FIRST_FD, Forward, Launch, Listen, Step, Survey,
    Tap, Unsupported, WardenPlan,
};
use crate::facts::Facts;
use crate::flist::root::Root;
use crate::kvm::KvmFact;

use devices::Arguments;

const QEMU: BackendKind = BackendKind::Qemu;
/// virtio-mmio transports of a microvm.
const MICROVM_DEVICES: usize = 8;

/// What the board has beyond virtio devices.
pub fn features(board: Board, qemu: &QemuFacts) -> Vec<Feature> {
    let mut list = vec![Feature::KernelBoot, Feature::DiskLimits];
    match board {
        Board::Microvm => {}
        Board::Q35 | Board::Pc => list.extend([
            Feature::BiosBoot,
            Feature::NetworkBoot,
            Feature::IdeDisks,
            Feature::ScsiDisks,
            Feature::Cdrom,
            Feature::LegacyNics,
            Feature::CpuHotplug,
            Feature::MemoryHotplug,
            Feature::Shares,
            Feature::Display,
            Feature::Smbios,
            Feature::SecondSerial,
            Feature::Cidata,
            Feature::FlistRoot,
        ]),
    }
    if board == Board::Q35 && qemu.uefi.is_some() {
        list.push(Feature::UefiBoot);
    }
    list
}

/// Plans the start, or says everything that is in the way.
pub fn plan(machine: &Machine, survey: &Survey, facts: &Facts) -> Result<Launch, Vec<Unsupported>> {
    let qemu = facts.qemu.as_ref().map_err(|why| vec![Unsupported::new("", QEMU, why)])?;
    let mut notes = Vec::new();
    let accel = choose_accel(machine, qemu, &facts.kvm, &mut notes)?;
    if accel == Accel::Tcg && in_turns(machine, qemu) {
        notes.push("processors take turns: before 8.1, QEMU may crash Linux otherwise".into());
    }
    let board = choose_board(machine, survey, qemu, &mut notes)?;
    if !survey.nics.is_empty()
        && let Err(why) = &facts.tun
    {
        return Err(vec![Unsupported::new("nics", QEMU, format!("no tap interfaces: {why}"))]);
    }
    let mut args = Arguments::new(board, FIRST_FD);
    for folder in &qemu.data {
        args.add("-L", folder.display().to_string());
    }
    identity(&mut args, machine);
    processor(&mut args, machine, survey, accel, board, qemu, facts);
    boot(&mut args, machine, survey, accel, board, qemu, facts.tsc_khz);
    devices::all(&mut args, machine, survey);
    extras::all(&mut args, machine, survey);
    let mut calls =
        vec![json!({"execute": "qmp_capabilities"}), json!({"execute": "query-status"})];
    for disk in machine.disks.iter().filter(|disk| disk.limits.is_some()) {
        let arguments = throttle::arguments(disk, board);
        calls.push(json!({"execute": throttle::COMMAND, "arguments": arguments}));
    }
    let warden = warden(machine, survey, facts, qemu, args, accel);
    let board = Some(board);
    let (steps, shape, memory) = (survey.steps.clone(), Vec::new(), None);
    let backend = QEMU;
    let launch = Launch { backend, accel, board, notes, steps, warden, calls, shape, memory };
    Ok(launch.sealed())
}

/// Waits for its memory, and then to be set going.
pub(crate) fn go_on(launch: &mut Launch) {
    launch.warden.jail.argv.extend(["-S", "-incoming", "defer"].map(str::to_owned));
}

/// KVM only where it was proven, unless someone insists.
fn choose_accel(
    machine: &Machine,
    qemu: &QemuFacts,
    kvm: &KvmFact,
    notes: &mut Vec<String>,
) -> Result<Accel, Vec<Unsupported>> {
    let refuse = |why: String| Err(vec![Unsupported::new("accel", QEMU, why)]);
    let has = |accel: Accel| qemu.accels.contains(accel.as_str());
    match machine.accel {
        Some(Accel::Kvm) if !kvm.opens() => refuse(kvm.describe()),
        Some(accel) if !has(accel) => refuse(format!("this QEMU was built without {accel}")),
        Some(accel) => {
            notes.push(format!("{accel} because it was asked for; {}", kvm.describe()));
            Ok(accel)
        }
        None if kvm.runs_linux() && has(Accel::Kvm) => {
            notes.push(format!("kvm: {}", kvm.describe()));
            Ok(Accel::Kvm)
        }
        None if has(Accel::Tcg) => {
            notes.push(format!("tcg: {}", kvm.describe()));
            Ok(Accel::Tcg)
        }
        None => refuse(format!("no accelerator is usable: {}", kvm.describe())),
    }
}

/// Whether emulated processors run one after the other.
fn in_turns(machine: &Machine, qemu: &QemuFacts) -> bool {
    machine.cpus.max > 1 && qemu.emulates_in_turns()
}

/// The least board that suffices.
fn choose_board(
    machine: &Machine,
    survey: &Survey,
    qemu: &QemuFacts,
    notes: &mut Vec<String>,
) -> Result<Board, Vec<Unsupported>> {
    let lacks = |board: Board| -> Vec<Unsupported> {
        let has = features(board, qemu);
        let mut list: Vec<Unsupported> = needs(machine)
            .iter()
            .filter(|Need { feature, .. }| !has.contains(feature))
            .map(|need| Unsupported::need(need, QEMU, Some(board)))
            .collect();
        match board {
            Board::Microvm => list.extend(microvm_obstacles(survey)),
            Board::Q35 | Board::Pc => list.extend(pci_obstacle(survey, board)),
        }
        list.extend(extras::obstacle(machine, qemu));
        if !qemu.has_board(board) {
            let why = format!("QEMU {} has no {board} board", qemu.version_text());
            list.push(Unsupported::new("board", QEMU, why));
        }
        list
    };
    if let Some(board) = machine.board {
        let list = lacks(board);
        return if list.is_empty() { Ok(board) } else { Err(list) };
    }
    let ide = needs(machine).iter().any(|n| n.feature == Feature::IdeDisks);
    let order = if ide {
        // An IDE disk means a guest that knows the old board best.
        [Board::Pc, Board::Q35]
    } else {
        [Board::Microvm, Board::Q35]
    };
    let mut reasons = Vec::new();
    let mut all = Vec::new();
    for board in order {
        let list = lacks(board);
        if list.is_empty() {
            notes.push(match reasons.first() {
                None => format!("{board}: the least board that suffices"),
                Some(why) => format!("{board}: {why}"),
            });
            return Ok(board);
        }
        reasons = list.iter().map(Unsupported::to_string).collect();
        all.extend(list);
    }
    Err(all)
}

/// A guest that was told not to look for PCI finds nothing on a board that has nothing else.
fn pci_obstacle(survey: &Survey, board: Board) -> Option<Unsupported> {
    let devices = survey.disks.len() + survey.nics.len() + usize::from(survey.files_disk.is_some());
    match &survey.boot {
        BootFiles::Kernel { pci: false, .. } if devices > 0 => {
            let why = format!("pci=off hides the devices of the {board} board");
            Some(Unsupported::new("boot.cmdline", QEMU, why))
        }
        BootFiles::Kernel { .. } | BootFiles::Firmware => None,
    }
}

fn microvm_obstacles(survey: &Survey) -> Vec<Unsupported> {
    let why = |path: &str, why: &str| Unsupported::new(path, QEMU, why);
    // Besides disks and interfaces: random numbers and the balloon.
    let devices = survey.disks.len() + survey.nics.len() + usize::from(survey.files_disk.is_some());
    match &survey.boot {
        BootFiles::Firmware => vec![why("boot", "the microvm board boots kernels only")],
        BootFiles::Kernel { pvh: false, .. } => {
            vec![why("boot.kernel", "the kernel has no PVH entry, which the microvm board needs")]
        }
        BootFiles::Kernel { virtio_mmio: false, .. } if devices > 0 => {
            vec![why("boot.kernel", "the kernel is not known to find devices on the microvm board")]
        }
        BootFiles::Kernel { .. } if devices + 2 > MICROVM_DEVICES => {
            vec![why("", "the microvm board has room for six devices")]
        }
        BootFiles::Kernel { .. } => Vec::new(),
    }
}

fn identity(args: &mut Arguments, machine: &Machine) {
    args.add("-name", format!("guest={},debug-threads=off", machine.name));
    args.add("-uuid", machine.id.to_string());
    for flag in ["-nodefaults", "-no-user-config"] {
        args.flag(flag);
    }
    args.add("-display", "none");
    args.add("-vga", "none");
    args.add("-rtc", "base=utc");
    args.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
}

fn processor(
    args: &mut Arguments,
    machine: &Machine,
    survey: &Survey,
    accel: Accel,
    board: Board,
    qemu: &QemuFacts,
    facts: &Facts,
) {
    let mut option = format!("type={board}");
    if board == Board::Microvm && accel == Accel::Tcg && qemu.microvm_needs_pic_off() {
        option.push_str(",pic=off");
    }
    if board == Board::Microvm {
        args.add("-global", "virtio-mmio.force-legacy=false");
    }
    if let (Boot::Firmware { firmware: Firmware::Uefi, .. }, Some(_)) = (&machine.boot, &qemu.uefi)
    {
        option.push_str(",pflash0=uefi-code,pflash1=uefi-vars");
    }
    option.push_str(extras::memory_backend(survey));
    args.add("-machine", option);
    match (accel, &facts.kvm) {
        (Accel::Kvm, KvmFact::Proven { arch_capabilities: false, .. }) => {
            args.add("-accel", "kvm");
            args.add("-cpu", "host,-arch-capabilities");
        }
        (Accel::Kvm, _) => {
            args.add("-accel", "kvm");
            args.add("-cpu", "host");
        }
        (Accel::Tcg, _) => {
            let threads = if in_turns(machine, qemu) { "single" } else { "multi" };
            args.add("-accel", format!("tcg,thread={threads}"));
            args.add("-cpu", "max");
        }
    }
    let lodge_spec::machine::Cpus { count, max, threads, cores } = machine.cpus;
    let cores = cores.unwrap_or(max / threads);
    let sockets = max / (cores * threads);
    args.add(
        "-smp",
        format!("cpus={count},maxcpus={max},sockets={sockets},cores={cores},threads={threads}"),
    );
    let (size, most) = (machine.memory.size.as_mib(), machine.memory.max.as_mib());
    args.add(
        "-m",
        match most > size {
            true => format!("size={size}M,slots=16,maxmem={most}M"),
            false => format!("size={size}M"),
        },
    );
}

fn boot(
    args: &mut Arguments,
    machine: &Machine,
    survey: &Survey,
    accel: Accel,
    board: Board,
    qemu: &QemuFacts,
    tsc_khz: u64,
) {
    match &survey.boot {
        BootFiles::Kernel { kernel, initrd, cmdline, .. } => {
            args.bind_file("/kernel", kernel);
            args.add("-kernel", "/kernel");
            if let Some(initrd) = initrd {
                args.bind_file("/initrd", initrd);
                args.add("-initrd", "/initrd");
            }
            let mut cmdline = cmdline.clone();
            let open = !survey.root.as_ref().is_some_and(Root::says_all);
            if accel == Accel::Tcg && open {
                // On a busy host the ticks that Linux waits for come late, and it gives up: it
                // takes a slow timer for a broken one. On real ones it does not look either.
                cmdline.push_str(" no_timer_check");
                if board == Board::Microvm && tsc_khz > 0 {
                    // Nor does it find out how fast its clock is.
                    cmdline = format!("{cmdline} tsc_early_khz={tsc_khz}");
                }
            }
            args.add("-append", cmdline.trim());
        }
        BootFiles::Firmware => {
            let Boot::Firmware { firmware, order, once } = &machine.boot else { return };
            match (firmware, &qemu.uefi) {
                (Firmware::Uefi, Some((code, _))) => devices::uefi(args, code, survey),
                (Firmware::Uefi, None) | (Firmware::Bios, _) => {
                    let letters: String = order.iter().map(|d| letter(*d)).collect();
                    let once = once.map(|d| format!(",once={}", letter(d))).unwrap_or_default();
                    args.add("-boot", format!("order={letters}{once},menu=off"));
                }
            }
        }
    }
}

fn letter(device: BootDevice) -> char {
    match device {
        BootDevice::Disk => 'c',
        BootDevice::Cdrom => 'd',
        BootDevice::Network => 'n',
    }
}

fn warden(
    machine: &Machine,
    survey: &Survey,
    facts: &Facts,
    qemu: &QemuFacts,
    mut args: Arguments,
    accel: Accel,
) -> WardenPlan {
    let qmp_fd = args.next_fd();
    args.add("-chardev", format!("socket,id=qmp,fd={qmp_fd},server=on,wait=off"));
    args.add("-mon", "chardev=qmp,mode=control");
    let console_fd = args.next_fd();
    args.add("-chardev", format!("socket,id=console,fd={console_fd}"));
    args.add("-serial", "chardev:console");
    let mdata = extras::second_serial(&mut args, machine, survey);
    let screen = extras::screen(&mut args, machine, survey);
    let root = extras::root(&mut args, machine, survey);
    let status_fd = args.next_fd();
    let Arguments { argv, binds, files, taps, mut kept, .. } = args;
    kept.extend([qmp_fd, console_fd]);
    let mut sockets = vec![Listen { fd: qmp_fd, path: survey.run.join("qmp.sock") }];
    let screen = screen.map(|(screen, fd)| {
        sockets.push(Listen { fd, path: screen.monitor.clone() });
        screen
    });
    let all = inside(qemu, accel, binds);
    let id = machine.id;
    let jail = JailPlan {
        program: qemu.program.path.clone(),
        argv,
        // Inside, the program's own folder says nothing about where its parts are.
        env: vec![("QEMU_MODULE_DIR".into(), MODULES.into())],
        binds: all,
        keep_fds: kept,
        uid: survey.uid,
        gid: survey.uid,
        stage: survey.run.clone(),
        cgroups: Vec::new(),
        status_fd,
        writes_files: machine.shares.iter().any(|s| !s.read_only) || root.is_some(),
        binds_sockets: false,
        network: None,
        fuse: root.as_ref().filter(|root| root.config.is_mounted()).and_then(|root| {
            let target = extras::ROOT.into();
            root.jail.map(|socket| FuseMount { target, socket })
        }),
        terminal: None,
    };
    WardenPlan {
        id: id.to_string(),
        name: machine.name.to_string(),
        run: survey.run.clone(),
        console_log: survey.state.join("console.log"),
        console: ConsoleEnd::Socket(console_fd),
        files,
        sockets,
        taps: taps.into_iter().map(|(fd, index)| Tap::of(machine, survey, fd, index)).collect(),
        ports: Forward::all(machine),
        screen,
        mdata,
        root,
        bootstrap: BootstrapEnd::of(machine, &survey.run, &survey.state),
        ready: survey.ready.clone(),
        cgroup: Cgroup::of(machine, facts),
        jail,
    }
}

/// Everything that exists inside: the program's parts, its data, and the machine's own files.
fn inside(qemu: &QemuFacts, accel: Accel, own: Vec<Bind>) -> Vec<Bind> {
    let code = |path: &std::path::PathBuf| Bind {
        source: path.clone(),
        target: path.clone(),
        writable: false,
        device: false,
        executable: true,
    };
    let mut all: Vec<Bind> = qemu.program.files.iter().map(code).collect();
    all.extend(qemu.data.iter().map(|path| Bind { executable: false, ..code(path) }));
    let device =
        |path: &str| Bind { device: true, writable: true, executable: false, ..code(&path.into()) };
    // QEMU tries file locks out on it.
    all.push(device("/dev/null"));
    if accel == Accel::Kvm {
        all.push(device("/dev/kvm"));
    }
    all.extend(own);
    all
}

/// Steps that the firmware asks for; the survey cannot know which firmware QEMU brings.
pub fn firmware_steps(machine: &Machine, survey: &Survey, qemu: &QemuFacts) -> Vec<Step> {
    match (&machine.boot, &qemu.uefi) {
        (Boot::Firmware { firmware: Firmware::Uefi, .. }, Some((_, vars))) => vec![Step::Copy {
            from: vars.clone(),
            path: survey.state.join("uefi-vars.fd"),
            owner: survey.uid,
        }],
        (_, _) => Vec::new(),
    }
}
