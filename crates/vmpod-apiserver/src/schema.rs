//! What an object may look like: one type model for the kinds built in and for custom resources.
//!
//! Decoding, pruning, strategic merge, field ownership and `OpenAPI` all walk a value beside its [`Type`].
//! The built-in types come from `kinds/wire.txt`; custom ones are made by [`crate::crd`] from structural schemas.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, LazyLock};

/// The type of a value.
#[derive(Clone, Debug)]
pub(crate) enum Type {
    /// A single value.
    Scalar(Scalar),
    /// A list.
    List(Arc<List>),
    /// A map from strings.
    Map(Arc<MapType>),
    /// A struct given in place (custom resources).
    Struct(Arc<Struct>),
    /// A built-in struct, by its name in `wire.txt`.
    Named(&'static str),
    /// Anything: its shape is deduced from the value.
    Any,
}

/// What a single value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scalar {
    /// UTF-8 text.
    String,
    /// true or false.
    Bool,
    /// A 32-bit integer.
    Int32,
    /// A 64-bit integer.
    Int64,
    /// A number.
    Float64,
    /// base64 text.
    Bytes,
    /// `resource.Quantity`.
    Quantity,
    /// `intstr.IntOrString`.
    IntOrString,
    /// RFC 3339, to the second.
    Time,
    /// RFC 3339, to the microsecond.
    MicroTime,
    /// A scalar whose type isn't checked here (custom resources).
    Untyped,
}

/// Who owns what in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Relation {
    /// One owner for the whole list.
    Atomic,
    /// Each value once, each with its owners.
    Set,
    /// Each item is found by the values of these fields.
    Map(Vec<String>),
}

/// A list.
#[derive(Clone, Debug)]
pub(crate) struct List {
    /// The type of each item.
    pub(crate) item: Type,
    /// How items are told apart.
    pub(crate) relation: Relation,
}

/// A map from strings.
#[derive(Clone, Debug)]
pub(crate) struct MapType {
    /// The type of each value.
    pub(crate) value: Type,
    /// One owner for the whole map.
    pub(crate) atomic: bool,
}

/// A struct.
#[derive(Clone, Debug, Default)]
pub(crate) struct Struct {
    /// The short Go name, such as `PodSpec`; empty for custom resources.
    pub(crate) name: String,
    /// The fields by their JSON name.
    pub(crate) fields: BTreeMap<String, Field>,
    /// One owner for the whole struct.
    pub(crate) atomic: bool,
    /// Fields not listed are kept (custom resources).
    pub(crate) open: bool,
}

/// How strategic merge treats a field.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MergeRule {
    /// Lists are merged rather than replaced.
    pub(crate) merge: bool,
    /// Maps are replaced rather than merged.
    pub(crate) replace: bool,
    /// `$retainKeys` may be used.
    pub(crate) retain_keys: bool,
    /// What identifies an item of a merged list of structs.
    pub(crate) key: Option<String>,
}

/// A field of a struct.
#[derive(Clone, Debug)]
pub(crate) struct Field {
    /// Its type.
    pub(crate) ty: Type,
    /// Left out of JSON when empty.
    pub(crate) omit_empty: bool,
    /// Left out of JSON when zero, structs too.
    pub(crate) omit_zero: bool,
    /// Zero and absent differ.
    pub(crate) pointer: bool,
    /// The strategic merge rule.
    pub(crate) rule: MergeRule,
}

impl Field {
    /// A plain optional field of this type, as custom resources have.
    #[must_use]
    pub(crate) fn optional(ty: Type) -> Self {
        Self { ty, omit_empty: true, omit_zero: false, pointer: true, rule: MergeRule::default() }
    }
}

impl Type {
    /// A built-in type by its name in `wire.txt`.
    #[must_use]
    pub(crate) fn named(name: &'static str) -> Self {
        Self::Named(name)
    }

    /// The struct behind this type, if it is one.
    #[must_use]
    pub(crate) fn as_struct(&self) -> Option<&Struct> {
        match self {
            Self::Struct(inner) => Some(inner),
            Self::Named(name) => BUILTIN.get(name),
            _ => None,
        }
    }

    /// The type of the field `name` of this struct or map.
    #[must_use]
    pub(crate) fn child(&self, name: &str) -> Option<&Type> {
        match self {
            Self::Map(map) => Some(&map.value),
            _ => self.as_struct()?.fields.get(name).map(|field| &field.ty),
        }
    }
}

static BUILTIN: LazyLock<HashMap<&'static str, Struct>> = LazyLock::new(|| parse(include_str!("kinds/wire.txt")));

/// All built-in structs by name.
pub(crate) fn builtin() -> &'static HashMap<&'static str, Struct> {
    &BUILTIN
}

fn parse(text: &'static str) -> HashMap<&'static str, Struct> {
    let mut structs = HashMap::new();
    let mut current: Option<(&'static str, Struct)> = None;
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if line.starts_with(' ') {
            let Some(expression) = words.next() else { continue };
            if let Some((_, inner)) = &mut current {
                inner.fields.insert(first.to_owned(), field(expression, words));
            }
        } else {
            if let Some((name, inner)) = current.take() {
                structs.insert(name, inner);
            }
            let short = first.rsplit('.').next().unwrap_or(first);
            let atomic = words.any(|word| word == "atomic");
            current = Some((first, Struct { name: short.to_owned(), atomic, ..Struct::default() }));
        }
    }
    if let Some((name, inner)) = current {
        structs.insert(name, inner);
    }
    structs
}

fn field<'a>(expression: &'static str, flags: impl Iterator<Item = &'a str>) -> Field {
    let mut out =
        Field { ty: Type::Any, omit_empty: false, omit_zero: false, pointer: false, rule: MergeRule::default() };
    let (mut relation, mut keys, mut atomic) = (Relation::Atomic, Vec::new(), false);
    for flag in flags {
        match flag.split_once('=') {
            None if flag == "o" => out.omit_empty = true,
            None if flag == "z" => out.omit_zero = true,
            None if flag == "p" => out.pointer = true,
            None if flag == "a" => atomic = true,
            Some(("s", words)) => {
                for word in words.split(',') {
                    match word {
                        "merge" => out.rule.merge = true,
                        "replace" => out.rule.replace = true,
                        "retainKeys" => out.rule.retain_keys = true,
                        _ => {}
                    }
                }
            }
            Some(("k", key)) => out.rule.key = Some(key.to_owned()),
            Some(("l", "set")) => relation = Relation::Set,
            Some(("m", list)) => keys = list.split(',').map(str::to_owned).collect(),
            _ => {}
        }
    }
    if !keys.is_empty() {
        relation = Relation::Map(keys);
    }
    out.ty = expr(expression, relation, atomic);
    out
}

fn expr(text: &'static str, relation: Relation, atomic: bool) -> Type {
    if let Some(item) = text.strip_prefix("[]") {
        return Type::List(Arc::new(List { item: expr(item, Relation::Atomic, false), relation }));
    }
    if let Some(value) = text.strip_prefix("{}") {
        return Type::Map(Arc::new(MapType { value: expr(value, Relation::Atomic, false), atomic }));
    }
    match text {
        "string" | "duration" => Type::Scalar(Scalar::String),
        "bool" => Type::Scalar(Scalar::Bool),
        "int32" => Type::Scalar(Scalar::Int32),
        "int64" => Type::Scalar(Scalar::Int64),
        "float64" => Type::Scalar(Scalar::Float64),
        "bytes" | "byte" => Type::Scalar(Scalar::Bytes),
        "quantity" => Type::Scalar(Scalar::Quantity),
        "intstr" => Type::Scalar(Scalar::IntOrString),
        "time" => Type::Scalar(Scalar::Time),
        "microtime" => Type::Scalar(Scalar::MicroTime),
        "any" => Type::Any,
        name => Type::Named(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_named_type_is_there() {
        fn check(owner: &str, ty: &Type) {
            match ty {
                Type::Named(name) => {
                    assert!(builtin().contains_key(name), "{owner} names {name}, which isn't in wire.txt");
                }
                Type::List(list) => check(owner, &list.item),
                Type::Map(map) => check(owner, &map.value),
                _ => {}
            }
        }
        for (name, inner) in builtin() {
            for (key, field) in &inner.fields {
                check(&format!("{name}.{key}"), &field.ty);
            }
        }
        assert!(builtin().len() > 200);
    }

    #[test]
    fn containers_merge_by_name_and_ports_are_kept_apart_by_two_keys() {
        let Some(Type::List(ports)) = Type::named("core.Container").child("ports").cloned() else {
            panic!("ports is a list")
        };
        assert_eq!(ports.relation, Relation::Map(vec!["containerPort".into(), "protocol".into()]));
        let spec = Type::named("core.PodSpec");
        let containers = &spec.as_struct().unwrap().fields["containers"];
        assert_eq!(containers.rule.key.as_deref(), Some("name"));
        assert!(containers.rule.merge);
        assert!(spec.child("nonsense").is_none());
    }

    #[test]
    fn an_atomic_struct_says_so() {
        assert!(Type::named("core.ObjectReference").as_struct().unwrap().atomic);
        assert!(!Type::named("core.PodSpec").as_struct().unwrap().atomic);
    }
}
