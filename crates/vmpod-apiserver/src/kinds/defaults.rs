//! The values that the API fills in where an object says nothing.

use serde_json::{Map, Value, json};

use super::{Resource, at, items, text};
use crate::quantity::Quantity;

/// Fills in the defaults of a kind. Doing so twice changes nothing more.
pub(crate) fn default(resource: &Resource, value: &mut Value) {
    if let Some(custom) = &resource.custom {
        custom.apply_defaults(value);
        return;
    }
    match resource.type_name {
        "core.Pod" => pod(value),
        "core.Namespace" => namespace(value),
        "core.Node" => node(value),
        "core.Secret" => secret(value),
        "apiext.CustomResourceDefinition" => crate::crd::default_definition(value),
        "certificates.CertificateSigningRequest" if items(value, &["spec", "usages"]).is_empty() => {
            value["spec"]["usages"] = json!(["digital signature", "key encipherment"]);
        }
        "rbac.RoleBinding" | "rbac.ClusterRoleBinding" => role_binding(value),
        "scheduling.PriorityClass" => set(Some(value), "preemptionPolicy", &"PreemptLowerPriority".into()),
        "authentication.TokenRequest" => set(value.get_mut("spec"), "expirationSeconds", &3600.into()),
        _ => {}
    }
}

/// Sets a field that is absent, null or empty text.
fn set(object: Option<&mut Value>, key: &str, fallback: &Value) {
    let Some(object) = object.and_then(Value::as_object_mut) else { return };
    let absent = object.get(key).is_none_or(|value| value.is_null() || value == "");
    if absent {
        object.insert(key.to_owned(), fallback.clone());
    }
}

/// Sets a number that is absent or zero.
fn set_number(object: &mut Map<String, Value>, key: &str, fallback: i64) {
    if object.get(key).and_then(Value::as_i64).unwrap_or(0) == 0 {
        object.insert(key.to_owned(), fallback.into());
    }
}

fn role_binding(value: &mut Value) {
    const GROUP: &str = "rbac.authorization.k8s.io";
    set(value.get_mut("roleRef"), "apiGroup", &GROUP.into());
    for subject in value.get_mut("subjects").and_then(Value::as_array_mut).into_iter().flatten() {
        if matches!(text(subject, &["kind"]), "User" | "Group") {
            set(Some(subject), "apiGroup", &GROUP.into());
        }
    }
}

fn namespace(value: &mut Value) {
    let name = text(value, &["metadata", "name"]).to_owned();
    if !name.is_empty() {
        value["metadata"]["labels"]["kubernetes.io/metadata.name"] = name.into();
    }
    if text(value, &["status", "phase"]).is_empty() {
        value["status"]["phase"] = "Active".into();
    }
}

fn node(value: &mut Value) {
    if let (Some(capacity), None) = (at(value, &["status", "capacity"]).cloned(), at(value, &["status", "allocatable"]))
    {
        value["status"]["allocatable"] = capacity;
    }
}

fn secret(value: &mut Value) {
    use base64::Engine as _;
    let given = value.as_object_mut().and_then(|object| object.remove("stringData"));
    for (key, plain) in given.as_ref().and_then(Value::as_object).into_iter().flatten() {
        let encoded = base64::engine::general_purpose::STANDARD.encode(plain.as_str().unwrap_or_default());
        value["data"][key] = encoded.into();
    }
    set(Some(value), "type", &"Opaque".into());
}

fn pod(value: &mut Value) {
    if !value["spec"].is_object() {
        value["spec"] = json!({"containers": null});
    }
    let spec = &mut value["spec"];
    let old_name = text(spec, &["serviceAccount"]).to_owned();
    if text(spec, &["serviceAccountName"]).is_empty() && !old_name.is_empty() {
        spec["serviceAccountName"] = old_name.into();
    }
    let host_network = spec["hostNetwork"] == true;
    for (key, fallback) in [
        ("dnsPolicy", json!("ClusterFirst")),
        ("restartPolicy", json!("Always")),
        ("schedulerName", json!("default-scheduler")),
        ("terminationGracePeriodSeconds", json!(30)),
        ("securityContext", json!({})),
        ("enableServiceLinks", json!(true)),
    ] {
        set(Some(spec), key, &fallback);
    }
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for one in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            container(one, host_network);
        }
    }
    for volume in spec.get_mut("volumes").and_then(Value::as_array_mut).into_iter().flatten() {
        self::volume(volume);
    }
    if spec.get("overhead").is_some() {
        round_up(&mut spec["overhead"]);
    }
}

/// The API keeps amounts to a thousandth at best.
fn round_up(list: &mut Value) {
    for amount in list.as_object_mut().into_iter().flat_map(Map::values_mut) {
        let Some(parsed) = amount.as_str().and_then(|text| Quantity::parse(text).ok()) else { continue };
        if parsed.nanos() % 1_000_000 != 0 {
            let milli = parsed.nanos().div_euclid(1_000_000) + 1;
            if let Ok(rounded) = Quantity::parse(&format!("{milli}m")) {
                *amount = rounded.to_string().into();
            }
        }
    }
}

/// Whether an image is the `latest` of its name, and so is always pulled.
fn is_latest(image: &str) -> bool {
    let (name, digest) = image.split_once('@').map_or((image, None), |(name, digest)| (name, Some(digest)));
    let last = name.rsplit('/').next().unwrap_or(name);
    match last.split_once(':') {
        Some((_, tag)) => tag == "latest",
        None => digest.is_none(),
    }
}

fn container(container: &mut Value, host_network: bool) {
    let policy = if is_latest(text(container, &["image"])) { "Always" } else { "IfNotPresent" };
    set(Some(container), "imagePullPolicy", &policy.into());
    set(Some(container), "terminationMessagePath", &"/dev/termination-log".into());
    set(Some(container), "terminationMessagePolicy", &"File".into());
    for port in container.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        set(Some(port), "protocol", &"TCP".into());
        if host_network && port["hostPort"].as_i64().unwrap_or(0) == 0 {
            let number = port["containerPort"].clone();
            port["hostPort"] = number;
        }
    }
    for variable in container.get_mut("env").and_then(Value::as_array_mut).into_iter().flatten() {
        set(variable.pointer_mut("/valueFrom/fieldRef"), "apiVersion", &"v1".into());
    }
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = container.get_mut(name) {
            self::probe(probe);
        }
    }
    for hook in ["postStart", "preStop"] {
        http_get(container.pointer_mut(&format!("/lifecycle/{hook}/httpGet")));
    }
    let Some(resources) = container.get_mut("resources") else { return };
    for list in ["limits", "requests"] {
        if let Some(list) = resources.get_mut(list) {
            round_up(list);
        }
    }
    let limits = resources.get("limits").and_then(Value::as_object).cloned().unwrap_or_default();
    for (name, amount) in limits {
        if resources["requests"].get(&name).is_none() {
            resources["requests"][name] = amount;
        }
    }
}

fn probe(probe: &mut Value) {
    http_get(probe.get_mut("httpGet"));
    if let Some(grpc) = probe.get_mut("grpc").and_then(Value::as_object_mut) {
        grpc.entry("service").or_insert_with(|| "".into());
    }
    let Some(probe) = probe.as_object_mut() else { return };
    for (key, fallback) in
        [("timeoutSeconds", 1), ("periodSeconds", 10), ("successThreshold", 1), ("failureThreshold", 3)]
    {
        set_number(probe, key, fallback);
    }
}

fn http_get(action: Option<&mut Value>) {
    let Some(action) = action else { return };
    set(Some(&mut *action), "path", &"/".into());
    set(Some(action), "scheme", &"HTTP".into());
}

fn volume(volume: &mut Value) {
    let Some(object) = volume.as_object_mut() else { return };
    if object.keys().all(|key| key == "name") {
        object.insert("emptyDir".into(), json!({}));
    }
    for kind in ["secret", "configMap", "downwardAPI", "projected"] {
        if let Some(Value::Object(source)) = object.get_mut(kind) {
            source.entry("defaultMode").or_insert_with(|| 420.into());
        }
    }
    if let Some(Value::Object(source)) = object.get_mut("hostPath") {
        source.entry("type").or_insert_with(|| "".into());
    }
    if let Some(image) = object.get_mut("image") {
        let policy = if is_latest(text(image, &["reference"])) { "Always" } else { "IfNotPresent" };
        set(Some(image), "pullPolicy", &policy.into());
    }
    let fields = |list: Option<&mut Value>| {
        for item in list.and_then(Value::as_array_mut).into_iter().flatten() {
            set(item.get_mut("fieldRef"), "apiVersion", &"v1".into());
        }
    };
    fields(object.get_mut("downwardAPI").and_then(|source| source.get_mut("items")));
    let sources = object.get_mut("projected").and_then(|source| source.get_mut("sources"));
    for source in sources.and_then(Value::as_array_mut).into_iter().flatten() {
        fields(source.pointer_mut("/downwardAPI/items"));
        if let Some(Value::Object(token)) = source.get_mut("serviceAccountToken") {
            token.entry("expirationSeconds").or_insert_with(|| 3600.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latest_is_pulled_always() {
        for (image, latest) in [
            ("a", true),
            ("a:latest", true),
            ("a:1", false),
            ("localhost:5000/a", true),
            ("localhost:5000/a:2", false),
            ("a@sha256:00", false),
            ("a:latest@sha256:00", true),
        ] {
            assert_eq!(is_latest(image), latest, "{image}");
        }
    }

    #[test]
    fn limits_become_requests_and_amounts_are_rounded_up() {
        let mut one = json!({"name": "c", "image": "i:1", "resources": {"limits": {"cpu": "100u", "memory": "1Gi"}}});
        container(&mut one, false);
        assert_eq!(
            one["resources"],
            json!({"limits": {"cpu": "1m", "memory": "1Gi"}, "requests": {"cpu": "1m", "memory": "1Gi"}})
        );
    }

    #[test]
    fn probes_and_volumes() {
        let mut one = json!({"httpGet": {"port": 80}, "periodSeconds": 5});
        probe(&mut one);
        assert_eq!(
            one,
            json!({"httpGet": {"port": 80, "path": "/", "scheme": "HTTP"}, "periodSeconds": 5, "timeoutSeconds": 1,
                "successThreshold": 1, "failureThreshold": 3})
        );
        let mut one = json!({"name": "v"});
        volume(&mut one);
        assert_eq!(one, json!({"name": "v", "emptyDir": {}}));
    }
}
