//! One QEMU process: commands to it, its end, and what it uses.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::process::Child;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::LOG;
use super::args::disk_node;
use super::qmp::Qmp;
use crate::directory::MachineDir;
use crate::hypervisor::{self, DiskStats, HypervisorError, Process, Stats};
use crate::lifecycle::{Exit, ExitCause};
use crate::pid::{Handle, usage};
use crate::spec::Spec;

/// A QEMU that was proved to be the machine's.
pub(super) struct QemuProcess {
    qmp: Arc<Qmp>,
    handle: Arc<Handle>,
    killed: Arc<AtomicBool>,
    exit: watch::Receiver<Option<Exit>>,
    disks: usize,
    dir: MachineDir,
    /// Ends with us, and lets go of the control socket then.
    _watcher: AbortOnDropHandle<()>,
}

impl QemuProcess {
    /// Proves that the process is the machine's and begins to watch it.
    pub(super) async fn new(
        spec: &Spec,
        dir: &MachineDir,
        qmp: Qmp,
        child: Option<Child>,
    ) -> Result<Self, HypervisorError> {
        let answer = qmp.execute("query-uuid", json!({})).await?;
        let uuid = answer.get("UUID").and_then(Value::as_str).unwrap_or_default();
        if uuid != spec.id.uuid().to_string() {
            return Err(HypervisorError::Unresponsive {
                why: format!("it says that it is {uuid}, and not machine {}", spec.id),
            });
        }
        let pid = qmp.peer().ok_or_else(|| HypervisorError::Unresponsive {
            why: "the kernel doesn't say who is at its control socket".to_owned(),
        })?;
        let handle = Arc::new(Handle::open(pid)?);
        let qmp = Arc::new(qmp);
        let killed = Arc::new(AtomicBool::new(false));
        let (exit_tx, exit) = watch::channel(None);
        let (log, their_handle, their_qmp, their_killed) =
            (dir.file(LOG), Arc::clone(&handle), Arc::clone(&qmp), Arc::clone(&killed));
        let watcher = tokio::spawn(async move {
            their_handle.gone().await;
            let status = match child {
                // Ours to bury.
                Some(mut child) => child.wait().await.ok(),
                None => None,
            };
            let reason = their_qmp.shutdown_reason().await;
            let at = Timestamp::now();
            let exit = if their_killed.load(Ordering::SeqCst) {
                Exit { cause: ExitCause::Killed, at, detail: None }
            } else if let Some(reason) = reason {
                Exit { cause: cause_of_reason(&reason), at, detail: None }
            } else {
                let mut exit = exit_from_log(&log, at);
                if exit.cause == ExitCause::Unseen {
                    // We did see it, and it said nothing: a crash, or a signal that can't be caught.
                    use std::os::unix::process::ExitStatusExt;
                    let killed = status.is_none_or(|status| status.signal() == Some(9));
                    exit.cause = if killed { ExitCause::Killed } else { ExitCause::HypervisorFailed };
                    exit.detail = exit.detail.or_else(|| status.map(|status| status.to_string()));
                }
                exit
            };
            exit_tx.send_replace(Some(exit));
        });
        let watcher = AbortOnDropHandle::new(watcher);
        Ok(Self { qmp, handle, killed, exit, disks: spec.disks.len(), dir: dir.clone(), _watcher: watcher })
    }
}

#[async_trait]
impl Process for QemuProcess {
    async fn power_down(&self) -> Result<(), HypervisorError> {
        self.qmp.execute("system_powerdown", json!({})).await.map(drop)
    }

    async fn kill(&self) -> Result<(), HypervisorError> {
        self.killed.store(true, Ordering::SeqCst);
        self.handle.kill()
    }

    async fn pause(&self) -> Result<(), HypervisorError> {
        self.qmp.execute("stop", json!({})).await.map(drop)
    }

    async fn resume(&self) -> Result<(), HypervisorError> {
        self.qmp.execute("cont", json!({})).await.map(drop)
    }

    async fn exited(&self) -> Exit {
        hypervisor::exited(self.exit.clone()).await
    }

    async fn stats(&self) -> Result<Stats, HypervisorError> {
        let answer = self.qmp.execute("query-blockstats", json!({})).await?;
        let (cpu, rss) = usage(self.handle.pid)?;
        let disks = (0..self.disks).map(|index| disk_stats(&answer, &disk_node(index))).collect();
        Ok(Stats { cpu, rss, disks })
    }

    async fn snapshot(&self) -> Result<(), HypervisorError> {
        super::snapshot::save(&self.dir, &self.qmp, self.handle.pid).await
    }

    fn pid(&self) -> Option<u32> {
        Some(self.handle.pid)
    }
}

/// The counters of the disk with this node in an answer to `query-blockstats`.
fn disk_stats(answer: &Value, node: &str) -> DiskStats {
    let all = answer.as_array().map(Vec::as_slice).unwrap_or_default();
    let disk = all.iter().find(|disk| disk.get("node-name").and_then(Value::as_str) == Some(node));
    let count = |name: &str| disk.and_then(|disk| disk.get("stats")?.get(name)?.as_u64()).unwrap_or(0);
    DiskStats {
        read_bytes: count("rd_bytes"),
        written_bytes: count("wr_bytes"),
        reads: count("rd_operations"),
        writes: count("wr_operations"),
    }
}

/// QEMU's own words for why it ends (`ShutdownCause` in qapi/run-state.json).
fn cause_of_reason(reason: &str) -> ExitCause {
    match reason {
        "guest-shutdown" | "guest-reset" => ExitCause::GuestShutdown,
        "guest-panic" => ExitCause::GuestPanic,
        "host-signal" | "host-qmp-quit" | "host-ui" => ExitCause::Killed,
        _ => ExitCause::HypervisorFailed,
    }
}

/// What a process's log says about its end. The numbers are the order of `ShutdownCause` in qapi/run-state.json, as the
/// trace event `qemu_system_shutdown_request` prints them.
pub(super) fn exit_from_log(log: &Path, at: Timestamp) -> Exit {
    let text = std::fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let reason = text.lines().rev().find_map(|line| {
        let (_, reason) = line.split_once("qemu_system_shutdown_request reason=")?;
        reason.trim().parse::<u32>().ok()
    });
    let last =
        text.lines().rev().find(|line| !line.trim().is_empty() && !line.contains("qemu_system_shutdown_request"));
    let cause = match reason {
        Some(1 | 9..) => ExitCause::HypervisorFailed,
        Some(2..=5) => ExitCause::Killed,
        Some(6 | 7) => ExitCause::GuestShutdown,
        Some(8) => ExitCause::GuestPanic,
        Some(0) | None => ExitCause::Unseen,
    };
    Exit { cause, at, detail: last.map(ToOwned::to_owned) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_is_the_last_one_in_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("process.log");
        let cause = |text: &str| {
            std::fs::write(&log, text).unwrap();
            exit_from_log(&log, Timestamp::UNIX_EPOCH).cause
        };
        assert_eq!(cause(""), ExitCause::Unseen);
        assert_eq!(cause("some warning\n"), ExitCause::Unseen);
        assert_eq!(cause("qemu_system_shutdown_request reason=6\n"), ExitCause::GuestShutdown);
        assert_eq!(cause("1@5.6:qemu_system_shutdown_request reason=4\nterminating\n"), ExitCause::Killed);
        assert_eq!(
            cause("qemu_system_shutdown_request reason=6\nqemu_system_shutdown_request reason=8\n"),
            ExitCause::GuestPanic
        );
        std::fs::remove_file(&log).unwrap();
        assert_eq!(exit_from_log(&log, Timestamp::UNIX_EPOCH).cause, ExitCause::Unseen);
    }

    #[test]
    fn counters_are_found_by_the_disk() {
        let answer = json!([
            {"node-name": "seed", "stats": {"rd_bytes": 1}},
            {"node-name": "disk0", "stats": {"rd_bytes": 512, "wr_bytes": 1024, "rd_operations": 1, "wr_operations": 2}},
        ]);
        let stats = disk_stats(&answer, "disk0");
        assert_eq!(stats, DiskStats { read_bytes: 512, written_bytes: 1024, reads: 1, writes: 2 });
        assert_eq!(disk_stats(&answer, "disk1"), DiskStats::default());
    }
}
