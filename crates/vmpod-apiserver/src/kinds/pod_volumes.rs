//! The rules of a pod's volumes and of what containers mount.

use serde_json::Value;

use super::{at, dns_label, items, pod, text};
use crate::quantity::Quantity;
use crate::status::Cause;

/// Paths that a downward API volume may take from its pod.
const VOLUME_FIELDS: [&str; 5] =
    ["metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid"];

/// The rules of volumes; gives back their names.
pub(super) fn validate(volumes: &[Value], causes: &mut Vec<Cause>) -> Vec<String> {
    let mut seen: Vec<String> = Vec::new();
    for (index, volume) in volumes.iter().enumerate() {
        let field = format!("spec.volumes[{index}]");
        source(volume, &field, causes);
        let name = text(volume, &["name"]);
        if name.is_empty() {
            causes.push(Cause::required(format!("{field}.name"), ""));
        } else {
            for why in dns_label(name) {
                causes.push(Cause::invalid(format!("{field}.name"), &name.into(), &why));
            }
        }
        if seen.iter().any(|other| other == name) {
            causes.push(Cause::duplicate(format!("{field}.name"), &name.into()));
        }
        seen.push(name.to_owned());
    }
    seen
}

fn source(volume: &Value, field: &str, causes: &mut Vec<Cause>) {
    let kinds: Vec<&String> =
        volume.as_object().into_iter().flat_map(|object| object.keys()).filter(|key| *key != "name").collect();
    match kinds.as_slice() {
        [] => causes.push(Cause::required(field, "must specify a volume type")),
        [_] => {}
        [_, more @ ..] => {
            for kind in more {
                causes.push(Cause::forbidden(format!("{field}.{kind}"), "may not specify more than 1 volume type"));
            }
        }
    }
    if let Some(secret) = at(volume, &["secret"]) {
        if text(secret, &["secretName"]).is_empty() {
            causes.push(Cause::required(format!("{field}.secret.secretName"), ""));
        }
        keyed(secret, &format!("{field}.secret"), causes);
    }
    if let Some(map) = at(volume, &["configMap"]) {
        if text(map, &["name"]).is_empty() {
            causes.push(Cause::required(format!("{field}.configMap.name"), ""));
        }
        keyed(map, &format!("{field}.configMap"), causes);
    }
    if let Some(downward) = at(volume, &["downwardAPI"]) {
        mode(downward.get("defaultMode"), &format!("{field}.downwardAPI.defaultMode"), causes);
        downward_items(downward, &format!("{field}.downwardAPI"), causes);
    }
    if let Some(projected) = at(volume, &["projected"]) {
        self::projected(projected, &format!("{field}.projected"), causes);
    }
    if let Some(host) = at(volume, &["hostPath"]) {
        let field = format!("{field}.hostPath");
        let path = text(host, &["path"]);
        if path.is_empty() {
            causes.push(Cause::required(format!("{field}.path"), ""));
        } else if path.split('/').any(|part| part == "..") {
            causes.push(Cause::invalid(format!("{field}.path"), &path.into(), "must not contain '..'"));
        }
        let known =
            ["", "BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"];
        let kind = text(host, &["type"]);
        if !known.contains(&kind) {
            causes.push(Cause::not_supported(format!("{field}.type"), &kind.into(), &known));
        }
    }
    if let Some(limit) = at(volume, &["emptyDir", "sizeLimit"]).and_then(Value::as_str)
        && Quantity::parse(limit).is_ok_and(|limit| limit.nanos() < 0)
    {
        let why = "SizeLimit field must be a valid resource quantity";
        causes.push(Cause::forbidden(format!("{field}.emptyDir.sizeLimit"), why));
    }
    if let Some(claim) = at(volume, &["persistentVolumeClaim"])
        && text(claim, &["claimName"]).is_empty()
    {
        causes.push(Cause::required(format!("{field}.persistentVolumeClaim.claimName"), ""));
    }
}

fn mode(value: Option<&Value>, field: &str, causes: &mut Vec<Cause>) {
    let Some(value) = value.filter(|value| !value.is_null()) else { return };
    if !value.as_i64().is_some_and(|mode| (0..=0o777).contains(&mode)) {
        causes.push(Cause::invalid(field, value, "must be a number between 0 and 0777 (octal), both inclusive"));
    }
}

fn relative(path: &str, field: &str, causes: &mut Vec<Cause>) {
    if path.starts_with('/') {
        causes.push(Cause::invalid(field, &path.into(), "must be a relative path"));
    }
    if path.split('/').any(|part| part == "..") {
        causes.push(Cause::invalid(field, &path.into(), "must not contain '..'"));
    }
}

/// A volume made of keys of a config map or secret.
fn keyed(source: &Value, field: &str, causes: &mut Vec<Cause>) {
    mode(source.get("defaultMode"), &format!("{field}.defaultMode"), causes);
    key_items(source, field, causes);
}

fn key_items(source: &Value, field: &str, causes: &mut Vec<Cause>) {
    for (index, item) in items(source, &["items"]).iter().enumerate() {
        let field = format!("{field}.items[{index}]");
        if text(item, &["key"]).is_empty() {
            causes.push(Cause::required(format!("{field}.key"), ""));
        }
        let path = text(item, &["path"]);
        if path.is_empty() {
            causes.push(Cause::required(format!("{field}.path"), ""));
        }
        relative(path, &format!("{field}.path"), causes);
        mode(item.get("mode"), &format!("{field}.mode"), causes);
    }
}

fn downward_items(source: &Value, field: &str, causes: &mut Vec<Cause>) {
    for (index, item) in items(source, &["items"]).iter().enumerate() {
        let field = format!("{field}.items[{index}]");
        let path = text(item, &["path"]);
        if path.is_empty() {
            causes.push(Cause::required(format!("{field}.path"), ""));
        }
        relative(path, &format!("{field}.path"), causes);
        match (at(item, &["fieldRef"]), at(item, &["resourceFieldRef"])) {
            (Some(reference), None) => {
                pod::field_ref(reference, &format!("{field}.fieldRef"), &VOLUME_FIELDS, causes);
            }
            (None, Some(reference)) => {
                pod::resource_ref(reference, &format!("{field}.resourceFieldRef"), true, causes);
            }
            (Some(_), Some(_)) => {
                let why = "fieldRef and resourceFieldRef can not be specified simultaneously";
                causes.push(Cause::invalid(field.clone(), &"resource".into(), why));
            }
            (None, None) => {
                causes.push(Cause::required(field.clone(), "one of fieldRef and resourceFieldRef is required"));
            }
        }
        mode(item.get("mode"), &format!("{field}.mode"), causes);
    }
}

fn projected(projected: &Value, field: &str, causes: &mut Vec<Cause>) {
    mode(projected.get("defaultMode"), &format!("{field}.defaultMode"), causes);
    for (index, source) in items(projected, &["sources"]).iter().enumerate() {
        let field = format!("{field}.sources[{index}]");
        let kinds: Vec<&String> = source.as_object().into_iter().flat_map(|object| object.keys()).collect();
        match kinds.as_slice() {
            [] => causes.push(Cause::required(&field, "must specify a source type")),
            [_] => {}
            _ => causes.push(Cause::forbidden(&field, "may not specify more than 1 volume type per source")),
        }
        for kind in ["secret", "configMap"] {
            let Some(from) = at(source, &[kind]) else { continue };
            if text(from, &["name"]).is_empty() {
                causes.push(Cause::required(format!("{field}.{kind}.name"), ""));
            }
            key_items(from, &format!("{field}.{kind}"), causes);
        }
        if let Some(downward) = at(source, &["downwardAPI"]) {
            downward_items(downward, &format!("{field}.downwardAPI"), causes);
        }
        if let Some(token) = at(source, &["serviceAccountToken"]) {
            let field = format!("{field}.serviceAccountToken");
            match token["expirationSeconds"].as_i64() {
                Some(seconds) if seconds < 600 => causes.push(Cause::invalid(
                    format!("{field}.expirationSeconds"),
                    &seconds.into(),
                    "may not specify a duration less than 10 minutes",
                )),
                Some(seconds) if seconds > 1 << 32 => causes.push(Cause::invalid(
                    format!("{field}.expirationSeconds"),
                    &seconds.into(),
                    "may not specify a duration larger than 2^32 seconds",
                )),
                _ => {}
            }
            if text(token, &["path"]).is_empty() {
                causes.push(Cause::required(format!("{field}.path"), ""));
            }
        }
    }
}

/// The rules of what a container mounts.
pub(super) fn mounts(container: &Value, field: &str, volumes: &[String], causes: &mut Vec<Cause>) {
    let mut paths: Vec<&str> = Vec::new();
    for (index, mount) in items(container, &["volumeMounts"]).iter().enumerate() {
        let field = format!("{field}.volumeMounts[{index}]");
        let name = text(mount, &["name"]);
        if name.is_empty() {
            causes.push(Cause::required(format!("{field}.name"), ""));
        } else if !volumes.iter().any(|volume| volume == name) {
            causes.push(Cause::not_found(format!("{field}.name"), &name.into()));
        }
        let path = text(mount, &["mountPath"]);
        if path.is_empty() {
            causes.push(Cause::required(format!("{field}.mountPath"), ""));
        }
        if paths.contains(&path) {
            causes.push(Cause::invalid(format!("{field}.mountPath"), &path.into(), "must be unique"));
        }
        paths.push(path);
        let (plain, expanded) = (text(mount, &["subPath"]), text(mount, &["subPathExpr"]));
        relative(plain, &format!("{field}.subPath"), causes);
        relative(expanded, &format!("{field}.subPathExpr"), causes);
        if !plain.is_empty() && !expanded.is_empty() {
            let why = "subPathExpr and subPath are mutually exclusive";
            causes.push(Cause::invalid(format!("{field}.subPathExpr"), &expanded.into(), why));
        }
        let propagation = text(mount, &["mountPropagation"]);
        let known = ["Bidirectional", "HostToContainer", "None"];
        if !propagation.is_empty() && !known.contains(&propagation) {
            causes.push(Cause::not_supported(format!("{field}.mountPropagation"), &propagation.into(), &known));
        }
    }
    for (index, device) in items(container, &["volumeDevices"]).iter().enumerate() {
        let name = text(device, &["name"]);
        if !volumes.iter().any(|volume| volume == name) {
            causes.push(Cause::not_found(format!("{field}.volumeDevices[{index}].name"), &name.into()));
        }
    }
}
