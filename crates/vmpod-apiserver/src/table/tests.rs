use super::*;
use crate::kinds::Registry;

fn cells(plural: &str, object: &Value) -> Vec<Value> {
    let resource = Registry::builtin().resource("", "v1", plural).unwrap();
    let now = "2026-01-01T12:05:00Z".parse().unwrap();
    let table = render(&resource, &[object], IncludeObject::Metadata, now, json!({}), true);
    assert_eq!(
        table["columnDefinitions"].as_array().unwrap().len(),
        table["rows"][0]["cells"].as_array().unwrap().len()
    );
    table["rows"][0]["cells"].as_array().unwrap().clone()
}

fn pod(status: &Value) -> Value {
    json!({"metadata": {"name": "p", "creationTimestamp": "2026-01-01T12:00:00Z"}, "spec": {"containers": [{"name": "c"}]}, "status": status})
}

#[test]
fn pods_in_one_word() {
    let container = |state: Value| json!({"phase": "Running", "containerStatuses": [{"name": "c", "ready": false, "restartCount": 0, "state": state}]});
    for (status, wanted) in [
        (json!({"phase": "Pending"}), "Pending"),
        (container(json!({"waiting": {"reason": "CrashLoopBackOff"}})), "CrashLoopBackOff"),
        (container(json!({"terminated": {"reason": "Completed", "exitCode": 0}})), "Completed"),
        (container(json!({"terminated": {"exitCode": 3}})), "ExitCode:3"),
        (container(json!({"terminated": {"exitCode": 0, "signal": 9}})), "Signal:9"),
        (json!({"phase": "Failed", "reason": "Evicted"}), "Evicted"),
    ] {
        assert_eq!(cells("pods", &pod(&status))[2], wanted);
    }
    let mut leaving = pod(&json!({"phase": "Running"}));
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z".into();
    assert_eq!(cells("pods", &leaving)[2], "Terminating");
}

#[test]
fn restarts_tell_when() {
    let status = json!({"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [{"name": "c", "ready": true, "restartCount": 2,
        "state": {"running": {}}, "lastState": {"terminated": {"finishedAt": "2026-01-01T12:03:00Z"}}}]});
    let cells = cells("pods", &pod(&status));
    assert_eq!(cells[1..6], [json!("1/1"), json!("Running"), json!("2 (2m ago)"), json!("5m"), json!("10.0.0.1")]);
}

#[test]
fn init_containers_come_first() {
    let mut one = pod(
        &json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "restartCount": 0, "state": {"running": {}}}]}),
    );
    one["spec"]["initContainers"] = json!([{"name": "i"}, {"name": "j"}]);
    assert_eq!(cells("pods", &one)[2], "Init:0/2");
}

#[test]
fn nodes_and_events() {
    let node = json!({"metadata": {"name": "n", "labels": {"node-role.kubernetes.io/worker": ""}}, "spec": {"unschedulable": true},
        "status": {"conditions": [{"type": "Ready", "status": "True"}], "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}]}});
    let row = cells("nodes", &node);
    assert_eq!(row[1..3], [json!("Ready,SchedulingDisabled"), json!("worker")]);
    assert_eq!(row[5..7], [json!("127.0.0.1"), json!("<none>")]);
    let event = json!({"metadata": {"name": "e"}, "type": "Normal", "reason": "Started", "message": "m\n", "count": 3,
        "involvedObject": {"kind": "Pod", "name": "p"}, "source": {"component": "vmpod", "host": "n"},
        "firstTimestamp": "2026-01-01T12:00:00Z", "lastTimestamp": "2026-01-01T12:04:00Z"});
    let row = cells("events", &event);
    assert_eq!(
        row[..7],
        [json!("60s"), json!("Normal"), json!("Started"), json!("pod/p"), json!(""), json!("vmpod, n"), json!("m")]
    );
    assert_eq!(row[7..9], [json!("5m"), json!(3)]);
}
