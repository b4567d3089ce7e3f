//! A real distribution, prepared by cloud-init.

use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::prerequisites;
use e2e::{Home, eventually_within};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn debian_gets_its_name_and_key_by_cloud_init() -> Result<()> {
    let home = Home::new("debian")?;
    home.import(&prerequisites::debian()?, "debian:12").await?;
    let up = home.up(&[]).await?;
    up.apply(&json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "bookworm",
            "annotations": {"vmpod.dev/user-data": "#cloud-config\nwrite_files:\n- {path: /root/told, content: by cloud-init}\n"},
        },
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 20,
            "containers": [{
                "name": "machine",
                "image": "debian:12",
                "imagePullPolicy": "Never",
                "resources": {"requests": {"cpu": "2", "memory": "768Mi", "ephemeral-storage": "3Gi"}},
            }],
        },
    }))
    .await?;
    eventually_within(Duration::from_mins(5), "Debian answers", || async {
        up.kubectl_ok(&["wait", "pod/bookworm", "--for=condition=Ready", "--timeout=100s"]).await.map(drop)
    })
    .await?;

    let exec = |words: &'static [&'static str]| {
        let args: Vec<&str> = ["exec", "bookworm", "--"].iter().chain(words).copied().collect();
        let command = up.kubectl_command(&args);
        async move { e2e::run(command?, None, Duration::from_secs(150)).await }
    };
    ensure!(exec(&["hostname"]).await?.ok()?.trim() == "bookworm");
    // 0 means running; anything else, such as degraded, is a failure and is told.
    let running = exec(&["systemctl", "is-system-running", "--wait"]).await?;
    if running.code != Some(0) {
        let failed = exec(&["systemctl", "--failed", "--no-pager"]).await?;
        anyhow::bail!("{running}\n{failed}");
    }
    ensure!(running.stdout.trim() == "running", "{running}");
    let status = exec(&["cloud-init", "status", "--wait"]).await?.ok()?;
    ensure!(status.contains("done"), "{status}");
    ensure!(exec(&["cat", "/root/told"]).await?.ok()? == "by cloud-init");
    let keys = exec(&["cat", "/root/.ssh/authorized_keys"]).await?.ok()?;
    ensure!(keys.contains("ssh-ed25519"), "{keys:?}");
    // The disk was grown to what the pod asked for.
    let size = exec(&["sh", "-c", "lsblk -bdno SIZE $(findmnt -no SOURCE / | sed 's/[0-9]*$//')"]).await?;
    if let Ok(bytes) = size.stdout.trim().parse::<u64>() {
        ensure!(bytes == 3 << 30, "the disk has {bytes} bytes");
    }

    up.kubectl_ok(&["delete", "pod", "bookworm", "--timeout=90s"]).await?;
    home.assert_clean().await?;
    up.stop().await?;
    home.assert_no_process()
}

fn copy(name: &str, user_data: Option<&str>) -> serde_json::Value {
    let mut annotations = json!({"vmpod.dev/start": "snapshot"});
    if let Some(user_data) = user_data {
        annotations["vmpod.dev/user-data"] = json!(user_data);
    }
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "machine",
                "image": "debian:12",
                "imagePullPolicy": "Never",
                "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"cpu": "2"}},
            }],
        },
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_of_a_booted_debian_are_systems_of_their_own() -> Result<()> {
    let home = Home::new("debian-copies")?;
    home.import(&prerequisites::debian()?, "debian:12").await?;
    let up = home.up(&["--snapshots", "4Gi"]).await?;
    let script = "#cloud-config\nruncmd: [[touch, /root/told]]\n";
    // The first has the snapshot made, and both go on from it.
    for (name, data) in [("one", None), ("two", Some(script))] {
        up.apply(&copy(name, data)).await?;
        eventually_within(Duration::from_mins(5), "a copy answers", || async {
            let pod = format!("pod/{name}");
            up.kubectl_ok(&["wait", &pod, "--for=condition=Ready", "--timeout=100s"]).await.map(drop)
        })
        .await?;
        up.event(name, "SnapshotUsed").await?;
    }
    let says = |pod: &'static str, command: &'static str| {
        let command = up.kubectl_command(&["exec", pod, "--", "sh", "-c", command]);
        async move { e2e::run(command?, None, Duration::from_secs(100)).await?.ok() }
    };
    for what in [
        "cat /etc/machine-id",
        "cat /etc/ssh/ssh_host_ed25519_key.pub",
        "cat /sys/class/net/e*/address",
        "head -c 32 /dev/urandom | sha256sum",
        "cat /root/.ssh/authorized_keys",
        "hostname",
    ] {
        let (one, two) = (says("one", what).await?, says("two", what).await?);
        ensure!(!one.trim().is_empty() && one != two, "{what} is shared: {one:?}");
    }
    ensure!(says("two", "hostname").await?.trim() == "two");
    says("one", "echo mine >/root/mine && sync").await?;
    ensure!(!says("two", "ls /root").await?.contains("mine"), "the disk is shared");
    let seconds: i64 = says("one", "date +%s").await?.trim().parse()?;
    let now = jiff::Timestamp::now().as_second();
    ensure!((now - 5..=now + 1).contains(&seconds), "the guest's clock says {seconds}, and it is {now}");
    // User data of a copy is cloud-init's as ever, a while after the machine is ready.
    eventually_within(Duration::from_mins(2), "user data was carried out", || async {
        says("two", "test -e /root/told").await.map(drop)
    })
    .await?;
    for name in ["one", "two"] {
        up.kubectl_ok(&["delete", "pod", name, "--timeout=90s"]).await?;
    }
    home.assert_clean().await?;
    up.stop().await?;
    home.assert_no_process()
}
