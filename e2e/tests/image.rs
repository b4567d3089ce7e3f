//! Images and a real registry: Debian's docker-registry on a loopback port, with skopeo as the other client.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::prerequisites::program;
use e2e::registry::{PASSWORD, Registry, USER};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use vmpod_image::{
    Credentials, ImportOptions, PullError, PullOptions, PushOptions, Reference, Source, Store, export_oci_layout,
    import, pull, push,
};

const PATIENCE: Duration = Duration::from_mins(1);
const MIB: u64 = 1 << 20;
/// What these tests ask of a registry beside its address.
trait Ask {
    fn image(&self, rest: &str) -> Result<Reference>;
    fn store(&self, name: &str) -> Result<Store>;
    fn stored(&self) -> Result<u64>;
}

impl Ask for Registry {
    fn image(&self, rest: &str) -> Result<Reference> {
        Ok(Reference::parse(&format!("{}/{rest}", self.host))?)
    }

    fn store(&self, name: &str) -> Result<Store> {
        Ok(Store::open(&self.path(name))?)
    }

    /// The bytes that the registry keeps.
    fn stored(&self) -> Result<u64> {
        fn size(dir: &Path) -> Result<u64> {
            let mut sum = 0;
            for entry in std::fs::read_dir(dir)? {
                let entry = entry?;
                sum += if entry.file_type()?.is_dir() { size(&entry.path())? } else { entry.metadata()?.len() };
            }
            Ok(sum)
        }
        size(&self.path("data"))
    }
}

/// A disk of 96 MiB, most of it holes; `version` changes 1 MiB of it.
fn disk(path: &Path, version: u8) -> Result<()> {
    let file = std::fs::File::create(path)?;
    file.set_len(96 * MIB)?;
    let mut state = 1u32;
    for window in 0..10 {
        let part: Vec<u8> = (0..MIB)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state.to_be_bytes()[0]
            })
            .collect();
        file.write_all_at(&part, window * 9 * MIB)?;
    }
    file.write_all_at(&vec![version; 1 << 20], 30 * MIB)?;
    Ok(())
}

fn disk_of(store: &Store, image: &vmpod_image::Image) -> Result<Vec<u8>> {
    Ok(std::fs::read(store.dir().join("images").join(image.digest.hex()).join("disk-0.raw"))?)
}

async fn skopeo(arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(program("skopeo", "skopeo")?);
    command.arg("--insecure-policy").args(arguments);
    e2e::run(command, None, PATIENCE).await?.ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pushed_comes_back_and_versions_share_windows() -> Result<()> {
    let registry = Registry::start(false).await?;
    let (here, there) = (registry.store("here")?, registry.store("there")?);
    let local = Reference::parse("guest")?;
    let mut sizes = Vec::new();
    for version in [1, 2] {
        disk(&registry.path("disk.raw"), version)?;
        let image = import(&here, Source::Raw(registry.path("disk.raw")), &local, ImportOptions::default()).await?;
        let remote = registry.image(&format!("ci/guest:{version}"))?;
        ensure!(push(&here, &local, &remote, PushOptions::default()).await? == image.digest);
        let pulled = pull(&there, &remote, PullOptions::default()).await?;
        ensure!(pulled.digest == image.digest && disk_of(&here, &image)? == disk_of(&there, &pulled)?);
        ensure!(pulled.stored_bytes < 16 * MIB, "holes stay holes: {} bytes", pulled.stored_bytes);
        sizes.push(registry.stored()?);
    }
    ensure!(sizes[1] - sizes[0] < MIB, "the second version costs one window: {sizes:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_and_passwords() -> Result<()> {
    let registry = Registry::start(true).await?;
    let (here, there) = (registry.store("here")?, registry.store("there")?);
    disk(&registry.path("disk.raw"), 1)?;
    let local = Reference::parse("guest")?;
    import(&here, Source::Raw(registry.path("disk.raw")), &local, ImportOptions::default()).await?;
    let remote = registry.image("ci/guest:1")?;

    let config = |password: &str| {
        let auths = serde_json::json!({"auths": {registry.host.clone(): {"username": USER, "password": password}}});
        Credentials::default().with_docker_config(auths.to_string())
    };
    let ca_files = vec![registry.path("ca.pem")];
    let options = |credentials| PullOptions { credentials, ca_files: ca_files.clone(), ..PullOptions::default() };
    let once = vmpod_image::Retry { attempts: 1, ..vmpod_image::Retry::default() };

    let unknown = PullOptions { credentials: config(PASSWORD), retry: once, ..PullOptions::default() };
    let error = pull(&there, &remote, unknown).await.err().context("an unknown authority must not be trusted")?;
    ensure!(format!("{error:?}").contains("UnknownIssuer"), "{error:?}");
    for credentials in [Credentials::default(), config("wrong")] {
        let error = pull(&there, &remote, options(credentials)).await.err().context("nobody gets in without")?;
        ensure!(matches!(error, PullError::Denied { .. }), "{error:?}");
    }
    let to = PushOptions { credentials: config(PASSWORD), ca_files: ca_files.clone(), ..PushOptions::default() };
    let digest = push(&here, &local, &remote, to).await?;
    ensure!(pull(&there, &remote, options(config(PASSWORD))).await?.digest == digest);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn skopeo_reads_what_we_write_and_we_read_what_it_writes() -> Result<()> {
    let registry = Registry::start(false).await?;
    let (here, there) = (registry.store("here")?, registry.store("there")?);
    disk(&registry.path("disk.raw"), 1)?;
    std::fs::write(registry.path("kernel"), vec![3; 5 << 20])?;
    let local = Reference::parse("guest:v1")?;
    let options = ImportOptions { kernel: Some(registry.path("kernel")), ..ImportOptions::default() };
    let image = import(&here, Source::Raw(registry.path("disk.raw")), &local, options).await?;
    push(&here, &local, &registry.image("ci/guest:v1")?, PushOptions::default()).await?;

    let remote = format!("docker://{}/ci/guest:v1", registry.host);
    let layout = registry.path("skopeo.oci");
    skopeo(&["copy", "--src-tls-verify=false", &remote, &format!("oci:{}:v1", layout.display())]).await?;
    let imported = import(&there, Source::OciLayout(layout), &local, ImportOptions::default()).await?;
    ensure!(imported.digest == image.digest && disk_of(&there, &imported)? == disk_of(&here, &image)?);

    let ours = registry.path("ours.oci");
    export_oci_layout(&there, &imported, &ours, &local).await?;
    let copy = format!("docker://{}/ci/copy:v1", registry.host);
    skopeo(&["copy", "--dest-tls-verify=false", &format!("oci:{}:v1", ours.display()), &copy]).await?;
    let pulled = pull(&there, &registry.image("ci/copy:v1")?, PullOptions::default()).await?;
    ensure!(pulled.digest == image.digest && pulled.references.len() == 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_blob_in_the_registry_is_named_and_never_shown() -> Result<()> {
    let registry = Registry::start(false).await?;
    let (here, there) = (registry.store("here")?, registry.store("there")?);
    disk(&registry.path("disk.raw"), 1)?;
    let local = Reference::parse("guest")?;
    import(&here, Source::Raw(registry.path("disk.raw")), &local, ImportOptions::default()).await?;
    let remote = registry.image("ci/guest:1")?;
    push(&here, &local, &remote, PushOptions::default()).await?;
    let layout = registry.path("x.oci");
    let image = here.get(&local)?.context("just imported")?;
    export_oci_layout(&here, &image, &layout, &local).await?;
    let blob = std::fs::read_dir(layout.join("blobs/sha256"))?
        .filter_map(|entry| {
            Some((entry.as_ref().ok()?.metadata().ok()?.len(), entry.ok()?.file_name().into_string().ok()?))
        })
        .max()
        .context("the layout has blobs")?
        .1;
    let path = registry.path("data/docker/registry/v2/blobs/sha256").join(&blob[..2]).join(&blob).join("data");
    let mut bytes = std::fs::read(&path)?;
    bytes[4321] ^= 1;
    std::fs::write(&path, bytes)?;
    let error = pull(&there, &remote, PullOptions::default()).await.err().context("wrong bytes must not pass")?;
    ensure!(format!("{error:?}").contains(&blob), "{error:?}");
    ensure!(there.list()?.is_empty());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_disk_goes_by_skopeo_and_is_what_qemu_reads() -> Result<()> {
    let registry = Registry::start(false).await?;
    let (here, there) = (registry.store("here")?, registry.store("there")?);
    disk(&registry.path("disk.raw"), 1)?;
    let local = Reference::parse("guest:v1")?;
    import(&here, Source::Raw(registry.path("disk.raw")), &local, ImportOptions::default()).await?;
    let options = PushOptions { format: vmpod_image::PushFormat::ContainerDisk, ..PushOptions::default() };
    push(&here, &local, &registry.image("ci/disk:v1")?, options).await?;
    // Another client unpacks the layer and reads the disk in it.
    let dir = registry.path("skopeo.dir");
    let remote = format!("docker://{}/ci/disk:v1", registry.host);
    skopeo(&["copy", "--src-tls-verify=false", &remote, &format!("dir:{}", dir.display())]).await?;
    let script = "set -e; for f in *; do tar -xzf \"$f\" 2>/dev/null && break; done; \
        qemu-img check -q disk/disk.qcow2; qemu-img compare -q -f qcow2 -F raw disk/disk.qcow2 ../disk.raw";
    let mut command = Command::new("sh");
    command.args(["-c", script]).current_dir(&dir);
    e2e::run(command, None, PATIENCE).await?.ok()?;
    // And its copy, in whatever form that client gives it, is read here.
    let copy = format!("docker://{}/ci/copy:v1", registry.host);
    skopeo(&["copy", "--src-tls-verify=false", "--dest-tls-verify=false", "--format=v2s2", &remote, &copy]).await?;
    let pulled = pull(&there, &registry.image("ci/copy:v1")?, PullOptions::default()).await?;
    ensure!(pulled.format == "containerdisk");
    let wanted = std::fs::read(registry.path("disk.raw"))?;
    ensure!(disk_of(&there, &pulled)? == wanted, "the copy has another disk");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn oras_reads_the_manifest_and_every_layer_of_what_we_push() -> Result<()> {
    let registry = Registry::start(false).await?;
    let here = registry.store("here")?;
    disk(&registry.path("disk.raw"), 1)?;
    let local = Reference::parse("guest")?;
    import(&here, Source::Raw(registry.path("disk.raw")), &local, ImportOptions::default()).await?;
    push(&here, &local, &registry.image("ci/guest:1")?, PushOptions::default()).await?;
    let python = e2e::prerequisites::repository().join("target/tools/python");
    ensure!(python.join("oras").is_dir(), "oras is missing: run `scripts/prerequisites e2e`");
    let script = "import sys, hashlib, oras.client\nname, out = sys.argv[1:]\n\
        client = oras.client.OrasClient(insecure=True)\nmanifest = client.get_manifest(name)\n\
        assert manifest['artifactType'] == 'application/vnd.vmpod.image.v1', manifest\n\
        for layer in manifest['layers']:\n    client.download_blob(name, layer['digest'], out)\n    \
        assert 'sha256:' + hashlib.sha256(open(out, 'rb').read()).hexdigest() == layer['digest']\n\
        print(len(manifest['layers']))\n";
    let mut command = Command::new("python3");
    let (name, out) = (format!("{}/ci/guest:1", registry.host), registry.path("blob"));
    command.env("PYTHONPATH", python).args(["-c", script, &name]).arg(out);
    let layers = e2e::run(command, None, PATIENCE).await?.ok()?;
    ensure!(layers.trim().parse::<usize>()? > 5, "{layers}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_fetches_what_it_was_told_to_have() -> Result<()> {
    let registry = Registry::start(false).await?;
    let here = registry.store("here")?;
    disk(&registry.path("disk.raw"), 1)?;
    let local = Reference::parse("guest")?;
    import(&here, Source::Raw(registry.path("disk.raw")), &local, ImportOptions::default()).await?;
    let remote = registry.image("ci/guest:1")?;
    push(&here, &local, &remote, PushOptions::default()).await?;
    let home = e2e::Home::new("prefetch")?;
    let name = remote.to_string();
    let up = home.up(&["--prefetch", &name]).await?;
    e2e::eventually("the image is there", || async { home.vmpod(&["image", "inspect", &name]).await?.ok().map(drop) })
        .await?;
    up.stop().await
}

/// By an object of the API, with a Secret that nodes may read: for the nodes that it names, until it can be done.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_fetch_what_an_object_asks_for() -> Result<()> {
    let registry = Registry::start(true).await?;
    let here = registry.store("here")?;
    disk(&registry.path("disk.raw"), 1)?;
    let local = Reference::parse("guest")?;
    import(&here, Source::Raw(registry.path("disk.raw")), &local, ImportOptions::default()).await?;
    let (first, late) = (registry.image("ci/guest:1")?, registry.image("ci/guest:2")?);
    let config = registry.path("config.json");
    let pair = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, format!("{USER}:{PASSWORD}"));
    std::fs::write(&config, serde_json::json!({"auths": {&registry.host: {"auth": pair}}}).to_string())?;
    let credentials = Credentials::default().with_file(config);
    let options = || PushOptions {
        credentials: credentials.clone(),
        ca_files: vec![registry.path("ca.pem")],
        ..PushOptions::default()
    };
    push(&here, &local, &first, options()).await?;
    let home = e2e::Home::new("prefetch-objects")?;
    let ca = registry.path("ca.pem").to_string_lossy().into_owned();
    let up = home.up(&["--fleet-poll", "1s", "--registry-ca", &ca, "--node-label", "site=bkk"]).await?;
    e2e::eventually("the kind is there", || async { up.kubectl_ok(&["get", "imageprefetches"]).await.map(drop) })
        .await?;
    let server = format!("--docker-server={}", registry.host);
    let (user, password) = (format!("--docker-username={USER}"), format!("--docker-password={PASSWORD}"));
    up.kubectl_ok(&["create", "secret", "docker-registry", "pull", &server, &user, &password]).await?;
    // Which Secrets nodes may read is for whoever keeps the cluster to say.
    up.kubectl_ok(&["create", "role", "pull", "--verb=get", "--resource=secrets", "--resource-name=pull"]).await?;
    up.kubectl_ok(&["create", "rolebinding", "pull", "--role=pull", "--group=system:nodes"]).await?;
    let object = |name: &str, site: &str, images: &[&Reference]| {
        let images: Vec<String> = images.iter().map(ToString::to_string).collect();
        serde_json::json!({"apiVersion": "vmpod.dev/v1alpha1", "kind": "ImagePrefetch", "metadata": {"name": name, "namespace": "default"},
            "spec": {"images": images, "nodeSelector": {"site": site}, "imagePullSecrets": [{"name": "pull"}]}})
    };
    up.apply(&object("here", "bkk", &[&first, &late])).await?;
    up.apply(&object("elsewhere", "gcp", &[&first])).await?;
    let status = async |name: &str| -> Result<serde_json::Value> {
        let text = up.kubectl_ok(&["get", "imageprefetch", name, "-o", "json"]).await?;
        Ok(serde_json::from_str::<serde_json::Value>(&text)?["status"]["nodes"].clone())
    };
    let node = up.kubectl_ok(&["get", "nodes", "-o", "jsonpath={.items[0].metadata.name}"]).await?;
    e2e::eventually("one is there, and what is wrong with the other is told", || async {
        let told = status("here").await?[&node].clone();
        ensure!(told["phase"] == "Failed" && told["images"] == "1/2", "{told}");
        let message = told["message"].as_str().unwrap_or_default();
        ensure!(message.contains("ci/guest:2"), "{message}");
        Ok(())
    })
    .await?;
    home.vmpod(&["image", "inspect", &first.to_string()]).await?.ok()?;
    // What is mended at the registry is found without a word to the node.
    push(&here, &local, &late, options()).await?;
    e2e::eventually_within(Duration::from_mins(1), "the other is there too", || async {
        let told = status("here").await?[&node].clone();
        ensure!(told["phase"] == "Ready" && told["images"] == "2/2", "{told}");
        Ok(())
    })
    .await?;
    home.vmpod(&["image", "inspect", &late.to_string()]).await?.ok()?;
    ensure!(status("elsewhere").await?.is_null(), "a node that wasn't meant took it up");
    up.stop().await
}

/// What the ruinous proxy did.
#[derive(Default)]
struct Done {
    connections: AtomicUsize,
    refused: AtomicUsize,
    cut: AtomicUsize,
    changed: AtomicUsize,
    stalled: AtomicUsize,
}

/// A proxy that ruins most connections: one is told to come back later, one is cut, one has a byte changed, one stalls,
/// and only the fifth is left alone.
async fn ruinous_proxy(to: String) -> Result<(String, Arc<Done>)> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let host = listener.local_addr()?.to_string();
    let done = Arc::new(Done::default());
    let counts = Arc::clone(&done);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (to, counts) = (to.clone(), Arc::clone(&counts));
            tokio::spawn(async move {
                // A ruined connection is what this is for.
                serve_ruined(client, &to, &counts).await.ok();
            });
        }
    });
    Ok((host, done))
}

async fn serve_ruined(mut client: tokio::net::TcpStream, to: &str, done: &Done) -> std::io::Result<()> {
    let number = done.connections.fetch_add(1, Ordering::Relaxed);
    let kind = number % 5;
    if kind == 0 && number > 0 {
        let mut head = [0; 4096];
        // Whatever of the request came: it is refused all the same.
        let _asked = client.read(&mut head).await?;
        done.refused.fetch_add(1, Ordering::Relaxed);
        let answer =
            b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        return client.write_all(answer).await;
    }
    let server = tokio::net::TcpStream::connect(to).await?;
    let (mut from_server, mut to_server) = server.into_split();
    let (mut from_client, mut to_client) = client.into_split();
    let up = async { tokio::io::copy(&mut from_client, &mut to_server).await.map(drop) };
    let down = async {
        let mut buffer = vec![0; 64 << 10];
        // Far enough for a few answers to come through whole, so that there is progress.
        let at = 200_000 + number * 150_000 % 1_500_000;
        let mut passed = 0;
        loop {
            let read = from_server.read(&mut buffer).await?;
            if read == 0 {
                return Ok(());
            }
            if passed < at && passed + read >= at {
                match kind {
                    1 => {
                        done.cut.fetch_add(1, Ordering::Relaxed);
                        return Err(std::io::ErrorKind::ConnectionReset.into());
                    }
                    2 => {
                        done.changed.fetch_add(1, Ordering::Relaxed);
                        buffer[read / 2] ^= 0x10;
                    }
                    3 => {
                        done.stalled.fetch_add(1, Ordering::Relaxed);
                        tokio::time::sleep(Duration::from_millis(700)).await;
                    }
                    _ => {}
                }
            }
            passed += read;
            to_client.write_all(&buffer[..read]).await?;
        }
    };
    tokio::select! { ended = up => ended, ended = down => ended }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_survives_a_ruinous_connection() -> Result<()> {
    let registry = Registry::start(false).await?;
    let (here, there) = (registry.store("here")?, registry.store("there")?);
    disk(&registry.path("disk.raw"), 1)?;
    let local = Reference::parse("guest")?;
    let image = import(&here, Source::Raw(registry.path("disk.raw")), &local, ImportOptions::default()).await?;
    push(&here, &local, &registry.image("ci/guest:1")?, PushOptions::default()).await?;
    let (host, done) = ruinous_proxy(registry.host.clone()).await?;
    let remote = Reference::parse(&format!("{host}/ci/guest:1"))?;
    let pulling = pull(&there, &remote, PullOptions::default());
    let pulled = tokio::time::timeout(Duration::from_mins(3), pulling).await.context("the pull hangs")??;
    ensure!(pulled.digest == image.digest && disk_of(&here, &image)? == disk_of(&there, &pulled)?);
    let counts = [&done.refused, &done.cut, &done.changed, &done.stalled].map(|count| count.load(Ordering::Relaxed));
    ensure!(counts.iter().filter(|count| **count > 0).count() >= 3, "the connection was ruined enough: {counts:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_kills_of_a_pull_leave_it_right() -> Result<()> {
    const KILLS: u64 = 100;
    let registry = Registry::start(false).await?;
    let here = registry.store("here")?;
    disk(&registry.path("disk.raw"), 1)?;
    let local = Reference::parse("guest")?;
    let image = import(&here, Source::Raw(registry.path("disk.raw")), &local, ImportOptions::default()).await?;
    let remote = registry.image("ci/guest:1")?;
    push(&here, &local, &remote, PushOptions::default()).await?;
    let name = remote.to_string();
    let home = e2e::Home::new("kills")?;
    let wanted = std::fs::read(registry.path("disk.raw"))?;
    let right = || -> Result<()> {
        let store = Store::open(&home.path().join("images"))?;
        for image in store.list()? {
            ensure!(store.verify(&image)?.is_empty(), "an image that is shown is whole");
            ensure!(disk_of(&store, &image)? == wanted, "the pulled disk is wrong");
        }
        Ok(())
    };
    let (mut finished, mut state) = (0, 12345u64);
    for kill in 0..KILLS {
        let mut command = home.command()?;
        let mut child = command
            .args(["image", "pull", &name])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let patience = Duration::from_millis(20 + (state >> 33) % 280);
        if tokio::time::timeout(patience, child.wait()).await.is_ok() {
            // Done before it could be killed: look at it, and begin anew.
            finished += 1;
            right()?;
            home.vmpod(&["image", "rm", &name]).await?.ok()?;
        } else {
            child.kill().await?;
        }
        if kill % 20 == 19 {
            right()?;
        }
    }
    let pulled = home.vmpod(&["image", "pull", &name]).await?.ok()?;
    ensure!(pulled.trim() == image.digest.to_string(), "{pulled}");
    right()?;
    ensure!(finished < KILLS, "every pull was quicker than its kill");
    for dir in ["work", "trash"] {
        let left = e2e::home::entries(&home.path().join("images").join(dir))?;
        ensure!(left.is_empty(), "{dir} holds {left:?}");
    }
    Ok(())
}
