//! The scripted GitLab against a client of the job protocol that others wrote.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::gitlab::state::RAN;
use e2e::gitlab::{Config, Fault, Gitlab, JobStatus, NewJob};
use e2e::{eventually, prerequisites, run};
use serde_json::{Value, json};
use tokio::process::Command;

struct Api {
    client: reqwest::Client,
    url: String,
}

impl Api {
    fn new(gitlab: &Gitlab) -> Self {
        drop(rustls::crypto::ring::default_provider().install_default());
        Self { client: reqwest::Client::new(), url: gitlab.url() }
    }

    async fn post(&self, path: &str, body: Value) -> Result<(u16, Value)> {
        let request = self.client.post(format!("{}{path}", self.url)).header("PRIVATE-TOKEN", "glpat-scripted");
        let response = request.json(&body).send().await?;
        let status = response.status().as_u16();
        Ok((status, response.json().await.unwrap_or_default()))
    }
}

fn agent(gitlab: &Gitlab, token: &str, system_id: &str, jobs: u32) -> Result<(Command, tempfile::TempDir)> {
    let builds = tempfile::tempdir()?;
    let mut command = Command::new(prerequisites::job_agent()?);
    command.env("GITLAB_URL", gitlab.url()).env("RUNNER_TOKEN", token).env("SYSTEM_ID", system_id);
    command.env("BUILDS_DIR", builds.path()).env("MAX_JOBS", jobs.to_string()).env("POLL_MS", "50");
    Ok((command, builds))
}

#[tokio::test]
async fn an_independent_client_runs_jobs_exactly_once() -> Result<()> {
    let gitlab = Gitlab::start(Config::default()).await?;
    let api = Api::new(&gitlab);
    let (status, made) =
        api.post("/api/v4/user/runners", json!({"runner_type": "instance_type", "tag_list": "tiny"})).await?;
    ensure!(status == 201, "{status} {made}");
    let token = made["token"].as_str().context("no token")?.to_owned();
    gitlab.with(|state| {
        for _ in 0..4 {
            state.add(NewJob { tags: vec!["tiny".into()], script: vec![RAN.into()], ..NewJob::default() });
        }
    });
    // Two machines on one token share them; a 409 is in the way.
    gitlab.with(|state| {
        state.faults.push(Fault { path: "/jobs/request".into(), status: 409, times: 1, ..Fault::default() });
    });
    let (one, _a) = agent(&gitlab, &token, "m1", 2)?;
    let (two, _b) = agent(&gitlab, &token, "m2", 2)?;
    let patience = Duration::from_mins(1);
    let (one, two) = tokio::join!(run(one, None, patience), run(two, None, patience));
    one?.ok()?;
    two?.ok()?;
    let (complaints, machines) =
        gitlab.with(|state| (state.complaints(), state.runners.values().next().map_or(0, |r| r.managers.len())));
    ensure!(complaints.is_empty(), "{complaints:?}");
    ensure!(machines == 2, "{machines} machines");
    Ok(())
}

#[tokio::test]
async fn a_failed_script_fails_its_job_and_a_canceled_one_ends() -> Result<()> {
    let gitlab = Gitlab::start(Config::default()).await?;
    let (_, made) = Api::new(&gitlab).post("/api/v4/user/runners", json!({"runner_type": "instance_type"})).await?;
    let token = made["token"].as_str().context("no token")?.to_owned();
    let script = |line: &str| NewJob { script: vec![line.into()], ..NewJob::default() };
    let (bad, long) = gitlab.with(|state| (state.add(script("echo so; exit 3")), state.add(script("sleep 600"))));
    let (mut command, _dir) = agent(&gitlab, &token, "m1", 2)?;
    let mut child = command.stdout(Stdio::null()).kill_on_drop(true).spawn()?;
    eventually("the second job runs on the machine", || async {
        gitlab.with(|state| {
            ensure!(state.jobs[&long].status == JobStatus::Running, "{:?}", state.jobs[&long].status);
            ensure!(state.is_busy(made["id"].as_u64().unwrap_or_default(), "m1"), "the machine isn't busy");
            Ok(())
        })
    })
    .await?;
    let (status, text) = gitlab.with(|state| (state.jobs[&bad].status, state.jobs[&bad].text()));
    ensure!(
        status == JobStatus::Failed && text.contains("so\n") && text.contains("exit status: 3"),
        "{status:?} {text}"
    );
    gitlab.with(|state| state.cancel(long, jiff::Timestamp::now()));
    // It learns so from the next answer about the job, at the latest when it says that it is alive.
    let ended = tokio::time::timeout(Duration::from_mins(1), child.wait()).await.context("it didn't end")??;
    ensure!(ended.success(), "{ended}");
    Ok(())
}

#[tokio::test]
async fn the_rules_of_records_tokens_and_traces() -> Result<()> {
    let config = Config { runner_cap: 2, token_lifetime: Some(Duration::from_hours(1)), ..Config::default() };
    let gitlab = Gitlab::start(config).await?;
    let api = Api::new(&gitlab);
    let of_group = json!({"runner_type": "group_type", "group_id": 7, "tag_list": ["a"]});
    let (_, first) = api.post("/api/v4/user/runners", of_group.clone()).await?;
    ensure!(first["token_expires_at"].is_string(), "{first}");
    api.post("/api/v4/user/runners", of_group.clone()).await?;
    let (status, refusal) = api.post("/api/v4/user/runners", of_group).await?;
    ensure!(status == 400 && refusal.to_string().contains("(2) exceeded"), "{status} {refusal}");
    for bad in [
        json!({"runner_type": "group_type"}),
        json!({"runner_type": "instance_type", "run_untagged": false}),
        json!({"runner_type": "instance_type", "maximum_timeout": 599}),
        json!({"runner_type": "instance_type", "tag_list": (0..51).map(|n| n.to_string()).collect::<Vec<_>>()}),
    ] {
        let (status, refusal) = api.post("/api/v4/user/runners", bad.clone()).await?;
        ensure!(status == 400, "{bad} got {status} {refusal}");
    }
    // A token that was reset is none any more.
    let old = first["token"].clone();
    let path = format!("/api/v4/runners/{}/reset_authentication_token", first["id"]);
    let (status, new) = api.post(&path, json!({})).await?;
    ensure!(status == 201 && new["token"] != old, "{new}");
    ensure!(api.post("/api/v4/runners/verify", json!({ "token": old })).await?.0 == 403);
    ensure!(api.post("/api/v4/runners/verify", json!({ "token": new["token"] })).await?.0 == 200);
    // A trace continues where it is, and nowhere else.
    gitlab.with(|state| {
        state.groups.insert(1, 7);
        state.add(NewJob { tags: vec!["a".into()], ..NewJob::default() })
    });
    let (status, job) =
        api.post("/api/v4/jobs/request", json!({ "token": new["token"], "system_id": "m", "info": {} })).await?;
    ensure!(status == 201, "{job}");
    for (range, expected) in [("0-4", 202), ("0-4", 416), ("5-9", 202), ("10-99", 416)] {
        let url = format!("{}/api/v4/jobs/{}/trace", gitlab.url(), job["id"]);
        let token = job["token"].as_str().unwrap_or_default();
        let request = api.client.patch(url).header("JOB-TOKEN", token).header("Content-Range", range);
        let response = request.body("12345").send().await?;
        ensure!(response.status().as_u16() == expected, "{range} got {}", response.status());
    }
    Ok(())
}
