use serde_json::{Value, json};

use super::*;
use crate::pod::Requests;

fn facts() -> Facts {
    Facts { host_ip: "10.0.0.1".to_owned(), pod_ip: "127.0.0.2".to_owned(), allocatable: Requests::default() }
}

fn fetched() -> Fetched {
    let map = serde_json::from_value(json!({"data": {"a": "A", "b": "B"}, "binaryData": {"c": "AAE="}})).unwrap();
    let secret = serde_json::from_value(json!({"data": {"password": "aHVudGVy"}})).unwrap();
    Fetched {
        config_maps: BTreeMap::from([("map".to_owned(), map)]),
        secrets: BTreeMap::from([("secret".to_owned(), secret)]),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "JSON is written in place")]
fn built(volume: Value, mount: Value) -> Result<Layout, VolumeError> {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "p", "namespace": "ns", "labels": {"app": "web", "odd": "a\"b"}},
        "spec": {"containers": [{"name": "vm", "volumeMounts": [mount], "resources": {"limits": {"memory": "2Mi"}}}],
            "volumes": [volume]}}))
    .unwrap();
    let tokens = BTreeMap::from([((None, 3600), "TOKEN".to_owned())]);
    let container = pod::machine_container(&pod).unwrap();
    layout(&pod, container, &fetched(), &tokens, &facts(), &[("NAME".to_owned(), "x".to_owned())])
}

fn files(source: &Value) -> Result<Vec<(String, String, u32)>, VolumeError> {
    let mut volume = source.clone();
    volume["name"] = json!("v");
    let layout = built(volume, json!({"name": "v", "mountPath": "/v"}))?;
    let Content::Files(files) = &layout.volumes["v"] else { panic!("no files") };
    let text = |file: &File| String::from_utf8(file.bytes.clone()).unwrap();
    Ok(files.iter().map(|(path, file)| (path.clone(), text(file), file.mode)).collect())
}

fn one(path: &str, text: &str, mode: u32) -> (String, String, u32) {
    (path.to_owned(), text.to_owned(), mode)
}

#[test]
fn every_source_gives_its_files_with_their_modes() {
    for (source, want) in [
        (
            json!({"configMap": {"name": "map"}}),
            vec![one("a", "A", 0o644), one("b", "B", 0o644), one("c", "\0\u{1}", 0o644)],
        ),
        (
            json!({"configMap": {"name": "map", "defaultMode": 0o400, "items": [
                {"key": "a", "path": "x/y"}, {"key": "b", "path": "z", "mode": 0o755}]}}),
            vec![one("x/y", "A", 0o400), one("z", "B", 0o755)],
        ),
        (json!({"configMap": {"name": "none", "optional": true}}), vec![]),
        (json!({"secret": {"secretName": "secret", "defaultMode": 0o600}}), vec![one("password", "hunter", 0o600)]),
        (
            json!({"downwardAPI": {"items": [
                {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
                {"path": "name", "fieldRef": {"fieldPath": "metadata.name"}},
                {"path": "mem", "resourceFieldRef": {"containerName": "vm", "resource": "limits.memory", "divisor": "1Mi"}}]}}),
            vec![one("labels", "app=\"web\"\nodd=\"a\\\"b\"", 0o644), one("mem", "2", 0o644), one("name", "p", 0o644)],
        ),
        (
            json!({"projected": {"defaultMode": 0o440, "sources": [
                {"serviceAccountToken": {"path": "token"}},
                {"configMap": {"name": "map", "items": [{"key": "a", "path": "ca.crt"}]}},
                {"secret": {"name": "secret"}}]}}),
            vec![one("ca.crt", "A", 0o440), one("password", "hunter", 0o440), one("token", "TOKEN", 0o440)],
        ),
    ] {
        assert_eq!(files(&source).unwrap(), want, "{source}");
    }
}

#[test]
fn what_is_missing_is_named_in_the_kubelets_words() {
    for (source, want) in [
        (
            json!({"configMap": {"name": "none"}}),
            "MountVolume.SetUp failed for volume \"v\" : configmap \"none\" not found",
        ),
        (
            json!({"secret": {"secretName": "secret", "items": [{"key": "k", "path": "p"}]}}),
            "MountVolume.SetUp failed for volume \"v\" : secret \"secret\" references non-existent key: k",
        ),
        (
            json!({"projected": {"sources": [{"serviceAccountToken": {"path": "t", "audience": "other"}}]}}),
            "MountVolume.SetUp failed for volume \"v\" : no token was issued for it",
        ),
    ] {
        assert_eq!(files(&source).unwrap_err().to_string(), want);
    }
}

#[test]
fn no_path_of_a_volume_leads_out_of_it() {
    for path in ["../x", "/etc/passwd", "a/../../b", "..", "..data", "a/..", "", ".", "a\nb"] {
        let source = json!({"configMap": {"name": "map", "items": [{"key": "a", "path": path}]}});
        assert!(matches!(files(&source), Err(VolumeError::Path { .. })), "{path:?}");
    }
    // A file can't be a directory as well.
    let source =
        json!({"configMap": {"name": "map", "items": [{"key": "a", "path": "x"}, {"key": "b", "path": "x/y"}]}});
    assert!(matches!(files(&source), Err(VolumeError::Path { .. })));
    let empty = || json!({"name": "v", "emptyDir": {}});
    for sub_path in ["../x", "/x", "a/../../b", "a\nb"] {
        let mount = json!({"name": "v", "mountPath": "/v", "subPath": sub_path});
        assert!(matches!(built(empty(), mount), Err(VolumeError::Mount { .. })), "{sub_path:?}");
    }
    for target in ["/", "", "/a/../..", "/a\nb"] {
        let mount = json!({"name": "v", "mountPath": target});
        assert!(matches!(built(empty(), mount), Err(VolumeError::Mount { .. })), "{target:?}");
    }
    let layout = built(empty(), json!({"name": "v", "mountPath": "/v", "subPathExpr": "a/$(NAME)"})).unwrap();
    assert_eq!(layout.mounts[0].sub_path, "a/x");
}

#[test]
fn what_this_node_does_not_mount_is_refused() {
    for (source, fine) in [
        (json!({"emptyDir": {}}), true),
        (json!({"emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}), true),
        (json!({"emptyDir": {"sizeLimit": "1Mi"}}), false),
        (json!({"emptyDir": {"medium": "HugePages"}}), false),
        (json!({"hostPath": {"path": "/"}}), false),
        (json!({"persistentVolumeClaim": {"claimName": "c"}}), false),
        (json!({"name": "../v", "emptyDir": {}}), false),
        (json!({"name": "a\nb", "emptyDir": {}}), false),
    ] {
        let mut volume = source.clone();
        if volume.get("name").is_none() {
            volume["name"] = json!("v");
        }
        let volume: Volume = serde_json::from_value(volume).unwrap();
        assert_eq!(unsupported(&volume).is_none(), fine, "{source}");
    }
}

#[test]
fn an_archive_is_what_tar_reads_and_its_words_are_quoted() {
    let long = format!("{}/{}", "d".repeat(90), "f".repeat(90));
    let source = json!({"name": "v", "configMap": {"name": "map", "items": [
        {"key": "a", "path": long, "mode": 0o640}, {"key": "c", "path": "c"}]}});
    let layout = built(source, json!({"name": "v", "mountPath": "/it's; touch $(x)"})).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.tar");
    std::fs::write(&file, archive::archive(&layout)).unwrap();
    let unpacked = std::process::Command::new("tar").arg("-xf").arg(&file).arg("-C").arg(dir.path()).status().unwrap();
    assert!(unpacked.success());
    let path = dir.path().join("files/v").join(&long);
    assert_eq!(std::fs::read(&path).unwrap(), b"A");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o640);
    let script = std::fs::read_to_string(dir.path().join("apply")).unwrap();
    assert!(script.contains(r"bind 0 $all/v'' '/it'\''s; touch $(x)' ro 0"), "{script}");
    let checked = std::process::Command::new("sh").arg("-n").arg(dir.path().join("apply")).status().unwrap();
    assert!(checked.success());
}

#[test]
fn an_empty_directory_of_machine_and_containers_is_shared() {
    let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": {
        "volumes": [
            {"name": "both", "emptyDir": {}}, {"name": "vm-only", "emptyDir": {}}, {"name": "side-only", "emptyDir": {}},
            {"name": "map", "configMap": {"name": "map"}}],
        "initContainers": [{"name": "first", "volumeMounts": [{"name": "both", "mountPath": "/a"}]}],
        "containers": [
            {"name": "vm", "volumeMounts": [
                {"name": "both", "mountPath": "/both"}, {"name": "both", "mountPath": "/one", "subPath": "x/y"},
                {"name": "vm-only", "mountPath": "/own"}, {"name": "map", "mountPath": "/map"}]},
            {"name": "side", "volumeMounts": [
                {"name": "side-only", "mountPath": "/s"}, {"name": "map", "mountPath": "/map"}]}]}}))
    .unwrap();
    assert_eq!(shared(&pod), BTreeSet::from(["both"]), "an init container is one as well");
    let container = pod::machine_container(&pod).unwrap();
    let layout = layout(&pod, container, &fetched(), &BTreeMap::new(), &facts(), &[]).unwrap();
    assert_eq!(
        (&layout.volumes["both"], &layout.volumes["vm-only"]),
        (&Content::Shared("vmpod-0".to_owned()), &Content::Disk)
    );
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.tar");
    std::fs::write(&file, archive::archive(&layout)).unwrap();
    std::process::Command::new("tar").arg("-xf").arg(&file).arg("-C").arg(dir.path()).status().unwrap();
    let script = std::fs::read_to_string(dir.path().join("apply")).unwrap();
    for line in [
        "shared both vmpod-0\n",
        "$share/both'' '/both' rw 1\n",
        "$share/both'/x/y' '/one' rw 1\n",
        "$disk/vm-only'' '/own' rw 1\n",
    ] {
        assert!(script.contains(line), "no {line:?} in {script}");
    }
    let own = shares(&pod, Path::new("/s"));
    assert_eq!(
        (own.len(), own[0].path.as_path()),
        (1, Path::new("/s/both")),
        "the guest sees no directory above its volume"
    );
    share(&dir.path().join("shared"), shared(&pod)).unwrap();
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&dir.path().join("shared/both").metadata().unwrap().permissions());
    assert_eq!(mode & 0o7777, 0o777);
}
