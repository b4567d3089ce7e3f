//! The job protocol, and what a project's pages tell of jobs.

use std::net::SocketAddr;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{ConnectInfo, Path, State as Extract};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, patch, post, put};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::Shared;
use super::gate::{administrator, answer, count, refuse};
use super::params::Params;
use super::state::{Job, JobStatus, Manager, State};

pub(super) fn router() -> Router<Shared> {
    Router::new()
        .route("/api/v4/jobs/request", post(request))
        .route("/api/v4/jobs/{id}", put(update))
        .route("/api/v4/jobs/{id}/trace", patch(trace))
        .route("/api/v4/projects/{project}/jobs", get(of_project))
        .route("/api/v4/projects/{project}/packages/generic/{name}/{version}/{file}", get(package))
}

async fn request(
    Extract(shared): Extract<Shared>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    params: Params,
) -> Response {
    give(&mut shared.state(), from, &params, Timestamp::now()).unwrap_or_else(|refusal| *refusal)
}

fn give(state: &mut State, from: SocketAddr, params: &Params, now: Timestamp) -> Result<Response, Box<Response>> {
    let token = params.text("token").unwrap_or_default();
    let id = state.runner_of(&token, now).ok_or_else(|| Box::new(refuse(StatusCode::FORBIDDEN, "Forbidden")))?;
    if state.config.requests_per_minute > 0 {
        count(state, &token, state.config.requests_per_minute, now)?;
    }
    let system_id = params.text("system_id").unwrap_or_else(|| "<legacy>".into());
    contact(state, id, &system_id, from, params, now);
    let tick = state.tick.to_string();
    let nothing = || {
        let mut response = StatusCode::NO_CONTENT.into_response();
        if let Ok(tick) = HeaderValue::from_str(&tick) {
            response.headers_mut().insert("x-gitlab-last-update", tick);
        }
        Ok(response)
    };
    let Some(runner) = state.runners.get(&id).filter(|runner| !runner.paused) else { return nothing() };
    // Nothing has changed since the caller was told that there is nothing.
    if params.text("last_update").as_deref() == Some(tick.as_str()) {
        return nothing();
    }
    let Some(job) = state.pending(runner).map(|job| job.id).next() else { return nothing() };
    let Some(job) = state.jobs.get_mut(&job) else { return nothing() };
    job.status = JobStatus::Running;
    job.started_at = Some(now);
    job.runner = Some(id);
    job.system_id = Some(system_id);
    job.given += 1;
    Ok(answer(StatusCode::CREATED, &payload(job)))
}

/// A machine is known by its first request.
pub(super) fn contact(
    state: &mut State,
    runner: u64,
    system_id: &str,
    from: SocketAddr,
    params: &Params,
    now: Timestamp,
) {
    let number = state.number();
    let info = |name: &str| {
        let value = params.get("info").and_then(|info| info[name].as_str());
        value.unwrap_or_default().to_owned()
    };
    let Some(runner) = state.runners.get_mut(&runner) else { return };
    let manager = runner.managers.entry(system_id.to_owned()).or_insert_with(|| Manager {
        id: number,
        created_at: now,
        contacted_at: now,
        ip_address: from.ip().to_string(),
        version: info("version"),
        platform: info("platform"),
        architecture: info("architecture"),
    });
    manager.contacted_at = now;
}

fn payload(job: &Job) -> Value {
    let usual = [
        ("CI", "true".to_owned()),
        ("CI_JOB_ID", job.id.to_string()),
        ("CI_JOB_NAME", job.name.clone()),
        ("CI_PROJECT_ID", job.project.to_string()),
    ];
    let own = job.variables.iter().map(|(key, value)| (key.as_str(), value.clone()));
    let variables: Vec<Value> = usual
        .into_iter()
        .chain(own)
        .map(|(key, value)| json!({ "key": key, "value": value, "public": true, "masked": false }))
        .collect();
    json!({
        "id": job.id,
        "token": job.token,
        "allow_git_fetch": true,
        "job_info": {
            "id": job.id,
            "name": job.name,
            "stage": "test",
            "project_id": job.project,
            "project_name": format!("project-{}", job.project),
            "time_in_queue_seconds": job.started_at.map_or(0, |at| at.duration_since(job.created_at).as_secs()),
            "queue_size": 0,
            "queue_depth": 0,
        },
        "git_info": { "repo_url": "", "ref": "main", "sha": "0000000000000000000000000000000000000000", "refspecs": [] },
        "runner_info": { "timeout": 3600, "runner_session_url": null },
        "variables": variables,
        "steps": [{
            "name": "script",
            "script": job.script,
            "timeout": 3600,
            "when": "on_success",
            "allow_failure": false,
        }],
        "image": null,
        "services": [],
        "artifacts": [],
        "cache": [],
        "credentials": [],
        "dependencies": [],
        "features": { "trace_sections": true, "failure_reasons": ["script_failure", "runner_system_failure"] },
    })
}

/// The job that this token belongs to, if it still runs.
fn running<'a>(state: &'a mut State, id: u64, token: Option<&str>) -> Result<&'a mut Job, Box<Response>> {
    let forbidden = |status: &str| {
        let mut response = refuse(StatusCode::FORBIDDEN, "Forbidden");
        if let Ok(status) = HeaderValue::from_str(status) {
            response.headers_mut().insert("job-status", status);
        }
        Box::new(response)
    };
    let job = state.jobs.get_mut(&id).ok_or_else(|| Box::new(refuse(StatusCode::NOT_FOUND, "Not found")))?;
    if token != Some(job.token.as_str()) {
        return Err(forbidden(""));
    }
    if job.status != JobStatus::Running {
        let status = json!(job.status);
        return Err(forbidden(status.as_str().unwrap_or_default()));
    }
    Ok(job)
}

fn with_status(mut response: Response, status: &'static str) -> Response {
    response.headers_mut().insert("job-status", HeaderValue::from_static(status));
    response
}

async fn update(Extract(shared): Extract<Shared>, Path(id): Path<u64>, params: Params) -> Response {
    let mut state = shared.state();
    let token = params.text("token");
    let job = match running(&mut state, id, token.as_deref()) {
        Ok(job) => job,
        Err(refusal) => return *refusal,
    };
    let now = Timestamp::now();
    match params.text("state").as_deref() {
        Some(over @ ("success" | "failed")) => {
            // A runner that tells how long its trace is gets time to send the rest of it.
            let told = params.get("output").and_then(|output| output["bytesize"].as_u64());
            if told.is_some_and(|told| usize::try_from(told).is_ok_and(|told| told > job.trace.len())) {
                return with_status(StatusCode::ACCEPTED.into_response(), "running");
            }
            job.status = if over == "success" { JobStatus::Success } else { JobStatus::Failed };
            job.failure_reason = params.text("failure_reason");
            job.finished_at = Some(now);
        }
        Some("running") | None => {}
        Some(_) => return refuse(StatusCode::BAD_REQUEST, "state does not have a valid value"),
    }
    let response = answer(StatusCode::OK, &json!(200));
    with_status(response, "running")
}

async fn trace(Extract(shared): Extract<Shared>, Path(id): Path<u64>, headers: HeaderMap, body: Bytes) -> Response {
    let mut state = shared.state();
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let job = match running(&mut state, id, text("job-token")) {
        Ok(job) => job,
        Err(refusal) => return *refusal,
    };
    let Some((start, end)) = text(header::CONTENT_RANGE.as_str()).and_then(range) else {
        return refuse(StatusCode::BAD_REQUEST, "Missing header Content-Range");
    };
    let fits = start == job.trace.len() && end + 1 == start + body.len();
    if fits {
        job.trace.extend_from_slice(&body);
    }
    let status = if fits { StatusCode::ACCEPTED } else { StatusCode::RANGE_NOT_SATISFIABLE };
    let mut response = with_status(status.into_response(), "running");
    if let Ok(range) = HeaderValue::from_str(&format!("0-{}", job.trace.len())) {
        response.headers_mut().insert(header::RANGE, range);
    }
    response.headers_mut().insert("x-gitlab-trace-update-interval", HeaderValue::from_static("1"));
    response
}

/// `START-END`, both counted.
fn range(text: &str) -> Option<(usize, usize)> {
    let (start, end) = text.split_once('-')?;
    Some((start.parse().ok()?, end.parse().ok()?))
}

async fn of_project(
    Extract(shared): Extract<Shared>,
    Path(project): Path<u64>,
    headers: HeaderMap,
    params: Params,
) -> Response {
    let state = shared.state();
    if let Err(refusal) = administrator(&state, &headers) {
        return *refusal;
    }
    let scope = params.list("scope");
    let wanted = |job: &&Job| {
        job.project == project
            && scope.as_ref().is_none_or(|all| all.iter().any(|wanted| json!(job.status) == json!(wanted)))
    };
    let all: Vec<Value> = state.jobs.values().rev().filter(wanted).map(super::runners::job).collect();
    super::runners::page(all, &params)
}

/// A file, as the registry of generic packages offers it: what a guest installs when it boots.
async fn package(
    Extract(shared): Extract<Shared>,
    Path((_, _, _, file)): Path<(u64, String, String, String)>,
) -> Response {
    let dir = shared.state().config.packages.clone();
    let plain = file.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
    let Some(path) = dir.filter(|_| plain).map(|dir| dir.join(&file)) else {
        return refuse(StatusCode::NOT_FOUND, "Not found");
    };
    match tokio::fs::read(path).await {
        Ok(bytes) => bytes.into_response(),
        Err(_) => refuse(StatusCode::NOT_FOUND, "Not found"),
    }
}
