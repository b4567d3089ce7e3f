//! What GitLab's API says, parsed at the edge. Fields that nobody needs here are not read.

use std::time::Duration;

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Begun;
use super::record::{Found, Scope, Settings};

/// The answer to a record's making.
#[derive(Deserialize)]
pub(super) struct Created {
    pub(super) id: u64,
    pub(super) token: String,
    #[serde(default)]
    pub(super) token_expires_at: Option<Timestamp>,
}

/// A new token.
#[derive(Deserialize)]
pub(super) struct Token {
    pub(super) token: String,
    #[serde(default)]
    pub(super) token_expires_at: Option<Timestamp>,
}

/// A record in a list.
#[derive(Debug, Deserialize)]
pub(super) struct Listed {
    pub(super) id: u64,
    #[serde(default)]
    pub(super) description: Option<String>,
}

/// A record, whole.
#[derive(Debug, Deserialize)]
pub(super) struct Details {
    id: u64,
    #[serde(default)]
    description: Option<String>,
    #[serde(default)]
    maintenance_note: Option<String>,
    #[serde(default)]
    tag_list: Vec<String>,
    #[serde(default)]
    run_untagged: bool,
    #[serde(default)]
    locked: bool,
    #[serde(default)]
    paused: bool,
    #[serde(default)]
    maximum_timeout: Option<u64>,
    #[serde(default)]
    access_level: Option<String>,
}

impl From<Details> for Found {
    fn from(details: Details) -> Self {
        Self {
            id: details.id,
            description: details.description.unwrap_or_default(),
            note: details.maintenance_note.unwrap_or_default(),
            settings: Settings {
                tags: details.tag_list.into_iter().collect(),
                run_untagged: details.run_untagged,
                locked: details.locked,
                protected: details.access_level.as_deref() == Some("ref_protected"),
                maximum_timeout: details.maximum_timeout,
            },
            paused: details.paused,
        }
    }
}

/// A machine of a record.
#[derive(Debug, Deserialize)]
pub(super) struct Manager {
    pub(super) system_id: String,
    #[serde(default)]
    pub(super) contacted_at: Option<Timestamp>,
    #[serde(default)]
    pub(super) job_execution_status: Option<String>,
}

/// A job in a list.
#[derive(Debug, Deserialize)]
pub(super) struct Job {
    #[serde(default)]
    pub(super) tag_list: Vec<String>,
    #[serde(default)]
    pub(super) created_at: Option<Timestamp>,
    /// How long it has been waiting, in seconds.
    #[serde(default)]
    pub(super) queued_duration: Option<f64>,
}

impl Job {
    /// Whether a record with these settings would take it.
    pub(super) fn fits(&self, settings: &Settings) -> bool {
        let Settings { tags, run_untagged, .. } = settings;
        if self.tag_list.is_empty() { *run_untagged } else { self.tag_list.iter().all(|tag| tags.contains(tag)) }
    }
}

/// A job that a record's machine took.
#[derive(Debug, Deserialize)]
pub(super) struct RunnerJob {
    pub(super) id: u64,
    #[serde(default)]
    status: Option<String>,
    /// How long it waited, in seconds.
    #[serde(default)]
    queued_duration: Option<f64>,
    /// How long it took, or has taken so far, in seconds.
    #[serde(default)]
    duration: Option<f64>,
    #[serde(default)]
    finished_at: Option<Timestamp>,
}

impl From<RunnerJob> for Begun {
    fn from(job: RunnerJob) -> Self {
        let seconds = |number: Option<f64>| number.and_then(|number| Duration::try_from_secs_f64(number).ok());
        let status = job.status.unwrap_or_default();
        // A bounded set of words, whatever GitLab adds: they become labels of metrics.
        let status = if matches!(status.as_str(), "success" | "failed" | "canceled") { status } else { "other".into() };
        let ended = job.finished_at.and(seconds(job.duration)).map(|took| (took, status));
        Self { id: job.id, waited: seconds(job.queued_duration), ended }
    }
}

/// A project in a group's list.
#[derive(Debug, Deserialize)]
pub(super) struct Project {
    pub(super) id: u64,
}

/// The body of the query for jobs that wait for a record.
///
/// The count is limited because GitLab counts row by row; the last of the list, newest first, has waited longest.
pub(super) fn pending_query(record: u64, with_oldest: bool) -> Value {
    let (page, nodes) = if with_oldest { (", last: 1", " nodes { queuedAt }") } else { ("", "") };
    json!({ "query": format!(
        "{{ jobs(statuses: [PENDING], compatibleRunnerId: \"gid://gitlab/Ci::Runner/{record}\"{page}) {{ count(limit: {COUNTED}){nodes} }} }}"
    ) })
}

/// Beyond this many waiting jobs the number doesn't matter.
pub(super) const COUNTED: u32 = 1000;

/// What GraphQL answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pending {
    /// So many wait, the first of them since then.
    Known { count: u32, oldest: Option<Timestamp> },
    /// This GitLab is too old for the question.
    Unsupported,
    /// It was asked in a way that it doesn't like.
    Refused(String),
    /// It didn't show us the jobs: the token may not see them.
    Hidden,
}

/// Reads the answer to [`pending_query`].
pub(super) fn pending(answer: &Value) -> Pending {
    let errors = answer["errors"].as_array().map_or(&[][..], Vec::as_slice);
    if !errors.is_empty() {
        let messages: Vec<&str> = errors.iter().filter_map(|error| error["message"].as_str()).collect();
        return if messages.iter().any(|message| message.contains("compatibleRunnerId")) {
            Pending::Unsupported
        } else {
            Pending::Refused(messages.join("; "))
        };
    }
    let jobs = &answer["data"]["jobs"];
    let Some(count) = jobs["count"].as_u64() else { return Pending::Hidden };
    let queued = jobs["nodes"].as_array().into_iter().flatten().filter_map(|node| node["queuedAt"].as_str());
    Pending::Known {
        count: u32::try_from(count).unwrap_or(u32::MAX),
        oldest: queued.filter_map(|text| text.parse().ok()).min(),
    }
}

/// Where records of a scope are listed: the path and its `type`.
pub(super) fn list_path(scope: Scope) -> (String, &'static str) {
    match scope {
        Scope::Instance => ("runners/all".into(), "instance_type"),
        Scope::Group(id) => (format!("groups/{id}/runners"), "group_type"),
        Scope::Project(id) => (format!("projects/{id}/runners"), "project_type"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_answers_of_graphql() {
        let known = json!({"data": {"jobs": {"count": 3, "nodes": [{"queuedAt": "2026-11-27T06:00:00Z"}]}}});
        let oldest = Some("2026-11-27T06:00:00Z".parse().unwrap());
        assert_eq!(pending(&known), Pending::Known { count: 3, oldest });
        // A zero that was counted is not the same as a count that wasn't shown.
        assert_eq!(pending(&json!({"data": {"jobs": {"count": 0}}})), Pending::Known { count: 0, oldest: None });
        assert_eq!(pending(&json!({"data": {"jobs": null}})), Pending::Hidden);
        assert_eq!(pending(&json!({"data": null})), Pending::Hidden);
        let old = json!({"errors": [{"message": "Field 'jobs' doesn't accept argument 'compatibleRunnerId'"}]});
        assert_eq!(pending(&old), Pending::Unsupported);
        let slow = json!({"errors": [{"message": "Query has complexity of 300"}], "data": null});
        assert_eq!(pending(&slow), Pending::Refused("Query has complexity of 300".into()));
    }

    #[test]
    fn untagged_jobs_are_for_those_who_take_them() {
        let job = |tags: &[&str]| Job {
            tag_list: tags.iter().map(|&tag| tag.to_owned()).collect(),
            created_at: None,
            queued_duration: None,
        };
        let tags = BTreeSet::from(["linux".to_owned(), "large".to_owned()]);
        let tagged = Settings { tags, ..Settings::default() };
        let all = Settings { run_untagged: true, ..tagged.clone() };
        assert!(job(&["linux"]).fits(&tagged) && job(&["large", "linux"]).fits(&tagged));
        assert!(!job(&["linux", "gpu"]).fits(&all));
        assert!(job(&[]).fits(&all) && !job(&[]).fits(&tagged));
    }

    fn anything() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[ -~]{0,12}".prop_map(Value::from),
        ];
        let names = prop::sample::select(vec!["data", "jobs", "count", "nodes", "errors", "message", "queuedAt", "id"]);
        leaf.prop_recursive(5, 32, 4, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map(names.clone().prop_map(str::to_owned), inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_answer_is_read_or_refused(answer in anything()) {
            // A number is only ever what the answer says.
            if let Pending::Known { count, .. } = pending(&answer) {
                prop_assert_eq!(answer["data"]["jobs"]["count"].as_u64().map(|n| u32::try_from(n).unwrap_or(u32::MAX)), Some(count));
            }
            drop(serde_json::from_value::<Manager>(answer.clone()));
            drop(serde_json::from_value::<Details>(answer));
        }
    }
}
