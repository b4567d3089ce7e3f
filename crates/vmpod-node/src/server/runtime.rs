//! What the HTTP server needs of the node agent.

use std::{fmt, io, sync::Arc};

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
};

use futures::stream::BoxStream;

use crate::logs::LogOptions;

/// A pod named by a request's path. The UID is present when the caller pinned it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodRef {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The UID the caller asked for; another pod of the same name must not answer.
    pub uid: Option<String>,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A container of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// The pod.
    pub pod: PodRef,
    /// The container's name.
    pub container: String,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (container {})", self.pod, self.container)
    }
}

/// A terminal's size in character cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TermSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// A command to run in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecRequest {
    /// The program and its arguments; never empty.
    pub command: Vec<String>,
    /// Whether to give the command a terminal. Then there is no separate stderr.
    pub tty: bool,
}

/// A wish to join the container's main process (or, without one, the machine's console).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachRequest {
    /// Whether the caller wants a terminal.
    pub tty: bool,
}

/// The caller's ends of a session. A stream that is absent was not asked for.
///
/// Writes to `stdout` and `stderr` wait while the caller reads slowly; shutting one down tells the caller
/// that this stream has ended. `stdin` ends with zero bytes when the caller closed it.
pub struct Streams {
    /// What the caller types.
    pub stdin: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// Where the command's output goes.
    pub stdout: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    /// Where the command's errors go; always absent with a terminal.
    pub stderr: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    /// New sizes of the caller's terminal; present only with one. The first is often there at once.
    pub resize: Option<mpsc::Receiver<TermSize>>,
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It returned this code.
    Code(i32),
    /// It was killed by this signal (a name without `SIG`, such as `KILL`).
    Signal(String),
}

impl Exit {
    /// The code a shell would report: 128 + the signal's number for the well-known signals.
    #[must_use]
    pub fn code(&self) -> i32 {
        match self {
            Self::Code(code) => *code,
            Self::Signal(name) => {
                128 + match name.trim_start_matches("SIG") {
                    "HUP" => 1,
                    "INT" => 2,
                    "QUIT" => 3,
                    "ILL" => 4,
                    "TRAP" => 5,
                    "ABRT" => 6,
                    "BUS" => 7,
                    "FPE" => 8,
                    "USR1" => 10,
                    "SEGV" => 11,
                    "USR2" => 12,
                    "PIPE" => 13,
                    "ALRM" => 14,
                    "TERM" => 15,
                    _ => 9,
                }
            }
        }
    }
}

/// Why the agent could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// No such pod here: HTTP 404.
    #[error("pod {0} does not exist on this node")]
    NoPod(PodRef),
    /// The pod has no such container: HTTP 404.
    #[error("container {} not found in pod {}", .0.container, .0.pod)]
    NoContainer(Target),
    /// The container has not started, or has ended, so nothing can be run in it: HTTP 400.
    #[error("container {target} is not running: {why}")]
    NotRunning {
        /// The container.
        target: Target,
        /// Its state in words.
        why: String,
    },
    /// There is no (previous) attempt whose log could be read: HTTP 400.
    #[error("{previous}container {target} has no log: {why}", previous = if *.previous { "previous " } else { "" })]
    NoLog {
        /// The container.
        target: Target,
        /// Whether the attempt before the current one was asked for.
        previous: bool,
        /// Why there is none.
        why: String,
    },
    /// The request can't be met for this kind of container: HTTP 400.
    #[error("{0}")]
    Unsupported(String),
    /// The machine's guest did not do what was asked: HTTP 500.
    #[error("{what}")]
    Guest {
        /// What was tried, on what.
        what: String,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Use of cpu and memory, by counters that only grow while the thing lives.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Processor time used since the start, in nanoseconds.
    pub cpu_nanoseconds: u64,
    /// Processor time used a second lately, in billionths of a core; absent when not known yet.
    pub cpu_nanocores: Option<u64>,
    /// Memory in use that can't be taken back at once, in bytes.
    pub memory_working_set_bytes: u64,
    /// Resident memory, in bytes.
    pub memory_rss_bytes: Option<u64>,
    /// Memory still available, in bytes; absent when there is no limit.
    pub memory_available_bytes: Option<u64>,
}

/// Use of a file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FsUsage {
    /// Size in bytes.
    pub capacity_bytes: u64,
    /// Free for unprivileged users, in bytes.
    pub available_bytes: u64,
    /// Used by the thing in question, in bytes.
    pub used_bytes: u64,
    /// Inodes in all; zero when the file system has no such notion.
    pub inodes: u64,
    /// Inodes free.
    pub inodes_free: u64,
}

/// What one container uses.
#[derive(Clone, Debug, PartialEq)]
pub struct MachineStats {
    /// The container's name.
    pub container: String,
    /// When it started.
    pub started: Timestamp,
    /// Processor and memory.
    pub usage: Usage,
    /// Its disk (root file system).
    pub rootfs: Option<FsUsage>,
    /// Bytes of its log files.
    pub log_bytes: u64,
}

/// What one pod uses.
#[derive(Clone, Debug, PartialEq)]
pub struct PodStats {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The pod's UID.
    pub uid: String,
    /// When it was started on this node.
    pub started: Timestamp,
    /// Its running containers.
    pub containers: Vec<MachineStats>,
    /// Bytes received and sent by its network interface, where known.
    pub network: Option<(u64, u64)>,
}

/// What the node and its pods use, as of `taken`.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeStats {
    /// When these figures were read.
    pub taken: Timestamp,
    /// When the host booted.
    pub booted: Timestamp,
    /// The host's processor and memory.
    pub node: Usage,
    /// The file system that holds the agent's state.
    pub fs: Option<FsUsage>,
    /// The file system that holds the images.
    pub image_fs: Option<FsUsage>,
    /// Pods with running containers.
    pub pods: Vec<PodStats>,
}

/// A two-way connection to a port of a guest.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// The agent behind the HTTP server.
///
/// A call whose caller went away is dropped: dropping the future of [`exec`](Self::exec) ends the session
/// in the guest, dropping that of [`attach`](Self::attach) only detaches.
#[async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// All pods bound to this node, with their status as the agent knows it.
    fn pods(&self) -> Vec<Arc<Pod>>;

    /// Those of [`pods`](Self::pods) with a running container, as the runtime itself sees them.
    fn running_pods(&self) -> Vec<Arc<Pod>> {
        let mut pods = self.pods();
        pods.retain(|pod| {
            pod.status.as_ref().and_then(|status| status.container_statuses.as_ref()).is_some_and(|all| {
                all.iter().any(|container| container.state.as_ref().is_some_and(|state| state.running.is_some()))
            })
        });
        pods
    }

    /// Checks that `target` is a running container, before the connection is upgraded.
    /// [`exec`](Self::exec) and [`attach`](Self::attach) come after it.
    async fn check_running(&self, target: &Target) -> Result<(), RuntimeError>;

    /// Checks that `pod` is here and has a machine to forward ports to, before the connection is upgraded.
    async fn check_forward(&self, pod: &PodRef) -> Result<(), RuntimeError>;

    /// Runs a command in a container until it ends.
    async fn exec(&self, target: &Target, request: ExecRequest, streams: Streams) -> Result<Exit, RuntimeError>;

    /// Joins the container's main process until it ends.
    async fn attach(&self, target: &Target, request: AttachRequest, streams: Streams) -> Result<Exit, RuntimeError>;

    /// The log of the container's current attempt, or of the one before it. An error in it ends it.
    async fn logs(
        &self,
        target: &Target,
        options: LogOptions,
    ) -> Result<BoxStream<'static, io::Result<bytes::Bytes>>, RuntimeError>;

    /// Connects to a TCP port of the pod's guest. An error here is a refused or unreachable port.
    async fn port_forward(&self, pod: &PodRef, port: u16) -> io::Result<Box<dyn Duplex>>;

    /// Answers to probes, in the `OpenMetrics` format.
    fn probes(&self) -> String;

    /// What the node and its pods use.
    async fn stats(&self) -> Result<NodeStats, RuntimeError>;
}
