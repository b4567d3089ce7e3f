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

mod admit;
mod agent;
mod backoff;
mod collect;
mod env;
mod events;
mod host;
mod image_pull;
pub mod logs;
mod node;
mod options;
mod plan;
mod pod;
mod quantity;
mod record;
mod registration;
mod run_config;
pub mod server;
mod source;
mod status;
mod status_writer;
pub mod streaming;
mod translate;
mod worker;
mod world;

pub use node::{Node, NodeError};
pub use options::{Capacity, Kubelet, MachineDefaults, Options, Registries};
pub use record::RecordError;

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
