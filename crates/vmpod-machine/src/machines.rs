//! All machines of one directory.

use std::collections::HashMap;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::directory::{self, MachineDir};
use crate::fault::FaultPoints;
use crate::guest::{Guest, keys, ssh};
use crate::hypervisor::{Hypervisor, HypervisorError};
use crate::id::MachineId;
use crate::lifecycle::{Denied, Exit, State};
use crate::machine::{Driver, Machine, error_chain};
use crate::spec::{Network, Spec};
use crate::{address, renewal, seed};

pub use crate::guest::keys::SshKey;

/// Why something couldn't be done with a machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// There is no such machine.
    #[error("there is no machine {0}")]
    NotFound(MachineId),
    /// A machine of that name exists and is another.
    #[error("machine {0} exists already and was made from another description")]
    Exists(MachineId),
    /// The machine still has a process.
    #[error("machine {0} still runs: stop or kill it first")]
    StillRuns(MachineId),
    /// Its state doesn't allow it.
    #[error("machine {id} can't be started")]
    Denied {
        /// Which machine.
        id: MachineId,
        /// Why.
        source: Denied,
    },
    /// It couldn't be started.
    #[error("machine {id} couldn't be started: {why}")]
    Start {
        /// Which machine.
        id: MachineId,
        /// Why.
        why: String,
    },
    /// The host runs as many guests of its kind as it may. It may be started later.
    #[error("machine {id} has to wait: {why}")]
    Busy {
        /// Which machine.
        id: MachineId,
        /// Why.
        why: String,
    },
    /// The hypervisor refused.
    #[error("the hypervisor couldn't do it for machine {id}")]
    Hypervisor {
        /// Which machine.
        id: MachineId,
        /// Why.
        source: HypervisorError,
    },
    /// A file of the machine.
    #[error("can't {action} {}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The seed couldn't be made.
    #[error("can't make the first-boot seed of machine {id}")]
    Seed {
        /// Which machine.
        id: MachineId,
        /// Why.
        source: seed::SeedError,
    },
    /// The agent is ending.
    #[error("the agent is ending and drives no machines any more")]
    Closed,
}

/// What was found of a machine when the agent came up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Adopted {
    /// It is described and never ran: it may be started.
    Prepared,
    /// Its process runs, and was proved to be its own.
    Running,
    /// It ran, and its process is gone.
    Stopped(Exit),
    /// It was to go on from a memory snapshot, and its process ended before its guest was itself: nothing of its own ever
    /// ran. It is known as failed.
    Unrestored(String),
    /// Its directory or process isn't as it should be. It can only be removed (with `kill`).
    Broken(String),
}

/// The machines of one directory.
///
/// Dropping it stops every task of this crate and no machine.
#[derive(Clone)]
pub struct Machines {
    inner: Arc<Inner>,
}

struct Inner {
    root: PathBuf,
    hypervisor: Arc<dyn Hypervisor>,
    faults: FaultPoints,
    known: Mutex<HashMap<MachineId, Entry>>,
    /// Makes `create` and `remove` of one name follow each other, and lets other names go on.
    changing: Mutex<HashMap<MachineId, Arc<tokio::sync::Mutex<()>>>>,
}

struct Entry {
    machine: Machine,
    tasks: Vec<tokio::task::AbortHandle>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl std::fmt::Debug for Machines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machines").field("root", &self.inner.root).finish_non_exhaustive()
    }
}

impl Machines {
    /// Opens a directory of machines, making it when there is none. Knows no machine before [`Machines::adopt`].
    pub fn open(root: impl Into<PathBuf>, hypervisor: Arc<dyn Hypervisor>) -> Result<Self, MachineError> {
        Self::open_with_faults(root, hypervisor, FaultPoints::default())
    }

    /// The same, with points at which a test may let the agent die.
    pub fn open_with_faults(
        root: impl Into<PathBuf>,
        hypervisor: Arc<dyn Hypervisor>,
        faults: FaultPoints,
    ) -> Result<Self, MachineError> {
        let root = root.into();
        directory::make_private_dir(&root)
            .and_then(|()| std::path::absolute(&root))
            .map(|root| Self {
                inner: Arc::new(Inner {
                    root,
                    hypervisor,
                    faults,
                    known: Mutex::default(),
                    changing: Mutex::default(),
                }),
            })
            .map_err(|source| MachineError::Io { action: "make the directory", path: root, source })
    }

    /// Why machines can't share directories with this host; none if they can.
    #[must_use]
    pub fn no_shares(&self) -> Option<String> {
        self.inner.hypervisor.no_shares()
    }

    /// The name of the hypervisor.
    #[must_use]
    pub fn hypervisor(&self) -> &'static str {
        self.inner.hypervisor.name()
    }

    /// A point at which a test may let the agent die.
    pub(crate) async fn hit(&self, name: &str) {
        self.inner.faults.hit(name).await;
    }

    /// What memory snapshots depend on here; none where none can be taken. See [`crate::Hypervisor::snapshots`].
    pub async fn snapshots(&self, accel: crate::Accel) -> Option<String> {
        self.inner.hypervisor.snapshots(accel).await
    }

    /// The directory of all machines.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// Where a machine's files are. The directory is made, so that disks can be put there before `create`.
    pub fn directory(&self, id: &MachineId) -> Result<MachineDir, MachineError> {
        let dir = MachineDir::new(&self.inner.root, id);
        dir.make().map_err(io_error("make the directory", dir.path()))?;
        Ok(dir)
    }

    /// The machine's key pair for its guest; made on first use.
    pub fn ssh_key(&self, id: &MachineId) -> Result<SshKey, MachineError> {
        let dir = self.directory(id)?;
        keys::ensure(&dir).map_err(io_error("make the key", &dir.file(keys::FILE)))
    }

    /// Keeps a private key that somebody else gave for the machine's guest, in its directory. OpenSSH's format.
    pub fn keep_key(&self, id: &MachineId, pem: &str) -> Result<SshKey, MachineError> {
        let dir = self.directory(id)?;
        let path = dir.file(keys::GIVEN);
        let kept = keys::check(pem)
            .and_then(|public| directory::write_whole(&path, pem.as_bytes()).map(|()| public))
            .map_err(io_error("keep the key", &path));
        Ok(SshKey { public: kept?, path })
    }

    /// Writes down a machine and makes its seed. A second call with the same description gives the same machine.
    pub async fn create(&self, spec: Spec) -> Result<Machine, MachineError> {
        let _changing = self.changing(&spec.id).await;
        if let Some(machine) = self.get(&spec.id) {
            return if *machine.spec() == spec { Ok(machine) } else { Err(MachineError::Exists(spec.id)) };
        }
        let dir = self.directory(&spec.id)?;
        let stored: Option<Spec> = directory::read_json(&dir.spec()).map_err(io_error("read", &dir.spec()))?;
        if let Some(stored) = stored {
            if stored != spec {
                return Err(MachineError::Exists(spec.id));
            }
            // A directory from an earlier life of the agent, which was not adopted.
            return match self.adopt_one(&dir).await? {
                (_, Some(machine)) => Ok(machine),
                (found, None) => Err(MachineError::Start { id: spec.id, why: format!("{found:?}") }),
            };
        }
        if let Some(seed) = &spec.seed {
            seed::write(&dir, &spec, seed).map_err(|source| MachineError::Seed { id: spec.id.clone(), source })?;
            self.inner.faults.hit("machines: seed written").await;
        }
        directory::write_json(&dir.spec(), &spec).map_err(io_error("write", &dir.spec()))?;
        self.inner.faults.hit("machines: spec written").await;
        Ok(self.drive(&spec, &dir, State::Preparing, None))
    }

    /// A machine that is known.
    #[must_use]
    pub fn get(&self, id: &MachineId) -> Option<Machine> {
        self.known().get(id).map(|entry| entry.machine.clone())
    }

    /// All machines that are known, by name.
    #[must_use]
    pub fn list(&self) -> Vec<Machine> {
        let mut all: Vec<_> = self.known().values().map(|entry| entry.machine.clone()).collect();
        all.sort_by(|a, b| a.id().cmp(b.id()));
        all
    }

    /// The addresses in use by known machines.
    #[must_use]
    pub fn addresses(&self) -> std::collections::BTreeSet<Ipv4Addr> {
        self.known()
            .values()
            .flat_map(|entry| entry.machine.spec().networks.iter().filter_map(Network::address).collect::<Vec<_>>())
            .collect()
    }

    /// Reads the directory and takes over every machine in it. Call it once, before anything else.
    ///
    /// A [`Adopted::Broken`] machine isn't known afterwards; it is there to be removed.
    pub async fn adopt(&self) -> Result<Vec<(MachineId, Adopted)>, MachineError> {
        let read = |source| MachineError::Io { action: "read the directory", path: self.inner.root.clone(), source };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.inner.root).map_err(read)? {
            let entry = entry.map_err(read)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(REMOVING) {
                // The agent died while it removed this machine.
                if let Err(error) = std::fs::remove_dir_all(entry.path()) {
                    tracing::warn!(path = %entry.path().display(), %error, "what is left of a machine can't be removed");
                }
            } else if let Ok(id) = MachineId::parse(name) {
                names.push(id);
            }
        }
        names.sort();
        let all = names.into_iter().map(|id| async move {
            let _changing = self.changing(&id).await;
            let dir = MachineDir::new(&self.inner.root, &id);
            let (found, _) = self.adopt_one(&dir).await?;
            Ok((id, found))
        });
        futures::future::join_all(all).await.into_iter().collect()
    }

    /// An error when a file can't be read now: of what may be read later nothing must be concluded.
    async fn adopt_one(&self, dir: &MachineDir) -> Result<(Adopted, Option<Machine>), MachineError> {
        if let Some(machine) = self.get(dir.id()) {
            let found = match &*machine.state().borrow() {
                State::Stopped(exit) => Adopted::Stopped(exit.clone()),
                State::Preparing => Adopted::Prepared,
                State::Failed(why) => Adopted::Broken(why.clone()),
                _ => Adopted::Running,
            };
            return Ok((found, Some(machine)));
        }
        let hypervisor = &self.inner.hypervisor;
        let broken = |why: String| Ok((Adopted::Broken(why), None));
        let spec: Spec = match directory::read_json(&dir.spec()) {
            Ok(Some(spec)) => spec,
            Ok(None) => return broken("it has no spec.json: its creation was cut short".to_owned()),
            Err(error) if is_damage(&error) => return broken(format!("its spec.json can't be read: {error}")),
            Err(error) => return Err(io_error("read", &dir.spec())(error)),
        };
        if spec.id != *dir.id() {
            return broken(format!("its spec.json is of machine {}", spec.id));
        }
        // The exit record is written when the process is known to be gone, so it needs no further look.
        match directory::read_json::<Exit>(&dir.exit()) {
            Ok(Some(exit)) => {
                let machine = self.drive(&spec, dir, State::Stopped(exit.clone()), None);
                return Ok((Adopted::Stopped(exit), Some(machine)));
            }
            Ok(None) => {}
            Err(error) if is_damage(&error) => return broken(format!("its exit.json can't be read: {error}")),
            Err(error) => return Err(io_error("read", &dir.exit())(error)),
        }
        match hypervisor.find(&spec, dir).await {
            Err(error) => broken(error_chain(&error)),
            Ok(Some(process)) => {
                let machine = self.drive(&spec, dir, State::Running, Some(process));
                Ok((Adopted::Running, Some(machine)))
            }
            Ok(None) => match hypervisor.autopsy(&spec, dir).await {
                Err(error) => broken(error_chain(&error)),
                Ok(Some(_)) if spec.template().is_some() && !dir.file(renewal::DONE).exists() => {
                    let why = "it ended while it was restored from its memory snapshot".to_owned();
                    let machine = self.drive(&spec, dir, State::Failed(why.clone()), None);
                    Ok((Adopted::Unrestored(why), Some(machine)))
                }
                Ok(None) => Ok((Adopted::Prepared, Some(self.drive(&spec, dir, State::Preparing, None)))),
                Ok(Some(exit)) => {
                    if let Err(error) = directory::write_json(&dir.exit(), &exit) {
                        // Whoever comes next finds the same out again.
                        tracing::warn!(machine = %dir.id(), %error, "its exit.json can't be written");
                    }
                    self.inner.faults.hit("machines: exit recorded").await;
                    let machine = self.drive(&spec, dir, State::Stopped(exit.clone()), None);
                    Ok((Adopted::Stopped(exit), Some(machine)))
                }
            },
        }
    }

    /// Removes a machine and all its files. With `kill`, a process that is left is ended first; without, it is an error.
    /// A machine that isn't there is no error.
    pub async fn remove(&self, id: &MachineId, kill: bool) -> Result<(), MachineError> {
        let _changing = self.changing(id).await;
        let dir = MachineDir::new(&self.inner.root, id);
        if let Some(machine) = self.get(id) {
            let live = machine.state().borrow().is_live();
            if live && !kill {
                return Err(MachineError::StillRuns(id.clone()));
            }
            if live {
                machine.kill().await?;
            }
        }
        if !dir.path().exists() {
            self.known().remove(id);
            return Ok(());
        }
        if kill {
            self.inner
                .hypervisor
                .destroy(&dir)
                .await
                .map_err(|source| MachineError::Hypervisor { id: id.clone(), source })?;
            self.inner.faults.hit("machines: process destroyed").await;
        } else if self.get(id).is_none() {
            // Not known (broken, or never adopted): only a look can tell whether something runs there.
            let spec: Option<Spec> = directory::read_json(&dir.spec()).ok().flatten();
            if let Some(spec) = spec {
                let found = self.inner.hypervisor.find(&spec, &dir).await;
                match found {
                    Ok(None) => {}
                    Ok(Some(_)) => return Err(MachineError::StillRuns(id.clone())),
                    Err(source) => return Err(MachineError::Hypervisor { id: id.clone(), source }),
                }
            }
        }
        // Renamed first: a half-removed directory must never be taken for a machine.
        let removing = self.inner.root.join(format!("{REMOVING}{id}"));
        if removing.exists() {
            std::fs::remove_dir_all(&removing).map_err(io_error("remove", &removing))?;
        }
        std::fs::rename(dir.path(), &removing).map_err(io_error("rename", dir.path()))?;
        self.known().remove(id);
        self.inner.faults.hit("machines: renamed for removal").await;
        tokio::fs::remove_dir_all(&removing).await.map_err(io_error("remove", &removing))
    }

    fn drive(
        &self,
        spec: &Spec,
        dir: &MachineDir,
        state: State,
        process: Option<Box<dyn crate::hypervisor::Process>>,
    ) -> Machine {
        let hypervisor = Arc::clone(&self.inner.hypervisor);
        let mut tasks = Vec::new();
        let id = spec.id.clone();
        let (machine, driver) =
            Driver::new(spec.clone(), dir.clone(), state, process, hypervisor, self.inner.faults.clone(), |state| {
                if let Some(link) = self.inner.hypervisor.link(spec, dir) {
                    return (Guest::new(link), tokio::sync::watch::channel(None).1);
                }
                let (learnt, follows) = address::follow(spec, dir, state.clone(), self.inner.hypervisor.leases());
                let (link, task) = ssh::SshLink::start(spec, dir, state, learnt.clone());
                tasks.push(task);
                tasks.extend(follows);
                (Guest::new(link), learnt)
            });
        tasks.push(tokio::spawn(driver.run()).abort_handle());
        self.known().insert(id, Entry { machine: machine.clone(), tasks });
        machine
    }

    /// Waits for the turn of this name.
    async fn changing(&self, id: &MachineId) -> tokio::sync::OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.inner.changing.lock().unwrap_or_else(PoisonError::into_inner);
            // One that nobody holds or waits for is in this map only.
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(turns.entry(id.clone()).or_default())
        };
        turn.lock_owned().await
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<MachineId, Entry>> {
        self.inner.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const REMOVING: &str = ".removing-";

/// Whether a file that couldn't be read is not what it should be, and will not be later.
fn is_damage(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidData, NotADirectory, UnexpectedEof};
    matches!(error.kind(), InvalidData | NotADirectory | UnexpectedEof)
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MachineError {
    let path = path.to_owned();
    move |source| MachineError::Io { action, path, source }
}
