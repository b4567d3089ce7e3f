//! Machines of Apple's Virtualization framework.
//!
//! The framework ties a guest to the process that made it. So the agent starts one helper for each machine (`vmpod machine-vz DIR`),
//! in a session of its own, and speaks to it over a socket in the machine's directory (`protocol`). How a helper is known to be a
//! machine's is as with QEMU ([`crate::qemu`]): by the kernel's lock that it inherits, and by its answer.
//!
//! Only `apple` calls the framework. The helper ([`helper`]), what the framework is told ([`config`]) and the two slots for macOS
//! guests ([`slots`]) are the same wherever they run, and are tested on Linux with another [`helper::Engine`] in the framework's place.

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::console::Watch;
use crate::directory::{self, MachineDir};
use crate::hypervisor::{self, Hypervisor, HypervisorError, Process, Stats};
use crate::lifecycle::{Exit, ExitCause};
use crate::lock::{self, Lock, holder, last_words, remove, take_lock};
use crate::pid::{Handle, usage};
use crate::session;
use crate::spec::{Arch, Spec};

#[cfg(target_os = "macos")]
pub mod apple;
pub mod config;
mod control;
pub mod helper;
mod protocol;
pub mod slots;

use control::Control;
use protocol::{BUSY, Command, ENDED, SOCKET};

/// The name of this hypervisor.
pub const NAME: &str = "vz";
/// Where macOS keeps the leases of its own DHCP server.
pub const LEASES: &str = "/var/db/dhcpd_leases";

const LOG: &str = "process.log";
/// How long a helper may take until its guest runs. Building a macOS guest's devices takes seconds on a busy host.
const START_LIMIT: Duration = Duration::from_mins(1);
/// How long a helper that is found may take until it answers.
const FIND_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 15 });

/// Apple's Virtualization framework, by way of a helper for each machine.
#[derive(Clone, Debug)]
pub struct Vz {
    /// The program that becomes a helper when its arguments are `machine-vz DIR`: this one, as a rule.
    pub helper: PathBuf,
    /// The file with the leases of the host's DHCP server; [`LEASES`] as a rule.
    pub leases: PathBuf,
}

#[async_trait]
impl Hypervisor for Vz {
    fn name(&self) -> &'static str {
        NAME
    }

    fn no_shares(&self) -> Option<String> {
        None
    }

    fn leases(&self) -> Option<&Path> {
        Some(&self.leases)
    }

    async fn start(&self, spec: &Spec, dir: &MachineDir) -> Result<Box<dyn Process>, HypervisorError> {
        // Said before anything is started, and in the agent's words.
        config::configuration(spec, dir.path(), Arch::host())?;
        let lock = lock::take_to_start(dir)?;
        remove(&dir.file(SOCKET))?;
        let log_path = dir.file(LOG);
        let log = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&log_path)
            .map_err(HypervisorError::io(format!("can't open {}", log_path.display())))?;
        let log_too = log.try_clone().map_err(HypervisorError::io("can't duplicate a file descriptor"))?;
        let mut watch = Watch::new(&dir.file(SOCKET)).map_err(HypervisorError::io("can't watch the directory"))?;
        let mut command = std::process::Command::new(&self.helper);
        command
            .arg("machine-vz")
            .arg(dir.path())
            .current_dir(dir.path())
            .stdin(Stdio::from(lock))
            .stdout(Stdio::from(log_too))
            .stderr(Stdio::from(log));
        session::of_its_own(&mut command);
        let mut child = tokio::process::Command::from(command).spawn().map_err(|source| HypervisorError::Program {
            program: self.helper.display().to_string(),
            mend: "it is this program itself; was it removed while it ran?",
            source,
        })?;
        let answer = tokio::time::timeout(START_LIMIT, async {
            loop {
                if dir.file(SOCKET).exists()
                    && let Ok(control) = Control::connect(dir).await
                {
                    return Ok(control);
                }
                tokio::select! {
                    status = child.wait() => {
                        let status = status.map_err(HypervisorError::io("can't wait for the machine's helper"))?;
                        if status.code() == Some(i32::from(BUSY)) {
                            // It may have said so before.
                            let words = last_words(&log_path, 1);
                            return Err(HypervisorError::Busy(words.unwrap_or_else(|| "too many guests run".to_owned())));
                        }
                        let output = last_words(&log_path, 3).unwrap_or_else(|| status.to_string());
                        return Err(HypervisorError::DiedAtStart { hypervisor: NAME, output });
                    }
                    changed = watch.changed() => changed.map_err(HypervisorError::io("can't watch the directory"))?,
                    // The socket's name appears an instant before it listens.
                    () = tokio::time::sleep(Duration::from_millis(5)), if dir.file(SOCKET).exists() => {}
                }
            }
        })
        .await;
        let control = if let Ok(answer) = answer {
            answer?
        } else {
            child.kill().await.map_err(HypervisorError::io("can't kill a helper that doesn't answer"))?;
            let output = format!("it didn't answer within {} s and was killed", START_LIMIT.as_secs());
            return Err(HypervisorError::DiedAtStart { hypervisor: NAME, output });
        };
        // Buried by whoever watches it; a process that nobody waits for would stay as a zombie.
        tokio::spawn(async move { child.wait().await });
        Ok(Box::new(VzProcess::new(spec, dir, control).await?))
    }

    async fn find(&self, spec: &Spec, dir: &MachineDir) -> Result<Option<Box<dyn Process>>, HypervisorError> {
        let deadline = tokio::time::Instant::now() + FIND_LIMIT;
        loop {
            match take_lock(dir)? {
                Lock::Absent | Lock::Taken(_) => return Ok(None),
                Lock::Held => {}
            }
            // It may be an instant old, and its guest not running yet.
            let why = match tokio::time::timeout_at(deadline, Control::connect(dir)).await {
                Ok(Ok(control)) => return Ok(Some(Box::new(VzProcess::new(spec, dir, control).await?))),
                Ok(Err(error)) => crate::machine::error_chain(&error),
                Err(_) => "no answer on its control socket".to_owned(),
            };
            if tokio::time::Instant::now() >= deadline {
                let holder = holder(dir).map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
                return Err(HypervisorError::Unresponsive { why: format!("process {holder} holds it; {why}") });
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn autopsy(&self, _spec: &Spec, dir: &MachineDir) -> Result<Option<Exit>, HypervisorError> {
        // A helper makes the console's file before its guest runs.
        if !dir.console().exists() {
            return Ok(None);
        }
        Ok(Some(ended(dir)?.unwrap_or_else(|| unseen(dir))))
    }

    async fn destroy(&self, dir: &MachineDir) -> Result<(), HypervisorError> {
        lock::clear(dir, FIND_LIMIT).await
    }
}

/// What a helper wrote down of its machine's end.
fn ended(dir: &MachineDir) -> Result<Option<Exit>, HypervisorError> {
    let path = dir.file(ENDED);
    directory::read_json(&path).map_err(HypervisorError::io(format!("can't read {}", path.display())))
}

fn unseen(dir: &MachineDir) -> Exit {
    Exit { cause: ExitCause::Unseen, at: Timestamp::now(), detail: last_words(&dir.file(LOG), 3) }
}

/// A helper that was proved to be the machine's.
struct VzProcess {
    control: Arc<Control>,
    handle: Arc<Handle>,
    killed: Arc<AtomicBool>,
    exit: watch::Receiver<Option<Exit>>,
    /// Ends with us.
    _watcher: AbortOnDropHandle<()>,
}

impl VzProcess {
    async fn new(spec: &Spec, dir: &MachineDir, control: Control) -> Result<Self, HypervisorError> {
        let answer = control.ask(Command::Describe).await?;
        let uuid = answer.uuid.unwrap_or_default();
        if uuid != spec.id.uuid().to_string() {
            return Err(HypervisorError::Unresponsive {
                why: format!("it says that it is {uuid}, and not machine {}", spec.id),
            });
        }
        let pid = control.peer().ok_or_else(|| HypervisorError::Unresponsive {
            why: "the kernel doesn't say who is at its control socket".to_owned(),
        })?;
        let handle = Arc::new(Handle::open(pid)?);
        let control = Arc::new(control);
        let killed = Arc::new(AtomicBool::new(false));
        let (exit_tx, exit) = watch::channel(None);
        let (dir, theirs, their_killed) = (dir.clone(), Arc::clone(&control), Arc::clone(&killed));
        let watcher = tokio::spawn(async move {
            theirs.closed().await;
            gone(&dir).await;
            let exit = match ended(&dir) {
                Ok(Some(exit)) => exit,
                Ok(None) if their_killed.load(Ordering::SeqCst) => {
                    Exit { cause: ExitCause::Killed, at: Timestamp::now(), detail: None }
                }
                // We did see it, and it said nothing: a crash, or a signal that can't be caught.
                Ok(None) => Exit { cause: ExitCause::Killed, ..unseen(&dir) },
                Err(error) => {
                    let detail = Some(crate::machine::error_chain(&error));
                    Exit { cause: ExitCause::HypervisorFailed, at: Timestamp::now(), detail }
                }
            };
            exit_tx.send_replace(Some(exit));
        });
        Ok(Self { control, handle, killed, exit, _watcher: AbortOnDropHandle::new(watcher) })
    }
}

/// Waits until nobody holds the machine: an instant after its helper let go of its socket.
async fn gone(dir: &MachineDir) {
    let mut wait = Duration::from_millis(2);
    while matches!(take_lock(dir), Ok(Lock::Held) | Err(_)) {
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(Duration::from_secs(1));
    }
}

#[async_trait]
impl Process for VzProcess {
    async fn power_down(&self) -> Result<(), HypervisorError> {
        self.control.ask(Command::PowerDown).await.map(drop)
    }

    async fn kill(&self) -> Result<(), HypervisorError> {
        self.killed.store(true, Ordering::SeqCst);
        // A helper that can will say what it did; one that hangs is ended by the kernel.
        if tokio::time::timeout(Duration::from_secs(3), self.control.ask(Command::Stop))
            .await
            .is_ok_and(|answer| answer.is_ok())
            && tokio::time::timeout(Duration::from_secs(3), self.control.closed()).await.is_ok()
        {
            return Ok(());
        }
        self.handle.kill()
    }

    async fn pause(&self) -> Result<(), HypervisorError> {
        self.control.ask(Command::Pause).await.map(drop)
    }

    async fn resume(&self) -> Result<(), HypervisorError> {
        self.control.ask(Command::Resume).await.map(drop)
    }

    async fn exited(&self) -> Exit {
        hypervisor::exited(self.exit.clone()).await
    }

    async fn stats(&self) -> Result<Stats, HypervisorError> {
        let (cpu, rss) = usage(self.handle.pid)?;
        // The framework counts nothing of its disks.
        Ok(Stats { cpu, rss, disks: Vec::new() })
    }

    fn pid(&self) -> Option<u32> {
        Some(self.handle.pid)
    }
}

/// The longest path of a socket (<sys/un.h>): 104 bytes on macOS, 108 on Linux, with the zero at its end.
const LONGEST: usize = if cfg!(target_os = "linux") { 107 } else { 103 };

/// A path by which a socket in a machine's directory can be named, and what must be kept open meanwhile.
fn socket_path(dir: &MachineDir, name: &str) -> std::io::Result<(PathBuf, Option<std::fs::File>)> {
    let path = dir.file(name);
    if path.as_os_str().len() <= LONGEST {
        return Ok((path, None));
    }
    if cfg!(target_os = "linux") {
        use std::os::fd::AsRawFd;
        let open = std::fs::File::open(dir.path())?;
        return Ok((format!("/proc/self/fd/{}/{name}", open.as_raw_fd()).into(), Some(open)));
    }
    let why = format!(
        "{} is longer than the {LONGEST} bytes that a socket's path may have: choose a shorter home",
        path.display()
    );
    Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, why))
}

/// Listens on a socket in a machine's directory.
fn bind(dir: &MachineDir, name: &str) -> Result<UnixListener, HypervisorError> {
    let bound = socket_path(dir, name).and_then(|(path, _open)| UnixListener::bind(path));
    bound.map_err(HypervisorError::io(format!("can't listen on {}", dir.file(name).display())))
}

/// Connects to a socket in a machine's directory.
async fn connect(dir: &MachineDir, name: &str) -> Result<UnixStream, HypervisorError> {
    let io = HypervisorError::io(format!("can't connect to {}", dir.file(name).display()));
    let (path, _open) = match socket_path(dir, name) {
        Ok(found) => found,
        Err(error) => return Err(io(error)),
    };
    UnixStream::connect(path).await.map_err(io)
}

#[cfg(test)]
mod tests;
