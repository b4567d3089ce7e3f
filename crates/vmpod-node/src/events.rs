//! Events about pods and the node, sent beside the work and never in its way.

use std::{collections::HashMap, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Event, EventSource, Node, ObjectReference, Pod},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::sync::mpsc;

use crate::pod;

/// Whether an event tells of trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Normal,
    Warning,
}

/// Something to tell.
#[derive(Debug)]
struct Told {
    about: ObjectReference,
    kind: Kind,
    reason: &'static str,
    message: String,
    at: Timestamp,
}

/// The sending end. Clones share the queue; when it is full, events are dropped: they inform, nothing depends on them.
#[derive(Clone, Debug)]
pub(crate) struct Events {
    queue: mpsc::Sender<Told>,
}

/// Events that may be sent at once, and how fast the allowance grows again.
const BURST: u32 = 50;
const REFILL: Duration = Duration::from_millis(100);
/// Events remembered, so that a repeated one counts up instead of piling up.
const REMEMBERED: usize = 512;
/// The API refuses longer messages.
const LONGEST: usize = 1024;

impl Events {
    /// Makes the queue and the task that empties it, which ends when all clones are gone.
    pub(crate) fn start(client: Client, node: String) -> Self {
        let (queue, told) = mpsc::channel(256);
        tokio::spawn(send_all(client, node, told));
        Self { queue }
    }

    /// Tells something about container 0 of a pod.
    pub(crate) fn container(&self, pod: &Pod, kind: Kind, reason: &'static str, message: impl Into<String>) {
        let field_path = pod::machine_container(pod).map(|container| format!("spec.containers{{{}}}", container.name));
        self.tell(ObjectReference { field_path, ..reference(pod) }, kind, reason, message.into());
    }

    /// Tells something about a container of a pod.
    pub(crate) fn of(&self, pod: &Pod, container: &str, kind: Kind, reason: &'static str, message: impl Into<String>) {
        let inits = pod::spec(pod).and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default();
        let list = if inits.iter().any(|init| init.name == container) { "initContainers" } else { "containers" };
        let field_path = Some(format!("spec.{list}{{{container}}}"));
        self.tell(ObjectReference { field_path, ..reference(pod) }, kind, reason, message.into());
    }

    /// Tells something about a pod.
    pub(crate) fn pod(&self, pod: &Pod, kind: Kind, reason: &'static str, message: impl Into<String>) {
        self.tell(reference(pod), kind, reason, message.into());
    }

    /// Tells something about the node.
    pub(crate) fn node(&self, node: &Node, kind: Kind, reason: &'static str, message: impl Into<String>) {
        let name = node.metadata.name.clone();
        let about = ObjectReference {
            kind: Some("Node".to_owned()),
            api_version: Some("v1".to_owned()),
            // The kubelet uses the name here as well: `kubectl describe node` looks for it.
            uid: name.clone(),
            name,
            ..ObjectReference::default()
        };
        self.tell(about, kind, reason, message.into());
    }

    fn tell(&self, about: ObjectReference, kind: Kind, reason: &'static str, mut message: String) {
        if message.len() > LONGEST {
            let end = (0..=LONGEST - 4).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
            message.truncate(end);
            message.push('…');
        }
        let told = Told { about, kind, reason, message, at: Timestamp::now() };
        if self.queue.try_send(told).is_err() {
            tracing::warn!(reason, "an event was dropped: too many at once");
        }
    }
}

fn reference(pod: &Pod) -> ObjectReference {
    ObjectReference {
        kind: Some("Pod".to_owned()),
        api_version: Some("v1".to_owned()),
        namespace: pod.metadata.namespace.clone(),
        name: pod.metadata.name.clone(),
        uid: pod.metadata.uid.clone(),
        resource_version: pod.metadata.resource_version.clone(),
        ..ObjectReference::default()
    }
}

type Key = (Option<String>, Option<String>, &'static str, String);

async fn send_all(client: Client, node: String, mut told: mpsc::Receiver<Told>) {
    let mut sent: HashMap<Key, (String, i32)> = HashMap::new();
    let mut allowance = BURST;
    let mut refill = tokio::time::interval(REFILL);
    refill.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let next = tokio::select! {
            next = told.recv(), if allowance > 0 => next,
            // Only a spent allowance needs the clock: an idle agent sleeps.
            _ = refill.tick(), if allowance == 0 => {
                allowance = BURST / 2;
                continue;
            }
        };
        let Some(told) = next else { return };
        allowance -= 1;
        if sent.len() >= REMEMBERED {
            sent.clear();
        }
        let key = (told.about.uid.clone(), told.about.field_path.clone(), told.reason, told.message.clone());
        let known = sent.get(&key).cloned();
        match send(&client, &node, &told, known).await {
            Ok(entry) => {
                sent.insert(key, entry);
            }
            Err(error) => tracing::debug!(%error, reason = told.reason, "an event could not be sent"),
        }
    }
}

async fn send(
    client: &Client,
    node: &str,
    told: &Told,
    known: Option<(String, i32)>,
) -> Result<(String, i32), kube::Error> {
    let namespace = told.about.namespace.as_deref().unwrap_or("default");
    let api: Api<Event> = Api::namespaced(client.clone(), namespace);
    let now = Time(told.at);
    if let Some((name, count)) = known {
        let count = count.saturating_add(1);
        let patch = Patch::Strategic(json!({"count": count, "lastTimestamp": now}));
        match api.patch(&name, &PatchParams::default(), &patch).await {
            Ok(_) => return Ok((name, count)),
            // It expired: a new one is made.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error),
        }
    }
    let about = told.about.name.as_deref().unwrap_or_default();
    let name = format!("{about}.{:x}", told.at.as_nanosecond());
    let event = Event {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        involved_object: told.about.clone(),
        reason: Some(told.reason.to_owned()),
        message: Some(told.message.clone()),
        type_: Some(match told.kind {
            Kind::Normal => "Normal".to_owned(),
            Kind::Warning => "Warning".to_owned(),
        }),
        source: Some(EventSource { component: Some("vmpod".to_owned()), host: Some(node.to_owned()) }),
        reporting_component: Some("vmpod".to_owned()),
        reporting_instance: Some(node.to_owned()),
        first_timestamp: Some(now.clone()),
        last_timestamp: Some(now),
        count: Some(1),
        ..Event::default()
    };
    api.create(&PostParams::default(), &event).await?;
    Ok((name, 1))
}
