//! The API over TLS, and what it answers to nonsense.
#![expect(clippy::unwrap_used, reason = "a test stops at the first thing that is wrong")]

use std::net::Ipv4Addr;
use std::sync::Arc;

use axum::body::Body;
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt as _;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::{Api, ListParams, LogParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, ResourceExt};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;
use vmpod_apiserver::{ApiServer, Identity, Options};

async fn open(listen: bool) -> (tempfile::TempDir, ApiServer) {
    let dir = tempfile::tempdir().unwrap();
    let listen = listen.then(|| (Ipv4Addr::LOCALHOST, 0).into());
    let options = Options { dir: dir.path().join("api"), listen, extra_sans: Vec::new() };
    (dir, ApiServer::open(options).await.unwrap())
}

async fn ask(
    server: &ApiServer,
    method: Method,
    path: &str,
    content_type: &str,
    body: impl Into<Body>,
) -> (StatusCode, Value) {
    let mut request = Request::new(body.into());
    *request.method_mut() = method;
    *request.uri_mut() = path.parse().unwrap();
    if !content_type.is_empty() {
        request.headers_mut().insert("content-type", content_type.parse().unwrap());
    }
    let response = server.router_as(Identity::admin()).oneshot(request).await.unwrap();
    let code = response.status();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (code, serde_json::from_slice(&bytes).unwrap_or_else(|_| String::from_utf8_lossy(&bytes).into_owned().into()))
}

#[tokio::test]
async fn nonsense_is_refused_with_a_reason() {
    const MAPS: &str = "/api/v1/namespaces/default/configmaps";
    const JSON: &str = "application/json";
    let (_dir, server) = open(false).await;
    let deep = format!(
        "{{\"apiVersion\":\"v1\",\"kind\":\"ConfigMap\",\"metadata\":{}1{}}}",
        "{\"a\":".repeat(5000),
        "}".repeat(5000)
    );
    let large = format!(
        "{{\"apiVersion\":\"v1\",\"kind\":\"ConfigMap\",\"metadata\":{{\"name\":\"x\"}},\"data\":{{\"a\":\"{}\"}}}}",
        "x".repeat(4 << 20)
    );
    let bodies: Vec<(&str, Vec<u8>, u16)> = vec![
        (JSON, b"".to_vec(), 400),
        (JSON, b"{".to_vec(), 400),
        (JSON, b"null".to_vec(), 400),
        (JSON, b"[]".to_vec(), 400),
        (JSON, b"\xff\xfe".to_vec(), 400),
        (JSON, deep.into_bytes(), 400),
        (JSON, large.into_bytes(), 413),
        ("application/xml", b"<a/>".to_vec(), 415),
        ("application/vnd.kubernetes.protobuf", b"k8s\0\x0a\xff".to_vec(), 400),
        ("application/yaml", b"a: [".to_vec(), 400),
        (JSON, br#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"UPPER"}}"#.to_vec(), 422),
        (JSON, br#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"a","labels":{"k":7}}}"#.to_vec(), 400),
    ];
    for (content_type, body, code) in bodies {
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
        let (found, answer) = ask(&server, Method::POST, MAPS, content_type, body).await;
        assert_eq!((found.as_u16(), answer["kind"].as_str()), (code, Some("Status")), "{shown}: {answer}");
        assert!(!answer["message"].as_str().unwrap().is_empty(), "{shown}");
    }
    for (path, code) in [
        (format!("{MAPS}?watch=perhaps"), 400),
        (format!("{MAPS}?limit=many"), 400),
        (format!("{MAPS}?resourceVersion=x"), 422),
        (format!("{MAPS}?resourceVersion=99999999"), 504),
        (format!("{MAPS}?resourceVersionMatch=Exact"), 422),
        (format!("{MAPS}?resourceVersion=1&resourceVersionMatch=Sometimes"), 422),
        (format!("{MAPS}?labelSelector=a%20in%20("), 400),
        (format!("{MAPS}?fieldSelector=nonsense"), 400),
        (format!("{MAPS}?labelSelector={}", "a,".repeat(20_000)), 400),
        ("/api/v1/%ff".into(), 400),
        ("/api/v1/namespaces/default/configmaps/a/b/c/d".into(), 404),
        ("/api/v1/unknown".into(), 404),
        ("/apis/apps/v1/deployments".into(), 404),
        (format!("{MAPS}/absent"), 404),
    ] {
        let (found, answer) = ask(&server, Method::GET, &path, "", Body::empty()).await;
        assert_eq!(found.as_u16(), code, "{path:.80}: {answer}");
    }
    let (found, _) = ask(&server, Method::PATCH, &format!("{MAPS}/kube-root-ca.crt"), JSON, "{}").await;
    assert_eq!(found.as_u16(), 415);
    let (found, _) =
        ask(&server, Method::PATCH, &format!("{MAPS}/kube-root-ca.crt"), "application/json-patch+json", "{}").await;
    assert_eq!(found.as_u16(), 400);
}

async fn client(server: &ApiServer, identity: &Identity) -> Client {
    let kubeconfig = Kubeconfig::from_yaml(&server.kubeconfig(identity).unwrap()).unwrap();
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    Client::try_from(config).unwrap()
}

#[tokio::test]
async fn serves_tls_to_those_it_knows_and_stops() {
    drop(rustls::crypto::ring::default_provider().install_default());
    let (_dir, server) = open(true).await;
    let stop = CancellationToken::new();
    let serving = tokio::spawn({
        let (server, stop) = (server.clone(), stop.clone());
        async move { server.serve(stop).await }
    });
    let namespaces: Api<Namespace> = Api::all(client(&server, &Identity::admin()).await);
    let names: Vec<String> =
        namespaces.list(&ListParams::default()).await.unwrap().iter().map(ResourceExt::name_any).collect();
    assert_eq!(names, ["default", "kube-node-lease", "kube-public", "kube-system"]);
    let maps: Api<ConfigMap> = Api::default_namespaced(client(&server, &Identity::node("n1")).await);
    match maps.list(&ListParams::default()).await.unwrap_err() {
        kube::Error::Api(status) => assert_eq!((status.code, status.reason.as_str()), (403, "Forbidden")),
        other => panic!("{other:?}"),
    }
    let ca = reqwest::Certificate::from_pem(server.pki().ca_pem().as_bytes()).unwrap();
    let nobody = reqwest::Client::builder().tls_certs_only([ca]).build().unwrap();
    let url = |path: &str| format!("https://{}{path}", server.address().unwrap());
    assert_eq!(nobody.get(url("/readyz")).send().await.unwrap().text().await.unwrap(), "ok");
    assert_eq!(nobody.get(url("/api/v1/pods")).send().await.unwrap().status().as_u16(), 401);
    assert_eq!(nobody.get(url("/api/v1/pods")).bearer_auth("junk").send().await.unwrap().status().as_u16(), 401);
    stop.cancel();
    serving.await.unwrap().unwrap();
}

/// A kubelet that serves one log and answers an upgrade by echoing, to callers with a certificate.
async fn kubelet(server: &ApiServer, authority: &ApiServer) -> (u16, String) {
    let issued = authority.pki().issue_serving("system:node:n1", &["127.0.0.1".into()]).unwrap();
    let hash: String = {
        use sha2::Digest as _;
        let leaf = CertificateDer::from_pem_slice(issued.cert_pem.as_bytes()).unwrap();
        sha2::Sha256::digest(&leaf)
            .iter()
            .flat_map(|byte| [byte >> 4, byte & 15])
            .filter_map(|digit| char::from_digit(digit.into(), 16))
            .collect()
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(server.pki().ca_pem().as_bytes()).unwrap()).unwrap();
    let callers =
        rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().unwrap();
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(callers)
        .with_single_cert(
            vec![CertificateDer::from_pem_slice(issued.cert_pem.as_bytes()).unwrap()],
            PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).unwrap(),
        )
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let mut tls = acceptor.accept(tcp).await.unwrap();
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(tls.read_u8().await.unwrap());
                }
                let head = String::from_utf8(head).unwrap();
                let answer = if head.starts_with("GET /containerLogs/default/p/vm?tailLines=2 ") {
                    "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nhello\n"
                } else if head.starts_with("GET /containerLogs/") {
                    "HTTP/1.1 400 Bad Request\r\ncontent-length: 8\r\n\r\nnot yet\n"
                } else if head.starts_with("POST /exec/default/p/vm?input=1&output=1&command=cat ") {
                    "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: SPDY/3.1\r\n\r\n"
                } else {
                    "HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\n\r\nwhat?"
                };
                tls.write_all(answer.as_bytes()).await.unwrap();
                let mut buffer = [0; 64];
                while let Ok(count @ 1..) = tls.read(&mut buffer).await {
                    tls.write_all(&buffer[..count]).await.unwrap();
                }
            });
        }
    });
    (port, hash)
}

#[tokio::test]
async fn passes_logs_and_upgrades_through_to_the_kubelet() {
    drop(rustls::crypto::ring::default_provider().install_default());
    let (_dir, server) = open(true).await;
    let stop = CancellationToken::new();
    let serving = tokio::spawn({
        let (server, stop) = (server.clone(), stop.clone());
        async move { server.serve(stop).await }
    });
    let (port, _) = kubelet(&server, &server).await;
    let client = client(&server, &Identity::admin()).await;
    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(client.clone());
    let node = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": "n1" },
        "status": {
            "addresses": [{ "type": "InternalIP", "address": "127.0.0.1" }],
            "daemonEndpoints": { "kubeletEndpoint": { "Port": port } },
        },
    });
    nodes.create(&PostParams::default(), &serde_json::from_value(node).unwrap()).await.unwrap();
    let pods: Api<k8s_openapi::api::core::v1::Pod> = Api::default_namespaced(client.clone());
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "p" },
        "spec": { "nodeName": "n1", "containers": [{ "name": "vm", "image": "tiny" }] },
    });
    pods.create(&PostParams::default(), &serde_json::from_value(pod).unwrap()).await.unwrap();
    let tail = |lines| LogParams { tail_lines: Some(lines), ..LogParams::default() };
    assert_eq!(pods.logs("p", &tail(2)).await.unwrap(), "hello\n");
    match pods.logs("p", &tail(1)).await.unwrap_err() {
        kube::Error::Api(status) => assert_eq!((status.code, status.message.as_str()), (400, "not yet")),
        other => panic!("{other:?}"),
    }
    // An upgrade by hand: what goes in comes back out, untouched.
    let issued = server.pki().issue_client("admin", &["system:masters".into()]).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(server.pki().ca_pem().as_bytes()).unwrap()).unwrap();
    let tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(
            vec![CertificateDer::from_pem_slice(issued.cert_pem.as_bytes()).unwrap()],
            PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).unwrap(),
        )
        .unwrap();
    let tcp = tokio::net::TcpStream::connect(server.address().unwrap()).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
    let mut stream = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, tcp).await.unwrap();
    let request = "POST /api/v1/namespaces/default/pods/p/exec?container=vm&stdin=true&stdout=true&command=cat HTTP/1.1\r\n\
                   host: x\r\nconnection: Upgrade\r\nupgrade: SPDY/3.1\r\ncontent-length: 0\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    assert!(head.starts_with("HTTP/1.1 101 ") && head.to_lowercase().contains("upgrade: spdy/3.1"), "{head}");
    stream.write_all(b"\x80\x03raw bytes").await.unwrap();
    let mut back = [0; 11];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"\x80\x03raw bytes");
    stop.cancel();
    serving.await.unwrap().unwrap();
}

#[tokio::test]
async fn trusts_a_foreign_kubelet_only_by_the_certificate_its_node_named() {
    drop(rustls::crypto::ring::default_provider().install_default());
    let (_dir, server) = open(false).await;
    let (_other_dir, other) = open(false).await;
    let (port, hash) = kubelet(&server, &other).await;
    let client = Client::new(server.router_as(Identity::admin()), "default");
    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(client.clone());
    let node = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": "n1" },
        "status": {
            "addresses": [{ "type": "InternalIP", "address": "127.0.0.1" }],
            "daemonEndpoints": { "kubeletEndpoint": { "Port": port } },
        },
    });
    nodes.create(&PostParams::default(), &serde_json::from_value(node).unwrap()).await.unwrap();
    let pods: Api<k8s_openapi::api::core::v1::Pod> = Api::default_namespaced(client);
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "p" },
        "spec": { "nodeName": "n1", "containers": [{ "name": "vm", "image": "tiny" }] },
    });
    pods.create(&PostParams::default(), &serde_json::from_value(pod).unwrap()).await.unwrap();
    for (pin, trusted) in [(None, false), (Some("00".repeat(32)), false), (Some(hash), true)] {
        let annotation = json!({ "metadata": { "annotations": { "vmpod.dev/kubelet-certificate-sha256": pin } } });
        nodes.patch("n1", &kube::api::PatchParams::default(), &kube::api::Patch::Merge(annotation)).await.unwrap();
        let log = pods.logs("p", &LogParams { tail_lines: Some(2), ..LogParams::default() }).await;
        assert_eq!(log.is_ok(), trusted, "{log:?}");
    }
}
