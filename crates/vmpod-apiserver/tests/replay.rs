//! Replays the exchanges recorded from a real kube-apiserver 1.36 and compares every answer.
//!
//! `recordings/*.json` are request and response pairs, in the order in which they were made: later files use
//! objects that earlier ones made, so they are replayed as one story against one fresh server.
//!
//! What can't be equal between two servers (uids, revisions, times…) is named once, in `replay/volatile.rs`.
//! Where we knowingly answer differently, `replay/known.rs` says where and why; an entry there that no
//! longer holds fails the test too. `docs/api.md` mirrors that table.

#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

#[path = "replay/known.rs"]
mod known;
#[path = "replay/volatile.rs"]
mod volatile;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use http::Request;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;
use vmpod_apiserver::{ApiServer, Identity, Options};

use volatile::Names;

/// How long what a controller does may take to show.
const PATIENCE: Duration = Duration::from_secs(4);

struct Exchange {
    /// `03-pod-create-defaults/0`
    id: String,
    request: Value,
    response: Value,
}

fn exchanges() -> Vec<Exchange> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recordings");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut out = Vec::new();
    for file in files {
        let name = file.file_stem().unwrap().to_str().unwrap().to_owned();
        let list: Vec<Value> = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        for (index, pair) in list.into_iter().enumerate() {
            let (request, response) = (pair["request"].clone(), pair["response"].clone());
            out.push(Exchange { id: format!("{name}/{index}"), request, response });
        }
    }
    out
}

async fn ask(router: &Router, request: &Value, names: &Names) -> Value {
    let path = names.translate_path(request["path"].as_str().unwrap());
    let mut builder = Request::builder().method(request["method"].as_str().unwrap()).uri(path);
    for (key, value) in request["headers"].as_object().unwrap() {
        builder = builder.header(key, value.as_str().unwrap());
    }
    let body = match &request["body"] {
        Value::Null => Body::empty(),
        body => Body::from(names.translate(body).to_string()),
    };
    let response = router.clone().oneshot(builder.body(body).unwrap()).await.unwrap();
    let status = response.status().as_u16();
    let warnings: Vec<String> =
        response.headers().get_all("warning").iter().map(|value| value.to_str().unwrap().to_owned()).collect();
    let kind = response.headers().get("content-type").map(|value| value.to_str().unwrap().to_owned());
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    let body = if request["path"].as_str().unwrap().contains("watch=true") {
        text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).collect()
    } else {
        serde_json::from_str(&text).unwrap_or(Value::String(text))
    };
    let mut out = json!({"status": status, "contentType": kind, "body": body});
    if !warnings.is_empty() {
        out["warning"] = warnings.join(", ").into();
    }
    out
}

/// One place where two answers differ.
#[derive(Debug)]
struct Difference {
    path: String,
    recorded: Value,
    ours: Value,
}

fn compare(recorded: &Value, ours: &Value, path: &str, names: &mut Names, out: &mut Vec<Difference>) {
    if names.agree(path, recorded, ours) {
        return;
    }
    match (recorded, ours) {
        (Value::Object(a), Value::Object(b)) => {
            // Keys hold uids too, in `managedFields`.
            let a: BTreeMap<String, &Value> = a.iter().map(|(key, value)| (names.replaced(key), value)).collect();
            let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let here = format!("{path}/{key}");
                compare(
                    a.get(key).copied().unwrap_or(&Value::Null),
                    b.get(key).unwrap_or(&Value::Null),
                    &here,
                    names,
                    out,
                );
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (index, (a, b)) in a.iter().zip(b).enumerate() {
                compare(a, b, &format!("{path}/{index}"), names, out);
            }
        }
        _ if recorded == ours => {}
        _ => out.push(Difference { path: path.to_owned(), recorded: recorded.clone(), ours: ours.clone() }),
    }
}

async fn server() -> (Router, CancellationToken, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { dir: folder.path().to_path_buf(), listen: None, extra_sans: Vec::new() };
    let api = ApiServer::open(options).await.unwrap();
    let stop = CancellationToken::new();
    let (running, token) = (api.clone(), stop.clone());
    tokio::spawn(async move { running.run_controllers(token).await });
    (api.router_as(Identity::admin()), stop, folder)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_recorded_exchange() {
    let (router, stop, _folder) = server().await;
    let mut names = Names::default();
    let mut used: BTreeSet<usize> = BTreeSet::new();
    let mut failures = Vec::new();
    let mut matched = 0;
    let all = exchanges();
    for exchange in &all {
        let mut recorded = exchange.response.clone();
        volatile::drop_foreign_parts(&mut recorded);
        let started = Instant::now();
        // What controllers do shows a little later, here as there.
        let (kept, differences) = loop {
            let ours = known::without_metrics(&exchange.id, &ask(&router, &exchange.request, &names).await);
            let mut attempt = names.clone();
            let mut differences = Vec::new();
            let recorded = known::served_here(&exchange.id, &recorded, &ours);
            compare(&recorded, &ours, "", &mut attempt, &mut differences);
            differences.retain(|one| match known::find(&exchange.id, &one.path) {
                Some(index) => {
                    used.insert(index);
                    false
                }
                None => true,
            });
            let again = exchange.request["method"] == "GET" && !differences.is_empty() && started.elapsed() < PATIENCE;
            if !again {
                break (attempt, differences);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        names = kept;
        for (after, request) in volatile::unrecorded() {
            if after == exchange.id {
                let answer = ask(&router, &request, &names).await;
                assert_eq!(answer["status"], 200, "{answer}");
            }
        }
        matched += usize::from(differences.is_empty());
        if !differences.is_empty() {
            let request = &exchange.request;
            let mut text = format!("{} {} {} {}\n", exchange.id, request["method"], request["path"], request["body"]);
            for one in &differences {
                text.extend([format!("  at {}\n    recorded {}\n    ours     {}\n", one.path, one.recorded, one.ours)]);
            }
            failures.push(text);
        }
    }
    stop.cancel();
    for (index, one) in known::KNOWN.iter().enumerate().filter(|(index, _)| !used.contains(index)) {
        failures.push(format!(
            "{} {}: agrees now, so known.rs need not list it ({index}: {})",
            one.exchange, one.path, one.reason
        ));
    }
    println!("{matched} of {} exchanges agree", all.len());
    assert!(failures.is_empty(), "{} of {} exchanges differ:\n{}", failures.len(), all.len(), failures.join("\n"));
}
