//! Disruption budgets: how many of some pods may be evicted, and whether one more may.
//!
//! The decision is made anew at each eviction, from the pods as they are and the evictions that the budget
//! remembers, within one change of the budget: two evictions at once can't both use the last place.

use std::collections::HashSet;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;

use crate::kinds::{BUDGETS, at, items, text};
use crate::selector::LabelSelector;
use crate::server::Server;
use crate::status::Status;
use crate::store::{Change, Event, Key, Object};

/// How long an eviction is remembered whose pod is still there, unmarked.
const REMEMBERED: SignedDuration = SignedDuration::from_mins(2);
const REFUSED: &str = "Cannot evict pod as it would violate the pod's disruption budget.";
/// Seconds after which an eviction may be tried again.
const AGAIN: u32 = 10;

fn is_ready(pod: &Value) -> bool {
    items(pod, &["status", "conditions"]).iter().any(|one| one["type"] == "Ready" && one["status"] == "True")
}

fn is_deleting(pod: &Value) -> bool {
    at(pod, &["metadata", "deletionTimestamp"]).is_some()
}

fn is_over(pod: &Value) -> bool {
    matches!(text(pod, &["status", "phase"]), "Succeeded" | "Failed")
}

/// A number, or the part of `whole` that a percentage is, rounded up.
fn amount(value: &Value, whole: i64) -> i64 {
    match value.as_str().and_then(|text| text.strip_suffix('%')).and_then(|number| number.parse::<i64>().ok()) {
        Some(percent) => (percent * whole + 99) / 100,
        None => value.as_i64().unwrap_or_default(),
    }
}

/// Whether a budget is about a pod. Without a selector it is about none.
fn covers(budget: &Value, pod: &Value) -> bool {
    at(budget, &["spec", "selector"]).is_some_and(|selector| LabelSelector::of(selector).matches(pod))
}

/// The status of a budget whose namespace has these pods.
fn status(budget: &Value, pods: &[Value], now: Timestamp) -> Value {
    let mine: Vec<&Value> = pods.iter().filter(|pod| covers(budget, pod) && !is_over(pod)).collect();
    let mut disrupted = Map::new();
    for (name, time) in at(budget, &["status", "disruptedPods"]).and_then(Value::as_object).into_iter().flatten() {
        let since = time.as_str().and_then(|time| time.parse::<Timestamp>().ok());
        let fresh = since.is_some_and(|since| now.duration_since(since) < REMEMBERED);
        let waiting = mine.iter().any(|pod| text(pod, &["metadata", "name"]) == name && !is_deleting(pod));
        if fresh && waiting {
            disrupted.insert(name.clone(), time.clone());
        }
    }
    let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    let expected = count(mine.len());
    let healthy = mine
        .iter()
        .filter(|pod| is_ready(pod) && !is_deleting(pod) && !disrupted.contains_key(text(pod, &["metadata", "name"])));
    let healthy = count(healthy.count());
    let desired = match (at(budget, &["spec", "maxUnavailable"]), at(budget, &["spec", "minAvailable"])) {
        (Some(most), _) => (expected - amount(most, expected)).max(0),
        (None, Some(least)) => amount(least, expected),
        (None, None) => 0,
    };
    let allowed = if expected == 0 { 0 } else { (healthy - desired).max(0) };
    let (state, reason) = if allowed > 0 { ("True", "SufficientPods") } else { ("False", "InsufficientPods") };
    let generation = budget["metadata"]["generation"].as_i64().unwrap_or_default();
    let before = items(budget, &["status", "conditions"]).iter().find(|one| one["type"] == "DisruptionAllowed");
    let since = before.filter(|one| one["status"] == state).map(|one| one["lastTransitionTime"].clone());
    let mut out = json!({
        "observedGeneration": generation, "disruptionsAllowed": allowed, "currentHealthy": healthy,
        "desiredHealthy": desired, "expectedPods": expected,
        "conditions": [{
            "type": "DisruptionAllowed", "status": state, "reason": reason, "message": "",
            "observedGeneration": generation,
            "lastTransitionTime": since.unwrap_or_else(|| crate::time::seconds(now).into()),
        }],
    });
    if !disrupted.is_empty() {
        out["disruptedPods"] = disrupted.into();
    }
    out
}

/// What an eviction does to the budget of its pod.
#[derive(Debug, PartialEq)]
enum Verdict {
    /// The pod may go and takes nothing from the budget.
    Free,
    /// The pod may go; this is the budget's status then.
    Counted(Value),
    /// Not now, for this reason.
    Refused(String),
}

/// Whether a pod may be evicted.
fn verdict(budget: &Value, pod: &Value, pods: &[Value], now: Timestamp) -> Verdict {
    let mut status = status(budget, pods, now);
    let number = |name: &str| status[name].as_i64().unwrap_or_default();
    let (allowed, healthy, desired) =
        (number("disruptionsAllowed"), number("currentHealthy"), number("desiredHealthy"));
    if !is_ready(pod) {
        let always = text(budget, &["spec", "unhealthyPodEvictionPolicy"]) == "AlwaysAllow";
        // The others are as many as there have to be: one that isn't ready adds nothing to them.
        if always || (healthy >= desired && desired > 0) {
            return Verdict::Free;
        }
    }
    let name = text(pod, &["metadata", "name"]);
    if status["disruptedPods"].get(name).is_some() {
        // Asked for again: it has its place.
        return Verdict::Free;
    }
    if allowed == 0 {
        return Verdict::Refused(format!(
            "The disruption budget {} needs {desired} healthy pods and has {healthy} currently",
            text(budget, &["metadata", "name"])
        ));
    }
    status["disruptedPods"][name] = crate::time::seconds(now).into();
    status["disruptionsAllowed"] = (allowed - 1).into();
    Verdict::Counted(status)
}

fn refused(why: &str) -> Status {
    Status {
        code: 429,
        reason: "TooManyRequests",
        message: REFUSED.into(),
        details: Some(json!({ "causes": [{ "reason": "DisruptionBudget", "message": why }] })),
        retry_after: Some(AGAIN),
    }
}

fn pods_of(server: &Server, namespace: &str) -> Vec<Value> {
    server.store.list("pods", Some(namespace)).objects.iter().map(|pod| pod.value()).collect()
}

/// Asks the budgets whether a pod may be evicted, and counts it there.
pub(crate) async fn admit(server: &Server, namespace: &str, pod: &Value, dry_run: bool) -> Result<(), Status> {
    if is_over(pod) || is_deleting(pod) || text(pod, &["status", "phase"]) == "Pending" {
        return Ok(());
    }
    let budgets = server.store.list(BUDGETS, Some(namespace)).objects;
    let mine: Vec<Arc<Object>> = budgets.into_iter().filter(|budget| covers(&budget.value(), pod)).collect();
    let budget = match mine.as_slice() {
        [] => return Ok(()),
        [budget] => budget,
        _ => {
            return Err(Status::internal(
                "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
            ));
        }
    };
    let change = |old: &Value| -> Result<Change, Status> {
        match verdict(old, pod, &pods_of(server, namespace), Timestamp::now()) {
            Verdict::Free => Ok(Change::Keep),
            Verdict::Refused(why) => Err(refused(&why)),
            Verdict::Counted(status) => {
                let mut next = old.clone();
                next["status"] = status;
                Ok(Change::Put(next))
            }
        }
    };
    if dry_run {
        return change(&budget.value()).map(|_| ());
    }
    let counted: Result<_, Status> = server
        .store
        .mutate(budget.key(), None, |old, _| old.map_or_else(|| Err(Status::no_route()), |old| change(&old.value())))
        .await;
    match counted {
        // The budget went away meanwhile.
        Err(status) if status.code == 404 => Ok(()),
        other => other.map(|_| ()),
    }
}

/// Keeps the budgets' status true until `stop` is cancelled.
pub(crate) async fn run(server: Arc<Server>, stop: CancellationToken) {
    loop {
        let mut feed = server.store.watch_now(None);
        let mut dirty: HashSet<Arc<str>> =
            server.store.list(BUDGETS, None).objects.iter().map(|budget| budget.key().namespace.clone()).collect();
        loop {
            for namespace in std::mem::take(&mut dirty) {
                refresh(&server, &namespace).await;
            }
            let event = tokio::select! {
                () = stop.cancelled() => return,
                event = feed.events.recv() => event,
            };
            let Some(event) = event else { break };
            let mut note = |event: &Event| {
                let key = event.object.key();
                if &*key.resource == "pods" || &*key.resource == BUDGETS {
                    dirty.insert(key.namespace.clone());
                }
            };
            note(&event);
            while let Ok(event) = feed.events.try_recv() {
                note(&event);
            }
        }
    }
}

async fn refresh(server: &Server, namespace: &str) {
    let budgets = server.store.list(BUDGETS, Some(namespace)).objects;
    if budgets.is_empty() {
        return;
    }
    let pods = pods_of(server, namespace);
    for budget in budgets {
        let written: Result<_, Status> = server
            .store
            .mutate(budget.key(), None, |old, _| {
                let old = old.ok_or_else(Status::no_route)?.value();
                let status = status(&old, &pods, Timestamp::now());
                if old["status"] == status {
                    return Ok(Change::Keep);
                }
                let mut next = old;
                next["status"] = status;
                Ok(Change::Put(next))
            })
            .await;
        if let Err(status) = written
            && status.code != 404
        {
            tracing::warn!(budget = ?Key::clone(budget.key()), error = %status, "a disruption budget's status is old");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Timestamp {
        "2026-01-01T12:00:00Z".parse().unwrap()
    }

    fn pod(name: &str, ready: bool) -> Value {
        json!({
            "metadata": { "name": name, "labels": { "app": "a" } },
            "status": {
                "phase": "Running",
                "conditions": [{ "type": "Ready", "status": if ready { "True" } else { "False" } }],
            },
        })
    }

    fn budget(spec: &Value) -> Value {
        let mut budget = json!({ "metadata": { "name": "b", "generation": 3 }, "spec": spec });
        budget["spec"]["selector"] = json!({ "matchLabels": { "app": "a" } });
        budget
    }

    fn pods(ready: usize, sick: usize) -> Vec<Value> {
        let ready = (0..ready).map(|number| pod(&format!("r{number}"), true));
        ready.chain((0..sick).map(|number| pod(&format!("s{number}"), false))).collect()
    }

    #[test]
    fn counts_what_may_go() {
        for (spec, ready, sick, allowed) in [
            (json!({ "minAvailable": 2 }), 3, 0, 1),
            (json!({ "minAvailable": 2 }), 2, 3, 0),
            (json!({ "minAvailable": "50%" }), 3, 0, 1),
            (json!({ "maxUnavailable": 1 }), 3, 0, 1),
            (json!({ "maxUnavailable": 1 }), 3, 1, 0),
            (json!({ "maxUnavailable": "34%" }), 3, 0, 2),
            (json!({ "maxUnavailable": 0 }), 3, 0, 0),
            (json!({ "minAvailable": 0 }), 0, 0, 0),
        ] {
            let found = status(&budget(&spec), &pods(ready, sick), now());
            assert_eq!(found["disruptionsAllowed"], allowed, "{spec} with {ready} ready and {sick} sick: {found}");
            assert_eq!(found["observedGeneration"], 3);
        }
        // No selector, no pods; and others' pods don't count.
        let mut none = budget(&json!({ "minAvailable": 0 }));
        none["spec"].as_object_mut().unwrap().remove("selector");
        assert_eq!(status(&none, &pods(3, 0), now())["expectedPods"], 0);
    }

    #[test]
    fn an_eviction_takes_its_place_until_the_pod_is_marked() {
        let all = pods(3, 0);
        let mut budget = budget(&json!({ "minAvailable": 2 }));
        let Verdict::Counted(after) = verdict(&budget, &all[0], &all, now()) else { panic!("may go") };
        assert_eq!((&after["disruptionsAllowed"], after["disruptedPods"].as_object().unwrap().len()), (&json!(0), 1));
        budget["status"] = after;
        assert!(matches!(verdict(&budget, &all[1], &all, now()), Verdict::Refused(_)));
        assert_eq!(verdict(&budget, &all[0], &all, now()), Verdict::Free);
        // Forgotten after a while, when nothing came of it.
        let later = now() + REMEMBERED;
        assert!(matches!(verdict(&budget, &all[1], &all, later), Verdict::Counted(_)));
        let mut marked = all.clone();
        marked[0]["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:30Z".into();
        assert!(matches!(verdict(&budget, &all[1], &marked, now()), Verdict::Refused(_)));
        assert!(status(&budget, &marked, now()).get("disruptedPods").is_none());
    }

    #[test]
    fn a_sick_pod_goes_when_the_others_suffice() {
        let all = pods(2, 1);
        assert_eq!(verdict(&budget(&json!({ "minAvailable": 2 })), &all[2], &all, now()), Verdict::Free);
        let few = pods(1, 1);
        let strict = budget(&json!({ "minAvailable": 2 }));
        assert!(matches!(verdict(&strict, &few[1], &few, now()), Verdict::Refused(_)));
        let lax = budget(&json!({ "minAvailable": 2, "unhealthyPodEvictionPolicy": "AlwaysAllow" }));
        assert_eq!(verdict(&lax, &few[1], &few, now()), Verdict::Free);
    }
}
