//! Linux as the machine room sees it: carries out launches, speaks to wardens and hypervisors, and
//! reports what they do. The one place where the host's parts meet.

mod attend;
mod change;
mod drive;
mod launch;
mod live;
mod migrate;
pub mod objects;
mod peer;
mod snapshots;
mod suspend;
mod usage;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lodge_machine::Store;
use lodge_machine::host::{Command, Found, Host, Leaving, Running, Sink};
use lodge_machine::store::now_us;
use lodge_spec::machine::{Boot, Machine};
use lodge_spec::migration::Passport;
use lodge_spec::names::MachineId;
use lodge_spec::problem::{Problem, Problems};
use lodge_spec::request::{Change, Refusal};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use crate::backend::choose::Choice;
use crate::backend::cloud_hypervisor;
use crate::backend::qemu::plan::firmware_steps;
use crate::backend::{Launch, Survey, Tap, Unsupported};
use crate::facts::Facts;
use crate::flist;
use crate::flist::root::Root;
use crate::image::store::Images;
use crate::net::wires;
use crate::paths::Paths;
use crate::survey::Surveyor;
use crate::warden::message::{self, Ask};

use live::Live;

/// QEMU has this long to flush and end before it is killed.
const QUIT_PATIENCE: Duration = Duration::from_secs(3);

pub struct Linux {
    pub paths: Paths,
    pub images: Images,
    store: Store,
    facts: OnceCell<Facts>,
    live: Mutex<HashMap<MachineId, Live>>,
    /// Networks are brought up one at a time.
    networks: tokio::sync::Mutex<()>,
}

impl Linux {
    pub fn new(paths: Paths, store: Store) -> Self {
        let images = Images::new(paths.clone(), store.clone());
        Self {
            paths,
            images,
            store,
            facts: OnceCell::new(),
            live: Mutex::default(),
            networks: tokio::sync::Mutex::default(),
        }
    }

    pub async fn facts(&self) -> &Facts {
        self.facts.get_or_init(|| Facts::gather(&self.paths)).await
    }

    /// What is known of the host already; nothing is looked for.
    pub fn facts_so_far(&self) -> Option<&Facts> {
        self.facts.get()
    }

    async fn survey(&self, machine: &Machine, root: Option<Root>) -> Result<Survey, Problems> {
        let (paths, images, store) = (&self.paths, &self.images, &self.store);
        Surveyor { paths, images, store, root }.survey(machine).await
    }

    /// Readies the root of a machine that boots from an flist, in this folder.
    async fn root(
        &self,
        machine: &Machine,
        home: &Path,
        keep: bool,
    ) -> Result<Option<Root>, Problems> {
        let Boot::Flist { flist, .. } = &machine.boot else { return Ok(None) };
        let root = flist::root::prepare(&self.paths, machine, flist, home, keep).await;
        root.map(Some).map_err(|why| Problems(vec![Problem::new("flist", why)]))
    }

    /// How the machine would be started. Kernels never seen before are unpacked first, because
    /// the choice of the board depends on what is in them.
    pub async fn plan(&self, machine: &Machine) -> Result<Choice, Problems> {
        let home = self.paths.machine(machine.id);
        if !matches!(machine.boot, Boot::Flist { .. }) {
            return self.plan_in(machine, &home, false).await;
        }
        // Nothing is to be left of what is only looked at.
        let scratch = tempfile::tempdir_in(&self.paths.run);
        let scratch = scratch.map_err(|e| Problems(vec![Problem::new("", e.to_string())]))?;
        self.plan_in(machine, scratch.path(), false).await
    }

    async fn plan_in(
        &self,
        machine: &Machine,
        home: &Path,
        keep: bool,
    ) -> Result<Choice, Problems> {
        let facts = self.facts().await;
        // Before anything is made for it.
        wires::check_all(machine).or(())?;
        let mut root = self.root(machine, home, keep).await?;
        let whole = root.take_if(|root| root.found.whole.is_some());
        let whole = whole.map(|root| flist::whole::machine(machine, &root));
        let machine = whole.as_ref().unwrap_or(machine);
        let mut survey = self.survey(machine, root.clone()).await?;
        if launch::unpack_kernels(&survey.steps, &self.paths).await {
            survey = self.survey(machine, root).await?;
        }
        if let Ok(qemu) = &facts.qemu {
            survey.steps.extend(firmware_steps(machine, &survey, qemu));
        }
        Ok(Choice::of(machine, &survey, facts))
    }

    fn live(&self, id: MachineId) -> Result<Live, String> {
        let live = self.live.lock().expect("not poisoned").get(&id).cloned();
        live.ok_or_else(|| "the hypervisor is not running".to_owned())
    }

    /// What is known about a running machine: how it was started and what confines it.
    pub fn describe(&self, id: MachineId) -> Value {
        let Ok(live) = self.live(id) else { return Value::Null };
        let in_force = lodge_jail::in_force::read(live.pid);
        json!({
            "pid": live.pid,
            "backend": live.launch.backend,
            "board": live.launch.board,
            "notes": live.launch.notes,
            "argv": live.launch.warden.jail.argv,
            "confinement": in_force.map_err(|e| e.to_string()).ok(),
            "limits": live.launch.warden.cgroup,
        })
    }

    /// The console's socket and log.
    pub fn console(&self, id: MachineId) -> (String, String) {
        let socket = message::console_socket(&self.paths.running(id));
        let log = self.paths.console_log(id);
        (socket.display().to_string(), log.display().to_string())
    }

    /// A refusal that names every backend and what it lacks.
    pub fn unsupported(list: &[Unsupported]) -> Refusal {
        let lines: Vec<String> = list.iter().map(Unsupported::to_string).collect();
        Refusal::Unsupported { message: lines.join("\n") }
    }
}

impl Host for Linux {
    async fn check(&self, machine: &Machine, now: bool) -> Result<(), Problems> {
        let choice = match self.plan(machine).await {
            Ok(choice) => choice,
            Err(problems) if now => return Err(problems),
            Err(problems) => return attend::without_media(machine, problems).or(()),
        };
        let Err(lacks) = choice.chosen() else { return Ok(()) };
        // What the host lacks as a whole may be added before the start; a field that nothing here
        // can do is refused at once.
        let problems = lacks.into_iter().filter(|u| u.is_about_field());
        Problems(
            problems.map(|u| Problem::new(&u.path, format!("{}: {}", u.backend, u.why))).collect(),
        )
        .or(())
    }

    async fn settle(&self, machine: &Machine) -> Result<(), String> {
        let (paths, machine) = (self.paths.clone(), machine.clone());
        let work = move || attend::settle(&paths, &machine);
        tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string())?
    }

    async fn launch(
        &self,
        machine: Arc<Machine>,
        resume: bool,
        sink: Sink,
    ) -> Result<Running, String> {
        let home = self.paths.machine(machine.id);
        let choice = self.plan_in(&machine, &home, true).await.map_err(|p| p.to_string())?;
        let mut launch = choice.chosen().map_err(|list| Self::unsupported(&list).to_string())?;
        match resume {
            true => self.go_on(machine.id, &mut launch)?,
            false => self.discard_memory(machine.id).await,
        }
        live::mark(&sink, "planned", &launch.notes.join("; "));
        launch::carry_out(&machine, &launch, &self.paths, &sink, &self.networks).await?;
        let mut running = running(&launch);
        let id = machine.id;
        let live = live::connect(launch, sink.clone()).await?;
        running.pid = live.pid;
        self.live.lock().expect("not poisoned").insert(id, live.clone());
        if resume {
            self.set_going(&live, id, &sink).await?;
        }
        Ok(running)
    }

    async fn adopt(&self, machine: Arc<Machine>, sink: Sink) -> Found {
        let run = self.paths.running(machine.id);
        match live::adopt(&run, sink).await {
            Ok((live, found)) => {
                self.live.lock().expect("not poisoned").insert(machine.id, live);
                found
            }
            Err(how) => Found::Ended(how),
        }
    }

    async fn command(&self, id: MachineId, command: Command) -> Result<(), String> {
        let live = self.live(id)?;
        if command != Command::Quit {
            return live.command(command).await;
        }
        let quit = tokio::time::timeout(QUIT_PATIENCE, live.command(command)).await;
        if !matches!(quit, Ok(Ok(()))) {
            // It does not listen; the warden can end it without being heard.
            live.ask(Ask::Kill).await?;
        }
        let (warden, patience) = (live.clone(), QUIT_PATIENCE);
        tokio::spawn(async move {
            tokio::time::sleep(patience).await;
            // Fails when it has ended as it was told, which is what was wanted.
            let _ = warden.ask(Ask::Kill).await;
        });
        Ok(())
    }

    async fn save(&self, machine: Arc<Machine>) -> Result<(), String> {
        self.save_memory(&machine).await
    }

    async fn discard(&self, id: MachineId) {
        self.discard_memory(id).await;
    }

    async fn depart(&self, machine: Arc<Machine>, leaving: Leaving) -> Result<(), String> {
        self.migrate_to(&machine, leaving).await
    }

    async fn admit(&self, machine: Arc<Machine>, passport: Passport) -> Result<PathBuf, String> {
        self.let_in(&machine, &passport).await
    }

    async fn change(&self, machine: Arc<Machine>, change: Change) -> Result<(), String> {
        let live = self.live(machine.id)?;
        let survey = self.survey(&machine, None).await.map_err(|p| p.to_string())?;
        if matches!(change, Change::AddDisk { .. }) {
            let steps = change::steps(&machine, &survey, live.launch.backend)?;
            launch::make(&machine, &steps).await?;
        }
        let facts = self.facts().await;
        live.change(&machine, &survey, change, facts, &self.networks).await
    }

    async fn refresh(&self, machine: Arc<Machine>) -> Result<(), String> {
        let live = self.live(machine.id)?;
        live.refresh(&machine, self.facts().await).await
    }

    async fn release(&self, machine: Arc<Machine>) {
        let live = self.live.lock().expect("not poisoned").remove(&machine.id);
        if let Some(live) = live {
            // A warden that was killed leaves a hypervisor that is still ending.
            let _ = tokio::time::timeout(QUIT_PATIENCE, crate::proc::ended(live.pid)).await;
        }
        let run = self.paths.running(machine.id);
        // Gone already, or a leftover that `gc` will name.
        let _ = tokio::fs::remove_dir_all(run).await;
        let plugged = cloud_hypervisor::plan::plugged(&self.paths.machine(machine.id));
        let _ = tokio::fs::remove_dir_all(plugged).await;
        let facts = self.facts().await;
        let _ = lodge_jail::cgroup::remove(&facts.cgroups, &machine.id.to_string());
    }

    async fn forget(&self, id: MachineId) {
        let _ = tokio::fs::remove_file(self.paths.zones().join(id.to_string())).await;
        let _ = tokio::fs::remove_dir_all(self.paths.machine(id)).await;
    }
}

fn running(launch: &Launch) -> Running {
    Running {
        backend: launch.backend,
        accel: launch.accel,
        address: Tap::reached(&launch.warden.taps).map(|t| t.address.to_string()),
        notes: launch.notes.clone(),
        since_us: now_us(),
        pid: 0,
    }
}
