//! The kinds served, and what happens to an object of each on its way in.
//!
//! ```text
//! POST   bytes ─ decode ─ create ─────────────────────────────► object to store
//! PUT    bytes ─ decode ─ update(old) ────────────────────────► object to store
//! PATCH  bytes ─ patch::apply(old) ─ update(old) or create ───► object to store
//! ```
//!
//! Everything here is pure: the time, the uid and the random suffix of a generated name are arguments.

/// The storage name of priority classes.
pub(crate) const PRIORITY_CLASSES: &str = "priorityclasses.scheduling.k8s.io";
/// The storage name of disruption budgets.
pub(crate) const BUDGETS: &str = "poddisruptionbudgets.policy";

mod admit;
mod decode;
mod defaults;
mod lifecycle;
mod meta;
mod names;
mod pod;
mod pod_update;
mod pod_volumes;
mod registry;
mod rules;
mod rules_policy;

use std::sync::Arc;

use jiff::Timestamp;
use serde_json::Value;

pub(crate) use self::decode::{FieldValidation, Format, conform, decode, decode_options, rfc3339, warning_header};
pub(crate) use self::lifecycle::{bind, create, pod_service_account, present, unchanged, update};
pub(crate) use self::registry::Registry;

pub(crate) use self::decode::{parse, shape, zero};
pub(crate) use self::names::{dns_label, dns_subdomain, dns1035_label, label_key, label_value};
pub(crate) use self::registry::{custom_subresource, custom_verbs};
use crate::crd::CustomKind;
use crate::schema::Type;

/// A kind as it is served at one version.
#[derive(Clone, Debug)]
pub(crate) struct Resource {
    /// The API group; empty for the core group.
    pub(crate) group: String,
    /// The version, such as `v1`.
    pub(crate) version: String,
    /// The kind, such as `Pod`.
    pub(crate) kind: String,
    /// The kind of a list, such as `PodList`.
    pub(crate) list_kind: String,
    /// The name in paths, such as `pods`.
    pub(crate) plural: String,
    /// The singular name.
    pub(crate) singular: String,
    /// Abbreviations, such as `po`.
    pub(crate) short_names: Vec<String>,
    /// Groups of resources it belongs to, such as `all`.
    pub(crate) categories: Vec<String>,
    /// Whether objects live in a namespace.
    pub(crate) namespaced: bool,
    /// What can be done with it.
    pub(crate) verbs: Vec<&'static str>,
    /// What there is below an object of it.
    pub(crate) subresources: Vec<Subresource>,
    /// Whether objects are stored; reviews, for example, are only answered.
    pub(crate) stored: bool,
    pub(crate) ty: Type,
    pub(crate) type_name: &'static str,
    pub(crate) custom: Option<Arc<CustomKind>>,
}

/// Something below an object, such as `status` or `log`.
#[derive(Clone, Debug)]
pub(crate) struct Subresource {
    /// The last part of its path.
    pub(crate) name: &'static str,
    /// The kind of its bodies.
    pub(crate) kind: String,
    /// The group and version of that kind, where they differ from the resource's.
    pub(crate) group: Option<(&'static str, &'static str)>,
    /// What can be done with it.
    pub(crate) verbs: Vec<&'static str>,
}

impl Resource {
    /// `v1` or `GROUP/VERSION`.
    #[must_use]
    pub(crate) fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    /// `pods` or `herds.example.dev`: how messages name the resource.
    #[must_use]
    pub(crate) fn qualified(&self) -> String {
        if self.group.is_empty() { self.plural.clone() } else { format!("{}.{}", self.plural, self.group) }
    }

    /// The subresource of this name.
    #[must_use]
    pub(crate) fn subresource(&self, name: &str) -> Option<&Subresource> {
        self.subresources.iter().find(|sub| sub.name == name)
    }

    /// Whether it comes from a custom resource definition.
    #[must_use]
    pub(crate) fn is_custom(&self) -> bool {
        self.custom.is_some()
    }

    /// Whether it is a built-in kind of this name in `wire.txt`.
    pub(crate) fn is(&self, type_name: &str) -> bool {
        self.type_name == type_name
    }

    /// The name of the Go package of the internal type, which some messages show.
    pub(crate) fn go_package(&self) -> &str {
        if self.group.is_empty() { "core" } else { self.group.split('.').next().unwrap_or_default() }
    }
}

/// What a request brings besides its body.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context<'a> {
    /// The time of the request.
    pub(crate) now: Timestamp,
    /// The uid for a new object.
    pub(crate) uid: &'a str,
    /// Five letters for a generated name.
    pub(crate) suffix: &'a str,
    /// The field manager.
    pub(crate) manager: &'a str,
    /// The namespace in the path.
    pub(crate) namespace: Option<&'a str>,
    /// The name in the path.
    pub(crate) name: Option<&'a str>,
    /// For a new pod: the service account that it names.
    pub(crate) service_account: Option<&'a Value>,
    /// For a new pod: its priority class, or the default one.
    pub(crate) priority_class: Option<&'a Value>,
    /// Who asks.
    pub(crate) user: &'a str,
    /// The groups of who asks.
    pub(crate) groups: &'a [String],
    /// The request is a PATCH, not a PUT: a wrong uid is then a field error rather than a conflict.
    pub(crate) patch: bool,
    /// The value is the result of a server-side apply: the owners of its fields are settled already.
    pub(crate) apply: bool,
}

impl<'a> Context<'a> {
    /// A context of nobody's request, to be filled in.
    pub(crate) fn plain(manager: &'a str, now: Timestamp) -> Self {
        Self {
            now,
            uid: "",
            suffix: "",
            manager,
            namespace: None,
            name: None,
            service_account: None,
            priority_class: None,
            user: "",
            groups: &[],
            patch: false,
            apply: false,
        }
    }
}

/// The text at a path of field names, or nothing.
pub(crate) fn text<'a>(value: &'a Value, path: &[&str]) -> &'a str {
    at(value, path).and_then(Value::as_str).unwrap_or_default()
}

/// The value at a path of field names.
pub(crate) fn at<'a>(value: &'a Value, path: &[&str]) -> Option<&'a Value> {
    path.iter().try_fold(value, |here, part| here.get(part)).filter(|found| !found.is_null())
}

/// The items of the list at a path of field names.
pub(crate) fn items<'a>(value: &'a Value, path: &[&str]) -> &'a [Value] {
    at(value, path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests;
