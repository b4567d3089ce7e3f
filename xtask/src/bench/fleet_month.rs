//! A month of CI jobs, simulated: how long jobs wait and how many machine-hours they cost, by three ways to run a fleet.
//!
//! - **static**: so many machines of each flavour, always.
//! - **rule**: an autoscaler for each flavour alone that keeps three in ten machines busy (KEDA with a utilization of 30 %), and
//!   another one that adds machines of a cloud for jobs that have waited a minute.
//! - **vmpod**: the operator's own `plan` and `share`, with a wait target and the cloud as the second placement.
//!
//! All three get the same jobs, the same host capacity and the same machines: a clean one for each job, which needs its time to
//! start. What isn't simulated: machines that fail, and an autoscaler that ends a machine with a job.

mod load;
mod plot;
mod world;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::json;
use vmpod_api::pool::RunnerPoolSpec;
use vmpod_api::runner::Phase;
use vmpod_fleet::plan::{Demand, Memory, Observed, plan};
use vmpod_fleet::share::{Amount, Wish, share};

use load::Job;
use world::{CLOUD, Fleet, HOSTS, Happened, Outcome, World};

/// A size of machines.
pub(super) struct Flavour {
    pub(super) name: &'static str,
    pub(super) cpus: u32,
    /// Machines of it in the static fleet.
    pub(super) slots: u32,
    /// Of the jobs, in percent.
    pub(super) part: u32,
    /// Seconds of a job, on average.
    pub(super) job: f64,
}

/// 800 machines on the hosts.
pub(super) const FLAVOURS: [Flavour; 3] = [
    Flavour { name: "m1.large", cpus: 4, slots: 560, part: 78, job: 150.0 },
    Flavour { name: "m1.xlarge", cpus: 8, slots: 176, part: 17, job: 225.0 },
    Flavour { name: "m1.xxlarge", cpus: 16, slots: 64, part: 5, job: 350.0 },
];

/// Processors of all hosts: as many as the static fleet takes.
pub(super) fn host_cpus() -> u32 {
    FLAVOURS.iter().map(|flavour| flavour.cpus * flavour.slots).sum()
}

/// Processors that the cloud gives at most.
pub(super) const CLOUD_CPUS: u32 = 640;
const DAY: u32 = 86_400;
const JOBS_A_DAY: u32 = 100_000;

#[expect(clippy::print_stdout, reason = "figures are what it is for")]
pub(super) fn run(quick: bool, root: &Path) -> Result<()> {
    let days = if quick { 7 } else { 30 };
    let jobs = load::jobs(days, JOBS_A_DAY * days, 1);
    println!("{} jobs in {days} days, {} processors on hosts, {CLOUD_CPUS} in the cloud", jobs.len(), host_cpus());
    let mut fleets: [(&str, Box<dyn Fleet>); 3] =
        [("static", Box::new(Static)), ("rule", Box::new(Rule::default())), ("vmpod", Box::new(Ours::new()?))];
    let mut outcomes = Vec::new();
    println!(
        "{:<8} {:>9} {:>9} {:>9} {:>9} {:>14} {:>13}",
        "", "p50 s", "p95 s", "p99 s", "mean s", "machine-hours", "cloud-hours"
    );
    for (name, fleet) in &mut fleets {
        let outcome = World::new(&jobs).run(&mut **fleet, days * DAY);
        println!(
            "{name:<8} {:>9} {:>9} {:>9} {:>9.1} {:>14.0} {:>13.0}",
            outcome.wait(50),
            outcome.wait(95),
            outcome.wait(99),
            outcome.mean(),
            outcome.hours,
            outcome.cloud_hours
        );
        for (flavour, about) in FLAVOURS.iter().enumerate() {
            println!("  {:<12} p95 {:>5} s", about.name, outcome.wait_of(flavour, 95));
        }
        outcomes.push((*name, outcome));
    }
    if !quick {
        let path: PathBuf = root.join("docs/fleet-month.svg");
        std::fs::write(&path, plot::svg(&outcomes)).with_context(|| format!("can't write {}", path.display()))?;
        println!("the second week is drawn in {}", path.display());
    }
    let [_, (_, rule), (_, ours)] = &outcomes[..] else { return Ok(()) };
    let figures = json!({
        "jobs": jobs.len(),
        "p50_s": ours.wait(50), "p95_s": ours.wait(95), "p99_s": ours.wait(99),
        "rule_p95_s": rule.wait(95), "rule_p99_s": rule.wait(99),
        "p95_over_rule": ratio(f64::from(ours.wait(95)), f64::from(rule.wait(95))),
        "hours_over_rule": ratio(ours.hours, rule.hours),
    });
    println!("{figures}");
    Ok(())
}

/// None when there is nothing to compare with.
fn ratio(a: f64, b: f64) -> Option<f64> {
    (b > 0.0).then(|| (a / b * 1000.0).round() / 1000.0)
}

/// The same machines all the time.
struct Static;

impl Fleet for Static {
    fn look(&mut self, world: &mut World<'_>) {
        for (flavour, about) in FLAVOURS.iter().enumerate() {
            let held = world.held(flavour, HOSTS);
            (held..about.slots).for_each(|_| world.create(flavour, HOSTS));
        }
    }
}

/// One autoscaler for each flavour, and one more for its machines in the cloud.
#[derive(Default)]
struct Rule {
    /// What was wanted of late, for the stabilisation of a scale-down: on hosts and in the cloud.
    wanted: [[Vec<(u32, u32)>; 2]; 3],
}

/// Kubernetes' autoscaler looks every 15 s, and lowers a number only when it was too high for five minutes.
const EVERY: u32 = 15;
const WINDOW: u32 = 300;

impl Fleet for Rule {
    fn look(&mut self, world: &mut World<'_>) {
        if !world.now.is_multiple_of(EVERY) {
            return;
        }
        for (flavour, about) in FLAVOURS.iter().enumerate() {
            let busy = world.busy(flavour, HOSTS);
            // At least one, or the metric would never begin.
            let wish = (busy * 10).div_ceil(3).max(1);
            let long = world.waiting(flavour).filter(|since| world.now - since >= 60).count();
            let cloud = world.busy(flavour, CLOUD) + u32::try_from(long).unwrap_or(u32::MAX);
            let most = [about.slots * 3 / 2, CLOUD_CPUS / 3 / about.cpus];
            for (place, wish) in [(HOSTS, wish), (CLOUD, cloud)] {
                let window = &mut self.wanted[flavour][place];
                window.retain(|(at, _)| world.now - at < WINDOW);
                window.push((world.now, wish.min(most[place])));
                let wanted = window.iter().map(|(_, wanted)| *wanted).max().unwrap_or(0);
                let held = world.held(flavour, place);
                // At most twice as many, or four more, at a time.
                let up = wanted.min((held * 2).max(held + 4));
                (held..up).for_each(|_| world.create(flavour, place));
                world.end_idle(flavour, place, held.saturating_sub(wanted));
            }
        }
    }
}

/// What the operator does.
struct Ours {
    pools: Vec<(RunnerPoolSpec, Memory)>,
}

impl Ours {
    fn new() -> Result<Self> {
        let pool = |flavour: &Flavour| -> Result<(RunnerPoolSpec, Memory)> {
            let spec = serde_json::from_value(json!({
                "provider": {"gitlab": {"url": "https://gitlab.example", "tokenSecretRef": {"name": "t", "key": "t"}, "tags": ["x"]}},
                "image": "ubuntu",
                "scale": {"max": 1000, "queueWaitTargetSeconds": 5},
                "placements": [
                    {"name": world::PLACES[HOSTS]},
                    {"name": world::PLACES[CLOUD], "max": CLOUD_CPUS / 3 / flavour.cpus, "afterSeconds": 30}],
            }))?;
            Ok((spec, Memory::default()))
        };
        Ok(Self { pools: FLAVOURS.iter().map(pool).collect::<Result<_>>()? })
    }
}

impl Fleet for Ours {
    fn happened(&mut self, flavour: usize, what: Happened) {
        let estimate = &mut self.pools[flavour].1.estimate;
        match what {
            Happened::Started(after) => estimate.started(after),
            Happened::Began => estimate.began(),
            Happened::Ended(after) => estimate.ended(after),
        }
    }

    fn look(&mut self, world: &mut World<'_>) {
        let now = world::at(world.now);
        let demand = |world: &World<'_>, flavour: usize| Demand::Known {
            count: u32::try_from(world.waiting(flavour).count()).unwrap_or(u32::MAX),
            oldest: world.waiting(flavour).next().map(world::at),
        };
        let wishes: Vec<Wish> = FLAVOURS
            .iter()
            .enumerate()
            .map(|(flavour, about)| {
                let (spec, memory) = &self.pools[flavour];
                let runners = world.runners(flavour);
                let demand = demand(world, flavour);
                let seen = Observed { runners, demand, template: world::TEMPLATE, share: None };
                let wanted = plan(spec, &seen, &mut memory.clone(), now).wanted;
                let busy = runners.iter().filter(|runner| runner.phase == Phase::Busy).count();
                let each = Amount { millicpus: u64::from(about.cpus) * 1000, memory: 0 };
                Wish { priority: 0, each, busy: u32::try_from(busy).unwrap_or(u32::MAX), wanted }
            })
            .collect();
        let capacity = Amount { millicpus: u64::from(host_cpus() + CLOUD_CPUS) * 1000, memory: 0 };
        for (flavour, share) in share(&wishes, capacity).into_iter().enumerate() {
            let demand = demand(world, flavour);
            let (spec, memory) = &mut self.pools[flavour];
            let runners = world.runners(flavour);
            let seen = Observed { runners, demand, template: world::TEMPLATE, share: Some(share) };
            let todo = plan(spec, &seen, memory, now);
            for name in todo.drain.iter().chain(&todo.remove) {
                world.end(flavour, name);
            }
            for place in &todo.create {
                world.create(flavour, if *place == world::PLACES[CLOUD] { CLOUD } else { HOSTS });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fleet_runs_every_job_and_ours_follows_the_load() {
        let jobs = load::jobs(1, 5_000, 7);
        let last = jobs.iter().map(|job| job.at).max().unwrap();
        let mut hours = Vec::new();
        let fleets: [Box<dyn Fleet>; 3] = [Box::new(Static), Box::new(Rule::default()), Box::new(Ours::new().unwrap())];
        for mut fleet in fleets {
            let outcome = World::new(&jobs).run(&mut *fleet, last + 4 * 3600);
            assert_eq!(outcome.done, jobs.len());
            hours.push(outcome.hours);
        }
        assert!(hours[2] < hours[1] && hours[1] < hours[0], "{hours:?}");
    }

    #[test]
    fn a_month_is_the_same_every_time() {
        let (a, b) = (load::jobs(2, 1000, 3), load::jobs(2, 1000, 3));
        assert_eq!(a, b);
        assert_ne!(a, load::jobs(2, 1000, 4));
        assert!(a.is_sorted_by_key(|job| job.at));
    }
}
