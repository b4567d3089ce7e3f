//! The fleet's metrics, in the Prometheus text format.
//!
//! Every label has few values: the pools that there are, their placements, and words that this crate knows. A pool that goes
//! takes its series along.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use vmpod_api::runner::Phase;

use crate::provider::{Begun, Calls};

/// Seconds that jobs wait and machines start: from a memory snapshot's fraction of one to a bad day's hour.
const WAITS: [f64; 14] = [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0];
/// Seconds that jobs take.
const JOBS: [f64; 10] = [10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 3600.0, 7200.0, 14400.0];
/// Seconds that one look at everything takes.
const PASSES: [f64; 8] = [0.001, 0.005, 0.02, 0.1, 0.5, 1.0, 5.0, 30.0];

/// The phases that a runner is counted in.
pub const PHASES: [(Phase, &str); 8] = [
    (Phase::Pending, "Pending"),
    (Phase::Starting, "Starting"),
    (Phase::Provisioning, "Provisioning"),
    (Phase::Idle, "Idle"),
    (Phase::Busy, "Busy"),
    (Phase::Draining, "Draining"),
    (Phase::Gone, "Gone"),
    (Phase::Failed, "Failed"),
];

/// A pool, as a label.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, EncodeLabelSet)]
pub struct Pool {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub pool: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfStatus {
    namespace: String,
    pool: String,
    status: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfStep {
    namespace: String,
    pool: String,
    step: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InPhase {
    namespace: String,
    pool: String,
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
struct At {
    namespace: String,
    pool: String,
    placement: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfCondition {
    namespace: String,
    pool: String,
    condition: &'static str,
    reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    url: String,
    outcome: &'static str,
}

/// What a pool is at one look.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// Runners in the order of [`PHASES`].
    pub phases: [u32; 8],
    /// How many there should be.
    pub wanted: u32,
    /// The most that there may be now.
    pub max: u32,
    /// What other pools leave it, where that matters.
    pub share: Option<u32>,
    /// Jobs that wait, if it is known.
    pub pending: Option<u32>,
    /// How long the first of them has waited, in seconds.
    pub oldest: Option<f64>,
    /// Runners by placement.
    pub placements: Vec<(String, u32)>,
    /// Conditions: kind, whether it holds, reason.
    pub conditions: Vec<(&'static str, bool, String)>,
}

type Made<T> = Family<T, Histogram, fn() -> Histogram>;
type Number<T> = Family<T, Gauge<f64, AtomicU64>>;

struct Counted {
    jobs: Family<OfStatus, Counter>,
    waits: Made<Pool>,
    durations: Made<Pool>,
    starts: Made<OfStep>,
    created: Family<At, Counter>,
    drained: Family<Pool, Counter>,
    failed: Family<Pool, Counter>,
    removed: Family<Pool, Counter>,
    refused: Family<Pool, Counter>,
    passes: Histogram,
    leads: Gauge,
}

/// What is only ever shown as it is now.
#[derive(Default)]
struct Shown {
    runners: Number<InPhase>,
    placed: Number<At>,
    wanted: Number<Pool>,
    max: Number<Pool>,
    share: Number<Pool>,
    pending: Number<Pool>,
    oldest: Number<Pool>,
    conditions: Number<OfCondition>,
    calls: Family<Outcome, Counter>,
}

/// The fleet's metrics: one set, however many hold it.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    registry: Registry,
    counted: Counted,
    shown: Shown,
    /// Where runners were made: the series to remove with their pool.
    placed: Mutex<BTreeSet<At>>,
    /// The pools of the last look. Whoever holds it may change what is shown, or read it whole.
    pools: Mutex<Vec<(Pool, Look)>>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("vmpod_fleet");
        let histogram = |edges: fn() -> Histogram| -> fn() -> Histogram { edges };
        let counted = Counted {
            jobs: Family::default(),
            waits: Family::new_with_constructor(histogram(|| Histogram::new(WAITS))),
            durations: Family::new_with_constructor(histogram(|| Histogram::new(JOBS))),
            starts: Family::new_with_constructor(histogram(|| Histogram::new(WAITS))),
            created: Family::default(),
            drained: Family::default(),
            failed: Family::default(),
            removed: Family::default(),
            refused: Family::default(),
            passes: Histogram::new(PASSES),
            leads: Gauge::default(),
        };
        registry.register("jobs", "Jobs that ended, by how they did", counted.jobs.clone());
        registry.register("job_queue_wait_seconds", "How long jobs waited for a runner", counted.waits.clone());
        registry.register("job_duration_seconds", "How long jobs took", counted.durations.clone());
        registry.register(
            "runner_start_seconds",
            "How long a runner took for each step: a place, a machine that answers, being known to the CI system",
            counted.starts.clone(),
        );
        registry.register("runners_created", "Runners that were made, by placement", counted.created.clone());
        registry.register("runners_drained", "Runners that were asked to go", counted.drained.clone());
        registry.register("runners_failed", "Runners that never served", counted.failed.clone());
        registry.register("runners_removed", "Runners that were removed when they were over", counted.removed.clone());
        registry.register(
            "drains_refused",
            "Times that a runner wasn't asked to go because it had a job, or nobody could say",
            counted.refused.clone(),
        );
        registry.register("pass_seconds", "How long a look at all pools took", counted.passes.clone());
        registry.register("leader", "Whether this operator is the one that acts", counted.leads.clone());
        let shown = Shown::default();
        registry.register("runners", "Runners by phase", shown.runners.clone());
        registry.register("runners_placed", "Runners by placement", shown.placed.clone());
        registry.register("runners_wanted", "How many runners there should be", shown.wanted.clone());
        registry.register("runners_max", "The most runners that there may be now", shown.max.clone());
        registry.register("runners_share", "What pools that need the room more leave", shown.share.clone());
        registry.register("jobs_pending", "Jobs that wait; missing while nobody can say", shown.pending.clone());
        registry.register(
            "jobs_oldest_wait_seconds",
            "How long the first of the waiting jobs has waited",
            shown.oldest.clone(),
        );
        registry.register("pool_condition", "Conditions of pools: 1 holds, 0 doesn't", shown.conditions.clone());
        registry.register("provider_calls", "Calls to CI systems, by what became of them", shown.calls.clone());
        Self(Arc::new(Inner { registry, counted, shown, placed: Mutex::default(), pools: Mutex::default() }))
    }
}

impl Metrics {
    /// All of it as text: `application/openmetrics-text; version=1.0.0; charset=utf-8`.
    #[must_use]
    pub fn render(&self) -> String {
        let _whole = self.pools();
        let mut out = String::new();
        match text::encode(&mut out, &self.0.registry) {
            Ok(()) => out,
            Err(_) => String::new(),
        }
    }

    pub(crate) fn leads(&self, leads: bool) {
        self.0.counted.leads.set(i64::from(leads));
    }

    pub(crate) fn pass(&self, took: Duration) {
        self.0.counted.passes.observe(took.as_secs_f64());
    }

    fn pools(&self) -> std::sync::MutexGuard<'_, Vec<(Pool, Look)>> {
        self.0.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pools as they are; those that aren't named are gone.
    pub(crate) fn looks(&self, looks: Vec<(Pool, Look)>, calls: impl IntoIterator<Item = (String, Calls)>) {
        let mut pools = self.pools();
        for (gone, _) in pools.iter().filter(|(gone, _)| !looks.iter().any(|(pool, _)| pool == gone)) {
            self.drop_pool(gone);
        }
        let shown = &self.0.shown;
        for number in [&shown.wanted, &shown.max, &shown.share, &shown.pending, &shown.oldest] {
            number.clear();
        }
        shown.runners.clear();
        shown.placed.clear();
        shown.conditions.clear();
        for (pool, look) in &looks {
            self.show(pool, look);
        }
        for (url, Calls { sent, limited, failed, paused }) in calls {
            let answered = sent.saturating_sub(limited).saturating_sub(failed);
            let all = [("answered", answered), ("limited", limited), ("failed", failed), ("held_back", paused)];
            for (outcome, count) in all {
                let counter = shown.calls.get_or_create_owned(&Outcome { url: url.clone(), outcome });
                counter.inner().store(count, Ordering::Relaxed);
            }
        }
        *pools = looks;
    }

    fn show(&self, of: &Pool, look: &Look) {
        let shown = &self.0.shown;
        for ((_, phase), count) in PHASES.iter().zip(look.phases) {
            let Pool { namespace, pool } = of.clone();
            shown.runners.get_or_create(&InPhase { namespace, pool, phase }).set(f64::from(count));
        }
        for (placement, count) in &look.placements {
            let Pool { namespace, pool } = of.clone();
            shown.placed.get_or_create(&At { namespace, pool, placement: placement.clone() }).set(f64::from(*count));
        }
        let plain = [
            (&shown.wanted, Some(f64::from(look.wanted))),
            (&shown.max, Some(f64::from(look.max))),
            (&shown.share, look.share.map(f64::from)),
            (&shown.pending, look.pending.map(f64::from)),
            (&shown.oldest, look.oldest),
        ];
        for (number, value) in plain {
            if let Some(value) = value {
                number.get_or_create(of).set(value);
            }
        }
        for (condition, holds, reason) in &look.conditions {
            let Pool { namespace, pool } = of.clone();
            let labels = OfCondition { namespace, pool, condition, reason: reason.clone() };
            shown.conditions.get_or_create(&labels).set(f64::from(u8::from(*holds)));
        }
    }

    /// A pool is gone: what was counted of it goes too.
    fn drop_pool(&self, gone: &Pool) {
        let counted = &self.0.counted;
        let Pool { namespace, pool } = gone;
        counted.waits.remove(gone);
        counted.durations.remove(gone);
        for family in [&counted.drained, &counted.failed, &counted.removed, &counted.refused] {
            family.remove(gone);
        }
        for status in ["success", "failed", "canceled", "other"] {
            let (namespace, pool) = (namespace.clone(), pool.clone());
            counted.jobs.remove(&OfStatus { namespace, pool, status: status.to_owned() });
        }
        for step in STEPS {
            counted.starts.remove(&OfStep { namespace: namespace.clone(), pool: pool.clone(), step });
        }
        let mut placed = self.0.placed.lock().unwrap_or_else(PoisonError::into_inner);
        placed.retain(|at| {
            let stays = at.namespace != *namespace || at.pool != *pool;
            if !stays {
                counted.created.remove(at);
            }
            stays
        });
    }

    pub(crate) fn jobs(&self, pool: &Pool, begun: &[Begun]) {
        let counted = &self.0.counted;
        for job in begun {
            if let Some(waited) = job.waited {
                counted.waits.get_or_create(pool).observe(waited.as_secs_f64());
            }
        }
    }

    pub(crate) fn job_ended(&self, pool: &Pool, took: Duration, status: &str) {
        let counted = &self.0.counted;
        counted.durations.get_or_create(pool).observe(took.as_secs_f64());
        let Pool { namespace, pool } = pool.clone();
        counted.jobs.get_or_create(&OfStatus { namespace, pool, status: status.to_owned() }).inc();
    }

    /// A runner left a phase after so long.
    pub(crate) fn started(&self, pool: &Pool, step: &'static str, took: f64) {
        let Pool { namespace, pool } = pool.clone();
        self.0.counted.starts.get_or_create(&OfStep { namespace, pool, step }).observe(took.max(0.0));
    }

    pub(crate) fn created(&self, pool: &Pool, placement: &str) {
        let Pool { namespace, pool } = pool.clone();
        let at = At { namespace, pool, placement: placement.to_owned() };
        self.0.counted.created.get_or_create(&at).inc();
        self.0.placed.lock().unwrap_or_else(PoisonError::into_inner).insert(at);
    }

    pub(crate) fn drained(&self, pool: &Pool) {
        self.0.counted.drained.get_or_create(pool).inc();
    }

    pub(crate) fn refused(&self, pool: &Pool) {
        self.0.counted.refused.get_or_create(pool).inc();
    }

    pub(crate) fn failed(&self, pool: &Pool) {
        self.0.counted.failed.get_or_create(pool).inc();
    }

    pub(crate) fn removed(&self, pool: &Pool) {
        self.0.counted.removed.get_or_create(pool).inc();
    }
}

/// The steps of a runner's start, by the phase that ends with each.
const STEPS: [&str; 3] = ["placed", "machine", "registered"];

/// Which step of its start a runner has just finished, if it has.
#[must_use]
pub fn step(before: Phase, after: Phase) -> Option<&'static str> {
    let on = |phase: Phase| matches!(phase, Phase::Starting | Phase::Provisioning | Phase::Idle | Phase::Busy);
    // Whoever skips a phase, because a machine was known to the CI system before it was known to be up, did it in the one before.
    match before {
        _ if before == after || !on(after) => None,
        Phase::Pending => Some(STEPS[0]),
        Phase::Starting => Some(STEPS[1]),
        Phase::Provisioning => Some(STEPS[2]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(name: &str) -> Pool {
        Pool { namespace: "ci".to_owned(), pool: name.to_owned() }
    }

    #[test]
    fn a_start_has_three_steps_and_may_skip_the_last() {
        let steps = [
            (Phase::Pending, Phase::Starting),
            (Phase::Starting, Phase::Provisioning),
            (Phase::Provisioning, Phase::Idle),
        ];
        assert_eq!(steps.map(|(before, after)| step(before, after)), STEPS.map(Some));
        assert_eq!(step(Phase::Starting, Phase::Busy), Some("machine"));
        for (before, after) in
            [(Phase::Idle, Phase::Busy), (Phase::Starting, Phase::Failed), (Phase::Pending, Phase::Pending)]
        {
            assert_eq!(step(before, after), None, "{before:?} to {after:?}");
        }
    }

    #[test]
    fn a_pools_series_come_and_go_with_it() {
        let metrics = Metrics::default();
        let (small, large) = (pool("small"), pool("large"));
        let look = Look {
            phases: [0, 1, 0, 2, 3, 0, 0, 0],
            wanted: 6,
            max: 9,
            pending: Some(4),
            placements: vec![("home".to_owned(), 6)],
            conditions: vec![("Scaling", false, "NoRoom".to_owned())],
            ..Look::default()
        };
        let calls = Calls { sent: 10, limited: 1, failed: 2, paused: 3 };
        let both = vec![(small.clone(), look.clone()), (large.clone(), look.clone())];
        metrics.looks(both, [("https://gitlab.example.com".to_owned(), calls)]);
        for pool in [&small, &large] {
            metrics.created(pool, "home");
            metrics.drained(pool);
            metrics.failed(pool);
            metrics.removed(pool);
            metrics.refused(pool);
            metrics.started(pool, "machine", 3.0);
            let waited = Some(Duration::from_secs(3));
            metrics.jobs(pool, &[Begun { id: 1, waited, ended: None }]);
            metrics.job_ended(pool, Duration::from_mins(1), "success");
        }
        let text = metrics.render();
        // Series of one family come in any order; where a histogram's edges are is seen above.
        let mut lines: Vec<&str> = text.lines().filter(|line| !line.contains("_bucket{")).collect();
        lines.sort_unstable();
        insta::assert_snapshot!(lines.join("\n"));
        metrics.looks(vec![(small, look)], []);
        let text = metrics.render();
        assert!(!text.contains("large"), "{text}");
        assert!(text.contains(r#"vmpod_fleet_jobs_total{namespace="ci",pool="small",status="success"} 1"#), "{text}");
    }
}
