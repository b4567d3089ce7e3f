//! One pod's worker: it looks, plans, does, and shows. One task per UID; nothing else touches the pod's machine.

use std::{collections::HashMap, future::Future, pin::Pin, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use vmpod_machine::{ExitStatus, GuestError, GuestState, Learnt, Machine, MachineId, State};

use crate::{
    backoff::Backoff,
    collect::Collector,
    error_chain,
    events::Kind,
    image_pull,
    plan::{Desired, HookSeen, Job, MachineSeen, Plan, Trouble, plan},
    pod::{self, PodUid, RestartPolicy},
    probe::{Failed, Verdict},
    prober::Prober,
    record::{ImageChoice, Main, Record, StopReason},
    run_config::RunConfig,
    sidecars::{self, Crew, MachineWord, Wish},
    status_writer,
    world::{Handle, View, Wanted, World},
};

mod effects;
mod jobs;
mod look;

/// The main process's name in the guest.
pub(crate) const MAIN: &str = "main";

/// A pull that failed is called a back-off after this long, as in the kubelet, where the next sync does it.
pub(crate) const CALLED_BACKOFF: SignedDuration = SignedDuration::from_secs(3);

/// What a job came to.
enum Outcome {
    Resolved {
        image: ImageChoice,
        run: RunConfig,
    },
    Prepared,
    Started,
    MainStarted,
    /// The postStart hook is over.
    Hooked(Result<(), String>),
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
    /// How the main process ended, and what it left to say.
    MainEnded(Result<ExitStatus, GuestError>, Option<String>),
    /// The volumes of this machine are in the guest.
    Mounted(MachineId),
    /// The preStop hook of this machine is over.
    PreStopped(MachineId),
    /// A signal or kill didn't arrive: it may be tried again.
    StopFailed,
}

/// What is known of the current attempt in this life of the agent only.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own, not a state")]
#[derive(Default)]
struct Local {
    collector: Option<Collector>,
    /// The collection was not needed, or can't be had.
    no_output: bool,
    waiting_for_main: bool,
    /// Brings the volumes into the guest; ends with this.
    keeper: Option<JoinSet<()>>,
    mounted: bool,
    prober: Option<Prober>,
    /// The postStart hook failed.
    hook_failed: Option<Failed>,
    pre_stop: HookSeen,
    stopping: bool,
    killing: bool,
    /// When this agent first saw that the machine had stopped.
    stopped: Option<Timestamp>,
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
    /// The containers beside the machine, if there are any.
    crew: Option<Crew>,
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
    /// What must be over before anything is done.
    pub(crate) after: Option<CancellationToken>,
}

/// Starts a pod's worker.
pub(crate) fn start(world: &Arc<World>, beginning: Beginning) -> Handle {
    let (wanted, wanted_rx) = watch::channel(beginning.wanted);
    // While it waits for its turn, nothing of the pod runs.
    let (view, view_rx) = watch::channel(View { quiet: beginning.after.is_some(), ..View::default() });
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
        crew: None,
        job: None,
        trouble: None,
        failures: HashMap::new(),
        local: Local::default(),
        deleted: false,
        inputs,
        send,
        tasks,
    };
    let task = tokio::spawn(async move {
        if let Some(after) = beginning.after {
            after.cancelled().await;
        }
        worker.run().await;
    });
    let task = task.abort_handle();
    Handle { wanted, view: view_rx, task }
}

/// Changes of what a plan looked at. Made before the look, so that no change falls between the look and the wait.
struct Signals {
    state: Option<watch::Receiver<State>>,
    guest: Option<watch::Receiver<GuestState>>,
    drained: Option<watch::Receiver<bool>>,
    probes: Option<watch::Receiver<Verdict>>,
    crew: Option<watch::Receiver<sidecars::View>>,
    learnt: Option<watch::Receiver<Option<Learnt>>>,
}

impl Signals {
    fn of(machine: Option<&Machine>, local: &Local, crew: Option<&Crew>) -> Self {
        fn fresh<T>(mut receiver: watch::Receiver<T>) -> watch::Receiver<T> {
            receiver.mark_unchanged();
            receiver
        }
        Self {
            state: machine.map(|machine| fresh(machine.state())),
            guest: machine.map(|machine| fresh(machine.guest().ready())),
            drained: local.collector.as_ref().map(|collector| fresh(collector.drained())),
            probes: local.prober.as_ref().map(|prober| fresh(prober.verdict().clone())),
            crew: crew.map(|crew| fresh(crew.view().clone())),
            // Without anything to learn its sender is gone, which would look like a change for ever.
            learnt: machine.filter(|machine| machine.spec().learns().is_some()).map(|machine| fresh(machine.learnt())),
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
            let now = Timestamp::now();
            self.attend(machine.as_ref(), now);
            self.lead(&wanted, machine.as_ref());
            let mut signals = Signals::of(machine.as_ref(), &self.local, self.crew.as_ref());
            self.call_backoff(now);
            let seen = self.observe(machine.as_ref());
            self.show(&wanted, machine.as_ref(), &seen, now);
            let desired = Desired {
                pod: wanted.pod.as_deref(),
                agent_stops: wanted.agent_stops,
                evicted: wanted.evicted.as_deref(),
            };
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
                let backoff = self
                    .trouble
                    .as_ref()
                    .filter(|(t, _)| t.reason == "ErrImagePull")
                    .map(|(_, at)| *at + CALLED_BACKOFF);
                let wake = [wake, stuck, backoff.filter(|at| *at > now)].into_iter().flatten().min();
                self.wait(&mut signals, wake).await;
            }
        }
    }

    fn machine(&self) -> Option<Machine> {
        self.world.machines.get(&self.record.as_ref()?.machine()?)
    }

    fn has_main(&self) -> bool {
        self.pod.as_deref().is_some_and(pod::has_main)
    }

    /// Tells the containers beside the machine how things are with it.
    fn lead(&mut self, wanted: &Wanted, alive: Option<&Machine>) {
        let Some(record) = self.record.as_ref().filter(|record| record.sidecars) else { return };
        let attempt = record.attempt.as_ref();
        let ended = attempt.and_then(|attempt| attempt.ended.as_ref());
        let machine = match (attempt, ended) {
            _ if record.terminal.is_some() => MachineWord::Over,
            (None, _) | (Some(_), Some(_)) if record.stop.is_some() => MachineWord::Over,
            (None, _) => MachineWord::Unbegun,
            (Some(_), None) => MachineWord::Lives,
            (Some(_), Some(ended)) => {
                let again = self.pod.as_deref().is_some_and(|pod| RestartPolicy::of(pod).restarts(ended.exit_code));
                if again { MachineWord::Lives } else { MachineWord::Over }
            }
        };
        let wish = Wish {
            pod: wanted.pod.clone(),
            machine,
            answers: alive.is_some_and(|machine| matches!(&*machine.guest().ready().borrow(), GuestState::Ready)),
            stop: record.stop.as_ref().map(|stop| stop.deadline),
            over: record.terminal.is_some(),
        };
        match &self.crew {
            Some(crew) => crew.wish(wish),
            None => self.crew = Some(Crew::start(&self.world, &self.world.engine, &self.uid, wish)),
        }
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
            () = changed(&mut signals.probes) => None,
            () = changed(&mut signals.crew) => None,
            () = changed(&mut signals.learnt) => None,
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
            Input::Mounted(id) => {
                if self.record.as_ref().and_then(Record::machine).as_ref() == Some(&id) {
                    self.local.mounted = true;
                }
            }
            Input::PreStopped(id) => {
                if self.record.as_ref().and_then(Record::machine).as_ref() == Some(&id) {
                    self.local.pre_stop = HookSeen::Done;
                }
            }
            Input::StopFailed => {
                self.local.stopping = false;
                self.local.killing = false;
            }
            Input::MainEnded(ended, said) => {
                self.local.waiting_for_main = false;
                let (code, why) = match ended {
                    Ok(status) => (Some(status.code()), said),
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
        // What is left of a failed preparation goes at once; that isn't the preparation's success.
        let kept = |(trouble, _): &(Trouble, Timestamp)| job == Job::Remove && trouble.job == Job::Prepare;
        self.trouble = self.trouble.take().filter(kept);
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
            Outcome::Hooked(result) => self.hooked(result).await,
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
        self.trouble = Some((Trouble { job, reason: failure.reason, message: failure.message, retry }, now));
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

/// Waits until then; without a time, for ever.
pub(crate) async fn sleep_until(wake: Option<Timestamp>) {
    match wake {
        Some(wake) => {
            let left = wake.duration_since(Timestamp::now());
            tokio::time::sleep(Duration::try_from(left).unwrap_or_default()).await;
        }
        None => std::future::pending().await,
    }
}
