//! `kvm.create`: its arguments checked in that system's order, and what they ask for as a draft.

use std::collections::BTreeMap;

use lodge_spec::draft::{
    CpusDraft, DiskDraft, DisplayDraft, Draft, FileDraft, MemoryDraft, NicDraft, OriginDraft,
    PortDraft, ShareDraft,
};
use lodge_spec::flist::{self, FlistDraft};
use lodge_spec::remote::Remote;
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::iotune;
use super::jobs::Failure;
use super::nics::{self, Nic};
use super::{DOOR, Settings};

/// Ports of the guest by those of the host.
pub(super) type Ports = BTreeMap<String, u32>;

/// What machines were asked for, kept and given back.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Params {
    pub(super) nics: Vec<Nic>,
    pub(super) port: Option<Ports>,
    pub(super) name: String,
    pub(super) cpu: i64,
    pub(super) memory: i64,
    pub(super) flist: String,
    pub(super) storage: String,
    pub(super) mount: Option<Vec<Mount>>,
    pub(super) media: Option<Vec<Media>>,
    pub(super) config: Option<BTreeMap<String, String>>,
    pub(super) tags: Option<Vec<String>>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Mount {
    source: String,
    target: String,
    readonly: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Media {
    pub(super) url: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) bus: String,
    /// What its disk is called here, whichever others come and go; only written down.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) disk: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) iotune: Option<Value>,
}

impl Media {
    /// What its disk is called where it is the one of this number.
    pub(super) fn disk_name(&self, index: usize) -> String {
        let letter = |n: usize| (b'a' + (n % 26) as u8) as char;
        let kind = if self.kind == "cdrom" { "hd" } else { "vd" };
        match index / 26 {
            0 => format!("{kind}{}", letter(index)),
            more => format!("{kind}{}{}", letter(more - 1), letter(index)),
        }
    }
}

/// What is written down with a machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) sequence: u16,
    pub(super) params: Params,
}

/// Reads the arguments; nulls are as good as nothing.
pub(super) fn params(arguments: &Value, tags: Option<&[String]>) -> Result<Params, Failure> {
    let Value::Object(fields) = arguments else {
        return Err(Failure::new("the arguments are not an object"));
    };
    let given: serde_json::Map<String, Value> = fields
        .iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let params = serde_json::from_value::<Params>(Value::Object(given));
    let mut params = params.map_err(|e| Failure::new(e.to_string()))?;
    for (index, media) in params.media.iter_mut().flatten().enumerate() {
        media.disk = media.disk_name(index);
    }
    // Tags are the command's.
    params.tags = tags.map(<[String]>::to_vec);
    check(&params)?;
    Ok(params)
}

/// The interfaces and ports that a machine is to have on another host.
pub(super) fn ways(arguments: &Value) -> Result<(Vec<Nic>, Option<Ports>), Failure> {
    fn read<T: serde::de::DeserializeOwned>(value: &Value) -> Result<T, Failure> {
        serde_json::from_value(value.clone()).map_err(|e| Failure::new(e.to_string()))
    }
    let nics = read::<Option<Vec<Nic>>>(&arguments["nics"])?.unwrap_or_default();
    nics::check(&nics)?;
    Ok((nics, read(&arguments["port"])?))
}

/// What interfaces and ports mean here.
pub(super) fn network(
    nics: &[Nic],
    port: Option<&Ports>,
    sequence: u16,
    settings: &Settings,
) -> Result<(Vec<NicDraft>, Vec<PortDraft>), Failure> {
    // Without the default network there is nothing that a port could lead to.
    let default = nics.iter().any(|nic| nic.kind == "default");
    let nics = nics.iter().map(|nic| nics::draft(nic, sequence, &settings.links));
    let ports = port.into_iter().flatten().filter(|_| default);
    let ports = ports.map(|(host, guest)| nics::port(host, *guest));
    Ok((nics.collect::<Result<_, _>>()?, ports.collect::<Result<_, _>>()?))
}

fn check(params: &Params) -> Result<(), Failure> {
    nics::check(&params.nics)?;
    if params.media.as_ref().is_none_or(Vec::is_empty) && params.flist.is_empty() {
        let what = "At least one boot media has to be provided (via media or an flist)";
        return Err(Failure::new(what));
    }
    if params.cpu <= 0 {
        return Err(Failure::new("CPU is a required parameter"));
    }
    if params.memory <= 0 {
        return Err(Failure::new("Memory is a required parameter"));
    }
    match params.mount.iter().flatten().any(|mount| mount.target == "root") {
        true => Err(Failure::new("mount target 'root' is reserved")),
        false => Ok(()),
    }
}

/// A disk of a running or a coming machine.
pub(super) fn disk(media: &Media) -> Result<DiskDraft, Failure> {
    let source = match media.url.split_once("://") {
        None => media.url.clone(),
        Some(("file", path)) => percent_decode_str(path).decode_utf8_lossy().into_owned(),
        Some(_) if Remote::is_meant(&media.url) => media.url.clone(),
        Some((scheme, _)) => {
            return Err(Failure::new(format!(
                "media of the kind {scheme}:// is not supported; give the path of a file or a block \
                 device, nbd://HOST/NAME, or zdb://HOST?size=SIZE"
            )));
        }
    };
    let cdrom = match media.kind.as_str() {
        "" | "disk" => false,
        "cdrom" => true,
        other => return Err(Failure::new(format!("invalid media type '{other}'"))),
    };
    let limits = media.iotune.as_ref().map(iotune::limits).transpose()?.flatten();
    Ok(DiskDraft {
        name: Some(media.disk.clone()),
        source: Some(source),
        media: cdrom.then(|| "cdrom".into()),
        bus: Some(media.bus.clone()).filter(|bus| !bus.is_empty() && !cdrom),
        limits,
        ..DiskDraft::default()
    })
}

/// A name that this host can have for theirs.
fn host_name(name: &str, uuid: &str) -> String {
    let allowed = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let text: String = name.chars().map(allowed).take(40).collect();
    let text = text.trim_matches('-');
    match text == name {
        true => text.to_owned(),
        // Two of theirs must not become one of ours.
        false => format!("{}-{}", if text.is_empty() { "vm" } else { text }, &uuid[..8]),
    }
}

pub(super) fn draft(
    params: &Params,
    uuid: &str,
    sequence: u16,
    settings: &Settings,
) -> Result<Draft, Failure> {
    let media = params.media.iter().flatten();
    let disks: Vec<DiskDraft> = media.map(disk).collect::<Result<_, _>>()?;
    let (nics, ports) = network(&params.nics, params.port.as_ref(), sequence, settings)?;
    let shares = params.mount.iter().flatten().map(|mount| ShareDraft {
        source: Some(mount.source.clone()),
        tag: Some(mount.target.clone()),
        read_only: Some(mount.readonly),
    });
    let source = Some(params.flist.clone()).filter(|flist| !flist.is_empty());
    let config = params.config.iter().flatten().filter(|_| !params.flist.is_empty());
    let files = config.map(|(path, content)| FileDraft {
        path: Some(flist::within_root(path)),
        content: Some(content.clone()),
        mode: Some("0600".into()),
        ..FileDraft::default()
    });
    let storage = Some(params.storage.clone()).filter(|storage| !storage.is_empty());
    let kept = Kept { sequence, params: params.clone() };
    let document = serde_json::to_string(&kept).map_err(|e| Failure::new(e.to_string()))?;
    let number = |n: i64| u32::try_from(n).unwrap_or(u32::MAX);
    Ok(Draft {
        name: Some(host_name(&params.name, uuid)),
        uuid: Some(uuid.to_owned()),
        cpus: Some(CpusDraft::Count(number(params.cpu))),
        memory: Some(MemoryDraft::Bytes(u64::from(number(params.memory)) << 20)),
        flist: source.map(|source| FlistDraft {
            source: Some(source),
            store: storage.or_else(|| settings.storage.clone()),
            ..FlistDraft::default()
        }),
        disks: (!disks.is_empty()).then_some(disks),
        nics: Some(nics),
        ports: Some(ports),
        shares: Some(shares.collect()),
        files: Some(files.collect()),
        accel: Some(settings.accel.clone()),
        // Theirs; what is there from the start can be taken away on it, too.
        board: Some("pc".into()),
        display: settings.screens.map(|address| DisplayDraft {
            address: Some(address.to_string()),
            ..DisplayDraft::default()
        }),
        ephemeral: Some(true),
        origin: Some(OriginDraft {
            door: Some(DOOR.into()),
            id: Some(params.name.clone()),
            owner: Some(String::new()),
            document: Some(document),
        }),
        ..Draft::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn refused(arguments: Value) -> String {
        params(&arguments, None).unwrap_err().message
    }

    #[test]
    fn arguments_are_checked_in_order_cases_3_to_5() {
        let boot = "At least one boot media has to be provided (via media or an flist)";
        assert_eq!(refused(json!({"name": "a", "cpu": 0, "media": []})), boot);
        let nics = json!([{"type": "foo"}]);
        assert_eq!(refused(json!({"name": "a", "nics": nics})), "invalid nic type 'foo'");
        let with = |extra: Value| {
            let mut all = json!({"name": "a", "flist": "/x.flist", "cpu": 1, "memory": 512});
            for (key, value) in extra.as_object().unwrap() {
                all[key] = value.clone();
            }
            all
        };
        assert_eq!(refused(with(json!({"cpu": 0}))), "CPU is a required parameter");
        assert_eq!(refused(with(json!({"cpu": -1}))), "CPU is a required parameter");
        assert_eq!(refused(with(json!({"memory": 0}))), "Memory is a required parameter");
        let mount = json!({"mount": [{"source": "/x", "target": "root"}]});
        assert_eq!(refused(with(mount)), "mount target 'root' is reserved");
        assert!(refused(with(json!({"cpu": "two"}))).contains("invalid type"));
        assert!(refused(json!(null)).contains("not an object"));
        assert!(params(&with(json!({"media": null, "port": null})), None).is_ok());
    }

    #[test]
    fn names_become_names_of_this_host() {
        let uuid = "12345678-0000-4000-8000-000000000000";
        assert_eq!(host_name("azmy", uuid), "azmy");
        assert_eq!(host_name("My VM", uuid), "my-vm-12345678");
        assert_eq!(host_name("__", uuid), "vm-12345678");
    }
}
