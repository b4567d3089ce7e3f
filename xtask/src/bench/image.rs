//! Pull, push, delta and clone of a disk image, against what a person would do with `skopeo` (and `oras`).
//!
//! The disk is half holes; its data are the file system of a real Debian guest and, for a quarter, noise. A real
//! docker-registry on loopback serves everyone. The peers' form of the disk is what people push today: one layer, packed
//! with `zstd` for skopeo, with `gzip` for oras. A relay in front of the registry counts the bytes of the delta.

#![expect(clippy::cast_precision_loss, reason = "figures for people: a few digits count")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use vmpod_image::{ImportOptions, Reference, Source, Store};

use super::process::{self, Owned};
use super::samples::Samples;

mod disk;
mod relay;

use disk::Shape;
use relay::Relay;

const MIB: u64 = 1 << 20;

pub(super) fn run(quick: bool, program: Option<PathBuf>, root: &Path) -> Result<()> {
    let shape = if quick { Shape { size: 1 << 30 } } else { Shape { size: 8 << 30 } };
    let rounds = if quick { 2 } else { 3 };
    let program = program.map_or_else(|| super::server::build(root), Ok)?;
    let program = fs::canonicalize(&program).with_context(|| format!("no program {}", program.display()))?;
    let guest = root.join("target/guest/debian.oci");
    ensure!(guest.is_dir(), "{} is missing: run `make guest-debian` first", guest.display());
    for tool in ["docker-registry", "skopeo", "zstd", "gzip", "sha256sum"] {
        ensure!(has(tool), "{tool} is missing: run `scripts/prerequisites e2e`");
    }
    let scratch = tempfile::Builder::new().prefix("vmpod-bench-").tempdir_in(root.join("target"))?;
    let bench = Bench::start(program, scratch.path(), root)?;

    crate::say("making the disk");
    bench.vmpod("setup", &["image", "import", path(&guest)?, "debian"])?;
    let rootfs = bench.disk_of("setup")?;
    let raw = bench.at("disk.raw");
    let data = shape.write(&rootfs, &raw)?;
    fs::remove_dir_all(bench.at("setup"))?;

    let mut figures = Figures { data, ..Figures::default() };
    bench.import_and_push(&raw, &mut figures)?;
    bench.peer_push(&raw, &mut figures)?;
    let oras = bench.oras_push(&raw, quick)?;
    for round in 0..rounds {
        bench.pull_round(round, oras.as_deref(), &mut figures)?;
        crate::say(&format!("round {} of {rounds} done", round + 1));
    }
    bench.bounds(&mut figures)?;
    bench.delta(&raw, shape, &mut figures)?;
    bench.clones(if quick { 10 } else { 50 }, &mut figures)?;
    figures.print(shape, rounds);
    Ok(())
}

struct Bench {
    program: PathBuf,
    dir: PathBuf,
    python: PathBuf,
    host: String,
    _registry: Owned,
}

/// What the rounds gave. Seconds, MiB and bytes.
#[derive(Default)]
struct Figures {
    data: u64,
    transfer: u64,
    push: f64,
    peer_push: f64,
    pull: Samples,
    pull_cpu: Samples,
    rss: Samples,
    skopeo: Samples,
    oras: Samples,
    unzstd: f64,
    hash: f64,
    delta_bytes: u64,
    full_bytes: u64,
    delta_seconds: f64,
    clone: Samples,
    clone_bytes: u64,
}

impl Bench {
    fn start(program: PathBuf, dir: &Path, root: &Path) -> Result<Self> {
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let host = format!("127.0.0.1:{port}");
        let config = dir.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{host}'}}\n",
            dir.join("registry").display()
        );
        fs::write(&config, text)?;
        let mut registry =
            Owned::start(Command::new("docker-registry").arg("serve").arg(&config), &dir.join("registry.log"))?;
        let until = Instant::now() + Duration::from_secs(30);
        while std::net::TcpStream::connect(&host).is_err() {
            if registry.has_ended().is_some() || Instant::now() > until {
                bail!("the registry did not come up: {}", fs::read_to_string(dir.join("registry.log"))?);
            }
            process::pause(20);
        }
        Ok(Self { program, dir: dir.to_owned(), python: root.join("target/tools/python"), host, _registry: registry })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn remote(&self, name: &str) -> String {
        format!("{}/{name}", self.host)
    }

    /// Runs vmpod with a home of its own; gives the time it took, and what it used.
    fn vmpod(&self, home: &str, arguments: &[&str]) -> Result<Usage> {
        let mut command = Command::new(&self.program);
        command.arg("--home").arg(self.at(home)).args(arguments);
        measure(&mut command)
    }

    /// The disk of the only image in a home.
    fn disk_of(&self, home: &str) -> Result<PathBuf> {
        let images = self.at(home).join("images/images");
        let image = fs::read_dir(&images)?.next().context("the store has an image")??;
        Ok(image.path().join("disk-0.raw"))
    }

    fn import_and_push(&self, raw: &Path, figures: &mut Figures) -> Result<()> {
        crate::say("importing and pushing");
        self.vmpod("home", &["image", "import", path(raw)?, "disk"])?;
        figures.push = self.vmpod("home", &["image", "push", "disk", &self.remote("bench/disk:1")])?.seconds;
        Ok(())
    }

    /// The disk as one layer, packed by `pack`, in a directory that skopeo reads.
    fn peer_layer(&self, raw: &Path, name: &str, pack: &str, media_type: &str) -> Result<PathBuf> {
        let dir = self.at(name);
        fs::create_dir(&dir)?;
        let layer = dir.join("layer");
        shell(&format!("{pack} < {} > {}", path(raw)?, path(&layer)?))?;
        fs::write(dir.join("version"), "Directory Transport Version: 1.1\n")?;
        fs::write(dir.join("config"), "{}")?;
        let mut descriptors = Vec::new();
        for (file, media_type) in [("config", "application/vnd.oci.empty.v1+json"), ("layer", media_type)] {
            let digest = shell(&format!("sha256sum {} | cut -d' ' -f1", path(&dir.join(file))?))?;
            let size = fs::metadata(dir.join(file))?.len();
            fs::rename(dir.join(file), dir.join(digest.trim()))?;
            descriptors
                .push(json!({"mediaType": media_type, "digest": format!("sha256:{}", digest.trim()), "size": size}));
        }
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptors[0], "layers": [descriptors[1]],
        });
        fs::write(dir.join("manifest.json"), serde_json::to_vec(&manifest)?)?;
        Ok(dir)
    }

    fn peer_push(&self, raw: &Path, figures: &mut Figures) -> Result<()> {
        crate::say("packing and pushing with zstd and skopeo");
        let begun = Instant::now();
        let dir = self.peer_layer(raw, "peer", "zstd -q -3 -T0 -c", "application/vnd.example.disk+zstd")?;
        let to = format!("docker://{}", self.remote("bench/peer:1"));
        skopeo(&["--dest-tls-verify=false", &format!("dir:{}", path(&dir)?), &to])?;
        figures.peer_push = begun.elapsed().as_secs_f64();
        fs::remove_dir_all(dir)?;
        Ok(())
    }

    /// The gzip layer for oras, when oras is there (and there is time for gzip).
    fn oras_push(&self, raw: &Path, quick: bool) -> Result<Option<String>> {
        if !self.python.join("oras").is_dir() {
            crate::say("oras is not installed (scripts/prerequisites e2e): left out");
            return Ok(None);
        }
        crate::say("packing with gzip, pushing with skopeo for oras");
        let level = if quick { 1 } else { 6 };
        let dir = self.peer_layer(raw, "gz", &format!("gzip -{level} -c"), "application/vnd.example.disk+gzip")?;
        let name = self.remote("bench/gz:1");
        skopeo(&["--dest-tls-verify=false", &format!("dir:{}", path(&dir)?), &format!("docker://{name}")])?;
        fs::remove_dir_all(dir)?;
        Ok(Some(name))
    }

    fn pull_round(&self, round: u32, oras: Option<&str>, figures: &mut Figures) -> Result<()> {
        let home = format!("pull-{round}");
        let usage = self.vmpod(&home, &["image", "pull", &self.remote("bench/disk:1")])?;
        figures.pull.push(usage.seconds);
        figures.pull_cpu.push(usage.cpu);
        figures.rss.push(usage.rss);
        ensure!(same(&self.disk_of(&home)?, &self.at("disk.raw"))?, "what was pulled is not what was pushed");
        fs::remove_dir_all(self.at(&home))?;

        let dir = self.at("skopeo");
        let begun = Instant::now();
        let from = format!("docker://{}", self.remote("bench/peer:1"));
        skopeo(&["--src-tls-verify=false", &from, &format!("dir:{}", path(&dir)?)])?;
        let layer = largest(&dir)?;
        // What a careful person does: sparse, and on disk before it counts, as ours is.
        let out = self.at("skopeo.raw");
        shell(&format!("zstd -q -d --sparse -f {} -o {} && sync {}", path(&layer)?, path(&out)?, path(&out)?))?;
        figures.skopeo.push(begun.elapsed().as_secs_f64());
        fs::remove_dir_all(dir)?;
        fs::remove_file(out)?;

        if let Some(name) = oras {
            let dir = self.at("oras");
            fs::create_dir(&dir)?;
            let begun = Instant::now();
            let script = "import sys, oras.client\nc = oras.client.OrasClient(insecure=True)\n\
                c.download_blob(sys.argv[1], c.get_manifest(sys.argv[1])['layers'][0]['digest'], sys.argv[2])\n";
            let blob = dir.join("disk.gz");
            let mut command = Command::new("python3");
            command.env("PYTHONPATH", &self.python).args(["-c", script, name, path(&blob)?]);
            measure(&mut command)?;
            let out = dir.join("raw");
            shell(&format!(
                "gzip -dc {} | cp --sparse=always /dev/stdin {} && sync {}",
                path(&blob)?,
                path(&out)?,
                path(&out)?
            ))?;
            figures.oras.push(begun.elapsed().as_secs_f64());
            fs::remove_dir_all(dir)?;
        }
        Ok(())
    }

    /// What no pull can do without, each alone: unpacking, and the two digests.
    fn bounds(&self, figures: &mut Figures) -> Result<()> {
        let packed = self.at("bound.zst");
        shell(&format!("zstd -q -3 -T0 -c {} > {}", path(&self.at("disk.raw"))?, path(&packed)?))?;
        figures.transfer = fs::metadata(&packed)?.len();
        let begun = Instant::now();
        shell(&format!("zstd -q -d -c {} > /dev/null", path(&packed)?))?;
        figures.unzstd = begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        shell(&format!("openssl dgst -sha256 {}", path(&packed)?))?;
        let packed_seconds = begun.elapsed().as_secs_f64();
        // The raw digest covers the data, not the holes.
        let share = figures.data as f64 / figures.transfer as f64;
        figures.hash = packed_seconds * (1.0 + share);
        fs::remove_file(packed)?;
        Ok(())
    }

    fn delta(&self, raw: &Path, shape: Shape, figures: &mut Figures) -> Result<()> {
        crate::say("changing 5 %, pushing and pulling again");
        let relay = Relay::start(&self.host)?;
        let pull = |tag: &str| -> Result<(f64, u64)> {
            let before = relay.bytes();
            let seconds =
                self.vmpod("delta", &["image", "pull", &format!("{}/bench/disk:{tag}", relay.host())])?.seconds;
            Ok((seconds, relay.bytes() - before))
        };
        figures.full_bytes = pull("1")?.1;
        shape.change(raw, 5)?;
        self.vmpod("home", &["image", "import", path(raw)?, "disk"])?;
        self.vmpod("home", &["image", "push", "disk", &self.remote("bench/disk:2")])?;
        (figures.delta_seconds, figures.delta_bytes) = pull("2")?;
        fs::remove_dir_all(self.at("delta"))?;
        Ok(())
    }

    /// Clones of a 64 GiB image, in this process: a clone is a few system calls.
    fn clones(&self, count: u32, figures: &mut Figures) -> Result<()> {
        let store = Store::open(&self.at("clones"))?;
        let raw = self.at("64g.raw");
        let file = fs::File::create(&raw)?;
        file.set_len(64 << 30)?;
        std::os::unix::fs::FileExt::write_all_at(&file, &disk::noise(7, 8 << 20), 32 << 30)?;
        let name = Reference::parse("large")?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let image = runtime.block_on(vmpod_image::import(&store, Source::Raw(raw), &name, ImportOptions::default()))?;
        for number in 0..count {
            let into = self.at(&format!("machine-{number}"));
            let begun = Instant::now();
            let clone = store.clone_image(&image, &into, None, &format!("machine-{number}"))?;
            figures.clone.push(begun.elapsed().as_secs_f64() * 1000.0);
            let file = fs::metadata(&clone.disks.first().context("the image has a disk")?.path)?;
            figures.clone_bytes = std::os::unix::fs::MetadataExt::blocks(&file) * 512;
        }
        Ok(())
    }
}

impl Figures {
    fn print(&self, shape: Shape, rounds: u32) {
        let (pull, skopeo) = (self.pull.median(), self.skopeo.median());
        let mib = |bytes: u64| bytes as f64 / MIB as f64;
        crate::print(&format!(
            "a disk of {} GiB: {:.0} MiB of data, {:.0} MiB packed; medians of {rounds} rounds",
            shape.size >> 30,
            mib(self.data),
            mib(self.transfer),
        ));
        let line = |what: &str, seconds: f64, note: &str| crate::print(&format!("{what:<44} {seconds:>8.2} s  {note}"));
        let cpu = format!("({:.1} s of processor, {:.0} MiB resident)", self.pull_cpu.median(), self.rss.most());
        line("vmpod image pull", pull, &cpu);
        line("skopeo copy + zstd -d", skopeo, "");
        if self.oras.median().is_finite() {
            line("oras + gzip -d", self.oras.median(), "");
        }
        line("  zstd -d alone, one processor", self.unzstd, "");
        line("  SHA-256 of packed and raw bytes, one processor", self.hash, "");
        line("vmpod image push (packs)", self.push, "");
        line("zstd -T0 + skopeo copy", self.peer_push, "");
        let changed = self.delta_bytes as f64 / self.full_bytes as f64;
        line("pull of a version with 5 % changed", self.delta_seconds, &format!("({:.0} MiB)", mib(self.delta_bytes)));
        crate::print(&format!(
            "clone of a 64 GiB image: {:.2} ms (most {:.2}), {} bytes on disk",
            self.clone.median(),
            self.clone.most(),
            self.clone_bytes
        ));
        let threads = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        let bound = (self.unzstd + self.hash) / threads;
        let three = |value: f64| (value * 1000.0).round() / 1000.0;
        let oras = self.oras.median();
        let figures = json!({
            "clone_ms": three(self.clone.median()),
            "clone_bytes": self.clone_bytes,
            "pull_over_skopeo": three(pull / skopeo),
            "pull_over_oras": oras.is_finite().then(|| three(pull / oras)),
            "pull_seconds": three(pull),
            "pull_cpu_seconds": three(self.pull_cpu.median()),
            "pull_over_bound": three(pull / bound),
            "pull_rss_mib": three(self.rss.most()),
            "push_over_skopeo": three(self.push / self.peer_push),
            "push_seconds": three(self.push),
            "delta_bytes": three(changed),
            "delta_seconds": three(self.delta_seconds),
        });
        crate::print(&figures.to_string());
    }
}

/// What a finished process used.
struct Usage {
    seconds: f64,
    /// User and system seconds.
    cpu: f64,
    /// The most it had resident, MiB.
    rss: f64,
}

/// Runs a command to its end and looks at it meanwhile.
fn measure(command: &mut Command) -> Result<Usage> {
    let begun = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let (mut cpu, mut rss) = (0.0, 0.0);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        (cpu, rss) = process::used(child.id()).unwrap_or((cpu, rss));
        process::pause(10);
    };
    let seconds = begun.elapsed().as_secs_f64();
    if !status.success() {
        let output = child.wait_with_output()?;
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(Usage { seconds, cpu, rss })
}

fn has(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

fn skopeo(arguments: &[&str]) -> Result<()> {
    measure(Command::new("skopeo").args(["--insecure-policy", "copy", "--quiet"]).args(arguments)).map(drop)
}

fn shell(script: &str) -> Result<String> {
    let output = Command::new("sh").args(["-c", script]).output()?;
    ensure!(output.status.success(), "`{script}` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn same(a: &Path, b: &Path) -> Result<bool> {
    Ok(Command::new("cmp").arg("-s").arg(a).arg(b).status()?.success())
}

fn largest(dir: &Path) -> Result<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        files.push((entry.metadata()?.len(), entry.path()));
    }
    Ok(files.into_iter().max().context("skopeo copied something")?.1)
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}
