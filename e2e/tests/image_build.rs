//! Images made by booting: `image build` and `image commit`.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::prerequisites::{self, program};
use e2e::{Home, eventually, eventually_within};
use serde_json::{Value, json};
use tokio::process::Command;

const PATIENCE: Duration = Duration::from_mins(8);

/// Runs a command of a home that boots Debian.
async fn vmpod(home: &Home, args: &[&str]) -> Result<e2e::Ran> {
    let mut command = home.command()?;
    command.args(args);
    e2e::run(command, None, PATIENCE).await
}

/// Reads a file of the image's file system, without mounting it.
async fn file_in(home: &Home, image: &str, path: &str) -> Result<e2e::Ran> {
    let told: Value = serde_json::from_str(&home.vmpod(&["image", "inspect", image]).await?.ok()?)?;
    let digest = told["digest"].as_str().context("an image has a digest")?.trim_start_matches("sha256:").to_owned();
    let disk = home.path().join("images/images").join(digest).join("disk-0.raw");
    let mut command = Command::new(program("/usr/sbin/debugfs", "e2fsprogs")?);
    command.arg("-R").arg(format!("cat {path}")).arg(disk);
    e2e::run(command, None, Duration::from_mins(1)).await
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("can't write {}", path.display()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recipe_becomes_an_image_that_boots_as_a_new_machine() -> Result<()> {
    let home = Home::new("build")?;
    home.import(&prerequisites::debian()?, "debian:12").await?;
    let dir = tempfile::tempdir()?;
    write(&dir.path().join("motd"), "made here\n")?;
    write(&dir.path().join("setup.sh"), "#!/bin/sh\nset -e\ntest \"$(id -u)\" = 0\nhostname > /opt/built-as\n")?;
    let recipe = dir.path().join("image.yaml");
    write(
        &recipe,
        "from: debian:12\nsize: 2Gi\nmemory: 768Mi\nlabels: {team: ci}\nsteps:\n\
         - copy: {from: motd, to: /etc/motd, mode: \"0640\"}\n- script: setup.sh\n\
         - run: |\n    dd if=/dev/urandom of=/big bs=1M count=64 2>/dev/null; sync; rm /big\n    echo said by a step\n",
    )?;
    let recipe = recipe.to_str().context("a path in UTF-8")?;
    let built = vmpod(&home, &["image", "build", recipe, "made:1"]).await?;
    ensure!(built.clone().ok()?.starts_with("sha256:") && built.stderr.contains("said by a step"), "{built}");
    home.assert_no_process()?;
    ensure!(e2e::home::entries(&home.path().join("run"))?.is_empty(), "the build's home is left");

    let told: Value = serde_json::from_str(&home.vmpod(&["image", "inspect", "made:1"]).await?.ok()?)?;
    ensure!(told["config"]["labels"]["team"] == "ci" && told["config"]["disks"][0]["size"] == 2u64 << 30, "{told}");
    let base: Value = serde_json::from_str(&home.vmpod(&["image", "inspect", "debian:12"]).await?.ok()?)?;
    let grown = told["storedBytes"]
        .as_u64()
        .unwrap_or_default()
        .saturating_sub(base["storedBytes"].as_u64().unwrap_or_default());
    ensure!(grown < 60 << 20, "what was deleted was given back: {} MiB more", grown >> 20);
    ensure!(file_in(&home, "made:1", "/etc/motd").await?.stdout == "made here\n");
    ensure!(file_in(&home, "made:1", "/opt/built-as").await?.stdout.starts_with("build-"));
    ensure!(file_in(&home, "made:1", "/etc/machine-id").await?.stdout.is_empty(), "the machine-id is wiped");
    let keys = file_in(&home, "made:1", "/root/.ssh/authorized_keys").await?;
    ensure!(!keys.stdout.contains("ssh-ed25519 "), "the build's key is gone: {keys}");
    let host_key = file_in(&home, "made:1", "/etc/ssh/ssh_host_ed25519_key").await?;
    ensure!(host_key.stdout.is_empty() && host_key.stderr.contains("not found"), "{host_key}");

    // It boots as somebody new; and of the running machine an image can be made, too.
    let up = home.up(&[]).await?;
    up.apply(&json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "second"}, "spec": {
        "terminationGracePeriodSeconds": 5,
        "containers": [{"name": "machine", "image": "made:1", "imagePullPolicy": "Never",
            "resources": {"requests": {"cpu": "2", "memory": "768Mi"}}}]}}))
        .await?;
    eventually_within(Duration::from_mins(5), "the built image answers", || async {
        up.kubectl_ok(&["wait", "pod/second", "--for=condition=Ready", "--timeout=100s"]).await.map(drop)
    })
    .await?;
    let exec = async |words: &str| up.kubectl_ok(&["exec", "second", "--", "sh", "-c", words]).await;
    ensure!(exec("hostname; test -s /etc/machine-id && echo named").await? == "second\nnamed\n");
    exec("echo only here > /root/committed").await?;
    let committed = vmpod(&home, &["image", "commit", "second", "made:2", "--label", "from=second"]).await?;
    ensure!(!committed.stderr.contains("could not be frozen"), "{committed}");
    committed.ok()?;
    exec("echo thawed > /root/after && sync").await?;
    ensure!(file_in(&home, "made:2", "/root/committed").await?.stdout == "only here\n");
    ensure!(file_in(&home, "made:2", "/root/after").await?.stdout.is_empty());
    let verified = home.vmpod(&["image", "verify"]).await?.ok()?;
    ensure!(verified.lines().count() == 3 && verified.lines().all(|line| line.ends_with(": whole")), "{verified}");
    up.stop().await?;
    home.assert_no_process()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_fails_or_is_killed_leaves_nothing() -> Result<()> {
    let home = Home::new("build-fails")?;
    let dir = tempfile::tempdir()?;
    // What fails fails in any guest: one that boots in seconds, with a disk for the image to be made of.
    prerequisites::tiny()?;
    let file = |name: &str| prerequisites::repository().join("target/guest").join(name).to_string_lossy().into_owned();
    let (kernel, initrd) = (file("tiny.vmlinuz"), file("tiny.initrd"));
    let cmdline = std::fs::read_to_string(file("tiny.cmdline"))?;
    let disk = dir.path().join("disk.raw");
    std::fs::File::create(&disk)?.set_len(64 << 20)?;
    let disk = disk.to_string_lossy().into_owned();
    let boot =
        ["--kernel", &kernel, "--initrd", &initrd, "--cmdline", cmdline.trim(), "--ready-marker", "vmpod: ready"];
    home.vmpod(&[&["image", "import", &disk, "quick:1"], &boot[..]].concat()).await?.ok()?;
    let recipe = dir.path().join("image.yaml");
    let path = recipe.to_str().context("a path in UTF-8")?;
    // A mistake is told before anything boots.
    write(&recipe, "from: quick:1\nsteps: [{script: missing.sh}]\n")?;
    let refused = home.vmpod(&["image", "build", path, "made"]).await?.expect_failure("step 1 can't be done")?;
    ensure!(refused.took < Duration::from_secs(20), "{refused}");

    write(&recipe, "from: quick:1\nmemory: 256Mi\nsteps: [{run: exit 7}]\n")?;
    // Killed while it boots: QEMU lives on, and the next vmpod that looks clears it away.
    let mut command = home.command()?;
    let mut child =
        command.args(["image", "build", path, "made"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    eventually("the machine runs", || async {
        ensure!(home.hypervisors() == 1, "not yet");
        Ok(())
    })
    .await?;
    child.kill().await?;
    let failed = vmpod(&home, &["image", "build", path, "made"]).await?.expect_failure("ended with exit code 7")?;
    ensure!(failed.stderr.contains("step 1 (run exit 7) failed"), "{failed}");
    home.assert_no_process()?;
    ensure!(e2e::home::entries(&home.path().join("run"))?.is_empty(), "a build's home is left");
    ensure!(e2e::home::entries(&home.path().join("images/work"))?.is_empty());
    ensure!(e2e::home::entries(&home.path().join("images/pins"))?.is_empty(), "the image is still held");
    home.vmpod(&["image", "inspect", "made"]).await?.expect_failure("there is no image made")?;
    Ok(())
}
