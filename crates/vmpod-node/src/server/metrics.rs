//! The server's own metrics, and the pods' in the form that metrics-server reads.

use std::fmt::Write as _;

use http::Method;
use k8s_openapi::api::core::v1::Pod;
use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use super::runtime::{NodeStats, Usage};

/// What one kind of request is counted under. Every label has a fixed, small set of values.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    method: &'static str,
    path: &'static str,
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Path {
    path: &'static str,
}

/// The server's counters.
pub(super) struct Metrics {
    registry: Registry,
    requests: Family<Request, Counter>,
    durations: Family<Path, Histogram, fn() -> Histogram>,
    sessions: Family<Path, Gauge>,
    pods: Gauge,
    containers: Gauge,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let mut registry = Registry::default();
        let requests = Family::default();
        let durations: Family<_, _, fn() -> Histogram> =
            Family::new_with_constructor(|| Histogram::new([0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0]));
        let sessions = Family::default();
        let (pods, containers) = (Gauge::default(), Gauge::default());
        registry.register(
            "kubelet_http_requests",
            "Requests to the kubelet API by method, route and status",
            requests.clone(),
        );
        registry.register(
            "kubelet_http_requests_duration_seconds",
            "Time until the answer began, by route",
            durations.clone(),
        );
        registry.register(
            "vmpod_streaming_sessions",
            "exec, attach and port-forward sessions that are open",
            sessions.clone(),
        );
        registry.register("kubelet_running_pods", "Pods with a running container", pods.clone());
        registry.register("kubelet_running_containers", "Running containers", containers.clone());
        Self { registry, requests, durations, sessions, pods, containers }
    }

    pub(super) fn request(&self, method: &Method, path: &'static str, code: u16, seconds: f64) {
        let method = match *method {
            Method::GET => "GET",
            Method::POST => "POST",
            Method::HEAD => "HEAD",
            _ => "other",
        };
        self.requests.get_or_create(&Request { method, path, code }).inc();
        self.durations.get_or_create(&Path { path }).observe(seconds);
    }

    /// Counts a session until the guard is dropped.
    pub(super) fn session(&self, path: &'static str) -> Session {
        let gauge = self.sessions.get_or_create(&Path { path }).clone();
        gauge.inc();
        Session(gauge)
    }

    pub(super) fn render<'a>(&self, running: impl IntoIterator<Item = &'a Pod>) -> String {
        let (mut pods, mut containers) = (0, 0);
        for pod in running {
            pods += 1;
            let all = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
            containers += all
                .into_iter()
                .flatten()
                .filter(|container| container.state.as_ref().is_some_and(|state| state.running.is_some()))
                .count();
        }
        self.pods.set(pods);
        self.containers.set(i64::try_from(containers).unwrap_or(i64::MAX));
        let mut out = String::new();
        match text::encode(&mut out, &self.registry) {
            Ok(()) => out,
            Err(_) => String::new(),
        }
    }
}

/// A session that is counted.
pub(super) struct Session(Gauge);

impl Drop for Session {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// `/metrics/resource`: cpu and memory of the node, its pods and containers, in the Prometheus text format with the
/// kubelet's names. Without figures only `resource_scrape_error` is 1.
#[must_use]
pub(super) fn resource(stats: Option<&NodeStats>) -> String {
    let mut out = String::new();
    let failed = u8::from(stats.is_none());
    if let Some(stats) = stats {
        let mut samples = Samples { out: &mut out, time: stats.taken.as_millisecond() };
        samples.family(
            "container_cpu_usage_seconds_total",
            "counter",
            "Cumulative cpu time consumed by the container in core-seconds",
        );
        each_container(stats, |labels, container| {
            samples.cpu("container_cpu_usage_seconds_total", labels, &container.usage);
        });
        samples.family("container_memory_working_set_bytes", "gauge", "Current working set of the container in bytes");
        each_container(stats, |labels, container| {
            samples.memory("container_memory_working_set_bytes", labels, &container.usage);
        });
        samples.family(
            "container_start_time_seconds",
            "gauge",
            "Start time of the container since unix epoch in seconds",
        );
        each_container(stats, |labels, container| {
            let seconds = decimal(i128::from(container.started.as_millisecond()), 1_000);
            samples.sample("container_start_time_seconds", labels, &seconds);
        });
        samples.family(
            "node_cpu_usage_seconds_total",
            "counter",
            "Cumulative cpu time consumed by the node in core-seconds",
        );
        samples.cpu("node_cpu_usage_seconds_total", "", &stats.node);
        samples.family("node_memory_working_set_bytes", "gauge", "Current working set of the node in bytes");
        samples.memory("node_memory_working_set_bytes", "", &stats.node);
        samples.family(
            "pod_cpu_usage_seconds_total",
            "counter",
            "Cumulative cpu time consumed by the pod in core-seconds",
        );
        each_pod(stats, |labels, usage| samples.cpu("pod_cpu_usage_seconds_total", labels, usage));
        samples.family("pod_memory_working_set_bytes", "gauge", "Current working set of the pod in bytes");
        each_pod(stats, |labels, usage| samples.memory("pod_memory_working_set_bytes", labels, usage));
    }
    let mut samples = Samples { out: &mut out, time: 0 };
    samples.family(
        "resource_scrape_error",
        "gauge",
        "1 if there was an error while getting container metrics, 0 otherwise",
    );
    out.push_str(if failed == 1 { "resource_scrape_error 1\n" } else { "resource_scrape_error 0\n" });
    out
}

fn each_container(stats: &NodeStats, mut sample: impl FnMut(&str, &super::MachineStats)) {
    for pod in &stats.pods {
        for container in &pod.containers {
            // Kubernetes' names need no escaping.
            let labels = format!(
                "{{container=\"{}\",namespace=\"{}\",pod=\"{}\"}}",
                container.container, pod.namespace, pod.name
            );
            sample(&labels, container);
        }
    }
}

fn each_pod(stats: &NodeStats, mut sample: impl FnMut(&str, &Usage)) {
    for pod in &stats.pods {
        let labels = format!("{{namespace=\"{}\",pod=\"{}\"}}", pod.namespace, pod.name);
        sample(&labels, &pod_usage(pod));
    }
}

/// A pod's use is that of its containers together.
pub(super) fn pod_usage(pod: &super::PodStats) -> Usage {
    pod.containers.iter().fold(Usage::default(), |sum, container| Usage {
        cpu_nanoseconds: sum.cpu_nanoseconds.saturating_add(container.usage.cpu_nanoseconds),
        cpu_nanocores: add(sum.cpu_nanocores, container.usage.cpu_nanocores),
        memory_working_set_bytes: sum.memory_working_set_bytes.saturating_add(container.usage.memory_working_set_bytes),
        memory_rss_bytes: add(sum.memory_rss_bytes, container.usage.memory_rss_bytes),
        memory_available_bytes: None,
    })
}

fn add(a: Option<u64>, b: Option<u64>) -> Option<u64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.saturating_add(b)),
        (a, b) => a.or(b),
    }
}

/// `value / scale` with all its digits.
fn decimal(value: i128, scale: i128) -> String {
    let digits = scale.ilog10() as usize;
    format!("{}.{:0digits$}", value / scale, (value % scale).abs())
}

struct Samples<'a> {
    out: &'a mut String,
    time: i64,
}

impl Samples<'_> {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String can't fail.
        writeln!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}").ok();
    }

    fn sample(&mut self, name: &str, labels: &str, value: &str) {
        writeln!(self.out, "{name}{labels} {value} {}", self.time).ok();
    }

    fn cpu(&mut self, name: &str, labels: &str, usage: &Usage) {
        self.sample(name, labels, &decimal(usage.cpu_nanoseconds.into(), 1_000_000_000));
    }

    fn memory(&mut self, name: &str, labels: &str, usage: &Usage) {
        self.sample(name, labels, &usage.memory_working_set_bytes.to_string());
    }
}
