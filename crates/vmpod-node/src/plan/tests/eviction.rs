use super::*;

#[test]
fn an_evicted_pod_is_killed_at_once_and_fails_with_the_reason() {
    let (vm, live) = (pod("Always", true), Observed { guest_ready: true, ..seen(MachineSeen::Live) });
    let evicted = |pod: &Pod, record: &Record, seen: &Observed, now| {
        plan(Desired { pod: Some(pod), agent_stops: None, evicted: Some("low") }, Some(record), seen, at(now)).steps
    };
    let record = started(Main::Started(at(2)));
    let noted = Stop { message: Some("low".to_owned()), ..stop(StopReason::Evicted, at(20)) };
    assert_eq!(evicted(&vm, &record, &live, 20), [Step::NoteStop(noted.clone())]);
    let record = Record { stop: Some(noted), ..record };
    assert_eq!(evicted(&vm, &record, &live, 21), [Step::Kill], "and not noted again");
    let Some(Step::End { terminal: Some(terminal), .. }) =
        step(&vm, &record, &Observed { drained: true, ..exit_seen(ExitCause::Killed) })
    else {
        panic!()
    };
    let words = (terminal.succeeded, terminal.reason.as_deref(), terminal.message.as_deref());
    assert_eq!(words, (false, Some("Evicted"), Some("low")), "even one that would always restart is over");
    // One that is being deleted anyway is hurried; it stays a deletion.
    let leaving = Record { stop: Some(stop(StopReason::Deleted, at(50))), ..started(Main::Started(at(2))) };
    assert_eq!(evicted(&deleted(vm.clone(), 30), &leaving, &live, 25), [Step::SignalMain]);
}
