//! The operator: it looks at pools, runners, pods, nodes and the CI systems, asks the pure parts what to do, and does it.
//!
//! One task does everything, so nothing is decided twice at once. Every effect can be repeated: a runner is made before its
//! Secret and its Pod, which carry its name; a record at the CI system has the pool's mark. What the operator remembers by itself
//! ([`Memory`]) costs time when it is lost, never a job.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use futures::StreamExt as _;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod, Secret};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::{WatchStreamExt as _, reflector, watcher};
use kube::{Client, ResourceExt as _};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use vmpod_api::pool::{RunnerPool, RunnerPoolStatus};
use vmpod_api::runner::{Phase, Runner, RunnerStatus};

use crate::gitlab::{self, Gitlabs, Held, Seen as Job};
use crate::life::{self, Work};
use crate::plan::{self, Demand, Memory, Observed, Plan};
use crate::share::{Wish, share};
use crate::{leader, objects};

mod provider;

/// Who the operator is to the API: the field manager of what it applies.
const MANAGER: &str = "vmpod-fleet";
/// The Lease of the operator that acts.
const LEASE: &str = "vmpod-fleet";
/// How long changes are gathered before they are looked at.
const GATHER: Duration = Duration::from_millis(100);
/// How often a pool's record, its settings and its token are looked after.
const ENSURE: SignedDuration = SignedDuration::from_mins(1);
/// A machine at the CI system that no runner speaks of is forgotten when it was silent for so long.
const GHOST: SignedDuration = SignedDuration::from_mins(10);

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
    held: Option<Held>,
    /// Of which generation of the pool the record was looked after, and when.
    ensured: Option<(i64, Timestamp)>,
    /// The client of the pool's GitLab, and why there is none.
    trouble: Option<String>,
    /// Not to be asked before.
    retry: Option<Timestamp>,
    demand: Option<Result<gitlab::Waiting, String>>,
    machines: Option<Result<BTreeMap<String, Job>, String>>,
    asked: Option<Timestamp>,
    /// Runners that were made and may not be in the cache yet, since when.
    expected: BTreeMap<String, Expected>,
    /// Failed runners that were counted.
    counted: BTreeSet<String>,
}

/// A runner that was made a moment ago.
struct Expected {
    at: Timestamp,
    placement: String,
}

struct Operator {
    options: Options,
    gitlabs: Gitlabs,
    pools: reflector::Store<RunnerPool>,
    runners: reflector::Store<Runner>,
    pods: reflector::Store<Pod>,
    nodes: reflector::Store<Node>,
    kept: HashMap<String, Kept>,
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
        gitlabs: Gitlabs::default(),
        pools: cache(Api::all(client.clone()), watcher::Config::default(), &wake, &mut tasks),
        runners: cache(Api::all(client.clone()), watcher::Config::default(), &wake, &mut tasks),
        pods: cache(Api::all(client.clone()), labelled, &wake, &mut tasks),
        nodes: cache(Api::all(client), watcher::Config::default(), &wake, &mut tasks),
        kept: HashMap::new(),
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
            () = stop.cancelled() => return Ok(()),
            _ = renew.tick() => {
                let now = leader::lead(&leases, LEASE, &operator.options.identity, Timestamp::now()).await;
                let now = now.unwrap_or_else(|error| {
                    tracing::warn!(error = chain(&error), "the lease can't be renewed");
                    false
                });
                if now && !leads {
                    tracing::info!(identity = operator.options.identity, "this operator leads");
                }
                leads = now;
                continue;
            }
            _ = poll.tick() => {}
            _ = woken.recv() => tokio::time::sleep(GATHER).await,
        }
        if leads {
            operator.pass().await;
        }
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
        let stream = watcher(api, config).default_backoff().reflect(writer).touched_objects();
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
        let now = Timestamp::now();
        let pools = self.pools.state();
        let present: BTreeSet<String> = pools.iter().map(|pool| key(pool.as_ref())).collect();
        self.kept.retain(|name, _| present.contains(name));
        let mut views = Vec::new();
        for pool in &pools {
            let mut kept = self.kept.remove(&key(pool.as_ref())).unwrap_or_default();
            self.ask(pool, &mut kept, now).await;
            let runners = self.view(pool, &mut kept, now).await;
            views.push((pool, kept, runners));
        }
        let shares = self.shares(&views, now);
        for ((pool, mut kept, runners), share) in views.into_iter().zip(shares) {
            if let Err(error) = self.pool(pool, &mut kept, &runners, share, now).await {
                tracing::warn!(
                    pool = key(pool.as_ref()),
                    error = chain(&error),
                    "the pool can't be looked after; trying again"
                );
            }
            self.kept.insert(key(pool.as_ref()), kept);
        }
    }

    /// How many runners each pool may have of what the nodes offer.
    fn shares(
        &self,
        views: &[(&std::sync::Arc<RunnerPool>, Kept, Vec<plan::Runner>)],
        now: Timestamp,
    ) -> Vec<Option<u32>> {
        let nodes = self.nodes.state();
        if nodes.is_empty() || views.len() < 2 {
            return vec![None; views.len()];
        }
        let capacity = objects::capacity(nodes.iter().map(AsRef::as_ref));
        let wishes: Vec<Wish> = views
            .iter()
            .map(|(pool, kept, runners)| {
                let template = objects::template(&pool.spec);
                let observed = Observed { runners, demand: demand(kept), template: &template, share: None };
                // On a copy: this look decides nothing.
                let wanted = plan::plan(&pool.spec, &observed, &mut kept.memory.clone(), now).wanted;
                let busy = runners.iter().filter(|runner| runner.phase == Phase::Busy).count();
                Wish {
                    priority: pool.spec.priority,
                    each: objects::amount(pool.spec.resources.cpu.as_deref(), pool.spec.resources.memory.as_deref()),
                    busy: u32::try_from(busy).unwrap_or(u32::MAX),
                    wanted,
                }
            })
            .collect();
        share(&wishes, capacity).into_iter().map(Some).collect()
    }

    /// The pool's runners as they are now; what changed is written down.
    async fn view(&self, pool: &RunnerPool, kept: &mut Kept, now: Timestamp) -> Vec<plan::Runner> {
        let nodes: HashMap<String, bool> = self
            .nodes
            .state()
            .iter()
            .map(|node| (node.name_any(), node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false)))
            .collect();
        let pods: HashMap<String, std::sync::Arc<Pod>> = self
            .pods
            .state()
            .into_iter()
            .filter(|pod| pod.namespace() == pool.namespace())
            .filter_map(|pod| Some((pod.labels().get(objects::RUNNER)?.clone(), pod)))
            .collect();
        let mut all = Vec::new();
        for runner in self.runners.state() {
            if runner.namespace() != pool.namespace() || runner.spec.pool != pool.name_any() {
                continue;
            }
            kept.expected.remove(&runner.name_any());
            let pod = pods.get(&runner.name_any()).map(AsRef::as_ref);
            all.push(self.look(&runner, pod, kept, &nodes, now).await);
        }
        kept.counted.retain(|name| all.iter().any(|runner: &plan::Runner| runner.name == *name));
        // Those that were made a moment ago and didn't come back by the watch yet.
        kept.expected.retain(|_, made| now.duration_since(made.at) < SignedDuration::from_secs(30));
        for (name, Expected { at, placement }) in &kept.expected {
            all.push(plan::Runner {
                name: name.clone(),
                phase: Phase::Pending,
                since: *at,
                template: objects::template(&pool.spec),
                placement: placement.clone(),
                created: *at,
                draining: None,
                unschedulable: false,
                cordoned: false,
            });
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    async fn look(
        &self,
        runner: &Runner,
        pod: Option<&Pod>,
        kept: &mut Kept,
        nodes: &HashMap<String, bool>,
        now: Timestamp,
    ) -> plan::Runner {
        let status = runner.status.clone().unwrap_or_default();
        let created = runner.metadata.creation_timestamp.as_ref().map_or(now, |at| at.0);
        let time = |text: &Option<String>| text.as_ref().and_then(|text| text.parse::<Timestamp>().ok());
        let since = time(&status.since).unwrap_or(created);
        let draining = time(&status.draining_since);
        let seen = objects::seen(pod);
        let system_id = gitlab::system_id(&runner.uid().unwrap_or_default());
        let work = match &kept.machines {
            Some(Ok(machines)) => match machines.get(&system_id) {
                Some(job) if job.busy => Work::Busy,
                Some(_) => Work::Idle,
                None => Work::Unheard,
            },
            _ => Work::Unknown,
        };
        let unschedulable = seen == life::Pod::Unschedulable;
        let (phase, message) = life::phase(
            &life::Seen { phase: status.phase, since, created, pod: seen, work, draining: draining.is_some() },
            now,
        );
        let since = if phase == status.phase { since } else { now };
        if phase == Phase::Failed && kept.counted.insert(runner.name_any()) {
            kept.memory.failures = kept.memory.failures.saturating_add(1);
            kept.memory.failed = Some(now);
            tracing::warn!(runner = runner.name_any(), why = message.as_deref().unwrap_or_default(), "a runner failed");
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
        match (status.phase, phase) {
            (Phase::Busy, Phase::Busy) => {}
            (_, Phase::Busy) => kept.memory.estimate.began(),
            (Phase::Busy, _) => kept.memory.estimate.ended(passed(time(&status.since).unwrap_or(created))),
            _ => {}
        }
        if phase != status.phase || (message.is_some() && message != status.message) {
            let status = RunnerStatus {
                phase,
                since: Some(objects::whole_second(since).to_string()),
                message,
                system_id: Some(system_id),
                draining_since: status.draining_since,
            };
            self.write_status(runner, &status).await;
        }
        let node = pod.and_then(|pod| pod.spec.as_ref()?.node_name.clone());
        plan::Runner {
            name: runner.name_any(),
            phase,
            since,
            template: runner.spec.template.clone(),
            placement: runner.spec.placement.clone(),
            created,
            draining,
            unschedulable,
            cordoned: node.and_then(|node| nodes.get(&node).copied()).unwrap_or(false),
        }
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

    /// Brings one pool nearer to what it should be.
    async fn pool(
        &self,
        pool: &RunnerPool,
        kept: &mut Kept,
        runners: &[plan::Runner],
        share: Option<u32>,
        now: Timestamp,
    ) -> Result<(), kube::Error> {
        if pool.metadata.deletion_timestamp.is_some() {
            return self.end(pool, kept, runners, now).await;
        }
        if !pool.finalizers().iter().any(|name| name == objects::FINALIZER) {
            self.finalizers(pool, true).await?;
        }
        let template = objects::template(&pool.spec);
        let observed = Observed { runners, demand: demand(kept), template: &template, share };
        let plan = plan::plan(&pool.spec, &observed, &mut kept.memory, now);
        self.equip(pool, kept).await?;
        for name in &plan.remove {
            self.remove(pool, kept, name, now).await?;
        }
        for name in &plan.drain {
            self.drain(pool, kept, name, now).await?;
        }
        // Without a record there is nothing that a machine could do.
        if kept.held.is_some() {
            for placement in &plan.create {
                self.create(pool, kept, placement, now).await?;
            }
        }
        self.ghosts(pool, kept, now).await;
        self.tell(pool, kept, runners, &plan, &template, now).await
    }

    async fn create(
        &self,
        pool: &RunnerPool,
        kept: &mut Kept,
        placement: &str,
        now: Timestamp,
    ) -> Result<(), kube::Error> {
        let runners: Api<Runner> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        let suffix: String = uuid::Uuid::new_v4().simple().to_string().chars().take(8).collect();
        let name = format!("{}-{suffix}", pool.name_any());
        runners.create(&PostParams::default(), &objects::runner(pool, &name, placement)).await?;
        tracing::info!(runner = name, placement, "a runner is made");
        kept.expected.insert(name, Expected { at: now, placement: placement.to_owned() });
        Ok(())
    }

    /// Gives runners that have none their Secret and their machine.
    async fn equip(&self, pool: &RunnerPool, kept: &Kept) -> Result<(), kube::Error> {
        let Some(held) = &kept.held else { return Ok(()) };
        let have: BTreeSet<String> =
            self.pods.state().iter().filter_map(|pod| pod.labels().get(objects::RUNNER).cloned()).collect();
        let client = &self.options.client;
        for runner in self.runners.state() {
            let phase = runner.status.as_ref().map_or(Phase::Pending, |status| status.phase);
            let ours = runner.namespace() == pool.namespace() && runner.spec.pool == pool.name_any();
            if !ours
                || phase != Phase::Pending
                || have.contains(&runner.name_any())
                || runner.metadata.deletion_timestamp.is_some()
            {
                continue;
            }
            let (name, system_id) = (runner.name_any(), gitlab::system_id(&runner.uid().unwrap_or_default()));
            let machine = gitlab::Machine {
                url: &pool.spec.provider.gitlab.url,
                held,
                system_id: &system_id,
                name: &name,
                jobs: pool.spec.jobs_per_runner,
                wait: None,
            };
            let data = match &pool.spec.user_data {
                None => gitlab::standard(&machine),
                Some(template) => match gitlab::fill(template, &machine) {
                    Ok(data) => data,
                    Err(error) => {
                        let status = RunnerStatus {
                            phase: Phase::Failed,
                            message: Some(error.to_string()),
                            ..RunnerStatus::default()
                        };
                        self.write_status(&runner, &status).await;
                        continue;
                    }
                },
            };
            let secrets: Api<Secret> = Api::namespaced(client.clone(), &namespace(pool));
            made(secrets.create(&PostParams::default(), &objects::secret(&runner, data)).await)?;
            let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace(pool));
            made(pods.create(&PostParams::default(), &objects::pod(pool, &runner)).await)?;
        }
        Ok(())
    }

    /// Asks a runner to go. One that is idle is looked at once more: a job may have come.
    async fn drain(&self, pool: &RunnerPool, kept: &Kept, name: &str, now: Timestamp) -> Result<(), kube::Error> {
        let Some(runner) = self.runner(pool, name) else { return Ok(()) };
        let uid = runner.uid().unwrap_or_default();
        let system_id = gitlab::system_id(&uid);
        let busy = match (&kept.held, self.gitlab(pool).await) {
            (Some(held), Ok(gitlab)) => {
                gitlab.is_busy(held.record, &system_id, now).await.map_err(|error| chain(&error))
            }
            (None, _) => Err("the pool's runner isn't known yet".to_owned()),
            (_, Err(why)) => Err(why),
        };
        let pods = self.pods.state();
        let pod = pods.iter().find(|pod| pod.name_any() == name && pod.namespace() == pool.namespace());
        let up = objects::seen(pod.map(AsRef::as_ref)) == life::Pod::Up;
        let phase = runner.status.as_ref().map_or(Phase::Pending, |status| status.phase);
        match busy {
            Ok(false) => {}
            Ok(true) => return Ok(()),
            // One that never came up has no job, whoever can't be asked.
            Err(_) if !up && matches!(phase, Phase::Pending | Phase::Starting) => {}
            Err(why) => {
                tracing::debug!(runner = name, why, "not drained: nobody can say whether it has a job");
                return Ok(());
            }
        }
        // With the pod's own grace period: should a job have come in this instant, the guest ends after it. It is written down
        // afterwards, so that an operator that dies in between asks again.
        let pods: Api<Pod> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        gone(pods.delete(name, &DeleteParams::default()).await)?;
        tracing::info!(runner = name, "a runner is asked to go");
        let mut status = runner.status.clone().unwrap_or_default();
        status.draining_since = Some(objects::whole_second(now).to_string());
        self.write_status(&runner, &status).await;
        Ok(())
    }

    /// Removes a runner that is over: first from the CI system's list, so that nothing is left there.
    async fn remove(&self, pool: &RunnerPool, kept: &Kept, name: &str, now: Timestamp) -> Result<(), kube::Error> {
        let Some(runner) = self.runner(pool, name) else { return Ok(()) };
        if let (Some(held), Ok(gitlab)) = (&kept.held, self.gitlab(pool).await)
            && let Err(error) = gitlab.forget(held, &gitlab::system_id(&runner.uid().unwrap_or_default()), now).await
        {
            tracing::debug!(runner = name, error = chain(&error), "the CI system can't forget it now; trying again");
            return Ok(());
        }
        let runners: Api<Runner> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        let same = Preconditions { uid: runner.uid(), resource_version: None };
        // In the background: its Secret and its Pod go with it.
        gone(runners.delete(name, &DeleteParams { preconditions: Some(same), ..DeleteParams::background() }).await)
    }

    fn runner(&self, pool: &RunnerPool, name: &str) -> Option<std::sync::Arc<Runner>> {
        self.runners.get(&reflector::ObjectRef::new(name).within(&namespace(pool)))
    }

    /// Removes machines from the CI system's list that no runner speaks of any more.
    async fn ghosts(&self, pool: &RunnerPool, kept: &Kept, now: Timestamp) {
        let (Some(held), Some(Ok(machines))) = (&kept.held, &kept.machines) else { return };
        let known: BTreeSet<String> =
            self.runners.state().iter().map(|runner| gitlab::system_id(&runner.uid().unwrap_or_default())).collect();
        let silent = |job: &Job| !job.busy && job.contacted.is_some_and(|at| now.duration_since(at) > GHOST);
        let ghosts: Vec<&String> =
            machines.iter().filter(|(id, job)| !known.contains(*id) && silent(job)).map(|(id, _)| id).collect();
        if ghosts.is_empty() {
            return;
        }
        let Ok(gitlab) = self.gitlab(pool).await else { return };
        for system_id in ghosts {
            tracing::info!(
                pool = key(pool),
                system_id,
                "a machine that is long gone is removed from the CI system's list"
            );
            if let Err(error) = gitlab.forget(held, system_id, now).await {
                tracing::debug!(system_id, error = chain(&error), "it can't be removed now");
            }
        }
    }

    /// The pool is to go: its runners finish their jobs, then its record goes, then the pool.
    async fn end(
        &self,
        pool: &RunnerPool,
        kept: &mut Kept,
        runners: &[plan::Runner],
        now: Timestamp,
    ) -> Result<(), kube::Error> {
        if !pool.finalizers().iter().any(|name| name == objects::FINALIZER) {
            return Ok(());
        }
        for runner in runners {
            if runner.phase.is_over() {
                self.remove(pool, kept, &runner.name, now).await?;
            } else if runner.phase != Phase::Busy && runner.draining.is_none() {
                self.drain(pool, kept, &runner.name, now).await?;
            }
        }
        // Not from the cache: a runner that was made a moment ago counts.
        let api: Api<Runner> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        let label = format!("{}={}", objects::POOL, pool.name_any());
        if !api.list(&ListParams::default().labels(&label)).await?.items.is_empty() {
            return Ok(());
        }
        let held = match kept.held.take() {
            Some(held) => Some(held),
            None => self.held(pool).await?,
        };
        if let Some(held) = held {
            match self.gitlab(pool).await {
                Ok(gitlab) => {
                    if let Err(error) = gitlab.remove(held.record, now).await {
                        tracing::warn!(
                            pool = key(pool),
                            error = chain(&error),
                            "the pool's runner can't be removed at GitLab; trying again"
                        );
                        kept.held = Some(held);
                        return Ok(());
                    }
                }
                // Without its Secret nobody can remove it; the pool must not stay for ever.
                Err(why) => {
                    tracing::warn!(pool = key(pool), why, record = held.record, "the pool's runner stays at GitLab");
                }
            }
        }
        self.finalizers(pool, false).await
    }

    async fn finalizers(&self, pool: &RunnerPool, ours: bool) -> Result<(), kube::Error> {
        let mut all: Vec<String> =
            pool.finalizers().iter().filter(|name| *name != objects::FINALIZER).cloned().collect();
        if ours {
            all.push(objects::FINALIZER.to_owned());
        }
        let pools: Api<RunnerPool> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        let patch = json!({"metadata": {"finalizers": all, "resourceVersion": pool.resource_version()}});
        match pools.patch(&pool.name_any(), &PatchParams::default(), &Patch::Merge(&patch)).await {
            // Somebody was faster; the next look decides.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            result => gone(result),
        }
    }

    /// Writes the pool's status, when it changed.
    async fn tell(
        &self,
        pool: &RunnerPool,
        kept: &Kept,
        runners: &[plan::Runner],
        plan: &Plan,
        template: &str,
        now: Timestamp,
    ) -> Result<(), kube::Error> {
        let count = |wanted: &dyn Fn(&plan::Runner) -> bool| {
            u32::try_from(runners.iter().filter(|runner| wanted(runner)).count()).unwrap_or(u32::MAX)
        };
        let mut placements: BTreeMap<String, u32> = BTreeMap::new();
        for runner in runners.iter().filter(|runner| !runner.phase.is_over() && !runner.placement.is_empty()) {
            *placements.entry(runner.placement.clone()).or_default() += 1;
        }
        let before = pool.status.clone().unwrap_or_default();
        let generation = pool.metadata.generation;
        let mut conditions = before.conditions.clone();
        let (ready, why) = match (&kept.trouble, &kept.held) {
            (Some(why), _) => (false, why.clone()),
            (None, None) => (false, "the runner isn't registered yet".to_owned()),
            (None, Some(_)) => (true, String::new()),
        };
        let word = if ready { "Registered" } else { "Trouble" };
        objects::set_condition(&mut conditions, "ProviderReady", ready, word, why, generation, now);
        let (word, why) = plan.why.clone().unwrap_or(("AsWanted", String::new()));
        objects::set_condition(&mut conditions, "Scaling", plan.why.is_none(), word, why, generation, now);
        let (word, why) = match (&plan.halted, plan.rolled_out) {
            (Some(why), _) => ("Halted", why.clone()),
            (None, true) => ("Done", String::new()),
            (None, false) => ("UnderWay", "runners of an older template are left".to_owned()),
        };
        objects::set_condition(&mut conditions, "RolledOut", plan.rolled_out, word, why, generation, now);
        let status = RunnerPoolStatus {
            replicas: count(&|runner| !runner.phase.is_over()),
            idle: count(&|runner| runner.phase == Phase::Idle),
            busy: count(&|runner| runner.phase == Phase::Busy),
            starting: count(&|runner| matches!(runner.phase, Phase::Pending | Phase::Starting | Phase::Provisioning)),
            updated: count(&|runner| !runner.phase.is_over() && runner.template == template),
            wanted: plan.wanted,
            pending_jobs: kept.demand.as_ref().and_then(|demand| demand.as_ref().ok()).map(|waiting| waiting.count),
            selector: format!("{}={}", objects::POOL, pool.name_any()),
            template: template.to_owned(),
            placements,
            observed_generation: generation,
            conditions,
        };
        if status == before {
            return Ok(());
        }
        let pools: Api<RunnerPool> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        // Whole, so that what is no longer there goes: a merge would keep it.
        let patch = json!([{"op": "add", "path": "/status", "value": status}]);
        let patch: json_patch::Patch = serde_json::from_value(patch).map_err(kube::Error::SerdeError)?;
        let done = pools.patch_status(&pool.name_any(), &PatchParams::default(), &Patch::Json::<()>(patch)).await;
        gone(done)
    }
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

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = error.source();
    }
    text
}
