//! Machines that `KubeVirt` runs (<https://kubevirt.io/api-reference/>): what is made for a runner, and how it is seen. Pure.
//!
//! To the rest of the operator a machine is a Pod, so what is seen of an instance is told as one.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus, Pod, PodCondition, PodSpec,
    PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::core::ObjectMeta;
use kube::{CustomResource, ResourceExt as _};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vmpod_api::kubevirt::{KubeVirt, Substrate, TypeName};
use vmpod_api::pool::{Placement, RunnerPool, RunnerPoolSpec};
use vmpod_api::runner::Runner;

use crate::objects;
use crate::provider::Keep;

/// The group and version of what is made.
pub const API: &str = "kubevirt.io/v1";
/// An image that is a volume to clone begins with it.
const VOLUME: &str = "pvc://";
/// The names under which the set-up of Windows looks for answers, in a Secret as `KubeVirt` wants it.
const ANSWERS: [&str; 2] = ["autounattend.xml", "unattend.xml"];

/// What is read of a `VirtualMachineInstance`.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "kubevirt.io",
    version = "v1",
    kind = "VirtualMachineInstance",
    plural = "virtualmachineinstances",
    namespaced,
    schema = "disabled",
    status = "InstanceStatus"
)]
pub struct InstanceSpec {}

/// How an instance is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct InstanceStatus {
    /// `Pending`, `Scheduling`, `Scheduled`, `Running`, `Succeeded`, `Failed`, `Unknown`, `WaitingForSync`.
    pub phase: Option<String>,
    /// Why.
    pub reason: Option<String>,
    /// Where it runs.
    pub node_name: Option<String>,
    /// `Ready`, `PodScheduled`, `Synchronized` and others.
    pub conditions: Vec<Condition>,
    /// When it came into each phase.
    pub phase_transition_timestamps: Vec<Transition>,
}

/// A condition of an instance.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// In one word.
    pub reason: Option<String>,
    /// For people.
    pub message: Option<String>,
}

/// When an instance came into a phase.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Transition {
    /// The phase.
    pub phase: Option<String>,
    /// When.
    pub phase_transition_timestamp: Option<Time>,
}

/// Whether `KubeVirt` runs a pool's machines.
#[must_use]
pub fn runs(spec: &RunnerPoolSpec) -> bool {
    spec.substrate == Substrate::Kubevirt
}

/// What a runner's machine is made as: an instance, or where `KubeVirt` has only a `VirtualMachine` for it (instance types, preferences,
/// cloned volumes) one that runs once.
#[must_use]
pub fn kind(spec: &RunnerPoolSpec) -> (&'static str, &'static str) {
    let typed = spec.kubevirt.as_ref().is_some_and(|own| own.instancetype.is_some() || own.preference.is_some());
    if typed || spec.image.starts_with(VOLUME) {
        ("VirtualMachine", "virtualmachines")
    } else {
        ("VirtualMachineInstance", "virtualmachineinstances")
    }
}

/// What a machine's Secret holds beside its user data: the same as answers, where Windows' set-up is to read it.
#[must_use]
pub fn answers(spec: &RunnerPoolSpec, user_data: Option<&str>) -> BTreeMap<String, String> {
    let wanted = runs(spec) && spec.kubevirt.as_ref().is_some_and(|own| own.sysprep);
    let text = user_data.filter(|_| wanted);
    text.into_iter().flat_map(|text| ANSWERS.map(|name| (name.to_owned(), text.to_owned()))).collect()
}

/// A runner's machine, which is given the token that `keep` holds.
#[must_use]
pub fn machine(pool: &RunnerPool, runner: &Runner, keep: &Keep) -> Value {
    let spec = &pool.spec;
    let own = spec.kubevirt.clone().unwrap_or_default();
    let mut metadata = objects::owned(runner);
    metadata.annotations =
        Some([(objects::CREDENTIAL.to_owned(), objects::fingerprint(keep.expose()))].into_iter().collect());
    let (kind, _) = kind(spec);
    let instance = instance(spec, runner, &own);
    if kind == "VirtualMachineInstance" {
        return json!({"apiVersion": API, "kind": kind, "metadata": metadata, "spec": instance});
    }
    let mut machine = json!({
        "runStrategy": "Once",
        // An instance has the labels and annotations of its machine's template.
        "template": {"metadata": {"labels": metadata.labels, "annotations": metadata.annotations}, "spec": instance},
    });
    for (name, chosen) in [("instancetype", &own.instancetype), ("preference", &own.preference)] {
        if let Some(TypeName { name: of, namespaced }) = chosen {
            let kind = match (name, namespaced) {
                ("instancetype", true) => "VirtualMachineInstancetype",
                ("instancetype", false) => "VirtualMachineClusterInstancetype",
                (_, true) => "VirtualMachinePreference",
                (_, false) => "VirtualMachineClusterPreference",
            };
            machine[name] = json!({"kind": kind, "name": of});
        }
    }
    if let Some((namespace, name)) = volume(&spec.image) {
        let mut storage = json!({});
        if let Some(class) = &own.storage_class_name {
            storage["storageClassName"] = class.as_str().into();
        }
        if let Some(size) = &spec.resources.disk {
            storage["resources"] = json!({"requests": {"storage": size}});
        }
        let source = json!({"pvc": {"namespace": namespace.unwrap_or_else(|| runner.namespace().unwrap_or_default()), "name": name}});
        machine["dataVolumeTemplates"] = json!([{
            "metadata": {"name": runner.name_any()},
            "spec": {"source": source, "storage": storage},
        }]);
    }
    json!({"apiVersion": API, "kind": kind, "metadata": metadata, "spec": machine})
}

/// The volume that an image names.
fn volume(image: &str) -> Option<(Option<String>, String)> {
    let rest = image.strip_prefix(VOLUME)?;
    Some(match rest.split_once('/') {
        Some((namespace, name)) => (Some(namespace.to_owned()), name.to_owned()),
        None => (None, rest.to_owned()),
    })
}

fn instance(spec: &RunnerPoolSpec, runner: &Runner, own: &KubeVirt) -> Value {
    let nothing = Placement::default();
    let placement = spec.placements.iter().find(|place| place.name == runner.spec.placement).unwrap_or(&nothing);
    let name = runner.name_any();
    let disk = |name: &str| json!({"name": name, "disk": {"bus": "virtio"}});
    // With a preference it is that which knows what its guest likes.
    let plain = |name: &str| if own.preference.is_some() { json!({"name": name, "disk": {}}) } else { disk(name) };
    let root = match volume(&spec.image) {
        Some(_) => json!({"name": "root", "dataVolume": {"name": name}}),
        None => json!({"name": "root", "containerDisk": {"image": spec.image}}),
    };
    let (seed, seed_disk) = if own.sysprep {
        (
            json!({"name": "seed", "sysprep": {"secret": {"name": name}}}),
            json!({"name": "seed", "cdrom": {"bus": "sata"}}),
        )
    } else {
        (json!({"name": "seed", "cloudInitNoCloud": {"secretRef": {"name": name}}}), plain("seed"))
    };
    let mut domain = json!({
        "devices": {
            "disks": [plain("root"), seed_disk],
            "interfaces": [{"name": "default", "masquerade": {}}],
            "rng": {},
        },
    });
    if own.instancetype.is_none() {
        let amount = objects::amount(spec.resources.cpu.as_deref(), spec.resources.memory.as_deref());
        // A machine has whole processors.
        domain["cpu"] = json!({"cores": amount.millicpus.div_ceil(1000).max(1)});
        if let Some(memory) = &spec.resources.memory {
            domain["memory"] = json!({"guest": memory});
        }
        if let Some(cpu) = &spec.resources.cpu {
            domain["resources"] = json!({"requests": {"cpu": cpu}});
        }
    }
    let mut instance = json!({
        "domain": domain,
        "networks": [{"name": "default", "pod": {}}],
        "volumes": [root, seed],
        // A deletion lets a job finish: the guest ends when its runner has.
        "terminationGracePeriodSeconds": spec.rollout.drain_seconds,
        // An eviction would stop it, or move it; who may is the budget's to say.
        "evictionStrategy": "None",
        "hostname": name,
    });
    if own.ready_port != 0 {
        instance["readinessProbe"] = json!({"tcpSocket": {"port": own.ready_port}, "periodSeconds": 2, "failureThreshold": 3, "timeoutSeconds": 2});
    }
    if !placement.node_selector.is_empty() {
        instance["nodeSelector"] = json!(placement.node_selector);
    }
    if !placement.tolerations.is_empty() {
        instance["tolerations"] = json!(placement.tolerations);
    }
    instance
}

/// What is seen of an instance, told as a Pod.
#[must_use]
pub fn as_pod(instance: &VirtualMachineInstance) -> Pod {
    let nothing = InstanceStatus::default();
    let status = instance.status.as_ref().unwrap_or(&nothing);
    let phase = match status.phase.as_deref() {
        Some(over @ ("Succeeded" | "Failed")) => over,
        Some("Running" | "WaitingForSync" | "Unknown") => "Running",
        _ => "Pending",
    };
    let condition = |kind: &str| status.conditions.iter().find(|condition| condition.kind == kind);
    let told = |kind: &str| {
        condition(kind).map(|condition| PodCondition {
            type_: kind.to_owned(),
            status: condition.status.clone(),
            reason: condition.reason.clone(),
            message: condition.message.clone(),
            ..PodCondition::default()
        })
    };
    // KubeVirt drops this condition once the instance has its place.
    let unplaced = phase == "Pending" && condition("PodScheduled").is_some_and(|condition| condition.status == "False");
    let conditions = [told("Ready").filter(|_| phase == "Running"), told("PodScheduled").filter(|_| unplaced)];
    let finished = status.phase_transition_timestamps.iter().find(|at| at.phase.as_deref() == Some(phase));
    let state = match phase {
        "Succeeded" | "Failed" => ContainerState {
            terminated: Some(ContainerStateTerminated {
                exit_code: i32::from(phase == "Failed"),
                finished_at: finished.and_then(|at| at.phase_transition_timestamp.clone()),
                ..ContainerStateTerminated::default()
            }),
            ..ContainerState::default()
        },
        "Pending" => {
            // What keeps it from running: an image that can't be had shows here.
            let trouble = ["Synchronized", "Provisioning", "Ready"].into_iter().find_map(condition);
            let trouble = trouble.filter(|trouble| trouble.status == "False" && trouble.message.is_some());
            let waiting = trouble
                .filter(|trouble| !matches!(trouble.reason.as_deref(), Some("GuestNotRunning" | "PodNotExists")));
            ContainerState {
                waiting: waiting.map(|trouble| ContainerStateWaiting {
                    reason: trouble.reason.clone(),
                    message: trouble.message.clone(),
                }),
                ..ContainerState::default()
            }
        }
        _ => ContainerState::default(),
    };
    Pod {
        metadata: ObjectMeta { managed_fields: None, ..instance.metadata.clone() },
        spec: Some(PodSpec { node_name: status.node_name.clone(), ..PodSpec::default() }),
        status: Some(PodStatus {
            phase: Some(phase.to_owned()),
            reason: status.reason.clone(),
            conditions: Some(conditions.into_iter().flatten().collect()),
            container_statuses: Some(vec![ContainerStatus {
                name: "runner".to_owned(),
                state: Some(state),
                ..ContainerStatus::default()
            }]),
            ..PodStatus::default()
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::life;

    fn pool(fields: Value) -> RunnerPool {
        let mut spec = json!({
            "provider": {"gitlab": {"url": "https://gitlab.example.com", "tokenSecretRef": {"name": "t", "key": "k"}, "tags": ["a"]}},
            "substrate": "kubevirt",
            "image": "registry.example.com/ci/ubuntu:24.04",
            "resources": {"cpu": "3500m", "memory": "6Gi", "disk": "80Gi"},
            "placements": [{"name": "home", "nodeSelector": {"site": "home"}, "tolerations": [{"key": "ci", "operator": "Exists"}]}],
        });
        if let (Some(spec), Value::Object(fields)) = (spec.as_object_mut(), fields) {
            spec.extend(fields);
        }
        serde_json::from_value(json!({"apiVersion": "vmpod.dev/v1alpha1", "kind": "RunnerPool",
            "metadata": {"name": "large", "namespace": "ci", "uid": "u1"}, "spec": spec}))
        .unwrap()
    }

    fn made(pool: &RunnerPool) -> Value {
        let mut runner = objects::runner(pool, "home");
        runner.metadata.generate_name = None;
        (runner.metadata.name, runner.metadata.uid) = (Some("large-x2x4".to_owned()), Some("u2".to_owned()));
        machine(pool, &runner, &Keep::new("token".to_owned()))
    }

    #[test]
    fn a_machine_of_a_container_disk_is_an_instance() {
        insta::assert_json_snapshot!(made(&pool(json!({}))));
    }

    #[test]
    fn a_machine_of_a_cloned_volume_runs_once() {
        let own = json!({"instancetype": {"name": "u1.large"}, "preference": {"name": "windows.2k22", "namespaced": true},
            "storageClassName": "fast", "sysprep": true, "readyPort": 5986});
        insta::assert_json_snapshot!(made(&pool(json!({"image": "pvc://golden/windows-2022", "kubevirt": own}))));
    }

    #[test]
    fn answers_are_where_kubevirt_looks_for_them_and_nowhere_else() {
        let with = |fields: Value| answers(&pool(fields).spec, Some("<unattend/>"));
        let told = with(json!({"kubevirt": {"sysprep": true}}));
        assert_eq!(
            told.into_iter().collect::<Vec<_>>(),
            ANSWERS.map(|name| (name.to_owned(), "<unattend/>".to_owned()))
        );
        assert!(
            with(json!({})).is_empty() && answers(&pool(json!({"kubevirt": {"sysprep": true}})).spec, None).is_empty()
        );
    }

    #[test]
    fn an_instance_is_seen_as_a_pod() {
        let seen = |status: Value| {
            let instance: VirtualMachineInstance = serde_json::from_value(json!({
                "apiVersion": API, "kind": "VirtualMachineInstance", "metadata": {"name": "a"}, "spec": {"domain": {}}, "status": status}))
            .unwrap();
            objects::seen(Some(&as_pod(&instance)))
        };
        assert_eq!(seen(json!({})), life::Pod::Waiting(None));
        assert_eq!(seen(json!({"phase": "Scheduling"})), life::Pod::Waiting(None));
        let unplaced = json!({"phase": "Scheduling", "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]});
        assert_eq!(seen(unplaced), life::Pod::Unschedulable);
        let pulls = json!({"phase": "Scheduling", "conditions": [{"type": "Synchronized", "status": "False", "reason": "ImagePullBackOff",
            "message": "Back-off pulling image"}]});
        assert_eq!(seen(pulls), life::Pod::Waiting(Some("ImagePullBackOff: Back-off pulling image".to_owned())));
        let running = |ready: &str| json!({"phase": "Running", "nodeName": "n1", "conditions": [{"type": "Ready", "status": ready}]});
        assert_eq!(seen(running("False")), life::Pod::Waiting(None));
        assert_eq!(seen(running("True")), life::Pod::Up);
        assert_eq!(seen(json!({"phase": "Succeeded"})), life::Pod::Succeeded);
        assert_eq!(seen(json!({"phase": "Failed", "reason": "Crashed"})), life::Pod::Failed("Crashed".to_owned()));
        let at = json!({"phase": "Succeeded", "phaseTransitionTimestamps": [
            {"phase": "Running", "phaseTransitionTimestamp": "2026-01-02T03:04:05Z"},
            {"phase": "Succeeded", "phaseTransitionTimestamp": "2026-01-02T04:04:05Z"}]});
        let instance: VirtualMachineInstance = serde_json::from_value(json!({
            "apiVersion": API, "kind": "VirtualMachineInstance", "metadata": {"name": "a"}, "spec": {}, "status": at}))
        .unwrap();
        assert_eq!(objects::ended(&as_pod(&instance)).unwrap().to_string(), "2026-01-02T04:04:05Z");
    }
}
