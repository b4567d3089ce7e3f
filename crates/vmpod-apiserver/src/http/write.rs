//! Creating and changing objects.

use std::sync::Arc;

use axum::body::Body;
use http::header::CONTENT_TYPE;
use http::{Response, StatusCode};
use rand::RngExt as _;
use serde_json::Value;

use super::{Call, read, respond};
use crate::auth::{node, policy};
use crate::kinds::{self, Context, FieldValidation, Format, PRIORITY_CLASSES, Resource};
use crate::namespaces;
use crate::patch::{self, PatchKind};
use crate::server::{CRDS, Server, storage_name};
use crate::status::Status;
use crate::store::{Change, Key, Object};
use crate::{crd, csr, deletion};

/// How often a generated name is made anew when it is taken.
const NAME_TRIES: usize = 8;
/// The letters of generated names: no vowels, so no words.
const SUFFIX_LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// A random suffix for generated names.
pub(crate) fn suffix() -> String {
    let mut random = rand::rng();
    (0..5).map(|_| char::from(SUFFIX_LETTERS[random.random_range(0..SUFFIX_LETTERS.len())])).collect()
}

/// What a write came to: a stored object, or (dry run, or nothing written) a value.
pub(super) enum Written {
    Stored(Arc<Object>),
    Dry(Value),
}

impl Written {
    pub(super) fn value(&self, resource: &Resource) -> Value {
        match self {
            Self::Stored(object) => respond::view(resource, object),
            Self::Dry(value) => value.clone(),
        }
    }

    fn respond(&self, call: &Call, code: StatusCode) -> Result<Response<Body>, Status> {
        match self {
            Self::Stored(object) => respond::object(call, code, object),
            Self::Dry(value) => respond::value(call, code, value),
        }
    }
}

/// Runs a change against the store, or only computes it when this is a dry run.
pub(super) async fn commit(
    server: &Server,
    key: &Key,
    dependency: Option<&Key>,
    dry_run: bool,
    mut change: impl FnMut(Option<&Arc<Object>>, Option<&Arc<Object>>) -> Result<Change, Status>,
) -> Result<Written, Status> {
    if dry_run {
        let base = server.store.get(key);
        let other = dependency.and_then(|key| server.store.get(key));
        return match change(base.as_ref(), other.as_ref())? {
            Change::Put(value) | Change::Delete(value) => Ok(Written::Dry(value)),
            Change::Keep => base.map(Written::Stored).ok_or_else(|| Status::internal("nothing was kept")),
        };
    }
    server.store.mutate(key, dependency, change).await.map(|outcome| Written::Stored(outcome.object))
}

/// The parts of a [`Context`] that it borrows.
struct Given {
    uid: String,
    suffix: String,
    manager: String,
    account: Option<Value>,
    class: Option<Value>,
}

impl Given {
    fn new(call: &Call) -> Self {
        Self {
            uid: uuid::Uuid::new_v4().to_string(),
            suffix: suffix(),
            manager: call.manager(),
            account: None,
            class: None,
        }
    }

    fn context<'a>(&'a self, call: &'a Call, apply: bool) -> Context<'a> {
        Context {
            now: call.now,
            uid: &self.uid,
            suffix: &self.suffix,
            manager: &self.manager,
            namespace: call.target.namespace.as_deref(),
            name: call.target.name.as_deref(),
            service_account: self.account.as_ref(),
            priority_class: self.class.as_ref(),
            user: &call.identity.user,
            groups: &call.identity.groups,
            apply,
            patch: call.method == http::Method::PATCH,
        }
    }

    /// Pods are admitted with their service account and their priority class.
    fn look_up(&mut self, call: &Call, value: &Value) -> Result<(), Status> {
        if storage_name(&call.resource) != "pods" {
            return Ok(());
        }
        let class = value["spec"]["priorityClassName"].as_str().filter(|class| !class.is_empty());
        self.class = match class {
            Some(class) => call.server.store.get(&Key::new(PRIORITY_CLASSES, None, class)).map(|class| class.value()),
            None => default_class(&call.server),
        };
        self.find_account(call, value)
    }

    fn find_account(&mut self, call: &Call, value: &Value) -> Result<(), Status> {
        let namespace = call.target.namespace.as_deref().unwrap_or_default();
        let name = kinds::pod_service_account(value);
        match call.server.store.get(&Key::new("serviceaccounts", Some(namespace), name)) {
            Some(account) => self.account = Some(account.value()),
            // Missing namespaces have their own error.
            None if call.server.store.get(&Key::new("namespaces", None, namespace)).is_none() => {}
            None => {
                let pod = value["metadata"]["name"].as_str().unwrap_or_default();
                let why =
                    format!("error looking up service account {namespace}/{name}: serviceaccount {name:?} not found");
                return Err(Status::forbidden(&call.resource, pod, &why));
            }
        }
        Ok(())
    }
}

/// The class of pods that name none: of several defaults, the one with the least value.
fn default_class(server: &Server) -> Option<Value> {
    let classes = server.store.list(PRIORITY_CLASSES, None).objects;
    let defaults = classes.iter().map(|class| class.value()).filter(|class| class["globalDefault"] == true);
    defaults.min_by_key(|class| class["value"].as_i64())
}

/// What the caller may not write, though he may write the kind.
fn admit(call: &Call, subresource: Option<&str>, old: Option<&Value>, new: &Value) -> Result<(), Status> {
    node::admit(&call.server, &call.identity, &call.resource, subresource, old, new)?;
    policy::admit(&call.server, &call.identity, &call.resource, old, new)?;
    csr::admit(&call.server, &call.identity, &call.resource, subresource, old, new)
}

/// Whether a namespace takes new objects.
fn admit_namespace(call: &Call, name: &str, namespace: Option<&Arc<Object>>) -> Result<(), Status> {
    let Some(wanted) = call.target.namespace.as_deref().filter(|_| call.resource.namespaced) else { return Ok(()) };
    match namespace {
        None => Err(namespaces::not_found(&call.server, wanted)),
        Some(found) if found.is_deleting() => Err(namespaces::terminating(&call.resource, name, wanted)),
        Some(_) => Ok(()),
    }
}

/// Whether the definition of a custom kind still takes new objects.
fn admit_kind(call: &Call) -> Result<(), Status> {
    let definition = || call.server.store.get(&Key::new(CRDS, None, &storage_name(&call.resource)));
    if call.resource.is_custom() && definition().is_some_and(|found| found.is_deleting()) {
        let message = "create not allowed while custom resource definition is terminating".into();
        return Err(Status { message, ..Status::method_not_allowed_here() });
    }
    Ok(())
}

pub(super) fn namespace_key(call: &Call) -> Option<Key> {
    call.target.namespace.as_deref().filter(|_| call.resource.namespaced).map(|name| Key::new("namespaces", None, name))
}

pub(super) fn validation(call: &Call) -> Result<FieldValidation, Status> {
    FieldValidation::parse(call.query.get("fieldValidation"))
}

pub(super) fn format(call: &Call) -> Result<Format, Status> {
    if call.is_protobuf() {
        // The body was translated.
        return Ok(Format::Json);
    }
    Format::of(call.header(&CONTENT_TYPE))
}

/// `POST` to a collection.
pub(super) async fn create(call: &Call, body: &[u8]) -> Result<Response<Body>, Status> {
    let decoded = kinds::decode(&call.resource, body, format(call)?, validation(call)?)?;
    let written = create_value(call, decoded.value, false).await?;
    let mut response = written.respond(call, StatusCode::CREATED)?;
    respond::warn(&mut response, &decoded.warnings);
    Ok(response)
}

async fn create_value(call: &Call, value: Value, apply: bool) -> Result<Written, Status> {
    let dry_run = call.query.dry_run()?;
    let mut given = Given::new(call);
    given.look_up(call, &value)?;
    let generated = value["metadata"]["name"].as_str().unwrap_or_default().is_empty() && call.target.name.is_none();
    let dependency = namespace_key(call);
    // Only a generated name is tried again.
    let mut again = generated.then(|| value.clone());
    let mut source = Some(value);
    for attempt in 1.. {
        let Some(value) = source.take().or_else(|| if attempt < NAME_TRIES { again.clone() } else { again.take() })
        else {
            break;
        };
        let prepared = kinds::create(&call.resource, value, &given.context(call, apply))?;
        admit(call, None, None, &prepared)?;
        let name = prepared["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let key = Key::new(&storage_name(&call.resource), call.target.namespace.as_deref(), &name);
        let mut taken = false;
        let result = commit(&call.server, &key, dependency.as_ref(), dry_run, |old, namespace| {
            admit_namespace(call, &name, namespace)?;
            admit_kind(call)?;
            if old.is_some() {
                taken = true;
                return Err(if generated {
                    Status::already_exists_generated(&call.resource, &name)
                } else {
                    Status::already_exists(&call.resource, &name)
                });
            }
            Ok(Change::Put(prepared.clone()))
        })
        .await;
        if taken && generated && attempt < NAME_TRIES {
            given.suffix = suffix();
            continue;
        }
        let written = result?;
        if !dry_run {
            created(&call.server, &key).await?;
        }
        return Ok(written);
    }
    Err(Status::internal("no name could be generated"))
}

/// What must exist as soon as an object does.
async fn created(server: &Server, key: &Key) -> Result<(), Status> {
    match &*key.resource {
        "namespaces" => namespaces::provision(server, &key.name).await,
        CRDS => establish(server, key).await,
        _ => Ok(()),
    }
}

/// Accepts a definition's names and begins to serve its kind.
pub(crate) async fn establish(server: &Server, key: &Key) -> Result<(), Status> {
    let now = jiff::Timestamp::now();
    let registry = server.registry();
    let result: Result<_, Status> = server
        .store
        .mutate(key, None, |old, _| {
            let Some(old) = old else { return Err(Status::internal("the definition went away")) };
            let before = old.value();
            let after = crd::names_accepted(&registry, &before, now);
            Ok(if after == before { Change::Keep } else { Change::Put(after) })
        })
        .await;
    // A definition that was deleted meanwhile needs no names.
    if let Err(status) = result
        && server.store.get(key).is_some()
    {
        return Err(status);
    }
    server.refresh_registry();
    Ok(())
}

/// `PUT` of an object or one of its subresources that hold it.
pub(super) async fn update(call: &Call, subresource: Option<&str>, body: &[u8]) -> Result<Response<Body>, Status> {
    let decoded = kinds::decode(&call.resource, body, format(call)?, validation(call)?)?;
    let written = replace(call, subresource, |_| Ok((decoded.value.clone(), false))).await?;
    let mut response = written.respond(call, StatusCode::OK)?;
    respond::warn(&mut response, &decoded.warnings);
    Ok(response)
}

/// Changes an existing object: `change` makes the new whole object from the old one, and says
/// whether it is a server-side apply.
pub(super) async fn replace(
    call: &Call,
    subresource: Option<&str>,
    mut change: impl FnMut(&Value) -> Result<(Value, bool), Status>,
) -> Result<Written, Status> {
    let key = read::key(call)?;
    let given = Given::new(call);
    let dry_run = call.query.dry_run()?;
    let written = commit(&call.server, &key, None, dry_run, |old, _| {
        let old = old.ok_or_else(|| Status::not_found(&call.resource, &key.name))?;
        let before = respond::view(&call.resource, old);
        let (value, apply) = change(&before)?;
        changed(call, subresource, &before, value, &given.context(call, apply))
    })
    .await?;
    if !dry_run {
        after_update(call, &key).await?;
    }
    Ok(written)
}

/// What to store when `value` is to replace `before`.
fn changed(
    call: &Call,
    subresource: Option<&str>,
    before: &Value,
    value: Value,
    context: &Context<'_>,
) -> Result<Change, Status> {
    let after = kinds::update(&call.resource, subresource, before, value, context)?;
    admit(call, subresource, Some(before), &after)?;
    if deletion::finished(&call.resource, &after) {
        return Ok(Change::Delete(after));
    }
    if kinds::unchanged(before, &after) {
        return Ok(Change::Keep);
    }
    Ok(Change::Put(after))
}

async fn after_update(call: &Call, key: &Key) -> Result<(), Status> {
    if &*key.resource != CRDS {
        return Ok(());
    }
    if call.server.store.get(key).is_some() {
        return establish(&call.server, key).await;
    }
    // Its last finalizer was removed.
    call.server.refresh_registry();
    Ok(())
}

/// `PATCH` of an object or one of its subresources that hold it.
pub(super) async fn patch(call: &Call, subresource: Option<&str>, body: &[u8]) -> Result<Response<Body>, Status> {
    let kind = PatchKind::of(call.header(&CONTENT_TYPE))?;
    let validation = validation(call)?;
    let force = call.query.maybe_flag("force")?;
    patch::check_options(kind, call.query.get("fieldManager"), force)?;
    let force = force.unwrap_or(false);
    let key = read::key(call)?;
    let dry_run = call.query.dry_run()?;
    let dependency = namespace_key(call);
    let mut given = Given::new(call);
    if kind == PatchKind::Apply && subresource.is_none() {
        // The account matters only when the pod is created, and then it is in the patch.
        if let Ok(decoded) = kinds::decode(&call.resource, body, Format::Yaml, FieldValidation::Ignore)
            && call.server.store.get(&key).is_none()
        {
            given.look_up(call, &decoded.value)?;
        }
    }
    let mut warnings = Vec::new();
    let mut created_now = false;
    let written = commit(&call.server, &key, dependency.as_ref(), dry_run, |old, namespace| {
        let before = old.map(|old| respond::view(&call.resource, old));
        if before.is_none() && (kind != PatchKind::Apply || subresource.is_some()) {
            return Err(Status::not_found(&call.resource, &key.name));
        }
        let patched = patch::apply(
            kind,
            &call.resource,
            subresource,
            before.as_ref(),
            body,
            validation,
            force,
            &given.context(call, false),
        )?;
        warnings.clone_from(&patched.warnings);
        created_now = before.is_none();
        let context = given.context(call, patched.apply);
        if let Some(before) = before {
            return changed(call, subresource, &before, patched.value, &context);
        }
        admit_namespace(call, &key.name, namespace)?;
        admit_kind(call)?;
        let mut value = patched.value;
        if value["metadata"]["name"].as_str().unwrap_or_default().is_empty() {
            value["metadata"]["name"] = (*key.name).into();
        }
        let prepared = kinds::create(&call.resource, value, &context)?;
        admit(call, None, None, &prepared)?;
        Ok(Change::Put(prepared))
    })
    .await?;
    if !dry_run {
        if created_now {
            created(&call.server, &key).await?;
        } else {
            after_update(call, &key).await?;
        }
    }
    let mut response = written.respond(call, if created_now { StatusCode::CREATED } else { StatusCode::OK })?;
    respond::warn(&mut response, &warnings);
    Ok(response)
}
