//! Values beside their types: what differs between two, which fields one has, merging and removing.

use serde_json::{Map, Value};

use super::set::{Set, item_element};
use crate::schema::{Relation, Type};

/// What differs between an old and a new value.
#[derive(Clone, Debug, Default)]
pub(crate) struct Comparison {
    pub(crate) added: Set,
    pub(crate) modified: Set,
    pub(crate) removed: Set,
}

impl Comparison {
    pub(crate) fn is_same(&self) -> bool {
        self.added.is_empty() && self.modified.is_empty() && self.removed.is_empty()
    }
}

/// How a value is treated, given its type and what it is.
enum Shape<'a> {
    Leaf,
    List(&'a Type, &'a Relation),
    Fields,
}

static ANY: Type = Type::Any;

fn shape<'a>(ty: &'a Type, value: &Value) -> Shape<'a> {
    match ty {
        Type::List(list) if list.relation != Relation::Atomic => Shape::List(&list.item, &list.relation),
        Type::Map(map) if !map.atomic => Shape::Fields,
        Type::Named(_) | Type::Struct(_) if ty.as_struct().is_some_and(|inner| !inner.atomic) => Shape::Fields,
        Type::Any if value.is_object() => Shape::Fields,
        _ => Shape::Leaf,
    }
}

fn child<'a>(ty: &'a Type, name: &str) -> &'a Type {
    ty.child(name).unwrap_or(&ANY)
}

/// Compares two values of one type.
pub(crate) fn compare(ty: &Type, old: &Value, new: &Value) -> Comparison {
    let mut out = Comparison::default();
    walk(ty, Some(old), Some(new), &mut Vec::new(), &mut out);
    out
}

fn walk(ty: &Type, old: Option<&Value>, new: Option<&Value>, path: &mut Vec<String>, out: &mut Comparison) {
    let Some(sample) = new.filter(|value| !value.is_null()).or(old).or(new) else { return };
    let empty = |value: Option<&Value>| match value {
        Some(Value::Array(items)) => items.is_empty(),
        Some(Value::Object(entries)) => entries.is_empty(),
        None | Some(Value::Null) => true,
        Some(_) => false,
    };
    let deduced_mismatch = matches!(ty, Type::Any)
        && old.is_some_and(|old| !old.is_null())
        && new.is_some_and(|new| !new.is_null())
        && old.map(Value::is_object) != new.map(Value::is_object);
    let shape = shape(ty, sample);
    if matches!(shape, Shape::Leaf) || (empty(old) && empty(new)) || deduced_mismatch {
        match (old, new) {
            (None, _) => out.added.insert(path),
            (_, None) => out.removed.insert(path),
            (Some(old), Some(new)) if old != new => out.modified.insert(path),
            _ => {}
        }
        return;
    }
    match shape {
        Shape::Leaf => {}
        Shape::Fields => {
            let nothing = Map::new();
            let before = old.and_then(Value::as_object).unwrap_or(&nothing);
            let after = new.and_then(Value::as_object).unwrap_or(&nothing);
            let mut names: Vec<&String> = before.keys().chain(after.keys()).collect();
            names.sort();
            names.dedup();
            for name in names {
                path.push(format!("f:{name}"));
                walk(child(ty, name), before.get(name), after.get(name), path, out);
                path.pop();
            }
        }
        Shape::List(item, relation) => list_items(item, relation, old, new, path, out),
    }
    match (old, new) {
        (None, _) => out.added.insert(path),
        (_, None) => out.removed.insert(path),
        _ => {}
    }
}

fn list_items(
    item: &Type,
    relation: &Relation,
    old: Option<&Value>,
    new: Option<&Value>,
    path: &mut Vec<String>,
    out: &mut Comparison,
) {
    let (before, after) = (indexed(relation, old), indexed(relation, new));
    let mut elements: Vec<&String> = before.iter().chain(&after).map(|(element, _)| element).collect();
    elements.sort();
    elements.dedup();
    for element in elements {
        let (mine, theirs) = (found(&before, element), found(&after, element));
        path.push(element.clone());
        if mine.len() <= 1 && theirs.len() <= 1 {
            walk(item, mine.first().copied(), theirs.first().copied(), path, out);
        } else if mine != theirs {
            match (mine.is_empty(), theirs.is_empty()) {
                (true, _) => out.added.insert(path),
                (_, true) => out.removed.insert(path),
                _ => out.modified.insert(path),
            }
        }
        path.pop();
    }
}

fn indexed<'a>(relation: &Relation, value: Option<&'a Value>) -> Vec<(String, &'a Value)> {
    keyed(relation, value.and_then(Value::as_array).map_or(&[][..], Vec::as_slice))
}

fn found<'a>(list: &[(String, &'a Value)], element: &str) -> Vec<&'a Value> {
    list.iter().filter(|(one, _)| one == element).map(|(_, value)| *value).collect()
}

/// The fields that a value has: what its applier will own.
pub(crate) fn fields(ty: &Type, value: &Value) -> Set {
    let mut out = Set::default();
    collect(ty, value, &mut Vec::new(), &mut out);
    out
}

fn collect(ty: &Type, value: &Value, path: &mut Vec<String>, out: &mut Set) {
    match shape(ty, value) {
        Shape::Leaf => out.insert(path),
        Shape::List(item, relation) => {
            for (index, one) in value.as_array().map_or(&[][..], Vec::as_slice).iter().enumerate() {
                path.push(item_element(relation, index, one));
                collect(item, one, path, out);
                out.insert(path);
                path.pop();
            }
        }
        Shape::Fields => {
            for (name, one) in value.as_object().into_iter().flatten() {
                path.push(format!("f:{name}"));
                collect(child(ty, name), one, path, out);
                let named = ty.as_struct().is_some_and(|inner| inner.fields.contains_key(name));
                if one.is_null() || one.as_object().is_some_and(Map::is_empty) || !named {
                    out.insert(path);
                }
                path.pop();
            }
        }
    }
}

/// What is given in `applied` wins over what is in `live`; keyed lists are merged item by item.
pub(crate) fn merge(ty: &Type, live: &Value, applied: &Value) -> Value {
    if applied.is_null() || live.is_null() {
        return applied.clone();
    }
    match shape(ty, applied) {
        Shape::Leaf => applied.clone(),
        Shape::Fields => {
            let (Some(before), Some(after)) = (live.as_object(), applied.as_object()) else { return applied.clone() };
            let mut out = before.clone();
            for (name, value) in after {
                let merged = match before.get(name) {
                    Some(old) => merge(child(ty, name), old, value),
                    None => value.clone(),
                };
                out.insert(name.clone(), merged);
            }
            Value::Object(out)
        }
        Shape::List(item, relation) => {
            let (Some(before), Some(after)) = (live.as_array(), applied.as_array()) else { return applied.clone() };
            merge_lists(item, relation, before, after)
        }
    }
}

/// Items of `after` in their order; those only in `before` stay where they were among the items of both.
fn merge_lists(item: &Type, relation: &Relation, before: &[Value], after: &[Value]) -> Value {
    let (old, new) = (keyed(relation, before), keyed(relation, after));
    let mut out = Vec::with_capacity(old.len() + new.len());
    let (mut left, mut right) = (0, 0);
    while left < old.len() || right < new.len() {
        if let Some((element, value)) = old.get(left)
            && !new.iter().any(|(one, _)| one == element)
        {
            out.push((*value).clone());
            left += 1;
            continue;
        }
        let Some((element, value)) = new.get(right) else { break };
        right += 1;
        match old.iter().find(|(one, _)| one == element) {
            Some((_, live)) => {
                out.push(merge(item, live, value));
                left += 1;
            }
            None => out.push((*value).clone()),
        }
    }
    Value::Array(out)
}

fn keyed<'a>(relation: &Relation, list: &'a [Value]) -> Vec<(String, &'a Value)> {
    list.iter().enumerate().map(|(index, one)| (item_element(relation, index, one), one)).collect()
}

/// The value without the fields of a set.
pub(crate) fn remove(ty: &Type, value: &Value, fields: &Set) -> Value {
    match shape(ty, value) {
        Shape::Leaf => value.clone(),
        Shape::Fields => {
            let Some(entries) = value.as_object() else { return value.clone() };
            let mut out = Map::new();
            for (name, one) in entries {
                let element = format!("f:{name}");
                if fields.has(&element) {
                    continue;
                }
                let kept = match fields.below(&element) {
                    Some(below) => remove(child(ty, name), one, below),
                    None => one.clone(),
                };
                let emptied = is_empty(&kept) && !is_empty(one);
                if !emptied {
                    out.insert(name.clone(), kept);
                }
            }
            Value::Object(out)
        }
        Shape::List(item, relation) => {
            let Some(items) = value.as_array() else { return value.clone() };
            let mut out = Vec::new();
            for (index, one) in items.iter().enumerate() {
                let element = item_element(relation, index, one);
                if fields.has(&element) {
                    continue;
                }
                out.push(match fields.below(&element) {
                    Some(below) => remove(item, one, below),
                    None => one.clone(),
                });
            }
            Value::Array(out)
        }
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        _ => false,
    }
}

/// The first path of a value that its type doesn't have.
pub(crate) fn undeclared(ty: &Type, value: &Value, path: &mut Vec<String>) -> Option<String> {
    match value {
        Value::Object(entries) => {
            let inner = ty.as_struct();
            for (name, one) in entries {
                path.push(format!("f:{name}"));
                let known = inner.is_none_or(|inner| inner.open || inner.fields.contains_key(name));
                if !known {
                    return Some(super::set::shown(path));
                }
                if let Some(found) = undeclared(child(ty, name), one, path) {
                    return Some(found);
                }
                path.pop();
            }
            None
        }
        Value::Array(items) => {
            let Type::List(list) = ty else { return None };
            for (index, one) in items.iter().enumerate() {
                path.push(item_element(&list.relation, index, one));
                if let Some(found) = undeclared(&list.item, one, path) {
                    return Some(found);
                }
                path.pop();
            }
            None
        }
        _ => None,
    }
}
