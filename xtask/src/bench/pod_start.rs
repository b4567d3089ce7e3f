//! Pod created → exec answers, over the same QEMU started by hand and polled by ssh.
//!
//! Each round starts a pod through the API of a real `vmpod up` and runs `true` in it as soon as it is Ready, then
//! takes the very command line of that pod's QEMU and starts it by hand in a copy of the machine's directory, twice:
//! once polled by `ssh` until `true` has run, and once by somebody who knows the guest, reads its console until it says
//! that it is ready, and only then calls `ssh`. The second is the harder peer: QEMU's user network loses a
//! connection that comes before the guest's network, so polling waits for its next try.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::TryStreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, AttachParams, DeleteParams, PostParams, WatchEvent, WatchParams};
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};

use super::process::{self, Owned};
use super::samples::Samples;
use super::server;

mod warm;

use warm::Warm;

const START: Duration = Duration::from_mins(5);

pub(super) fn run(quick: bool, program: Option<PathBuf>, root: &Path) -> Result<()> {
    let rounds = if quick { 3 } else { 10 };
    let pods_for_memory = if quick { 0 } else { 4 };
    let program = program.map_or_else(|| server::build(root), Ok)?;
    let program = fs::canonicalize(&program).with_context(|| format!("no program {}", program.display()))?;
    let guest = root.join("target/guest/tiny.oci");
    ensure!(guest.is_dir(), "{} is missing: run `make guest` first", guest.display());
    rustls::crypto::ring::default_provider().install_default().ok();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;

    let scratch = tempfile::Builder::new().prefix("vmpod-bench-").tempdir_in(root.join("target"))?;
    let bench = Bench { program, home: scratch.path().join("home"), scratch: scratch.path().to_owned() };
    bench.vmpod(&["image", "import", path(&guest)?, "tiny"])?;
    let debian = root.join("target/guest/debian.oci");
    ensure!(debian.is_dir(), "{} is missing: run `make guest-debian` first", debian.display());
    bench.vmpod(&["image", "import", path(&debian)?, "debian"])?;
    let up = server::up(&bench.program, &bench.home, &scratch.path().join("up.log"))?;
    let outcome = runtime.block_on(bench.measure(rounds, pods_for_memory, up.id()));
    // The machines end with it, also when measuring failed.
    up.end(Duration::from_mins(1))?;
    outcome?.print(rounds);
    Ok(())
}

struct Bench {
    program: PathBuf,
    home: PathBuf,
    scratch: PathBuf,
}

/// What the rounds gave. Seconds and MiB.
#[derive(Default)]
struct Figures {
    ready: Samples,
    pod: Samples,
    exec: Samples,
    raw: Samples,
    informed: Samples,
    warm: Warm,
    rss_idle: f64,
    rss_per_pod: Option<f64>,
}

impl Bench {
    async fn measure(&self, rounds: u32, pods_for_memory: u32, agent: u32) -> Result<Figures> {
        let kubeconfig = Kubeconfig::read_from(self.home.join("kubeconfig"))?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        let pods: Api<Pod> = Api::default_namespaced(Client::try_from(config)?);
        let mut figures = Figures { rss_idle: process::resident_mib(agent)?, ..Figures::default() };
        for round in 0..rounds {
            let name = format!("round-{round}");
            let created = Instant::now();
            let uid = create(&pods, &name, &COLD).await?;
            ready(&pods, &name).await?;
            figures.ready.push(created.elapsed().as_secs_f64());
            exec_true(&pods, &name).await?;
            figures.pod.push(created.elapsed().as_secs_f64());
            let again = Instant::now();
            exec_true(&pods, &name).await?;
            figures.exec.push(again.elapsed().as_secs_f64());

            let by_hand = self.copy_machine(&uid)?;
            delete(&pods, &name).await?;
            figures.raw.push(by_hand.start_until_ssh(false)?.as_secs_f64());
            by_hand.forget_console()?;
            figures.informed.push(by_hand.start_until_ssh(true)?.as_secs_f64());
            crate::say(&format!("round {} of {rounds} done", round + 1));
        }
        figures.warm = warm::measure(&pods, rounds, &self.home.join("machines")).await?;
        if pods_for_memory > 0 {
            let before = process::resident_mib(agent)?;
            // One after the other: what is asked is memory, not how fast many boot at once.
            for number in 0..pods_for_memory {
                let name = format!("memory-{number}");
                create(&pods, &name, &COLD).await?;
                ready(&pods, &name).await?;
            }
            figures.rss_per_pod = Some((process::resident_mib(agent)? - before) / f64::from(pods_for_memory));
            for number in 0..pods_for_memory {
                delete(&pods, &format!("memory-{number}")).await?;
            }
        }
        Ok(figures)
    }

    fn vmpod(&self, arguments: &[&str]) -> Result<()> {
        let output = Command::new(&self.program).arg("--home").arg(&self.home).args(arguments).output()?;
        ensure!(
            output.status.success(),
            "vmpod {} failed: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }

    /// Copies the directory of a pod's running machine and reads its command line.
    fn copy_machine(&self, uid: &str) -> Result<ByHand> {
        let machines = self.home.join("machines");
        let dir = fs::read_dir(&machines)?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(uid)))
            .with_context(|| format!("no machine of pod {uid} in {}", machines.display()))?;
        let words = process::command_line_in(&fs::canonicalize(&dir)?, "qemu-system")?;
        let spec: Value = serde_json::from_slice(&fs::read(dir.join("spec.json"))?)?;
        let copy = self.scratch.join("by-hand");
        if copy.exists() {
            fs::remove_dir_all(&copy)?;
        }
        fs::create_dir(&copy)?;
        for entry in fs::read_dir(&dir)?.flatten() {
            // Sockets and pipes are the running machine's own.
            if entry.file_type()?.is_file() {
                fs::copy(entry.path(), copy.join(entry.file_name()))?;
            }
        }
        let network = find(&spec, "ssh_port").context("the machine's description names no ssh_port")?;
        let address = network["address"].as_str().context("…and no address")?.to_owned();
        let port = network["ssh_port"].as_u64().context("…and no number")?;
        let access = find(&spec, "user").context("the machine's description names no user")?;
        let user = access["user"].as_str().context("…and no name")?.to_owned();
        let marker = access["ready_marker"].as_str().context("the guest has no ready marker")?.to_owned();
        let by_hand = ByHand { words, dir: copy, address, port, user, marker };
        by_hand.forget_console()?;
        Ok(by_hand)
    }
}

/// The object in a JSON value that has `key`.
pub(super) fn find<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    match value {
        Value::Object(map) if map.contains_key(key) => Some(value),
        Value::Object(map) => map.values().find_map(|value| find(value, key)),
        Value::Array(values) => values.iter().find_map(|value| find(value, key)),
        _ => None,
    }
}

/// A machine started as a person would who knows its command line.
struct ByHand {
    words: Vec<std::ffi::OsString>,
    dir: PathBuf,
    address: String,
    port: u64,
    user: String,
    /// What the guest prints on its console once its SSH server listens.
    marker: String,
}

impl ByHand {
    fn console(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// What another start said must not count.
    fn forget_console(&self) -> Result<()> {
        fs::write(self.console(), "").context("can't empty the console's log")
    }

    /// Starts QEMU and tells how long it took until ssh had run `true`.
    fn start_until_ssh(&self, reads_console: bool) -> Result<Duration> {
        let (program, arguments) = self.words.split_first().context("a process has a command line")?;
        let started = Instant::now();
        let mut command = Command::new(program);
        command.args(arguments).current_dir(&self.dir);
        let mut qemu = Owned::start(&mut command, &self.dir.join("by-hand.log"))?;
        loop {
            let worth_trying = !reads_console || fs::read_to_string(self.console())?.contains(&self.marker);
            if worth_trying && self.ssh_true()? {
                return Ok(started.elapsed());
            }
            if qemu.has_ended().is_some() || started.elapsed() > START {
                let log = fs::read_to_string(self.dir.join("by-hand.log")).unwrap_or_default();
                bail!("QEMU by hand gave no ssh:\n{log}");
            }
            process::pause(if reads_console { 20 } else { 100 });
        }
    }

    fn ssh_true(&self) -> Result<bool> {
        let status = Command::new("ssh")
            .args(["-F", "/dev/null", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"])
            .args(["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=2"])
            .arg("-i")
            .arg(self.dir.join("id_ed25519"))
            .args(["-p", &self.port.to_string(), &format!("{}@{}", self.user, self.address), "true"])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .context("ssh did not start: install openssh-client")?;
        Ok(status.success())
    }
}

impl Figures {
    fn print(&self, rounds: u32) {
        let ratio = self.pod.median() / self.raw.median();
        let informed = self.pod.median() / self.informed.median();
        crate::print(&format!("{rounds} rounds, seconds                    median    least     most"));
        for (what, samples) in [
            ("pod created → Ready", &self.ready),
            ("pod created → exec answers", &self.pod),
            ("QEMU by hand, polled by ssh", &self.raw),
            ("QEMU by hand, console, then ssh", &self.informed),
            ("exec of `true`, warm", &self.exec),
            ("from a snapshot → exec answers", &self.warm.tiny),
            ("Debian, booted → exec answers", &self.warm.debian_cold),
            ("Debian, from a snapshot → exec", &self.warm.debian),
        ] {
            crate::print(&format!(
                "{what:<36} {:>8.3} {:>8.3} {:>8.3}",
                samples.median(),
                samples.least(),
                samples.most()
            ));
        }
        let over_cold = self.warm.debian.median() / self.warm.debian_cold.median();
        crate::print(&format!("Debian, from a snapshot over booted  {over_cold:>8.3}"));
        let (rss, pss) = (self.warm.rss_mib, self.warm.pss_mib);
        crate::print(&format!("a copy's memory: resident {rss:.0} MiB, its share of what several map {pss:.0} MiB"));
        crate::print(&format!("pod over QEMU polled by ssh          {ratio:>8.3}"));
        crate::print(&format!("pod over QEMU, console, then ssh     {informed:>8.3}"));
        crate::print(&format!("`vmpod up`, resident, idle           {:>8.1} MiB", self.rss_idle));
        if let Some(rss) = self.rss_per_pod {
            crate::print(&format!("`vmpod up`, resident, per pod        {rss:>8.2} MiB"));
        }
        let line = json!({
            "cold_over_raw": rounded(ratio),
            "pod_seconds": rounded(self.pod.median()),
            "cold_over_informed": rounded(informed),
            "raw_seconds": rounded(self.raw.median()),
            "informed_seconds": rounded(self.informed.median()),
            "snapshot_seconds": rounded(self.warm.tiny.median()),
            "snapshot_seconds_p95": rounded(self.warm.tiny.most()),
            "snapshot_over_cold": rounded(over_cold),
            "debian_cold_seconds": rounded(self.warm.debian_cold.median()),
            "debian_snapshot_seconds": rounded(self.warm.debian.median()),
            "copy_rss_mib": rounded(rss),
            "copy_pss_mib": rounded(pss),
            "exec_seconds": rounded(self.exec.median()),
            "up_rss_idle_mib": rounded(self.rss_idle),
            "up_rss_per_pod_mib": self.rss_per_pod.map(rounded),
            "rounds": rounds,
        });
        crate::print(&line.to_string());
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

/// What pod is made.
pub(super) struct Kind {
    pub(super) image: &'static str,
    pub(super) start: &'static str,
    pub(super) cpus: &'static str,
    pub(super) memory: &'static str,
    /// Where, when it matters.
    pub(super) node: Option<&'static str>,
}

const COLD: Kind = Kind { image: "tiny", start: "boot", cpus: "1", memory: "256Mi", node: None };

pub(super) async fn create(pods: &Api<Pod>, name: &str, kind: &Kind) -> Result<String> {
    let Kind { image, start, cpus, memory, node } = kind;
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": name, "annotations": {"vmpod.dev/start": start}},
        "spec": {"terminationGracePeriodSeconds": 1, "nodeName": node, "containers": [{
            "name": "machine", "image": image, "imagePullPolicy": "Never",
            // A small request, so that several fit on a small host.
            "resources": {"limits": {"cpu": cpus, "memory": memory}, "requests": {"cpu": "100m", "memory": memory}},
        }]},
    }))?;
    let pod = pods.create(&PostParams::default(), &pod).await.context("the pod was not created")?;
    pod.metadata.uid.context("a pod has a uid")
}

pub(super) async fn ready(pods: &Api<Pod>, name: &str) -> Result<()> {
    watch(pods, name, |event| match event {
        WatchEvent::Added(pod) | WatchEvent::Modified(pod) => is_ready(pod),
        _ => false,
    })
    .await
    .with_context(|| format!("pod {name} did not become Ready"))
}

pub(super) async fn delete(pods: &Api<Pod>, name: &str) -> Result<()> {
    let gone = watch(pods, name, |event| matches!(event, WatchEvent::Deleted(_)));
    // With a grace period the object stays until its machine is gone, and its address is free again.
    let parameters = DeleteParams::default().grace_period(1);
    let (gone, deleted) = tokio::join!(gone, pods.delete(name, &parameters));
    deleted.with_context(|| format!("pod {name} was not deleted"))?;
    gone.with_context(|| format!("pod {name} did not go away"))
}

async fn watch(pods: &Api<Pod>, name: &str, done: impl Fn(&WatchEvent<Pod>) -> bool) -> Result<()> {
    let parameters = WatchParams::default().fields(&format!("metadata.name={name}"));
    let watching = async {
        let events = pods.watch(&parameters, "0").await?;
        let mut events = std::pin::pin!(events);
        while let Some(event) = events.try_next().await? {
            if done(&event) {
                return Ok(());
            }
        }
        bail!("the watch ended")
    };
    tokio::time::timeout(START, watching).await.context("it took too long")?
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

pub(super) async fn exec_true(pods: &Api<Pod>, name: &str) -> Result<()> {
    let mut process = pods.exec(name, ["true"], &AttachParams::default().stderr(false)).await?;
    let status = process.take_status().context("exec has a status")?.await;
    let succeeded = status.as_ref().and_then(|status| status.status.as_deref()) == Some("Success");
    ensure!(succeeded, "exec in pod {name}: {status:?}");
    Ok(())
}
