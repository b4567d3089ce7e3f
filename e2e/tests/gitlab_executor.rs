//! `vmpod gitlab-executor`, called as GitLab Runner calls it.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::{Home, Ran, Up, eventually, run};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::process::Command;

/// A job in one place of a runner.
struct Job<'a> {
    home: &'a Home,
    id: u32,
    place: u32,
    image: Option<&'a str>,
}

impl<'a> Job<'a> {
    fn new(home: &'a Home, id: u32) -> Self {
        Self { home, id, place: 0, image: None }
    }

    fn code_file(&self) -> PathBuf {
        self.home.path().join(format!("exit-code-{}", self.id))
    }

    fn command(&self, words: &[&str]) -> Result<Command> {
        let mut command = self.home.command()?;
        command.env("VMPOD_EXECUTOR_IMAGE", "tiny").args([
            "gitlab-executor",
            "--shell",
            "sh",
            "--memory",
            "192Mi",
            "--cpus",
            "250m",
        ]);
        command.args(words);
        command.env("CUSTOM_ENV_CI_JOB_ID", self.id.to_string());
        command.env("CUSTOM_ENV_CI_SERVER_URL", "https://gitlab.example.com");
        command.env("CUSTOM_ENV_CI_RUNNER_ID", "7").env("CUSTOM_ENV_CI_CONCURRENT_ID", self.place.to_string());
        command.env("CUSTOM_ENV_CI_JOB_TIMEOUT", "3600").env("CUSTOM_ENV_CI_PROJECT_PATH", "group/app");
        if let Some(image) = self.image {
            command.env("CUSTOM_ENV_CI_JOB_IMAGE", image);
        }
        // Not those that any program has of its own.
        command.env("BUILD_FAILURE_EXIT_CODE", "101").env("SYSTEM_FAILURE_EXIT_CODE", "102");
        command.env("BUILD_EXIT_CODE_FILE", self.code_file());
        Ok(command)
    }

    async fn call(&self, words: &[&str]) -> Result<Ran> {
        run(self.command(words)?, None, Duration::from_mins(3)).await
    }

    /// A script as GitLab Runner writes it.
    fn script(&self, stage: &str, lines: &str) -> Result<String> {
        let path = self.home.path().join(format!("{}-{stage}.sh", self.id));
        std::fs::write(&path, format!("#!/usr/bin/env sh\n\nset -e\n{lines}\n"))?;
        Ok(path.to_string_lossy().into_owned())
    }

    async fn stage(&self, stage: &str, lines: &str) -> Result<Ran> {
        self.call(&["run", &self.script(stage, lines)?, stage]).await
    }
}

async fn pods(up: &Up) -> Result<Vec<Value>> {
    let text = up.kubectl_ok(&["get", "pods", "-o", "json"]).await?;
    let list: Value = serde_json::from_str(&text)?;
    Ok(list["items"].as_array().cloned().unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_gets_a_clean_machine_and_its_exit_code_comes_back() -> Result<()> {
    let home = Home::with_tiny("executor").await?;
    let up = home.up(&[]).await?;
    let job = Job::new(&home, 1);
    let told: Value = serde_json::from_str(&job.call(&["config"]).await?.ok()?)?;
    ensure!(told["driver"]["name"] == "vmpod" && told["builds_dir"] == "/builds" && told["shell"] == "sh", "{told}");
    job.call(&["prepare"]).await?.ok()?;
    let there = pods(&up).await?;
    ensure!(there.len() == 1 && there[0]["spec"]["activeDeadlineSeconds"] == 5400, "{there:?}");

    job.stage("prepare_script", "echo \"Running on $(hostname)\"").await?.ok()?;
    job.stage("get_sources", "mkdir -p /builds/group/app && echo data >/builds/group/app/file").await?.ok()?;
    // Its own output on both streams, what an earlier script left, and a command that reads: not the rest of the script.
    let ran = job.stage("build_script", "cd /builds/group/app; cat file; echo oops >&2; cat; echo 'the rest'").await?;
    ensure!(ran.code == Some(0) && ran.stdout == "data\nthe rest\n" && ran.stderr.contains("oops"), "{ran}");
    // The job's failure, with its code beside GitLab's.
    job.stage("step_test", "echo before; exit 7; echo after").await?.expect_code(101)?;
    ensure!(std::fs::read_to_string(job.code_file())? == "7");
    // Scripts hold secrets: none stays.
    let left = job.stage("after_script", "ls /tmp").await?.ok()?;
    ensure!(left.lines().count() == 1, "only the running one is there: {left}");

    job.call(&["cleanup"]).await?.ok()?;
    job.call(&["cleanup"]).await?.ok()?;
    home.assert_clean().await?;
    // The machine is gone: that is not the job's fault.
    let ran = job.stage("build_script", "true").await?.expect_code(102)?;
    ran.expect_failure("the job's machine is gone")?;
    up.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_ended_and_what_was_left_is_cleared() -> Result<()> {
    let home = Home::with_tiny("executor-end").await?;
    let up = home.up(&[]).await?;
    // Asking for too much is the job's fault; a machine that can't be had isn't.
    let greedy = Job { image: Some("evil.example.com/miner"), ..Job::new(&home, 1) };
    greedy.call(&["prepare"]).await?.expect_code(101)?.expect_failure("allows none")?;
    let poor = Job::new(&home, 2);
    poor.call(&["--image", "no-such", "prepare"]).await?.expect_code(102)?.expect_failure("no-such")?;
    ensure!(pods(&up).await?.is_empty(), "a failed start leaves nothing");

    // One job in each of two places; the runner is killed before it cleans up.
    let (first, other) = (Job::new(&home, 3), Job { place: 1, ..Job::new(&home, 4) });
    let (one, two) = tokio::join!(first.call(&["prepare"]), other.call(&["prepare"]));
    one?.ok()?;
    two?.ok()?;
    // A job that is canceled: GitLab Runner sends SIGTERM.
    let script = other.script("build_script", "echo started; sleep 600")?;
    let mut command = other.command(&["run", &script, "build_script"])?;
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).spawn()?;
    let mut lines =
        tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(child.stdout.take().context("no output")?));
    let line = tokio::time::timeout(Duration::from_mins(1), lines.next_line()).await??;
    ensure!(line.as_deref() == Some("started"), "{line:?}");
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw).context("it ended")?;
    kill_process(pid, Signal::TERM)?;
    let ended = tokio::time::timeout(Duration::from_secs(10), child.wait()).await.context("it didn't end")??;
    ensure!(ended.code() == Some(102), "{ended}");

    // The next job in the first place finds what was left there, and nothing of the other place.
    let next = Job::new(&home, 5);
    let ran = next.call(&["prepare"]).await?;
    ensure!(ran.code == Some(0) && ran.stderr.contains("an earlier job left"), "{ran}");
    let names: Vec<String> = pods(&up)
        .await?
        .iter()
        .filter_map(|pod| pod["metadata"]["labels"]["vmpod.dev/gitlab-job"].as_str().map(str::to_owned))
        .collect();
    ensure!(names == ["4", "5"] || names == ["5", "4"], "{names:?}");
    // Tried again, the machine is a new one.
    let uid = |pods: Vec<Value>| pods.iter().map(|pod| pod["metadata"]["uid"].to_string()).collect::<Vec<_>>();
    let before = uid(pods(&up).await?);
    next.call(&["prepare"]).await?.ok()?;
    let after = uid(pods(&up).await?);
    ensure!(after.iter().filter(|uid| before.contains(uid)).count() == 1, "{before:?} {after:?}");
    for job in [&other, &next] {
        job.call(&["cleanup"]).await?.ok()?;
    }
    eventually("nothing is left", || async {
        ensure!(pods(&up).await?.is_empty(), "pods are left");
        Ok(())
    })
    .await?;
    home.assert_clean().await?;
    up.stop().await
}
