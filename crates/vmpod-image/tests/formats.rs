//! Foreign formats, read from samples that another encoder made (`tests/data/make.py`).

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use vmpod_image::{
    Architecture, Boot, Digest, Firmware, Image, ImportError, ImportOptions, Os, Reference, Source, Store, import,
};

struct World {
    dir: tempfile::TempDir,
    store: Store,
}

fn sample(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(format!("{name}.oci"))
}

fn expected(key: &str) -> String {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/expected.json")).unwrap();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value[key].as_str().unwrap().to_owned()
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("images")).unwrap();
        Self { dir, store }
    }

    async fn import(&self, name: &str) -> Result<Image, ImportError> {
        self.import_from(&sample(name)).await
    }

    async fn import_from(&self, path: &Path) -> Result<Image, ImportError> {
        let name = Reference::parse("guest").unwrap();
        import(&self.store, Source::detect(path)?, &name, ImportOptions::default()).await
    }

    fn file(&self, image: &Image, name: &str) -> Vec<u8> {
        std::fs::read(self.store.dir().join("images").join(image.digest.hex()).join(name)).unwrap()
    }

    async fn check(&self, name: &str, key: &str) -> Image {
        let image = self.import(name).await.unwrap_or_else(|error| panic!("{name}: {error:?}"));
        let disk = self.file(&image, "disk-0.raw");
        assert_eq!(Digest::of(&disk).hex(), expected(key), "{name}");
        assert_eq!(image.config.disks[0].size, disk.len() as u64);
        if key == "disk" {
            assert!(image.stored_bytes < 400_000, "{name}: holes stay holes, {} bytes", image.stored_bytes);
        }
        let clone = self.store.clone_image(&image, &self.dir.path().join("m"), None, "h").unwrap();
        self.store.release("h").unwrap();
        assert_eq!(clone.nvram.is_some(), !name.starts_with("container"), "{name}");
        image
    }
}

#[tokio::test]
async fn tart() {
    let world = World::new();
    let image = world.check("tart", "disk").await;
    assert_eq!(
        (image.format.as_str(), image.config.os, image.config.architecture),
        ("tart", Os::Darwin, Architecture::Arm64)
    );
    assert_eq!((image.config.min_cpus, image.config.min_memory), (Some(2), Some(2 << 30)));
    let identity = image.config.macos.clone().unwrap();
    assert_eq!((identity.hardware_model.as_str(), identity.machine_identifier.as_str()), ("bW9kZWw=", "ZWNpZA=="));
    assert_eq!(world.file(&image, "nvram").len(), 2000);
    let linux = world.check("tart-linux", "disk").await;
    assert_eq!((linux.config.os, linux.config.macos), (Os::Linux, None));
    world.check("tart-v1", "odd").await;
    let error = world.import("tart-stacked").await.unwrap_err();
    assert!(format!("{error:?}").contains("Unsupported"), "{error:?}");
}

#[tokio::test]
async fn agoda() {
    let world = World::new();
    let image = world.check("agoda", "disk").await;
    assert_eq!((image.format.as_str(), image.config.os), ("agoda", Os::Darwin));
    assert_eq!(image.config.macos.clone().unwrap().machine_identifier, "bWFjaGluZQ==");
    assert_eq!(world.file(&image, "nvram").len(), 1500);
    let names: Vec<_> = std::fs::read_dir(world.store.dir().join("images").join(image.digest.hex())).unwrap().collect();
    assert_eq!(names.len(), 8, "titles are never paths: {names:?}");
    world.check("agoda-raw", "head").await;
}

#[tokio::test]
async fn lume() {
    let world = World::new();
    for name in ["lume", "lume-whole", "lume-legacy"] {
        let image = world.check(name, "disk").await;
        assert_eq!((image.format.as_str(), image.config.os), ("lume", Os::Darwin), "{name}");
        assert_eq!(image.config.macos.unwrap().hardware_model, "bW9kZWw=");
    }
}

#[tokio::test]
async fn container_disks() {
    let world = World::new();
    let raw = world.check("containerdisk-raw", "disk").await;
    assert_eq!((raw.format.as_str(), &raw.config.boot), ("containerdisk", &Boot::Firmware(Firmware::Bios)));
    let qcow2 = world.check("containerdisk-qcow2", "disk").await;
    assert_eq!((&qcow2.config.boot, qcow2.config.guest.user.as_str()), (&Boot::Firmware(Firmware::Uefi), "debian"));
    for (name, why) in
        [("containerdisk-two", "2 files under /disk (a.img, b.img)"), ("container", "ordinary container image")]
    {
        let error = world.import(name).await.unwrap_err();
        assert!(format!("{error:?}").contains(why), "{name}: {error:?}");
    }
    assert_eq!(world.store.list().unwrap().len(), 1, "only the last image has the name");
}

#[tokio::test]
async fn one_flipped_bit_in_any_blob_is_found() {
    for name in ["tart", "tart-v1", "agoda", "lume", "lume-legacy", "containerdisk-raw"] {
        let blobs = sample(name).join("blobs/sha256");
        for (number, entry) in std::fs::read_dir(&blobs).unwrap().enumerate() {
            let copy = tempfile::tempdir().unwrap();
            std::fs::create_dir_all(copy.path().join("blobs/sha256")).unwrap();
            for file in ["oci-layout", "index.json"] {
                std::fs::copy(sample(name).join(file), copy.path().join(file)).unwrap();
            }
            for blob in std::fs::read_dir(&blobs).unwrap() {
                let blob = blob.unwrap();
                std::fs::copy(blob.path(), copy.path().join("blobs/sha256").join(blob.file_name())).unwrap();
            }
            let victim = entry.unwrap().file_name().into_string().unwrap();
            let path = copy.path().join("blobs/sha256").join(&victim);
            let mut bytes = std::fs::read(&path).unwrap();
            // The empty configuration of some formats is read, but nothing in it counts.
            let at = (bytes.len() - 1) * number / 20;
            bytes[at] ^= 0x10;
            std::fs::write(&path, bytes).unwrap();
            let world = World::new();
            let error =
                world.import_from(copy.path()).await.err().unwrap_or_else(|| panic!("{name}: {victim} at {at}"));
            assert!(format!("{error:?}").contains(&victim), "{name}: {error:?}");
            assert!(world.store.list().unwrap().is_empty());
        }
    }
}
