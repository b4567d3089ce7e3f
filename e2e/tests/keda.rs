//! KEDA's external scaler, asked by a client that is generated from the contract, over TLS with a client's certificate.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::queue::{Queue, RUNNER_TOKEN, TOKEN};
use e2e::{Home, Up, eventually, eventually_within, prerequisites};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// Writes an authority, a server's certificate and a client's.
fn certificates(dir: &Path) -> Result<()> {
    let key = || rcgen::KeyPair::generate();
    let mut authority = rcgen::CertificateParams::new(Vec::new())?;
    authority.distinguished_name.push(rcgen::DnType::CommonName, "an authority of the test's own");
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority_key = key()?;
    std::fs::write(dir.join("ca.pem"), authority.self_signed(&authority_key)?.pem())?;
    let issuer = rcgen::Issuer::new(authority, authority_key);
    for (name, usage) in
        [("server", rcgen::ExtendedKeyUsagePurpose::ServerAuth), ("client", rcgen::ExtendedKeyUsagePurpose::ClientAuth)]
    {
        let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
        params.extended_key_usages = vec![usage];
        let key = key()?;
        std::fs::write(dir.join(format!("{name}.pem")), params.signed_by(&key, &issuer)?.pem())?;
        std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem())?;
    }
    Ok(())
}

/// The generated client.
struct Client {
    _child: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Client {
    fn start(address: &str, certificates: &Path) -> Result<Self> {
        let tests = prerequisites::repository().join("e2e/tests/keda");
        let mut child = Command::new(prerequisites::program("python3", "python3")?)
            .arg(tests.join("client.py"))
            .arg(address)
            .arg(tests.join("externalscaler.proto"))
            .arg(certificates)
            .env("PYTHONPATH", prerequisites::python()?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stdin = child.stdin.take().context("no input")?;
        let lines = BufReader::new(child.stdout.take().context("no output")?).lines();
        Ok(Self { _child: child, stdin, lines })
    }

    async fn send(&mut self, question: &Value) -> Result<()> {
        self.stdin.write_all(format!("{question}\n").as_bytes()).await?;
        Ok(())
    }

    async fn hear(&mut self) -> Result<Value> {
        let line = tokio::time::timeout(Duration::from_mins(1), self.lines.next_line()).await;
        let line = line.context("no answer")??.context("the client has ended")?;
        Ok(serde_json::from_str(&line)?)
    }

    async fn ask(&mut self, method: &str, metadata: Value) -> Result<Value> {
        let reference = json!({"name": "plain", "namespace": "default", "scalerMetadata": metadata});
        self.send(&json!({"method": method, "reference": reference, "metric": "any"})).await?;
        self.hear().await
    }
}

async fn pool(up: &Up, queue: &Queue) -> Result<()> {
    for (name, token) in [("queue", TOKEN), ("runner", RUNNER_TOKEN)] {
        up.apply(&json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": "default"},
            "stringData": {"token": token},
        }))
        .await?;
    }
    eventually_within(Duration::from_mins(1), "the kinds of the fleet are there", || async {
        up.kubectl_ok(&["get", "runnerpools,runners"]).await.map(drop)
    })
    .await?;
    // What is asked for is all that matters here: no machine is to boot.
    up.apply(&json!({
        "apiVersion": "vmpod.dev/v1alpha1", "kind": "RunnerPool", "metadata": {"name": "plain", "namespace": "default"},
        "spec": {
            "provider": {"http": {
                "url": queue.url(), "tokenSecretRef": {"name": "queue", "key": "token"},
                "runnerTokenSecretRef": {"name": "runner", "key": "token"},
            }},
            "image": "tiny", "resources": {"cpu": "500m", "memory": "192Mi"},
            "userData": queue.user_data(1),
            "placements": [{"name": "nowhere", "nodeSelector": {"no": "such"}}],
            "scale": {"max": 2},
        },
    }))
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn keda_hears_what_a_pool_needs_and_never_zero_for_unknown() -> Result<()> {
    let queue = Queue::start().await?;
    let home = Home::new("keda")?;
    let keys = tempfile::tempdir()?;
    certificates(keys.path())?;
    let path = |name: &str| keys.path().join(name).to_string_lossy().into_owned();
    let (cert, key, ca) = (path("server.pem"), path("server.key"), path("ca.pem"));
    let tls = ["--keda-tls-cert", &cert, "--keda-tls-key", &key, "--keda-client-ca", &ca];
    let up = home.up(&[&["--fleet-poll", "1s", "--keda-listen", "127.0.0.1:0"], &tls[..]].concat()).await?;
    let log = up.log();
    let address = log.lines().find_map(|line| line.strip_prefix("KEDA: https://")).context("no address")?;
    let mut client = Client::start(address, keys.path())?;

    let missing = client.ask("IsActive", json!({})).await?;
    ensure!(missing["code"] == "NOT_FOUND" && missing["details"].to_string().contains("no RunnerPool"), "{missing}");
    pool(&up, &queue).await?;
    eventually("the pool was looked at", || async {
        let jobs = up.kubectl_ok(&["get", "runnerpool", "plain", "-o", "jsonpath={.status.pendingJobs}"]).await?;
        ensure!(jobs == "0", "{jobs:?}");
        Ok(())
    })
    .await?;
    ensure!(client.ask("IsActive", json!({})).await? == json!({"result": false}));
    let spec = client.ask("GetMetricSpec", json!({"metric": "utilization", "target": "30"})).await?;
    let wanted = json!({"metricSpecs": [
        {"metricName": "vmpod-plain-utilization", "targetSize": "30", "targetSizeFloat": 30.0}]});
    ensure!(spec == wanted, "{spec}");
    let refused = client.ask("GetMetricSpec", json!({"metric": "load"})).await?;
    ensure!(refused["code"] == "INVALID_ARGUMENT", "{refused}");

    // A job comes: who listens hears of it, and how many there are.
    let reference = json!({"name": "plain", "namespace": "default"});
    client.send(&json!({"method": "StreamIsActive", "reference": reference, "until": true})).await?;
    ensure!(client.hear().await? == json!({"result": false}));
    queue.with(|state| state.pending.extend([tokio::time::Instant::now(); 3]));
    ensure!(client.hear().await? == json!({"result": true}));
    for (metric, value) in [("jobs", 3.0), ("pendingJobs", 3.0), ("utilization", 0.0)] {
        let answer = client.ask("GetMetrics", json!({"pool": "plain", "metric": metric})).await?;
        ensure!(answer["metricValues"][0]["metricValueFloat"] == value, "{metric}: {answer}");
    }

    let answer = client.ask("GetMetrics", json!({"pool": "plain", "metric": "wait"})).await?;
    let seconds = answer["metricValues"][0]["metricValueFloat"].as_f64().with_context(|| answer.to_string())?;
    ensure!((0.0..60.0).contains(&seconds), "{answer}");

    // A queue that doesn't answer isn't an empty one.
    queue.with(|state| state.faults.extend((0..60).map(|_| (500, "down".to_owned(), None))));
    for waited in 0.. {
        let answer = client.ask("GetMetrics", json!({})).await?;
        if answer["code"] == "UNAVAILABLE" {
            break;
        }
        ensure!(waited < 40 && answer["metricValues"][0]["metricValueFloat"] == 3.0, "{answer}");
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    ensure!(client.ask("IsActive", json!({})).await? == json!({"result": true}));

    // Nobody without a certificate is heard.
    drop(rustls::crypto::ring::default_provider().install_default());
    let authority = reqwest::Certificate::from_pem(&std::fs::read(keys.path().join("ca.pem"))?)?;
    let stranger = reqwest::Client::builder().add_root_certificate(authority).build()?;
    ensure!(stranger.get(format!("https://{address}/")).send().await.is_err(), "a stranger was answered");
    up.kubectl_ok(&["delete", "runnerpool", "plain", "--timeout=60s"]).await?;
    up.stop().await
}
