//! Which machines there are, found by their identities and names. Knows no rule about them.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeSet, HashMap};
use std::hash::BuildHasher;
use std::sync::Arc;

use lodge_spec::names::MachineId;
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use crate::record::Record;
use crate::task::{Message, Published};

/// The way to one machine's task, and what it last told.
#[derive(Clone)]
pub(crate) struct Handle {
    pub(crate) inbox: mpsc::UnboundedSender<Box<Message>>,
    pub(crate) published: watch::Receiver<Published>,
}

impl Handle {
    pub(crate) fn record(&self) -> Arc<Record> {
        self.published.borrow().record.clone()
    }

    fn is_named(&self, name: &str) -> bool {
        self.published.borrow().record.machine.name.as_str() == name
    }
}

#[derive(Default)]
pub(crate) struct Roster {
    machines: HashMap<MachineId, Handle>,
    /// A name stands in its record alone; this holds what it hashes to.
    names: BTreeSet<(u64, MachineId)>,
    hasher: RandomState,
}

impl Roster {
    /// Takes a machine up. Its name stays what it is.
    pub(crate) fn insert(&mut self, id: MachineId, handle: Handle) {
        let hash = self.hasher.hash_one(handle.record().machine.name.as_str());
        self.names.insert((hash, id));
        self.machines.insert(id, handle);
    }

    pub(crate) fn remove(&mut self, id: MachineId) {
        if let Some(handle) = self.machines.remove(&id) {
            let hash = self.hasher.hash_one(handle.record().machine.name.as_str());
            self.names.remove(&(hash, id));
        }
    }

    pub(crate) fn get(&self, id: MachineId) -> Option<&Handle> {
        self.machines.get(&id)
    }

    pub(crate) fn named(&self, name: &str) -> Option<&Handle> {
        let hash = self.hasher.hash_one(name);
        let same = (hash, MachineId(Uuid::nil()))..=(hash, MachineId(Uuid::max()));
        let mut found = self.names.range(same).filter_map(|(_, id)| self.machines.get(id));
        found.find(|handle| handle.is_named(name))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (MachineId, &Handle)> {
        self.machines.iter().map(|(id, handle)| (*id, handle))
    }
}
