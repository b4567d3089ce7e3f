//! What the agent reads from a Pod object.

use std::{collections::BTreeMap, fmt};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Pod, PodSpec, ResourceRequirements};
use serde::{Deserialize, Serialize};
use vmpod_machine::MachineId;

use crate::quantity::{self, Nanos};

/// A pod's UID: what makes two pods of one name two pods. It names directories and machines.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct PodUid(String);

/// Why a text is no [`PodUid`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} can't be a pod's UID here: 1 to 52 of a-z, 0-9 and '-' are wanted")]
pub(crate) struct BadUid(String);

impl PodUid {
    pub(crate) fn parse(text: &str) -> Result<Self, BadUid> {
        // A machine's id is the UID, '-' and a number, in at most 63 characters.
        if text.len() <= 52 && MachineId::parse(text).is_ok() {
            Ok(Self(text.to_owned()))
        } else {
            Err(BadUid(text.to_owned()))
        }
    }

    pub(crate) fn of(pod: &Pod) -> Result<Self, BadUid> {
        Self::parse(pod.metadata.uid.as_deref().unwrap_or_default())
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The machine of an attempt.
    pub(crate) fn machine(&self, attempt: u32) -> MachineId {
        MachineId::parse(format!("{}-{attempt}", self.0))
            .expect("a UID of at most 52 characters and a number make a machine id")
    }

    /// The pod and attempt that a machine belongs to, if its name is of our making.
    pub(crate) fn of_machine(id: &MachineId) -> Option<(Self, u32)> {
        let (uid, attempt) = id.as_str().rsplit_once('-')?;
        // Machines that a person named must never be taken for a pod's: UIDs are UUIDs, 36 characters with four dashes.
        let is_uuid = uid.len() == 36
            && uid.bytes().enumerate().all(|(at, byte)| match at {
                8 | 13 | 18 | 23 => byte == b'-',
                _ => byte.is_ascii_hexdigit(),
            });
        is_uuid.then(|| Some((Self::parse(uid).ok()?, attempt.parse().ok()?))).flatten()
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for PodUid {
    type Error = BadUid;

    fn try_from(text: String) -> Result<Self, BadUid> {
        Self::parse(&text)
    }
}

impl From<PodUid> for String {
    fn from(uid: PodUid) -> Self {
        uid.0
    }
}

/// What happens when container 0 ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

impl RestartPolicy {
    pub(crate) fn of(pod: &Pod) -> Self {
        match pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()) {
            Some("Never") => Self::Never,
            Some("OnFailure") => Self::OnFailure,
            _ => Self::Always,
        }
    }

    /// Whether a container that ended with `code` runs again.
    pub(crate) fn restarts(self, code: i32) -> bool {
        match self {
            Self::Always => true,
            Self::OnFailure => code != 0,
            Self::Never => false,
        }
    }
}

pub(crate) fn spec(pod: &Pod) -> Option<&PodSpec> {
    pod.spec.as_ref()
}

/// Container 0: the machine.
pub(crate) fn machine_container(pod: &Pod) -> Option<&Container> {
    spec(pod)?.containers.first()
}

pub(crate) fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

pub(crate) fn namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or("default")
}

pub(crate) fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

/// The guest's host name.
pub(crate) fn hostname(pod: &Pod) -> String {
    let wanted = spec(pod)
        .and_then(|spec| spec.hostname_override.as_deref().or(spec.hostname.as_deref()))
        .filter(|hostname| !hostname.is_empty())
        .unwrap_or_else(|| name(pod));
    // Linux takes 64 bytes; the kubelet cuts at 63 and drops a dangling separator.
    let mut hostname: String = wanted.chars().take(63).collect();
    while hostname.ends_with(['-', '.']) {
        hostname.pop();
    }
    hostname
}

/// The command that container 0 runs in the guest: none when the machine itself is the process.
pub(crate) fn command(container: &Container) -> Option<(&[String], &[String])> {
    let command = container.command.as_deref().unwrap_or_default();
    let args = container.args.as_deref().unwrap_or_default();
    (!command.is_empty() || !args.is_empty()).then_some((command, args))
}

/// What is to be done once container 0 runs.
pub(crate) fn post_start(pod: &Pod) -> Option<&LifecycleHandler> {
    machine_container(pod)?.lifecycle.as_ref()?.post_start.as_ref()
}

/// What is to be done before container 0 is asked to end.
pub(crate) fn pre_stop(pod: &Pod) -> Option<&LifecycleHandler> {
    machine_container(pod)?.lifecycle.as_ref()?.pre_stop.as_ref()
}

/// Whether the machine is there for a command in its guest, and ends with it.
pub(crate) fn has_main(pod: &Pod) -> bool {
    machine_container(pod).is_some_and(|container| command(container).is_some())
}

/// The phase the API shows.
pub(crate) fn api_phase(pod: &Pod) -> Option<&str> {
    pod.status.as_ref()?.phase.as_deref()
}

pub(crate) fn is_terminal_phase(phase: Option<&str>) -> bool {
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// How long the pod's processes get to end, when the pod is being deleted.
pub(crate) fn deletion_grace(pod: &Pod) -> Option<SignedDuration> {
    pod.metadata.deletion_timestamp.as_ref()?;
    let seconds = pod
        .metadata
        .deletion_grace_period_seconds
        .or_else(|| spec(pod)?.termination_grace_period_seconds)
        .unwrap_or(30);
    Some(SignedDuration::from_secs(seconds.max(0)))
}

/// The moment after which the pod may run no longer.
pub(crate) fn active_deadline(pod: &Pod, started: Timestamp) -> Option<Timestamp> {
    let seconds = spec(pod)?.active_deadline_seconds?;
    Some(started.saturating_add(SignedDuration::from_secs(seconds)).unwrap_or(Timestamp::MAX))
}

/// What a pod asks of the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Requests {
    pub(crate) millicpus: u64,
    pub(crate) memory: u64,
    pub(crate) ephemeral: u64,
}

impl Requests {
    /// What the containers need at once (a limit without a request is the request) plus the overhead.
    pub(crate) fn of(pod: &Pod) -> Self {
        let Some(spec) = spec(pod) else { return Self::default() };
        let one = |container: &Container| {
            let resources = container.resources.as_ref();
            Self {
                millicpus: request(resources, "cpu").map_or(0, Nanos::millis_up),
                memory: request(resources, "memory").map_or(0, Nanos::units_up),
                ephemeral: request(resources, "ephemeral-storage").map_or(0, Nanos::units_up),
            }
        };
        let mains = spec.containers.iter().map(one).fold(Self::default(), Self::plus);
        // An init container runs beside the natives before it only; natives run beside everything after them.
        let (mut natives, mut most) = (Self::default(), Self::default());
        for container in spec.init_containers.iter().flatten() {
            let all = natives.plus(one(container));
            if container.restart_policy.as_deref() == Some("Always") {
                natives = all;
            }
            most = most.max(all);
        }
        let mut sum = most.max(mains.plus(natives));
        let overhead = spec.overhead.as_ref();
        sum.millicpus += quantity::of(overhead, "cpu").map_or(0, Nanos::millis_up);
        sum.memory += quantity::of(overhead, "memory").map_or(0, Nanos::units_up);
        sum
    }

    fn max(self, other: Self) -> Self {
        Self {
            millicpus: self.millicpus.max(other.millicpus),
            memory: self.memory.max(other.memory),
            ephemeral: self.ephemeral.max(other.ephemeral),
        }
    }

    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            millicpus: self.millicpus.saturating_add(other.millicpus),
            memory: self.memory.saturating_add(other.memory),
            ephemeral: self.ephemeral.saturating_add(other.ephemeral),
        }
    }
}

/// What a container asks for of a resource: a limit stands in for a request.
pub(crate) fn request(resources: Option<&ResourceRequirements>, name: &str) -> Option<Nanos> {
    let resources = resources?;
    quantity::of(resources.requests.as_ref(), name).or_else(|| quantity::of(resources.limits.as_ref(), name))
}

/// The size of a container: its limit, else its request.
pub(crate) fn size(container: &Container, name: &str) -> Option<Nanos> {
    let resources = container.resources.as_ref()?;
    quantity::of(resources.limits.as_ref(), name).or_else(|| quantity::of(resources.requests.as_ref(), name))
}

/// A map of strings that may be absent.
pub(crate) fn entries(map: Option<&BTreeMap<String, String>>) -> impl Iterator<Item = (&String, &String)> {
    map.into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn machines_are_named_after_pods_and_back() {
        let uid = PodUid::parse("5b0e6f0c-4ac1-4c2a-8d3f-b0a4be0e3f8a").unwrap();
        let id = uid.machine(12);
        assert_eq!(id.as_str(), "5b0e6f0c-4ac1-4c2a-8d3f-b0a4be0e3f8a-12");
        assert_eq!(PodUid::of_machine(&id), Some((uid, 12)));
        for foreign in ["web-1", "5b0e6f0c-4ac1-4c2a-8d3f-b0a4be0e3f8a", "5b0e6f0c04ac1-4c2a-8d3f-b0a4be0e3f8a-1"] {
            assert_eq!(PodUid::of_machine(&MachineId::parse(foreign).unwrap()), None, "{foreign}");
        }
        for bad in ["", "..", "a/b", &"a".repeat(53)] {
            assert!(PodUid::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn requests_add_up_and_limits_stand_in() {
        let pod: Pod = serde_json::from_value(serde_json::json!({"spec": {"containers": [
            {"name": "a", "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "2"}}},
            {"name": "b", "resources": {"limits": {"memory": "1Mi"}}}],
            "overhead": {"memory": "1Mi"}}}))
        .unwrap();
        assert_eq!(Requests::of(&pod), Requests { millicpus: 500, memory: (1 << 30) + (2 << 20), ephemeral: 0 });
        let memory = |bytes: &str| json!({"requests": {"memory": bytes}});
        let inits: Pod = serde_json::from_value(json!({"spec": {
            "initContainers": [
                {"name": "first", "resources": memory("50")},
                {"name": "native", "restartPolicy": "Always", "resources": memory("10")},
                {"name": "second", "resources": memory("45")}],
            "containers": [{"name": "a", "resources": memory("30")}]}}))
        .unwrap();
        // 50 alone, then 10 + 45, then 10 + 30.
        assert_eq!(Requests::of(&inits).memory, 55);
        let container = machine_container(&pod).unwrap();
        assert_eq!(size(container, "cpu").unwrap().units_up(), 2);
        assert_eq!(size(container, "memory").unwrap().units_up(), 1 << 30);
    }

    #[test]
    fn host_names_are_cut_as_the_kubelet_cuts_them() {
        let pod = |name: &str, hostname: Option<&str>| -> Pod {
            serde_json::from_value(
                serde_json::json!({"metadata": {"name": name}, "spec": {"containers": [], "hostname": hostname}}),
            )
            .unwrap()
        };
        assert_eq!(hostname(&pod("web", None)), "web");
        assert_eq!(hostname(&pod("web", Some("db"))), "db");
        assert_eq!(hostname(&pod(&format!("{}-x", "a".repeat(62)), None)), "a".repeat(62));
    }
}
