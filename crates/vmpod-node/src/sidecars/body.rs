//! From a container of a pod to what the Docker API is asked for. Pure.

use std::{collections::HashMap, path::Path};

use bollard::models::{
    ContainerCreateBody, HostConfig, HostConfigLogConfig, Mount, MountType, MountVolumeOptions,
    MountVolumeOptionsDriverConfig,
};
use k8s_openapi::api::core::v1::{Container, Pod};

use super::members;
use crate::{
    docker::PAUSE,
    pod::{self, PodUid},
    quantity::Nanos,
    tar::Tar,
    volumes::{Content, Layout, file_of, shared},
};

/// The network of a pod.
pub(super) fn network_name(uid: &PodUid) -> String {
    format!("vmpod-{uid}")
}

/// A container's name for the engine, which no other has.
pub(super) fn container_name(pod: &Pod, uid: &PodUid, container: &str, attempt: u32) -> String {
    let container = if container.is_empty() { "POD" } else { container };
    format!("vmpod_{container}_{}_{}_{uid}_{attempt}", pod::name(pod), pod::namespace(pod))
}

fn volume_name(uid: &PodUid, volume: &str) -> String {
    format!("vmpod-{uid}-{volume}")
}

/// Where an emptyDir is.
enum Medium {
    Disk,
    /// In memory, of at most so many bytes.
    Memory(Option<u64>),
}

/// The emptyDir volumes that a container beside the machine mounts, and the machine doesn't.
fn empty_dirs(pod: &Pod) -> Vec<(&str, Medium)> {
    let members = members(pod);
    let mounted = |name: &str| {
        members.iter().any(|member| member.container.volume_mounts.iter().flatten().any(|mount| mount.name == name))
    };
    let volumes = pod::spec(pod).and_then(|spec| spec.volumes.as_deref()).unwrap_or_default();
    let empty = volumes.iter().filter_map(|volume| Some((volume, volume.empty_dir.as_ref()?)));
    let shared = shared(pod);
    empty
        .filter(|(volume, _)| mounted(&volume.name) && !shared.contains(volume.name.as_str()))
        .map(|(volume, source)| {
            let limit = source.size_limit.as_ref().and_then(|size| Nanos::parse(&size.0).ok()).map(Nanos::units_up);
            let memory = source.medium.as_deref() == Some("Memory");
            (volume.name.as_str(), if memory { Medium::Memory(limit) } else { Medium::Disk })
        })
        .collect()
}

/// What holds a pod's network and its empty directories, as long as the pod lives.
pub(super) fn holder(pod: &Pod, uid: &PodUid, labels: &HashMap<String, String>) -> ContainerCreateBody {
    let mounts = empty_dirs(pod).into_iter().map(|(name, medium)| {
        let limit = match medium {
            Medium::Disk => None,
            Medium::Memory(limit) => Some(limit.filter(|limit| *limit > 0)),
        };
        let driver_config = limit.map(|limit| {
            let size = limit.map_or_else(String::new, |limit| format!(",size={limit}"));
            let options = format!("mode=1777{size}");
            let fields = [("type", "tmpfs"), ("device", "tmpfs"), ("o", &options)];
            MountVolumeOptionsDriverConfig {
                name: Some("local".to_owned()),
                options: Some(fields.map(|(key, value)| (key.to_owned(), value.to_owned())).into()),
            }
        });
        Mount {
            typ: Some(MountType::VOLUME),
            source: Some(volume_name(uid, name)),
            target: Some(format!("/volumes/{name}")),
            volume_options: Some(MountVolumeOptions {
                no_copy: Some(true),
                labels: Some(labels.clone()),
                driver_config,
                ..MountVolumeOptions::default()
            }),
            ..Mount::default()
        }
    });
    let hosts = pod::spec(pod).and_then(|spec| spec.host_aliases.as_deref()).unwrap_or_default().iter();
    let hosts =
        hosts.flat_map(|alias| alias.hostnames.iter().flatten().map(move |name| format!("{name}:{}", alias.ip)));
    ContainerCreateBody {
        image: Some(PAUSE.to_owned()),
        hostname: Some(pod::hostname(pod)),
        labels: Some(labels.clone()),
        host_config: Some(HostConfig {
            network_mode: Some(network_name(uid)),
            extra_hosts: Some(hosts.collect()),
            mounts: Some(mounts.collect()),
            cap_drop: Some(vec!["ALL".to_owned()]),
            security_opt: Some(vec!["no-new-privileges".to_owned()]),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    }
}

/// What is put into the holder, so that everybody may write into the empty directories, as the kubelet makes them.
pub(super) fn directories(pod: &Pod) -> Vec<u8> {
    let mut tar = Tar::default();
    for (name, medium) in empty_dirs(pod) {
        if matches!(medium, Medium::Disk) {
            tar.open_directory(&format!("volumes/{name}"));
        }
    }
    tar.finish()
}

/// Whether a container that mustn't be root isn't, with the kubelet's words. `image` is the user that its image names.
pub(super) fn check_user(pod: &Pod, container: &Container, image: &str) -> Result<(), String> {
    let context = container.security_context.as_ref();
    let pods = pod::spec(pod).and_then(|spec| spec.security_context.as_ref());
    if context.and_then(|c| c.run_as_non_root).or_else(|| pods?.run_as_non_root) != Some(true) {
        return Ok(());
    }
    match context.and_then(|c| c.run_as_user).or_else(|| pods?.run_as_user) {
        Some(0) => return Err("container's runAsUser breaks non-root policy".to_owned()),
        Some(_) => return Ok(()),
        None => {}
    }
    let user = image.split(':').next().unwrap_or_default();
    match user.parse::<u32>() {
        Ok(0) => Err("container has runAsNonRoot and image will run as root".to_owned()),
        Ok(_) => Ok(()),
        Err(_) if user.is_empty() => Err("container has runAsNonRoot and image will run as root".to_owned()),
        Err(_) => Err(format!(
            "container has runAsNonRoot and image has non-numeric user ({user}), cannot verify user is non-root"
        )),
    }
}

/// What a container runs.
#[derive(Clone, Default)]
pub(super) struct Command {
    /// Replaces the image's entry point, if there is one.
    pub(super) entrypoint: Vec<String>,
    pub(super) args: Vec<String>,
    pub(super) env: Vec<(String, String)>,
}

/// What one life of a container is made from.
pub(super) struct Parts<'a> {
    pub(super) pod: &'a Pod,
    pub(super) uid: &'a PodUid,
    pub(super) container: &'a Container,
    pub(super) command: Command,
    pub(super) layout: &'a Layout,
    /// Where the files of volumes are on this host.
    pub(super) volumes: &'a Path,
    /// Where the directories are that the machine and the containers share.
    pub(super) shared: &'a Path,
    /// The file on this host that it may leave a message in.
    pub(super) last_words: &'a Path,
    /// The container that holds the pod's network.
    pub(super) holder: &'a str,
    pub(super) labels: HashMap<String, String>,
}

/// One life of a container.
pub(super) fn body(parts: Parts<'_>) -> Result<ContainerCreateBody, String> {
    let Parts { pod, uid, container, command, layout, volumes, shared, last_words, holder, labels } = parts;
    let context = container.security_context.as_ref();
    let pods = pod::spec(pod).and_then(|spec| spec.security_context.as_ref());
    let user = context.and_then(|c| c.run_as_user).or_else(|| pods?.run_as_user);
    let group = context.and_then(|c| c.run_as_group).or_else(|| pods?.run_as_group);
    let groups = pods.iter().flat_map(|context| context.supplemental_groups.iter().flatten().chain(&context.fs_group));
    let groups: Vec<String> = groups.map(ToString::to_string).collect();
    let capabilities = context.and_then(|context| context.capabilities.as_ref());
    let limit = |name: &str| {
        crate::quantity::of(container.resources.as_ref().and_then(|resources| resources.limits.as_ref()), name)
    };
    let memory = limit("memory").map(Nanos::units_up).filter(|bytes| *bytes > 0);
    let memory = memory.map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX));
    let cpus = limit("cpu").map(Nanos::millis_up).filter(|millis| *millis > 0);
    let shares = pod::request(container.resources.as_ref(), "cpu").map(Nanos::millis_up);
    let no_more = context.and_then(|context| context.allow_privilege_escalation) == Some(false);
    let some = |words: Vec<String>| Some(words).filter(|words| !words.is_empty());
    let mut mounts = mounts(uid, layout, volumes, shared)?;
    mounts.push(Mount {
        typ: Some(MountType::BIND),
        source: Some(last_words.display().to_string()),
        target: Some(crate::last_words::path(container).to_owned()),
        ..Mount::default()
    });
    let tty = container.tty == Some(true);
    let stdin = container.stdin == Some(true);
    Ok(ContainerCreateBody {
        image: container.image.clone(),
        entrypoint: some(command.entrypoint),
        cmd: some(command.args),
        env: Some(command.env.into_iter().map(|(name, value)| format!("{name}={value}")).collect()),
        working_dir: container.working_dir.clone().filter(|dir| !dir.is_empty()),
        user: user.map(|user| group.map_or_else(|| user.to_string(), |group| format!("{user}:{group}"))),
        tty: Some(tty),
        open_stdin: Some(stdin),
        stdin_once: container.stdin_once,
        labels: Some(labels),
        host_config: Some(HostConfig {
            network_mode: Some(format!("container:{holder}")),
            ipc_mode: Some("private".to_owned()),
            mounts: Some(mounts),
            memory,
            // Without more swap than memory there is none.
            memory_swap: memory,
            nano_cpus: cpus.map(|millis| i64::try_from(millis).unwrap_or(i64::MAX).saturating_mul(1_000_000)),
            // As the kubelet: 1024 shares a processor, and at least two.
            cpu_shares: Some(shares.map_or(2, |millis| i64::try_from(millis).unwrap_or(0) * 1024 / 1000).max(2)),
            group_add: some(groups),
            cap_add: capabilities.and_then(|capabilities| capabilities.add.clone()),
            cap_drop: capabilities.and_then(|capabilities| capabilities.drop.clone()),
            readonly_rootfs: context.and_then(|context| context.read_only_root_filesystem),
            security_opt: no_more.then(|| vec!["no-new-privileges".to_owned()]),
            log_config: Some(HostConfigLogConfig {
                typ: Some("json-file".to_owned()),
                // The kubelet's containerLogMaxSize and containerLogMaxFiles.
                config: Some(
                    [("max-size", "10m"), ("max-file", "5")].map(|(a, b)| (a.to_owned(), b.to_owned())).into(),
                ),
            }),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    })
}

fn mounts(uid: &PodUid, layout: &Layout, volumes: &Path, shared: &Path) -> Result<Vec<Mount>, String> {
    layout
        .mounts
        .iter()
        .map(|mount| {
            let (typ, source) = match layout.volumes.get(&mount.volume) {
                Some(Content::Files(files)) => {
                    let path = file_of(&volumes.join(&mount.volume), files, &mount.sub_path)
                        .ok_or_else(|| format!("subPath {:?} is not in volume {:?}", mount.sub_path, mount.volume))?;
                    (MountType::BIND, path.display().to_string())
                }
                Some(Content::Shared(_)) => (MountType::BIND, shared.join(&mount.volume).display().to_string()),
                Some(Content::Disk | Content::Memory(_)) => (MountType::VOLUME, volume_name(uid, &mount.volume)),
                None => return Err(format!("the pod has no volume {:?}", mount.volume)),
            };
            Ok(Mount {
                typ: Some(typ),
                source: Some(source),
                target: Some(mount.target.clone()),
                read_only: Some(mount.read_only),
                volume_options: (typ == MountType::VOLUME)
                    .then(|| MountVolumeOptions { no_copy: Some(true), ..MountVolumeOptions::default() }),
                ..Mount::default()
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use crate::volumes::{File, Mount as VolumeMount};

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "ns"},
            "spec": {
                "hostAliases": [{"ip": "10.0.0.9", "hostnames": ["db", "db.example"]}],
                "securityContext": {"runAsUser": 7, "fsGroup": 9},
                "volumes": [
                    {"name": "work", "emptyDir": {}},
                    {"name": "fast", "emptyDir": {"medium": "Memory", "sizeLimit": "64Mi"}},
                    {"name": "machine-only", "emptyDir": {}},
                    {"name": "both", "emptyDir": {}},
                    {"name": "conf", "configMap": {"name": "c"}}],
                "containers": [
                    {"name": "vm", "volumeMounts": [
                        {"name": "machine-only", "mountPath": "/x"}, {"name": "both", "mountPath": "/both"}]},
                    {"name": "side", "image": "r.example/side:1", "workingDir": "/w",
                     "resources": {"requests": {"cpu": "250m"}, "limits": {"cpu": "1500m", "memory": "64Mi"}},
                     "securityContext": {"runAsUser": 1000, "runAsGroup": 1001, "allowPrivilegeEscalation": false,
                        "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]}},
                     "volumeMounts": [
                        {"name": "both", "mountPath": "/both"}, {"name": "work", "mountPath": "/work"}, {"name": "fast", "mountPath": "/fast"},
                        {"name": "conf", "mountPath": "/conf"}]}]}}))
        .unwrap()
    }

    fn layout() -> Layout {
        let files = BTreeMap::from([("a.txt".to_owned(), File { bytes: b"a".to_vec(), mode: 0o644 })]);
        let mount = |volume: &str, sub_path: &str, target: &str, read_only| VolumeMount {
            volume: volume.to_owned(),
            sub_path: sub_path.to_owned(),
            target: target.to_owned(),
            read_only,
        };
        Layout {
            volumes: BTreeMap::from([
                ("both".to_owned(), Content::Shared("vmpod-0".to_owned())),
                ("work".to_owned(), Content::Disk),
                ("fast".to_owned(), Content::Memory(Some(64 << 20))),
                ("conf".to_owned(), Content::Files(files)),
            ]),
            mounts: vec![
                mount("both", "", "/both", false),
                mount("conf", "", "/conf", true),
                mount("conf", "a.txt", "/etc/a", true),
                mount("fast", "", "/fast", false),
                mount("work", "", "/work", false),
            ],
        }
    }

    #[test]
    fn a_container_is_asked_for_as_its_pod_says() {
        let (pod, uid) = (pod(), PodUid::parse("u-1").unwrap());
        let layout = layout();
        let parts = Parts {
            pod: &pod,
            uid: &uid,
            container: &pod.spec.as_ref().unwrap().containers[1],
            command: Command {
                entrypoint: vec!["/bin/x".to_owned()],
                args: vec!["-v".to_owned()],
                env: vec![("A".to_owned(), "b=c".to_owned())],
            },
            layout: &layout,
            volumes: Path::new("/node/volumes"),
            shared: Path::new("/node/shared"),
            last_words: Path::new("/node/side/0.said"),
            holder: "h",
            labels: HashMap::from([("l".to_owned(), "1".to_owned())]),
        };
        let mut body = body(parts).unwrap();
        let logs = body.host_config.as_mut().unwrap().log_config.take().unwrap().config.unwrap();
        assert_eq!((logs["max-size"].as_str(), logs["max-file"].as_str()), ("10m", "5"));
        insta::assert_json_snapshot!(body);
        assert_eq!(container_name(&pod, &uid, "side", 2), "vmpod_side_p_ns_u-1_2");
    }

    #[test]
    fn the_holder_has_the_empty_directories_of_the_containers() {
        let uid = PodUid::parse("u-1").unwrap();
        let host = holder(&pod(), &uid, &HashMap::new()).host_config.unwrap();
        let mounts = host.mounts.unwrap();
        let names: Vec<_> = mounts.iter().map(|mount| mount.source.as_deref().unwrap()).collect();
        assert_eq!(names, ["vmpod-u-1-work", "vmpod-u-1-fast"]);
        let memory = mounts[1].volume_options.as_ref().unwrap().driver_config.as_ref().unwrap();
        assert_eq!(memory.options.as_ref().unwrap()["o"], "mode=1777,size=67108864");
        assert_eq!(host.extra_hosts.unwrap(), ["db:10.0.0.9", "db.example:10.0.0.9"]);
        // Only the one on disk must be opened to everybody: the other is from the start.
        let directories = directories(&pod());
        assert!(directories.starts_with(b"volumes/work/\0"), "{directories:?}");
        assert_eq!(directories.len(), 512 + 1024);
    }

    #[test]
    fn who_must_not_be_root_is_not() {
        let check = |container: serde_json::Value, pods: serde_json::Value, image: &str| {
            let spec = json!({"securityContext": pods, "containers": [{"name": "vm"}, {"name": "s", "securityContext": container}]});
            let pod: Pod = serde_json::from_value(json!({"spec": spec})).unwrap();
            check_user(&pod, &pod.spec.as_ref().unwrap().containers[1], image).is_ok()
        };
        let must = json!({"runAsNonRoot": true});
        for (image, fine) in [("", false), ("0", false), ("0:7", false), ("7:0", true), ("nobody", false)] {
            assert_eq!(check(must.clone(), json!({}), image), fine, "{image:?}");
            assert_eq!(check(json!({}), must.clone(), image), fine, "{image:?} by the pod");
            assert!(check(json!({"runAsNonRoot": false}), must.clone(), image), "the container's own word wins");
        }
        assert!(check(must.clone(), json!({"runAsUser": 5}), ""));
        assert!(!check(json!({"runAsNonRoot": true, "runAsUser": 0}), json!({}), "7"));
    }

    #[test]
    fn a_missing_sub_path_is_told() {
        let mut layout = layout();
        layout.mounts[2].sub_path = "b.txt".to_owned();
        let error = mounts(&PodUid::parse("u").unwrap(), &layout, Path::new("/v"), Path::new("/s")).unwrap_err();
        assert_eq!(error, "subPath \"b.txt\" is not in volume \"conf\"");
    }
}
