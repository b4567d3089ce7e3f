//! The scheduler: assigns each pod to a node as soon as it appears.
//!
//! It follows pods and nodes, keeps what is used on each node, and tries waiting pods again when
//! something changed that could help them. Decisions are made one after another on what is known,
//! including assignments still being written; the writes go together.

mod fit;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt as _};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::events::{self, Note};
use crate::kinds::{self, Context};
use crate::server::Server;
use crate::status::Status;
use crate::store::{Change, Event, EventKind, Key, Object};

use fit::{Host, Offer, Wants};

/// The scheduler's name, which pods ask for.
const NAME: &str = "default-scheduler";
/// How long an assignment waits that the store couldn't write.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A pod that takes room on a node.
#[derive(Debug)]
struct Placed {
    node: String,
    requests: fit::Amounts,
}

/// A pod that waits for a node.
#[derive(Debug)]
struct Waiting {
    key: Key,
    uid: String,
    priority: i64,
    /// The revision at which it appeared: earlier ones go first.
    since: u64,
    wants: Wants,
    /// Why it was refused last.
    refused: Option<String>,
}

#[derive(Debug, Default)]
struct State {
    hosts: BTreeMap<String, Host>,
    placed: HashMap<String, Placed>,
    waiting: HashMap<String, Waiting>,
}

/// What is to be done for one waiting pod.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Bind { uid: String, node: String },
    Refuse { uid: String, why: String },
}

impl State {
    fn forget(&mut self, uid: &str) {
        if let Some(placed) = self.placed.remove(uid)
            && let Some(host) = self.hosts.get_mut(&placed.node)
        {
            fit::occupy(&mut host.used, &placed.requests, -1);
        }
    }

    fn place(&mut self, uid: &str, node: &str, requests: fit::Amounts) {
        self.forget(uid);
        let host = self.hosts.entry(node.to_owned()).or_default();
        fit::occupy(&mut host.used, &requests, 1);
        self.placed.insert(uid.to_owned(), Placed { node: node.to_owned(), requests });
    }

    /// Takes in a pod as it is now. Returns whether room was made for others.
    fn see_pod(&mut self, object: &Object, gone: bool) -> bool {
        let uid = object.uid();
        let digest = object.digest();
        let over = gone || matches!(digest["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
        if over {
            self.waiting.remove(uid);
            let had = self.placed.contains_key(uid);
            self.forget(uid);
            return had;
        }
        if let Some(node) = digest["spec"]["nodeName"].as_str().filter(|node| !node.is_empty()) {
            self.waiting.remove(uid);
            if self.placed.get(uid).is_none_or(|placed| placed.node != node) {
                self.place(uid, node, Wants::of(&object.value()).requests);
            }
            return false;
        }
        if object.is_deleting() || digest["spec"]["schedulerName"] != NAME {
            self.waiting.remove(uid);
            return false;
        }
        if self.placed.contains_key(uid) {
            // Its assignment is on the way.
            return false;
        }
        let pod = object.value();
        let gated = pod["spec"]["schedulingGates"].as_array().is_some_and(|gates| !gates.is_empty());
        if gated {
            self.waiting.remove(uid);
            return false;
        }
        let wants = Wants::of(&pod);
        let before = self.waiting.remove(uid);
        let known = before.as_ref();
        let refused = known.and_then(|known| known.refused.clone());
        // Its own status change is no reason to try again.
        let refused = refused.filter(|_| known.is_some_and(|known| known.wants == wants));
        let since = known.map_or(object.revision(), |known| known.since);
        let priority = pod["spec"]["priority"].as_i64().unwrap_or_default();
        self.waiting.insert(
            uid.to_owned(),
            Waiting { key: object.key().clone(), uid: uid.to_owned(), priority, since, wants, refused },
        );
        false
    }

    /// Takes in a node as it is now. Returns whether it offers something else than before.
    fn see_node(&mut self, object: &Object, gone: bool) -> bool {
        let name = object.key().name.to_string();
        if gone {
            if let Some(host) = self.hosts.get_mut(&name) {
                host.offer = Offer::default();
            }
            return false;
        }
        let offer = Offer::of(&object.value());
        let host = self.hosts.entry(name).or_default();
        let changed = host.offer != offer;
        host.offer = offer;
        changed
    }

    /// Decides for all waiting pods that weren't refused already (or for all, when `again`).
    fn decide(&mut self, again: bool) -> Vec<Decision> {
        let mut order: Vec<(i64, u64, String)> = self
            .waiting
            .values()
            .filter(|one| (again || one.refused.is_none()) && !self.placed.contains_key(&one.uid))
            .map(|one| (-one.priority, one.since, one.uid.clone()))
            .collect();
        order.sort();
        let mut decisions = Vec::new();
        for (_, _, uid) in order {
            let Some(one) = self.waiting.get_mut(&uid) else { continue };
            // A host without an offer is known by its pods only.
            match fit::choose(&one.wants, self.hosts.values().filter(|host| !host.offer.name.is_empty())) {
                Ok(node) => {
                    let requests = one.wants.requests.clone();
                    self.place(&uid, &node, requests);
                    decisions.push(Decision::Bind { uid, node });
                }
                Err(why) if one.refused.as_ref() != Some(&why) => {
                    one.refused = Some(why.clone());
                    decisions.push(Decision::Refuse { uid, why });
                }
                Err(_) => {}
            }
        }
        decisions
    }
}

/// Schedules until `stop` is cancelled.
pub(crate) async fn run(server: Arc<Server>, stop: CancellationToken) {
    loop {
        let mut feed = server.store.watch_now(None);
        let mut state = State::default();
        for node in &server.store.list("nodes", None).objects {
            state.see_node(node, false);
        }
        for pod in &server.store.list("pods", None).objects {
            state.see_pod(pod, false);
        }
        let mut writes = FuturesUnordered::new();
        let mut again = true;
        loop {
            for decision in state.decide(again) {
                let (Decision::Bind { uid, .. } | Decision::Refuse { uid, .. }) = &decision;
                let Some(one) = state.waiting.get(uid) else { continue };
                writes.push(write(server.clone(), one.key.clone(), decision));
            }
            again = false;
            tokio::select! {
                () = stop.cancelled() => return,
                Some(failed) = writes.next() => {
                    if let Some(uid) = failed {
                        // It stays where it was: waiting, without room of its own.
                        state.forget(&uid);
                    }
                }
                event = feed.events.recv() => {
                    let Some(event) = event else { break };
                    again |= see(&mut state, &event);
                    while let Ok(event) = feed.events.try_recv() {
                        again |= see(&mut state, &event);
                    }
                }
            }
        }
    }
}

fn see(state: &mut State, event: &Event) -> bool {
    let gone = event.kind == EventKind::Delete;
    match &*event.object.key().resource {
        "pods" => state.see_pod(&event.object, gone),
        "nodes" => state.see_node(&event.object, gone),
        _ => false,
    }
}

/// Carries out a decision. Returns the pod's UID when an assignment didn't work out.
async fn write(server: Arc<Server>, key: Key, decision: Decision) -> Option<String> {
    match decision {
        Decision::Bind { uid, node } => match bind(&server, &key, &uid, &node).await {
            Ok(pod) => {
                // People may read it later; the next pod needn't wait.
                tokio::spawn(async move {
                    let meta = &pod["metadata"];
                    let text = |field: &str| meta[field].as_str().unwrap_or_default();
                    let message = format!("Successfully assigned {}/{} to {node}", text("namespace"), text("name"));
                    let note = Note {
                        component: NAME,
                        kind: "Normal",
                        reason: "Scheduled",
                        action: "Binding",
                        message: &message,
                    };
                    events::about_pod(&server, &pod, note).await;
                });
                None
            }
            Err(status) => {
                if status.code != 404 && status.code != 409 {
                    tracing::warn!(pod = ?key, error = %status, "a pod can't be assigned");
                }
                if status.code >= 500 {
                    // The pod keeps its place meanwhile: it is tried again when this returns.
                    tokio::time::sleep(RETRY_AFTER).await;
                }
                Some(uid)
            }
        },
        Decision::Refuse { uid, why } => {
            match refuse(&server, &key, &uid, &why).await {
                Ok(pod) => {
                    let note = Note {
                        component: NAME,
                        kind: "Warning",
                        reason: "FailedScheduling",
                        action: "Scheduling",
                        message: &why,
                    };
                    events::about_pod(&server, &pod, note).await;
                }
                Err(status) if status.code == 404 => {}
                Err(status) => tracing::warn!(pod = ?key, error = %status, "a refusal can't be written"),
            }
            None
        }
    }
}

fn same_pod<'a>(old: Option<&'a Arc<Object>>, uid: &str) -> Result<&'a Arc<Object>, Status> {
    old.filter(|old| old.uid() == uid).ok_or_else(Status::no_route)
}

async fn bind(server: &Server, key: &Key, uid: &str, node: &str) -> Result<Value, Status> {
    let now = jiff::Timestamp::now();
    let binding = json!({ "apiVersion": "v1", "kind": "Binding", "metadata": { "name": &*key.name }, "target": { "kind": "Node", "name": node } });
    let context = Context {
        namespace: key.namespace(),
        name: Some(&key.name),
        user: "system:kube-scheduler",
        ..Context::plain("kube-scheduler", now)
    };
    let pods = server.resource_of("v1", "Pod").ok_or_else(Status::no_route)?;
    let outcome = server
        .store
        .mutate(key, None, |old, _| {
            kinds::bind(&pods, &same_pod(old, uid)?.value(), &binding, &context).map(Change::Put)
        })
        .await?;
    Ok(outcome.object.value())
}

async fn refuse(server: &Server, key: &Key, uid: &str, why: &str) -> Result<Value, Status> {
    let now = crate::time::seconds(jiff::Timestamp::now());
    let outcome = server
        .store
        .mutate(key, None, |old, _| {
            let mut pod = same_pod(old, uid)?.value();
            if pod["spec"]["nodeName"].is_string() {
                return Err(Status::no_route());
            }
            Ok(if set_unschedulable(&mut pod, why, &now) { Change::Put(pod) } else { Change::Keep })
        })
        .await?;
    Ok(outcome.object.value())
}

/// Sets the condition `PodScheduled` to False. Returns whether that changed anything.
fn set_unschedulable(pod: &mut Value, why: &str, now: &str) -> bool {
    let mut condition = json!({
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": why,
        "lastProbeTime": null, "lastTransitionTime": now,
    });
    let status = &mut pod["status"];
    if !status["conditions"].is_array() {
        status["conditions"] = json!([]);
    }
    let Some(conditions) = status["conditions"].as_array_mut() else { return false };
    let Some(found) = conditions.iter_mut().find(|one| one["type"] == "PodScheduled") else {
        conditions.push(condition);
        return true;
    };
    if found["status"] == "False" {
        condition["lastTransitionTime"] = found["lastTransitionTime"].clone();
    }
    let changed = *found != condition;
    *found = condition;
    changed
}
