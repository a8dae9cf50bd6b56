//! What confines a running process, read back from the kernel rather than from what was planned.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

/// What the kernel says about a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InForce {
    pub uid: u32,
    pub gid: u32,
    pub no_new_privs: bool,
    /// 0 none, 2 filter.
    pub seccomp_mode: u32,
    pub seccomp_filters: u32,
    /// Effective, permitted and bounding sets; hexadecimal.
    pub capabilities: BTreeMap<String, String>,
    /// Namespaces that are not those of the reader.
    pub own_namespaces: Vec<String>,
    pub shared_namespaces: Vec<String>,
    pub cgroups: Vec<String>,
    /// Names in its root folder.
    pub root: Vec<String>,
}

const NAMESPACES: [&str; 7] = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];

/// Reads `/proc/PID`.
pub fn read(pid: u32) -> io::Result<InForce> {
    let proc = format!("/proc/{pid}");
    let status = fs::read_to_string(format!("{proc}/status"))?;
    let fields: BTreeMap<&str, &str> =
        status.lines().filter_map(|l| l.split_once(':')).map(|(k, v)| (k, v.trim())).collect();
    let number = |key: &str| {
        let first = fields.get(key).and_then(|v| v.split_whitespace().next());
        first.and_then(|v| v.parse().ok()).unwrap_or(0)
    };
    let capabilities = ["CapEff", "CapPrm", "CapBnd"]
        .iter()
        .filter_map(|key| Some((key.to_string(), fields.get(key)?.to_string())))
        .collect();
    let (mut own, mut shared) = (Vec::new(), Vec::new());
    for name in NAMESPACES {
        let theirs = fs::read_link(format!("{proc}/ns/{name}"))?;
        let ours = fs::read_link(format!("/proc/self/ns/{name}"))?;
        if theirs == ours { shared.push(name.to_owned()) } else { own.push(name.to_owned()) }
    }
    let cgroups = fs::read_to_string(format!("{proc}/cgroup"))?;
    let cgroups = cgroups.lines().filter(|line| line.contains("/lodge/")).map(str::to_owned);
    let mut root: Vec<String> = fs::read_dir(format!("{proc}/root"))
        .map(|entries| entries.flatten().map(|e| e.file_name().to_string_lossy().into()).collect())
        .unwrap_or_default();
    root.sort();
    Ok(InForce {
        uid: number("Uid"),
        gid: number("Gid"),
        no_new_privs: number("NoNewPrivs") == 1,
        seccomp_mode: number("Seccomp"),
        seccomp_filters: number("Seccomp_filters"),
        capabilities,
        own_namespaces: own,
        shared_namespaces: shared,
        cgroups: cgroups.collect(),
        root,
    })
}
