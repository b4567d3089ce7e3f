//! What a machine needs from whatever executes it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::directory::MachineDir;
use crate::guest::Link;
use crate::lifecycle::Exit;
use crate::spec::{Accel, Spec};

/// Makes and finds machine processes.
///
/// A backend keeps two promises. [`Hypervisor::start`] never makes a second process for a directory that has one,
/// not even when the agent that made the first died half-way; and [`Hypervisor::find`] answers `None` only when it
/// is certain that no process is there.
#[async_trait]
pub trait Hypervisor: Send + Sync + 'static {
    /// A short name for messages.
    fn name(&self) -> &'static str;

    /// Starts the machine's process, in a session of its own, and waits until it answers.
    async fn start(&self, spec: &Spec, dir: &MachineDir) -> Result<Box<dyn Process>, HypervisorError>;

    /// Finds the running process of a machine, and proves that it is this machine's.
    async fn find(&self, spec: &Spec, dir: &MachineDir) -> Result<Option<Box<dyn Process>>, HypervisorError>;

    /// Whether a process ever ran in this directory; if so and it is gone, what can be said about its end.
    async fn autopsy(&self, spec: &Spec, dir: &MachineDir) -> Result<Option<Exit>, HypervisorError>;

    /// Makes sure that no process is left in this directory, whatever its condition, and returns when it is gone.
    async fn destroy(&self, dir: &MachineDir) -> Result<(), HypervisorError>;

    /// What a memory snapshot depends on besides the machine itself: the program's version and the processor. `None` when
    /// this backend takes no snapshots.
    async fn snapshots(&self, _accel: Accel) -> Option<String> {
        None
    }

    /// The file with the leases of the host's DHCP server, by which guests' addresses are learnt ([`crate::vmnet`]). `None` when
    /// this backend's networks have none.
    fn leases(&self) -> Option<&Path> {
        None
    }

    /// Why machines can't have a TPM ([`Spec::tpm`]) here; none if they can.
    fn no_tpm(&self) -> Option<String> {
        Some(format!("{} gives its guests none", self.name()))
    }

    /// Why machines can't have [`Spec::shares`] here; none if they can.
    fn no_shares(&self) -> Option<String> {
        Some("this hypervisor shares no directories with guests".to_owned())
    }

    /// The way into the guest, when it isn't SSH.
    fn link(&self, _spec: &Spec, _dir: &MachineDir) -> Option<Arc<dyn Link>> {
        None
    }
}

/// One running machine process.
#[async_trait]
pub trait Process: Send + Sync + 'static {
    /// Presses the guest's power button. A guest may ignore it.
    async fn power_down(&self) -> Result<(), HypervisorError>;

    /// Ends the process at once.
    async fn kill(&self) -> Result<(), HypervisorError>;

    /// Stops the guest's processors.
    async fn pause(&self) -> Result<(), HypervisorError>;

    /// Lets them run again.
    async fn resume(&self) -> Result<(), HypervisorError>;

    /// Waits until the process is gone. May be called again; answers the same.
    async fn exited(&self) -> Exit;

    /// Waits until the guest, which was started with [`crate::Snapshot::Make`], is ready to be copied and quiet, saves its
    /// memory and its devices' state into the machine's directory, and ends the process.
    async fn snapshot(&self) -> Result<(), HypervisorError> {
        Err(HypervisorError::Unsupported("this hypervisor takes no memory snapshots".to_owned()))
    }

    /// What the process uses.
    async fn stats(&self) -> Result<Stats, HypervisorError>;

    /// The process's number on this host, for messages and cgroups.
    fn pid(&self) -> Option<u32>;
}

/// Waits for the end that whoever watches a process writes here.
pub(crate) async fn exited(mut exit: watch::Receiver<Option<Exit>>) -> Exit {
    let end = exit.wait_for(Option::is_some).await.ok().and_then(|exit| exit.clone());
    match end {
        Some(exit) => exit,
        // Who watches is never cancelled on its own; the agent is ending.
        None => std::future::pending().await,
    }
}

/// What a machine uses of its host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Processor time since the process began.
    pub cpu: Duration,
    /// Resident memory in bytes.
    pub rss: u64,
    /// Per disk, in the order of [`Spec::disks`].
    pub disks: Vec<DiskStats>,
}

/// What a guest did with one disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskStats {
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Read requests.
    pub reads: u64,
    /// Write requests.
    pub writes: u64,
}

/// Why a hypervisor couldn't do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// The program can't be run at all.
    #[error("can't run {program}: {mend}")]
    Program {
        /// What was to be run.
        program: String,
        /// What to do about it.
        mend: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The process began and ended again before it answered.
    #[error("{hypervisor} ended while it was starting: {output}")]
    DiedAtStart {
        /// Which one.
        hypervisor: &'static str,
        /// The last lines that it wrote.
        output: String,
    },
    /// The process came up and couldn't go on from its snapshot.
    #[error("can't go on from its memory snapshot: {why}")]
    Restore {
        /// Why not.
        why: String,
    },
    /// The host runs as many guests of this kind as it may; later it may do.
    #[error("{0}")]
    Busy(String),
    /// Some process holds the machine's lock.
    #[error("a process already holds this machine ({holder})")]
    Occupied {
        /// Its number, where it could be learnt.
        holder: String,
    },
    /// The process is there and doesn't answer, or answers as somebody else.
    #[error("the machine's process doesn't answer as it should: {why}")]
    Unresponsive {
        /// What was wrong.
        why: String,
    },
    /// The process refused a command.
    #[error("{command} was refused: {why}")]
    Refused {
        /// The command.
        command: String,
        /// The reason it gave.
        why: String,
    },
    /// The host's side of its network.
    #[error("can't give the machine its network")]
    Network(#[from] vmpod_network::NetworkError),
    /// This host or backend can't do it.
    #[error("{0}")]
    Unsupported(String),
    /// Something about the host's files or sockets.
    #[error("{action}")]
    Io {
        /// What was being done, on what.
        action: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl HypervisorError {
    pub(crate) fn io(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let action = action.into();
        move |source| Self::Io { action, source }
    }
}
