//! The whole store as YAML, and back: one document an object.
//!
//! Objects keep their UIDs, so that owner references still hold after an import; revisions are given anew.
//! Events and leases are left out: they tell of moments that are over.

use futures::StreamExt as _;
use serde_json::Value;

use crate::kinds::{self, Context, FieldValidation, Format, Registry, Resource};
use crate::server::{Server, storage_name};
use crate::status::Status;
use crate::store::{Change, Key};

/// Written at once; the store puts many in one transaction.
const AT_ONCE: usize = 64;

/// Why an archive couldn't be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// An object couldn't be written as YAML.
    #[error("{what} can't be written as YAML")]
    Write {
        /// The object.
        what: String,
        /// The cause.
        source: Box<serde_saphyr::ser::Error>,
    },
    /// A document isn't YAML.
    #[error("document {number} of the archive is not YAML: {why}")]
    Yaml {
        /// Its number, from 1.
        number: usize,
        /// What is wrong.
        why: String,
    },
    /// A document isn't an object that this API would hold.
    #[error("document {number} of the archive, {what}, can't be imported: {why}")]
    Object {
        /// Its number, from 1.
        number: usize,
        /// The object.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// The store refused.
    #[error("the import broke off: {0}; run it again once the cause is gone")]
    Store(String),
}

/// `Pod default/p1`, for people.
fn described(value: &Value) -> String {
    let text = |at: &[&str]| kinds::text(value, at).to_owned();
    let (kind, namespace, name) = (text(&["kind"]), text(&["metadata", "namespace"]), text(&["metadata", "name"]));
    if namespace.is_empty() { format!("{kind} {name}") } else { format!("{kind} {namespace}/{name}") }
}

/// Where the objects of a kind stand in an archive: namespaces, definitions, the rest. `None` for those that are left out.
#[must_use]
pub fn place(group: &str, plural: &str) -> Option<u8> {
    match (group, plural) {
        ("" | "events.k8s.io", "events") | ("coordination.k8s.io", "leases") => None,
        ("", "namespaces") => Some(0),
        ("apiextensions.k8s.io", "customresourcedefinitions") => Some(1),
        _ => Some(2),
    }
}

/// [`place`] by the storage name.
fn place_of(storage: &str) -> Option<u8> {
    let (plural, group) = storage.split_once('.').unwrap_or((storage, ""));
    place(group, plural)
}

/// Objects as one YAML text. Their revisions are left out.
pub fn to_yaml(objects: Vec<Value>) -> Result<String, ArchiveError> {
    let mut out = String::new();
    for mut object in objects {
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.remove("resourceVersion");
        }
        let text = serde_saphyr::to_string(&object)
            .map_err(|source| ArchiveError::Write { what: described(&object), source: Box::new(source) })?;
        out.extend(["---\n", text.trim_end(), "\n"]);
    }
    Ok(out)
}

pub(crate) fn export(server: &Server) -> Result<String, ArchiveError> {
    let mut objects: Vec<_> = server.store.everything();
    objects.retain(|object| place_of(&object.key().resource).is_some());
    objects.sort_by(|a, b| (place_of(&a.key().resource), a.key()).cmp(&(place_of(&b.key().resource), b.key())));
    to_yaml(objects.iter().map(|object| object.value()).collect())
}

/// The documents of a YAML text, with their numbers. Lines that begin with `---` part them; within a block of text such a
/// line is indented.
fn documents(text: &str) -> impl Iterator<Item = (usize, String)> {
    let mut parts = vec![String::new()];
    for line in text.lines() {
        if line.trim_end() == "---" {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push_str(line);
            part.push('\n');
        }
    }
    let blank = |part: &String| part.lines().all(|line| line.trim().is_empty() || line.starts_with('#'));
    parts.into_iter().filter(move |part| !blank(part)).enumerate().map(|(index, part)| (index + 1, part))
}

/// An object that is good to be stored.
struct Good {
    key: Key,
    value: Value,
}

/// Reads and checks a whole archive before anything of it is written.
fn read(registry: &Registry, text: &str) -> Result<Vec<Good>, ArchiveError> {
    let mut values = Vec::new();
    for (number, part) in documents(text) {
        let value: Value =
            serde_saphyr::from_str(&part).map_err(|error| ArchiveError::Yaml { number, why: error.to_string() })?;
        values.push((number, value));
    }
    let definitions: Vec<&Value> =
        values.iter().map(|(_, value)| value).filter(|value| value["kind"] == "CustomResourceDefinition").collect();
    let registry = registry.with_crds(&definitions);
    let mut good = Vec::new();
    for (number, value) in &values {
        let fail = |why: String| ArchiveError::Object { number: *number, what: described(value), why };
        good.push(check(&registry, value).map_err(fail)?);
    }
    good.sort_by(|a, b| (place_of(&a.key.resource), &a.key).cmp(&(place_of(&b.key.resource), &b.key)));
    Ok(good)
}

fn check(registry: &Registry, value: &Value) -> Result<Good, String> {
    let api_version = kinds::text(value, &["apiVersion"]);
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let kind = kinds::text(value, &["kind"]);
    let resource = registry
        .by_kind(group, version, kind)
        .filter(|resource| resource.stored)
        .ok_or_else(|| format!("no kind {kind:?} of {api_version:?} is served here"))?;
    let body = serde_json::to_vec(value).map_err(|error| error.to_string())?;
    let decoded =
        kinds::decode(&resource, &body, Format::Json, FieldValidation::Ignore).map_err(|status| status.message)?;
    let mut value = decoded.value;
    let namespace = Some(kinds::text(&value, &["metadata", "namespace"]).to_owned());
    let namespace = namespace.filter(|namespace| !namespace.is_empty());
    keeps_the_rules(&resource, &value, namespace.as_deref()).map_err(|status| status.message)?;
    let name = kinds::text(&value, &["metadata", "name"]).to_owned();
    if kinds::text(&value, &["metadata", "uid"]).is_empty() {
        value["metadata"]["uid"] = uuid::Uuid::new_v4().to_string().into();
    }
    let key = Key::new(&storage_name(&resource), namespace.as_deref().filter(|_| resource.namespaced), &name);
    Ok(Good { key, value })
}

/// Whether an object like this could be made; its status and what the server adds is not looked at.
fn keeps_the_rules(resource: &Resource, value: &Value, namespace: Option<&str>) -> Result<(), Status> {
    let mut trial = value.clone();
    if let Some(metadata) = trial.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("resourceVersion");
    }
    if resource.is("core.Pod")
        && let Some(spec) = trial.get_mut("spec").and_then(Value::as_object_mut)
    {
        // Given by its class when it was made.
        for field in ["priority", "priorityClassName", "preemptionPolicy"] {
            spec.remove(field);
        }
    }
    let context = Context { namespace, ..Context::plain("import", jiff::Timestamp::now()) };
    kinds::create(resource, trial, &context).map(|_| ())
}

/// Writes all objects of an archive, over what is there of the same names. Nothing is written unless all of it is good.
pub(crate) async fn import(server: &Server, text: &str) -> Result<usize, ArchiveError> {
    let good = read(&server.registry(), text)?;
    let count = good.len();
    let (first, rest): (Vec<Good>, Vec<Good>) = good.into_iter().partition(|one| place_of(&one.key.resource) < Some(2));
    for part in [first, rest] {
        let writes = part.into_iter().map(|one| async move {
            let value = &one.value;
            let written: Result<_, Status> =
                server.store.mutate(&one.key, None, |_, _| Ok(Change::Put(value.clone()))).await;
            written.map(|_| ())
        });
        let mut writes = futures::stream::iter(writes).buffer_unordered(AT_ONCE);
        while let Some(written) = writes.next().await {
            written.map_err(|status| ArchiveError::Store(status.message))?;
        }
        drop(writes);
        server.refresh_registry();
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_our_own_passing_kinds_are_left_out() {
        for (group, plural) in [("", "events"), ("events.k8s.io", "events"), ("coordination.k8s.io", "leases")] {
            assert_eq!(place(group, plural), None, "{plural}.{group}");
        }
        assert_eq!(place_of("leases.coordination.k8s.io"), None);
        assert_eq!(place_of("leases.example.com"), Some(2), "somebody's own kind of this name is kept");
        assert!(place_of("namespaces") < place_of("customresourcedefinitions.apiextensions.k8s.io"));
        assert!(place_of("customresourcedefinitions.apiextensions.k8s.io") < place_of("pods"));
    }

    #[test]
    fn documents_are_parted_by_lines_of_dashes() {
        let text = "# a comment\n---\na: |\n  x\n  ---\n  y\n---\n\n---\nb: 1\n";
        let parts: Vec<_> = documents(text).collect();
        assert_eq!(parts, [(1, "a: |\n  x\n  ---\n  y\n".to_owned()), (2, "b: 1\n".to_owned())]);
    }

    #[test]
    fn odd_texts_come_back_as_they_were() {
        let object = |text: &str| {
            json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "c", "namespace": "t", "uid": "u" },
                "data": { "k": text } })
        };
        let registry = Registry::builtin();
        for text in [
            "",
            "---",
            "a\n---\nb\n",
            "\n---\n",
            "---\n",
            " ---\n---",
            "1",
            "true",
            "~",
            "# no",
            "a: b",
            "é\u{2028}",
            "\ttab",
            "x\r\ny",
            "- a",
            "{",
            "'",
            "\"",
            "1e3",
            "0x10",
            "yes",
            "null",
        ] {
            let yaml = to_yaml(vec![object(text), object("second")]).unwrap();
            let good = read(&registry, &yaml).unwrap_or_else(|error| panic!("{text:?}: {error}\n{yaml}"));
            assert_eq!(good.len(), 2, "{text:?}\n{yaml}");
            assert!(good.iter().any(|one| one.value["data"]["k"] == text), "{text:?}\n{yaml}");
        }
    }

    #[test]
    fn what_is_no_object_is_named() {
        let registry = Registry::builtin();
        let refused = |text: &str| read(&registry, text).err().map(|error| error.to_string()).unwrap_or_default();
        let unserved = refused("apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n");
        assert!(unserved.contains("document 1 of the archive, Deployment d, can't be imported: no kind"), "{unserved}");
        let bad = refused(
            "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: ok}\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: BAD}\n",
        );
        assert!(bad.starts_with("document 2 of the archive, Namespace BAD"), "{bad}");
        assert!(refused("a: [").starts_with("document 1 of the archive is not YAML"));
    }
}
