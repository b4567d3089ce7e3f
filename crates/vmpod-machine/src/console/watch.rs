//! Notice of changes to one file.

use std::io;
use std::path::Path;

/// Tells when a file appears or grows.
#[cfg(target_os = "linux")]
pub(crate) struct Watch {
    events: tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>,
    path: std::path::PathBuf,
    on_file: bool,
}

#[cfg(target_os = "linux")]
impl Watch {
    pub(crate) fn new(path: &Path) -> io::Result<Self> {
        use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
        let events = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        // Only for the file's appearance: the directory also holds disks, whose writes are none of our business.
        let directory = path.parent().unwrap_or(Path::new("."));
        inotify::add_watch(&events, directory, WatchFlags::CREATE | WatchFlags::MOVED_TO)?;
        let mut watch = Self { events: crate::readable::watch(events)?, path: path.to_owned(), on_file: false };
        watch.watch_file()?;
        Ok(watch)
    }

    fn watch_file(&mut self) -> io::Result<()> {
        use rustix::fs::inotify::{self, WatchFlags};
        if !self.on_file {
            match inotify::add_watch(self.events.get_ref(), &self.path, WatchFlags::MODIFY) {
                Ok(_) => self.on_file = true,
                // Not there yet.
                Err(rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Waits for a change since the last call. May return when there was none.
    pub(crate) async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut guard = self.events.readable().await?;
            let mut buffer = [0; 4096];
            match rustix::io::read(self.events.get_ref(), &mut buffer) {
                Ok(_) => break,
                Err(rustix::io::Errno::AGAIN) => guard.clear_ready(),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.watch_file()
    }
}

/// Where there is no inotify, a look every tenth of a second.
#[cfg(not(target_os = "linux"))]
pub(crate) struct Watch;

#[cfg(not(target_os = "linux"))]
impl Watch {
    #[expect(clippy::unnecessary_wraps, reason = "as where there is inotify")]
    pub(crate) fn new(_path: &Path) -> io::Result<Self> {
        Ok(Self)
    }

    pub(crate) async fn changed(&mut self) -> io::Result<()> {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        Ok(())
    }
}
