//! The agent's end of a helper's socket.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

use super::protocol::{Answer, Command, Request, SOCKET, line};
use crate::directory::MachineDir;
use crate::hypervisor::HypervisorError;

/// How long an answer may take. Pausing a guest waits for its devices.
const LIMIT: Duration = Duration::from_secs(30);

type Pending = HashMap<u64, oneshot::Sender<Answer>>;

/// A connection to one helper.
pub(super) struct Control {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    /// None when nobody will answer any more.
    pending: Arc<Mutex<Option<Pending>>>,
    next: AtomicU64,
    open: watch::Receiver<bool>,
    peer: Option<u32>,
    _reader: AbortOnDropHandle<()>,
}

impl Control {
    /// Connects to the helper of a machine.
    pub(super) async fn connect(dir: &MachineDir) -> Result<Self, HypervisorError> {
        let stream = super::connect(dir, SOCKET).await?;
        let peer = stream.peer_cred().ok().and_then(|cred| cred.pid()).and_then(|pid| u32::try_from(pid).ok());
        let (reader, writer) = stream.into_split();
        let pending = Arc::new(Mutex::new(Some(Pending::new())));
        let theirs = Arc::clone(&pending);
        let (open_tx, open) = watch::channel(true);
        let reader = tokio::spawn(async move {
            let mut lines = BufReader::new(reader).lines();
            while let Ok(Some(text)) = lines.next_line().await {
                let Ok(answer) = serde_json::from_str::<Answer>(&text) else { continue };
                let waits = lock(&theirs).as_mut().and_then(|pending| pending.remove(&answer.id));
                if let Some(waits) = waits {
                    waits.send(answer).ok();
                }
            }
            // Whoever still waits gets "closed": dropping the senders says so.
            lock(&theirs).take();
            open_tx.send_replace(false);
        });
        Ok(Self {
            writer: tokio::sync::Mutex::new(writer),
            pending,
            next: AtomicU64::new(0),
            open,
            peer,
            _reader: AbortOnDropHandle::new(reader),
        })
    }

    /// Says something and waits for the answer.
    pub(super) async fn ask(&self, command: Command) -> Result<Answer, HypervisorError> {
        let closed = || HypervisorError::Unresponsive { why: "the machine's helper closed its socket".to_owned() };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        lock(&self.pending).as_mut().ok_or_else(closed)?.insert(id, sender);
        let bytes =
            line(&Request { id, command }).map_err(|error| HypervisorError::Unresponsive { why: error.to_string() })?;
        let exchange = async {
            self.writer.lock().await.write_all(&bytes).await.map_err(|_| closed())?;
            answer.await.map_err(|_| closed())
        };
        match tokio::time::timeout(LIMIT, exchange).await {
            Ok(Ok(Answer { error: Some(why), .. })) => {
                Err(HypervisorError::Refused { command: format!("{command:?}").to_lowercase(), why })
            }
            Ok(answer) => answer,
            Err(_) => {
                if let Some(pending) = lock(&self.pending).as_mut() {
                    pending.remove(&id);
                }
                Err(HypervisorError::Unresponsive { why: format!("no answer to {command:?}") })
            }
        }
    }

    /// Waits until the helper has let go of its end.
    pub(super) async fn closed(&self) {
        // An error says that the reader is gone, which it is only then.
        self.open.clone().wait_for(|open| !open).await.ok();
    }

    /// The process at the other end, as the kernel knows it.
    pub(super) fn peer(&self) -> Option<u32> {
        self.peer
    }
}

fn lock(pending: &Mutex<Option<Pending>>) -> std::sync::MutexGuard<'_, Option<Pending>> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}
