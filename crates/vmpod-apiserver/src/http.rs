//! The HTTP side: one handler that finds out who calls, what for, and whether they may.

pub(crate) mod accept;
mod body;
mod delete;
pub(crate) mod encode;
mod list;
pub(crate) mod path;
mod protobuf;
pub(crate) mod query;
mod read;
pub(crate) mod respond;
mod reviews;
mod special;
mod watch;
pub(crate) mod write;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, USER_AGENT};
use http::{HeaderMap, Method, Request, Response};
use jiff::Timestamp;

use crate::auth::authorize::{self, Attributes};
use crate::discovery;
use crate::events;
use crate::identity::Identity;
use crate::kinds::Resource;
use crate::server::Server;
use crate::status::Status;

use accept::Shape;
use path::{Route, Target};
use query::Query;

#[cfg(any(fuzzing, test))]
pub(crate) use protobuf::to_json as protobuf_to_json;

pub(crate) use delete::{Options as DeleteOptions, delete_object};

/// The largest body of a request.
pub(crate) const BODY_LIMIT: usize = 3 << 20;
/// The longest manager name that is recorded.
const MANAGER_LIMIT: usize = 128;

/// One call of a resource.
pub(crate) struct Call {
    pub(crate) server: Arc<Server>,
    pub(crate) identity: Identity,
    pub(crate) method: Method,
    pub(crate) headers: HeaderMap,
    pub(crate) query: Query,
    pub(crate) target: Target,
    pub(crate) resource: Arc<Resource>,
    /// The kind as the client sees it: another one for events, which are served in two groups.
    pub(crate) shown: Arc<Resource>,
    pub(crate) now: Timestamp,
}

impl Call {
    /// The name in the path; collections have none.
    fn name(&self) -> Result<&str, Status> {
        self.target.name.as_deref().ok_or_else(Status::method_not_allowed_here)
    }

    fn is_protobuf(&self) -> bool {
        let content_type = self.header(&CONTENT_TYPE).unwrap_or_default();
        content_type.split(';').next().is_some_and(|ty| ty.trim() == protobuf::MEDIA_TYPE)
    }

    /// The body, in terms of the kind that is stored.
    async fn body(&self, request: Request<Body>) -> Result<Bytes, Status> {
        let mut bytes = body::read(request).await?;
        if self.is_protobuf() && !bytes.is_empty() {
            bytes = respond::serialise(&protobuf::to_json(&bytes)?);
        }
        if self.shown.group != events::GROUP {
            return Ok(bytes);
        }
        match serde_json::from_slice(&bytes) {
            Ok(mut value) => {
                events::to_core(&mut value);
                Ok(respond::serialise(&value))
            }
            // Something else will say what is wrong with it.
            Err(_) => Ok(bytes),
        }
    }

    fn shape(&self) -> Result<Shape, Status> {
        accept::negotiate(&self.headers)
    }

    /// Who owns the fields that this call writes.
    pub(crate) fn manager(&self) -> String {
        if let Some(manager) = self.query.get("fieldManager") {
            return manager.to_owned();
        }
        let agent = self.headers.get(USER_AGENT).and_then(|agent| agent.to_str().ok()).unwrap_or_default();
        let manager: String = agent.split('/').next().unwrap_or_default().trim().chars().take(MANAGER_LIMIT).collect();
        if manager.is_empty() { "unknown".into() } else { manager }
    }

    fn header(&self, name: &http::HeaderName) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

/// The whole API as a router. Every path is handled by one function, because what paths exist
/// depends on the custom resource definitions.
pub(crate) fn router(server: Arc<Server>) -> Router {
    Router::new().fallback(handle).with_state(server)
}

async fn handle(State(server): State<Arc<Server>>, request: Request<Body>) -> Response<Body> {
    let now = Timestamp::now();
    match route(server, request, now).await {
        Ok(response) => response,
        Err(status) => respond::failure(&status),
    }
}

/// Who is calling: a bearer token first, then what the connection proved, else nobody.
fn caller(server: &Server, request: &Request<Body>, now: Timestamp) -> Result<Identity, Status> {
    let connection = request.extensions().get::<Identity>();
    let token = request
        .headers()
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, token)| token.trim());
    let identity = match (connection, token) {
        (Some(identity), _) => identity.clone(),
        (None, Some(token)) => reviews::authenticate(server, token, now).ok_or_else(Status::unauthorized)?.identity,
        (None, None) => Identity::anonymous(),
    };
    impersonated(server, identity, request.headers())
}

/// Who may impersonate acts as somebody else (`kubectl --as`).
fn impersonated(server: &Server, identity: Identity, headers: &HeaderMap) -> Result<Identity, Status> {
    let Some(other) = wanted_identity(headers)? else { return Ok(identity) };
    let may = |resource: &str, namespace: &str, name: &str| {
        let ask = Attributes { verb: "impersonate", resource, namespace, name, ..Attributes::default() };
        if authorize::decide(server, &identity, &ask) == authorize::Decision::Allow {
            return Ok(());
        }
        Err(Status::forbidden_user(&identity.user, "impersonate", "", resource, name, namespace))
    };
    match other.service_account() {
        Some((namespace, name)) => may("serviceaccounts", namespace, name)?,
        None => may("users", "", &other.user)?,
    }
    for value in headers.get_all("impersonate-group") {
        may("groups", "", value.to_str().unwrap_or_default())?;
    }
    Ok(other)
}

/// Who the headers say that the caller wants to be.
fn wanted_identity(headers: &HeaderMap) -> Result<Option<Identity>, Status> {
    let Some(user) = headers.get("impersonate-user") else {
        // Whoever asks to be less must not be answered as who they are.
        let other = headers.keys().find(|name| name.as_str().starts_with("impersonate-"));
        return other.map_or(Ok(None), |name| {
            Err(Status::bad_request(format!("requested impersonation by {name} without impersonating a user")))
        });
    };
    let text = |value: &http::HeaderValue| {
        value.to_str().map(str::to_owned).map_err(|_| Status::bad_request("an impersonation header is not text"))
    };
    let user = text(user)?;
    let mut groups = headers.get_all("impersonate-group").iter().map(text).collect::<Result<Vec<_>, _>>()?;
    let other = Identity::new(user, groups.clone());
    if let (true, Some((namespace, _))) = (groups.is_empty(), other.service_account()) {
        groups = vec!["system:serviceaccounts".into(), format!("system:serviceaccounts:{namespace}")];
        return Ok(Some(Identity::new(other.user.clone(), groups)));
    }
    Ok(Some(other))
}

async fn route(server: Arc<Server>, request: Request<Body>, now: Timestamp) -> Result<Response<Body>, Status> {
    let identity = caller(&server, &request, now)?;
    let path = request.uri().path().to_owned();
    let target = match path::parse(&path) {
        None => return Err(Status::bad_request("the path is not valid UTF-8")),
        Some(Route::Other) => {
            authorize::path(&server, &identity, request.method(), &path)?;
            return discovery::serve(&server, request.method(), request.headers(), &path);
        }
        Some(Route::Resource(target)) => target,
    };
    let Some((resource, shown)) = resource_of(&server, &target) else {
        authorize::path(&server, &identity, request.method(), &path)?;
        return Ok(respond::not_found_page());
    };
    let query = Query::parse(request.uri().query());
    let (parts, body) = request.into_parts();
    let call = Call {
        server,
        identity,
        method: parts.method.clone(),
        headers: parts.headers.clone(),
        query,
        target,
        resource,
        shown,
        now,
    };
    authorize::resource(&call.server, &call.identity, &attributes(&call)?)?;
    if call.resource.namespaced && call.target.namespace.is_none() && call.method != Method::GET && call.resource.stored
    {
        return Err(Status::method_not_allowed_here());
    }
    if !call.resource.namespaced && call.target.namespace.is_some() {
        return Ok(respond::not_found_page());
    }
    let request = Request::from_parts(parts, body);
    serve(call, request).await
}

/// The kind that is stored, and the one that is shown.
fn resource_of(server: &Server, target: &Target) -> Option<(Arc<Resource>, Arc<Resource>)> {
    let registry = server.registry();
    if (target.group.as_str(), target.version.as_str(), target.plural.as_str()) == (events::GROUP, "v1", "events") {
        let core = registry.resource("", "v1", "events")?;
        let mut shown = (*core).clone();
        shown.group = events::GROUP.into();
        return Some((core, Arc::new(shown)));
    }
    let resource = registry.resource(&target.group, &target.version, &target.plural)?;
    Some((resource.clone(), resource))
}

/// What is asked, in the words of authorization.
fn attributes(call: &Call) -> Result<Attributes<'_>, Status> {
    let collection = call.target.name.is_none();
    let verb = match call.method {
        Method::GET | Method::HEAD if collection && call.query.flag("watch")? => "watch",
        Method::GET | Method::HEAD if collection => "list",
        Method::GET | Method::HEAD => "get",
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE if collection => "deletecollection",
        Method::DELETE => "delete",
        _ => return Err(Status::method_not_allowed_here()),
    };
    Ok(Attributes {
        verb,
        group: &call.target.group,
        resource: &call.target.plural,
        subresource: call.target.subresource.as_deref().unwrap_or_default(),
        namespace: call.target.namespace.as_deref().unwrap_or_default(),
        name: call.target.name.as_deref().unwrap_or_default(),
        field_selector: call.query.get("fieldSelector").unwrap_or_default(),
    })
}

async fn serve(call: Call, request: Request<Body>) -> Result<Response<Body>, Status> {
    if call.target.subresource.is_some() {
        return special::subresource(call, request).await;
    }
    if !call.resource.stored {
        return special::virtual_kind(call, request).await;
    }
    let named = call.target.name.is_some();
    match (call.method.clone(), named) {
        (Method::GET | Method::HEAD, true) => read::get(&call),
        (Method::GET | Method::HEAD, false) if call.query.flag("watch")? => watch::start(&call),
        (Method::GET | Method::HEAD, false) => list::list(&call),
        (Method::POST, false) => write::create(&call, &call.body(request).await?).await,
        (Method::PUT, true) => write::update(&call, None, &call.body(request).await?).await,
        (Method::PATCH, true) => write::patch(&call, None, &call.body(request).await?).await,
        (Method::DELETE, true) => delete::one(&call, &call.body(request).await?).await,
        (Method::DELETE, false) => delete::collection(&call, &call.body(request).await?).await,
        _ => Err(Status::method_not_allowed_here()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impersonation_needs_a_user() {
        let asked = |names: &[(&'static str, &'static str)]| {
            let pairs = names
                .iter()
                .map(|(name, value)| (http::HeaderName::from_static(name), http::HeaderValue::from_static(value)));
            wanted_identity(&pairs.collect())
        };
        assert_eq!(asked(&[]).unwrap(), None);
        let other = asked(&[("impersonate-user", "u"), ("impersonate-group", "g")]).unwrap();
        assert_eq!(other, Some(Identity::new("u", ["g"])));
        let account = asked(&[("impersonate-user", "system:serviceaccount:t:sa")]).unwrap().unwrap();
        assert!(account.in_group("system:serviceaccounts:t"));
        for alone in ["impersonate-group", "impersonate-uid", "impersonate-extra-scopes"] {
            assert_eq!(asked(&[(alone, "x")]).unwrap_err().code, 400, "{alone}");
        }
    }
}
