//! Pull and push against a scripted registry that misbehaves on demand.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod container_disk;
mod script;
mod sources;

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use script::{Fault, Registry};
use vmpod_image::{
    Credentials, Digest, Image, ImportOptions, Phase, PullError, PullOptions, PushOptions, Reference, Retry, Source,
    Store, import, pull, push,
};

const RETRY: Retry = Retry { attempts: 5, first: Duration::from_millis(5), longest: Duration::from_millis(50) };
const MIB: u64 = 1 << 20;

fn name(text: &str) -> Reference {
    Reference::parse(text).unwrap()
}

fn pull_options() -> PullOptions {
    PullOptions { retry: RETRY, ..PullOptions::default() }
}

fn push_options() -> PushOptions {
    PushOptions { retry: RETRY, ..PushOptions::default() }
}

fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

/// A disk of 64 MiB: nine windows with data, two of them equal, the rest holes.
fn disk(path: &Path, version: u64) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(64 * MIB).unwrap();
    for window in 0..7 {
        let seed = if window == 3 { version } else { 100 + window };
        file.write_all_at(&noise(seed, 700_000), window * 8 * MIB + 12_345).unwrap();
    }
    let same = vec![b'x'; 4 << 20];
    file.write_all_at(&same, 4 * MIB).unwrap();
    file.write_all_at(&same, 60 * MIB).unwrap();
}

struct World {
    dir: tempfile::TempDir,
    registry: Registry,
    here: Store,
    there: Store,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let here = Store::open(&dir.path().join("here")).unwrap();
        let there = Store::open(&dir.path().join("there")).unwrap();
        Self { registry: Registry::start().await, dir, here, there }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn remote(&self, rest: &str) -> Reference {
        name(&format!("{}/{rest}", self.registry.host()))
    }

    /// An image in the first store, and pushed as `ci/a:VERSION`.
    async fn published(&self, version: u64) -> Image {
        let path = self.path("disk.raw");
        disk(&path, version);
        let image = import(&self.here, Source::Raw(path), &name("a"), ImportOptions::default()).await.unwrap();
        let to = self.remote(&format!("ci/a:{version}"));
        let digest = push(&self.here, &name("a"), &to, push_options()).await.unwrap();
        assert_eq!(digest, image.digest);
        image
    }

    fn assert_equal(&self, image: &Image) {
        let path = |store: &Store| store.dir().join("images").join(image.digest.hex()).join("disk-0.raw");
        assert!(std::fs::read(path(&self.here)).unwrap() == std::fs::read(path(&self.there)).unwrap());
    }
}

#[tokio::test]
async fn what_is_pushed_is_pulled_with_its_holes() {
    let world = World::new().await;
    let image = world.published(1).await;
    let reference = world.remote("ci/a:1");
    let (sender, receiver) = tokio::sync::watch::channel(vmpod_image::Progress::default());
    let pulled =
        pull(&world.there, &reference, PullOptions { progress: Some(sender), ..pull_options() }).await.unwrap();
    assert_eq!((pulled.digest, &pulled.config, pulled.format.as_str()), (image.digest, &image.config, "vmpod"));
    assert_eq!(pulled.references, std::slice::from_ref(&reference));
    world.assert_equal(&image);
    assert!(pulled.stored_bytes < 20 * MIB, "{}", pulled.stored_bytes);
    let progress = receiver.borrow().clone();
    assert_eq!((progress.phase, progress.permille()), (Phase::Done, 1000));
    assert_eq!(world.registry.blob_requests(), 9, "eight distinct windows and the configuration");

    pull(&world.there, &reference, pull_options()).await.unwrap();
    assert_eq!(world.registry.blob_requests(), 9, "nothing is fetched again");
}

#[tokio::test]
async fn a_new_version_fetches_only_what_changed() {
    let world = World::new().await;
    world.published(1).await;
    pull(&world.there, &world.remote("ci/a:1"), pull_options()).await.unwrap();
    let uploads = world.registry.uploads();
    let image = world.published(2).await;
    assert_eq!(world.registry.uploads() - uploads, 1, "one window changed; the configuration is the same");
    let before = world.registry.blob_requests();
    pull(&world.there, &world.remote("ci/a:2"), pull_options()).await.unwrap();
    world.assert_equal(&image);
    assert_eq!(world.registry.blob_requests() - before, 2, "one window and the configuration");
}

#[tokio::test]
async fn every_passing_fault_is_survived() {
    for fault in [
        Fault::Status(500),
        Fault::Status(503),
        Fault::TooMany,
        Fault::Truncate(1000),
        Fault::Reset(1000),
        Fault::Wrong,
        Fault::Empty,
    ] {
        let world = World::new().await;
        let image = world.published(1).await;
        // Each blob fails once; then every second request does.
        world.registry.fail_every(2, fault);
        let pulled = pull(&world.there, &world.remote("ci/a:1"), pull_options()).await;
        let pulled = pulled.unwrap_or_else(|error| panic!("{fault:?}: {error:?}"));
        assert_eq!(pulled.digest, image.digest);
        world.assert_equal(&image);
    }
}

#[tokio::test]
async fn a_broken_transfer_goes_on_where_it_broke() {
    let world = World::new().await;
    world.published(1).await;
    world.registry.fail_every(2, Fault::Reset(100_000));
    pull(&world.there, &world.remote("ci/a:1"), pull_options()).await.unwrap();
    let again: Vec<_> = world.registry.ranges().into_iter().filter(|range| range.starts_with("bytes=")).collect();
    assert!(!again.is_empty() && again.iter().all(|range| range.starts_with("bytes=100000-")), "{again:?}");
}

#[tokio::test]
async fn a_wrong_layer_is_named_and_never_shown() {
    let world = World::new().await;
    world.published(1).await;
    let victim = world.registry.damage_one_blob();
    let error = pull(&world.there, &world.remote("ci/a:1"), pull_options()).await.unwrap_err();
    let chain = chain(&error);
    assert!(chain.contains(&format!("sent wrong bytes for layer {victim}")), "{chain}");
    assert_eq!(world.there.list().unwrap(), []);
    assert_eq!(world.there.get(&world.remote("ci/a:1")).unwrap(), None);

    // Once it is mended, the pull goes on with that layer alone.
    world.registry.mend();
    let before = world.registry.blob_requests();
    let image = pull(&world.there, &world.remote("ci/a:1"), pull_options()).await.unwrap();
    world.assert_equal(&image);
    assert!(world.registry.blob_requests() - before <= 9);
}

#[tokio::test]
async fn a_lying_raw_digest_is_found() {
    let world = World::new().await;
    world.published(1).await;
    // The same layers, but a manifest that says that the disk should hold something else.
    let text = String::from_utf8(world.registry.manifest("ci/a", "1")).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value["layers"][0]["annotations"]["dev.vmpod.chunk.raw-digest"] = Digest::of(b"something else").to_string().into();
    world.registry.put_manifest("ci/a", "lie", serde_json::to_vec(&value).unwrap());
    let error = pull(&world.there, &world.remote("ci/a:lie"), pull_options()).await.unwrap_err();
    assert!(chain(&error).contains("is broken: it unpacks to"), "{}", chain(&error));
    assert!(!error.is_transient());
    value["layers"][0]["annotations"]["dev.vmpod.chunk.raw-size"] = "1000".into();
    world.registry.put_manifest("ci/a", "bomb", serde_json::to_vec(&value).unwrap());
    let error = pull(&world.there, &world.remote("ci/a:bomb"), pull_options()).await.unwrap_err();
    assert!(chain(&error).contains("it unpacks to more than the 1000 bytes"), "{}", chain(&error));
    assert_eq!(world.there.list().unwrap(), []);
}

#[tokio::test]
async fn a_registry_without_ranges_and_a_large_file() {
    for (ranges, fault) in
        [(true, None), (true, Some(Fault::Truncate(3 << 20))), (false, None), (false, Some(Fault::Reset(9 << 20)))]
    {
        let world = World::new().await;
        let kernel = world.path("kernel");
        std::fs::write(&kernel, noise(7, 17 << 20)).unwrap();
        let options =
            ImportOptions { kernel: Some(kernel.clone()), cmdline: "quiet".to_owned(), ..ImportOptions::default() };
        import(&world.here, Source::Kernel, &name("k"), options).await.unwrap();
        push(&world.here, &name("k"), &world.remote("k"), push_options()).await.unwrap();
        assert!(world.registry.patches() >= 2, "a large blob goes up in parts");
        world.registry.serve_ranges(ranges);
        if let Some(fault) = fault {
            world.registry.fail_every(3, fault);
        }
        let image = pull(&world.there, &world.remote("k"), pull_options()).await.unwrap();
        let clone = world.there.clone_image(&image, &world.path("m"), None, "h").unwrap();
        let vmpod_image::ClonedBoot::Kernel { kernel: path, initrd: None, cmdline } = clone.boot else { panic!() };
        assert_eq!(cmdline, "quiet");
        assert!(std::fs::read(path).unwrap() == std::fs::read(&kernel).unwrap(), "{ranges} {fault:?}");
        if ranges && fault.is_none() {
            assert_eq!(world.registry.ranges().iter().filter(|range| range.starts_with("bytes=")).count(), 3);
        }
    }
}

#[tokio::test]
async fn two_pulls_of_one_image_are_one() {
    let world = World::new().await;
    let image = world.published(1).await;
    world.registry.delay(Duration::from_millis(30));
    let reference = world.remote("ci/a:1");
    // Another handle on the store is as good as another process: locks belong to open files.
    let other = Store::open(world.there.dir()).unwrap();
    let (a, b, c) = tokio::join!(
        pull(&world.there, &reference, pull_options()),
        pull(&world.there, &reference, pull_options()),
        pull(&other, &reference, pull_options()),
    );
    for pulled in [a, b, c] {
        assert_eq!(pulled.unwrap().digest, image.digest);
    }
    assert_eq!(world.registry.blob_requests(), 8 + 3, "each window once; each pull reads the configuration");
    assert_eq!(std::fs::read_dir(world.there.dir().join("work")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_dropped_pull_leaves_what_it_has() {
    let world = World::new().await;
    let image = world.published(1).await;
    world.registry.delay(Duration::from_millis(40));
    let reference = world.remote("ci/a:1");
    let cut = tokio::time::timeout(Duration::from_millis(30), pull(&world.there, &reference, pull_options())).await;
    assert!(cut.is_err());
    assert_eq!(world.there.list().unwrap(), []);
    world.registry.delay(Duration::ZERO);
    pull(&world.there, &reference, pull_options()).await.unwrap();
    world.assert_equal(&image);
}

#[tokio::test]
async fn errors_say_what_is_wrong() {
    let world = World::new().await;
    let error = pull(&world.there, &name("tiny"), pull_options()).await.unwrap_err();
    assert!(matches!(error, PullError::Local(_)) && !error.is_transient());
    let reference = world.remote("no/such:1");
    let error = pull(&world.there, &reference, pull_options()).await.unwrap_err();
    assert_eq!(error.to_string(), format!("registry {} has no image {reference}", world.registry.host()));
    let closed = name("127.0.0.1:1/a");
    let error = pull(&world.there, &closed, pull_options()).await.unwrap_err();
    assert!(
        error.is_transient() && chain(&error).contains("registry 127.0.0.1:1 can't be reached"),
        "{}",
        chain(&error)
    );
    let wrong = world.remote(&format!("ci/a@{}", Digest::of(b"other")));
    world.published(1).await;
    let error = pull(&world.there, &wrong, pull_options()).await.unwrap_err();
    assert!(matches!(error, PullError::NotFound { .. }), "{error:?}");
    let bytes = world.registry.manifest("ci/a", "1");
    world.registry.put_manifest_as("ci/a", &Digest::of(b"other").to_string(), bytes);
    let error = pull(&world.there, &wrong, pull_options()).await.unwrap_err();
    assert!(chain(&error).contains("sent wrong bytes for manifest"), "{}", chain(&error));
    world.registry.put_manifest("ci/a", "text", b"hello".to_vec());
    let error = pull(&world.there, &world.remote("ci/a:text"), pull_options()).await.unwrap_err();
    assert!(matches!(error, PullError::Manifest { .. }), "{error:?}");
}

#[tokio::test]
async fn an_index_is_followed_to_this_platform() {
    let world = World::new().await;
    let image = world.published(1).await;
    let size = world.registry.manifest("ci/a", "1").len();
    let entry = |digest: String, architecture: &str| {
        serde_json::json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": size,
            "platform": {"os": "linux", "architecture": architecture}})
    };
    let host = vmpod_image::Architecture::host().as_str();
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [
        entry(Digest::of(b"x").to_string(), "s390x"), entry(image.digest.to_string(), host)]});
    world.registry.put_manifest("ci/a", "index", serde_json::to_vec(&index).unwrap());
    assert_eq!(pull(&world.there, &world.remote("ci/a:index"), pull_options()).await.unwrap().digest, image.digest);
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [entry(image.digest.to_string(), "s390x"), entry(image.digest.to_string(), "mips")]});
    world.registry.put_manifest("ci/a", "other", serde_json::to_vec(&index).unwrap());
    let error = pull(&world.there, &world.remote("ci/a:other"), pull_options()).await.unwrap_err();
    assert!(
        error.to_string().ends_with(&format!("has no image for linux/{host}, only for linux/s390x, linux/mips")),
        "{error}"
    );
}

#[tokio::test]
async fn registries_with_tokens_and_passwords() {
    for bearer in [true, false] {
        let world = World::new().await;
        world.published(1).await;
        world.registry.require(bearer, "user", "pass:word");
        let reference = world.remote("ci/a:1");
        let error = pull(&world.there, &reference, pull_options()).await.unwrap_err();
        assert!(matches!(error, PullError::Denied { .. }) && !error.is_transient(), "{error:?}");
        let config = |password: &str| {
            let text =
                serde_json::json!({"auths": {world.registry.host(): {"username": "user", "password": password}}});
            Credentials::default().with_docker_config(text.to_string())
        };
        let with = |password| PullOptions { credentials: config(password), ..pull_options() };
        let error = pull(&world.there, &reference, with("wrong")).await.unwrap_err();
        assert!(matches!(error, PullError::Denied { .. }), "{error:?}");
        assert!(!format!("{error:?} {}", chain(&error)).contains("wrong\""), "no password is shown");
        // Tokens end in the middle of a pull.
        world.registry.expire_tokens_after(6);
        pull(&world.there, &reference, with("pass:word")).await.unwrap();
        let to = world.remote("ci/b:1");
        push(&world.there, &reference, &to, PushOptions { credentials: config("pass:word"), ..push_options() })
            .await
            .unwrap();
    }
}

/// Options with a docker configuration's entry for the world's registry.
fn login(world: &World, entry: &serde_json::Value) -> PullOptions {
    let text = serde_json::json!({"auths": {world.registry.host(): entry}});
    PullOptions { credentials: Credentials::default().with_docker_config(text.to_string()), ..pull_options() }
}

#[tokio::test]
async fn a_registry_that_takes_no_token_is_left_alone() {
    let world = World::new().await;
    world.published(1).await;
    world.registry.require(true, "user", "secret");
    // Each token is new, and none is ever good.
    world.registry.expire_tokens_after(0);
    let options = login(&world, &serde_json::json!({"username": "user", "password": "secret"}));
    let reference = world.remote("ci/a:1");
    let pulled = tokio::time::timeout(Duration::from_secs(20), pull(&world.there, &reference, options)).await;
    let error = pulled.expect("it ends").unwrap_err();
    assert!(matches!(error, PullError::Denied { .. }), "{error:?}");
    assert_eq!(world.registry.tokens(), 2);
}

#[tokio::test]
async fn credentials_go_where_they_belong() {
    let world = World::new().await;
    world.published(1).await;
    let elsewhere = Registry::start().await;
    elsewhere.require(true, "user", "secret");
    let basic = login(&world, &serde_json::json!({"username": "user", "password": "secret"}));
    let reference = world.remote("ci/a:1");
    world.registry.redirect("/blobs/", elsewhere.host());
    let error = pull(&world.there, &reference, basic.clone()).await.unwrap_err();
    assert!(matches!(error, PullError::Denied { .. }), "{error:?}");
    assert_eq!(elsewhere.told(), Vec::<String>::new(), "a redirect's target gets nothing");

    world.registry.require(true, "user", "secret");
    world.registry.redirect("/token", elsewhere.host());
    let identity = login(&world, &serde_json::json!({"identitytoken": "secret"}));
    for options in [basic, identity] {
        let error = pull(&world.there, &reference, options).await.unwrap_err();
        assert!(chain(&error).contains("answered 307"), "{}", chain(&error));
    }
    assert_eq!(elsewhere.told(), Vec::<String>::new(), "nor does a token server's redirect");
}

#[tokio::test]
async fn a_push_mounts_what_the_registry_has_elsewhere() {
    let world = World::new().await;
    let image = world.published(1).await;
    pull(&world.there, &world.remote("ci/a:1"), pull_options()).await.unwrap();
    let uploads = world.registry.uploads();
    let digest = push(&world.there, &world.remote("ci/a:1"), &world.remote("other/b:1"), push_options()).await.unwrap();
    assert_eq!(digest, image.digest);
    assert_eq!(
        (world.registry.uploads() - uploads, world.registry.mounts()),
        (1, 8),
        "the configuration is sent, the windows mounted"
    );
}

#[tokio::test]
async fn a_push_survives_faults() {
    let world = World::new().await;
    disk(&world.path("disk.raw"), 1);
    import(&world.here, Source::Raw(world.path("disk.raw")), &name("a"), ImportOptions::default()).await.unwrap();
    // One fewer than the attempts: even a layer that gets all of them comes through.
    world.registry.fail_writes_every(3, 4);
    let digest = push(&world.here, &name("a"), &world.remote("a"), push_options()).await.unwrap();
    assert_eq!(world.registry.write_faults_left(), 0, "the faults happened");
    assert_eq!(pull(&world.there, &world.remote("a"), pull_options()).await.unwrap().digest, digest);
}

/// What the child of the next test does.
#[tokio::test]
async fn child_pull() {
    let (Some(dir), Some(reference)) = (std::env::var_os("VMPOD_TEST_STORE"), std::env::var_os("VMPOD_TEST_IMAGE"))
    else {
        return;
    };
    let store = Store::open(Path::new(&dir)).unwrap();
    pull(&store, &name(reference.to_str().unwrap()), pull_options()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_pull_goes_on_where_it_was() {
    const KILLS: usize = 8;
    let world = World::new().await;
    let path = world.path("disk.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(256 * MIB).unwrap();
    for window in 0..60 {
        file.write_all_at(&noise(window + 1, 100_000), window * 4 * MIB).unwrap();
    }
    let image = import(&world.here, Source::Raw(path), &name("a"), ImportOptions::default()).await.unwrap();
    let reference = world.remote("big:1");
    push(&world.here, &name("a"), &reference, push_options()).await.unwrap();
    world.registry.delay(Duration::from_millis(40));
    let spawn = || {
        Command::new(std::env::current_exe().unwrap())
            .args(["child_pull", "--exact"])
            .env("VMPOD_TEST_STORE", world.there.dir())
            .env("VMPOD_TEST_IMAGE", reference.to_string())
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut finished = 0;
    for kill in 0..KILLS {
        let before = world.registry.blob_requests();
        let mut child = spawn();
        // Killed after a few windows, each time at another moment.
        let enough = 3 + kill % 7;
        while world.registry.blob_requests() < before + enough && child.try_wait().unwrap().is_none() {
            tokio::time::sleep(Duration::from_millis(1 + kill as u64)).await;
        }
        child.kill().unwrap();
        finished += usize::from(child.wait().unwrap().success());
        if finished == 0 {
            assert_eq!(
                Store::open(world.there.dir()).unwrap().list().unwrap(),
                [],
                "nothing is visible before it is whole"
            );
        }
    }
    world.registry.delay(Duration::ZERO);
    assert!(spawn().wait().unwrap().success());
    let found = world.there.get(&reference).unwrap().unwrap();
    assert_eq!(found.digest, image.digest);
    world.assert_equal(&image);
    let windows: BTreeSet<_> = world.registry.blobs_asked().into_iter().collect();
    assert_eq!(windows.len(), 61);
    // What was under way at a kill is fetched again: at most 16 at a time; and each start reads the configuration.
    let requests = world.registry.blob_requests();
    assert!(requests <= 60 + KILLS * 16 + KILLS + 1, "{requests}");
    assert!(finished == 0, "the kills came too late to mean anything");
}

#[test]
fn every_future_can_be_sent() {
    fn sendable(_: &(impl Send + 'static)) {}
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    sendable(&async move {
        let (a, b) = (name("a"), name("b"));
        drop(pull(&store, &a, pull_options()).await);
        drop(push(&store, &a, &b, push_options()).await);
        drop(import(&store, Source::Kernel, &a, ImportOptions::default()).await);
        let image = store.get(&a).unwrap().unwrap();
        drop(vmpod_image::export_oci_layout(&store, &image, Path::new("/"), &a).await);
        drop(Credentials::default().resolve("h", "r").await);
    });
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
