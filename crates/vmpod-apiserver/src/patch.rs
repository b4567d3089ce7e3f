//! The four kinds of PATCH.

mod strategic;

use serde_json::{Value, json};

use crate::kinds::{Context, FieldValidation, Format, Resource, at, conform, parse};
use crate::managed_fields;
use crate::managed_fields::typed;
use crate::status::{Cause, Status};
use crate::store::MAX_NESTING;

/// The most operations that one JSON patch may have.
const MAX_OPERATIONS: usize = 10_000;

/// The most bytes that the copies and moves of one JSON patch may add up to: as many as a body has.
const COPY_LIMIT: usize = crate::http::BODY_LIMIT;

/// Which kind of patch a body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PatchKind {
    /// RFC 6902, `application/json-patch+json`
    Json,
    /// RFC 7386, `application/merge-patch+json`
    Merge,
    /// `application/strategic-merge-patch+json`
    Strategic,
    /// Server-side apply, `application/apply-patch+yaml`
    Apply,
}

impl PatchKind {
    /// The kind that a `Content-Type` names.
    pub(crate) fn of(content_type: Option<&str>) -> Result<Self, Status> {
        match content_type.unwrap_or_default().split(';').next().unwrap_or_default().trim() {
            "application/json-patch+json" => Ok(Self::Json),
            "application/merge-patch+json" => Ok(Self::Merge),
            "application/strategic-merge-patch+json" => Ok(Self::Strategic),
            "application/apply-patch+yaml" | "application/apply-patch+json" => Ok(Self::Apply),
            _ => Err(Status::unsupported_media_type(&[
                "application/json-patch+json",
                "application/merge-patch+json",
                "application/strategic-merge-patch+json",
                "application/apply-patch+yaml",
            ])),
        }
    }
}

/// A patched object, on its way to [`crate::kinds::update`] or [`crate::kinds::create`].
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Patched {
    /// The whole new object.
    pub(crate) value: Value,
    /// What to tell the client.
    pub(crate) warnings: Vec<String>,
    /// Whether it was applied: its field owners are settled. Goes into `Context::apply`.
    pub(crate) apply: bool,
}

/// Checks the query parameters of a PATCH: an apply needs a field manager, and only an apply can be forced.
pub(crate) fn check_options(kind: PatchKind, field_manager: Option<&str>, force: Option<bool>) -> Result<(), Status> {
    let mut causes = Vec::new();
    if kind == PatchKind::Apply {
        if field_manager.unwrap_or_default().is_empty() {
            causes.push(Cause::required("fieldManager", "is required for apply patch"));
        }
    } else if force.is_some() {
        causes.push(Cause::forbidden("force", "may not be specified for non-apply patch"));
    }
    if field_manager.is_some_and(|manager| manager.len() > 128) {
        causes.push(Cause::too_long("fieldManager", 128));
    }
    if let Some(odd) = field_manager.and_then(|manager| manager.chars().position(char::is_control)) {
        let shown = Value::from(field_manager.unwrap_or_default());
        causes.push(Cause::invalid("fieldManager", &shown, &format!("invalid character (at position {odd})")));
    }
    if causes.is_empty() { Ok(()) } else { Err(Status::invalid_kind("meta.k8s.io", "PatchOptions", "", causes)) }
}

/// Applies a patch body to an object. `old` may be `None` for [`PatchKind::Apply`] only.
#[expect(clippy::too_many_arguments, reason = "each is a separate part of the request")]
pub(crate) fn apply(
    kind: PatchKind,
    resource: &Resource,
    subresource: Option<&str>,
    old: Option<&Value>,
    body: &[u8],
    validation: FieldValidation,
    force: bool,
    context: &Context<'_>,
) -> Result<Patched, Status> {
    if kind == PatchKind::Apply {
        return server_side(resource, subresource, old, body, validation, force, context);
    }
    let Some(old) = old else { return Err(Status::not_found(resource, context.name.unwrap_or_default())) };
    let (patch, duplicates) = parse(body, Format::Json).map_err(Status::bad_request)?;
    let mut new = old.clone();
    match kind {
        PatchKind::Json => json_patch_to(&mut new, patch)?,
        PatchKind::Merge => {
            if !patch.is_object() {
                return Err(Status::bad_request(
                    "json: cannot unmarshal the patch into Go value of type map[string]interface {}",
                ));
            }
            json_patch::merge(&mut new, &patch);
        }
        PatchKind::Strategic => {
            if resource.is_custom() {
                return Err(Status::unsupported_media_type(&[
                    "application/json-patch+json",
                    "application/merge-patch+json",
                    "application/apply-patch+yaml",
                ]));
            }
            new = strategic::merge(&resource.ty, new, patch).map_err(Status::bad_request)?;
        }
        PatchKind::Apply => {}
    }
    let decoded = conform(resource, new, &duplicates, validation)?;
    Ok(Patched { value: decoded.value, warnings: decoded.warnings, apply: false })
}

fn json_patch_to(object: &mut Value, patch: Value) -> Result<(), Status> {
    let patch: json_patch::Patch = serde_json::from_value(patch).map_err(|why| Status::bad_request(why.to_string()))?;
    if patch.0.len() > MAX_OPERATIONS {
        return Err(Status::too_large(format!(
            "The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {}",
            patch.0.len()
        )));
    }
    let mut copied = 0;
    for operation in &patch.0 {
        check_operation(object, operation, &mut copied)?;
        // What fails is thrown away whole.
        json_patch::patch_unsafe(object, std::slice::from_ref(operation)).map_err(|_| Status::unprocessable())?;
    }
    Ok(())
}

/// Refuses an operation that would make the object too deep, or the copies too large: a few copies
/// of an object into itself would double it each time.
fn check_operation(object: &Value, operation: &json_patch::PatchOperation, copied: &mut usize) -> Result<(), Status> {
    use json_patch::PatchOperation as Op;
    let deep =
        || Status { message: format!("the object is nested more than {MAX_NESTING} deep"), ..Status::unprocessable() };
    let path = operation.path().tokens().count();
    if path > MAX_NESTING {
        return Err(deep());
    }
    let (value, from) = match operation {
        Op::Add(op) => (Some(&op.value), false),
        Op::Replace(op) => (Some(&op.value), false),
        Op::Copy(op) => (object.pointer(op.from.as_str()), true),
        Op::Move(op) => (object.pointer(op.from.as_str()), true),
        Op::Remove(_) | Op::Test(_) => (None, false),
    };
    let Some(value) = value else { return Ok(()) };
    let (depth, size) = measure(value);
    if path + depth > MAX_NESTING {
        return Err(deep());
    }
    if from {
        *copied += size;
    }
    if *copied > COPY_LIMIT {
        let message = format!(
            "Unable to complete the copy, the accumulated size increase of copy is {copied}, exceeding the limit {COPY_LIMIT}"
        );
        return Err(Status { message, ..Status::unprocessable() });
    }
    Ok(())
}

/// How deep a value is nested, and about how many bytes it takes as JSON. Doesn't recurse.
fn measure(value: &Value) -> (usize, usize) {
    let (mut deepest, mut size) = (0, 0);
    let mut left = vec![(value, 0)];
    while let Some((value, depth)) = left.pop() {
        size += 4;
        match value {
            Value::Object(entries) => {
                deepest = deepest.max(depth + 1);
                size += entries.keys().map(|key| key.len() + 4).sum::<usize>();
                left.extend(entries.values().map(|one| (one, depth + 1)));
            }
            Value::Array(items) => {
                deepest = deepest.max(depth + 1);
                left.extend(items.iter().map(|one| (one, depth + 1)));
            }
            Value::String(text) => size += text.len(),
            _ => {}
        }
    }
    (deepest, size)
}

fn server_side(
    resource: &Resource,
    subresource: Option<&str>,
    old: Option<&Value>,
    body: &[u8],
    validation: FieldValidation,
    force: bool,
    context: &Context<'_>,
) -> Result<Patched, Status> {
    let format =
        if body.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{') { Format::Json } else { Format::Yaml };
    let (mut applied, duplicates) =
        parse(body, format).map_err(|why| Status::bad_request(format!("error decoding YAML: {why}")))?;
    if !applied.is_object() {
        return Err(Status::bad_request("error decoding YAML: the configuration must be an object"));
    }
    for key in ["kind", "apiVersion"] {
        if applied[key].as_str().unwrap_or_default().is_empty() {
            return Err(Status::bad_request(format!(
                "Object '{}' is missing in the configuration",
                if key == "kind" { "Kind" } else { key }
            )));
        }
    }
    if at(&applied, &["metadata", "managedFields"]).is_some() {
        return Err(Status::bad_request("metadata.managedFields must be nil"));
    }
    if applied["apiVersion"] != resource.api_version() || applied["kind"] != resource.kind {
        return Err(Status::bad_request(format!(
            "Incorrect version specified in apply patch. Specified patch version: {}, expected: {}",
            applied["apiVersion"].as_str().unwrap_or_default(),
            resource.api_version()
        )));
    }
    let name = applied["metadata"]["name"].as_str().unwrap_or_default();
    if let Some(expected) = context.name.filter(|expected| !name.is_empty() && *expected != name) {
        return Err(Status::bad_request(format!(
            "the name of the object ({name}) does not match the name on the URL ({expected})"
        )));
    }
    if let Some(path) = typed::undeclared(&resource.ty, &applied, &mut Vec::new()) {
        let name = context.name.unwrap_or_default();
        let place = context.namespace.map_or_else(|| name.to_owned(), |namespace| format!("{namespace}/{name}"));
        let message = format!(
            "failed to create typed patch object ({place}; {}/{}, Kind={}): {path}: field not declared in schema",
            resource.group, resource.version, resource.kind
        );
        return Err(Status { code: 500, reason: "", message, details: None, retry_after: None });
    }
    strip_nulls(&mut applied);
    if !applied["metadata"].is_object() {
        applied["metadata"] = json!({});
    }
    let merged =
        managed_fields::server_side_apply(resource, old, &applied, context.manager, force, subresource, context.now)?;
    let decoded = conform(resource, merged, &duplicates, validation)?;
    Ok(Patched { value: decoded.value, warnings: decoded.warnings, apply: true })
}

/// `creationTimestamp: null` and the like, which generated manifests are full of, say nothing.
fn strip_nulls(value: &mut Value) {
    match value {
        Value::Object(entries) => {
            entries.retain(|_, one| !one.is_null());
            entries.values_mut().for_each(strip_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(strip_nulls),
        _ => {}
    }
}

#[cfg(test)]
mod tests;
