//! The environment of a container, resolved as the kubelet does it. Pure: what it needs from the API is fetched before.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvVarSource, Pod, ResourceFieldSelector, Secret};

use crate::{
    pod::{self, Requests},
    quantity::{self, Nanos},
};

/// Why a container can't be configured: reason `CreateContainerConfigError`, with this message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("{kind} {name:?} not found")]
    Missing { kind: &'static str, name: String },
    #[error("couldn't find key {key} in {kind} {namespace}/{name}")]
    MissingKey { kind: &'static str, namespace: String, name: String, key: String },
    #[error("the value of key {key} in {kind} {namespace}/{name} is no text")]
    NotText { kind: &'static str, namespace: String, name: String, key: String },
    #[error("environment variable {variable}: field {path:?} is not supported")]
    Field { variable: String, path: String },
    #[error("environment variable {variable}: resource {resource:?} is not supported")]
    Resource { variable: String, resource: String },
    #[error("environment variable {0}: fileKeyRef is not supported on this node")]
    FileKey(String),
}

/// Names of objects that a container's environment needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    pub(crate) config_maps: BTreeSet<String>,
    pub(crate) secrets: BTreeSet<String>,
}

impl Needs {
    pub(crate) fn of(container: &Container) -> Self {
        let mut needs = Self::default();
        for source in container.env_from.iter().flatten() {
            needs.config_maps.extend(source.config_map_ref.as_ref().map(|r| r.name.clone()));
            needs.secrets.extend(source.secret_ref.as_ref().map(|r| r.name.clone()));
        }
        for source in container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref()) {
            needs.config_maps.extend(source.config_map_key_ref.as_ref().map(|r| r.name.clone()));
            needs.secrets.extend(source.secret_key_ref.as_ref().map(|r| r.name.clone()));
        }
        needs
    }
}

/// What was fetched. A name without an entry doesn't exist.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fetched {
    pub(crate) config_maps: BTreeMap<String, ConfigMap>,
    pub(crate) secrets: BTreeMap<String, Secret>,
}

/// What the downward API tells beyond the Pod object.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) host_ip: String,
    pub(crate) pod_ip: String,
    pub(crate) allocatable: Requests,
}

/// The variables, in the order of their first mention; a later value replaces an earlier one.
pub(crate) fn resolve(
    pod: &Pod,
    container: &Container,
    fetched: &Fetched,
    facts: &Facts,
) -> Result<Vec<(String, String)>, ConfigError> {
    let namespace = pod::namespace(pod);
    let mut env = Variables::default();
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        if let Some(from) = &source.config_map_ref {
            match fetched.config_maps.get(&from.name) {
                Some(map) => pod::entries(map.data.as_ref())
                    .for_each(|(key, value)| env.set(&format!("{prefix}{key}"), value.clone())),
                None if from.optional == Some(true) => {}
                None => return Err(ConfigError::Missing { kind: "configmap", name: from.name.clone() }),
            }
        }
        if let Some(from) = &source.secret_ref {
            match fetched.secrets.get(&from.name) {
                Some(secret) => {
                    for (key, value) in secret.data.iter().flatten() {
                        let text = text(&value.0, "Secret", namespace, &from.name, key)?;
                        env.set(&format!("{prefix}{key}"), text);
                    }
                }
                None if from.optional == Some(true) => {}
                None => return Err(ConfigError::Missing { kind: "secret", name: from.name.clone() }),
            }
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match (&variable.value, &variable.value_from) {
            (Some(value), _) if !value.is_empty() => Some(expand(value, &env)),
            (_, Some(source)) => from_source(pod, container, &variable.name, source, fetched, facts)?,
            _ => Some(String::new()),
        };
        if let Some(value) = value {
            env.set(&variable.name, value);
        }
    }
    Ok(env.list)
}

/// The main process's command line, with `$(VAR)` expanded.
pub(crate) fn command_line(command: &[String], args: &[String], env: &[(String, String)]) -> Vec<String> {
    let env = Variables { list: env.to_vec() };
    command.iter().chain(args).map(|word| expand(word, &env)).collect()
}

#[derive(Default)]
struct Variables {
    list: Vec<(String, String)>,
}

impl Variables {
    fn set(&mut self, name: &str, value: String) {
        match self.list.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = value,
            None => self.list.push((name.to_owned(), value)),
        }
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.list.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// Replaces `$(NAME)` by known variables; `$$` is a dollar sign, an unknown name stays as it is.
fn expand(text: &str, env: &Variables) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            if let Some(value) = env.get(name) {
                out.push_str(value);
            } else {
                out.push_str("$(");
                out.push_str(name);
                out.push(')');
            }
            rest = after;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

fn from_source(
    pod: &Pod,
    container: &Container,
    variable: &str,
    source: &EnvVarSource,
    fetched: &Fetched,
    facts: &Facts,
) -> Result<Option<String>, ConfigError> {
    let namespace = pod::namespace(pod).to_owned();
    if let Some(field) = &source.field_ref {
        return field_value(pod, &field.field_path, facts)
            .map(Some)
            .ok_or_else(|| ConfigError::Field { variable: variable.to_owned(), path: field.field_path.clone() });
    }
    if let Some(resource) = &source.resource_field_ref {
        return resource_text(pod, container, resource, facts).map(Some).ok_or_else(|| ConfigError::Resource {
            variable: variable.to_owned(),
            resource: resource.resource.clone(),
        });
    }
    if let Some(from) = &source.config_map_key_ref {
        let optional = from.optional == Some(true);
        let Some(map) = fetched.config_maps.get(&from.name) else {
            return if optional {
                Ok(None)
            } else {
                Err(ConfigError::Missing { kind: "configmap", name: from.name.clone() })
            };
        };
        return match map.data.as_ref().and_then(|data| data.get(&from.key)) {
            Some(value) => Ok(Some(value.clone())),
            None if optional => Ok(None),
            None => Err(ConfigError::MissingKey {
                kind: "ConfigMap",
                namespace,
                name: from.name.clone(),
                key: from.key.clone(),
            }),
        };
    }
    if let Some(from) = &source.secret_key_ref {
        let optional = from.optional == Some(true);
        let Some(secret) = fetched.secrets.get(&from.name) else {
            return if optional {
                Ok(None)
            } else {
                Err(ConfigError::Missing { kind: "secret", name: from.name.clone() })
            };
        };
        return match secret.data.as_ref().and_then(|data| data.get(&from.key)) {
            Some(value) => text(&value.0, "Secret", &namespace, &from.name, &from.key).map(Some),
            None if optional => Ok(None),
            None => Err(ConfigError::MissingKey {
                kind: "Secret",
                namespace,
                name: from.name.clone(),
                key: from.key.clone(),
            }),
        };
    }
    if source.file_key_ref.is_some() {
        return Err(ConfigError::FileKey(variable.to_owned()));
    }
    Ok(Some(String::new()))
}

fn text(bytes: &[u8], kind: &'static str, namespace: &str, name: &str, key: &str) -> Result<String, ConfigError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| ConfigError::NotText {
        kind,
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        key: key.to_owned(),
    })
}

/// A field of the pod, as text.
pub(crate) fn field_value(pod: &Pod, path: &str, facts: &Facts) -> Option<String> {
    let meta = &pod.metadata;
    if let Some((map, key)) = path.split_once('[') {
        let key = key.strip_prefix('\'')?.strip_suffix("']")?;
        let map = match map {
            "metadata.labels" => meta.labels.as_ref(),
            "metadata.annotations" => meta.annotations.as_ref(),
            _ => return None,
        };
        return Some(map.and_then(|map| map.get(key)).cloned().unwrap_or_default());
    }
    Some(match path {
        "metadata.name" => pod::name(pod).to_owned(),
        "metadata.namespace" => pod::namespace(pod).to_owned(),
        "metadata.uid" => meta.uid.clone().unwrap_or_default(),
        "spec.nodeName" => pod::spec(pod)?.node_name.clone().unwrap_or_default(),
        "spec.serviceAccountName" => pod::spec(pod)?.service_account_name.clone().unwrap_or_default(),
        "status.hostIP" | "status.hostIPs" => facts.host_ip.clone(),
        "status.podIP" | "status.podIPs" => facts.pod_ip.clone(),
        _ => return None,
    })
}

/// A container's resource in units of its divisor, as text; `container` is meant when the reference names none.
pub(crate) fn resource_text(
    pod: &Pod,
    container: &Container,
    resource: &ResourceFieldSelector,
    facts: &Facts,
) -> Option<String> {
    let divisor = resource.divisor.as_ref().and_then(|d| Nanos::parse(&d.0).ok()).unwrap_or_default();
    let of = resource
        .container_name
        .as_deref()
        .filter(|name| !name.is_empty())
        .and_then(|name| pod::spec(pod)?.containers.iter().find(|c| c.name == name))
        .unwrap_or(container);
    resource_value(of, &resource.resource, facts).map(|value| value.divided_up(divisor).to_string())
}

fn resource_value(container: &Container, resource: &str, facts: &Facts) -> Option<Nanos> {
    let (list, name) = resource.split_once('.')?;
    let resources = container.resources.as_ref();
    let (requests, limits) = (resources.and_then(|r| r.requests.as_ref()), resources.and_then(|r| r.limits.as_ref()));
    let whole = match name {
        "cpu" => Nanos::from_millis(facts.allocatable.millicpus),
        "memory" => Nanos::from_units(facts.allocatable.memory),
        "ephemeral-storage" => Nanos::from_units(facts.allocatable.ephemeral),
        _ => return None,
    };
    match list {
        // What has no limit may use what the node has.
        "limits" => Some(quantity::of(limits, name).unwrap_or(whole)),
        "requests" => Some(quantity::of(requests, name).or_else(|| quantity::of(limits, name)).unwrap_or_default()),
        _ => None,
    }
}

#[cfg(test)]
#[expect(clippy::needless_pass_by_value, reason = "JSON is written in place")]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn resolved(container: Value, objects: &Fetched) -> Result<Vec<(String, String)>, ConfigError> {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u", "labels": {"app": "web"}},
            "spec": {"nodeName": "n", "containers": [container]}}))
        .unwrap();
        let facts = Facts {
            host_ip: "10.0.0.1".to_owned(),
            pod_ip: "127.64.0.1".to_owned(),
            allocatable: Requests { millicpus: 4000, memory: 1 << 30, ephemeral: 0 },
        };
        resolve(&pod, pod::machine_container(&pod).unwrap(), objects, &facts)
    }

    fn objects() -> Fetched {
        Fetched {
            config_maps: BTreeMap::from([(
                "cm".to_owned(),
                serde_json::from_value(json!({"data": {"A": "from-cm", "B": "b"}})).unwrap(),
            )]),
            secrets: BTreeMap::from([(
                "s".to_owned(),
                serde_json::from_value(json!({"data": {"TOKEN": "aGVsbG8=", "BAD": "/w=="}})).unwrap(),
            )]),
        }
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }

    #[test]
    fn sources_are_read_in_order_and_later_values_win() {
        let env = resolved(
            json!({"name": "vm",
                "envFrom": [{"configMapRef": {"name": "cm"}}, {"prefix": "P_", "configMapRef": {"name": "cm"}}, {"secretRef": {"name": "gone", "optional": true}}],
                "env": [
                    {"name": "A", "value": "own"},
                    {"name": "T", "valueFrom": {"secretKeyRef": {"name": "s", "key": "TOKEN"}}},
                    {"name": "SKIPPED", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "none", "optional": true}}},
                    {"name": "E"},
                    {"name": "X", "value": "$(A)-$(T)-$$(A)-$(NONE)-$A-$("}]}),
            &objects(),
        )
        .unwrap();
        assert_eq!(
            env,
            pairs(&[
                ("A", "own"),
                ("B", "b"),
                ("P_A", "from-cm"),
                ("P_B", "b"),
                ("T", "hello"),
                ("E", ""),
                ("X", "own-hello-$(A)-$(NONE)-$A-$(")
            ])
        );
    }

    #[test]
    fn the_downward_api_tells_about_the_pod() {
        let field = |path: &str| json!({"name": path, "valueFrom": {"fieldRef": {"fieldPath": path}}});
        let resource = |what: &str, divisor: &str| json!({"name": what, "valueFrom": {"resourceFieldRef": {"resource": what, "divisor": divisor}}});
        let env = resolved(
            json!({"name": "vm", "resources": {"requests": {"memory": "64Mi"}, "limits": {"cpu": "1500m"}},
                "env": [field("metadata.name"), field("metadata.labels['app']"), field("metadata.annotations['no']"), field("spec.nodeName"),
                    field("status.podIP"), field("status.hostIP"), resource("limits.cpu", "1"), resource("requests.memory", "1Mi"),
                    resource("limits.memory", "0"), resource("requests.cpu", "1m")]}),
            &Fetched::default(),
        )
        .unwrap();
        let values: Vec<_> = env.iter().map(|(_, value)| value.as_str()).collect();
        assert_eq!(values, ["p", "web", "", "n", "127.64.0.1", "10.0.0.1", "2", "64", "1073741824", "1500"]);
    }

    #[test]
    fn what_is_missing_is_named() {
        for (container, message) in [
            (json!({"envFrom": [{"configMapRef": {"name": "no"}}]}), "configmap \"no\" not found"),
            (json!({"envFrom": [{"secretRef": {"name": "no"}}]}), "secret \"no\" not found"),
            (
                json!({"env": [{"name": "V", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "Z"}}}]}),
                "couldn't find key Z in ConfigMap ns/cm",
            ),
            (
                json!({"env": [{"name": "V", "valueFrom": {"secretKeyRef": {"name": "s", "key": "BAD"}}}]}),
                "the value of key BAD in Secret ns/s is no text",
            ),
            (
                json!({"env": [{"name": "V", "valueFrom": {"fieldRef": {"fieldPath": "spec.nope"}}}]}),
                "environment variable V: field \"spec.nope\" is not supported",
            ),
        ] {
            let mut container = container;
            container["name"] = json!("vm");
            assert_eq!(resolved(container, &objects()).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn commands_are_expanded_too() {
        let words = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            command_line(&words(&["sh", "-c"]), &words(&["echo $(A) $$(A)"]), &pairs(&[("A", "1")])),
            words(&["sh", "-c", "echo 1 $(A)"])
        );
    }
}
