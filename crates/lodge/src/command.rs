//! The command line: each verb becomes requests, each reply becomes text or JSON. Exit status 0 is
//! done, 1 is refused or failed, 2 is a mistake in the command line, 124 a wait that timed out.

use std::io::{IsTerminal, Read, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
use clap::{CommandFactory, Parser};
use lodge_doors::native::grammar::{
    Assets, Cli, MachineFlags, Output, Plan, Run, Set, Until, Verb, disk_or_size, nic_on,
};
use lodge_doors::native::image::Image;
use lodge_doors::native::render;
use lodge_doors::native::wire::Client;
use lodge_host::paths::Paths;
use lodge_host::warden::console::tail;
use lodge_spec::draft::Draft;
use lodge_spec::flist::Source;
use lodge_spec::request::{Change, Condition, Refusal, Reply, Request};
use lodge_spec::state::{Event, Summary};
use lodge_spec::{Bytes, document};
use serde_json::{Value, json};

use crate::plan::plan_text;
use crate::{client, console, daemon, receive, vmadm, xcluster};

const TIMED_OUT: u8 = 124;

pub(crate) fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    match &cli.verb {
        Verb::Serve(how) => return daemon::serve(how).map(|()| ExitCode::SUCCESS),
        Verb::Completions { shell } => return completions(shell),
        Verb::Man { folder } => return man(folder),
        Verb::Vmadm { words } => return vmadm::main("lodge vmadm", words),
        Verb::Cluster(verb) => return xcluster::native::cluster(verb),
        Verb::Flist(verb) => return crate::flist::carry_out(verb),
        Verb::Kernel(verb) => return xcluster::native::kernel(verb),
        Verb::Image(Image::Here(verb)) => return crate::image::carry_out(verb),
        Verb::Image(Image::Inspect { name }) if name.contains('/') => {
            return print_json(&xcluster::native::layers(name)?);
        }
        Verb::Xc { words } => return xcluster::main(words),
        Verb::Xcadmin { words } => return xcluster::admin(words),
        Verb::Schema => return print(&document::schema_text()),
        _ => {}
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let paths = Paths::find();
        let mut session = Session { client: client::connect(&paths).await?, output: cli.output };
        match session.carry_out(cli.verb).await {
            Ok(code) => Ok(code),
            Err(error) => match error.downcast_ref::<Refusal>() {
                Some(Refusal::Timeout { .. }) => {
                    writeln!(std::io::stderr(), "lodge: {error}")?;
                    Ok(ExitCode::from(TIMED_OUT))
                }
                Some(_) | None => Err(error),
            },
        }
    })
}

pub(crate) fn print(text: &str) -> Result<ExitCode> {
    let mut stdout = std::io::stdout();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()?;
    Ok(ExitCode::SUCCESS)
}

fn print_json(value: &Value) -> Result<ExitCode> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

fn completions(shell: &str) -> Result<ExitCode> {
    use clap_complete::Shell;
    let shell: Shell = shell.parse().map_err(|e| anyhow!("{shell}: {e}"))?;
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "lodge", &mut text);
    print(&String::from_utf8(text)?)
}

fn man(folder: &Path) -> Result<ExitCode> {
    std::fs::create_dir_all(folder)?;
    clap_mangen::generate_to(Cli::command(), folder)?;
    Ok(ExitCode::SUCCESS)
}

struct Session {
    client: Client,
    output: Output,
}

impl Session {
    async fn ask(&mut self, request: Request) -> Result<Reply> {
        Ok(self.client.ask(&request).await.context("asking the daemon")??)
    }

    async fn summary(&mut self, request: Request) -> Result<Summary> {
        match self.ask(request).await? {
            Reply::Summary { machine } => Ok(machine),
            other => bail!("unexpected reply {other:?}"),
        }
    }

    async fn document(&mut self, request: Request) -> Result<Value> {
        match self.ask(request).await? {
            Reply::Document { value } => Ok(value),
            other => bail!("unexpected reply {other:?}"),
        }
    }

    async fn carry_out(&mut self, verb: Verb) -> Result<ExitCode> {
        match verb {
            Verb::Run(run) => self.run(*run).await,
            Verb::Create { file } => {
                let draft = read_document(&file)?;
                self.one(Request::Create { draft: Box::new(draft) }).await
            }
            Verb::Start { name, wait, timeout } => {
                let machine = self.summary(Request::Start { target: name }).await?;
                let machine = self.await_after(machine, wait, timeout).await?;
                self.show(&machine)
            }
            Verb::Stop { name, force, timeout } => {
                let timeout_ms = timeout.saturating_mul(1000);
                self.one(Request::Stop { target: name, force, timeout_ms }).await
            }
            Verb::Restart { name, timeout } => {
                let timeout_ms = timeout.saturating_mul(1000);
                self.one(Request::Restart { target: name, timeout_ms }).await
            }
            Verb::Reset { name } => self.one(Request::Reset { target: name }).await,
            Verb::Pause { name } => self.one(Request::Pause { target: name }).await,
            Verb::Resume { name } => self.one(Request::Resume { target: name }).await,
            Verb::Suspend { name } => self.one(Request::Suspend { target: name }).await,
            Verb::Migrate { name, to } => self.one(Request::Migrate { target: name, to }).await,
            Verb::Receive => receive::receive(&mut self.client).await,
            Verb::Rm { names, force } => {
                for target in names {
                    self.one(Request::Remove { target, force }).await?;
                }
                Ok(ExitCode::SUCCESS)
            }
            Verb::Set(set) => self.set(set).await,
            Verb::Ls { all } => match self.ask(Request::List { all }).await? {
                Reply::List { machines } if self.output == Output::Json => {
                    print_json(&json!(machines))
                }
                Reply::List { machines } => print(&render::machines(&machines)),
                other => bail!("unexpected reply {other:?}"),
            },
            Verb::Inspect { name } => {
                print_json(&self.document(Request::Inspect { target: name }).await?)
            }
            Verb::Logs { name, follow, tail } => self.logs(name, follow, tail).await,
            Verb::Console { name } => {
                let (socket, _) = self.console(&name).await?;
                console::attach(Path::new(&socket), &name).await?;
                Ok(ExitCode::SUCCESS)
            }
            Verb::Wait { name, until, timeout } => {
                let Some(until) = condition(until) else { return Ok(ExitCode::SUCCESS) };
                let timeout_ms = timeout.map(|s| s.saturating_mul(1000));
                self.one(Request::Wait { target: name, until, timeout_ms }).await
            }
            Verb::Events { name, follow } => self.events(name, follow).await,
            Verb::Timeline { name } => {
                let value = self.document(Request::Timeline { target: name }).await?;
                if self.output == Output::Json {
                    return print_json(&value);
                }
                let events: Vec<Event> = serde_json::from_value(value)?;
                print(&render::timeline(&events))
            }
            Verb::Plan(plan) => self.plan(*plan).await,
            Verb::Why { name } => self.why(name).await,
            Verb::Doctor { escape: true } => self.trial().await,
            Verb::Doctor { escape: false } => self.doctor().await,
            Verb::Gc { dry_run } => self.collect(dry_run).await,
            Verb::Image(image) => self.image(image).await,
            Verb::Assets(Assets::Install { folder, image }) => self.assets(&folder, &image).await,
            Verb::Serve(_)
            | Verb::Vmadm { .. }
            | Verb::Xc { .. }
            | Verb::Cluster(_)
            | Verb::Flist(_)
            | Verb::Kernel(_)
            | Verb::Xcadmin { .. }
            | Verb::Completions { .. }
            | Verb::Man { .. }
            | Verb::Schema => {
                unreachable!("handled before there was a session")
            }
        }
    }

    fn show(&self, machine: &Summary) -> Result<ExitCode> {
        match self.output {
            Output::Json => print_json(&json!(machine)),
            Output::Text => print(&format!("{}\n", machine.name)),
        }
    }

    async fn one(&mut self, request: Request) -> Result<ExitCode> {
        let machine = self.summary(request).await?;
        self.show(&machine)
    }

    async fn run(&mut self, run: Run) -> Result<ExitCode> {
        let Run { image, machine, wait, timeout } = run;
        let keep = machine.name.is_some();
        let draft = flags(machine, image)?;
        let created = self.summary(Request::Create { draft: Box::new(draft) }).await?;
        let target = created.id.to_string();
        let started = match self.summary(Request::Start { target: target.clone() }).await {
            Ok(started) => started,
            Err(error) if keep => {
                return Err(
                    error.context(format!("{} was created but did not start", created.name))
                );
            }
            Err(error) => {
                // Nobody named it, so nobody wants it kept.
                self.ask(Request::Remove { target, force: true }).await?;
                return Err(error);
            }
        };
        let machine = self.await_after(started, wait, timeout).await?;
        self.show(&machine)
    }

    async fn await_after(
        &mut self,
        machine: Summary,
        until: Until,
        timeout: Option<u64>,
    ) -> Result<Summary> {
        let Some(until) = condition(until) else { return Ok(machine) };
        let timeout_ms = timeout.map(|s| s.saturating_mul(1000));
        self.summary(Request::Wait { target: machine.id.to_string(), until, timeout_ms }).await
    }

    async fn set(&mut self, set: Set) -> Result<ExitCode> {
        let Set { name, cpus, memory, add_disk, remove_disk, add_nic, remove_nic } = set;
        let mut changes = Vec::new();
        changes.extend(cpus.map(|count| Change::Cpus { count }));
        if let Some(memory) = memory {
            let Bytes(bytes) = memory.parse().map_err(|e| anyhow!("--memory {e}"))?;
            changes.push(Change::Memory { bytes });
        }
        changes.extend(add_disk.iter().map(|text| Change::AddDisk { disk: disk_or_size(text) }));
        changes.extend(remove_disk.into_iter().map(|name| Change::RemoveDisk { name }));
        changes
            .extend(add_nic.into_iter().map(|net| Change::AddNic { nic: Box::new(nic_on(net)) }));
        changes.extend(remove_nic.into_iter().map(|name| Change::RemoveNic { name }));
        if changes.is_empty() {
            bail!("nothing to change; `lodge set --help` lists what can be");
        }
        for change in changes {
            self.one(Request::Update { target: name.clone(), change: Box::new(change) }).await?;
        }
        Ok(ExitCode::SUCCESS)
    }

    async fn console(&mut self, name: &str) -> Result<(String, String)> {
        match self.ask(Request::Console { target: name.to_owned() }).await? {
            Reply::Console { socket, log } => Ok((socket, log)),
            other => bail!("unexpected reply {other:?}"),
        }
    }

    async fn logs(&mut self, name: String, follow: bool, tail: usize) -> Result<ExitCode> {
        let (socket, log) = self.console(&name).await?;
        let bytes = match logged(log.as_ref(), tail) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(e).context(log),
        };
        let starts = bytes.iter().rev().enumerate().skip(1).filter(|(_, b)| **b == b'\n');
        let starts = starts.map(|(back, _)| bytes.len() - back);
        let from = starts.clone().nth(tail.saturating_sub(1)).unwrap_or(0);
        let from = if tail == 0 { bytes.len() } else { from };
        let mut stdout = std::io::stdout();
        stdout.write_all(&bytes[from..])?;
        stdout.flush()?;
        if follow && let Ok(stream) = tokio::net::UnixStream::connect(&socket).await {
            follow_console(stream, bytes.len().min(64 << 10)).await?;
        }
        Ok(ExitCode::SUCCESS)
    }

    async fn events(&mut self, target: Option<String>, follow: bool) -> Result<ExitCode> {
        self.client.send(&Request::Events { target, follow, past: true }).await?;
        while let Some(reply) = self.client.next().await? {
            match reply {
                Reply::Event { event } if self.output == Output::Json => {
                    print(&format!("{}\n", serde_json::to_string(&event)?))?;
                }
                Reply::Event { event } => drop(print(&render::event(&event))?),
                Reply::Refused { refusal } => return Err(refusal.into()),
                _ => {}
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    async fn plan(&mut self, plan: Plan) -> Result<ExitCode> {
        let Plan { source, machine } = plan;
        let draft = match source {
            Some(source) if Source::names_flist(&source) => flags(machine, Some(source))?,
            Some(source) if Path::new(&source).is_file() || source == "-" => {
                read_document(Path::new(&source))?
            }
            image => flags(machine, image)?,
        };
        let value = self.document(Request::Plan { draft: Box::new(draft) }).await?;
        let can = !value["chosen"].is_null();
        match self.output {
            Output::Json => print_json(&value)?,
            Output::Text => print(&plan_text(&value)?)?,
        };
        Ok(if can { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    async fn why(&mut self, name: String) -> Result<ExitCode> {
        let value = self.document(Request::Why { target: name.clone() }).await?;
        if self.output == Output::Json {
            return print_json(&value);
        }
        let state = value["state"].as_str().unwrap_or("");
        let mut text = match value["reason"].as_str() {
            Some(reason) => format!("{name} is {state}: {reason}\n"),
            None => format!("{name} is {state}\n"),
        };
        let events: Vec<Event> = serde_json::from_value(value["events"].clone())?;
        text += &format!("\nWhat happened:\n{}", render::timeline(&events));
        for (key, title) in
            [("stderr", "What the hypervisor said"), ("console", "What the guest said last")]
        {
            let lines = value[key].as_array().cloned().unwrap_or_default();
            if !lines.is_empty() {
                text += &format!("\n{title}:\n");
                for line in lines {
                    text += &format!("  {}\n", line.as_str().unwrap_or(""));
                }
            }
        }
        print(&text)
    }

    async fn trial(&mut self) -> Result<ExitCode> {
        let value = self.document(Request::Trial).await?;
        let ways: Vec<&Value> = value.as_array().into_iter().flatten().collect();
        let open = ways.iter().filter(|way| way["closed"] != json!(true)).count();
        if self.output == Output::Json {
            print_json(&value)?;
        } else {
            let mut text = String::new();
            for way in &ways {
                let sign = if way["closed"] == json!(true) { "closed" } else { "OPEN  " };
                text += &format!("{sign}  {}\n", way["way"].as_str().unwrap_or(""));
            }
            print(&format!("{text}{} ways tried, {open} open\n", ways.len()))?;
        }
        Ok(if open == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    async fn doctor(&mut self) -> Result<ExitCode> {
        let value = self.document(Request::Doctor).await?;
        if self.output == Output::Json {
            return print_json(&value);
        }
        let mut text = String::new();
        for item in value.as_array().into_iter().flatten() {
            let part = |key: &str| item[key].as_str().unwrap_or("");
            let sign = if item["ok"] == json!(true) { "yes" } else { "no " };
            text += &format!("{sign}  {:<16} {}\n", part("what"), part("detail"));
            if !part("fix").is_empty() {
                text += &format!("     {:<16} add it: {}\n", "", part("fix"));
            }
        }
        print(&text)
    }

    async fn collect(&mut self, dry_run: bool) -> Result<ExitCode> {
        let value = self.document(Request::Gc { dry_run }).await?;
        if self.output == Output::Json {
            return print_json(&value);
        }
        let verb = if dry_run { "would remove" } else { "removed" };
        let mut text = String::new();
        for item in value.as_array().into_iter().flatten() {
            let part = |key: &str| item[key].as_str().unwrap_or("");
            text += &format!("{verb} {} {}: {}\n", part("kind"), part("name"), part("why"));
        }
        print(if text.is_empty() { "nothing to remove\n" } else { &text })
    }

    async fn image(&mut self, image: Image) -> Result<ExitCode> {
        let named = |name: String| name.parse().map_err(|e| anyhow!("{e}"));
        let request = match image {
            Image::Build { name, size, packages } => {
                let size = size.map(|s| s.parse::<Bytes>().map(|b| b.0)).transpose();
                let size = size.map_err(|e| anyhow!("--size {e}"))?;
                let name = named(name)?;
                let manifest = self.build(Request::ImageBuild { name, size, packages }).await?;
                return self.show_images(json!([manifest]));
            }
            Image::Add { file, name } => {
                let path = std::path::absolute(&file)?.to_string_lossy().into_owned();
                let name = name.map(named).transpose()?;
                let manifest = self.document(Request::ImageAdd { path, name }).await?;
                return self.show_images(json!([manifest]));
            }
            Image::Here(_) => unreachable!("needs no daemon"),
            Image::Pull { source, filters, name, insecure, shacache } => {
                let fetched = crate::pull::fetch(&source, &filters, insecure, &shacache.shacache)?;
                let name = Some(named(name.unwrap_or(fetched.name))?);
                let path = fetched.path.to_string_lossy().into_owned();
                let manifest = self.document(Request::ImageAdd { path, name }).await?;
                let _ = std::fs::remove_file(fetched.path);
                return self.show_images(json!([manifest]));
            }
            Image::Ls => {
                let list = self.document(Request::ImageList).await?;
                return self.show_images(list);
            }
            Image::Inspect { name } => {
                let name = named(name)?;
                return print_json(&self.document(Request::ImageInspect { name }).await?);
            }
            Image::Rm { name } => Request::ImageRemove { name: named(name)? },
            Image::Verify { name } => {
                let name = name.map(named).transpose()?;
                let names = self.document(Request::ImageVerify { name }).await?;
                if self.output == Output::Json {
                    return print_json(&names);
                }
                let names = names.as_array().into_iter().flatten().filter_map(Value::as_str);
                return print(&names.map(|n| format!("{n}: intact\n")).collect::<String>());
            }
        };
        self.ask(request).await?;
        Ok(ExitCode::SUCCESS)
    }

    async fn assets(&mut self, folder: &Path, image: &str) -> Result<ExitCode> {
        let name: lodge_spec::names::ImageName = image.parse().map_err(|e| anyhow!("{e}"))?;
        let known = self.client.ask(&Request::ImageInspect { name: name.clone() }).await?;
        if let Err(Refusal::NoImage { .. }) = known {
            let (size, packages) = (None, Vec::new());
            self.build(Request::ImageBuild { name: name.clone(), size, packages }).await?;
        }
        let folder = std::path::absolute(folder)?.to_string_lossy().into_owned();
        let made = self.document(Request::ImageExport { name, folder }).await?;
        if self.output == Output::Json {
            return print_json(&made);
        }
        let lines = made.as_array().into_iter().flatten().filter_map(Value::as_str);
        print(&lines.map(|line| format!("{line}\n")).collect::<String>())
    }

    fn show_images(&self, list: Value) -> Result<ExitCode> {
        match self.output {
            Output::Json => print_json(&list),
            Output::Text => print(&render::images(list.as_array().map_or(&[], Vec::as_slice))),
        }
    }

    /// Shows a bar on a terminal and plain lines elsewhere.
    async fn build(&mut self, request: Request) -> Result<Value> {
        self.client.send(&request).await?;
        let bar = std::io::stderr().is_terminal().then(indicatif::ProgressBar::new_spinner);
        let mut shown = String::new();
        let mut result = Err(anyhow!("the daemon said nothing"));
        while let Some(reply) = self.client.next().await? {
            match reply {
                Reply::Progress { message, done, total } => match &bar {
                    Some(bar) => {
                        let text = match total {
                            0 => message,
                            total => format!("{message}: {} %", done * 100 / total),
                        };
                        bar.set_message(text);
                        bar.tick();
                    }
                    None if message != shown => {
                        writeln!(std::io::stderr(), "{message}")?;
                        shown = message;
                    }
                    None => {}
                },
                Reply::Document { value } => result = Ok(value),
                Reply::Refused { refusal } => result = Err(refusal.into()),
                other => result = Err(anyhow!("unexpected reply {other:?}")),
            }
        }
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
        result
    }
}

/// The end of a log: at least so many lines of it, where it has them.
fn logged(log: &Path, lines: usize) -> std::io::Result<Vec<u8>> {
    // Lines longer than this on average make us read again, twice as much.
    let mut most = (lines as u64).saturating_mul(200).max(64 << 10);
    loop {
        let bytes = tail(log, most)?;
        let found = bytes.iter().filter(|b| **b == b'\n').count();
        if found > lines || (bytes.len() as u64) < most {
            return Ok(bytes);
        }
        most = most.saturating_mul(2);
    }
}

async fn follow_console(stream: tokio::net::UnixStream, skip: usize) -> Result<()> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    // The console begins with its history, which has just been shown.
    let (mut reader, _writer) = stream.into_split();
    let mut history = vec![0; skip];
    reader.read_exact(&mut history).await?;
    let mut stdout = tokio::io::stdout();
    let mut buffer = [0; 8192];
    loop {
        let count = reader.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        stdout.write_all(&buffer[..count]).await?;
        stdout.flush().await?;
    }
}

fn condition(until: Until) -> Option<Condition> {
    match until {
        Until::Running => Some(Condition::Running),
        Until::Ready => Some(Condition::Ready),
        Until::Stopped => Some(Condition::Stopped),
        Until::Bootstrap => Some(Condition::Bootstrap),
        Until::None => None,
    }
}

fn flags(machine: MachineFlags, image: Option<String>) -> Result<Draft> {
    machine.draft(image).map_err(|e| anyhow!(e))
}

fn read_document(path: &Path) -> Result<Draft> {
    let mut text = String::new();
    if path == Path::new("-") {
        std::io::stdin().read_to_string(&mut text)?;
    } else {
        text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    }
    document::parse(&text).map_err(|problems| anyhow!("{}:\n{problems}", path.display()))
}
