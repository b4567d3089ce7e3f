//! Pushing images to a registry.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use tokio::sync::watch;

use crate::blobs::{BlobError, Retry};
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
    /// How often and how long to try again.
    pub retry: Retry,
    /// Where progress is published, a few times a second.
    pub progress: Option<watch::Sender<Progress>>,
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

/// Pushes the image that the store has as `from` to the registry as `to`, in the native format. Layers that the registry has aren't
/// sent. Returns the digest of the manifest there: the image's own, unless a layer had to be packed anew and came out
/// otherwise.
pub async fn push(store: &Store, from: &Reference, to: &Reference, options: PushOptions) -> Result<Digest, PushError> {
    if to.is_local() {
        return Err(PushError::Local(to.clone()));
    }
    let image = store.get(from)?.ok_or_else(|| PushError::NoImage(from.clone()))?;
    let report = Arc::new(Reporter::new(options.progress));
    let native = {
        let (store, image) = (store.clone(), image.clone());
        tokio::task::spawn_blocking(move || NativeImage::of(&store, &image))
            .await
            .map_err(|_| PushError::Stopped)?
            .map_err(|source| PushError::Native { reference: from.clone(), source })?
    };
    let failed = |source: RegistryError| PushError::Registry { reference: to.clone(), source };
    let access =
        Access { credentials: options.credentials, plain_http: options.plain_http, ca_files: options.ca_files };
    let mount = mount_source(&image, to);
    let repository = Repository::open(to, &access, true, mount.as_deref()).await.map_err(failed)?;

    let layers = native.distinct_layers();
    report.total(layers.iter().map(|layer| layer.size).sum());
    report.phase(Phase::Transferring);
    let largest = native.largest_window().max(1);
    let jobs = usize::try_from((MEMORY / largest).clamp(1, JOBS)).unwrap_or(1);
    let native = Arc::new(native);
    let upload = Upload {
        repository: &repository,
        native: &native,
        mount: mount.as_deref(),
        retry: options.retry,
        report: &report,
    };
    let changed: HashMap<Digest, Descriptor> = futures::stream::iter(layers)
        .map(|layer| upload.layer(layer).boxed())
        .buffer_unordered(jobs)
        .try_filter_map(async |changed| Ok(changed))
        .try_collect()
        .await
        .map_err(|error| match error {
            Failure::Registry(error) => failed(RegistryError::Request(error)),
            Failure::Native(source) => PushError::Native { reference: from.clone(), source },
        })?;
    report.phase(Phase::Finishing);
    let (config, manifest) =
        native.documents(&changed).map_err(|source| PushError::Native { reference: from.clone(), source })?;
    let finish = async {
        upload.blob(Digest::of(&config), config.clone().into()).await?;
        let digest = Digest::of(&manifest);
        let bytes = Bytes::from(manifest.clone());
        let version = to.tag().map_or_else(|| digest.to_string(), str::to_owned);
        again(options.retry, || repository.put_manifest(&version, crate::media::OCI_MANIFEST, bytes.clone())).await?;
        Ok(digest)
    };
    let digest = finish.await.map_err(|error: BlobError| failed(RegistryError::Request(error)))?;
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
}

impl From<BlobError> for Failure {
    fn from(error: BlobError) -> Self {
        Self::Registry(error)
    }
}

struct Upload<'a> {
    repository: &'a Repository,
    native: &'a Arc<NativeImage>,
    mount: Option<&'a str>,
    retry: Retry,
    report: &'a Reporter,
}

impl Upload<'_> {
    /// Makes sure that the registry has a layer. Returns its old digest and new descriptor when packing it gave other bytes.
    async fn layer(&self, layer: Descriptor) -> Result<Option<(Digest, Descriptor)>, Failure> {
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
        let native = Arc::clone(self.native);
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
