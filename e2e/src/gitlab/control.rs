//! The tests' own way in: `/-/control`.

use axum::extract::{Path, State as Extract};
use axum::routing::{get, post};
use axum::{Json, Router};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Shared;
use super::gate::Fault;
use super::state::{JobStatus, NewJob};

pub(super) fn router() -> Router<Shared> {
    Router::new()
        .route("/-/control/jobs", get(jobs).post(add))
        .route("/-/control/jobs/{id}/cancel", post(cancel))
        .route("/-/control/runners", get(runners))
        .route("/-/control/calls", get(calls))
        .route("/-/control/faults", post(fault))
        .route("/-/control/maintenance", post(maintenance))
        .route("/-/control/verdict", get(verdict))
}

/// A job, some times.
#[derive(Deserialize)]
struct Add {
    #[serde(flatten)]
    job: NewJob,
    #[serde(default = "one")]
    count: u32,
}

fn one() -> u32 {
    1
}

async fn add(Extract(shared): Extract<Shared>, Json(add): Json<Add>) -> Json<Value> {
    let mut state = shared.state();
    let ids: Vec<u64> = (0..add.count).map(|_| state.add(add.job.clone())).collect();
    Json(json!(ids))
}

async fn cancel(Extract(shared): Extract<Shared>, Path(id): Path<u64>) {
    shared.state().cancel(id, Timestamp::now());
}

async fn jobs(Extract(shared): Extract<Shared>) -> Json<Value> {
    Json(json!(shared.state().jobs.values().collect::<Vec<_>>()))
}

async fn runners(Extract(shared): Extract<Shared>) -> Json<Value> {
    Json(json!(shared.state().runners.values().collect::<Vec<_>>()))
}

async fn calls(Extract(shared): Extract<Shared>) -> Json<Value> {
    Json(json!(shared.state().calls))
}

async fn fault(Extract(shared): Extract<Shared>, Json(fault): Json<Fault>) {
    shared.state().faults.push(fault);
}

/// `{"on": true}`.
#[derive(Deserialize)]
struct Maintenance {
    on: bool,
}

async fn maintenance(Extract(shared): Extract<Shared>, Json(wanted): Json<Maintenance>) {
    shared.state().maintenance = wanted.on;
}

/// How the jobs are, and what is wrong with them.
async fn verdict(Extract(shared): Extract<Shared>) -> Json<Value> {
    let state = shared.state();
    let of = |status: JobStatus| state.jobs.values().filter(|job| job.status == status).count();
    Json(json!({
        "jobs": state.jobs.len(),
        "pending": of(JobStatus::Pending),
        "running": of(JobStatus::Running),
        "success": of(JobStatus::Success),
        "failed": of(JobStatus::Failed),
        "runners": state.runners.len(),
        "machines": state.runners.values().map(|runner| runner.managers.len()).sum::<usize>(),
        "complaints": state.complaints(),
    }))
}
