//! A stream as something to read from and write to.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::session::Shared;

/// One stream of a connection.
///
/// Reading ends with zero bytes when the peer ended its half, and fails when it reset the stream. Shutting down ends
/// our half. Dropping a stream that was not shut down resets it; after a shutdown, what the peer still sends is
/// thrown away.
#[derive(Debug)]
pub struct Stream {
    shared: Arc<Shared>,
    id: u32,
    /// End our half when dropped, instead of resetting the stream.
    gentle: bool,
}

impl Stream {
    pub(super) fn new(shared: Arc<Shared>, id: u32) -> Self {
        Self { shared, id, gentle: false }
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// The stream's number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Makes a drop end our half in order, as for an output whose writer just goes away.
    #[must_use]
    pub fn finishing(mut self) -> Self {
        self.gentle = true;
        self
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if self.gentle {
            state.shutdown(self.id);
        }
        state.abandon(self.id);
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let bytes = ready!(self.shared.lock().poll_read(self.id, buffer.remaining(), context.waker()))?;
        buffer.put_slice(&bytes);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.shared.lock().poll_write(self.id, bytes, context.waker())
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.lock().shutdown(self.id);
        Poll::Ready(Ok(()))
    }
}
