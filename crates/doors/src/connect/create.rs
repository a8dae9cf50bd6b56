//! A described machine of theirs as a draft of ours. Pure: whether files exist is asked later, by
//! those who can look. Every field is carried over or refused by name; none is dropped.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Component, Path, PathBuf};

use lodge_spec::draft::{
    BootDraft, CpusDraft, CpusFields, DiskDraft, Draft, MemoryDraft, MemoryFields, NicDraft,
    OriginDraft, RateLimitDraft, Size,
};
use lodge_spec::names::MachineId;
use uuid::Uuid;

use super::proto::vmprovisioner::v1::{
    BootConfig, ConsoleConfig, CpuConfig, IPv4Config, MemoryConfig, NetworkInterface, NetworkMode,
    RateLimit, StorageDevice, VmConfig,
};
use super::{Beneath, DOOR, Settings};

const MIB: i64 = 1 << 20;
/// Their identities as ours: any text, the same each time.
const NAMESPACE: Uuid = Uuid::from_u128(0x6c6f_6467_652d_4d65_8000_6d65_7461_6c64);

/// What became of a request.
#[derive(Debug)]
pub(super) struct Translated {
    pub(super) draft: Draft,
    /// For each disk of the draft, its place in the request.
    pub(super) order: Vec<usize>,
}

/// Under which identity a machine of theirs is kept.
pub(super) fn identity(vm_id: &str) -> MachineId {
    MachineId(Uuid::new_v5(&NAMESPACE, vm_id.as_bytes()))
}

/// `^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$`
pub(super) fn is_vm_id(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(b))
}

/// The checks that come first, in the order and the words that callers know.
pub(super) fn check(config: &VmConfig) -> Result<(), String> {
    let missing = |what: &str| Err(format!("{what} configuration is required"));
    if config.cpu.is_unset() {
        return missing("cpu");
    }
    if config.memory.is_unset() {
        return missing("memory");
    }
    if config.boot.is_unset() {
        return missing("boot");
    }
    if config.cpu.vcpu_count <= 0 {
        return Err("vcpu_count must be greater than 0".into());
    }
    let most = config.cpu.max_vcpu_count;
    if most > 0 && most < config.cpu.vcpu_count {
        return Err("max_vcpu_count must be greater than or equal to vcpu_count".into());
    }
    if config.memory.size_bytes <= 0 {
        return Err("memory size_bytes must be greater than 0".into());
    }
    if config.boot.kernel_path.is_empty() {
        return Err("kernel_path is required".into());
    }
    if config.storage.is_empty() {
        return Err("at least one storage device is required".into());
    }
    match config.storage.iter().position(|d| d.path.is_empty()) {
        Some(i) => Err(format!("storage device {i} path is required")),
        None => Ok(()),
    }
}

/// `config` comes back as it will be shown: with its root marked and its room for memory summed.
pub(super) fn translate(
    config: &mut VmConfig,
    vm_id: &str,
    owner: &str,
    settings: &Settings,
) -> Result<Translated, String> {
    check(config)?;
    let assets = &Assets { roots: &settings.assets, beneath: &settings.beneath };
    let root = root(&config.storage)?;
    config.storage[root].is_root_device = true;
    let mut order: Vec<usize> = (0..config.storage.len()).collect();
    // The guest's first disk is its root.
    order.sort_by_key(|i| *i != root);
    let disks: Result<Vec<DiskDraft>, String> =
        order.iter().map(|i| disk(*i, &config.storage[*i], assets)).collect();
    let disks = disks?;
    unique("storage", config.storage.iter().map(|d| d.id.as_str()))?;
    unique("network", config.network.iter().map(|n| n.id.as_str()))?;
    let nics: Result<Vec<NicDraft>, String> =
        config.network.iter().enumerate().map(|(i, n)| nic(i, n)).collect();
    console(&config.console)?;
    let id = identity(vm_id);
    let named = vm_id.parse::<lodge_spec::names::Name>().is_ok();
    let cpus = cpus(&config.cpu)?;
    let memory = memory(config.memory.get_or_insert_default())?;
    let boot = boot(&config.boot, &config.storage[root], assets)?;
    let document = serde_json::to_string(config).map_err(|e| e.to_string())?;
    let draft = Draft {
        name: Some(if named { vm_id.to_owned() } else { format!("vm-{}", id.short()) }),
        uuid: Some(id.to_string()),
        cpus: Some(cpus),
        memory: Some(memory),
        boot: Some(boot),
        disks: Some(disks),
        nics: Some(nics?),
        resolvers: resolvers(&config.network)?,
        backend: Some(settings.backend.clone()),
        accel: Some(settings.accel.clone()),
        origin: Some(OriginDraft {
            door: Some(DOOR.to_owned()),
            id: Some(vm_id.to_owned()),
            owner: Some(owner.to_owned()),
            document: Some(document),
        }),
        ..Draft::default()
    };
    Ok(Translated { draft, order })
}

/// Maps that nothing here gives a meaning to must be empty.
fn no_options(path: &str, map: &BTreeMap<String, String>) -> Result<(), String> {
    match map.keys().next() {
        Some(key) => Err(format!("{path}.{key} is not supported by any backend here")),
        None => Ok(()),
    }
}

fn unique<'a>(path: &str, ids: impl Iterator<Item = &'a str>) -> Result<(), String> {
    let mut seen = std::collections::BTreeSet::new();
    for id in ids.filter(|id| !id.is_empty()) {
        let sound = id.len() <= 64 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !sound {
            return Err(format!(
                "{path}: id {id:?} is not made of 1 to 64 letters, digits and underscores"
            ));
        }
        if !seen.insert(id) {
            return Err(format!("{path}: id {id:?} appears twice"));
        }
    }
    Ok(())
}

fn root(storage: &[StorageDevice]) -> Result<usize, String> {
    let marked: Vec<usize> = (0..storage.len()).filter(|i| storage[*i].is_root_device).collect();
    match marked.as_slice() {
        [] => Ok(0),
        [one] => Ok(*one),
        [first, second, ..] => Err(format!(
            "storage[{second}].is_root_device: storage[{first}] is the root device already"
        )),
    }
}

/// Where host paths may lie.
struct Assets<'a> {
    roots: &'a [PathBuf],
    beneath: &'a Beneath,
}

impl Assets<'_> {
    /// A host path below one of the folders.
    fn take(&self, path: &str, field: &str) -> Result<String, String> {
        let plain = Path::new(path)
            .components()
            .all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
        if !path.starts_with('/') || !plain {
            return Err(format!("{field}: {path:?} is not a plain absolute path"));
        }
        let full = Path::new(path);
        let Some(root) = self.roots.iter().find(|r| full.starts_with(r) && full != r.as_path())
        else {
            let roots: Vec<String> = self.roots.iter().map(|r| r.display().to_string()).collect();
            let roots = roots.join(", ");
            return Err(format!("{field}: {path} is not below an asset folder ({roots})"));
        };
        (self.beneath)(root, full).map_err(|why| format!("{field}: {why}"))?;
        Ok(path.to_owned())
    }
}

fn cpus(cpu: &CpuConfig) -> Result<CpusDraft, String> {
    no_options("cpu.features", &cpu.features)?;
    let count = u32::try_from(cpu.vcpu_count).map_err(|e| e.to_string())?;
    let most = u32::try_from(cpu.max_vcpu_count);
    let most = most.map_err(|_| "cpu.max_vcpu_count must not be negative".to_owned())?;
    let most = if most == 0 { count } else { most };
    let (mut threads, mut cores) = (None, None);
    if let Some(topology) = cpu.topology.as_option() {
        let part = |name: &str, value: i32| match u32::try_from(value) {
            Ok(0) => Ok(1),
            Ok(n) => Ok(n),
            Err(_) => Err(format!("cpu.topology.{name} must not be negative")),
        };
        let sockets = part("sockets", topology.sockets)?;
        let per_socket = part("cores_per_socket", topology.cores_per_socket)?;
        let per_core = part("threads_per_core", topology.threads_per_core)?;
        let product = u64::from(sockets) * u64::from(per_socket) * u64::from(per_core);
        if product != u64::from(most) {
            return Err(format!(
                "cpu.topology: {sockets} sockets of {per_socket} cores of {per_core} threads make \
                 {product} CPUs, not {most}"
            ));
        }
        (threads, cores) = (Some(per_core), Some(per_socket));
    }
    Ok(CpusDraft::Detailed(CpusFields { count: Some(count), max: Some(most), threads, cores }))
}

fn memory(memory: &mut MemoryConfig) -> Result<MemoryDraft, String> {
    no_options("memory.backing", &memory.backing)?;
    let (size, most) = (memory.size_bytes, memory.max_size_bytes);
    if size % MIB != 0 {
        return Err(format!("memory size_bytes {size} is not a whole number of MiB"));
    }
    if most < 0 || (most > 0 && most < size) {
        return Err(format!("memory max_size_bytes {most} is less than size_bytes {size}"));
    }
    let grows = most > size;
    if memory.hotplug_enabled && !grows {
        return Err("memory.hotplug_enabled needs a max_size_bytes above size_bytes".into());
    }
    memory.hotplug_enabled = grows;
    let bytes = |n: i64| Some(Size::Bytes(n.unsigned_abs()));
    Ok(MemoryDraft::Detailed(MemoryFields { size: bytes(size), max: bytes(most.max(size)) }))
}

fn boot(boot: &BootConfig, root: &StorageDevice, assets: &Assets<'_>) -> Result<BootDraft, String> {
    no_options("boot.boot_options", &boot.boot_options)?;
    let kernel = assets.take(&boot.kernel_path, "boot.kernel_path")?;
    let initrd = match boot.initrd_path.as_str() {
        "" => None,
        path => Some(assets.take(path, "boot.initrd_path")?),
    };
    // A kernel that cannot find its root without one has it beside itself.
    let beside = format!("{kernel}.initrd");
    let initrd = initrd.or_else(|| assets.take(&beside, "").ok());
    let mut cmdline = boot.kernel_args.clone();
    if !cmdline.split_whitespace().any(|word| word.starts_with("root=")) {
        // What the smallest of the hypervisors adds by itself, the others must be told.
        let rights = if root.read_only { "ro" } else { "rw" };
        cmdline = format!("{cmdline} root=/dev/vda {rights}").trim_start().to_owned();
    }
    let kernel = Some(kernel);
    Ok(BootDraft { kernel, initrd, cmdline: Some(cmdline), ..BootDraft::default() })
}

fn disk(i: usize, disk: &StorageDevice, assets: &Assets<'_>) -> Result<DiskDraft, String> {
    no_options(&format!("storage[{i}].options"), &disk.options)?;
    if !matches!(disk.interface_type.as_str(), "" | "virtio" | "virtio-blk") {
        return Err(format!(
            "storage[{i}].interface_type: {:?} is not supported; virtio-blk is",
            disk.interface_type
        ));
    }
    let source = assets.take(&disk.path, &format!("storage[{i}].path"))?;
    Ok(DiskDraft {
        name: Some(format!("disk{i}")),
        source: Some(source),
        layered: Some(!disk.read_only),
        read_only: Some(disk.read_only),
        serial: Some(match disk.id.as_str() {
            "" if disk.is_root_device => "rootfs".to_owned(),
            "" => format!("drive_{i}"),
            id => id.chars().take(20).collect(),
        }),
        ..DiskDraft::default()
    })
}

fn nic(i: usize, nic: &NetworkInterface) -> Result<NicDraft, String> {
    let at = |field: &str| format!("network[{i}].{field}");
    no_options(&at("options"), &nic.options)?;
    if !matches!(nic.interface_type.as_str(), "" | "virtio" | "virtio-net") {
        let kind = &nic.interface_type;
        return Err(format!("{}: {kind:?} is not supported; virtio-net is", at("interface_type")));
    }
    if !nic.tap_device.is_empty() {
        return Err(format!("{}: interfaces are made here, none is taken over", at("tap_device")));
    }
    match nic.mode.as_known() {
        Some(NetworkMode::Unspecified | NetworkMode::Ipv4Only) => {}
        Some(NetworkMode::DualStack | NetworkMode::Ipv6Only) => {
            return Err(format!("{}: networks here have no IPv6", at("mode")));
        }
        None => return Err(format!("{}: {} is not known", at("mode"), nic.mode.to_i32())),
    }
    if nic.ipv6_config.is_set() {
        return Err(format!("{}: networks here have no IPv6", at("ipv6_config")));
    }
    let rx_limit = limit(&at("rx_rate_limit"), nic.rx_rate_limit.as_option())?;
    let tx_limit = limit(&at("tx_rate_limit"), nic.tx_rate_limit.as_option())?;
    let address = match nic.ipv4_config.as_option() {
        Some(ipv4) => address(&at("ipv4_config"), ipv4)?,
        None => None,
    };
    let mac = Some(nic.mac_address.clone()).filter(|mac| !mac.is_empty());
    let name = Some(format!("nic{i}"));
    Ok(NicDraft { name, mac, address, rx_limit, tx_limit, ..NicDraft::default() })
}

/// A limit on bytes; one that says nothing is none.
fn limit(at: &str, limit: Option<&RateLimit>) -> Result<Option<RateLimitDraft>, String> {
    let Some(RateLimit { bandwidth, refill_time, burst, .. }) = limit else { return Ok(None) };
    let part = |name: &str, value: i64| {
        u64::try_from(value).map_err(|_| format!("{at}.{name} must not be negative"))
    };
    let (bandwidth, burst) = (part("bandwidth", *bandwidth)?, part("burst", *burst)?);
    let refill_ms = match part("refill_time", *refill_time)? {
        0 => 1000,
        ms => ms,
    };
    match (bandwidth, burst) {
        (0, 0) => Ok(None),
        (0, _) => Err(format!("{at}: a burst needs a bandwidth")),
        (_, _) => Ok(Some(RateLimitDraft {
            bandwidth: Some(Size::Bytes(bandwidth)),
            refill_ms: Some(refill_ms),
            burst: Some(Size::Bytes(burst)),
        })),
    }
}

/// The fixed address, if one is asked for. Guests are told all the rest by DHCP.
fn address(at: &str, ipv4: &IPv4Config) -> Result<Option<String>, String> {
    let IPv4Config { address, netmask, gateway, dhcp, .. } = ipv4;
    if address.is_empty() {
        return match netmask.is_empty() && gateway.is_empty() {
            true => Ok(None),
            false => Err(format!("{at}: a netmask or a gateway needs an address")),
        };
    }
    if *dhcp {
        return Err(format!("{at}: dhcp and a fixed address exclude each other"));
    }
    let parsed: Ipv4Addr =
        address.parse().map_err(|_| format!("{at}.address: {address:?} is no IPv4 address"))?;
    let [a, b, c, _] = parsed.octets();
    if !netmask.is_empty() && netmask != "255.255.255.0" {
        return Err(format!("{at}.netmask: the network's is 255.255.255.0"));
    }
    let own = Ipv4Addr::new(a, b, c, 2).to_string();
    if !gateway.is_empty() && *gateway != own {
        return Err(format!("{at}.gateway: the network's is {own}"));
    }
    Ok(Some(address.clone()))
}

fn resolvers(network: &[NetworkInterface]) -> Result<Option<Vec<String>>, String> {
    let mut lists = network
        .iter()
        .filter_map(|n| n.ipv4_config.as_option())
        .map(|ipv4| &ipv4.dns_servers)
        .filter(|list| !list.is_empty());
    let first = lists.next().cloned();
    match lists.any(|list| Some(list) != first.as_ref()) {
        true => Err("network: all interfaces of a machine have the same dns_servers".into()),
        false => Ok(first),
    }
}

fn console(console: &ConsoleConfig) -> Result<(), String> {
    let ConsoleConfig { output, input, console_type, .. } = console;
    if !matches!(console_type.as_str(), "" | "serial") {
        return Err(format!("console.console_type: {console_type:?} is not supported; serial is"));
    }
    for (field, value) in [("output", output), ("input", input)] {
        if !value.is_empty() {
            return Err(format!(
                "console.{field}: the console is kept by the server; leave this empty"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::Tenants;
    use lodge_spec::resolve::{Defaults, resolve};

    const GOOD: &str = r#"{"cpu":{"vcpu_count":1},"memory":{"size_bytes":134217728},
        "boot":{"kernel_path":"/opt/vm-assets/vmlinux","kernel_args":"console=ttyS0 pci=off"},
        "storage":[{"path":"/opt/vm-assets/rootfs.ext4"}]}"#;

    fn config(change: &str) -> VmConfig {
        let mut whole: serde_json::Value = serde_json::from_str(GOOD).unwrap();
        let change: serde_json::Value = serde_json::from_str(change).unwrap();
        for (key, value) in change.as_object().unwrap() {
            whole[key] = value.clone();
        }
        serde_json::from_value(whole).unwrap()
    }

    fn run(change: &str) -> Result<(Translated, VmConfig), String> {
        let mut config = config(change);
        let settings = Settings {
            assets: vec!["/opt/vm-assets".into(), "/data".into()],
            beneath: Box::new(|_, path| match path.ends_with("vmlinux.initrd") {
                true => Err("not there".into()),
                false => Ok(()),
            }),
            tenants: Tenants::default(),
            backend: "auto".into(),
            accel: "auto".into(),
            audit: Box::new(|_| {}),
            warn: Box::new(|_| {}),
            trace: Box::new(|_| {}),
            health: Box::new(|| Ok(String::new())),
        };
        let translated = translate(&mut config, "ud-1", "a", &settings)?;
        let id = identity("ud-1");
        resolve(translated.draft.clone(), Defaults { id }).map_err(|p| p.to_string())?;
        Ok((translated, config))
    }

    #[test]
    fn the_smallest_machine_has_a_root() {
        let (translated, config) = run("{}").unwrap();
        assert!(config.storage[0].is_root_device);
        let boot = translated.draft.boot.unwrap();
        assert_eq!(boot.cmdline.unwrap(), "console=ttyS0 pci=off root=/dev/vda rw");
        assert_eq!(translated.draft.nics, Some(Vec::new()));
        assert_eq!(translated.draft.disks.unwrap()[0].layered, Some(true));
    }

    #[test]
    fn the_marked_disk_comes_first_and_is_told_by_its_place() {
        let (translated, config) =
            run(r#"{"storage":[{"path":"/data/a","read_only":true},{"path":"/data/b","is_root_device":true}]}"#)
                .unwrap();
        assert_eq!(translated.order, [1, 0]);
        assert!(!config.storage[0].is_root_device);
        let disks = translated.draft.disks.unwrap();
        assert_eq!(disks[0].source.as_deref(), Some("/data/b"));
        assert_eq!((disks[1].layered, disks[1].read_only), (Some(false), Some(true)));
    }

    #[test]
    fn nothing_is_dropped_in_silence() {
        for (change, complaint) in [
            (
                r#"{"storage":[{"path":"/a","is_root_device":true},{"path":"/b","is_root_device":true}]}"#,
                "storage[1].is_root_device",
            ),
            (r#"{"storage":[{"path":"/etc/shadow"}]}"#, "not below an asset folder"),
            (r#"{"storage":[{"path":"/data/../etc/shadow"}]}"#, "not a plain absolute path"),
            (r#"{"storage":[{"path":"/data"}]}"#, "not below"),
            (r#"{"storage":[{"path":"/data/a","interface_type":"nvme"}]}"#, "interface_type"),
            (
                r#"{"storage":[{"path":"/data/a","options":{"docker_image":"x"}}]}"#,
                "options.docker_image",
            ),
            (r#"{"storage":[{"path":"/data/a","id":"a-b"}]}"#, "a-b"),
            (r#"{"storage":[{"path":"/data/a","id":"x"},{"path":"/data/b","id":"x"}]}"#, "twice"),
            (r#"{"cpu":{"vcpu_count":1,"features":{"avx":"off"}}}"#, "cpu.features.avx"),
            (r#"{"cpu":{"vcpu_count":1,"max_vcpu_count":-1}}"#, "max_vcpu_count"),
            (r#"{"cpu":{"vcpu_count":4,"topology":{"sockets":3}}}"#, "make 3 CPUs, not 4"),
            (r#"{"memory":{"size_bytes":134217729}}"#, "whole number of MiB"),
            (r#"{"memory":{"size_bytes":1048576,"hotplug_enabled":true}}"#, "max_size_bytes"),
            (
                r#"{"memory":{"size_bytes":1048576,"backing":{"hugepages":"2M"}}}"#,
                "memory.backing.hugepages",
            ),
            (
                r#"{"boot":{"kernel_path":"/data/k","boot_options":{"order":"c"}}}"#,
                "boot_options.order",
            ),
            (r#"{"network":[{"mode":"NETWORK_MODE_IPV6_ONLY"}]}"#, "no IPv6"),
            (r#"{"network":[{"mode":9}]}"#, "9 is not known"),
            (r#"{"network":[{"tap_device":"tap0"}]}"#, "tap_device"),
            (r#"{"network":[{"tx_rate_limit":{"bandwidth":-1}}]}"#, "tx_rate_limit.bandwidth"),
            (r#"{"network":[{"ipv4_config":{"address":"10.0.2.40","dhcp":true}}]}"#, "exclude"),
            (r#"{"network":[{"ipv4_config":{"gateway":"10.0.2.2"}}]}"#, "needs an address"),
            (
                r#"{"network":[{"ipv4_config":{"address":"10.0.2.40","netmask":"255.0.0.0"}}]}"#,
                "netmask",
            ),
            (r#"{"console":{"enabled":true,"output":"/tmp/x"}}"#, "console.output"),
        ] {
            let said = run(change).expect_err(change);
            assert!(said.contains(complaint), "{change}: {said}");
        }
    }

    #[test]
    fn neutral_values_pass_and_the_rest_is_carried_over() {
        let (translated, config) = run(
            r#"{"cpu":{"vcpu_count":2,"max_vcpu_count":4,"topology":{"sockets":2,"cores_per_socket":2,"threads_per_core":1}},
            "memory":{"size_bytes":134217728,"hotplug_enabled":true,"max_size_bytes":268435456},
            "network":[{"id":"eth0","mode":"NETWORK_MODE_IPV4_ONLY","mac_address":"02:00:00:00:00:01",
              "ipv4_config":{"address":"10.0.2.40","netmask":"255.255.255.0","gateway":"10.0.2.2","dns_servers":["9.9.9.9"]},
              "rx_rate_limit":{}}],
            "console":{"enabled":true,"console_type":"serial"},"metadata":{"team":"x"}}"#,
        )
        .unwrap();
        let draft = translated.draft;
        assert_eq!(draft.resolvers, Some(vec!["9.9.9.9".to_owned()]));
        assert_eq!(draft.nics.unwrap()[0].address.as_deref(), Some("10.0.2.40"));
        assert_eq!(config.metadata["team"], "x");
        let back: VmConfig =
            serde_json::from_str(&draft.origin.unwrap().document.unwrap()).unwrap();
        assert_eq!(back, config);
    }

    #[test]
    fn identities_are_words() {
        for good in ["a", "ud-0123456789abcdef", "A_b-9"] {
            assert!(is_vm_id(good), "{good}");
        }
        for bad in ["", "-a", "a b", "a/b", "é", &"x".repeat(64)] {
            assert!(!is_vm_id(bad), "{bad}");
        }
        assert_ne!(identity("a"), identity("b"));
    }
}
