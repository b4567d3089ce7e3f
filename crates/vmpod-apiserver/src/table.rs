//! `meta.k8s.io/v1` Tables: what `kubectl get` prints.

mod age;
mod columns;
mod jsonpath;
mod rows;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::kinds::Resource;
use crate::status::{Cause, Status};

/// How much of each object a row brings along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IncludeObject {
    /// Nothing.
    None,
    /// Its metadata.
    Metadata,
    /// All of it.
    Object,
}

impl IncludeObject {
    /// Parses the `includeObject` query parameter; the default is `Metadata`.
    pub(crate) fn parse(parameter: Option<&str>) -> Result<Self, Status> {
        match parameter {
            None | Some("" | "Metadata") => Ok(Self::Metadata),
            Some("None") => Ok(Self::None),
            Some("Object") => Ok(Self::Object),
            Some(other) => {
                let why = "must be 'Metadata', 'Object', 'None', or empty";
                let cause = Cause::invalid("includeObject", &other.into(), why);
                Err(Status::invalid_kind("meta.k8s.io", "TableOptions", "", vec![cause]))
            }
        }
    }
}

/// A table of objects. `list_metadata` is the list's `metadata`, or that of the one object for a single get.
#[must_use]
pub(crate) fn render(
    resource: &Resource,
    items: &[&Value],
    include: IncludeObject,
    now: Timestamp,
    list_metadata: Value,
    headers: bool,
) -> Value {
    let columns = columns::of(resource);
    let row = rows(resource, include, now);
    let rows: Vec<Value> = items.iter().map(|item| row(item)).collect();
    let definitions: Value =
        if headers { columns.iter().map(columns::Column::definition).collect() } else { Value::Null };
    let mut table =
        json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "columnDefinitions": definitions, "rows": rows});
    table["metadata"] = list_metadata;
    table
}

/// What makes the rows of a table, one by one.
pub(crate) fn rows(resource: &Resource, include: IncludeObject, now: Timestamp) -> impl Fn(&Value) -> Value {
    let columns = columns::of(resource);
    move |item| {
        let object = match include {
            IncludeObject::None => Value::Null,
            IncludeObject::Metadata => partial(item),
            IncludeObject::Object => item.clone(),
        };
        json!({"cells": rows::cells(resource, &columns, item, now), "object": object})
    }
}

/// An object's metadata alone.
#[must_use]
pub(crate) fn partial(object: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"]})
}

#[cfg(test)]
mod tests;
