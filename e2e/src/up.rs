//! A running `vmpod up`.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use kube::config::{KubeConfigOptions, Kubeconfig};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use crate::command::{Ran, run};
use crate::home::Home;
use crate::patience::{PATIENCE, eventually_within};
use crate::prerequisites;

/// `vmpod up` on a home. Dropped, it is killed, and its log is printed (which a test runner shows of failed tests only).
#[derive(Debug)]
pub struct Up {
    child: Child,
    log: PathBuf,
    kubeconfig: PathBuf,
    /// How long it took to be ready.
    pub ready_after: Duration,
    /// Its log is of no interest, because it was killed on purpose.
    quiet: bool,
}

impl Up {
    /// Starts it on free ports and waits until it says that it is ready.
    pub(crate) async fn start(home: &Home, args: &[&str]) -> Result<Self> {
        let mut up = Self::spawn(home, args)?;
        let began = tokio::time::Instant::now();
        let stdout = up.child.stdout.take().context("vmpod up has no output")?;
        let mut lines = BufReader::new(stdout).lines();
        let line = tokio::time::timeout(PATIENCE, lines.next_line()).await;
        match line {
            Err(_) => bail!("vmpod up isn't ready after {} s:\n{}", PATIENCE.as_secs(), up.log()),
            Ok(line) => match line? {
                Some(path) => up.kubeconfig = path.into(),
                None => bail!("vmpod up ended before it was ready:\n{}", up.log()),
            },
        }
        up.ready_after = began.elapsed();
        Ok(up)
    }

    /// Starts it and doesn't wait.
    pub fn spawn(home: &Home, args: &[&str]) -> Result<Self> {
        // One that was killed has left its own, which leads nowhere.
        let kubeconfig = home.path().join("kubeconfig");
        if kubeconfig.exists() {
            std::fs::remove_file(&kubeconfig)?;
        }
        let log = home.path().with_extension("log");
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&log)?;
        let mut command = home.command()?;
        command.args(["up", "--api-port", "0", "--kubelet-port", "0"]).args(args);
        if !args.contains(&"--fleet-poll") {
            command.arg("--no-fleet");
        }
        if !args.contains(&"--eviction-hard") {
            // How full the disk of whoever runs the tests is isn't theirs to tell.
            command.args(["--eviction-hard", ""]);
        }
        if !args.contains(&"--snapshots") {
            // A test that doesn't ask for them isn't to make them beside its work.
            command.args(["--snapshots", "0"]);
        }
        command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file);
        let child = command.spawn().context("can't start vmpod up")?;
        Ok(Self { child, log, kubeconfig, ready_after: Duration::ZERO, quiet: false })
    }

    /// What it logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Where the fleet's metrics are (`--metrics-listen`): `ADDRESS:PORT`.
    pub fn metrics_address(&self) -> Result<String> {
        let log = self.log();
        let url = log.lines().find_map(|line| line.strip_prefix("metrics: http://"));
        Ok(url.context("vmpod up offers no metrics")?.trim_end_matches("/metrics").to_owned())
    }

    /// The fleet's metrics.
    pub async fn metrics(&self) -> Result<String> {
        // Whether another test of this process chose one before doesn't matter.
        drop(rustls::crypto::ring::default_provider().install_default());
        let response = reqwest::get(format!("http://{}/metrics", self.metrics_address()?)).await?;
        Ok(response.error_for_status()?.text().await?)
    }

    /// The kubeconfig that it wrote.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Its process number.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// A client as its administrator, over TLS.
    pub async fn client(&self) -> Result<kube::Client> {
        // Whether another test of this process chose one before doesn't matter.
        drop(rustls::crypto::ring::default_provider().install_default());
        let config = Kubeconfig::read_from(&self.kubeconfig)?;
        let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
        Ok(kube::Client::try_from(config)?)
    }

    /// `kubectl` against it, not started yet.
    pub fn kubectl_command(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(prerequisites::kubectl()?);
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(args);
        // Its cache of what a server offers must not be another test's.
        command.env("HOME", self.kubeconfig.with_file_name("kubectl"));
        Ok(command)
    }

    /// Runs `kubectl` against it.
    pub async fn kubectl(&self, args: &[&str]) -> Result<Ran> {
        self.kubectl_with(args, None).await
    }

    /// Runs `kubectl` against it with some input.
    pub async fn kubectl_with(&self, args: &[&str], stdin: Option<&[u8]>) -> Result<Ran> {
        run(self.kubectl_command(args)?, stdin, Duration::from_mins(3)).await
    }

    /// Runs `kubectl`, which must succeed; its output is the result.
    pub async fn kubectl_ok(&self, args: &[&str]) -> Result<String> {
        self.kubectl(args).await?.ok()
    }

    /// `kubectl apply` of an object.
    pub async fn apply(&self, object: &Value) -> Result<()> {
        let text = serde_json::to_vec(object)?;
        self.kubectl_with(&["apply", "-f", "-"], Some(&text)).await?.ok().map(drop)
    }

    /// `kubectl get -o json` of a pod.
    pub async fn pod(&self, name: &str) -> Result<Value> {
        let text = self.kubectl_ok(&["get", "pod", name, "-o", "json"]).await?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Waits until a pod is Ready.
    pub async fn wait_ready(&self, pod: &str) -> Result<()> {
        self.wait_for(pod, "condition=Ready").await
    }

    /// `kubectl wait --for` on a pod; when it fails, the pod and its events tell why.
    pub async fn wait_for(&self, pod: &str, what: &str) -> Result<()> {
        let waited = self.kubectl(&["wait", &format!("pod/{pod}"), &format!("--for={what}"), "--timeout=150s"]).await?;
        match waited.ok() {
            Ok(_) => Ok(()),
            Err(error) => {
                let described = self.kubectl(&["describe", "pod", pod]).await?;
                Err(error.context(described.to_string()))
            }
        }
    }

    /// Waits until a pod has an event of this reason; its message is the result.
    pub async fn event(&self, pod: &str, reason: &str) -> Result<String> {
        let selector = format!("involvedObject.name={pod},reason={reason}");
        eventually_within(PATIENCE, &format!("an event {reason} of pod {pod}"), || async {
            let text = self.kubectl_ok(&["get", "events", "--field-selector", &selector, "-o", "json"]).await?;
            let list: Value = serde_json::from_str(&text)?;
            match list["items"][0]["message"].as_str() {
                Some(message) => Ok(message.to_owned()),
                None => bail!("there is none: {}", self.kubectl_ok(&["get", "events"]).await?),
            }
        })
        .await
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = self.pid().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        kill_process(pid.context("vmpod up has ended")?, signal).context("can't signal vmpod up")
    }

    /// Waits until it has ended.
    pub async fn ended(&mut self, patience: Duration) -> Result<ExitStatus> {
        match tokio::time::timeout(patience, self.child.wait()).await {
            Ok(status) => Ok(status?),
            Err(_) => bail!("vmpod up still runs after {} s:\n{}", patience.as_secs(), self.log()),
        }
    }

    /// Interrupts it as Ctrl-C does and waits until it has ended; the exit code must be 0.
    pub async fn stop(mut self) -> Result<()> {
        self.signal(Signal::INT)?;
        let status = self.ended(Duration::from_secs(90)).await?;
        if status.code() != Some(0) {
            bail!("vmpod up ended with {status} when it was interrupted:\n{}", self.log());
        }
        Ok(())
    }

    /// Kills it as a crash does.
    pub async fn kill(mut self) -> Result<()> {
        self.quiet = true;
        self.child.kill().await.context("can't kill vmpod up")
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        drop(self.child.start_kill());
        if self.quiet {
            return;
        }
        let mut stderr = std::io::stderr().lock();
        drop(writeln!(stderr, "--- log of vmpod up\n{}", self.log().trim_end()));
    }
}
