//! The way to the API of the home's `vmpod up`.

use std::path::Path;

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};

use crate::home::{Home, Role};
use crate::report::Remedy;

/// A client of the API that this home's `vmpod up` serves.
pub(crate) async fn connect(home: &Home) -> Result<Client> {
    let root = home.root().display();
    match home.holder()? {
        Some(holder) if holder.role == Role::Node => {
            return Err(Remedy::new(
                format!("the home {root} belongs to `vmpod node`, which has no API of its own"),
                "ask the cluster that it joined, with kubectl",
            )
            .into());
        }
        Some(_) if home.kubeconfig().exists() => {}
        Some(holder) => {
            return Err(Remedy::new(
                format!("`vmpod {}` (process {}) is still starting", holder.role.word(), holder.pid),
                "try again in a moment",
            )
            .into());
        }
        None => {
            return Err(Remedy::new(
                format!("no `vmpod up` is running with the home {root}"),
                format!("start one with `vmpod up --home {root}`, or name its home with --home or VMPOD_HOME"),
            )
            .into());
        }
    }
    from_file(&home.kubeconfig(), None).await
}

/// A client of the API that a kubeconfig names.
pub(crate) async fn from_file(path: &Path, context: Option<&str>) -> Result<Client> {
    let config = config(path, context).await?;
    Client::try_from(config).with_context(|| format!("can't make a client from the kubeconfig {}", path.display()))
}

/// What a kubeconfig says.
pub(crate) async fn config(path: &Path, context: Option<&str>) -> Result<Config> {
    let file = Kubeconfig::read_from(path).with_context(|| format!("can't read the kubeconfig {}", path.display()))?;
    let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
    let mut config = Config::from_custom_kubeconfig(file, &options)
        .await
        .with_context(|| format!("the kubeconfig {} can't be used", path.display()))?;
    // A log or an exec may be silent for as long as it likes.
    config.read_timeout = None;
    Ok(config)
}

/// The pod of this name, or an error that tells what to do.
pub(crate) async fn pod(api: &Api<Pod>, name: &str) -> Result<Pod> {
    let found = api.get_opt(name).await.with_context(|| format!("can't look up pod {name}"))?;
    found.ok_or_else(|| Remedy::new(format!("there is no pod {name}"), "see the pods with `vmpod ps -A`").into())
}
