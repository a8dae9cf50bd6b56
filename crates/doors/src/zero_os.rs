//! The Zero-OS door: the Redis protocol with jobs in it, as the clients of Zero-OS speak it.
//! Commands about virtual machines become requests; the words of that system end here.

mod auth;
mod create;
mod describe;
mod events;
mod iotune;
mod jobs;
mod keys;
mod kvm;
mod nics;
mod resp;
mod session;
mod statistics;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use lodge_spec::request::{Refusal, Reply, Request};
use tokio::sync::mpsc::Receiver;

pub use auth::Organization;
pub use nics::Links;
pub use session::serve;

use crate::control::{self, Control};
use jobs::Logs;
use keys::Keys;
use statistics::Statistics;

/// The word in `origin.door` of machines that came through here.
pub const DOOR: &str = "zero-os";

/// What the door is told when it opens.
pub struct Settings {
    /// Whoever comes shows that they belong to it; nobody has to where it is absent.
    pub organization: Option<Organization>,
    /// Where blocks of flists are that do not say so themselves.
    pub storage: Option<String>,
    pub links: Links,
    /// Host address on which machines show their screens; they have none where it is absent.
    pub screens: Option<IpAddr>,
    /// `auto`, or how guest code is executed.
    pub accel: String,
    pub version: String,
}

/// An open door. Shared by all its connections.
pub struct Door<C> {
    control: Arc<C>,
    settings: Settings,
    keys: Keys,
    logs: Logs,
    statistics: Statistics,
    /// The number of the machine that was made last; addresses follow from it.
    sequence: AtomicU32,
    /// One machine is made at a time, so that names and numbers are given once.
    creating: tokio::sync::Mutex<()>,
    /// Jobs of one queue are done one after the other.
    queues: std::sync::Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl<C: Control> Door<C> {
    pub fn new(control: Arc<C>, settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            control,
            settings,
            keys: Keys::default(),
            logs: Logs::default(),
            statistics: Statistics::default(),
            sequence: AtomicU32::new(1),
            creating: tokio::sync::Mutex::default(),
            queues: std::sync::Mutex::default(),
        })
    }

    async fn ask(&self, request: Request) -> Result<Reply, Refusal> {
        control::ask(&self.control, request).await
    }

    fn hear(&self, request: Request) -> Receiver<Reply> {
        control::hear(&self.control, request)
    }
}
