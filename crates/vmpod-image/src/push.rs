//! Pushing images to a registry.
use std::path::PathBuf;

use tokio::sync::watch;

use crate::credentials::Credentials;
use crate::digest::Digest;
use crate::progress::Progress;
use crate::reference::Reference;
use crate::store::Store;

/// How to reach the registry.
#[derive(Debug, Clone, Default)]
pub struct PushOptions {
    /// Who to be.
    pub credentials: Credentials,
    /// Hosts (`host[:port]`) that may be spoken to without TLS. Loopback hosts may always.
    pub plain_http: Vec<String>,
    /// More certificate authorities to trust: PEM files.
    pub ca_files: Vec<PathBuf>,
    /// Where progress is published, a few times a second.
    pub progress: Option<watch::Sender<Progress>>,
}

/// Why a push failed.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// Not there yet.
    #[error("not built yet")]
    NotBuilt,
}

/// Pushes the image that the store has as `from` to the registry as `to`. Returns the digest that it has there.
pub async fn push(
    _store: &Store,
    _from: &Reference,
    _to: &Reference,
    _options: PushOptions,
) -> Result<Digest, PushError> {
    Err(PushError::NotBuilt)
}
