//! Events: those that the controllers write, and the `events.k8s.io/v1` view of all of them.

use serde_json::{Map, Value, json};

use crate::server::Server;
use crate::status::Status;
use crate::store::{Change, Key};

/// The group of the newer view; events are stored in the core form.
pub(crate) const GROUP: &str = "events.k8s.io";

/// The fields that have another name in the newer view: core's, the newer one's.
const NAMES: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("reportingComponent", "reportingController"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
];

fn rename(value: &mut Value, from_to: impl Fn(&str) -> Option<&'static str>, versions: (&str, &str)) {
    let Some(map) = value.as_object_mut() else { return };
    let renamed: Map<String, Value> =
        std::mem::take(map).into_iter().map(|(name, value)| (from_to(&name).map_or(name, Into::into), value)).collect();
    *map = renamed;
    if let Some(version) = map.get_mut("apiVersion")
        && version == versions.0
    {
        *version = versions.1.into();
    }
}

/// From the newer view to the stored form. A merge patch is translated the same way.
pub(crate) fn to_core(value: &mut Value) {
    rename(value, |name| NAMES.iter().find(|(_, new)| *new == name).map(|(core, _)| *core), ("events.k8s.io/v1", "v1"));
}

/// From the stored form to the newer view.
pub(crate) fn to_new(value: &mut Value) {
    rename(value, |name| NAMES.iter().find(|(core, _)| *core == name).map(|(_, new)| *new), ("v1", "events.k8s.io/v1"));
}

/// An event about a pod, by a controller.
pub(crate) struct Note<'a> {
    pub(crate) component: &'a str,
    pub(crate) kind: &'a str,
    pub(crate) reason: &'a str,
    pub(crate) action: &'a str,
    pub(crate) message: &'a str,
}

/// Writes an event about a pod. Events are for people: one that can't be written is only logged.
pub(crate) async fn about_pod(server: &Server, pod: &Value, note: Note<'_>) {
    let meta = &pod["metadata"];
    let (namespace, name) = (meta["namespace"].as_str().unwrap_or_default(), meta["name"].as_str().unwrap_or_default());
    let now = jiff::Timestamp::now();
    let suffix = uuid::Uuid::new_v4().simple().to_string();
    let event_name = format!("{name}.{}", suffix.get(..16).unwrap_or(&suffix));
    let event = json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": event_name, "namespace": namespace, "uid": uuid::Uuid::new_v4().to_string(),
            "creationTimestamp": crate::time::seconds(now),
        },
        "involvedObject": {
            "apiVersion": "v1", "kind": "Pod", "name": name, "namespace": namespace,
            "uid": meta["uid"], "resourceVersion": meta["resourceVersion"],
        },
        "type": note.kind,
        "reason": note.reason,
        "action": note.action,
        "message": note.message,
        "source": { "component": note.component },
        "reportingComponent": note.component,
        "reportingInstance": note.component,
        "firstTimestamp": crate::time::seconds(now),
        "lastTimestamp": crate::time::seconds(now),
        "eventTime": null,
        "count": 1,
    });
    let key = Key::new("events", Some(namespace), &event_name);
    let namespace_key = Key::new("namespaces", None, namespace);
    let written: Result<_, Status> = server
        .store
        .mutate(&key, Some(&namespace_key), |_, namespace| match namespace {
            Some(found) if !found.is_deleting() => Ok(Change::Put(event.clone())),
            _ => Err(Status::no_route()),
        })
        .await;
    if let Err(status) = written
        && status.code != 404
    {
        tracing::warn!(error = %status, "an event can't be written");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_views_hold_the_same() {
        let new = json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": { "name": "e" }, "note": "n", "reason": "R",
            "regarding": { "kind": "Pod" }, "reportingController": "c", "reportingInstance": "i", "deprecatedCount": 2,
        });
        let mut core = new.clone();
        to_core(&mut core);
        assert_eq!(
            core,
            json!({
                "apiVersion": "v1", "kind": "Event", "metadata": { "name": "e" }, "message": "n", "reason": "R",
                "involvedObject": { "kind": "Pod" }, "reportingComponent": "c", "reportingInstance": "i", "count": 2,
            })
        );
        let mut back = core;
        to_new(&mut back);
        assert_eq!(back, new);
    }
}
