//! All that a door ever talks to.

use std::future::Future;

use lodge_spec::request::{Reply, Request};
use tokio::sync::mpsc::Sender;

/// Whoever carries requests out.
pub trait Control: Send + Sync + 'static {
    /// Carries one request out. Most are answered by one reply, some by a stream that ends when
    /// the sender is dropped; a closed receiver means that nobody waits any more.
    fn ask(&self, request: Request, replies: Sender<Reply>) -> impl Future<Output = ()> + Send;
}
