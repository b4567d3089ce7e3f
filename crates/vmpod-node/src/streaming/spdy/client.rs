//! A client, for tests: it does what it is told, sense or nonsense.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::{
    Headers,
    frame::{self, Control, Head},
    headers,
};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Reply(u32),
    Data(u32, Bytes, bool),
    Reset(u32, u32),
    Window(u32, u32),
    Ping(u32),
    GoAway(u32),
    Other,
}

pub(crate) struct Client<T> {
    pub(crate) io: T,
    reader: headers::Reader,
    writer: headers::Writer,
    next: u32,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Client<T> {
    pub(crate) fn new(io: T) -> Self {
        Self { io, reader: headers::Reader::new(), writer: headers::Writer::new(), next: 1 }
    }

    pub(crate) async fn open(&mut self, pairs: &[(&str, &str)]) -> u32 {
        let stream = self.next;
        self.next += 2;
        let mut headers = Headers::default();
        for (name, value) in pairs {
            headers.push(name, value);
        }
        let block = self.writer.write(&headers).unwrap();
        let (associated, priority, fin, unidirectional) = (0, 0, false, false);
        self.control(&Control::SynStream { stream, associated, priority, fin, unidirectional, block }).await;
        stream
    }

    pub(crate) async fn ping(&mut self, id: u32) {
        self.control(&Control::Ping(id)).await;
    }

    pub(super) async fn control(&mut self, control: &Control) {
        self.io.write_all(&control.encode()).await.unwrap();
        self.io.flush().await.unwrap();
    }

    pub(crate) async fn data(&mut self, stream: u32, bytes: &[u8], fin: bool) {
        self.io.write_all(&frame::data(stream, fin, bytes)).await.unwrap();
        self.io.flush().await.unwrap();
    }

    /// The next frame; `None` at the end of the connection.
    pub(crate) async fn event(&mut self) -> Option<Event> {
        let mut head = [0; frame::HEAD];
        self.io.read_exact(&mut head).await.ok()?;
        match Head::parse(head).unwrap() {
            Head::Data { stream, fin, length } => {
                let mut body = BytesMut::zeroed(length as usize);
                self.io.read_exact(&mut body).await.unwrap();
                Some(Event::Data(stream, body.freeze(), fin))
            }
            Head::Control { kind, flags, length } => {
                let mut body = BytesMut::zeroed(length as usize);
                self.io.read_exact(&mut body).await.unwrap();
                Some(match Control::parse(kind, flags, body.freeze()).unwrap() {
                    Control::SynReply { stream, block, .. } => {
                        assert_eq!(self.reader.read(&block).unwrap().get(":status"), Some("200"));
                        Event::Reply(stream)
                    }
                    Control::RstStream { stream, status } => Event::Reset(stream, status),
                    Control::WindowUpdate { stream, delta } => Event::Window(stream, delta),
                    Control::Ping(id) => Event::Ping(id),
                    Control::GoAway { status, .. } => Event::GoAway(status),
                    _ => Event::Other,
                })
            }
        }
    }

    /// What every stream carried until the connection ended.
    pub(crate) async fn collect(&mut self) -> BTreeMap<u32, Vec<u8>> {
        let mut streams: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
        while let Some(event) = self.event().await {
            if let Event::Data(stream, bytes, _) = event {
                streams.entry(stream).or_default().extend_from_slice(&bytes);
            }
        }
        streams
    }
}
