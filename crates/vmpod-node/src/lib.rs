//! The node agent: it makes this host a Kubernetes node whose pods are virtual machines.
//!
//! ```text
//! API ──▶ source ──▶ one worker per pod UID ──▶ machines, images, guests
//!             ▲        │  plan(desired, observed, now) → effects
//!             │        ▼  record on disk before every effect that can't be repeated
//!          status ◀── status(observed)
//! ```
//!
//! [`Node`] is the whole agent. What it decides is in pure functions; the files of its own that it needs to go on after a
//! crash are in `DIR/node`.

mod action;
mod admit;
mod agent;
mod backoff;
mod collect;
mod docker;
mod env;
mod events;
mod holders;
mod host;
mod image_gc;
mod image_pull;
mod last_words;
pub mod logs;
mod network;
mod node;
mod options;
mod plain;
mod plan;
mod pod;
mod prefetch;
mod pressure;
mod probe;
mod prober;
mod quantity;
mod record;
mod registration;
mod run_config;
pub mod server;
mod sidecars;
mod snapshots;
mod source;
mod status;
mod status_writer;
pub mod streaming;
mod tar;
mod translate;
mod volumes;
mod worker;
mod world;

pub use holders::{holder_scope, release_all};
pub use image_gc::{ImageGc, ImageRoom};
pub use network::{InvalidNetwork, NetworkMode};
pub use node::{Certificates, Node, NodeError};
pub use options::{Capacity, Kubelet, MachineDefaults, Options, Registries};
pub use plain::{PlainMachine, plain_machine};
pub use pressure::{BadThreshold, Eviction};
pub use record::RecordError;

/// How long a single request to the API may take.
const REQUEST: std::time::Duration = std::time::Duration::from_secs(10);

/// Bounds a request: a server that accepted it and fell silent mustn't stop what is repeated for ever.
pub(crate) async fn limited<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, kube::Error> {
    within(REQUEST, request).await
}

async fn within<T>(
    limit: std::time::Duration,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, kube::Error> {
    let silent = || kube::Error::Service(format!("no answer within {limit:?}").into());
    tokio::time::timeout(limit, request).await.unwrap_or_else(|_| Err(silent()))
}

/// An error and its sources in one line, for texts that users of the API see.
pub(crate) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        // Some libraries repeat their source in their own text.
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_silent_server_is_a_failed_request() {
        let limit = std::time::Duration::from_millis(10);
        let error = within(limit, std::future::pending::<Result<(), _>>()).await.unwrap_err();
        assert!(error_chain(&error).contains("no answer within 10ms"), "{error}");
        assert!(limited(async { Ok(()) }).await.is_ok());
    }
}
