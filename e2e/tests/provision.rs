//! Runners that real Ansible configures, in a container beside their machine.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::gitlab::state::RAN;
use e2e::gitlab::{Config, Gitlab as Scripted, JobStatus, NewJob};
use e2e::home::entries;
use e2e::{Docker, Home, Up, eventually_within, prerequisites};
use serde_json::{Value, json};

/// A playbook that fetches the agent of the tests from GitLab and starts it, if the machine is the one that it should be.
fn playbook(scripted: &Scripted, word: &str) -> String {
    let script = scripted
        .user_data()
        .replace("$(VMPOD_RUNNER_TOKEN)", "{{ vmpod_runner_token }}")
        .replace("$(VMPOD_SYSTEM_ID)", "{{ vmpod_system_id }}")
        .replace("$(VMPOD_MAX_JOBS)", "{{ vmpod_max_jobs }}");
    let play = json!([{
        "hosts": "machine", "gather_facts": false,
        "tasks": [
            {"name": "the guest is a machine of the pool", "ansible.builtin.raw": "uname -n", "register": "name",
             "failed_when": "name.stdout | trim != vmpod_runner_name"},
            {"name": "the edition is told", "ansible.builtin.raw": "echo {{ edition }}", "register": "told",
             "failed_when": format!("told.stdout | trim != '{word}'")},
            {"name": "the runner's script", "ansible.builtin.raw": format!("cat >/run/runner <<'VMPOD'\n{script}VMPOD\n")},
            // Ansible's terminal goes away, and what it started must not go with it.
            {"name": "the runner starts",
             "ansible.builtin.raw": "trap '' HUP; sh /run/runner </dev/null >/run/runner.log 2>&1 &"},
        ],
    }]);
    // JSON is YAML.
    play.to_string()
}

fn pool(scripted: &Scripted, name: &str, playbook: &Value, image: &str) -> Value {
    json!({
        "apiVersion": "vmpod.dev/v1alpha1", "kind": "RunnerPool",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "provider": {"gitlab": {
                "url": scripted.url(), "tokenSecretRef": {"name": "gitlab", "key": "token"}, "tags": [name],
            }},
            "image": "tiny",
            "resources": {"cpu": "500m", "memory": "192Mi"},
            "scale": {"max": 1, "scaleDownSeconds": 0},
            "rollout": {"drainSeconds": 60},
            "provision": {
                "image": image, "playbook": playbook, "variables": {"edition": "2022"}, "retries": 0, "timeoutSeconds": 120,
            },
        },
    })
}

fn config_map(text: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "plays", "namespace": "default"},
        "data": {"site.yml": text}})
}

async fn succeeds(up: &Up, scripted: &Scripted, job: u64) -> Result<()> {
    eventually_within(Duration::from_mins(3), "the job has run", || async {
        let status = scripted.with(|state| state.jobs[&job].status);
        let shown = up.kubectl_ok(&["get", "runnerpools,runners,pods", "-o", "wide"]).await?;
        ensure!(status == JobStatus::Success, "{status:?}\n{shown}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn ansible_makes_a_machine_a_runner_or_the_runner_fails() -> Result<()> {
    let scripted = Scripted::with_agent().await?;
    let home = Home::with_tiny("provision").await?;
    let docker = Docker::start().await?.with_ansible().await?;
    let up = home.up_with_fleet(&["--docker-host", &docker.host()]).await?;
    let job = |pool: &str| {
        let script = vec![RAN.into(), "uname -n".into()];
        scripted.with(|state| state.add(NewJob { tags: vec![pool.into()], script, ..NewJob::default() }))
    };

    // A playbook that fails: the runner is given up, its last words are kept, and no job was given to it.
    up.apply(&config_map(&playbook(&scripted, "2019"))).await?;
    up.apply(&pool(&scripted, "windows", &json!({"configMapRef": {"name": "plays"}}), "ansible:1")).await?;
    let first = job("windows");
    eventually_within(Duration::from_mins(2), "a runner fails", || async {
        let events = up.kubectl_ok(&["get", "events", "--field-selector", "reason=RunnerFailed", "-o", "json"]).await?;
        let events: Value = serde_json::from_str(&events)?;
        let event = events["items"].get(0).context("no event")?;
        let message = event["message"].as_str().unwrap_or_default();
        ensure!(event["involvedObject"]["kind"] == "RunnerPool", "{event:#}");
        ensure!(message.contains("its provisioning failed: it ended with 2"), "{message}");
        ensure!(
            message.contains("the edition is told") || message.contains("failed=1"),
            "Ansible's own words: {message}"
        );
        Ok(())
    })
    .await?;
    ensure!(scripted.with(|state| state.jobs[&first].status) == JobStatus::Pending, "a job went to a failed runner");

    // One that works: the next machine is a runner.
    up.apply(&config_map(&playbook(&scripted, "2022"))).await?;
    succeeds(&up, &scripted, first).await?;
    // The token is where it belongs, and nowhere else.
    let token = scripted.with(|state| state.runners.values().next().map(|runner| runner.token.clone()));
    let token = token.context("no runner")?;
    ensure!(token.starts_with("glrt-"), "that is no token");
    for shown in [up.kubectl_ok(&["get", "pods,events,runners", "-A", "-o", "yaml"]).await?, up.log()] {
        ensure!(!shown.contains(&token), "the token shows");
    }
    ensure!(scripted.with(|state| state.complaints().is_empty()), "GitLab complains");

    // A playbook of a repository.
    let dir = tempfile::tempdir()?;
    let git = async |args: &[&str]| -> Result<()> {
        let mut command = tokio::process::Command::new("git");
        command.args(["-c", "user.name=x", "-c", "user.email=x@example.com"]).args(args).current_dir(dir.path());
        let output = command.output().await?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    git(&["init", "--quiet", "--initial-branch=main", "."]).await?;
    std::fs::create_dir(dir.path().join("linux"))?;
    std::fs::write(dir.path().join("linux/runner.yml"), playbook(&scripted, "2022"))?;
    git(&["add", "."]).await?;
    git(&["commit", "--quiet", "--message=plays"]).await?;
    docker.docker(&["create", "--name", "plays", "ansible:1", "true"]).await?;
    docker.docker(&["cp", dir.path().to_str().context("path")?, "plays:/srv/plays"]).await?;
    docker.docker(&["commit", "plays", "plays:1"]).await?;
    docker.docker(&["rm", "plays"]).await?;
    let git = json!({"file": "linux/runner.yml", "git": {"url": "file:///srv/plays", "reference": "main"}});
    up.apply(&pool(&scripted, "linux", &git, "plays:1")).await?;
    succeeds(&up, &scripted, job("linux")).await?;

    up.kubectl_ok(&["delete", "runnerpool", "windows", "linux", "--timeout=60s"]).await?;
    up.kubectl_ok(&["delete", "configmap", "plays"]).await?;
    eventually_within(Duration::from_mins(1), "nothing is left at the engine", || async {
        let left = docker.left().await?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await?;
    home.assert_clean().await?;
    up.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_provisioned_is_refused() -> Result<()> {
    let scripted = Scripted::start(Config::default()).await?;
    let home = Home::with_tiny("provision-bad").await?;
    let up = home.up_with_fleet(&[]).await?;
    // What the examples show is taken.
    let examples = prerequisites::repository().join("examples");
    let pools = entries(&examples)?.into_iter().filter(|name| name.starts_with("runnerpool"));
    for name in pools {
        let path = examples.join(&name).to_string_lossy().into_owned();
        up.kubectl_ok(&["apply", "--dry-run=server", "-f", &path]).await.with_context(|| name.clone())?;
    }
    let plays = json!({"configMapRef": {"name": "plays"}});
    let with = |change: &dyn Fn(&mut Value)| {
        let mut pool = pool(&scripted, "bad", &plays, "ansible:1");
        change(&mut pool["spec"]["provision"]);
        pool
    };
    let mut on_kubevirt = with(&|_| {});
    on_kubevirt["spec"]["substrate"] = "kubevirt".into();
    let cases: [(Value, &str); 6] = [
        (with(&|provision| provision["port"] = 22.into()), "port is that of connection winrm"),
        (on_kubevirt, "on substrate kubevirt there is no provision"),
        (with(&|provision| provision["command"] = json!(["sh"])), "name either a playbook or a command"),
        (with(&|provision| provision["playbook"]["git"] = json!({"url": "x"})), "name either configMapRef or git"),
        (with(&|provision| provision["playbook"]["file"] = "../x".into()), "without '..'"),
        (with(&|provision| provision["retries"] = 11.into()), "less than or equal to 10"),
    ];
    for (pool, why) in cases {
        up.kubectl_with(&["apply", "-f", "-"], Some(pool.to_string().as_bytes())).await?.expect_failure(why)?;
    }
    up.stop().await
}
