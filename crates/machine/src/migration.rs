//! Machines that come from other hosts and leave for them, as far as it concerns more than one
//! machine. How they travel is the host's affair.

use std::path::PathBuf;
use std::sync::Arc;

use lodge_spec::draft::Draft;
use lodge_spec::machine::Machine;
use lodge_spec::migration::{self, Expected, Migration};
use lodge_spec::names::MachineId;
use lodge_spec::request::Refusal;
use lodge_spec::resolve::{Defaults, resolve};
use lodge_spec::state::{State, Summary};
use serde_json::Value;
use tokio::sync::oneshot;

use crate::host::Host;
use crate::keeper::{Keeper, summary};
use crate::life::{Life, Saved};
use crate::record::Record;
use crate::store::now_us;
use crate::task::Message;

/// So many machines may be expected at a time; the ones expected first are forgotten first.
const EXPECTED: usize = 256;

/// What was done differently for a machine that was expected.
fn adapt(draft: &mut Draft, expected: &Expected) -> Result<(), Refusal> {
    let nics = draft.nics.get_or_insert_default();
    if nics.len() != expected.nics.len() {
        return Err(Refusal::failed(format!(
            "{} interfaces were prepared for it here, and it has {}",
            expected.nics.len(),
            nics.len()
        )));
    }
    for (nic, leads) in nics.iter_mut().zip(&expected.nics) {
        (nic.network, nic.wire) = (leads.network.clone(), leads.wire.clone());
    }
    draft.ports = Some(expected.ports.clone());
    if let Some(document) = draft.origin.as_mut().and_then(|o| o.document.as_mut()) {
        let mut value: Value = serde_json::from_str(document).map_err(Refusal::failed)?;
        for (pointer, new) in &expected.document {
            if let Some(place) = value.pointer_mut(pointer) {
                *place = new.clone();
            }
        }
        *document = value.to_string();
    }
    Ok(())
}

impl<H: Host> Keeper<H> {
    /// Notes what is to be different for a machine that will come.
    pub fn expect(&self, expected: Expected) {
        let mut all = self.expected.lock().expect("not poisoned");
        all.retain(|known| known.id != expected.id);
        if all.len() == EXPECTED {
            all.remove(0);
        }
        all.push(expected);
    }

    /// Takes up a machine that still runs on another host: suspended, until it is started with the
    /// memory that is to be written into the pipe.
    pub async fn admit(
        self: &Arc<Self>,
        arriving: Migration,
    ) -> Result<(MachineId, PathBuf), Refusal> {
        let Migration { version, mut draft, ready, bootstrap, passport } = arriving;
        if version != migration::VERSION {
            return Err(Refusal::failed(format!(
                "the other host speaks version {version} of moving machines; this one knows {}",
                migration::VERSION
            )));
        }
        let id: MachineId = draft.uuid.as_deref().unwrap_or_default().parse().map_err(|_| {
            Refusal::invalid("uuid", "a machine that comes from another host has an identity")
        })?;
        let expected = {
            let all = self.expected.lock().expect("not poisoned");
            all.iter().find(|known| known.id == id).cloned()
        };
        if let Some(expected) = &expected {
            adapt(&mut draft, expected)?;
        }
        let invalid = |p: lodge_spec::Problems| Refusal::Invalid { problems: p.0 };
        let machine = resolve(draft, Defaults { id }).map_err(invalid)?;
        self.check_neighbours(&machine)?;
        let life = Life { state: State::Suspended, saved: Some(Saved { ready }), ..Life::new() };
        let now = now_us();
        let (created_us, modified_us) = (now, now);
        let record = Record { created_us, modified_us, machine, life, running: None, bootstrap };
        let machine = Arc::new(record.machine.clone());
        self.take_in(record, "arrives").await?;
        match self.host().admit(machine, passport).await {
            Ok(memory) => {
                self.expected.lock().expect("not poisoned").retain(|known| known.id != id);
                Ok((id, memory))
            }
            Err(why) => {
                self.give_up(id).await;
                Err(Refusal::failed(why))
            }
        }
    }

    /// Forgets a machine that did not arrive.
    pub async fn give_up(&self, id: MachineId) {
        let remove = crate::Verb::Remove { force: true };
        // Gone already where it does not outlive its hypervisor.
        let _ = self.ask(&id.to_string(), remove, None).await;
    }

    /// Two machines of one network do not share an address, of either kind.
    fn check_neighbours(&self, machine: &Machine) -> Result<(), Refusal> {
        for other in self.records() {
            for theirs in &other.machine.nics {
                let same = |own: &&lodge_spec::machine::Nic| {
                    own.network == theirs.network
                        && (own.mac == theirs.mac
                            || own.address.is_some() && own.address == theirs.address)
                };
                if other.machine.id != machine.id
                    && let Some(own) = machine.nics.iter().find(same)
                {
                    let address = own.address.map(|a| format!("{a} or ")).unwrap_or_default();
                    return Err(Refusal::Taken {
                        what: "the address".into(),
                        value: format!("{address}{}", own.mac),
                        holder: format!("machine {} of this host", other.machine.name),
                    });
                }
            }
        }
        Ok(())
    }

    /// Moves a running machine to another host, and waits until it is gone here.
    pub async fn migrate(&self, target: &str, to: String) -> Result<Summary, Refusal> {
        let mut handle = self.handle(target)?;
        let (answer, answered) = oneshot::channel();
        let closed = || Refusal::failed("the machine has ended meanwhile");
        let message = Box::new(Message::Migrate { to, answer });
        handle.inbox.send(message).map_err(|_| closed())?;
        answered.await.map_err(|_| closed())??;
        let gone = handle.published.wait_for(|p| p.forgotten).await;
        Ok(summary(&gone.map_err(|_| closed())?.record))
    }
}
