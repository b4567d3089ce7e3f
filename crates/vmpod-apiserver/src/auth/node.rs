//! What a kubelet may do: Kubernetes' Node authorizer and the `NodeRestriction` admission plugin,
//! for the kinds that are served here.

use std::collections::BTreeSet;

use serde_json::Value;

use super::authorize::{Attributes, Decision};
use crate::identity::Identity;
use crate::kinds::Resource;
use crate::server::Server;
use crate::status::Status;
use crate::store::Key;

/// The namespace of the nodes' leases.
const LEASES: &str = "kube-node-lease";

fn pass(why: impl Into<String>) -> Decision {
    Decision::Pass(why.into())
}

fn allow_if(yes: bool, why: impl FnOnce() -> String) -> Decision {
    if yes { Decision::Allow } else { pass(why()) }
}

/// The value that a field selector demands of a field.
pub(super) fn selected<'a>(selector: &'a str, field: &str) -> Option<&'a str> {
    selector.split(',').find_map(|term| {
        let (name, value) = term.split_once('=')?;
        (name == field).then(|| value.trim_start_matches('='))
    })
}

/// Decides for the kubelet of node `me`.
pub(crate) fn decide(server: &Server, me: &str, ask: &Attributes<'_>) -> Decision {
    let other = || format!("node '{me}' cannot access '{}'", ask.name);
    match (ask.group, ask.resource, ask.subresource) {
        ("", "nodes", "" | "status") => match ask.verb {
            "create" if ask.subresource.is_empty() => Decision::Allow,
            "get" | "update" | "patch" => allow_if(ask.name == me, other),
            "list" | "watch" => allow_if(selected(ask.field_selector, "metadata.name") == Some(me), || {
                format!("node '{me}' cannot read all nodes, only its own Node object")
            }),
            _ => pass(other()),
        },
        ("", "pods", "") => match ask.verb {
            "list" | "watch" => allow_if(selected(ask.field_selector, "spec.nodeName") == Some(me), || {
                "can only list/watch pods with spec.nodeName field selector".into()
            }),
            "get" | "delete" => allow_if(is_mine(server, me, ask.namespace, ask.name), || no_relationship(me)),
            _ => pass(String::new()),
        },
        ("", "pods", "status") => {
            allow_if(matches!(ask.verb, "update" | "patch") && is_mine(server, me, ask.namespace, ask.name), || {
                no_relationship(me)
            })
        }
        ("", "pods", "eviction") => {
            allow_if(ask.verb == "create" && is_mine(server, me, ask.namespace, ask.name), || no_relationship(me))
        }
        ("", "secrets" | "configmaps", "") => {
            let name = match ask.verb {
                "get" => Some(ask.name),
                "list" | "watch" => selected(ask.field_selector, "metadata.name"),
                _ => return pass(String::new()),
            };
            let known = name.is_some_and(|name| refers(server, me, ask.namespace, ask.resource, name));
            allow_if(known, || no_relationship(me))
        }
        ("", "serviceaccounts", "") => {
            allow_if(ask.verb == "get" && refers(server, me, ask.namespace, ask.resource, ask.name), || {
                no_relationship(me)
            })
        }
        ("", "serviceaccounts", "token") => {
            allow_if(ask.verb == "create" && refers(server, me, ask.namespace, ask.resource, ask.name), || {
                no_relationship(me)
            })
        }
        ("coordination.k8s.io", "leases", "") => {
            let verb = matches!(ask.verb, "get" | "create" | "update" | "patch" | "delete");
            // The name of a new lease is in its body; admission looks there.
            let mine = ask.name == me || (ask.verb == "create" && ask.name.is_empty());
            allow_if(verb && mine && ask.namespace == LEASES, || {
                format!("can only access node lease with the same name as the requesting node in namespace {LEASES}")
            })
        }
        ("" | "events.k8s.io", "events", "") => {
            allow_if(matches!(ask.verb, "create" | "patch" | "update"), String::new)
        }
        ("authentication.k8s.io", "tokenreviews", "")
        | ("authorization.k8s.io", "subjectaccessreviews" | "localsubjectaccessreviews", "") => {
            allow_if(ask.verb == "create", String::new)
        }
        ("certificates.k8s.io", "certificatesigningrequests", "") => {
            allow_if(matches!(ask.verb, "create" | "get" | "list" | "watch"), String::new)
        }
        // Asked by the node about those who call it.
        _ => pass(String::new()),
    }
}

fn no_relationship(me: &str) -> String {
    format!("no relationship found between node '{me}' and this object")
}

fn is_mine(server: &Server, me: &str, namespace: &str, name: &str) -> bool {
    // A pod that is gone is nobody's secret: the kubelet is told so.
    server.pod(namespace, name).is_none_or(|pod| pod.digest()["spec"]["nodeName"] == me)
}

/// Whether a pod on this node uses an object.
fn refers(server: &Server, me: &str, namespace: &str, resource: &str, name: &str) -> bool {
    server
        .store
        .list("pods", Some(namespace))
        .objects
        .iter()
        .filter(|pod| pod.digest()["spec"]["nodeName"] == me)
        .any(|pod| references(&pod.value(), resource).contains(name))
}

/// The names of the secrets, config maps or service accounts that a pod uses.
fn references(pod: &Value, resource: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let spec = &pod["spec"];
    if resource == "serviceaccounts" {
        found.extend(spec["serviceAccountName"].as_str().map(str::to_owned));
        return found;
    }
    collect(spec, resource, &mut found);
    if resource == "secrets" {
        let secrets = spec["imagePullSecrets"].as_array().into_iter().flatten();
        found.extend(secrets.filter_map(|secret| secret["name"].as_str()).map(str::to_owned));
        // The annotations that name secrets: a machine's user data, and the login of its guest.
        let annotations = &pod["metadata"]["annotations"];
        let named = ["vmpod.dev/user-data-secret", "vmpod.dev/guest-login-secret"];
        found.extend(named.iter().filter_map(|name| annotations[name].as_str()).map(str::to_owned));
    }
    found
}

/// Volumes, projections, `env` and `envFrom` name secrets and config maps under these keys.
fn collect(value: &Value, resource: &str, found: &mut BTreeSet<String>) {
    let keys: &[&str] = if resource == "secrets" {
        &["secret", "secretRef", "secretKeyRef", "nodePublishSecretRef"]
    } else {
        &["configMap", "configMapRef", "configMapKeyRef"]
    };
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                if keys.contains(&key.as_str()) {
                    let name = value.get("name").or_else(|| value.get("secretName"));
                    found.extend(name.and_then(Value::as_str).map(str::to_owned));
                }
                collect(value, resource, found);
            }
        }
        Value::Array(list) => list.iter().for_each(|value| collect(value, resource, found)),
        _ => {}
    }
}

/// Labels under `kubernetes.io` that a kubelet may set on its own node.
fn label_is_allowed(label: &str) -> bool {
    const KNOWN: [&str; 11] = [
        "kubernetes.io/hostname",
        "kubernetes.io/os",
        "kubernetes.io/arch",
        "beta.kubernetes.io/os",
        "beta.kubernetes.io/arch",
        "beta.kubernetes.io/instance-type",
        "node.kubernetes.io/instance-type",
        "topology.kubernetes.io/region",
        "topology.kubernetes.io/zone",
        "failure-domain.beta.kubernetes.io/region",
        "failure-domain.beta.kubernetes.io/zone",
    ];
    let Some((domain, _)) = label.split_once('/') else { return true };
    let within = |root: &str| domain == root || domain.strip_suffix(root).is_some_and(|rest| rest.ends_with('.'));
    if !within("kubernetes.io") && !within("k8s.io") {
        return true;
    }
    KNOWN.contains(&label) || within("kubelet.kubernetes.io") || within("node.kubernetes.io")
}

/// Refuses what a kubelet may not write, though it may write the object.
pub(crate) fn admit(
    server: &Server,
    identity: &Identity,
    resource: &Resource,
    subresource: Option<&str>,
    old: Option<&Value>,
    new: &Value,
) -> Result<(), Status> {
    let Some(me) = identity.node_name().filter(|_| !identity.in_group(crate::identity::MASTERS)) else { return Ok(()) };
    let name = new["metadata"]["name"].as_str().unwrap_or_default();
    let refuse = |why: String| Err(Status::forbidden(resource, name, &why));
    match (resource.group.as_str(), resource.plural.as_str()) {
        ("", "nodes") => {
            if name != me {
                return refuse(format!("node {me:?} is not allowed to modify node {name:?}"));
            }
            let labels = |value: &Value| -> BTreeSet<(String, String)> {
                let map = value["metadata"]["labels"].as_object();
                map.into_iter()
                    .flatten()
                    .map(|(key, value)| (key.clone(), value.as_str().unwrap_or_default().into()))
                    .collect()
            };
            let before = old.map(labels).unwrap_or_default();
            let after = labels(new);
            let changed: BTreeSet<&str> = before.symmetric_difference(&after).map(|(key, _)| key.as_str()).collect();
            let bad: Vec<&str> = changed.into_iter().filter(|label| !label_is_allowed(label)).collect();
            if !bad.is_empty() {
                return refuse(format!("is not allowed to set or modify the following labels: {}", bad.join(", ")));
            }
            if old.is_some_and(|old| old["spec"]["taints"] != new["spec"]["taints"]) {
                return refuse("is not allowed to modify taints".into());
            }
            Ok(())
        }
        ("", "pods") if subresource == Some("status") => {
            // Annotations name secrets that the node then may read; the rest is the owner's, too.
            let Some(old) = old else { return Ok(()) };
            // The authorizer looked before the body was read: the pod may be another one by now.
            if old["spec"]["nodeName"] != me {
                return refuse(format!(
                    "node {me:?} can only update pod status for pods with spec.nodeName set to itself"
                ));
            }
            let touched = ["labels", "annotations", "finalizers", "ownerReferences"]
                .into_iter()
                .find(|part| old["metadata"][*part] != new["metadata"][*part]);
            touched.map_or(Ok(()), |part| refuse(format!("node {me:?} cannot update {part} through pod status")))
        }
        ("coordination.k8s.io", "leases") if name != me => {
            refuse(format!("node {me:?} is not allowed to modify the lease of {name:?}"))
        }
        ("", "serviceaccounts") if subresource == Some("token") => admit_token(server, me, resource, new),
        _ => Ok(()),
    }
}

/// A kubelet's token requests are bound to a pod of its own, by UID.
fn admit_token(server: &Server, me: &str, resource: &Resource, request: &Value) -> Result<(), Status> {
    let name = request["metadata"]["name"].as_str().unwrap_or_default();
    let refuse = |why: &str| Err(Status::forbidden(resource, name, why));
    let bound = &request["spec"]["boundObjectRef"];
    if bound["kind"] != "Pod" {
        return refuse(&format!("node {me:?} can only request tokens bound to a pod"));
    }
    let Some(uid) = bound["uid"].as_str() else { return refuse("pod token requests must name the pod's uid") };
    let namespace = request["metadata"]["namespace"].as_str().unwrap_or_default();
    let pod = server.store.get(&Key::new("pods", Some(namespace), bound["name"].as_str().unwrap_or_default()));
    match pod {
        Some(pod) if pod.uid() == uid && pod.digest()["spec"]["nodeName"] == me => Ok(()),
        _ => refuse(&format!("node {me:?} can only request tokens for its own pods")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn finds_what_a_pod_uses() {
        let pod = json!({
            "metadata": { "annotations": { "vmpod.dev/user-data-secret": "s4", "vmpod.dev/guest-login-secret": "s6" } },
            "spec": {
                "serviceAccountName": "sa",
                "imagePullSecrets": [{ "name": "s1" }],
                "volumes": [
                    { "name": "v", "secret": { "secretName": "s2" } },
                    { "name": "p", "projected": { "sources": [{ "configMap": { "name": "c1" } }, { "secret": { "name": "s5" } }] } },
                ],
                "containers": [{
                    "env": [{ "name": "A", "valueFrom": { "secretKeyRef": { "name": "s3", "key": "k" } } }],
                    "envFrom": [{ "configMapRef": { "name": "c2" } }],
                }],
            },
        });
        let names = |resource| references(&pod, resource).into_iter().collect::<Vec<_>>();
        assert_eq!(names("secrets"), ["s1", "s2", "s3", "s4", "s5", "s6"]);
        assert_eq!(names("configmaps"), ["c1", "c2"]);
        assert_eq!(names("serviceaccounts"), ["sa"]);
    }

    #[test]
    fn restricts_only_kubernetes_labels() {
        for label in [
            "site",
            "example.com/x",
            "kubernetes.io/os",
            "node.kubernetes.io/x",
            "kubelet.kubernetes.io/y",
            "notkubernetes.io/x",
        ] {
            assert!(label_is_allowed(label), "{label}");
        }
        for label in
            ["kubernetes.io/x", "node-role.kubernetes.io/master", "node-restriction.kubernetes.io/z", "x.k8s.io/y"]
        {
            assert!(!label_is_allowed(label), "{label}");
        }
    }

    #[test]
    fn reads_field_selectors() {
        assert_eq!(selected("a=b,spec.nodeName=n1", "spec.nodeName"), Some("n1"));
        assert_eq!(selected("spec.nodeName==n1", "spec.nodeName"), Some("n1"));
        assert_eq!(selected("spec.nodeName!=n1", "spec.nodeName"), None);
        assert_eq!(selected("", "spec.nodeName"), None);
    }
}
