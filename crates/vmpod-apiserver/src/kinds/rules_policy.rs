//! The rules of roles, bindings, priority classes and disruption budgets.

use serde_json::Value;

use super::{Resource, at, items, label_key, label_value, meta, names, text};
use crate::status::Cause;

/// The largest priority that a person may give; what is above is the system's.
const HIGHEST_PRIORITY: i64 = 1_000_000_000;
const GROUP: &str = "rbac.authorization.k8s.io";

/// The rules on creation and on update.
pub(super) fn validate(resource: &Resource, value: &Value, causes: &mut Vec<Cause>) {
    match resource.type_name {
        "rbac.Role" => role_rules(value, true, causes),
        "rbac.ClusterRole" => {
            role_rules(value, false, causes);
            if let Some(aggregation) = at(value, &["aggregationRule"]) {
                let selectors = items(aggregation, &["clusterRoleSelectors"]);
                if selectors.is_empty() {
                    let why = "at least one clusterRoleSelector required if aggregationRule is non-nil";
                    causes.push(Cause::required("aggregationRule.clusterRoleSelectors", why));
                }
                for (index, selector) in selectors.iter().enumerate() {
                    let field = format!("aggregationRule.clusterRoleSelectors[{index}]");
                    label_selector(selector, &field, causes);
                }
            }
        }
        "rbac.RoleBinding" => binding(value, &["Role", "ClusterRole"], causes),
        "rbac.ClusterRoleBinding" => binding(value, &["ClusterRole"], causes),
        "scheduling.PriorityClass" => priority_class(value, causes),
        "policy.PodDisruptionBudget" => budget(value, causes),
        _ => {}
    }
}

/// What may not change.
pub(super) fn validate_update(resource: &Resource, new: &Value, old: &Value, causes: &mut Vec<Cause>) {
    match resource.type_name {
        "rbac.RoleBinding" | "rbac.ClusterRoleBinding" if new["roleRef"] != old["roleRef"] => {
            causes.push(Cause::invalid("roleRef", &new["roleRef"], "cannot change roleRef"));
        }
        "scheduling.PriorityClass" => {
            if new["value"] != old["value"] {
                causes.push(Cause::forbidden("value", "may not be changed in an update."));
            }
            if new["preemptionPolicy"] != old["preemptionPolicy"] {
                let policy = &new["preemptionPolicy"];
                causes.push(Cause::invalid("preemptionPolicy", policy, "field is immutable"));
            }
        }
        _ => {}
    }
}

fn role_rules(value: &Value, namespaced: bool, causes: &mut Vec<Cause>) {
    for (index, rule) in items(value, &["rules"]).iter().enumerate() {
        let field = |name: &str| format!("rules[{index}].{name}");
        let empty = |name: &str| items(rule, &[name]).is_empty();
        if empty("verbs") {
            causes.push(Cause::required(field("verbs"), "verbs must contain at least one value"));
        }
        if !empty("nonResourceURLs") {
            let urls = &rule["nonResourceURLs"];
            if namespaced {
                let why = "namespaced rules cannot apply to non-resource URLs";
                causes.push(Cause::invalid(field("nonResourceURLs"), urls, why));
            }
            if !(empty("apiGroups") && empty("resources") && empty("resourceNames")) {
                let why = "rules cannot apply to both regular resources and non-resource URLs";
                causes.push(Cause::invalid(field("nonResourceURLs"), urls, why));
            }
            continue;
        }
        if empty("apiGroups") {
            causes.push(Cause::required(field("apiGroups"), "resource rules must supply at least one api group"));
        }
        if empty("resources") {
            causes.push(Cause::required(field("resources"), "resource rules must supply at least one resource"));
        }
    }
}

fn binding(value: &Value, kinds: &[&str], causes: &mut Vec<Cause>) {
    let reference = &value["roleRef"];
    let group = text(reference, &["apiGroup"]);
    if group != GROUP {
        causes.push(Cause::not_supported("roleRef.apiGroup", &group.into(), &[GROUP]));
    }
    let kind = text(reference, &["kind"]);
    if !kinds.contains(&kind) {
        causes.push(Cause::not_supported("roleRef.kind", &kind.into(), kinds));
    }
    let name = text(reference, &["name"]);
    if name.is_empty() {
        causes.push(Cause::required("roleRef.name", ""));
    } else {
        for why in names::path_segment(name, false) {
            causes.push(Cause::invalid("roleRef.name", &name.into(), &why));
        }
    }
    for (index, subject) in items(value, &["subjects"]).iter().enumerate() {
        let field = |name: &str| format!("subjects[{index}].{name}");
        let (name, group) = (text(subject, &["name"]), text(subject, &["apiGroup"]));
        if name.is_empty() {
            causes.push(Cause::required(field("name"), ""));
        }
        match text(subject, &["kind"]) {
            "ServiceAccount" => {
                if !name.is_empty() {
                    for why in names::dns_subdomain(name) {
                        causes.push(Cause::invalid(field("name"), &name.into(), &why));
                    }
                }
                if !group.is_empty() {
                    causes.push(Cause::not_supported(field("apiGroup"), &group.into(), &[""]));
                }
                if text(subject, &["namespace"]).is_empty() {
                    causes.push(Cause::required(field("namespace"), ""));
                }
            }
            "User" | "Group" => {
                if group != GROUP {
                    causes.push(Cause::not_supported(field("apiGroup"), &group.into(), &[GROUP]));
                }
            }
            other => {
                let known = ["ServiceAccount", "User", "Group"];
                causes.push(Cause::not_supported(field("kind"), &other.into(), &known));
            }
        }
    }
}

fn priority_class(value: &Value, causes: &mut Vec<Cause>) {
    let priority = value["value"].as_i64().unwrap_or_default();
    let name = text(value, &["metadata", "name"]);
    if name.starts_with("system-") {
        let why = "priority class names with 'system-' prefix are reserved for system use only";
        if !matches!(name, "system-cluster-critical" | "system-node-critical") {
            causes.push(Cause::forbidden("metadata.name", why));
        }
    } else if priority > HIGHEST_PRIORITY {
        let why = format!("maximum allowed value of a user defined priority is {HIGHEST_PRIORITY}");
        causes.push(Cause::forbidden("value", &why));
    }
    let policy = text(value, &["preemptionPolicy"]);
    if !matches!(policy, "Never" | "PreemptLowerPriority") {
        let known = ["Never", "PreemptLowerPriority"];
        causes.push(Cause::not_supported("preemptionPolicy", &policy.into(), &known));
    }
}

fn budget(value: &Value, causes: &mut Vec<Cause>) {
    let spec = &value["spec"];
    if at(spec, &["minAvailable"]).is_some() && at(spec, &["maxUnavailable"]).is_some() {
        causes.push(Cause::invalid("spec", spec, "minAvailable and maxUnavailable cannot be both set"));
    }
    for name in ["minAvailable", "maxUnavailable"] {
        let Some(amount) = at(spec, &[name]) else { continue };
        let field = format!("spec.{name}");
        if let Some(percent) = amount.as_str() {
            let number = percent.strip_suffix('%').and_then(|number| number.parse::<u64>().ok());
            match number {
                None => {
                    let why = "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%', or '93%', regex used for validation is '[0-9]+%')";
                    causes.push(Cause::invalid(field, amount, why));
                }
                Some(number) if number > 100 => {
                    causes.push(Cause::invalid(field, amount, "must not be greater than 100%"));
                }
                Some(_) => {}
            }
        } else if amount.as_i64().is_some_and(|amount| amount < 0) {
            causes.push(Cause::invalid(field, amount, "must be greater than or equal to 0"));
        }
    }
    let policy = text(spec, &["unhealthyPodEvictionPolicy"]);
    if !matches!(policy, "" | "IfHealthyBudget" | "AlwaysAllow") {
        let known = ["AlwaysAllow", "IfHealthyBudget"];
        causes.push(Cause::not_supported("spec.unhealthyPodEvictionPolicy", &policy.into(), &known));
    }
    if let Some(selector) = at(spec, &["selector"]) {
        label_selector(selector, "spec.selector", causes);
    }
}

/// The rules of a selector in an object.
fn label_selector(selector: &Value, field: &str, causes: &mut Vec<Cause>) {
    meta::labels(selector.get("matchLabels"), &format!("{field}.matchLabels"), causes);
    for (index, one) in items(selector, &["matchExpressions"]).iter().enumerate() {
        let field = |name: &str| format!("{field}.matchExpressions[{index}].{name}");
        let (key, values) = (text(one, &["key"]), items(one, &["values"]));
        for why in label_key(key) {
            causes.push(Cause::invalid(field("key"), &key.into(), &why));
        }
        match text(one, &["operator"]) {
            "In" | "NotIn" if values.is_empty() => {
                let why = "must be specified when `operator` is 'In' or 'NotIn'";
                causes.push(Cause::required(field("values"), why));
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                let why = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
                causes.push(Cause::forbidden(field("values"), why));
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            other => causes.push(Cause::invalid(field("operator"), &other.into(), "not a valid selector operator")),
        }
        for (at, value) in values.iter().enumerate() {
            for why in label_value(value.as_str().unwrap_or_default()) {
                causes.push(Cause::invalid(format!("{}[{at}]", field("values")), value, &why));
            }
        }
    }
}
