//! Lists: selectors, pages, revisions.

use std::sync::Arc;

use axum::body::Body;
use base64::Engine as _;
use base64::alphabet;
use base64::engine::general_purpose::{GeneralPurpose, NO_PAD, URL_SAFE_NO_PAD};
use bytes::{BufMut as _, BytesMut};
use http::{Response, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::accept::Shape;
use super::{Call, encode, respond};
use crate::kinds::Resource;
use crate::selector::{FieldSelector, LabelSelector};
use crate::server::storage_name;
use crate::status::{Cause, Status};
use crate::store::{Expired, Listed, Object};
use crate::table::{self, IncludeObject};

/// Which objects a call is about.
pub(super) struct Selection {
    labels: Option<LabelSelector>,
    fields: Option<FieldSelector>,
    /// Whether the fields can be told from an object's digest.
    digested: bool,
}

impl Selection {
    pub(super) fn of(call: &Call) -> Result<Self, Status> {
        let labels = call.query.get("labelSelector").map(LabelSelector::parse).transpose()?;
        let fields =
            call.query.get("fieldSelector").map(|text| FieldSelector::parse(&call.resource, text)).transpose()?;
        let text = call.query.get("fieldSelector").unwrap_or_default();
        let digested = !call.resource.is_custom() || text.split(',').all(|term| term.trim().starts_with("metadata."));
        Ok(Self { labels, fields, digested })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.labels.is_none() && self.fields.is_none()
    }

    pub(super) fn matches(&self, object: &Object) -> bool {
        if !self.labels.as_ref().is_none_or(|labels| labels.matches(object.digest())) {
            return false;
        }
        match &self.fields {
            None => true,
            Some(fields) if self.digested => fields.matches(object.digest()),
            Some(fields) => fields.matches(&object.value()),
        }
    }
}

/// Go ignores bits left over at the end.
const LENIENT: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, NO_PAD.with_decode_allow_trailing_bits(true));

/// Where the next page begins; the same token as the real server's.
#[derive(Debug, Serialize, Deserialize)]
struct Continue {
    v: String,
    rv: u64,
    start: String,
}

fn invalid_continue(why: &str) -> Status {
    Status::bad_request(format!("invalid continue token: continue key is not valid: {why}"))
}

fn go_quoted(byte: u8) -> String {
    match byte {
        b'\'' => "'\\''".into(),
        b'\\' => "'\\\\'".into(),
        0x20..=0x7e => format!("'{}'", char::from(byte)),
        0xa1..=0xff if byte != 0xad => format!("'{}'", char::from(byte)),
        _ => format!("'\\u{byte:04x}'"),
    }
}

impl Continue {
    fn parse(token: &str) -> Result<Self, Status> {
        let bytes = LENIENT.decode(token.trim_end_matches('=')).map_err(|error| match error {
            base64::DecodeError::InvalidByte(at, _) | base64::DecodeError::InvalidLastSymbol(at, _) => {
                invalid_continue(&format!("illegal base64 data at input byte {at}"))
            }
            _ => invalid_continue(&format!("illegal base64 data at input byte {}", token.len())),
        })?;
        let parsed: Self = serde_json::from_slice(&bytes).map_err(|error| match bytes.first() {
            Some(first) if *first != b'{' => {
                invalid_continue(&format!("invalid character {} looking for beginning of value", go_quoted(*first)))
            }
            Some(_) => invalid_continue(&error.to_string()),
            None => invalid_continue("unexpected end of JSON input"),
        })?;
        if parsed.v != "meta.k8s.io/v1" {
            return Err(invalid_continue(&format!("server does not recognize this encoded version {:?}", parsed.v)));
        }
        if !parsed.start.starts_with('/') {
            return Err(invalid_continue("it has no start"));
        }
        Ok(parsed)
    }

    fn token(revision: u64, start: String) -> String {
        let next = Self { v: "meta.k8s.io/v1".into(), rv: revision, start };
        URL_SAFE_NO_PAD.encode(serde_json::to_vec(&next).unwrap_or_default())
    }
}

/// The place of an object in its list, as a continue token names it.
fn place(object: &Object, whole_cluster: bool) -> String {
    let key = object.key();
    match key.namespace() {
        Some(namespace) if whole_cluster => format!("/{namespace}/{}\0", key.name),
        _ => format!("/{}\0", key.name),
    }
}

/// 504: a revision that isn't there yet.
pub(super) fn too_large(asked: u64, newest: u64) -> Status {
    Status {
        details: Some(json!({
            "causes": [{ "reason": "ResourceVersionTooLarge", "message": "Too large resource version" }],
            "retryAfterSeconds": 1,
        })),
        ..Status::timeout(format!("Timeout: Too large resource version: {asked}, current: {newest}"))
    }
}

pub(super) fn too_old(expired: Expired) -> Status {
    Status::expired(format!("too old resource version: {} ({})", expired.asked, expired.oldest))
}

fn invalid_options(field: &str, why: &str) -> Status {
    Status::invalid_kind("meta.k8s.io", "ListOptions", "", vec![Cause::forbidden(field, why)])
}

/// The revision that a list or watch asks for; 0 when it says 0, `None` when it says nothing.
pub(super) fn revision(call: &Call) -> Result<Option<u64>, Status> {
    call.query
        .get("resourceVersion")
        .map(|text| {
            text.parse().map_err(|_| {
                Status::invalid_kind(
                    "meta.k8s.io",
                    "ListOptions",
                    "",
                    vec![Cause::invalid("resourceVersion", &text.into(), "must be a whole number")],
                )
            })
        })
        .transpose()
}

/// `GET` of a collection.
pub(super) fn list(call: &Call) -> Result<Response<Body>, Status> {
    let selection = Selection::of(call)?;
    let shape = call.shape()?;
    let limit = usize::try_from(call.query.number("limit")?.unwrap_or_default()).unwrap_or_default();
    let token = call.query.get("continue").map(Continue::parse).transpose()?;
    let listed = listed(call, token.as_ref())?;
    let whole_cluster = call.resource.namespaced && call.target.namespace.is_none();
    let objects = listed.objects.iter().filter(|object| {
        // Tokens order objects by place, and so does the store.
        token.as_ref().is_none_or(|token| after(object, &token.start, whole_cluster)) && selection.matches(object)
    });
    let mut page: Vec<&Arc<Object>> = if limit == 0 { objects.collect() } else { objects.take(limit + 1).collect() };
    let mut meta = Map::new();
    meta.insert("resourceVersion".into(), listed.revision.to_string().into());
    if limit > 0 && page.len() > limit {
        page.truncate(limit);
        if let Some(last) = page.last() {
            let start = place(last, whole_cluster);
            if selection.is_empty() {
                let left = listed.objects.iter().filter(|object| after(object, &start, whole_cluster)).count();
                meta.insert("remainingItemCount".into(), left.into());
            }
            meta.insert("continue".into(), Continue::token(listed.revision, start).into());
        }
    }
    answer(call, shape, Value::Object(meta), &page)
}

/// Whether an object comes after the place where the last page ended.
fn after(object: &Object, start: &str, whole_cluster: bool) -> bool {
    let start = start.trim_start_matches('/').trim_end_matches('\0');
    let key = object.key();
    match (whole_cluster, start.split_once('/')) {
        (true, Some((namespace, name))) => (&*key.namespace, &*key.name) > (namespace, name),
        _ => &*key.name > start,
    }
}

fn listed(call: &Call, token: Option<&Continue>) -> Result<Listed, Status> {
    let store = &call.server.store;
    let storage = storage_name(&call.resource);
    let namespace = call.target.namespace.as_deref();
    let exact = |revision| store.list_at(&storage, namespace, revision);
    if let Some(token) = token {
        if call.query.get("resourceVersionMatch").is_some() {
            return Err(invalid_options(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden when continue is provided",
            ));
        }
        return exact(token.rv).map_err(|_| {
            Status::expired(
                "The provided continue parameter is too old to display a consistent list result. You can start a new list without \
                 the continue parameter, or use the continue token in this response to retrieve the remainder of the results. \
                 Continuing with the provided token results in an inconsistent list - objects that were created, modified, or \
                 deleted between the time the first chunk was returned and now may show up in the list.",
            )
        });
    }
    let asked = revision(call)?;
    let newest = store.revision();
    match (call.query.get("resourceVersionMatch"), asked) {
        (None | Some("NotOlderThan"), Some(asked)) if asked > newest => Err(too_large(asked, newest)),
        (None, _) | (Some("NotOlderThan"), Some(_)) => Ok(store.list(&storage, namespace)),
        (Some("Exact"), Some(0)) => Err(invalid_options(
            "resourceVersionMatch",
            "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"",
        )),
        (Some("Exact"), Some(asked)) if asked > newest => Err(too_large(asked, newest)),
        (Some("Exact"), Some(asked)) => exact(asked).map_err(too_old),
        (Some("Exact" | "NotOlderThan"), None) => Err(invalid_options(
            "resourceVersionMatch",
            "resourceVersionMatch is forbidden unless resourceVersion is provided",
        )),
        (Some(other), _) => Err(Status::invalid_kind(
            "meta.k8s.io",
            "ListOptions",
            "",
            vec![Cause::not_supported("resourceVersionMatch", &other.into(), &["Exact", "NotOlderThan", ""])],
        )),
    }
}

fn answer(call: &Call, shape: Shape, meta: Value, page: &[&Arc<Object>]) -> Result<Response<Body>, Status> {
    if shape == Shape::Object {
        return Ok(respond::json_bytes(StatusCode::OK, list_bytes(&call.shown, &meta, page).freeze()));
    }
    // One object at a time: many of them, parsed, take ten times the room of their bytes.
    if shape == Shape::Table {
        let include = IncludeObject::parse(call.query.get("includeObject"))?;
        let table = table::render(&call.resource, &[], include, call.now, meta, true);
        let row = table::rows(&call.resource, include, call.now);
        let rows = page.iter().map(|object| row(&respond::view(&call.resource, object)));
        return Ok(respond::json_bytes(StatusCode::OK, with_items(table, "rows", rows).freeze()));
    }
    let head = json!({ "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": meta });
    let items = page.iter().map(|object| table::partial(&respond::view(&call.resource, object)));
    Ok(respond::json_bytes(StatusCode::OK, with_items(head, "items", items).freeze()))
}

/// An object whose member `name` is a list, written item by item.
fn with_items(mut head: Value, name: &str, items: impl Iterator<Item = Value>) -> BytesMut {
    if let Some(map) = head.as_object_mut() {
        map.remove(name);
    }
    let mut out = BytesMut::new();
    out.extend_from_slice(respond::serialise(&head).strip_suffix(b"}").unwrap_or_default());
    out.extend_from_slice(format!(",\"{name}\":[").as_bytes());
    for (index, item) in items.enumerate() {
        if index > 0 {
            out.put_u8(b',');
        }
        out.extend_from_slice(&respond::serialise(&item));
    }
    out.extend_from_slice(b"]}");
    out
}

/// A typed list, put together from stored bytes.
pub(super) fn list_bytes(resource: &Resource, meta: &Value, page: &[&Arc<Object>]) -> BytesMut {
    let size: usize = page.iter().map(|object| object.bytes().len() + 1).sum();
    let mut out = BytesMut::with_capacity(size + 256);
    let head = json!({ "apiVersion": resource.api_version(), "kind": resource.list_kind, "metadata": meta });
    let head = respond::serialise(&head);
    out.extend_from_slice(head.strip_suffix(b"}").unwrap_or_default());
    out.extend_from_slice(b",\"items\":[");
    for (index, object) in page.iter().enumerate() {
        if index > 0 {
            out.put_u8(b',');
        }
        if resource.is_custom() {
            // Items of custom kinds keep their type.
            out.extend_from_slice(&respond::view_bytes(resource, object));
        } else if respond::needs_view(resource) {
            encode::put_item(&mut out, &respond::view_bytes(resource, object));
        } else {
            encode::put_item(&mut out, object.bytes());
        }
    }
    out.extend_from_slice(b"]}");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_real_servers_tokens_and_words_its_errors() {
        let token = Continue::parse("eyJ2IjoibWV0YS5rOHMuaW8vdjEiLCJydiI6MjkyLCJzdGFydCI6Ii9jbTFcdTAwMDAifQ").unwrap();
        assert_eq!((token.rv, token.start.as_str()), (292, "/cm1\0"));
        assert_eq!(
            Continue::token(292, "/cm1\0".into()),
            "eyJ2IjoibWV0YS5rOHMuaW8vdjEiLCJydiI6MjkyLCJzdGFydCI6Ii9jbTFcdTAwMDAifQ"
        );
        assert_eq!(
            Continue::parse("garbage").unwrap_err().message,
            "invalid continue token: continue key is not valid: invalid character '\\u0081' looking for beginning of value"
        );
        assert_eq!(Continue::parse("!").unwrap_err().code, 400);
        assert_eq!(Continue::parse("").unwrap_err().code, 400);
    }
}
