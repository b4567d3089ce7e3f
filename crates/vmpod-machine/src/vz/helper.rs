//! A machine's helper: the process in which its guest lives.
//!
//! Apple's framework ties a guest to the process that made it, so every machine has a process of its own that outlives the agent.
//! What isn't the framework's is here and knows no Apple: an [`Engine`] is what does the framework's part.
//!
//! ```text
//!   lock (inherited) → owner → slot → engine.start ─▶ socket ─▶ commands …  ─▶ ended.json → exit
//! ```

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::task::AbortOnDropHandle;

use super::config::{Configuration, configuration};
use super::protocol::{Answer, BUSY, Command, ENDED, Request, SOCKET, line};
use super::slots;
use crate::directory::{self, MachineDir};
use crate::hypervisor::HypervisorError;
use crate::lifecycle::{Exit, ExitCause};
use crate::lock;
use crate::machine::error_chain;
use crate::spec::{Arch, GuestOs, Spec};

/// What runs a guest inside this process.
#[async_trait]
pub trait Engine: Send + Sync + 'static {
    /// Starts the guest and returns when it runs.
    async fn start(&self, spec: &Spec, configuration: &Configuration) -> Result<(), EngineError>;

    /// Asks the guest to shut down. It may ignore that.
    async fn request_stop(&self) -> Result<(), EngineError>;

    /// Ends the guest at once.
    async fn stop(&self) -> Result<(), EngineError>;

    /// Stops the guest's processors.
    async fn pause(&self) -> Result<(), EngineError>;

    /// Lets them run again.
    async fn resume(&self) -> Result<(), EngineError>;

    /// Waits until the guest, which was started, is over.
    async fn ended(&self) -> Ended;
}

/// Why an engine couldn't.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// As many guests run as are allowed on this host, whoever started them.
    #[error("{0}")]
    Limit(String),
    /// Anything else, in the engine's own words.
    #[error("{0}")]
    Failed(String),
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It shut itself down, or was stopped.
    Stopped,
    /// The engine gave up, for this reason.
    Failed(String),
}

/// Why a helper ended without having run a guest.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// There is no machine there.
    #[error("{path} holds no machine: {why}")]
    NoMachine {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Somebody called this who isn't a node agent.
    #[error(
        "this is started by the node agent, with the machine's lock as its standard input; to run a machine, use `vmpod run` or `vmpod up`"
    )]
    NotOurs,
    /// As many guests run as may.
    #[error("{0}")]
    Busy(String),
    /// Anything else.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// The guest didn't start.
    #[error("the guest can't be started: {0}")]
    Start(String),
}

impl HelperError {
    /// The exit code by which the agent knows the kind of error.
    #[must_use]
    pub fn code(&self) -> u8 {
        if matches!(self, Self::Busy(_)) { BUSY } else { 1 }
    }
}

/// Runs the machine of a directory until it is over; how it ended is then on disk.
pub async fn run(path: &Path, engine: Arc<dyn Engine>) -> Result<Exit, HelperError> {
    let (spec, dir) = machine(path)?;
    if !has_lock(&dir) {
        return Err(HelperError::NotOurs);
    }
    // Nobody may be taken for the holder after us.
    let _owner = lock::own(&dir.file(lock::OWNER))?;
    let _slot = if spec.os == GuestOs::Macos { Some(slot(&dir)?) } else { None };
    serve(&spec, &dir, engine).await
}

/// The machine of a directory.
fn machine(path: &Path) -> Result<(Spec, MachineDir), HelperError> {
    let wrong = |why: String| HelperError::NoMachine { path: path.to_owned(), why };
    let path = std::path::absolute(path).map_err(|error| wrong(error.to_string()))?;
    let spec: Option<Spec> = directory::read_json(&path.join("spec.json")).map_err(|error| wrong(error.to_string()))?;
    let spec = spec.ok_or_else(|| wrong("it has no spec.json".to_owned()))?;
    let root = path.parent().unwrap_or(Path::new("/"));
    let dir = MachineDir::new(root, &spec.id);
    if dir.path() != path {
        return Err(wrong(format!("its spec.json is of machine {}", spec.id)));
    }
    Ok((spec, dir))
}

/// Whether our standard input is the machine's lock, locked.
fn has_lock(dir: &MachineDir) -> bool {
    let ours = rustix::fs::fstat(io::stdin().as_fd()).ok();
    let lock = rustix::fs::stat(dir.file(lock::LOCK)).ok();
    let same = ours.zip(lock).is_some_and(|(ours, lock)| (ours.st_dev, ours.st_ino) == (lock.st_dev, lock.st_ino));
    // Taking it again through another opening of the file must fail.
    same && matches!(lock::take_lock(dir), Ok(lock::Lock::Held))
}

fn slot(dir: &MachineDir) -> Result<std::fs::File, HelperError> {
    let machines = dir.path().parent().unwrap_or(Path::new("/"));
    let taken = slots::take(machines)
        .map_err(HypervisorError::io(format!("can't take a slot for a macOS guest in {}", machines.display())))?;
    taken.ok_or_else(|| {
        let most = slots::MOST;
        HelperError::Busy(format!("{most} macOS guests run on this host already, which is as many as Apple allows"))
    })
}

/// Starts the guest, does what it is told, and writes down how it ended.
pub(super) async fn serve(spec: &Spec, dir: &MachineDir, engine: Arc<dyn Engine>) -> Result<Exit, HelperError> {
    let configuration = configuration(spec, dir.path(), Arch::host())?;
    // The console says to whoever comes later that a guest ran here; nothing of it does before this.
    let console = dir.console();
    std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(&console)
        .map_err(HypervisorError::io(format!("can't make {}", console.display())))?;
    engine.start(spec, &configuration).await.map_err(|error| match error {
        EngineError::Limit(why) => {
            // Nothing ran here, and the machine may be started later: nobody is to hold it for one that ended.
            if std::fs::metadata(&console).is_ok_and(|console| console.len() == 0)
                && let Err(error) = std::fs::remove_file(&console)
            {
                tracing::warn!(%error, "the empty console can't be removed");
            }
            HelperError::Busy(why)
        }
        EngineError::Failed(why) => HelperError::Start(why),
    })?;
    let stopped = Arc::new(AtomicBool::new(false));
    let listening = listen(spec, dir, &engine, &stopped);
    let _listener = match listening {
        Ok(listener) => listener,
        Err(error) => {
            // Nobody could ever say anything to it.
            engine.stop().await.ok();
            return Err(error.into());
        }
    };
    // The host shuts down: a guest gets what time there is. With us it would be gone at once.
    let asked = Arc::clone(&engine);
    let _signals = AbortOnDropHandle::new(tokio::spawn(async move {
        let Ok(mut terminate) = signal(SignalKind::terminate()) else { return };
        while terminate.recv().await.is_some() {
            if let Err(error) = asked.request_stop().await {
                tracing::warn!(%error, "the guest can't be asked to shut down");
            }
        }
    }));
    let at = |cause, detail| Exit { cause, at: Timestamp::now(), detail };
    let exit = match engine.ended().await {
        Ended::Stopped if stopped.load(Ordering::SeqCst) => at(ExitCause::Killed, None),
        Ended::Stopped => at(ExitCause::GuestShutdown, None),
        Ended::Failed(why) => at(ExitCause::HypervisorFailed, Some(why)),
    };
    let path = dir.file(ENDED);
    directory::write_json(&path, &exit).map_err(HypervisorError::io(format!("can't write {}", path.display())))?;
    Ok(exit)
}

fn listen(
    spec: &Spec,
    dir: &MachineDir,
    engine: &Arc<dyn Engine>,
    stopped: &Arc<AtomicBool>,
) -> Result<AbortOnDropHandle<()>, HypervisorError> {
    let path = dir.file(SOCKET);
    lock::remove(&path)?;
    let listener = super::bind(dir, SOCKET)?;
    let server = Server { spec: Arc::new(spec.clone()), engine: Arc::clone(engine), stopped: Arc::clone(stopped) };
    let serving = tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => drop(tokio::spawn(server.clone().answer(stream))),
                Err(error) => {
                    tracing::warn!(%error, "can't accept a connection");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(AbortOnDropHandle::new(serving))
}

#[derive(Clone)]
struct Server {
    spec: Arc<Spec>,
    engine: Arc<dyn Engine>,
    stopped: Arc<AtomicBool>,
}

impl Server {
    async fn answer(self, stream: UnixStream) {
        let (reader, mut writer) = stream.into_split();
        let mut lines = BufReader::new(reader).lines();
        while let Ok(Some(text)) = lines.next_line().await {
            let answer = match serde_json::from_str::<Request>(&text) {
                Ok(request) => self.obey(request).await,
                Err(error) => {
                    let id = serde_json::from_str::<serde_json::Value>(&text).ok();
                    let id = id.and_then(|value| value.get("id")?.as_u64()).unwrap_or_default();
                    Answer::of(id, Err(format!("this helper doesn't know that: {error}")))
                }
            };
            let Ok(bytes) = line(&answer) else { return };
            if writer.write_all(&bytes).await.is_err() {
                return;
            }
        }
    }

    async fn obey(&self, request: Request) -> Answer {
        let result = match request.command {
            Command::Describe => return Answer::describe(request.id, &self.spec),
            Command::PowerDown => self.engine.request_stop().await,
            Command::Stop => {
                self.stopped.store(true, Ordering::SeqCst);
                self.engine.stop().await
            }
            Command::Pause => self.engine.pause().await,
            Command::Resume => self.engine.resume().await,
        };
        Answer::of(request.id, result.map_err(|error| error_chain(&error)))
    }
}
