//! Structural schemas: pruning, defaulting, and what they say about ownership.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use regex::Regex;
use serde_json::{Map, Value};

use crate::kinds::{items, text};
use crate::schema::{Field, List, MapType, Relation, Scalar, Struct, Type};

const PRESERVE: &str = "x-kubernetes-preserve-unknown-fields";
const EMBEDDED: &str = "x-kubernetes-embedded-resource";
const INT_OR_STRING: &str = "x-kubernetes-int-or-string";

fn on(schema: &Value, key: &str) -> bool {
    schema.get(key) == Some(&Value::Bool(true))
}

/// Every schema below this one.
fn below(schema: &Value) -> Vec<&Value> {
    let mut out = Vec::new();
    for key in ["items", "additionalProperties", "not"] {
        out.extend(schema.get(key).filter(|inner| inner.is_object()));
    }
    out.extend(schema.get("properties").and_then(Value::as_object).into_iter().flat_map(Map::values));
    for key in ["allOf", "anyOf", "oneOf"] {
        out.extend(items(schema, &[key]));
    }
    out
}

/// Compiles the patterns of a schema; those that don't compile are left out (definitions are checked for them).
pub(super) fn patterns(schema: &Value, out: &mut HashMap<String, Regex>) {
    let pattern = text(schema, &["pattern"]);
    if !pattern.is_empty()
        && !out.contains_key(pattern)
        && let Ok(compiled) = Regex::new(pattern)
    {
        out.insert(pattern.to_owned(), compiled);
    }
    for inner in below(schema) {
        patterns(inner, out);
    }
}

/// Whether any part of a schema has rules in CEL.
pub(super) fn has_rules(schema: &Value) -> bool {
    !items(schema, &["x-kubernetes-validations"]).is_empty() || below(schema).into_iter().any(has_rules)
}

/// Drops what the schema doesn't have.
pub(super) fn prune(schema: &Value, value: &mut Value, resource: bool, path: &str, unknown: &mut Vec<String>) {
    match value {
        Value::Object(entries) => {
            let properties = schema.get("properties").and_then(Value::as_object);
            let additional = schema.get("additionalProperties");
            let keep = on(schema, PRESERVE) || additional == Some(&Value::Bool(true));
            let resource = resource || on(schema, EMBEDDED);
            let names: Vec<String> = entries.keys().cloned().collect();
            for name in names {
                let here = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                if resource && matches!(name.as_str(), "apiVersion" | "kind" | "metadata") {
                    continue;
                }
                let inner =
                    properties.and_then(|all| all.get(&name)).or_else(|| additional.filter(|inner| inner.is_object()));
                match (inner, entries.get_mut(&name)) {
                    (Some(inner), Some(entry)) => prune(inner, entry, false, &here, unknown),
                    (None, Some(_)) if !keep => {
                        entries.remove(&name);
                        unknown.push(here);
                    }
                    _ => {}
                }
            }
        }
        Value::Array(list) => {
            let Some(inner) = schema.get("items").filter(|inner| inner.is_object()) else { return };
            for (index, one) in list.iter_mut().enumerate() {
                prune(inner, one, false, &format!("{path}[{index}]"), unknown);
            }
        }
        _ => {}
    }
}

/// Fills in defaults, outermost first.
pub(super) fn default(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(entries) => {
            let properties = schema.get("properties").and_then(Value::as_object);
            for (name, inner) in properties.into_iter().flatten() {
                if let Some(fallback) = inner.get("default").filter(|fallback| !fallback.is_null()) {
                    let nullable = on(inner, "nullable");
                    let absent = entries.get(name).is_none_or(|given| given.is_null() && !nullable);
                    if absent {
                        entries.insert(name.clone(), fallback.clone());
                    }
                } else if entries.get(name).is_some_and(Value::is_null)
                    && !on(inner, "nullable")
                    && !on(inner, PRESERVE)
                {
                    entries.remove(name);
                }
                if let Some(entry) = entries.get_mut(name) {
                    default(inner, entry);
                }
            }
            if let Some(inner) = schema.get("additionalProperties").filter(|inner| inner.is_object()) {
                for (_, entry) in
                    entries.iter_mut().filter(|(name, _)| properties.is_none_or(|all| !all.contains_key(*name)))
                {
                    default(inner, entry);
                }
            }
        }
        Value::Array(list) => {
            if let Some(inner) = schema.get("items").filter(|inner| inner.is_object()) {
                for one in list {
                    default(inner, one);
                }
            }
        }
        _ => {}
    }
}

/// The type of an object with this schema at its root.
pub(super) fn root_type(schema: &Value) -> Type {
    let Type::Struct(inner) = node_type(schema) else {
        return with_object_fields(Struct { open: true, ..Struct::default() });
    };
    with_object_fields(Struct { open: inner.open, atomic: false, ..(*inner).clone() })
}

fn with_object_fields(mut inner: Struct) -> Type {
    for key in ["apiVersion", "kind"] {
        inner.fields.insert(key.into(), Field::optional(Type::Scalar(Scalar::String)));
    }
    inner.fields.insert("metadata".into(), Field::optional(Type::named("meta.ObjectMeta")));
    Type::Struct(Arc::new(inner))
}

fn node_type(schema: &Value) -> Type {
    if on(schema, INT_OR_STRING) {
        return Type::Scalar(Scalar::Untyped);
    }
    let atomic = text(schema, &["x-kubernetes-map-type"]) == "atomic";
    let properties = schema.get("properties").and_then(Value::as_object);
    match text(schema, &["type"]) {
        "object" if properties.is_none() && on(schema, PRESERVE) && !atomic && !on(schema, EMBEDDED) => Type::Any,
        "object" => {
            if let Some(inner) = schema.get("additionalProperties").filter(|inner| inner.is_object()) {
                Type::Map(Arc::new(MapType { value: node_type(inner), atomic }))
            } else {
                let fields: BTreeMap<String, Field> = properties
                    .into_iter()
                    .flatten()
                    .map(|(name, inner)| (name.clone(), Field::optional(node_type(inner))))
                    .collect();
                let inner =
                    Struct { name: String::new(), fields, atomic, open: on(schema, PRESERVE) || properties.is_none() };
                if on(schema, EMBEDDED) { with_object_fields(inner) } else { Type::Struct(Arc::new(inner)) }
            }
        }
        "array" => {
            let relation = match text(schema, &["x-kubernetes-list-type"]) {
                "set" => Relation::Set,
                "map" => Relation::Map(
                    items(schema, &["x-kubernetes-list-map-keys"])
                        .iter()
                        .filter_map(Value::as_str)
                        .map(str::to_owned)
                        .collect(),
                ),
                _ => Relation::Atomic,
            };
            let item = schema.get("items").map_or(Type::Any, node_type);
            Type::List(Arc::new(List { item, relation }))
        }
        "" => Type::Any,
        _ => Type::Scalar(Scalar::Untyped),
    }
}
