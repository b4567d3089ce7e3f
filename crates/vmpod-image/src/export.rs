//! Making files from images.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::containerdisk::ContainerDisk;
use crate::digest::Digest;
use crate::image::Image;
use crate::layout::Layout;
use crate::manifest::{Descriptor, Platform};
use crate::media;
use crate::native::{NativeError, NativeImage};
use crate::qcow2::Writer;
use crate::reference::Reference;
use crate::store::files::{self, io};
use crate::store::record::Part;
use crate::store::{Store, StoreError};

/// What an image is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExportFormat {
    /// An OCI image layout (a directory) in the native format.
    OciLayout,
    /// An OCI image layout that holds a `KubeVirt` containerDisk.
    ContainerDisk,
    /// The first disk as it is, holes left out.
    Raw,
    /// The first disk as a qcow2 file that stands alone.
    Qcow2,
}

/// Why an export failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// A file or the store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The image couldn't be packed.
    #[error("couldn't pack {image}")]
    Pack {
        /// The image.
        image: Digest,
        /// What happened.
        source: Box<NativeError>,
    },
    /// An image of a kernel alone.
    #[error("image {0} has no disk to export")]
    NoDisk(Digest),
    /// The runtime is shutting down.
    #[error("stopped")]
    Stopped,
}

/// Writes `image` to `path`. A directory (an OCI layout) may hold other images already; the image's tag there is that of `name`. A
/// file is replaced once the new one is whole.
pub async fn export(
    store: &Store,
    image: &Image,
    path: &Path,
    format: ExportFormat,
    name: &Reference,
) -> Result<(), ExportError> {
    let (store, image, path) = (store.clone(), image.clone(), path.to_owned());
    let tag = name.tag().unwrap_or("latest").to_owned();
    tokio::task::spawn_blocking(move || match format {
        ExportFormat::OciLayout => layout(&store, &image, &path, &tag),
        ExportFormat::ContainerDisk => container_disk(&store, &image, &path, &tag),
        ExportFormat::Raw => disk_file(&store, &image, &path, files::copy_sparse),
        ExportFormat::Qcow2 => disk_file(&store, &image, &path, write_qcow2),
    })
    .await
    .map_err(|_| ExportError::Stopped)?
}

/// Writes `image` in the native format as an OCI image layout: [`export`] with [`ExportFormat::OciLayout`].
pub async fn export_oci_layout(store: &Store, image: &Image, path: &Path, name: &Reference) -> Result<(), ExportError> {
    export(store, image, path, ExportFormat::OciLayout, name).await
}

fn pack_failed(image: &Image) -> impl Fn(NativeError) -> ExportError + use<> {
    let image = image.digest;
    move |source| ExportError::Pack { image, source: Box::new(source) }
}

fn layout(store: &Store, image: &Image, path: &Path, tag: &str) -> Result<(), ExportError> {
    let failed = pack_failed(image);
    let native = NativeImage::of(store, image).map_err(&failed)?;
    let layout = Layout::make(path)?;
    let layers = native.distinct_layers();
    let next = AtomicUsize::new(0);
    let changed = Mutex::new(HashMap::new());
    let failure = Mutex::new(None);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(layer) = layers.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match native.write_layer(layer, |digest| layout.path(digest)) {
                        Ok(None) => {}
                        Ok(Some(new)) => {
                            changed.lock().unwrap_or_else(PoisonError::into_inner).insert(layer.digest, new);
                        }
                        Err(error) => {
                            next.store(layers.len(), Ordering::Relaxed);
                            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                        }
                    }
                }
            });
        }
    });
    if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(failed(error));
    }
    let changed = changed.into_inner().unwrap_or_else(PoisonError::into_inner);
    let (config, manifest) = native.documents(&changed, &BTreeMap::new()).map_err(&failed)?;
    files::write_whole(&layout.path(Digest::of(&config)), &config)?;
    let digest = Digest::of(&manifest);
    files::write_whole(&layout.path(digest), &manifest)?;
    let mut descriptor = Descriptor::new(media::OCI_MANIFEST, digest, manifest.len() as u64);
    descriptor.artifact_type = Some(media::ARTIFACT.to_owned());
    layout.add(descriptor, tag)?;
    Ok(())
}

fn container_disk(store: &Store, image: &Image, path: &Path, tag: &str) -> Result<(), ExportError> {
    let layout = Layout::make(path)?;
    let scratch = Scratch::in_dir(path)?;
    let made = ContainerDisk::make(store, image, scratch.path(), &BTreeMap::new()).map_err(pack_failed(image))?;
    scratch.put(&layout.path(made.layer.digest))?;
    files::write_whole(&layout.path(Digest::of(&made.config)), &made.config)?;
    let digest = Digest::of(&made.manifest);
    files::write_whole(&layout.path(digest), &made.manifest)?;
    let mut descriptor = Descriptor::new(media::OCI_MANIFEST, digest, made.manifest.len() as u64);
    descriptor.platform =
        Some(Platform { os: "linux".to_owned(), architecture: image.config.architecture.to_string() });
    layout.add(descriptor, tag)?;
    Ok(())
}

fn disk_file(
    store: &Store,
    image: &Image,
    path: &Path,
    write: impl Fn(&Path, &Path) -> Result<(), StoreError>,
) -> Result<(), ExportError> {
    if image.config.disks.is_empty() {
        return Err(ExportError::NoDisk(image.digest));
    }
    let record = store.record(image.digest)?.ok_or(StoreError::NoImage(image.digest))?;
    store.check_seal(image, &record)?;
    let from = store.image_dir(image.digest).join(Part::Disk(0).file_name());
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let scratch = Scratch::in_dir(dir)?;
    write(&from, scratch.path())?;
    scratch.put(path)?;
    Ok(())
}

/// A file beside the one that it becomes; gone unless it does.
struct Scratch {
    path: tempfile::TempPath,
}

impl Scratch {
    fn in_dir(dir: &Path) -> Result<Self, StoreError> {
        let file = tempfile::Builder::new().prefix(".vmpod-").tempfile_in(dir).map_err(io("make a file in", dir))?;
        Ok(Self { path: file.into_temp_path() })
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn put(self, to: &Path) -> Result<(), StoreError> {
        let from: PathBuf = self.path.to_path_buf();
        // An export is the user's own file, unlike what the store keeps.
        let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        std::fs::set_permissions(&from, readable).map_err(io("make readable", &from))?;
        files::sync_file(&from)?;
        self.path.persist(to).map_err(|error| io("put in place", to)(error.error))
    }
}

fn write_qcow2(from: &Path, to: &Path) -> Result<(), StoreError> {
    let disk = File::open(from).map_err(io("open", from))?;
    let writer = Writer::new(&disk).map_err(io("read", from))?;
    let target = File::create(to).map_err(io("make", to))?;
    let mut out = std::io::BufWriter::with_capacity(1 << 20, target);
    writer.write(&mut out).and_then(|()| out.flush()).map_err(io("write", to))
}
