//! The way to the API of the home's `vmpod up`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use k8s_openapi::api::core::v1::Pod;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use serde_json::{Value, json};

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

/// The certificate chain (PEM) of a kubeconfig's current user; an error when it has none in itself.
pub(crate) fn certificate(path: &Path) -> Result<Vec<u8>> {
    let none = || format!("the kubeconfig {} holds no client certificate", path.display());
    let file = Kubeconfig::read_from(path).with_context(|| format!("can't read the kubeconfig {}", path.display()))?;
    let current = file.current_context.as_deref();
    let context = file.contexts.into_iter().find(|named| Some(named.name.as_str()) == current);
    let user = context.and_then(|named| named.context?.user);
    let named = file.auth_infos.into_iter().find(|named| Some(&named.name) == user.as_ref());
    let data = named.and_then(|named| named.auth_info?.client_certificate_data).with_context(none)?;
    BASE64.decode(data).with_context(none)
}

/// A kubeconfig for the cluster of another one's current context, with a user of its own. JSON is YAML.
pub(crate) fn kubeconfig_as(of: &Path, name: &str, user: &Value) -> Result<String> {
    let unfit = || format!("the kubeconfig {} has no current context with a cluster", of.display());
    let file = Kubeconfig::read_from(of).with_context(|| format!("can't read the kubeconfig {}", of.display()))?;
    let current = file.current_context.as_deref();
    let context = file.contexts.into_iter().find(|named| Some(named.name.as_str()) == current);
    let context = context.and_then(|named| named.context).with_context(unfit)?;
    let named = file.clusters.into_iter().find(|named| named.name == context.cluster);
    let cluster = named.and_then(|named| named.cluster).with_context(unfit)?;
    let mut shown = json!({"server": cluster.server.with_context(unfit)?});
    if let Some(data) = cluster.certificate_authority_data {
        shown["certificate-authority-data"] = data.into();
    } else if let Some(path) = cluster.certificate_authority {
        // A path in a kubeconfig is seen from the file's own directory.
        let path = of.parent().map_or_else(|| PathBuf::from(&path), |dir| dir.join(&path));
        let text = std::fs::read(&path).with_context(|| format!("can't read {}", path.display()))?;
        shown["certificate-authority-data"] = BASE64.encode(text).into();
    }
    if let Some(name) = cluster.tls_server_name {
        shown["tls-server-name"] = name.into();
    }
    let made = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "vmpod", "cluster": shown}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": "vmpod", "context": {"cluster": "vmpod", "user": name}}],
        "current-context": "vmpod",
    });
    serde_json::to_string_pretty(&made).context("can't write the kubeconfig")
}

/// The pod of this name, or an error that tells what to do.
pub(crate) async fn pod(api: &Api<Pod>, name: &str) -> Result<Pod> {
    let found = api.get_opt(name).await.with_context(|| format!("can't look up pod {name}"))?;
    found.ok_or_else(|| Remedy::new(format!("there is no pod {name}"), "see the pods with `vmpod ps -A`").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_user_of_the_same_cluster() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.crt"), "CA").unwrap();
        let file = dir.path().join("first");
        let text = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "other", "cluster": {"server": "https://other"}},
                {"name": "k", "cluster": {"server": "https://api:6443", "certificate-authority": "ca.crt"}}],
            "users": [{"name": "u", "user": {"token": "secret"}}],
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}]});
        std::fs::write(&file, text.to_string()).unwrap();
        let made = kubeconfig_as(&file, "me", &json!({"token": "mine"})).unwrap();
        assert!(!made.contains("secret"), "the other's credential isn't kept");
        let made: Value = serde_json::from_str(&made).unwrap();
        let want = json!({"server": "https://api:6443", "certificate-authority-data": "Q0E="});
        assert_eq!((&made["clusters"][0]["cluster"], &made["users"][0]["user"]["token"]), (&want, &json!("mine")));
        std::fs::write(&file, json!({"apiVersion": "v1", "kind": "Config"}).to_string()).unwrap();
        assert!(kubeconfig_as(&file, "me", &json!({})).is_err());
    }
}
