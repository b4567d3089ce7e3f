//! A pool behind a plain HTTP queue, watched by a real Prometheus; the alert rules and the dashboard are what Prometheus takes.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::queue::{Queue, RUNNER_TOKEN, TOKEN};
use e2e::{Home, Up, eventually_within, prerequisites};
use serde_json::{Value, json};
use tokio::process::Command;

#[tokio::test]
async fn the_rules_are_what_they_should_be() -> Result<()> {
    let promtool = prerequisites::program("promtool", "prometheus")?;
    let dir = prerequisites::repository().join("charts/vmpod/files");
    for args in [["check", "rules", "fleet.rules.yml"], ["test", "rules", "fleet.test.yml"]] {
        let out = Command::new(&promtool).args(args).current_dir(&dir).output().await?;
        let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        ensure!(out.status.success(), "promtool {args:?}:\n{said}");
    }
    Ok(())
}

/// A Prometheus that looks at one address each second.
struct Prometheus {
    _child: tokio::process::Child,
    _dir: tempfile::TempDir,
    url: String,
}

impl Prometheus {
    fn start(target: &str) -> Result<Self> {
        // Another test of this process may have been faster.
        drop(rustls::crypto::ring::default_provider().install_default());
        let program = prerequisites::program("prometheus", "prometheus")?;
        let dir = tempfile::tempdir_in(prerequisites::scratch()?)?;
        let rules = prerequisites::repository().join("charts/vmpod/files/fleet.rules.yml");
        let config = json!({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [rules],
            "scrape_configs": [{"job_name": "fleet", "static_configs": [{"targets": [target]}]}],
        });
        // YAML takes JSON.
        std::fs::write(dir.path().join("config.yml"), config.to_string())?;
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let child = Command::new(program)
            .arg(format!("--config.file={}", dir.path().join("config.yml").display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdout(std::process::Stdio::null())
            .stderr(std::fs::File::create(dir.path().join("log"))?)
            .kill_on_drop(true)
            .spawn()?;
        Ok(Self { _child: child, _dir: dir, url: format!("http://127.0.0.1:{port}") })
    }

    async fn ask(&self, path: &str, query: &[(&str, &str)]) -> Result<Value> {
        let url = reqwest::Url::parse_with_params(&format!("{}/api/v1/{path}", self.url), query)?;
        let answer: Value = reqwest::get(url).await?.json().await?;
        ensure!(answer["status"] == "success", "{path} {query:?}: {answer}");
        Ok(answer["data"].clone())
    }
}

async fn pool(up: &Up, queue: &Queue) -> Result<()> {
    pool_by(up, queue, "seed").await
}

/// A pool whose guests get their user data in this way.
async fn pool_by(up: &Up, queue: &Queue, way: &str) -> Result<()> {
    for (name, token) in [("queue", TOKEN), ("runner", RUNNER_TOKEN)] {
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": "default"},
            "stringData": {"token": token},
        });
        up.apply(&secret).await?;
    }
    eventually_within(Duration::from_mins(1), "the kinds of the fleet are there", || async {
        up.kubectl_ok(&["get", "runnerpools,runners"]).await.map(drop)
    })
    .await?;
    up.apply(&json!({
        "apiVersion": "vmpod.dev/v1alpha1", "kind": "RunnerPool",
        "metadata": {"name": "plain", "namespace": "default"},
        "spec": {
            "provider": {"http": {
                "url": queue.url(), "tokenSecretRef": {"name": "queue", "key": "token"},
                "runnerTokenSecretRef": {"name": "runner", "key": "token"},
            }},
            "image": "tiny",
            "resources": {"cpu": "500m", "memory": "192Mi"},
            "userData": queue.user_data(10),
            "userDataBy": way,
            "placements": [{"name": "here"}],
            "scale": {"max": 2, "scaleDownSeconds": 0},
            "rollout": {"drainSeconds": 60},
        },
    }))
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_queue_gets_machines_and_prometheus_sees_them() -> Result<()> {
    let queue = Queue::start().await?;
    let home = Home::with_tiny("fleet-queue").await?;
    let up = home.up(&["--fleet-poll", "1s", "--metrics-listen", "127.0.0.1:0"]).await?;
    let prometheus = Prometheus::start(&up.metrics_address()?)?;
    // Two providers are one too many, and none too few.
    let both = json!({"apiVersion": "vmpod.dev/v1alpha1", "kind": "RunnerPool", "metadata": {"name": "bad", "namespace": "default"},
        "spec": {"provider": {}, "image": "tiny"}});
    eventually_within(Duration::from_mins(1), "the rules of the kind are kept", || async {
        let refused = up.apply(&both).await.err().map(|error| format!("{error:#}")).unwrap_or_default();
        ensure!(refused.contains("name either gitlab or http"), "{refused}");
        Ok(())
    })
    .await?;
    pool(&up, &queue).await?;
    queue.with(|state| state.pending.extend([tokio::time::Instant::now(); 2]));

    // While a runner has a job nobody may evict it.
    eventually_within(Duration::from_mins(3), "the operator knows of a busy runner", || async {
        let pool = up.kubectl_ok(&["get", "runnerpool", "plain", "-o", "jsonpath={.status.busy}"]).await?;
        ensure!(pool.trim().parse::<u32>().is_ok_and(|busy| busy > 0), "busy: {pool}");
        Ok(())
    })
    .await?;
    let busy = queue.with(|state| state.runners.iter().find(|(_, busy)| **busy).map(|(name, _)| name.clone()));
    let busy = busy.context("no runner is busy")?;
    let eviction =
        json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": busy, "namespace": "default"}});
    let path = format!("/api/v1/namespaces/default/pods/{busy}/eviction");
    let refused =
        up.kubectl_with(&["create", "--raw", &path, "-f", "-"], Some(eviction.to_string().as_bytes())).await?;
    ensure!(refused.code != Some(0) && refused.stderr.contains("disruption budget"), "{refused:?}");

    eventually_within(Duration::from_mins(3), "both jobs are done", || async {
        let done = queue.with(|state| state.done.len());
        ensure!(done == 2, "{done} are done:\n{}", up.kubectl_ok(&["get", "runnerpools,runners,pods"]).await?);
        Ok(())
    })
    .await?;
    let runners = queue.with(|state| state.done.iter().cloned().collect::<BTreeSet<_>>());
    ensure!(runners.len() == 2, "each job had a machine of its own: {runners:?}");
    eventually_within(Duration::from_mins(1), "no runner is left", || async {
        let left = up.kubectl_ok(&["get", "runners,pods", "-o", "name"]).await?;
        ensure!(left.trim().is_empty(), "{left}");
        Ok(())
    })
    .await?;

    // What the rules and the dashboard speak of is there under those names, and every expression is one.
    let dashboard = std::fs::read_to_string(prerequisites::repository().join("charts/vmpod/files/fleet.json"))?;
    let dashboard: Value = serde_json::from_str(&dashboard)?;
    let panels = dashboard["panels"].as_array().context("a dashboard has panels")?;
    let rules = std::fs::read_to_string(prerequisites::repository().join("charts/vmpod/files/fleet.rules.yml"))?;
    let mut expressions: Vec<String> = Vec::new();
    for target in panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten()) {
        let text = target["expr"].as_str().context("a target has an expression")?;
        expressions.push(text.replace("$namespace", ".*").replace("$pool", ".*"));
    }
    ensure!(expressions.len() > 20, "{} expressions", expressions.len());
    for expression in &expressions {
        prometheus.ask("query", &[("query", expression)]).await?;
    }
    // What only a provider with a list of its jobs tells.
    let of_gitlab = [
        "vmpod_fleet_jobs_total",
        "vmpod_fleet_job_queue_wait_seconds_bucket",
        "vmpod_fleet_job_duration_seconds_bucket",
    ];
    // What didn't happen in this run.
    let rare =
        ["vmpod_fleet_runners_failed_total", "vmpod_fleet_runners_drained_total", "vmpod_fleet_drains_refused_total"];
    let all = expressions.join("\n") + &rules;
    let spoken = all.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    let spoken: BTreeSet<&str> = spoken.filter(|word| word.starts_with("vmpod_fleet_")).collect();
    eventually_within(Duration::from_secs(20), "Prometheus has seen all of it", || async {
        let names = prometheus.ask("label/__name__/values", &[]).await?;
        let names: BTreeSet<&str> = names.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        for name in &spoken {
            let known = names.contains(name) || of_gitlab.contains(name) || rare.contains(name);
            ensure!(known, "{name} isn't among what Prometheus found: {names:?}");
        }
        Ok(())
    })
    .await?;
    let made = prometheus.ask("query", &[("query", "vmpod_fleet_runners_created_total{pool=\"plain\"}")]).await?;
    ensure!(made["result"][0]["value"][1] == "2", "{made}");
    let steps =
        prometheus.ask("query", &[("query", "vmpod_fleet_runner_start_seconds_count{step=\"machine\"}")]).await?;
    ensure!(steps["result"][0]["value"][1] == "2", "{steps}");
    up.kubectl_ok(&["delete", "runnerpool", "plain", "--timeout=60s"]).await?;
    eventually_within(Duration::from_secs(20), "the pool's figures go with it", || async {
        let text = up.metrics().await?;
        ensure!(!text.contains("pool=\"plain\""), "{text}");
        Ok(())
    })
    .await?;
    home.assert_clean().await?;
    up.stop().await?;
    home.assert_no_process()
}

/// As macOS does: a guest that reads no user data runs it as its pod's command.
#[tokio::test(flavor = "multi_thread")]
async fn guests_that_read_no_seed_are_told_by_their_command() -> Result<()> {
    let queue = Queue::start().await?;
    let home = Home::with_tiny("fleet-command").await?;
    let up = home.up(&["--fleet-poll", "1s"]).await?;
    pool_by(&up, &queue, "command").await?;
    queue.with(|state| state.pending.push_back(tokio::time::Instant::now()));
    let pod = eventually_within(Duration::from_mins(2), "a runner has the job", || async {
        let name = queue.with(|state| state.runners.iter().find(|(_, busy)| **busy).map(|(name, _)| name.clone()));
        name.context("no runner has a job")
    })
    .await?;
    let found = up.pod(&pod).await?;
    ensure!(found["metadata"]["annotations"]["vmpod.dev/user-data-secret"].is_null(), "{found}");
    ensure!(!found.to_string().contains(RUNNER_TOKEN), "the token is in the pod: {found}");
    eventually_within(Duration::from_mins(2), "the job is done and nothing is left", || async {
        ensure!(queue.with(|state| state.done.len()) == 1, "the job isn't done");
        let left = up.kubectl_ok(&["get", "runners,pods,secrets", "-l", "vmpod.dev/runner", "-o", "name"]).await?;
        ensure!(left.trim().is_empty(), "{left}");
        Ok(())
    })
    .await?;
    up.kubectl_ok(&["delete", "runnerpool", "plain", "--timeout=60s"]).await?;
    home.assert_clean().await?;
    up.stop().await
}
