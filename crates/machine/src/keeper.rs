//! All machines of a host: finds them, creates them, hands requests to their tasks. Holds the
//! rules that concern more than one machine (names, ports); all others are in `life`.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use lodge_spec::draft::Draft;
use lodge_spec::extras::Mdata;
use lodge_spec::machine::Machine;
use lodge_spec::migration::Expected;
use lodge_spec::names::{MachineId, Name};
use lodge_spec::problem::nearest;
use lodge_spec::request::{Change, Condition, OneBoot, Page, Refusal};
use lodge_spec::resolve::{Defaults, resolve};
use lodge_spec::state::{Detail, Event, State, Summary};
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::change::apply;
use crate::host::Host;
use crate::life::{Life, Verb};
use crate::record::Record;
use crate::roster::{Handle, Roster};
use crate::store::{self, Row, Store, StoreError, now_us};
use crate::task::{Message, Published, STOP_TIMEOUT, Task};
use crate::wait;

/// A hypervisor that does not answer for so long is waited for later.
const TAKE_UP: Duration = Duration::from_secs(5);

/// A row that could not be read. Nothing runs for it.
#[derive(Clone, Debug)]
pub struct Broken {
    pub row: Row,
    pub reason: String,
}

/// What a target turned out to be.
pub enum Found {
    Machine(Arc<Record>),
    Broken(Broken),
}

pub struct Keeper<H> {
    host: Arc<H>,
    store: Store,
    machines: RwLock<Roster>,
    broken: RwLock<BTreeMap<String, Broken>>,
    /// Identities and names that are being written; nobody else may take them meanwhile.
    creating: Mutex<HashSet<(MachineId, Name)>>,
    events: broadcast::Sender<Event>,
    /// Machines that will come from other hosts.
    pub(crate) expected: Mutex<Vec<Expected>>,
}

/// An identity and a name that are being written.
struct Claim<'a> {
    creating: &'a Mutex<HashSet<(MachineId, Name)>>,
    key: (MachineId, Name),
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.creating.lock().expect("not poisoned").remove(&self.key);
    }
}

impl<H: Host> Keeper<H> {
    /// Reads the store and takes up every machine where it was left. `fresh_boot`: the host has
    /// booted since, so machines with `autostart` are started.
    pub async fn open(
        store: Store,
        host: Arc<H>,
        fresh_boot: bool,
    ) -> Result<Arc<Self>, StoreError> {
        let keeper = Arc::new(Self {
            host,
            store: store.clone(),
            machines: RwLock::default(),
            broken: RwLock::default(),
            creating: Mutex::default(),
            events: broadcast::channel(1024).0,
            expected: Mutex::default(),
        });
        let mut taken_up = Vec::new();
        for row in store.machines().await? {
            let id: Result<MachineId, _> = row.id.parse();
            let record = id.map_err(|e| e.to_string());
            match record.and_then(|id| Record::from_text(id, &row.record)) {
                Ok(record) => {
                    let (sender, receiver) = oneshot::channel();
                    taken_up.push(receiver);
                    let start = fresh_boot && record.machine.autostart;
                    let handle = keeper.clone().spawn(record, Some(sender));
                    if start {
                        let (answer, _) = oneshot::channel();
                        let stop_timeout = STOP_TIMEOUT;
                        let (verb, this_time) = (Verb::Start, None);
                        let ask = Message::Ask { verb, this_time, stop_timeout, answer };
                        let _ = handle.inbox.send(Box::new(ask));
                    }
                }
                Err(reason) => {
                    let broken = Broken { row, reason };
                    keeper
                        .broken
                        .write()
                        .expect("not poisoned")
                        .insert(broken.row.id.clone(), broken);
                }
            }
        }
        // What is said from the first moment on is what the hypervisors say.
        let all = async {
            for receiver in taken_up {
                let _ = receiver.await;
            }
        };
        let _ = tokio::time::timeout(TAKE_UP, all).await;
        Ok(keeper)
    }

    pub fn host(&self) -> &Arc<H> {
        &self.host
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Events from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    fn spawn(self: Arc<Self>, record: Record, taken_up: Option<oneshot::Sender<()>>) -> Handle {
        let id = record.machine.id;
        let record = Arc::new(record);
        let published = Published { record: record.clone(), forgotten: false };
        let (publish, watch) = watch::channel(published);
        let (own, inbox) = mpsc::unbounded_channel();
        let handle = Handle { inbox: own.clone(), published: watch };
        self.machines.write().expect("not poisoned").insert(id, handle.clone());
        let task = Task {
            host: self.host.clone(),
            store: self.store.clone(),
            record,
            publish,
            events: self.events.clone(),
            inbox,
            own,
            reports: None,
            stop_timeout: STOP_TIMEOUT,
            this_time: None,
            suspends: None,
            migrates: None,
            wrote_us: 0,
            told: 0,
            timers: 0,
            taken_up,
            leave: Box::new(move || self.machines.write().expect("not poisoned").remove(id)),
        };
        tokio::spawn(task.run());
        handle
    }

    /// Checks, writes and takes up a new machine.
    pub async fn create(self: &Arc<Self>, draft: Draft) -> Result<Summary, Refusal> {
        let (machine, now) = (self.resolve_new(draft)?, now_us());
        let (created_us, modified_us, life) = (now, now, Life::new());
        let (running, bootstrap) = (None, None);
        let record = Record { created_us, modified_us, machine, life, running, bootstrap };
        self.take_in(record, "created").await
    }

    /// Checks, writes and takes up a machine that was not here before. `kind`: of the event.
    pub(crate) async fn take_in(
        self: &Arc<Self>,
        record: Record,
        kind: &str,
    ) -> Result<Summary, Refusal> {
        let machine = &record.machine;
        let invalid = |p: lodge_spec::Problems| Refusal::Invalid { problems: p.0 };
        let checked = self.host.check(machine, false).await.map_err(invalid);
        let _claim = match checked.and_then(|()| self.claim(machine)) {
            Ok(claim) => claim,
            Err(refusal) => {
                self.give_back(machine.id).await;
                return Err(refusal);
            }
        };
        self.host.settle(machine).await.map_err(Refusal::failed)?;
        let row = Row {
            id: record.machine.id.to_string(),
            name: record.machine.name.to_string(),
            record: record.to_text(),
        };
        let event = Event {
            seq: 0,
            at_us: record.created_us,
            id: record.machine.id,
            name: row.name.clone(),
            kind: kind.into(),
            detail: String::new(),
        };
        let written = self.store.write(move |c| {
            store::put_machine(c, &row)?;
            store::put_event(c, event)
        });
        let event = match written.await {
            Ok(event) => event,
            Err(error) => {
                self.host.forget(record.machine.id).await;
                return Err(Refusal::failed(error));
            }
        };
        let _ = self.events.send(event);
        Ok(summary(&self.clone().spawn(record, None).record()))
    }

    /// What was taken for a machine that did not come to be.
    async fn give_back(&self, id: MachineId) {
        if !self.known().contains(&id) {
            let key = id.to_string();
            // At worst an address stays taken until the next attempt with the same identity.
            let _ = self.store.write(move |c| store::release_leases(c, &key, &[])).await;
        }
    }

    /// The machine that a draft would become, not yet checked against the host.
    pub fn resolve_new(&self, draft: Draft) -> Result<Machine, Refusal> {
        let id = MachineId(uuid::Uuid::new_v4());
        resolve(draft, Defaults { id }).map_err(|p| Refusal::Invalid { problems: p.0 })
    }

    /// Takes a machine's identity and name, until the claim is dropped or the machine is there.
    fn claim(&self, machine: &Machine) -> Result<Claim<'_>, Refusal> {
        let taken = |what: &str, value: String, holder: String| {
            Err(Refusal::Taken { what: what.into(), value, holder })
        };
        // Held throughout, so that two who want the same do not both find it free.
        let mut creating = self.creating.lock().expect("not poisoned");
        let another = || "a machine that is being created".to_owned();
        if creating.iter().any(|(id, _)| *id == machine.id) {
            return taken("the identity", machine.id.to_string(), another());
        }
        if creating.iter().any(|(_, name)| *name == machine.name) {
            return taken("the name", machine.name.to_string(), another());
        }
        let machines = self.machines.read().expect("not poisoned");
        if let Some(handle) = machines.get(machine.id) {
            let holder = format!("machine {}", handle.record().machine.name);
            return taken("the identity", machine.id.to_string(), holder);
        }
        if let Some(handle) = machines.named(machine.name.as_str()) {
            let holder = format!("machine {}", handle.record().machine.id);
            return taken("the name", machine.name.to_string(), holder);
        }
        let broken = self.broken.read().expect("not poisoned");
        match broken.values().find(|b| b.row.name == machine.name.as_str()) {
            Some(b) => taken("the name", b.row.name.clone(), "a broken record".into()),
            None => {
                let key = (machine.id, machine.name.clone());
                creating.insert(key.clone());
                Ok(Claim { creating: &self.creating, key })
            }
        }
    }

    pub(crate) fn records(&self) -> Vec<Arc<Record>> {
        self.machines.read().expect("not poisoned").iter().map(|(_, h)| h.record()).collect()
    }

    /// Resolves a name, a UUID or the start of one.
    pub fn find(&self, target: &str) -> Result<Found, Refusal> {
        match self.handle(target) {
            Ok(handle) => Ok(Found::Machine(handle.record())),
            Err(refusal) => {
                let broken = self.broken.read().expect("not poisoned");
                let found = broken.values().find(|b| b.row.id == target || b.row.name == target);
                found.cloned().map(Found::Broken).ok_or(refusal)
            }
        }
    }

    pub(crate) fn handle(&self, target: &str) -> Result<Handle, Refusal> {
        let machines = self.machines.read().expect("not poisoned");
        // What is asked most is found without looking at every machine's identity as text.
        let by_id = target.parse().ok().and_then(|id| machines.get(id));
        if let Some(handle) = by_id.or_else(|| machines.named(target)) {
            return Ok(handle.clone());
        }
        let named: Vec<(String, String, &Handle)> = machines
            .iter()
            .map(|(id, h)| (id.to_string(), h.record().machine.name.to_string(), h))
            .collect();
        let begins = |id: &str| target.len() >= 4 && id.starts_with(target);
        let candidates: Vec<_> = named.iter().filter(|(id, _, _)| begins(id)).collect();
        match candidates.as_slice() {
            [(_, _, handle)] => Ok((*handle).clone()),
            [] => {
                let near = nearest(target, named.iter().map(|(_, name, _)| name.as_str()));
                Err(Refusal::NotFound { target: target.into(), near: near.map(str::to_owned) })
            }
            many => Err(Refusal::Ambiguous {
                target: target.into(),
                candidates: many.iter().map(|(_, name, _)| name.clone()).collect(),
            }),
        }
    }

    /// Asks a machine to do something and waits until it has come to rest.
    pub async fn ask(
        &self,
        target: &str,
        verb: Verb,
        stop_timeout: Option<Duration>,
    ) -> Result<Summary, Refusal> {
        match self.handle(target) {
            Ok(handle) => self.ask_one(handle, verb, stop_timeout, None).await,
            Err(refusal) => self.ask_broken(target, verb, refusal).await,
        }
    }

    /// Starts a machine with what is different this time.
    pub async fn boot(&self, target: &str, with: OneBoot) -> Result<Summary, Refusal> {
        let handle = self.handle(target)?;
        let id = handle.record().machine.id;
        let mut draft = handle.record().machine.to_draft();
        let OneBoot { order, once, disks } = with;
        let boot = draft.boot.get_or_insert_default();
        boot.order = order.or_else(|| boot.order.take());
        boot.once = once.or_else(|| boot.once.take());
        let own = draft.disks.get_or_insert_default();
        if boot.once.is_some() || disks.iter().any(|disk| disk.first == Some(true)) {
            // What is tried first this time is said by this time.
            own.iter_mut().for_each(|disk| disk.first = None);
        }
        own.extend(disks);
        let invalid = |p: lodge_spec::Problems| Refusal::Invalid { problems: p.0 };
        let machine = resolve(draft, Defaults { id }).map_err(invalid)?;
        self.host.check(&machine, true).await.map_err(invalid)?;
        self.ask_one(handle, Verb::Start, None, Some(Box::new(machine))).await
    }

    async fn ask_one(
        &self,
        mut handle: Handle,
        verb: Verb,
        stop_timeout: Option<Duration>,
        this_time: Option<Box<Machine>>,
    ) -> Result<Summary, Refusal> {
        if matches!(verb, Verb::Start) {
            self.check_ports(&handle.record().machine)?;
        }
        let (answer, answered) = oneshot::channel();
        let stop_timeout = stop_timeout.unwrap_or(STOP_TIMEOUT);
        let closed = || Refusal::failed("the machine has just been removed");
        let ask = Box::new(Message::Ask { verb, this_time, stop_timeout, answer });
        handle.inbox.send(ask).map_err(|_| closed())?;
        answered.await.map_err(|_| closed())??;
        let published = handle.published.wait_for(|p| wait::settled(verb, p).is_some()).await;
        let published = published.map_err(|_| closed())?.clone();
        wait::settled(verb, &published).expect("waited for it")?;
        Ok(summary(&published.record))
    }

    async fn ask_broken(
        &self,
        target: &str,
        verb: Verb,
        refusal: Refusal,
    ) -> Result<Summary, Refusal> {
        let broken = match self.find(target) {
            Ok(Found::Broken(broken)) => broken,
            Ok(Found::Machine(_)) | Err(_) => return Err(refusal),
        };
        let Verb::Remove { .. } = verb else {
            let (verb, name) = (verb.as_str().to_owned(), broken.row.name);
            return Err(Refusal::State { verb, name, state: State::Broken });
        };
        if let Ok(id) = broken.row.id.parse() {
            self.host.forget(id).await;
        }
        let key = broken.row.id.clone();
        let deleted = self.store.write(move |c| store::delete_machine(c, &key));
        deleted.await.map_err(Refusal::failed)?;
        self.broken.write().expect("not poisoned").remove(&broken.row.id);
        Ok(summary_of_broken(&broken))
    }

    /// Two machines that live do not share a host port.
    fn check_ports(&self, machine: &Machine) -> Result<(), Refusal> {
        for other in self.records() {
            if other.machine.id == machine.id || !other.life.state.is_live() {
                continue;
            }
            for port in &machine.ports {
                let clash = |o: &&lodge_spec::machine::Port| {
                    let same_ip =
                        o.ip == port.ip || o.ip.is_unspecified() || port.ip.is_unspecified();
                    o.host == port.host && o.protocol == port.protocol && same_ip
                };
                if other.machine.ports.iter().any(|o| clash(&o)) {
                    return Err(Refusal::Taken {
                        what: "host port".into(),
                        value: format!("{}:{}/{}", port.ip, port.host, port.protocol),
                        holder: format!("machine {}", other.machine.name),
                    });
                }
            }
        }
        Ok(())
    }

    /// Changes a machine's description, and the machine where it lives.
    pub async fn update(&self, target: &str, change: Change) -> Result<Summary, Refusal> {
        let handle = self.handle(target)?;
        let record = handle.record();
        let mut draft = record.machine.to_draft();
        apply(&mut draft, &change)?;
        let invalid = |p: lodge_spec::Problems| Refusal::Invalid { problems: p.0 };
        let machine = resolve(draft, Defaults { id: record.machine.id }).map_err(invalid)?;
        self.host.check(&machine, false).await.map_err(invalid)?;
        let (answer, answered) = oneshot::channel();
        let closed = |_| Refusal::failed("the machine has just been removed");
        let (change, machine) = (Box::new(change), Box::new(machine));
        let message = Message::Change { change, machine, answer };
        handle.inbox.send(Box::new(message)).map_err(|_| closed(()))?;
        answered.await.map_err(|_| closed(()))??;
        Ok(summary(&handle.record()))
    }

    /// Replaces a machine's description; its name and identity stay.
    pub async fn redefine(
        &self,
        target: &str,
        draft: Draft,
        unchanged_since_us: Option<i64>,
    ) -> Result<Summary, Refusal> {
        let handle = self.handle(target)?;
        let record = handle.record();
        let (name, id) = (record.machine.name.to_string(), record.machine.id);
        let draft = Draft { name: Some(name), uuid: Some(id.to_string()), ..draft };
        let invalid = |p: lodge_spec::Problems| Refusal::Invalid { problems: p.0 };
        let machine = Box::new(resolve(draft, Defaults { id }).map_err(invalid)?);
        self.host.check(&machine, false).await.map_err(invalid)?;
        let (answer, answered) = oneshot::channel();
        let closed = |_| Refusal::failed("the machine has just been removed");
        let message = Message::Redefine { machine, unchanged_since_us, answer };
        handle.inbox.send(Box::new(message)).map_err(|_| closed(()))?;
        answered.await.map_err(|_| closed(()))??;
        Ok(summary(&handle.record()))
    }

    /// Waits for a condition, or says why it will not come.
    pub async fn wait(
        &self,
        target: &str,
        until: Condition,
        timeout: Option<Duration>,
    ) -> Result<Summary, Refusal> {
        let mut handle = self.handle(target)?;
        let name = handle.record().machine.name.to_string();
        let waiting = handle.published.wait_for(|p| wait::holds(until, p).is_some());
        let published = match timeout {
            None => waiting.await.map(|p| p.clone()),
            Some(limit) => match tokio::time::timeout(limit, waiting).await {
                Ok(published) => published.map(|p| p.clone()),
                Err(_) => {
                    let what = match until {
                        Condition::Running => "running",
                        Condition::Ready => "ready",
                        Condition::Stopped => "stopped",
                        Condition::Bootstrap => "set up",
                    };
                    let seconds = limit.as_secs();
                    return Err(Refusal::Timeout { name, what: what.into(), seconds });
                }
            },
        };
        let published = published.unwrap_or_else(|_| handle.published.borrow().clone());
        wait::holds(until, &published).unwrap_or(Ok(()))?;
        Ok(summary(&published.record))
    }

    /// All machines by name; without `all` only those that live.
    pub fn list(&self, all: bool) -> Vec<Summary> {
        let mut list: Vec<Summary> = self.records().iter().map(|r| summary(r)).collect();
        let broken = self.broken.read().expect("not poisoned");
        list.extend(broken.values().map(summary_of_broken));
        list.retain(|s| all || s.state.is_live() || s.state == State::Broken);
        list.sort_by(|a, b| a.name.cmp(&b.name));
        list
    }

    /// The machines that a page asks for, how many there are on all pages, and whether more follow.
    pub fn page(&self, page: &Page) -> (Vec<Detail>, usize, bool) {
        let Page { door, owner, states, after, limit } = page;
        let asked = |record: &Arc<Record>| {
            let origin = record.machine.origin.as_ref();
            origin.is_some_and(|o| {
                o.door == *door && owner.as_ref().is_none_or(|owner| o.owner == *owner)
            }) && (states.is_empty() || states.contains(&record.life.state))
        };
        let mut found = self.records();
        found.retain(asked);
        let total = found.len();
        let key = |record: &Arc<Record>| (record.created_us, record.machine.id);
        found.retain(|record| after.is_none_or(|after| key(record) < after));
        let more = found.len() > *limit;
        if more && *limit > 0 {
            // Only the page itself is put in order.
            found.select_nth_unstable_by_key(*limit - 1, |r| std::cmp::Reverse(key(r)));
            found.truncate(*limit);
        }
        found.sort_unstable_by_key(|r| std::cmp::Reverse(key(r)));
        (found.iter().map(|r| detail(r)).collect(), total, more)
    }

    /// The identities of all machines, broken ones included.
    pub fn known(&self) -> Vec<MachineId> {
        let mut ids: Vec<MachineId> =
            self.machines.read().expect("not poisoned").iter().map(|(id, _)| id).collect();
        let broken = self.broken.read().expect("not poisoned");
        ids.extend(broken.keys().filter_map(|id| id.parse::<MachineId>().ok()));
        ids
    }
}

/// What `ls` shows of a machine.
pub fn summary(record: &Record) -> Summary {
    let Record { created_us, machine, life, running, .. } = record;
    Summary {
        id: machine.id,
        name: machine.name.clone(),
        state: life.state,
        reason: life.reason.clone(),
        backend: running.as_ref().map(|r| r.backend),
        accel: running.as_ref().map(|r| r.accel),
        cpus: machine.cpus.count,
        memory_bytes: machine.memory.size.0,
        ready: life.ready,
        address: running.as_ref().and_then(|r| r.address.clone()),
        created_at: rfc3339(*created_us),
    }
}

/// What doors of other systems are told of a machine.
pub fn detail(record: &Record) -> Detail {
    let running = record.running.as_ref().filter(|_| record.life.state.is_live());
    Detail {
        summary: summary(record),
        created_us: record.created_us,
        modified_us: record.modified_us,
        since_us: running.map_or(0, |r| r.since_us),
        pid: running.map_or(0, |r| r.pid),
        origin: record.machine.origin.clone(),
        mdata: record.machine.mdata.as_deref().map(Mdata::told),
        bootstrap: record.bootstrap.clone(),
    }
}

fn summary_of_broken(broken: &Broken) -> Summary {
    let fallback = || "broken".parse().expect("a name");
    Summary {
        id: broken.row.id.parse().unwrap_or(MachineId(Default::default())),
        name: broken.row.name.parse().unwrap_or_else(|_| fallback()),
        state: State::Broken,
        reason: Some(broken.reason.clone()),
        backend: None,
        accel: None,
        cpus: 0,
        memory_bytes: 0,
        ready: false,
        address: None,
        created_at: rfc3339(0),
    }
}

/// UTC, to the second.
pub fn rfc3339(us: i64) -> String {
    let at = std::time::UNIX_EPOCH + Duration::from_micros(us.max(0).unsigned_abs());
    humantime::format_rfc3339_seconds(at).to_string()
}
