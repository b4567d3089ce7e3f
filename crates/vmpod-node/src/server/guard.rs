//! What every request passes: authentication, authorization, counting.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{HeaderMap, StatusCode, header, request::Parts};
use rustls_pki_types::UnixTime;
use tokio::time::Instant;

use super::{
    App,
    access::{Action, User},
    listen::Shown,
};

/// A browser can't set headers on a WebSocket; Kubernetes lets it offer its token as a subprotocol.
const TOKEN_PROTOCOL: &str = "base64url.bearer.authorization.k8s.io.";

/// The longest token that is looked at.
const MAX_TOKEN: usize = 16 * 1024;

pub(super) async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let (mut parts, body) = request.into_parts();
    let method = parts.method.clone();
    let path = route(parts.uri.path());
    let response = match admit(&app, &parts).await {
        Ok(user) => {
            tracing::debug!(user = user.name, %method, path, "a request to the kubelet API");
            parts.headers.remove(header::AUTHORIZATION);
            next.run(Request::from_parts(parts, body)).await
        }
        Err(refusal) => refusal,
    };
    let seconds = began.elapsed().as_secs_f64();
    app.metrics.request(&method, path, response.status().as_u16(), seconds);
    response
}

async fn admit(app: &App, request: &Parts) -> Result<User, Response> {
    let Some(user) = identify(app, request).await else {
        return Err(plain(StatusCode::UNAUTHORIZED, "Unauthorized"));
    };
    let action = Action::of(&request.method, request.uri.path());
    let asked = || {
        let (user, verb, any) = (&user.name, action.verb, action.subresources.join(" "));
        format!("user={user}, verb={verb}, resource=nodes, subresource(s)=[{any}]")
    };
    match app.access.authorize(&user, &action).await {
        Ok(true) => Ok(user),
        Ok(false) => Err(plain(StatusCode::FORBIDDEN, &format!("Forbidden ({})", asked()))),
        Err(error) => {
            tracing::warn!(error = crate::error_chain(&error), "could not ask what a caller of the kubelet API may do");
            let message = format!("Authorization error ({})", asked());
            Err(plain(StatusCode::INTERNAL_SERVER_ERROR, &message))
        }
    }
}

/// The caller: by certificate, else by token.
async fn identify(app: &App, request: &Parts) -> Option<User> {
    if let Some(Shown(chain)) = request.extensions.get()
        && let Some(user) = app.serving.current().user(chain, UnixTime::now())
    {
        return Some(user);
    }
    let token = token(&request.headers)?;
    match app.access.authenticate(&token).await {
        Ok(user) => user,
        Err(error) => {
            tracing::warn!(
                error = crate::error_chain(&error),
                "could not review the token of a caller of the kubelet API"
            );
            None
        }
    }
}

fn token(headers: &HeaderMap) -> Option<String> {
    let token = if let Some(value) = headers.get(header::AUTHORIZATION) {
        let (scheme, token) = value.to_str().ok()?.trim().split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim().to_owned())?
    } else {
        let offered = offers(headers, header::SEC_WEBSOCKET_PROTOCOL.as_str());
        let encoded = offered.iter().find_map(|offer| offer.strip_prefix(TOKEN_PROTOCOL))?;
        String::from_utf8(URL_SAFE_NO_PAD.decode(encoded.trim_end_matches('=')).ok()?).ok()?
    };
    (!token.is_empty() && token.len() <= MAX_TOKEN).then_some(token)
}

/// All values of a header that may be repeated or hold a list.
pub(super) fn offers(headers: &HeaderMap, name: &str) -> Vec<String> {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(|one| one.trim().to_owned()).collect()
}

/// An answer in plain text.
pub(super) fn plain(status: StatusCode, message: &str) -> Response {
    let kind = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    (status, kind, Body::from(format!("{message}\n"))).into_response()
}

/// The route as a metric's label: one of a few.
fn route(path: &str) -> &'static str {
    let first = path.split('/').nth(1).unwrap_or_default();
    let routes = [
        "attach",
        "configz",
        "containerLogs",
        "exec",
        "healthz",
        "metrics",
        "pods",
        "portForward",
        "run",
        "runningpods",
        "stats",
    ];
    routes.into_iter().find(|route| *route == first).unwrap_or("other")
}
