//! The complete set of pods bound to this node, as the API has it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    runtime::{WatchStreamExt as _, watcher},
};
use tokio::sync::mpsc;

use crate::pod::PodUid;

/// What changed.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// A whole list: these pods are bound to this node, and no others.
    All(BTreeMap<PodUid, Arc<Pod>>),
    /// A pod is there, or is another than before.
    Set(PodUid, Arc<Pod>),
    /// The API has the pod no more.
    Gone(PodUid),
}

/// Follows the API until the receiver is gone. Errors are told and tried again; a set that isn't known to be whole is never
/// passed on.
pub(crate) async fn run(client: Client, node: &str, changes: mpsc::Sender<Change>) {
    let api: Api<Pod> = Api::all(client);
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    let mut events = std::pin::pin!(watcher(api, config).default_backoff());
    let mut assembly = Assembly::default();
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                for change in assembly.take(event) {
                    if changes.send(change).await.is_err() {
                        return;
                    }
                }
            }
            Err(error) => {
                tracing::warn!(error = crate::error_chain(&error), "the API can't be watched for pods; trying again");
            }
        }
    }
}

/// Turns watch events into changes. Pure.
#[derive(Debug, Default)]
struct Assembly {
    /// The list that is arriving.
    listing: BTreeMap<PodUid, Arc<Pod>>,
    known: BTreeSet<PodUid>,
}

impl Assembly {
    fn take(&mut self, event: watcher::Event<Pod>) -> Vec<Change> {
        match event {
            watcher::Event::Init => {
                self.listing.clear();
                Vec::new()
            }
            watcher::Event::InitApply(pod) => {
                if let Some(uid) = uid(&pod) {
                    self.listing.insert(uid, Arc::new(pod));
                }
                Vec::new()
            }
            watcher::Event::InitDone => {
                let all = std::mem::take(&mut self.listing);
                self.known = all.keys().cloned().collect();
                vec![Change::All(all)]
            }
            watcher::Event::Apply(pod) => {
                let Some(uid) = uid(&pod) else { return Vec::new() };
                self.known.insert(uid.clone());
                vec![Change::Set(uid, Arc::new(pod))]
            }
            watcher::Event::Delete(pod) => match uid(&pod) {
                Some(uid) if self.known.remove(&uid) => vec![Change::Gone(uid)],
                _ => Vec::new(),
            },
        }
    }
}

fn uid(pod: &Pod) -> Option<PodUid> {
    match PodUid::of(pod) {
        Ok(uid) => Some(uid),
        Err(error) => {
            tracing::warn!(%error, pod = pod.metadata.name, "a pod is passed over");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use watcher::Event;

    use super::*;

    fn pod(name: &str, uid: &str) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": name, "uid": uid}})).unwrap()
    }

    fn text(changes: &[Change]) -> Vec<String> {
        changes
            .iter()
            .map(|change| match change {
                Change::All(all) => format!("all {:?}", all.keys().map(PodUid::as_str).collect::<Vec<_>>()),
                Change::Set(uid, _) => format!("set {uid}"),
                Change::Gone(uid) => format!("gone {uid}"),
            })
            .collect()
    }

    #[test]
    fn half_a_list_is_never_passed_on() {
        let mut assembly = Assembly::default();
        let mut all = Vec::new();
        for event in vec![
            Event::Init,
            Event::InitApply(pod("a", "1")),
            // The list broke off and begins again.
            Event::Init,
            Event::InitApply(pod("b", "2")),
            Event::InitDone,
            Event::Apply(pod("c", "3")),
            Event::Delete(pod("b", "2")),
            Event::Delete(pod("b", "2")),
            // Recreated under the same name.
            Event::Apply(pod("b", "4")),
            Event::Apply(pod("bad", "../x")),
        ] {
            all.extend(assembly.take(event));
        }
        assert_eq!(text(&all), ["all [\"2\"]", "set 3", "gone 2", "set 4"]);
    }
}
