//! Machines, jobs and time.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
};

use jiff::{SignedDuration, Timestamp};
use vmpod_api::runner::Phase;
use vmpod_fleet::plan::Runner;

use super::{CLOUD_CPUS, FLAVOURS, Job, host_cpus};

/// The places of machines.
pub(super) const HOSTS: usize = 0;
pub(super) const CLOUD: usize = 1;
pub(super) const PLACES: [&str; 2] = ["hosts", "cloud"];
/// Seconds until a machine waits for its job.
const START: [u32; 2] = [45, 90];
pub(super) const TEMPLATE: &str = "t";
/// The operator looks this often, in seconds.
const LOOK: u32 = 5;
/// A point of the plot is so many seconds.
pub(super) const SAMPLE: u32 = 600;

/// Who decides how many machines there are.
pub(super) trait Fleet {
    /// Something happened to a machine.
    fn happened(&mut self, _flavour: usize, _what: Happened) {}
    /// Makes and ends machines.
    fn look(&mut self, world: &mut World<'_>);
}

pub(super) enum Happened {
    Started(SignedDuration),
    Began,
    Ended(SignedDuration),
}

/// What came of it.
pub(super) struct Outcome {
    /// Jobs by the seconds that they waited, for each flavour.
    waits: [Vec<u32>; 3],
    pub(super) done: usize,
    pub(super) hours: f64,
    pub(super) cloud_hours: f64,
    /// Machines, and the longest wait of those that began, for each [`SAMPLE`].
    pub(super) samples: Vec<(u32, u32)>,
}

impl Outcome {
    /// So many of a hundred jobs waited no longer than this, in seconds.
    pub(super) fn wait(&self, percent: u64) -> u32 {
        let longest = self.waits.iter().map(Vec::len).max().unwrap_or(0);
        let all: Vec<u32> = (0..longest).map(|at| self.waits.iter().filter_map(|waits| waits.get(at)).sum()).collect();
        percentile(&all, percent)
    }

    pub(super) fn wait_of(&self, flavour: usize, percent: u64) -> u32 {
        percentile(&self.waits[flavour], percent)
    }

    pub(super) fn mean(&self) -> f64 {
        let sums = self.waits.iter().flat_map(|waits| (0_u32..).zip(waits));
        let (count, sum) = sums.fold((0.0, 0.0), |(count, sum), (seconds, jobs)| {
            (count + f64::from(*jobs), sum + f64::from(seconds) * f64::from(*jobs))
        });
        sum / f64::max(count, 1.0)
    }
}

fn percentile(waits: &[u32], percent: u64) -> u32 {
    let all: u64 = waits.iter().map(|jobs| u64::from(*jobs)).sum();
    let mut below = 0;
    for (seconds, jobs) in (0..).zip(waits) {
        below += u64::from(*jobs);
        if below * 100 >= all * percent {
            return seconds;
        }
    }
    0
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Ready(usize, u64),
    Ended(usize, u64),
}

/// One machine, beside what the plan knows of it.
struct Machine {
    place: usize,
    /// When its room was taken; none while it waits for room.
    placed: Option<u32>,
    began: u32,
    job: u32,
}

pub(super) struct World<'a> {
    pub(super) now: u32,
    jobs: &'a [Job],
    next_job: usize,
    events: BinaryHeap<Reverse<(u32, Event)>>,
    runners: [Vec<Runner>; 3],
    /// Where a machine is in the list of its flavour.
    at: [HashMap<u64, usize>; 3],
    machines: HashMap<u64, Machine>,
    idle: [VecDeque<u64>; 3],
    waiting: [VecDeque<(u32, u32)>; 3],
    /// Machines that no host has room for yet.
    unplaced: VecDeque<(usize, u64)>,
    free: [u32; 2],
    held: [[u32; 2]; 3],
    busy: [[u32; 2]; 3],
    made: u64,
    happened: Vec<(usize, Happened)>,
    outcome: Outcome,
}

/// A moment of the simulation.
pub(super) fn at(second: u32) -> Timestamp {
    Timestamp::from_second(i64::from(second)).unwrap_or(Timestamp::UNIX_EPOCH)
}

fn span(seconds: u32) -> SignedDuration {
    SignedDuration::from_secs(i64::from(seconds))
}

impl<'a> World<'a> {
    pub(super) fn new(jobs: &'a [Job]) -> Self {
        let waits = std::array::from_fn(|_| vec![0; 16]);
        Self {
            now: 0,
            jobs,
            next_job: 0,
            events: BinaryHeap::new(),
            runners: Default::default(),
            at: Default::default(),
            machines: HashMap::new(),
            idle: Default::default(),
            waiting: Default::default(),
            unplaced: VecDeque::new(),
            free: [host_cpus(), CLOUD_CPUS],
            held: Default::default(),
            busy: Default::default(),
            made: 0,
            happened: Vec::new(),
            outcome: Outcome { waits, done: 0, hours: 0.0, cloud_hours: 0.0, samples: Vec::new() },
        }
    }

    /// Lets the time pass.
    pub(super) fn run(mut self, fleet: &mut dyn Fleet, seconds: u32) -> Outcome {
        let mut longest = 0;
        while self.now < seconds {
            while self.events.peek().is_some_and(|Reverse((at, _))| *at <= self.now) {
                let Some(Reverse((_, event))) = self.events.pop() else { break };
                match event {
                    Event::Ready(flavour, id) => self.ready(flavour, id),
                    Event::Ended(flavour, id) => self.ended(flavour, id),
                }
            }
            while let Some(job) = self.jobs.get(self.next_job).filter(|job| job.at <= self.now) {
                self.next_job += 1;
                self.waiting[job.flavour].push_back((job.at, job.seconds));
                self.dispatch(job.flavour);
            }
            for (flavour, what) in self.happened.drain(..) {
                fleet.happened(flavour, what);
            }
            if self.now.is_multiple_of(LOOK) {
                fleet.look(&mut self);
                let waits =
                    self.waiting.iter().filter_map(|waiting| waiting.front()).map(|(since, _)| self.now - since);
                longest = longest.max(waits.max().unwrap_or(0));
            }
            if self.now.is_multiple_of(SAMPLE) {
                self.outcome.samples.push((self.held.iter().flatten().sum(), longest));
                longest = 0;
            }
            self.now += 1;
        }
        let left: Vec<u64> = self.machines.keys().copied().collect();
        for id in left {
            self.count_hours(id);
        }
        self.outcome
    }

    pub(super) fn runners(&self, flavour: usize) -> &[Runner] {
        &self.runners[flavour]
    }

    /// Machines, whatever they do.
    pub(super) fn held(&self, flavour: usize, place: usize) -> u32 {
        self.held[flavour][place]
    }

    /// Machines with a job.
    pub(super) fn busy(&self, flavour: usize, place: usize) -> u32 {
        self.busy[flavour][place]
    }

    /// Since when jobs wait, the longest first.
    pub(super) fn waiting(&self, flavour: usize) -> impl Iterator<Item = u32> + '_ {
        self.waiting[flavour].iter().map(|(since, _)| *since)
    }

    pub(super) fn create(&mut self, flavour: usize, place: usize) {
        let id = self.made;
        self.made += 1;
        self.at[flavour].insert(id, self.runners[flavour].len());
        self.runners[flavour].push(Runner {
            name: id.to_string(),
            phase: Phase::Starting,
            since: at(self.now),
            template: TEMPLATE.to_owned(),
            placement: PLACES[place].to_owned(),
            created: at(self.now),
            draining: None,
            unschedulable: true,
            stale: false,
            cordoned: None,
        });
        self.machines.insert(id, Machine { place, placed: None, began: 0, job: 0 });
        self.held[flavour][place] += 1;
        self.unplaced.push_back((flavour, id));
        self.place();
    }

    /// Gives room to those that wait for it, in their order; who doesn't fit holds up nobody.
    fn place(&mut self) {
        let mut still = VecDeque::new();
        while let Some((flavour, id)) = self.unplaced.pop_front() {
            let Some(machine) = self.machines.get_mut(&id) else { continue };
            let (need, free) = (FLAVOURS[flavour].cpus, &mut self.free[machine.place]);
            if *free >= need {
                *free -= need;
                machine.placed = Some(self.now);
                let ready = self.now + START[machine.place];
                self.events.push(Reverse((ready, Event::Ready(flavour, id))));
                if let Some(runner) = self.at[flavour].get(&id).map(|at| &mut self.runners[flavour][*at]) {
                    runner.unschedulable = false;
                }
            } else {
                still.push_back((flavour, id));
            }
        }
        self.unplaced = still;
    }

    fn set(&mut self, flavour: usize, id: u64, phase: Phase) {
        if let Some(index) = self.at[flavour].get(&id) {
            let runner = &mut self.runners[flavour][*index];
            (runner.phase, runner.since) = (phase, at(self.now));
        }
    }

    fn ready(&mut self, flavour: usize, id: u64) {
        let Some(index) = self.at[flavour].get(&id) else { return };
        let created = self.runners[flavour][*index].created;
        self.happened.push((flavour, Happened::Started(at(self.now).duration_since(created))));
        self.set(flavour, id, Phase::Idle);
        self.idle[flavour].push_back(id);
        self.dispatch(flavour);
    }

    fn dispatch(&mut self, flavour: usize) {
        while let (Some(_), Some(_)) = (self.idle[flavour].front(), self.waiting[flavour].front()) {
            let Some(id) = self.idle[flavour].pop_front() else { return };
            // One that was ended meanwhile.
            let Some(machine) = self.machines.get_mut(&id) else { continue };
            let Some((since, seconds)) = self.waiting[flavour].pop_front() else { return };
            (machine.began, machine.job) = (self.now, seconds);
            self.busy[flavour][machine.place] += 1;
            let waited = (self.now - since) as usize;
            let waits = &mut self.outcome.waits[flavour];
            if waits.len() <= waited {
                waits.resize(waited + 1, 0);
            }
            waits[waited] += 1;
            self.events.push(Reverse((self.now + seconds, Event::Ended(flavour, id))));
            self.set(flavour, id, Phase::Busy);
            self.happened.push((flavour, Happened::Began));
        }
    }

    fn ended(&mut self, flavour: usize, id: u64) {
        let Some(machine) = self.machines.get(&id) else { return };
        self.busy[flavour][machine.place] -= 1;
        self.outcome.done += 1;
        self.happened.push((flavour, Happened::Ended(span(self.now - machine.began))));
        self.gone(flavour, id);
    }

    /// Ends a machine by its name, unless it has a job.
    pub(super) fn end(&mut self, flavour: usize, name: &str) {
        let Ok(id) = name.parse::<u64>() else { return };
        let phase = self.at[flavour].get(&id).map(|at| self.runners[flavour][*at].phase);
        if phase.is_some_and(|phase| phase != Phase::Busy) {
            self.gone(flavour, id);
        }
    }

    /// Ends machines without a job, those first that wait for room, then the youngest.
    pub(super) fn end_idle(&mut self, flavour: usize, place: usize, count: u32) {
        if count == 0 {
            return;
        }
        let mut free: Vec<&Runner> = self.runners[flavour]
            .iter()
            .filter(|runner| runner.phase != Phase::Busy && runner.placement == PLACES[place])
            .collect();
        free.sort_by_key(|runner| (!runner.unschedulable, Reverse(runner.created)));
        let names: Vec<String> = free.iter().take(count as usize).map(|runner| runner.name.clone()).collect();
        for name in &names {
            self.end(flavour, name);
        }
    }

    fn count_hours(&mut self, id: u64) {
        let Some(machine) = self.machines.remove(&id) else { return };
        let hours = machine.placed.map_or(0.0, |placed| f64::from(self.now - placed) / 3600.0);
        self.outcome.hours += hours;
        if machine.place == CLOUD {
            self.outcome.cloud_hours += hours;
        }
    }

    fn gone(&mut self, flavour: usize, id: u64) {
        let Some(machine) = self.machines.get(&id) else { return };
        let (place, placed) = (machine.place, machine.placed.is_some());
        self.count_hours(id);
        self.held[flavour][place] -= 1;
        if let Some(index) = self.at[flavour].remove(&id) {
            self.runners[flavour].swap_remove(index);
            if let Some(moved) = self.runners[flavour].get(index).and_then(|runner| runner.name.parse().ok()) {
                self.at[flavour].insert(moved, index);
            }
        }
        if placed {
            self.free[place] += FLAVOURS[flavour].cpus;
            self.place();
        }
    }
}
