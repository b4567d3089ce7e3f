use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::{pod::PodUid, record::ImageChoice};

const NOW: i64 = 1_000_000;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(NOW + second).unwrap()
}

fn pod(policy: &str, command: bool) -> Pod {
    let mut container = json!({"name": "vm", "image": "tiny"});
    if command {
        container["args"] = json!(["run"]);
    }
    serde_json::from_value(
        json!({"metadata": {"name": "p"}, "spec": {"restartPolicy": policy, "containers": [container]}}),
    )
    .unwrap()
}

fn with_hooks(mut pod: Pod) -> Pod {
    let hook = json!({"exec": {"command": ["true"]}});
    let lifecycle = serde_json::from_value(json!({"postStart": hook, "preStop": hook})).unwrap();
    pod.spec.as_mut().unwrap().containers[0].lifecycle = Some(lifecycle);
    pod
}

fn deleted(mut pod: Pod, grace: i64) -> Pod {
    pod.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(0)));
    pod.metadata.deletion_grace_period_seconds = Some(grace);
    pod
}

fn shown(mut pod: Pod, phase: &str) -> Pod {
    pod.status.get_or_insert_default().phase = Some(phase.to_owned());
    pod
}

fn accepted() -> Record {
    Record::new(PodUid::parse("u").unwrap(), "default", "p", at(0))
}

fn begun() -> Record {
    let mut record = accepted();
    record.attempt = Some(Attempt {
        number: 0,
        image: ImageChoice { name: "tiny".to_owned(), digest: "sha256:0".to_owned() },
        started: None,
        main: Main::Unstarted,
        ended: None,
        boots: false,
        hooked: false,
        unwell: None,
    });
    record
}

fn started(main: Main) -> Record {
    let mut record = begun();
    let attempt = record.attempt.as_mut().unwrap();
    attempt.started = Some(at(1));
    attempt.main = main;
    record
}

fn over_with(code: i32) -> Record {
    let mut record = started(Main::Unstarted);
    let attempt = record.attempt.as_mut().unwrap();
    let end = ended(&accepted(), &attempt.clone(), code, if code == 0 { "Completed" } else { "Error" }, None, at(10));
    attempt.ended = Some(end);
    record.backoff.fail(at(10), at(1));
    record
}

fn seen(machine: MachineSeen) -> Observed {
    Observed { machine, ..Observed::default() }
}

fn exit(cause: ExitCause) -> MachineSeen {
    MachineSeen::Stopped(Exit { cause, at: at(5), detail: None })
}

mod eviction;

const NOTHING: Desired<'_> = Desired { pod: None, agent_stops: None, evicted: None };

fn stop(why: StopReason, deadline: Timestamp) -> Stop {
    Stop { why, deadline, message: None }
}

fn next(pod: &Pod, record: Option<&Record>, seen: &Observed, now: i64) -> Plan {
    plan(Desired { pod: Some(pod), ..NOTHING }, record, seen, at(now))
}

fn step(pod: &Pod, record: &Record, seen: &Observed) -> Option<Step> {
    next(pod, Some(record), seen, 20).steps.into_iter().next()
}

#[test]
fn the_way_up_goes_one_step_at_a_time() {
    let vm = pod("Always", false);
    assert_eq!(next(&vm, None, &Observed::default(), 0).steps, [Step::Accept]);
    assert_eq!(step(&vm, &accepted(), &Observed::default()), Some(Step::Run(Job::Resolve)));
    assert_eq!(step(&vm, &accepted(), &Observed { resolved: Resolved::Yes, ..Observed::default() }), Some(Step::Begin));
    assert_eq!(step(&vm, &begun(), &seen(MachineSeen::Absent)), Some(Step::Run(Job::Prepare)));
    assert_eq!(step(&vm, &begun(), &seen(MachineSeen::Unfinished)), Some(Step::Run(Job::Remove)));
    assert_eq!(step(&vm, &begun(), &seen(MachineSeen::Prepared)), Some(Step::Run(Job::Start)));
    assert_eq!(step(&vm, &begun(), &seen(MachineSeen::Booting)), None);
    assert_eq!(step(&vm, &begun(), &seen(MachineSeen::Live)), Some(Step::NoteStarted));
    assert_eq!(step(&vm, &started(Main::Unstarted), &seen(MachineSeen::Live)), None);
    // With a command there is more to do, once the guest answers.
    let job = pod("Always", true);
    let ready = Observed { guest_ready: true, ..seen(MachineSeen::Live) };
    assert_eq!(step(&job, &started(Main::Unstarted), &seen(MachineSeen::Live)), None);
    assert_eq!(step(&job, &started(Main::Unstarted), &ready), Some(Step::AskMain));
    assert_eq!(step(&job, &started(Main::Asked), &ready), Some(Step::Run(Job::StartMain)));
    assert_eq!(step(&job, &started(Main::Started(at(2))), &ready), None);
}

#[test]
fn the_end_of_a_main_process_ends_its_machine_once_its_output_is_here() {
    let job = pod("Never", true);
    let record = started(Main::Ended { code: Some(3), started: Some(at(2)), at: at(15), why: None });
    let live = seen(MachineSeen::Live);
    let waits = next(&job, Some(&record), &live, 20);
    assert_eq!((waits.steps, waits.wake), (Vec::new(), Some(at(30))));
    assert_eq!(step(&job, &record, &Observed { drained: true, ..live.clone() }), Some(Step::Kill));
    assert_eq!(next(&job, Some(&record), &live, 30).steps, [Step::Kill], "output that never comes isn't waited for");
    let gone = Observed { drained: true, ..exit_seen(ExitCause::Killed) };
    let Some(Step::End { ended, terminal: Some(terminal) }) = step(&job, &record, &gone) else { panic!() };
    assert_eq!((ended.exit_code, ended.reason.as_str(), terminal.succeeded), (3, "Error", false));
    assert_eq!((ended.started, ended.finished), (Some(at(2)), at(15)));
}

fn exit_seen(cause: ExitCause) -> Observed {
    seen(exit(cause))
}

#[test]
fn a_machine_that_ended_is_judged_by_its_cause() {
    for (policy, command, cause, code, reason, terminal) in [
        ("Never", false, ExitCause::GuestShutdown, 0, "Completed", Some(true)),
        ("OnFailure", false, ExitCause::GuestShutdown, 0, "Completed", Some(true)),
        ("Always", false, ExitCause::GuestShutdown, 0, "Completed", None),
        ("Never", false, ExitCause::GuestPanic, 1, "Error", Some(false)),
        ("OnFailure", false, ExitCause::GuestPanic, 1, "Error", None),
        ("Never", false, ExitCause::HypervisorFailed, 1, "Error", Some(false)),
        ("Never", false, ExitCause::Killed, 137, "Error", Some(false)),
        ("Never", false, ExitCause::Unseen, 137, "ContainerStatusUnknown", Some(false)),
        // The exit code went with the guest.
        ("Never", true, ExitCause::GuestShutdown, 137, "ContainerStatusUnknown", Some(false)),
    ] {
        let record = started(if command { Main::Started(at(2)) } else { Main::Unstarted });
        let observed = Observed { drained: true, ..exit_seen(cause) };
        let Some(Step::End { ended, terminal: got }) = step(&pod(policy, command), &record, &observed) else {
            panic!()
        };
        assert_eq!(
            (ended.exit_code, ended.reason.as_str(), got.map(|t| t.succeeded)),
            (code, reason, terminal),
            "{policy} {cause:?}"
        );
        let early = Observed { drained: false, ..observed };
        let waits = next(&pod(policy, command), Some(&record), &early, 19);
        assert_eq!(waits.steps, [], "its last words come first");
    }
}

#[test]
fn what_was_running_and_is_gone_is_unknown() {
    for machine in [MachineSeen::Absent, MachineSeen::Prepared, MachineSeen::Unfinished] {
        let Some(Step::End { ended, .. }) = step(&pod("Always", false), &started(Main::Unstarted), &seen(machine))
        else {
            panic!()
        };
        assert_eq!((ended.exit_code, ended.reason.as_str()), (137, "ContainerStatusUnknown"));
    }
    // One that may run and doesn't answer is removed before anything is said of its end.
    let broken = seen(MachineSeen::Broken("no answer".to_owned()));
    assert_eq!(step(&pod("Never", false), &begun(), &broken), Some(Step::NoteStarted));
    assert_eq!(step(&pod("Never", false), &started(Main::Unstarted), &broken), Some(Step::Run(Job::Remove)));
}

#[test]
fn restarts_follow_the_policy_and_wait_their_turn() {
    let clean = seen(MachineSeen::Absent);
    for (policy, code, again) in [
        ("Always", 0, true),
        ("Always", 1, true),
        ("OnFailure", 0, false),
        ("OnFailure", 1, true),
        ("Never", 0, false),
        ("Never", 1, false),
    ] {
        let record = over_with(code);
        let early = next(&pod(policy, false), Some(&record), &clean, 15);
        let late = next(&pod(policy, false), Some(&record), &clean, 21);
        if again {
            assert_eq!((early.steps.len(), early.wake), (0, Some(at(20))), "{policy} {code}");
            assert_eq!(late.steps, [Step::Run(Job::Resolve)]);
        } else {
            assert!(
                matches!(&early.steps[..], [Step::Conclude(terminal)] if terminal.succeeded == (code == 0)),
                "{policy} {code}"
            );
        }
        // The old machine's files go before anything else.
        assert_eq!(step(&pod(policy, false), &record, &exit_seen(ExitCause::Killed)), Some(Step::Run(Job::Remove)));
    }
}

#[test]
fn deletion_asks_waits_and_kills() {
    let record = started(Main::Unstarted);
    let vm = deleted(pod("Always", false), 30);
    let live = seen(MachineSeen::Live);
    let noted = stop(StopReason::Deleted, at(50));
    assert_eq!(step(&vm, &record, &live), Some(Step::NoteStop(noted.clone())));
    let record = Record { stop: Some(noted), ..record };
    assert_eq!(step(&vm, &record, &live), Some(Step::PowerDown { deadline: at(50) }));
    let asked = Observed { stopping: true, ..live };
    let waits = next(&vm, Some(&record), &asked, 20);
    assert_eq!((waits.steps.len(), waits.wake), (0, Some(at(50))));
    assert_eq!(next(&vm, Some(&record), &asked, 50).steps, [Step::Kill]);
    assert_eq!(next(&vm, Some(&record), &Observed { killing: true, ..asked }, 51).steps, []);
    let Some(Step::End { ended, terminal: Some(terminal) }) =
        step(&vm, &record, &Observed { drained: true, ..exit_seen(ExitCause::GuestShutdown) })
    else {
        panic!()
    };
    assert_eq!((ended.exit_code, terminal.succeeded), (0, true), "even one that would always restart is over");
}

#[test]
fn a_second_deletion_can_only_hurry() {
    let live = Observed { stopping: true, ..seen(MachineSeen::Live) };
    let record = Record { stop: Some(stop(StopReason::Deleted, at(50))), ..started(Main::Unstarted) };
    assert_eq!(step(&deleted(pod("Always", false), 300), &record, &live), None);
    assert_eq!(
        step(&deleted(pod("Always", false), 1), &record, &live),
        Some(Step::NoteStop(stop(StopReason::Deleted, at(21))))
    );
}

#[test]
fn a_main_process_is_signalled() {
    let job = deleted(pod("Always", true), 30);
    let with = |main| Record { stop: Some(stop(StopReason::Deleted, at(50))), ..started(main) };
    let ready = Observed { guest_ready: true, ..seen(MachineSeen::Live) };
    assert_eq!(step(&job, &with(Main::Started(at(2))), &ready), Some(Step::SignalMain));
    assert_eq!(step(&job, &with(Main::Unstarted), &ready), Some(Step::Kill), "nothing has begun");
    assert_eq!(
        step(&job, &with(Main::Started(at(2))), &seen(MachineSeen::Live)),
        None,
        "a guest that doesn't answer gets its grace"
    );
    assert_eq!(step(&job, &with(Main::Asked), &ready), None);
}

#[test]
fn the_object_is_deleted_only_after_the_verdict_is_shown() {
    let mut record = over_with(0);
    record.terminal = Some(Terminal { succeeded: true, reason: None, message: None, shown_before: false });
    let clean = seen(MachineSeen::Absent);
    let vm = deleted(pod("Never", false), 30);
    assert_eq!(step(&vm, &record, &clean), None, "the status hasn't arrived yet");
    assert_eq!(step(&shown(vm.clone(), "Running"), &record, &clean), None);
    assert_eq!(
        step(&shown(vm.clone(), "Succeeded"), &record, &exit_seen(ExitCause::Killed)),
        Some(Step::Run(Job::Remove))
    );
    assert_eq!(step(&shown(vm.clone(), "Succeeded"), &record, &clean), Some(Step::Run(Job::Delete)));
    assert_eq!(step(&shown(vm, "Succeeded"), &record, &Observed { deleted: true, ..clean.clone() }), None);
    assert_eq!(step(&shown(pod("Never", false), "Succeeded"), &record, &clean), None, "nobody deleted it");
}

#[test]
fn a_pod_that_vanished_leaves_nothing() {
    let gone = |seen: &Observed| plan(NOTHING, Some(&started(Main::Unstarted)), seen, at(0)).steps;
    assert_eq!(gone(&seen(MachineSeen::Live)), [Step::Run(Job::Remove)]);
    assert_eq!(
        gone(&Observed { job: Some(Job::Prepare), ..seen(MachineSeen::Absent) }),
        [],
        "what is being made is waited for"
    );
    assert_eq!(gone(&seen(MachineSeen::Absent)), [Step::Forget]);
}

#[test]
fn a_stop_by_the_agent_is_no_verdict_on_pods_that_restart() {
    for (policy, terminal) in [("Always", None), ("OnFailure", None), ("Never", Some(false))] {
        let record = Record { stop: Some(stop(StopReason::Agent, at(30))), ..started(Main::Unstarted) };
        let Some(Step::End { terminal: got, .. }) =
            step(&pod(policy, false), &record, &Observed { drained: true, ..exit_seen(ExitCause::Killed) })
        else {
            panic!()
        };
        assert_eq!(got.map(|t| t.succeeded), terminal, "{policy}");
    }
}

#[test]
fn a_deadline_ends_the_pod() {
    let mut vm = pod("Always", false);
    vm.spec.as_mut().unwrap().active_deadline_seconds = Some(15);
    let live = seen(MachineSeen::Live);
    assert_eq!(next(&vm, Some(&started(Main::Unstarted)), &live, 10).wake, Some(at(15)));
    let Some(Step::NoteStop(stop)) = step(&vm, &started(Main::Unstarted), &live) else { panic!() };
    assert_eq!(stop.why, StopReason::Deadline);
    let record = Record { stop: Some(stop), ..started(Main::Unstarted) };
    let observed = Observed { drained: true, ..exit_seen(ExitCause::GuestShutdown) };
    let Some(Step::End { terminal: Some(terminal), .. }) = step(&vm, &record, &observed) else { panic!() };
    assert_eq!((terminal.succeeded, terminal.reason.as_deref()), (false, Some("DeadlineExceeded")));
}

#[test]
fn failures_are_tried_again_at_their_time() {
    let trouble =
        Trouble { job: Job::Resolve, reason: "ErrImagePull".to_owned(), message: String::new(), retry: at(25) };
    let observed = Observed { trouble: Some(trouble), ..Observed::default() };
    let waits = next(&pod("Always", false), Some(&accepted()), &observed, 20);
    assert_eq!((waits.steps.len(), waits.wake), (0, Some(at(25))));
    assert_eq!(next(&pod("Always", false), Some(&accepted()), &observed, 25).steps, [Step::Run(Job::Resolve)]);
}

/// A world of one pod that does what plans say, with faults: promises 1 to 5 as properties.
#[derive(Debug)]
struct Sim {
    pod: Option<Pod>,
    record: Option<Record>,
    observed: Observed,
    live: u32,
    started: Vec<u32>,
    mains: Vec<u32>,
    finished: Option<Terminal>,
    forgotten: bool,
    agent_stops: bool,
    evicted: Option<&'static str>,
}

#[derive(Clone, Debug)]
enum Chance {
    Step,
    JobWorks,
    JobFails,
    RestoreFails,
    GuestReady,
    GuestLost,
    MainExits(i32),
    GuestShutsDown,
    Crash,
    Drained,
    ApiShows,
    Delete,
    Vanish,
    AgentDies,
    AgentStops,
    Evicted,
    ProbeFails,
    HookFails,
    HookEnds,
    Time(i64),
}

fn chance() -> impl Strategy<Value = Chance> {
    prop_oneof![
        12 => Just(Chance::Step),
        8 => Just(Chance::JobWorks),
        1 => Just(Chance::JobFails),
        1 => Just(Chance::RestoreFails),
        4 => Just(Chance::GuestReady),
        1 => Just(Chance::GuestLost),
        2 => (0..3i32).prop_map(Chance::MainExits),
        1 => Just(Chance::GuestShutsDown),
        1 => Just(Chance::Crash),
        3 => Just(Chance::Drained),
        2 => Just(Chance::ApiShows),
        1 => Just(Chance::Delete),
        1 => Just(Chance::Vanish),
        2 => Just(Chance::AgentDies),
        1 => Just(Chance::AgentStops),
        1 => Just(Chance::Evicted),
        2 => Just(Chance::ProbeFails),
        1 => Just(Chance::HookFails),
        3 => Just(Chance::HookEnds),
        3 => (1..400i64).prop_map(Chance::Time),
    ]
}

impl Sim {
    fn new(pod: Pod) -> Self {
        Self {
            pod: Some(pod),
            record: None,
            observed: Observed::default(),
            live: 0,
            started: Vec::new(),
            mains: Vec::new(),
            finished: None,
            forgotten: false,
            agent_stops: false,
            evicted: None,
        }
    }

    fn attempt(&mut self) -> &mut Attempt {
        self.record.as_mut().unwrap().attempt.as_mut().unwrap()
    }

    fn is_live(&self) -> bool {
        matches!(self.observed.machine, MachineSeen::Live)
    }

    fn machine_ends(&mut self, cause: ExitCause, now: i64) {
        if self.is_live() {
            self.live -= 1;
            self.observed.machine = MachineSeen::Stopped(Exit { cause, at: at(now), detail: None });
            self.observed.guest_ready = false;
        }
    }

    fn happen(&mut self, chance: &Chance, now: i64) -> Result<(), TestCaseError> {
        match chance {
            Chance::Step | Chance::Time(_) => return self.step(now),
            Chance::JobWorks => self.job_works(now),
            Chance::JobFails => {
                if let Some(job) = self.observed.job.take() {
                    self.observed.trouble =
                        Some(Trouble { job, reason: "X".to_owned(), message: String::new(), retry: at(now + 5) });
                }
            }
            Chance::RestoreFails => {
                if self.observed.job == Some(Job::Start) && !self.attempt().boots {
                    self.observed.job = None;
                    self.observed.machine = MachineSeen::Failed("bad state".to_owned());
                    self.observed.restored = true;
                }
            }
            Chance::GuestReady => self.observed.guest_ready = self.is_live(),
            Chance::GuestLost => self.observed.guest_ready = false,
            Chance::MainExits(code) => {
                if self.is_live() && matches!(self.attempt().main, Main::Started(_)) {
                    let code = *code;
                    self.attempt().main = Main::Ended { code: Some(code), started: None, at: at(now), why: None };
                }
            }
            Chance::GuestShutsDown => self.machine_ends(ExitCause::GuestShutdown, now),
            Chance::Crash => self.machine_ends(ExitCause::Killed, now),
            Chance::Drained => self.observed.drained = true,
            Chance::ApiShows => {
                let phase = self
                    .record
                    .as_ref()
                    .and_then(|record| record.terminal.as_ref())
                    .map(|t| if t.succeeded { "Succeeded" } else { "Failed" });
                if let (Some(pod), Some(phase)) = (self.pod.take(), phase) {
                    self.pod = Some(shown(pod, phase));
                }
            }
            Chance::Delete => self.pod = self.pod.take().map(|pod| deleted(pod, 30)),
            Chance::Vanish => self.pod = None,
            Chance::AgentStops => self.agent_stops = true,
            Chance::Evicted => self.evicted = Some("low"),
            Chance::ProbeFails => {
                if self.is_live() {
                    self.observed.failed = Some(Failed { what: "liveness probe".to_owned(), grace: None });
                }
            }
            Chance::HookFails => {
                if self.observed.job == Some(Job::PostStart) {
                    self.observed.job = None;
                    self.observed.failed = Some(Failed { what: "postStart hook".to_owned(), grace: None });
                }
            }
            Chance::HookEnds => {
                if self.observed.pre_stop == HookSeen::Running {
                    self.observed.pre_stop = HookSeen::Done;
                }
            }
            Chance::AgentDies => {
                // Whatever was only in memory is gone; jobs half done leave what they leave.
                let machine = match (&self.observed.machine, self.observed.job) {
                    (MachineSeen::Absent, Some(Job::Prepare)) => MachineSeen::Unfinished,
                    (machine, _) => machine.clone(),
                };
                self.observed = seen(machine);
                (self.agent_stops, self.evicted) = (false, None);
                match &mut self.record {
                    Some(record) if record.attempt.is_none() && record.terminal.is_none() => self.record = None,
                    Some(record) if record.stop.as_ref().is_some_and(|stop| stop.why == StopReason::Agent) => {
                        record.stop = None;
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn job_works(&mut self, _now: i64) {
        let Some(job) = self.observed.job.take() else { return };
        self.observed.trouble = None;
        match job {
            Job::Resolve => self.observed.resolved = Resolved::Yes,
            Job::Prepare => self.observed.machine = MachineSeen::Prepared,
            Job::Start => {
                let number = self.attempt().number;
                self.started.push(number);
                self.live += 1;
                self.observed.machine = MachineSeen::Live;
            }
            Job::StartMain => {
                // The guest starts it once however often it is asked.
                let number = self.attempt().number;
                if self.is_live() {
                    if !self.mains.contains(&number) {
                        self.mains.push(number);
                    }
                    if self.attempt().main == Main::Asked {
                        self.attempt().main = Main::Started(at(0));
                    }
                }
            }
            Job::PostStart => self.attempt().hooked = true,
            Job::Remove => {
                if self.is_live() {
                    self.live -= 1;
                }
                self.observed = seen(MachineSeen::Absent);
            }
            Job::Delete => {
                self.observed.deleted = true;
                self.pod = None;
            }
        }
    }

    fn step(&mut self, now: i64) -> Result<(), TestCaseError> {
        if self.forgotten {
            return Ok(());
        }
        let stops = self.agent_stops.then(|| SignedDuration::from_secs(10));
        let plan = plan(
            Desired { pod: self.pod.as_ref(), agent_stops: stops, evicted: self.evicted },
            self.record.as_ref(),
            &self.observed,
            at(now),
        );
        for step in plan.steps {
            match step {
                Step::Accept => {
                    prop_assert!(self.record.is_none());
                    self.record = Some(accepted());
                }
                Step::Run(job) => {
                    prop_assert!(self.observed.job.is_none(), "two jobs at once");
                    if job == Job::Delete {
                        let pod = self.pod.as_ref().unwrap();
                        prop_assert!(
                            pod::is_terminal_phase(pod::api_phase(pod)),
                            "deleted before its verdict was shown"
                        );
                        prop_assert_eq!(&self.observed.machine, &MachineSeen::Absent);
                    }
                    self.observed.job = Some(job);
                }
                Step::Begin => {
                    let record = self.record.as_mut().unwrap();
                    prop_assert!(record.terminal.is_none(), "a finished pod runs again");
                    prop_assert!(record.attempt.as_ref().is_none_or(|attempt| attempt.ended.is_some()));
                    prop_assert_eq!(&self.observed.machine, &MachineSeen::Absent);
                    let number = record.next_attempt();
                    record.attempt = Some(Attempt { number, ..begun().attempt.unwrap() });
                    self.observed = Observed {
                        machine: MachineSeen::Absent,
                        trouble: self.observed.trouble.take(),
                        ..Observed::default()
                    };
                }
                Step::FallBack(_) => {
                    prop_assert!(!self.attempt().boots, "a second fall-back of one attempt");
                    self.attempt().boots = true;
                }
                Step::NoteStarted => self.attempt().started = Some(at(now)),
                Step::AskMain => self.attempt().main = Main::Asked,
                Step::NoteStop(stop) => self.record.as_mut().unwrap().stop = Some(stop),
                Step::NoteUnwell(unwell) => {
                    prop_assert!(self.is_live() && self.attempt().unwell.is_none(), "ended twice");
                    self.attempt().unwell = Some(unwell);
                }
                Step::PreStop => {
                    prop_assert!(self.is_live() && !self.observed.stopping, "the hook comes before the signal");
                    prop_assert_eq!(self.observed.pre_stop, HookSeen::Unrun);
                    self.observed.pre_stop = HookSeen::Running;
                }
                Step::SignalMain | Step::PowerDown { .. } => {
                    prop_assert!(self.is_live());
                    let hook = pod::pre_stop(self.pod.as_ref().unwrap()).is_some();
                    prop_assert!(
                        !(hook
                            && matches!(self.attempt().main, Main::Started(_))
                            && self.observed.pre_stop != HookSeen::Done),
                        "the process was signalled before its preStop hook was over"
                    );
                    self.observed.stopping = true;
                }
                Step::Kill => self.machine_ends(ExitCause::Killed, now),
                Step::End { ended, terminal } => {
                    prop_assert_eq!(self.live, 0, "an end while something runs");
                    if let Main::Ended { code: Some(code), .. } = self.attempt().main {
                        prop_assert_eq!(ended.exit_code, code, "an exit code was lost");
                    }
                    self.attempt().ended = Some(ended);
                    if let Some(terminal) = terminal {
                        self.conclude(terminal)?;
                    }
                }
                Step::Conclude(terminal) => self.conclude(terminal)?,
                Step::Forget => {
                    prop_assert_eq!(&self.observed.machine, &MachineSeen::Absent);
                    prop_assert!(self.pod.is_none());
                    self.forgotten = true;
                }
            }
        }
        Ok(())
    }

    fn conclude(&mut self, terminal: Terminal) -> Result<(), TestCaseError> {
        prop_assert_eq!(self.live, 0, "a verdict while something runs");
        prop_assert!(self.finished.is_none(), "a second verdict");
        self.finished = Some(terminal.clone());
        self.record.as_mut().unwrap().terminal = Some(terminal);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_history_keeps_the_promises(
        policy in prop_oneof![Just("Always"), Just("OnFailure"), Just("Never")],
        command in any::<bool>(),
        hooks in any::<bool>(),
        chances in proptest::collection::vec(chance(), 0..150),
    ) {
        let mut sim = Sim::new(if hooks { with_hooks(pod(policy, command)) } else { pod(policy, command) });
        let mut now = 0;
        for chance in &chances {
            if let Chance::Time(seconds) = chance {
                now += seconds;
            }
            sim.happen(chance, now)?;
            prop_assert!(sim.live <= 1, "two machines");
            let mut starts = sim.started.clone();
            starts.dedup();
            prop_assert_eq!(&starts, &sim.started, "a machine was started twice");
            if sim.finished.is_some() {
                prop_assert!(sim.live == 0);
            }
        }
        // Whatever happened: deleted, it goes within a while and leaves nothing.
        sim.agent_stops = false;
        sim.observed.trouble = None;
        sim.pod = sim.pod.take().map(|pod| deleted(pod, 30));
        for _ in 0..80 {
            now += 10;
            sim.happen(&Chance::Step, now)?;
            sim.happen(&Chance::JobWorks, now)?;
            sim.happen(&Chance::Drained, now)?;
            sim.happen(&Chance::HookEnds, now)?;
            sim.happen(&Chance::ApiShows, now)?;
        }
        prop_assert!(sim.forgotten, "something stays: {sim:?}");
        prop_assert_eq!(sim.live, 0);
    }
}

#[test]
fn output_of_a_stopped_machine_that_never_comes_is_not_waited_for() {
    let (vm, record) = (pod("Never", false), started(Main::Unstarted));
    // Stopped at 5, but seen only at 8, by another agent.
    let late = Observed { stopped: Some(at(8)), ..exit_seen(ExitCause::GuestShutdown) };
    let waits = next(&vm, Some(&record), &late, 22);
    assert_eq!((waits.steps, waits.wake), (Vec::new(), Some(at(23))));
    let given_up = next(&vm, Some(&record), &late, 23).steps;
    assert!(matches!(&given_up[..], [Step::End { ended, .. }] if ended.exit_code == 0), "{given_up:?}");
}

fn fails(grace: Option<i64>) -> Observed {
    let grace = grace.map(SignedDuration::from_secs);
    let failed = Some(Failed { what: "liveness probe".to_owned(), grace });
    Observed { guest_ready: true, failed, ..seen(MachineSeen::Live) }
}

#[test]
fn a_failed_probe_ends_the_container_and_not_the_pod() {
    let job = pod("Always", true);
    let mut record = started(Main::Started(at(2)));
    let noted = step(&job, &record, &fails(None));
    let unwell = Unwell { what: "liveness probe".to_owned(), deadline: at(50) };
    assert_eq!(noted, Some(Step::NoteUnwell(unwell.clone())), "the pod's grace period is 30 s by default");
    let short = Unwell { deadline: at(23), ..unwell.clone() };
    assert_eq!(step(&job, &record, &fails(Some(3))), Some(Step::NoteUnwell(short)), "the probe's own outweighs it");
    record.attempt.as_mut().unwrap().unwell = Some(unwell);
    assert_eq!(step(&job, &record, &fails(None)), Some(Step::SignalMain));
    assert_eq!(next(&job, Some(&record), &Observed { stopping: true, ..fails(None) }, 50).steps, [Step::Kill]);
    // A process that takes its signal well is restarted by the policy all the same, if that says so.
    record.attempt.as_mut().unwrap().main =
        Main::Ended { code: Some(143), started: Some(at(2)), at: at(12), why: None };
    let gone = Observed { drained: true, ..exit_seen(ExitCause::Killed) };
    assert!(matches!(step(&job, &record, &gone), Some(Step::End { ended, terminal: None }) if ended.exit_code == 143));
}

#[test]
fn a_machine_that_is_told_to_shut_down_has_not_succeeded() {
    let vm = pod("OnFailure", false);
    let mut record = started(Main::Unstarted);
    record.attempt.as_mut().unwrap().unwell = Some(Unwell { what: "liveness probe".to_owned(), deadline: at(40) });
    let off = Observed { drained: true, ..exit_seen(ExitCause::GuestShutdown) };
    let end = step(&vm, &record, &off);
    assert!(matches!(&end, Some(Step::End { ended, terminal: None }) if ended.exit_code == 143), "{end:?}");
}

#[test]
fn hooks_run_once_and_in_their_place() {
    let job = with_hooks(pod("Always", true));
    let ready = Observed { guest_ready: true, ..seen(MachineSeen::Live) };
    let mut record = started(Main::Asked);
    assert_eq!(step(&job, &record, &ready), Some(Step::Run(Job::StartMain)));
    record.attempt.as_mut().unwrap().main = Main::Started(at(2));
    assert_eq!(step(&job, &record, &ready), Some(Step::Run(Job::PostStart)));
    record.attempt.as_mut().unwrap().hooked = true;
    assert_eq!(step(&job, &record, &ready), None);
    record.stop = Some(stop(StopReason::Deleted, at(40)));
    let gone = deleted(job, 30);
    assert_eq!(step(&gone, &record, &ready), Some(Step::PreStop));
    let running = Observed { pre_stop: HookSeen::Running, ..ready.clone() };
    let waits = next(&gone, Some(&record), &running, 20);
    assert_eq!((waits.steps, waits.wake), (Vec::new(), Some(at(40))));
    assert_eq!(next(&gone, Some(&record), &running, 40).steps, [Step::Kill], "a hook has no longer than its pod");
    assert_eq!(step(&gone, &record, &Observed { pre_stop: HookSeen::Done, ..ready }), Some(Step::SignalMain));
}

#[test]
fn a_machine_waits_for_and_with_the_containers_beside_it() {
    let job = pod("Never", true);
    let with = |company: Company, resolved| Observed { company: Some(company), resolved, ..Observed::default() };
    let address = Some([172, 18, 0, 1].into());
    let nothing = Company::default();
    assert_eq!(step(&job, &accepted(), &with(nothing, Resolved::No)), None, "it has no address yet");
    let held = Company { address, ..nothing };
    assert_eq!(step(&job, &accepted(), &with(held, Resolved::No)), Some(Step::Run(Job::Resolve)));
    assert_eq!(step(&job, &accepted(), &with(held, Resolved::Yes)), None, "init containers run");
    let ready = Company { initialized: true, ..held };
    assert_eq!(step(&job, &accepted(), &with(ready, Resolved::Yes)), Some(Step::Begin));
    // An init container that failed for good.
    let doomed = Company { doomed: true, ..held };
    assert_eq!(step(&job, &accepted(), &with(doomed, Resolved::Yes)), None, "a native still runs");
    let verdict = step(&job, &accepted(), &with(Company { quiet: true, ..doomed }, Resolved::Yes));
    assert!(matches!(verdict, Some(Step::Conclude(Terminal { succeeded: false, .. }))), "{verdict:?}");
    // The end of the machine is no verdict on the others.
    let record = started(Main::Ended { code: Some(0), started: None, at: at(2), why: None });
    let gone = Observed { drained: true, company: Some(ready), ..exit(ExitCause::Killed).into_seen() };
    assert!(matches!(step(&job, &record, &gone), Some(Step::End { terminal: None, .. })));
    for (over, quiet, want) in [
        (None, false, None),
        (Some(true), false, None),
        (Some(true), true, Some(true)),
        (Some(false), true, Some(false)),
    ] {
        let company = Company { over, quiet, ..ready };
        let got = match step(&job, &over_with(0), &with(company, Resolved::No)) {
            None => None,
            Some(Step::Conclude(terminal)) => Some(terminal.succeeded),
            other => panic!("{other:?}"),
        };
        assert_eq!(got, want, "{company:?}");
    }
    // A pod that is deleted is over when all of it is.
    let mut stopped = over_with(0);
    stopped.stop = Some(stop(StopReason::Deleted, at(30)));
    let pod = deleted(job.clone(), 30);
    let stops = Company { over: Some(true), ..ready };
    assert_eq!(step(&pod, &stopped, &with(stops, Resolved::No)), None);
    let verdict = step(&pod, &stopped, &with(Company { quiet: true, ..stops }, Resolved::No));
    assert!(matches!(verdict, Some(Step::Conclude(Terminal { succeeded: true, .. }))), "{verdict:?}");
    // What the API has no more goes when nothing is left of it.
    let absent = |company| plan(NOTHING, None, &with(company, Resolved::No), at(20)).steps;
    assert_eq!(absent(ready), []);
    assert_eq!(absent(Company { gone: true, ..ready }), [Step::Forget]);
}

impl MachineSeen {
    fn into_seen(self) -> Observed {
        seen(self)
    }
}
