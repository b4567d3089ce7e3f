//! The way into the system inside a machine.
//!
//! A [`Guest`] is a cheap handle. It is there before the guest is: [`Guest::ready`] tells when it answers and, until
//! then, what it is waiting for.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::BoxStream;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};

mod carry;
mod connect;
pub mod keys;
pub mod main_process;
pub(crate) mod shell;
pub(crate) mod ssh;
mod supervisor;
mod windows;

use main_process::{MainCommand, MainProcess, Offset, OutputChunk, Started};

/// A readable end.
pub type BoxRead = Box<dyn AsyncRead + Send + Unpin>;
/// A writable end.
pub type BoxWrite = Box<dyn AsyncWrite + Send + Unpin>;

/// Bytes both ways.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Whether the guest answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestState {
    /// Not yet.
    Waiting(Waiting),
    /// Commands can be run.
    Ready,
    /// It answered once and doesn't now; it is being tried again while the machine runs.
    Lost(String),
}

/// What a guest that doesn't answer yet is waited for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// The machine isn't running.
    Machine,
    /// The guest hasn't printed its ready marker.
    Marker,
    /// Nothing was heard of the guest's address.
    Address,
    /// Nobody listens on the port.
    Refused,
    /// The port is open, and no SSH server has said a word.
    Silent,
    /// The SSH server refuses our key or password.
    LoginRefused {
        /// The login name that was tried.
        user: String,
    },
    /// The SSH server's key isn't the one that this machine showed first.
    HostKeyChanged,
    /// The connection broke off, with this reason.
    Broken(String),
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine => f.write_str("the machine isn't running"),
            Self::Marker => f.write_str("the guest is booting (its ready marker isn't on the console yet)"),
            Self::Address => f.write_str("the guest's address isn't known yet: no lease was seen, and it said nothing"),
            Self::Refused => f.write_str("the guest's SSH port is closed"),
            Self::Silent => f.write_str("the guest's SSH server doesn't speak yet"),
            Self::LoginRefused { user } => write!(f, "the guest's SSH server refuses our login as {user}"),
            Self::HostKeyChanged => f.write_str("the guest's SSH host key changed since it was first seen"),
            Self::Broken(why) => write!(f, "the SSH connection broke off: {why}"),
        }
    }
}

impl fmt::Display for GuestState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Waiting(why) => why.fmt(f),
            Self::Ready => f.write_str("ready"),
            Self::Lost(why) => write!(f, "connection lost: {why}"),
        }
    }
}

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Winsize {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// A command to run in the guest.
#[derive(Clone, Debug, Default)]
pub struct Exec {
    /// Program and arguments, as they are: quoting for the guest's shell is done here.
    pub command: Vec<String>,
    /// Further environment. Never shows in a process list of the guest.
    pub env: Vec<(String, String)>,
    /// Working directory; the login directory when none.
    pub workdir: Option<String>,
    /// With a terminal of this size; then standard error comes with standard output.
    pub tty: Option<Winsize>,
    /// Whether there will be input. Without, the command reads end-of-file.
    pub stdin: bool,
}

impl Exec {
    /// A command without terminal or input.
    pub fn new<S: Into<String>>(command: impl IntoIterator<Item = S>) -> Self {
        Self { command: command.into_iter().map(Into::into).collect(), ..Self::default() }
    }
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// With this code.
    Code(i32),
    /// By this signal.
    Signal(Signal),
}

impl ExitStatus {
    /// The code a shell would show: 128 + n for a signal.
    #[must_use]
    pub fn code(&self) -> i32 {
        match self {
            Self::Code(code) => *code,
            Self::Signal(signal) => 128 + signal.number(),
        }
    }
}

/// A signal, by the name that SSH and POSIX share.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are POSIX's own")]
pub enum Signal {
    Abrt,
    Alrm,
    Fpe,
    Hup,
    Ill,
    Int,
    Kill,
    Pipe,
    Quit,
    Segv,
    Term,
    Usr1,
    Usr2,
    /// One that SSH has no name for.
    Other(String),
}

impl Signal {
    const KNOWN: [(Self, &'static str, i32); 13] = [
        (Self::Abrt, "ABRT", 6),
        (Self::Alrm, "ALRM", 14),
        (Self::Fpe, "FPE", 8),
        (Self::Hup, "HUP", 1),
        (Self::Ill, "ILL", 4),
        (Self::Int, "INT", 2),
        (Self::Kill, "KILL", 9),
        (Self::Pipe, "PIPE", 13),
        (Self::Quit, "QUIT", 3),
        (Self::Segv, "SEGV", 11),
        (Self::Term, "TERM", 15),
        (Self::Usr1, "USR1", 10),
        (Self::Usr2, "USR2", 12),
    ];

    /// The signal of a name, with or without `SIG`.
    #[must_use]
    pub fn from_name(name: &str) -> Self {
        let bare = name.strip_prefix("SIG").unwrap_or(name);
        Self::KNOWN
            .into_iter()
            .find(|(_, known, _)| *known == bare)
            .map_or_else(|| Self::Other(bare.to_owned()), |(signal, ..)| signal)
    }

    /// Its name without `SIG`.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Other(name) => name,
            known => Self::KNOWN.iter().find(|(signal, ..)| signal == known).map_or("", |(_, name, _)| name),
        }
    }

    /// Its number on Linux; 0 for one that isn't known.
    #[must_use]
    pub fn number(&self) -> i32 {
        Self::KNOWN.iter().find(|(signal, ..)| signal == self).map_or(0, |(.., number)| *number)
    }
}

/// A command that runs in the guest.
pub struct ExecSession {
    /// Its input, when [`Exec::stdin`] was set. Shutting it down is end-of-file.
    pub stdin: Option<BoxWrite>,
    /// Its output. Reads end when the command closed it.
    pub stdout: BoxRead,
    /// Its error output; empty with a terminal.
    pub stderr: BoxRead,
    /// The rest.
    pub control: ExecControl,
}

impl fmt::Debug for ExecSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecSession").finish_non_exhaustive()
    }
}

/// What can be done with a running command besides reading and writing.
#[derive(Clone, Debug)]
pub struct ExecControl {
    requests: mpsc::UnboundedSender<Request>,
    exit: watch::Receiver<Option<Result<ExitStatus, String>>>,
}

/// A request to the task that carries a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// The terminal has a new size.
    Resize(Winsize),
    /// Send a signal.
    Signal(Signal),
}

/// The other end of an [`ExecControl`], for whoever carries the command.
#[derive(Debug)]
pub struct ExecCarrier {
    /// Requests, in order.
    pub requests: mpsc::UnboundedReceiver<Request>,
    exit: watch::Sender<Option<Result<ExitStatus, String>>>,
}

impl ExecCarrier {
    /// Makes both ends.
    #[must_use]
    pub fn pair() -> (ExecControl, Self) {
        let (requests_tx, requests) = mpsc::unbounded_channel();
        let (exit_tx, exit) = watch::channel(None);
        (ExecControl { requests: requests_tx, exit }, Self { requests, exit: exit_tx })
    }

    /// Says how the command ended. The first word counts.
    pub fn finish(&self, result: Result<ExitStatus, String>) {
        self.exit.send_if_modified(|exit| {
            let first = exit.is_none();
            if first {
                *exit = Some(result);
            }
            first
        });
    }
}

impl ExecControl {
    /// Tells the command's terminal its new size.
    pub fn resize(&self, size: Winsize) {
        // A command that has ended has no terminal to resize.
        self.requests.send(Request::Resize(size)).ok();
    }

    /// Sends a signal, if the guest's SSH server can deliver signals.
    pub fn signal(&self, signal: Signal) {
        self.requests.send(Request::Signal(signal)).ok();
    }

    /// Waits for the command's end. It may be asked by many and more than once.
    pub async fn wait(&self) -> Result<ExitStatus, GuestError> {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(result) => match &*result {
                Some(Ok(status)) => Ok(status.clone()),
                Some(Err(why)) => Err(GuestError::Lost { why: why.clone() }),
                None => Err(GuestError::Lost { why: "no result".to_owned() }),
            },
            Err(_) => Err(GuestError::Lost { why: "the connection was dropped".to_owned() }),
        }
    }
}

impl ExecSession {
    /// Waits for the command's end.
    pub fn wait(&self) -> impl Future<Output = Result<ExitStatus, GuestError>> + Send + use<> {
        let control = self.control.clone();
        async move { control.wait().await }
    }

    /// Reads all output to the end and waits: `(status, stdout, stderr)`. For short commands.
    pub async fn output(mut self) -> Result<(ExitStatus, Vec<u8>, Vec<u8>), GuestError> {
        use tokio::io::AsyncReadExt;
        drop(self.stdin.take());
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let (a, b) = tokio::join!(self.stdout.read_to_end(&mut out), self.stderr.read_to_end(&mut err));
        a.and(b).map_err(|error| GuestError::Lost { why: error.to_string() })?;
        let status = self.wait().await?;
        Ok((status, out, err))
    }
}

/// Why something couldn't be done in the guest.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The guest doesn't answer (yet).
    #[error("the guest doesn't answer: {0}")]
    NotReady(GuestState),
    /// The connection broke while it was needed.
    #[error("the connection to the guest was lost: {why}")]
    Lost {
        /// The reason.
        why: String,
    },
    /// The guest answered, and refused.
    #[error("the guest refused {what}: {why}")]
    Refused {
        /// What was asked.
        what: String,
        /// What it said.
        why: String,
    },
    /// The main process can't be known any more: the guest rebooted, or its supervisor was killed.
    #[error("the main process {name} is gone without an exit code: {why}")]
    MainLost {
        /// Its name.
        name: String,
        /// What was found.
        why: String,
    },
    /// The machine stopped.
    #[error("the machine has stopped")]
    Stopped,
    /// A value that can't be passed to a guest.
    #[error("{0}")]
    Invalid(String),
    /// A file of this host.
    #[error("{action}")]
    Io {
        /// What was being done, on what.
        action: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// What carries a [`Guest`]: SSH, or a script in tests.
#[async_trait]
pub trait Link: Send + Sync + 'static {
    /// Whether the guest answers.
    fn ready(&self) -> watch::Receiver<GuestState>;
    /// Runs a command.
    async fn exec(&self, exec: Exec) -> Result<ExecSession, GuestError>;
    /// Writes a whole file with these permission bits.
    async fn write_file(&self, path: &str, mode: u32, bytes: &[u8]) -> Result<(), GuestError>;
    /// Reads a whole file.
    async fn read_file(&self, path: &str) -> Result<Vec<u8>, GuestError>;
    /// Connects to a port of the guest's own loopback.
    async fn forward(&self, port: u16) -> Result<Box<dyn Duplex>, GuestError>;
    /// Starts a main process, once.
    async fn main_start(&self, name: &str, command: &MainCommand) -> Result<Started, GuestError>;
    /// Its output from an offset on; ends after the process has.
    fn main_follow(self: Arc<Self>, name: &str, from: Offset) -> BoxStream<'static, Result<OutputChunk, GuestError>>;
    /// Waits for its end.
    async fn main_wait(&self, name: &str) -> Result<ExitStatus, GuestError>;
    /// Opens its input; its end is the process's, if that is to be the last.
    async fn main_input(&self, name: &str, last: bool) -> Result<ExecSession, GuestError>;
    /// Sends it a signal.
    async fn main_signal(&self, name: &str, signal: Signal) -> Result<(), GuestError>;
}

/// The system inside a machine.
#[derive(Clone)]
pub struct Guest {
    link: Arc<dyn Link>,
}

impl fmt::Debug for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guest").field("state", &*self.link.ready().borrow()).finish()
    }
}

impl Guest {
    pub(crate) fn new(link: Arc<dyn Link>) -> Self {
        Self { link }
    }

    /// Whether it answers, and each change of that.
    #[must_use]
    pub fn ready(&self) -> watch::Receiver<GuestState> {
        self.link.ready()
    }

    /// Runs a command. Fails at once when the guest isn't ready.
    pub async fn exec(&self, exec: Exec) -> Result<ExecSession, GuestError> {
        self.link.exec(exec).await
    }

    /// Writes a whole file with these permission bits, over SFTP or, where the guest has none, through a shell.
    pub async fn write_file(&self, path: &str, mode: u32, bytes: &[u8]) -> Result<(), GuestError> {
        self.link.write_file(path, mode, bytes).await
    }

    /// Reads a whole file.
    pub async fn read_file(&self, path: &str) -> Result<Vec<u8>, GuestError> {
        self.link.read_file(path).await
    }

    /// Copies a file of this host into the guest.
    pub async fn copy_in(&self, from: &Path, to: &str, mode: u32) -> Result<(), GuestError> {
        let bytes = tokio::fs::read(from)
            .await
            .map_err(|source| GuestError::Io { action: format!("can't read {}", from.display()), source })?;
        self.link.write_file(to, mode, &bytes).await
    }

    /// Connects to a port on the guest's loopback address.
    pub async fn forward(&self, port: u16) -> Result<Box<dyn Duplex>, GuestError> {
        self.link.forward(port).await
    }

    /// The named process that outlives our connection (see [`MainProcess`]).
    #[must_use]
    pub fn main_process(&self, name: &str) -> MainProcess {
        MainProcess::new(Arc::clone(&self.link), name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_keep_their_names_and_numbers() {
        for (signal, name, number) in Signal::KNOWN {
            assert_eq!(Signal::from_name(name), signal);
            assert_eq!(Signal::from_name(&format!("SIG{name}")), signal);
            assert_eq!((signal.name(), signal.number()), (name, number));
        }
        assert_eq!(Signal::from_name("WINCH"), Signal::Other("WINCH".to_owned()));
        assert_eq!(ExitStatus::Signal(Signal::Kill).code(), 137);
    }

    #[tokio::test]
    async fn the_first_result_counts() {
        let (control, carrier) = ExecCarrier::pair();
        carrier.finish(Ok(ExitStatus::Code(3)));
        carrier.finish(Err("too late".to_owned()));
        assert_eq!(control.wait().await.unwrap(), ExitStatus::Code(3));
        assert_eq!(control.clone().wait().await.unwrap(), ExitStatus::Code(3));
    }

    #[tokio::test]
    async fn a_dropped_carrier_is_a_lost_connection() {
        let (control, carrier) = ExecCarrier::pair();
        drop(carrier);
        assert!(matches!(control.wait().await, Err(GuestError::Lost { .. })));
    }
}
