//! Hearing of changes: what the older interface lacks, as a stream and as one long call.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use connectrpc::{CodecFormat, ConnectError, RequestContext, Response};
use futures_util::stream;
use lodge_spec::names::MachineId;
use lodge_spec::request::{Condition, Reply, Request};
use lodge_spec::state::{Detail, Event};
use tokio::sync::mpsc;

use super::decode;
use super::fault::{invalid, refused};
use super::proto::lodge::v1::{WaitVmRequest, WaitVmResponse, WatchVmsRequest, WatchVmsResponse};
use super::proto::vmprovisioner::v1::VmState;
use super::tenants::Caller;
use super::{DOOR, Door, describe};
use crate::control::Control;

type Changes = Result<Response<connectrpc::EncodedStream>, ConnectError>;

/// The caller's machines as they are, then each change.
pub(super) async fn watch<C: Control>(
    door: &Arc<Door<C>>,
    context: &RequestContext,
    body: &[u8],
    format: CodecFormat,
    unknown: &mut decode::Unknown,
) -> Changes {
    let request: WatchVmsRequest = decode::message(body, format, "WatchVmsRequest", unknown)?;
    let caller = door.settings().tenants.caller(context.headers())?;
    let only = match request.vm_id.as_str() {
        "" => None,
        vm_id => Some(door.find(&caller, vm_id).await?.summary.id),
    };
    let (sender, receiver) = mpsc::channel(64);
    // Subscribed before the first look, so that nothing falls between the two.
    let (replies, events) = mpsc::channel(64);
    let (control, own) = (door.control.clone(), door.clone());
    tokio::spawn(async move {
        control.ask(Request::Events { target: None, follow: true, past: false }, replies).await;
    });
    tokio::spawn(async move { own.tell(caller, only, events, sender).await });
    let messages = stream::unfold(receiver, move |mut receiver| async move {
        let message: Result<WatchVmsResponse, ConnectError> = receiver.recv().await?;
        let encoded = message.and_then(|m| decode::encode(&m, format)).map(Bytes::into);
        Some((encoded, receiver))
    });
    Ok(Response::stream(messages))
}

impl<C: Control> Door<C> {
    async fn tell(
        &self,
        caller: Caller,
        only: Option<MachineId>,
        mut events: mpsc::Receiver<Reply>,
        sender: mpsc::Sender<Result<WatchVmsResponse, ConnectError>>,
    ) {
        if events.recv().await != Some(Reply::Done) {
            return;
        }
        let mut known: HashMap<MachineId, String> = HashMap::new();
        let present = match self.all(&caller).await {
            Ok(present) => present,
            Err(error) => return drop(sender.send(Err(error)).await),
        };
        let wanted = |id: MachineId| only.is_none_or(|only| only == id);
        for detail in present.iter().filter(|d| wanted(d.summary.id)) {
            known.insert(detail.summary.id, describe::vm_id(detail));
            let message = WatchVmsResponse {
                vm_id: describe::vm_id(detail),
                state: describe::state(detail.summary.state).into(),
                event: "present".into(),
                detail: String::new(),
                at_us: detail.modified_us,
            };
            if sender.send(Ok(message)).await.is_err() {
                return;
            }
        }
        loop {
            let reply = tokio::select! {
                reply = events.recv() => reply,
                () = sender.closed() => return,
            };
            let Some(Reply::Event { event }) = reply else { return };
            if !wanted(event.id) {
                continue;
            }
            if let Some(message) = self.change(&caller, &mut known, event).await
                && sender.send(Ok(message)).await.is_err()
            {
                return;
            }
        }
    }

    /// What an event means to the caller; nothing, where it is about somebody else's machine.
    async fn change(
        &self,
        caller: &Caller,
        known: &mut HashMap<MachineId, String>,
        event: Event,
    ) -> Option<WatchVmsResponse> {
        let fetched = self.ask(Request::Fetch { target: event.id.to_string() }).await;
        let detail: Option<Detail> = match fetched {
            Ok(Reply::Detail { machine }) => Some(*machine),
            Ok(_) | Err(_) => None,
        };
        if let Some(detail) = &detail {
            let origin = detail.origin.as_ref().filter(|o| o.door == DOOR)?;
            if caller.sees().is_some_and(|customer| customer != origin.owner) {
                return None;
            }
            known.insert(event.id, origin.id.clone());
        }
        let vm_id = known.get(&event.id)?.clone();
        let state = detail.map_or(VmState::Unspecified, |d| describe::state(d.summary.state));
        let Event { kind, detail, at_us, .. } = event;
        let state = state.into();
        Some(WatchVmsResponse { vm_id, state, event: kind, detail, at_us })
    }

    /// Answers when the machine is as asked.
    pub(super) async fn wait(
        &self,
        caller: &Caller,
        request: WaitVmRequest,
    ) -> Result<WaitVmResponse, ConnectError> {
        let WaitVmRequest { vm_id, until, timeout_seconds, .. } = request;
        let detail = self.find(caller, &vm_id).await?;
        let until = match until.as_str() {
            "running" => Condition::Running,
            "ready" => Condition::Ready,
            "stopped" => Condition::Stopped,
            "bootstrap" => Condition::Bootstrap,
            other => {
                let what = format!("until: {other:?} is not running, ready, stopped or bootstrap");
                return Err(invalid(what));
            }
        };
        let timeout = match u64::try_from(timeout_seconds) {
            Ok(0) => None,
            Ok(seconds) => Some(Duration::from_secs(seconds)),
            Err(_) => return Err(invalid("timeout_seconds must not be negative")),
        };
        let timeout_ms = timeout.map(|t| t.as_millis() as u64);
        let target = detail.summary.id.to_string();
        match self.ask(Request::Wait { target, until, timeout_ms }).await {
            Ok(Reply::Summary { machine }) => {
                let state = describe::state(machine.state).into();
                Ok(WaitVmResponse { vm_id, state })
            }
            Ok(_) => Err(ConnectError::internal("failed to wait for vm: no answer came")),
            Err(refusal) => Err(refused("wait for", &vm_id, &refusal, &[])),
        }
    }
}
