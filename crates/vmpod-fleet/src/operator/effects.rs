//! What the operator does to single runners.

use std::collections::{BTreeMap, BTreeSet};

use futures::StreamExt as _;
use futures::future::BoxFuture;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::ResourceExt as _;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams,
    Preconditions,
};
use russh::keys::ssh_key::LineEnding;
use russh::keys::{Algorithm, PrivateKey};
use serde_json::json;
use vmpod_api::pool::RunnerPool;
use vmpod_api::provision::Provision;
use vmpod_api::runner::{Phase, Runner, RunnerStatus};

use super::{AT_ONCE, Expected, GHOST, Kept, MANAGER, Operator, Part, gone, label, machine_id, made, namespace};
use crate::kubevirt::{self, VirtualMachineInstance};
use crate::provider::{Keep, Machine, Seen as Job, Trouble};
use crate::provision::{self, Login, Proof};
use crate::user_data::{self, Values};
use crate::{life, objects};

/// Whether somebody has asked a runner to go.
fn is_leaving(runner: &Runner) -> bool {
    let status = runner.status.as_ref();
    runner.metadata.deletion_timestamp.is_some() || status.is_some_and(|status| status.draining_since.is_some())
}

impl Part {
    fn find(&self, name: &str) -> Option<&(std::sync::Arc<Runner>, Option<std::sync::Arc<Pod>>)> {
        // They are in the order of their names.
        let at = self.runners.binary_search_by(|(runner, _)| runner.metadata.name.as_deref().cmp(&Some(name)));
        at.ok().map(|at| &self.runners[at])
    }
}

/// One of many things to do at once.
pub(super) type Effect<'a, T> = BoxFuture<'a, Result<T, kube::Error>>;

/// Does many things, several at a time. All are tried; the first error is told.
pub(super) async fn all<T>(effects: Vec<Effect<'_, T>>) -> (Vec<T>, Result<(), kube::Error>) {
    let (mut done, mut first) = (Vec::with_capacity(effects.len()), Ok(()));
    let mut running = futures::stream::iter(effects).buffer_unordered(AT_ONCE);
    while let Some(result) = running.next().await {
        match result {
            Ok(value) => done.push(value),
            Err(error) => first = first.and(Err(error)),
        }
    }
    (done, first)
}

/// How what configures a runner's guest gets into it: as the pool's Secret says, or by a key of the machine's own.
async fn login(
    secrets: &Api<Secret>,
    provision: &Provision,
    runner: &str,
) -> Result<Result<Login, Trouble>, kube::Error> {
    if let Some(reference) = &provision.login_secret_ref {
        let found = secrets.get_opt(&reference.name).await?;
        let name = &reference.name;
        let why = match &found {
            None => format!("there is no Secret {name:?}, which provision.loginSecretRef names"),
            Some(_) => {
                format!(
                    "the Secret {name:?}, which provision.loginSecretRef names, has no ssh-privatekey and no password"
                )
            }
        };
        return Ok(found.as_ref().and_then(Login::of).ok_or_else(|| Trouble::new(why)));
    }
    // The one that it has, if an operator before this one made it: its guest may know that already.
    let kept = secrets.get_opt(runner).await?;
    let proof = match kept.as_ref().and_then(Login::of) {
        Some(login) => login.proof,
        None => match PrivateKey::random(&mut rand::rng(), Algorithm::Ed25519)
            .and_then(|key| key.to_openssh(LineEnding::LF))
        {
            Ok(pem) => Proof::Key(pem.to_string()),
            Err(error) => return Ok(Err(Trouble::new(format!("no key can be made: {error}")))),
        },
    };
    Ok(Ok(Login { user: None, proof }))
}

impl Operator {
    /// Makes runners at placements. Each is an object before it is a machine.
    pub(super) async fn create(
        &self,
        pool: &RunnerPool,
        kept: &mut Kept,
        placements: &[String],
        now: Timestamp,
    ) -> Result<(), kube::Error> {
        let runners: Api<Runner> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        let runners = &runners;
        let one = |placement: &String| -> Effect<'_, (String, String)> {
            let placement = placement.clone();
            Box::pin(async move {
                let runner = runners.create(&PostParams::default(), &objects::runner(pool, &placement)).await?;
                tracing::info!(runner = runner.name_any(), placement, "a runner is made");
                Ok((runner.name_any(), placement))
            })
        };
        let (made, result) = all(placements.iter().map(one).collect()).await;
        for (name, placement) in made {
            self.options.metrics.created(&label(pool), &placement);
            kept.fresh.insert(name.clone());
            kept.expected.insert(name, Expected { at: now, placement });
        }
        result
    }

    /// Gives runners that have none their Secret and their machine.
    ///
    /// One that somebody else may have asked to go is looked at anew first: what the watch tells may be old, and a machine that
    /// is made again after it was asked to go would be asked by nobody.
    pub(super) async fn equip(&self, part: &Part, kept: &mut Kept, leaving: &[String]) -> Result<(), kube::Error> {
        let (Some(keep), Some(provider)) = (&kept.keep, &kept.provider) else { return Ok(()) };
        let pool = part.pool.as_ref();
        let bare = part.runners.iter().filter(|(runner, pod)| {
            let phase = runner.status.as_ref().map_or(Phase::Pending, |status| status.phase);
            let stays = !is_leaving(runner) && !leaving.contains(&runner.name_any());
            pod.is_none() && phase == Phase::Pending && stays
        });
        let runners: Api<Runner> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        let secrets: Api<Secret> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        let pods: Api<Pod> = Api::namespaced(self.options.client.clone(), &namespace(pool));
        let mut effects: Vec<Effect<'_, ()>> = Vec::new();
        for (runner, _) in bare {
            let (name, id) = (runner.name_any(), machine_id(provider.as_ref(), runner));
            let machine = Machine { id: &id, name: &name, jobs: pool.spec.jobs_per_runner };
            let by_command = objects::by_command(&pool.spec);
            let template = pool.spec.user_data.as_deref().or_else(|| by_command.then_some(user_data::SCRIPT));
            let data = provider.user_data(keep, template, machine);
            let values = || -> Result<_, Trouble> {
                let one = |name: &str| provider.user_data(keep, Some(&format!("$(VMPOD_{name})")), machine);
                Ok((one("PROVIDER_URL")?, one("RUNNER_TOKEN")?))
            };
            let values = pool.spec.provision.as_ref().map(|provision| (provision, values()));
            let (secrets, pods, runners) = (&secrets, &pods, &runners);
            let fresh = kept.fresh.contains(&name);
            effects.push(Box::pin(async move {
                if !fresh {
                    let now = runners.get_opt(&runner.name_any()).await?;
                    if now.is_none_or(|now| is_leaving(&now) || now.uid() != runner.uid()) {
                        return Ok(());
                    }
                }
                let data = data.map(|data| objects::has_user_data(&pool.spec).then_some(data));
                let told = match values {
                    None => Ok(BTreeMap::new()),
                    Some((_, Err(trouble))) => Err(trouble),
                    Some((provision, Ok((url, token)))) => {
                        let jobs = pool.spec.jobs_per_runner;
                        let values = Values { url: &url, token: &token, system_id: &id, name: &name, jobs };
                        let login = login(secrets, provision, &name).await?;
                        login.map(|login| provision::told(provision, &login, &values))
                    }
                };
                match data.and_then(|data| Ok((data, told?))) {
                    Ok((data, mut told)) => {
                        told.extend(kubevirt::answers(&pool.spec, data.as_deref()));
                        // Whatever an operator before this one put there: its token may be gone since.
                        let secret = objects::secret(runner, data, told);
                        let apply = PatchParams::apply(MANAGER).force();
                        secrets.patch(&runner.name_any(), &apply, &Patch::Apply(&secret)).await?;
                        if kubevirt::runs(&pool.spec) {
                            return self.make_instance(pool, runner, keep).await;
                        }
                        made(pods.create(&PostParams::default(), &objects::pod(pool, runner, keep)).await)
                    }
                    Err(trouble) => {
                        let message = Some(trouble.why);
                        let status = RunnerStatus { phase: Phase::Failed, message, ..RunnerStatus::default() };
                        self.write_status(runner, &status).await;
                        Ok(())
                    }
                }
            }));
        }
        let (_, result) = all(effects).await;
        for (runner, _) in &part.runners {
            kept.fresh.remove(&runner.name_any());
        }
        result
    }

    /// What the machines of a pool on `KubeVirt` are made as.
    fn machines(&self, pool: &RunnerPool) -> Api<DynamicObject> {
        let (kind, plural) = kubevirt::kind(&pool.spec);
        let kind = GroupVersionKind::gvk("kubevirt.io", "v1", kind);
        let resource = ApiResource::from_gvk_with_plural(&kind, plural);
        Api::namespaced_with(self.options.client.clone(), &namespace(pool), &resource)
    }

    async fn make_instance(&self, pool: &RunnerPool, runner: &Runner, keep: &Keep) -> Result<(), kube::Error> {
        let machine = kubevirt::machine(pool, runner, keep);
        let machine = serde_json::from_value(machine).map_err(kube::Error::SerdeError)?;
        made(self.machines(pool).create(&PostParams::default(), &machine).await)
    }

    /// Asks those to go that were asked before and whose machines don't seem to have heard it.
    pub(super) async fn drain_again(&self, part: &Part, kept: &Kept, now: Timestamp) -> Result<(), kube::Error> {
        let deaf = part.runners.iter().filter(|(runner, pod)| {
            let status = runner.status.as_ref();
            let asked = status.is_some_and(|status| status.draining_since.is_some() && !status.phase.is_over());
            asked && pod.as_ref().is_some_and(|pod| pod.metadata.deletion_timestamp.is_none())
        });
        let names: Vec<String> = deaf.map(|(runner, _)| runner.name_any()).collect();
        self.drain(part, kept, &names, now).await
    }

    /// Asks runners to go.
    pub(super) async fn drain(
        &self,
        part: &Part,
        kept: &Kept,
        names: &[String],
        now: Timestamp,
    ) -> Result<(), kube::Error> {
        let one = |name| -> Effect<'_, ()> { Box::pin(self.drain_one(part, kept, name, now)) };
        all(names.iter().map(String::as_str).map(one).collect()).await.1
    }

    /// One that is idle is looked at once more: a job may have come.
    async fn drain_one(&self, part: &Part, kept: &Kept, name: &str, now: Timestamp) -> Result<(), kube::Error> {
        let Some((runner, pod)) = part.find(name) else { return Ok(()) };
        let busy = match (&kept.keep, &kept.provider) {
            (Some(keep), Some(provider)) => {
                let machine = machine_id(provider.as_ref(), runner);
                provider.is_busy(keep, &machine, now).await.map_err(|trouble| trouble.why)
            }
            _ => Err("the pool's registration isn't known yet".to_owned()),
        };
        let up = objects::seen(pod.as_deref()) == life::Pod::Up;
        let phase = runner.status.as_ref().map_or(Phase::Pending, |status| status.phase);
        match busy {
            Ok(false) => {}
            Ok(true) => {
                self.options.metrics.refused(&label(&part.pool));
                return Ok(());
            }
            // One that never came up has no job, whoever can't be asked.
            Err(_) if !up && matches!(phase, Phase::Pending | Phase::Starting) => {}
            Err(why) => {
                self.options.metrics.refused(&label(&part.pool));
                tracing::debug!(runner = name, why, "not drained: nobody can say whether it has a job");
                return Ok(());
            }
        }
        // With the pod's own grace period: should a job have come in this instant, the guest ends after it. It is written down
        // afterwards, so that an operator that dies in between asks again.
        if kubevirt::runs(&part.pool.spec) {
            let machines = self.machines(&part.pool);
            gone(machines.delete(name, &DeleteParams::default()).await)?;
        } else {
            let pods: Api<Pod> = Api::namespaced(self.options.client.clone(), &namespace(part.pool.as_ref()));
            gone(pods.delete(name, &DeleteParams::default()).await)?;
        }
        tracing::info!(runner = name, "a runner is asked to go");
        self.options.metrics.drained(&label(&part.pool));
        let mut status = runner.status.clone().unwrap_or_default();
        if status.draining_since.is_some() {
            return Ok(());
        }
        status.draining_since = Some(objects::whole_second(now).to_string());
        self.write_status(runner, &status).await;
        Ok(())
    }

    /// Removes runners that are over.
    pub(super) async fn remove(
        &self,
        part: &Part,
        kept: &Kept,
        names: &[String],
        now: Timestamp,
    ) -> Result<(), kube::Error> {
        let one = |name| -> Effect<'_, ()> { Box::pin(self.remove_one(part, kept, name, now)) };
        all(names.iter().map(String::as_str).map(one).collect()).await.1
    }

    /// First from the CI system's list, so that nothing is left there.
    async fn remove_one(&self, part: &Part, kept: &Kept, name: &str, now: Timestamp) -> Result<(), kube::Error> {
        let Some((runner, _)) = part.find(name) else { return Ok(()) };
        if let (Some(keep), Some(provider)) = (&kept.keep, &kept.provider)
            && let Err(trouble) = provider.forget(keep, &machine_id(provider.as_ref(), runner), now).await
        {
            tracing::debug!(runner = name, why = trouble.why, "the CI system can't forget it now; trying again");
            return Ok(());
        }
        let runners: Api<Runner> = Api::namespaced(self.options.client.clone(), &namespace(part.pool.as_ref()));
        let same = Preconditions { uid: runner.uid(), resource_version: None };
        // In the background: its Secret and its Pod go with it.
        gone(runners.delete(name, &DeleteParams { preconditions: Some(same), ..DeleteParams::background() }).await)?;
        self.options.metrics.removed(&label(&part.pool));
        Ok(())
    }

    /// Lets pods be evicted that were given enough time: their nodes are to be emptied.
    pub(super) async fn release(&self, part: &Part, names: &[String]) -> Result<(), kube::Error> {
        let pods: Api<Pod> = Api::namespaced(self.options.client.clone(), &namespace(part.pool.as_ref()));
        for name in names {
            let held = part.find(name).and_then(|(_, pod)| pod.as_ref());
            if held.is_none_or(|pod| pod.labels().contains_key(objects::EVICTABLE)) {
                continue;
            }
            let patch = json!({"metadata": {"labels": {objects::EVICTABLE: "true"}}});
            tracing::info!(runner = name, "its node has waited long enough: the runner may be evicted");
            if kubevirt::runs(&part.pool.spec) {
                // The budget speaks of pods, and the instance's has a name of its own.
                let label = format!("{}={name}", objects::RUNNER);
                for pod in pods.list(&ListParams::default().labels(&label)).await?.items {
                    gone(pods.patch(&pod.name_any(), &PatchParams::default(), &Patch::Merge(&patch)).await)?;
                }
                let instances: Api<VirtualMachineInstance> =
                    Api::namespaced(self.options.client.clone(), &namespace(part.pool.as_ref()));
                gone(instances.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await)?;
                continue;
            }
            gone(pods.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await)?;
        }
        Ok(())
    }

    /// Removes machines from the CI system's list that no runner speaks of any more.
    pub(super) async fn ghosts(&self, part: &Part, kept: &Kept, now: Timestamp) {
        let (Some(keep), Some(provider), Some(Ok(machines))) = (&kept.keep, &kept.provider, &kept.machines) else {
            return;
        };
        let known: BTreeSet<String> =
            part.runners.iter().map(|(runner, _)| machine_id(provider.as_ref(), runner)).collect();
        let silent = |job: &Job| !job.busy && job.contacted.is_some_and(|at| now.duration_since(at) > GHOST);
        for (machine, _) in machines.iter().filter(|(id, job)| !known.contains(*id) && silent(job)) {
            tracing::info!(
                pool = super::key(part.pool.as_ref()),
                machine,
                "a machine that is long gone is removed from the CI system's list"
            );
            if let Err(trouble) = provider.forget(keep, machine, now).await {
                tracing::debug!(machine, why = trouble.why, "it can't be removed now");
            }
        }
    }
}
