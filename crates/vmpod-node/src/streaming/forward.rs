//! Port-forwarding: any number of TCP connections to a pod's guest over one HTTP connection.
//!
//! Over SPDY (directly, or tunnelled through a WebSocket) every connection is a pair of streams, data and error, that
//! share a request id. Over a plain WebSocket the ports are fixed at the start: two channels each, both opening with
//! the port as two bytes, little end first. (Kubernetes: `k8s.io/kubelet/pkg/cri/streaming/portforward`.)

use std::{collections::HashMap, io, sync::Arc};

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::{
    GRACE, IDLE, STREAM_CREATION,
    spdy::{self, Incoming, Session, Stream},
    websocket::{self, Encoding, Socket},
};
use crate::server::{PodRef, Runtime};

/// The protocol over SPDY.
pub const SPDY_PROTOCOL: &str = "portforward.k8s.io";

/// The protocols over WebSocket, best first: what carries SPDY can open connections at any time.
pub const WEBSOCKET_PROTOCOLS: [&str; 3] = [TUNNEL_PROTOCOL, "v4.channel.k8s.io", "v4.base64.channel.k8s.io"];

/// SPDY inside a WebSocket.
pub const TUNNEL_PROTOCOL: &str = "SPDY/3.1+portforward.k8s.io";

/// Most ports of one WebSocket: the channel is a byte (a digit in base64).
const MAX_PORTS: usize = 64;

/// Reads the ports that a plain WebSocket forwards: `port` or `ports`, repeated or separated by commas.
pub fn ports<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Vec<u16>, String> {
    let mut ports = Vec::new();
    for (name, value) in pairs {
        if matches!(name, "port" | "ports") {
            for port in value.split(',') {
                ports.push(parse_port(port)?);
            }
        }
    }
    match ports.len() {
        0 => Err("query parameter \"port\" is required".to_owned()),
        1..=MAX_PORTS => Ok(ports),
        _ => Err(format!("at most {MAX_PORTS} ports can be forwarded over one WebSocket")),
    }
}

fn parse_port(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(0) => Err(format!("port {text:?} must be > 0")),
        Ok(port) => Ok(port),
        Err(_) => Err(format!("unable to parse {text:?} as a port")),
    }
}

/// Serves a plain WebSocket.
pub async fn over_websocket(
    socket: axum::extract::ws::WebSocket,
    protocol: &str,
    ports: Vec<u16>,
    runtime: Arc<dyn Runtime>,
    pod: PodRef,
) {
    let mut inputs = Vec::new();
    let mut readers = Vec::new();
    for _ in &ports {
        let (input, reader) = websocket::input();
        inputs.extend([Some(input), None]);
        readers.push(reader);
    }
    let socket = Socket::start(socket, Encoding::of(protocol), inputs);
    let mut connections = JoinSet::new();
    for ((port, reader), channel) in ports.into_iter().zip(readers).zip((0..u8::MAX).step_by(2)) {
        let mut data = socket.writer(channel);
        let mut error = socket.writer(channel + 1);
        let (runtime, pod) = (runtime.clone(), pod.clone());
        connections.spawn(async move {
            let opening = async {
                data.write_all(&port.to_le_bytes()).await?;
                error.write_all(&port.to_le_bytes()).await
            };
            if opening.await.is_ok() {
                connect(&*runtime, &pod, port, tokio::io::join(reader, data), &mut error).await;
            }
        });
    }
    let closed = socket.closed();
    tokio::select! {
        () = async { while connections.join_next().await.is_some() {} } => {}
        () = closed => {}
    }
    connections.shutdown().await;
    socket.finish(GRACE).await;
}

/// Joins a client's stream and a port of the guest until both have ended.
async fn connect(
    runtime: &dyn Runtime,
    pod: &PodRef,
    port: u16,
    mut client: impl AsyncRead + AsyncWrite + Unpin,
    error: &mut (impl AsyncWrite + Unpin),
) {
    let outcome = match runtime.port_forward(pod, port).await {
        Ok(mut guest) => tokio::io::copy_bidirectional(&mut client, &mut guest).await.map(|_| ()),
        Err(refused) => Err(refused),
    };
    if let Err(cause) = outcome {
        tracing::debug!(%pod, port, %cause, "a forwarded connection failed");
        // A guest that cuts a connection off is its client's business: kubectl would end the whole session.
        if !matches!(cause.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) {
            let message = format!("error forwarding port {port} to pod {}: {cause}", pod.name);
            error.write_all(message.as_bytes()).await.ok();
        }
    }
    client.shutdown().await.ok();
    error.shutdown().await.ok();
}

/// A connection whose second stream has not come yet.
struct Half {
    deadline: Instant,
    stream: Stream,
    is_data: bool,
}

/// Serves an upgraded SPDY connection.
pub async fn over_spdy(
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    runtime: Arc<dyn Runtime>,
    pod: PodRef,
) {
    let mut session = Session::start(io, spdy::Limits { idle: IDLE, ..spdy::Limits::default() });
    let closed = session.closed();
    tokio::pin!(closed);
    let mut halves: HashMap<String, Half> = HashMap::new();
    let mut connections = JoinSet::new();
    loop {
        let next = halves.values().map(|half| half.deadline).min();
        let expired = async {
            match next {
                Some(deadline) => sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            incoming = session.accept() => {
                let Some(incoming) = incoming else { break };
                if let Some((port, data, error)) = pair(&mut halves, incoming) {
                    let (runtime, pod) = (runtime.clone(), pod.clone());
                    connections.spawn(async move {
                        let mut error = error.finishing();
                        connect(&*runtime, &pod, port, data.finishing(), &mut error).await;
                    });
                }
            }
            () = expired => {
                let now = Instant::now();
                // Dropping a half resets its stream.
                halves.retain(|_, half| half.deadline > now);
            }
            Some(_) = connections.join_next() => {}
            () = &mut closed => break,
        }
    }
    connections.shutdown().await;
    halves.clear();
    session.finish(GRACE).await;
}

/// Takes a stream; gives the port and both streams when it completes a pair. A stream that makes no sense is refused.
fn pair(halves: &mut HashMap<String, Half>, incoming: Incoming) -> Option<(u16, Stream, Stream)> {
    let headers = incoming.headers();
    let port = parse_port(headers.get("port")?).ok()?;
    let is_data = match headers.get("streamtype")? {
        "data" => true,
        "error" => false,
        _ => return None,
    };
    let request = match headers.get("requestid") {
        Some(id) if !id.is_empty() => id.to_owned(),
        // Clients before request ids opened the error stream first and the data stream right after it.
        _ => incoming.id().saturating_sub(if is_data { 2 } else { 0 }).to_string(),
    };
    match halves.remove(&request) {
        None => {
            let deadline = Instant::now() + STREAM_CREATION;
            let stream = incoming.accept()?;
            halves.insert(request, Half { deadline, stream, is_data });
            None
        }
        Some(half) if half.is_data == is_data => {
            halves.insert(request, half);
            None
        }
        Some(half) => {
            let stream = incoming.accept()?;
            let (data, error) = if is_data { (stream, half.stream) } else { (half.stream, stream) };
            Some((port, data, error))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_come_in_both_spellings() {
        assert_eq!(ports([("port", "80"), ("x", "1"), ("ports", "81,82")]), Ok(vec![80, 81, 82]));
        for bad in ["", "0", "65536", "-1", "http", "80,"] {
            assert!(ports([("port", bad)]).is_err(), "{bad:?}");
        }
        assert!(ports([]).is_err());
        assert!(ports((0..65).map(|_| ("port", "80"))).is_err());
    }
}
