//! The rules of the built-in kinds, but for pods.

use serde_json::Value;

use super::{Resource, at, items, label_key, label_value, meta, names, pod, pod_update, rules_policy, text};
use crate::crd;
use crate::status::Cause;

/// The most that the data of a config map or secret may weigh, in bytes.
const DATA_LIMIT: usize = 1024 * 1024;

/// The rules on creation.
pub(super) fn validate(resource: &Resource, value: &Value, causes: &mut Vec<Cause>) {
    match resource.type_name {
        "core.Pod" => pod::validate(value, causes),
        "core.ConfigMap" => config_map(value, causes),
        "core.Secret" => secret(value, causes),
        "core.Node" => node(value, causes),
        "core.Event" => event(value, causes),
        "coordination.Lease" => lease(value, causes),
        "certificates.CertificateSigningRequest" => signing_request(value, causes),
        "apiext.CustomResourceDefinition" => crd::validate_definition(value, causes),
        _ => rules_policy::validate(resource, value, causes),
    }
}

/// The rules on update.
pub(super) fn validate_update(
    resource: &Resource,
    subresource: Option<&str>,
    new: &Value,
    old: &Value,
    causes: &mut Vec<Cause>,
) {
    match resource.type_name {
        "core.Pod" => pod_update::validate(subresource, new, old, causes),
        "core.ConfigMap" => {
            immutable_data(new, old, &["data", "binaryData"], causes);
            config_map(new, causes);
        }
        "core.Secret" => {
            let kind = text(new, &["type"]);
            if kind != text(old, &["type"]) {
                causes.push(Cause::invalid("type", &kind.into(), "field is immutable"));
            }
            immutable_data(new, old, &["data"], causes);
            secret(new, causes);
        }
        "core.Node" => {
            node(new, causes);
            for key in ["providerID", "podCIDR"] {
                let before = text(old, &["spec", key]);
                if !before.is_empty() && before != text(new, &["spec", key]) {
                    causes.push(Cause::forbidden(
                        format!("spec.{key}"),
                        "node updates may only change labels, taints, or capacity",
                    ));
                }
            }
        }
        "core.Event" => event(new, causes),
        "coordination.Lease" => lease(new, causes),
        "certificates.CertificateSigningRequest" => signing_request_update(subresource, new, old, causes),
        "apiext.CustomResourceDefinition" => crd::validate_definition_update(new, old, causes),
        _ => {
            rules_policy::validate_update(resource, new, old, causes);
            rules_policy::validate(resource, new, causes);
        }
    }
}

fn immutable_data(new: &Value, old: &Value, keys: &[&str], causes: &mut Vec<Cause>) {
    const WHY: &str = "field is immutable when `immutable` is set";
    if old.get("immutable") != Some(&Value::Bool(true)) {
        return;
    }
    if new.get("immutable") != Some(&Value::Bool(true)) {
        causes.push(Cause::forbidden("immutable", WHY));
    }
    for &key in keys {
        if new.get(key) != old.get(key) {
            causes.push(Cause::forbidden(key, WHY));
        }
    }
}

fn data_keys(value: &Value, key: &str, causes: &mut Vec<Cause>) -> usize {
    let mut total = 0;
    for (name, content) in value.get(key).and_then(Value::as_object).into_iter().flatten() {
        for why in names::config_key(name) {
            causes.push(Cause::invalid(format!("{key}[{name}]"), &name.as_str().into(), &why));
        }
        total += content.as_str().map_or(0, str::len);
    }
    total
}

fn config_map(value: &Value, causes: &mut Vec<Cause>) {
    let mut total = data_keys(value, "data", causes);
    for name in value.get("data").and_then(Value::as_object).into_iter().flatten().map(|(name, _)| name) {
        if value.get("binaryData").is_some_and(|binary| binary.get(name).is_some()) {
            causes.push(Cause::invalid(
                format!("data[{name}]"),
                &name.as_str().into(),
                "duplicate of key present in binaryData",
            ));
        }
    }
    total += data_keys(value, "binaryData", causes) / 4 * 3;
    if total > DATA_LIMIT {
        causes.push(Cause::too_long("", DATA_LIMIT));
    }
}

fn secret(value: &Value, causes: &mut Vec<Cause>) {
    let total = data_keys(value, "data", causes) / 4 * 3;
    if total > DATA_LIMIT {
        causes.push(Cause::too_long("data", DATA_LIMIT));
    }
    let has = |key: &str| value.get("data").is_some_and(|data| data.get(key).is_some());
    let mut require = |key: &str| {
        if !has(key) {
            causes.push(Cause::required(format!("data[{key}]"), ""));
        }
    };
    match text(value, &["type"]) {
        "kubernetes.io/dockerconfigjson" => {
            require(".dockerconfigjson");
            json_secret(value, ".dockerconfigjson", causes);
        }
        "kubernetes.io/dockercfg" => {
            require(".dockercfg");
            json_secret(value, ".dockercfg", causes);
        }
        "kubernetes.io/basic-auth" if !has("username") && !has("password") => {
            causes.push(Cause::required("data[username]", ""));
            causes.push(Cause::required("data[password]", ""));
        }
        "kubernetes.io/ssh-auth" => require("ssh-privatekey"),
        "kubernetes.io/tls" => {
            require("tls.crt");
            require("tls.key");
        }
        "kubernetes.io/service-account-token"
            if text(value, &["metadata", "annotations", "kubernetes.io/service-account.name"]).is_empty() =>
        {
            causes.push(Cause::required("metadata.annotations[kubernetes.io/service-account.name]", ""));
        }
        _ => {}
    }
}

fn json_secret(value: &Value, key: &str, causes: &mut Vec<Cause>) {
    use base64::Engine as _;
    let Some(encoded) = at(value, &["data", key]).and_then(Value::as_str) else { return };
    let decoded = base64::engine::general_purpose::STANDARD.decode(encoded).unwrap_or_default();
    if let Err(why) = serde_json::from_slice::<serde::de::IgnoredAny>(&decoded) {
        causes.push(Cause::invalid(format!("data[{key}]"), &"<secret contents redacted>".into(), &why.to_string()));
    }
}

fn node(value: &Value, causes: &mut Vec<Cause>) {
    let mut seen: Vec<(&str, &str)> = Vec::new();
    for (index, taint) in items(value, &["spec", "taints"]).iter().enumerate() {
        let field = format!("spec.taints[{index}]");
        let (key, effect) = (text(taint, &["key"]), text(taint, &["effect"]));
        for why in label_key(key) {
            causes.push(Cause::invalid(format!("{field}.key"), &key.into(), &why));
        }
        let content = text(taint, &["value"]);
        for why in label_value(content) {
            causes.push(Cause::invalid(format!("{field}.value"), &content.into(), &why));
        }
        match effect {
            "NoSchedule" | "PreferNoSchedule" | "NoExecute" => {}
            "" => causes.push(Cause::required(format!("{field}.effect"), "")),
            other => causes.push(Cause::not_supported(
                format!("{field}.effect"),
                &other.into(),
                &["NoSchedule", "PreferNoSchedule", "NoExecute"],
            )),
        }
        if seen.contains(&(key, effect)) {
            causes.push(Cause::duplicate(field, taint));
        }
        seen.push((key, effect));
    }
    for list in ["capacity", "allocatable"] {
        for (name, amount) in at(value, &["status", list]).and_then(Value::as_object).into_iter().flatten() {
            let field = format!("status.{list}.{name}");
            pod::resource_name(name, &field, causes);
            if amount.as_str().is_some_and(|text| text.starts_with('-')) {
                causes.push(Cause::invalid(field, amount, "must be greater than or equal to 0"));
            }
        }
    }
    let mut addresses: Vec<&Value> = Vec::new();
    for (index, address) in items(value, &["status", "addresses"]).iter().enumerate() {
        if addresses.contains(&address) {
            causes.push(Cause::duplicate(format!("status.addresses[{index}]"), address));
        }
        addresses.push(address);
    }
}

fn event(value: &Value, causes: &mut Vec<Cause>) {
    let (own, involved) = (text(value, &["metadata", "namespace"]), text(value, &["involvedObject", "namespace"]));
    if involved.is_empty() {
        // Events about objects without a namespace live in `default`.
        if own != "default" && own != "kube-system" && !own.is_empty() {
            causes.push(Cause::invalid("involvedObject.namespace", &"".into(), "does not match event.namespace"));
        }
    } else if own != involved {
        causes.push(Cause::invalid("involvedObject.namespace", &involved.into(), "does not match event.namespace"));
    }
}

fn lease(value: &Value, causes: &mut Vec<Cause>) {
    let number = |key: &str| at(value, &["spec", key]).and_then(Value::as_i64);
    if let Some(seconds) = number("leaseDurationSeconds").filter(|&seconds| seconds <= 0) {
        causes.push(Cause::invalid("spec.leaseDurationSeconds", &seconds.into(), "must be greater than 0"));
    }
    if let Some(count) = number("leaseTransitions").filter(|&count| count < 0) {
        causes.push(Cause::invalid("spec.leaseTransitions", &count.into(), "must be greater than or equal to 0"));
    }
    if at(value, &["spec", "holderIdentity"]).is_some_and(|holder| holder == "") {
        causes.push(Cause::invalid("spec.holderIdentity", &"".into(), "must not be empty"));
    }
}

/// The usages that a certificate can be asked for.
const USAGES: [&str; 23] = [
    "signing",
    "digital signature",
    "content commitment",
    "key encipherment",
    "key agreement",
    "data encipherment",
    "cert sign",
    "crl sign",
    "encipher only",
    "decipher only",
    "any",
    "server auth",
    "client auth",
    "code signing",
    "email protection",
    "s/mime",
    "ipsec end system",
    "ipsec tunnel",
    "ipsec user",
    "timestamping",
    "ocsp signing",
    "microsoft sgc",
    "netscape sgc",
];

fn signing_request(value: &Value, causes: &mut Vec<Cause>) {
    use base64::Engine as _;
    let request = text(value, &["spec", "request"]);
    let decoded = base64::engine::general_purpose::STANDARD.decode(request).unwrap_or_default();
    if !decoded.starts_with(b"-----BEGIN CERTIFICATE REQUEST-----") {
        let message = "PEM block type must be CERTIFICATE REQUEST";
        causes.push(Cause::invalid("spec.request", &request.into(), message));
    }
    let usages = items(value, &["spec", "usages"]);
    if usages.is_empty() {
        causes.push(Cause::required("spec.usages", "usages must be provided"));
    }
    for (index, usage) in usages.iter().enumerate() {
        if !USAGES.contains(&usage.as_str().unwrap_or_default()) {
            causes.push(Cause::not_supported(format!("spec.usages[{index}]"), usage, &USAGES));
        }
        if usages[..index].contains(usage) {
            causes.push(Cause::duplicate(format!("spec.usages[{index}]"), usage));
        }
    }
    let signer = text(value, &["spec", "signerName"]);
    if signer.is_empty() {
        causes.push(Cause::required("spec.signerName", ""));
    } else if !signer.contains('/') {
        causes.push(Cause::invalid(
            "spec.signerName",
            &signer.into(),
            "must be a fully qualified domain and path of the form 'example.com/signer-name'",
        ));
    }
    if let Some(seconds) =
        at(value, &["spec", "expirationSeconds"]).and_then(Value::as_i64).filter(|&seconds| seconds < 600)
    {
        causes.push(Cause::invalid(
            "spec.expirationSeconds",
            &seconds.into(),
            "may not specify a duration less than 600 seconds (10 minutes)",
        ));
    }
    signing_conditions(value, causes);
}

fn signing_conditions(value: &Value, causes: &mut Vec<Cause>) {
    let conditions = items(value, &["status", "conditions"]);
    for (index, condition) in conditions.iter().enumerate() {
        let field = format!("status.conditions[{index}]");
        let kind = text(condition, &["type"]);
        match kind {
            "" => causes.push(Cause::required(format!("{field}.type"), "")),
            "Approved" | "Denied" | "Failed" if text(condition, &["status"]) != "True" => {
                let status = text(condition, &["status"]);
                causes.push(Cause::not_supported(format!("{field}.status"), &status.into(), &["True"]));
            }
            _ => {}
        }
        if conditions[..index].iter().any(|other| text(other, &["type"]) == kind) {
            causes.push(Cause::duplicate(format!("{field}.type"), &kind.into()));
        }
    }
    let has = |kind: &str| conditions.iter().any(|one| text(one, &["type"]) == kind);
    if has("Approved") && has("Denied") {
        causes.push(Cause::invalid(
            "status.conditions",
            &"Denied".into(),
            "Approved and Denied conditions are mutually exclusive",
        ));
    }
}

fn signing_request_update(subresource: Option<&str>, new: &Value, old: &Value, causes: &mut Vec<Cause>) {
    signing_conditions(new, causes);
    let has = |value: &Value, kind: &str| {
        items(value, &["status", "conditions"]).iter().any(|one| text(one, &["type"]) == kind)
    };
    for kind in ["Approved", "Denied"] {
        if has(old, kind) && !has(new, kind) {
            causes.push(Cause::forbidden(
                "status.conditions",
                &format!("updates may not remove a condition of type {}", crate::status::quoted(kind)),
            ));
        }
        if !has(old, kind) && has(new, kind) && subresource != Some("approval") {
            causes.push(Cause::forbidden(
                "status.conditions",
                &format!("updates may not add a condition of type {}", crate::status::quoted(kind)),
            ));
        }
    }
    let before = text(old, &["status", "certificate"]);
    if !before.is_empty() && before != text(new, &["status", "certificate"]) {
        causes.push(Cause::forbidden("status.certificate", "updates may not modify a set certificate"));
    }
}

/// The labels of an object in a message or selector.
pub(super) fn node_selector(labels: Option<&Value>, field: &str, causes: &mut Vec<Cause>) {
    meta::labels(labels, field, causes);
}
