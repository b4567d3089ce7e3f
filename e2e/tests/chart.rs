//! The Helm chart: what it renders, what real helm makes of it, and that the operator gets by with the rights that it gives.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::queue::{Queue, RUNNER_TOKEN, TOKEN};
use e2e::{Home, Ran, eventually_within, prerequisites, run};
use kube::ResourceExt as _;
use serde_json::{Value, json};
use tokio::process::Command;

fn chart() -> PathBuf {
    prerequisites::repository().join("charts/vmpod")
}

async fn helm(args: &[&str]) -> Result<Ran> {
    let mut command = Command::new(prerequisites::helm()?);
    // What helm keeps is nobody's business here.
    let scratch = prerequisites::scratch()?;
    command.args(args).env("HOME", &scratch);
    run(command, None, Duration::from_mins(2)).await
}

const EVERYTHING: [&str; 8] = [
    "--set=image=registry.example.com/vmpod:1",
    "--set=serviceMonitor.create=true,prometheusRule.create=true,dashboard.create=true",
    "--set=poolNamespaces={ci}",
    "--set-json=scaledObjects=[{\"pool\":\"large\",\"namespace\":\"ci\",\"max\":9,\"triggers\":[{\"type\":\"cron\",\"metadata\":{}}]}]",
    "--set-json=tolerations=[{\"operator\":\"Exists\"}]",
    "--set-json=env=[{\"name\":\"HTTPS_PROXY\",\"value\":\"http://proxy:3128\"}]",
    "--set=priorityClassName=high,nodeSelector.a=b,podAnnotations.a=b",
    "--namespace=fleet",
];

#[tokio::test]
async fn its_definitions_are_those_of_the_program() -> Result<()> {
    let mut names = Vec::new();
    for definition in vmpod_api::definitions() {
        let name = definition.spec.names.plural.clone();
        let path = chart().join("crds").join(format!("{name}.json"));
        let there: Value = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
        let same = there == serde_json::to_value(&definition)?;
        ensure!(same, "{} isn't what {} is: run `cargo xtask crds`", path.display(), definition.name_any());
        names.push(format!("{name}.json"));
    }
    names.sort();
    ensure!(e2e::home::entries(&chart().join("crds"))? == names);
    Ok(())
}

#[tokio::test]
async fn what_it_renders_is_what_was_asked_for() -> Result<()> {
    let chart = chart().to_string_lossy().into_owned();
    helm(&["lint", "--strict", &chart, "--set=image=x"]).await?.ok()?;
    let mut args = vec!["template", "v", &chart];
    args.extend(EVERYTHING);
    let text = helm(&args).await?.ok()?;
    let kinds: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("kind: ")).collect();
    for kind in [
        "ServiceAccount",
        "ClusterRole",
        "ClusterRoleBinding",
        "Role",
        "RoleBinding",
        "Deployment",
        "Service",
        "NetworkPolicy",
        "ServiceMonitor",
        "PrometheusRule",
        "ConfigMap",
        "ScaledObject",
    ] {
        ensure!(kinds.contains(&kind), "no {kind} among {kinds:?}");
    }
    // Secrets are read where pools are, and not everywhere.
    let cluster_role =
        text.split("\n---\n").find(|part| part.contains("kind: ClusterRole\n")).context("no ClusterRole")?;
    ensure!(!cluster_role.contains("secrets"), "{cluster_role}");
    // What alerts say of labels is Prometheus' to fill in, not helm's.
    ensure!(text.contains("{{ $labels.namespace }}/{{ $labels.pool }}"), "{text}");
    // KEDA's own way in, with its certificate.
    let keda = helm(&["template", "v", &chart, "--set=image=x,keda.enabled=true,keda.tlsSecret=certs"]).await?.ok()?;
    for line in [
        "- --keda-listen=0.0.0.0:6000",
        "- --keda-tls-key=/keda/tls.key",
        "- {name: keda, secret: {secretName: certs}}",
        "- {protocol: TCP, port: 6000}",
        "- {name: grpc, port: 6000, targetPort: keda}",
    ] {
        ensure!(keda.contains(line), "no {line:?} in {keda}");
    }
    // As little as possible, unless asked.
    let bare = helm(&["template", "v", &chart, "--set=image=x"]).await?.ok()?;
    ensure!(!bare.contains("keda"), "{bare}");
    for kind in ["ServiceMonitor", "PrometheusRule", "ScaledObject", "ConfigMap"] {
        ensure!(!bare.contains(&format!("kind: {kind}\n")), "{kind} wasn't asked for");
    }
    for (wrong, why) in [
        ("--set=image=", "image: name the container image"),
        ("--set=image=x,poll=often", "poll"),
        ("--set=image=x,replica=3", "replica"),
        ("--set-json=scaledObjects=[{\"pool\":\"x\"}]", "namespace"),
    ] {
        helm(&["template", "v", &chart, wrong]).await?.expect_failure(why)?;
    }
    Ok(())
}

/// Without Helm, and by Debian's package.
#[tokio::test]
async fn plain_manifests_are_what_the_chart_renders() -> Result<()> {
    let home = Home::new("manifests")?;
    let plain =
        home.vmpod(&["manifests", "--image", "registry.example.com/vmpod:1", "--namespace", "fleet"]).await?.ok()?;
    let chart = chart().to_string_lossy().into_owned();
    let image = "--set=image=registry.example.com/vmpod:1";
    let rendered = helm(&["template", "vmpod", &chart, image, "--namespace=fleet", "--include-crds"]).await?.ok()?;
    // As a set of objects, without what tells who keeps them.
    let objects = async |text: &str| -> Result<Vec<String>> {
        let program = "import sys, json, yaml
for object in yaml.safe_load_all(sys.stdin):
    if not object or object['kind'] == 'Namespace': continue
    def strip(value):
        if isinstance(value, dict): return {k: strip(v) for k, v in value.items() if k not in ('helm.sh/chart', 'app.kubernetes.io/managed-by')}
        return [strip(v) for v in value] if isinstance(value, list) else value
    print(json.dumps(strip(object), sort_keys=True))";
        let mut python = Command::new(prerequisites::program("python3", "python3")?);
        python.args(["-c", program]).env("PYTHONPATH", prerequisites::python()?);
        let text = run(python, Some(text.as_bytes()), Duration::from_mins(1)).await?.ok()?;
        let mut all: Vec<String> = text.lines().map(str::to_owned).collect();
        all.sort();
        Ok(all)
    };
    let (plain_objects, rendered) = (objects(&plain).await?, objects(&rendered).await?);
    ensure!(plain_objects.len() > 8, "{plain}");
    ensure!(plain_objects == rendered, "run `cargo xtask crds`: {plain_objects:#?} {rendered:#?}");
    // As far as the embedded API has the kinds, it takes them.
    let up = home.up(&[]).await?;
    let kinds = home.vmpod(&["manifests", "--kinds-only"]).await?.ok()?;
    up.kubectl_with(&["apply", "--server-side", "-f", "-"], Some(kinds.as_bytes())).await?.ok()?;
    up.kubectl_ok(&["get", "runnerpools,runners"]).await?;
    up.stop().await
}

#[tokio::test]
async fn debians_package_has_the_program_and_its_services() -> Result<()> {
    let root = prerequisites::repository();
    let mut build = Command::new(root.join("packaging/debian/build"));
    // A program with all its symbols takes long to compress.
    build.arg(prerequisites::vmpod()?).env("DPKG_DEB_COMPRESSOR_TYPE", "none");
    let path = root.join(run(build, None, Duration::from_mins(3)).await?.ok()?.trim());
    let scratch = tempfile::tempdir()?;
    let dpkg = async |args: &[&str]| {
        let mut command = Command::new(prerequisites::program("dpkg-deb", "dpkg")?);
        command.args(args);
        run(command, None, Duration::from_mins(2)).await?.ok()
    };
    let (deb, out) = (path.to_string_lossy().into_owned(), scratch.path().to_string_lossy().into_owned());
    let field = dpkg(&["--field", &deb, "Package", "Depends", "Recommends"]).await?;
    ensure!(
        field.contains("Package: vmpod") && field.contains("libc6") && field.contains("qemu-system-x86"),
        "{field}"
    );
    dpkg(&["--extract", &deb, &out]).await?;
    let mut program = Command::new(scratch.path().join("usr/bin/vmpod"));
    program.arg("version");
    ensure!(run(program, None, Duration::from_mins(1)).await?.ok()?.starts_with("vmpod "), "it doesn't run");
    for (part, words) in [("up", "up --keep-vms"), ("node", "node --keep-vms")] {
        let unit =
            std::fs::read_to_string(scratch.path().join(format!("usr/lib/systemd/system/vmpod-{part}.service")))?;
        ensure!(unit.contains(&format!("EnvironmentFile=/etc/default/vmpod-{part}\n")), "{unit}");
        let start = format!("ExecStart=/usr/bin/vmpod --home /var/lib/vmpod {words} $VMPOD_ARGS\n");
        ensure!(unit.contains(&start) && unit.contains("KillMode=process"), "{unit}");
        ensure!(scratch.path().join(format!("etc/default/vmpod-{part}")).exists(), "no arguments of {part}");
    }
    std::fs::remove_file(path)?;
    Ok(())
}

/// A kubeconfig like another one, for somebody else.
fn kubeconfig_of(admin: &str, token: &str) -> Result<String> {
    let client = ["client-certificate-data:", "client-key-data:"];
    let mut out = Vec::new();
    let mut told = false;
    for line in admin.lines() {
        match client.iter().any(|word| line.trim_start().starts_with(word)) {
            true if told => {}
            true => {
                let indent = line.len() - line.trim_start().len();
                out.push(format!("{}token: {token}", " ".repeat(indent)));
                told = true;
            }
            false => out.push(line.to_owned()),
        }
    }
    ensure!(told, "the kubeconfig has no certificate");
    Ok(out.join("\n"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_gets_by_with_the_rights_that_it_gives() -> Result<()> {
    let queue = Queue::start().await?;
    let home = Home::new("chart")?;
    let up = home.up(&[]).await?;
    let admin = up.kubeconfig().to_string_lossy().into_owned();
    let chart = chart().to_string_lossy().into_owned();
    up.kubectl_ok(&["create", "namespace", "ci"]).await?;
    // Deployments, Services and NetworkPolicies are kinds of clusters.
    let only = "--set=deployment=false,metrics.service=false,networkPolicy.create=false,poolNamespaces={ci}";
    let install = ["install", "vmpod", &chart, only, "--kubeconfig", &admin, "--wait", "--timeout=60s"];
    let said = helm(&install).await?.ok()?;
    ensure!(said.contains("STATUS: deployed") && said.contains("--no-install"), "{said}");

    // The examples are what the definitions take.
    for example in ["runnerpool.yaml", "runnerpool-http.yaml"] {
        let path = prerequisites::repository().join("examples").join(example);
        up.kubectl_ok(&["apply", "--dry-run=server", "-f", &path.to_string_lossy()]).await?;
    }

    let token = up.kubectl_ok(&["create", "token", "vmpod"]).await?;
    let own = home.path().join("operator.kubeconfig");
    std::fs::write(&own, kubeconfig_of(&std::fs::read_to_string(&admin)?, token.trim())?)?;
    let log = home.path().join("operator.log");
    let mut controller = home.command()?;
    controller
        .args(["--log", "info,vmpod_fleet=debug", "controller", "--no-install", "--fleet-poll", "1s", "--kubeconfig"])
        .arg(&own);
    controller.stdout(Stdio::null()).stderr(std::fs::File::create(&log)?);
    let mut controller = controller.kill_on_drop(true).spawn()?;

    for (name, token) in [("queue", TOKEN), ("runner", RUNNER_TOKEN)] {
        let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": "ci"}, "stringData": {"token": token}});
        up.apply(&secret).await?;
    }
    let pool = json!({
        "apiVersion": "vmpod.dev/v1alpha1", "kind": "RunnerPool", "metadata": {"name": "plain", "namespace": "ci"},
        "spec": {
            "provider": {"http": {"url": queue.url(), "tokenSecretRef": {"name": "queue", "key": "token"},
                "runnerTokenSecretRef": {"name": "runner", "key": "token"}}},
            "image": "none", "userData": "#!/bin/sh\n", "scale": {"min": 2, "max": 2},
            "placements": [{"name": "nowhere", "nodeSelector": {"site": "nowhere"}}],
        },
    });
    up.apply(&pool).await?;
    let seen = eventually_within(Duration::from_secs(40), "two runners have pods, and the pool says so", || async {
        let all = up.kubectl_ok(&["-n", "ci", "get", "runners,pods,pdb", "-o", "name"]).await?;
        let count = |kind: &str| all.lines().filter(|line| line.starts_with(kind)).count();
        ensure!(count("runner.vmpod.dev/") == 2 && count("pod/") == 2 && count("poddisruptionbudget") == 1, "{all}");
        let why = "jsonpath={.status.conditions[?(@.type==\"ProviderReady\")].reason} {.status.replicas}";
        let status = up.kubectl_ok(&["-n", "ci", "get", "runnerpool", "plain", "-o", why]).await?;
        ensure!(status == "Registered 2", "{status}");
        Ok(())
    })
    .await;
    seen.with_context(|| std::fs::read_to_string(&log).unwrap_or_default())?;
    up.kubectl_ok(&["-n", "ci", "delete", "runnerpool", "plain", "--timeout=40s"]).await?;
    eventually_within(Duration::from_secs(20), "nothing of the pool is left", || async {
        let all = up.kubectl_ok(&["-n", "ci", "get", "runners,pods,pdb,secrets", "-o", "name"]).await?;
        ensure!(all.lines().collect::<Vec<_>>() == ["secret/queue", "secret/runner"], "{all}");
        Ok(())
    })
    .await?;
    controller.start_kill()?;
    controller.wait().await?;
    let said = std::fs::read_to_string(&log)?;
    ensure!(said.contains("this operator leads"), "{said}");
    ensure!(!said.contains("forbidden") && !said.contains("aren't protected"), "{said}");
    // And no more than that: Secrets of other namespaces are none of its business.
    let other = ["auth", "can-i", "get", "secrets", "-n", "default", "--as", "system:serviceaccount:default:vmpod"];
    ensure!(up.kubectl(&other).await?.stdout.trim() == "no");
    helm(&["uninstall", "vmpod", "--kubeconfig", &admin]).await?.ok()?;
    up.stop().await
}
