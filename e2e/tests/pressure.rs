//! A node that runs short: a real disk that is really full, real machines.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::namespace::{in_namespace, sh};
use e2e::{Home, Up, eventually, eventually_within, pods, prerequisites};
use serde_json::Value;

async fn condition(up: &Up, kind: &str) -> Result<String> {
    let path = format!("jsonpath={{.items[0].status.conditions[?(@.type=='{kind}')].status}}");
    up.kubectl_ok(&["get", "nodes", "-o", &path]).await
}

async fn told(up: &Up, kind: &str, status: &str) -> Result<()> {
    eventually_within(Duration::from_secs(40), "the Node tells it", || async {
        let shown = condition(up, kind).await?;
        ensure!(shown == status, "{kind} is {shown}");
        Ok(())
    })
    .await
}

async fn evicted(up: &Up, pod: &str, of: &str) -> Result<()> {
    eventually_within(Duration::from_mins(1), "it is evicted", || async {
        let status = &up.pod(pod).await?["status"];
        ensure!(status["phase"] == "Failed" && status["reason"] == "Evicted", "{status:#}");
        let message = status["message"].as_str().context("no message")?;
        ensure!(message.starts_with(&format!("The node was low on resource: {of}. Threshold quantity: ")), "{message}");
        let conditions = status["conditions"].as_array().context("no conditions")?;
        let target = conditions.iter().find(|one| one["type"] == "DisruptionTarget").context("no DisruptionTarget")?;
        ensure!(target["status"] == "True" && target["reason"] == "TerminationByKubelet", "{target}");
        ensure!(pods::state(&up.pod(pod).await?)["terminated"]["exitCode"] == 137, "{status:#}");
        Ok(())
    })
    .await?;
    let event = up.event(pod, "Evicted").await?;
    ensure!(event.contains("low on resource"), "{event}");
    Ok(())
}

#[test]
fn a_node_that_runs_short_ends_pods_and_recovers() -> Result<()> {
    in_namespace("a_node_that_runs_short_ends_pods_and_recovers", async {
        let home = Home::new("pressure")?;
        // A disk of its own; it is gone with this namespace.
        sh(&format!("mount -t tmpfs -o size=512m,mode=700 tmpfs '{}'", home.path().display())).await?;
        home.import(&prerequisites::tiny()?, "tiny").await?;
        let disk = ["--eviction-hard", "nodefs.available<30%", "--eviction-pressure-transition-period", "1s"];
        let up = home.up(&disk).await?;
        ensure!(condition(&up, "DiskPressure").await? == "False");
        // One said how much it needs and keeps to it; the other would always run again.
        let mut modest = pods::tiny("modest", &[]);
        modest["spec"]["containers"][0]["resources"]["requests"]["ephemeral-storage"] = "50Mi".into();
        let mut other = pods::tiny("other", &[]);
        other["spec"]["restartPolicy"] = "Always".into();
        for pod in [&modest, &other] {
            up.apply(pod).await?;
        }
        for name in ["modest", "other"] {
            up.wait_ready(name).await?;
        }

        let full = home.path().join("full");
        sh(&format!("head -c 380000000 /dev/zero >'{}'", full.display())).await?;
        evicted(&up, "other", "ephemeral-storage").await?;
        told(&up, "DiskPressure", "True").await?;
        let third = pods::tiny("third", &[]);
        up.apply(&third).await?;
        let event = eventually("it waits for room", || up.event("third", "FailedScheduling")).await?;
        ensure!(event.contains("untolerated taint {node.kubernetes.io/disk-pressure: }"), "{event}");
        // There is room again before the next one has to go.
        std::fs::remove_file(&full)?;
        told(&up, "DiskPressure", "False").await?;
        up.wait_ready("third").await?;
        let modest: Value = up.pod("modest").await?;
        ensure!(pods::phase(&modest) == "Running" && modest["status"]["containerStatuses"][0]["restartCount"] == 0);
        let nodes = up.kubectl_ok(&["get", "events", "-o", "jsonpath={.items[*].reason}"]).await?;
        for reason in ["NodeHasDiskPressure", "EvictionThresholdMet", "NodeHasNoDiskPressure"] {
            ensure!(nodes.contains(reason), "no {reason} in {nodes}");
        }

        // More memory than there is on any host: an agent that comes back finds the node short of it.
        up.kill().await?;
        let up = home.up(&["--eviction-hard", "memory.available<1000Ti"]).await?;
        told(&up, "MemoryPressure", "True").await?;
        for name in ["modest", "third"] {
            evicted(&up, name, "memory").await?;
        }
        up.kubectl_ok(&["delete", "pods", "--all", "--timeout=60s"]).await?;
        home.assert_clean().await?;
        up.stop().await
    })
}

#[tokio::test]
async fn a_threshold_that_is_none_is_told_at_once() -> Result<()> {
    let home = Home::new("threshold")?;
    let refused = home.vmpod(&["up", "--eviction-hard", "memory<1Gi"]).await?;
    refused.expect_code(2)?;
    Ok(())
}
