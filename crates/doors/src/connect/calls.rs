//! The calls, each a question or two to `Control`. The rules of their life cycle are here; what a
//! machine may do in which state is decided behind `Control` all the same.

use std::sync::Arc;

use connectrpc::{ConnectError, ErrorCode};
use lodge_spec::request::{Page, Refusal, Reply, Request};
use lodge_spec::state::{Detail, Usage};

use super::create::{self, Translated, identity, is_vm_id};
use super::fault::{invalid, not_found, precondition, refused};
use super::proto::vmprovisioner::v1::{
    BootVmRequest, BootVmResponse, CreateVmRequest, CreateVmResponse, DeleteVmRequest,
    DeleteVmResponse, GetVmInfoRequest, GetVmInfoResponse, ListVmsRequest, ListVmsResponse,
    PauseVmRequest, PauseVmResponse, RebootVmRequest, RebootVmResponse, ResumeVmRequest,
    ResumeVmResponse, ShutdownVmRequest, ShutdownVmResponse, VmState,
};
use super::tenants::{Caller, Foreign, Quota};
use super::{DOOR, Door, describe};
use crate::control::{self, Control};

/// Seconds that a guest has where nobody says.
const GRACE: u64 = 30;
const PAGE: usize = 50;
const LARGEST_PAGE: i32 = 1000;

type Answer<T> = Result<T, ConnectError>;

impl<C: Control> Door<C> {
    pub(super) async fn ask(&self, request: Request) -> Result<Reply, Refusal> {
        control::ask(&self.control, request).await
    }

    /// A machine that the caller may know of.
    pub(super) async fn find(&self, caller: &Caller, vm_id: &str) -> Answer<Detail> {
        if vm_id.is_empty() {
            return Err(invalid("vm_id is required"));
        }
        let target = identity(vm_id).to_string();
        let detail = match self.ask(Request::Fetch { target }).await {
            Ok(Reply::Detail { machine }) => *machine,
            Ok(_) | Err(Refusal::NotFound { .. }) => return Err(not_found(vm_id)),
            Err(refusal) => return Err(refused("find", vm_id, &refusal, &[])),
        };
        let Some(origin) = detail.origin.as_ref().filter(|o| o.door == DOOR && o.id == vm_id)
        else {
            return Err(not_found(vm_id));
        };
        if caller.sees().is_some_and(|customer| customer != origin.owner) {
            return Err(match self.settings().tenants.foreign {
                Foreign::NotFound => not_found(vm_id),
                Foreign::Denied => ConnectError::new(
                    ErrorCode::PermissionDenied,
                    "access denied: VM not owned by customer",
                ),
            });
        }
        Ok(detail)
    }

    async fn page(&self, page: Page) -> Answer<(Vec<Detail>, usize, bool)> {
        match self.ask(Request::Page(page)).await {
            Ok(Reply::Page { machines, total, more }) => Ok((machines, total, more)),
            Ok(_) => Err(ConnectError::internal("failed to list vms: no page came")),
            Err(refusal) => Err(refused("list", "", &refusal, &[])),
        }
    }

    pub(super) async fn all(&self, caller: &Caller) -> Answer<Vec<Detail>> {
        let owner = caller.sees().map(str::to_owned);
        let page =
            Page { door: DOOR.into(), owner, states: vec![], after: None, limit: usize::MAX };
        Ok(self.page(page).await?.0)
    }

    pub(super) async fn usage(&self, target: String) -> Usage {
        match self.ask(Request::Usage { target, each_cpu: false }).await {
            Ok(Reply::Usage { usage }) => *usage,
            // It may have ended since; then it uses nothing.
            Ok(_) | Err(_) => Usage::default(),
        }
    }

    pub(super) async fn create(
        self: &Arc<Self>,
        caller: &Caller,
        request: CreateVmRequest,
    ) -> Answer<CreateVmResponse> {
        let CreateVmRequest { vm_id, config, customer_id, .. } = request;
        let Some(mut config) = config.into_option() else {
            return Err(invalid("vm config is required"));
        };
        let owner = caller.owner(&customer_id)?;
        let vm_id = match vm_id.as_str() {
            "" => format!("ud-{}", &uuid::Uuid::new_v4().simple().to_string()[..16]),
            id if is_vm_id(id) => vm_id,
            id => {
                return Err(invalid(format!(
                    "vm_id {id:?} is not 1 to 63 letters, digits, hyphens or underscores"
                )));
            }
        };
        let settings = self.settings();
        let Translated { draft, order } =
            create::translate(&mut config, &vm_id, &owner, &settings).map_err(invalid)?;
        let _one = match settings.tenants.quota(&owner) {
            Some(quota) => {
                let one = self.creating.lock().await;
                self.check_quota(quota, &owner, &config).await?;
                Some(one)
            }
            None => None,
        };
        match self.ask(Request::Create { draft: Box::new(draft) }).await {
            Ok(_) => {
                let state = VmState::Created.into();
                Ok(CreateVmResponse { vm_id, state })
            }
            Err(refusal) => Err(refused("create", &vm_id, &refusal, &order)),
        }
    }

    async fn check_quota(
        &self,
        quota: &Quota,
        owner: &str,
        config: &super::proto::vmprovisioner::v1::VmConfig,
    ) -> Answer<()> {
        let Quota { vms, vcpus, memory_bytes } = quota;
        let sums = vcpus.is_some() || memory_bytes.is_some();
        let page = Page {
            door: DOOR.into(),
            owner: Some(owner.to_owned()),
            states: Vec::new(),
            after: None,
            limit: if sums { usize::MAX } else { 0 },
        };
        let (machines, total, _) = self.page(page).await?;
        let exhausted = |what: &str, most: u64| {
            let message = format!("quota of customer {owner} exceeded: {most} {what}");
            Err(ConnectError::new(ErrorCode::ResourceExhausted, message))
        };
        if let Some(most) = vms.filter(|most| total >= *most) {
            return exhausted("VMs", most as u64);
        }
        let wanted = u64::try_from(config.cpu.vcpu_count).unwrap_or(0);
        let used: u64 = machines.iter().map(|m| u64::from(m.summary.cpus)).sum();
        if let Some(most) = vcpus.filter(|most| used + wanted > *most) {
            return exhausted("vCPUs", most);
        }
        let wanted = u64::try_from(config.memory.size_bytes).unwrap_or(0);
        let used: u64 = machines.iter().map(|m| m.summary.memory_bytes).sum();
        if let Some(most) = memory_bytes.filter(|most| used + wanted > *most) {
            return exhausted("bytes of memory", most);
        }
        Ok(())
    }

    /// Asks for a verb; the answer is the state after it.
    async fn verb(&self, verb: &str, vm_id: &str, request: Request) -> Answer<VmState> {
        match self.ask(request).await {
            Ok(Reply::Summary { machine }) => Ok(describe::state(machine.state)),
            Ok(_) => Err(ConnectError::internal(format!("failed to {verb} vm: no answer came"))),
            Err(refusal) => Err(refused(verb, vm_id, &refusal, &[])),
        }
    }

    pub(super) async fn delete(
        &self,
        caller: &Caller,
        request: DeleteVmRequest,
    ) -> Answer<DeleteVmResponse> {
        let DeleteVmRequest { vm_id, force, .. } = request;
        let detail = self.find(caller, &vm_id).await?;
        let state = describe::state(detail.summary.state);
        if matches!(state, VmState::Running | VmState::Paused) && !force {
            return Err(wrong_state(
                "delete",
                &vm_id,
                state,
                "; set force to delete it all the same",
            ));
        }
        let target = detail.summary.id.to_string();
        self.verb("delete", &vm_id, Request::Remove { target, force }).await?;
        Ok(DeleteVmResponse { success: true })
    }

    pub(super) async fn boot(
        &self,
        caller: &Caller,
        request: BootVmRequest,
    ) -> Answer<BootVmResponse> {
        let BootVmRequest { vm_id, .. } = request;
        let detail = self.find(caller, &vm_id).await?;
        let state = describe::state(detail.summary.state);
        if !matches!(state, VmState::Created | VmState::Shutdown) {
            return Err(wrong_state("boot", &vm_id, state, ""));
        }
        let target = detail.summary.id.to_string();
        let state = self.verb("boot", &vm_id, Request::Start { target }).await?;
        Ok(BootVmResponse { success: true, state: state.into() })
    }

    pub(super) async fn shutdown(
        &self,
        caller: &Caller,
        request: ShutdownVmRequest,
    ) -> Answer<ShutdownVmResponse> {
        let ShutdownVmRequest { vm_id, force, timeout_seconds, .. } = request;
        let detail = self.find(caller, &vm_id).await?;
        let seconds = match u64::try_from(timeout_seconds) {
            Ok(0) => GRACE,
            Ok(seconds) => seconds,
            Err(_) => return Err(invalid("timeout_seconds must not be negative")),
        };
        let state = describe::state(detail.summary.state);
        if state == VmState::Created {
            return Err(wrong_state("shutdown", &vm_id, state, ""));
        }
        let target = detail.summary.id.to_string();
        let stop = Request::Stop { target, force, timeout_ms: seconds * 1000 };
        let state = self.verb("shutdown", &vm_id, stop).await?;
        Ok(ShutdownVmResponse { success: true, state: state.into() })
    }

    pub(super) async fn pause(
        &self,
        caller: &Caller,
        request: PauseVmRequest,
    ) -> Answer<PauseVmResponse> {
        let PauseVmRequest { vm_id, .. } = request;
        let target = self.find(caller, &vm_id).await?.summary.id.to_string();
        let state = self.verb("pause", &vm_id, Request::Pause { target }).await?;
        Ok(PauseVmResponse { success: true, state: state.into() })
    }

    pub(super) async fn resume(
        &self,
        caller: &Caller,
        request: ResumeVmRequest,
    ) -> Answer<ResumeVmResponse> {
        let ResumeVmRequest { vm_id, .. } = request;
        let target = self.find(caller, &vm_id).await?.summary.id.to_string();
        let state = self.verb("resume", &vm_id, Request::Resume { target }).await?;
        Ok(ResumeVmResponse { success: true, state: state.into() })
    }

    pub(super) async fn reboot(
        &self,
        caller: &Caller,
        request: RebootVmRequest,
    ) -> Answer<RebootVmResponse> {
        let RebootVmRequest { vm_id, force, .. } = request;
        let detail = self.find(caller, &vm_id).await?;
        let (state, target) =
            (describe::state(detail.summary.state), detail.summary.id.to_string());
        let state = match (state, force) {
            (VmState::Running, false) => {
                let restart = Request::Restart { target, timeout_ms: GRACE * 1000 };
                self.verb("reboot", &vm_id, restart).await?
            }
            (VmState::Running | VmState::Paused, true) => {
                self.verb("reboot", &vm_id, Request::Reset { target: target.clone() }).await?;
                self.verb("reboot", &vm_id, Request::Resume { target }).await?
            }
            (VmState::Paused, false) => {
                return Err(wrong_state("reboot", &vm_id, state, "; set force to reset it"));
            }
            (VmState::Created | VmState::Shutdown | VmState::Unspecified, _) => {
                return Err(wrong_state("reboot", &vm_id, state, ""));
            }
        };
        Ok(RebootVmResponse { success: true, state: state.into() })
    }

    pub(super) async fn info(
        &self,
        caller: &Caller,
        request: GetVmInfoRequest,
    ) -> Answer<GetVmInfoResponse> {
        let vm_id = request.vm_id;
        let detail = self.find(caller, &vm_id).await?;
        let usage = match detail.summary.state.is_live() {
            true => self.usage(detail.summary.id.to_string()).await,
            false => Usage::default(),
        };
        describe::info(&detail, &usage)
            .map_err(|refusal| ConnectError::internal(format!("failed to get vm info: {refusal}")))
    }

    pub(super) async fn list(
        &self,
        caller: &Caller,
        request: ListVmsRequest,
    ) -> Answer<ListVmsResponse> {
        let ListVmsRequest { state_filter, page_size, page_token, .. } = request;
        let mut states = Vec::new();
        for state in &state_filter {
            match state.as_known() {
                Some(VmState::Unspecified) | None => {
                    return Err(invalid(format!(
                        "state_filter: {} is no state to ask for",
                        state.to_i32()
                    )));
                }
                Some(known) => states.extend(describe::states(known)),
            }
        }
        let limit = match page_size {
            0 => PAGE,
            1..=LARGEST_PAGE => page_size as usize,
            i32::MIN..0 => return Err(invalid("page_size must not be negative")),
            _ => LARGEST_PAGE as usize,
        };
        let scope = scope(caller, &state_filter.iter().map(|s| s.to_i32()).collect::<Vec<_>>());
        let after = match page_token.as_str() {
            "" => None,
            token => Some(
                token_from(token, &scope)
                    .ok_or_else(|| invalid("page_token is not one that was given for this list"))?,
            ),
        };
        let owner = caller.sees().map(str::to_owned);
        let page = Page { door: DOOR.into(), owner, states, after, limit };
        let (machines, total, more) = self.page(page).await?;
        let last = machines.last().filter(|_| more);
        let next = last.map(|m| token_of(m.created_us, &m.summary.id.to_string(), &scope));
        Ok(ListVmsResponse {
            vms: machines.iter().map(describe::listed).collect(),
            next_page_token: next.unwrap_or_default(),
            total_count: i32::try_from(total).unwrap_or(i32::MAX),
        })
    }
}

fn wrong_state(verb: &str, vm_id: &str, state: VmState, hint: &str) -> ConnectError {
    use buffa::Enumeration;
    precondition(format!("cannot {verb} VM {vm_id}: it is in {}{hint}", state.proto_name()))
}

/// What a page token is bound to: whose list it is, of which states.
fn scope(caller: &Caller, states: &[i32]) -> String {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(format!("{:?} {states:?}", caller.sees()));
    digest.iter().take(4).map(|b| format!("{b:02x}")).collect()
}

fn token_of(created_us: i64, id: &str, scope: &str) -> String {
    format!("{created_us:x}.{}.{scope}", id.replace('-', ""))
}

fn token_from(token: &str, scope: &str) -> Option<(i64, lodge_spec::names::MachineId)> {
    let mut parts = token.split('.');
    let created_us = i64::from_str_radix(parts.next()?, 16).ok()?;
    let id = uuid::Uuid::try_parse(parts.next()?).ok()?;
    (parts.next()? == scope && parts.next().is_none())
        .then_some((created_us, lodge_spec::names::MachineId(id)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_tokens_are_bound_to_their_list() {
        let a = scope(&Caller::Customer("a".into()), &[2]);
        let id = "b8ab5fc1-8576-45ef-bb51-9826b52a4651";
        let token = token_of(1_795_174_459_123_456, id, &a);
        let (created, found) = token_from(&token, &a).unwrap();
        assert_eq!((created, found.to_string()), (1_795_174_459_123_456, id.to_owned()));
        for other in [scope(&Caller::Customer("b".into()), &[2]), scope(&Caller::Anyone, &[])] {
            assert!(token_from(&token, &other).is_none());
        }
        for bad in ["", "zzz", "1.2.3", "..", &format!("{token}.x")] {
            assert!(token_from(bad, &a).is_none(), "{bad}");
        }
    }
}
