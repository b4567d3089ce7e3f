//! The TLS listener: HTTP/1.1 and HTTP/2, client certificates optional.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::identity::Identity;
use crate::pki::{self, Issued, Pki, PkiError};
use crate::server::digest;

/// How long a client may take for the TLS handshake and for a request's head.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long connections may finish what they do when the server stops.
const FAREWELL: Duration = Duration::from_secs(2);
/// How often the serving certificate's end is looked at.
const RENEWAL: Duration = Duration::from_hours(12);

/// The serving certificate, replaced while serving when it nears its end.
#[derive(Debug)]
struct Serving {
    current: RwLock<Arc<CertifiedKey>>,
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

fn certified(issued: &Issued) -> Result<Arc<CertifiedKey>, PkiError> {
    let unusable = || PkiError::Content { what: "serving certificate", path: "serving.crt".into() };
    let (chain, key) = pki::chain_and_key(issued).ok_or_else(unusable)?;
    let key = rustls::crypto::ring::sign::any_supported_type(&key).map_err(|_| unusable())?;
    Ok(Arc::new(CertifiedKey::new(chain, key)))
}

/// A TLS listener that isn't serving yet.
pub(crate) struct Listener {
    tcp: std::net::TcpListener,
    address: SocketAddr,
    tls: Arc<rustls::ServerConfig>,
    serving: Arc<Serving>,
    names: Vec<String>,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").field("address", &self.address).finish_non_exhaustive()
    }
}

/// The names that a serving certificate is made for.
fn names(address: SocketAddr, extra: &[String]) -> Vec<String> {
    let mut names: Vec<String> =
        ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "127.0.0.1", "::1"]
            .map(Into::into)
            .into();
    if !address.ip().is_unspecified() {
        names.push(address.ip().to_string());
    }
    names.extend(extra.iter().cloned());
    names.sort();
    names.dedup();
    names
}

impl Listener {
    /// Binds the address and reads or makes the certificate.
    pub(crate) fn bind(
        tcp: std::net::TcpListener,
        address: SocketAddr,
        pki: &Pki,
        extra: &[String],
    ) -> Result<Self, PkiError> {
        let names = names(address, extra);
        let serving = Arc::new(Serving {
            current: RwLock::new(certified(&pki.kept_serving("serving", "kube-apiserver", &names)?)?),
        });
        let unusable = || PkiError::Content { what: "authority for client certificates", path: "ca.crt".into() };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(pki.ca_pem().as_bytes()).map_err(|_| unusable())?)
            .map_err(|_| unusable())?;
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .allow_unauthenticated()
            .build()
            .map_err(|_| unusable())?;
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|_| unusable())?
            .with_client_cert_verifier(clients)
            .with_cert_resolver(serving.clone());
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self { tcp, address, tls: Arc::new(tls), serving, names })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop` is cancelled.
    pub(crate) async fn serve(self, router: Router, pki: &Pki, stop: CancellationToken) -> std::io::Result<()> {
        let listener = TcpListener::from_std(self.tcp)?;
        let acceptor = TlsAcceptor::from(self.tls);
        let tracker = TaskTracker::new();
        let mut renewal = tokio::time::interval(RENEWAL);
        let result = loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break Ok(()),
                _ = renewal.tick() => {
                    let renewed = pki.kept_serving("serving", "kube-apiserver", &self.names).and_then(|issued| certified(&issued));
                    match renewed {
                        Ok(key) => *self.serving.current.write().unwrap_or_else(PoisonError::into_inner) = key,
                        Err(error) => tracing::error!(%error, "the serving certificate can't be renewed"),
                    }
                    continue;
                }
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((tcp, peer)) => {
                    let connection = serve_one(tcp, acceptor.clone(), router.clone(), stop.clone());
                    tracker.spawn(async move {
                        if let Err(error) = connection.await {
                            tracing::debug!(%peer, error, "a connection ended");
                        }
                    });
                }
                // Out of descriptors: those in use must end first.
                Err(error) => {
                    tracing::warn!(%error, "can't accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        };
        tracker.close();
        if tokio::time::timeout(FAREWELL, tracker.wait()).await.is_err() {
            tracing::debug!("connections were cut");
        }
        result
    }
}

async fn serve_one(
    tcp: tokio::net::TcpStream,
    acceptor: TlsAcceptor,
    router: Router,
    stop: CancellationToken,
) -> Result<(), String> {
    tcp.set_nodelay(true).map_err(|error| error.to_string())?;
    let tls =
        tokio::time::timeout(PATIENCE, acceptor.accept(tcp)).await.map_err(|_| "the TLS handshake took too long")?;
    let tls = tls.map_err(|error| error.to_string())?;
    // rustls has verified the certificate against our authority.
    let certificate = tls.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let identity = certificate.and_then(|der| {
        let (user, groups) = pki::subject(der)?;
        let mut identity = Identity::new(user, groups);
        identity
            .extra
            .insert("authentication.kubernetes.io/credential-id".into(), vec![format!("X509SHA256={}", digest(der))]);
        Some(identity)
    });
    let router = match identity {
        Some(identity) => router.layer(axum::Extension(identity)),
        None => router,
    };
    let mut server = auto::Builder::new(TokioExecutor::new());
    server.http1().timer(TokioTimer::new()).header_read_timeout(PATIENCE);
    server
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(30))
        .max_concurrent_streams(1000)
        .adaptive_window(true);
    let connection = server.serve_connection_with_upgrades(TokioIo::new(tls), TowerToHyperService::new(router));
    tokio::pin!(connection);
    tokio::select! {
        result = connection.as_mut() => return result.map_err(|error| error.to_string()),
        () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    // Watches have no end of their own.
    match tokio::time::timeout(FAREWELL, connection).await {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Ok(()),
    }
}
