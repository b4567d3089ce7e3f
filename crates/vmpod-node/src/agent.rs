//! What the kubelet API asks, answered from the workers' views and the guests.

use std::{io, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use vmpod_machine::{Exec, ExecSession, ExitStatus, Guest, GuestState, Machine, Signal, State, Winsize};

use crate::{
    docker::{Docker, DockerError, Life, LifeState},
    error_chain,
    logs::{self, LogFile, LogOptions},
    pod,
    record::Main,
    server::{
        AttachRequest, Duplex, ExecRequest, Exit, FsUsage, MachineStats, NodeStats, PodRef, PodStats, Runtime,
        RuntimeError, Streams, Target, Usage,
    },
    sidecars::{self, Terminal},
    worker::MAIN,
    world::{View, World},
};

/// How long a caller waits for a guest that is still booting.
const BOOT_PATIENCE: Duration = Duration::from_mins(3);

/// The agent as the kubelet API sees it.
pub(crate) struct Agent {
    pub(crate) world: Arc<World>,
}

impl Agent {
    /// The newest pod of that name (one that was recreated comes after its predecessor), with this UID if one is asked for.
    fn pod(&self, wanted: &PodRef) -> Result<View, RuntimeError> {
        self.world
            .views()
            .into_iter()
            .filter(|view| {
                view.pod.as_deref().is_some_and(|pod| {
                    pod::name(pod) == wanted.name
                        && pod::namespace(pod) == wanted.namespace
                        && wanted.uid.as_ref().is_none_or(|uid| pod.metadata.uid.as_ref() == Some(uid))
                })
            })
            .max_by_key(|view| view.pod.as_ref().and_then(|pod| pod.metadata.creation_timestamp.clone()))
            .ok_or_else(|| RuntimeError::NoPod(wanted.clone()))
    }

    fn container(&self, target: &Target) -> Result<View, RuntimeError> {
        let view = self.pod(&target.pod)?;
        let known = view.pod.as_deref().is_some_and(|pod| {
            let machine = pod::machine_container(pod);
            let members = sidecars::members(pod).into_iter().map(|member| member.container);
            machine.into_iter().chain(members).any(|container| container.name == target.container)
        });
        if known { Ok(view) } else { Err(RuntimeError::NoContainer(target.clone())) }
    }

    /// The last life of a container beside the machine, or the one before it; none if the machine is meant.
    fn sidecar(&self, target: &Target, previous: bool) -> Result<Option<Life>, RuntimeError> {
        let view = self.container(target)?;
        let machine = view.pod.as_deref().and_then(pod::machine_container);
        if machine.is_some_and(|container| container.name == target.container) {
            return Ok(None);
        }
        let lives = view.crew.as_ref().and_then(|crew| crew.lives.get(&target.container));
        let lives = lives.map(Vec::as_slice).unwrap_or_default();
        let none = |why: &str| RuntimeError::NoLog { target: target.clone(), previous, why: why.to_owned() };
        match lives {
            [] => Err(none("the container has not started yet")),
            [.., life, _] if previous => Ok(Some(life.clone())),
            [_] if previous => Err(none("the container has not been restarted")),
            [.., life] => Ok(Some(life.clone())),
        }
    }

    /// The id of a container beside the machine that runs; none if the machine is meant.
    fn running_sidecar(&self, target: &Target) -> Result<Option<Life>, RuntimeError> {
        let not = |why: &str| RuntimeError::NotRunning { target: target.clone(), why: why.to_owned() };
        let life = match self.sidecar(target, false) {
            Err(RuntimeError::NoLog { why, .. }) => return Err(not(&why)),
            other => other?,
        };
        match life.as_ref().map(|life| &life.state) {
            Some(LifeState::Created) => Err(not("it has not started yet")),
            Some(LifeState::Ended(_)) => Err(not("it has terminated")),
            None | Some(LifeState::Running(_)) => Ok(life),
        }
    }

    /// What the running containers beside the machine use.
    pub(crate) async fn sidecar_stats(&self, crew: Option<&sidecars::View>) -> Vec<MachineStats> {
        let mut all = Vec::new();
        for (name, life) in crew.iter().flat_map(|crew| &crew.lives).filter_map(|(n, lives)| Some((n, lives.last()?))) {
            let LifeState::Running(started) = life.state else { continue };
            let Ok(stats) = self.docker().stats(&life.id).await else { continue };
            let memory = stats.memory_stats.unwrap_or_default();
            let figure = |names: &[&str]| {
                let figures = memory.stats.as_ref();
                names.iter().find_map(|name| figures?.get(*name).copied())
            };
            let used = memory.usage.unwrap_or(0);
            // As the kubelet: what the kernel could take back at once doesn't count (cgroup v1 and v2 names).
            let set = used.saturating_sub(figure(&["total_inactive_file", "inactive_file"]).unwrap_or(0));
            all.push(MachineStats {
                container: name.clone(),
                started,
                usage: Usage {
                    cpu_nanoseconds: stats.cpu_stats.and_then(|cpu| cpu.cpu_usage?.total_usage).unwrap_or(0),
                    cpu_nanocores: None,
                    memory_working_set_bytes: set,
                    memory_rss_bytes: figure(&["rss", "anon"]),
                    memory_available_bytes: memory.limit.map(|limit| limit.saturating_sub(set)),
                },
                rootfs: None,
                log_bytes: 0,
            });
        }
        all
    }

    fn docker(&self) -> &Docker {
        self.world.engine.docker()
    }

    /// Runs a command in a container beside the machine.
    async fn exec_beside(
        &self,
        target: &Target,
        life: &Life,
        request: ExecRequest,
        streams: Streams,
    ) -> Result<Exit, RuntimeError> {
        let failed = |error: DockerError| RuntimeError::Guest {
            what: format!("could not run {:?} in {target}", request.command.first().map_or("", String::as_str)),
            source: Box::new(error),
        };
        let docker = self.docker();
        let session = docker.exec(&life.id, request.command.clone(), request.tty, streams.stdin.is_some()).await;
        let session = session.map_err(failed)?;
        let terminal = Terminal::Exec(docker.clone(), session.id.clone());
        sidecars::carry(session.output, session.input, streams, terminal).await;
        docker.exec_code(&session.id).await.map(Exit::Code).map_err(failed)
    }

    /// Joins the main process of a container beside the machine.
    async fn attach_beside(&self, target: &Target, life: &Life, streams: Streams) -> Result<Exit, RuntimeError> {
        let failed = |error: DockerError| RuntimeError::Guest {
            what: format!("could not attach to {target}"),
            source: Box::new(error),
        };
        let docker = self.docker();
        let attached = docker.attach(&life.id, streams.stdin.is_some()).await.map_err(failed)?;
        let terminal = Terminal::Main(docker.clone(), life.id.clone());
        sidecars::carry(attached.output, attached.input, streams, terminal).await;
        Ok(Exit::Code(0))
    }

    /// The file with the log of the machine's current attempt, or of the one before it.
    fn log_file(&self, target: &Target, previous: bool) -> Result<LogFile, RuntimeError> {
        let view = self.container(target)?;
        let none = |why: &str| RuntimeError::NoLog { target: target.clone(), previous, why: why.to_owned() };
        let record = view.record.as_ref().ok_or_else(|| none("the pod is not accepted yet"))?;
        let attempt = record.attempt.as_ref().ok_or_else(|| none("the container has not started yet"))?;
        let number = if previous {
            attempt.number.checked_sub(1).ok_or_else(|| none("the container has not been restarted"))?
        } else {
            attempt.number
        };
        let path = self.world.records.log(&record.uid, &target.container, number);
        let live = if previous { None } else { view.log };
        if live.is_none() && !path.exists() {
            let waiting = attempt.ended.is_none() && !matches!(attempt.main, Main::Ended { .. });
            return Err(none(if waiting {
                "the container is waiting to start"
            } else {
                "it said nothing, or its log is gone"
            }));
        }
        Ok(LogFile { path, live })
    }

    /// The machine of a container that runs.
    fn running(&self, target: &Target) -> Result<(View, Machine), RuntimeError> {
        let view = self.container(target)?;
        let not = |why: &str| RuntimeError::NotRunning { target: target.clone(), why: why.to_owned() };
        let attempt = view.record.as_ref().and_then(|record| record.attempt.as_ref());
        let Some(attempt) = attempt else { return Err(not("its machine has not been made yet")) };
        if attempt.ended.is_some() {
            return Err(not("it has terminated"));
        }
        let Some(machine) = view.machine.clone() else { return Err(not("its machine has not been made yet")) };
        match &*machine.state().borrow() {
            State::Running | State::Booting | State::Stopping { .. } => {}
            State::Stopped(exit) => return Err(not(&exit.to_string())),
            State::Failed(why) => return Err(not(why)),
            State::Preparing | State::Paused | State::Suspended => return Err(not("its machine does not run")),
        }
        Ok((view, machine))
    }

    /// The guest, once it answers.
    async fn ready(target: &Target, machine: &Machine) -> Result<Guest, RuntimeError> {
        let guest = machine.guest();
        let mut ready = guest.ready();
        let mut state = machine.state();
        let waited = tokio::time::timeout(BOOT_PATIENCE, async {
            tokio::select! {
                answered = ready.wait_for(|state| *state == GuestState::Ready) => answered.is_ok(),
                _ = state.wait_for(State::is_final) => false,
            }
        });
        if waited.await == Ok(true) {
            return Ok(guest);
        }
        let why = guest.ready().borrow().to_string();
        Err(RuntimeError::NotRunning { target: target.clone(), why })
    }
}

fn guest_error(what: String) -> impl FnOnce(vmpod_machine::GuestError) -> RuntimeError {
    move |source| RuntimeError::Guest { what, source: Box::new(source) }
}

/// Where a port is that a container beside the machine declares, and the machine doesn't.
fn beside(view: &View, port: u16) -> Option<std::net::Ipv4Addr> {
    let pod = view.pod.as_deref()?;
    let has = |container: &k8s_openapi::api::core::v1::Container| {
        container.ports.iter().flatten().any(|declared| declared.container_port == i32::from(port))
    };
    let machines = pod::machine_container(pod).is_some_and(has);
    let members = sidecars::members(pod);
    (!machines && members.iter().any(|member| has(member.container))).then_some(())?;
    view.crew.as_ref()?.containers
}

fn exit(status: ExitStatus) -> Exit {
    match status {
        ExitStatus::Code(code) => Exit::Code(code),
        ExitStatus::Signal(signal) => Exit::Signal(signal.name().to_owned()),
    }
}

#[async_trait]
impl Runtime for Agent {
    fn probes(&self) -> String {
        self.world.probes.render()
    }

    fn pods(&self) -> Vec<Arc<Pod>> {
        self.world.views().into_iter().filter_map(|view| view.pod).collect()
    }

    async fn check_running(&self, target: &Target) -> Result<(), RuntimeError> {
        if self.running_sidecar(target)?.is_some() {
            return Ok(());
        }
        let (_, machine) = self.running(target)?;
        // Better a late answer than "not running" for a machine that boots.
        Self::ready(target, &machine).await.map(drop)
    }

    async fn check_forward(&self, pod: &PodRef) -> Result<(), RuntimeError> {
        let view = self.pod(pod)?;
        let container =
            view.pod.as_deref().and_then(pod::machine_container).map(|c| c.name.clone()).unwrap_or_default();
        self.running(&Target { pod: pod.clone(), container }).map(drop)
    }

    async fn exec(&self, target: &Target, request: ExecRequest, streams: Streams) -> Result<Exit, RuntimeError> {
        if let Some(life) = self.running_sidecar(target)? {
            return self.exec_beside(target, &life, request, streams).await;
        }
        let (view, machine) = self.running(target)?;
        let guest = Self::ready(target, &machine).await?;
        let Streams { stdin, stdout, stderr, mut resize } = streams;
        let tty = if request.tty {
            // Clients send the first size at once; a terminal without one is a standard one.
            let first = match &mut resize {
                Some(resize) => tokio::time::timeout(Duration::from_millis(50), resize.recv()).await.ok().flatten(),
                None => None,
            };
            Some(first.map_or(Winsize { cols: 80, rows: 24 }, |size| Winsize { cols: size.width, rows: size.height }))
        } else {
            None
        };
        let run = view.run.unwrap_or_default();
        let what = format!("could not run {:?} in {target}", request.command.first().map_or("", String::as_str));
        let session = guest
            .exec(Exec {
                command: request.command,
                env: run.env.clone(),
                workdir: run.workdir.clone(),
                tty,
                stdin: stdin.is_some(),
            })
            .await
            .map_err(guest_error(what.clone()))?;
        let ExecSession { stdin: input, stdout: output, stderr: errors, control } = session;
        let mut killer = KillOnDrop { control: Some(control.clone()) };
        let feed = async {
            if let (Some(mut from), Some(mut to)) = (stdin, input) {
                // The command may close its input at any time; that is its own affair.
                tokio::io::copy(&mut from, &mut to).await.ok();
                to.shutdown().await.ok();
            }
            std::future::pending::<()>().await;
        };
        let sizes = async {
            if let Some(mut sizes) = resize {
                while let Some(size) = sizes.recv().await {
                    control.resize(Winsize { cols: size.width, rows: size.height });
                }
            }
            std::future::pending::<()>().await;
        };
        let outputs = async {
            tokio::join!(drain(output, stdout), drain(errors, stderr));
            control.wait().await
        };
        let status = tokio::select! {
            status = outputs => status,
            () = feed => unreachable_wait().await,
            () = sizes => unreachable_wait().await,
        };
        killer.control = None;
        status.map(exit).map_err(guest_error(what))
    }

    async fn attach(&self, target: &Target, _request: AttachRequest, streams: Streams) -> Result<Exit, RuntimeError> {
        if let Some(life) = self.running_sidecar(target)? {
            return self.attach_beside(target, &life, streams).await;
        }
        let (view, machine) = self.running(target)?;
        let container = view.pod.as_deref().and_then(pod::machine_container);
        let has_main = view.run.as_ref().is_some_and(|run| !run.command.is_empty());
        // As the kubelet: input goes to a container that has one.
        let reads = has_main && container.is_some_and(|container| container.stdin == Some(true));
        let last = container.is_some_and(|container| container.stdin_once == Some(true));
        let Streams { stdin, stdout, stderr, .. } = streams;
        let main = machine.guest().main_process(MAIN);
        let feed = async {
            let Some(stdin) = stdin.filter(|_| reads) else { return Ok(()) };
            feed(main.input(last).await?, stdin).await
        };
        if stdout.is_none() && stderr.is_none() {
            // A caller that only writes is done when all of it has arrived.
            let given = feed.await.map_err(guest_error(format!("could not give {target} its input")));
            return given.map(|()| Exit::Code(0));
        }
        let file = self.log_file(target, false)?;
        let outputs = async {
            tokio::join!(
                follow(file.clone(), logs::Stream::Stdout, stdout),
                follow(file, logs::Stream::Stderr, stderr)
            );
        };
        let feeding = async {
            if let Err(error) = feed.await {
                tracing::info!(%target, error = error_chain(&error), "attach: the container gets no input");
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = outputs => {}
            () = feeding => {}
        }
        if has_main {
            let status = main.wait().await;
            return status.map(exit).map_err(guest_error(format!("could not learn how {target} ended")));
        }
        Ok(Exit::Code(0))
    }

    async fn logs(
        &self,
        target: &Target,
        options: LogOptions,
    ) -> Result<BoxStream<'static, io::Result<bytes::Bytes>>, RuntimeError> {
        if let Some(life) = self.sidecar(target, options.previous)? {
            let lines = sidecars::open_log(self.docker(), &life.id, options).await;
            return lines.map_err(|error| RuntimeError::Unsupported(format!("the log of {target}: {error}")));
        }
        let lines = logs::open(self.log_file(target, options.previous)?, options).await;
        let lines = lines.map_err(|error| RuntimeError::Unsupported(error_chain(&error)))?;
        Ok(lines.map_err(io::Error::other).boxed())
    }

    async fn port_forward(&self, pod: &PodRef, port: u16) -> io::Result<Box<dyn Duplex>> {
        let view = self.pod(pod).map_err(io::Error::other)?;
        if let Some(address) = beside(&view, port) {
            let stream = tokio::net::TcpStream::connect((address, port)).await?;
            return Ok(Box::new(stream));
        }
        let container =
            view.pod.as_deref().and_then(pod::machine_container).map(|c| c.name.clone()).unwrap_or_default();
        let target = Target { pod: pod.clone(), container };
        let (_, machine) = self.running(&target).map_err(io::Error::other)?;
        let guest = Self::ready(&target, &machine).await.map_err(io::Error::other)?;
        let stream =
            guest.forward(port).await.map_err(|error| io::Error::new(io::ErrorKind::ConnectionRefused, error))?;
        Ok(Box::new(stream))
    }

    async fn stats(&self) -> Result<NodeStats, RuntimeError> {
        let mut pods = Vec::new();
        for view in self.world.views() {
            let (Some(pod), Some(record), Some(machine)) = (view.pod, view.record, view.machine) else { continue };
            let Some(attempt) = record.attempt.as_ref().filter(|attempt| attempt.ended.is_none()) else { continue };
            let Ok(stats) = machine.stats().await else { continue };
            let container = pod::machine_container(&pod).map(|container| container.name.clone()).unwrap_or_default();
            let log = self.world.records.log(&record.uid, &container, attempt.number);
            let limit = machine.spec().memory.bytes();
            let mut containers = vec![MachineStats {
                container,
                started: attempt.started.unwrap_or(record.accepted),
                usage: Usage {
                    cpu_nanoseconds: u64::try_from(stats.cpu.as_nanos()).unwrap_or(u64::MAX),
                    cpu_nanocores: None,
                    memory_working_set_bytes: stats.rss,
                    memory_rss_bytes: Some(stats.rss),
                    memory_available_bytes: Some(limit.saturating_sub(stats.rss)),
                },
                rootfs: None,
                log_bytes: log.metadata().map_or(0, |meta| meta.len()),
            }];
            containers.extend(self.sidecar_stats(view.crew.as_ref()).await);
            pods.push(PodStats {
                namespace: record.namespace.clone(),
                name: record.name.clone(),
                uid: record.uid.to_string(),
                started: record.accepted,
                containers,
                network: None,
            });
        }
        let (dir, images) = (self.world.records.dir_root().to_owned(), self.world.store.dir().to_owned());
        let host = tokio::task::spawn_blocking(move || host_usage(&dir, &images))
            .await
            .map_err(|error| RuntimeError::Unsupported(format!("the host's figures could not be read: {error}")))?;
        Ok(NodeStats { pods, ..host })
    }
}

pub(crate) fn host_usage(dir: &std::path::Path, images: &std::path::Path) -> NodeStats {
    let booted = sysinfo::System::boot_time().ok().and_then(|at| Timestamp::from_second(i64::try_from(at).ok()?).ok());
    let (mut total, mut available) = (0, 0);
    if let Ok(mut system) = sysinfo::System::new() {
        system.refresh_memory();
        (total, available) = (system.total_memory(), system.available_memory());
    }
    NodeStats {
        taken: Timestamp::now(),
        booted: booted.unwrap_or(Timestamp::UNIX_EPOCH),
        node: Usage {
            cpu_nanoseconds: cpu_nanoseconds(),
            cpu_nanocores: None,
            memory_working_set_bytes: total.saturating_sub(available),
            memory_rss_bytes: None,
            memory_available_bytes: Some(available),
        },
        fs: fs_usage(dir),
        image_fs: fs_usage(images),
        pods: Vec::new(),
    }
}

/// Processor time that this host has spent working since it booted, by Linux's `/proc/stat`; zero elsewhere.
fn cpu_nanoseconds() -> u64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let numbers: Vec<u64> = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .filter_map(|number| number.parse().ok())
        .collect();
    // user, nice, system, idle, iowait, irq, softirq, steal; in hundredths of a second.
    let busy = numbers
        .iter()
        .take(8)
        .enumerate()
        .filter(|(at, _)| !matches!(at, 3 | 4))
        .map(|(_, number)| number)
        .sum::<u64>();
    busy.saturating_mul(10_000_000)
}

fn fs_usage(path: &std::path::Path) -> Option<FsUsage> {
    let stat = rustix::fs::statvfs(path).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    Some(FsUsage {
        capacity_bytes: bytes(stat.f_blocks),
        available_bytes: bytes(stat.f_bavail),
        used_bytes: bytes(stat.f_blocks.saturating_sub(stat.f_bfree)),
        inodes: stat.f_files,
        inodes_free: stat.f_ffree,
    })
}

/// A command whose caller went away is ended.
struct KillOnDrop {
    control: Option<vmpod_machine::ExecControl>,
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(control) = &self.control {
            control.signal(Signal::Hup);
            control.signal(Signal::Kill);
        }
    }
}

/// Passes a caller's input on, to its end.
async fn feed(
    mut session: ExecSession,
    mut from: Box<dyn AsyncRead + Send + Unpin>,
) -> Result<(), vmpod_machine::GuestError> {
    if let Some(mut to) = session.stdin.take() {
        // A process that ended reads no more.
        tokio::io::copy(&mut from, &mut to).await.ok();
        to.shutdown().await.ok();
    }
    session.output().await.map(drop)
}

async fn unreachable_wait() -> Result<ExitStatus, vmpod_machine::GuestError> {
    std::future::pending().await
}

/// Passes on what one output says from now on, until the attempt ends. A caller that went away drops the whole.
async fn follow(file: LogFile, stream: logs::Stream, to: Option<Box<dyn AsyncWrite + Send + Unpin>>) {
    let Some(mut to) = to else { return };
    let options = LogOptions { follow: true, tail_lines: Some(0), stream: Some(stream), ..LogOptions::default() };
    let mut lines = std::pin::pin!(logs::read(file, options));
    while let Some(Ok(bytes)) = lines.next().await {
        if to.write_all(&bytes).await.is_err() || to.flush().await.is_err() {
            return;
        }
    }
    to.shutdown().await.ok();
}

/// Passes bytes on until they end. A reader that goes away must not stop the command, so the rest is read and dropped.
async fn drain(mut from: vmpod_machine::guest::BoxRead, to: Option<Box<dyn AsyncWrite + Send + Unpin>>) {
    let mut to = to;
    let mut buffer = vec![0; 32 * 1024];
    loop {
        let read = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(read) => read,
        };
        if let Some(sink) = &mut to
            && (sink.write_all(&buffer[..read]).await.is_err() || sink.flush().await.is_err())
        {
            to = None;
        }
    }
    if let Some(sink) = &mut to {
        sink.shutdown().await.ok();
    }
}
