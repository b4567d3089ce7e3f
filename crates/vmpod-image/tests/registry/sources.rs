//! From where an image comes, and who vouches for it.

use base64::Engine as _;
use vmpod_image::{Mirror, PublicKey, SignaturePolicy};

use super::*;

async fn mirror_of(world: &World) -> (Registry, PullOptions) {
    let mirror = Registry::start().await;
    mirror.copy_from(&world.registry);
    let options = PullOptions {
        mirrors: vec![Mirror { of: world.registry.host().to_owned(), at: mirror.host().to_owned() }],
        ..pull_options()
    };
    (mirror, options)
}

#[tokio::test]
async fn a_mirror_spares_the_origin() {
    let world = World::new().await;
    let image = world.published(1).await;
    let (mirror, options) = mirror_of(&world).await;
    let pulled = pull(&world.there, &world.remote("ci/a:1"), options).await.unwrap();
    assert_eq!(pulled.references, [world.remote("ci/a:1")], "it has the origin's name");
    world.assert_equal(&image);
    assert_eq!((world.registry.blob_requests(), mirror.blob_requests()), (0, 9));
}

#[tokio::test]
async fn what_a_mirror_lacks_or_damaged_comes_from_the_origin() {
    let world = World::new().await;
    let image = world.published(1).await;
    let (mirror, options) = mirror_of(&world).await;
    let damaged = mirror.damage_one_blob();
    pull(&world.there, &world.remote("ci/a:1"), options.clone()).await.unwrap();
    world.assert_equal(&image);
    assert_eq!(world.registry.blobs_asked(), [damaged], "only what was wrong is asked of the origin");

    let image = world.published(2).await;
    pull(&world.there, &world.remote("ci/a:2"), options).await.unwrap();
    world.assert_equal(&image);
}

#[tokio::test]
async fn a_dead_mirror_is_left_alone() {
    let world = World::new().await;
    let file = std::fs::File::create(world.path("disk.raw")).unwrap();
    file.set_len(256 * MIB).unwrap();
    for window in 0..60 {
        file.write_all_at(&noise(window + 1, 10_000), window * 4 * MIB).unwrap();
    }
    let image =
        import(&world.here, Source::Raw(world.path("disk.raw")), &name("a"), ImportOptions::default()).await.unwrap();
    push(&world.here, &name("a"), &world.remote("ci/a:1"), push_options()).await.unwrap();
    let (mirror, options) = mirror_of(&world).await;
    mirror.fail_every(1000, Fault::Status(500));
    pull(&world.there, &world.remote("ci/a:1"), options).await.unwrap();
    world.assert_equal(&image);
    // Those that were under way together with the first failures come on top.
    assert!(mirror.blob_requests() < 30, "{}", mirror.blob_requests());
    assert_eq!(world.registry.blob_requests(), 61);
}

/// A key pair, and a function that signs what cosign would.
struct Signer {
    dir: tempfile::TempDir,
}

impl Signer {
    fn new() -> Self {
        let signer = Self { dir: tempfile::tempdir().unwrap() };
        signer.openssl(&["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "key.pem"]);
        signer.openssl(&["ec", "-in", "key.pem", "-pubout", "-out", "cosign.pub"]);
        signer
    }

    fn openssl(&self, arguments: &[&str]) {
        let output = Command::new("openssl").args(arguments).current_dir(self.dir.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn policy(&self, scope: &str) -> PullOptions {
        let key = PublicKey::read(&self.dir.path().join("cosign.pub")).unwrap();
        PullOptions { signatures: vec![SignaturePolicy { scope: scope.to_owned(), key }], ..pull_options() }
    }

    /// Signs a document about `said` and puts the signature beside `digest`.
    fn sign(&self, registry: &Registry, repository: &str, digest: Digest, said: Digest) {
        let payload = serde_json::json!({"critical": {
            "identity": {"docker-reference": repository},
            "image": {"docker-manifest-digest": said.to_string()},
            "type": "cosign container image signature"}, "optional": null})
        .to_string();
        std::fs::write(self.dir.path().join("payload"), &payload).unwrap();
        self.openssl(&["dgst", "-sha256", "-sign", "key.pem", "-out", "signature", "payload"]);
        let signature = std::fs::read(self.dir.path().join("signature")).unwrap();
        let signature = base64::engine::general_purpose::STANDARD.encode(signature);
        let size = payload.len();
        let layer = registry.put_blob(repository, payload.into_bytes());
        let config = registry.put_blob(repository, b"{}".to_vec());
        let manifest = serde_json::json!({"schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config.to_string(), "size": 2},
            "layers": [{"mediaType": "application/vnd.dev.cosign.simplesigning.v1+json", "digest": layer.to_string(),
                "size": size, "annotations": {"dev.cosignproject.cosign/signature": signature}}]});
        let tag = format!("sha256-{}.sig", digest.hex());
        registry.put_manifest(repository, &tag, serde_json::to_vec(&manifest).unwrap());
    }
}

#[tokio::test]
async fn a_policy_lets_only_signed_images_in() {
    let world = World::new().await;
    let image = world.published(1).await;
    let reference = world.remote("ci/a:1");
    let (ours, theirs) = (Signer::new(), Signer::new());
    let host = world.registry.host().to_owned();

    let refused = async |signer: &Signer| {
        let error = pull(&world.there, &reference, signer.policy(&host)).await.unwrap_err();
        assert!(matches!(error, PullError::Signature { .. }) && !error.is_transient(), "{error:?}");
        assert_eq!(world.there.list().unwrap(), []);
        chain(&error)
    };
    assert!(refused(&ours).await.contains("is not signed"));
    theirs.sign(&world.registry, "ci/a", image.digest, image.digest);
    assert!(refused(&ours).await.contains("none of the 1 signatures"));
    ours.sign(&world.registry, "ci/a", image.digest, Digest::of(b"another image"));
    assert!(refused(&ours).await.contains("none of the 1 signatures"), "a good signature of something else");
    ours.sign(&world.registry, "ci/a", image.digest, image.digest);
    pull(&world.there, &reference, ours.policy(&host)).await.unwrap();
}

#[tokio::test]
async fn a_policy_covers_only_what_it_names() {
    let world = World::new().await;
    world.published(1).await;
    let signer = Signer::new();
    let other = format!("{}/other", world.registry.host());
    pull(&world.there, &world.remote("ci/a:1"), signer.policy(&other)).await.unwrap();
}
