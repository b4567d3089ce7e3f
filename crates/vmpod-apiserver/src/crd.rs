//! Custom resource definitions: their own rules, and the kinds that they define.

mod definition;
mod structural;
mod validate;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use kube_cel::{CompiledSchema, RootContext, Validator, compile_schema};
use regex::Regex;
use serde_json::{Map, Value};

pub(crate) use self::definition::names_accepted;
pub(crate) use self::definition::{default_definition, prepare, validate_definition, validate_definition_update};
use crate::kinds::{Resource, at, custom_subresource, custom_verbs, items, shape, text};
use crate::schema::Type;
use crate::status::Cause;

/// The schema, columns and subresources of a custom kind at one version.
pub(crate) struct CustomKind {
    schema: Value,
    patterns: HashMap<String, Regex>,
    rules: Option<Mutex<Rules>>,
    root: RootContext,
    status: bool,
    /// `spec.versions[].subresources.scale`
    pub(crate) scale: Option<Value>,
    /// `spec.versions[].additionalPrinterColumns`
    pub(crate) columns: Vec<Value>,
    /// `spec.versions[].selectableFields[].jsonPath`, without the leading point.
    pub(crate) selectable: Vec<String>,
}

struct Rules {
    compiled: CompiledSchema,
    validator: Validator,
}

impl fmt::Debug for CustomKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CustomKind")
            .field("kind", &self.root.kind)
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

impl CustomKind {
    fn new(definition: &Value, version: &Value) -> Self {
        let schema = at(version, &["schema", "openAPIV3Schema"])
            .cloned()
            .unwrap_or_else(|| serde_json::json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true}));
        let mut patterns = HashMap::new();
        structural::patterns(&schema, &mut patterns);
        let group = text(definition, &["spec", "group"]);
        let rules = structural::has_rules(&schema)
            .then(|| Mutex::new(Rules { compiled: compile_schema(&schema), validator: Validator::new() }));
        Self {
            patterns,
            rules,
            root: RootContext {
                api_version: format!("{group}/{}", text(version, &["name"])),
                api_group: group.to_owned(),
                kind: text(definition, &["spec", "names", "kind"]).to_owned(),
            },
            status: at(version, &["subresources", "status"]).is_some(),
            scale: at(version, &["subresources", "scale"]).cloned(),
            columns: items(version, &["additionalPrinterColumns"]).to_vec(),
            selectable: items(version, &["selectableFields"])
                .iter()
                .map(|field| text(field, &["jsonPath"]).trim_start_matches('.').to_owned())
                .collect(),
            schema,
        }
    }

    /// Whether the status is written through its own subresource.
    pub(crate) fn has_status(&self) -> bool {
        self.status
    }

    /// The structural schema.
    pub(crate) fn schema(&self) -> &Value {
        &self.schema
    }

    /// Drops the fields that the schema doesn't have, and brings `metadata` into shape.
    pub(crate) fn prune(&self, value: Value, unknown: &mut Vec<String>) -> Result<Value, String> {
        let Value::Object(mut object) = value else { return Ok(value) };
        let metadata = object.remove("metadata").unwrap_or_else(|| Value::Object(Map::new()));
        let mut strange = Vec::new();
        let metadata = shape(&Type::named("meta.ObjectMeta"), metadata, &mut strange)?;
        unknown.extend(strange.into_iter().map(|path| format!("metadata.{path}")));
        let mut value = Value::Object(object);
        structural::prune(&self.schema, &mut value, true, "", unknown);
        if let Some(object) = value.as_object_mut() {
            object.insert("metadata".into(), metadata);
        }
        Ok(value)
    }

    /// Fills in the defaults of the schema.
    pub(crate) fn apply_defaults(&self, value: &mut Value) {
        structural::default(&self.schema, value);
    }

    /// The rules of the schema, then those of the lists, then those written in CEL.
    pub(crate) fn validate(&self, new: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
        let mut found = Vec::new();
        validate::schema(&self.schema, new, "", true, &self.patterns, &mut found);
        if let Some(old) = old.filter(|_| !found.is_empty()) {
            // What was wrong before and wasn't touched isn't held against this update.
            let mut before = Vec::new();
            validate::schema(&self.schema, old, "", true, &self.patterns, &mut before);
            found.retain(|cause| !before.contains(cause));
        }
        causes.extend(found);
        self.validate_scale(new, causes);
        validate::lists(&self.schema, new, "", causes);
        if let Some(rules) = &self.rules {
            if causes.iter().any(validate::blocks_rules) {
                causes.push(Cause::invalid(
                    "<nil>",
                    &Value::Null,
                    "some validation rules were not checked because the object was invalid; correct the existing errors to complete validation",
                ));
            } else {
                let rules = rules.lock().unwrap_or_else(PoisonError::into_inner);
                let checked =
                    rules.validator.validate_compiled_with_context(&rules.compiled, new, old, Some(&self.root));
                if let Err(errors) = checked {
                    causes.extend(errors.into_iter().map(|error| validate::rule_cause(&error)));
                }
            }
        }
    }

    fn validate_scale(&self, value: &Value, causes: &mut Vec<Cause>) {
        let Some(scale) = &self.scale else { return };
        for key in ["specReplicasPath", "statusReplicasPath"] {
            let path = text(scale, &[key]);
            let Some(found) = at_path(value, path) else { continue };
            match found.as_i64() {
                Some(count) if count < 0 => {
                    causes.push(Cause::invalid(path, found, "should be a non-negative integer"));
                }
                Some(count) if count > i64::from(i32::MAX) => {
                    causes.push(Cause::invalid(path, found, "should be less than or equal to 2147483647"));
                }
                Some(_) => {}
                None => causes.push(Cause::invalid(
                    path,
                    &0.into(),
                    &format!(
                        "{path} accessor error: {found} is of the type {}, expected int64",
                        validate::go_word(found)
                    ),
                )),
            }
        }
    }
}

/// The value at a path such as `.spec.replicas`.
pub(crate) fn at_path<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    let parts: Vec<&str> = path.trim_start_matches('.').split('.').collect();
    at(value, &parts)
}

/// The resources that a definition makes, once its names are accepted.
pub(crate) fn resources(definition: &Value) -> Vec<Resource> {
    let established = items(definition, &["status", "conditions"])
        .iter()
        .any(|condition| condition["type"] == "Established" && condition["status"] == "True");
    if !established {
        return Vec::new();
    }
    let spec = &definition["spec"];
    let names = &definition["status"]["acceptedNames"];
    let list = |key: &str| items(names, &[key]).iter().filter_map(Value::as_str).map(str::to_owned).collect::<Vec<_>>();
    let kind = text(names, &["kind"]);
    items(spec, &["versions"])
        .iter()
        .filter(|version| version["served"] == true)
        .map(|version| {
            let custom = CustomKind::new(definition, version);
            let mut subresources = Vec::new();
            if custom.status {
                subresources.push(custom_subresource(kind, "status"));
            }
            if custom.scale.is_some() {
                subresources.push(custom_subresource(kind, "scale"));
            }
            Resource {
                group: text(spec, &["group"]).to_owned(),
                version: text(version, &["name"]).to_owned(),
                kind: kind.to_owned(),
                list_kind: text(names, &["listKind"]).to_owned(),
                plural: text(names, &["plural"]).to_owned(),
                singular: text(names, &["singular"]).to_owned(),
                short_names: list("shortNames"),
                categories: list("categories"),
                namespaced: text(spec, &["scope"]) == "Namespaced",
                verbs: custom_verbs(),
                subresources,
                stored: true,
                ty: structural::root_type(&custom.schema),
                type_name: "",
                custom: Some(Arc::new(custom)),
            }
        })
        .collect()
}

/// Orders versions as Kubernetes does: `v2`, `v1`, `v1beta2`, `v1beta1`, `v1alpha1`, then the rest by name.
pub(crate) fn version_rank(version: &str) -> (u8, i64, i64, String) {
    let parse = || -> Option<(u8, i64, i64)> {
        let rest = version.strip_prefix('v')?;
        let digits = rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len());
        let major: i64 = rest[..digits].parse().ok()?;
        let tail = &rest[digits..];
        if tail.is_empty() {
            return Some((0, -major, 0));
        }
        for (class, word) in [(1, "beta"), (2, "alpha")] {
            if let Some(minor) = tail.strip_prefix(word) {
                return Some((class, -major, -minor.parse::<i64>().ok()?));
            }
        }
        None
    };
    let (class, major, minor) = parse().unwrap_or((3, 0, 0));
    (class, major, minor, version.to_owned())
}

#[cfg(test)]
mod tests;
