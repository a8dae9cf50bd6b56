//! The tree as a virtio-fs device: the hypervisor shares the guest's memory and its queues with this
//! process, which answers from several threads. What is in the queues is the guest's to write.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, RwLock};

use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};

use super::fuse::Fuse;
use super::server::THREADS;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Chain = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>;

/// Forgets, and requests.
const QUEUES: usize = 2;
const QUEUE_SIZE: usize = 1024;
const VERSION_1: u64 = 1 << 32;
const INDIRECT: u64 = 1 << 28;
/// The queues' events come on numbers of their own, after theirs.
const QUEUE_EVENTS: u16 = QUEUES as u16;

struct Device {
    memory: RwLock<Memory>,
    work: Mutex<Sender<(Chain, VringMutex)>>,
}

/// Answers the hypervisor that connects, until it is gone.
pub(super) fn serve(server: Arc<Server<Fuse>>, listener: UnixListener) -> Result<(), String> {
    let (work, todo) = channel();
    let todo = Arc::new(Mutex::new(todo));
    for _ in 0..THREADS {
        let (server, todo) = (server.clone(), todo.clone());
        super::server::spawn(move || answer(&server, &todo));
    }
    let memory = Memory::new(GuestMemoryMmap::new());
    let device = Device { memory: RwLock::new(memory.clone()), work: Mutex::new(work) };
    let text = |e: vhost_user_backend::Error| format!("the virtio-fs device: {e:?}");
    let mut daemon =
        VhostUserDaemon::new("flist".into(), Arc::new(device), memory).map_err(text)?;
    daemon.start(&mut Listener::from(listener)).map_err(text)?;
    // However it breaks off, the hypervisor is gone.
    let _ = daemon.wait();
    // Its threads wait for queues that nobody fills any more; they end with the process.
    std::mem::forget(daemon);
    Ok(())
}

/// One thread's part of the requests.
fn answer(server: &Server<Fuse>, todo: &Mutex<Receiver<(Chain, VringMutex)>>) {
    loop {
        let next = todo.lock().expect("not poisoned").recv();
        let Ok((chain, vring)) = next else { return };
        let head = chain.head_index();
        let memory = chain.memory().clone();
        let reader = Reader::from_descriptor_chain(&memory, chain.clone());
        let writer = VirtioFsWriter::new(&memory, chain);
        let length = match (reader, writer) {
            (Ok(reader), Ok(writer)) => {
                // What could not be answered was answered with an error.
                server.handle_message(reader, Writer::VirtioFs(writer), None, None).unwrap_or(0)
            }
            // A chain that leads out of the guest's memory.
            _ => 0,
        };
        // A guest that has taken its queue away waits for nothing.
        let _ = vring.add_used(head, u32::try_from(length).unwrap_or(0));
        let _ = vring.signal_used_queue();
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        VERSION_1 | INDIRECT | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, _: bool) {}

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        *self.memory.write().expect("not poisoned") = memory;
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _: vmm_sys_util::epoll::EventSet,
        vrings: &[VringMutex],
        _: usize,
    ) -> io::Result<()> {
        if event >= QUEUE_EVENTS {
            return Ok(());
        }
        let vring = &vrings[usize::from(event)];
        let memory = self.memory.read().expect("not poisoned").memory();
        let mut state = vring.get_mut();
        let chains = state.get_queue_mut().iter(memory).map_err(io::Error::other)?;
        let work = self.work.lock().expect("not poisoned");
        for chain in chains {
            work.send((chain, vring.clone())).map_err(io::Error::other)?;
        }
        Ok(())
    }
}
