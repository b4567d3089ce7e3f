//! Who has a machine.
//!
//! Whoever starts a machine's process first takes an exclusive `flock` on the file `lock` in the machine's directory, and hands
//! that open file to the process as standard input. The kernel keeps the lock until the last holder is gone.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::FlockOperation;

use crate::directory::MachineDir;
use crate::hypervisor::HypervisorError;
use crate::pid::Handle;

/// The lock's file.
pub(crate) const LOCK: &str = "lock";
/// A file on which a process that helps us has a lock of the kind that tells its owner.
pub(crate) const OWNER: &str = "owner";
/// How long a killed process may take to be gone.
const GONE: Duration = Duration::from_secs(15);

/// What became of an attempt to take a machine's lock.
pub(crate) enum Lock {
    /// Nobody held it; we do now, until the file is closed.
    Taken(File),
    /// Somebody holds it.
    Held,
    /// There is no machine, and so no lock.
    Absent,
}

/// Takes the machine's lock, if nobody has it.
pub(crate) fn take_lock(dir: &MachineDir) -> Result<Lock, HypervisorError> {
    take(&dir.file(LOCK))
}

/// Takes the lock on a file, if nobody has it.
pub(crate) fn take(path: &Path) -> Result<Lock, HypervisorError> {
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    let lock = match open {
        Ok(lock) => lock,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Lock::Absent),
        Err(source) => return Err(HypervisorError::Io { action: format!("can't open {}", path.display()), source }),
    };
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Lock::Taken(lock)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(Lock::Held),
        Err(error) => {
            Err(HypervisorError::Io { action: format!("can't lock {}", path.display()), source: error.into() })
        }
    }
}

/// The process that has the machine: by its standard input, where the kernel shows that, else by the lock that tells its owner.
pub(crate) fn holder(dir: &MachineDir) -> Option<u32> {
    by_standard_input(&dir.file(LOCK)).or_else(|| owner(&dir.file(OWNER)))
}

/// The process that has a lock's file as its standard input.
pub(crate) fn by_standard_input(lock: &Path) -> Option<u32> {
    let wanted = identity(lock)?;
    std::fs::read_dir("/proc").ok()?.filter_map(Result::ok).find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        (identity(&entry.path().join("fd/0"))? == wanted).then_some(pid)
    })
}

/// Takes the lock that tells who has it, for as long as this process lives or the file is open.
///
/// It is one of POSIX: closing any other descriptor of the same file in this process gives it up.
pub(crate) fn own(path: &Path) -> Result<File, HypervisorError> {
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    let file = open.map_err(HypervisorError::io(format!("can't open {}", path.display())))?;
    rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|error| HypervisorError::io(format!("can't lock {}", path.display()))(error.into()))?;
    Ok(file)
}

/// Which process has the lock of [`own`], by the kernel's word (`F_GETLK`, fcntl(2)).
fn owner(path: &Path) -> Option<u32> {
    use rustix::process::{Flock, FlockType, fcntl_getlk};
    // Opened for writing, because a lock for writing is asked about.
    let file = OpenOptions::new().read(true).write(true).open(path).ok()?;
    let held = fcntl_getlk(&file, &Flock::from(FlockType::WriteLock)).ok()??;
    u32::try_from(held.pid?.as_raw_nonzero().get()).ok()
}

/// Takes the machine's lock, to start a process; an error tells who has it.
pub(crate) fn take_to_start(dir: &MachineDir) -> Result<File, HypervisorError> {
    take_from_nobody(&dir.file(LOCK), || holder(dir))
}

/// The same for any lock; `holder` tells who has it.
pub(crate) fn take_from_nobody(lock: &Path, holder: impl Fn() -> Option<u32>) -> Result<File, HypervisorError> {
    match take(lock)? {
        Lock::Taken(lock) => Ok(lock),
        Lock::Held | Lock::Absent => {
            let holder = holder().map_or_else(|| "unknown".to_owned(), |pid| format!("process {pid}"));
            Err(HypervisorError::Occupied { holder })
        }
    }
}

/// Kills whatever has the machine, and returns when nobody has it. One whose holder can't be found within `limit` is an error: between a
/// fork and its exec, and until a helper has said who it is, nobody shows.
pub(crate) async fn clear(dir: &MachineDir, limit: Duration) -> Result<(), HypervisorError> {
    clear_file(&dir.file(LOCK), limit, || holder(dir)).await
}

/// The same for any lock; `holder` tells who has it.
pub(crate) async fn clear_file(
    lock: &Path,
    limit: Duration,
    holder: impl Fn() -> Option<u32>,
) -> Result<(), HypervisorError> {
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        match take(lock)? {
            Lock::Absent | Lock::Taken(_) => return Ok(()),
            Lock::Held => {}
        }
        match holder() {
            Some(pid) => kill_holder(pid, &holder).await?,
            None if tokio::time::Instant::now() < deadline => tokio::time::sleep(Duration::from_millis(20)).await,
            None => {
                return Err(HypervisorError::Unresponsive {
                    why: format!("some process holds {} and can't be found", lock.display()),
                });
            }
        }
    }
}

/// What a file is, whatever its name.
pub(crate) fn identity(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Removes a file that may not be there.
pub(crate) fn remove(path: &Path) -> Result<(), HypervisorError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(HypervisorError::Io { action: format!("can't remove {}", path.display()), source })
        }
        _ => Ok(()),
    }
}

/// The last lines of the process's own log, so many at most.
pub(crate) fn last_words(log: &Path, most: usize) -> Option<String> {
    let text = std::fs::read_to_string(log).ok()?;
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines.get(lines.len().saturating_sub(most)..)?.join("; ");
    (!last.is_empty()).then_some(last)
}

/// Kills the process that holds a machine's lock, and waits until it is gone.
async fn kill_holder(pid: u32, holder: &impl Fn() -> Option<u32>) -> Result<(), HypervisorError> {
    let handle = Handle::open(pid)?;
    // Looked at again through a handle that can't come to mean another process.
    if holder() == Some(pid) {
        handle.kill()?;
        if tokio::time::timeout(GONE, handle.gone()).await.is_err() {
            let why = format!("process {pid} was killed and is still there: it may wait for a disk");
            return Err(HypervisorError::Unresponsive { why });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_kernel_tells_which_process_has_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(OWNER);
        assert_eq!(owner(&path), None, "there is no such file");
        // Not by our own call: of this process's own locks the kernel says nothing to itself.
        let script = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()";
        let mut child = Command::new("python3")
            .args(["-c", script])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(owner(&path), Some(child.id()));
        assert!(own(&path).is_err(), "it has an owner");
        drop(child.stdin.take());
        child.wait().unwrap();
        assert_eq!(owner(&path), None);
        own(&path).unwrap();
    }
}
