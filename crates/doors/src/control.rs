//! All that a door ever talks to.

use std::future::Future;

use std::sync::Arc;

use lodge_spec::request::{Refusal, Reply, Request};
use tokio::sync::mpsc::{self, Receiver, Sender};

/// Whoever carries requests out.
pub trait Control: Send + Sync + 'static {
    /// Carries one request out. Most are answered by one reply, some by a stream that ends when
    /// the sender is dropped; a closed receiver means that nobody waits any more.
    fn ask(&self, request: Request, replies: Sender<Reply>) -> impl Future<Output = ()> + Send;
}

/// All replies to a request. What was asked is done even if the receiver is dropped.
pub(crate) fn hear<C: Control>(control: &Arc<C>, request: Request) -> Receiver<Reply> {
    let (sender, replies) = mpsc::channel(64);
    let control = control.clone();
    tokio::spawn(async move { control.ask(request, sender).await });
    replies
}

/// The last reply to a request.
pub(crate) async fn ask<C: Control>(control: &Arc<C>, request: Request) -> Result<Reply, Refusal> {
    let mut replies = hear(control, request);
    let mut last = Err(Refusal::failed("no answer came"));
    while let Some(reply) = replies.recv().await {
        last = match reply {
            Reply::Refused { refusal } => Err(refusal),
            reply => Ok(reply),
        };
    }
    last
}
