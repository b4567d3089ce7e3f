//! `vmpod ps`, `logs` and `stop`: the machines as pods.

use std::time::Duration;

use anyhow::{Context as _, Result};
use futures::{AsyncReadExt as _, StreamExt as _};
use k8s_openapi::api::core::v1::{ContainerState, Pod};
use kube::api::{DeleteParams, ListParams, LogParams};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Api, Client, ResourceExt as _};
use tokio::io::AsyncWriteExt as _;

use crate::args;
use crate::client;
use crate::home::Home;
use crate::output::{self, Progress, talk};
use crate::report::{Exit, Remedy};

/// `vmpod ps`.
pub(crate) async fn ps(home: &Home, args: &args::Ps) -> Result<Exit> {
    let client = client::connect(home).await?;
    let api: Api<Pod> =
        if args.all_namespaces { Api::all(client) } else { Api::namespaced(client, &args.namespace.namespace) };
    let pods = api.list(&ListParams::default()).await.context("can't list the pods")?.items;
    let now = jiff::Timestamp::now();
    let all = args.all_namespaces;
    let mut columns = vec!["name", "status", "ready", "restarts", "image", "address", "age"];
    if all {
        columns.insert(0, "namespace");
    }
    output::list(
        args.output.output,
        &pods,
        &columns,
        |pod| {
            let mut row = row(pod, now);
            if all {
                row.insert(0, pod.namespace().unwrap_or_default());
            }
            row
        },
        |pod| match pod.namespace() {
            Some(namespace) if all => format!("{namespace}/{}", pod.name_any()),
            _ => pod.name_any(),
        },
    )?;
    Ok(Exit::Done)
}

fn row(pod: &Pod, now: jiff::Timestamp) -> Vec<String> {
    let containers = pod.status.as_ref().and_then(|s| s.container_statuses.as_deref()).unwrap_or_default();
    let wanted = pod.spec.as_ref().map_or(0, |spec| spec.containers.len());
    let ready = containers.iter().filter(|c| c.ready).count();
    let restarts: i32 = containers.iter().map(|c| c.restart_count).sum();
    let image = pod.spec.as_ref().and_then(|s| s.containers.first()).and_then(|c| c.image.clone()).unwrap_or_default();
    let address = pod.status.as_ref().and_then(|s| s.pod_ip.clone()).unwrap_or_default();
    let age = pod
        .metadata
        .creation_timestamp
        .as_ref()
        .map_or(String::new(), |created| output::age(now.duration_since(created.0).try_into().unwrap_or_default()));
    vec![pod.name_any(), status(pod), format!("{ready}/{wanted}"), restarts.to_string(), image, address, age]
}

/// The one word that tells how a pod is, as kubectl finds it.
pub(crate) fn status(pod: &Pod) -> String {
    let Some(now) = &pod.status else { return "Pending".into() };
    let states = now.container_statuses.as_deref().unwrap_or_default();
    let finished = matches!(now.phase.as_deref(), Some("Succeeded" | "Failed"));
    if pod.metadata.deletion_timestamp.is_some() && !finished {
        return "Terminating".into();
    }
    let of_container = states.first().and_then(|c| c.state.as_ref()).and_then(|state| match state {
        ContainerState { waiting: Some(waiting), .. } => waiting.reason.clone(),
        ContainerState { terminated: Some(ended), .. } => match (&ended.reason, ended.signal) {
            (Some(reason), _) if !reason.is_empty() => Some(reason.clone()),
            (_, Some(signal)) if signal != 0 => Some(format!("Signal:{signal}")),
            _ => Some(format!("ExitCode:{}", ended.exit_code)),
        },
        _ => None,
    });
    of_container.or_else(|| now.reason.clone()).or_else(|| now.phase.clone()).unwrap_or_else(|| "Pending".into())
}

/// `vmpod logs`.
pub(crate) async fn logs(home: &Home, args: &args::Logs) -> Result<Exit> {
    let api: Api<Pod> = Api::namespaced(client::connect(home).await?, &args.namespace.namespace);
    client::pod(&api, &args.pod).await?;
    let params = LogParams {
        container: args.container.clone(),
        follow: args.follow,
        previous: args.previous,
        since_seconds: args.since.map(|since| i64::try_from(since.as_secs().max(1)).unwrap_or(i64::MAX)),
        tail_lines: args.tail.map(i64::from),
        timestamps: args.timestamps,
        ..LogParams::default()
    };
    print_log(&api, &args.pod, &params).await?;
    Ok(Exit::Done)
}

/// Copies a log to standard output until it ends, or until nobody reads any more.
pub(crate) async fn print_log(api: &Api<Pod>, pod: &str, params: &LogParams) -> Result<()> {
    let log = api.log_stream(pod, params).await.with_context(|| format!("can't read the log of pod {pod}"))?;
    let mut log = std::pin::pin!(log);
    let mut stdout = tokio::io::stdout();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = log.read(&mut buffer).await.with_context(|| format!("the log of pod {pod} broke off"))?;
        if n == 0 {
            return Ok(());
        }
        let written = async {
            stdout.write_all(&buffer[..n]).await?;
            stdout.flush().await
        };
        match written.await {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            other => other.context("can't write to standard output")?,
        }
    }
}

/// `vmpod stop`.
pub(crate) async fn stop(home: &Home, args: &args::Stop) -> Result<Exit> {
    let client = client::connect(home).await?;
    let api: Api<Pod> = Api::namespaced(client.clone(), &args.namespace.namespace);
    // All names are checked first, so that a typing error stops nothing.
    for pod in &args.pods {
        client::pod(&api, pod).await?;
    }
    let mut stopping: futures::stream::FuturesUnordered<_> = args
        .pods
        .iter()
        .map(|pod| {
            let (client, namespace) = (client.clone(), args.namespace.namespace.clone());
            async move { (pod, remove(&client, &namespace, pod, args.grace).await) }
        })
        .collect();
    let spinner = Progress::spinner("stopping");
    while let Some((pod, result)) = stopping.next().await {
        result?;
        spinner.clear();
        talk(&format!("stopped {pod}"));
    }
    Ok(Exit::Done)
}

/// How much longer than its grace period a pod may take to be gone.
const SLACK: Duration = Duration::from_mins(1);

/// Deletes a pod and waits until it is gone. One that is gone already is no error.
pub(crate) async fn remove(client: &Client, namespace: &str, name: &str, grace: Option<Duration>) -> Result<()> {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let Some(pod) = api.get_opt(name).await.with_context(|| format!("can't look up pod {name}"))? else {
        return Ok(());
    };
    let uid = pod.uid().unwrap_or_default();
    let seconds = grace.map(|grace| u32::try_from(grace.as_secs()).unwrap_or(u32::MAX));
    let params = DeleteParams { grace_period_seconds: seconds, ..DeleteParams::default() };
    match api.delete(name, &params).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("can't delete pod {name}")),
    }
    let own = pod.spec.and_then(|spec| spec.termination_grace_period_seconds).and_then(|s| u64::try_from(s).ok());
    let patience = grace.or(own.map(Duration::from_secs)).unwrap_or(Duration::from_secs(30)) + SLACK;
    match tokio::time::timeout(patience, await_condition(api, name, conditions::is_deleted(&uid))).await {
        Ok(result) => result.map(drop).with_context(|| format!("can't watch pod {name}")),
        Err(_) => Err(Remedy::new(
            format!("pod {name} is still there {} s after it was deleted", patience.as_secs()),
            format!("look at it with `kubectl describe pod {name}`, and at the log of `vmpod up`"),
        )
        .into()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(status: serde_json::Value) -> Pod {
        let mut pod = json!({
            "metadata": {"name": "p", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"containers": [{"name": "m", "image": "tiny"}]},
        });
        pod["status"] = status;
        serde_json::from_value(pod).unwrap()
    }

    #[test]
    fn the_status_is_the_containers_when_it_tells_more() {
        let container = |state| json!({"phase": "Running", "containerStatuses": [{"name": "m", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state}]});
        assert_eq!(status(&pod(json!({"phase": "Pending"}))), "Pending");
        assert_eq!(status(&pod(json!({"phase": "Failed", "reason": "OutOfmemory"}))), "OutOfmemory");
        assert_eq!(status(&pod(container(json!({"waiting": {"reason": "ErrImagePull"}})))), "ErrImagePull");
        assert_eq!(status(&pod(container(json!({"running": {}})))), "Running");
        assert_eq!(status(&pod(container(json!({"terminated": {"exitCode": 3, "reason": "Error"}})))), "Error");
        assert_eq!(status(&pod(container(json!({"terminated": {"exitCode": 3}})))), "ExitCode:3");
    }

    #[test]
    fn a_pod_that_is_being_deleted_says_so() {
        let mut pod = pod(json!({"phase": "Running"}));
        pod.metadata.deletion_timestamp = pod.metadata.creation_timestamp.clone();
        assert_eq!(status(&pod), "Terminating");
    }

    #[test]
    fn a_row_has_what_there_is() {
        let now: jiff::Timestamp = "2026-01-01T00:05:00Z".parse().unwrap();
        let pod = pod(json!({"phase": "Running", "podIP": "127.64.0.1"}));
        assert_eq!(row(&pod, now), ["p", "Running", "0/1", "0", "tiny", "127.64.0.1", "5m"]);
    }
}
