//! `vmpod run`: a machine for one command.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::{Home, eventually};
use rustix::process::{Pid, Signal, kill_process};

#[tokio::test(flavor = "multi_thread")]
async fn the_exit_code_is_the_commands() -> Result<()> {
    let home = Home::with_tiny("run").await?;
    // With no `vmpod up` there, and with one: nobody can tell the difference.
    for running in [false, true] {
        let up = if running { Some(home.up(&[]).await?) } else { None };
        let ran = home.vmpod(&["run", "tiny", "--", "sh", "-c", "echo out; exit 3"]).await?.expect_code(3)?;
        ensure!(ran.stdout == "out\n", "{ran}");
        let ran = home.vmpod(&["run", "tiny", "-e", "A=b c", "--", "sh", "-c", "echo \"$A\""]).await?;
        ensure!(ran.clone().ok()? == "b c\n", "{ran}");
        if running {
            home.assert_clean().await?;
        } else {
            home.assert_no_process()?;
            ensure!(e2e::home::entries(&home.path().join("run"))?.is_empty(), "a private home is left");
        }
        if let Some(up) = up {
            up.stop().await?;
        }
    }
    home.assert_no_process()
}

#[tokio::test(flavor = "multi_thread")]
async fn standard_input_reaches_the_command() -> Result<()> {
    let home = Home::with_tiny("stdin").await?;
    let ran =
        home.vmpod_with(&["run", "-i", "tiny", "--", "sh", "-c", "wc -c; exit 6"], Some(&vec![b'x'; 100_000])).await?;
    ensure!(ran.code == Some(6) && ran.stdout.trim() == "100000", "{ran}");
    home.assert_no_process()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_before_the_command_is_125() -> Result<()> {
    let home = Home::with_tiny("before").await?;
    let missing = home.vmpod(&["run", "tyni", "--", "true"]).await?.expect_code(125)?;
    let missing = missing.expect_failure("there is no image tyni in the store")?;
    ensure!(missing.stderr.contains("did you mean tiny?"), "{missing}");
    ensure!(missing.took < Duration::from_secs(5), "{missing}");
    home.vmpod(&["run", "Not An Image!", "--", "true"]).await?.expect_code(125)?;
    home.vmpod(&["run"]).await?.expect_code(2)?;
    home.vmpod(&["run", "tiny", "--memory", "lots"]).await?.expect_code(2)?;
    // More memory than the host has: told at once, not waited for.
    let huge = home.vmpod(&["run", "tiny", "--memory", "4096Gi", "--", "true"]).await?.expect_code(125)?;
    ensure!(huge.stderr.contains("memory"), "{huge}");
    ensure!(huge.took < Duration::from_mins(1), "{huge}");
    // A registry that isn't there.
    let gone = home.vmpod(&["run", "127.0.0.1:1/no/such:1", "--", "true"]).await?.expect_code(125)?;
    ensure!(gone.stderr.contains("127.0.0.1:1"), "{gone}");
    home.assert_no_process()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_leaves_nothing() -> Result<()> {
    let home = Home::with_tiny("ctrl-c").await?;
    let mut command = home.command()?;
    command.args(["run", "tiny", "--", "sleep", "600"]).stdin(Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn()?;
    eventually("the machine runs", || async {
        ensure!(home.hypervisors() == 1, "{} machines", home.hypervisors());
        Ok(())
    })
    .await?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    kill_process(pid.context("it ended")?, Signal::INT)?;
    let status = tokio::time::timeout(Duration::from_mins(1), child.wait()).await.context("it didn't end")??;
    ensure!(status.code() == Some(130), "{status}");
    home.assert_no_process()?;
    ensure!(e2e::home::entries(&home.path().join("run"))?.is_empty(), "a private home is left");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_runs_remains_are_cleared_by_the_next() -> Result<()> {
    let home = Home::with_tiny("remains").await?;
    let mut command = home.command()?;
    command.args(["run", "tiny", "--", "sleep", "600"]).stdin(Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn()?;
    eventually("the machine runs", || async {
        ensure!(home.hypervisors() == 1, "{} machines", home.hypervisors());
        Ok(())
    })
    .await?;
    child.kill().await?;
    ensure!(home.hypervisors() == 1, "the machine died with its agent");
    home.vmpod(&["run", "tiny", "--", "true"]).await?.ok()?;
    home.assert_no_process()?;
    ensure!(e2e::home::entries(&home.path().join("run"))?.is_empty(), "a private home is left");
    Ok(())
}
