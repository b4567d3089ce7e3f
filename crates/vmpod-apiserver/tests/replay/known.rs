//! Where we knowingly answer differently from the recorded server, and why. `docs/api.md` has the same table.

use serde_json::Value;

/// A difference that is meant.
pub(crate) struct Known {
    /// `FILE/INDEX` of the exchange.
    pub(crate) exchange: &'static str,
    /// The start of the paths in the answer that may differ.
    pub(crate) path: &'static str,
    /// Why.
    pub(crate) reason: &'static str,
}

/// The differences that are meant.
pub(crate) const KNOWN: &[Known] = &[
    Known {
        exchange: "01-discovery/10",
        path: "/contentType",
        reason: "the index of OpenAPI documents is JSON and says so; the real server calls it plain text",
    },
    Known {
        exchange: "06-tables/7",
        path: "/body/rows",
        reason: "one process is the whole control plane: there are no leases to elect its parts",
    },
    Known {
        exchange: "10-nodes-leases-binding/2",
        path: "/body/rows/0/object/metadata/annotations",
        reason: "no controller sets the node's ttl annotation, which only spares very large clusters some reads",
    },
    Known {
        exchange: "14-auth-reviews-and-tokens/3",
        path: "/body/status/reason",
        reason: "the recorded reason is a distribution's own authorizer speaking",
    },
    Known {
        exchange: "14-auth-reviews-and-tokens/5",
        path: "/body/status/userInfo/extra",
        reason: "a client in this process has no certificate whose hash could be shown",
    },
];

/// The entry that covers a difference.
pub(crate) fn find(exchange: &str, path: &str) -> Option<usize> {
    KNOWN.iter().position(|one| one.exchange == exchange && path.starts_with(one.path))
}

/// Our answer without the group that a real cluster has from another server, which wasn't there when it was recorded.
pub(crate) fn without_metrics(exchange: &str, ours: &Value) -> Value {
    let mut out = ours.clone();
    if exchange.starts_with("01-discovery") {
        if let Some(groups) = out["body"].get_mut("groups").and_then(Value::as_array_mut) {
            groups.retain(|one| one["name"] != "metrics.k8s.io");
        }
        if let Some(paths) = out["body"].get_mut("paths").and_then(Value::as_object_mut) {
            paths.retain(|path, _| !path.contains("metrics.k8s.io"));
        }
    }
    out
}

/// The recorded answer, narrowed to the kinds served here: discovery must list those as recorded, and none else.
pub(crate) fn served_here(exchange: &str, recorded: &Value, ours: &Value) -> Value {
    let mut out = recorded.clone();
    if !exchange.starts_with("01-discovery") {
        return out;
    }
    for list in ["resources", "groups"] {
        let names: Vec<Value> =
            ours["body"][list].as_array().into_iter().flatten().map(|one| one["name"].clone()).collect();
        if let Some(recorded) = out["body"].get_mut(list).and_then(Value::as_array_mut) {
            recorded.retain(|one| names.contains(&one["name"]));
            // The order of groups is that of start-up.
            recorded.sort_by_key(|one| names.iter().position(|name| *name == one["name"]));
        }
    }
    if let Some(recorded) = out["body"].get_mut("paths").and_then(Value::as_object_mut) {
        recorded.retain(|path, _| ours["body"]["paths"].get(path).is_some());
    }
    out
}
