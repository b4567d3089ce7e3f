//! The one GraphQL query that tells how many jobs wait for a runner.

use axum::Router;
use axum::extract::State as Extract;
use axum::response::Response;
use axum::routing::post;
use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};

use super::Shared;
use super::gate::{administrator, answer};
use super::params::Params;
use super::state::{Job, JobStatus, State};

pub(super) fn router() -> Router<Shared> {
    Router::new().route("/api/graphql", post(query))
}

async fn query(Extract(shared): Extract<Shared>, headers: HeaderMap, params: Params) -> Response {
    let state = shared.state();
    if administrator(&state, &headers).is_err() {
        // GraphQL answers strangers too: with nothing in it.
        return answer(StatusCode::OK, &json!({ "data": { "jobs": null } }));
    }
    let query = params.text("query").unwrap_or_default();
    answer(StatusCode::OK, &run(&state, &query))
}

fn wrong(message: &str) -> Value {
    json!({ "errors": [{ "message": message, "locations": [{ "line": 1, "column": 2 }], "path": ["query", "jobs"] }] })
}

/// The text between two others.
fn between<'a>(text: &'a str, before: &str, after: char) -> Option<&'a str> {
    let (_, rest) = text.split_once(before)?;
    rest.split_once(after).map(|(found, _)| found.trim())
}

fn run(state: &State, query: &str) -> Value {
    let Some(arguments) = between(query, "jobs(", ')') else {
        return wrong("Field 'jobs' is the only one that is scripted");
    };
    if between(arguments, "statuses:", ']').map(|list| list.trim_start_matches('[')) != Some("PENDING") {
        return wrong("only statuses: [PENDING] is scripted");
    }
    let runner = between(arguments, "compatibleRunnerId:", ',')
        .or_else(|| arguments.split_once("compatibleRunnerId:").map(|(_, rest)| rest.trim()));
    let mut waiting: Vec<&Job> = match runner {
        None => state.jobs.values().filter(|job| job.status == JobStatus::Pending).collect(),
        Some(_) if state.config.version < (18, 1) => {
            return wrong("Field 'jobs' doesn't accept argument 'compatibleRunnerId'");
        }
        Some(id) => {
            let id =
                id.trim_matches(['"', '\\']).strip_prefix("gid://gitlab/Ci::Runner/").and_then(|id| id.parse().ok());
            match id.and_then(|id: u64| state.runners.get(&id)) {
                Some(runner) => state.pending(runner).collect(),
                // What doesn't exist has no jobs.
                None => return json!({ "data": { "jobs": { "count": 0, "nodes": [] } } }),
            }
        }
    };
    // The newest first.
    waiting.reverse();
    let mut jobs = json!({});
    if query.contains("count") {
        let limit = between(query, "count(limit:", ')').and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX);
        // One more than the limit says that there are more.
        jobs["count"] = json!(waiting.len().min(limit.saturating_add(1)));
    }
    if query.contains("nodes") {
        let number = |name: &str| {
            arguments.split([',', ' ']).collect::<String>().split_once(name).and_then(|(_, rest)| {
                rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse::<usize>().ok()
            })
        };
        let taken: Vec<&Job> = match (number("first:"), number("last:")) {
            (_, Some(n)) => waiting.iter().skip(waiting.len().saturating_sub(n)).copied().collect(),
            (n, None) => waiting.iter().take(n.unwrap_or(100).min(100)).copied().collect(),
        };
        let node = |job: &&Job| json!({ "id": format!("gid://gitlab/Ci::Build/{}", job.id), "queuedAt": job.created_at, "createdAt": job.created_at });
        jobs["nodes"] = taken.iter().map(node).collect();
    }
    json!({ "data": { "jobs": jobs } })
}
