//! How the worker looks at its pod, and what it shows of it.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::task::JoinSet;
use vmpod_machine::{GuestState, Machine, State};

use super::{CALLED_BACKOFF, Input, MAIN, Worker, is_final};
use crate::{
    action::Where,
    collect::{Collector, Source},
    error_chain,
    events::Kind,
    last_words,
    plan::{Location, MachineSeen, Observed, Resolved},
    pod,
    probe::{Purpose, Verdict},
    prober::{Prober, Subject},
    record::{Attempt, Main},
    status, volumes,
    world::{View, Wanted},
};

impl Worker {
    /// Makes sure that whatever the attempt gives is being taken: its output, its main process's end.
    pub(super) fn attend(&mut self, machine: Option<&Machine>, now: Timestamp) {
        let (Some(machine), Some(record), Some(pod)) = (machine, &self.record, &self.pod) else { return };
        let Some(attempt) = record.attempt.as_ref().filter(|attempt| attempt.ended.is_none()) else { return };
        let state = machine.state().borrow().clone();
        if matches!(state, State::Preparing) {
            return;
        }
        let has_main = self.has_main();
        let main_known = matches!(attempt.main, Main::Started(_) | Main::Ended { .. });
        if self.local.collector.is_none() && !self.local.no_output {
            let source = match (has_main, main_known) {
                (true, true) => Some(Source::Main(machine.guest().main_process(MAIN))),
                (true, false) => None,
                (false, _) => Some(Source::Console(machine.console_path())),
            };
            let container = pod::machine_container(pod).map_or("", |container| &container.name);
            let log = self.world.records.log(&self.uid, container, attempt.number);
            match source.map(|source| Collector::start(&log, source)) {
                Some(Ok(collector)) => self.local.collector = Some(collector),
                Some(Err(error)) => {
                    tracing::warn!(pod = %self.uid, error = error_chain(&error), "the container's log can't be written");
                    self.local.no_output = true;
                }
                // A machine that is gone before its main process was started has said nothing.
                None if state.is_final() => self.local.no_output = true,
                None => {}
            }
        }
        let has_volumes = pod::spec(pod).and_then(|spec| spec.volumes.as_ref()).is_some_and(|list| !list.is_empty());
        if has_volumes
            && self.local.keeper.is_none()
            && !state.is_final()
            && let Some(address) = record.address.or_else(|| machine.reachable())
        {
            // What ran before this agent came had its volumes.
            self.local.mounted |= main_known || (!has_main && attempt.started.is_some());
            let facts = self.world.facts(Some(address));
            let (send, id) = (self.send.clone(), machine.id().clone());
            // Nobody listens any more: the worker is over.
            let mounted = move || drop(send.send(Input::Mounted(id)));
            let (world, wanted, run) = (Arc::clone(&self.world), self.wanted.clone(), self.run.clone());
            let mut keeper = JoinSet::new();
            keeper.spawn(volumes::keep(world, wanted, machine.clone(), facts, run, mounted));
            self.local.keeper = Some(keeper);
        }
        if let Some(collector) = &self.local.collector
            && state.is_final()
        {
            self.local.stopped.get_or_insert(now);
            collector.finish();
        }
        if matches!(attempt.main, Main::Started(_)) && !self.local.waiting_for_main && !state.is_final() {
            self.local.waiting_for_main = true;
            let (guest, send) = (machine.guest(), self.send.clone());
            let container = self.pod.as_deref().and_then(pod::machine_container).cloned();
            self.tasks.spawn(async move {
                let ended = guest.main_process(MAIN).wait().await;
                // While the machine is there: the guest is all that knows it.
                let said = match (&ended, &container) {
                    (Ok(_), Some(container)) => last_words::of_guest(&guest, container).await,
                    _ => None,
                };
                if matches!(&ended, Err(error) if !is_final(error)) {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                // Nobody listens any more: the worker is over.
                send.send(Input::MainEnded(ended, said)).ok();
            });
        }
        self.attend_probes(machine);
    }

    /// Begins to ask the probes once the container runs, which for a machine without a command is when its guest answers.
    fn attend_probes(&mut self, machine: &Machine) {
        let (Some(pod), Some(attempt)) = (&self.pod, self.attempt()) else { return };
        let Some(container) = pod::machine_container(pod).filter(|container| Purpose::any(container)) else {
            return;
        };
        let state = machine.state().borrow().clone();
        if state.is_final() || matches!(attempt.main, Main::Ended { .. }) {
            // What is over isn't unhealthy.
            self.local.prober = None;
            return;
        }
        if self.local.prober.is_some()
            || !matches!(state, State::Running)
            || attempt.unwell.is_some()
            || (pod::post_start(pod).is_some() && !attempt.hooked)
        {
            return;
        }
        let answers = matches!(&*machine.guest().ready().borrow(), GuestState::Ready)
            && (self.local.keeper.is_none() || self.local.mounted);
        let since = match attempt.main {
            Main::Started(at) => at,
            Main::Unstarted if !self.has_main() && answers => Timestamp::now(),
            Main::Unstarted | Main::Asked | Main::Ended { .. } => return,
        };
        let known = status::shown(pod, &container.name, &format!("vmpod://{}", machine.id()));
        let at = Where::Guest(machine.clone());
        let subject = Subject { at, container: container.clone(), run: self.run.clone(), since };
        let (world, pod, uid) = (Arc::clone(&self.world), Arc::clone(pod), self.uid.clone());
        self.local.prober = Some(Prober::start(subject, known, move |purpose, answer| {
            let name = pod::machine_container(&pod).map_or("", |container| &container.name);
            world.probes.count(&uid, &pod, name, purpose, answer.is_ok());
            if let Err(why) = answer {
                let text = format!("{} probe failed: {why}", purpose.title());
                world.events.container(&pod, Kind::Warning, "Unhealthy", text);
            }
        }));
    }

    fn attempt(&self) -> Option<&Attempt> {
        self.record.as_ref()?.attempt.as_ref().filter(|attempt| attempt.ended.is_none())
    }

    /// A pull that failed a moment ago is a pull that waits.
    pub(super) fn call_backoff(&mut self, now: Timestamp) {
        let Some((trouble, since)) = &mut self.trouble else { return };
        if trouble.reason == "ErrImagePull" && now >= *since + CALLED_BACKOFF {
            let image =
                self.pod.as_deref().and_then(pod::machine_container).and_then(|c| c.image.clone()).unwrap_or_default();
            "ImagePullBackOff".clone_into(&mut trouble.reason);
            trouble.message = format!("Back-off pulling image {image:?}: ErrImagePull: {}", trouble.message);
            if let Some(pod) = &self.pod {
                self.world.events.container(pod, Kind::Normal, "BackOff", format!("Back-off pulling image {image:?}"));
                self.world.events.container(pod, Kind::Warning, "Failed", "Error: ImagePullBackOff");
            }
        }
    }

    pub(super) fn observe(&self, machine: Option<&Machine>) -> Observed {
        let (mut guest_ready, mut guest) = (false, None);
        let seen = match machine {
            None => self.residue.clone(),
            Some(machine) => {
                match &*machine.guest().ready().borrow() {
                    GuestState::Ready if self.local.keeper.is_none() || self.local.mounted => guest_ready = true,
                    GuestState::Ready => guest = Some("the volumes are being mounted".to_owned()),
                    other => guest = Some(other.to_string()),
                }
                match &*machine.state().borrow() {
                    State::Preparing => MachineSeen::Prepared,
                    State::Booting => MachineSeen::Booting,
                    State::Running | State::Stopping { .. } | State::Paused | State::Suspended => MachineSeen::Live,
                    State::Stopped(exit) => MachineSeen::Stopped(exit.clone()),
                    State::Failed(why) => MachineSeen::Failed(why.clone()),
                }
            }
        };
        let drained = self.local.no_output
            || self.local.collector.as_ref().is_some_and(|collector| *collector.drained().borrow());
        let container = self.pod.as_deref().and_then(pod::machine_container);
        let verdict = match &self.local.prober {
            Some(prober) => Some(prober.verdict().borrow().clone()),
            None => container.map(|container| Verdict::before(container, None)),
        };
        let hooked = self.pod.as_deref().and_then(pod::post_start).is_none()
            || self.attempt().is_some_and(|attempt| attempt.hooked);
        let failed = self.local.hook_failed.clone().or_else(|| verdict.as_ref()?.failed.clone());
        Observed {
            failed,
            unstarted: verdict.as_ref().is_some_and(|verdict| !verdict.started),
            unready: !hooked || verdict.as_ref().is_some_and(|verdict| !verdict.ready),
            pre_stop: self.local.pre_stop,
            machine: seen,
            restored: machine.is_some_and(|machine| machine.spec().template().is_some()),
            guest_ready,
            guest,
            location: machine.map(Location::of).unwrap_or_default(),
            resolved: if self.resolved.is_some() { Resolved::Yes } else { Resolved::No },
            trouble: self.trouble.as_ref().map(|(trouble, _)| trouble.clone()),
            drained,
            stopped: self.local.stopped,
            stopping: self.local.stopping,
            killing: self.local.killing,
            company: self.crew.as_ref().map(|crew| crew.view().borrow().company),
            job: self.job,
            deleted: self.deleted,
        }
    }

    /// Tells the API and the kubelet API how things are.
    pub(super) fn show(&mut self, wanted: &Wanted, machine: Option<&Machine>, seen: &Observed, now: Timestamp) {
        let Some(pod) = &wanted.pod else { return };
        let mut shown = Arc::clone(pod);
        let crew = self.crew.as_ref().map(|crew| crew.view().borrow().clone());
        if let Some(record) = &self.record {
            let foreign = record.terminal.as_ref().is_some_and(|terminal| terminal.shown_before);
            // What the engine has of the pod must be known first, or what is shown of it would be wiped out.
            let unknown = crew.as_ref().is_some_and(|crew| !crew.known && crew.trouble.is_none());
            let over = record.terminal.is_some() && crew.as_ref().is_some_and(|crew| !crew.known);
            if !foreign && !unknown && !over {
                let published = self.published.as_ref();
                let status = status::status(pod, record, seen, self.world.address, now, published, crew.as_ref());
                let changed = self.published.as_ref() != Some(&status);
                let newer = self.statuses.borrow().as_ref().is_none_or(|(base, _)| !Arc::ptr_eq(base, pod));
                if changed || newer {
                    self.statuses.send_replace(Some((Arc::clone(pod), status.clone())));
                }
                let mut with_status = Pod::clone(pod);
                with_status.status = Some(PodStatus {
                    qos_class: pod.status.as_ref().and_then(|status| status.qos_class.clone()),
                    ..status.clone()
                });
                shown = Arc::new(with_status);
                self.published = Some(status);
            }
        }
        let attempt = self.record.as_ref().and_then(|record| record.attempt.as_ref());
        let quiet = attempt.is_none_or(|attempt| attempt.ended.is_some())
            && !matches!(seen.machine, MachineSeen::Booting | MachineSeen::Live | MachineSeen::Broken(_))
            && seen.job.is_none()
            && seen.company.is_none_or(|company| company.quiet);
        self.view.send_replace(View {
            pod: Some(shown),
            record: self.record.clone().map(Arc::new),
            machine: machine.cloned(),
            run: self.run.clone(),
            log: self.local.collector.as_ref().filter(|collector| !*collector.drained().borrow()).map(Collector::live),
            crew,
            quiet,
        });
    }
}
