//! A whole Kubernetes on this machine: the API and the node agent in one process.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use vmpod_apiserver::{ApiServer, Identity};
use vmpod_node::{Kubelet, Node};

use crate::agent::{self, Parts};
use crate::args::NodeMachines;
use crate::home::{self, Home};
use crate::image;
use crate::ports;

/// What to start.
pub(crate) struct Plan<'a> {
    pub(crate) home: &'a Home,
    /// The node's name.
    pub(crate) name: String,
    /// Where the API listens; the node's address is the same.
    pub(crate) listen: SocketAddr,
    pub(crate) kubelet_port: u16,
    pub(crate) tls_sans: Vec<String>,
    pub(crate) machines: &'a NodeMachines,
    /// Whether runner pools are kept: how often their CI systems are asked, and what is counted.
    pub(crate) fleet: Option<(Duration, vmpod_fleet::Metrics)>,
}

/// The running parts.
pub(crate) struct Stack {
    home: Home,
    api: Part,
    node: Part,
    fleet: Option<Part>,
    /// Where the API really listens.
    pub(crate) address: SocketAddr,
    /// Where the kubelet API really listens.
    pub(crate) kubelet: Option<SocketAddr>,
}

struct Part {
    name: &'static str,
    stop: CancellationToken,
    task: JoinHandle<Result<()>>,
}

impl Part {
    fn spawn(name: &'static str, work: impl FnOnce(CancellationToken) -> Work) -> Self {
        let stop = CancellationToken::new();
        let task = tokio::spawn(work(stop.clone()));
        Self { name, stop, task }
    }

    /// Waits for an end that nobody asked for.
    async fn ended(&mut self) -> anyhow::Error {
        match (&mut self.task).await {
            Ok(Ok(())) => anyhow!("{} ended by itself", self.name),
            Ok(Err(error)) => error.context(format!("{} failed", self.name)),
            Err(error) => anyhow::Error::new(error).context(format!("{} panicked", self.name)),
        }
    }

    async fn stop(self, patience: Duration) -> Result<()> {
        self.stop.cancel();
        match tokio::time::timeout(patience, self.task).await {
            Err(_) => Err(anyhow!("{} did not stop within {} s", self.name, patience.as_secs())),
            Ok(Ok(result)) => result.with_context(|| format!("{} failed while it stopped", self.name)),
            Ok(Err(error)) => Err(error).with_context(|| format!("{} panicked", self.name)),
        }
    }
}

async fn ended(part: &mut Option<Part>) -> anyhow::Error {
    match part {
        Some(part) => part.ended().await,
        None => std::future::pending().await,
    }
}

type Work = futures::future::BoxFuture<'static, Result<()>>;

impl Stack {
    /// Starts the API, then the agent; returns when the node is ready for pods.
    pub(crate) async fn start(plan: Plan<'_>) -> Result<Self> {
        let Plan { home, name, listen, kubelet_port, tls_sans, machines, fleet } = plan;
        // A kubeconfig of an earlier run must not lead anyone to a port that isn't ours.
        remove_file(&home.kubeconfig())?;
        let server =
            ApiServer::open(vmpod_apiserver::Options { dir: home.api(), listen: Some(listen), extra_sans: tls_sans })
                .await
                .map_err(|error| ports::explain(error.into(), "the Kubernetes API", listen, "--api-port"))?;
        let address = server.address().context("the Kubernetes API has no address")?;

        let ip = reachable(address.ip());
        let kubelet_listen = SocketAddr::new(listen.ip(), kubelet_port);
        let serving = server
            .pki()
            .issue_serving(&format!("system:node:{name}"), &[name.clone(), ip.to_string()])
            .context("can't make the kubelet API's certificate")?;
        let client = kube::Client::new(server.router_as(Identity::node(&name)), "default");
        let options = agent::options(Parts {
            home,
            name: name.clone(),
            address: ip,
            kubelet: Kubelet {
                listen: kubelet_listen,
                cert_pem: serving.cert_pem,
                key_pem: serving.key_pem,
                client_ca_pem: server.pki().ca_pem().to_owned(),
            },
            client,
            store: image::open(home)?,
            machines,
        })
        .await?;

        let operator = server.router_as(Identity::admin());
        let config = server.kubeconfig(&Identity::admin()).context("can't make the kubeconfig")?;
        let mut api = Part::spawn("the Kubernetes API", |stop| {
            Box::pin(async move { server.serve(stop).await.map_err(Into::into) })
        });
        let node = match open_node(options, kubelet_listen).await {
            Ok(node) => node,
            Err(error) => {
                api.stop(Duration::from_secs(5)).await?;
                return Err(error);
            }
        };
        let kubelet = node.kubelet_address();
        let mut ready = node.ready();
        let mut node = Part::spawn("the node agent", |stop| {
            Box::pin(async move { Box::pin(node.run(stop)).await.map_err(Into::into) })
        });
        tokio::select! {
            error = api.ended() => return Err(error),
            error = node.ended() => return Err(error),
            result = ready.wait_for(|ready| *ready) => { result.context("the node agent ended before it was ready")?; }
        }
        let fleet = fleet.map(|(poll, metrics)| {
            let client = kube::Client::new(operator, "default");
            let options =
                vmpod_fleet::Options { poll, metrics, ..vmpod_fleet::Options::new(client, format!("vmpod-up-{name}")) };
            Part::spawn("the fleet operator", |stop| {
                Box::pin(async move { vmpod_fleet::run(options, stop).await.map_err(Into::into) })
            })
        });
        home::write_private(&home.kubeconfig(), &config)?;
        Ok(Self { home: home.clone(), api, node, fleet, address, kubelet })
    }

    /// Waits until a part ends by itself, and tells why.
    pub(crate) async fn ended(&mut self) -> anyhow::Error {
        tokio::select! {
            error = self.api.ended() => error,
            error = self.node.ended() => error,
            error = ended(&mut self.fleet) => error,
        }
    }

    /// Stops the agent, then the API that it reports to. Both get their chance whatever happens to the other.
    pub(crate) async fn stop(self, grace: Duration) -> Result<()> {
        // Nobody should find a server that is about to be gone.
        let file = remove_file(&self.home.kubeconfig());
        // What it would do about machines that are being stopped is nobody's wish.
        let fleet = match self.fleet {
            Some(fleet) => fleet.stop(Duration::from_secs(10)).await,
            None => Ok(()),
        };
        let node = self.node.stop(grace + Duration::from_secs(30)).await;
        let api = self.api.stop(Duration::from_secs(10)).await;
        fleet.and(node).and(api).and(file)
    }
}

/// Opens the agent and explains a port that is taken.
pub(crate) async fn open_node(options: vmpod_node::Options, listen: SocketAddr) -> Result<Node> {
    Node::open(options).await.map_err(|error| ports::explain(error.into(), "the node agent", listen, "--kubelet-port"))
}

/// The address at which a listener on this address can be reached from this host.
fn reachable(listen: IpAddr) -> IpAddr {
    match listen {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
        ip => ip,
    }
}

fn remove_file(path: &std::path::Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("can't remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
