//! `vmpod up --apply DIR`: what the manifests of a directory say is what the API has.
//!
//! So a host repairs itself from a checkout, without anybody who would have to run first. What a directory no longer says is removed, but
//! only what this put there, and only when the whole directory could be read: "could not look" is not "absent".

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::discovery::{ApiCapabilities, Scope, oneshot};
use kube::{Client, ResourceExt as _};
use notify::{RecursiveMode, Watcher as _};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::mpsc;

use crate::home;
use crate::report::Remedy;

/// Who has set the fields that the manifests set.
const MANAGER: &str = "vmpod-apply";
/// How long nothing must have changed: a checkout writes many files.
const QUIET: Duration = Duration::from_millis(300);
/// What somebody changed by hand is as the manifests say again after so long.
const RESYNC: Duration = Duration::from_mins(3);
/// How soon what failed is tried again: a kind may be there a moment later.
const AGAIN: Duration = Duration::from_secs(5);

/// Which object something is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Key {
    api_version: String,
    kind: String,
    namespace: Option<String>,
    name: String,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{} {namespace}/{}", self.kind, self.name),
            None => write!(f, "{} {}", self.kind, self.name),
        }
    }
}

/// What a directory says.
#[derive(Debug, Default, PartialEq)]
struct Manifests {
    objects: BTreeMap<Key, Value>,
    /// What of it can't be read, for people.
    faults: Vec<String>,
}

/// Reads all manifests below a directory: `.yaml`, `.yml` and `.json`, in the order of their names, hidden ones left out.
fn read(dir: &Path) -> Result<Manifests> {
    let mut found = Manifests::default();
    let mut files = Vec::new();
    list(dir, &mut files).with_context(|| format!("can't read the manifests in {}", dir.display()))?;
    files.sort();
    for file in files {
        let text = match std::fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) => {
                found.faults.push(format!("{}: {error}", file.display()));
                continue;
            }
        };
        // As in YAML 1.2: an object may be called n, and a value may be on.
        let options = serde_saphyr::options! { strict_booleans: true };
        match serde_saphyr::from_multiple_with_options::<Value>(&text, options) {
            Ok(all) => {
                for object in all.into_iter().flat_map(flatten) {
                    take(&mut found, &file, object);
                }
            }
            Err(error) => found.faults.push(format!("{}: {error}", file.display())),
        }
    }
    Ok(found)
}

fn list(dir: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
            continue;
        }
        if path.is_dir() {
            list(&path, files)?;
        } else if path.extension().is_some_and(|end| ["yaml", "yml", "json"].iter().any(|known| end == *known)) {
            files.push(path);
        }
    }
    Ok(())
}

/// The objects of a document: a `List` has several, an empty document none.
fn flatten(document: Value) -> Vec<Value> {
    match document {
        Value::Null => Vec::new(),
        Value::Object(mut map) if map.get("kind").is_some_and(|kind| kind == "List") => {
            let items = map.remove("items").and_then(|items| items.as_array().cloned()).unwrap_or_default();
            items.into_iter().flat_map(flatten).collect()
        }
        other => vec![other],
    }
}

fn take(found: &mut Manifests, file: &Path, object: Value) {
    let text = |path: &str| object.pointer(path).and_then(Value::as_str).map(ToOwned::to_owned);
    let (api_version, kind, name) = (text("/apiVersion"), text("/kind"), text("/metadata/name"));
    let (Some(api_version), Some(kind), Some(name)) = (api_version, kind, name) else {
        found.faults.push(format!("{}: an object without apiVersion, kind or metadata.name", file.display()));
        return;
    };
    let key = Key { api_version, kind, namespace: text("/metadata/namespace"), name };
    if let Some(before) = found.objects.insert(key.clone(), object) {
        // Which of two it is to be nobody can tell; the first one stays.
        found.faults.push(format!("{}: {key} is there twice", file.display()));
        found.objects.insert(key, before);
    }
}

/// What to do: in this order.
#[derive(Debug, PartialEq)]
struct Plan<'a> {
    apply: Vec<(&'a Key, &'a Value)>,
    delete: Vec<&'a Key>,
}

/// What is wanted before other things.
fn rank(kind: &str) -> u8 {
    match kind {
        "CustomResourceDefinition" => 0,
        "Namespace" | "PriorityClass" => 1,
        "ServiceAccount" | "Secret" | "ConfigMap" => 2,
        "ClusterRole" | "Role" => 3,
        "ClusterRoleBinding" | "RoleBinding" => 4,
        _ => 5,
    }
}

/// From what the directory says and what this has put there.
fn plan<'a>(wanted: &'a Manifests, ours: &'a BTreeSet<Key>) -> Plan<'a> {
    let mut apply: Vec<_> = wanted.objects.iter().collect();
    apply.sort_by_key(|(key, _)| (rank(&key.kind), *key));
    // An empty directory may be one whose disk isn't there, and a file that can't be read may hold what seems to be gone.
    let certain = wanted.faults.is_empty() && !wanted.objects.is_empty();
    let mut delete: Vec<_> = ours.iter().filter(|key| certain && !wanted.objects.contains_key(key)).collect();
    delete.sort_by_key(|key| (std::cmp::Reverse(rank(&key.kind)), *key));
    Plan { apply, delete }
}

/// What this has put into the API, over restarts.
struct Ours {
    path: PathBuf,
    keys: BTreeSet<Key>,
}

impl Ours {
    fn open(path: PathBuf) -> Result<Self> {
        let keys = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeSet::new(),
            Err(error) => return Err(error).with_context(|| format!("can't read {}", path.display())),
        };
        Ok(Self { path, keys })
    }

    /// Written before the object is made: what isn't known to be ours would never be removed.
    fn add(&mut self, key: &Key) -> Result<()> {
        if self.keys.insert(key.clone()) { self.save() } else { Ok(()) }
    }

    fn remove(&mut self, key: &Key) -> Result<()> {
        if self.keys.remove(key) { self.save() } else { Ok(()) }
    }

    fn save(&self) -> Result<()> {
        home::write_private(&self.path, &serde_json::to_string_pretty(&self.keys)?)
    }
}

/// The directory that was named, if it is one: told before anything is started for it.
pub(crate) fn directory(dir: &Path) -> Result<PathBuf> {
    if dir.is_dir() {
        return std::path::absolute(dir).with_context(|| format!("can't tell where {} is", dir.display()));
    }
    Err(Remedy::new(format!("--apply: {} is no directory", dir.display()), "make it, or name another").into())
}

/// Keeps the API as a directory says, for as long as it runs. `state` is where it remembers what it did.
pub(crate) async fn keep(client: Client, dir: PathBuf, state: PathBuf) -> Result<()> {
    let mut ours = Ours::open(state)?;
    let (notice, mut changes) = mpsc::channel(1);
    let mut watcher = notify::recommended_watcher(move |_| {
        // A place that is taken says as much as two.
        notice.try_send(()).ok();
    })
    .context("can't watch directories")?;
    watcher.watch(&dir, RecursiveMode::Recursive).with_context(|| format!("can't watch {}", dir.display()))?;
    let mut told = BTreeSet::new();
    loop {
        let faults = once(&client, &dir, &mut ours).await;
        // Said once, and again when it was well in between.
        for fault in faults.iter().filter(|fault| !told.contains(*fault)) {
            tracing::warn!("--apply: {fault}");
        }
        let wait = if faults.is_empty() { RESYNC } else { AGAIN };
        told = faults.into_iter().collect();
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            noticed = changes.recv() => {
                noticed.context("nobody watches the directory any more")?;
                while tokio::time::timeout(QUIET, changes.recv()).await.is_ok_and(|more| more.is_some()) {}
            }
        }
    }
}

/// Does it once; what couldn't be done, for people.
async fn once(client: &Client, dir: &Path, ours: &mut Ours) -> Vec<String> {
    let wanted = match read(dir) {
        Ok(wanted) => wanted,
        Err(error) => return vec![format!("{error:#}")],
    };
    let before = ours.keys.clone();
    let plan = plan(&wanted, &before);
    let mut faults = wanted.faults.clone();
    for (key, object) in plan.apply {
        let done = match ours.add(key) {
            Ok(()) => apply(client, key, object).await,
            Err(error) => Err(error),
        };
        match done {
            Ok(true) => tracing::info!("--apply: {key} is as the manifests say"),
            Ok(false) => {}
            Err(error) => faults.push(format!("{key}: {error:#}")),
        }
    }
    for key in plan.delete {
        let done = match delete(client, key).await {
            Ok(()) => ours.remove(key),
            Err(error) => Err(error),
        };
        match done {
            Ok(()) => tracing::info!("--apply: {key} is removed: no manifest has it any more"),
            Err(error) => faults.push(format!("{key}: {error:#}")),
        }
    }
    faults
}

/// The way to objects of a kind.
async fn api(client: &Client, key: &Key) -> Result<Api<DynamicObject>> {
    let (group, version) = key.api_version.split_once('/').unwrap_or(("", &key.api_version));
    let gvk = GroupVersionKind::gvk(group, version, &key.kind);
    let found: (_, ApiCapabilities) = oneshot::pinned_kind(client, &gvk)
        .await
        .with_context(|| format!("the API has no kind {} in {}", key.kind, key.api_version))?;
    let (resource, capabilities) = found;
    Ok(match capabilities.scope {
        Scope::Cluster => Api::all_with(client.clone(), &resource),
        Scope::Namespaced => {
            Api::namespaced_with(client.clone(), key.namespace.as_deref().unwrap_or("default"), &resource)
        }
    })
}

/// Whether it was changed.
async fn apply(client: &Client, key: &Key, object: &Value) -> Result<bool> {
    let api = api(client, key).await?;
    let before = api.get_opt(&key.name).await?.and_then(|object| object.resource_version());
    let params = PatchParams::apply(MANAGER).force();
    let after = api.patch(&key.name, &params, &Patch::Apply(object)).await?;
    Ok(before != after.resource_version())
}

/// Removes it; one that isn't there, or whose kind isn't any more, is no error.
async fn delete(client: &Client, key: &Key) -> Result<()> {
    let api = match api(client, key).await {
        Ok(api) => api,
        Err(error) if is_not_found(&error) => return Ok(()),
        Err(error) => return Err(error),
    };
    match api.delete(&key.name, &DeleteParams::background()).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn is_not_found(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| match cause.downcast_ref::<kube::Error>() {
        Some(kube::Error::Api(status)) => status.code == 404,
        Some(kube::Error::Discovery(_)) => true,
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(kind: &str, name: &str) -> Key {
        Key { api_version: "v1".to_owned(), kind: kind.to_owned(), namespace: None, name: name.to_owned() }
    }

    fn said(files: &[(&str, &str)]) -> Manifests {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        read(dir.path()).unwrap()
    }

    #[test]
    fn a_directory_is_read_whole_and_faults_are_named() {
        let found = said(&[
            (
                "a.yaml",
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n---\n---\napiVersion: v1\nkind: Secret\nmetadata: {name: s}\n",
            ),
            (
                "below/b.json",
                r#"{"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}}]}"#,
            ),
            (".git/c.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: hidden}\n"),
            ("notes.txt", "not for us"),
        ]);
        assert_eq!(found.faults, Vec::<String>::new());
        let names: Vec<_> = found.objects.keys().map(|key| key.name.as_str()).collect();
        assert_eq!(names, ["a", "p", "s"]);
        let bad = said(&[
            ("a.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {x: first}\n"),
            ("b.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {x: second}\n"),
            ("c.yaml", "kind: ConfigMap\n"),
            ("d.yaml", "a: [\n"),
        ]);
        assert_eq!(bad.faults.len(), 3, "{:?}", bad.faults);
        assert_eq!(bad.objects[&key("ConfigMap", "a")]["data"]["x"], "first");
        assert!(read(Path::new("/nonexistent")).is_err());
        assert!(directory(Path::new("/nonexistent")).is_err());
    }

    #[test]
    fn what_others_need_comes_first_and_goes_last() {
        let found = said(&[(
            "all.yaml",
            "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: n}\n---\n\
             apiVersion: v1\nkind: Secret\nmetadata: {name: s}\n",
        )]);
        let nothing = BTreeSet::new();
        let order: Vec<_> = plan(&found, &nothing).apply.into_iter().map(|(key, _)| key.kind.clone()).collect();
        assert_eq!(order, ["Namespace", "Secret", "Pod"]);
        let ours = BTreeSet::from([key("Namespace", "old"), key("Pod", "old"), key("Pod", "p")]);
        let going: Vec<_> = plan(&found, &ours).delete.into_iter().map(ToString::to_string).collect();
        assert_eq!(going, ["Pod old", "Namespace old"]);
    }

    #[test]
    fn what_could_not_be_read_is_not_taken_for_gone() {
        let ours = BTreeSet::from([key("Pod", "p")]);
        assert!(plan(&Manifests::default(), &ours).delete.is_empty(), "an empty directory");
        let mut found = said(&[("a.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: q}\n")]);
        assert_eq!(plan(&found, &ours).delete.len(), 1);
        found.faults.push("b.yaml: no permission".to_owned());
        assert!(plan(&found, &ours).delete.is_empty());
    }

    #[test]
    fn what_was_done_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("applied.json");
        let mut ours = Ours::open(path.clone()).unwrap();
        ours.add(&key("Pod", "a")).unwrap();
        ours.add(&key("Pod", "b")).unwrap();
        ours.remove(&key("Pod", "a")).unwrap();
        assert_eq!(Ours::open(path.clone()).unwrap().keys, BTreeSet::from([key("Pod", "b")]));
        std::fs::write(&path, "{").unwrap();
        assert!(Ours::open(path).is_err(), "damage isn't taken for nothing");
    }
}
