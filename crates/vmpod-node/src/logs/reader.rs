//! The reading end of a log.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, ErrorKind},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use futures::{Stream as AsyncStream, TryStreamExt as _};

use super::{
    Live, LogError, LogFile, LogOptions, Stream,
    files::{self, After, Open},
    record::{MAX_RECORD, Record},
    watch::FileWatch,
};

/// How much of a file is read at a time.
const BLOCK: usize = 64 * 1024;

/// The log as its reader wants it, from where it is now. Ends at the end of the log, or when following, at the end
/// of the attempt.
pub async fn open(
    log: LogFile,
    options: LogOptions,
) -> Result<impl AsyncStream<Item = Result<Bytes, LogError>> + Send + 'static, LogError> {
    let follow = options.follow;
    let (cursor, log) = blocking(move || Cursor::open(&log.path, options).map(|cursor| (cursor, log))).await?;
    let follower = Follower::new(cursor, log, follow)?;
    Ok(futures::stream::try_unfold(follower, |mut follower| async {
        let next = follower.next().await?;
        Ok(next.map(|bytes| (bytes, follower)))
    }))
}

/// As [`open`], but at the first poll; then the first item may tell that it failed.
pub fn read(log: LogFile, options: LogOptions) -> impl AsyncStream<Item = Result<Bytes, LogError>> + Send + 'static {
    futures::stream::once(open(log, options)).try_flatten()
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LogError> + Send + 'static,
) -> Result<T, LogError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(join) => Err(LogError::file("read", Path::new(""))(io::Error::other(join))),
    }
}

/// A cursor, and what it waits for at the end.
struct Follower {
    cursor: Option<Cursor>,
    /// `None`: the end is the end.
    live: Option<Live>,
    watch: Option<FileWatch>,
}

impl Follower {
    fn new(cursor: Cursor, log: LogFile, follow: bool) -> Result<Self, LogError> {
        let live = log.live.filter(|_| follow);
        let watch = match live {
            Some(Live::Process(_)) => Some(FileWatch::new(&log.path).map_err(LogError::file("watch", &log.path))?),
            _ => None,
        };
        Ok(Self { cursor: Some(cursor), live, watch })
    }

    async fn next(&mut self) -> Result<Option<Bytes>, LogError> {
        loop {
            // Asked before reading: what is written after an end is not, so the read sees all of it.
            let ended = match &mut self.live {
                None => true,
                Some(Live::Writer(progress)) => progress.has_changed().is_err() || progress.borrow_and_update().ended,
                Some(Live::Process(ended)) => ended.has_changed().is_err() || *ended.borrow_and_update(),
            };
            let Some(mut cursor) = self.cursor.take() else { return Ok(None) };
            let (cursor, step) = blocking(move || cursor.step().map(|step| (cursor, step))).await?;
            match step {
                Step::Data(bytes) => {
                    self.cursor = Some(cursor);
                    return Ok(Some(bytes));
                }
                Step::Done => return Ok(None),
                Step::End if ended => return Ok(None),
                Step::End => {
                    let path = cursor.path.clone();
                    self.cursor = Some(cursor);
                    self.wait().await.map_err(LogError::file("watch", &path))?;
                }
            }
        }
    }

    /// Waits for more, or for the end; a sender that is gone counts as the end.
    async fn wait(&mut self) -> io::Result<()> {
        match (&mut self.live, &mut self.watch) {
            (Some(Live::Writer(progress)), _) => {
                progress.changed().await.ok();
                Ok(())
            }
            (Some(Live::Process(ended)), Some(watch)) => {
                tokio::select! {
                    changed = watch.changed() => changed,
                    _ended = ended.changed() => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }
}

/// What a cursor found.
enum Step {
    /// Output, never empty.
    Data(Bytes),
    /// Nothing more for now.
    End,
    /// Nothing more ever: the limit is reached.
    Done,
}

/// A place in a log's files.
struct Cursor {
    path: PathBuf,
    options: LogOptions,
    /// The file that is read, and those after it as far as they are known.
    files: VecDeque<Open>,
    /// Start of the first line of that file that was not given out.
    offset: u64,
    /// Whether the output so far ends with a newline (or is empty).
    fresh_line: bool,
    remaining: Option<u64>,
    /// Bytes of a line that is too long to be a record are being skipped.
    skipping: bool,
}

impl Cursor {
    fn open(path: &Path, options: LogOptions) -> Result<Self, LogError> {
        let mut files = VecDeque::from(files::open_all(path).map_err(LogError::file("open", path))?);
        let mut offset = 0;
        if let Some(lines) = options.tail_lines {
            let (first, start) = tail(&files, lines, options.stream).map_err(LogError::file("read", path))?;
            files.drain(..first);
            offset = start;
        }
        Ok(Self {
            path: path.to_owned(),
            remaining: options.limit_bytes,
            options,
            files,
            offset,
            fresh_line: true,
            skipping: false,
        })
    }

    fn step(&mut self) -> Result<Step, LogError> {
        let mut unsettled = 0;
        loop {
            if self.remaining == Some(0) {
                return Ok(Step::Done);
            }
            let read = || LogError::file("read", &self.path);
            let Some(open) = self.files.front() else {
                self.files = files::open_all(&self.path).map_err(read())?.into();
                if self.files.is_empty() {
                    return Ok(Step::End);
                }
                continue;
            };
            // The file's successor is looked for before its end, since nothing is added once it has one.
            let after = match self.files.len() {
                1 => files::after(&self.path, open).map_err(read())?,
                _ => After::Nothing,
            };
            let mut block = vec![0; BLOCK];
            let size = read_at(&open.file, &mut block, self.offset).map_err(read())?;
            block.truncate(size);
            if let Some(last) = block.iter().rposition(|byte| *byte == b'\n') {
                block.truncate(last + 1);
                self.offset += block.len() as u64;
                let out = self.render(&block);
                if !out.is_empty() {
                    return Ok(Step::Data(out.into()));
                }
                continue;
            }
            if size >= MAX_RECORD {
                // Damage: no record is this long. Nothing of it is shown up to its newline.
                self.offset += size as u64;
                self.skipping = true;
                continue;
            }
            // At the end, or at a line that is being written.
            match after {
                After::Nothing if self.files.len() > 1 => {}
                After::File(next) => self.files.push_back(next),
                After::Unsettled if unsettled < 1000 => {
                    unsettled += 1;
                    continue;
                }
                After::Nothing | After::Unsettled => return Ok(Step::End),
            }
            self.files.pop_front();
            self.offset = 0;
            self.skipping = false;
        }
    }

    /// The output for whole lines of the file.
    fn render(&mut self, lines: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(lines.len());
        for line in lines.split_inclusive(|byte| *byte == b'\n') {
            if std::mem::take(&mut self.skipping) {
                continue;
            }
            let Some(record) = Record::parse(line.strip_suffix(b"\n").unwrap_or(line)) else { continue };
            if self.options.stream.is_some_and(|stream| stream != record.stream)
                || self.options.since.is_some_and(|since| record.time < since)
            {
                continue;
            }
            if self.options.timestamps && self.fresh_line {
                out.extend_from_slice(record.time_text.as_bytes());
                out.push(b' ');
            }
            out.extend_from_slice(record.content);
            if !record.partial {
                out.push(b'\n');
            }
            self.fresh_line = !record.partial;
        }
        if let Some(remaining) = &mut self.remaining {
            out.truncate(usize::try_from(*remaining).unwrap_or(usize::MAX));
            *remaining -= out.len() as u64;
        }
        out
    }
}

fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Where the last `lines` lines of output begin: an index into `files` and a position in that file.
///
/// Reads no more of the files than those lines.
fn tail(files: &VecDeque<Open>, lines: u64, stream: Option<Stream>) -> io::Result<(usize, u64)> {
    let mut found = 0;
    for (index, open) in files.iter().enumerate().rev() {
        let end = files::last_newline(&open.file, open.file.metadata()?.len())?;
        if lines == 0 {
            return Ok((index, end));
        }
        let mut start = None;
        files::Backward::new(&open.file, end).each(|line, after| {
            if let Some(record) = Record::parse(line)
                && stream.is_none_or(|stream| stream == record.stream)
                // The last record ends the last line, newline or not; before it, newlines separate.
                && (found == 0 || !record.partial)
            {
                found += 1;
                if found > lines {
                    start = Some((index, after));
                }
            }
            start.is_none()
        })?;
        if let Some(start) = start {
            return Ok(start);
        }
    }
    Ok((0, 0))
}

#[cfg(test)]
mod tests;
