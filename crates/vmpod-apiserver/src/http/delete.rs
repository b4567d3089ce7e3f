//! Deleting objects.

use std::sync::Arc;

use axum::body::Body;
use http::{Response, StatusCode};
use serde_json::{Value, json};

use super::list::{Selection, list_bytes};
use super::{Call, read, respond, write};
use crate::deletion::{self, Deletion};
use crate::identity::{Identity, MASTERS};
use crate::kinds::{self, Resource};
use crate::namespaces;
use crate::server::{CRDS, Server, storage_name};
use crate::status::Status;
use crate::store::{Change, Key, Object};

/// `DeleteOptions`, with the query parameters merged in.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) given: Value,
    pub(crate) dry_run: bool,
    /// Only when the pod is on this node: who asks is its kubelet.
    pub(crate) on_node: Option<String>,
}

impl Options {
    /// Delete in the background, whatever the object's usual grace is.
    pub(crate) fn background() -> Self {
        Self { given: json!({ "propagationPolicy": "Background" }), dry_run: false, on_node: None }
    }

    /// With a precondition, so that only the very object that was looked at goes.
    pub(crate) fn with_uid(mut self, uid: &str) -> Self {
        self.given["preconditions"]["uid"] = uid.into();
        self
    }

    fn of(call: &Call, body: &[u8]) -> Result<Self, Status> {
        let mut options = if body.is_empty() { json!({}) } else { kinds::decode_options(body, write::format(call)?)? };
        let mut dry_run = call.query.dry_run()?;
        if let Some(seconds) = call.query.number("gracePeriodSeconds")? {
            options["gracePeriodSeconds"] = seconds.into();
        }
        if let Some(policy) = call.query.get("propagationPolicy") {
            options["propagationPolicy"] = policy.into();
        }
        if let Some(orphan) = call.query.maybe_flag("orphanDependents")? {
            options["orphanDependents"] = orphan.into();
        }
        dry_run |= options["dryRun"].as_array().is_some_and(|modes| modes.iter().any(|mode| mode == "All"));
        if let Some(policy) = options["propagationPolicy"].as_str()
            && !matches!(policy, "Background" | "Foreground" | "Orphan")
        {
            let why = crate::status::Cause::not_supported(
                "propagationPolicy",
                &policy.into(),
                &["Foreground", "Background", "Orphan", "nil"],
            );
            return Err(Status::invalid_kind("", "DeleteOptions", "", vec![why]));
        }
        Ok(Self { given: options, dry_run, on_node: None }.asked_by(&call.identity))
    }

    /// A kubelet deletes pods of its own node only.
    pub(super) fn asked_by(mut self, identity: &Identity) -> Self {
        self.on_node = identity.node_name().filter(|_| !identity.in_group(MASTERS)).map(str::to_owned);
        self
    }
}

/// What a deletion did.
pub(crate) enum Deleted {
    /// The object is gone; this was it last.
    Gone(Arc<Object>),
    /// The object waits for its finalizers or its grace period.
    Waiting(Arc<Object>),
    /// A dry run would leave this.
    Dry(Value, bool),
}

/// Deletes one object as a client would.
pub(crate) async fn delete_object(
    server: &Server,
    resource: &Resource,
    key: &Key,
    options: &Options,
) -> Result<Deleted, Status> {
    let now = jiff::Timestamp::now();
    if &*key.resource == "namespaces" && namespaces::is_protected(&key.name) {
        return Err(Status::forbidden(resource, &key.name, "this namespace may not be deleted"));
    }
    let mut gone = false;
    let written = write::commit(server, key, None, options.dry_run, |old, _| {
        let old = old.ok_or_else(|| Status::not_found(resource, &key.name))?;
        // The authorizer looked before the body was read: the pod may be another one by now.
        if let Some(node) = options.on_node.as_deref().filter(|_| &*key.resource == "pods")
            && old.digest()["spec"]["nodeName"] != node
        {
            let why = format!("node {node:?} can only delete pods with spec.nodeName set to itself");
            return Err(Status::forbidden(resource, &key.name, &why));
        }
        let before = respond::view(resource, old);
        gone = false;
        match deletion::plan(resource, &before, &options.given, now)? {
            Deletion::Remove(last) => {
                gone = true;
                Ok(Change::Delete(last))
            }
            Deletion::Mark(value) => Ok(Change::Put(value)),
            Deletion::Pending => Ok(Change::Keep),
        }
    })
    .await?;
    if gone && &*key.resource == CRDS && !options.dry_run {
        server.refresh_registry();
    }
    Ok(match written {
        write::Written::Stored(object) if gone => Deleted::Gone(object),
        write::Written::Stored(object) => Deleted::Waiting(object),
        write::Written::Dry(value) => Deleted::Dry(value, gone),
    })
}

/// `DELETE` of one object.
pub(super) async fn one(call: &Call, body: &[u8]) -> Result<Response<Body>, Status> {
    let key = read::key(call)?;
    let options = Options::of(call, body)?;
    let success = |uid: &str| respond::json_value(StatusCode::OK, &Status::success(&call.resource, &key.name, uid));
    let answers_object = deletion::answers_object(&call.resource);
    match delete_object(&call.server, &call.resource, &key, &options).await? {
        Deleted::Gone(object) if !answers_object => Ok(success(object.uid())),
        Deleted::Gone(object) | Deleted::Waiting(object) => respond::object(call, StatusCode::OK, &object),
        Deleted::Dry(value, true) if !answers_object => {
            Ok(success(value["metadata"]["uid"].as_str().unwrap_or_default()))
        }
        Deleted::Dry(value, _) => respond::value(call, StatusCode::OK, &value),
    }
}

/// `DELETE` of a collection: everything that the selectors name.
pub(super) async fn collection(call: &Call, body: &[u8]) -> Result<Response<Body>, Status> {
    let selection = Selection::of(call)?;
    let options = Options::of(call, body)?;
    let listed = call.server.store.list(&storage_name(&call.resource), call.target.namespace.as_deref());
    let chosen: Vec<&Arc<Object>> = listed.objects.iter().filter(|object| selection.matches(object)).collect();
    let deletions = chosen.iter().map(|object| {
        let options = options.clone().with_uid(object.uid());
        async move { delete_object(&call.server, &call.resource, object.key(), &options).await }
    });
    for result in futures::future::join_all(deletions).await {
        match result {
            // Somebody else deleted it meanwhile.
            Err(status) if status.code == 404 || status.code == 409 => {}
            Err(status) => return Err(status),
            Ok(_) => {}
        }
    }
    let meta = json!({ "resourceVersion": call.server.store.revision().to_string() });
    Ok(respond::json_bytes(StatusCode::OK, list_bytes(&call.shown, &meta, &chosen).freeze()))
}
