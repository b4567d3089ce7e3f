//! Sets of field paths, as `managedFields[].fieldsV1` writes them.
//!
//! An element of a path is kept as it is written: `f:name` for a field, `k:{"name":"vm"}` for an item of a keyed
//! list, `v:"x"` for a value of a set, `i:0` for a position.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::schema::{Relation, Type};

/// A set of field paths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Set(BTreeMap<String, Node>);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Node {
    member: bool,
    below: Set,
}

impl Set {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds one path.
    pub(crate) fn insert(&mut self, path: &[String]) {
        if let Some((first, rest)) = path.split_first() {
            let node = self.0.entry(first.clone()).or_default();
            if rest.is_empty() {
                node.member = true;
            } else {
                node.below.insert(rest);
            }
        }
    }

    /// Whether the element itself is in the set.
    pub(crate) fn has(&self, element: &str) -> bool {
        self.0.get(element).is_some_and(|node| node.member)
    }

    /// What is in the set below an element.
    pub(crate) fn below(&self, element: &str) -> Option<&Self> {
        self.0.get(element).map(|node| &node.below).filter(|below| !below.is_empty())
    }

    /// Everything in either.
    pub(crate) fn union(&self, other: &Self) -> Self {
        let mut out = self.clone();
        for (element, node) in &other.0 {
            let mine = out.0.entry(element.clone()).or_default();
            mine.member |= node.member;
            mine.below = mine.below.union(&node.below);
        }
        out
    }

    fn filtered(&self, other: &Self, keep: fn(bool, bool) -> bool) -> Self {
        let nothing = Node::default();
        let mut out = BTreeMap::new();
        for (element, node) in &self.0 {
            let theirs = other.0.get(element).unwrap_or(&nothing);
            let member = keep(node.member, theirs.member);
            let below = node.below.filtered(&theirs.below, keep);
            if member || !below.is_empty() {
                out.insert(element.clone(), Node { member, below });
            }
        }
        Self(out)
    }

    /// What is here and not there, path by path.
    pub(crate) fn difference(&self, other: &Self) -> Self {
        self.filtered(other, |mine, theirs| mine && !theirs)
    }

    /// What is in both.
    pub(crate) fn intersection(&self, other: &Self) -> Self {
        self.filtered(other, |mine, theirs| mine && theirs)
    }

    /// What is here and neither there nor below a path that is.
    pub(crate) fn without(&self, other: &Self) -> Self {
        let mut out = BTreeMap::new();
        for (element, node) in &self.0 {
            match other.0.get(element) {
                Some(theirs) if theirs.member => {}
                Some(theirs) => {
                    let below = node.below.without(&theirs.below);
                    if node.member || !below.is_empty() {
                        out.insert(element.clone(), Node { member: node.member, below });
                    }
                }
                None => {
                    out.insert(element.clone(), node.clone());
                }
            }
        }
        Self(out)
    }

    /// The set with every struct field on the way to a path added.
    pub(crate) fn with_named_fields(&self, ty: &Type) -> Self {
        let mut out = BTreeMap::new();
        for (element, node) in &self.0 {
            let (named, child) = match element.strip_prefix("f:") {
                Some(name) => {
                    let known = ty.as_struct().is_some_and(|inner| inner.fields.contains_key(name));
                    (known, ty.child(name).cloned())
                }
                None => match ty {
                    Type::List(list) => (false, Some(list.item.clone())),
                    _ => (false, None),
                },
            };
            let below = node.below.with_named_fields(&child.unwrap_or(Type::Any));
            let member = node.member || (named && !below.is_empty());
            out.insert(element.clone(), Node { member, below });
        }
        Self(out)
    }

    /// All the paths, in order.
    pub(crate) fn paths(&self) -> Vec<Vec<String>> {
        fn collect(set: &Set, here: &mut Vec<String>, out: &mut Vec<Vec<String>>) {
            for (element, node) in &set.0 {
                here.push(element.clone());
                if node.member {
                    out.push(here.clone());
                }
                collect(&node.below, here, out);
                here.pop();
            }
        }
        let mut out = Vec::new();
        collect(self, &mut Vec::new(), &mut out);
        out
    }

    /// The set as `fieldsV1`.
    pub(crate) fn to_value(&self) -> Value {
        let mut map = Map::new();
        for (element, node) in &self.0 {
            let mut below = node.below.to_value();
            if node.member
                && !node.below.is_empty()
                && let Some(object) = below.as_object_mut()
            {
                object.insert(".".into(), Value::Object(Map::new()));
            }
            map.insert(element.clone(), below);
        }
        Value::Object(map)
    }

    /// Reads `fieldsV1`; what isn't a path element is an error.
    pub(crate) fn from_value(value: &Value) -> Result<Self, String> {
        let mut out = Self::default();
        let Some(object) = value.as_object() else { return Ok(out) };
        for (element, below) in object {
            if element == "." {
                continue;
            }
            let element = canonical(element)?;
            let inner = Self::from_value(below)?;
            let member = inner.is_empty() || below.get(".").is_some();
            out.0.insert(element, Node { member, below: inner });
        }
        Ok(out)
    }
}

/// Brings an element given by a client into the form used here.
fn canonical(element: &str) -> Result<String, String> {
    let bad = || format!("unknown path element {}", crate::status::quoted(element));
    let (kind, rest) = element.split_once(':').ok_or_else(bad)?;
    match kind {
        "f" => Ok(element.to_owned()),
        "i" => rest.parse::<u32>().map(|index| format!("i:{index}")).map_err(|_| bad()),
        "v" => serde_json::from_str::<Value>(rest).map(|value| format!("v:{value}")).map_err(|_| bad()),
        "k" => {
            let keys: BTreeMap<String, Value> = serde_json::from_str(rest).map_err(|_| bad())?;
            Ok(key_element(&keys))
        }
        _ => Err(bad()),
    }
}

fn key_element(keys: &BTreeMap<String, Value>) -> String {
    let parts: Vec<String> = keys.iter().map(|(key, value)| format!("{}:{value}", Value::from(key.as_str()))).collect();
    format!("k:{{{}}}", parts.join(","))
}

/// The path element of an item of a list.
pub(crate) fn item_element(relation: &Relation, index: usize, item: &Value) -> String {
    match relation {
        Relation::Atomic => format!("i:{index}"),
        Relation::Set => format!("v:{item}"),
        Relation::Map(keys) => {
            let found = keys
                .iter()
                .filter_map(|key| {
                    // The one key with a default in the kinds served.
                    let fallback = (key == "protocol").then(|| Value::from("TCP"));
                    let value = item.get(key).filter(|value| !value.is_null()).cloned().or(fallback)?;
                    Some((key.clone(), value))
                })
                .collect();
            key_element(&found)
        }
    }
}

/// A path as conflicts show it, such as `.spec.containers[name="vm"].image`.
pub(crate) fn shown(path: &[String]) -> String {
    let mut out = String::new();
    for element in path {
        match element.split_once(':') {
            Some(("f", name)) => {
                out.push('.');
                out.push_str(name);
            }
            Some(("v", value)) => out.extend(["[=", value, "]"]),
            Some(("i", index)) => out.extend(["[", index, "]"]),
            Some(("k", keys)) => {
                let keys: BTreeMap<String, Value> = serde_json::from_str(keys).unwrap_or_default();
                let parts: Vec<String> = keys.iter().map(|(key, value)| format!("{key}={value}")).collect();
                out.extend(["[", &parts.join(","), "]"]);
            }
            _ => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn reads_and_writes_the_wire_form() {
        let wire = json!({"f:spec": {"f:containers": {"k:{\"name\":\"vm\"}": {".": {}, "f:image": {}}}, "f:x": {}}});
        let set = Set::from_value(&wire).unwrap();
        assert_eq!(set.to_value(), wire);
        assert_eq!(set.paths().len(), 3);
        assert_eq!(shown(&set.paths()[1]), ".spec.containers[name=\"vm\"].image");
        assert!(Set::from_value(&json!({"nonsense": {}})).is_err());
    }

    #[test]
    fn set_arithmetic() {
        let set = |wire: Value| Set::from_value(&wire).unwrap();
        let a = set(json!({"f:a": {".": {}, "f:b": {}, "f:c": {}}}));
        let b = set(json!({"f:a": {"f:b": {}}}));
        assert_eq!(a.difference(&b), set(json!({"f:a": {".": {}, "f:c": {}}})));
        assert_eq!(a.intersection(&b), b);
        assert_eq!(a.without(&set(json!({"f:a": {}}))), Set::default());
        assert_eq!(b.union(&set(json!({"f:a": {".": {}, "f:c": {}}}))), a);
    }
}
