//! Reading one object.

use axum::body::Body;
use http::{Response, StatusCode};

use super::{Call, respond};
use crate::server::storage_name;
use crate::status::Status;
use crate::store::Key;

/// The key of the object that a call names.
pub(super) fn key(call: &Call) -> Result<Key, Status> {
    Ok(Key::new(&storage_name(&call.resource), call.target.namespace.as_deref(), call.name()?))
}

/// `GET` of one object.
pub(super) fn get(call: &Call) -> Result<Response<Body>, Status> {
    // A read at any revision is answered with the newest state, which is allowed unless it is in the future.
    let asked = call.query.get("resourceVersion").and_then(|text| text.parse::<u64>().ok()).unwrap_or_default();
    let newest = call.server.store.revision();
    if asked > newest {
        return Err(super::list::too_large(asked, newest));
    }
    let key = key(call)?;
    let object = call.server.store.get(&key).ok_or_else(|| Status::not_found(&call.resource, &key.name))?;
    respond::object(call, StatusCode::OK, &object)
}
