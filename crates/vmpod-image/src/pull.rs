//! Pulling images from a registry.
use std::path::PathBuf;

use tokio::sync::watch;

use crate::config::{Architecture, Os};
use crate::credentials::Credentials;
use crate::image::Image;
use crate::progress::Progress;
use crate::reference::Reference;
use crate::store::Store;

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
    /// Where progress is published, a few times a second.
    pub progress: Option<watch::Sender<Progress>>,
}

/// Why a pull failed.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// Not there yet.
    #[error("not built yet")]
    NotBuilt,
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
    #[error("registry {host} refuses access to {reference}: check the credentials")]
    Denied {
        /// The registry.
        host: String,
        /// The image.
        reference: Reference,
    },
}

impl PullError {
    /// Whether trying again later may help: false for a missing image, a refusal or a broken image.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        false
    }
}

/// Makes sure that `reference` is in the store as the registry has it now. Bytes that are here are not fetched again; two pulls
/// of one image, in one process or several, are one. Dropping the future stops the pull; the next one goes on where it was.
pub async fn pull(_store: &Store, _reference: &Reference, _options: PullOptions) -> Result<Image, PullError> {
    Err(PullError::NotBuilt)
}
