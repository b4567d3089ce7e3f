//! `cargo xtask bench NAME`: figures, never pass or fail.
//!
//! A benchmark prints a table for people and, as its last line, one JSON object. What is compared
//! is measured in the same run, in turns, so that a busy machine is busy for both.

mod api;
mod fleet_burst;
mod fleet_month;
mod image;
#[cfg(target_os = "linux")]
mod network;
mod node;
mod pod_start;
mod process;
mod samples;
mod server;

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::ValueEnum;

/// The benchmarks.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Name {
    /// Pod created → exec answers, over the same QEMU started by hand and polled by ssh
    PodStart,
    /// Pull, push, delta and clone of a disk image, over skopeo and oras
    Image,
    /// The agent's memory, idle and for each pod, and exec over ssh with a control socket
    Node,
    /// A machine's place on the network nat, DHCP and throughput, over a bridge and dnsmasq by hand
    Network,
    /// From nothing to a thousand runners on simulated nodes, and the operator's memory with ten thousand
    FleetBurst,
    /// A simulated month of CI jobs: waits and machine-hours, over a rule of utilization for each flavour
    FleetMonth,
    /// Durable creates over etcd's puts, a long list, watch fan-out, memory
    Api,
}

/// Runs one benchmark.
pub(crate) fn run(name: Name, quick: bool, program: Option<PathBuf>, root: &Path) -> Result<()> {
    match name {
        Name::PodStart => pod_start::run(quick, program, root),
        Name::Image => image::run(quick, program, root),
        Name::Node => node::run(quick, program, root),
        #[cfg(target_os = "linux")]
        Name::Network => network::run(quick, root),
        #[cfg(not(target_os = "linux"))]
        Name::Network => anyhow::bail!("it measures bridges and namespaces of Linux"),
        Name::FleetBurst => fleet_burst::run(quick, program, root),
        Name::FleetMonth => fleet_month::run(quick, root),
        Name::Api => api::run(quick, program, root),
    }
}
