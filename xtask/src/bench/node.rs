//! The node agent alone: its memory, idle and with pods, and a command in a machine over `ssh` with a kept connection.
//!
//! The agent is a process of its own (`vmpod node`) that has joined the API of a `vmpod up`. Its machines are tiny guests that go
//! on from a memory snapshot; they are processes of their own and don't count. A command is run through the API, as `kubectl exec`
//! does, which asks the agent's kubelet API, which asks the guest over the connection that it keeps; `ssh` is started anew
//! for each command and uses its control socket, which is the quickest that it can do.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Client;
use kube::api::Api;
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};

use super::pod_start::{Kind, create, delete, exec_true, find, ready};
use super::process::{self, Owned};
use super::samples::Samples;
use super::server;

const KIND: Kind = Kind { image: "tiny", start: "snapshot", cpus: "1", memory: "256Mi", node: Some("agent") };
const PODS: u32 = 6;

pub(super) fn run(quick: bool, program: Option<PathBuf>, root: &Path) -> Result<()> {
    let rounds = if quick { 20 } else { 100 };
    let program = program.map_or_else(|| server::build(root), Ok)?;
    let program = fs::canonicalize(&program).with_context(|| format!("no program {}", program.display()))?;
    let guest = root.join("target/guest/tiny.oci");
    ensure!(guest.is_dir(), "{} is missing: run `make guest` first", guest.display());
    rustls::crypto::ring::default_provider().install_default().ok();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let scratch = tempfile::Builder::new().prefix("vmpod-bench-").tempdir_in(root.join("target"))?;
    let (api, own) = (scratch.path().join("api"), scratch.path().join("own"));
    let imported =
        Command::new(&program).arg("--home").arg(&own).args(["image", "import"]).arg(&guest).arg("tiny").output()?;
    ensure!(imported.status.success(), "the guest can't be imported: {}", String::from_utf8_lossy(&imported.stderr));
    let up = server::up_with(&program, &api, &scratch.path().join("up.log"), &["--no-fleet", "--snapshots", "0"])?;
    let mut agent = Command::new(&program);
    agent.arg("--home").arg(&own).args(["node", "--name", "agent", "--kubelet-port", "0", "--address", "127.0.0.1"]);
    agent.arg("--kubeconfig").arg(api.join("kubeconfig"));
    let log = scratch.path().join("agent.log");
    let agent = Owned::start(&mut agent, &log)?;
    let outcome = runtime.block_on(measure(&api, &own, agent.id(), rounds));
    drop(runtime);
    // The machines end with it, also when measuring failed.
    agent.end(Duration::from_mins(1))?;
    up.end(Duration::from_mins(1))?;
    let figures = outcome.with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
    figures.print(rounds);
    Ok(())
}

/// MiB and seconds.
struct Figures {
    idle: f64,
    idle_own: f64,
    /// After a pod came and went, and with all of them.
    before: f64,
    with: f64,
    exec: Samples,
    ssh: Samples,
}

async fn measure(api: &Path, own: &Path, agent: u32, rounds: u32) -> Result<Figures> {
    let kubeconfig = Kubeconfig::read_from(api.join("kubeconfig"))?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    joined(&Api::all(client.clone())).await?;
    let pods: Api<Pod> = Api::default_namespaced(client);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (idle, idle_own) = (process::resident_mib(agent)?, process::own_mib(agent)?);
    // The first one makes the template.
    create(&pods, "first", &KIND).await?;
    ready(&pods, "first").await?;
    exec_true(&pods, "first").await?;
    delete(&pods, "first").await?;
    create(&pods, "second", &KIND).await?;
    ready(&pods, "second").await?;
    exec_true(&pods, "second").await?;
    delete(&pods, "second").await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = process::resident_mib(agent)?;
    let mut uid = String::new();
    for number in 0..PODS {
        let name = format!("pod-{number}");
        uid = create(&pods, &name, &KIND).await?;
        ready(&pods, &name).await?;
        exec_true(&pods, &name).await?;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let with = process::resident_mib(agent)?;
    let last = format!("pod-{}", PODS - 1);
    let ssh = Ssh::connect(&own.join("machines"), &uid)?;
    let mut figures = Figures { idle, idle_own, before, with, exec: Samples::default(), ssh: Samples::default() };
    for _ in 0..rounds {
        let began = Instant::now();
        exec_true(&pods, &last).await?;
        figures.exec.push(began.elapsed().as_secs_f64());
        let began = Instant::now();
        ssh.run(&["true"])?;
        figures.ssh.push(began.elapsed().as_secs_f64());
    }
    ssh.end()?;
    for number in 0..PODS {
        delete(&pods, &format!("pod-{number}")).await?;
    }
    Ok(figures)
}

async fn joined(nodes: &Api<Node>) -> Result<()> {
    let until = Instant::now() + Duration::from_mins(1);
    while Instant::now() < until {
        let node = nodes.get_opt("agent").await?;
        let status = node.and_then(|node| node.status);
        let conditions = status.and_then(|status| status.conditions).unwrap_or_default();
        if conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True") {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bail!("the agent's node did not become Ready")
}

/// `ssh` to a machine with a kept connection.
struct Ssh {
    dir: PathBuf,
    to: String,
    port: String,
}

impl Ssh {
    fn connect(machines: &Path, uid: &str) -> Result<Self> {
        let all = fs::read_dir(machines)?.flatten().map(|entry| entry.path());
        let dir = all
            .into_iter()
            .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(uid)))
            .with_context(|| format!("no machine of pod {uid}"))?;
        let spec: Value = serde_json::from_slice(&fs::read(dir.join("spec.json"))?)?;
        let network = find(&spec, "ssh_port").context("the machine's description names no ssh_port")?;
        let user = find(&spec, "user").context("the machine's description names no user")?;
        let text = |value: &Value| value.as_str().map(str::to_owned).context("the machine's description is odd");
        let to = format!("{}@{}", text(&user["user"])?, text(&network["address"])?);
        let ssh = Self { dir, to, port: network["ssh_port"].to_string() };
        ssh.run(&["-M", "-f", "-N"])?;
        ssh.run(&["true"])?;
        Ok(ssh)
    }

    /// Options come before whom to reach, a command after.
    fn run(&self, words: &[&str]) -> Result<()> {
        let (options, command): (Vec<&str>, Vec<&str>) = words.iter().partition(|word| word.starts_with('-'));
        let output = Command::new("ssh")
            .args(["-F", "/dev/null", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"])
            .args(["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "ControlPath=bench-ssh"])
            .args(["-i", "id_ed25519", "-p", &self.port])
            .args(options)
            .arg(&self.to)
            .args(command)
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .context("ssh did not start: install openssh-client")?;
        ensure!(output.success(), "ssh {words:?} failed: {output}");
        Ok(())
    }

    fn end(&self) -> Result<()> {
        self.run(&["-Oexit"])
    }
}

impl Figures {
    fn print(&self, rounds: u32) {
        let per_pod = (self.with - self.before) / f64::from(PODS);
        let ratio = self.exec.median() / self.ssh.median();
        crate::print(&format!("{:<52} {:>8.1} MiB", "the agent, resident, idle", self.idle));
        crate::print(&format!("{:<52} {:>8.1} MiB", "  of it no page of the program", self.idle_own));
        crate::print(&format!("{:<52} {:>8.1} MiB", "  after two pods came and went", self.before));
        crate::print(&format!("{:<52} {:>8.1} MiB", format!("  with {PODS} pods"), self.with));
        crate::print(&format!("{:<52} {per_pod:>8.2} MiB", "added per pod"));
        crate::print(&format!("{rounds} rounds, milliseconds                   median      p95"));
        for (what, samples) in
            [("exec of `true` through the API", &self.exec), ("ssh with a control socket", &self.ssh)]
        {
            let (median, most) = (samples.median() * 1e3, samples.percentile(95) * 1e3);
            crate::print(&format!("{what:<36} {median:>8.1} {most:>8.1}"));
        }
        crate::print(&format!("exec over ssh                        {ratio:>8.3}"));
        let figures = json!({
            "rss_idle_mib": rounded(self.idle), "rss_per_pod_mib": rounded(per_pod), "exec_over_ssh": rounded(ratio),
            "rss_idle_own_mib": rounded(self.idle_own), "rss_before_mib": rounded(self.before), "rss_with_mib": rounded(self.with), "pods": PODS,
            "exec_ms": rounded(self.exec.median() * 1e3), "ssh_ms": rounded(self.ssh.median() * 1e3), "rounds": rounds,
        });
        crate::print(&figures.to_string());
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
