//! What every call passes: what goes wrong on purpose, maintenance, rate limits, and a line in the list of calls.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State as Extract};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Shared;
use super::state::{CALLS, Call, State};

/// What goes wrong.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Fault {
    /// Calls with this method; all without.
    pub method: Option<String>,
    /// Calls whose path holds this.
    pub path: String,
    /// How they are answered.
    pub status: u16,
    /// With `Retry-After`, in seconds.
    pub retry_after: Option<u64>,
    /// With this body.
    pub body: Option<Value>,
    /// How often; 0 is for ever.
    pub times: u32,
    /// The call has its effect, and then its answer is lost.
    pub after: bool,
    /// The answer comes this much later. With no `status` that is all.
    pub delay_ms: u64,
}

/// How many calls there were in the current minute.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    minute: i64,
    calls: u32,
}

/// A JSON answer.
pub(super) fn answer(status: StatusCode, body: &Value) -> Response {
    (status, axum::Json(body)).into_response()
}

/// GitLab's usual refusal.
pub(super) fn refuse(status: StatusCode, why: &str) -> Response {
    answer(status, &json!({ "message": format!("{} {why}", status.as_u16()) }))
}

/// Whether an administrator's token came along; its refusal if not.
pub(super) fn administrator(state: &State, headers: &HeaderMap) -> Result<(), Box<Response>> {
    if access_token(headers).as_deref() == Some(state.config.access_token.as_str()) {
        Ok(())
    } else {
        Err(Box::new(refuse(StatusCode::UNAUTHORIZED, "Unauthorized")))
    }
}

fn access_token(headers: &HeaderMap) -> Option<String> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let bearer = || text("authorization").and_then(|value| value.strip_prefix("Bearer "));
    text("private-token").or_else(bearer).map(str::to_owned)
}

/// The middleware.
pub(super) async fn pass(Extract(shared): Extract<Shared>, request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let fault = take_fault(&mut shared.state(), &method, &path);
    let response = if let Some(fault) = fault {
        tokio::time::sleep(Duration::from_millis(fault.delay_ms)).await;
        if fault.status == 0 {
            next.run(request).await
        } else {
            if fault.after {
                drop(next.run(request).await);
            }
            faulty(&fault)
        }
    } else {
        let refusal = gate(&mut shared.state(), &request, Timestamp::now());
        match refusal {
            Ok(headers) => {
                let mut response = next.run(request).await;
                response.headers_mut().extend(headers);
                response
            }
            Err(refusal) => *refusal,
        }
    };
    let mut state = shared.state();
    if state.calls.len() == CALLS {
        state.calls.pop_front();
    }
    state.calls.push_back(Call { method: method.to_string(), path, status: response.status().as_u16() });
    response
}

fn take_fault(state: &mut State, method: &Method, path: &str) -> Option<Fault> {
    let matches = |fault: &Fault| {
        path.contains(&fault.path) && fault.method.as_deref().is_none_or(|wanted| wanted == method.as_str())
    };
    let index = state.faults.iter().position(matches)?;
    let fault = state.faults[index].clone();
    match fault.times {
        0 => {}
        1 => drop(state.faults.remove(index)),
        _ => state.faults[index].times -= 1,
    }
    Some(fault)
}

fn faulty(fault: &Fault) -> Response {
    let status = StatusCode::from_u16(fault.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let body = fault.body.clone().unwrap_or_else(|| json!({ "message": status.to_string() }));
    let mut response = answer(status, &body);
    if let Some(seconds) = fault.retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

/// Lets a call through with the headers of its limit, or doesn't.
fn gate(state: &mut State, request: &Request<Body>, now: Timestamp) -> Result<HeaderMap, Box<Response>> {
    let path = request.uri().path();
    if state.maintenance && request.method() != Method::GET && !path.ends_with("/graphql") {
        let mut response = answer(
            StatusCode::SERVICE_UNAVAILABLE,
            &json!({ "message": "GitLab is undergoing maintenance: you cannot perform write operations on a read-only instance" }),
        );
        response.headers_mut().insert(header::RETRY_AFTER, 2.into());
        return Err(Box::new(response));
    }
    let limit = state.config.api_per_minute;
    match access_token(request.headers()) {
        Some(token) if limit > 0 => count(state, &token, limit, now),
        _ => Ok(HeaderMap::new()),
    }
}

/// Counts a call against a limit of so many a minute.
pub(super) fn count(state: &mut State, key: &str, limit: u32, now: Timestamp) -> Result<HeaderMap, Box<Response>> {
    let minute = now.as_second().div_euclid(60);
    let window = state.windows.entry(key.to_owned()).or_insert(Window { minute, calls: 0 });
    if window.minute != minute {
        *window = Window { minute, calls: 0 };
    }
    window.calls += 1;
    let (calls, reset) = (window.calls, (minute + 1) * 60);
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("ratelimit-limit", limit.to_string()),
        ("ratelimit-observed", calls.to_string()),
        ("ratelimit-remaining", limit.saturating_sub(calls).to_string()),
        ("ratelimit-reset", reset.to_string()),
        ("ratelimit-resettime", http_date(reset)),
    ] {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(name, value);
        }
    }
    if calls <= limit {
        return Ok(headers);
    }
    let mut response = (StatusCode::TOO_MANY_REQUESTS, "Retry later\n").into_response();
    headers.insert(header::RETRY_AFTER, (reset - now.as_second()).max(1).into());
    response.headers_mut().extend(headers);
    Err(Box::new(response))
}

/// A moment as HTTP writes it.
fn http_date(second: i64) -> String {
    let moment = Timestamp::from_second(second).unwrap_or(Timestamp::UNIX_EPOCH);
    moment.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()
}
