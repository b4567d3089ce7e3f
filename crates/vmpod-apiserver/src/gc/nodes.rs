//! Pods bound to a node that isn't there are deleted, after a time in which it may come back.

use std::collections::HashSet;
use std::time::Duration;

use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;
use tokio_util::time::DelayQueue;

use crate::http::{DeleteOptions, delete_object};
use crate::server::Server;
use crate::store::{EventKind, Key, Object};

/// How long a node may be missing.
const QUARANTINE: Duration = Duration::from_secs(40);

fn node_of(pod: &Object) -> Option<&str> {
    pod.digest()["spec"]["nodeName"].as_str().filter(|node| !node.is_empty())
}

fn is_missing(server: &Server, node: &str) -> bool {
    server.store.get(&Key::new("nodes", None, node)).is_none()
}

pub(super) async fn run(server: &Server, stop: &CancellationToken) {
    loop {
        let mut feed = server.store.watch_now(None);
        let mut due: DelayQueue<String> = DelayQueue::new();
        let mut waiting: HashSet<String> = HashSet::new();
        let suspect = |due: &mut DelayQueue<String>, waiting: &mut HashSet<String>, node: &str| {
            if is_missing(server, node) && waiting.insert(node.to_owned()) {
                due.insert(node.to_owned(), QUARANTINE);
            }
        };
        for pod in &server.store.list("pods", None).objects {
            if let Some(node) = node_of(pod) {
                suspect(&mut due, &mut waiting, node);
            }
        }
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(node) = due.next(), if !due.is_empty() => {
                    let node = node.into_inner();
                    waiting.remove(&node);
                    if is_missing(server, &node) {
                        delete_pods(server, &node).await;
                    }
                }
                event = feed.events.recv() => {
                    let Some(event) = event else { break };
                    match (&*event.object.key().resource, event.kind) {
                        ("nodes", EventKind::Delete) => suspect(&mut due, &mut waiting, &event.object.key().name),
                        ("pods", EventKind::Put) => {
                            if let Some(node) = node_of(&event.object) {
                                suspect(&mut due, &mut waiting, node);
                            }
                        }
                        _ => {}
                    }
                }
            }
        }
    }
}

async fn delete_pods(server: &Server, node: &str) {
    let Some(resource) = server.resource_of("v1", "Pod") else { return };
    for pod in server.store.list("pods", None).objects {
        if node_of(&pod) != Some(node) {
            continue;
        }
        let mut options = DeleteOptions::background().with_uid(pod.uid());
        options.given["gracePeriodSeconds"] = 0.into();
        match delete_object(server, &resource, pod.key(), &options).await {
            Ok(_) => tracing::info!(pod = ?pod.key(), node, "deleted a pod whose node is gone"),
            Err(status) if status.code == 404 || status.code == 409 => {}
            Err(status) => {
                tracing::warn!(pod = ?pod.key(), error = %status, "a pod whose node is gone can't be deleted");
            }
        }
    }
}
