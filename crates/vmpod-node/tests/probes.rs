//! Probes and lifecycle hooks, with a scripted hypervisor.

#![allow(
    missing_docs,
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::needless_pass_by_value,
    reason = "a test"
)]

#[path = "support/api.rs"]
mod api;
#[path = "support/host.rs"]
mod host;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use api::Api;
use host::{Host, UIDS, Wish};
use serde_json::{Value, json};
use vmpod_machine::{
    Exec, ExitStatus, MachineId,
    fake::{Event, ExecScript, Script},
};

/// A guest whose commands named `probe`, `hook`, … succeed while their switch is on.
#[derive(Clone, Default)]
struct Switches(Arc<[AtomicBool; 4]>);

const STARTED: usize = 0;
const READY: usize = 1;
const ALIVE: usize = 2;
const HOOK: usize = 3;

impl Switches {
    fn set(&self, which: usize, on: bool) {
        self.0[which].store(on, Ordering::SeqCst);
    }

    fn script(&self) -> Script {
        let switches = self.clone();
        let exec = move |exec: &Exec| {
            let which = match exec.command.first().map(String::as_str) {
                Some("started") => STARTED,
                Some("ready") => READY,
                Some("alive") => ALIVE,
                Some("hook") => HOOK,
                Some("hang") => return ExecScript { hangs: true, ..ExecScript::default() },
                _ => return ExecScript::default(),
            };
            let on = switches.0[which].load(Ordering::SeqCst);
            ExecScript {
                stdout: if on { String::new() } else { "no such luck\n".to_owned() },
                status: ExitStatus::Code(i32::from(!on)),
                ..ExecScript::default()
            }
        };
        Script { exec: Arc::new(exec), ..Script::default() }
    }
}

fn exec(name: &str) -> Value {
    json!({"exec": {"command": [name]}, "periodSeconds": 1, "failureThreshold": 1})
}

fn container(api: &Api) -> Value {
    api.pod("p").map(|pod| pod["status"]["containerStatuses"][0].clone()).unwrap_or_default()
}

fn id(attempt: u32) -> MachineId {
    MachineId::parse(format!("{}-{attempt}", UIDS[0])).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_say_when_a_container_has_started_and_whether_it_is_ready() {
    let (host, switches) = (Host::new().await, Switches::default());
    host.world.set_default(switches.script());
    let node = host.start(Wish::default()).await;
    let mut startup = exec("started");
    startup["failureThreshold"] = json!(100);
    let vm = json!({"name": "vm", "image": "tiny", "args": ["serve"], "startupProbe": startup, "readinessProbe": exec("ready")});
    host.api.create_pod("p", UIDS[0], json!({"containers": [vm]}));
    host.api.until("it is asked", |api| api.reasons("p").contains(&"Unhealthy".to_owned())).await;
    let shown = container(&host.api);
    assert_eq!((&shown["started"], &shown["ready"]), (&json!(false), &json!(false)), "{shown}");
    assert_eq!(host.world.commands(&id(0)).iter().filter(|c| c[0] == "ready").count(), 0, "startup comes first");
    switches.set(STARTED, true);
    host.api.until("it has started", |api| container(api)["started"] == json!(true)).await;
    assert_eq!(container(&host.api)["ready"], json!(false));
    switches.set(READY, true);
    host.api.until("it is ready", |api| container(api)["ready"] == json!(true)).await;
    switches.set(READY, false);
    host.api.until("it is not", |api| container(api)["ready"] == json!(false)).await;
    switches.set(READY, true);
    host.api.until("it is again", |api| container(api)["ready"] == json!(true)).await;
    let asked = host.world.commands(&id(0)).len();
    // An agent that dies and comes back neither restarts anything nor takes back what it said.
    node.die().await;
    switches.set(STARTED, false);
    let node = host.start(Wish::default()).await;
    host.world.until(|world| world.commands(&id(0)).len() > asked + 1).await;
    let shown = container(&host.api);
    assert_eq!((&shown["started"], &shown["ready"], &shown["restartCount"]), (&json!(true), &json!(true), &json!(0)));
    node.stop().await;
    assert_eq!(host.api.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_is_not_alive_is_ended_and_starts_again() {
    // Each waits for its back-off.
    let commands = [json!(["serve"]), json!([])];
    futures::future::join_all(commands.map(async |args| {
        let (host, switches) = (Host::new().await, Switches::default());
        switches.set(ALIVE, true);
        host.world.set_default(switches.script());
        let node = host.start(Wish::default()).await;
        let vm = json!({"name": "vm", "image": "tiny", "args": args, "livenessProbe": exec("alive")});
        host.api.create_pod("p", UIDS[0], json!({"restartPolicy": "OnFailure", "containers": [vm]}));
        host.world.until(|world| world.commands(&id(0)).len() > 1).await;
        assert_eq!(container(&host.api)["restartCount"], json!(0));
        switches.set(ALIVE, false);
        host.api.until("it starts again", |api| container(api)["restartCount"] == json!(1)).await;
        let last = container(&host.api)["lastState"]["terminated"].clone();
        assert_eq!((&last["reason"], &last["exitCode"]), (&json!("Error"), &json!(143)), "{last}");
        let reasons = host.api.reasons("p");
        assert!(reasons.contains(&"Unhealthy".to_owned()) && reasons.contains(&"Killing".to_owned()), "{reasons:?}");
        node.stop().await;
        assert_eq!(host.api.violations(), Vec::<String>::new());
    }))
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_that_never_answers_has_failed() {
    let host = Host::new().await;
    host.world.set_default(Switches::default().script());
    let node = host.start(Wish::default()).await;
    let vm = json!({"name": "vm", "image": "tiny", "livenessProbe": exec("hang")});
    host.api.create_pod("p", UIDS[0], json!({"restartPolicy": "Never", "containers": [vm]}));
    host.api.until("it failed", |api| api.phase("p").as_deref() == Some("Failed")).await;
    assert_eq!(container(&host.api)["state"]["terminated"]["exitCode"], json!(143));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_run_around_the_main_process() {
    let (host, switches) = (Host::new().await, Switches::default());
    switches.set(HOOK, true);
    host.world.set_default(switches.script());
    let node = host.start(Wish::default()).await;
    let hooks =
        json!({"postStart": {"exec": {"command": ["hook", "up"]}}, "preStop": {"exec": {"command": ["hook", "down"]}}});
    let vm = json!({"name": "vm", "image": "tiny", "args": ["serve"], "lifecycle": hooks});
    host.api.create_pod("p", UIDS[0], json!({"containers": [vm]}));
    host.api.until("it is ready", |api| container(api)["ready"] == json!(true)).await;
    assert_eq!(host.world.commands(&id(0)), [["hook", "up"]]);
    // The hook was run: another agent doesn't run it again.
    node.die().await;
    let node = host.start(Wish::default()).await;
    host.api.until("it is ready", |api| container(api)["ready"] == json!(true)).await;
    host.api.delete_pod("p", 30);
    host.api.until("it is gone", |api| api.pod("p").is_none()).await;
    // Besides, the guest was asked for the container's last words.
    let hooks: Vec<_> = host.world.commands(&id(0)).into_iter().filter(|command| command[0] == "hook").collect();
    assert_eq!(hooks, [["hook", "up"], ["hook", "down"]]);
    host.until_clean().await;
    node.stop().await;
    assert_eq!(host.api.violations(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pre_stop_hook_has_no_longer_than_its_pod() {
    let host = Host::new().await;
    host.world.set_default(Switches::default().script());
    let node = host.start(Wish::default()).await;
    let vm = json!({"name": "vm", "image": "tiny", "lifecycle": {"preStop": {"exec": {"command": ["hang"]}}}});
    host.api.create_pod("p", UIDS[0], json!({"containers": [vm]}));
    host.api.until("it is ready", |api| container(api)["ready"] == json!(true)).await;
    let began = Instant::now();
    host.api.delete_pod("p", 2);
    host.api.until("it is gone", |api| api.pod("p").is_none()).await;
    assert!(began.elapsed() > Duration::from_secs(1), "the hook had its time");
    host.until_clean().await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_post_start_hook_that_fails_ends_the_container() {
    let host = Host::new().await;
    host.world.set_default(Switches::default().script());
    let node = host.start(Wish::default()).await;
    let vm = json!({"name": "vm", "image": "tiny", "args": ["serve"], "lifecycle": {"postStart": {"exec": {"command": ["hook"]}}}});
    host.api.create_pod("p", UIDS[0], json!({"restartPolicy": "Never", "containers": [vm]}));
    host.api.until("it failed", |api| api.phase("p").as_deref() == Some("Failed")).await;
    let reasons = host.api.reasons("p");
    assert!(reasons.contains(&"FailedPostStartHook".to_owned()), "{reasons:?}");
    assert!(host.world.events().contains(&Event::MainStarted(id(0), "main".to_owned())));
    node.stop().await;
    host.until_no_machines().await;
}
