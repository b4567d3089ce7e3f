//! A scripted queue: the service behind an `http` provider, and the jobs that its runners take.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use axum::Router;
use axum::extract::{Query, State as Extract};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use http::{HeaderMap, StatusCode};
use serde_json::json;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// The token that the operator must send.
pub const TOKEN: &str = "queue-secret";
/// The token that runners must send.
pub const RUNNER_TOKEN: &str = "runner-secret";

/// What the queue knows.
#[derive(Debug, Default)]
pub struct State {
    /// Jobs that wait, since when.
    pub pending: VecDeque<Instant>,
    /// Runners, and whether each has a job.
    pub runners: BTreeMap<String, bool>,
    /// Jobs that were done, by runner.
    pub done: Vec<String>,
    /// The pools that were asked for.
    pub pools: Vec<String>,
    /// What it answers instead, once: status, body, `Retry-After`.
    pub faults: VecDeque<(u16, String, Option<u32>)>,
}

/// A running queue.
#[derive(Debug)]
pub struct Queue {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    _server: AbortOnDropHandle<()>,
}

type Shared = Arc<Mutex<State>>;

fn lock(state: &Shared) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Queue {
    /// Starts one on a free port of the loopback interface.
    pub async fn start() -> Result<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let state = Shared::default();
        let router = Router::new()
            .route("/queue", get(queue))
            .route("/work", get(work))
            .route("/done", get(done))
            .with_state(Arc::clone(&state));
        let server = tokio::spawn(async move {
            // It ends with its test.
            axum::serve(listener, router).await.ok();
        });
        Ok(Self { address, state, _server: AbortOnDropHandle::new(server) })
    }

    /// What a pool's `url` is.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}/queue", self.address)
    }

    /// Looks at or changes its state.
    pub fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut lock(&self.state))
    }

    /// User data of a guest that takes one job, works on it for so many seconds, and ends.
    #[must_use]
    pub fn user_data(&self, seconds: u32) -> String {
        format!(
            "#!/bin/sh
queue=http://10.0.2.2:{}
me='runner=$(VMPOD_RUNNER_NAME)&token=$(VMPOD_RUNNER_TOKEN)'
until [ \"$(wget -q -O - \"$queue/work?$me\")\" = job ]; do sleep 1; done
sleep {seconds}
wget -q -O /dev/null \"$queue/done?$me\"
poweroff -f
",
            self.address.port()
        )
    }
}

async fn queue(
    Extract(state): Extract<Shared>,
    headers: HeaderMap,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    let mut state = lock(&state);
    if let Some((status, body, after)) = state.faults.pop_front() {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let after = after.map(|seconds| [("retry-after", seconds.to_string())]);
        return match after {
            Some(after) => (status, after, body).into_response(),
            None => (status, body).into_response(),
        };
    }
    let token = headers.get("authorization").and_then(|value| value.to_str().ok());
    if token != Some(&format!("Bearer {TOKEN}")) {
        return (StatusCode::UNAUTHORIZED, "who are you?").into_response();
    }
    state.pools.extend(query.get("pool").cloned());
    let runners: BTreeMap<&String, &str> =
        state.runners.iter().map(|(name, busy)| (name, if *busy { "busy" } else { "idle" })).collect();
    let oldest = state.pending.front().map(|since| since.elapsed().as_secs_f64());
    axum::Json(json!({"pending": state.pending.len(), "oldestSeconds": oldest, "runners": runners})).into_response()
}

fn runner(query: &BTreeMap<String, String>) -> Option<String> {
    query.get("runner").filter(|_| query.get("token").is_some_and(|token| token == RUNNER_TOKEN)).cloned()
}

async fn work(Extract(state): Extract<Shared>, Query(query): Query<BTreeMap<String, String>>) -> Response {
    let Some(runner) = runner(&query) else { return StatusCode::FORBIDDEN.into_response() };
    let mut state = lock(&state);
    let job = state.pending.pop_front().is_some();
    state.runners.insert(runner, job);
    if job { "job".into_response() } else { "nothing".into_response() }
}

async fn done(Extract(state): Extract<Shared>, Query(query): Query<BTreeMap<String, String>>) -> Response {
    let Some(runner) = runner(&query) else { return StatusCode::FORBIDDEN.into_response() };
    let mut state = lock(&state);
    state.runners.remove(&runner);
    state.done.push(runner);
    StatusCode::NO_CONTENT.into_response()
}
