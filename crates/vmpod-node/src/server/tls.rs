//! The certificates of the kubelet API: ours, and those that callers show.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject as _};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::access::User;
use crate::logs::watch::FileWatch;

/// Why certificates can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A PEM text holds none of what it should hold.
    #[error("the kubelet API's {0} is not usable PEM")]
    Pem(&'static str, #[source] rustls_pki_types::pem::Error),
    /// A PEM text holds no certificate.
    #[error("the kubelet API's {0} holds no certificate")]
    Empty(&'static str),
    /// Certificate and key can't serve.
    #[error("the kubelet API's certificate and key can't be used")]
    Serving(#[source] rustls::Error),
    /// The client authorities can't verify.
    #[error("the kubelet API's client authorities can't be used")]
    Authorities(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A file can't be read.
    #[error("could not read {}", .0.display())]
    Read(PathBuf, #[source] std::io::Error),
}

/// Certificates as texts.
#[derive(Clone)]
pub struct Pem {
    /// Our chain, leaf first.
    pub cert: String,
    /// Its private key.
    pub key: String,
    /// The authorities whose client certificates are believed. Without any, only tokens are.
    pub client_ca: Option<String>,
}

impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pem").field("cert", &self.cert).finish_non_exhaustive()
    }
}

impl Pem {
    /// Reads the three files.
    pub fn read(cert: &Path, key: &Path, client_ca: Option<&Path>) -> Result<Self, TlsError> {
        let read = |path: &Path| std::fs::read_to_string(path).map_err(|error| TlsError::Read(path.to_owned(), error));
        Ok(Self { cert: read(cert)?, key: read(key)?, client_ca: client_ca.map(read).transpose()? })
    }
}

/// What a connection is served with.
pub struct Material {
    /// The TLS configuration of new connections.
    pub config: Arc<ServerConfig>,
    clients: Option<Arc<dyn ClientCertVerifier>>,
}

impl Material {
    /// Checks and prepares certificates.
    pub fn new(pem: &Pem) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain = certificates(&pem.cert, "certificate")?;
        let key =
            PrivateKeyDer::from_pem_slice(pem.key.as_bytes()).map_err(|error| TlsError::Pem("private key", error))?;
        let clients = match &pem.client_ca {
            None => None,
            Some(authorities) => {
                let mut roots = RootCertStore::empty();
                for authority in certificates(authorities, "client authorities")? {
                    roots.add(authority).map_err(|error| TlsError::Authorities(Box::new(error)))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone())
                    .build()
                    .map_err(|error| TlsError::Authorities(Box::new(error)))?;
                Some(verifier)
            }
        };
        let mut config = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Serving)?
            .with_client_cert_verifier(Arc::new(AskOnly(provider)))
            .with_single_cert(chain, key)
            .map_err(TlsError::Serving)?;
        // Upgrades to SPDY and WebSocket need HTTP/1.1.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { config: Arc::new(config), clients })
    }

    /// The caller that a verified client certificate names: CN is the user, O are the groups.
    #[must_use]
    pub fn user(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Option<User> {
        let (leaf, intermediates) = chain.split_first()?;
        self.clients.as_ref()?.verify_client_cert(leaf, intermediates, now).ok()?;
        let (_, certificate) = X509Certificate::from_der(leaf).ok()?;
        let subject = certificate.subject();
        let name = subject.iter_common_name().next()?.as_str().ok()?;
        let groups = subject.iter_organization().filter_map(|group| Some(group.as_str().ok()?.to_owned()));
        (!name.is_empty()).then(|| User::new(name, groups.collect()))
    }
}

fn certificates(pem: &str, what: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let all = all.map_err(|error| TlsError::Pem(what, error))?;
    if all.is_empty() { Err(TlsError::Empty(what)) } else { Ok(all) }
}

/// The certificates in use, replaced while serving: new connections and new requests see the new ones.
#[derive(Clone)]
pub struct Serving(Arc<watch::Sender<Arc<Material>>>);

impl Serving {
    /// Starts with these.
    pub fn new(pem: &Pem) -> Result<Self, TlsError> {
        Ok(Self(Arc::new(watch::Sender::new(Arc::new(Material::new(pem)?)))))
    }

    /// Replaces them; unusable ones are refused and change nothing.
    pub fn replace(&self, pem: &Pem) -> Result<(), TlsError> {
        self.0.send_replace(Arc::new(Material::new(pem)?));
        Ok(())
    }

    pub(super) fn current(&self) -> Arc<Material> {
        self.0.borrow().clone()
    }

    /// Follows the files until `stop`: a change is taken over when the files make a usable whole.
    pub async fn follow_files(
        &self,
        cert: PathBuf,
        key: PathBuf,
        client_ca: Option<PathBuf>,
        stop: CancellationToken,
    ) -> std::io::Result<()> {
        let mut watches = Vec::new();
        for path in [Some(&cert), Some(&key), client_ca.as_ref()].into_iter().flatten() {
            watches.push(FileWatch::new(path)?);
        }
        let mut last = None;
        loop {
            let next = watches.iter_mut().map(|watch| Box::pin(watch.changed()));
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                (changed, ..) = futures::future::select_all(next) => changed?,
            }
            let taken = Pem::read(&cert, &key, client_ca.as_deref()).and_then(|pem| {
                let seen = (pem.cert.clone(), pem.key.clone(), pem.client_ca.clone());
                if last.as_ref() != Some(&seen) {
                    self.replace(&pem)?;
                    last = Some(seen);
                }
                Ok(())
            });
            if let Err(error) = taken {
                tracing::debug!(error = %error, "the kubelet API's certificate files are not usable (yet)");
            }
        }
    }
}

/// Asks for a client certificate and checks that the client holds its key. Whether it is believed is decided for each
/// request, so that a caller with a token and a certificate of another authority gets in, and authorities can change.
#[derive(Debug)]
struct AskOnly(Arc<CryptoProvider>);

impl ClientCertVerifier for AskOnly {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
