//! Role-based access control: what roles and bindings let a caller do.
//!
//! Pure over the objects: [`Policy::of`] reads them once, and questions are answered from that. A role
//! with an `aggregationRule` has the rules of the roles it selects beside its own; they are put together
//! here, when asked, and not written into the role.

use std::collections::{BTreeSet, HashMap};

use serde::Deserialize;
use serde_json::{Value, json};

use super::authorize::Attributes;
use crate::identity::Identity;
use crate::selector::LabelSelector;

/// The API group.
pub(crate) const GROUP: &str = "rbac.authorization.k8s.io";
/// The storage names of the four kinds.
pub(crate) const CLUSTER_ROLES: &str = "clusterroles.rbac.authorization.k8s.io";
pub(crate) const CLUSTER_BINDINGS: &str = "clusterrolebindings.rbac.authorization.k8s.io";
pub(crate) const ROLES: &str = "roles.rbac.authorization.k8s.io";
pub(crate) const BINDINGS: &str = "rolebindings.rbac.authorization.k8s.io";

/// A rule: these verbs on these resources, or on these paths.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Rule {
    verbs: Vec<String>,
    api_groups: Vec<String>,
    resources: Vec<String>,
    resource_names: Vec<String>,
    #[serde(rename = "nonResourceURLs")]
    non_resource_urls: Vec<String>,
}

const ANY: &str = "*";

fn has(list: &[String], wanted: &str) -> bool {
    list.iter().any(|one| one == ANY || one == wanted)
}

/// `pods`, `pods/log`, `*/log` or `*` for `wanted`, a `resource` or `resource/subresource`.
fn has_resource(list: &[String], wanted: &str) -> bool {
    let subresource = wanted.split_once('/').map(|(_, sub)| sub);
    list.iter().any(|one| {
        one == ANY || one == wanted || subresource.is_some_and(|sub| one.strip_prefix("*/").is_some_and(|of| of == sub))
    })
}

fn has_url(list: &[String], wanted: &str) -> bool {
    list.iter().any(|one| {
        one == ANY || one == wanted || one.strip_suffix('*').is_some_and(|prefix| wanted.starts_with(prefix))
    })
}

impl Rule {
    fn allows(&self, ask: &Attributes<'_>) -> bool {
        let whole;
        let resource = if ask.subresource.is_empty() {
            ask.resource
        } else {
            whole = format!("{}/{}", ask.resource, ask.subresource);
            &whole
        };
        has(&self.verbs, ask.verb)
            && has(&self.api_groups, ask.group)
            && has_resource(&self.resources, resource)
            && (self.resource_names.is_empty() || self.resource_names.iter().any(|one| one == ask.selected_name()))
    }

    fn allows_path(&self, verb: &str, path: &str) -> bool {
        has(&self.verbs, verb) && has_url(&self.non_resource_urls, path)
    }

    /// The rule cut into pieces of one verb and one thing each.
    fn pieces(&self) -> Vec<Rule> {
        let mut out = Vec::new();
        let one = |text: &str| vec![text.to_owned()];
        for verb in &self.verbs {
            for url in &self.non_resource_urls {
                out.push(Rule { verbs: one(verb), non_resource_urls: one(url), ..Rule::default() });
            }
            for group in &self.api_groups {
                for resource in &self.resources {
                    let piece =
                        Rule { verbs: one(verb), api_groups: one(group), resources: one(resource), ..Rule::default() };
                    if self.resource_names.is_empty() {
                        out.push(piece);
                    } else {
                        out.extend(
                            self.resource_names.iter().map(|name| Rule { resource_names: one(name), ..piece.clone() }),
                        );
                    }
                }
            }
        }
        out
    }

    /// Whether this rule gives all that a piece gives.
    fn covers(&self, piece: &Rule) -> bool {
        let all = |wanted: &[String], mine: &dyn Fn(&str) -> bool| wanted.iter().all(|one| mine(one));
        let names = self.resource_names.is_empty()
            || (!piece.resource_names.is_empty()
                && all(&piece.resource_names, &|name| self.resource_names.iter().any(|one| one == name)));
        all(&piece.verbs, &|verb| has(&self.verbs, verb))
            && all(&piece.api_groups, &|group| has(&self.api_groups, group))
            && all(&piece.resources, &|resource| has_resource(&self.resources, resource))
            && all(&piece.non_resource_urls, &|url| has_url(&self.non_resource_urls, url))
            && names
    }

    /// As the answer of a rules review.
    pub(crate) fn shown(&self) -> Value {
        if !self.non_resource_urls.is_empty() {
            return json!({ "verbs": self.verbs, "nonResourceURLs": self.non_resource_urls });
        }
        let mut value = json!({ "verbs": self.verbs, "apiGroups": self.api_groups, "resources": self.resources });
        if !self.resource_names.is_empty() {
            value["resourceNames"] = json!(self.resource_names);
        }
        value
    }

    pub(crate) fn is_for_paths(&self) -> bool {
        !self.non_resource_urls.is_empty()
    }

    /// As the real server names a rule in a refusal.
    fn described(&self) -> String {
        let mut parts = Vec::new();
        for (name, list) in [
            ("APIGroups", &self.api_groups),
            ("Resources", &self.resources),
            ("ResourceNames", &self.resource_names),
            ("NonResourceURLs", &self.non_resource_urls),
            ("Verbs", &self.verbs),
        ] {
            if !list.is_empty() {
                let words: Vec<String> = list.iter().map(|one| format!("{one:?}")).collect();
                parts.push(format!("{name}:[{}]", words.join(" ")));
            }
        }
        format!("{{{}}}", parts.join(", "))
    }
}

/// The rules of a role.
pub(crate) fn rules_of(role: &Value) -> Vec<Rule> {
    // What isn't a list of rules was refused on its way in.
    Vec::<Rule>::deserialize(&role["rules"]).unwrap_or_default()
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Subject {
    kind: String,
    name: String,
    namespace: String,
}

impl Subject {
    fn is(&self, identity: &Identity, namespace: Option<&str>) -> bool {
        match self.kind.as_str() {
            "User" => self.name == identity.user,
            "Group" => identity.in_group(&self.name),
            "ServiceAccount" => {
                let of = if self.namespace.is_empty() { namespace.unwrap_or_default() } else { &self.namespace };
                identity.service_account() == Some((of, self.name.as_str()))
            }
            _ => false,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RoleName {
    /// `None` for a `ClusterRole`.
    pub(crate) namespace: Option<String>,
    pub(crate) name: String,
}

impl RoleName {
    /// The role that a binding in `namespace` names.
    pub(crate) fn of(binding: &Value, namespace: Option<&str>) -> Self {
        let reference = &binding["roleRef"];
        Self {
            namespace: namespace.filter(|_| reference["kind"] == "Role").map(str::to_owned),
            name: reference["name"].as_str().unwrap_or_default().to_owned(),
        }
    }
}

#[derive(Debug)]
struct Binding {
    namespace: Option<String>,
    subjects: Vec<Subject>,
    role: RoleName,
}

/// All roles and bindings.
#[derive(Debug, Default)]
pub(crate) struct Policy {
    roles: HashMap<RoleName, Vec<Rule>>,
    bindings: Vec<Binding>,
}

fn name_of(object: &Value, field: &str) -> String {
    object["metadata"][field].as_str().unwrap_or_default().to_owned()
}

fn namespace_of(object: &Value) -> Option<String> {
    Some(name_of(object, "namespace")).filter(|namespace| !namespace.is_empty())
}

impl Policy {
    /// Reads the objects: roles of both kinds, bindings of both kinds.
    pub(crate) fn of(roles: &[Value], bindings: &[Value]) -> Self {
        let mut out: HashMap<RoleName, Vec<Rule>> = HashMap::new();
        for role in roles {
            let mut all = rules_of(role);
            for selector in role["aggregationRule"]["clusterRoleSelectors"].as_array().into_iter().flatten() {
                let selector = LabelSelector::of(selector);
                let selected = roles.iter().filter(|other| namespace_of(other).is_none() && selector.matches(other));
                for rule in selected.flat_map(rules_of) {
                    if !all.contains(&rule) {
                        all.push(rule);
                    }
                }
            }
            out.insert(RoleName { namespace: namespace_of(role), name: name_of(role, "name") }, all);
        }
        let bindings = bindings
            .iter()
            .map(|binding| {
                let namespace = namespace_of(binding);
                Binding {
                    role: RoleName::of(binding, namespace.as_deref()),
                    subjects: Vec::<Subject>::deserialize(&binding["subjects"]).unwrap_or_default(),
                    namespace,
                }
            })
            .collect();
        Self { roles: out, bindings }
    }

    /// The rules of a role; `None` when there is no such role.
    pub(crate) fn role(&self, name: &RoleName) -> Option<&[Rule]> {
        self.roles.get(name).map(Vec::as_slice)
    }

    /// The rules that a caller has in a namespace, or at the cluster scope.
    pub(crate) fn rules<'a>(
        &'a self,
        identity: &'a Identity,
        namespace: Option<&'a str>,
    ) -> impl Iterator<Item = &'a Rule> {
        self.bindings
            .iter()
            .filter(move |binding| binding.namespace.is_none() || binding.namespace.as_deref() == namespace)
            .filter(move |binding| binding.subjects.iter().any(|one| one.is(identity, binding.namespace.as_deref())))
            .filter_map(|binding| self.roles.get(&binding.role))
            .flatten()
    }

    pub(crate) fn allows(&self, identity: &Identity, ask: &Attributes<'_>) -> bool {
        let namespace = Some(ask.namespace).filter(|namespace| !namespace.is_empty());
        self.rules(identity, namespace).any(|rule| rule.allows(ask))
    }

    pub(crate) fn allows_path(&self, identity: &Identity, verb: &str, path: &str) -> bool {
        self.rules(identity, None).any(|rule| rule.allows_path(verb, path))
    }

    /// What of `wanted` the caller does not have, in words; nothing when all is held.
    pub(crate) fn missing(&self, identity: &Identity, namespace: Option<&str>, wanted: &[Rule]) -> Vec<String> {
        let held: Vec<&Rule> = self.rules(identity, namespace).collect();
        let mut missing = BTreeSet::new();
        for piece in wanted.iter().flat_map(Rule::pieces) {
            if !held.iter().any(|rule| rule.covers(&piece)) {
                missing.insert(piece.described());
            }
        }
        missing.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask<'a>(verb: &'a str, resource: &'a str, subresource: &'a str, namespace: &'a str) -> Attributes<'a> {
        Attributes { verb, resource, subresource, namespace, ..Attributes::default() }
    }

    fn policy() -> Policy {
        let role = |name: &str, namespace: &str, rules: Value| json!({ "metadata": { "name": name, "namespace": namespace }, "rules": rules });
        let roles = [
            role(
                "read",
                "",
                json!([{ "verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods", "pods/log"] }]),
            ),
            role("local", "t", json!([{ "verbs": ["*"], "apiGroups": ["x.dev"], "resources": ["*/status"] }])),
            role(
                "one",
                "",
                json!([{ "verbs": ["get"], "apiGroups": [""], "resources": ["secrets"], "resourceNames": ["s"] }]),
            ),
            role("paths", "", json!([{ "verbs": ["get"], "nonResourceURLs": ["/logs/*", "/exact"] }])),
            json!({
                "metadata": { "name": "all-readers", "labels": {} },
                "aggregationRule": { "clusterRoleSelectors": [{ "matchLabels": { "to": "readers" } }] },
            }),
            json!({
                "metadata": { "name": "part", "labels": { "to": "readers" } },
                "rules": [{ "verbs": ["get"], "apiGroups": ["y.dev"], "resources": ["*"] }],
            }),
        ];
        let binding = |namespace: &str, kind: &str, role: &str, subject: Value| json!({ "metadata": { "name": role, "namespace": namespace }, "roleRef": { "kind": kind, "name": role }, "subjects": [subject] });
        let user = |name: &str| json!({ "kind": "User", "name": name });
        let bindings = [
            binding("", "ClusterRole", "read", json!({ "kind": "Group", "name": "readers" })),
            binding("t", "ClusterRole", "one", user("u")),
            binding("t", "Role", "local", json!({ "kind": "ServiceAccount", "name": "sa", "namespace": "t" })),
            binding("", "ClusterRole", "paths", user("u")),
            binding("", "ClusterRole", "all-readers", user("a")),
            binding("", "ClusterRole", "absent", user("u")),
        ];
        Policy::of(&roles, &bindings)
    }

    #[test]
    fn rules_are_matched_as_they_are_written() {
        let policy = policy();
        let reader = Identity::new("x", ["readers"]);
        assert!(policy.allows(&reader, &ask("get", "pods", "", "t")));
        assert!(policy.allows(&reader, &ask("list", "pods", "", "")));
        assert!(policy.allows(&reader, &ask("get", "pods", "log", "t")));
        assert!(!policy.allows(&reader, &ask("get", "pods", "exec", "t")));
        assert!(!policy.allows(&reader, &ask("delete", "pods", "", "t")));
        assert!(!policy.allows(&reader, &Attributes { group: "other", ..ask("get", "pods", "", "t") }));
        assert!(!policy.allows(&Identity::new("x", ["others"]), &ask("get", "pods", "", "t")));
    }

    #[test]
    fn a_binding_in_a_namespace_ends_there() {
        let policy = policy();
        let user = Identity::new("u", Vec::<String>::new());
        let named = |name, namespace| Attributes { name, ..ask("get", "secrets", "", namespace) };
        assert!(policy.allows(&user, &named("s", "t")));
        assert!(!policy.allows(&user, &named("other", "t")));
        assert!(!policy.allows(&user, &named("s", "elsewhere")));
        assert!(!policy.allows(&user, &named("s", "")));
        // A list names the one object by its selector.
        let rule = Rule {
            verbs: vec!["list".into()],
            api_groups: vec![String::new()],
            resources: vec!["secrets".into()],
            resource_names: vec!["s".into()],
            ..Rule::default()
        };
        let mut one = ask("list", "secrets", "", "t");
        assert!(!rule.allows(&one));
        one.field_selector = "metadata.name=s";
        assert!(rule.allows(&one));
    }

    #[test]
    fn service_accounts_subresources_paths_and_aggregation() {
        let policy = policy();
        let account = Identity::new("system:serviceaccount:t:sa", Vec::<String>::new());
        let status = Attributes { group: "x.dev", ..ask("patch", "things", "status", "t") };
        assert!(policy.allows(&account, &status));
        assert!(!policy.allows(&account, &Attributes { subresource: "", ..status }));
        assert!(!policy.allows(&Identity::new("system:serviceaccount:other:sa", Vec::<String>::new()), &status));
        let user = Identity::new("u", Vec::<String>::new());
        assert!(policy.allows_path(&user, "get", "/logs/a") && policy.allows_path(&user, "get", "/exact"));
        assert!(!policy.allows_path(&user, "get", "/exact/more") && !policy.allows_path(&user, "put", "/logs/a"));
        let aggregated = Attributes { group: "y.dev", ..ask("get", "things", "", "") };
        assert!(policy.allows(&Identity::new("a", Vec::<String>::new()), &aggregated));
        assert!(!policy.allows(&user, &aggregated));
    }

    #[test]
    fn nobody_gives_what_he_does_not_have() {
        let policy = policy();
        let reader = Identity::new("x", ["readers"]);
        let rules = |value: Value| rules_of(&json!({ "rules": value }));
        let held = rules(json!([{ "verbs": ["get"], "apiGroups": [""], "resources": ["pods"] }]));
        assert!(policy.missing(&reader, None, &held).is_empty());
        let more = rules(json!([{ "verbs": ["get", "delete"], "apiGroups": [""], "resources": ["pods"] }]));
        assert_eq!(policy.missing(&reader, None, &more), [r#"{APIGroups:[""], Resources:["pods"], Verbs:["delete"]}"#]);
        for all in [
            json!([{ "verbs": ["*"], "apiGroups": [""], "resources": ["pods"] }]),
            json!([{ "verbs": ["get"], "apiGroups": ["*"], "resources": ["pods"] }]),
            json!([{ "verbs": ["get"], "apiGroups": [""], "resources": ["*"] }]),
            json!([{ "verbs": ["get"], "nonResourceURLs": ["*"] }]),
        ] {
            assert!(!policy.missing(&reader, None, &rules(all.clone())).is_empty(), "{all}");
        }
        // One named object is held, all of them are not.
        let user = Identity::new("u", Vec::<String>::new());
        let secrets = |names: Value| {
            rules(json!([{ "verbs": ["get"], "apiGroups": [""], "resources": ["secrets"], "resourceNames": names }]))
        };
        assert!(policy.missing(&user, Some("t"), &secrets(json!(["s"]))).is_empty());
        assert!(!policy.missing(&user, Some("t"), &secrets(json!(["s", "other"]))).is_empty());
        assert!(!policy.missing(&user, Some("t"), &secrets(json!([]))).is_empty());
    }
}
