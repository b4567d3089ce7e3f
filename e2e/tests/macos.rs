//! Pods of a Mac's node, with a stand-in for Apple's framework: its helper, its slots, its networks' leases, its images.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use e2e::leaks;
use e2e::namespace::in_namespace;
use e2e::prerequisites::vz_stand_in;
use e2e::{Home, Up, eventually, eventually_within};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// The SHA-256 of some bytes, in hexadecimal digits.
fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    for byte in Sha256::digest(bytes) {
        write!(text, "{byte:02x}").ok();
    }
    text
}

/// A Tart image in an OCI layout, written from the format's description: a disk in one chunk of Apple's LZ4 framing, uncompressed.
fn tart_image(dir: &Path) -> Result<()> {
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs)?;
    let blob = |media_type: &str, bytes: &[u8], annotations: Value| -> Result<Value> {
        let digest = hex(bytes);
        std::fs::write(blobs.join(&digest), bytes)?;
        Ok(json!({
            "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len(), "annotations": annotations
        }))
    };
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let disk: Vec<u8> = (0..1_u32 << 20).map(|at| u8::try_from(at % 251).unwrap_or(0)).collect();
    let mut chunk = b"bv4-".to_vec();
    chunk.extend(u32::try_from(disk.len())?.to_le_bytes());
    chunk.extend(&disk);
    chunk.extend(b"bv4$");
    let raw = hex(&disk);
    let told = json!({
        "version": 1, "os": "darwin", "arch": architecture, "cpuCountMin": 1, "memorySizeMin": 1 << 28,
        "ecid": BASE64_STANDARD.encode(b"a machine identifier"), "hardwareModel": BASE64_STANDARD.encode(b"a hardware model"),
        "macAddress": "7e:1a:2b:3c:4d:5e", "display": {"width": 1024, "height": 768},
    });
    let none = json!({});
    let config = json!({"architecture": architecture, "os": "darwin", "config": {"Labels": {}}});
    let config = blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes(), none.clone())?;
    let layers = [
        blob("application/vnd.cirruslabs.tart.config.v1", told.to_string().as_bytes(), none.clone())?,
        blob(
            "application/vnd.cirruslabs.tart.disk.v2",
            &chunk,
            json!({
                "org.cirruslabs.tart.uncompressed-size": disk.len().to_string(),
                "org.cirruslabs.tart.uncompressed-content-digest": format!("sha256:{raw}"),
            }),
        )?,
        blob("application/vnd.cirruslabs.tart.nvram.v1", &vec![7; 4096], none.clone())?,
    ];
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": layers,
        "annotations": {"org.cirruslabs.tart.uncompressed-disk-size": disk.len().to_string()},
    });
    let manifest = blob("application/vnd.oci.image.manifest.v1+json", manifest.to_string().as_bytes(), none)?;
    std::fs::write(dir.join("index.json"), json!({"schemaVersion": 2, "manifests": [manifest]}).to_string())?;
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(())
}

fn pod(name: &str, policy: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "annotations": {"vmpod.dev/guest-login-secret": "login"}},
        "spec": {
            "restartPolicy": policy, "terminationGracePeriodSeconds": 30,
            "containers": [{
                "name": "mac", "image": "sequoia", "imagePullPolicy": "Never",
                "resources": {"requests": {"cpu": "250m", "memory": "256Mi"}},
            }],
        },
    })
}

struct Mac {
    home: Home,
    args: Vec<String>,
}

impl Mac {
    async fn new(name: &str) -> Result<Self> {
        let home = Home::new(name)?;
        let vmnet = home.path().join("vmnet");
        std::fs::create_dir_all(&vmnet)?;
        // The key with which the guests' user is known beforehand, as on an image that somebody set up.
        let keys = vmpod_machine::Machines::open(
            vmnet.join("keys"),
            std::sync::Arc::new(vmpod_machine::qemu::Qemu::default()),
        )?;
        let key = keys.ssh_key(&vmpod_machine::MachineId::parse("key")?)?;
        std::fs::write(vmnet.join("authorized_keys"), &key.public)?;
        std::fs::copy(&key.path, vmnet.join("id"))?;
        tart_image(&home.path().join("image"))?;
        home.import(&home.path().join("image"), "sequoia").await?;
        let leases = vmnet.join("leases").to_string_lossy().into_owned();
        let helper = vz_stand_in()?.to_string_lossy().into_owned();
        let args = ["--hypervisor", "vz", "--vz-helper", &helper, "--vmnet-leases", &leases].map(ToOwned::to_owned);
        Ok(Self { home, args: args.into() })
    }

    async fn up(&self) -> Result<Up> {
        let args: Vec<_> = self.args.iter().map(String::as_str).collect();
        self.home.up(&args).await
    }

    fn helpers(&self) -> Vec<leaks::Process> {
        let all = leaks::processes(self.home.path()).into_iter();
        all.filter(|process| process.words.contains("machine-vz")).collect()
    }

    /// The helper of a pod's machine.
    async fn helper(&self, up: &Up, pod: &str) -> Result<leaks::Process> {
        let uid = up.kubectl_ok(&["get", "pod", pod, "-o", "jsonpath={.metadata.uid}"]).await?;
        self.helpers().into_iter().find(|process| process.words.contains(&uid)).context("the pod has no helper")
    }
}

async fn boot(up: &Up, pod: &str) -> Result<String> {
    up.kubectl_ok(&["exec", pod, "--", "cat", "/proc/sys/kernel/random/boot_id"]).await
}

#[test]
fn macs_are_two_and_outlive_their_agent() -> Result<()> {
    in_namespace("macs_are_two_and_outlive_their_agent", async {
        let mac = Mac::new("macs").await?;
        let up = mac.up().await?;
        let node = up.kubectl_ok(&["get", "node", "-o", "jsonpath={.items[0].status.allocatable}"]).await?;
        ensure!(node.contains(r#""vmpod.dev/macos-guests":"2""#), "{node}");
        let key = mac.home.path().join("vmnet/id");
        let login =
            ["create", "secret", "generic", "login", "--type=kubernetes.io/ssh-auth", "--from-literal=username=root"];
        let key = format!("--from-file=ssh-privatekey={}", key.display());
        up.kubectl_ok(&[&login[..], &[key.as_str()]].concat()).await?;

        for name in ["a", "b"] {
            up.apply(&pod(name, "Always")).await?;
            up.wait_ready(name).await?;
        }
        // The address is the one of the lease, and the guest's own login works there.
        let (first, second) = (address(&up, "a").await?, address(&up, "b").await?);
        ensure!(
            first.starts_with("192.168.64.") && second.starts_with("192.168.64.") && first != second,
            "{first} {second}"
        );
        let learnt = up.kubectl_ok(&[
            "get",
            "pod",
            "a",
            "-o",
            "jsonpath={.status.conditions[?(@.type=='vmpod.dev/AddressLearnt')].reason}",
        ]);
        ensure!(learnt.await? == "Lease");
        let (before, beside) = (boot(&up, "a").await?, boot(&up, "b").await?);
        ensure!(before != beside, "one guest is both");
        let log = up.kubectl_ok(&["logs", "a"]).await?;
        ensure!(log.contains("vmpod: ready"), "the console is the container's log: {log}");

        // Apple allows two. The third waits, says why, and runs when one is gone.
        up.apply(&pod("c", "Never")).await?;
        let event = eventually("the third is told to wait", || up.event("c", "Failed")).await?;
        ensure!(event.contains("2 macOS guests run on this host already"), "{event}");

        // A killed agent: the guests go on, and the next agent has them.
        let helpers = [mac.helper(&up, "a").await?.pid, mac.helper(&up, "b").await?.pid];
        up.kill().await?;
        // The third's may be there as well, for as long as it takes to be told that there is no room.
        let left: Vec<_> = mac.helpers().iter().map(|process| process.pid).collect();
        ensure!(helpers.iter().all(|pid| left.contains(pid)), "{helpers:?} of {left:?}");
        let up = mac.up().await?;
        up.wait_ready("a").await?;
        ensure!(boot(&up, "a").await? == before, "the guest was started anew");
        ensure!(address(&up, "a").await? == first);

        up.kubectl_ok(&["delete", "pod", "b"]).await?;
        eventually_within(Duration::from_mins(2), "the third runs", || up.wait_ready("c")).await?;

        // A helper that is killed takes its guest along. Who is to run always runs again, as another machine.
        let helper = mac.helper(&up, "a").await?;
        kill_process(Pid::from_raw(helper.pid).context("no process")?, Signal::KILL)?;
        eventually_within(Duration::from_mins(2), "a runs again", || async {
            let after = boot(&up, "a").await?;
            ensure!(after != before, "it is the same guest");
            Ok(())
        })
        .await?;
        let restarts =
            up.kubectl_ok(&["get", "pod", "a", "-o", "jsonpath={.status.containerStatuses[0].restartCount}"]);
        ensure!(restarts.await? == "1");
        up.wait_ready("a").await?;

        // Other programs' guests count as well: that is Apple's word, when a guest is to start.
        up.kubectl_ok(&["delete", "pod", "c"]).await?;
        std::fs::write(mac.home.path().join("vmnet/limit"), "")?;
        up.apply(&pod("d", "Never")).await?;
        let event = eventually("the fourth is told to wait", || up.event("d", "Failed")).await?;
        ensure!(event.contains("exceeds the limit"), "{event}");
        std::fs::remove_file(mac.home.path().join("vmnet/limit"))?;
        eventually_within(Duration::from_mins(2), "the fourth runs", || up.wait_ready("d")).await?;
        // A guest that shuts itself down is done, and told from one that was killed.
        up.kubectl(&["exec", "d", "--", "poweroff"]).await?;
        let phase = [
            "get",
            "pod",
            "d",
            "-o",
            "jsonpath={.status.phase} {.status.containerStatuses[0].state.terminated.exitCode}",
        ];
        eventually("the fourth is done", || async {
            let phase = up.kubectl_ok(&phase).await?;
            ensure!(phase == "Succeeded 0", "{phase}");
            Ok(())
        })
        .await?;

        up.kubectl_ok(&["delete", "pod", "a", "d"]).await?;
        mac.home.assert_clean().await?;
        ensure!(mac.helpers().is_empty(), "{:?}", mac.helpers());
        up.stop().await
    })
}

async fn address(up: &Up, pod: &str) -> Result<String> {
    up.kubectl_ok(&["get", "pod", pod, "-o", "jsonpath={.status.podIP}"]).await
}

#[tokio::test]
async fn what_a_host_can_not_run_is_said() -> Result<()> {
    // Without a Mac there is no such framework, and with QEMU no macOS.
    let home = Home::new("no-mac")?;
    let refused = home.vmpod(&["up", "--hypervisor", "vz"]).await?;
    ensure!(refused.stderr.contains("Apple's Virtualization framework is on Macs only"), "{refused}");
    let refused = home.vmpod(&["machine-vz", "/nonexistent"]).await?;
    ensure!(refused.stderr.contains("on Macs only"), "{refused}");
    tart_image(&home.path().join("image"))?;
    home.import(&home.path().join("image"), "sequoia").await?;
    let up = home.up(&[]).await?;
    let mut pod = pod("a", "Never");
    pod["metadata"]["annotations"] = json!({});
    up.apply(&pod).await?;
    let event = eventually("the pod is refused", || up.event("a", "Failed")).await?;
    ensure!(event.contains("image sequoia holds a darwin guest, which this node can't run"), "{event}");
    up.kubectl_ok(&["delete", "pod", "a", "--force", "--grace-period=0"]).await?;
    up.stop().await
}
