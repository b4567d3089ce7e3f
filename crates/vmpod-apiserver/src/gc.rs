//! The garbage collectors: objects whose owners are gone, and pods whose node is gone.

mod nodes;
mod owners;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::deletion;
use crate::http::{DeleteOptions, delete_object};
use crate::server::{Server, storage_name};
use crate::status::Status;
use crate::store::{Change, Event, EventKind, Key, Object};

use owners::{FOREGROUND, Fate, Found, ORPHAN, OwnerRef};

/// Who is owned by whom, by UID.
#[derive(Debug, Default)]
struct Graph {
    dependents: HashMap<String, HashMap<String, Key>>,
}

impl Graph {
    fn add(&mut self, object: &Object) {
        for owner in owners::of(object.digest()) {
            self.dependents.entry(owner.uid).or_default().insert(object.uid().to_owned(), object.key().clone());
        }
    }

    fn remove(&mut self, object: &Object) {
        for owner in owners::of(object.digest()) {
            if let Some(dependents) = self.dependents.get_mut(&owner.uid) {
                dependents.remove(object.uid());
                if dependents.is_empty() {
                    self.dependents.remove(&owner.uid);
                }
            }
        }
    }

    fn of(&self, owner: &str) -> Vec<Key> {
        self.dependents.get(owner).into_iter().flatten().map(|(_, key)| key.clone()).collect()
    }
}

/// Collects until `stop` is cancelled.
pub(crate) async fn run(server: Arc<Server>, stop: CancellationToken) {
    tokio::join!(owned(&server, &stop), nodes::run(&server, &stop));
}

async fn owned(server: &Server, stop: &CancellationToken) {
    loop {
        let mut feed = server.store.watch_now(None);
        let mut graph = Graph::default();
        let mut work: HashSet<Key> = HashSet::new();
        for object in server.store.everything() {
            graph.add(&object);
            if is_work(&object) {
                work.insert(object.key().clone());
            }
        }
        loop {
            for key in std::mem::take(&mut work) {
                if let Err(status) = settle(server, &graph, &key).await
                    && status.code != 404
                {
                    tracing::warn!(object = ?key, error = %status, "garbage collection failed");
                }
            }
            let event = tokio::select! {
                () = stop.cancelled() => return,
                event = feed.events.recv() => event,
            };
            // Cut off for being slow: look at everything again.
            let Some(event) = event else { break };
            see(server, &mut graph, &mut work, &event);
            while let Ok(event) = feed.events.try_recv() {
                see(server, &mut graph, &mut work, &event);
            }
        }
    }
}

/// Whether an object may need something done when it is first seen.
fn is_work(object: &Object) -> bool {
    let digest = object.digest();
    let awaited =
        object.is_deleting() && (owners::has_finalizer(digest, FOREGROUND) || owners::has_finalizer(digest, ORPHAN));
    awaited || !owners::of(digest).is_empty()
}

fn see(server: &Server, graph: &mut Graph, work: &mut HashSet<Key>, event: &Event) {
    let object = &event.object;
    if let Some(before) = &event.before {
        graph.remove(before);
    }
    if event.kind == EventKind::Put {
        graph.add(object);
        // An owner that is waited for, or references that are new.
        let digest = object.digest();
        let references = |object: &Object| object.digest()["metadata"]["ownerReferences"].clone();
        let new = event.before.as_ref().is_none_or(|before| references(before) != references(object));
        if (new && !owners::of(digest).is_empty()) || (object.is_deleting() && is_work(object)) {
            work.insert(object.key().clone());
        }
        return;
    }
    work.extend(graph.of(object.uid()));
    for owner in owners::of(object.digest()) {
        if let Found::There(found) = find(server, object.key().namespace(), &owner)
            && found.is_deleting()
        {
            work.insert(found.key().clone());
        }
    }
}

/// Looks for an owner. A kind that isn't served can't be looked at, which is not the same as absent.
fn find(server: &Server, namespace: Option<&str>, owner: &OwnerRef) -> Found {
    let Some(resource) = server.resource_of(&owner.api_version, &owner.kind) else { return Found::Unknown };
    let namespace = if resource.namespaced {
        // A cluster-wide object can't be owned from within a namespace.
        let Some(namespace) = namespace else { return Found::Unknown };
        Some(namespace)
    } else {
        None
    };
    match server.store.get(&Key::new(&storage_name(&resource), namespace, &owner.name)) {
        Some(found) if found.uid() == owner.uid => Found::There(found),
        _ => Found::Absent,
    }
}

/// Does what an object needs: as an owner that waits for its dependents, and as a dependent.
async fn settle(server: &Server, graph: &Graph, key: &Key) -> Result<(), Status> {
    let Some(object) = server.store.get(key) else { return Ok(()) };
    if object.is_deleting() {
        if owners::has_finalizer(object.digest(), ORPHAN) {
            for dependent in graph.of(object.uid()) {
                disown(server, &dependent, &[object.uid().to_owned()]).await?;
            }
            return release(server, &object, ORPHAN).await;
        }
        if owners::has_finalizer(object.digest(), FOREGROUND) {
            return foreground(server, graph, &object).await;
        }
    }
    collect(server, graph, &object).await
}

async fn foreground(server: &Server, graph: &Graph, owner: &Object) -> Result<(), Status> {
    let mut blocked = false;
    for key in graph.of(owner.uid()) {
        let Some(dependent) = server.store.get(&key) else { continue };
        let blocks =
            owners::of(dependent.digest()).iter().any(|reference| reference.uid == owner.uid() && reference.blocks);
        if !dependent.is_deleting() {
            Box::pin(collect(server, graph, &dependent)).await?;
        }
        blocked |= blocks && server.store.get(&key).is_some_and(|still| still.uid() == dependent.uid());
    }
    if blocked { Ok(()) } else { release(server, owner, FOREGROUND).await }
}

/// Deletes an object when none of its owners is left.
async fn collect(server: &Server, graph: &Graph, object: &Object) -> Result<(), Status> {
    if object.is_deleting() {
        return Ok(());
    }
    let found: Vec<(OwnerRef, Found)> = owners::of(object.digest())
        .into_iter()
        .map(|owner| {
            let found = find(server, object.key().namespace(), &owner);
            (owner, found)
        })
        .collect();
    let policy = match owners::fate(&found, !graph.of(object.uid()).is_empty()) {
        Fate::Keep => return Ok(()),
        Fate::Disown(uids) => return disown(server, object.key(), &uids).await,
        Fate::Delete(policy) => policy,
    };
    let Some(resource) = server.resource_stored_as(&object.key().resource) else { return Ok(()) };
    let mut options = DeleteOptions::background().with_uid(object.uid());
    options.given["propagationPolicy"] = policy.into();
    match delete_object(server, &resource, object.key(), &options).await {
        // Another object has its name now.
        Err(status) if status.code == 409 => Ok(()),
        Err(status) => Err(status),
        Ok(_) => Ok(()),
    }
}

/// Removes the references to these owners.
async fn disown(server: &Server, key: &Key, uids: &[String]) -> Result<(), Status> {
    change(server, key, |value| {
        let Some(list) = value["metadata"]["ownerReferences"].as_array_mut() else { return };
        list.retain(|reference| !uids.iter().any(|uid| reference["uid"] == uid.as_str()));
        if list.is_empty()
            && let Some(meta) = value["metadata"].as_object_mut()
        {
            meta.remove("ownerReferences");
        }
    })
    .await
}

/// Removes a finalizer of ours, and the object when it was the last thing to wait for.
async fn release(server: &Server, object: &Object, finalizer: &str) -> Result<(), Status> {
    change(server, object.key(), |value| {
        let Some(list) = value["metadata"]["finalizers"].as_array_mut() else { return };
        list.retain(|one| one != finalizer);
        if list.is_empty()
            && let Some(meta) = value["metadata"].as_object_mut()
        {
            meta.remove("finalizers");
        }
    })
    .await
}

async fn change(server: &Server, key: &Key, edit: impl Fn(&mut Value)) -> Result<(), Status> {
    let resource = server.resource_stored_as(&key.resource).ok_or_else(Status::no_route)?;
    let result: Result<_, Status> = server
        .store
        .mutate(key, None, |old, _| {
            let before = old.ok_or_else(Status::no_route)?.value();
            let mut after = before.clone();
            edit(&mut after);
            Ok(if after == before {
                Change::Keep
            } else if deletion::finished(&resource, &after) {
                Change::Delete(after)
            } else {
                Change::Put(after)
            })
        })
        .await;
    match result {
        Err(status) if status.code != 404 => Err(status),
        _ => Ok(()),
    }
}
