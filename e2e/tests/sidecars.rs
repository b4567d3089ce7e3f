//! Pods with containers beside their machine: real guests, a real Docker Engine.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::registry::{PASSWORD, Registry, USER};
use e2e::{Docker, Home, eventually, eventually_within, pods};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

fn beside(name: &str, script: &str) -> Value {
    json!({"name": name, "image": "box:1", "imagePullPolicy": "Never", "command": ["sh", "-c", script]})
}

/// An init container, a native sidecar, the machine with a web server, and a container beside it.
fn hybrid() -> Value {
    let mut pod =
        pods::tiny("hybrid", &["sh", "-c", "mkdir -p /www && echo guest >/www/word && exec httpd -f -p 8080 -h /www"]);
    let spec = &mut pod["spec"];
    spec["restartPolicy"] = "Always".into();
    spec["volumes"] = json!([
        {"name": "work", "emptyDir": {}},
        {"name": "fast", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        {"name": "conf", "configMap": {"name": "conf"}}]);
    let conf = json!({"name": "conf", "mountPath": "/conf"});
    spec["containers"][0]["ports"] = json!([{"containerPort": 8080}]);
    spec["containers"][0]["volumeMounts"] = json!([conf]);
    let mut init = beside("init", "id -u >/work/user; cat /conf/word; test ! -e /work/side");
    init["securityContext"] = json!({"runAsUser": 1234});
    init["volumeMounts"] = json!([{"name": "work", "mountPath": "/work"}, conf]);
    let mut native = beside("native", "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.1; done");
    native["restartPolicy"] = "Always".into();
    native["startupProbe"] = json!({"exec": {"command": ["true"]}, "periodSeconds": 1});
    spec["initContainers"] = json!([init, native]);
    let mut side = beside(
        "side",
        "touch /work/side; head -c 2000000 /dev/zero >/fast/x 2>/dev/null || echo full; \
         until word=$(wget -q -O - http://$POD:8080/word 2>/dev/null); do sleep 0.2; done; echo \"the machine says $word\"; \
         exec httpd -f -p 9090 -h /work",
    );
    side["env"] = json!([{"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]);
    side["ports"] = json!([{"containerPort": 9090}]);
    side["readinessProbe"] = json!({"httpGet": {"port": 9090, "path": "/user"}, "periodSeconds": 1});
    side["volumeMounts"] =
        json!([{"name": "work", "mountPath": "/work"}, {"name": "fast", "mountPath": "/fast"}, conf]);
    let containers = spec["containers"].as_array_mut();
    if let Some(containers) = containers {
        containers.push(side);
    }
    pod
}

async fn nothing_left(docker: &Docker) -> Result<()> {
    eventually_within(Duration::from_mins(1), "nothing is left at the engine", || async {
        let left = docker.left().await?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_of_a_machine_and_containers_is_one() -> Result<()> {
    let home = Home::with_tiny("sidecars").await?;
    let mut docker = Docker::start().await?;
    let up = home.up(&["--docker-host", &docker.host()]).await?;
    let word = |text: &str| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "conf"}, "data": {"word": text}});
    up.apply(&word("first\n")).await?;
    up.apply(&hybrid()).await?;
    up.wait_ready("hybrid").await?;

    // Each has its log, and each reached the other.
    let logs = async |container: &str| up.kubectl_ok(&["logs", "hybrid", "-c", container]).await;
    ensure!(logs("init").await? == "first\n", "{}", logs("init").await?);
    ensure!(logs("native").await? == "up\n", "{}", logs("native").await?);
    ensure!(logs("side").await? == "full\nthe machine says guest\n", "{}", logs("side").await?);
    let timed = up.kubectl_ok(&["logs", "hybrid", "-c", "side", "--timestamps", "--tail=1"]).await?;
    ensure!(
        timed.starts_with("20") && timed.ends_with("Z the machine says guest\n") && timed.lines().count() == 1,
        "{timed}"
    );
    let exec = async |container: &str, script: &str| {
        up.kubectl(&["exec", "hybrid", "-c", container, "--", "sh", "-c", script]).await
    };
    // What the init container wrote, as the user it was, and what the API's volume holds.
    ensure!(exec("side", "cat /work/user /conf/word; id -u").await?.ok()? == "1234\nfirst\n0\n", "side");
    exec("side", "exit 7").await?.expect_code(7)?;
    let typed = up.kubectl_with(&["exec", "-i", "hybrid", "-c", "side", "--", "cat"], Some(b"typed")).await?.ok()?;
    ensure!(typed == "typed", "{typed}");
    let reached =
        exec("machine", "wget -q -O - http://$VMPOD_SIDECARS_ADDRESS:9090/user; cat /conf/word").await?.ok()?;
    ensure!(reached == "1234\nfirst\n", "{reached}");

    // A port that the container declares is its own; the machine's are the machine's.
    for (port, path, want) in [("9090", "user", "1234\n"), ("8080", "word", "guest\n")] {
        let mut command = up.kubectl_command(&["port-forward", "pod/hybrid", &format!(":{port}")])?;
        let mut child = command.stdout(std::process::Stdio::piped()).kill_on_drop(true).spawn()?;
        let mut stdout = child.stdout.take().context("no output")?;
        let mut said = String::new();
        while !said.contains('\n') {
            let mut buffer = [0; 256];
            let length = stdout.read(&mut buffer).await?;
            ensure!(length > 0, "{said}");
            said.push_str(std::str::from_utf8(&buffer[..length])?);
        }
        let local = said.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next()).context("no port")?;
        let mut stream = tokio::net::TcpStream::connect(format!("127.0.0.1:{local}")).await?;
        stream.write_all(format!("GET /{path} HTTP/1.0\r\n\r\n").as_bytes()).await?;
        let mut got = String::new();
        stream.read_to_string(&mut got).await?;
        ensure!(got.ends_with(&format!("\r\n\r\n{want}")), "{port}: {got}");
    }

    // The statuses are whole, and figures are there.
    let pod = up.pod("hybrid").await?;
    let status = &pod["status"];
    ensure!(status["containerStatuses"].as_array().map(Vec::len) == Some(2), "{status:#}");
    ensure!(status["initContainerStatuses"][0]["state"]["terminated"]["reason"] == "Completed", "{status:#}");
    ensure!(status["initContainerStatuses"][1]["started"] == true, "{status:#}");
    let top = up.kubectl_ok(&["top", "pod", "hybrid", "--containers", "--no-headers"]).await?;
    ensure!(top.lines().count() == 3, "{top}");

    // The agent dies and comes back: nothing was started again, and what changed meanwhile arrives in all of them.
    up.apply(&word("second\n")).await?;
    let ids = docker.docker(&["ps", "-q", "--no-trunc"]).await?;
    up.kill().await?;
    let up = home.up(&["--docker-host", &docker.host()]).await?;
    up.wait_ready("hybrid").await?;
    ensure!(docker.docker(&["ps", "-q", "--no-trunc"]).await? == ids, "containers were made anew");
    ensure!(up.pod("hybrid").await?["status"]["containerStatuses"][1]["restartCount"] == 0, "a restart");
    eventually("the update is seen", || async {
        for container in ["side", "machine"] {
            let seen = up.kubectl_ok(&["exec", "hybrid", "-c", container, "--", "cat", "/conf/word"]).await?;
            ensure!(seen == "second\n", "{container}: {seen}");
        }
        Ok(())
    })
    .await?;

    // The engine dies with all containers. What is told stays true, and the pod comes back.
    docker.kill().await?;
    let before = up.pod("hybrid").await?;
    docker.run().await?;
    eventually_within(Duration::from_secs(90), "the container was started again", || async {
        let status = &up.pod("hybrid").await?["status"];
        let side = &status["containerStatuses"][1];
        ensure!(side["ready"] == true, "{side:#}");
        ensure!(status["containerStatuses"][0]["restartCount"] == 0, "the machine ran through it");
        Ok(())
    })
    .await?;
    ensure!(before["status"]["podIP"] == up.pod("hybrid").await?["status"]["podIP"], "the address changed");

    // It goes as one: the native last.
    up.kubectl_ok(&["delete", "pod", "hybrid", "--timeout=60s"]).await?;
    home.assert_clean().await?;
    nothing_left(&docker).await?;
    up.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jobs_verdict_waits_for_its_containers() -> Result<()> {
    let home = Home::with_tiny("sidecar-jobs").await?;
    let docker = Docker::start().await?;
    let up = home.up(&["--docker-host", &docker.host()]).await?;
    let job = |name: &str, init: &str, machine: &str, side: &str| {
        let mut pod = pods::tiny(name, &["sh", "-c", machine]);
        let mut native = beside("native", "trap 'exit 0' TERM; while :; do sleep 0.1; done");
        native["restartPolicy"] = "Always".into();
        pod["spec"]["initContainers"] = json!([beside("init", init), native]);
        if let Some(containers) = pod["spec"]["containers"].as_array_mut() {
            containers.push(beside("side", side));
        }
        pod
    };
    for (pod, phase) in [
        (job("good", "true", "echo done", "sleep 1"), "Succeeded"),
        (job("bad-side", "true", "true", "exit 3"), "Failed"),
        (job("bad-init", "exit 4", "true", "true"), "Failed"),
    ] {
        up.apply(&pod).await?;
        let name = pod["metadata"]["name"].as_str().context("no name")?;
        eventually_within(Duration::from_mins(1), "the verdict", || async {
            let pod = up.pod(name).await?;
            ensure!(pods::phase(&pod) == phase, "{name}: {:#}", pod["status"]);
            Ok(())
        })
        .await?;
    }
    let status = &up.pod("bad-init").await?["status"];
    ensure!(status["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 4, "{status:#}");
    // The logs outlive the verdict, the network doesn't.
    ensure!(up.kubectl_ok(&["logs", "good", "-c", "machine"]).await? == "done\n", "the machine's log");
    eventually("only what has logs is left", || async {
        let networks = docker.docker(&["network", "ls", "-q", "--filter", "driver=bridge"]).await?;
        ensure!(networks.is_empty(), "{networks}");
        ensure!(docker.docker(&["ps", "-q"]).await?.is_empty(), "something runs");
        Ok(())
    })
    .await?;

    for name in ["good", "bad-side", "bad-init"] {
        up.kubectl_ok(&["delete", "pod", name, "--timeout=60s"]).await?;
    }
    home.assert_clean().await?;
    nothing_left(&docker).await?;
    up.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_wrong_with_a_container_is_told_and_mended() -> Result<()> {
    let home = Home::with_tiny("sidecar-ills").await?;
    let docker = Docker::start().await?;
    let up = home.up(&["--docker-host", &docker.host()]).await?;
    // A container that takes more memory than it may, is ended for it and starts again.
    let mut greedy = pods::tiny("greedy", &["sleep", "1000"]);
    greedy["spec"]["restartPolicy"] = "Always".into();
    let mut side = beside("side", "sleep 1; tail /dev/zero");
    side["resources"] = json!({"limits": {"memory": "64Mi"}});
    side["lifecycle"] = json!({"postStart": {"exec": {"command": ["sh", "-c", "echo hooked >/tmp/x"]}}});
    if let Some(containers) = greedy["spec"]["containers"].as_array_mut() {
        containers.push(side);
    }
    up.apply(&greedy).await?;
    eventually_within(Duration::from_mins(1), "the kernel's verdict", || async {
        let side = &up.pod("greedy").await?["status"]["containerStatuses"][1];
        let told = [&side["state"], &side["lastState"]];
        let killed = told.iter().any(|state| state["terminated"]["reason"] == "OOMKilled");
        ensure!(killed, "{side:#}");
        Ok(())
    })
    .await?;
    // A probe that fails ends a container, which starts again; a preStop hook that fails is told.
    let mut sick = pods::tiny("sick", &["sleep", "1000"]);
    sick["spec"]["restartPolicy"] = "Always".into();
    sick["spec"]["volumes"] = json!([{"name": "work", "emptyDir": {}}]);
    let mut side = beside("side", "rm -f /work/dead && touch /work/alive && sleep 1000");
    side["volumeMounts"] = json!([{"name": "work", "mountPath": "/work"}]);
    side["securityContext"] = json!({"runAsNonRoot": true, "runAsUser": 1234});
    side["livenessProbe"] =
        json!({"exec": {"command": ["sh", "-c", "! cat /work/dead"]}, "periodSeconds": 1, "failureThreshold": 1});
    side["lifecycle"] = json!({"preStop": {"exec": {"command": ["sh", "-c", "echo no; exit 1"]}}});
    if let Some(containers) = sick["spec"]["containers"].as_array_mut() {
        containers.push(side);
    }
    up.apply(&sick).await?;
    up.wait_ready("sick").await?;
    up.kubectl_ok(&["exec", "sick", "-c", "side", "--", "touch", "/work/dead"]).await?;
    eventually_within(Duration::from_mins(1), "a restart", || async {
        let side = &up.pod("sick").await?["status"]["containerStatuses"][1];
        ensure!(side["restartCount"] == 1 && side["ready"] == true, "{side:#}");
        Ok(())
    })
    .await?;
    let events = up.kubectl_ok(&["get", "events"]).await?;
    for told in ["PreStopHook failed: no", "Container side failed liveness probe, will be restarted"] {
        ensure!(events.contains(told), "{told}: {events}");
    }
    // What holds the pod's network dies, and its directories are as they were before it was opened to everybody: it is finished
    // again, and whoever ran in the network that is gone starts again in the new one.
    let uid = up.pod("sick").await?["metadata"]["uid"].as_str().context("no uid")?.to_owned();
    let work = docker.volume(&format!("vmpod-{uid}-work"));
    std::fs::set_permissions(&work, std::fs::Permissions::from_mode(0o700))?;
    docker.docker(&["kill", &format!("vmpod_POD_sick_default_{uid}_0")]).await?;
    eventually_within(Duration::from_secs(90), "it is held again", || async {
        let side = &up.pod("sick").await?["status"]["containerStatuses"][1];
        ensure!(side["restartCount"].as_u64() >= Some(2) && side["ready"] == true, "{side:#}");
        Ok(())
    })
    .await?;
    ensure!(std::fs::metadata(&work)?.permissions().mode() & 0o777 == 0o777, "the directory isn't open");
    for name in ["greedy", "sick"] {
        up.kubectl_ok(&["delete", "pod", name, "--timeout=60s"]).await?;
    }
    home.assert_clean().await?;
    nothing_left(&docker).await?;

    // An image that isn't there holds up the pod, in words that are known, and nothing that has begun stays.
    let mut missing = pods::tiny("missing", &["sleep", "1000"]);
    if let Some(containers) = missing["spec"]["containers"].as_array_mut() {
        containers.push(json!({"name": "side", "image": "127.0.0.1:1/no/such:1"}));
    }
    up.apply(&missing).await?;
    eventually("the missing image is told", || async {
        let side = &up.pod("missing").await?["status"]["containerStatuses"][1];
        let reason = side["state"]["waiting"]["reason"].as_str().unwrap_or_default();
        ensure!(matches!(reason, "ErrImagePull" | "ImagePullBackOff"), "{side:#}");
        Ok(())
    })
    .await?;
    ensure!(pods::phase(&up.pod("missing").await?) == "Pending", "{:#}", up.pod("missing").await?["status"]);
    up.kubectl_ok(&["delete", "pod", "missing", "--timeout=60s"]).await?;
    nothing_left(&docker).await?;
    up.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn images_come_from_registries_that_want_a_password() -> Result<()> {
    let home = Home::with_tiny("sidecar-pulls").await?;
    let docker = Docker::start().await?;
    let registry = Registry::start(true).await?;
    let image = format!("{}/ci/box:1", registry.host);
    docker.docker(&["tag", "box:1", &image]).await?;
    docker.docker_with(&["login", "-u", USER, "--password-stdin", &registry.host], Some(PASSWORD.as_bytes())).await?;
    docker.docker(&["push", &image]).await?;
    docker.docker(&["rmi", &image]).await?;
    let up = home.up(&["--docker-host", &docker.host()]).await?;
    let mut pod = pods::tiny("pulls", &["sleep", "1000"]);
    let mut side = beside("side", "");
    side["image"] = image.into();
    side["imagePullPolicy"] = "IfNotPresent".into();
    // It ends with its input, which `kubectl attach` closes.
    side["command"] = json!(["cat"]);
    side["stdin"] = true.into();
    side["stdinOnce"] = true.into();
    if let Some(containers) = pod["spec"]["containers"].as_array_mut() {
        containers.push(side);
    }
    up.apply(&pod).await?;
    // How Docker says so depends on what it tried last: it takes a registry on loopback for one without TLS.
    eventually("the registry wants a password", || async {
        let state = up.pod("pulls").await?["status"]["containerStatuses"][1]["state"].clone();
        let reason = state["waiting"]["reason"].as_str().unwrap_or_default().to_owned();
        ensure!(matches!(&*reason, "ErrImagePull" | "ImagePullBackOff"), "{state:#}");
        Ok(())
    })
    .await?;
    up.kubectl_ok(&["delete", "pod", "pulls", "--timeout=60s"]).await?;
    let server = format!("--docker-server={}", registry.host);
    let (user, password) = (format!("--docker-username={USER}"), format!("--docker-password={PASSWORD}"));
    up.kubectl_ok(&["create", "secret", "docker-registry", "pull", &server, &user, &password]).await?;
    pod["spec"]["imagePullSecrets"] = json!([{"name": "pull"}]);
    up.apply(&pod).await?;
    up.wait_ready("pulls").await?;
    let typed = up.kubectl_with(&["attach", "-i", "pulls", "-c", "side"], Some(b"typed\n")).await?.ok()?;
    ensure!(typed.contains("typed"), "{typed}");
    eventually("it ended with its input", || async {
        let state = up.pod("pulls").await?["status"]["containerStatuses"][1]["state"].clone();
        ensure!(state["terminated"]["exitCode"] == 0, "{state:#}");
        Ok(())
    })
    .await?;
    up.kubectl_ok(&["delete", "pod", "pulls", "--timeout=60s"]).await?;
    nothing_left(&docker).await?;
    up.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_left_of_pods_is_removed_and_a_missing_engine_is_told() -> Result<()> {
    let home = Home::with_tiny("sidecar-left").await?;
    let docker = Docker::start().await?;
    let up = home.up(&["--docker-host", &docker.host()]).await?;
    let mut pod = pods::tiny("left", &["sleep", "1000"]);
    if let Some(containers) = pod["spec"]["containers"].as_array_mut() {
        containers.push(beside("side", "sleep 1000"));
    }
    up.apply(&pod).await?;
    up.wait_ready("left").await?;
    up.kill().await?;
    // The agent's own memory of it is lost, and another one has no word of the pod.
    std::fs::remove_dir_all(home.path().join("node"))?;
    std::fs::remove_dir_all(home.path().join("api"))?;
    let up = home.up(&["--docker-host", &docker.host()]).await?;
    nothing_left(&docker).await?;
    home.assert_clean().await?;
    up.stop().await?;

    let up = home.up(&["--docker-host", "unix:///no/such/socket"]).await?;
    up.apply(&pod).await?;
    eventually("a refusal", || async {
        let status = &up.pod("left").await?["status"];
        ensure!(status["reason"] == "SidecarsUnsupported", "{status:#}");
        let message = status["message"].as_str().unwrap_or_default();
        ensure!(message.contains("there is no Docker API at unix:///no/such/socket"), "{message}");
        Ok(())
    })
    .await?;
    up.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn last_words_are_heard() -> Result<()> {
    let home = Home::with_tiny("last-words").await?;
    let docker = Docker::start().await?;
    let up = home.up(&["--docker-host", &docker.host()]).await?;
    let mut pod = pods::tiny("words", &["sh", "-c", "echo from the machine >/tmp/why; echo printed; exit 3"]);
    pod["spec"]["containers"][0]["terminationMessagePath"] = "/tmp/why".into();
    let side = beside("side", "echo from the container >/dev/termination-log; exit 4");
    if let Some(containers) = pod["spec"]["containers"].as_array_mut() {
        containers.push(side);
    }
    // The end of the log stands in where nothing was left, if that is asked for.
    let mut logs = pods::tiny("logs", &["sh", "-c", "echo first; echo last; exit 5"]);
    logs["spec"]["containers"][0]["terminationMessagePolicy"] = "FallbackToLogsOnError".into();
    let silent = pods::tiny("silent", &["sh", "-c", "echo printed; exit 6"]);
    for pod in [&pod, &logs, &silent] {
        up.apply(pod).await?;
    }
    for name in ["words", "logs", "silent"] {
        eventually_within(Duration::from_mins(2), "it has failed", || async {
            let pod = up.pod(name).await?;
            ensure!(pods::phase(&pod) == "Failed", "{pod:#}");
            Ok(())
        })
        .await?;
    }
    let message = async |pod: &str, container: usize| -> Result<Value> {
        Ok(up.pod(pod).await?["status"]["containerStatuses"][container]["state"]["terminated"]["message"].clone())
    };
    ensure!(message("words", 0).await? == "from the machine\n", "{}", message("words", 0).await?);
    ensure!(message("words", 1).await? == "from the container\n", "{}", message("words", 1).await?);
    ensure!(message("logs", 0).await? == "first\nlast\n", "{}", message("logs", 0).await?);
    ensure!(message("silent", 0).await? == Value::Null, "{}", message("silent", 0).await?);
    up.kubectl_ok(&["delete", "pods", "--all", "--timeout=60s"]).await?;
    home.assert_clean().await?;
    nothing_left(&docker).await?;
    up.stop().await
}
