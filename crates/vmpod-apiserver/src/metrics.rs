//! `metrics.k8s.io`: what nodes and pods use, as `kubectl top` and autoscalers ask for it.
//!
//! Nothing is measured here and nothing is kept running: each question reads the kubelets' `/metrics/resource`. Processor
//! time is counted from an earlier reading: the one of an earlier question, or one a second before.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Body;
use futures::future::join_all;
use http::{Method, Response, StatusCode};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::http::Call;
use crate::http::respond;
use crate::proxy;
use crate::selector::LabelSelector;
use crate::server::Server;
use crate::status::Status;
use crate::store::{Key, Object};

/// The group.
pub(crate) const GROUP: &str = "metrics.k8s.io";
/// The only version there ever was.
pub(crate) const VERSION: &str = "v1beta1";
/// How old a reading may be to count from, in seconds: a shorter time shows noise, a longer one the past.
const OLD: std::ops::RangeInclusive<f64> = 0.8..=60.0;
/// A reading is kept until it is so old, in seconds, so that questions in a row don't count from each other.
const KEPT: f64 = 15.0;
/// The time between two readings when there is no earlier one.
const PAUSE: Duration = Duration::from_secs(1);

/// Processor time and memory at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Usage {
    /// Seconds, since some beginning.
    cpu: f64,
    /// Bytes.
    memory: f64,
}

/// Namespace, pod, container.
type Name = (String, String, String);

/// What a kubelet said.
#[derive(Clone, Debug, Default, PartialEq)]
struct Reading {
    /// Milliseconds since 1970.
    at: f64,
    node: Usage,
    containers: BTreeMap<Name, Usage>,
}

/// The readings that later ones count from, by node.
#[derive(Debug, Default)]
pub(crate) struct Readings(Mutex<BTreeMap<String, Arc<Reading>>>);

impl Readings {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<Reading>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the Prometheus text of `/metrics/resource`. What isn't understood is passed over.
fn read(text: &str) -> Reading {
    let mut reading = Reading::default();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, rest) = match line.split_once('{') {
            Some((name, rest)) => (name, rest.split_once('}')),
            None => (line.split(' ').next().unwrap_or_default(), line.split_once(' ').map(|(_, rest)| ("", rest))),
        };
        let Some((labels, rest)) = rest else { continue };
        let mut numbers = rest.split_whitespace().map(str::parse::<f64>);
        let (Some(Ok(value)), Some(Ok(at))) = (numbers.next(), numbers.next()) else { continue };
        let label = |wanted: &str| {
            // Names in Kubernetes hold neither commas nor quotes.
            let pairs = labels.split(',').filter_map(|pair| pair.split_once('='));
            pairs.filter(|(key, _)| *key == wanted).map(|(_, text)| text.trim_matches('"').to_owned()).next()
        };
        let container = || Some((label("namespace")?, label("pod")?, label("container")?));
        match name {
            "node_cpu_usage_seconds_total" => (reading.node.cpu, reading.at) = (value, at),
            "node_memory_working_set_bytes" => reading.node.memory = value,
            "container_cpu_usage_seconds_total" => {
                if let Some(container) = container() {
                    reading.containers.entry(container).or_default().cpu = value;
                }
            }
            "container_memory_working_set_bytes" => {
                if let Some(container) = container() {
                    reading.containers.entry(container).or_default().memory = value;
                }
            }
            _ => {}
        }
    }
    reading
}

/// What is used, as the API writes it; none when nothing can be counted.
fn usage(now: Usage, before: Usage, seconds: f64) -> Option<Value> {
    let spent = now.cpu - before.cpu;
    // A counter that went back belongs to another process.
    if spent < 0.0 || seconds <= 0.0 {
        return None;
    }
    let nanocores = (spent / seconds * 1e9).ceil();
    Some(json!({ "cpu": format!("{nanocores:.0}n"), "memory": format!("{:.0}Ki", (now.memory / 1024.0).ceil()) }))
}

/// Two readings of a node; none when its kubelet doesn't answer.
async fn readings(server: &Server, node: &str) -> Option<(Arc<Reading>, Arc<Reading>)> {
    let one = async || match proxy::resource_metrics(server, node).await {
        Ok(text) => Some(Arc::new(read(&text))),
        Err(why) => {
            tracing::warn!(node, why = why.message, "the node's figures can't be read");
            None
        }
    };
    let age = |now: &Reading, then: &Reading| (now.at - then.at) / 1000.0;
    let mut now = one().await?;
    let known = server.readings.lock().get(node).cloned();
    let before = if let Some(known) = known.filter(|known| OLD.contains(&age(&now, known))) {
        known
    } else {
        let first = now;
        tokio::time::sleep(PAUSE).await;
        now = one().await?;
        first
    };
    let mut all = server.readings.lock();
    if all.get(node).is_none_or(|kept| !(0.0..=KEPT).contains(&age(&now, kept))) {
        all.insert(node.to_owned(), Arc::clone(&now));
    }
    Some((before, now))
}

fn metadata(object: &Object, now: Timestamp) -> Value {
    let value = object.value();
    let mut metadata = json!({ "name": value["metadata"]["name"], "creationTimestamp": whole(now) });
    for field in ["namespace", "labels"] {
        if !value["metadata"][field].is_null() {
            metadata[field] = value["metadata"][field].clone();
        }
    }
    metadata
}

fn whole(now: Timestamp) -> String {
    Timestamp::from_second(now.as_second()).unwrap_or(now).to_string()
}

fn envelope(kind: &str, object: &Object, now: Timestamp, seconds: f64) -> Value {
    json!({
        "kind": kind, "apiVersion": format!("{GROUP}/{VERSION}"), "metadata": metadata(object, now),
        "timestamp": whole(now), "window": format!("{seconds:.3}s"),
    })
}

fn of_node(object: &Object, before: &Reading, now: &Reading, at: Timestamp) -> Option<Value> {
    let seconds = (now.at - before.at) / 1000.0;
    let mut value = envelope("NodeMetrics", object, at, seconds);
    value["usage"] = usage(now.node, before.node, seconds)?;
    Some(value)
}

fn of_pod(object: &Object, before: &Reading, now: &Reading, at: Timestamp) -> Option<Value> {
    let seconds = (now.at - before.at) / 1000.0;
    let pod = object.value();
    let (namespace, name) = (pod["metadata"]["namespace"].as_str()?, pod["metadata"]["name"].as_str()?);
    let own = now.containers.iter().filter(|((n, p, _), _)| n == namespace && p == name);
    let containers = own.filter_map(|(key, now)| {
        let usage = usage(*now, *before.containers.get(key)?, seconds)?;
        Some(json!({ "name": key.2, "usage": usage }))
    });
    let containers: Vec<Value> = containers.collect();
    let mut value = envelope("PodMetrics", object, at, seconds);
    // A pod that has only begun has no figures yet.
    if containers.is_empty() {
        return None;
    }
    value["containers"] = containers.into();
    Some(value)
}

/// Answers a question about nodes or pods.
pub(crate) async fn serve(call: &Call) -> Result<Response<Body>, Status> {
    if !matches!(call.method, Method::GET | Method::HEAD) || call.query.flag("watch")? {
        return Err(Status::method_not_allowed_here());
    }
    if call.query.get("fieldSelector").is_some_and(|text| !text.is_empty()) {
        return Err(Status::bad_request("metrics can't be selected by fields"));
    }
    let labels = call.query.get("labelSelector").map(LabelSelector::parse).transpose()?;
    let server = &call.server;
    let plural = call.resource.plural.as_str();
    let namespace = call.target.namespace.as_deref();
    let objects: Vec<Arc<Object>> = match call.target.name.as_deref() {
        Some(name) => vec![
            server
                .store
                .get(&Key::new(plural, namespace, name))
                .ok_or_else(|| Status::not_found(&call.resource, name))?,
        ],
        None => server.store.list(plural, namespace).objects,
    };
    let objects: Vec<_> =
        objects.into_iter().filter(|one| labels.as_ref().is_none_or(|labels| labels.matches(&one.value()))).collect();
    let node_of = |object: &Object| {
        let value = object.value();
        let path = if plural == "nodes" { "/metadata/name" } else { "/spec/nodeName" };
        value.pointer(path).and_then(Value::as_str).filter(|node| !node.is_empty()).map(str::to_owned)
    };
    let mut nodes: Vec<String> = objects.iter().filter_map(|object| node_of(object)).collect();
    nodes.sort_unstable();
    nodes.dedup();
    let known =
        join_all(nodes.into_iter().map(async |node| Some((node.clone(), readings(server, &node).await?)))).await;
    let known: BTreeMap<_, _> = known.into_iter().flatten().collect();
    let items = objects.iter().filter_map(|object| {
        let (before, now) = known.get(&node_of(object)?)?;
        let of = if plural == "nodes" { of_node } else { of_pod };
        of(object, before, now, call.now)
    });
    let mut items: Vec<Value> = items.collect();
    let value = match call.target.name.as_deref() {
        Some(name) => items.pop().ok_or_else(|| Status::not_found(&call.resource, name))?,
        None => json!({
            "kind": call.resource.list_kind, "apiVersion": format!("{GROUP}/{VERSION}"), "metadata": {}, "items": items,
        }),
    };
    Ok(respond::json_value(StatusCode::OK, &value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# HELP node_cpu_usage_seconds_total x\n\
        container_cpu_usage_seconds_total{container=\"vm\",namespace=\"default\",pod=\"a\"} 1.5 1800000200000\n\
        container_memory_working_set_bytes{container=\"vm\",namespace=\"default\",pod=\"a\"} 1048576 1800000200000\n\
        node_cpu_usage_seconds_total 99.25 1800000200000\n\
        node_memory_working_set_bytes 2048 1800000200000\n\
        resource_scrape_error 0\nnonsense\nbad{x 1 2\n";

    #[test]
    fn a_kubelets_figures_are_read() {
        let reading = read(TEXT);
        assert!((reading.at - 1_800_000_200_000.0).abs() < 1.0);
        assert_eq!(reading.node, Usage { cpu: 99.25, memory: 2048.0 });
        let name = ("default".to_owned(), "a".to_owned(), "vm".to_owned());
        assert_eq!(reading.containers, BTreeMap::from([(name, Usage { cpu: 1.5, memory: 1_048_576.0 })]));
        assert_eq!(read(""), Reading::default());
    }

    #[test]
    fn use_is_counted_between_two_readings() {
        let at = |cpu: f64| Usage { cpu, memory: 1025.0 };
        assert_eq!(usage(at(3.0), at(1.0), 4.0), Some(json!({"cpu": "500000000n", "memory": "2Ki"})));
        assert_eq!(usage(at(1.0), at(3.0), 4.0), None, "another process");
        assert_eq!(usage(at(1.0), at(1.0), 0.0), None, "no time has passed");
    }
}
