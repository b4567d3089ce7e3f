//! What an agent is told when it starts.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use k8s_openapi::api::core::v1::Taint;
use vmpod_image::{Credentials, Mirror, SignaturePolicy, Store};
use vmpod_machine::{Accel, Machines, Memory};

use crate::{image_gc::ImageGc, network::NetworkMode, pressure::Eviction};

/// Everything [`Node::open`](crate::Node::open) needs.
pub struct Options {
    /// The Node's name; also the value of its hostname label.
    pub name: String,
    /// The agent's own directory (`DIR/node`), made when absent, mode 0700.
    pub dir: PathBuf,
    /// The API, as the node's user (`system:node:NAME`).
    pub client: kube::Client,
    /// Where images are.
    pub store: Store,
    /// Where machines are.
    pub machines: Machines,
    /// What executes guests here.
    pub accel: Accel,
    /// The kubelet API. Without it, logs and exec work only in this process.
    pub kubelet: Option<Kubelet>,
    /// The address at which the API server reaches the kubelet API; the pods' `hostIP`.
    pub address: IpAddr,
    /// What the node offers to pods.
    pub capacity: Capacity,
    /// What a machine gets when its pod and its image say nothing.
    pub defaults: MachineDefaults,
    /// The way into guests whose image reads no seed and names no password: the user, if it isn't the image's, and what proves it.
    pub guest_login: Option<(Option<String>, vmpod_machine::Auth)>,
    /// How registries are reached.
    pub registries: Registries,
    /// How many images are kept.
    pub image_gc: ImageGc,
    /// When the node runs short of memory or disk.
    pub eviction: Eviction,
    /// Images to have before any pod asks for them.
    pub prefetch: Vec<String>,
    /// Labels set on the Node besides the usual ones.
    pub labels: BTreeMap<String, String>,
    /// Taints set when the Node is first made.
    pub taints: Vec<Taint>,
    /// The Docker API that runs the containers beside machines (`unix:///var/run/docker.sock`); empty for none.
    pub docker_host: String,
    /// The network of pods that name none.
    pub network: NetworkMode,
    /// The host's own network for machines.
    pub nat: vmpod_network::nat::Config,
    /// Whether machines go on when the agent is told to stop.
    pub keep_vms: bool,
    /// Bytes that memory snapshots of images may take; none turns them off.
    pub snapshot_budget: Option<u64>,
    /// How long machines get to shut down when the agent stops without `keep_vms`.
    pub shutdown_grace: Duration,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("name", &self.name)
            .field("dir", &self.dir)
            .field("address", &self.address)
            .field("capacity", &self.capacity)
            .field("keep_vms", &self.keep_vms)
            .finish_non_exhaustive()
    }
}

/// Where the kubelet API listens and how it shows and asks for identity.
#[derive(Clone)]
pub struct Kubelet {
    /// The address to bind; port 0 picks a free one, which the Node object then tells.
    pub listen: SocketAddr,
    /// The serving certificate chain, PEM.
    pub cert_pem: String,
    /// Its private key, PEM.
    pub key_pem: String,
    /// The authorities whose client certificates are believed, PEM.
    pub client_ca_pem: String,
}

impl fmt::Debug for Kubelet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kubelet").field("listen", &self.listen).finish_non_exhaustive()
    }
}

/// What the host has, and how much of it is kept for itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Capacity {
    /// Logical processors of the host.
    pub cpus: u32,
    /// The host's memory.
    pub memory: Memory,
    /// Bytes of the file system that holds the machines' disks.
    pub ephemeral_bytes: u64,
    /// Most pods at once.
    pub pods: u32,
    /// Memory kept for the host and the agent.
    pub reserved_memory: Memory,
    /// Processors kept for the host, in thousandths.
    pub reserved_millicpus: u32,
    /// Virtual processors offered per processor that isn't reserved, in percent; 100 offers each once.
    pub cpu_overcommit_percent: u32,
}

impl Capacity {
    /// The usual reservations for a host of this size: a tenth of its memory (between 256 MiB and 4 GiB) and no processor,
    /// because virtual processors share the real ones.
    #[must_use]
    pub fn of_host(cpus: u32, memory: Memory, ephemeral_bytes: u64) -> Self {
        let reserved = (memory.bytes() / 10).clamp(256 << 20, 4 << 30).min(memory.bytes() / 2);
        Self {
            cpus,
            memory,
            ephemeral_bytes,
            pods: 110,
            reserved_memory: Memory::from_bytes(reserved),
            reserved_millicpus: 0,
            cpu_overcommit_percent: 100,
        }
    }

    /// Processors for pods, in thousandths.
    #[must_use]
    pub fn allocatable_millicpus(&self) -> u64 {
        let free = (u64::from(self.cpus) * 1000).saturating_sub(u64::from(self.reserved_millicpus));
        free * u64::from(self.cpu_overcommit_percent) / 100
    }

    /// Memory for pods, in bytes.
    #[must_use]
    pub fn allocatable_memory(&self) -> u64 {
        self.memory.bytes().saturating_sub(self.reserved_memory.bytes())
    }
}

/// The size of a machine that nobody sized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineDefaults {
    /// Processors.
    pub cpus: u32,
    /// Memory.
    pub memory: Memory,
}

impl Default for MachineDefaults {
    fn default() -> Self {
        Self { cpus: 1, memory: Memory::from_mib(1024) }
    }
}

/// How registries are reached when a pod's own secrets don't say.
#[derive(Clone, Debug, Default)]
pub struct Registries {
    /// The node's own credentials.
    pub credentials: Credentials,
    /// Hosts (`host[:port]`) that may be spoken to without TLS.
    pub plain_http: Vec<String>,
    /// More certificate authorities to trust, PEM files.
    pub ca_files: Vec<PathBuf>,
    /// Registries to ask before others.
    pub mirrors: Vec<Mirror>,
    /// Which images must be signed, and by whom.
    pub signatures: Vec<SignaturePolicy>,
}
