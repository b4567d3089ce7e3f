//! What becomes of an object, given its owners: pure.

use std::sync::Arc;

use serde_json::Value;

use crate::store::Object;

/// The finalizer of an object that waits until its dependents are gone.
pub(super) const FOREGROUND: &str = "foregroundDeletion";
/// The finalizer of an object that waits until its dependents are let go.
pub(super) const ORPHAN: &str = "orphan";

/// One owner reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OwnerRef {
    pub(super) api_version: String,
    pub(super) kind: String,
    pub(super) name: String,
    pub(super) uid: String,
    /// Whether the owner's foreground deletion waits for this dependent.
    pub(super) blocks: bool,
}

/// Whether an owner is there.
#[derive(Clone, Debug)]
pub(super) enum Found {
    There(Arc<Object>),
    Absent,
    /// Its kind can't be looked at.
    Unknown,
}

/// What to do with a dependent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Keep,
    /// Some owners remain: drop the references to those that don't.
    Disown(Vec<String>),
    /// With this propagation policy.
    Delete(&'static str),
}

/// The owners that an object (or its digest) names.
pub(super) fn of(object: &Value) -> Vec<OwnerRef> {
    let references = object["metadata"]["ownerReferences"].as_array().into_iter().flatten();
    references
        .map(|reference| {
            let text = |field: &str| reference[field].as_str().unwrap_or_default().to_owned();
            OwnerRef {
                api_version: text("apiVersion"),
                kind: text("kind"),
                name: text("name"),
                uid: text("uid"),
                blocks: reference["blockOwnerDeletion"] == true,
            }
        })
        .collect()
}

pub(super) fn has_finalizer(object: &Value, finalizer: &str) -> bool {
    object["metadata"]["finalizers"].as_array().is_some_and(|list| list.iter().any(|one| one == finalizer))
}

pub(super) fn fate(owners: &[(OwnerRef, Found)], has_dependents: bool) -> Fate {
    let (mut solid, mut absent, mut waiting) = (false, Vec::new(), Vec::new());
    for (owner, found) in owners {
        match found {
            Found::Absent => absent.push(owner.uid.clone()),
            Found::There(object) if object.is_deleting() && has_finalizer(object.digest(), FOREGROUND) => {
                waiting.push(owner.uid.clone());
            }
            // What can't be looked at may well be there.
            Found::There(_) | Found::Unknown => solid = true,
        }
    }
    let going = [absent, waiting.clone()].concat();
    match (solid, going.is_empty()) {
        (_, true) => Fate::Keep,
        (true, false) => Fate::Disown(going),
        (false, false) if !waiting.is_empty() && has_dependents => Fate::Delete("Foreground"),
        (false, false) => Fate::Delete("Background"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(uid: &str) -> OwnerRef {
        OwnerRef {
            api_version: "v1".into(),
            kind: "ConfigMap".into(),
            name: "x".into(),
            uid: uid.into(),
            blocks: false,
        }
    }

    #[test]
    fn absent_is_not_the_same_as_unknown() {
        assert_eq!(fate(&[], false), Fate::Keep);
        assert_eq!(fate(&[(owner("a"), Found::Absent)], false), Fate::Delete("Background"));
        assert_eq!(fate(&[(owner("a"), Found::Unknown)], false), Fate::Keep);
        assert_eq!(
            fate(&[(owner("a"), Found::Unknown), (owner("b"), Found::Absent)], false),
            Fate::Disown(vec!["b".into()])
        );
    }
}
