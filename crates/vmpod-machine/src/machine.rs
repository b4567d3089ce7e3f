//! One machine: a handle, and the one task that drives its life.

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use vmpod_network::learn::Learnt;

use crate::console;
use crate::directory::{self, MachineDir};
use crate::fault::FaultPoints;
use crate::guest::{Exec, Guest};
use crate::hypervisor::{Hypervisor, HypervisorError, Process, Stats};
use crate::id::MachineId;
use crate::lifecycle::{Denied, Effect, Exit, Input, State, step};
use crate::machines::MachineError;
use crate::spec::{GuestOs, Spec};

/// How long a guest may take to hear its power button before it is asked over its login too.
const BUTTON: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 5000 });
/// How much of a console is kept, at least.
const CONSOLE_KEPT: u64 = 16 << 20;
/// How often a console is looked at.
const TRIM_EVERY: Duration = Duration::from_secs(30);

/// A machine of this host. A cheap handle; dropping it stops nothing.
#[derive(Clone, Debug)]
pub struct Machine {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    spec: Spec,
    dir: MachineDir,
    state: watch::Receiver<State>,
    guest: Guest,
    learnt: watch::Receiver<Option<Learnt>>,
    commands: mpsc::UnboundedSender<Command>,
    /// Why the last start was put off.
    refusals: watch::Receiver<String>,
}

/// Waits until a machine's process runs; false when it is over, or nobody drives it any more.
pub(crate) async fn until_running(state: &mut watch::Receiver<State>) -> bool {
    let begun = state.wait_for(|state| !matches!(state, State::Preparing | State::Booting)).await;
    begun.is_ok_and(|state| !state.is_final())
}

/// What a handle asks of the driver.
enum Command {
    Input(Input, oneshot::Sender<Result<(), Denied>>),
    Stats(oneshot::Sender<Result<Stats, HypervisorError>>),
    Snapshot(oneshot::Sender<Result<(), HypervisorError>>),
}

impl Machine {
    /// Its name.
    #[must_use]
    pub fn id(&self) -> &MachineId {
        &self.shared.spec.id
    }

    /// What it was made from.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        &self.shared.spec
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &MachineDir {
        &self.shared.dir
    }

    /// Where it is in its life, and each change of that. The receiver's sender goes away with the [`crate::Machines`].
    #[must_use]
    pub fn state(&self) -> watch::Receiver<State> {
        self.shared.state.clone()
    }

    /// The system inside.
    #[must_use]
    pub fn guest(&self) -> Guest {
        self.shared.guest.clone()
    }

    /// The guest's address, where it has to be learnt ([`Spec::learns`]), and each change of it.
    #[must_use]
    pub fn learnt(&self) -> watch::Receiver<Option<Learnt>> {
        self.shared.learnt.clone()
    }

    /// The guest's own address, where this host reaches each of its ports, when it has one that is known.
    #[must_use]
    pub fn reachable(&self) -> Option<std::net::Ipv4Addr> {
        self.spec().reachable().or_else(|| self.shared.learnt.borrow().map(|learnt| learnt.address))
    }

    /// The raw log of the guest's serial console. It grows from the front only: read it with [`crate::console`].
    #[must_use]
    pub fn console_path(&self) -> PathBuf {
        self.shared.dir.console()
    }

    /// How it ended, when it has.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        match &*self.shared.state.borrow() {
            State::Stopped(exit) => Some(exit.clone()),
            _ => None,
        }
    }

    /// Starts it and waits until its process runs. One that runs already is no error. After [`MachineError::Busy`] it may be started
    /// again.
    pub async fn start(&self) -> Result<(), MachineError> {
        let mut refusals = self.shared.refusals.clone();
        refusals.mark_unchanged();
        self.input(Input::Start).await?;
        let reached = tokio::select! {
            reached = self.wait_for(|state| !matches!(state, State::Preparing | State::Booting)) => reached?,
            Ok(()) = refusals.changed() => {
                let why = refusals.borrow().clone();
                return Err(MachineError::Busy { id: self.id().clone(), why });
            }
        };
        match reached {
            State::Failed(why) => Err(MachineError::Start { id: self.id().clone(), why }),
            _ => Ok(()),
        }
    }

    /// Tells the guest to shut down, kills it after `grace`, and waits until the process is gone.
    ///
    /// A second call can shorten the time that is left. Dropping the future changes nothing.
    pub async fn stop(&self, grace: Duration) -> Result<State, MachineError> {
        let deadline = Timestamp::now().checked_add(grace).unwrap_or(Timestamp::MAX);
        self.input(Input::Stop { deadline }).await?;
        self.wait_for(State::is_final).await
    }

    /// Ends it at once and waits until the process is gone.
    pub async fn kill(&self) -> Result<State, MachineError> {
        self.input(Input::Kill { now: Timestamp::now() }).await?;
        self.wait_for(State::is_final).await
    }

    /// Stops the guest's processors.
    pub async fn pause(&self) -> Result<(), MachineError> {
        self.input(Input::Pause).await
    }

    /// Lets them run again.
    pub async fn resume(&self) -> Result<(), MachineError> {
        self.input(Input::Resume).await
    }

    /// What its process uses; an error when there is none.
    pub async fn stats(&self) -> Result<Stats, MachineError> {
        let (answer, result) = oneshot::channel();
        self.shared.commands.send(Command::Stats(answer)).map_err(|_| MachineError::Closed)?;
        result
            .await
            .map_err(|_| MachineError::Closed)?
            .map_err(|source| MachineError::Hypervisor { id: self.id().clone(), source })
    }

    /// Saves the memory of a machine that was made for it, and ends it: see [`crate::template`].
    pub(crate) async fn snapshot(&self) -> Result<(), MachineError> {
        let (answer, result) = oneshot::channel();
        self.shared.commands.send(Command::Snapshot(answer)).map_err(|_| MachineError::Closed)?;
        result
            .await
            .map_err(|_| MachineError::Closed)?
            .map_err(|source| MachineError::Hypervisor { id: self.id().clone(), source })?;
        self.wait_for(State::is_final).await.map(drop)
    }

    async fn input(&self, input: Input) -> Result<(), MachineError> {
        let (answer, result) = oneshot::channel();
        self.shared.commands.send(Command::Input(input, answer)).map_err(|_| MachineError::Closed)?;
        result
            .await
            .map_err(|_| MachineError::Closed)?
            .map_err(|source| MachineError::Denied { id: self.id().clone(), source })
    }

    async fn wait_for(&self, wanted: impl Fn(&State) -> bool) -> Result<State, MachineError> {
        let mut state = self.state();
        let reached = state.wait_for(|state| wanted(state)).await.map_err(|_| MachineError::Closed)?;
        Ok(reached.clone())
    }
}

/// The task that owns a machine.
pub(crate) struct Driver {
    spec: Spec,
    dir: MachineDir,
    hypervisor: Arc<dyn Hypervisor>,
    faults: FaultPoints,
    state: watch::Sender<State>,
    commands: mpsc::UnboundedReceiver<Command>,
    process: Option<Arc<dyn Process>>,
    starting: Option<Starting>,
    /// What was starting is being cleared away.
    given_up: bool,
    refusals: watch::Sender<String>,
    guest: Guest,
    /// When to look whether a guest that was told to stop does.
    ask_at: Option<Timestamp>,
}

type Starting = Pin<Box<dyn Future<Output = Result<Box<dyn Process>, HypervisorError>> + Send>>;
type Exiting = Pin<Box<dyn Future<Output = Exit> + Send>>;

impl Driver {
    /// Makes a machine's handle and the driver that must be run for it.
    pub(crate) fn new(
        spec: Spec,
        dir: MachineDir,
        state: State,
        process: Option<Box<dyn Process>>,
        hypervisor: Arc<dyn Hypervisor>,
        faults: FaultPoints,
        ways: impl FnOnce(watch::Receiver<State>) -> (Guest, watch::Receiver<Option<Learnt>>),
    ) -> (Machine, Self) {
        let state = watch::Sender::new(state);
        let (commands_tx, commands) = mpsc::unbounded_channel();
        let (guest, learnt) = ways(state.subscribe());
        let refusals = watch::Sender::default();
        let machine = Machine {
            shared: Arc::new(Shared {
                spec: spec.clone(),
                dir: dir.clone(),
                guest,
                learnt,
                state: state.subscribe(),
                commands: commands_tx,
                refusals: refusals.subscribe(),
            }),
        };
        let process = process.map(Arc::from);
        let guest = machine.guest();
        let ask_at = None;
        (
            machine,
            Self {
                spec,
                dir,
                hypervisor,
                faults,
                state,
                commands,
                process,
                starting: None,
                given_up: false,
                refusals,
                guest,
                ask_at,
            },
        )
    }

    /// Drives the machine until nobody can ask for anything any more.
    pub(crate) async fn run(mut self) {
        let mut exiting = self.process.clone().map(watch_exit);
        let mut trim = tokio::time::interval(TRIM_EVERY);
        let mut asking = JoinSet::new();
        loop {
            let waits = self.starting.is_some() && !self.given_up;
            let deadline = match &*self.state.borrow() {
                State::Stopping { deadline } if self.process.is_some() || waits => Some(*deadline),
                _ => None,
            };
            let input = tokio::select! {
                command = self.commands.recv() => match command {
                    None => return,
                    Some(Command::Stats(answer)) => {
                        // Beside the rest: a process that doesn't answer must still be killed when that is asked for.
                        while asking.try_join_next().is_some() {}
                        let process = self.process.clone();
                        asking.spawn(async move {
                            let stats = match process {
                                Some(process) => process.stats().await,
                                None => Err(no_process()),
                            };
                            answer.send(stats).ok();
                        });
                        continue;
                    }
                    Some(Command::Snapshot(answer)) => {
                        let process = self.process.clone();
                        asking.spawn(async move {
                            let done = match process {
                                Some(process) => process.snapshot().await,
                                None => Err(no_process()),
                            };
                            answer.send(done).ok();
                        });
                        continue;
                    }
                    Some(Command::Input(input, answer)) => {
                        let result = self.take(input).await;
                        answer.send(result).ok();
                        continue;
                    }
                },
                started = wait_option(&mut self.starting) => {
                    self.starting = None;
                    match started {
                        Ok(process) => {
                            self.faults.hit("machine: process started").await;
                            let process: Arc<dyn Process> = Arc::from(process);
                            exiting = Some(watch_exit(Arc::clone(&process)));
                            self.process = Some(process);
                            Input::Started
                        }
                        Err(HypervisorError::Busy(why)) => {
                            // The state is shown first: who hears of it may start it again.
                            let taken = self.take(Input::Busy(why.clone())).await;
                            debug_assert!(taken.is_ok(), "only a start is ever denied");
                            self.refusals.send_replace(why);
                            continue;
                        }
                        Err(error) => Input::StartFailed(error_chain(&error)),
                    }
                },
                exit = wait_option(&mut exiting) => {
                    exiting = None;
                    self.process = None;
                    Input::Exited(exit)
                },
                _ = trim.tick(), if self.process.is_some() => {
                    if let Err(error) = console::trim(&self.dir.console(), CONSOLE_KEPT) {
                        tracing::warn!(machine = %self.spec.id, %error, "the console can't be trimmed");
                    }
                    continue;
                }
                () = sleep_until(self.ask_at) => {
                    self.ask_at = None;
                    Input::StillRuns
                },
                () = sleep_until(deadline), if self.process.is_none() => {
                    self.give_up();
                    continue;
                }
                () = sleep_until(deadline) => {
                    let result = self.take(Input::DeadlinePassed).await;
                    debug_assert!(result.is_ok(), "a deadline is never denied");
                    // The kill is on its way; only the exit can follow. Waiting for it here keeps the deadline from
                    // firing again and again.
                    match &mut exiting {
                        Some(exit) => {
                            let exit = exit.await;
                            exiting = None;
                            self.process = None;
                            Input::Exited(exit)
                        }
                        None => continue,
                    }
                },
            };
            let result = self.take(input).await;
            debug_assert!(result.is_ok(), "only a start is ever denied");
        }
    }

    /// Ends a start that is under way: whatever it has made so far goes.
    fn give_up(&mut self) {
        self.given_up = true;
        let (hypervisor, dir) = (Arc::clone(&self.hypervisor), self.dir.clone());
        // What was under way ends here, before what it made is looked for.
        self.starting = Some(Box::pin(async move {
            hypervisor.destroy(&dir).await?;
            let output = "it was to end before it answered".to_owned();
            Err(HypervisorError::DiedAtStart { hypervisor: hypervisor.name(), output })
        }));
    }

    async fn take(&mut self, input: Input) -> Result<(), Denied> {
        let before = self.state.borrow().clone();
        let (after, effects) = step(before.clone(), input)?;
        if after != before {
            tracing::debug!(machine = %self.spec.id, ?before, ?after, "state");
        }
        for effect in effects {
            self.apply(effect).await;
        }
        if after != before {
            self.state.send_replace(after);
        }
        Ok(())
    }

    async fn apply(&mut self, effect: Effect) {
        let result = match (&effect, &self.process) {
            (Effect::Spawn, _) => {
                self.faults.hit("machine: about to start").await;
                let (hypervisor, spec, dir) = (Arc::clone(&self.hypervisor), self.spec.clone(), self.dir.clone());
                self.starting = Some(Box::pin(async move { hypervisor.start(&spec, &dir).await }));
                Ok(())
            }
            (Effect::Record(exit), _) => {
                let (path, exit) = (self.dir.exit(), exit.clone());
                directory::write_json(&path, &exit)
                    .map_err(HypervisorError::io(format!("can't write {}", path.display())))
            }
            (Effect::PowerDown, Some(process)) => {
                self.ask_at = Timestamp::now().checked_add(BUTTON).ok();
                process.power_down().await
            }
            (Effect::AskGuest, Some(_)) => {
                self.ask_at = None;
                tokio::spawn(ask_to_shut_down(self.guest.clone(), self.spec.os));
                Ok(())
            }
            (Effect::Kill, Some(process)) => process.kill().await,
            (Effect::Pause, Some(process)) => process.pause().await,
            (Effect::Resume, Some(process)) => process.resume().await,
            // Stopped while it was starting: the deadline, or the next press, comes when there is a process.
            (_, None) => Ok(()),
        };
        if let Err(error) = result {
            tracing::warn!(machine = %self.spec.id, ?effect, error = error_chain(&error), "effect failed");
        }
        self.faults.hit("machine: effect done").await;
    }
}

/// Tells the guest to shut down, if it answers. Its own end is the answer.
async fn ask_to_shut_down(guest: Guest, os: GuestOs) {
    let command = match os {
        // Not root everywhere; where sudo wants a password, the deadline decides.
        GuestOs::Linux | GuestOs::Macos => {
            ["sh", "-c", "[ \"$(id -u)\" = 0 ] || exec sudo -n shutdown -h now; shutdown -h now || poweroff"].as_slice()
        }
        GuestOs::Windows => ["shutdown", "/s", "/t", "0"].as_slice(),
    };
    if let Ok(session) = guest.exec(Exec::new(command.iter().copied())).await {
        session.wait().await.ok();
    }
}

fn no_process() -> HypervisorError {
    HypervisorError::Unsupported("the machine has no process".to_owned())
}

fn watch_exit(process: Arc<dyn Process>) -> Exiting {
    Box::pin(async move { process.exited().await })
}

async fn wait_option<F: Future + Unpin>(future: &mut Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<Timestamp>) {
    match deadline {
        Some(deadline) => {
            let left = deadline.duration_since(Timestamp::now());
            tokio::time::sleep(Duration::try_from(left).unwrap_or_default()).await;
        }
        None => std::future::pending().await,
    }
}

/// An error and its sources in one line, for texts that leave this crate as plain strings.
pub(crate) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
