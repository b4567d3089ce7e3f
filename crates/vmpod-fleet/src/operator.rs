//! The operator: it looks at pools, runners, pods, nodes and the CI systems, asks the pure parts what to do, and does it.
//!
//! One task does everything, so nothing is decided twice at once. Every effect can be repeated: a runner is made before its
//! Secret and its Pod, which carry its name; a registration at the CI system has the pool's mark. What the operator remembers
//! by itself (`Kept`) costs time when it is lost, never a job.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::utils::Backoff;
use kube::runtime::{WatchStreamExt as _, reflector, watcher};
use kube::{Client, ResourceExt as _};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use vmpod_api::pool::RunnerPool;
use vmpod_api::runner::{Phase, Runner, RunnerStatus};

use crate::kubevirt::{self, VirtualMachineInstance};
use crate::life::{self, Work};
use crate::metrics::{self, Metrics};
use crate::plan::{self, Demand, Memory, Observed};
use crate::provider::{self, Keep, Provider, Providers, Seen as Job, Waiting};
use crate::share::{Wish, share};
use crate::{chain, leader, objects, schedule};

mod ask;
mod effects;
mod events;
mod pool;

/// Who the operator is to the API: the field manager of what it applies.
const MANAGER: &str = "vmpod-fleet";
/// The Lease of the operator that acts.
const LEASE: &str = "vmpod-fleet";
/// How long changes are gathered before they are looked at.
const GATHER: Duration = Duration::from_millis(100);
/// How often a pool's registration, its settings and its token are looked after.
const ENSURE: SignedDuration = SignedDuration::from_mins(1);
/// A machine at the CI system that no runner speaks of is forgotten when it was silent for so long.
const GHOST: SignedDuration = SignedDuration::from_mins(10);
/// So many objects are written at once: an API that syncs each write to a disk does it for many together.
const AT_ONCE: usize = 32;

/// What the time is: another one in simulations.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// How the operator works.
#[derive(Clone)]
pub struct Options {
    /// The API, as somebody who may do what `docs/fleet.md` lists.
    pub client: Client,
    /// This operator among others, for the lease.
    pub identity: String,
    /// Where the lease is.
    pub namespace: String,
    /// Whether to make the definitions of its kinds first.
    pub install: bool,
    /// How often the CI systems are asked: they tell nothing by themselves.
    pub poll: Duration,
    /// What it counts.
    pub metrics: Metrics,
    /// The CI systems.
    pub providers: Arc<dyn Providers>,
    /// What the time is.
    pub clock: Clock,
}

impl Options {
    /// As usual: vmpod's own providers, and the time as it is.
    #[must_use]
    pub fn new(client: Client, identity: String) -> Self {
        Self {
            client,
            identity,
            namespace: "default".to_owned(),
            install: true,
            poll: Duration::from_secs(3),
            metrics: Metrics::default(),
            providers: Arc::new(provider::Standard::default()),
            clock: Arc::new(Timestamp::now),
        }
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options").field("identity", &self.identity).field("poll", &self.poll).finish_non_exhaustive()
    }
}

/// Why the operator couldn't begin.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// The kinds `RunnerPool` and `Runner` couldn't be made.
    #[error("the kinds of the fleet can't be made known to the API")]
    Install(#[source] kube::Error),
}

/// What is kept of a pool between two looks.
#[derive(Default)]
struct Kept {
    memory: Memory,
    /// The pool's CI system, as its spec and its Secrets were when it was last asked.
    provider: Option<Arc<dyn Provider>>,
    keep: Option<Keep>,
    /// Of which generation of the pool the registration was looked after, and when.
    ensured: Option<(i64, Timestamp)>,
    /// Of which generation of the pool the disruption budget is.
    guarded: Option<i64>,
    /// Why there is no registration, or what is wrong with it.
    trouble: Option<String>,
    /// Not to be asked before.
    retry: Option<Timestamp>,
    demand: Option<Result<Waiting, String>>,
    machines: Option<Result<BTreeMap<String, Job>, String>>,
    asked: Option<Timestamp>,
    /// Runners that were made and may not be in the cache yet, since when.
    expected: BTreeMap<String, Expected>,
    /// Runners that were made here and have no machine yet: nobody else can have done anything about them.
    fresh: BTreeSet<String>,
    /// Failed runners that were counted.
    counted: BTreeSet<String>,
    /// What is to be told of the pool.
    told: Vec<events::Told>,
    /// What was last shown of it.
    look: metrics::Look,
    /// Jobs up to this one were counted as begun; those that hadn't ended then.
    jobs: ask::Jobs,
}

impl Kept {
    /// Whether a machine was given something to be known by that has since been replaced.
    fn is_stale(&self, pod: &Pod) -> bool {
        let (given, keep) = (pod.annotations().get(objects::CREDENTIAL), self.keep.as_ref());
        given.zip(keep).is_some_and(|(given, keep)| *given != objects::fingerprint(keep.expose()))
    }
}

/// A runner that was made a moment ago.
struct Expected {
    at: Timestamp,
    placement: String,
}

struct Operator {
    options: Options,
    pools: reflector::Store<RunnerPool>,
    runners: reflector::Store<Runner>,
    pods: reflector::Store<Pod>,
    /// Of `KubeVirt`, once a pool asks for it.
    instances: Option<reflector::Store<VirtualMachineInstance>>,
    wake: mpsc::Sender<()>,
    tasks: JoinSet<()>,
    nodes: reflector::Store<Node>,
    kept: HashMap<String, Kept>,
    /// Since when a node takes no new pods.
    cordoned: BTreeMap<String, Timestamp>,
}

/// What one pool has, of everything that there is.
struct Part {
    pool: Arc<RunnerPool>,
    /// Its Runners by name, each with its pod.
    runners: Vec<(Arc<Runner>, Option<Arc<Pod>>)>,
}

/// Works until `stop` is cancelled.
pub async fn run(options: Options, stop: CancellationToken) -> Result<(), OperatorError> {
    if options.install {
        install(&options.client).await.map_err(OperatorError::Install)?;
    }
    let mut tasks = JoinSet::new();
    let (wake, mut woken) = mpsc::channel(1);
    let client = options.client.clone();
    let labelled = watcher::Config::default().labels(objects::POOL);
    let mut operator = Operator {
        pools: cache(Api::all(client.clone()), watcher::Config::default(), &wake, &mut tasks),
        runners: cache(Api::all(client.clone()), watcher::Config::default(), &wake, &mut tasks),
        pods: cache(Api::all(client.clone()), labelled, &wake, &mut tasks),
        nodes: cache(Api::all(client), watcher::Config::default(), &wake, &mut tasks),
        instances: None,
        wake,
        tasks,
        kept: HashMap::new(),
        cordoned: BTreeMap::new(),
        options,
    };
    // Nothing is decided before everything was seen once.
    let complete = async {
        operator.pools.wait_until_ready().await.ok();
        operator.runners.wait_until_ready().await.ok();
        operator.pods.wait_until_ready().await.ok();
        operator.nodes.wait_until_ready().await.ok();
    };
    tokio::select! {
        () = complete => {}
        () = stop.cancelled() => return Ok(()),
    }
    let leases: Api<Lease> = Api::namespaced(operator.options.client.clone(), &operator.options.namespace);
    let mut renew = tokio::time::interval(leader::EVERY);
    renew.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut poll = tokio::time::interval(operator.options.poll);
    poll.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut leads = false;
    loop {
        tokio::select! {
            // In this order, so that a simulation goes the same way each time.
            biased;
            () = stop.cancelled() => return Ok(()),
            _ = renew.tick() => {
                let now = (operator.options.clock)();
                let now = leader::lead(&leases, LEASE, &operator.options.identity, now).await;
                let now = now.unwrap_or_else(|error| {
                    tracing::warn!(error = chain(&error), "the lease can't be renewed");
                    false
                });
                if now && !leads {
                    tracing::info!(identity = operator.options.identity, "this operator leads");
                }
                if leads && !now {
                    // What it saw last is not what is: another operator tells.
                    operator.options.metrics.looks(Vec::new(), []);
                }
                leads = now;
                operator.options.metrics.leads(leads);
                continue;
            }
            _ = poll.tick() => {}
            _ = woken.recv() => tokio::time::sleep(GATHER).await,
        }
        if leads {
            let began = tokio::time::Instant::now();
            operator.pass().await;
            operator.options.metrics.pass(began.elapsed());
        }
    }
}

/// The pauses between tries of a watch: twice as long each time, from 0.8 s to 30 s, as client-go's. One client has nobody to
/// keep out of step with, so there is no chance in them, and a simulation goes the same way each time.
#[derive(Debug, Default)]
struct Pauses(u32);

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = Duration::from_millis(800).saturating_mul(1 << self.0.min(10)).min(Duration::from_secs(30));
        self.0 = self.0.saturating_add(1);
        Some(pause)
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        self.0 = 0;
    }
}

/// Makes the definitions, or brings them up to date.
async fn install(client: &Client) -> Result<(), kube::Error> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for definition in vmpod_api::definitions() {
        let name = definition.name_any();
        api.patch(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&definition)).await?;
    }
    Ok(())
}

/// Keeps a copy of all objects of a kind, and wakes the operator with each change.
fn cache<K>(
    api: Api<K>,
    config: watcher::Config,
    wake: &mpsc::Sender<()>,
    tasks: &mut JoinSet<()>,
) -> reflector::Store<K>
where
    K: kube::Resource<DynamicType = ()> + Clone + std::fmt::Debug + Send + Sync + serde::de::DeserializeOwned + 'static,
{
    let (store, writer) = reflector::store();
    let wake = wake.clone();
    tasks.spawn(async move {
        let stream = watcher(api, config).backoff(Pauses::default());
        // Nobody here reads who wrote which field, and it is the greater part of a small object.
        let stream = stream.modify(|object| object.meta_mut().managed_fields = None);
        let stream = stream.reflect(writer).touched_objects();
        let mut stream = std::pin::pin!(stream);
        while let Some(event) = stream.next().await {
            match event {
                // A full channel is a wake-up that is on its way.
                Ok(_) => drop(wake.try_send(())),
                Err(error) => tracing::debug!(error = chain(&error), "a watch is begun again"),
            }
        }
    });
    store
}

impl Operator {
    async fn pass(&mut self) {
        let now = (self.options.clock)();
        self.watch_instances();
        let parts = self.parts();
        let present: BTreeSet<String> = parts.iter().map(|part| key(part.pool.as_ref())).collect();
        self.kept.retain(|name, _| present.contains(name));
        let nodes = self.cordons(now);
        let mut views = Vec::new();
        for part in parts {
            let mut kept = self.kept.remove(&key(part.pool.as_ref())).unwrap_or_default();
            if !self.sees(&part) {
                self.blind(&part.pool, now).await;
                self.kept.insert(key(part.pool.as_ref()), kept);
                continue;
            }
            self.ask(&part.pool, &mut kept, now).await;
            let (runners, changes) = self.view(&part, &mut kept, &nodes, now);
            self.write_statuses(changes).await;
            views.push((part, kept, runners));
        }
        let shares = self.shares(&views, now);
        let mut looks = Vec::new();
        for ((part, mut kept, runners), share) in views.into_iter().zip(shares) {
            match self.pool(&part, &mut kept, &runners, share, now).await {
                Ok(look) => kept.look = look,
                Err(error) => tracing::warn!(
                    pool = key(part.pool.as_ref()),
                    error = chain(&error),
                    "the pool can't be looked after; trying again"
                ),
            }
            looks.push((label(&part.pool), kept.look.clone()));
            self.kept.insert(key(part.pool.as_ref()), kept);
        }
        self.options.metrics.looks(looks, self.options.providers.calls());
    }

    /// Everything that there is, by pool: one walk, whatever the number of pools. In the order of names.
    fn parts(&self) -> Vec<Part> {
        let mut pods: HashMap<(String, String), Arc<Pod>> = HashMap::new();
        let instances = self.instances.as_ref().map(reflector::Store::state).unwrap_or_default();
        let instances = instances.iter().map(|instance| Arc::new(kubevirt::as_pod(instance)));
        for pod in self.pods.state().into_iter().chain(instances) {
            if let (Some(runner), Some(namespace)) = (pod.labels().get(objects::RUNNER), pod.namespace())
                // The pod in which KubeVirt runs an instance has the instance's labels, and a name of its own.
                && *runner == pod.name_any()
            {
                pods.insert((namespace, runner.clone()), Arc::clone(&pod));
            }
        }
        let mut runners: HashMap<(String, String), Vec<Arc<Runner>>> = HashMap::new();
        for runner in self.runners.state() {
            runners.entry((namespace(runner.as_ref()), runner.spec.pool.clone())).or_default().push(runner);
        }
        let mut pools = self.pools.state();
        pools.sort_by_key(|pool| key(pool.as_ref()));
        let part = |pool: Arc<RunnerPool>| {
            let of = namespace(pool.as_ref());
            let mut mine = runners.remove(&(of.clone(), pool.name_any())).unwrap_or_default();
            mine.sort_by_key(|runner| runner.name_any());
            let with_pod = |runner: Arc<Runner>| {
                let pod = pods.get(&(of.clone(), runner.name_any())).cloned();
                (runner, pod)
            };
            Part { pool, runners: mine.into_iter().map(with_pod).collect() }
        };
        pools.into_iter().map(part).collect()
    }

    /// Watches `KubeVirt`'s instances from the first pool on that has some. Where there is no `KubeVirt` nobody asks for it.
    fn watch_instances(&mut self) {
        if self.instances.is_none() && self.pools.state().iter().any(|pool| kubevirt::runs(&pool.spec)) {
            let labelled = watcher::Config::default().labels(objects::POOL);
            let api = Api::all(self.options.client.clone());
            self.instances = Some(cache(api, labelled, &self.wake, &mut self.tasks));
        }
    }

    /// Whether a pool's machines can be seen: before that nothing is decided. One that is to go and has no runner has no machine either,
    /// since a runner is there before its machine.
    fn sees(&self, part: &Part) -> bool {
        use futures::FutureExt as _;
        let ready = |store: &reflector::Store<VirtualMachineInstance>| {
            store.wait_until_ready().now_or_never().is_some_and(|ready| ready.is_ok())
        };
        let empty = part.runners.is_empty() && part.pool.metadata.deletion_timestamp.is_some();
        !kubevirt::runs(&part.pool.spec) || empty || self.instances.as_ref().is_some_and(ready)
    }

    /// Which nodes take no new pods, and since when as far as is known.
    fn cordons(&mut self, now: Timestamp) -> BTreeMap<String, Timestamp> {
        let off: BTreeSet<String> = self
            .nodes
            .state()
            .iter()
            .filter(|node| node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false))
            .map(|node| node.name_any())
            .collect();
        self.cordoned.retain(|node, _| off.contains(node));
        for node in off {
            self.cordoned.entry(node).or_insert(now);
        }
        self.cordoned.clone()
    }

    /// How many runners each pool may have of what the nodes offer.
    fn shares(&self, views: &[(Part, Kept, Vec<plan::Runner>)], now: Timestamp) -> Vec<Option<u32>> {
        let nodes = self.nodes.state();
        if nodes.is_empty() || views.len() < 2 {
            return vec![None; views.len()];
        }
        let capacity = objects::capacity(nodes.iter().map(AsRef::as_ref));
        let wishes: Vec<Wish> = views
            .iter()
            .map(|(part, kept, runners)| {
                let spec = &part.pool.spec;
                let template = objects::template(spec);
                let observed = Observed { runners, demand: demand(kept), template: &template, share: None };
                // On a copy: this look decides nothing.
                let wanted = plan::plan(spec, &observed, &mut kept.memory.clone(), now).wanted;
                let busy = runners.iter().filter(|runner| runner.phase == Phase::Busy).count();
                Wish {
                    priority: spec.priority,
                    each: objects::amount(spec.resources.cpu.as_deref(), spec.resources.memory.as_deref()),
                    busy: u32::try_from(busy).unwrap_or(u32::MAX),
                    wanted,
                }
            })
            .collect();
        share(&wishes, capacity).into_iter().map(Some).collect()
    }

    /// The pool's runners as they are now, and what of it isn't written down yet.
    fn view(
        &self,
        part: &Part,
        kept: &mut Kept,
        cordoned: &BTreeMap<String, Timestamp>,
        now: Timestamp,
    ) -> (Vec<plan::Runner>, Vec<(Arc<Runner>, RunnerStatus)>) {
        let (mut all, mut changes) = (Vec::new(), Vec::new());
        for (runner, pod) in &part.runners {
            kept.expected.remove(&runner.name_any());
            let (seen, change) = self.look(&part.pool, runner, pod.as_deref(), kept, cordoned, now);
            changes.extend(change.map(|status| (Arc::clone(runner), status)));
            all.push(seen);
        }
        kept.counted.retain(|name| all.iter().any(|runner: &plan::Runner| runner.name == *name));
        // Those that were made a moment ago and didn't come back by the watch yet.
        kept.expected.retain(|_, made| now.duration_since(made.at) < SignedDuration::from_secs(30));
        for (name, Expected { at, placement }) in &kept.expected {
            all.push(plan::Runner {
                name: name.clone(),
                phase: Phase::Pending,
                since: *at,
                template: objects::template(&part.pool.spec),
                placement: placement.clone(),
                created: *at,
                draining: None,
                unschedulable: false,
                stale: false,
                cordoned: None,
            });
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        (all, changes)
    }

    fn look(
        &self,
        pool: &RunnerPool,
        runner: &Runner,
        pod: Option<&Pod>,
        kept: &mut Kept,
        cordoned: &BTreeMap<String, Timestamp>,
        now: Timestamp,
    ) -> (plan::Runner, Option<RunnerStatus>) {
        let status = runner.status.clone().unwrap_or_default();
        let created = runner.metadata.creation_timestamp.as_ref().map_or(now, |at| at.0);
        let time = |text: &Option<String>| text.as_ref().and_then(|text| text.parse::<Timestamp>().ok());
        let since = time(&status.since).unwrap_or(created);
        let draining = time(&status.draining_since);
        let seen = objects::seen(pod);
        let machine = kept.provider.as_ref().map(|provider| machine_id(provider.as_ref(), runner));
        // A short job's machine comes and goes between two looks: a list from before its end doesn't say that it was unknown.
        let ended = pod.and_then(objects::ended).and_then(|at| at.checked_add(SignedDuration::from_secs(1)).ok());
        let older = ended.is_some_and(|ended| kept.asked.is_none_or(|asked| asked <= ended));
        let work = match (&kept.machines, &machine) {
            (Some(Ok(machines)), Some(machine)) => match machines.get(machine) {
                Some(job) if job.busy => Work::Busy,
                Some(_) => Work::Idle,
                None if older => Work::Unknown,
                None => Work::Unheard,
            },
            _ => Work::Unknown,
        };
        let unschedulable = seen == life::Pod::Unschedulable;
        let provision = pool.spec.provision.as_ref().map_or(0, |provision| provision.timeout_seconds);
        let provision = SignedDuration::from_secs(provision.into());
        let asked = draining.is_some();
        let (phase, message) = life::phase(
            &life::Seen { phase: status.phase, since, created, pod: seen, work, draining: asked, provision },
            now,
        );
        let before = since;
        let since = if phase == status.phase { since } else { now };
        if phase == Phase::Failed && kept.counted.insert(runner.name_any()) {
            kept.memory.failures = kept.memory.failures.saturating_add(1);
            kept.memory.failed = Some(now);
            self.options.metrics.failed(&label(pool));
            let why = message.as_ref().or(status.message.as_ref()).map(String::as_str).unwrap_or_default();
            tracing::warn!(runner = runner.name_any(), why, "a runner failed");
            let message = format!("Runner {} failed: {why}", runner.name_any());
            kept.told.push(events::Told { reason: "RunnerFailed", message });
        }
        if matches!(phase, Phase::Idle | Phase::Busy) {
            kept.memory.failures = 0;
        }
        // What was seen happen, for the estimates.
        let passed = |from: Timestamp| now.duration_since(from);
        let up = |phase: Phase| matches!(phase, Phase::Idle | Phase::Busy | Phase::Draining);
        if up(phase) && !up(status.phase) && !status.phase.is_over() {
            kept.memory.estimate.started(passed(created));
        }
        if let Some(step) = metrics::step(status.phase, phase) {
            self.options.metrics.started(&label(pool), step, passed(before).as_secs_f64());
        }
        match (status.phase, phase) {
            (Phase::Busy, Phase::Busy) => {}
            (_, Phase::Busy) => kept.memory.estimate.began(),
            (Phase::Busy, _) => kept.memory.estimate.ended(passed(time(&status.since).unwrap_or(created))),
            _ => {}
        }
        let changed = phase != status.phase || (message.is_some() && message != status.message);
        let change = changed.then(|| RunnerStatus {
            phase,
            since: Some(objects::whole_second(since).to_string()),
            message,
            system_id: machine.or(status.system_id),
            draining_since: status.draining_since,
        });
        let node = pod.and_then(|pod| pod.spec.as_ref()?.node_name.clone());
        let seen = plan::Runner {
            name: runner.name_any(),
            phase,
            since,
            template: runner.spec.template.clone(),
            placement: runner.spec.placement.clone(),
            created,
            draining,
            unschedulable,
            stale: pod.is_some_and(|pod| kept.is_stale(pod)),
            cordoned: node.and_then(|node| cordoned.get(&node).copied()),
        };
        (seen, change)
    }

    async fn write_statuses(&self, changes: Vec<(Arc<Runner>, RunnerStatus)>) {
        let one = |(runner, status): (Arc<Runner>, RunnerStatus)| -> effects::Effect<'_, ()> {
            Box::pin(async move {
                self.write_status(&runner, &status).await;
                Ok(())
            })
        };
        // Each tells of its own failure.
        drop(effects::all(changes.into_iter().map(one).collect()).await);
    }

    async fn write_status(&self, runner: &Runner, status: &RunnerStatus) {
        let runners: Api<Runner> = Api::namespaced(self.options.client.clone(), &namespace(runner));
        let patch = json!({ "status": status });
        let done = runners.patch_status(&runner.name_any(), &PatchParams::default(), &Patch::Merge(&patch)).await;
        if let Err(error) = done {
            // It is seen again in the next pass.
            tracing::debug!(runner = runner.name_any(), error = chain(&error), "a status wasn't written");
        }
    }
}

/// Who a runner is to its CI system.
fn machine_id(provider: &dyn Provider, runner: &Runner) -> String {
    provider.machine_id(&runner.name_any(), &runner.uid().unwrap_or_default())
}

fn label(pool: &RunnerPool) -> metrics::Pool {
    metrics::Pool { namespace: namespace(pool), pool: pool.name_any() }
}

fn demand(kept: &Kept) -> Demand {
    match &kept.demand {
        Some(Ok(waiting)) => Demand::Known { count: waiting.count, oldest: waiting.oldest },
        Some(Err(why)) => Demand::Unknown(why.clone()),
        None => Demand::Unknown("the CI system hasn't been asked yet".to_owned()),
    }
}

fn namespace<K: kube::ResourceExt>(object: &K) -> String {
    object.namespace().unwrap_or_else(|| "default".to_owned())
}

fn key<K: kube::ResourceExt>(object: &K) -> String {
    format!("{}/{}", namespace(object), object.name_any())
}

/// Something that is there already is as good as made: an operator before this one made it.
fn made<T>(result: Result<T, kube::Error>) -> Result<(), kube::Error> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        result => result.map(drop),
    }
}

/// Something that isn't there any more is as good as done.
fn gone<T>(result: Result<T, kube::Error>) -> Result<(), kube::Error> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
        result => result.map(drop),
    }
}
