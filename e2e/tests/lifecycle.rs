//! `vmpod up` comes, goes, crashes and comes back; machines follow its rules.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::{Home, Up, eventually, leaks, pods};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, ResourceExt as _};
use rustix::process::Signal;

#[tokio::test(flavor = "multi_thread")]
async fn a_second_up_on_the_same_home_is_refused() -> Result<()> {
    let home = Home::new("second")?;
    let up = home.up(&[]).await?;
    let pid = up.pid().context("it ended")?.to_string();
    let second = home.vmpod(&["up", "--api-port", "0", "--kubelet-port", "0"]).await?;
    let second = second.expect_code(1)?.expect_failure("in use by `vmpod up`")?;
    ensure!(second.stderr.contains(&pid), "{second}");
    let config = up.kubeconfig().to_string_lossy().into_owned();
    let node = home.vmpod(&["node", "--kubeconfig", &config, "--name", "n", "--kubelet-port", "0"]).await?;
    node.expect_code(1)?.expect_failure("in use by `vmpod up`")?;
    // The first goes on as if nothing had been.
    up.kubectl_ok(&["get", "nodes"]).await?;
    up.stop().await?;
    home.assert_no_process()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_named_with_its_holder() -> Result<()> {
    let home = Home::new("port")?;
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = taken.local_addr()?.port().to_string();
    for (args, option) in [
        (["up", "--api-port", port.as_str(), "--kubelet-port", "0"], "--api-port"),
        (["up", "--api-port", "0", "--kubelet-port", port.as_str()], "--kubelet-port"),
    ] {
        let refused = home.vmpod(&args).await?.expect_code(1)?.expect_failure(&format!("port {port} is in use"))?;
        ensure!(refused.stderr.contains(option), "{refused}");
        ensure!(refused.stderr.contains(&std::process::id().to_string()), "{refused}");
        ensure!(refused.took < Duration::from_secs(20), "{refused}");
    }
    home.assert_no_process()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_stops_the_machines() -> Result<()> {
    let home = Home::with_tiny("interrupt").await?;
    let up = home.up(&[]).await?;
    up.apply(&pods::tiny("one", &[])).await?;
    up.wait_ready("one").await?;
    ensure!(home.hypervisors() == 1);
    up.stop().await?;
    home.assert_no_process()
}

#[tokio::test(flavor = "multi_thread")]
async fn kept_machines_are_taken_over_by_the_next_up() -> Result<()> {
    let home = Home::with_tiny("keep").await?;
    let up = home.up(&["--keep-vms"]).await?;
    up.apply(&pods::tiny("kept", &["sh", "-c", "i=0; while true; do echo tick $i; i=$((i+1)); sleep 1; done"])).await?;
    up.wait_ready("kept").await?;
    let boot = up.kubectl_ok(&["exec", "kept", "--", "cat", "/proc/sys/kernel/random/boot_id"]).await?;
    let before = up.pod("kept").await?;
    let process = leaks::hypervisors(home.path());
    ensure!(process.len() == 1, "{process:?}");
    up.stop().await?;
    ensure!(leaks::hypervisors(home.path()) == process, "the machine didn't stay");

    let up = home.up(&["--keep-vms"]).await?;
    up.wait_ready("kept").await?;
    ensure!(leaks::hypervisors(home.path()) == process, "the machine isn't the same");
    let again = up.kubectl_ok(&["exec", "kept", "--", "cat", "/proc/sys/kernel/random/boot_id"]).await?;
    ensure!(again == boot, "the guest has booted again");
    let after = up.pod("kept").await?;
    ensure!(after["metadata"]["uid"] == before["metadata"]["uid"]);
    ensure!(after["status"]["containerStatuses"][0]["restartCount"] == 0, "{}", after["status"]);
    ensure!(after["status"]["startTime"] == before["status"]["startTime"], "{}", after["status"]);
    // No line was lost or told twice while nobody was there.
    eventually("the log goes on", || async {
        let log = up.kubectl_ok(&["logs", "kept"]).await?;
        let ticks: Vec<&str> = log.lines().collect();
        for (i, line) in ticks.iter().enumerate() {
            ensure!(*line == format!("tick {i}"), "line {i} is {line:?}");
        }
        ensure!(ticks.len() > 5, "{} lines", ticks.len());
        Ok(())
    })
    .await?;
    up.kubectl_ok(&["delete", "pod", "kept", "--timeout=60s"]).await?;
    home.assert_clean().await?;
    up.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_up_loses_neither_machine_nor_exit_code() -> Result<()> {
    let home = Home::with_tiny("killed").await?;
    let up = home.up(&[]).await?;
    up.apply(&pods::tiny("stays", &[])).await?;
    up.apply(&pods::tiny("ends", &["sh", "-c", "echo working; sleep 6; echo done; exit 9"])).await?;
    up.wait_ready("stays").await?;
    up.wait_ready("ends").await?;
    let machine = leaks::hypervisors(home.path());
    up.kill().await?;
    // One ends while nobody looks.
    tokio::time::sleep(Duration::from_secs(8)).await;

    let up = home.up(&[]).await?;
    up.wait_for("ends", "jsonpath={.status.phase}=Failed").await?;
    let ended = up.pod("ends").await?;
    ensure!(pods::state(&ended)["terminated"]["exitCode"] == 9, "{}", ended["status"]);
    let log = up.kubectl_ok(&["logs", "ends"]).await?;
    ensure!(log == "working\ndone\n", "{log:?}");
    up.wait_ready("stays").await?;
    let left = leaks::hypervisors(home.path());
    ensure!(left.len() == 1 && left.is_subset(&machine), "{left:?} of {machine:?}");
    up.kubectl_ok(&["exec", "stays", "--", "true"]).await?;
    up.kubectl_ok(&["delete", "pod", "stays", "ends", "--timeout=60s"]).await?;
    home.assert_clean().await?;
    up.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_sees_every_change_over_tls() -> Result<()> {
    let home = Home::new("watch")?;
    let up = home.up(&[]).await?;
    let client = up.client().await?;
    let api: Api<ConfigMap> = Api::namespaced(client, "default");
    let config = watcher::Config::default().labels("watched=yes");
    let mut events = std::pin::pin!(watcher(api.clone(), config).default_backoff().applied_objects());

    let made = ConfigMap {
        metadata: ObjectMeta {
            name: Some("w".into()),
            labels: Some([("watched".into(), "yes".into())].into()),
            ..ObjectMeta::default()
        },
        ..ConfigMap::default()
    };
    let next = |seconds: u64| Duration::from_secs(seconds);
    // The watch begins before the object is there.
    ensure!(tokio::time::timeout(next(2), events.next()).await.is_err(), "an event came of nothing");
    api.create(&PostParams::default(), &made).await?;
    let seen = tokio::time::timeout(next(20), events.try_next()).await??.context("the watch ended")?;
    ensure!(seen.name_any() == "w");
    for n in 0..20 {
        let patch = serde_json::json!({"data": {"n": n.to_string()}});
        api.patch("w", &PatchParams::default(), &Patch::Merge(&patch)).await?;
    }
    let mut last = seen;
    while last.data.as_ref().and_then(|data| data.get("n")).map(String::as_str) != Some("19") {
        let seen = tokio::time::timeout(next(20), events.try_next()).await??.context("the watch ended")?;
        ensure!(seen.resource_version() != last.resource_version(), "an event came twice");
        last = seen;
    }
    // A stale write is refused.
    let mut stale = api.get("w").await?;
    let patch = serde_json::json!({"data": {"n": "20"}});
    api.patch("w", &PatchParams::default(), &Patch::Merge(&patch)).await?;
    stale.data = None;
    match api.replace("w", &PostParams::default(), &stale).await {
        Err(kube::Error::Api(status)) => ensure!(status.code == 409, "{status:?}"),
        other => anyhow::bail!("a stale write gave {other:?}"),
    }
    up.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn another_hosts_node_joins() -> Result<()> {
    let first = Home::new("api")?;
    let up = first.up(&["--name", "first"]).await?;
    let second = Home::with_tiny("joined").await?;
    second_joins(&up, &second, up.kubeconfig(), &[]).await?;
    up.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_joins_with_a_bootstrap_token() -> Result<()> {
    let first = Home::new("api")?;
    let up = first.up(&["--name", "first"]).await?;
    let second = Home::with_tiny("bootstrapped").await?;
    let (bootstrap, own) = (second.path().join("bootstrap"), second.path().join("own"));
    std::fs::write(&bootstrap, first.vmpod(&["token", "create", "--kubeconfig"]).await?.ok()?)?;
    let bootstrap = bootstrap.to_string_lossy();
    let said = ["--node-label", "rack=7", "--taint", "far=yes:PreferNoSchedule", "--bootstrap-kubeconfig", &bootstrap];
    second_joins(&up, &second, &own, &said).await?;
    let path = "jsonpath={.metadata.labels.rack} {.spec.taints[*].key}";
    let shown = up.kubectl_ok(&["get", "node", "second", "-o", path]).await?;
    ensure!(shown.starts_with("7 far"), "{shown}");
    // What it keeps is its own identity, and not the token.
    let kept = std::fs::read_to_string(&own)?;
    ensure!(kept.contains("system:node:second") && !kept.contains("token"), "{kept}");
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&own)?) & 0o777;
    ensure!(mode == 0o600, "{mode:o}");
    up.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nodes_certificates_are_renewed_while_it_works() -> Result<()> {
    let first = Home::new("api")?;
    let up = first.up(&["--name", "first"]).await?;
    let second = Home::with_tiny("renewed").await?;
    let (bootstrap, own) = (second.path().join("bootstrap"), second.path().join("own"));
    std::fs::write(&bootstrap, first.vmpod(&["token", "create", "--kubeconfig"]).await?.ok()?)?;
    let mut node = second.command()?;
    node.args(["node", "--name", "second", "--kubelet-port", "0", "--snapshots", "0", "--renew-certificates", "5s"]);
    node.args(["--eviction-hard", ""]);
    node.arg("--request-serving-certificate")
        .arg("--bootstrap-kubeconfig")
        .arg(&bootstrap)
        .arg("--kubeconfig")
        .arg(&own);
    let log = second.path().with_extension("log");
    let mut node = node.kill_on_drop(true).stderr(std::fs::File::create(&log)?).spawn()?;
    let work = async {
        eventually("the node is ready", || async {
            up.kubectl_ok(&["wait", "node/second", "--for=condition=Ready", "--timeout=20s"]).await.map(drop)
        })
        .await?;
        let identity = std::fs::read_to_string(&own)?;
        let mut pod = pods::tiny("there", &[]);
        pod["spec"]["nodeName"] = "second".into();
        up.apply(&pod).await?;
        up.wait_ready("there").await?;

        // The kubelet API shows what the cluster signed, once somebody approves it; what it showed before it had made itself.
        let shown =
            ["get", "node", "second", "-o", "jsonpath={.metadata.annotations.vmpod\\.dev/kubelet-certificate-sha256}"];
        let before = up.kubectl_ok(&shown).await?;
        let certificate = second.path().join("node/pki/cluster.crt");
        eventually("the cluster signs the kubelet API's certificate", || async {
            let list = up.kubectl_ok(&["get", "csr", "-o", "json"]).await?;
            let list: serde_json::Value = serde_json::from_str(&list)?;
            let all = list["items"].as_array().into_iter().flatten();
            let mut serving = all.filter(|csr| csr["spec"]["signerName"] == "kubernetes.io/kubelet-serving");
            let one = serving.next().context("none was asked for")?;
            ensure!(one["spec"]["username"] == "system:node:second", "{one}");
            let name = one["metadata"]["name"].as_str().unwrap_or_default();
            up.kubectl_ok(&["certificate", "approve", name]).await?;
            ensure!(certificate.exists(), "it isn't signed yet");
            let now = up.kubectl_ok(&shown).await?;
            ensure!(now != before, "another is shown");
            Ok(())
        })
        .await?;

        // The identity is another one, kept, and the node's work goes on with it.
        eventually("the identity is renewed", || async {
            let now = std::fs::read_to_string(&own)?;
            ensure!(now != identity && now.contains("system:node:second"), "it is the first one");
            Ok(())
        })
        .await?;
        let name = up.kubectl_ok(&["exec", "there", "--", "hostname"]).await?;
        ensure!(name.trim() == "there", "{name:?}");
        let mut later = pods::tiny("later", &["sh", "-c", "exit 3"]);
        later["spec"]["nodeName"] = "second".into();
        up.apply(&later).await?;
        eventually("a pod of afterwards runs", || async {
            let phase = up.kubectl_ok(&["get", "pod", "later", "-o", "jsonpath={.status.phase}"]).await?;
            ensure!(phase == "Failed", "{phase}");
            Ok(())
        })
        .await?;
        up.kubectl_ok(&["delete", "pod", "there", "later", "--timeout=60s"]).await?;
        second.assert_clean().await
    };
    if let Err(error) = work.await {
        return Err(error).with_context(|| std::fs::read_to_string(&log).unwrap_or_default());
    }
    node.kill().await?;
    up.stop().await
}

/// Joins a host as the node `second`, runs a pod on it, and ends it in order.
async fn second_joins(up: &Up, second: &Home, kubeconfig: &Path, said: &[&str]) -> Result<()> {
    let log = second.path().with_extension("log");
    let mut node = second.command()?;
    node.args(["node", "--name", "second", "--kubelet-port", "0", "--snapshots", "0", "--eviction-hard", ""])
        .args(said);
    node.arg("--kubeconfig").arg(kubeconfig);
    let mut node = node.kill_on_drop(true).stderr(std::fs::File::create(&log)?).spawn()?;
    let result = on_second(up, second).await;
    if result.is_err() {
        let log = std::fs::read_to_string(&log)?;
        return result.with_context(|| format!("log of vmpod node:\n{log}"));
    }
    let pid = node.id().and_then(|pid| i32::try_from(pid).ok()).and_then(rustix::process::Pid::from_raw);
    rustix::process::kill_process(pid.context("the node ended")?, Signal::TERM)?;
    let status = tokio::time::timeout(Duration::from_mins(1), node.wait()).await.context("the node didn't end")??;
    ensure!(status.code() == Some(0), "{status}");
    second.assert_no_process()
}

async fn on_second(up: &Up, second: &Home) -> Result<()> {
    eventually("the node is ready", || async {
        up.kubectl_ok(&["wait", "node/second", "--for=condition=Ready", "--timeout=20s"]).await.map(drop)
    })
    .await?;
    let mut pod = pods::tiny("there", &[]);
    pod["spec"]["nodeName"] = "second".into();
    up.apply(&pod).await?;
    up.wait_ready("there").await?;
    ensure!(second.hypervisors() == 1, "the machine runs elsewhere");
    let name = up.kubectl_ok(&["exec", "there", "--", "hostname"]).await?;
    ensure!(name.trim() == "there", "{name:?}");
    let pods: Api<Pod> = Api::namespaced(up.client().await?, "default");
    ensure!(pods.get("there").await?.spec.and_then(|spec| spec.node_name).as_deref() == Some("second"));
    up.kubectl_ok(&["delete", "pod", "there", "--timeout=60s"]).await?;
    second.assert_clean().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_of_manifests_is_what_the_api_has() -> Result<()> {
    let home = Home::with_tiny("apply").await?;
    let dir = home.path().with_extension("manifests");
    std::fs::create_dir_all(dir.join("runners"))?;
    let file = |name: &str| dir.join(name);
    let map = |value: &str| {
        format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: settings}}\ndata: {{colour: {value}}}\n")
    };
    std::fs::write(file("settings.yaml"), map("red"))?;
    std::fs::write(file("runners/pod.json"), pods::tiny("kept", &[]).to_string())?;
    // A kind that is there only once the fleet's operator has made it.
    let pool = "apiVersion: vmpod.dev/v1alpha1\nkind: RunnerPool\nmetadata: {name: later, namespace: default}\nspec:\n  image: tiny\n  \
                userData: '#!/bin/sh'\n  provider: {http: {url: \"http://127.0.0.1:9/queue\"}}\n  scale: {max: 1}\n";
    std::fs::write(file("runners/pool.yaml"), pool)?;
    let said = ["--fleet-poll", "1s", "--apply", &dir.to_string_lossy()].map(ToOwned::to_owned);
    let said: Vec<&str> = said.iter().map(String::as_str).collect();
    let up = home.up(&said).await?;
    let colour = ["get", "configmap", "settings", "-o", "jsonpath={.data.colour}"];
    let is = async |wanted: &str| {
        eventually(&format!("the colour is {wanted:?}"), || async {
            let now = up.kubectl_ok(&colour).await?;
            ensure!(now == wanted, "{now}");
            Ok(())
        })
        .await
    };
    is("red").await?;
    up.wait_ready("kept").await?;
    eventually("the pool is there", || async { up.kubectl_ok(&["get", "runnerpool", "later"]).await.map(drop) })
        .await?;

    // A change is followed; a file that can't be read changes nothing of what it said, and nothing is removed for it.
    std::fs::write(file("settings.yaml"), map("green"))?;
    is("green").await?;
    std::fs::write(file("settings.yaml"), "apiVersion: [\n")?;
    std::fs::remove_file(file("runners/pool.yaml"))?;
    eventually("the fault is told", || async {
        ensure!(up.log().contains("settings.yaml"), "not yet");
        Ok(())
    })
    .await?;
    up.kubectl_ok(&["get", "runnerpool", "later"]).await?;
    is("green").await?;

    // What no manifest has any more goes, and what others made stays; also when nobody looked meanwhile.
    up.kubectl_ok(&["create", "configmap", "anothers"]).await?;
    std::fs::write(file("settings.yaml"), map("blue"))?;
    is("blue").await?;
    eventually("the pool is gone", || async {
        let found = up.kubectl(&["get", "runnerpool", "later"]).await?;
        ensure!(found.code != Some(0), "it is there");
        Ok(())
    })
    .await?;
    up.stop().await?;
    std::fs::remove_file(file("runners/pod.json"))?;
    let up = home.up(&said).await?;
    eventually("the pod is gone", || async {
        let found = up.kubectl_ok(&["get", "pods", "-o", "name"]).await?;
        ensure!(found.trim().is_empty(), "{found}");
        Ok(())
    })
    .await?;
    up.kubectl_ok(&["get", "configmap", "anothers"]).await?;
    up.stop().await?;
    home.assert_clean().await
}
