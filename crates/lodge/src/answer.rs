//! Requests carried out: the one place where the keeper of machines, the host and the images are
//! brought together. Doors call it through `Control`.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lodge_doors::control::Control;
use lodge_host::backend::DiskFormat;
use lodge_host::image::{Manifest, convert};
use lodge_host::linux::Linux;
use lodge_host::net::uplink;
use lodge_host::warden::console;
use lodge_machine::keeper::{Found, detail, summary};
use lodge_machine::record::Record;
use lodge_machine::{Keeper, Verb};
use lodge_spec::machine::{BackendKind, Boot, DiskSource};
use lodge_spec::names::ImageName;
use lodge_spec::request::{NetworkAsk, Question, Refusal, Reply, Request, Target};
use lodge_spec::state::{Event, State};
use serde_json::{Value, json};
use tokio::net::unix::pipe;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc::Sender;

use crate::doctor;

pub(crate) struct Answer {
    keeper: Arc<Keeper<Linux>>,
    attended: bool,
}

/// More past events than this are not shown.
const MAX_EVENTS: u32 = 10_000;

impl Control for Answer {
    async fn ask(&self, request: Request, replies: Sender<Reply>) {
        let reply = match self.carry_out(request, &replies).await {
            Ok(reply) => reply,
            Err(refusal) => Reply::Refused { refusal },
        };
        // Whoever asked may have gone away.
        let _ = replies.send(reply).await;
    }
}

impl Answer {
    pub(crate) fn new(keeper: Arc<Keeper<Linux>>, attended: bool) -> Self {
        Self { keeper, attended }
    }

    async fn carry_out(&self, request: Request, replies: &Sender<Reply>) -> Result<Reply, Refusal> {
        let ms = Duration::from_millis;
        match request {
            Request::Ping => {
                let version = env!("CARGO_PKG_VERSION").to_owned();
                let (pid, attended) = (std::process::id(), self.attended);
                Ok(Reply::Pong { version, pid, attended })
            }
            Request::Create { draft } => {
                let machine = self.keeper.create(*draft).await?;
                Ok(Reply::Summary { machine })
            }
            Request::Plan { draft } => self.plan(*draft).await,
            Request::Start { target } => self.verb(&target, Verb::Start, None).await,
            Request::Boot { target, with } => {
                let machine = self.keeper.boot(&target, with).await?;
                Ok(Reply::Summary { machine })
            }
            Request::Stop { target, force, timeout_ms } => {
                self.verb(&target, Verb::Stop { force }, Some(ms(timeout_ms))).await
            }
            Request::Restart { target, timeout_ms } => {
                self.verb(&target, Verb::Restart, Some(ms(timeout_ms))).await
            }
            Request::Reset { target } => self.reset(&target).await,
            Request::Pause { target } => self.verb(&target, Verb::Pause, None).await,
            Request::Resume { target } => self.verb(&target, Verb::Resume, None).await,
            Request::Suspend { target } => self.verb(&target, Verb::Suspend, None).await,
            Request::Migrate { target, to } => {
                let machine = self.keeper.migrate(&target, to).await?;
                Ok(Reply::Summary { machine })
            }
            Request::Expect(expected) => {
                self.keeper.expect(*expected);
                Ok(Reply::Done)
            }
            Request::Arrive(migration) => {
                let (id, memory) = self.keeper.admit(*migration).await?;
                let arrived = self.arrive(&id.to_string(), &memory, replies).await;
                if arrived.is_err() {
                    self.keeper.give_up(id).await;
                }
                arrived
            }
            Request::Remove { target, force } => {
                self.verb(&target, Verb::Remove { force }, None).await
            }
            Request::Update { target, change } => {
                let machine = self.keeper.update(&target, *change).await?;
                Ok(Reply::Summary { machine })
            }
            Request::Redefine { target, draft, unchanged_since_us } => {
                let machine = self.keeper.redefine(&target, *draft, unchanged_since_us).await?;
                Ok(Reply::Summary { machine })
            }
            Request::Monitor { target, questions } => {
                let id = self.record(&target)?.machine.id;
                let value = self.keeper.host().monitor(id, &questions).await;
                Ok(Reply::Document { value: value.map_err(Refusal::failed)? })
            }
            Request::Nmi { target } => {
                let id = self.record(&target)?.machine.id;
                self.keeper.host().nmi(id).await.map_err(Refusal::failed)?;
                Ok(Reply::Done)
            }
            Request::Screenshot { target } => {
                let id = self.record(&target)?.machine.id;
                let path = self.keeper.host().screenshot(id).await.map_err(Refusal::failed)?;
                Ok(Reply::Document { value: json!({"path": path}) })
            }
            Request::Snapshot { target, name, verb } => {
                let record = self.record(&target)?;
                let host = self.keeper.host();
                let value = host.snapshot(&record.machine, record.life.state, &name, verb).await;
                Ok(Reply::Document { value: value.map_err(Refusal::failed)? })
            }
            Request::MakeDisk { path, format, bytes } => {
                let format = disk_format(&format)?;
                let work = move || convert::make(&path, format, bytes);
                let made = tokio::task::spawn_blocking(work).await.map_err(Refusal::failed)?;
                made.map_err(Refusal::failed).map(|()| Reply::Done)
            }
            Request::ConvertDisk { from, to, format } => {
                let done = convert::convert(&from, &to, disk_format(&format)?).await;
                done.map_err(Refusal::failed).map(|()| Reply::Done)
            }
            Request::DiskFiles { target } => {
                let value = self.keeper.host().disk_files(&self.record(&target)?.machine);
                Ok(Reply::Document { value })
            }
            Request::Signal { target, signal } => {
                let id = self.record(&target)?.machine.id;
                self.keeper.host().signal(id, signal).await.map_err(Refusal::failed)?;
                Ok(Reply::Done)
            }
            Request::List { all } => Ok(Reply::List { machines: self.keeper.list(all) }),
            Request::Page(page) => {
                let (machines, total, more) = self.keeper.page(&page);
                Ok(Reply::Page { machines, total, more })
            }
            Request::Fetch { target } => {
                let machine = Box::new(detail(&*self.record(&target)?));
                Ok(Reply::Detail { machine })
            }
            Request::Usage { target, each_cpu } => {
                let record = self.record(&target)?;
                let usage = self.keeper.host().usage(&record.machine, each_cpu).await;
                Ok(Reply::Usage { usage: Box::new(usage) })
            }
            Request::Ends { target } => {
                let id = self.record(&target)?.machine.id;
                Ok(Reply::Ends { ends: self.keeper.host().ends(id).await })
            }
            Request::Inspect { target } => self.inspect(&target).await,
            Request::Why { target } => self.why(&target).await,
            Request::Timeline { target } => self.timeline(&target).await,
            Request::Wait { target, until, timeout_ms } => {
                let machine = self.keeper.wait(&target, until, timeout_ms.map(ms)).await?;
                Ok(Reply::Summary { machine })
            }
            Request::Events { target, follow, past } => {
                self.events(target, follow, past, replies).await
            }
            Request::Console { target } => {
                let record = self.record(&target)?;
                let (socket, log) = self.keeper.host().console(record.machine.id);
                Ok(Reply::Console { socket, log })
            }
            Request::Doctor => {
                let host = self.keeper.host();
                Ok(Reply::Document { value: doctor::examine(host.facts().await) })
            }
            Request::Network { name, ask } => {
                let dir = self.keeper.host().paths.network(name.as_str());
                let pid = uplink::ask(&dir, &name, ask).await.map_err(Refusal::failed)?;
                if ask == (NetworkAsk::Hold { stay: false }) {
                    uplink::leave(&dir).await;
                }
                Ok(Reply::Document { value: json!({"pid": pid}) })
            }
            Request::Trial => {
                let host = self.keeper.host();
                let report = lodge_host::trial::run(host.facts().await).await;
                let report = report.map_err(Refusal::failed)?.into_iter();
                let value = report.map(|(way, closed)| json!({"way": way, "closed": closed}));
                Ok(Reply::Document { value: value.collect() })
            }
            Request::Gc { dry_run } => self.collect(dry_run).await,
            Request::ImageBuild { .. }
            | Request::ImageAdd { .. }
            | Request::ImageExport { .. }
            | Request::ImageList
            | Request::ImageInspect { .. }
            | Request::ImageRemove { .. }
            | Request::ImageVerify { .. } => self.image(request, replies).await,
        }
    }

    async fn image(&self, request: Request, replies: &Sender<Reply>) -> Result<Reply, Refusal> {
        let images = &self.keeper.host().images;
        let document = |value: Value| Ok(Reply::Document { value });
        match request {
            Request::ImageBuild { name, size, packages } => {
                let progress = replies.clone();
                let tell = move |message: &str, done: u64, total: u64| {
                    let message = message.to_owned();
                    // A slow reader misses a step, the build goes on.
                    let _ = progress.try_send(Reply::Progress { message, done, total });
                };
                let build = images.build(&name, size, &packages, Arc::new(tell));
                // A build that nobody waits for any more is given up, and its scratch with it.
                tokio::select! {
                    manifest = build => document(json!(manifest?)),
                    () = replies.closed() => Err(Refusal::failed("nobody waits for the image")),
                }
            }
            Request::ImageAdd { path, name } => {
                document(json!(images.add(path.as_ref(), name).await?))
            }
            Request::ImageExport { name, folder } => {
                let (manifest, images) = (images.find(&name).await?, images.clone());
                let work = move || images.export(&manifest, folder.as_ref());
                document(json!(tokio::task::spawn_blocking(work).await.map_err(Refusal::failed)??))
            }
            Request::ImageList => document(images.list().await?.iter().map(with_uuid).collect()),
            Request::ImageInspect { name } => document(with_uuid(&images.find(&name).await?)),
            Request::ImageRemove { name } => {
                images.remove(&name, &self.images_in_use()).await?;
                Ok(Reply::Done)
            }
            Request::ImageVerify { name } => {
                let list = match name {
                    Some(name) => vec![images.find(&name).await?],
                    None => images.list().await?,
                };
                for manifest in &list {
                    images.verify(manifest).await?;
                }
                let names: Vec<String> = list.iter().map(|m| m.name.to_string()).collect();
                document(json!(names))
            }
            _ => Err(Refusal::failed("not a request about images")),
        }
    }

    async fn verb(
        &self,
        target: &str,
        verb: Verb,
        timeout: Option<Duration>,
    ) -> Result<Reply, Refusal> {
        let machine = self.keeper.ask(target, verb, timeout).await?;
        Ok(Reply::Summary { machine })
    }

    /// Starts a machine of another host once its memory comes.
    async fn arrive(
        &self,
        target: &str,
        memory: &Path,
        replies: &Sender<Reply>,
    ) -> Result<Reply, Refusal> {
        // Held open: whoever writes while nobody else reads yet is not turned away.
        let pipe = pipe::OpenOptions::new().open_receiver(memory).map_err(Refusal::failed)?;
        // Whoever asked may have gone away, which shows in the next step.
        let _ = replies.send(Reply::Document { value: json!({"memory": memory}) }).await;
        tokio::select! {
            comes = pipe.readable() => comes.map_err(Refusal::failed)?,
            () = replies.closed() => return Err(Refusal::failed("its memory did not come")),
        }
        self.verb(target, Verb::Start, None).await
    }

    /// Presses the reset button; a machine whose hypervisor has none is restarted at once.
    async fn reset(&self, target: &str) -> Result<Reply, Refusal> {
        let record = self.record(target)?;
        let backend = record.running.as_ref().map(|running| running.backend);
        match backend.filter(|_| record.life.state.is_live()) {
            Some(BackendKind::Firecracker) => {
                self.verb(target, Verb::Restart, Some(Duration::ZERO)).await
            }
            Some(BackendKind::Qemu | BackendKind::CloudHypervisor) | None => {
                self.verb(target, Verb::Reset, None).await
            }
        }
    }

    fn record(&self, target: &str) -> Result<Arc<Record>, Refusal> {
        match self.keeper.find(target)? {
            Found::Machine(record) => Ok(record),
            Found::Broken(broken) => Err(Refusal::Failed { message: broken.reason }),
        }
    }

    async fn plan(&self, draft: lodge_spec::Draft) -> Result<Reply, Refusal> {
        let machine = self.keeper.resolve_new(draft)?;
        let host = self.keeper.host();
        let choice = host.plan(&machine).await;
        let choice = choice.map_err(|p| Refusal::Invalid { problems: p.0 })?;
        let mut backends = serde_json::Map::new();
        for (backend, verdict) in &choice.verdicts {
            let said = match verdict {
                Ok(_) => json!({"can": true}),
                Err(lacks) => json!({"can": false, "lacks": lacks}),
            };
            backends.insert(backend.to_string(), said);
        }
        let value = match choice.chosen() {
            Ok(mut launch) => {
                launch.hide_secrets();
                json!({"backends": backends, "chosen": launch})
            }
            Err(_) => json!({"backends": backends}),
        };
        Ok(Reply::Document { value })
    }

    async fn inspect(&self, target: &str) -> Result<Reply, Refusal> {
        let value = match self.keeper.find(target)? {
            Found::Machine(record) => {
                let id = record.machine.id;
                let mut runs = self.keeper.host().describe(id);
                if record.machine.display.is_some() && runs.is_object() {
                    let said = self.keeper.host().monitor(id, &[Question::Vnc]).await;
                    runs["vnc"] = said.map_or(Value::Null, |mut said| said["vnc"].take());
                }
                json!({
                    "summary": summary(&record),
                    "machine": record.machine.to_draft(),
                    "life": record.life,
                    "runs": runs,
                    "bootstrap": record.bootstrap,
                })
            }
            Found::Broken(broken) => json!({
                "state": State::Broken,
                "id": broken.row.id,
                "name": broken.row.name,
                "reason": broken.reason,
                "record": broken.row.record,
            }),
        };
        Ok(Reply::Document { value })
    }

    async fn past(&self, target: &str) -> Result<(Arc<Record>, Vec<Event>), Refusal> {
        let record = self.record(target)?;
        let of = Some(record.machine.id.to_string());
        let events = self.keeper.store().events(of, 0, MAX_EVENTS).await;
        Ok((record, events.map_err(Refusal::failed)?))
    }

    /// The events of the last start.
    async fn timeline(&self, target: &str) -> Result<Reply, Refusal> {
        let (_, events) = self.past(target).await?;
        let begin = |e: &Event| matches!(e.kind.as_str(), "start" | "restart" | "restart-due");
        let start = events.iter().rposition(begin).unwrap_or(events.len());
        let mut list: Vec<Event> = events[start..].to_vec();
        list.sort_by_key(|e| e.at_us);
        Ok(Reply::Document { value: json!(list) })
    }

    async fn why(&self, target: &str) -> Result<Reply, Refusal> {
        let (record, events) = self.past(target).await?;
        let (_, log) = self.keeper.host().console(record.machine.id);
        let console = console::tail(log.as_ref(), 16 << 10).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let lines: Vec<&str> = console.lines().collect();
        let last_start = events.iter().rposition(|e| e.kind == "start").unwrap_or(0);
        let stderr = events[last_start..].iter().filter(|e| e.kind == "stderr");
        let stderr: Vec<&str> = stderr.map(|e| e.detail.as_str()).collect();
        let chain: Vec<&Event> =
            events[last_start..].iter().filter(|e| e.kind != "stderr").collect();
        Ok(Reply::Document {
            value: json!({
                "state": record.life.state,
                "reason": record.life.reason,
                "events": chain,
                "stderr": stderr,
                "console": lines[lines.len().saturating_sub(15)..],
            }),
        })
    }

    async fn events(
        &self,
        target: Option<Target>,
        follow: bool,
        past: bool,
        replies: &Sender<Reply>,
    ) -> Result<Reply, Refusal> {
        let mut live = self.keeper.subscribe();
        let store = self.keeper.store();
        if !past && replies.send(Reply::Done).await.is_err() {
            return Ok(Reply::Done);
        }
        let limit = if past { MAX_EVENTS } else { 0 };
        let past = store.events(target.clone(), 0, limit).await.map_err(Refusal::failed)?;
        let mut last = 0;
        for event in past {
            last = event.seq;
            if replies.send(Reply::Event { event }).await.is_err() {
                return Ok(Reply::Done);
            }
        }
        if !follow {
            return Ok(Reply::Done);
        }
        loop {
            let event = tokio::select! {
                event = live.recv() => event,
                () = replies.closed() => return Ok(Reply::Done),
            };
            match event {
                Ok(event) => {
                    let about = |t: &String| event.name == *t || event.id.to_string() == *t;
                    let wanted = target.as_ref().is_none_or(about);
                    if wanted && event.seq > last {
                        let _ = replies.send(Reply::Event { event }).await;
                    }
                }
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return Ok(Reply::Done),
            }
        }
    }

    fn images_in_use(&self) -> Vec<(ImageName, String)> {
        let mut list = Vec::new();
        for machine in self.keeper.list(true) {
            let Ok(Found::Machine(record)) = self.keeper.find(&machine.id.to_string()) else {
                continue;
            };
            let name = record.machine.name.to_string();
            if let Boot::Image { image, .. } = &record.machine.boot {
                list.push((image.clone(), name.clone()));
            }
            list.extend(record.machine.disks.iter().filter_map(|d| match &d.source {
                DiskSource::Image { image, .. } => Some((image.clone(), name.clone())),
                DiskSource::Path(_)
                | DiskSource::Remote(_)
                | DiskSource::Own(_)
                | DiskSource::Above(_)
                | DiskSource::Blank { .. }
                | DiskSource::Flist => None,
            }));
        }
        list
    }

    async fn collect(&self, dry_run: bool) -> Result<Reply, Refusal> {
        let known = self.keeper.known();
        let live: Vec<_> = self.keeper.list(false).into_iter().map(|m| m.id).collect();
        let strays = self.keeper.host().collect(&known, &live, dry_run).await?;
        Ok(Reply::Document { value: json!(strays) })
    }
}

/// A manifest with the identity by which other systems know it.
fn with_uuid(manifest: &Manifest) -> Value {
    let mut value = json!(manifest);
    value["uuid"] = json!(manifest.uuid());
    value
}

fn disk_format(name: &str) -> Result<DiskFormat, Refusal> {
    let unknown = || Refusal::invalid("format", format!("Unknown file format '{name}'"));
    [DiskFormat::Raw, DiskFormat::Qcow2]
        .into_iter()
        .find(|format| format.as_str() == name)
        .ok_or_else(unknown)
}
