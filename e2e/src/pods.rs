//! Pods for tests.

use serde_json::{Value, json};

/// A pod of the tiny guest: its main process is `command`, or the machine itself when that is empty.
#[must_use]
pub fn tiny(name: &str, command: &[&str]) -> Value {
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 5,
            "containers": [{
                "name": "machine",
                "image": "tiny",
                "imagePullPolicy": "Never",
                "resources": {"requests": {"cpu": "250m", "memory": "192Mi"}},
            }],
        },
    });
    if !command.is_empty() {
        pod["spec"]["containers"][0]["command"] = json!(command);
    }
    pod
}

/// The state of container 0.
#[must_use]
pub fn state(pod: &Value) -> &Value {
    &pod["status"]["containerStatuses"][0]["state"]
}

/// The phase.
#[must_use]
pub fn phase(pod: &Value) -> &str {
    pod["status"]["phase"].as_str().unwrap_or_default()
}
