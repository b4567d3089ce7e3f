//! The Docker API, as Docker, Podman and Colima serve it: containers and networks by the pod they belong to. Thin.
//!
//! What belongs to a pod says so in its labels, so that the API is the memory of what was started: an agent that comes back
//! reads there what its predecessor did.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddrV4},
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use bollard::{
    Docker as Client,
    auth::DockerCredentials,
    container::{AttachContainerResults, LogOutput},
    errors::Error,
    exec::{CreateExecOptions, StartExecOptions, StartExecResults},
    models::{
        ContainerCreateBody, ContainerInspectResponse, ContainerStateStatusEnum, ContainerStatsResponse,
        NetworkCreateRequest,
    },
    query_parameters::{
        AttachContainerOptionsBuilder, CreateContainerOptionsBuilder, CreateImageOptionsBuilder, EventsOptionsBuilder,
        InspectContainerOptions, KillContainerOptionsBuilder, ListContainersOptionsBuilder, ListNetworksOptionsBuilder,
        ListVolumesOptionsBuilder, LogsOptions, RemoveContainerOptionsBuilder, RemoveVolumeOptionsBuilder,
        ResizeContainerTTYOptionsBuilder, ResizeExecOptionsBuilder, StartContainerOptions, StatsOptionsBuilder,
        UploadToContainerOptionsBuilder,
    },
};
use bytes::Bytes;
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use jiff::Timestamp;
use tokio::{io::AsyncWrite, sync::OnceCell};

use crate::{error_chain, pod::PodUid, tar::Tar};

/// The UID of the pod that a container, network or volume belongs to.
pub(crate) const POD: &str = "vmpod.dev/pod-uid";
/// The container's name in its pod; absent for what holds the pod's network.
pub(crate) const CONTAINER: &str = "vmpod.dev/container";
/// How often the container had been started before.
pub(crate) const ATTEMPT: &str = "vmpod.dev/attempt";
/// The agent, by its machines' directory: several may share one engine.
pub(crate) const AGENT: &str = "vmpod.dev/agent";

/// How long a request may take. None here waits for a container to end.
const REQUEST: Duration = Duration::from_mins(1);

/// The image of what holds a pod's network, made here from a few bytes of machine code.
pub(crate) const PAUSE: &str = "vmpod.dev/pause:1";

/// Why the engine didn't do something.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DockerError {
    #[error("the Docker API at {host} can't be reached: start Docker, or name its socket with --docker-host ({why})")]
    Away { host: String, why: String },
    #[error("{what}: {why}")]
    Refused { what: String, why: String },
    #[error("{0}")]
    Odd(String),
}

/// The way to the engine. Nothing is asked until something is wanted of it.
#[derive(Clone)]
pub(crate) struct Docker {
    host: Arc<str>,
    agent: Arc<str>,
    /// Machines listen at this host's address in their pods' networks.
    at_gateway: bool,
    client: Arc<OnceCell<Client>>,
}

/// One life of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Life {
    pub(crate) id: String,
    pub(crate) attempt: u32,
    pub(crate) image: String,
    pub(crate) image_id: String,
    pub(crate) stop_signal: Option<String>,
    pub(crate) state: LifeState,
}

/// Where a life is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LifeState {
    /// Made, never started.
    Created,
    Running(Timestamp),
    Ended(LifeEnd),
}

/// How a life ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LifeEnd {
    pub(crate) code: i32,
    /// The kernel killed it for want of memory.
    pub(crate) oom: bool,
    pub(crate) started: Option<Timestamp>,
    pub(crate) finished: Timestamp,
    pub(crate) why: Option<String>,
}

/// What the engine has of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Inventory {
    pub(crate) network: Option<Network>,
    /// The container that holds the network, and whether it runs.
    pub(crate) holder: Option<(String, bool)>,
    /// By container, in order of their attempts.
    pub(crate) lives: std::collections::BTreeMap<String, Vec<Life>>,
}

/// A pod's network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Network {
    pub(crate) id: String,
    /// This host's address in it, where the pod's machine listens.
    pub(crate) gateway: Ipv4Addr,
    /// The address that the pod's containers share.
    pub(crate) containers: Option<Ipv4Addr>,
}

/// A command in a container.
pub(crate) struct Session {
    pub(crate) id: String,
    pub(crate) output: Pin<Box<dyn Stream<Item = Result<LogOutput, Error>> + Send>>,
    pub(crate) input: Pin<Box<dyn AsyncWrite + Send>>,
}

impl Docker {
    /// `agent` tells this agent's containers from others'; `at_gateway` says that machines listen at this host's address in their
    /// pods' networks.
    pub(crate) fn new(host: &str, agent: &str, at_gateway: bool) -> Self {
        Self { host: host.into(), agent: agent.into(), at_gateway, client: Arc::default() }
    }

    /// The socket's file, if it is one.
    pub(crate) fn socket(&self) -> Option<PathBuf> {
        self.host.strip_prefix("unix://").map(PathBuf::from)
    }

    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    async fn client(&self) -> Result<&Client, DockerError> {
        let connect = || async {
            let client = Client::connect_with_host(&self.host)?.with_timeout(REQUEST);
            client.negotiate_version().await
        };
        self.client.get_or_try_init(connect).await.map_err(|error| self.failed("connect", error))
    }

    fn failed(&self, what: &str, error: Error) -> DockerError {
        match error {
            Error::DockerResponseServerError { message, .. } => {
                DockerError::Refused { what: what.to_owned(), why: message }
            }
            Error::DockerStreamError { error } => DockerError::Refused { what: what.to_owned(), why: error },
            Error::JsonDataError { .. } | Error::JsonSerdeError { .. } => {
                DockerError::Odd(format!("{what}: {}", error_chain(&error)))
            }
            error => DockerError::Away { host: self.host.to_string(), why: error_chain(&error) },
        }
    }

    pub(crate) fn labels(&self, uid: &PodUid) -> HashMap<String, String> {
        HashMap::from([(POD.to_owned(), uid.to_string()), (AGENT.to_owned(), self.agent.to_string())])
    }

    /// All that there is of a pod.
    pub(crate) async fn inventory(&self, uid: &PodUid) -> Result<Inventory, DockerError> {
        let client = self.client().await?;
        let mine = [format!("{POD}={uid}"), format!("{AGENT}={}", self.agent)];
        let mut found = Inventory::default();
        let network = self.network(uid).await?;
        let options = ListContainersOptionsBuilder::new().all(true).filters(&filters(&mine)).build();
        let list =
            client.list_containers(Some(options)).await.map_err(|error| self.failed("list containers", error))?;
        let mut holder_address = None;
        for id in list.into_iter().filter_map(|summary| summary.id) {
            let about = match client.inspect_container(&id, None::<InspectContainerOptions>).await {
                Ok(about) => about,
                // It went between the two questions.
                Err(error) if is_missing(&error) => continue,
                Err(error) => return Err(self.failed("inspect a container", error)),
            };
            let labels = about.config.as_ref().and_then(|config| config.labels.clone()).unwrap_or_default();
            match labels.get(CONTAINER) {
                None => {
                    let running = about.state.as_ref().and_then(|state| state.running) == Some(true);
                    let networks = about.network_settings.as_ref().and_then(|settings| settings.networks.as_ref());
                    holder_address = networks
                        .into_iter()
                        .flat_map(HashMap::values)
                        .find_map(|endpoint| endpoint.ip_address.as_deref().and_then(|text| text.parse().ok()));
                    found.holder = Some((id, running));
                }
                Some(name) => found.lives.entry(name.clone()).or_default().push(life(id, &labels, &about)?),
            }
        }
        for lives in found.lives.values_mut() {
            lives.sort_by_key(|life| life.attempt);
        }
        found.network = network.map(|(id, gateway)| Network { id, gateway, containers: holder_address });
        Ok(found)
    }

    /// The pod's network and this host's address in it.
    async fn network(&self, uid: &PodUid) -> Result<Option<(String, Ipv4Addr)>, DockerError> {
        let client = self.client().await?;
        let mine = [format!("{POD}={uid}"), format!("{AGENT}={}", self.agent)];
        let options = ListNetworksOptionsBuilder::new().filters(&filters(&mine)).build();
        let list = client.list_networks(Some(options)).await.map_err(|error| self.failed("list networks", error))?;
        let Some(network) = list.into_iter().next() else { return Ok(None) };
        let configs = network.ipam.and_then(|ipam| ipam.config).unwrap_or_default();
        let gateway = configs.iter().find_map(|config| config.gateway.as_deref()?.parse().ok());
        match (network.id, gateway) {
            (Some(id), Some(gateway)) => Ok(Some((id, gateway))),
            _ => Err(DockerError::Odd("the pod's Docker network has no IPv4 gateway".to_owned())),
        }
    }

    /// Makes the pod's network, if there is none, and what holds it: then the pod's containers have one address.
    ///
    /// `archive` is unpacked in the holder before it is started.
    pub(crate) async fn sandbox(
        &self,
        uid: &PodUid,
        network: &str,
        name: &str,
        holder: ContainerCreateBody,
        archive: Vec<u8>,
    ) -> Result<(), DockerError> {
        let client = self.client().await?;
        let found = self.inventory(uid).await?;
        let gateway = if let Some(network) = found.network {
            network.gateway
        } else {
            let request = NetworkCreateRequest {
                name: network.to_owned(),
                driver: Some("bridge".to_owned()),
                labels: Some(self.labels(uid)),
                ..NetworkCreateRequest::default()
            };
            client.create_network(request).await.map_err(|error| self.failed("make the pod's network", error))?;
            self.network(uid).await?.ok_or_else(|| DockerError::Odd("the pod's network is gone".to_owned()))?.1
        };
        // The machine listens at this address: an engine elsewhere, or one without root, has it elsewhere too.
        if self.at_gateway {
            std::net::TcpListener::bind(SocketAddrV4::new(gateway, 0)).map_err(|error| {
                DockerError::Odd(format!(
                    "{gateway}, the gateway of the pod's Docker network, is no address of this host ({error}): \
                     sidecars need an engine on this host that runs as root"
                ))
            })?;
        }
        let id = match found.holder {
            Some((_, true)) => return Ok(()),
            // Whoever made it may have died before its directories were opened: that is done again.
            Some((id, false)) => id,
            None => {
                self.pause_image().await?;
                self.create(name, holder).await?
            }
        };
        let options = UploadToContainerOptionsBuilder::new().path("/").build();
        let unpacked = client.upload_to_container(&id, Some(options), bollard::body_full(Bytes::from(archive))).await;
        unpacked.map_err(|error| self.failed("make the empty directories", error))?;
        self.start(&id).await
    }

    /// Makes sure that there is an image of a program that only waits.
    async fn pause_image(&self) -> Result<(), DockerError> {
        let client = self.client().await?;
        if self.image(PAUSE).await?.is_some() {
            return Ok(());
        }
        let arch = client.version().await.map_err(|error| self.failed("ask for the version", error))?.arch;
        let program = pause(arch.as_deref().unwrap_or_default())
            .ok_or_else(|| DockerError::Odd(format!("sidecars are not supported on an engine for {arch:?}")))?;
        let mut tar = Tar::default();
        tar.file("pause", 0o755, &program);
        let (repo, tag) = PAUSE.split_once(':').unwrap_or((PAUSE, "latest"));
        let options = CreateImageOptionsBuilder::new().from_src("-").repo(repo).tag(tag);
        let options = options.changes(vec!["ENTRYPOINT [\"/pause\"]".to_owned()]).build();
        let body = bollard::body_full(Bytes::from(tar.finish()));
        let import = client.create_image(Some(options), Some(body), None);
        import.try_for_each(|_| async { Ok(()) }).await.map_err(|error| self.failed("make the pause image", error))
    }

    /// The user that an image's containers are, empty for root; none when the image isn't here.
    pub(crate) async fn image(&self, name: &str) -> Result<Option<String>, DockerError> {
        match self.client().await?.inspect_image(name).await {
            Ok(image) => Ok(Some(image.config.and_then(|config| config.user).unwrap_or_default())),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(self.failed("look for an image", error)),
        }
    }

    pub(crate) async fn pull(&self, name: &str, login: Option<DockerCredentials>) -> Result<(), DockerError> {
        let client = self.client().await?.clone().with_timeout(Duration::from_hours(1));
        let options = CreateImageOptionsBuilder::new().from_image(name).build();
        let pull = client.create_image(Some(options), None, login);
        pull.try_for_each(|_| async { Ok(()) }).await.map_err(|error| self.failed("pull", error))
    }

    /// Makes a container, or finds the one that has been made: names aren't given twice.
    pub(crate) async fn create(&self, name: &str, body: ContainerCreateBody) -> Result<String, DockerError> {
        let client = self.client().await?;
        let options = CreateContainerOptionsBuilder::new().name(name).build();
        match client.create_container(Some(options), body).await {
            Ok(made) => Ok(made.id),
            Err(Error::DockerResponseServerError { status_code: 409, message }) => {
                match client.inspect_container(name, None::<InspectContainerOptions>).await {
                    Ok(ContainerInspectResponse { id: Some(id), .. }) => Ok(id),
                    _ => Err(DockerError::Refused { what: format!("make container {name}"), why: message }),
                }
            }
            Err(error) => Err(self.failed(&format!("make container {name}"), error)),
        }
    }

    pub(crate) async fn start(&self, id: &str) -> Result<(), DockerError> {
        let started = self.client().await?.start_container(id, None::<StartContainerOptions>).await;
        started.map_err(|error| self.failed("start the container", error))
    }

    /// Sends a signal. One that is over is no error.
    pub(crate) async fn signal(&self, id: &str, signal: &str) -> Result<(), DockerError> {
        let options = KillContainerOptionsBuilder::new().signal(signal).build();
        match self.client().await?.kill_container(id, Some(options)).await {
            Ok(()) | Err(Error::DockerResponseServerError { status_code: 404 | 409, .. }) => Ok(()),
            Err(error) => Err(self.failed("signal the container", error)),
        }
    }

    /// Removes a container, killing it if it runs. One that is gone is no error.
    pub(crate) async fn remove(&self, id: &str) -> Result<(), DockerError> {
        let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
        match self.client().await?.remove_container(id, Some(options)).await {
            // 409: it is being removed already.
            Ok(()) | Err(Error::DockerResponseServerError { status_code: 404 | 409, .. }) => Ok(()),
            Err(error) => Err(self.failed("remove the container", error)),
        }
    }

    /// Removes the pod's network and what holds it, which nothing runs in any more.
    pub(crate) async fn leave(&self, uid: &PodUid) -> Result<(), DockerError> {
        let found = self.inventory(uid).await?;
        if let Some((id, _)) = found.holder {
            self.remove(&id).await?;
        }
        if let Some(network) = found.network {
            match self.client().await?.remove_network(&network.id).await {
                Ok(()) => {}
                Err(error) if is_missing(&error) => {}
                Err(error) => return Err(self.failed("remove the pod's network", error)),
            }
        }
        Ok(())
    }

    /// Removes everything of a pod.
    pub(crate) async fn disband(&self, uid: &PodUid) -> Result<(), DockerError> {
        // A request to make a container that was given up may still have made one.
        loop {
            let found = self.inventory(uid).await?;
            if found == Inventory::default() {
                break;
            }
            for life in found.lives.values().flatten() {
                self.remove(&life.id).await?;
            }
            self.leave(uid).await?;
        }
        let client = self.client().await?;
        let mine = [format!("{POD}={uid}"), format!("{AGENT}={}", self.agent)];
        let options = ListVolumesOptionsBuilder::new().filters(&filters(&mine)).build();
        let list = client.list_volumes(Some(options)).await.map_err(|error| self.failed("list volumes", error))?;
        for volume in list.volumes.unwrap_or_default() {
            let options = RemoveVolumeOptionsBuilder::new().force(true).build();
            match client.remove_volume(&volume.name, Some(options)).await {
                Ok(()) => {}
                Err(error) if is_missing(&error) => {}
                Err(error) => return Err(self.failed("remove the volume", error)),
            }
        }
        Ok(())
    }

    /// The pods of which the engine has something.
    pub(crate) async fn pods(&self) -> Result<Vec<PodUid>, DockerError> {
        let client = self.client().await?;
        let mine = [format!("{AGENT}={}", self.agent)];
        let options = ListContainersOptionsBuilder::new().all(true).filters(&filters(&mine)).build();
        let list =
            client.list_containers(Some(options)).await.map_err(|error| self.failed("list containers", error))?;
        let options = ListNetworksOptionsBuilder::new().filters(&filters(&mine)).build();
        let nets = client.list_networks(Some(options)).await.map_err(|error| self.failed("list networks", error))?;
        let labels = list.into_iter().map(|one| one.labels).chain(nets.into_iter().map(|one| one.labels));
        let mut uids: Vec<_> = labels.flatten().filter_map(|labels| PodUid::parse(labels.get(POD)?).ok()).collect();
        uids.sort();
        uids.dedup();
        Ok(uids)
    }

    /// The UIDs of pods one of whose containers started, ended or went, as it happens. It is known before that the engine answers.
    pub(crate) async fn events(
        &self,
    ) -> Result<impl Stream<Item = Result<PodUid, DockerError>> + Send + use<'_>, DockerError> {
        let client = self.client().await?;
        client.ping().await.map_err(|error| self.failed("ask whether it answers", error))?;
        let mut filter = filters(&[format!("{AGENT}={}", self.agent)]);
        filter.insert("type".to_owned(), vec!["container".to_owned()]);
        let events = ["start", "die", "oom", "destroy"].map(str::to_owned);
        filter.insert("event".to_owned(), events.into());
        // The request goes out when the first event is waited for: what happens until then is told as well.
        let now = Timestamp::now();
        let since = format!("{}.{:09}", now.as_second(), now.subsec_nanosecond());
        let options = EventsOptionsBuilder::new().since(&since).filters(&filter).build();
        Ok(client.events(Some(options)).filter_map(|event| async {
            match event {
                Ok(event) => Ok(PodUid::parse(event.actor?.attributes?.get(POD)?).ok()).transpose(),
                Err(error) => Some(Err(self.failed("follow events", error))),
            }
        }))
    }

    /// Runs a command.
    pub(crate) async fn exec(
        &self,
        id: &str,
        command: Vec<String>,
        tty: bool,
        stdin: bool,
    ) -> Result<Session, DockerError> {
        let client = self.client().await?;
        let options = CreateExecOptions {
            attach_stdin: Some(stdin),
            attach_stdout: Some(true),
            attach_stderr: Some(!tty),
            tty: Some(tty),
            cmd: Some(command),
            ..CreateExecOptions::default()
        };
        let failed = |error| self.failed("run the command", error);
        let exec = client.create_exec(id, options).await.map_err(failed)?.id;
        let options = StartExecOptions { detach: false, tty, output_capacity: None };
        match client.start_exec(&exec, Some(options)).await.map_err(failed)? {
            StartExecResults::Attached { output, input } => Ok(Session { id: exec, output, input }),
            StartExecResults::Detached => Err(DockerError::Odd("the command was detached".to_owned())),
        }
    }

    /// Runs a command to its end: its code, and the first part of what it wrote.
    pub(crate) async fn output(
        &self,
        id: &str,
        command: Vec<String>,
        limit: u64,
    ) -> Result<(i32, Vec<u8>), DockerError> {
        let mut session = self.exec(id, command, false, false).await?;
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let mut said = Vec::new();
        while let Some(piece) = session.output.next().await {
            let piece = piece.map_err(|error| self.failed("read what the command wrote", error))?.into_bytes();
            said.extend_from_slice(&piece[..piece.len().min(limit - said.len())]);
        }
        Ok((self.exec_code(&session.id).await?, said))
    }

    /// How a command ended whose output has.
    pub(crate) async fn exec_code(&self, exec: &str) -> Result<i32, DockerError> {
        let client = self.client().await?;
        loop {
            let about = client.inspect_exec(exec).await;
            let about = about.map_err(|error| self.failed("ask how the command ended", error))?;
            if let (Some(code), false) = (about.exit_code, about.running == Some(true)) {
                return Ok(i32::try_from(code).unwrap_or(255));
            }
            // There is no event for it: the output ends a moment before the engine knows the code.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) async fn resize_exec(&self, exec: &str, cols: u16, rows: u16) {
        let Ok(client) = self.client().await else { return };
        let options = ResizeExecOptionsBuilder::new().w(cols.into()).h(rows.into()).build();
        // A command that has just ended has no terminal any more.
        client.resize_exec(exec, options).await.ok();
    }

    pub(crate) async fn resize(&self, id: &str, cols: u16, rows: u16) {
        let Ok(client) = self.client().await else { return };
        let options = ResizeContainerTTYOptionsBuilder::new().w(cols.into()).h(rows.into()).build();
        // A container that has just ended has no terminal any more.
        client.resize_container_tty(id, options).await.ok();
    }

    pub(crate) async fn attach(&self, id: &str, stdin: bool) -> Result<AttachContainerResults, DockerError> {
        let options = AttachContainerOptionsBuilder::new().stream(true).stdin(stdin).stdout(true).stderr(true).build();
        let attached = self.client().await?.attach_container(id, Some(options)).await;
        attached.map_err(|error| self.failed("attach", error))
    }

    pub(crate) async fn logs(
        &self,
        id: &str,
        options: LogsOptions,
    ) -> Result<impl Stream<Item = Result<LogOutput, Error>> + Send + 'static, DockerError> {
        Ok(self.client().await?.clone().with_timeout(Duration::from_hours(24)).logs(id, Some(options)))
    }

    pub(crate) async fn stats(&self, id: &str) -> Result<ContainerStatsResponse, DockerError> {
        let options = StatsOptionsBuilder::new().stream(false).one_shot(true).build();
        let mut stats = std::pin::pin!(self.client().await?.stats(id, Some(options)));
        let first = stats.next().await.ok_or_else(|| DockerError::Odd("no figures".to_owned()))?;
        first.map_err(|error| self.failed("ask for figures", error))
    }

    /// The labels of a container's life.
    pub(crate) fn labels_of(&self, uid: &PodUid, container: &str, attempt: u32) -> HashMap<String, String> {
        let mut labels = self.labels(uid);
        labels.insert(CONTAINER.to_owned(), container.to_owned());
        labels.insert(ATTEMPT.to_owned(), attempt.to_string());
        labels
    }
}

fn filters(labels: &[String]) -> HashMap<String, Vec<String>> {
    HashMap::from([("label".to_owned(), labels.to_vec())])
}

fn is_missing(error: &Error) -> bool {
    matches!(error, Error::DockerResponseServerError { status_code: 404, .. })
}

fn life(id: String, labels: &HashMap<String, String>, about: &ContainerInspectResponse) -> Result<Life, DockerError> {
    let state = about.state.clone().unwrap_or_default();
    // Docker writes the year 1 for "never".
    let time = |text: &Option<String>| -> Option<Timestamp> {
        text.as_deref().and_then(|text| text.parse().ok()).filter(|at| *at > Timestamp::UNIX_EPOCH)
    };
    let said = state.error.clone().filter(|text| !text.is_empty());
    let started = time(&state.started_at);
    let code = state.exit_code.and_then(|code| i32::try_from(code).ok());
    let state = match state.status {
        Some(ContainerStateStatusEnum::RUNNING | ContainerStateStatusEnum::PAUSED) => {
            LifeState::Running(started.unwrap_or(Timestamp::UNIX_EPOCH))
        }
        // It has ended and is being taken down, or will be running again in a moment: what it is then, an event tells.
        Some(
            ContainerStateStatusEnum::REMOVING
            | ContainerStateStatusEnum::RESTARTING
            | ContainerStateStatusEnum::EXITED
            | ContainerStateStatusEnum::DEAD,
        ) => LifeState::Ended(LifeEnd {
            code: code.unwrap_or(255),
            oom: state.oom_killed == Some(true),
            started,
            finished: time(&state.finished_at).or(started).unwrap_or(Timestamp::UNIX_EPOCH),
            why: said,
        }),
        // One that couldn't be started will not be started again: it is as if it had ended at once.
        _ if said.is_some() => LifeState::Ended(LifeEnd {
            code: code.filter(|code| *code != 0).unwrap_or(128),
            oom: false,
            started: None,
            finished: time(&about.created).unwrap_or(Timestamp::UNIX_EPOCH),
            why: said,
        }),
        _ => LifeState::Created,
    };
    let config = about.config.clone().unwrap_or_default();
    let attempt = labels.get(ATTEMPT).and_then(|text| text.parse().ok());
    Ok(Life {
        id,
        attempt: attempt.ok_or_else(|| DockerError::Odd("a container's label tells no attempt".to_owned()))?,
        image: config.image.unwrap_or_default(),
        image_id: about.image.clone().unwrap_or_default(),
        stop_signal: config.stop_signal.filter(|signal| !signal.is_empty()),
        state,
    })
}

/// A program that waits for ever, for an architecture as Docker names it: a Linux ELF file of one segment, without a library.
fn pause(arch: &str) -> Option<Vec<u8>> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u16 = 64 + 56;
    let (machine, code): (u16, &[u8]) = match arch {
        // mov eax, 34 (pause); syscall; jmp back.
        "amd64" => (62, &[0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7]),
        // mov x0…x4, 0; mov x8, 73 (ppoll); svc 0; b back.
        "arm64" => (
            183,
            &[
                0x00, 0x00, 0x80, 0xd2, 0x01, 0x00, 0x80, 0xd2, 0x02, 0x00, 0x80, 0xd2, 0x03, 0x00, 0x80, 0xd2, 0x04,
                0x00, 0x80, 0xd2, 0x28, 0x09, 0x80, 0xd2, 0x01, 0x00, 0x00, 0xd4, 0xf9, 0xff, 0xff, 0x17,
            ],
        ),
        _ => return None,
    };
    let size = u64::from(HEADERS) + code.len() as u64;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // An executable: version 1, entered behind the headers, its one program header right after this one.
    file.extend(2_u16.to_le_bytes());
    file.extend(machine.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    for field in [BASE + u64::from(HEADERS), 64, 0] {
        file.extend(field.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for field in [64_u16, 56, 1, 0, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    // Loaded whole, to be read and executed.
    file.extend(1_u32.to_le_bytes());
    file.extend(5_u32.to_le_bytes());
    for field in [0, BASE, BASE, size, size, 0x1_0000] {
        file.extend(field.to_le_bytes());
    }
    file.extend(code);
    Some(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    #[tokio::test]
    async fn the_pause_program_waits_until_it_is_killed() {
        let arch = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pause");
        std::fs::write(&path, pause(arch).unwrap()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut child = tokio::process::Command::new(&path).kill_on_drop(true).spawn().unwrap();
        let ended = tokio::time::timeout(Duration::from_millis(100), child.wait()).await;
        assert!(ended.is_err(), "{ended:?}");
        child.kill().await.unwrap();
        let status = child.wait().await.unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
    }

    #[test]
    fn what_inspect_tells_becomes_a_life() {
        let labels = HashMap::from([(ATTEMPT.to_owned(), "3".to_owned())]);
        let state = |state: serde_json::Value| {
            let about = serde_json::json!({"Id": "i", "Image": "sha256:1", "Config": {"Image": "a:1"}, "State": state});
            life("i".to_owned(), &labels, &serde_json::from_value(about).unwrap()).map(|life| life.state)
        };
        let never = "0001-01-01T00:00:00Z";
        let (began, ended) = ("2026-11-27T10:00:00.5Z", "2026-11-27T10:00:02Z");
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let created = serde_json::json!({"Status": "created", "Error": "", "StartedAt": never});
        assert_eq!(state(created).unwrap(), LifeState::Created);
        let failed =
            serde_json::json!({"Status": "created", "Error": "no such file", "ExitCode": 127, "StartedAt": never});
        let why = Some("no such file".to_owned());
        let end = LifeEnd { code: 127, oom: false, started: None, finished: Timestamp::UNIX_EPOCH, why };
        assert_eq!(state(failed).unwrap(), LifeState::Ended(end));
        let running = serde_json::json!({"Status": "running", "StartedAt": began, "FinishedAt": never});
        assert_eq!(state(running).unwrap(), LifeState::Running(at(began)));
        let over = serde_json::json!({"Status": "exited", "ExitCode": 137, "OOMKilled": true, "StartedAt": began, "FinishedAt": ended});
        let end = LifeEnd { code: 137, oom: true, started: Some(at(began)), finished: at(ended), why: None };
        assert_eq!(state(over).unwrap(), LifeState::Ended(end));
        let about = ContainerInspectResponse::default();
        life("i".to_owned(), &HashMap::new(), &about).unwrap_err();
    }

    #[tokio::test]
    async fn an_engine_that_is_away_is_named() {
        let docker = Docker::new("unix:///no/such/socket", "a", true);
        let error = docker.pods().await.unwrap_err();
        assert!(matches!(error, DockerError::Away { .. }), "{error}");
        assert!(error.to_string().contains("unix:///no/such/socket"), "{error}");
    }
}
