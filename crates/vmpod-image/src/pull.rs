//! Pulling images from a registry.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::watch;

use crate::blobs::{BlobError, BlobErrorKind, Blobs, Retry};
use crate::config::{Architecture, Os};
use crate::credentials::Credentials;
use crate::digest::Digest;
use crate::format::{self, Documents, FormatError, Plan};
use crate::image::Image;
use crate::manifest::{Document, Index, Manifest};
use crate::mirror::{Mirror, Sources};
use crate::progress::{Phase, Progress};
use crate::reference::Reference;
use crate::registry::{Access, RegistryError};
use crate::signature::{self, SignatureError, SignaturePolicy};
use crate::store::record::Record;
use crate::store::work::{Finished, Work};
use crate::store::{Store, StoreError};
use crate::transfer::{Reporter, TransferError, assemble, transfer};

/// Indexes within indexes beyond this are a trap.
const MOST_INDEXES: usize = 4;

/// How to reach a registry, and what to take from it.
#[derive(Debug, Clone, Default)]
pub struct PullOptions {
    /// Who to be.
    pub credentials: Credentials,
    /// Hosts (`host[:port]`) that may be spoken to without TLS. Loopback hosts may always.
    pub plain_http: Vec<String>,
    /// More certificate authorities to trust: PEM files.
    pub ca_files: Vec<PathBuf>,
    /// The platform to choose from an index; this host's architecture unless given.
    pub platform: Option<(Os, Architecture)>,
    /// Registries to ask first.
    pub mirrors: Vec<Mirror>,
    /// Which images must be signed. Those that none of these cover needn't be.
    pub signatures: Vec<SignaturePolicy>,
    /// How often and how long to try again.
    pub retry: Retry,
    /// Where progress is published, a few times a second.
    pub progress: Option<watch::Sender<Progress>>,
}

/// Why a pull failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// The name has no registry.
    #[error("image {0} is not in the store, and a name without a registry host is never pulled")]
    Local(Reference),
    /// The registry has no such image.
    #[error("registry {host} has no image {reference}")]
    NotFound {
        /// The registry.
        host: String,
        /// The image.
        reference: Reference,
    },
    /// The registry refuses us.
    #[error("registry {host} refuses access to {reference}: check that it exists and that the credentials are right")]
    Denied {
        /// The registry.
        host: String,
        /// The image.
        reference: Reference,
        /// What it said.
        source: BlobError,
    },
    /// The registry can't be spoken to, or failed.
    #[error("couldn't pull {reference}")]
    Registry {
        /// The image.
        reference: Reference,
        /// What happened.
        source: RegistryError,
    },
    /// The manifest isn't one.
    #[error("the manifest of {reference} can't be read")]
    Manifest {
        /// The image.
        reference: Reference,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The index has nothing for this platform.
    #[error("{reference} has no image for {wanted}, only for {found}")]
    Platform {
        /// The image.
        reference: Reference,
        /// The platform wanted.
        wanted: String,
        /// Those there are.
        found: String,
    },
    /// The image is of no format that can be read, or a broken one.
    #[error("image {reference} can't be used")]
    Format {
        /// The image.
        reference: Reference,
        /// What is wrong with it.
        source: FormatError,
    },
    /// Nobody vouches for it.
    #[error("image {reference} is refused")]
    Signature {
        /// The image.
        reference: Reference,
        /// Why.
        source: SignatureError,
    },
    /// Its bytes.
    #[error("couldn't pull {reference}")]
    Transfer {
        /// The image.
        reference: Reference,
        /// What happened.
        source: TransferError,
    },
    /// The store.
    #[error("couldn't keep {reference} in the image store")]
    Store {
        /// The image.
        reference: Reference,
        /// What happened.
        source: StoreError,
    },
}

impl PullError {
    /// Whether trying again later may help: false for a missing image, a refusal or a broken image.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Registry { source: RegistryError::Request(error), .. }
            | Self::Transfer { source: TransferError::Fetch { source: error, .. }, .. } => error.is_transient(),
            Self::Signature { source: SignatureError::Fetch { source: error, .. }, .. } => error.is_transient(),
            Self::Transfer {
                source: TransferError::Wrong { .. } | TransferError::Store(_) | TransferError::Stopped,
                ..
            }
            | Self::Store { .. } => true,
            _ => false,
        }
    }
}

/// Makes sure that `reference` is in the store as the registry has it now. Bytes that are here are not fetched again; two pulls
/// of one image, in one process or several, are one. Dropping the future stops the pull; the next one goes on where it was.
pub async fn pull(store: &Store, reference: &Reference, options: PullOptions) -> Result<Image, PullError> {
    let Some(host) = reference.registry() else { return Err(PullError::Local(reference.clone())) };
    let report = Arc::new(Reporter::new(options.progress));
    let access =
        Access { credentials: options.credentials, plain_http: options.plain_http, ca_files: options.ca_files };
    let failed = |source: RegistryError| match source {
        RegistryError::Request(error) if error.kind == BlobErrorKind::Missing => {
            PullError::NotFound { host: host.to_owned(), reference: reference.clone() }
        }
        RegistryError::Request(source) if source.kind == BlobErrorKind::Denied => {
            PullError::Denied { host: host.to_owned(), reference: reference.clone(), source }
        }
        source => PullError::Registry { reference: reference.clone(), source },
    };
    let repository = Arc::new(Sources::open(reference, &options.mirrors, &access).await.map_err(failed)?);
    let unreadable = |source| PullError::Manifest { reference: reference.clone(), source };
    let platform = options.platform.unwrap_or((Os::Linux, Architecture::host()));

    let mut version = reference.version();
    let mut signed = false;
    let mut indexes = 0;
    let (digest, bytes, manifest) = loop {
        let bytes = again(options.retry, || repository.manifest(&version))
            .await
            .map_err(|error| failed(RegistryError::Request(error)))?;
        if !signed {
            // What the name leads to is what is signed; what an index leads to is named there by digest.
            signature::check(&options.signatures, reference, Digest::of(&bytes), &repository, options.retry)
                .await
                .map_err(|source| PullError::Signature { reference: reference.clone(), source })?;
            signed = true;
        }
        match Document::parse(&bytes).map_err(unreadable)? {
            Document::Manifest(manifest) => break (Digest::of(&bytes), bytes, manifest),
            Document::Index(index) => {
                indexes += 1;
                let chosen = choose(&index, platform).filter(|_| indexes <= MOST_INDEXES);
                version = chosen.ok_or_else(|| no_platform(reference, &index, platform))?.to_string();
            }
        }
    };
    let stored = |source| PullError::Store { reference: reference.clone(), source };
    if let Some(image) = present(store, digest, reference, &report).map_err(stored)? {
        return Ok(image);
    }
    let config = again(options.retry, || repository.blob(manifest.config.digest))
        .await
        .map_err(|error| failed(RegistryError::Request(error)))?;
    let mut documents = Documents::new();
    let broken = |source| PullError::Format { reference: reference.clone(), source };
    for document in format::documents(&manifest).map_err(broken)? {
        let bytes = again(options.retry, || repository.blob(document)).await;
        documents.insert(document, bytes.map_err(|error| failed(RegistryError::Request(error)))?);
    }
    let plan = format::plan(&manifest, &config, &documents).map_err(broken)?;
    let incoming = Incoming { digest, manifest: &manifest, manifest_bytes: &bytes, config: &config, plan: &plan };
    bring(store, reference, incoming, repository, options.retry, &report).await.map_err(|source| match source {
        TransferError::Store(source) => PullError::Store { reference: reference.clone(), source },
        source => PullError::Transfer { reference: reference.clone(), source },
    })
}

/// An image that is known by its manifest and not here yet.
pub(crate) struct Incoming<'a> {
    pub(crate) digest: Digest,
    pub(crate) manifest: &'a Manifest,
    pub(crate) manifest_bytes: &'a [u8],
    pub(crate) config: &'a [u8],
    pub(crate) plan: &'a Plan,
}

/// Brings an image from `blobs` into the store, unless someone else does or did.
pub(crate) async fn bring(
    store: &Store,
    reference: &Reference,
    incoming: Incoming<'_>,
    blobs: Arc<dyn Blobs>,
    retry: Retry,
    report: &Arc<Reporter>,
) -> Result<Image, TransferError> {
    let digest = incoming.digest;
    let work = Arc::new(alone(store, digest, report).await?);
    // Whoever worked on it before may have finished it.
    if let Some(image) = present(store, digest, reference, report)? {
        work.discard()?;
        return Ok(image);
    }
    let _announced = Announced::new(store, digest, report);
    let plan = incoming.plan;
    report.total(plan.layers.iter().flat_map(|layer| &layer.blobs).map(|blob| blob.size).sum());
    report.phase(Phase::Transferring);
    let (windows, files) = transfer(store, &work, plan, blobs, retry, report).await?;
    report.phase(Phase::Finishing);
    let transfer_bytes = incoming.manifest.transfer_bytes();
    let (store, reference, plan) = (store.clone(), reference.clone(), plan.clone());
    let (manifest, config) = (incoming.manifest_bytes.to_vec(), incoming.config.to_vec());
    let image = tokio::task::spawn_blocking(move || {
        let (known, windows) = assemble(&plan, work.dir(), windows)?;
        let mut record = Record::new(digest, plan.format, jiff::Timestamp::now(), known, transfer_bytes);
        record.files = files;
        work.publish(&store, &Finished { record, windows, manifest: &manifest, config: &config }, &reference)
            .map_err(TransferError::Store)
    })
    .await
    .map_err(|_| TransferError::Stopped)??;
    report.phase(Phase::Done);
    Ok(image)
}

/// The image, if it is here already; it gets the name.
fn present(
    store: &Store,
    digest: Digest,
    reference: &Reference,
    report: &Reporter,
) -> Result<Option<Image>, StoreError> {
    if store.record(digest)?.is_none() {
        return Ok(None);
    }
    match store.tag(digest, reference) {
        Ok(()) => {}
        // Removed between the two looks.
        Err(StoreError::NoImage(_)) => return Ok(None),
        Err(error) => return Err(error),
    }
    let image = store.image(digest)?;
    if let Some(image) = &image {
        report.total(image.transfer_bytes);
        report.reuse(image.transfer_bytes);
        report.phase(Phase::Done);
    }
    Ok(image)
}

/// The work on an image, once nobody else has it.
async fn alone(store: &Store, digest: Digest, report: &Arc<Reporter>) -> Result<Work, TransferError> {
    if let Some(work) = Work::attempt_pull(store, digest)? {
        return Ok(work);
    }
    report.phase(Phase::Waiting);
    let theirs = store.pulls().get(&digest).map(watch::Sender::subscribe);
    let (sender, mut receiver) = tokio::sync::oneshot::channel();
    // A thread of its own, not the runtime's: nothing waits for it when this process ends.
    let store = store.clone();
    std::thread::Builder::new()
        .name("image-wait".to_owned())
        .spawn(move || drop(sender.send(Work::wait_pull(&store, digest))))
        .map_err(|source| StoreError::Io {
            action: "start a thread to wait for the pull in",
            path: "work".into(),
            source,
        })?;
    if let Some(mut theirs) = theirs {
        // A pull of this process: show its progress as ours.
        loop {
            tokio::select! {
                work = &mut receiver => return Ok(work.map_err(|_| TransferError::Stopped)??),
                changed = theirs.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    let progress = theirs.borrow_and_update().clone();
                    report.sender().send_replace(progress);
                }
            }
        }
    }
    Ok(receiver.await.map_err(|_| TransferError::Stopped)??)
}

/// This process's pull of an image, for those who wait for it.
struct Announced {
    store: Store,
    digest: Digest,
}

impl Announced {
    fn new(store: &Store, digest: Digest, report: &Reporter) -> Self {
        store.pulls().insert(digest, report.sender().clone());
        Self { store: store.clone(), digest }
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        self.store.pulls().remove(&self.digest);
    }
}

/// Tries a small request again while that may help.
pub(crate) async fn again<T, F: Future<Output = Result<T, BlobError>>>(
    retry: Retry,
    attempt: impl Fn() -> F,
) -> Result<T, BlobError> {
    let mut failures = 0;
    loop {
        let error = match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        failures += 1;
        let BlobErrorKind::Transient(asked) = error.kind else { return Err(error) };
        let Some(wait) = retry.wait(failures, asked, 0) else { return Err(error) };
        tracing::debug!(failures, ?wait, %error, "asking again");
        tokio::time::sleep(wait).await;
    }
}

/// The manifest for a platform: the one that says so, else the only one there is.
pub(crate) fn choose(index: &Index, (os, architecture): (Os, Architecture)) -> Option<Digest> {
    let fits = |entry: &&crate::manifest::Descriptor| {
        entry.platform.as_ref().is_some_and(|platform| {
            platform.architecture == architecture.as_str() && (platform.os == os.as_str() || platform.os.is_empty())
        })
    };
    let any_os = |entry: &&crate::manifest::Descriptor| {
        entry.platform.as_ref().is_some_and(|platform| platform.architecture == architecture.as_str())
    };
    let only = || if let [only] = index.manifests.as_slice() { Some(only) } else { None };
    index
        .manifests
        .iter()
        .find(fits)
        .or_else(|| index.manifests.iter().find(any_os))
        .or_else(only)
        .map(|entry| entry.digest)
}

fn no_platform(reference: &Reference, index: &Index, (os, architecture): (Os, Architecture)) -> PullError {
    let mut found: Vec<_> = index
        .manifests
        .iter()
        .filter_map(|entry| entry.platform.as_ref())
        .map(|platform| format!("{}/{}", platform.os, platform.architecture))
        .take(10)
        .collect();
    found.dedup();
    let found = if found.is_empty() { "no platform that it names".to_owned() } else { found.join(", ") };
    PullError::Platform { reference: reference.clone(), wanted: format!("{os}/{architecture}"), found }
}
