//! `vmpod node`, and what a node says of itself.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, ValueHint};
use k8s_openapi::api::core::v1::Taint;

use super::values::{self, KeyValue};
use super::{Kubelet, NodeMachines};

/// Join this host to a Kubernetes API as a node.
///
/// Runs the node agent alone, against the API that a kubeconfig names, until it is interrupted.
#[derive(Debug, Args)]
pub(crate) struct Node {
    /// The kubeconfig of the API and of this node's identity; made where --bootstrap-kubeconfig is given and it isn't there
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) kubeconfig: PathBuf,
    /// A kubeconfig with a bootstrap token, by which this node asks for an identity of its own
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) bootstrap_kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig [default: its current one]
    #[arg(long, value_name = "CONTEXT")]
    pub(crate) context: Option<String>,
    /// The node's name [default: this host's name]
    #[arg(long, value_name = "NAME", value_parser = values::node_name)]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) kubelet: Kubelet,
    /// The address that the node reports and its kubelet API listens on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub(crate) address: IpAddr,
    /// The certificates that callers of the kubelet API must descend from [default: the kubeconfig's]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) client_ca: Option<PathBuf>,
    /// The kubelet API's certificate [default: one made and signed by this node]
    #[arg(long, value_name = "FILE", requires = "tls_key", value_hint = ValueHint::FilePath)]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The kubelet API's private key
    #[arg(long, value_name = "FILE", requires = "tls_cert", value_hint = ValueHint::FilePath)]
    pub(crate) tls_key: Option<PathBuf>,
    /// Ask the cluster for the kubelet API's certificate; somebody has to approve it (`kubectl certificate approve`)
    #[arg(long, conflicts_with = "tls_cert")]
    pub(crate) request_serving_certificate: bool,
    /// Renew certificates that this node asked for after so long at the latest [default: 70 to 90 % of their life]
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    pub(crate) renew_certificates: Option<std::time::Duration>,
    #[command(flatten)]
    pub(crate) machines: NodeMachines,
}

/// What the Node object says besides what the host is.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct NodeObject {
    /// A label of the Node (repeatable)
    #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
    pub(crate) node_label: Vec<KeyValue>,
    /// A taint of the Node when it is first made (repeatable)
    #[arg(long, value_name = "KEY[=VALUE]:EFFECT", value_parser = taint)]
    pub(crate) taint: Vec<Taint>,
}

/// What runs the containers beside machines.
#[derive(Clone, Debug, Args)]
pub(crate) struct DockerHost {
    /// The Docker API that runs sidecars, Docker's or Podman's socket on this host; none turns them off
    #[arg(long, value_name = "unix://SOCKET", env = "DOCKER_HOST", hide_env_values = true,
          default_value = DockerHost::DEFAULT, value_parser = docker_host)]
    pub(crate) docker_host: String,
}

impl DockerHost {
    const DEFAULT: &str = "unix:///var/run/docker.sock";
}

impl Default for DockerHost {
    fn default() -> Self {
        Self { docker_host: Self::DEFAULT.to_owned() }
    }
}

fn docker_host(text: &str) -> Result<String, String> {
    match text.strip_prefix("unix://") {
        _ if text == "none" => Ok(String::new()),
        Some(path) if path.starts_with('/') => Ok(text.to_owned()),
        // The machine listens at an address that the engine's networks have on this host.
        _ => Err("the engine must run on this host: unix:///path/to/its.sock, or none".to_owned()),
    }
}

/// A label's key: a name of at most 63 characters, perhaps after a DNS name and a slash.
fn qualified(key: &str) -> bool {
    let (prefix, name) = key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    prefix.is_none_or(|prefix| values::node_name(prefix).is_ok()) && !name.is_empty() && word(name)
}

/// A label's value, or the name in its key: 63 letters, digits, '-', '_' and '.', a letter or digit at both ends.
fn word(text: &str) -> bool {
    let end = |byte: Option<&u8>| byte.is_none_or(u8::is_ascii_alphanumeric);
    text.len() <= 63
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && end(text.as_bytes().first())
        && end(text.as_bytes().last())
}

fn label(text: &str) -> Result<KeyValue, String> {
    let pair = values::key_value(text)?;
    if !qualified(&pair.key) {
        return Err(format!("{:?} can't be a label's key", pair.key));
    }
    if word(&pair.value) { Ok(pair) } else { Err(format!("{:?} can't be a label's value", pair.value)) }
}

fn taint(text: &str) -> Result<Taint, String> {
    let (what, effect) = text.rsplit_once(':').ok_or("KEY[=VALUE]:EFFECT is wanted")?;
    let (key, value) = what.split_once('=').map_or((what, None), |(key, value)| (key, Some(value)));
    if !qualified(key) || !value.is_none_or(word) {
        return Err(format!("{what:?} can't be a taint's key and value"));
    }
    if !["NoSchedule", "PreferNoSchedule", "NoExecute"].contains(&effect) {
        return Err(format!("{effect:?} is no effect: NoSchedule, PreferNoSchedule or NoExecute is"));
    }
    Ok(Taint { key: key.to_owned(), value: value.map(str::to_owned), effect: effect.to_owned(), ..Taint::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_and_taints_are_checked_before_the_api_does() {
        assert_eq!(label("example.com/disk=ssd").unwrap().key, "example.com/disk");
        assert_eq!(label("empty=").unwrap().value, "");
        for bad in ["disk", "=x", "a b=c", "a/=c", "a=b c", "a=-b", "A!/b=c"] {
            assert!(label(bad).is_err(), "{bad}");
        }
        let made = taint("example.com/macos=true:NoExecute").unwrap();
        assert_eq!((made.value.as_deref(), made.effect.as_str()), (Some("true"), "NoExecute"));
        assert_eq!(taint("dedicated:NoSchedule").unwrap().value, None);
        for bad in ["dedicated", "dedicated:Never", ":NoSchedule", "a=b c:NoSchedule"] {
            assert!(taint(bad).is_err(), "{bad}");
        }
    }
}
