//! The Connect door: the virtual machine interface that metald made known, as Connect (JSON and
//! binary), gRPC and gRPC-Web on one port, and what Lodge adds to it. Translates; the words of
//! another system end here.

mod calls;
mod create;
mod decode;
mod describe;
mod fault;
mod http;
mod methods;
pub mod metrics;
pub mod proto;
mod tenants;
pub mod tls;
mod watch;

use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};

pub use http::serve;
pub use tenants::{Foreign, Quota, Tenants, Token};

use metrics::Metrics;

/// What a fuzzer tries.
#[cfg(fuzzing)]
pub fn fuzz(bytes: &[u8]) {
    decode::fuzz(bytes);
}

/// The owner of machines where nobody has to say who they are.
pub const DEFAULT_CUSTOMER: &str = "default-customer";
/// The word in `origin.door` of machines that came through here.
pub const DOOR: &str = "metald";

/// Folder, path.
pub type Beneath = dyn Fn(&Path, &Path) -> Result<(), String> + Send + Sync;

/// A call that has ended, for those who trace.
#[derive(Clone, Debug)]
pub struct Span {
    pub method: &'static str,
    /// The `traceparent` header that came with it.
    pub parent: Option<String>,
    pub took: std::time::Duration,
    /// `ok`, or the code of the error.
    pub code: &'static str,
    pub message: Option<String>,
    pub vm_id: String,
    pub customer: String,
}

/// What the door is told when it opens.
pub struct Settings {
    /// Host paths in requests lie below one of these.
    pub assets: Vec<PathBuf>,
    /// Whether a path is there and lies below the folder, links resolved; the error says why not.
    pub beneath: Box<Beneath>,
    pub tenants: Tenants,
    /// `auto` or the name of one.
    pub backend: String,
    /// `auto`, or how guest code is executed.
    pub accel: String,
    /// Gets a line of JSON for each call that changes something.
    pub audit: Box<dyn Fn(&str) + Send + Sync>,
    /// Gets what callers may have meant otherwise.
    pub warn: Box<dyn Fn(&str) + Send + Sync>,
    /// Gets each call that has ended.
    pub trace: Box<dyn Fn(Span) + Send + Sync>,
    /// The VMM that machines are given, for `/_/health`; the error says why there is none.
    pub health: Box<dyn Fn() -> Result<String, String> + Send + Sync>,
}

/// An open door. Shared by all its connections.
pub struct Door<C> {
    control: Arc<C>,
    settings: RwLock<Arc<Settings>>,
    metrics: Metrics,
    /// Where quotas are counted, one creation at a time.
    creating: tokio::sync::Mutex<()>,
}

impl<C> Door<C> {
    pub fn new(control: Arc<C>, settings: Settings) -> Arc<Self> {
        let (metrics, creating) = (Metrics::default(), tokio::sync::Mutex::default());
        let settings = RwLock::new(Arc::new(settings));
        Arc::new(Self { control, settings, metrics, creating })
    }

    /// Puts other settings in force for the calls that come.
    pub fn set(&self, settings: Settings) {
        *self.settings.write().expect("not poisoned") = Arc::new(settings);
    }

    fn settings(&self) -> Arc<Settings> {
        self.settings.read().expect("not poisoned").clone()
    }
}
