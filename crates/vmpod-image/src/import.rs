//! Making images from files.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

use crate::blobs::{BlobError, Retry};
use crate::config::{Architecture, Boot, Config, DiskConfig, Firmware, GuestConfig, Hardware, Os};
use crate::digest::{Digest, Hasher};
use crate::format::{self, FormatError, native};
use crate::image::Image;
use crate::ingest::{Disk, Ingest};
use crate::layout::Layout;
use crate::manifest::{Descriptor, Document};
use crate::media;
use crate::native::{NativeError, NativeImage};
use crate::progress::{Phase, Progress};
use crate::pull::{Incoming, bring, choose};
use crate::qcow2::{self, Qcow2, Qcow2Error};
use crate::reference::Reference;
use crate::store::files::io;
use crate::store::record::{FileRecord, Part, Record, Window, Windows};
use crate::store::work::{Finished, Work};
use crate::store::{Store, StoreError};
use crate::transfer::{Reporter, TransferError};

/// What to import.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A disk's bytes as they are; holes stay holes.
    Raw(PathBuf),
    /// A qcow2 file without backing file.
    Qcow2(PathBuf),
    /// An OCI image layout directory; its image carries its own configuration.
    OciLayout(PathBuf),
    /// No disk: the kernel and initial RAM disk named in the options are everything.
    Kernel,
}

impl Source {
    /// Looks at what is there: a directory is an OCI layout, a file is qcow2 if it says so, else raw.
    pub fn detect(path: &Path) -> Result<Self, ImportError> {
        let failed = io("read", path);
        let metadata = match std::fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) => return Err(failed(error).into()),
        };
        if metadata.is_dir() {
            return if Layout::is_at(path) {
                Ok(Self::OciLayout(path.to_owned()))
            } else {
                Err(ImportError::NoLayout(path.to_owned()))
            };
        }
        let mut magic = Vec::new();
        File::open(path).and_then(|file| file.take(512).read_to_end(&mut magic)).map_err(failed)?;
        if magic.get(257..262) == Some(b"ustar") {
            return Err(ImportError::Archive(path.to_owned()));
        }
        Ok(if magic.starts_with(&qcow2::MAGIC) { Self::Qcow2(path.to_owned()) } else { Self::Raw(path.to_owned()) })
    }
}

/// What the new image says about itself. An OCI layout's image says it itself: then only `progress` counts.
#[derive(Debug, Clone)]
pub struct ImportOptions {
    /// The guest's operating system.
    pub os: Os,
    /// Its architecture.
    pub architecture: Architecture,
    /// The firmware, when no kernel is given.
    pub firmware: Firmware,
    /// A kernel to boot directly.
    pub kernel: Option<PathBuf>,
    /// Its initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub cmdline: String,
    /// The fewest processors.
    pub min_cpus: Option<u32>,
    /// The least memory, bytes.
    pub min_memory: Option<u64>,
    /// What other hardware the guest needs.
    pub hardware: Hardware,
    /// How to reach the guest.
    pub guest: GuestConfig,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Where progress is published.
    pub progress: Option<watch::Sender<Progress>>,
}

impl Default for ImportOptions {
    fn default() -> Self {
        Self {
            os: Os::Linux,
            architecture: Architecture::host(),
            firmware: Firmware::Uefi,
            kernel: None,
            initrd: None,
            cmdline: String::new(),
            min_cpus: None,
            min_memory: None,
            hardware: Hardware::default(),
            guest: GuestConfig::default(),
            labels: BTreeMap::new(),
            progress: None,
        }
    }
}

/// Why an import or export failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// A file or the store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Neither a disk nor a kernel.
    #[error("there is nothing to import: name a disk, an OCI layout or a kernel")]
    Nothing,
    /// An initial RAM disk or command line that nothing would use.
    #[error("an initial RAM disk or a kernel command line needs a kernel")]
    NoKernel,
    /// A directory that is something else.
    #[error("{0} is a directory but no OCI image layout (it has no file oci-layout)")]
    NoLayout(PathBuf),
    /// An empty file.
    #[error("{0} is empty: it is no disk")]
    Empty(PathBuf),
    /// A layout without an image, or with several and none of them named.
    #[error("{path} holds {count} images, none of them tagged {tag:?} or for this host: import one by its tag", path = path.display())]
    Ambiguous {
        /// The layout.
        path: PathBuf,
        /// How many images it holds.
        count: usize,
        /// The tag that was looked for.
        tag: String,
    },
    /// A qcow2 file that can't be read.
    #[error("{path} can't be imported", path = path.display())]
    Qcow2 {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Qcow2Error,
    },
    /// A disk that can't be read, packed or written.
    #[error("couldn't import {path}", path = path.display())]
    Ingest {
        /// The disk.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// A blob of a layout.
    #[error("the OCI layout {path} is damaged", path = path.display())]
    Layout {
        /// The layout.
        path: PathBuf,
        /// What is wrong with it.
        source: BlobError,
    },
    /// A manifest of a layout.
    #[error("a manifest of the OCI layout {path} can't be read", path = path.display())]
    Manifest {
        /// The layout.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// An image of no known format.
    #[error("the image in {path} can't be used", path = path.display())]
    Format {
        /// The layout.
        path: PathBuf,
        /// What is wrong with it.
        source: FormatError,
    },
    /// The bytes of a layout's image.
    #[error("couldn't import {path}", path = path.display())]
    Transfer {
        /// The layout.
        path: PathBuf,
        /// What happened.
        source: Box<TransferError>,
    },
    /// The native form couldn't be made.
    #[error("couldn't make the native form of {image}")]
    Native {
        /// The image.
        image: Digest,
        /// What happened.
        source: Box<NativeError>,
    },
    /// A tar archive where a disk was expected.
    #[error("{0} is a tar archive, no disk: unpack it, and import the disk or the OCI layout in it")]
    Archive(PathBuf),
    /// A configuration that can't be written.
    #[error("couldn't write the configuration")]
    Json(#[source] serde_json::Error),
    /// The runtime is shutting down.
    #[error("stopped")]
    Stopped,
}

/// Puts `source` into the store under the name `reference`, replacing what had the name before. The same source and options give the
/// same digest.
pub async fn import(
    store: &Store,
    source: Source,
    reference: &Reference,
    mut options: ImportOptions,
) -> Result<Image, ImportError> {
    let report = Arc::new(Reporter::new(options.progress.take()));
    if let Source::OciLayout(path) = source {
        return import_layout(store, &path, reference, &report).await;
    }
    let cancelled = CancelOnDrop(Arc::new(AtomicBool::new(false)));
    let (store, reference, flag) = (store.clone(), reference.clone(), Arc::clone(&cancelled.0));
    tokio::task::spawn_blocking(move || import_files(&store, &source, &reference, options, &report, &flag))
        .await
        .map_err(|_| ImportError::Stopped)?
}

/// Stops the threads of an import whose future was dropped.
struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn import_files(
    store: &Store,
    source: &Source,
    reference: &Reference,
    options: ImportOptions,
    report: &Reporter,
    cancelled: &AtomicBool,
) -> Result<Image, ImportError> {
    if options.kernel.is_none() && (options.initrd.is_some() || !options.cmdline.is_empty()) {
        return Err(ImportError::NoKernel);
    }
    let disk = match source {
        Source::Raw(path) => Some((path, open_raw(path)?)),
        Source::Qcow2(path) => Some((path, open_qcow2(path)?)),
        Source::Kernel if options.kernel.is_none() => return Err(ImportError::Nothing),
        Source::Kernel | Source::OciLayout(_) => None,
    };
    let work = Work::scratch(store)?;
    let result = import_into(
        store,
        &work,
        disk.as_ref().map(|(path, disk)| (path.as_path(), disk)),
        reference,
        options,
        report,
        cancelled,
    );
    if result.is_err() {
        // The next opening of the store would remove it, too.
        work.discard()?;
    }
    result
}

fn open_raw(path: &Path) -> Result<Disk, ImportError> {
    let disk = File::open(path).and_then(Disk::raw).map_err(io("read", path))?;
    if disk.size() == 0 {
        return Err(ImportError::Empty(path.to_owned()));
    }
    Ok(disk)
}

fn open_qcow2(path: &Path) -> Result<Disk, ImportError> {
    let failed = |source| ImportError::Qcow2 { path: path.to_owned(), source };
    let disk = Qcow2::open(File::open(path).map_err(io("read", path))?).map_err(failed)?;
    if disk.size() == 0 {
        return Err(ImportError::Empty(path.to_owned()));
    }
    Ok(Disk::Qcow2(disk))
}

fn import_into(
    store: &Store,
    work: &Work,
    disk: Option<(&Path, &Disk)>,
    reference: &Reference,
    options: ImportOptions,
    report: &Reporter,
    cancelled: &AtomicBool,
) -> Result<Image, ImportError> {
    let mut layers = Vec::new();
    let mut records = Vec::new();
    for (part, path) in [(Part::Kernel, &options.kernel), (Part::Initrd, &options.initrd)] {
        if let Some(path) = path {
            let record = copy_file(path, &work.dir().join(part.file_name()), part)?;
            layers.push(Descriptor::new(native::media_type(part), record.digest, record.size));
            records.push(record);
        }
    }
    let mut disks = Vec::new();
    let mut windows = Windows::default();
    if let Some((path, disk)) = disk {
        report.total(disk.size());
        report.phase(Phase::Transferring);
        let size = disk.size().next_multiple_of(512);
        let chunks = ingest(path, disk, size, &work.dir().join(Part::Disk(0).file_name()), report, cancelled)?;
        layers.extend(chunks.iter().map(|chunk| chunk.descriptor(0)));
        let window =
            |chunk: &native::Chunk| Window { offset: chunk.offset, size: chunk.raw_size, digest: chunk.raw_digest };
        windows.disks.push(chunks.iter().map(window).collect());
        disks.push(DiskConfig { size });
    }
    report.phase(Phase::Finishing);
    let boot = match options.kernel {
        Some(_) => Boot::Kernel { cmdline: options.cmdline },
        None => Boot::Firmware(options.firmware),
    };
    let config = Config {
        os: options.os,
        architecture: options.architecture,
        boot,
        disks,
        min_cpus: options.min_cpus,
        min_memory: options.min_memory,
        macos: None,
        hardware: options.hardware,
        guest: options.guest,
        labels: options.labels,
    };
    let config_bytes = serde_json::to_vec(&config).map_err(ImportError::Json)?;
    let manifest = native::manifest(&config_bytes, layers, BTreeMap::new());
    let bytes = serde_json::to_vec(&manifest).map_err(ImportError::Json)?;
    let mut record =
        Record::new(Digest::of(&bytes), native::NAME, jiff::Timestamp::now(), config, manifest.transfer_bytes());
    record.files = records;
    let image =
        work.publish(store, &Finished { record, windows, manifest: &bytes, config: &config_bytes }, reference)?;
    report.phase(Phase::Done);
    Ok(image)
}

pub(crate) fn ingest(
    path: &Path,
    disk: &Disk,
    size: u64,
    to: &Path,
    report: &Reporter,
    cancelled: &AtomicBool,
) -> Result<Vec<native::Chunk>, ImportError> {
    // Where the file system shares blocks, the copy costs nothing. It is read from then on: the source may change meanwhile.
    let shared = match disk {
        Disk::Raw { .. } => reflink_copy::reflink(path, to).is_ok(),
        Disk::Qcow2(_) => false,
    };
    let file = File::options().read(true).write(true).create(true).truncate(false).open(to).map_err(io("open", to))?;
    file.set_len(size).map_err(io("set the size of", to))?;
    let copy = if shared { Some(Disk::Raw { file: file.try_clone().map_err(io("open", to))?, size }) } else { None };
    let ingest = Ingest {
        disk: copy.as_ref().unwrap_or(disk),
        window: native::window(size),
        copy_to: if shared { None } else { Some(&file) },
        pack: true,
        cancelled,
        done: &|bytes| report.advance(bytes),
    };
    ingest.run().map_err(|source| ImportError::Ingest { path: path.to_owned(), source })
}

fn copy_file(from: &Path, to: &Path, part: Part) -> Result<FileRecord, StoreError> {
    let mut source = File::open(from).map_err(io("read", from))?;
    let mut target = File::create(to).map_err(io("make", to))?;
    let mut hasher = Hasher::new();
    let mut size = 0;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let have = source.read(&mut buffer).map_err(io("read", from))?;
        if have == 0 {
            return Ok(FileRecord { part, size, digest: hasher.finish() });
        }
        hasher.update(&buffer[..have]);
        std::io::Write::write_all(&mut target, &buffer[..have]).map_err(io("write", to))?;
        size += have as u64;
    }
}

async fn import_layout(
    store: &Store,
    path: &Path,
    reference: &Reference,
    report: &Arc<Reporter>,
) -> Result<Image, ImportError> {
    if !Layout::is_at(path) {
        return Err(ImportError::NoLayout(path.to_owned()));
    }
    let layout = Layout::new(path);
    let index = layout.index()?.ok_or_else(|| ImportError::NoLayout(path.to_owned()))?;
    let tag = reference.tag().unwrap_or_default();
    let tagged = |entry: &&Descriptor| entry.annotations.get(media::OCI_REF_NAME).is_some_and(|name| name == tag);
    let platform = (Os::Linux, Architecture::host());
    let by_platform =
        || choose(&index, platform).and_then(|digest| index.manifests.iter().find(|entry| entry.digest == digest));
    let ambiguous =
        || ImportError::Ambiguous { path: path.to_owned(), count: index.manifests.len(), tag: tag.to_owned() };
    let mut descriptor = index.manifests.iter().find(tagged).or_else(by_platform).cloned().ok_or_else(ambiguous)?;
    let damaged = |source| ImportError::Layout { path: path.to_owned(), source };
    let unreadable = |source| ImportError::Manifest { path: path.to_owned(), source };
    let mut nested = 0;
    let (bytes, manifest) = loop {
        let bytes = layout.read(&descriptor).map_err(damaged)?;
        match Document::parse(&bytes).map_err(unreadable)? {
            Document::Manifest(manifest) => break (bytes, manifest),
            Document::Index(index) => {
                nested += 1;
                let chosen = choose(&index, platform).filter(|_| nested < 4).ok_or_else(ambiguous)?;
                descriptor = Descriptor::new(media::OCI_MANIFEST, chosen, 0);
            }
        }
    };
    let config = layout.read(&manifest.config).map_err(damaged)?;
    let mut documents = format::Documents::new();
    let broken = |source| ImportError::Format { path: path.to_owned(), source };
    for document in format::documents(&manifest).map_err(broken)? {
        let bytes = layout.read(&Descriptor::new("", document, 0)).map_err(damaged)?;
        documents.insert(document, bytes);
    }
    let plan = format::plan(&manifest, &config, &documents).map_err(broken)?;
    let digest = Digest::of(&bytes);
    if store.record(digest)?.is_some() {
        store.tag(digest, reference)?;
        return store.image(digest)?.ok_or_else(|| StoreError::NoImage(digest).into());
    }
    let incoming = Incoming { digest, manifest: &manifest, manifest_bytes: &bytes, config: &config, plan: &plan };
    bring(store, reference, incoming, Arc::new(layout), Retry::default(), report).await.map_err(|source| match source {
        TransferError::Store(source) => ImportError::Store(source),
        source => ImportError::Transfer { path: path.to_owned(), source: Box::new(source) },
    })
}

/// Makes the native form of an image of another format, under the name `to`. The disks are shared, not copied. A native image just gets
/// the name.
pub async fn convert(store: &Store, image: &Image, to: &Reference) -> Result<Image, ImportError> {
    let (store, image, to) = (store.clone(), image.clone(), to.clone());
    tokio::task::spawn_blocking(move || convert_blocking(&store, &image, &to))
        .await
        .map_err(|_| ImportError::Stopped)?
}

fn convert_blocking(store: &Store, image: &Image, to: &Reference) -> Result<Image, ImportError> {
    if image.format == native::NAME {
        store.tag(image.digest, to)?;
        return store.image(image.digest)?.ok_or_else(|| StoreError::NoImage(image.digest).into());
    }
    let failed = |source| ImportError::Native { image: image.digest, source: Box::new(source) };
    let from = store.record(image.digest)?.ok_or(StoreError::NoImage(image.digest))?;
    let native = NativeImage::of(store, image).map_err(failed)?;
    let (config, manifest) = native.documents(&HashMap::new(), &BTreeMap::new()).map_err(failed)?;
    let known: Config = serde_json::from_slice(&config).map_err(ImportError::Json)?;
    let work = Work::scratch(store)?;
    let disks = (0..known.disks.len()).map(Part::Disk);
    for part in disks.chain(from.files.iter().map(|file| file.part)) {
        let (source, target) =
            (store.image_dir(image.digest).join(part.file_name()), work.dir().join(part.file_name()));
        std::fs::hard_link(&source, &target).map_err(io("share", &source))?;
    }
    let windows = native.disk_windows();
    let mut record =
        Record::new(Digest::of(&manifest), native::NAME, jiff::Timestamp::now(), known, native.transfer_bytes());
    record.files = from.files;
    Ok(work.publish(store, &Finished { record, windows, manifest: &manifest, config: &config }, to)?)
}
