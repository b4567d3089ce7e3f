//! What the admission plugins of a control plane add to a new object.

use serde_json::{Value, json};

use super::{Context, Resource, at, items, lifecycle, text};
use crate::status::Status;

const TOKEN_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Seconds: an hour and a little, as the service account plugin asks for.
const TOKEN_SECONDS: i64 = 3607;

pub(super) fn create(resource: &Resource, value: &mut Value, context: &Context<'_>) -> Result<(), Status> {
    match resource.type_name {
        "core.Pod" => pod(resource, value, context),
        "core.Node" => {
            node(value);
            Ok(())
        }
        "certificates.CertificateSigningRequest" => {
            value["spec"]["username"] = context.user.into();
            if !context.groups.is_empty() {
                value["spec"]["groups"] = json!(context.groups);
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// A node that registers isn't ready until it says so: keep ordinary pods off it meanwhile.
fn node(value: &mut Value) {
    let mut taints = items(value, &["spec", "taints"]).to_vec();
    let not_ready = |taint: &Value| taint["key"] == "node.kubernetes.io/not-ready" && taint["effect"] == "NoSchedule";
    if !taints.iter().any(not_ready) {
        taints.push(json!({"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}));
        value["spec"]["taints"] = taints.into();
    }
}

fn pod(resource: &Resource, value: &mut Value, context: &Context<'_>) -> Result<(), Status> {
    let mirror =
        value["metadata"].get("annotations").is_some_and(|all| all.get("kubernetes.io/config.mirror").is_some());
    if !mirror {
        let account = lifecycle::pod_service_account(value).to_owned();
        value["spec"]["serviceAccountName"] = account.clone().into();
        if let Some(found) = context.service_account {
            for secret in items(found, &["imagePullSecrets"]) {
                if items(value, &["spec", "imagePullSecrets"]).is_empty() {
                    value["spec"]["imagePullSecrets"] = json!([]);
                }
                if let Some(list) = value["spec"]["imagePullSecrets"].as_array_mut()
                    && !list.contains(secret)
                {
                    list.push(secret.clone());
                }
            }
        }
        if wants_token(value, context.service_account) {
            mount_token(value, context.suffix);
        }
    }
    tolerations(value);
    priority(resource, value, context.priority_class)?;
    Ok(())
}

fn wants_token(pod: &Value, account: Option<&Value>) -> bool {
    let flag = |value: Option<&Value>| value.and_then(Value::as_bool);
    flag(at(pod, &["spec", "automountServiceAccountToken"]))
        .or_else(|| account.and_then(|found| flag(at(found, &["automountServiceAccountToken"]))))
        .unwrap_or(true)
}

fn mount_token(pod: &mut Value, suffix: &str) {
    let name = format!("kube-api-access-{suffix}");
    let mut used = false;
    for list in ["initContainers", "containers"] {
        for container in pod["spec"].get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            let mounted =
                items(container, &["volumeMounts"]).iter().any(|mount| text(mount, &["mountPath"]) == TOKEN_PATH);
            if mounted {
                continue;
            }
            used = true;
            let mut mounts = items(container, &["volumeMounts"]).to_vec();
            mounts.push(json!({"name": name, "readOnly": true, "mountPath": TOKEN_PATH}));
            container["volumeMounts"] = mounts.into();
        }
    }
    if !used {
        return;
    }
    let mut volumes = items(pod, &["spec", "volumes"]).to_vec();
    volumes.push(json!({"name": name, "projected": {"defaultMode": 420, "sources": [
        {"serviceAccountToken": {"expirationSeconds": TOKEN_SECONDS, "path": "token"}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
    ]}}));
    pod["spec"]["volumes"] = volumes.into();
}

/// Pods stay for five minutes on a node that stops answering, unless they say otherwise.
fn tolerations(pod: &mut Value) {
    let mut list = items(pod, &["spec", "tolerations"]).to_vec();
    let before = list.len();
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let tolerated = list.iter().any(|one| {
            let (given, effect) = (text(one, &["key"]), text(one, &["effect"]));
            (given == key || given.is_empty()) && (effect == "NoExecute" || effect.is_empty())
        });
        if !tolerated {
            list.push(json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}));
        }
    }
    if list.len() != before {
        pod["spec"]["tolerations"] = list.into();
    }
}

fn priority(resource: &Resource, pod: &mut Value, class: Option<&Value>) -> Result<(), Status> {
    let name = text(pod, &["metadata", "name"]).to_owned();
    let wanted = text(pod, &["spec", "priorityClassName"]).to_owned();
    if !wanted.is_empty() && class.is_none() {
        return Err(Status::forbidden(resource, &name, &format!("no PriorityClass with name {wanted} was found")));
    }
    let value = class.and_then(|class| class["value"].as_i64()).unwrap_or_default();
    if let Some(given) = at(pod, &["spec", "priority"]).and_then(Value::as_i64)
        && given != value
    {
        let why = format!(
            "the integer value of priority ({given}) must not be provided in pod spec; priority admission controller computed {value} from the given PriorityClass name"
        );
        return Err(Status::forbidden(resource, &name, &why));
    }
    pod["spec"]["priority"] = value.into();
    let policy = class.map(|class| text(class, &["preemptionPolicy"])).filter(|policy| !policy.is_empty());
    let policy = policy.unwrap_or("PreemptLowerPriority");
    match at(pod, &["spec", "preemptionPolicy"]).and_then(Value::as_str) {
        None => pod["spec"]["preemptionPolicy"] = policy.into(),
        Some(given) if given != policy => {
            let why = format!(
                "the string value of PreemptionPolicy ({given}) must not be provided in pod spec; priority admission controller computed {policy} from the given PriorityClass name"
            );
            return Err(Status::forbidden(resource, &name, &why));
        }
        Some(_) => {}
    }
    if let (true, Some(class)) = (wanted.is_empty(), class) {
        pod["spec"]["priorityClassName"] = class["metadata"]["name"].clone();
    }
    Ok(())
}
