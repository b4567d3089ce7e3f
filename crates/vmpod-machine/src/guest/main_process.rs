//! A process in the guest that outlives our connection to it.
//!
//! The kubelet's contract wants a container's process started once, its output kept and its exit code known, even
//! when the agent is killed in the middle. So the process doesn't hang on an SSH channel: a small supervisor in
//! plain POSIX shell starts it in the guest, and the agent only reads what the supervisor keeps.

use std::sync::Arc;

use futures::stream::BoxStream;

use super::{ExecSession, ExitStatus, GuestError, Link, Signal};

/// What the main process runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MainCommand {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Further environment.
    pub env: Vec<(String, String)>,
    /// Working directory; the login directory when none.
    pub workdir: Option<String>,
    /// Whether its standard input is open, for [`MainProcess::input`]. Without, it reads end-of-file.
    pub stdin: bool,
}

/// Whether a start was the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Started {
    /// This call started the process.
    Now,
    /// It was started before, by this or an earlier agent; nothing was done.
    Before,
}

/// One of a process's two outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StdStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A place in a process's output: bytes of each stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Offset {
    /// Bytes of standard output.
    pub stdout: u64,
    /// Bytes of standard error.
    pub stderr: u64,
}

impl Offset {
    /// The place after `bytes` more bytes of `stream`.
    #[must_use]
    pub fn after(mut self, stream: StdStream, bytes: usize) -> Self {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        match stream {
            StdStream::Stdout => self.stdout = self.stdout.saturating_add(bytes),
            StdStream::Stderr => self.stderr = self.stderr.saturating_add(bytes),
        }
        self
    }
}

/// A piece of output.
///
/// Each stream comes whole and in order. Between the two streams the order is that of arrival: two files in the
/// guest have no common clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputChunk {
    /// The place *after* this piece: store it, and follow from it to go on.
    pub next: Offset,
    /// Which stream.
    pub stream: StdStream,
    /// The bytes.
    pub bytes: bytes::Bytes,
}

/// A named process in the guest.
#[derive(Clone)]
pub struct MainProcess {
    link: Arc<dyn Link>,
    name: String,
}

impl std::fmt::Debug for MainProcess {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MainProcess").field("name", &self.name).finish_non_exhaustive()
    }
}

impl MainProcess {
    pub(crate) fn new(link: Arc<dyn Link>, name: &str) -> Self {
        Self { link, name: name.to_owned() }
    }

    /// Starts it, at most once per boot of the guest however often and by however many agents this is called.
    pub async fn start(&self, command: &MainCommand) -> Result<Started, GuestError> {
        self.link.main_start(&self.name, command).await
    }

    /// Its output from `from` on, as it comes; ends when the process has ended and everything was given.
    ///
    /// A lost connection is re-made without a gap or a repetition. The stream ends with an error when the machine
    /// stops or the process can't be known any more.
    #[must_use]
    pub fn follow(&self, from: Offset) -> BoxStream<'static, Result<OutputChunk, GuestError>> {
        Arc::clone(&self.link).main_follow(&self.name, from)
    }

    /// Waits for its end, over lost connections and agents' deaths.
    pub async fn wait(&self) -> Result<ExitStatus, GuestError> {
        self.link.main_wait(&self.name).await
    }

    /// Opens its standard input: what is written to the session's own arrives there. The process reads no end-of-file when the
    /// session's input ends, unless that is to be the `last`. One that has no input, or none any more, is an error.
    pub async fn input(&self, last: bool) -> Result<ExecSession, GuestError> {
        self.link.main_input(&self.name, last).await
    }

    /// Sends it a signal. One that has ended already is no error.
    pub async fn signal(&self, signal: Signal) -> Result<(), GuestError> {
        self.link.main_signal(&self.name, signal).await
    }
}
