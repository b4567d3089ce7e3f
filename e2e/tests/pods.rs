//! Pods are real machines that `kubectl` can talk to.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::prerequisites::repository;
use e2e::{Home, eventually, pods};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};

fn example(name: &str) -> String {
    repository().join("examples").join(name).to_string_lossy().into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_pod_lives_and_talks_and_goes() -> Result<()> {
    let home = Home::with_tiny("pod").await?;
    let up = home.up(&[]).await?;
    up.kubectl_ok(&["apply", "-f", &example("pod.yaml")]).await?;
    up.wait_ready("hello").await?;

    // The guest is a machine of its own, named after the pod.
    let exec = |words: &'static [&'static str]| {
        let args: Vec<&str> = ["exec", "hello", "--"].iter().chain(words).copied().collect();
        let command = up.kubectl_command(&args);
        async move { e2e::run(command?, None, Duration::from_mins(1)).await }
    };
    ensure!(exec(&["hostname"]).await?.ok()?.trim() == "hello");
    ensure!(exec(&["uname", "-s"]).await?.ok()?.trim() == "Linux");

    // Exit codes, both outputs, odd words.
    exec(&["true"]).await?.expect_code(0)?;
    exec(&["sh", "-c", "exit 3"]).await?.expect_code(3)?;
    exec(&["sh", "-c", "exit 255"]).await?.expect_code(255)?;
    let both = exec(&["sh", "-c", "echo out; echo err >&2; exit 7"]).await?.expect_code(7)?;
    ensure!(both.stdout == "out\n", "{both}");
    ensure!(both.stderr.starts_with("err\n"), "{both}");
    let odd = exec(&["printf", "%s|", "a b", "c'd", "$HOME", "*", "", "ü\n"]).await?.ok()?;
    ensure!(odd == "a b|c'd|$HOME|*||ü\n|", "{odd:?}");
    let missing = exec(&["no-such-command"]).await?;
    ensure!(missing.code.is_some_and(|code| code != 0), "{missing}");

    // Standard input, to its end, more than one buffer of it.
    let input: Vec<u8> = (0..300_000_u32).flat_map(|n| [b'a' + u8::try_from(n % 26).unwrap_or(0)]).collect();
    let counted = up.kubectl_with(&["exec", "-i", "hello", "--", "wc", "-c"], Some(&input)).await?.ok()?;
    ensure!(counted.trim() == "300000", "{counted:?}");
    let back = up.kubectl_with(&["exec", "-i", "hello", "--", "cat"], Some(&input)).await?.ok()?;
    ensure!(back.as_bytes() == input, "{} bytes came back", back.len());

    // A terminal, as far as a test without one can see.
    let tty = up.kubectl_with(&["exec", "-i", "hello", "--", "sh"], Some(b"echo $((6*7))\nexit 4\n")).await?;
    ensure!(tty.code == Some(4) && tty.stdout == "42\n", "{tty}");

    // The console is the log.
    let log = up.kubectl_ok(&["logs", "hello"]).await?;
    ensure!(log.contains("vmpod: ready"), "{log}");

    // vmpod's own verbs on the same pod.
    let listed = home.vmpod(&["ps"]).await?.ok()?;
    ensure!(listed.lines().any(|line| line.starts_with("hello") && line.contains("Running")), "{listed}");
    home.vmpod(&["exec", "hello", "--", "sh", "-c", "exit 5"]).await?.expect_code(5)?;
    home.vmpod(&["exec", "nobody", "--", "true"]).await?.expect_code(125)?.expect_failure("there is no pod nobody")?;
    let typed = home.vmpod_with(&["exec", "-i", "hello", "--", "cat"], Some(b"over here")).await?.ok()?;
    ensure!(typed == "over here", "{typed:?}");
    let local = home.path().join("sent");
    std::fs::write(&local, &input)?;
    home.vmpod(&["cp", &local.to_string_lossy(), "hello:/tmp/"]).await?.ok()?;
    let got = home.path().join("got");
    home.vmpod(&["cp", "hello:/tmp/sent", &got.to_string_lossy()]).await?.ok()?;
    ensure!(std::fs::read(&got)? == input, "a copy came back changed");
    // What it uses, as the metrics server of a cluster would say.
    eventually("figures of the pod", || async {
        let top = up.kubectl_ok(&["top", "pod", "hello", "--containers", "--no-headers"]).await?;
        let words: Vec<&str> = top.split_whitespace().collect();
        ensure!(
            matches!(words[..], ["hello", _, cpu, memory] if cpu.ends_with('m') && memory.ends_with("Mi")),
            "{top}"
        );
        Ok(())
    })
    .await?;
    let top = up.kubectl_ok(&["top", "nodes", "--no-headers"]).await?;
    ensure!(top.split_whitespace().count() == 5 && top.contains('%'), "{top}");
    up.kubectl_ok(&["cp", &local.to_string_lossy(), "hello:/tmp/by-kubectl"]).await?;
    let back = home.path().join("back");
    up.kubectl_ok(&["cp", "hello:/tmp/by-kubectl", &back.to_string_lossy()]).await?;
    ensure!(std::fs::read(&back)? == input, "kubectl's copy came back changed");

    // It goes within its grace period, and all of it.
    ensure!(home.hypervisors() == 1);
    let deleted = up.kubectl(&["delete", "pod", "hello", "--timeout=60s"]).await?;
    ensure!(deleted.took < Duration::from_secs(40), "{deleted}");
    deleted.ok()?;
    home.assert_clean().await?;
    up.stop().await?;
    home.assert_no_process()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_like_pod_fails_with_its_code_and_keeps_its_output() -> Result<()> {
    let home = Home::with_tiny("job").await?;
    let up = home.up(&[]).await?;
    up.kubectl_ok(&["apply", "-f", &example("job-pod.yaml")]).await?;
    up.wait_for("job", "jsonpath={.status.phase}=Failed").await?;
    let pod = up.pod("job").await?;
    let ended = &pods::state(&pod)["terminated"];
    ensure!(ended["exitCode"] == 3 && ended["reason"] == "Error", "{ended}");
    ensure!(pod["status"]["containerStatuses"][0]["restartCount"] == 0, "{pod}");
    let log = up.kubectl_ok(&["logs", "job"]).await?;
    ensure!(log == "built by vmpod on job\n", "{log:?}");

    // A command that succeeds.
    up.apply(&pods::tiny("good", &["sh", "-c", "echo fine; echo grumble >&2"])).await?;
    up.wait_for("good", "jsonpath={.status.phase}=Succeeded").await?;
    let log = up.kubectl_ok(&["logs", "good"]).await?;
    ensure!(log.contains("fine\n") && log.contains("grumble\n"), "{log:?}");

    // A finished pod holds no machine, whatever becomes of its object.
    ensure!(home.hypervisors() == 0);
    up.kubectl_ok(&["delete", "pod", "job", "good"]).await?;
    home.assert_clean().await?;
    up.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_follow_what_is_written() -> Result<()> {
    let home = Home::with_tiny("logs").await?;
    let up = home.up(&[]).await?;
    let script = "i=0; while [ $i -lt 6 ]; do echo line $i; i=$((i+1)); sleep 1; done; echo end";
    up.apply(&pods::tiny("talker", &["sh", "-c", script])).await?;
    up.wait_ready("talker").await?;

    let mut follow = up.kubectl_command(&["logs", "-f", "talker"])?;
    let mut follow = follow.stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
    let mut lines = BufReader::new(follow.stdout.take().context("no output")?).lines();
    let mut seen = Vec::new();
    let mut while_running = 0;
    let read = async {
        while let Some(line) = lines.next_line().await? {
            seen.push(line);
            if pods::phase(&up.pod("talker").await?) == "Running" {
                while_running += 1;
            }
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(Duration::from_secs(90), read).await.context("the log never ended")??;
    let wanted: Vec<String> = (0..6).map(|i| format!("line {i}")).chain(["end".to_owned()]).collect();
    ensure!(seen == wanted, "{seen:?}");
    ensure!(while_running >= 2, "only {while_running} lines came while it ran");
    ensure!(follow.wait().await?.success());

    let tail = up.kubectl_ok(&["logs", "talker", "--tail=2"]).await?;
    ensure!(tail == "line 5\nend\n", "{tail:?}");
    let stamped = up.kubectl_ok(&["logs", "talker", "--timestamps", "--tail=1"]).await?;
    ensure!(stamped.ends_with("Z end\n") && stamped.starts_with("20"), "{stamped:?}");
    let ours = home.vmpod(&["logs", "-f", "talker"]).await?.ok()?;
    ensure!(ours.lines().count() == 7, "{ours:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_policy_makes_a_new_machine() -> Result<()> {
    let home = Home::with_tiny("restart").await?;
    let up = home.up(&[]).await?;
    let mut pod = pods::tiny("again", &["sh", "-c", "echo run; test -e /marker && echo seen; touch /marker; exit 1"]);
    pod["spec"]["restartPolicy"] = json!("OnFailure");
    up.apply(&pod).await?;
    eventually("the pod restarts", || async {
        let pod = up.pod("again").await?;
        let count = pod["status"]["containerStatuses"][0]["restartCount"].as_u64().unwrap_or_default();
        ensure!(count >= 1, "{}", pod["status"]);
        Ok(())
    })
    .await?;
    let log = up.kubectl_ok(&["logs", "again", "--previous"]).await?;
    ensure!(log == "run\n", "the first run's log is {log:?}");
    ensure!(home.hypervisors() <= 1, "a restart left the first machine");
    up.kubectl_ok(&["delete", "pod", "again"]).await?;
    home.assert_clean().await
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_works_on_the_kinds_that_are_served() -> Result<()> {
    let home = Home::new("kinds")?;
    let up = home.up(&["--name", "host-1"]).await?;

    // The node says what it is.
    let nodes = up.kubectl_ok(&["get", "nodes"]).await?;
    ensure!(nodes.contains("host-1") && nodes.contains(" Ready"), "{nodes}");
    let node: Value = serde_json::from_str(&up.kubectl_ok(&["get", "node", "host-1", "-o", "json"]).await?)?;
    ensure!(node["metadata"]["labels"]["kubernetes.io/os"].is_string(), "{node}");
    ensure!(node["status"]["nodeInfo"]["containerRuntimeVersion"].is_string(), "{node}");
    let described = up.kubectl_ok(&["describe", "node", "host-1"]).await?;
    ensure!(described.contains("Allocatable:") && described.contains("Ready"), "{described}");
    let lease = up.kubectl_ok(&["get", "lease", "-n", "kube-node-lease", "host-1", "-o", "name"]).await?;
    ensure!(lease.contains("host-1"), "{lease}");

    // Namespaces, config maps, secrets: create, label, get by label, delete.
    up.kubectl_ok(&["create", "namespace", "shop"]).await?;
    up.kubectl_ok(&["create", "configmap", "c", "-n", "shop", "--from-literal=k=v"]).await?;
    up.kubectl_ok(&["create", "secret", "generic", "s", "-n", "shop", "--from-literal=password=hunter2"]).await?;
    up.kubectl_ok(&["label", "configmap", "c", "-n", "shop", "tier=front"]).await?;
    let found = up.kubectl_ok(&["get", "configmaps,secrets", "-n", "shop", "-l", "tier=front", "-o", "name"]).await?;
    ensure!(found == "configmap/c\n", "{found:?}");
    let value = up.kubectl_ok(&["get", "configmap", "c", "-n", "shop", "-o", "jsonpath={.data.k}"]).await?;
    ensure!(value == "v", "{value:?}");
    let told = up.kubectl_ok(&["describe", "secret", "s", "-n", "shop"]).await?;
    ensure!(told.contains("password:  7 bytes"), "{told}");
    up.kubectl_ok(&["annotate", "configmap", "c", "-n", "shop", "note=hello there"]).await?;
    up.kubectl_ok(&["patch", "configmap", "c", "-n", "shop", "-p", r#"{"data":{"k":"w"}}"#]).await?;
    up.kubectl_ok(&["patch", "configmap", "c", "-n", "shop", "--type=merge", "-p", r#"{"data":{"x":"y"}}"#]).await?;
    let json_patch = r#"[{"op":"add","path":"/data/z","value":"1"}]"#;
    up.kubectl_ok(&["patch", "configmap", "c", "-n", "shop", "--type=json", "-p", json_patch]).await?;
    let data = up.kubectl_ok(&["get", "configmap", "c", "-n", "shop", "-o", "jsonpath={.data}"]).await?;
    ensure!(data == r#"{"k":"w","x":"y","z":"1"}"#, "{data}");
    up.kubectl_ok(&["delete", "namespace", "shop", "--timeout=60s"]).await?;
    up.kubectl(&["get", "configmap", "c", "-n", "shop"]).await?.expect_failure("not found")?;

    // Client-side and server-side apply, dry run, what isn't served.
    let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"one": "1"}});
    up.apply(&object).await?;
    let mut changed = object.clone();
    changed["data"] = json!({"two": "2"});
    up.apply(&changed).await?;
    let data = up.kubectl_ok(&["get", "configmap", "a", "-o", "jsonpath={.data}"]).await?;
    ensure!(data == r#"{"two":"2"}"#, "apply kept what was taken away: {data}");
    let text = serde_json::to_vec(
        &json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "b"}, "data": {"k": "v"}}),
    )?;
    up.kubectl_with(&["apply", "--server-side", "-f", "-"], Some(&text)).await?.ok()?;
    up.kubectl_with(&["apply", "--server-side", "-f", "-"], Some(&text)).await?.ok()?;
    up.kubectl_ok(&["create", "configmap", "never", "--dry-run=server", "--from-literal=a=b"]).await?;
    up.kubectl(&["get", "configmap", "never"]).await?.expect_failure("not found")?;
    up.kubectl(&["get", "deployments"]).await?.expect_failure("the server doesn't have a resource type")?;
    let wrong = br#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"bad"},"spec":{"containers":[]}}"#;
    up.kubectl_with(&["create", "-f", "-"], Some(wrong)).await?.expect_failure("spec.containers")?;

    // The kubeconfig opens everything, so it is its owner's alone.
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(up.kubeconfig())?.permissions());
    ensure!(mode & 0o777 == 0o600, "the kubeconfig's mode is {mode:o}");
    up.stop().await?;
    home.assert_no_process()
}
