//! The nodes' life: a node that stops renewing its lease becomes Unknown, and taints tell of
//! conditions, as Kubernetes' node lifecycle controller does. Pods are not evicted from a lost
//! node: on one machine there is nowhere else to go.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tokio_util::time::DelayQueue;
use tokio_util::time::delay_queue;

use crate::server::Server;
use crate::status::Status;
use crate::store::{Change, EventKind, Key};

/// The namespace and storage name of the nodes' leases.
const LEASE_NAMESPACE: &str = "kube-node-lease";
const LEASES: &str = "leases.coordination.k8s.io";
/// How long a node may be silent.
const GRACE: Duration = Duration::from_secs(50);

const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// Conditions that are a reason to send nothing more, and their taints.
const PRESSURES: [(&str, &str); 4] = [
    ("MemoryPressure", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "node.kubernetes.io/network-unavailable"),
];

/// Whether a taint repeats what the Ready condition says.
pub(crate) fn tells_readiness(key: &str) -> bool {
    key == NOT_READY || key == UNREACHABLE
}

/// Whether this controller puts and removes a taint.
fn is_ours(taint: &Value) -> bool {
    let key = taint["key"].as_str().unwrap_or_default();
    taint["effect"] == "NoSchedule"
        && (tells_readiness(key) || key == UNSCHEDULABLE || PRESSURES.iter().any(|(_, one)| *one == key))
}

fn condition<'a>(node: &'a Value, kind: &str) -> &'a str {
    let found = node["status"]["conditions"].as_array().into_iter().flatten().find(|one| one["type"] == kind);
    found.and_then(|one| one["status"].as_str()).unwrap_or_default()
}

/// The node with the taints its conditions call for; `None` when it has them.
fn tainted(node: &Value) -> Option<Value> {
    let mut wanted: Vec<&str> = Vec::new();
    match condition(node, "Ready") {
        "True" => {}
        "Unknown" => wanted.push(UNREACHABLE),
        _ => wanted.push(NOT_READY),
    }
    wanted.extend(PRESSURES.iter().filter(|(kind, _)| condition(node, kind) == "True").map(|(_, key)| *key));
    if node["spec"]["unschedulable"] == true {
        wanted.push(UNSCHEDULABLE);
    }
    let taints: Vec<Value> = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
    let has = |key: &str| taints.iter().any(|taint| is_ours(taint) && taint["key"] == key);
    let extra = taints.iter().any(|taint| is_ours(taint) && !wanted.iter().any(|key| taint["key"] == *key));
    if !extra && wanted.iter().all(|key| has(key)) {
        return None;
    }
    let mut kept: Vec<Value> = taints
        .iter()
        .filter(|taint| !is_ours(taint) || wanted.iter().any(|key| taint["key"] == *key))
        .cloned()
        .collect();
    kept.extend(wanted.iter().filter(|key| !has(key)).map(|key| json!({ "key": key, "effect": "NoSchedule" })));
    let mut node = node.clone();
    if kept.is_empty() {
        if let Some(spec) = node["spec"].as_object_mut() {
            spec.remove("taints");
        }
    } else {
        node["spec"]["taints"] = kept.into();
    }
    Some(node)
}

/// The node with its conditions Unknown; `None` when they are.
fn lost(node: &Value, now: Timestamp) -> Option<Value> {
    let now = crate::time::seconds(now);
    let mut node = node.clone();
    let conditions = node["status"]["conditions"].as_array_mut()?;
    let mut changed = false;
    for one in conditions.iter_mut() {
        if one["status"] != "Unknown" {
            one["status"] = "Unknown".into();
            one["reason"] = "NodeStatusUnknown".into();
            one["message"] = "Kubelet stopped posting node status.".into();
            one["lastTransitionTime"] = now.clone().into();
            changed = true;
        }
    }
    changed.then_some(node)
}

/// Follows the nodes until `stop` is cancelled.
pub(crate) async fn run(server: Arc<Server>, stop: CancellationToken) {
    loop {
        let mut feed = server.store.watch_now(None);
        let mut silence: DelayQueue<String> = DelayQueue::new();
        let mut timers: HashMap<String, delay_queue::Key> = HashMap::new();
        let heard =
            |silence: &mut DelayQueue<String>, timers: &mut HashMap<String, delay_queue::Key>, node: &str| match timers
                .get(node)
            {
                Some(timer) => silence.reset(timer, GRACE),
                None => {
                    timers.insert(node.to_owned(), silence.insert(node.to_owned(), GRACE));
                }
            };
        for node in &server.store.list("nodes", None).objects {
            // After a start everybody gets the whole time.
            heard(&mut silence, &mut timers, &node.key().name);
            settle(&server, node.key(), tainted).await;
        }
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(node) = silence.next(), if !silence.is_empty() => {
                    let name = node.into_inner();
                    timers.remove(&name);
                    let now = Timestamp::now();
                    settle(&server, &Key::new("nodes", None, &name), |node| lost(node, now)).await;
                }
                event = feed.events.recv() => {
                    let Some(event) = event else { break };
                    let key = event.object.key();
                    match (&*key.resource, event.kind) {
                        ("nodes", EventKind::Put) => {
                            let fresh = event.before.is_none();
                            if fresh {
                                heard(&mut silence, &mut timers, &key.name);
                            }
                            settle(&server, key, tainted).await;
                        }
                        ("nodes", EventKind::Delete) => {
                            if let Some(timer) = timers.remove(&*key.name) {
                                silence.remove(&timer);
                            }
                        }
                        (LEASES, EventKind::Put)
                            if &*key.namespace == LEASE_NAMESPACE && server.store.get(&Key::new("nodes", None, &key.name)).is_some() =>
                        {
                            heard(&mut silence, &mut timers, &key.name);
                        }
                        _ => {}
                    }
                }
            }
        }
    }
}

async fn settle(server: &Server, key: &Key, plan: impl Fn(&Value) -> Option<Value>) {
    let result: Result<_, Status> = server
        .store
        .mutate(key, None, |old, _| {
            let old = old.ok_or_else(Status::no_route)?;
            Ok(plan(&old.value()).map_or(Change::Keep, Change::Put))
        })
        .await;
    if let Err(status) = result
        && status.code != 404
    {
        tracing::warn!(node = %key.name, error = %status, "a node's state can't be written");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(ready: &str) -> Value {
        json!({
            "spec": { "taints": [{ "key": "k", "effect": "NoSchedule" }] },
            "status": { "conditions": [{ "type": "Ready", "status": ready }, { "type": "DiskPressure", "status": "False" }] },
        })
    }

    fn keys(node: &Value) -> Vec<&str> {
        node["spec"]["taints"].as_array().into_iter().flatten().filter_map(|taint| taint["key"].as_str()).collect()
    }

    #[test]
    fn taints_follow_conditions_and_leave_others_alone() {
        assert_eq!(tainted(&node("True")), None);
        let mut waiting = tainted(&node("False")).unwrap();
        assert_eq!(keys(&waiting), ["k", NOT_READY]);
        assert_eq!(tainted(&waiting), None);
        waiting["status"]["conditions"][1]["status"] = "True".into();
        waiting["status"]["conditions"][0]["status"] = "Unknown".into();
        let mut unreachable = tainted(&waiting).unwrap();
        assert_eq!(keys(&unreachable), ["k", UNREACHABLE, "node.kubernetes.io/disk-pressure"]);
        unreachable["status"] = node("True")["status"].clone();
        assert_eq!(keys(&tainted(&unreachable).unwrap()), ["k"]);
    }

    #[test]
    fn silence_makes_conditions_unknown_once() {
        let now = Timestamp::from_second(0).unwrap();
        let gone = lost(&node("True"), now).unwrap();
        assert_eq!(condition(&gone, "Ready"), "Unknown");
        assert_eq!(gone["status"]["conditions"][0]["lastTransitionTime"], "1970-01-01T00:00:00Z");
        assert_eq!(lost(&gone, now), None);
    }
}
