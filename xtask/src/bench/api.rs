//! The embedded API over Debian's etcd: durable creates beside durable puts of the same bytes, a long list, watch
//! fan-out, and memory with 10 000 pods.
//!
//! Both servers are asked by the same HTTP client of this process, with kept-alive connections: vmpod over TLS, as it serves everybody,
//! etcd without TLS through its JSON gateway, which carries keys and values in base64. The gateway costs etcd a translation
//! that its gRPC clients don't pay; TLS, validation and defaulting cost vmpod what a put does not pay. The two are measured
//! in turns.
//!
//! The pods name a scheduler that nobody runs, so that a create is one write and not also a scheduler's events.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::{Api, DeleteParams, ListParams, PostParams, WatchEvent, WatchParams};
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use kube::core::Request;
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use super::process::{self, Owned};
use super::samples::Samples;
use super::server;

const START: Duration = Duration::from_mins(1);
/// So many watches share a client, so that no limit on the streams of one connection is in the way.
const WATCHES_PER_CLIENT: usize = 50;

pub(super) fn run(quick: bool, program: Option<PathBuf>, root: &Path) -> Result<()> {
    let program = program.map_or_else(|| server::build(root), Ok)?;
    let program = fs::canonicalize(&program).with_context(|| format!("no program {}", program.display()))?;
    rustls::crypto::ring::default_provider().install_default().ok();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // Both stores are in one directory, so that they are on one disk.
    let scratch = tempfile::Builder::new().prefix("vmpod-bench-").tempdir_in(root.join("target"))?;
    let home = scratch.path().join("home");
    let up = server::up(&program, &home, &scratch.path().join("up.log"))?;
    let port = free_port()?;
    let mut etcd = etcd(scratch.path(), port)?;
    let size = if quick { Size::QUICK } else { Size::FULL };
    let outcome = runtime.block_on(async {
        let etcd_client = Client::try_from(Config::new(format!("http://127.0.0.1:{port}").parse()?))?;
        wait_for_etcd(&etcd_client, &mut etcd).await?;
        measure(&home, &etcd_client, up.id(), size).await
    });
    drop(runtime);
    up.end(Duration::from_mins(1))?;
    etcd.end(Duration::from_secs(20))?;
    outcome?.print(size);
    Ok(())
}

/// How much is done.
#[derive(Clone, Copy)]
struct Size {
    /// Turns of the comparison.
    turns: u32,
    /// Writes of one turn by one client, and by 16 together.
    alone: usize,
    together: usize,
    pods: usize,
    events: usize,
}

impl Size {
    const FULL: Self = Self { turns: 5, alone: 200, together: 1600, pods: 10_000, events: 200 };
    const QUICK: Self = Self { turns: 2, alone: 50, together: 320, pods: 2_000, events: 30 };
}

/// Writes in a second, milliseconds and MiB.
#[derive(Default)]
struct Figures {
    creates_alone: Samples,
    puts_alone: Samples,
    creates: Samples,
    puts: Samples,
    list_ms: f64,
    few: FanOut,
    many: FanOut,
    rss: f64,
}

/// Milliseconds until a watcher has the event: since the write was sent, and since it was acknowledged.
#[derive(Default)]
struct FanOut {
    sent: Samples,
    acknowledged: Samples,
}

async fn measure(home: &Path, etcd: &Client, agent: u32, size: Size) -> Result<Figures> {
    let client = client(home).await?;
    let mut figures = Figures::default();
    for turn in 0..size.turns {
        let creates = |clients, count| creates(&client, format!("turn-{turn}-{clients}"), clients, count);
        let puts = |clients, count| puts(etcd, format!("turn-{turn}-{clients}"), clients, count);
        figures.creates_alone.push(creates(1, size.alone).await?);
        figures.puts_alone.push(puts(1, size.alone).await?);
        figures.creates.push(creates(16, size.together).await?);
        figures.puts.push(puts(16, size.together).await?);
        crate::say(&format!("turn {} of {} done", turn + 1, size.turns));
    }
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    let there = pods.list_metadata(&ListParams::default()).await?.items.len();
    creates(&client, "more".to_owned(), 16, size.pods.saturating_sub(there)).await?;
    figures.rss = process::resident_mib(agent)?;
    let asked = Instant::now();
    let request = Request::new("/api/v1/namespaces/default/pods").list(&ListParams::default())?;
    let text = client.request_text(request).await?;
    figures.list_ms = milliseconds(asked.elapsed());
    let list: Value = serde_json::from_str(&text)?;
    let listed = list["items"].as_array().map_or(0, Vec::len);
    ensure!(listed >= size.pods, "only {listed} pods were listed");
    figures.few = fan_out(home, 100, size.events).await?;
    figures.many = fan_out(home, 1000, size.events).await?;
    Ok(figures)
}

async fn client(home: &Path) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(home.join("kubeconfig"))?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

fn pod(name: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": "bench", "tier": "runner"}},
        "spec": {
            "schedulerName": "nobody",
            "containers": [{
                "name": "main",
                "image": "tiny",
                "command": ["/bin/sh", "-c", "sleep 1000000"],
                "env": [{"name": "NUMBER", "value": name}],
                "resources": {"requests": {"cpu": "1", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "256Mi"}},
            }],
        },
    })
}

/// Creates pods; how many in a second.
async fn creates(client: &Client, prefix: String, clients: usize, count: usize) -> Result<f64> {
    rate(clients, count, |number| {
        let (client, name) = (client.clone(), format!("{prefix}-{number}"));
        async move {
            let body = serde_json::to_vec(&pod(&name))?;
            let request = Request::new("/api/v1/namespaces/default/pods").create(&PostParams::default(), body)?;
            client.request_text(request).await?;
            Ok(())
        }
    })
    .await
}

/// Puts the same bytes under the same names; how many in a second.
async fn puts(client: &Client, prefix: String, clients: usize, count: usize) -> Result<f64> {
    rate(clients, count, |number| {
        let (client, name) = (client.clone(), format!("{prefix}-{number}"));
        async move {
            let value = base64(&serde_json::to_vec(&pod(&name))?);
            let key = base64(format!("/registry/pods/default/{name}").as_bytes());
            let body = serde_json::to_vec(&json!({"key": key, "value": value}))?;
            client.request_text(Request::new("/v3/kv/put").create(&PostParams::default(), body)?).await?;
            Ok(())
        }
    })
    .await
}

/// Runs `work` for the numbers below `count`, shared among some clients; how many were done in a second.
async fn rate<F>(clients: usize, count: usize, work: impl FnMut(usize) -> F) -> Result<f64>
where
    F: Future<Output = Result<()>>,
{
    let begun = Instant::now();
    let work = futures::stream::iter((0..count).map(work));
    work.buffer_unordered(clients).try_collect::<Vec<()>>().await?;
    Ok(count_of(count) / begun.elapsed().as_secs_f64())
}

/// Watches config maps with some watchers while they are made one after the other.
async fn fan_out(home: &Path, watchers: usize, events: usize) -> Result<FanOut> {
    let writer: Api<ConfigMap> = Api::default_namespaced(client(home).await?);
    let label = format!("watchers={watchers}");
    let mut tasks = JoinSet::new();
    let begin = Arc::new(Barrier::new(watchers + 1));
    let mut shared = None;
    let since = writer.list_metadata(&ListParams::default()).await?.metadata.resource_version.unwrap_or_default();
    for number in 0..watchers {
        if number % WATCHES_PER_CLIENT == 0 {
            shared = Some(client(home).await?);
        }
        let maps: Api<ConfigMap> = Api::default_namespaced(shared.clone().context("a client was made")?);
        let (label, since, begin) = (label.clone(), since.clone(), begin.clone());
        tasks.spawn(async move {
            let stream = maps.watch(&WatchParams::default().labels(&label).timeout(290), &since).await;
            // Also when it failed, for the others wait.
            begin.wait().await;
            let mut stream = stream?.boxed();
            let mut seen = Vec::with_capacity(events);
            while seen.len() < events {
                match stream.try_next().await?.context("a watch ended early")? {
                    WatchEvent::Added(map) => seen.push((map.name_any(), Instant::now())),
                    WatchEvent::Error(status) => bail!("a watch failed: {}", status.message),
                    _ => {}
                }
            }
            anyhow::Ok(seen)
        });
    }
    begin.wait().await;
    let mut written = std::collections::HashMap::new();
    for number in 0..events {
        let name = format!("fan-{watchers}-{number}");
        let map: ConfigMap = serde_json::from_value(json!({
            "metadata": {"name": name, "labels": {"watchers": watchers.to_string()}},
            "data": {"number": number.to_string()},
        }))?;
        let sent = Instant::now();
        writer.create(&PostParams::default(), &map).await?;
        written.insert(name, (sent, Instant::now()));
        // Each event by itself: what is asked is how late one comes, not how many go through.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut figures = FanOut::default();
    while let Some(seen) = tasks.join_next().await {
        for (name, at) in seen?? {
            let (sent, acknowledged) = written.get(&name).with_context(|| format!("nobody made {name}"))?;
            figures.sent.push(milliseconds(at.saturating_duration_since(*sent)));
            figures.acknowledged.push(milliseconds(at.saturating_duration_since(*acknowledged)));
        }
    }
    writer.delete_collection(&DeleteParams::default(), &ListParams::default().labels(&label)).await?;
    Ok(figures)
}

fn etcd(scratch: &Path, port: u16) -> Result<Owned> {
    let (url, peer) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{}", free_port()?));
    let mut command = Command::new("etcd");
    command.arg("--data-dir").arg(scratch.join("etcd")).args([
        "--name=bench",
        "--logger=zap",
        "--log-level=error",
        &format!("--listen-client-urls={url}"),
        &format!("--advertise-client-urls={url}"),
        &format!("--listen-peer-urls={peer}"),
        &format!("--initial-advertise-peer-urls={peer}"),
        &format!("--initial-cluster=bench={peer}"),
    ]);
    Owned::start(&mut command, &scratch.join("etcd.log")).context("is etcd there? scripts/prerequisites bench")
}

async fn wait_for_etcd(client: &Client, etcd: &mut Owned) -> Result<()> {
    let until = Instant::now() + START;
    loop {
        let body = serde_json::to_vec(&json!({"key": base64(b"ready"), "value": ""}))?;
        let request = Request::new("/v3/kv/put").create(&PostParams::default(), body)?;
        match client.request_text(request).await {
            Ok(_) => return Ok(()),
            Err(error) if etcd.has_ended().is_some() || Instant::now() > until => {
                return Err(error).context("etcd did not come up");
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn count_of(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

/// Base64 with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |at: usize| u32::from(chunk.get(at).copied().unwrap_or_default());
        let bits = (byte(0) << 16) | (byte(1) << 8) | byte(2);
        for at in 0..4 {
            let digit = DIGITS[((bits >> (18 - 6 * at)) & 63) as usize];
            text.push(if at <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

impl Figures {
    fn over_etcd(&self) -> f64 {
        self.creates.median() / self.puts.median()
    }

    fn print(&self, size: Size) {
        let line = |name: &str, figure: f64, unit: &str| crate::print(&format!("{name:<58} {figure:>9.2} {unit}"));
        line("creates of pods, 1 client", self.creates_alone.median(), "/s");
        line("etcd puts of the same bytes, 1 client", self.puts_alone.median(), "/s");
        line("creates of pods, 16 clients", self.creates.median(), "/s");
        line("etcd puts of the same bytes, 16 clients", self.puts.median(), "/s");
        line("creates over puts, 16 clients", self.over_etcd(), "×");
        line(&format!("list of {} pods", size.pods), self.list_ms, "ms");
        for (watchers, figures) in [(100, &self.few), (1000, &self.many)] {
            line(&format!("{watchers} watchers, write sent → event, p50"), figures.sent.percentile(50), "ms");
            line(&format!("{watchers} watchers, write sent → event, p99"), figures.sent.percentile(99), "ms");
            let p99 = figures.acknowledged.percentile(99);
            line(&format!("{watchers} watchers, write acknowledged → event, p99"), p99, "ms");
        }
        line(&format!("resident memory with {} pods", size.pods), self.rss, "MiB");
        let json = json!({
            "bench": "api",
            "turns": size.turns,
            "pods": size.pods,
            "creates_over_etcd": self.over_etcd(),
            "creates_per_s": self.creates.median(),
            "creates_1_client_per_s": self.creates_alone.median(),
            "etcd_puts_per_s": self.puts.median(),
            "etcd_puts_1_client_per_s": self.puts_alone.median(),
            "list_ms": self.list_ms,
            "watch_p50_ms": self.few.sent.percentile(50),
            "watch_p99_ms": self.few.sent.percentile(99),
            "watch_after_ack_p99_ms": self.few.acknowledged.percentile(99),
            "watch_1000_p50_ms": self.many.sent.percentile(50),
            "watch_1000_p99_ms": self.many.sent.percentile(99),
            "rss_10k_mib": if size.pods >= 10_000 { json!(self.rss) } else { Value::Null },
        });
        crate::print(&json.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_padded() {
        let cases = [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy"), ("??>", "Pz8+")];
        for (plain, text) in cases {
            assert_eq!(base64(plain.as_bytes()), text);
        }
    }
}
