//! One pod's worker: it looks, plans, does, and shows. One task per UID; nothing else touches the pod's machine.

use std::{collections::HashMap, future::Future, pin::Pin, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use vmpod_machine::{ExitStatus, GuestError, GuestState, Machine, Signal, State};

use crate::{
    backoff::Backoff,
    collect::{Collector, Source},
    error_chain,
    events::Kind,
    image_pull,
    plan::{Desired, Job, MachineSeen, Observed, Plan, Resolved, Step, Trouble, plan},
    pod::{self, PodUid},
    record::{Attempt, Ended, ImageChoice, Main, Record, Stop, StopReason, Terminal},
    run_config::RunConfig,
    status, status_writer,
    world::{Handle, View, Wanted, World},
};

mod jobs;

/// The main process's name in the guest.
pub(crate) const MAIN: &str = "main";

/// A pull that failed is called a back-off after this long, as in the kubelet, where the next sync does it.
const CALLED_BACKOFF: SignedDuration = SignedDuration::from_secs(3);

/// What a job came to.
enum Outcome {
    Resolved { image: ImageChoice, run: RunConfig },
    Prepared,
    Started,
    MainStarted,
    /// The guest will never start this command.
    MainRefused(String),
    Removed,
    Deleted,
}

/// A job's failure, to be tried again.
struct Failure {
    reason: String,
    message: String,
}

/// Something that happened beside the worker.
enum Input {
    Done(Job, Result<Outcome, Failure>),
    MainEnded(Result<ExitStatus, GuestError>),
    /// A signal or kill didn't arrive: it may be tried again.
    StopFailed,
}

/// What is known of the current attempt in this life of the agent only.
#[derive(Default)]
struct Local {
    collector: Option<Collector>,
    /// The collection was not needed, or can't be had.
    no_output: bool,
    waiting_for_main: bool,
    stopping: bool,
    killing: bool,
}

struct Worker {
    world: Arc<World>,
    uid: PodUid,
    wanted: watch::Receiver<Wanted>,
    view: watch::Sender<View>,
    statuses: watch::Sender<Option<(Arc<Pod>, PodStatus)>>,
    published: Option<PodStatus>,
    record: Option<Record>,
    /// The last pod object seen, for what must be said after it is gone.
    pod: Option<Arc<Pod>>,
    /// What is on disk where no machine is known.
    residue: MachineSeen,
    resolved: Option<ImageChoice>,
    run: Option<Arc<RunConfig>>,
    job: Option<Job>,
    trouble: Option<(Trouble, Timestamp)>,
    failures: HashMap<Job, Backoff>,
    local: Local,
    deleted: bool,
    inputs: mpsc::UnboundedReceiver<Input>,
    send: mpsc::UnboundedSender<Input>,
    tasks: JoinSet<()>,
}

/// Where a pod's worker begins.
pub(crate) struct Beginning {
    pub(crate) uid: PodUid,
    pub(crate) wanted: Wanted,
    /// What an earlier agent left.
    pub(crate) record: Option<Record>,
    /// What is on disk of the current attempt's machine, if no machine is known.
    pub(crate) residue: MachineSeen,
}

/// Starts a pod's worker.
pub(crate) fn start(world: &Arc<World>, beginning: Beginning) -> Handle {
    let (wanted, wanted_rx) = watch::channel(beginning.wanted);
    let (view, view_rx) = watch::channel(View::default());
    let (statuses, statuses_rx) = watch::channel(None);
    let (send, inputs) = mpsc::unbounded_channel();
    let mut record = beginning.record;
    if let Some(record) = &mut record
        && record.stop.as_ref().is_some_and(|stop| stop.why == StopReason::Agent)
    {
        // That agent is gone, and this one isn't stopping.
        record.stop = None;
    }
    let run = record.as_ref().and_then(|record| RunConfig::load(&world.records.dir(&record.uid)).ok()).map(Arc::new);
    let mut tasks = JoinSet::new();
    tasks.spawn(status_writer::run(world.client.clone(), statuses_rx));
    let worker = Worker {
        world: Arc::clone(world),
        uid: beginning.uid,
        wanted: wanted_rx,
        view,
        statuses,
        published: None,
        record,
        pod: None,
        residue: beginning.residue,
        resolved: None,
        run,
        job: None,
        trouble: None,
        failures: HashMap::new(),
        local: Local::default(),
        deleted: false,
        inputs,
        send,
        tasks,
    };
    let task = tokio::spawn(worker.run()).abort_handle();
    Handle { wanted, view: view_rx, task }
}

/// Changes of what a plan looked at. Made before the look, so that no change falls between the look and the wait.
struct Signals {
    state: Option<watch::Receiver<State>>,
    guest: Option<watch::Receiver<GuestState>>,
    drained: Option<watch::Receiver<bool>>,
}

impl Signals {
    fn of(machine: Option<&Machine>, collector: Option<&Collector>) -> Self {
        fn fresh<T>(mut receiver: watch::Receiver<T>) -> watch::Receiver<T> {
            receiver.mark_unchanged();
            receiver
        }
        Self {
            state: machine.map(|machine| fresh(machine.state())),
            guest: machine.map(|machine| fresh(machine.guest().ready())),
            drained: collector.map(|collector| fresh(collector.drained())),
        }
    }
}

/// Whether the worker goes on.
enum Flow {
    On,
    /// A record couldn't be written: nothing that depends on it may happen.
    Stuck,
    Over,
}

impl Worker {
    async fn run(mut self) {
        loop {
            let wanted = self.wanted.borrow_and_update().clone();
            if wanted.pod.is_some() {
                self.pod.clone_from(&wanted.pod);
            }
            let machine = self.machine();
            self.attend(machine.as_ref());
            let mut signals = Signals::of(machine.as_ref(), self.local.collector.as_ref());
            let now = Timestamp::now();
            self.call_backoff(now);
            let seen = self.observe(machine.as_ref());
            self.show(&wanted, machine.as_ref(), &seen, now);
            let desired = Desired { pod: wanted.pod.as_deref(), agent_stops: wanted.agent_stops };
            let Plan { steps, wake } = plan(desired, self.record.as_ref(), &seen, now);
            let mut stuck = None;
            let idle = steps.is_empty();
            for step in steps {
                tracing::debug!(pod = %self.uid, ?step, "step");
                match self.apply(step, machine.as_ref(), now).await {
                    Flow::On => {}
                    Flow::Stuck => {
                        stuck = Some(now.saturating_add(SignedDuration::from_secs(2)).unwrap_or(now));
                        break;
                    }
                    Flow::Over => return,
                }
            }
            if idle || stuck.is_some() {
                let backoff = self.trouble.as_ref().filter(|(t, _)| t.reason == "ErrImagePull").map(|(_, at)| *at + CALLED_BACKOFF);
                let wake = [wake, stuck, backoff.filter(|at| *at > now)].into_iter().flatten().min();
                self.wait(&mut signals, wake).await;
            }
        }
    }

    fn machine(&self) -> Option<Machine> {
        self.world.machines.get(&self.record.as_ref()?.machine()?)
    }

    fn has_main(&self) -> bool {
        self.pod.as_deref().and_then(pod::machine_container).is_some_and(|container| pod::command(container).is_some())
    }

    /// Makes sure that whatever the attempt gives is being taken: its output, its main process's end.
    fn attend(&mut self, machine: Option<&Machine>) {
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
        if let Some(collector) = &self.local.collector
            && state.is_final()
        {
            collector.finish();
        }
        if matches!(attempt.main, Main::Started(_)) && !self.local.waiting_for_main && !state.is_final() {
            self.local.waiting_for_main = true;
            let (process, send) = (machine.guest().main_process(MAIN), self.send.clone());
            self.tasks.spawn(async move {
                let ended = process.wait().await;
                if matches!(&ended, Err(error) if !is_final(error)) {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                // Nobody listens any more: the worker is over.
                send.send(Input::MainEnded(ended)).ok();
            });
        }
    }

    /// A pull that failed a moment ago is a pull that waits.
    fn call_backoff(&mut self, now: Timestamp) {
        let Some((trouble, since)) = &mut self.trouble else { return };
        if trouble.reason == "ErrImagePull" && now >= *since + CALLED_BACKOFF {
            let image = self.pod.as_deref().and_then(pod::machine_container).and_then(|c| c.image.clone()).unwrap_or_default();
            trouble.reason = "ImagePullBackOff".to_owned();
            trouble.message = format!("Back-off pulling image {image:?}: ErrImagePull: {}", trouble.message);
            if let Some(pod) = &self.pod {
                self.world.events.container(pod, Kind::Normal, "BackOff", format!("Back-off pulling image {image:?}"));
                self.world.events.container(pod, Kind::Warning, "Failed", "Error: ImagePullBackOff");
            }
        }
    }

    fn observe(&self, machine: Option<&Machine>) -> Observed {
        let (mut guest_ready, mut guest) = (false, None);
        let seen = match machine {
            None => self.residue.clone(),
            Some(machine) => {
                match &*machine.guest().ready().borrow() {
                    GuestState::Ready => guest_ready = true,
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
        let drained = self.local.no_output || self.local.collector.as_ref().is_some_and(|collector| *collector.drained().borrow());
        Observed {
            machine: seen,
            guest_ready,
            guest,
            resolved: if self.resolved.is_some() { Resolved::Yes } else { Resolved::No },
            trouble: self.trouble.as_ref().map(|(trouble, _)| trouble.clone()),
            drained,
            stopping: self.local.stopping,
            killing: self.local.killing,
            job: self.job,
            deleted: self.deleted,
        }
    }

    /// Tells the API and the kubelet API how things are.
    fn show(&mut self, wanted: &Wanted, machine: Option<&Machine>, seen: &Observed, now: Timestamp) {
        let Some(pod) = &wanted.pod else { return };
        let mut shown = Arc::clone(pod);
        if let Some(record) = &self.record {
            let foreign = record.terminal.as_ref().is_some_and(|terminal| terminal.shown_before);
            if !foreign {
                let status = status::status(pod, record, seen, self.world.address, now, self.published.as_ref());
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
            && seen.job.is_none();
        self.view.send_replace(View {
            pod: Some(shown),
            record: self.record.clone().map(Arc::new),
            machine: machine.cloned(),
            run: self.run.clone(),
            log: self.local.collector.as_ref().filter(|collector| !*collector.drained().borrow()).map(Collector::live),
            quiet,
        });
    }

    /// Waits until something may have changed.
    async fn wait(&mut self, signals: &mut Signals, wake: Option<Timestamp>) {
        let input = tokio::select! {
            biased;
            input = self.inputs.recv() => input,
            changed = self.wanted.changed() => {
                if changed.is_err() {
                    // The agent is gone: so are we, and no machine with us.
                    std::future::pending::<()>().await;
                }
                None
            }
            () = changed(&mut signals.state) => None,
            () = changed(&mut signals.guest) => None,
            () = changed(&mut signals.drained) => None,
            () = sleep_until(wake) => None,
        };
        if let Some(input) = input {
            self.take(input).await;
        }
        while self.tasks.try_join_next().is_some() {}
    }

    async fn take(&mut self, input: Input) {
        match input {
            Input::Done(job, result) => {
                self.job = None;
                self.done(job, result).await;
            }
            Input::StopFailed => {
                self.local.stopping = false;
                self.local.killing = false;
            }
            Input::MainEnded(ended) => {
                self.local.waiting_for_main = false;
                let (code, why) = match ended {
                    Ok(status) => (Some(status.code()), None),
                    Err(GuestError::MainLost { why, .. }) => (None, Some(why)),
                    // The machine's own end follows, or the guest answers again.
                    Err(error) => {
                        tracing::debug!(pod = %self.uid, error = error_chain(&error), "the main process's end isn't known");
                        return;
                    }
                };
                self.main_ended(code, why).await;
            }
        }
    }

    /// The code is on disk before the machine, which holds the only other copy, is killed.
    async fn main_ended(&mut self, code: Option<i32>, why: Option<String>) {
        loop {
            let changed = self.change("main process ended", |record| {
                let attempt = record.attempt.as_mut()?;
                let started = match attempt.main {
                    Main::Started(at) => Some(at),
                    Main::Unstarted | Main::Asked => None,
                    Main::Ended { .. } => return None,
                };
                attempt.main = Main::Ended { code, started, at: Timestamp::now(), why: why.clone() };
                Some(())
            });
            match changed.await {
                Flow::Stuck => tokio::time::sleep(Duration::from_secs(1)).await,
                Flow::On | Flow::Over => return,
            }
        }
    }

    async fn done(&mut self, job: Job, result: Result<Outcome, Failure>) {
        let outcome = match result {
            Ok(outcome) => outcome,
            Err(failure) => return self.failed(job, failure),
        };
        self.trouble = None;
        self.failures.remove(&job);
        match outcome {
            Outcome::Resolved { image, run } => {
                self.resolved = Some(image);
                self.run = Some(Arc::new(run));
            }
            Outcome::Prepared => {
                if let Some(pod) = &self.pod {
                    let name = pod::machine_container(pod).map_or("", |container| &container.name);
                    self.world.events.container(pod, Kind::Normal, "Created", format!("Created container: {name}"));
                }
            }
            Outcome::Started | Outcome::Deleted => self.deleted = job == Job::Delete,
            Outcome::MainStarted => self.main_started().await,
            Outcome::MainRefused(why) => {
                if let Some(pod) = &self.pod {
                    self.world.events.container(pod, Kind::Warning, "Failed", format!("Error: {why}"));
                }
                self.local.no_output = true;
                self.main_ended(Some(128), Some(why)).await;
            }
            Outcome::Removed => {
                self.residue = MachineSeen::Absent;
                self.local = Local::default();
            }
        }
    }

    async fn main_started(&mut self) {
        let changed = self.change("main process started", |record| {
            let attempt = record.attempt.as_mut()?;
            (attempt.main == Main::Asked).then(|| attempt.main = Main::Started(Timestamp::now()))
        });
        // Should the disk be full, the job runs again and finds the process started before.
        if matches!(changed.await, Flow::On) {
            self.tell_started();
        }
    }

    fn tell_started(&self) {
        if let Some(pod) = &self.pod {
            let name = pod::machine_container(pod).map_or("", |container| &container.name);
            self.world.events.container(pod, Kind::Normal, "Started", format!("Started container {name}"));
        }
    }

    fn failed(&mut self, job: Job, failure: Failure) {
        let now = Timestamp::now();
        let backoff = self.failures.entry(job).or_default();
        backoff.fail(now, backoff.until().unwrap_or(now));
        // Pulls wait as long as the kubelet's; what happens on this host is tried sooner.
        let wait = match job {
            Job::Resolve => backoff.wait(),
            _ => SignedDuration::from_millis(i64::try_from(backoff.wait().as_millis()).unwrap_or(i64::MAX) / 10),
        };
        tracing::info!(pod = %self.uid, ?job, reason = failure.reason, message = failure.message, "failed; trying again in {wait:#}");
        if let (Some(pod), Job::Prepare | Job::Start) = (&self.pod, job) {
            self.world.events.container(pod, Kind::Warning, "Failed", format!("Error: {}", failure.message));
        }
        if job == Job::Prepare {
            self.residue = MachineSeen::Unfinished;
        }
        let retry = now.saturating_add(wait).unwrap_or(Timestamp::MAX);
        self.trouble = Some((Trouble { reason: failure.reason, message: failure.message, retry }, now));
    }

    async fn apply(&mut self, step: Step, machine: Option<&Machine>, now: Timestamp) -> Flow {
        match step {
            Step::Accept => self.accept(now).await,
            Step::Run(job) => {
                self.start_job(job, machine);
                Flow::On
            }
            Step::Begin => self.begin().await,
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
            Step::NoteStop(stop) => self.note_stop(stop).await,
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
                    self.beside(async move { machine.stop(grace).await.map(drop).map_err(|error| error_chain(&error)) });
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
    fn beside(&mut self, work: impl Future<Output = Result<(), String>> + Send + 'static) {
        let (send, uid) = (self.send.clone(), self.uid.clone());
        self.tasks.spawn(async move {
            if let Err(error) = work.await {
                tracing::warn!(pod = %uid, error, "stopping didn't work; trying again");
                tokio::time::sleep(Duration::from_secs(1)).await;
                send.send(Input::StopFailed).ok();
            }
        });
    }

    async fn accept(&mut self, now: Timestamp) -> Flow {
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
            record.backoff.fail(now, now);
            self.world.ledger.restore(&self.uid, &pod, None);
        } else if pod.metadata.deletion_timestamp.is_none()
            && let Err(refusal) = self.world.ledger.admit(&self.uid, &pod, &self.world.name)
        {
            self.world.events.pod(&pod, Kind::Warning, refusal.reason, refusal.message.clone());
            record.terminal = Some(Terminal {
                succeeded: false,
                reason: Some(refusal.reason.to_owned()),
                message: Some(format!("Pod was rejected: {}", refusal.message)),
                shown_before: false,
            });
        } else {
            // Nothing exists yet: the record is written when the first attempt begins.
            self.record = Some(record);
            return Flow::On;
        }
        self.store("pod accepted", record).await
    }

    async fn begin(&mut self) -> Flow {
        let (Some(record), Some(image), Some(run)) = (&self.record, &self.resolved, &self.run) else { return Flow::On };
        if let Err(error) = run.save(&self.world.records.dir(&self.uid)) {
            tracing::warn!(pod = %self.uid, %error, "can't write what the attempt runs");
            return Flow::Stuck;
        }
        let number = record.next_attempt();
        let foreign = self.world.machines.addresses();
        let mut next = record.clone();
        next.address = self.world.ledger.address(&self.uid, &self.uid.machine(number), &foreign);
        next.previous = next.attempt.take().and_then(|attempt| attempt.ended).or(next.previous);
        next.attempt = Some(Attempt { number, image: image.clone(), started: None, main: Main::Unstarted, ended: None });
        let flow = self.store("attempt begun", next).await;
        if matches!(flow, Flow::On) {
            self.resolved = None;
            self.local = Local::default();
        }
        flow
    }

    async fn note_stop(&mut self, stop: Stop) -> Flow {
        let first = self.record.as_ref().is_some_and(|record| record.stop.is_none());
        let running = self.record.as_ref().is_some_and(|record| record.attempt.as_ref().is_some_and(|attempt| attempt.ended.is_none()));
        if let (true, true, Some(pod)) = (first, running, &self.pod) {
            let name = pod::machine_container(pod).map_or("", |container| &container.name);
            let (reason, message) = match stop.why {
                StopReason::Deadline => ("DeadlineExceeded", "Pod was active on the node longer than the specified deadline".to_owned()),
                StopReason::Deleted | StopReason::Agent => ("Killing", format!("Stopping container {name}")),
            };
            self.world.events.container(pod, Kind::Normal, reason, message);
        }
        let shorter = self.record.as_ref().and_then(|record| record.stop.as_ref()).is_some_and(|old| stop.deadline < old.deadline);
        if shorter {
            // The machine is told again, with the shorter time.
            self.local.stopping = false;
        }
        if self.record.as_ref().is_some_and(|record| record.attempt.is_none()) {
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

    async fn end(&mut self, ended: Ended, terminal: Option<Terminal>) -> Flow {
        let restarts = terminal.is_none();
        let flow = self
            .change("attempt ended", |record| {
                let attempt = record.attempt.as_mut()?;
                attempt.ended = Some(ended.clone());
                let began = ended.started.unwrap_or(ended.finished);
                record.backoff.fail(ended.finished, began);
                record.terminal.clone_from(&terminal);
                Some(())
            })
            .await;
        if matches!(flow, Flow::On) && restarts && self.record.as_ref().is_some_and(|record| record.stop.is_none()) {
            if let Some(pod) = &self.pod {
                let name = pod::machine_container(pod).map_or("", |container| &container.name);
                let message = format!(
                    "Back-off restarting failed container {name} in pod {}_{}({})",
                    pod::name(pod),
                    pod::namespace(pod),
                    self.uid
                );
                self.world.events.container(pod, Kind::Warning, "BackOff", message);
            }
        }
        flow
    }

    async fn conclude(&mut self, terminal: Terminal) -> Flow {
        if self.job == Some(Job::Resolve) {
            // A pull that nobody waits for any more goes on alone, or ends with the worker.
            self.job = None;
        }
        let Some(mut record) = self.record.clone() else { return Flow::On };
        record.terminal = Some(terminal);
        self.store("verdict", record).await
    }

    fn forget(&mut self) -> Flow {
        if let Err(error) = self.world.records.forget(&self.uid) {
            tracing::warn!(pod = %self.uid, error = error_chain(&error), "can't remove what is left of the pod");
            return Flow::Stuck;
        }
        self.world.ledger.release(&self.uid);
        self.world.pods().remove(&self.uid);
        Flow::Over
    }

    /// Changes the record on disk, then in memory. Nothing happens when the closure says so.
    async fn change(&mut self, what: &str, change: impl FnOnce(&mut Record) -> Option<()>) -> Flow {
        let Some(mut record) = self.record.clone() else { return Flow::On };
        match change(&mut record) {
            Some(()) => self.store(what, record).await,
            None => Flow::On,
        }
    }

    async fn store(&mut self, what: &str, record: Record) -> Flow {
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

    fn start_job(&mut self, job: Job, machine: Option<&Machine>) {
        let Some(work) = self.work(job, machine) else { return };
        self.job = Some(job);
        let (send, faults) = (self.send.clone(), self.world.faults.clone());
        self.tasks.spawn(async move {
            let result = work.await;
            faults.hit(&format!("node: job {job:?} done")).await;
            send.send(Input::Done(job, result)).ok();
        });
    }
}

type Work = Pin<Box<dyn Future<Output = Result<Outcome, Failure>> + Send>>;

/// A container that the API shows as running and of which nothing is left here.
fn lost_attempt(pod: &Pod, uid: &PodUid, now: Timestamp) -> Option<Attempt> {
    let shown = pod.status.as_ref()?.container_statuses.as_ref()?.first()?;
    let number = u32::try_from(shown.restart_count).unwrap_or(0);
    let state = shown.state.as_ref()?;
    let (exit_code, started) = match (&state.running, &state.terminated) {
        (Some(running), _) => (137, running.started_at.as_ref().map(|at| at.0)),
        (None, Some(terminated)) => (terminated.exit_code, terminated.started_at.as_ref().map(|at| at.0)),
        (None, None) => return None,
    };
    Some(Attempt {
        number,
        image: ImageChoice { name: shown.image.clone(), digest: shown.image_id.rsplit('@').next().unwrap_or_default().to_owned() },
        started,
        main: Main::Unstarted,
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

fn is_final(error: &GuestError) -> bool {
    matches!(error, GuestError::MainLost { .. } | GuestError::Stopped)
}

async fn changed<T>(receiver: &mut Option<watch::Receiver<T>>) {
    match receiver {
        Some(receiver) => {
            if receiver.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
        None => std::future::pending().await,
    }
}

async fn sleep_until(wake: Option<Timestamp>) {
    match wake {
        Some(wake) => {
            let left = wake.duration_since(Timestamp::now());
            tokio::time::sleep(Duration::try_from(left).unwrap_or_default()).await;
        }
        None => std::future::pending().await,
    }
}
