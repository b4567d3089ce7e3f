//! `/stats/summary`: the figures in the form of `k8s.io/kubelet/pkg/apis/stats/v1alpha1`.

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{
    metrics::pod_usage,
    runtime::{FsUsage, MachineStats, NodeStats, PodStats, Usage},
};

/// The whole summary; `brief` leaves out everything but cpu and memory.
#[must_use]
pub(super) fn summary(node: &str, stats: &NodeStats, brief: bool) -> Value {
    let time = stats.taken;
    let mut own = with_usage(json!({"nodeName": node, "startTime": second(stats.booted)}), &stats.node, time);
    if !brief {
        set(&mut own, "fs", stats.fs.map(|fs| file_system(&fs, time)));
        set(&mut own, "runtime", stats.image_fs.map(|fs| json!({"imageFs": file_system(&fs, time)})));
    }
    let pods: Vec<_> = stats.pods.iter().map(|one| pod(one, time, brief)).collect();
    json!({"node": own, "pods": pods})
}

fn pod(pod: &PodStats, time: Timestamp, brief: bool) -> Value {
    let containers: Vec<_> = pod.containers.iter().map(|one| container(one, time, brief)).collect();
    let value = json!({
        "podRef": {"name": pod.name, "namespace": pod.namespace, "uid": pod.uid},
        "startTime": second(pod.started),
        "containers": containers,
    });
    let mut value = with_usage(value, &pod_usage(pod), time);
    if !brief {
        set(
            &mut value,
            "network",
            pod.network.map(|(received, sent)| {
                let interface = json!({"name": "eth0", "rxBytes": received, "txBytes": sent});
                json!({"time": second(time), "name": "eth0", "rxBytes": received, "txBytes": sent, "interfaces": [interface]})
            }),
        );
    }
    value
}

fn container(container: &MachineStats, time: Timestamp, brief: bool) -> Value {
    let value = json!({"name": container.container, "startTime": second(container.started)});
    let mut value = with_usage(value, &container.usage, time);
    if !brief {
        set(&mut value, "rootfs", container.rootfs.map(|fs| file_system(&fs, time)));
        let logs = json!({"time": second(time), "usedBytes": container.log_bytes});
        set(&mut value, "logs", Some(logs));
    }
    value
}

fn with_usage(mut value: Value, usage: &Usage, time: Timestamp) -> Value {
    let mut cpu = json!({"time": second(time), "usageCoreNanoSeconds": usage.cpu_nanoseconds});
    set(&mut cpu, "usageNanoCores", usage.cpu_nanocores.map(Value::from));
    let mut memory = json!({
        "time": second(time),
        "usageBytes": usage.memory_working_set_bytes,
        "workingSetBytes": usage.memory_working_set_bytes,
    });
    set(&mut memory, "rssBytes", usage.memory_rss_bytes.map(Value::from));
    set(&mut memory, "availableBytes", usage.memory_available_bytes.map(Value::from));
    set(&mut value, "cpu", Some(cpu));
    set(&mut value, "memory", Some(memory));
    value
}

fn file_system(fs: &FsUsage, time: Timestamp) -> Value {
    let mut value = json!({
        "time": second(time),
        "capacityBytes": fs.capacity_bytes,
        "availableBytes": fs.available_bytes,
        "usedBytes": fs.used_bytes,
    });
    if fs.inodes > 0 {
        set(&mut value, "inodes", Some(fs.inodes.into()));
        set(&mut value, "inodesFree", Some(fs.inodes_free.into()));
        set(&mut value, "inodesUsed", Some(fs.inodes.saturating_sub(fs.inodes_free).into()));
    }
    value
}

fn set(value: &mut Value, name: &str, field: Option<Value>) {
    if let (Value::Object(object), Some(field)) = (value, field) {
        let object: &mut Map<String, Value> = object;
        object.insert(name.to_owned(), field);
    }
}

/// Kubernetes' times have whole seconds.
fn second(time: Timestamp) -> String {
    Timestamp::from_second(time.as_second()).unwrap_or(time).to_string()
}
