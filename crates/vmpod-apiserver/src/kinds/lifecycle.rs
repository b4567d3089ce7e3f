//! What a create and an update do to an object, in the order that the real server does it.

use serde_json::{Map, Value, json};

use super::decode::rfc3339;
use super::{Context, Resource, admit, at, defaults, items, meta, pod_update, rules, text};
use crate::crd;
use crate::managed_fields;
use crate::status::{Cause, Status};

/// Metadata that only the server writes.
const SERVER_SET: [&str; 7] = [
    "uid",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generation",
    "resourceVersion",
    "selfLink",
];

/// Everything between a decoded POST body (or an apply to an absent object) and the object to store.
///
/// The result lacks only `metadata.resourceVersion`, which the store gives.
pub(crate) fn create(resource: &Resource, mut value: Value, context: &Context<'_>) -> Result<Value, Status> {
    namespace_from_path(resource, &mut value, context)?;
    if !text(&value, &["metadata", "resourceVersion"]).is_empty() && resource.stored {
        return Err(Status::bad_request("resourceVersion should not be set on objects to be created"));
    }
    if let Some(metadata) = meta::metadata_mut(&mut value) {
        for key in SERVER_SET {
            metadata.remove(key);
        }
    }
    defaults::default(resource, &mut value);
    drop_foreign_parts_on_create(resource, &mut value);
    if !context.apply {
        managed_fields::on_update(resource, None, &mut value, context.manager, None, context.now);
    }
    name_and_stamp(resource, &mut value, context);
    if !resource.stored {
        return Ok(value);
    }
    admit::create(resource, &mut value, context)?;
    prepare_create(resource, &mut value);
    let mut causes = Vec::new();
    validate_create(resource, &value, &mut causes);
    if causes.is_empty() {
        Ok(value)
    } else {
        Err(Status::invalid(resource, text(&value, &["metadata", "name"]), causes))
    }
}

fn name_and_stamp(resource: &Resource, value: &mut Value, context: &Context<'_>) {
    let generate = text(value, &["metadata", "generateName"]).to_owned();
    let nameless = text(value, &["metadata", "name"]).is_empty();
    let generation = has_generation(resource);
    let stored = resource.stored;
    let Some(metadata) = meta::metadata_mut(value) else { return };
    if nameless && !generate.is_empty() {
        metadata.insert("name".into(), meta::generated_name(&generate, context.suffix).into());
    }
    if stored {
        metadata.insert("uid".into(), context.uid.into());
        metadata.insert("creationTimestamp".into(), rfc3339(context.now).into());
    }
    if generation {
        metadata.insert("generation".into(), 1.into());
    }
}

/// Whether the kind counts the changes of its spec.
fn has_generation(resource: &Resource) -> bool {
    resource.is_custom()
        || resource.is("core.Pod")
        || resource.is("apiext.CustomResourceDefinition")
        || resource.is("policy.PodDisruptionBudget")
}

/// The parts that a create may not bring: mostly the status.
fn drop_foreign_parts_on_create(resource: &Resource, value: &mut Value) {
    let Some(object) = value.as_object_mut() else { return };
    match resource.type_name {
        // A node registers itself with its status.
        "core.Node" => {}
        "core.Pod"
        | "core.Namespace"
        | "apiext.CustomResourceDefinition"
        | "certificates.CertificateSigningRequest" => {
            object.insert("status".into(), Value::Object(Map::new()));
        }
        _ if resource.subresource("status").is_some() => {
            object.remove("status");
        }
        _ => {}
    }
}

fn prepare_create(resource: &Resource, value: &mut Value) {
    match resource.type_name {
        "core.Pod" => {
            value["status"] = json!({"phase": "Pending", "qosClass": pod_update::qos_class(value)});
            sort_out_deprecated(value);
        }
        "core.Namespace" => {
            value["status"] = json!({"phase": "Active"});
            let mut finalizers: Vec<Value> = items(value, &["spec", "finalizers"]).to_vec();
            if !finalizers.contains(&"kubernetes".into()) {
                finalizers.push("kubernetes".into());
            }
            value["spec"] = json!({"finalizers": finalizers});
        }
        "apiext.CustomResourceDefinition" => crd::prepare(value, None),
        _ => {}
    }
}

/// `serviceAccount` is the old name of `serviceAccountName`; both are always there.
fn sort_out_deprecated(pod: &mut Value) {
    let name = text(pod, &["spec", "serviceAccountName"]).to_owned();
    if !name.is_empty() {
        pod["spec"]["serviceAccount"] = name.into();
    }
}

fn validate_create(resource: &Resource, value: &Value, causes: &mut Vec<Cause>) {
    if let Some(custom) = &resource.custom {
        meta::validate(resource, value, causes);
        custom.validate(value, None, causes);
        return;
    }
    meta::validate(resource, value, causes);
    rules::validate(resource, value, causes);
}

/// Everything between the new whole object of a PUT or PATCH and the object to store.
pub(crate) fn update(
    resource: &Resource,
    subresource: Option<&str>,
    old: &Value,
    mut new: Value,
    context: &Context<'_>,
) -> Result<Value, Status> {
    let name = context.name.unwrap_or_else(|| text(old, &["metadata", "name"]));
    check_identity(resource, &mut new, name, context)?;
    preconditions(resource, subresource, old, &new, name, context)?;
    carry_metadata(old, &mut new);
    defaults::default(resource, &mut new);
    keep_other_parts(resource, subresource, old, &mut new);
    if !context.apply {
        managed_fields::on_update(resource, Some(old), &mut new, context.manager, subresource, context.now);
    }
    prepare_update(resource, subresource, old, &mut new);
    bump_generation(resource, old, &mut new);
    let mut causes = Vec::new();
    meta::validate_update(resource, &new, old, &mut causes);
    // The real server checks metadata before and within the rules of a kind, and reports both.
    causes.extend_from_within(..);
    match &resource.custom {
        Some(custom) => custom.validate(&new, Some(old), &mut causes),
        None => rules::validate_update(resource, subresource, &new, old, &mut causes),
    }
    if !causes.is_empty() {
        return Err(Status::invalid(resource, name, causes));
    }
    if unchanged(old, &new) {
        return Ok(old.clone());
    }
    Ok(new)
}

fn namespace_from_path(resource: &Resource, value: &mut Value, context: &Context<'_>) -> Result<(), Status> {
    let given = text(value, &["metadata", "namespace"]).to_owned();
    match context.namespace {
        Some(namespace) if given.is_empty() && resource.namespaced => {
            if let Some(metadata) = meta::metadata_mut(value) {
                metadata.insert("namespace".into(), namespace.into());
            }
        }
        Some(namespace) if given != namespace && resource.namespaced => {
            return Err(Status::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        _ => {
            meta::metadata_mut(value);
        }
    }
    Ok(())
}

fn check_identity(resource: &Resource, new: &mut Value, name: &str, context: &Context<'_>) -> Result<(), Status> {
    namespace_from_path(resource, new, context)?;
    let given = text(new, &["metadata", "name"]);
    if given.is_empty() {
        return Err(Status::bad_request(format!(
            "the name of the object ({name} based on URL) was undeterminable: name must be provided"
        )));
    }
    if given != name {
        return Err(Status::bad_request(format!(
            "the name of the object ({given}) does not match the name on the URL ({name})"
        )));
    }
    Ok(())
}

fn preconditions(
    resource: &Resource,
    subresource: Option<&str>,
    old: &Value,
    new: &Value,
    name: &str,
    context: &Context<'_>,
) -> Result<(), Status> {
    let (uid, have) = (text(new, &["metadata", "uid"]), text(old, &["metadata", "uid"]));
    if !context.patch && !uid.is_empty() && uid != have {
        let place =
            if resource.group.is_empty() || resource.is_custom() { resource.group.clone() } else { String::new() };
        let prefix = if place.is_empty() { String::new() } else { format!("{place}/") };
        let namespace = text(old, &["metadata", "namespace"]);
        let key = if namespace.is_empty() {
            format!("/registry/{prefix}{}/{name}", resource.plural)
        } else {
            format!("/registry/{prefix}{}/{namespace}/{name}", resource.plural)
        };
        return Err(Status::conflict(
            resource,
            name,
            &format!(
                "StorageError: invalid object, Code: 4, Key: {key}, ResourceVersion: 0, AdditionalErrorMsg: Precondition failed: UID in precondition: {uid}, UID in object meta: {have}"
            ),
        ));
    }
    let version = text(new, &["metadata", "resourceVersion"]);
    if version.is_empty() || version == "0" {
        let conditional =
            resource.is_custom() || resource.is("coordination.Lease") || resource.is("apiext.CustomResourceDefinition");
        if conditional && !context.apply && subresource.is_none() {
            let cause = Cause::invalid("metadata.resourceVersion", &version.into(), "must be specified for an update");
            return Err(Status::invalid(resource, name, vec![cause]));
        }
    } else if version != text(old, &["metadata", "resourceVersion"]) {
        return Err(Status::modified(resource, name));
    }
    Ok(())
}

/// Metadata that the client left out or can't change.
fn carry_metadata(old: &Value, new: &mut Value) {
    let Some(metadata) = meta::metadata_mut(new) else { return };
    for key in SERVER_SET {
        let before = old.get("metadata").and_then(|metadata| metadata.get(key));
        match before {
            Some(before) if key == "generation" || key == "resourceVersion" || !metadata.contains_key(key) => {
                metadata.insert(key.into(), before.clone());
            }
            Some(_) => {}
            None => {
                metadata.remove(key);
            }
        }
    }
}

/// A status update changes the status only, a plain update everything but the status.
fn keep_other_parts(resource: &Resource, subresource: Option<&str>, old: &Value, new: &mut Value) {
    let keep = |new: &mut Value, key: &str| {
        let Some(object) = new.as_object_mut() else { return };
        match old.get(key) {
            Some(before) => object.insert(key.into(), before.clone()),
            None => object.remove(key),
        };
    };
    let keep_meta = |new: &mut Value, keys: &[&str]| {
        let Some(metadata) = meta::metadata_mut(new) else { return };
        for &key in keys {
            match old.get("metadata").and_then(|metadata| metadata.get(key)) {
                Some(before) => metadata.insert(key.into(), before.clone()),
                None => metadata.remove(key),
            };
        }
    };
    let has_status = resource.subresource("status").is_some();
    match subresource {
        None if has_status => {
            keep(new, "status");
            if resource.is("core.Namespace") {
                keep(new, "spec");
            }
            if resource.is("certificates.CertificateSigningRequest") {
                keep(new, "spec");
            }
        }
        Some("status" | "approval") if resource.is_custom() => {
            let status = new.get("status").cloned();
            let managed = new.get("metadata").and_then(|metadata| metadata.get("managedFields")).cloned();
            let identity: Vec<Value> =
                ["uid", "name", "namespace"].iter().map(|key| new["metadata"][*key].clone()).collect();
            *new = old.clone();
            for (key, value) in ["uid", "name", "namespace"].iter().zip(identity) {
                if !value.is_null() {
                    new["metadata"][*key] = value;
                }
            }
            if let (Some(managed), Some(metadata)) = (managed, meta::metadata_mut(new)) {
                metadata.insert("managedFields".into(), managed);
            }
            if let Some(object) = new.as_object_mut() {
                match status {
                    Some(status) => object.insert("status".into(), status),
                    None => object.remove("status"),
                };
            }
        }
        Some("status" | "approval") => {
            keep(new, "spec");
            if resource.is("core.Pod") {
                keep_meta(new, &["ownerReferences", "deletionTimestamp"]);
                if let Some(class) = at(old, &["status", "qosClass"]) {
                    new["status"]["qosClass"] = class.clone();
                }
            }
            if resource.is("apiext.CustomResourceDefinition") || resource.is("certificates.CertificateSigningRequest") {
                keep_meta(new, &["labels", "annotations", "ownerReferences", "finalizers"]);
            }
        }
        Some("finalize") => {
            keep(new, "status");
            keep_meta(new, &["labels", "annotations", "ownerReferences", "finalizers"]);
        }
        Some("ephemeralcontainers") => {
            let added = at(new, &["spec", "ephemeralContainers"]).cloned();
            let managed = new["metadata"].get("managedFields").cloned();
            *new = old.clone();
            if let Some(added) = added {
                new["spec"]["ephemeralContainers"] = added;
            }
            if let (Some(managed), Some(metadata)) = (managed, meta::metadata_mut(new)) {
                metadata.insert("managedFields".into(), managed);
            }
        }
        _ => {}
    }
}

fn prepare_update(resource: &Resource, subresource: Option<&str>, old: &Value, new: &mut Value) {
    match (resource.type_name, subresource) {
        ("apiext.CustomResourceDefinition", None) => crd::prepare(new, Some(old)),
        ("core.Pod", _) => sort_out_deprecated(new),
        _ => {}
    }
}

fn bump_generation(resource: &Resource, old: &Value, new: &mut Value) {
    if !has_generation(resource) {
        return;
    }
    let changed = match &resource.custom {
        Some(custom) => {
            let ignored: &[&str] = if custom.has_status() { &["metadata", "status"] } else { &["metadata"] };
            let rest = |value: &Value| {
                let mut object = value.as_object().cloned().unwrap_or_default();
                for key in ignored {
                    object.remove(*key);
                }
                object
            };
            rest(old) != rest(new)
        }
        None => old.get("spec") != new.get("spec"),
    };
    if changed {
        let generation = old["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
        new["metadata"]["generation"] = generation.into();
    }
}

/// Whether two versions of an object are the same but for the times in `managedFields` and the revision.
#[must_use]
pub(crate) fn unchanged(old: &Value, new: &Value) -> bool {
    fn bare(value: &Value) -> Value {
        let mut value = value.clone();
        if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.remove("resourceVersion");
            for entry in metadata.get_mut("managedFields").and_then(Value::as_array_mut).into_iter().flatten() {
                if let Some(entry) = entry.as_object_mut() {
                    entry.remove("time");
                }
            }
        }
        value
    }
    old == new || bare(old) == bare(new)
}

/// Puts an object that was stored at one version of its kind in the shape of this one.
pub(crate) fn present(resource: &Resource, value: &mut Value) {
    if let (Some(custom), Some(object)) = (&resource.custom, value.as_object_mut()) {
        object.insert("apiVersion".into(), resource.api_version().into());
        object.insert("kind".into(), resource.kind.clone().into());
        custom.apply_defaults(value);
    }
}

/// The name of the service account that a pod runs as.
#[must_use]
pub(crate) fn pod_service_account(pod: &Value) -> &str {
    let name = text(pod, &["spec", "serviceAccountName"]);
    let name = if name.is_empty() { text(pod, &["spec", "serviceAccount"]) } else { name };
    if name.is_empty() { "default" } else { name }
}

/// Binds a pod to the node that a `Binding` names.
pub(crate) fn bind(pods: &Resource, old: &Value, binding: &Value, context: &Context<'_>) -> Result<Value, Status> {
    let name = text(old, &["metadata", "name"]);
    let target = text(binding, &["target", "name"]);
    let refuse = |why: String| {
        let message = format!("Operation cannot be fulfilled on pods/binding {}: {why}", crate::status::quoted(name));
        Status { details: Some(json!({"name": name, "kind": "pods/binding"})), message, ..Status::modified(pods, name) }
    };
    let kind = text(binding, &["target", "kind"]);
    if !kind.is_empty() && kind != "Node" {
        let cause = Cause::not_supported("target.kind", &kind.into(), &["Node", "<empty>"]);
        return Err(Status::invalid_kind("", "Binding", name, vec![cause]));
    }
    if target.is_empty() {
        return Err(Status::invalid_kind("", "Binding", name, vec![Cause::required("target.name", "")]));
    }
    let uid = text(binding, &["metadata", "uid"]);
    if !uid.is_empty() && uid != text(old, &["metadata", "uid"]) {
        return Err(refuse(format!(
            "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
            text(old, &["metadata", "uid"])
        )));
    }
    if old["metadata"].get("deletionTimestamp").is_some() {
        return Err(refuse(format!("pod {name} is being deleted, cannot be assigned to a host")));
    }
    let bound = text(old, &["spec", "nodeName"]);
    if !bound.is_empty() {
        return Err(refuse(format!("pod {name} is already assigned to node {}", crate::status::quoted(bound))));
    }
    let mut new = old.clone();
    new["spec"]["nodeName"] = target.into();
    for (key, value) in binding["metadata"].get("annotations").and_then(Value::as_object).into_iter().flatten() {
        new["metadata"]["annotations"][key] = value.clone();
    }
    let condition = json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null,
        "lastTransitionTime": rfc3339(context.now)});
    let mut conditions: Vec<Value> =
        items(old, &["status", "conditions"]).iter().filter(|one| one["type"] != "PodScheduled").cloned().collect();
    conditions.push(condition);
    new["status"]["conditions"] = conditions.into();
    Ok(new)
}
