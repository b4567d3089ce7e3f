//! What the worker does at once: the record on disk, and requests whose success shows elsewhere.

use std::{future::Future, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use vmpod_machine::{Machine, Signal};

use super::{Flow, Input, Local, MAIN, Worker};
use crate::{
    error_chain,
    events::Kind,
    last_words,
    plan::{HookSeen, Job, Step},
    pod::{self, PodUid, RestartPolicy},
    probe::Failed,
    record::{Attempt, Ended, ImageChoice, Main, Record, Stop, StopReason, Terminal, Unwell},
    sidecars,
};

impl Worker {
    pub(super) async fn apply(&mut self, step: Step, machine: Option<&Machine>, now: Timestamp) -> Flow {
        match step {
            Step::Accept => self.accept(now).await,
            Step::Run(job) => {
                self.start_job(job, machine);
                Flow::On
            }
            Step::Begin => self.begin().await,
            Step::FallBack(why) => {
                if let Some(pod) = &self.pod {
                    let text = format!("The machine boots instead of going on from a memory snapshot: {why}");
                    self.world.events.container(pod, Kind::Warning, "SnapshotFailed", text);
                }
                self.change("snapshot given up", |record| {
                    record.attempt.as_mut()?.boots = true;
                    Some(())
                })
                .await
            }
            Step::NoteStarted => {
                let flow = self.change("machine started", |record| {
                    record.attempt.as_mut()?.started = Some(now);
                    Some(())
                });
                let flow = flow.await;
                if matches!(flow, Flow::On) && !self.has_main() {
                    self.tell_started();
                }
                flow
            }
            Step::AskMain => {
                self.change("main process asked for", |record| {
                    record.attempt.as_mut()?.main = Main::Asked;
                    Some(())
                })
                .await
            }
            Step::NoteStop(wish) => self.note_stop(wish).await,
            Step::NoteUnwell(unwell) => self.note_unwell(unwell).await,
            Step::PreStop => {
                self.local.pre_stop = HookSeen::Running;
                if let Some(machine) = machine {
                    self.pre_stop(machine);
                }
                Flow::On
            }
            Step::SignalMain => {
                self.local.stopping = true;
                if let Some(machine) = machine {
                    let process = machine.guest().main_process(MAIN);
                    self.beside(async move { process.signal(Signal::Term).await.map_err(|error| error_chain(&error)) });
                }
                Flow::On
            }
            Step::PowerDown { deadline } => {
                self.local.stopping = true;
                if let Some(machine) = machine.cloned() {
                    let grace = Duration::try_from(deadline.duration_since(now)).unwrap_or_default();
                    self.beside(
                        async move { machine.stop(grace).await.map(drop).map_err(|error| error_chain(&error)) },
                    );
                }
                Flow::On
            }
            Step::Kill => {
                self.local.killing = true;
                if let Some(machine) = machine.cloned() {
                    self.beside(async move { machine.kill().await.map(drop).map_err(|error| error_chain(&error)) });
                }
                Flow::On
            }
            Step::End { ended, terminal } => self.end(ended, terminal).await,
            Step::Conclude(terminal) => self.conclude(terminal).await,
            Step::Forget => self.forget(),
        }
    }

    /// Does something whose success shows elsewhere.
    pub(super) fn beside(&mut self, work: impl Future<Output = Result<(), String>> + Send + 'static) {
        let (send, uid) = (self.send.clone(), self.uid.clone());
        self.tasks.spawn(async move {
            if let Err(error) = work.await {
                tracing::warn!(pod = %uid, error, "stopping didn't work; trying again");
                tokio::time::sleep(Duration::from_secs(1)).await;
                send.send(Input::StopFailed).ok();
            }
        });
    }

    pub(super) async fn accept(&mut self, now: Timestamp) -> Flow {
        let Some(pod) = self.pod.clone() else { return Flow::On };
        let mut record = Record::new(self.uid.clone(), pod::namespace(&pod), pod::name(&pod), now);
        if let Some(started) = pod.status.as_ref().and_then(|status| status.start_time.as_ref()) {
            record.accepted = started.0;
        }
        if pod::is_terminal_phase(pod::api_phase(&pod)) {
            // It ended under an agent whose records are gone. What the API shows stays.
            record.terminal = Some(Terminal {
                succeeded: pod::api_phase(&pod) == Some("Succeeded"),
                reason: None,
                message: None,
                shown_before: true,
            });
        } else if let Some(attempt) = lost_attempt(&pod, &self.uid, now) {
            record.attempt = Some(attempt);
            record.sidecars = sidecars::any(&pod);
            record.backoff.fail(now, now);
            self.world.ledger.restore(&self.uid, &pod, None);
        } else if pod.metadata.deletion_timestamp.is_none()
            && let Err(refusal) = self.world.ledger.admit(&self.uid, &pod, &self.world.name, self.world.lacks())
        {
            self.world.events.pod(&pod, Kind::Warning, refusal.reason, refusal.message.clone());
            record.terminal = Some(Terminal {
                succeeded: false,
                reason: Some(refusal.reason.to_owned()),
                message: Some(format!("Pod was rejected: {}", refusal.message)),
                shown_before: false,
            });
        } else if sidecars::any(&pod) {
            // Its network and its containers are next: whoever finds them finds the record as well.
            record.sidecars = true;
        } else {
            // Nothing exists yet: the record is written when the first attempt begins.
            self.record = Some(record);
            return Flow::On;
        }
        self.store("pod accepted", record).await
    }

    pub(super) async fn begin(&mut self) -> Flow {
        let (Some(record), Some(image), Some(run)) = (&self.record, &self.resolved, &self.run) else { return Flow::On };
        if let Err(error) = run.save(&self.world.records.dir(&self.uid)) {
            tracing::warn!(pod = %self.uid, %error, "can't write what the attempt runs");
            return Flow::Stuck;
        }
        let number = record.next_attempt();
        let mut next = record.clone();
        next.address = match &self.crew {
            Some(crew) if !self.world.apple() => crew.view().borrow().company.address,
            _ => self.pod.as_deref().and_then(|pod| self.world.address(&self.uid, pod, number).ok().flatten()),
        };
        next.previous = next.attempt.take().and_then(|attempt| attempt.ended).or(next.previous);
        next.attempt = Some(Attempt {
            number,
            image: image.clone(),
            started: None,
            main: Main::Unstarted,
            ended: None,
            boots: false,
            hooked: false,
            unwell: None,
        });
        let flow = self.store("attempt begun", next).await;
        if matches!(flow, Flow::On) {
            self.resolved = None;
            self.trouble = None;
            self.local = Local::default();
            // What can be asked for is the log of this attempt and of the one before it.
            let container =
                self.pod.as_deref().and_then(pod::machine_container).map_or("", |container| &container.name);
            if let Err(error) = self.world.records.forget_logs(&self.uid, container, number.saturating_sub(1)) {
                tracing::warn!(pod = %self.uid, %error, "logs of past attempts can't be removed");
            }
        }
        flow
    }

    pub(super) async fn note_stop(&mut self, stop: Stop) -> Flow {
        let first = self.record.as_ref().is_some_and(|record| record.stop.is_none());
        let running = self
            .record
            .as_ref()
            .is_some_and(|record| record.attempt.as_ref().is_some_and(|attempt| attempt.ended.is_none()));
        if let (true, true, Some(pod)) = (first, running, &self.pod) {
            let name = pod::machine_container(pod).map_or("", |container| &container.name);
            let (kind, reason, message) = match stop.why {
                StopReason::Deadline => (
                    Kind::Normal,
                    "DeadlineExceeded",
                    "Pod was active on the node longer than the specified deadline".to_owned(),
                ),
                StopReason::Evicted => (Kind::Warning, "Evicted", stop.message.clone().unwrap_or_default()),
                StopReason::Deleted | StopReason::Agent => {
                    (Kind::Normal, "Killing", format!("Stopping container {name}"))
                }
            };
            self.world.events.container(pod, kind, reason, message);
        }
        let shorter = self
            .record
            .as_ref()
            .and_then(|record| record.stop.as_ref())
            .is_some_and(|old| stop.deadline < old.deadline);
        if shorter {
            // The machine is told again, with the shorter time.
            self.local.stopping = false;
        }
        if self.record.as_ref().is_some_and(|record| record.attempt.is_none() && !record.sidecars) {
            // Nothing on disk depends on it yet.
            if let Some(record) = &mut self.record {
                record.stop = Some(stop);
            }
            return Flow::On;
        }
        self.change("stop noted", |record| {
            record.stop = Some(stop.clone());
            Some(())
        })
        .await
    }

    async fn note_unwell(&mut self, unwell: Unwell) -> Flow {
        if let Some(pod) = &self.pod {
            let name = pod::machine_container(pod).map_or("", |container| &container.name);
            let restarts = if RestartPolicy::of(pod) == RestartPolicy::Never { "" } else { ", will be restarted" };
            let text = format!("Container {name} failed {}{restarts}", unwell.what);
            self.world.events.container(pod, Kind::Normal, "Killing", text);
        }
        self.change("failure noted", |record| {
            record.attempt.as_mut()?.unwell = Some(unwell.clone());
            Some(())
        })
        .await
    }

    /// The postStart hook is over.
    pub(super) async fn hooked(&mut self, result: Result<(), String>) {
        match result {
            Ok(()) => {
                let changed = self.change("postStart done", |record| {
                    record.attempt.as_mut()?.hooked = true;
                    Some(())
                });
                // Should the disk be full, the hook runs again.
                changed.await;
            }
            Err(why) => {
                if let Some(pod) = &self.pod {
                    let text = format!("PostStartHook failed: {why}");
                    self.world.events.container(pod, Kind::Warning, "FailedPostStartHook", text);
                }
                self.local.hook_failed = Some(Failed { what: "postStart hook".to_owned(), grace: None });
            }
        }
    }

    pub(super) async fn end(&mut self, mut ended: Ended, terminal: Option<Terminal>) -> Flow {
        let container = self.pod.as_deref().and_then(pod::machine_container);
        if let Some(container) = container.filter(|container| last_words::falls_back(container))
            && (ended.message.is_none() && ended.exit_code != 0)
            && let Some(attempt) = self.record.as_ref().and_then(|record| record.attempt.as_ref())
        {
            let log = self.world.records.log(&self.uid, &container.name, attempt.number);
            ended.message = last_words::of_log(&log).await;
        }
        let restarts = terminal.is_none();
        let flow = self
            .change("attempt ended", |record| {
                let attempt = record.attempt.as_mut()?;
                attempt.ended = Some(ended.clone());
                let began = ended.started.unwrap_or(ended.finished);
                // A machine that was stopped with its agent did nothing wrong.
                if record.stop.as_ref().is_none_or(|stop| stop.why != StopReason::Agent) {
                    record.backoff.fail(ended.finished, began);
                }
                record.terminal.clone_from(&terminal);
                Some(())
            })
            .await;
        let goes_on = restarts && self.record.as_ref().is_some_and(|record| record.stop.is_none());
        if let (Flow::On, true, Some(pod)) = (&flow, goes_on, &self.pod) {
            let name = pod::machine_container(pod).map_or("", |container| &container.name);
            let message = format!(
                "Back-off restarting failed container {name} in pod {}_{}({})",
                pod::name(pod),
                pod::namespace(pod),
                self.uid
            );
            self.world.events.container(pod, Kind::Warning, "BackOff", message);
        }
        flow
    }

    pub(super) async fn conclude(&mut self, terminal: Terminal) -> Flow {
        if self.job == Some(Job::Resolve) {
            // A pull that nobody waits for any more goes on alone, or ends with the worker.
            self.job = None;
        }
        let Some(mut record) = self.record.clone() else { return Flow::On };
        record.terminal = Some(terminal);
        self.store("verdict", record).await
    }

    pub(super) fn forget(&mut self) -> Flow {
        if let Err(error) = self.world.records.forget(&self.uid) {
            tracing::warn!(pod = %self.uid, error = error_chain(&error), "can't remove what is left of the pod");
            return Flow::Stuck;
        }
        self.local = Local::default();
        self.crew = None;
        self.world.probes.forget(&self.uid);
        self.world.ledger.release(&self.uid);
        self.world.pods().remove(&self.uid);
        Flow::Over
    }

    /// Changes the record on disk, then in memory. Nothing happens when the closure says so.
    pub(super) async fn change(&mut self, what: &str, change: impl FnOnce(&mut Record) -> Option<()>) -> Flow {
        let Some(mut record) = self.record.clone() else { return Flow::On };
        match change(&mut record) {
            Some(()) => self.store(what, record).await,
            None => Flow::On,
        }
    }

    pub(super) async fn store(&mut self, what: &str, record: Record) -> Flow {
        self.world.faults.hit(&format!("node: before {what}")).await;
        if let Err(error) = self.world.records.save(&record) {
            tracing::warn!(pod = %self.uid, error = error_chain(&error), "{what} can't be written down; trying again");
            return Flow::Stuck;
        }
        if record.terminal.is_some() {
            // What it was given is free again once its machine is gone, which is now: a verdict comes after that.
            self.world.ledger.release(&self.uid);
        }
        self.record = Some(record);
        self.world.faults.hit(&format!("node: {what}")).await;
        Flow::On
    }
}

/// A container that the API shows as running and of which nothing is left here.
fn lost_attempt(pod: &Pod, uid: &PodUid, now: Timestamp) -> Option<Attempt> {
    let name = &pod::machine_container(pod)?.name;
    let shown = pod.status.as_ref()?.container_statuses.as_ref()?.iter().find(|status| status.name == *name)?;
    let number = u32::try_from(shown.restart_count).unwrap_or(0);
    let state = shown.state.as_ref()?;
    let (exit_code, started) = match (&state.running, &state.terminated) {
        (Some(running), _) => (137, running.started_at.as_ref().map(|at| at.0)),
        (None, Some(terminated)) => (terminated.exit_code, terminated.started_at.as_ref().map(|at| at.0)),
        (None, None) => return None,
    };
    Some(Attempt {
        number,
        image: ImageChoice {
            name: shown.image.clone(),
            digest: shown.image_id.rsplit('@').next().unwrap_or_default().to_owned(),
        },
        started,
        main: Main::Unstarted,
        boots: false,
        hooked: false,
        unwell: None,
        ended: Some(Ended {
            machine: uid.machine(number),
            exit_code,
            reason: "ContainerStatusUnknown".to_owned(),
            message: Some("The container could not be located when the node agent came back".to_owned()),
            started,
            finished: now,
        }),
    })
}
