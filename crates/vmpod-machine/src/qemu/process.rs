//! One QEMU process: commands to it, its end, and what it uses.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::process::Child;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::args::disk_node;
use super::qmp::Qmp;
use super::{LOCK, LOG, identity};
use crate::directory::MachineDir;
use crate::hypervisor::{DiskStats, HypervisorError, Process, Stats};
use crate::lifecycle::{Exit, ExitCause};
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
        let mut exit = self.exit.clone();
        loop {
            if let Some(exit) = &*exit.borrow_and_update() {
                return exit.clone();
            }
            if exit.changed().await.is_err() {
                // The task that watches is never cancelled on its own; the agent is ending.
                std::future::pending::<()>().await;
            }
        }
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

/// How long a killed process may take to be gone.
const GONE: Duration = Duration::from_secs(15);

/// Kills the process that holds a machine's lock, and waits until it is gone.
pub(super) async fn kill_holder(pid: u32, dir: &MachineDir) -> Result<(), HypervisorError> {
    let handle = Handle::open(pid)?;
    // Looked at again through a handle that can't come to mean another process.
    let still = identity(Path::new(&format!("/proc/{pid}/fd/0")));
    if still.is_some() && still == identity(&dir.file(LOCK)) {
        handle.kill()?;
        if tokio::time::timeout(GONE, handle.gone()).await.is_err() {
            let why = format!("process {pid} was killed and is still there: it may wait for a disk");
            return Err(HypervisorError::Unresponsive { why });
        }
    }
    Ok(())
}

/// A process, for good: its number can't be given to another while this is held.
#[cfg(target_os = "linux")]
struct Handle {
    pid: u32,
    fd: tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>,
}

#[cfg(target_os = "linux")]
impl Handle {
    fn open(pid: u32) -> Result<Self, HypervisorError> {
        let open = || {
            let raw = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
            let raw = raw.ok_or_else(|| std::io::Error::other("no such process number"))?;
            let fd = rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::NONBLOCK)?;
            crate::readable::watch(fd)
        };
        let fd = open().map_err(HypervisorError::io(format!("can't watch process {pid}")))?;
        Ok(Self { pid, fd })
    }

    /// Waits until it is gone.
    async fn gone(&self) {
        // Readable when the process has ended; an error would mean that the descriptor isn't watched any more.
        self.fd.readable().await.ok();
    }

    fn kill(&self) -> Result<(), HypervisorError> {
        match rustix::process::pidfd_send_signal(self.fd.get_ref(), rustix::process::Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => {
                Err(HypervisorError::Io { action: format!("can't kill process {}", self.pid), source: error.into() })
            }
        }
    }
}

/// Without pidfd there is only the number.
#[cfg(not(target_os = "linux"))]
struct Handle {
    pid: u32,
}

#[cfg(not(target_os = "linux"))]
impl Handle {
    #[expect(clippy::unnecessary_wraps, reason = "as where there are process descriptors")]
    fn open(pid: u32) -> Result<Self, HypervisorError> {
        Ok(Self { pid })
    }

    fn raw(&self) -> Option<rustix::process::Pid> {
        i32::try_from(self.pid).ok().and_then(rustix::process::Pid::from_raw)
    }

    async fn gone(&self) {
        while self.raw().is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok()) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    fn kill(&self) -> Result<(), HypervisorError> {
        match self.raw().map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL)) {
            None | Some(Ok(()) | Err(rustix::io::Errno::SRCH)) => Ok(()),
            Some(Err(error)) => {
                Err(HypervisorError::Io { action: format!("can't kill process {}", self.pid), source: error.into() })
            }
        }
    }
}

/// Processor time and resident memory (bytes) of a process, from `/proc` (see `proc_pid_stat(5)`).
fn usage(pid: u32) -> Result<(Duration, u64), HypervisorError> {
    let read = |name: &str| {
        let path = format!("/proc/{pid}/{name}");
        std::fs::read_to_string(&path).map_err(HypervisorError::io(format!("can't read {path}")))
    };
    let (stat, status) = (read("stat")?, read("status")?);
    Ok((cpu_time(&stat).unwrap_or_default(), resident(&status).unwrap_or_default()))
}

/// Processor time that a process has used.
pub(super) fn cpu_used(pid: u32) -> Result<Duration, HypervisorError> {
    Ok(usage(pid)?.0)
}

fn cpu_time(stat: &str) -> Option<Duration> {
    // The second field is a name in parentheses and may hold anything; fields are counted after the last ')'.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let ticks: u64 = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    // The kernel's tick for user space is 1/100 s on every architecture that we run on.
    Some(Duration::from_millis(ticks.saturating_mul(10)))
}

fn resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
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
    fn names_with_parentheses_do_not_shift_the_fields() {
        let stat = "42 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0";
        assert_eq!(cpu_time(stat), Some(Duration::from_secs(2)));
        assert_eq!(resident("Name:\tx\nVmRSS:\t  1024 kB\n"), Some(1 << 20));
    }

    #[test]
    fn our_own_usage_can_be_read() {
        let (_, rss) = usage(std::process::id()).unwrap();
        assert!(rss > 1 << 20);
        assert!(usage(u32::MAX).is_err());
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
