//! The resources served, and the discovery documents that say so.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use base64::Engine as _;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{Resource, Subresource};
use crate::crd;
use crate::metrics;
use crate::schema::Type;

const ALL: [&str; 8] = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
const CUSTOM: [&str; 8] = ["delete", "deletecollection", "get", "list", "patch", "create", "update", "watch"];
const NO_COLLECTION: [&str; 7] = ["create", "delete", "get", "list", "patch", "update", "watch"];
const READ_WRITE: [&str; 3] = ["get", "patch", "update"];
const STREAM: [&str; 2] = ["create", "get"];

/// Everything served: the kinds built in and those of custom resource definitions.
#[derive(Clone, Debug)]
pub(crate) struct Registry {
    resources: Arc<Vec<Arc<Resource>>>,
}

impl Registry {
    /// The kinds built in.
    #[must_use]
    pub(crate) fn builtin() -> Self {
        Self { resources: Arc::new(BUILTIN.clone()) }
    }

    /// The kinds built in and those of these definitions, as far as they are established and served.
    #[must_use]
    pub(crate) fn with_crds(&self, definitions: &[&Value]) -> Self {
        let mut resources: Vec<_> = self.resources.iter().filter(|one| !one.is_custom()).cloned().collect();
        for definition in definitions {
            resources.extend(crd::resources(definition).into_iter().map(Arc::new));
        }
        Self { resources: Arc::new(resources) }
    }

    /// All of them, stored or not.
    #[must_use]
    pub(crate) fn resources(&self) -> &[Arc<Resource>] {
        &self.resources
    }

    /// The resource at `/apis/GROUP/VERSION/…/PLURAL`.
    #[must_use]
    pub(crate) fn resource(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Resource>> {
        self.find(|one| one.group == group && one.version == version && one.plural == plural)
    }

    /// The resource of a kind.
    #[must_use]
    pub(crate) fn by_kind(&self, group: &str, version: &str, kind: &str) -> Option<Arc<Resource>> {
        self.find(|one| one.group == group && one.version == version && one.kind == kind)
    }

    fn find(&self, wanted: impl Fn(&Resource) -> bool) -> Option<Arc<Resource>> {
        self.resources.iter().find(|one| wanted(one)).cloned()
    }

    /// The kind of the bodies of a subresource: `Binding` for `pods/binding`, the resource itself for `status`.
    #[must_use]
    pub(crate) fn body(&self, resource: &Resource, subresource: &str) -> Option<Arc<Resource>> {
        let found = resource.subresource(subresource)?;
        if found.kind == resource.kind && found.group.is_none() {
            return self.find(|one| {
                one.group == resource.group && one.version == resource.version && one.plural == resource.plural
            });
        }
        BODIES.iter().find(|one| one.kind == found.kind).cloned()
    }

    fn group_versions(&self) -> Vec<(String, Vec<String>)> {
        let mut groups: Vec<(String, Vec<String>)> = Vec::new();
        for resource in self.resources.iter() {
            match groups.iter_mut().find(|(group, _)| *group == resource.group) {
                Some((_, versions)) if versions.contains(&resource.version) => {}
                Some((_, versions)) => versions.push(resource.version.clone()),
                None => groups.push((resource.group.clone(), vec![resource.version.clone()])),
            }
        }
        for (_, versions) in &mut groups {
            versions.sort_by_key(|version| crd::version_rank(version));
        }
        groups
    }

    /// `GET /api`.
    #[must_use]
    pub(crate) fn discovery_api_versions(&self, server: &str) -> Value {
        let groups = self.group_versions();
        let versions = groups.iter().find(|(group, _)| group.is_empty()).map(|(_, versions)| versions);
        json!({"kind": "APIVersions", "versions": versions,
            "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": server}]})
    }

    /// `GET /apis`.
    #[must_use]
    pub(crate) fn discovery_groups(&self) -> Value {
        let groups: Vec<Value> = self
            .group_versions()
            .iter()
            .filter(|(group, _)| !group.is_empty())
            .map(|(group, versions)| group_value(group, versions))
            .collect();
        json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
    }

    /// `GET /apis/GROUP`.
    #[must_use]
    pub(crate) fn discovery_group(&self, group: &str) -> Option<Value> {
        let groups = self.group_versions();
        let (name, versions) = groups.iter().find(|(name, _)| name == group && !name.is_empty())?;
        let mut value = group_value(name, versions);
        value["kind"] = "APIGroup".into();
        value["apiVersion"] = "v1".into();
        Some(value)
    }

    /// `GET /api/v1` and `GET /apis/GROUP/VERSION`.
    #[must_use]
    pub(crate) fn discovery_resources(&self, group: &str, version: &str) -> Option<Value> {
        let mut list: BTreeMap<(String, usize), Value> = BTreeMap::new();
        let mut found = false;
        for resource in self.resources.iter().filter(|one| one.group == group && one.version == version) {
            found = true;
            let mut entry = json!({
                "name": resource.plural, "singularName": resource.singular, "namespaced": resource.namespaced,
                "kind": resource.kind, "verbs": resource.verbs,
            });
            if !resource.short_names.is_empty() {
                entry["shortNames"] = json!(resource.short_names);
            }
            if !resource.categories.is_empty() {
                entry["categories"] = json!(resource.categories);
            }
            if resource.stored {
                entry["storageVersionHash"] = storage_version_hash(resource).into();
            }
            list.insert((resource.plural.clone(), 0), entry);
            for (index, sub) in resource.subresources.iter().enumerate() {
                let name = format!("{}/{}", resource.plural, sub.name);
                let mut entry = json!({
                    "name": name, "singularName": "", "namespaced": resource.namespaced, "kind": sub.kind, "verbs": sub.verbs,
                });
                if let Some((group, version)) = sub.group {
                    entry["group"] = group.into();
                    entry["version"] = version.into();
                }
                // Subresources follow by name, those of custom kinds in the order of their definition.
                let key = if resource.is_custom() { (resource.plural.clone(), index + 1) } else { (name, 0) };
                list.insert(key, entry);
            }
        }
        let group_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
        found.then(|| {
            let resources: Vec<Value> = list.into_values().collect();
            let mut document =
                json!({"kind": "APIResourceList", "groupVersion": group_version, "resources": resources});
            // The core group's document is older than the habit of naming a version.
            if !group.is_empty() {
                document["apiVersion"] = "v1".into();
            }
            document
        })
    }

    /// The aggregated discovery document (`g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList`) of `/api` or `/apis`.
    #[must_use]
    pub(crate) fn aggregated(&self, core: bool) -> Value {
        let mut items = Vec::new();
        for (group, versions) in self.group_versions() {
            if group.is_empty() != core {
                continue;
            }
            let versions: Vec<Value> = versions
                .iter()
                .map(|version| {
                    let resources: Vec<Value> = self
                        .resources
                        .iter()
                        .filter(|one| one.group == group && one.version == *version)
                        .map(|one| aggregated_resource(one))
                        .collect();
                    json!({"version": version, "resources": resources, "freshness": "Current"})
                })
                .collect();
            let metadata = if core { json!({}) } else { json!({"name": group}) };
            items.push(json!({"metadata": metadata, "versions": versions}));
        }
        json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items})
    }
}

fn group_value(group: &str, versions: &[String]) -> Value {
    let list: Vec<Value> = versions
        .iter()
        .map(|version| json!({"groupVersion": format!("{group}/{version}"), "version": version}))
        .collect();
    json!({"name": group, "versions": list, "preferredVersion": list.first()})
}

fn aggregated_resource(resource: &Resource) -> Value {
    let scope = if resource.namespaced { "Namespaced" } else { "Cluster" };
    let subresources: Vec<Value> = resource
        .subresources
        .iter()
        .map(|sub| {
            let (group, version) = sub.group.unwrap_or((&resource.group, &resource.version));
            json!({"subresource": sub.name, "verbs": sub.verbs,
                "responseKind": {"group": group, "version": version, "kind": sub.kind}})
        })
        .collect();
    let mut value = json!({
        "resource": resource.plural, "scope": scope, "singularResource": resource.singular, "verbs": resource.verbs,
        "responseKind": {"group": resource.group, "version": resource.version, "kind": resource.kind},
    });
    if !resource.short_names.is_empty() {
        value["shortNames"] = json!(resource.short_names);
    }
    if !resource.categories.is_empty() {
        value["categories"] = json!(resource.categories);
    }
    if !subresources.is_empty() {
        value["subresources"] = subresources.into();
    }
    value
}

fn storage_version_hash(resource: &Resource) -> String {
    // Definitions are still stored as they were at first.
    let version = if resource.is("apiext.CustomResourceDefinition") { "v1beta1" } else { &resource.version };
    let text = format!("{}/{version}/{}", resource.group, resource.kind);
    base64::engine::general_purpose::STANDARD.encode(&Sha256::digest(text.as_bytes())[..8])
}

/// Whether this kind is one of those built in.
pub(crate) fn known(group: &str, version: &str, kind: &str) -> bool {
    BUILTIN.iter().chain(BODIES.iter()).any(|one| one.group == group && one.version == version && one.kind == kind)
}

/// The custom kinds' verbs.
pub(crate) fn custom_verbs() -> Vec<&'static str> {
    CUSTOM.to_vec()
}

/// The subresources that a custom kind may have.
pub(crate) fn custom_subresource(kind: &str, name: &'static str) -> Subresource {
    if name == "scale" {
        Subresource { name, kind: "Scale".into(), group: Some(("autoscaling", "v1")), verbs: READ_WRITE.to_vec() }
    } else {
        Subresource { name, kind: kind.to_owned(), group: None, verbs: READ_WRITE.to_vec() }
    }
}

struct Row {
    group: &'static str,
    ty: &'static str,
    plural: &'static str,
    namespaced: bool,
    short: &'static [&'static str],
    categories: &'static [&'static str],
    verbs: &'static [&'static str],
    subresources: &'static [(&'static str, &'static str, &'static [&'static str])],
}

const PLAIN: Row = Row {
    group: "",
    ty: "",
    plural: "",
    namespaced: true,
    short: &[],
    categories: &[],
    verbs: &ALL,
    subresources: &[],
};

const CREATE: Row = Row { verbs: &["create"], ..PLAIN };

/// The group of role-based access control.
const RBAC: &str = "rbac.authorization.k8s.io";

const ROWS: [Row; 26] = [
    Row { ty: "core.Binding", plural: "bindings", ..CREATE },
    Row { ty: "core.ConfigMap", plural: "configmaps", short: &["cm"], ..PLAIN },
    Row { ty: "core.Event", plural: "events", short: &["ev"], ..PLAIN },
    Row {
        ty: "core.Namespace",
        plural: "namespaces",
        namespaced: false,
        short: &["ns"],
        verbs: &NO_COLLECTION,
        subresources: &[("finalize", "", &["update"]), ("status", "", &READ_WRITE)],
        ..PLAIN
    },
    Row {
        ty: "core.Node",
        plural: "nodes",
        namespaced: false,
        short: &["no"],
        subresources: &[("status", "", &READ_WRITE)],
        ..PLAIN
    },
    Row {
        ty: "core.Pod",
        plural: "pods",
        short: &["po"],
        categories: &["all"],
        subresources: &[
            ("attach", "PodAttachOptions", &STREAM),
            ("binding", "Binding", &["create"]),
            ("ephemeralcontainers", "", &READ_WRITE),
            ("eviction", "Eviction", &["create"]),
            ("exec", "PodExecOptions", &STREAM),
            ("log", "", &["get"]),
            ("portforward", "PodPortForwardOptions", &STREAM),
            ("status", "", &READ_WRITE),
        ],
        ..PLAIN
    },
    Row { ty: "core.Secret", plural: "secrets", ..PLAIN },
    Row {
        ty: "core.ServiceAccount",
        plural: "serviceaccounts",
        short: &["sa"],
        subresources: &[("token", "TokenRequest", &["create"])],
        ..PLAIN
    },
    Row { group: "coordination.k8s.io", ty: "coordination.Lease", plural: "leases", ..PLAIN },
    Row {
        group: "apiextensions.k8s.io",
        ty: "apiext.CustomResourceDefinition",
        plural: "customresourcedefinitions",
        namespaced: false,
        short: &["crd", "crds"],
        categories: &["api-extensions"],
        subresources: &[("status", "", &READ_WRITE)],
        ..PLAIN
    },
    Row {
        group: "authentication.k8s.io",
        ty: "authentication.SelfSubjectReview",
        plural: "selfsubjectreviews",
        namespaced: false,
        ..CREATE
    },
    Row {
        group: "authentication.k8s.io",
        ty: "authentication.TokenReview",
        plural: "tokenreviews",
        namespaced: false,
        ..CREATE
    },
    Row {
        group: "authorization.k8s.io",
        ty: "authorization.LocalSubjectAccessReview",
        plural: "localsubjectaccessreviews",
        ..CREATE
    },
    Row {
        group: "authorization.k8s.io",
        ty: "authorization.SelfSubjectAccessReview",
        plural: "selfsubjectaccessreviews",
        namespaced: false,
        ..CREATE
    },
    Row {
        group: "authorization.k8s.io",
        ty: "authorization.SelfSubjectRulesReview",
        plural: "selfsubjectrulesreviews",
        namespaced: false,
        ..CREATE
    },
    Row {
        group: "authorization.k8s.io",
        ty: "authorization.SubjectAccessReview",
        plural: "subjectaccessreviews",
        namespaced: false,
        ..CREATE
    },
    Row {
        group: "certificates.k8s.io",
        ty: "certificates.CertificateSigningRequest",
        plural: "certificatesigningrequests",
        namespaced: false,
        short: &["csr"],
        subresources: &[("approval", "", &READ_WRITE), ("status", "", &READ_WRITE)],
        ..PLAIN
    },
    Row {
        group: "policy",
        ty: "policy.PodDisruptionBudget",
        plural: "poddisruptionbudgets",
        short: &["pdb"],
        subresources: &[("status", "", &READ_WRITE)],
        ..PLAIN
    },
    Row { group: RBAC, ty: "rbac.ClusterRole", plural: "clusterroles", namespaced: false, ..PLAIN },
    Row { group: RBAC, ty: "rbac.ClusterRoleBinding", plural: "clusterrolebindings", namespaced: false, ..PLAIN },
    Row { group: RBAC, ty: "rbac.Role", plural: "roles", ..PLAIN },
    Row { group: RBAC, ty: "rbac.RoleBinding", plural: "rolebindings", ..PLAIN },
    Row {
        group: "scheduling.k8s.io",
        ty: "scheduling.PriorityClass",
        plural: "priorityclasses",
        namespaced: false,
        short: &["pc"],
        ..PLAIN
    },
    // What kubelets measure: asked for each time, never stored.
    Row {
        group: metrics::GROUP,
        ty: "metrics.NodeMetrics",
        plural: "nodes",
        namespaced: false,
        verbs: &["get", "list"],
        ..PLAIN
    },
    Row { group: metrics::GROUP, ty: "metrics.PodMetrics", plural: "pods", verbs: &["get", "list"], ..PLAIN },
    // Another view of the core group's events.
    Row { group: "events.k8s.io", ty: "events.Event", plural: "events", short: &["ev"], ..PLAIN },
];

/// Kinds that are only the body of a subresource.
const BODY_ROWS: [Row; 4] = [
    Row { ty: "core.Binding", plural: "bindings", ..CREATE },
    Row { group: "policy", ty: "policy.Eviction", plural: "evictions", ..CREATE },
    Row { group: "authentication.k8s.io", ty: "authentication.TokenRequest", plural: "tokenrequests", ..CREATE },
    Row { group: "autoscaling", ty: "autoscaling.Scale", plural: "scales", ..CREATE },
];

impl Row {
    fn resource(&self) -> Resource {
        let kind = self.ty.rsplit('.').next().unwrap_or(self.ty);
        let subresource =
            |(name, kind_of, verbs): &(&'static str, &'static str, &'static [&'static str])| Subresource {
                name,
                kind: if kind_of.is_empty() { kind.to_owned() } else { (*kind_of).to_owned() },
                group: match *name {
                    "eviction" => Some(("policy", "v1")),
                    "token" => Some(("authentication.k8s.io", "v1")),
                    _ => None,
                },
                verbs: verbs.to_vec(),
            };
        Resource {
            group: self.group.to_owned(),
            version: if self.group == metrics::GROUP { metrics::VERSION } else { "v1" }.to_owned(),
            kind: kind.to_owned(),
            list_kind: format!("{kind}List"),
            plural: self.plural.to_owned(),
            singular: if self.group == metrics::GROUP { String::new() } else { kind.to_lowercase() },
            short_names: self.short.iter().map(|&name| name.to_owned()).collect(),
            categories: self.categories.iter().map(|&name| name.to_owned()).collect(),
            namespaced: self.namespaced,
            verbs: self.verbs.to_vec(),
            subresources: self.subresources.iter().map(subresource).collect(),
            stored: self.verbs.len() > 1 && self.group != metrics::GROUP,
            ty: Type::named(self.ty),
            type_name: self.ty,
            custom: None,
        }
    }
}

static BUILTIN: LazyLock<Vec<Arc<Resource>>> =
    LazyLock::new(|| ROWS.iter().map(|row| Arc::new(row.resource())).collect());
static BODIES: LazyLock<Vec<Arc<Resource>>> =
    LazyLock::new(|| BODY_ROWS.iter().map(|row| Arc::new(row.resource())).collect());
