//! Who set which field: `metadata.managedFields`, and server-side apply.
//!
//! The rules are those of structured merge: an update owns what it changes, an apply owns what it says, a field
//! that someone else applied is a conflict unless forced, and what an applier stops saying is removed unless
//! someone else owns it too.

pub(crate) mod set;
pub(crate) mod typed;

use std::sync::LazyLock;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use self::set::Set;
use crate::kinds::{Resource, rfc3339, zero};
use crate::status::{Status, quoted};

/// The most entries of updates kept apart; the oldest are merged beyond that.
const MAX_UPDATE_MANAGERS: usize = 10;

#[derive(Clone, Debug, PartialEq)]
struct Entry {
    manager: String,
    apply: bool,
    api_version: String,
    subresource: String,
    time: Option<String>,
    fields: Set,
}

impl Entry {
    fn is(&self, other: &Self) -> bool {
        self.manager == other.manager
            && self.apply == other.apply
            && self.subresource == other.subresource
            && (self.apply || self.api_version == other.api_version)
    }

    /// How conflicts name the owner.
    fn shown(&self) -> String {
        let mut out = quoted(&self.manager);
        if !self.subresource.is_empty() {
            out.extend([" with subresource ", &quoted(&self.subresource)]);
        }
        if !self.apply {
            out.extend([" using ", &self.api_version]);
        }
        out
    }

    fn to_value(&self) -> Value {
        let mut value = json!({
            "manager": self.manager, "operation": if self.apply { "Apply" } else { "Update" },
            "apiVersion": self.api_version, "fieldsType": "FieldsV1", "fieldsV1": self.fields.to_value(),
        });
        if let Some(time) = &self.time {
            value["time"] = time.clone().into();
        }
        if !self.subresource.is_empty() {
            value["subresource"] = self.subresource.clone().into();
        }
        value
    }
}

fn entries(object: Option<&Value>) -> Vec<Entry> {
    let list = object.and_then(|object| object.get("metadata")?.get("managedFields")?.as_array());
    let read = |entry: &Value| {
        let text = |key: &str| entry.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let fields = Set::from_value(entry.get("fieldsV1")?).ok()?;
        let manager = text("manager");
        (!fields.is_empty() || !manager.is_empty()).then(|| Entry {
            manager,
            apply: text("operation") == "Apply",
            api_version: text("apiVersion"),
            subresource: text("subresource"),
            time: entry.get("time").and_then(Value::as_str).map(str::to_owned),
            fields,
        })
    };
    list.into_iter().flatten().filter_map(read).filter(|entry| !entry.fields.is_empty()).collect()
}

fn write(object: &mut Value, mut list: Vec<Entry>) {
    list.retain(|entry| !entry.fields.is_empty());
    list.sort_by(|a, b| {
        let key = |one: &Entry| {
            (!one.apply, one.time.clone(), one.manager.clone(), one.api_version.clone(), one.subresource.clone())
        };
        key(a).cmp(&key(b))
    });
    let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) else { return };
    if list.is_empty() {
        metadata.remove("managedFields");
    } else {
        metadata.insert("managedFields".into(), list.iter().map(Entry::to_value).collect());
    }
}

/// The object without the list of owners: what is compared.
fn bare(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
    object
}

fn path(words: &str) -> Vec<String> {
    words.split('.').map(|word| format!("f:{word}")).collect()
}

/// Fields that nobody owns.
static UNOWNED: LazyLock<Set> = LazyLock::new(|| {
    let mut out = Set::default();
    for words in [
        "apiVersion",
        "kind",
        "metadata.name",
        "metadata.namespace",
        "metadata.creationTimestamp",
        "metadata.selfLink",
        "metadata.uid",
        "metadata.generation",
        "metadata.managedFields",
        "metadata.resourceVersion",
    ] {
        out.insert(&path(words));
    }
    out
});

/// Fields that a request to this part of the object can't change, and so can't own.
fn out_of_reach(resource: &Resource, subresource: Option<&str>) -> Set {
    let mut out = Set::default();
    match subresource {
        Some("status" | "approval") if resource.is_custom() => {
            out.insert(&path("spec"));
            out.insert(&path("metadata"));
        }
        Some("status" | "approval") => {
            for words in ["spec", "metadata.deletionTimestamp", "metadata.ownerReferences"] {
                out.insert(&path(words));
            }
        }
        None if resource.subresource("status").is_some() => out.insert(&path("status")),
        _ => {}
    }
    out
}

/// Drops the fields nobody owns; `metadata` itself is among them, what is below it isn't.
fn strip(fields: &Set, resource: &Resource, subresource: Option<&str>) -> Set {
    let mut metadata = Set::default();
    metadata.insert(&path("metadata"));
    fields.without(&UNOWNED).without(&out_of_reach(resource, subresource)).difference(&metadata)
}

/// What an object of this kind is before anything is set.
fn blank(resource: &Resource) -> Value {
    if resource.is_custom() { json!({"metadata": {}}) } else { zero(&resource.ty) }
}

/// Takes what changed from those who owned it.
fn disown(list: &mut [Entry], but: &Entry, comparison: &typed::Comparison) {
    let changed = comparison.modified.union(&comparison.added);
    for entry in list.iter_mut().filter(|entry| !entry.is(but)) {
        entry.fields = entry.fields.difference(&entry.fields.intersection(&changed)).difference(&comparison.removed);
    }
}

/// Notes the owner of what an update (or a create, when there is no old object) changed.
pub(crate) fn on_update(
    resource: &Resource,
    old: Option<&Value>,
    new: &mut Value,
    manager: &str,
    subresource: Option<&str>,
    now: Timestamp,
) {
    let given = entries(Some(new));
    let mut list = if given.is_empty() { entries(old) } else { given };
    let reset =
        new.get("metadata").and_then(|metadata| metadata.get("managedFields")).and_then(Value::as_array).is_some_and(
            |list| !list.is_empty() && list.iter().all(|entry| entry.as_object().is_some_and(Map::is_empty)),
        );
    if reset {
        list.clear();
    }
    // An object whose owners aren't tracked stays so until someone applies to it.
    if old.is_some() && list.is_empty() {
        write(new, list);
        return;
    }
    // The list of owners is made anew below, and isn't compared.
    if let Some(metadata) = new.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
    let before = old.map_or_else(|| blank(resource), bare);
    let comparison = typed::compare(&resource.ty, &before, new);
    let own = Entry {
        manager: manager.to_owned(),
        apply: false,
        api_version: resource.api_version(),
        subresource: subresource.unwrap_or_default().to_owned(),
        time: Some(rfc3339(now)),
        fields: strip(&comparison.modified.union(&comparison.added), resource, subresource),
    };
    if !comparison.is_same() {
        disown(&mut list, &own, &comparison);
    }
    match list.iter_mut().find(|entry| entry.is(&own)) {
        Some(mine) => {
            let fields = mine.fields.difference(&comparison.removed).union(&own.fields);
            if fields != mine.fields {
                *mine = Entry { fields, ..own };
            }
        }
        None => list.push(own),
    }
    cap(&mut list, &resource.api_version());
    write(new, list);
}

/// Merges the oldest updates when there are too many.
fn cap(list: &mut Vec<Entry>, api_version: &str) {
    list.retain(|entry| !entry.fields.is_empty());
    let mut updates: Vec<Entry> = list.iter().filter(|entry| !entry.apply).cloned().collect();
    if updates.len() <= MAX_UPDATE_MANAGERS {
        return;
    }
    updates.sort_by(|a, b| a.time.cmp(&b.time));
    let surplus = updates.len() - MAX_UPDATE_MANAGERS + 1;
    let mut ancient = Entry {
        manager: "ancient-changes".into(),
        apply: false,
        api_version: api_version.to_owned(),
        subresource: String::new(),
        time: None,
        fields: Set::default(),
    };
    for old in updates.drain(..surplus) {
        ancient.fields = ancient.fields.union(&old.fields);
        ancient.time = old.time;
    }
    list.retain(|entry| entry.apply);
    list.push(ancient);
    list.append(&mut updates);
}

/// Merges an applied configuration into the live object; the result has its `managedFields` settled.
pub(crate) fn server_side_apply(
    resource: &Resource,
    live: Option<&Value>,
    applied: &Value,
    manager: &str,
    force: bool,
    subresource: Option<&str>,
    now: Timestamp,
) -> Result<Value, Status> {
    let ty = &resource.ty;
    let mut list = entries(live);
    let before = live.map_or_else(|| blank(resource), bare);
    if live.is_some() && list.is_empty() {
        let everything = typed::compare(ty, &blank(resource), &before);
        list.push(Entry {
            manager: "before-first-apply".into(),
            apply: false,
            api_version: resource.api_version(),
            subresource: String::new(),
            time: Some(rfc3339(now)),
            fields: strip(&everything.modified.union(&everything.added), resource, None),
        });
    }
    let reach = out_of_reach(resource, subresource);
    let applied = typed::remove(ty, applied, &reach);
    let mut merged = typed::merge(ty, &before, &applied);
    let mut own = Entry {
        manager: manager.to_owned(),
        apply: true,
        api_version: resource.api_version(),
        subresource: subresource.unwrap_or_default().to_owned(),
        time: Some(rfc3339(now)),
        fields: strip(&typed::fields(ty, &applied), resource, subresource),
    };
    let previous = list.iter().find(|entry| entry.is(&own)).cloned();
    if let Some(last) = &previous {
        let mut owned = own.fields.clone();
        for entry in list.iter().filter(|entry| !entry.is(&own)) {
            owned = owned.union(&entry.fields);
        }
        merged = prune(resource, &merged, &last.fields, &owned);
    }
    let comparison = typed::compare(ty, &before, &merged);
    let changed = comparison.modified.union(&comparison.added);
    let conflicts: Vec<(&Entry, Set)> = list
        .iter()
        .filter(|entry| !entry.is(&own))
        .map(|entry| (entry, entry.fields.intersection(&changed)))
        .filter(|(_, fields)| !fields.is_empty())
        .collect();
    if !force && !conflicts.is_empty() {
        return Err(conflict(&conflicts));
    }
    disown(&mut list, &own, &comparison);
    list.retain(|entry| !entry.is(&own));
    if let Some(last) = previous.filter(|last| last.fields == own.fields && comparison.is_same()) {
        own.time = last.time;
    }
    list.push(own);
    if !merged["metadata"].is_object() {
        merged["metadata"] = Value::Object(Map::new());
    }
    write(&mut merged, list);
    Ok(merged)
}

/// Removes what the applier said last time, says no more, and nobody else owns.
fn prune(resource: &Resource, merged: &Value, last: &Set, owned: &Set) -> Value {
    let ty = &resource.ty;
    let last = last.with_named_fields(ty);
    let pruned = typed::remove(ty, merged, &last);
    let all = typed::fields(ty, merged).with_named_fields(ty);
    let kept = typed::fields(ty, &pruned).with_named_fields(ty);
    let pruned = typed::remove(ty, merged, &all.difference(&kept.union(&owned.with_named_fields(ty))));
    let kept = typed::fields(ty, &pruned).with_named_fields(ty);
    typed::remove(ty, merged, &all.difference(&kept).intersection(&last))
}

fn conflict(conflicts: &[(&Entry, Set)]) -> Status {
    let mut all: Vec<(String, String)> = Vec::new();
    for (entry, fields) in conflicts {
        for path in fields.paths() {
            all.push((entry.shown(), set::shown(&path)));
        }
    }
    let text = if let [(owner, field)] = all.as_slice() {
        format!("conflict with {owner}: {field}")
    } else {
        let mut owners: Vec<&String> = all.iter().map(|(owner, _)| owner).collect();
        owners.sort();
        owners.dedup();
        let mut lines = Vec::new();
        for owner in owners {
            lines.push(format!("conflicts with {owner}:"));
            lines.extend(all.iter().filter(|(one, _)| one == owner).map(|(_, field)| format!("- {field}")));
        }
        lines.join("\n")
    };
    let causes: Vec<Value> = all
        .iter()
        .map(|(owner, field)| json!({"reason": "FieldManagerConflict", "message": format!("conflict with {owner}"), "field": field}))
        .collect();
    let plural = if all.len() == 1 { "conflict" } else { "conflicts" };
    Status {
        code: 409,
        reason: "Conflict",
        message: format!("Apply failed with {} {plural}: {text}", all.len()),
        details: Some(json!({"causes": causes})),
        retry_after: None,
    }
}

#[cfg(test)]
mod tests;
