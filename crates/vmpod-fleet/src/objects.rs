//! The objects that the operator makes for a runner, and what it reads from those that others made. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container, ContainerStateWaiting, EnvVar, EnvVarSource, Node, Pod as KubePod, PodSpec, ResourceRequirements,
    Secret, SecretKeySelector,
};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{
    Condition, LabelSelector, LabelSelectorRequirement, ObjectMeta, Time,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{Resource as _, ResourceExt as _};
use sha2::{Digest as _, Sha256};
use vmpod_api::annotations;
use vmpod_api::pool::{Placement, RunnerPool, RunnerPoolSpec, UserDataBy};
use vmpod_api::runner::{Runner, RunnerSpec};

use crate::kubevirt;
use crate::life;
use crate::provider::Keep;
use crate::provision::{self, Progress};
use crate::share::Amount;

/// The label that says to which pool something belongs.
pub const POOL: &str = "vmpod.dev/pool";
/// The label that says to which runner something belongs.
pub const RUNNER: &str = "vmpod.dev/runner";
/// Keeps a pool until its runners are gone and its record at the CI system is.
pub const FINALIZER: &str = "vmpod.dev/runners";
/// The label of a pod that may be evicted although it may have a job.
pub const EVICTABLE: &str = "vmpod.dev/evictable";
/// The annotation of a pod that says which token its guest was given, without telling it.
pub const CREDENTIAL: &str = "vmpod.dev/credential";

/// The name of what a runner is made from: a few digits that change whenever its machine would be another.
#[must_use]
pub fn template(spec: &RunnerPoolSpec) -> String {
    let made_of = (&spec.provider, &spec.image, &spec.resources, spec.jobs_per_runner, &spec.user_data, spec.start);
    // Plain data, which JSON can always hold. What is usual isn't in it: pools from before it could be chosen stay as they are.
    let mut text = serde_json::to_string(&made_of).unwrap_or_default();
    if by_command(spec) {
        text.push_str("by command");
    }
    if let Some(provision) = &spec.provision {
        text.push_str(&serde_json::to_string(provision).unwrap_or_default());
    }
    if kubevirt::runs(spec) {
        text.push_str("kubevirt");
        text.push_str(&serde_json::to_string(&spec.kubevirt).unwrap_or_default());
    }
    fingerprint(&text)
}

/// Whether a guest gets its user data as the pod's command.
#[must_use]
pub fn by_command(spec: &RunnerPoolSpec) -> bool {
    spec.user_data_by == Some(UserDataBy::Command)
}

/// Becomes the script in its environment, which no command line shows. The script removes nothing of itself: the machine goes with it.
const BECOME: &str = r#"file=$(mktemp) && printf '%s' "$VMPOD_USER_DATA" >"$file" && chmod 700 "$file" && unset VMPOD_USER_DATA && exec "$file""#;

/// A few digits that tell two texts apart and nothing of what they say.
#[must_use]
pub fn fingerprint(text: &str) -> String {
    let digits = Sha256::digest(text).iter().take(5).fold(0_u64, |digits, byte| (digits << 8) | u64::from(*byte));
    format!("{digits:010x}")
}

/// A new runner of a pool; the API gives it its name.
#[must_use]
pub fn runner(pool: &RunnerPool, placement: &str) -> Runner {
    let mut runner = Runner::new(
        "",
        RunnerSpec { pool: pool.name_any(), placement: placement.to_owned(), template: template(&pool.spec) },
    );
    runner.metadata = ObjectMeta {
        generate_name: Some(format!("{}-", pool.name_any())),
        namespace: pool.namespace(),
        labels: Some(BTreeMap::from([(POOL.to_owned(), pool.name_any())])),
        owner_references: pool.controller_owner_ref(&()).map(|owner| vec![owner]),
        ..ObjectMeta::default()
    };
    runner
}

/// The metadata of what is a runner's and goes with it.
#[must_use]
pub fn owned(runner: &Runner) -> ObjectMeta {
    ObjectMeta {
        name: Some(runner.name_any()),
        namespace: runner.namespace(),
        labels: Some(BTreeMap::from([
            (POOL.to_owned(), runner.spec.pool.clone()),
            (RUNNER.to_owned(), runner.name_any()),
        ])),
        owner_references: runner.controller_owner_ref(&()).map(|owner| vec![owner]),
        ..ObjectMeta::default()
    }
}

/// The key of a runner's Secret.
const USER_DATA: &str = "userdata";

/// The Secret with a runner's user data, and with what its provisioning is told.
#[must_use]
pub fn secret(runner: &Runner, user_data: Option<String>, told: BTreeMap<String, String>) -> Secret {
    let mut texts = told;
    texts.extend(user_data.map(|text| (USER_DATA.to_owned(), text)));
    Secret { metadata: owned(runner), string_data: Some(texts), ..Secret::default() }
}

/// Whether a guest gets user data: one that is configured otherwise gets what its pool has, and nothing by itself.
#[must_use]
pub fn has_user_data(spec: &RunnerPoolSpec) -> bool {
    spec.provision.is_none() || spec.user_data.is_some()
}

/// A runner's machine, which is given the token that `keep` holds.
#[must_use]
pub fn pod(pool: &RunnerPool, runner: &Runner, keep: &Keep) -> KubePod {
    let spec = &pool.spec;
    let nothing = Placement::default();
    let placement = spec.placements.iter().find(|place| place.name == runner.spec.placement).unwrap_or(&nothing);
    let sizes =
        [("cpu", &spec.resources.cpu), ("memory", &spec.resources.memory), ("ephemeral-storage", &spec.resources.disk)];
    let sizes: BTreeMap<String, Quantity> =
        sizes.into_iter().filter_map(|(name, size)| Some((name.to_owned(), Quantity(size.clone()?)))).collect();
    let mut metadata = owned(runner);
    let mut notes = BTreeMap::from([(CREDENTIAL.to_owned(), fingerprint(keep.expose()))]);
    let (mut command, mut env) = (None, None);
    if !has_user_data(spec) {
        // What configures it tells it.
    } else if by_command(spec) {
        command = Some(["/bin/sh", "-c", BECOME].map(ToOwned::to_owned).to_vec());
        let key = SecretKeySelector { name: runner.name_any(), key: USER_DATA.to_owned(), optional: None };
        let source = EnvVarSource { secret_key_ref: Some(key), ..EnvVarSource::default() };
        env = Some(vec![EnvVar { name: "VMPOD_USER_DATA".to_owned(), value_from: Some(source), ..EnvVar::default() }]);
    } else {
        notes.insert(annotations::USER_DATA_SECRET.to_owned(), runner.name_any());
    }
    if let Some(start) = spec.start {
        notes.insert(annotations::START.to_owned(), start.as_str().to_owned());
    }
    metadata.annotations = Some(notes);
    let mut pod = KubePod {
        metadata,
        spec: Some(PodSpec {
            // A clean machine is another runner.
            restart_policy: Some("Never".to_owned()),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            // A deletion lets a job finish: the guest ends when its runner has.
            termination_grace_period_seconds: Some(i64::from(spec.rollout.drain_seconds)),
            node_selector: (!placement.node_selector.is_empty()).then(|| placement.node_selector.clone()),
            tolerations: (!placement.tolerations.is_empty()).then(|| placement.tolerations.clone()),
            containers: vec![Container {
                name: "runner".to_owned(),
                image: Some(spec.image.clone()),
                command,
                env,
                resources: (!sizes.is_empty()).then(|| ResourceRequirements {
                    requests: Some(sizes.clone()),
                    limits: Some(sizes),
                    ..ResourceRequirements::default()
                }),
                ..Container::default()
            }],
            ..PodSpec::default()
        }),
        status: None,
    };
    if let Some(provision) = &spec.provision {
        provision::add(&mut pod, provision, &runner.name_any());
    }
    pod
}

/// The budget that lets nobody evict a pool's pods.
///
/// A number of pods is needed that never is there: budgets of the other form, and percentages, hold only for pods whose owners
/// have a scale (<https://kubernetes.io/docs/tasks/run-application/configure-pdb/#arbitrary-controllers-and-selectors>).
#[must_use]
pub fn budget(pool: &RunnerPool) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: ObjectMeta {
            name: Some(format!("vmpod-pool-{}", pool.name_any())),
            namespace: pool.namespace(),
            labels: Some(BTreeMap::from([(POOL.to_owned(), pool.name_any())])),
            owner_references: pool.controller_owner_ref(&()).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: Some(PodDisruptionBudgetSpec {
            min_available: Some(IntOrString::Int(1_000_000)),
            selector: Some(LabelSelector {
                match_labels: Some(BTreeMap::from([(POOL.to_owned(), pool.name_any())])),
                match_expressions: Some(vec![LabelSelectorRequirement {
                    key: EVICTABLE.to_owned(),
                    operator: "DoesNotExist".to_owned(),
                    values: None,
                }]),
            }),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    }
}

/// What is seen of a runner's pod.
#[must_use]
pub fn seen(pod: Option<&KubePod>) -> life::Pod {
    let Some(status) = pod.and_then(|pod| pod.status.as_ref()) else {
        return if pod.is_some() { life::Pod::Waiting(None) } else { life::Pod::Absent };
    };
    let progress = pod.and_then(provision::progress);
    let condition = |kind: &str| status.conditions.iter().flatten().find(|condition| condition.type_ == kind);
    let container = status.container_statuses.iter().flatten().next();
    match status.phase.as_deref() {
        Some("Succeeded") => life::Pod::Succeeded,
        Some("Failed") => {
            let ended = container.and_then(|c| c.state.as_ref()?.terminated.as_ref());
            let provision = match &progress {
                Some(Progress::Failed(why)) => Some(format!("its provisioning failed: {why}")),
                _ => None,
            };
            let words =
                [status.reason.clone(), status.message.clone(), ended.and_then(|e| e.message.clone()), provision];
            let words: Vec<String> = words.into_iter().flatten().collect();
            life::Pod::Failed(if words.is_empty() { "it ended with an error".to_owned() } else { words.join(": ") })
        }
        _ if condition("Ready").is_some_and(|ready| ready.status == "True") && progress.is_none() => life::Pod::Up,
        _ if pod.is_some_and(provision::machine_ready) && progress.is_some() => match progress {
            Some(Progress::Failed(why)) => life::Pod::Unprovisioned(why),
            Some(Progress::Open(why)) => life::Pod::Configuring(why),
            Some(Progress::Done) | None => life::Pod::Up,
        },
        _ if condition("PodScheduled").is_some_and(|scheduled| scheduled.status == "False") => life::Pod::Unschedulable,
        _ => {
            let waiting = container.and_then(|c| c.state.as_ref()?.waiting.as_ref());
            let why = waiting.and_then(trouble);
            life::Pod::Waiting(why)
        }
    }
}

/// Why a container waits, when that isn't the usual way to its start.
#[must_use]
pub fn trouble(waiting: &ContainerStateWaiting) -> Option<String> {
    let usual = ["ContainerCreating", "PodInitializing", "WaitingForMachine"];
    let reason = waiting.reason.as_ref().filter(|reason| !usual.contains(&reason.as_str()))?;
    Some(waiting.message.as_ref().map_or_else(|| reason.clone(), |message| format!("{reason}: {message}")))
}

/// When a pod's machine ended, if it has.
#[must_use]
pub fn ended(pod: &KubePod) -> Option<Timestamp> {
    let container = pod.status.as_ref()?.container_statuses.as_ref()?.first()?;
    Some(container.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref()?.0)
}

/// What the nodes offer that take pods.
#[must_use]
pub fn capacity<'a>(nodes: impl Iterator<Item = &'a Node>) -> Amount {
    let mut room = Amount::default();
    for node in nodes {
        let off = node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false);
        if let Some(all) = node.status.as_ref().and_then(|status| status.allocatable.as_ref()).filter(|_| !off) {
            let amount = amount(all.get("cpu").map(|q| q.0.as_str()), all.get("memory").map(|q| q.0.as_str()));
            room.millicpus = room.millicpus.saturating_add(amount.millicpus);
            room.memory = room.memory.saturating_add(amount.memory);
        }
    }
    room
}

/// Quantities of processors and memory as numbers; what can't be read counts as nothing.
#[must_use]
pub fn amount(cpu: Option<&str>, memory: Option<&str>) -> Amount {
    Amount {
        millicpus: cpu.and_then(thousandths).unwrap_or(0),
        memory: memory.and_then(thousandths).unwrap_or(0) / 1000,
    }
}

/// A quantity in thousandths, rounded down.
/// Source of the form: <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/>.
fn thousandths(text: &str) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (digits, unit) = text.split_at_checked(split)?;
    let factor: u128 = match unit {
        "m" => 1,
        "" => 1000,
        "k" => 1_000_000,
        "M" => 1_000_000_000,
        "G" => 1_000_000_000_000,
        "T" => 1_000_000_000_000_000,
        "Ki" => 1000 << 10,
        "Mi" => 1000 << 20,
        "Gi" => 1000 << 30,
        "Ti" => 1000 << 40,
        _ => return None,
    };
    let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
    let part = part.get(..part.len().min(9)).unwrap_or_default();
    let scale = 10_u128.checked_pow(u32::try_from(part.len()).ok()?)?;
    let number = |text: &str| if text.is_empty() { Some(0) } else { text.parse::<u128>().ok() };
    let value = number(whole)?.checked_mul(factor)? + number(part)?.checked_mul(factor)? / scale;
    u64::try_from(value).ok()
}

/// Sets a condition; its time changes only with its status.
pub fn set_condition(
    conditions: &mut Vec<Condition>,
    kind: &str,
    holds: bool,
    reason: &str,
    message: String,
    generation: Option<i64>,
    now: Timestamp,
) {
    let status = if holds { "True" } else { "False" };
    let since = conditions
        .iter()
        .find(|condition| condition.type_ == kind && condition.status == status)
        .map_or_else(|| Time(whole_second(now)), |condition| condition.last_transition_time.clone());
    conditions.retain(|condition| condition.type_ != kind);
    conditions.push(Condition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
        observed_generation: generation,
        last_transition_time: since,
    });
    conditions.sort_by(|a, b| a.type_.cmp(&b.type_));
}

/// The API keeps no fractions of a second; with them a status would never be equal to itself.
#[must_use]
pub fn whole_second(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pool() -> RunnerPool {
        serde_json::from_value(json!({
            "apiVersion": "vmpod.dev/v1alpha1", "kind": "RunnerPool",
            "metadata": {"name": "small", "namespace": "ci", "uid": "u1"},
            "spec": {
                "provider": {"gitlab": {"url": "https://gitlab.example.com", "tokenSecretRef": {"name": "t", "key": "k"}, "tags": ["a"]}},
                "image": "debian:12", "start": "snapshot",
                "resources": {"cpu": "2", "memory": "1Gi"},
                "placements": [{"name": "home", "nodeSelector": {"site": "home"}}],
            },
        }))
        .unwrap()
    }

    #[test]
    fn a_runners_objects_are_what_they_were() {
        let pool = pool();
        let mut runner = runner(&pool, "home");
        assert_eq!(runner.metadata.generate_name.take().as_deref(), Some("small-"));
        runner.metadata.name = Some("small-abcde".to_owned());
        runner.metadata.uid = Some("u2".to_owned());
        let secret = secret(&runner, Some("#cloud-config\n".to_owned()), BTreeMap::new());
        insta::assert_json_snapshot!((
            &runner,
            secret,
            pod(&pool, &runner, &Keep::new("token".to_owned())),
            budget(&pool)
        ));
    }

    #[test]
    fn a_template_changes_with_the_machine_and_with_nothing_else() {
        let before = template(&pool().spec);
        let mut other = pool();
        other.spec.scale.max = 99;
        other.spec.rollout.max_surge = 5;
        assert_eq!(template(&other.spec), before);
        other.spec.image = "debian:13".to_owned();
        assert_ne!(template(&other.spec), before);
    }

    #[test]
    fn a_pods_state_is_read() {
        let read = |status: serde_json::Value| {
            seen(Some(&serde_json::from_value(json!({"metadata": {"name": "a"}, "status": status})).unwrap()))
        };
        assert_eq!(seen(None), life::Pod::Absent);
        assert_eq!(read(json!({"phase": "Pending"})), life::Pod::Waiting(None));
        let waiting = json!({"phase": "Pending", "containerStatuses": [{"name": "runner", "image": "x", "imageID": "", "ready": false,
            "restartCount": 0, "state": {"waiting": {"reason": "ErrImagePull", "message": "no"}}}]});
        assert_eq!(read(waiting), life::Pod::Waiting(Some("ErrImagePull: no".to_owned())));
        let full = json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]});
        assert_eq!(read(full), life::Pod::Unschedulable);
        assert_eq!(
            read(json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]})),
            life::Pod::Up
        );
        assert_eq!(read(json!({"phase": "Failed", "reason": "OutOfcpu"})), life::Pod::Failed("OutOfcpu".to_owned()));
    }

    #[test]
    fn quantities_are_numbers() {
        for (text, wanted) in [("500m", 500), ("2", 2000), ("1.5", 1500), ("1Ki", 1_024_000), ("0.1G", 100_000_000_000)]
        {
            assert_eq!(thousandths(text), Some(wanted), "{text}");
        }
        for bad in ["", "x", "1Xi", "-1", "99999999999999999999Ti"] {
            assert!(thousandths(bad).is_none_or(|value| value == 0), "{bad}");
        }
        assert_eq!(amount(Some("2"), Some("1Gi")), Amount { millicpus: 2000, memory: 1 << 30 });
    }
}
