//! What to do for one pool. Pure: everything it knows is in its arguments.
//!
//! The number of runners follows the jobs: those that run, those that wait, and some idle ones on top. It is never lowered on
//! doubt, never at once, and never by a runner that has a job. A change of the template replaces idle runners, a few at a time, and
//! stops when the new ones fail.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use vmpod_api::pool::{Placement, RunnerPoolSpec};
use vmpod_api::runner::Phase;

use crate::estimate::Estimate;
use crate::schedule::{self, Bounds};

/// So many failures in a row, without a success, of the newest template halt a rollout and slow the pool down.
const BAD: u32 = 3;
/// The longest pause between tries of a pool whose runners fail.
const LONGEST: SignedDuration = SignedDuration::from_mins(5);
/// A runner that couldn't be scheduled for so long says that there is no room.
const NO_ROOM: SignedDuration = SignedDuration::from_secs(10);

/// A runner, as the plan needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runner {
    /// Its name.
    pub name: String,
    /// Where it is in its life.
    pub phase: Phase,
    /// Since when.
    pub since: Timestamp,
    /// The template it was made from.
    pub template: String,
    /// Where it runs.
    pub placement: String,
    /// When it was made.
    pub created: Timestamp,
    /// Somebody wants it to go, since then.
    pub draining: Option<Timestamp>,
    /// No node has room for its machine.
    pub unschedulable: bool,
    /// The CI system no longer takes what it was given to be known by: it gets no job any more.
    pub stale: bool,
    /// Its node takes no new pods since then: it is about to be emptied.
    pub cordoned: Option<Timestamp>,
}

/// Jobs that wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Demand {
    /// So many, the first of them since then.
    Known {
        /// How many.
        count: u32,
        /// Since when the first does.
        oldest: Option<Timestamp>,
    },
    /// It isn't known, and why.
    Unknown(String),
}

/// What the operator remembers of a pool between two looks. Losing it costs time, never a job.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Memory {
    /// The wanted numbers of late, for the stabilisation of a scale-down.
    pub wanted: Vec<(Timestamp, u32)>,
    /// Failures in a row of the newest template, and when the last one was.
    pub failures: u32,
    /// When the last one was.
    pub failed: Option<Timestamp>,
    /// What jobs and machines were like of late.
    pub estimate: Estimate,
    /// The placements that are used only when jobs wait long, and when one last did.
    pub overflow: BTreeMap<String, Timestamp>,
}

impl Memory {
    /// Until when no runner is made.
    #[must_use]
    pub fn paused_until(&self) -> Option<Timestamp> {
        let failed = self.failed.filter(|_| self.failures > 0)?;
        let doubled = 5_i64.saturating_mul(1 << self.failures.min(10));
        failed.checked_add(SignedDuration::from_secs(doubled).min(LONGEST)).ok()
    }
}

/// What is.
#[derive(Clone, Debug)]
pub struct Observed<'a> {
    /// The pool's runners.
    pub runners: &'a [Runner],
    /// The jobs that wait.
    pub demand: Demand,
    /// The newest template.
    pub template: &'a str,
    /// How many runners the pool may have, by what other pools need; no bound of this kind without.
    pub share: Option<u32>,
}

/// What to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// How many there should be.
    pub wanted: u32,
    /// Make a runner at each of these placements.
    pub create: Vec<String>,
    /// Ask these to go: they are idle, or have not begun.
    pub drain: Vec<String>,
    /// Remove these: they are over, or drained long enough.
    pub remove: Vec<String>,
    /// Let these be evicted: their nodes have waited for their jobs long enough.
    pub release: Vec<String>,
    /// Why it isn't scaling, in a word and a sentence; none when all is as wanted.
    pub why: Option<(&'static str, String)>,
    /// Whether every runner is of the newest template.
    pub rolled_out: bool,
    /// Why the rollout goes no further, if so.
    pub halted: Option<String>,
}

/// Names what to do.
#[must_use]
pub fn plan(spec: &RunnerPoolSpec, seen: &Observed<'_>, memory: &mut Memory, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    plan.remove.extend(over(spec, seen.runners, now));
    // One that gets no job any more is none, unless it has one.
    let useless = |r: &Runner| r.stale && r.phase != Phase::Busy;
    let (alive, leaving): (Vec<&Runner>, Vec<&Runner>) =
        seen.runners.iter().filter(|r| !r.phase.is_over()).partition(|r| r.draining.is_none() && !useless(r));
    plan.drain.extend(leaving.iter().filter(|r| r.draining.is_none()).map(|r| r.name.clone()));
    let draining_busy = leaving.len();
    let busy = count(&alive, |r| r.phase == Phase::Busy);
    let (bounds, invalid) = schedule::bounds(&spec.scale, now);
    if let Demand::Known { count, oldest } = &seen.demand {
        memory.estimate.look(*count, now);
        overflow(spec, *oldest, memory, now);
    }
    let target = target(spec, bounds, &seen.demand, &alive, busy, memory, now);
    plan.wanted = target.min(seen.share.unwrap_or(u32::MAX)).max(busy);
    if target > plan.wanted {
        plan.why = Some(("LowerPriority", "other pools need the room more".to_owned()));
    }
    if let Some(invalid) = invalid {
        plan.why = Some(("ScheduleInvalid", invalid.to_string()));
    }
    if let Demand::Unknown(why) = &seen.demand {
        plan.why = Some(("DemandUnknown", why.clone()));
    }

    // Old ones go as new ones come.
    let of_old = |r: &Runner| r.template != seen.template;
    plan.rolled_out = !alive.iter().any(|r| of_old(r));
    if memory.failures >= BAD && !plan.rolled_out {
        plan.halted = Some(format!("{} new runners failed in a row; the old ones stay", memory.failures));
    }
    let rolls = !spec.rollout.paused && plan.halted.is_none();
    // Age is no reason to lose a machine while new ones don't come up.
    let age_limit = spec.max_age_seconds.filter(|_| memory.failures < BAD);
    let aged = |r: &Runner| {
        let most = age_limit.map(|seconds| SignedDuration::from_secs(i64::from(seconds)));
        r.phase == Phase::Idle && most.is_some_and(|most| now.duration_since(r.created) > most)
    };
    let outdated: Vec<&&Runner> = alive.iter().filter(|r| (rolls && of_old(r)) || aged(r)).collect();
    let replacing = !outdated.is_empty();
    let surge = if replacing { spec.rollout.max_surge.min(u32_of(outdated.len())) } else { 0 };
    let held = u32_of(alive.len());
    let goal = plan.wanted + surge;

    if held < goal {
        let room = bounds.max.saturating_add(surge).saturating_sub(held + u32_of(draining_busy));
        create(spec, bounds, &alive, (goal - held).min(room), memory, now, &mut plan);
    } else if held > goal {
        drain_surplus(spec, &alive, seen.template, held - goal, &mut plan);
    }
    move_on(spec, &alive, memory, now, &mut plan);
    if replacing {
        // So many stay ready, old ones or new ones, whatever goes.
        let ready = count(&alive, |r| matches!(r.phase, Phase::Idle | Phase::Busy));
        let may_go = ready.saturating_sub(plan.wanted.saturating_sub(spec.rollout.max_unavailable));
        let waiting = outdated.iter().filter(|r| !matches!(r.phase, Phase::Idle | Phase::Busy));
        let idle = outdated.iter().filter(|r| r.phase == Phase::Idle).take(may_go as usize);
        let go: Vec<String> = waiting.chain(idle).map(|r| r.name.clone()).collect();
        plan.drain.extend(go.into_iter().filter(|name| !plan.drain.contains(name)).collect::<Vec<_>>());
    }
    // A node that is being emptied gives back what has no job; others take its place.
    let leaving = alive.iter().filter(|r| r.cordoned.is_some() && r.phase == Phase::Idle).map(|r| r.name.clone());
    plan.drain.extend(leaving.filter(|name| !plan.drain.contains(name)).collect::<Vec<_>>());
    let patience = SignedDuration::from_secs(i64::from(spec.rollout.drain_seconds));
    let waited = |r: &&Runner| r.cordoned.is_some_and(|since| now.duration_since(since) > patience);
    plan.release = seen.runners.iter().filter(|r| !r.phase.is_over()).filter(waited).map(|r| r.name.clone()).collect();
    plan
}

fn u32_of(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn count(runners: &[&Runner], wanted: impl Fn(&Runner) -> bool) -> u32 {
    u32_of(runners.iter().filter(|runner| wanted(runner)).count())
}

/// Runners whose end is there: over, or with nothing to wait for any more.
fn over<'a>(spec: &'a RunnerPoolSpec, runners: &'a [Runner], now: Timestamp) -> impl Iterator<Item = String> + 'a {
    let patience = SignedDuration::from_secs(i64::from(spec.rollout.drain_seconds));
    runners
        .iter()
        .filter(move |runner| match (runner.phase, runner.draining) {
            (Phase::Gone | Phase::Failed, _) => true,
            // A drained runner's pod is deleted with as long a grace period, so that this is only for pods that resist.
            (_, Some(since)) => now.duration_since(since) > patience,
            _ => false,
        })
        .map(|runner| runner.name.clone())
}

/// How many runners there should be, before other pools have their say.
fn target(
    spec: &RunnerPoolSpec,
    bounds: Bounds,
    demand: &Demand,
    alive: &[&Runner],
    busy: u32,
    memory: &mut Memory,
    now: Timestamp,
) -> u32 {
    let bounded = |wanted: u32| bounds.clamp(wanted);
    if let Some(replicas) = spec.scale.replicas {
        return bounded(u32::try_from(replicas).unwrap_or(0));
    }
    let wanted = match demand {
        Demand::Known { count, .. } => {
            let jobs = busy.saturating_add(*count);
            bounded(jobs.saturating_add(ahead(spec, bounds, jobs, busy, memory)))
        }
        // Nobody knows: what is there stays.
        Demand::Unknown(_) => bounded(u32_of(alive.len()).max(busy.saturating_add(bounds.idle))),
    };
    let window = SignedDuration::from_secs(i64::from(spec.scale.scale_down_seconds));
    memory.wanted.retain(|(at, _)| now.duration_since(*at) < window);
    memory.wanted.push((now, wanted));
    // A job that has just ended its machine needs no machine in its place: with one job a machine, a machine that
    // is gone doesn't count as wanted for the rest of the window.
    let recent = memory.wanted.iter().map(|(_, wanted)| *wanted).max().unwrap_or(wanted);
    bounded(recent.min(u32_of(alive.len()).max(wanted)))
}

/// How many wait for jobs beyond those of now: as many as the pool names, its wait target takes, or its utilization leaves.
fn ahead(spec: &RunnerPoolSpec, bounds: Bounds, jobs: u32, busy: u32, memory: &Memory) -> u32 {
    let for_wait = spec.scale.queue_wait_target_seconds.map_or(0, |seconds| {
        memory.estimate.ahead(SignedDuration::from_secs(i64::from(seconds)), busy, spec.jobs_per_runner)
    });
    let for_use = spec.scale.utilization.filter(|percent| *percent > 0).map_or(0, |percent| {
        let all = u64::from(jobs).saturating_mul(100).div_ceil(u64::from(percent));
        u32::try_from(all).unwrap_or(u32::MAX).saturating_sub(jobs)
    });
    bounds.idle.max(for_wait).max(for_use)
}

/// Remembers which placements for jobs that wait long are in use.
fn overflow(spec: &RunnerPoolSpec, oldest: Option<Timestamp>, memory: &mut Memory, now: Timestamp) {
    let waited = oldest.map_or(SignedDuration::ZERO, |oldest| now.duration_since(oldest));
    for place in &spec.placements {
        let Some(after) = place.after_seconds else { continue };
        if waited >= SignedDuration::from_secs(i64::from(after)) {
            memory.overflow.insert(place.name.clone(), now);
        }
    }
    memory.overflow.retain(|name, last| {
        let place = spec.placements.iter().find(|place| place.name == *name && place.after_seconds.is_some());
        place.is_some_and(|place| {
            now.duration_since(*last) <= SignedDuration::from_secs(i64::from(place.return_seconds))
        })
    });
}

/// Whether a runner has found no room at its placement for long enough to say that there is none.
fn stuck(runner: &Runner, now: Timestamp) -> bool {
    runner.unschedulable && now.duration_since(runner.created) > NO_ROOM
}

/// Whether a placement is in use: those for jobs that wait long are only while some do.
fn open(place: &Placement, memory: &Memory) -> bool {
    place.after_seconds.is_none() || memory.overflow.contains_key(&place.name)
}

/// Replaces runners that find no room where they are by others at a later placement. The oldest of a placement stays: it takes
/// the first room there is, and until then says that there is none.
fn move_on(spec: &RunnerPoolSpec, alive: &[&Runner], memory: &Memory, now: Timestamp, plan: &mut Plan) {
    if memory.paused_until().is_some_and(|until| until > now) {
        return;
    }
    for (index, place) in spec.placements.iter().enumerate() {
        let mut waiting: Vec<&&Runner> = alive
            .iter()
            .filter(|r| r.placement == place.name && stuck(r, now) && !plan.drain.contains(&r.name))
            .collect();
        waiting.sort_by_key(|r| (r.created, r.name.clone()));
        for runner in waiting.into_iter().skip(1) {
            let later = spec.placements[index + 1..].iter().find(|later| {
                let there = alive.iter().filter(|r| r.placement == later.name).count();
                let coming = plan.create.iter().filter(|name| **name == later.name).count();
                let full = alive.iter().any(|r| r.placement == later.name && stuck(r, now));
                open(later, memory) && !full && u32_of(there + coming) < later.max.unwrap_or(u32::MAX)
            });
            let Some(later) = later else { break };
            plan.create.push(later.name.clone());
            plan.drain.push(runner.name.clone());
        }
    }
}

fn create(
    spec: &RunnerPoolSpec,
    bounds: Bounds,
    alive: &[&Runner],
    missing: u32,
    memory: &Memory,
    now: Timestamp,
    plan: &mut Plan,
) {
    if missing == 0 {
        plan.why.get_or_insert(("AtMax", format!("the pool has its most runners, {}", bounds.max)));
        return;
    }
    if let Some(until) = memory.paused_until().filter(|until| *until > now) {
        plan.why =
            Some(("BackOff", format!("{} runners failed in a row; the next try is at {until:.0}", memory.failures)));
        return;
    }
    // While the newest template fails, one runner at a time finds out whether it still does.
    let missing = if memory.failures >= BAD { 1 } else { missing };
    let mut at: BTreeMap<&str, u32> = BTreeMap::new();
    for runner in alive {
        *at.entry(&runner.placement).or_default() += 1;
    }
    let anywhere = [Placement::default()];
    let placements = if spec.placements.is_empty() { anywhere.as_slice() } else { &spec.placements };
    let full = |name: &str| alive.iter().any(|r| r.placement == name && stuck(r, now));
    for _ in 0..missing {
        let place = placements.iter().find(|place| {
            let most = place.max.unwrap_or(u32::MAX);
            open(place, memory) && !full(&place.name) && at.get(place.name.as_str()).copied().unwrap_or(0) < most
        });
        let Some(place) = place else {
            plan.why = Some(("NoRoom", "no placement takes another runner now".to_owned()));
            return;
        };
        *at.entry(&place.name).or_default() += 1;
        plan.create.push(place.name.clone());
    }
}

/// Chooses whom to ask to go: never one with a job; first those that never ran, of old templates, of late placements, the
/// youngest.
fn drain_surplus(spec: &RunnerPoolSpec, alive: &[&Runner], template: &str, surplus: u32, plan: &mut Plan) {
    let mut free: Vec<&&Runner> = alive.iter().filter(|r| r.phase != Phase::Busy).collect();
    free.sort_by_key(|r| {
        let up = matches!(r.phase, Phase::Idle | Phase::Provisioning);
        let place = spec.placements.iter().position(|place| place.name == r.placement);
        let late = std::cmp::Reverse(place.unwrap_or(usize::MAX));
        (up, r.template == template, late, std::cmp::Reverse(r.created), r.name.clone())
    });
    plan.drain.extend(free.into_iter().take(surplus as usize).map(|r| r.name.clone()));
}

#[cfg(test)]
mod tests;
