//! When a machine has come to rest after something was asked of it, and what to say where it did
//! not get there. Pure looks at what is published.

use lodge_spec::request::{Condition, Refusal};
use lodge_spec::state::{Stage, State};

use crate::life::{Life, Verb};
use crate::task::Published;

/// `None`: not yet.
pub(crate) fn settled(verb: Verb, published: &Published) -> Option<Result<(), Refusal>> {
    let life = &published.record.life;
    let name = published.record.machine.name.as_str();
    let fine = Some(Ok(()));
    match verb {
        _ if published.forgotten => match verb {
            Verb::Start | Verb::Restart => gave_up(name, life),
            Verb::Stop { .. }
            | Verb::Reset
            | Verb::Pause
            | Verb::Resume
            | Verb::Suspend
            | Verb::Remove { .. } => fine,
        },
        Verb::Remove { .. } => None,
        Verb::Start | Verb::Restart => match life.state {
            State::Running | State::Paused => fine,
            State::Created | State::Stopped | State::Suspended | State::Failed | State::Broken => {
                gave_up(name, life)
            }
            State::Starting | State::Stopping => None,
        },
        Verb::Stop { .. } => {
            if life.state.is_live() {
                None
            } else {
                fine
            }
        }
        Verb::Pause => until(State::Paused, life, name),
        Verb::Resume => until(State::Running, life, name),
        Verb::Suspend if life.state == State::Stopping => None,
        Verb::Suspend if life.state == State::Suspended => fine,
        Verb::Suspend => gave_up(name, life),
        Verb::Reset => fine,
    }
}

fn until(state: State, life: &Life, name: &str) -> Option<Result<(), Refusal>> {
    if life.state == state {
        return Some(Ok(()));
    }
    if life.state.is_live() { None } else { gave_up(name, life) }
}

fn gave_up(name: &str, life: &Life) -> Option<Result<(), Refusal>> {
    let reason = life.reason.clone().unwrap_or_else(|| format!("{name} is {}", life.state));
    Some(Err(Refusal::Failed { message: reason }))
}

/// `None`: not yet.
pub(crate) fn holds(condition: Condition, published: &Published) -> Option<Result<(), Refusal>> {
    let life = &published.record.life;
    let name = published.record.machine.name.as_str();
    let resting = (published.forgotten || !life.state.is_live()) && !life.restart_due;
    match condition {
        Condition::Stopped if resting => Some(Ok(())),
        Condition::Stopped => None,
        Condition::Running if matches!(life.state, State::Running | State::Paused) => Some(Ok(())),
        Condition::Ready if life.ready => Some(Ok(())),
        Condition::Bootstrap => match &published.record.bootstrap {
            Some(told) if told.stage == Stage::Succeeded => Some(Ok(())),
            Some(told) if told.stage == Stage::GivenUp => Some(Err(Refusal::Failed {
                message: match told.exit {
                    Some(exit) => format!(
                        "the script of {name} has failed {} times; its last exit status was {exit}",
                        told.runs
                    ),
                    None => format!("the script of {name} was cut off {} times", told.runs),
                },
            })),
            Some(_) | None if resting => gave_up(name, life),
            Some(_) | None => None,
        },
        Condition::Running | Condition::Ready if resting => gave_up(name, life),
        Condition::Running | Condition::Ready => None,
    }
}
