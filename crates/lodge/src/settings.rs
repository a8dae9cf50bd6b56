//! What the host's owner decides: `lodge.toml`, then variables of the environment, then flags, each
//! stronger than the one before. Everything is checked at start; a mistake names its setting.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use lodge_doors::connect::{Foreign, Quota, Tenants, Token};
use lodge_doors::{vmadm, zero_os};
use lodge_host::paths::{Paths, host_id};
use lodge_spec::Bytes;
use lodge_spec::machine::{Accel, BackendKind};
use lodge_spec::names::NetName;
use serde::Deserialize;

const DEFAULT_PORT: u16 = 8080;
/// Where the guide of the Connect door has its kernels and disks.
const DEFAULT_ASSETS: [&str; 2] = ["/opt/vm-assets", "/data"];

/// Links that everybody has.
const DEFAULT_TAGS: [&str; 2] = ["admin", "external"];

/// The settings file. Unknown keys are refused.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct File {
    metald: MetaldFile,
    vmadm: VmadmFile,
    zero_os: ZeroOsFile,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ZeroOsFile {
    /// `IP:PORT`, or `off`.
    listen: Option<String>,
    /// Open to other hosts without asking who they are.
    insecure: bool,
    /// Whose members may come, with a token as their password.
    organization: Option<String>,
    /// PEM file with the public key that the organization's tokens are signed with.
    token_key: Option<PathBuf>,
    /// Where blocks of flists are that do not say so themselves.
    storage: Option<String>,
    /// Bridges (`NAME`), VLANs (`vlan:N`) and VXLANs (`vxlan:N`), each with its network.
    networks: BTreeMap<String, String>,
    /// The host's interface that carries VLANs which are not among those.
    backplane: Option<String>,
    /// The host's interface that carries VXLANs which are not among those.
    vxbackend: Option<String>,
    /// Host address on which screens are shown, or `off`.
    vnc_address: Option<String>,
    accel: Option<String>,
    tls: Option<Tls>,
}

/// The Zero-OS door, as it is to be opened.
pub(crate) struct ZeroOs {
    pub(crate) listen: SocketAddr,
    pub(crate) tls: Option<Tls>,
    pub(crate) settings: zero_os::Settings,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct VmadmFile {
    /// Host address on which screens are shown.
    vnc_address: Option<IpAddr>,
    /// Told to guests as the name of this place.
    datacenter_name: Option<String>,
    /// Names of links, each with the network that it stands for.
    nic_tags: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct MetaldFile {
    /// `IP:PORT`, or `off`.
    listen: Option<String>,
    /// Open to other hosts without asking who they are.
    insecure: bool,
    assets: Option<Vec<PathBuf>>,
    backend: Option<String>,
    accel: Option<String>,
    /// Callers must say who they are.
    auth: bool,
    /// `dev_customer_<id>` is accepted where callers must say who they are.
    development_tokens: bool,
    foreign: Option<ForeignWord>,
    #[serde(rename = "token")]
    tokens: Vec<TokenFile>,
    #[serde(rename = "quota")]
    quotas: BTreeMap<String, QuotaFile>,
    audit: Option<PathBuf>,
    traces: Option<TracesFile>,
    tls: Option<Tls>,
}

/// PEM files.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Tls {
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
    /// Whoever comes shows a certificate of one of these.
    pub(crate) client_ca: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TracesFile {
    /// `host:port` that takes OTLP over HTTP.
    endpoint: String,
    /// Which part of the calls is told, 0 to 1; all where absent.
    sampling: Option<f64>,
}

/// Where finished calls are told.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Traces {
    pub(crate) endpoint: String,
    pub(crate) sampling: f64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ForeignWord {
    NotFound,
    PermissionDenied,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenFile {
    sha256: String,
    customer: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct QuotaFile {
    vms: Option<usize>,
    vcpus: Option<u64>,
    memory: Option<String>,
}

/// The Connect door, as it is to be opened.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Metald {
    pub(crate) listen: Option<SocketAddr>,
    pub(crate) assets: Vec<PathBuf>,
    pub(crate) backend: String,
    pub(crate) accel: String,
    pub(crate) tenants: Tenants,
    pub(crate) audit: PathBuf,
    pub(crate) traces: Option<Traces>,
    pub(crate) tls: Option<Tls>,
}

/// What the command line adds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Flags {
    pub(crate) metald: Option<String>,
    pub(crate) zero_os: Option<String>,
    pub(crate) insecure: bool,
}

/// The settings file; one that is not there is an empty one.
fn file(paths: &Paths) -> Result<File> {
    let path = paths.settings();
    match std::fs::read_to_string(&path) {
        Ok(text) => toml::from_str(&text).with_context(|| path.display().to_string()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(File::default()),
        Err(e) => Err(e).with_context(|| path.display().to_string()),
    }
}

/// What `vmadm` is to know: links with their networks, and the rest.
pub(crate) fn vmadm(paths: &Paths) -> Result<(BTreeMap<String, String>, vmadm::Settings)> {
    let VmadmFile { vnc_address, datacenter_name, nic_tags } = file(paths)?.vmadm;
    let own = |tag: &str| (tag.to_owned(), tag.to_owned());
    let tags = nic_tags.unwrap_or_else(|| DEFAULT_TAGS.map(own).into());
    for (tag, network) in &tags {
        let name: Result<NetName, _> = network.parse();
        name.map_err(|e| anyhow!("vmadm.nic_tags.{tag}: {e}"))?;
    }
    let settings = vmadm::Settings {
        vnc_address: vnc_address.unwrap_or(Ipv4Addr::LOCALHOST.into()).to_string(),
        datacenter: datacenter_name,
        server_uuid: host_id(),
        buildstamp: env!("CARGO_PKG_VERSION").to_owned(),
    };
    Ok((tags, settings))
}

/// Reads what the Zero-OS door is to be; nothing where it stays shut.
pub(crate) fn zero_os(paths: &Paths, flags: &Flags) -> Result<Option<ZeroOs>> {
    let file = file(paths)?.zero_os;
    let written = flags.zero_os.as_ref().map(|text| ("--zero-os", text));
    let written = written.or_else(|| file.listen.as_ref().map(|text| ("zero_os.listen", text)));
    let listen: SocketAddr = match written {
        None => return Ok(None),
        Some((_, text)) if text == "off" => return Ok(None),
        Some((name, text)) => {
            text.parse().map_err(|_| anyhow!("{name}: {text:?} is not IP:PORT or off"))?
        }
    };
    let organization = match (file.organization, file.token_key) {
        (None, None) => None,
        (Some(name), Some(path)) => {
            let key = std::fs::read_to_string(&path);
            let key = key.with_context(|| format!("zero_os.token_key: {}", path.display()))?;
            let organization = zero_os::Organization::new(&name, &key);
            Some(organization.map_err(|why| anyhow!("zero_os.token_key: {why}"))?)
        }
        _ => bail!("zero_os: `organization` and `token_key` go together"),
    };
    // A token is a secret, which only an encrypted connection keeps.
    let guarded = organization.is_some() && file.tls.is_some();
    if !listen.ip().is_loopback() && !guarded && !file.insecure && !flags.insecure {
        bail!(
            "zero_os.listen: {listen} is open to other hosts; set `organization` with `token_key` \
             and `[zero_os.tls]`, or say --insecure"
        );
    }
    for (name, network) in &file.networks {
        let name_of: Result<NetName, _> = network.parse();
        name_of.map_err(|e| anyhow!("zero_os.networks.{name}: {e}"))?;
    }
    let screens = match file.vnc_address.as_deref() {
        None => Some(Ipv4Addr::LOCALHOST.into()),
        Some("off") => None,
        Some(text) => {
            let wrong = |_| anyhow!("zero_os.vnc_address: {text:?} is not an IP or off");
            Some(text.parse().map_err(wrong)?)
        }
    };
    let settings = zero_os::Settings {
        organization,
        storage: file.storage,
        links: zero_os::Links {
            networks: file.networks,
            backplane: file.backplane,
            vxbackend: file.vxbackend,
        },
        screens,
        accel: accel("zero_os.accel", file.accel)?,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    Ok(Some(ZeroOs { listen, tls: file.tls, settings }))
}

/// Reads the instance's settings.
pub(crate) fn read(paths: &Paths, flags: &Flags) -> Result<Metald> {
    let file = file(paths)?;
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    resolve(file.metald, flags, variable, paths)
}

fn resolve(
    file: MetaldFile,
    flags: &Flags,
    variable: impl Fn(&str) -> Option<String>,
    paths: &Paths,
) -> Result<Metald> {
    let listen = listen(&file, flags, &variable)?;
    let mut tokens = Vec::new();
    for TokenFile { sha256, customer } in file.tokens {
        let digest = digest(&sha256).with_context(|| format!("metald.token of {customer}"))?;
        tokens.push(Token { sha256: digest, customer });
    }
    let mut quotas = BTreeMap::new();
    for (customer, QuotaFile { vms, vcpus, memory }) in file.quotas {
        let memory = memory.map(|text| text.parse::<Bytes>());
        let memory = memory.transpose().map_err(|e| anyhow!("metald.quota.{customer}.memory: {e}"));
        quotas.insert(customer, Quota { vms, vcpus, memory_bytes: memory?.map(|b| b.0) });
    }
    let tenants = Tenants {
        required: file.auth,
        development: file.development_tokens,
        tokens,
        foreign: match file.foreign {
            Some(ForeignWord::PermissionDenied) => Foreign::Denied,
            Some(ForeignWord::NotFound) | None => Foreign::NotFound,
        },
        quotas,
    };
    let open = listen.is_some_and(|address| !address.ip().is_loopback());
    if open && !tenants.required && file.tls.is_none() && !file.insecure && !flags.insecure {
        bail!(
            "metald.listen: {} is open to other hosts; set `auth = true` with tokens or `[metald.tls]`, \
             or say --insecure",
            listen.map(|a| a.to_string()).unwrap_or_default()
        );
    }
    let assets = file.assets.unwrap_or_else(|| DEFAULT_ASSETS.map(PathBuf::from).to_vec());
    if let Some(odd) = assets.iter().find(|path| !path.is_absolute()) {
        bail!("metald.assets: {} is not an absolute path", odd.display());
    }
    Ok(Metald {
        listen,
        assets,
        backend: backend(file.backend, &variable)?,
        accel: accel("metald.accel", file.accel)?,
        tenants,
        traces: traces(file.traces, &variable)?,
        tls: file.tls,
        audit: file.audit.unwrap_or_else(|| paths.state.join("audit.jsonl")),
    })
}

fn listen(
    file: &MetaldFile,
    flags: &Flags,
    variable: &impl Fn(&str) -> Option<String>,
) -> Result<Option<SocketAddr>> {
    let written = flags.metald.as_ref().map(|text| ("--metald", text));
    let written = written.or_else(|| file.listen.as_ref().map(|text| ("metald.listen", text)));
    let mut address = SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_PORT));
    if let Some((name, text)) = written {
        if text == "off" {
            return Ok(None);
        }
        address = text.parse().map_err(|_| anyhow!("{name}: {text:?} is not IP:PORT or off"))?;
    }
    if flags.metald.is_none() {
        if let Some(port) = variable("UNKEY_METALD_PORT") {
            let port = port.parse().map_err(|_| anyhow!("UNKEY_METALD_PORT: {port:?} is no port"));
            address.set_port(port?);
        }
        if let Some(text) = variable("UNKEY_METALD_ADDRESS") {
            let parsed: Result<IpAddr, _> = text.parse();
            let ip = parsed.map_err(|_| anyhow!("UNKEY_METALD_ADDRESS: {text:?} is no address"));
            address.set_ip(ip?);
        }
    }
    Ok(Some(address))
}

/// The backend that machines of this door get: `auto`, or a hypervisor by its name.
fn backend(written: Option<String>, variable: &impl Fn(&str) -> Option<String>) -> Result<String> {
    let (name, word) = match (variable("UNKEY_METALD_BACKEND"), written) {
        (Some(word), _) => ("UNKEY_METALD_BACKEND", word),
        (None, Some(word)) => ("metald.backend", word),
        (None, None) => return Ok("auto".into()),
    };
    if word == "auto" {
        return Ok(word);
    }
    // As the older setting spells it.
    let word = if word == "cloudhypervisor" { "cloud-hypervisor".to_owned() } else { word };
    let known: Result<BackendKind, String> = word.parse();
    known.map(|b| b.to_string()).map_err(|why| anyhow!("{name}: unsupported backend type: {why}"))
}

fn accel(name: &str, written: Option<String>) -> Result<String> {
    let word = written.unwrap_or_else(|| "auto".into());
    match word == "auto" || word.parse::<Accel>().is_ok() {
        true => Ok(word),
        false => bail!("{name}: {word:?} is not auto, kvm or tcg"),
    }
}

/// From the file, else from the variables of the older program.
fn traces(
    file: Option<TracesFile>,
    variable: &impl Fn(&str) -> Option<String>,
) -> Result<Option<Traces>> {
    let on = variable("UNKEY_METALD_OTEL_ENABLED");
    let on = match on.as_deref() {
        None => false,
        Some(text) => text.parse().map_err(|_| {
            anyhow!("UNKEY_METALD_OTEL_ENABLED: {text:?} is neither true nor false")
        })?,
    };
    let (name, endpoint, sampling) = match file {
        Some(TracesFile { endpoint, sampling }) => ("metald.traces.sampling", endpoint, sampling),
        None if on => {
            let name = "UNKEY_METALD_OTEL_SAMPLING_RATE";
            let rate = variable(name).map(|text| {
                text.parse::<f64>().map_err(|_| anyhow!("{name}: {text:?} is no number"))
            });
            let endpoint = variable("UNKEY_METALD_OTEL_ENDPOINT");
            (name, endpoint.unwrap_or_else(|| "localhost:4318".into()), rate.transpose()?)
        }
        None => return Ok(None),
    };
    let sampling = sampling.unwrap_or(1.0);
    if !(0.0..=1.0).contains(&sampling) {
        bail!("{name}: tracing sampling rate must be between 0.0 and 1.0");
    }
    let endpoint = endpoint.trim_start_matches("http://").trim_end_matches('/').to_owned();
    Ok(Some(Traces { endpoint, sampling }))
}

fn digest(text: &str) -> Result<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        bail!("sha256 is not 64 hexadecimal digits; `printf %s TOKEN | sha256sum` makes it");
    }
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16)
            .map_err(|_| anyhow!("sha256 is not 64 hexadecimal digits"))?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(text: &str, variables: &[(&str, &str)], flags: &Flags) -> Result<Metald, String> {
        let paths = Paths { state: "/s".into(), run: "/r".into() };
        let file: File = toml::from_str(text).map_err(|e| e.to_string())?;
        let variable = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, v)| (*v).to_owned())
        };
        resolve(file.metald, flags, variable, &paths).map_err(|e| format!("{e:#}"))
    }

    #[test]
    fn defaults_are_those_of_the_guide() {
        let metald = run("", &[], &Flags::default()).unwrap();
        assert_eq!(metald.listen.unwrap().to_string(), "127.0.0.1:8080");
        assert_eq!(metald.assets, [PathBuf::from("/opt/vm-assets"), "/data".into()]);
        assert!(!metald.tenants.required);
        let flags = Flags { metald: Some("off".into()), ..Flags::default() };
        assert_eq!(run("", &[], &flags).unwrap().listen, None);
        let variables = [("UNKEY_METALD_PORT", "9000")];
        let listen = run("", &variables, &Flags::default()).unwrap().listen.unwrap();
        assert_eq!(listen.port(), 9000);
    }

    #[test]
    fn mistakes_name_their_setting() {
        let none = Flags::default();
        for (text, variables, complaint) in [
            ("", vec![("UNKEY_METALD_BACKEND", "xen")], "UNKEY_METALD_BACKEND"),
            ("", vec![("UNKEY_METALD_PORT", "x")], "UNKEY_METALD_PORT"),
            ("", vec![("UNKEY_METALD_ADDRESS", "0.0.0.0")], "open to other hosts"),
            ("[metald]\nlisten = 'x'", vec![], "metald.listen"),
            (
                "",
                vec![
                    ("UNKEY_METALD_OTEL_ENABLED", "true"),
                    ("UNKEY_METALD_OTEL_SAMPLING_RATE", "1.1"),
                ],
                "UNKEY_METALD_OTEL_SAMPLING_RATE",
            ),
            ("[metald.traces]\nendpoint = 'x:1'\nsampling = 2.0", vec![], "metald.traces.sampling"),
            ("[metald]\nlisten = '[::]:80'", vec![], "open to other hosts"),
            ("[metald]\nassets = ['x']", vec![], "metald.assets"),
            ("[metald]\nport = 1", vec![], "unknown field `port`"),
            ("[[metald.token]]\nsha256 = 'x'\ncustomer = 'a'", vec![], "metald.token of a"),
            ("[metald.quota.a]\nmemory = 'lots'", vec![], "metald.quota.a.memory"),
        ] {
            let said = run(text, &variables, &none).expect_err(text);
            assert!(said.contains(complaint), "{text}: {said}");
        }
        let flags = Flags { metald: Some("0.0.0.0:80".into()), zero_os: None, insecure: true };
        assert!(run("", &[], &flags).is_ok());
        assert!(run("[metald]\nlisten = '0.0.0.0:80'\nauth = true", &[], &none).is_ok());
    }
}
