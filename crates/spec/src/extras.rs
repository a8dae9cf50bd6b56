//! Parts that most machines do without: a screen, a name of its own for the guest to see, the
//! second serial port with its metadata, and what an interface may send. Pure, like its siblings.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Component, Path, PathBuf};

use crate::draft::{BootstrapDraft, DisplayDraft, GuardDraft, MdataDraft, Scalar, SmbiosDraft};
use crate::machine::{FileContent, Machine, Segment, Subnet};
use crate::problem::Problems;
use crate::resolve::parse;
use crate::words;

/// What the source of a disk begins with that lies in the machine's own folder.
pub const OWN: &str = "own:/";
/// VNC compares no more of a password.
const MAX_PASSWORD: usize = 8;
/// All that a machine's metadata may hold together.
pub const MAX_MDATA: usize = 1 << 20;

words!(Vga { Std = "std", Cirrus = "cirrus", Vmware = "vmware", Qxl = "qxl", Virtio = "virtio" });
words!(
    /// What DHCP tells an interface.
    Lease { Full = "full", Address = "address", None = "none" }
);
words!(
    /// What a guarded interface may send all the same.
    Allowed { Mac = "mac", Ip = "ip", Dhcp = "dhcp", Other = "other" }
);

/// A screen with keyboard and pointer.
#[derive(Clone, PartialEq, Eq)]
pub struct Display {
    pub vga: Vga,
    pub vnc: Option<Vnc>,
}

#[derive(Clone, PartialEq, Eq)]
pub struct Vnc {
    pub address: IpAddr,
    /// 0: one that is derived from the machine's identity.
    pub port: u16,
    /// A secret.
    pub password: Option<String>,
}

impl fmt::Debug for Display {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vnc = self.vnc.as_ref().map(|v| (v.address, v.port, v.password.is_some()));
        f.debug_tuple("Display").field(&self.vga).field(&vnc).finish()
    }
}

/// SMBIOS, type 1; what is empty is left to the hypervisor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Smbios {
    pub manufacturer: String,
    pub product: String,
    pub version: String,
    pub serial: String,
    pub sku: String,
    pub family: String,
}

/// What is told over the second serial port.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mdata {
    /// A JSON object.
    pub object: String,
    pub customer: BTreeMap<String, Scalar>,
    pub internal: BTreeMap<String, Scalar>,
    pub namespaces: Vec<String>,
}

/// An address with the length of its prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefixed {
    pub address: IpAddr,
    pub length: u8,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Guard {
    pub allow: Vec<Allowed>,
    pub addresses: Vec<Prefixed>,
    pub blocked_ports: Vec<u16>,
}

impl fmt::Display for Prefixed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl std::str::FromStr for Prefixed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not an address, with or without a prefix");
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let length = length.map_or(Ok(most), str::parse).map_err(|_| wrong())?;
        if length > most {
            return Err(wrong());
        }
        Ok(Self { address, length })
    }
}

impl Display {
    pub(crate) fn to_draft(&self) -> DisplayDraft {
        let Display { vga, vnc } = self;
        DisplayDraft {
            vga: Some(vga.to_string()),
            listen: Some(vnc.is_some()),
            address: vnc.as_ref().map(|v| v.address.to_string()),
            port: vnc.as_ref().map(|v| u32::from(v.port)),
            password: vnc.as_ref().and_then(|v| v.password.clone()),
        }
    }
}

impl Machine {
    /// What viewers of the screen are asked for; a secret.
    pub fn vnc_password(&self) -> Option<&str> {
        self.display.as_ref()?.vnc.as_ref()?.password.as_deref()
    }
}

impl Smbios {
    pub(crate) fn to_draft(&self) -> SmbiosDraft {
        let Smbios { manufacturer, product, version, serial, sku, family } = self;
        let some = |text: &String| Some(text.clone()).filter(|t| !t.is_empty());
        SmbiosDraft {
            manufacturer: some(manufacturer),
            product: some(product),
            version: some(version),
            serial: some(serial),
            sku: some(sku),
            family: some(family),
        }
    }
}

impl Mdata {
    pub fn to_draft(&self) -> MdataDraft {
        let Mdata { object, customer, internal, namespaces } = self;
        MdataDraft {
            object: Some(object.clone()),
            customer: Some(customer.clone()),
            internal: Some(internal.clone()),
            namespaces: Some(namespaces.clone()),
        }
    }

    /// The same without the object, which whoever made the machine has in another form.
    pub fn told(&self) -> MdataDraft {
        let Mdata { object: _, customer, internal, namespaces } = self;
        MdataDraft {
            object: None,
            customer: Some(customer.clone()).filter(|map| !map.is_empty()),
            internal: Some(internal.clone()).filter(|map| !map.is_empty()),
            namespaces: Some(namespaces.clone()).filter(|list| !list.is_empty()),
        }
    }

    /// Bytes that it holds.
    pub fn weight(&self) -> usize {
        let of = |map: &BTreeMap<String, Scalar>| -> usize {
            map.iter().map(|(key, value)| key.len() + text_of(value).len()).sum()
        };
        self.object.len() + of(&self.customer) + of(&self.internal)
    }
}

/// A value as a guest is told it.
pub fn text_of(value: &Scalar) -> String {
    match value {
        Scalar::Bool(value) => value.to_string(),
        Scalar::Integer(value) => value.to_string(),
        Scalar::Number(value) => value.to_string(),
        Scalar::Text(value) => value.clone(),
    }
}

impl Guard {
    pub fn to_draft(&self) -> GuardDraft {
        let Guard { allow, addresses, blocked_ports } = self;
        GuardDraft {
            allow: Some(allow.iter().map(Allowed::to_string).collect()),
            addresses: Some(addresses.iter().map(Prefixed::to_string).collect()),
            blocked_ports: Some(blocked_ports.clone()),
        }
    }
}

/// What a guest is served for its first boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bootstrap {
    pub script: Option<FileContent>,
    /// A run without a script counts.
    pub require: bool,
}

impl Bootstrap {
    pub(crate) fn to_draft(&self) -> BootstrapDraft {
        let Self { script, require } = self;
        let (source, content) = script.as_ref().map(FileContent::to_draft).unwrap_or_default();
        BootstrapDraft { source, content, require: Some(*require) }
    }
}

pub(crate) fn resolve_display(p: &mut Problems, draft: DisplayDraft) -> Option<Display> {
    let DisplayDraft { vga, listen, address, port, password } = draft;
    let vga = parse(p, "display.vga", vga).unwrap_or(Vga::Std);
    if listen == Some(false) {
        return Some(Display { vga, vnc: None });
    }
    let address = address.unwrap_or_else(|| "127.0.0.1".into());
    let port = port.unwrap_or(0);
    let port = p.take("display.port", u16::try_from(port).map_err(|_| "a port is below 65536"))?;
    if password.as_ref().is_some_and(|w| w.is_empty() || w.len() > MAX_PASSWORD) {
        p.add("display.password", format!("a VNC password has 1 to {MAX_PASSWORD} characters"));
    }
    let address = parse(p, "display.address", Some(address))?;
    Some(Display { vga, vnc: Some(Vnc { address, port, password }) })
}

pub(crate) fn resolve_smbios(p: &mut Problems, draft: SmbiosDraft) -> Smbios {
    let SmbiosDraft { manufacturer, product, version, serial, sku, family } = draft;
    let mut text = |name: &str, value: Option<String>| {
        let value = value.unwrap_or_default();
        if value.len() > 63 || value.chars().any(char::is_control) {
            let path = format!("smbios.{name}");
            p.add(path, "at most 63 bytes and no control characters are possible");
        }
        value
    };
    Smbios {
        manufacturer: text("manufacturer", manufacturer),
        product: text("product", product),
        version: text("version", version),
        serial: text("serial", serial),
        sku: text("sku", sku),
        family: text("family", family),
    }
}

pub(crate) fn resolve_bootstrap(p: &mut Problems, draft: BootstrapDraft) -> Option<Bootstrap> {
    let BootstrapDraft { source, content, require } = draft;
    if source.is_some() && content.is_some() {
        p.add("bootstrap", "a script is either `source` or `content`");
        return None;
    }
    let script = crate::resolve::file_content(p, "bootstrap", source, content);
    Some(Bootstrap { script, require: require.unwrap_or(false) })
}

pub(crate) fn resolve_mdata(p: &mut Problems, draft: MdataDraft) -> Mdata {
    let MdataDraft { object, customer, internal, namespaces } = draft;
    let mdata = Mdata {
        object: object.unwrap_or_else(|| "{}".into()),
        customer: customer.unwrap_or_default(),
        internal: internal.unwrap_or_default(),
        namespaces: namespaces.unwrap_or_default(),
    };
    if mdata.weight() > MAX_MDATA {
        p.add("mdata", format!("it holds {} bytes; 1 MiB is possible", mdata.weight()));
    }
    mdata
}

pub(crate) fn resolve_cidata(
    p: &mut Problems,
    files: BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    const NAMES: [&str; 4] = ["meta-data", "network-config", "user-data", "vendor-data"];
    for name in files.keys().filter(|name| !NAMES.contains(&name.as_str())) {
        p.add("cidata", format!("{name:?} is not looked for; known are {}", NAMES.join(", ")));
    }
    if files.values().map(String::len).sum::<usize>() > MAX_MDATA {
        p.add("cidata", "its files have at most 1 MiB together");
    }
    files
}

pub(crate) fn resolve_subnet(
    p: &mut Problems,
    at: &impl Fn(&str) -> String,
    address: Option<Ipv4Addr>,
    prefix: Option<u32>,
    gateway: Option<String>,
) -> Option<Subnet> {
    let gateway: Option<Ipv4Addr> = parse(p, &at("gateway"), gateway);
    let Some(prefix) = prefix else {
        if gateway.is_some() {
            p.add(at("gateway"), "a router goes with an `address` and its `prefix`");
        }
        return None;
    };
    match u8::try_from(prefix) {
        Ok(prefix @ 8..=32) if address.is_some() => Some(Subnet { prefix, gateway }),
        Ok(8..=32) => {
            p.add(at("prefix"), "a prefix goes with an `address`");
            None
        }
        Ok(_) | Err(_) => {
            p.add(at("prefix"), format!("{prefix} is out of range; 8 to 32 is possible"));
            None
        }
    }
}

pub(crate) fn resolve_segment(
    p: &mut Problems,
    at: &impl Fn(&str) -> String,
    subnet: Option<Subnet>,
    number: Option<u32>,
    gateway6: Option<String>,
) -> Option<Segment> {
    let Some(number) = number else {
        if gateway6.is_some() {
            p.add(at("gateway6"), "a router for IPv6 goes with a `segment`");
        }
        return None;
    };
    if subnet.is_none() {
        p.add(at("segment"), "a segment goes with an `address` and its `prefix`");
    }
    let gateway6 = gateway6.and_then(|text| {
        let parts = text.split_once('/');
        let parsed = parts.and_then(|(ip, prefix)| {
            let prefix = prefix.parse().ok().filter(|prefix| (1..=128).contains(prefix))?;
            Some((ip.parse().ok()?, prefix))
        });
        if parsed.is_none() {
            p.add(at("gateway6"), format!("{text:?} is not an IPv6 address with a prefix length"));
        }
        parsed
    });
    match u8::try_from(number) {
        Ok(number) => Some(Segment { number, gateway6 }),
        Err(_) => {
            p.add(at("segment"), format!("{number} is out of range; 0 to 255 is possible"));
            None
        }
    }
}

/// Nothing where it is what everybody expects.
pub(crate) fn resolve_mtu(
    p: &mut Problems,
    at: &impl Fn(&str) -> String,
    mtu: Option<u32>,
) -> Option<u16> {
    let mtu = mtu?;
    if !(576..=9000).contains(&mtu) {
        p.add(at("mtu"), format!("{mtu} is out of range; 576 to 9000 is possible"));
    }
    u16::try_from(mtu).ok().filter(|mtu| *mtu != 1500)
}

pub(crate) fn resolve_guard(p: &mut Problems, at: &str, draft: GuardDraft) -> Guard {
    let GuardDraft { allow, addresses, blocked_ports } = draft;
    let each = |name: &str, i: usize| format!("{at}.{name}[{i}]");
    let allow = allow.unwrap_or_default().into_iter().enumerate();
    let allow = allow.filter_map(|(i, word)| p.take(&each("allow", i), word.parse())).collect();
    let addresses = addresses.unwrap_or_default().into_iter().enumerate();
    let addresses =
        addresses.filter_map(|(i, text)| p.take(&each("addresses", i), text.parse())).collect();
    Guard { allow, addresses, blocked_ports: blocked_ports.unwrap_or_default() }
}

/// The path within the machine's own folder.
pub(crate) fn own_path(source: &str) -> Result<PathBuf, String> {
    let text = source.strip_prefix(OWN).unwrap_or(source).trim_start_matches('/');
    let path = Path::new(text);
    let plain = path.components().all(|c| matches!(c, Component::Normal(_)));
    if text.is_empty() || !plain || text.contains(['\0', '\n']) {
        return Err(format!("{source:?} does not name a file below the machine's own folder"));
    }
    Ok(path.to_owned())
}

pub(crate) fn own_text(path: &Path) -> String {
    format!("{OWN}{}", path.display())
}
