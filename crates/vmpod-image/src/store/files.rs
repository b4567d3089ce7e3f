//! Files that survive a crash, locks between processes, and holes.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::StoreError;

/// Adds what was being done, and on what, to an I/O error.
pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { action, path, source }
}

/// Makes a directory and those above it, readable by its owner only; nothing to do if it is there.
pub(crate) fn make_dir(path: &Path) -> Result<(), StoreError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io("make the directory", path))
}

/// Makes renames and removals in a directory durable.
pub(crate) fn sync_dir(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(io("sync the directory", path))
}

/// Writes a file so that after a crash it is there as a whole or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(dir).map_err(io("make a file in", dir))?;
    file.write_all(bytes).map_err(io("write", path))?;
    file.as_file().sync_all().map_err(io("sync", path))?;
    file.persist(path).map_err(|error| io("put in place", path)(error.error))?;
    sync_dir(dir)
}

/// Reads a file; none if there is none.
pub(crate) fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io("read", path)(error)),
    }
}

/// Removes a file; nothing to do if there is none. Returns whether there was one.
pub(crate) fn remove_file(path: &Path) -> Result<bool, StoreError> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io("remove", path)(error)),
    }
}

/// Removes a directory and all in it; nothing to do if there is none.
pub(crate) fn remove_tree(path: &Path) -> Result<(), StoreError> {
    match std::fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io("remove", path)(error)),
    }
}

/// The names in a directory, sorted, without the temporary files of [`write_whole`].
pub(crate) fn names_in(dir: &Path) -> Result<Vec<String>, StoreError> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io("read the directory", dir))? {
        let entry = entry.map_err(io("read the directory", dir))?;
        if let Some(name) = entry.file_name().to_str()
            && !name.starts_with('.')
        {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// A lock that other processes respect, held until dropped or until the process ends, however it ends.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    /// Waits for the lock.
    pub(crate) fn wait(path: &Path) -> Result<Self, StoreError> {
        loop {
            let file = open_lock(path)?;
            rustix::io::retry_on_intr(|| rustix::fs::flock(&file, FlockOperation::LockExclusive))
                .map_err(|errno| io("lock", path)(errno.into()))?;
            if still_there(&file, path) {
                return Ok(Self { _file: file });
            }
        }
    }

    /// Takes the lock if nobody has it.
    pub(crate) fn attempt(path: &Path) -> Result<Option<Self>, StoreError> {
        loop {
            let file = open_lock(path)?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if still_there(&file, path) => return Ok(Some(Self { _file: file })),
                Ok(()) | Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(errno) => return Err(io("lock", path)(errno.into())),
            }
        }
    }
}

fn open_lock(path: &Path) -> Result<File, StoreError> {
    let open = || OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path);
    match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // The directory went with the work that it was for: begin anew.
            if let Some(dir) = path.parent() {
                make_dir(dir)?;
            }
            open().map_err(io("open the lock", path))
        }
        other => other.map_err(io("open the lock", path)),
    }
}

/// Whether the file that was locked is still the one at this path: else its owner finished and took it away meanwhile.
fn still_there(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(ours), Ok(theirs)) => ours.ino() == theirs.ino() && ours.dev() == theirs.dev(),
        _ => false,
    }
}

/// The unit in which zeros are looked for: the block size of most file systems.
const BLOCK: usize = 4096;
static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Comparing slices is one memcmp: as fast in a debug build as in a release build.
    bytes.chunks(BLOCK).all(|block| block == &ZEROS[..block.len()])
}

/// Writes `bytes` at `offset` of a file whose range there is a hole, and leaves blocks of zeros as holes.
pub(crate) fn write_sparse(file: &File, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let block = |at: usize| &bytes[at..bytes.len().min(at + BLOCK)];
        let zeros = is_zero(block(0));
        let mut end = BLOCK;
        while end < bytes.len() && is_zero(block(end)) == zeros {
            end += BLOCK;
        }
        let (run, rest) = bytes.split_at(end.min(bytes.len()));
        if !zeros {
            file.write_all_at(run, offset)?;
        }
        offset += run.len() as u64;
        bytes = rest;
    }
    Ok(())
}

/// Makes a range of a file read as zeros, as a hole where the file system can.
pub(crate) fn punch(file: &File, offset: u64, size: u64) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::FallocateFlags;
        match rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, size) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    let end = offset + size;
    let mut at = offset;
    while at < end {
        let step = (end - at).min(BLOCK as u64);
        let mut block = [0; BLOCK];
        let block = &mut block[..usize::try_from(step).unwrap_or(BLOCK)];
        let mut have = 0;
        while have < block.len() {
            match file.read_at(&mut block[have..], at + have as u64)? {
                0 => break,
                read => have += read,
            }
        }
        if !is_zero(block) {
            file.write_all_at(&ZEROS[..block.len()], at)?;
        }
        at += step;
    }
    Ok(())
}

/// The next range of data at or after `offset` of a file of `size` bytes: `(start, end)`. A file system that doesn't tell holes
/// has one range.
pub(crate) fn next_data(file: &File, offset: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    use rustix::fs::SeekFrom;
    if offset >= size {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(start) => start,
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        Err(rustix::io::Errno::INVAL) => return Ok(Some((offset, size))),
        Err(errno) => return Err(errno.into()),
    };
    if start >= size {
        return Ok(None);
    }
    let end = rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap_or(size).min(size);
    Ok(Some((start, end)))
}

/// The bytes that a file takes on disk.
pub(crate) fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512)
}

/// Makes a file's content durable.
pub(crate) fn sync_file(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(io("sync", path))
}

/// `path` with symbolic links resolved: what may be written into a file that others read later.
pub(crate) fn canonical(path: &Path) -> Result<PathBuf, StoreError> {
    path.canonicalize().map_err(io("find", path))
}

/// Copies a file, shared where the file system shares blocks, else with its holes. An existing file is replaced.
pub(crate) fn copy_sparse(from: &Path, to: &Path) -> Result<(), StoreError> {
    remove_file(to)?;
    if reflink_copy::reflink(from, to).is_ok() {
        return Ok(());
    }
    // It may have left a file behind.
    remove_file(to)?;
    let source = File::open(from).map_err(io("open", from))?;
    let size = source.metadata().map_err(io("read", from))?.len();
    let target = File::create(to).map_err(io("make", to))?;
    target.set_len(size).map_err(io("set the size of", to))?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while let Some((start, end)) = next_data(&source, at, size).map_err(io("read", from))? {
        let mut here = start;
        while here < end {
            let step = usize::try_from(end - here).unwrap_or(usize::MAX).min(buffer.len());
            source.read_exact_at(&mut buffer[..step], here).map_err(io("read", from))?;
            write_sparse(&target, here, &buffer[..step]).map_err(io("write", to))?;
            here += step as u64;
        }
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_lock_is_exclusive_even_within_a_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/lock");
        let lock = Lock::attempt(&path).unwrap().unwrap();
        assert!(Lock::attempt(&path).unwrap().is_none());
        drop(lock);
        assert!(Lock::attempt(&path).unwrap().is_some());
    }

    #[test]
    fn a_lock_whose_file_was_removed_is_taken_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("work/lock");
        let first = Lock::wait(&path).unwrap();
        let waiter = std::thread::spawn({
            let path = path.clone();
            move || Lock::wait(&path).unwrap()
        });
        remove_tree(path.parent().unwrap()).unwrap();
        drop(first);
        let _second = waiter.join().unwrap();
        assert!(Lock::attempt(&path).unwrap().is_none(), "the waiter holds the file that is there now");
    }

    #[test]
    fn a_file_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        write_whole(&path, b"one").unwrap();
        write_whole(&path, b"two").unwrap();
        assert_eq!(read_if_there(&path).unwrap().unwrap(), b"two");
        assert_eq!(names_in(dir.path()).unwrap(), ["f"]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn sparse_writes_read_back(runs in proptest::collection::vec((any::<u8>(), 1usize..9000), 1..12), offset in 0u64..10000) {
            let mut bytes = Vec::new();
            for (value, length) in runs {
                bytes.resize(bytes.len() + length, if value < 128 { 0 } else { value });
            }
            let file = tempfile::tempfile().unwrap();
            file.set_len(offset + bytes.len() as u64).unwrap();
            write_sparse(&file, offset, &bytes).unwrap();
            let mut back = vec![0; bytes.len()];
            file.read_exact_at(&mut back, offset).unwrap();
            prop_assert_eq!(&back, &bytes);
            punch(&file, offset, bytes.len() as u64).unwrap();
            file.read_exact_at(&mut back, offset).unwrap();
            prop_assert!(is_zero(&back));
        }
    }
}
