//! A scripted hypervisor: machines that exist only in memory and do what a test says.
//!
//! A [`World`] plays the host. It outlives every [`Machines`](crate::Machines) that is opened on it, as processes
//! outlive an agent, so a test can drop the agent at any point and open another. What a machine does comes from a
//! [`Script`]; what happens to it meanwhile (a crash, a lost connection, output) is called on the world.
//!
//! ```no_run
//! # async fn example(spec: vmpod_machine::Spec) -> Result<(), vmpod_machine::MachineError> {
//! use vmpod_machine::fake::{MainScript, Script, World};
//! let world = World::new();
//! world.set_default(Script { main: MainScript::exits(3).prints("hello\n"), ..Script::default() });
//! let machines = vmpod_machine::Machines::open("dir", world.hypervisor())?;
//! let machine = machines.create(spec).await?;
//! machine.start().await?;
//! # Ok(()) }
//! ```

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::watch;

use crate::directory::{self, MachineDir};
use crate::guest::{ExitStatus, GuestState, Link, Waiting};
use crate::hypervisor::{Hypervisor, HypervisorError, Process, Stats};
use crate::id::MachineId;
use crate::lifecycle::{Exit, ExitCause};
use crate::spec::{Accel, Spec};
use crate::{Exec, MainCommand, StdStream, renewal, template};

mod link;

/// What a machine does when it is started.
#[derive(Clone)]
pub struct Script {
    /// How starting its process goes.
    pub start: Start,
    /// When its guest answers.
    pub ready: Ready,
    /// What the power button does.
    pub power_button: PowerButton,
    /// What it prints on its console when it starts.
    pub console: String,
    /// Ends by itself after so long, if at all.
    pub ends: Option<(Duration, ExitCause)>,
    /// Whether its guest can take a new identity, so that its memory can be saved.
    pub renewable: bool,
    /// What goes wrong when it is to go on from a memory snapshot, if anything.
    pub restore_fails: Option<String>,
    /// What every main process does.
    pub main: MainScript,
    /// What every command does.
    pub exec: Arc<dyn Fn(&Exec) -> ExecScript + Send + Sync>,
}

impl Default for Script {
    /// A machine that starts, is ready at once, shuts down when asked, echoes its commands, and whose main process
    /// runs until it is signalled.
    fn default() -> Self {
        Self {
            start: Start::Works,
            ready: Ready::AtOnce,
            power_button: PowerButton::ShutsDownAfter(Duration::ZERO),
            console: "fake console\n".to_owned(),
            ends: None,
            renewable: false,
            restore_fails: None,
            main: MainScript::default(),
            exec: Arc::new(|exec| ExecScript { stdout: exec.command.join(" ") + "\n", ..ExecScript::default() }),
        }
    }
}

/// How starting a process goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// It comes up.
    Works,
    /// It fails with these words.
    Fails(String),
    /// There is no room for it while so many others are live.
    BusyWith(usize),
    /// It never answers.
    Hangs,
}

/// When a guest answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ready {
    /// As soon as the process runs.
    AtOnce,
    /// So much later.
    After(Duration),
    /// Not by itself; see [`World::set_guest`].
    Never(Waiting),
}

/// What the power button does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerButton {
    /// The guest shuts down.
    ShutsDownAfter(Duration),
    /// Nothing.
    Ignored,
}

/// What a main process does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MainScript {
    /// What it prints at its start.
    pub output: Vec<(StdStream, String)>,
    /// How and when it ends by itself; `None` runs until a signal or [`World::main_exit`].
    pub exit: Option<(Duration, ExitStatus)>,
    /// Whether it goes on after TERM.
    pub ignores_term: bool,
}

impl MainScript {
    /// Ends at once with this code.
    #[must_use]
    pub fn exits(code: i32) -> Self {
        Self { exit: Some((Duration::ZERO, ExitStatus::Code(code))), ..Self::default() }
    }

    /// Prints this on standard output first.
    #[must_use]
    pub fn prints(mut self, text: &str) -> Self {
        self.output.push((StdStream::Stdout, text.to_owned()));
        self
    }
}

/// What a command does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecScript {
    /// Printed on standard output.
    pub stdout: String,
    /// Printed on standard error.
    pub stderr: String,
    /// Afterwards, input is copied to the output until it ends.
    pub cat: bool,
    /// Afterwards, it runs until it gets a signal.
    pub hangs: bool,
    /// How it ends.
    pub status: ExitStatus,
}

impl Default for ExecScript {
    fn default() -> Self {
        Self { stdout: String::new(), stderr: String::new(), cat: false, hangs: false, status: ExitStatus::Code(0) }
    }
}

/// Something that happened in the world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A process began.
    Started(MachineId),
    /// A process ended.
    Ended(MachineId, ExitCause),
    /// A main process began.
    MainStarted(MachineId, String),
    /// A second start of a live machine was refused.
    SecondStartRefused(MachineId),
}

/// A host, in memory.
#[derive(Clone, Default)]
pub struct World {
    inner: Arc<Mutex<Inner>>,
    /// Counts changes, so that whoever waits for one needs only this.
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct Inner {
    default: Script,
    scripts: HashMap<MachineId, Script>,
    machines: BTreeMap<MachineId, Fake>,
    events: Vec<Event>,
}

struct Fake {
    live: bool,
    /// Counts starts, so that a timer of an earlier process doesn't end a later one.
    incarnation: u64,
    end: Option<Exit>,
    guest: watch::Sender<GuestState>,
    files: HashMap<String, Vec<u8>>,
    mains: HashMap<String, Main>,
    commands: Vec<Vec<String>>,
    pressed: usize,
}

impl Default for Fake {
    fn default() -> Self {
        Self {
            live: false,
            incarnation: 0,
            end: None,
            guest: watch::Sender::new(GuestState::Waiting(Waiting::Machine)),
            files: HashMap::new(),
            mains: HashMap::new(),
            commands: Vec::new(),
            pressed: 0,
        }
    }
}

struct Main {
    command: MainCommand,
    output: Vec<(StdStream, bytes::Bytes)>,
    exit: Option<ExitStatus>,
    ignores_term: bool,
}

impl World {
    /// An empty world whose machines follow [`Script::default`].
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A hypervisor in this world.
    #[must_use]
    pub fn hypervisor(&self) -> Arc<dyn Hypervisor> {
        Arc::new(FakeHypervisor { world: self.clone() })
    }

    /// What machines without a script of their own do.
    pub fn set_default(&self, script: Script) {
        self.lock().default = script;
    }

    /// What this machine does.
    pub fn set_script(&self, id: &MachineId, script: Script) {
        self.lock().scripts.insert(id.clone(), script);
    }

    /// The machines that have a live process.
    #[must_use]
    pub fn live(&self) -> Vec<MachineId> {
        self.lock().machines.iter().filter(|(_, fake)| fake.live).map(|(id, _)| id.clone()).collect()
    }

    /// All that happened, in order.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        self.lock().events.clone()
    }

    /// The most machines with names that begin with `prefix` that were ever live at the same time.
    #[must_use]
    pub fn most_live(&self, prefix: &str) -> usize {
        let (mut live, mut most) = (0usize, 0);
        for event in &self.lock().events {
            match event {
                Event::Started(id) if id.as_str().starts_with(prefix) => live += 1,
                Event::Ended(id, _) if id.as_str().starts_with(prefix) => live = live.saturating_sub(1),
                _ => {}
            }
            most = most.max(live);
        }
        most
    }

    /// How often this machine's process was started.
    #[must_use]
    pub fn starts(&self, id: &MachineId) -> usize {
        self.lock().events.iter().filter(|event| **event == Event::Started(id.clone())).count()
    }

    /// How often this machine's power button was pressed.
    #[must_use]
    pub fn pressed(&self, id: &MachineId) -> usize {
        self.lock().machines.get(id).map_or(0, |fake| fake.pressed)
    }

    /// The commands that were run in this machine, main processes left out.
    #[must_use]
    pub fn commands(&self, id: &MachineId) -> Vec<Vec<String>> {
        self.lock().machines.get(id).map(|fake| fake.commands.clone()).unwrap_or_default()
    }

    /// A main process's command, once it was started.
    #[must_use]
    pub fn main_command(&self, id: &MachineId, name: &str) -> Option<MainCommand> {
        Some(self.lock().machines.get(id)?.mains.get(name)?.command.clone())
    }

    /// Waits until something is true of the world.
    pub async fn until(&self, wanted: impl Fn(&Self) -> bool) {
        let mut changed = self.changed.subscribe();
        while !wanted(self) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    /// The guest shuts itself down.
    pub fn shut_down(&self, id: &MachineId) {
        self.end(id, None, ExitCause::GuestShutdown);
    }

    /// The process dies as from kill -9 by somebody else.
    pub fn crash(&self, id: &MachineId) {
        self.end(id, None, ExitCause::Killed);
    }

    /// The guest answers, stops answering or gets lost.
    pub fn set_guest(&self, id: &MachineId, state: GuestState) {
        self.with(id, |fake| fake.guest.send_replace(state));
    }

    /// The guest prints on its console, a file in the machine's directory.
    pub fn console(&self, dir: &MachineDir, text: &str) -> std::io::Result<()> {
        std::fs::OpenOptions::new().append(true).create(true).open(dir.console())?.write_all(text.as_bytes())
    }

    /// A main process prints something.
    pub fn main_prints(&self, id: &MachineId, name: &str, stream: StdStream, text: &str) {
        self.with(id, |fake| {
            if let Some(main) = fake.mains.get_mut(name).filter(|main| main.exit.is_none()) {
                main.output.push((stream, bytes::Bytes::copy_from_slice(text.as_bytes())));
            }
        });
    }

    /// A main process ends.
    pub fn main_exit(&self, id: &MachineId, name: &str, status: ExitStatus) {
        self.with(id, |fake| {
            if let Some(main) = fake.mains.get_mut(name) {
                main.exit.get_or_insert(status);
            }
        });
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bump(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    fn with<T>(&self, id: &MachineId, act: impl FnOnce(&mut Fake) -> T) -> T {
        let result = act(self.lock().machines.entry(id.clone()).or_default());
        self.bump();
        result
    }

    fn script(&self, id: &MachineId) -> Script {
        let inner = self.lock();
        inner.scripts.get(id).unwrap_or(&inner.default).clone()
    }

    fn end(&self, id: &MachineId, incarnation: Option<u64>, cause: ExitCause) {
        {
            let mut inner = self.lock();
            let Some(fake) = inner.machines.get_mut(id) else { return };
            if !fake.live || incarnation.is_some_and(|wanted| wanted != fake.incarnation) {
                return;
            }
            fake.live = false;
            fake.end = Some(Exit { cause, at: Timestamp::now(), detail: None });
            fake.guest.send_replace(GuestState::Waiting(Waiting::Machine));
            inner.events.push(Event::Ended(id.clone(), cause));
        }
        self.bump();
    }

    fn later(&self, delay: Duration, act: impl FnOnce(&Self) + Send + 'static) {
        if delay.is_zero() {
            act(self);
        } else {
            let world = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                act(&world);
            });
        }
    }
}

struct FakeHypervisor {
    world: World,
}

#[async_trait]
impl Hypervisor for FakeHypervisor {
    fn name(&self) -> &'static str {
        "fake"
    }

    async fn start(&self, spec: &Spec, dir: &MachineDir) -> Result<Box<dyn Process>, HypervisorError> {
        let (id, world) = (spec.id.clone(), &self.world);
        let script = world.script(&id);
        match &script.start {
            Start::Works => {}
            Start::Fails(why) => {
                return Err(HypervisorError::DiedAtStart { hypervisor: "fake", output: why.clone() });
            }
            Start::BusyWith(most) => {
                let live = world.live().len();
                if live >= *most {
                    return Err(HypervisorError::Busy(format!("{live} guests run, and more may not")));
                }
            }
            Start::Hangs => std::future::pending().await,
        }
        if let Some(template) = spec.template() {
            let missing = [template::MEMORY, template::STATE].into_iter().find(|name| !template.join(name).exists());
            if let Some(why) = script.restore_fails.or_else(|| missing.map(|name| format!("{name} is missing"))) {
                return Err(HypervisorError::Restore { why });
            }
            directory::write_whole(&dir.file(renewal::DONE), b"").map_err(HypervisorError::io("can't write a file"))?;
        }
        let incarnation = {
            let mut inner = world.lock();
            if inner.machines.entry(id.clone()).or_default().live {
                inner.events.push(Event::SecondStartRefused(id.clone()));
                return Err(HypervisorError::Occupied { holder: "fake".to_owned() });
            }
            inner.events.push(Event::Started(id.clone()));
            let fake = inner.machines.entry(id.clone()).or_default();
            fake.live = true;
            fake.incarnation += 1;
            fake.end = None;
            fake.incarnation
        };
        world.bump();
        world.console(dir, &script.console).map_err(HypervisorError::io("can't write the console"))?;
        match script.ready {
            Ready::Never(why) => world.set_guest(&id, GuestState::Waiting(why)),
            Ready::AtOnce => world.set_guest(&id, GuestState::Ready),
            Ready::After(delay) => {
                world.set_guest(&id, GuestState::Waiting(Waiting::Marker));
                let id = id.clone();
                world.later(delay, move |world| {
                    if world.with(&id, |fake| fake.live && fake.incarnation == incarnation) {
                        world.set_guest(&id, GuestState::Ready);
                    }
                });
            }
        }
        if let Some((delay, cause)) = script.ends {
            let id = id.clone();
            world.later(delay, move |world| world.end(&id, Some(incarnation), cause));
        }
        Ok(Box::new(FakeProcess { world: world.clone(), id, incarnation, dir: dir.clone() }))
    }

    fn no_shares(&self) -> Option<String> {
        None
    }

    async fn snapshots(&self, _accel: Accel) -> Option<String> {
        Some("fake 1".to_owned())
    }

    async fn find(&self, spec: &Spec, dir: &MachineDir) -> Result<Option<Box<dyn Process>>, HypervisorError> {
        let inner = self.world.lock();
        Ok(inner.machines.get(&spec.id).filter(|fake| fake.live).map(|fake| {
            let (world, id, incarnation) = (self.world.clone(), spec.id.clone(), fake.incarnation);
            Box::new(FakeProcess { world, id, incarnation, dir: dir.clone() }) as Box<dyn Process>
        }))
    }

    async fn autopsy(&self, spec: &Spec, _dir: &MachineDir) -> Result<Option<Exit>, HypervisorError> {
        Ok(self.world.lock().machines.get(&spec.id).and_then(|fake| fake.end.clone()).map(|mut exit| {
            // A real one leaves no trace of a kill.
            if exit.cause == ExitCause::Killed {
                exit.cause = ExitCause::Unseen;
            }
            exit
        }))
    }

    async fn destroy(&self, dir: &MachineDir) -> Result<(), HypervisorError> {
        self.world.end(dir.id(), None, ExitCause::Killed);
        Ok(())
    }

    fn link(&self, spec: &Spec, _dir: &MachineDir) -> Option<Arc<dyn Link>> {
        Some(Arc::new(link::FakeLink::new(self.world.clone(), spec.id.clone())))
    }
}

struct FakeProcess {
    world: World,
    id: MachineId,
    incarnation: u64,
    dir: MachineDir,
}

#[async_trait]
impl Process for FakeProcess {
    async fn power_down(&self) -> Result<(), HypervisorError> {
        self.world.with(&self.id, |fake| fake.pressed += 1);
        if let PowerButton::ShutsDownAfter(delay) = self.world.script(&self.id).power_button {
            let (id, incarnation) = (self.id.clone(), self.incarnation);
            self.world.later(delay, move |world| world.end(&id, Some(incarnation), ExitCause::GuestShutdown));
        }
        Ok(())
    }

    async fn kill(&self) -> Result<(), HypervisorError> {
        self.world.end(&self.id, Some(self.incarnation), ExitCause::Killed);
        Ok(())
    }

    async fn pause(&self) -> Result<(), HypervisorError> {
        Ok(())
    }

    async fn resume(&self) -> Result<(), HypervisorError> {
        Ok(())
    }

    async fn exited(&self) -> Exit {
        let mut changed = self.world.changed.subscribe();
        loop {
            let end = self.world.with_quietly(&self.id, |fake| {
                if fake.live && fake.incarnation == self.incarnation { None } else { fake.end.clone() }
            });
            if let Some(exit) = end {
                return exit;
            }
            if changed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    async fn snapshot(&self) -> Result<(), HypervisorError> {
        if !self.world.script(&self.id).renewable {
            return Err(HypervisorError::Unsupported("the guest has no program that takes a new identity".to_owned()));
        }
        for name in [template::MEMORY, template::STATE] {
            let text = format!("{name} of {}", self.id);
            directory::write_whole(&self.dir.file(name), text.as_bytes())
                .map_err(HypervisorError::io("can't write a file"))?;
        }
        self.kill().await
    }

    async fn stats(&self) -> Result<Stats, HypervisorError> {
        Ok(Stats { cpu: Duration::from_millis(1500), rss: 64 << 20, disks: Vec::new() })
    }

    fn pid(&self) -> Option<u32> {
        None
    }
}

impl World {
    /// Like `with`, and counts as no change.
    fn with_quietly<T>(&self, id: &MachineId, act: impl FnOnce(&mut Fake) -> T) -> T {
        act(self.lock().machines.entry(id.clone()).or_default())
    }
}

#[cfg(test)]
mod tests;
