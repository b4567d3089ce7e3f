//! The fleet's metrics over HTTP.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use axum::Router;
use axum::routing::get;
use http::header::CONTENT_TYPE;
use tokio_util::task::AbortOnDropHandle;

use crate::output::talk;

/// Serves them until what is returned is dropped.
pub(crate) async fn serve(
    listen: Option<SocketAddr>,
    metrics: &vmpod_fleet::Metrics,
) -> Result<Option<AbortOnDropHandle<()>>> {
    let Some(listen) = listen else { return Ok(None) };
    let listener = tokio::net::TcpListener::bind(listen)
        .await
        .with_context(|| format!("can't offer metrics at {listen} (--metrics-listen)"))?;
    let address = listener.local_addr().context("the metrics have no address")?;
    let metrics = metrics.clone();
    let text = async move || {
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        ([(CONTENT_TYPE, kind)], metrics.render())
    };
    let router = Router::new().route("/metrics", get(text)).route("/healthz", get(async || "ok"));
    talk(&format!("metrics: http://{address}/metrics"));
    Ok(Some(AbortOnDropHandle::new(tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::warn!(%error, "the metrics are no longer offered");
        }
    }))))
}
