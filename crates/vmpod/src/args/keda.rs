//! Where the fleet's figures are for KEDA.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, ValueHint};

/// The external scaler.
#[derive(Debug, Args)]
pub(crate) struct Keda {
    /// Where pools' figures are offered to KEDA, as an external scaler (gRPC); without it nowhere
    #[arg(long = "keda-listen", id = "keda_listen", value_name = "ADDRESS:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// The certificate chain to show there, PEM; without it there is no TLS
    #[arg(long = "keda-tls-cert", id = "keda_tls_cert", value_name = "FILE", value_hint = ValueHint::FilePath,
          requires_all = ["keda_listen", "keda_tls_key"])]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long = "keda-tls-key", id = "keda_tls_key", value_name = "FILE", value_hint = ValueHint::FilePath,
          requires = "keda_tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Whoever asks must have a certificate of one of these authorities, PEM
    #[arg(long = "keda-client-ca", id = "keda_client_ca", value_name = "FILE", value_hint = ValueHint::FilePath,
          requires = "keda_tls_cert")]
    pub(crate) client_ca: Option<PathBuf>,
}
