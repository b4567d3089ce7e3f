//! Images made to harm: each is refused, and nothing of it stays.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use vmpod_image::{Digest, ImportOptions, Reference, Source, Store, import};

/// An OCI layout that a test fills.
struct Hostile {
    dir: tempfile::TempDir,
}

impl Hostile {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("x.oci/blobs/sha256")).unwrap();
        std::fs::write(dir.path().join("x.oci/oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { dir }
    }

    fn layout(&self) -> PathBuf {
        self.dir.path().join("x.oci")
    }

    fn blob(&self, bytes: &[u8]) -> (String, usize) {
        let digest = Digest::of(bytes);
        std::fs::write(self.layout().join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        (digest.to_string(), bytes.len())
    }

    fn point_at(&self, media_type: &str, document: &Value) {
        let (digest, size) = self.blob(&serde_json::to_vec(document).unwrap());
        let index =
            json!({"schemaVersion": 2, "manifests": [{"mediaType": media_type, "digest": digest, "size": size}]});
        std::fs::write(self.layout().join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
    }

    /// A native image with a disk of `size` bytes and these layers.
    fn native(&self, size: u64, layers: &[Value]) {
        let config =
            json!({"os": "linux", "architecture": "amd64", "boot": {"firmware": "uefi"}, "disks": [{"size": size}]});
        let (digest, length) = self.blob(&serde_json::to_vec(&config).unwrap());
        self.point_at(
            "application/vnd.oci.image.manifest.v1+json",
            &json!({"schemaVersion": 2, "artifactType": "application/vnd.vmpod.image.v1",
                "config": {"mediaType": "application/vnd.vmpod.config.v1+json", "digest": digest, "size": length},
                "layers": layers}),
        );
    }

    fn chunk(&self, packed: &[u8], offset: u64, raw_size: u64, raw: &[u8]) -> Value {
        let (digest, size) = self.blob(packed);
        json!({"mediaType": "application/vnd.vmpod.disk.chunk.v1+zstd", "digest": digest, "size": size, "annotations": {
            "dev.vmpod.chunk.disk": "0", "dev.vmpod.chunk.offset": offset.to_string(),
            "dev.vmpod.chunk.raw-size": raw_size.to_string(), "dev.vmpod.chunk.raw-digest": Digest::of(raw).to_string(),
            "org.opencontainers.image.title": "../../../../etc/cron.d/harm"}})
    }

    /// Imports it; the error in words. Nothing may be left but what an unfinished pull keeps.
    async fn refused(&self) -> String {
        let store = Store::open(&self.dir.path().join("images")).unwrap();
        let name = Reference::parse("x").unwrap();
        let error =
            import(&store, Source::OciLayout(self.layout()), &name, ImportOptions::default()).await.unwrap_err();
        assert_eq!(store.list().unwrap(), []);
        assert!(store.used_bytes().unwrap() < 8 << 20, "{}", store.used_bytes().unwrap());
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(error) = source {
            text = format!("{text}: {error}");
            source = error.source();
        }
        text
    }
}

const WINDOW: u64 = 4 << 20;

#[tokio::test]
async fn a_bomb_ends_where_its_manifest_says() {
    let hostile = Hostile::new();
    // A gigabyte of zeros in some kilobytes, said to be a window.
    let mut packer = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
    for _ in 0..1024 {
        packer.write_all(&vec![0; 1 << 20]).unwrap();
    }
    let bomb = packer.finish().unwrap();
    let chunk = hostile.chunk(&bomb, 0, WINDOW, &[]);
    hostile.native(1 << 30, &[chunk]);
    let told = hostile.refused().await;
    assert!(told.contains("unpacks to more than the 4194304 bytes"), "{told}");
}

#[tokio::test]
async fn sizes_and_places_that_lie_are_found_before_anything_is_fetched() {
    let data = vec![7u8; 4 << 20];
    let packed = zstd::encode_all(data.as_slice(), 3).unwrap();
    for (disk, places, told) in [
        (8u64 << 20, vec![(0, WINDOW), (WINDOW / 2, WINDOW)], "overlaps another layer"),
        (8 << 20, vec![(8 << 20, WINDOW)], "reaches past the end"),
        (8 << 20, vec![(u64::MAX - 4, WINDOW)], "reaches past the end"),
        (8 << 20, vec![(0, u64::MAX)], "larger than 64 MiB"),
        (u64::MAX / 512 * 512, vec![(0, WINDOW)], "larger than 64 TiB"),
    ] {
        let hostile = Hostile::new();
        let layers: Vec<Value> =
            places.iter().map(|(offset, size)| hostile.chunk(&packed, *offset, *size, &data)).collect();
        hostile.native(disk, &layers);
        let found = hostile.refused().await;
        assert!(found.contains(told), "{found}");
    }
    // Too short is found when it is unpacked.
    let hostile = Hostile::new();
    let short = hostile.chunk(&zstd::encode_all(&data[..100], 3).unwrap(), 0, WINDOW, &data);
    hostile.native(8 << 20, &[short]);
    let found = hostile.refused().await;
    assert!(found.contains("unpacks to 100 bytes"), "{found}");
}

#[tokio::test]
async fn a_title_that_climbs_is_no_path() {
    let hostile = Hostile::new();
    let data = vec![7u8; 4 << 20];
    let chunk = hostile.chunk(&zstd::encode_all(data.as_slice(), 3).unwrap(), 0, WINDOW, &data);
    hostile.native(8 << 20, &[chunk]);
    let store = Store::open(&hostile.dir.path().join("images")).unwrap();
    let name = Reference::parse("x").unwrap();
    let image = import(&store, Source::OciLayout(hostile.layout()), &name, ImportOptions::default()).await.unwrap();
    let files: Vec<String> = std::fs::read_dir(store.dir().join("images").join(image.digest.hex()))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(files.iter().all(|file| !file.contains("harm")), "{files:?}");
    assert!(!Path::new("/etc/cron.d/harm").exists());
}

#[tokio::test]
async fn more_layers_than_any_image_has_are_too_many() {
    let hostile = Hostile::new();
    let short = json!({"digest": Digest::of(b"").to_string(), "size": 0});
    hostile.native(8 << 20, &vec![short.clone(); 250_000]);
    let told = hostile.refused().await;
    assert!(told.contains("too large for what it should be"), "{told}");
    // As many as the largest manifest that is read holds.
    hostile.native(8 << 20, &vec![short; 100_000]);
    let told = hostile.refused().await;
    assert!(told.contains("more layers than any image needs"), "{told}");
}

#[tokio::test]
async fn indexes_in_indexes_end() {
    let hostile = Hostile::new();
    let mut inner = (Digest::of(b"").to_string(), 0);
    for _ in 0..10 {
        let index = json!({"schemaVersion": 2, "manifests": [{"mediaType": "application/vnd.oci.image.index.v1+json",
            "digest": inner.0, "size": inner.1}]});
        inner = hostile.blob(&serde_json::to_vec(&index).unwrap());
    }
    let index = json!({"schemaVersion": 2, "manifests": [{"mediaType": "application/vnd.oci.image.index.v1+json",
        "digest": inner.0, "size": inner.1}]});
    std::fs::write(hostile.layout().join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
    let told = hostile.refused().await;
    assert!(told.contains("holds 1 images, none of them tagged"), "{told}");
}

#[tokio::test]
async fn a_disk_that_names_another_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(at("secret"), vec![7; 1 << 20]).unwrap();
    let qemu = |arguments: &[&str]| {
        let output = Command::new("qemu-img").args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    qemu(&["create", "-q", "-f", "qcow2", "-b", &at("secret"), "-F", "raw", &at("backing.qcow2")]);
    qemu(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        &format!("data_file={},data_file_raw=on", at("secret")),
        &at("data.qcow2"),
        "1M",
    ]);
    let store = Store::open(&dir.path().join("images")).unwrap();
    let name = Reference::parse("x").unwrap();
    for (file, told) in [("backing.qcow2", "overlay on another file"), ("data.qcow2", "data in another file")] {
        let source = Source::detect(Path::new(&at(file))).unwrap();
        let error = import(&store, source, &name, ImportOptions::default()).await.unwrap_err();
        assert!(format!("{:?} {}", error, std::error::Error::source(&error).unwrap()).contains(told), "{error:?}");
    }
    assert_eq!(store.list().unwrap(), []);
}
