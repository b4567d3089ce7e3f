//! What all workers share.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::SignedDuration;
use k8s_openapi::api::core::v1::{Node, Pod};
use tokio::sync::watch;
use vmpod_image::Store;
use vmpod_machine::{Accel, FaultPoints, Machine, MachineId, Machines, loopback};
use vmpod_network::{Subnet, nat::Nat};

use crate::{
    admit::{self, Lacks, Refusal, Room},
    env::Facts,
    error_chain,
    events::Events,
    holders,
    logs::Live,
    network::{self, NetworkMode},
    options::{MachineDefaults, Registries},
    pod::{PodUid, Requests},
    pressure::{self, Pressure},
    prober::Counts,
    record::{Record, Records},
    run_config::RunConfig,
    sidecars::{self, Engine},
    snapshots::Snapshots,
};

/// What all workers share. Nothing here is a pod's own.
pub(crate) struct World {
    pub(crate) name: String,
    pub(crate) address: IpAddr,
    pub(crate) client: kube::Client,
    pub(crate) store: Store,
    pub(crate) machines: Machines,
    /// What the holds on images for these machines have in common.
    pub(crate) scope: String,
    pub(crate) accel: Accel,
    pub(crate) defaults: MachineDefaults,
    /// The way into guests whose image tells none.
    pub(crate) guest_login: Option<(Option<String>, vmpod_machine::Auth)>,
    pub(crate) registries: Registries,
    pub(crate) records: Records,
    pub(crate) events: Events,
    pub(crate) faults: FaultPoints,
    pub(crate) low_ports: bool,
    pub(crate) ledger: Ledger,
    /// The host's own network for machines, and which one pods get that name none.
    pub(crate) nat: Nat,
    pub(crate) network: NetworkMode,
    /// None where memory snapshots are turned off.
    pub(crate) snapshots: Option<Snapshots>,
    /// What runs the containers beside machines.
    pub(crate) engine: Engine,
    pub(crate) probes: Counts,
    pub(crate) pods: Mutex<BTreeMap<PodUid, Handle>>,
}

/// All addresses of the pod's network are in use.
#[derive(Debug, thiserror::Error)]
#[error("no address is free for the machine")]
pub(crate) struct NoAddress;

/// What a worker is to bring about.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    /// The pod; none when the API has it no more.
    pub(crate) pod: Option<Arc<Pod>>,
    /// The agent ends; machines get so long.
    pub(crate) agent_stops: Option<SignedDuration>,
    /// Why the pod is to be ended, if the node runs short of something.
    pub(crate) evicted: Option<String>,
}

/// What a worker shows of its pod.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    /// The pod with the status as the worker knows it.
    pub(crate) pod: Option<Arc<Pod>>,
    pub(crate) record: Option<Arc<Record>>,
    /// The machine of the current attempt.
    pub(crate) machine: Option<Machine>,
    pub(crate) run: Option<Arc<RunConfig>>,
    /// Who writes the current attempt's log.
    pub(crate) log: Option<Live>,
    /// The containers beside the machine.
    pub(crate) crew: Option<sidecars::View>,
    /// Nothing of the pod runs, and the record says so.
    pub(crate) quiet: bool,
}

/// A pod's worker, from outside.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) wanted: watch::Sender<Wanted>,
    pub(crate) view: watch::Receiver<View>,
    pub(crate) task: tokio::task::AbortHandle,
}

impl World {
    /// What a pod at this address may ask of the node in its environment and volumes.
    pub(crate) fn facts(&self, address: Option<Ipv4Addr>) -> Facts {
        // As in Kubernetes, an address that isn't known is an empty text.
        let pod_ip = address.map(|address| address.to_string()).unwrap_or_default();
        Facts { host_ip: self.address.to_string(), pod_ip, allocatable: self.ledger.allocatable() }
    }

    /// The address of a pod's machines.
    ///
    /// On somebody else's bridge, and on Apple's networks, there is none before the guest has one.
    pub(crate) fn address(&self, uid: &PodUid, pod: &Pod, attempt: u32) -> Result<Option<Ipv4Addr>, NoAddress> {
        let mode = NetworkMode::of(pod, &self.network);
        if matches!(mode, NetworkMode::Bridge(_)) || self.apple() {
            return Ok(None);
        }
        let found = self.ledger.address(uid, &uid.machine(attempt), &mode, &self.machines.addresses());
        found.map(Some).ok_or(NoAddress)
    }

    /// What pods with containers beside their machine can't have here.
    pub(crate) fn lacks(&self) -> Lacks {
        Lacks { engine: self.engine.missing(), shares: self.machines.no_shares() }
    }

    /// Whether machines are those of Apple's framework.
    pub(crate) fn apple(&self) -> bool {
        self.machines.hypervisor() == vmpod_machine::vz::NAME
    }

    /// The machine's place on the host's own network is ready for it, when it is to be there.
    pub(crate) async fn reserve(&self, uid: &PodUid, networks: &[vmpod_machine::Network]) -> Result<(), String> {
        if let Some(vmpod_machine::Network::Tap { bridge, address: None, .. }) = networks.first() {
            let mend = format!("make one: `ip link add {bridge} type bridge`, with the host's interface as its port");
            match vmpod_network::is_bridge(bridge) {
                Some(true) => {}
                Some(false) => return Err(format!("the interface {bridge} of this node is no bridge: {mend}")),
                None => return Err(format!("there is no bridge {bridge} on this node: {mend}")),
            }
        }
        let Some(reservation) = network::reservation(self.nat.config(), uid, networks) else { return Ok(()) };
        self.nat.reserve(reservation).await.map_err(|error| error_chain(&error))
    }

    /// Removes a machine, its place on the host's network and its hold on its image.
    pub(crate) async fn remove(&self, uid: &PodUid, id: &MachineId) -> Result<(), String> {
        self.machines.remove(id, true).await.map_err(|error| error_chain(&error))?;
        self.faults.hit("node: machine removed").await;
        self.nat.release(uid.as_str()).await.map_err(|error| error_chain(&error))?;
        self.faults.hit("node: network released").await;
        self.release(id).await
    }

    /// The name under which a machine holds its image.
    pub(crate) fn holder(&self, id: &MachineId) -> String {
        holders::holder(id, &self.scope)
    }

    pub(crate) fn pods(&self) -> MutexGuard<'_, BTreeMap<PodUid, Handle>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets go of a machine's image, once the machine is gone.
    pub(crate) async fn release(&self, id: &MachineId) -> Result<(), String> {
        let (store, holder) = (self.store.clone(), self.holder(id));
        match tokio::task::spawn_blocking(move || store.release(&holder)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(error_chain(&error)),
            Err(error) => Err(error.to_string()),
        }
    }

    /// What every worker shows now.
    pub(crate) fn views(&self) -> Vec<View> {
        self.pods().values().map(|handle| handle.view.borrow().clone()).collect()
    }
}

/// Who was given what of the node.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    inner: Mutex<Book>,
    /// The agent may change the host's network.
    privileged: bool,
    /// The addresses of the host's own network.
    subnet: Option<Subnet>,
    /// Machines are on Apple's networks.
    apple: bool,
}

#[derive(Debug, Default)]
struct Book {
    allocatable: Requests,
    most_pods: u32,
    admitted: BTreeMap<PodUid, Requests>,
    addresses: BTreeMap<PodUid, Ipv4Addr>,
    node: Option<Arc<Node>>,
    pressure: Pressure,
}

impl Ledger {
    pub(crate) fn new(allocatable: Requests, most_pods: u32) -> Self {
        Self { inner: Mutex::new(Book { allocatable, most_pods, ..Book::default() }), ..Self::default() }
    }

    /// With a network of the host's own, whose addresses these are.
    pub(crate) fn with_nat(self, subnet: Subnet, privileged: bool) -> Self {
        Self { privileged, subnet: Some(subnet), ..self }
    }

    /// With machines of Apple's framework, or not.
    pub(crate) fn on_apple(self, apple: bool) -> Self {
        Self { apple, ..self }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the node offers.
    pub(crate) fn allocatable(&self) -> Requests {
        self.book().allocatable
    }

    /// Memory that no admitted pod asked for, bytes.
    pub(crate) fn free_memory(&self) -> u64 {
        let book = self.book();
        let used: u64 = book.admitted.values().map(|asked| asked.memory).fold(0, u64::saturating_add);
        book.allocatable.memory.saturating_sub(used)
    }

    /// The Node object, for labels and taints.
    pub(crate) fn set_node(&self, node: Arc<Node>) {
        self.book().node = Some(node);
    }

    /// The Node object as it was last seen.
    pub(crate) fn node(&self) -> Option<Arc<Node>> {
        self.book().node.clone()
    }

    /// What the node is short of.
    pub(crate) fn set_pressure(&self, pressure: Pressure) {
        self.book().pressure = pressure;
    }

    /// Counts in a pod that an earlier agent admitted.
    pub(crate) fn restore(&self, uid: &PodUid, pod: &Pod, address: Option<Ipv4Addr>) {
        let mut book = self.book();
        book.admitted.insert(uid.clone(), Requests::of(pod));
        if let Some(address) = address {
            book.addresses.insert(uid.clone(), address);
        }
    }

    /// Decides whether a pod may run here, and counts it in if so.
    ///
    pub(crate) fn admit(&self, uid: &PodUid, pod: &Pod, node: &str, lacks: Lacks) -> Result<(), Refusal> {
        if let Some(why) = pressure::refusal(pod, self.book().pressure) {
            return Err(Refusal::new("Evicted", why));
        }
        admit::supported(pod, self.privileged)?;
        if self.apple {
            admit::on_apple(pod)?;
        }
        admit::company(pod, lacks)?;
        let mut book = self.book();
        let used = book.admitted.iter().filter(|(other, _)| *other != uid);
        let (count, used) =
            used.fold((0u32, Requests::default()), |(count, sum), (_, asked)| (count + 1, sum.plus(*asked)));
        let room = Room { allocatable: book.allocatable, pods: book.most_pods, used, admitted: count };
        let object = book.node.clone();
        let labels = object.as_ref().and_then(|node| node.metadata.labels.clone()).unwrap_or_default();
        admit::fits(pod, &labels, node, &room)?;
        if let Some(object) = &object {
            admit::tolerates(pod, object)?;
        }
        book.admitted.insert(uid.clone(), Requests::of(pod));
        Ok(())
    }

    /// The pod's address: the one it has, else a free one of its network.
    pub(crate) fn address(
        &self,
        uid: &PodUid,
        machine: &MachineId,
        mode: &NetworkMode,
        foreign: &BTreeSet<Ipv4Addr>,
    ) -> Option<Ipv4Addr> {
        let mut book = self.book();
        if let Some(address) = book.addresses.get(uid) {
            return Some(*address);
        }
        let used: BTreeSet<_> = book.addresses.values().chain(foreign).copied().collect();
        let address = match mode {
            NetworkMode::User => loopback::allocate(machine, &used)?,
            NetworkMode::Nat => self.subnet?.allocate(uid.as_str(), &used)?,
            NetworkMode::Bridge(_) => return None,
        };
        book.addresses.insert(uid.clone(), address);
        Some(address)
    }

    /// The pod needs nothing any more.
    pub(crate) fn release(&self, uid: &PodUid) {
        let mut book = self.book();
        book.admitted.remove(uid);
        book.addresses.remove(uid);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn apples_networks_forward_no_ports_of_the_host() {
        let pod = |ports: serde_json::Value| -> Pod {
            serde_json::from_value(json!({"spec": {"containers": [{"name": "vm", "ports": ports}]}})).unwrap()
        };
        let uid = PodUid::parse("a").unwrap();
        let ledger = |apple| Ledger::new(Requests { millicpus: 1000, memory: 100, ephemeral: 0 }, 10).on_apple(apple);
        let asks = pod(json!([{"containerPort": 22, "hostPort": 2222}]));
        let refusal = ledger(true).admit(&uid, &asks, "n", Lacks::default()).unwrap_err();
        assert!(refusal.message.starts_with("hostPort 2222: "), "{}", refusal.message);
        ledger(true).admit(&uid, &pod(json!([{"containerPort": 22}])), "n", Lacks::default()).unwrap();
        ledger(false).admit(&uid, &asks, "n", Lacks::default()).unwrap();
    }

    #[test]
    fn what_one_pod_has_no_other_gets() {
        let ledger = Ledger::new(Requests { millicpus: 1000, memory: 100, ephemeral: 0 }, 10);
        let pod: Pod = serde_json::from_value(
            json!({"spec": {"containers": [{"name": "vm", "resources": {"requests": {"memory": "60"}}}]}}),
        )
        .unwrap();
        let (a, b) = (PodUid::parse("a").unwrap(), PodUid::parse("b").unwrap());
        ledger.admit(&a, &pod, "n", Lacks::default()).unwrap();
        ledger.admit(&a, &pod, "n", Lacks::default()).unwrap();
        assert_eq!(ledger.admit(&b, &pod, "n", Lacks::default()).unwrap_err().reason, "OutOfmemory");
        let (user, none) = (&NetworkMode::User, BTreeSet::new());
        let first = ledger.address(&a, &a.machine(0), user, &none).unwrap();
        assert_eq!(
            ledger.address(&a, &a.machine(1), user, &none),
            Some(first),
            "an address belongs to the pod, not to its machine"
        );
        let taken = BTreeSet::from([ledger.address(&b, &b.machine(0), user, &none).unwrap()]);
        assert!(!taken.contains(&first));
        ledger.release(&a);
        ledger.admit(&b, &pod, "n", Lacks::default()).unwrap();
    }
}
