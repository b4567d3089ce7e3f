#![allow(clippy::needless_pass_by_value, reason = "JSON is written in place")]

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn spec(extra: serde_json::Value) -> RunnerPoolSpec {
    let mut spec = json!({
        "provider": {"gitlab": {"url": "https://gitlab.example.com", "tokenSecretRef": {"name": "t", "key": "t"}, "tags": ["a"]}},
        "image": "tiny",
        "scale": {"max": 10},
    });
    for (key, value) in extra.as_object().unwrap() {
        spec[key] = value.clone();
    }
    serde_json::from_value(spec).unwrap()
}

fn runner(name: &str, phase: Phase) -> Runner {
    Runner {
        name: name.to_owned(),
        phase,
        since: at(0),
        template: "new".to_owned(),
        placement: String::new(),
        created: at(0),
        draining: None,
        unschedulable: false,
        stale: false,
        cordoned: None,
    }
}

fn old(name: &str, phase: Phase) -> Runner {
    Runner { template: "old".to_owned(), ..runner(name, phase) }
}

fn known(count: u32) -> Demand {
    Demand::Known { count, oldest: Some(at(0)) }
}

fn run(spec: &RunnerPoolSpec, runners: &[Runner], demand: Demand, memory: &mut Memory, now: i64) -> Plan {
    plan(spec, &Observed { runners, demand, template: "new", share: None }, memory, at(now))
}

fn once(spec: &RunnerPoolSpec, runners: &[Runner], demand: Demand) -> Plan {
    run(spec, runners, demand, &mut Memory::default(), 100)
}

#[test]
fn runners_follow_the_jobs() {
    let pool = spec(json!({"scale": {"max": 10, "idle": 1}}));
    assert_eq!(once(&pool, &[], known(0)).create.len(), 1, "the idle one");
    assert_eq!(once(&pool, &[], known(4)).create.len(), 5);
    assert_eq!(once(&pool, &[runner("a", Phase::Busy)], known(4)).create.len(), 5);
    // What is on its way counts.
    assert_eq!(once(&pool, &[runner("a", Phase::Starting), runner("b", Phase::Idle)], known(4)).create.len(), 3);
    let plan = once(&pool, &[], known(400));
    assert_eq!((plan.create.len(), plan.wanted), (10, 10), "never more than max");
    assert_eq!(once(&spec(json!({"scale": {"min": 2, "max": 10}})), &[], known(0)).create.len(), 2);
    assert_eq!(once(&spec(json!({"scale": {"max": 10}})), &[], known(0)), Plan { rolled_out: true, ..Plan::default() });
}

#[test]
fn fewer_are_enough_only_after_a_while_and_never_those_with_jobs() {
    let pool = spec(json!({"scale": {"max": 10, "scaleDownSeconds": 60}}));
    let runners = [runner("a", Phase::Busy), runner("b", Phase::Idle), runner("c", Phase::Idle)];
    let mut memory = Memory::default();
    assert_eq!(run(&pool, &runners, known(2), &mut memory, 0).drain, Vec::<String>::new());
    assert_eq!(run(&pool, &runners, known(0), &mut memory, 30).drain, Vec::<String>::new(), "too soon");
    let plan = run(&pool, &runners, known(0), &mut memory, 61);
    assert_eq!(plan.drain, ["b", "c"]);
    assert_eq!(plan.wanted, 1);
}

#[test]
fn a_machine_that_did_its_one_job_is_not_replaced_without_need() {
    let pool = spec(json!({"scale": {"max": 10, "scaleDownSeconds": 300}}));
    let mut memory = Memory::default();
    run(&pool, &[runner("a", Phase::Busy)], known(0), &mut memory, 0);
    let plan = run(&pool, &[runner("a", Phase::Gone)], known(0), &mut memory, 10);
    assert_eq!((plan.create.len(), plan.remove), (0, vec!["a".to_owned()]));
}

#[test]
fn doubt_changes_nothing() {
    let pool = spec(json!({"scale": {"max": 10}}));
    let runners = [runner("a", Phase::Idle), runner("b", Phase::Idle)];
    let plan = once(&pool, &runners, Demand::Unknown("maintenance".to_owned()));
    assert!(plan.create.is_empty() && plan.drain.is_empty());
    assert_eq!(plan.why, Some(("DemandUnknown", "maintenance".to_owned())));
}

#[test]
fn whoever_writes_replicas_decides_within_the_bounds() {
    let pool = |replicas: i32| spec(json!({"scale": {"min": 1, "max": 5, "idle": 3, "replicas": replicas}}));
    assert_eq!(once(&pool(3), &[], known(100)).create.len(), 3);
    assert_eq!(once(&pool(0), &[], known(100)).create.len(), 1);
    assert_eq!(once(&pool(100), &[], known(0)).create.len(), 5);
}

#[test]
fn placements_fill_in_order_and_overflow_waits_its_time() {
    let pool = spec(json!({
        "scale": {"max": 10},
        "placements": [{"name": "home", "max": 2}, {"name": "cloud", "afterSeconds": 60}],
    }));
    let demand = || Demand::Known { count: 4, oldest: Some(at(80)) };
    let early = run(&pool, &[], demand(), &mut Memory::default(), 100);
    assert_eq!(early.create, ["home", "home"]);
    assert_eq!(early.why.map(|(word, _)| word), Some("NoRoom"));
    let late = run(&pool, &[], demand(), &mut Memory::default(), 141);
    assert_eq!(late.create, ["home", "home", "cloud", "cloud"]);
    // A placement whose nodes are full is passed over.
    let stuck = Runner { unschedulable: true, placement: "home".to_owned(), ..runner("a", Phase::Pending) };
    assert_eq!(run(&pool, &[stuck], demand(), &mut Memory::default(), 141).create, ["cloud", "cloud", "cloud"]);
}

#[test]
fn who_finds_no_room_moves_to_a_later_placement() {
    let pool = spec(json!({"placements": [{"name": "home"}, {"name": "cloud", "max": 2, "afterSeconds": 60}]}));
    let at_home =
        |name: &str| Runner { unschedulable: true, placement: "home".to_owned(), ..runner(name, Phase::Pending) };
    let all = ["a", "b", "c", "d"].map(at_home);
    let waits = |since: i64| Demand::Known { count: 4, oldest: Some(at(since)) };
    let early = run(&pool, &all, waits(80), &mut Memory::default(), 100);
    assert_eq!((early.create.len(), early.drain.len()), (0, 0), "the cloud isn't open yet");
    // One stays, to take the first room and to tell until then that there is none; the cloud takes two.
    let late = run(&pool, &all, waits(10), &mut Memory::default(), 100);
    assert_eq!((late.create, late.drain), (vec!["cloud".to_owned(); 2], vec!["b".to_owned(), "c".to_owned()]));
    // Not those that have only just been made, and not to a placement that is full itself.
    let fresh = all.clone().map(|runner| Runner { created: at(95), ..runner });
    assert_eq!(run(&pool, &fresh, waits(10), &mut Memory::default(), 100).drain, Vec::<String>::new());
    let there = Runner { placement: "cloud".to_owned(), ..at_home("e") };
    let full: Vec<Runner> = all.into_iter().chain([there]).collect();
    let five = Demand::Known { count: 5, oldest: Some(at(10)) };
    assert_eq!(run(&pool, &full, five, &mut Memory::default(), 100).drain, Vec::<String>::new());
}

#[test]
fn failures_slow_a_pool_down_and_are_told() {
    let pool = spec(json!({"scale": {"max": 10}}));
    let mut memory = Memory { failures: 3, failed: Some(at(100)), ..Memory::default() };
    let plan = run(&pool, &[], known(5), &mut memory, 110);
    assert!(plan.create.is_empty());
    assert_eq!(plan.why.map(|(word, _)| word), Some("BackOff"));
    assert_eq!(run(&pool, &[], known(5), &mut memory, 141).create.len(), 1, "one finds out");
}

#[test]
fn a_rollout_replaces_idle_runners_and_waits_for_jobs() {
    let pool = spec(json!({"scale": {"max": 10, "min": 3}, "rollout": {"maxSurge": 1}}));
    let before = [old("a", Phase::Idle), old("b", Phase::Busy), old("c", Phase::Idle)];
    let plan = once(&pool, &before, known(0));
    assert_eq!((plan.create.len(), plan.drain.len(), plan.rolled_out), (1, 0, false), "first a new one");
    let [a, b, c] = before;
    let plan = once(&pool, &[a, b, c, runner("d", Phase::Idle)], known(0));
    assert_eq!(plan.drain, ["a"], "then one old one goes");
    let paused = spec(json!({"scale": {"max": 10, "min": 3}, "rollout": {"maxSurge": 1, "paused": true}}));
    let plan = once(&paused, &[old("a", Phase::Idle), old("b", Phase::Idle), old("c", Phase::Idle)], known(0));
    assert!(plan.create.is_empty() && plan.drain.is_empty());
}

#[test]
fn a_rollout_of_something_broken_stops() {
    let pool = spec(json!({"scale": {"max": 10, "min": 2}}));
    let mut memory = Memory { failures: 3, failed: Some(at(0)), ..Memory::default() };
    let plan = run(&pool, &[old("a", Phase::Idle), old("b", Phase::Idle)], known(0), &mut memory, 1000);
    assert!(plan.halted.is_some() && plan.drain.is_empty() && plan.create.is_empty(), "{plan:?}");
}

#[test]
fn a_node_that_is_emptied_gives_back_its_idle_runners() {
    let pool = spec(json!({"scale": {"max": 10, "min": 2}}));
    let cordoned = |name, phase| Runner { cordoned: Some(at(0)), ..runner(name, phase) };
    let plan = once(&pool, &[cordoned("a", Phase::Idle), cordoned("b", Phase::Busy)], known(0));
    assert_eq!(plan.drain, ["a"]);
    // The other one has its time; after that it may be evicted.
    assert!(plan.release.is_empty());
    let late = run(&pool, &[cordoned("b", Phase::Busy)], known(0), &mut Memory::default(), 7201);
    assert_eq!((late.release, late.drain), (vec!["b".to_owned()], vec![]));
}

#[test]
fn a_runner_whose_token_is_gone_is_replaced_unless_it_has_a_job() {
    let pool = spec(json!({"scale": {"max": 3, "min": 2}}));
    let stale = |name, phase| Runner { stale: true, ..runner(name, phase) };
    let plan = once(&pool, &[stale("a", Phase::Idle), stale("b", Phase::Busy), stale("c", Phase::Starting)], known(0));
    assert_eq!((plan.drain, plan.create.len()), (vec!["a".to_owned(), "c".to_owned()], 0), "the most are there");
    let plan = once(&pool, &[stale("a", Phase::Idle), runner("b", Phase::Idle)], known(0));
    assert_eq!((plan.drain, plan.create.len()), (vec!["a".to_owned()], 1));
}

#[test]
fn an_overflow_returns_after_a_while() {
    let pool = spec(json!({"scale": {"max": 10}, "placements": [
        {"name": "here", "max": 1}, {"name": "cloud", "afterSeconds": 60, "returnSeconds": 100}]}));
    let waits = |since: i64| Demand::Known { count: 2, oldest: Some(at(since)) };
    let here = [Runner { placement: "here".to_owned(), ..runner("a", Phase::Busy) }];
    let mut memory = Memory::default();
    assert_eq!(run(&pool, &here, waits(0), &mut memory, 59).create, Vec::<String>::new());
    assert_eq!(run(&pool, &here, waits(0), &mut memory, 60).create, ["cloud", "cloud"]);
    // Others came: they need not wait as long again.
    assert_eq!(run(&pool, &here, waits(100), &mut memory, 110).create, ["cloud", "cloud"]);
    assert_eq!(run(&pool, &here, waits(150), &mut memory, 161).create, Vec::<String>::new(), "it is over");
    // What is too much goes where it is dearest.
    let both = [
        Runner { placement: "here".to_owned(), ..runner("a", Phase::Idle) },
        Runner { placement: "cloud".to_owned(), created: at(-50), ..runner("b", Phase::Idle) },
    ];
    let pool = spec(json!({"scale": {"max": 10, "idle": 1, "scaleDownSeconds": 0}, "placements": [
        {"name": "here", "max": 1}, {"name": "cloud", "afterSeconds": 60}]}));
    assert_eq!(once(&pool, &both, known(0)).drain, ["b"]);
}

#[test]
fn schedules_move_the_bounds() {
    let office = json!([{"cron": "0 8 * * *", "seconds": 3600, "min": 4, "max": 6, "idle": 1}]);
    let pool = spec(json!({"scale": {"max": 10, "schedules": office}}));
    let created =
        |hour: i64, jobs: u32| run(&pool, &[], known(jobs), &mut Memory::default(), hour * 3600 + 60).create.len();
    assert_eq!((created(7, 0), created(8, 0), created(9, 0)), (0, 4, 0));
    assert_eq!((created(7, 20), created(8, 20)), (10, 6));
    let pool = spec(json!({"scale": {"max": 10, "schedules": [{"cron": "soon or so", "seconds": 60, "min": 1}]}}));
    let plan = once(&pool, &[], known(1));
    assert_eq!(
        (plan.create.len(), plan.why.unwrap().0),
        (1, "ScheduleInvalid"),
        "what is wrong is told and hinders nothing"
    );
}

#[test]
fn utilization_leaves_some_without_a_job() {
    let pool = spec(json!({"scale": {"max": 100, "utilization": 80}}));
    let busy: Vec<Runner> = (0..8).map(|n| runner(&n.to_string(), Phase::Busy)).collect();
    assert_eq!(once(&pool, &busy, known(0)).wanted, 10);
    assert_eq!(once(&pool, &busy, known(1)).wanted, 12);
    assert_eq!(once(&pool, &[], known(0)).wanted, 0);
}

#[test]
fn a_wait_target_has_machines_ready_for_the_jobs_that_come() {
    let job_a_second = |memory: &mut Memory, pool: &RunnerPoolSpec| {
        let mut plan = Plan::default();
        for second in (0..=1800).step_by(5) {
            (0..5).for_each(|_| memory.estimate.began());
            memory.estimate.started(SignedDuration::from_secs(45));
            plan = run(pool, &[], known(0), memory, second);
        }
        plan.wanted
    };
    let pool = |scale: serde_json::Value| spec(json!({ "scale": scale }));
    let wanted = |scale: serde_json::Value| job_a_second(&mut Memory::default(), &pool(scale));
    assert_eq!(wanted(json!({"max": 1000})), 0, "without a target nothing is ahead");
    // 35 jobs come while a start takes longer than a job may wait.
    let tight = wanted(json!({"max": 1000, "queueWaitTargetSeconds": 10}));
    assert!((40..70).contains(&tight), "{tight}");
    assert_eq!(wanted(json!({"max": 1000, "queueWaitTargetSeconds": 60})), 0, "a machine is there in time");
    assert_eq!(wanted(json!({"max": 20, "queueWaitTargetSeconds": 10})), 20);
}

#[test]
fn old_machines_are_replaced_when_they_have_no_job() {
    let pool = |unavailable: u32| {
        let rollout = json!({"maxSurge": 1, "maxUnavailable": unavailable});
        spec(json!({"scale": {"min": 3, "max": 10}, "maxAgeSeconds": 3600, "rollout": rollout}))
    };
    let young = Runner { created: at(2500), ..runner("young", Phase::Idle) };
    let runners = [runner("idle", Phase::Idle), runner("busy", Phase::Busy), young];
    let plan = run(&pool(1), &runners, known(0), &mut Memory::default(), 5000);
    assert_eq!((plan.create.len(), plan.drain.as_slice()), (1, ["idle".to_owned()].as_slice()));
    assert!(plan.rolled_out, "age is no rollout");
    assert_eq!(run(&pool(1), &runners, known(0), &mut Memory::default(), 3000).drain, Vec::<String>::new());
    let plan = run(&pool(0), &runners, known(0), &mut Memory::default(), 5000);
    assert_eq!((plan.create.len(), plan.drain.len()), (1, 0), "the new one comes first");
    let busy = spec(json!({"scale": {"max": 10}, "maxAgeSeconds": 3600}));
    let plan = run(&busy, &[runner("busy", Phase::Busy)], known(0), &mut Memory::default(), 5000);
    assert_eq!(plan, Plan { wanted: 1, rolled_out: true, ..Plan::default() }, "one with a job has no successor yet");
    let mut failing = Memory { failures: 3, failed: Some(at(0)), ..Memory::default() };
    assert_eq!(run(&pool(1), &runners, known(0), &mut failing, 5000).drain, Vec::<String>::new());
}

fn any_runner() -> impl Strategy<Value = (Phase, bool, bool, bool)> {
    let phases = vec![
        Phase::Pending,
        Phase::Starting,
        Phase::Provisioning,
        Phase::Idle,
        Phase::Busy,
        Phase::Gone,
        Phase::Failed,
    ];
    (proptest::sample::select(phases), any::<bool>(), proptest::bool::weighted(0.2), proptest::bool::weighted(0.2))
}

proptest! {
    #[test]
    fn no_plan_touches_a_job_or_leaves_the_bounds(
        all in proptest::collection::vec(any_runner(), 0..14), count in 0..30u32, min in 0..4u32, max in 0..12u32,
        unknown: bool, failures in 0..6u32, surge in 0..3u32, unavailable in 0..3u32, share in proptest::option::of(0..12u32),
    ) {
        let pool = spec(json!({
            "scale": {"min": min, "max": max, "scaleDownSeconds": 0},
            "rollout": {"maxSurge": surge, "maxUnavailable": unavailable},
        }));
        let runners: Vec<Runner> = all.iter().enumerate().map(|(n, (phase, new, draining, cordoned))| Runner {
            template: if *new { "new" } else { "old" }.to_owned(),
            draining: draining.then(|| at(99)),
            stale: false,
            cordoned: cordoned.then(|| at(0)),
            ..runner(&format!("r{n}"), *phase)
        }).collect();
        let mut memory = Memory { failures, failed: Some(at(0)), ..Memory::default() };
        let demand = if unknown { Demand::Unknown("x".to_owned()) } else { known(count) };
        let plan = plan(&pool, &Observed { runners: &runners, demand, template: "new", share }, &mut memory, at(10_000));
        let find = |name: &String| runners.iter().find(|r| r.name == *name).unwrap();
        for name in &plan.drain {
            prop_assert!(find(name).phase != Phase::Busy, "a job would be ended by choice");
            prop_assert!(find(name).draining.is_none() && !find(name).phase.is_over());
            prop_assert_eq!(plan.drain.iter().filter(|other| *other == name).count(), 1);
        }
        for name in &plan.remove {
            let runner = find(name);
            prop_assert!(runner.phase.is_over() || runner.draining.is_some(), "removed without a reason");
        }
        let alive = runners.iter().filter(|r| !r.phase.is_over()).count();
        prop_assert!(plan.create.is_empty() || alive + plan.create.len() <= (max.max(min.min(max)) + surge) as usize);
    }

    #[test]
    fn a_pool_comes_to_rest(count in 0..8u32, idle in 0..3u32, start in 0..8usize) {
        let pool = spec(json!({"scale": {"max": 10, "idle": idle, "scaleDownSeconds": 0}}));
        let mut runners: Vec<Runner> = (0..start).map(|n| old(&format!("s{n}"), Phase::Idle)).collect();
        let mut memory = Memory::default();
        for turn in 0..60 {
            let plan = run(&pool, &runners, known(count), &mut memory, turn);
            if plan.create.is_empty() && plan.drain.is_empty() && plan.remove.is_empty() {
                prop_assert!(plan.rolled_out, "at rest with old runners");
                prop_assert_eq!(u32_of(runners.len()), (count + idle).min(10));
                return Ok(());
            }
            runners.retain(|r| !plan.drain.contains(&r.name) && !plan.remove.contains(&r.name));
            for n in 0..plan.create.len() {
                runners.push(runner(&format!("n{turn}-{n}"), Phase::Idle));
            }
        }
        prop_assert!(false, "it never comes to rest");
    }
}
