//! Every property of a machine in one table: its type, who has it, where it may stand, and its
//! column. What `validate`, `create`, `update`, `list` and `lookup` know of properties is here.

/// What a value must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    /// Least and greatest.
    Integer(i64, i64),
    /// The same, or nothing.
    Optional(i64, i64),
    Boolean,
    Uuid,
    /// Names or numbers.
    List,
    Addresses,
    Cidrs,
    Flat,
    Objects,
    /// One of these.
    Word(&'static [&'static str]),
    Mac,
    PowerOfTwo(i64, i64),
    /// `bus:device:function`, the first ones optional.
    PciSlot,
    /// `N` or `N/N`, powers of two.
    BlockSize,
    Clients,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Brand {
    Kvm,
    Bhyve,
}

impl Brand {
    pub(super) fn of(text: &str) -> Option<Self> {
        match text {
            "kvm" => Some(Self::Kvm),
            "bhyve" => Some(Self::Bhyve),
            _ => None,
        }
    }

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Bhyve => "bhyve",
        }
    }

    pub(super) const fn disk_models(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["virtio", "scsi", "ide"],
            Self::Bhyve => &["virtio", "ahci", "nvme"],
        }
    }
}

/// Who has a property.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owners {
    Kvm,
    Bhyve,
    Both,
}

impl Owners {
    pub(super) fn holds(self, brand: Brand) -> bool {
        matches!(
            (self, brand),
            (Self::Both, _) | (Self::Kvm, Brand::Kvm) | (Self::Bhyve, Brand::Bhyve)
        )
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Property {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) owners: Owners,
    pub(super) create: bool,
    pub(super) update: bool,
}

const ANY: i64 = i64::MAX;
const COMPRESSION: Kind = Kind::Word(&[
    "on", "off", "gzip", "gzip-1", "gzip-2", "gzip-3", "gzip-4", "gzip-5", "gzip-6", "gzip-7",
    "gzip-8", "gzip-9", "lz4", "lzjb", "zle",
]);

const fn row(
    name: &'static str,
    kind: Kind,
    owners: Owners,
    create: bool,
    update: bool,
) -> Property {
    Property { name, kind, owners, create, update }
}

use Kind::{Addresses, Boolean, Flat, Integer, List, Objects, Optional, Text, Uuid};
use Owners::{Bhyve, Both, Kvm};

/// Of machines; names with `set_`, `add_` and the like stand for themselves.
pub(super) const MACHINE: &[Property] = &[
    row("alias", Text, Both, true, true),
    row("archive_on_delete", Boolean, Both, true, true),
    row("autoboot", Boolean, Both, true, true),
    row("bhyve_extra_opts", Text, Bhyve, true, true),
    row("billing_id", Text, Both, true, true),
    row("boot", Text, Both, true, true),
    row("bootrom", Text, Bhyve, true, true),
    row("brand", Text, Both, true, false),
    row("com1", Text, Bhyve, true, true),
    row("com2", Text, Bhyve, true, true),
    row("cpu_cap", Integer(0, ANY), Both, true, true),
    row("cpu_shares", Integer(0, ANY), Both, true, true),
    row("cpu_type", Kind::Word(&["qemu64", "host"]), Kvm, true, true),
    row("customer_metadata", Flat, Both, true, false),
    row("disk_driver", Text, Both, true, true),
    row("disks", Objects, Both, true, false),
    row("do_not_inventory", Boolean, Both, true, true),
    row("firewall_enabled", Boolean, Both, true, true),
    row("flexible_disk_size", Integer(0, ANY), Bhyve, true, true),
    row("hostname", Text, Both, true, true),
    row("image_uuid", Uuid, Both, true, false),
    row("indestructible_delegated", Boolean, Both, true, true),
    row("indestructible_zoneroot", Boolean, Both, true, true),
    row("internal_metadata", Flat, Both, true, false),
    row("internal_metadata_namespaces", List, Both, true, true),
    row("limit_priv", List, Both, true, true),
    row("max_locked_memory", Integer(0, ANY), Both, true, true),
    row("max_lwps", Integer(0, ANY), Both, true, true),
    row("max_msg_ids", Integer(0, ANY), Both, true, true),
    row("max_physical_memory", Integer(0, ANY), Both, true, true),
    row("max_sem_ids", Integer(0, ANY), Both, true, true),
    row("max_shm_ids", Integer(0, ANY), Both, true, true),
    row("max_shm_memory", Integer(0, ANY), Both, true, true),
    row("max_swap", Integer(256, ANY), Both, true, true),
    row("nic_driver", Text, Both, true, true),
    row("nics", Objects, Both, true, false),
    row("owner_uuid", Text, Both, true, true),
    row("package_name", Text, Kvm, true, true),
    row("package_version", Text, Kvm, true, true),
    row("pci_devices", Objects, Bhyve, true, true),
    row("qemu_extra_opts", Text, Kvm, true, true),
    row("qemu_opts", Text, Kvm, true, true),
    row("quota", Integer(0, ANY), Both, true, true),
    row("ram", Integer(0, ANY), Both, true, true),
    row("resolvers", Addresses, Both, true, true),
    row("routes", Flat, Both, true, false),
    row("spice_opts", Text, Kvm, true, true),
    row("spice_password", Text, Kvm, true, true),
    row("spice_port", Integer(-1, 65_535), Kvm, true, true),
    row("tags", Flat, Both, true, false),
    row("uuid", Uuid, Both, true, false),
    row("vcpus", Integer(1, ANY), Both, true, true),
    row("vga", Text, Kvm, true, true),
    row("virtio_txburst", Integer(0, ANY), Kvm, true, true),
    row("virtio_txtimer", Integer(0, ANY), Kvm, true, true),
    row("vnc_password", Text, Both, true, true),
    row("vnc_port", Integer(-1, 65_535), Both, true, true),
    row("zfs_filesystem_limit", Optional(0, ANY), Both, true, true),
    row("zfs_io_priority", Integer(0, ANY), Both, true, true),
    row("zfs_root_compression", COMPRESSION, Both, true, true),
    row("zfs_root_recsize", Kind::PowerOfTwo(512, 131_072), Both, true, true),
    row("zfs_snapshot_limit", Optional(0, ANY), Both, true, true),
    row("zonename", Text, Both, true, false),
    row("zpool", Kind::Word(&[POOL]), Both, true, false),
    // Only as part of a change.
    row("add_disks", Objects, Both, false, true),
    row("update_disks", Objects, Both, false, true),
    row("remove_disks", List, Both, false, true),
    row("add_nics", Objects, Both, false, true),
    row("update_nics", Objects, Both, false, true),
    row("remove_nics", List, Both, false, true),
    row("set_tags", Flat, Both, false, true),
    row("remove_tags", List, Both, false, true),
    row("set_customer_metadata", Flat, Both, false, true),
    row("remove_customer_metadata", List, Both, false, true),
    row("set_internal_metadata", Flat, Both, false, true),
    row("remove_internal_metadata", List, Both, false, true),
    row("set_routes", Flat, Both, false, true),
    row("remove_routes", List, Both, false, true),
];

/// The one pool that there is.
pub(super) const POOL: &str = "zones";

pub(super) const DISK: &[Property] = &[
    row("path", Text, Both, true, true),
    row("size", Integer(1, ANY), Both, true, false),
    row("image_uuid", Uuid, Both, true, false),
    row("image_size", Integer(1, ANY), Both, true, false),
    row("image_name", Text, Both, true, true),
    row("block_size", Integer(0, ANY), Both, true, false),
    row("boot", Boolean, Both, true, true),
    row("compression", COMPRESSION, Both, true, true),
    row("refreservation", Integer(0, ANY), Both, true, true),
    row("media", Kind::Word(&["disk", "cdrom"]), Both, true, true),
    row("model", Text, Both, true, true),
    row("nocreate", Boolean, Both, true, false),
    row("zpool", Kind::Word(&[POOL]), Both, true, false),
    row("guest_block_size", Kind::BlockSize, Bhyve, true, true),
    row("notrim", Boolean, Bhyve, true, true),
    row("pci_slot", Kind::PciSlot, Bhyve, true, true),
    row("uuid", Uuid, Bhyve, true, true),
    row("dangerous_allow_shrink", Boolean, Bhyve, false, true),
];

pub(super) const NIC: &[Property] = &[
    row("nic_tag", Text, Both, true, true),
    row("mac", Kind::Mac, Both, true, true),
    row("model", Text, Both, true, true),
    row("ip", Text, Both, true, true),
    row("netmask", Text, Both, true, true),
    row("ips", Kind::Cidrs, Both, true, true),
    row("gateway", Text, Both, true, true),
    row("gateways", Addresses, Both, true, true),
    row("primary", Boolean, Both, true, true),
    row("vlan_id", Integer(0, 4095), Both, true, true),
    row("mtu", Integer(576, 9000), Both, true, true),
    row("interface", Text, Both, true, false),
    row("network_uuid", Uuid, Both, true, true),
    row("allow_mac_spoofing", Boolean, Both, true, true),
    row("allow_ip_spoofing", Boolean, Both, true, true),
    row("allow_dhcp_spoofing", Boolean, Both, true, true),
    row("allow_restricted_traffic", Boolean, Both, true, true),
    row("allow_unfiltered_promisc", Boolean, Both, true, true),
    row("dhcp_server", Boolean, Both, true, true),
    row("allowed_ips", Kind::Cidrs, Both, true, true),
    row("allowed_dhcp_cids", Kind::Clients, Kvm, true, true),
    row("blocked_outgoing_ports", List, Both, true, true),
    row("vrrp_vrid", Integer(0, 255), Both, true, true),
    row("vrrp_primary_ip", Text, Both, true, true),
];

/// Kept and given back; nothing here acts on them.
pub(super) const INERT: &[&str] = &[
    "qemu_opts",
    "qemu_extra_opts",
    "bhyve_extra_opts",
    "spice_port",
    "spice_opts",
    "pci_devices",
];

/// A column of `list`: the property, its heading and its width.
pub(super) const COLUMNS: &[(&str, &str, usize)] = &[
    ("alias", "ALIAS", 10),
    ("autoboot", "AUTOBOOT", 8),
    ("billing_id", "BILLING_ID", 36),
    ("boot_timestamp", "BOOT_TIMESTAMP", 24),
    ("brand", "BRAND", 14),
    ("cpu_cap", "CPU_CAP", 7),
    ("cpu_shares", "CPU_SHARE", 9),
    ("cpu_type", "CPU_TYPE", 8),
    ("create_timestamp", "CREATE_TIMESTAMP", 24),
    ("dns_domain", "DOMAIN", 32),
    ("do_not_inventory", "DNI", 5),
    ("docker", "DOCKER", 6),
    ("exit_status", "EXIT", 4),
    ("exit_timestamp", "EXIT_TIMESTAMP", 24),
    ("firewall_enabled", "FIREWALL_ENABLED", 16),
    ("flexible_disk_size", "FLEX_DISK_SIZE", 14),
    ("free_space", "FREE_SPACE", 14),
    ("hostname", "HOSTNAME", 32),
    ("hvm", "HVM", 5),
    ("image_uuid", "IMAGE_UUID", 36),
    ("indestructible_delegated", "INDESTR_DATA", 12),
    ("indestructible_zoneroot", "INDESTR_ROOT", 12),
    ("ram", "RAM", 7),
    ("max_locked_memory", "MAX_LOCKED", 10),
    ("max_lwps", "MAX_LWP", 7),
    ("max_physical_memory", "MAX_PHYS", 8),
    ("max_swap", "MAX_SWAP", 8),
    ("owner_uuid", "OWNER_UUID", 36),
    ("package_name", "PACKAGE_NAME", 32),
    ("package_version", "PACKAGE_VER", 11),
    ("pid", "PID", 6),
    ("qemu_extra_opts", "QEMU_EXTRA_OPTS", 15),
    ("quota", "QUOTA", 5),
    ("zone_state", "ZONE_STATE", 10),
    ("state", "STATE", 16),
    ("tmpfs", "TMPFS", 5),
    ("type", "TYPE", 4),
    ("uuid", "UUID", 36),
    ("vcpus", "VCPUS", 5),
    ("zfs_io_priority", "IO_PRIORITY", 11),
    ("zpool", "ZPOOL", 12),
    ("zonename", "ZONENAME", 12),
    ("zonepath", "ZONEPATH", 40),
    ("zoneid", "ZONEID", 6),
];

/// Parts of disks and interfaces that can be columns and filters.
pub(super) const DISK_COLUMNS: &[&str] =
    &["boot", "image_name", "image_size", "image_uuid", "size", "media", "model", "zpool"];
pub(super) const NIC_COLUMNS: &[&str] =
    &["dhcp_server", "gateway", "interface", "ip", "mac", "model", "netmask", "nic_tag", "vlan_id"];

pub(super) fn find(table: &'static [Property], name: &str) -> Option<&'static Property> {
    table.iter().find(|property| property.name == name)
}
