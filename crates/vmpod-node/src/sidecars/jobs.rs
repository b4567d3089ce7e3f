//! What the crew does that takes time.

use std::{net::Ipv4Addr, path::PathBuf, sync::Arc, time::Duration};

use bollard::auth::DockerCredentials;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};

use super::{
    SANDBOX,
    body::{self, Command, Parts},
    crew::{Failure, Input, MOUNTING, Shared},
};
use crate::{
    action::{Action, Place, Where},
    docker::{DockerError, Life, Network},
    env::{self, Needs},
    error_chain,
    events::Kind,
    image_pull::{self, Policy},
    pod,
    prober::{Prober, Subject},
    run_config::fetch,
    volumes::{self, Content},
};

impl Shared {
    pub(super) async fn sandbox(&self, pod: &Pod) -> Result<(), Failure> {
        let (network, name) = (body::network_name(&self.uid), body::container_name(pod, &self.uid, SANDBOX, 0));
        let holder = body::holder(pod, &self.uid, &self.docker.labels(&self.uid));
        self.world.faults.hit("node: before the pod's network").await;
        let made = self.docker.sandbox(&self.uid, &network, &name, holder, body::directories(pod)).await;
        made.map_err(|error| Failure::new("FailedCreatePodSandBox", error.to_string()))?;
        self.world.faults.hit("node: the pod's network").await;
        Ok(())
    }

    fn volumes(&self) -> PathBuf {
        self.world.records.dir(&self.uid).join("volumes")
    }

    /// Gives back what the pod had of the engine, and the directories that its machine and containers shared.
    pub(super) async fn leave(&self) -> Result<(), Failure> {
        let failed = |error: String| Failure::new("FailedKillPod", error);
        self.docker.leave(&self.uid).await.map_err(|error| failed(error.to_string()))?;
        let shared = self.world.records.shared(&self.uid);
        let removed = tokio::task::spawn_blocking(move || match std::fs::remove_dir_all(&shared) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(format!("{} can't be removed: {error}", shared.display()))
            }
            _ => Ok(()),
        });
        removed.await.map_err(|error| failed(error.to_string()))?.map_err(failed)
    }

    /// Puts the files of a container's volumes in their place on this host.
    pub(super) async fn files(
        &self,
        pod: &Pod,
        container: &Container,
        network: &Network,
        env: &[(String, String)],
    ) -> Result<volumes::Layout, String> {
        let mut contents = self.contents.lock().await;
        let layout = contents.layout(pod, container, &self.world.facts(Some(network.gateway)), env).await?;
        let (dir, shared, kept) = (self.volumes(), self.world.records.shared(&self.uid), layout.clone());
        let written = tokio::task::spawn_blocking(move || {
            for (name, content) in &kept.volumes {
                match content {
                    Content::Files(files) => volumes::write(&dir.join(name), files),
                    Content::Shared(_) => volumes::share(&shared, [name]),
                    Content::Disk | Content::Memory(_) => Ok(()),
                }
                .map_err(|error| format!("the files of volume {name:?} can't be written: {error}"))?;
            }
            Ok::<_, String>(())
        });
        written.await.map_err(|error| error.to_string())??;
        Ok(layout)
    }

    /// Makes one life of a container and starts it.
    pub(super) async fn run(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        container: &Container,
        attempt: u32,
        network: &Network,
    ) -> Result<(), Failure> {
        let name = &container.name;
        let config = |error: String| Failure::new("CreateContainerConfigError", error);
        let user = self.image(pod, container).await?;
        body::check_user(pod, container, &user).map_err(config)?;
        let fetched = fetch(&self.world.client, pod::namespace(pod), &Needs::of(container)).await;
        let fetched = fetched.map_err(|error| config(error.message()))?;
        let env = env::resolve(pod, container, &fetched, &self.world.facts(Some(network.gateway)));
        let env = env.map_err(|error| config(error.to_string()))?;
        let words = |list: &Option<Vec<String>>| env::command_line(list.as_deref().unwrap_or_default(), &[], &env);
        let (entrypoint, args) = (words(&container.command), words(&container.args));
        let made = |error: String| Failure::new("CreateContainerError", error);
        let layout = match self.files(pod, container, network, &env).await {
            Ok(layout) => layout,
            Err(message) => {
                self.world.events.of(pod, name, Kind::Warning, "FailedMount", message.clone());
                return Err(Failure::new(MOUNTING, message));
            }
        };
        let holder = body::container_name(pod, &self.uid, SANDBOX, 0);
        let (volumes, shared) = (self.volumes(), self.world.records.shared(&self.uid));
        let last_words = self.world.records.last_words(&self.uid, name, attempt);
        if let Some(past) = attempt.checked_sub(2) {
            // Its life is cleared away, and what it said with it.
            std::fs::remove_file(self.world.records.last_words(&self.uid, name, past)).ok();
        }
        volumes::writable_file(&last_words)
            .map_err(|error| made(format!("{} can't be made: {error}", last_words.display())))?;
        let body = body::body(Parts {
            pod,
            uid: &self.uid,
            container,
            command: Command { entrypoint, args, env },
            layout: &layout,
            volumes: &volumes,
            shared: &shared,
            last_words: &last_words,
            holder: &holder,
            labels: self.docker.labels_of(&self.uid, name, attempt),
        })
        .map_err(made)?;
        self.world.faults.hit("node: before a container").await;
        let id = self.docker.create(&body::container_name(pod, &self.uid, name, attempt), body).await;
        let id = id.map_err(|error| made(error.to_string()))?;
        self.world.events.of(pod, name, Kind::Normal, "Created", format!("Created container: {name}"));
        self.world.faults.hit("node: container made").await;
        self.docker.start(&id).await.map_err(|error| Failure::new("RunContainerError", error.to_string()))?;
        self.world.events.of(pod, name, Kind::Normal, "Started", format!("Started container {name}"));
        self.world.faults.hit("node: container started").await;
        let hook = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.post_start.as_ref());
        if let Some(action) = hook.and_then(Action::of_hook) {
            let at = Where::Container { docker: self.docker.clone(), id: id.clone(), address: network.containers };
            let result = Place { at: &at, container, run: None }.act(action).await;
            if let Err(why) = &result {
                let text = format!("PostStartHook failed: {why}");
                self.world.events.of(pod, name, Kind::Warning, "FailedPostStartHook", text);
            }
            // Nobody listens any more: the pod's worker is over.
            self.send.send(Input::Hooked(id, result)).ok();
        }
        Ok(())
    }

    /// Makes sure that the engine has the image, and tells the user that it names.
    async fn image(&self, pod: &Pod, container: &Container) -> Result<String, Failure> {
        let name = container.image.as_deref().unwrap_or_default();
        let events = &self.world.events;
        let told = |kind, reason, text: String| events.of(pod, &container.name, kind, reason, text);
        let tagged = tagged(name);
        let away = |error: DockerError| Failure::new("ImageInspectError", error.to_string());
        let policy = Policy::of(container, tagged.ends_with(":latest"));
        let present = self.docker.image(&tagged).await.map_err(away)?.filter(|_| policy != Policy::Always);
        if let Some(user) = present {
            told(Kind::Normal, "Pulled", format!("Container image {name:?} already present on machine"));
            return Ok(user);
        }
        if policy == Policy::Never {
            let text = format!("Container image {name:?} is not present with pull policy of Never");
            told(Kind::Warning, "ErrImageNeverPull", text.clone());
            return Err(Failure::new("ErrImageNeverPull", text));
        }
        told(Kind::Normal, "Pulling", format!("Pulling image {name:?}"));
        let credentials = image_pull::credentials(&self.world.client, &self.world.registries, events, pod).await;
        let (host, repository) = registry(name);
        let login = match credentials.resolve(host, repository).await {
            Ok(login) => login.map(|login| docker_login(host, login)),
            Err(error) => return Err(Failure::new("ErrImagePull", error_chain(&error))),
        };
        if let Err(error) = self.docker.pull(&tagged, login).await {
            let text = format!("Failed to pull image {name:?}: {error}");
            told(Kind::Warning, "Failed", text.clone());
            told(Kind::Warning, "Failed", "Error: ErrImagePull".to_owned());
            return Err(Failure::new("ErrImagePull", text));
        }
        told(Kind::Normal, "Pulled", format!("Successfully pulled image {name:?}"));
        self.docker
            .image(&tagged)
            .await
            .map_err(away)?
            .ok_or_else(|| Failure::new("ErrImagePull", format!("image {name:?} was pulled, and is gone")))
    }

    pub(super) fn prober(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        container: &Container,
        at: Where,
        since: Timestamp,
        known: Option<(bool, bool)>,
    ) -> Prober {
        let subject = Subject { at, container: container.clone(), run: None, since };
        let (shared, pod, name) = (Arc::clone(self), Arc::clone(pod), container.name.clone());
        let prober = Prober::start(subject, known, move |purpose, answer| {
            shared.world.probes.count(&shared.uid, &pod, &name, purpose, answer.is_ok());
            if let Err(why) = answer {
                let text = format!("{} probe failed: {why}", purpose.title());
                shared.world.events.of(&pod, &name, Kind::Warning, "Unhealthy", text);
            }
        });
        let (mut verdict, send) = (prober.verdict().clone(), self.send.clone());
        tokio::spawn(async move { while verdict.changed().await.is_ok() && send.send(Input::Probed).is_ok() {} });
        prober
    }

    /// Runs the preStop hook, asks the container to end, and kills it when its time is over.
    pub(super) async fn stop(
        &self,
        pod: &Pod,
        container: &Container,
        life: &Life,
        address: Option<Ipv4Addr>,
        grace: Duration,
    ) {
        let end = tokio::time::Instant::now() + grace;
        let hook = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref());
        if let Some(action) = hook.and_then(Action::of_hook) {
            let at = Where::Container { docker: self.docker.clone(), id: life.id.clone(), address };
            let place = Place { at: &at, container, run: None };
            if let Ok(Err(why)) = tokio::time::timeout_at(end, place.act(action)).await {
                let text = format!("PreStopHook failed: {why}");
                self.world.events.of(pod, &container.name, Kind::Warning, "FailedPreStopHook", text);
            }
        }
        let signal = life.stop_signal.as_deref().unwrap_or("SIGTERM");
        if tokio::time::Instant::now() < end {
            self.insist(&life.id, signal, Some(end)).await;
            // Its end shows as an event, which ends this.
            tokio::time::sleep_until(end).await;
        }
        self.insist(&life.id, "SIGKILL", None).await;
    }

    /// Sends a signal, however long the engine is away.
    async fn insist(&self, id: &str, signal: &str, until: Option<tokio::time::Instant>) {
        while let Err(error) = self.docker.signal(id, signal).await {
            tracing::warn!(pod = %self.uid, %error, "a container can't be stopped; trying again");
            tokio::time::sleep(Duration::from_secs(1)).await;
            if until.is_some_and(|until| tokio::time::Instant::now() >= until) {
                return;
            }
        }
    }
}

/// The name with a tag: without one, all tags would be pulled.
fn tagged(name: &str) -> String {
    let last = name.rsplit('/').next().unwrap_or(name);
    if last.contains([':', '@']) { name.to_owned() } else { format!("{name}:latest") }
}

/// The registry's host and the repository, by Docker's rules: a first part without a dot, a colon or the name localhost is no host.
fn registry(name: &str) -> (&str, &str) {
    let without_digest = name.split_once('@').map_or(name, |(name, _)| name);
    let (host, rest) = match without_digest.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest),
        _ => ("docker.io", without_digest),
    };
    (host, rest.split_once(':').map_or(rest, |(repository, _)| repository))
}

fn docker_login(host: &str, login: vmpod_image::Credential) -> DockerCredentials {
    let serveraddress = Some(host.to_owned());
    match login {
        vmpod_image::Credential::Basic { user, password } => DockerCredentials {
            username: Some(user),
            password: Some(password.expose().to_owned()),
            serveraddress,
            ..DockerCredentials::default()
        },
        vmpod_image::Credential::IdentityToken(token) => DockerCredentials {
            identitytoken: Some(token.expose().to_owned()),
            serveraddress,
            ..DockerCredentials::default()
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_images_are_read_as_docker_reads_them() {
        assert_eq!(tagged("busybox"), "busybox:latest");
        assert_eq!(tagged("r.example:5000/a/b"), "r.example:5000/a/b:latest");
        assert_eq!(tagged("r.example/a:1"), "r.example/a:1");
        assert_eq!(tagged("a@sha256:0"), "a@sha256:0");
        assert_eq!(registry("busybox:1"), ("docker.io", "busybox"));
        assert_eq!(registry("library/busybox"), ("docker.io", "library/busybox"));
        assert_eq!(registry("localhost/x:1"), ("localhost", "x"));
        assert_eq!(registry("r.example:5000/a/b:2@sha256:0"), ("r.example:5000", "a/b"));
    }
}
