//! What a DELETE does to an object: at once, gracefully, or after its finalizers.

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::kinds::{Resource, at, items, rfc3339, text};
use crate::namespaces::CRD_FINALIZER;
use crate::status::{Cause, Status};

/// What to do with the object.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Deletion {
    /// Remove it now. The value is the object as it was at the end.
    Remove(Value),
    /// Write this: it is marked for deletion.
    Mark(Value),
    /// It is marked already: nothing to write.
    Pending,
}

/// Whether a DELETE of this kind answers with the object rather than a `Status`.
#[must_use]
pub(crate) fn answers_object(resource: &Resource) -> bool {
    resource.group.is_empty() && matches!(resource.plural.as_str(), "pods" | "namespaces" | "serviceaccounts")
}

/// Whether a marked object has nothing left to wait for.
#[must_use]
pub(crate) fn finished(resource: &Resource, object: &Value) -> bool {
    object["metadata"].get("deletionTimestamp").is_some_and(|time| !time.is_null())
        && items(object, &["metadata", "finalizers"]).is_empty()
        && (!resource.is("core.Namespace") || items(object, &["spec", "finalizers"]).is_empty())
        && object["metadata"]["deletionGracePeriodSeconds"].as_i64().unwrap_or(0) == 0
}

/// Decides what a DELETE does.
pub(crate) fn plan(resource: &Resource, old: &Value, options: &Value, now: Timestamp) -> Result<Deletion, Status> {
    check_options(options)?;
    check_preconditions(resource, old, options)?;
    let marked = old["metadata"].get("deletionTimestamp").is_some_and(|time| !time.is_null());
    let grace = grace(resource, old, options);
    let mut finalizers = finalizers(old, options, marked);
    if !marked && crate::server::storage_name(resource) == crate::server::CRDS {
        // Its objects go first, while somebody can still watch them go.
        let list = finalizers.get_or_insert_with(|| items(old, &["metadata", "finalizers"]).to_vec());
        if !list.iter().any(|one| one == CRD_FINALIZER) {
            list.push(CRD_FINALIZER.into());
        }
    }
    let held = finalizers.as_ref().map_or_else(|| items(old, &["metadata", "finalizers"]).len(), Vec::len) > 0
        || (resource.is("core.Namespace") && !items(old, &["spec", "finalizers"]).is_empty());
    let mut new = old.clone();
    if let Some(finalizers) = &finalizers {
        new["metadata"]["finalizers"] = finalizers.clone().into();
    }
    if !marked {
        // Only pods are told that they end even when they end at once.
        if held || resource.is("core.Pod") {
            mark(resource, &mut new, grace, now);
        }
        return Ok(if grace > 0 || held { Deletion::Mark(new) } else { Deletion::Remove(new) });
    }
    let before = old["metadata"]["deletionGracePeriodSeconds"].as_i64().unwrap_or(0);
    if grace < before {
        shorten(&mut new, before, grace, now);
        return Ok(if grace > 0 || held { Deletion::Mark(new) } else { Deletion::Remove(new) });
    }
    Ok(match finalizers {
        _ if !held && before == 0 => Deletion::Remove(new),
        Some(_) => Deletion::Mark(new),
        None => Deletion::Pending,
    })
}

fn mark(resource: &Resource, object: &mut Value, grace: i64, now: Timestamp) {
    let when = now.checked_add(SignedDuration::from_secs(grace)).unwrap_or(now);
    object["metadata"]["deletionTimestamp"] = rfc3339(when).into();
    if resource.is("core.Namespace") {
        object["status"]["phase"] = "Terminating".into();
    } else {
        object["metadata"]["deletionGracePeriodSeconds"] = grace.into();
    }
    if let Some(generation) = object["metadata"].get("generation").and_then(Value::as_i64) {
        object["metadata"]["generation"] = (generation + 1).into();
    }
}

/// A later DELETE may only bring the end nearer.
fn shorten(object: &mut Value, before: i64, grace: i64, now: Timestamp) {
    let end = text(object, &["metadata", "deletionTimestamp"]).parse::<Timestamp>().unwrap_or(now);
    let began = end.checked_sub(SignedDuration::from_secs(before)).unwrap_or(end);
    let when = began.checked_add(SignedDuration::from_secs(grace)).unwrap_or(end);
    object["metadata"]["deletionTimestamp"] = rfc3339(when).into();
    object["metadata"]["deletionGracePeriodSeconds"] = grace.into();
}

/// Seconds that the object gets; only pods get any.
fn grace(resource: &Resource, old: &Value, options: &Value) -> i64 {
    if !resource.is("core.Pod") {
        return 0;
    }
    // A pod that no node has, or that ended, has nothing to shut down.
    let phase = text(old, &["status", "phase"]);
    if text(old, &["spec", "nodeName"]).is_empty() || phase == "Failed" || phase == "Succeeded" {
        return 0;
    }
    let given = at(options, &["gracePeriodSeconds"]).and_then(Value::as_i64);
    let own = at(old, &["spec", "terminationGracePeriodSeconds"]).and_then(Value::as_i64);
    let marked = at(old, &["metadata", "deletionGracePeriodSeconds"]).and_then(Value::as_i64);
    let seconds = given.or(marked).or(own).unwrap_or(0);
    if seconds < 0 { 1 } else { seconds }
}

/// The finalizers that the propagation policy asks for, when they differ from those there.
fn finalizers(old: &Value, options: &Value, marked: bool) -> Option<Vec<Value>> {
    let policy = text(options, &["propagationPolicy"]);
    let orphan = match options.get("orphanDependents").and_then(Value::as_bool) {
        Some(true) => "Orphan",
        Some(false) => "Background",
        None => policy,
    };
    let before = items(old, &["metadata", "finalizers"]);
    if orphan.is_empty() && (marked || before.is_empty()) {
        return None;
    }
    let mut after: Vec<Value> = before.to_vec();
    if !orphan.is_empty() {
        after.retain(|one| one != "orphan" && one != "foregroundDeletion");
        match orphan {
            "Orphan" => after.push("orphan".into()),
            "Foreground" => after.push("foregroundDeletion".into()),
            _ => {}
        }
    }
    (after != before).then_some(after)
}

fn check_options(options: &Value) -> Result<(), Status> {
    let policy = text(options, &["propagationPolicy"]);
    let mut causes = Vec::new();
    if !policy.is_empty() && options.get("orphanDependents").is_some() {
        let why = "orphanDependents and deletionPropagation cannot be both set";
        causes.push(Cause::invalid("propagationPolicy", &policy.into(), why));
    }
    if !["", "Foreground", "Background", "Orphan"].contains(&policy) {
        let known = ["Foreground", "Background", "Orphan", "nil"];
        causes.push(Cause::not_supported("propagationPolicy", &policy.into(), &known));
    }
    if causes.is_empty() { Ok(()) } else { Err(Status::invalid_kind("meta.k8s.io", "DeleteOptions", "", causes)) }
}

fn check_preconditions(resource: &Resource, old: &Value, options: &Value) -> Result<(), Status> {
    let name = text(old, &["metadata", "name"]);
    let refuse = |what: &str, key: &str| {
        let (wanted, found) = (text(options, &["preconditions", key]), text(old, &["metadata", key]));
        if at(options, &["preconditions", key]).is_none() || wanted == found {
            return Ok(());
        }
        let kind = if resource.group.is_empty() {
            resource.kind.clone()
        } else {
            format!("{}.{}", resource.kind, resource.group)
        };
        let message = format!(
            "Operation cannot be fulfilled on {kind} {}: the {what} in the precondition ({wanted}) does not match the {what} in record ({found}). The object might have been {}",
            crate::status::quoted(name),
            if key == "uid" { "deleted and then recreated" } else { "modified" }
        );
        let mut details = json!({"name": name, "kind": resource.kind});
        if !resource.group.is_empty() {
            details["group"] = resource.group.clone().into();
        }
        Err(Status { details: Some(details), message, ..Status::modified(resource, name) })
    };
    refuse("UID", "uid")?;
    refuse("ResourceVersion", "resourceVersion")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::Registry;

    fn at_noon() -> Timestamp {
        "2026-01-01T12:00:00Z".parse().unwrap()
    }

    fn pods() -> std::sync::Arc<Resource> {
        Registry::builtin().resource("", "v1", "pods").unwrap()
    }

    fn bound() -> Value {
        json!({"metadata": {"name": "p", "uid": "u", "generation": 1}, "spec": {"nodeName": "n", "terminationGracePeriodSeconds": 30}})
    }

    #[test]
    fn a_bound_pod_is_marked_then_shortened_then_removed() {
        let Deletion::Mark(marked) = plan(&pods(), &bound(), &json!({"gracePeriodSeconds": 20}), at_noon()).unwrap()
        else {
            panic!("marked")
        };
        assert_eq!(marked["metadata"]["deletionTimestamp"], "2026-01-01T12:00:20Z");
        assert_eq!(marked["metadata"]["generation"], 2);
        assert_eq!(plan(&pods(), &marked, &json!({}), at_noon()).unwrap(), Deletion::Pending);
        let Deletion::Mark(sooner) = plan(&pods(), &marked, &json!({"gracePeriodSeconds": 5}), at_noon()).unwrap()
        else {
            panic!("marked again")
        };
        assert_eq!(sooner["metadata"]["deletionTimestamp"], "2026-01-01T12:00:05Z");
        assert_eq!(sooner["metadata"]["generation"], 2);
        let Deletion::Remove(gone) = plan(&pods(), &sooner, &json!({"gracePeriodSeconds": 0}), at_noon()).unwrap()
        else {
            panic!("removed")
        };
        assert_eq!(gone["metadata"]["deletionGracePeriodSeconds"], 0);
    }

    #[test]
    fn finalizers_hold_an_object() {
        let maps = Registry::builtin().resource("", "v1", "configmaps").unwrap();
        let plain = json!({"metadata": {"name": "c", "uid": "u"}});
        assert!(matches!(plan(&maps, &plain, &json!({}), at_noon()).unwrap(), Deletion::Remove(_)));
        let Deletion::Mark(marked) =
            plan(&maps, &plain, &json!({"propagationPolicy": "Foreground"}), at_noon()).unwrap()
        else {
            panic!("marked")
        };
        assert_eq!(marked["metadata"]["finalizers"], json!(["foregroundDeletion"]));
        assert!(!finished(&maps, &marked));
        // A policy that waits for nobody lets it go.
        let background = json!({"propagationPolicy": "Background"});
        assert!(matches!(plan(&maps, &marked, &background, at_noon()).unwrap(), Deletion::Remove(_)));
        let mut done = marked;
        done["metadata"].as_object_mut().unwrap().remove("finalizers");
        assert!(finished(&maps, &done));
    }

    #[test]
    fn preconditions() {
        let options = json!({"preconditions": {"uid": "other"}});
        let refused = plan(&pods(), &bound(), &options, at_noon()).unwrap_err();
        assert_eq!(refused.code, 409);
        assert!(refused.message.contains("the UID in the precondition (other) does not match the UID in record (u)"));
    }
}
