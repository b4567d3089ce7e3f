//! `vmpod controller`: the fleet operator alone, against any Kubernetes API.

use anyhow::{Context as _, Result};
use tokio_util::sync::CancellationToken;

use crate::agent;
use crate::args;
use crate::client;
use crate::interrupts::Interrupts;
use crate::keda;
use crate::metrics;
use crate::output::talk;
use crate::report::Exit;

/// Runs until interrupted.
pub(crate) async fn run(args: args::Controller) -> Result<Exit> {
    let mut interrupts = Interrupts::listen()?;
    let config = match &args.kubeconfig {
        Some(path) => client::config(path, args.context.as_deref()).await?,
        None => kube::Config::infer()
            .await
            .context("no Kubernetes API is known here: name a kubeconfig with --kubeconfig")?,
    };
    let server = config.cluster_url.to_string();
    let client = kube::Client::try_from(config).context("can't make a client for the Kubernetes API")?;
    let identity = args.identity.unwrap_or_else(|| format!("{}-{}", agent::node_name(None), std::process::id()));
    let stop = CancellationToken::new();
    let (keda, scaled) = (keda::bind(&args.fleet.keda)?, client.clone());
    let options = vmpod_fleet::Options {
        namespace: args.lease_namespace,
        install: !args.no_install,
        poll: args.fleet.poll,
        ..vmpod_fleet::Options::new(client, identity)
    };
    let _metrics = metrics::serve(args.fleet.metrics_listen, &options.metrics).await?;
    let _keda = keda.map(|keda| keda.serve(scaled));
    let mut work = tokio::spawn(vmpod_fleet::run(options, stop.clone()));
    talk(&format!("the fleet operator works for {server}; Ctrl-C stops it, and the runners go on"));
    tokio::select! {
        ended = &mut work => {
            ended.context("the fleet operator panicked")?.context("the fleet operator failed")?;
            anyhow::bail!("the fleet operator ended by itself");
        }
        _ = interrupts.next() => {}
    }
    stop.cancel();
    tokio::select! {
        ended = work => ended.context("the fleet operator panicked")?.context("the fleet operator failed while it stopped")?,
        interrupt = interrupts.next() => return Ok(Exit::Command(interrupt.code())),
    }
    talk("stopped");
    Ok(Exit::Done)
}
