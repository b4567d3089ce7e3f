//! A scripted API: pods, nodes, leases, events, secrets and config maps in memory, with watches, as an axum router.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{Method, StatusCode},
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};
use tokio::sync::watch;

#[derive(Clone)]
pub(crate) struct Api {
    inner: Arc<Mutex<Inner>>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct Inner {
    version: u64,
    /// By path: `/api/v1/namespaces/ns/pods/name`.
    objects: BTreeMap<String, Value>,
    /// Every change of a pod: version, type, object.
    log: Vec<(u64, &'static str, Value)>,
    /// Broken promises.
    violations: Vec<String>,
    /// Requests that fail from now on.
    down: bool,
}

impl Api {
    pub(crate) fn new() -> Self {
        Self { inner: Arc::default(), changed: watch::Sender::new(0) }
    }

    pub(crate) fn client(&self) -> kube::Client {
        let router = Router::new().fallback(answer).with_state(self.clone());
        kube::Client::new(router, "default")
    }

    /// Creates a pod bound to node `n`.
    pub(crate) fn create_pod(&self, name: &str, uid: &str, spec: Value) {
        self.create_annotated_pod(name, uid, json!({}), spec);
    }

    /// The same, with annotations.
    pub(crate) fn create_annotated_pod(&self, name: &str, uid: &str, annotations: Value, spec: Value) {
        let mut spec = spec;
        spec["nodeName"] = json!("n");
        if spec.get("terminationGracePeriodSeconds").is_none() {
            spec["terminationGracePeriodSeconds"] = json!(30);
        }
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "uid": uid, "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z",
                "annotations": annotations},
            "spec": spec, "status": {"phase": "Pending", "qosClass": "BestEffort"}});
        self.put(&pod_path(name), "ADDED", pod);
    }

    /// Marks a pod as being deleted, as the API does with a grace period.
    pub(crate) fn delete_pod(&self, name: &str, grace: i64) {
        let mut pod = self.pod(name).expect("the pod to delete is there");
        pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        pod["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
        self.put(&pod_path(name), "MODIFIED", pod);
    }

    /// Removes a pod's object at once, as `kubectl delete --force` does.
    pub(crate) fn vanish(&self, name: &str) {
        self.remove(&pod_path(name));
    }

    pub(crate) fn pod(&self, name: &str) -> Option<Value> {
        self.lock().objects.get(&pod_path(name)).cloned()
    }

    pub(crate) fn phase(&self, name: &str) -> Option<String> {
        Some(self.pod(name)?["status"]["phase"].as_str()?.to_owned())
    }

    pub(crate) fn object(&self, path: &str) -> Option<Value> {
        self.lock().objects.get(path).cloned()
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    pub(crate) fn set_down(&self, down: bool) {
        self.lock().down = down;
        self.bump();
    }

    /// Reasons of the events about a pod, in order of their first time.
    pub(crate) fn reasons(&self, pod: &str) -> Vec<String> {
        let inner = self.lock();
        let mut events: Vec<_> = inner
            .objects
            .values()
            .filter(|object| object["involvedObject"]["name"] == pod)
            .map(|event| {
                (
                    event["metadata"]["resourceVersion"].as_str().unwrap().parse::<u64>().unwrap(),
                    event["reason"].as_str().unwrap().to_owned(),
                )
            })
            .collect();
        events.sort();
        events.into_iter().map(|(_, reason)| reason).collect()
    }

    /// Waits until something is true of the API.
    pub(crate) async fn until(&self, what: &str, wanted: impl Fn(&Self) -> bool) {
        let mut changed = self.changed.subscribe();
        let seen = tokio::time::timeout(std::time::Duration::from_secs(40), async {
            while !wanted(self) {
                changed.changed().await.unwrap();
            }
        });
        if seen.await.is_err() {
            let pods: Vec<_> = self
                .lock()
                .objects
                .iter()
                .filter(|(path, _)| path.contains("/pods/"))
                .map(|(_, pod)| pod.clone())
                .collect();
            panic!("never came true: {what}; the pods are {pods:#?}");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    fn bump(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    fn put(&self, path: &str, kind: &'static str, mut object: Value) -> Value {
        {
            let mut inner = self.lock();
            inner.version += 1;
            object["metadata"]["resourceVersion"] = json!(inner.version.to_string());
            if path.contains("/pods/") {
                let before = inner
                    .objects
                    .get(path)
                    .and_then(|pod| pod["status"]["phase"].as_str())
                    .unwrap_or_default()
                    .to_owned();
                let after = object["status"]["phase"].as_str().unwrap_or_default();
                if ["Succeeded", "Failed"].contains(&before.as_str()) && before != after {
                    let violation = format!("{path}: phase {before} became {after}");
                    inner.violations.push(violation);
                }
                let version = inner.version;
                inner.log.push((version, kind, object.clone()));
            }
            inner.objects.insert(path.to_owned(), object.clone());
        }
        self.bump();
        object
    }

    fn remove(&self, path: &str) -> Option<Value> {
        let removed = {
            let mut inner = self.lock();
            let removed = inner.objects.remove(path);
            if let Some(object) = &removed {
                inner.version += 1;
                let version = inner.version;
                if path.contains("/pods/") {
                    inner.log.push((version, "DELETED", object.clone()));
                }
            }
            removed
        };
        self.bump();
        removed
    }

    fn watch(&self, from: u64) -> Response {
        let changed = self.changed.subscribe();
        let stream = futures::stream::unfold((self.clone(), changed, from), |(api, mut changed, from)| async move {
            loop {
                changed.borrow_and_update();
                let news: Vec<_> = api.lock().log.iter().filter(|(version, ..)| *version > from).cloned().collect();
                if api.lock().down {
                    return None;
                }
                if let Some((last, ..)) = news.last() {
                    let last = *last;
                    let mut lines = String::new();
                    for (version, kind, mut object) in news {
                        object["metadata"]["resourceVersion"] = json!(version.to_string());
                        lines.push_str(&json!({"type": kind, "object": object}).to_string());
                        lines.push('\n');
                    }
                    return Some((Ok::<_, Infallible>(Bytes::from(lines)), (api, changed, last)));
                }
                changed.changed().await.ok()?;
            }
        });
        Response::builder().header("content-type", "application/json").body(Body::from_stream(stream)).unwrap()
    }
}

pub(crate) fn pod_path(name: &str) -> String {
    format!("/api/v1/namespaces/default/pods/{name}")
}

fn failure(code: StatusCode, reason: &str) -> Response {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code.as_u16(), "reason": reason, "message": reason, "metadata": {}});
    (code, [("content-type", "application/json")], status.to_string()).into_response()
}

fn ok(value: &Value) -> Response {
    ([("content-type", "application/json")], value.to_string()).into_response()
}

async fn answer(State(api): State<Api>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let path = parts.uri.path().to_owned();
    let query = parts.uri.query().unwrap_or_default().to_owned();
    {
        if api.lock().down {
            return failure(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable");
        }
    }
    let object = path.strip_suffix("/status").unwrap_or(&path).to_owned();
    match parts.method {
        Method::GET if path == "/api/v1/pods" => {
            assert!(query.contains("fieldSelector=spec.nodeName%3Dn"), "a node may only ask for its own pods: {query}");
            let from = query
                .split('&')
                .find_map(|pair| pair.strip_prefix("resourceVersion="))
                .and_then(|v| v.parse().ok())
                .unwrap_or(0);
            if query.contains("watch=true") {
                return api.watch(from);
            }
            let inner = api.lock();
            let items: Vec<_> =
                inner.objects.iter().filter(|(path, _)| path.contains("/pods/")).map(|(_, pod)| pod.clone()).collect();
            ok(
                &json!({"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": inner.version.to_string()}, "items": items}),
            )
        }
        Method::GET => match api.object(&path) {
            Some(object) => ok(&object),
            None => failure(StatusCode::NOT_FOUND, "NotFound"),
        },
        Method::POST => {
            let name = body["metadata"]["name"].as_str().unwrap().to_owned();
            let path = format!("{path}/{name}");
            if api.object(&path).is_some() {
                return failure(StatusCode::CONFLICT, "AlreadyExists");
            }
            ok(&api.put(&path, "ADDED", body))
        }
        Method::PUT => ok(&api.put(&path, "MODIFIED", body)),
        Method::PATCH => {
            let Some(mut known) = api.object(&object) else { return failure(StatusCode::NOT_FOUND, "NotFound") };
            let uid = &body["metadata"]["uid"];
            if !uid.is_null() && *uid != known["metadata"]["uid"] {
                return failure(StatusCode::CONFLICT, "Conflict");
            }
            let before = known.clone();
            merge(&mut known, &body);
            if before == known && object.contains("/pods/") {
                api.lock().violations.push(format!("{object}: a patch that changed nothing: {body}"));
            }
            ok(&api.put(&object, "MODIFIED", known))
        }
        Method::DELETE => {
            let Some(known) = api.object(&path) else { return failure(StatusCode::NOT_FOUND, "NotFound") };
            if body["gracePeriodSeconds"] != 0 || body["preconditions"]["uid"] != known["metadata"]["uid"] {
                api.lock().violations.push(format!("{path}: deleted with {body}"));
                return failure(StatusCode::CONFLICT, "Conflict");
            }
            let phase = known["status"]["phase"].as_str().unwrap_or_default();
            if !["Succeeded", "Failed"].contains(&phase) {
                api.lock().violations.push(format!("{path}: deleted in phase {phase}"));
            }
            api.remove(&path);
            ok(&known)
        }
        _ => failure(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed"),
    }
}

/// Strategic merge, as far as node agents need it.
fn merge(into: &mut Value, patch: &Value) {
    let (Value::Object(into), Value::Object(patch)) = (into, patch) else { return };
    for (key, value) in patch {
        match (key.as_str(), value) {
            (_, Value::Null) => {
                into.remove(key);
            }
            ("conditions" | "addresses", Value::Array(items)) => merge_list(into, key, "type", items),
            ("podIPs" | "hostIPs", Value::Array(items)) => merge_list(into, key, "ip", items),
            (_, Value::Object(_)) => merge(into.entry(key.clone()).or_insert_with(|| json!({})), value),
            _ => {
                into.insert(key.clone(), value.clone());
            }
        }
    }
}

fn merge_list(into: &mut Map<String, Value>, key: &str, by: &str, items: &[Value]) {
    let replace = items.iter().any(|item| item["$patch"] == "replace");
    let mut list = match into.get(key) {
        Some(Value::Array(list)) if !replace => list.clone(),
        _ => Vec::new(),
    };
    for item in items.iter().filter(|item| item.get("$patch").is_none()) {
        match list.iter_mut().find(|known| known[by] == item[by]) {
            Some(known) => merge(known, item),
            None => list.push(item.clone()),
        }
    }
    into.insert(key.to_owned(), Value::Array(list));
}
