//! A machine of this interface in Lodge's own language. The one place that knows both.

use lodge_spec::Draft;
use lodge_spec::draft::{
    BootDraft, CpusDraft, DiskDraft, DisplayDraft, GuardDraft, LimitsDraft, MdataDraft,
    MemoryDraft, NicDraft, OriginDraft, Scalar, Size, SmbiosDraft,
};
use serde_json::Value;

use super::build::{Metadata, World};
use super::disks;
use super::nics;
use super::properties::Brand;
use super::validate::Image;
use super::values::{Object, is_true, number, objects, prefix_of, text, texts};

/// The name of this interface in a machine's origin.
pub(super) const DOOR: &str = "vmadm";

/// What the host's owner has decided.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Host address on which screens are shown.
    pub vnc_address: String,
    /// Told as the name of this place; absent where none was given.
    pub datacenter: Option<String>,
    pub server_uuid: String,
    /// Stands for the version of the platform.
    pub buildstamp: String,
}

/// Kinds of device in turn, and the one for the first time only.
pub(super) type Order = (Vec<String>, Option<String>);

/// `order=cd,once=d`, with or without the first word.
pub(super) fn boot_order(text: &str) -> Result<Order, String> {
    let letter = |letter: char| match letter {
        'c' => Ok("disk".to_owned()),
        'd' => Ok("cdrom".to_owned()),
        'n' => Ok("network".to_owned()),
        other => Err(format!("Invalid boot device '{other}' in \"{text}\"; c, d and n are known")),
    };
    let (mut order, mut once) = (Vec::new(), None);
    for (i, part) in text.split(',').enumerate() {
        match part.split_once('=') {
            Some(("once", value)) => once = value.chars().next().map(letter).transpose()?,
            Some(("order", letters)) => {
                order = letters.chars().map(letter).collect::<Result<_, _>>()?
            }
            None if i == 0 => order = part.chars().map(letter).collect::<Result<_, _>>()?,
            Some(_) | None => return Err(format!("Invalid boot order: \"{text}\"")),
        }
    }
    if order.is_empty() {
        return Err(format!("Invalid boot order: \"{text}\""));
    }
    let mut seen = Vec::new();
    order.retain(|device| {
        !seen.contains(device) && {
            seen.push(device.clone());
            true
        }
    });
    Ok((order, once))
}

/// The bus that a model means.
pub(super) fn bus(model: &str) -> String {
    match model {
        "ahci" => "ide".to_owned(),
        other => other.to_owned(),
    }
}

/// A drive from the machine's own folder.
pub(super) fn drive(name: String, path: &str, model: &str, cdrom: bool) -> DiskDraft {
    let media = if cdrom { "cdrom" } else { "disk" };
    let source = format!("own:/{}", path.trim_start_matches('/'));
    // There is no CD-ROM on virtio; what was meant is the medium, not the bus.
    let bus = if cdrom && model == "virtio" { "scsi".to_owned() } else { bus(model) };
    DiskDraft {
        name: Some(name),
        source: Some(source),
        bus: Some(bus),
        media: Some(media.into()),
        ..DiskDraft::default()
    }
}

/// The whole machine.
pub(super) fn draft(
    doc: &Object,
    metadata: &Metadata,
    world: &World,
    settings: &Settings,
) -> Result<Draft, String> {
    let uuid = text(doc, "uuid").unwrap_or("").to_owned();
    let brand = text(doc, "brand").and_then(Brand::of).unwrap_or(Brand::Kvm);
    let (order, once) = boot_order(text(doc, "boot").unwrap_or("order=cd"))?;
    let disk_first = order.first().is_some_and(|device| device == "disk") && once.is_none();
    let uefi = text(doc, "bootrom") == Some("uefi");
    let list = objects(doc, "disks");
    let direct = boots_directly(doc, world);
    let disks = list.iter().enumerate().skip(usize::from(direct.is_some()));
    let disks: Result<Vec<DiskDraft>, String> =
        disks.map(|(i, disk)| disk_draft(disk, i, disk_first, world)).collect();
    let boot = BootDraft {
        firmware: Some(if uefi { "uefi" } else { "bios" }.into()),
        order: Some(order),
        once,
        ..BootDraft::default()
    };
    let nics = objects(doc, "nics");
    let nics: Result<Vec<NicDraft>, String> =
        nics.iter().map(|nic| nic_draft(nic, brand, world)).collect();
    let document = serde_json::to_string(doc).map_err(|e| e.to_string())?;
    Ok(Draft {
        name: Some(uuid.clone()),
        uuid: Some(uuid.clone()),
        cpus: number(doc, "vcpus").map(|n| CpusDraft::Count(u32::try_from(n).unwrap_or(u32::MAX))),
        memory: Some(MemoryDraft::Text(format!("{}MiB", number(doc, "ram").unwrap_or(256)))),
        boot: Some(boot).filter(|_| direct.is_none()),
        image_size: direct.and_then(|_| mib(list.first()?, "size")),
        image: direct.map(|image| image.name.clone()),
        disks: Some(disks?),
        nics: Some(nics?),
        hostname: Some(hostname(doc)),
        resolvers: Some(texts(doc, "resolvers").into_iter().filter(|r| !r.contains(':')).collect()),
        autostart: Some(is_true(doc, "autoboot")),
        limits: Some(limits(doc)),
        display: Some(display(doc, settings)),
        smbios: Some(SmbiosDraft {
            manufacturer: Some("Joyent".into()),
            product: Some("SmartDC HVM".into()),
            version: Some(format!("7.{}", settings.buildstamp)),
            serial: Some(uuid.clone()),
            sku: Some("001".into()),
            family: Some("Virtual Machine".into()),
        }),
        mdata: Some(mdata(doc, metadata, settings)),
        cidata: super::nocloud::files(doc, metadata).filter(|_| brand == Brand::Bhyve),
        own_folder: Some(true),
        origin: Some(OriginDraft {
            door: Some(DOOR.into()),
            id: Some(uuid),
            owner: text(doc, "owner_uuid").map(str::to_owned),
            document: Some(document),
        }),
        ..Draft::default()
    })
}

/// The image of the first disk, where it brings a kernel of its own and the disk is what boots.
pub(super) fn boots_directly<'a>(doc: &Object, world: &'a World) -> Option<&'a Image> {
    let (order, once) = boot_order(text(doc, "boot").unwrap_or("order=cd")).ok()?;
    let first = doc.get("disks")?.get(0)?.as_object()?;
    let image = world.images.get(text(first, "image_uuid")?)?;
    let disk = once.is_none() && order.first().is_some_and(|device| device == "disk");
    (image.direct && disk && text(doc, "bootrom").is_none()).then_some(image)
}

fn mib(object: &Object, name: &str) -> Option<Size> {
    number(object, name).map(|mib| Size::Text(format!("{mib}MiB")))
}

/// What DHCP tells; a name that is none is not told.
fn hostname(doc: &Object) -> String {
    let uuid = text(doc, "uuid").unwrap_or("");
    let label = |label: &str| {
        let inner = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let given = text(doc, "hostname").filter(|name| name.split('.').all(label));
    given.unwrap_or(uuid).to_owned()
}

fn limits(doc: &Object) -> LimitsDraft {
    let within = |name: &str, low: i64, high: i64| {
        number(doc, name).map(|n| u32::try_from(n.clamp(low, high)).unwrap_or(u32::MAX))
    };
    LimitsDraft {
        cpu_percent: within("cpu_cap", 0, 25_500).filter(|cap| *cap > 0),
        cpu_weight: within("cpu_shares", 1, 10_000),
        memory: number(doc, "max_physical_memory").map(|mib| Size::Text(format!("{mib}MiB"))),
        threads: within("max_lwps", 64, 65_536),
    }
}

fn display(doc: &Object, settings: &Settings) -> DisplayDraft {
    let port = number(doc, "vnc_port").unwrap_or(0);
    // A card that no hypervisor here has shows the same picture as the standard one.
    let vga = text(doc, "vga").filter(|vga| *vga != "xenfb").unwrap_or("std");
    DisplayDraft {
        vga: Some(vga.to_owned()),
        listen: Some(port >= 0),
        address: Some(settings.vnc_address.clone()),
        port: u32::try_from(port).ok(),
        password: text(doc, "vnc_password").map(str::to_owned),
    }
}

fn mdata(doc: &Object, metadata: &Metadata, settings: &Settings) -> MdataDraft {
    let mut object = doc.clone();
    object.insert("server_uuid".into(), settings.server_uuid.clone().into());
    if let Some(datacenter) = &settings.datacenter {
        object.insert("datacenter_name".into(), datacenter.clone().into());
    }
    let routes = guest_routes(doc);
    object.insert("routes".into(), routes);
    let scalars = |map: &Object| {
        map.iter().filter_map(|(key, value)| Some((key.clone(), scalar(value)?))).collect()
    };
    MdataDraft {
        object: Some(Value::Object(object).to_string()),
        customer: Some(scalars(&metadata.customer)),
        internal: Some(scalars(&metadata.internal)),
        namespaces: Some(texts(doc, "internal_metadata_namespaces")),
    }
}

/// `[{linklocal, dst, gateway}]`; a gateway may be named by the interface that has it.
fn guest_routes(doc: &Object) -> Value {
    let nics = objects(doc, "nics");
    let routes = doc.get("routes").and_then(Value::as_object).into_iter().flatten();
    let list = routes.filter_map(|(dst, gateway)| {
        let gateway = gateway.as_str()?;
        let named = |list: &str| gateway.strip_prefix(list)?.strip_suffix(']').map(str::to_owned);
        let nic = match (named("nics["), named("macs[")) {
            (Some(index), _) => nics.get(index.parse::<usize>().ok()?),
            (None, Some(mac)) => nics.iter().find(|nic| text(nic, "mac") == Some(&mac)),
            (None, None) => None,
        };
        let local = nic.and_then(|nic| text(nic, "ip")).map(str::to_owned);
        let (linklocal, gateway) = match local {
            Some(ip) => (true, ip),
            None => (false, gateway.to_owned()),
        };
        Some(serde_json::json!({"linklocal": linklocal, "dst": dst, "gateway": gateway}))
    });
    list.collect()
}

pub(super) fn scalar(value: &Value) -> Option<Scalar> {
    match value {
        Value::Bool(value) => Some(Scalar::Bool(*value)),
        Value::String(text) => Some(Scalar::Text(text.clone())),
        Value::Number(n) => Some(
            n.as_i64().map_or_else(|| Scalar::Number(n.as_f64().unwrap_or(0.0)), Scalar::Integer),
        ),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

fn disk_draft(
    disk: &Object,
    index: usize,
    disk_first: bool,
    world: &World,
) -> Result<DiskDraft, String> {
    let name = disks::name(disk, index);
    let model = text(disk, "model").unwrap_or("virtio");
    let path = text(disk, "path").unwrap_or("");
    if text(disk, "media") == Some("cdrom") {
        return Ok(drive(name, path, model, true));
    }
    let first = is_true(disk, "boot") && index > 0 && disk_first;
    let image = text(disk, "image_uuid").map(|uuid| {
        let image = world.images.get(uuid).map(|image| image.name.clone());
        image.ok_or_else(|| format!("there is no image {uuid} here"))
    });
    let image = image.transpose()?;
    let there = is_true(disk, "nocreate");
    Ok(DiskDraft {
        name: Some(name),
        source: there.then(|| path.to_owned()),
        size: mib(disk, "size").filter(|_| !there),
        image: image.filter(|_| !there),
        bus: Some(bus(model)),
        first: Some(first),
        ..DiskDraft::default()
    })
}

fn nic_draft(nic: &Object, brand: Brand, world: &World) -> Result<NicDraft, String> {
    let tag = text(nic, "nic_tag").unwrap_or("");
    nics::known_tag(world, tag)?;
    let network = nics::network(world, tag).cloned().unwrap_or_default();
    let vlan = number(nic, "vlan_id").filter(|vlan| *vlan > 0);
    let overlay = tag.split_once('/').map(|(_, number)| number.to_owned());
    // Each virtual LAN is a network of its own; names of networks are short.
    let network = match vlan.map(|v| v.to_string()).or(overlay) {
        Some(number) => {
            let room = 11_usize.saturating_sub(number.len() + 1);
            format!("{}-{number}", network.chars().take(room).collect::<String>())
        }
        None => network,
    };
    let address = nics::address(nic);
    let primary = is_true(nic, "primary");
    let lease = match (brand, address, primary) {
        (Brand::Bhyve, Some(_), _) => "none",
        (Brand::Kvm, Some(_), false) => "address",
        (_, _, _) => "full",
    };
    Ok(NicDraft {
        name: text(nic, "interface").map(str::to_owned),
        network: Some(network),
        model: text(nic, "model").map(str::to_owned).filter(|_| brand == Brand::Kvm),
        mac: text(nic, "mac").map(str::to_owned),
        prefix: address.and_then(|_| prefix_of(text(nic, "netmask")?)),
        gateway: address.and_then(|_| text(nic, "gateway").map(str::to_owned)),
        address: address.map(|address| address.to_string()),
        mtu: number(nic, "mtu").map(|mtu| mtu as u32),
        lease: Some(lease.into()),
        guard: Some(guard(nic)),
        ..NicDraft::default()
    })
}

fn guard(nic: &Object) -> GuardDraft {
    let mut allow = Vec::new();
    let dhcp = is_true(nic, "allow_dhcp_spoofing") || is_true(nic, "dhcp_server");
    for (word, allowed) in [
        ("mac", is_true(nic, "allow_mac_spoofing")),
        ("ip", dhcp || is_true(nic, "allow_ip_spoofing")),
        ("dhcp", dhcp),
        ("other", is_true(nic, "allow_restricted_traffic")),
    ] {
        if allowed {
            allow.push(word.to_owned());
        }
    }
    let mut addresses: Vec<String> = texts(nic, "allowed_ips");
    let own = texts(nic, "ips").into_iter().skip(1).filter(|ip| ip.contains(['.', ':']));
    // Of an address with its prefix, only the address is the interface's own.
    addresses.extend(own.filter_map(|ip| ip.split('/').next().map(str::to_owned)));
    addresses.extend(text(nic, "vrrp_primary_ip").map(str::to_owned));
    let ports = texts(nic, "blocked_outgoing_ports");
    GuardDraft {
        allow: Some(allow),
        addresses: Some(addresses),
        blocked_ports: Some(ports.iter().filter_map(|port| port.parse().ok()).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::build::tests::{make, world};
    use super::*;

    pub(in crate::vmadm) fn settings() -> Settings {
        Settings {
            vnc_address: "127.0.0.1".into(),
            datacenter: None,
            server_uuid: "44454c4c-5300-1056-8050-b4c04f4b3332".into(),
            buildstamp: "20261121T000000Z".into(),
        }
    }

    fn of(text: &str) -> Draft {
        let doc = make(text).unwrap();
        draft(&doc, &Metadata::default(), &world(), &settings()).unwrap()
    }

    #[test]
    fn orders_are_letters() {
        let order = |text| boot_order(text).map(|(order, once)| (order.join("+"), once));
        assert_eq!(order("order=cd,once=d"), Ok(("disk+cdrom".into(), Some("cdrom".into()))));
        assert_eq!(order("cd,once=n"), Ok(("disk+cdrom".into(), Some("network".into()))));
        assert_eq!(order("ccd"), Ok(("disk+cdrom".into(), None)));
        assert!(order("order=x").is_err() && order("").is_err() && order("c,menu=on").is_err());
    }

    #[test]
    fn interfaces_are_guarded_and_only_the_primary_is_told_all() {
        let draft = of(r#"{"brand":"kvm","nics":[
            {"nic_tag":"admin","model":"virtio","ip":"10.88.88.51","netmask":"255.255.255.0",
             "gateway":"10.88.88.1","dhcp_server":true},
            {"nic_tag":"external","vlan_id":4000,"ips":["10.1.0.2/16","10.1.0.3/16"]},
            {"nic_tag":"external","ip":"dhcp"}]}"#);
        let nics = draft.nics.unwrap();
        let lease = |i: usize| nics[i].lease.clone().unwrap();
        assert_eq!([lease(0), lease(1), lease(2)], ["full", "address", "full"]);
        assert_eq!(nics[0].gateway.as_deref(), Some("10.88.88.1"));
        assert_eq!(nics[0].guard.clone().unwrap().allow.unwrap(), ["ip", "dhcp"]);
        assert_eq!(nics[1].network.as_deref(), Some("extern-4000"));
        assert_eq!(nics[1].prefix, Some(16));
        assert_eq!(nics[1].guard.clone().unwrap().addresses.unwrap(), ["10.1.0.3"]);
        assert_eq!((nics[2].address.clone(), nics[2].prefix), (None, None));
        let bhyve = of(r#"{"brand":"bhyve","nics":[{"nic_tag":"admin","ip":"10.0.0.5",
            "netmask":"255.0.0.0"}]}"#);
        assert_eq!(bhyve.nics.unwrap()[0].lease.as_deref(), Some("none"));
    }

    #[test]
    fn case_68_disks_media_and_a_boot_order_of_the_machines_own() {
        let draft = of(r#"{"brand":"kvm","boot":"order=cd,once=d","virtio_txtimer":123000,
            "virtio_txburst":123,"disks":[{"size":1024,"model":"virtio","boot":true},
            {"media":"cdrom","path":"/foo.iso","model":"ide"},
            {"media":"cdrom","path":"/bar.iso","model":"ide"}]}"#);
        let disks = draft.disks.unwrap();
        let sources: Vec<_> = disks.iter().map(|d| d.source.clone().unwrap_or_default()).collect();
        assert_eq!(sources, ["", "own:/foo.iso", "own:/bar.iso"]);
        assert_eq!(draft.boot.unwrap().once.as_deref(), Some("cdrom"));
        let machine = lodge_spec::resolve::resolve(
            of(r#"{"brand":"kvm","ram":64}"#),
            lodge_spec::resolve::Defaults { id: lodge_spec::MachineId(uuid::Uuid::nil()) },
        );
        assert!(machine.is_ok(), "{machine:?}");
    }
}
