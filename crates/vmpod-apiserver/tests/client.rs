//! A kube-rs client against the API, in the same process.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first thing that is wrong")]

#[path = "support/wait.rs"]
mod wait;

use std::collections::BTreeMap;
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::{ConfigMap, Event, Namespace, Node, Pod, Secret, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams,
    PropagationPolicy, WatchEvent, WatchParams,
};
use kube::core::params::Preconditions;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Client, ResourceExt as _};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use vmpod_apiserver::{ApiServer, Identity, Options};
use wait::until;

struct World {
    server: ApiServer,
    client: Client,
    _controllers: AbortOnDropHandle<()>,
    dir: tempfile::TempDir,
}

async fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let server = open(dir.path()).await;
    let controllers = AbortOnDropHandle::new(tokio::spawn({
        let server = server.clone();
        async move { server.run_controllers(CancellationToken::new()).await }
    }));
    let client = client(&server, Identity::admin());
    World { server, client, _controllers: controllers, dir }
}

async fn open(dir: &std::path::Path) -> ApiServer {
    ApiServer::open(Options { dir: dir.join("api"), listen: None, extra_sans: Vec::new() }).await.unwrap()
}

fn client(server: &ApiServer, identity: Identity) -> Client {
    Client::new(server.router_as(identity), "default")
}

fn config_map(name: &str, value: &str) -> ConfigMap {
    ConfigMap {
        metadata: ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() },
        data: Some(BTreeMap::from([("k".into(), value.into())])),
        ..ConfigMap::default()
    }
}

fn pod(name: &str, cpu: &str) -> Pod {
    serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name },
        "spec": { "containers": [{ "name": "vm", "image": "tiny", "resources": { "requests": { "cpu": cpu } } }] },
    }))
    .unwrap()
}

fn node(name: &str) -> Node {
    serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": name },
        "status": {
            "allocatable": { "cpu": "4", "memory": "8Gi", "pods": "10" },
            "capacity": { "cpu": "4", "memory": "8Gi", "pods": "10" },
            "conditions": [{ "type": "Ready", "status": "True", "lastHeartbeatTime": null, "lastTransitionTime": null }],
        },
    }))
    .unwrap()
}

fn code(error: kube::Error) -> u16 {
    match error {
        kube::Error::Api(status) => status.code,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn creates_reads_patches_and_deletes() {
    let world = world().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(world.client.clone());
    let created = maps.create(&PostParams::default(), &config_map("a", "1")).await.unwrap();
    assert!(created.uid().is_some() && created.resource_version().is_some());
    assert_eq!(code(maps.create(&PostParams::default(), &config_map("a", "1")).await.unwrap_err()), 409);
    let patched =
        maps.patch("a", &PatchParams::default(), &Patch::Merge(json!({ "data": { "k": "2" } }))).await.unwrap();
    assert_eq!(patched.data.unwrap()["k"], "2");
    let applied = maps
        .patch(
            "b",
            &PatchParams::apply("me"),
            &Patch::Apply(json!({ "apiVersion": "v1", "kind": "ConfigMap", "data": { "x": "y" } })),
        )
        .await
        .unwrap();
    assert_eq!(applied.managed_fields()[0].manager.as_deref(), Some("me"));
    assert_eq!(maps.list(&ListParams::default().fields("metadata.name=b")).await.unwrap().items.len(), 1);
    maps.delete("a", &DeleteParams::default()).await.unwrap();
    assert_eq!(code(maps.get("a").await.unwrap_err()), 404);
    let mut stale = applied.clone();
    stale.data = None;
    maps.replace("b", &PostParams::default(), &stale).await.unwrap();
    stale.data = Some(BTreeMap::from([("late".into(), "1".into())]));
    assert_eq!(code(maps.replace("b", &PostParams::default(), &stale).await.unwrap_err()), 409);
}

#[tokio::test]
async fn watches_from_a_revision_with_selectors_and_bookmarks() {
    let world = world().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(world.client.clone());
    let from = maps.list(&ListParams::default()).await.unwrap().metadata.resource_version.unwrap();
    maps.create(&PostParams::default(), &config_map("a", "1")).await.unwrap();
    let label = |value: &str| Patch::Merge(json!({ "metadata": { "labels": { "show": value } } }));
    maps.patch("a", &PatchParams::default(), &label("yes")).await.unwrap();
    maps.patch("a", &PatchParams::default(), &Patch::Merge(json!({ "data": { "k": "2" } }))).await.unwrap();
    maps.patch("a", &PatchParams::default(), &label("no")).await.unwrap();
    maps.delete("a", &DeleteParams::default()).await.unwrap();
    let seen = |params: WatchParams, count: usize| {
        let maps = maps.clone();
        let from = from.clone();
        async move {
            let stream = maps.watch(&params, &from).await.unwrap();
            let events: Vec<_> = stream.take(count).try_collect().await.unwrap();
            events
                .into_iter()
                .map(|event| match event {
                    WatchEvent::Added(_) => "added",
                    WatchEvent::Modified(_) => "modified",
                    WatchEvent::Deleted(_) => "deleted",
                    WatchEvent::Bookmark(_) => "bookmark",
                    WatchEvent::Error(_) => "error",
                })
                .collect::<Vec<_>>()
        }
    };
    assert_eq!(seen(WatchParams::default(), 5).await, ["added", "modified", "modified", "modified", "deleted"]);
    assert_eq!(seen(WatchParams::default().labels("show=yes"), 3).await, ["added", "modified", "deleted"]);
}

#[tokio::test]
async fn feeds_a_reflector_with_either_way_of_listing() {
    let world = world().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(world.client.clone());
    maps.create(&PostParams::default(), &config_map("a", "1")).await.unwrap();
    for config in [watcher::Config::default(), watcher::Config::default().streaming_lists()] {
        let stream = watcher(maps.clone(), config).default_backoff().touched_objects();
        let mut stream = Box::pin(stream);
        let mut names = Vec::new();
        while names.len() < 2 {
            let next = tokio::time::timeout(Duration::from_secs(5), stream.next()).await.unwrap().unwrap().unwrap();
            names.push(next.name_any());
        }
        names.sort();
        assert_eq!(names, ["a", "kube-root-ca.crt"]);
        maps.patch(
            "a",
            &PatchParams::default(),
            &Patch::Merge(json!({ "data": { "n": names.len().to_string(), "t": uuid() } })),
        )
        .await
        .unwrap();
        let next = tokio::time::timeout(Duration::from_secs(5), stream.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(next.name_any(), "a");
    }
}

fn uuid() -> String {
    uuid::Uuid::new_v4().to_string()
}

#[tokio::test]
async fn schedules_pods_says_why_not_and_deletes_them_gracefully() {
    let world = world().await;
    let pods: Api<Pod> = Api::default_namespaced(world.client.clone());
    let nodes: Api<Node> = Api::all(world.client.clone());
    pods.create(&PostParams::default(), &pod("early", "1")).await.unwrap();
    let condition = |pod: Pod| {
        let conditions = pod.status?.conditions?;
        conditions.into_iter().find(|one| one.type_ == "PodScheduled")?.message
    };
    let message = until("a refusal", || async { condition(pods.get("early").await.unwrap()) }).await;
    assert_eq!(message, "no nodes available to schedule pods");
    nodes.create(&PostParams::default(), &node("n1")).await.unwrap();
    let bound = |name: &'static str| {
        let pods = pods.clone();
        async move { pods.get(name).await.unwrap().spec.unwrap().node_name }
    };
    assert_eq!(until("an assignment", || bound("early")).await, "n1");
    pods.create(&PostParams::default(), &pod("big", "4")).await.unwrap();
    let message = until("a refusal", || async { condition(pods.get("big").await.unwrap()) }).await;
    assert_eq!(message, "0/1 nodes are available: 1 Insufficient cpu.");
    let events: Api<Event> = Api::default_namespaced(world.client.clone());
    let reasons = until("events", || async {
        let reasons: Vec<String> = events
            .list(&ListParams::default())
            .await
            .unwrap()
            .items
            .into_iter()
            .filter_map(|event| event.reason)
            .collect();
        (reasons.len() >= 3).then_some(reasons)
    })
    .await;
    assert!(
        reasons.iter().any(|reason| reason == "FailedScheduling") && reasons.iter().any(|reason| reason == "Scheduled")
    );
    // A bound pod waits for its kubelet, an unassigned one is gone at once.
    let deleted = pods.delete("early", &DeleteParams::default()).await.unwrap();
    let marked = deleted.left().unwrap();
    assert_eq!(marked.metadata.deletion_grace_period_seconds, Some(30));
    pods.delete("big", &DeleteParams::default()).await.unwrap();
    assert_eq!(code(pods.get("big").await.unwrap_err()), 404);
    let now = |uid: Option<String>| DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions { uid, ..Preconditions::default() }),
        ..DeleteParams::default()
    };
    assert_eq!(code(pods.delete("early", &now(Some("other".into()))).await.unwrap_err()), 409);
    pods.delete("early", &now(marked.uid())).await.unwrap();
    assert_eq!(code(pods.get("early").await.unwrap_err()), 404);
}

#[tokio::test]
async fn collects_what_has_no_owner_left() {
    let world = world().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(world.client.clone());
    for policy in [PropagationPolicy::Background, PropagationPolicy::Foreground, PropagationPolicy::Orphan] {
        let owner = maps.create(&PostParams::default(), &config_map("owner", "1")).await.unwrap();
        let mut dependent = config_map("owned", "1");
        dependent.metadata.owner_references = Some(vec![
            serde_json::from_value(json!({
                "apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner.uid(), "blockOwnerDeletion": true,
            }))
            .unwrap(),
        ]);
        maps.create(&PostParams::default(), &dependent).await.unwrap();
        let orphan = matches!(policy, PropagationPolicy::Orphan);
        let params = DeleteParams { propagation_policy: Some(policy), ..DeleteParams::default() };
        maps.delete("owner", &params).await.unwrap();
        until("the owner's end", || async { maps.get_opt("owner").await.unwrap().is_none().then_some(()) }).await;
        if orphan {
            let left = until("an orphan", || async {
                maps.get_opt("owned").await.unwrap().filter(|left| left.owner_references().is_empty())
            })
            .await;
            assert_eq!(left.name_any(), "owned");
        } else {
            until("the dependent's end", || async { maps.get_opt("owned").await.unwrap().is_none().then_some(()) })
                .await;
        }
    }
}

#[tokio::test]
async fn provisions_and_empties_namespaces() {
    let world = world().await;
    let namespaces: Api<Namespace> = Api::all(world.client.clone());
    let named = |name: &str| Namespace {
        metadata: ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() },
        ..Namespace::default()
    };
    namespaces.create(&PostParams::default(), &named("t")).await.unwrap();
    let accounts: Api<ServiceAccount> = Api::namespaced(world.client.clone(), "t");
    assert_eq!(accounts.get("default").await.unwrap().name_any(), "default");
    let maps: Api<ConfigMap> = Api::namespaced(world.client.clone(), "t");
    assert!(maps.get("kube-root-ca.crt").await.unwrap().data.unwrap()["ca.crt"].contains("BEGIN CERTIFICATE"));
    let mut held = config_map("held", "1");
    held.metadata.finalizers = Some(vec!["vmpod.dev/hold".into()]);
    maps.create(&PostParams::default(), &held).await.unwrap();
    namespaces.delete("t", &DeleteParams::default()).await.unwrap();
    until("the finalizer's turn", || async { maps.get("held").await.unwrap().metadata.deletion_timestamp.map(|_| ()) })
        .await;
    assert_eq!(code(maps.create(&PostParams::default(), &config_map("late", "1")).await.unwrap_err()), 403);
    maps.patch("held", &PatchParams::default(), &Patch::Merge(json!({ "metadata": { "finalizers": null } })))
        .await
        .unwrap();
    until("the namespace's end", || async { namespaces.get_opt("t").await.unwrap().is_none().then_some(()) }).await;
    assert_eq!(code(maps.create(&PostParams::default(), &config_map("later", "1")).await.unwrap_err()), 404);
    assert_eq!(code(namespaces.delete("default", &DeleteParams::default()).await.unwrap_err()), 403);
}

#[tokio::test]
async fn nodes_may_do_their_work_and_nothing_else() {
    let world = world().await;
    let admin = world.client.clone();
    let me = client(&world.server, Identity::node("n1"));
    let nodes: Api<Node> = Api::all(me.clone());
    nodes.create(&PostParams::default(), &node("n1")).await.unwrap();
    assert_eq!(code(nodes.create(&PostParams::default(), &node("n2")).await.unwrap_err()), 403);
    let status =
        Patch::Strategic(json!({ "status": { "addresses": [{ "type": "InternalIP", "address": "127.0.0.1" }] } }));
    nodes.patch_status("n1", &PatchParams::default(), &status).await.unwrap();
    let secrets: Api<Secret> = Api::default_namespaced(admin.clone());
    for name in ["used", "other"] {
        secrets
            .create(
                &PostParams::default(),
                &Secret {
                    metadata: ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() },
                    ..Secret::default()
                },
            )
            .await
            .unwrap();
    }
    let mut mine = pod("mine", "1");
    if let Some(spec) = mine.spec.as_mut() {
        spec.volumes =
            Some(vec![serde_json::from_value(json!({ "name": "s", "secret": { "secretName": "used" } })).unwrap()]);
    }
    let pods: Api<Pod> = Api::default_namespaced(admin.clone());
    pods.create(&PostParams::default(), &mine).await.unwrap();
    until("an assignment", || async { pods.get("mine").await.unwrap().spec.unwrap().node_name }).await;
    let pods: Api<Pod> = Api::all(me.clone());
    assert_eq!(code(pods.list(&ListParams::default()).await.unwrap_err()), 403);
    assert_eq!(pods.list(&ListParams::default().fields("spec.nodeName=n1")).await.unwrap().items.len(), 1);
    let pods: Api<Pod> = Api::default_namespaced(me.clone());
    let running = Patch::Strategic(json!({ "status": { "phase": "Running" } }));
    pods.patch_status("mine", &PatchParams::default(), &running).await.unwrap();
    for part in ["annotations", "labels"] {
        // The annotation would let this node read that secret.
        let patch = Patch::Merge(json!({ "metadata": { part: { "vmpod.dev/user-data-secret": "other" } } }));
        assert_eq!(code(pods.patch_status("mine", &PatchParams::default(), &patch).await.unwrap_err()), 403, "{part}");
    }
    assert_eq!(code(pods.delete("absent", &DeleteParams::default()).await.unwrap_err()), 404);
    let eviction = json!({
        "apiVersion": "policy/v1", "kind": "Eviction", "metadata": { "name": "mine" }, "deleteOptions": { "dryRun": ["All"] },
    });
    let path = "/api/v1/namespaces/default/pods/mine/eviction";
    let request = http::Request::post(path).header("content-type", "application/json");
    let _done: serde_json::Value =
        me.request(request.body(serde_json::to_vec(&eviction).unwrap()).unwrap()).await.unwrap();
    assert_eq!(pods.get("mine").await.unwrap().metadata.deletion_timestamp, None);
    let labels = Patch::Merge(json!({ "metadata": { "labels": { "a": "b" } } }));
    assert_eq!(code(pods.patch("mine", &PatchParams::default(), &labels).await.unwrap_err()), 403);
    let secrets: Api<Secret> = Api::default_namespaced(me.clone());
    secrets.get("used").await.unwrap();
    assert_eq!(code(secrets.get("other").await.unwrap_err()), 403);
    assert_eq!(code(secrets.list(&ListParams::default()).await.unwrap_err()), 403);
    let nobody: Api<Pod> = Api::default_namespaced(Client::new(world.server.router(), "default"));
    assert_eq!(code(nobody.list(&ListParams::default()).await.unwrap_err()), 401);
    let account = Identity::new("system:serviceaccount:default:default", ["system:serviceaccounts"]);
    let account: Api<Pod> = Api::default_namespaced(client(&world.server, account));
    assert_eq!(code(account.list(&ListParams::default()).await.unwrap_err()), 403);
}

#[tokio::test]
async fn a_new_start_finds_everything_again() {
    let World { server, client: first, _controllers: controllers, dir } = world().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(first);
    let created = maps.create(&PostParams::default(), &config_map("a", "1")).await.unwrap();
    let ca = server.pki().ca_pem().to_owned();
    drop((maps, controllers));
    drop(server);
    let reopened = until("the store's release", || async {
        let options = Options { dir: dir.path().join("api"), listen: None, extra_sans: Vec::new() };
        ApiServer::open(options).await.ok()
    })
    .await;
    assert_eq!(reopened.pki().ca_pem(), ca);
    let maps: Api<ConfigMap> = Api::default_namespaced(client(&reopened, Identity::admin()));
    let found = maps.get("a").await.unwrap();
    assert_eq!(found, created);
    let later = maps.patch("a", &PatchParams::default(), &Patch::Merge(json!({ "data": { "k": "3" } }))).await.unwrap();
    let revision = |map: &ConfigMap| map.resource_version().unwrap().parse::<u64>().unwrap();
    assert!(revision(&later) > revision(&created));
}

#[tokio::test]
async fn a_definition_goes_after_its_objects() {
    let world = world().await;
    let definitions: Api<DynamicObject> = Api::all_with(
        world.client.clone(),
        &ApiResource::from_gvk(&GroupVersionKind::gvk("apiextensions.k8s.io", "v1", "CustomResourceDefinition")),
    );
    let definition = json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": { "name": "things.example.com" },
        "spec": {
            "group": "example.com", "scope": "Namespaced", "names": { "plural": "things", "singular": "thing", "kind": "Thing" },
            "versions": [{ "name": "v1", "served": true, "storage": true, "schema": { "openAPIV3Schema": { "type": "object" } } }],
        },
    });
    let definition: DynamicObject = serde_json::from_value(definition).unwrap();
    definitions.create(&PostParams::default(), &definition).await.unwrap();
    let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("example.com", "v1", "Thing"));
    let things: Api<DynamicObject> = Api::default_namespaced_with(world.client.clone(), &kind);
    let thing = |name: &str, finalizers: &[&str]| {
        let mut thing = DynamicObject::new(name, &kind);
        thing.metadata.finalizers = Some(finalizers.iter().map(ToString::to_string).collect());
        thing
    };
    things.create(&PostParams::default(), &thing("free", &[])).await.unwrap();
    let held = things.create(&PostParams::default(), &thing("held", &["example.com/hold"])).await.unwrap();
    let mut events = things.watch(&WatchParams::default(), &held.resource_version().unwrap()).await.unwrap().boxed();
    let answer = definitions.delete("things.example.com", &DeleteParams::default()).await.unwrap();
    let marked = answer.left().unwrap();
    assert_eq!(marked.metadata.finalizers.unwrap(), ["customresourcecleanup.apiextensions.k8s.io"]);
    assert_eq!(code(things.create(&PostParams::default(), &thing("late", &[])).await.unwrap_err()), 405);
    let mut gone = Vec::new();
    while gone.len() < 2 {
        match tokio::time::timeout(Duration::from_secs(10), events.try_next()).await.unwrap().unwrap() {
            Some(WatchEvent::Deleted(object)) => gone.push(object.name_any()),
            Some(WatchEvent::Modified(object)) if object.name_any() == "held" => {
                let patch = Patch::Merge(json!({ "metadata": { "finalizers": null } }));
                things.patch("held", &PatchParams::default(), &patch).await.unwrap();
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(gone, ["free", "held"]);
    until("the definition's end", || async {
        definitions.get_opt("things.example.com").await.unwrap().is_none().then_some(())
    })
    .await;
    assert_eq!(code(things.list(&ListParams::default()).await.unwrap_err()), 404);
}
