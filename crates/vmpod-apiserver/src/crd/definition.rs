//! The rules of `CustomResourceDefinition` objects themselves.

use jiff::Timestamp;
use kube_cel::compile_schema;
use regex::Regex;
use serde_json::{Map, Value, json};

use crate::kinds::{Registry, at, dns_label, dns_subdomain, items, rfc3339, text};
use crate::status::{Cause, quoted};

/// The defaults of a definition.
pub(crate) fn default_definition(value: &mut Value) {
    let kind = text(value, &["spec", "names", "kind"]).to_owned();
    if !kind.is_empty() {
        if text(value, &["spec", "names", "singular"]).is_empty() {
            value["spec"]["names"]["singular"] = kind.to_lowercase().into();
        }
        if text(value, &["spec", "names", "listKind"]).is_empty() {
            value["spec"]["names"]["listKind"] = format!("{kind}List").into();
        }
    }
    if at(value, &["spec", "conversion"]).is_none() && value["spec"].is_object() {
        value["spec"]["conversion"] = json!({"strategy": "None"});
    }
    if let Some(service) =
        value.pointer_mut("/spec/conversion/webhook/clientConfig/service").and_then(Value::as_object_mut)
    {
        service.entry("port").or_insert_with(|| 443.into());
    }
}

fn storage_version(value: &Value) -> Option<String> {
    items(value, &["spec", "versions"])
        .iter()
        .find(|version| version["storage"] == true)
        .map(|version| text(version, &["name"]).to_owned())
}

/// The status that goes with a new or changed spec.
pub(crate) fn prepare(value: &mut Value, old: Option<&Value>) {
    let mut status = old.and_then(|old| old.get("status")).cloned().unwrap_or_else(
        || json!({"conditions": null, "acceptedNames": {"plural": "", "kind": ""}, "storedVersions": []}),
    );
    if let Some(storage) = storage_version(value) {
        let mut versions = items(&status, &["storedVersions"]).to_vec();
        if !versions.contains(&Value::from(storage.as_str())) {
            versions.push(storage.into());
        }
        status["storedVersions"] = versions.into();
    }
    if let Some(object) = value.as_object_mut() {
        object.insert("status".into(), status);
    }
}

/// The rules of a new definition.
pub(crate) fn validate_definition(value: &Value, causes: &mut Vec<Cause>) {
    let spec = &value["spec"];
    let (group, plural) = (text(spec, &["group"]), text(spec, &["names", "plural"]));
    let name = text(value, &["metadata", "name"]);
    if name != format!("{plural}.{group}") {
        causes.push(Cause::invalid("metadata.name", &name.into(), "must be spec.names.plural+\".\"+spec.group"));
    }
    if group.is_empty() {
        causes.push(Cause::required("spec.group", ""));
    } else if let wrong @ [_, ..] = dns_subdomain(group).as_slice() {
        causes.push(Cause::invalid("spec.group", &group.into(), &wrong.join(",")));
    } else if !group.contains('.') {
        causes.push(Cause::invalid("spec.group", &group.into(), "should be a domain with at least one dot"));
    }
    let scope = text(spec, &["scope"]);
    if scope.is_empty() {
        causes.push(Cause::required("spec.scope", ""));
    } else if !["Cluster", "Namespaced"].contains(&scope) {
        causes.push(Cause::not_supported("spec.scope", &scope.into(), &["Cluster", "Namespaced"]));
    }
    versions(spec, causes);
    names(spec, causes);
    match text(spec, &["conversion", "strategy"]) {
        "None" => {}
        "Webhook" => causes.push(Cause::forbidden(
            "spec.conversion.strategy",
            "this server does not call webhooks: versions that differ in more than their name are not served",
        )),
        "" => causes.push(Cause::required("spec.conversion.strategy", "")),
        other => causes.push(Cause::not_supported("spec.conversion.strategy", &other.into(), &["None", "Webhook"])),
    }
}

fn versions(spec: &Value, causes: &mut Vec<Cause>) {
    let versions = items(spec, &["versions"]);
    let mut seen: Vec<&str> = Vec::new();
    let mut storage = 0;
    for (index, version) in versions.iter().enumerate() {
        let field = format!("spec.versions[{index}]");
        let name = text(version, &["name"]);
        let wrong = dns_label(name);
        if !wrong.is_empty() {
            causes.push(Cause::invalid(format!("{field}.name"), &name.into(), &wrong.join(",")));
        }
        if seen.contains(&name) {
            causes.push(Cause::invalid("spec.versions", &spec["versions"], "must contain unique version names"));
        }
        seen.push(name);
        storage += usize::from(version["storage"] == true);
        match at(version, &["schema", "openAPIV3Schema"]) {
            None => causes.push(Cause::required(format!("{field}.schema.openAPIV3Schema"), "schemas are required")),
            Some(schema) => {
                let path = format!("{field}.schema.openAPIV3Schema");
                match text(schema, &["type"]) {
                    "object" => {}
                    "" => causes.push(Cause::required(format!("{path}.type"), "must not be empty at the root")),
                    other => {
                        causes.push(Cause::invalid(
                            format!("{path}.type"),
                            &other.into(),
                            "must be object at the root",
                        ));
                    }
                }
                structural(schema, &path, true, causes);
            }
        }
        for (column, one) in items(version, &["additionalPrinterColumns"]).iter().enumerate() {
            printer_column(one, &format!("{field}.additionalPrinterColumns[{column}]"), causes);
        }
        if let Some(scale) = at(version, &["subresources", "scale"]) {
            for (key, root) in [("specReplicasPath", ".spec."), ("statusReplicasPath", ".status.")] {
                let path = text(scale, &[key]);
                if !path.starts_with(root) {
                    let why = format!("should be a json path under {}", root.trim_end_matches('.'));
                    causes.push(Cause::invalid(format!("{field}.subresources.scale.{key}"), &path.into(), &why));
                }
            }
        }
    }
    if storage != 1 {
        let why = "must have exactly one version marked as storage version";
        causes.push(Cause::invalid("spec.versions", &spec["versions"], why));
    }
}

const COLUMN_TYPES: [&str; 5] = ["boolean", "date", "integer", "number", "string"];

fn printer_column(column: &Value, field: &str, causes: &mut Vec<Cause>) {
    if text(column, &["name"]).is_empty() {
        causes.push(Cause::required(format!("{field}.name"), ""));
    }
    let kind = text(column, &["type"]);
    let why = format!("must be one of {}", COLUMN_TYPES.join(","));
    if kind.is_empty() {
        causes.push(Cause::required(format!("{field}.type"), &why));
    } else if !COLUMN_TYPES.contains(&kind) {
        causes.push(Cause::invalid(format!("{field}.type"), &kind.into(), &why));
    }
    if text(column, &["jsonPath"]).is_empty() {
        causes.push(Cause::required(format!("{field}.JSONPath"), ""));
    }
}

fn structural(schema: &Value, field: &str, root: bool, causes: &mut Vec<Cause>) {
    let on = |key: &str| schema.get(key) == Some(&Value::Bool(true));
    let kind = text(schema, &["type"]);
    let open = on("x-kubernetes-preserve-unknown-fields") || on("x-kubernetes-int-or-string");
    if !root && kind.is_empty() && !open {
        causes.push(Cause::required(format!("{field}.type"), "must not be empty for specified object fields"));
    }
    let known = ["", "array", "boolean", "integer", "number", "object", "string"];
    if !known.contains(&kind) {
        causes.push(Cause::not_supported(format!("{field}.type"), &kind.into(), &known[1..]));
    }
    if kind == "array" && at(schema, &["items"]).is_none() {
        causes.push(Cause::required(format!("{field}.items"), "must be specified"));
    }
    if on("uniqueItems") {
        let why = "uniqueItems cannot be set to true since the runtime complexity becomes quadratic";
        causes.push(Cause::forbidden(format!("{field}.uniqueItems"), why));
    }
    if at(schema, &["properties"]).is_some() && at(schema, &["additionalProperties"]).is_some() {
        let why = "additionalProperties and properties are mutual exclusive";
        causes.push(Cause::forbidden(format!("{field}.additionalProperties"), why));
    }
    for key in ["$ref", "definitions", "dependencies", "patternProperties", "additionalItems"] {
        if at(schema, &[key]).is_some() {
            causes.push(Cause::forbidden(format!("{field}.{key}"), &format!("{key} is not supported")));
        }
    }
    let pattern = text(schema, &["pattern"]);
    if let Err(why) = Regex::new(pattern) {
        let why = format!("must be a valid regular expression, but isn't: {why}");
        causes.push(Cause::invalid(format!("{field}.pattern"), &pattern.into(), &why));
    }
    list_type(schema, field, causes);
    rules(schema, field, causes);
    for (name, inner) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        if root && name == "metadata" {
            continue;
        }
        structural(inner, &format!("{field}.properties[{name}]"), false, causes);
    }
    if let Some(inner) = at(schema, &["items"]).filter(|inner| inner.is_object()) {
        structural(inner, &format!("{field}.items"), false, causes);
    }
    if let Some(inner) = at(schema, &["additionalProperties"]).filter(|inner| inner.is_object()) {
        structural(inner, &format!("{field}.additionalProperties"), false, causes);
    }
}

fn list_type(schema: &Value, field: &str, causes: &mut Vec<Cause>) {
    let list = text(schema, &["x-kubernetes-list-type"]);
    let keys = items(schema, &["x-kubernetes-list-map-keys"]);
    if !list.is_empty() && text(schema, &["type"]) != "array" {
        let why = "must be array if x-kubernetes-list-type is specified";
        causes.push(Cause::invalid(format!("{field}.type"), &schema["type"], why));
    }
    if !["", "atomic", "set", "map"].contains(&list) {
        let at = format!("{field}.x-kubernetes-list-type");
        causes.push(Cause::not_supported(at, &list.into(), &["atomic", "set", "map"]));
    }
    if list != "map" && !keys.is_empty() {
        let why = "must be map if x-kubernetes-list-map-keys is non-empty";
        causes.push(Cause::invalid(format!("{field}.x-kubernetes-list-type"), &list.into(), why));
    }
    if list == "map" && keys.is_empty() {
        let why = "must not be empty if x-kubernetes-list-type is map";
        causes.push(Cause::required(format!("{field}.x-kubernetes-list-map-keys"), why));
    }
    for key in keys.iter().filter_map(Value::as_str) {
        let Some(property) = at(schema, &["items", "properties", key]) else {
            let why = "entries must all be names of item properties";
            causes.push(Cause::invalid(format!("{field}.x-kubernetes-list-map-keys"), &keys.into(), why));
            continue;
        };
        let required = items(schema, &["items", "required"]).iter().any(|one| one == key);
        if !required && property.get("default").is_none() {
            let why =
                "this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property";
            causes.push(Cause::required(format!("{field}.items.properties[{key}].default"), why));
        }
    }
}

fn rules(schema: &Value, field: &str, causes: &mut Vec<Cause>) {
    let rules = items(schema, &["x-kubernetes-validations"]);
    if rules.is_empty() {
        return;
    }
    let alone = json!({"type": schema["type"], "x-kubernetes-validations": rules});
    let compiled = compile_schema(&alone);
    for (index, (rule, result)) in rules.iter().zip(&compiled.validations).enumerate() {
        let field = format!("{field}.x-kubernetes-validations[{index}]");
        if text(rule, &["rule"]).trim().is_empty() {
            causes.push(Cause::required(format!("{field}.rule"), "rule is not specified"));
        } else if let Err(why) = result {
            causes.push(Cause::invalid(format!("{field}.rule"), &rule["rule"], &format!("compilation failed: {why}")));
        }
    }
}

fn names(spec: &Value, causes: &mut Vec<Cause>) {
    let names = &spec["names"];
    for key in ["plural", "singular", "kind", "listKind"] {
        let value = text(names, &[key]);
        if value.is_empty() {
            causes.push(Cause::required(format!("spec.names.{key}"), ""));
            continue;
        }
        let wrong = crate::kinds::dns1035_label(&value.to_lowercase());
        if !wrong.is_empty() || (matches!(key, "plural" | "singular") && value.to_lowercase() != value) {
            causes.push(Cause::invalid(format!("spec.names.{key}"), &value.into(), &wrong.join(",")));
        }
    }
    let kind = text(names, &["kind"]);
    if !kind.is_empty() && kind == text(names, &["listKind"]) {
        causes.push(Cause::invalid("spec.names.listKind", &kind.into(), "kind and listKind may not be the same"));
    }
}

/// The rules of a changed definition.
pub(crate) fn validate_definition_update(new: &Value, old: &Value, causes: &mut Vec<Cause>) {
    validate_definition(new, causes);
    let established = items(old, &["status", "conditions"])
        .iter()
        .any(|condition| condition["type"] == "Established" && condition["status"] == "True");
    let mut frozen = vec!["group", "names.plural"];
    if established {
        frozen.extend(["scope", "names.kind"]);
    }
    for path in frozen {
        let parts: Vec<&str> = std::iter::once("spec").chain(path.split('.')).collect();
        if at(new, &parts) != at(old, &parts) {
            let value = at(new, &parts).unwrap_or(&Value::Null);
            causes.push(Cause::invalid(format!("spec.{path}"), value, "field is immutable"));
        }
    }
    for (index, version) in items(new, &["status", "storedVersions"]).iter().enumerate() {
        let name = version.as_str().unwrap_or_default();
        if !items(new, &["spec", "versions"]).iter().any(|one| text(one, &["name"]) == name) {
            let why = format!(
                "missing from spec.versions; {name} was previously a storage version, and must remain in spec.versions until a storage migration ensures no data remains persisted in {name} and removes {name} from status.storedVersions"
            );
            causes.push(Cause::invalid(format!("status.storedVersions[{index}]"), version, &why));
        }
    }
}

fn condition(kind: &str, good: bool, reason: &str, message: &str, old: &Value, now: Timestamp) -> Value {
    let status = if good { "True" } else { "False" };
    let before = items(old, &["status", "conditions"]).iter().find(|one| text(one, &["type"]) == kind);
    let since = before
        .filter(|one| text(one, &["status"]) == status)
        .map_or_else(|| rfc3339(now).into(), |one| one["lastTransitionTime"].clone());
    json!({"type": kind, "status": status, "lastTransitionTime": since, "reason": reason, "message": message})
}

/// The definition with its names accepted (or not, when another kind has them), to be written as its status.
#[must_use]
pub(crate) fn names_accepted(registry: &Registry, definition: &Value, now: Timestamp) -> Value {
    let mut out = definition.clone();
    let names = &definition["spec"]["names"];
    let group = text(definition, &["spec", "group"]);
    let plural = text(names, &["plural"]);
    let taken = registry.resources().iter().find(|one| {
        one.group == group
            && one.plural != plural
            && (one.kind == text(names, &["kind"]) || one.singular == text(names, &["singular"]))
    });
    let mut conditions: Vec<Value> = items(definition, &["status", "conditions"])
        .iter()
        .filter(|one| !["NamesAccepted", "Established"].contains(&text(one, &["type"])))
        .cloned()
        .collect();
    if let Some(other) = taken {
        let message = format!("{} is already in use", quoted(&other.kind));
        conditions.push(condition("NamesAccepted", false, "KindConflict", &message, definition, now));
        let message = "not all names are accepted";
        conditions.push(condition("Established", false, "NotAccepted", message, definition, now));
    } else {
        conditions.push(condition("NamesAccepted", true, "NoConflicts", "no conflicts found", definition, now));
        let message = "the initial names have been accepted";
        conditions.push(condition("Established", true, "InitialNamesAccepted", message, definition, now));
        let mut accepted = Map::new();
        for (key, value) in names.as_object().into_iter().flatten() {
            accepted.insert(key.clone(), value.clone());
        }
        out["status"]["acceptedNames"] = Value::Object(accepted);
    }
    out["status"]["conditions"] = conditions.into();
    out
}
