//! The life of a machine as a pure function. No clock, no path, no await: what was asked or seen
//! comes in, the next life and the actions to take come out.
//!
//! ```text
//! created ---start---> starting --launched--> running <--paused/resumed--> paused
//!    ^                    |                      |                            |
//!    |                    | launch failed        +------- stop, fault --------+
//!    |                    v                      v
//!  (new)     start      failed <---exited--- stopping ---exited---> stopped
//!              +----------+--------------------------------------------+
//! ```
//!
//! `stopping` always knows why (`Ending`). Whatever is launched is released exactly once.
//!
//! A machine that is suspended ends like one that is stopped, but with its memory saved first. Its
//! next start goes on from there, and gives the saved memory up as soon as it is read.

use lodge_spec::machine::{Restart, RestartPolicy};
use lodge_spec::state::State;
use serde::{Deserialize, Serialize};

/// What people may ask of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Start,
    /// Ask the guest to end, or with `force` end it.
    Stop {
        force: bool,
    },
    Restart,
    Reset,
    Pause,
    Resume,
    /// Save its memory and end it.
    Suspend,
    /// Forget it, with `force` also while it lives.
    Remove {
        force: bool,
    },
}

impl Verb {
    pub const fn as_str(self) -> &'static str {
        match self {
            Verb::Start => "start",
            Verb::Stop { .. } => "stop",
            Verb::Restart => "restart",
            Verb::Reset => "reset",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::Suspend => "suspend",
            Verb::Remove { .. } => "remove",
        }
    }
}

/// What the host saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    Launched,
    LaunchFailed(String),
    Paused,
    Resumed,
    /// The memory is in its file, whole.
    Saved,
    /// It is not; why. The guest is as it was.
    SaveFailed(String),
    /// The hypervisor has read the saved memory, which is now given up.
    Loaded,
    GuestReset,
    Ready,
    /// The guest's kernel gave up; the line that says so.
    Panicked(String),
    /// The hypervisor is there, and cannot run the guest any further; why.
    Broken(String),
    /// The hypervisor ended; `Err` says how, where it was not a shutdown by the guest.
    Exited(Result<(), String>),
    StopTimedOut,
    RestartDue,
    /// After a restart of the daemon: the hypervisor is there.
    Adopted {
        paused: bool,
        ready: bool,
    },
}

/// Effects, to be taken in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Launch,
    Powerdown,
    /// End the hypervisor now.
    Quit,
    Pause,
    Resume,
    Reset,
    /// Write the memory to its file. The guest stands still from then on.
    Save,
    /// Delete the saved memory.
    Discard,
    /// Give back what the launch took.
    Release,
    ArmStopTimer,
    /// The nth restart in a row is due after a while.
    ArmRestartTimer(u32),
    /// Delete the machine and what it owns.
    Forget,
}

/// Why a machine is `stopping`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    Stop,
    Restart,
    Remove,
    Fault(String),
    /// Its memory is being saved; whether it stood still before.
    Suspend {
        paused: bool,
    },
    /// Its memory is saved.
    Suspended,
}

/// What is kept with a machine's saved memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// The guest was ready when it was suspended.
    pub ready: bool,
}

/// Where a machine is in its life. Kept in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    pub state: State,
    /// Present exactly while `stopping`.
    pub ending: Option<Ending>,
    /// Since the last start.
    pub ready: bool,
    /// Why it failed.
    pub reason: Option<String>,
    /// Restarts by policy since it was last started by hand or ready.
    pub restarts: u32,
    /// A restart by policy is due.
    pub restart_due: bool,
    /// Its memory is saved. Present while `suspended`, and while that comes or goes.
    #[serde(default)]
    pub saved: Option<Saved>,
}

impl Life {
    pub const fn new() -> Self {
        Self {
            state: State::Created,
            ending: None,
            ready: false,
            reason: None,
            restarts: 0,
            restart_due: false,
            saved: None,
        }
    }

    fn is_being_suspended(&self) -> bool {
        matches!(self.ending, Some(Ending::Suspend { .. } | Ending::Suspended))
    }

    /// A life whose record could not be read.
    pub fn broken(reason: String) -> Self {
        Self { state: State::Broken, reason: Some(reason), ..Self::new() }
    }
}

impl Default for Life {
    fn default() -> Self {
        Self::new()
    }
}

/// What the machine's description says about endings.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    pub restart: Restart,
    pub ephemeral: bool,
}

/// The verb is not possible in this state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Denied {
    pub verb: Verb,
    pub state: State,
}

type Step = (Life, Vec<Action>);

/// What a person asks. A verb that is already satisfied succeeds without actions.
pub fn ask(life: &Life, verb: Verb) -> Result<Step, Denied> {
    let denied = Err(Denied { verb, state: life.state });
    let same = Ok((life.clone(), Vec::new()));
    let with = |action| Ok((life.clone(), vec![action]));
    match (verb, life.state) {
        (
            Verb::Remove { .. },
            State::Created | State::Stopped | State::Suspended | State::Failed | State::Broken,
        ) => with(Action::Forget),
        (_, State::Broken) => denied,
        (Verb::Start, State::Created | State::Stopped | State::Failed) => Ok(start(life, 0)),
        (Verb::Start, State::Starting | State::Running) => same,
        (Verb::Start, State::Paused | State::Stopping) => denied,
        (Verb::Start | Verb::Resume, State::Suspended) => {
            let next = Life { state: State::Starting, saved: life.saved, ..Life::new() };
            Ok((next, vec![Action::Launch]))
        }
        (Verb::Suspend, State::Running | State::Paused) => {
            let ending = Some(Ending::Suspend { paused: life.state == State::Paused });
            Ok((Life { state: State::Stopping, ending, ..life.clone() }, vec![Action::Save]))
        }
        (Verb::Suspend, State::Suspended) => same,
        // A guest without memory cannot be asked to end; giving its memory up takes force.
        (Verb::Stop { force: true }, State::Suspended) => {
            Ok((Life { state: State::Stopped, ..Life::new() }, vec![Action::Discard]))
        }
        (Verb::Stop { force: false }, State::Suspended) => denied,
        (Verb::Stop { force: false }, State::Stopping) if life.is_being_suspended() => denied,
        (Verb::Stop { .. }, State::Created | State::Stopped | State::Failed) => {
            // An explicit stop beats a restart that is due.
            Ok((Life { restart_due: false, ..life.clone() }, Vec::new()))
        }
        (
            Verb::Stop { force },
            State::Starting | State::Running | State::Paused | State::Stopping,
        ) => {
            let ending = match &life.ending {
                Some(Ending::Remove) => Ending::Remove,
                Some(
                    Ending::Stop
                    | Ending::Restart
                    | Ending::Fault(_)
                    | Ending::Suspend { .. }
                    | Ending::Suspended,
                )
                | None => Ending::Stop,
            };
            Ok(end(life, ending, force))
        }
        (Verb::Restart, State::Created | State::Stopped | State::Failed) => Ok(start(life, 0)),
        (Verb::Restart, State::Starting | State::Running | State::Paused) => {
            Ok(end(life, Ending::Restart, false))
        }
        (Verb::Restart, State::Stopping | State::Suspended) => denied,
        (Verb::Remove { force: true }, _) => Ok(end(life, Ending::Remove, true)),
        (Verb::Remove { force: false }, _) => denied,
        (Verb::Reset, State::Running | State::Paused) => with(Action::Reset),
        (Verb::Pause, State::Running) => with(Action::Pause),
        (Verb::Resume, State::Paused) => with(Action::Resume),
        (Verb::Pause, State::Paused) | (Verb::Resume, State::Running) => same,
        (Verb::Reset | Verb::Pause | Verb::Resume | Verb::Suspend, _) => denied,
    }
}

/// What the host reports. Reports that do not fit the state any more change nothing.
pub fn saw(life: &Life, policy: Policy, seen: Seen) -> Step {
    let same = (life.clone(), Vec::new());
    let now = |state| Life { state, ..life.clone() };
    match (seen, life.state) {
        (Seen::Launched, State::Starting) => {
            (Life { state: State::Running, ..loaded(life) }, Vec::new())
        }
        (Seen::Loaded, State::Starting) => (loaded(life), Vec::new()),
        // Asked to end while it was being launched.
        (Seen::Launched, State::Stopping) => (life.clone(), vec![Action::Quit]),
        (Seen::LaunchFailed(reason), State::Starting) => ended(life, policy, Ended::Unable(reason)),
        (Seen::LaunchFailed(reason), State::Stopping) => {
            ended(life, policy, Ended::Failure(reason))
        }
        (Seen::Paused, State::Running) => (now(State::Paused), Vec::new()),
        (Seen::Resumed, State::Paused) => (now(State::Running), Vec::new()),
        (Seen::Saved, State::Stopping) => match &life.ending {
            Some(Ending::Suspend { .. }) => {
                let (ending, saved) = (Some(Ending::Suspended), Some(Saved { ready: life.ready }));
                (Life { ending, saved, ..life.clone() }, vec![Action::Quit])
            }
            // Something else was asked meanwhile.
            _ => (life.clone(), vec![Action::Discard]),
        },
        (Seen::SaveFailed(_), State::Stopping) => match &life.ending {
            Some(Ending::Suspend { paused }) => {
                let state = if *paused { State::Paused } else { State::Running };
                (Life { ending: None, ..now(state) }, Vec::new())
            }
            _ => same,
        },
        (Seen::GuestReset, State::Running | State::Paused) => {
            (Life { ready: false, ..life.clone() }, Vec::new())
        }
        // A fast guest is ready before whoever launched it has said so.
        (Seen::Ready, State::Starting | State::Running | State::Paused) => {
            (Life { ready: true, restarts: 0, ..life.clone() }, Vec::new())
        }
        (
            Seen::Panicked(why) | Seen::Broken(why),
            State::Starting | State::Running | State::Paused,
        ) => end(life, Ending::Fault(why), true),
        (Seen::Exited(Ok(())), state) if state.is_live() => ended(life, policy, Ended::Success),
        (Seen::Exited(Err(reason)), state) if state.is_live() => {
            ended(life, policy, Ended::Failure(reason))
        }
        (Seen::StopTimedOut, State::Stopping) => (life.clone(), vec![Action::Quit]),
        (Seen::RestartDue, State::Stopped | State::Failed) if life.restart_due => {
            start(life, life.restarts)
        }
        (Seen::Adopted { paused, ready }, state) if state.is_live() => adopted(life, paused, ready),
        (
            Seen::Launched
            | Seen::LaunchFailed(_)
            | Seen::Paused
            | Seen::Resumed
            | Seen::Saved
            | Seen::SaveFailed(_)
            | Seen::Loaded
            | Seen::GuestReset
            | Seen::Ready
            | Seen::Panicked(_)
            | Seen::Broken(_)
            | Seen::Exited(_)
            | Seen::StopTimedOut
            | Seen::RestartDue
            | Seen::Adopted { .. },
            _,
        ) => same,
    }
}

/// Its memory is where it was; the file is no longer needed.
fn loaded(life: &Life) -> Life {
    let ready = life.ready || life.saved.is_some_and(|saved| saved.ready);
    Life { ready, saved: None, ..life.clone() }
}

fn start(life: &Life, restarts: u32) -> Step {
    let started = Life { state: State::Starting, restarts, ..Life::new() };
    debug_assert!(!life.state.is_live(), "only what does not live is started");
    (started, vec![Action::Launch])
}

fn end(life: &Life, ending: Ending, force: bool) -> Step {
    let gently = !force && !matches!(life.state, State::Starting);
    let actions = match (gently, life.state) {
        (false, _) => vec![Action::Quit],
        // Asked again: the guest has been told, the clock runs.
        (true, State::Stopping) => Vec::new(),
        (true, State::Paused) => vec![Action::Resume, Action::Powerdown, Action::ArmStopTimer],
        (true, _) => vec![Action::Powerdown, Action::ArmStopTimer],
    };
    let ending = Some(ending);
    (Life { state: State::Stopping, ending, restart_due: false, ..life.clone() }, actions)
}

enum Ended {
    Success,
    Failure(String),
    /// It never ran; trying again would end the same way.
    Unable(String),
}

fn ended(life: &Life, policy: Policy, how: Ended) -> Step {
    let rest = |state, reason| Life { state, reason, restarts: life.restarts, ..Life::new() };
    let suspended = |reason| {
        let saved = life.saved;
        (Life { saved, ..rest(State::Suspended, reason) }, vec![Action::Release])
    };
    let (mut next, by_itself) = match (&life.ending, how) {
        (Some(Ending::Suspended), _) => return suspended(None),
        // It did not come back; its memory is still there.
        (None, Ended::Failure(reason) | Ended::Unable(reason)) if life.saved.is_some() => {
            return suspended(Some(reason));
        }
        (Some(Ending::Restart), _) => {
            let (next, launch) = start(&rest(State::Stopped, None), 0);
            let mut actions = vec![Action::Release];
            actions.extend(launch);
            return (next, actions);
        }
        (Some(Ending::Remove), _) => {
            return (rest(State::Stopped, None), vec![Action::Release, Action::Forget]);
        }
        (Some(Ending::Stop), _) => (rest(State::Stopped, None), false),
        (Some(Ending::Fault(line)), _) => (rest(State::Failed, Some(line.clone())), true),
        (None | Some(Ending::Suspend { .. }), Ended::Success) => (rest(State::Stopped, None), true),
        (None | Some(Ending::Suspend { .. }), Ended::Failure(reason)) => {
            (rest(State::Failed, Some(reason)), true)
        }
        (None | Some(Ending::Suspend { .. }), Ended::Unable(reason)) => {
            (rest(State::Failed, Some(reason)), false)
        }
    };
    let mut actions = vec![Action::Release];
    if life.saved.is_some() {
        actions.push(Action::Discard);
    }
    let wanted = match policy.restart.policy {
        RestartPolicy::Never => false,
        RestartPolicy::OnFailure => next.state == State::Failed,
        RestartPolicy::Always => true,
    };
    if by_itself && wanted && life.restarts < policy.restart.max {
        next.restarts = life.restarts + 1;
        next.restart_due = true;
        actions.push(Action::ArmRestartTimer(next.restarts));
    } else if policy.ephemeral {
        actions.push(Action::Forget);
    }
    (next, actions)
}

fn adopted(life: &Life, paused: bool, ready: bool) -> Step {
    let life = Life { ready: ready || life.ready, ..life.clone() };
    match (&life.ending, life.state) {
        // The powerdown may have been lost with the old daemon; ask again.
        (Some(Ending::Stop | Ending::Restart), _) => {
            (life, vec![Action::Powerdown, Action::ArmStopTimer])
        }
        (Some(Ending::Remove | Ending::Fault(_) | Ending::Suspended), _) => {
            (life, vec![Action::Quit])
        }
        // Saving its memory went with the old daemon; begin again.
        (Some(Ending::Suspend { .. }), _) => (life, vec![Action::Save]),
        // Its memory may have been read in part only, and is still in its file.
        (None, State::Starting) if life.saved.is_some() && paused => {
            let ending = Some(Ending::Suspended);
            (Life { state: State::Stopping, ending, ..life }, vec![Action::Quit])
        }
        (None, State::Starting) if life.saved.is_some() => {
            (Life { state: State::Running, ..loaded(&life) }, vec![Action::Discard])
        }
        (None, _) => {
            let state = if paused { State::Paused } else { State::Running };
            (Life { state, ..life }, Vec::new())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Event {
        Ask(Verb),
        Saw(Seen),
    }

    fn events() -> impl Strategy<Value = Event> {
        let verbs = prop::sample::select(vec![
            Verb::Start,
            Verb::Stop { force: false },
            Verb::Stop { force: true },
            Verb::Restart,
            Verb::Reset,
            Verb::Pause,
            Verb::Resume,
            Verb::Suspend,
            Verb::Remove { force: false },
            Verb::Remove { force: true },
        ]);
        let seen = prop::sample::select(vec![
            Seen::Launched,
            Seen::LaunchFailed("no".into()),
            Seen::Paused,
            Seen::Resumed,
            Seen::Saved,
            Seen::SaveFailed("no space".into()),
            Seen::Loaded,
            Seen::GuestReset,
            Seen::Ready,
            Seen::Panicked("oops".into()),
            Seen::Broken("no such instruction".into()),
            Seen::Exited(Ok(())),
            Seen::Exited(Err("signal 9".into())),
            Seen::StopTimedOut,
            Seen::RestartDue,
            Seen::Adopted { paused: false, ready: true },
            Seen::Adopted { paused: true, ready: false },
        ]);
        prop_oneof![verbs.prop_map(Event::Ask), seen.prop_map(Event::Saw)]
    }

    fn policies() -> impl Strategy<Value = Policy> {
        let kinds = prop::sample::select(RestartPolicy::ALL.to_vec());
        (kinds, 1u32..4, any::<bool>()).prop_map(|(policy, max, ephemeral)| Policy {
            restart: Restart { policy, max },
            ephemeral,
        })
    }

    fn apply(life: &Life, policy: Policy, event: Event) -> Step {
        match event {
            Event::Ask(verb) => ask(life, verb).unwrap_or_else(|_| (life.clone(), Vec::new())),
            Event::Saw(seen) => saw(life, policy, seen),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn what_is_launched_is_released_once(
            policy in policies(),
            list in prop::collection::vec(events(), 0..60),
        ) {
            let (mut life, mut launched) = (Life::new(), false);
            for event in list {
                let (next, actions) = apply(&life, policy, event);
                for action in &actions {
                    match action {
                        Action::Launch => { prop_assert!(!launched); launched = true; }
                        Action::Release => { prop_assert!(launched); launched = false; }
                        Action::Forget => prop_assert!(!launched),
                        Action::Powerdown | Action::Quit | Action::Pause | Action::Resume
                        | Action::Reset | Action::Save | Action::ArmStopTimer => {
                            prop_assert!(launched);
                        }
                        Action::Discard => {}
                        Action::ArmRestartTimer(n) => prop_assert!(*n <= policy.restart.max),
                    }
                }
                prop_assert_eq!(next.state.is_live(), launched);
                prop_assert_eq!(next.ending.is_some(), next.state == State::Stopping);
                prop_assert!(next.state != State::Failed || next.reason.is_some());
                prop_assert!(!next.ready || next.state.is_live());
                prop_assert!(next.state != State::Suspended || next.saved.is_some());
                let may = [State::Starting, State::Stopping, State::Suspended];
                prop_assert!(next.saved.is_none() || may.contains(&next.state));
                if actions.contains(&Action::Forget) { break; }
                life = next;
            }
        }

        #[test]
        fn a_stop_holds_and_is_idempotent(
            policy in policies(),
            list in prop::collection::vec(events(), 0..40),
        ) {
            let mut life = Life::new();
            for event in list {
                let (next, actions) = apply(&life, policy, event);
                if actions.contains(&Action::Forget) { return Ok(()); }
                life = next;
            }
            let (stopped, _) = ask(&life, Verb::Stop { force: true }).unwrap();
            let (again, _) = ask(&stopped, Verb::Stop { force: true }).unwrap();
            prop_assert_eq!(&again, &stopped);
            let (dead, actions) = saw(&stopped, policy, Seen::Exited(Err("killed".into())));
            prop_assert!(!actions.contains(&Action::Launch));
            prop_assert!(!dead.state.is_live());
            let (still, actions) = saw(&dead, policy, Seen::RestartDue);
            prop_assert!(actions.is_empty() && !still.state.is_live());
        }
    }

    #[test]
    fn a_guest_may_be_ready_before_its_launch_is_over() {
        let restart = Restart { policy: RestartPolicy::Never, max: 1 };
        let policy = Policy { restart, ephemeral: false };
        let (starting, _) = ask(&Life::new(), Verb::Start).unwrap();
        let (early, _) = saw(&starting, policy, Seen::Ready);
        let (running, _) = saw(&early, policy, Seen::Launched);
        assert!(running.ready && running.state == State::Running);
    }

    #[test]
    fn restarts_are_bounded_and_readiness_forgives() {
        let restart = Restart { policy: RestartPolicy::OnFailure, max: 2 };
        let policy = Policy { restart, ephemeral: false };
        let (mut life, _) = ask(&Life::new(), Verb::Start).unwrap();
        for round in 1..=3 {
            life = saw(&life, policy, Seen::Launched).0;
            let (next, actions) = saw(&life, policy, Seen::Exited(Err("crash".into())));
            assert_eq!(actions.contains(&Action::ArmRestartTimer(round)), round <= 2);
            life = saw(&next, policy, Seen::RestartDue).0;
        }
        assert_eq!(life.state, State::Failed);
        life = ask(&life, Verb::Start).unwrap().0;
        life = saw(&life, policy, Seen::Launched).0;
        life = saw(&life, policy, Seen::Ready).0;
        assert_eq!(life.restarts, 0);
    }
}
