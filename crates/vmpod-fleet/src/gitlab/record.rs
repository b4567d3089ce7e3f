//! A pool's one record at GitLab: what to do about it, decided from what there is.
//!
//! GitLab shows a record's token once, when it is made or reset. So a crash between the making and the keeping leaves a
//! record whose token nobody has. The pool's marker, in the record's note and its description, finds it again, and a
//! reset by number gives a token to keep. A second record is never made while one with the marker is there.

use std::collections::BTreeSet;
use std::fmt;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

/// Where a record belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Scope {
    /// The whole instance: the token's owner must be an administrator.
    Instance,
    /// A group's projects.
    Group(u64),
    /// One project.
    Project(u64),
}

/// Which jobs a record takes, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// A job needs a part of these.
    pub tags: BTreeSet<String>,
    /// Whether it takes jobs without tags.
    pub run_untagged: bool,
    /// Whether a project's runner stays with that project.
    pub locked: bool,
    /// Whether it takes jobs of protected branches only.
    pub protected: bool,
    /// Seconds after which GitLab ends a job; the project's own limit without.
    pub maximum_timeout: Option<u64>,
}

/// What a pool wants its record to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The pool's UID: the marker.
    pub uid: String,
    /// `NAMESPACE/NAME` of the pool, for people.
    pub name: String,
    /// Where it belongs.
    pub scope: Scope,
    /// Which jobs it takes.
    pub settings: Settings,
}

impl Wanted {
    /// The note that says whose a record is.
    #[must_use]
    pub fn marker(&self) -> String {
        format!("vmpod-pool={}", self.uid)
    }

    /// What people see in GitLab's list of runners.
    #[must_use]
    pub fn description(&self) -> String {
        format!("vmpod pool {} ({})", self.name, self.uid)
    }

    /// Whether a record in a list may be this pool's; its note tells for sure.
    pub(super) fn may_own(&self, description: &str) -> bool {
        description.contains(&self.uid)
    }
}

/// A record that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its number.
    pub id: u64,
    /// Its description.
    pub description: String,
    /// Its maintenance note.
    pub note: String,
    /// Which jobs it takes.
    pub settings: Settings,
    /// Whether somebody stopped it from taking any.
    pub paused: bool,
}

impl Found {
    /// Whether the record says that it is this pool's.
    #[must_use]
    pub fn is_of(&self, wanted: &Wanted) -> bool {
        self.note.lines().any(|line| line.trim() == wanted.marker())
    }

    fn matches(&self, wanted: &Wanted) -> bool {
        // Somebody who pauses the record in GitLab means it: that is never undone here.
        self.settings == wanted.settings && self.description == wanted.description()
    }
}

/// A record's token. It shows nothing of itself.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(String);

impl Token {
    /// A token.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// Its text, for whoever must send it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// What is kept of a record, in a Secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Held {
    /// The record's number.
    pub record: u64,
    /// Its token.
    pub token: Token,
    /// When the token was made.
    pub issued: Timestamp,
    /// When it is none any more; never without.
    pub expires: Option<Timestamp>,
}

impl Held {
    /// When a new token should be made: after three quarters of its life.
    #[must_use]
    pub fn due(&self) -> Option<Timestamp> {
        let life = self.expires?.duration_since(self.issued).max(SignedDuration::ZERO);
        self.issued.checked_add(life / 4 * 3).ok()
    }
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make the record.
    Create,
    /// Give the record a new token and keep that.
    Reset {
        /// Its number.
        id: u64,
        /// Why, for the log and the pool's events.
        why: &'static str,
    },
    /// Change the record to what is wanted.
    Update(u64),
    /// A second record with the pool's marker: remove it if it has no machine.
    RemoveIfUnused(u64),
}

/// Decides about a pool's record.
///
/// `found` are all records with the pool's marker; `refused` says that GitLab does not know the token that is held.
#[must_use]
pub fn plan(wanted: &Wanted, found: &[Found], held: Option<&Held>, refused: bool, now: Timestamp) -> Vec<Step> {
    // The number that was kept is proof enough: people edit notes.
    let is_held = |found: &Found| held.is_some_and(|held| held.record == found.id);
    let mut ours: Vec<&Found> = found.iter().filter(|found| found.is_of(wanted) || is_held(found)).collect();
    ours.sort_by_key(|found| found.id);
    // The one whose token we have; else the first that was made, so that two who decide at once decide the same.
    let chosen = held.and_then(|held| ours.iter().find(|found| found.id == held.record)).or_else(|| ours.first());
    let Some(chosen) = chosen.copied() else { return vec![Step::Create] };
    let mut steps = Vec::new();
    match held.filter(|held| held.record == chosen.id) {
        None => steps.push(Step::Reset { id: chosen.id, why: "the record was there, and its token wasn't" }),
        Some(_) if refused => steps.push(Step::Reset { id: chosen.id, why: "GitLab refuses the token" }),
        Some(held) if held.due().is_some_and(|due| due <= now) => {
            steps.push(Step::Reset { id: chosen.id, why: "the token expires soon" });
        }
        Some(_) => {}
    }
    if !chosen.matches(wanted) || !chosen.is_of(wanted) {
        steps.push(Step::Update(chosen.id));
    }
    steps.extend(ours.iter().filter(|other| other.id != chosen.id).map(|other| Step::RemoveIfUnused(other.id)));
    steps
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn wanted() -> Wanted {
        Wanted {
            uid: "u-1".into(),
            name: "ci/large".into(),
            scope: Scope::Group(7),
            settings: Settings { tags: BTreeSet::from(["large".to_owned()]), ..Settings::default() },
        }
    }

    fn found(id: u64, wanted: &Wanted) -> Found {
        Found {
            id,
            description: wanted.description(),
            note: wanted.marker(),
            settings: wanted.settings.clone(),
            paused: false,
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn held(record: u64) -> Held {
        Held { record, token: Token::new("glrt-1".into()), issued: at(0), expires: Some(at(1000)) }
    }

    #[test]
    fn a_crash_between_making_and_keeping_makes_no_second_record() {
        let wanted = wanted();
        assert_eq!(plan(&wanted, &[], None, false, at(0)), [Step::Create]);
        let left = found(5, &wanted);
        let steps = plan(&wanted, &[left], None, false, at(0));
        assert!(matches!(steps[..], [Step::Reset { id: 5, .. }]), "{steps:?}");
    }

    #[test]
    fn a_token_is_renewed_before_it_expires_and_when_it_is_refused() {
        let wanted = wanted();
        let there = [found(5, &wanted)];
        assert_eq!(plan(&wanted, &there, Some(&held(5)), false, at(749)), []);
        assert!(matches!(plan(&wanted, &there, Some(&held(5)), false, at(750))[..], [Step::Reset { id: 5, .. }]));
        assert!(matches!(plan(&wanted, &there, Some(&held(5)), true, at(1))[..], [Step::Reset { id: 5, .. }]));
        let mut eternal = held(5);
        eternal.expires = None;
        assert_eq!(plan(&wanted, &there, Some(&eternal), false, at(1_000_000)), []);
    }

    #[test]
    fn only_the_settings_of_the_pool_are_put_right() {
        let wanted = wanted();
        let mut other = found(5, &wanted);
        other.paused = true;
        assert_eq!(plan(&wanted, &[other.clone()], Some(&held(5)), false, at(1)), [], "a person paused it");
        other.settings.tags.insert("more".into());
        assert_eq!(plan(&wanted, &[other], Some(&held(5)), false, at(1)), [Step::Update(5)]);
    }

    #[test]
    fn a_token_shows_nothing() {
        assert!(!format!("{:?}", held(1)).contains("glrt"));
    }

    proptest! {
        #[test]
        fn whatever_is_there_one_record_remains_and_strangers_are_left_alone(
            ids in prop::collection::btree_set(1_u64..30, 0..6),
            strangers in prop::collection::btree_set(100_u64..130, 0..4),
            kept in prop::option::of(1_u64..30),
            refused: bool,
        ) {
            let wanted = wanted();
            let other = Wanted { uid: "u-11".into(), ..wanted.clone() };
            let mut all: Vec<Found> = ids.iter().map(|&id| found(id, &wanted)).collect();
            all.extend(strangers.iter().map(|&id| found(id, &other)));
            let steps = plan(&wanted, &all, kept.map(held).as_ref(), refused, at(1));
            let makes = steps.iter().filter(|step| **step == Step::Create).count();
            prop_assert_eq!(makes, usize::from(ids.is_empty()));
            let mut removed = BTreeSet::new();
            for step in &steps {
                match step {
                    Step::Create => {}
                    Step::Reset { id, .. } | Step::Update(id) => prop_assert!(ids.contains(id)),
                    Step::RemoveIfUnused(id) => { prop_assert!(ids.contains(id)); removed.insert(*id); }
                }
            }
            // All but one, and never the one whose token is kept.
            prop_assert_eq!(removed.len(), ids.len().saturating_sub(1));
            if let Some(kept) = kept { prop_assert!(!removed.contains(&kept)); }
        }
    }
}
