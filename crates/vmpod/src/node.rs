//! `vmpod node`: the agent alone, against any Kubernetes API.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use sha2::Digest as _;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use vmpod_node::Kubelet;

use crate::agent::{self, Parts};
use crate::args;
use crate::bootstrap;
use crate::client;
use crate::home::{self, Home, Role};
use crate::identity::{Changing, Identity, Life, Shown};
use crate::image;
use crate::interrupts::Interrupts;
use crate::output::talk;
use crate::report::{Exit, Remedy};
use crate::stack;

/// Runs until interrupted.
pub(crate) async fn run(home: &Home, args: args::Node) -> Result<Exit> {
    let mut interrupts = Interrupts::listen()?;
    let _lock = home.lock(Role::Node).await?;
    crate::up::clear_dead_runs(home, &agent::Hypervisor::of(&args.machines.hypervisor)?).await;

    let name = agent::node_name(args.name.as_deref());
    if let Some(bootstrap) = &args.bootstrap_kubeconfig {
        tokio::select! {
            made = bootstrap::ensure(&args.kubeconfig, bootstrap, &name) => made?,
            interrupt = interrupts.next() => return Ok(Exit::Command(interrupt.code())),
        }
    }
    let config = client::config(&args.kubeconfig, args.context.as_deref()).await?;
    let server = config.cluster_url.to_string();
    let listen = SocketAddr::new(args.address, args.kubelet.kubelet_port);
    let serving = match (&args.tls_cert, &args.tls_key) {
        (Some(cert), Some(key)) => Pair { cert_pem: read(cert)?, key_pem: read(key)? },
        _ if args.request_serving_certificate && Pair::of_cluster(home).is_some() => {
            Pair::of_cluster(home).context("the certificate was there an instant ago")?
        }
        _ => Pair::of_home(home, &name, &args.address.to_string())?,
    };
    let client_ca_pem = match &args.client_ca {
        Some(path) => read(path)?,
        None => authorities(&config).ok_or_else(|| {
            Remedy::new(
                format!("the kubeconfig {} names no certificate authority", args.kubeconfig.display()),
                "name the one that signs the API server's kubelet client certificate with --client-ca",
            )
        })?,
    };
    let namespace = config.default_namespace.clone();
    let client = kube::Client::try_from(config)
        .with_context(|| format!("can't make a client from the kubeconfig {}", args.kubeconfig.display()))?;
    let changing = Changing::new(client);
    let client = changing.client(&namespace);
    let nodes: kube::Api<k8s_openapi::api::core::v1::Node> = kube::Api::all(client.clone());
    let fingerprint = fingerprint(&serving.cert_pem)?;
    let kubelet = Kubelet { listen, cert_pem: serving.cert_pem, key_pem: serving.key_pem, client_ca_pem };
    let options = agent::options(Parts {
        home,
        name: name.clone(),
        address: args.address,
        kubelet: kubelet.clone(),
        client: client.clone(),
        store: image::open(home)?,
        machines: &args.machines,
    })
    .await?;
    let node = stack::open_node(options, listen).await?;

    // They end with this function.
    let _certificates =
        keep_certificates(home, &args, &name, Kept { nodes: &nodes, changing, client, kubelet, node: &node });

    let mut ready = node.ready();
    let stop = CancellationToken::new();
    let mut work = tokio::spawn(Box::pin(node.run(stop.clone())));
    let mut told = false;
    loop {
        tokio::select! {
            ended = &mut work => {
                ended.context("the node agent panicked")?.context("the node agent failed")?;
                anyhow::bail!("the node agent ended by itself");
            }
            Ok(_) = ready.wait_for(|ready| *ready), if !told => {
                told = true;
                publish(&nodes, &name, &fingerprint).await;
                talk(&format!("node {name} is ready; its API is {server}"));
            }
            _ = interrupts.next() => break,
        }
    }
    talk(if args.machines.keep_vms {
        "stopping; the machines go on, and the next `vmpod node` takes them over"
    } else {
        "stopping the machines; interrupt again to end at once"
    });
    stop.cancel();
    tokio::select! {
        ended = &mut work => {
            ended.context("the node agent panicked")?.context("the node agent failed while it stopped")?;
            talk("stopped");
            Ok(Exit::Done)
        }
        interrupt = interrupts.next() => {
            talk("ended at once; the next `vmpod node` takes over the machines that are left");
            Ok(Exit::Command(interrupt.code()))
        }
    }
}

/// What the renewal of certificates works on.
struct Kept<'a> {
    nodes: &'a kube::Api<k8s_openapi::api::core::v1::Node>,
    changing: Changing,
    client: kube::Client,
    kubelet: Kubelet,
    node: &'a vmpod_node::Node,
}

/// Renews the certificates that this node asked for, for as long as the result is kept.
fn keep_certificates(home: &Home, args: &args::Node, name: &str, kept: Kept<'_>) -> JoinSet<()> {
    let Kept { nodes, changing, client, kubelet, node } = kept;
    let (name, most) = (name.to_owned(), args.renew_certificates);
    let mut tasks = JoinSet::new();
    if args.bootstrap_kubeconfig.is_some() {
        let identity = Identity { kubeconfig: args.kubeconfig.clone(), name: name.clone(), client: changing, most };
        tasks.spawn(identity.keep());
    }
    if args.request_serving_certificate
        && let Some(shown) = node.certificates()
    {
        let (certificate, key) = Pair::paths(home);
        let address = args.address.to_string();
        let keeper = Shown { certificate, key, name: name.clone(), address, client, most };
        let nodes = nodes.clone();
        tasks.spawn(keeper.keep(move |cert_pem, key_pem| {
            let (shown, kubelet) = (shown.clone(), Kubelet { cert_pem, key_pem, ..kubelet.clone() });
            let (nodes, name) = (nodes.clone(), name.clone());
            async move {
                shown.replace(&kubelet).context("the certificate can't be used")?;
                publish(&nodes, &name, &fingerprint(&kubelet.cert_pem)?).await;
                Ok(())
            }
        }));
    }
    tasks
}

/// The Node's annotation that tells which certificate its kubelet API shows: the SHA-256 of the DER, in hexadecimal.
///
/// An API server that can't trace the certificate to an authority (ours, for one that the node signed itself) may
/// believe this instead, because only the node and administrators can write it.
const FINGERPRINT: &str = "vmpod.dev/kubelet-certificate-sha256";

async fn publish(nodes: &kube::Api<k8s_openapi::api::core::v1::Node>, name: &str, fingerprint: &str) {
    let patch = serde_json::json!({"metadata": {"annotations": {FINGERPRINT: fingerprint}}});
    let patch = kube::api::Patch::Merge(&patch);
    if let Err(error) = nodes.patch_metadata(name, &kube::api::PatchParams::default(), &patch).await {
        tracing::warn!(%error, "the node's certificate can't be published; exec and logs may be refused");
    }
}

fn fingerprint(cert_pem: &str) -> Result<String> {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject as _;
    let first =
        CertificateDer::from_pem_slice(cert_pem.as_bytes()).context("the kubelet API's certificate isn't PEM")?;
    let digest = sha2::Sha256::digest(&first);
    Ok(digest.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}")))
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))
}

/// The certificate authorities of a kubeconfig, as PEM.
fn authorities(config: &kube::Config) -> Option<String> {
    let all = config.root_cert.as_ref().filter(|all| !all.is_empty())?;
    Some(all.iter().map(|der| pem("CERTIFICATE", der)).collect())
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = text.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// A serving certificate and its key.
struct Pair {
    cert_pem: String,
    key_pem: String,
}

impl Pair {
    /// Where the certificate of the cluster's signer is kept, and its key.
    fn paths(home: &Home) -> (PathBuf, PathBuf) {
        let dir = home.node().join("pki");
        (dir.join("cluster.crt"), dir.join("cluster.key"))
    }

    /// The one that the cluster signed, when there is one that is still good.
    fn of_cluster(home: &Home) -> Option<Self> {
        let (cert, key) = Self::paths(home);
        let pair = Self { cert_pem: read(&cert).ok()?, key_pem: read(&key).ok()? };
        let life = Life::of(pair.cert_pem.as_bytes()).ok()?;
        (!life.is_over(jiff::Timestamp::now())).then_some(pair)
    }

    /// The one that the home keeps, signed by itself; made when there is none for this name and address.
    ///
    /// Kubernetes' own API servers don't verify the certificates of kubelets unless they are told to.
    fn of_home(home: &Home, name: &str, address: &str) -> Result<Self> {
        let dir = home.node().join("pki");
        let (cert, key) = (dir.join("serving.crt"), dir.join("serving.key"));
        let of = format!("{name} {address}");
        let made_for = dir.join("serving.for");
        if std::fs::read_to_string(&made_for).is_ok_and(|text| text == of) && cert.exists() && key.exists() {
            return Ok(Self { cert_pem: read(&cert)?, key_pem: read(&key)? });
        }
        std::fs::create_dir_all(&dir).with_context(|| format!("can't make {}", dir.display()))?;
        let made = rcgen::generate_simple_self_signed(vec![name.to_owned(), address.to_owned()])
            .context("can't make the kubelet API's certificate")?;
        let pair = Self { cert_pem: made.cert.pem(), key_pem: made.signing_key.serialize_pem() };
        home::write_private(&key, &pair.key_pem)?;
        home::write_private(&cert, &pair.cert_pem)?;
        home::write_private(&made_for, &of)?;
        Ok(pair)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_kept_for_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::resolve(Some(dir.path())).unwrap();
        let first = Pair::of_home(&home, "a", "127.0.0.1").unwrap();
        assert_eq!(Pair::of_home(&home, "a", "127.0.0.1").unwrap().cert_pem, first.cert_pem);
        assert_ne!(Pair::of_home(&home, "b", "127.0.0.1").unwrap().cert_pem, first.cert_pem);
    }

    #[test]
    fn the_fingerprint_is_the_ders() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::resolve(Some(dir.path())).unwrap();
        let pair = Pair::of_home(&home, "a", "127.0.0.1").unwrap();
        let print = fingerprint(&pair.cert_pem).unwrap();
        assert_eq!((print.len(), &fingerprint(&pair.cert_pem).unwrap()), (64, &print));
        assert!(fingerprint("nonsense").is_err());
    }

    #[test]
    fn pem_has_lines_of_64_letters() {
        let text = pem("CERTIFICATE", &[7; 100]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!((lines[0], lines[1].len(), lines.len()), ("-----BEGIN CERTIFICATE-----", 64, 5));
    }
}
