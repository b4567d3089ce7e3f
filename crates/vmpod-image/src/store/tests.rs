use std::fs::File;

use super::record::Part;
use super::*;
use crate::config::{Architecture, Boot, Config, DiskConfig, Firmware, GuestConfig, Hardware, Os};
use crate::image::DiskFormat;
use work::Work;

fn name(text: &str) -> Reference {
    Reference::parse(text).unwrap()
}

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("images")).unwrap();
    (dir, store)
}

/// Puts an image with one disk of `size` bytes into the store, its manifest `manifest`.
fn put(store: &Store, manifest: &str, size: u64, reference: &str) -> Image {
    let work = Work::scratch(store).unwrap();
    let digest = Digest::of(manifest.as_bytes());
    let config = Config {
        os: Os::Linux,
        architecture: Architecture::Amd64,
        boot: Boot::Firmware(Firmware::Uefi),
        disks: vec![DiskConfig { size }],
        min_cpus: None,
        min_memory: None,
        macos: None,
        hardware: Hardware::default(),
        guest: GuestConfig::default(),
        labels: std::collections::BTreeMap::new(),
    };
    let disk = work.dir().join(Part::Disk(0).file_name());
    std::fs::write(&disk, manifest).unwrap();
    File::options().write(true).open(&disk).unwrap().set_len(size).unwrap();
    let record = Record::new(digest, "vmpod", jiff::Timestamp::UNIX_EPOCH, config, 7);
    let finished =
        work::Finished { record, windows: record::Windows::default(), manifest: manifest.as_bytes(), config: b"" };
    work.publish(store, &finished, &name(reference)).unwrap()
}

#[test]
fn an_image_is_found_by_each_of_its_names_and_its_digest() {
    let (_dir, store) = store();
    let image = put(&store, "one", 1 << 20, "tiny");
    assert_eq!(put(&store, "one", 1 << 20, "h.example/tiny:2").digest, image.digest);
    let found = store.get(&name("tiny:latest")).unwrap().unwrap();
    assert_eq!(found.references, [name("tiny:latest"), name("h.example/tiny:2")]);
    assert_eq!(store.get(&name(&format!("any@{}", image.digest))).unwrap().unwrap(), found);
    assert_eq!(store.get(&name("other")).unwrap(), None);
    assert_eq!(store.list().unwrap(), [found]);
    assert!(files::names_in(&store.dir().join("work")).unwrap().is_empty());
}

#[test]
fn the_data_goes_with_the_last_name() {
    let (_dir, store) = store();
    let image = put(&store, "one", 1 << 20, "a");
    store.tag(image.digest, &name("b")).unwrap();
    assert!(store.remove(&name("a")).unwrap());
    assert!(!store.remove(&name("a")).unwrap());
    assert!(store.image(image.digest).unwrap().is_some());
    assert!(store.remove(&name("b")).unwrap());
    assert_eq!(store.image(image.digest).unwrap(), None);
    assert!(files::names_in(&store.dir().join("trash")).unwrap().is_empty());
}

#[test]
fn a_name_that_moves_leaves_the_old_image_to_its_holders() {
    let (dir, store) = store();
    let old = put(&store, "old", 1 << 20, "a");
    store.clone_image(&old, &dir.path().join("m"), None, "pod/1").unwrap();
    let new = put(&store, "new", 1 << 20, "a");
    assert_eq!(store.get(&name("a")).unwrap().unwrap().digest, new.digest);
    assert_eq!(store.holders().unwrap(), [Holder { name: "pod/1".to_owned(), image: old.digest }]);
    // Another process that opens the store respects the pin.
    let store = Store::open(store.dir()).unwrap();
    assert_eq!(store.image(old.digest).unwrap().unwrap().references, []);
    store.release("pod/2").unwrap();
    assert!(store.image(old.digest).unwrap().is_some());
    store.release("pod/1").unwrap();
    assert_eq!(store.image(old.digest).unwrap(), None);
    assert!(store.holders().unwrap().is_empty());
}

#[test]
fn a_clone_grows_and_never_shrinks() {
    let (dir, store) = store();
    let image = put(&store, "one", 1 << 20, "a");
    for (asked, size) in
        [(None, 1 << 20), (Some(512), 1 << 20), (Some(64 << 30), 64 << 30), (Some((2 << 20) + 1), (2 << 20) + 512)]
    {
        let clone = store.clone_image(&image, &dir.path().join("m"), asked, "h").unwrap();
        let disk = &clone.disks[0];
        assert_eq!(disk.size, size);
        let info =
            std::process::Command::new("qemu-img").args(["info", "--output=json"]).arg(&disk.path).output().unwrap();
        let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
        assert_eq!(info["virtual-size"], size);
        let allocated = files::allocated(&disk.path);
        assert!(disk.format == DiskFormat::Raw || allocated < 64 << 10, "{allocated}");
    }
    assert_eq!(files::names_in(&dir.path().join("m")).unwrap().len(), 1, "an earlier attempt's files are replaced");
}

#[test]
fn an_image_that_went_away_cannot_be_cloned() {
    let (dir, store) = store();
    let image = put(&store, "one", 1 << 20, "a");
    store.remove(&name("a")).unwrap();
    let error = store.clone_image(&image, dir.path(), None, "h").unwrap_err();
    assert!(matches!(error, StoreError::NoImage(digest) if digest == image.digest));
    assert!(store.holders().unwrap().is_empty());
}

#[test]
fn opening_removes_what_nobody_works_on() {
    let (_dir, store) = store();
    let digest = Digest::of(b"pull");
    let busy = Work::scratch(&store).unwrap();
    let crashed = Work::scratch(&store).unwrap();
    std::fs::write(crashed.dir().join("disk-0.raw"), "half").unwrap();
    let gone = crashed.dir().to_owned();
    drop(crashed);
    let pull = Work::attempt_pull(&store, digest).unwrap().unwrap();
    let resumable = pull.dir().to_owned();
    drop(pull);
    std::fs::write(store.dir().join("names/.new-x"), "half").unwrap();
    Store::open(store.dir()).unwrap();
    assert!(busy.dir().exists() && resumable.exists() && !gone.exists());
    assert!(!store.dir().join("names/.new-x").exists());
    assert!(work::sweep(&store, std::time::Duration::ZERO).is_ok());
    assert!(busy.dir().exists() && !resumable.exists());
}

#[test]
fn nothing_is_removed_while_a_name_cannot_be_read() {
    let (_dir, store) = store();
    put(&store, "one", 1 << 20, "a");
    put(&store, "two", 1 << 20, "b");
    let broken = store.name_path(&name("a"));
    std::fs::write(&broken, "{").unwrap();
    assert!(matches!(store.remove(&name("b")), Err(StoreError::Json { path, .. }) if path == broken));
    assert_eq!(store.digests().unwrap().len(), 2);
}

#[test]
fn a_newer_store_is_refused() {
    let (_dir, store) = store();
    let image = put(&store, "one", 1 << 20, "a");
    let path = Record::path(&store.image_dir(image.digest));
    let text = std::fs::read_to_string(&path).unwrap().replace("\"version\":1", "\"version\":9");
    std::fs::write(&path, text).unwrap();
    insta::assert_snapshot!(store.get(&name("a")).unwrap_err().to_string().replace(path.to_str().unwrap(), "FILE"));
}
