//! The policy as it is in the store, and what it means for writes of its own objects.

use std::sync::{Arc, PoisonError, RwLock};

use serde_json::Value;

use super::authorize::{self, Attributes, Decision};
use super::rbac::{BINDINGS, CLUSTER_BINDINGS, CLUSTER_ROLES, GROUP, Policy, ROLES, RoleName, Rule, rules_of};
use crate::identity::{Identity, MASTERS};
use crate::kinds::Resource;
use crate::server::Server;
use crate::status::Status;

/// The policy that was read last, and what it was read from.
#[derive(Debug, Default)]
pub(crate) struct Cached(RwLock<Option<(Mark, Arc<Policy>)>>);

/// How many objects there are and the newest of their revisions: another set of objects has another mark.
type Mark = (usize, u64);

/// The policy now.
pub(crate) fn of(server: &Server) -> Arc<Policy> {
    let listed = [CLUSTER_ROLES, ROLES, CLUSTER_BINDINGS, BINDINGS].map(|kind| server.store.list(kind, None).objects);
    let mark: Mark = (
        listed.iter().map(Vec::len).sum(),
        listed.iter().flatten().map(|object| object.revision()).max().unwrap_or_default(),
    );
    let cached = server.policy.0.read().unwrap_or_else(PoisonError::into_inner);
    if let Some((found, policy)) = cached.as_ref()
        && *found == mark
    {
        return policy.clone();
    }
    drop(cached);
    let values = |of: &[usize]| -> Vec<Value> {
        of.iter().flat_map(|index| &listed[*index]).map(|object| object.value()).collect()
    };
    let policy = Arc::new(Policy::of(&values(&[0, 1]), &values(&[2, 3])));
    *server.policy.0.write().unwrap_or_else(PoisonError::into_inner) = Some((mark, policy.clone()));
    policy
}

/// Refuses a role or binding that would give more than its writer has.
pub(crate) fn admit(
    server: &Server,
    identity: &Identity,
    resource: &Resource,
    old: Option<&Value>,
    new: &Value,
) -> Result<(), Status> {
    if resource.group != GROUP || identity.in_group(MASTERS) {
        return Ok(());
    }
    let text = |field: &str| new["metadata"][field].as_str().unwrap_or_default();
    let (name, namespace) = (text("name"), Some(text("namespace")).filter(|namespace| !namespace.is_empty()));
    let may = |verb: &str, resource: &str, name: &str| {
        let ask = Attributes {
            verb,
            group: GROUP,
            resource,
            name,
            namespace: namespace.unwrap_or_default(),
            ..Attributes::default()
        };
        authorize::decide(server, identity, &ask) == Decision::Allow
    };
    let policy = of(server);
    let is_role = matches!(resource.kind.as_str(), "Role" | "ClusterRole");
    let wanted: Vec<Rule> = if is_role {
        let same =
            old.is_some_and(|old| old["rules"] == new["rules"] && old["aggregationRule"] == new["aggregationRule"]);
        if same || may("escalate", &resource.plural, name) {
            return Ok(());
        }
        if new["aggregationRule"].is_object() && old.is_none_or(|old| old["aggregationRule"] != new["aggregationRule"])
        {
            // What it will select some day isn't known yet.
            let everything = rules_of(&serde_json::json!({ "rules": [
                { "verbs": ["*"], "apiGroups": ["*"], "resources": ["*"] }, { "verbs": ["*"], "nonResourceURLs": ["*"] },
            ] }));
            if !policy.missing(identity, None, &everything).is_empty() {
                let why = "must have cluster-admin privileges to use an aggregationRule";
                return Err(Status::forbidden(resource, name, why));
            }
        }
        rules_of(new)
    } else {
        let role = RoleName::of(new, namespace);
        let same = old.is_some_and(|old| old["subjects"] == new["subjects"] && old["roleRef"] == new["roleRef"]);
        let plural = if role.namespace.is_some() { "roles" } else { "clusterroles" };
        if same || may("bind", plural, &role.name) {
            return Ok(());
        }
        let rules = policy.role(&role).ok_or_else(|| {
            let qualified = format!("{plural}.{GROUP}");
            let mut status = Status::not_found(resource, &role.name);
            status.message = format!("{qualified} {:?} not found", role.name);
            status
        })?;
        rules.to_vec()
    };
    let missing = policy.missing(identity, namespace, &wanted);
    if missing.is_empty() {
        return Ok(());
    }
    let groups: Vec<String> = identity.groups.iter().map(|group| format!("{group:?}")).collect();
    let why = format!(
        "user {:?} (groups=[{}]) is attempting to grant RBAC permissions not currently held:\n{}",
        identity.user,
        groups.join(" "),
        missing.join("\n")
    );
    Err(Status::forbidden(resource, name, &why))
}
