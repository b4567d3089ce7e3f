//! Volumes are in the guest before its main process, and follow their objects.

use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::{Home, eventually, pods};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn volumes_are_in_the_guest_and_follow_their_objects() -> Result<()> {
    let home = Home::with_tiny("volumes").await?;
    let up = home.up(&[]).await?;
    let map = |value: &str| {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "map", "namespace": "default"},
            "data": {"greeting": value}})
    };
    up.apply(&json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "secret", "namespace": "default"},
        "stringData": {"password": "hunter"}}))
        .await?;
    let mut pod = pods::tiny("volumes", &["sh", "-c", "cat /etc/map/greeting && echo && exec sleep 1000"]);
    pod["spec"]["volumes"] = json!([
        {"name": "map", "configMap": {"name": "map"}},
        {"name": "secret", "secret": {"secretName": "secret", "defaultMode": 0o400}},
        {"name": "scratch", "emptyDir": {}},
        {"name": "fast", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        {"name": "token", "projected": {"sources": [
            {"serviceAccountToken": {"path": "token"}},
            {"downwardAPI": {"items": [{"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}}]}},
    ]);
    pod["spec"]["containers"][0]["volumeMounts"] = json!([
        {"name": "map", "mountPath": "/etc/map"},
        {"name": "map", "mountPath": "/etc/one file", "subPath": "greeting"},
        {"name": "secret", "mountPath": "/secret"},
        {"name": "scratch", "mountPath": "/scratch", "subPath": "a/b"},
        {"name": "fast", "mountPath": "/fast"},
        {"name": "token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"},
    ]);
    // The pod waits for an object that isn't there, and says so.
    up.apply(&pod).await?;
    eventually("a FailedMount event", async || {
        let events = up.kubectl_ok(&["get", "events"]).await?;
        ensure!(events.contains("FailedMount") && events.contains("configmap \"map\" not found"), "{events}");
        Ok(())
    })
    .await?;
    up.apply(&map("hello")).await?;
    up.wait_ready("volumes").await?;
    eventually("the main process's word", async || {
        let log = up.kubectl_ok(&["logs", "volumes"]).await?;
        ensure!(log == "hello\n", "{log:?}");
        Ok(())
    })
    .await?;

    let sh = async |script: &str| up.kubectl(&["exec", "volumes", "--", "sh", "-c", script]).await?.ok();
    let seen = sh("cat '/etc/one file' /secret/password; stat -L -c ' %a' /secret/password").await?;
    ensure!(seen == "hellohunter 400\n", "{seen:?}");
    let claims = sh("cd /var/run/secrets/kubernetes.io/serviceaccount; cut -c1-2 token; cat name").await?;
    ensure!(claims == "ey\nvolumes", "{claims:?}");
    sh("echo x >/scratch/f; echo y >/fast/f; ! (echo z >/etc/map/new) 2>/dev/null").await?;
    let full = sh("dd if=/dev/zero of=/fast/big bs=1024 count=4096 2>/dev/null || echo full").await?;
    ensure!(full == "full\n", "{full:?}");

    // An update arrives; a subPath keeps what it had.
    up.apply(&map("changed")).await?;
    let began = tokio::time::Instant::now();
    eventually("the update", async || {
        let text = sh("cat /etc/map/greeting").await?;
        ensure!(text == "changed", "{text:?}");
        Ok(())
    })
    .await?;
    ensure!(began.elapsed() < Duration::from_secs(90), "the update took {:?}", began.elapsed());
    let old = sh("cat '/etc/one file'; cat /scratch/f").await?;
    ensure!(old == "hellox\n", "{old:?}");
    up.kubectl_ok(&["delete", "pod", "volumes"]).await?;
    home.assert_clean().await?;
    up.stop().await
}
