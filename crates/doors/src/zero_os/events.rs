//! What happens to machines, as messages of the job `kvm.events`, which runs as long as the door
//! is open.

use std::collections::BTreeMap;
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
        "created" => ("defined", "added"),
        "redefined" | "changed" => ("defined", "updated"),
        "removed" => ("undefined", "removed"),
        "running" => ("started", "booted"),
        "paused" => ("suspended", "paused"),
        "resumed" => ("resumed", "unpaused"),
        "stopping" | "stop" => ("shutdown", "finished"),
        "stopped" => ("stopped", "shutdown"),
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
        let request = Request::Events { target: None, follow: true, past: false };
        let mut replies = self.hear(request);
        while let Some(reply) = replies.recv().await {
            let Reply::Event { event } = reply else { continue };
            let Some((word, detail)) = words(&event) else { continue };
            if !names.contains_key(&event.id) {
                let Ok(machine) = self.find(&event.id.to_string()).await else { continue };
                names.insert(event.id, machine.name);
            }
            sequence += 1;
            let message = json!({
                "uuid": event.id.to_string(),
                "name": names[&event.id],
                "event": word,
                "detail": detail,
                "sequence": sequence,
            });
            log.say(record(JOB, &message.to_string(), 0));
            if event.kind == "removed" {
                names.remove(&event.id);
            }
        }
    }
}
