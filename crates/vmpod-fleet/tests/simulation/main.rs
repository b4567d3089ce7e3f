//! The whole operator in a simulated world: its API, its CI system, nodes, guests and the clock are a program's, and every
//! choice in it comes from one number. A run has crashes after any effect, lost and late watches, refused and unanswered
//! calls, a second operator that takes over, people who change and delete pools, nodes that are emptied. What must hold in
//! all of them: no job is ever ended, nothing that works is forgotten, and once the trouble is over, all jobs are done and
//! nothing is left on either side.
//!
//! `VMPOD_SIMULATION_SEEDS=5000` runs so many, `VMPOD_SIMULATION_SEED=17` runs one and tells what happened in it.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests may fail like tests")]
#![expect(clippy::print_stderr, reason = "a run that somebody asks for tells what happens in it")]
#![expect(clippy::disallowed_methods, reason = "a test has no command line of its own")]

mod api;
mod ci;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use world::{Shared, World};

/// How long there is trouble, in seconds.
const TROUBLE: u64 = 1200;
/// How long the jobs that wait then may take, at most.
const LONGEST: u64 = 6000;
/// How long everything has to come to rest after the last of them: the promise is two minutes.
const REST: u64 = 120;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// One operator, for ever: whenever it dies another takes its place.
async fn operators(world: Shared, index: usize) {
    loop {
        let (client, crash) = api::client(&world, index);
        let stop = CancellationToken::new();
        let metrics = vmpod_fleet::Metrics::default();
        world.with(|world| world.metrics[index] = metrics.clone());
        let options = vmpod_fleet::Options {
            install: false,
            metrics,
            providers: std::sync::Arc::new(ci::Site::new(&world)),
            clock: world.clock(),
            poll: Duration::from_secs(5),
            namespace: "ci".to_owned(),
            ..vmpod_fleet::Options::new(client, format!("operator-{index}"))
        };
        tokio::select! {
            biased;
            ended = vmpod_fleet::run(options, stop) => panic!("the operator ended by itself: {ended:?}"),
            () = crash.cancelled() => world.with(|world| world.say(&format!("operator {index} dies"))),
        }
        let pause = world.with(|world| world.below(8_000));
        sleep(Duration::from_millis(pause)).await;
    }
}

/// One run.
async fn simulate(seed: u64) {
    let world = Shared::new(World::new(seed));
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..2 {
        tasks.spawn(operators(world.clone(), index));
    }
    for second in 0..TROUBLE {
        world.with(|world| {
            world.people();
            world.step();
        });
        sleep(Duration::from_secs(1)).await;
        if second == TROUBLE - 1 {
            world.with(World::calm);
        }
    }
    let mut rest = REST;
    for _ in 0..LONGEST {
        world.with(World::step);
        sleep(Duration::from_secs(1)).await;
        rest = if world.with(|world| world.works()) { REST } else { rest - 1 };
        if rest == 0 {
            break;
        }
    }
    world.with(|world| world.at_rest());
    // And to the end: every pool goes, and takes everything along.
    world.with(World::end_all);
    for _ in 0..REST {
        world.with(World::step);
        sleep(Duration::from_secs(1)).await;
    }
    world.with(|world| world.nothing_left());
}

fn run(seed: u64) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(simulate(seed));
}

#[test]
fn no_job_is_ended_and_nothing_is_left_whatever_goes_wrong() {
    if let Some(seed) = number("VMPOD_SIMULATION_SEED") {
        return run(seed);
    }
    let seeds = number("VMPOD_SIMULATION_SEEDS").unwrap_or(40);
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= seeds {
                            return None;
                        }
                        if let Err(panic) = std::panic::catch_unwind(|| run(seed)) {
                            next.store(seeds, Ordering::Relaxed);
                            return Some((seed, panic));
                        }
                    }
                })
            })
            .collect();
        if let Some((seed, panic)) = workers.into_iter().find_map(|worker| worker.join().unwrap()) {
            let why = panic.downcast_ref::<String>().cloned().unwrap_or_default();
            panic!("VMPOD_SIMULATION_SEED={seed} fails: {why}");
        }
    });
}

#[test]
fn a_number_is_a_run() {
    let trace = |seed: u64| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let world = Shared::new(World::new(seed));
            let mut tasks = tokio::task::JoinSet::new();
            tasks.spawn(operators(world.clone(), 0));
            for _ in 0..300 {
                world.with(|world| {
                    world.people();
                    world.step();
                });
                sleep(Duration::from_secs(1)).await;
            }
            world.with(|world| world.told.clone())
        })
    };
    let (first, second) = (trace(7), trace(7));
    assert!(first.len() > 50, "too little happens: {} events", first.len());
    let differs = first.iter().zip(&second).position(|(a, b)| a != b);
    assert_eq!((differs, first.len()), (None, second.len()), "{:?}", differs.map(|at| (&first[at], &second[at])));
    assert_ne!(first, trace(8));
}
