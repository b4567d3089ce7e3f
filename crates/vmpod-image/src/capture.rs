//! Making an image of a machine's disks: what it was cloned from, and what it wrote since.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

use crate::config::{Config, DiskConfig};
use crate::digest::Digest;
use crate::format::native;
use crate::image::{DiskFormat, Image};
use crate::ingest::Disk;
use crate::manifest::Descriptor;
use crate::progress::{Phase, Progress};
use crate::qcow2::{Qcow2, Qcow2Error};
use crate::reference::Reference;
use crate::store::files;
use crate::store::record::{Part, Record, Window, Windows};
use crate::store::work::{Finished, Work};
use crate::store::{Store, StoreError};
use crate::transfer::Reporter;

/// A machine's disk, which nothing writes any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CapturedDisk {
    /// The file: as [`crate::ClonedDisk`] told it.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
}

/// What the new image says about itself, besides what the old one did.
#[derive(Debug, Clone, Default)]
pub struct CaptureOptions {
    /// Labels to add; an equal key is replaced.
    pub labels: BTreeMap<String, String>,
    /// Where progress is published.
    pub progress: Option<watch::Sender<Progress>>,
}

/// Why a machine's disks made no image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// A file or the store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Other disks than the image's.
    #[error("the machine has {found} disks and its image {expected}: only what came from the image can become one")]
    Disks {
        /// Disks of the machine.
        found: usize,
        /// Disks of the image.
        expected: usize,
    },
    /// A disk that can't be read as an overlay.
    #[error("couldn't read the disk {path}", path = path.display())]
    Overlay {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Qcow2Error,
    },
    /// A disk that can't be read, packed or written.
    #[error("couldn't capture the disk {path}", path = path.display())]
    Ingest {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The configuration.
    #[error("couldn't write the configuration")]
    Json(#[source] serde_json::Error),
    /// The runtime is shutting down.
    #[error("stopped")]
    Stopped,
}

/// Copies of disks, in the store's directory for work: gone when dropped, or when the store is opened after a crash.
#[derive(Debug)]
pub struct DiskCopies {
    work: Work,
    disks: Vec<CapturedDisk>,
}

impl DiskCopies {
    /// Copies the disks as they are now, holes left out: shared where the file system shares blocks. Blocks.
    pub fn make(store: &Store, disks: &[CapturedDisk]) -> Result<Self, CaptureError> {
        let mut copies = Self { work: Work::scratch(store)?, disks: Vec::new() };
        for (index, disk) in disks.iter().enumerate() {
            let path = copies.work.dir().join(format!("copy-{index}"));
            files::copy_sparse(&disk.path, &path)?;
            copies.disks.push(CapturedDisk { path, format: disk.format });
        }
        Ok(copies)
    }

    /// The copies.
    #[must_use]
    pub fn disks(&self) -> &[CapturedDisk] {
        &self.disks
    }
}

impl Drop for DiskCopies {
    fn drop(&mut self) {
        if let Err(error) = self.work.discard() {
            tracing::warn!(%error, "copies of disks can't be removed; the next opening of the store does it");
        }
    }
}

/// Makes an image named `reference` of the disks of a machine that was cloned from `base`, in the native format. The disks may have
/// grown. Kernel, initial RAM disk and firmware variables are those of `base`, which must stay while this runs (the machine's
/// hold does that). The same disks and options give the same digest.
pub async fn capture(
    store: &Store,
    base: &Image,
    disks: &[CapturedDisk],
    reference: &Reference,
    mut options: CaptureOptions,
) -> Result<Image, CaptureError> {
    let report = Reporter::new(options.progress.take());
    let cancelled = Arc::new(AtomicBool::new(false));
    let _cancel = CancelOnDrop(Arc::clone(&cancelled));
    let (store, base, disks, reference) = (store.clone(), base.clone(), disks.to_vec(), reference.clone());
    tokio::task::spawn_blocking(move || {
        let work = Work::scratch(&store)?;
        let capture = Capture { store: &store, base: &base, work: &work, report: &report, cancelled: &cancelled };
        let made = capture.run(&disks, &reference, options.labels);
        if made.is_err() {
            work.discard()?;
        }
        made
    })
    .await
    .map_err(|_| CaptureError::Stopped)?
}

/// Stops the threads of a capture whose future was dropped.
struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Capture<'a> {
    store: &'a Store,
    base: &'a Image,
    work: &'a Work,
    report: &'a Reporter,
    cancelled: &'a AtomicBool,
}

impl Capture<'_> {
    fn run(
        &self,
        disks: &[CapturedDisk],
        reference: &Reference,
        labels: BTreeMap<String, String>,
    ) -> Result<Image, CaptureError> {
        let expected = self.base.config.disks.len();
        if disks.len() != expected || disks.is_empty() {
            return Err(CaptureError::Disks { found: disks.len(), expected });
        }
        let record = self.store.record(self.base.digest)?.ok_or(StoreError::NoImage(self.base.digest))?;
        // What the overlays lie upon gets new digests, which would vouch for whatever it holds by now.
        self.store.check_seal(self.base, &record)?;
        let from = self.store.image_dir(self.base.digest);
        let mut layers = Vec::new();
        for file in &record.files {
            let (source, target) = (from.join(file.part.file_name()), self.work.dir().join(file.part.file_name()));
            std::fs::hard_link(&source, &target).map_err(files::io("share", &source))?;
            layers.push(Descriptor::new(native::media_type(file.part), file.digest, file.size));
        }
        let opened: Vec<Disk> = disks
            .iter()
            .enumerate()
            .map(|(index, disk)| open(disk, &from.join(Part::Disk(index).file_name())))
            .collect::<Result<_, _>>()?;
        self.report.total(opened.iter().map(Disk::size).sum());
        self.report.phase(Phase::Transferring);
        let mut windows = Windows::default();
        let mut sizes = Vec::new();
        for (index, (disk, captured)) in opened.iter().zip(disks).enumerate() {
            let size = disk.size().next_multiple_of(512);
            let to = self.work.dir().join(Part::Disk(index).file_name());
            let chunks = crate::import::ingest(&captured.path, disk, size, &to, self.report, self.cancelled).map_err(
                |error| match error {
                    crate::import::ImportError::Ingest { path, source } => CaptureError::Ingest { path, source },
                    crate::import::ImportError::Store(error) => CaptureError::Store(error),
                    _ => CaptureError::Stopped,
                },
            )?;
            layers.extend(chunks.iter().map(|chunk| chunk.descriptor(index)));
            let window =
                |chunk: &native::Chunk| Window { offset: chunk.offset, size: chunk.raw_size, digest: chunk.raw_digest };
            windows.disks.push(chunks.iter().map(window).collect());
            sizes.push(DiskConfig { size });
        }
        self.report.phase(Phase::Finishing);
        let mut config = Config { disks: sizes, ..record.config.clone() };
        config.labels.extend(labels);
        let config_bytes = serde_json::to_vec(&config).map_err(CaptureError::Json)?;
        let manifest = native::manifest(&config_bytes, layers, BTreeMap::new());
        let bytes = serde_json::to_vec(&manifest).map_err(CaptureError::Json)?;
        let now = jiff::Timestamp::now();
        let mut new = Record::new(Digest::of(&bytes), native::NAME, now, config, manifest.transfer_bytes());
        new.files = record.files;
        let finished = Finished { record: new, windows, manifest: &bytes, config: &config_bytes };
        let image = self.work.publish(self.store, &finished, reference)?;
        self.report.phase(Phase::Done);
        Ok(image)
    }
}

/// Opens a machine's disk. What an overlay's header names as its base is not believed: it lies upon the image's disk.
fn open(disk: &CapturedDisk, base: &Path) -> Result<Disk, CaptureError> {
    let file = File::open(&disk.path).map_err(files::io("open", &disk.path))?;
    match disk.format {
        DiskFormat::Raw => Ok(Disk::raw(file).map_err(files::io("read", &disk.path))?),
        DiskFormat::Qcow2 => {
            let base = File::open(base).map_err(files::io("open", base))?;
            let overlay = Qcow2::open_over(file, base)
                .map_err(|source| CaptureError::Overlay { path: disk.path.clone(), source })?;
            Ok(Disk::Qcow2(overlay))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;
    use std::process::Command;

    use super::*;
    use crate::import::{ImportOptions, Source, import};

    #[tokio::test]
    async fn what_a_machine_wrote_and_discarded_is_captured_upon_its_image() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("images")).unwrap();
        let raw = dir.path().join("disk.raw");
        let file = File::create(&raw).unwrap();
        file.set_len(32 << 20).unwrap();
        for at in [0u64, 5 << 20, 20 << 20] {
            file.write_all_at(&vec![7; 200_000], at).unwrap();
        }
        let (name, new) = (Reference::parse("base").unwrap(), Reference::parse("new").unwrap());
        let base = import(&store, Source::Raw(raw), &name, ImportOptions::default()).await.unwrap();
        let clone = store.clone_image(&base, &dir.path().join("machine"), Some(48 << 20), "m").unwrap();
        let disk = &clone.disks[0];
        let path = disk.path.to_str().unwrap();
        let format = if disk.format == DiskFormat::Qcow2 { "qcow2" } else { "raw" };
        // As a guest would: it writes a little, and trims a cluster that the image has.
        let output = Command::new("qemu-io")
            .args([
                "-f",
                format,
                "-d",
                "unmap",
                "-c",
                "write -P 9 5M 64k",
                "-c",
                "write -P 8 40M 1k",
                "-c",
                "write -z -u 20M 128k",
                path,
            ])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        let mut expected = vec![0; 48 << 20];
        for at in [0, 5 << 20, 20 << 20] {
            expected[at..at + 200_000].fill(7);
        }
        expected[5 << 20..(5 << 20) + (64 << 10)].fill(9);
        expected[40 << 20..(40 << 20) + (1 << 10)].fill(8);
        expected[20 << 20..(20 << 20) + (128 << 10)].fill(0);

        let disks = [CapturedDisk { path: disk.path.clone(), format: disk.format }];
        let options = || CaptureOptions {
            labels: BTreeMap::from([("built".to_owned(), "yes".to_owned())]),
            ..CaptureOptions::default()
        };
        let image = capture(&store, &base, &disks, &new, options()).await.unwrap();
        let found = std::fs::read(store.image_dir(image.digest).join("disk-0.raw")).unwrap();
        assert!(found == expected);
        assert_eq!((image.config.disks[0].size, image.config.labels["built"].as_str()), (48 << 20, "yes"));
        assert_eq!(store.verify(&image).unwrap(), []);

        let copies = DiskCopies::make(&store, &disks).unwrap();
        let again = capture(&store, &base, copies.disks(), &new, options()).await.unwrap();
        assert_eq!(again.digest, image.digest, "the same disk gives the same image");
        drop(copies);
        assert_eq!(std::fs::read_dir(store.dir().join("work")).unwrap().count(), 0);
        let error = capture(&store, &base, &[], &new, options()).await.unwrap_err();
        assert!(matches!(error, CaptureError::Disks { found: 0, expected: 1 }), "{error}");
    }
}
