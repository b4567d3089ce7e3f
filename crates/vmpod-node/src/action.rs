//! What probes and lifecycle hooks do: run a command in the guest or in a container beside it, or ask one of its ports.
//!
//! A guest with an address of its own is asked there, as the kubelet asks pods. On a `user` network its ports are reached through
//! the connection to the guest, at the guest's own loopback: the forwarded ports take connections whether or not anything in the
//! guest listens, so that asking them would prove nothing.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{Method, Request, Uri, header};
use http_body_util::{BodyExt as _, Empty, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_openapi::{
    api::core::v1::{Container, ExecAction, GRPCAction, HTTPGetAction, LifecycleHandler, Probe, TCPSocketAction},
    apimachinery::pkg::util::intstr::IntOrString,
};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite},
    net::TcpStream,
};
use tokio_util::task::AbortOnDropHandle;
use vmpod_machine::{Exec, Machine, Signal};

use crate::{docker::Docker, error_chain, run_config::RunConfig, server::Duplex};

/// How much of a command's output is told of, as in the kubelet (pkg/probe/exec).
const OUTPUT: u64 = 10 << 10;

/// One thing to do.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Action<'a> {
    Exec(&'a ExecAction),
    Http(&'a HTTPGetAction),
    Tcp(&'a TCPSocketAction),
    Grpc(&'a GRPCAction),
    Sleep(Duration),
}

impl<'a> Action<'a> {
    pub(crate) fn of_probe(probe: &'a Probe) -> Option<Self> {
        let exec = probe.exec.as_ref().map(Self::Exec);
        let http = probe.http_get.as_ref().map(Self::Http);
        let tcp = probe.tcp_socket.as_ref().map(Self::Tcp);
        exec.or(http).or(tcp).or_else(|| probe.grpc.as_ref().map(Self::Grpc))
    }

    pub(crate) fn of_hook(hook: &'a LifecycleHandler) -> Option<Self> {
        let exec = hook.exec.as_ref().map(Self::Exec);
        let http = hook.http_get.as_ref().map(Self::Http);
        let tcp = hook.tcp_socket.as_ref().map(Self::Tcp);
        let sleep = hook.sleep.as_ref().map(|sleep| Duration::from_secs(sleep.seconds.try_into().unwrap_or(0)));
        exec.or(http).or(tcp).or(sleep.map(Self::Sleep))
    }

    /// The host it names, which must be none: what is asked is the machine.
    pub(crate) fn host(self) -> Option<&'a str> {
        let host = match self {
            Self::Http(get) => get.host.as_deref(),
            Self::Tcp(tcp) => tcp.host.as_deref(),
            Self::Exec(_) | Self::Grpc(_) | Self::Sleep(_) => None,
        };
        host.filter(|host| !host.is_empty())
    }
}

/// Where something is done.
#[derive(Clone)]
pub(crate) enum Where {
    /// A machine's guest.
    Guest(Machine),
    /// A container beside the machine, and the address at which its ports are.
    Container { docker: Docker, id: String, address: Option<Ipv4Addr> },
}

/// Where it is done, and for which container.
pub(crate) struct Place<'a> {
    pub(crate) at: &'a Where,
    pub(crate) container: &'a Container,
    pub(crate) run: Option<&'a RunConfig>,
}

impl Place<'_> {
    /// Does it; an error says what was wrong, in the kubelet's words where it has any.
    pub(crate) async fn act(&self, action: Action<'_>) -> Result<(), String> {
        match action {
            Action::Exec(exec) => self.exec(exec).await,
            Action::Http(get) => {
                let stream = self.connect(&get.port).await?;
                if get.scheme.as_deref() == Some("HTTPS") {
                    let tls = tokio_rustls::TlsConnector::from(trusting()?);
                    let name = ServerName::try_from("localhost").map_err(|error| error.to_string())?;
                    let stream = tls.connect(name, stream).await.map_err(|error| error_chain(&error))?;
                    http(stream, get).await
                } else {
                    http(stream, get).await
                }
            }
            Action::Tcp(tcp) => self.connect(&tcp.port).await.map(drop),
            Action::Grpc(call) => {
                let stream = self.connect(&IntOrString::Int(call.port)).await?;
                grpc(stream, call.service.as_deref().unwrap_or_default()).await
            }
            Action::Sleep(time) => {
                tokio::time::sleep(time).await;
                Ok(())
            }
        }
    }

    async fn connect(&self, port: &IntOrString) -> Result<Box<dyn Duplex>, String> {
        let port = self.port(port)?;
        match self.at {
            Where::Guest(machine) => {
                if let Some(address) = machine.reachable() {
                    let stream = TcpStream::connect((address, port)).await.map_err(|error| error.to_string())?;
                    return Ok(Box::new(stream));
                }
                let stream = machine.guest().forward(port).await.map_err(|error| error_chain(&error))?;
                Ok(Box::new(stream))
            }
            Where::Container { address, .. } => {
                let address = address.ok_or("the pod's containers have no address")?;
                let stream = TcpStream::connect((address, port)).await.map_err(|error| error.to_string())?;
                Ok(Box::new(stream))
            }
        }
    }

    fn port(&self, port: &IntOrString) -> Result<u16, String> {
        let number = match port {
            IntOrString::Int(number) => Some(*number),
            IntOrString::String(name) => {
                let ports = self.container.ports.as_deref().unwrap_or_default();
                let named =
                    ports.iter().find(|port| port.name.as_deref() == Some(name)).map(|port| port.container_port);
                Some(named.or_else(|| name.parse().ok()).ok_or_else(|| format!("couldn't find port: {name:?}"))?)
            }
        };
        number
            .and_then(|number| u16::try_from(number).ok())
            .filter(|number| *number > 0)
            .ok_or_else(|| format!("invalid port number: {port:?}"))
    }

    async fn exec(&self, exec: &ExecAction) -> Result<(), String> {
        let guest = match self.at {
            Where::Guest(machine) => machine.guest(),
            Where::Container { docker, id, .. } => {
                let command = exec.command.clone().unwrap_or_default();
                let (code, said) = docker.output(id, command, OUTPUT).await.map_err(|error| error.to_string())?;
                return told(code, &said);
            }
        };
        let said = |error: vmpod_machine::GuestError| error_chain(&error);
        let exec = Exec {
            command: exec.command.clone().unwrap_or_default(),
            env: self.run.map(|run| run.env.clone()).unwrap_or_default(),
            workdir: self.run.and_then(|run| run.workdir.clone()),
            ..Exec::default()
        };
        let mut session = guest.exec(exec).await.map_err(said)?;
        drop(session.stdin.take());
        // A command that outlives its time is killed, not only forgotten.
        let control = session.control.clone();
        let killer = KillOnDrop(Some(control.clone()));
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let (status, a, b) =
            tokio::join!(control.wait(), read(&mut session.stdout, &mut out), read(&mut session.stderr, &mut err));
        killer.disarm();
        a.and(b).map_err(|error| error.to_string())?;
        out.extend_from_slice(&err);
        told(status.map_err(said)?.code(), &out)
    }
}

/// A command that failed, by its own words if it had any.
fn told(code: i32, said: &[u8]) -> Result<(), String> {
    if code == 0 {
        return Ok(());
    }
    let text = String::from_utf8_lossy(said).trim_end().to_owned();
    Err(if text.is_empty() { format!("command exited with code {code}") } else { text })
}

struct KillOnDrop(Option<vmpod_machine::ExecControl>);

impl KillOnDrop {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(control) = &self.0 {
            control.signal(Signal::Kill);
        }
    }
}

/// Keeps the first part and reads the rest away.
async fn read(from: &mut (impl AsyncRead + Unpin), into: &mut Vec<u8>) -> std::io::Result<()> {
    (&mut *from).take(OUTPUT).read_to_end(into).await?;
    tokio::io::copy(from, &mut tokio::io::sink()).await.map(drop)
}

/// A GET whose answer must be below 400. Redirects are not followed: one that is given is an answer.
async fn http(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, get: &HTTPGetAction) -> Result<(), String> {
    let path = get.path.as_deref().unwrap_or("/");
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let uri: Uri = path.parse().map_err(|error| format!("path {path:?}: {error}"))?;
    let mut request = Request::builder()
        .method(Method::GET)
        .uri(uri)
        .header(header::USER_AGENT, concat!("kube-probe/vmpod-", env!("CARGO_PKG_VERSION")))
        .header(header::ACCEPT, "*/*")
        .header(header::CONNECTION, "close");
    let named = get.http_headers.as_deref().unwrap_or_default();
    if !named.iter().any(|h| h.name.eq_ignore_ascii_case("host")) {
        request = request.header(header::HOST, "localhost");
    }
    for field in named {
        request = request.header(&field.name, &field.value);
    }
    let request = request.body(Empty::<Bytes>::new()).map_err(|error| error.to_string())?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| error_chain(&error))?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let answer = sender.send_request(request).await.map_err(|error| error_chain(&error))?;
    let status = answer.status().as_u16();
    if (200..400).contains(&status) { Ok(()) } else { Err(format!("HTTP probe failed with statuscode: {status}")) }
}

/// `grpc.health.v1.Health/Check` (github.com/grpc/grpc, doc/health-checking.md). Its two messages have one field each, which
/// is all that is written and read here: `HealthCheckRequest { string service = 1; }` and
/// `HealthCheckResponse { enum status = 1; }`.
async fn grpc(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, service: &str) -> Result<(), String> {
    let mut message = Vec::new();
    if !service.is_empty() {
        message.push(0x0a);
        let mut length = service.len();
        while length >= 0x80 {
            message.push(u8::try_from(length & 0x7f).unwrap_or_default() | 0x80);
            length >>= 7;
        }
        message.push(u8::try_from(length).unwrap_or_default());
        message.extend_from_slice(service.as_bytes());
    }
    let mut body = BytesMut::from(&[0][..]);
    body.extend_from_slice(&u32::try_from(message.len()).map_err(|error| error.to_string())?.to_be_bytes());
    body.extend_from_slice(&message);
    let request = Request::builder()
        .method(Method::POST)
        .uri("http://localhost/grpc.health.v1.Health/Check")
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .header(header::USER_AGENT, concat!("kube-probe/vmpod-", env!("CARGO_PKG_VERSION")))
        .body(Full::new(body.freeze()))
        .map_err(|error| error.to_string())?;
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .map_err(|error| error_chain(&error))?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let answer = sender.send_request(request).await.map_err(|error| error_chain(&error))?;
    let (head, body) = answer.into_parts();
    let body = http_body_util::Limited::new(body, 1 << 16).collect().await.map_err(|error| error.to_string())?;
    let trailer = body.trailers().and_then(|trailers| trailers.get("grpc-status"));
    let code = trailer.or_else(|| head.headers.get("grpc-status")).map_or("", |value| value.to_str().unwrap_or("?"));
    match code {
        "0" => {}
        "12" => {
            return Err("this server does not implement the grpc health protocol (grpc.health.v1.Health)".to_owned());
        }
        "5" => return Err(format!("the server doesn't know the service {service:?}")),
        other => return Err(format!("the health check failed with gRPC status {other:?} (HTTP {})", head.status)),
    }
    // One frame of five bytes and a message; the status is a varint, and 0 (unknown) isn't written at all.
    let body = body.to_bytes();
    let status = match body.get(5..) {
        Some([0x08, status, ..]) => *status,
        _ => 0,
    };
    match status {
        1 => Ok(()),
        other => {
            let name = match other {
                0 => "UNKNOWN",
                2 => "NOT_SERVING",
                3 => "SERVICE_UNKNOWN",
                _ => "a status that isn't known",
            };
            Err(format!("service unhealthy (responded with {name:?})"))
        }
    }
}

/// TLS that takes any certificate, as the kubelet's probes do: what is asked is whether the server answers.
fn trusting() -> Result<Arc<ClientConfig>, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Trusting(provider)))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[derive(Debug)]
struct Trusting(Arc<CryptoProvider>);

impl ServerCertVerifier for Trusting {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http::{HeaderMap, HeaderValue, Response};
    use http_body_util::StreamBody;
    use hyper::{body::Frame, service::service_fn};

    use super::*;

    fn get(value: serde_json::Value) -> HTTPGetAction {
        serde_json::from_value(value).unwrap()
    }

    /// Serves one connection and answers every request with `code`, if its headers and path are what is wanted.
    async fn ask_http(code: u16, get: HTTPGetAction) -> Result<(), String> {
        let (ours, theirs) = tokio::io::duplex(1 << 12);
        let server = tokio::spawn(async move {
            let service = service_fn(move |request: Request<hyper::body::Incoming>| async move {
                let fine = request.uri() == "/healthz?deep=1" && request.headers()["x-token"] == "t";
                let code = if fine { code } else { 418 };
                Ok::<_, Infallible>(Response::builder().status(code).body(Empty::<Bytes>::new()).unwrap())
            });
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(theirs), service).await.ok();
        });
        let result = http(ours, &get).await;
        server.abort();
        result
    }

    #[tokio::test]
    async fn http_answers_below_400_are_good() {
        let wanted = || {
            get(
                serde_json::json!({"port": 80, "path": "healthz?deep=1", "httpHeaders": [{"name": "X-Token", "value": "t"}]}),
            )
        };
        for code in [200, 204, 302, 399] {
            assert_eq!(ask_http(code, wanted()).await, Ok(()), "{code}");
        }
        for code in [400, 404, 500, 503] {
            let text = format!("HTTP probe failed with statuscode: {code}");
            assert_eq!(ask_http(code, wanted()).await, Err(text));
        }
    }

    #[tokio::test]
    async fn what_speaks_no_http_fails() {
        let (ours, theirs) = tokio::io::duplex(1 << 12);
        drop(theirs);
        http(ours, &get(serde_json::json!({"port": 80}))).await.unwrap_err();
    }

    /// A health server of hyper's own HTTP/2, which knows the services "" and "db".
    async fn ask_grpc(service: &str, status: u8) -> Result<(), String> {
        let (ours, theirs) = tokio::io::duplex(1 << 14);
        let server = tokio::spawn(async move {
            let service = service_fn(move |request: Request<hyper::body::Incoming>| async move {
                assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let code = match &body[..] {
                    [0, 0, 0, 0, 0] | [0, 0, 0, 0, 4, 0x0a, 2, b'd', b'b'] => "0",
                    _ => "5",
                };
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", HeaderValue::from_static(code));
                let data = Bytes::copy_from_slice(&[0, 0, 0, 0, 2, 0x08, status]);
                let frames = [Ok::<_, Infallible>(Frame::data(data)), Ok(Frame::trailers(trailers))];
                let body = StreamBody::new(futures::stream::iter(frames));
                Ok::<_, Infallible>(Response::builder().header("content-type", "application/grpc").body(body).unwrap())
            });
            let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            builder.serve_connection(TokioIo::new(theirs), service).await.ok();
        });
        let result = grpc(ours, service).await;
        server.abort();
        result
    }

    #[tokio::test]
    async fn the_grpc_health_protocol_is_spoken() {
        assert_eq!(ask_grpc("", 1).await, Ok(()));
        assert_eq!(ask_grpc("db", 1).await, Ok(()));
        assert_eq!(ask_grpc("db", 2).await, Err("service unhealthy (responded with \"NOT_SERVING\")".to_owned()));
        assert_eq!(ask_grpc("nobody", 1).await, Err("the server doesn't know the service \"nobody\"".to_owned()));
    }
}
