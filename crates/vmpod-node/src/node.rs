//! The agent as a whole.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use jiff::SignedDuration;
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use vmpod_machine::{Adopted, FaultPoints, MachineError, MachineId, TemplateError};
use vmpod_network::nat::{self, Nat};

use crate::{
    Options,
    agent::Agent,
    docker::Docker,
    error_chain,
    events::{Events, Kind},
    holders,
    host::Host,
    image_gc::{self, ImageGc, ImageRoom},
    limited, network,
    plan::MachineSeen,
    pod::{PodUid, Requests},
    prefetch,
    pressure::{self, Eviction, Pressure},
    prober::Counts,
    record::{Kept, Record, RecordError, Records},
    registration::{self, Profile},
    server::{self, Runtime, tls},
    sidecars::Engine,
    snapshots::{self, Snapshots},
    source::{self, Change},
    worker::{self, Beginning},
    world::{Ledger, Wanted, World},
};

/// Why the agent couldn't start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The agent's own files.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The machines couldn't be looked at.
    #[error("could not take over the machines of an earlier agent")]
    Adopt(#[source] MachineError),
    /// The kubelet API's address.
    #[error("could not listen for the kubelet API on {address}: is another agent running, or the port in use?")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The memory snapshots of images.
    #[error("could not open the memory snapshots of images")]
    Templates(#[from] TemplateError),
    /// The kubelet API's certificates.
    #[error("could not set up the kubelet API")]
    Tls(#[from] tls::TlsError),
    /// The kubelet API ended.
    #[error("the kubelet API failed")]
    Server(#[source] io::Error),
}

/// The agent. [`open`](Self::open) adopts what an earlier one left; [`run`](Self::run) does the work.
pub struct Node {
    world: Arc<World>,
    profile: Profile,
    listener: Option<(TcpListener, tls::Serving)>,
    keep_vms: bool,
    shutdown_grace: Duration,
    left: Left,
    /// Machines that no pod has any more, by the UID of the pod that had them; cancelled when they are gone.
    removing: HashMap<PodUid, CancellationToken>,
    ready: watch::Sender<bool>,
    image_gc: ImageGc,
    prefetch: Vec<String>,
    image_room: watch::Sender<ImageRoom>,
    eviction: Eviction,
}

impl Drop for Node {
    /// Workers end with the agent, however it ends. Machines don't.
    fn drop(&mut self) {
        for handle in self.world.pods().values() {
            handle.task.abort();
        }
    }
}

/// The certificates of a kubelet API that serves.
#[derive(Clone)]
pub struct Certificates(tls::Serving);

impl Certificates {
    /// Replaces them: new connections see the new ones. What can't be used is refused and changes nothing.
    pub fn replace(&self, kubelet: &crate::Kubelet) -> Result<(), NodeError> {
        Ok(self.0.replace(&pem(kubelet))?)
    }
}

fn pem(kubelet: &crate::Kubelet) -> tls::Pem {
    tls::Pem {
        cert: kubelet.cert_pem.clone(),
        key: kubelet.key_pem.clone(),
        client_ca: Some(kubelet.client_ca_pem.clone()).filter(|pem| !pem.is_empty()),
    }
}

/// What an earlier agent left, to be matched with the API's first list.
#[derive(Default)]
struct Left {
    records: HashMap<PodUid, Record>,
    /// Directories without a usable record.
    damaged: Vec<PodUid>,
    machines: Vec<(MachineId, Adopted)>,
}

impl Node {
    /// Opens the agent's state, adopts the machines found there and binds the kubelet API.
    pub async fn open(options: Options) -> Result<Self, NodeError> {
        Self::open_with_faults(options, FaultPoints::default()).await
    }

    /// The same, with points at which a test may let the agent die.
    pub async fn open_with_faults(options: Options, faults: FaultPoints) -> Result<Self, NodeError> {
        let records = Records::open(&options.dir)?;
        let listener = match &options.kubelet {
            None => None,
            Some(kubelet) => {
                let serving = tls::Serving::new(&pem(kubelet))?;
                let listen = |source| NodeError::Listen { address: kubelet.listen, source };
                Some((TcpListener::bind(kubelet.listen).await.map_err(listen)?, serving))
            }
        };
        let mut left = Left { machines: options.machines.adopt().await.map_err(NodeError::Adopt)?, ..Left::default() };
        for (uid, kept) in records.load()? {
            match kept {
                Kept::Record(record) => {
                    left.records.insert(uid, *record);
                }
                Kept::Damaged(why) => {
                    tracing::warn!(pod = %uid, why, "a pod's record is damaged: what is left of it will be removed");
                    left.damaged.push(uid);
                }
            }
        }
        Snapshots::remove_makers(&options.machines, left.machines.iter().map(|(id, _)| id.clone())).await;
        left.machines.retain(|(id, _)| !snapshots::makes(id));
        let root = rustix::process::geteuid().is_root();
        let (nat, privileged) = take_over_network(options.nat, &options.machines, root).await;
        // Apple's networks need no privilege of ours.
        let apple = options.machines.hypervisor() == vmpod_machine::vz::NAME;
        let privileged = privileged || apple;
        let capacity = options.capacity;
        let allocatable = Requests {
            millicpus: capacity.allocatable_millicpus(),
            memory: capacity.allocatable_memory(),
            ephemeral: capacity.ephemeral_bytes,
        };
        let port = listener.as_ref().and_then(|(listener, _)| listener.local_addr().ok()).map(|address| address.port());
        let profile = Profile {
            name: options.name.clone(),
            address: options.address,
            kubelet_port: port,
            capacity,
            labels: options.labels,
            taints: options.taints,
            host: Host::read(),
            hypervisor: options.machines.hypervisor().to_owned(),
            features: Vec::new(),
        };
        let events = Events::start(options.client.clone(), options.name.clone());
        let scope = holders::holder_scope(options.machines.root());
        let snapshots = options.snapshot_budget.map(|budget| {
            Snapshots::open(snapshots::Parts {
                dir: options.dir.join("templates"),
                machines: options.machines.clone(),
                store: options.store.clone(),
                events: events.clone(),
                scope: scope.clone(),
                accel: options.accel,
                budget,
            })
        });
        let world = Arc::new(World {
            events,
            snapshots: snapshots.transpose()?,
            name: options.name,
            address: options.address,
            client: options.client,
            store: options.store,
            machines: options.machines,
            accel: options.accel,
            defaults: options.defaults,
            guest_login: options.guest_login,
            registries: options.registries,
            records,
            faults,
            low_ports: root,
            ledger: Ledger::new(allocatable, capacity.pods).with_nat(nat.config().subnet, privileged).on_apple(apple),
            nat,
            network: options.network,
            engine: Engine::new(Docker::new(&options.docker_host, &scope, !apple)),
            scope,
            probes: Counts::default(),
            pods: Mutex::default(),
        });
        Ok(Self {
            world,
            image_gc: options.image_gc,
            eviction: options.eviction,
            prefetch: options.prefetch,
            image_room: watch::channel(ImageRoom::default()).0,
            profile,
            listener,
            keep_vms: options.keep_vms,
            shutdown_grace: options.shutdown_grace,
            left,
            removing: HashMap::new(),
            ready: watch::Sender::new(false),
        })
    }

    /// Becomes true when the Node is registered and the first complete set of pods was seen.
    #[must_use]
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    /// Where the kubelet API listens.
    #[must_use]
    pub fn kubelet_address(&self) -> Option<SocketAddr> {
        self.listener.as_ref()?.0.local_addr().ok()
    }

    /// The kubelet API's certificates, to be replaced while it serves; none where it isn't served.
    #[must_use]
    pub fn certificates(&self) -> Option<Certificates> {
        Some(Certificates(self.listener.as_ref()?.1.clone()))
    }

    /// The way to pods for callers in this process: what the kubelet API serves.
    #[must_use]
    pub fn runtime(&self) -> Arc<dyn Runtime> {
        Arc::new(Agent { world: Arc::clone(&self.world) })
    }

    /// Whether images leave too little room: what the last look found.
    #[must_use]
    pub fn image_room(&self) -> watch::Receiver<ImageRoom> {
        self.image_room.subscribe()
    }

    /// Works until `stop` is cancelled, then stops the pods' machines unless they are to be kept.
    pub async fn run(mut self, stop: CancellationToken) -> Result<(), NodeError> {
        let runtime = self.runtime();
        let mut tasks = JoinSet::new();
        let (serving_stop, mut server_failed) = (CancellationToken::new(), watch::channel(None).1);
        let mut server = JoinSet::new();
        if let Some((listener, serving)) = self.listener.take() {
            let config = json!({"node": self.profile.name, "pods": self.profile.capacity.pods});
            let options = server::Options {
                node: self.profile.name.clone(),
                client: self.world.client.clone(),
                serving,
                runtime,
                config,
            };
            let (failed, receiver) = watch::channel(None);
            server_failed = receiver;
            let until = serving_stop.clone();
            server.spawn(async move {
                if let Err(error) = server::Server::new(options).serve(listener, until).await {
                    failed.send_replace(Some(error.to_string()));
                }
            });
        }
        let registered = tokio::select! {
            node = self.register() => node,
            () = stop.cancelled() => return Ok(()),
        };
        let world = Arc::clone(&self.world);
        world.ledger.set_node(Arc::new(registered.clone()));
        world.events.node(&registered, Kind::Normal, "Starting", "Starting vmpod node agent.");
        let keeper = Arc::clone(&world);
        let (pressed, pressure) = watch::channel(Pressure::default());
        let telling = tasks.spawn(registration::keep_status(
            world.client.clone(),
            self.profile.clone(),
            world.store.clone(),
            registered.clone(),
            pressure,
            move |node| keeper.ledger.set_node(node),
        ));
        tasks.spawn(Box::pin(pressure::keep(Arc::clone(&world), self.eviction.clone(), registered.clone(), pressed)));
        let images = std::mem::take(&mut self.prefetch);
        let (store, registries, events) = (world.store.clone(), world.registries.clone(), world.events.clone());
        tasks.spawn(Box::pin(prefetch::run(store, registries, images, events, registered.clone())));
        tasks.spawn(Box::pin(prefetch::objects::run(Arc::clone(&world))));
        let room = self.image_room.clone();
        tasks.spawn(Box::pin(image_gc::run(world.store.clone(), self.image_gc, room)));
        tasks.spawn(registration::keep_lease(world.client.clone(), registered));
        tasks.spawn(snapshots::keep(Arc::clone(&world)));
        let (changes, mut pods) = mpsc::channel(64);
        let (client, name) = (world.client.clone(), world.name.clone());
        tasks.spawn(async move { source::run(client, &name, changes).await });

        let mut first = true;
        let result = loop {
            tokio::select! {
                () = stop.cancelled() => break Ok(()),
                change = pods.recv() => {
                    let Some(change) = change else { break Ok(()) };
                    if let (true, Change::All(all)) = (first, &change) {
                        first = false;
                        self.take_over(all, &mut tasks).await;
                        self.ready.send_replace(true);
                    } else {
                        self.take(change);
                    }
                }
                Some(why) = failure(&mut server_failed) => break Err(NodeError::Server(io::Error::other(why))),
            }
        };
        if !self.keep_vms && !first {
            // The last word on the Node is that it takes no more pods.
            telling.abort();
            self.stop_machines(&mut pods).await;
        }
        tasks.shutdown().await;
        if let Some(snapshots) = &world.snapshots {
            snapshots.stop().await;
        }
        serving_stop.cancel();
        while server.join_next().await.is_some() {}
        result
    }

    /// Registers, for as long as it takes.
    async fn register(&self) -> k8s_openapi::api::core::v1::Node {
        let mut wait = Duration::from_millis(200);
        loop {
            match limited(Box::pin(registration::register(&self.world.client, &self.profile, &self.world.store))).await
            {
                Ok(node) => return node,
                Err(error) => tracing::warn!(
                    error = error_chain(&error),
                    "the Node can't be registered; trying again in {wait:?}"
                ),
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(Duration::from_secs(10));
        }
    }

    /// Matches what an earlier agent left with the first whole list: only now is it known what nobody wants any more.
    async fn take_over(&mut self, all: &BTreeMap<PodUid, Arc<Pod>>, removals: &mut JoinSet<()>) {
        let left = std::mem::take(&mut self.left);
        let current: HashMap<MachineId, PodUid> =
            left.records.values().filter_map(|record| Some((record.machine()?, record.uid.clone()))).collect();
        let mut residues: HashMap<PodUid, MachineSeen> = HashMap::new();
        let mut orphans: HashMap<PodUid, Vec<MachineId>> = HashMap::new();
        for (id, adopted) in &left.machines {
            match current.get(id) {
                Some(uid) => {
                    residues.insert(uid.clone(), self.residue(id, adopted));
                }
                // A pod's machine that no record speaks of. Machines that people made are left alone.
                None => {
                    if let Some((uid, _)) = PodUid::of_machine(id) {
                        orphans.entry(uid).or_default().push(id.clone());
                    }
                }
            }
        }
        let present: HashSet<_> = left.machines.iter().map(|(id, _)| id.clone()).collect();
        self.remove_orphans(orphans, removals);
        for uid in &left.damaged {
            if let Err(error) = self.world.records.forget(uid) {
                tracing::warn!(pod = %uid, error = error_chain(&error), "can't remove what is left of the pod");
            }
        }
        self.release_holders(present).await;
        removals.spawn(remove_leftovers(Arc::clone(&self.world)));
        for record in left.records.values().filter(|record| record.terminal.is_none()) {
            if let Some(pod) = all.get(&record.uid) {
                self.world.ledger.restore(&record.uid, pod, record.address);
            }
        }
        for (uid, record) in left.records {
            let wanted = Wanted { pod: all.get(&uid).cloned(), agent_stops: None, evicted: None };
            let residue = residues.remove(&uid).unwrap_or_default();
            self.begin(uid, wanted, Some(record), residue);
        }
        // As the kubelet: older pods are admitted first.
        let mut new: Vec<_> = all.iter().filter(|(uid, _)| !self.world.pods().contains_key(*uid)).collect();
        new.sort_by_key(|(uid, pod)| (pod.metadata.creation_timestamp.clone(), (*uid).clone()));
        for (uid, pod) in new {
            self.take(Change::Set(uid.clone(), Arc::clone(pod)));
        }
    }

    /// What is on disk of a machine that isn't known.
    fn residue(&self, id: &MachineId, adopted: &Adopted) -> MachineSeen {
        match adopted {
            Adopted::Broken(why) => {
                let unfinished = self.world.machines.directory(id).is_ok_and(|dir| !dir.spec().exists());
                if unfinished { MachineSeen::Unfinished } else { MachineSeen::Broken(why.clone()) }
            }
            Adopted::Prepared | Adopted::Running | Adopted::Stopped(_) | Adopted::Unrestored(_) => MachineSeen::Absent,
        }
    }

    /// Removes machines beside the work: one that resists holds back a pod of its own UID, and nothing else.
    fn remove_orphans(&mut self, orphans: HashMap<PodUid, Vec<MachineId>>, removals: &mut JoinSet<()>) {
        for (uid, ids) in orphans {
            let (world, removed) = (Arc::clone(&self.world), CancellationToken::new());
            self.removing.insert(uid.clone(), removed.clone());
            removals.spawn(async move {
                for id in ids {
                    remove_orphan(&world, &uid, &id).await;
                }
                removed.cancel();
            });
        }
    }

    /// Lets go of images whose machines are gone. What another agent's machines hold isn't ours to let go.
    async fn release_holders(&self, present: HashSet<MachineId>) {
        let world = Arc::clone(&self.world);
        let released = tokio::task::spawn_blocking(move || {
            let templates = world.snapshots.as_ref().map(Snapshots::holders).unwrap_or_default();
            let present =
                |name: &str| MachineId::parse(name).is_ok_and(|id| present.contains(&id) || templates.contains(&id));
            holders::release_except(&world.store, world.machines.root(), present)
        });
        match released.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(error = error_chain(&error), "images can't be let go"),
            Err(error) => tracing::warn!(%error, "images can't be let go"),
        }
    }

    fn begin(&self, uid: PodUid, wanted: Wanted, record: Option<Record>, residue: MachineSeen) {
        let after = self.removing.get(&uid).filter(|removed| !removed.is_cancelled()).cloned();
        let mut pods = self.world.pods();
        let handle = worker::start(&self.world, Beginning { uid: uid.clone(), wanted, record, residue, after });
        pods.insert(uid, handle);
    }

    fn take(&self, change: Change) {
        match change {
            Change::Set(uid, pod) => {
                let known = {
                    let pods = self.world.pods();
                    pods.get(&uid)
                        .map(|handle| handle.wanted.send_modify(|wanted| wanted.pod = Some(Arc::clone(&pod))))
                        .is_some()
                };
                if !known {
                    let wanted = Wanted { pod: Some(pod), agent_stops: None, evicted: None };
                    self.begin(uid, wanted, None, MachineSeen::Absent);
                }
            }
            Change::Gone(uid) => {
                if let Some(handle) = self.world.pods().get(&uid) {
                    handle.wanted.send_modify(|wanted| wanted.pod = None);
                }
            }
            Change::All(all) => {
                let gone: Vec<_> = self.world.pods().keys().filter(|uid| !all.contains_key(*uid)).cloned().collect();
                for uid in gone {
                    self.take(Change::Gone(uid));
                }
                for (uid, pod) in all {
                    self.take(Change::Set(uid, pod));
                }
            }
        }
    }

    /// Stops every machine, and lets the API know how things ended.
    async fn stop_machines(&self, pods: &mut mpsc::Receiver<Change>) {
        let goodbye = registration::say_goodbye(&self.world.client, &self.profile, &self.world.store);
        if let Err(error) = limited(goodbye).await {
            tracing::debug!(error = error_chain(&error), "the Node's last status can't be written");
        }
        let grace = SignedDuration::try_from(self.shutdown_grace).unwrap_or(SignedDuration::from_secs(30));
        let views: Vec<_> = {
            let pods = self.world.pods();
            for handle in pods.values() {
                handle.wanted.send_modify(|wanted| wanted.agent_stops = Some(grace));
            }
            pods.values().map(|handle| handle.view.clone()).collect()
        };
        let quiet = async {
            for mut view in views {
                // A worker that is over is quiet as well.
                view.wait_for(|view| view.quiet).await.ok();
            }
            // The last statuses are on their way.
            tokio::time::sleep(Duration::from_millis(300)).await;
        };
        let limit = self.shutdown_grace + Duration::from_secs(10);
        let all = tokio::time::timeout(limit, async {
            let mut quiet = std::pin::pin!(quiet);
            loop {
                tokio::select! {
                    () = &mut quiet => return,
                    // Deletions that arrive meanwhile are still taken; new pods aren't.
                    Some(change) = pods.recv() => match change {
                        Change::Set(uid, pod) if self.world.pods().contains_key(&uid) => self.take(Change::Set(uid, pod)),
                        Change::Gone(uid) => self.take(Change::Gone(uid)),
                        _ => {}
                    },
                }
            }
        });
        if all.await.is_err() {
            tracing::warn!("some machines did not stop in time; the next agent finds them");
        }
    }
}

/// Serves the machines that are on the host's own network, or removes what is left of it. Also whether the agent may change the
/// host's network.
async fn take_over_network(config: nat::Config, machines: &vmpod_machine::Machines, root: bool) -> (Nat, bool) {
    let nat = Nat::new(config);
    if !root || !cfg!(target_os = "linux") {
        return (nat, false);
    }
    let running = machines.list().into_iter().filter(|machine| machine.state().borrow().is_live());
    let reserved = running.filter_map(|machine| {
        let (uid, _) = PodUid::of_machine(machine.id())?;
        network::reservation(nat.config(), &uid, &machine.spec().networks)
    });
    if let Err(error) = nat.restore(reserved.collect()).await {
        tracing::warn!(error = error_chain(&error), "the machines' network can't be taken over");
    }
    (nat, true)
}

/// Removes containers and networks of pods that are here no more.
async fn remove_leftovers(world: Arc<World>) {
    let mut wait = Duration::from_secs(1);
    // A host without an engine has none of them; an engine that is down has them still when it comes back.
    while world.engine.missing().is_none() {
        let docker = world.engine.docker();
        let cleared = async {
            for uid in docker.pods().await? {
                if !world.pods().contains_key(&uid) {
                    tracing::info!(pod = %uid, "no pod has these containers any more: removing them");
                    docker.disband(&uid).await?;
                }
            }
            Ok::<_, crate::docker::DockerError>(())
        };
        match cleared.await {
            Ok(()) => return,
            Err(error) => tracing::debug!(%error, "what is left of pods' containers can't be removed; trying again"),
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(Duration::from_mins(1));
    }
}

async fn remove_orphan(world: &World, uid: &PodUid, id: &MachineId) {
    tracing::info!(machine = %id, "no pod has this machine any more: removing it");
    let mut wait = Duration::from_secs(1);
    while let Err(error) = world.remove(uid, id).await {
        tracing::warn!(machine = %id, error, "can't remove the machine; trying again");
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(Duration::from_secs(30));
    }
    world.faults.hit("node: orphan removed").await;
}

/// The server's failure, once there is one; none when there never will be.
async fn failure(failed: &mut watch::Receiver<Option<String>>) -> Option<String> {
    let failed = failed.wait_for(Option::is_some).await;
    failed.ok()?.clone()
}
