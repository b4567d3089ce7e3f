//! A host for the agent: a scripted world, a scripted API, a real image store, directories of its own.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use vmpod_image::{GuestConfig, ImportOptions, Reference, Source, Store, import};
use vmpod_machine::{Accel, FaultPoints, Machines, Memory, fake::World};
use vmpod_node::{Capacity, MachineDefaults, Node, NodeError, Options, Registries, server::Runtime};

use crate::api::Api;

pub(crate) const UIDS: [&str; 6] = [
    "5b0e6f0c-4ac1-4c2a-8d3f-b0a4be0e3f80",
    "5b0e6f0c-4ac1-4c2a-8d3f-b0a4be0e3f81",
    "5b0e6f0c-4ac1-4c2a-8d3f-b0a4be0e3f82",
    "5b0e6f0c-4ac1-4c2a-8d3f-b0a4be0e3f83",
    "5b0e6f0c-4ac1-4c2a-8d3f-b0a4be0e3f84",
    "5b0e6f0c-4ac1-4c2a-8d3f-b0a4be0e3f85",
];

pub(crate) struct Host {
    dir: tempfile::TempDir,
    pub(crate) api: Api,
    pub(crate) world: World,
}

/// How an agent is started.
#[derive(Clone, Default)]
pub(crate) struct Wish {
    pub(crate) keep_vms: bool,
    pub(crate) snapshots: bool,
    pub(crate) faults: FaultPoints,
}

pub(crate) struct Running {
    stop: CancellationToken,
    task: JoinHandle<Result<(), NodeError>>,
    ready: tokio::sync::watch::Receiver<bool>,
    pub(crate) runtime: Arc<dyn Runtime>,
}

impl Running {
    pub(crate) async fn until_ready(&self) {
        tokio::time::timeout(Duration::from_secs(20), self.ready.clone().wait_for(|ready| *ready))
            .await
            .unwrap()
            .unwrap();
    }

    /// Ends in order.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }

    /// Dies as from kill -9: nothing more of it runs.
    pub(crate) async fn die(self) {
        drop(self.runtime);
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }
}

impl Host {
    pub(crate) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("images")).unwrap();
        let kernel = dir.path().join("kernel");
        std::fs::write(&kernel, b"not really a kernel").unwrap();
        let options = ImportOptions {
            kernel: Some(kernel),
            cmdline: "console=ttyS0".to_owned(),
            min_memory: Some(64 << 20),
            guest: GuestConfig { ready_marker: Some("ready".to_owned()), ..GuestConfig::default() },
            // Its guest can take a new identity, when a script says so.
            labels: [("vmpod.dev/renewable".to_owned(), "true".to_owned())].into(),
            ..ImportOptions::default()
        };
        import(&store, Source::Kernel, &Reference::parse("tiny").unwrap(), options).await.unwrap();
        Self { dir, api: Api::new(), world: World::new() }
    }

    pub(crate) fn root(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) async fn start(&self, wish: Wish) -> Running {
        let running = self.spawn(wish).await;
        running.until_ready().await;
        running
    }

    /// Starts an agent without waiting for it.
    pub(crate) async fn spawn(&self, wish: Wish) -> Running {
        let machines =
            Machines::open_with_faults(self.dir.path().join("machines"), self.world.hypervisor(), wish.faults.clone())
                .unwrap();
        let options = Options {
            name: "n".to_owned(),
            dir: self.dir.path().join("node"),
            client: self.api.client(),
            store: Store::open(&self.dir.path().join("images")).unwrap(),
            machines,
            accel: Accel::Tcg,
            kubelet: None,
            address: IpAddr::from([10, 0, 0, 1]),
            capacity: Capacity::of_host(8, Memory::from_mib(16 << 10), 100 << 30),
            guest_login: None,
            defaults: MachineDefaults { cpus: 1, memory: Memory::from_mib(256) },
            registries: Registries::default(),
            image_gc: vmpod_node::ImageGc::default(),
            // How full the disk of whoever runs the tests is isn't theirs to tell.
            eviction: vmpod_node::Eviction::none(),
            prefetch: Vec::new(),
            labels: std::collections::BTreeMap::new(),
            taints: Vec::new(),
            docker_host: String::new(),
            network: vmpod_node::NetworkMode::User,
            nat: vmpod_network::nat::Config {
                bridge: "vmpodtest".to_owned(),
                subnet: vmpod_network::Subnet::USUAL,
                host: "test".to_owned(),
            },
            keep_vms: wish.keep_vms,
            snapshot_budget: wish.snapshots.then_some(1 << 30),
            shutdown_grace: Duration::from_secs(5),
        };
        let node = Node::open_with_faults(options, wish.faults).await.unwrap();
        let (ready, runtime, stop) = (node.ready(), node.runtime(), CancellationToken::new());
        let task = tokio::spawn(node.run(stop.clone()));
        Running { stop, task, ready, runtime }
    }

    fn machines(&self) -> Vec<PathBuf> {
        entries(&self.dir.path().join("machines"))
    }

    pub(crate) async fn until_no_machines(&self) {
        self.until("no machine's files are left", || self.machines().is_empty()).await;
    }

    /// Waits until nothing of any pod is left.
    pub(crate) async fn until_clean(&self) {
        let pods = self.dir.path().join("node/pods");
        self.until("nothing of a pod is left", || self.machines().is_empty() && entries(&pods).is_empty()).await;
    }

    /// Waits until a pod's machines hold no image: that is let go after their files are.
    pub(crate) async fn until_unheld(&self, uid: &str) {
        self.until("a pod that is over holds no image", || self.holders(uid) == 0).await;
    }

    async fn until(&self, what: &str, wanted: impl Fn() -> bool) {
        for _ in 0..500 {
            if wanted() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!(
            "never came true: {what}; machines {:?}, pods {:?}",
            self.machines(),
            entries(&self.dir.path().join("node/pods"))
        );
    }

    /// How many images a pod's machines hold.
    pub(crate) fn holders(&self, uid: &str) -> usize {
        let store = Store::open(&self.dir.path().join("images")).unwrap();
        store.holders().unwrap().into_iter().filter(|holder| holder.name.starts_with(uid)).count()
    }

    pub(crate) fn log_text(&self, uid: &str, attempt: u32) -> Vec<String> {
        log_text(self.root(), uid, attempt)
    }
}

/// The lines of a container's log.
pub(crate) fn log_text(root: &Path, uid: &str, attempt: u32) -> Vec<String> {
    let path = root.join(format!("node/pods/{uid}/vm/{attempt}.log"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.lines().map(|line| line.splitn(4, ' ').nth(3).unwrap_or_default().to_owned()).collect()
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    match std::fs::read_dir(dir) {
        Ok(all) => all.map(|entry| entry.unwrap().path()).collect(),
        Err(_) => Vec::new(),
    }
}
