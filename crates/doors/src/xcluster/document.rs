//! A cluster in one file, in Lodge's own words: what the options of `xc` say one by one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

/// A cluster as asked for. Unknown fields are refused.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Document {
    /// At most 11 letters, digits and inner hyphens.
    pub name: String,
    /// Path of the image that all share.
    pub image: Option<PathBuf>,
    /// Path of the kernel.
    pub kernel: Option<PathBuf>,
    /// Unpacked at the first start, in this order.
    pub overlays: Vec<String>,
    pub nodes: Option<u32>,
    pub routers: Option<u32>,
    pub testers: Option<u32>,
    /// MiB of each VM.
    pub memory: Option<u32>,
    pub cpus: Option<u32>,
    /// Nets of nodes and of routers.
    pub nets: Nets,
    pub mtu: Option<u32>,
    /// Kernel arguments of all.
    pub append: Option<String>,
    /// What single VMs have of their own, by number.
    pub vms: BTreeMap<String, Own>,
    /// What guests are told in `/etc/xcluster_env`, with an overlay that tells it.
    pub variables: BTreeMap<String, String>,
    /// Host port from which those for ssh count; another for each cluster of a host.
    pub ssh_ports: Option<u16>,
    pub telnet_ports: Option<u16>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Nets {
    pub nodes: Option<Vec<u8>>,
    pub routers: Option<Vec<u8>>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Own {
    pub memory: Option<u32>,
    pub cpus: Option<u32>,
    pub nets: Option<Vec<u8>>,
    pub append: Option<String>,
}

/// The document as settings; paths count from the folder of its file.
pub fn settings(value: Value, folder: &Path) -> Result<BTreeMap<String, String>, String> {
    let document: Document = serde_json::from_value(value).map_err(|e| e.to_string())?;
    let Document {
        name,
        image,
        kernel,
        overlays: _,
        nodes,
        routers,
        testers,
        memory,
        cpus,
        nets,
        mtu,
        append,
        vms,
        variables,
        ssh_ports,
        telnet_ports,
    } = document;
    if name.is_empty() {
        return Err("a cluster needs a `name`".into());
    }
    let list = |nets: Vec<u8>| nets.iter().map(u8::to_string).collect::<Vec<_>>().join(",");
    let path = |path: PathBuf| folder.join(path).display().to_string();
    let number = |n: u32| n.to_string();
    let mut all = vec![
        ("__cluster".to_owned(), Some(name)),
        ("__image".into(), image.map(path)),
        ("__kbin".into(), kernel.map(path)),
        ("__nvm".into(), nodes.map(number)),
        ("__nrouters".into(), routers.map(number)),
        ("__ntesters".into(), testers.map(number)),
        ("__mem".into(), memory.map(number)),
        ("__smp".into(), cpus.map(number)),
        ("__nets_vm".into(), nets.nodes.map(list)),
        ("__nets_router".into(), nets.routers.map(list)),
        ("__mtu".into(), mtu.map(number)),
        ("__append".into(), append),
        ("XCLUSTER_SSH_BASE".into(), ssh_ports.map(|n| n.to_string())),
        ("XCLUSTER_TELNET_BASE".into(), telnet_ports.map(|n| n.to_string())),
    ];
    for (id, Own { memory, cpus, nets, append }) in vms {
        super::nodes::id(&id).map_err(|why| format!("vms: {why}"))?;
        all.push((format!("__mem{id}"), memory.map(number)));
        all.push((format!("__smp{id}"), cpus.map(number)));
        all.push((format!("__nets{id}"), nets.map(list)));
        all.push((format!("__append{id}"), append));
    }
    all.extend(variables.into_iter().map(|(n, value)| (format!("xcluster_{n}"), Some(value))));
    Ok(all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_document_says_what_options_say() {
        let value = json!({
            "name": "lab", "image": "hd.img", "nodes": 3, "routers": 0,
            "nets": {"nodes": [0, 1, 3]}, "vms": {"2": {"memory": 256}}, "variables": {"A": "b"},
        });
        let own = settings(value, Path::new("/there")).unwrap();
        let get = |name: &str| own.get(name).map(String::as_str);
        assert_eq!(get("__image"), Some("/there/hd.img"));
        assert_eq!((get("__nvm"), get("__nets_vm")), (Some("3"), Some("0,1,3")));
        assert_eq!(
            (get("__mem2"), get("xcluster_A"), get("__mtu")),
            (Some("256"), Some("b"), None)
        );
        for odd in
            [json!({}), json!({"name": "a", "nods": 3}), json!({"name": "a", "vms": {"0": {}}})]
        {
            assert!(settings(odd, Path::new("/")).is_err());
        }
    }
}
