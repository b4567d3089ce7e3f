//! How many macOS guests a host runs at the same time.
//!
//! Apple's licence, and the framework with it, allow two on a Mac. A guest's slot is a file that its process has locked: the kernel
//! gives the slot back when the process is gone, and not a moment before, however it ended and whoever looks.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::FlockOperation;

/// macOS guests of a host (macOS's software licence agreement, section 2.B.iii).
pub const MOST: usize = 2;

/// Takes a slot; none when all are taken. It is held for as long as the file is open, in this process or one that has it too.
pub(super) fn take(machines: &Path) -> io::Result<Option<File>> {
    // Beside the directory of all machines, which holds nothing else.
    let dir = machines.with_extension("slots");
    DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
    for number in 0..MOST {
        let path = dir.join(number.to_string());
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    #[test]
    fn there_are_two_and_who_is_gone_has_none() {
        let dir = tempfile::tempdir().unwrap();
        let machines = dir.path().join("machines");
        let take = || super::take(&machines);
        let first = take().unwrap();
        let second = take().unwrap();
        assert!(first.is_some() && second.is_some());
        assert!(take().unwrap().is_none());
        // Still held by a copy, as a process keeps it that got it from another.
        let copy = first.as_ref().unwrap().try_clone().unwrap();
        drop(first);
        assert!(take().unwrap().is_none());
        drop(copy);
        assert!(take().unwrap().is_some());
    }
}
