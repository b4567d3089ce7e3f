//! Pushing images to a registry.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use tokio::sync::watch;

use crate::blobs::{BlobError, Retry};
use crate::containerdisk::ContainerDisk;
use crate::credentials::Credentials;
use crate::digest::Digest;
use crate::image::Image;
use crate::manifest::Descriptor;
use crate::native::{NativeError, NativeImage};
use crate::progress::{Phase, Progress};
use crate::pull::again;
use crate::reference::Reference;
use crate::registry::upload::Begun;
use crate::registry::{Access, RegistryError, Repository};
use crate::store::files::io;
use crate::store::work::Work;
use crate::store::{Store, StoreError};
use crate::transfer::Reporter;

/// Layers on their way at once.
const JOBS: u64 = 8;
/// Bytes of windows in memory, roughly.
const MEMORY: u64 = 32 << 20;

/// How to reach the registry.
#[derive(Debug, Clone, Default)]
pub struct PushOptions {
    /// Who to be.
    pub credentials: Credentials,
    /// Hosts (`host[:port]`) that may be spoken to without TLS. Loopback hosts may always.
    pub plain_http: Vec<String>,
    /// More certificate authorities to trust: PEM files.
    pub ca_files: Vec<PathBuf>,
    /// What is made of the image.
    pub format: PushFormat,
    /// Annotations for the manifest, such as [`crate::media::OCI_SOURCE`]. They change its digest.
    pub annotations: BTreeMap<String, String>,
    /// A repository of the same registry that may have the layers already, besides those that the image came from.
    pub mount_from: Option<String>,
    /// How often and how long to try again.
    pub retry: Retry,
    /// Where progress is published, a few times a second.
    pub progress: Option<watch::Sender<Progress>>,
}

/// What an image is pushed as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum PushFormat {
    /// The native format.
    #[default]
    Native,
    /// A `KubeVirt` containerDisk.
    ContainerDisk,
}

/// Why a push failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    /// The target has no registry.
    #[error("{0} names no registry to push to: write HOST/REPOSITORY:TAG")]
    Local(Reference),
    /// The source isn't here.
    #[error("image {0} is not in the store")]
    NoImage(Reference),
    /// The registry can't be spoken to, or failed.
    #[error("couldn't push to {reference}")]
    Registry {
        /// The target.
        reference: Reference,
        /// What happened.
        source: RegistryError,
    },
    /// The image couldn't be brought into the native form.
    #[error("couldn't make the native form of {reference}")]
    Native {
        /// The source.
        reference: Reference,
        /// What happened.
        source: NativeError,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The runtime is shutting down.
    #[error("the push was stopped")]
    Stopped,
}

impl PushError {
    /// Whether trying again later may help.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Registry { source: RegistryError::Request(error), .. } if error.is_transient())
    }
}

/// Pushes the image that the store has as `from` to the registry as `to`. Layers that the registry has aren't sent. Returns the digest
/// of the manifest there: in the native format and without annotations the image's own, unless a layer had to be packed anew
/// and came out otherwise.
pub async fn push(store: &Store, from: &Reference, to: &Reference, options: PushOptions) -> Result<Digest, PushError> {
    if to.is_local() {
        return Err(PushError::Local(to.clone()));
    }
    let image = store.get(from)?.ok_or_else(|| PushError::NoImage(from.clone()))?;
    let report = Reporter::new(options.progress);
    let mount = options.mount_from.or_else(|| mount_source(&image, to));
    let failed = |error: Failure| match error {
        Failure::Registry(error) => {
            PushError::Registry { reference: to.clone(), source: RegistryError::Request(error) }
        }
        Failure::Native(source) => PushError::Native { reference: from.clone(), source },
        Failure::Store(source) => PushError::Store(source),
        Failure::Stopped => PushError::Stopped,
    };
    let access =
        Access { credentials: options.credentials, plain_http: options.plain_http, ca_files: options.ca_files };
    let repository = Repository::open(to, &access, true, mount.as_deref())
        .await
        .map_err(|source| PushError::Registry { reference: to.clone(), source })?;
    let upload = Upload { repository: &repository, mount: mount.as_deref(), retry: options.retry, report: &report };
    let made = match options.format {
        PushFormat::Native => upload.native(store, &image, &options.annotations).await,
        PushFormat::ContainerDisk => upload.container_disk(store, &image, &options.annotations).await,
    };
    let (config, manifest) = made.map_err(failed)?;
    report.phase(Phase::Finishing);
    let digest = upload.finish(config, manifest, to).await.map_err(|error| failed(error.into()))?;
    report.phase(Phase::Done);
    Ok(digest)
}

/// Another repository of the target's registry that has this image.
fn mount_source(image: &Image, to: &Reference) -> Option<String> {
    image
        .references
        .iter()
        .find(|reference| reference.registry() == to.registry() && reference.repository() != to.repository())
        .map(|reference| reference.repository().to_owned())
}

enum Failure {
    Registry(BlobError),
    Native(NativeError),
    Store(StoreError),
    Stopped,
}

impl From<BlobError> for Failure {
    fn from(error: BlobError) -> Self {
        Self::Registry(error)
    }
}

struct Upload<'a> {
    repository: &'a Repository,
    mount: Option<&'a str>,
    retry: Retry,
    report: &'a Reporter,
}

impl Upload<'_> {
    /// Sends the layers of the native form. Returns the configuration and the manifest.
    async fn native(
        &self,
        store: &Store,
        image: &Image,
        annotations: &BTreeMap<String, String>,
    ) -> Result<(Vec<u8>, Vec<u8>), Failure> {
        let native = {
            let (store, image) = (store.clone(), image.clone());
            tokio::task::spawn_blocking(move || NativeImage::of(&store, &image))
                .await
                .map_err(|_| Failure::Stopped)?
                .map_err(Failure::Native)?
        };
        let layers = native.distinct_layers();
        self.report.total(layers.iter().map(|layer| layer.size).sum());
        self.report.phase(Phase::Transferring);
        let largest = native.largest_window().max(1);
        let jobs = usize::try_from((MEMORY / largest).clamp(1, JOBS)).unwrap_or(1);
        let native = Arc::new(native);
        let changed: HashMap<Digest, Descriptor> = futures::stream::iter(layers)
            .map(|layer| self.layer(&native, layer).boxed())
            .buffer_unordered(jobs)
            .try_filter_map(async |changed| Ok(changed))
            .try_collect()
            .await?;
        native.documents(&changed, annotations).map_err(Failure::Native)
    }

    /// Packs the disk as a containerDisk's layer, in a file of the store that goes afterwards, and sends it.
    async fn container_disk(
        &self,
        store: &Store,
        image: &Image,
        annotations: &BTreeMap<String, String>,
    ) -> Result<(Vec<u8>, Vec<u8>), Failure> {
        let work = Work::scratch(store).map_err(Failure::Store)?;
        let made = {
            let (store, image, annotations) = (store.clone(), image.clone(), annotations.clone());
            let layer = work.dir().join("layer");
            tokio::task::spawn_blocking(move || ContainerDisk::make(&store, &image, &layer, &annotations))
                .await
                .map_err(|_| Failure::Stopped)?
        };
        let sent = match made.map_err(Failure::Native) {
            Ok(made) => self.layer_file(&made).await.map(|()| (made.config, made.manifest)),
            Err(error) => Err(error),
        };
        work.discard().map_err(Failure::Store)?;
        sent
    }

    async fn layer_file(&self, made: &ContainerDisk) -> Result<(), Failure> {
        let (digest, size) = (made.layer.digest, made.layer.size);
        self.report.total(size);
        self.report.phase(Phase::Transferring);
        if again(self.retry, || self.repository.has_blob(digest)).await? {
            self.report.reuse(size);
            return Ok(());
        }
        match again(self.retry, || self.repository.begin(digest, self.mount)).await? {
            Begun::Mounted => self.report.reuse(size),
            Begun::Upload(at) => {
                let path = &made.layer_file;
                let file = File::open(path).map_err(|error| Failure::Store(io("open", path)(error)))?;
                let file = (&Arc::new(file), size);
                self.repository.upload_file(at, digest, file, self.retry, |bytes| self.report.advance(bytes)).await?;
            }
        }
        Ok(())
    }

    /// Sends the configuration and the manifest. Returns the manifest's digest.
    async fn finish(&self, config: Vec<u8>, manifest: Vec<u8>, to: &Reference) -> Result<Digest, BlobError> {
        self.blob(Digest::of(&config), config.into()).await?;
        let digest = Digest::of(&manifest);
        let bytes = Bytes::from(manifest);
        let version = to.tag().map_or_else(|| digest.to_string(), str::to_owned);
        again(self.retry, || self.repository.put_manifest(&version, crate::media::OCI_MANIFEST, bytes.clone())).await?;
        Ok(digest)
    }

    /// Makes sure that the registry has a layer. Returns its old digest and new descriptor when packing it gave other bytes.
    async fn layer(
        &self,
        native: &Arc<NativeImage>,
        layer: Descriptor,
    ) -> Result<Option<(Digest, Descriptor)>, Failure> {
        if again(self.retry, || self.repository.has_blob(layer.digest)).await? {
            self.report.reuse(layer.size);
            return Ok(None);
        }
        if self.mount.is_some()
            && again(self.retry, || self.repository.begin(layer.digest, self.mount)).await? == Begun::Mounted
        {
            self.report.reuse(layer.size);
            return Ok(None);
        }
        let native = Arc::clone(native);
        let asked = layer.clone();
        let packed = tokio::task::spawn_blocking(move || native.pack(&asked))
            .await
            .map_err(|_| Failure::Native(NativeError::Stopped))?
            .map_err(Failure::Native)?;
        let digest = Digest::of(&packed);
        let size = packed.len() as u64;
        self.blob(digest, packed.into()).await?;
        self.report.advance(layer.size);
        if digest == layer.digest {
            return Ok(None);
        }
        Ok(Some((layer.digest, Descriptor { digest, size, ..layer })))
    }

    async fn blob(&self, digest: Digest, bytes: Bytes) -> Result<(), BlobError> {
        if again(self.retry, || self.repository.has_blob(digest)).await? {
            return Ok(());
        }
        again(self.retry, || {
            let bytes = bytes.clone();
            async move {
                match self.repository.begin(digest, None).await? {
                    Begun::Mounted => Ok(()),
                    Begun::Upload(at) => self.repository.upload(at, digest, bytes).await,
                }
            }
        })
        .await
    }
}

/// Reads a range of a file.
pub(crate) fn read_range(file: &File, offset: u64, size: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(size).map_err(std::io::Error::other)?];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}
