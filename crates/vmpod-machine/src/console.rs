//! The guest's serial console, as a file that only grows.
//!
//! The hypervisor appends to `console.log` for as long as the machine runs, whether an agent is there or not. To bound
//! it, its *head* is given back to the file system and everything else stays where it is: offsets keep their
//! meaning, the hypervisor needs no signal to reopen a file, and no byte is lost between two files, as it would be when
//! a log is rotated or copied and truncated. Readers skip the hole.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::Stream;
use rustix::fs::SeekFrom;
use tokio_util::sync::CancellationToken;

mod watch;

pub(crate) use watch::Watch;

/// How much is read at a time.
const PIECE: usize = 64 << 10;

/// Reads a console from `from` on, as it grows: `(offset of the first byte, bytes)`.
///
/// The file need not exist yet. When `until` is cancelled, what is in the file by then is still given, and the stream
/// ends. Bytes that were trimmed away are skipped; the next offset tells.
pub fn follow(
    path: impl Into<PathBuf>,
    from: u64,
    until: CancellationToken,
) -> impl Stream<Item = io::Result<(u64, Bytes)>> + Send + 'static {
    let state = Some(Follower { path: path.into(), at: from, file: None, watch: None, until });
    futures::stream::unfold(state, async |state| {
        let mut follower = state?;
        match follower.next().await {
            Ok(Some(piece)) => Some((Ok(piece), Some(follower))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    })
}

struct Follower {
    path: PathBuf,
    at: u64,
    file: Option<File>,
    watch: Option<Watch>,
    until: CancellationToken,
}

impl Follower {
    async fn next(&mut self) -> io::Result<Option<(u64, Bytes)>> {
        if self.watch.is_none() {
            // Before the first look, so that nothing falls between.
            self.watch = Some(Watch::new(&self.path)?);
        }
        loop {
            let last = self.until.is_cancelled();
            if self.file.is_none() {
                self.file = open(&self.path)?;
            }
            if let Some(file) = &self.file
                && let Some(piece) = read_piece(file, self.at)?
            {
                self.at = piece.0 + u64::try_from(piece.1.len()).unwrap_or(u64::MAX);
                return Ok(Some(piece));
            }
            if last {
                return Ok(None);
            }
            let Some(watch) = &mut self.watch else { return Ok(None) };
            tokio::select! {
                changed = watch.changed() => changed?,
                () = self.until.cancelled() => {}
            }
        }
    }
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The next bytes at or after `at`, holes left out.
fn read_piece(file: &File, at: u64) -> io::Result<Option<(u64, Bytes)>> {
    let at = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => data,
        // No data from here on.
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        // The file system knows no holes.
        Err(rustix::io::Errno::INVAL) => at,
        Err(error) => return Err(error.into()),
    };
    let mut buffer = vec![0; PIECE];
    let read = file.read_at(&mut buffer, at)?;
    buffer.truncate(read);
    Ok((read > 0).then(|| (at, Bytes::from(buffer))))
}

/// Waits until the console contains `marker`, reading from the start.
pub(crate) async fn wait_for(path: &Path, marker: &str) -> io::Result<()> {
    use futures::StreamExt;
    let marker = marker.as_bytes();
    let mut pieces = std::pin::pin!(follow(path, 0, CancellationToken::new()));
    let mut tail: Vec<u8> = Vec::new();
    while let Some(piece) = pieces.next().await {
        tail.extend_from_slice(&piece?.1);
        if marker.is_empty() || tail.windows(marker.len()).any(|window| window == marker) {
            return Ok(());
        }
        // The marker may lie across two pieces.
        let keep = tail.len().saturating_sub(marker.len());
        tail.drain(..keep);
    }
    Err(io::Error::other("the console ended"))
}

/// Gives all but the last `keep` bytes (at least) back to the file system. Offsets stay as they are.
pub(crate) fn trim(path: &Path, keep: u64) -> io::Result<()> {
    let Some(file) = open(path)? else { return Ok(()) };
    let length = file.metadata()?.len();
    // Whole blocks only, so that nothing but whole blocks is given back.
    let give = length.saturating_sub(keep) >> 16 << 16;
    if give == 0 {
        return Ok(());
    }
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::FallocateFlags;
        let file = std::fs::OpenOptions::new().write(true).open(path)?;
        match rustix::fs::fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, give) {
            // A file system without holes keeps the log whole.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
    #[cfg(not(target_os = "linux"))]
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use futures::StreamExt;

    use super::*;

    fn append(path: &Path, bytes: &[u8]) {
        std::fs::OpenOptions::new().append(true).create(true).open(path).unwrap().write_all(bytes).unwrap();
    }

    #[tokio::test]
    async fn a_file_that_comes_later_is_followed_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let until = CancellationToken::new();
        let mut pieces = std::pin::pin!(follow(&path, 0, until.clone()));
        assert!(tokio::time::timeout(Duration::from_millis(20), pieces.next()).await.is_err());
        append(&path, b"one\n");
        assert_eq!(pieces.next().await.unwrap().unwrap(), (0, Bytes::from("one\n")));
        assert!(tokio::time::timeout(Duration::from_millis(20), pieces.next()).await.is_err());
        append(&path, b"two\n");
        assert_eq!(pieces.next().await.unwrap().unwrap(), (4, Bytes::from("two\n")));
        append(&path, b"three\n");
        until.cancel();
        assert_eq!(pieces.next().await.unwrap().unwrap(), (8, Bytes::from("three\n")));
        assert!(pieces.next().await.is_none());
    }

    #[tokio::test]
    async fn following_begins_in_the_middle() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        append(&path, b"0123456789");
        let mut pieces = std::pin::pin!(follow(&path, 7, CancellationToken::new()));
        assert_eq!(pieces.next().await.unwrap().unwrap(), (7, Bytes::from("789")));
    }

    #[tokio::test]
    async fn a_marker_in_two_pieces_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        append(&path, b"boot\nvmpod: re");
        let waiting = tokio::spawn({
            let path = path.clone();
            async move { wait_for(&path, "vmpod: ready").await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiting.is_finished());
        append(&path, b"ady\n");
        tokio::time::timeout(Duration::from_secs(5), waiting).await.unwrap().unwrap().unwrap();
    }

    #[tokio::test]
    async fn trimming_moves_no_offset() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        append(&path, &vec![b'x'; 1 << 20]);
        append(&path, b"the end");
        trim(&path, 100 << 10).unwrap();
        let length = (1 << 20) + 7;
        assert_eq!(std::fs::metadata(&path).unwrap().len(), length);
        let until = CancellationToken::new();
        until.cancel();
        let pieces: Vec<_> = follow(&path, 0, until).map(Result::unwrap).collect().await;
        let first = pieces.first().unwrap().0;
        assert!(first > 800 << 10 && first <= length - (100 << 10), "starts at {first}");
        let text: Vec<u8> = pieces.iter().flat_map(|piece| piece.1.to_vec()).collect();
        assert!(text.ends_with(b"xthe end") && !text.contains(&0));
        assert_eq!(first + u64::try_from(text.len()).unwrap(), length);
    }
}
