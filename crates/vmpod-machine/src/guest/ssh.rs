//! A guest over SSH: one kept connection per machine, made as soon as the guest listens and re-made when it dies.

use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::BoxStream;
use russh::ChannelOpenFailure;
use russh::client::Msg;
use tokio::io::AsyncWriteExt;
use tokio::sync::watch;
use vmpod_network::learn::Learnt;

use super::carry::{self, Prepared};
use super::connect::{Session, Target};
use super::main_process::{MainCommand, Offset, OutputChunk, Started};
use super::{
    Duplex, Exec, ExecCarrier, ExecSession, ExitStatus, GuestError, GuestState, Link, Signal, Waiting, shell,
    supervisor, windows,
};
use crate::console;
use crate::directory::MachineDir;
use crate::lifecycle::State;
use crate::machine::until_running;
use crate::spec::{GuestOs, Spec};

/// The way into a guest over SSH.
pub(crate) struct SshLink {
    target: Target,
    os: GuestOs,
    state: watch::Receiver<State>,
    ready: watch::Sender<GuestState>,
    session: watch::Sender<Option<Arc<Session>>>,
}

impl SshLink {
    /// Makes the link, and the task that keeps its connection.
    pub(crate) fn start(
        spec: &Spec,
        dir: &MachineDir,
        state: watch::Receiver<State>,
        learnt: watch::Receiver<Option<Learnt>>,
    ) -> (Arc<Self>, tokio::task::AbortHandle) {
        let link = Arc::new(Self {
            target: Target::new(spec, dir, learnt),
            os: spec.os,
            state,
            ready: watch::Sender::new(GuestState::Waiting(Waiting::Machine)),
            session: watch::Sender::new(None),
        });
        let task = tokio::spawn(Arc::clone(&link).keep()).abort_handle();
        (link, task)
    }

    /// Keeps a connection for as long as the machine lives.
    async fn keep(self: Arc<Self>) {
        let mut state = self.state.clone();
        if !until_running(&mut state).await {
            return;
        }
        tokio::select! {
            () = self.connections() => {}
            _ = state.wait_for(State::is_final) => {}
        }
        self.session.send_replace(None);
        self.ready.send_replace(GuestState::Lost("the machine has stopped".to_owned()));
    }

    async fn connections(&self) {
        let mut knocked = false;
        if let Some(marker) = self.target.marker()
            // A machine that was connected to before prints its marker no more, and its place in the log may be gone.
            && !self.target.was_connected()
        {
            self.waiting(Waiting::Marker);
            match console::wait_for(&self.target.console, marker).await {
                Ok(()) => knocked = true,
                Err(error) => tracing::warn!(machine = %self.target.id, %error, "can't watch the console"),
            }
        }
        loop {
            if !self.target.is_located() {
                self.waiting(Waiting::Address);
            }
            let mut place = self.target.located().await;
            let tell = |why| self.waiting(why);
            let session = tokio::select! {
                session = self.target.connect(knocked, &tell) => Arc::new(session),
                () = place.moved() => continue,
            };
            let closed = session.closed.clone();
            self.session.send_replace(Some(session));
            self.ready.send_replace(GuestState::Ready);
            let why = tokio::select! {
                () = closed.cancelled() => "the SSH connection was closed",
                // A connection to where the guest isn't any more would hang until somebody loses patience.
                () = place.moved() => "the guest has another address",
            };
            self.session.send_replace(None);
            self.ready.send_replace(GuestState::Lost(why.to_owned()));
        }
    }

    fn waiting(&self, why: Waiting) {
        self.ready.send_if_modified(|ready| {
            // Lost stays lost until it is ready again, with the newest reason.
            let new = match ready {
                GuestState::Lost(_) => GuestState::Lost(why.to_string()),
                _ => GuestState::Waiting(why),
            };
            let differs = *ready != new;
            *ready = new;
            differs
        });
    }

    fn session(&self) -> Result<Arc<Session>, GuestError> {
        if self.state.borrow().is_final() {
            return Err(GuestError::Stopped);
        }
        let session = self.session.borrow().clone();
        session.ok_or_else(|| GuestError::NotReady(self.ready.borrow().clone()))
    }

    /// Waits until there is a connection; an error when there will be none any more.
    async fn until_ready(&self) -> Result<(), GuestError> {
        let (mut state, mut session) = (self.state.clone(), self.session.subscribe());
        tokio::select! {
            biased;
            _ = state.wait_for(State::is_final) => Err(GuestError::Stopped),
            found = session.wait_for(Option::is_some) => found.map(drop).map_err(|_| GuestError::Stopped),
        }
    }

    /// Opens a channel. A server allows only so many on one connection (OpenSSH: 10), so one more connection is made
    /// when the kept one is full; it lives as long as its channel.
    async fn channel(&self) -> Result<russh::Channel<Msg>, GuestError> {
        let session = self.session()?;
        match session.handle.channel_open_session().await {
            Ok(channel) => Ok(channel),
            Err(russh::Error::ChannelOpenFailure(
                ChannelOpenFailure::AdministrativelyProhibited
                | ChannelOpenFailure::ResourceShortage
                | ChannelOpenFailure::ConnectFailed,
            )) => {
                let extra =
                    self.target.connect_once().await.map_err(|why| GuestError::Lost { why: why.to_string() })?;
                extra.handle.channel_open_session().await.map_err(lost)
            }
            Err(error) => Err(lost(error)),
        }
    }

    async fn run(&self, prepared: Prepared, exec: &Exec) -> Result<ExecSession, GuestError> {
        let channel = self.channel().await?;
        if let Some(size) = exec.tty {
            let (cols, rows) = (u32::from(size.cols), u32::from(size.rows));
            channel.request_pty(false, "xterm-256color", cols, rows, 0, 0, &[]).await.map_err(lost)?;
        }
        channel.exec(true, prepared.line.into_bytes()).await.map_err(lost)?;
        let (control, carrier) = ExecCarrier::pair();
        Ok(carry::start(channel, prepared.input, exec.stdin, exec.tty.is_some(), control, carrier))
    }

    /// Runs one of our own scripts with this input; `(status, stdout, stderr)`.
    async fn script(
        &self,
        script: &str,
        words: &[&str],
        input: Vec<u8>,
    ) -> Result<(ExitStatus, Vec<u8>, Vec<u8>), GuestError> {
        let line = format!("exec sh -c {} vmpod {}", shell::quote(script), shell::join(words));
        let prepared = Prepared { line, input };
        self.run(prepared, &Exec::default()).await?.output().await
    }

    async fn sftp(&self) -> Result<russh_sftp::client::SftpSession, GuestError> {
        let channel = self.channel().await?;
        channel.request_subsystem(true, "sftp").await.map_err(lost)?;
        russh_sftp::client::SftpSession::new(channel.into_stream())
            .await
            .map_err(|error| GuestError::Refused { what: "SFTP".to_owned(), why: error.to_string() })
    }

    /// Windows has no POSIX shell, and its SSH server has SFTP.
    fn has_shell(&self) -> bool {
        self.os != GuestOs::Windows
    }
}

fn lost(error: impl std::fmt::Display) -> GuestError {
    GuestError::Lost { why: error.to_string() }
}

fn refused(what: String) -> impl FnOnce(russh_sftp::client::error::Error) -> GuestError {
    move |error| GuestError::Refused { what, why: error.to_string() }
}

/// What a script had to say when it failed.
fn said(what: String, status: &ExitStatus, stderr: &[u8]) -> GuestError {
    let why = String::from_utf8_lossy(stderr).trim().to_owned();
    let why = if why.is_empty() { format!("exit code {}", status.code()) } else { why };
    GuestError::Refused { what, why }
}

/// Writes a file beside its place and moves it there, so that nobody in the guest sees half of it.
const WRITE: &str = r#"umask 077 && t="$1.vmpod.$$" && trap 'rm -f "$t"' EXIT && cat >"$t" && [ "$(wc -c <"$t")" -eq "$3" ] && chmod "$2" "$t" && mv -f "$t" "$1""#;

#[async_trait]
impl Link for SshLink {
    fn ready(&self) -> watch::Receiver<GuestState> {
        self.ready.subscribe()
    }

    async fn exec(&self, exec: Exec) -> Result<ExecSession, GuestError> {
        if !self.has_shell() {
            carry::check(&exec)?;
            let prepared = Prepared { line: windows::line(&exec)?, input: Vec::new() };
            return self.run(prepared, &exec).await;
        }
        let mut prepared = carry::prepare(&exec)?;
        if exec.tty.is_some() && !prepared.input.is_empty() {
            // A terminal would echo the environment and cut its lines, so it goes through a file that only the login
            // user can read and that is gone before the command begins.
            let script = r#"umask 077; f=$(mktemp "${TMPDIR:-/tmp}/.vmpod.XXXXXX") && cat >"$f" && echo "$f""#;
            let (status, file, stderr) = self.script(script, &[], std::mem::take(&mut prepared.input)).await?;
            if status != ExitStatus::Code(0) {
                return Err(said("the environment".to_owned(), &status, &stderr));
            }
            let file = String::from_utf8_lossy(&file).trim().to_owned();
            prepared.line = carry::line_with_file(&exec, &file);
        }
        self.run(prepared, &exec).await
    }

    async fn write_file(&self, path: &str, mode: u32, bytes: &[u8]) -> Result<(), GuestError> {
        let what = format!("to write {path}");
        if self.has_shell() {
            let (mode, length) = (format!("{mode:o}"), bytes.len().to_string());
            let (status, _, stderr) = self.script(WRITE, &[path, &mode, &length], bytes.to_vec()).await?;
            return if status == ExitStatus::Code(0) { Ok(()) } else { Err(said(what, &status, &stderr)) };
        }
        let mut file = self.sftp().await?.create(path).await.map_err(refused(what.clone()))?;
        let written = async {
            file.write_all(bytes).await?;
            file.shutdown().await
        };
        written.await.map_err(|error| GuestError::Refused { what, why: error.to_string() })
    }

    async fn read_file(&self, path: &str) -> Result<Vec<u8>, GuestError> {
        let what = format!("to read {path}");
        if self.has_shell() {
            let (status, bytes, stderr) = self.script(r#"exec cat <"$1""#, &[path], Vec::new()).await?;
            return if status == ExitStatus::Code(0) { Ok(bytes) } else { Err(said(what, &status, &stderr)) };
        }
        self.sftp().await?.read(path).await.map_err(refused(what))
    }

    async fn forward(&self, port: u16) -> Result<Box<dyn Duplex>, GuestError> {
        let session = self.session()?;
        match session.handle.channel_open_direct_tcpip("127.0.0.1", port.into(), "127.0.0.1", 0).await {
            Ok(channel) => Ok(Box::new(channel.into_stream())),
            Err(russh::Error::ChannelOpenFailure(why)) => {
                Err(GuestError::Refused { what: format!("a connection to its port {port}"), why: format!("{why:?}") })
            }
            Err(error) => Err(lost(error)),
        }
    }

    async fn main_start(&self, name: &str, command: &MainCommand) -> Result<Started, GuestError> {
        if !self.has_shell() {
            return Err(GuestError::Invalid(
                "in a Windows guest the container's command doesn't run yet: leave it out, and start the work from user data, \
                 by exec or by a pool's provision"
                    .to_owned(),
            ));
        }
        let run = supervisor::run_file(command)?;
        supervisor::check_name(name)?;
        let line = format!("exec sh -c {} vmpod {}", shell::quote(&supervisor::start_script()), shell::quote(name));
        let mut session = self.run(Prepared { line, input: run.into_bytes() }, &Exec::default()).await?;
        supervisor::started(&mut session, name).await
    }

    fn main_follow(self: Arc<Self>, name: &str, from: Offset) -> BoxStream<'static, Result<OutputChunk, GuestError>> {
        supervisor::follow(self, name, from)
    }

    async fn main_wait(&self, name: &str) -> Result<ExitStatus, GuestError> {
        supervisor::check_name(name)?;
        let script = supervisor::wait_script();
        // Asked again after a lost connection, until there is an answer or the machine has stopped.
        loop {
            self.until_ready().await?;
            let answer = match self.script(&script, &[name], Vec::new()).await {
                Ok((status, out, stderr)) => {
                    let answer = supervisor::exit_code(name, &status, &out, &stderr);
                    if matches!(answer, Err(GuestError::Lost { .. })) {
                        tokio::time::sleep(supervisor::AGAIN).await;
                    }
                    answer
                }
                Err(error) => Err(error),
            };
            match answer {
                Err(GuestError::Lost { .. } | GuestError::NotReady(_)) => {
                    // The keeper hears of a lost connection a little later than we do.
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
                answer => return answer,
            }
        }
    }

    async fn main_input(&self, name: &str, last: bool) -> Result<ExecSession, GuestError> {
        supervisor::check_name(name)?;
        let words = [name, if last { "last" } else { "more" }];
        supervisor::Runner::open(self, &supervisor::input_script(), &words, true).await
    }

    async fn main_signal(&self, name: &str, signal: Signal) -> Result<(), GuestError> {
        supervisor::check_name(name)?;
        let script = supervisor::signal_script();
        let (status, _, stderr) = self.script(&script, &[name, signal.name()], Vec::new()).await?;
        if status == ExitStatus::Code(0) {
            Ok(())
        } else {
            Err(said(format!("signal {} for main process {name}", signal.name()), &status, &stderr))
        }
    }
}

#[async_trait]
impl supervisor::Runner for SshLink {
    async fn open(&self, script: &str, words: &[&str], stdin: bool) -> Result<ExecSession, GuestError> {
        self.until_ready().await?;
        let line = format!("exec sh -c {} vmpod {}", shell::quote(script), shell::join(words));
        let exec = Exec { stdin, ..Exec::default() };
        self.run(Prepared { line, input: Vec::new() }, &exec).await
    }
}
