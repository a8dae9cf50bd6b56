//! `events`: what happens to machines, as it happens. Compares each sight of a machine with the
//! one before.

use std::collections::BTreeMap;

use lodge_spec::request::{Reply, Request};
use lodge_spec::state::Event;

use super::changes::{Change, Told, between};
use super::run::{Done, End, Fault, Session};
use super::values::{Object, text};
use super::view::view;
use crate::native::wire::Client;

/// Follows until somebody ends it, or the reader goes away.
pub(super) async fn follow(
    session: &mut Session<'_, '_>,
    target: Option<String>,
    (full, json, ready): (bool, bool, bool),
) -> Done {
    let target = match target {
        Some(target) => Some(session.resolve("events", &target).await?),
        None => None,
    };
    if let Some(uuid) = &target
        && session.fetch(uuid).await?.is_none()
    {
        return Err(Fault::Error(format!("VM {uuid} not found")));
    }
    // A second conversation: the first one asks about each event.
    let mut told = session.client.another().await?;
    told.send(&Request::Events { target: target.clone(), follow: true, past: false }).await?;
    // From here on nothing is missed; what is known now is what changes are told against.
    first(&mut told).await?;
    let mut known = BTreeMap::new();
    for detail in session.all().await? {
        if let Ok(vm) = view(&detail, &session.place.zones, &session.place.settings) {
            known.insert(text(&vm, "uuid").unwrap_or("").to_owned(), vm);
        }
    }
    if ready {
        let at_us = now_us();
        let event = Told { kind: "ready", at_us, uuid: "-", vm: None, changes: &[] };
        tell(session, &event, full, json)?;
    }
    while let Some(reply) = told.next().await? {
        let Reply::Event { event } = reply else { continue };
        let uuid = event.id.to_string();
        if target.as_ref().is_none_or(|target| *target == uuid) {
            heard(session, &mut known, &event, &uuid, (full, json)).await?;
        }
    }
    Ok(End::Status(0))
}

async fn first(told: &mut Client) -> Result<(), Fault> {
    match told.next().await? {
        Some(Reply::Refused { refusal }) => Err(Fault::Error(refusal.to_string())),
        Some(_) | None => Ok(()),
    }
}

async fn heard(
    session: &mut Session<'_, '_>,
    known: &mut BTreeMap<String, Object>,
    event: &Event,
    uuid: &str,
    (full, json): (bool, bool),
) -> Result<(), Fault> {
    let at_us = event.at_us;
    let old = known.get(uuid).cloned();
    // One that is about to go can still be seen when its end is told.
    let seen = match event.kind.as_str() {
        "removed" => None,
        _ => session.fetch(uuid).await?,
    };
    let new = match seen {
        Some(detail) => view(&detail, &session.place.zones, &session.place.settings).ok(),
        None => None,
    };
    let mut say = |kind: &str, vm: &Object, changes: &[Change]| {
        tell(session, &Told { kind, at_us, uuid, vm: Some(vm), changes }, full, json)
    };
    match (old, new) {
        (None, Some(new)) => {
            say("create", &new, &[])?;
            known.insert(uuid.to_owned(), new);
        }
        (Some(old), None) => {
            say("delete", &old, &[])?;
            known.remove(uuid);
        }
        (Some(old), Some(new)) => {
            let changes = between(&old, &new);
            if !changes.is_empty() {
                say("modify", &new, &changes)?;
            }
            known.insert(uuid.to_owned(), new);
        }
        // A machine of another interface, or one that was gone before it was looked at.
        (None, None) => {}
    }
    Ok(())
}

fn tell(
    session: &mut Session<'_, '_>,
    event: &Told<'_>,
    full: bool,
    json: bool,
) -> Result<(), Fault> {
    let text = if json { format!("{}\n", event.to_json()) } else { event.to_text(full) };
    session.place.stdout.write_all(text.as_bytes())?;
    session.place.stdout.flush()?;
    Ok(())
}

fn now_us() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    i64::try_from(now.unwrap_or_default().as_micros()).unwrap_or(i64::MAX)
}
