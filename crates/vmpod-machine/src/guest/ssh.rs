//! A guest over SSH.

use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::BoxStream;
use tokio::sync::watch;

use super::main_process::{MainCommand, Offset, OutputChunk, Started};
use super::{Duplex, Exec, ExecSession, ExitStatus, GuestError, GuestState, Link, Signal, Waiting};
use crate::directory::MachineDir;
use crate::lifecycle::State;
use crate::spec::Spec;

pub(crate) struct SshLink {
    ready: watch::Sender<GuestState>,
}

impl SshLink {
    pub(crate) fn start(
        _spec: &Spec,
        _dir: &MachineDir,
        _state: watch::Receiver<State>,
    ) -> (Arc<Self>, tokio::task::AbortHandle) {
        let link = Arc::new(Self { ready: watch::Sender::new(GuestState::Waiting(Waiting::Machine)) });
        (link, tokio::spawn(async {}).abort_handle())
    }

    fn later<T>(&self) -> Result<T, GuestError> {
        Err(GuestError::NotReady(self.ready.borrow().clone()))
    }
}

#[async_trait]
impl Link for SshLink {
    fn ready(&self) -> watch::Receiver<GuestState> {
        self.ready.subscribe()
    }
    async fn exec(&self, _exec: Exec) -> Result<ExecSession, GuestError> {
        self.later()
    }
    async fn write_file(&self, _path: &str, _mode: u32, _bytes: &[u8]) -> Result<(), GuestError> {
        self.later()
    }
    async fn read_file(&self, _path: &str) -> Result<Vec<u8>, GuestError> {
        self.later()
    }
    async fn forward(&self, _port: u16) -> Result<Box<dyn Duplex>, GuestError> {
        self.later()
    }
    async fn main_start(&self, _name: &str, _command: &MainCommand) -> Result<Started, GuestError> {
        self.later()
    }
    fn main_follow(self: Arc<Self>, _name: &str, _from: Offset) -> BoxStream<'static, Result<OutputChunk, GuestError>> {
        Box::pin(futures::stream::iter([self.later()]))
    }
    async fn main_wait(&self, _name: &str) -> Result<ExitStatus, GuestError> {
        self.later()
    }
    async fn main_signal(&self, _name: &str, _signal: Signal) -> Result<(), GuestError> {
        self.later()
    }
}
