//! What a pod's volumes hold, as files; and how they come into the guest. The first part is pure.
//!
//! A volume whose files come from the API is laid out as the kubelet does it: the files are in a directory of their own,
//! `..data` points to it, and each name at the top points through `..data`. An update makes another directory and moves
//! one link, so a reader sees all of the old files or all of the new.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use k8s_openapi::api::core::v1::{
    ConfigMap, Container, DownwardAPIVolumeFile, KeyToPath, Pod, Secret, ServiceAccountTokenProjection, Volume,
    VolumeProjection,
};

use vmpod_machine::Share;

use crate::{
    env::{self, Facts, Fetched, Needs},
    pod,
    quantity::Nanos,
    sidecars,
};

mod archive;
mod host;
mod keeper;

pub(crate) use host::{file_of, share, writable_file, write};
pub(crate) use keeper::{Contents, REFRESH, keep};

/// A file of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct File {
    pub(crate) bytes: Vec<u8>,
    pub(crate) mode: u32,
}

/// Files by their path in the volume.
pub(crate) type Files = BTreeMap<String, File>;

/// What is behind a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Files from the API; never writable.
    Files(Files),
    /// An empty directory on the guest's disk.
    Disk,
    /// An empty directory on this host, for the machine, which mounts it by this tag, and the containers beside it.
    Shared(String),
    /// An empty directory in the guest's memory, of at most so many bytes.
    Memory(Option<u64>),
}

/// Where a volume is to be seen in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) volume: String,
    /// Below the volume's root; empty for all of it.
    pub(crate) sub_path: String,
    /// Absolute.
    pub(crate) target: String,
    pub(crate) read_only: bool,
}

/// Everything that the guest gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) volumes: BTreeMap<String, Content>,
    pub(crate) mounts: Vec<Mount>,
}

/// A token that a volume asks for: its audience (none for the API server's own) and life in seconds.
pub(crate) type TokenKey = (Option<String>, i64);

/// Why a volume can't be made: the event `FailedMount`, with these words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum VolumeError {
    #[error("MountVolume.SetUp failed for volume {volume:?} : {kind} {name:?} not found")]
    Missing { volume: String, kind: &'static str, name: String },
    #[error("MountVolume.SetUp failed for volume {volume:?} : {kind} {name:?} references non-existent key: {key}")]
    MissingKey { volume: String, kind: &'static str, name: String, key: String },
    #[error("MountVolume.SetUp failed for volume {volume:?} : path {path:?} leads out of the volume or is no path")]
    Path { volume: String, path: String },
    #[error("MountVolume.SetUp failed for volume {volume:?} : {what} is not supported on this node")]
    Unsupported { volume: String, what: String },
    #[error("MountVolume.SetUp failed for volume {volume:?} : no token was issued for it")]
    NoToken { volume: String },
    #[error("volumeMount {target:?} of volume {volume:?}: {why}")]
    Mount { volume: String, target: String, why: &'static str },
}

/// What of a volume this node doesn't do.
pub(crate) fn unsupported(volume: &Volume) -> Option<String> {
    if !is_name(&volume.name) {
        return Some("its name, which is no DNS label,".to_owned());
    }
    if let Some(empty) = &volume.empty_dir {
        return match (empty.medium.as_deref(), &empty.size_limit) {
            (None | Some(""), None) | (Some("Memory"), _) => None,
            (None | Some(""), Some(_)) => Some("emptyDir.sizeLimit without medium Memory".to_owned()),
            (Some(medium), _) => Some(format!("emptyDir.medium {medium:?}")),
        };
    }
    if let Some(projected) = &volume.projected {
        let bad =
            projected.sources.iter().flatten().any(|s| s.cluster_trust_bundle.is_some() || s.pod_certificate.is_some());
        return bad.then(|| "a projected clusterTrustBundle or podCertificate".to_owned());
    }
    if volume.config_map.is_some() || volume.secret.is_some() || volume.downward_api.is_some() {
        return None;
    }
    // An empty volume source is an emptyDir to the API server, which writes it out.
    let kind = serde_json::to_value(volume)
        .ok()
        .and_then(|value| value.as_object().and_then(|fields| fields.keys().find(|key| *key != "name").cloned()));
    Some(kind.unwrap_or_else(|| "a volume without a source".to_owned()))
}

/// What the guest mounts: a share for each of the [`shared`] directories, below `dir`. One share for all of them would let the guest
/// put a link in a directory's place, which containers would then be given.
pub(crate) fn shares(pod: &Pod, dir: &Path) -> Vec<Share> {
    let names = shared(pod).into_iter().enumerate();
    names.map(|(index, name)| Share { tag: tag(index), path: dir.join(name) }).collect()
}

fn tag(index: usize) -> String {
    format!("vmpod-{index}")
}

/// The empty directories that the machine and a container beside it mount.
pub(crate) fn shared(pod: &Pod) -> BTreeSet<&str> {
    let mounts =
        |container: &Container, name: &str| container.volume_mounts.iter().flatten().any(|mount| mount.name == name);
    let machine = pod::machine_container(pod);
    let members = sidecars::members(pod);
    let both = |name: &str| {
        machine.is_some_and(|machine| mounts(machine, name))
            && members.iter().any(|member| mounts(member.container, name))
    };
    let empty = volumes(pod).iter().filter(|volume| volume.empty_dir.is_some());
    empty.map(|volume| volume.name.as_str()).filter(|name| both(name)).collect()
}

/// The projected volume that the `ServiceAccount` admission adds to every pod of a real cluster.
pub(crate) fn is_automatic(volume: &Volume) -> bool {
    volume.name.starts_with("kube-api-access-") && volume.projected.is_some()
}

/// Objects that the volumes need.
pub(crate) fn needs(pod: &Pod) -> Needs {
    let mut needs = Needs::default();
    for volume in volumes(pod) {
        needs.config_maps.extend(volume.config_map.as_ref().map(|source| source.name.clone()));
        needs.secrets.extend(volume.secret.as_ref().and_then(|source| source.secret_name.clone()));
        for source in projections(volume) {
            needs.config_maps.extend(source.config_map.as_ref().map(|source| source.name.clone()));
            needs.secrets.extend(source.secret.as_ref().map(|source| source.name.clone()));
        }
    }
    needs
}

/// Tokens that the volumes need.
pub(crate) fn tokens(pod: &Pod) -> BTreeSet<TokenKey> {
    volumes(pod).iter().flat_map(projections).filter_map(|s| s.service_account_token.as_ref()).map(token_key).collect()
}

fn token_key(source: &ServiceAccountTokenProjection) -> TokenKey {
    (source.audience.clone().filter(|audience| !audience.is_empty()), source.expiration_seconds.unwrap_or(3600))
}

fn volumes(pod: &Pod) -> &[Volume] {
    pod::spec(pod).and_then(|spec| spec.volumes.as_deref()).unwrap_or_default()
}

fn projections(volume: &Volume) -> &[VolumeProjection] {
    volume.projected.as_ref().and_then(|projected| projected.sources.as_deref()).unwrap_or_default()
}

/// What the guest of a container gets.
///
/// `env` is the container's environment, for `subPathExpr`.
pub(crate) fn layout(
    pod: &Pod,
    container: &Container,
    fetched: &Fetched,
    tokens: &BTreeMap<TokenKey, String>,
    facts: &Facts,
    env: &[(String, String)],
) -> Result<Layout, VolumeError> {
    let build = Build { pod, container, fetched, tokens, facts };
    let mut layout = Layout::default();
    for volume in volumes(pod) {
        layout.volumes.insert(volume.name.clone(), build.content(volume)?);
    }
    for mount in container.volume_mounts.iter().flatten() {
        let bad = |why| VolumeError::Mount { volume: mount.name.clone(), target: mount.mount_path.clone(), why };
        let Some(content) = layout.volumes.get(&mount.name) else {
            return Err(bad("the pod has no such volume"));
        };
        let expanded =
            mount.sub_path_expr.as_ref().map(|text| env::command_line(std::slice::from_ref(text), &[], env).concat());
        let sub_path = expanded.or_else(|| mount.sub_path.clone()).unwrap_or_default();
        if !sub_path.is_empty() && !stays_inside(&sub_path) {
            return Err(bad("subPath must be relative and must not contain '..'"));
        }
        let target = format!("/{}", mount.mount_path.trim_matches('/'));
        if target == "/" || target.contains(['\0', '\n']) || target.split('/').any(|part| part == "..") {
            return Err(bad("a volume can't be mounted there"));
        }
        let read_only = mount.read_only == Some(true) || matches!(content, Content::Files(_));
        layout.mounts.push(Mount { volume: mount.name.clone(), sub_path, target, read_only });
    }
    // A mount below another comes after it.
    layout.mounts.sort_by(|a, b| a.target.cmp(&b.target));
    Ok(layout)
}

struct Build<'a> {
    pod: &'a Pod,
    container: &'a Container,
    fetched: &'a Fetched,
    tokens: &'a BTreeMap<TokenKey, String>,
    facts: &'a Facts,
}

/// The mode of a file that names none.
const MODE: i32 = 0o644;

impl Build<'_> {
    fn content(&self, volume: &Volume) -> Result<Content, VolumeError> {
        let name = &volume.name;
        if let Some(what) = unsupported(volume) {
            return Err(VolumeError::Unsupported { volume: name.clone(), what });
        }
        if let Some(empty) = &volume.empty_dir {
            let limit = empty.size_limit.as_ref().and_then(|q| Nanos::parse(&q.0).ok()).map(Nanos::units_up);
            return Ok(if empty.medium.as_deref() == Some("Memory") {
                Content::Memory(limit.filter(|limit| *limit > 0))
            } else if let Some(index) = shared(self.pod).iter().position(|shared| *shared == name.as_str()) {
                Content::Shared(tag(index))
            } else {
                Content::Disk
            });
        }
        let mut files = Files::new();
        if let Some(source) = &volume.config_map {
            let mode = source.default_mode.unwrap_or(MODE);
            let items = source.items.as_deref();
            self.config_map(&mut files, name, &source.name, items, source.optional == Some(true), mode)?;
        }
        if let Some(source) = &volume.secret {
            let mode = source.default_mode.unwrap_or(MODE);
            let secret = source.secret_name.as_deref().unwrap_or_default();
            self.secret(&mut files, name, secret, source.items.as_deref(), source.optional == Some(true), mode)?;
        }
        if let Some(source) = &volume.downward_api {
            self.downward(&mut files, name, source.items.as_deref(), source.default_mode.unwrap_or(MODE))?;
        }
        let mode = volume.projected.as_ref().and_then(|projected| projected.default_mode).unwrap_or(MODE);
        for source in projections(volume) {
            if let Some(from) = &source.config_map {
                let items = from.items.as_deref();
                self.config_map(&mut files, name, &from.name, items, from.optional == Some(true), mode)?;
            }
            if let Some(from) = &source.secret {
                let items = from.items.as_deref();
                self.secret(&mut files, name, &from.name, items, from.optional == Some(true), mode)?;
            }
            if let Some(from) = &source.downward_api {
                self.downward(&mut files, name, from.items.as_deref(), mode)?;
            }
            if let Some(from) = &source.service_account_token {
                let token = self.tokens.get(&token_key(from));
                let token = token.ok_or_else(|| VolumeError::NoToken { volume: name.clone() })?;
                put(&mut files, name, &from.path, token.clone().into_bytes(), mode)?;
            }
        }
        Ok(Content::Files(files))
    }

    fn config_map(
        &self,
        files: &mut Files,
        volume: &str,
        name: &str,
        items: Option<&[KeyToPath]>,
        optional: bool,
        mode: i32,
    ) -> Result<(), VolumeError> {
        let map = self.fetched.config_maps.get(name);
        keys(files, volume, "configmap", name, map.map(config_map_data), items, optional, mode)
    }

    fn secret(
        &self,
        files: &mut Files,
        volume: &str,
        name: &str,
        items: Option<&[KeyToPath]>,
        optional: bool,
        mode: i32,
    ) -> Result<(), VolumeError> {
        let secret = self.fetched.secrets.get(name);
        keys(files, volume, "secret", name, secret.map(secret_data), items, optional, mode)
    }

    fn downward(
        &self,
        files: &mut Files,
        volume: &str,
        items: Option<&[DownwardAPIVolumeFile]>,
        mode: i32,
    ) -> Result<(), VolumeError> {
        for item in items.unwrap_or_default() {
            let value = if let Some(field) = &item.field_ref {
                field_text(self.pod, &field.field_path, self.facts)
                    .ok_or_else(|| format!("field {:?}", field.field_path))
            } else if let Some(resource) = &item.resource_field_ref {
                env::resource_text(self.pod, self.container, resource, self.facts)
                    .ok_or_else(|| format!("resource {:?}", resource.resource))
            } else {
                Err("a downward API item without a reference".to_owned())
            };
            let value = value.map_err(|what| VolumeError::Unsupported { volume: volume.to_owned(), what })?;
            put(files, volume, &item.path, value.into_bytes(), item.mode.unwrap_or(mode))?;
        }
        Ok(())
    }
}

fn config_map_data(map: &ConfigMap) -> BTreeMap<&str, Vec<u8>> {
    let text = map.data.iter().flatten().map(|(key, value)| (key.as_str(), value.clone().into_bytes()));
    let binary = map.binary_data.iter().flatten().map(|(key, value)| (key.as_str(), value.0.clone()));
    text.chain(binary).collect()
}

fn secret_data(secret: &Secret) -> BTreeMap<&str, Vec<u8>> {
    secret.data.iter().flatten().map(|(key, value)| (key.as_str(), value.0.clone())).collect()
}

#[expect(clippy::too_many_arguments, reason = "the fields of a volume source")]
fn keys(
    files: &mut Files,
    volume: &str,
    kind: &'static str,
    name: &str,
    data: Option<BTreeMap<&str, Vec<u8>>>,
    items: Option<&[KeyToPath]>,
    optional: bool,
    mode: i32,
) -> Result<(), VolumeError> {
    let Some(data) = data else {
        let missing = VolumeError::Missing { volume: volume.to_owned(), kind, name: name.to_owned() };
        return if optional { Ok(()) } else { Err(missing) };
    };
    match items.filter(|items| !items.is_empty()) {
        None => data.into_iter().try_for_each(|(key, bytes)| put(files, volume, key, bytes, mode)),
        Some(items) => items.iter().try_for_each(|item| match data.get(item.key.as_str()) {
            Some(bytes) => put(files, volume, &item.path, bytes.clone(), item.mode.unwrap_or(mode)),
            None if optional => Ok(()),
            None => {
                let (volume, name, key) = (volume.to_owned(), name.to_owned(), item.key.clone());
                Err(VolumeError::MissingKey { volume, kind, name, key })
            }
        }),
    }
}

fn put(files: &mut Files, volume: &str, path: &str, bytes: Vec<u8>, mode: i32) -> Result<(), VolumeError> {
    let bad = || VolumeError::Path { volume: volume.to_owned(), path: path.to_owned() };
    // Names at the top that begin so are the layout's own.
    if !stays_inside(path) || path.starts_with("..") {
        return Err(bad());
    }
    let path: Vec<_> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    let path = path.join("/");
    let below = format!("{path}/");
    let clash = |known: &String| known.starts_with(&below) || path.starts_with(&format!("{known}/"));
    if path.is_empty() || files.keys().any(clash) {
        return Err(bad());
    }
    files.insert(path, File { bytes, mode: u32::try_from(mode).unwrap_or(0o644) & 0o777 });
    Ok(())
}

/// Whether a relative path can't lead out of where it begins, by itself.
fn stays_inside(path: &str) -> bool {
    !path.starts_with('/') && !path.contains(['\0', '\n']) && path.split('/').all(|part| part != "..")
}

/// A DNS label: safe in every path and every shell.
fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// A field as a downward API file has it: maps are lines `key="value"`.
fn field_text(pod: &Pod, path: &str, facts: &Facts) -> Option<String> {
    let map = match path {
        "metadata.labels" => pod.metadata.labels.as_ref(),
        "metadata.annotations" => pod.metadata.annotations.as_ref(),
        _ => return env::field_value(pod, path, facts),
    };
    let lines: Vec<_> = pod::entries(map).map(|(key, value)| format!("{key}={value:?}")).collect();
    Some(lines.join("\n"))
}

#[cfg(test)]
mod tests;
