//! Interfaces that are wired to links of the host. A port of the link comes into the network's
//! namespace and goes with it: a bridge joins it with the interfaces of machines, or, where the
//! link knows each machine by its address, all that comes is handed on. Nothing here has an address,
//! and nothing of it is let through to where things have one.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;

use lodge_spec::machine::Machine;
use lodge_spec::names::Mac;
use lodge_spec::problem::Problems;
use lodge_spec::wire::Wire;
use tokio::io::AsyncWriteExt;
use tokio::sync::Mutex;

use super::names::{World, enter};
use super::plan::NetPlan;
use super::setup::{ip, nft};
use crate::paths::find_program;
use crate::proc::Tool;

/// What no packet from a wire gets past. The names are those of `Wires::take`. What a bridge passes
/// on goes through here too on some hosts: it comes from a wire and stays there.
const FENCE: &str = "table inet wires {\n \
     chain in { type filter hook input priority -300; iifname \"wire*\" drop; }\n \
     chain through { type filter hook forward priority -300; \
     iifname \"wire*\" oifname != \"wire*\" drop; \
     iifname != \"wire*\" oifname \"wire*\" drop; }\n}\n";

/// The links that machines are wired to.
#[derive(Default)]
pub(super) struct Wires {
    joined: Mutex<BTreeMap<Wire, Joined>>,
    /// Of the next port.
    number: Cell<u32>,
    fenced: Cell<bool>,
}

struct Joined {
    port: String,
    bridge: String,
    members: u32,
}

/// An interface's place on a wire.
pub(super) enum Place {
    /// To be a port of this bridge.
    Bridge(String),
    /// To be joined with this interface.
    Own(String),
}

/// That the host has the links that a machine is wired to.
pub(crate) fn check_all(machine: &Machine) -> Problems {
    let mut problems = Problems::default();
    for (i, nic) in machine.nics.iter().enumerate() {
        if let Some(wire) = &nic.wire {
            problems.take(&format!("nics[{i}].wire"), check(wire));
        }
    }
    problems
}

fn check(wire: &Wire) -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("only root wires machines to links of the host".into());
    }
    let link = Path::new("/sys/class/net").join(wire.interface());
    let name = wire.interface();
    match wire {
        Wire::Bridge(_) if !link.join("bridge").exists() => {
            Err(format!("bridge '{name}' not found"))
        }
        _ if !link.exists() => Err(format!("interface '{name}' not found")),
        _ => Ok(()),
    }
}

impl Wires {
    pub(super) async fn take(
        &self,
        wire: &Wire,
        mac: Mac,
        plan: &NetPlan,
        world: &World,
    ) -> Result<Place, String> {
        if !self.fenced.replace(true) {
            nft(FENCE).await.map_err(|e| e.to_string())?;
        }
        if let Wire::Macvlan(on) = wire {
            let port = format!("wire{}", self.next());
            let kind = format!("address {mac}");
            at_host(world, &moved(on, &port, &kind, "macvlan mode bridge")).await?;
            quiet(&port);
            ip(&format!("link set {port} up\n")).await.map_err(|e| e.to_string())?;
            return Ok(Place::Own(port));
        }
        let mut joined = self.joined.lock().await;
        if let Some(known) = joined.get_mut(wire) {
            known.members += 1;
            return Ok(Place::Bridge(known.bridge.clone()));
        }
        let number = self.next();
        let (port, bridge) = (format!("wp{number}"), format!("wire{number}"));
        match wire {
            Wire::Bridge(name) => {
                // Six characters that no other instance has.
                let far = format!("{}w{number}", &plan.host_interface[..6]);
                let own = std::process::id();
                at_host(world, &format!("link add {far} type veth peer name {port} netns {own}\n"))
                    .await?;
                let joined = at_host(world, &format!("link set {far} master {name} up\n")).await;
                if joined.is_err() {
                    let _ = ip(&format!("link del {port}\n")).await;
                }
                joined?;
            }
            Wire::Vlan { id, on } => {
                at_host(world, &moved(on, &port, "", &format!("vlan id {id}"))).await?;
            }
            Wire::Vxlan { id, on } => {
                let [_, high, middle, low] = id.to_be_bytes();
                let group = format!("239.{high}.{middle}.{low}");
                let own = std::process::id();
                at_host(
                    world,
                    &format!(
                        "link add {port} netns {own} type vxlan id {id} dev {on} group {group} \
                         dstport 4789 ttl 8\n"
                    ),
                )
                .await?;
            }
            Wire::Passthrough(on) => {
                at_host(world, &moved(on, &port, "", "macvlan mode passthru")).await?;
            }
            Wire::Macvlan(_) => {}
        }
        let made = async {
            ip(&format!("link add {bridge} type bridge stp_state 0 forward_delay 0\n")).await?;
            quiet(&bridge);
            quiet(&port);
            ip(&format!("link set {port} master {bridge} up\nlink set {bridge} up\n")).await
        };
        if let Err(error) = made.await {
            let _ = ip(&format!("link del {port}\n")).await;
            return Err(error.to_string());
        }
        joined.insert(wire.clone(), Joined { port, bridge: bridge.clone(), members: 1 });
        Ok(Place::Bridge(bridge))
    }

    /// An interface has gone; with the last one its wire goes.
    pub(super) async fn give_back(&self, wire: &Wire, place: &Place) {
        if let Place::Own(port) = place {
            let _ = ip(&format!("link del {port}\n")).await;
            return;
        }
        let mut joined = self.joined.lock().await;
        let Some(known) = joined.get_mut(wire) else { return };
        known.members -= 1;
        if known.members == 0
            && let Some(Joined { port, bridge, .. }) = joined.remove(wire)
        {
            let _ = ip(&format!("link del {port}\nlink del {bridge}\n")).await;
        }
    }

    fn next(&self) -> u32 {
        self.number.replace(self.number.get() + 1)
    }
}

/// What makes an interface upon one of the host's, in our namespace.
fn moved(on: &str, name: &str, more: &str, kind: &str) -> String {
    let own = std::process::id();
    format!("link add link {on} name {name} {more} netns {own} type {kind}\n")
}

/// An interface that speaks of its own accord would be a machine that nobody made.
fn quiet(name: &str) {
    // A kernel without IPv6 says nothing anyway.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
}

/// Hands on all that comes, from each of two interfaces to the other.
pub(super) async fn splice(one: &str, other: &str) -> Result<(), String> {
    let program = find_program("tc").ok_or("tc is missing; it comes with iproute2")?;
    let way = |from: &str, to: &str| {
        format!(
            "qdisc add dev {from} ingress\nfilter add dev {from} parent ffff: protocol all u32 \
             match u32 0 0 action mirred egress redirect dev {to}\n"
        )
    };
    let batch = way(one, other) + &way(other, one);
    let fed = Tool::new(program).args(["-batch", "-"]).feed(batch.as_bytes()).await;
    fed.map_err(|e| e.to_string())
}

/// `ip` in the host's namespace, while everything else stays in ours.
async fn at_host(world: &World, batch: &str) -> Result<(), String> {
    let Some((host, own)) = &world.namespaces else {
        return Err("only root wires machines to links of the host".into());
    };
    let program = find_program("ip").ok_or("ip is missing; it comes with iproute2")?;
    let tool = Tool::new(program).args(["-batch", "-"]);
    let mut command = tool.command();
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    enter(host);
    let spawned = command.spawn();
    enter(own);
    let mut child = spawned.map_err(|e| tool.start_error(e).to_string())?;
    let mut stdin = child.stdin.take().expect("piped");
    let written = stdin.write_all(batch.as_bytes()).await;
    drop(stdin);
    let output = child.wait_with_output().await.map_err(|e| e.to_string())?;
    if output.status.success() {
        return written.map_err(|e| e.to_string());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let first = said.lines().find(|line| !line.trim().is_empty()).unwrap_or("it did not say why");
    Err(first.trim_start_matches("Error: ").to_owned())
}
