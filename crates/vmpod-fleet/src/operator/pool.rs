//! What the operator does to a pool as a whole.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::ResourceExt as _;
use kube::api::{Api, ListParams, Patch, PatchParams};
use serde_json::json;
use vmpod_api::pool::{RunnerPool, RunnerPoolStatus};
use vmpod_api::runner::{Phase, Runner};

use super::{Kept, MANAGER, Operator, Part, demand, gone, key, namespace, schedule};
use crate::metrics::{Look, PHASES};
use crate::objects;
use crate::plan::{self, Observed, Plan};

impl Operator {
    /// Brings one pool nearer to what it should be; what there is to show of it.
    pub(super) async fn pool(
        &self,
        part: &Part,
        kept: &mut Kept,
        runners: &[plan::Runner],
        share: Option<u32>,
        now: Timestamp,
    ) -> Result<Look, kube::Error> {
        let pool = part.pool.as_ref();
        let told = std::mem::take(&mut kept.told);
        if !told.is_empty() {
            self.warn(pool, told, now).await;
        }
        if pool.metadata.deletion_timestamp.is_some() {
            self.end(part, kept, runners, now).await?;
            // It is counted until it is gone: its machines still come to their ends.
            let status = pool.status.clone().unwrap_or_default();
            return Ok(look(pool, kept, runners, share, &status, now));
        }
        if !pool.finalizers().iter().any(|name| name == objects::FINALIZER) {
            self.finalizers(pool, true).await?;
        }
        self.guard(pool, kept).await?;
        let template = objects::template(&pool.spec);
        let observed = Observed { runners, demand: demand(kept), template: &template, share };
        let plan = plan::plan(&pool.spec, &observed, &mut kept.memory, now);
        self.equip(part, kept, &plan.drain).await?;
        self.remove(part, kept, &plan.remove, now).await?;
        for name in &plan.drain {
            kept.fresh.remove(name);
        }
        self.drain(part, kept, &plan.drain, now).await?;
        self.drain_again(part, kept, now).await?;
        self.release(part, &plan.release).await?;
        // Without a registration there is nothing that a machine could do.
        if kept.keep.is_some() {
            self.create(pool, kept, &plan.create, now).await?;
        }
        self.ghosts(part, kept, now).await;
        let status = status(pool, kept, runners, &plan, &template, now);
        let look = look(pool, kept, runners, share, &status, now);
        self.tell(pool, status).await.map(|()| look)
    }

    /// Tells that nothing is decided about a pool, because its machines can't be seen.
    pub(super) async fn blind(&self, pool: &RunnerPool, now: Timestamp) {
        let why = "KubeVirt's VirtualMachineInstances can't be watched: install KubeVirt (kubevirt.io/v1), and let this operator list them";
        let mut status = pool.status.clone().unwrap_or_default();
        let generation = pool.metadata.generation;
        objects::set_condition(
            &mut status.conditions,
            "Scaling",
            false,
            "NoSubstrate",
            why.to_owned(),
            generation,
            now,
        );
        if let Err(error) = self.tell(pool, status).await {
            tracing::debug!(pool = key(pool), error = crate::chain(&error), "a status wasn't written");
        }
    }

    /// Keeps others from evicting the pool's pods: nobody but the operator can tell which of them has a job.
    async fn guard(&self, pool: &RunnerPool, kept: &mut Kept) -> Result<(), kube::Error> {
        let generation = pool.metadata.generation.unwrap_or(0);
        if kept.guarded == Some(generation) {
            return Ok(());
        }
        let budgets: Api<PodDisruptionBudget> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        let budget = objects::budget(pool);
        let done =
            budgets.patch(&budget.name_any(), &PatchParams::apply(MANAGER).force(), &Patch::Apply(&budget)).await;
        match done {
            // Whoever gave this operator its rights didn't give it this one, or the API has none: the rest works without.
            Err(kube::Error::Api(status)) if status.code == 403 || status.code == 404 => {
                tracing::warn!(
                    pool = key(pool),
                    why = status.message,
                    "the pool's machines aren't protected from eviction"
                );
            }
            done => drop(done?),
        }
        kept.guarded = Some(generation);
        Ok(())
    }

    /// The pool is to go: its runners finish their jobs, then its registration goes, then the pool.
    async fn end(
        &self,
        part: &Part,
        kept: &mut Kept,
        runners: &[plan::Runner],
        now: Timestamp,
    ) -> Result<(), kube::Error> {
        let pool = part.pool.as_ref();
        if !pool.finalizers().iter().any(|name| name == objects::FINALIZER) {
            return Ok(());
        }
        let over: Vec<String> =
            runners.iter().filter(|runner| runner.phase.is_over()).map(|runner| runner.name.clone()).collect();
        let free = runners
            .iter()
            .filter(|runner| !runner.phase.is_over() && runner.phase != Phase::Busy && runner.draining.is_none());
        let free: Vec<String> = free.map(|runner| runner.name.clone()).collect();
        self.remove(part, kept, &over, now).await?;
        self.drain(part, kept, &free, now).await?;
        self.drain_again(part, kept, now).await?;
        // Not from the cache: a runner that was made a moment ago counts.
        let api: Api<Runner> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        let label = format!("{}={}", objects::POOL, pool.name_any());
        if !api.list(&ListParams::default().labels(&label)).await?.items.is_empty() {
            return Ok(());
        }
        match &kept.provider {
            Some(provider) => {
                if let Err(trouble) = provider.unregister(kept.keep.as_ref(), now).await {
                    tracing::warn!(
                        pool = key(pool),
                        why = trouble.why,
                        "the pool's runner can't be removed at its CI system; trying again"
                    );
                    return Ok(());
                }
            }
            // It will be asked.
            None if kept.asked.is_none() || kept.retry.is_some() => return Ok(()),
            // Without its Secret nobody can remove it; the pool must not stay for ever.
            None => {
                let why = kept.trouble.as_deref().unwrap_or_default();
                tracing::warn!(pool = key(pool), why, "if the pool has a runner at its CI system, it stays there");
            }
        }
        kept.keep = None;
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
        // When somebody was faster, the next look decides.
        gone(pools.patch(&pool.name_any(), &PatchParams::default(), &Patch::Merge(&patch)).await)
    }

    /// Writes the pool's status, when it changed.
    async fn tell(&self, pool: &RunnerPool, status: RunnerPoolStatus) -> Result<(), kube::Error> {
        if pool.status.as_ref() == Some(&status) {
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

fn count(runners: &[plan::Runner], wanted: impl Fn(&plan::Runner) -> bool) -> u32 {
    u32::try_from(runners.iter().filter(|runner| wanted(runner)).count()).unwrap_or(u32::MAX)
}

/// The pool's status.
fn status(
    pool: &RunnerPool,
    kept: &Kept,
    runners: &[plan::Runner],
    plan: &Plan,
    template: &str,
    now: Timestamp,
) -> RunnerPoolStatus {
    let mut placements: BTreeMap<String, u32> = BTreeMap::new();
    for runner in runners.iter().filter(|runner| !runner.phase.is_over() && !runner.placement.is_empty()) {
        *placements.entry(runner.placement.clone()).or_default() += 1;
    }
    let before = pool.status.clone().unwrap_or_default();
    let generation = pool.metadata.generation;
    let mut conditions = before.conditions.clone();
    let (ready, why) = match (&kept.trouble, &kept.keep) {
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
    RunnerPoolStatus {
        replicas: count(runners, |runner| !runner.phase.is_over()),
        idle: count(runners, |runner| runner.phase == Phase::Idle),
        busy: count(runners, |runner| runner.phase == Phase::Busy),
        starting: count(runners, |runner| {
            matches!(runner.phase, Phase::Pending | Phase::Starting | Phase::Provisioning)
        }),
        updated: count(runners, |runner| !runner.phase.is_over() && runner.template == template),
        wanted: plan.wanted,
        pending_jobs: kept.demand.as_ref().and_then(|demand| demand.as_ref().ok()).map(|waiting| waiting.count),
        pending_since: kept.demand.as_ref().and_then(|demand| demand.as_ref().ok()?.oldest).map(|oldest| {
            let before = pool.status.as_ref().and_then(|status| status.pending_since.clone());
            pending_since(oldest, before)
        }),
        selector: format!("{}={}", objects::POOL, pool.name_any()),
        template: template.to_owned(),
        placements,
        observed_generation: generation,
        conditions,
    }
}

/// Since when the oldest job waits. A CI system that tells how long ago that was gives another instant each time: one that is a
/// little off is the same, or the status would be written at every look.
fn pending_since(oldest: Timestamp, before: Option<String>) -> String {
    let near = |text: &String| {
        text.parse::<Timestamp>()
            .is_ok_and(|at| oldest.duration_since(at).unsigned_abs() <= std::time::Duration::from_secs(2))
    };
    before.filter(near).unwrap_or_else(|| objects::whole_second(oldest).to_string())
}

/// What the metrics show of a pool.
fn look(
    pool: &RunnerPool,
    kept: &Kept,
    runners: &[plan::Runner],
    share: Option<u32>,
    status: &RunnerPoolStatus,
    now: Timestamp,
) -> Look {
    let demand = kept.demand.as_ref().and_then(|demand| demand.as_ref().ok());
    let oldest = demand.map(|waiting| waiting.oldest.map_or(0.0, |at| now.duration_since(at).as_secs_f64()));
    let conditions = ["ProviderReady", "Scaling", "RolledOut"];
    let shown = |kind: &'static str| {
        let condition = status.conditions.iter().find(|condition| condition.type_ == kind)?;
        Some((kind, condition.status == "True", condition.reason.clone()))
    };
    Look {
        phases: PHASES.map(|(phase, _)| count(runners, |runner| runner.phase == phase)),
        wanted: status.wanted,
        max: schedule::bounds(&pool.spec.scale, now).0.max,
        share,
        pending: status.pending_jobs,
        oldest,
        placements: status.placements.clone().into_iter().collect(),
        conditions: conditions.into_iter().filter_map(shown).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instant_that_is_a_little_off_is_the_same() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let first = pending_since(at("2026-01-02T03:04:05.900Z"), None);
        assert_eq!(first, "2026-01-02T03:04:05Z");
        assert_eq!(pending_since(at("2026-01-02T03:04:06.400Z"), Some(first.clone())), first);
        assert_eq!(pending_since(at("2026-01-02T03:04:09Z"), Some(first)), "2026-01-02T03:04:09Z");
    }
}
