//! Watches: a stream of JSON lines, one for each change.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::{Response, StatusCode};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;

use super::accept::Shape;
use super::list::{Selection, revision, too_old};
use super::{Call, encode, respond};
use crate::kinds::Resource;
use crate::server::{Server, storage_name};
use crate::status::{Cause, Status};
use crate::store::{Event, EventKind, Expired, Feed, Object};
use crate::table::{self, IncludeObject};

/// How often an idle watcher learns the revision, when it asked for bookmarks.
const BOOKMARK_EVERY: Duration = Duration::from_secs(50);
/// How long a watch lasts when the client doesn't say.
const DEFAULT_LIFE: Duration = Duration::from_mins(45);
/// How many pieces may wait for a slow connection before the feed's own queue fills.
const PIECES: usize = 8;
/// How long a client may leave a piece unread.
const PATIENCE: Duration = Duration::from_secs(30);
/// How many events are put into one piece.
const BATCH: usize = 256;

/// Turns events into what this watcher is to see.
struct Lens {
    resource: Arc<Resource>,
    selection: Selection,
    shape: Shape,
    include: IncludeObject,
    /// Whether a table's columns were sent.
    headed: bool,
}

impl Lens {
    fn line(&mut self, kind: &str, object: &Object) -> Bytes {
        match self.shape {
            Shape::Object if !respond::needs_view(&self.resource) => encode::event_line(kind, object.bytes()),
            _ => self.line_of(kind, &respond::view(&self.resource, object)),
        }
    }

    fn line_of(&mut self, kind: &str, value: &Value) -> Bytes {
        let shaped = match self.shape {
            Shape::Object => respond::serialise(value),
            Shape::Partial => respond::serialise(&table::partial(value)),
            Shape::Table => {
                let meta = json!({ "resourceVersion": value["metadata"]["resourceVersion"] });
                // The columns are told once.
                let headers = !std::mem::replace(&mut self.headed, true);
                respond::serialise(&table::render(
                    &self.resource,
                    &[value],
                    self.include,
                    jiff::Timestamp::now(),
                    meta,
                    headers,
                ))
            }
        };
        encode::event_line(kind, &shaped)
    }

    /// What a change looks like through the selectors: an object that begins to match is added,
    /// one that no longer does is deleted.
    fn event(&mut self, event: &Event) -> Option<Bytes> {
        let before = event.before.as_ref().is_some_and(|object| self.selection.matches(object));
        let now = event.kind == EventKind::Put && self.selection.matches(&event.object);
        match (before, now) {
            (false, false) => None,
            (false, true) => Some(self.line("ADDED", &event.object)),
            (true, true) => Some(self.line("MODIFIED", &event.object)),
            (true, false) if event.kind == EventKind::Delete => Some(self.line("DELETED", &event.object)),
            (true, false) => {
                // The last state that matched, at the revision of the change.
                let mut value = respond::view(&self.resource, event.before.as_ref()?);
                value["metadata"]["resourceVersion"] = event.revision.to_string().into();
                Some(self.line_of("DELETED", &value))
            }
        }
    }

    fn bookmark(&mut self, revision: u64, initial_end: bool) -> Bytes {
        let mut meta = json!({ "resourceVersion": revision.to_string() });
        if initial_end {
            meta["annotations"] = json!({ "k8s.io/initial-events-end": "true" });
        }
        if self.shape == Shape::Table {
            let table = json!({ "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": meta, "columnDefinitions": null, "rows": [] });
            return encode::event_line("BOOKMARK", &respond::serialise(&table));
        }
        self.line_of_type(
            "BOOKMARK",
            &json!({ "kind": self.resource.kind, "apiVersion": self.resource.api_version(), "metadata": meta }),
        )
    }

    fn line_of_type(&self, kind: &str, value: &Value) -> Bytes {
        let value = if self.shape == Shape::Partial { table::partial(value) } else { value.clone() };
        encode::event_line(kind, &respond::serialise(&value))
    }
}

struct Plan {
    lens: Lens,
    initial: Vec<Arc<Object>>,
    /// A bookmark at this revision ends the initial events.
    initial_end: Option<u64>,
    feed: Feed,
    bookmarks: bool,
    life: Duration,
}

/// `GET` of a collection with `watch=true`.
pub(super) fn start(call: &Call) -> Result<Response<Body>, Status> {
    let lens = Lens {
        resource: if call.shape()? == Shape::Table { call.resource.clone() } else { call.shown.clone() },
        selection: Selection::of(call)?,
        shape: call.shape()?,
        include: IncludeObject::parse(call.query.get("includeObject"))?,
        headed: false,
    };
    let plan = match plan(call, lens)? {
        Ok(plan) => plan,
        // The real server says so inside the stream.
        Err(expired) => {
            let line = encode::event_line("ERROR", &respond::serialise(&too_old(expired).to_value()));
            return Ok(respond::json_bytes(StatusCode::OK, line));
        }
    };
    let (pieces, body) = mpsc::channel(PIECES);
    tokio::spawn(run(call.server.clone(), plan, pieces));
    let mut response = respond::json_bytes(StatusCode::OK, Body::from_stream(ReceiverStream::new(body)));
    response.headers_mut().remove(http::header::CONTENT_LENGTH);
    Ok(response)
}

fn plan(call: &Call, lens: Lens) -> Result<Result<Plan, Expired>, Status> {
    let invalid = |field: &str, why: &str| {
        Status::invalid_kind("meta.k8s.io", "ListOptions", "", vec![Cause::forbidden(field, why)])
    };
    let store = &call.server.store;
    let storage = storage_name(&call.resource);
    let namespace = call.target.namespace.as_deref();
    let bookmarks = call.query.flag("allowWatchBookmarks")?;
    let send_initial = call.query.maybe_flag("sendInitialEvents")?;
    let matching = call.query.get("resourceVersionMatch");
    match (send_initial, matching) {
        (Some(_), Some("NotOlderThan")) | (None, None) => {}
        (Some(_), _) => {
            return Err(invalid(
                "resourceVersionMatch",
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            ));
        }
        (None, Some(_)) => {
            return Err(invalid(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            ));
        }
    }
    let asked = revision(call)?.unwrap_or_default();
    let seconds = call
        .query
        .number("timeoutSeconds")?
        .and_then(|seconds| u64::try_from(seconds).ok())
        .filter(|seconds| *seconds > 0);
    let life = seconds.map_or(DEFAULT_LIFE, Duration::from_secs).min(Duration::from_hours(24));
    let newest = store.revision();
    if asked > newest && (send_initial == Some(true) || asked == 0) {
        return Err(super::list::too_large(asked, newest));
    }
    // With a revision, continue from there; without one (or with 0), begin with all objects.
    let from_all = send_initial.unwrap_or(asked == 0);
    if !from_all {
        if asked > newest {
            return Ok(Err(Expired { asked, oldest: newest, newest }));
        }
        let from = if asked == 0 { newest } else { asked };
        return Ok(store.watch(Some(&storage), namespace, from).map(|feed| Plan {
            lens,
            initial: Vec::new(),
            initial_end: None,
            feed,
            bookmarks,
            life,
        }));
    }
    let (listed, feed) = store.list_and_watch(&storage, namespace);
    let initial_end = (send_initial == Some(true) && bookmarks).then_some(listed.revision);
    Ok(Ok(Plan { lens, initial: listed.objects, initial_end, feed, bookmarks, life }))
}

/// A piece of the stream; the error type is what a body wants.
type Piece = Result<Bytes, std::convert::Infallible>;

async fn run(server: Arc<Server>, plan: Plan, pieces: mpsc::Sender<Piece>) {
    let Plan { mut lens, initial, initial_end, mut feed, bookmarks, life } = plan;
    let end = Instant::now() + life;
    let mut piece = BytesMut::new();
    for object in initial {
        if lens.selection.matches(&object) {
            piece.extend_from_slice(&lens.line("ADDED", &object));
        }
        if piece.len() > 256 << 10 && !send(&pieces, &mut piece, end).await {
            return;
        }
    }
    for event in std::mem::take(&mut feed.past) {
        if let Some(line) = lens.event(&event) {
            piece.extend_from_slice(&line);
        }
        if piece.len() > 256 << 10 && !send(&pieces, &mut piece, end).await {
            return;
        }
    }
    if let Some(revision) = initial_end {
        piece.extend_from_slice(&lens.bookmark(revision, true));
    }
    // An empty piece lets the client see the headers at once.
    if !send(&pieces, &mut piece, end).await {
        return;
    }
    let mut tick = tokio::time::interval_at(Instant::now() + BOOKMARK_EVERY, BOOKMARK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut events = Vec::with_capacity(16);
    loop {
        tokio::select! {
            count = feed.events.recv_many(&mut events, BATCH) => {
                if count == 0 {
                    // The store cut this watcher off: it was too slow. Its client watches again from where it is.
                    return;
                }
            }
            _ = tick.tick(), if bookmarks => {
                // All events up to this revision are in the queue before the revision is visible.
                let revision = server.store.revision();
                let cut_off = loop {
                    match feed.events.try_recv() {
                        Ok(event) => events.push(event),
                        Err(why) => break why == TryRecvError::Disconnected,
                    }
                };
                for event in events.drain(..) {
                    if let Some(line) = lens.event(&event) {
                        piece.extend_from_slice(&line);
                    }
                }
                // A watcher that was cut off missed events before this revision.
                if !cut_off {
                    piece.extend_from_slice(&lens.bookmark(revision, false));
                }
            }
            () = tokio::time::sleep_until(end) => return,
            () = pieces.closed() => return,
        }
        for event in events.drain(..) {
            if let Some(line) = lens.event(&event) {
                piece.extend_from_slice(&line);
            }
        }
        if !piece.is_empty() && !send(&pieces, &mut piece, end).await {
            return;
        }
    }
}

async fn send(pieces: &mpsc::Sender<Piece>, piece: &mut BytesMut, end: Instant) -> bool {
    let bytes = piece.split().freeze();
    tokio::select! {
        sent = pieces.send(Ok(bytes)) => sent.is_ok(),
        () = tokio::time::sleep_until(end.min(Instant::now() + PATIENCE)) => false,
    }
}
