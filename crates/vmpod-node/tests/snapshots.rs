//! Machines that go on from templates, on a scripted hypervisor: when one is made and used, what happens when it is no good,
//! and that nothing of it outlives its use.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::needless_pass_by_value, reason = "a test")]

#[path = "support/api.rs"]
#[allow(dead_code, reason = "shared by several tests")]
mod api;
#[path = "support/host.rs"]
#[allow(dead_code, reason = "shared by several tests")]
mod host;

use std::path::PathBuf;
use std::time::Duration;

use api::Api;
use futures::StreamExt as _;
use host::{Host, UIDS, Wish};
use serde_json::{Value, json};
use vmpod_machine::{
    FaultPoints, MachineId,
    fake::{Event, Script, Start},
};

fn pod(host: &Host, name: &str, uid: &str, start: Option<&str>) {
    let container = json!({"name": "vm", "image": "tiny", "imagePullPolicy": "IfNotPresent"});
    let spec = json!({"restartPolicy": "Never", "containers": [container]});
    match start {
        None => host.api.create_pod(name, uid, spec),
        Some(start) => host.api.create_annotated_pod(name, uid, json!({"vmpod.dev/start": start}), spec),
    }
}

fn ready(api: &Api, name: &str) -> bool {
    let conditions = |pod: Value| pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
    api.pod(name).is_some_and(|pod| conditions(pod).iter().any(|c| c["type"] == "Ready" && c["status"] == "True"))
}

fn templates(host: &Host) -> Vec<PathBuf> {
    let all = std::fs::read_dir(host.root().join("node/templates")).unwrap();
    all.map(|entry| entry.unwrap().path()).collect()
}

fn renewable() -> Script {
    Script { renewable: true, ..Script::default() }
}

fn wish() -> Wish {
    Wish { snapshots: true, ..Wish::default() }
}

async fn until_template(host: &Host) {
    host.world.until(|world| world.events().iter().any(|e| matches!(e, Event::Ended(id, _) if is_maker(id)))).await;
    for _ in 0..500 {
        if templates(host).iter().any(|path| path.join("template.json").exists()) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no template was made: {:?}", templates(host));
}

fn is_maker(id: &MachineId) -> bool {
    id.as_str().starts_with("template-")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_pod_boots_and_the_next_goes_on_from_its_image() {
    let host = Host::new().await;
    host.world.set_default(renewable());
    let node = host.start(wish()).await;
    pod(&host, "first", UIDS[0], None);
    host.api.until("the first is ready", |api| ready(api, "first")).await;
    assert!(!host.api.reasons("first").contains(&"SnapshotUsed".to_owned()));
    until_template(&host).await;
    pod(&host, "second", UIDS[1], None);
    host.api.until("the second is ready", |api| ready(api, "second")).await;
    assert!(host.api.reasons("second").contains(&"SnapshotUsed".to_owned()), "{:?}", host.api.reasons("second"));
    // Another size is another template.
    let container = json!({"name": "vm", "image": "tiny", "resources": {"limits": {"memory": "512Mi"}}});
    host.api.create_pod("third", UIDS[2], json!({"restartPolicy": "Never", "containers": [container]}));
    host.api.until("the third is ready", |api| ready(api, "third")).await;
    assert!(!host.api.reasons("third").contains(&"SnapshotUsed".to_owned()));
    node.stop().await;
    assert!(host.world.live().is_empty());
    assert_eq!(host.api.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_may_insist_or_refuse() {
    let host = Host::new().await;
    host.world.set_default(renewable());
    let node = host.start(wish()).await;
    pod(&host, "insists", UIDS[0], Some("snapshot"));
    host.api.until("it is ready", |api| ready(api, "insists")).await;
    let reasons = host.api.reasons("insists");
    assert!(
        reasons.contains(&"SnapshotMaking".to_owned()) && reasons.contains(&"SnapshotUsed".to_owned()),
        "{reasons:?}"
    );
    pod(&host, "refuses", UIDS[1], Some("boot"));
    host.api.until("it is ready", |api| ready(api, "refuses")).await;
    assert!(!host.api.reasons("refuses").contains(&"SnapshotUsed".to_owned()));
    pod(&host, "mumbles", UIDS[2], Some("perhaps"));
    host.api.until("it failed", |api| api.phase("mumbles").as_deref() == Some("Failed")).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_cannot_be_somebody_else_is_never_copied() {
    let host = Host::new().await;
    let node = host.start(wish()).await;
    for (name, uid) in [("insists", UIDS[0]), ("again", UIDS[1])] {
        pod(&host, name, uid, Some("snapshot"));
        host.api.until("it is ready", |api| ready(api, name)).await;
        assert!(host.api.reasons(name).contains(&"SnapshotUnavailable".to_owned()), "{:?}", host.api.reasons(name));
    }
    let made = host.world.events().into_iter().filter(|e| matches!(e, Event::Started(id) if is_maker(id))).count();
    assert_eq!(made, 1, "what was refused is not tried again for each pod");
    assert_eq!(templates(&host), Vec::<PathBuf>::new());
    assert_eq!(host.holders("template-"), 0);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_is_deleted_waits_for_no_template() {
    let host = Host::new().await;
    host.world.set_default(Script { start: Start::Hangs, ..renewable() });
    let node = host.start(wish()).await;
    pod(&host, "p", UIDS[0], Some("snapshot"));
    host.api.until("a template is being made", |api| api.reasons("p").contains(&"SnapshotMaking".to_owned())).await;
    host.api.delete_pod("p", 1);
    host.api.until("it is gone", |api| api.pod("p").is_none()).await;
    host.until_clean().await;
    assert_eq!(host.holders("template-"), 0);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_fails_is_a_boot_and_not_a_restart() {
    let host = Host::new().await;
    host.world.set_default(renewable());
    let node = host.start(wish()).await;
    pod(&host, "good", UIDS[0], Some("snapshot"));
    host.api.until("it is ready", |api| ready(api, "good")).await;
    host.world.set_default(Script { restore_fails: Some("bad magic".to_owned()), ..renewable() });
    pod(&host, "bad", UIDS[1], None);
    host.api.until("it is ready", |api| ready(api, "bad")).await;
    let reasons = host.api.reasons("bad");
    assert_eq!(reasons.iter().filter(|reason| *reason == "SnapshotFailed").count(), 1, "{reasons:?}");
    let pod = host.api.pod("bad").unwrap();
    assert_eq!(pod["status"]["containerStatuses"][0]["restartCount"], 0);
    host.api.delete_pod("bad", 1);
    host.api.until("it is gone", |api| api.pod("bad").is_none()).await;
    host.until_unheld(UIDS[1]).await;
    node.stop().await;
}

/// A pod that insists on a template gets ready and goes again, told with the agent dying at a point; how many points there are.
async fn told_with_a_crash(at: usize) -> usize {
    let host = Host::new().await;
    host.world.set_default(renewable());
    let faults = FaultPoints::crash_at(at);
    pod(&host, "p", UIDS[0], Some("snapshot"));
    let first = host.spawn(Wish { faults: faults.clone(), ..wish() }).await;
    let api = host.api.clone();
    let mut told = Box::pin(async move {
        api.until("ready", |api| ready(api, "p")).await;
        api.delete_pod("p", 1);
        api.until("gone", |api| api.pod("p").is_none()).await;
    });
    let (mut over, mut crashed) = (false, None);
    tokio::select! {
        () = &mut told => over = true,
        point = faults.crashed() => crashed = Some(point),
    }
    if over {
        // The agent may still die while it cleans up.
        tokio::select! {
            () = host.until_clean() => {}
            point = faults.crashed() => crashed = Some(point),
        }
    }
    let last = match crashed {
        None => first,
        Some(point) => {
            first.die().await;
            let second = host.start(wish()).await;
            if !over {
                let done = tokio::time::timeout(Duration::from_mins(1), told).await;
                assert!(done.is_ok(), "after a crash at {at} ({point}) the pod's story doesn't end");
            }
            second
        }
    };
    host.until_clean().await;
    last.stop().await;
    let whole = templates(&host).into_iter().filter(|path| path.join("template.json").exists()).count();
    assert_eq!(templates(&host).len(), whole, "crash at {at}: half a template is left");
    assert_eq!(host.holders("template-"), whole, "crash at {at}: an image is held by no template, or not by one");
    assert!(host.world.most_live(UIDS[0]) <= 1, "crash at {at}: two machines at once");
    assert_eq!(host.world.live(), [], "crash at {at}");
    faults.hits()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_dies_at_any_point_leaves_no_half_template() {
    let points = told_with_a_crash(usize::MAX).await;
    assert!(points > 15, "only {points} points: the agent has more effects than that");
    let all = futures::stream::iter(0..points).map(told_with_a_crash).buffer_unordered(6);
    all.for_each(|_| async {}).await;
}
