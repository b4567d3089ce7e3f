//! The embedded Kubernetes API: one machine, one process, one durable store.
//!
//! [`ApiServer::open`] opens (or makes) the store and the certificate authority, and binds the
//! listener. [`ApiServer::router`] is the whole API as an [`axum::Router`], for clients in the same
//! process. [`ApiServer::serve`] serves it over TLS and runs the controllers that a Kubernetes
//! control plane would: scheduler, garbage collectors, namespaces, nodes, signing requests.
//!
//! Half of the crate is pure and works on [`serde_json::Value`] (kinds, patches, selectors, tables,
//! schemas); the other half is the server (store, HTTP, watches, proxy, controllers).

pub mod archive;
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
pub mod identity;

mod auth;
mod csr;
mod discovery;
mod disruption;
mod events;
mod gc;
mod http;
mod namespaces;
mod nodes;
mod pki;
mod proxy;
mod scheduler;
mod serve;
mod server;
mod store;
mod supervise;
mod time;

// The pure half.
mod crd;
mod deletion;
mod kinds;
mod managed_fields;
mod metrics;
mod openapi;
mod patch;
mod quantity;
mod scale;
mod schema;
mod selector;
mod status;
mod table;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use base64::Engine as _;
use tokio_util::sync::CancellationToken;

pub use archive::ArchiveError;
pub use identity::Identity;
pub use pki::{Issued, Pki, PkiError};
pub use store::OpenError as StoreOpenError;

use auth::token::Signer;
use proxy::Kubelets;
use serve::Listener;
use server::Server;
use store::Store;

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
    /// The store.
    #[error("can't open the API's store")]
    Store(#[from] StoreOpenError),
    /// The certificates.
    #[error("can't prepare the API's certificates")]
    Pki(#[from] PkiError),
    /// The address.
    #[error("can't listen on {address} for the API: is the port in use?")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// The cause.
        source: std::io::Error,
    },
    /// What must exist from the start couldn't be written.
    #[error("can't write the API's first objects: {0}")]
    Provision(String),
    /// Serving failed.
    #[error("can't serve the API")]
    Serve(#[source] std::io::Error),
    /// There is no address to serve on, or it is served already.
    #[error("the API has no listener: it was opened without an address, or is served already")]
    NoListener,
}

/// A Kubernetes API on one machine; clones share it.
#[derive(Clone, Debug)]
pub struct ApiServer {
    server: Arc<Server>,
    listener: Arc<Mutex<Option<Listener>>>,
}

impl ApiServer {
    /// Opens the store and the certificates of `options.dir`, and binds the listener.
    pub async fn open(options: Options) -> Result<Self, ApiServerError> {
        pki::private_dir(&options.dir)?;
        let pki_dir = options.dir.join("pki");
        let pki = Pki::open(&pki_dir)?;
        let signer = Signer::open(&pki_dir.join("sa.key"))?;
        let kubelets = Kubelets::new(&pki)?;
        let listener = match options.listen {
            None => None,
            Some(address) => {
                let fail = |source| ApiServerError::Listen { address, source };
                let tcp = std::net::TcpListener::bind(address).map_err(fail)?;
                tcp.set_nonblocking(true).map_err(fail)?;
                let bound = tcp.local_addr().map_err(fail)?;
                Some(Listener::bind(tcp, bound, &pki, &options.extra_sans)?)
            }
        };
        let file = options.dir.join("store.redb");
        // Reading a large store takes a while.
        let store = tokio::task::spawn_blocking(move || Store::open(&file))
            .await
            .map_err(|error| ApiServerError::Provision(error.to_string()))??;
        let address = listener.as_ref().map(Listener::address);
        let server = Arc::new(Server::new(store, pki, signer, kubelets, address));
        let begun = async {
            auth::defaults::provision(&server).await?;
            namespaces::provision_built_in(&server).await
        };
        begun.await.map_err(|status: status::Status| ApiServerError::Provision(status.message))?;
        Ok(Self { server, listener: Arc::new(Mutex::new(listener)) })
    }

    /// The API for clients in this process. The caller's identity is the request extension
    /// [`Identity`]; a request without one may carry a bearer token, else it is anonymous.
    pub fn router(&self) -> Router {
        http::router(self.server.clone())
    }

    /// The API for one client in this process, who is `identity` on every request.
    pub fn router_as(&self, identity: Identity) -> Router {
        self.router().layer(axum::Extension(identity))
    }

    /// The address bound by [`ApiServer::open`].
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.server.address
    }

    /// Serves TLS and runs the controllers until `stop` is cancelled.
    pub async fn serve(&self, stop: CancellationToken) -> Result<(), ApiServerError> {
        let listener =
            self.listener.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or(ApiServerError::NoListener)?;
        let stop = stop.child_token();
        let controllers = self.run_controllers(stop.clone());
        let serving = listener.serve(self.router(), &self.server.pki, stop.clone());
        let (served, ()) = tokio::join!(
            async {
                let served = serving.await;
                // Without a listener there is nothing left to do.
                stop.cancel();
                served
            },
            controllers
        );
        served.map_err(ApiServerError::Serve)
    }

    /// Runs the controllers only (for clients in this process) until `stop` is cancelled. One that panics begins anew.
    pub async fn run_controllers(&self, stop: CancellationToken) {
        let server = &self.server;
        macro_rules! keep {
            ($name:literal, $run:path) => {
                supervise::keep($name, stop.clone(), || $run(server.clone(), stop.clone()))
            };
        }
        tokio::join!(
            keep!("namespaces", namespaces::run),
            keep!("scheduler", scheduler::run),
            keep!("garbage collection", gc::run),
            keep!("signing requests", csr::run),
            keep!("nodes", nodes::run),
            keep!("disruption budgets", disruption::run),
            keep!("bootstrap tokens", auth::bootstrap::run),
        );
    }

    /// Every object, but for events and leases, as YAML. It holds the secrets: keep it private.
    pub fn export(&self) -> Result<String, ArchiveError> {
        archive::export(&self.server)
    }

    /// Writes all objects of an archive over those of the same names; returns how many. Nothing is written
    /// unless the whole archive is good. Meant for an API that serves nobody yet.
    pub async fn import(&self, archive: &str) -> Result<usize, ArchiveError> {
        archive::import(&self.server, archive).await
    }

    /// The certificate authority.
    #[must_use]
    pub fn pki(&self) -> &Pki {
        &self.server.pki
    }

    /// A kubeconfig with a fresh client certificate for `identity`, YAML. Keep it mode 0600.
    pub fn kubeconfig(&self, identity: &Identity) -> Result<String, ApiServerError> {
        let address = self.address().ok_or(ApiServerError::NoListener)?;
        let groups: Vec<String> =
            identity.groups.iter().filter(|group| *group != identity::AUTHENTICATED).cloned().collect();
        let issued = self.server.pki.issue_client(&identity.user, &groups)?;
        let base64 = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        // Any address is reachable by loopback on this machine.
        let host = if address.ip().is_unspecified() {
            SocketAddr::new(std::net::Ipv4Addr::LOCALHOST.into(), address.port())
        } else {
            address
        };
        Ok(format!(
            "apiVersion: v1\n\
             kind: Config\n\
             clusters:\n\
             - name: vmpod\n  \
               cluster:\n    \
                 server: https://{host}\n    \
                 certificate-authority-data: {ca}\n\
             users:\n\
             - name: {user}\n  \
               user:\n    \
                 client-certificate-data: {cert}\n    \
                 client-key-data: {key}\n\
             contexts:\n\
             - name: vmpod\n  \
               context:\n    \
                 cluster: vmpod\n    \
                 user: {user}\n    \
                 namespace: default\n\
             current-context: vmpod\n",
            ca = base64(self.server.pki.ca_pem()),
            user = serde_json::Value::from(identity.user.as_str()),
            cert = base64(&issued.cert_pem),
            key = base64(&issued.key_pem),
        ))
    }
}
