//! The pipeline of every pull: fetch → verify → unpack → verify → write at offset.
//!
//! ```text
//! jobs (one per distinct stream) ──┬─ in the journal: done before
//!                                  ├─ window known here: copied and verified
//!                                  └─ fetched in parallel, in ranges, each retried from where it broke off
//!                                       └ digest of the packed bytes → unpack → digest of the raw bytes → sparse write
//!                                            └ journal
//! ```
//!
//! Memory is bounded by permits that bytes hold from before their request until they are unpacked. A stream that fits a segment is
//! verified before anything of it is written; a larger one is unpacked while it comes, and its range made a hole again
//! should it turn out wrong.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use tokio::sync::Semaphore;

use crate::blobs::{BlobError, Blobs, Retry};
use crate::digest::Digest;
use crate::format::{Layer, Plan, Target};
use crate::qcow2::Qcow2Error;
use crate::store::files::{self, io};
use crate::store::record::{FileRecord, Part, Window, Windows};
use crate::store::work::Work;
use crate::store::{Store, StoreError};

mod assemble;
mod fetch;
mod journal;
mod lz4;
mod report;
mod tar;
mod unpack;

pub(crate) use assemble::assemble;
use fetch::{Fetcher, SEGMENT};
use journal::Journal;
pub(crate) use report::Reporter;
use unpack::{Sink, UnpackError, unpack};

/// Streams under way at once. Most wait for the network.
const JOBS: usize = 16;
/// Streams larger than a segment that are unpacked at once, at least and at most: each takes a thread for as long as it comes.
const LARGE_JOBS: (usize, usize) = (4, 8);
/// Bytes fetched and not yet unpacked.
const MEMORY: usize = 32 << 20;
/// Streams unpacked at once: each takes some megabytes.
const MOST_UNPACKERS: usize = 8;
/// How often a stream with a wrong digest is fetched again.
const WRONG_ATTEMPTS: u32 = 3;

/// Why the bytes of an image couldn't be brought.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// The source failed.
    #[error("couldn't fetch layer {layer} from {place}")]
    Fetch {
        /// The layer.
        layer: Digest,
        /// The source.
        place: String,
        /// What happened.
        source: BlobError,
    },
    /// The source has other bytes under this digest.
    #[error("{place} sent wrong bytes for layer {layer}: {what}")]
    Wrong {
        /// The layer.
        layer: Digest,
        /// The source.
        place: String,
        /// What was found.
        what: String,
    },
    /// The bytes are the right ones, and don't unpack to what the manifest says.
    #[error("layer {layer} is broken: {what}")]
    Broken {
        /// The layer.
        layer: Digest,
        /// What was found.
        what: String,
    },
    /// The image doesn't hold what its format says.
    #[error("{0}")]
    Content(String),
    /// Its qcow2 disk can't be read.
    #[error("its disk {name:?} can't be read")]
    Disk {
        /// The disk's name in the image.
        name: String,
        /// What is wrong with it.
        source: Qcow2Error,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The runtime is shutting down.
    #[error("the transfer was stopped")]
    Stopped,
}

/// Everything a job needs.
struct Context {
    work: Arc<Work>,
    fetcher: Fetcher,
    files: HashMap<String, Arc<File>>,
    local: HashMap<Digest, Local>,
    journal: Mutex<Journal>,
    unpackers: Arc<Semaphore>,
    large: Arc<Semaphore>,
    report: Arc<Reporter>,
}

/// Where this host already has a window.
struct Local {
    file: Arc<File>,
    offset: u64,
    size: u64,
}

/// Streams that are equal: fetched once, written to each of their places.
struct Job {
    /// Their places in the plan, at least one.
    indexes: Vec<usize>,
}

/// Brings everything that `plan` names into the directory of `work`. Returns what the files then hold.
pub(crate) async fn transfer(
    store: &Store,
    work: &Arc<Work>,
    plan: &Plan,
    blobs: Arc<dyn Blobs>,
    retry: Retry,
    report: &Arc<Reporter>,
) -> Result<(Windows, Vec<FileRecord>), TransferError> {
    work.without_journal_empty()?;
    let mut files = HashMap::new();
    for &(part, size) in &plan.files {
        files.insert(part.file_name(), Arc::new(open_target(&work.dir().join(part.file_name()), size)?));
    }
    for layer in &plan.layers {
        let (name, _) = layer.target.place();
        if !files.contains_key(&name) {
            files.insert(name.clone(), Arc::new(open_target(&work.dir().join(name), None)?));
        }
    }
    let (journal, mut finished) = Journal::open(work.dir(), plan, &files)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let context = Context {
        work: Arc::clone(work),
        fetcher: Fetcher::new(blobs, MEMORY, retry, Arc::clone(report)),
        files,
        local: local_windows(store, plan)?,
        journal: Mutex::new(journal),
        unpackers: Arc::new(Semaphore::new(threads.min(MOST_UNPACKERS))),
        large: Arc::new(Semaphore::new(threads.clamp(LARGE_JOBS.0, LARGE_JOBS.1))),
        report: Arc::clone(report),
    };
    for &index in finished.keys() {
        report.reuse(bytes_of(&plan.layers[index]));
    }
    let jobs = jobs(plan, &finished);
    let done: Vec<Vec<(usize, Raw)>> = futures::stream::iter(jobs)
        .map(|job| context.run(job, plan).boxed())
        .buffer_unordered(JOBS)
        .try_collect()
        .await?;
    finished.extend(done.into_iter().flatten());
    Ok(outcome(plan, &finished))
}

/// What a stream unpacked to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Raw {
    pub(crate) size: u64,
    pub(crate) digest: Digest,
}

fn open_target(path: &Path, size: Option<u64>) -> Result<File, StoreError> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(io("open", path))?;
    if let Some(size) = size {
        file.set_len(size).map_err(io("set the size of", path))?;
    }
    Ok(file)
}

/// The bytes a layer costs.
fn bytes_of(layer: &Layer) -> u64 {
    layer.blobs.iter().map(|blob| blob.size).sum()
}

fn jobs(plan: &Plan, finished: &HashMap<usize, Raw>) -> Vec<Job> {
    let mut jobs: Vec<Job> = Vec::new();
    let mut same: HashMap<(&[crate::format::Blob], crate::format::Encoding), usize> = HashMap::new();
    for (index, layer) in plan.layers.iter().enumerate() {
        if finished.contains_key(&index) {
            continue;
        }
        let at = *same.entry((&layer.blobs, layer.encoding)).or_insert_with(|| {
            jobs.push(Job { indexes: Vec::new() });
            jobs.len() - 1
        });
        jobs[at].indexes.push(index);
    }
    jobs
}

/// The windows and files of this plan that other images here have.
fn local_windows(store: &Store, plan: &Plan) -> Result<HashMap<Digest, Local>, StoreError> {
    let wanted: HashSet<Digest> = plan.layers.iter().filter_map(|layer| layer.raw_digest).collect();
    let mut local = HashMap::new();
    for digest in store.digests()? {
        let dir = store.image_dir(digest);
        let Some(record) = store.record(digest)? else { continue };
        let mut add = |part: Part, windows: &[Window]| {
            let mut open = None;
            for window in windows.iter().filter(|window| wanted.contains(&window.digest)) {
                if open.is_none() {
                    // Kept open, it can be read even when the image is removed meanwhile.
                    open = File::open(dir.join(part.file_name())).ok().map(Arc::new);
                }
                if let Some(file) = &open {
                    local.entry(window.digest).or_insert_with(|| Local {
                        file: Arc::clone(file),
                        offset: window.offset,
                        size: window.size,
                    });
                }
            }
        };
        for (index, windows) in Windows::read(&dir)?.disks.iter().enumerate() {
            add(Part::Disk(index), windows);
        }
        for file in &record.files {
            add(file.part, &[Window { offset: 0, size: file.size, digest: file.digest }]);
        }
    }
    Ok(local)
}

impl Context {
    async fn run(&self, job: Job, plan: &Plan) -> Result<Vec<(usize, Raw)>, TransferError> {
        let sinks: Vec<Sink> = job.indexes.iter().filter_map(|&index| self.sink(plan.layers[index].target)).collect();
        let Some(layer) = job.indexes.first().map(|&index| &plan.layers[index]) else { return Ok(Vec::new()) };
        let raw = match self.copy(layer, &sinks).await? {
            Some(raw) => {
                self.report.reuse(bytes_of(layer));
                raw
            }
            None => self.fetch(layer, &sinks).await?,
        };
        for _ in 1..job.indexes.len() {
            self.report.reuse(bytes_of(layer));
        }
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        for &index in &job.indexes {
            journal.finished(index, raw)?;
        }
        Ok(job.indexes.into_iter().map(|index| (index, raw)).collect())
    }

    fn sink(&self, target: Target) -> Option<Sink> {
        let (name, offset) = target.place();
        let found = match target {
            Target::File { .. } => None,
            Target::Tar { layer } => Some(assemble::found_path(self.work.dir(), layer)),
        };
        Some(Sink { file: Arc::clone(self.files.get(&name)?), offset, found })
    }

    /// Takes a window from another image here; none if there is none, or if it isn't what it was.
    async fn copy(&self, layer: &Layer, sinks: &[Sink]) -> Result<Option<Raw>, TransferError> {
        let Some((digest, local)) = layer.raw_digest.and_then(|digest| Some((digest, self.local.get(&digest)?))) else {
            return Ok(None);
        };
        if layer.raw_size != Some(local.size) || !matches!(layer.target, Target::File { .. }) {
            return Ok(None);
        }
        let (file, offset, size) = (Arc::clone(&local.file), local.offset, local.size);
        let layer = layer.clone();
        let sinks = sinks.to_vec();
        let permit = Arc::clone(&self.unpackers).acquire_owned().await.map_err(|_| TransferError::Stopped)?;
        let work = Arc::clone(&self.work);
        tokio::task::spawn_blocking(move || {
            let _held = (permit, work);
            let mut reader = Section { file, offset, end: offset + size };
            let plain = Layer { encoding: crate::format::Encoding::Plain, ..layer };
            match unpack(&mut reader, &plain, &sinks) {
                Ok(raw) if raw.digest == digest => Ok(Some(raw)),
                Err(UnpackError::Write(error)) => Err(write_failed(error)),
                Ok(_) | Err(_) => {
                    clear(&plain, &sinks)?;
                    Ok(None)
                }
            }
        })
        .await
        .map_err(|_| TransferError::Stopped)?
    }

    async fn fetch(&self, layer: &Layer, sinks: &[Sink]) -> Result<Raw, TransferError> {
        let digest = layer.blobs.first().map_or_else(|| Digest::of(b""), |blob| blob.digest);
        let mut attempt = 0;
        loop {
            attempt += 1;
            let result = if layer.blobs.len() == 1 && bytes_of(layer) <= SEGMENT {
                self.fetch_small(layer, sinks).await
            } else {
                self.fetch_large(layer, sinks).await
            };
            match result {
                Err(TransferError::Wrong { layer: wrong, what, .. }) if attempt < WRONG_ATTEMPTS => {
                    self.fetcher.distrust(wrong);
                    tracing::warn!(layer = %digest, place = self.fetcher.place(), what, "wrong bytes, fetching again");
                    self.report.retreat(bytes_of(layer));
                }
                other => return other,
            }
        }
    }

    /// Fetches all of a stream, verifies it, and only then unpacks it.
    async fn fetch_small(&self, layer: &Layer, sinks: &[Sink]) -> Result<Raw, TransferError> {
        let mut pieces = Vec::new();
        for blob in &layer.blobs {
            let piece =
                self.fetcher.segment(*blob, 0, blob.size).await.map_err(|source| self.failed(blob.digest, source))?;
            pieces.push((*blob, piece));
        }
        let permit = Arc::clone(&self.unpackers).acquire_owned().await.map_err(|_| TransferError::Stopped)?;
        let (layer, sinks, work, place) =
            (layer.clone(), sinks.to_vec(), Arc::clone(&self.work), self.fetcher.place().to_owned());
        tokio::task::spawn_blocking(move || {
            let _held = (permit, work);
            for (blob, piece) in &pieces {
                let found = Digest::of(&piece.bytes);
                if found != blob.digest {
                    return Err(TransferError::Wrong {
                        layer: blob.digest,
                        place,
                        what: format!("their digest is {found}"),
                    });
                }
            }
            let mut reader = Pieces { pieces: pieces.iter().map(|(_, piece)| piece.bytes.as_slice()).collect() };
            finish_unpack(unpack(&mut reader, &layer, &sinks), &layer, &sinks)
        })
        .await
        .map_err(|_| TransferError::Stopped)?
    }

    /// Unpacks a stream while it comes.
    async fn fetch_large(&self, layer: &Layer, sinks: &[Sink]) -> Result<Raw, TransferError> {
        let permit = Arc::clone(&self.large).acquire_owned().await.map_err(|_| TransferError::Stopped)?;
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let owned = (layer.clone(), sinks.to_vec(), Arc::clone(&self.work));
        let unpacking = tokio::task::spawn_blocking(move || {
            let (layer, sinks, work) = owned;
            let _held = (permit, work);
            let mut reader = fetch::PieceReader::new(receiver, &layer.blobs);
            let result = unpack(&mut reader, &layer, &sinks);
            if let Some(wrong) = reader.wrong() {
                clear(&layer, &sinks)?;
                return Ok(Err(wrong));
            }
            finish_unpack(result, &layer, &sinks).map(Ok)
        });
        let sent = self.fetcher.stream(&layer.blobs, sender).await;
        let unpacked = unpacking.await.map_err(|_| TransferError::Stopped)?;
        if let Err((digest, source)) = sent {
            return Err(self.failed(digest, source));
        }
        match unpacked? {
            Ok(raw) => Ok(raw),
            Err((layer, what)) => Err(TransferError::Wrong { layer, place: self.fetcher.place().to_owned(), what }),
        }
    }

    fn failed(&self, layer: Digest, source: BlobError) -> TransferError {
        TransferError::Fetch { layer, place: self.fetcher.place().to_owned(), source }
    }
}

/// Turns what unpacking found into an error that names the layer, and undoes what was written.
fn finish_unpack(result: Result<Raw, UnpackError>, layer: &Layer, sinks: &[Sink]) -> Result<Raw, TransferError> {
    let what = match result {
        Ok(raw) if layer.raw_digest.is_none_or(|digest| digest == raw.digest) => return Ok(raw),
        Ok(raw) => format!("it unpacks to {}, not to what its manifest says", raw.digest),
        Err(UnpackError::Write(error)) => return Err(write_failed(error)),
        Err(error) => error.to_string(),
    };
    clear(layer, sinks)?;
    let layer = layer.blobs.first().map_or_else(|| Digest::of(b""), |blob| blob.digest);
    Err(TransferError::Broken { layer, what })
}

fn write_failed(source: std::io::Error) -> TransferError {
    StoreError::Io { action: "write a disk in", path: "the image store".into(), source }.into()
}

/// Makes the range of a stream a hole again, so that the next attempt may leave holes.
fn clear(layer: &Layer, sinks: &[Sink]) -> Result<(), TransferError> {
    for Sink { file, offset, .. } in sinks {
        let length = file.metadata().map_err(write_failed)?.len();
        let end = layer.raw_size.map_or(length, |size| offset.saturating_add(size).min(length));
        if end > *offset {
            files::punch(file, *offset, end - offset).map_err(write_failed)?;
        }
    }
    Ok(())
}

fn outcome(plan: &Plan, finished: &HashMap<usize, Raw>) -> (Windows, Vec<FileRecord>) {
    let mut windows = Windows { disks: vec![Vec::new(); plan.config.disks.len()] };
    let mut records = Vec::new();
    for (index, layer) in plan.layers.iter().enumerate() {
        let Some(raw) = finished.get(&index) else { continue };
        let Target::File { part, offset } = layer.target else { continue };
        match part {
            Part::Disk(disk) => {
                if let Some(windows) = windows.disks.get_mut(disk) {
                    windows.push(Window { offset, size: raw.size, digest: raw.digest });
                }
            }
            part => records.push(FileRecord { part, size: raw.size, digest: raw.digest }),
        }
    }
    for disk in &mut windows.disks {
        disk.sort_unstable_by_key(|window| window.offset);
    }
    (windows, records)
}

/// Slices read one after another.
struct Pieces<'a> {
    pieces: std::collections::VecDeque<&'a [u8]>,
}

impl std::io::Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while let Some(piece) = self.pieces.front_mut() {
            if piece.is_empty() {
                self.pieces.pop_front();
                continue;
            }
            let step = piece.len().min(buffer.len());
            buffer[..step].copy_from_slice(&piece[..step]);
            *piece = &piece[step..];
            return Ok(step);
        }
        Ok(0)
    }
}

/// A range of a file.
struct Section {
    file: Arc<File>,
    offset: u64,
    end: u64,
}

impl std::io::Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let left = usize::try_from(self.end - self.offset).unwrap_or(usize::MAX);
        let most = left.min(buffer.len());
        let read = self.file.read_at(&mut buffer[..most], self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}
