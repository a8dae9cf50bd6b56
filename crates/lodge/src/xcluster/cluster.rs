//! VMs of a cluster: started at the pace that the host can bear, watched, stopped, looked at.

use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures_util::stream::{FuturesUnordered, StreamExt};
use lodge_doors::native::wire::Client;
use lodge_doors::xcluster::DOOR;
use lodge_doors::xcluster::grammar::WITHOUT_EFFECT;
use lodge_doors::xcluster::machines::{self, Cluster};
use lodge_doors::xcluster::nodes::{self, Vm};
use lodge_spec::names::NetName;
use lodge_spec::request::{Condition, Page, Refusal, Reply, Request};
use lodge_spec::state::{Detail, State};

use super::{Session, ask, foreign, nets, print, say, told};
use crate::console;

/// Ctrl-], as the interrupt character of old.
const LEAVE: u8 = 0x1d;
/// How long guests are given to answer, in seconds.
const PATIENCE: u64 = 180;
/// How long guests have to go by themselves, in milliseconds.
const GOODBYE: u64 = 5000;

/// Where consoles are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Consoles {
    /// In windows, where there is a screen for them.
    Windows,
    Tmux,
}

impl Session {
    /// The cluster that these settings are about. Kernel and image are looked at before anything
    /// is made.
    async fn cluster(&self) -> Result<Cluster> {
        for name in WITHOUT_EFFECT.iter().filter(|name| self.settings.text(name).is_some()) {
            say(&format!("WARNING: {name} has no effect here"));
        }
        let own = self.settings.flag("__bootable");
        let kernel = if own { None } else { Some(self.kernel()?) };
        let image = self.settings.path("__image");
        if !image.is_file() {
            bail!("Image not found [{}]; xc mkimage makes it", image.display());
        }
        let absolute = |path: &Path| -> Result<String> {
            Ok(std::path::absolute(path)?.to_str().context("a path in UTF-8")?.to_owned())
        };
        let cdrom = self.settings.path("__cdrom");
        let base = |name, default| -> Result<u16> {
            let number = told(self.settings.number(name, default))?;
            u16::try_from(number)
                .ok()
                .filter(|n| *n < 65_000)
                .with_context(|| format!("{name}: too large"))
        };
        let inside = nets::current(&self.settings).is_some();
        let ports = (base("XCLUSTER_TELNET_BASE", 12000)?, base("XCLUSTER_SSH_BASE", 12300)?);
        Ok(Cluster {
            name: self.network()?,
            kernel: kernel.as_deref().map(absolute).transpose()?,
            image: absolute(&image)?,
            cdrom: cdrom.is_file().then(|| absolute(&cdrom)).transpose()?,
            board: self.settings.text("__machine").map(str::to_owned),
            ipv6_prefix: self.settings.text("xcluster_PREFIX").unwrap_or("1000::1").to_owned(),
            ports: (!inside).then_some(ports),
            emulated: self.emulated().await?,
        })
    }

    /// The network of the cluster, which its machines are called after.
    pub(super) fn network(&self) -> Result<NetName> {
        if let Some(name) = self.settings.text("__cluster") {
            return Ok(name.parse()?);
        }
        let name = match nets::current(&self.settings) {
            Some(i) => format!("xc{i}"),
            None => "xc".to_owned(),
        };
        Ok(name.parse()?)
    }

    /// The machines of this cluster by their numbers.
    pub(super) async fn machines(&self, client: &mut Client) -> Result<Vec<(u8, Detail)>> {
        let cluster = self.network()?;
        let page = Page {
            door: DOOR.into(),
            owner: Some(cluster.to_string()),
            states: Vec::new(),
            after: None,
            limit: usize::MAX,
        };
        let Reply::Page { machines, .. } = ask(client, Request::Page(page)).await? else {
            bail!("an unexpected reply");
        };
        let numbered = |m: Detail| Some((machines::id_of(&cluster, m.summary.name.as_str())?, m));
        let mut list: Vec<(u8, Detail)> = machines.into_iter().filter_map(numbered).collect();
        list.sort_by_key(|(id, _)| *id);
        Ok(list)
    }

    fn ids(&self) -> Result<Vec<u8>> {
        if self.line.words.is_empty() {
            bail!("{} needs the number of a VM", self.line.command.name);
        }
        self.line.words.iter().map(|w| told(nodes::id(w))).collect()
    }

    fn vm_of(&self, id: u8, words: &[String]) -> Result<Vm> {
        told(nodes::vm(&self.settings, id, words))
    }

    pub(super) async fn start(&self, consoles: Consoles) -> Result<u8> {
        let cluster = self.cluster().await?;
        let ids = told(nodes::all(&self.settings))?;
        let vms = ids.iter().map(|id| self.vm_of(*id, &[])).collect::<Result<Vec<_>>>()?;
        let mut client = self.client().await?;
        let before = self.machines(&mut client).await?;
        self.end(before.into_iter().map(|(_, m)| m).collect(), true).await?;
        self.bring_up(&cluster, &vms, consoles).await
    }

    pub(super) async fn scaleout(&self) -> Result<u8> {
        let (cluster, ids) = (self.cluster().await?, self.ids()?);
        let vms = ids.iter().map(|id| self.vm_of(*id, &[])).collect::<Result<Vec<_>>>()?;
        let mut client = self.client().await?;
        self.refuse_active(&mut client, &ids).await?;
        self.bring_up(&cluster, &vms, Consoles::Windows).await
    }

    pub(super) async fn one_more(&self, consoles: Consoles) -> Result<u8> {
        let (cluster, ids) = (self.cluster().await?, self.ids()?);
        let mut client = self.client().await?;
        self.refuse_active(&mut client, &ids[..1]).await?;
        self.bring_up(&cluster, &[self.vm_of(ids[0], &[])?], consoles).await
    }

    /// A VM that is there already is left alone.
    async fn refuse_active(&self, client: &mut Client, ids: &[u8]) -> Result<()> {
        let machines = self.machines(client).await?;
        let active = |id: &&u8| machines.iter().any(|(known, _)| known == *id);
        match ids.iter().find(active) {
            Some(id) => bail!("Node already active [{id}]"),
            None => Ok(()),
        }
    }

    /// Makes a VM and starts it; one that does not start is not kept. Its machine's name.
    async fn launch(&self, client: &mut Client, cluster: &Cluster, vm: &Vm) -> Result<String> {
        let target = machines::name(&cluster.name, vm.id);
        let draft = Box::new(machines::draft(cluster, vm));
        ask(client, Request::Create { draft }).await?;
        if let Err(error) = ask(client, Request::Start { target: target.clone() }).await {
            let _ = client.ask(&Request::Remove { target, force: true }).await;
            return Err(error);
        }
        Ok(target)
    }

    /// Starts VMs, a few at a time, and waits until each answers. What does not is named.
    async fn bring_up(&self, cluster: &Cluster, vms: &[Vm], consoles: Consoles) -> Result<u8> {
        let pace = self.pace(cluster)?;
        let patience = told(self.settings.number("__timeout", PATIENCE))?;
        let mut waiting = vms.iter();
        let mut under_way = FuturesUnordered::new();
        let mut lost = Vec::new();
        loop {
            while under_way.len() < pace
                && let Some(vm) = waiting.next()
            {
                under_way
                    .push(async move { (vm.id, self.bring_up_one(cluster, vm, patience).await) });
            }
            let Some((id, done)) = under_way.next().await else { break };
            match done {
                Ok(()) => self.show_console(cluster, id, consoles).await?,
                Err(error) => {
                    say(&format!("{}: {error:#}", nodes::hostname(id)));
                    lost.push(id);
                }
            }
        }
        if consoles == Consoles::Tmux {
            say(&format!(
                "Tmux session [{}]; `tmux attach -t {0}` shows it",
                tmux_name(&cluster.name)
            ));
        }
        if lost.is_empty() {
            return Ok(0);
        }
        lost.sort_unstable();
        let names: Vec<String> = lost.into_iter().map(nodes::hostname).collect();
        bail!("not up: {}", names.join(", "))
    }

    async fn bring_up_one(&self, cluster: &Cluster, vm: &Vm, patience: u64) -> Result<()> {
        let mut client = self.client().await?;
        let target = self.launch(&mut client, cluster, vm).await?;
        // A VM without net 0 has nowhere to answer.
        let until = if vm.nets.contains(&0) { Condition::Ready } else { Condition::Running };
        let timeout_ms = Some(patience.saturating_mul(1000));
        ask(&mut client, Request::Wait { target, until, timeout_ms }).await.map(drop)
    }

    /// How many may boot at once: where guests are emulated, as many as there are cores.
    fn pace(&self, cluster: &Cluster) -> Result<usize> {
        let own = told(self.settings.number("__pace", 0))?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(match (own, cluster.emulated) {
            (0, true) => cores,
            (0, false) => 4 * cores,
            (own, _) => own as usize,
        })
    }

    /// Whether this host emulates what guests run.
    async fn emulated(&self) -> Result<bool> {
        let mut client = self.client().await?;
        let Reply::Document { value } = ask(&mut client, Request::Doctor).await? else {
            bail!("an unexpected reply");
        };
        let kvm = value.as_array().into_iter().flatten().find(|line| line["what"] == "KVM");
        Ok(kvm.is_none_or(|line| line["ok"] != true))
    }

    async fn show_console(&self, cluster: &Cluster, id: u8, consoles: Consoles) -> Result<()> {
        let machine = machines::name(&cluster.name, id);
        let own = std::env::current_exe()?.display().to_string();
        let title = nodes::hostname(id);
        match consoles {
            Consoles::Tmux => {
                let session = tmux_name(&cluster.name);
                let there = foreign("tmux")?.args(["has-session", "-t", &session]);
                let there = there.command().stderr(std::process::Stdio::null()).status().await?;
                let verb = match there.success() {
                    true => ["new-window", "-d", "-t", &session],
                    false => ["new-session", "-d", "-s", &session],
                };
                let tool = foreign("tmux")?.args(verb).args(["-n", &title]);
                let status =
                    tool.args([own.as_str(), "console", &machine]).command().status().await?;
                anyhow::ensure!(status.success(), "tmux ended with {status}");
            }
            Consoles::Windows if std::env::var_os("DISPLAY").is_some() => {
                // Without xterm the console is a command away.
                if let Ok(tool) = foreign("xterm") {
                    let background = match id {
                        1..=200 => "#040",
                        201..=220 => "#400",
                        _ => "#004",
                    };
                    let words = ["-T", &title, "-fg", "wheat", "-bg", background, "-e"];
                    let tool = tool.args(words).args([own.as_str(), "console", &machine]);
                    tool.command().process_group(0).spawn().context("xterm")?;
                }
            }
            Consoles::Windows => {}
        }
        Ok(())
    }

    /// One VM with its console on this terminal.
    pub(super) async fn boot_vm(&self) -> Result<u8> {
        let id = told(nodes::id(self.word(0, "the number of a VM")?))?;
        let cluster = self.cluster().await?;
        let vm = self.vm_of(id, &self.line.words[1..])?;
        if cluster.kernel.is_none() && self.line.words.len() > 1 {
            bail!("an image that boots by itself has its kernel's words in it");
        }
        let mut client = self.client().await?;
        self.refuse_active(&mut client, &[id]).await?;
        let target = self.launch(&mut client, &cluster, &vm).await?;
        self.attach(&mut client, &target).await?;
        Ok(0)
    }

    pub(super) async fn vm(&self) -> Result<u8> {
        let ids = self.ids()?;
        let mut client = self.client().await?;
        self.attach(&mut client, &machines::name(&self.network()?, ids[0])).await?;
        Ok(0)
    }

    async fn attach(&self, client: &mut Client, target: &str) -> Result<()> {
        let reply = ask(client, Request::Console { target: target.to_owned() }).await?;
        let Reply::Console { socket, .. } = reply else { bail!("an unexpected reply") };
        match std::io::stdin().is_terminal() {
            true => console::attach_until(Path::new(&socket), target, LEAVE).await,
            false => console::attach(Path::new(&socket), target).await,
        }
    }

    pub(super) async fn stop(&self) -> Result<u8> {
        let mut client = self.client().await?;
        let all = self.machines(&mut client).await?.into_iter().map(|(_, m)| m).collect();
        self.end(all, self.settings.flag("__now")).await?;
        let session = tmux_name(&self.network()?);
        if let Ok(tool) = foreign("tmux") {
            let mut command = tool.args(["kill-session", "-t", &session]).command();
            // There is one only after `starts`.
            let _ = command.stderr(std::process::Stdio::null()).status().await;
        }
        Ok(0)
    }

    pub(super) async fn scalein(&self) -> Result<u8> {
        let ids = self.ids()?;
        let mut client = self.client().await?;
        let all = self.machines(&mut client).await?.into_iter();
        let chosen = all.filter(|(id, _)| ids.contains(id)).map(|(_, m)| m).collect();
        self.end(chosen, self.settings.flag("__now")).await?;
        Ok(0)
    }

    /// Ends machines side by side; they go with their disks.
    async fn end(&self, machines: Vec<Detail>, now: bool) -> Result<()> {
        let one = async |machine: &Detail| -> Result<()> {
            let mut client = self.client().await?;
            let target = machine.summary.id.to_string();
            if !now && machine.summary.state == State::Running {
                let stop =
                    Request::Stop { target: target.clone(), force: false, timeout_ms: GOODBYE };
                // One that does not listen is ended below.
                let _ = client.ask(&stop).await?;
            }
            let Err(refusal) =
                client.ask(&Request::Remove { target: target.clone(), force: true }).await?
            else {
                return Ok(());
            };
            // It may just have gone by itself.
            match client.ask(&Request::Fetch { target }).await? {
                Err(Refusal::NotFound { .. }) => Ok(()),
                Ok(_) | Err(_) => Err(refusal.into()),
            }
        };
        let mut ending: FuturesUnordered<_> = machines.iter().map(one).collect();
        while let Some(done) = ending.next().await {
            done?;
        }
        Ok(())
    }

    pub(super) async fn status(&self) -> Result<u8> {
        let mut client = self.client().await?;
        let alive: BTreeSet<u8> = self
            .machines(&mut client)
            .await?
            .into_iter()
            .filter(|(_, m)| {
                matches!(m.summary.state, State::Running | State::Paused | State::Starting)
            })
            .map(|(id, _)| id)
            .collect();
        let count = |name, default, least: u64| -> Result<u8> {
            let n = told(self.settings.number(name, default))?;
            Ok(n.max(least).min(200) as u8)
        };
        let (vms, routers, testers) =
            (count("__nvm", 4, 8)?, count("__nrouters", 2, 4)?, count("__ntesters", 0, 2)?);
        let shown = (1..=vms).chain(201..=200 + routers.min(20)).chain(221..=220 + testers.min(20));
        let mut shown: BTreeSet<u8> = shown.collect();
        shown.extend(&alive);
        if !self.settings.flag("__quiet") {
            for id in shown {
                let word = if alive.contains(&id) { "alive" } else { "dead " };
                print(&format!("{word} {id}\n"))?;
            }
            let highest = alive.iter().filter(|id| **id <= 90).max().unwrap_or(&0);
            print(&format!("Active VMs; {}, Highest pl; {highest}\n", alive.len()))?;
        }
        // As of old: the number of those that run.
        Ok(alive.len() as u8)
    }

    pub(super) async fn stop_vm(&self) -> Result<u8> {
        let ids = self.ids()?;
        let mut client = self.client().await?;
        for id in ids {
            self.sync(id).await;
            let target = machines::name(&self.network()?, id);
            ask(&mut client, Request::Pause { target }).await?;
        }
        Ok(0)
    }

    pub(super) async fn reset_vm(&self) -> Result<u8> {
        let ids = self.ids()?;
        let mut client = self.client().await?;
        let machines = self.machines(&mut client).await?;
        for id in ids {
            let target = machines::name(&self.network()?, id);
            let paused =
                machines.iter().any(|(known, m)| *known == id && m.summary.state == State::Paused);
            if !paused {
                self.sync(id).await;
            }
            ask(&mut client, Request::Reset { target: target.clone() }).await?;
            if paused {
                ask(&mut client, Request::Resume { target }).await?;
            }
        }
        Ok(0)
    }

    /// What a guest has in memory goes to its disk; one that does not answer is not waited for.
    async fn sync(&self, id: u8) {
        if let Ok(tool) = self.ssh(id, &["sync".to_owned()]) {
            let _ = tokio::time::timeout(Duration::from_secs(10), tool.command().status()).await;
        }
    }
}

fn tmux_name(cluster: &NetName) -> String {
    format!("xcluster-{cluster}")
}
