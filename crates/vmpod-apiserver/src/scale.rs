//! The `scale` subresource of custom resources.

use serde_json::{Map, Value, json};

use crate::crd::at_path;
use crate::kinds::{Resource, text};
use crate::status::{Cause, Status};

/// The `autoscaling/v1` `Scale` of an object.
#[must_use]
pub(crate) fn get(resource: &Resource, object: &Value) -> Option<Value> {
    let scale = resource.custom.as_ref()?.scale.as_ref()?;
    let number = |key: &str| at_path(object, text(scale, &[key])).and_then(Value::as_i64).unwrap_or(0);
    let mut metadata = Map::new();
    for key in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        if let Some(value) = object["metadata"].get(key) {
            metadata.insert(key.into(), value.clone());
        }
    }
    let mut status = json!({"replicas": number("statusReplicasPath")});
    let selector = text(scale, &["labelSelectorPath"]);
    if let Some(selector) = at_path(object, selector).and_then(Value::as_str).filter(|_| !selector.is_empty()) {
        status["selector"] = selector.into();
    }
    Some(json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata,
        "spec": {"replicas": number("specReplicasPath")}, "status": status,
    }))
}

/// The object scaled, to go through [`crate::kinds::update`].
pub(crate) fn set(resource: &Resource, old: &Value, scale: &Value) -> Result<Value, Status> {
    let name = text(old, &["metadata", "name"]);
    let Some(paths) = resource.custom.as_ref().and_then(|custom| custom.scale.as_ref()) else {
        return Err(Status::not_found(resource, name));
    };
    let replicas = scale["spec"]["replicas"].as_i64().unwrap_or(0);
    if replicas < 0 {
        let cause = Cause::invalid("spec.replicas", &replicas.into(), "must be greater than or equal to 0");
        return Err(Status::invalid_kind("autoscaling", "Scale", name, vec![cause]));
    }
    let mut new = old.clone();
    let mut here = &mut new;
    for part in text(paths, &["specReplicasPath"]).trim_start_matches('.').split('.') {
        if !here.is_object() {
            *here = Value::Object(Map::new());
        }
        here = &mut here[part];
    }
    *here = replicas.into();
    let version = text(scale, &["metadata", "resourceVersion"]);
    if !version.is_empty() {
        new["metadata"]["resourceVersion"] = version.into();
    }
    Ok(new)
}
