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

pub mod logs;
mod node;
mod options;
pub mod server;

pub use node::{Node, NodeError};
pub use options::{Capacity, Kubelet, MachineDefaults, Options, Registries};
