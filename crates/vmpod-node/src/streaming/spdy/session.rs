//! One connection: a task that reads frames, one that writes them, and what they share.

use std::{
    collections::{HashMap, VecDeque},
    future::poll_fn,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Poll, Waker},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader, ReadHalf, WriteHalf},
    sync::{mpsc, watch},
    task::JoinSet,
    time::Instant,
};

use super::{
    Headers, Stream,
    frame::{self, Control, Head, INITIAL_WINDOW_SIZE, Reset},
    headers,
};

/// A window before any SETTINGS: both of a stream's, and both of the connection's.
const WINDOW: i64 = 64 * 1024;
/// Consumed bytes that are worth a `WINDOW_UPDATE`.
const UPDATE: u32 = 32 * 1024;
/// Frames waiting to be sent beyond which streams wait. The reader waits at twice this.
const OUT: usize = 256 * 1024;
/// Largest data frame that is sent.
const FRAME: usize = 16 * 1024;

/// What a peer may use up.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Streams open at once.
    pub streams: usize,
    /// Received bytes of one stream that wait for their reader.
    pub stream_buffer: usize,
    /// Received bytes of all streams together.
    pub buffer: usize,
    /// Time without a frame after which the connection is closed.
    pub idle: Duration,
}

impl Default for Limits {
    /// The kubelet's idle time; room for a busy port-forward.
    fn default() -> Self {
        Self { streams: 512, stream_buffer: 128 * 1024, buffer: 16 * 1024 * 1024, idle: Duration::from_hours(4) }
    }
}

/// A connection. Dropping it cuts the connection off; [`finish`](Self::finish) ends it in order.
#[derive(Debug)]
pub struct Session {
    shared: Arc<Shared>,
    incoming: mpsc::UnboundedReceiver<Incoming>,
    closed: watch::Receiver<bool>,
    tasks: JoinSet<()>,
}

impl Session {
    /// Takes over an upgraded connection.
    pub fn start(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, limits: Limits) -> Self {
        let shared = Arc::new(Shared { state: Mutex::new(State::new()), limits });
        let (read, write) = tokio::io::split(io);
        let (accepted, incoming) = mpsc::unbounded_channel();
        let (closing, closed) = watch::channel(false);
        let mut tasks = JoinSet::new();
        let writer = shared.clone();
        tasks.spawn(async move {
            if let Err(error) = write_frames(&writer, write).await {
                tracing::debug!(%error, "could not send on a SPDY connection");
                writer.lock().close();
            }
        });
        let reader = shared.clone();
        tasks.spawn(async move {
            let work = read_frames(&reader, read, &accepted);
            let ended = tokio::select! {
                ended = work => ended,
                () = idle(&reader) => Err(io::Error::from(io::ErrorKind::TimedOut)),
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a SPDY connection broke off");
            }
            reader.lock().close();
            closing.send_replace(true);
        });
        Self { shared, incoming, closed, tasks }
    }

    /// The next stream that the peer opens; `None` when the connection is closed.
    pub async fn accept(&mut self) -> Option<Incoming> {
        self.incoming.recv().await
    }

    /// Completes when the peer has closed the connection, or it broke.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut closed = self.closed.clone();
        async move {
            closed.wait_for(|closed| *closed).await.ok();
        }
    }

    /// Says goodbye, sends what is waiting, and gives the peer `grace` to take it and close.
    pub async fn finish(mut self, grace: Duration) {
        {
            let mut state = self.shared.lock();
            let last = state.last;
            state.send(Control::GoAway { last, status: 0 }.encode());
            state.finishing = true;
            state.discard_all();
        }
        // Both tasks end by themselves: the writer when all is sent, the reader when the peer closes. Closing with
        // unread bytes would make the kernel throw away what the peer has not read yet.
        let both = async { while self.tasks.join_next().await.is_some() {} };
        tokio::time::timeout(grace, both).await.ok();
    }
}

/// A stream that the peer opened and that was not answered yet. Dropping it refuses it.
#[derive(Debug)]
pub struct Incoming {
    headers: Headers,
    stream: Option<Stream>,
}

impl Incoming {
    /// What the peer says about the stream.
    #[must_use]
    pub fn headers(&self) -> &Headers {
        &self.headers
    }

    /// The stream's number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.stream.as_ref().map_or(0, Stream::id)
    }

    /// Answers that the stream is welcome. The peer drops data that comes before this.
    #[must_use]
    pub fn accept(mut self) -> Option<Stream> {
        let stream = self.stream.take()?;
        let mut reply = Headers::default();
        // The draft demands these two; Kubernetes' clients don't care.
        reply.push(":status", "200");
        reply.push(":version", "HTTP/1.1");
        let mut state = stream.shared().lock();
        match state.headers.write(&reply) {
            Ok(block) => {
                state.send(Control::SynReply { stream: stream.id(), fin: false, block }.encode());
            }
            Err(_) => state.close(),
        }
        drop(state);
        Some(stream)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(stream) = self.stream.take() {
            stream.shared().lock().reset(stream.id(), Reset::Refused);
        }
    }
}

/// What the tasks and the streams share.
pub(super) struct Shared {
    state: Mutex<State>,
    limits: Limits,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Shared {
    /// A panic elsewhere must not take the other streams along.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One stream's ends.
pub(super) struct Entry {
    received: VecDeque<Bytes>,
    buffered: usize,
    /// Bytes consumed and not yet told to the peer.
    consumed: u32,
    fin_received: bool,
    fin_sent: bool,
    /// Nobody reads any more: what comes is counted and thrown away.
    deaf: bool,
    window: i64,
    read_waker: Option<Waker>,
    write_waker: Option<Waker>,
}

impl Entry {
    fn new(window: i64, fin_received: bool) -> Self {
        Self {
            received: VecDeque::new(),
            buffered: 0,
            consumed: 0,
            fin_received,
            fin_sent: false,
            deaf: false,
            window,
            read_waker: None,
            write_waker: None,
        }
    }

    fn wake(&mut self) {
        for waker in [self.read_waker.take(), self.write_waker.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}

/// The connection's state.
pub(super) struct State {
    streams: HashMap<u32, Entry>,
    /// The highest stream number seen.
    last: u32,
    headers: headers::Writer,
    out: VecDeque<Bytes>,
    out_bytes: usize,
    writer_waker: Option<Waker>,
    reader_waker: Option<Waker>,
    /// Received bytes that wait, over all streams.
    buffered: usize,
    /// Bytes consumed and not yet told to the peer, over all streams.
    consumed: u32,
    /// Whether the peer has shown that its windows mean something.
    windows: bool,
    window: i64,
    initial_window: i64,
    active: Instant,
    finishing: bool,
    closed: bool,
}

impl State {
    fn new() -> Self {
        Self {
            streams: HashMap::new(),
            last: 0,
            headers: headers::Writer::new(),
            out: VecDeque::new(),
            out_bytes: 0,
            writer_waker: None,
            reader_waker: None,
            buffered: 0,
            consumed: 0,
            windows: false,
            window: WINDOW,
            initial_window: WINDOW,
            active: Instant::now(),
            finishing: false,
            closed: false,
        }
    }

    fn send(&mut self, frame: Bytes) {
        if self.closed {
            return;
        }
        self.out_bytes += frame.len();
        self.out.push_back(frame);
        if let Some(waker) = self.writer_waker.take() {
            waker.wake();
        }
    }

    fn close(&mut self) {
        self.closed = true;
        self.streams.values_mut().for_each(Entry::wake);
        for waker in [self.writer_waker.take(), self.reader_waker.take()].into_iter().flatten() {
            waker.wake();
        }
    }

    /// Ends a stream at once and tells the peer.
    fn reset(&mut self, id: u32, status: Reset) {
        if self.remove(id) {
            self.send(Control::RstStream { stream: id, status: status as u32 }.encode());
        }
    }

    fn remove(&mut self, id: u32) -> bool {
        let Some(mut entry) = self.streams.remove(&id) else { return false };
        let waiting = entry.buffered;
        entry.wake();
        self.forget(waiting);
        true
    }

    /// Buffered bytes are gone: there is room, and the peer may send as many again.
    fn forget(&mut self, bytes: usize) {
        self.buffered = self.buffered.saturating_sub(bytes);
        self.consumed = self.consumed.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if self.consumed >= UPDATE {
            let delta = std::mem::take(&mut self.consumed);
            self.send(Control::WindowUpdate { stream: 0, delta }.encode());
        }
        if let Some(waker) = self.reader_waker.take() {
            waker.wake();
        }
    }

    /// The stream's reader took (or nobody wants) so many bytes.
    fn consume(&mut self, id: u32, bytes: usize) {
        if let Some(entry) = self.streams.get_mut(&id) {
            entry.buffered = entry.buffered.saturating_sub(bytes);
            entry.consumed = entry.consumed.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
            if entry.consumed >= UPDATE && !entry.fin_received {
                let delta = std::mem::take(&mut entry.consumed);
                self.send(Control::WindowUpdate { stream: id, delta }.encode());
            }
        }
        self.forget(bytes);
    }

    fn discard(&mut self, id: u32) {
        let Some(entry) = self.streams.get_mut(&id) else { return };
        entry.deaf = true;
        entry.received.clear();
        let waiting = entry.buffered;
        self.consume(id, waiting);
    }

    fn discard_all(&mut self) {
        let ids: Vec<_> = self.streams.keys().copied().collect();
        for id in ids {
            self.discard(id);
        }
        // The writer may have nothing left to send.
        if let Some(waker) = self.writer_waker.take() {
            waker.wake();
        }
    }

    fn close_if_done(&mut self, id: u32) {
        if self.streams.get(&id).is_some_and(|entry| entry.deaf && entry.fin_sent && entry.fin_received) {
            self.remove(id);
        }
    }

    /// The stream's last user is gone.
    pub(super) fn abandon(&mut self, id: u32) {
        match self.streams.get(&id) {
            Some(entry) if entry.fin_sent => {
                self.discard(id);
                self.close_if_done(id);
            }
            Some(_) => self.reset(id, Reset::Cancel),
            None => {}
        }
    }

    pub(super) fn poll_read(&mut self, id: u32, most: usize, waker: &Waker) -> Poll<io::Result<Bytes>> {
        let closed = self.closed;
        let Some(entry) = self.streams.get_mut(&id) else {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        };
        if let Some(mut bytes) = entry.received.pop_front() {
            let taken = bytes.split_to(most.min(bytes.len()));
            if !bytes.is_empty() {
                entry.received.push_front(bytes);
            }
            self.consume(id, taken.len());
            return Poll::Ready(Ok(taken));
        }
        if entry.fin_received {
            return Poll::Ready(Ok(Bytes::new()));
        }
        if closed {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        entry.read_waker = Some(waker.clone());
        Poll::Pending
    }

    pub(super) fn poll_write(&mut self, id: u32, bytes: &[u8], waker: &Waker) -> Poll<io::Result<usize>> {
        let full = self.out_bytes >= OUT;
        let (windows, window) = (self.windows, self.window);
        let usable = !self.closed && !self.finishing;
        let Some(entry) = self.streams.get_mut(&id).filter(|entry| usable && !entry.fin_sent) else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        let mut size = bytes.len().min(FRAME);
        if size == 0 {
            return Poll::Ready(Ok(0));
        }
        if windows {
            size = size.min(usize::try_from(window.min(entry.window)).unwrap_or(0));
        }
        if full || size == 0 {
            entry.write_waker = Some(waker.clone());
            return Poll::Pending;
        }
        let length = i64::try_from(size).unwrap_or(0);
        entry.window -= length;
        self.window -= length;
        self.send(frame::data(id, false, &bytes[..size]));
        Poll::Ready(Ok(size))
    }

    pub(super) fn shutdown(&mut self, id: u32) {
        if let Some(entry) = self.streams.get_mut(&id)
            && !std::mem::replace(&mut entry.fin_sent, true)
        {
            self.send(frame::data(id, true, &[]));
            self.close_if_done(id);
        }
    }

    fn wake_writers(&mut self) {
        for entry in self.streams.values_mut() {
            if let Some(waker) = entry.write_waker.take() {
                waker.wake();
            }
        }
    }

    /// The peer has ended its half of a stream.
    fn fin(&mut self, id: u32) {
        if let Some(entry) = self.streams.get_mut(&id) {
            entry.fin_received = true;
            if let Some(waker) = entry.read_waker.take() {
                waker.wake();
            }
            self.close_if_done(id);
        }
    }

    fn settings(&mut self, settings: &[(u32, u32)]) {
        for (id, value) in settings {
            if *id == INITIAL_WINDOW_SIZE {
                let delta = i64::from(*value) - self.initial_window;
                self.initial_window += delta;
                self.windows = true;
                for entry in self.streams.values_mut() {
                    entry.window += delta;
                }
                self.wake_writers();
            }
        }
    }

    fn window_update(&mut self, id: u32, delta: u32) {
        self.windows = true;
        if id == 0 {
            self.window = self.window.saturating_add(delta.into());
            self.wake_writers();
        } else if let Some(entry) = self.streams.get_mut(&id) {
            entry.window = entry.window.saturating_add(delta.into());
            if let Some(waker) = entry.write_waker.take() {
                waker.wake();
            }
        }
    }
}

/// Completes when no frame went either way for the idle time.
async fn idle(shared: &Shared) {
    loop {
        let until = shared.lock().active + shared.limits.idle;
        if until <= Instant::now() {
            return;
        }
        tokio::time::sleep_until(until).await;
    }
}

/// Sends what is queued until the session is finished or closed.
async fn write_frames<W: AsyncWrite>(shared: &Shared, mut io: WriteHalf<W>) -> io::Result<()> {
    let mut batch = Vec::new();
    loop {
        let more = poll_fn(|context| {
            let mut state = shared.lock();
            if !state.out.is_empty() {
                batch.extend(state.out.drain(..));
                return Poll::Ready(true);
            }
            if state.closed || state.finishing {
                return Poll::Ready(false);
            }
            state.writer_waker = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
        if !more {
            return io.shutdown().await;
        }
        for frame in batch.drain(..) {
            io.write_all(&frame).await?;
            let mut state = shared.lock();
            state.active = Instant::now();
            state.out_bytes -= frame.len();
            if state.out_bytes < OUT {
                state.wake_writers();
            }
            if let Some(waker) = state.reader_waker.take() {
                waker.wake();
            }
        }
        io.flush().await?;
    }
}

/// Waits until the state allows to go on reading; false when the connection is closed.
async fn room(shared: &Shared, enough: impl Fn(&State) -> bool) -> bool {
    poll_fn(|context| {
        let mut state = shared.lock();
        if state.closed {
            return Poll::Ready(false);
        }
        if enough(&state) {
            return Poll::Ready(true);
        }
        state.reader_waker = Some(context.waker().clone());
        Poll::Pending
    })
    .await
}

/// Reads frames until the peer closes, or breaks the protocol.
async fn read_frames<R: AsyncRead>(
    shared: &Arc<Shared>,
    io: ReadHalf<R>,
    accepted: &mpsc::UnboundedSender<Incoming>,
) -> io::Result<()> {
    let mut io = BufReader::with_capacity(FRAME, io);
    let mut blocks = headers::Reader::new();
    // Answers to a peer that sends and doesn't read must not pile up.
    while room(shared, |state| state.out_bytes < 2 * OUT).await {
        let mut head = [0; frame::HEAD];
        match io.read_exact(&mut head).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        };
        shared.lock().active = Instant::now();
        let handled = match Head::parse(head) {
            Ok(Head::Data { stream, fin, length }) => {
                receive(shared, &mut io, stream, length).await?;
                if fin {
                    shared.lock().fin(stream);
                }
                Ok(())
            }
            Ok(Head::Control { kind, flags, length }) => {
                let mut body = BytesMut::zeroed(usize::try_from(length).unwrap_or(0));
                io.read_exact(&mut body).await?;
                match Control::parse(kind, flags, body.freeze()) {
                    Ok(control) => handle(shared, control, &mut blocks, accepted).map_err(io::Error::other),
                    Err(error) => Err(io::Error::other(error)),
                }
            }
            Err(error) => Err(io::Error::other(error)),
        };
        if let Err(error) = handled {
            let mut state = shared.lock();
            let last = state.last;
            state.send(Control::GoAway { last, status: 1 }.encode());
            state.finishing = true;
            return Err(error);
        }
    }
    Ok(())
}

/// Takes the payload of a data frame into the stream's buffer, piece by piece as there is room.
async fn receive(shared: &Shared, io: &mut (impl AsyncRead + Unpin), stream: u32, length: u32) -> io::Result<()> {
    let mut left = usize::try_from(length).unwrap_or(0);
    {
        let mut state = shared.lock();
        let wanted = state.streams.get(&stream).map(|entry| !entry.fin_received);
        match wanted {
            Some(false) => state.reset(stream, Reset::Protocol),
            // A stream that was reset meanwhile gets no answer; one that never was gets one.
            None if stream > state.last => {
                let status = Reset::InvalidStream as u32;
                state.send(Control::RstStream { stream, status }.encode());
            }
            Some(true) | None => {}
        }
    }
    while left > 0 {
        let limits = shared.limits;
        let open = room(shared, |state| {
            state.streams.get(&stream).is_none_or(|entry| {
                entry.deaf || (entry.buffered < limits.stream_buffer && state.buffered < limits.buffer)
            })
        })
        .await;
        if !open {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let mut piece = BytesMut::zeroed(left.min(FRAME));
        let read = io.read(&mut piece).await?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left -= read;
        piece.truncate(read);
        let mut state = shared.lock();
        state.active = Instant::now();
        state.buffered += read;
        match state.streams.get_mut(&stream) {
            Some(entry) if !entry.deaf => {
                entry.buffered += read;
                entry.received.push_back(piece.freeze());
                if let Some(waker) = entry.read_waker.take() {
                    waker.wake();
                }
            }
            _ => state.consume(stream, read),
        }
    }
    Ok(())
}

fn handle(
    shared: &Arc<Shared>,
    control: Control,
    blocks: &mut headers::Reader,
    accepted: &mpsc::UnboundedSender<Incoming>,
) -> Result<(), headers::BlockError> {
    match control {
        Control::SynStream { stream, fin, block, .. } => {
            // Read even when refused: later blocks build on it.
            let headers = blocks.read(&block)?;
            let mut state = shared.lock();
            let reset = |status: Reset| Control::RstStream { stream, status: status as u32 }.encode();
            if stream % 2 == 0 || stream <= state.last {
                state.send(reset(Reset::Protocol));
                return Ok(());
            }
            state.last = stream;
            if state.finishing || state.streams.len() >= shared.limits.streams {
                state.send(reset(Reset::Refused));
                return Ok(());
            }
            let entry = Entry::new(state.initial_window, fin);
            state.streams.insert(stream, entry);
            drop(state);
            let stream = Stream::new(shared.clone(), stream);
            // When nobody accepts any more, dropping it refuses it.
            accepted.send(Incoming { headers, stream: Some(stream) }).ok();
        }
        Control::SynReply { fin, stream, block } | Control::Headers { fin, stream, block } => {
            blocks.read(&block)?;
            if fin {
                shared.lock().fin(stream);
            }
        }
        Control::RstStream { stream, .. } => {
            shared.lock().remove(stream);
        }
        Control::Settings(settings) => shared.lock().settings(&settings),
        // The peer's own pings have odd numbers.
        Control::Ping(id) if id % 2 == 1 => shared.lock().send(Control::Ping(id).encode()),
        Control::WindowUpdate { stream, delta } => shared.lock().window_update(stream, delta),
        Control::Ping(_) | Control::GoAway { .. } | Control::Unknown(_) => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests;
