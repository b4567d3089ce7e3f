//! Probes and hooks in a real guest.

use anyhow::{Result, ensure};
use e2e::{Home, eventually, pods};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_probed_and_restarted() -> Result<()> {
    let home = Home::with_tiny("probes").await?;
    let up = home.up(&[]).await?;
    let mut pod = pods::tiny("probed", &["sh", "-c", "mkdir -p /www && exec httpd -f -p 8080 -h /www"]);
    pod["spec"]["restartPolicy"] = "Always".into();
    let vm = &mut pod["spec"]["containers"][0];
    vm["ports"] = json!([{"name": "web", "containerPort": 8080}]);
    let probe = |what: serde_json::Value| {
        let mut probe = json!({"periodSeconds": 1, "timeoutSeconds": 10, "failureThreshold": 2});
        for (key, value) in what.as_object().into_iter().flatten() {
            probe[key] = value.clone();
        }
        probe
    };
    vm["startupProbe"] = probe(json!({"tcpSocket": {"port": "web"}, "failureThreshold": 60}));
    vm["readinessProbe"] = probe(json!({"httpGet": {"port": "web", "path": "/healthz"}, "failureThreshold": 1}));
    vm["livenessProbe"] = probe(json!({"exec": {"command": ["test", "!", "-e", "/tmp/dead"]}}));
    vm["lifecycle"] = json!({"postStart": {"exec": {"command": ["sh", "-c", "echo up >/tmp/hooked"]}}});
    up.apply(&pod).await?;

    let status = |path: &'static str| {
        let path = format!("jsonpath={{.status.containerStatuses[0].{path}}}");
        let up = &up;
        async move { up.kubectl_ok(&["get", "pod", "probed", "-o", &path]).await }
    };
    let sh = async |script: &str| up.kubectl(&["exec", "probed", "--", "sh", "-c", script]).await?.ok();
    eventually("the startup probe passes", || async {
        let started = status("started").await?;
        ensure!(started == "true", "{started}");
        Ok(())
    })
    .await?;
    eventually("the missing page is told of", || async {
        let events = up.kubectl_ok(&["get", "events"]).await?;
        let told = events.contains("Readiness probe failed: HTTP probe failed with statuscode: 404");
        ensure!(told, "{events}");
        Ok(())
    })
    .await?;
    ensure!(status("ready").await? == "false", "ready without the page it is asked for");
    sh("echo ok >/www/healthz && cat /tmp/hooked").await?;
    up.wait_ready("probed").await?;

    // A guest that isn't well is replaced by another one, which has none of its files.
    sh("touch /tmp/dead").await?;
    eventually("a restart", || async {
        let count = status("restartCount").await?;
        ensure!(count == "1", "{count}");
        Ok(())
    })
    .await?;
    let events = up.kubectl_ok(&["get", "events"]).await?;
    ensure!(events.contains("Container machine failed liveness probe, will be restarted"), "{events}");
    eventually("the next one starts", || async {
        let started = status("started").await?;
        ensure!(started == "true", "{started}");
        Ok(())
    })
    .await?;
    sh("test ! -e /tmp/dead && test ! -e /www/healthz && cat /tmp/hooked").await?;
    up.kubectl_ok(&["delete", "pod", "probed", "--timeout=60s"]).await?;
    home.assert_clean().await?;
    up.stop().await
}
