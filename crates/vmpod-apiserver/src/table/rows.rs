//! The cells of each kind.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::age::{human_duration, since};
use super::columns::Column;
use super::jsonpath;
use crate::kinds::{Resource, at, items, text};

const NONE: &str = "<none>";

/// The cells of one object, in the order of the columns.
pub(super) fn cells(resource: &Resource, columns: &[Column], object: &Value, now: Timestamp) -> Vec<Value> {
    if resource.is_custom() {
        return columns.iter().map(|column| custom_cell(column, object, now)).collect();
    }
    let name = text(object, &["metadata", "name"]);
    let age = since(text(object, &["metadata", "creationTimestamp"]), now);
    let size = |key: &str| object.get(key).and_then(Value::as_object).map_or(0, serde_json::Map::len);
    match resource.kind.as_str() {
        "Pod" => pod(object, name, &age, now),
        "Node" => node(object, name, &age),
        "Namespace" => vec![name.into(), text(object, &["status", "phase"]).into(), age.into()],
        "ConfigMap" => vec![name.into(), (size("data") + size("binaryData")).into(), age.into()],
        "Secret" => vec![name.into(), text(object, &["type"]).into(), size("data").into(), age.into()],
        "Event" => event(object, name, now),
        "Lease" => vec![name.into(), text(object, &["spec", "holderIdentity"]).into(), age.into()],
        "CertificateSigningRequest" => signing_request(object, name, &age),
        "RoleBinding" | "ClusterRoleBinding" => binding(object, name, &age),
        "PriorityClass" => vec![
            name.into(),
            object["value"].as_i64().unwrap_or(0).into(),
            (object["globalDefault"] == true).into(),
            age.into(),
            text(object, &["preemptionPolicy"]).into(),
        ],
        "PodDisruptionBudget" => {
            let amount = |field: &str| at(object, &["spec", field]).map_or_else(|| "N/A".to_owned(), plain);
            vec![
                name.into(),
                amount("minAvailable").into(),
                amount("maxUnavailable").into(),
                object["status"]["disruptionsAllowed"].as_i64().unwrap_or(0).into(),
                age.into(),
            ]
        }
        "Role" | "ClusterRole" | "CustomResourceDefinition" => {
            vec![name.into(), text(object, &["metadata", "creationTimestamp"]).into()]
        }
        _ => vec![name.into(), age.into()],
    }
}

fn custom_cell(column: &Column, object: &Value, now: Timestamp) -> Value {
    let found = jsonpath::find(object, column.path.as_deref().unwrap_or_default());
    let Some(&first) = found.first() else { return Value::Null };
    match column.kind() {
        "date" => first.as_str().map_or_else(|| "<invalid>".into(), |time| since(time, now).into()),
        "integer" => first.as_i64().map_or(Value::Null, Value::from),
        "number" => first.as_f64().map_or(Value::Null, Value::from),
        "boolean" => first.as_bool().map_or(Value::Null, Value::from),
        _ if found.len() > 1 => {
            let words: Vec<String> = found.iter().map(|one| plain(one)).collect();
            words.join(" ").into()
        }
        _ => plain(first).into(),
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn binding(object: &Value, name: &str, age: &str) -> Vec<Value> {
    let role = format!("{}/{}", text(object, &["roleRef", "kind"]), text(object, &["roleRef", "name"]));
    let subjects = |kind: &str| -> Value {
        let of_kind = items(object, &["subjects"]).iter().filter(|one| text(one, &["kind"]) == kind);
        let names: Vec<String> = of_kind
            .map(|one| match (kind, text(one, &["namespace"])) {
                ("ServiceAccount", namespace) if !namespace.is_empty() => {
                    format!("{namespace}/{}", text(one, &["name"]))
                }
                _ => text(one, &["name"]).to_owned(),
            })
            .collect();
        names.join(", ").into()
    };
    vec![name.into(), role.into(), age.into(), subjects("User"), subjects("Group"), subjects("ServiceAccount")]
}

fn or_none(text: &str) -> Value {
    if text.is_empty() { NONE.into() } else { text.into() }
}

/// What the containers of a pod say about it, as `kubectl get` words it.
struct Summary {
    reason: String,
    ready: usize,
    total: usize,
    restarts: i64,
    last_restart: Option<Timestamp>,
}

fn restarted_at(status: &Value) -> Option<Timestamp> {
    text(status, &["lastState", "terminated", "finishedAt"]).parse().ok()
}

fn exit_reason(terminated: &Value) -> String {
    let reason = text(terminated, &["reason"]);
    let signal = terminated["signal"].as_i64().unwrap_or(0);
    if !reason.is_empty() {
        reason.to_owned()
    } else if signal != 0 {
        format!("Signal:{signal}")
    } else {
        format!("ExitCode:{}", terminated["exitCode"].as_i64().unwrap_or(0))
    }
}

fn restartable(pod: &Value, name: &str) -> bool {
    items(pod, &["spec", "initContainers"])
        .iter()
        .any(|one| text(one, &["name"]) == name && text(one, &["restartPolicy"]) == "Always")
}

fn condition(pod: &Value, kind: &str) -> bool {
    items(pod, &["status", "conditions"]).iter().any(|one| one["type"] == kind && one["status"] == "True")
}

fn summary(pod: &Value) -> Summary {
    let restartable_count =
        items(pod, &["spec", "initContainers"]).iter().filter(|one| text(one, &["restartPolicy"]) == "Always").count();
    let phase = text(pod, &["status", "phase"]);
    let own = text(pod, &["status", "reason"]);
    let mut out = Summary {
        reason: if own.is_empty() { phase } else { own }.to_owned(),
        ready: 0,
        total: items(pod, &["spec", "containers"]).len() + restartable_count,
        restarts: 0,
        last_restart: None,
    };
    let gated = items(pod, &["status", "conditions"])
        .iter()
        .any(|one| one["type"] == "PodScheduled" && one["reason"] == "SchedulingGated");
    if gated {
        out.reason = String::from("SchedulingGated");
    }
    let (initializing, sidecar_restarts) = init_containers(pod, &mut out);
    if !initializing || condition(pod, "Initialized") {
        out.restarts = sidecar_restarts.0;
        out.last_restart = sidecar_restarts.1;
        main_containers(pod, &mut out);
    }
    if at(pod, &["metadata", "deletionTimestamp"]).is_some() {
        if text(pod, &["status", "reason"]) == "NodeLost" {
            out.reason = String::from("Unknown");
        } else if !matches!(phase, "Succeeded" | "Failed") {
            out.reason = String::from("Terminating");
        }
    }
    out
}

/// Goes through the init containers; tells whether one is still to finish, and the restarts of those that keep running.
fn init_containers(pod: &Value, out: &mut Summary) -> (bool, (i64, Option<Timestamp>)) {
    let total = items(pod, &["spec", "initContainers"]).len();
    let mut sidecars = (0, None);
    for (index, status) in items(pod, &["status", "initContainerStatuses"]).iter().enumerate() {
        let restarts = status["restartCount"].as_i64().unwrap_or(0);
        out.restarts += restarts;
        out.last_restart = out.last_restart.max(restarted_at(status));
        let sidecar = restartable(pod, text(status, &["name"]));
        if sidecar {
            sidecars = (sidecars.0 + restarts, sidecars.1.max(restarted_at(status)));
        }
        let terminated = at(status, &["state", "terminated"]);
        if terminated.is_some_and(|ended| ended["exitCode"].as_i64() == Some(0)) {
            continue;
        }
        if sidecar && status["started"] == true {
            out.ready += usize::from(status["ready"] == true);
            continue;
        }
        let waiting = text(status, &["state", "waiting", "reason"]);
        out.reason = match terminated {
            Some(ended) => format!("Init:{}", exit_reason(ended)),
            None if !waiting.is_empty() && waiting != "PodInitializing" => format!("Init:{waiting}"),
            None => format!("Init:{index}/{total}"),
        };
        return (true, sidecars);
    }
    (false, sidecars)
}

fn main_containers(pod: &Value, out: &mut Summary) {
    let mut running = false;
    for status in items(pod, &["status", "containerStatuses"]).iter().rev() {
        out.restarts += status["restartCount"].as_i64().unwrap_or(0);
        out.last_restart = out.last_restart.max(restarted_at(status));
        let waiting = text(status, &["state", "waiting", "reason"]);
        if !waiting.is_empty() {
            out.reason = waiting.into();
        } else if let Some(ended) = at(status, &["state", "terminated"]) {
            out.reason = exit_reason(ended);
        } else if status["ready"] == true && at(status, &["state", "running"]).is_some() {
            running = true;
            out.ready += 1;
        }
    }
    if out.reason == "Completed" && running {
        out.reason = if condition(pod, "Ready") { "Running" } else { "NotReady" }.into();
    }
}

fn pod(object: &Value, name: &str, age: &str, now: Timestamp) -> Vec<Value> {
    let summary = summary(object);
    let restarts = match summary.last_restart {
        Some(time) if summary.restarts != 0 => {
            format!("{} ({} ago)", summary.restarts, human_duration(now.as_second() - time.as_second()))
        }
        _ => summary.restarts.to_string(),
    };
    let ips = items(object, &["status", "podIPs"]);
    let ip = ips.first().map_or_else(|| text(object, &["status", "podIP"]), |one| text(one, &["ip"]));
    let gates = items(object, &["spec", "readinessGates"]);
    let gates = if gates.is_empty() {
        NONE.to_owned()
    } else {
        let passed = gates.iter().filter(|gate| condition(object, text(gate, &["conditionType"]))).count();
        format!("{passed}/{}", gates.len())
    };
    vec![
        name.into(),
        format!("{}/{}", summary.ready, summary.total).into(),
        summary.reason.into(),
        restarts.into(),
        age.into(),
        or_none(ip),
        or_none(text(object, &["spec", "nodeName"])),
        or_none(text(object, &["status", "nominatedNodeName"])),
        gates.into(),
    ]
}

fn node(object: &Value, name: &str, age: &str) -> Vec<Value> {
    let ready = items(object, &["status", "conditions"]).iter().find(|one| one["type"] == "Ready");
    let mut status = match ready.map(|one| text(one, &["status"])) {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }
    .to_owned();
    if object["spec"]["unschedulable"] == true {
        status.push_str(",SchedulingDisabled");
    }
    let mut roles: Vec<&str> = Vec::new();
    for (key, value) in at(object, &["metadata", "labels"]).and_then(Value::as_object).into_iter().flatten() {
        match key.strip_prefix("node-role.kubernetes.io/") {
            Some(role) if !role.is_empty() => roles.push(role),
            _ if key == "kubernetes.io/role" => roles.extend(value.as_str().filter(|role| !role.is_empty())),
            _ => {}
        }
    }
    roles.sort_unstable();
    let address = |kind: &str| {
        let found = items(object, &["status", "addresses"]).iter().find(|one| one["type"] == kind);
        found.map_or_else(|| NONE.into(), |one| or_none(text(one, &["address"])))
    };
    let info = |key: &str| {
        let found = text(object, &["status", "nodeInfo", key]);
        Value::from(if found.is_empty() { "<unknown>" } else { found })
    };
    let architecture = text(object, &["status", "nodeInfo", "architecture"]);
    let mut kernel = text(object, &["status", "nodeInfo", "kernelVersion"]).to_owned();
    if kernel.is_empty() {
        kernel.push_str("<unknown>");
    }
    if !architecture.is_empty() {
        kernel.extend([" (", architecture, ")"]);
    }
    vec![
        name.into(),
        status.into(),
        or_none(&roles.join(",")),
        age.into(),
        text(object, &["status", "nodeInfo", "kubeletVersion"]).into(),
        address("InternalIP"),
        address("ExternalIP"),
        info("osImage"),
        kernel.into(),
        info("containerRuntimeVersion"),
    ]
}

fn event(object: &Value, name: &str, now: Timestamp) -> Vec<Value> {
    let get = |path: &[&str]| text(object, path);
    let time = |text: &str| if text.is_empty() { "<unknown>".to_owned() } else { since(text, now) };
    let event_time = get(&["eventTime"]);
    let first = if get(&["firstTimestamp"]).is_empty() { time(event_time) } else { time(get(&["firstTimestamp"])) };
    let mut last = if get(&["lastTimestamp"]).is_empty() { first.clone() } else { time(get(&["lastTimestamp"])) };
    let mut count = object["count"].as_i64().unwrap_or(0);
    if let Some(series) = at(object, &["series"]) {
        last = time(text(series, &["lastObservedTime"]));
        count = series["count"].as_i64().unwrap_or(0);
    } else if count == 0 {
        count = 1;
    }
    let kind = get(&["involvedObject", "kind"]).to_lowercase();
    let target = get(&["involvedObject", "name"]);
    let target = if target.is_empty() { kind } else { format!("{kind}/{target}") };
    let component = get(&["source", "component"]);
    let component = if component.is_empty() { get(&["reportingComponent"]) } else { component };
    let host = get(&["source", "host"]);
    let host = if host.is_empty() { get(&["reportingInstance"]) } else { host };
    let source = if host.is_empty() { component.to_owned() } else { format!("{component}, {host}") };
    vec![
        last.into(),
        get(&["type"]).into(),
        get(&["reason"]).into(),
        target.into(),
        get(&["involvedObject", "fieldPath"]).into(),
        source.into(),
        get(&["message"]).trim().into(),
        first.into(),
        count.into(),
        name.into(),
    ]
}

fn signing_request(object: &Value, name: &str, age: &str) -> Vec<Value> {
    let conditions = items(object, &["status", "conditions"]);
    let has = |kind: &str| conditions.iter().any(|one| one["type"] == kind);
    let mut state = if has("Denied") {
        "Denied"
    } else if has("Approved") {
        "Approved"
    } else {
        "Pending"
    }
    .to_owned();
    if has("Failed") {
        state.push_str(",Failed");
    }
    if !text(object, &["status", "certificate"]).is_empty() {
        state.push_str(",Issued");
    }
    let duration = at(object, &["spec", "expirationSeconds"]).and_then(Value::as_i64);
    vec![
        name.into(),
        age.into(),
        or_none(text(object, &["spec", "signerName"])),
        text(object, &["spec", "username"]).into(),
        duration.map_or_else(|| NONE.into(), |seconds| human_duration(seconds).into()),
        json!(state),
    ]
}
