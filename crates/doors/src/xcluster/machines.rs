//! A VM of a cluster as a machine of Lodge.

use lodge_spec::draft::{
    BootDraft, CpusDraft, DiskDraft, Draft, MemoryDraft, NicDraft, OriginDraft, PortDraft,
};
use lodge_spec::names::NetName;

use super::DOOR;
use super::nodes::{HOST, Vm, address, hostname, mac};

/// What all VMs of a cluster share.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// At most 11 characters: the network is called so.
    pub name: NetName,
    /// None: the image boots by itself.
    pub kernel: Option<String>,
    pub image: String,
    /// Attached where there is one.
    pub cdrom: Option<String>,
    /// `auto`, or the board's name.
    pub board: Option<String>,
    /// Prefix of the nets' IPv6 addresses.
    pub ipv6_prefix: String,
    /// Host ports for telnet and ssh count from these; none where people are inside the network.
    pub ports: Option<(u16, u16)>,
    /// The host has no hardware to run guest code on.
    pub emulated: bool,
}

/// What every kernel is told.
pub const CMDLINE: [&str; 4] = ["root=/dev/vda", "rw", "init=/init", "console=ttyS0"];

/// An emulator translates a program anew wherever it is laid: with the same addresses every time
/// a node is up in half the time. Nodes let everybody in anyway.
const EMULATED: &str = "norandmaps";

/// The machine's name on this host.
pub fn name(cluster: &NetName, id: u8) -> String {
    format!("{cluster}-{}", hostname(id))
}

/// The number of a VM of this cluster, told by its machine's name.
pub fn id_of(cluster: &NetName, name: &str) -> Option<u8> {
    name.strip_prefix(cluster.as_str())?.strip_prefix("-vm-")?.parse().ok()
}

pub fn draft(cluster: &Cluster, vm: &Vm) -> Draft {
    let Cluster { name: own, kernel, image, cdrom, board, ipv6_prefix, ports, emulated } = cluster;
    let Vm { id, nets, mtu, memory, cpus, append } = vm;
    let append = append.iter().map(String::as_str);
    let more = emulated.then_some(EMULATED);
    let cmdline: Vec<&str> = CMDLINE.into_iter().chain(more).chain(append).collect();
    let boot = match kernel {
        Some(kernel) => BootDraft {
            kernel: Some(kernel.clone()),
            cmdline: Some(cmdline.join(" ")),
            ..BootDraft::default()
        },
        None => BootDraft { firmware: Some("bios".into()), ..BootDraft::default() },
    };
    let mut disks = vec![DiskDraft {
        source: Some(image.clone()),
        layered: Some(true),
        ..DiskDraft::default()
    }];
    disks.extend(cdrom.as_ref().map(|iso| DiskDraft {
        source: Some(iso.clone()),
        read_only: Some(true),
        ..DiskDraft::default()
    }));
    let nic = |net: &u8| NicDraft {
        network: Some(own.to_string()),
        segment: Some(u32::from(*net)),
        mac: Some(mac(*net, *id)),
        address: Some(address(*net, *id).to_string()),
        prefix: Some(24),
        gateway: Some(address(*net, HOST).to_string()),
        gateway6: Some(format!("{ipv6_prefix}:{}/120", address(*net, HOST))),
        mtu: Some(*mtu),
        lease: Some("none".into()),
        ..NicDraft::default()
    };
    let mut lines = Vec::new();
    // Ports lead to net 0.
    if let Some((telnet, ssh)) = ports.filter(|_| nets.first() == Some(&0)) {
        let port = |host: u16, guest: u16| PortDraft::Text(format!("127.0.0.1:{host}:{guest}"));
        lines.push(port(telnet + u16::from(*id), 23));
        lines.push(port(ssh + u16::from(*id), 22));
    }
    Draft {
        name: Some(name(own, *id)),
        hostname: Some(hostname(*id)),
        memory: Some(MemoryDraft::Text(format!("{memory}MiB"))),
        cpus: Some(CpusDraft::Count(*cpus)),
        boot: Some(boot),
        disks: Some(disks),
        nics: Some(nets.iter().map(nic).collect()),
        ports: Some(lines),
        ephemeral: Some(true),
        ready: nets.contains(&0).then(|| "port:22".into()),
        board: board.clone(),
        origin: Some(OriginDraft {
            door: Some(DOOR.into()),
            id: Some(name(own, *id)),
            owner: Some(own.to_string()),
            document: Some(format!("{{\"id\":{id},\"nets\":{nets:?}}}")),
        }),
        ..Draft::default()
    }
}

#[cfg(test)]
mod tests {
    use lodge_spec::names::MachineId;
    use lodge_spec::resolve::{Defaults, resolve};

    use super::*;

    #[test]
    fn a_router_becomes_a_machine() {
        let cluster = Cluster {
            name: "xc".parse().unwrap(),
            kernel: Some("/k/bzImage".into()),
            image: "/k/hd.img".into(),
            cdrom: Some("/k/cdrom.iso".into()),
            board: None,
            ipv6_prefix: "1000::1".into(),
            ports: Some((12000, 12300)),
            emulated: true,
        };
        let append = vec!["foo=1".to_owned()];
        let vm = Vm { id: 201, nets: vec![0, 1, 2], mtu: 9000, memory: 128, cpus: 2, append };
        let id = MachineId(uuid::Uuid::nil());
        let words = |cluster: &Cluster| draft(cluster, &vm).boot.unwrap().cmdline.unwrap();
        let plain = "root=/dev/vda rw init=/init console=ttyS0";
        assert_eq!(words(&cluster), format!("{plain} norandmaps foo=1"));
        let fast = Cluster { emulated: false, ..cluster.clone() };
        assert_eq!(words(&fast), format!("{plain} foo=1"));
        let machine = resolve(draft(&cluster, &vm), Defaults { id }).unwrap();
        assert_eq!((machine.name.as_str(), machine.hostname.as_str()), ("xc-vm-201", "vm-201"));
        let nets: Vec<String> = machine.nics.iter().map(|n| n.mac.to_string()).collect();
        assert_eq!(nets[2], "00:00:00:01:02:c9");
        let gateway6 = machine.nics[1].segment.unwrap().gateway6.unwrap();
        assert_eq!(gateway6, ("1000::1:c0a8:1fa".parse().unwrap(), 120));
        let ports: Vec<(u16, u16)> = machine.ports.iter().map(|p| (p.host, p.guest)).collect();
        assert_eq!(ports, [(12201, 23), (12501, 22)]);
        assert_eq!(
            (id_of(&cluster.name, "xc-vm-201"), id_of(&cluster.name, "xc1-vm-201")),
            (Some(201), None)
        );
    }
}
