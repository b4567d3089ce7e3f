//! The kubelet's HTTP API: what an API server, metrics-server and a person with rights ask of a node.
//!
//! The server knows HTTP, TLS, who may call, and the streaming protocols; what the pods are and how one
//! talks to a machine it learns from a [`Runtime`].

pub mod runtime;

pub use runtime::{
    AttachRequest, Exit, ExecRequest, FsUsage, MachineStats, NodeStats, PodRef, PodStats, Runtime,
    RuntimeError, Streams, Target, TermSize, Usage,
};
