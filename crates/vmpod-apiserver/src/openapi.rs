//! `OpenAPI` v3: what `kubectl explain` shows, and what clients look up before they apply.
//!
//! Descriptions and types of the built-in kinds come from `k8s-openapi`; merge keys, list types and the
//! group, version and kind of each are added from our own tables.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use k8s_openapi::api::{
    authentication::v1 as authentication, authorization::v1 as authorization, autoscaling::v1 as autoscaling,
    certificates::v1 as certificates, coordination::v1 as coordination, core::v1 as core, events::v1 as events,
    policy::v1 as policy, rbac::v1 as rbac, scheduling::v1 as scheduling,
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1 as apiextensions;
use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::kinds::{Registry, Resource};
use crate::schema::{self, Relation, Type};

const REF: &str = "#/components/schemas/";

/// Schemas of the built-in types by their full name.
static DEFINITIONS: LazyLock<BTreeMap<String, Value>> = LazyLock::new(|| {
    let settings = SchemaSettings::openapi3().with(|settings| settings.meta_schema = None);
    let mut generator = SchemaGenerator::new(settings);
    for register in [
        SchemaGenerator::subschema_for::<core::Binding>,
        SchemaGenerator::subschema_for::<core::ConfigMap>,
        SchemaGenerator::subschema_for::<core::Event>,
        SchemaGenerator::subschema_for::<core::Namespace>,
        SchemaGenerator::subschema_for::<core::Node>,
        SchemaGenerator::subschema_for::<core::Pod>,
        SchemaGenerator::subschema_for::<core::Secret>,
        SchemaGenerator::subschema_for::<core::ServiceAccount>,
        SchemaGenerator::subschema_for::<coordination::Lease>,
        SchemaGenerator::subschema_for::<apiextensions::CustomResourceDefinition>,
        SchemaGenerator::subschema_for::<authentication::SelfSubjectReview>,
        SchemaGenerator::subschema_for::<authentication::TokenReview>,
        SchemaGenerator::subschema_for::<authentication::TokenRequest>,
        SchemaGenerator::subschema_for::<authorization::LocalSubjectAccessReview>,
        SchemaGenerator::subschema_for::<authorization::SelfSubjectAccessReview>,
        SchemaGenerator::subschema_for::<authorization::SelfSubjectRulesReview>,
        SchemaGenerator::subschema_for::<authorization::SubjectAccessReview>,
        SchemaGenerator::subschema_for::<autoscaling::Scale>,
        SchemaGenerator::subschema_for::<certificates::CertificateSigningRequest>,
        SchemaGenerator::subschema_for::<events::Event>,
        SchemaGenerator::subschema_for::<policy::Eviction>,
        SchemaGenerator::subschema_for::<policy::PodDisruptionBudget>,
        SchemaGenerator::subschema_for::<rbac::ClusterRole>,
        SchemaGenerator::subschema_for::<rbac::ClusterRoleBinding>,
        SchemaGenerator::subschema_for::<rbac::Role>,
        SchemaGenerator::subschema_for::<rbac::RoleBinding>,
        SchemaGenerator::subschema_for::<scheduling::PriorityClass>,
        SchemaGenerator::subschema_for::<meta::DeleteOptions>,
        SchemaGenerator::subschema_for::<meta::ObjectMeta>,
        SchemaGenerator::subschema_for::<meta::ListMeta>,
        SchemaGenerator::subschema_for::<meta::Status>,
    ] {
        let _reference = register(&mut generator);
    }
    let raw = generator.take_definitions(true);
    raw.into_iter()
        .map(|(name, mut value)| {
            tidy(&mut value);
            enrich(&name, &mut value);
            (name, value)
        })
        .collect()
});

/// A `$ref` with something beside it is an `allOf` in `OpenAPI` 3.0.
fn tidy(value: &mut Value) {
    match value {
        Value::Object(map) => {
            // A schema may also have a property of that name.
            if map.len() > 1
                && map.get("$ref").is_some_and(Value::is_string)
                && let Some(reference) = map.remove("$ref")
            {
                map.insert("allOf".into(), json!([{"$ref": reference}]));
            }
            map.values_mut().for_each(tidy);
        }
        Value::Array(list) => list.iter_mut().for_each(tidy),
        _ => {}
    }
}

/// The name of a type in `wire.txt` for its full name.
fn short_name(full: &str) -> Option<String> {
    let (package, name) = full.rsplit_once('.')?;
    let package = match package {
        "io.k8s.apimachinery.pkg.apis.meta.v1" => "meta",
        "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1" => "apiext",
        other => other.strip_prefix("io.k8s.api.")?.strip_suffix(".v1")?,
    };
    Some(format!("{package}.{name}"))
}

/// The full name of a type in `wire.txt`.
fn full_name(short: &str) -> String {
    let (package, name) = short.split_once('.').unwrap_or(("", short));
    match package {
        "meta" => format!("io.k8s.apimachinery.pkg.apis.meta.v1.{name}"),
        "apiext" => format!("io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.{name}"),
        "metrics" => format!("io.k8s.metrics.pkg.apis.metrics.v1beta1.{name}"),
        other => format!("io.k8s.api.{other}.v1.{name}"),
    }
}

/// Adds what the API says about merging.
fn enrich(name: &str, value: &mut Value) {
    let Some(inner) = short_name(name).and_then(|short| schema::builtin().get(short.as_str())) else { return };
    if inner.atomic {
        value["x-kubernetes-map-type"] = "atomic".into();
    }
    let Some(properties) = value.get_mut("properties").and_then(Value::as_object_mut) else { return };
    for (key, property) in properties {
        let Some(field) = inner.fields.get(key) else { continue };
        if let Type::List(list) = &field.ty {
            match &list.relation {
                Relation::Atomic => property["x-kubernetes-list-type"] = "atomic".into(),
                Relation::Set => property["x-kubernetes-list-type"] = "set".into(),
                Relation::Map(keys) => {
                    property["x-kubernetes-list-type"] = "map".into();
                    property["x-kubernetes-list-map-keys"] = json!(keys);
                }
            }
        }
        if matches!(&field.ty, Type::Map(map) if map.atomic) {
            property["x-kubernetes-map-type"] = "atomic".into();
        }
        let rule = &field.rule;
        let strategy: Vec<&str> = [(rule.merge, "merge"), (rule.replace, "replace"), (rule.retain_keys, "retainKeys")]
            .into_iter()
            .filter_map(|(set, word)| set.then_some(word))
            .collect();
        if !strategy.is_empty() {
            property["x-kubernetes-patch-strategy"] = strategy.join(",").into();
        }
        if let Some(key) = &rule.key {
            property["x-kubernetes-patch-merge-key"] = key.clone().into();
        }
    }
}

/// The description of a field of a built-in type (named as in `wire.txt`); of the type itself for an empty field.
pub(crate) fn description(short: &str, field: &str) -> String {
    let definition = DEFINITIONS.get(&full_name(short));
    let described = definition.and_then(|definition| {
        if field.is_empty() {
            definition.get("description")
        } else {
            definition.get("properties")?.get(field)?.get("description")
        }
    });
    described.and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn path_of(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

/// `GET /openapi/v3`: where the documents are. The hash in each URL changes with the document.
#[must_use]
pub(crate) fn index(registry: &Registry) -> Value {
    let mut paths = Map::new();
    for resource in registry.resources() {
        let path = path_of(&resource.group, &resource.version);
        if paths.contains_key(&path) {
            continue;
        }
        let Some(document) = document(registry, &resource.group, &resource.version) else { continue };
        let digest = Sha256::digest(document.to_string().as_bytes());
        let hash = digest.iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().concat();
        paths.insert(path.clone(), json!({"serverRelativeURL": format!("/openapi/v3/{path}?hash={hash}")}));
    }
    json!({"paths": paths})
}

/// `GET /openapi/v3/api/v1` and `/openapi/v3/apis/GROUP/VERSION`.
#[must_use]
pub(crate) fn document(registry: &Registry, group: &str, version: &str) -> Option<Arc<Value>> {
    let mut paths = Map::new();
    let mut schemas: BTreeMap<String, Value> = BTreeMap::new();
    let of_group = registry.resources().iter().filter(|one| one.group == group && one.version == version);
    for resource in of_group {
        let name = schema_name(resource);
        let mut schema = match &resource.custom {
            Some(custom) => custom_schema(custom.schema()),
            None => DEFINITIONS.get(&name).cloned().unwrap_or_else(|| json!({"type": "object"})),
        };
        let gvk = json!({"group": group, "version": version, "kind": resource.kind});
        schema["x-kubernetes-group-version-kind"] = json!([gvk]);
        add_references(&schema, &mut schemas);
        schemas.insert(name.clone(), schema);
        if resource.verbs.contains(&"list") {
            let list = json!({
                "description": format!("{} is a list of {}.", resource.list_kind, resource.kind), "type": "object", "required": ["items"],
                "properties": {
                    "apiVersion": {"type": "string"}, "kind": {"type": "string"},
                    "metadata": {"$ref": format!("{REF}{}", full_name("meta.ListMeta"))},
                    "items": {"type": "array", "items": {"$ref": format!("{REF}{name}")}},
                },
                "x-kubernetes-group-version-kind": [{"group": group, "version": version, "kind": resource.list_kind}],
            });
            add_references(&list, &mut schemas);
            schemas.insert(format!("{name}List"), list);
        }
        add_paths(resource, &name, &gvk, &mut paths);
    }
    if paths.is_empty() {
        return None;
    }
    for name in ["meta.DeleteOptions", "meta.Status"] {
        add_references(&json!({"$ref": format!("{REF}{}", full_name(name))}), &mut schemas);
    }
    Some(Arc::new(json!({
        "openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.36.0"},
        "paths": paths, "components": {"schemas": schemas},
    })))
}

fn schema_name(resource: &Resource) -> String {
    if resource.is_custom() {
        let mut parts: Vec<&str> = resource.group.split('.').collect();
        parts.reverse();
        format!("{}.{}.{}", parts.join("."), resource.version, resource.kind)
    } else {
        full_name(resource.type_name)
    }
}

fn custom_schema(schema: &Value) -> Value {
    let mut out = schema.clone();
    for key in ["apiVersion", "kind"] {
        out["properties"][key] = json!({"type": "string", "description": description("core.ConfigMap", key)});
    }
    out["properties"]["metadata"] = json!({
        "description": description("core.ConfigMap", "metadata"),
        "allOf": [{"$ref": format!("{REF}{}", full_name("meta.ObjectMeta"))}],
    });
    out
}

/// Adds every built-in schema that this one leads to.
fn add_references(value: &Value, schemas: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(map) => {
            if let Some(name) = map.get("$ref").and_then(Value::as_str).and_then(|text| text.strip_prefix(REF))
                && !schemas.contains_key(name)
                && let Some(definition) = DEFINITIONS.get(name)
            {
                schemas.insert(name.to_owned(), definition.clone());
                add_references(definition, schemas);
            }
            map.values().for_each(|inner| add_references(inner, schemas));
        }
        Value::Array(list) => list.iter().for_each(|inner| add_references(inner, schemas)),
        _ => {}
    }
}

fn parameter(name: &str, kind: &str) -> Value {
    json!({"name": name, "in": "query", "schema": {"type": kind, "uniqueItems": true}})
}

/// The body types of each method.
fn content(method: &str, schema: &Value) -> Value {
    let types: &[&str] = match method {
        "patch" => &[
            "application/json-patch+json",
            "application/merge-patch+json",
            "application/strategic-merge-patch+json",
            "application/apply-patch+yaml",
        ],
        _ => &["application/json", "application/yaml"],
    };
    types.iter().map(|one| ((*one).to_owned(), json!({"schema": schema}))).collect::<Map<_, _>>().into()
}

fn operation(method: &str, action: &str, schema: &Value, gvk: &Value) -> Value {
    let mut operation = json!({
        "x-kubernetes-action": action, "x-kubernetes-group-version-kind": gvk,
        "responses": {"200": {"description": "OK", "content": {"application/json": {"schema": schema}}}},
    });
    let parameters: Vec<Value> = match method {
        "post" | "put" => vec![("dryRun", "string"), ("fieldManager", "string"), ("fieldValidation", "string")],
        "patch" => {
            vec![("dryRun", "string"), ("fieldManager", "string"), ("fieldValidation", "string"), ("force", "boolean")]
        }
        "delete" => vec![("dryRun", "string"), ("gracePeriodSeconds", "integer"), ("propagationPolicy", "string")],
        _ if action == "list" => vec![
            ("continue", "string"),
            ("fieldSelector", "string"),
            ("labelSelector", "string"),
            ("limit", "integer"),
            ("resourceVersion", "string"),
            ("watch", "boolean"),
        ],
        _ => Vec::new(),
    }
    .into_iter()
    .map(|(name, kind)| parameter(name, kind))
    .collect();
    if !parameters.is_empty() {
        operation["parameters"] = parameters.into();
    }
    if matches!(method, "post" | "put" | "patch") {
        operation["requestBody"] = json!({"content": content(method, schema), "required": true});
    }
    operation
}

fn add_paths(resource: &Resource, name: &str, gvk: &Value, paths: &mut Map<String, Value>) {
    let object = json!({"$ref": format!("{REF}{name}")});
    let list = json!({"$ref": format!("{REF}{name}List")});
    let root = format!("/{}", path_of(&resource.group, &resource.version));
    let collection = if resource.namespaced {
        format!("{root}/namespaces/{{namespace}}/{}", resource.plural)
    } else {
        format!("{root}/{}", resource.plural)
    };
    let has = |verb: &str| resource.verbs.contains(&verb);
    let mut here = Map::new();
    if has("list") {
        here.insert("get".into(), operation("get", "list", &list, gvk));
    }
    if has("create") {
        here.insert("post".into(), operation("post", "post", &object, gvk));
    }
    paths.insert(collection.clone(), here.into());
    if resource.namespaced && has("list") {
        let all = json!({"get": operation("get", "list", &list, gvk)});
        paths.insert(format!("{root}/{}", resource.plural), all);
    }
    if !resource.stored {
        return;
    }
    // kubectl sends what is promised here, and nobody knows the merge keys of custom kinds.
    let operation = |method: &str, action: &str, schema: &Value, gvk: &Value| {
        let mut operation = operation(method, action, schema, gvk);
        if resource.is_custom()
            && let Some(content) = operation.pointer_mut("/requestBody/content").and_then(Value::as_object_mut)
        {
            content.remove("application/strategic-merge-patch+json");
        }
        operation
    };
    let mut one = Map::new();
    for (verb, method) in [("get", "get"), ("update", "put"), ("patch", "patch"), ("delete", "delete")] {
        if has(verb) {
            one.insert(method.into(), operation(method, method, &object, gvk));
        }
    }
    paths.insert(format!("{collection}/{{name}}"), one.into());
    for sub in &resource.subresources {
        let mut below = Map::new();
        let (group, version) = sub.group.unwrap_or((&resource.group, &resource.version));
        let gvk = json!({"group": group, "version": version, "kind": sub.kind});
        for (verb, method) in [("get", "get"), ("create", "post"), ("update", "put"), ("patch", "patch")] {
            if sub.verbs.contains(&verb) {
                below.insert(method.into(), operation(method, method, &object, &gvk));
            }
        }
        paths.insert(format!("{collection}/{{name}}/{}", sub.name), below.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_described_with_their_merge_keys() {
        let document = document(&Registry::builtin(), "", "v1").unwrap();
        let schemas = &document["components"]["schemas"];
        let containers = &schemas["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"];
        assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
        assert_eq!(containers["x-kubernetes-list-map-keys"], json!(["name"]));
        let pod = &schemas["io.k8s.api.core.v1.Pod"];
        assert_eq!(pod["x-kubernetes-group-version-kind"][0]["kind"], "Pod");
        assert!(document["paths"]["/api/v1/namespaces/{namespace}/pods/{name}"]["patch"].is_object());
    }

    #[test]
    fn custom_kinds_promise_no_strategic_merge() {
        let definition = json!({
            "metadata": {"name": "herds.example.dev"},
            "spec": {
                "group": "example.dev", "scope": "Namespaced", "names": {"kind": "Herd", "plural": "herds", "listKind": "HerdList", "singular": "herd"},
                "versions": [{"name": "v1", "served": true, "storage": true, "subresources": {"status": {}}, "schema": {"openAPIV3Schema": {"type": "object"}}}],
            },
            "status": {
                "acceptedNames": {"kind": "Herd", "plural": "herds", "listKind": "HerdList", "singular": "herd"},
                "conditions": [{"type": "Established", "status": "True"}, {"type": "NamesAccepted", "status": "True"}],
            },
        });
        let registry = Registry::builtin().with_crds(&[&definition]);
        let document = document(&registry, "example.dev", "v1").unwrap();
        let mut patches = 0;
        for (path, operations) in document["paths"].as_object().unwrap() {
            let Some(content) = operations.pointer("/patch/requestBody/content") else { continue };
            patches += 1;
            assert!(content.get("application/merge-patch+json").is_some(), "{path}");
            assert!(content.get("application/strategic-merge-patch+json").is_none(), "{path}");
        }
        assert_eq!(patches, 2);
    }

    #[test]
    fn every_reference_leads_somewhere() {
        fn check(value: &Value, schemas: &Value) {
            match value {
                Value::Object(map) => {
                    if let Some(name) = map.get("$ref").and_then(Value::as_str) {
                        let name = name.strip_prefix(REF).unwrap_or_else(|| panic!("odd reference {name}"));
                        assert!(schemas.get(name).is_some(), "{name} is not in the document");
                    }
                    map.values().for_each(|inner| check(inner, schemas));
                }
                Value::Array(list) => list.iter().for_each(|inner| check(inner, schemas)),
                _ => {}
            }
        }
        let registry = Registry::builtin();
        for resource in registry.resources() {
            let document = document(&registry, &resource.group, &resource.version).unwrap();
            check(&document, &document["components"]["schemas"]);
        }
    }

    #[test]
    fn the_field_tables_agree_with_the_described_types() {
        let mut missing = Vec::new();
        for (name, definition) in DEFINITIONS.iter() {
            let Some(inner) = short_name(name).and_then(|short| schema::builtin().get(short.as_str())) else {
                continue;
            };
            for key in definition["properties"].as_object().into_iter().flatten().map(|(key, _)| key) {
                if !inner.fields.contains_key(key) {
                    missing.push(format!("{name}.{key}"));
                }
            }
        }
        assert_eq!(missing, Vec::<String>::new(), "fields that wire.txt lacks");
    }
}
