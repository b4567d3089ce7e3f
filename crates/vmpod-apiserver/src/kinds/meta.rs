//! `metadata`: what every object's may hold.

use serde_json::{Map, Value};

use super::{Resource, items, label_key, label_value, names, text};
use crate::status::Cause;

/// The most that all annotations of an object may weigh together, in bytes.
const ANNOTATIONS_LIMIT: usize = 256 * 1024;
/// The longest part of a generated name that is taken from `generateName`.
const GENERATE_NAME_LIMIT: usize = 63 - 5;

/// The name for an object that only brings `generateName`.
pub(super) fn generated_name(base: &str, suffix: &str) -> String {
    let mut end = base.len().min(GENERATE_NAME_LIMIT);
    while !base.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{suffix}", &base[..end])
}

/// What is wrong with a name of this kind.
pub(super) fn name_rule(resource: &Resource, name: &str, prefix: bool) -> Vec<String> {
    // A prefix ends in whatever comes before the random letters: judge it as if they were there.
    let padded;
    let judged = if prefix {
        padded = name.strip_suffix('-').map_or_else(|| name.to_owned(), |base| format!("{base}a"));
        &padded
    } else {
        name
    };
    if resource.is("core.Namespace") {
        return names::dns_label(judged);
    }
    let any_segment = resource.is("certificates.CertificateSigningRequest") || resource.type_name.starts_with("rbac.");
    if any_segment || !resource.stored {
        return names::path_segment(judged, prefix);
    }
    names::dns_subdomain(judged)
}

/// The rules of `metadata` on creation.
pub(super) fn validate(resource: &Resource, object: &Value, causes: &mut Vec<Cause>) {
    let metadata = &object["metadata"];
    let generate = text(metadata, &["generateName"]);
    if !generate.is_empty() {
        for why in name_rule(resource, generate, true) {
            causes.push(Cause::invalid("metadata.generateName", &generate.into(), &why));
        }
    }
    let name = text(metadata, &["name"]);
    if name.is_empty() {
        causes.push(Cause::required("metadata.name", "name or generateName is required"));
    } else {
        for why in name_rule(resource, name, false) {
            causes.push(Cause::invalid("metadata.name", &name.into(), &why));
        }
    }
    validate_common(resource, metadata, causes);
}

fn validate_common(resource: &Resource, metadata: &Value, causes: &mut Vec<Cause>) {
    let namespace = text(metadata, &["namespace"]);
    if resource.namespaced && namespace.is_empty() {
        causes.push(Cause::required("metadata.namespace", ""));
    } else if resource.namespaced {
        for why in names::dns_label(namespace) {
            causes.push(Cause::invalid("metadata.namespace", &namespace.into(), &why));
        }
    } else if !namespace.is_empty() {
        causes.push(Cause::forbidden("metadata.namespace", "not allowed on this type"));
    }
    labels(metadata.get("labels"), "metadata.labels", causes);
    annotations(metadata.get("annotations"), causes);
    owners(metadata, causes);
    let mut both = [false; 2];
    for finalizer in items(metadata, &["finalizers"]) {
        let finalizer = finalizer.as_str().unwrap_or_default();
        for why in label_key(finalizer) {
            causes.push(Cause::invalid("metadata.finalizers", &finalizer.into(), &why));
        }
        both[0] |= finalizer == "orphan";
        both[1] |= finalizer == "foregroundDeletion";
    }
    if both == [true; 2] {
        causes.push(Cause::invalid(
            "metadata.finalizers",
            &metadata["finalizers"],
            "finalizer orphan and foregroundDeletion cannot be both set",
        ));
    }
}

/// The rules of a set of labels.
pub(super) fn labels(labels: Option<&Value>, field: &str, causes: &mut Vec<Cause>) {
    for (key, value) in labels.and_then(Value::as_object).into_iter().flatten() {
        for why in label_key(key) {
            causes.push(Cause::invalid(field, &key.as_str().into(), &why));
        }
        for why in label_value(value.as_str().unwrap_or_default()) {
            causes.push(Cause::invalid(field, value, &why));
        }
    }
}

fn annotations(annotations: Option<&Value>, causes: &mut Vec<Cause>) {
    let mut total = 0;
    for (key, value) in annotations.and_then(Value::as_object).into_iter().flatten() {
        for why in label_key(&key.to_lowercase()) {
            causes.push(Cause::invalid("metadata.annotations", &key.as_str().into(), &why));
        }
        total += key.len() + value.as_str().map_or(0, str::len);
    }
    if total > ANNOTATIONS_LIMIT {
        causes.push(Cause::too_long("metadata.annotations", ANNOTATIONS_LIMIT));
    }
}

fn owners(metadata: &Value, causes: &mut Vec<Cause>) {
    const FIELD: &str = "metadata.ownerReferences";
    let mut controller: Option<String> = None;
    let references = items(metadata, &["ownerReferences"]);
    for reference in references {
        let version = text(reference, &["apiVersion"]);
        if version.is_empty() {
            causes.push(Cause::invalid(format!("{FIELD}.apiVersion"), &version.into(), "version must not be empty"));
        }
        for key in ["kind", "name", "uid"] {
            if text(reference, &[key]).is_empty() {
                causes.push(Cause::invalid(format!("{FIELD}.{key}"), &"".into(), "must not be empty"));
            }
        }
        if (version, text(reference, &["kind"])) == ("v1", "Event") {
            causes.push(Cause::invalid(FIELD, reference, "/v1, Kind=Event is disallowed from being an owner"));
        }
        if reference.get("controller") == Some(&true.into()) {
            let this = format!("{}/{}", text(reference, &["kind"]), text(reference, &["name"]));
            match &controller {
                Some(first) => causes.push(Cause::invalid(
                    FIELD,
                    &metadata["ownerReferences"],
                    &format!(
                        "Only one reference can have Controller set to true. Found \"true\" in references for {first} and {this}"
                    ),
                )),
                None => controller = Some(this),
            }
        }
    }
}

/// The rules of `metadata` on update.
pub(super) fn validate_update(resource: &Resource, new: &Value, old: &Value, causes: &mut Vec<Cause>) {
    let (new, old) = (&new["metadata"], &old["metadata"]);
    if old.get("deletionTimestamp").is_some() {
        let before = items(old, &["finalizers"]);
        let mut extra: Vec<&str> =
            items(new, &["finalizers"]).iter().filter(|one| !before.contains(one)).filter_map(Value::as_str).collect();
        if !extra.is_empty() {
            extra.sort_unstable();
            let shown: Vec<String> = extra.iter().map(|one| crate::status::quoted(one)).collect();
            causes.push(Cause::forbidden(
                "metadata.finalizers",
                &format!(
                    "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
                    shown.join(", ")
                ),
            ));
        }
    }
    for key in ["name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        let (now, before) = (new.get(key), old.get(key));
        if now != before {
            causes.push(Cause::invalid(format!("metadata.{key}"), now.unwrap_or(&Value::Null), "field is immutable"));
        }
    }
    validate_common(resource, new, causes);
}

/// `metadata` as an object to be changed in place.
pub(crate) fn metadata_mut(object: &mut Value) -> Option<&mut Map<String, Value>> {
    let object = object.as_object_mut()?;
    object.entry("metadata").or_insert_with(|| Value::Object(Map::new())).as_object_mut()
}
