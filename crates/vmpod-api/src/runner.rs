//! `Runner`: one machine of a pool, from the wish for it to its end.

#![allow(unreachable_pub, reason = "the derive for rules makes a hidden copy of each type")]
#![allow(clippy::duplicated_attributes, reason = "columns of one type look like one attribute given twice")]

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a runner is for. It never changes.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "vmpod.dev",
    version = "v1alpha1",
    kind = "Runner",
    namespaced,
    category = "vmpod",
    status = "RunnerStatus",
    derive = "PartialEq",
    doc = "One machine of a RunnerPool",
    printcolumn(name = "Pool", type_ = "string", json_path = ".spec.pool"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Placement", type_ = "string", json_path = ".spec.placement", priority = 1),
    printcolumn(name = "Why", type_ = "string", json_path = ".status.message"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self == oldSelf").message("a runner is what it was made for: delete it and the pool makes another"))]
pub struct RunnerSpec {
    /// Its pool.
    pub pool: String,
    /// Where its machine runs.
    #[serde(default)]
    pub placement: String,
    /// The pool's template that it was made from.
    pub template: String,
}

/// Where a runner is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// It has no machine yet.
    #[default]
    Pending,
    /// Its machine is being made and boots.
    Starting,
    /// Its machine is up, and the CI system hasn't heard of it.
    Provisioning,
    /// It waits for a job.
    Idle,
    /// It runs a job.
    Busy,
    /// It is to go, after its job.
    Draining,
    /// It did its work.
    Gone,
    /// It never got that far.
    Failed,
}

impl Phase {
    /// Whether it holds no place any more.
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Self::Gone | Self::Failed)
    }
}

/// How a runner is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RunnerStatus {
    /// Where it is in its life.
    #[serde(default)]
    pub phase: Phase,
    /// Since when, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Who it is to the CI system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_id: Option<String>,
    /// Since when it is to go, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draining_since: Option<String>,
}
