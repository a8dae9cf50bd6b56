//! Networks of clusters: one beside the others for each number, to be entered with a shell.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;

use anyhow::{Context, Result, anyhow, bail};
use lodge_doors::xcluster::nodes::{self, HOST};
use lodge_doors::xcluster::settings::Settings;
use lodge_spec::machine::Segment;
use lodge_spec::names::NetName;
use lodge_spec::request::{NetworkAsk, Reply, Request};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{Session, ask, foreign, say};

/// The number of the network that this process is in, if it is in one.
pub(super) fn current(settings: &Settings) -> Option<u8> {
    let number = |name: &str| name.rsplit_once("_xcluster")?.1.parse().ok();
    if let Some(name) = settings.text("XCLUSTER_NETNS") {
        return number(name);
    }
    // Entered by other means: its name is where `ip` keeps them.
    let own = std::fs::metadata("/proc/self/ns/net").ok()?;
    let named = std::fs::read_dir("/run/netns").ok()?.flatten().find(|entry| {
        entry.metadata().is_ok_and(|m| (m.dev(), m.ino()) == (own.dev(), own.ino()))
    })?;
    number(named.file_name().to_str()?)
}

/// How `ip netns` knows a network.
fn netns(settings: &Settings, i: u8) -> String {
    format!("{}_xcluster{i}", settings.text("USER").unwrap_or("root"))
}

impl Session {
    fn number(&self) -> Result<u8> {
        let word = self.word(0, "a number")?;
        let number = word.parse().ok().filter(|n| (1..=120).contains(n));
        number.with_context(|| format!("[{word}] is not the number of a network (1 to 120)"))
    }

    async fn network_of(&self, name: NetName, what: NetworkAsk) -> Result<i32> {
        let mut client = self.client().await?;
        match ask(&mut client, Request::Network { name, ask: what }).await? {
            Reply::Document { value } => Ok(value["pid"].as_i64().unwrap_or(0) as i32),
            _ => bail!("an unexpected reply"),
        }
    }

    fn segment(&self, net: u8) -> NetworkAsk {
        let prefix = self.settings.text("xcluster_PREFIX").unwrap_or("1000::1");
        let address = nodes::address(net, HOST);
        let gateway6 = format!("{prefix}:{address}").parse().ok().map(|ip| (ip, 120));
        let segment = Segment { number: net, gateway6 };
        NetworkAsk::Segment { segment, gateway: Some((address, 24)) }
    }

    /// The network with the nets that all clusters have; it stays until `nsdel`.
    pub(super) async fn nsadd(&self) -> Result<u8> {
        let i = self.number()?;
        let name: NetName = format!("xc{i}").parse()?;
        let pid = self.network_of(name.clone(), NetworkAsk::Hold { stay: true }).await?;
        for net in [0, 1, 2] {
            self.network_of(name.clone(), self.segment(net)).await?;
        }
        if rustix::process::geteuid().is_root() {
            let netns = netns(&self.settings, i);
            let tool = foreign("ip")?.args(["netns", "attach", &netns, &pid.to_string()]);
            // There already, when this is the second time.
            let mut command = tool.command();
            let done = command.stderr(std::process::Stdio::null()).status().await?;
            if done.success() {
                say(&format!("Network [{netns}]"));
            }
        }
        Ok(0)
    }

    pub(super) async fn nsdel(&self) -> Result<u8> {
        let i = self.number()?;
        let name: NetName = format!("xc{i}").parse()?;
        if rustix::process::geteuid().is_root() {
            let tool = foreign("ip")?.args(["netns", "delete", &netns(&self.settings, i)]);
            let mut command = tool.command();
            let _ = command.stderr(std::process::Stdio::null()).status().await?;
        }
        self.network_of(name, NetworkAsk::Hold { stay: false }).await?;
        Ok(0)
    }

    /// A shell inside; it knows where it is.
    pub(super) async fn nsenter(&self) -> Result<u8> {
        let i = self.number()?;
        let name = format!("xc{i}").parse()?;
        let pid = self.network_of(name, NetworkAsk::Hold { stay: true }).await?;
        let open = |what: &str| {
            let path = format!("/proc/{pid}/ns/{what}");
            File::open(&path).map_err(|e| anyhow!("{path}: {e}"))
        };
        if !rustix::process::geteuid().is_root() {
            let user = open("user")?;
            move_into_link_name_space(user.as_fd(), Some(LinkNameSpaceType::User))
                .context("entering the network's user namespace")?;
        }
        let net = open("net")?;
        move_into_link_name_space(net.as_fd(), Some(LinkNameSpaceType::Network))
            .context("entering the network")?;
        let shell = self.settings.text("SHELL").unwrap_or("/bin/sh");
        let words = self.line.words.get(1..).unwrap_or_default();
        let tool = match words.split_first() {
            None => foreign(shell.rsplit('/').next().unwrap_or("sh"))?,
            Some((program, args)) => foreign(program)?.args(args),
        };
        let mut command = tool.command().into_std();
        command.stdin(std::process::Stdio::inherit());
        command.env("XCLUSTER_NETNS", netns(&self.settings, i));
        command.env_remove("KUBECONFIG").env_remove("XCLUSTER");
        Err(command.exec()).with_context(|| shell.to_owned())
    }

    pub(super) async fn br_setup(&self) -> Result<u8> {
        let word = self.word(0, "the number of a net")?;
        let net = word.parse().map_err(|_| anyhow!("[{word}] is not the number of a net"))?;
        let name = self.network()?;
        self.network_of(name.clone(), NetworkAsk::Hold { stay: true }).await?;
        self.network_of(name, self.segment(net)).await?;
        Ok(0)
    }
}
