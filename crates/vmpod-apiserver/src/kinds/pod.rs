//! The rules of a pod's spec.

use serde_json::Value;

use super::{at, dns_label, dns_subdomain, items, label_key, label_value, meta, names, pod_volumes, rules, text};
use crate::quantity::Quantity;
use crate::status::Cause;

/// The rules of a new pod.
pub(super) fn validate(pod: &Value, causes: &mut Vec<Cause>) {
    validate_spec(&pod["spec"], causes);
    if !items(pod, &["spec", "ephemeralContainers"]).is_empty() {
        causes.push(Cause::forbidden("spec.ephemeralContainers", "cannot be set on create"));
    }
}

/// The rules of a pod's spec, new or updated.
pub(super) fn validate_spec(spec: &Value, causes: &mut Vec<Cause>) {
    let volumes = pod_volumes::validate(items(spec, &["volumes"]), causes);
    containers(spec, &volumes, causes);
    one_of(spec, "restartPolicy", "spec", &["Always", "OnFailure", "Never"], causes);
    one_of(spec, "dnsPolicy", "spec", &["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"], causes);
    rules::node_selector(spec.get("nodeSelector"), "spec.nodeSelector", causes);
    security(spec, causes);
    for (index, secret) in items(spec, &["imagePullSecrets"]).iter().enumerate() {
        if text(secret, &["name"]).is_empty() {
            causes.push(Cause::required(format!("spec.imagePullSecrets[{index}].name"), ""));
        }
    }
    affinity(spec, causes);
    let named = |key: &str, rule: fn(&str) -> Vec<String>, causes: &mut Vec<Cause>| {
        let value = text(spec, &[key]);
        if !value.is_empty() {
            for why in rule(value) {
                causes.push(Cause::invalid(format!("spec.{key}"), &value.into(), &why));
            }
        }
    };
    named("serviceAccountName", dns_subdomain, causes);
    named("nodeName", dns_subdomain, causes);
    if let Some(seconds) = at(spec, &["activeDeadlineSeconds"])
        && !seconds.as_i64().is_some_and(|seconds| (1..=i64::from(i32::MAX)).contains(&seconds))
    {
        causes.push(Cause::invalid(
            "spec.activeDeadlineSeconds",
            seconds,
            "must be between 1 and 2147483647, inclusive",
        ));
    }
    named("hostname", dns_label, causes);
    named("subdomain", dns_label, causes);
    tolerations(items(spec, &["tolerations"]), causes);
    for (index, alias) in items(spec, &["hostAliases"]).iter().enumerate() {
        let ip = text(alias, &["ip"]);
        if ip.parse::<std::net::IpAddr>().is_err() {
            let why = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
            causes.push(Cause::invalid(format!("spec.hostAliases[{index}].ip"), &ip.into(), why));
        }
    }
    named("priorityClassName", dns_subdomain, causes);
    named("runtimeClassName", dns_subdomain, causes);
    let policy = text(spec, &["preemptionPolicy"]);
    if !["", "PreemptLowerPriority", "Never"].contains(&policy) {
        causes.push(Cause::not_supported("spec.preemptionPolicy", &policy.into(), &["PreemptLowerPriority", "Never"]));
    }
    let system = text(spec, &["os", "name"]);
    if at(spec, &["os"]).is_some() && system.is_empty() {
        causes.push(Cause::required("spec.os.name", "cannot be empty"));
    }
}

/// A required word out of a few.
fn one_of(object: &Value, key: &str, parent: &str, known: &[&str], causes: &mut Vec<Cause>) {
    let value = text(object, &[key]);
    let field = format!("{parent}.{key}");
    if value.is_empty() {
        causes.push(Cause::required(field, ""));
    } else if !known.contains(&value) {
        causes.push(Cause::not_supported(field, &value.into(), known));
    }
}

fn security(spec: &Value, causes: &mut Vec<Cause>) {
    for key in ["runAsUser", "runAsGroup", "fsGroup"] {
        id_range(at(spec, &["securityContext", key]), &format!("spec.securityContext.{key}"), causes);
    }
}

fn id_range(value: Option<&Value>, field: &str, causes: &mut Vec<Cause>) {
    let Some(value) = value else { return };
    if !value.as_i64().is_some_and(|id| (0..=i64::from(i32::MAX)).contains(&id)) {
        causes.push(Cause::invalid(field, value, "must be between 0 and 2147483647, inclusive"));
    }
}

fn containers(spec: &Value, volumes: &[String], causes: &mut Vec<Cause>) {
    let list = items(spec, &["containers"]);
    if list.is_empty() {
        causes.push(Cause::required("spec.containers", ""));
    }
    let mut seen: Vec<&str> = Vec::new();
    for key in ["containers", "initContainers", "ephemeralContainers"] {
        for (index, one) in items(spec, &[key]).iter().enumerate() {
            let field = format!("spec.{key}[{index}]");
            container(one, &field, volumes, causes);
            let name = text(one, &["name"]);
            if seen.contains(&name) {
                causes.push(Cause::duplicate(format!("{field}.name"), &name.into()));
            }
            seen.push(name);
            let policy = text(one, &["restartPolicy"]);
            if key == "initContainers" && !["", "Always", "OnFailure", "Never"].contains(&policy) {
                causes.push(Cause::not_supported(
                    format!("{field}.restartPolicy"),
                    &policy.into(),
                    &["Always", "Never", "OnFailure"],
                ));
            }
            let restartable = key == "initContainers" && policy == "Always";
            for probe in ["livenessProbe", "readinessProbe", "startupProbe", "lifecycle"] {
                if key != "containers" && !restartable && one.get(probe).is_some() {
                    let why = if key == "initContainers" {
                        "must not be set for init containers without restartPolicy=Always"
                    } else {
                        "cannot be set for an Ephemeral Container"
                    };
                    causes.push(Cause::forbidden(format!("{field}.{probe}"), why));
                }
            }
        }
    }
}

fn container(container: &Value, field: &str, volumes: &[String], causes: &mut Vec<Cause>) {
    let name = text(container, &["name"]);
    if name.is_empty() {
        causes.push(Cause::required(format!("{field}.name"), ""));
    } else {
        for why in dns_label(name) {
            causes.push(Cause::invalid(format!("{field}.name"), &name.into(), &why));
        }
    }
    let image = text(container, &["image"]);
    if image.is_empty() {
        causes.push(Cause::required(format!("{field}.image"), ""));
    } else if image.trim() != image {
        causes.push(Cause::invalid(
            format!("{field}.image"),
            &image.into(),
            "must not have leading or trailing whitespace",
        ));
    }
    one_of(container, "terminationMessagePolicy", field, &["FallbackToLogsOnError", "File"], causes);
    ports(container, field, causes);
    environment(container, field, causes);
    pod_volumes::mounts(container, field, volumes, causes);
    one_of(container, "imagePullPolicy", field, &["Always", "IfNotPresent", "Never"], causes);
    resources(container, field, causes);
    for key in ["runAsUser", "runAsGroup"] {
        id_range(at(container, &["securityContext", key]), &format!("{field}.securityContext.{key}"), causes);
    }
    for hook in ["postStart", "preStop"] {
        if let Some(handler) = at(container, &["lifecycle", hook]) {
            self::handler(
                handler,
                &format!("{field}.lifecycle.{hook}"),
                &["exec", "httpGet", "tcpSocket", "sleep"],
                causes,
            );
        }
    }
    for key in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = at(container, &[key]) {
            self::probe(probe, &format!("{field}.{key}"), key != "readinessProbe", causes);
        }
    }
}

fn port_number(value: &Value, field: String, causes: &mut Vec<Cause>) {
    if !value.as_i64().is_some_and(|port| (1..=65535).contains(&port)) {
        causes.push(Cause::invalid(field, value, "must be between 1 and 65535, inclusive"));
    }
}

fn ports(container: &Value, field: &str, causes: &mut Vec<Cause>) {
    let mut seen: Vec<&str> = Vec::new();
    for (index, port) in items(container, &["ports"]).iter().enumerate() {
        let field = format!("{field}.ports[{index}]");
        let name = text(port, &["name"]);
        if !name.is_empty() {
            let wrong = names::port_name(name);
            if wrong.is_empty() && seen.contains(&name) {
                causes.push(Cause::duplicate(format!("{field}.name"), &name.into()));
            }
            for why in wrong {
                causes.push(Cause::invalid(format!("{field}.name"), &name.into(), &why));
            }
            seen.push(name);
        }
        let number = &port["containerPort"];
        if number.as_i64().unwrap_or(0) == 0 {
            causes.push(Cause::required(format!("{field}.containerPort"), ""));
        } else {
            port_number(number, format!("{field}.containerPort"), causes);
        }
        if port["hostPort"].as_i64().unwrap_or(0) != 0 {
            port_number(&port["hostPort"], format!("{field}.hostPort"), causes);
        }
        one_of(port, "protocol", &field, &["SCTP", "TCP", "UDP"], causes);
    }
}

/// Paths that an environment variable may take from its pod.
const ENV_FIELDS: [&str; 9] = [
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];

fn environment(container: &Value, field: &str, causes: &mut Vec<Cause>) {
    for (index, variable) in items(container, &["env"]).iter().enumerate() {
        let field = format!("{field}.env[{index}]");
        let name = text(variable, &["name"]);
        if name.is_empty() {
            causes.push(Cause::required(format!("{field}.name"), ""));
        } else {
            for why in names::env_name(name) {
                causes.push(Cause::invalid(format!("{field}.name"), &name.into(), &why));
            }
        }
        let Some(source) = at(variable, &["valueFrom"]).and_then(Value::as_object) else { continue };
        let field = format!("{field}.valueFrom");
        if !text(variable, &["value"]).is_empty() {
            causes.push(Cause::invalid(&field, &"".into(), "may not be specified when `value` is not empty"));
        }
        match source.len() {
            0 => causes.push(Cause::invalid(
                &field,
                &"".into(),
                "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef` or `secretKeyRef`",
            )),
            1 => {}
            _ => {
                causes.push(Cause::invalid(&field, &"".into(), "may not have more than one field specified at a time"));
            }
        }
        if let Some(reference) = source.get("fieldRef") {
            field_ref(reference, &format!("{field}.fieldRef"), &ENV_FIELDS, causes);
        }
        if let Some(reference) = source.get("resourceFieldRef") {
            resource_ref(reference, &format!("{field}.resourceFieldRef"), false, causes);
        }
        for kind in ["configMapKeyRef", "secretKeyRef"] {
            let Some(reference) = source.get(kind) else { continue };
            if text(reference, &["name"]).is_empty() {
                causes.push(Cause::required(format!("{field}.{kind}.name"), ""));
            }
            let key = text(reference, &["key"]);
            if key.is_empty() {
                causes.push(Cause::required(format!("{field}.{kind}.key"), ""));
            } else {
                for why in names::config_key(key) {
                    causes.push(Cause::invalid(format!("{field}.{kind}.key"), &key.into(), &why));
                }
            }
        }
    }
    for (index, source) in items(container, &["envFrom"]).iter().enumerate() {
        let field = format!("{field}.envFrom[{index}]");
        let kinds: Vec<&str> =
            ["configMapRef", "secretRef"].into_iter().filter(|kind| source.get(kind).is_some()).collect();
        match kinds.as_slice() {
            [] => causes.push(Cause::invalid(field, &"".into(), "must specify one of: `configMapRef` or `secretRef`")),
            [kind] if text(source, &[kind, "name"]).is_empty() => {
                causes.push(Cause::required(format!("{field}.{kind}.name"), ""));
            }
            [_] => {}
            _ => causes.push(Cause::invalid(field, &"".into(), "may not have more than one field specified at a time")),
        }
    }
}

/// A reference to a field of the pod.
pub(super) fn field_ref(reference: &Value, field: &str, known: &[&str], causes: &mut Vec<Cause>) {
    if text(reference, &["apiVersion"]).is_empty() {
        causes.push(Cause::required(format!("{field}.apiVersion"), ""));
        return;
    }
    let path = text(reference, &["fieldPath"]);
    if path.is_empty() {
        causes.push(Cause::required(format!("{field}.fieldPath"), ""));
        return;
    }
    let subscript = |head: &str| {
        path.strip_prefix(head).and_then(|rest| rest.strip_prefix("['")).and_then(|rest| rest.strip_suffix("']"))
    };
    if let Some(key) = subscript("metadata.labels").or_else(|| subscript("metadata.annotations")) {
        for why in label_key(&key.to_lowercase()) {
            causes.push(Cause::invalid(field, &key.into(), &why));
        }
    } else if !known.contains(&path) {
        causes.push(Cause::not_supported(format!("{field}.fieldPath"), &path.into(), known));
    }
}

/// A reference to a request or limit of a container.
pub(super) fn resource_ref(reference: &Value, field: &str, in_volume: bool, causes: &mut Vec<Cause>) {
    const KNOWN: [&str; 6] = [
        "limits.cpu",
        "limits.ephemeral-storage",
        "limits.memory",
        "requests.cpu",
        "requests.ephemeral-storage",
        "requests.memory",
    ];
    if in_volume && text(reference, &["containerName"]).is_empty() {
        causes.push(Cause::required(format!("{field}.containerName"), ""));
        return;
    }
    let resource = text(reference, &["resource"]);
    if resource.is_empty() {
        causes.push(Cause::required(format!("{field}.resource"), ""));
    } else if !KNOWN.contains(&resource) && !resource.contains("hugepages-") {
        causes.push(Cause::not_supported(format!("{field}.resource"), &resource.into(), &KNOWN));
    }
}

/// The rules of the name of a resource of a node or container.
pub(super) fn resource_name(name: &str, field: &str, causes: &mut Vec<Cause>) {
    let wrong = label_key(name);
    let standard = ["cpu", "memory", "ephemeral-storage", "storage", "pods"].contains(&name)
        || name.starts_with("hugepages-")
        || name.starts_with("attachable-volumes-");
    if wrong.is_empty() && !name.contains('/') && !standard {
        causes.push(Cause::invalid(field, &name.into(), "must be a standard resource type or fully qualified"));
    }
    for why in wrong {
        causes.push(Cause::invalid(field, &name.into(), &why));
    }
}

fn resources(container: &Value, field: &str, causes: &mut Vec<Cause>) {
    let amount = |list: &str, name: &str| {
        at(container, &["resources", list, name]).and_then(Value::as_str).and_then(|text| Quantity::parse(text).ok())
    };
    let names_of = |list: &str| -> Vec<String> {
        at(container, &["resources", list])
            .and_then(Value::as_object)
            .map(|map| map.keys().cloned().collect())
            .unwrap_or_default()
    };
    let overcommits = |name: &str| !name.contains('/') && !name.starts_with("hugepages-");
    for list in ["limits", "requests"] {
        for name in names_of(list) {
            let entry = format!("{field}.resources.{list}[{name}]");
            let standard =
                ["cpu", "memory", "ephemeral-storage"].contains(&name.as_str()) || name.starts_with("hugepages-");
            if !standard && !name.contains('/') {
                causes.push(Cause::invalid(
                    &entry,
                    &name.as_str().into(),
                    "must be a standard resource type or fully qualified",
                ));
                causes.push(Cause::invalid(
                    &entry,
                    &name.as_str().into(),
                    "must be a standard resource for containers",
                ));
            }
            let Some(value) = amount(list, &name) else { continue };
            if value.nanos() < 0 {
                causes.push(Cause::invalid(&entry, &value.to_string().into(), "must be greater than or equal to 0"));
            }
            if name.contains('/') && !value.is_whole() {
                causes.push(Cause::invalid(&entry, &value.to_string().into(), "must be an integer"));
            }
            if list != "requests" {
                continue;
            }
            let field = format!("{field}.resources.requests");
            match amount("limits", &name) {
                Some(limit) if overcommits(&name) && value > limit => causes.push(Cause::invalid(
                    field,
                    &value.to_string().into(),
                    &format!("must be less than or equal to {name} limit of {limit}"),
                )),
                Some(limit) if !overcommits(&name) && value != limit => causes.push(Cause::invalid(
                    field,
                    &value.to_string().into(),
                    &format!("must be equal to {name} limit of {limit}"),
                )),
                None if !overcommits(&name) => causes.push(Cause::required(
                    field.replace(".requests", ".limits"),
                    "Limit must be set for non overcommitable resources",
                )),
                _ => {}
            }
        }
    }
}

fn handler(handler: &Value, field: &str, kinds: &[&str], causes: &mut Vec<Cause>) {
    let given: Vec<&str> = kinds.iter().copied().filter(|kind| at(handler, &[kind]).is_some()).collect();
    match given.as_slice() {
        [] => causes.push(Cause::required(field, "must specify a handler type")),
        [_] => {}
        [_, more @ ..] => {
            for kind in more {
                causes.push(Cause::forbidden(format!("{field}.{kind}"), "may not specify more than 1 handler type"));
            }
        }
    }
    if let Some(exec) = at(handler, &["exec"])
        && items(exec, &["command"]).is_empty()
    {
        causes.push(Cause::required(format!("{field}.exec.command"), ""));
    }
    for kind in ["httpGet", "tcpSocket", "grpc"] {
        let Some(action) = at(handler, &[kind]) else { continue };
        let field = format!("{field}.{kind}");
        match &action["port"] {
            Value::String(name) => {
                for why in names::port_name(name) {
                    causes.push(Cause::invalid(format!("{field}.port"), &name.as_str().into(), &why));
                }
            }
            number => port_number(number, format!("{field}.port"), causes),
        }
        if kind == "httpGet" {
            if text(action, &["path"]).is_empty() {
                causes.push(Cause::required(format!("{field}.path"), ""));
            }
            one_of(action, "scheme", &field, &["HTTP", "HTTPS"], causes);
        }
    }
}

fn probe(probe: &Value, field: &str, once: bool, causes: &mut Vec<Cause>) {
    handler(probe, field, &["exec", "httpGet", "tcpSocket", "grpc"], causes);
    for key in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"] {
        if probe[key].as_i64().is_some_and(|number| number < 0) {
            causes.push(Cause::invalid(format!("{field}.{key}"), &probe[key], "must be greater than or equal to 0"));
        }
    }
    if once && probe["successThreshold"].as_i64() != Some(1) {
        causes.push(Cause::invalid(format!("{field}.successThreshold"), &probe["successThreshold"], "must be 1"));
    }
    if at(probe, &["terminationGracePeriodSeconds"]).and_then(Value::as_i64).is_some_and(|seconds| seconds <= 0) {
        let value = &probe["terminationGracePeriodSeconds"];
        causes.push(Cause::invalid(format!("{field}.terminationGracePeriodSeconds"), value, "must be greater than 0"));
    }
}

/// The rules of tolerations.
pub(super) fn tolerations(list: &[Value], causes: &mut Vec<Cause>) {
    for (index, toleration) in list.iter().enumerate() {
        let field = format!("spec.tolerations[{index}]");
        let get = |key: &str| text(toleration, &[key]);
        let (key, operator, value, effect) = (get("key"), get("operator"), get("value"), get("effect"));
        if key.is_empty() {
            if operator != "Exists" {
                let why = "operator must be Exists when `key` is empty, which means \"match all values and all keys\"";
                causes.push(Cause::invalid(format!("{field}.operator"), &operator.into(), why));
            }
        } else {
            for why in label_key(key) {
                causes.push(Cause::invalid(format!("{field}.key"), &key.into(), &why));
            }
        }
        if toleration.get("tolerationSeconds").is_some() && effect != "NoExecute" {
            let why = "effect must be 'NoExecute' when `tolerationSeconds` is set";
            causes.push(Cause::invalid(format!("{field}.effect"), &effect.into(), why));
        }
        match operator {
            "" | "Equal" => {
                for why in label_value(value) {
                    causes.push(Cause::invalid(format!("{field}.operator"), &value.into(), &why));
                }
            }
            "Exists" if value.is_empty() => {}
            "Exists" => {
                let why = "value must be empty when `operator` is 'Exists'";
                causes.push(Cause::invalid(format!("{field}.operator"), toleration, why));
            }
            other => {
                causes.push(Cause::not_supported(format!("{field}.operator"), &other.into(), &["Equal", "Exists"]));
            }
        }
        if !["", "NoSchedule", "PreferNoSchedule", "NoExecute"].contains(&effect) {
            let known = ["NoSchedule", "PreferNoSchedule", "NoExecute"];
            causes.push(Cause::not_supported(format!("{field}.effect"), &effect.into(), &known));
        }
    }
}

fn affinity(spec: &Value, causes: &mut Vec<Cause>) {
    let field = "spec.affinity.nodeAffinity";
    let required = "requiredDuringSchedulingIgnoredDuringExecution";
    if let Some(selector) = at(spec, &["affinity", "nodeAffinity", required]) {
        let terms = items(selector, &["nodeSelectorTerms"]);
        let field = format!("{field}.{required}.nodeSelectorTerms");
        if terms.is_empty() {
            causes.push(Cause::required(&field, "must have at least one node selector term"));
        }
        for (index, term) in terms.iter().enumerate() {
            node_selector_term(term, &format!("{field}[{index}]"), causes);
        }
    }
    let preferred = "preferredDuringSchedulingIgnoredDuringExecution";
    for (index, one) in items(spec, &["affinity", "nodeAffinity", preferred]).iter().enumerate() {
        let field = format!("{field}.{preferred}[{index}]");
        let weight = &one["weight"];
        if !weight.as_i64().is_some_and(|weight| (1..=100).contains(&weight)) {
            causes.push(Cause::invalid(format!("{field}.weight"), weight, "must be in the range 1-100"));
        }
        node_selector_term(&one["preference"], &format!("{field}.preference"), causes);
    }
}

fn node_selector_term(term: &Value, field: &str, causes: &mut Vec<Cause>) {
    const WORDS: [&str; 6] = ["DoesNotExist", "Exists", "Gt", "In", "Lt", "NotIn"];
    for list in ["matchExpressions", "matchFields"] {
        for (index, requirement) in items(term, &[list]).iter().enumerate() {
            let field = format!("{field}.{list}[{index}]");
            let (key, operator) = (text(requirement, &["key"]), text(requirement, &["operator"]));
            let values = items(requirement, &["values"]);
            match operator {
                "In" | "NotIn" if values.is_empty() => causes.push(Cause::required(
                    format!("{field}.values"),
                    "must be specified when `operator` is 'In' or 'NotIn'",
                )),
                "Exists" | "DoesNotExist" if !values.is_empty() => causes.push(Cause::forbidden(
                    format!("{field}.values"),
                    "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
                )),
                "Gt" | "Lt" if values.len() != 1 => causes.push(Cause::required(
                    format!("{field}.values"),
                    "must be specified single value when `operator` is 'Lt' or 'Gt'",
                )),
                word if WORDS.contains(&word) => {}
                other => {
                    causes.push(Cause::invalid(
                        format!("{field}.operator"),
                        &other.into(),
                        "not a valid selector operator",
                    ));
                }
            }
            if list == "matchExpressions" {
                for why in label_key(key) {
                    causes.push(Cause::invalid(format!("{field}.key"), &key.into(), &why));
                }
            } else if key != "metadata.name" {
                causes.push(Cause::invalid(format!("{field}.key"), &key.into(), "not a valid field selector key"));
            }
        }
    }
    meta::labels(term.get("matchLabels"), field, causes);
}
