//! Commands about one machine.

use std::time::Duration;

use lodge_spec::request::{OneBoot, Refusal, Request};
use lodge_spec::state::{Detail, State};
use serde_json::Value;

use super::build::World;
use super::draft::{boot_order, drive};
use super::grammar::{BootWords, One, Source};
use super::info;
use super::nics::known_tag;
use super::properties::Brand;
use super::run::{Done, End, Fault, Session};
use super::update::{Subject, apply};
use super::validate::{self, Action};
use super::values::{Object, is_true, objects, text};
use super::view::{doc_of, metadata_of, state, view};
use super::{disks, draft, signals, snapshots};

/// A guest that was asked to end has this long.
const STOP_TIMEOUT: Duration = Duration::from_secs(180);
/// An update that is overtaken is made again so often.
const TRIES: u32 = 200;

/// A machine as it is now.
pub(super) struct Vm {
    pub(super) uuid: String,
    pub(super) detail: Detail,
    pub(super) doc: Object,
    pub(super) brand: Brand,
}

impl Vm {
    pub(super) fn now(&self) -> State {
        self.detail.summary.state
    }

    pub(super) fn state(&self) -> &'static str {
        match is_true(&self.doc, "receiving") {
            true => "receiving",
            false => state(self.now()),
        }
    }
}

pub(super) async fn find(
    session: &mut Session<'_, '_>,
    uuid: &str,
    otherwise: impl Fn(&str) -> String,
) -> Result<Vm, Fault> {
    let detail = session.fetch(uuid).await?.ok_or_else(|| otherwise(uuid))?;
    let doc = doc_of(&detail)?;
    let brand = text(&doc, "brand").and_then(Brand::of).unwrap_or(Brand::Kvm);
    Ok(Vm { uuid: uuid.to_owned(), detail, doc, brand })
}

pub(super) async fn carry_out(session: &mut Session<'_, '_>, uuid: &str, what: One) -> Done {
    let vm = find(session, uuid, |uuid| what.not_found(uuid)).await?;
    match what {
        One::Get => {
            let shown = view(&vm.detail, &session.place.zones, &session.place.settings)?;
            session.show(&Value::Object(shown))
        }
        One::Console => match vm.now() {
            State::Running | State::Paused | State::Starting | State::Stopping => {
                Ok(End::Console(vm.uuid))
            }
            State::Created | State::Stopped | State::Suspended | State::Failed | State::Broken => {
                Err(Fault::Error(format!(
                    "cannot connect to console when state is \"{}\" must be \"running\".",
                    vm.state()
                )))
            }
        },
        One::Start(words) => {
            start(session, uuid, &words).await?;
            session.say(&format!("Successfully started VM {uuid}"))
        }
        One::Stop { force, timeout } => stop(session, vm, force, timeout).await,
        One::Reboot { force, timeout } => reboot(session, vm, force, timeout).await,
        One::Delete => delete(session, vm).await,
        One::Info(kinds) => tell(session, vm, &kinds).await,
        One::Sysrq(request) => sysrq(session, vm, &request).await,
        One::Kill(signal) => kill(session, vm, &signal).await,
        One::Update { operands, source } => update(session, vm, operands, &source).await,
        One::CreateSnapshot(name) => snapshots::create(session, vm, &name).await,
        One::RollbackSnapshot(name) => snapshots::rollback(session, vm, &name).await,
        One::DeleteSnapshot(name) => snapshots::delete(session, vm, &name).await,
        One::Reprovision(source) => snapshots::reprovision(session, vm, &source).await,
        One::Send => super::bundle::send(session, vm).await,
        One::Install => super::bundle::install(session, vm).await,
    }
}

/// Changes what is kept of a machine, whatever else changes meanwhile.
pub(super) async fn redefine(
    session: &mut Session<'_, '_>,
    uuid: &str,
    change: impl Fn(&mut Object),
) -> Result<(), Fault> {
    let world = session.world().await?;
    for nth in 0..TRIES {
        let vm = find(session, uuid, |uuid| format!("VM {uuid} not found")).await?;
        let mut doc = vm.doc.clone();
        change(&mut doc);
        if doc == vm.doc {
            return Ok(());
        }
        let metadata = metadata_of(&vm.detail);
        let draft = draft::draft(&doc, &metadata, &world, &session.place.settings)?;
        match store(session, &vm, draft).await? {
            Ok(()) => return Ok(()),
            Err(Refusal::Changed { .. }) => step_aside(nth).await,
            Err(refusal) => return Err(Fault::Error(refusal.to_string())),
        }
    }
    Err(Fault::Error(format!("VM {uuid} changes all the time")))
}

/// Lets others pass; longer each time, and never as long as they.
async fn step_aside(nth: u32) {
    let [random, ..] = *uuid::Uuid::new_v4().as_bytes();
    let most = u64::from(nth.min(20)) * 5 + 2;
    tokio::time::sleep(Duration::from_millis(u64::from(random) % most)).await;
}

async fn store(
    session: &mut Session<'_, '_>,
    vm: &Vm,
    draft: lodge_spec::Draft,
) -> Result<Result<(), Refusal>, Fault> {
    let request = Request::Redefine {
        target: vm.uuid.clone(),
        draft: Box::new(draft),
        unchanged_since_us: Some(vm.detail.modified_us),
    };
    Ok(session.ask(request).await?.map(drop))
}

async fn set_autoboot(session: &mut Session<'_, '_>, uuid: &str, on: bool) -> Result<(), Fault> {
    redefine(session, uuid, |doc| drop(doc.insert("autoboot".into(), on.into()))).await
}

/// Starts a machine, with what holds for this time only.
pub(super) async fn start(
    session: &mut Session<'_, '_>,
    uuid: &str,
    words: &BootWords,
) -> Result<(), Fault> {
    let unable = |why: &str| format!("Unable to start VM {uuid}: {why}");
    let vm = find(session, uuid, |uuid| unable(&format!("VM {uuid} not found"))).await?;
    match vm.state() {
        "running" => {
            return Err(Fault::Notice(unable(&format!("VM {uuid} is already 'running'"))));
        }
        "stopped" => {}
        other => {
            let why = format!("Cannot start vm from state \"{other}\", must be \"stopped\".");
            return Err(Fault::Error(unable(&why)));
        }
    }
    let world = session.world().await?;
    known_tags(&vm.doc, &world).map_err(|why| unable(&why))?;
    let property = text(&vm.doc, "boot").unwrap_or("order=cd");
    let order = boot_order(words.order.as_deref().unwrap_or(property));
    let (order, once) = order.map_err(|why| unable(&why))?;
    // A new medium that comes alone is what is meant to boot.
    let alone = once.is_none()
        && order.first().is_some_and(|device| device == "disk")
        && words.drives.iter().all(|drive| !drive.cdrom);
    let mut extra = Vec::new();
    for (i, given) in words.drives.iter().enumerate() {
        disks::check_model(vm.brand, &given.model).map_err(|why| unable(&why))?;
        let configured = objects(&vm.doc, "disks");
        if configured.iter().any(|disk| text(disk, "path") == Some(&given.path)) {
            let why = format!("the disk {} is attached already", given.path);
            return Err(Fault::Error(unable(&why)));
        }
        let mut disk = drive(format!("boot{i}"), &given.path, &given.model, given.cdrom);
        disk.first = Some(alone && i == 0);
        extra.push(disk);
    }
    set_autoboot(session, uuid, true).await?;
    // An image with a kernel of its own boots by that, unless somebody says otherwise this time.
    let own = words.order.is_none() && extra.is_empty();
    let direct = own && draft::boots_directly(&vm.doc, &world).is_some();
    let with = match direct {
        true => OneBoot::default(),
        false => OneBoot { order: Some(order), once, disks: extra },
    };
    let started = session.ask(Request::Boot { target: uuid.to_owned(), with }).await?;
    let Err(refusal) = started else { return Ok(()) };
    let own = objects(&vm.doc, "disks");
    Err(Fault::Error(unable(&missing_disk(&refusal, &own, words).unwrap_or(refusal.to_string()))))
}

/// The path, as it was given, of a disk that the host does not find.
fn missing_disk(refusal: &Refusal, own: &[Object], words: &BootWords) -> Option<String> {
    let Refusal::Invalid { problems } = refusal else { return None };
    let index = problems.iter().find_map(|problem| {
        let rest = problem.path.strip_prefix("disks[")?;
        let (index, field) = rest.split_once(']')?;
        (field == ".source").then(|| index.parse::<usize>().ok())?
    })?;
    let path = match own.get(index) {
        Some(disk) => text(disk, "path").unwrap_or("").to_owned(),
        None => words.drives.get(index - own.len())?.path.clone(),
    };
    Some(format!("Cannot find disk: {path}"))
}

/// Every link that the machine's interfaces are on is known.
fn known_tags(doc: &Object, world: &World) -> Result<(), String> {
    let nics = objects(doc, "nics");
    nics.iter().try_for_each(|nic| known_tag(world, text(nic, "nic_tag").unwrap_or("")))
}

/// 0 seconds mean what nothing means.
fn patience_ms(seconds: Option<u64>) -> u64 {
    let patience = seconds.filter(|t| *t > 0).map_or(STOP_TIMEOUT, Duration::from_secs);
    u64::try_from(patience.as_millis()).unwrap_or(u64::MAX)
}

async fn stop(session: &mut Session<'_, '_>, vm: Vm, force: bool, timeout: Option<u64>) -> Done {
    let uuid = &vm.uuid;
    set_autoboot(session, uuid, false).await?;
    let stopping = vm.now() == State::Stopping;
    if !vm.now().is_live() || (stopping && !force) {
        let now = vm.state();
        return Err(Fault::Notice(format!(
            "VM {uuid} is already not 'running' (currently: {now})"
        )));
    }
    let timeout_ms = patience_ms(timeout);
    let request = Request::Stop { target: uuid.clone(), force, timeout_ms };
    session.ask(request).await?.map_err(|refusal| refusal.to_string())?;
    session.say(&format!("Successfully completed stop for VM {uuid}"))
}

async fn reboot(session: &mut Session<'_, '_>, vm: Vm, force: bool, timeout: Option<u64>) -> Done {
    let uuid = &vm.uuid;
    if vm.state() != "running" {
        let (verb, end) = if force { ("reset", ".") } else { ("reboot", "") };
        let now = vm.state();
        return Err(Fault::Error(format!(
            "Cannot {verb} vm from state \"{now}\", must be \"running\"{end}"
        )));
    }
    let world = session.world().await?;
    known_tags(&vm.doc, &world).map_err(|why| format!("Cannot reboot vm: {why}"))?;
    let timeout_ms = patience_ms(timeout);
    let request = match force {
        true => Request::Reset { target: uuid.clone() },
        false => Request::Restart { target: uuid.clone(), timeout_ms },
    };
    session.ask(request).await?.map_err(|refusal| refusal.to_string())?;
    if !force {
        set_autoboot(session, uuid, true).await?;
    }
    session.say(&format!("Successfully completed reboot for VM {uuid}"))
}

async fn delete(session: &mut Session<'_, '_>, vm: Vm) -> Done {
    let uuid = &vm.uuid;
    if let Some(name) = validate::protected(&vm.doc) {
        let why = format!("Failed to delete VM {uuid}: {name} is set, cannot delete");
        return Err(Fault::Error(why));
    }
    if is_true(&vm.doc, "archive_on_delete") {
        let shown = view(&vm.detail, &session.place.zones, &session.place.settings)?;
        let text = serde_json::to_string_pretty(&shown).map_err(|e| e.to_string())?;
        (session.place.archive)(uuid, &text)
            .map_err(|e| format!("Failed to delete VM {uuid}: cannot archive it: {e}"))?;
    }
    let request = Request::Remove { target: uuid.clone(), force: true };
    let removed = session.ask(request).await?;
    removed.map_err(|refusal| format!("Failed to delete VM {uuid}: {refusal}"))?;
    session.say(&format!("Successfully deleted VM {uuid}"))
}

async fn tell(session: &mut Session<'_, '_>, vm: Vm, asked: &[String]) -> Done {
    let unable = |why: &str| format!("Unable to get VM info for VM {}: {why}", vm.uuid);
    let kinds = info::kinds(vm.brand, asked).map_err(|why| unable(&why))?;
    if !matches!(vm.state(), "running" | "stopping") {
        let now = vm.state();
        let why = format!(
            "Unable to get info for vm from state \"{now}\", must be \"running\" or \"stopping\"."
        );
        return Err(Fault::Error(unable(&why)));
    }
    let questions = info::questions(&kinds);
    let said = document(session, Request::Monitor { target: vm.uuid.clone(), questions }).await?;
    let said = said.map_err(|why| unable(&why))?;
    session.show(&info::shape(&kinds, &said, &vm.doc))
}

/// A document, or why there is none.
pub(super) async fn document(
    session: &mut Session<'_, '_>,
    request: Request,
) -> Result<Result<Value, String>, Fault> {
    Ok(match session.ask(request).await? {
        Ok(lodge_spec::request::Reply::Document { value }) => Ok(value),
        Ok(other) => Err(format!("unexpected reply {other:?}")),
        Err(refusal) => Err(refusal.to_string()),
    })
}

async fn sysrq(session: &mut Session<'_, '_>, vm: Vm, what: &str) -> Done {
    let target = vm.uuid.clone();
    if vm.brand == Brand::Bhyve && what == "screenshot" {
        return Err(Fault::Error("Invalid sysrq \"screenshot\" valid values: \"nmi\".".into()));
    }
    if !matches!(vm.state(), "running" | "stopping") {
        let now = vm.state();
        return Err(Fault::Error(format!(
            "Unable to send request to vm from state \"{now}\", must be \"running\" or \"stopping\"."
        )));
    }
    let (request, sent) = match what {
        "nmi" => (Request::Nmi { target }, "NMI"),
        _ => (Request::Screenshot { target }, "screenshot sysrq"),
    };
    session.ask(request).await?.map_err(|refusal| refusal.to_string())?;
    session.say(&format!("Sent {sent} to VM {}", vm.uuid))
}

async fn kill(session: &mut Session<'_, '_>, vm: Vm, name: &str) -> Done {
    let Some((name, signal)) = signals::find(name) else {
        return Err(Fault::Error(format!("Unknown signal \"{name}\"")));
    };
    let uuid = &vm.uuid;
    if !vm.now().is_live() {
        return Err(Fault::Error(format!("Cannot find running init PID for VM {uuid}")));
    }
    let request = Request::Signal { target: uuid.clone(), signal };
    session.ask(request).await?.map_err(|refusal| refusal.to_string())?;
    session.say(&format!("Sent signal \"{name}\" to init process for VM {uuid}"))
}

async fn update(
    session: &mut Session<'_, '_>,
    vm: Vm,
    operands: Vec<(String, String)>,
    source: &Source,
) -> Done {
    let payload = match operands.is_empty() {
        false => operands.into_iter().map(|(key, value)| (key, Value::from(value))).collect(),
        true => session.read(source, "update from")?,
    };
    let (uuid, brand) = (vm.uuid.clone(), vm.brand);
    let world = session.world().await?;
    let verdict = validate::check(Action::Update, brand, &payload, &world.images);
    validate::refuse(&verdict)?;
    let (cleaned, left_out) = validate::clean(Action::Update, brand, &payload);
    session.warn(&left_out, &cleaned)?;
    for nth in 0..TRIES {
        let vm = find(session, &uuid, |uuid| format!("VM {uuid} not found")).await?;
        let subject = Subject {
            doc: vm.doc.clone(),
            metadata: metadata_of(&vm.detail),
            state: vm.state().to_owned(),
            stopped: !vm.now().is_live(),
        };
        let first = |why: String| format!("first of 1 error: {why}");
        let (doc, metadata) = apply(brand, subject, cleaned.clone(), &world).map_err(first)?;
        let draft = draft::draft(&doc, &metadata, &world, &session.place.settings)?;
        match store(session, &vm, draft).await? {
            Ok(()) => return session.say(&format!("Successfully updated VM {uuid}")),
            Err(Refusal::Changed { .. }) => step_aside(nth).await,
            Err(refusal) => return Err(Fault::Error(refusal.to_string())),
        }
    }
    Err(Fault::Error(format!("VM {uuid} changes all the time")))
}

/// Whether a machine is to run again once something has been done to it.
pub(super) fn is_wanted(vm: &Vm) -> bool {
    vm.now().is_live() || is_true(&vm.doc, "autoboot")
}
