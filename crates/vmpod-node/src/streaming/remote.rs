//! exec and attach: Kubernetes' remotecommand protocol, versions 1 to 5, over SPDY and WebSocket.
//!
//! A session has up to five streams: error, stdin, stdout, stderr and resize. Versions differ in little: from 3 on there
//! is a resize stream; from 4 on the error stream carries a Status in JSON instead of a bare message; 5 is 4 with a
//! way to close stdin over a WebSocket. (Kubernetes: `k8s.io/kubelet/pkg/cri/streaming/remotecommand`.)

use std::sync::Arc;

use bytes::{Buf as _, BytesMut};
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::mpsc,
    time::timeout,
};

use super::{
    GRACE, IDLE, STREAM_CREATION,
    spdy::{self, Session, Stream},
    websocket::{Encoding, Socket},
};
use crate::server::{AttachRequest, ExecRequest, Exit, Runtime, RuntimeError, Streams, Target, TermSize};

/// The versions spoken over SPDY, best first.
pub const SPDY_PROTOCOLS: [&str; 5] =
    ["v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];

/// The versions spoken over WebSocket, best first. Versions 2 and 3 never existed there, but clients offer them.
pub const WEBSOCKET_PROTOCOLS: [&str; 7] = [
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "base64.channel.k8s.io",
    "v3.channel.k8s.io",
    "v2.channel.k8s.io",
    "channel.k8s.io",
];

/// What to do once the streams are there.
#[derive(Clone, Debug)]
pub enum Operation {
    /// Run a command.
    Exec(ExecRequest),
    /// Join the main process.
    Attach(AttachRequest),
}

impl Operation {
    fn verb(&self) -> &'static str {
        match self {
            Self::Exec(_) => "executing command in",
            Self::Attach(_) => "attaching to",
        }
    }
}

/// The streams a client asked for in its query.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "four independent query parameters")]
pub struct Wanted {
    /// The client sends input.
    pub stdin: bool,
    /// The client wants output.
    pub stdout: bool,
    /// The client wants errors.
    pub stderr: bool,
    /// The client has a terminal.
    pub tty: bool,
}

impl Wanted {
    /// Reads the kubelet's query parameters. A terminal has no stderr; asking for nothing is an error.
    pub fn from_query<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, &'static str> {
        let mut wanted = Self::default();
        for (name, value) in pairs {
            let on = matches!(value, "1" | "true");
            match name {
                "input" => wanted.stdin |= on,
                "output" => wanted.stdout |= on,
                "error" => wanted.stderr |= on,
                "tty" => wanted.tty |= on,
                _ => {}
            }
        }
        wanted.stderr &= !wanted.tty;
        if wanted.stdin || wanted.stdout || wanted.stderr {
            Ok(wanted)
        } else {
            Err("you must specify at least 1 of stdin, stdout, stderr")
        }
    }
}

/// How the error stream tells the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorForm {
    /// Versions 1 to 3: nothing on success, else a message.
    Message,
    /// Versions 4 and 5: a `metav1.Status`.
    Status,
}

impl ErrorForm {
    /// That of a protocol.
    #[must_use]
    pub fn of(protocol: &str) -> Self {
        if protocol.starts_with("v4.") || protocol.starts_with("v5.") { Self::Status } else { Self::Message }
    }

    /// The bytes for the error stream.
    #[must_use]
    pub fn render(self, verb: &str, result: &Result<Exit, RuntimeError>) -> Vec<u8> {
        let (message, status) = match result {
            Ok(Exit::Code(0)) => match self {
                Self::Message => return Vec::new(),
                Self::Status => (String::new(), json!({"metadata": {}, "status": "Success"})),
            },
            Ok(exit) => {
                let code = exit.code();
                let message = format!("command terminated with non-zero exit code: exit code {code}");
                let causes = json!([{"reason": "ExitCode", "message": code.to_string()}]);
                let status = json!({
                    "metadata": {},
                    "status": "Failure",
                    "message": message,
                    "reason": "NonZeroExitCode",
                    "details": {"causes": causes},
                });
                (message, status)
            }
            Err(error) => {
                let message = format!("error {verb} container: {}", crate::error_chain(error));
                let status = json!({
                    "metadata": {},
                    "status": "Failure",
                    "message": format!("Internal error occurred: {message}"),
                    "reason": "InternalError",
                    "details": {"causes": [{"message": message}]},
                    "code": 500,
                });
                (message, status)
            }
        };
        match self {
            Self::Message => message.into_bytes(),
            Self::Status => status.to_string().into_bytes(),
        }
    }
}

/// The streams of a session, whatever carried them here.
struct Channels {
    streams: Streams,
    error: Box<dyn AsyncWrite + Send + Unpin>,
    form: ErrorForm,
}

async fn run(runtime: &dyn Runtime, target: &Target, operation: Operation, channels: Channels) {
    let Channels { streams, mut error, form } = channels;
    let verb = operation.verb();
    let result = match operation {
        Operation::Exec(request) => runtime.exec(target, request, streams).await,
        Operation::Attach(request) => runtime.attach(target, request, streams).await,
    };
    if let Err(error) = &result {
        tracing::warn!(%target, error = crate::error_chain(error), "a session failed");
    }
    let told = async {
        error.write_all(&form.render(verb, &result)).await?;
        error.shutdown().await
    };
    // A client that doesn't read how it ended doesn't want to know.
    if let Ok(Err(error)) = timeout(GRACE, told).await {
        tracing::debug!(%target, %error, "could not tell a client how its session ended");
    }
}

/// Serves a session over an upgraded SPDY connection.
pub async fn over_spdy(
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    protocol: &str,
    wanted: Wanted,
    runtime: Arc<dyn Runtime>,
    target: Target,
    operation: Operation,
) {
    let mut session = Session::start(io, spdy::Limits { streams: 16, idle: IDLE, ..spdy::Limits::default() });
    let resizes = wanted.tty && !matches!(protocol, "v2.channel.k8s.io" | "channel.k8s.io");
    match timeout(STREAM_CREATION, gather(&mut session, wanted, resizes)).await {
        Ok(Some(gathered)) => {
            let closed = session.closed();
            let channels = gathered.channels(wanted, ErrorForm::of(protocol));
            tokio::select! {
                () = run(&*runtime, &target, operation, channels) => {}
                () = closed => tracing::debug!(%target, "the client of a session went away"),
            }
        }
        Ok(None) => {}
        Err(_elapsed) => tracing::info!(%target, "a client did not open its streams in time"),
    }
    session.finish(GRACE).await;
}

#[derive(Default)]
struct Gathered {
    error: Option<Stream>,
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    resize: Option<Stream>,
}

impl Gathered {
    fn channels(self, wanted: Wanted, form: ErrorForm) -> Channels {
        let output = |stream: Option<Stream>| -> Option<Box<dyn AsyncWrite + Send + Unpin>> {
            Some(Box::new(stream?.finishing()))
        };
        Channels {
            streams: Streams {
                stdin: self.stdin.map(|stream| Box::new(stream.finishing()) as _),
                stdout: output(self.stdout),
                stderr: output(self.stderr),
                resize: wanted.tty.then(|| sizes(self.resize)),
            },
            error: output(self.error).unwrap_or_else(|| Box::new(tokio::io::sink())),
            form,
        }
    }
}

/// Waits for the streams of a session; `None` when the connection closes before.
async fn gather(session: &mut Session, wanted: Wanted, resizes: bool) -> Option<Gathered> {
    let mut gathered = Gathered::default();
    loop {
        let complete = gathered.error.is_some()
            && gathered.stdin.is_some() == wanted.stdin
            && gathered.stdout.is_some() == wanted.stdout
            && gathered.stderr.is_some() == wanted.stderr
            && gathered.resize.is_some() == resizes;
        if complete {
            return Some(gathered);
        }
        let incoming = session.accept().await?;
        let slot = match incoming.headers().get("streamtype") {
            Some("error") => &mut gathered.error,
            Some("stdin") if wanted.stdin => &mut gathered.stdin,
            Some("stdout") if wanted.stdout => &mut gathered.stdout,
            Some("stderr") if wanted.stderr => &mut gathered.stderr,
            Some("resize") if resizes => &mut gathered.resize,
            // Dropping it refuses it.
            _ => continue,
        };
        if slot.is_none() {
            *slot = incoming.accept();
        }
    }
}

/// The sizes that a resize stream tells, until it ends.
fn sizes(stream: Option<Stream>) -> mpsc::Receiver<TermSize> {
    let (sender, receiver) = mpsc::channel(8);
    if let Some(stream) = stream {
        tokio::spawn(async move {
            let mut stream = stream.finishing();
            let mut pending = BytesMut::with_capacity(256);
            while matches!(stream.read_buf(&mut pending).await, Ok(1..)) {
                while let Some((size, length)) = first_size(&pending) {
                    pending.advance(length);
                    if sender.send(size).await.is_err() {
                        return;
                    }
                }
                if pending.len() > 4096 {
                    return;
                }
            }
        });
    }
    receiver
}

/// The first whole JSON value of `bytes`, and how long it is.
pub(super) fn first_size(bytes: &[u8]) -> Option<(TermSize, usize)> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Size {
        width: u16,
        height: u16,
    }
    let mut values = serde_json::Deserializer::from_slice(bytes).into_iter::<Size>();
    let size = values.next()?.ok()?;
    Some((TermSize { width: size.width, height: size.height }, values.byte_offset()))
}

/// Serves a session over a WebSocket.
pub async fn over_websocket(
    socket: axum::extract::ws::WebSocket,
    protocol: &str,
    wanted: Wanted,
    runtime: Arc<dyn Runtime>,
    target: Target,
    operation: Operation,
) {
    let (stdin, stdin_reader) = super::websocket::input();
    let (resize, mut resize_reader) = mpsc::channel(16);
    let inputs = [wanted.stdin.then_some(stdin), None, None, None, wanted.tty.then_some(resize)];
    let socket = Socket::start(socket, Encoding::of(protocol), inputs.into());
    let output = |channel: u8, on: bool| -> Option<Box<dyn AsyncWrite + Send + Unpin>> {
        on.then(|| Box::new(socket.writer(channel)) as _)
    };
    // An empty message tells the client that the session has begun.
    let first = if wanted.stdout {
        1
    } else if wanted.stderr {
        2
    } else {
        3
    };
    socket.open(first).await;
    let channels = Channels {
        streams: Streams {
            stdin: wanted.stdin.then(|| Box::new(stdin_reader) as _),
            stdout: output(1, wanted.stdout),
            stderr: output(2, wanted.stderr),
            resize: wanted.tty.then(|| {
                let (sender, receiver) = mpsc::channel(8);
                tokio::spawn(async move {
                    while let Some(message) = resize_reader.recv().await {
                        if let Some((size, _)) = first_size(&message)
                            && sender.send(size).await.is_err()
                        {
                            return;
                        }
                    }
                });
                receiver
            }),
        },
        error: Box::new(socket.writer(3)),
        form: ErrorForm::of(protocol),
    };
    let closed = socket.closed();
    tokio::select! {
        () = run(&*runtime, &target, operation, channels) => {}
        () = closed => tracing::debug!(%target, "the client of a session went away"),
    }
    socket.finish(GRACE).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_has_no_stderr_and_nothing_is_too_little() {
        let all = [("input", "1"), ("output", "1"), ("error", "1"), ("tty", "1")];
        let wanted = Wanted::from_query(all).unwrap();
        assert_eq!(wanted, Wanted { stdin: true, stdout: true, stderr: false, tty: true });
        assert!(Wanted::from_query([("tty", "1"), ("error", "1")]).is_err());
        assert!(Wanted::from_query([("input", "0")]).is_err());
    }

    #[test]
    fn the_end_is_told_as_the_version_wants_it() {
        let target = Target {
            pod: crate::server::PodRef { namespace: "n".into(), name: "p".into(), uid: None },
            container: "c".into(),
        };
        let failed = || Err(RuntimeError::NotRunning { target: target.clone(), why: "it has ended".into() });
        let results = [Ok(Exit::Code(0)), Ok(Exit::Code(3)), Ok(Exit::Signal("KILL".into())), failed()];
        let text = |form: ErrorForm| {
            let all = results.iter().map(|result| form.render("executing command in", result));
            all.map(|bytes| String::from_utf8(bytes).unwrap()).collect::<Vec<_>>().join("\n")
        };
        assert_eq!(
            text(ErrorForm::of("v5.channel.k8s.io")),
            concat!(
                r#"{"metadata":{},"status":"Success"}"#,
                "\n",
                r#"{"details":{"causes":[{"message":"3","reason":"ExitCode"}]},"message":"command terminated with non-zero exit code: exit code 3","metadata":{},"reason":"NonZeroExitCode","status":"Failure"}"#,
                "\n",
                r#"{"details":{"causes":[{"message":"137","reason":"ExitCode"}]},"message":"command terminated with non-zero exit code: exit code 137","metadata":{},"reason":"NonZeroExitCode","status":"Failure"}"#,
                "\n",
                r#"{"code":500,"details":{"causes":[{"message":"error executing command in container: container n/p (container c) is not running: it has ended"}]},"message":"Internal error occurred: error executing command in container: container n/p (container c) is not running: it has ended","metadata":{},"reason":"InternalError","status":"Failure"}"#,
            )
        );
        assert_eq!(
            text(ErrorForm::of("v2.channel.k8s.io")),
            "\ncommand terminated with non-zero exit code: exit code 3\n\
             command terminated with non-zero exit code: exit code 137\n\
             error executing command in container: container n/p (container c) is not running: it has ended"
        );
        assert_eq!(ErrorForm::of("v4.base64.channel.k8s.io"), ErrorForm::Status);
    }

    #[test]
    fn sizes_are_read_one_by_one() {
        let two = br#"{"Width":80,"Height":24}
            {"Width":1,"Height":2}{"Wid"#;
        let (first, length) = first_size(two).unwrap();
        assert_eq!(first, TermSize { width: 80, height: 24 });
        let (second, rest) = first_size(&two[length..]).unwrap();
        assert_eq!(second, TermSize { width: 1, height: 2 });
        assert_eq!(first_size(&two[length + rest..]), None);
        assert_eq!(first_size(br#"{"Width":-1,"Height":70000}"#), None);
    }
}
