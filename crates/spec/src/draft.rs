//! What was asked: the native document, every field optional and as written. Has no defaults, no
//! rules beyond shape and no effects; `resolve` turns it into a `Machine` or a list of problems.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::flist::FlistDraft;
use crate::throttle::DiskLimits;

/// A machine as asked for. All fields are optional; unknown fields are refused.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(title = "Lodge machine", inline)]
pub struct Draft {
    /// A DNS label, unique on the host. Made up from the identity when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The machine's identity. Random when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// Virtual CPUs: a number, or a count with the maximum that may be plugged in later.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<CpusDraft>,
    /// Guest memory: a size, or a size with the maximum that may be plugged in later.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryDraft>,
    /// Name of a stored image: the kernel it boots with and the first disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Size of the disk made from `image`; the image's own size when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_size: Option<Size>,
    /// The machine's root, in place of an image: an flist, which also holds what boots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flist: Option<FlistDraft>,
    /// What to boot, where that is not what the image says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootDraft>,
    /// Disks and CD-ROMs, in the guest's order, after the image's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskDraft>>,
    /// Network interfaces, in the guest's order. One on the network `default` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nics: Option<Vec<NicDraft>>,
    /// Host ports that lead into the guest: `[IP:]HOST:GUEST[/udp]`, or the same in fields.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ports: Option<Vec<PortDraft>>,
    /// Host folders that the guest can mount by their tag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shares: Option<Vec<ShareDraft>>,
    /// Files put into the guest's root before its services start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub files: Option<Vec<FileDraft>>,
    /// Public SSH keys for root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh_keys: Option<Vec<String>>,
    /// The guest's host name; the machine's name when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// IPv4 addresses of name servers told to the guest; the network's own when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resolvers: Option<Vec<String>>,
    /// What the guest may read about itself: an object in its file `/etc/lodge/metadata.json`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, Scalar>>,
    /// What people note about the machine; the guest does not see it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tags: Option<BTreeMap<String, Scalar>>,
    /// Start with the daemon. False when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub autostart: Option<bool>,
    /// Remove the machine once it has stopped. False when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ephemeral: Option<bool>,
    /// What to do when the machine ends unasked. `never` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restart: Option<RestartDraft>,
    /// When the guest counts as ready: `console:REGEX`, `port:N` or `dhcp`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready: Option<String>,
    /// The hypervisor: `auto` or the name of one. `auto` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// `auto`, `kvm` or `tcg`. `auto` when absent: KVM where it is proven to run a stock kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accel: Option<String>,
    /// The board: `auto`, `microvm`, `q35` or `pc`. `auto` when absent: the least that suffices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub board: Option<String>,
    /// What the hypervisor process may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitsDraft>,
    /// A screen with a keyboard and a pointer, shown over VNC. None when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub display: Option<DisplayDraft>,
    /// What the machine calls itself to its guest (SMBIOS, type 1).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub smbios: Option<SmbiosDraft>,
    /// What the guest may read and write over its second serial port, in the metadata protocol of
    /// SmartOS. No second serial port when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mdata: Option<MdataDraft>,
    /// Files on a disk labelled CIDATA, where cloud-init's NoCloud finds them: `meta-data`,
    /// `user-data`, `network-config`, `vendor-data`. No such disk when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cidata: Option<BTreeMap<String, String>>,
    /// A script that the guest finds at <http://10.0.2.100/vm-bootstrap>, for images that set
    /// themselves up at first boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bootstrap: Option<BootstrapDraft>,
    /// A folder of the machine's own, for media: `own:/NAME` is a file in it. False when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub own_folder: Option<bool>,
    /// In whose words the machine was asked for, where those were not this document's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub origin: Option<OriginDraft>,
}

/// A machine as another system's interface knows it. Kept as it is and given back as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct OriginDraft {
    /// The interface: a word such as `metald`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub door: Option<String>,
    /// The machine's name there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Whose machine it is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// What was asked for, in that interface's own form.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub document: Option<String>,
}

/// A number of bytes, or a text such as `512MiB` or `4GB`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub enum Size {
    Bytes(u64),
    Text(String),
}

/// A text, a number or a truth value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub enum Scalar {
    Bool(bool),
    Integer(i64),
    Number(f64),
    Text(String),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub enum CpusDraft {
    Count(u32),
    Detailed(CpusFields),
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct CpusFields {
    /// CPUs at boot. 1 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
    /// CPUs that there can be; more than `count` asks for hotplug.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<u32>,
    /// Threads per core. 1 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
    /// Cores per socket. All in one socket when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cores: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub enum MemoryDraft {
    Bytes(u64),
    Text(String),
    Detailed(MemoryFields),
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct MemoryFields {
    /// Memory at boot. 512 MiB when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<Size>,
    /// Memory that there can be; more than `size` asks for hotplug.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<Size>,
}

/// Either a kernel (`kernel`, `initrd`, `cmdline`) or firmware (`firmware`, `order`, `once`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct BootDraft {
    /// Host path of a Linux kernel (bzImage or ELF).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Host path of an initial RAM disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<String>,
    /// Kernel command line; with an image, added after the image's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// `bios` or `uefi`; `bios` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firmware: Option<String>,
    /// Kinds of device to try in turn: `disk`, `cdrom`, `network`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<Vec<String>>,
    /// The kind of device to try first at the next boot only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub once: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct DiskDraft {
    /// Name within the machine. `disk0`, `disk1`, … when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Host path of a raw or qcow2 image or a block device; told apart by content. `own:/NAME`: a
    /// file in the machine's own folder. `nbd://HOST[:PORT]/EXPORT` or
    /// `nbd+unix:///EXPORT?socket=PATH`: a server's disk. `zdb://HOST[:PORT]?size=SIZE`: one whose
    /// blocks lie in 0-db. Absent: an empty disk of `size`, kept with
    /// the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Leave the source alone and write to a layer of the machine's own above it. False when
    /// absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layered: Option<bool>,
    /// Name of a stored image; the machine writes to a layer of its own above it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Size of an empty disk, or of the layer above an image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<Size>,
    /// `virtio`, `scsi` or `ide`. `virtio` when absent, `ide` for a CD-ROM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bus: Option<String>,
    /// `disk` or `cdrom`. `disk` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub media: Option<String>,
    /// False when absent; a CD-ROM is always read-only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_only: Option<bool>,
    /// Serial number that the guest sees; the name when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Firmware tries this disk before everything else. False when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first: Option<bool>,
    /// How much of it the guest may use. As much as it can when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<DiskLimits>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct NicDraft {
    /// Name within the machine. `nic0`, `nic1`, … when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Name of a network. `default` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// A link of the host to be wired to, where addresses come from whoever gives them there:
    /// `bridge:NAME`, `vlan:ID@INTERFACE`, `vxlan:ID@INTERFACE`, `macvlan:INTERFACE` or
    /// `passthrough:INTERFACE`. For root. None when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wire: Option<String>,
    /// `virtio`, `e1000` or `rtl8139`. `virtio` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Ethernet address. Derived from the machine's identity when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// IPv4 address that DHCP hands out. The next free one when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Length of the address's prefix, for an address that is not of the network's own plan.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix: Option<u32>,
    /// IPv4 address of the router, where the address is not of the network's own plan. The network
    /// answers there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// Number of a bridge of its own inside the network, 0 to 255: interfaces on different ones do
    /// not meet. It has no DHCP, and there is an `address` with its `prefix`. The network's common
    /// bridge when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub segment: Option<u32>,
    /// IPv6 address and prefix length of a segment's router. The network answers there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway6: Option<String>,
    /// Bytes of the largest packet, 576 to 9000. The guest is told by DHCP, and by the device
    /// where it can. 1500 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// What DHCP tells: `full`, `address` (without router, names and host name) or `none`. `full`
    /// when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease: Option<String>,
    /// What the guest may send under other names than its own. Anything when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guard: Option<GuardDraft>,
    /// Limit on what the guest receives. None when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_limit: Option<RateLimitDraft>,
    /// Limit on what the guest sends. None when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_limit: Option<RateLimitDraft>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct RateLimitDraft {
    /// Bytes per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Size>,
    /// Milliseconds in which the allowance fills up again. 1000 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refill_ms: Option<u64>,
    /// Bytes beyond the limit, once. None when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst: Option<Size>,
}

/// Only the interface's own Ethernet and IPv4 addresses pass, as IPv4, IPv6 or ARP, and no answers
/// of a DHCP server; but for what is allowed here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct GuardDraft {
    /// `mac`, `ip`, `dhcp`, `other`: what is not held back. None when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow: Option<Vec<String>>,
    /// Addresses besides the interface's own: IPv4 or IPv6, with or without a prefix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub addresses: Option<Vec<String>>,
    /// TCP ports that the guest does not reach.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocked_ports: Option<Vec<u16>>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub enum PortDraft {
    Text(String),
    Detailed(PortFields),
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct PortFields {
    /// Host address to listen on. `127.0.0.1` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip: Option<String>,
    /// Host port, 1 to 65535.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<u32>,
    /// Guest port, 1 to 65535.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest: Option<u32>,
    /// `tcp` or `udp`. `tcp` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// Who may use it: an address, a network such as `10.0.0.0/8`, or the name of the host's
    /// interface by which they come. Everybody when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct ShareDraft {
    /// Host folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Mount tag that the guest uses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// True when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_only: Option<bool>,
}

/// A file for the guest: `content` or the bytes of host file `source`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct FileDraft {
    /// Absolute path in the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Host path to read when the machine starts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The text itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Octal permission bits. `0600` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub enum RestartDraft {
    /// `never`, `on-failure` or `always`.
    Policy(String),
    Detailed(RestartFields),
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct RestartFields {
    /// `never`, `on-failure` or `always`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// Restarts in a row before giving up. 5 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct LimitsDraft {
    /// Percent of one CPU; 250 is two and a half CPUs. Unlimited when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_percent: Option<u32>,
    /// Relative weight, 1 to 10000. 100 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<u32>,
    /// Memory of the hypervisor process, guest memory included. Unlimited when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Size>,
    /// Threads of the hypervisor process. 512 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
}

#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct DisplayDraft {
    /// `std`, `cirrus`, `vmware`, `qxl` or `virtio`. `std` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vga: Option<String>,
    /// Whether VNC listens. True when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<bool>,
    /// Host address that VNC listens on. `127.0.0.1` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// TCP port; 0 or absent: one that stays the machine's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u32>,
    /// At most 8 characters, because VNC takes no more. Nobody is asked when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
}

impl std::fmt::Debug for DisplayDraft {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { vga, listen, address, port, password } = self;
        let password = password.as_ref().map(|_| "…");
        f.debug_tuple("DisplayDraft").field(&(vga, listen, address, port, password)).finish()
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct SmbiosDraft {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manufacturer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub product: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sku: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct BootstrapDraft {
    /// A host file, read whenever the machine starts. Or `content`; neither: there is no script.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The script itself, at most 1 MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Without a script the guest fails instead of waiting for one. False when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub require: Option<bool>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(inline)]
pub struct MdataDraft {
    /// A JSON object as text; its members are what `sdc:` keys tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// What the guest may read, write and delete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub customer: Option<BTreeMap<String, Scalar>>,
    /// What the guest does not see, but for a few keys and those of `namespaces`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub internal: Option<BTreeMap<String, Scalar>>,
    /// Prefixes of internal keys that the guest may read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<Vec<String>>,
}
