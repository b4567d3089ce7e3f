//! GitLab Runner's Kubernetes executor with a virtual machine as the build container: the pod that it makes, and what it does with
//! it, as its sources have it (`executors/kubernetes`): an emptyDir for the repository, one for scripts and one for logs, an init
//! container, a helper beside the build; scripts put there through the helper, started by writing to the standard input of a
//! container's shell, and followed by a log file in which each ends with a line of JSON.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::{Docker, Home, Up, eventually, eventually_within, leaks};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::AttachParams;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

const POD: &str = "runner-abc123-project-1-concurrent-0-x1y2z3";
const LOGS: &str = "/logs-1-7";
const SCRIPTS: &str = "/scripts-1-7";

/// The command of both containers: the best shell that there is, which reads what is written to it.
const SHELL: &str = "if [ -x /usr/local/bin/bash ]; then\n\texec /usr/local/bin/bash \nelif [ -x /usr/bin/bash ]; then\n\texec /usr/bin/bash \n\
     elif [ -x /bin/bash ]; then\n\texec /bin/bash \nelif [ -x /bin/sh ]; then\n\texec /bin/sh \nelse\n\techo shell not found\n\texit 1\nfi\n\n";

fn pod() -> Value {
    let mounts = json!([
        {"name": "scripts", "mountPath": SCRIPTS}, {"name": "logs", "mountPath": LOGS}, {"name": "repo", "mountPath": "/builds"}]);
    let shell = |name: &str, image: &str| {
        json!({
            "name": name, "image": image, "imagePullPolicy": "Never", "command": ["sh", "-c", SHELL], "stdin": true,
            "env": [{"name": "CI_JOB_ID", "value": "7"}], "volumeMounts": mounts,
        })
    };
    let mut build = shell("build", "tiny");
    build["resources"] = json!({"requests": {"cpu": "250m", "memory": "192Mi"}});
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": POD, "labels": {"pod": POD}, "annotations": {"job.runner.gitlab.com/id": "7"}},
        "spec": {
            "restartPolicy": "Never", "activeDeadlineSeconds": 3601, "terminationGracePeriodSeconds": 0,
            "volumes": [
                {"name": "repo", "emptyDir": {}}, {"name": "scripts", "emptyDir": {}}, {"name": "logs", "emptyDir": {}}],
            "initContainers": [{
                "name": "init-permissions", "image": "box:1", "imagePullPolicy": "Never", "volumeMounts": mounts,
                "command": ["sh", "-c", format!("touch {LOGS}/output.log && (chmod 777 {LOGS}/output.log || exit 0)")],
            }],
            "containers": [build, shell("helper", "box:1")],
        },
    })
}

/// Puts a stage's script into its volume, through the helper, as the executor does.
async fn save(up: &Up, stage: &str, script: &str) -> Result<()> {
    let text = format!(
        "#!/bin/sh\nrunner_script_trap() {{ code=$?; printf '\\n{{\"command_exit_code\": %s, \"script\": \"%s\"}}\\n' $code \"$0\"; exit 0; }}\n\
         trap runner_script_trap EXIT\nset -e\n{script}\n"
    );
    let place = format!("cat >{SCRIPTS}/{stage} && chmod 777 {SCRIPTS}/{stage}");
    let args = ["exec", "-i", POD, "-c", "helper", "--", "sh", "-c", &place];
    up.kubectl_with(&args, Some(text.as_bytes())).await?.ok().map(drop)
}

/// Writes a line to the shell of a container: standard input alone, as the executor attaches.
async fn attach(up: &Up, container: &str, line: &str) -> Result<()> {
    let pods: Api<Pod> = Api::default_namespaced(up.client().await?);
    let only_input = AttachParams {
        container: Some(container.to_owned()),
        ..AttachParams::default().stdin(true).stdout(false).stderr(false)
    };
    let mut attached = pods.attach(POD, &only_input).await?;
    let mut stdin = attached.stdin().context("no input")?;
    stdin.write_all(format!("{line}\n").as_bytes()).await?;
    stdin.shutdown().await?;
    drop(stdin);
    let status = attached.take_status().context("no status")?;
    let status =
        tokio::time::timeout(Duration::from_secs(30), status).await.context("attach doesn't end with its input")?;
    ensure!(status.as_ref().is_some_and(|status| status.status.as_deref() == Some("Success")), "{status:?}");
    Ok(())
}

/// Runs a stage in a container; its end is the line that the log ends with.
async fn stage(up: &Up, container: &str, name: &str, script: &str) -> Result<(i64, String)> {
    save(up, name, script).await?;
    let log = async || up.kubectl_ok(&["exec", POD, "-c", "helper", "--", "cat", &format!("{LOGS}/output.log")]).await;
    let before = log().await?.len();
    attach(up, container, &format!("sh {SCRIPTS}/{name} >>{LOGS}/output.log 2>&1")).await?;
    let ended = || async {
        let text = log().await?;
        let new = text.get(before..).unwrap_or_default();
        let last = new.trim_end().lines().last().unwrap_or_default();
        let end: Value = serde_json::from_str(last).with_context(|| format!("no end of {name} in {new:?}"))?;
        ensure!(end["script"] == format!("{SCRIPTS}/{name}"), "{end}");
        Ok((end["command_exit_code"].as_i64().context("no code")?, new.trim_end().trim_end_matches(last).to_owned()))
    };
    eventually("the stage ends", ended).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubernetes_executor_builds_in_a_machine() -> Result<()> {
    let home = Home::with_tiny("gitlab-kubernetes").await?;
    let docker = Docker::start().await?;
    let up = home.up(&["--docker-host", &docker.host()]).await?;
    up.apply(&pod()).await?;
    up.wait_ready(POD).await?;

    // What the helper fetches, the machine builds, and the helper uploads.
    let (code, _) = stage(
        &up,
        "helper",
        "get_sources",
        "mkdir -p /builds/group/project && echo 'int main;' >/builds/group/project/main.c",
    )
    .await?;
    ensure!(code == 0);
    let script = "cd /builds/group/project; uname -n; cat main.c; echo built-$CI_JOB_ID >artifact; id -u";
    let (code, said) = stage(&up, "build", "step_script", script).await?;
    ensure!(code == 0 && said.contains(POD) && said.contains("int main;") && said.contains("\n0\n"), "{code}: {said}");
    let (code, said) =
        stage(&up, "helper", "upload_artifacts_on_success", "cat /builds/group/project/artifact").await?;
    ensure!(code == 0 && said.contains("built-7"), "{code}: {said}");
    let (code, _) = stage(&up, "build", "after_script", "exit 3").await?;
    ensure!(code == 3, "a job that fails is told by its code");

    // The agent dies in the middle: the shell goes on, and so do the directories.
    let running = "cd /builds/group/project; echo before; until [ -e go ]; do sleep 0.1; done; echo after";
    save(&up, "step_long", running).await?;
    attach(&up, "build", &format!("sh {SCRIPTS}/step_long >>{LOGS}/long.log 2>&1")).await?;
    up.kill().await?;
    let up = home.up(&["--docker-host", &docker.host()]).await?;
    up.wait_ready(POD).await?;
    let touch = ["exec", POD, "-c", "helper", "--", "touch", "/builds/group/project/go"];
    up.kubectl_ok(&touch).await?;
    eventually("the step ends", || async {
        let log = up.kubectl_ok(&["exec", POD, "-c", "helper", "--", "cat", &format!("{LOGS}/long.log")]).await?;
        ensure!(log.starts_with("before\nafter\n"), "{log}");
        Ok(())
    })
    .await?;

    // The strategy before that: each script is the input of a shell that is executed in the container.
    let args = ["exec", "-i", POD, "-c", "build", "--", "sh"];
    let legacy = up.kubectl_with(&args, Some(b"cat /builds/group/project/artifact; exit 4\n")).await?;
    ensure!(legacy.stdout == "built-7\n", "{legacy}");
    legacy.expect_code(4)?;

    // Nothing stays, not even what served the directories.
    let servers =
        || leaks::processes(home.path()).into_iter().filter(|process| process.words.contains("virtiofsd")).count();
    ensure!(servers() > 0, "no process of virtiofsd was recognized");
    up.kubectl_ok(&["delete", "pod", POD, "--timeout=60s"]).await?;
    home.assert_clean().await?;
    eventually_within(Duration::from_mins(1), "nothing is left", || async {
        ensure!(servers() == 0, "virtiofsd is left");
        let left = docker.left().await?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await?;
    up.stop().await?;
    home.assert_no_process()
}
