//! What may change in a pod that exists, and the quality-of-service class of one.

use serde_json::Value;

use super::{at, items, pod, text};
use crate::quantity::Quantity;
use crate::status::Cause;

const UPDATABLE: &str = "`spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";

/// The rules of an update of a pod or of one of its subresources.
pub(super) fn validate(subresource: Option<&str>, new: &Value, old: &Value, causes: &mut Vec<Cause>) {
    match subresource {
        None => validate_spec(&new["spec"], &old["spec"], causes),
        Some("status") => validate_status(new, old, causes),
        Some("ephemeralcontainers") => validate_ephemeral(&new["spec"], &old["spec"], causes),
        _ => {}
    }
}

fn validate_spec(new: &Value, old: &Value, causes: &mut Vec<Cause>) {
    for key in ["containers", "initContainers"] {
        if items(new, &[key]).len() != items(old, &[key]).len() {
            causes.push(Cause::forbidden(format!("spec.{key}"), "pod updates may not add or remove containers"));
            return;
        }
    }
    pod::validate_spec(new, causes);
    if !causes.is_empty() {
        return;
    }
    deadline(new, old, causes);
    added_only(new, old, causes);
    gates(new, old, causes);
    if !causes.is_empty() {
        return;
    }
    // What may change is taken from the old spec; whatever differs then may not.
    let mut allowed = new.clone();
    for key in ["containers", "initContainers"] {
        let images: Vec<Value> = items(old, &[key]).iter().map(|one| one["image"].clone()).collect();
        for (one, image) in allowed.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten().zip(images) {
            one["image"] = image;
        }
    }
    let mut keep = vec!["activeDeadlineSeconds", "tolerations", "schedulingGates"];
    let grace = |spec: &Value| spec["terminationGracePeriodSeconds"].as_i64().unwrap_or(0);
    if grace(old) < 0 && grace(new) == 1 {
        keep.push("terminationGracePeriodSeconds");
    }
    if !items(old, &["schedulingGates"]).is_empty() {
        keep.extend(["nodeSelector", "affinity"]);
    }
    for key in keep {
        let Some(object) = allowed.as_object_mut() else { return };
        match old.get(key) {
            Some(before) => object.insert(key.into(), before.clone()),
            None => object.remove(key),
        };
    }
    if allowed != *old {
        let mut changed = Vec::new();
        differences(old, &allowed, "spec", &mut changed);
        let why = format!("pod updates may not change fields other than {UPDATABLE}\n{}", changed.join("\n"));
        causes.push(Cause::forbidden("spec", &why));
    }
}

fn differences(old: &Value, new: &Value, path: &str, out: &mut Vec<String>) {
    match (old, new) {
        (Value::Object(before), Value::Object(after)) => {
            let mut keys: Vec<&String> = before.keys().chain(after.keys()).collect();
            keys.sort();
            keys.dedup();
            for key in keys {
                let here = format!("{path}.{key}");
                differences(
                    before.get(key).unwrap_or(&Value::Null),
                    after.get(key).unwrap_or(&Value::Null),
                    &here,
                    out,
                );
            }
        }
        (Value::Array(before), Value::Array(after)) if before.len() == after.len() => {
            for (index, (before, after)) in before.iter().zip(after).enumerate() {
                differences(before, after, &format!("{path}[{index}]"), out);
            }
        }
        _ if old == new => {}
        _ => out.push(format!("- {path}: {old}\n+ {path}: {new}")),
    }
}

fn deadline(new: &Value, old: &Value, causes: &mut Vec<Cause>) {
    const FIELD: &str = "spec.activeDeadlineSeconds";
    let seconds = |spec: &Value| at(spec, &["activeDeadlineSeconds"]).and_then(Value::as_i64);
    match (seconds(new), seconds(old)) {
        (Some(now), Some(before)) if now > before => {
            let why = "must be less than or equal to previous value";
            causes.push(Cause::invalid(FIELD, &now.into(), why));
        }
        (None, Some(before)) => {
            causes.push(Cause::invalid(FIELD, &before.into(), "must not update from a positive integer to nil value"));
        }
        _ => {}
    }
}

fn added_only(new: &Value, old: &Value, causes: &mut Vec<Cause>) {
    let bare = |one: &Value| {
        let mut one = one.clone();
        if let Some(object) = one.as_object_mut() {
            object.remove("tolerationSeconds");
        }
        one
    };
    let now: Vec<Value> = items(new, &["tolerations"]).iter().map(bare).collect();
    if !items(old, &["tolerations"]).iter().all(|one| now.contains(&bare(one))) {
        let why = "existing toleration can not be modified except its tolerationSeconds";
        causes.push(Cause::forbidden("spec.tolerations", why));
    }
}

fn gates(new: &Value, old: &Value, causes: &mut Vec<Cause>) {
    let before = items(old, &["schedulingGates"]);
    for (index, gate) in items(new, &["schedulingGates"]).iter().enumerate() {
        if !before.contains(gate) {
            causes.push(Cause::forbidden(
                format!("spec.schedulingGates[{index}]"),
                &format!("only deletion is allowed, but found new scheduling gate '{}'", text(gate, &["name"])),
            ));
        }
    }
}

fn validate_ephemeral(new: &Value, old: &Value, causes: &mut Vec<Cause>) {
    let now = items(new, &["ephemeralContainers"]);
    for before in items(old, &["ephemeralContainers"]) {
        let name = text(before, &["name"]);
        match now.iter().find(|one| text(one, &["name"]) == name) {
            None => causes.push(Cause::forbidden(
                "spec.ephemeralContainers",
                &format!("existing ephemeral containers {} may not be removed\n", crate::status::quoted(name)),
            )),
            Some(after) if after != before => causes.push(Cause::forbidden(
                "spec.ephemeralContainers",
                &format!("existing ephemeral containers {} may not be changed\n", crate::status::quoted(name)),
            )),
            Some(_) => {}
        }
    }
    pod::validate_spec(new, causes);
}

/// A container that ended for good doesn't come back.
fn validate_status(new: &Value, old: &Value, causes: &mut Vec<Cause>) {
    let policy = text(old, &["spec", "restartPolicy"]);
    if policy == "Always" {
        return;
    }
    let before = items(old, &["status", "containerStatuses"]);
    for (index, status) in items(new, &["status", "containerStatuses"]).iter().enumerate() {
        let name = text(status, &["name"]);
        let Some(ended) =
            before.iter().find(|one| text(one, &["name"]) == name).and_then(|one| at(one, &["state", "terminated"]))
        else {
            continue;
        };
        let failed = ended["exitCode"].as_i64().unwrap_or(0) != 0;
        let may_restart = policy == "OnFailure" && failed;
        if !may_restart && at(status, &["state", "terminated"]).is_none() {
            causes.push(Cause::forbidden(
                format!("status.containerStatuses[{index}].state"),
                "may not be transitioned to non-terminated state",
            ));
        }
    }
}

/// `Guaranteed` when every container's cpu and memory are limited to what they request, `BestEffort` when nothing
/// is asked for, else `Burstable`.
pub(super) fn qos_class(pod: &Value) -> &'static str {
    let (mut any, mut all) = (false, true);
    let spec = &pod["spec"];
    for one in items(spec, &["containers"]).iter().chain(items(spec, &["initContainers"])) {
        let amount = |list: &str, name: &str| {
            at(one, &["resources", list, name])
                .and_then(Value::as_str)
                .and_then(|text| Quantity::parse(text).ok())
                .filter(|amount| amount.nanos() != 0)
        };
        for name in ["cpu", "memory"] {
            let (request, limit) = (amount("requests", name), amount("limits", name));
            any |= request.is_some() || limit.is_some();
            all &= limit.is_some() && request.is_none_or(|request| Some(request) == limit);
        }
    }
    match (any, all) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn classes() {
        let pod = |resources: Value| json!({"spec": {"containers": [{"name": "a", "resources": resources}]}});
        assert_eq!(qos_class(&pod(json!({}))), "BestEffort");
        assert_eq!(qos_class(&pod(json!({"requests": {"cpu": "1"}}))), "Burstable");
        let full = json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1000m", "memory": "1Gi"}});
        assert_eq!(qos_class(&pod(full)), "Guaranteed");
    }

    #[test]
    fn a_finished_container_stays_finished() {
        let with = |state: Value| json!({"spec": {"restartPolicy": "Never"}, "status": {"containerStatuses": [{"name": "c", "state": state}]}});
        let ended = with(json!({"terminated": {"exitCode": 3}}));
        let mut causes = Vec::new();
        validate_status(&with(json!({"running": {}})), &ended, &mut causes);
        assert_eq!(causes.len(), 1);
        causes.clear();
        validate_status(&ended, &with(json!({"running": {}})), &mut causes);
        assert!(causes.is_empty());
    }
}
