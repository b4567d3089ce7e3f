//! The kubelet's HTTP API: what an API server, metrics-server and a person with rights ask of a node.
//!
//! The server knows HTTP, TLS, who may call, and the streaming protocols; what the pods are and how one
//! talks to a machine it learns from a [`Runtime`]. Every request, whatever its path, passes [`access`] first.

pub mod access;
mod guard;
mod listen;
mod metrics;
mod routes;
mod runtime;
mod sessions;
mod summary;
pub mod tls;

use std::{io, sync::Arc};

use axum::Router;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{access::Access, metrics::Metrics, tls::Serving};
pub use runtime::{
    AttachRequest, Duplex, ExecRequest, Exit, FsUsage, MachineStats, NodeStats, PodRef, PodStats, Runtime,
    RuntimeError, Streams, Target, TermSize, Usage,
};

/// What a server is made of.
pub struct Options {
    /// The Node's name: callers need rights on its subresources.
    pub node: String,
    /// Reviews tokens and rights.
    pub client: kube::Client,
    /// The certificates.
    pub serving: Serving,
    /// The agent.
    pub runtime: Arc<dyn Runtime>,
    /// What `/configz` tells: the agent's settings, without secrets.
    pub config: Value,
}

/// The server.
pub struct Server {
    app: Arc<App>,
}

struct App {
    access: Access,
    serving: Serving,
    runtime: Arc<dyn Runtime>,
    config: Value,
    metrics: Metrics,
    stop: CancellationToken,
    sessions: TaskTracker,
}

impl Server {
    /// Makes a server; [`serve`](Self::serve) starts it.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let app = App {
            access: Access::new(&options.node, options.client),
            serving: options.serving,
            runtime: options.runtime,
            config: options.config,
            metrics: Metrics::new(),
            stop: CancellationToken::new(),
            sessions: TaskTracker::new(),
        };
        Self { app: Arc::new(app) }
    }

    /// Serves until `stop`. Then sessions are cut off and other requests get a few seconds.
    pub async fn serve(self, listener: TcpListener, stop: CancellationToken) -> io::Result<()> {
        let address = listener.local_addr()?;
        tracing::info!(%address, "the kubelet API listens");
        let _cut_off = self.app.stop.clone().drop_guard();
        let sessions = self.app.stop.clone();
        let ends = stop.clone();
        tokio::spawn(async move {
            ends.cancelled().await;
            sessions.cancel();
        });
        listen::serve(listener, &self.app.serving, self.router(), stop).await;
        self.app.sessions.close();
        tokio::time::timeout(crate::streaming::GRACE, self.app.sessions.wait()).await.ok();
        Ok(())
    }

    fn router(&self) -> Router {
        routes::router(self.app.clone())
    }
}

#[cfg(test)]
mod tests;
