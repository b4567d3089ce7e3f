//! Images as containerDisks.

use std::collections::BTreeMap;

use vmpod_image::{ExportFormat, PushFormat, export, media};

use super::*;

fn as_container_disk() -> PushOptions {
    PushOptions { format: PushFormat::ContainerDisk, ..push_options() }
}

#[tokio::test]
async fn an_image_comes_back_from_its_container_disk() {
    let world = World::new().await;
    disk(&world.path("disk.raw"), 1);
    let options = ImportOptions {
        labels: BTreeMap::from([("team".to_owned(), "ci".to_owned())]),
        guest: vmpod_image::GuestConfig { user: "debian".to_owned(), ..Default::default() },
        ..ImportOptions::default()
    };
    import(&world.here, Source::Raw(world.path("disk.raw")), &name("a"), options).await.unwrap();
    let reference = world.remote("disk:1");
    let digest = push(&world.here, &name("a"), &reference, as_container_disk()).await.unwrap();
    let pulled = pull(&world.there, &reference, pull_options()).await.unwrap();
    assert_eq!((pulled.digest, pulled.format.as_str()), (digest, "containerdisk"));
    let file = world.there.dir().join("images").join(digest.hex()).join("disk-0.raw");
    assert!(std::fs::read(file).unwrap() == std::fs::read(world.path("disk.raw")).unwrap());
    assert_eq!(pulled.config.guest.user, "debian");
    assert_eq!(pulled.config.boot, vmpod_image::Boot::Firmware(vmpod_image::Firmware::Uefi));
    assert_eq!(pulled.config.labels["team"], "ci");

    let uploads = world.registry.uploads();
    assert_eq!(push(&world.here, &name("a"), &reference, as_container_disk()).await.unwrap(), digest);
    assert_eq!(world.registry.uploads(), uploads, "the same image is the same bytes, which the registry has");
    let work = std::fs::read_dir(world.here.dir().join("work")).unwrap().count();
    assert_eq!(work, 0, "the packed layer is gone");
}

#[tokio::test]
async fn a_large_layer_goes_on_where_it_broke() {
    let world = World::new().await;
    let path = world.path("large.raw");
    std::fs::write(&path, noise(9, 60 << 20)).unwrap();
    let image = import(&world.here, Source::Raw(path), &name("a"), ImportOptions::default()).await.unwrap();
    world.registry.fail_writes_every(3, 3);
    let digest = push(&world.here, &name("a"), &world.remote("large"), as_container_disk()).await.unwrap();
    assert_eq!(world.registry.write_faults_left(), 0, "the faults happened");
    assert_eq!(world.registry.patches(), 4, "60 MiB in parts of 16: none is sent twice");
    let pulled = pull(&world.there, &world.remote("large"), pull_options()).await.unwrap();
    assert_eq!((pulled.digest, pulled.config.disks), (digest, image.config.disks));
}

#[tokio::test]
async fn annotations_are_kept_and_change_the_digest() {
    let world = World::new().await;
    let image = world.published(1).await;
    for format in [PushFormat::Native, PushFormat::ContainerDisk] {
        let annotations = BTreeMap::from([(media::OCI_REVISION.to_owned(), "abc123".to_owned())]);
        let options = PushOptions { annotations, format, ..push_options() };
        let digest = push(&world.here, &name("a"), &world.remote("ci/a:noted"), options).await.unwrap();
        assert_ne!(digest, image.digest);
        let manifest: serde_json::Value = serde_json::from_slice(&world.registry.manifest("ci/a", "noted")).unwrap();
        assert_eq!(manifest["annotations"][media::OCI_REVISION], "abc123");
    }
}

#[tokio::test]
async fn what_kubevirt_has_no_form_for_is_refused() {
    let world = World::new().await;
    std::fs::write(world.path("kernel"), b"kernel").unwrap();
    let options = ImportOptions { kernel: Some(world.path("kernel")), ..ImportOptions::default() };
    disk(&world.path("disk.raw"), 1);
    import(&world.here, Source::Raw(world.path("disk.raw")), &name("k"), options).await.unwrap();
    let error = push(&world.here, &name("k"), &world.remote("k"), as_container_disk()).await.unwrap_err();
    assert!(chain(&error).contains("boots a kernel from outside its disk"), "{}", chain(&error));
    assert_eq!(std::fs::read_dir(world.here.dir().join("work")).unwrap().count(), 0);
}

#[tokio::test]
async fn every_form_of_a_disk_holds_the_same() {
    let world = World::new().await;
    disk(&world.path("disk.raw"), 1);
    let image =
        import(&world.here, Source::Raw(world.path("disk.raw")), &name("a"), ImportOptions::default()).await.unwrap();
    for (format, file) in [
        (ExportFormat::Raw, "x.raw"),
        (ExportFormat::Qcow2, "x.qcow2"),
        (ExportFormat::OciLayout, "x.oci"),
        (ExportFormat::ContainerDisk, "x.disk"),
    ] {
        let path = world.path(file);
        export(&world.here, &image, &path, format, &name("a")).await.unwrap();
        let source = Source::detect(&path).unwrap();
        let back = import(&world.there, source, &name("back"), ImportOptions::default()).await.unwrap();
        let disk = world.there.dir().join("images").join(back.digest.hex()).join("disk-0.raw");
        assert!(std::fs::read(disk).unwrap() == std::fs::read(world.path("disk.raw")).unwrap(), "{file}");
        if format == ExportFormat::ContainerDisk {
            assert_eq!(back.format, "containerdisk");
        } else {
            assert_eq!(back.digest, image.digest, "{file}");
        }
    }
    let names: Vec<_> = std::fs::read_dir(world.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!names.iter().any(|name| name.to_string_lossy().starts_with(".vmpod-")), "{names:?}");
}
