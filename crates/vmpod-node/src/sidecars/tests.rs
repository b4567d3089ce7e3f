use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::docker::LifeEnd;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).unwrap()
}

/// Two init containers with a native between them, the machine, and one plain container.
fn pod(policy: &str) -> Pod {
    let container = |name: &str| json!({"name": name, "image": format!("{name}:1")});
    let mut native = container("native");
    native["restartPolicy"] = "Always".into();
    serde_json::from_value(json!({
        "metadata": {"name": "p", "namespace": "ns", "uid": "u"},
        "spec": {
            "restartPolicy": policy,
            "terminationGracePeriodSeconds": 30,
            "initContainers": [container("first"), native, container("second")],
            "containers": [container("vm"), container("side")]}}))
    .unwrap()
}

fn life(attempt: u32, state: LifeState) -> Life {
    Life {
        id: format!("id-{attempt}"),
        attempt,
        image: "i:1".to_owned(),
        image_id: "sha256:0".to_owned(),
        stop_signal: None,
        state,
    }
}

fn running() -> LifeState {
    LifeState::Running(at(1))
}

fn ended(code: i32) -> LifeState {
    LifeState::Ended(LifeEnd { code, oom: false, started: Some(at(1)), finished: at(5), why: None })
}

fn seen(lives: &[(&str, LifeState)]) -> Seen {
    let mut seen = Seen { sandbox: true, held: true, ..Seen::default() };
    for (name, state) in lives {
        seen.lives.insert((*name).to_owned(), vec![life(0, state.clone())]);
        if matches!(state, LifeState::Running(_)) {
            seen.health.insert((*name).to_owned(), Health { started: true, ready: true, failed: None });
        }
    }
    seen
}

fn acts(pod: &Pod, wish: &Wish, seen: &Seen) -> Vec<String> {
    let plan = plan(pod, wish, seen, at(10));
    plan.acts.iter().map(short).collect()
}

fn short(act: &Act) -> String {
    match act {
        Act::Sandbox => "sandbox".to_owned(),
        Act::Run { name, attempt } => format!("run {name} {attempt}"),
        Act::Stop { name, deadline, .. } => format!("stop {name} in {}", deadline.duration_since(at(10)).as_secs()),
        Act::Clear { id } => format!("clear {id}"),
        Act::Leave => "leave".to_owned(),
    }
}

fn wish(machine: MachineWord) -> Wish {
    Wish { machine, ..Wish::default() }
}

/// What there is, and what is done about it.
type Step<'a> = (&'a [(&'a str, LifeState)], &'a [&'a str]);

#[test]
fn the_way_up_is_in_order() {
    let pod = pod("Always");
    let begin = wish(MachineWord::Unbegun);
    let steps: [Step<'_>; 7] = [
        (&[], &["run first 0"]),
        (&[("first", LifeState::Created)], &["run first 0"]),
        (&[("first", running())], &[]),
        (&[("first", ended(0))], &["run native 0"]),
        (&[("first", ended(0)), ("native", running())], &["run second 0"]),
        (&[("first", ended(0)), ("native", running()), ("second", running())], &[]),
        (&[("first", ended(0)), ("native", running()), ("second", ended(0))], &["run side 0"]),
    ];
    for (lives, want) in steps {
        assert_eq!(acts(&pod, &begin, &seen(lives)), want, "{lives:?}");
        let initialized = view(&pod, &begin, &seen(lives), at(10)).company.initialized;
        assert_eq!(initialized, want == ["run side 0"], "{lives:?}");
    }
    assert_eq!(acts(&pod, &begin, &Seen::default()), ["sandbox"]);
    // A native that its startup probe hasn't passed yet holds up what comes after it.
    let mut unstarted = seen(&[("first", ended(0)), ("native", running())]);
    unstarted.health.get_mut("native").unwrap().started = false;
    assert_eq!(acts(&pod, &begin, &unstarted), [""; 0]);
    // Once the machine has begun, no init container is missed any more, and the others are kept alive.
    assert_eq!(acts(&pod, &wish(MachineWord::Lives), &seen(&[])), ["run native 0", "run side 0"]);
}

#[test]
fn what_configures_the_guest_starts_when_that_answers() {
    let mut pod = pod("Never");
    pod.metadata.annotations = Some([("vmpod.dev/after-machine".to_owned(), "other, side".to_owned())].into());
    let lives = |more: &[(&str, LifeState)]| seen(&[&[("native", running())], more].concat());
    let told = |wish: &Wish, seen: &Seen| view(&pod, wish, seen, at(10));
    let waits = wish(MachineWord::Lives);
    assert_eq!(acts(&pod, &waits, &lives(&[])), [""; 0]);
    let shown = told(&waits, &lives(&[])).plain.remove(0).state.unwrap().waiting.unwrap();
    assert_eq!(shown.reason.as_deref(), Some("WaitingForMachine"));
    let answers = Wish { answers: true, ..waits.clone() };
    assert_eq!(acts(&pod, &answers, &lives(&[])), ["run side 0"]);
    // What has begun is the machine's no more: a guest that is silent for a while doesn't end it, nor hide how it ended.
    assert_eq!(acts(&pod, &waits, &lives(&[("side", LifeState::Created)])), ["run side 0"]);
    assert_eq!(told(&waits, &lives(&[("side", ended(0))])).company.over, Some(true));
    // A machine that ends before it ever answered leaves nothing to wait for.
    let over = wish(MachineWord::Over);
    assert_eq!(told(&over, &lives(&[])).company.over, Some(false));
    assert_eq!(acts(&pod, &over, &lives(&[])), ["stop native in 30"]);
}

#[test]
fn what_ended_runs_again_as_the_policy_says() {
    let lives = |side: i32| seen(&[("native", running()), ("side", ended(side))]);
    for (policy, code, again) in
        [("Always", 0, true), ("OnFailure", 0, false), ("OnFailure", 3, true), ("Never", 3, false)]
    {
        let want: &[&str] = if again { &["run side 1"] } else { &[] };
        assert_eq!(acts(&pod(policy), &wish(MachineWord::Lives), &lives(code)), want, "{policy} {code}");
        let over = view(&pod(policy), &wish(MachineWord::Lives), &lives(code), at(10)).company.over;
        assert_eq!(over, (!again).then_some(code == 0), "{policy} {code}");
    }
    // Not before its time, and then again.
    let mut waits = lives(3);
    waits.backoff.entry("side".to_owned()).or_default().fail(at(5), at(1));
    let next = plan(&pod("Always"), &wish(MachineWord::Lives), &waits, at(10));
    assert_eq!((next.acts.as_slice(), next.wake), (&[][..], Some(at(15))));
    let status = &view(&pod("Always"), &wish(MachineWord::Lives), &waits, at(10)).plain[0];
    let waiting = status.state.as_ref().unwrap().waiting.as_ref().unwrap();
    assert_eq!(waiting.reason.as_deref(), Some("CrashLoopBackOff"));
    let message = "back-off 10s restarting failed container=side pod=p_ns(u)";
    assert_eq!(waiting.message.as_deref(), Some(message));
    assert!(status.last_state.as_ref().unwrap().terminated.is_some());
    // What couldn't be made waits for its next try.
    let mut troubled = seen(&[("native", running())]);
    let trouble = Trouble { reason: "ErrImagePull".to_owned(), message: "no".to_owned(), retry: at(40) };
    troubled.trouble.insert("side".to_owned(), trouble);
    let next = plan(&pod("Always"), &wish(MachineWord::Lives), &troubled, at(10));
    assert_eq!((next.acts.as_slice(), next.wake), (&[][..], Some(at(40))));
}

#[test]
fn an_init_container_that_fails_for_good_dooms_the_pod() {
    let failed = seen(&[("first", ended(0)), ("native", running()), ("second", ended(1))]);
    let begin = wish(MachineWord::Unbegun);
    assert!(view(&pod("Never"), &begin, &failed, at(10)).company.doomed);
    assert_eq!(acts(&pod("Never"), &begin, &failed), ["stop native in 30"]);
    // Not one whose machine has begun: its init containers are past.
    assert!(!view(&pod("Never"), &wish(MachineWord::Lives), &failed, at(10)).company.doomed);
    assert!(!view(&pod("OnFailure"), &begin, &failed, at(10)).company.doomed);
    assert_eq!(acts(&pod("OnFailure"), &begin, &failed), ["run second 1"]);
}

#[test]
fn natives_outlive_the_others() {
    let pod = pod("Never");
    let all = seen(&[("first", ended(0)), ("native", running()), ("side", running())]);
    let stop = |machine| Wish { machine, stop: Some(at(15)), ..Wish::default() };
    assert_eq!(acts(&pod, &stop(MachineWord::Lives), &all), ["stop side in 5"]);
    let alone = seen(&[("native", running()), ("side", ended(143))]);
    assert_eq!(acts(&pod, &stop(MachineWord::Lives), &alone), [""; 0], "the machine still runs");
    assert_eq!(acts(&pod, &stop(MachineWord::Over), &alone), ["stop native in 5"]);
    // Without a stop as well: a job is over when its machine and its plain containers are.
    let done = seen(&[("native", running()), ("side", ended(0))]);
    assert_eq!(acts(&pod, &wish(MachineWord::Over), &done), ["stop native in 30"]);
    let quiet = seen(&[("native", ended(143)), ("side", ended(0))]);
    let company = view(&pod, &wish(MachineWord::Over), &quiet, at(10)).company;
    assert_eq!((company.quiet, company.over), (true, Some(true)));
    // The verdict is there: the network goes, the logs stay.
    let over = Wish { over: true, ..wish(MachineWord::Over) };
    assert_eq!(acts(&pod, &over, &quiet), ["leave"]);
    assert_eq!(acts(&pod, &over, &Seen { sandbox: false, held: false, ..quiet }), [""; 0]);
}

#[test]
fn one_is_stopped_once_and_again_only_for_less_time() {
    let pod = pod("Never");
    let stop = |second| Wish { machine: MachineWord::Over, stop: Some(at(second)), ..Wish::default() };
    let mut all = seen(&[("side", running())]);
    all.stopping.insert("side".to_owned(), at(40));
    assert_eq!(acts(&pod, &stop(40), &all), [""; 0]);
    assert_eq!(acts(&pod, &stop(15), &all), ["stop side in 5"]);
    // A failed probe has a grace of its own.
    let mut unwell = seen(&[("native", running()), ("side", running())]);
    let failed = Failed { what: "liveness probe".to_owned(), grace: Some(SignedDuration::from_secs(3)) };
    unwell.health.get_mut("side").unwrap().failed = Some(failed);
    assert_eq!(acts(&pod, &wish(MachineWord::Lives), &unwell), ["stop side in 3"]);
    unwell.stopping.insert("side".to_owned(), at(12));
    assert_eq!(acts(&pod, &wish(MachineWord::Lives), &unwell), [""; 0]);
}

#[test]
fn who_runs_in_a_network_that_is_gone_is_ended_first() {
    let lost = Seen { held: false, ..seen(&[("native", running()), ("side", running())]) };
    assert_eq!(acts(&pod("Always"), &wish(MachineWord::Lives), &lost), ["stop native in 30", "stop side in 30"]);
    let over = Seen { held: false, ..seen(&[("native", ended(143)), ("side", ended(143))]) };
    assert_eq!(acts(&pod("Always"), &wish(MachineWord::Lives), &over), ["sandbox"]);
}

#[test]
fn statuses_are_the_kubelets() {
    let mut all = seen(&[("first", ended(0)), ("native", running()), ("second", running())]);
    all.lives.insert("side".to_owned(), vec![life(3, ended(1)), life(4, running())]);
    let oom = LifeEnd { code: 137, oom: true, started: Some(at(1)), finished: at(5), why: None };
    all.lives.get_mut("side").unwrap()[0].state = LifeState::Ended(oom);
    let shown = view(&pod("Always"), &wish(MachineWord::Lives), &all, at(10));
    let [first, native, second] = &shown.init[..] else { panic!("{:?}", shown.init) };
    assert!(first.ready && first.state.as_ref().unwrap().terminated.is_some());
    assert!(native.ready && native.started == Some(true));
    assert!(!second.ready, "an init container is ready when it has succeeded");
    let side = &shown.plain[0];
    assert_eq!((side.restart_count, side.container_id.as_deref()), (4, Some("docker://id-4")));
    assert!(!side.ready, "nobody has looked at its health yet");
    let last = side.last_state.as_ref().unwrap().terminated.as_ref().unwrap();
    assert_eq!((last.reason.as_deref(), last.exit_code), (Some("OOMKilled"), 137));
    let early = view(&pod("Always"), &wish(MachineWord::Unbegun), &seen(&[("first", running())]), at(10));
    let reason = |status: &ContainerStatus| status.state.clone().unwrap().waiting.unwrap().reason.unwrap();
    assert_eq!([reason(&early.init[1]), reason(&early.plain[0])], ["PodInitializing", "PodInitializing"]);
}

#[test]
fn lives_that_nobody_can_ask_for_go() {
    let mut all = seen(&[("native", running())]);
    all.lives.insert("side".to_owned(), vec![life(1, ended(1)), life(2, ended(1)), life(3, running())]);
    assert_eq!(acts(&pod("Always"), &wish(MachineWord::Lives), &all), ["clear id-1"]);
}

/// A world in which containers start, end and are killed at random, as the engine would tell of it.
#[derive(Clone, Debug)]
enum Happens {
    /// What was asked for is done.
    Done,
    /// A container ends by itself.
    Ends(usize, i32),
    /// The machine begins, or is over.
    Machine(MachineWord),
    Stop,
    /// The agent comes back and knows only what the engine tells.
    Forget,
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        6 => Just(Happens::Done),
        3 => (0..4_usize, prop_oneof![Just(0), Just(1)]).prop_map(|(who, code)| Happens::Ends(who, code)),
        1 => prop_oneof![Just(MachineWord::Lives), Just(MachineWord::Over)].prop_map(Happens::Machine),
        1 => Just(Happens::Stop),
        1 => Just(Happens::Forget),
    ]
}

proptest! {
    #[test]
    fn any_history_keeps_the_order(
        policy in prop_oneof![Just("Always"), Just("OnFailure"), Just("Never")],
        history in proptest::collection::vec(happens(), 1..60),
    ) {
        let pod = pod(policy);
        let names = ["first", "native", "second", "side"];
        let mut seen = Seen::default();
        let mut wish = Wish::default();
        let mut now = at(0);
        let mut stopped = false;
        for event in history {
            now = now.saturating_add(SignedDuration::from_secs(400)).unwrap();
            match event {
                Happens::Done => {
                    for act in plan(&pod, &wish, &seen, now).acts {
                        match act {
                            Act::Sandbox => (seen.sandbox, seen.held) = (true, true),
                            Act::Leave => (seen.sandbox, seen.held) = (false, false),
                            Act::Run { name, attempt } => {
                                prop_assert!(wish.stop.is_none() && !wish.over, "{name} runs though the pod stops");
                                prop_assert!(!seen.runs(&name), "{name} runs twice");
                                let lives = seen.lives.entry(name.clone()).or_default();
                                let known = lives.last().map_or(0, |life| life.attempt + 1);
                                prop_assert_eq!(attempt, known, "{} counts its attempts", name);
                                if name == "side" {
                                    prop_assert!(view(&pod, &wish, &seen, now).company.initialized);
                                }
                                let lives = seen.lives.entry(name.clone()).or_default();
                                lives.push(Life { id: format!("{name}-{attempt}"), ..life(attempt, LifeState::Running(now)) });
                                seen.health.insert(name, Health { started: true, ready: true, failed: None });
                            }
                            Act::Stop { name, .. } => {
                                if name == "native" {
                                    let others = ["first", "second", "side"].iter().any(|other| seen.runs(other));
                                    prop_assert!(!others || !seen.held, "a native goes last");
                                }
                                let end = LifeEnd { code: 143, oom: false, started: None, finished: now, why: None };
                                seen.lives.get_mut(&name).unwrap().last_mut().unwrap().state = LifeState::Ended(end);
                            }
                            Act::Clear { id } => {
                                for lives in seen.lives.values_mut() {
                                    prop_assert!(lives.last().is_none_or(|life| life.id != id || lives.len() > 2));
                                    let at = lives.iter().position(|life| life.id == id && lives.len() > 2);
                                    at.map(|at| lives.remove(at));
                                }
                            }
                        }
                    }
                }
                Happens::Ends(who, code) if seen.runs(names[who]) => {
                    let end = LifeEnd { code, oom: false, started: Some(now), finished: now, why: None };
                    seen.lives.get_mut(names[who]).unwrap().last_mut().unwrap().state = LifeState::Ended(end);
                }
                Happens::Ends(..) => {}
                Happens::Machine(word) => {
                    let ready = view(&pod, &wish, &seen, now).company.initialized;
                    if (ready || wish.machine != MachineWord::Unbegun) && wish.machine != MachineWord::Over {
                        wish.machine = word;
                    }
                }
                Happens::Stop => {
                    stopped = true;
                    wish.stop.get_or_insert(now);
                    wish.machine = if wish.machine == MachineWord::Lives { MachineWord::Lives } else { MachineWord::Over };
                }
                Happens::Forget => {
                    seen.backoff.clear();
                    seen.trouble.clear();
                    seen.stopping.clear();
                }
            }
        }
        // However it went, a pod that is to stop comes to rest.
        if stopped {
            wish.machine = MachineWord::Over;
            for _ in 0..8 {
                for act in plan(&pod, &wish, &seen, now).acts {
                    if let Act::Stop { name, .. } = act {
                        let end = LifeEnd { code: 143, oom: false, started: None, finished: now, why: None };
                        seen.lives.get_mut(&name).unwrap().last_mut().unwrap().state = LifeState::Ended(end);
                    }
                }
            }
            let company = view(&pod, &wish, &seen, now).company;
            prop_assert!(company.quiet && company.over.is_some());
        }
    }
}
