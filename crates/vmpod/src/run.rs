//! `vmpod run`: one throwaway machine, like `docker run`.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::{Container, EnvVar, Pod, PodSpec, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::{LogParams, ObjectMeta, PostParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client};
use vmpod_api::annotations;
use vmpod_image::Reference;

use crate::agent;
use crate::args::{self, NodeMachines};
use crate::client;
use crate::exec;
use crate::home::{Home, Role};
use crate::image;
use crate::interrupts::{Interrupt, Interrupts};
use crate::output::{self, Progress, talk};
use crate::pods;
use crate::report::{self, Exit, Remedy};
use crate::stack::{Plan, Stack};
use crate::up;

const NAMESPACE: &str = "default";
/// How long the guest gets to shut down once nobody needs it any more.
const GRACE: Duration = Duration::from_secs(5);

/// Runs the machine from its first to its last moment.
pub(crate) async fn run(home: &Home, args: args::Run) -> Result<Exit> {
    let reference = image::reference(&args.image)?;
    let store = image::open(home)?;
    if reference.is_local() {
        // Said before anything starts: a local name is never pulled.
        image::find(&store, &reference)?;
    }
    let user_data = match &args.user_data {
        Some(path) => Some(std::fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?),
        None => None,
    };
    let pod = pod(&args, &reference, user_data, &letters(5));
    let interrupts = Interrupts::listen()?;
    match home.holder()? {
        Some(holder) if holder.role == Role::Up => {
            let client = client::connect(home).await?;
            Box::pin(in_pod(client, pod, &args, interrupts)).await
        }
        _ if args.detach => Err(up::needs_up(home, "--detach").into()),
        _ if args.keep => Err(up::needs_up(home, "--keep").into()),
        _ => Box::pin(alone(home, pod, &args, interrupts)).await,
    }
}

/// Runs the pod on a private API and node, which end with it.
async fn alone(home: &Home, pod: Pod, args: &args::Run, mut interrupts: Interrupts) -> Result<Exit> {
    let hypervisor = agent::Hypervisor::of(&args.hypervisor)?;
    up::clear_dead_runs(home, &hypervisor).await;
    let private = home.ephemeral(&letters(8));
    let _lock = private.lock(Role::Run).await?;
    let machines = NodeMachines {
        keep_vms: false,
        max_pods: 1,
        object: args::NodeObject::default(),
        reserve_memory: None,
        // It would be gone before anybody could use it.
        snapshots: args::Size { bytes: 0, quantity: "0".to_owned() },
        network: args::Network::default(),
        docker: args::DockerHost::default(),
        shutdown_grace: GRACE,
        accel: None,
        hypervisor: args.hypervisor.clone(),
        guest_login: args.guest_login.clone(),
        plain_http: Vec::new(),
        registry_ca: Vec::new(),
        sources: args::Sources::default(),
        images: args::NodeImages::default(),
        // One machine, for as long as somebody waits for it: nothing else is to go first.
        eviction: args::Eviction { eviction_hard: vmpod_node::Eviction::none(), ..args::Eviction::default() },
    };
    let spinner = progress(args, "starting");
    let starting = Stack::start(Plan {
        home: &private,
        name: agent::node_name(None),
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        kubelet_port: 0,
        tls_sans: Vec::new(),
        machines: &machines,
        fleet: None,
    });
    let stack = tokio::select! {
        stack = starting => Ok(stack),
        interrupt = interrupts.next() => Err(interrupt),
    };
    spinner.clear();
    let result = match stack {
        Err(interrupt) => Ok(Exit::Command(interrupt.code())),
        Ok(Err(error)) => Err(error),
        Ok(Ok(mut stack)) => {
            let result = tokio::select! {
                result = async {
                    let client = client::from_file(&private.kubeconfig(), None).await?;
                    Box::pin(in_pod(client, pod, args, interrupts)).await
                } => result,
                error = stack.ended() => Err(error),
            };
            let stopped = stack.stop(GRACE).await;
            // What the command did matters more than how its surroundings ended.
            if let (Ok(_), Err(error)) = (&result, &stopped) {
                tracing::warn!("{error:#}");
            }
            result
        }
    };
    // Nothing may be left, whatever went wrong before.
    let cleared = up::clear(&private, hypervisor).await;
    match (result, cleared) {
        (Ok(exit), Err(error)) => {
            tracing::error!("can't remove {}: {error:#}", private.root().display());
            Ok(exit)
        }
        (result, _) => result,
    }
}

/// Creates the pod, shows what it does, removes it.
async fn in_pod(client: Client, pod: Pod, args: &args::Run, mut interrupts: Interrupts) -> Result<Exit> {
    let api: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let name = pod.metadata.name.clone().unwrap_or_default();
    match api.create(&PostParams::default(), &pod).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 409 => {
            return Err(Remedy::new(
                format!("there is a pod {name} already"),
                format!("choose another --name, or remove that one with `vmpod stop {name}`"),
            )
            .into());
        }
        Err(error) => return Err(error).with_context(|| format!("can't create pod {name}")),
    }
    if args.detach {
        output::data(&format!("{name}\n"))?;
        return Ok(Exit::Done);
    }
    let ended: Result<Exit, Interrupt> = tokio::select! {
        result = follow(&api, &name, args) => match result {
            Ok(exit) => Ok(exit),
            Err(error) => {
                remove(&client, &name, &mut interrupts).await?;
                return Err(error);
            }
        },
        interrupt = interrupts.next() => Err(interrupt),
    };
    match ended {
        Ok(exit) if args.keep => Ok(exit),
        Ok(exit) => {
            // What the command did is the result; what is left of the pod is said.
            if let Err(error) = remove(&client, &name, &mut interrupts).await {
                report::print(&error);
            }
            Ok(exit)
        }
        Err(interrupt) => {
            remove(&client, &name, &mut interrupts).await?;
            Ok(Exit::Command(interrupt.code()))
        }
    }
}

/// Removes the pod; an interrupt takes the grace away.
async fn remove(client: &Client, name: &str, interrupts: &mut Interrupts) -> Result<()> {
    tokio::select! {
        result = pods::remove(client, NAMESPACE, name, Some(GRACE)) => return result,
        _ = interrupts.next() => {}
    }
    pods::remove(client, NAMESPACE, name, Some(Duration::ZERO)).await
}

/// Waits for the machine, runs the command or shows its output, and finds out how it ended.
async fn follow(api: &Api<Pod>, name: &str, args: &args::Run) -> Result<Exit> {
    let interactive = args.stdin || args.tty;
    let spinner = progress(args, "scheduling");
    let look = |pod: Option<&Pod>| {
        let Some(pod) = pod else { return true };
        match stage(pod) {
            Stage::Waiting(why) => {
                spinner.say(why);
                false
            }
            Stage::Started { ready } => {
                spinner.say("waiting for the guest");
                ready || !interactive
            }
            Stage::Finished(_) | Stage::Hopeless(_) => true,
        }
    };
    let pod = await_condition(api.clone(), name, look).await;
    spinner.clear();
    let pod = pod.with_context(|| format!("can't watch pod {name}"))?;
    match pod.as_ref().map(stage) {
        None => return Err(deleted(name)),
        Some(Stage::Hopeless(why)) => return Err(hopeless(name, &why)),
        _ => {}
    }
    if interactive && !matches!(pod.as_ref().map(stage), Some(Stage::Finished(_))) {
        let streams = exec::Streams { stdin: args.stdin, tty: args.tty };
        return exec::run(api, name, None, typed_command(args), streams).await;
    }
    if !args.quiet && args.command.is_empty() {
        talk("the console of the machine (Ctrl-C ends it):");
    }
    pods::print_log(api, name, &LogParams { follow: true, ..LogParams::default() }).await?;
    let over = |pod: Option<&Pod>| pod.is_none_or(|pod| matches!(stage(pod), Stage::Finished(_) | Stage::Hopeless(_)));
    let pod = await_condition(api.clone(), name, over).await.with_context(|| format!("can't watch pod {name}"))?;
    match pod.as_ref().map(stage) {
        Some(Stage::Finished(End::Code(code))) => Ok(Exit::Command(exec::low_byte(code))),
        Some(Stage::Finished(End::Lost(why)) | Stage::Hopeless(why)) => Err(hopeless(name, &why)),
        _ => Err(deleted(name)),
    }
}

fn deleted(name: &str) -> anyhow::Error {
    anyhow::anyhow!("pod {name} was deleted by somebody else")
}

fn hopeless(name: &str, why: &str) -> anyhow::Error {
    anyhow::anyhow!("{why}").context(format!("the machine of pod {name} can't run"))
}

fn progress(args: &args::Run, what: &str) -> Progress {
    if args.quiet { Progress::hidden() } else { Progress::spinner(what) }
}

/// How far a pod is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Not yet, and what it waits for.
    Waiting(String),
    /// The machine runs.
    Started { ready: bool },
    /// It is over.
    Finished(End),
    /// It will not start unless somebody changes something.
    Hopeless(String),
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The main process's exit code.
    Code(i32),
    /// There is none, because the machine failed.
    Lost(String),
}

/// Reasons for which the agent tries again later and a person shouldn't wait.
const HOPELESS: [&str; 8] = [
    "ErrImagePull",
    "ImagePullBackOff",
    "ErrImageNeverPull",
    "InvalidImageName",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
    "CrashLoopBackOff",
];
/// Reasons of an end at which no command has run.
const NEVER_RAN: [&str; 4] = ["StartError", "ContainerCannotRun", "ContainerStatusUnknown", "CreateContainerError"];

/// How far a pod is.
pub(crate) fn stage(pod: &Pod) -> Stage {
    let Some(status) = &pod.status else { return Stage::Waiting("scheduling".into()) };
    let condition = |kind: &str| status.conditions.iter().flatten().find(|c| c.type_ == kind);
    let state = status.container_statuses.as_deref().and_then(|all| all.first()).and_then(|c| c.state.as_ref());
    let told = |reason: &str, message: Option<&str>| match message {
        Some(message) if !message.is_empty() => format!("{reason}: {message}"),
        _ => reason.to_owned(),
    };
    if let Some(ended) = state.and_then(|s| s.terminated.as_ref()) {
        let reason = ended.reason.as_deref().unwrap_or_default();
        return Stage::Finished(if NEVER_RAN.contains(&reason) {
            End::Lost(told(reason, ended.message.as_deref()))
        } else {
            End::Code(ended.exit_code)
        });
    }
    if status.phase.as_deref() == Some("Failed") {
        return Stage::Hopeless(told(status.reason.as_deref().unwrap_or("Failed"), status.message.as_deref()));
    }
    if let Some(waiting) = state.and_then(|s| s.waiting.as_ref()) {
        let reason = waiting.reason.as_deref().unwrap_or_default();
        let text = told(reason, waiting.message.as_deref());
        return if HOPELESS.contains(&reason) {
            Stage::Hopeless(text)
        } else {
            Stage::Waiting("preparing the machine".into())
        };
    }
    if state.is_some_and(|s| s.running.is_some()) {
        return Stage::Started { ready: condition("Ready").is_some_and(|c| c.status == "True") };
    }
    match condition("PodScheduled") {
        Some(c) if c.status == "False" && c.reason.as_deref() == Some("Unschedulable") => {
            Stage::Hopeless(told("it fits on no node", c.message.as_deref()))
        }
        Some(c) if c.status == "True" => Stage::Waiting("preparing the machine".into()),
        _ => Stage::Waiting("scheduling".into()),
    }
}

/// What runs when the person types: the command, or a shell.
fn typed_command(args: &args::Run) -> Vec<String> {
    let mut command = args.command.clone();
    if command.is_empty() {
        command = ["sh", "-l"].map(str::to_owned).to_vec();
    }
    if args.env.is_empty() {
        return command;
    }
    let mut with_env = vec!["env".to_owned()];
    with_env.extend(args.env.iter().map(|v| format!("{}={}", v.key, v.value)));
    with_env.extend(command);
    with_env
}

/// The pod that was asked for.
fn pod(args: &args::Run, reference: &Reference, user_data: Option<String>, suffix: &str) -> Pod {
    let name = args.name.clone().unwrap_or_else(|| default_name(reference.repository(), suffix));
    let sizes = [
        ("cpu", args.cpus.clone()),
        ("memory", args.memory.as_ref().map(|size| size.quantity.clone())),
        ("ephemeral-storage", args.disk.as_ref().map(|size| size.quantity.clone())),
    ];
    let sizes: BTreeMap<String, Quantity> =
        sizes.into_iter().filter_map(|(key, value)| Some((key.to_owned(), Quantity(value?)))).collect();
    let resources = (!sizes.is_empty()).then(|| ResourceRequirements {
        requests: Some(sizes.clone()),
        limits: Some(sizes),
        claims: None,
    });
    let interactive = args.stdin || args.tty;
    let env: Vec<EnvVar> = args
        .env
        .iter()
        .map(|v| EnvVar { name: v.key.clone(), value: Some(v.value.clone()), ..EnvVar::default() })
        .collect();
    Pod {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: Some(NAMESPACE.into()),
            labels: Some(BTreeMap::from([("app.kubernetes.io/managed-by".into(), "vmpod-run".into())])),
            annotations: user_data.map(|data| BTreeMap::from([(annotations::USER_DATA.to_owned(), data)])),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            restart_policy: Some("Never".into()),
            automount_service_account_token: Some(false),
            termination_grace_period_seconds: i64::try_from(GRACE.as_secs()).ok(),
            containers: vec![Container {
                name: "machine".into(),
                image: Some(reference.to_string()),
                image_pull_policy: Some("IfNotPresent".into()),
                // With somebody at the keys the machine comes first and the command follows by exec.
                command: (!interactive && !args.command.is_empty()).then(|| args.command.clone()),
                env: (!env.is_empty()).then_some(env),
                resources,
                ..Container::default()
            }],
            ..PodSpec::default()
        }),
        status: None,
    }
}

/// A pod name made of an image's: its last word, cleaned, and some letters.
fn default_name(repository: &str, suffix: &str) -> String {
    let word = repository.rsplit('/').next().unwrap_or_default().to_ascii_lowercase();
    let word: String = word.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(40).collect();
    let word = word.trim_matches('-');
    format!("{}-{suffix}", if word.is_empty() { "machine" } else { word })
}

/// Random letters that make no words, as Kubernetes chooses them.
pub(crate) fn letters(n: usize) -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    (0..n).map(|_| char::from(LETTERS[usize::from(rand::random::<u16>()) % LETTERS.len()])).collect()
}

#[cfg(test)]
mod tests;
