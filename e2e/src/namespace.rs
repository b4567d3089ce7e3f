//! Tests that change the host's network, each in a network namespace of its own.

use std::future::Future;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, Command};

const INSIDE: &str = "VMPOD_TEST_IN_NAMESPACE";

/// Runs a test in a network namespace, and with mounts of its own, by running this program once more.
pub fn in_namespace(test: &str, body: impl Future<Output = Result<()>>) -> Result<()> {
    if std::env::vars_os().any(|(name, _)| name == INSIDE) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        return runtime.block_on(async {
            sh("ip link set lo up; mount -t sysfs sysfs /sys").await?;
            body.await
        });
    }
    let root = rustix::process::geteuid().is_root();
    let kind: &[&str] = if root { &["--net", "--mount"] } else { &["--user", "--map-root-user", "--net", "--mount"] };
    let status = std::process::Command::new("unshare")
        .args(kind)
        .arg(std::env::current_exe()?)
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .status()
        .context("unshare is needed (util-linux)")?;
    ensure!(status.success(), "{test} in a network namespace: {status}");
    Ok(())
}

/// Runs a script in this namespace; its output.
pub async fn sh(script: &str) -> Result<String> {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    crate::run(command, None, crate::patience::PATIENCE).await?.ok()
}

/// A name server that this host asks, and that knows one name.
pub async fn name_server(dir: &Path, name: &str, address: &str) -> Result<Child> {
    let resolv = dir.join("resolv.conf");
    std::fs::write(&resolv, "nameserver 127.0.0.1\n")?;
    sh(&format!("mount --bind {} $(realpath /etc/resolv.conf)", resolv.display())).await?;
    let child = Command::new("dnsmasq")
        .args(["--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file=/dev/null", "--pid-file"])
        .args(["--bind-interfaces", "--listen-address=127.0.0.1", "--user=root", "--group=root"])
        .arg(format!("--address=/{name}/{address}"))
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .context("dnsmasq is needed: run `scripts/prerequisites e2e`")?;
    Ok(child)
}

/// What there is here of machines' networks; nothing when they were removed whole.
pub async fn leftovers() -> Result<String> {
    let links = sh("ip -o link").await?;
    let links = links.lines().filter(|line| line.contains("vmp"));
    let rules = sh("nft list ruleset").await?;
    Ok(links.chain(rules.lines()).collect::<Vec<_>>().join("\n"))
}

/// One more network namespace, connected to a bridge of this one: what is out there.
#[derive(Debug)]
pub struct Lan {
    holder: Child,
}

impl Lan {
    /// Makes it, with `address` on its interface `eth0`; the other end is a port of `bridge`.
    pub async fn join(bridge: &str, address: &str) -> Result<Self> {
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo here; exec cat"])
            // Its end of the pipe closes when this process ends, however it ends.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut line = [0; 5];
        holder.stdout.take().context("no output")?.read_exact(&mut line).await?;
        let pid = holder.id().context("it has ended")?;
        sh(&format!("ip link add out0 type veth peer name eth0 netns {pid}; ip link set out0 master {bridge} up"))
            .await?;
        let lan = Self { holder };
        lan.sh(&format!("ip link set lo up; ip addr add {address} dev eth0; ip link set eth0 up")).await?;
        Ok(lan)
    }

    fn enter(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.holder.id().unwrap_or_default())).arg(program);
        command
    }

    /// Runs a script there; its output.
    pub async fn sh(&self, script: &str) -> Result<String> {
        let mut command = self.enter("sh");
        command.args(["-c", script]);
        crate::run(command, None, crate::patience::PATIENCE).await?.ok()
    }

    /// A DHCP server there, with these further options.
    pub fn dhcp(&self, dir: &Path, options: &[&str]) -> Result<Child> {
        let child = self
            .enter("dnsmasq")
            .args(["--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file=/dev/null", "--pid-file"])
            .args(["--port=0", "--no-ping", "--interface=eth0", "--bind-interfaces", "--dhcp-authoritative"])
            .args(["--user=root", "--group=root", "--log-dhcp", "--log-facility=-"])
            .arg(format!("--dhcp-leasefile={}", dir.join("leases").display()))
            .args(options)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .context("dnsmasq is needed: run `scripts/prerequisites e2e`")?;
        Ok(child)
    }
}
