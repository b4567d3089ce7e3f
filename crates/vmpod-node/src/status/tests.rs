use serde_json::json;

use super::*;
use crate::{
    plan::Trouble,
    pod::PodUid,
    record::{ImageChoice, Stop, Terminal},
};

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).unwrap()
}

fn pod(policy: &str, command: bool) -> Pod {
    let mut container = json!({"name": "vm", "image": "tiny:1"});
    if command {
        container["args"] = json!(["run"]);
    }
    serde_json::from_value(json!({
        "metadata": {"name": "p", "uid": "u", "generation": 7},
        "spec": {"restartPolicy": policy, "containers": [container]},
        "status": {"phase": "Pending", "qosClass": "Burstable", "conditions": [
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2001-01-01T00:00:00Z"},
            {"type": "Custom", "status": "True"}]}}))
    .unwrap()
}

fn record() -> Record {
    let mut record = Record::new(PodUid::parse("u").unwrap(), "default", "p", at(0));
    record.address = Some("127.64.0.5".parse().unwrap());
    record
}

fn attempt(number: u32, started: Option<i64>, main: Main) -> Attempt {
    Attempt {
        number,
        image: ImageChoice { name: "tiny:1".to_owned(), digest: "sha256:ab".to_owned() },
        started: started.map(at),
        main,
        ended: None,
        boots: false,
        hooked: false,
        unwell: None,
    }
}

fn ended(code: i32, reason: &str) -> Ended {
    Ended {
        machine: PodUid::parse("u").unwrap().machine(0),
        exit_code: code,
        reason: reason.to_owned(),
        message: None,
        started: Some(at(1)),
        finished: at(9),
    }
}

fn of(pod: &Pod, record: &Record, seen: &Observed) -> PodStatus {
    status(pod, record, seen, IpAddr::from([10, 0, 0, 1]), at(20), None, None)
}

fn live(ready: bool) -> Observed {
    Observed { machine: MachineSeen::Live, guest_ready: ready, ..Observed::default() }
}

/// Phase, container state in short, ready, and the four conditions: sandbox, initialized, ready, containers ready.
fn brief(status: &PodStatus) -> String {
    let container = &status.container_statuses.as_ref().unwrap()[0];
    let state = container.state.as_ref().unwrap();
    let state = match (&state.waiting, &state.running, &state.terminated) {
        (Some(waiting), ..) => format!("waiting {}", waiting.reason.as_deref().unwrap()),
        (_, Some(_), _) => "running".to_owned(),
        (.., Some(ended)) => format!("terminated {} {}", ended.exit_code, ended.reason.as_deref().unwrap()),
        _ => "nothing".to_owned(),
    };
    let conditions: Vec<_> = status
        .conditions
        .as_ref()
        .unwrap()
        .iter()
        .take(4)
        .map(|c| format!("{}{}", &c.status[..1], c.reason.as_ref().map(|r| format!(":{r}")).unwrap_or_default()))
        .collect();
    format!("{} | {state} | {}", status.phase.as_deref().unwrap(), conditions.join(" "))
}

#[test]
fn phases_states_and_conditions() {
    let console = pod("Always", false);
    let main = pod("Always", true);
    let trouble = |reason: &str| Observed {
        trouble: Some(Trouble {
            job: crate::plan::Job::Resolve,
            reason: reason.to_owned(),
            message: "why".to_owned(),
            retry: at(30),
        }),
        ..Observed::default()
    };
    let with = |attempt: Attempt| Record { attempt: Some(attempt), ..record() };
    let over = |attempt: Attempt, succeeded: bool| Record {
        terminal: Some(Terminal { succeeded, reason: None, message: None, shown_before: false }),
        ..with(attempt)
    };
    let finished = |number: u32, code: i32, reason: &str| Attempt {
        ended: Some(ended(code, reason)),
        ..attempt(number, Some(1), Main::Unstarted)
    };
    let mut crashed = with(finished(0, 1, "Error"));
    crashed.backoff.fail(at(9), at(1));
    let cases = [
        ("accepted", brief(&of(&console, &record(), &Observed::default()))),
        ("no image", brief(&of(&console, &record(), &trouble("ImagePullBackOff")))),
        ("no config", brief(&of(&console, &record(), &trouble("CreateContainerConfigError")))),
        ("machine boots", brief(&of(&console, &with(attempt(0, Some(1), Main::Unstarted)), &live(false)))),
        ("guest answers", brief(&of(&console, &with(attempt(0, Some(1), Main::Unstarted)), &live(true)))),
        ("main not started", brief(&of(&main, &with(attempt(0, Some(1), Main::Unstarted)), &live(true)))),
        ("main runs", brief(&of(&main, &with(attempt(0, Some(1), Main::Started(at(2)))), &live(true)))),
        (
            "main ended, machine not yet",
            brief(&of(
                &main,
                &with(attempt(0, Some(1), Main::Ended { code: Some(0), started: Some(at(2)), at: at(3), why: None })),
                &live(true),
            )),
        ),
        ("backing off", brief(&of(&console, &crashed, &Observed::default()))),
        ("stopped with the last agent", brief(&of(&console, &with(finished(0, 137, "Error")), &Observed::default()))),
        ("succeeded", brief(&of(&pod("Never", false), &over(finished(0, 0, "Completed"), true), &Observed::default()))),
        ("failed", brief(&of(&pod("Never", false), &over(finished(0, 3, "Error"), false), &Observed::default()))),
        (
            "deleted before anything ran",
            brief(&of(
                &console,
                &Record {
                    stop: Some(Stop { why: StopReason::Deleted, deadline: at(9), message: None }),
                    terminal: Some(Terminal { succeeded: false, reason: None, message: None, shown_before: false }),
                    ..record()
                },
                &Observed::default(),
            )),
        ),
    ];
    let lines: Vec<_> = cases.iter().map(|(name, brief)| format!("{name}: {brief}")).collect();
    insta::assert_snapshot!(lines.join("\n"));
}

#[test]
fn a_running_pod_in_full() {
    let record =
        Record { attempt: Some(attempt(2, Some(5), Main::Unstarted)), previous: Some(ended(137, "Error")), ..record() };
    insta::assert_json_snapshot!(of(&pod("Always", false), &record, &live(true)));
}

#[test]
fn a_refused_pod_never_had_containers() {
    let record = Record {
        terminal: Some(Terminal {
            succeeded: false,
            reason: Some("OutOfmemory".to_owned()),
            message: Some("m".to_owned()),
            shown_before: false,
        }),
        address: None,
        ..record()
    };
    let status = of(&pod("Always", false), &record, &Observed::default());
    assert_eq!((status.phase.as_deref(), status.reason.as_deref()), (Some("Failed"), Some("OutOfmemory")));
    assert_eq!(status.container_statuses, None);
}

#[test]
fn times_of_transition_stay_while_nothing_changes() {
    let pod = pod("Always", false);
    let record = Record { attempt: Some(attempt(0, Some(1), Main::Unstarted)), ..record() };
    let first = of(&pod, &record, &live(true));
    let scheduled = first.conditions.as_ref().unwrap().iter().find(|c| c.type_ == "PodScheduled").unwrap();
    assert_eq!(
        scheduled.last_transition_time.as_ref().unwrap().0.to_string(),
        "2001-01-01T00:00:00Z",
        "the scheduler's time"
    );
    let later = status(&pod, &record, &live(true), IpAddr::from([10, 0, 0, 1]), at(99), Some(&first), None);
    assert_eq!(later, first);
    let lost = status(&pod, &record, &live(false), IpAddr::from([10, 0, 0, 1]), at(99), Some(&first), None);
    let ready = lost.conditions.unwrap().into_iter().find(|c| c.type_ == "Ready").unwrap();
    assert_eq!((ready.status.as_str(), ready.last_transition_time), ("False", Some(Time(at(99)))));
}

#[test]
fn a_patch_says_only_what_is_ours_and_new() {
    let mut pod = pod("Always", false);
    let record = Record { attempt: Some(attempt(0, Some(1), Main::Unstarted)), ..record() };
    let wanted = of(&pod, &record, &live(true));
    let first = patch(&pod, &wanted).unwrap();
    assert_eq!(first["metadata"]["uid"], "u");
    assert!(first["status"].get("qosClass").is_none());
    let kinds: Vec<_> =
        first["status"]["conditions"].as_array().unwrap().iter().map(|c| c["type"].as_str().unwrap()).collect();
    assert!(!kinds.contains(&"Custom"), "others' conditions are left alone: {kinds:?}");
    // Shown as wanted, nothing is sent.
    let custom = pod.status.as_ref().unwrap().conditions.as_ref().unwrap()[1].clone();
    let mut shown = wanted.clone();
    shown.qos_class = Some("Burstable".to_owned());
    shown.conditions.as_mut().unwrap().push(custom);
    pod.status = Some(shown);
    assert_eq!(patch(&pod, &wanted), None);
    // A field that goes is nulled; a list merged by key is replaced.
    let mut changed = wanted.clone();
    changed.pod_ip = None;
    changed.pod_ips = Some(vec![PodIP { ip: "127.64.0.6".to_owned() }]);
    let second = patch(&pod, &changed).unwrap();
    assert_eq!(second["status"], json!({"podIP": null, "podIPs": [{"ip": "127.64.0.6"}, {"$patch": "replace"}]}));
}

#[test]
fn image_ids_name_the_repository() {
    assert_eq!(image_id("tiny:1", "sha256:ab"), "tiny@sha256:ab");
    assert_eq!(image_id("r.example:5000/a/b", "sha256:ab"), "r.example:5000/a/b@sha256:ab");
    assert_eq!(image_id("r.example/a@sha256:00", "sha256:ab"), "r.example/a@sha256:ab");
}

#[test]
fn readiness_gates_hold_back_the_pod_and_not_its_containers() {
    let gated = |status: Option<&str>| {
        let mut pod = pod("Always", false);
        let gates = json!([{"conditionType": "lb"}]);
        pod.spec.as_mut().unwrap().readiness_gates = serde_json::from_value(gates).unwrap();
        if let Some(status) = status {
            let condition = serde_json::from_value(json!({"type": "lb", "status": status})).unwrap();
            pod.status.as_mut().unwrap().conditions.as_mut().unwrap().push(condition);
        }
        let record = Record { attempt: Some(attempt(0, Some(1), Main::Unstarted)), ..record() };
        let conditions = of(&pod, &record, &live(true)).conditions.unwrap();
        let of = |kind: &str| conditions.iter().find(|c| c.type_ == kind).unwrap().clone();
        assert_eq!(of("ContainersReady").status, "True");
        let ready = of("Ready");
        (ready.status, ready.reason, ready.message)
    };
    let not = |message: &str| ("False".to_owned(), Some("ReadinessGatesNotReady".to_owned()), Some(message.to_owned()));
    assert_eq!(gated(None), not("corresponding condition of pod readiness gate \"lb\" does not exist."));
    assert_eq!(gated(Some("False")), not("the status of pod readiness gate \"lb\" is not \"True\", but False"));
    assert_eq!(gated(Some("True")), ("True".to_owned(), None, None));
}

#[test]
fn probes_and_hooks_decide_whether_a_container_is_ready() {
    let record = Record { attempt: Some(attempt(0, Some(1), Main::Unstarted)), ..record() };
    let said = |record: &Record, seen: &Observed| {
        let status = of(&pod("Always", false), record, seen);
        let container = status.container_statuses.unwrap().remove(0);
        (container.started.unwrap(), container.ready)
    };
    assert_eq!(said(&record, &live(true)), (true, true));
    assert_eq!(said(&record, &Observed { unready: true, ..live(true) }), (true, false));
    assert_eq!(said(&record, &Observed { unready: true, unstarted: true, ..live(true) }), (false, false));
    let mut unwell = record;
    let why = crate::record::Unwell { what: "liveness probe".to_owned(), deadline: at(40) };
    unwell.attempt.as_mut().unwrap().unwell = Some(why);
    assert_eq!(said(&unwell, &live(true)), (true, false), "what is being ended takes no more work");
}
