//! Which node a pod fits on: pure, over what is known of nodes and pods.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::quantity::Quantity;

/// Amounts by resource name, in billionths.
pub(super) type Amounts = BTreeMap<String, i128>;

/// One pod in the amount of `pods`, in billionths.
const ONE: i128 = 1_000_000_000;

/// What a pod asks of a node.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Wants {
    pub(super) requests: Amounts,
    selector: BTreeMap<String, String>,
    /// `nodeSelectorTerms` of the required node affinity, when there is one.
    affinity: Option<Vec<Value>>,
    tolerations: Vec<Value>,
}

const DISK_PRESSURE: &str = "node.kubernetes.io/disk-pressure";
const MEMORY_PRESSURE: &str = "node.kubernetes.io/memory-pressure";

/// What a node offers.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Offer {
    pub(super) name: String,
    allocatable: Amounts,
    labels: BTreeMap<String, String>,
    taints: Vec<Taint>,
    unschedulable: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Taint {
    key: String,
    value: String,
    effect: String,
}

fn amount(value: &Value) -> i128 {
    let text = match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    Quantity::parse(&text).map_or(0, Quantity::nanos)
}

fn amounts(value: &Value) -> Amounts {
    value.as_object().into_iter().flatten().map(|(name, value)| (name.clone(), amount(value))).collect()
}

fn add(to: &mut Amounts, what: &Amounts) {
    for (name, value) in what {
        let sum = to.entry(name.clone()).or_default();
        *sum = sum.saturating_add(*value);
    }
}

fn at_least(to: &mut Amounts, what: &Amounts) {
    for (name, value) in what {
        let most = to.entry(name.clone()).or_default();
        *most = (*most).max(*value);
    }
}

fn texts(value: &Value) -> BTreeMap<String, String> {
    value
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, value)| (key.clone(), value.as_str().unwrap_or_default().to_owned()))
        .collect()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// What a container asks for; limits stand in for absent requests.
fn container_requests(container: &Value) -> Amounts {
    let mut asked = amounts(&container["resources"]["limits"]);
    asked.extend(amounts(&container["resources"]["requests"]));
    asked
}

impl Wants {
    pub(super) fn of(pod: &Value) -> Self {
        let spec = &pod["spec"];
        let mut running = Amounts::new();
        for container in list(&spec["containers"]) {
            add(&mut running, &container_requests(container));
        }
        // Init containers run one after another beside the sidecars that were started before them.
        let mut sidecars = Amounts::new();
        let mut starting = Amounts::new();
        for container in list(&spec["initContainers"]) {
            let asked = container_requests(container);
            if container["restartPolicy"] == "Always" {
                add(&mut sidecars, &asked);
                at_least(&mut starting, &sidecars);
            } else {
                let mut with = sidecars.clone();
                add(&mut with, &asked);
                at_least(&mut starting, &with);
            }
        }
        add(&mut running, &sidecars);
        at_least(&mut running, &starting);
        add(&mut running, &amounts(&spec["overhead"]));
        running.insert("pods".into(), ONE);
        let required = &spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
        Self {
            requests: running,
            selector: texts(&spec["nodeSelector"]),
            affinity: required["nodeSelectorTerms"].as_array().cloned(),
            tolerations: list(&spec["tolerations"]).cloned().collect(),
        }
    }

    fn tolerates(&self, taint: &Taint) -> bool {
        // Who said how much it needs is given the toleration in a cluster.
        let sized = self.requests.keys().any(|name| name != "pods");
        taint.key == MEMORY_PRESSURE && sized || self.tolerates_by_its_own_word(taint)
    }

    fn tolerates_by_its_own_word(&self, taint: &Taint) -> bool {
        self.tolerations.iter().any(|toleration| {
            let text = |field: &str| toleration[field].as_str().unwrap_or_default();
            let effect = text("effect").is_empty() || text("effect") == taint.effect;
            let key = text("key").is_empty() || text("key") == taint.key;
            let value = match text("operator") {
                "Exists" => true,
                _ => !text("key").is_empty() && text("value") == taint.value,
            };
            effect && key && value
        })
    }
}

impl Offer {
    pub(super) fn of(node: &Value) -> Self {
        let status = &node["status"];
        let offered = if status["allocatable"].is_object() { &status["allocatable"] } else { &status["capacity"] };
        let mut taints: Vec<Taint> = list(&node["spec"]["taints"])
            .map(|taint| {
                let text = |field: &str| taint[field].as_str().unwrap_or_default().to_owned();
                Taint { key: text("key"), value: text("value"), effect: text("effect") }
            })
            .collect();
        // The taints that tell of readiness follow the condition a moment later: the condition counts.
        let ready = list(&status["conditions"]).any(|one| one["type"] == "Ready" && one["status"] == "True");
        taints.retain(|taint| !(taint.effect == "NoSchedule" && crate::nodes::tells_readiness(&taint.key)));
        if !ready {
            let effect = "NoSchedule".to_owned();
            taints.push(Taint { key: "node.kubernetes.io/not-ready".into(), value: String::new(), effect });
        }
        // A cluster's node controller makes taints of these (kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration).
        for (condition, key) in [("DiskPressure", DISK_PRESSURE), ("MemoryPressure", MEMORY_PRESSURE)] {
            let holds = list(&status["conditions"]).any(|one| one["type"] == condition && one["status"] == "True");
            if holds && !taints.iter().any(|taint| taint.key == key) {
                taints.push(Taint { key: key.to_owned(), value: String::new(), effect: "NoSchedule".to_owned() });
            }
        }
        Self {
            name: node["metadata"]["name"].as_str().unwrap_or_default().into(),
            allocatable: amounts(&offered.clone()),
            labels: texts(&node["metadata"]["labels"]),
            taints,
            unschedulable: node["spec"]["unschedulable"] == true,
        }
    }

    /// Why a pod can't run here, given what is used already; empty when it can.
    fn refusals(&self, wants: &Wants, used: &Amounts) -> Vec<String> {
        let cordon =
            Taint { key: "node.kubernetes.io/unschedulable".into(), value: String::new(), effect: "NoSchedule".into() };
        if self.unschedulable && !wants.tolerates(&cordon) {
            return vec!["node(s) were unschedulable".into()];
        }
        let blocking = self
            .taints
            .iter()
            .find(|taint| matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute") && !wants.tolerates(taint));
        if let Some(taint) = blocking {
            return vec![format!("node(s) had untolerated taint {{{}: {}}}", taint.key, taint.value)];
        }
        let selected = wants.selector.iter().all(|(key, value)| self.labels.get(key) == Some(value));
        if !selected || !wants.affinity.as_ref().is_none_or(|terms| terms.iter().any(|term| self.matches(term))) {
            return vec!["node(s) didn't match Pod's node affinity/selector".into()];
        }
        let short = |(name, asked): (&String, &i128)| {
            let free =
                self.allocatable.get(name).copied().unwrap_or_default() - used.get(name).copied().unwrap_or_default();
            (*asked > 0 && *asked > free)
                .then(|| if name == "pods" { "Too many pods".into() } else { format!("Insufficient {name}") })
        };
        wants.requests.iter().filter_map(short).collect()
    }

    /// Whether one term of a node selector matches: all of its expressions. An empty term matches nothing.
    fn matches(&self, term: &Value) -> bool {
        let expressions: Vec<&Value> = list(&term["matchExpressions"]).collect();
        let fields: Vec<&Value> = list(&term["matchFields"]).collect();
        if expressions.is_empty() && fields.is_empty() {
            return false;
        }
        let label = |expression: &&Value| {
            let key = expression["key"].as_str().unwrap_or_default();
            matches(expression, self.labels.get(key).map(String::as_str))
        };
        let field = |expression: &&Value| expression["key"] == "metadata.name" && matches(expression, Some(&self.name));
        expressions.iter().all(label) && fields.iter().all(field)
    }

    /// The share of the node's cpu and memory that stays free, in thousandths.
    fn room(&self, wants: &Wants, used: &Amounts) -> i128 {
        let share = |name: &str| {
            let all = self.allocatable.get(name).copied().unwrap_or_default();
            let taken =
                used.get(name).copied().unwrap_or_default() + wants.requests.get(name).copied().unwrap_or_default();
            if all > 0 { (all - taken).saturating_mul(1000) / all } else { 0 }
        };
        share("cpu") + share("memory")
    }
}

fn matches(expression: &Value, value: Option<&str>) -> bool {
    let values: Vec<&str> = list(&expression["values"]).filter_map(Value::as_str).collect();
    let number = |text: &str| text.parse::<i64>().ok();
    let compare = |holds: fn(i64, i64) -> bool| match (value.and_then(number), values.first().copied().and_then(number))
    {
        (Some(a), Some(b)) => holds(a, b),
        _ => false,
    };
    match expression["operator"].as_str().unwrap_or_default() {
        "In" => value.is_some_and(|value| values.contains(&value)),
        "NotIn" => value.is_none_or(|value| !values.contains(&value)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(|a, b| a > b),
        "Lt" => compare(|a, b| a < b),
        _ => false,
    }
}

/// A node and what the pods on it use.
#[derive(Clone, Debug, Default)]
pub(super) struct Host {
    pub(super) offer: Offer,
    pub(super) used: Amounts,
}

/// Takes a pod's requests from, or gives them back to, what is used.
pub(super) fn occupy(used: &mut Amounts, requests: &Amounts, sign: i128) {
    for (name, value) in requests {
        *used.entry(name.clone()).or_default() += sign * value;
    }
}

/// Chooses the node with the most room, or says why there is none, in Kubernetes' words.
pub(super) fn choose<'a>(wants: &Wants, hosts: impl IntoIterator<Item = &'a Host>) -> Result<String, String> {
    let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
    let mut best: Option<(i128, &str)> = None;
    let mut count = 0_usize;
    for host in hosts {
        count += 1;
        let refusals = host.offer.refusals(wants, &host.used);
        if refusals.is_empty() {
            let room = host.offer.room(wants, &host.used);
            if best.is_none_or(|(most, name)| room > most || (room == most && host.offer.name.as_str() < name)) {
                best = Some((room, &host.offer.name));
            }
        }
        for refusal in refusals {
            *reasons.entry(refusal).or_default() += 1;
        }
    }
    match best {
        Some((_, name)) => Ok(name.to_owned()),
        None if count == 0 => Err("no nodes available to schedule pods".into()),
        None => {
            let mut parts: Vec<String> = reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
            parts.sort();
            Err(format!("0/{count} nodes are available: {}.", parts.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(name: &str, cpu: &str, memory: &str) -> Value {
        json!({
            "metadata": { "name": name, "labels": { "kubernetes.io/os": "linux", "rank": "5" } },
            "status": {
                "allocatable": { "cpu": cpu, "memory": memory, "pods": "2", "vmpod.dev/macos": "1" },
                "conditions": [{ "type": "Ready", "status": "True" }],
            },
        })
    }

    fn host(node: &Value) -> Host {
        Host { offer: Offer::of(node), used: Amounts::new() }
    }

    fn pod(spec: impl Into<Value>) -> Wants {
        Wants::of(&json!({ "spec": spec.into() }))
    }

    fn asks(cpu: &str, memory: &str) -> Wants {
        pod(json!({ "containers": [{ "resources": { "requests": { "cpu": cpu, "memory": memory } } }] }))
    }

    #[test]
    fn fits_by_resources_and_says_what_is_short() {
        let hosts = [host(&node("a", "4", "8Gi")), host(&node("b", "2", "8Gi"))];
        assert_eq!(choose(&asks("3", "1Gi"), &hosts), Ok("a".into()));
        assert_eq!(choose(&asks("8", "1Gi"), &hosts), Err("0/2 nodes are available: 2 Insufficient cpu.".into()));
        assert_eq!(
            choose(&asks("8", "100Gi"), &hosts[..1]),
            Err("0/1 nodes are available: 1 Insufficient cpu, 1 Insufficient memory.".into())
        );
        assert_eq!(
            choose(&asks("3", "100Gi"), &hosts),
            Err("0/2 nodes are available: 1 Insufficient cpu, 2 Insufficient memory.".into())
        );
        assert_eq!(choose(&asks("1", "1Gi"), &[]), Err("no nodes available to schedule pods".into()));
    }

    #[test]
    fn counts_what_is_used_pods_and_extended_resources() {
        let mut full = host(&node("a", "4", "8Gi"));
        for _ in 0..2 {
            occupy(&mut full.used, &asks("1", "1Gi").requests, 1);
        }
        assert_eq!(choose(&asks("1", "1Gi"), [&full]), Err("0/1 nodes are available: 1 Too many pods.".into()));
        occupy(&mut full.used, &asks("1", "1Gi").requests, -1);
        assert_eq!(choose(&asks("1", "1Gi"), [&full]), Ok("a".into()));
        let mac = pod(json!({ "containers": [{ "resources": { "limits": { "vmpod.dev/macos": "2" } } }] }));
        assert_eq!(choose(&mac, [&full]), Err("0/1 nodes are available: 1 Insufficient vmpod.dev/macos.".into()));
        let unknown = pod(json!({ "containers": [{ "resources": { "limits": { "x/y": "1" } } }] }));
        assert_eq!(choose(&unknown, [&full]), Err("0/1 nodes are available: 1 Insufficient x/y.".into()));
    }

    #[test]
    fn init_containers_and_sidecars_count_as_they_run() {
        let container = |cpu: &str| json!({ "resources": { "requests": { "cpu": cpu } } });
        let mut sidecar = container("1");
        sidecar["restartPolicy"] = "Always".into();
        let wants =
            pod(json!({ "containers": [container("1"), container("1")], "initContainers": [sidecar, container("4")] }));
        assert_eq!(wants.requests["cpu"], 5 * ONE);
    }

    #[test]
    fn obeys_selectors_affinity_taints_and_cordons() {
        let mut value = node("a", "4", "8Gi");
        let mismatch = Err("0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector.".into());
        let select = |selector: Value| pod(json!({ "containers": [], "nodeSelector": selector }));
        assert_eq!(choose(&select(json!({ "kubernetes.io/os": "linux" })), [&host(&value)]), Ok("a".into()));
        assert_eq!(choose(&select(json!({ "kubernetes.io/os": "darwin" })), [&host(&value)]), mismatch);
        let affinity = |expression: Value| {
            let term = json!({ "matchExpressions": [expression] });
            let required = json!({ "nodeSelectorTerms": [term] });
            pod(
                json!({ "containers": [], "affinity": { "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": required } } }),
            )
        };
        assert_eq!(
            choose(&affinity(json!({ "key": "rank", "operator": "Gt", "values": ["4"] })), [&host(&value)]),
            Ok("a".into())
        );
        assert_eq!(
            choose(&affinity(json!({ "key": "rank", "operator": "NotIn", "values": ["5"] })), [&host(&value)]),
            mismatch
        );
        assert_eq!(
            choose(&affinity(json!({ "key": "x", "operator": "DoesNotExist" })), [&host(&value)]),
            Ok("a".into())
        );
        value["spec"] = json!({ "taints": [{ "key": "k", "value": "v", "effect": "NoSchedule" }] });
        let any = pod(json!({ "containers": [] }));
        assert_eq!(
            choose(&any, [&host(&value)]),
            Err("0/1 nodes are available: 1 node(s) had untolerated taint {k: v}.".into())
        );
        let tolerant = pod(json!({ "containers": [], "tolerations": [{ "key": "k", "operator": "Exists" }] }));
        assert_eq!(choose(&tolerant, [&host(&value)]), Ok("a".into()));
        value["spec"] = json!({ "unschedulable": true });
        assert_eq!(
            choose(&tolerant, [&host(&value)]),
            Err("0/1 nodes are available: 1 node(s) were unschedulable.".into())
        );
        value["spec"] = json!({});
        let ready = value["status"]["conditions"].clone();
        let short = |condition: &str| {
            let mut value = value.clone();
            value["status"]["conditions"] =
                json!([{ "type": "Ready", "status": "True" }, { "type": condition, "status": "True" }]);
            host(&value)
        };
        let refused = |key: &str| Err(format!("0/1 nodes are available: 1 node(s) had untolerated taint {{{key}: }}."));
        assert_eq!(choose(&asks("1", "1Gi"), [&short("DiskPressure")]), refused(DISK_PRESSURE));
        assert_eq!(choose(&any, [&short("MemoryPressure")]), refused(MEMORY_PRESSURE));
        assert_eq!(choose(&asks("1", "1Gi"), [&short("MemoryPressure")]), Ok("a".into()), "it said what it needs");
        value["status"]["conditions"] = ready;
        assert_eq!(choose(&any, [&host(&value)]), Ok("a".into()));
        value["status"]["conditions"] = json!([]);
        assert_eq!(
            choose(&any, [&host(&value)]),
            Err("0/1 nodes are available: 1 node(s) had untolerated taint {node.kubernetes.io/not-ready: }.".into())
        );
    }

    #[test]
    fn prefers_the_node_with_the_most_room() {
        let (a, mut b) = (host(&node("a", "4", "8Gi")), host(&node("b", "4", "8Gi")));
        assert_eq!(choose(&asks("1", "1Gi"), [&b, &a]), Ok("a".into()));
        b.offer = Offer::of(&node("b", "16", "64Gi"));
        assert_eq!(choose(&asks("1", "1Gi"), [&a, &b]), Ok("b".into()));
    }
}
