//! Strategic merge patch: a merge patch that knows which lists are keyed.
//!
//! Directives: `$patch: replace | delete | merge` in maps and list items, `$retainKeys`,
//! `$setElementOrder/FIELD` and `$deleteFromPrimitiveList/FIELD`.

use serde_json::{Map, Value};

use crate::schema::{MergeRule, Type};
use crate::status::quoted;

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const SET_ORDER: &str = "$setElementOrder/";
const DELETE_PRIMITIVES: &str = "$deleteFromPrimitiveList/";

/// Merges a patch into an object of this type.
pub(super) fn merge(ty: &Type, original: Value, patch: Value) -> Result<Value, String> {
    let (Value::Object(original), Value::Object(patch)) = (original, patch) else {
        return Err("Invalid JSON document".to_owned());
    };
    merge_map(ty, original, patch).map(Value::Object)
}

fn rule(ty: &Type, key: &str) -> MergeRule {
    ty.as_struct().and_then(|inner| inner.fields.get(key)).map(|field| field.rule.clone()).unwrap_or_default()
}

fn item_type(ty: &Type, key: &str) -> Type {
    match ty.child(key) {
        Some(Type::List(list)) => list.item.clone(),
        _ => Type::Any,
    }
}

fn merge_map(
    ty: &Type,
    mut original: Map<String, Value>,
    mut patch: Map<String, Value>,
) -> Result<Map<String, Value>, String> {
    match patch.remove(PATCH) {
        None => {}
        Some(word) if word == "merge" => {}
        Some(word) if word == "replace" => return Ok(without_directives(patch)),
        Some(word) if word == "delete" => return Ok(Map::new()),
        Some(word) => return Err(format!("unknown patch type found: {word}")),
    }
    retain_keys(&mut original, &mut patch)?;
    ordered_lists(ty, &mut original, &mut patch)?;
    for (key, value) in patch {
        if let Some(field) = key.strip_prefix(DELETE_PRIMITIVES) {
            let gone = value.as_array().ok_or_else(|| not_a_list(&key))?;
            if let Some(Value::Array(items)) = original.get_mut(field) {
                items.retain(|item| !gone.contains(item));
            }
            continue;
        }
        if value.is_null() {
            original.remove(&key);
            continue;
        }
        let rule = rule(ty, &key);
        let merged = match (original.remove(&key), value) {
            (Some(Value::Object(before)), Value::Object(after)) => {
                if rule.replace {
                    Some(Value::Object(without_directives(after)))
                } else {
                    let child = ty.child(&key).cloned().unwrap_or(Type::Any);
                    Some(Value::Object(merge_map(&child, before, after)?))
                }
            }
            (Some(Value::Array(before)), Value::Array(after)) if rule.merge => {
                Some(Value::Array(merge_list(&item_type(ty, &key), rule.key.as_deref(), &before, after)?))
            }
            (_, after) => clean(after),
        };
        if let Some(merged) = merged {
            original.insert(key, merged);
        }
    }
    Ok(original)
}

fn not_a_list(key: &str) -> String {
    format!("expected a list for {}", quoted(key))
}

fn retain_keys(original: &mut Map<String, Value>, patch: &mut Map<String, Value>) -> Result<(), String> {
    let Some(keys) = patch.remove(RETAIN_KEYS) else { return Ok(()) };
    let keys = keys.as_array().ok_or_else(|| not_a_list(RETAIN_KEYS))?;
    let listed = |key: &str| keys.iter().any(|one| one == key);
    if let Some(stray) = patch.keys().find(|key| !key.starts_with('$') && !listed(key) && !patch[*key].is_null()) {
        return Err(format!("the $retainKeys list doesn't name {}, which the patch sets", quoted(stray)));
    }
    original.retain(|key, _| listed(key));
    Ok(())
}

/// Lists with a `$setElementOrder/…` beside them.
fn ordered_lists(ty: &Type, original: &mut Map<String, Value>, patch: &mut Map<String, Value>) -> Result<(), String> {
    let directives: Vec<String> = patch.keys().filter(|key| key.starts_with(SET_ORDER)).cloned().collect();
    for directive in directives {
        let Some(order) = patch.remove(&directive) else { continue };
        let Value::Array(order) = order else { return Err(not_a_list(&directive)) };
        let field = &directive[SET_ORDER.len()..];
        let rule = rule(ty, field);
        let gone = patch.remove(&format!("{DELETE_PRIMITIVES}{field}"));
        let before = match original.get(field) {
            Some(Value::Array(items)) => Some(items.clone()),
            _ => None,
        };
        let given = match patch.remove(field) {
            Some(Value::Array(items)) => Some(items),
            Some(Value::Null) => {
                original.remove(field);
                continue;
            }
            Some(_) => return Err(not_a_list(field)),
            None => None,
        };
        if let Some(given) = &given {
            check_order(given, &order, rule.key.as_deref(), field)?;
        }
        let mut merged = match (before.clone(), given) {
            (Some(before), None) => before,
            (None, Some(given)) => given.into_iter().filter_map(clean).collect(),
            (Some(before), Some(given)) if rule.merge => {
                merge_list(&item_type(ty, field), rule.key.as_deref(), &before, given)?
            }
            (Some(_), Some(given)) => given,
            (None, None) => continue,
        };
        if let Some(gone) = gone.as_ref().and_then(Value::as_array) {
            merged.retain(|item| !gone.contains(item));
        }
        let merged = in_order(merged, &order, before.as_deref().unwrap_or_default(), rule.key.as_deref());
        original.insert(field.to_owned(), Value::Array(merged));
    }
    Ok(())
}

fn check_order(given: &[Value], order: &[Value], key: Option<&str>, field: &str) -> Result<(), String> {
    let mut from = 0;
    for item in given.iter().filter(|item| item.get(PATCH).is_none()) {
        match order.iter().skip(from).position(|one| same(one, item, key)) {
            Some(at) => from += at + 1,
            None => {
                return Err(format!(
                    "The order in patch list:\n{}\n doesn't match {SET_ORDER}{field} list:\n{}\n",
                    Value::from(given),
                    Value::from(order)
                ));
            }
        }
    }
    Ok(())
}

/// Whether two items of a list are the same one.
fn same(a: &Value, b: &Value, key: Option<&str>) -> bool {
    match key {
        Some(key) => a.get(key).is_some() && a.get(key) == b.get(key),
        None => a == b,
    }
}

fn merge_list(item: &Type, key: Option<&str>, before: &[Value], patch: Vec<Value>) -> Result<Vec<Value>, String> {
    let maps = before.iter().chain(&patch).any(Value::is_object);
    let Some(key) = key.filter(|_| maps) else {
        if maps {
            return Err("a list of maps is merged by a key, and this one has none".to_owned());
        }
        let mut merged = before.to_vec();
        for value in &patch {
            if !merged.contains(value) {
                merged.push(value.clone());
            }
        }
        merged.dedup();
        return Ok(in_order(merged, &patch, before, None));
    };
    let mut original = before.to_vec();
    let (mut plain, mut replace) = (Vec::new(), false);
    for one in patch {
        let Some(directive) = one.get(PATCH).cloned() else {
            if !one.is_object() {
                return Err(format!("a list merged by {} holds something that is no map: {one}", quoted(key)));
            }
            if one.get(key).is_none() {
                return Err(format!("map: {one} does not contain declared merge key: {key}"));
            }
            plain.push(one);
            continue;
        };
        match directive.as_str() {
            Some("delete") => {
                let Some(wanted) = one.get(key) else {
                    return Err(format!("map: {one} does not contain declared merge key: {key}"));
                };
                original.retain(|item| item.get(key) != Some(wanted));
            }
            Some("replace") => replace = true,
            _ => return Err(format!("unknown patch type found: {directive}")),
        }
    }
    if replace {
        return Ok(plain.into_iter().filter_map(clean).collect());
    }
    let mut merged = original;
    for one in &plain {
        match merged.iter_mut().find(|item| item.get(key) == one.get(key)) {
            Some(found) => {
                if let (Value::Object(old), Value::Object(new)) = (found.clone(), one.clone()) {
                    *found = Value::Object(merge_map(item, old, new)?);
                }
            }
            None => merged.extend(clean(one.clone())),
        }
    }
    Ok(in_order(merged, &plain, before, Some(key)))
}

/// Items that the patch names in the patch's order, the others where the server had them, as well as both can be.
fn in_order(merged: Vec<Value>, order: &[Value], server: &[Value], key: Option<&str>) -> Vec<Value> {
    let place = |list: &[Value], item: &Value| list.iter().position(|one| same(one, item, key));
    let (mut named, mut others): (Vec<Value>, Vec<Value>) =
        merged.into_iter().partition(|item| place(order, item).is_some());
    named.sort_by_key(|item| place(order, item));
    others.sort_by_key(|item| place(server, item).unwrap_or(usize::MAX));
    let mut out = Vec::with_capacity(named.len() + others.len());
    let (mut named, mut others) = (named.into_iter().peekable(), others.into_iter().peekable());
    loop {
        let first = match (named.peek(), others.peek()) {
            (Some(mine), Some(theirs)) => {
                matches!((place(server, theirs), place(server, mine)), (Some(left), Some(right)) if left < right)
            }
            (None, Some(_)) => true,
            (Some(_), None) => false,
            (None, None) => return out,
        };
        out.extend(if first { others.next() } else { named.next() });
    }
}

/// A value that only the patch has: without nulls and directives, and not at all when it says `$patch: delete`.
fn clean(value: Value) -> Option<Value> {
    match value {
        Value::Null => None,
        Value::Object(entries) => {
            if entries.get(PATCH).is_some_and(|word| word == "delete") {
                return None;
            }
            Some(Value::Object(without_directives(entries)))
        }
        Value::Array(items) => Some(Value::Array(items.into_iter().filter_map(clean).collect())),
        other => Some(other),
    }
}

fn without_directives(entries: Map<String, Value>) -> Map<String, Value> {
    let directive = |key: &str| {
        key == PATCH || key == RETAIN_KEYS || key.starts_with(SET_ORDER) || key.starts_with(DELETE_PRIMITIVES)
    };
    entries
        .into_iter()
        .filter(|(key, _)| !directive(key))
        .filter_map(|(key, value)| clean(value).map(|value| (key, value)))
        .collect()
}
