//! The routes that answer and are done; [`sessions`] has those that stay.

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, Query, State},
    middleware,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http::{StatusCode, header};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

use super::{
    App, PodRef, RuntimeError, Target,
    guard::{guard, plain},
    metrics, sessions, summary,
};
use crate::logs::{LogOptions, QueryError};

/// Query parameters in order.
pub(super) type Pairs = Query<Vec<(String, String)>>;

/// The parameters as borrowed pairs.
pub(super) fn borrowed(pairs: &Pairs) -> impl Iterator<Item = (&str, &str)> {
    pairs.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
}

pub(super) fn router(app: Arc<App>) -> Router {
    let exec = get(sessions::exec).post(sessions::exec);
    let attach = get(sessions::attach).post(sessions::attach);
    let forward = get(sessions::port_forward).post(sessions::port_forward);
    Router::new()
        .route("/healthz", get(healthz))
        .route("/healthz/ping", get(healthz))
        .route("/pods", get(pods))
        .route("/pods/", get(pods))
        .route("/runningpods", get(running_pods))
        .route("/runningpods/", get(running_pods))
        .route("/configz", get(configz))
        .route("/containerLogs/{namespace}/{pod}/{container}", get(container_logs))
        .route("/exec/{namespace}/{pod}/{container}", exec.clone())
        .route("/exec/{namespace}/{pod}/{uid}/{container}", exec)
        .route("/attach/{namespace}/{pod}/{container}", attach.clone())
        .route("/attach/{namespace}/{pod}/{uid}/{container}", attach)
        .route("/portForward/{namespace}/{pod}", forward.clone())
        .route("/portForward/{namespace}/{pod}/{uid}", forward)
        .route("/run/{namespace}/{pod}/{container}", post(sessions::run))
        .route("/run/{namespace}/{pod}/{uid}/{container}", post(sessions::run))
        .route("/stats/summary", get(stats_summary))
        .route("/metrics", get(own_metrics))
        .route("/metrics/resource", get(resource_metrics))
        .route("/metrics/probes", get(probe_metrics))
        .fallback(async || plain(StatusCode::NOT_FOUND, "404 page not found"))
        .layer(middleware::from_fn_with_state(app.clone(), guard))
        .with_state(app)
}

/// A container of a path; the UID is optional.
#[derive(serde::Deserialize)]
pub(super) struct ContainerPath {
    namespace: String,
    pod: String,
    uid: Option<String>,
    container: String,
}

impl From<ContainerPath> for Target {
    fn from(path: ContainerPath) -> Self {
        let pod = PodRef { namespace: path.namespace, name: path.pod, uid: path.uid };
        Self { pod, container: path.container }
    }
}

/// A pod of a path; the UID is optional.
#[derive(serde::Deserialize)]
pub(super) struct PodPath {
    namespace: String,
    pod: String,
    uid: Option<String>,
}

impl From<PodPath> for PodRef {
    fn from(path: PodPath) -> Self {
        Self { namespace: path.namespace, name: path.pod, uid: path.uid }
    }
}

impl RuntimeError {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::NoPod(_) | Self::NoContainer(_) => StatusCode::NOT_FOUND,
            Self::NotRunning { .. } | Self::NoLog { .. } | Self::Unsupported(_) => StatusCode::BAD_REQUEST,
            Self::Guest { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl IntoResponse for RuntimeError {
    fn into_response(self) -> Response {
        plain(self.status(), &crate::error_chain(&self))
    }
}

async fn healthz() -> Response {
    // Exactly what the kubelet says; scripts compare it.
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], "ok").into_response()
}

fn list(pods: &[Arc<Pod>]) -> Response {
    let items: Vec<&Pod> = pods.iter().map(|pod| &**pod).collect();
    Json(json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})).into_response()
}

async fn pods(State(app): State<Arc<App>>) -> Response {
    list(&app.runtime.pods())
}

async fn running_pods(State(app): State<Arc<App>>) -> Response {
    list(&app.runtime.running_pods())
}

async fn configz(State(app): State<Arc<App>>) -> Response {
    Json(json!({"kubeletconfig": app.config})).into_response()
}

async fn container_logs(State(app): State<Arc<App>>, Path(path): Path<ContainerPath>, query: Pairs) -> Response {
    let options = match LogOptions::from_query(borrowed(&query), Timestamp::now()) {
        Ok(options) => options,
        Err(error @ QueryError::Undecodable { .. }) => {
            return plain(StatusCode::BAD_REQUEST, &error.to_string());
        }
        Err(error @ QueryError::Invalid(_)) => {
            return plain(StatusCode::UNPROCESSABLE_ENTITY, &error.to_string());
        }
    };
    match app.runtime.logs(&path.into(), options).await {
        Ok(lines) => {
            let kind = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
            (kind, Body::from_stream(lines)).into_response()
        }
        Err(error) => error.into_response(),
    }
}

async fn stats_summary(State(app): State<Arc<App>>, query: Pairs) -> Response {
    let brief = borrowed(&query).any(|pair| matches!(pair, ("only_cpu_and_memory", "true" | "1")));
    match app.runtime.stats().await {
        Ok(stats) => Json(summary::summary(app.access.node(), &stats, brief)).into_response(),
        Err(error) => error.into_response(),
    }
}

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

async fn own_metrics(State(app): State<Arc<App>>) -> Response {
    let running = app.runtime.running_pods();
    let text = app.metrics.render(running.iter().map(|pod| &**pod));
    ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response()
}

async fn resource_metrics(State(app): State<Arc<App>>) -> Response {
    let stats = app.runtime.stats().await;
    if let Err(error) = &stats {
        tracing::warn!(error = crate::error_chain(error), "no figures for /metrics/resource");
    }
    ([(header::CONTENT_TYPE, PROMETHEUS)], metrics::resource(stats.ok().as_ref())).into_response()
}

async fn probe_metrics(State(app): State<Arc<App>>) -> Response {
    ([(header::CONTENT_TYPE, OPEN_METRICS)], app.runtime.probes()).into_response()
}
