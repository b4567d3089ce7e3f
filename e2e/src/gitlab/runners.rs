//! The API of runners: records, tokens, machines.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use axum::Router;
use axum::extract::{ConnectInfo, Path, State as Extract};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{delete, get, post};
use http::{HeaderMap, StatusCode};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::Shared;
use super::gate::{administrator, answer, refuse};
use super::jobs::contact;
use super::params::Params;
use super::state::{Job, Runner, Scope, State};

pub(super) fn router() -> Router<Shared> {
    Router::new()
        .route("/api/v4/version", get(version))
        .route("/api/v4/metadata", get(version))
        .route("/api/v4/user/runners", post(create))
        .route("/api/v4/runners", get(list).delete(delete_by_token))
        .route("/api/v4/runners/all", get(list))
        .route("/api/v4/groups/{group}/runners", get(list_of_group))
        .route("/api/v4/projects/{project}/runners", get(list_of_project))
        .route("/api/v4/runners/verify", post(verify))
        .route("/api/v4/runners/managers", delete(delete_manager))
        .route("/api/v4/runners/reset_authentication_token", post(reset_by_token))
        .route("/api/v4/runners/{id}", get(details).put(update).delete(delete_by_id))
        .route("/api/v4/runners/{id}/reset_authentication_token", post(reset_by_id))
        .route("/api/v4/runners/{id}/managers", get(managers))
        .route("/api/v4/runners/{id}/jobs", get(jobs))
}

// Boxed: an answer is large and a refusal rare.
type Answer = Result<Response, Box<Response>>;

fn flat(answer: Answer) -> Response {
    answer.unwrap_or_else(|refusal| *refusal)
}

async fn version(Extract(shared): Extract<Shared>, headers: HeaderMap) -> Response {
    let state = shared.state();
    flat(administrator(&state, &headers).map(|()| {
        let (major, minor) = state.config.version;
        answer(StatusCode::OK, &json!({ "version": format!("{major}.{minor}.0-ee"), "revision": "5c71f7a" }))
    }))
}

async fn create(Extract(shared): Extract<Shared>, headers: HeaderMap, params: Params) -> Response {
    let mut state = shared.state();
    flat(administrator(&state, &headers).and_then(|()| create_in(&mut state, &params, Timestamp::now())))
}

fn create_in(state: &mut State, params: &Params, now: Timestamp) -> Answer {
    let bad = |why: Value| Box::new(answer(StatusCode::BAD_REQUEST, &json!({ "message": why })));
    let need = |name: &str| params.number(name).ok_or_else(|| bad(json!(format!("{name} is missing"))));
    let scope = match params.text("runner_type").as_deref() {
        Some("instance_type") => Scope::Instance,
        Some("group_type") => Scope::Group(need("group_id")?),
        Some("project_type") => Scope::Project(need("project_id")?),
        _ => return Err(bad(json!("runner_type does not have a valid value"))),
    };
    let tags = params.list("tag_list").unwrap_or_default();
    let run_untagged = params.flag("run_untagged").unwrap_or(true);
    if tags.len() > 50 {
        return Err(bad(json!({ "tags_list": ["Too many tags specified. Please limit the number of tags to 50"] })));
    }
    if tags.is_empty() && !run_untagged {
        return Err(bad(json!({ "tags_list": ["can not be empty when runner is not allowed to pick untagged jobs"] })));
    }
    let maximum_timeout = params.number("maximum_timeout");
    if maximum_timeout.is_some_and(|seconds| seconds < 600) {
        return Err(bad(json!({ "maximum_timeout": ["needs to be at least 10 minutes"] })));
    }
    let of_scope = state.runners.values().filter(|runner| runner.scope == scope).count();
    if scope != Scope::Instance && of_scope >= state.config.runner_cap {
        let kind = if matches!(scope, Scope::Group(_)) { "group" } else { "project" };
        let why = format!("Maximum number of ci registered {kind} runners ({}) exceeded", state.config.runner_cap);
        return Err(bad(json!({ "base": [why] })));
    }
    let (id, token, expires) = (state.number(), state.token("glrt"), state.expiry(now));
    let runner = Runner {
        id,
        scope,
        description: params.text("description").unwrap_or_default(),
        maintenance_note: params.text("maintenance_note").unwrap_or_default(),
        tags,
        run_untagged,
        locked: params.flag("locked").unwrap_or(false),
        paused: params.flag("paused").unwrap_or(false),
        access_level: params.text("access_level").unwrap_or_else(|| "not_protected".into()),
        maximum_timeout,
        token: token.clone(),
        token_expires_at: expires,
        tokens: 1,
        created_at: now,
        managers: BTreeMap::new(),
    };
    state.runners.insert(id, runner);
    Ok(answer(StatusCode::CREATED, &json!({ "id": id, "token": token, "token_expires_at": expires })))
}

fn kind(scope: Scope) -> &'static str {
    match scope {
        Scope::Instance => "instance_type",
        Scope::Group(_) => "group_type",
        Scope::Project(_) => "project_type",
    }
}

fn brief(runner: &Runner) -> Value {
    json!({
        "id": runner.id,
        "description": runner.description,
        "ip_address": null,
        "active": !runner.paused,
        "paused": runner.paused,
        "is_shared": runner.scope == Scope::Instance,
        "runner_type": kind(runner.scope),
        "name": null,
        "online": !runner.managers.is_empty(),
        "status": if runner.managers.is_empty() { "never_contacted" } else { "online" },
        "created_at": runner.created_at,
        "job_execution_status": "idle",
    })
}

fn full(runner: &Runner) -> Value {
    let mut value = brief(runner);
    value["maintenance_note"] = json!(runner.maintenance_note);
    value["tag_list"] = json!(runner.tags);
    value["run_untagged"] = json!(runner.run_untagged);
    value["locked"] = json!(runner.locked);
    value["access_level"] = json!(runner.access_level);
    value["maximum_timeout"] = json!(runner.maximum_timeout);
    let (mut groups, mut projects) = (Vec::new(), Vec::new());
    match runner.scope {
        Scope::Instance => {}
        Scope::Group(id) => groups.push(json!({ "id": id })),
        Scope::Project(id) => projects.push(json!({ "id": id })),
    }
    value["groups"] = json!(groups);
    value["projects"] = json!(projects);
    value
}

/// A page of a list, with the headers that tell of others.
pub(super) fn page(all: Vec<Value>, params: &Params) -> Response {
    let size = usize::try_from(params.number("per_page").unwrap_or(20).clamp(1, 100)).unwrap_or(20);
    let number = usize::try_from(params.number("page").unwrap_or(1).max(1)).unwrap_or(1);
    let total = all.len();
    let items: Vec<Value> = all.into_iter().skip((number - 1) * size).take(size).collect();
    let next = if number * size < total { (number + 1).to_string() } else { String::new() };
    let headers = [("x-page", number.to_string()), ("x-next-page", next), ("x-total", total.to_string())];
    (headers, axum::Json(items)).into_response()
}

fn listed(state: &State, params: &Params, of: impl Fn(&Runner) -> bool) -> Response {
    let wanted = |runner: &&Runner| {
        of(runner)
            && params.text("type").is_none_or(|wanted| wanted == kind(runner.scope))
            && params.flag("paused").is_none_or(|wanted| wanted == runner.paused)
            && params.list("tag_list").is_none_or(|tags| tags.iter().all(|tag| runner.tags.contains(tag)))
    };
    // The newest first, as GitLab lists them.
    page(state.runners.values().rev().filter(wanted).map(brief).collect(), params)
}

async fn list(Extract(shared): Extract<Shared>, headers: HeaderMap, params: Params) -> Response {
    let state = shared.state();
    flat(administrator(&state, &headers).map(|()| listed(&state, &params, |_| true)))
}

async fn list_of_group(
    Extract(shared): Extract<Shared>,
    Path(group): Path<u64>,
    headers: HeaderMap,
    params: Params,
) -> Response {
    let state = shared.state();
    let of = |runner: &Runner| matches!(runner.scope, Scope::Instance) || runner.scope == Scope::Group(group);
    flat(administrator(&state, &headers).map(|()| listed(&state, &params, of)))
}

async fn list_of_project(
    Extract(shared): Extract<Shared>,
    Path(project): Path<u64>,
    headers: HeaderMap,
    params: Params,
) -> Response {
    let state = shared.state();
    let group = state.groups.get(&project).copied();
    let of = |runner: &Runner| match runner.scope {
        Scope::Instance => true,
        Scope::Group(id) => group == Some(id),
        Scope::Project(id) => id == project,
    };
    flat(administrator(&state, &headers).map(|()| listed(&state, &params, of)))
}

fn not_found() -> Response {
    refuse(StatusCode::NOT_FOUND, "Not found")
}

fn forbidden() -> Response {
    refuse(StatusCode::FORBIDDEN, "Forbidden")
}

async fn details(Extract(shared): Extract<Shared>, Path(id): Path<u64>, headers: HeaderMap) -> Response {
    let state = shared.state();
    flat(administrator(&state, &headers).and_then(|()| {
        let runner = state.runners.get(&id).ok_or_else(|| Box::new(not_found()))?;
        Ok(answer(StatusCode::OK, &full(runner)))
    }))
}

async fn update(Extract(shared): Extract<Shared>, Path(id): Path<u64>, headers: HeaderMap, params: Params) -> Response {
    let mut state = shared.state();
    flat(administrator(&state, &headers).and_then(|()| {
        let runner = state.runners.get_mut(&id).ok_or_else(|| Box::new(not_found()))?;
        if params.list("tag_list").is_some_and(|tags| tags.len() > 50) {
            return Err(Box::new(refuse(StatusCode::BAD_REQUEST, "Too many tags specified")));
        }
        let take = |name: &str, to: &mut String| params.text(name).into_iter().for_each(|text| *to = text);
        take("description", &mut runner.description);
        take("maintenance_note", &mut runner.maintenance_note);
        take("access_level", &mut runner.access_level);
        params.list("tag_list").into_iter().for_each(|tags| runner.tags = tags);
        for (name, to) in
            [("run_untagged", &mut runner.run_untagged), ("locked", &mut runner.locked), ("paused", &mut runner.paused)]
        {
            params.flag(name).into_iter().for_each(|flag| *to = flag);
        }
        if params.get("maximum_timeout").is_some() {
            runner.maximum_timeout = params.number("maximum_timeout");
        }
        Ok(answer(StatusCode::OK, &full(runner)))
    }))
}

async fn delete_by_id(Extract(shared): Extract<Shared>, Path(id): Path<u64>, headers: HeaderMap) -> Response {
    let mut state = shared.state();
    flat(administrator(&state, &headers).and_then(|()| remove(&mut state, id)))
}

fn remove(state: &mut State, id: u64) -> Answer {
    let machines: Vec<String> =
        state.runners.get(&id).ok_or_else(|| Box::new(not_found()))?.managers.keys().cloned().collect();
    for machine in machines {
        state.remove_manager(id, &machine);
    }
    state.runners.remove(&id);
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn delete_by_token(Extract(shared): Extract<Shared>, params: Params) -> Response {
    let mut state = shared.state();
    let runner = state.runner_of(&params.text("token").unwrap_or_default(), Timestamp::now());
    flat(runner.ok_or_else(|| Box::new(forbidden())).and_then(|id| remove(&mut state, id)))
}

async fn delete_manager(Extract(shared): Extract<Shared>, params: Params) -> Response {
    let mut state = shared.state();
    flat((|| {
        let Some(system_id) = params.text("system_id") else {
            return Err(Box::new(refuse(StatusCode::BAD_REQUEST, "system_id is missing")));
        };
        let runner = state.runner_of(&params.text("token").unwrap_or_default(), Timestamp::now());
        let runner = runner.ok_or_else(|| Box::new(forbidden()))?;
        if state.remove_manager(runner, &system_id) {
            Ok(StatusCode::NO_CONTENT.into_response())
        } else {
            Err(Box::new(not_found()))
        }
    })())
}

async fn verify(
    Extract(shared): Extract<Shared>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    params: Params,
) -> Response {
    let mut state = shared.state();
    let now = Timestamp::now();
    let Some(id) = state.runner_of(&params.text("token").unwrap_or_default(), now) else { return forbidden() };
    // Whoever verifies is a machine from then on, as for GitLab.
    let system_id = params.text("system_id").unwrap_or_else(|| "<legacy>".into());
    contact(&mut state, id, &system_id, from, &params, now);
    let Some(runner) = state.runners.get(&id) else { return forbidden() };
    let body = json!({ "id": id, "token": runner.token, "token_expires_at": runner.token_expires_at });
    answer(StatusCode::OK, &body)
}

async fn reset_by_token(Extract(shared): Extract<Shared>, params: Params) -> Response {
    let mut state = shared.state();
    let now = Timestamp::now();
    let runner = state.runner_of(&params.text("token").unwrap_or_default(), now);
    flat(runner.ok_or_else(|| Box::new(forbidden())).and_then(|id| reset(&mut state, id, now)))
}

async fn reset_by_id(Extract(shared): Extract<Shared>, Path(id): Path<u64>, headers: HeaderMap) -> Response {
    let mut state = shared.state();
    flat(administrator(&state, &headers).and_then(|()| reset(&mut state, id, Timestamp::now())))
}

fn reset(state: &mut State, id: u64, now: Timestamp) -> Answer {
    let (token, expires) = state.reset(id, now).ok_or_else(|| Box::new(not_found()))?;
    Ok(answer(StatusCode::CREATED, &json!({ "token": token, "token_expires_at": expires })))
}

async fn managers(
    Extract(shared): Extract<Shared>,
    Path(id): Path<u64>,
    headers: HeaderMap,
    params: Params,
) -> Response {
    let state = shared.state();
    flat(administrator(&state, &headers).and_then(|()| {
        let runner = state.runners.get(&id).ok_or_else(|| Box::new(not_found()))?;
        let show = |(system_id, manager): (&String, &super::state::Manager)| {
            json!({
                "id": manager.id,
                "system_id": system_id,
                "version": manager.version,
                "revision": "",
                "platform": manager.platform,
                "architecture": manager.architecture,
                "created_at": manager.created_at,
                "contacted_at": manager.contacted_at,
                "ip_address": manager.ip_address,
                "status": "online",
                "job_execution_status": if state.is_busy(id, system_id) { "active" } else { "idle" },
            })
        };
        Ok(page(runner.managers.iter().map(show).collect(), &params))
    }))
}

async fn jobs(Extract(shared): Extract<Shared>, Path(id): Path<u64>, headers: HeaderMap, params: Params) -> Response {
    let state = shared.state();
    flat(administrator(&state, &headers).and_then(|()| {
        state.runners.get(&id).ok_or_else(|| Box::new(not_found()))?;
        let (status, system_id) = (params.text("status"), params.text("system_id"));
        let wanted = |job: &&Job| {
            job.runner == Some(id)
                && status.as_ref().is_none_or(|wanted| json!(job.status) == json!(wanted))
                && system_id.as_ref().is_none_or(|wanted| job.system_id.as_ref() == Some(wanted))
        };
        Ok(page(state.jobs.values().rev().filter(wanted).map(job).collect(), &params))
    }))
}

/// A job as lists show it.
pub(super) fn job(job: &Job) -> Value {
    let since =
        |from: Timestamp, to: Option<Timestamp>| to.unwrap_or_else(Timestamp::now).duration_since(from).as_secs_f64();
    json!({
        "id": job.id,
        "name": job.name,
        "status": job.status,
        "stage": "test",
        "ref": "main",
        "tag_list": job.tags,
        "created_at": job.created_at,
        "queued_duration": since(job.created_at, job.started_at),
        "duration": job.started_at.map(|started| since(started, job.finished_at)),
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "project": { "id": job.project },
        "runner": job.runner.map(|id| json!({ "id": id })),
    })
}
