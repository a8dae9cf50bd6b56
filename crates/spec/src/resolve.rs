//! `Draft` to `Machine`: applies defaults, parses every name and number, and reports all faults
//! at once. Pure: whether a file or an image exists is asked later, by those who can look.

mod boot;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;

use crate::clashes::check_clashes;
use crate::draft::{
    CpusDraft, CpusFields, DiskDraft, Draft, FileDraft, LimitsDraft, MemoryDraft, MemoryFields,
    NicDraft, OriginDraft, RateLimitDraft, RestartDraft, RestartFields, Scalar, ShareDraft, Size,
};
use crate::extras;
use crate::flist::Transport;
use crate::machine::{
    BackendKind, Cpus, Disk, DiskBus, DiskSource, FileContent, GuestFile, Limits, Machine, Media,
    Memory, Nic, NicModel, Origin, Port, RateLimit, Readiness, Restart, RestartPolicy, Share,
};
use crate::names::{DeviceName, ImageName, Mac, MachineId, Name};
use crate::problem::Problems;
use crate::remote::Remote;
use crate::throttle::DiskLimits;
use crate::units::Bytes;
use crate::wire::{self, Wire};

const MAX_CPUS: u32 = 255;
const MIN_MEMORY: Bytes = Bytes::mib(1);
const MAX_MEMORY: Bytes = Bytes(4 << 40);
const MIN_DISK: Bytes = Bytes::mib(1);
const MAX_DISK: Bytes = Bytes(64 << 40);
const MAX_FILE: usize = 1 << 20;

/// What the host brings to a draft: the identity of a machine that names none.
#[derive(Clone, Copy, Debug)]
pub struct Defaults {
    pub id: MachineId,
}

/// Checks a draft and fills what it leaves open.
pub fn resolve(draft: Draft, defaults: Defaults) -> Result<Machine, Problems> {
    let Draft {
        name,
        uuid,
        cpus,
        memory,
        image,
        image_size,
        flist,
        boot,
        disks,
        nics,
        ports,
        shares,
        files,
        ssh_keys,
        hostname,
        resolvers,
        metadata,
        tags,
        autostart,
        ephemeral,
        restart,
        ready,
        backend,
        accel,
        board,
        limits,
        display,
        smbios,
        mdata,
        cidata,
        bootstrap,
        own_folder,
        origin,
    } = draft;
    let mut p = Problems::default();
    let id = parse(&mut p, "uuid", uuid).unwrap_or(defaults.id);
    let name: Name = parse(&mut p, "name", name).unwrap_or_else(|| {
        format!("m-{}", id.short()).parse().expect("eight hex digits make a label")
    });
    let image: Option<ImageName> = parse(&mut p, "image", image);
    let image_size = image_size.and_then(|s| disk_size(&mut p, "image_size", s));
    if image.is_none() && image_size.is_some() {
        p.add("image_size", "there is no image to size; name one in `image`");
    }
    let cpus = resolve_cpus(&mut p, cpus);
    let memory = resolve_memory(&mut p, memory);
    let mut checked = Vec::new();
    if let Some(image) = &image {
        checked.push(root_disk(DiskSource::Image { image: image.clone(), size: image_size }));
    }
    if flist.is_some() && image.is_some() {
        p.add("flist", "a machine's root is an `image` or an `flist`, not both");
    }
    let small = backend.as_deref() == Some(BackendKind::Firecracker.as_str());
    let flist = flist.and_then(|flist| crate::flist::resolve(&mut p, flist, small));
    if flist.as_ref().is_some_and(|flist| flist.transport == Some(Transport::Disk)) {
        checked.push(root_disk(DiskSource::Flist));
    }
    let boot = boot::resolve(&mut p, image, flist, boot);
    for (i, disk) in disks.unwrap_or_default().into_iter().enumerate() {
        checked.extend(resolve_disk(&mut p, i, disk));
    }
    let nics = nics.unwrap_or_else(|| vec![NicDraft::default()]);
    let nics: Vec<Nic> =
        nics.into_iter().enumerate().filter_map(|(i, n)| resolve_nic(&mut p, id, i, n)).collect();
    let ports = ports.unwrap_or_default();
    let ports: Vec<Port> = ports
        .into_iter()
        .enumerate()
        .filter_map(|(i, d)| crate::ports::resolve(&mut p, i, d))
        .collect();
    let shares = shares.unwrap_or_default();
    let shares: Vec<Share> =
        shares.into_iter().enumerate().filter_map(|(i, s)| resolve_share(&mut p, i, s)).collect();
    let files = files.unwrap_or_default();
    let files: Vec<GuestFile> =
        files.into_iter().enumerate().filter_map(|(i, f)| resolve_file(&mut p, i, f)).collect();
    check_clashes(&mut p, &checked, &nics, &ports, &shares, &files);
    if !ports.is_empty() && nics.iter().all(|nic| nic.wire.is_some()) {
        p.add("ports", "a machine without interfaces on a network has no ports to lead to");
    }
    let ready = ready.and_then(|text| p.take("ready", parse_ready(&text)));
    if nics.is_empty() && matches!(ready, Some(Readiness::Port(_) | Readiness::Dhcp)) {
        p.add("ready", "a machine without interfaces is never seen on a network");
    }
    let machine = Machine {
        hostname: resolve_hostname(&mut p, hostname, &name),
        id,
        name,
        cpus,
        memory,
        boot,
        disks: checked,
        nics,
        ports,
        shares,
        files,
        ssh_keys: resolve_keys(&mut p, ssh_keys),
        resolvers: resolve_resolvers(&mut p, resolvers),
        metadata: resolve_map(&mut p, "metadata", metadata),
        tags: resolve_map(&mut p, "tags", tags),
        autostart: autostart.unwrap_or(false),
        ephemeral: ephemeral.unwrap_or(false),
        restart: resolve_restart(&mut p, restart),
        ready,
        backend: auto(&mut p, "backend", backend),
        accel: auto(&mut p, "accel", accel),
        board: auto(&mut p, "board", board),
        limits: resolve_limits(&mut p, limits),
        display: display.and_then(|d| extras::resolve_display(&mut p, d)).map(Box::new),
        smbios: smbios.map(|s| Box::new(extras::resolve_smbios(&mut p, s))),
        mdata: mdata.map(|m| Box::new(extras::resolve_mdata(&mut p, m))),
        cidata: cidata.map(|files| extras::resolve_cidata(&mut p, files)).unwrap_or_default(),
        bootstrap: bootstrap.and_then(|b| extras::resolve_bootstrap(&mut p, b)).map(Box::new),
        own_folder: own_folder.unwrap_or(false),
        origin: origin.and_then(|o| resolve_origin(&mut p, o)),
    };
    p.or(machine)
}

pub(crate) fn parse<T>(p: &mut Problems, path: &str, text: Option<String>) -> Option<T>
where
    T: FromStr<Err: Display>,
{
    text.and_then(|text| p.take(path, text.parse()))
}

/// A word where `auto` and absence mean that Lodge chooses.
fn auto<T>(p: &mut Problems, path: &str, text: Option<String>) -> Option<T>
where
    T: FromStr<Err: Display>,
{
    parse(p, path, text.filter(|t| t != "auto"))
}

fn bytes(p: &mut Problems, path: &str, size: Size) -> Option<Bytes> {
    match size {
        Size::Bytes(n) => Some(Bytes(n)),
        Size::Text(text) => p.take(path, text.parse()),
    }
}

fn in_range<T: PartialOrd + Display>(p: &mut Problems, path: &str, value: T, low: T, high: T) -> T {
    if value < low || value > high {
        p.add(path, format!("{value} is out of range; {low} to {high} is possible"));
    }
    value
}

fn disk_size(p: &mut Problems, path: &str, size: Size) -> Option<Bytes> {
    let size = bytes(p, path, size)?;
    in_range(p, path, size, MIN_DISK, MAX_DISK);
    if !size.0.is_multiple_of(512) {
        p.add(path, format!("{size} is not a whole number of 512-byte sectors"));
    }
    Some(size)
}

fn resolve_cpus(p: &mut Problems, draft: Option<CpusDraft>) -> Cpus {
    let CpusFields { count, max, threads, cores } = match draft {
        None => CpusFields::default(),
        Some(CpusDraft::Count(n)) => CpusFields { count: Some(n), ..CpusFields::default() },
        Some(CpusDraft::Detailed(fields)) => fields,
    };
    let count = in_range(p, "cpus.count", count.unwrap_or(1), 1, MAX_CPUS);
    let max = in_range(p, "cpus.max", max.unwrap_or(count), 1, MAX_CPUS);
    if max < count {
        p.add("cpus.max", format!("{max} is less than the {count} CPUs at boot"));
    }
    let threads = in_range(p, "cpus.threads", threads.unwrap_or(1), 1, 8);
    let cores = cores.map(|n| in_range(p, "cpus.cores", n, 1, MAX_CPUS));
    let per_socket = cores.unwrap_or(1).saturating_mul(threads);
    if per_socket > 0 && !max.is_multiple_of(per_socket) {
        let shape = format!("{} cores × {threads} threads", cores.unwrap_or(1));
        p.add("cpus.max", format!("{max} CPUs cannot be divided into sockets of {shape}"));
    }
    Cpus { count, max, threads, cores }
}

fn resolve_memory(p: &mut Problems, draft: Option<MemoryDraft>) -> Memory {
    let simple = |size| MemoryFields { size: Some(size), ..MemoryFields::default() };
    let MemoryFields { size, max } = match draft {
        None => MemoryFields::default(),
        Some(MemoryDraft::Bytes(n)) => simple(Size::Bytes(n)),
        Some(MemoryDraft::Text(text)) => simple(Size::Text(text)),
        Some(MemoryDraft::Detailed(fields)) => fields,
    };
    let size = size.and_then(|s| bytes(p, "memory.size", s)).unwrap_or(Bytes::mib(512));
    let max = max.and_then(|s| bytes(p, "memory.max", s)).unwrap_or(size);
    for (path, value) in [("memory.size", size), ("memory.max", max)] {
        in_range(p, path, value, MIN_MEMORY, MAX_MEMORY);
        if !value.0.is_multiple_of(Bytes::MIB) {
            p.add(path, format!("{value} is not a whole number of MiB"));
        }
    }
    if max < size {
        p.add("memory.max", format!("{max} is less than the {size} at boot"));
    }
    if !(max.0 - max.0.min(size.0)).is_multiple_of(128 * Bytes::MIB) {
        p.add("memory.max", "memory is plugged in by 128 MiB; make the room a multiple of that");
    }
    Memory { size, max }
}

/// The disk that booting an image or an flist implies.
fn root_disk(source: DiskSource) -> Disk {
    Disk {
        name: "root".parse().expect("a device name"),
        source,
        bus: DiskBus::Virtio,
        media: Media::Disk,
        read_only: false,
        serial: "root".into(),
        first: false,
        limits: None,
    }
}

fn host_path(p: &mut Problems, path: &str, text: String) -> PathBuf {
    if !text.starts_with('/') {
        p.add(path, format!("{text:?} is not an absolute host path"));
    }
    if text.contains([',', '\0', '\n']) {
        p.add(path, "a host path with a comma or a control character is not supported");
    }
    PathBuf::from(text)
}

fn resolve_disk(p: &mut Problems, i: usize, draft: DiskDraft) -> Option<Disk> {
    let at = |field: &str| format!("disks[{i}].{field}");
    let DiskDraft {
        name,
        source,
        layered,
        image,
        size,
        bus,
        media,
        read_only,
        serial,
        first,
        limits,
    } = draft;
    let media = parse(p, &at("media"), media).unwrap_or(Media::Disk);
    let default_bus = match media {
        Media::Disk => DiskBus::Virtio,
        Media::Cdrom => DiskBus::Ide,
    };
    let bus = parse(p, &at("bus"), bus).unwrap_or(default_bus);
    if media == Media::Cdrom && bus == DiskBus::Virtio {
        p.add(at("bus"), "a CD-ROM is on `ide` or `scsi`");
    }
    let size = size.and_then(|s| disk_size(p, &at("size"), s));
    let source = match (source, image, size) {
        (Some(_), Some(_), _) => {
            p.add(at("image"), "a disk comes from `source` or from `image`, not from both");
            return None;
        }
        (Some(_), None, Some(_)) => {
            p.add(at("size"), "a disk with a `source` has the size of its source");
            return None;
        }
        (Some(path), None, None) if path.starts_with(extras::OWN) => {
            DiskSource::Own(p.take(&at("source"), extras::own_path(&path))?)
        }
        (Some(address), None, None) if Remote::is_meant(&address) => {
            if layered == Some(true) || media == Media::Cdrom {
                p.add(at("source"), "a disk of a server is a whole disk, used in place");
            }
            DiskSource::Remote(p.take(&at("source"), address.parse())?)
        }
        (Some(path), None, None) if layered == Some(true) => {
            DiskSource::Above(host_path(p, &at("source"), path))
        }
        (Some(path), None, None) => DiskSource::Path(host_path(p, &at("source"), path)),
        (None, Some(image), size) => {
            DiskSource::Image { image: p.take(&at("image"), image.parse())?, size }
        }
        (None, None, Some(size)) if media == Media::Disk => DiskSource::Blank { size },
        (None, None, Some(_) | None) => {
            p.add(format!("disks[{i}]"), "a disk needs a `source`, an `image` or a `size`");
            return None;
        }
    };
    let name: DeviceName = parse(p, &at("name"), Some(name.unwrap_or_else(|| format!("disk{i}"))))?;
    let serial = serial.unwrap_or_else(|| name.as_str().chars().take(20).collect());
    if serial.len() > 20
        || !serial.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    {
        p.add(
            at("serial"),
            "a serial has at most 20 letters, digits, hyphens, dots or underscores",
        );
    }
    let read_only = read_only.unwrap_or(false) || media == Media::Cdrom;
    let first = first.unwrap_or(false);
    for (place, why) in limits.iter().flat_map(DiskLimits::faults) {
        p.add(at(&format!("limits.{place}")), why);
    }
    Some(Disk { name, source, bus, media, read_only, serial, first, limits })
}

fn resolve_nic(p: &mut Problems, id: MachineId, i: usize, draft: NicDraft) -> Option<Nic> {
    let at = |field: &str| format!("nics[{i}].{field}");
    let NicDraft {
        name,
        network,
        wire,
        model,
        mac,
        address,
        prefix,
        gateway,
        segment,
        gateway6,
        mtu,
        lease,
        guard,
        rx_limit,
        tx_limit,
    } = draft;
    let name = parse(p, &at("name"), Some(name.unwrap_or_else(|| format!("nic{i}"))));
    let wire: Option<Wire> = parse(p, &at("wire"), wire);
    let usual = if wire.is_some() { wire::NETWORK } else { "default" };
    let network = parse(p, &at("network"), Some(network.unwrap_or_else(|| usual.into())));
    let model = parse(p, &at("model"), model).unwrap_or(NicModel::Virtio);
    let mac = parse(p, &at("mac"), mac).unwrap_or_else(|| Mac::derived(id, i));
    let address: Option<Ipv4Addr> = parse(p, &at("address"), address);
    let subnet = extras::resolve_subnet(p, &at, address, prefix, gateway);
    let segment = extras::resolve_segment(p, &at, subnet, segment, gateway6);
    let mtu = extras::resolve_mtu(p, &at, mtu);
    if wire.is_some() && (address.is_some() || segment.is_some() || guard.is_some()) {
        p.add(at("wire"), "what is wired to a link of the host has its addresses from there");
    }
    let mtu = mtu.or_else(|| wire.as_ref().and_then(Wire::mtu));
    let lease = parse(p, &at("lease"), lease).unwrap_or(extras::Lease::Full);
    let guard = guard.map(|g| Box::new(extras::resolve_guard(p, &at("guard"), g)));
    let rx_limit = rx_limit.and_then(|limit| resolve_rate(p, &at("rx_limit"), limit));
    let tx_limit = tx_limit.and_then(|limit| resolve_rate(p, &at("tx_limit"), limit));
    let (name, network) = (name?, network?);
    Some(Nic {
        name,
        network,
        wire,
        model,
        mac,
        address,
        subnet,
        segment,
        mtu,
        lease,
        guard,
        rx_limit,
        tx_limit,
    })
}

fn resolve_rate(p: &mut Problems, at: &str, draft: RateLimitDraft) -> Option<RateLimit> {
    let RateLimitDraft { bandwidth, refill_ms, burst } = draft;
    let Some(bandwidth) = bandwidth else {
        p.add(at, "a limit needs a `bandwidth`");
        return None;
    };
    let bandwidth = bytes(p, &format!("{at}.bandwidth"), bandwidth)?.0;
    let burst = burst.and_then(|b| bytes(p, &format!("{at}.burst"), b)).unwrap_or(Bytes(0)).0;
    let refill_ms = refill_ms.unwrap_or(1000);
    in_range(p, &format!("{at}.bandwidth"), bandwidth, 1, 1 << 40);
    in_range(p, &format!("{at}.refill_ms"), refill_ms, 1, 3_600_000);
    let limit = RateLimit { bandwidth, refill_ms, burst };
    if limit.bucket().size == 0 {
        p.add(at, "nothing would ever pass; make the bandwidth or the refill time larger");
    }
    Some(limit)
}

fn resolve_share(p: &mut Problems, i: usize, draft: ShareDraft) -> Option<Share> {
    let ShareDraft { source, tag, read_only } = draft;
    let (Some(source), Some(tag)) = (source, tag) else {
        p.add(format!("shares[{i}]"), "a share needs a `source` and a `tag`");
        return None;
    };
    Some(Share {
        source: host_path(p, &format!("shares[{i}].source"), source),
        tag: p.take(&format!("shares[{i}].tag"), tag.parse())?,
        read_only: read_only.unwrap_or(true),
    })
}

fn resolve_file(p: &mut Problems, i: usize, draft: FileDraft) -> Option<GuestFile> {
    let at = |field: &str| format!("files[{i}].{field}");
    let FileDraft { path, source, content, mode } = draft;
    let mode = match mode {
        None => 0o600,
        Some(text) => match u32::from_str_radix(&text, 8) {
            Ok(mode @ 0..=0o7777) => mode,
            Ok(_) | Err(_) => {
                p.add(at("mode"), format!("{text:?} is not octal permission bits such as 0644"));
                0o600
            }
        },
    };
    let Some(path) = path else {
        p.add(format!("files[{i}]"), "a file needs a `path`");
        return None;
    };
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    let sound = path.starts_with('/')
        && !path.contains('\0')
        && path.len() <= 1024
        && parts.iter().all(|part| !matches!(*part, "" | "." | ".."));
    if !sound {
        p.add(at("path"), format!("{path:?} is not an absolute path of a file in the guest"));
    }
    let content = file_content(p, &format!("files[{i}]"), source, content);
    let Some(content) = content else {
        p.add(format!("files[{i}]"), "a file needs either `source` or `content`");
        return None;
    };
    Some(GuestFile { path, content, mode })
}

/// `None`: there are both, or neither.
pub(crate) fn file_content(
    p: &mut Problems,
    path: &str,
    source: Option<String>,
    content: Option<String>,
) -> Option<FileContent> {
    match (source, content) {
        (Some(source), None) => {
            Some(FileContent::Source(host_path(p, &format!("{path}.source"), source)))
        }
        (None, Some(text)) => {
            if text.len() > MAX_FILE {
                let what = "a file given as text has at most 1 MiB; use `source`";
                p.add(format!("{path}.content"), what);
            }
            Some(FileContent::Text(text))
        }
        (Some(_), Some(_)) | (None, None) => None,
    }
}

fn parse_ready(text: &str) -> Result<Readiness, String> {
    let error = || format!("{text:?} is not console:REGEX, port:N or dhcp");
    match text.split_once(':') {
        Some(("console", regex)) if !regex.is_empty() => Ok(Readiness::Console(regex.to_owned())),
        Some(("port", port)) => match port.parse() {
            Ok(port) if port > 0 => Ok(Readiness::Port(port)),
            Ok(_) | Err(_) => Err(error()),
        },
        Some(_) => Err(error()),
        None if text == "dhcp" => Ok(Readiness::Dhcp),
        None => Err(error()),
    }
}

fn resolve_hostname(p: &mut Problems, hostname: Option<String>, name: &Name) -> String {
    let hostname = hostname.unwrap_or_else(|| name.to_string());
    let sound = hostname.len() <= 253 && hostname.split('.').all(|l| l.parse::<Name>().is_ok());
    if !sound {
        p.add("hostname", format!("{hostname:?} is not a host name"));
    }
    hostname
}

fn resolve_keys(p: &mut Problems, keys: Option<Vec<String>>) -> Vec<String> {
    let keys = keys.unwrap_or_default();
    for (i, key) in keys.iter().enumerate() {
        if key.contains("PRIVATE KEY") {
            p.add(format!("ssh_keys[{i}]"), "this is a private key; give the public one");
        } else if key.split_whitespace().count() < 2 || key.trim().contains('\n') {
            p.add(format!("ssh_keys[{i}]"), "this is not one line of a public SSH key");
        }
    }
    keys
}

fn resolve_resolvers(p: &mut Problems, list: Option<Vec<String>>) -> Vec<Ipv4Addr> {
    let list = list.unwrap_or_default().into_iter().enumerate();
    list.filter_map(|(i, text)| parse(p, &format!("resolvers[{i}]"), Some(text))).collect()
}

fn resolve_map(
    p: &mut Problems,
    path: &str,
    map: Option<BTreeMap<String, Scalar>>,
) -> BTreeMap<String, Scalar> {
    let map = map.unwrap_or_default();
    if map.keys().any(|key| key.is_empty() || key.len() > 255) {
        p.add(path, "a key has 1 to 255 bytes");
    }
    map
}

fn resolve_restart(p: &mut Problems, draft: Option<RestartDraft>) -> Restart {
    let RestartFields { policy, max } = match draft {
        None => RestartFields::default(),
        Some(RestartDraft::Policy(policy)) => RestartFields { policy: Some(policy), max: None },
        Some(RestartDraft::Detailed(fields)) => fields,
    };
    let policy = parse(p, "restart.policy", policy).unwrap_or(RestartPolicy::Never);
    Restart { policy, max: in_range(p, "restart.max", max.unwrap_or(5), 1, 1000) }
}

fn resolve_origin(p: &mut Problems, draft: OriginDraft) -> Option<Origin> {
    let OriginDraft { door: Some(door), id: Some(id), owner, document } = draft else {
        p.add("origin", "an origin needs a `door` and an `id`");
        return None;
    };
    let (owner, document) = (owner.unwrap_or_default(), document.unwrap_or_default());
    Some(Origin { door, id, owner, document })
}

fn resolve_limits(p: &mut Problems, draft: Option<LimitsDraft>) -> Limits {
    let LimitsDraft { cpu_percent, cpu_weight, memory, threads } = draft.unwrap_or_default();
    Limits {
        cpu_percent: cpu_percent.map(|n| in_range(p, "limits.cpu_percent", n, 1, 100 * MAX_CPUS)),
        cpu_weight: in_range(p, "limits.cpu_weight", cpu_weight.unwrap_or(100), 1, 10_000),
        memory: memory.and_then(|s| bytes(p, "limits.memory", s)),
        threads: in_range(p, "limits.threads", threads.unwrap_or(512), 16, 65_536),
    }
}
