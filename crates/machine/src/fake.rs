//! A host without hypervisors, stricter than the real one: it refuses to launch what lives, to
//! command what does not, and to release twice. Tests hold the keeper against it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use lodge_spec::machine::{Accel, BackendKind, Machine};
use lodge_spec::migration::Passport;
use lodge_spec::names::{Mac, MachineId};
use lodge_spec::problem::Problems;
use lodge_spec::request::Change;

use crate::host::{Command, Found, Host, Leaving, Report, Running, Sink};
use crate::life::Seen;

#[derive(Default)]
struct World {
    live: HashMap<MachineId, (Arc<Machine>, Option<Sink>, bool)>,
    prepared: Vec<MachineId>,
    saved: Vec<MachineId>,
    violations: Vec<String>,
    /// Guests that do not listen to the power button.
    deaf: bool,
    fail_launches: bool,
    fail_saves: bool,
    /// Memory takes for ever to be saved.
    hold_saves: bool,
    /// Other hosts take no machine in.
    fail_departures: bool,
    /// The way to other hosts has no end.
    hold_departures: bool,
}

/// The fake. Clones share one world, as daemons after each other share a host.
#[derive(Clone, Default)]
pub struct FakeHost(Arc<Mutex<World>>);

impl FakeHost {
    fn world(&self) -> std::sync::MutexGuard<'_, World> {
        self.0.lock().expect("no test panics while it holds the world")
    }

    pub fn set_deaf(&self, deaf: bool) {
        self.world().deaf = deaf;
    }

    pub fn fail_launches(&self, fail: bool) {
        self.world().fail_launches = fail;
    }

    pub fn fail_saves(&self, fail: bool) {
        self.world().fail_saves = fail;
    }

    pub fn hold_saves(&self, hold: bool) {
        self.world().hold_saves = hold;
    }

    pub fn fail_departures(&self, fail: bool) {
        self.world().fail_departures = fail;
    }

    pub fn hold_departures(&self, hold: bool) {
        self.world().hold_departures = hold;
    }

    /// What the keeper did that no real host would forgive.
    pub fn violations(&self) -> Vec<String> {
        self.world().violations.clone()
    }

    pub fn live(&self) -> usize {
        self.world().live.len()
    }

    pub fn saved(&self) -> usize {
        self.world().saved.len()
    }

    /// The hypervisor dies.
    pub fn kill(&self, id: MachineId, why: &str) {
        self.end(id, Err(why.to_owned()));
    }

    pub fn report(&self, id: MachineId, seen: Seen) {
        let world = self.world();
        if let Some((_, Some(sink), _)) = world.live.get(&id) {
            let _ = sink.send(Report::Seen(seen));
        }
    }

    fn end(&self, id: MachineId, how: Result<(), String>) {
        if let Some((_, Some(sink), _)) = self.world().live.remove(&id) {
            let _ = sink.send(Report::Seen(Seen::Exited(how)));
        }
    }

    fn violation(&self, text: String) {
        self.world().violations.push(text);
    }
}

impl Host for FakeHost {
    async fn check(&self, _machine: &Machine, _now: bool) -> Result<(), Problems> {
        Ok(())
    }

    async fn settle(&self, machine: &Machine) -> Result<(), String> {
        if self.world().live.contains_key(&machine.id) {
            self.violation(format!("{} settled while it lives", machine.id));
        }
        Ok(())
    }

    async fn launch(
        &self,
        machine: Arc<Machine>,
        resume: bool,
        sink: Sink,
    ) -> Result<Running, String> {
        let id = machine.id;
        let macs: Vec<Mac> = machine.nics.iter().map(|n| n.mac).collect();
        let mut world = self.world();
        if world.prepared.contains(&id) {
            world.violations.push(format!("{id} launched before it was released"));
        }
        let others = world.live.values().flat_map(|(m, _, _)| &m.nics);
        if let Some(nic) = others.into_iter().find(|n| macs.contains(&n.mac)) {
            return Err(format!("address {} is in use", nic.mac));
        }
        world.prepared.push(id);
        if world.fail_launches {
            return Err("told to fail".into());
        }
        let saved = world.saved.iter().position(|saved| *saved == id);
        match saved {
            Some(at) => drop(world.saved.remove(at)),
            None if resume => return Err("no memory is saved".into()),
            None => {}
        }
        if resume {
            let _ = sink.send(Report::Seen(Seen::Loaded));
        }
        world.live.insert(id, (machine, Some(sink), false));
        Ok(Running {
            backend: BackendKind::Qemu,
            accel: Accel::Tcg,
            address: None,
            notes: Vec::new(),
            since_us: 0,
            pid: 0,
        })
    }

    async fn adopt(&self, machine: Arc<Machine>, sink: Sink) -> Found {
        match self.world().live.get_mut(&machine.id) {
            Some((_, old, paused)) => {
                *old = Some(sink);
                Found::Alive { paused: *paused, ready: false }
            }
            None => Found::Ended(Err("nothing is there".into())),
        }
    }

    async fn command(&self, id: MachineId, command: Command) -> Result<(), String> {
        let seen = {
            let mut world = self.world();
            let deaf = world.deaf;
            let Some((_, _, paused)) = world.live.get_mut(&id) else {
                // A command can cross the end of a hypervisor, but not come before its launch.
                if !world.prepared.contains(&id) {
                    world.violations.push(format!("{command:?} for {id}, which is not there"));
                }
                return Err("nothing is there".into());
            };
            match command {
                Command::Pause => {
                    *paused = true;
                    Some(Seen::Paused)
                }
                Command::Resume => {
                    *paused = false;
                    Some(Seen::Resumed)
                }
                Command::Reset => Some(Seen::GuestReset),
                Command::Powerdown if deaf => return Ok(()),
                Command::Powerdown | Command::Quit => None,
            }
        };
        match seen {
            Some(seen) => self.report(id, seen),
            None => self.end(id, Ok(())),
        }
        Ok(())
    }

    async fn save(&self, machine: Arc<Machine>) -> Result<(), String> {
        if self.world().hold_saves {
            std::future::pending::<()>().await;
        }
        let mut world = self.world();
        let fail = world.fail_saves;
        let Some((_, _, paused)) = world.live.get_mut(&machine.id) else {
            return Err("nothing is there".into());
        };
        if fail {
            return Err("told to fail".into());
        }
        *paused = true;
        world.saved.push(machine.id);
        Ok(())
    }

    async fn discard(&self, id: MachineId) {
        self.world().saved.retain(|saved| *saved != id);
    }

    async fn depart(&self, machine: Arc<Machine>, _leaving: Leaving) -> Result<(), String> {
        if self.world().hold_departures {
            std::future::pending::<()>().await;
        }
        {
            let mut world = self.world();
            let fail = world.fail_departures;
            let Some((_, _, paused)) = world.live.get_mut(&machine.id) else {
                return Err("nothing is there".into());
            };
            if fail {
                return Err("nobody takes it in".into());
            }
            *paused = true;
        }
        self.report(machine.id, Seen::Paused);
        Ok(())
    }

    async fn admit(&self, machine: Arc<Machine>, _passport: Passport) -> Result<PathBuf, String> {
        let mut world = self.world();
        if world.live.contains_key(&machine.id) {
            world.violations.push(format!("{} admitted while it lives", machine.id));
        }
        if world.fail_departures {
            return Err("told to fail".into());
        }
        world.saved.push(machine.id);
        Ok(PathBuf::from("/memory"))
    }

    async fn change(&self, _machine: Arc<Machine>, _change: Change) -> Result<(), String> {
        Ok(())
    }

    async fn refresh(&self, machine: Arc<Machine>) -> Result<(), String> {
        match self.world().live.get_mut(&machine.id) {
            Some((described, _, _)) => *described = machine,
            None => return Err("nothing is there".into()),
        }
        Ok(())
    }

    async fn release(&self, machine: Arc<Machine>) {
        let id = machine.id;
        if self.world().live.contains_key(&id) {
            self.violation(format!("{id} released while it lives"));
        }
        let mut world = self.world();
        match world.prepared.iter().position(|p| *p == id) {
            Some(at) => drop(world.prepared.remove(at)),
            None => world.violations.push(format!("{id} released twice")),
        }
    }

    async fn forget(&self, id: MachineId) {
        if self.world().prepared.contains(&id) {
            self.violation(format!("{id} forgotten before it was released"));
        }
    }
}
