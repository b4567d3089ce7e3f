//! Cutting disks into windows: read, digest, pack, on all processors, with bounded memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::digest::Digest;
use crate::format::native::Chunk;
use crate::qcow2::Qcow2;
use crate::store::files;

/// The level of compression: with another one, every digest changes.
const LEVEL: i32 = 3;
/// Threads beyond this only take memory.
const MOST_THREADS: usize = 16;

/// A disk to read.
#[derive(Debug)]
pub(crate) enum Disk {
    Raw { file: File, size: u64 },
    Qcow2(Qcow2),
}

impl Disk {
    pub(crate) fn raw(file: File) -> io::Result<Self> {
        let size = file.metadata()?.len();
        Ok(Self::Raw { file, size })
    }

    /// In bytes.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Raw { size, .. } => *size,
            Self::Qcow2(disk) => disk.size(),
        }
    }

    /// The first offset at or after `offset` that may hold data.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        match self {
            Self::Raw { file, size } => Ok(files::next_data(file, offset, *size)?.map(|(start, _)| start)),
            Self::Qcow2(disk) => disk.next_data(offset),
        }
    }

    /// Fills `buffer`; false if that range is all zero.
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
        match self {
            Self::Raw { file, .. } => file.read_exact_at(buffer, offset)?,
            Self::Qcow2(disk) => {
                buffer.fill(0);
                if !disk.read(buffer, offset)? {
                    return Ok(false);
                }
            }
        }
        Ok(!files::is_zero(buffer))
    }
}

/// What to do with each window.
pub(crate) struct Ingest<'a> {
    /// The disk.
    pub(crate) disk: &'a Disk,
    /// The size of a window in bytes.
    pub(crate) window: u64,
    /// A file of holes to write the disk to.
    pub(crate) copy_to: Option<&'a File>,
    /// Whether to pack the windows. Without, a chunk's digest and size are those of its raw bytes.
    pub(crate) pack: bool,
    /// Stops the work.
    pub(crate) cancelled: &'a AtomicBool,
    /// Told the bytes of the disk that are done, holes included.
    pub(crate) done: &'a (dyn Fn(u64) + Sync),
}

impl Ingest<'_> {
    /// Does it. Returns the windows that hold data, by offset.
    pub(crate) fn run(&self) -> io::Result<Vec<Chunk>> {
        let next = Mutex::new(0);
        let chunks = Mutex::new(Vec::new());
        let failure = Mutex::new(None);
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    if let Err(error) = self.work(&next, &chunks) {
                        // Nobody shall begin another window.
                        *lock(&next) = u64::MAX;
                        lock(&failure).get_or_insert(error);
                    }
                });
            }
        });
        if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let mut chunks = chunks.into_inner().unwrap_or_else(PoisonError::into_inner);
        chunks.sort_unstable_by_key(|chunk: &Chunk| chunk.offset);
        Ok(chunks)
    }

    fn work(&self, next: &Mutex<u64>, chunks: &Mutex<Vec<Chunk>>) -> io::Result<()> {
        let mut buffer = Vec::new();
        let mut compress = Packer::new()?;
        while let Some((offset, size)) = self.take(next)? {
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(io::Error::new(io::ErrorKind::Interrupted, "cancelled"));
            }
            buffer.resize(size, 0);
            if self.disk.read(&mut buffer, offset)? {
                let raw_digest = Digest::of(&buffer);
                if let Some(file) = self.copy_to {
                    files::write_sparse(file, offset, &buffer)?;
                }
                let (digest, stored) = if self.pack {
                    let bytes = compress.pack(&buffer)?;
                    (Digest::of(bytes), bytes.len())
                } else {
                    (raw_digest, size)
                };
                lock(chunks).push(Chunk { offset, raw_size: size as u64, raw_digest, digest, size: stored as u64 });
            }
            (self.done)(size as u64);
        }
        Ok(())
    }

    /// The next window that may hold data.
    fn take(&self, next: &Mutex<u64>) -> io::Result<Option<(u64, usize)>> {
        let mut next = lock(next);
        if *next >= self.disk.size() {
            return Ok(None);
        }
        let Some(data) = self.disk.next_data(*next)? else {
            (self.done)(self.disk.size() - *next);
            *next = u64::MAX;
            return Ok(None);
        };
        let offset = data / self.window * self.window;
        (self.done)(offset.saturating_sub(*next));
        let size = self.window.min(self.disk.size() - offset);
        *next = offset + size;
        usize::try_from(size).map(|size| Some((offset, size))).map_err(io::Error::other)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Packs windows, always the same way.
pub(crate) struct Packer {
    compressor: zstd::bulk::Compressor<'static>,
    packed: Vec<u8>,
}

impl Packer {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { compressor: zstd::bulk::Compressor::new(LEVEL)?, packed: Vec::new() })
    }

    /// The packed form of `raw`, valid until the next call.
    pub(crate) fn pack(&mut self, raw: &[u8]) -> io::Result<&[u8]> {
        self.packed.clear();
        self.packed.reserve(zstd::zstd_safe::compress_bound(raw.len()));
        self.compressor.compress_to_buffer(raw, &mut self.packed)?;
        Ok(&self.packed)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    fn run(disk: &Disk, copy_to: Option<&File>) -> (Vec<Chunk>, u64) {
        let done = AtomicU64::new(0);
        let ingest = Ingest {
            disk,
            window: 1 << 20,
            copy_to,
            pack: true,
            cancelled: &AtomicBool::new(false),
            done: &|bytes| {
                done.fetch_add(bytes, Ordering::Relaxed);
            },
        };
        let chunks = ingest.run().unwrap();
        (chunks, done.into_inner())
    }

    #[test]
    fn holes_and_written_zeros_are_no_windows() {
        let source = tempfile::tempfile().unwrap();
        source.set_len((9 << 20) + 100).unwrap();
        source.write_all_at(b"first", 10).unwrap();
        source.write_all_at(&vec![0; 2 << 20], 3 << 20).unwrap();
        source.write_all_at(b"last", 9 << 20).unwrap();
        let disk = Disk::raw(source).unwrap();
        let copy = tempfile::NamedTempFile::new().unwrap();
        copy.as_file().set_len(disk.size()).unwrap();
        let (chunks, done) = run(&disk, Some(copy.as_file()));
        assert_eq!(
            chunks.iter().map(|chunk| (chunk.offset, chunk.raw_size)).collect::<Vec<_>>(),
            [(0, 1 << 20), (9 << 20, 100)]
        );
        assert_eq!(done, disk.size());
        assert!(files::allocated(copy.path()) <= 16 << 10);
        let again = Disk::raw(copy.reopen().unwrap()).unwrap();
        assert_eq!(run(&again, None).0, chunks, "the copy is equal, and packing is deterministic");
        let mut window = vec![0; 1 << 20];
        window[10..15].copy_from_slice(b"first");
        assert_eq!(chunks[0].raw_digest, Digest::of(&window));
        let mut packer = Packer::new().unwrap();
        let bytes = packer.pack(&window).unwrap();
        assert_eq!((Digest::of(bytes), bytes.len() as u64), (chunks[0].digest, chunks[0].size));
        assert_eq!(zstd::decode_all(bytes).unwrap(), window);
    }

    #[test]
    fn a_disk_without_data_has_no_windows() {
        let source = tempfile::tempfile().unwrap();
        source.set_len(64 << 30).unwrap();
        let disk = Disk::raw(source).unwrap();
        assert_eq!(run(&disk, None), (vec![], 64 << 30));
    }
}
