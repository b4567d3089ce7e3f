//! Waiting for a file that another process writes.

use std::{io, path::Path};

/// Wakes when something in a directory changes: a file grows, appears or is renamed.
///
/// Make it before looking at the file, so that no change falls between the two.
#[derive(Debug)]
pub struct FileWatch {
    #[cfg(target_os = "linux")]
    events: tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>,
    #[cfg(not(target_os = "linux"))]
    ticks: tokio::time::Interval,
}

#[cfg(target_os = "linux")]
impl FileWatch {
    /// Watches the directory of `file`.
    pub fn new(file: &Path) -> io::Result<Self> {
        use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
        let directory = file.parent().filter(|path| !path.as_os_str().is_empty());
        let events = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let interest = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::CLOSE_WRITE;
        inotify::add_watch(&events, directory.unwrap_or(Path::new(".")), interest)?;
        #[expect(deprecated, reason = "unsound only for types that don't own their descriptor; this one does")]
        Ok(Self { events: tokio::io::unix::AsyncFd::new(events)? })
    }

    /// Waits for the next change. May wake without one that matters: look again.
    pub async fn changed(&mut self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        loop {
            let mut ready = self.events.readable().await?;
            match ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut buffer)?)) {
                Ok(read) => return read.map(|_| ()),
                Err(_would_block) => {}
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
impl FileWatch {
    /// Watches the directory of `file`. Without inotify this is a look twice a second.
    pub fn new(_file: &Path) -> io::Result<Self> {
        Ok(Self { ticks: tokio::time::interval(std::time::Duration::from_millis(500)) })
    }

    /// Waits for the next change. May wake without one that matters: look again.
    pub async fn changed(&mut self) -> io::Result<()> {
        self.ticks.tick().await;
        Ok(())
    }
}
