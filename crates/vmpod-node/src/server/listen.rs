//! The listener: TLS, limits, HTTP/1.1, and an end in order.

use std::{io, sync::Arc, time::Duration};

use axum::{Extension, Router};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use rustls_pki_types::CertificateDer;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::tls::Serving;

/// Connections at once; more wait to be accepted.
const CONNECTIONS: usize = 1024;
/// A handshake, and each request's head, must be done in this time.
const PATIENCE: Duration = Duration::from_secs(10);
/// Largest request head.
const HEAD_BYTES: usize = 64 * 1024;
/// Most headers of a request.
const HEADERS: usize = 100;
/// How long requests may go on after the server was told to stop.
const FAREWELL: Duration = Duration::from_secs(5);

/// The certificates that a connection's client showed, not yet believed.
#[derive(Clone, Debug, Default)]
pub(super) struct Shown(pub(super) Arc<[CertificateDer<'static>]>);

/// Serves until `stop`, then lets requests end for a few seconds.
pub(super) async fn serve(listener: TcpListener, serving: &Serving, router: Router, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let connections = TaskTracker::new();
    loop {
        let next = async {
            let place = places.clone().acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            next = next => next,
            () = stop.cancelled() => break,
        };
        let socket = match accepted {
            Ok((socket, _)) => socket,
            Err(error) => {
                // Out of descriptors, most likely: give them a moment to come back.
                tracing::warn!(%error, "the kubelet API could not accept a connection");
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        let acceptor = TlsAcceptor::from(serving.current().config.clone());
        let (router, stop) = (router.clone(), stop.clone());
        connections.spawn(async move {
            if let Err(error) = connection(socket, acceptor, router, stop).await {
                tracing::debug!(%error, "a connection to the kubelet API failed");
            }
            drop(place);
        });
    }
    connections.close();
    timeout(FAREWELL, connections.wait()).await.ok();
}

async fn connection(
    socket: TcpStream,
    acceptor: TlsAcceptor,
    router: Router,
    stop: CancellationToken,
) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let stream = timeout(PATIENCE, acceptor.accept(socket)).await??;
    let shown = Shown(stream.get_ref().1.peer_certificates().unwrap_or_default().into());
    let service = TowerToHyperService::new(router.layer(Extension(shown)));
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_headers(HEADERS).max_buf_size(HEAD_BYTES);
    let serving = http.serve_connection(TokioIo::new(stream), service).with_upgrades();
    tokio::pin!(serving);
    let served = tokio::select! {
        served = &mut serving => served,
        () = stop.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    served.map_err(io::Error::other)
}
