//! A stored object: its key, its bytes, and the few facts that lists and watches select by.

use std::sync::Arc;
use std::sync::LazyLock;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::StoreError;

/// Where an object is kept: resource (`pods`, `leases.coordination.k8s.io`), namespace (empty for
/// cluster-wide ones) and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) resource: Arc<str>,
    pub(crate) namespace: Arc<str>,
    pub(crate) name: Arc<str>,
}

impl Key {
    pub(crate) fn new(resource: &str, namespace: Option<&str>, name: &str) -> Self {
        Self { resource: resource.into(), namespace: namespace.unwrap_or_default().into(), name: name.into() }
    }

    /// The namespace, unless the object is cluster-wide.
    pub(crate) fn namespace(&self) -> Option<&str> {
        (!self.namespace.is_empty()).then_some(&*self.namespace)
    }
}

/// How deep an object may be nested. The parser refuses 128, also when the store is opened again; the
/// rest is room for what an answer wraps around an object.
pub(crate) const MAX_NESTING: usize = 120;

/// One version of one object.
#[derive(Debug)]
pub(crate) struct Object {
    key: Key,
    revision: u64,
    digest: Value,
    bytes: Bytes,
}

impl Object {
    pub(crate) fn key(&self) -> &Key {
        &self.key
    }

    pub(crate) fn revision(&self) -> u64 {
        self.revision
    }

    /// The object, serialised, with its kind and resourceVersion.
    pub(crate) fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The object's parts that selectors look at; everything else is left out.
    pub(crate) fn digest(&self) -> &Value {
        &self.digest
    }

    /// The object, parsed.
    pub(crate) fn value(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or(Value::Null)
    }

    pub(crate) fn uid(&self) -> &str {
        self.digest["metadata"]["uid"].as_str().unwrap_or_default()
    }

    pub(crate) fn is_deleting(&self) -> bool {
        !self.digest["metadata"]["deletionTimestamp"].is_null()
    }

    /// Reads an object back from disk.
    pub(super) fn load(key: Key, bytes: Bytes) -> Result<Self, String> {
        let value: Value = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
        let revision = value["metadata"]["resourceVersion"]
            .as_str()
            .and_then(|text| text.parse().ok())
            .ok_or("it has no resourceVersion")?;
        Ok(Self { digest: digest(&key.resource, &value), key, revision, bytes })
    }
}

/// An object that waits for its revision.
pub(super) struct Draft {
    key: Key,
    digest: Value,
    bytes: Vec<u8>,
    at: usize,
}

/// Stands where the revision goes; nobody outside this process can know it, so no object holds it.
static MARK: LazyLock<String> = LazyLock::new(|| format!("rv-{}", uuid::Uuid::new_v4().simple()));

impl Draft {
    /// Serialises the object before its revision is known, so that this needn't happen under a lock.
    pub(super) fn new(key: &Key, mut marked: Value) -> Result<Self, StoreError> {
        let digest = digest(&key.resource, &marked);
        if let Some(meta) = marked.get_mut("metadata").and_then(Value::as_object_mut) {
            meta.insert("resourceVersion".into(), MARK.as_str().into());
        }
        let bytes = serde_json::to_vec(&marked).map_err(|error| StoreError::Serialise(error.to_string().into()))?;
        if nesting(&bytes) > MAX_NESTING {
            return Err(StoreError::TooDeep);
        }
        let at = bytes
            .windows(MARK.len())
            .position(|window| window == MARK.as_bytes())
            .ok_or_else(|| StoreError::Serialise("it has no metadata".into()))?;
        Ok(Self { key: key.clone(), digest, bytes, at })
    }

    pub(super) fn finish(self, revision: u64) -> Object {
        let number = revision.to_string();
        let mut bytes = Vec::with_capacity(self.bytes.len() - MARK.len() + number.len());
        bytes.extend_from_slice(&self.bytes[..self.at]);
        bytes.extend_from_slice(number.as_bytes());
        bytes.extend_from_slice(&self.bytes[self.at + MARK.len()..]);
        Object { key: self.key, revision, digest: self.digest, bytes: bytes.into() }
    }
}

/// How deep JSON is nested. Doesn't recurse, so that any depth can be measured.
fn nesting(json: &[u8]) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let (mut text, mut escaped) = (false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if text => escaped = true,
            b'"' => text = !text,
            b'{' | b'[' if !text => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' if !text => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// The fields that selectors, lists and controllers ask of a resource, besides its metadata.
fn selectable(resource: &str) -> &'static [&'static [&'static str]] {
    match resource {
        "pods" => &[
            &["spec", "nodeName"],
            &["spec", "restartPolicy"],
            &["spec", "schedulerName"],
            &["spec", "serviceAccountName"],
            &["spec", "hostNetwork"],
            &["status", "phase"],
            &["status", "podIP"],
            &["status", "podIPs"],
            &["status", "nominatedNodeName"],
        ],
        "nodes" => &[&["spec", "unschedulable"]],
        "namespaces" => &[&["status", "phase"]],
        "secrets" => &[&["type"]],
        "events" => &[&["involvedObject"], &["reason"], &["reportingComponent"], &["source", "component"], &["type"]],
        "certificatesigningrequests.certificates.k8s.io" => &[&["spec", "signerName"]],
        _ => &[],
    }
}

fn digest(resource: &str, value: &Value) -> Value {
    let meta = &value["metadata"];
    let mut kept = Map::new();
    for field in ["name", "namespace", "uid", "labels", "deletionTimestamp", "ownerReferences", "finalizers"] {
        if let Some(found) = meta.get(field) {
            kept.insert(field.into(), found.clone());
        }
    }
    let mut digest = json!({ "metadata": kept });
    for path in selectable(resource) {
        let Some(found) = path.iter().try_fold(value, |at, step| at.get(step)) else { continue };
        let mut at = &mut digest;
        for step in *path {
            at = &mut at[*step];
        }
        *at = found.clone();
    }
    digest
}
