//! `vmpod gitlab-executor`: GitLab Runner's custom executor.
//!
//! For each job GitLab Runner calls `config` (what it should know), `prepare` (tried again when it fails), `run` for each
//! script, and `cleanup`, whatever happened. The calls share nothing but the job's environment, so the name of the job's
//! pod is made of that. What a job did wrong ends with `BUILD_FAILURE_EXIT_CODE`, all else that goes wrong with
//! `SYSTEM_FAILURE_EXIT_CODE`. What is printed, on either stream, is the job's log.
//!
//! Protocol: GitLab's documentation of the custom executor.

mod job;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;

use crate::args::{GitlabExecutor, Stage as Call};
use crate::home::Home;
use crate::interrupts::{Interrupt, Interrupts};
use crate::report::{self, Exit, Remedy};
use crate::run::{self, Stage};
use crate::{client, exec, output, pods};
use job::{Ending, Job};

/// How long a job's machine gets to shut down: nobody needs what is in it.
const GRACE: Duration = Duration::from_secs(1);

/// Does one of the four calls. Its failures are told here, because their exit code is GitLab's to choose.
pub(crate) async fn run(home: impl FnOnce() -> Result<Home>, args: GitlabExecutor) -> Result<Exit> {
    let job = Job::from_environment(|name| std::env::var_os(name).and_then(|value| value.into_string().ok()));
    let job = job?;
    let result = match Interrupts::listen() {
        Ok(mut interrupts) => Box::pin(call(home, &args, &job, &mut interrupts)).await,
        Err(error) => Err(error),
    };
    let mut ending = match result {
        Ok(ending) => ending,
        Err(error) => {
            report::print(&error);
            if error.is::<job::Refused>() { Ending::Build(None) } else { Ending::System }
        }
    };
    if let Ending::Build(Some(code)) = ending
        && let Some(path) = &job.exit_code_file
        && let Err(error) = std::fs::write(path, code.to_string())
    {
        report::print(&anyhow::Error::from(error).context(format!("can't write {}", path.display())));
        ending = Ending::System;
    }
    Ok(job.exit(ending))
}

async fn call(
    home: impl FnOnce() -> Result<Home>,
    args: &GitlabExecutor,
    job: &Job,
    interrupts: &mut Interrupts,
) -> Result<Ending> {
    if let Call::Config = args.stage {
        return config(args, job);
    }
    let client = match &args.place.kubeconfig {
        Some(path) => client::from_file(path, args.place.context.as_deref()).await?,
        None => client::connect(&home()?).await?,
    };
    let namespace = args.place.namespace.as_str();
    match &args.stage {
        Call::Config => config(args, job),
        Call::Prepare => prepare(&client, namespace, args, job, interrupts).await,
        Call::Run { script, stage } => {
            let api: Api<Pod> = Api::namespaced(client, namespace);
            tokio::select! {
                ending = in_machine(&api, args, job, script, stage) => ending,
                // The machine goes with its processes, in the cleanup that follows.
                interrupt = interrupts.next() => bail!("{stage} was ended by {}", name(interrupt)),
            }
        }
        Call::Cleanup => {
            // A second signal is GitLab Runner losing its patience; until then the machine goes.
            pods::remove(&client, namespace, &job.pod_name(), Some(GRACE)).await?;
            Ok(Ending::Well)
        }
    }
}

fn name(interrupt: Interrupt) -> &'static str {
    match interrupt {
        Interrupt::CtrlC => "an interrupt",
        Interrupt::Terminate => "a request to terminate",
    }
}

/// What GitLab Runner should know: one JSON object on standard output.
fn config(args: &GitlabExecutor, job: &Job) -> Result<Ending> {
    let machine = &args.machine;
    let answer = json!({
        "builds_dir": machine.builds_dir,
        "cache_dir": machine.cache_dir,
        "builds_dir_is_shared": false,
        "hostname": job.pod_name(),
        "shell": machine.shell,
        "driver": { "name": "vmpod", "version": env!("CARGO_PKG_VERSION") },
    });
    output::data(&format!("{answer}\n"))?;
    Ok(Ending::Well)
}

/// A clean machine for the job.
async fn prepare(
    client: &Client,
    namespace: &str,
    args: &GitlabExecutor,
    job: &Job,
    interrupts: &mut Interrupts,
) -> Result<Ending> {
    let image = job.image(args.machine.image.as_deref(), &args.machine.allow_image)?;
    let (api, name) = (Api::<Pod>::namespaced(client.clone(), namespace), job.pod_name());
    // What an earlier try left, and what is left of a job that this place of the runner had before: GitLab Runner was
    // killed then, for it cleans up otherwise.
    let slot = ListParams::default().labels(&format!("{}={}", job::SLOT, job.slot()));
    let left = api.list(&slot).await.context("can't look for what earlier jobs left")?;
    for pod in left.iter().filter_map(|pod| pod.metadata.name.as_deref()) {
        if pod != name {
            output::talk(&format!("removing {pod}, which an earlier job left"));
        }
        pods::remove(client, namespace, pod, Some(GRACE)).await?;
    }
    output::talk(&format!("starting a machine of {image}: pod {name}"));
    let pod = job.pod(&image, args);
    match api.create(&PostParams::default(), &pod).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 409 => {
            bail!("there is a pod {name} that isn't this runner's; two runners must not run the same job");
        }
        Err(error) => return Err(error).with_context(|| format!("can't create pod {name}")),
    }
    let began = tokio::time::Instant::now();
    let started = tokio::select! {
        started = tokio::time::timeout(args.machine.start_timeout, ready(&api, &name)) => match started {
            Ok(started) => started,
            Err(_) => Err(Remedy::new(
                format!("the machine doesn't answer after {} s", args.machine.start_timeout.as_secs()),
                format!("look at `kubectl describe pod {name}` while a job starts, or give it more with --start-timeout"),
            )
            .into()),
        },
        interrupt = interrupts.next() => Err(anyhow::anyhow!("starting was ended by {}", self::name(interrupt))),
    };
    if let Err(error) = started {
        // The next try begins with a new one.
        if let Err(more) = pods::remove(client, namespace, &name, Some(GRACE)).await {
            report::print(&more);
        }
        return Err(error);
    }
    output::talk(&format!("the machine answers after {:.1} s", began.elapsed().as_secs_f64()));
    Ok(Ending::Well)
}

/// Waits until a pod's machine answers.
async fn ready(api: &Api<Pod>, name: &str) -> Result<()> {
    let look = |pod: Option<&Pod>| {
        pod.is_none_or(|pod| match run::stage(pod) {
            Stage::Waiting(_) => false,
            Stage::Started { ready } => ready,
            Stage::Finished(_) | Stage::Hopeless(_) => true,
        })
    };
    let pod = await_condition(api.clone(), name, look).await.with_context(|| format!("can't watch pod {name}"))?;
    match pod.as_ref().map(run::stage) {
        Some(Stage::Started { .. }) => Ok(()),
        Some(Stage::Hopeless(why) | Stage::Waiting(why)) => bail!("the machine can't run: {why}"),
        Some(Stage::Finished(_)) => bail!("the machine ended before it answered"),
        None => bail!("pod {name} was deleted by somebody else"),
    }
}

/// Runs `$1`'s shell on the script from standard input, once it came whole; nothing of it stays. What the script's
/// commands read is not the rest of the script.
const RUN: &str = r#"umask 077; script=$(mktemp /tmp/gitlab-job.XXXXXX) || exit 1; cat >"$script"
[ "$(wc -c <"$script")" -eq "$2" ] || { rm -f "$script"; echo "the script did not come whole" >&2; exit 1; }
"$1" "$script" </dev/null; code=$?; rm -f "$script"; exit $code"#;

/// Runs one of the job's scripts in its machine.
async fn in_machine(api: &Api<Pod>, args: &GitlabExecutor, job: &Job, script: &Path, stage: &str) -> Result<Ending> {
    let pod = job.pod_name();
    let text = tokio::fs::read(script).await.with_context(|| format!("can't read {}", script.display()))?;
    let found = api.get_opt(&pod).await.with_context(|| format!("can't look up pod {pod}"))?;
    let Some(found) = found else { bail!("the job's machine is gone: there is no pod {pod}") };
    if found.labels().get(job::SLOT) != Some(&job.slot()) {
        bail!("pod {pod} isn't this runner's");
    }
    let size = text.len().to_string();
    let command = ["sh", "-c", RUN, "gitlab-job", &args.machine.shell, &size].map(str::to_owned).to_vec();
    let ended = exec::on_input(api, &pod, command, text).await;
    match ended.with_context(|| format!("{stage} can't run in the machine"))? {
        Exit::Done => Ok(Ending::Well),
        Exit::Command(code) => Ok(Ending::Build(Some(code))),
        Exit::Failed => Ok(Ending::Build(None)),
    }
}
