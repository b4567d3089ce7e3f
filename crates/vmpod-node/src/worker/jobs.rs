//! The worker's jobs: what takes time and runs beside it.

use std::sync::Arc;

use k8s_openapi::api::core::v1::LifecycleHandler;
use kube::{
    Api,
    api::{DeleteParams, Preconditions},
};
use vmpod_image::Store;
use vmpod_machine::{Arch, Auth, GuestError, MachineError, MainCommand, Secret};

use super::{
    Failure, ImageChoice, Input, Job, MAIN, Machine, Outcome, Pod, RunConfig, Work, Worker, error_chain, image_pull,
    pod,
};
use crate::{
    action::{Action, Place, Where},
    limited,
    network::Place as NetworkPlace,
    run_config::{Login, Proof},
    snapshots, translate, volumes,
    world::{NoAddress, Wanted},
};

/// The variable that tells the main process where the containers beside its machine are.
const SIDECARS_ADDRESS: &str = "VMPOD_SIDECARS_ADDRESS";

impl Failure {
    pub(super) fn new(reason: &str, message: impl Into<String>) -> Self {
        Self { reason: reason.to_owned(), message: message.into() }
    }
}

impl Worker {
    /// The work of a job; none when what it needs is gone, and the next plan will know.
    pub(super) fn work(&self, job: Job, machine: Option<&Machine>) -> Option<Work> {
        match job {
            Job::Resolve => self.resolve(),
            Job::Prepare => self.prepare(),
            Job::Start => {
                let machine = machine?.clone();
                Some(Box::pin(async move {
                    match machine.start().await {
                        // Its state tells why.
                        Ok(()) | Err(MachineError::Start { .. }) => Ok(Outcome::Started),
                        Err(error) => Err(Failure::new("RunContainerError", error_chain(&error))),
                    }
                }))
            }
            Job::StartMain => Some(self.start_main(machine?)),
            Job::PostStart => self.post_start(machine?),
            Job::Remove => self.remove(),
            Job::Delete => self.delete(),
        }
    }

    fn resolve(&self) -> Option<Work> {
        let (world, pod) = (Arc::clone(&self.world), self.pod.clone()?);
        let number = self.record.as_ref()?.next_attempt();
        let address = match &self.crew {
            // Apple's machines have an address of their own, and listen at none of the containers' network.
            Some(crew) if !world.apple() => crew.view().borrow().company.address.map(Some).ok_or(NoAddress),
            _ => world.address(&self.uid, &pod, number),
        };
        let beside = self.crew.as_ref().and_then(|crew| crew.view().borrow().containers);
        Some(Box::pin(async move {
            let container =
                pod::machine_container(&pod).ok_or_else(|| Failure::new("InvalidPod", "the pod has no container"))?;
            let address = address.map_err(|error| Failure::new("FailedCreatePodSandBox", error.to_string()))?;
            let facts = world.facts(address);
            let image = async {
                image_pull::ensure(&world.store, &world.client, &world.registries, &world.events, &pod, container)
                    .await
                    .map_err(|trouble| Failure::new(trouble.reason, trouble.message))
            };
            let run = async {
                RunConfig::resolve(&world.client, &pod, container, &facts).await.map_err(|error| {
                    let message = error.message();
                    world.events.container(&pod, crate::events::Kind::Warning, "Failed", format!("Error: {message}"));
                    Failure::new("CreateContainerConfigError", message)
                })
            };
            let (image, mut run) = futures::try_join!(image, run)?;
            // The pod's own address is the machine's; its own word on this one wins.
            if let Some(address) = beside
                && !run.env.iter().any(|(name, _)| name == SIDECARS_ADDRESS)
            {
                run.env.push((SIDECARS_ADDRESS.to_owned(), address.to_string()));
            }
            let name = container.image.clone().unwrap_or_default();
            Ok(Outcome::Resolved { image: ImageChoice { name, digest: image.digest.to_string() }, run })
        }))
    }

    fn prepare(&self) -> Option<Work> {
        let (world, pod, uid) = (Arc::clone(&self.world), self.pod.clone()?, self.uid.clone());
        let record = self.record.as_ref()?;
        let (id, attempt, address) = (record.machine()?, record.attempt.clone()?, record.address);
        let user_data = self.run.as_ref().and_then(|run| run.user_data.clone());
        let login = self.run.as_ref().and_then(|run| run.login.clone());
        let mut wanted = self.wanted.clone();
        Some(Box::pin(async move {
            let failed = |message: String| Failure::new("CreateContainerError", message);
            let container =
                pod::machine_container(&pod).ok_or_else(|| failed("the pod has no container".to_owned()))?.clone();
            let digest = attempt.image.digest.parse().map_err(|error| failed(error_chain(&error)))?;
            let (store, machines, name) = (world.store.clone(), world.machines.clone(), attempt.image.name.clone());
            let (machine, holder, defaults) = (id.clone(), world.holder(&id), world.defaults);
            // The clone and the key don't wait for each other.
            let key = tokio::task::spawn_blocking({
                let (machines, id) = (machines.clone(), id.clone());
                move || machines.ssh_key(&id).map_err(|error| error_chain(&error))
            });
            let apple = world.apple();
            let clone = tokio::task::spawn_blocking(move || {
                let image = store.image(digest).map_err(|error| error_chain(&error))?;
                let image = image.ok_or_else(|| format!("image {name} ({digest}) is no longer in the store"))?;
                let size =
                    translate::size(&container, &name, &image.config, defaults).map_err(|error| error.to_string())?;
                let dir = machines.directory(&machine).map_err(|error| error_chain(&error))?;
                let clone = if apple { Store::clone_image_raw } else { Store::clone_image };
                let clone =
                    clone(&store, &image, dir.path(), size.disk, &holder).map_err(|error| error_chain(&error))?;
                Ok::<_, String>((container, size, clone))
            });
            let (key, clone) = futures::try_join!(key, clone).map_err(|error| failed(error.to_string()))?;
            let (key, (container, size, clone)) = (key.map_err(failed)?, clone.map_err(failed)?);
            let mut authorized_keys = vec![key.public];
            let login = match login {
                None => None,
                Some(Login { user, proof: Proof::Password(password) }) => {
                    Some((user, Auth::Password(Secret::new(password))))
                }
                Some(Login { user, proof: Proof::Key(pem) }) => {
                    let given = world.machines.keep_key(&id, &pem).map_err(|error| failed(error_chain(&error)))?;
                    authorized_keys.push(given.public);
                    Some((user, Auth::Key(given.path)))
                }
            };
            world.faults.hit("node: image cloned").await;
            let dir = world.records.shared(&uid);
            let made = volumes::share(&dir, volumes::shared(&pod));
            made.map_err(|error| failed(format!("{} can't be made: {error}", dir.display())))?;
            let spec = translate::machine(translate::Parts {
                id,
                uid: &uid,
                pod: &pod,
                container: &container,
                image: &attempt.image.name,
                clone: &clone,
                size,
                place: if apple {
                    NetworkPlace::of_apple(&pod, &world.network)
                } else {
                    NetworkPlace::of(&pod, &world.network, world.nat.config(), address).map_err(failed)?
                },
                key: key.path,
                authorized_keys,
                user_data,
                login,
                usual_login: world.guest_login.clone(),
                accel: world.accel,
                host: Arch::host(),
                low_ports: world.low_ports,
                shares: volumes::shares(&pod, &dir),
            })
            .map_err(|error| failed(error.to_string()))?;
            let spec = match &world.snapshots {
                None => spec,
                Some(snapshots) => {
                    let candidate = snapshots::Candidate {
                        pod: &pod,
                        image: clone.digest,
                        image_labels: &clone.config.labels,
                        disks: clone.disks.iter().map(|disk| disk.size).collect(),
                        boots: attempt.boots,
                    };
                    let unwanted = async move {
                        let stops = |wanted: &Wanted| {
                            let deleted = |pod: &Arc<Pod>| pod.metadata.deletion_timestamp.is_some();
                            wanted.agent_stops.is_some() || wanted.pod.as_ref().is_none_or(deleted)
                        };
                        // Without a sender the worker is over, and this with it.
                        wanted.wait_for(stops).await.ok();
                    };
                    snapshots.choose(candidate, spec, unwanted).await
                }
            };
            world.reserve(&uid, &spec.networks).await.map_err(|why| Failure::new("FailedCreatePodSandBox", why))?;
            world.faults.hit("node: network reserved").await;
            world.machines.create(spec).await.map_err(|error| failed(error_chain(&error)))?;
            Ok(Outcome::Prepared)
        }))
    }

    fn start_main(&self, machine: &Machine) -> Work {
        let Some(run) = self.run.clone() else {
            return Box::pin(async {
                Ok(Outcome::MainRefused("what the container runs is no longer known on this node".to_owned()))
            });
        };
        let process = machine.guest().main_process(MAIN);
        let stdin = self.pod.as_deref().and_then(pod::machine_container).is_some_and(|one| one.stdin == Some(true));
        Box::pin(async move {
            let command =
                MainCommand { command: run.command.clone(), env: run.env.clone(), workdir: run.workdir.clone(), stdin };
            match process.start(&command).await {
                Ok(_) => Ok(Outcome::MainStarted),
                Err(error @ (GuestError::Refused { .. } | GuestError::Invalid(_) | GuestError::MainLost { .. })) => {
                    Ok(Outcome::MainRefused(error_chain(&error)))
                }
                Err(error) => Err(Failure::new("RunContainerError", error_chain(&error))),
            }
        })
    }

    /// A hook that fails is not tried again: what it came to is the job's outcome.
    fn post_start(&self, machine: &Machine) -> Option<Work> {
        let (pod, machine, run) = (self.pod.clone()?, machine.clone(), self.run.clone());
        Some(Box::pin(async move { Ok(Outcome::Hooked(hook(&pod, pod::post_start, &machine, run.as_deref()).await)) }))
    }

    /// Runs the preStop hook beside the worker. Its container is ended afterwards, whatever it came to.
    pub(super) fn pre_stop(&mut self, machine: &Machine) {
        let Some(pod) = self.pod.clone() else { return };
        let (machine, run, send, world) =
            (machine.clone(), self.run.clone(), self.send.clone(), Arc::clone(&self.world));
        self.tasks.spawn(async move {
            if let Err(why) = hook(&pod, pod::pre_stop, &machine, run.as_deref()).await {
                let text = format!("PreStopHook failed: {why}");
                world.events.container(&pod, crate::events::Kind::Warning, "FailedPreStopHook", text);
            }
            // Nobody listens any more: the worker is over.
            send.send(Input::PreStopped(machine.id().clone())).ok();
        });
    }

    /// Removes the machine of the current attempt, whatever its condition.
    fn remove(&self) -> Option<Work> {
        let (world, uid, id) = (Arc::clone(&self.world), self.uid.clone(), self.record.as_ref()?.machine()?);
        Some(Box::pin(async move {
            let failed = |message: String| Failure::new("FailedKillPod", message);
            world.remove(&uid, &id).await.map_err(failed)?;
            Ok(Outcome::Removed)
        }))
    }

    /// Deletes the API object, and only this one: another pod of the same name has another UID.
    fn delete(&self) -> Option<Work> {
        let pod = self.pod.clone()?;
        let client = self.world.client.clone();
        Some(Box::pin(async move {
            let api: Api<Pod> = Api::namespaced(client, pod::namespace(&pod));
            let params = DeleteParams {
                grace_period_seconds: Some(0),
                preconditions: Some(Preconditions { uid: pod.metadata.uid.clone(), resource_version: None }),
                ..DeleteParams::default()
            };
            match limited(api.delete(pod::name(&pod), &params)).await {
                Ok(_) => Ok(Outcome::Deleted),
                Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(Outcome::Deleted),
                Err(error) => Err(Failure::new("FailedKillPod", error_chain(&error))),
            }
        }))
    }
}

/// Runs a hook, for as long as the machine runs.
async fn hook(
    pod: &Pod,
    which: fn(&Pod) -> Option<&LifecycleHandler>,
    machine: &Machine,
    run: Option<&RunConfig>,
) -> Result<(), String> {
    let Some(container) = pod::machine_container(pod) else { return Ok(()) };
    let Some(action) = which(pod).and_then(Action::of_hook) else { return Ok(()) };
    let (mut state, at) = (machine.state(), Where::Guest(machine.clone()));
    let place = Place { at: &at, container, run };
    tokio::select! {
        result = place.act(action) => result,
        _ = state.wait_for(vmpod_machine::State::is_final) => Err("the machine has stopped".to_owned()),
    }
}
