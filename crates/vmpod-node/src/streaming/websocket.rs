//! Kubernetes' channels over a WebSocket: every message begins with the number of its channel.
//!
//! In the binary form that is a byte; in the base64 form messages are text, a digit and then base64. In version 5 the
//! message `255, n` closes channel n. A WebSocket can also carry plain bytes: [`tunnel`].

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::extract::ws::{CloseFrame, Message, WebSocket};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures::{Sink, SinkExt as _, StreamExt as _, stream::SplitSink, stream::SplitStream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{mpsc, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{
    io::StreamReader,
    sync::{PollSendError, PollSender},
};

use super::IDLE;

/// The largest message that is accepted.
pub const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// The channel number that closes another, in version 5.
const CLOSE: u8 = 255;

/// Largest payload of a message that is sent.
const CHUNK: usize = 32 * 1024;

/// How bytes become messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Binary messages; `true` when channels can be closed.
    Binary(bool),
    /// Text messages in base64.
    Base64,
}

impl Encoding {
    /// That of a protocol.
    #[must_use]
    pub fn of(protocol: &str) -> Self {
        if protocol.contains("base64") { Self::Base64 } else { Self::Binary(protocol.starts_with("v5.")) }
    }

    fn encode(self, channel: u8, bytes: &[u8]) -> Message {
        if self == Self::Base64 {
            let mut text = String::with_capacity(1 + bytes.len().div_ceil(3) * 4);
            text.push(char::from(b'0' + channel % 10));
            BASE64.encode_string(bytes, &mut text);
            return Message::Text(text.into());
        }
        let mut message = BytesMut::with_capacity(1 + bytes.len());
        message.put_u8(channel);
        message.put_slice(bytes);
        Message::Binary(message.freeze())
    }

    /// The channel and the bytes of a message; `None` for one that makes no sense.
    fn decode(self, message: &Message) -> Option<Incoming> {
        let bytes = match message {
            Message::Binary(bytes) => bytes.clone(),
            Message::Text(text) => Bytes::copy_from_slice(text.as_bytes()),
            _ => return None,
        };
        let (channel, rest) = bytes.split_first()?;
        match self {
            Self::Binary(true) if *channel == CLOSE => Some(Incoming::Close(*rest.first()?)),
            Self::Binary(_) => Some(Incoming::Bytes(*channel, bytes.slice(1..))),
            Self::Base64 => {
                let channel = channel.checked_sub(b'0').filter(|channel| *channel < 10)?;
                Some(Incoming::Bytes(channel, BASE64.decode(rest).ok()?.into()))
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Incoming {
    Bytes(u8, Bytes),
    Close(u8),
}

/// The sending end of an input channel.
pub type Input = mpsc::Sender<Bytes>;

/// The two ends of a channel from the client: for [`Socket::start`], and to read from. It holds a few messages; when it is
/// full, the connection is not read.
#[must_use]
pub fn input() -> (Input, impl AsyncRead + Send + Unpin) {
    let (sender, receiver) = mpsc::channel(8);
    (sender, StreamReader::new(ReceiverStream::new(receiver).map(Ok::<_, io::Error>)))
}

/// A WebSocket as channels. Dropping it cuts the connection off; [`finish`](Self::finish) ends it in order.
#[derive(Debug)]
pub struct Socket {
    encoding: Encoding,
    out: mpsc::Sender<Message>,
    closed: watch::Receiver<bool>,
    finishing: Arc<watch::Sender<bool>>,
    tasks: JoinSet<()>,
}

impl Socket {
    /// Takes over a WebSocket. `inputs[n]` gets what the client sends on channel n.
    pub fn start(socket: WebSocket, encoding: Encoding, inputs: Vec<Option<Input>>) -> Self {
        let (sink, stream) = socket.split();
        let (out, messages) = mpsc::channel(8);
        let (closing, closed) = watch::channel(false);
        let finishing = Arc::new(watch::Sender::new(false));
        let active = Arc::new(watch::Sender::new(Instant::now()));
        let mut tasks = JoinSet::new();
        tasks.spawn(write(sink, messages, active.clone()));
        let finished = finishing.subscribe();
        tasks.spawn(async move {
            tokio::select! {
                () = read(stream, encoding, inputs, &active, finished) => {}
                () = idle(&active) => tracing::debug!("a WebSocket was idle for too long"),
            }
            closing.send_replace(true);
        });
        Self { encoding, out, closed, finishing, tasks }
    }

    /// What is written to it goes to the client on `channel`.
    #[must_use]
    pub fn writer(&self, channel: u8) -> impl AsyncWrite + Send + Unpin + use<> {
        Writer { channel, encoding: self.encoding, out: PollSender::new(self.out.clone()) }
    }

    /// Sends an empty message on `channel`.
    pub async fn open(&self, channel: u8) {
        // A closed connection shows elsewhere.
        self.out.send(self.encoding.encode(channel, &[])).await.ok();
    }

    /// Completes when the client has closed the connection, or it broke.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut closed = self.closed.clone();
        async move {
            closed.wait_for(|closed| *closed).await.ok();
        }
    }

    /// Closes after everything written was sent, and gives the client `grace` to take it.
    pub async fn finish(mut self, grace: Duration) {
        self.finishing.send_replace(true);
        let close = Message::Close(Some(CloseFrame { code: 1000, reason: "".into() }));
        let both = async {
            self.out.send(close).await.ok();
            while self.tasks.join_next().await.is_some() {}
        };
        tokio::time::timeout(grace, both).await.ok();
    }
}

async fn idle(active: &watch::Sender<Instant>) {
    loop {
        let until = *active.borrow() + IDLE;
        if until <= Instant::now() {
            return;
        }
        tokio::time::sleep_until(until).await;
    }
}

async fn write(
    mut sink: SplitSink<WebSocket, Message>,
    mut messages: mpsc::Receiver<Message>,
    active: Arc<watch::Sender<Instant>>,
) {
    while let Some(message) = messages.recv().await {
        let last = matches!(message, Message::Close(_));
        if let Err(error) = sink.send(message).await {
            tracing::debug!(%error, "could not send on a WebSocket");
            return;
        }
        active.send_replace(Instant::now());
        if last {
            return;
        }
    }
}

async fn read(
    mut stream: SplitStream<WebSocket>,
    encoding: Encoding,
    mut inputs: Vec<Option<Input>>,
    active: &watch::Sender<Instant>,
    mut finished: watch::Receiver<bool>,
) {
    while let Some(Ok(message)) = stream.next().await {
        active.send_replace(Instant::now());
        match encoding.decode(&message) {
            Some(Incoming::Bytes(channel, bytes)) => {
                let input = inputs.get(usize::from(channel)).and_then(Option::as_ref);
                if let Some(input) = input
                    && !bytes.is_empty()
                {
                    // When nobody reads any more the bytes are dropped, also while waiting for room.
                    tokio::select! {
                        _taken = input.send(bytes) => {}
                        _finished = finished.wait_for(|finished| *finished) => {}
                    }
                }
            }
            Some(Incoming::Close(channel)) => {
                if let Some(input) = inputs.get_mut(usize::from(channel)) {
                    *input = None;
                }
            }
            None => {}
        }
    }
}

struct Writer {
    channel: u8,
    encoding: Encoding,
    out: PollSender<Message>,
}

fn broken<T>(_: PollSendError<T>) -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

impl AsyncWrite for Writer {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let chunk = &bytes[..bytes.len().min(CHUNK)];
        if !chunk.is_empty() {
            ready!(self.out.poll_reserve(context)).map_err(broken)?;
            let message = self.encoding.encode(self.channel, chunk);
            self.out.send_item(message).map_err(broken)?;
        }
        Poll::Ready(Ok(chunk.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.out.close();
        Poll::Ready(Ok(()))
    }
}

/// A WebSocket whose binary messages are slices of a byte stream.
pub fn tunnel(socket: WebSocket) -> impl AsyncRead + AsyncWrite + Send + Unpin {
    Tunnel { socket, rest: Bytes::new() }
}

struct Tunnel {
    socket: WebSocket,
    rest: Bytes,
}

impl AsyncRead for Tunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(self.socket.poll_next_unpin(context)) {
                Some(Ok(Message::Binary(bytes))) => self.rest = bytes,
                Some(Ok(Message::Close(_))) | None => return Poll::Ready(Ok(())),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
            }
        }
        let size = self.rest.len().min(buffer.remaining());
        buffer.put_slice(&self.rest.split_to(size));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut socket = Pin::new(&mut self.socket);
        ready!(socket.as_mut().poll_ready(context)).map_err(io::Error::other)?;
        let chunk = &bytes[..bytes.len().min(CHUNK)];
        socket.start_send(Message::Binary(Bytes::copy_from_slice(chunk))).map_err(io::Error::other)?;
        Poll::Ready(Ok(chunk.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context).map_err(io::Error::other)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_close(context).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn messages_come_back(channel in 0..9u8, bytes in proptest::collection::vec(any::<u8>(), 0..50)) {
            for protocol in ["v5.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io"] {
                let encoding = Encoding::of(protocol);
                let message = encoding.encode(channel, &bytes);
                let expected = Incoming::Bytes(channel, bytes.clone().into());
                prop_assert_eq!(encoding.decode(&message), Some(expected));
            }
        }

        #[test]
        fn any_message_is_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..20), text in "\\PC{0,9}") {
            for encoding in [Encoding::Binary(true), Encoding::Binary(false), Encoding::Base64] {
                let _decoded = encoding.decode(&Message::Binary(bytes.clone().into()));
                let _decoded = encoding.decode(&Message::Text(text.clone().into()));
            }
        }
    }

    #[test]
    fn only_version_5_closes_channels() {
        let close = Message::Binary(Bytes::from_static(&[255, 0]));
        assert_eq!(Encoding::of("v5.channel.k8s.io").decode(&close), Some(Incoming::Close(0)));
        let bytes = Incoming::Bytes(255, Bytes::from_static(&[0]));
        assert_eq!(Encoding::of("v4.channel.k8s.io").decode(&close), Some(bytes));
    }
}
