//! When the node runs short, in the words of the kubelet's options.

use clap::Args;

use super::values;

/// The kubelet's thresholds, bounded on large disks.
const USUAL: &str = "memory.available<100Mi,nodefs.available<10%|10Gi,nodefs.inodesFree<5%,imagefs.available<15%|15Gi";

/// When the node runs short of memory or disk.
#[derive(Clone, Debug, Args)]
pub(crate) struct Eviction {
    /// Below these the node takes no pods and ends some; an empty text is none
    #[arg(long, value_name = "SIGNAL<AMOUNT,…", default_value = USUAL)]
    pub(crate) eviction_hard: vmpod_node::Eviction,
    /// How long the node tells that it is short after it was, such as 30s or 5m
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = values::duration)]
    pub(crate) eviction_pressure_transition_period: std::time::Duration,
}

impl Default for Eviction {
    fn default() -> Self {
        let usual = vmpod_node::Eviction::default();
        Self { eviction_pressure_transition_period: usual.transition, eviction_hard: usual }
    }
}
