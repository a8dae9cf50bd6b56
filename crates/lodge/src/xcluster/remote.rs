//! Going to VMs: by ssh, which asks for no password there.

use std::os::unix::process::CommandExt;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use lodge_doors::xcluster::nodes;
use lodge_host::proc::Tool;

use super::{Session, foreign, nets, say, told};

/// VMs are made anew all the time; nobody has seen their keys.
const OPTIONS: &[&str] = &[
    "-oStrictHostKeyChecking=no",
    "-oUserKnownHostsFile=/dev/null",
    "-oLogLevel=ERROR",
    "-oBatchMode=yes",
    "-oConnectTimeout=20",
    // The maintenance net is no place for anybody's agent.
    "-oForwardAgent=no",
];

/// How ssh ends when nobody answers.
const UNREACHABLE: u8 = 255;

impl Session {
    /// Where a VM's ssh is: address and port.
    fn place(&self, id: u8) -> Result<(String, u64)> {
        if nets::current(&self.settings).is_some() {
            return Ok((nodes::address(0, id).to_string(), 22));
        }
        let base = told(self.settings.number("XCLUSTER_SSH_BASE", 12300))?;
        Ok(("127.0.0.1".into(), base + u64::from(id)))
    }

    pub(super) fn ssh(&self, id: u8, words: &[String]) -> Result<Tool> {
        let (address, port) = self.place(id)?;
        let tool = foreign("ssh")?.args(OPTIONS).arg(format!("-p{port}"));
        Ok(tool.arg(format!("root@{address}")).args(words))
    }

    fn first_id(&self) -> Result<u8> {
        told(nodes::id(self.word(0, "the number of a VM")?))
    }

    /// Behind the host's port could be somebody else's VM: ours must be there.
    async fn runs(&self, id: u8) -> Result<bool> {
        let mut client = self.client().await?;
        let there = self.machines(&mut client).await?.iter().any(|(known, _)| *known == id);
        if !there {
            say(&format!("ERROR: {} does not run", nodes::hostname(id)));
        }
        Ok(there)
    }

    pub(super) async fn rsh(&self) -> Result<u8> {
        if !self.runs(self.first_id()?).await? {
            return Ok(UNREACHABLE);
        }
        let mut command = self.ssh(self.first_id()?, &self.line.words[1..])?.command().into_std();
        if self.settings.flag("__bg") {
            command.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
            command.spawn().context("ssh")?;
            return Ok(0);
        }
        command.stdin(Stdio::inherit());
        Err(command.exec()).context("ssh")
    }

    pub(super) async fn rcp(&self) -> Result<u8> {
        let id = self.first_id()?;
        if !self.runs(id).await? {
            return Ok(UNREACHABLE);
        }
        let (from, to) = (self.word(1, "a file of the VM")?, self.word(2, "a local path")?);
        let (address, port) = self.place(id)?;
        // The old protocol: VMs have the program for it.
        let tool = foreign("scp")?.args(OPTIONS).args(["-O", "-q", "-r", &format!("-P{port}")]);
        let tool = tool.arg(format!("root@{address}:{from}")).arg(to);
        let mut command = tool.command().into_std();
        Err(command.exec()).context("scp")
    }

    /// Captures packets on a VM; the file is fetched later.
    pub(super) async fn tcpdump(&self) -> Result<u8> {
        let id = self.first_id()?;
        if !self.runs(id).await? {
            return Ok(UNREACHABLE);
        }
        let interfaces = &self.line.words[1..];
        let Some(interface) = interfaces.first() else { bail!("tcpdump needs an interface") };
        let file = |interface: &str| format!("/tmp/{}-{interface}.pcap", nodes::hostname(id));
        if self.settings.flag("__start") {
            let mut words = vec!["tcpdump".to_owned(), "-ni".into(), interface.clone()];
            // Written as it comes: what waits in the kernel is lost when the capture ends.
            let written = ["--immediate-mode", "-U", "-w"].map(str::to_owned);
            words.extend(written);
            words.push(file(interface));
            words.extend(interfaces[1..].iter().cloned());
            words.extend(["</dev/null", ">/dev/null", "2>&1", "&"].map(str::to_owned));
            let status = self.ssh(id, &words)?.command().into_std().status()?;
            return Ok(status.code().unwrap_or(1) as u8);
        }
        if !self.settings.flag("__get") {
            bail!("tcpdump --start or --get");
        }
        let kill = ["killall", "tcpdump"].map(str::to_owned);
        // One that has ended has written all that it saw.
        let _ = self.ssh(id, &kill)?.command().into_std().stderr(Stdio::null()).status()?;
        for interface in interfaces {
            let (address, port) = self.place(id)?;
            let tool = foreign("scp")?.args(OPTIONS).args(["-O", "-q", &format!("-P{port}")]);
            let tool = tool.arg(format!("root@{address}:{}", file(interface))).arg("/tmp/");
            let status = tool.command().into_std().status()?;
            if !status.success() {
                bail!("{} could not be fetched", file(interface));
            }
        }
        Ok(0)
    }
}
