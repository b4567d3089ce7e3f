//! Clients that others wrote, against the embedded API: kubectl's verbs, helm, the Python client, a kopf operator. And what
//! the program itself does with its API: export, import, bootstrap tokens.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use e2e::{Home, Ran, Up, eventually, prerequisites, run};
use serde_json::{Value, json};
use tokio::process::Command;

fn files() -> PathBuf {
    prerequisites::repository().join("e2e/tests/clients")
}

fn config_map(name: &str, value: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"key": value}})
}

/// A script that an editor is played by.
fn editor(dir: &Path, from: &str, to: &str) -> Result<String> {
    use std::os::unix::fs::PermissionsExt as _;
    let path = dir.join("editor");
    std::fs::write(&path, format!("#!/bin/sh\nexec sed -i 's/{from}/{to}/' \"$1\"\n"))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(path.to_string_lossy().into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_applies_edits_and_shows() -> Result<()> {
    let home = Home::new("verbs")?;
    let up = home.up(&[]).await?;
    let get = |path: &'static str| {
        let up = &up;
        async move { up.kubectl_ok(&["get", "configmap", "c", "-o", path]).await }
    };
    let with = |args: &'static [&'static str], object: Value| {
        let up = &up;
        async move { up.kubectl_with(args, Some(object.to_string().as_bytes())).await }
    };
    // Apply, by the client and by the server, and what would change.
    with(&["apply", "-f", "-"], config_map("c", "one")).await?.ok()?;
    let same = with(&["apply", "-f", "-"], config_map("c", "one")).await?.ok()?;
    ensure!(same.contains("unchanged"), "{same}");
    let diff = with(&["diff", "-f", "-"], config_map("c", "two")).await?.expect_code(1)?;
    ensure!(diff.stdout.contains("-  key: one") && diff.stdout.contains("+  key: two"), "{diff}");
    with(&["diff", "-f", "-"], config_map("c", "one")).await?.ok()?;
    let conflict =
        with(&["apply", "--server-side", "--field-manager=other", "-f", "-"], config_map("c", "two")).await?;
    conflict.expect_failure("conflict")?;
    let forced = &["apply", "--server-side", "--force-conflicts", "--field-manager=other", "-f", "-"];
    with(forced, config_map("c", "two")).await?.ok()?;
    ensure!(get("jsonpath={.data.key}").await? == "two");
    let dry = with(&["create", "--dry-run=server", "-o", "yaml", "-f", "-"], config_map("dry", "x")).await?.ok()?;
    ensure!(dry.contains("uid:"), "{dry}");
    up.kubectl(&["get", "configmap", "dry"]).await?.expect_failure("not found")?;
    let unknown = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "dta": {}});
    with(&["create", "-f", "-"], unknown).await?.expect_failure("unknown field \"dta\"")?;
    // Three kinds of patch, labels, annotations, an editor.
    for (kind, patch, value) in [
        ("strategic", r#"{"data":{"key":"three"}}"#, "three"),
        ("merge", r#"{"data":{"key":"four"}}"#, "four"),
        ("json", r#"[{"op":"replace","path":"/data/key","value":"five"}]"#, "five"),
    ] {
        up.kubectl_ok(&["patch", "configmap", "c", "--type", kind, "-p", patch]).await?;
        ensure!(get("jsonpath={.data.key}").await? == value, "{kind}");
    }
    up.kubectl_ok(&["label", "configmap", "c", "team=a"]).await?;
    up.kubectl(&["label", "configmap", "c", "team=b"]).await?.expect_failure("already has a value")?;
    up.kubectl_ok(&["label", "configmap", "c", "team=b", "--overwrite"]).await?;
    up.kubectl_ok(&["annotate", "configmap", "c", "note=n"]).await?;
    ensure!(get("jsonpath={.metadata.labels.team}/{.metadata.annotations.note}").await? == "b/n");
    up.kubectl_ok(&["label", "configmap", "c", "team-"]).await?;
    let scratch = tempfile::tempdir()?;
    let edit = |from: &'static str, to: &'static str| {
        let (up, dir) = (&up, scratch.path());
        async move {
            let mut command = up.kubectl_command(&["edit", "configmap", "c"])?;
            command.env("EDITOR", editor(dir, from, to)?);
            run(command, None, Duration::from_mins(1)).await
        }
    };
    edit("five", "six").await?.ok()?;
    ensure!(get("jsonpath={.data.key}").await? == "six");
    let same = edit("nothing", "else").await?;
    ensure!(same.stdout.contains("no changes made") || same.stderr.contains("no changes made"), "{same}");
    // Ways of showing.
    let columns = get("custom-columns=N:.metadata.name,K:.data.key").await?;
    ensure!(columns.split_whitespace().collect::<Vec<_>>() == ["N", "K", "c", "six"], "{columns}");
    ensure!(get("yaml").await?.contains("key: six") && get("name").await?.trim() == "configmap/c");
    ensure!(up.kubectl_ok(&["get", "configmap", "-o", "wide"]).await?.contains("DATA"));
    ensure!(up.kubectl_ok(&["describe", "configmap", "c"]).await?.contains("six"));
    let explained = up.kubectl_ok(&["explain", "pod.spec.containers.resources"]).await?;
    ensure!(explained.contains("limits") && explained.contains("Compute Resources required"), "{explained}");
    ensure!(up.kubectl_ok(&["explain", "poddisruptionbudget.spec"]).await?.contains("maxUnavailable"));
    let kinds = up.kubectl_ok(&["api-resources", "-o", "name"]).await?;
    for kind in ["pods", "roles.rbac.authorization.k8s.io", "priorityclasses.scheduling.k8s.io"] {
        ensure!(kinds.lines().any(|line| line == kind), "{kind} is not in {kinds}");
    }
    ensure!(up.kubectl_ok(&["api-versions"]).await?.contains("rbac.authorization.k8s.io/v1"));
    up.kubectl_ok(&["wait", "configmap/c", "--for=jsonpath={.data.key}=six", "--timeout=10s"]).await?;
    up.kubectl_ok(&["delete", "configmap", "c", "--cascade=foreground", "--timeout=20s"]).await?;
    up.kubectl(&["get", "configmap", "c"]).await?.expect_failure("not found")?;
    up.stop().await
}

/// A container that no image of this node is for: its pod stays Pending.
fn pending(name: &str, class: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "a"}},
        "spec": {
            "priorityClassName": class, "nodeSelector": {"no": "where"},
            "containers": [{"name": "vm", "image": "localhost:1/none:1"}],
        },
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_grants_and_asks_for_rights() -> Result<()> {
    const ACCOUNT: &str = "system:serviceaccount:default:robot";
    let home = Home::new("rights")?;
    let up = home.up(&[]).await?;
    let can = |args: &'static [&'static str]| {
        let up = &up;
        async move {
            let all = [&["auth", "can-i", "--as", ACCOUNT], args].concat();
            Ok::<_, anyhow::Error>(up.kubectl(&all).await?.stdout.trim().to_owned())
        }
    };
    ensure!(up.kubectl_ok(&["auth", "can-i", "*", "*"]).await?.trim() == "yes");
    up.kubectl_ok(&["create", "serviceaccount", "robot"]).await?;
    ensure!(can(&["get", "pods"]).await? == "no");
    up.kubectl_ok(&["create", "role", "reader", "--verb=get,list,watch", "--resource=pods,pods/log"]).await?;
    up.kubectl_ok(&["create", "rolebinding", "reader", "--role=reader", "--serviceaccount=default:robot"]).await?;
    up.kubectl_ok(&["create", "clusterrole", "paths", "--verb=get", "--non-resource-url=/logs/*"]).await?;
    up.kubectl_ok(&["create", "clusterrolebinding", "paths", "--clusterrole=paths", "--serviceaccount=default:robot"])
        .await?;
    for (args, answer) in [
        (&["get", "pods"][..], "yes"),
        (&["get", "pods", "--subresource=log"], "yes"),
        (&["delete", "pods"], "no"),
        (&["get", "pods", "-n", "kube-system"], "no"),
        (&["get", "/logs/x"], "yes"),
        (&["get", "/metrics"], "no"),
    ] {
        ensure!(can(args).await? == answer, "{args:?}");
    }
    let list = can(&["--list"]).await?;
    let has = |words: &[&str]| list.lines().any(|line| words.iter().all(|word| line.contains(word)));
    ensure!(has(&["pods/log", "[get list watch]"]) && has(&["selfsubjectaccessreviews", "[create]"]), "{list}");
    ensure!(has(&["/logs/*", "[get]"]) && !has(&["secrets"]), "{list}");
    // By its token, and not as somebody who is impersonated.
    let token = up.kubectl_ok(&["create", "token", "robot"]).await?;
    let as_robot = |args: &'static [&'static str]| {
        let (up, token) = (&up, token.trim().to_owned());
        async move { by_token(up, &token, args).await }
    };
    as_robot(&["get", "pods"]).await?.ok()?;
    let refused = as_robot(&["get", "secrets"]).await?;
    refused.expect_failure(&format!("User \"{ACCOUNT}\" cannot list resource \"secrets\""))?;
    let described = up.kubectl_ok(&["describe", "rolebinding", "reader"]).await?;
    ensure!(described.contains("robot") && described.contains("Role"), "{described}");
    let wide = up.kubectl_ok(&["get", "rolebinding", "reader", "-o", "wide"]).await?;
    ensure!(wide.contains("Role/reader") && wide.contains("default/robot"), "{wide}");
    // Priority and budgets.
    up.kubectl_ok(&["create", "priorityclass", "urgent", "--value=1000", "--description=d"]).await?;
    up.apply(&pending("p", "urgent")).await?;
    ensure!(up.pod("p").await?["spec"]["priority"] == 1000);
    up.kubectl_ok(&["create", "poddisruptionbudget", "b", "--selector=app=a", "--min-available=1"]).await?;
    eventually("the budget has a status", || async {
        let text = up.kubectl_ok(&["get", "pdb", "b", "-o", "jsonpath={.status.expectedPods}"]).await?;
        ensure!(text == "1", "{text:?}");
        Ok(())
    })
    .await?;
    let table = up.kubectl_ok(&["get", "pdb"]).await?;
    ensure!(table.contains("MIN AVAILABLE") && table.contains("N/A"), "{table}");
    let events = up.kubectl_ok(&["events", "--for", "pod/p"]).await?;
    ensure!(events.contains("FailedScheduling"), "{events}");
    up.kubectl_ok(&["delete", "pod", "p", "--timeout=30s"]).await?;
    up.stop().await
}

async fn by_token(up: &Up, token: &str, args: &[&str]) -> Result<Ran> {
    let config = token_kubeconfig(up, token).await?;
    let mut command = Command::new(prerequisites::kubectl()?);
    command.arg("--kubeconfig").arg(&config).args(args).env("HOME", up.kubeconfig().with_file_name("kubectl"));
    run(command, None, Duration::from_mins(1)).await
}

/// A kubeconfig whose only credential is a token.
async fn token_kubeconfig(up: &Up, token: &str) -> Result<PathBuf> {
    let own: Value = serde_json::from_str(&up.kubectl_ok(&["config", "view", "--raw", "-o", "json"]).await?)?;
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "clusters": own["clusters"],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "c", "context": {"cluster": own["clusters"][0]["name"], "user": "u"}}],
        "current-context": "c",
    });
    let path = up.kubeconfig().with_file_name("token-kubeconfig");
    std::fs::write(&path, config.to_string())?;
    Ok(path)
}

#[tokio::test(flavor = "multi_thread")]
async fn helm_installs_upgrades_and_uninstalls() -> Result<()> {
    let home = Home::new("helm")?;
    let up = home.up(&[]).await?;
    let chart = files().join("chart");
    let helm = |args: &'static [&'static str]| {
        let (up, chart) = (&up, &chart);
        async move {
            let mut command = Command::new(prerequisites::helm()?);
            command.arg("--kubeconfig").arg(up.kubeconfig()).args(args);
            if matches!(args[0], "install" | "upgrade") {
                command.arg(chart);
            }
            command.env("HOME", up.kubeconfig().with_file_name("helm"));
            run(command, None, Duration::from_mins(2)).await?.ok()
        }
    };
    let installed = helm(&["install", "h", "--wait", "--timeout=60s"]).await?;
    ensure!(installed.contains("STATUS: deployed"), "{installed}");
    ensure!(up.kubectl_ok(&["get", "configmap", "h", "-o", "jsonpath={.data.word}"]).await? == "hello");
    ensure!(up.kubectl_ok(&["get", "herd", "h", "-o", "jsonpath={.spec.size}"]).await? == "3");
    up.kubectl_ok(&["get", "secret", "h-extra"]).await?;
    let can = ["auth", "can-i", "patch", "herds.example.dev", "--as", "system:serviceaccount:default:h"];
    ensure!(up.kubectl_ok(&can).await?.trim() == "yes");
    helm(&["upgrade", "h", "--set", "word=world,extra=false"]).await?;
    ensure!(up.kubectl_ok(&["get", "configmap", "h", "-o", "jsonpath={.data.word}"]).await? == "world");
    up.kubectl(&["get", "secret", "h-extra"]).await?.expect_failure("not found")?;
    helm(&["rollback", "h", "1"]).await?;
    ensure!(up.kubectl_ok(&["get", "configmap", "h", "-o", "jsonpath={.data.word}"]).await? == "hello");
    let history: Value = serde_json::from_str(&helm(&["history", "h", "-o", "json"]).await?)?;
    ensure!(history.as_array().map(Vec::len) == Some(3), "{history}");
    helm(&["uninstall", "h"]).await?;
    for kind in ["configmap", "serviceaccount", "role", "rolebinding", "pdb", "herd"] {
        up.kubectl(&["get", kind, "h"]).await?.expect_failure("not found")?;
    }
    ensure!(helm(&["list", "-q"]).await?.trim().is_empty());
    up.stop().await
}

fn python(script: &str) -> Result<Command> {
    let mut command = Command::new(prerequisites::program("python3", "python3")?);
    command.env("PYTHONPATH", prerequisites::python()?).env("PYTHONUNBUFFERED", "1").arg(files().join(script));
    Ok(command)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_client_and_an_operator_work() -> Result<()> {
    let home = Home::new("python")?;
    let up = home.up(&[]).await?;
    let crd = files().join("chart/crds/herd.yaml");
    up.kubectl_ok(&["apply", "-f", &crd.to_string_lossy()]).await?;
    let mut command = python("client.py")?;
    command.arg(up.kubeconfig());
    let said = run(command, None, Duration::from_mins(2)).await?.ok()?;
    ensure!(said.contains("all is well"), "{said}");

    // The operator is a service account with just the rights that it needs.
    up.kubectl_ok(&["create", "serviceaccount", "operator"]).await?;
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "operator"},
        "rules": [
            {"apiGroups": ["example.dev"], "resources": ["herds", "herds/status"], "verbs": ["get", "list", "watch", "patch"]},
            {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["create", "update"]},
            {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]},
            {"apiGroups": [""], "resources": ["namespaces"], "verbs": ["get", "list", "watch"]},
            {"apiGroups": ["apiextensions.k8s.io"], "resources": ["customresourcedefinitions"], "verbs": ["get", "list", "watch"]},
        ],
    });
    up.apply(&role).await?;
    up.kubectl_ok(&[
        "create",
        "clusterrolebinding",
        "operator",
        "--clusterrole=operator",
        "--serviceaccount=default:operator",
    ])
    .await?;
    let token = up.kubectl_ok(&["create", "token", "operator"]).await?;
    let config = token_kubeconfig(&up, token.trim()).await?;
    let log = home.path().with_extension("operator.log");
    let file = std::fs::File::create(&log)?;
    let mut command = Command::new(prerequisites::program("python3", "python3")?);
    command.args(["-m", "kopf", "run", "--namespace", "default", "--standalone"]).arg(files().join("operator.py"));
    command.env("PYTHONPATH", prerequisites::python()?).env("KUBECONFIG", &config).env("PYTHONUNBUFFERED", "1");
    command.kill_on_drop(true).stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    let mut operator = command.spawn().context("can't start the operator")?;
    let herd = |size: u32| json!({"apiVersion": "example.dev/v1", "kind": "Herd", "metadata": {"name": "h"}, "spec": {"size": size}});
    let cows = |count: usize| {
        let (up, log) = (&up, &log);
        eventually("the herd has its cows", move || async move {
            let herd = up.kubectl_ok(&["get", "herd", "h", "-o", "json"]).await?;
            let herd: Value = serde_json::from_str(&herd)?;
            let map = up.kubectl(&["get", "configmap", "herd-h", "-o", "json"]).await?;
            let map: Value = serde_json::from_str(&map.stdout).unwrap_or_default();
            let there = map["data"].as_object().map_or(0, serde_json::Map::len);
            let told = &herd["status"]["grow"]["cows"];
            if there != count || *told != count {
                bail!("{there} are there, {told} are told:\n{}", std::fs::read_to_string(log)?);
            }
            Ok(())
        })
    };
    up.apply(&herd(2)).await?;
    cows(2).await?;
    up.apply(&herd(5)).await?;
    cows(5).await?;
    // What it made is its herd's and goes with it; its finalizer holds the herd until it has looked.
    up.kubectl_ok(&["delete", "herd", "h", "--timeout=60s"]).await?;
    eventually("the config map goes with its herd", || async {
        up.kubectl(&["get", "configmap", "herd-h"]).await?.expect_failure("not found").map(drop)
    })
    .await?;
    ensure!(std::fs::read_to_string(&log)?.contains("herd h is gone"), "{}", std::fs::read_to_string(&log)?);
    ensure!(operator.try_wait()?.is_none(), "the operator ended:\n{}", std::fs::read_to_string(&log)?);
    operator.kill().await?;
    up.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_is_another_homes_import() -> Result<()> {
    let home = Home::new("export")?;
    let up = home.up(&[]).await?;
    let crd = files().join("chart/crds/herd.yaml");
    up.kubectl_ok(&["apply", "-f", &crd.to_string_lossy()]).await?;
    up.kubectl_ok(&["create", "namespace", "farm"]).await?;
    up.apply(&json!({
        "apiVersion": "example.dev/v1", "kind": "Herd", "metadata": {"name": "h", "namespace": "farm"}, "spec": {"size": 3},
    }))
    .await?;
    up.apply(&config_map("odd", "---\n: é \"quoted\"\n---\n")).await?;
    let uid = up.kubectl_ok(&["get", "herd", "h", "-n", "farm", "-o", "jsonpath={.metadata.uid}"]).await?;
    let archive = home.path().with_extension("yaml");
    let file = archive.to_string_lossy().into_owned();
    home.vmpod(&["api", "import", &file]).await?.expect_code(1)?.expect_failure("can't read the archive")?;
    // While it runs, and when it doesn't: the same objects.
    home.vmpod(&["api", "export", &file]).await?.ok()?;
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&archive)?.permissions());
    ensure!(mode & 0o777 == 0o600, "{mode:o}");
    home.vmpod(&["api", "import", &file]).await?.expect_code(1)?.expect_failure("in use by `vmpod up`")?;
    let running = std::fs::read_to_string(&archive)?;
    up.stop().await?;
    let stopped = home.vmpod(&["api", "export"]).await?.ok()?;
    let count = |text: &str| text.lines().filter(|line| *line == "---").count();
    ensure!(count(&running) == count(&stopped), "{} and {}", count(&running), count(&stopped));

    let other = Home::new("import")?;
    let bad = format!("{stopped}---\napiVersion: v1\nkind: Unheard\nmetadata: {{name: x}}\n");
    let refused = other.vmpod_with(&["api", "import", "-"], Some(bad.as_bytes())).await?.expect_code(1)?;
    refused.expect_failure("Unheard x, can't be imported")?;
    other.vmpod_with(&["api", "import", "-"], Some(stopped.as_bytes())).await?.ok()?;
    let up = other.up(&[]).await?;
    ensure!(up.kubectl_ok(&["get", "herd", "h", "-n", "farm", "-o", "jsonpath={.metadata.uid}"]).await? == uid);
    let odd = up.kubectl_ok(&["get", "configmap", "odd", "-o", "jsonpath={.data.key}"]).await?;
    ensure!(odd == "---\n: é \"quoted\"\n---\n", "{odd:?}");
    up.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bootstrap_token_leads_to_a_nodes_certificate() -> Result<()> {
    let home = Home::new("token")?;
    home.vmpod(&["token", "create"]).await?.expect_code(1)?.expect_failure("no `vmpod up` is running")?;
    let up = home.up(&[]).await?;
    home.vmpod(&["token", "create", "--ttl", "0"]).await?.expect_code(1)?.expect_failure("good for no time")?;
    let token = home.vmpod(&["token", "create", "--ttl", "10m"]).await?.ok()?;
    let who = by_token(&up, token.trim(), &["auth", "whoami", "-o", "json"]).await?.ok()?;
    ensure!(who.contains("system:bootstrap:") && who.contains("system:bootstrappers"), "{who}");
    by_token(&up, token.trim(), &["get", "nodes"]).await?.expect_failure("cannot list resource \"nodes\"")?;
    // As another host does it: with nothing but the kubeconfig that was printed.
    let config = home.vmpod(&["token", "create", "--kubeconfig"]).await?.ok()?;
    let path = up.kubeconfig().with_file_name("bootstrap-kubeconfig");
    std::fs::write(&path, config)?;
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(rcgen::DnType::CommonName, "system:node:far");
    let request = params.serialize_request(&rcgen::KeyPair::generate()?)?.pem()?;
    let csr = json!({
        "apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": {"name": "far"},
        "spec": {
            "request": BASE64.encode(request), "usages": ["digital signature", "client auth"],
            "signerName": "kubernetes.io/kube-apiserver-client-kubelet",
        },
    });
    let mut command = Command::new(prerequisites::kubectl()?);
    command.arg("--kubeconfig").arg(&path).args(["create", "-f", "-"]);
    command.env("HOME", up.kubeconfig().with_file_name("kubectl"));
    run(command, Some(csr.to_string().as_bytes()), Duration::from_mins(1)).await?.ok()?;
    eventually("the certificate is there", || async {
        let condition = up.kubectl_ok(&["get", "csr", "far"]).await?;
        ensure!(condition.contains("Approved,Issued"), "{condition}");
        Ok(())
    })
    .await?;
    up.stop().await
}
