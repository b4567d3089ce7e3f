//! Subresources, and kinds that are answered but not stored.

use axum::body::Body;
use http::{Method, Request, Response, StatusCode};
use serde_json::{Value, json};

use super::{Call, DeleteOptions, delete_object, read, respond, reviews, write};
use crate::disruption;
use crate::kinds::{self, Context, FieldValidation};
use crate::metrics;
use crate::patch::{self, PatchKind};
use crate::proxy;
use crate::scale;
use crate::status::Status;
use crate::store::{Change, Key};

/// A call of `…/NAME/SUBRESOURCE`.
pub(super) async fn subresource(call: Call, request: Request<Body>) -> Result<Response<Body>, Status> {
    let name = call.target.subresource.clone().unwrap_or_default();
    if call.resource.subresource(&name).is_none() || (!call.target.rest.is_empty() && name != "proxy") {
        return Err(Status::no_route());
    }
    match (call.resource.plural.as_str(), name.as_str()) {
        ("pods", "log" | "exec" | "attach" | "portforward") if call.resource.group.is_empty() => {
            proxy::pod(&call.server, &call.target, &call.query, request).await
        }
        ("nodes", "proxy") if call.resource.group.is_empty() => proxy::node(&call.server, &call.target, request).await,
        ("pods", "binding") => bind(&call, call.name()?, request).await,
        ("pods", "eviction") => evict(&call, request).await,
        ("serviceaccounts", "token") => {
            only(&call, &Method::POST)?;
            let body = call.body(request).await?;
            reviews::token_request(&call, &decode_body(&call, "token", &body)?)
        }
        (_, "scale") => scale_of(&call, request).await,
        (_, sub) => match call.method {
            Method::GET | Method::HEAD => read::get(&call),
            Method::PUT => write::update(&call, Some(sub), &call.body(request).await?).await,
            Method::PATCH => write::patch(&call, Some(sub), &call.body(request).await?).await,
            _ => Err(Status::method_not_allowed_here()),
        },
    }
}

/// A call of a kind that isn't stored.
pub(super) async fn virtual_kind(call: Call, request: Request<Body>) -> Result<Response<Body>, Status> {
    if call.resource.group == metrics::GROUP {
        return metrics::serve(&call).await;
    }
    if call.method != Method::POST || call.target.name.is_some() {
        return Err(Status::method_not_allowed_here());
    }
    if call.resource.plural == "bindings" {
        return bind(&call, "", request).await;
    }
    let body = call.body(request).await?;
    let decoded = kinds::decode(&call.resource, &body, write::format(&call)?, write::validation(&call)?)?;
    let manager = call.manager();
    let value = kinds::create(&call.resource, decoded.value, &context(&call, &manager))?;
    reviews::review(&call, value)
}

fn only(call: &Call, method: &Method) -> Result<(), Status> {
    if call.method == *method { Ok(()) } else { Err(Status::method_not_allowed_here()) }
}

/// The body of a subresource that has a kind of its own.
fn decode_body(call: &Call, subresource: &str, body: &[u8]) -> Result<Value, Status> {
    let kind = call.server.registry().body(&call.resource, subresource).ok_or_else(Status::no_route)?;
    Ok(kinds::decode(&kind, body, write::format(call)?, write::validation(call)?)?.value)
}

fn success() -> Response<Body> {
    respond::json_value(
        StatusCode::CREATED,
        &json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201 }),
    )
}

/// Assigns a pod to a node. `pod` is empty for `POST …/bindings`, where the body names it.
async fn bind(call: &Call, pod: &str, request: Request<Body>) -> Result<Response<Body>, Status> {
    only(call, &Method::POST)?;
    let body = call.body(request).await?;
    let registry = call.server.registry();
    let pods = registry.resource("", "v1", "pods").ok_or_else(Status::no_route)?;
    let kind = registry.body(&pods, "binding").ok_or_else(Status::no_route)?;
    let binding = kinds::decode(&kind, &body, write::format(call)?, write::validation(call)?)?.value;
    let pod = if pod.is_empty() { binding["metadata"]["name"].as_str().unwrap_or_default() } else { pod };
    let key = Key::new("pods", call.target.namespace.as_deref(), pod);
    let manager = call.manager();
    let context = Context {
        namespace: call.target.namespace.as_deref(),
        name: Some(pod),
        user: &call.identity.user,
        groups: &call.identity.groups,
        ..Context::plain(&manager, call.now)
    };
    write::commit(&call.server, &key, None, call.query.dry_run()?, |old, _| {
        let old = old.ok_or_else(|| Status::not_found(&pods, pod))?;
        kinds::bind(&pods, &old.value(), &binding, &context).map(Change::Put)
    })
    .await?;
    Ok(success())
}

/// Evicts a pod: a deletion that its disruption budget has to allow.
async fn evict(call: &Call, request: Request<Body>) -> Result<Response<Body>, Status> {
    only(call, &Method::POST)?;
    let body = call.body(request).await?;
    let eviction = decode_body(call, "eviction", &body)?;
    let mut options = DeleteOptions::background().asked_by(&call.identity);
    if let Some(asked) = eviction["deleteOptions"].as_object() {
        options.given = Value::Object(asked.clone());
    }
    let modes = options.given["dryRun"].as_array();
    options.dry_run = call.query.dry_run()? || modes.is_some_and(|modes| modes.iter().any(|mode| mode == "All"));
    let key = read::key(call)?;
    let pod = call.server.store.get(&key).ok_or_else(|| Status::not_found(&call.resource, &key.name))?;
    disruption::admit(&call.server, &key.namespace, &pod.value(), options.dry_run).await?;
    // The budget was asked about this very pod.
    if options.given["preconditions"]["uid"].is_null() {
        options = options.with_uid(pod.uid());
    }
    delete_object(&call.server, &call.resource, &key, &options).await?;
    Ok(success())
}

/// Reads or sets the number of replicas of a kind that has a scale.
async fn scale_of(call: &Call, request: Request<Body>) -> Result<Response<Body>, Status> {
    let missing = || Status::internal("the object has no scale");
    let shown = |value: &Value| scale::get(&call.resource, value).ok_or_else(missing);
    let kind = call.server.registry().body(&call.resource, "scale").ok_or_else(Status::no_route)?;
    let value = match call.method {
        Method::GET | Method::HEAD => {
            let key = read::key(call)?;
            let object = call.server.store.get(&key).ok_or_else(|| Status::not_found(&call.resource, &key.name))?;
            respond::view(&call.resource, &object)
        }
        Method::PUT => {
            let body = call.body(request).await?;
            let wanted = decode_body(call, "scale", &body)?;
            let change = |old: &Value| Ok((scale::set(&call.resource, old, &wanted)?, false));
            write::replace(call, None, change).await?.value(&call.resource)
        }
        Method::PATCH => {
            let body = call.body(request).await?;
            let patch_kind = PatchKind::of(call.header(&http::header::CONTENT_TYPE))?;
            let manager = call.manager();
            let change = |old: &Value| {
                let context = context(call, &manager);
                let before = shown(old)?;
                let validation = FieldValidation::Ignore;
                let patched = patch::apply(patch_kind, &kind, None, Some(&before), &body, validation, false, &context)?;
                Ok((scale::set(&call.resource, old, &patched.value)?, false))
            };
            write::replace(call, None, change).await?.value(&call.resource)
        }
        _ => return Err(Status::method_not_allowed_here()),
    };
    respond::value(call, StatusCode::OK, &shown(&value)?)
}

fn context<'a>(call: &'a Call, manager: &'a str) -> Context<'a> {
    Context {
        namespace: call.target.namespace.as_deref(),
        name: call.target.name.as_deref(),
        user: &call.identity.user,
        groups: &call.identity.groups,
        ..Context::plain(manager, call.now)
    }
}
