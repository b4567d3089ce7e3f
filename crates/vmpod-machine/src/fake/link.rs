//! The way into a scripted guest.

use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

use super::{Event, ExecScript, Main, World};
use crate::guest::main_process::{MainCommand, Offset, OutputChunk, Started, StdStream};
use crate::guest::{Duplex, Exec, ExecCarrier, ExecSession, ExitStatus, GuestError, GuestState, Link, Request, Signal};
use crate::id::MachineId;

pub(super) struct FakeLink {
    world: World,
    id: MachineId,
}

impl FakeLink {
    pub(super) fn new(world: World, id: MachineId) -> Self {
        Self { world, id }
    }

    fn check_ready(&self) -> Result<(), GuestError> {
        let state = self.world.with_quietly(&self.id, |fake| fake.guest.borrow().clone());
        if state == GuestState::Ready { Ok(()) } else { Err(GuestError::NotReady(state)) }
    }

    /// Asks about a main process until the answer is something.
    async fn ask<T>(&self, name: &str, question: impl Fn(&Main) -> Option<T>) -> Result<T, GuestError> {
        let mut changed = self.world.changed.subscribe();
        loop {
            let answer = self.world.with_quietly(&self.id, |fake| {
                if !fake.live {
                    return Some(Err(GuestError::Stopped));
                }
                match fake.mains.get(name) {
                    Some(main) => question(main).map(Ok),
                    None => Some(Err(GuestError::MainLost {
                        name: name.to_owned(),
                        why: "it was never started".to_owned(),
                    })),
                }
            });
            if let Some(answer) = answer {
                return answer;
            }
            if changed.changed().await.is_err() {
                return Err(GuestError::Stopped);
            }
        }
    }
}

#[async_trait]
impl Link for FakeLink {
    fn ready(&self) -> watch::Receiver<GuestState> {
        self.world.with_quietly(&self.id, |fake| fake.guest.subscribe())
    }

    async fn exec(&self, exec: Exec) -> Result<ExecSession, GuestError> {
        self.check_ready()?;
        let script = (self.world.script(&self.id).exec)(&exec);
        self.world.with(&self.id, |fake| fake.commands.push(exec.command.clone()));
        let (stdin, stdin_theirs) = tokio::io::duplex(64 << 10);
        let (stdout, stdout_theirs) = tokio::io::duplex(64 << 10);
        let (stderr, stderr_theirs) = tokio::io::duplex(64 << 10);
        let (control, carrier) = ExecCarrier::pair();
        tokio::spawn(play(script, stdin_theirs, stdout_theirs, stderr_theirs, carrier));
        Ok(ExecSession {
            stdin: exec.stdin.then(|| Box::new(stdin) as _),
            stdout: Box::new(stdout),
            stderr: Box::new(stderr),
            control,
        })
    }

    async fn write_file(&self, path: &str, _mode: u32, bytes: &[u8]) -> Result<(), GuestError> {
        self.check_ready()?;
        self.world.with(&self.id, |fake| fake.files.insert(path.to_owned(), bytes.to_vec()));
        Ok(())
    }

    async fn read_file(&self, path: &str) -> Result<Vec<u8>, GuestError> {
        self.check_ready()?;
        self.world.with_quietly(&self.id, |fake| fake.files.get(path).cloned()).ok_or_else(|| GuestError::Refused {
            what: format!("to read {path}"),
            why: "No such file or directory".to_owned(),
        })
    }

    async fn forward(&self, _port: u16) -> Result<Box<dyn Duplex>, GuestError> {
        self.check_ready()?;
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        tokio::spawn(async move {
            let (mut read, mut write) = tokio::io::split(theirs);
            tokio::io::copy(&mut read, &mut write).await.ok();
        });
        Ok(Box::new(ours))
    }

    async fn main_start(&self, name: &str, command: &MainCommand) -> Result<Started, GuestError> {
        self.check_ready()?;
        let script = self.world.script(&self.id).main;
        {
            let mut inner = self.world.lock();
            let fake = inner.machines.entry(self.id.clone()).or_default();
            if fake.mains.contains_key(name) {
                return Ok(Started::Before);
            }
            let output =
                script.output.iter().map(|(stream, text)| (*stream, bytes::Bytes::from(text.clone()))).collect();
            let main = Main { command: command.clone(), output, exit: None, ignores_term: script.ignores_term };
            fake.mains.insert(name.to_owned(), main);
            inner.events.push(Event::MainStarted(self.id.clone(), name.to_owned()));
        }
        self.world.bump();
        if let Some((delay, status)) = script.exit {
            let (id, name) = (self.id.clone(), name.to_owned());
            self.world.later(delay, move |world| world.main_exit(&id, &name, status));
        }
        Ok(Started::Now)
    }

    fn main_follow(self: Arc<Self>, name: &str, from: Offset) -> BoxStream<'static, Result<OutputChunk, GuestError>> {
        let name = name.to_owned();
        let state = Some((self, name, from));
        futures::stream::unfold(state, async |state| {
            let (link, name, from) = state?;
            let next = link
                .ask(&name, |main| match piece_after(&main.output, from) {
                    Some(piece) => Some(Some(piece)),
                    None => main.exit.as_ref().map(|_| None),
                })
                .await;
            match next {
                Ok(Some(piece)) => {
                    let from = piece.next;
                    Some((Ok(piece), Some((link, name, from))))
                }
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
        .boxed()
    }

    async fn main_wait(&self, name: &str) -> Result<ExitStatus, GuestError> {
        self.ask(name, |main| main.exit.clone()).await
    }

    async fn main_input(&self, name: &str, _last: bool) -> Result<ExecSession, GuestError> {
        self.ask(name, |main| main.command.stdin.then_some(())).await?;
        let (stdin, mut theirs) = tokio::io::duplex(64 << 10);
        let (control, carrier) = ExecCarrier::pair();
        tokio::spawn(async move {
            tokio::io::copy(&mut theirs, &mut tokio::io::sink()).await.ok();
            carrier.finish(Ok(ExitStatus::Code(0)));
        });
        let nothing = || Box::new(tokio::io::empty()) as _;
        Ok(ExecSession { stdin: Some(Box::new(stdin)), stdout: nothing(), stderr: nothing(), control })
    }

    async fn main_signal(&self, name: &str, signal: Signal) -> Result<(), GuestError> {
        let ignored = self.ask(name, |main| Some(main.ignores_term && signal != Signal::Kill)).await?;
        if !ignored {
            self.world.main_exit(&self.id, name, ExitStatus::Code(128 + signal.number()));
        }
        Ok(())
    }
}

/// The first piece of output that lies beyond `from`.
fn piece_after(output: &[(StdStream, bytes::Bytes)], from: Offset) -> Option<OutputChunk> {
    let mut at = Offset::default();
    for (stream, bytes) in output {
        let end = at.after(*stream, bytes.len());
        let (start, end_here, wanted) = match stream {
            StdStream::Stdout => (at.stdout, end.stdout, from.stdout),
            StdStream::Stderr => (at.stderr, end.stderr, from.stderr),
        };
        if end_here > wanted {
            let skip = usize::try_from(wanted.saturating_sub(start)).unwrap_or(usize::MAX).min(bytes.len());
            let bytes = bytes.slice(skip..);
            return Some(OutputChunk { next: from.after(*stream, bytes.len()), stream: *stream, bytes });
        }
        at = end;
    }
    None
}

async fn play(
    script: ExecScript,
    mut stdin: tokio::io::DuplexStream,
    mut stdout: tokio::io::DuplexStream,
    mut stderr: tokio::io::DuplexStream,
    mut carrier: ExecCarrier,
) {
    stdout.write_all(script.stdout.as_bytes()).await.ok();
    stderr.write_all(script.stderr.as_bytes()).await.ok();
    if script.cat {
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = stdin.read(&mut buffer).await {
            if stdout.write_all(&buffer[..read]).await.is_err() {
                break;
            }
        }
    }
    let mut status = script.status;
    if script.hangs {
        while let Some(request) = carrier.requests.recv().await {
            if let Request::Signal(signal) = request {
                status = ExitStatus::Signal(signal);
                break;
            }
        }
    }
    drop((stdout, stderr));
    carrier.finish(Ok(status));
}
