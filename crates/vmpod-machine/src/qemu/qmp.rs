//! QEMU's control protocol: one JSON object per line, both ways.
//!
//! Source of the protocol: QEMU, `docs/interop/qmp-spec.rst`. A server greets, wants `qmp_capabilities`, then answers
//! commands by their `id` and sends events in between. It serves one client at a time.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

use crate::directory::MachineDir;
use crate::hypervisor::HypervisorError;

/// How long a command may take. All of ours are answered from QEMU's main loop at once.
const LIMIT: Duration = Duration::from_secs(10);

type Pending = HashMap<u64, oneshot::Sender<Result<Value, String>>>;

/// A connection to one QEMU.
pub(super) struct Qmp {
    writer: tokio::sync::Mutex<Box<dyn AsyncWrite + Send + Unpin>>,
    pending: Arc<Mutex<Option<Pending>>>,
    next: AtomicU64,
    shutdown: watch::Receiver<Option<String>>,
    migration: watch::Receiver<Option<String>>,
    peer: Option<u32>,
    /// Ends with us: QEMU speaks to one client at a time, and the next may be waiting.
    _reader: AbortOnDropHandle<()>,
}

/// Connects to a socket in a machine's directory.
pub(super) async fn connect(dir: &MachineDir, socket: &str) -> Result<UnixStream, HypervisorError> {
    let io =
        |source| HypervisorError::Io { action: format!("can't connect to {}", dir.file(socket).display()), source };
    let directory = std::fs::File::open(dir.path()).map_err(io)?;
    // A socket's path may have 108 bytes at most; the one through our own descriptor is always short.
    let path = if cfg!(target_os = "linux") {
        format!("/proc/self/fd/{}/{socket}", directory.as_raw_fd()).into()
    } else {
        dir.file(socket)
    };
    UnixStream::connect(path).await.map_err(io)
}

impl Qmp {
    /// Connects to a socket in a machine's directory and shakes hands.
    pub(super) async fn connect(dir: &MachineDir, socket: &str) -> Result<Self, HypervisorError> {
        let stream = connect(dir, socket).await?;
        let peer = stream.peer_cred().ok().and_then(|cred| cred.pid()).and_then(|pid| u32::try_from(pid).ok());
        let (reader, writer) = stream.into_split();
        let limit = tokio::time::timeout(LIMIT, Self::handshake(reader, writer, peer)).await;
        limit.unwrap_or_else(|_| Err(HypervisorError::Unresponsive { why: "no greeting from QEMU".to_owned() }))
    }

    async fn handshake(
        reader: impl AsyncRead + Send + Unpin + 'static,
        writer: impl AsyncWrite + Send + Unpin + 'static,
        peer: Option<u32>,
    ) -> Result<Self, HypervisorError> {
        let mut lines = BufReader::new(reader).lines();
        let greeting = lines.next_line().await.map_err(HypervisorError::io("can't read QEMU's greeting"))?;
        let greeting: Value = greeting.and_then(|line| serde_json::from_str(&line).ok()).unwrap_or_default();
        if greeting.get("QMP").is_none() {
            return Err(HypervisorError::Unresponsive { why: "what answers isn't QEMU".to_owned() });
        }
        let pending = Arc::new(Mutex::new(Some(Pending::new())));
        let (shutdown_tx, shutdown) = watch::channel(None);
        let (migration_tx, migration) = watch::channel(None);
        let theirs = Arc::clone(&pending);
        let reader = tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                if let Ok(message) = serde_json::from_str::<Value>(&line) {
                    receive(&message, &theirs, &shutdown_tx, &migration_tx);
                }
            }
            // Whoever still waits gets "closed": dropping the senders says so.
            lock(&theirs).take();
        });
        let qmp = Self {
            writer: tokio::sync::Mutex::new(Box::new(writer)),
            pending,
            next: AtomicU64::new(0),
            shutdown,
            migration,
            peer,
            _reader: AbortOnDropHandle::new(reader),
        };
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs a command.
    pub(super) async fn execute(&self, command: &str, arguments: Value) -> Result<Value, HypervisorError> {
        let closed = || HypervisorError::Unresponsive { why: "QEMU closed its control socket".to_owned() };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, result) = oneshot::channel();
        lock(&self.pending).as_mut().ok_or_else(closed)?.insert(id, answer);
        let mut line = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
        line.push('\n');
        // A QEMU that hangs doesn't read, either.
        let exchange = async {
            self.writer.lock().await.write_all(line.as_bytes()).await.map_err(|_| closed())?;
            result.await.map_err(|_| closed())
        };
        match tokio::time::timeout(LIMIT, exchange).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(why))) => Err(HypervisorError::Refused { command: command.to_owned(), why }),
            Ok(Err(error)) => Err(error),
            Err(_) => {
                if let Some(pending) = lock(&self.pending).as_mut() {
                    pending.remove(&id);
                }
                Err(HypervisorError::Unresponsive { why: format!("no answer to {command}") })
            }
        }
    }

    /// The reason of the last SHUTDOWN event, waiting until the connection is closed: QEMU sends the event before that.
    pub(super) async fn shutdown_reason(&self) -> Option<String> {
        let mut shutdown = self.shutdown.clone();
        // Ends when the reader task is gone and with it the sender.
        while shutdown.changed().await.is_ok() {}
        shutdown.borrow().clone()
    }

    /// How the migration ends that was asked for, once it does: `completed`, `failed` or `cancelled`. `None` when the
    /// connection closes before. Wants the capability `events`.
    pub(super) async fn migration_ended(&self) -> Option<String> {
        let mut migration = self.migration.clone();
        let over = |status: &Option<String>| matches!(status.as_deref(), Some("completed" | "failed" | "cancelled"));
        migration.wait_for(over).await.ok().and_then(|status| status.clone())
    }

    /// The process at the other end, as the kernel knows it.
    pub(super) fn peer(&self) -> Option<u32> {
        self.peer
    }
}

fn receive(
    message: &Value,
    pending: &Mutex<Option<Pending>>,
    shutdown: &watch::Sender<Option<String>>,
    migration: &watch::Sender<Option<String>>,
) {
    let datum = |path: &str| message.pointer(path).and_then(Value::as_str).unwrap_or("unknown").to_owned();
    match message.get("event").and_then(Value::as_str) {
        Some("SHUTDOWN") => {
            shutdown.send_replace(Some(datum("/data/reason")));
            return;
        }
        Some("MIGRATION") => {
            migration.send_replace(Some(datum("/data/status")));
            return;
        }
        _ => {}
    }
    let Some(id) = message.get("id").and_then(Value::as_u64) else { return };
    let Some(answer) = lock(pending).as_mut().and_then(|pending| pending.remove(&id)) else { return };
    let result = match (message.get("return"), message.pointer("/error/desc")) {
        (Some(value), _) => Ok(value.clone()),
        (None, why) => Err(why.and_then(Value::as_str).unwrap_or("no reason given").to_owned()),
    };
    answer.send(result).ok();
}

fn lock(pending: &Mutex<Option<Pending>>) -> std::sync::MutexGuard<'_, Option<Pending>> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use tokio::io::DuplexStream;

    use super::*;

    /// A QEMU that answers what it is told to, in another order if it likes.
    async fn server(stream: DuplexStream, answers: impl FnOnce(Vec<Value>) -> Vec<Value> + Send + 'static) {
        let (reader, mut writer) = tokio::io::split(stream);
        let mut lines = BufReader::new(reader).lines();
        writer.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n").await.unwrap();
        let hello: Value = serde_json::from_str(&lines.next_line().await.unwrap().unwrap()).unwrap();
        assert_eq!(hello["execute"], "qmp_capabilities");
        let answer = json!({"return": {}, "id": hello["id"]});
        writer.write_all(format!("{answer}\r\n").as_bytes()).await.unwrap();
        let mut commands = Vec::new();
        for _ in 0..2 {
            commands.push(serde_json::from_str(&lines.next_line().await.unwrap().unwrap()).unwrap());
        }
        for answer in answers(commands) {
            writer.write_all(format!("{answer}\r\n").as_bytes()).await.unwrap();
        }
    }

    async fn connect(answers: impl FnOnce(Vec<Value>) -> Vec<Value> + Send + 'static) -> Qmp {
        let (ours, theirs) = tokio::io::duplex(4096);
        tokio::spawn(server(theirs, answers));
        let (reader, writer) = tokio::io::split(ours);
        Qmp::handshake(reader, writer, None).await.unwrap()
    }

    #[tokio::test]
    async fn answers_find_their_questions() {
        let qmp = connect(|commands| {
            vec![
                json!({"event": "RTC_CHANGE", "data": {}}),
                json!({"error": {"class": "GenericError", "desc": "no such thing"}, "id": commands[1]["id"]}),
                json!({"return": {"UUID": "u"}, "id": commands[0]["id"]}),
            ]
        })
        .await;
        let (first, second) =
            tokio::join!(qmp.execute("query-uuid", json!({})), qmp.execute("device_del", json!({"id": "x"})));
        assert_eq!(first.unwrap(), json!({"UUID": "u"}));
        let error = second.unwrap_err().to_string();
        insta::assert_snapshot!(error, @"device_del was refused: no such thing");
    }

    #[tokio::test]
    async fn a_closed_connection_fails_whoever_waits_and_keeps_the_reason() {
        let qmp =
            connect(|_| vec![json!({"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}})]).await;
        let (first, second) = tokio::join!(qmp.execute("a", json!({})), qmp.execute("b", json!({})));
        assert!(matches!(first, Err(HypervisorError::Unresponsive { .. })));
        assert!(second.is_err());
        assert_eq!(qmp.shutdown_reason().await.as_deref(), Some("guest-shutdown"));
        assert!(qmp.execute("c", json!({})).await.is_err());
    }

    #[tokio::test]
    async fn somebody_else_is_not_qemu() {
        let (ours, mut theirs) = tokio::io::duplex(64);
        theirs.write_all(b"SSH-2.0-x\n").await.unwrap();
        let (reader, writer) = tokio::io::split(ours);
        assert!(Qmp::handshake(reader, writer, None).await.is_err());
    }
}
