//! What can't work says so, at once and clearly, and leaves nothing.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use e2e::{Home, Up, eventually, eventually_within, pods, prerequisites};
use serde_json::{Value, json};
use tokio::process::Command;

/// Waits until container 0 waits for this reason; the message is the result.
async fn waiting(up: &Up, pod: &str, reasons: &[&str]) -> Result<String> {
    eventually_within(Duration::from_mins(1), &format!("pod {pod} waits with {reasons:?}"), || async {
        let pod = up.pod(pod).await?;
        let waiting = &pods::state(&pod)["waiting"];
        match waiting["reason"].as_str() {
            Some(reason) if reasons.contains(&reason) => Ok(waiting["message"].as_str().unwrap_or_default().to_owned()),
            _ => bail!("{}", pod["status"]),
        }
    })
    .await
}

fn with_image(name: &str, image: &str, policy: &str) -> Value {
    let mut pod = pods::tiny(name, &[]);
    pod["spec"]["containers"][0]["image"] = json!(image);
    pod["spec"]["containers"][0]["imagePullPolicy"] = json!(policy);
    pod
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_that_can_not_start_say_why() -> Result<()> {
    let home = Home::with_tiny("bad").await?;
    let up = home.up(&["--name", "host-1"]).await?;

    // An image that isn't there, by each way of asking for it.
    up.apply(&with_image("never", "nothing-here", "Never")).await?;
    up.apply(&with_image("absent", "nothing-here", "IfNotPresent")).await?;
    up.apply(&with_image("unreachable", "127.0.0.1:1/no/such:1", "Always")).await?;
    up.apply(&with_image("misnamed", "Not An Image", "IfNotPresent")).await?;
    let told = waiting(&up, "never", &["ErrImageNeverPull"]).await?;
    ensure!(told.contains("nothing-here"), "{told:?}");
    let told = waiting(&up, "absent", &["ErrImagePull", "ImagePullBackOff"]).await?;
    ensure!(told.contains("nothing-here"), "{told:?}");
    let told = waiting(&up, "unreachable", &["ErrImagePull", "ImagePullBackOff"]).await?;
    ensure!(told.contains("127.0.0.1:1"), "{told:?}");
    waiting(&up, "misnamed", &["InvalidImageName"]).await?;
    for pod in ["absent", "unreachable"] {
        let event = up.event(pod, "Failed").await?;
        ensure!(!event.is_empty());
    }

    // More memory than there is: no node fits; and none is asked when the pod names its node itself.
    let mut huge = pods::tiny("huge", &[]);
    huge["spec"]["containers"][0]["resources"] = json!({"requests": {"memory": "4096Gi"}});
    up.apply(&huge).await?;
    let event = up.event("huge", "FailedScheduling").await?;
    ensure!(event.contains("Insufficient memory"), "{event:?}");
    huge["metadata"]["name"] = json!("forced");
    huge["spec"]["nodeName"] = json!("host-1");
    up.apply(&huge).await?;
    up.wait_for("forced", "jsonpath={.status.phase}=Failed").await?;
    let forced = up.pod("forced").await?;
    ensure!(forced["status"]["reason"] == "OutOfmemory", "{}", forced["status"]);

    // User data of a secret that isn't there.
    let mut secret = pods::tiny("secretive", &[]);
    secret["metadata"]["annotations"] = json!({"vmpod.dev/user-data-secret": "no-such-secret"});
    up.apply(&secret).await?;
    let told = waiting(&up, "secretive", &["CreateContainerConfigError"]).await?;
    ensure!(told.contains("no-such-secret"), "{told:?}");

    // A command that the guest hasn't got.
    up.apply(&pods::tiny("no-command", &["/no/such/program", "now"])).await?;
    up.wait_for("no-command", "jsonpath={.status.phase}=Failed").await?;
    let ended = up.pod("no-command").await?;
    let code = pods::state(&ended)["terminated"]["exitCode"].as_i64();
    ensure!(matches!(code, Some(126..=128)), "{}", ended["status"]);
    let log = up.kubectl_ok(&["logs", "no-command"]).await?;
    let told = format!("{log}{}", pods::state(&ended)["terminated"]["message"]);
    ensure!(told.contains("/no/such/program"), "{told:?}");

    // Deleting works in whatever state they are.
    let names = ["never", "absent", "unreachable", "misnamed", "huge", "forced", "secretive", "no-command"];
    let deleted = up.kubectl(&[&["delete", "pod", "--timeout=60s"][..], &names].concat()).await?;
    deleted.ok()?;
    home.assert_clean().await?;
    up.stop().await?;
    home.assert_no_process()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_can_start_later_what_it_could_not_at_first() -> Result<()> {
    let home = Home::new("later")?;
    let up = home.up(&[]).await?;
    up.apply(&pods::tiny("patient", &[])).await?;
    waiting(&up, "patient", &["ErrImageNeverPull"]).await?;
    home.import(&prerequisites::tiny()?, "tiny").await?;
    up.wait_ready("patient").await?;
    up.stop().await
}

/// `vmpod` in a mount namespace of its own where a directory of the home is a small file system.
///
/// The mount ends with the last process in the namespace, so nothing needs to be unmounted.
fn on_small_disk(home: &Home, dir: &Path, size: &str, script: &str) -> Result<Command> {
    let unshare = prerequisites::program("unshare", "util-linux")?;
    let mut command = Command::new(unshare);
    command.args(["--user", "--map-root-user", "--mount", "sh", "-ec"]);
    command.arg(format!("mount -t tmpfs -o size={size},mode=700 small \"$DIR\"; {script}"));
    std::fs::create_dir_all(dir)?;
    command.env("DIR", dir).env("VMPOD_HOME", home.path()).env("VMPOD", prerequisites::vmpod()?);
    command.env("TINY", prerequisites::tiny()?);
    Ok(command)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_onto_a_full_disk_leaves_nothing() -> Result<()> {
    let home = Home::new("full-import")?;
    let dir = home.path().join("images");
    let script = "if $VMPOD image import $TINY tiny; then exit 9; fi; $VMPOD image ls -o name; du -s $DIR >&2";
    let ran = e2e::run(on_small_disk(&home, &dir, "6m", script)?, None, Duration::from_mins(1)).await?;
    ensure!(ran.code == Some(0), "{ran}");
    ensure!(ran.stderr.contains("No space left on device"), "{ran}");
    ensure!(ran.stdout.trim().is_empty(), "half an image can be seen: {ran}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told_by_the_pod_and_got_over() -> Result<()> {
    let home = Home::with_tiny("full").await?;
    let dir = home.path().join("machines");
    // The file that fills the disk goes when the test says so.
    let script = "dd if=/dev/zero of=$DIR/.fill bs=1k 2>/dev/null || true; \
        (while [ ! -e $VMPOD_HOME/free-it ]; do sleep 0.2; done; rm $DIR/.fill) & \
        exec $VMPOD up --api-port 0 --kubelet-port 0 --eviction-hard '' >$VMPOD_HOME/out 2>&1";
    let mut command = on_small_disk(&home, &dir, "32m", script)?;
    let mut process = command.kill_on_drop(true).spawn()?;
    let result = full_disk(&home).await;
    process.start_kill()?;
    process.wait().await?;
    result.with_context(|| std::fs::read_to_string(home.path().join("out")).unwrap_or_default())?;
    e2e::leaks::kill_all(home.path());
    Ok(())
}

async fn full_disk(home: &Home) -> Result<()> {
    eventually("vmpod up is ready", || async {
        ensure!(home.path().join("kubeconfig").exists());
        Ok(())
    })
    .await?;
    let kubectl = |args: &[&str], stdin: Option<Vec<u8>>| {
        let mut command = Command::new(prerequisites::kubectl()?);
        command.arg("--kubeconfig").arg(home.path().join("kubeconfig")).args(args);
        command.env("HOME", home.path().join("kubectl"));
        anyhow::Ok(async move { e2e::run(command, stdin.as_deref(), Duration::from_mins(2)).await })
    };
    let pod = serde_json::to_vec(&pods::tiny("squeezed", &[]))?;
    kubectl(&["apply", "-f", "-"], Some(pod))?.await?.ok()?;
    eventually_within(Duration::from_mins(1), "the pod says that the disk is full", || async {
        let told = kubectl(&["describe", "pod", "squeezed"], None)?.await?.ok()?;
        ensure!(told.contains("No space left on device"), "{told}");
        Ok(())
    })
    .await?;
    ensure!(home.hypervisors() == 0, "a machine runs without a disk");
    std::fs::write(home.path().join("free-it"), "")?;
    let ready = kubectl(&["wait", "pod/squeezed", "--for=condition=Ready", "--timeout=100s"], None)?.await?;
    ready.ok()?;
    kubectl(&["delete", "pod", "squeezed", "--timeout=60s"], None)?.await?.ok()?;
    eventually("the machine is gone", || async {
        ensure!(home.hypervisors() == 0);
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_image_in_the_store_never_boots() -> Result<()> {
    let home = Home::with_tiny("corrupt").await?;
    home.vmpod(&["image", "verify"]).await?.ok()?;
    let damaged = damage(&home.path().join("images"))?;
    let told = home.vmpod(&["image", "verify", "tiny"]).await?.expect_code(1)?.expect_failure("image rm")?;
    ensure!(told.stdout.starts_with("tiny: damaged: "), "{told}");
    let up = home.up(&[]).await?;
    up.apply(&pods::tiny("spoilt", &[])).await?;
    let told = eventually_within(Duration::from_mins(1), "the pod says that its image is damaged", || async {
        let told = up.kubectl_ok(&["describe", "pod", "spoilt"]).await?;
        ensure!(told.contains("sha256:"), "{told}");
        ensure!(told.contains("corrupt") || told.contains("damaged") || told.contains("digest"), "{told}");
        Ok(told)
    })
    .await
    .with_context(|| format!("{} was damaged", damaged.display()))?;
    ensure!(home.hypervisors() == 0, "a damaged image was booted: {told}");
    up.kubectl_ok(&["delete", "pod", "spoilt", "--timeout=60s"]).await?;
    home.assert_clean().await?;
    up.stop().await
}

/// Changes one byte in the middle of the largest file of a store.
fn damage(images: &Path) -> Result<std::path::PathBuf> {
    let mut largest: Option<(u64, std::path::PathBuf)> = None;
    let mut dirs = vec![images.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir)?.flatten() {
            let about = entry.metadata()?;
            if about.is_dir() {
                dirs.push(entry.path());
            } else if largest.as_ref().is_none_or(|(len, _)| about.len() > *len) {
                largest = Some((about.len(), entry.path()));
            }
        }
    }
    let (_, path) = largest.context("the store is empty")?;
    let mut bytes = std::fs::read(&path)?;
    let middle = bytes.len() / 2;
    let byte = bytes.get_mut(middle).context("the largest file is empty")?;
    *byte ^= 0xff;
    let permissions = std::fs::metadata(&path)?.permissions();
    std::fs::remove_file(&path)?;
    std::fs::write(&path, bytes)?;
    std::fs::set_permissions(&path, permissions)?;
    Ok(path)
}
