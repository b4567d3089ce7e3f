//! The containers beside a pod's machine: which of them run, in which order, and what the API is told of them. Pure, over what
//! the Docker API has of the pod; [`crew`] does it.
//!
//! ```text
//!  sandbox ─▶ init containers, one after the other ─▶ machine and plain containers ─▶ … all over or stopped ─▶ natives ─▶ quiet
//!             (a native one, restartPolicy Always, only has to be started)                                      in reverse
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStatus, Pod,
};

use vmpod_api::annotations;

use crate::{
    backoff::{Backoff, go_seconds},
    docker::{Life, LifeEnd, LifeState},
    pod::{self, RestartPolicy},
    probe::Failed,
    status::{time, waiting},
};

mod body;
mod crew;
mod jobs;
mod logs;
mod session;

pub(crate) use crew::{Crew, Engine};
pub(crate) use logs::open as open_log;
pub(crate) use session::{Terminal, carry};

/// What a container is for its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Runs to its end before anything else.
    Init,
    /// Runs from before the machine until after it: an init container with restartPolicy Always.
    Native,
    /// Runs as the machine does.
    Plain,
}

/// A container beside the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member<'a> {
    pub(crate) role: Role,
    pub(crate) container: &'a Container,
    /// It starts only when the machine's guest answers.
    pub(crate) after: bool,
}

/// The containers beside the machine: init containers in their order, then the others.
pub(crate) fn members(pod: &Pod) -> Vec<Member<'_>> {
    let Some(spec) = pod::spec(pod) else { return Vec::new() };
    let inits = spec.init_containers.iter().flatten().map(|container| {
        let role = if container.restart_policy.as_deref() == Some("Always") { Role::Native } else { Role::Init };
        Member { role, container, after: false }
    });
    let after: Vec<&str> = after_machine(pod).collect();
    let plain = spec.containers.iter().skip(1).map(|container| Member {
        role: Role::Plain,
        container,
        after: after.contains(&container.name.as_str()),
    });
    inits.chain(plain).collect()
}

/// The names of the containers that start only when the machine's guest answers.
pub(crate) fn after_machine(pod: &Pod) -> impl Iterator<Item = &str> {
    let names = pod::annotation(pod, annotations::AFTER_MACHINE).unwrap_or_default();
    names.split(',').map(str::trim).filter(|name| !name.is_empty())
}

/// Whether a pod has containers beside its machine.
pub(crate) fn any(pod: &Pod) -> bool {
    pod::spec(pod).is_some_and(|spec| {
        spec.containers.len() > 1 || spec.init_containers.as_ref().is_some_and(|list| !list.is_empty())
    })
}

/// How far the pod's machine is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum MachineWord {
    /// It was never made: the pod isn't initialized.
    #[default]
    Unbegun,
    /// It runs, or will run again.
    Lives,
    /// It won't run any more.
    Over,
}

/// What the pod's worker wants of its containers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wish {
    /// None when the API has the pod no more: nothing may stay.
    pub(crate) pod: Option<Arc<Pod>>,
    pub(crate) machine: MachineWord,
    /// Its guest answers now.
    pub(crate) answers: bool,
    /// The pod is to stop, by then.
    pub(crate) stop: Option<Timestamp>,
    /// The verdict on the pod is written down: only logs are still of use.
    pub(crate) over: bool,
}

/// What is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// There is a network of the pod's, or what holds it.
    pub(crate) sandbox: bool,
    /// The pod's network is held.
    pub(crate) held: bool,
    /// By container, in order of their attempts.
    pub(crate) lives: BTreeMap<String, Vec<Life>>,
    pub(crate) health: BTreeMap<String, Health>,
    pub(crate) backoff: BTreeMap<String, Backoff>,
    /// What failed and will be tried again; under [`SANDBOX`] that is the pod's network.
    pub(crate) trouble: BTreeMap<String, Trouble>,
    /// What is being made or started.
    pub(crate) busy: BTreeSet<String>,
    /// What is being stopped, and when it is killed.
    pub(crate) stopping: BTreeMap<String, Timestamp>,
}

/// In place of a container's name, which is a DNS label.
pub(crate) const SANDBOX: &str = "";

/// What probes and the postStart hook say of a container that runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Health {
    pub(crate) started: bool,
    pub(crate) ready: bool,
    pub(crate) failed: Option<Failed>,
}

/// What failed, in words that users of Kubernetes know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trouble {
    pub(crate) reason: String,
    pub(crate) message: String,
    pub(crate) retry: Timestamp,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Make the pod's network and hold it.
    Sandbox,
    /// Make and start a container.
    Run { name: String, attempt: u32 },
    /// Run its preStop hook, ask it to end, kill it at the deadline.
    Stop { name: String, id: String, deadline: Timestamp },
    /// Remove a life that is long past.
    Clear { id: String },
    /// Give back the pod's network.
    Leave,
}

/// Things to do, and when to look again at the latest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) acts: Vec<Act>,
    pub(crate) wake: Option<Timestamp>,
}

impl Plan {
    fn wake_at(&mut self, at: Timestamp) {
        self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
    }
}

/// What the pod's worker sees of the containers.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct View {
    /// The engine has been asked at least once.
    pub(crate) known: bool,
    pub(crate) company: Company,
    pub(crate) init: Vec<ContainerStatus>,
    pub(crate) plain: Vec<ContainerStatus>,
    /// What keeps the pod from having a network.
    pub(crate) trouble: Option<Trouble>,
    /// The running and the last life of each container.
    pub(crate) lives: BTreeMap<String, Vec<Life>>,
    /// The address that the containers share.
    pub(crate) containers: Option<Ipv4Addr>,
}

/// What the machine's plan needs to know of the containers beside it.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own, not a state")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Company {
    /// Where the machine listens so that they reach it.
    pub(crate) address: Option<Ipv4Addr>,
    /// The init containers are through.
    pub(crate) initialized: bool,
    /// An init container failed for good.
    pub(crate) doomed: bool,
    /// The plain containers are over for good: whether all succeeded.
    pub(crate) over: Option<bool>,
    /// None runs.
    pub(crate) quiet: bool,
    /// Nothing is left of any.
    pub(crate) gone: bool,
}

impl Member<'_> {
    fn name(&self) -> &str {
        &self.container.name
    }

    /// Whether it runs again after an end with `code`.
    fn restarts(&self, policy: RestartPolicy, code: i32) -> bool {
        match self.role {
            Role::Init => code != 0 && policy != RestartPolicy::Never,
            Role::Native => true,
            Role::Plain => policy.restarts(code),
        }
    }
}

impl Seen {
    fn life(&self, name: &str) -> Option<&Life> {
        self.lives.get(name)?.last()
    }

    fn end(&self, name: &str) -> Option<&LifeEnd> {
        match &self.life(name)?.state {
            LifeState::Ended(end) => Some(end),
            LifeState::Created | LifeState::Running(_) => None,
        }
    }

    fn runs(&self, name: &str) -> bool {
        matches!(self.life(name).map(|life| &life.state), Some(LifeState::Running(_)))
    }

    fn started(&self, name: &str) -> bool {
        self.runs(name) && self.health.get(name).is_some_and(|health| health.started)
    }
}

/// Whether the machine and the plain containers have begun, so that the init containers need never run again.
fn begun(members: &[Member<'_>], wish: &Wish, seen: &Seen) -> bool {
    let plain = members.iter().filter(|member| member.role == Role::Plain);
    wish.machine != MachineWord::Unbegun || plain.into_iter().any(|member| seen.life(member.name()).is_some())
}

fn initialized(members: &[Member<'_>], wish: &Wish, seen: &Seen) -> bool {
    begun(members, wish, seen)
        || members.iter().all(|member| match member.role {
            Role::Init => seen.end(member.name()).is_some_and(|end| end.code == 0),
            Role::Native => seen.started(member.name()),
            Role::Plain => true,
        })
}

/// Whether an init container failed and isn't tried again.
fn doomed(members: &[Member<'_>], policy: RestartPolicy, wish: &Wish, seen: &Seen) -> bool {
    policy == RestartPolicy::Never
        && !begun(members, wish, seen)
        && members
            .iter()
            .any(|member| member.role == Role::Init && seen.end(member.name()).is_some_and(|end| end.code != 0))
}

/// Whether the plain containers are over for good, and all succeeded.
fn over(members: &[Member<'_>], policy: RestartPolicy, wish: &Wish, seen: &Seen) -> Option<bool> {
    let stopped = wish.stop.is_some();
    let mut all = true;
    for member in members.iter().filter(|member| member.role == Role::Plain) {
        match seen.end(member.name()) {
            Some(end) if stopped || !member.restarts(policy, end.code) => all &= end.code == 0,
            // What never ran and never will has not done its work.
            None if (stopped || held_back(member, wish, seen) && wish.machine == MachineWord::Over)
                && !seen.runs(member.name()) =>
            {
                all = false;
            }
            _ => return None,
        }
    }
    Some(all)
}

/// Whether a container waits for the machine's guest.
fn held_back(member: &Member<'_>, wish: &Wish, seen: &Seen) -> bool {
    member.after && !wish.answers && seen.life(member.name()).is_none()
}

/// Names the next things to do.
pub(crate) fn plan(pod: &Pod, wish: &Wish, seen: &Seen, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let members = members(pod);
    for lives in seen.lives.values() {
        // Logs can be asked for of the current life and of the one before it.
        let past = lives.len().saturating_sub(2);
        plan.acts.extend(lives[..past].iter().map(|life| Act::Clear { id: life.id.clone() }));
    }
    if wish.over {
        if seen.sandbox && !seen.busy.contains(SANDBOX) {
            attempt(seen, SANDBOX, now, &mut plan, Act::Leave);
        }
        return plan;
    }
    let policy = RestartPolicy::of(pod);
    let stopped = wish.stop.is_some();
    let finished = wish.machine == MachineWord::Over && over(&members, policy, wish, seen).is_some();
    if stopped || finished || doomed(&members, policy, wish, seen) {
        stop_all(pod, &members, wish, seen, now, &mut plan);
        return plan;
    }
    if !seen.held {
        let mut any = false;
        for member in members.iter().filter(|member| seen.runs(member.name())) {
            // It runs in a network that nothing else is in any more.
            any = true;
            stop(pod, member.name(), None, seen, now, &mut plan);
        }
        if !any && !seen.busy.contains(SANDBOX) {
            attempt(seen, SANDBOX, now, &mut plan, Act::Sandbox);
        }
        return plan;
    }
    let begun = begun(&members, wish, seen);
    for member in &members {
        if member.role == Role::Init && begun {
            continue;
        }
        let name = member.name();
        if !held_back(member, wish, seen) {
            keep(pod, member, policy, seen, now, &mut plan);
        }
        let through = match member.role {
            Role::Init => seen.end(name).is_some_and(|end| end.code == 0),
            Role::Native => begun || seen.started(name),
            Role::Plain => true,
        };
        if !through {
            break;
        }
    }
    plan
}

/// Makes sure that a container runs, if it should.
fn keep(pod: &Pod, member: &Member<'_>, policy: RestartPolicy, seen: &Seen, now: Timestamp, plan: &mut Plan) {
    let name = member.name();
    if seen.busy.contains(name) {
        return;
    }
    let run = |attempt| Act::Run { name: name.to_owned(), attempt };
    match seen.life(name).map(|life| (life.attempt, &life.state)) {
        None => attempt(seen, name, now, plan, run(0)),
        Some((number, LifeState::Created)) => attempt(seen, name, now, plan, run(number)),
        Some((number, LifeState::Ended(end))) if member.restarts(policy, end.code) => {
            match seen.backoff.get(name).and_then(Backoff::until) {
                Some(until) if until > now => plan.wake_at(until),
                _ => attempt(seen, name, now, plan, run(number + 1)),
            }
        }
        Some((_, LifeState::Ended(_))) => {}
        Some((_, LifeState::Running(_))) => {
            if let Some(failed) = seen.health.get(name).and_then(|health| health.failed.as_ref()) {
                stop(pod, name, failed.grace, seen, now, plan);
            }
        }
    }
}

/// Does something, unless its last failure is too young.
fn attempt(seen: &Seen, name: &str, now: Timestamp, plan: &mut Plan, act: Act) {
    match seen.trouble.get(name) {
        Some(trouble) if trouble.retry > now => plan.wake_at(trouble.retry),
        _ => plan.acts.push(act),
    }
}

/// Stops what runs: natives only when all else is over, the last of them first.
fn stop_all(pod: &Pod, members: &[Member<'_>], wish: &Wish, seen: &Seen, now: Timestamp, plan: &mut Plan) {
    let deadline = wish.stop.map(|deadline| deadline.duration_since(now).max(SignedDuration::ZERO));
    let mut others = wish.machine == MachineWord::Lives;
    for member in members.iter().filter(|member| member.role != Role::Native && seen.runs(member.name())) {
        others = true;
        stop(pod, member.name(), deadline, seen, now, plan);
    }
    if !others && let Some(last) = members.iter().rfind(|member| seen.runs(member.name())) {
        stop(pod, last.name(), deadline, seen, now, plan);
    }
}

/// Stops a container within `grace` (without one, the pod's), unless it is being stopped as soon or sooner.
fn stop(pod: &Pod, name: &str, grace: Option<SignedDuration>, seen: &Seen, now: Timestamp, plan: &mut Plan) {
    let Some(life) = seen.life(name) else { return };
    let pods = pod::spec(pod).and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30).max(0);
    let deadline = now.saturating_add(grace.unwrap_or(SignedDuration::from_secs(pods))).unwrap_or(Timestamp::MAX);
    // A grace that was given is counted anew at each look: only one that ends clearly sooner is another.
    let sooner = |known: &Timestamp| deadline.saturating_add(SignedDuration::from_secs(1)).is_ok_and(|at| at < *known);
    if seen.stopping.get(name).is_none_or(sooner) {
        plan.acts.push(Act::Stop { name: name.to_owned(), id: life.id.clone(), deadline });
    }
}

/// What the worker is shown. Address and knowledge of the engine are the caller's to add.
pub(crate) fn view(pod: &Pod, wish: &Wish, seen: &Seen, now: Timestamp) -> View {
    let members = members(pod);
    let policy = RestartPolicy::of(pod);
    let initialized = initialized(&members, wish, seen);
    let company = Company {
        address: None,
        initialized,
        doomed: doomed(&members, policy, wish, seen),
        over: over(&members, policy, wish, seen),
        quiet: seen.busy.is_empty() && !members.iter().any(|member| seen.runs(member.name())),
        gone: false,
    };
    let statuses = |inits: bool| -> Vec<ContainerStatus> {
        let chosen = members.iter().filter(|member| (member.role != Role::Plain) == inits);
        chosen.map(|member| container_status(pod, member, policy, initialized, wish, seen, now)).collect()
    };
    View {
        known: false,
        company,
        init: statuses(true),
        plain: statuses(false),
        trouble: seen.trouble.get(SANDBOX).cloned(),
        lives: seen.lives.clone(),
        containers: None,
    }
}

fn container_status(
    pod: &Pod,
    member: &Member<'_>,
    policy: RestartPolicy,
    initialized: bool,
    wish: &Wish,
    seen: &Seen,
    now: Timestamp,
) -> ContainerStatus {
    let name = member.name();
    let ends = wish.over || wish.stop.is_some();
    let lives = seen.lives.get(name).map(Vec::as_slice).unwrap_or_default();
    let current = lives.last();
    let health = seen.health.get(name);
    let previous = lives.iter().rev().nth(1).and_then(terminated);
    let trouble = seen.trouble.get(name).map(|trouble| waiting(&trouble.reason, Some(trouble.message.clone())));
    let trouble = trouble.or_else(|| {
        let held = initialized && held_back(member, wish, seen);
        held.then(|| waiting("WaitingForMachine", Some("it starts when the machine's guest answers".to_owned())))
    });
    let making = if initialized || member.role != Role::Plain && current.is_some() {
        "ContainerCreating"
    } else {
        "PodInitializing"
    };
    let (state, last) = match current.map(|life| (life, &life.state)) {
        Some((_, LifeState::Running(since))) => {
            let running = Some(ContainerStateRunning { started_at: Some(time(*since)) });
            (ContainerState { running, ..ContainerState::default() }, previous)
        }
        Some((life, LifeState::Ended(end))) if !ends && member.restarts(policy, end.code) => {
            let state = trouble.unwrap_or_else(|| match seen.backoff.get(name) {
                Some(backoff) if backoff.until().is_some_and(|until| until > now) => waiting(
                    "CrashLoopBackOff",
                    Some(format!(
                        "back-off {} restarting failed container={name} pod={}_{}({})",
                        go_seconds(backoff.wait()),
                        pod::name(pod),
                        pod::namespace(pod),
                        pod.metadata.uid.as_deref().unwrap_or_default()
                    )),
                ),
                _ => waiting(making, None),
            });
            (state, terminated(life))
        }
        Some((life, LifeState::Ended(_))) => (terminated(life).unwrap_or_default(), previous),
        Some((_, LifeState::Created)) | None => (trouble.unwrap_or_else(|| waiting(making, None)), previous),
    };
    let runs = seen.runs(name);
    let succeeded = seen.end(name).is_some_and(|end| end.code == 0);
    ContainerStatus {
        name: name.to_owned(),
        image: current.map_or_else(|| member.container.image.clone().unwrap_or_default(), |life| life.image.clone()),
        image_id: current.map(|life| life.image_id.clone()).unwrap_or_default(),
        container_id: current.map(|life| format!("docker://{}", life.id)),
        ready: if member.role == Role::Init { succeeded } else { runs && health.is_some_and(|health| health.ready) },
        started: Some(runs && health.is_some_and(|health| health.started)),
        restart_count: current.map_or(0, |life| i32::try_from(life.attempt).unwrap_or(i32::MAX)),
        state: Some(state),
        last_state: last,
        ..ContainerStatus::default()
    }
}

fn terminated(life: &Life) -> Option<ContainerState> {
    let LifeState::Ended(end) = &life.state else { return None };
    let reason = match end.code {
        _ if end.oom => "OOMKilled",
        _ if end.started.is_none() => "StartError",
        0 => "Completed",
        _ => "Error",
    };
    Some(ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: end.code,
            reason: Some(reason.to_owned()),
            message: end.why.clone(),
            started_at: Some(time(end.started.unwrap_or(end.finished))),
            finished_at: Some(time(end.finished)),
            container_id: Some(format!("docker://{}", life.id)),
            signal: None,
        }),
        ..ContainerState::default()
    })
}

#[cfg(test)]
mod tests;
