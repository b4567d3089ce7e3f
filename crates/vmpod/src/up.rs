//! `vmpod up`: the API and the node agent until somebody interrupts.

use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::agent::{self, Hypervisor};
use crate::apply;
use crate::args;
use crate::client;
use crate::home::{Home, Role};
use crate::image;
use crate::interrupts::Interrupts;
use crate::keda;
use crate::metrics;
use crate::output::{self, Progress, Style, talk};
use crate::report::{Exit, Remedy};
use crate::stack::{Plan, Stack};

/// Runs until interrupted.
pub(crate) async fn run(home: &Home, args: args::Up) -> Result<Exit> {
    let began = Instant::now();
    let mut interrupts = Interrupts::listen()?;
    let manifests = args.apply.as_deref().map(apply::directory).transpose()?;
    let _lock = home.lock(Role::Up).await?;
    clear_dead_runs(home, &Hypervisor::of(&args.machines.hypervisor)?).await;

    let fleet_metrics = vmpod_fleet::Metrics::default();
    let keda = keda::bind(&args.fleet.keda)?;
    let _metrics = metrics::serve(args.fleet.metrics_listen, &fleet_metrics).await?;
    let spinner = Progress::spinner("starting");
    let name = agent::node_name(args.name.as_deref());
    let starting = Stack::start(Plan {
        home,
        name: name.clone(),
        listen: SocketAddr::new(args.listen, args.api_port),
        kubelet_port: args.kubelet.kubelet_port,
        tls_sans: args.tls_san,
        machines: &args.machines,
        fleet: (!args.no_fleet).then(|| (args.fleet.poll, fleet_metrics.clone())),
    });
    let stack = tokio::select! {
        stack = starting => stack,
        interrupt = interrupts.next() => {
            spinner.clear();
            return Ok(Exit::Command(interrupt.code()));
        }
    };
    spinner.clear();
    let mut stack = stack?;

    let style = Style::stderr();
    let kubeconfig = home.kubeconfig();
    talk(&format!(
        "{} after {}: node {name}, API https://{}",
        style.green("vmpod is ready"),
        output::seconds(began.elapsed()),
        stack.address
    ));
    tracing::debug!(kubelet = ?stack.kubelet, "the kubelet API listens");
    talk(&format!("  {}", style.bold(&format!("kubectl --kubeconfig {} get nodes", kubeconfig.display()))));
    talk(&format!("  {}", style.dim("Ctrl-C stops it")));
    output::data(&format!("{}\n", kubeconfig.display()))?;

    // These end with this function.
    let _keda = match keda {
        Some(keda) => Some(keda.serve(client::from_file(&kubeconfig, None).await?)),
        None => None,
    };
    let mut applying = tokio::task::JoinSet::new();
    if let Some(dir) = manifests {
        let client = client::from_file(&kubeconfig, None).await?;
        applying.spawn(apply::keep(client, dir, home.root().join("applied.json")));
    }
    tokio::select! {
        error = stack.ended() => return Err(error),
        Some(ended) = applying.join_next() => {
            ended.context("--apply panicked")?.context("--apply failed")?;
        }
        _ = interrupts.next() => {}
    }
    drop(applying);
    let keep = args.machines.keep_vms;
    talk(if keep {
        "stopping; the machines go on, and the next `vmpod up` takes them over"
    } else {
        "stopping the machines; interrupt again to end at once"
    });
    tokio::select! {
        stopped = stack.stop(args.machines.shutdown_grace) => {
            stopped?;
            talk("stopped");
            Ok(Exit::Done)
        }
        interrupt = interrupts.next() => {
            talk("ended at once; the next `vmpod up` takes over the machines that are left");
            Ok(Exit::Command(interrupt.code()))
        }
    }
}

/// Removes what `vmpod run`s left that were killed. What can't be removed now is tried again next time.
pub(crate) async fn clear_dead_runs(home: &Home, hypervisor: &Hypervisor) {
    let dead = match home.dead_runs() {
        Ok(dead) => dead,
        Err(error) => {
            tracing::warn!("can't look for the remains of earlier runs: {error:#}");
            return;
        }
    };
    for run in dead {
        // Held by another that clears it; or its lock was taken since it was looked at.
        let _lock = match run.try_lock(Role::Run) {
            Ok(Some(lock)) => lock,
            Ok(None) => continue,
            Err(error) => {
                tracing::debug!("can't lock {}, which an earlier run left: {error:#}", run.root().display());
                continue;
            }
        };
        if let Err(error) = clear(&run, hypervisor.clone()).await {
            tracing::warn!("can't remove {}, which an earlier run left: {error:#}", run.root().display());
        }
    }
}

/// Kills and removes all machines of a private home, then the home. The caller holds its lock.
pub(crate) async fn clear(run: &Home, hypervisor: Hypervisor) -> Result<()> {
    let store = image::open(run)?;
    let machines = agent::machines(run, hypervisor)?;
    for (id, _) in machines.adopt().await? {
        machines.remove(&id, true).await?;
    }
    // After the machines, and before their directory goes, by which the run's holds are known.
    vmpod_node::release_all(&store, machines.root())?;
    run.remove()
}

/// The refusal of something that only a running `vmpod up` can do.
pub(crate) fn needs_up(home: &Home, what: &str) -> Remedy {
    Remedy::new(
        format!("{what} needs a running `vmpod up`, and none has the home {}", home.root().display()),
        format!("start one with `vmpod up --home {}`", home.root().display()),
    )
}
