//! The operator alone against the embedded API: how fast a pool goes from nothing to a thousand runners, and what memory
//! ten thousand take.
//!
//! The API, its scheduler and the operator are vmpod's own, as two processes; every write is synced to the disk. The nodes are
//! simulated: a machine counts as up when its pod is bound, and its runner waits for jobs at once, so that what is measured is
//! what vmpod adds to the time that machines take. A runner counts when the operator has written that it is Idle.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use axum::Router;
use axum::routing::get;
use futures::TryStreamExt;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use vmpod_api::RunnerPool;

use super::process::{self, Owned};
use super::server;

const NODES: usize = 20;
const LIMIT: Duration = Duration::from_mins(10);
/// Pods whose status is written at once.
const AT_ONCE: usize = 32;

/// The runners that wait for jobs.
type Runners = Arc<Mutex<BTreeMap<String, &'static str>>>;

pub(super) fn run(quick: bool, program: Option<PathBuf>, root: &Path) -> Result<()> {
    let program = program.map_or_else(|| server::build(root), Ok)?;
    let program = std::fs::canonicalize(&program).with_context(|| format!("no program {}", program.display()))?;
    rustls::crypto::ring::default_provider().install_default().ok();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let scratch = tempfile::Builder::new().prefix("vmpod-bench-").tempdir_in(root.join("target"))?;
    let home = scratch.path().join("home");
    let up = server::up_with(&program, &home, &scratch.path().join("up.log"), &["--no-fleet"])?;
    let mut controller = Command::new(&program);
    controller.args(["controller", "--fleet-poll", "1s", "--kubeconfig"]).arg(home.join("kubeconfig"));
    let controller = Owned::start(&mut controller, &scratch.path().join("controller.log"))?;
    let (burst, many) = if quick { (300, 1000) } else { (1000, 10_000) };
    let outcome = runtime.block_on(measure(&home, controller.id(), burst, many));
    drop(runtime);
    controller.end(Duration::from_secs(30))?;
    up.end(Duration::from_mins(1))?;
    let Figures { seconds, made_seconds, rss_burst, rss_many, many_seconds, cpu } = outcome?;
    let rate = f64::from(burst) / seconds;
    crate::print(&format!("{:<48}{:>10}", "fleet-burst", ""));
    crate::print(&format!("{:<48}{rate:>10.0}", format!("runners a second, 0 to {burst} (until Idle)")));
    crate::print(&format!(
        "{:<48}{:>10.0}",
        "  of them made and with a pod, a second",
        f64::from(burst) / made_seconds
    ));
    crate::print(&format!("{:<48}{rss_burst:>10.0}", format!("the operator's memory with {burst}, MiB")));
    crate::print(&format!("{:<48}{rss_many:>10.0}", format!("the operator's memory with {many}, MiB")));
    crate::print(&format!("{:<48}{many_seconds:>10.0}", format!("seconds until {many} were Idle")));
    crate::print(&format!("{:<48}{cpu:>10.3}", format!("processors that {many} at rest take the operator")));
    let mut figures = json!({
        "runners_per_second": round(rate), "burst": burst, "rss_burst_mib": round(rss_burst),
        "many": many, "many_seconds": round(many_seconds), "cpu_at_rest": round(cpu),
    });
    // Under its name only when it is that.
    let key = if many == 10_000 { "rss_10k_mib".to_owned() } else { format!("rss_{many}_mib") };
    figures[key] = round(rss_many).into();
    crate::print(&figures.to_string());
    Ok(())
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

struct Figures {
    seconds: f64,
    made_seconds: f64,
    rss_burst: f64,
    rss_many: f64,
    many_seconds: f64,
    cpu: f64,
}

async fn measure(home: &Path, controller: u32, burst: u32, many: u32) -> Result<Figures> {
    let kubeconfig = Kubeconfig::read_from(home.join("kubeconfig"))?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    let mut tasks = JoinSet::new();
    let runners = Runners::default();
    let url = queue(&runners, &mut tasks).await?;
    nodes(&client, &mut tasks).await?;
    let kubelets = kubelets(client.clone(), Arc::clone(&runners));
    tasks.spawn(async move {
        if let Err(error) = kubelets.await {
            crate::say(&format!("the simulated nodes ended: {error:#}"));
        }
    });
    let pools: Api<RunnerPool> = Api::default_namespaced(client.clone());
    let until = Instant::now() + Duration::from_mins(1);
    // Its kind comes with the operator.
    while pools.list(&kube::api::ListParams::default()).await.is_err() {
        if Instant::now() > until {
            bail!("the operator did not make its kinds known");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    pools.create(&PostParams::default(), &pool(&url)?).await?;
    scale(&pools, 1).await?;
    idle(&pools, 1).await?;

    let began = Instant::now();
    scale(&pools, burst + 1).await?;
    let made = {
        let (pods, began) = (Api::<Pod>::default_namespaced(client.clone()), began);
        tokio::spawn(async move {
            let list = kube::api::ListParams::default().labels("vmpod.dev/pool=burst");
            loop {
                let there = pods.list_metadata(&list).await.map_or(0, |list| list.items.len());
                if there > burst as usize || began.elapsed() > LIMIT {
                    return began.elapsed().as_secs_f64();
                }
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
        })
    };
    idle(&pools, burst + 1).await?;
    let seconds = began.elapsed().as_secs_f64();
    let made_seconds = made.await?;
    let rss_burst = process::resident_mib(controller)?;
    crate::say(&format!("{burst} runners are idle after {seconds:.1} s"));

    let began = Instant::now();
    scale(&pools, many).await?;
    idle(&pools, many).await?;
    let many_seconds = began.elapsed().as_secs_f64();
    // At rest: nothing changes, and the queue is asked each second.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (before, at) = (process::used(controller)?.0, Instant::now());
    tokio::time::sleep(Duration::from_secs(10)).await;
    let cpu = (process::used(controller)?.0 - before) / at.elapsed().as_secs_f64();
    Ok(Figures { seconds, made_seconds, rss_burst, rss_many: process::resident_mib(controller)?, many_seconds, cpu })
}

fn pool(url: &str) -> Result<RunnerPool> {
    Ok(serde_json::from_value(json!({
        "apiVersion": "vmpod.dev/v1alpha1", "kind": "RunnerPool", "metadata": {"name": "burst"},
        "spec": {
            "provider": {"http": {"url": url}},
            "image": "debian:12", "userData": "#!/bin/sh\n",
            "resources": {"cpu": "100m", "memory": "64Mi"},
            "scale": {"max": 20_000, "replicas": 0},
            "placements": [{"name": "simulated", "nodeSelector": {"bench": "yes"}}],
        },
    }))?)
}

async fn scale(pools: &Api<RunnerPool>, replicas: u32) -> Result<()> {
    let patch = json!({"spec": {"scale": {"replicas": replicas}}});
    pools.patch("burst", &PatchParams::default(), &Patch::Merge(patch)).await?;
    Ok(())
}

/// Waits until so many runners are Idle.
async fn idle(pools: &Api<RunnerPool>, wanted: u32) -> Result<()> {
    let config = watcher::Config::default().fields("metadata.name=burst");
    let mut events = std::pin::pin!(watcher(pools.clone(), config).applied_objects());
    let reached = tokio::time::timeout(LIMIT, async {
        while let Some(pool) = events.try_next().await? {
            if pool.status.is_some_and(|status| status.idle >= wanted) {
                return Ok(());
            }
        }
        bail!("the watch ended")
    });
    reached.await.with_context(|| format!("{wanted} runners were not idle within {} s", LIMIT.as_secs()))?
}

/// The queue: no job ever waits, and every machine that is up is idle.
async fn queue(runners: &Runners, tasks: &mut JoinSet<()>) -> Result<String> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/queue", listener.local_addr()?);
    let runners = Arc::clone(runners);
    let answer = async move || {
        let runners = runners.lock().unwrap_or_else(PoisonError::into_inner);
        axum::Json(json!({"pending": 0, "runners": &*runners}))
    };
    let router = Router::new().route("/queue", get(answer));
    tasks.spawn(async move {
        axum::serve(listener, router).await.ok();
    });
    Ok(url)
}

/// Nodes that have room for everything and renew their leases.
async fn nodes(client: &Client, tasks: &mut JoinSet<()>) -> Result<()> {
    let (nodes, leases): (Api<Node>, Api<Lease>) =
        (Api::all(client.clone()), Api::namespaced(client.clone(), "kube-node-lease"));
    let mut names = Vec::new();
    for number in 0..NODES {
        let name = format!("simulated-{number}");
        let room = json!({"cpu": "1000", "memory": "1000Gi", "pods": "2000", "ephemeral-storage": "1000Gi"});
        let node: Node = serde_json::from_value(json!({
            "metadata": {"name": name, "labels": {"bench": "yes"}},
            "status": {"capacity": room, "allocatable": room, "conditions": [
                {"type": "Ready", "status": "True", "reason": "Simulated", "message": ""}]},
        }))?;
        nodes.create(&PostParams::default(), &node).await?;
        nodes.patch_status(&name, &PatchParams::default(), &Patch::Merge(&json!({"status": node.status}))).await?;
        names.push(name);
    }
    let renew = async move |first: bool| {
        for name in &names {
            let lease: Lease = serde_json::from_value(json!({
                "metadata": {"name": name},
                "spec": {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": MicroTime(Timestamp::now())},
            }))?;
            if first {
                leases.create(&PostParams::default(), &lease).await?;
            } else {
                leases.patch(name, &PatchParams::default(), &Patch::Merge(&json!({"spec": lease.spec}))).await?;
            }
        }
        Ok::<_, anyhow::Error>(())
    };
    renew(true).await?;
    tasks.spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_secs(10)).await;
            if let Err(error) = renew(false).await {
                crate::say(&format!("a lease wasn't renewed: {error:#}"));
            }
        }
    });
    Ok(())
}

/// What the kubelets of those nodes do: a pod that is bound is up at once, and its runner waits for jobs.
async fn kubelets(client: Client, runners: Runners) -> Result<()> {
    let pods: Api<Pod> = Api::default_namespaced(client);
    let config = watcher::Config::default().labels("vmpod.dev/pool=burst");
    let events = watcher(pods.clone(), config).default_backoff().applied_objects();
    let bound = events.try_filter(|pod| {
        let waits = pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Pending");
        std::future::ready(waits && pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some()))
    });
    bound
        .map_err(anyhow::Error::from)
        .try_for_each_concurrent(AT_ONCE, |pod| {
            let (pods, runners) = (pods.clone(), Arc::clone(&runners));
            async move {
                let name = pod.name_any();
                let status = json!({"status": up(&Timestamp::now().to_string())});
                pods.patch_status(&name, &PatchParams::default(), &Patch::Strategic(status)).await?;
                runners.lock().unwrap_or_else(PoisonError::into_inner).insert(name, "idle");
                Ok(())
            }
        })
        .await
}

fn up(now: &str) -> Value {
    let condition = |kind: &str| json!({"type": kind, "status": "True", "lastTransitionTime": now});
    let conditions = ["Initialized", "ContainersReady", "Ready"].map(condition);
    json!({
        "phase": "Running", "podIP": "127.64.0.1", "startTime": now,
        "conditions": conditions,
        "containerStatuses": [{"name": "runner", "image": "debian:12", "imageID": "", "ready": true, "restartCount": 0,
            "state": {"running": {"startedAt": now}}}],
    })
}
