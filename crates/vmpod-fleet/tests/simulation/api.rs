//! The API as one operator sees it: refused, unanswered, late, and watched through a window that breaks.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use kube::client::Body;
use serde_json::{Value, json};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::world::{Kind, Shared, World};

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// A client for one operator, and when that operator dies.
pub(crate) fn client(world: &Shared, operator: usize) -> (kube::Client, CancellationToken) {
    let crash = CancellationToken::new();
    world.with(|world| world.begin(operator));
    let (world, token) = (world.clone(), crash.clone());
    let service = tower::service_fn(move |request: Request<Body>| {
        let (world, token) = (world.clone(), token.clone());
        async move { serve(&world, operator, &token, request).await }
    });
    (kube::Client::new(service, "ci"), crash)
}

/// What a request is about.
struct Target {
    kind: Kind,
    namespace: Option<String>,
    name: Option<String>,
    status: bool,
}

fn target(path: &str) -> Target {
    let words: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    // `api/v1/…` or `apis/GROUP/VERSION/…`.
    let rest = if words[0] == "api" { &words[2..] } else { &words[3..] };
    let (namespace, rest) = match rest {
        ["namespaces", namespace, rest @ ..] => (Some((*namespace).to_owned()), rest),
        rest => (None, rest),
    };
    let name = rest.get(1).map(|name| (*name).to_owned());
    Target { kind: Kind::of(rest[0]), namespace, name, status: rest.get(2) == Some(&"status") }
}

fn answer(status: StatusCode, body: &Value) -> Answer {
    let body = Full::new(Bytes::from(body.to_string())).boxed_unsync();
    Response::builder().status(status).header("content-type", "application/json").body(body).unwrap()
}

fn refusal(code: u16, reason: &str) -> Answer {
    let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": reason, "metadata": {}});
    answer(StatusCode::from_u16(code).unwrap(), &body)
}

async fn serve(
    world: &Shared,
    operator: usize,
    crash: &CancellationToken,
    request: Request<Body>,
) -> Result<Answer, std::io::Error> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
    let body: Value = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
    let query: Vec<(String, String)> = form(parts.uri.query().unwrap_or_default());
    let of = |name: &str| query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    let target = target(parts.uri.path());
    let fate = world.with(|world| world.fate(operator, parts.method != Method::GET));
    sleep(fate.before).await;
    if let Some(code) = fate.refused {
        return Ok(refusal(code, "InternalError"));
    }
    if fate.lost_before {
        return Err(std::io::Error::other("the connection broke before the call arrived"));
    }
    if of("watch") == Some("true") || of("watch") == Some("1") {
        let from = of("resourceVersion").and_then(|text| text.parse().ok()).unwrap_or(0);
        return Ok(watch(world, target.kind, of("labelSelector"), from));
    }
    let content = parts.headers.get("content-type").and_then(|kind| kind.to_str().ok()).unwrap_or_default().to_owned();
    let done = world.with(|world| act(world, &parts.method, &target, of("labelSelector"), &content, body));
    if fate.crash {
        // The effect is there, and whoever wanted it will never know.
        crash.cancel();
        std::future::pending::<()>().await;
    }
    sleep(fate.after).await;
    if fate.lost_after {
        return Err(std::io::Error::other("the connection broke before the answer came"));
    }
    Ok(match done {
        Ok((status, value)) => answer(status, &value),
        Err((code, reason)) => refusal(code, reason),
    })
}

fn form(text: &str) -> Vec<(String, String)> {
    let decode = |text: &str| text.replace("%2F", "/").replace("%3D", "=").replace("%2C", ",").replace('+', " ");
    text.split('&').filter_map(|pair| pair.split_once('=')).map(|(key, value)| (decode(key), decode(value))).collect()
}

type Done = Result<(StatusCode, Value), (u16, &'static str)>;

fn act(
    world: &mut World,
    method: &Method,
    target: &Target,
    selector: Option<&str>,
    content: &str,
    body: Value,
) -> Done {
    let namespace = target.namespace.clone().unwrap_or_default();
    match (method, &target.name) {
        (&Method::GET, None) => Ok((StatusCode::OK, world.list(target.kind, target.namespace.as_deref(), selector))),
        (&Method::GET, Some(name)) => {
            world.get(target.kind, &namespace, name).map(|value| (StatusCode::OK, value)).ok_or((404, "NotFound"))
        }
        (&Method::POST, None) => world.create(target.kind, &namespace, body).map(|value| (StatusCode::CREATED, value)),
        (&Method::PUT, Some(name)) => world.replace(target.kind, &namespace, name, body).map(|v| (StatusCode::OK, v)),
        (&Method::PATCH, Some(name)) => {
            let done = world.patch(target.kind, &namespace, name, target.status, content, body);
            done.map(|value| (StatusCode::OK, value))
        }
        (&Method::DELETE, Some(name)) => {
            let done = world.delete(target.kind, &namespace, name, body["preconditions"]["uid"].as_str());
            done.map(|value| (StatusCode::OK, value))
        }
        _ => panic!("the simulated API has no {method} for {:?}", target.kind),
    }
}

/// A watch: late by chance, in order, and broken off by chance.
fn watch(world: &Shared, kind: Kind, selector: Option<&str>, from: u64) -> Answer {
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel::<Bytes>();
    let world = world.clone();
    let selected = selector.map(str::to_owned);
    tokio::spawn(async move {
        let mut at = from;
        let mut changed = world.with(World::subscribe);
        loop {
            let (lines, pause, ends) = world.with(|world| world.since(kind, selected.as_deref(), &mut at));
            if !lines.is_empty() {
                sleep(Duration::from_millis(pause)).await;
            }
            for line in lines {
                if sender.send(Bytes::from(format!("{line}\n"))).is_err() {
                    return;
                }
            }
            if ends {
                return;
            }
            tokio::select! {
                biased;
                () = sender.closed() => return,
                seen = changed.recv() => if seen.is_none() { return },
            }
        }
    });
    let frames = tokio_stream_of(receiver).map(|bytes| Ok::<_, Infallible>(hyper::body::Frame::data(bytes)));
    let body = StreamBody::new(frames).boxed_unsync();
    Response::builder().status(200).header("content-type", "application/json").body(body).unwrap()
}

fn tokio_stream_of(mut receiver: tokio::sync::mpsc::UnboundedReceiver<Bytes>) -> impl futures::Stream<Item = Bytes> {
    futures::stream::poll_fn(move |context| receiver.poll_recv(context))
}
