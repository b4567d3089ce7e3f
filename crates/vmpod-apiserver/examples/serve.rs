//! Serves the API on its own: `cargo run -p vmpod-apiserver --example serve -- DIR PORT`.
//! The kubeconfig is DIR/kubeconfig.

use std::os::unix::fs::OpenOptionsExt as _;

use tokio_util::sync::CancellationToken;
use vmpod_apiserver::{ApiServer, Identity, Options};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let dir = std::path::PathBuf::from(arguments.next().ok_or("which directory?")?);
    let port: u16 = arguments.next().ok_or("which port?")?.parse()?;
    let options = Options { dir: dir.join("api"), listen: Some(([127, 0, 0, 1], port).into()), extra_sans: Vec::new() };
    let server = ApiServer::open(options).await?;
    let kubeconfig = server.kubeconfig(&Identity::admin())?;
    let mut file =
        std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(dir.join("kubeconfig"))?;
    std::io::Write::write_all(&mut file, kubeconfig.as_bytes())?;
    let stop = CancellationToken::new();
    tokio::spawn({
        let stop = stop.clone();
        async move {
            if tokio::signal::ctrl_c().await.is_ok() {
                stop.cancel();
            }
        }
    });
    Ok(server.serve(stop).await?)
}
