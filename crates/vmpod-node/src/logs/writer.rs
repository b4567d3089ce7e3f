//! The writing end of a log.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use tokio::sync::watch;

use super::{
    files,
    record::{self, MAX_CONTENT, Position, Record, Stream},
};

/// When a file is rotated, and how many are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// A file this long (bytes) is rotated before the next record.
    pub file_bytes: u64,
    /// Files kept, the current one included; at least 1.
    pub files: usize,
}

impl Default for Limits {
    /// The kubelet's `containerLogMaxSize` and `containerLogMaxFiles`.
    fn default() -> Self {
        Self { file_bytes: 10 * 1024 * 1024, files: 5 }
    }
}

/// Why a log could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// An operation on a log file failed.
    #[error("could not {verb} log file {}", path.display())]
    File {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl LogError {
    pub(super) fn file(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { verb, path, source }
    }
}

/// What a follower waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes appended since this writer was opened, over all files.
    pub bytes: u64,
    /// Nothing will be appended any more.
    pub ended: bool,
}

/// Bytes of one output that don't make a line yet; never more than [`MAX_CONTENT`].
#[derive(Clone, Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    /// Place after the last byte of this output that was seen.
    consumed: u64,
}

/// Appends a process's output to a log, exactly once over any number of crashes.
///
/// Each output is a sequence of bytes that are numbered from zero. After [`open`](Self::open), read both
/// from [`position`](Self::position) or any earlier place; what is in the log already is skipped.
///
/// Calls block only for writes to the page cache.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: File,
    /// Length of `file`.
    len: u64,
    limits: Limits,
    written: Position,
    stdout: Pending,
    stderr: Pending,
    progress: watch::Sender<Progress>,
}

impl Writer {
    /// Opens or creates the log at `path` (0600, its directory 0700), cutting off a torn last line.
    pub fn open(path: &Path, limits: Limits) -> Result<Self, LogError> {
        if let Some(directory) = path.parent() {
            let mut builder = fs::DirBuilder::new();
            std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
            builder.recursive(true).create(directory).map_err(LogError::file("make the directory of", path))?;
        }
        // A rotation that was cut short leaves an empty file under this name.
        match fs::remove_file(files::beside(path, NEW)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(LogError::file("clear a half-made", path)(error));
            }
            _ => {}
        }
        let file = open_append(path, false).map_err(LogError::file("open", path))?;
        let torn = file.metadata().map_err(LogError::file("inspect", path))?.len();
        let len = files::last_newline(&file, torn).map_err(LogError::file("read", path))?;
        if len < torn {
            file.set_len(len).map_err(LogError::file("cut the torn last line of", path))?;
        }
        let mut written = last_position(&file, len).map_err(LogError::file("read", path))?;
        if written.is_none() {
            let older = files::rotated(path).map_err(LogError::file("list the rotated files of", path))?;
            for (_, path) in older.iter().rev() {
                let file = File::open(path).map_err(LogError::file("open", path))?;
                let len = file.metadata().map_err(LogError::file("inspect", path))?.len();
                let len = files::last_newline(&file, len).map_err(LogError::file("read", path))?;
                written = last_position(&file, len).map_err(LogError::file("read", path))?;
                if written.is_some() {
                    break;
                }
            }
        }
        let written = written.unwrap_or_default();
        let pending = |consumed| Pending { bytes: Vec::new(), consumed };
        Ok(Self {
            path: path.to_owned(),
            file,
            len,
            limits,
            written,
            stdout: pending(written.stdout),
            stderr: pending(written.stderr),
            progress: watch::Sender::default(),
        })
    }

    /// How far both outputs are in the log; unfinished lines that wait in memory don't count.
    #[must_use]
    pub fn position(&self) -> Position {
        self.written
    }

    /// What followers in this process wait on. Dropping the writer ends them as well.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// The log's current file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends `bytes` that `stream` put out, which begin at place `start` of that output. A line without its newline
    /// waits for the rest of it; a line too long for one record becomes several.
    ///
    /// On an error nothing was taken, and the same call may be repeated.
    pub fn append(&mut self, start: u64, stream: Stream, bytes: &[u8], now: Timestamp) -> Result<(), LogError> {
        let mut own = self.pending(stream).clone();
        let known = usize::try_from(own.consumed.saturating_sub(start)).unwrap_or(usize::MAX);
        let Some(mut rest) = bytes.get(known..).filter(|rest| !rest.is_empty()) else {
            return Ok(());
        };
        let mut at = start + known as u64;
        let time = record::time_text(now);
        let mut written = self.written;
        let mut out = Vec::with_capacity(bytes.len() + 128);
        while !rest.is_empty() {
            let room = MAX_CONTENT - own.bytes.len();
            let newline = rest.iter().take(room + 1).position(|byte| *byte == b'\n');
            let (content, taken, partial) = match newline {
                Some(newline) => (newline, newline + 1, false),
                None if rest.len() > room => (room, room, true),
                None => {
                    own.bytes.extend_from_slice(rest);
                    at += rest.len() as u64;
                    break;
                }
            };
            own.bytes.extend_from_slice(&rest[..content]);
            at += taken as u64;
            rest = &rest[taken..];
            written.set(stream, at);
            record::encode(&mut out, &time, stream, partial, written, &own.bytes);
            own.bytes.clear();
        }
        own.consumed = at;
        self.commit(&out)?;
        self.written = written;
        *self.pending(stream) = own;
        Ok(())
    }

    /// Writes lines that lack their newline as they are: at the end, or when a prompt should be seen.
    pub fn flush(&mut self, now: Timestamp) -> Result<(), LogError> {
        let time = record::time_text(now);
        for stream in [Stream::Stdout, Stream::Stderr] {
            let own = self.pending(stream).clone();
            if own.bytes.is_empty() {
                continue;
            }
            let mut written = self.written;
            written.set(stream, own.consumed);
            let mut out = Vec::with_capacity(own.bytes.len() + 128);
            record::encode(&mut out, &time, stream, true, written, &own.bytes);
            self.commit(&out)?;
            self.written = written;
            self.pending(stream).bytes.clear();
        }
        Ok(())
    }

    /// Flushes, and tells followers that this was all.
    pub fn finish(&mut self, now: Timestamp) -> Result<(), LogError> {
        let flushed = self.flush(now);
        self.progress.send_modify(|progress| progress.ended = true);
        flushed
    }

    fn pending(&mut self, stream: Stream) -> &mut Pending {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }

    /// Writes whole records, or none of them.
    fn commit(&mut self, records: &[u8]) -> Result<(), LogError> {
        if records.is_empty() {
            return Ok(());
        }
        if self.len >= self.limits.file_bytes {
            self.rotate()?;
        }
        if let Err(error) = self.file.write_all(records) {
            // Should cutting fail as well, the next open does it; until then nothing is appended after it.
            return match self.file.set_len(self.len) {
                Ok(()) => Err(LogError::file("append to", &self.path)(error)),
                Err(error) => Err(LogError::file("take back a failed append to", &self.path)(error)),
            };
        }
        self.len += records.len() as u64;
        self.progress.send_modify(|progress| progress.bytes += records.len() as u64);
        Ok(())
    }

    fn rotate(&mut self) -> Result<(), LogError> {
        let list = LogError::file("list the rotated files of", &self.path);
        let older = files::rotated(&self.path).map_err(list)?;
        let number = older.last().map_or(1, |(number, _)| number + 1);
        let new = files::beside(&self.path, NEW);
        let rotate = || LogError::file("rotate", &self.path);
        let file = open_append(&new, true).map_err(rotate())?;
        fs::rename(&self.path, files::rotated_path(&self.path, number)).map_err(rotate())?;
        fs::rename(&new, &self.path).map_err(rotate())?;
        self.file = file;
        self.len = 0;
        let excess = (older.len() + 2).saturating_sub(self.limits.files.max(1));
        let newest = files::rotated_path(&self.path, number);
        let removable = older.iter().map(|(_, path)| path).chain([&newest]);
        for path in removable.take(excess) {
            fs::remove_file(path).map_err(LogError::file("remove the oldest", path))?;
        }
        Ok(())
    }
}

/// Suffix of a file that is about to become the current one.
const NEW: &str = ".new";

fn open_append(path: &Path, fresh: bool) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).create_new(fresh).mode(0o600).open(path)
}

/// The position that the last readable record of the first `len` bytes holds.
fn last_position(file: &File, len: u64) -> io::Result<Option<Position>> {
    let mut found = None;
    files::Backward::new(file, len).each(|line, _| {
        found = Record::parse(line).and_then(|record| record.position);
        found.is_none()
    })?;
    Ok(found)
}

#[cfg(test)]
mod tests;
