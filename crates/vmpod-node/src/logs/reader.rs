//! The reading end of a log.

use std::{
    fs::File,
    io::{self, ErrorKind},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use futures::Stream as AsyncStream;

use super::{
    Live, LogError, LogFile, LogOptions, Stream,
    files::{self, Identity},
    record::{MAX_RECORD, Record},
    watch::FileWatch,
};

/// How much of a file is read at a time.
const BLOCK: usize = 64 * 1024;

/// The log as its reader wants it. Ends at the end of the log, or when following, at the end of the attempt.
pub fn read(
    log: LogFile,
    options: LogOptions,
) -> impl AsyncStream<Item = Result<Bytes, LogError>> + Send + 'static {
    futures::stream::try_unfold(Start::New(log, options), |state| async {
        let mut follower = match state {
            Start::New(log, options) => {
                let follow = options.follow;
                let (cursor, log) = blocking(move || {
                    Cursor::open(&log.path, options).map(|cursor| (cursor, log))
                })
                .await?;
                Follower::new(cursor, log, follow)?
            }
            Start::Going(follower) => follower,
        };
        let next = follower.next().await?;
        Ok(next.map(|bytes| (bytes, Start::Going(follower))))
    })
}

enum Start {
    New(LogFile, LogOptions),
    Going(Follower),
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
            Some(Live::Process(_)) => {
                Some(FileWatch::new(&log.path).map_err(LogError::file("watch", &log.path))?)
            }
            _ => None,
        };
        Ok(Self { cursor: Some(cursor), live, watch })
    }

    async fn next(&mut self) -> Result<Option<Bytes>, LogError> {
        loop {
            // Asked before reading: what is written after an end is not, so the read sees all of it.
            let ended = match &mut self.live {
                None => true,
                Some(Live::Writer(progress)) => {
                    progress.has_changed().is_err() || progress.borrow_and_update().ended
                }
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
    file: Option<(File, Identity)>,
    /// Start of the first line of the file that was not given out.
    offset: u64,
    /// Whether the output so far ends with a newline (or is empty).
    fresh_line: bool,
    remaining: Option<u64>,
    /// Bytes of a line that is too long to be a record are being skipped.
    skipping: bool,
}

impl Cursor {
    fn open(path: &Path, options: LogOptions) -> Result<Self, LogError> {
        let files = files::all(path).map_err(LogError::file("list the files of", path))?;
        let (first, offset) = match options.tail_lines {
            Some(lines) => tail(&files, lines, options.stream)?,
            None => (0, 0),
        };
        let mut cursor = Self {
            path: path.to_owned(),
            remaining: options.limit_bytes,
            options,
            file: None,
            offset: 0,
            fresh_line: true,
            skipping: false,
        };
        if let Some(first) = files.get(first) {
            cursor.enter(first)?;
            cursor.offset = offset;
        }
        Ok(cursor)
    }

    fn enter(&mut self, path: &Path) -> Result<(), LogError> {
        let file = File::open(path).map_err(LogError::file("open", path))?;
        let metadata = file.metadata().map_err(LogError::file("inspect", path))?;
        self.file = Some((file, Identity::of(&metadata)));
        self.offset = 0;
        self.skipping = false;
        Ok(())
    }

    fn step(&mut self) -> Result<Step, LogError> {
        loop {
            if self.remaining == Some(0) {
                return Ok(Step::Done);
            }
            let Some((file, identity)) = &self.file else {
                let files = files::all(&self.path).map_err(LogError::file("list the files of", &self.path))?;
                match files.first() {
                    Some(first) => self.enter(first)?,
                    None => return Ok(Step::End),
                }
                continue;
            };
            let identity = *identity;
            // The file's successor is looked for before its end, since nothing is added once it has one.
            let next = self.successor(identity)?;
            let mut block = vec![0; BLOCK];
            let read = read_at(file, &mut block, self.offset).map_err(LogError::file("read", &self.path))?;
            block.truncate(read);
            match block.iter().rposition(|byte| *byte == b'\n') {
                Some(last) => {
                    block.truncate(last + 1);
                    self.offset += block.len() as u64;
                    let out = self.render(&block);
                    if !out.is_empty() {
                        return Ok(Step::Data(out.into()));
                    }
                }
                // Damage: no record is this long. Nothing of it is shown up to its newline.
                None if read >= MAX_RECORD => {
                    self.offset += read as u64;
                    self.skipping = true;
                }
                // At the end, or at a line that is being written.
                None => match next {
                    Some(next) => match self.enter(&next) {
                        // It was removed meanwhile: look again.
                        Err(LogError::File { source, .. }) if source.kind() == ErrorKind::NotFound => {}
                        entered => entered?,
                    },
                    None => return Ok(Step::End),
                },
            }
        }
    }

    /// The file that was written after the one with this identity.
    fn successor(&self, identity: Identity) -> Result<Option<PathBuf>, LogError> {
        let inspect = LogError::file("inspect", &self.path);
        let current = Identity::at(&self.path).map_err(inspect)?;
        if current == Some(identity) {
            return Ok(None);
        }
        let list = LogError::file("list the files of", &self.path);
        let files = files::all(&self.path).map_err(list)?;
        let mut own = None;
        for (index, path) in files.iter().enumerate() {
            if Identity::at(path).map_err(LogError::file("inspect", path))? == Some(identity) {
                own = Some(index);
            }
        }
        // Rotated out of existence: go on with the oldest that is left.
        Ok(files.into_iter().nth(own.map_or(0, |own| own + 1)))
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
fn tail(files: &[PathBuf], lines: u64, stream: Option<Stream>) -> Result<(usize, u64), LogError> {
    let mut found = 0;
    for (index, path) in files.iter().enumerate().rev() {
        let file = File::open(path).map_err(LogError::file("open", path))?;
        let len = file.metadata().map_err(LogError::file("inspect", path))?.len();
        let end = files::last_newline(&file, len).map_err(LogError::file("read", path))?;
        if lines == 0 {
            return Ok((index, end));
        }
        let mut start = None;
        files::Backward::new(&file, end)
            .each(|line, after| {
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
            })
            .map_err(LogError::file("read", path))?;
        if let Some(start) = start {
            return Ok(start);
        }
    }
    Ok((0, 0))
}

#[cfg(test)]
mod tests;
