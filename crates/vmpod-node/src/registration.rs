//! The Node object and its Lease.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    api::{
        coordination::v1::{Lease, LeaseSpec},
        core::v1::{
            ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeSpec,
            NodeStatus, NodeSystemInfo, Taint,
        },
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference, Time},
    },
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tokio::sync::watch;
use vmpod_image::Store;

use crate::{error_chain, host::Host, limited, options::Capacity, pressure::Pressure};

/// How often the status is computed.
const STATUS_EVERY: Duration = Duration::from_secs(10);
/// How often it is posted though nothing changed.
const REPORT_EVERY: SignedDuration = SignedDuration::from_mins(5);
const LEASE_SECONDS: i32 = 40;
const LEASE_EVERY: Duration = Duration::from_secs(10);
/// Most images in the status.
const IMAGES: usize = 50;

/// What a node offers of macOS guests, an extended resource: at most two at a time, by Apple's licence.
const MACOS_GUESTS: &str = "vmpod.dev/macos-guests";

/// What the Node object says about this host.
#[derive(Clone, Debug)]
pub(crate) struct Profile {
    pub(crate) name: String,
    pub(crate) address: IpAddr,
    pub(crate) kubelet_port: Option<u16>,
    pub(crate) capacity: Capacity,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) taints: Vec<Taint>,
    pub(crate) host: Host,
    pub(crate) hypervisor: String,
    pub(crate) features: Vec<String>,
}

/// Whether the node takes pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Health {
    /// Why it takes none, if it doesn't.
    pub(crate) unready: Option<&'static str>,
    /// What it is short of.
    pub(crate) pressure: Pressure,
}

/// The Node as it is first made.
pub(crate) fn node(profile: &Profile, images: Vec<ContainerImage>, now: Timestamp) -> Node {
    Node {
        metadata: ObjectMeta {
            name: Some(profile.name.clone()),
            labels: Some(labels(profile)),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec {
            taints: Some(profile.taints.clone()).filter(|taints| !taints.is_empty()),
            provider_id: Some(format!("vmpod://{}", profile.name)),
            ..NodeSpec::default()
        }),
        status: Some(status(profile, images, &Health::default(), None, now)),
    }
}

fn labels(profile: &Profile) -> BTreeMap<String, String> {
    let mut labels = profile.labels.clone();
    for (key, value) in [
        ("kubernetes.io/hostname", profile.name.as_str()),
        ("kubernetes.io/os", profile.host.os),
        ("kubernetes.io/arch", profile.host.arch),
        ("beta.kubernetes.io/os", profile.host.os),
        ("beta.kubernetes.io/arch", profile.host.arch),
    ] {
        labels.entry(key.to_owned()).or_insert_with(|| value.to_owned());
    }
    labels
}

/// The status; conditions that haven't changed keep their transition time from `old`.
pub(crate) fn status(
    profile: &Profile,
    images: Vec<ContainerImage>,
    health: &Health,
    old: Option<&NodeStatus>,
    now: Timestamp,
) -> NodeStatus {
    let capacity = &profile.capacity;
    let cpu = |millis: u64| {
        Quantity(if millis.is_multiple_of(1000) { (millis / 1000).to_string() } else { format!("{millis}m") })
    };
    // Apple allows so many macOS guests on a host. Who asks for one is scheduled where one is free.
    let mac = profile.hypervisor == vmpod_machine::vz::NAME;
    let macs = mac.then(|| (MACOS_GUESTS.to_owned(), Quantity(vmpod_machine::vz::slots::MOST.to_string())));
    // In Ki, as kubelets write it.
    let bytes = |bytes: u64| Quantity(format!("{}Ki", bytes / 1024));
    let list = |millis, memory| {
        BTreeMap::from([
            ("cpu".to_owned(), cpu(millis)),
            ("memory".to_owned(), bytes(memory)),
            ("ephemeral-storage".to_owned(), bytes(capacity.ephemeral_bytes)),
            ("pods".to_owned(), Quantity(capacity.pods.to_string())),
        ])
        .into_iter()
        .chain(macs.clone())
        .collect()
    };
    let address = |kind: &str, address: String| NodeAddress { type_: kind.to_owned(), address };
    NodeStatus {
        capacity: Some(list(
            u64::from(capacity.cpus) * 1000 * u64::from(capacity.cpu_overcommit_percent) / 100,
            capacity.memory.bytes(),
        )),
        allocatable: Some(list(capacity.allocatable_millicpus(), capacity.allocatable_memory())),
        addresses: Some(vec![
            address("InternalIP", profile.address.to_string()),
            address("Hostname", profile.name.clone()),
        ]),
        conditions: Some(conditions(health, old, now)),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: profile.kubelet_port.map(|port| DaemonEndpoint { port: i32::from(port) }),
        }),
        node_info: Some(NodeSystemInfo {
            architecture: profile.host.arch.to_owned(),
            operating_system: profile.host.os.to_owned(),
            boot_id: profile.host.boot_id.clone(),
            machine_id: profile.host.machine_id.clone(),
            system_uuid: profile.host.system_uuid.clone(),
            kernel_version: profile.host.kernel.clone(),
            os_image: profile.host.os_image.clone(),
            container_runtime_version: format!("vmpod://{}+{}", env!("CARGO_PKG_VERSION"), profile.hypervisor),
            // Clients compare it with the API server's; the release whose contract is kept.
            kubelet_version: format!("v1.36.0-vmpod.{}", env!("CARGO_PKG_VERSION")),
            kube_proxy_version: String::new(),
            ..NodeSystemInfo::default()
        }),
        images: Some(images),
        declared_features: Some(profile.features.clone()).filter(|features| !features.is_empty()),
        ..NodeStatus::default()
    }
}

fn conditions(health: &Health, old: Option<&NodeStatus>, now: Timestamp) -> Vec<NodeCondition> {
    let (ready, reason, message) = match health.unready {
        None => (true, "KubeletReady", "kubelet is posting ready status"),
        Some(why) => (false, "KubeletNotReady", why),
    };
    let memory = if health.pressure.memory {
        ("KubeletHasInsufficientMemory", "kubelet has insufficient memory available")
    } else {
        ("KubeletHasSufficientMemory", "kubelet has sufficient memory available")
    };
    let disk = if health.pressure.disk {
        ("KubeletHasDiskPressure", "kubelet has disk pressure")
    } else {
        ("KubeletHasNoDiskPressure", "kubelet has no disk pressure")
    };
    let old = old.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let now = Time(Timestamp::from_second(now.as_second()).unwrap_or(now));
    [
        ("MemoryPressure", health.pressure.memory, memory.0, memory.1),
        ("DiskPressure", health.pressure.disk, disk.0, disk.1),
        ("PIDPressure", false, "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        ("Ready", ready, reason, message),
    ]
    .into_iter()
    .map(|(kind, value, reason, message)| {
        let status = if value { "True" } else { "False" };
        let same = old.iter().find(|c| c.type_ == kind && c.status == status);
        NodeCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            last_heartbeat_time: Some(now.clone()),
            last_transition_time: same.and_then(|c| c.last_transition_time.clone()).or_else(|| Some(now.clone())),
        }
    })
    .collect()
}

/// Whether the difference is worth a write: heartbeats alone aren't.
fn differs(shown: &NodeStatus, wanted: &NodeStatus) -> bool {
    let strip = |status: &NodeStatus| {
        let mut value = serde_json::to_value(status).unwrap_or(Value::Null);
        if let Some(conditions) = value.get_mut("conditions").and_then(Value::as_array_mut) {
            for condition in conditions.iter_mut() {
                if let Some(condition) = condition.as_object_mut() {
                    condition.remove("lastHeartbeatTime");
                }
            }
            // Conditions of others don't count.
            conditions.retain(|c| {
                c.get("type")
                    .and_then(Value::as_str)
                    .is_some_and(|t| ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"].contains(&t))
            });
            conditions.sort_by_key(|c| c.get("type").and_then(Value::as_str).map(str::to_owned));
        }
        value
    };
    let (shown, wanted) = (strip(shown), strip(wanted));
    let Value::Object(wanted) = wanted else { return true };
    wanted.iter().any(|(field, value)| {
        let empty =
            value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(serde_json::Map::is_empty);
        shown.get(field) != Some(value) && !(empty && shown.get(field).is_none())
    })
}

/// The images here, largest first, as the kubelet lists them.
pub(crate) fn images(store: &Store) -> Vec<ContainerImage> {
    let mut all = match store.list() {
        Ok(all) => all,
        Err(error) => {
            tracing::warn!(error = error_chain(&error), "the images can't be listed");
            return Vec::new();
        }
    };
    all.sort_by(|a, b| {
        b.stored_bytes.cmp(&a.stored_bytes).then_with(|| a.digest.to_string().cmp(&b.digest.to_string()))
    });
    all.into_iter()
        .take(IMAGES)
        .map(|image| ContainerImage {
            names: Some(image.references.iter().map(ToString::to_string).collect()),
            size_bytes: Some(i64::try_from(image.stored_bytes).unwrap_or(i64::MAX)),
        })
        .collect()
}

/// Makes the Node, or brings an existing one up to date, and answers with it.
pub(crate) async fn register(client: &Client, profile: &Profile, store: &Store) -> Result<Node, kube::Error> {
    let api: Api<Node> = Api::all(client.clone());
    let now = Timestamp::now();
    let listed = list_images(store).await;
    match api.create(&PostParams::default(), &node(profile, listed.clone(), now)).await {
        Ok(node) => Ok(node),
        Err(kube::Error::Api(refused)) if refused.code == 409 => {
            let known = api.get(&profile.name).await?;
            let wanted = labels(profile);
            let old = known.metadata.labels.clone().unwrap_or_default();
            if wanted.iter().any(|(key, value)| old.get(key) != Some(value)) {
                let patch = json!({"metadata": {"labels": wanted}});
                api.patch(&profile.name, &PatchParams::default(), &Patch::Strategic(patch)).await?;
            }
            let current = status(profile, listed, &Health::default(), known.status.as_ref(), now);
            post(&api, &profile.name, &current).await
        }
        Err(error) => Err(error),
    }
}

async fn list_images(store: &Store) -> Vec<ContainerImage> {
    let store = store.clone();
    tokio::task::spawn_blocking(move || images(&store)).await.unwrap_or_default()
}

async fn post(api: &Api<Node>, name: &str, status: &NodeStatus) -> Result<Node, kube::Error> {
    let mut status = serde_json::to_value(status).map_err(kube::Error::SerdeError)?;
    // Addresses are merged by type, so a list that shrank must replace.
    if let Some(addresses) = status.get_mut("addresses").and_then(Value::as_array_mut) {
        addresses.push(json!({"$patch": "replace"}));
    }
    api.patch_status(name, &PatchParams::default(), &Patch::Strategic(json!({"status": status}))).await
}

/// Keeps the Node's status true, until cancelled by being dropped. `updated` sees each object.
pub(crate) async fn keep_status(
    client: Client,
    profile: Profile,
    store: Store,
    mut shown: Node,
    mut pressure: watch::Receiver<Pressure>,
    updated: impl Fn(Arc<Node>),
) {
    let api: Api<Node> = Api::all(client.clone());
    let mut posted = Timestamp::now();
    let mut tick = tokio::time::interval(STATUS_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            Ok(()) = pressure.changed() => {}
        }
        let now = Timestamp::now();
        let health = Health { pressure: *pressure.borrow_and_update(), ..Health::default() };
        let wanted = status(&profile, list_images(&store).await, &health, shown.status.as_ref(), now);
        let due = now.duration_since(posted) >= REPORT_EVERY || now < posted;
        if !due && shown.status.as_ref().is_some_and(|shown| !differs(shown, &wanted)) {
            // Labels and taints are others' to change, and pods are admitted by them.
            match limited(api.get(&profile.name)).await {
                Ok(node) => {
                    shown = node;
                    updated(Arc::new(shown.clone()));
                }
                Err(kube::Error::Api(error)) if error.code == 404 => shown.status = None,
                Err(error) => tracing::debug!(error = error_chain(&error), "the Node can't be read"),
            }
            continue;
        }
        let result = match limited(post(&api, &profile.name, &wanted)).await {
            // Somebody deleted it; a node that works is there.
            Err(kube::Error::Api(error)) if error.code == 404 => {
                limited(Box::pin(register(&client, &profile, &store))).await
            }
            result => result,
        };
        match result {
            Ok(node) => {
                shown = node;
                posted = now;
                updated(Arc::new(shown.clone()));
            }
            Err(error) => {
                tracing::warn!(error = error_chain(&error), "the Node's status can't be written; trying again");
            }
        }
    }
}

/// Says that the node takes no more pods.
pub(crate) async fn say_goodbye(client: &Client, profile: &Profile, store: &Store) -> Result<(), kube::Error> {
    let api: Api<Node> = Api::all(client.clone());
    let known = api.get(&profile.name).await?;
    let health = Health { unready: Some("node is shutting down"), ..Health::default() };
    let status = status(profile, list_images(store).await, &health, known.status.as_ref(), Timestamp::now());
    post(&api, &profile.name, &status).await.map(drop)
}

/// Renews the Lease every ten seconds, until cancelled by being dropped.
pub(crate) async fn keep_lease(client: Client, node: Node) {
    let api: Api<Lease> = Api::namespaced(client, "kube-node-lease");
    let name = node.metadata.name.clone().unwrap_or_default();
    let mut known: Option<Lease> = None;
    loop {
        let result = limited(renew(&api, &node, &name, known.take())).await;
        let failed = result.is_err();
        match result {
            Ok(lease) => known = Some(lease),
            Err(error) => {
                tracing::warn!(error = error_chain(&error), "the node's Lease can't be renewed; trying again");
            }
        }
        // ± 4 %, so that many nodes don't renew together.
        let jitter = f64::from(rand::random_range(-40_i32..=40)) / 1000.0;
        let wait = if failed { Duration::from_secs(2) } else { LEASE_EVERY };
        tokio::time::sleep(wait.mul_f64(1.0 + jitter)).await;
    }
}

async fn renew(api: &Api<Lease>, node: &Node, name: &str, known: Option<Lease>) -> Result<Lease, kube::Error> {
    let now = MicroTime(Timestamp::now());
    let known = match known {
        Some(lease) => Some(lease),
        None => api.get_opt(name).await?,
    };
    if let Some(mut lease) = known {
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = Some(name.to_owned());
        spec.lease_duration_seconds = Some(LEASE_SECONDS);
        spec.renew_time = Some(now);
        return api.replace(name, &PostParams::default(), &lease).await;
    }
    let lease = Lease {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".to_owned(),
                kind: "Node".to_owned(),
                name: name.to_owned(),
                uid: node.metadata.uid.clone().unwrap_or_default(),
                ..OwnerReference::default()
            }]),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(name.to_owned()),
            lease_duration_seconds: Some(LEASE_SECONDS),
            renew_time: Some(now),
            ..LeaseSpec::default()
        }),
    };
    api.create(&PostParams::default(), &lease).await
}

#[cfg(test)]
mod tests {
    use vmpod_machine::Memory;

    use super::*;

    fn profile() -> Profile {
        Profile {
            name: "n1".to_owned(),
            address: IpAddr::from([10, 0, 0, 1]),
            kubelet_port: Some(10250),
            capacity: Capacity::of_host(4, Memory::from_mib(8192), 100 << 30),
            labels: BTreeMap::from([("site".to_owned(), "bkk".to_owned())]),
            taints: Vec::new(),
            host: Host {
                os: "linux",
                arch: "amd64",
                kernel: "6.1".to_owned(),
                os_image: "Debian".to_owned(),
                boot_id: "boot".to_owned(),
                machine_id: "machine".to_owned(),
                system_uuid: "uuid".to_owned(),
            },
            hypervisor: "qemu".to_owned(),
            features: Vec::new(),
        }
    }

    #[test]
    fn a_node_says_what_it_is() {
        let mut node = node(&profile(), Vec::new(), Timestamp::UNIX_EPOCH);
        if let Some(info) = node.status.as_mut().and_then(|status| status.node_info.as_mut()) {
            info.kubelet_version = "version".to_owned();
            info.container_runtime_version = "version".to_owned();
        }
        insta::assert_json_snapshot!(node);
    }

    #[test]
    fn a_heartbeat_alone_is_not_written() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let first = status(&profile(), Vec::new(), &Health::default(), None, at(0));
        let second = status(&profile(), Vec::new(), &Health::default(), Some(&first), at(10));
        assert!(!differs(&first, &second));
        let later = status(
            &profile(),
            Vec::new(),
            &Health { unready: Some("node is shutting down"), ..Health::default() },
            Some(&second),
            at(20),
        );
        assert!(differs(&second, &later));
        let ready = later.conditions.unwrap().into_iter().find(|c| c.type_ == "Ready").unwrap();
        assert_eq!((ready.status.as_str(), ready.last_transition_time), ("False", Some(Time(at(20)))));
        let short = Health { pressure: Pressure { memory: false, disk: true }, ..Health::default() };
        let short = status(&profile(), Vec::new(), &short, Some(&first), at(10));
        assert!(differs(&first, &short));
        let told = short.conditions.unwrap().into_iter().find(|c| c.type_ == "DiskPressure").unwrap();
        assert_eq!((told.status.as_str(), told.reason.as_deref()), ("True", Some("KubeletHasDiskPressure")));
        let mut other = profile();
        other.capacity.pods = 3;
        assert!(differs(&first, &status(&other, Vec::new(), &Health::default(), Some(&first), at(0))));
    }
}
