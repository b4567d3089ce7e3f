//! The embedded Kubernetes API: one machine, one process, one durable store.
//!
//! [`ApiServer::open`] opens (or makes) the store and the certificate authority, and binds the
//! listener. [`ApiServer::router`] is the whole API as an [`axum::Router`], for clients in the same
//! process. [`ApiServer::serve`] serves it over TLS and runs the controllers that a Kubernetes
//! control plane would: the scheduler, the garbage collectors and the namespace controller.

pub mod identity;

use std::net::SocketAddr;
use std::path::PathBuf;

use axum::Router;
use tokio_util::sync::CancellationToken;

pub use identity::Identity;

/// How to open an API server.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory of the store and the certificates (made when absent, mode 0700).
    pub dir: PathBuf,
    /// Where to listen; `None` serves clients in this process only. Port 0 picks a free one.
    pub listen: Option<SocketAddr>,
    /// More names and addresses for the serving certificate.
    pub extra_sans: Vec<String>,
}

/// Why the API server couldn't be opened or served.
#[derive(Debug, thiserror::Error)]
pub enum ApiServerError {
    /// A part that isn't there yet.
    #[error("{0} is not built yet")]
    NotBuilt(&'static str),
}

/// Certificates made by this server's authority, as PEM.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The certificate chain, PEM.
    pub cert_pem: String,
    /// The private key, PKCS#8 PEM.
    pub key_pem: String,
}

/// The server's own certificate authority.
#[derive(Debug)]
pub struct Pki {}

impl Pki {
    /// The authority's certificate, PEM.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        ""
    }

    /// A client certificate for user `cn` in `groups`.
    pub fn issue_client(&self, cn: &str, groups: &[String]) -> Result<Issued, ApiServerError> {
        let _ = (cn, groups);
        Err(ApiServerError::NotBuilt("the certificate authority"))
    }

    /// A serving certificate for `cn`, valid for these host names and addresses.
    pub fn issue_serving(&self, cn: &str, sans: &[String]) -> Result<Issued, ApiServerError> {
        let _ = (cn, sans);
        Err(ApiServerError::NotBuilt("the certificate authority"))
    }
}

/// A running API server; clones share it.
#[derive(Clone, Debug)]
pub struct ApiServer {}

impl ApiServer {
    /// Opens the store and the certificates of `options.dir`, binds the listener.
    pub async fn open(options: Options) -> Result<Self, ApiServerError> {
        let _ = options;
        Err(ApiServerError::NotBuilt("the store"))
    }

    /// The API for clients in this process. The caller's identity is the request extension
    /// [`Identity`]; a request without one is anonymous.
    pub fn router(&self) -> Router {
        Router::new()
    }

    /// The API for one client in this process, who is `identity` on every request.
    pub fn router_as(&self, identity: Identity) -> Router {
        self.router().layer(axum::Extension(identity))
    }

    /// The address bound by [`ApiServer::open`].
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        None
    }

    /// Serves TLS and runs the controllers until `stop` is cancelled.
    pub async fn serve(&self, stop: CancellationToken) -> Result<(), ApiServerError> {
        let _ = stop;
        Err(ApiServerError::NotBuilt("serving"))
    }

    /// Runs the controllers only (for clients in this process) until `stop` is cancelled.
    pub async fn run_controllers(&self, stop: CancellationToken) {
        stop.cancelled().await;
    }

    /// The certificate authority.
    #[must_use]
    pub fn pki(&self) -> &Pki {
        &Pki {}
    }

    /// A kubeconfig with a fresh client certificate for `identity`, YAML. Keep it mode 0600.
    pub fn kubeconfig(&self, identity: &Identity) -> Result<String, ApiServerError> {
        let _ = identity;
        Err(ApiServerError::NotBuilt("kubeconfig"))
    }
}
