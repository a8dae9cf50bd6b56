//! The one task that owns a machine's effects. Everyone else sends it messages and reads what it
//! publishes. Each change is written to the store before its effects begin.

use std::sync::Arc;
use std::time::Duration;

use lodge_spec::draft::Scalar;
use lodge_spec::machine::{Boot, Machine};
use lodge_spec::migration::{self, Migration, Passport};
use lodge_spec::request::{Change, Refusal};
use lodge_spec::state::{Bootstrap, Event, State};
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::host::{Command, Found, Host, Leaving, Mark, Report, Running, Sink, Wrote};
use crate::life::{self, Action, Denied, Life, Policy, Seen, Verb};
use crate::record::Record;
use crate::store::{self, Row, Store, StoreError, now_us};

/// How long a guest that was asked to end may take where nobody said.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// What a guest writes into its metadata is an event at most this often.
const WROTE_PACE_US: i64 = 2_000_000;
/// Events of one run of a hypervisor that its guest can bring about by telling of its setting up.
const TOLD: u32 = 1000;

/// What everyone may know about a machine at any moment.
#[derive(Clone, Debug)]
pub(crate) struct Published {
    pub(crate) record: Arc<Record>,
    /// The machine is gone; its task has ended.
    pub(crate) forgotten: bool,
}

pub(crate) enum Message {
    Ask {
        verb: Verb,
        /// For a start: the machine as it is to be this time.
        this_time: Option<Box<Machine>>,
        stop_timeout: Duration,
        answer: oneshot::Sender<Result<(), Refusal>>,
    },
    /// A change and the whole description after it.
    Change {
        change: Box<Change>,
        machine: Box<Machine>,
        answer: oneshot::Sender<Result<(), Refusal>>,
    },
    /// The whole description anew, if nothing else has changed since.
    Redefine {
        machine: Box<Machine>,
        unchanged_since_us: Option<i64>,
        answer: oneshot::Sender<Result<(), Refusal>>,
    },
    /// Moves the machine to another host.
    Migrate {
        to: String,
        answer: oneshot::Sender<Result<(), Refusal>>,
    },
    LaunchDone(Result<Running, String>),
    SaveDone(Result<(), String>),
    MigrateDone(Result<(), String>),
    /// A timer of the given generation has run out.
    Timer(u64, Seen),
}

pub(crate) struct Task<H> {
    pub(crate) host: Arc<H>,
    pub(crate) store: Store,
    /// What is published is this very record; it is copied only when it changes.
    pub(crate) record: Arc<Record>,
    pub(crate) publish: watch::Sender<Published>,
    pub(crate) events: broadcast::Sender<Event>,
    /// Boxed: a channel keeps room for many, and most machines are never sent any.
    pub(crate) inbox: mpsc::UnboundedReceiver<Box<Message>>,
    pub(crate) own: mpsc::UnboundedSender<Box<Message>>,
    /// Only where a hypervisor may report.
    pub(crate) reports: Option<mpsc::UnboundedReceiver<Report>>,
    pub(crate) stop_timeout: Duration,
    /// The machine as it is to be at the start that comes next.
    pub(crate) this_time: Option<Box<Machine>>,
    /// Who waits for the memory to be saved.
    pub(crate) suspends: Option<oneshot::Sender<Result<(), Refusal>>>,
    /// Who waits for the machine to have moved. Meanwhile it can only be ended.
    pub(crate) migrates: Option<(String, oneshot::Sender<Result<(), Refusal>>)>,
    /// When an event last said that the guest had written.
    pub(crate) wrote_us: i64,
    /// How many events there may still be of what this guest tells of its setting up.
    pub(crate) told: u32,
    /// Timers of earlier generations are void.
    pub(crate) timers: u64,
    /// Dropped once what is published is what is.
    pub(crate) taken_up: Option<oneshot::Sender<()>>,
    /// Takes the machine off the list of machines: before anybody is told that it is gone, so that
    /// who was told does not find it.
    pub(crate) leave: Box<dyn Fn() + Send>,
}

impl<H: Host> Task<H> {
    /// Runs until the machine is forgotten. A machine that lived before is adopted first.
    pub(crate) async fn run(mut self) {
        if self.record.life.state.is_live() {
            if Box::pin(self.adopt()).await {
                return;
            }
        } else if self.record.life.restart_due {
            self.arm(Duration::ZERO, Seen::RestartDue);
        }
        drop(self.taken_up.take());
        loop {
            // Boxed: a task that waits holds nothing of what it does when it is woken.
            let gone = tokio::select! {
                Some(message) = self.inbox.recv() => Box::pin(self.handle(*message)).await,
                Some(report) = next(&mut self.reports) => match report {
                    Report::Seen(seen) => Box::pin(self.saw(seen)).await,
                    Report::Mark(mark) => {
                        Box::pin(self.note(*mark)).await;
                        false
                    }
                    Report::Wrote(wrote) => {
                        Box::pin(self.wrote(*wrote)).await;
                        false
                    }
                    Report::Bootstrap(told) => {
                        Box::pin(self.set_up(*told)).await;
                        false
                    }
                },
                else => true,
            };
            if gone {
                return;
            }
        }
    }

    /// Where the hypervisor that is to come reports; what one before still says is not heard.
    fn listen(&mut self) -> Sink {
        let (sink, reports) = mpsc::unbounded_channel();
        self.reports = Some(reports);
        self.told = TOLD;
        sink
    }

    fn machine(&self) -> Arc<Machine> {
        Arc::new(self.record.machine.clone())
    }

    /// Takes up a hypervisor that an earlier daemon started. True once the machine is forgotten.
    async fn adopt(&mut self) -> bool {
        let sink = self.listen();
        let seen = match self.host.adopt(self.machine(), sink).await {
            Found::Alive { paused, ready } => Seen::Adopted { paused, ready },
            Found::Ended(how) => Seen::Exited(how),
        };
        self.saw(seen).await
    }

    /// True once the machine is forgotten.
    async fn handle(&mut self, message: Message) -> bool {
        match message {
            Message::Ask { verb, this_time, stop_timeout, answer } => {
                self.stop_timeout = stop_timeout;
                let state = self.record.life.state;
                let ends = matches!(verb, Verb::Stop { force: true } | Verb::Remove { .. });
                if let (false, Err(refusal)) = (ends, self.stays()) {
                    let _ = answer.send(Err(refusal));
                    return false;
                }
                if state == State::Suspended && this_time.is_some() {
                    // What is saved goes on as what it was.
                    let _ = answer.send(Err(self.denied(verb.as_str(), state)));
                    return false;
                }
                if !self.record.life.state.is_live() {
                    self.this_time = this_time;
                }
                let (result, gone) = match life::ask(&self.record.life, verb) {
                    Ok((next, actions)) => {
                        let event = (verb.as_str().to_owned(), String::new());
                        self.take(next, actions, Some(event)).await
                    }
                    Err(Denied { verb, state }) => (Err(self.denied(verb.as_str(), state)), false),
                };
                if verb == Verb::Suspend && result.is_ok() && self.record.life.state.is_live() {
                    // Whether it can be done is known when it is done.
                    self.suspends = Some(answer);
                    return gone;
                }
                // Whoever asked may have gone away; what was asked is done all the same.
                let _ = answer.send(result);
                gone
            }
            Message::SaveDone(done) => {
                let result = done.clone().map_err(Refusal::failed);
                let seen = done.map_or_else(Seen::SaveFailed, |()| Seen::Saved);
                let gone = self.saw(seen).await;
                if let Some(answer) = self.suspends.take() {
                    let _ = answer.send(result);
                }
                gone
            }
            Message::Change { change, machine, answer } => {
                let _ = answer.send(self.change(*change, *machine).await);
                false
            }
            Message::Redefine { machine, unchanged_since_us, answer } => {
                let _ = answer.send(self.redefine(*machine, unchanged_since_us).await);
                false
            }
            Message::Migrate { to, answer } => {
                match self.migrate(&to).await {
                    Ok(()) => self.migrates = Some((to, answer)),
                    Err(refusal) => drop(answer.send(Err(refusal))),
                }
                false
            }
            Message::MigrateDone(done) => self.migrated(done).await,
            Message::LaunchDone(done) => match done {
                Ok(running) => {
                    let record = Arc::make_mut(&mut self.record);
                    if let Boot::Firmware { once, .. } = &mut record.machine.boot {
                        // It was for this boot only.
                        *once = None;
                    }
                    record.running = Some(running);
                    self.saw(Seen::Launched).await
                }
                Err(reason) => self.saw(Seen::LaunchFailed(reason)).await,
            },
            Message::Timer(generation, seen) if generation == self.timers => self.saw(seen).await,
            Message::Timer(_, _) => false,
        }
    }

    /// That it is not about to leave for another host.
    fn stays(&self) -> Result<(), Refusal> {
        let name = &self.record.machine.name;
        match &self.migrates {
            None => Ok(()),
            Some((to, _)) => Err(Refusal::failed(format!(
                "{name} is on its way to {to}; until it has moved it can only be ended, by force"
            ))),
        }
    }

    async fn migrate(&mut self, to: &str) -> Result<(), Refusal> {
        self.stays()?;
        let Record { machine, life, bootstrap, .. } = &*self.record;
        if life.state != State::Running {
            return Err(self.denied("migrate", life.state));
        }
        let migration = Migration {
            version: migration::VERSION,
            draft: machine.to_draft(),
            ready: life.ready,
            bootstrap: bootstrap.clone(),
            passport: Passport::default(),
        };
        let leaving = Leaving { to: to.to_owned(), migration };
        let (host, own, machine) = (self.host.clone(), self.own.clone(), self.machine());
        tokio::spawn(async move {
            let result = host.depart(machine, leaving).await;
            let _ = own.send(Box::new(Message::MigrateDone(result)));
        });
        self.note(Mark { kind: "migrate".into(), detail: to.to_owned(), at_us: None }).await;
        Ok(())
    }

    /// True once the machine is forgotten.
    async fn migrated(&mut self, done: Result<(), String>) -> bool {
        let Some((to, answer)) = self.migrates.take() else { return false };
        let (result, gone) = match done {
            Ok(()) => match life::ask(&self.record.life, Verb::Remove { force: true }) {
                Ok((next, actions)) => {
                    self.take(next, actions, Some(("migrated".into(), to))).await
                }
                Err(Denied { verb, state }) => (Err(self.denied(verb.as_str(), state)), false),
            },
            Err(why) => {
                let (kind, detail) = ("migrate-failed".to_owned(), why.clone());
                self.note(Mark { kind, detail, at_us: None }).await;
                (Err(Refusal::failed(why)), false)
            }
        };
        let _ = answer.send(result);
        gone
    }

    fn denied(&self, verb: &str, state: State) -> Refusal {
        let name = self.record.machine.name.to_string();
        Refusal::State { verb: verb.to_owned(), name, state }
    }

    async fn saw(&mut self, seen: Seen) -> bool {
        let policy = Policy {
            restart: self.record.machine.restart,
            ephemeral: self.record.machine.ephemeral,
        };
        let event = describe(&seen);
        let (next, actions) = life::saw(&self.record.life, policy, seen);
        let (result, gone) = self.take(next, actions, Some(event)).await;
        if let Err(refusal) = result {
            let detail = refusal.to_string();
            self.note(Mark { kind: "error".into(), detail, at_us: None }).await;
        }
        gone
    }

    /// Writes the next life down, publishes it, then acts.
    async fn take(
        &mut self,
        next: Life,
        actions: Vec<Action>,
        event: Option<(String, String)>,
    ) -> (Result<(), Refusal>, bool) {
        if next.state != self.record.life.state || actions.contains(&Action::Launch) {
            // Whatever was timed belongs to the state that ends here.
            self.timers += 1;
        }
        let before = std::mem::replace(&mut Arc::make_mut(&mut self.record).life, next);
        if let Err(error) = self.persist(event.into_iter().collect()).await {
            Arc::make_mut(&mut self.record).life = before;
            return (Err(Refusal::failed(error)), false);
        }
        self.publish(false);
        let mut result = Ok(());
        for action in actions {
            if action == Action::Forget {
                let result = self.forget().await;
                return (result.map_err(Refusal::failed), true);
            }
            if let Err(reason) = self.act(action).await
                && result.is_ok()
            {
                result = Err(Refusal::Failed { message: reason });
            }
        }
        (result, false)
    }

    async fn act(&mut self, action: Action) -> Result<(), String> {
        let id = self.record.machine.id;
        let command = match action {
            Action::Launch => {
                let (host, own) = (self.host.clone(), self.own.clone());
                let machine = match self.this_time.take() {
                    Some(machine) => Arc::new(*machine),
                    None => self.machine(),
                };
                let (sink, resume) = (self.listen(), self.record.life.saved.is_some());
                tokio::spawn(async move {
                    let result = host.launch(machine, resume, sink).await;
                    let _ = own.send(Box::new(Message::LaunchDone(result)));
                });
                return Ok(());
            }
            Action::Save => {
                let (host, own, machine) = (self.host.clone(), self.own.clone(), self.machine());
                tokio::spawn(async move {
                    let result = host.save(machine).await;
                    let _ = own.send(Box::new(Message::SaveDone(result)));
                });
                return Ok(());
            }
            Action::Discard => {
                self.host.discard(id).await;
                return Ok(());
            }
            Action::Release => {
                self.host.release(self.machine()).await;
                return Ok(());
            }
            Action::ArmStopTimer => {
                self.arm(self.stop_timeout, Seen::StopTimedOut);
                return Ok(());
            }
            Action::ArmRestartTimer(nth) => {
                let wait = Duration::from_millis(250 << nth.min(8));
                self.arm(wait, Seen::RestartDue);
                return Ok(());
            }
            Action::Forget => return Ok(()),
            Action::Powerdown => Command::Powerdown,
            Action::Quit => Command::Quit,
            Action::Pause => Command::Pause,
            Action::Resume => Command::Resume,
            Action::Reset => Command::Reset,
        };
        self.host.command(id, command).await
    }

    async fn change(&mut self, change: Change, machine: Machine) -> Result<(), Refusal> {
        self.stays()?;
        let state = self.record.life.state;
        if state == State::Suspended && change.concerns_hardware() {
            return Err(self.denied("change", state));
        }
        if self.record.life.state.is_live() {
            let machine = Arc::new(machine.clone());
            self.host.change(machine, change.clone()).await.map_err(Refusal::failed)?;
        }
        Arc::make_mut(&mut self.record).machine = machine;
        let detail = serde_json::to_string(&change).unwrap_or_default();
        self.persist(vec![("changed".into(), detail)]).await.map_err(Refusal::failed)?;
        self.publish(false);
        Ok(())
    }

    async fn redefine(
        &mut self,
        machine: Machine,
        unchanged_since_us: Option<i64>,
    ) -> Result<(), Refusal> {
        self.stays()?;
        if unchanged_since_us.is_some_and(|us| us != self.record.modified_us) {
            return Err(Refusal::Changed { name: self.record.machine.name.to_string() });
        }
        let before = self.record.clone();
        Arc::make_mut(&mut self.record).machine = machine;
        if let Err(error) = self.persist_redefined().await {
            self.record = before;
            return Err(Refusal::failed(error));
        }
        self.publish(false);
        let done = match self.record.life.state {
            State::Running | State::Paused => self.host.refresh(self.machine()).await,
            State::Starting | State::Stopping => Ok(()),
            State::Created | State::Stopped | State::Suspended | State::Failed | State::Broken => {
                self.host.settle(&self.record.machine).await
            }
        };
        done.map_err(Refusal::failed)
    }

    /// The guest has written into its metadata; what is kept is what it is told from now on.
    async fn wrote(&mut self, wrote: Wrote) {
        let Wrote { internal, key, value } = wrote;
        let Some(mdata) = &mut Arc::make_mut(&mut self.record).machine.mdata else { return };
        let map = if internal { &mut mdata.internal } else { &mut mdata.customer };
        match value {
            Some(value) => drop(map.insert(key.clone(), Scalar::Text(value))),
            None => drop(map.remove(&key)),
        }
        // A guest that writes all the time does not fill the log.
        let due = self.wrote_us + WROTE_PACE_US < now_us();
        if due {
            self.wrote_us = now_us();
        }
        let events = if due { vec![("metadata".into(), key)] } else { Vec::new() };
        if let Err(error) = self.persist(events).await {
            let detail = error.to_string();
            return self.note(Mark { kind: "error".into(), detail, at_us: None }).await;
        }
        self.publish(false);
        // Fails only where the hypervisor is just ending.
        let _ = self.host.refresh(self.machine()).await;
    }

    /// The guest has told how far its setting up has come.
    async fn set_up(&mut self, told: Bootstrap) {
        let known = self.record.bootstrap.as_ref();
        if known == Some(&told) {
            return;
        }
        let Bootstrap { stage, runs, limit, exit, .. } = &told;
        let exit = exit.map(|exit| format!(", exit status {exit}")).unwrap_or_default();
        let detail = format!("run {runs} of {limit} {stage}{exit}");
        Arc::make_mut(&mut self.record).bootstrap = Some(told);
        // A guest that tells without end does not fill the log.
        self.told = self.told.saturating_sub(1);
        let events = if self.told > 0 { vec![("bootstrap".into(), detail)] } else { Vec::new() };
        if let Err(error) = self.persist(events).await {
            let detail = error.to_string();
            return self.note(Mark { kind: "error".into(), detail, at_us: None }).await;
        }
        self.publish(false);
    }

    async fn forget(&mut self) -> Result<(), StoreError> {
        let id = self.record.machine.id;
        self.host.forget(id).await;
        let event = self.event("removed".into(), String::new(), now_us());
        let key = id.to_string();
        let written = self.store.write(move |c| {
            store::delete_machine(c, &key)?;
            store::put_event(c, event)
        });
        let event = written.await?;
        (self.leave)();
        self.publish(true);
        let _ = self.events.send(event);
        Ok(())
    }

    async fn note(&mut self, mark: Mark) {
        let event = self.event(mark.kind, mark.detail, mark.at_us.unwrap_or_else(now_us));
        // A remark that cannot be kept is not worth failing a machine for.
        if let Ok(event) = self.store.write(move |c| store::put_event(c, event)).await {
            let _ = self.events.send(event);
        }
    }

    fn event(&self, kind: String, detail: String, at_us: i64) -> Event {
        let machine = &self.record.machine;
        Event { seq: 0, at_us, id: machine.id, name: machine.name.to_string(), kind, detail }
    }

    async fn persist(&mut self, events: Vec<(String, String)>) -> Result<(), StoreError> {
        self.persist_with(events, |_| Ok(())).await
    }

    async fn persist_with(
        &mut self,
        events: Vec<(String, String)>,
        more: impl FnOnce(&rusqlite::Connection) -> rusqlite::Result<()> + Send + 'static,
    ) -> Result<(), StoreError> {
        let now = now_us();
        Arc::make_mut(&mut self.record).modified_us = now;
        let row = Row {
            id: self.record.machine.id.to_string(),
            name: self.record.machine.name.to_string(),
            record: self.record.to_text(),
        };
        let events: Vec<Event> =
            events.into_iter().map(|(kind, detail)| self.event(kind, detail, now)).collect();
        let written = self.store.write(move |c| {
            store::put_machine(c, &row)?;
            more(c)?;
            events.into_iter().map(|e| store::put_event(c, e)).collect::<Result<Vec<_>, _>>()
        });
        for event in written.await? {
            let _ = self.events.send(event);
        }
        Ok(())
    }

    /// The description and what follows from it, in one transaction.
    async fn persist_redefined(&mut self) -> Result<(), StoreError> {
        let (id, nics) = (self.record.machine.id.to_string(), &self.record.machine.nics);
        let macs: Vec<String> = nics.iter().map(|nic| nic.mac.to_string()).collect();
        let events = vec![("redefined".into(), String::new())];
        self.persist_with(events, move |c| store::release_leases(c, &id, &macs)).await
    }

    fn publish(&self, forgotten: bool) {
        self.publish.send_replace(Published { record: self.record.clone(), forgotten });
    }

    fn arm(&mut self, wait: Duration, seen: Seen) {
        self.timers += 1;
        let (own, generation) = (self.own.clone(), self.timers);
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            let _ = own.send(Box::new(Message::Timer(generation, seen)));
        });
    }
}

/// The next report, if there is anybody to make one.
async fn next(reports: &mut Option<mpsc::UnboundedReceiver<Report>>) -> Option<Report> {
    match reports {
        Some(reports) => reports.recv().await,
        None => std::future::pending().await,
    }
}

fn describe(seen: &Seen) -> (String, String) {
    let (kind, detail) = match seen {
        Seen::Launched => ("running", String::new()),
        Seen::LaunchFailed(reason) => ("launch-failed", reason.clone()),
        Seen::Paused => ("paused", String::new()),
        Seen::Resumed => ("resumed", String::new()),
        Seen::Saved => ("saved", "its memory is in its file".into()),
        Seen::SaveFailed(why) => ("suspend-failed", why.clone()),
        Seen::Loaded => ("loaded", "its memory is where it was".into()),
        Seen::GuestReset => ("guest-reset", String::new()),
        Seen::Ready => ("ready", String::new()),
        Seen::Panicked(line) => ("guest-panic", line.clone()),
        Seen::Broken(why) => ("hypervisor-fault", why.clone()),
        Seen::Exited(Ok(())) => ("exited", "the guest shut down".into()),
        Seen::Exited(Err(how)) => ("exited", how.clone()),
        Seen::StopTimedOut => ("stop-timed-out", "the guest did not end; ending it".into()),
        Seen::RestartDue => ("restart-due", String::new()),
        Seen::Adopted { .. } => ("adopted", "found running after a restart of the daemon".into()),
    };
    (kind.to_owned(), detail)
}
