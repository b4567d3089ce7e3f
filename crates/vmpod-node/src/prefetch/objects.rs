//! Images that `ImagePrefetch` objects ask for.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::{FutureExt as _, StreamExt as _};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, ResourceExt as _,
    api::{Patch, PatchParams},
    runtime::{WatchStreamExt as _, watcher},
};
use serde_json::json;
use vmpod_api::prefetch::{ImagePrefetch, NodeImages, PrefetchPhase};

use super::{one, present, wait};
use crate::{error_chain, image_pull, options::Registries, world::World};

/// How often what is there is looked at again.
const AGAIN: Duration = Duration::from_mins(10);
/// How long an API that has no such kind is left alone at most; at first it is asked again soon, because the kind may be on its way.
const UNKNOWN: Duration = Duration::from_mins(5);

type Key = (String, String);

fn key(object: &ImagePrefetch) -> Key {
    (object.namespace().unwrap_or_default(), object.name_any())
}

/// Whether a node is one of those that an object speaks of.
fn chosen(object: &ImagePrefetch, node: Option<&Node>) -> bool {
    let has = |key: &str, value: &str| {
        let labels = node.and_then(|node| node.metadata.labels.as_ref());
        labels.is_some_and(|labels| labels.get(key).is_some_and(|label| label == value))
    };
    object.metadata.deletion_timestamp.is_none() && object.spec.node_selector.iter().all(|(key, value)| has(key, value))
}

/// What a node tells of an object's images.
fn told(outcomes: &[(String, Option<Result<(), String>>)], before: Option<&NodeImages>, now: Timestamp) -> NodeImages {
    let there = outcomes.iter().filter(|(_, outcome)| matches!(outcome, Some(Ok(())))).count();
    let wrong: Vec<String> = outcomes
        .iter()
        .filter_map(|(image, outcome)| Some(format!("{image}: {}", outcome.as_ref()?.as_ref().err()?)))
        .collect();
    let phase = match (there == outcomes.len(), wrong.is_empty()) {
        (true, _) => PrefetchPhase::Ready,
        (false, true) => PrefetchPhase::Pulling,
        (false, false) => PrefetchPhase::Failed,
    };
    let since = before.filter(|before| before.phase == phase).and_then(|before| before.since.clone());
    let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
    NodeImages {
        phase,
        images: format!("{there}/{}", outcomes.len()),
        message: (!wrong.is_empty()).then(|| wrong.join("; ")),
        since: since.or_else(|| Some(now.to_string())),
    }
}

/// What there is to do about an image.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Nothing but to tell.
    Told(Result<(), String>),
    Fetch,
}

/// What was there and isn't any more went because the room was short, or by somebody's hand: fetched again it would go again.
fn next(present: Result<bool, String>, had: bool) -> Next {
    match present {
        Ok(true) => Next::Told(Ok(())),
        Ok(false) if had => {
            Next::Told(Err("it was removed from this node; it is fetched again when the object changes".to_owned()))
        }
        Ok(false) => Next::Fetch,
        Err(why) => Next::Told(Err(why)),
    }
}

/// What is kept of an object between two looks.
#[derive(Default)]
struct Kept {
    generation: Option<i64>,
    /// Images that were there once, since the object is as it is.
    had: HashSet<String>,
    failures: u32,
    /// Not to be looked at before.
    due: Option<tokio::time::Instant>,
}

/// Follows the objects and has the images that they ask for, one after the other.
pub(crate) async fn run(world: Arc<World>) {
    let api: Api<ImagePrefetch> = Api::all(world.client.clone());
    let mut events = std::pin::pin!(watcher(api, watcher::Config::default()).default_backoff());
    let (mut objects, mut listing) = (BTreeMap::<Key, ImagePrefetch>::new(), BTreeMap::new());
    let mut kept: HashMap<Key, Kept> = HashMap::new();
    let mut unheard = 0_u32;
    loop {
        // All that has happened, before anything is done about it.
        let next = kept.values().filter_map(|kept| kept.due).min();
        let again = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let mut event = tokio::select! {
            event = events.next() => match event { Some(event) => Some(event), None => return },
            () = again => None,
        };
        while let Some(change) = event {
            match change {
                Ok(watcher::Event::Init) => listing.clear(),
                Ok(watcher::Event::InitApply(object)) => drop(listing.insert(key(&object), object)),
                Ok(watcher::Event::InitDone) => objects = std::mem::take(&mut listing),
                Ok(watcher::Event::Apply(object)) => drop(objects.insert(key(&object), object)),
                Ok(watcher::Event::Delete(object)) => drop(objects.remove(&key(&object))),
                Err(error) => {
                    let unknown = matches!(&error, watcher::Error::InitialListFailed(kube::Error::Api(status)) if status.code == 404);
                    tracing::debug!(error = error_chain(&error), "ImagePrefetch objects can't be watched");
                    if unknown {
                        tokio::time::sleep(Duration::from_secs(1 << unheard.min(10)).min(UNKNOWN)).await;
                        unheard = unheard.saturating_add(1);
                    }
                }
            }
            event = events.next().now_or_never().flatten();
        }
        kept.retain(|key, _| objects.contains_key(key));
        for object in objects.values() {
            look(&world, object, kept.entry(key(object)).or_default()).await;
        }
    }
}

/// Looks after one object, if it is time.
async fn look(world: &Arc<World>, object: &ImagePrefetch, kept: &mut Kept) {
    let now = tokio::time::Instant::now();
    let changed = kept.generation != object.metadata.generation;
    if !changed && kept.due.is_some_and(|due| due > now) {
        return;
    }
    if changed {
        *kept = Kept { generation: object.metadata.generation, ..Kept::default() };
    }
    let shown = object.status.as_ref().and_then(|status| status.nodes.get(&world.name)).cloned();
    if !chosen(object, world.ledger.node().as_deref()) {
        if shown.is_some() {
            show(world, object, None).await;
        }
        // Labels of nodes change.
        kept.due = Some(now + AGAIN);
        return;
    }
    let mut outcomes: Vec<(String, Option<Result<(), String>>)> =
        object.spec.images.iter().map(|image| (image.clone(), None)).collect();
    let mut last = shown;
    let registries = registries(world, object).await;
    for index in 0..outcomes.len() {
        let image = outcomes[index].0.clone();
        let outcome = match next(present(&world.store, &image).await, kept.had.contains(&image)) {
            Next::Told(outcome) => outcome,
            Next::Fetch => {
                // A try that is one of many is told when it has failed or not.
                if kept.failures == 0 {
                    tell(world, object, &outcomes, &mut last).await;
                }
                one(&world.store, &registries, &image).await.map(drop)
            }
        };
        if outcome.is_ok() {
            kept.had.insert(image);
        }
        outcomes[index].1 = Some(outcome);
    }
    tell(world, object, &outcomes, &mut last).await;
    let failed = outcomes.iter().any(|(_, outcome)| matches!(outcome, Some(Err(_))));
    kept.failures = if failed { kept.failures.saturating_add(1) } else { 0 };
    kept.due = Some(tokio::time::Instant::now() + if failed { wait(kept.failures) } else { AGAIN });
}

/// The node's registries, with the object's own Secrets before its credentials.
async fn registries(world: &Arc<World>, object: &ImagePrefetch) -> Registries {
    let mut registries = world.registries.clone();
    let namespace = object.namespace().unwrap_or_default();
    for secret in &object.spec.image_pull_secrets {
        match image_pull::docker_config(&world.client, &namespace, &secret.name).await {
            Ok(Some(text)) => registries.credentials = registries.credentials.with_docker_config(text),
            Ok(None) => {}
            // The image may be public; if it isn't, the registry says so.
            Err(error) => {
                tracing::info!(secret = secret.name, error = error_chain(&error), "a pull secret can't be read");
            }
        }
    }
    registries
}

async fn tell(
    world: &Arc<World>,
    object: &ImagePrefetch,
    outcomes: &[(String, Option<Result<(), String>>)],
    last: &mut Option<NodeImages>,
) {
    let told = told(outcomes, last.as_ref(), Timestamp::now());
    if last.as_ref() != Some(&told) {
        show(world, object, Some(&told)).await;
        *last = Some(told);
    }
}

async fn show(world: &Arc<World>, object: &ImagePrefetch, told: Option<&NodeImages>) {
    let api: Api<ImagePrefetch> =
        Api::namespaced(world.client.clone(), &object.namespace().unwrap_or_else(|| "default".to_owned()));
    // A merge of one key: other nodes write theirs.
    let patch = json!({"status": {"nodes": {&world.name: told}}});
    let done = api.patch_status(&object.name_any(), &PatchParams::default(), &Patch::Merge(&patch)).await;
    if let Err(error) = done {
        tracing::debug!(object = object.name_any(), error = error_chain(&error), "a status wasn't written");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_chosen_by_its_labels() {
        let object = |selector: serde_json::Value| -> ImagePrefetch {
            serde_json::from_value(
                json!({"apiVersion": "vmpod.dev/v1alpha1", "kind": "ImagePrefetch", "metadata": {"name": "a"},
                "spec": {"images": ["r.example/x:1"], "nodeSelector": selector}}),
            )
            .unwrap()
        };
        let node: Node = serde_json::from_value(json!({"metadata": {"name": "n", "labels": {"site": "bkk"}}})).unwrap();
        assert!(chosen(&object(json!({})), Some(&node)) && chosen(&object(json!({"site": "bkk"})), Some(&node)));
        assert!(
            !chosen(&object(json!({"site": "gcp"})), Some(&node)) && !chosen(&object(json!({"site": "bkk"})), None)
        );
    }

    #[test]
    fn what_was_removed_is_not_fetched_over_and_over() {
        assert_eq!(next(Ok(false), false), Next::Fetch);
        assert_eq!(next(Ok(true), true), Next::Told(Ok(())));
        assert!(matches!(next(Ok(false), true), Next::Told(Err(why)) if why.contains("was removed from this node")));
        assert_eq!(next(Err("no such name".to_owned()), false), Next::Told(Err("no such name".to_owned())));
    }

    #[test]
    fn what_is_told_keeps_its_time_until_it_changes() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let image = |name: &str, outcome| (name.to_owned(), outcome);
        let first = told(&[image("a", Some(Ok(()))), image("b", None)], None, at(0));
        assert_eq!((first.phase, first.images.as_str(), &first.message), (PrefetchPhase::Pulling, "1/2", &None));
        let wrong = || Some(Err("no such image".to_owned()));
        let failed = told(&[image("a", Some(Ok(()))), image("b", wrong())], Some(&first), at(5));
        assert_eq!((failed.phase, failed.message.as_deref()), (PrefetchPhase::Failed, Some("b: no such image")));
        assert_eq!(failed.since.as_deref(), Some("1970-01-01T00:00:05Z"));
        let again = told(&[image("a", Some(Ok(()))), image("b", wrong())], Some(&failed), at(9));
        assert_eq!(again, failed);
        let ready = told(&[image("a", Some(Ok(())))], Some(&failed), at(9));
        assert_eq!((ready.phase, ready.images.as_str()), (PrefetchPhase::Ready, "1/1"));
    }
}
