//! What the API is told about one pod. Pure.

use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{
        ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus,
        HostIP, Pod, PodCondition, PodIP, PodStatus,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};
use serde_json::{Map, Value, json};
use vmpod_machine::{Learnt, LearntFrom};

use crate::{
    backoff::go_seconds,
    plan::{Location, MachineSeen, Observed},
    pod::{self, RestartPolicy},
    record::{Attempt, Ended, Main, Record, StopReason},
    sidecars,
};

/// The conditions that a node agent owns; all others are left alone.
const OWN_CONDITIONS: [&str; 6] =
    ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled", ADDRESS_LEARNT];

/// Whether, how and when the address of a guest was learnt that gets it from somebody else.
const ADDRESS_LEARNT: &str = "vmpod.dev/AddressLearnt";

/// What the pod's status should be, as far as it is the agent's to say.
///
/// A condition whose value hasn't changed since it was `published`, or since what the API shows, keeps its transition time.
pub(crate) fn status(
    pod: &Pod,
    record: &Record,
    seen: &Observed,
    node: IpAddr,
    now: Timestamp,
    published: Option<&PodStatus>,
    crew: Option<&sidecars::View>,
) -> PodStatus {
    let generation = pod.metadata.generation;
    let Some(container) = pod::machine_container(pod) else {
        return PodStatus { phase: Some("Pending".to_owned()), ..PodStatus::default() };
    };
    let never = record.terminal.is_some() && record.attempt.is_none() && record.stop.is_none();
    // With containers beside its machine it was accepted, and one of them ended it before the machine began.
    let refused = never && !record.sidecars;
    if refused {
        let terminal = record.terminal.as_ref();
        // As the kubelet: a refused pod never had containers.
        return PodStatus {
            phase: Some("Failed".to_owned()),
            reason: terminal.and_then(|terminal| terminal.reason.clone()),
            message: terminal.and_then(|terminal| terminal.message.clone()),
            start_time: Some(time(record.accepted)),
            observed_generation: generation,
            ..PodStatus::default()
        };
    }
    let view = View::of(pod, record, seen, crew);
    let phase = view.phase(record, crew);
    let ready = view.ready && record.terminal.is_none();
    let name = &container.name;
    let container_status = ContainerStatus {
        name: name.clone(),
        image: record
            .attempt
            .as_ref()
            .map_or_else(|| container.image.clone().unwrap_or_default(), |a| a.image.name.clone()),
        image_id: record.attempt.as_ref().map(|a| image_id(&a.image.name, &a.image.digest)).unwrap_or_default(),
        container_id: record.machine().map(|id| format!("vmpod://{id}")),
        ready,
        started: Some(view.started && record.terminal.is_none()),
        restart_count: i32::try_from(view.restarts).unwrap_or(i32::MAX),
        state: Some(view.state.clone()),
        last_state: view.last.as_ref().map(terminated_state),
        ..ContainerStatus::default()
    };
    let succeeded = record.terminal.as_ref().map(|terminal| terminal.succeeded);
    let mut statuses = vec![container_status];
    statuses.extend(crew.iter().flat_map(|crew| crew.plain.iter().cloned()));
    let inits = crew.map(|crew| crew.init.clone()).filter(|inits| !inits.is_empty());
    // Natives are asked for their readiness as the others are.
    let natives = inits.iter().flatten().filter(|status| native(pod, &status.name));
    let others = statuses.iter().chain(natives).filter(|status| !status.ready);
    let unready: Vec<_> = others.map(|status| status.name.clone()).collect();
    let incomplete: Vec<_> = match seen.company {
        Some(company) if !company.initialized => {
            let waits = |status: &&ContainerStatus| {
                if native(pod, &status.name) { status.started != Some(true) } else { !status.ready }
            };
            inits.iter().flatten().filter(waits).map(|status| status.name.clone()).collect()
        }
        _ => Vec::new(),
    };
    let known = [published, pod.status.as_ref()]
        .into_iter()
        .flatten()
        .filter_map(|status| status.conditions.as_deref())
        .flatten();
    let mut said = Vec::from(view.conditions(&incomplete, &unready, succeeded, gate(pod)));
    said.extend(located(seen.location));
    said.extend(disrupted(record));
    let conditions = conditions(&known, &said, generation, now);
    let elsewhere = match seen.location {
        Location::Learnt(learnt) => Some(learnt.address),
        Location::Unknown => None,
        Location::Given => seen.company.and_then(|company| company.address),
    };
    let address = record.address.or(elsewhere);
    let address = address.filter(|_| view.has_address).map(|address| address.to_string());
    PodStatus {
        phase: Some(phase.to_owned()),
        reason: record.terminal.as_ref().and_then(|t| t.reason.clone()),
        message: record.terminal.as_ref().and_then(|t| t.message.clone()),
        start_time: Some(time(record.accepted)),
        host_ip: Some(node.to_string()),
        host_ips: Some(vec![HostIP { ip: node.to_string() }]),
        pod_ip: address.clone(),
        pod_ips: address.map(|ip| vec![PodIP { ip }]),
        container_statuses: Some(statuses),
        init_container_statuses: inits,
        conditions: Some(conditions),
        observed_generation: generation,
        ..PodStatus::default()
    }
}

/// Who ends the pod, when it isn't the pod itself: Jobs don't count such an end as a failure (`podFailurePolicy`).
fn disrupted(record: &Record) -> Option<Said> {
    let stop = record.stop.as_ref().filter(|stop| stop.why == StopReason::Evicted)?;
    Some(Said { message: stop.message.clone(), ..Said::yes("DisruptionTarget").because("TerminationByKubelet") })
}

/// What is known of an address that has to be learnt; nothing where it is given.
fn located(location: Location) -> Option<Said> {
    match location {
        Location::Given => None,
        Location::Unknown => {
            let text = "no lease of the guest is known, and it did not speak to its neighbours";
            Some(Said::no(ADDRESS_LEARNT, "NothingHeard", Some(text.to_owned())))
        }
        Location::Learnt(Learnt { address, from, at }) => {
            let (reason, how) = match from {
                LearntFrom::Dhcp(server) => ("DHCP", format!("leased by {server}")),
                LearntFrom::Arp => ("ARP", "by the guest's word to its neighbours".to_owned()),
                LearntFrom::Lease => ("Lease", "leased by this host".to_owned()),
                LearntFrom::Neighbour => ("Neighbour", "from this host's table of its neighbours".to_owned()),
            };
            let at = Timestamp::from_second(at.as_second()).unwrap_or(at);
            let message = Some(format!("{address}, {how}, at {at}"));
            Some(Said { message, ..Said::yes(ADDRESS_LEARNT).because(reason) })
        }
    }
}

/// Whether the API shows this very container as started, and as ready: an agent that comes back goes on from there.
pub(crate) fn shown(pod: &Pod, name: &str, container_id: &str) -> Option<(bool, bool)> {
    let status = pod.status.as_ref()?;
    let all = status.container_statuses.iter().chain(&status.init_container_statuses).flatten();
    let mine = all.into_iter().find(|status| status.name == name)?;
    (mine.container_id.as_deref() == Some(container_id)).then(|| (mine.started.unwrap_or(false), mine.ready))
}

/// Whether an init container runs for as long as the pod does.
fn native(pod: &Pod, name: &str) -> bool {
    let inits = pod::spec(pod).and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default();
    inits.iter().any(|init| init.name == name && init.restart_policy.as_deref() == Some("Always"))
}

/// What the pod's readiness gates say against it, in the kubelet's words (pkg/kubelet/status/generate.go).
fn gate(pod: &Pod) -> Option<String> {
    let gates = pod::spec(pod)?.readiness_gates.as_deref().unwrap_or_default();
    let known = pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let against = gates.iter().filter_map(|gate| {
        let name = &gate.condition_type;
        match known.iter().find(|condition| condition.type_ == *name) {
            None => Some(format!("corresponding condition of pod readiness gate {name:?} does not exist.")),
            Some(condition) if condition.status != "True" => {
                Some(format!("the status of pod readiness gate {name:?} is not \"True\", but {}", condition.status))
            }
            Some(_) => None,
        }
    });
    let against: Vec<String> = against.collect();
    (!against.is_empty()).then(|| against.join(", "))
}

/// An image's identity as the runtime reports it: the repository at the digest.
fn image_id(name: &str, digest: &str) -> String {
    let repository = name.split_once('@').map_or(name, |(repository, _)| repository);
    let repository = match repository.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => repository,
        _ => repository,
    };
    format!("{repository}@{digest}")
}

/// Container 0 in the words of the API.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own, not a state")]
struct View {
    state: ContainerState,
    last: Option<Ended>,
    restarts: u32,
    running: bool,
    started: bool,
    ready: bool,
    has_address: bool,
    sandbox: bool,
}

impl View {
    fn of(pod: &Pod, record: &Record, seen: &Observed, crew: Option<&sidecars::View>) -> Self {
        let attempt = record.attempt.as_ref();
        let ended = attempt.and_then(|attempt| attempt.ended.as_ref());
        let restarts = attempt.map_or(0, |attempt| attempt.number);
        // The network of the containers beside the machine is there before the machine.
        let held = crew.is_some_and(|crew| crew.containers.is_some());
        let base = Self {
            state: ContainerState::default(),
            last: record.previous.clone(),
            restarts,
            running: false,
            started: false,
            ready: false,
            has_address: held || attempt.is_some(),
            sandbox: held,
        };
        if let Some(terminal) = &record.terminal {
            let state = match ended {
                Some(ended) => terminated_state(ended),
                None if record.stop.is_none() => waiting("PodInitializing", None),
                None => never_located(terminal.message.as_deref()),
            };
            return Self { state, ..base };
        }
        let Some(attempt) = attempt else {
            let state = match (seen.company, crew.and_then(|crew| crew.trouble.as_ref())) {
                (_, Some(trouble)) => waiting("ContainerCreating", Some(trouble.message.clone())),
                (Some(company), None) if !company.initialized => waiting("PodInitializing", None),
                _ => waiting_for(seen),
            };
            return Self { state, ..base };
        };
        if let Some(ended) = ended {
            return between_attempts(pod, record, ended, seen, base);
        }
        let live = seen.machine == MachineSeen::Live;
        let has_main = pod::has_main(pod);
        let running_since = running_since(attempt, has_main);
        match running_since {
            Some(since) if live || attempt.started.is_some() => Self {
                state: ContainerState {
                    running: Some(ContainerStateRunning { started_at: Some(time(since)) }),
                    ..ContainerState::default()
                },
                running: true,
                started: !seen.unstarted,
                ready: live
                    && seen.guest_ready
                    && !seen.unready
                    && attempt.unwell.is_none()
                    && !matches!(attempt.main, Main::Ended { .. }),
                sandbox: true,
                ..base
            },
            _ => Self { state: waiting_for(seen), sandbox: live || held, ..base },
        }
    }

    fn phase(&self, record: &Record, crew: Option<&sidecars::View>) -> &'static str {
        let waits = |status: &ContainerStatus| {
            status.last_state.is_none() && status.state.as_ref().is_some_and(|state| state.waiting.is_some())
        };
        match &record.terminal {
            Some(terminal) if terminal.succeeded => "Succeeded",
            Some(_) => "Failed",
            // A container that ran before and waits to run again is a running pod's.
            // As the kubelet: one that has never run holds up the phase.
            None if crew.is_some_and(|crew| crew.plain.iter().any(waits)) => "Pending",
            None if self.running || self.last.is_some() || self.state.terminated.is_some() => "Running",
            None => "Pending",
        }
    }

    /// `gate` is what keeps a pod from being ready whose containers are.
    fn conditions(
        &self,
        incomplete: &[String],
        unready: &[String],
        succeeded: Option<bool>,
        gate: Option<String>,
    ) -> [Said; 5] {
        let ready = unready.is_empty() && incomplete.is_empty();
        let unready = || {
            Said::no("", "ContainersNotReady", Some(format!("containers with unready status: [{}]", unready.join(" "))))
        };
        let (ready, mut initialized) = match succeeded {
            Some(true) => (Said::no("", "PodCompleted", None), Said::yes("").because("PodCompleted")),
            Some(false) => (Said::no("", "PodFailed", None), Said::yes("")),
            None if ready => (Said::yes(""), Said::yes("")),
            None => (unready(), Said::yes("")),
        };
        if succeeded.is_none() && !incomplete.is_empty() {
            let text = format!("containers with incomplete status: [{}]", incomplete.join(" "));
            initialized = Said::no("", "ContainersNotInitialized", Some(text));
        }
        let pod_ready = match gate {
            Some(why) if ready.status => Said::no("", "ReadinessGatesNotReady", Some(why)),
            _ => ready.clone(),
        };
        let sandbox =
            if self.sandbox && succeeded.is_none() { Said::yes("") } else { Said { status: false, ..Said::yes("") } };
        [
            sandbox.named(OWN_CONDITIONS[0]),
            initialized.named(OWN_CONDITIONS[1]),
            pod_ready.named(OWN_CONDITIONS[2]),
            ready.named(OWN_CONDITIONS[3]),
            Said::yes(OWN_CONDITIONS[4]),
        ]
    }
}

fn running_since(attempt: &Attempt, has_main: bool) -> Option<Timestamp> {
    match attempt.main {
        Main::Started(at) => Some(at),
        // Until the machine is gone, its container counts as running: a verdict comes only after that.
        Main::Ended { started, at, .. } => Some(started.unwrap_or(at)),
        Main::Unstarted | Main::Asked if has_main => None,
        Main::Unstarted | Main::Asked => attempt.started,
    }
}

fn between_attempts(pod: &Pod, record: &Record, ended: &Ended, seen: &Observed, base: View) -> View {
    let agent_stopped = record.stop.as_ref().is_some_and(|stop| stop.why == StopReason::Agent);
    if agent_stopped || !RestartPolicy::of(pod).restarts(ended.exit_code) {
        return View { state: terminated_state(ended), ..base };
    }
    let state = match &seen.trouble {
        Some(trouble) => waiting(&trouble.reason, Some(trouble.message.clone())),
        None if record.backoff.until().is_none() => waiting("ContainerCreating", None),
        None => waiting(
            "CrashLoopBackOff",
            Some(format!(
                "back-off {} restarting failed container={} pod={}_{}({})",
                go_seconds(record.backoff.wait()),
                pod::machine_container(pod).map_or("", |container| &container.name),
                record.name,
                record.namespace,
                record.uid
            )),
        ),
    };
    View { state, last: Some(ended.clone()), ..base }
}

fn waiting_for(seen: &Observed) -> ContainerState {
    match (&seen.trouble, &seen.guest) {
        (Some(trouble), _) => waiting(&trouble.reason, Some(trouble.message.clone())),
        (None, Some(guest)) if seen.machine == MachineSeen::Live => waiting("ContainerCreating", Some(guest.clone())),
        _ => waiting("ContainerCreating", None),
    }
}

pub(crate) fn waiting(reason: &str, message: Option<String>) -> ContainerState {
    ContainerState {
        waiting: Some(ContainerStateWaiting { reason: Some(reason.to_owned()), message }),
        ..ContainerState::default()
    }
}

fn terminated_state(ended: &Ended) -> ContainerState {
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: ended.exit_code,
            reason: Some(ended.reason.clone()),
            message: ended.message.clone(),
            // A container that never started began when it ended: clients print this time.
            started_at: Some(time(ended.started.unwrap_or(ended.finished))),
            finished_at: Some(time(ended.finished)),
            container_id: Some(format!("vmpod://{}", ended.machine)),
            signal: None,
        }),
        ..ContainerState::default()
    }
}

/// A container that ended before it began.
fn never_located(message: Option<&str>) -> ContainerState {
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: 137,
            reason: Some("ContainerStatusUnknown".to_owned()),
            message: Some(
                message.unwrap_or("The container could not be located when the pod was terminated").to_owned(),
            ),
            ..ContainerStateTerminated::default()
        }),
        ..ContainerState::default()
    }
}

/// A condition's value.
#[derive(Clone, Debug)]
struct Said {
    kind: &'static str,
    status: bool,
    reason: Option<&'static str>,
    message: Option<String>,
}

impl Said {
    fn yes(kind: &'static str) -> Self {
        Self { kind, status: true, reason: None, message: None }
    }

    fn no(kind: &'static str, reason: &'static str, message: Option<String>) -> Self {
        Self { kind, status: false, reason: Some(reason), message }
    }

    fn because(self, reason: &'static str) -> Self {
        Self { reason: Some(reason), ..self }
    }

    fn named(self, kind: &'static str) -> Self {
        Self { kind, ..self }
    }
}

fn conditions<'a>(
    known: &(impl Iterator<Item = &'a PodCondition> + Clone),
    said: &[Said],
    generation: Option<i64>,
    now: Timestamp,
) -> Vec<PodCondition> {
    said.iter()
        .map(|said| {
            let status = if said.status { "True" } else { "False" };
            // The first word on a condition counts: what was published is newer than what the API shows.
            let same = known.clone().find(|old| old.type_ == said.kind).filter(|old| old.status == status);
            PodCondition {
                type_: said.kind.to_owned(),
                status: status.to_owned(),
                reason: said.reason.map(str::to_owned),
                message: said.message.clone(),
                last_transition_time: same.and_then(|old| old.last_transition_time.clone()).or(Some(time(now))),
                observed_generation: generation,
                ..PodCondition::default()
            }
        })
        .collect()
}

/// Times in the API have whole seconds.
pub(crate) fn time(at: Timestamp) -> Time {
    Time(Timestamp::from_second(at.as_second()).unwrap_or(at))
}

/// The strategic-merge patch that makes the API show `wanted`; none when it does already.
///
/// Only what is the agent's is compared and sent. A field that should be absent is sent as null.
pub(crate) fn patch(pod: &Pod, wanted: &PodStatus) -> Option<Value> {
    const OWN: [&str; 12] = [
        "phase",
        "reason",
        "message",
        "startTime",
        "hostIP",
        "hostIPs",
        "podIP",
        "podIPs",
        "containerStatuses",
        "initContainerStatuses",
        "observedGeneration",
        "conditions",
    ];
    let shown = json_of(pod.status.as_ref());
    let wanted = json_of(Some(wanted));
    let mut changes = Map::new();
    for field in OWN {
        let (old, new) = (shown.get(field), wanted.get(field));
        if field == "conditions" {
            let news = changed_conditions(old, new);
            if !news.is_empty() {
                changes.insert(field.to_owned(), Value::Array(news));
            }
        } else if old != new {
            let value = match (field, old, new) {
                // These lists are merged by their key, so what is to go must be named.
                ("hostIPs" | "podIPs", Some(_), Some(Value::Array(items))) => {
                    let mut items = items.clone();
                    items.push(json!({"$patch": "replace"}));
                    Value::Array(items)
                }
                (_, _, new) => new.cloned().unwrap_or(Value::Null),
            };
            changes.insert(field.to_owned(), value);
        }
    }
    if changes.is_empty() {
        return None;
    }
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    Some(json!({"metadata": {"uid": uid}, "status": changes}))
}

fn json_of(status: Option<&PodStatus>) -> Map<String, Value> {
    match serde_json::to_value(status) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

fn changed_conditions(old: Option<&Value>, new: Option<&Value>) -> Vec<Value> {
    let list = |value: Option<&Value>| value.and_then(Value::as_array).cloned().unwrap_or_default();
    let old = list(old);
    list(new)
        .into_iter()
        .filter_map(|mut condition| {
            let shown = old.iter().find(|shown| shown.get("type") == condition.get("type"));
            let same = |field: &str| shown.is_some_and(|shown| shown.get(field) == condition.get(field));
            if ["status", "reason", "message", "observedGeneration", "lastTransitionTime"].into_iter().all(same) {
                return None;
            }
            // A merge keeps what isn't named.
            if let (Some(shown), Value::Object(condition)) = (shown, &mut condition) {
                for field in ["reason", "message"] {
                    if shown.get(field).is_some() && !condition.contains_key(field) {
                        condition.insert(field.to_owned(), Value::Null);
                    }
                }
            }
            Some(condition)
        })
        .collect()
}

#[cfg(test)]
mod tests;
