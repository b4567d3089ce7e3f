//! The kubelet API as its callers see it: a real `kubectl` over both of its protocols, an independent SPDY client, and
//! callers that have no business there.

use std::collections::BTreeMap;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::prerequisites::{self, repository};
use e2e::{Home, Up, pods, run};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::Command;

/// What the guest's SSH server says first: a port that is always open.
const BANNER: &str = "SSH-2.0-";

/// More than any buffer or window on the way.
fn input() -> Vec<u8> {
    (0..2_000_000_u32).filter_map(|n| (n.wrapping_mul(2_654_435_761) >> 24).to_be_bytes().last().copied()).collect()
}

/// `kubectl` over WebSocket (its default) and over SPDY (as it falls back to).
const PROTOCOLS: [&str; 2] = ["true", "false"];

fn kubectl(up: &Up, web_sockets: &str, args: &[&str]) -> Result<Command> {
    let mut command = up.kubectl_command(args)?;
    command.env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", web_sockets);
    command.env("KUBECTL_PORT_FORWARD_WEBSOCKETS", web_sockets);
    Ok(command)
}

/// Where the kubelet API is, and files of an identity that may use it.
struct Kubelet {
    host: String,
    port: u64,
    identity: PathBuf,
}

impl Kubelet {
    async fn of(home: &Home, up: &Up) -> Result<Self> {
        let nodes: Value = serde_json::from_str(&up.kubectl_ok(&["get", "nodes", "-o", "json"]).await?)?;
        let status = &nodes["items"][0]["status"];
        let addresses = status["addresses"].as_array().context("the node has no addresses")?;
        let internal = addresses.iter().find(|address| address["type"] == "InternalIP");
        let host = internal.and_then(|address| address["address"].as_str()).context("no internal address")?;
        let port = &status["daemonEndpoints"]["kubeletEndpoint"]["Port"];
        let identity = home.path().join("identity");
        std::fs::create_dir(&identity)?;
        let config = kube::config::Kubeconfig::read_from(up.kubeconfig())?;
        let text = serde_json::to_value(&config)?;
        let secret = |pointer: &str, file: &str| -> Result<()> {
            let encoded = text.pointer(pointer).and_then(Value::as_str).context(pointer.to_owned())?;
            write_private(&identity.join(file), &decode(encoded)?)
        };
        secret("/clusters/0/cluster/certificate-authority-data", "ca.pem")?;
        secret("/users/0/user/client-certificate-data", "cert.pem")?;
        secret("/users/0/user/client-key-data", "key.pem")?;
        Ok(Self { host: host.to_owned(), port: port.as_u64().context("no kubelet port")?, identity })
    }

    fn client(&self, identified: bool) -> Result<reqwest::Client> {
        drop(rustls::crypto::ring::default_provider().install_default());
        let read = |name: &str| std::fs::read(self.identity.join(name));
        let mut builder = reqwest::Client::builder()
            .tls_certs_only([reqwest::Certificate::from_pem(&read("ca.pem")?)?])
            .timeout(Duration::from_secs(30));
        if identified {
            let pem = [read("cert.pem")?, read("key.pem")?].concat();
            builder = builder.identity(reqwest::Identity::from_pem(&pem)?);
        }
        Ok(builder.build()?)
    }

    fn url(&self, path: &str) -> String {
        format!("https://{}:{}{path}", self.host, self.port)
    }

    /// Runs the independent SPDY client; what each stream carried.
    async fn spdy(&self, path: &str, streams: &[&str], stdin: &[u8]) -> Result<BTreeMap<String, Value>> {
        let mut command = Command::new(prerequisites::program("node", "nodejs")?);
        command.env("NODE_PATH", spdy_transport().await?.join("node_modules")).env("FORWARD_PORT", "22");
        command.arg(repository().join("e2e/tests/streaming/spdy.js"));
        command.args([&self.host, &self.port.to_string()]).arg(&self.identity).args(["POST", path]).args(streams);
        let text = run(command, Some(stdin), Duration::from_mins(2)).await?.ok()?;
        Ok(serde_json::from_str(&text)?)
    }
}

fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write as _;
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    Ok(file.write_all(bytes)?)
}

fn decode(text: &str) -> Result<Vec<u8>> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let digits: Option<Vec<u8>> = text.trim_end_matches('=').bytes().map(digit).collect();
    let digits = digits.context("not base64")?;
    let mut bytes = Vec::new();
    for group in digits.chunks(4) {
        let bits = group.iter().fold(0_u32, |bits, digit| bits << 6 | u32::from(*digit)) << (6 * (4 - group.len()));
        let [_, out @ ..] = bits.to_be_bytes();
        bytes.extend_from_slice(&out[..group.len() * 3 / 4]);
    }
    Ok(bytes)
}

/// The directory with npm's `spdy-transport`, installed when it isn't there.
async fn spdy_transport() -> Result<PathBuf> {
    let dir = repository().join("target/tools/spdy-transport");
    if !dir.join("node_modules/spdy-transport").is_dir() {
        let mut command = Command::new(prerequisites::program("npm", "npm")?);
        command.args(["install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"]).arg(&dir);
        command.arg("spdy-transport@3.0.0");
        run(command, None, Duration::from_mins(3)).await?.ok().context("npm can't install spdy-transport")?;
    }
    Ok(dir)
}

/// A home with one machine that is ready.
async fn machine(name: &str) -> Result<(Home, Up)> {
    let home = Home::with_tiny(name).await?;
    let up = home.up(&[]).await?;
    up.apply(&pods::tiny("vm", &[])).await?;
    up.wait_ready("vm").await?;
    Ok((home, up))
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_talks_to_a_machine_over_both_protocols() -> Result<()> {
    let (_home, up) = machine("streaming").await?;
    let input = input();
    let minute = Duration::from_mins(1);
    for web_sockets in PROTOCOLS {
        let exec = async |stdin: Option<&[u8]>, script: &str| {
            let args = ["exec", "-i", "vm", "--", "sh", "-c", script];
            run(kubectl(&up, web_sockets, &args)?, stdin, minute).await
        };
        let both = exec(Some(b""), "echo out; echo err >&2; exit 7").await?.expect_code(7)?;
        ensure!(both.stdout == "out\n" && both.stderr.starts_with("err\n"), "{both}");
        ensure!(both.stderr.contains("command terminated with exit code 7"), "{both}");
        let counted = exec(Some(&input), "wc -c").await?.ok()?;
        ensure!(counted.trim() == "2000000", "websockets={web_sockets}: {counted}");
        let many = exec(None, "yes | head -c 3000000").await?.ok()?;
        ensure!(many.len() == 3_000_000, "websockets={web_sockets}: {}", many.len());
        // Output goes on after input that nobody reads.
        let unread = exec(Some(&input), "sleep 1; echo done").await?.ok()?;
        ensure!(unread == "done\n", "websockets={web_sockets}: {unread:?}");
        // What can't be is told.
        let wrong = ["exec", "vm", "-c", "other", "--", "true"];
        run(kubectl(&up, web_sockets, &wrong)?, None, minute).await?.expect_failure("other")?;
    }
    // A container that doesn't run yet.
    let mut pod = pods::tiny("waiting", &[]);
    pod["spec"]["containers"][0]["image"] = "no-such-image".into();
    up.apply(&pod).await?;
    for web_sockets in PROTOCOLS {
        let exec = kubectl(&up, web_sockets, &["exec", "waiting", "--", "true"])?;
        run(exec, None, minute).await?.expect_failure("is not running")?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_forwards_ports_over_both_protocols() -> Result<()> {
    let (_home, up) = machine("forward").await?;
    for web_sockets in PROTOCOLS {
        let mut command = kubectl(&up, web_sockets, &["port-forward", "pod/vm", ":22"])?;
        let mut forward = command.stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
        let mut lines = BufReader::new(forward.stdout.take().context("no output")?).lines();
        let first = tokio::time::timeout(Duration::from_secs(30), lines.next_line()).await??;
        let line = first.context("kubectl said nothing")?;
        let port = line.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next()).context(line.clone())?;
        let address = format!("127.0.0.1:{port}");
        // Several connections at once, and one after another; a client that hangs up harms none.
        let connections = (0..5).map(|_| banner(address.clone()));
        for banner in futures::future::join_all(connections).await {
            ensure!(banner?.starts_with(BANNER), "websockets={web_sockets}");
        }
        drop(TcpStream::connect(&address).await?);
        ensure!(banner(address.clone()).await?.starts_with(BANNER), "websockets={web_sockets}");
        forward.kill().await?;
    }
    Ok(())
}

async fn banner(address: String) -> Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(b"SSH-2.0-test\r\n").await?;
    let mut bytes = [0; 8];
    let read = stream.read_exact(&mut bytes);
    tokio::time::timeout(Duration::from_secs(30), read).await.context("no banner")??;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_independent_spdy_client_is_understood() -> Result<()> {
    let (home, up) = machine("spdy").await?;
    let kubelet = Kubelet::of(&home, &up).await?;
    let input = input();

    // It has flow control, unlike kubectl: both directions go far beyond its windows.
    let path = "/exec/default/vm/machine?command=sh&command=-c&command=cat%3B+echo+oops+%3E%262%3B+exit+3\
                &input=1&output=1&error=1";
    let seen = kubelet.spdy(path, &["error", "stdin", "stdout", "stderr"], &input).await?;
    ensure!(seen["stdout"]["bytes"] == input.len(), "{}", seen["stdout"]["bytes"]);
    let sum = Command::new(prerequisites::program("sha256sum", "coreutils")?);
    let sum = run(sum, Some(&input), Duration::from_secs(30)).await?.ok()?;
    ensure!(seen["stdout"]["sha256"].as_str().is_some_and(|hash| sum.starts_with(hash)), "the bytes differ");
    ensure!(seen["stderr"]["text"] == "oops\n", "{}", seen["stderr"]);
    let status: Value = serde_json::from_str(seen["error"]["text"].as_str().unwrap_or_default())?;
    ensure!(status["reason"] == "NonZeroExitCode" && status["details"]["causes"][0]["message"] == "3", "{status}");

    let seen = kubelet.spdy("/portForward/default/vm", &["error", "data"], b"SSH-2.0-test\r\n").await?;
    let text = seen["data"]["text"].as_str().unwrap_or_default();
    ensure!(text.starts_with(BANNER) && seen["error"]["bytes"] == 0, "{seen:?}");
    Ok(())
}

/// Promise 6: no kubelet endpoint answers an unauthenticated or unauthorized caller.
#[tokio::test(flavor = "multi_thread")]
async fn the_agent_answers_those_with_rights_and_nobody_else() -> Result<()> {
    let (home, up) = machine("rights").await?;
    let kubelet = Kubelet::of(&home, &up).await?;
    let (nobody, admin) = (kubelet.client(false)?, kubelet.client(true)?);
    let paths = [
        "/healthz",
        "/pods",
        "/runningpods/",
        "/configz",
        "/stats/summary",
        "/metrics",
        "/metrics/resource",
        "/metrics/probes",
        "/containerLogs/default/vm/machine?tailLines=1",
    ];
    for path in paths {
        let refused = nobody.get(kubelet.url(path)).send().await?.status();
        ensure!(refused == 401, "{path} answered {refused} to nobody");
        let forged = nobody.get(kubelet.url(path)).bearer_auth("forged").send().await?.status();
        ensure!(forged == 401, "{path} answered {forged} to a forged token");
        let allowed = admin.get(kubelet.url(path)).send().await?;
        ensure!(allowed.status() == 200, "{path} answered {} to an administrator", allowed.status());
    }
    let run = kubelet.url("/run/default/vm/machine?cmd=hostname");
    ensure!(nobody.post(&run).send().await?.status() == 401);
    ensure!(admin.post(&run).send().await?.text().await?.trim() == "vm");

    // A service account that nobody gave rights.
    let token = up.kubectl(&["create", "token", "default"]).await?;
    if let Ok(token) = token.ok() {
        let refused = nobody.get(kubelet.url("/pods")).bearer_auth(token.trim()).send().await?;
        ensure!(refused.status() == 403, "{}", refused.status());
    }
    let metrics = admin.get(kubelet.url("/metrics/resource")).send().await?.text().await?;
    let cpu = r#"container_cpu_usage_seconds_total{container="machine",namespace="default",pod="vm"} "#;
    ensure!(metrics.lines().any(|line| line.starts_with(cpu)), "{metrics}");
    Ok(())
}
