//! The files of one log: the current one and the rotated ones beside it, `LOG.000001` and up, oldest first.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

/// Digits of a rotated file's number.
const DIGITS: usize = 6;

/// The rotated files of `path` in the order they were written, with their numbers.
pub(super) fn rotated(path: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str())) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    let mut found = Vec::new();
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let file_name = entry.file_name();
        let number = file_name
            .to_str()
            .and_then(|text| text.strip_prefix(name))
            .and_then(|text| text.strip_prefix('.'))
            .filter(|text| text.len() >= DIGITS && text.bytes().all(|byte| byte.is_ascii_digit()))
            .and_then(|text| text.parse().ok());
        if let Some(number) = number {
            found.push((number, entry.path()));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// The name of rotated file `number`.
pub(super) fn rotated_path(path: &Path, number: u64) -> PathBuf {
    beside(path, &format!(".{number:0DIGITS$}"))
}

/// `path` with `suffix` appended to its name.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// A file that is open, and what it is whatever its name becomes.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) file: File,
    pub(super) identity: Identity,
}

impl Open {
    /// `None` when there is no such file.
    fn at(path: &Path) -> io::Result<Option<Self>> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let identity = Identity::of(&file.metadata()?);
        Ok(Some(Self { file, identity }))
    }
}

/// The log's files, oldest first, without a gap between them. A rotation meanwhile may hide the newest.
pub(super) fn open_all(path: &Path) -> io::Result<Vec<Open>> {
    // The current file is opened before the others are listed: what was rotated before it is there then.
    let current = Open::at(path)?;
    let mut all: Vec<Open> = Vec::new();
    let mut expected = None;
    for (number, path) in rotated(path)? {
        if expected.is_some_and(|expected| expected != number) {
            // The missing one became a rotated file during the listing: it is the one that was current.
            break;
        }
        // The oldest may be removed at any time.
        if let Some(open) = Open::at(&path)? {
            all.push(open);
            expected = Some(number + 1);
        }
    }
    if let Some(current) = current
        && all.iter().all(|open| open.identity != current.identity)
    {
        all.push(current);
    }
    Ok(all)
}

/// What comes after a file.
#[derive(Debug)]
pub(super) enum After {
    /// It is the current one.
    Nothing,
    /// This file.
    File(Open),
    /// A rotation is under way: ask again.
    Unsettled,
}

/// The file that was written after `last`.
pub(super) fn after(path: &Path, last: &Open) -> io::Result<After> {
    let current = Open::at(path)?;
    if current.as_ref().is_some_and(|current| current.identity == last.identity) {
        return Ok(After::Nothing);
    }
    let rotated = rotated(path)?;
    let mut own = None;
    for (number, path) in &rotated {
        if Identity::at(path)? == Some(last.identity) {
            own = Some(*number);
        }
    }
    let own = match own {
        Some(number) => {
            if let Some(next) = Open::at(&rotated_path(path, number + 1))? {
                return Ok(After::File(next));
            }
            number
        }
        // Removed as the oldest: whatever is left is newer.
        None if last.file.metadata()?.nlink() == 0 => 0,
        None => return Ok(After::Unsettled),
    };
    for (_, path) in rotated.iter().filter(|(number, _)| *number > own) {
        if let Some(next) = Open::at(path)? {
            return Ok(After::File(next));
        }
    }
    Ok(current.map_or(After::Unsettled, After::File))
}

/// What stays the same about a file when it is renamed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    fn of(metadata: &fs::Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }

    fn at(path: &Path) -> io::Result<Option<Self>> {
        match fs::metadata(path) {
            Ok(metadata) => Ok(Some(Self::of(&metadata))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Walks the lines of a file from its end, reading each byte once.
#[derive(Debug)]
pub(super) struct Backward<'a> {
    file: &'a File,
    /// Bytes of the file from `start` on that have been read and not yet given out.
    block: Vec<u8>,
    start: u64,
}

/// How much is read at a time.
const BLOCK: u64 = 64 * 1024;

impl<'a> Backward<'a> {
    /// Starts at `end`, which is just after a newline or zero.
    pub(super) fn new(file: &'a File, end: u64) -> Self {
        Self { file, block: Vec::new(), start: end }
    }

    /// Calls `seen` with each line (without its newline) and the position just after it, last one first, until
    /// it returns false.
    pub(super) fn each(mut self, mut seen: impl FnMut(&[u8], u64) -> bool) -> io::Result<()> {
        // `block` always ends just after the newline of the next line to give out.
        loop {
            while let Some((newline, before)) = self.block.split_last() {
                debug_assert_eq!(*newline, b'\n', "a block ends with a newline");
                let Some(at) = before.iter().rposition(|byte| *byte == b'\n') else { break };
                let end = self.start + self.block.len() as u64;
                if !seen(&before[at + 1..], end) {
                    return Ok(());
                }
                self.block.truncate(at + 1);
            }
            if self.start == 0 {
                if let Some((_, line)) = self.block.split_last() {
                    seen(line, self.block.len() as u64);
                }
                return Ok(());
            }
            let size = self.start.min(BLOCK);
            let mut block = vec![0; usize::try_from(size).unwrap_or(0)];
            self.start -= size;
            self.file.read_exact_at(&mut block, self.start)?;
            block.append(&mut self.block);
            self.block = block;
        }
    }
}

/// The position just after the last newline before `len`: where a torn last line begins.
pub(super) fn last_newline(file: &File, len: u64) -> io::Result<u64> {
    let mut end = len;
    while end > 0 {
        let size = end.min(BLOCK);
        let mut block = vec![0; usize::try_from(size).unwrap_or(0)];
        file.read_exact_at(&mut block, end - size)?;
        if let Some(at) = block.iter().rposition(|byte| *byte == b'\n') {
            return Ok(end - size + at as u64 + 1);
        }
        end -= size;
    }
    Ok(0)
}
