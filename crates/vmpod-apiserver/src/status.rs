//! `metav1.Status`: every answer of the API that isn't an object.
//!
//! The wording is the real API server's, because clients read it: kubectl prints messages as they are, and
//! client libraries branch on `reason` and `details.causes`.

use std::fmt;

use serde_json::{Map, Value, json};

use crate::kinds::Resource;

/// A failure to answer with: an HTTP code and the `metav1.Status` that goes with it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Status {
    /// The HTTP status code.
    pub(crate) code: u16,
    /// The machine-readable reason, such as `NotFound`.
    pub(crate) reason: &'static str,
    /// What a person reads.
    pub(crate) message: String,
    /// `details`: name, kind, group, causes.
    pub(crate) details: Option<Value>,
    /// Seconds for the `Retry-After` header.
    pub(crate) retry_after: Option<u32>,
}

/// Why one field of an object is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CauseReason {
    /// `FieldValueRequired`
    Required,
    /// `FieldValueInvalid`
    Invalid,
    /// `FieldValueForbidden`
    Forbidden,
    /// `FieldValueDuplicate`
    Duplicate,
    /// `FieldValueNotSupported`
    NotSupported,
    /// `FieldValueTooLong`
    TooLong,
    /// `FieldValueTooMany`
    TooMany,
    /// `FieldValueTypeInvalid`
    TypeInvalid,
    /// `FieldValueNotFound`
    NotFound,
}

impl CauseReason {
    /// The word used in `details.causes[].reason`.
    #[must_use]
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Required => "FieldValueRequired",
            Self::Invalid => "FieldValueInvalid",
            Self::Forbidden => "FieldValueForbidden",
            Self::Duplicate => "FieldValueDuplicate",
            Self::NotSupported => "FieldValueNotSupported",
            Self::TooLong => "FieldValueTooLong",
            Self::TooMany => "FieldValueTooMany",
            Self::TypeInvalid => "FieldValueTypeInvalid",
            Self::NotFound => "FieldValueNotFound",
        }
    }
}

/// One field error: an entry of `details.causes`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cause {
    /// What is wrong with the field.
    pub(crate) reason: CauseReason,
    /// The path, such as `spec.containers[0].image`.
    pub(crate) field: String,
    /// The message without the path.
    pub(crate) message: String,
}

impl Cause {
    fn new(reason: CauseReason, field: impl Into<String>, message: String) -> Self {
        Self { reason, field: field.into(), message }
    }

    fn detailed(head: String, detail: &str) -> String {
        if detail.is_empty() { head } else { format!("{head}: {detail}") }
    }

    /// A value is missing.
    #[must_use]
    pub(crate) fn required(field: impl Into<String>, detail: &str) -> Self {
        Self::new(CauseReason::Required, field, Self::detailed("Required value".into(), detail))
    }

    /// A value is malformed, with the value shown.
    #[must_use]
    pub(crate) fn invalid(field: impl Into<String>, value: &Value, detail: &str) -> Self {
        Self::new(CauseReason::Invalid, field, Self::detailed(format!("Invalid value: {}", shown(value)), detail))
    }

    /// A value is malformed; the message stands for itself (rules of custom resources do this).
    #[must_use]
    pub(crate) fn invalid_message(field: impl Into<String>, detail: &str) -> Self {
        Self::new(CauseReason::Invalid, field, format!("Invalid value: {detail}"))
    }

    /// A value has the wrong JSON type.
    #[must_use]
    pub(crate) fn type_invalid(field: impl Into<String>, found: &str, detail: &str) -> Self {
        Self::new(CauseReason::TypeInvalid, field, Self::detailed(format!("Invalid value: {}", quoted(found)), detail))
    }

    /// A value may not be given here.
    #[must_use]
    pub(crate) fn forbidden(field: impl Into<String>, detail: &str) -> Self {
        Self::new(CauseReason::Forbidden, field, Self::detailed("Forbidden".into(), detail))
    }

    /// A value is there twice.
    #[must_use]
    pub(crate) fn duplicate(field: impl Into<String>, value: &Value) -> Self {
        Self::new(CauseReason::Duplicate, field, format!("Duplicate value: {}", shown(value)))
    }

    /// A value isn't one of those known.
    #[must_use]
    pub(crate) fn not_supported(field: impl Into<String>, value: &Value, known: &[&str]) -> Self {
        let mut message = format!("Unsupported value: {}", shown(value));
        if !known.is_empty() {
            let list: Vec<String> = known.iter().map(|word| quoted(word)).collect();
            message = format!("{message}: supported values: {}", list.join(", "));
        }
        Self::new(CauseReason::NotSupported, field, message)
    }

    /// A string has more bytes than it may.
    #[must_use]
    pub(crate) fn too_long(field: impl Into<String>, max: usize) -> Self {
        Self::new(CauseReason::TooLong, field, format!("Too long: may not be more than {max} bytes"))
    }

    /// A list or map has more entries than it may.
    #[must_use]
    pub(crate) fn too_many(field: impl Into<String>, actual: usize, max: usize) -> Self {
        Self::new(CauseReason::TooMany, field, format!("Too many: {actual}: must have at most {max} items"))
    }

    /// A value names something that isn't there.
    #[must_use]
    pub(crate) fn not_found(field: impl Into<String>, value: &Value) -> Self {
        Self::new(CauseReason::NotFound, field, format!("Not found: {}", shown(value)))
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// A value as field errors show it: scalars as they are, the rest as JSON.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => quoted(text),
        other => other.to_string(),
    }
}

/// Go's `%q`, for the strings met in practice.
#[must_use]
pub(crate) fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for letter in text.chars() {
        match letter {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            control if control.is_control() => {
                let code = u32::from(control);
                out.extend([if code < 0x80 { format!("\\x{code:02x}") } else { format!("\\u{code:04x}") }]);
            }
            other => out.push(other),
        }
    }
    out.push('"');
    out
}

/// The text of several field errors, as the API server joins them: sorted by nothing, each said once.
fn joined(causes: &[Cause]) -> String {
    let mut seen: Vec<String> = Vec::with_capacity(causes.len());
    for cause in causes {
        let text = cause.to_string();
        if !seen.contains(&text) {
            seen.push(text);
        }
    }
    match seen.as_slice() {
        [] => "<nil>".to_owned(),
        [one] => one.clone(),
        many => format!("[{}]", many.join(", ")),
    }
}

impl Status {
    fn plain(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: None, retry_after: None }
    }

    fn about(code: u16, reason: &'static str, message: String, resource: &Resource, name: &str) -> Self {
        let mut details = Map::new();
        if !name.is_empty() {
            details.insert("name".into(), name.into());
        }
        if !resource.group.is_empty() {
            details.insert("group".into(), resource.group.clone().into());
        }
        details.insert("kind".into(), resource.plural.clone().into());
        Self { code, reason, message, details: Some(Value::Object(details)), retry_after: None }
    }

    /// The body to send.
    #[must_use]
    pub(crate) fn to_value(&self) -> Value {
        let mut value = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code,
        });
        if self.reason.is_empty()
            && let Some(map) = value.as_object_mut()
        {
            map.remove("reason");
        }
        if let Some(details) = &self.details {
            value["details"] = details.clone();
        }
        if let Some(seconds) = self.retry_after {
            value["details"]["retryAfterSeconds"] = seconds.into();
        }
        value
    }

    /// The body of a deletion that has finished.
    #[must_use]
    pub(crate) fn success(resource: &Resource, name: &str, uid: &str) -> Value {
        let mut details = json!({"name": name, "kind": resource.plural});
        if !resource.group.is_empty() {
            details["group"] = resource.group.clone().into();
        }
        if !uid.is_empty() {
            details["uid"] = uid.into();
        }
        json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details})
    }

    /// 404: no such object.
    #[must_use]
    pub(crate) fn not_found(resource: &Resource, name: &str) -> Self {
        let message = format!("{} {} not found", resource.qualified(), quoted(name));
        Self::about(404, "NotFound", message, resource, name)
    }

    /// 409: the name is taken.
    #[must_use]
    pub(crate) fn already_exists(resource: &Resource, name: &str) -> Self {
        let message = format!("{} {} already exists", resource.qualified(), quoted(name));
        Self::about(409, "AlreadyExists", message, resource, name)
    }

    /// 409: a generated name is taken; the client should try again.
    #[must_use]
    pub(crate) fn already_exists_generated(resource: &Resource, name: &str) -> Self {
        let message = format!(
            "{} {} already exists, the server was not able to generate a unique name for the object",
            resource.qualified(),
            quoted(name)
        );
        Self { retry_after: Some(1), ..Self::about(409, "AlreadyExists", message, resource, name) }
    }

    /// 409: the operation can't be done on the object as it is.
    #[must_use]
    pub(crate) fn conflict(resource: &Resource, name: &str, why: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {} {}: {why}", resource.qualified(), quoted(name));
        Self::about(409, "Conflict", message, resource, name)
    }

    /// 409: the resource version is not the newest.
    #[must_use]
    pub(crate) fn modified(resource: &Resource, name: &str) -> Self {
        Self::conflict(
            resource,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    /// 422: the object breaks the rules of its kind.
    #[must_use]
    pub(crate) fn invalid(resource: &Resource, name: &str, causes: Vec<Cause>) -> Self {
        Self::invalid_kind(&resource.group, &resource.kind, name, causes)
    }

    /// 422 for a kind that isn't a resource, such as `PatchOptions`.
    #[must_use]
    pub(crate) fn invalid_kind(group: &str, kind: &str, name: &str, causes: Vec<Cause>) -> Self {
        let qualified = if group.is_empty() { kind.to_owned() } else { format!("{kind}.{group}") };
        let message = format!("{qualified} {} is invalid: {}", quoted(name), joined(&causes));
        let mut details = Map::new();
        if !name.is_empty() {
            details.insert("name".into(), name.into());
        }
        if !group.is_empty() {
            details.insert("group".into(), group.into());
        }
        details.insert("kind".into(), kind.into());
        let list: Vec<Value> = causes
            .into_iter()
            .map(|cause| json!({"reason": cause.reason.as_str(), "message": cause.message, "field": cause.field}))
            .collect();
        if !list.is_empty() {
            details.insert("causes".into(), list.into());
        }
        Self { code: 422, reason: "Invalid", message, details: Some(Value::Object(details)), retry_after: None }
    }

    /// 400.
    #[must_use]
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::plain(400, "BadRequest", message)
    }

    /// 403 from admission: the object may not be made or changed like this.
    #[must_use]
    pub(crate) fn forbidden(resource: &Resource, name: &str, why: &str) -> Self {
        let message = if name.is_empty() {
            format!("{} is forbidden: {why}", resource.qualified())
        } else {
            format!("{} {} is forbidden: {why}", resource.qualified(), quoted(name))
        };
        Self::about(403, "Forbidden", message, resource, name)
    }

    /// 403 from authorization: the user may not do this at all. `resource` is `plural[/subresource]`.
    #[must_use]
    pub(crate) fn forbidden_user(
        user: &str,
        verb: &str,
        group: &str,
        resource: &str,
        name: &str,
        namespace: &str,
    ) -> Self {
        let qualified = if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") };
        let mut message = if name.is_empty() {
            format!("{qualified} is forbidden: ")
        } else {
            format!("{qualified} {} is forbidden: ", quoted(name))
        };
        let scope = if namespace.is_empty() {
            "at the cluster scope".to_owned()
        } else {
            format!("in the namespace {}", quoted(namespace))
        };
        message.extend([format!(
            "User {} cannot {verb} resource {} in API group {} {scope}",
            quoted(user),
            quoted(resource),
            quoted(group)
        )]);
        let mut details = Map::new();
        if !name.is_empty() {
            details.insert("name".into(), name.into());
        }
        if !group.is_empty() {
            details.insert("group".into(), group.into());
        }
        details.insert("kind".into(), resource.split('/').next().unwrap_or_default().into());
        Self { code: 403, reason: "Forbidden", message, details: Some(Value::Object(details)), retry_after: None }
    }

    /// 403 for a path that is no resource, such as `/metrics`.
    #[must_use]
    pub(crate) fn forbidden_path(user: &str, verb: &str, path: &str) -> Self {
        let message = format!("forbidden: User {} cannot {verb} path {}", quoted(user), quoted(path));
        Self { details: Some(json!({})), ..Self::plain(403, "Forbidden", message) }
    }

    /// 401.
    #[must_use]
    pub(crate) fn unauthorized() -> Self {
        Self::plain(401, "Unauthorized", "Unauthorized")
    }

    /// 404 for a path that leads nowhere.
    #[must_use]
    pub(crate) fn no_route() -> Self {
        Self {
            details: Some(json!({})),
            ..Self::plain(404, "NotFound", "the server could not find the requested resource")
        }
    }

    /// 405 for a method on a path that has others.
    #[must_use]
    pub(crate) fn method_not_allowed_here() -> Self {
        Self {
            details: Some(json!({})),
            ..Self::plain(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        }
    }

    /// 415: the body's content type isn't one of those accepted.
    #[must_use]
    pub(crate) fn unsupported_media_type(accepted: &[&str]) -> Self {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {}",
            accepted.join(", ")
        );
        Self::plain(415, "UnsupportedMediaType", message)
    }

    /// 406: none of the media types asked for can be made.
    #[must_use]
    pub(crate) fn not_acceptable(accepted: &[&str]) -> Self {
        let message = format!("only the following media types are accepted: {}", accepted.join(", "));
        Self::plain(406, "NotAcceptable", message)
    }

    /// 413.
    #[must_use]
    pub(crate) fn too_large(message: impl Into<String>) -> Self {
        Self { details: Some(json!({})), ..Self::plain(413, "RequestEntityTooLarge", message) }
    }

    /// 410: the revision or continue token is too old.
    #[must_use]
    pub(crate) fn expired(message: impl Into<String>) -> Self {
        Self::plain(410, "Expired", message)
    }

    /// 500.
    #[must_use]
    pub(crate) fn internal(message: impl fmt::Display) -> Self {
        let message = message.to_string();
        let details = json!({"causes": [{"message": message}]});
        Self {
            details: Some(details),
            ..Self::plain(500, "InternalError", format!("Internal error occurred: {message}"))
        }
    }

    /// 504.
    #[must_use]
    pub(crate) fn timeout(message: impl Into<String>) -> Self {
        Self::plain(504, "Timeout", message)
    }

    /// 422 without a word about why: what the real server says when a JSON patch doesn't apply.
    #[must_use]
    pub(crate) fn unprocessable() -> Self {
        Self {
            details: Some(json!({})),
            ..Self::plain(422, "Invalid", "the server rejected our request due to an error in our request")
        }
    }
}
