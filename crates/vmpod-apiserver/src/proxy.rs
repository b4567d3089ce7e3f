//! The way to the kubelets: logs, exec, attach and port forwarding.
//!
//! The API server finds the pod's node, translates the query, dials the kubelet with its own client
//! certificate, and then only copies bytes, both ways.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use http::header::{AUTHORIZATION, CONNECTION, HOST, SEC_WEBSOCKET_PROTOCOL, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::BodyExt as _;
use hyper::client::conn::http1;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::http::path::Target;
use crate::http::query::Query;
use crate::http::respond;
use crate::pki::{Pki, PkiError, chain_and_key};
use crate::server::{Server, digest};
use crate::status::Status;
use crate::store::Key;

/// How long a kubelet may take to accept a connection.
const DIAL: Duration = Duration::from_secs(10);
/// How long it may take to answer a request's head.
const HEAD: Duration = Duration::from_secs(30);
/// The most of a kubelet's error that is passed on.
const ERROR_LIMIT: usize = 10 << 10;
/// The most of a kubelet's figures that is read.
const METRICS_LIMIT: usize = 32 << 20;
/// The port of a kubelet that doesn't tell.
const KUBELET_PORT: u16 = 10250;
/// How much is copied at once.
const COPY: usize = 64 << 10;
/// What a node declares when its kubelet speaks WebSocket v5 itself.
const DIRECT_WEBSOCKETS: &str = "ExtendWebSocketsToKubelet";

/// How the API server calls kubelets.
#[derive(Clone)]
pub(crate) struct Kubelets {
    tls: Arc<rustls::ClientConfig>,
    authority: Arc<WebPkiServerVerifier>,
}

impl Kubelets {
    /// Kubelets show certificates of our own authority, and get one from us.
    pub(crate) fn new(pki: &Pki) -> Result<Self, PkiError> {
        use rustls_pki_types::pem::PemObject as _;
        let own = pki.issue_client("kube-apiserver-kubelet-client", &[crate::identity::MASTERS.into()])?;
        let unusable = || PkiError::Content { what: "certificate for calling kubelets", path: "ca.crt".into() };
        let mut roots = rustls::RootCertStore::empty();
        let ca = CertificateDer::from_pem_slice(pki.ca_pem().as_bytes()).map_err(|_| unusable())?;
        roots.add(ca).map_err(|_| unusable())?;
        let (chain, key) = chain_and_key(&own).ok_or_else(unusable)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let authority = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()
            .map_err(|_| unusable())?;
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|_| unusable())?
            .with_webpki_verifier(authority.clone())
            .with_client_auth_cert(chain, key)
            .map_err(|_| unusable())?;
        // Upgrades need HTTP/1.1.
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { tls: Arc::new(tls), authority })
    }

    /// The TLS settings for one kubelet.
    fn tls_for(&self, endpoint: &Endpoint) -> Arc<rustls::ClientConfig> {
        let Some(pin) = endpoint.pin.clone() else { return self.tls.clone() };
        let mut tls = (*self.tls).clone();
        tls.dangerous().set_certificate_verifier(Arc::new(Pinned { authority: self.authority.clone(), pin }));
        Arc::new(tls)
    }
}

/// The annotation by which a node tells the SHA-256 (hexadecimal) of a serving certificate that our
/// authority didn't sign. Only the node itself and administrators can write it.
const CERTIFICATE_PIN: &str = "vmpod.dev/kubelet-certificate-sha256";

/// Accepts a certificate of our authority, or the very one that the node named.
#[derive(Debug)]
struct Pinned {
    authority: Arc<WebPkiServerVerifier>,
    pin: String,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if digest(end_entity) == self.pin {
            return Ok(ServerCertVerified::assertion());
        }
        self.authority.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.authority.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.authority.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.authority.supported_verify_schemes()
    }
}

/// Where a kubelet listens.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Endpoint {
    host: String,
    port: u16,
    /// Whether WebSocket v5 can be passed through.
    websocket_v5: bool,
    /// The certificate that the node named as its own.
    pin: Option<String>,
}

fn endpoint(node: &Value) -> Option<Endpoint> {
    let addresses = node["status"]["addresses"].as_array()?;
    let of = |kind: &str| {
        addresses.iter().find(|address| address["type"] == kind).and_then(|address| address["address"].as_str())
    };
    let host = of("InternalIP").or_else(|| of("Hostname")).or_else(|| of("ExternalIP"))?;
    let port = node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"].as_u64();
    let port = port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0).unwrap_or(KUBELET_PORT);
    let declared = node["status"]["declaredFeatures"]
        .as_array()
        .is_some_and(|list| list.iter().any(|one| one == DIRECT_WEBSOCKETS));
    let ours = node["status"]["nodeInfo"]["kubeletVersion"].as_str().is_some_and(|version| version.contains("vmpod"));
    let pin = node["metadata"]["annotations"][CERTIFICATE_PIN].as_str().map(str::to_ascii_lowercase);
    Some(Endpoint { host: host.into(), port, websocket_v5: declared || ours, pin })
}

fn node_endpoint(server: &Server, name: &str) -> Result<Endpoint, Status> {
    let node = server
        .store
        .get(&Key::new("nodes", None, name))
        .ok_or_else(|| Status::internal(format!("error getting node {name:?}: nodes {name:?} not found")))?;
    endpoint(&node.value())
        .ok_or_else(|| Status::internal(format!("no preferred addresses found; known addresses of node {name:?}: []")))
}

/// `pods/NAME/{log,exec,attach,portforward}`.
pub(crate) async fn pod(
    server: &Arc<Server>,
    target: &Target,
    query: &Query,
    request: Request<Body>,
) -> Result<Response<Body>, Status> {
    let (namespace, name) =
        (target.namespace.as_deref().unwrap_or_default(), target.name.as_deref().unwrap_or_default());
    let subresource = target.subresource.as_deref().unwrap_or_default();
    let pods = server.registry().resource("", "v1", "pods").ok_or_else(Status::no_route)?;
    let pod = server.pod(namespace, name).ok_or_else(|| Status::not_found(&pods, name))?.value();
    let allowed = if subresource == "log" {
        matches!(*request.method(), Method::GET | Method::HEAD)
    } else {
        matches!(*request.method(), Method::GET | Method::POST)
    };
    if !allowed {
        return Err(Status::method_not_allowed_here());
    }
    let container = match subresource {
        "portforward" => String::new(),
        _ => container(&pod, query.get("container"))?,
    };
    let Some(node) = pod["spec"]["nodeName"].as_str().filter(|node| !node.is_empty()) else {
        if subresource == "log" {
            // There is no log yet.
            return Ok(respond::text(StatusCode::OK, Body::empty()));
        }
        return Err(Status::bad_request(format!("pod {name} does not have a host assigned")));
    };
    let endpoint = node_endpoint(server, node)?;
    let (path, parameters) = translate(subresource, namespace, name, &container, query)?;
    if subresource == "log" {
        return log(server, &endpoint, &pods, name, &path, &parameters).await;
    }
    if !is_upgrade(request.headers()) {
        return Err(Status::bad_request("Upgrade request required"));
    }
    stream(server, &endpoint, &path, &parameters, request).await
}

/// The container that is meant: the one named, or the only one.
fn container(pod: &Value, named: Option<&str>) -> Result<String, Status> {
    let all = |field: &str| -> Vec<&str> {
        pod["spec"][field].as_array().into_iter().flatten().filter_map(|container| container["name"].as_str()).collect()
    };
    let (main, init, ephemeral) = (all("containers"), all("initContainers"), all("ephemeralContainers"));
    let of_pod = pod["metadata"]["name"].as_str().unwrap_or_default();
    match named {
        Some(name) if [&main, &init, &ephemeral].iter().any(|list| list.contains(&name)) => Ok(name.into()),
        Some(name) => Err(Status::bad_request(format!("container {name} is not valid for pod {of_pod}"))),
        None => match main.as_slice() {
            [only] if init.is_empty() && ephemeral.is_empty() => Ok((*only).into()),
            _ => {
                let among = |kind: &str, names: &[&str]| {
                    if names.is_empty() {
                        String::new()
                    } else {
                        format!(" or one of the {kind} containers: [{}]", names.join(" "))
                    }
                };
                let why = format!(
                    "a container name must be specified for pod {of_pod}, choose one of: [{}]{}{}",
                    main.join(" "),
                    among("init", &init),
                    among("ephemeral", &ephemeral)
                );
                Err(Status::bad_request(why))
            }
        },
    }
}

/// The kubelet's path and query for a subresource.
fn translate(
    subresource: &str,
    namespace: &str,
    pod: &str,
    container: &str,
    query: &Query,
) -> Result<(String, String), Status> {
    let mut out = form_urlencoded::Serializer::new(String::new());
    let segment = |text: &str| {
        percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC)
            .to_string()
            .replace("%2D", "-")
            .replace("%2E", ".")
    };
    let place = format!("{}/{}", segment(namespace), segment(pod));
    let path = match subresource {
        "log" => {
            for (name, value) in query.pairs() {
                if name != "container" && name != "insecureSkipTLSVerifyBackend" && name != "pretty" {
                    out.append_pair(name, value);
                }
            }
            format!("/containerLogs/{place}/{}", segment(container))
        }
        "exec" | "attach" => {
            for (from, to) in [("stdin", "input"), ("stdout", "output"), ("stderr", "error"), ("tty", "tty")] {
                if query.flag(from)? {
                    out.append_pair(to, "1");
                }
            }
            for (_, value) in query.pairs().filter(|(name, _)| *name == "command") {
                out.append_pair("command", value);
            }
            format!("/{subresource}/{place}/{}", segment(container))
        }
        _ => {
            for (_, value) in query.pairs().filter(|(name, _)| *name == "ports") {
                out.append_pair("port", value);
            }
            format!("/portForward/{place}")
        }
    };
    Ok((path, out.finish()))
}

fn is_upgrade(headers: &HeaderMap) -> bool {
    let wants =
        headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    wants.map(str::trim).any(|token| token.eq_ignore_ascii_case("upgrade")) && headers.contains_key(UPGRADE)
}

fn unreachable(endpoint: &Endpoint, why: impl std::fmt::Display) -> Status {
    Status::internal(format!("error dialing backend: kubelet at {}:{}: {why}", endpoint.host, endpoint.port))
}

async fn dial(server: &Server, endpoint: &Endpoint) -> Result<http1::SendRequest<Body>, Status> {
    let connect = async {
        let tcp = TcpStream::connect((endpoint.host.as_str(), endpoint.port))
            .await
            .map_err(|error| unreachable(endpoint, error))?;
        tcp.set_nodelay(true).map_err(|error| unreachable(endpoint, error))?;
        let name = match endpoint.host.parse::<IpAddr>() {
            Ok(address) => ServerName::from(address),
            Err(_) => ServerName::try_from(endpoint.host.clone()).map_err(|error| unreachable(endpoint, error))?,
        };
        let tls = TlsConnector::from(server.kubelets.tls_for(endpoint))
            .connect(name, tcp)
            .await
            .map_err(|error| unreachable(endpoint, error))?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(tls)).await.map_err(|error| unreachable(endpoint, error))?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a connection to a kubelet ended");
            }
        });
        Ok(sender)
    };
    timeout(DIAL, connect).await.unwrap_or_else(|_| Err(unreachable(endpoint, "it didn't answer in time")))
}

async fn ask(
    server: &Server,
    endpoint: &Endpoint,
    request: Request<Body>,
) -> Result<Response<hyper::body::Incoming>, Status> {
    let mut sender = dial(server, endpoint).await?;
    let answer = timeout(HEAD, sender.send_request(request)).await;
    answer.map_err(|_| unreachable(endpoint, "it didn't answer in time"))?.map_err(|error| unreachable(endpoint, error))
}

fn uri(path: &str, parameters: &str) -> Result<Uri, Status> {
    let text = if parameters.is_empty() { path.to_owned() } else { format!("{path}?{parameters}") };
    text.parse().map_err(Status::internal)
}

fn host(endpoint: &Endpoint) -> Result<HeaderValue, Status> {
    HeaderValue::from_str(&format!("{}:{}", endpoint.host, endpoint.port)).map_err(Status::internal)
}

async fn log(
    server: &Server,
    endpoint: &Endpoint,
    pods: &crate::kinds::Resource,
    name: &str,
    path: &str,
    parameters: &str,
) -> Result<Response<Body>, Status> {
    let mut request = Request::new(Body::empty());
    *request.uri_mut() = uri(path, parameters)?;
    request.headers_mut().insert(HOST, host(endpoint)?);
    let response = ask(server, endpoint, request).await?;
    if response.status().is_success() {
        return Ok(respond::text(StatusCode::OK, Body::new(response.into_body())));
    }
    let code = response.status().as_u16();
    let text = short_text(response.into_body()).await;
    let text = text.trim_end();
    Err(match code {
        400 => Status::bad_request(text),
        404 => Status { message: text.into(), ..Status::not_found(pods, name) },
        500 => Status::internal(text),
        _ => Status { code, ..Status::internal(text) },
    })
}

/// A node's `/metrics/resource`.
pub(crate) async fn resource_metrics(server: &Server, node: &str) -> Result<String, Status> {
    let endpoint = node_endpoint(server, node)?;
    let mut request = Request::new(Body::empty());
    *request.uri_mut() = uri("/metrics/resource", "")?;
    request.headers_mut().insert(HOST, host(&endpoint)?);
    let response = ask(server, &endpoint, request).await?;
    let code = response.status();
    if !code.is_success() {
        return Err(unreachable(&endpoint, short_text(response.into_body()).await.trim_end()));
    }
    let body = http_body_util::Limited::new(response.into_body(), METRICS_LIMIT).collect();
    let body = timeout(HEAD, body).await.map_err(|_| unreachable(&endpoint, "it didn't answer in time"))?;
    let body = body.map_err(|error| unreachable(&endpoint, error))?.to_bytes();
    String::from_utf8(body.into()).map_err(|error| unreachable(&endpoint, error))
}

async fn short_text(body: hyper::body::Incoming) -> String {
    let limited = http_body_util::Limited::new(body, ERROR_LIMIT);
    match limited.collect().await {
        Ok(collected) => String::from_utf8_lossy(&collected.to_bytes()).into_owned(),
        Err(error) => format!("the kubelet's answer can't be read: {error}"),
    }
}

/// Headers that concern one connection only, or the client's credentials.
fn passes(name: &HeaderName) -> bool {
    *name != HOST
        && *name != AUTHORIZATION
        && !name.as_str().starts_with("impersonate-")
        && *name != http::header::CONTENT_LENGTH
}

/// Passes an upgraded connection through, untouched.
async fn stream(
    server: &Server,
    endpoint: &Endpoint,
    path: &str,
    parameters: &str,
    mut request: Request<Body>,
) -> Result<Response<Body>, Status> {
    if request.extensions().get::<OnUpgrade>().is_none() {
        return Err(Status::bad_request("streaming needs an HTTP/1.1 connection that can be upgraded"));
    }
    let mut forward = Request::new(Body::empty());
    *forward.method_mut() = request.method().clone();
    *forward.uri_mut() = uri(path, parameters)?;
    for (name, value) in request.headers() {
        if passes(name) {
            forward.headers_mut().append(name.clone(), value.clone());
        }
    }
    forward.headers_mut().insert(HOST, host(endpoint)?);
    if !endpoint.websocket_v5 {
        without_v5(forward.headers_mut())?;
    }
    let client = hyper::upgrade::on(&mut request);
    let mut response = ask(server, endpoint, forward).await?;
    let mut answer = Response::new(Body::empty());
    *answer.status_mut() = response.status();
    for (name, value) in response.headers() {
        if response.status() == StatusCode::SWITCHING_PROTOCOLS
            || (*name != CONNECTION && *name != http::header::TRANSFER_ENCODING)
        {
            answer.headers_mut().append(name.clone(), value.clone());
        }
    }
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        // The kubelet says why not, and the client shows it.
        *answer.body_mut() = Body::new(response.into_body());
        return Ok(answer);
    }
    let kubelet = hyper::upgrade::on(&mut response);
    tokio::spawn(async move {
        match tokio::try_join!(client, kubelet) {
            Ok((client, kubelet)) => {
                let (mut client, mut kubelet) = (TokioIo::new(client), TokioIo::new(kubelet));
                if let Err(error) =
                    tokio::io::copy_bidirectional_with_sizes(&mut client, &mut kubelet, COPY, COPY).await
                {
                    tracing::debug!(%error, "a stream ended");
                }
            }
            Err(error) => tracing::debug!(%error, "a connection was not upgraded"),
        }
    });
    Ok(answer)
}

/// Takes WebSocket v5 out of the offer. A client that offers nothing else is refused, which makes
/// kubectl fall back to SPDY.
fn without_v5(headers: &mut HeaderMap) -> Result<(), Status> {
    let offered: Vec<String> = headers
        .get_all(SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|one| one.trim().to_owned())
        .collect();
    if offered.is_empty() {
        return Ok(());
    }
    let kept: Vec<String> =
        offered.into_iter().filter(|one| !one.starts_with("v5.") && !one.starts_with("SPDY/3.1+")).collect();
    if kept.is_empty() {
        return Err(Status::bad_request("the node's kubelet does not speak this WebSocket subprotocol; use SPDY"));
    }
    let value = HeaderValue::from_str(&kept.join(", ")).map_err(Status::internal)?;
    headers.insert(SEC_WEBSOCKET_PROTOCOL, value);
    Ok(())
}

/// `nodes/NAME/proxy/…`: the kubelet's own paths, for administrators.
pub(crate) async fn node(
    server: &Arc<Server>,
    target: &Target,
    request: Request<Body>,
) -> Result<Response<Body>, Status> {
    let endpoint = node_endpoint(server, target.name.as_deref().unwrap_or_default())?;
    let path = format!("/{}", target.rest);
    let parameters = request.uri().query().unwrap_or_default().to_owned();
    if is_upgrade(request.headers()) {
        return stream(server, &endpoint, &path, &parameters, request).await;
    }
    let (parts, body) = request.into_parts();
    let mut forward = Request::new(body);
    *forward.method_mut() = parts.method;
    *forward.uri_mut() = uri(&path, &parameters)?;
    for (name, value) in &parts.headers {
        if passes(name) && *name != CONNECTION {
            forward.headers_mut().append(name.clone(), value.clone());
        }
    }
    forward.headers_mut().insert(HOST, host(&endpoint)?);
    let response = ask(server, &endpoint, forward).await?;
    let (mut parts, body) = response.into_parts();
    parts.version = http::Version::HTTP_11;
    parts.headers.remove(CONNECTION);
    parts.headers.remove(http::header::TRANSFER_ENCODING);
    Ok(Response::from_parts(parts, Body::new(body)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn translates_queries_for_the_kubelet() {
        let query =
            Query::parse(Some("container=vm&stdin=true&stdout=true&tty=false&command=sh&command=-c&command=echo+hi"));
        let (path, parameters) = translate("exec", "t", "p-1.x", "vm", &query).unwrap();
        assert_eq!(path, "/exec/t/p-1.x/vm");
        assert_eq!(parameters, "input=1&output=1&command=sh&command=-c&command=echo+hi");
        let query = Query::parse(Some("container=vm&follow=true&tailLines=0"));
        assert_eq!(
            translate("log", "t", "p", "vm", &query).unwrap(),
            ("/containerLogs/t/p/vm".into(), "follow=true&tailLines=0".into())
        );
        assert_eq!(translate("portforward", "t", "../x", "", &Query::default()).unwrap().0, "/portForward/t/..%2Fx");
        assert_eq!(translate("exec", "t", "p", "c", &Query::parse(Some("stdin=maybe"))).unwrap_err().code, 400);
    }

    #[test]
    fn asks_for_a_container_when_it_isnt_clear() {
        let one = json!({ "metadata": { "name": "p" }, "spec": { "containers": [{ "name": "vm" }] } });
        assert_eq!(container(&one, None).unwrap(), "vm");
        assert_eq!(container(&one, Some("x")).unwrap_err().message, "container x is not valid for pod p");
        let two = json!({ "metadata": { "name": "p" }, "spec": { "containers": [{ "name": "vm" }, { "name": "side" }], "initContainers": [{ "name": "i" }] } });
        assert_eq!(container(&two, Some("i")).unwrap(), "i");
        assert_eq!(
            container(&two, None).unwrap_err().message,
            "a container name must be specified for pod p, choose one of: [vm side] or one of the init containers: [i]"
        );
    }

    #[test]
    fn finds_the_kubelet_and_what_it_speaks() {
        let mut node = json!({ "status": {
            "addresses": [{ "type": "Hostname", "address": "n1" }, { "type": "InternalIP", "address": "127.0.0.1" }],
            "daemonEndpoints": { "kubeletEndpoint": { "Port": 12345 } },
            "nodeInfo": { "kubeletVersion": "v1.36.0" },
        } });
        assert_eq!(
            endpoint(&node).unwrap(),
            Endpoint { host: "127.0.0.1".into(), port: 12345, websocket_v5: false, pin: None }
        );
        node["status"]["declaredFeatures"] = json!([DIRECT_WEBSOCKETS]);
        assert!(endpoint(&node).unwrap().websocket_v5);
        assert_eq!(endpoint(&json!({ "status": {} })), None);
    }

    #[test]
    fn refuses_v5_where_the_kubelet_cant_speak_it() {
        let offer = |value: &str| HeaderMap::from_iter([(SEC_WEBSOCKET_PROTOCOL, value.parse().unwrap())]);
        let mut both = offer("v5.channel.k8s.io, v4.channel.k8s.io");
        without_v5(&mut both).unwrap();
        assert_eq!(both[SEC_WEBSOCKET_PROTOCOL], "v4.channel.k8s.io");
        assert_eq!(without_v5(&mut offer("v5.channel.k8s.io")).unwrap_err().code, 400);
        assert!(without_v5(&mut HeaderMap::new()).is_ok());
    }
}
