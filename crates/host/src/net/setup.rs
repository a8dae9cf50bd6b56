//! Making a network's namespace and its bridge. Happens once for a network, not once for a
//! machine, so it may run `ip` and `nft`. Runs in a process of one thread.

use std::fs;
use std::io;
use std::path::Path;

use rustix::thread::UnshareFlags;

use super::guard;
use super::plan::{BRIDGE, BRIDGE_MAC, METADATA, NetPlan, PREFIX, SCRIPT};
use crate::paths::find_program;
use crate::proc::{Tool, ToolError};

#[derive(Debug, thiserror::Error)]
pub(crate) enum SetupError {
    #[error("{0}: {1}")]
    Step(&'static str, io::Error),
    #[error(transparent)]
    Tool(#[from] ToolError),
    #[error("{0} is not installed; `apt-get install {1}` adds it")]
    Missing(&'static str, &'static str),
}

/// Leaves for a new network namespace, and for a user namespace too when not root.
pub(crate) fn enter_namespace(rootless: bool) -> Result<(), SetupError> {
    let step = |what| move |e: io::Error| SetupError::Step(what, e);
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let user = if rootless { UnshareFlags::NEWUSER } else { UnshareFlags::empty() };
    // SAFETY: the process has one thread and has handed out nothing that these flags change.
    unsafe { rustix::thread::unshare_unsafe(user | UnshareFlags::NEWNET) }
        .map_err(|e| SetupError::Step("making a namespace", e.into()))?;
    if rootless {
        fs::write("/proc/self/setgroups", "deny").map_err(step("mapping groups"))?;
        fs::write("/proc/self/uid_map", format!("0 {uid} 1")).map_err(step("mapping users"))?;
        fs::write("/proc/self/gid_map", format!("0 {gid} 1")).map_err(step("mapping groups"))?;
    }
    Ok(())
}

/// The bridge with its addresses; for root also the link to the host, whose namespace is that of
/// process `host_pid`.
pub(crate) async fn inside(plan: &NetPlan, host_pid: Option<u32>) -> Result<(), SetupError> {
    let mut batch = format!(
        "link set lo up\n\
         link add {BRIDGE} address {BRIDGE_MAC} type bridge stp_state 0 forward_delay 0\n\
         addr add {gateway}/{PREFIX} dev {BRIDGE}\n\
         addr add {names}/{PREFIX} dev {BRIDGE}\n\
         addr add {SCRIPT}/32 dev {BRIDGE}\n\
         addr add {METADATA}/32 dev {BRIDGE}\n\
         link set {BRIDGE} up\n\
         {patience}",
        gateway = plan.gateway(),
        names = plan.names(),
        patience = ask_often(BRIDGE),
    );
    let mut rules =
        String::from("table ip lodge {\n chain out {\n  type nat hook postrouting priority 100;\n");
    if let Some(pid) = host_pid {
        let (host, own) = plan.uplink;
        batch += &format!(
            "link add up0 type veth peer name {interface} netns {pid}\n\
             addr add {own}/30 dev up0\n\
             link set up0 up\n\
             route add default via {host}\n",
            interface = plan.host_interface,
        );
        rules += "  oifname \"up0\" masquerade\n";
    } else {
        rules += "  oifname \"tap0\" masquerade\n";
    }
    rules += " }\n}\n";
    rules += guard::TABLE;
    ip(&batch).await?;
    nft(&rules).await?;
    let forward = Path::new("/proc/sys/net/ipv4/ip_forward");
    fs::write(forward, "1").map_err(|e| SetupError::Step("turning on forwarding", e))
}

/// For `ip`: neighbours are asked for ten times a second, because a second is long for who was just
/// started, and for ten seconds, because who was just brought back can be that busy.
pub(super) fn ask_often(interface: &str) -> String {
    format!(
        "ntable change name arp_cache dev {interface} retrans 100 mcast_probes 100 ucast_probes 100\n"
    )
}

/// The host's end of the link: an address, masquerading, and no way in but answers.
pub(crate) async fn host_side(plan: &NetPlan) -> Result<(), SetupError> {
    let (host, own) = plan.uplink;
    let interface = &plan.host_interface;
    ip(&format!("addr add {host}/30 dev {interface}\nlink set {interface} up\n")).await?;
    let table = table(plan);
    // One atomic batch: the table is there whole or not at all.
    nft(&format!(
        "table ip {table}\ndelete table ip {table}\ntable ip {table} {{\n\
         chain out {{ type nat hook postrouting priority 100; \
         ip saddr {own} oifname != \"{interface}\" masquerade; }}\n\
         chain in {{ type filter hook input priority 0; \
         iifname \"{interface}\" ct state established,related accept; \
         iifname \"{interface}\" drop; }}\n}}\n"
    ))
    .await?;
    let forward = Path::new("/proc/sys/net/ipv4/ip_forward");
    match fs::read_to_string(forward).as_deref().map(str::trim) {
        Ok("1") => Ok(()),
        _ => fs::write(forward, "1").map_err(|e| SetupError::Step("turning on forwarding", e)),
    }
}

/// Takes the host's end away. The link too: a connection that was cut off can hold the namespace
/// for minutes after its last process.
pub(crate) async fn forget_host_side(plan: &NetPlan) {
    let table = table(plan);
    let _ = ip(&format!("link del {}\n", plan.host_interface)).await;
    let _ = nft(&format!("table ip {table}\ndelete table ip {table}\n")).await;
}

fn table(plan: &NetPlan) -> String {
    format!("lodge_{}", plan.host_interface.replace('-', "_"))
}

pub(super) async fn ip(batch: &str) -> Result<(), SetupError> {
    let program = find_program("ip").ok_or(SetupError::Missing("ip", "iproute2"))?;
    Ok(Tool::new(program).args(["-batch", "-"]).feed(batch.as_bytes()).await?)
}

pub(super) async fn nft(rules: &str) -> Result<(), SetupError> {
    let program = find_program("nft").ok_or(SetupError::Missing("nft", "nftables"))?;
    Ok(Tool::new(program).args(["-f", "-"]).feed(rules.as_bytes()).await?)
}
