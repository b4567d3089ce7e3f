//! Namespaces: what is in one from the start, and how one is emptied.

use std::collections::HashSet;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::http::{DeleteOptions, delete_object};
use crate::kinds::Resource;
use crate::server::{CRDS, Server};
use crate::status::Status;
use crate::store::{Change, EventKind, Key, Object};

/// The namespaces that always exist.
pub(crate) const BUILT_IN: [&str; 4] = ["default", "kube-node-lease", "kube-public", "kube-system"];
/// The one thing that the namespace controller waits for.
const FINALIZER: &str = "kubernetes";
/// The finalizer of a definition whose objects are still there.
pub(crate) const CRD_FINALIZER: &str = "customresourcecleanup.apiextensions.k8s.io";
const ROOT_CA: &str = "kube-root-ca.crt";
const ROOT_CA_DESCRIPTION: &str = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints such as \
the internal service IP or kubernetes.default.svc. No other usage is guaranteed across distributions of Kubernetes clusters.";

/// Whether a namespace may not be deleted.
pub(crate) fn is_protected(name: &str) -> bool {
    matches!(name, "default" | "kube-system" | "kube-public")
}

pub(crate) fn not_found(server: &Server, name: &str) -> Status {
    server
        .registry()
        .resource("", "v1", "namespaces")
        .map_or_else(Status::no_route, |resource| Status::not_found(&resource, name))
}

/// 403: nothing new goes into a namespace that is being deleted.
pub(crate) fn terminating(resource: &Resource, name: &str, namespace: &str) -> Status {
    let why = format!("unable to create new content in namespace {namespace} because it is being terminated");
    let mut status = Status::forbidden(resource, name, &why);
    if let Some(details) = status.details.as_mut() {
        details["causes"] = json!([{
            "reason": "NamespaceTerminating",
            "message": format!("namespace {namespace} is being terminated"),
            "field": "metadata.namespace",
        }]);
    }
    status
}

fn object(kind: &str, name: &str, namespace: Option<&str>) -> Value {
    let now = crate::time::seconds(jiff::Timestamp::now());
    let mut value = json!({
        "apiVersion": "v1", "kind": kind,
        "metadata": { "name": name, "uid": uuid::Uuid::new_v4().to_string(), "creationTimestamp": now },
    });
    if let Some(namespace) = namespace {
        value["metadata"]["namespace"] = namespace.into();
    }
    value
}

async fn ensure(server: &Server, key: &Key, value: Value) -> Result<(), Status> {
    let namespace = key.namespace().map(|name| Key::new("namespaces", None, name));
    let result: Result<_, Status> = server
        .store
        .mutate(key, namespace.as_ref(), |old, namespace| match (old, namespace) {
            (Some(_), _) => Ok(Change::Keep),
            // Not worth an error: the namespace went away.
            (None, None) if key.namespace().is_some() => Err(Status::no_route()),
            (None, Some(found)) if found.is_deleting() => Err(Status::no_route()),
            (None, _) => Ok(Change::Put(value.clone())),
        })
        .await;
    match result {
        Err(status) if status.code != 404 => Err(status),
        _ => Ok(()),
    }
}

/// Makes what every namespace has: its default service account and the authority's certificate.
pub(crate) async fn provision(server: &Server, namespace: &str) -> Result<(), Status> {
    let account = object("ServiceAccount", "default", Some(namespace));
    let mut ca = object("ConfigMap", ROOT_CA, Some(namespace));
    ca["metadata"]["annotations"] = json!({ "kubernetes.io/description": ROOT_CA_DESCRIPTION });
    ca["data"] = json!({ "ca.crt": server.pki.ca_pem() });
    let account_key = Key::new("serviceaccounts", Some(namespace), "default");
    let ca_key = Key::new("configmaps", Some(namespace), ROOT_CA);
    let (account, ca) = tokio::join!(ensure(server, &account_key, account), ensure(server, &ca_key, ca));
    account.and(ca)
}

/// Makes the namespaces that always exist.
pub(crate) async fn provision_built_in(server: &Server) -> Result<(), Status> {
    for name in BUILT_IN {
        let mut namespace = object("Namespace", name, None);
        namespace["metadata"]["labels"] = json!({ "kubernetes.io/metadata.name": name });
        namespace["spec"] = json!({ "finalizers": [FINALIZER] });
        namespace["status"] = json!({ "phase": "Active" });
        ensure(server, &Key::new("namespaces", None, name), namespace).await?;
        provision(server, name).await?;
    }
    Ok(())
}

/// Empties namespaces and custom kinds that are being deleted; keeps what every namespace has.
pub(crate) async fn run(server: Arc<Server>, stop: CancellationToken) {
    loop {
        let mut feed = server.store.watch_now(None);
        let mut dirty: HashSet<Work> = HashSet::new();
        for object in server.store.list("namespaces", None).objects.iter().chain(&server.store.list(CRDS, None).objects)
        {
            dirty.extend(Work::of(object));
        }
        loop {
            for work in std::mem::take(&mut dirty) {
                if let Err(status) = work.clone().run(&server).await {
                    tracing::warn!(?work, error = %status, "a deletion is not finished");
                }
            }
            let event = tokio::select! {
                () = stop.cancelled() => return,
                event = feed.events.recv() => event,
            };
            // Cut off for being slow: look at everything again.
            let Some(event) = event else { break };
            let mut note = |event: &crate::store::Event| {
                let key = event.object.key();
                if event.kind == EventKind::Put {
                    dirty.extend(Work::of(&event.object));
                    return;
                }
                if let Some(namespace) = key.namespace() {
                    dirty.insert(Work::Namespace(namespace.into()));
                }
                dirty.insert(Work::Kind(key.resource.clone()));
            };
            note(&event);
            while let Ok(event) = feed.events.try_recv() {
                note(&event);
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Work {
    Namespace(Arc<str>),
    Kind(Arc<str>),
}

impl Work {
    fn of(object: &Object) -> Option<Self> {
        match &*object.key().resource {
            "namespaces" => Some(Self::Namespace(object.key().name.clone())),
            CRDS if object.is_deleting() => Some(Self::Kind(object.key().name.clone())),
            _ => None,
        }
    }

    async fn run(self, server: &Server) -> Result<(), Status> {
        match self {
            Self::Namespace(name) => match server.store.get(&Key::new("namespaces", None, &name)) {
                Some(namespace) if namespace.is_deleting() => empty_namespace(server, &namespace).await,
                Some(_) => provision(server, &name).await,
                None => Ok(()),
            },
            Self::Kind(storage) => match server.store.get(&Key::new(CRDS, None, &storage)) {
                Some(definition) if definition.is_deleting() => empty_kind(server, &definition).await,
                _ => Ok(()),
            },
        }
    }
}

/// Deletes all objects of a list; true when there were none.
async fn delete_all(server: &Server, storage: &str, namespace: Option<&str>) -> bool {
    let objects = server.store.list(storage, namespace).objects;
    let Some(resource) = server.resource_stored_as(storage) else {
        // A kind that isn't served any more: nobody can hold its finalizers.
        for object in &objects {
            let removed: Result<_, Status> = server
                .store
                .mutate(object.key(), None, |old, _| match old {
                    Some(old) => Ok(Change::Delete(old.value())),
                    None => Err(Status::no_route()),
                })
                .await;
            if let Err(status) = removed {
                tracing::debug!(error = %status, "an object of an unserved kind stays");
            }
        }
        return objects.is_empty();
    };
    let deletions = objects.iter().filter(|object| !object.is_deleting()).map(|object| {
        let resource = resource.clone();
        async move {
            let options = DeleteOptions::background().with_uid(object.uid());
            if let Err(status) = delete_object(server, &resource, object.key(), &options).await
                && status.code != 404
            {
                tracing::warn!(object = ?object.key(), error = %status, "can't delete");
            }
        }
    });
    futures::future::join_all(deletions).await;
    objects.is_empty()
}

async fn empty_namespace(server: &Server, namespace: &Object) -> Result<(), Status> {
    let name = namespace.key().name.clone();
    for storage in server.store.resources_in(&name) {
        delete_all(server, &storage, Some(&name)).await;
    }
    if !server.store.resources_in(&name).is_empty() {
        return Ok(());
    }
    let result: Result<_, Status> = server
        .store
        .mutate(namespace.key(), None, |old, _| {
            let old = old.filter(|old| old.uid() == namespace.uid()).ok_or_else(Status::no_route)?;
            let mut value = old.value();
            if let Some(finalizers) = value["spec"]["finalizers"].as_array_mut() {
                finalizers.retain(|finalizer| finalizer != FINALIZER);
            }
            let held = [&value["spec"]["finalizers"], &value["metadata"]["finalizers"]]
                .iter()
                .any(|list| list.as_array().is_some_and(|list| !list.is_empty()));
            Ok(if held { keep_or_put(old, value) } else { Change::Delete(value) })
        })
        .await;
    ignore_gone(result)
}

fn keep_or_put(old: &Object, value: Value) -> Change {
    if old.value() == value { Change::Keep } else { Change::Put(value) }
}

fn ignore_gone<T>(result: Result<T, Status>) -> Result<(), Status> {
    match result {
        Err(status) if status.code != 404 => Err(status),
        _ => Ok(()),
    }
}

async fn empty_kind(server: &Server, definition: &Object) -> Result<(), Status> {
    let name = definition.key().name.clone();
    if !delete_all(server, &name, None).await && server.store.count(&name) > 0 {
        return Ok(());
    }
    let result: Result<_, Status> = server
        .store
        .mutate(definition.key(), None, |old, _| {
            let old = old.filter(|old| old.uid() == definition.uid()).ok_or_else(Status::no_route)?;
            let mut value = old.value();
            if let Some(finalizers) = value["metadata"]["finalizers"].as_array_mut() {
                finalizers.retain(|finalizer| finalizer != CRD_FINALIZER);
            }
            let held = value["metadata"]["finalizers"].as_array().is_some_and(|list| !list.is_empty());
            Ok(if held { keep_or_put(old, value) } else { Change::Delete(value) })
        })
        .await;
    server.refresh_registry();
    ignore_gone(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_systems_own_namespaces_are_protected() {
        assert!(is_protected("default"));
        assert!(!is_protected("kube-node-lease"));
        assert!(!is_protected("t"));
    }
}
