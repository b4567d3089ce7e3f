//! A process of this host: its end, its death and what it uses.

use std::time::Duration;

use crate::hypervisor::HypervisorError;

/// A process, for good: its number can't be given to another while this is held.
#[cfg(target_os = "linux")]
pub(crate) struct Handle {
    pub(crate) pid: u32,
    fd: tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>,
}

#[cfg(target_os = "linux")]
impl Handle {
    pub(crate) fn open(pid: u32) -> Result<Self, HypervisorError> {
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
    pub(crate) async fn gone(&self) {
        // Readable when the process has ended; an error would mean that the descriptor isn't watched any more.
        self.fd.readable().await.ok();
    }

    pub(crate) fn kill(&self) -> Result<(), HypervisorError> {
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
pub(crate) struct Handle {
    pub(crate) pid: u32,
}

#[cfg(not(target_os = "linux"))]
impl Handle {
    #[expect(clippy::unnecessary_wraps, reason = "as where there are process descriptors")]
    pub(crate) fn open(pid: u32) -> Result<Self, HypervisorError> {
        Ok(Self { pid })
    }

    fn raw(&self) -> Option<rustix::process::Pid> {
        i32::try_from(self.pid).ok().and_then(rustix::process::Pid::from_raw)
    }

    pub(crate) async fn gone(&self) {
        while self.raw().is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok()) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    pub(crate) fn kill(&self) -> Result<(), HypervisorError> {
        match self.raw().map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL)) {
            None | Some(Ok(()) | Err(rustix::io::Errno::SRCH)) => Ok(()),
            Some(Err(error)) => {
                Err(HypervisorError::Io { action: format!("can't kill process {}", self.pid), source: error.into() })
            }
        }
    }
}

#[cfg(target_os = "linux")]
/// Processor time and resident memory (bytes) of a process, from `/proc` (see `proc_pid_stat(5)`).
pub(crate) fn usage(pid: u32) -> Result<(Duration, u64), HypervisorError> {
    let read = |name: &str| {
        let path = format!("/proc/{pid}/{name}");
        std::fs::read_to_string(&path).map_err(HypervisorError::io(format!("can't read {path}")))
    };
    let (stat, status) = (read("stat")?, read("status")?);
    Ok((cpu_time(&stat).unwrap_or_default(), resident(&status).unwrap_or_default()))
}

/// The same, from the kernel's own figures for the process (`proc_pid_rusage`, <libproc.h>).
#[cfg(target_os = "macos")]
#[expect(unsafe_code, reason = "there is no safe call for another process's usage")]
pub(crate) fn usage(pid: u32) -> Result<(Duration, u64), HypervisorError> {
    let failed = HypervisorError::io(format!("can't read what process {pid} uses"));
    let Ok(number) = libc::c_int::try_from(pid) else {
        return Err(failed(std::io::Error::other("no such process number")));
    };
    let mut info = std::mem::MaybeUninit::<libc::rusage_info_v4>::zeroed();
    // SAFETY: the buffer is of the flavour that is named, and is all zeros, which every field of it may be.
    let result = unsafe { libc::proc_pid_rusage(number, libc::RUSAGE_INFO_V4, info.as_mut_ptr().cast()) };
    if result != 0 {
        return Err(failed(std::io::Error::last_os_error()));
    }
    // SAFETY: zeroed above, so all of it is initialised.
    let info = unsafe { info.assume_init() };
    // In units of mach_absolute_time; on Apple silicon 125/3 ns each (mach_timebase_info).
    let nanos = u128::from(info.ri_user_time.saturating_add(info.ri_system_time)) * 125 / 3;
    Ok((Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)), info.ri_resident_size))
}

/// Processor time that a process has used.
pub(crate) fn cpu_used(pid: u32) -> Result<Duration, HypervisorError> {
    Ok(usage(pid)?.0)
}

#[cfg(target_os = "linux")]
fn cpu_time(stat: &str) -> Option<Duration> {
    // The second field is a name in parentheses and may hold anything; fields are counted after the last ')'.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let ticks: u64 = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    // The kernel's tick for user space is 1/100 s on every architecture that we run on.
    Some(Duration::from_millis(ticks.saturating_mul(10)))
}

#[cfg(target_os = "linux")]
fn resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

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
}
