//! The roles, bindings and priority classes that are there from the start.
//!
//! At every start, what is missing of them is added; what a person added to them stays. A role or binding
//! whose annotation `rbac.authorization.kubernetes.io/autoupdate` is `false` is left alone.

use serde::Deserialize;
use serde_json::{Value, json};

use super::rbac::{CLUSTER_BINDINGS, CLUSTER_ROLES, GROUP};
use crate::server::Server;
use crate::status::Status;
use crate::store::{Change, Key};

const AUTOUPDATE: &str = "rbac.authorization.kubernetes.io/autoupdate";

#[derive(Debug, Deserialize)]
struct Defaults {
    roles: Vec<Role>,
    bindings: Vec<Binding>,
}

#[derive(Debug, Deserialize)]
struct Role {
    name: String,
    rules: Vec<Value>,
    /// The roles that are put together in this one.
    #[serde(default)]
    aggregate: Vec<String>,
    /// The role that this one is a part of.
    #[serde(default)]
    to: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Binding {
    name: String,
    role: String,
    groups: Vec<String>,
}

/// The list that a start completes.
struct Wanted {
    key: Key,
    value: Value,
    list: &'static str,
}

fn object(kind: &str, name: &str) -> Value {
    json!({
        "apiVersion": format!("{GROUP}/v1"), "kind": kind,
        "metadata": {
            "name": name,
            "labels": { "kubernetes.io/bootstrapping": "rbac-defaults" },
            "annotations": { AUTOUPDATE: "true" },
        },
    })
}

fn aggregate_label(role: &str) -> String {
    format!("rbac.authorization.k8s.io/aggregate-to-{role}")
}

fn role(role: Role) -> Wanted {
    let mut value = object("ClusterRole", &role.name);
    value["rules"] = role.rules.into();
    if let Some(to) = &role.to {
        value["metadata"]["labels"][aggregate_label(to)] = "true".into();
    }
    if !role.aggregate.is_empty() {
        let selectors: Vec<Value> =
            role.aggregate.iter().map(|part| json!({ "matchLabels": { aggregate_label(part): "true" } })).collect();
        value["aggregationRule"] = json!({ "clusterRoleSelectors": selectors });
    }
    Wanted { key: Key::new(CLUSTER_ROLES, None, &role.name), value, list: "rules" }
}

fn binding(binding: &Binding) -> Wanted {
    let mut value = object("ClusterRoleBinding", &binding.name);
    let subjects: Vec<Value> =
        binding.groups.iter().map(|name| json!({ "kind": "Group", "apiGroup": GROUP, "name": name })).collect();
    value["subjects"] = subjects.into();
    value["roleRef"] = json!({ "apiGroup": GROUP, "kind": "ClusterRole", "name": binding.role });
    Wanted { key: Key::new(CLUSTER_BINDINGS, None, &binding.name), value, list: "subjects" }
}

fn priority_class((name, value, description): (&str, i64, &str)) -> Wanted {
    let value = json!({
        "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": { "name": name, "generation": 1 },
        "value": value, "description": description, "preemptionPolicy": "PreemptLowerPriority",
    });
    Wanted { key: Key::new(crate::kinds::PRIORITY_CLASSES, None, name), value, list: "" }
}

/// What is to be stored in place of `old`, if anything is.
fn completed(old: Option<&Value>, wanted: &Wanted, uid: &str, now: &str) -> Option<Value> {
    let Some(old) = old else {
        let mut value = wanted.value.clone();
        value["metadata"]["uid"] = uid.into();
        value["metadata"]["creationTimestamp"] = now.into();
        return Some(value);
    };
    if wanted.list.is_empty() || old["metadata"]["annotations"][AUTOUPDATE] == "false" {
        return None;
    }
    let mut value = old.clone();
    let mut list = old[wanted.list].as_array().cloned().unwrap_or_default();
    for one in wanted.value[wanted.list].as_array().into_iter().flatten() {
        if !list.contains(one) {
            list.push(one.clone());
        }
    }
    value[wanted.list] = list.into();
    (value != *old).then_some(value)
}

/// Adds what is missing.
pub(crate) async fn provision(server: &Server) -> Result<(), Status> {
    let defaults: Defaults =
        serde_saphyr::from_str(include_str!("defaults.yaml")).map_err(|error| Status::internal(error.to_string()))?;
    let classes = [
        (
            "system-cluster-critical",
            2_000_000_000,
            "Used for system critical pods that must run in the cluster, but can be moved to another node if necessary.",
        ),
        (
            "system-node-critical",
            2_000_001_000,
            "Used for system critical pods that must not be moved from their current node.",
        ),
    ];
    let wanted: Vec<Wanted> = defaults
        .roles
        .into_iter()
        .map(role)
        .chain(defaults.bindings.iter().map(binding))
        .chain(classes.map(priority_class))
        .collect();
    let now = crate::time::seconds(jiff::Timestamp::now());
    let writes = wanted.iter().map(|wanted| {
        let uid = uuid::Uuid::new_v4().to_string();
        let now = &now;
        async move {
            let written: Result<_, Status> = server
                .store
                .mutate(&wanted.key, None, |old, _| {
                    let old = old.map(|old| old.value());
                    Ok(completed(old.as_ref(), wanted, &uid, now).map_or(Change::Keep, Change::Put))
                })
                .await;
            written.map(|_| ())
        }
    });
    futures::future::try_join_all(writes).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::{self, Context, Registry};

    #[test]
    fn the_defaults_keep_the_rules_of_their_kinds() {
        let defaults: Defaults = serde_saphyr::from_str(include_str!("defaults.yaml")).unwrap();
        let roles: Vec<String> = defaults.roles.iter().map(|role| role.name.clone()).collect();
        let registry = Registry::builtin();
        let context = Context { uid: "u", ..Context::plain("m", jiff::Timestamp::UNIX_EPOCH) };
        for one in &defaults.bindings {
            assert!(roles.contains(&one.role), "{} names no role that there is", one.name);
        }
        let all = defaults.roles.into_iter().map(role).chain(defaults.bindings.iter().map(binding));
        for wanted in all {
            let kind = registry.by_kind(GROUP, "v1", wanted.value["kind"].as_str().unwrap()).unwrap();
            kinds::create(&kind, wanted.value.clone(), &context).unwrap();
        }
    }

    #[test]
    fn a_start_adds_what_is_missing_and_takes_nothing_away() {
        let wanted = role(Role {
            name: "r".into(),
            rules: vec![json!({ "verbs": ["get"] }), json!({ "verbs": ["list"] })],
            aggregate: Vec::new(),
            to: None,
        });
        let fresh = completed(None, &wanted, "u", "now").unwrap();
        assert_eq!(completed(Some(&fresh), &wanted, "u", "now"), None);
        let mut changed = fresh.clone();
        changed["rules"] = json!([{ "verbs": ["list"] }, { "verbs": ["mine"] }]);
        let after = completed(Some(&changed), &wanted, "u", "now").unwrap();
        assert_eq!(after["rules"], json!([{ "verbs": ["list"] }, { "verbs": ["mine"] }, { "verbs": ["get"] }]));
        changed["metadata"]["annotations"][AUTOUPDATE] = "false".into();
        assert_eq!(completed(Some(&changed), &wanted, "u", "now"), None);
    }
}
