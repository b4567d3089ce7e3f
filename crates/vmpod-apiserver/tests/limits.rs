//! Many watchers, slow ones, and clients that never finish what they say.
#![expect(clippy::unwrap_used, reason = "a test stops at the first thing that is wrong")]

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use http::{Method, Request};
use http_body_util::BodyExt as _;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Barrier;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;
use vmpod_apiserver::{ApiServer, Identity, Options};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

async fn open(listen: bool) -> (tempfile::TempDir, ApiServer) {
    let dir = tempfile::tempdir().unwrap();
    let listen = listen.then(|| (Ipv4Addr::LOCALHOST, 0).into());
    let options = Options { dir: dir.path().join("api"), listen, extra_sans: Vec::new() };
    (dir, ApiServer::open(options).await.unwrap())
}

async fn ask(server: &ApiServer, method: Method, path: &str, body: Body) -> http::Response<Body> {
    let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
    server.router_as(Identity::admin()).oneshot(request.body(body).unwrap()).await.unwrap()
}

async fn create(server: &ApiServer, name: &str, data: &str) {
    let map = json!({ "metadata": { "name": name, "labels": { "show": "y" } }, "data": { "k": data } });
    assert_eq!(ask(server, Method::POST, MAPS, Body::from(map.to_string())).await.status(), 201);
}

async fn revision(server: &ApiServer) -> String {
    let list = ask(server, Method::GET, MAPS, Body::empty()).await.into_body().collect().await.unwrap().to_bytes();
    let list: Value = serde_json::from_slice(&list).unwrap();
    list["metadata"]["resourceVersion"].as_str().unwrap().to_owned()
}

/// Reads events of a watch until there are `count`, or its end; the names and the last revision.
async fn events(body: &mut Body, count: usize) -> Vec<(String, String)> {
    let (mut text, mut seen) = (Vec::new(), Vec::new());
    while seen.len() < count {
        let Some(frame) = body.frame().await else { break };
        text.extend_from_slice(frame.unwrap().data_ref().unwrap());
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            let event: Value = serde_json::from_slice(&line).unwrap();
            if event["type"] != "BOOKMARK" {
                let meta = &event["object"]["metadata"];
                let text = |field: &str| meta[field].as_str().unwrap_or_default().to_owned();
                seen.push((text("name"), text("resourceVersion")));
            }
        }
    }
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_watchers_see_every_event_in_order() {
    const WATCHERS: usize = 1000;
    const EVENTS: usize = 30;
    let (_dir, server) = open(false).await;
    let since = revision(&server).await;
    let ready = Arc::new(Barrier::new(WATCHERS + 1));
    let mut tasks = JoinSet::new();
    for _ in 0..WATCHERS {
        let (server, since, ready) = (server.clone(), since.clone(), ready.clone());
        tasks.spawn(async move {
            let path = format!("{MAPS}?watch=true&labelSelector=show%3Dy&resourceVersion={since}");
            let response = ask(&server, Method::GET, &path, Body::empty()).await;
            assert_eq!(response.status(), 200);
            let mut body = response.into_body();
            ready.wait().await;
            events(&mut body, EVENTS).await
        });
    }
    ready.wait().await;
    for number in 0..EVENTS {
        create(&server, &format!("m{number}"), "x").await;
    }
    let wanted: Vec<String> = (0..EVENTS).map(|number| format!("m{number}")).collect();
    let all = async {
        while let Some(seen) = tasks.join_next().await {
            let names: Vec<String> = seen.unwrap().into_iter().map(|(name, _)| name).collect();
            assert_eq!(names, wanted);
        }
    };
    tokio::time::timeout(Duration::from_mins(1), all).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_is_not_read_ends_and_goes_on_from_where_it_was() {
    const EVENTS: usize = 9000;
    let (_dir, server) = open(false).await;
    let since = revision(&server).await;
    let watch = |since: String| {
        let server = server.clone();
        async move {
            let path = format!("{MAPS}?watch=true&resourceVersion={since}&timeoutSeconds=50");
            ask(&server, Method::GET, &path, Body::empty()).await.into_body()
        }
    };
    // Nobody reads the one; the other keeps up.
    let mut slow = watch(since.clone()).await;
    let mut quick = watch(since).await;
    let reader = tokio::spawn(async move { events(&mut quick, EVENTS).await.len() });
    for batch in 0..EVENTS / 100 {
        let writes = (0..100).map(|index| {
            let server = &server;
            async move { create(server, &format!("m{batch}-{index}"), "x").await }
        });
        futures::future::join_all(writes).await;
    }
    assert_eq!(tokio::time::timeout(Duration::from_mins(1), reader).await.unwrap().unwrap(), EVENTS);
    let seen = tokio::time::timeout(Duration::from_secs(20), events(&mut slow, EVENTS)).await.unwrap();
    assert!(seen.len() < EVENTS, "it was never cut off");
    // Its client asks again from the last event that it has, and misses none.
    let (_, last) = seen.last().unwrap().clone();
    let mut again = watch(last).await;
    let rest = tokio::time::timeout(Duration::from_secs(20), events(&mut again, EVENTS - seen.len())).await.unwrap();
    let mut names: Vec<String> = seen.into_iter().chain(rest).map(|(name, _)| name).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), EVENTS);
}

#[tokio::test]
async fn a_client_that_never_finishes_its_head_is_let_go() {
    drop(rustls::crypto::ring::default_provider().install_default());
    let (_dir, server) = open(true).await;
    let address = server.address().unwrap();
    let stop = CancellationToken::new();
    let serving = tokio::spawn({
        let (server, stop) = (server.clone(), stop.clone());
        async move { server.serve(stop).await }
    });
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(server.pki().ca_pem().as_bytes()).unwrap()).unwrap();
    let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    // One never begins to encrypt, one never ends its request's head.
    let mut silent = tokio::net::TcpStream::connect(address).await.unwrap();
    let tcp = tokio::net::TcpStream::connect(address).await.unwrap();
    let mut drip = connector.connect("localhost".try_into().unwrap(), tcp).await.unwrap();
    drip.write_all(b"GET /readyz HTTP/1.1\r\nhost: x\r\nx-a: ").await.unwrap();
    let begun = Instant::now();
    let dripping = async {
        // A letter now and then doesn't buy more time.
        loop {
            tokio::select! {
                read = async { drip.read(&mut [0; 512]).await } => match read {
                    Ok(0) | Err(_) => return,
                    Ok(_) => {}
                },
                () = tokio::time::sleep(Duration::from_secs(2)) => {}
            }
            if drip.write_all(b"a").await.is_err() {
                return;
            }
        }
    };
    let waiting = async { tokio::join!(dripping, async { silent.read(&mut [0; 64]).await.unwrap_or(0) }) };
    let ((), told) = tokio::time::timeout(Duration::from_secs(40), waiting).await.unwrap();
    assert_eq!(told, 0);
    assert!(begun.elapsed() > Duration::from_secs(10), "{:?}", begun.elapsed());
    stop.cancel();
    serving.await.unwrap().unwrap();
}

#[tokio::test]
async fn selectors_and_nesting_have_bounds() {
    let (_dir, server) = open(false).await;
    let code = |method: Method, path: String, body: String| {
        let server = server.clone();
        async move { ask(&server, method, &path, Body::from(body)).await.status().as_u16() }
    };
    let begun = Instant::now();
    let values: Vec<String> = (0..9000).map(|number| format!("v{number}")).collect();
    let selector = format!("a%20in%20({})", values.join(","));
    assert_eq!(code(Method::GET, format!("{MAPS}?labelSelector={selector}"), String::new()).await, 200);
    let many: Vec<String> = (0..8000).map(|number| format!("!k{number}")).collect();
    assert_eq!(code(Method::GET, format!("{MAPS}?labelSelector={}", many.join(",")), String::new()).await, 200);
    let long = "a,".repeat(30_000) + "a";
    assert_eq!(code(Method::GET, format!("{MAPS}?labelSelector={long}"), String::new()).await, 200);
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        for depth in [130, 3000, 200_000] {
            let deep = open.repeat(depth) + "1" + &close.repeat(depth);
            let body = format!(
                "{{\"apiVersion\":\"v1\",\"kind\":\"ConfigMap\",\"metadata\":{{\"name\":\"d\"}},\"x\":{deep}}}"
            );
            let found = code(Method::POST, MAPS.into(), body).await;
            assert!(matches!(found, 400 | 422), "{open} {depth}: {found}");
        }
    }
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}
