//! The agent against a scripted API and a scripted hypervisor, with a real image store.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::needless_pass_by_value, reason = "a test")]

#[path = "support/api.rs"]
mod api;
#[path = "support/host.rs"]
mod host;

use std::time::Duration;

use api::Api;
use futures::StreamExt as _;
use host::{Host, UIDS, Wish};
use serde_json::{Value, json};
use vmpod_machine::{
    ExitCause, FaultPoints, GuestState, MachineId, Signal, StdStream, Waiting,
    fake::{Event, MainScript, PowerButton, Ready, Script, Start, World},
};
use vmpod_node::logs::LogOptions;
use vmpod_node::server::{ExecRequest, PodRef, Streams, Target};

fn vm(extra: Value) -> Value {
    let mut container = json!({"name": "vm", "image": "tiny", "imagePullPolicy": "IfNotPresent"});
    for (key, value) in extra.as_object().unwrap() {
        container[key] = value.clone();
    }
    container
}

fn job(code: i32) -> (Value, Script) {
    let spec = json!({"restartPolicy": "Never", "containers": [vm(json!({"command": ["sh", "-c", "exit"]}))]});
    let script = Script { main: MainScript::exits(code).prints("hello\nworld\n"), ..Script::default() };
    (spec, script)
}

fn condition(pod: &Value, kind: &str) -> (String, String) {
    let all = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let found = all.into_iter().find(|c| c["type"] == kind).unwrap_or_default();
    (found["status"].as_str().unwrap_or("").to_owned(), found["reason"].as_str().unwrap_or("").to_owned())
}

fn is_ready(api: &Api, name: &str) -> bool {
    api.pod(name).is_some_and(|pod| condition(&pod, "Ready").0 == "True")
}

fn state(api: &Api, name: &str) -> Value {
    api.pod(name).map(|pod| pod["status"]["containerStatuses"][0]["state"].clone()).unwrap_or_default()
}

fn waiting(api: &Api, name: &str) -> String {
    state(api, name)["waiting"]["reason"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_ends_with_its_exit_code_and_its_output() {
    let host = Host::new().await;
    let (spec, script) = job(3);
    host.world.set_default(script);
    let node = host.start(Wish::default()).await;
    host.api.create_pod("job", UIDS[0], spec);
    host.api.until("failed", |api| api.phase("job").as_deref() == Some("Failed")).await;
    let pod = host.api.pod("job").unwrap();
    let status = &pod["status"];
    let ended = &status["containerStatuses"][0]["state"]["terminated"];
    assert_eq!((&ended["exitCode"], &ended["reason"]), (&json!(3), &json!("Error")));
    assert_eq!(ended["containerID"], json!(format!("vmpod://{}-0", UIDS[0])));
    assert_eq!(status["qosClass"], "BestEffort", "what the API server decided is left alone");
    assert_eq!(status["observedGeneration"], 1);
    assert_eq!(condition(&pod, "Ready"), ("False".to_owned(), "PodFailed".to_owned()));
    assert_eq!(condition(&pod, "PodReadyToStartContainers").0, "False");
    assert_eq!(host.log_text(UIDS[0], 0), ["hello", "world"]);
    host.until_no_machines().await;
    host.until_unheld(UIDS[0]).await;
    assert_eq!(host.api.reasons("job"), ["Pulled", "Created", "Started"]);
    node.stop().await;
    assert_eq!(host.api.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_ready_when_its_guest_answers_and_ends_when_deleted() {
    let host = Host::new().await;
    host.world.set_default(Script { ready: Ready::Never(Waiting::Marker), ..Script::default() });
    let node = host.start(Wish::default()).await;
    host.api.create_pod("web", UIDS[0], json!({"containers": [vm(json!({}))]}));
    host.api.until("running", |api| api.phase("web").as_deref() == Some("Running")).await;
    assert!(!is_ready(&host.api, "web"));
    let id = MachineId::parse(format!("{}-0", UIDS[0])).unwrap();
    host.world.set_guest(&id, GuestState::Ready);
    host.api.until("ready", |api| is_ready(api, "web")).await;
    let pod = host.api.pod("web").unwrap();
    assert!(pod["status"]["podIP"].as_str().unwrap().starts_with("127."), "{}", pod["status"]);
    assert_eq!(pod["status"]["hostIP"], "10.0.0.1");
    assert_eq!(condition(&pod, "PodReadyToStartContainers").0, "True");
    host.world.set_guest(&id, GuestState::Lost("cable".to_owned()));
    host.api.until("not ready", |api| !is_ready(api, "web")).await;
    host.api.delete_pod("web", 30);
    host.api.until("gone", |api| api.pod("web").is_none()).await;
    assert_eq!(host.world.pressed(&id), 1);
    host.until_clean().await;
    assert!(host.api.reasons("web").contains(&"Killing".to_owned()));
    node.stop().await;
    assert_eq!(host.api.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn deletion_asks_first_and_kills_at_the_deadline() {
    let host = Host::new().await;
    host.world.set_default(Script {
        power_button: PowerButton::Ignored,
        main: MainScript { ignores_term: true, ..MainScript::default() },
        ..Script::default()
    });
    let node = host.start(Wish::default()).await;
    host.api.create_pod("console", UIDS[0], json!({"containers": [vm(json!({}))]}));
    host.api.create_pod("main", UIDS[1], json!({"containers": [vm(json!({"args": ["sleep"]}))]}));
    for name in ["console", "main"] {
        host.api.until("ready", |api| is_ready(api, name)).await;
        host.api.delete_pod(name, 1);
        host.api.until("gone", |api| api.pod(name).is_none()).await;
    }
    let killed = |uid: &str| {
        host.world.events().contains(&Event::Ended(MachineId::parse(format!("{uid}-0")).unwrap(), ExitCause::Killed))
    };
    assert!(killed(UIDS[0]) && killed(UIDS[1]));
    host.until_clean().await;
    node.stop().await;
    assert_eq!(host.api.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_main_process_is_told_to_end_and_its_code_kept() {
    let host = Host::new().await;
    let node = host.start(Wish::default()).await;
    host.api.create_pod("main", UIDS[0], json!({"containers": [vm(json!({"args": ["serve"], "workingDir": "/srv",
        "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "$(A)2"}, {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]}))]}));
    host.api.until("ready", |api| is_ready(api, "main")).await;
    let id = MachineId::parse(format!("{}-0", UIDS[0])).unwrap();
    let command = host.world.main_command(&id, "main").unwrap();
    assert_eq!((command.command, command.workdir), (vec!["serve".to_owned()], Some("/srv".to_owned())));
    assert_eq!(command.env[1], ("B".to_owned(), "12".to_owned()));
    assert_eq!(command.env[2].1, host.api.pod("main").unwrap()["status"]["podIP"].as_str().unwrap());
    // Somebody watches how it ends.
    let watched = host.api.clone();
    let last = tokio::spawn(async move {
        watched
            .until("terminated", |api| api.pod("main").is_none() || !state(api, "main")["terminated"].is_null())
            .await;
        watched.pod("main")
    });
    host.api.delete_pod("main", 30);
    host.api.until("gone", |api| api.pod("main").is_none()).await;
    if let Some(pod) = last.await.unwrap() {
        let ended = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
        assert_eq!(ended["exitCode"], 128 + Signal::Term.number());
        assert_eq!(pod["status"]["phase"], "Failed");
    }
    host.until_clean().await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_force_deleted_pod_is_killed_and_its_successor_is_another() {
    let host = Host::new().await;
    let node = host.start(Wish::default()).await;
    let spec = json!({"containers": [vm(json!({}))]});
    host.api.create_pod("web", UIDS[0], spec.clone());
    host.api.until("ready", |api| is_ready(api, "web")).await;
    host.api.vanish("web");
    host.api.create_pod("web", UIDS[1], spec);
    host.api.until("ready again", |api| is_ready(api, "web")).await;
    assert_eq!(
        host.api.pod("web").unwrap()["status"]["containerStatuses"][0]["containerID"],
        format!("vmpod://{}-0", UIDS[1])
    );
    let live = [MachineId::parse(format!("{}-0", UIDS[1])).unwrap()];
    tokio::time::timeout(Duration::from_secs(10), host.world.until(|world| world.live() == live)).await.unwrap();
    node.stop().await;
    assert_eq!(host.api.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crashed_machine_is_replaced_after_a_back_off() {
    let host = Host::new().await;
    let node = host.start(Wish::default()).await;
    host.api.create_pod("web", UIDS[0], json!({"containers": [vm(json!({}))]}));
    host.api.until("ready", |api| is_ready(api, "web")).await;
    host.world.crash(&MachineId::parse(format!("{}-0", UIDS[0])).unwrap());
    host.api.until("backing off", |api| waiting(api, "web") == "CrashLoopBackOff").await;
    let status = host.api.pod("web").unwrap()["status"].clone();
    assert_eq!(status["phase"], "Running");
    assert_eq!(status["containerStatuses"][0]["lastState"]["terminated"]["exitCode"], 137);
    assert!(
        state(&host.api, "web")["waiting"]["message"]
            .as_str()
            .unwrap()
            .starts_with("back-off 10s restarting failed container=vm pod=web_default")
    );
    host.api.until("ready again", |api| is_ready(api, "web")).await;
    let status = host.api.pod("web").unwrap()["status"].clone();
    assert_eq!(status["containerStatuses"][0]["restartCount"], 1);
    assert_eq!(status["containerStatuses"][0]["containerID"], format!("vmpod://{}-1", UIDS[0]));
    assert_eq!(host.world.most_live(UIDS[0]), 1);
    node.stop().await;
    assert_eq!(host.api.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_run_says_why() {
    let host = Host::new().await;
    let node = host.start(Wish::default()).await;
    let container = |extra: Value| json!({"restartPolicy": "Never", "containers": [vm(extra)]});
    host.api.create_pod("big", UIDS[0], container(json!({"resources": {"requests": {"memory": "1Ti"}}})));
    host.api.create_pod("side", UIDS[1], json!({"containers": [vm(json!({})), {"name": "side", "image": "x"}]}));
    host.api.create_pod("noimage", UIDS[2], container(json!({"image": "missing"})));
    host.api.create_pod("noconfig", UIDS[3], container(json!({"envFrom": [{"configMapRef": {"name": "none"}}]})));
    host.api.create_pod("small", UIDS[4], container(json!({"resources": {"limits": {"memory": "1Mi"}}})));
    let failed = |api: &Api, name: &str, reason: &str| {
        api.pod(name).is_some_and(|pod| pod["status"]["phase"] == "Failed" && pod["status"]["reason"] == reason)
    };
    host.api.until("big is refused", |api| failed(api, "big", "OutOfmemory")).await;
    host.api.until("side is refused", |api| failed(api, "side", "SidecarsUnsupported")).await;
    host.api.until("the image is missed", |api| waiting(api, "noimage") == "ErrImagePull").await;
    let message = state(&host.api, "noimage")["waiting"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("never pulled"), "{message}");
    host.api.until("and then backed off", |api| waiting(api, "noimage") == "ImagePullBackOff").await;
    host.api.until("the config map is missed", |api| waiting(api, "noconfig") == "CreateContainerConfigError").await;
    assert_eq!(state(&host.api, "noconfig")["waiting"]["message"], "configmap \"none\" not found");
    host.api.until("memory is too small", |api| waiting(api, "small") == "CreateContainerError").await;
    assert!(state(&host.api, "small")["waiting"]["message"].as_str().unwrap().contains("needs at least"));
    host.world.set_default(Script { start: Start::Fails("no firmware".to_owned()), ..Script::default() });
    host.api.create_pod("nostart", UIDS[5], container(json!({})));
    host.api.until("the start fails", |api| api.phase("nostart").as_deref() == Some("Failed")).await;
    let ended = state(&host.api, "nostart")["terminated"].clone();
    assert_eq!((&ended["exitCode"], &ended["reason"]), (&json!(128), &json!("StartError")));
    assert!(ended["message"].as_str().unwrap().contains("no firmware"));
    // Every one of them can be deleted, and nothing stays.
    for name in ["big", "side", "noimage", "noconfig", "small", "nostart"] {
        host.api.delete_pod(name, 30);
    }
    for name in ["big", "side", "noimage", "noconfig", "small", "nostart"] {
        host.api.until(&format!("{name} is gone"), |api| api.pod(name).is_none()).await;
    }
    host.until_clean().await;
    node.stop().await;
    assert_eq!(host.api.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubelet_side_reaches_the_guest() {
    let host = Host::new().await;
    let node = host.start(Wish::default()).await;
    host.api.create_pod("web", UIDS[0], json!({"containers": [vm(json!({"env": [{"name": "A", "value": "1"}]}))]}));
    host.api.until("ready", |api| is_ready(api, "web")).await;
    let pod = PodRef { namespace: "default".to_owned(), name: "web".to_owned(), uid: None };
    let target = Target { pod: pod.clone(), container: "vm".to_owned() };
    let runtime = &node.runtime;
    runtime.check_running(&target).await.unwrap();
    let (mut reader, writer) = tokio::io::duplex(1024);
    let streams = Streams { stdin: None, stdout: Some(Box::new(writer)), stderr: None, resize: None };
    let request = ExecRequest { command: vec!["echo".to_owned(), "hi".to_owned()], tty: false };
    let exit = runtime.exec(&target, request, streams).await.unwrap();
    assert_eq!(exit.code(), 0);
    let mut text = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut reader, &mut text).await.unwrap();
    assert_eq!(text, "echo hi\n");
    assert!(runtime.logs(&target, LogOptions::default()).await.is_ok());
    let previous = LogOptions { previous: true, ..LogOptions::default() };
    assert!(runtime.logs(&target, previous).await.is_err(), "there is no previous attempt");
    let other = Target { pod: PodRef { uid: Some(UIDS[1].to_owned()), ..pod.clone() }, container: "vm".to_owned() };
    assert!(runtime.check_running(&other).await.is_err(), "another UID is another pod");
    assert!(runtime.check_running(&Target { pod, container: "x".to_owned() }).await.is_err());
    assert_eq!(runtime.pods().len(), 1);
    assert_eq!(runtime.stats().await.unwrap().pods.len(), 1);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kept_machines_are_adopted_and_left_ones_removed() {
    let host = Host::new().await;
    let node = host.start(Wish { keep_vms: true, ..Wish::default() }).await;
    host.api.create_pod("stays", UIDS[0], json!({"containers": [vm(json!({}))]}));
    host.api.create_pod("leaves", UIDS[1], json!({"containers": [vm(json!({}))]}));
    for name in ["stays", "leaves"] {
        host.api.until("ready", |api| is_ready(api, name)).await;
    }
    let before = host.api.pod("stays").unwrap();
    node.stop().await;
    assert_eq!(host.world.live().len(), 2, "machines outlive the agent");
    host.api.vanish("leaves");
    // An API that can't be asked says nothing: no machine is touched.
    host.api.set_down(true);
    let node = host.spawn(Wish { keep_vms: true, ..Wish::default() }).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(host.world.live().len(), 2, "a failed look deletes nothing");
    host.api.set_down(false);
    node.until_ready().await;
    let stays = MachineId::parse(format!("{}-0", UIDS[0])).unwrap();
    tokio::time::timeout(Duration::from_secs(20), host.world.until(|world| world.live() == [stays.clone()]))
        .await
        .unwrap();
    assert_eq!(host.world.starts(&stays), 1, "it was adopted, not started again");
    let after = host.api.pod("stays").unwrap();
    assert_eq!(after["status"], before["status"], "a restart of the agent flips nothing");
    node.stop().await;
    assert_eq!(host.api.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_keep_vms_machines_stop_with_the_agent_and_come_back_with_it() {
    let host = Host::new().await;
    let node = host.start(Wish::default()).await;
    host.api.create_pod("always", UIDS[0], json!({"containers": [vm(json!({}))]}));
    host.api.create_pod(
        "never",
        UIDS[1],
        json!({"restartPolicy": "Never", "containers": [vm(json!({"args": ["work"]}))]}),
    );
    for name in ["always", "never"] {
        host.api.until("ready", |api| is_ready(api, name)).await;
    }
    node.stop().await;
    assert_eq!(host.world.live(), []);
    assert!(!is_ready(&host.api, "always"));
    let never = host.api.pod("never").unwrap();
    assert_eq!((&never["status"]["phase"], &never["status"]["reason"]), (&json!("Failed"), &json!("Terminated")));
    let node = host.start(Wish::default()).await;
    host.api.until("back", |api| is_ready(api, "always")).await;
    assert_eq!(host.world.starts(&MachineId::parse(format!("{}-1", UIDS[1])).unwrap()), 0, "a finished pod runs again");
    node.stop().await;
    assert_eq!(host.api.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_node_and_its_lease_are_there() {
    let host = Host::new().await;
    let node = host.start(Wish::default()).await;
    let object = host.api.object("/api/v1/nodes/n").unwrap();
    assert_eq!(object["status"]["allocatable"]["pods"], "110");
    assert_eq!(object["status"]["images"][0]["names"][0], "tiny:latest");
    let lease = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/n";
    host.api.until("a lease", |api| api.object(lease).is_some()).await;
    assert_eq!(host.api.object(lease).unwrap()["spec"]["holderIdentity"], "n");
    node.stop().await;
    let conditions = host.api.object("/api/v1/nodes/n").unwrap()["status"]["conditions"].clone();
    let ready = conditions.as_array().unwrap().iter().find(|c| c["type"] == "Ready").unwrap().clone();
    assert_eq!((&ready["status"], &ready["message"]), (&json!("False"), &json!("node is shutting down")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_resists_removal_holds_back_its_own_pod_only() {
    let host = Host::new().await;
    let machines = host.root().join("machines");
    std::fs::create_dir_all(machines.join(format!("{}-0", UIDS[1]))).unwrap();
    // A file where a directory is to be removed.
    let obstacle = machines.join(format!(".removing-{}-0", UIDS[1]));
    std::fs::write(&obstacle, "").unwrap();
    host.api.create_pod("held", UIDS[1], json!({"containers": [vm(json!({}))]}));
    let node = host.start(Wish::default()).await;
    host.api.create_pod("free", UIDS[0], json!({"containers": [vm(json!({}))]}));
    host.api.until("ready", |api| is_ready(api, "free")).await;
    let held = MachineId::parse(format!("{}-0", UIDS[1])).unwrap();
    assert!(!host.world.events().contains(&Event::Started(held)));
    std::fs::remove_file(&obstacle).unwrap();
    host.api.until("ready", |api| is_ready(api, "held")).await;
    node.stop().await;
    assert_eq!(host.api.violations(), Vec::<String>::new());
}

/// A story with one pod, told from outside; the agent may die at any point of it.
#[derive(Clone, Copy)]
enum Story {
    /// A job that ends with code 3 by itself, and is deleted then.
    Job,
    /// A machine that runs until it is deleted.
    Machine,
    /// A main process that ends when it is told to.
    Service,
}

impl Story {
    fn prepare(self, world: &World) -> Value {
        match self {
            Self::Job => {
                let (spec, script) = job(3);
                world.set_default(script);
                spec
            }
            Self::Machine => json!({"containers": [vm(json!({}))]}),
            Self::Service => {
                let main = MainScript {
                    output: vec![(StdStream::Stdout, "hello\n".to_owned()), (StdStream::Stderr, "world\n".to_owned())],
                    ..MainScript::default()
                };
                world.set_default(Script { main, ..Script::default() });
                json!({"restartPolicy": "Never", "containers": [vm(json!({"command": ["serve"]}))]})
            }
        }
    }

    async fn tell(self, api: Api, root: std::path::PathBuf) {
        match self {
            Self::Job => {
                api.until("the job failed", |api| api.phase("p").as_deref() == Some("Failed")).await;
                assert_eq!(state(&api, "p")["terminated"]["exitCode"], 3, "the exit code");
                assert_eq!(host::log_text(&root, UIDS[0], 0), ["hello", "world"], "the output");
            }
            Self::Machine | Self::Service => api.until("ready", |api| is_ready(api, "p")).await,
        }
        api.delete_pod("p", 30);
        api.until("gone", |api| api.pod("p").is_none()).await;
    }
}

async fn told_with_a_crash(story: Story, at: usize) -> usize {
    let host = Host::new().await;
    let faults = FaultPoints::crash_at(at);
    let spec = story.prepare(&host.world);
    host.api.create_pod("p", UIDS[0], spec);
    let first = host.spawn(Wish { faults: faults.clone(), ..Wish::default() }).await;
    let mut told = Box::pin(story.tell(host.api.clone(), host.root().to_owned()));
    let (mut over, mut crashed) = (false, None);
    tokio::select! {
        () = &mut told => over = true,
        point = faults.crashed() => crashed = Some(point),
    }
    if over {
        // The agent may still die while it cleans up.
        tokio::select! {
            () = host.until_clean() => {}
            point = faults.crashed() => crashed = Some(point),
        }
    }
    if let Some(point) = crashed {
        first.die().await;
        let second = host.spawn(Wish::default()).await;
        if !over {
            let done = tokio::time::timeout(Duration::from_mins(1), told).await;
            assert!(done.is_ok(), "after a crash at {at} ({point}) the story doesn't end");
        }
        host.until_clean().await;
        second.stop().await;
    } else {
        first.stop().await;
    }
    let starts: Vec<_> = host.world.events().into_iter().filter(|event| matches!(event, Event::Started(_))).collect();
    assert!(host.world.most_live(UIDS[0]) <= 1, "crash at {at}: two machines at once");
    assert_eq!(starts.len(), 1, "crash at {at}: {starts:?}");
    let mains = host.world.events().into_iter().filter(|event| matches!(event, Event::MainStarted(..))).count();
    assert!(mains <= 1, "crash at {at}: the main process ran {mains} times");
    assert_eq!(host.world.live(), [], "crash at {at}");
    host.until_unheld(UIDS[0]).await;
    assert_eq!(host.api.violations(), Vec::<String>::new(), "crash at {at}");
    faults.hits()
}

async fn told_with_every_crash(story: Story) {
    let points = told_with_a_crash(story, usize::MAX).await;
    assert!(points > 15, "only {points} points: the agent has more effects than that");
    let all = futures::stream::iter(0..points).map(|at| told_with_a_crash(story, at)).buffer_unordered(6);
    all.for_each(|_| async {}).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_survives_a_crash_after_every_effect() {
    told_with_every_crash(Story::Job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_survives_a_crash_after_every_effect() {
    told_with_every_crash(Story::Machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_survives_a_crash_after_every_effect() {
    told_with_every_crash(Story::Service).await;
}
