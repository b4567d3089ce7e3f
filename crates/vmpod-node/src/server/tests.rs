//! The whole server over real TLS, with a scripted agent and a scripted API.

mod api;
mod scripted;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{AttachParams, TerminalSize},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use self::{
    api::{Authority, FakeApi},
    scripted::Scripted,
};
use super::*;
use crate::{
    logs::{Limits, Live, LogFile, Stream, Writer},
    streaming::spdy::client::{Client, Event},
};

/// A server that runs, and everything around it.
struct World {
    address: SocketAddr,
    authority: Authority,
    api: Arc<FakeApi>,
    runtime: Arc<Scripted>,
    serving: Serving,
    stop: CancellationToken,
    served: tokio::task::JoinHandle<io::Result<()>>,
}

/// Who a test calls as.
#[derive(Clone, Copy, Debug)]
enum As<'a> {
    Nobody,
    Cert(&'a str, &'a [&'a str]),
    Stranger,
    Token(&'a str),
}

/// The API server's own identity.
const API_SERVER: As<'static> = As::Cert("kube-apiserver-kubelet-client", &["system:masters"]);

impl World {
    async fn new() -> Self {
        let authority = Authority::new("cluster");
        let (cert, key) = authority.issue("node", &[], &["localhost"]);
        let pem = tls::Pem { cert, key, client_ca: Some(authority.pem()) };
        let serving = Serving::new(&pem).unwrap();
        let api = Arc::new(FakeApi::default());
        let runtime = Arc::new(Scripted::default());
        let server = Server::new(Options {
            node: "node-1".to_owned(),
            client: api.clone().client(),
            serving: serving.clone(),
            runtime: runtime.clone(),
            config: json!({"kind": "NodeConfiguration"}),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(server.serve(listener, stop.clone()));
        Self { address, authority, api, runtime, serving, stop, served: task }
    }

    async fn connect(&self, who: As<'_>) -> tokio_rustls::client::TlsStream<TcpStream> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.authority.pem().as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let identity = match who {
            As::Cert(name, groups) => Some(self.authority.issue(name, groups, &[])),
            As::Stranger => Some(Authority::new("other").issue("root", &["system:masters"], &[])),
            As::Nobody | As::Token(_) => None,
        };
        let mut config = match identity {
            None => config.with_no_client_auth(),
            Some((cert, key)) => {
                let chain = vec![CertificateDer::from_pem_slice(cert.as_bytes()).unwrap()];
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
                config.with_client_auth_cert(chain, key).unwrap()
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let socket = TcpStream::connect(self.address).await.unwrap();
        let stream = connector.connect("localhost".try_into().unwrap(), socket).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
        stream
    }

    async fn send(&self, who: As<'_>, method: &str, path: &str, headers: &[(&str, &str)]) -> Response<Incoming> {
        let io = TokioIo::new(self.connect(who).await);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        let mut request = Request::builder().method(method).uri(path).header("host", "localhost");
        if let As::Token(token) = who {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        sender.send_request(request.body(Empty::<Bytes>::new()).unwrap()).await.unwrap()
    }

    async fn get(&self, path: &str) -> (StatusCode, String) {
        text(self.send(API_SERVER, "GET", path, &[]).await).await
    }

    /// An upgraded SPDY connection.
    async fn spdy(&self, path: &str, protocols: &[&str]) -> Client<TokioIo<hyper::upgrade::Upgraded>> {
        let mut headers = vec![("connection", "Upgrade"), ("upgrade", "SPDY/3.1")];
        headers.extend(protocols.iter().map(|protocol| ("x-stream-protocol-version", *protocol)));
        let response = self.send(API_SERVER, "POST", path, &headers).await;
        assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
        let chosen = response.headers().get("x-stream-protocol-version");
        assert_eq!(chosen.map(|value| value.to_str().unwrap()), protocols.first().copied());
        Client::new(TokioIo::new(hyper::upgrade::on(response).await.unwrap()))
    }

    /// A kube-rs client whose calls for pods land here as an API server would send them.
    fn kube(self: &Arc<Self>) -> kube::Client {
        let world = self.clone();
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let world = world.clone();
            async move { world.forward(request).await }
        });
        kube::Client::new(service, "default")
    }

    async fn forward(&self, request: Request<kube::client::Body>) -> Result<Response<Incoming>, io::Error> {
        let uri = request.uri().to_string();
        let (path, query) = uri.split_once('?').unwrap_or((&uri, ""));
        let parts: Vec<_> = path.split('/').collect();
        let ["", "api", "v1", "namespaces", namespace, "pods", pod, verb] = parts[..] else {
            return Err(io::Error::other(format!("{path} is not proxied")));
        };
        let query = query.replace("stdin=true", "input=1").replace("stdout=true", "output=1");
        let query = query.replace("stderr=true", "error=1").replace("tty=true", "tty=1");
        let path = match verb {
            "portforward" => format!("/portForward/{namespace}/{pod}?{query}"),
            "log" => format!("/containerLogs/{namespace}/{pod}/main?{query}"),
            _ => format!("/{verb}/{namespace}/{pod}/main?{query}"),
        };
        let headers: Vec<_> =
            request.headers().iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        let headers: Vec<_> = headers.into_iter().filter(|(name, _)| *name != "host").collect();
        Ok(self.send(API_SERVER, request.method().as_str(), &path, &headers).await)
    }
}

async fn text(response: Response<Incoming>) -> (StatusCode, String) {
    let status = response.status();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(bytes.to_vec()).unwrap())
}

/// Every route, and what nobody serves.
const ROUTES: [(&str, &str, &str, &[&str]); 26] = [
    ("GET", "/healthz", "get", &["healthz", "proxy"]),
    ("GET", "/healthz/ping", "get", &["healthz", "proxy"]),
    ("GET", "/pods", "get", &["pods", "proxy"]),
    ("GET", "/runningpods/", "get", &["pods", "proxy"]),
    ("GET", "/configz", "get", &["configz", "proxy"]),
    ("GET", "/containerLogs/default/vm/main", "get", &["proxy"]),
    ("GET", "/exec/default/vm/main?command=true&output=1", "create", &["proxy"]),
    ("POST", "/exec/default/vm/main?command=true&output=1", "create", &["proxy"]),
    ("POST", "/exec/default/vm/uid-1/main?command=true&output=1", "create", &["proxy"]),
    ("GET", "/attach/default/vm/main?output=1", "create", &["proxy"]),
    ("POST", "/attach/default/vm/main?output=1", "create", &["proxy"]),
    ("POST", "/attach/default/vm/uid-1/main?output=1", "create", &["proxy"]),
    ("GET", "/portForward/default/vm", "create", &["proxy"]),
    ("POST", "/portForward/default/vm", "create", &["proxy"]),
    ("POST", "/portForward/default/vm/uid-1", "create", &["proxy"]),
    ("POST", "/run/default/vm/main?cmd=true", "create", &["proxy"]),
    ("GET", "/stats/summary", "get", &["stats"]),
    ("GET", "/metrics", "get", &["metrics"]),
    ("GET", "/metrics/resource", "get", &["metrics"]),
    ("GET", "/metrics/probes", "get", &["metrics"]),
    ("GET", "/", "get", &["proxy"]),
    ("GET", "/nothing/here", "get", &["proxy"]),
    ("GET", "/%70ods", "get", &["proxy"]),
    ("GET", "//pods", "get", &["proxy"]),
    ("DELETE", "/pods", "delete", &["pods", "proxy"]),
    ("OPTIONS", "/healthz", "unknown", &["healthz", "proxy"]),
];

/// Promise 6: no endpoint answers an unauthenticated or unauthorized caller.
#[tokio::test]
async fn every_route_refuses_strangers_and_the_unauthorized() {
    let world = World::new().await;
    world.api.token("good", "bob", &["dev"]);
    for (method, path, verb, subresources) in ROUTES {
        for who in [As::Nobody, As::Stranger, As::Token("bad"), As::Token("")] {
            let (status, body) = text(world.send(who, method, path, &[]).await).await;
            assert_eq!((status, &*body), (StatusCode::UNAUTHORIZED, "Unauthorized\n"), "{who:?} {method} {path}");
        }
        // Allowed everything else, but not this.
        world.api.allow(|user, rule| user != "bob" || rule != (verb, subresources[0]) && rule != (verb, "proxy"));
        let (status, body) = text(world.send(As::Token("good"), method, path, &[]).await).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{method} {path}");
        let expected =
            format!("Forbidden (user=bob, verb={verb}, resource=nodes, subresource(s)=[{}])\n", subresources.join(" "));
        assert_eq!(body, expected);
        // Any one of the subresources suffices.
        for subresource in subresources {
            let name = format!("user-{subresource}-{}", path.len());
            let subresource = *subresource;
            world.api.allow(move |_, rule| rule == (verb, subresource));
            let response = world.send(As::Cert(&name, &[]), method, path, &[]).await;
            let denied = [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN];
            assert!(!denied.contains(&response.status()), "{subresource} allows {method} {path}");
        }
    }
}

#[tokio::test]
async fn when_the_api_is_away_nobody_gets_in() {
    let world = World::new().await;
    world.api.token("good", "bob", &[]);
    assert_eq!(text(world.send(As::Token("good"), "GET", "/healthz", &[]).await).await.0, StatusCode::OK);
    world.api.away();
    // What was answered lately is still known.
    assert_eq!(text(world.send(As::Token("good"), "GET", "/healthz", &[]).await).await.0, StatusCode::OK);
    assert_eq!(text(world.send(As::Token("new"), "GET", "/healthz", &[]).await).await.0, StatusCode::UNAUTHORIZED);
    let (status, body) = text(world.send(API_SERVER, "GET", "/pods", &[]).await).await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(body.starts_with("Authorization error (user=kube-apiserver-kubelet-client, verb=get"), "{body}");
}

#[tokio::test]
async fn answers_are_asked_for_once_and_carry_the_whole_user() {
    let world = World::new().await;
    world.api.token("good", "bob", &["dev"]);
    for _ in 0..3 {
        assert_eq!(
            text(world.send(As::Token("good"), "GET", "/healthz", &[]).await).await,
            (StatusCode::OK, "ok".into())
        );
        text(world.send(As::Token("bad"), "GET", "/healthz", &[]).await).await;
    }
    let asked = world.api.asked();
    assert_eq!(asked.len(), 3, "{asked:#?}");
    let review = asked.iter().find(|review| review["kind"] == "SubjectAccessReview").unwrap();
    assert_eq!(
        review["spec"],
        json!({
            "user": "bob",
            "uid": "uid-of-bob",
            "groups": ["dev", "system:authenticated"],
            "extra": {"scopes": ["all"]},
            "resourceAttributes": {
                "verb": "get", "version": "v1", "resource": "nodes", "subresource": "healthz", "name": "node-1"
            },
        })
    );
}

#[tokio::test]
async fn a_browser_may_offer_its_token_as_a_subprotocol() {
    let world = World::new().await;
    world.api.token("good", "bob", &[]);
    let offer = "v4.channel.k8s.io, base64url.bearer.authorization.k8s.io.Z29vZA";
    let headers = [
        ("connection", "upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("sec-websocket-protocol", offer),
    ];
    let path = "/exec/default/vm/main?command=true&output=1";
    let response = world.send(As::Nobody, "GET", path, &headers).await;
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(response.headers()["sec-websocket-protocol"], "v4.channel.k8s.io");
}

#[tokio::test]
async fn certificates_change_while_serving() {
    let mut world = World::new().await;
    assert_eq!(world.get("/healthz").await.0, StatusCode::OK);
    let other = Authority::new("renewed");
    let (cert, key) = other.issue("node", &[], &["localhost"]);
    assert!(world.serving.replace(&tls::Pem { cert: cert.clone(), key: String::new(), client_ca: None }).is_err());
    assert_eq!(world.get("/healthz").await.0, StatusCode::OK);
    // From files, as they are renewed on disk.
    let directory = tempfile::tempdir().unwrap();
    let [cert_path, key_path, ca_path] = ["cert", "key", "ca"].map(|name| directory.path().join(name));
    let following = tokio::spawn({
        let (serving, stop) = (world.serving.clone(), world.stop.clone());
        let (cert, key, ca) = (cert_path.clone(), key_path.clone(), ca_path.clone());
        async move { serving.follow_files(cert, key, Some(ca), stop).await }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    for (path, content) in [(&cert_path, cert), (&key_path, key), (&ca_path, other.pem())] {
        std::fs::write(path, content).unwrap();
    }
    let old = std::mem::replace(&mut world.authority, other);
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        if world
            .serving
            .current()
            .user(&[certificate(&old.issue("x", &[], &[]).0)], rustls_pki_types::UnixTime::now())
            .is_none()
        {
            break;
        }
    }
    assert_eq!(world.get("/healthz").await.0, StatusCode::OK);
    world.stop.cancel();
    following.await.unwrap().unwrap();
}

fn certificate(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
}

#[tokio::test]
async fn expired_certificates_are_nobodys() {
    let world = World::new().await;
    let chain = [certificate(&world.authority.issue("alice", &["dev"], &[]).0)];
    let now = rustls_pki_types::UnixTime::now();
    let user = world.serving.current().user(&chain, now).unwrap();
    assert_eq!((user.name.as_str(), user.groups), ("alice", vec!["dev".to_owned(), "system:authenticated".to_owned()]));
    let later = rustls_pki_types::UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs() + 10 * 365 * 86_400));
    assert_eq!(world.serving.current().user(&chain, later), None);
    assert_eq!(world.serving.current().user(&[], now), None);
}

#[tokio::test]
async fn a_huge_head_is_cut_off() {
    let world = World::new().await;
    let one = format!("x: {}\r\n", "a".repeat(300_000));
    let many = "x: y\r\n".repeat(200);
    for headers in [one, many] {
        let mut stream = world.connect(API_SERVER).await;
        let head = format!("GET /healthz HTTP/1.1\r\nhost: x\r\n{headers}\r\n");
        // It may hang up before it got everything.
        stream.write_all(head.as_bytes()).await.ok();
        stream.flush().await.ok();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 431");
    }
}

#[tokio::test]
async fn the_plain_routes_answer() {
    let world = World::new().await;
    assert_eq!(world.get("/healthz").await, (StatusCode::OK, "ok".to_owned()));
    let (_, pods) = world.get("/pods").await;
    let pods: Value = serde_json::from_str(&pods).unwrap();
    assert_eq!((&pods["kind"], pods["items"].as_array().unwrap().len()), (&json!("PodList"), 2));
    let (_, running) = world.get("/runningpods/").await;
    let running: Value = serde_json::from_str(&running).unwrap();
    assert_eq!(running["items"][0]["metadata"]["name"], "vm");
    assert_eq!(running["items"].as_array().unwrap().len(), 1);
    assert_eq!(world.get("/configz").await.1, r#"{"kubeletconfig":{"kind":"NodeConfiguration"}}"#);
    let (_, metrics) = world.get("/metrics").await;
    assert!(metrics.contains("kubelet_running_pods 1\n"), "{metrics}");
    assert!(metrics.contains(r#"kubelet_http_requests_total{method="GET",path="pods",code="200"} 1"#), "{metrics}");
    let (_, summary) = world.get("/stats/summary").await;
    insta::assert_snapshot!(
        "summary",
        serde_json::to_string_pretty(&serde_json::from_str::<Value>(&summary).unwrap()).unwrap()
    );
    let (_, brief) = world.get("/stats/summary?only_cpu_and_memory=true").await;
    assert!(!brief.contains("rootfs") && !brief.contains("network") && brief.contains("usageCoreNanoSeconds"));
    let (_, resource) = world.get("/metrics/resource").await;
    insta::assert_snapshot!("resource", resource);
    assert_eq!(world.get("/metrics/probes").await.0, StatusCode::OK);
    world.runtime.break_stats();
    assert_eq!(world.get("/stats/summary").await.0, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(world.get("/metrics/resource").await.1.ends_with("resource_scrape_error 1\n"));
}

#[tokio::test]
async fn logs_come_with_their_options_and_errors() {
    let world = World::new().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    let mut writer = Writer::open(&path, Limits::default()).unwrap();
    writer.append(0, Stream::Stdout, b"one\ntwo\n", Timestamp::UNIX_EPOCH).unwrap();
    world.runtime.log(LogFile { path, live: Some(Live::Writer(writer.progress())) });
    let base = "/containerLogs/default/vm/main";
    assert_eq!(world.get(base).await, (StatusCode::OK, "one\ntwo\n".to_owned()));
    assert_eq!(
        world.get(&format!("{base}?tailLines=1&timestamps=true")).await.1,
        "1970-01-01T00:00:00.000000000Z two\n"
    );
    assert_eq!(world.get(&format!("{base}?tailLines=many")).await.0, StatusCode::BAD_REQUEST);
    assert_eq!(world.get(&format!("{base}?limitBytes=0")).await.0, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(world.get(&format!("{base}?previous=true")).await.0, StatusCode::BAD_REQUEST);
    assert_eq!(
        world.get("/containerLogs/default/gone/main").await,
        (StatusCode::NOT_FOUND, "pod default/gone does not exist on this node\n".to_owned())
    );
    assert_eq!(world.get("/containerLogs/default/vm/other").await.0, StatusCode::NOT_FOUND);

    let mut following = world.send(API_SERVER, "GET", &format!("{base}?follow=true&tailLines=0"), &[]).await;
    let mut source = 8;
    for _ in 0..3 {
        writer.append(source, Stream::Stdout, b"more\n", Timestamp::UNIX_EPOCH).unwrap();
        source += 5;
        let chunk = following.body_mut().frame().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(chunk, "more\n");
    }
    writer.finish(Timestamp::UNIX_EPOCH).unwrap();
    assert!(following.body_mut().frame().await.is_none());
}

#[tokio::test]
async fn run_answers_with_the_output() {
    let world = World::new().await;
    let run = async |cmd: &str| {
        text(world.send(API_SERVER, "POST", &format!("/run/default/vm/main?cmd={cmd}"), &[]).await).await
    };
    assert_eq!(run("echo%20a%20%20b").await, (StatusCode::OK, "a b".to_owned()));
    assert_eq!(run("both").await, (StatusCode::OK, "outerr".to_owned()));
    let (status, body) = run("exit%203").await;
    assert_eq!((status, body.contains("exit code 3")), (StatusCode::INTERNAL_SERVER_ERROR, true), "{body}");
    assert_eq!(run("").await.0, StatusCode::BAD_REQUEST);
    assert_eq!(run("yes%20300000").await.1.len(), 300_000);
    assert_eq!(world.get("/run/default/vm/main?cmd=true").await.0, StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn requests_that_cant_be_upgraded_are_told_why() {
    let world = World::new().await;
    let path = "/exec/default/vm/main?command=true&output=1";
    let spdy = [("connection", "Upgrade"), ("upgrade", "SPDY/3.1")];
    let post =
        async |path: &str, headers: &[(&str, &str)]| text(world.send(API_SERVER, "POST", path, headers).await).await;
    let (status, body) = post(path, &[]).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    let expected = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "BadRequest", "code": 400,
        "message": "unable to upgrade: missing upgrade headers in request",
    });
    assert_eq!(serde_json::from_str::<Value>(&body).unwrap(), expected);
    let (status, _) = post("/exec/default/vm/main?command=true", &spdy).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(post("/exec/default/vm/main?output=1", &spdy).await.0, StatusCode::BAD_REQUEST);
    let (status, body) = post("/exec/default/stopped/main?command=x&output=1", &spdy).await;
    assert_eq!((status, body.contains("is not running")), (StatusCode::BAD_REQUEST, true), "{body}");
    assert_eq!(post("/exec/default/vm/wrong-uid/main?command=x&output=1", &spdy).await.0, StatusCode::NOT_FOUND);
    let mut headers = spdy.to_vec();
    headers.push(("x-stream-protocol-version", "v9.channel.k8s.io"));
    let refused = world.send(API_SERVER, "POST", path, &headers).await;
    assert_eq!(refused.status(), StatusCode::FORBIDDEN);
    assert_eq!(refused.headers().get_all("x-accepted-stream-protocol-versions").iter().count(), 5);
    assert_eq!(post(path, &[("connection", "Upgrade"), ("upgrade", "h2c")]).await.0, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn exec_over_spdy_in_every_version() {
    let world = World::new().await;
    let versions =
        ["v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];
    for (index, version) in versions.iter().enumerate() {
        let mut client = world
            .spdy("/exec/default/vm/main?command=cat&command=3&input=1&output=1&error=1", &versions[index..])
            .await;
        let error = client.open(&[("streamtype", "error")]).await;
        let stdin = client.open(&[("streamtype", "stdin")]).await;
        let stdout = client.open(&[("streamtype", "stdout")]).await;
        let stderr = client.open(&[("streamtype", "stderr")]).await;
        client.data(stdin, b"hello ", false).await;
        client.data(stdin, b"world", true).await;
        let output = client.collect().await;
        assert_eq!(output[&stdout], b"hello world", "{version}");
        assert_eq!(output[&stderr], b"read 11 bytes", "{version}");
        let end = String::from_utf8(output[&error].clone()).unwrap();
        if index < 2 {
            let status: Value = serde_json::from_str(&end).unwrap();
            assert_eq!(
                (&status["reason"], &status["details"]["causes"][0]),
                (&json!("NonZeroExitCode"), &json!({"reason": "ExitCode", "message": "3"}))
            );
        } else {
            assert_eq!(end, "command terminated with non-zero exit code: exit code 3");
        }
    }
}

#[tokio::test]
async fn a_terminal_over_spdy_tells_its_sizes() {
    let world = World::new().await;
    let mut client =
        world.spdy("/exec/default/vm/main?command=sizes&input=1&output=1&error=1&tty=1", &["v4.channel.k8s.io"]).await;
    let error = client.open(&[("streamtype", "error")]).await;
    let resize = client.open(&[("streamtype", "resize")]).await;
    let stdout = client.open(&[("streamtype", "stdout")]).await;
    client.open(&[("streamtype", "stdin")]).await;
    client.data(resize, br#"{"Width":80,"Height":24}{"Width":1"#, false).await;
    client.data(resize, br#"00,"Height":50}"#, true).await;
    let output = client.collect().await;
    assert_eq!(output[&stdout], b"tty 80x24 100x50");
    assert_eq!(output[&error], br#"{"metadata":{},"status":"Success"}"#);
}

#[tokio::test]
async fn a_client_that_goes_away_ends_its_command() {
    let world = World::new().await;
    let mut client = world.spdy("/exec/default/vm/main?command=sleep&output=1", &["v4.channel.k8s.io"]).await;
    client.open(&[("streamtype", "error")]).await;
    client.open(&[("streamtype", "stdout")]).await;
    world.runtime.sleeping(1).await;
    drop(client);
    world.runtime.sleeping(0).await;
}

#[tokio::test]
async fn stopping_the_server_cuts_sessions_off() {
    let world = World::new().await;
    let mut client = world.spdy("/exec/default/vm/main?command=sleep&output=1", &["v4.channel.k8s.io"]).await;
    client.open(&[("streamtype", "error")]).await;
    client.open(&[("streamtype", "stdout")]).await;
    world.runtime.sleeping(1).await;
    world.stop.cancel();
    client.collect().await;
    world.runtime.sleeping(0).await;
    tokio::time::timeout(Duration::from_secs(5), world.served).await.unwrap().unwrap().unwrap();
}

async fn websocket(world: &World, path: &str, protocol: &str) -> tungstenite::Socket {
    let headers = [
        ("connection", "upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("sec-websocket-protocol", protocol),
    ];
    let response = world.send(API_SERVER, "GET", path, &headers).await;
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(response.headers()["sec-websocket-protocol"], protocol);
    let io = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
    tungstenite::Socket::from_raw_socket(io, tungstenite::Role::Client, None).await
}

/// kube-rs brings its own WebSocket; tests use it through its re-export.
mod tungstenite {
    pub(super) use tokio_tungstenite::tungstenite::{Message, protocol::Role};
    pub(super) type Socket = tokio_tungstenite::WebSocketStream<hyper_util::rt::TokioIo<hyper::upgrade::Upgraded>>;
}

#[tokio::test]
async fn exec_over_websocket_in_every_version() {
    use tungstenite::Message;
    let world = World::new().await;
    let path = "/exec/default/vm/main?command=cat&command=3&input=1&output=1&error=1";
    for protocol in [
        "v5.channel.k8s.io",
        "v4.channel.k8s.io",
        "v4.base64.channel.k8s.io",
        "base64.channel.k8s.io",
        "channel.k8s.io",
    ] {
        let mut socket = websocket(&world, path, protocol).await;
        let base64 = protocol.contains("base64");
        let message = |text: &str| {
            if base64 { Message::Text(text.into()) } else { Message::Binary(text.as_bytes().to_vec().into()) }
        };
        // "hello", then the end: by CLOSE in version 5, by a byte that the script takes for it before.
        socket.send(message(if base64 { "0aGVsbG8=" } else { "\0hello" })).await.unwrap();
        if protocol.starts_with("v5") {
            socket.send(Message::Binary(vec![255, 0].into())).await.unwrap();
        } else {
            socket.send(message(if base64 { "0BA==" } else { "\0\x04" })).await.unwrap();
        }
        let mut channels = [const { Vec::new() }; 4];
        let mut first = None;
        while let Some(Ok(message)) = socket.next().await {
            let (channel, bytes) = match &message {
                Message::Binary(bytes) => (bytes[0], bytes[1..].to_vec()),
                Message::Text(text) => (text.as_bytes()[0] - b'0', base64_decode(&text[1..])),
                Message::Close(frame) => {
                    assert_eq!(u16::from(frame.as_ref().unwrap().code), 1000);
                    continue;
                }
                _ => continue,
            };
            first.get_or_insert((channel, bytes.clone()));
            channels[usize::from(channel)].extend(bytes);
        }
        assert_eq!(first, Some((1, Vec::new())), "{protocol}");
        assert_eq!(channels[1], b"hello", "{protocol}");
        assert_eq!(channels[2], b"read 5 bytes", "{protocol}");
        let end = String::from_utf8(channels[3].clone()).unwrap();
        assert_eq!(end.contains("NonZeroExitCode"), protocol.starts_with("v4") || protocol.starts_with("v5"), "{end}");
    }
}

fn base64_decode(text: &str) -> Vec<u8> {
    base64::Engine::decode(&base64::engine::general_purpose::STANDARD, text).unwrap()
}

#[tokio::test]
async fn kube_rs_execs_and_attaches() {
    let world = Arc::new(World::new().await);
    let pods: Api<Pod> = Api::default_namespaced(world.kube());
    let params = AttachParams::default().stdin(true);
    let mut process = pods.exec("vm", ["cat", "3"], &params).await.unwrap();
    let mut stdin = process.stdin().unwrap();
    stdin.write_all(b"hello").await.unwrap();
    stdin.shutdown().await.unwrap();
    drop(stdin);
    let mut output = String::new();
    process.stdout().unwrap().read_to_string(&mut output).await.unwrap();
    assert_eq!(output, "hello");
    let status = process.take_status().unwrap().await.unwrap();
    assert_eq!(status.reason.as_deref(), Some("NonZeroExitCode"));

    let big = AttachParams::default().stderr(false);
    let mut process = pods.exec("vm", ["yes", "3000000"], &big).await.unwrap();
    let mut output = Vec::new();
    process.stdout().unwrap().read_to_end(&mut output).await.unwrap();
    assert_eq!(output.len(), 3_000_000);

    let mut process = pods.attach("vm", &AttachParams::interactive_tty()).await.unwrap();
    let mut sizes = process.terminal_size().unwrap();
    sizes.send(TerminalSize { width: 80, height: 24 }).await.unwrap();
    sizes.send(TerminalSize { width: 100, height: 50 }).await.unwrap();
    let mut output = String::new();
    process.stdout().unwrap().read_to_string(&mut output).await.unwrap();
    assert_eq!(output, "attached tty 80x24 100x50");
}

#[tokio::test]
async fn kube_rs_forwards_ports() {
    let world = Arc::new(World::new().await);
    let pods: Api<Pod> = Api::default_namespaced(world.kube());
    let mut forwarder = pods.portforward("vm", &[80, 1]).await.unwrap();
    let mut echo = forwarder.take_stream(80).unwrap();
    echo.write_all(b"ping").await.unwrap();
    let mut bytes = [0; 4];
    echo.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"ping");
    let error = forwarder.take_error(1).unwrap().await.unwrap();
    assert!(error.contains("error forwarding port 1 to pod vm: connection refused"), "{error}");
}

async fn forward_over<T>(client: &mut Client<T>)
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    // Two connections at once, one of whose ports is closed; the second has no request id, as from old clients.
    let mut pair = async |port: &str, id: Option<&str>| {
        let mut headers = vec![("port", port), ("streamtype", "error")];
        headers.extend(id.map(|id| ("requestid", id)));
        let error = client.open(&headers).await;
        headers[1].1 = "data";
        (error, client.open(&headers).await)
    };
    let (_, echo) = pair("80", Some("7")).await;
    let (refused_error, refused) = pair("1", None).await;
    let bad = client.open(&[("port", "0"), ("streamtype", "data")]).await;
    client.data(echo, b"ping", true).await;
    let mut seen = (Vec::new(), Vec::new());
    let mut ended = Vec::new();
    while !(ended.contains(&echo) && ended.contains(&refused) && ended.contains(&refused_error) && ended.contains(&bad))
    {
        match client.event().await.unwrap() {
            Event::Data(stream, bytes, fin) => {
                if stream == echo {
                    seen.0.extend(bytes);
                } else if stream == refused_error {
                    seen.1.extend(bytes);
                }
                if fin {
                    ended.push(stream);
                }
            }
            Event::Reset(stream, _) => ended.push(stream),
            _ => {}
        }
    }
    assert_eq!(seen.0, b"ping");
    assert_eq!(String::from_utf8(seen.1).unwrap(), "error forwarding port 1 to pod vm: connection refused");
}

#[tokio::test]
async fn ports_are_forwarded_over_spdy_and_through_the_tunnel() {
    let world = World::new().await;
    let mut client = world.spdy("/portForward/default/vm", &["portforward.k8s.io"]).await;
    forward_over(&mut client).await;
    let protocol = "SPDY/3.1+portforward.k8s.io";
    let mut socket = websocket(&world, "/portForward/default/vm", protocol).await;
    let (near, far) = tokio::io::duplex(64 * 1024);
    tokio::spawn(async move {
        let (mut read, mut write) = tokio::io::split(far);
        let mut buffer = vec![0; 4096];
        loop {
            tokio::select! {
                read = read.read(&mut buffer) => match read {
                    Ok(read @ 1..) => socket.send(tungstenite::Message::Binary(buffer[..read].to_vec().into())).await.unwrap(),
                    _ => return,
                },
                message = socket.next() => match message {
                    Some(Ok(tungstenite::Message::Binary(bytes))) => write.write_all(&bytes).await.unwrap(),
                    Some(Ok(_)) => {}
                    _ => return,
                },
            }
        }
    });
    forward_over(&mut Client::new(near)).await;
    let bad = world.send(API_SERVER, "POST", "/portForward/default/gone", &[]).await;
    assert_eq!(bad.status(), StatusCode::NOT_FOUND);
}
