//! The store: every object in memory, every write on disk before it is acknowledged.
//!
//! There is one global revision. A write is computed against the newest state of its object,
//! gets the next revision, and joins a queue. One thread takes the whole queue, writes it in one
//! transaction (one fsync for many writers), and only then makes it visible to reads and watches
//! and wakes the writers. So what a client has seen is durable, and the order of revisions is the
//! order of events.
//!
//! ```text
//! mutate ──► overlay + queue ──► commit thread: redb, fsync ──► visible index, history, watchers
//! ```

mod disk;
mod object;
mod visible;

#[cfg(test)]
mod faults;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::thread::JoinHandle;

use serde_json::Value;
use tokio::sync::oneshot;

pub use disk::OpenError;
pub(crate) use object::{Key, MAX_NESTING, Object};
pub(crate) use visible::{Event, EventKind, Expired, Feed, Listed};

use disk::Disk;
use object::Draft;
use visible::Visible;

/// A write that couldn't be made durable.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// The disk refused; no later write can succeed either, until a restart.
    #[error("the store can't be written: {0}")]
    Disk(Arc<str>),
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
    /// The object isn't JSON that can be written.
    #[error("the object can't be serialised: {0}")]
    Serialise(Arc<str>),
    /// The object couldn't be read back.
    #[error("the object is nested more than {MAX_NESTING} deep")]
    TooDeep,
}

/// What to do with an object.
#[derive(Debug)]
pub(crate) enum Change {
    /// Nothing.
    Keep,
    /// Write this. Its `metadata.resourceVersion` is set by the store.
    Put(Value),
    /// Remove it; this is its last state, announced to watchers.
    Delete(Value),
}

/// What [`Store::mutate`] did.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    /// The object as it is now, or as it was last.
    pub(crate) object: Arc<Object>,
}

/// Another object that a change depends on: the change is computed anew when it changes meanwhile.
pub(crate) type Dependency<'a> = Option<&'a Key>;

struct Pending {
    object: Option<Arc<Object>>,
    revision: u64,
}

struct Queued {
    event: Option<Arc<Event>>,
    done: oneshot::Sender<Result<(), StoreError>>,
}

struct Head {
    revision: u64,
    overlay: HashMap<Key, Pending>,
    queue: Vec<Queued>,
    stop: bool,
    failed: Option<StoreError>,
}

struct Shared {
    head: Mutex<Head>,
    wake: Condvar,
    visible: RwLock<Visible>,
}

/// The store; clones share it.
#[derive(Clone)]
pub(crate) struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("revision", &self.revision()).finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.head().stop = true;
        self.shared.wake.notify_all();
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("the store's writer ended by a panic");
        }
    }
}

impl Shared {
    fn head(&self) -> MutexGuard<'_, Head> {
        self.head.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn visible(&self) -> RwLockReadGuard<'_, Visible> {
        self.visible.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest state of an object, durable or not, and whether it is durable.
    fn newest(&self, head: &Head, key: &Key) -> (Option<Arc<Object>>, bool) {
        match head.overlay.get(key) {
            Some(pending) => (pending.object.clone(), false),
            None => (self.visible().get(key), true),
        }
    }
}

fn same(a: Option<&Arc<Object>>, b: Option<&Arc<Object>>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        _ => false,
    }
}

impl Store {
    /// Opens the store in `file`, or makes it.
    pub(crate) fn open(file: &Path) -> Result<Self, OpenError> {
        let (disk, loaded) = Disk::open(file)?;
        Self::start(disk, loaded)
    }

    fn start(disk: Disk, loaded: disk::Loaded) -> Result<Self, OpenError> {
        let shared = Arc::new(Shared {
            head: Mutex::new(Head {
                revision: loaded.revision,
                overlay: HashMap::new(),
                queue: Vec::new(),
                stop: false,
                failed: None,
            }),
            wake: Condvar::new(),
            visible: RwLock::new(Visible::new(loaded.revision, loaded.objects)),
        });
        let writer = std::thread::Builder::new()
            .name("api-store".into())
            .spawn({
                let shared = shared.clone();
                move || write_queue(&shared, &disk)
            })
            .map_err(|source| OpenError::Thread { source })?;
        Ok(Self { inner: Arc::new(Inner { shared, writer: Some(writer) }) })
    }

    fn shared(&self) -> &Shared {
        &self.inner.shared
    }

    /// The newest visible revision.
    pub(crate) fn revision(&self) -> u64 {
        self.shared().visible().revision()
    }

    /// Why writes fail, when they do.
    pub(crate) fn failure(&self) -> Option<StoreError> {
        self.shared().head().failed.clone()
    }

    /// One object.
    pub(crate) fn get(&self, key: &Key) -> Option<Arc<Object>> {
        self.shared().visible().get(key)
    }

    /// All objects of a resource, in the order of namespace and name.
    pub(crate) fn list(&self, resource: &str, namespace: Option<&str>) -> Listed {
        self.shared().visible().list(resource, namespace)
    }

    /// All objects of a resource as they were at an earlier revision.
    pub(crate) fn list_at(&self, resource: &str, namespace: Option<&str>, revision: u64) -> Result<Listed, Expired> {
        self.shared().visible().list_at(resource, namespace, revision)
    }

    /// Every object of every resource.
    pub(crate) fn everything(&self) -> Vec<Arc<Object>> {
        self.shared().visible().everything()
    }

    /// How many objects a resource has.
    pub(crate) fn count(&self, resource: &str) -> usize {
        self.shared().visible().count(resource)
    }

    /// The names of all resources that have an object in a namespace.
    pub(crate) fn resources_in(&self, namespace: &str) -> Vec<Arc<str>> {
        self.shared().visible().resources_in(namespace)
    }

    /// All events after `revision`, then all later ones, of one resource (or all) in one namespace (or all).
    pub(crate) fn watch(
        &self,
        resource: Option<&str>,
        namespace: Option<&str>,
        revision: u64,
    ) -> Result<Feed, Expired> {
        self.shared().visible.write().unwrap_or_else(PoisonError::into_inner).watch(resource, namespace, revision)
    }

    /// All objects, and a feed of everything after them.
    pub(crate) fn list_and_watch(&self, resource: &str, namespace: Option<&str>) -> (Listed, Feed) {
        let mut visible = self.shared().visible.write().unwrap_or_else(PoisonError::into_inner);
        let listed = visible.list(resource, namespace);
        let feed = visible.watch_now(Some(resource), namespace);
        (listed, feed)
    }

    /// A feed of everything from now on.
    pub(crate) fn watch_now(&self, resource: Option<&str>) -> Feed {
        self.shared().visible.write().unwrap_or_else(PoisonError::into_inner).watch_now(resource, None)
    }

    /// Changes one object. `change` gets the newest state (and that of `dependency`) and may run
    /// several times. Returns when the result is durable.
    pub(crate) async fn mutate<E: From<StoreError>>(
        &self,
        key: &Key,
        dependency: Dependency<'_>,
        mut change: impl FnMut(Option<&Arc<Object>>, Option<&Arc<Object>>) -> Result<Change, E>,
    ) -> Result<Outcome, E> {
        let (outcome, done) = loop {
            let (base, durable, other) = {
                let head = self.shared().head();
                let (base, durable) = self.shared().newest(&head, key);
                let (other, also) = dependency.map_or((None, true), |key| self.shared().newest(&head, key));
                (base, durable && also, other)
            };
            let draft = match change(base.as_ref(), other.as_ref()) {
                Ok(Change::Keep) => None,
                Ok(Change::Put(value)) => Some((EventKind::Put, Draft::new(key, value)?)),
                Ok(Change::Delete(value)) => Some((EventKind::Delete, Draft::new(key, value)?)),
                Err(error) if durable => return Err(error),
                Err(error) => {
                    // A refusal tells of the state it was computed on, which must be durable first.
                    settled(self.enqueue(None)?).await?;
                    return Err(error);
                }
            };
            let Some((kind, draft)) = draft else {
                // Nothing to write, yet the answer must not tell of what isn't durable.
                let Some(object) = base else {
                    return Err(StoreError::Serialise("nothing was kept".into()).into());
                };
                let outcome = Outcome { object };
                if durable {
                    return Ok(outcome);
                }
                let done = self.enqueue(None)?;
                break (outcome, done);
            };
            let mut head = self.shared().head();
            let unchanged = same(base.as_ref(), self.shared().newest(&head, key).0.as_ref())
                && dependency.is_none_or(|key| same(other.as_ref(), self.shared().newest(&head, key).0.as_ref()));
            if !unchanged {
                drop(head);
                continue;
            }
            if let Some(failed) = &head.failed {
                return Err(failed.clone().into());
            }
            head.revision += 1;
            let revision = head.revision;
            let object = Arc::new(draft.finish(revision));
            let event = Arc::new(Event::new(kind, revision, object.clone(), base));
            let state = (kind == EventKind::Put).then(|| object.clone());
            head.overlay.insert(key.clone(), Pending { object: state, revision });
            let (sender, done) = oneshot::channel();
            head.queue.push(Queued { event: Some(event), done: sender });
            drop(head);
            self.shared().wake.notify_one();
            break (Outcome { object }, done);
        };
        settled(done).await?;
        Ok(outcome)
    }

    fn enqueue(&self, event: Option<Arc<Event>>) -> Result<oneshot::Receiver<Result<(), StoreError>>, StoreError> {
        let (sender, done) = oneshot::channel();
        let mut head = self.shared().head();
        if let Some(failed) = &head.failed {
            return Err(failed.clone());
        }
        head.queue.push(Queued { event, done: sender });
        drop(head);
        self.shared().wake.notify_one();
        Ok(done)
    }
}

/// Waits until a place in the queue was written.
async fn settled(done: oneshot::Receiver<Result<(), StoreError>>) -> Result<(), StoreError> {
    done.await.unwrap_or(Err(StoreError::Closed))
}

/// The commit thread: takes the whole queue, makes it durable, shows it, wakes the writers.
fn write_queue(shared: &Shared, disk: &Disk) {
    loop {
        let batch = {
            let mut head = shared.head();
            loop {
                if !head.queue.is_empty() {
                    break std::mem::take(&mut head.queue);
                }
                if head.stop {
                    return;
                }
                head = shared.wake.wait(head).unwrap_or_else(PoisonError::into_inner);
            }
        };
        let (events, waiters): (Vec<_>, Vec<_>) = batch.into_iter().map(|queued| (queued.event, queued.done)).unzip();
        let events: Vec<Arc<Event>> = events.into_iter().flatten().collect();
        let result = if events.is_empty() { Ok(()) } else { disk.commit(&events) };
        let result = result.map_err(|error| StoreError::Disk(error.to_string().into()));
        match &result {
            Ok(()) => {
                shared.visible.write().unwrap_or_else(PoisonError::into_inner).publish(&events);
                let mut head = shared.head();
                for event in &events {
                    if head.overlay.get(event.object.key()).is_some_and(|pending| pending.revision == event.revision) {
                        head.overlay.remove(event.object.key());
                    }
                }
            }
            Err(error) => {
                tracing::error!(%error, "the store failed; writes are refused from now on");
                let mut head = shared.head();
                head.failed = Some(error.clone());
                head.overlay.clear();
                for queued in head.queue.drain(..) {
                    drop(queued.done.send(Err(error.clone())));
                }
            }
        }
        for done in waiters {
            // A writer that went away doesn't want to know.
            drop(done.send(result.clone()));
        }
    }
}
