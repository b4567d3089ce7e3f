//! What the operator asks a pool's CI system: its registration, what waits there, which machines work.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, Patch, PatchParams};
use kube::{Resource as _, ResourceExt as _};
use serde_json::json;
use vmpod_api::pool::RunnerPool;

use super::{ENSURE, Kept, MANAGER, Operator, label, namespace};
use crate::provider::{self, Begun, Keep, Provider, Secrets, Trouble};
use crate::{chain, objects};

/// Which jobs were counted.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    /// The greatest number of a job that has begun.
    last: Option<u64>,
    /// Jobs that had begun and not ended.
    open: BTreeSet<u64>,
    /// Which machines there were at the last look and whether each had a job, and how many jobs waited.
    seen: (BTreeMap<String, bool>, u32),
}

impl Jobs {
    /// Takes note of a list of jobs: those that are new, and those that are over since.
    fn take(&mut self, list: Vec<Begun>) -> (Vec<Begun>, Vec<Begun>) {
        // What ran before the first look was counted by whoever ran then.
        let first = self.last.is_none();
        let known = self.last;
        // One that has begun and isn't on the page any more is nothing that anyone will hear of again.
        let listed: BTreeSet<u64> = list.iter().map(|job| job.id).collect();
        self.open.retain(|job| listed.contains(job));
        let (mut new, mut over) = (Vec::new(), Vec::new());
        for job in list {
            self.last = self.last.max(Some(job.id));
            let fresh = known.is_none_or(|known| job.id > known);
            if fresh && !(first && job.ended.is_some()) {
                new.push(job.clone());
                self.open.insert(job.id);
            }
            if job.ended.is_some() && self.open.remove(&job.id) {
                over.push(job);
            }
        }
        // An empty list is a look as well.
        self.last.get_or_insert(0);
        (new, over)
    }

    /// From where on a list must go to hold all that is open.
    fn after(&self) -> Option<u64> {
        match self.open.first() {
            Some(first) => first.checked_sub(1),
            None => self.last,
        }
    }
}

impl Operator {
    /// Asks a pool's CI system, when it is time.
    pub(super) async fn ask(&self, pool: &RunnerPool, kept: &mut Kept, now: Timestamp) {
        let soon = kept.asked.is_some_and(|at| now.duration_since(at).unsigned_abs() < self.options.poll.mul_f32(0.8));
        if soon || kept.retry.is_some_and(|at| at > now) {
            return;
        }
        kept.asked = Some(now);
        kept.retry = None;
        let asked = async {
            let provider = self.open(pool, now).await?;
            kept.provider = Some(provider.clone());
            if pool.metadata.deletion_timestamp.is_some() && kept.keep.is_none() {
                let keep = self.keep(pool).await;
                kept.keep = keep.map_err(|error| Trouble { why: chain(&error), retry: Some(now) })?;
            }
            // A pool that is to go registers nothing, unless it has machines and nobody could say which of them work.
            let machines = || {
                self.runners
                    .state()
                    .iter()
                    .any(|runner| runner.spec.pool == pool.name_any() && runner.namespace() == pool.namespace())
            };
            if pool.metadata.deletion_timestamp.is_none() || (kept.keep.is_none() && machines()) {
                self.register(pool, provider.as_ref(), kept, now).await?;
            }
            Ok::<_, Trouble>(provider)
        };
        let provider = match asked.await {
            Ok(provider) => provider,
            Err(Trouble { why, retry }) => {
                (kept.retry, kept.trouble) = (retry, Some(why.clone()));
                // So that the next look, when it goes well, says so.
                kept.ensured = None;
                (kept.demand, kept.machines) = (Some(Err(why.clone())), Some(Err(why)));
                return;
            }
        };
        let Some(keep) = kept.keep.clone() else { return };
        let (waiting, machines) = tokio::join!(provider.waiting(&keep, now), provider.machines(&keep, now));
        kept.retry =
            [waiting.as_ref().err(), machines.as_ref().err()].into_iter().flatten().find_map(|trouble| trouble.retry);
        kept.demand = Some(waiting.map_err(|trouble| trouble.why));
        kept.machines = Some(machines.map_err(|trouble| trouble.why));
        self.count_jobs(pool, provider.as_ref(), &keep, kept, now).await;
    }

    /// Counts jobs that have begun or ended since the last look: one call when a machine took up or laid down one.
    async fn count_jobs(
        &self,
        pool: &RunnerPool,
        provider: &dyn Provider,
        keep: &Keep,
        kept: &mut Kept,
        now: Timestamp,
    ) {
        let (Some(Ok(machines)), Some(Ok(waiting))) = (&kept.machines, &kept.demand) else { return };
        let machines: BTreeMap<String, bool> =
            machines.iter().map(|(machine, seen)| (machine.clone(), seen.busy)).collect();
        // A short job comes and goes between two looks, and leaves a machine that wasn't there or a shorter queue.
        let working = machines.values().filter(|busy| **busy).count();
        let seen = (machines, waiting.count);
        if seen == kept.jobs.seen && kept.jobs.open.len() == working {
            return;
        }
        // A failure costs figures, nothing else; the next look makes up for it.
        let Ok(list) = provider.begun(keep, kept.jobs.after(), now).await else { return };
        kept.jobs.seen = seen;
        let (new, over) = kept.jobs.take(list);
        let (metrics, pool) = (&self.options.metrics, label(pool));
        metrics.jobs(&pool, &new);
        for (took, status) in over.into_iter().filter_map(|job| job.ended) {
            metrics.job_ended(&pool, took, &status);
        }
    }

    /// The pool's CI system, by its Secrets.
    async fn open(&self, pool: &RunnerPool, now: Timestamp) -> Result<std::sync::Arc<dyn Provider>, Trouble> {
        let api: Api<Secret> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        let mut values = Secrets::default();
        for reference in provider::secrets(pool) {
            let secret = api.get_opt(&reference.name).await.map_err(|error| Trouble {
                why: format!("the Secret {:?} can't be read: {}", reference.name, chain(&error)),
                // That may pass, unlike a Secret that isn't there.
                retry: Some(now),
            })?;
            let secret = secret.ok_or_else(|| Trouble::new(format!("there is no Secret {:?}", reference.name)))?;
            if let Some(value) = secret.data.and_then(|mut data| data.remove(&reference.key)) {
                values.0.insert((reference.name.clone(), reference.key.clone()), value.0);
            }
        }
        self.options.providers.open(pool, &values)
    }

    /// Looks after the pool's registration, and keeps what belongs to it before anything is made with it.
    async fn register(
        &self,
        pool: &RunnerPool,
        provider: &dyn Provider,
        kept: &mut Kept,
        now: Timestamp,
    ) -> Result<(), Trouble> {
        let generation = pool.metadata.generation.unwrap_or(0);
        let fresh = |(of, at): (i64, Timestamp)| of == generation && now.duration_since(at) < ENSURE;
        if kept.keep.is_some() && kept.ensured.is_some_and(fresh) {
            return Ok(());
        }
        if kept.keep.is_none() {
            // Without knowing what is kept, a second token would be made.
            kept.keep = self.keep(pool).await.map_err(|error| Trouble::new(chain(&error)))?;
        }
        if kept.keep.is_none() {
            // What the watch tells may be old, and a registration of a pool that is gone would be nobody's.
            let pools: Api<RunnerPool> = Api::namespaced(self.options.client.clone(), &namespace(pool));
            let there = pools.get_opt(&pool.name_any()).await.map_err(|error| Trouble::new(chain(&error)))?;
            if there.is_none_or(|there| there.uid() != pool.uid()) {
                return Err(Trouble::new("the pool is gone"));
            }
        }
        let registered = provider.register(kept.keep.as_ref(), now).await?;
        if kept.keep.as_ref() != Some(&registered.keep) {
            self.write_keep(pool, &registered.keep)
                .await
                .map_err(|error| Trouble::new(format!("the runner's token can't be kept: {}", chain(&error))))?;
            kept.keep = Some(registered.keep);
        }
        kept.trouble = registered.trouble;
        kept.ensured = Some((generation, now));
        Ok(())
    }

    /// What is kept of the pool's registration.
    pub(super) async fn keep(&self, pool: &RunnerPool) -> Result<Option<Keep>, kube::Error> {
        let secrets: Api<Secret> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        let secret = secrets.get_opt(&keep_name(pool)).await?;
        let text = secret.and_then(|secret| String::from_utf8(secret.data?.remove("held")?.0).ok());
        Ok(text.map(Keep::new))
    }

    async fn write_keep(&self, pool: &RunnerPool, keep: &Keep) -> Result<(), kube::Error> {
        let secrets: Api<Secret> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        let object = json!({
            "apiVersion": "v1", "kind": "Secret",
            "metadata": {"name": keep_name(pool), "ownerReferences": [pool.controller_owner_ref(&())], "labels": {objects::POOL: pool.name_any()}},
            "stringData": {"held": keep.expose()},
        });
        secrets.patch(&keep_name(pool), &PatchParams::apply(MANAGER).force(), &Patch::Apply(&object)).await.map(drop)
    }
}

fn keep_name(pool: &RunnerPool) -> String {
    format!("vmpod-pool-{}", pool.name_any())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn job(id: u64, ended: bool) -> Begun {
        let ended = ended.then(|| (Duration::from_secs(1), "success".to_owned()));
        Begun { id, waited: Some(Duration::from_secs(2)), ended }
    }

    #[test]
    fn jobs_from_before_the_first_look_are_not_counted_again() {
        let mut jobs = Jobs::default();
        let (new, over) = jobs.take(vec![job(1, true), job(2, false)]);
        assert_eq!((new, over), (vec![job(2, false)], vec![]));
        assert_eq!(jobs.after(), Some(1));
        let (new, over) = jobs.take(vec![job(2, true), job(3, true)]);
        assert_eq!((new, over), (vec![job(3, true)], vec![job(2, true), job(3, true)]));
        assert_eq!(jobs.after(), Some(3));
    }

    #[test]
    fn a_job_that_fell_off_the_page_is_not_asked_for_again() {
        let mut jobs = Jobs::default();
        jobs.take(vec![job(1, false)]);
        assert_eq!(jobs.after(), Some(0));
        // A page holds the newest.
        jobs.take((50..150).map(|id| job(id, true)).collect());
        assert_eq!((jobs.after(), jobs.open.len()), (Some(149), 0));
    }

    proptest! {
        #[test]
        fn each_job_begins_once_and_ends_once(looks in prop::collection::vec(prop::collection::btree_set(1_u64..30, 0..10), 1..20)) {
            // Jobs end in any order; a list holds all from `after` on.
            let (mut jobs, mut ended) = (Jobs::default(), BTreeSet::new());
            let (mut began, mut finished) = (Vec::new(), Vec::new());
            jobs.take(Vec::new());
            for (look, ends) in (1_u64..).zip(looks) {
                ended.extend(ends.into_iter().filter(|id| *id <= look));
                let after = jobs.after().unwrap_or(0);
                let list = (after + 1..=look).map(|id| job(id, ended.contains(&id))).collect();
                let (new, over) = jobs.take(list);
                began.extend(new.into_iter().map(|job| job.id));
                finished.extend(over.into_iter().map(|job| job.id));
                prop_assert_eq!(began.len() as u64, look);
            }
            let once: BTreeSet<u64> = finished.iter().copied().collect();
            prop_assert_eq!(once.len(), finished.len());
            prop_assert_eq!(once, ended);
        }
    }
}
