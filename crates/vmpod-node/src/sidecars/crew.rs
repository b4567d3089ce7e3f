//! Does what the plan for the containers beside a machine says: one task per pod, woken by the engine's events.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, OnceLock},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::{Mutex, broadcast, mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use super::{Act, Health, SANDBOX, Seen, Trouble, View, Wish, members, open_log, plan, view};
use crate::{
    action::Where,
    backoff::Backoff,
    docker::{Docker, Life, LifeState, Network},
    events::Kind,
    last_words,
    pod::{self, PodUid, RestartPolicy},
    probe::{Failed, Purpose},
    prober::Prober,
    status,
    volumes::{self, Contents},
    worker::{CALLED_BACKOFF, sleep_until},
    world::World,
};

/// How long the engine is left alone when it doesn't answer, unless it is heard of before.
const AWAY: SignedDuration = SignedDuration::from_secs(10);

/// The engine, as the containers of all pods share it. Nobody asks it anything until a pod has a container beside its machine.
#[derive(Clone)]
pub(crate) struct Engine {
    docker: Docker,
    knocks: broadcast::Sender<Option<PodUid>>,
    follower: Arc<OnceLock<AbortOnDropHandle<()>>>,
}

impl Engine {
    pub(crate) fn new(docker: Docker) -> Self {
        Self { docker, knocks: broadcast::channel(256).0, follower: Arc::default() }
    }

    pub(crate) fn docker(&self) -> &Docker {
        &self.docker
    }

    /// Why a pod that needs the engine has no chance here; none if there may be one.
    pub(crate) fn missing(&self) -> Option<String> {
        if self.docker.host().is_empty() {
            return Some("the Docker API is turned off here".to_owned());
        }
        let socket = self.docker.socket()?;
        (!socket.exists()).then(|| {
            format!(
                "there is no Docker API at {}: install Docker (docker.io) or name its socket with --docker-host",
                self.docker.host()
            )
        })
    }

    /// The UIDs of pods whose containers changed; none when any may have.
    fn knocks(&self) -> broadcast::Receiver<Option<PodUid>> {
        let receiver = self.knocks.subscribe();
        self.follower.get_or_init(|| {
            let (docker, knocks) = (self.docker.clone(), self.knocks.clone());
            AbortOnDropHandle::new(tokio::spawn(async move {
                loop {
                    follow(&docker, &knocks).await;
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }))
        });
        receiver
    }
}

/// Passes events on until the engine goes away.
async fn follow(docker: &Docker, knocks: &broadcast::Sender<Option<PodUid>>) {
    use futures::StreamExt as _;
    let events = match docker.events().await {
        Ok(events) => events,
        Err(error) => return tracing::debug!(%error, "the Docker API's events can't be followed"),
    };
    let mut events = std::pin::pin!(events);
    // Whatever happened before, nobody heard of it. That nobody listens is no error.
    knocks.send(None).ok();
    while let Some(event) = events.next().await {
        match event {
            Ok(uid) => drop(knocks.send(Some(uid))),
            Err(error) => return tracing::debug!(%error, "the Docker API's events ended"),
        }
    }
}

/// The containers beside one pod's machine. Its end ends the work, and no container.
pub(crate) struct Crew {
    wish: watch::Sender<Wish>,
    view: watch::Receiver<View>,
    _task: AbortOnDropHandle<()>,
}

impl Crew {
    pub(crate) fn start(world: &Arc<World>, engine: &Engine, uid: &PodUid, wish: Wish) -> Self {
        let (wish, wishes) = watch::channel(wish);
        let (views, view) = watch::channel(View::default());
        let (send, inputs) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            world: Arc::clone(world),
            docker: engine.docker().clone(),
            uid: uid.clone(),
            contents: Mutex::new(Contents::new(world.client.clone())),
            send,
        });
        let actor = Actor {
            shared,
            wish: wishes,
            views,
            knocks: engine.knocks(),
            inputs,
            seen: Seen::default(),
            network: None,
            known: false,
            gone: false,
            stale: true,
            retry: None,
            failures: HashMap::new(),
            jobs: HashMap::new(),
            stops: HashMap::new(),
            watched: HashMap::new(),
            hooks: HashMap::new(),
            refreshing: None,
            counted: HashSet::new(),
            born: Timestamp::now(),
        };
        Self { wish, view, _task: AbortOnDropHandle::new(tokio::spawn(actor.run())) }
    }

    pub(crate) fn wish(&self, wanted: Wish) {
        self.wish.send_if_modified(|wish| {
            let same_pod = match (&wish.pod, &wanted.pod) {
                (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                (None, None) => true,
                _ => false,
            };
            let told = |wish: &Wish| (wish.machine, wish.answers, wish.stop, wish.over);
            let same = same_pod && told(wish) == told(&wanted);
            if !same {
                *wish = wanted;
            }
            !same
        });
    }

    pub(crate) fn view(&self) -> &watch::Receiver<View> {
        &self.view
    }
}

/// What the jobs need.
pub(super) struct Shared {
    pub(super) world: Arc<World>,
    pub(super) docker: Docker,
    pub(super) uid: PodUid,
    pub(super) contents: Mutex<Contents>,
    pub(super) send: mpsc::UnboundedSender<Input>,
}

/// Something that happened beside the actor.
pub(super) enum Input {
    Done(String, Result<(), Failure>),
    /// The postStart hook of a life is over.
    Hooked(String, Result<(), String>),
    /// A probe changed its mind.
    Probed,
    /// Files of volumes are due to be looked at again.
    Refresh,
}

/// What a container waits for while its volumes can't be had, as the kubelet's do.
pub(super) const MOUNTING: &str = "ContainerCreating";

pub(super) struct Failure {
    reason: String,
    message: String,
}

impl Failure {
    pub(super) fn new(reason: &str, message: impl Into<String>) -> Self {
        Self { reason: reason.to_owned(), message: message.into() }
    }
}

struct Actor {
    shared: Arc<Shared>,
    wish: watch::Receiver<Wish>,
    views: watch::Sender<View>,
    knocks: broadcast::Receiver<Option<PodUid>>,
    inputs: mpsc::UnboundedReceiver<Input>,
    seen: Seen,
    network: Option<Network>,
    known: bool,
    gone: bool,
    /// The engine must be asked before anything is decided.
    stale: bool,
    /// The engine didn't answer, and is asked again then.
    retry: Option<Timestamp>,
    failures: HashMap<String, (Backoff, Timestamp)>,
    jobs: HashMap<String, AbortOnDropHandle<()>>,
    stops: HashMap<String, AbortOnDropHandle<()>>,
    /// The probes of running lives, by container.
    watched: HashMap<String, (String, Option<Prober>)>,
    /// How the postStart hooks of lives went.
    hooks: HashMap<String, Result<(), String>>,
    /// The files of volumes are being brought up to date.
    refreshing: Option<AbortOnDropHandle<()>>,
    /// Lives whose end has been counted.
    counted: HashSet<String>,
    /// What ran before this agent has had its hooks.
    born: Timestamp,
}

impl Actor {
    async fn run(mut self) {
        let mut refresh: Option<AbortOnDropHandle<()>> = None;
        loop {
            let wish = self.wish.borrow_and_update().clone();
            let now = Timestamp::now();
            if wish.pod.is_none() || (wish.stop.is_some() && !wish.over) {
                // Nothing is begun any more; what was begun shows at the next look.
                self.stale |= !self.jobs.is_empty();
                self.jobs.clear();
                self.seen.busy.clear();
            }
            let mut wake = None;
            match &wish.pod {
                None => {
                    self.stops.clear();
                    wake = self.disband(now).await;
                }
                Some(pod) => {
                    if self.stale && self.retry.is_none_or(|at| at <= now) {
                        self.look(pod, &wish, now).await;
                    }
                    if !self.stale {
                        self.attend(pod);
                        self.call_backoff(pod, now);
                        let next = plan(pod, &wish, &self.seen, now);
                        wake = next.wake;
                        for act in next.acts {
                            self.apply(act, pod, now);
                        }
                        if refresh.is_none() && wish.machine != super::MachineWord::Over {
                            refresh = Some(self.refresher());
                        }
                    }
                    self.publish(pod, &wish, now);
                }
            }
            let retry = self.retry.filter(|_| self.stale);
            let called = self.seen.trouble.iter().filter(|(_, trouble)| trouble.reason == "ErrImagePull");
            let called = called.filter_map(|(name, _)| Some(self.failures.get(name)?.1 + CALLED_BACKOFF)).min();
            let wake = [wake, retry, called.filter(|at| *at > now)].into_iter().flatten().min();
            tokio::select! {
                input = self.inputs.recv() => match input {
                    Some(input) => self.take(input, &wish, now),
                    None => return,
                },
                changed = self.wish.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                knock = self.knocks.recv() => {
                    let mine = |uid: &PodUid| *uid == self.shared.uid;
                    match knock {
                        Ok(Some(uid)) if !mine(&uid) => {}
                        // The engine is back, or too much happened to be told of.
                        Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {
                            self.stale = true;
                            self.retry = self.retry.map(|_| now);
                        }
                        Err(broadcast::error::RecvError::Closed) => return,
                    }
                }
                () = sleep_until(wake) => {}
            }
        }
    }

    fn publish(&mut self, pod: &Pod, wish: &Wish, now: Timestamp) {
        let mut shown = view(pod, wish, &self.seen, now);
        shown.known = self.known;
        shown.company.address = self.network.as_ref().filter(|_| self.seen.held).map(|network| network.gateway);
        shown.company.quiet &= self.known && !self.stale;
        shown.containers = self.network.as_ref().and_then(|network| network.containers);
        self.views.send_if_modified(|view| {
            let changed = *view != shown;
            if changed {
                *view = shown;
            }
            changed
        });
    }

    /// Asks the engine what there is.
    async fn look(&mut self, pod: &Arc<Pod>, wish: &Wish, now: Timestamp) {
        let inventory = match self.shared.docker.inventory(&self.shared.uid).await {
            Ok(inventory) => inventory,
            Err(error) => {
                // What isn't known may be there: nothing is decided until it is.
                tracing::info!(pod = %self.shared.uid, %error, "the pod's containers can't be looked at");
                let (reason, message) = ("FailedCreatePodSandBox".to_owned(), error.to_string());
                if self.retry.is_none() {
                    self.shared.world.events.pod(pod, Kind::Warning, "FailedCreatePodSandBox", message.clone());
                }
                let retry = now.saturating_add(AWAY).unwrap_or(now);
                self.seen.trouble.insert(SANDBOX.to_owned(), Trouble { reason, message, retry });
                self.retry = Some(retry);
                return;
            }
        };
        (self.stale, self.retry) = (false, None);
        if !self.known {
            self.known = true;
            self.seen.trouble.remove(SANDBOX);
        }
        self.seen.sandbox = inventory.network.is_some() || inventory.holder.is_some();
        self.seen.held = inventory.network.is_some() && inventory.holder.as_ref().is_some_and(|(_, runs)| *runs);
        self.network = inventory.network;
        self.seen.lives = inventory.lives;
        self.hear_last_words(pod).await;
        let running: HashMap<&String, &Life> = (self.seen.lives.iter())
            .filter_map(|(name, lives)| Some((name, lives.last()?)))
            .filter(|(_, life)| matches!(life.state, LifeState::Running(_)))
            .collect();
        self.stops.retain(|name, _| running.contains_key(name));
        self.seen.stopping.retain(|name, _| running.contains_key(name));
        self.watched.retain(|name, (id, _)| running.get(name).is_some_and(|life| life.id == *id));
        self.seen.health.retain(|name, _| running.contains_key(name));
        for (name, life) in self.seen.lives.iter().filter_map(|(name, lives)| Some((name, lives.last()?))) {
            let LifeState::Ended(end) = &life.state else { continue };
            if !self.counted.insert(life.id.clone()) {
                continue;
            }
            let backoff = self.seen.backoff.entry(name.clone()).or_default();
            backoff.fail(end.finished, end.started.unwrap_or(end.finished));
            let again = members(pod).into_iter().find(|member| member.container.name == *name);
            let again = again.is_some_and(|member| member.restarts(RestartPolicy::of(pod), end.code));
            if again && wish.stop.is_none() {
                let text = format!(
                    "Back-off restarting failed container {name} in pod {}_{}({})",
                    pod::name(pod),
                    pod::namespace(pod),
                    self.shared.uid
                );
                self.shared.world.events.of(pod, name, Kind::Warning, "BackOff", text);
            }
        }
        let known: HashSet<&String> = self.seen.lives.values().flatten().map(|life| &life.id).collect();
        self.counted.retain(|id| known.contains(id));
        self.hooks.retain(|id, _| known.contains(id));
    }

    /// What those that ended left to say.
    async fn hear_last_words(&mut self, pod: &Pod) {
        let talkers: HashSet<String> = members(pod)
            .into_iter()
            .filter(|member| last_words::falls_back(member.container))
            .map(|member| member.container.name.clone())
            .collect();
        // Each with whether its log will do.
        let mut silent = Vec::new();
        for (name, lives) in &self.seen.lives {
            for life in lives {
                let LifeState::Ended(end) = &life.state else { continue };
                if end.why.is_none() {
                    let file = self.shared.world.records.last_words(&self.shared.uid, name, life.attempt);
                    silent.push((life.id.clone(), file, end.code != 0 && talkers.contains(name)));
                }
            }
        }
        if silent.is_empty() {
            return;
        }
        let files: Vec<_> = silent.iter().map(|(id, file, _)| (id.clone(), file.clone())).collect();
        let read = move || -> HashMap<String, String> {
            files.into_iter().filter_map(|(id, file)| Some((id, last_words::of_file(&file)?))).collect()
        };
        let mut said = tokio::task::spawn_blocking(read).await.unwrap_or_default();
        for (id, file, _) in silent.into_iter().filter(|(_, _, by_log)| *by_log) {
            if !said.contains_key(&id)
                && let Ok(log) = open_log(&self.shared.docker, &id, last_words::of_a_log()).await
                && let Some(text) = last_words::of_lines(log).await
            {
                // As if the container had written it: then the engine isn't asked at the next look.
                tokio::fs::write(&file, &text).await.ok();
                said.insert(id, text);
            }
        }
        for life in self.seen.lives.values_mut().flatten() {
            if let (LifeState::Ended(end), Some(text)) = (&mut life.state, said.remove(&life.id)) {
                end.why = Some(text);
            }
        }
    }

    /// Sees to the health of what runs.
    fn attend(&mut self, pod: &Arc<Pod>) {
        for member in members(pod) {
            let container = member.container;
            let name = &container.name;
            let Some(life) = self.seen.lives.get(name).and_then(|lives| lives.last()).cloned() else { continue };
            let LifeState::Running(since) = life.state else { continue };
            let shown = status::shown(pod, name, &format!("docker://{}", life.id));
            let hook = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.post_start.as_ref());
            let hooked = match (hook, self.hooks.get(&life.id)) {
                (None, _) | (Some(_), Some(Ok(()))) => Ok(true),
                (Some(_), Some(Err(_))) => Err(Failed { what: "postStart hook".to_owned(), grace: None }),
                (Some(_), None) => Ok(since < self.born),
            };
            let health = match hooked {
                Err(failed) => Health { failed: Some(failed), ..Health::default() },
                Ok(false) => Health::default(),
                Ok(true) => {
                    let watched = self.watched.entry(name.clone());
                    let (_, prober) = watched.or_insert_with(|| {
                        let prober = Purpose::any(container).then(|| {
                            let address = self.network.as_ref().and_then(|network| network.containers);
                            let at =
                                Where::Container { docker: self.shared.docker.clone(), id: life.id.clone(), address };
                            self.shared.prober(pod, container, at, since, shown)
                        });
                        (life.id.clone(), prober)
                    });
                    match prober {
                        None => Health { started: true, ready: true, failed: None },
                        Some(prober) => {
                            let verdict = prober.verdict().borrow().clone();
                            Health { started: verdict.started, ready: verdict.ready, failed: verdict.failed }
                        }
                    }
                }
            };
            self.seen.health.insert(name.clone(), health);
        }
    }

    /// A pull that failed a moment ago is a pull that waits.
    fn call_backoff(&mut self, pod: &Pod, now: Timestamp) {
        for (name, trouble) in &mut self.seen.trouble {
            let Some((_, since)) = self.failures.get(name) else { continue };
            if trouble.reason == "ErrImagePull" && now >= *since + CALLED_BACKOFF {
                let image = members(pod).into_iter().find(|member| member.container.name == *name);
                let image = image.and_then(|member| member.container.image.clone()).unwrap_or_default();
                "ImagePullBackOff".clone_into(&mut trouble.reason);
                trouble.message = format!("Back-off pulling image {image:?}: ErrImagePull: {}", trouble.message);
                let events = &self.shared.world.events;
                events.of(pod, name, Kind::Normal, "BackOff", format!("Back-off pulling image {image:?}"));
                events.of(pod, name, Kind::Warning, "Failed", "Error: ImagePullBackOff");
            }
        }
    }

    fn apply(&mut self, act: Act, pod: &Arc<Pod>, now: Timestamp) {
        tracing::debug!(pod = %self.shared.uid, ?act, "sidecars");
        let (shared, pod) = (Arc::clone(&self.shared), Arc::clone(pod));
        match act {
            Act::Sandbox => self.job(SANDBOX, async move { shared.sandbox(&pod).await }),
            Act::Leave => self.job(SANDBOX, async move { shared.leave().await }),
            Act::Run { name, attempt } => {
                let Some(network) = self.network.clone() else { return };
                let container = members(&pod).into_iter().find(|member| member.container.name == name);
                let Some(container) = container.map(|member| member.container.clone()) else { return };
                self.job(&name, async move { shared.run(&pod, &container, attempt, &network).await });
            }
            Act::Stop { name, id, deadline } => {
                let Some(life) = self.seen.lives.get(&name).and_then(|lives| lives.last()).cloned() else { return };
                if life.id != id {
                    return;
                }
                let container = members(&pod).into_iter().find(|member| member.container.name == name);
                let Some(container) = container.map(|member| member.container.clone()) else { return };
                if !self.seen.stopping.contains_key(&name) {
                    let failed = self.seen.health.get(&name).and_then(|health| health.failed.clone());
                    let text = match failed {
                        None => format!("Stopping container {name}"),
                        Some(failed) => format!("Container {name} failed {}, will be restarted", failed.what),
                    };
                    shared.world.events.of(&pod, &name, Kind::Normal, "Killing", text);
                }
                self.seen.stopping.insert(name.clone(), deadline);
                let address = self.network.as_ref().and_then(|network| network.containers);
                let grace = Duration::try_from(deadline.duration_since(now)).unwrap_or_default();
                let stop = async move { shared.stop(&pod, &container, &life, address, grace).await };
                self.stops.insert(name, AbortOnDropHandle::new(tokio::spawn(stop)));
            }
            Act::Clear { id } => {
                for lives in self.seen.lives.values_mut() {
                    lives.retain(|life| life.id != id);
                }
                tokio::spawn(async move {
                    if let Err(error) = shared.docker.remove(&id).await {
                        tracing::debug!(pod = %shared.uid, %error, "a container that is long over can't be removed");
                    }
                });
            }
        }
    }

    fn job(&mut self, name: &str, work: impl Future<Output = Result<(), Failure>> + Send + 'static) {
        self.seen.busy.insert(name.to_owned());
        let (send, named) = (self.shared.send.clone(), name.to_owned());
        let job = tokio::spawn(async move {
            let result = work.await;
            // Nobody listens any more: the pod's worker is over.
            send.send(Input::Done(named, result)).ok();
        });
        self.jobs.insert(name.to_owned(), AbortOnDropHandle::new(job));
    }

    fn take(&mut self, input: Input, wish: &Wish, now: Timestamp) {
        match input {
            Input::Done(name, result) => {
                if self.jobs.remove(&name).is_none() {
                    return;
                }
                self.seen.busy.remove(&name);
                self.stale = true;
                match result {
                    Ok(()) => {
                        self.seen.trouble.remove(&name);
                        self.failures.remove(&name);
                    }
                    Err(failure) => self.failed(&name, failure, wish, now),
                }
            }
            Input::Hooked(id, result) => {
                self.hooks.insert(id, result);
            }
            Input::Probed => {}
            Input::Refresh => self.refresh(wish),
        }
    }

    fn failed(&mut self, name: &str, failure: Failure, wish: &Wish, now: Timestamp) {
        let Failure { reason, message } = failure;
        let (backoff, since) = self.failures.entry(name.to_owned()).or_default();
        backoff.fail(now, backoff.until().unwrap_or(now));
        *since = now;
        // Pulls wait as long as the kubelet's; what happens on this host is tried sooner.
        let pull = matches!(reason.as_str(), "ErrImagePull" | "ErrImageNeverPull");
        let wait = if pull { backoff.wait() } else { backoff.wait() / 10 };
        tracing::info!(pod = %self.shared.uid, container = name, reason, message, "failed; trying again in {wait:#}");
        // A pull's and a mount's events were told where they failed.
        if let (Some(pod), false) = (&wish.pod, pull || reason == MOUNTING) {
            let events = &self.shared.world.events;
            if name == SANDBOX {
                events.pod(pod, Kind::Warning, "FailedCreatePodSandBox", message.clone());
            } else {
                events.of(pod, name, Kind::Warning, "Failed", format!("Error: {message}"));
            }
        }
        let retry = now.saturating_add(wait).unwrap_or(Timestamp::MAX);
        self.seen.trouble.insert(name.to_owned(), Trouble { reason, message, retry });
    }

    /// Removes everything, and says so once nothing is left.
    async fn disband(&mut self, now: Timestamp) -> Option<Timestamp> {
        if self.gone || self.retry.is_some_and(|at| at > now) {
            return self.retry.filter(|_| !self.gone);
        }
        match self.shared.docker.disband(&self.shared.uid).await {
            Ok(()) => {
                self.gone = true;
                self.views.send_modify(|view| {
                    view.company.gone = true;
                    view.company.quiet = true;
                });
                None
            }
            Err(error) => {
                tracing::warn!(pod = %self.shared.uid, %error, "the pod's containers can't be removed; trying again");
                self.retry = Some(now.saturating_add(AWAY).unwrap_or(now));
                self.retry
            }
        }
    }

    /// Says now and then that files of volumes may have changed.
    fn refresher(&self) -> AbortOnDropHandle<()> {
        let send = self.shared.send.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            // At once, for what runs since before this agent.
            while send.send(Input::Refresh).is_ok() {
                tokio::time::sleep(volumes::REFRESH).await;
            }
        }))
    }

    /// Brings the files of volumes up to date that a running container sees, beside the actor: the API may be slow.
    fn refresh(&mut self, wish: &Wish) {
        let (Some(pod), Some(network)) = (wish.pod.clone(), self.network.clone()) else { return };
        let running: HashSet<String> = self.seen.health.keys().cloned().collect();
        let shared = Arc::clone(&self.shared);
        self.refreshing = Some(AbortOnDropHandle::new(tokio::spawn(async move {
            for member in members(&pod) {
                let container = member.container;
                let mounts = container.volume_mounts.as_ref().is_some_and(|mounts| !mounts.is_empty());
                if !mounts || !running.contains(&container.name) {
                    continue;
                }
                if let Err(message) = shared.files(&pod, container, &network, &[]).await {
                    shared.world.events.of(&pod, &container.name, Kind::Warning, "FailedMount", message);
                }
            }
        })));
    }
}
