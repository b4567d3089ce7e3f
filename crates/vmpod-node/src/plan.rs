//! What to do next for one pod. Pure: everything it knows is in its arguments.
//!
//! ```text
//!  accept ─▶ resolve ─▶ begin ─▶ prepare ─▶ start ─▶ (main) ─▶ end ─┬▶ restart ─▶ resolve …
//!    │       image,     on disk   clone,     the       in the        └▶ conclude ─▶ remove ─▶ delete ─▶ forget
//!    └▶ refused         first     machine    process   guest              terminal    files     API object
//! ```
//!
//! The plan is level-triggered: it looks at the record and the world as they are, and names the next steps. A step that is a
//! job runs beside the worker; while one is under way the plan doesn't name another that would collide with it.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use vmpod_machine::{Exit, ExitCause};

use vmpod_machine::{Learnt, Machine};

use crate::{
    pod::{self, RestartPolicy},
    probe::Failed,
    record::{Attempt, Ended, Main, Record, Stop, StopReason, Terminal, Unwell},
    sidecars::Company,
};

/// What should be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Desired<'a> {
    /// The pod as the API has it; none when it is certain that it has it no more.
    pub(crate) pod: Option<&'a Pod>,
    /// The agent ends, and machines aren't to go on without it.
    pub(crate) agent_stops: Option<SignedDuration>,
    /// Why the pod is to be ended, if the node runs short of something.
    pub(crate) evicted: Option<&'a str>,
}

/// Where a guest is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Location {
    /// At the pod's address.
    #[default]
    Given,
    /// Nobody knows yet.
    Unknown,
    /// Where its network shows it.
    Learnt(Learnt),
}

impl Location {
    pub(crate) fn of(machine: &Machine) -> Self {
        match *machine.learnt().borrow() {
            _ if machine.spec().learns().is_none() => Self::Given,
            None => Self::Unknown,
            Some(learnt) => Self::Learnt(learnt),
        }
    }
}

/// What is.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own, not a state")]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Observed {
    /// The machine of the current attempt.
    pub(crate) machine: MachineSeen,
    /// The machine was to go on from a memory snapshot.
    pub(crate) restored: bool,
    /// The guest answers.
    pub(crate) guest_ready: bool,
    /// Where it is, when that isn't known beforehand.
    pub(crate) location: Location,
    /// What the guest is waited for, in words.
    pub(crate) guest: Option<String>,
    /// Image and configuration of the next attempt.
    pub(crate) resolved: Resolved,
    /// Why the last try of the current job failed, and when to try again.
    pub(crate) trouble: Option<Trouble>,
    /// All output of the current attempt is in its log.
    pub(crate) drained: bool,
    /// When this agent first saw that the machine had stopped.
    pub(crate) stopped: Option<Timestamp>,
    /// The power button was pressed or the main process signalled.
    pub(crate) stopping: bool,
    /// The machine is being killed.
    pub(crate) killing: bool,
    /// What failed, if the container is to be ended for it.
    pub(crate) failed: Option<Failed>,
    /// The startup probe hasn't passed yet.
    pub(crate) unstarted: bool,
    /// The readiness probe or the postStart hook hasn't passed.
    pub(crate) unready: bool,
    /// How far the preStop hook is.
    pub(crate) pre_stop: HookSeen,
    /// How far the containers beside the machine are; none if the pod has no such.
    pub(crate) company: Option<Company>,
    /// The job under way.
    pub(crate) job: Option<Job>,
    /// The API says that the object is gone, or that another has its name.
    pub(crate) deleted: bool,
}

/// How far a hook is, in this life of the agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum HookSeen {
    #[default]
    Unrun,
    Running,
    /// Whether it succeeded doesn't matter.
    Done,
}

/// A machine as it is on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum MachineSeen {
    /// Nothing of it is on disk.
    #[default]
    Absent,
    /// Its directory is unfinished and no process was ever started from it.
    Unfinished,
    /// It may be started.
    Prepared,
    /// Its process is being started.
    Booting,
    /// It has a process.
    Live,
    /// It ran and is over.
    Stopped(Exit),
    /// It couldn't be started.
    Failed(String),
    /// It may have a process that doesn't answer, or is damaged.
    Broken(String),
}

/// Whether the next attempt has what it needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Resolved {
    #[default]
    No,
    Yes,
}

/// A job that failed and will be tried again. The reason is one that users of Kubernetes know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trouble {
    pub(crate) job: Job,
    pub(crate) reason: String,
    pub(crate) message: String,
    pub(crate) retry: Timestamp,
}

/// Work that takes time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Job {
    /// Image, environment, user data.
    Resolve,
    /// Clone, key, seed, directory.
    Prepare,
    /// The machine's process.
    Start,
    /// The main process in the guest.
    StartMain,
    /// The postStart hook.
    PostStart,
    /// Kills the machine and removes its files, its clone and its hold on the image.
    Remove,
    /// Deletes the API object.
    Delete,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Decide whether the pod may run here; the record begins.
    Accept,
    /// Start a job.
    Run(Job),
    /// Write down that an attempt begins, with the image that was resolved.
    Begin,
    /// Write down that the machine couldn't go on from its memory snapshot, and why, and that it boots instead.
    FallBack(String),
    /// Write down that the machine was seen running.
    NoteStarted,
    /// Write down that the main process is about to be asked for.
    AskMain,
    /// Write down that the pod is to stop.
    NoteStop(Stop),
    /// Write down that the container is to end and the pod to go on.
    NoteUnwell(Unwell),
    /// Run the preStop hook.
    PreStop,
    /// Ask the main process to end.
    SignalMain,
    /// Press the power button; the machine is killed at the deadline.
    PowerDown { deadline: Timestamp },
    /// Kill the machine.
    Kill,
    /// Write down how the attempt ended, and the back-off and verdict that follow.
    End { ended: Ended, terminal: Option<Terminal> },
    /// Write down the verdict.
    Conclude(Terminal),
    /// Remove everything that is left of the pod and end its worker.
    Forget,
}

/// Steps in order, and when to look again at the latest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) steps: Vec<Step>,
    pub(crate) wake: Option<Timestamp>,
}

impl Plan {
    fn step(step: Step) -> Self {
        Self { steps: vec![step], wake: None }
    }

    fn wait() -> Self {
        Self::default()
    }

    fn wait_until(wake: Timestamp) -> Self {
        Self { steps: Vec::new(), wake: Some(wake) }
    }

    fn wake_at(mut self, at: Option<Timestamp>) -> Self {
        self.wake = match (self.wake, at) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        self
    }
}

/// How long the last output may take to arrive, after the end of a main process or of a machine, before things go on
/// without it.
const DRAIN: SignedDuration = SignedDuration::from_secs(15);

/// Names the next steps.
pub(crate) fn plan(desired: Desired<'_>, record: Option<&Record>, seen: &Observed, now: Timestamp) -> Plan {
    let Some(pod) = desired.pod else { return gone(seen, now) };
    let Some(record) = record else {
        // A pod that was deleted before the agent saw it is accepted as well: it then concludes like any other.
        return Plan::step(Step::Accept);
    };
    if record.terminal.is_some() {
        return over(pod, seen, now);
    }
    let deadline = pod::active_deadline(pod, record.accepted);
    if let Some(stop) = new_stop(desired, pod, record, deadline, now) {
        return Plan::step(Step::NoteStop(stop));
    }
    let plan = match &record.attempt {
        Some(attempt) if attempt.ended.is_none() => live(pod, record, attempt, seen, now),
        ended => between(pod, record, ended.as_ref(), seen, now),
    };
    plan.wake_at(deadline.filter(|_| record.stop.is_none()))
}

/// The API has the pod no more: nothing of it may stay.
fn gone(seen: &Observed, now: Timestamp) -> Plan {
    match (seen.machine == MachineSeen::Absent, seen.job) {
        (_, Some(_)) => Plan::wait(),
        (true, None) if seen.company.is_some_and(|company| !company.gone) => Plan::wait(),
        (true, None) => Plan::step(Step::Forget),
        (false, None) => run(Job::Remove, seen, now),
    }
}

/// The pod has ended: its machine's files go, and the API object when somebody deleted it.
fn over(pod: &Pod, seen: &Observed, now: Timestamp) -> Plan {
    if seen.job.is_some() {
        return Plan::wait();
    }
    if seen.machine != MachineSeen::Absent {
        return run(Job::Remove, seen, now);
    }
    // Only what the API shows counts: a status that was sent may not have arrived.
    if pod.metadata.deletion_timestamp.is_some() && pod::is_terminal_phase(pod::api_phase(pod)) && !seen.deleted {
        return run(Job::Delete, seen, now);
    }
    Plan::wait()
}

fn new_stop(
    desired: Desired<'_>,
    pod: &Pod,
    record: &Record,
    deadline: Option<Timestamp>,
    now: Timestamp,
) -> Option<Stop> {
    let grace = pod::spec(pod).and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30).max(0);
    let after = |grace: SignedDuration| now.saturating_add(grace).unwrap_or(Timestamp::MAX);
    let stop = |why, deadline| Stop { why, deadline, message: None };
    let wanted = if let Some(grace) = pod::deletion_grace(pod) {
        stop(StopReason::Deleted, after(grace))
    } else if let Some(message) = desired.evicted {
        // As the kubelet at a hard threshold: there is no time for a grace.
        Stop { message: Some(message.to_owned()), ..stop(StopReason::Evicted, now) }
    } else if deadline.is_some_and(|deadline| deadline <= now) {
        stop(StopReason::Deadline, after(SignedDuration::from_secs(grace)))
    } else if let Some(limit) = desired.agent_stops {
        stop(StopReason::Agent, after(limit.min(SignedDuration::from_secs(grace))))
    } else {
        return None;
    };
    match &record.stop {
        None => Some(wanted),
        // A pod that is to end outweighs an agent that is to end. A shorter grace shortens what is left, and nothing lengthens it.
        Some(old) if old.why == StopReason::Agent && wanted.why != StopReason::Agent => {
            Some(Stop { deadline: old.deadline.min(wanted.deadline), ..wanted })
        }
        Some(old) if wanted.why != StopReason::Agent && wanted.deadline < old.deadline => {
            Some(Stop { deadline: wanted.deadline, ..old.clone() })
        }
        Some(_) => None,
    }
}

/// No attempt is under way.
fn between(pod: &Pod, record: &Record, last: Option<&Attempt>, seen: &Observed, now: Timestamp) -> Plan {
    if seen.job == Some(Job::Resolve) && record.stop.is_some() {
        // A pull may take long; a pod that is to stop doesn't wait for it.
        return conclude_stopped(record, last, seen).map_or_else(Plan::wait, Plan::step);
    }
    if seen.job.is_some() {
        return Plan::wait();
    }
    if seen.machine != MachineSeen::Absent {
        return run(Job::Remove, seen, now);
    }
    if record.stop.is_some() {
        return conclude_stopped(record, last, seen).map_or_else(Plan::wait, Plan::step);
    }
    if let Some(company) = seen.company.filter(|company| company.doomed) {
        let failed = Terminal { succeeded: false, reason: None, message: None, shown_before: false };
        return if company.quiet { Plan::step(Step::Conclude(failed)) } else { Plan::wait() };
    }
    if let Some(ended) = last.and_then(|attempt| attempt.ended.as_ref()) {
        if !RestartPolicy::of(pod).restarts(ended.exit_code) {
            return match seen.company {
                None => Plan::step(Step::Conclude(verdict(ended))),
                Some(Company { over: Some(good), quiet: true, .. }) => {
                    let verdict = verdict(ended);
                    Plan::step(Step::Conclude(Terminal { succeeded: verdict.succeeded && good, ..verdict }))
                }
                // Others of the pod's containers still run, or will.
                Some(_) => Plan::wait(),
            };
        }
        if let Some(until) = record.backoff.until()
            && until > now
        {
            return Plan::wait_until(until);
        }
    }
    match (&seen.resolved, seen.company) {
        // Its address is one in the network of the containers beside it, and the init containers come before it.
        (_, Some(Company { address: None, .. })) | (Resolved::Yes, Some(Company { initialized: false, .. })) => {
            Plan::wait()
        }
        (Resolved::Yes, _) => Plan::step(Step::Begin),
        (Resolved::No, _) => run(Job::Resolve, seen, now),
    }
}

/// What becomes of a pod that is stopped between two attempts.
fn conclude_stopped(record: &Record, last: Option<&Attempt>, seen: &Observed) -> Option<Step> {
    let stop = record.stop.as_ref()?;
    let ended = last.and_then(|attempt| attempt.ended.as_ref());
    let verdict = stop_verdict(stop, ended)?;
    let Some(company) = seen.company else { return Some(Step::Conclude(verdict)) };
    let succeeded = verdict.succeeded && company.over == Some(true);
    company.quiet.then_some(Step::Conclude(Terminal { succeeded, ..verdict }))
}

/// An attempt is under way.
fn live(pod: &Pod, record: &Record, attempt: &Attempt, seen: &Observed, now: Timestamp) -> Plan {
    let stop = record.stop.as_ref();
    let has_main = pod::has_main(pod);
    match &seen.machine {
        MachineSeen::Absent | MachineSeen::Unfinished | MachineSeen::Prepared if attempt.started.is_some() => {
            let why = "it ran, and nothing is left of it";
            end(pod, record, seen, main_end(record, attempt).unwrap_or_else(|| lost(record, attempt, why, now)))
        }
        MachineSeen::Absent | MachineSeen::Unfinished | MachineSeen::Prepared if seen.job.is_some() => Plan::wait(),
        MachineSeen::Absent | MachineSeen::Unfinished | MachineSeen::Prepared if stop.is_some() => {
            let message = "The pod was stopped before its machine was started".to_owned();
            end(pod, record, seen, ended(record, attempt, 137, "ContainerStatusUnknown", Some(message), now))
        }
        MachineSeen::Absent => run(Job::Prepare, seen, now),
        MachineSeen::Prepared => run(Job::Start, seen, now),
        // Nothing of the pod's ran. What is left goes, and the attempt goes on with a machine that boots: once.
        MachineSeen::Failed(why) if seen.restored && !attempt.boots => Plan::step(Step::FallBack(why.clone())),
        MachineSeen::Failed(_) if seen.restored && seen.job.is_some() => Plan::wait(),
        MachineSeen::Failed(_) if seen.restored => run(Job::Remove, seen, now),
        MachineSeen::Failed(why) => {
            end(pod, record, seen, ended(record, attempt, 128, "StartError", Some(why.clone()), now))
        }
        // It may have run, and may run now. Once that is written down nothing starts it again, and it can go.
        MachineSeen::Broken(_) if attempt.started.is_none() => Plan::step(Step::NoteStarted),
        MachineSeen::Broken(_) if seen.job.is_some() => Plan::wait(),
        MachineSeen::Broken(_) | MachineSeen::Unfinished => run(Job::Remove, seen, now),
        MachineSeen::Stopped(exit) => {
            // Output that was seen late counts from then: the machine may have stopped long before this agent came.
            let give_up = seen.stopped.unwrap_or(exit.at).saturating_add(DRAIN).unwrap_or(Timestamp::MAX);
            if seen.drained || now >= give_up {
                end(pod, record, seen, after_exit(record, attempt, has_main, exit))
            } else {
                Plan::wait_until(give_up)
            }
        }
        MachineSeen::Booting => match stop {
            Some(stop) if !seen.stopping => Plan::step(Step::PowerDown { deadline: stop.deadline }),
            _ => Plan::wait(),
        },
        MachineSeen::Live => running(pod, attempt, stop, seen, now),
    }
}

/// The machine runs.
fn running(pod: &Pod, attempt: &Attempt, stop: Option<&Stop>, seen: &Observed, now: Timestamp) -> Plan {
    let has_main = pod::has_main(pod);
    if seen.killing {
        return Plan::wait();
    }
    if attempt.started.is_none() {
        return Plan::step(Step::NoteStarted);
    }
    if let Main::Ended { at, .. } = attempt.main {
        // The process is over: the machine goes with it, once the last output is here.
        let give_up = at.saturating_add(DRAIN).unwrap_or(Timestamp::MAX);
        return if seen.drained || now >= give_up { Plan::step(Step::Kill) } else { Plan::wait_until(give_up) };
    }
    // A pod that is to stop has no time to lose to a container that is to start again, nor the other way round.
    let deadlines = [stop.map(|stop| stop.deadline), attempt.unwell.as_ref().map(|unwell| unwell.deadline)];
    let deadline = deadlines.into_iter().flatten().min();
    if deadline.is_none()
        && let Some(failed) = &seen.failed
    {
        let pods = pod::spec(pod).and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30).max(0);
        let grace = failed.grace.unwrap_or(SignedDuration::from_secs(pods));
        let deadline = now.saturating_add(grace).unwrap_or(Timestamp::MAX);
        return Plan::step(Step::NoteUnwell(Unwell { what: failed.what.clone(), deadline }));
    }
    if let Some(deadline) = deadline {
        if now >= deadline {
            return Plan::step(Step::Kill);
        }
        if seen.stopping {
            return Plan::wait_until(deadline);
        }
        let runs = matches!(attempt.main, Main::Started(_)) || !has_main;
        if runs && seen.guest_ready && pod::pre_stop(pod).is_some() {
            match seen.pre_stop {
                HookSeen::Unrun => return Plan { steps: vec![Step::PreStop], wake: Some(deadline) },
                HookSeen::Running => return Plan::wait_until(deadline),
                HookSeen::Done => {}
            }
        }
        let ask = match attempt.main {
            Main::Started(_) if seen.guest_ready => Step::SignalMain,
            // A process that was never started has nothing to lose.
            Main::Unstarted if has_main => Step::Kill,
            // Whether it started isn't known yet: the guest, once it answers, tells.
            Main::Started(_) | Main::Asked => return Plan::wait_until(deadline),
            Main::Unstarted | Main::Ended { .. } => Step::PowerDown { deadline },
        };
        return Plan { steps: vec![ask], wake: Some(deadline) };
    }
    match attempt.main {
        Main::Unstarted if has_main && seen.guest_ready => Plan::step(Step::AskMain),
        Main::Asked if seen.guest_ready && seen.job.is_none() => run(Job::StartMain, seen, now),
        Main::Started(_) | Main::Unstarted
            if seen.guest_ready && seen.job.is_none() && !attempt.hooked && pod::post_start(pod).is_some() =>
        {
            run(Job::PostStart, seen, now)
        }
        _ => Plan::wait(),
    }
}

/// A job, unless its last failure is too young.
fn run(job: Job, seen: &Observed, now: Timestamp) -> Plan {
    match &seen.trouble {
        Some(trouble) if trouble.job == job && trouble.retry > now => Plan::wait_until(trouble.retry),
        _ => Plan::step(Step::Run(job)),
    }
}

/// The end of an attempt and what follows from it.
fn end(pod: &Pod, record: &Record, seen: &Observed, ended: Ended) -> Plan {
    if seen.company.is_some() {
        // The verdict waits for the others.
        return Plan::step(Step::End { ended, terminal: None });
    }
    let terminal = match &record.stop {
        Some(stop) => stop_verdict(stop, Some(&ended)),
        None => (!RestartPolicy::of(pod).restarts(ended.exit_code)).then(|| verdict(&ended)),
    };
    // After a stop by the agent the pod may go on with the next agent, if its policy says so.
    let terminal = match (&record.stop, terminal) {
        (Some(Stop { why: StopReason::Agent, .. }), None) if !RestartPolicy::of(pod).restarts(ended.exit_code) => {
            Some(Terminal {
                succeeded: ended.exit_code == 0,
                reason: (ended.exit_code != 0).then(|| "Terminated".to_owned()),
                message: (ended.exit_code != 0)
                    .then(|| "The node agent was stopped, and the pod's machine with it".to_owned()),
                shown_before: false,
            })
        }
        (_, terminal) => terminal,
    };
    Plan::step(Step::End { ended, terminal })
}

fn verdict(ended: &Ended) -> Terminal {
    Terminal { succeeded: ended.exit_code == 0, reason: None, message: None, shown_before: false }
}

/// The verdict on a stopped pod; none when the pod isn't over.
fn stop_verdict(stop: &Stop, ended: Option<&Ended>) -> Option<Terminal> {
    match stop.why {
        StopReason::Deleted => Some(Terminal {
            succeeded: ended.is_some_and(|ended| ended.exit_code == 0),
            reason: None,
            message: None,
            shown_before: false,
        }),
        StopReason::Deadline => Some(Terminal {
            succeeded: false,
            reason: Some("DeadlineExceeded".to_owned()),
            message: Some("Pod was active on the node longer than the specified deadline".to_owned()),
            shown_before: false,
        }),
        StopReason::Evicted => Some(Terminal {
            succeeded: false,
            reason: Some("Evicted".to_owned()),
            message: stop.message.clone(),
            shown_before: false,
        }),
        StopReason::Agent => None,
    }
}

fn ended(
    record: &Record,
    attempt: &Attempt,
    exit_code: i32,
    reason: &str,
    message: Option<String>,
    finished: Timestamp,
) -> Ended {
    let started = match attempt.main {
        Main::Started(at) | Main::Ended { started: Some(at), .. } => Some(at),
        _ => attempt.started,
    };
    Ended {
        machine: record.uid.machine(attempt.number),
        exit_code,
        reason: reason.to_owned(),
        message,
        started,
        finished,
    }
}

fn lost(record: &Record, attempt: &Attempt, why: &str, now: Timestamp) -> Ended {
    ended(
        record,
        attempt,
        137,
        "ContainerStatusUnknown",
        Some(format!("The container's machine could not be found again: {why}")),
        now,
    )
}

/// How a container ended whose machine has stopped.
fn after_exit(record: &Record, attempt: &Attempt, has_main: bool, exit: &Exit) -> Ended {
    if let Some(ended) = main_end(record, attempt) {
        return ended;
    }
    let detail = Some(exit.to_string());
    if has_main {
        // The guest took the exit code with it.
        let killed = (record.stop.is_some() || attempt.unwell.is_some()) && exit.cause == ExitCause::Killed;
        let reason = if killed { "Error" } else { "ContainerStatusUnknown" };
        return ended(record, attempt, 137, reason, detail, exit.at);
    }
    match exit.cause {
        // It was told to, which is not a success: whoever fails a probe isn't done.
        ExitCause::GuestShutdown if attempt.unwell.is_some() && record.stop.is_none() => {
            ended(record, attempt, 143, "Error", detail, exit.at)
        }
        ExitCause::GuestShutdown => ended(record, attempt, 0, "Completed", None, exit.at),
        ExitCause::GuestPanic | ExitCause::HypervisorFailed => ended(record, attempt, 1, "Error", detail, exit.at),
        ExitCause::Killed => ended(record, attempt, 137, "Error", detail, exit.at),
        ExitCause::NeverStarted | ExitCause::Unseen => {
            ended(record, attempt, 137, "ContainerStatusUnknown", detail, exit.at)
        }
    }
}

fn main_end(record: &Record, attempt: &Attempt) -> Option<Ended> {
    let Main::Ended { code, at, why, .. } = &attempt.main else { return None };
    let (code, reason) = match code {
        Some(0) => (0, "Completed"),
        Some(code) => (*code, "Error"),
        None => (137, "ContainerStatusUnknown"),
    };
    Some(ended(record, attempt, code, reason, why.clone(), *at))
}

#[cfg(test)]
mod tests;
