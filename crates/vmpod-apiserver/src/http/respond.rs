//! Answers.

use axum::body::Body;
use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER, WARNING};
use http::{HeaderValue, Response, StatusCode};
use serde_json::{Value, json};

use super::Call;
use super::accept::Shape;
use crate::events;
use crate::kinds::{self, Resource};
use crate::status::Status;
use crate::store::Object;
use crate::table::{self, IncludeObject};

/// An answer with a body that is JSON already.
pub(crate) fn json_bytes(code: StatusCode, body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(body.into());
    *response.status_mut() = code;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}

/// An answer with this value.
pub(crate) fn json_value(code: StatusCode, value: &Value) -> Response<Body> {
    json_bytes(code, serialise(value))
}

pub(crate) fn serialise(value: &Value) -> Bytes {
    // Maps with text keys always serialise.
    serde_json::to_vec(value).unwrap_or_default().into()
}

/// An answer in plain text.
pub(crate) fn text(code: StatusCode, body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(body.into());
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// What an unserved path answers: not a Status, as the real server does.
pub(crate) fn not_found_page() -> Response<Body> {
    text(StatusCode::NOT_FOUND, "404 page not found\n")
}

/// A failure.
pub(crate) fn failure(status: &Status) -> Response<Body> {
    let code = StatusCode::from_u16(status.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = json_value(code, &status.to_value());
    if let Some(seconds) = status.retry_after {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// Adds warnings for people to an answer.
pub(super) fn warn(response: &mut Response<Body>, warnings: &[String]) {
    for warning in warnings {
        if let Ok(value) = HeaderValue::from_str(&kinds::warning_header(warning)) {
            response.headers_mut().append(WARNING, value);
        }
    }
}

/// Whether the stored form differs from the one of this kind.
pub(super) fn needs_view(resource: &Resource) -> bool {
    resource.is_custom() || resource.group == events::GROUP
}

/// The object as this kind shows it.
pub(super) fn view(resource: &Resource, object: &Object) -> Value {
    let mut value = object.value();
    if resource.group == events::GROUP {
        events::to_new(&mut value);
    } else if resource.is_custom() {
        kinds::present(resource, &mut value);
    }
    value
}

/// The same, serialised.
pub(super) fn view_bytes(resource: &Resource, object: &Object) -> Bytes {
    if needs_view(resource) { serialise(&view(resource, object)) } else { object.bytes().clone() }
}

/// One object in the shape asked for.
pub(super) fn object(call: &Call, code: StatusCode, object: &Object) -> Result<Response<Body>, Status> {
    match call.shape()? {
        Shape::Object => Ok(json_bytes(code, view_bytes(&call.shown, object))),
        _ => value(call, code, &view(&call.resource, object)),
    }
}

/// One object that may not be stored (a dry run's) in the shape asked for.
pub(super) fn value(call: &Call, code: StatusCode, value: &Value) -> Result<Response<Body>, Status> {
    let shaped = match call.shape()? {
        Shape::Object if call.shown.group == events::GROUP => {
            let mut shown = value.clone();
            events::to_new(&mut shown);
            return Ok(json_value(code, &shown));
        }
        Shape::Object => return Ok(json_value(code, value)),
        Shape::Partial => table::partial(value),
        Shape::Table => {
            let include = IncludeObject::parse(call.query.get("includeObject"))?;
            let meta = json!({ "resourceVersion": value["metadata"]["resourceVersion"] });
            table::render(&call.resource, &[value], include, call.now, meta, true)
        }
    };
    Ok(json_value(code, &shaped))
}
