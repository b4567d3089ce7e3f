//! `RunnerPool`: a number of CI runners of one kind, kept by the fleet operator.

#![allow(unreachable_pub, reason = "the derive for rules makes a hidden copy of each type")]
#![allow(clippy::duplicated_attributes, reason = "columns of one type look like one attribute given twice")]

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::kubevirt::{KubeVirt, Substrate};
use crate::provision::Provision;

/// What a pool is to be.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "vmpod.dev",
    version = "v1alpha1",
    kind = "RunnerPool",
    namespaced,
    shortname = "rp",
    category = "vmpod",
    status = "RunnerPoolStatus",
    derive = "PartialEq",
    doc = "A pool of CI runners, each a virtual machine",
    scale(
        spec_replicas_path = ".spec.scale.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Runners", type_ = "integer", json_path = ".status.replicas"),
    printcolumn(name = "Idle", type_ = "integer", json_path = ".status.idle"),
    printcolumn(name = "Busy", type_ = "integer", json_path = ".status.busy"),
    printcolumn(
        name = "Pending",
        type_ = "integer",
        json_path = ".status.pendingJobs",
        description = "Jobs that wait"
    ),
    printcolumn(name = "Why", type_ = "string", json_path = ".status.conditions[?(@.type==\"Scaling\")].reason"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.provider.http) || has(self.userData) || has(self.provision)").message("a pool with an http provider needs userData or provision: what its guests run is not known otherwise"))]
#[x_kube(validation = Rule::new("!has(self.kubevirt) || (has(self.substrate) && self.substrate == 'kubevirt')").message("kubevirt says how machines are made on substrate kubevirt: set substrate too"))]
#[x_kube(validation = Rule::new("!has(self.substrate) || self.substrate != 'kubevirt' || (!has(self.provision) && !has(self.start) && (!has(self.userDataBy) || self.userDataBy != 'command'))").message("on substrate kubevirt there is no provision, no start and no userDataBy command: those are of vmpod's own nodes"))]
#[x_kube(validation = Rule::new("!self.image.startsWith('pvc://') || (has(self.substrate) && self.substrate == 'kubevirt')").message("an image that is a volume (pvc://) is for substrate kubevirt"))]
pub struct RunnerPoolSpec {
    /// Where jobs come from.
    pub provider: Provider,
    /// What runs its machines: `pod`, vmpod's own nodes, or `kubevirt`.
    #[serde(default, skip_serializing_if = "is_pod")]
    pub substrate: Substrate,
    /// How machines are made on `KubeVirt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubevirt: Option<KubeVirt>,
    /// The image that a runner's machine boots. On `KubeVirt` it is a containerDisk, or as `pvc://NAMESPACE/NAME` a volume that is cloned.
    pub image: String,
    /// The size of a machine.
    #[serde(default)]
    pub resources: Resources,
    /// How many jobs a machine runs before it is replaced by a clean one.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1000))]
    pub jobs_per_runner: u32,
    /// The user data of a machine, with `$(VMPOD_PROVIDER_URL)`, `$(VMPOD_RUNNER_TOKEN)`, `$(VMPOD_SYSTEM_ID)`,
    /// `$(VMPOD_RUNNER_NAME)` and `$(VMPOD_MAX_JOBS)` replaced. Without it, cloud-config that runs GitLab Runner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data: Option<String>,
    /// How the user data gets to a guest: `seed`, for guests that read one as cloud-init does, or `command`, as the pod's command, for
    /// guests that don't, such as macOS. Then it is a script, and the machine ends with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data_by: Option<UserDataBy>,
    /// What configures a machine after its guest answers: then it starts the runner there, and there is no user data but the pool's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provision: Option<Provision>,
    /// How a machine starts: `auto`, `boot` or `snapshot`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<Start>,
    /// How many runners there are.
    #[serde(default)]
    pub scale: Scale,
    /// When capacity is short, pools of a higher priority come first.
    #[serde(default)]
    pub priority: i32,
    /// Where machines run, filled in order. One without conditions when there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub placements: Vec<Placement>,
    /// A machine without a job that is older than so many seconds is replaced by a new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 300))]
    pub max_age_seconds: Option<u32>,
    /// How a change of the machines is brought about.
    #[serde(default)]
    pub rollout: Rollout,
}

/// Where jobs come from: one of these.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.gitlab) != has(self.http)").message("a pool has one provider: name either gitlab or http"))]
pub struct Provider {
    /// A GitLab.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gitlab: Option<GitLab>,
    /// Anything that tells by HTTP how many jobs wait and which runners have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpQueue>,
}

/// A service that is asked with GET and answers with JSON: `pending`, a number; `oldestSeconds`, how long the first of them
/// has waited, if known; `runners`, an object of runner names with `idle` or `busy`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HttpQueue {
    /// What is asked. `pool=NAMESPACE/NAME` is added to its query.
    #[schemars(length(min = 8, max = 2048))]
    pub url: String,
    /// The Secret with a token that is sent as `Authorization: Bearer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_secret_ref: Option<SecretKey>,
    /// The Secret with what guests get as `$(VMPOD_RUNNER_TOKEN)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runner_token_secret_ref: Option<SecretKey>,
    /// The Secret with certificates to trust beside the system's, PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_secret_ref: Option<SecretKey>,
}

/// A GitLab, and which of its jobs a pool takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(has(self.group) && has(self.project))").message("a runner belongs to a group or to a project, not to both; leave out one of them"))]
#[x_kube(validation = Rule::new("(has(self.runUntagged) && self.runUntagged) || (has(self.tags) && size(self.tags) > 0)").message("a pool without tags takes no job: name tags, or set runUntagged"))]
pub struct GitLab {
    /// Its URL.
    #[schemars(length(min = 8, max = 2048))]
    pub url: String,
    /// The Secret with an access token of scope `create_runner` and `read_api` (`manage_runner` too, where GitLab has it).
    pub token_secret_ref: SecretKey,
    /// The Secret with certificates to trust beside the system's, PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_secret_ref: Option<SecretKey>,
    /// The group, by number, whose runner it is. Without group and project it is the instance's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<u64>,
    /// The project, by number, whose runner it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<u64>,
    /// A job needs a part of these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 50))]
    pub tags: Vec<String>,
    /// Whether it takes jobs without tags.
    #[serde(default)]
    pub run_untagged: bool,
    /// Whether it takes jobs of protected branches only.
    #[serde(default)]
    pub protected: bool,
    /// Projects, by number, to ask one by one for waiting jobs, on a GitLab older than 18.1.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 50))]
    pub projects: Vec<u64>,
}

/// A key of a Secret in the pool's namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SecretKey {
    /// The Secret.
    pub name: String,
    /// The key.
    pub key: String,
}

/// The size of a machine, as Kubernetes quantities.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Resources {
    /// Processors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// Memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// The least size of the first disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
}

/// How user data gets to a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum UserDataBy {
    /// In a seed that the guest reads at its first boot.
    #[default]
    Seed,
    /// As the pod's command, over the guest's login.
    Command,
}

/// How a machine starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Start {
    /// From a memory snapshot where there is one.
    Auto,
    /// It boots.
    Boot,
    /// From a memory snapshot, which is made if there is none.
    Snapshot,
}

impl Start {
    /// The value of the annotation.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Boot => "boot",
            Self::Snapshot => "snapshot",
        }
    }
}

/// How many runners there are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.min <= self.max").message("min must not be greater than max"))]
pub struct Scale {
    /// Never fewer, whatever waits.
    #[serde(default)]
    pub min: u32,
    /// Never more.
    #[serde(default = "ten")]
    pub max: u32,
    /// So many wait for jobs beyond those that are wanted now.
    #[serde(default)]
    pub idle: u32,
    /// Nineteen of twenty jobs should wait less than so many seconds: as many runners wait for jobs as that takes, by the rate
    /// at which jobs come, the time that a machine needs to start and the time that a job takes, as they were of late.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 86400))]
    pub queue_wait_target_seconds: Option<u32>,
    /// At most such a part of the runners, in percent, should have a job: the others are there for the next ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub utilization: Option<u32>,
    /// Other bounds at certain times. Where two hold, the later one in the list decides.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub schedules: Vec<Schedule>,
    /// Exactly so many: what `kubectl scale`, an autoscaler or KEDA writes. Then nothing else of this decides but min and max.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,
    /// How long, in seconds, fewer runners must have been enough before there are fewer.
    #[serde(default = "five_minutes")]
    #[schemars(range(max = 86400))]
    pub scale_down_seconds: u32,
}

impl Default for Scale {
    fn default() -> Self {
        Self {
            min: 0,
            max: ten(),
            idle: 0,
            queue_wait_target_seconds: None,
            utilization: None,
            schedules: Vec::new(),
            replicas: None,
            scale_down_seconds: five_minutes(),
        }
    }
}

/// Bounds that hold from certain times on for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.min) || has(self.max) || has(self.idle)").message("a schedule changes something: name min, max or idle"))]
#[x_kube(validation = Rule::new("!has(self.min) || !has(self.max) || self.min <= self.max").message("min must not be greater than max"))]
pub struct Schedule {
    /// When it begins: minute, hour, day of the month, month, day of the week, as in a crontab.
    #[schemars(length(min = 9, max = 256))]
    pub cron: String,
    /// The time zone of that, as `Asia/Bangkok`; `UTC` without.
    #[serde(default = "utc")]
    #[schemars(length(min = 1, max = 64))]
    pub time_zone: String,
    /// How long it holds, in seconds.
    #[schemars(range(min = 60, max = 604_800))]
    pub seconds: u32,
    /// In place of the pool's `min`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<u32>,
    /// In place of the pool's `max`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<u32>,
    /// In place of the pool's `idle`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle: Option<u32>,
}

fn utc() -> String {
    "UTC".to_owned()
}

/// Where machines run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// Its name, for status and metrics.
    pub name: String,
    /// Most machines there; no limit of its own without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<u32>,
    /// Used only when a job has waited so long, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_seconds: Option<u32>,
    /// With `afterSeconds`: it stays in use until no job has waited that long for so many seconds.
    #[serde(default = "five_minutes")]
    #[schemars(range(max = 86400))]
    pub return_seconds: u32,
    /// Labels that its nodes have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that its machines tolerate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
}

/// How a change of the machines is brought about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rollout {
    /// Machines beyond the wanted number while old ones are replaced.
    #[serde(default = "one")]
    pub max_surge: u32,
    /// Machines below the wanted number while old ones are replaced.
    #[serde(default)]
    pub max_unavailable: u32,
    /// How long, in seconds, a machine that is to go may finish its job.
    #[serde(default = "two_hours")]
    pub drain_seconds: u32,
    /// New machines are made, and old ones aren't replaced.
    #[serde(default)]
    pub paused: bool,
}

impl Default for Rollout {
    fn default() -> Self {
        Self { max_surge: 1, max_unavailable: 0, drain_seconds: two_hours(), paused: false }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_pod(substrate: &Substrate) -> bool {
    *substrate == Substrate::Pod
}

fn one() -> u32 {
    1
}

fn ten() -> u32 {
    10
}

fn five_minutes() -> u32 {
    300
}

fn two_hours() -> u32 {
    7200
}

/// How a pool is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RunnerPoolStatus {
    /// Runners, whatever they do.
    #[serde(default)]
    pub replicas: u32,
    /// Runners that wait for a job.
    #[serde(default)]
    pub idle: u32,
    /// Runners that run a job.
    #[serde(default)]
    pub busy: u32,
    /// Runners on their way.
    #[serde(default)]
    pub starting: u32,
    /// Runners made from the newest template.
    #[serde(default)]
    pub updated: u32,
    /// How many there should be.
    #[serde(default)]
    pub wanted: u32,
    /// Jobs that wait; none when it isn't known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending_jobs: Option<u32>,
    /// Since when the first of them waits, RFC 3339; none when none does or it isn't known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending_since: Option<String>,
    /// Which pods are its machines.
    #[serde(default)]
    pub selector: String,
    /// The newest template.
    #[serde(default)]
    pub template: String,
    /// Runners by placement.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub placements: BTreeMap<String, u32>,
    /// The spec that this speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `ProviderReady`, `Scaling`, `RolledOut`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition>,
}
