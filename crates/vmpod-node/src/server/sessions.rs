//! The routes that stay: exec, attach, port-forward, and run, which is exec without the streaming.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{
    Json,
    extract::{FromRequestParts as _, Path, Request, State, WebSocketUpgrade, ws::WebSocket},
    response::{IntoResponse, Response},
};
use bytes::BytesMut;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWrite, DuplexStream};

use super::{
    App, AttachRequest, ExecRequest, PodRef, Streams, Target,
    guard::{offers, plain},
    routes::{ContainerPath, Pairs, PodPath, borrowed},
};
use crate::streaming::{
    forward, negotiate,
    remote::{self, Operation, Wanted},
    websocket,
};

const VERSION: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");

/// The most output `/run` gives.
const MAX_RUN: usize = 16 * 1024 * 1024;

pub(super) async fn exec(
    State(app): State<Arc<App>>,
    Path(path): Path<ContainerPath>,
    query: Pairs,
    request: Request,
) -> Response {
    let command: Vec<_> =
        borrowed(&query).filter(|(name, _)| *name == "command").map(|(_, value)| value.to_owned()).collect();
    if command.is_empty() {
        return refuse(StatusCode::BAD_REQUEST, "you must specify a command");
    }
    let operation = |tty| Operation::Exec(ExecRequest { command, tty });
    session(app, path.into(), &query, request, "exec", operation).await
}

pub(super) async fn attach(
    State(app): State<Arc<App>>,
    Path(path): Path<ContainerPath>,
    query: Pairs,
    request: Request,
) -> Response {
    let operation = |tty| Operation::Attach(AttachRequest { tty });
    session(app, path.into(), &query, request, "attach", operation).await
}

async fn session(
    app: Arc<App>,
    target: Target,
    query: &Pairs,
    request: Request,
    route: &'static str,
    operation: impl FnOnce(bool) -> Operation,
) -> Response {
    let wanted = match Wanted::from_query(borrowed(query)) {
        Ok(wanted) => wanted,
        Err(message) => return refuse(StatusCode::BAD_REQUEST, message),
    };
    if let Err(error) = app.runtime.check_running(&target).await {
        return refuse(error.status(), &crate::error_chain(&error));
    }
    let operation = operation(wanted.tty);
    let upgrade = match Upgrade::of(request, &remote::SPDY_PROTOCOLS, &remote::WEBSOCKET_PROTOCOLS).await {
        Ok(upgrade) => upgrade,
        Err(refusal) => return refusal,
    };
    let runtime = app.runtime.clone();
    upgrade.run(&app, route, move |connection| async move {
        match connection {
            Connection::Spdy(io, protocol) => {
                remote::over_spdy(io, protocol, wanted, runtime, target, operation).await;
            }
            Connection::WebSocket(socket, protocol) => {
                remote::over_websocket(*socket, protocol, wanted, runtime, target, operation).await;
            }
        }
    })
}

pub(super) async fn port_forward(
    State(app): State<Arc<App>>,
    Path(path): Path<PodPath>,
    query: Pairs,
    request: Request,
) -> Response {
    let pod: PodRef = path.into();
    if let Err(error) = app.runtime.check_forward(&pod).await {
        return refuse(error.status(), &crate::error_chain(&error));
    }
    let upgrade = match Upgrade::of(request, &[forward::SPDY_PROTOCOL], &forward::WEBSOCKET_PROTOCOLS).await {
        Ok(upgrade) => upgrade,
        Err(refusal) => return refusal,
    };
    // Only a WebSocket without SPDY in it has its ports in the query.
    let ports = match &upgrade {
        Upgrade::WebSocket(_, protocol) if *protocol != forward::TUNNEL_PROTOCOL => {
            match forward::ports(borrowed(&query)) {
                Ok(ports) => ports,
                Err(message) => return refuse(StatusCode::BAD_REQUEST, &message),
            }
        }
        _ => Vec::new(),
    };
    let runtime = app.runtime.clone();
    upgrade.run(&app, "portForward", move |connection| async move {
        match connection {
            Connection::Spdy(io, _) => forward::over_spdy(io, runtime, pod).await,
            Connection::WebSocket(socket, forward::TUNNEL_PROTOCOL) => {
                forward::over_spdy(websocket::tunnel(*socket), runtime, pod).await;
            }
            Connection::WebSocket(socket, protocol) => {
                forward::over_websocket(*socket, protocol, ports, runtime, pod).await;
            }
        }
    })
}

/// A request that can be upgraded, and the protocol that was agreed on.
enum Upgrade {
    Spdy(OnUpgrade, &'static str, bool),
    WebSocket(Box<WebSocketUpgrade>, &'static str),
}

/// An upgraded connection.
enum Connection {
    Spdy(TokioIo<hyper::upgrade::Upgraded>, &'static str),
    WebSocket(Box<WebSocket>, &'static str),
}

impl Upgrade {
    async fn of(request: Request, spdy: &[&'static str], web_socket: &[&'static str]) -> Result<Self, Response> {
        let (mut parts, _body) = request.into_parts();
        if !has_token(&parts.headers, &header::CONNECTION, "upgrade") {
            let message = "unable to upgrade: missing upgrade headers in request";
            return Err(refuse(StatusCode::BAD_REQUEST, message));
        }
        if has_token(&parts.headers, &header::UPGRADE, "websocket") && parts.method == Method::GET {
            let offered = offers(&parts.headers, header::SEC_WEBSOCKET_PROTOCOL.as_str());
            let upgrade = WebSocketUpgrade::from_request_parts(&mut parts, &()).await;
            let mut upgrade = upgrade.map_err(IntoResponse::into_response)?;
            let protocol = match negotiate(web_socket, &offered) {
                Some(protocol) => {
                    upgrade.set_selected_protocol(HeaderValue::from_static(protocol));
                    protocol
                }
                // As in Kubernetes: who offers nothing gets the binary channels.
                None if offered.is_empty() => "",
                None => {
                    let message = format!("none of the WebSocket protocols {offered:?} is served: {web_socket:?}");
                    return Err(refuse(StatusCode::BAD_REQUEST, &message));
                }
            };
            let upgrade = upgrade.max_message_size(websocket::MAX_MESSAGE).max_frame_size(websocket::MAX_MESSAGE);
            return Ok(Self::WebSocket(Box::new(upgrade), protocol));
        }
        if !has_token(&parts.headers, &header::UPGRADE, "spdy/3.1") {
            let message = "unable to upgrade: neither SPDY/3.1 nor a WebSocket is asked for";
            return Err(refuse(StatusCode::BAD_REQUEST, message));
        }
        let offered = offers(&parts.headers, VERSION.as_str());
        let protocol = match negotiate(spdy, &offered) {
            Some(protocol) => Some(protocol),
            None if offered.is_empty() => None,
            None => {
                let message = format!(
                    "unable to upgrade: unable to negotiate protocol: client supports {offered:?}, server accepts {spdy:?}"
                );
                let mut refusal = refuse(StatusCode::FORBIDDEN, &message);
                for protocol in spdy {
                    refusal.headers_mut().append(ACCEPTED, HeaderValue::from_static(protocol));
                }
                return Err(refusal);
            }
        };
        let Some(upgrade) = parts.extensions.remove::<OnUpgrade>() else {
            return Err(refuse(StatusCode::BAD_REQUEST, "unable to upgrade: the connection can't be"));
        };
        // The oldest clients name no protocol and speak the first.
        let oldest = spdy.last().copied().unwrap_or_default();
        Ok(Self::Spdy(upgrade, protocol.unwrap_or(oldest), protocol.is_some()))
    }

    /// Answers 101 and runs the session until it ends or the server stops.
    fn run<F, Fut>(self, app: &App, route: &'static str, session: F) -> Response
    where
        F: FnOnce(Connection) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let counted = app.metrics.session(route);
        let stop = app.stop.clone();
        let token = app.sessions.token();
        let work = move |connection| async move {
            tokio::select! {
                () = session(connection) => {}
                () = stop.cancelled() => {}
            }
            drop((counted, token));
        };
        match self {
            Self::WebSocket(upgrade, protocol) => {
                upgrade.on_upgrade(move |socket| work(Connection::WebSocket(Box::new(socket), protocol)))
            }
            Self::Spdy(upgrade, protocol, named) => {
                tokio::spawn(async move {
                    match upgrade.await {
                        Ok(io) => work(Connection::Spdy(TokioIo::new(io), protocol)).await,
                        Err(error) => tracing::debug!(%error, "a client did not go on after an upgrade"),
                    }
                });
                let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
                let headers = response.headers_mut();
                headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
                headers.insert(header::UPGRADE, HeaderValue::from_static("SPDY/3.1"));
                if named {
                    headers.insert(VERSION, HeaderValue::from_static(protocol));
                }
                response
            }
        }
    }
}

fn has_token(headers: &HeaderMap, name: &HeaderName, wanted: &str) -> bool {
    offers(headers, name.as_str()).iter().any(|token| token.eq_ignore_ascii_case(wanted))
}

/// The answer to a session that can't be: a Status in JSON. `kubectl` takes whatever parses for one, and a plain text
/// with a colon in it is YAML.
fn refuse(code: StatusCode, message: &str) -> Response {
    let reason = match code {
        StatusCode::BAD_REQUEST => "BadRequest",
        StatusCode::FORBIDDEN => "Forbidden",
        StatusCode::NOT_FOUND => "NotFound",
        _ => "InternalError",
    };
    let status = json!({
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code.as_u16(),
    });
    (code, Json(status)).into_response()
}

/// Runs a command (its words separated by spaces) and answers with its output.
pub(super) async fn run(State(app): State<Arc<App>>, Path(path): Path<ContainerPath>, query: Pairs) -> Response {
    let command: Vec<_> = borrowed(&query)
        .find(|(name, _)| *name == "cmd")
        .map(|(_, value)| value.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect())
        .unwrap_or_default();
    if command.is_empty() {
        return plain(StatusCode::BAD_REQUEST, "you must specify a command: ?cmd=");
    }
    let target: Target = path.into();
    if let Err(error) = app.runtime.check_running(&target).await {
        return error.into_response();
    }
    let (reader, writer) = tokio::io::duplex(64 * 1024);
    let shared = Arc::new(tokio::sync::Mutex::new(writer));
    let streams = Streams {
        stdin: None,
        stdout: Some(Box::new(SharedWriter(shared.clone()))),
        stderr: Some(Box::new(SharedWriter(shared))),
        resize: None,
    };
    let mut output = BytesMut::new();
    let collect = async {
        let mut reader = reader;
        let mut limited = (&mut reader).take(MAX_RUN as u64);
        while matches!(limited.read_buf(&mut output).await, Ok(1..)) {}
        // The rest is read and dropped, so that the command can end.
        tokio::io::copy(&mut reader, &mut tokio::io::sink()).await.ok();
    };
    let executed = app.runtime.exec(&target, ExecRequest { command, tty: false }, streams);
    let (result, ()) = tokio::join!(executed, collect);
    match result {
        Ok(exit) if exit.code() == 0 => output.freeze().into_response(),
        Ok(exit) => {
            let text = String::from_utf8_lossy(&output);
            let message = format!("command terminated with exit code {}: {text}", exit.code());
            plain(StatusCode::INTERNAL_SERVER_ERROR, &message)
        }
        Err(error) => {
            tracing::debug!(error = crate::error_chain(&error), "a command that was posted failed");
            error.into_response()
        }
    }
}

/// Two writers into one pipe, which ends when both are gone.
struct SharedWriter(Arc<tokio::sync::Mutex<DuplexStream>>);

impl SharedWriter {
    fn with<T>(
        &self,
        poll: impl FnOnce(Pin<&mut DuplexStream>) -> Poll<std::io::Result<T>>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<T>> {
        match self.0.try_lock() {
            Ok(mut writer) => poll(Pin::new(&mut *writer)),
            Err(_held) => {
                // Held only during another poll: it is free in a moment.
                context.waker().wake_by_ref();
                Poll::Pending
            }
        }
    }
}

impl AsyncWrite for SharedWriter {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        let waker = context.waker().clone();
        self.with(|writer| writer.poll_write(&mut Context::from_waker(&waker), bytes), context)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        // The other output may go on; the pipe ends with the last of them.
        Poll::Ready(Ok(()))
    }
}
