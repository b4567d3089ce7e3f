//! What reads and watches see: the durable objects, the recent events, the watchers.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::mpsc;

use super::{Key, Object};

/// How many past events are kept for watches that start in the past.
const HISTORY_EVENTS: usize = 16_384;
/// How many bytes of replaced and removed objects are kept alive for them.
const HISTORY_BYTES: usize = 24 << 20;
/// How far a watcher may fall behind before it is cut off.
const QUEUE: usize = 4096;

/// Whether an event is a write or a removal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EventKind {
    Put,
    Delete,
}

/// One change of one object.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) kind: EventKind,
    pub(crate) revision: u64,
    /// The new state, or the last one of a removed object.
    pub(crate) object: Arc<Object>,
    /// The state before, when there was one.
    pub(crate) before: Option<Arc<Object>>,
}

impl Event {
    pub(super) fn new(kind: EventKind, revision: u64, object: Arc<Object>, before: Option<Arc<Object>>) -> Self {
        Self { kind, revision, object, before }
    }

    fn weight(&self) -> usize {
        let old = self.before.as_ref().map_or(0, |object| object.bytes().len());
        let gone = if self.kind == EventKind::Delete { self.object.bytes().len() } else { 0 };
        old + gone
    }
}

/// Objects at one revision.
#[derive(Debug, Default)]
pub(crate) struct Listed {
    pub(crate) revision: u64,
    pub(crate) objects: Vec<Arc<Object>>,
}

/// The revision asked for is no longer known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Expired {
    /// The revision asked for.
    pub(crate) asked: u64,
    /// The oldest one that can be asked for.
    pub(crate) oldest: u64,
    /// The newest one.
    pub(crate) newest: u64,
}

/// The events a watcher gets. When it falls too far behind, the channel closes.
#[derive(Debug)]
pub(crate) struct Feed {
    /// Those that had happened already.
    pub(crate) past: Vec<Arc<Event>>,
    /// Those to come.
    pub(crate) events: mpsc::Receiver<Arc<Event>>,
}

struct Watcher {
    namespace: Option<Box<str>>,
    sender: mpsc::Sender<Arc<Event>>,
}

impl Watcher {
    fn wants(&self, event: &Event) -> bool {
        self.namespace.as_deref().is_none_or(|namespace| *event.object.key().namespace == *namespace)
    }
}

type Objects = BTreeMap<(Arc<str>, Arc<str>), Arc<Object>>;

pub(super) struct Visible {
    revision: u64,
    objects: HashMap<Arc<str>, Objects>,
    history: VecDeque<Arc<Event>>,
    weight: usize,
    /// Events up to this revision are forgotten.
    compacted: u64,
    watchers: HashMap<Box<str>, Vec<Watcher>>,
    watchers_of_all: Vec<Watcher>,
}

fn place(key: &Key) -> (Arc<str>, Arc<str>) {
    (key.namespace.clone(), key.name.clone())
}

fn within(objects: &Objects, namespace: Option<&str>) -> Vec<Arc<Object>> {
    match namespace {
        None => objects.values().cloned().collect(),
        Some(namespace) => {
            let from: (Arc<str>, Arc<str>) = (namespace.into(), "".into());
            objects
                .range(from..)
                .take_while(|((at, _), _)| **at == *namespace)
                .map(|(_, object)| object.clone())
                .collect()
        }
    }
}

impl Visible {
    pub(super) fn new(revision: u64, loaded: Vec<Arc<Object>>) -> Self {
        let mut objects: HashMap<Arc<str>, Objects> = HashMap::new();
        for object in loaded {
            let key = object.key();
            objects.entry(key.resource.clone()).or_default().insert(place(key), object);
        }
        Self {
            revision,
            objects,
            history: VecDeque::new(),
            weight: 0,
            compacted: revision,
            watchers: HashMap::new(),
            watchers_of_all: Vec::new(),
        }
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn get(&self, key: &Key) -> Option<Arc<Object>> {
        self.objects.get(&key.resource)?.get(&place(key)).cloned()
    }

    pub(super) fn everything(&self) -> Vec<Arc<Object>> {
        self.objects.values().flat_map(BTreeMap::values).cloned().collect()
    }

    pub(super) fn count(&self, resource: &str) -> usize {
        self.objects.get(resource).map_or(0, BTreeMap::len)
    }

    pub(super) fn resources_in(&self, namespace: &str) -> Vec<Arc<str>> {
        let mut found: Vec<Arc<str>> = self
            .objects
            .iter()
            .filter(|(_, objects)| {
                let from: (Arc<str>, Arc<str>) = (namespace.into(), "".into());
                objects.range(from..).next().is_some_and(|((at, _), _)| **at == *namespace)
            })
            .map(|(resource, _)| resource.clone())
            .collect();
        found.sort();
        found
    }

    pub(super) fn list(&self, resource: &str, namespace: Option<&str>) -> Listed {
        let objects = self.objects.get(resource).map(|objects| within(objects, namespace)).unwrap_or_default();
        Listed { revision: self.revision, objects }
    }

    fn expired(&self, asked: u64) -> Expired {
        Expired { asked, oldest: self.compacted, newest: self.revision }
    }

    /// Undoes the events since `revision`.
    pub(super) fn list_at(&self, resource: &str, namespace: Option<&str>, revision: u64) -> Result<Listed, Expired> {
        if revision < self.compacted || revision > self.revision {
            return Err(self.expired(revision));
        }
        let mut objects: Objects =
            self.list(resource, namespace).objects.into_iter().map(|o| (place(o.key()), o)).collect();
        for event in self.history.iter().rev().take_while(|event| event.revision > revision) {
            let key = event.object.key();
            if *key.resource != *resource || namespace.is_some_and(|namespace| *key.namespace != *namespace) {
                continue;
            }
            match &event.before {
                Some(before) => objects.insert(place(key), before.clone()),
                None => objects.remove(&place(key)),
            };
        }
        Ok(Listed { revision, objects: objects.into_values().collect() })
    }

    pub(super) fn watch(
        &mut self,
        resource: Option<&str>,
        namespace: Option<&str>,
        revision: u64,
    ) -> Result<Feed, Expired> {
        if revision < self.compacted {
            return Err(self.expired(revision));
        }
        let first = self.history.partition_point(|event| event.revision <= revision);
        let mut feed = self.watch_now(resource, namespace);
        feed.past = self
            .history
            .range(first..)
            .filter(|event| {
                let key = event.object.key();
                resource.is_none_or(|resource| *key.resource == *resource)
                    && namespace.is_none_or(|namespace| *key.namespace == *namespace)
            })
            .cloned()
            .collect();
        Ok(feed)
    }

    pub(super) fn watch_now(&mut self, resource: Option<&str>, namespace: Option<&str>) -> Feed {
        let (sender, events) = mpsc::channel(QUEUE);
        let watcher = Watcher { namespace: namespace.map(Into::into), sender };
        match resource {
            Some(resource) => self.watchers.entry(resource.into()).or_default().push(watcher),
            None => self.watchers_of_all.push(watcher),
        }
        Feed { past: Vec::new(), events }
    }

    pub(super) fn publish(&mut self, events: &[Arc<Event>]) {
        for event in events {
            let key = event.object.key();
            match event.kind {
                EventKind::Put => {
                    self.objects.entry(key.resource.clone()).or_default().insert(place(key), event.object.clone());
                }
                EventKind::Delete => {
                    if let Some(objects) = self.objects.get_mut(&key.resource) {
                        objects.remove(&place(key));
                    }
                }
            }
            self.revision = event.revision;
            self.weight += event.weight();
            self.history.push_back(event.clone());
            // A full queue means a slow watcher: dropping its sender ends its stream after what it has.
            let deliver = |watcher: &Watcher| {
                if watcher.wants(event) {
                    watcher.sender.try_send(event.clone()).is_ok()
                } else {
                    !watcher.sender.is_closed()
                }
            };
            if let Some(watchers) = self.watchers.get_mut(&*key.resource) {
                watchers.retain(deliver);
            }
            self.watchers_of_all.retain(deliver);
        }
        while self.history.len() > HISTORY_EVENTS || self.weight > HISTORY_BYTES {
            let Some(forgotten) = self.history.pop_front() else { break };
            self.weight -= forgotten.weight();
            self.compacted = forgotten.revision;
        }
    }
}
