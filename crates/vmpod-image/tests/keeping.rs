//! Verifying, pruning, converting and exporting what the store has.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::Permissions;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use vmpod_image::{
    ExportError, ExportFormat, Image, ImportError, ImportOptions, Prune, Reference, Source, Store, convert, export,
    export_oci_layout, import,
};

const MIB: u64 = 1 << 20;

fn name(text: &str) -> Reference {
    Reference::parse(text).unwrap()
}

fn file(store: &Store, image: &Image, file: &str) -> PathBuf {
    store.dir().join("images").join(image.digest.hex()).join(file)
}

/// A disk of 20 MiB with data in its first and fourth window, and a kernel.
async fn guest(store: &Store, dir: &Path, byte: u8, reference: &str) -> Image {
    let (disk, kernel) = (dir.join("disk.raw"), dir.join("kernel"));
    let raw = std::fs::File::create(&disk).unwrap();
    raw.set_len(20 * MIB).unwrap();
    raw.write_all_at(&[byte; 8192], 4096).unwrap();
    raw.write_all_at(&[byte; 8192], 13 * MIB).unwrap();
    std::fs::write(&kernel, vec![byte; 10_000]).unwrap();
    let options = ImportOptions { kernel: Some(kernel), ..ImportOptions::default() };
    import(store, Source::Raw(disk), &name(reference), options).await.unwrap()
}

fn scribble(path: &Path, offset: u64) {
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    std::fs::File::options().write(true).open(path).unwrap().write_all_at(b"!", offset).unwrap();
}

#[tokio::test]
async fn damage_is_found_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("images")).unwrap();
    let image = guest(&store, dir.path(), 7, "a").await;
    assert_eq!(store.verify(&image).unwrap(), []);
    scribble(&file(&store, &image, "disk-0.raw"), 13 * MIB + 5);
    scribble(&file(&store, &image, "disk-0.raw"), 6 * MIB);
    scribble(&file(&store, &image, "kernel"), 9000);
    let found: Vec<_> = store.verify(&image).unwrap().iter().map(ToString::to_string).collect();
    assert_eq!(
        found,
        ["disk-0.raw: 8388608 bytes at 4194304", "disk-0.raw: 4194304 bytes at 12582912", "kernel: 10000 bytes at 0"]
    );
    // What is damaged is neither cloned, exported nor pushed.
    let error = store.clone_image(&image, &dir.path().join("m"), None, "h").unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "image {} is corrupt: disk-0.raw: 8388608 bytes at 4194304 aren't what was verified; remove the image and get it again",
            image.digest
        )
    );
    let error = export_oci_layout(&store, &image, &dir.path().join("out.oci"), &name("a")).await.unwrap_err();
    assert!(matches!(&error, ExportError::Pack { .. }) && format!("{error:?}").contains("Damaged"), "{error:?}");
}

#[tokio::test]
async fn a_file_that_was_replaced_is_verified_before_it_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("images")).unwrap();
    let image = guest(&store, dir.path(), 7, "a").await;
    let kernel = file(&store, &image, "kernel");
    let mut bytes = std::fs::read(&kernel).unwrap();
    let replace = |bytes: &[u8]| {
        std::fs::write(dir.path().join("new"), bytes).unwrap();
        std::fs::rename(dir.path().join("new"), &kernel).unwrap();
        store.clone_image(&image, &dir.path().join("m"), None, "h")
    };
    replace(&bytes).unwrap();
    bytes[5] ^= 1;
    let error = replace(&bytes).unwrap_err();
    assert!(error.to_string().contains(" is corrupt: kernel: 10000 bytes at 0"), "{error}");
    store.release("h").unwrap();
    replace(&bytes).unwrap_err();
    assert_eq!(store.holders().unwrap(), [], "what wasn't cloned isn't held");
    bytes[5] ^= 1;
    replace(&bytes).unwrap();
}

#[tokio::test]
async fn pruning_keeps_what_is_used_or_cannot_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("images")).unwrap();
    let local = guest(&store, dir.path(), 1, "local").await;
    let used = guest(&store, dir.path(), 2, "h.example/used:1").await;
    let idle = guest(&store, dir.path(), 3, "h.example/idle:1").await;
    store.tag(idle.digest, &name("h.example/idle:2")).unwrap();
    store.clone_image(&used, &dir.path().join("m"), None, "pod").unwrap();
    let before = store.used_bytes().unwrap();
    assert_eq!(store.prune(Prune { unfinished: true, down_to: Some(before), ..Prune::default() }).unwrap().images, []);
    let pruned = store.prune(Prune { unused: true, ..Prune::default() }).unwrap();
    assert_eq!((pruned.images, pruned.bytes), (vec![idle.digest], idle.stored_bytes));
    assert_eq!(store.used_bytes().unwrap(), before - idle.stored_bytes);
    let mut left: Vec<_> = store.list().unwrap().iter().map(|image| image.digest).collect();
    left.sort();
    let mut expected = [local.digest, used.digest];
    expected.sort();
    assert_eq!(left, expected);
}

#[tokio::test]
async fn a_foreign_image_becomes_a_native_one_that_shares_its_disk() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("images")).unwrap();
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/lume.oci");
    let lume = import(&store, Source::OciLayout(sample), &name("lume"), ImportOptions::default()).await.unwrap();
    let native = convert(&store, &lume, &name("native")).await.unwrap();
    assert_eq!((native.format.as_str(), &native.config), ("vmpod", &lume.config));
    assert_ne!(native.digest, lume.digest);
    let inode = |image: &Image| std::fs::metadata(file(&store, image, "disk-0.raw")).unwrap().ino();
    assert_eq!(inode(&native), inode(&lume));
    assert_eq!(store.verify(&native).unwrap(), []);

    let disk = std::fs::read(file(&store, &lume, "disk-0.raw")).unwrap();
    let raw = dir.path().join("out.raw");
    export(&store, &native, &raw, ExportFormat::Raw, &name("x")).await.unwrap();
    assert!(std::fs::read(&raw).unwrap() == disk);
    assert!(std::fs::metadata(&raw).unwrap().blocks() * 512 < 400_000);

    // The other image may go: what is shared stays.
    store.remove(&name("lume")).unwrap();
    let layout = dir.path().join("out.oci");
    export_oci_layout(&store, &native, &layout, &name("native:v1")).await.unwrap();
    let other = Store::open(&dir.path().join("other")).unwrap();
    let back = import(&other, Source::OciLayout(layout), &name("back:v1"), ImportOptions::default()).await.unwrap();
    assert_eq!((back.digest, &back.config), (native.digest, &native.config));
    assert!(std::fs::read(file(&other, &back, "disk-0.raw")).unwrap() == disk);
    assert!(other.clone_image(&back, &dir.path().join("m"), None, "h").unwrap().nvram.is_some());
}

#[tokio::test]
async fn damage_gets_no_new_digest() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("images")).unwrap();
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/lume.oci");
    let lume = import(&store, Source::OciLayout(sample), &name("lume"), ImportOptions::default()).await.unwrap();
    let disk = file(&store, &lume, "disk-0.raw");
    let bytes = std::fs::read(&disk).unwrap();
    let data = bytes.iter().position(|byte| *byte != 0 && *byte != b'!').unwrap();
    scribble(&disk, data as u64);
    let exported = export_oci_layout(&store, &lume, &dir.path().join("out.oci"), &name("a")).await;
    let converted = convert(&store, &lume, &name("native")).await.unwrap_err();
    for error in [format!("{:?}", exported.unwrap_err()), format!("{converted:?}")] {
        assert!(error.contains("Corrupt"), "{error:?}");
    }
}

#[tokio::test]
async fn a_damaged_layer_in_a_layout_is_written_anew() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("images")).unwrap();
    let image = guest(&store, dir.path(), 7, "a").await;
    let layout = dir.path().join("out.oci");
    export_oci_layout(&store, &image, &layout, &name("a")).await.unwrap();
    for blob in std::fs::read_dir(layout.join("blobs/sha256")).unwrap() {
        scribble(&blob.unwrap().path(), 8);
    }
    export_oci_layout(&store, &image, &layout, &name("a")).await.unwrap();
    let other = Store::open(&dir.path().join("other")).unwrap();
    let back = import(&other, Source::OciLayout(layout), &name("b"), ImportOptions::default()).await.unwrap();
    assert_eq!(back.digest, image.digest);
}

#[tokio::test]
async fn a_tar_archive_is_no_disk() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = vec![0; 1024];
    bytes[257..262].copy_from_slice(b"ustar");
    let path = dir.path().join("image.tar");
    std::fs::write(&path, bytes).unwrap();
    assert!(Source::detect(&path).unwrap_err().to_string().ends_with("import the disk or the OCI layout in it"));
    assert!(matches!(Source::detect(dir.path()), Err(ImportError::NoLayout(_))));
    assert!(Source::detect(&dir.path().join("nothing")).unwrap_err().to_string().starts_with("couldn't read"));
}
