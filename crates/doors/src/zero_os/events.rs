//! What happens to machines, as messages of the job `kvm.events`, which runs as long as the door
//! is open.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lodge_spec::names::MachineId;
use lodge_spec::request::{Reply, Request};
use lodge_spec::state::Event;
use serde_json::json;

use super::Door;
use super::jobs::record;
use crate::control::Control;

pub(super) const JOB: &str = "kvm.events";

/// The words of that system for one of ours: event and detail.
fn words(event: &Event) -> Option<(&'static str, &'static str)> {
    Some(match event.kind.as_str() {
        "created" | "arrives" => ("defined", "added"),
        "redefined" | "changed" => ("defined", "updated"),
        "removed" => ("undefined", "removed"),
        "running" => ("started", "booted"),
        "paused" => ("suspended", "paused"),
        "resumed" => ("resumed", "unpaused"),
        "stop" => ("shutdown", "finished"),
        "migrated" => ("stopped", "migrated"),
        "exited" => ("stopped", "shutdown"),
        "failed" => ("stopped", "crashed"),
        _ => return None,
    })
}

impl<C: Control> Door<C> {
    /// Tells events for ever.
    pub(super) async fn tell_events(self: Arc<Self>) {
        let log = self.open_events();
        let mut sequence = 0u64;
        // What machines are called here, for when they are gone.
        let mut names: BTreeMap<MachineId, String> = BTreeMap::new();
        let mut running: BTreeSet<MachineId> = BTreeSet::new();
        // Those that come from another host, and those that have left for one.
        let (mut arriving, mut left) = (BTreeSet::new(), BTreeSet::new());
        let request = Request::Events { target: None, follow: true, past: false };
        let mut replies = self.hear(request);
        while let Some(reply) = replies.recv().await {
            let Reply::Event { event } = reply else { continue };
            let Some(words) = words(&event) else { continue };
            let name = match names.entry(event.id) {
                Entry::Occupied(known) => known.get().clone(),
                Entry::Vacant(place) => match self.find(&event.id.to_string()).await {
                    Ok(machine) => place.insert(machine.name).clone(),
                    // Another door's.
                    Err(_) => continue,
                },
            };
            let mut all = vec![words];
            match event.kind.as_str() {
                "arrives" => drop(arriving.insert(event.id)),
                "running" if arriving.remove(&event.id) => all = vec![("started", "migrated")],
                "migrated" => drop(left.insert(event.id)),
                // It has stopped already.
                "exited" if left.remove(&event.id) => continue,
                _ => {}
            }
            match words.0 {
                "started" => drop(running.insert(event.id)),
                "stopped" => drop(running.remove(&event.id)),
                // One that was taken away while it ran has stopped before.
                "undefined" if running.remove(&event.id) => {
                    all.insert(0, ("stopped", "destroyed"));
                }
                _ => {}
            }
            for (word, detail) in all {
                sequence += 1;
                let message = json!({
                    "uuid": event.id.to_string(),
                    "name": name,
                    "event": word,
                    "detail": detail,
                    "sequence": sequence,
                });
                log.say(record(JOB, &message.to_string(), 0));
            }
            if event.kind == "removed" {
                names.remove(&event.id);
            }
        }
    }
}
