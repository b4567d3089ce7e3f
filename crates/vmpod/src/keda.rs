//! The fleet's figures for KEDA, over gRPC.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use vmpod_fleet::keda::Scaler;

use crate::args;
use crate::output::talk;

/// Where they are to be served, bound: an address that is taken is told before anything starts.
pub(crate) struct Bound {
    incoming: TcpIncoming,
    server: Server,
}

/// Binds the address, if one is named.
pub(crate) fn bind(args: &args::Keda) -> Result<Option<Bound>> {
    let Some(listen) = args.listen else { return Ok(None) };
    let mut server = Server::builder();
    let scheme = match (&args.tls_cert, &args.tls_key) {
        (Some(cert), Some(key)) => {
            let read =
                |path: &std::path::Path| std::fs::read(path).with_context(|| format!("can't read {}", path.display()));
            let mut tls = ServerTlsConfig::new().identity(Identity::from_pem(read(cert)?, read(key)?));
            if let Some(ca) = &args.client_ca {
                tls = tls.client_ca_root(Certificate::from_pem(read(ca)?));
            }
            server =
                server.tls_config(tls).context("KEDA's certificate can't be used (--keda-tls-cert, --keda-tls-key)")?;
            "https"
        }
        _ => "http",
    };
    let failed = || format!("can't offer figures for KEDA at {listen} (--keda-listen)");
    let incoming = TcpIncoming::bind(listen).with_context(failed)?;
    let address: SocketAddr = incoming.local_addr().with_context(failed)?;
    talk(&format!("KEDA: {scheme}://{address}"));
    Ok(Some(Bound { incoming, server }))
}

impl Bound {
    /// Serves until what is returned is dropped.
    pub(crate) fn serve(mut self, client: kube::Client) -> AbortOnDropHandle<()> {
        AbortOnDropHandle::new(tokio::spawn(async move {
            let served = self.server.add_service(Scaler::new(client)).serve_with_incoming(self.incoming).await;
            if let Err(error) = served {
                tracing::warn!(%error, "the figures for KEDA are no longer offered");
            }
        }))
    }
}
