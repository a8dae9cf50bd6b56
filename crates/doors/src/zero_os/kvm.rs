//! The commands, each a question or two to `Control`.

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use lodge_spec::draft::{Draft, NicDraft};
use lodge_spec::migration::{Expected, Leads};
use lodge_spec::request::{Change, Page, Refusal, Reply, Request};
use lodge_spec::state::{Ends, Usage};
use serde_json::{Value, json};

use super::create::{self, Media};
use super::describe::{self, Machine};
use super::iotune;
use super::jobs::{Answer, Failure};
use super::nics::{self, Nic};
use super::{DOOR, Door};
use crate::control::Control;

/// A guest that was asked to end has this long before it is ended.
const GRACE_MS: u64 = 3_600_000;
const REBOOT_MS: u64 = 60_000;

type Done = Result<Value, Failure>;

/// What is wrong, as that system would say it: the field is plain from the words.
fn failure(refusal: &Refusal) -> Failure {
    let message = match refusal {
        Refusal::Invalid { problems } => {
            let words: Vec<&str> = problems.iter().map(|p| p.message.as_str()).collect();
            words.join("; ")
        }
        other => other.to_string(),
    };
    let message = match message.strip_prefix("flist: ") {
        Some(rest) => rest.to_owned(),
        None => message,
    };
    let taken = message.contains("port") && message.contains("is already in use");
    if taken || message.ends_with("/tcp appears twice") {
        return Failure::new(format!("port already in use: {message}"));
    }
    // The one thing that has a number of its own there.
    let missing = message.starts_with("bridge '") && message.ends_with("' not found");
    Failure { code: if missing { 400 } else { 500 }, message }
}

fn text(arguments: &Value, key: &str) -> String {
    arguments[key].as_str().unwrap_or("").to_owned()
}

/// A file of this host by its whole path.
fn file(arguments: &Value, key: &str) -> Result<PathBuf, Failure> {
    let path = PathBuf::from(text(arguments, key));
    match path.is_absolute() {
        true => Ok(path),
        false => Err(Failure::new(format!("{key}: give the whole path of a file of this host"))),
    }
}

/// Bytes as that system's tools take them: a number, or one with K, M, G, T or P behind it.
fn bytes(text: &str) -> Option<u64> {
    let (number, letter) = match text.char_indices().last()? {
        (at, letter) if letter.is_ascii_alphabetic() => (&text[..at], letter),
        _ => (text, 'b'),
    };
    let shift = match letter.to_ascii_lowercase() {
        'b' => 0,
        'k' => 10,
        'm' => 20,
        'g' => 30,
        't' => 40,
        'p' => 50,
        _ => return None,
    };
    let number: u64 = number.parse().ok()?;
    number.checked_mul(1 << shift).filter(|bytes| *bytes > 0)
}

impl<C: Control> Door<C> {
    pub(super) async fn command(
        &self,
        command: &str,
        arguments: &Value,
        tags: Option<&[String]>,
    ) -> Answer {
        Some(match command {
            "core.ping" => {
                let version = &self.settings.version;
                Ok(json!(format!("PONG Version: lodge @Revision: {version}")))
            }
            "core.state" => Ok(own_state()),
            "kvm.create" => self.create(arguments, tags).await,
            "kvm.list" => self.list().await,
            "kvm.get" => self.get(arguments).await,
            "kvm.destroy" => {
                self.verb(arguments, |target| Request::Remove { target, force: true }).await
            }
            "kvm.shutdown" => self.shutdown(arguments).await,
            "kvm.reboot" => {
                let reboot = |target| Request::Restart { target, timeout_ms: REBOOT_MS };
                self.verb(arguments, reboot).await
            }
            "kvm.reset" => self.verb(arguments, |target| Request::Reset { target }).await,
            "kvm.pause" => self.verb(arguments, |target| Request::Pause { target }).await,
            "kvm.resume" => self.verb(arguments, |target| Request::Resume { target }).await,
            "kvm.info" => self.info(arguments).await,
            "kvm.infops" => self.infops(arguments).await,
            "kvm.monitor" => Ok(Value::Null),
            "kvm.attach_disk" => self.attach_disk(arguments).await,
            "kvm.detach_disk" => self.detach_disk(arguments).await,
            "kvm.add_nic" => self.add_nic(arguments).await,
            "kvm.remove_nic" => self.remove_nic(arguments).await,
            "kvm.portforward-add" => self.port(arguments, true).await,
            "kvm.portforward-remove" => self.port(arguments, false).await,
            "kvm.migrate" => {
                let to = text(arguments, "desturi");
                self.verb(arguments, |target| Request::Migrate { target, to }).await
            }
            "kvm.prepare_migration_target" => self.prepare(arguments).await,
            "kvm.limit_disk_io" => self.limit_disk_io(arguments).await,
            "kvm.create-image" => self.create_image(arguments).await,
            "kvm.convert-image" => self.convert_image(arguments).await,
            _ => return None,
        })
    }

    pub(super) async fn machines(&self) -> Result<Vec<Machine>, Failure> {
        let page = Page {
            door: DOOR.into(),
            owner: None,
            states: Vec::new(),
            after: None,
            limit: usize::MAX,
        };
        match self.ask(Request::Page(page)).await {
            Ok(Reply::Page { machines, .. }) => {
                Ok(machines.iter().filter_map(Machine::of).collect())
            }
            Ok(_) => Err(Failure::new("no list came")),
            Err(refusal) => Err(failure(&refusal)),
        }
    }

    /// A machine of this door by its identity.
    pub(super) async fn find(&self, uuid: &str) -> Result<Machine, Failure> {
        let none = || Failure::new(format!("couldn't find domain with the uuid {uuid}"));
        if uuid.is_empty() {
            return Err(none());
        }
        match self.ask(Request::Fetch { target: uuid.to_owned() }).await {
            Ok(Reply::Detail { machine }) => {
                Machine::of(&machine).filter(|found| found.uuid == uuid).ok_or_else(none)
            }
            Ok(_) | Err(_) => Err(none()),
        }
    }

    pub(super) async fn usage(&self, machine: &Machine) -> Usage {
        let target = machine.uuid.clone();
        match self.ask(Request::Usage { target, each_cpu: true }).await {
            Ok(Reply::Usage { usage }) => *usage,
            // It may have ended since; then it uses nothing.
            Ok(_) | Err(_) => Usage::default(),
        }
    }

    async fn verb(&self, arguments: &Value, request: impl FnOnce(String) -> Request) -> Done {
        let machine = self.find(&text(arguments, "uuid")).await?;
        self.done(request(machine.uuid)).await
    }

    /// Asks the guest, and does not wait for what it makes of that.
    async fn shutdown(&self, arguments: &Value) -> Done {
        let machine = self.find(&text(arguments, "uuid")).await?;
        let stop = Request::Stop { target: machine.uuid, force: false, timeout_ms: GRACE_MS };
        let mut replies = self.hear(stop);
        let asked = tokio::time::timeout(std::time::Duration::from_millis(200), replies.recv());
        match asked.await {
            Ok(Some(Reply::Refused { refusal })) => Err(failure(&refusal)),
            _ => {
                // Whoever asked may go; what was asked is still waited for.
                tokio::spawn(async move { while replies.recv().await.is_some() {} });
                Ok(Value::Null)
            }
        }
    }

    async fn create(&self, arguments: &Value, tags: Option<&[String]>) -> Done {
        let params = create::params(arguments, tags)?;
        let uuid = uuid::Uuid::new_v4().to_string();
        let draft: Draft = {
            let _one = self.creating.lock().await;
            let machines = self.machines().await?;
            if machines.iter().any(|m| m.name == params.name) {
                let why = format!("machine '{}' already exists", params.name);
                return Err(Failure::new(format!("failed to create machine: {why}")));
            }
            let taken: Vec<u16> = machines.iter().map(|m| m.sequence).collect();
            let sequence = self.next(&taken)?;
            let draft = create::draft(&params, &uuid, sequence, &self.settings)?;
            let request = Request::Create { draft: Box::new(draft.clone()) };
            self.ask(request).await.map_err(|refusal| match &refusal {
                Refusal::Taken { what, .. } if what == "name" => {
                    Failure::new(format!("failed to create machine: {refusal}"))
                }
                other => failure(other),
            })?;
            draft
        };
        match self.ask(Request::Start { target: uuid.clone() }).await {
            Ok(_) => Ok(json!(uuid)),
            Err(refusal) => {
                // Nothing is left of what did not start.
                let _ = self.ask(Request::Remove { target: uuid, force: true }).await;
                let whole = failure(&refusal).message;
                let name = draft.name.unwrap_or_default();
                let why = whole.strip_prefix(&format!("{name}: ")).unwrap_or(&whole);
                Err(Failure::new(why.strip_prefix("flist: ").unwrap_or(why)))
            }
        }
    }

    /// A number that no machine has, after the one that was given last.
    fn next(&self, taken: &[u16]) -> Result<u16, Failure> {
        let last = self.sequence.load(Ordering::Relaxed) as u16;
        // After a restart those that are there say where it was.
        let from = taken.iter().copied().max().unwrap_or(1).max(last);
        let mut next = nics::after(from);
        for _ in 0..u16::MAX {
            if !taken.contains(&next) {
                self.sequence.store(u32::from(next), Ordering::Relaxed);
                return Ok(next);
            }
            next = nics::after(next);
        }
        Err(Failure::new("there is no free address"))
    }

    async fn list(&self) -> Done {
        let mut all = Vec::new();
        for machine in self.machines().await? {
            all.push(self.value(&machine).await);
        }
        Ok(Value::Array(all))
    }

    async fn value(&self, machine: &Machine) -> Value {
        let ends = match self.ask(Request::Ends { target: machine.uuid.clone() }).await {
            Ok(Reply::Ends { ends }) => ends,
            // It may have ended since.
            Ok(_) | Err(_) => Ends::default(),
        };
        machine.value(&ends)
    }

    async fn get(&self, arguments: &Value) -> Done {
        let (name, uuid) = (text(arguments, "name"), text(arguments, "uuid"));
        match (name.is_empty(), uuid.is_empty()) {
            (true, true) | (false, false) => Err(Failure::new("Must supply either Name or UUID")),
            (true, false) => match self.find(&uuid).await {
                Ok(machine) => Ok(self.value(&machine).await),
                Err(why) => {
                    Err(Failure::new(format!("failed to lookup domain by uuid: {}", why.message)))
                }
            },
            (false, true) => {
                let machines = self.machines().await?;
                match machines.iter().find(|m| m.name == name) {
                    Some(machine) => Ok(self.value(machine).await),
                    None => Err(Failure::new(format!(
                        "failed to lookup domain by name: there is no machine '{name}'"
                    ))),
                }
            }
        }
    }

    async fn info(&self, arguments: &Value) -> Done {
        let machine = self.find(&text(arguments, "uuid")).await?;
        Ok(describe::info(&machine, &self.usage(&machine).await))
    }

    async fn infops(&self, arguments: &Value) -> Done {
        let machine = self.find(&text(arguments, "uuid")).await?;
        Ok(self.used(&machine, &self.usage(&machine).await))
    }

    async fn change(&self, machine: &Machine, change: Change) -> Result<(), Failure> {
        let (target, change) = (machine.uuid.clone(), Box::new(change));
        self.ask(Request::Update { target, change }).await.map(drop).map_err(|r| failure(&r))
    }

    async fn attach_disk(&self, arguments: &Value) -> Done {
        let machine = self.find(&text(arguments, "uuid")).await?;
        let mut media: Media = serde_json::from_value(arguments["media"].clone())
            .map_err(|e| Failure::new(e.to_string()))?;
        let all = machine.params.media.as_deref().unwrap_or_default();
        if all.iter().any(|m| m.url == media.url) {
            return Err(Failure::new("The disk you tried is already attached to the vm"));
        }
        // A number that none of the others has, also after one of them went away.
        let mut names = (all.len()..).map(|index| media.disk_name(index));
        let free = names.find(|name| all.iter().all(|m| m.disk != *name));
        media.disk = free.unwrap_or_default();
        let disk = create::disk(&media)?;
        self.change(&machine, Change::AddDisk { disk }).await?;
        self.remember(&machine, |kept| kept.media.get_or_insert_default().push(media)).await
    }

    async fn detach_disk(&self, arguments: &Value) -> Done {
        let machine = self.find(&text(arguments, "uuid")).await?;
        let url = arguments["media"]["url"].as_str().unwrap_or("").to_owned();
        let name = Self::disk_of(&machine, &url)?;
        self.change(&machine, Change::RemoveDisk { name }).await?;
        self.remember(&machine, |kept| {
            kept.media.iter_mut().for_each(|media| media.retain(|m| m.url != url));
        })
        .await
    }

    /// The name that a medium's disk has.
    fn disk_of(machine: &Machine, url: &str) -> Result<String, Failure> {
        let media = machine.params.media.iter().flatten().find(|m| m.url == url);
        let none = || Failure::new("The disk you tried is not attached to the vm");
        media.map(|media| media.disk.clone()).ok_or_else(none)
    }

    /// What is not said any more does not count any more.
    async fn limit_disk_io(&self, arguments: &Value) -> Done {
        let machine = self.find(&text(arguments, "uuid")).await?;
        let url = arguments["media"]["url"].as_str().unwrap_or("").to_owned();
        let name = Self::disk_of(&machine, &url)?;
        let tune = iotune::kept(arguments);
        let limits = iotune::limits(&tune)?;
        self.change(&machine, Change::DiskLimits { name, limits }).await?;
        self.remember(&machine, |kept| {
            let media = kept.media.iter_mut().flatten().find(|media| media.url == url);
            if let Some(media) = media {
                media.iotune = Some(tune);
            }
        })
        .await
    }

    fn nic_of(arguments: &Value) -> Result<Nic, Failure> {
        let nic: Nic = serde_json::from_value(json!({
            "type": text(arguments, "type"),
            "id": text(arguments, "id"),
            "hwaddr": text(arguments, "hwaddr"),
        }))
        .map_err(|e| Failure::new(e.to_string()))?;
        nics::check(std::slice::from_ref(&nic)).map(|()| nic)
    }

    async fn add_nic(&self, arguments: &Value) -> Done {
        let machine = self.find(&text(arguments, "uuid")).await?;
        let nic = Self::nic_of(arguments)?;
        let same = |known: &Nic| known.kind == nic.kind && known.id == nic.id;
        match nic.kind.as_str() {
            "default" if machine.params.nics.iter().any(|n| n.kind == "default") => {
                return Err(Failure::new("The default nic is already attached to the vm"));
            }
            _ if machine.params.nics.iter().any(same) => {
                return Err(Failure::new("This nic is already attached to the vm"));
            }
            _ => {}
        }
        let draft = nics::draft(&nic, machine.sequence, &self.settings.links)?;
        self.change(&machine, Change::AddNic { nic: Box::new(draft) }).await?;
        self.remember(&machine, |kept| kept.nics.push(nic)).await
    }

    async fn create_image(&self, arguments: &Value) -> Done {
        let (size, format) = (text(arguments, "size"), text(arguments, "format"));
        let bytes = bytes(&size).ok_or_else(|| {
            Failure::new(format!("Invalid image size specified: {size:?}; 10G or 512M is one"))
        })?;
        let path = file(arguments, "file_name")?;
        self.done(Request::MakeDisk { path, format, bytes }).await
    }

    async fn convert_image(&self, arguments: &Value) -> Done {
        let (from, to) = (file(arguments, "input_file")?, file(arguments, "output_file")?);
        let format = text(arguments, "output_format");
        self.done(Request::ConvertDisk { from, to, format }).await
    }

    async fn done(&self, request: Request) -> Done {
        match self.ask(request).await {
            Ok(_) => Ok(Value::Null),
            Err(refusal) => Err(failure(&refusal)),
        }
    }

    async fn remove_nic(&self, arguments: &Value) -> Done {
        let machine = self.find(&text(arguments, "uuid")).await?;
        let nic = Self::nic_of(arguments)?;
        let same = |known: &Nic| known.kind == nic.kind && known.id == nic.id;
        let Some(index) = machine.params.nics.iter().position(same) else {
            return Err(Failure::new("The nic you tried is not attached to the vm"));
        };
        self.change(&machine, Change::RemoveNic { name: nics::name(&nic) }).await?;
        self.remember(&machine, |kept| drop(kept.nics.remove(index))).await
    }

    async fn port(&self, arguments: &Value, add: bool) -> Done {
        let machine = self.find(&text(arguments, "uuid")).await?;
        let host = text(arguments, "host_port");
        let guest = arguments["container_port"].as_u64().unwrap_or(0) as u32;
        if !machine.params.nics.iter().any(|nic| nic.kind == "default") {
            return Err(Failure::new("KVM doesn't have a default nic"));
        }
        let port = nics::port(&host, guest)?;
        let number = |text: &str| text.rsplit(':').next().unwrap_or("").to_owned();
        if add {
            self.change(&machine, Change::AddPort { port }).await?;
            return self
                .remember(&machine, |kept| {
                    kept.port.get_or_insert_default().insert(host, guest);
                })
                .await;
        }
        let holds = |m: &Machine| {
            let mut all = m.params.port.iter().flatten();
            all.find(|(h, _)| number(h) == number(&host)).map(|(h, g)| (h.clone(), *g))
        };
        match holds(&machine) {
            Some((known, inside)) if inside == guest => {
                self.change(&machine, Change::RemovePort { port }).await?;
                self.remember(&machine, |kept| {
                    if let Some(all) = &mut kept.port {
                        all.remove(&known);
                    }
                })
                .await
            }
            Some(_) => Err(Failure::new("permission denied")),
            None if self.machines().await?.iter().any(|m| holds(m).is_some()) => {
                Err(Failure::new("permission denied"))
            }
            None => {
                let number = number(&host);
                Err(Failure::new(format!("no port forwrard from host port: {number}")))
            }
        }
    }

    /// Notes what a machine that will come from another host has here.
    async fn prepare(&self, arguments: &Value) -> Done {
        let wrong = |what: &str| Failure::new(format!("{what} is a required parameter"));
        let id = text(arguments, "uuid").parse().map_err(|_| wrong("UUID"))?;
        let (nics, port) = create::ways(arguments)?;
        let sequence = 0;
        let (drafts, ports) = create::network(&nics, port.as_ref(), sequence, &self.settings)?;
        let leads = |nic: NicDraft| Leads { network: nic.network, wire: nic.wire };
        let leads = drafts.into_iter().map(leads).collect();
        let document = [("/params/nics", json!(nics)), ("/params/port", json!(port))];
        let document = document.map(|(at, value)| (at.to_owned(), value)).into();
        self.done(Request::Expect(Box::new(Expected { id, nics: leads, ports, document }))).await
    }

    /// Writes down what a machine has now.
    async fn remember(&self, machine: &Machine, change: impl FnOnce(&mut create::Params)) -> Done {
        let mut params = machine.params.clone();
        change(&mut params);
        let kept = create::Kept { sequence: machine.sequence, params };
        let document = serde_json::to_string(&kept).map_err(|e| Failure::new(e.to_string()))?;
        self.change(machine, Change::Document { document }).await?;
        Ok(Value::Null)
    }
}

/// This process, as far as anybody asks.
fn own_state() -> Value {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let mut pages = text.split_whitespace().filter_map(|n| n.parse::<u64>().ok());
    let (vms, rss) = (pages.next().unwrap_or(0), pages.next().unwrap_or(0));
    json!({"cpu": 0.0, "rss": rss * 4096, "vms": vms * 4096, "swap": 0})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_as_that_systems_tools_take_them() {
        for (text, wanted) in [
            ("10G", Some(10 << 30)),
            ("512m", Some(512 << 20)),
            ("4096", Some(4096)),
            ("1b", Some(1)),
            ("1T", Some(1 << 40)),
            ("0", None),
            ("", None),
            ("G", None),
            ("-1G", None),
            ("1x", None),
            ("99999999P", None),
            ("1\u{e9}", None),
        ] {
            assert_eq!(bytes(text), wanted, "{text}");
        }
    }
}
