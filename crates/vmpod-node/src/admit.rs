//! Whether a pod may run here at all.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Node, NodeSelectorRequirement, NodeSelectorTerm, Pod, Taint};

use vmpod_api::annotations;

use crate::{
    action::Action,
    network::{InvalidNetwork, NetworkMode},
    pod::{self, Requests},
    probe::Purpose,
    sidecars,
    snapshots::Start,
    volumes,
};

/// Why a pod is refused: its status gets phase Failed with these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl Refusal {
    pub(crate) fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}

/// What the node has.
#[derive(Clone, Debug, Default)]
pub(crate) struct Room {
    pub(crate) allocatable: Requests,
    pub(crate) pods: u32,
    /// What the admitted pods ask for, and how many they are.
    pub(crate) used: Requests,
    pub(crate) admitted: u32,
}

/// Decides by what the pod itself asks of a node agent like this one.
///
/// `privileged` says that the agent may change the host's network.
pub(crate) fn supported(pod: &Pod, privileged: bool) -> Result<(), Refusal> {
    let Some(spec) = pod::spec(pod) else {
        return Err(Refusal::new("InvalidPod", "The Pod has no spec"));
    };
    for volume in spec.volumes.iter().flatten() {
        if let Some(what) = volumes::unsupported(volume) {
            let message = format!("Volume {:?}: {what} is not supported on this node", volume.name);
            return Err(Refusal::new("VolumesUnsupported", message));
        }
    }
    if let Some(container) = spec.containers.first() {
        let unsupported = [
            ("a probe or hook of another host", asks_elsewhere(container)),
            ("volume devices", container.volume_devices.as_ref().is_some_and(|v| !v.is_empty())),
        ];
        if let Some((what, _)) = unsupported.iter().find(|(_, asked)| *asked) {
            return Err(Refusal::new(
                "FieldUnsupported",
                format!("Container {:?} asks for {what}, which this node does not support yet", container.name),
            ));
        }
    }
    if spec.host_network == Some(true) {
        return Err(Refusal::new(
            "FieldUnsupported",
            "hostNetwork makes no sense for a virtual machine: it has a network of its own",
        ));
    }
    let refuse = |why: String| Err(Refusal::new("NetworkUnsupported", why));
    match NetworkMode::asked(pod) {
        Ok(Some(NetworkMode::Nat | NetworkMode::Bridge(_))) if sidecars::any(pod) => {
            return refuse(format!(
                "Annotation {}: a machine with containers beside it is on the network \"user\"",
                annotations::NETWORK
            ));
        }
        Ok(Some(NetworkMode::Nat | NetworkMode::Bridge(_))) if !privileged => {
            return refuse(format!(
                "Annotation {}: a network other than \"user\" needs a node agent on Linux that runs as root",
                annotations::NETWORK
            ));
        }
        Ok(_) => {}
        Err(other) => {
            return refuse(format!("Annotation {}={other:?}: {InvalidNetwork}", annotations::NETWORK));
        }
    }
    if let Some(name) = sidecars::after_machine(pod)
        .find(|name| !spec.containers.iter().skip(1).any(|container| container.name == *name))
    {
        return Err(Refusal::new(
            "FieldUnsupported",
            format!(
                "Annotation {}: {name:?} is no container beside the machine; it takes the names of such, separated by commas",
                annotations::AFTER_MACHINE
            ),
        ));
    }
    if let Err(other) = Start::of(pod) {
        return Err(Refusal::new(
            "StartUnsupported",
            format!("Annotation {}={other:?}: it takes \"auto\", \"boot\" or \"snapshot\"", annotations::START),
        ));
    }
    Ok(())
}

/// Decides by what Apple's networks can't do.
pub(crate) fn on_apple(pod: &Pod) -> Result<(), Refusal> {
    let ports = pod::machine_container(pod).map(crate::network::host_ports).unwrap_or_default();
    match ports.first() {
        None => Ok(()),
        Some(port) => Err(Refusal::new(
            "NetworkUnsupported",
            format!(
                "hostPort {}: on this node machines are on Apple's networks, which forward no ports of the host; reach the machine at its own address",
                port.host_port
            ),
        )),
    }
}

/// Capabilities that a container beside the machine may add: those of Kubernetes' baseline policy
/// (kubernetes.io/docs/concepts/security/pod-security-standards), and those over the pod's own network.
const CAPABILITIES: [&str; 15] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_ADMIN",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// What a node lacks for pods with containers beside their machine: why, in words.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lacks {
    /// Nothing runs such containers.
    pub(crate) engine: Option<String>,
    /// Machines can't share directories with them.
    pub(crate) shares: Option<String>,
}

/// Decides by the containers beside the machine.
pub(crate) fn company(pod: &Pod, lacks: Lacks) -> Result<(), Refusal> {
    let members = sidecars::members(pod);
    if members.is_empty() {
        return Ok(());
    }
    if let Some(why) = lacks.engine {
        let message = format!("The Pod has containers beside its virtual machine, which Docker runs, and {why}");
        return Err(Refusal::new("SidecarsUnsupported", message));
    }
    let spec = pod::spec(pod);
    let shared = [
        ("hostPID", spec.and_then(|spec| spec.host_pid)),
        ("hostIPC", spec.and_then(|spec| spec.host_ipc)),
        ("shareProcessNamespace", spec.and_then(|spec| spec.share_process_namespace)),
    ];
    if let Some((what, _)) = shared.iter().find(|(_, asked)| *asked == Some(true)) {
        let message =
            format!("The Pod asks for {what}, which this node does not support for the containers beside its machine");
        return Err(Refusal::new("FieldUnsupported", message));
    }
    let empty_dirs: Vec<_> = pod::spec(pod)
        .and_then(|spec| spec.volumes.as_deref())
        .unwrap_or_default()
        .iter()
        .filter(|volume| volume.empty_dir.is_some())
        .map(|volume| volume.name.as_str())
        .collect();
    let mounts = |container: &Container| container.volume_mounts.clone().unwrap_or_default();
    let shared = volumes::shared(pod);
    if let (Some(name), Some(why)) = (shared.first(), lacks.shares) {
        let message =
            format!("Volume {name:?} is an emptyDir of the virtual machine and the containers beside it, and {why}");
        return Err(Refusal::new("VolumesUnsupported", message));
    }
    let in_memory = |name: &str| {
        let mut all = spec.and_then(|spec| spec.volumes.as_deref()).unwrap_or_default().iter();
        let medium =
            all.find(|volume| volume.name == name).and_then(|volume| volume.empty_dir.as_ref()?.medium.as_deref());
        medium == Some("Memory")
    };
    if let Some(name) = shared.iter().find(|name| in_memory(name)) {
        let message = format!(
            "Volume {name:?} is an emptyDir in memory that the virtual machine and a container beside it mount: they share directories on disk only"
        );
        return Err(Refusal::new("VolumesUnsupported", message));
    }
    for member in members {
        let container = member.container;
        let refuse = |what: &str| {
            let message = format!("Container {:?} asks for {what}, which this node does not support", container.name);
            Err(Refusal::new("FieldUnsupported", message))
        };
        if asks_elsewhere(container) {
            return refuse("a probe or hook of another host");
        }
        if container.volume_devices.as_ref().is_some_and(|devices| !devices.is_empty()) {
            return refuse("volume devices");
        }
        if container.security_context.as_ref().and_then(|context| context.privileged) == Some(true) {
            return refuse("privileged, which would be root on the host (run what needs it in the virtual machine)");
        }
        let capabilities = container.security_context.as_ref().and_then(|context| context.capabilities.as_ref());
        let added = capabilities.and_then(|capabilities| capabilities.add.as_deref()).unwrap_or_default();
        if let Some(name) = added.iter().find(|name| !CAPABILITIES.contains(&name.trim_start_matches("CAP_"))) {
            return refuse(&format!(
                "capability {name}, which reaches beyond the pod (run what needs it in the virtual machine)"
            ));
        }
        if container.image.as_deref().unwrap_or_default().is_empty() {
            return refuse("no image");
        }
        for mount in mounts(container).iter().filter(|mount| empty_dirs.contains(&mount.name.as_str())) {
            let below = |path: &Option<String>| path.as_deref().is_some_and(|path| !path.is_empty());
            if below(&mount.sub_path) || below(&mount.sub_path_expr) {
                // Another container of the pod could put a link there that leads out of the volume.
                return refuse("subPath of an emptyDir");
            }
        }
    }
    Ok(())
}

/// Whether a probe or hook names a host: what is asked is the machine, and nothing that the node can reach besides.
fn asks_elsewhere(container: &Container) -> bool {
    let probes = Purpose::ALL.iter().filter_map(|purpose| Action::of_probe(purpose.of(container)?));
    let hooks = container.lifecycle.iter().flat_map(|lifecycle| [&lifecycle.post_start, &lifecycle.pre_stop]);
    let hooks = hooks.flatten().filter_map(Action::of_hook);
    probes.chain(hooks).any(|action| action.host().is_some())
}

/// Decides by the node's labels and what is left of it, with the kubelet's reasons and wording.
pub(crate) fn fits(pod: &Pod, labels: &BTreeMap<String, String>, node: &str, room: &Room) -> Result<(), Refusal> {
    if room.admitted + 1 > room.pods {
        return Err(out_of("OutOfpods", "pods", 1, u64::from(room.admitted), u64::from(room.pods)));
    }
    let asked = Requests::of(pod);
    let (used, all) = (room.used, room.allocatable);
    if asked.millicpus > 0 && used.millicpus.saturating_add(asked.millicpus) > all.millicpus {
        return Err(out_of("OutOfcpu", "cpu", asked.millicpus, used.millicpus, all.millicpus));
    }
    if asked.memory > 0 && used.memory.saturating_add(asked.memory) > all.memory {
        return Err(out_of("OutOfmemory", "memory", asked.memory, used.memory, all.memory));
    }
    if asked.ephemeral > 0 && used.ephemeral.saturating_add(asked.ephemeral) > all.ephemeral {
        return Err(out_of(
            "OutOfephemeral-storage",
            "ephemeral-storage",
            asked.ephemeral,
            used.ephemeral,
            all.ephemeral,
        ));
    }
    if !selected(pod, labels, node) {
        return Err(Refusal::new("NodeAffinity", "Predicate NodeAffinity failed"));
    }
    if let Some(os) = pod::spec(pod).and_then(|spec| spec.os.as_ref())
        && labels.get("kubernetes.io/os").is_some_and(|label| *label != os.name)
    {
        return Err(Refusal::new(
            "PodOSNotSupported",
            format!("Failed to admit pod as the OS field doesn't match node OS: {:?}", os.name),
        ));
    }
    Ok(())
}

/// Whether the pod tolerates the node's `NoExecute` taints; the kubelet checks no others.
pub(crate) fn tolerates(pod: &Pod, node: &Node) -> Result<(), Refusal> {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let tolerations = pod::spec(pod).and_then(|spec| spec.tolerations.as_deref()).unwrap_or_default();
    let tolerated = |taint: &Taint| {
        tolerations.iter().any(|t| {
            t.effect.as_deref().is_none_or(|effect| effect.is_empty() || effect == taint.effect)
                && match t.operator.as_deref() {
                    Some("Exists") => t.key.as_deref().is_none_or(|key| key.is_empty() || key == taint.key),
                    _ => {
                        t.key.as_deref() == Some(&taint.key)
                            && t.value.as_deref().unwrap_or("") == taint.value.as_deref().unwrap_or("")
                    }
                }
        })
    };
    match taints.iter().find(|taint| taint.effect == "NoExecute" && !tolerated(taint)) {
        None => Ok(()),
        Some(_) => Err(Refusal::new("TaintToleration", "Predicate TaintToleration failed")),
    }
}

fn out_of(reason: &'static str, name: &str, requested: u64, used: u64, capacity: u64) -> Refusal {
    Refusal::new(
        reason,
        format!("Node didn't have enough resource: {name}, requested: {requested}, used: {used}, capacity: {capacity}"),
    )
}

fn selected(pod: &Pod, labels: &BTreeMap<String, String>, node: &str) -> bool {
    let Some(spec) = pod::spec(pod) else { return true };
    if !pod::entries(spec.node_selector.as_ref()).all(|(key, value)| labels.get(key) == Some(value)) {
        return false;
    }
    let required = spec
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    required.is_none_or(|selector| selector.node_selector_terms.iter().any(|term| term_matches(term, labels, node)))
}

fn term_matches(term: &NodeSelectorTerm, labels: &BTreeMap<String, String>, node: &str) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    // An empty term matches nothing.
    !(expressions.is_empty() && fields.is_empty())
        && expressions.iter().all(|e| requirement(e, labels.get(&e.key).map(String::as_str)))
        && fields.iter().all(|e| e.key == "metadata.name" && requirement(e, Some(node)))
}

fn requirement(wanted: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = wanted.values.as_deref().unwrap_or_default();
    let among = |value: &str| values.iter().any(|v| v == value);
    let number = |text: &str| text.parse::<i64>().ok();
    match wanted.operator.as_str() {
        "In" => value.is_some_and(among),
        "NotIn" => !value.is_some_and(among),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" | "Lt" => match (value.and_then(number), values.first().and_then(|v| number(v))) {
            (Some(have), Some(limit)) => {
                if wanted.operator == "Gt" {
                    have > limit
                } else {
                    have < limit
                }
            }
            _ => false,
        },
        _ => false,
    }
}

#[cfg(test)]
#[expect(clippy::needless_pass_by_value, reason = "JSON is written in place")]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(spec: Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap()
    }

    fn reason(result: Result<(), Refusal>) -> Option<&'static str> {
        result.err().map(|refusal| refusal.reason)
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        let container = json!({"name": "vm"});
        assert_eq!(
            supported(
                &pod(
                    json!({"containers": [container], "volumes": [{"name": "kube-api-access-x", "projected": {"sources": []}}]})
                ),
                true
            ),
            Ok(())
        );
        for (spec, want) in [
            (
                json!({"containers": [container], "volumes": [{"name": "data", "emptyDir": {"sizeLimit": "1Gi"}}]}),
                "VolumesUnsupported",
            ),
            (
                json!({"containers": [container], "volumes": [{"name": "kube-api-access-x", "hostPath": {"path": "/"}}]}),
                "VolumesUnsupported",
            ),
            (
                json!({"containers": [{"name": "vm", "livenessProbe": {"tcpSocket": {"port": 22, "host": "169.254.169.254"}}}]}),
                "FieldUnsupported",
            ),
            (
                json!({"containers": [{"name": "vm", "lifecycle": {"preStop": {"httpGet": {"port": 80, "host": "db"}}}}]}),
                "FieldUnsupported",
            ),
            (json!({"containers": [container], "hostNetwork": true}), "FieldUnsupported"),
        ] {
            assert_eq!(reason(supported(&pod(spec.clone()), true)), Some(want), "{spec}");
        }
    }

    #[test]
    fn what_waits_for_the_machine_must_be_there() {
        let asks = |names: &str| {
            let mut pod = pod(json!({"containers": [{"name": "vm"}, {"name": "a"}, {"name": "b"}]}));
            pod.metadata.annotations = Some([(annotations::AFTER_MACHINE.to_owned(), names.to_owned())].into());
            supported(&pod, true)
        };
        assert_eq!((asks("a"), asks(" b, a ,"), asks("")), (Ok(()), Ok(()), Ok(())));
        for names in ["c", "a,vm"] {
            assert!(asks(names).unwrap_err().message.contains("no container beside the machine"), "{names}");
        }
    }

    #[test]
    fn networks_that_cannot_be_had_are_refused_by_name() {
        let asks = |network: &str, containers: Value| {
            let mut pod = pod(json!({"containers": containers}));
            pod.metadata.annotations = Some([(annotations::NETWORK.to_owned(), network.to_owned())].into());
            pod
        };
        let (alone, hybrid) = (json!([{"name": "vm"}]), json!([{"name": "vm"}, {"name": "a", "image": "i"}]));
        assert_eq!(supported(&asks("nat", alone.clone()), true), Ok(()));
        assert_eq!(supported(&asks("user", hybrid.clone()), false), Ok(()));
        for (pod, privileged, why) in [
            (asks("nat", alone.clone()), false, "runs as root"),
            (asks("nat", hybrid.clone()), true, "is on the network \"user\""),
            (asks("bridge:br0", hybrid.clone()), true, "is on the network \"user\""),
            (asks("bridged", alone), true, "it takes \"user\", \"nat\" or \"bridge:NAME\""),
        ] {
            let refusal = supported(&pod, privileged).unwrap_err();
            assert_eq!(refusal.reason, "NetworkUnsupported");
            assert!(refusal.message.contains(why), "{}", refusal.message);
        }
    }

    #[test]
    fn what_sidecars_may_not_have_is_refused_by_name() {
        let mounts = json!([{"name": "shared", "mountPath": "/s"}, {"name": "fast", "mountPath": "/f"}]);
        let vm = json!({"name": "vm", "volumeMounts": mounts});
        let volumes = json!([
            {"name": "shared", "emptyDir": {}}, {"name": "own", "emptyDir": {}}, {"name": "fast", "emptyDir": {"medium": "Memory"}}]);
        let no_engine = || Lacks { engine: Some("there is none".to_owned()), ..Lacks::default() };
        let with = |side: Value| pod(json!({"containers": [vm, side], "volumes": volumes}));
        assert_eq!(company(&pod(json!({"containers": [vm]})), no_engine()), Ok(()));
        let fine = json!({"name": "a", "image": "i", "volumeMounts": [{"name": "own", "mountPath": "/o"}]});
        assert_eq!(company(&with(fine.clone()), Lacks::default()), Ok(()));
        let refusal = company(&with(fine.clone()), no_engine()).unwrap_err();
        assert_eq!(refusal.reason, "SidecarsUnsupported");
        assert!(refusal.message.ends_with("and there is none"), "{}", refusal.message);
        let shares = json!({"name": "a", "image": "i", "volumeMounts": [{"name": "shared", "mountPath": "/o"}]});
        assert_eq!(company(&with(shares.clone()), Lacks::default()), Ok(()));
        let lacks = Lacks { shares: Some("virtiofsd isn't there".to_owned()), ..Lacks::default() };
        assert_eq!(company(&with(fine), lacks.clone()), Ok(()), "only who shares one needs it");
        let refusal = company(&with(shares), lacks).unwrap_err();
        let words = "Volume \"shared\" is an emptyDir of the virtual machine and the containers beside it, and virtiofsd isn't there";
        assert_eq!((refusal.reason, refusal.message.as_str()), ("VolumesUnsupported", words));
        for (side, want) in [
            (json!({"name": "a"}), "FieldUnsupported"),
            (
                json!({"name": "a", "image": "i", "securityContext": {"capabilities": {"add": ["NET_ADMIN", "CAP_SYS_ADMIN"]}}}),
                "FieldUnsupported",
            ),
            (
                json!({"name": "a", "image": "i", "securityContext": {"capabilities": {"add": ["ALL"]}}}),
                "FieldUnsupported",
            ),
            (json!({"name": "a", "image": "i", "securityContext": {"privileged": true}}), "FieldUnsupported"),
            (
                json!({"name": "a", "image": "i", "volumeMounts": [{"name": "own", "mountPath": "/o", "subPath": "x"}]}),
                "FieldUnsupported",
            ),
            (
                json!({"name": "a", "image": "i", "volumeMounts": [{"name": "fast", "mountPath": "/o"}]}),
                "VolumesUnsupported",
            ),
            (
                json!({"name": "a", "image": "i", "livenessProbe": {"tcpSocket": {"port": 1, "host": "db"}}}),
                "FieldUnsupported",
            ),
        ] {
            assert_eq!(reason(company(&with(side.clone()), Lacks::default())), Some(want), "{side}");
        }
        for field in ["hostPID", "hostIPC", "shareProcessNamespace"] {
            let mut spec = json!({"containers": [vm, {"name": "a", "image": "i"}]});
            assert_eq!(company(&pod(spec.clone()), Lacks::default()), Ok(()));
            spec[field] = true.into();
            assert_eq!(reason(company(&pod(spec), Lacks::default())), Some("FieldUnsupported"), "{field}");
        }
    }

    #[test]
    fn the_node_is_never_filled_beyond_what_it_has() {
        let room = Room {
            allocatable: Requests { millicpus: 2000, memory: 1000, ephemeral: 10 },
            pods: 2,
            used: Requests { millicpus: 1500, memory: 600, ephemeral: 0 },
            admitted: 1,
        };
        let asks = |requests: Value| pod(json!({"containers": [{"name": "vm", "resources": {"requests": requests}}]}));
        let none = BTreeMap::new();
        for (requests, want) in [
            (json!({"cpu": "500m", "memory": "400"}), None),
            (json!({"cpu": "501m"}), Some("OutOfcpu")),
            (json!({"memory": "401"}), Some("OutOfmemory")),
            (json!({"ephemeral-storage": "11"}), Some("OutOfephemeral-storage")),
            (json!({}), None),
        ] {
            assert_eq!(reason(fits(&asks(requests.clone()), &none, "n", &room)), want, "{requests}");
        }
        let full = Room { admitted: 2, ..room.clone() };
        assert_eq!(reason(fits(&asks(json!({})), &none, "n", &full)), Some("OutOfpods"));
        // A pod that asks for nothing fits even where nothing is left.
        let used_up = Room { used: room.allocatable, ..room };
        assert_eq!(reason(fits(&asks(json!({})), &none, "n", &used_up)), None);
        assert_eq!(
            fits(&asks(json!({"memory": "1"})), &none, "n", &used_up).unwrap_err().message,
            "Node didn't have enough resource: memory, requested: 1, used: 1000, capacity: 1000"
        );
    }

    #[test]
    fn selectors_and_affinity_are_checked_again() {
        let labels = BTreeMap::from([("zone".to_owned(), "a".to_owned()), ("cores".to_owned(), "8".to_owned())]);
        let room = Room { pods: 10, ..Room::default() };
        let affinity = |terms: Value| json!({"containers": [], "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}});
        for (spec, fine) in [
            (json!({"containers": [], "nodeSelector": {"zone": "a"}}), true),
            (json!({"containers": [], "nodeSelector": {"zone": "b"}}), false),
            (affinity(json!([{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a", "b"]}]}])), true),
            (affinity(json!([{"matchExpressions": [{"key": "zone", "operator": "NotIn", "values": ["a"]}]}])), false),
            (affinity(json!([{"matchExpressions": [{"key": "cores", "operator": "Gt", "values": ["4"]}]}])), true),
            (affinity(json!([{"matchExpressions": [{"key": "cores", "operator": "Lt", "values": ["4"]}]}])), false),
            (affinity(json!([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n"]}]}])), true),
            (affinity(json!([{}])), false),
        ] {
            assert_eq!(fits(&pod(spec.clone()), &labels, "n", &room).is_ok(), fine, "{spec}");
        }
    }

    #[test]
    fn no_execute_taints_need_a_toleration() {
        let node: Node = serde_json::from_value(json!({"spec": {"taints": [
            {"key": "a", "value": "x", "effect": "NoExecute"}, {"key": "b", "effect": "NoSchedule"}]}}))
        .unwrap();
        assert_eq!(reason(tolerates(&pod(json!({"containers": []})), &node)), Some("TaintToleration"));
        for toleration in [
            json!({"operator": "Exists"}),
            json!({"key": "a", "value": "x"}),
            json!({"key": "a", "operator": "Exists", "effect": "NoExecute"}),
        ] {
            assert!(
                tolerates(&pod(json!({"containers": [], "tolerations": [toleration.clone()]})), &node).is_ok(),
                "{toleration}"
            );
        }
    }
}
