//! The agent as a whole.

use std::{net::SocketAddr, sync::Arc};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{Options, server::Runtime};

/// Why the agent couldn't start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A part that isn't there yet.
    #[error("{0} is not built yet")]
    NotBuilt(&'static str),
}

/// The agent. [`open`](Self::open) adopts what an earlier one left; [`run`](Self::run) does the work.
pub struct Node {}

impl Node {
    /// Opens the agent's state, adopts the machines found there and binds the kubelet API.
    pub async fn open(options: Options) -> Result<Self, NodeError> {
        drop(options);
        Err(NodeError::NotBuilt("the agent"))
    }

    /// Becomes true when the Node is registered and the first complete set of pods was seen.
    #[must_use]
    pub fn ready(&self) -> watch::Receiver<bool> {
        watch::channel(false).1
    }

    /// Where the kubelet API listens.
    #[must_use]
    pub fn kubelet_address(&self) -> Option<SocketAddr> {
        None
    }

    /// The way to pods for callers in this process: what the kubelet API serves.
    #[must_use]
    pub fn runtime(&self) -> Option<Arc<dyn Runtime>> {
        None
    }

    /// Works until `stop` is cancelled, then stops the pods' machines unless they are to be kept.
    pub async fn run(self, stop: CancellationToken) -> Result<(), NodeError> {
        stop.cancelled().await;
        Ok(())
    }
}
