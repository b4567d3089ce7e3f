//! A CI runner for the guests of this repository's tests.
//!
//! It speaks GitLab's job protocol by a library that others wrote, so that the scripted GitLab of the tests is held
//! to the protocol by somebody who didn't write it. It takes `MAX_JOBS` jobs (one by default), runs their scripts in
//! this machine, streams what they print, and ends. `SIGQUIT` or `SIGTERM` lets it finish the job that it has and
//! take no other.
//!
//! The environment tells: `GITLAB_URL`, `RUNNER_TOKEN`, `SYSTEM_ID`, `BUILDS_DIR` (/tmp), `MAX_JOBS` (1), `POLL_MS` (1000).

use std::os::unix::process::CommandExt as _;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use gitlab_runner::job::Job;
use gitlab_runner::{GitlabLayer, JobHandler, JobResult, Phase, RunnerBuilder};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::prelude::*;

struct Shell {
    job: Job,
}

#[async_trait::async_trait]
impl JobHandler for Shell {
    async fn step(&mut self, script: &[String], phase: Phase) -> JobResult {
        let after = phase == Phase::AfterScript;
        self.job.trace(if after { "Running after_script\n" } else { "Running on a virtual machine\n" });
        let mut command = Command::new("/bin/sh");
        command.args(["-e", "-c", &script.join("\n")]).current_dir(self.job.build_dir());
        for variable in self.job.variables() {
            command.env(variable.key(), variable.value());
        }
        command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                self.job.trace(format!("can't start a shell: {error}\n"));
                return Err(());
            }
        };
        let (out, err) = (child.stdout.take(), child.stderr.take());
        tokio::join!(pass_on(&self.job, out), pass_on(&self.job, err));
        match child.wait().await {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => {
                self.job.trace(format!("Job failed: {status}\n"));
                Err(())
            }
            Err(error) => {
                self.job.trace(format!("lost the shell: {error}\n"));
                Err(())
            }
        }
    }
}

async fn pass_on(job: &Job, from: Option<impl AsyncRead + Unpin>) {
    let Some(mut from) = from else { return };
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        job.trace(&buffer[..n]);
    }
}

fn env(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn main() -> ExitCode {
    let result = certificates().and_then(|()| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(|error| format!("can't start: {error}"))?.block_on(run())
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("job-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The HTTP library doesn't start in a guest that trusts no authority at all, even to speak plain HTTP. There this program
/// starts itself again with one whose key was thrown away.
fn certificates() -> Result<(), String> {
    const NAME: &str = "SSL_CERT_FILE";
    if env(NAME).is_some() || std::fs::read_dir("/etc/ssl/certs").is_ok_and(|mut found| found.next().is_some()) {
        return Ok(());
    }
    let again = || {
        let path = std::env::temp_dir().join(format!("job-agent-{}.pem", std::process::id()));
        std::fs::write(&path, include_str!("nobody.pem"))?;
        let program = std::env::current_exe()?;
        Err::<(), _>(std::process::Command::new(program).env(NAME, path).exec())
    };
    again().map_err(|error| format!("can't start again with a certificate: {error}"))
}

async fn run() -> Result<(), String> {
    let need = |name: &str| env(name).ok_or_else(|| format!("the environment lacks {name}"));
    let url = need("GITLAB_URL")?;
    let url = url::Url::parse(&url).map_err(|error| format!("GITLAB_URL is {url:?}: {error}"))?;
    let builds = env("BUILDS_DIR").unwrap_or_else(|| "/tmp".into());
    let number = |name: &str, otherwise: u64| env(name).and_then(|n| n.parse().ok()).unwrap_or(otherwise);
    let (max, poll) = (number("MAX_JOBS", 1), Duration::from_millis(number("POLL_MS", 1000)));

    let (layer, jobs) = GitlabLayer::new();
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    tracing_subscriber::registry()
        .with(layer)
        .with(log.with_filter(tracing_subscriber::filter::LevelFilter::WARN))
        .init();
    let mut runner = RunnerBuilder::new(url, need("RUNNER_TOKEN")?, builds, jobs)
        .system_id(need("SYSTEM_ID")?)
        .version(env!("CARGO_PKG_VERSION"))
        .platform(std::env::consts::OS)
        .architecture(std::env::consts::ARCH)
        .build()
        .await;

    let listen = |kind| signal(kind).map_err(|error| format!("can't listen for signals: {error}"));
    let (mut quit, mut terminate) = (listen(SignalKind::quit())?, listen(SignalKind::terminate())?);
    let took = Arc::new(AtomicUsize::new(0));
    loop {
        if took.load(Ordering::SeqCst) as u64 >= max {
            break;
        }
        // Never cancelled: an answer that is dropped would be a job that GitLab takes for running.
        let answer = runner.request_job(async |job: Job| Ok(Shell { job })).await;
        match answer {
            Ok(true) => {
                took.fetch_add(1, Ordering::SeqCst);
                runner.drain().await;
                continue;
            }
            Ok(false) => {}
            Err(error) => eprintln!("job-agent: no job: {error}"),
        }
        tokio::select! {
            () = tokio::time::sleep(poll) => {}
            _ = quit.recv() => break,
            _ = terminate.recv() => break,
        }
    }
    // The last report of a job is part of it.
    runner.drain().await;
    Ok(())
}
