//! When the host runs short of memory or disk: what the Node tells, which pods are taken no more, and which is ended first. As the
//! kubelet's node-pressure eviction (<https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction/>). The first
//! part is pure.

use std::{cmp::Reverse, fmt, path::Path, str::FromStr, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, Pod};
use tokio::sync::watch;
use vmpod_image::Prune;

use crate::{
    agent::{Agent, host_usage},
    error_chain,
    events::Kind,
    pod::{self, PodUid, Requests},
    quantity::Nanos,
    server::{FsUsage, NodeStats},
    world::{View, World},
};

/// How often the host is looked at, as by the kubelet: how much is left nobody tells.
const PERIOD: Duration = Duration::from_secs(10);
/// Pods of this priority and above are never evicted (`SystemCriticalPriority`).
const CRITICAL: i32 = 2_000_000_000;

/// What is looked at, by the kubelet's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Signal {
    /// `memory.available`: memory that the host can still give.
    Memory,
    /// `nodefs.available`: room where the agent keeps machines and logs.
    NodeFs,
    /// `nodefs.inodesFree`: files that can still be made there.
    NodeInodes,
    /// `imagefs.available`: room where images are.
    ImageFs,
}

impl Signal {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Memory, "memory.available"),
        (Self::NodeFs, "nodefs.available"),
        (Self::NodeInodes, "nodefs.inodesFree"),
        (Self::ImageFs, "imagefs.available"),
    ];

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(signal, _)| *signal == self).map_or("", |(_, name)| name)
    }

    /// What runs short, in the words of an eviction's message.
    fn resource(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::NodeInodes => "inodes",
            Self::NodeFs | Self::ImageFs => "ephemeral-storage",
        }
    }
}

/// A threshold's amount.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Amount {
    /// Bytes, or files.
    Units(u64),
    /// Of the whole, and at most so many.
    Percent(f64, u64),
}

/// Below this, a signal is pressure.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Mark {
    signal: Signal,
    below: Amount,
}

/// When the node is under pressure.
#[derive(Clone, Debug, PartialEq)]
pub struct Eviction {
    marks: Vec<Mark>,
    /// How long a pressure is told after it was last seen: a node that goes back and forth takes pods in vain.
    pub transition: Duration,
}

impl Default for Eviction {
    /// The kubelet's own, which on large disks would be more than anybody needs: there they end at 10 and 15 GiB.
    fn default() -> Self {
        let mark = |signal, below| Mark { signal, below };
        Self {
            marks: vec![
                mark(Signal::Memory, Amount::Units(100 << 20)),
                mark(Signal::NodeFs, Amount::Percent(10.0, 10 << 30)),
                mark(Signal::NodeInodes, Amount::Percent(5.0, u64::MAX)),
                mark(Signal::ImageFs, Amount::Percent(15.0, 15 << 30)),
            ],
            transition: Duration::from_mins(5),
        }
    }
}

impl Eviction {
    /// Without any threshold.
    #[must_use]
    pub fn none() -> Self {
        Self { marks: Vec::new(), ..Self::default() }
    }

    /// With another time for which a pressure is told after it was last seen.
    #[must_use]
    pub fn with_transition(self, transition: Duration) -> Self {
        Self { transition, ..self }
    }
}

/// Why a text names no thresholds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no threshold: SIGNAL<AMOUNT is wanted, such as memory.available<500Mi or nodefs.available<10%; the signals are memory.available, nodefs.available, nodefs.inodesFree and imagefs.available"
)]
pub struct BadThreshold(String);

impl FromStr for Eviction {
    type Err = BadThreshold;

    /// The kubelet's `--eviction-hard`: `SIGNAL<AMOUNT,…`; an empty text is no threshold at all. Beyond the kubelet's, `10%|10Gi` is the
    /// lesser of the two.
    fn from_str(text: &str) -> Result<Self, BadThreshold> {
        let mut marks = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let bad = || BadThreshold(part.to_owned());
            let (name, amount) = part.split_once('<').ok_or_else(bad)?;
            let signal = Signal::ALL.iter().find(|(_, known)| *known == name.trim()).ok_or_else(bad)?.0;
            let units = |text: &str| Nanos::parse(text.trim()).map(Nanos::units_up).map_err(|_| bad());
            let (share, most) = match amount.split_once('|') {
                Some((share, most)) => (share, units(most)?),
                None => (amount, u64::MAX),
            };
            let below = match share.trim().strip_suffix('%') {
                Some(percent) => {
                    let percent: f64 = percent.parse().map_err(|_| bad())?;
                    if !(0.0..=100.0).contains(&percent) {
                        return Err(bad());
                    }
                    Amount::Percent(percent, most)
                }
                None if most < u64::MAX => return Err(bad()),
                None => Amount::Units(units(share)?),
            };
            marks.push(Mark { signal, below });
        }
        Ok(Self { marks, ..Self::default() })
    }
}

/// What of the host is left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Left {
    /// Available and in all; none if the host doesn't tell.
    memory: Option<(u64, u64)>,
    node: Option<FsUsage>,
    images: Option<FsUsage>,
}

impl Left {
    fn of(stats: &NodeStats) -> Self {
        let memory = stats.node.memory_available_bytes.filter(|_| stats.node.memory_working_set_bytes > 0);
        let memory = memory.map(|available| (available, available.saturating_add(stats.node.memory_working_set_bytes)));
        Self { memory, node: stats.fs, images: stats.image_fs }
    }

    fn of_signal(&self, signal: Signal) -> Option<(u64, u64)> {
        match signal {
            Signal::Memory => self.memory,
            Signal::NodeFs => self.node.map(|fs| (fs.available_bytes, fs.capacity_bytes)),
            // A file system without a number of files has no end of them.
            Signal::NodeInodes => self.node.filter(|fs| fs.inodes > 0).map(|fs| (fs.inodes_free, fs.inodes)),
            Signal::ImageFs => self.images.map(|fs| (fs.available_bytes, fs.capacity_bytes)),
        }
    }
}

/// A threshold that was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Short {
    signal: Signal,
    /// The threshold, in units.
    below: u64,
    available: u64,
}

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let amount = |units: u64| match self.signal {
            Signal::NodeInodes => units.to_string(),
            _ => format!("{}Ki", units >> 10),
        };
        write!(
            f,
            "The node was low on resource: {}. Threshold quantity: {}, available: {}. ",
            self.signal.resource(),
            amount(self.below),
            amount(self.available)
        )
    }
}

impl Eviction {
    fn short(&self, left: &Left) -> Vec<Short> {
        let met = |mark: &Mark| {
            let (available, all) = left.of_signal(mark.signal)?;
            let below = match mark.below {
                Amount::Units(units) => units,
                #[expect(
                    clippy::cast_precision_loss,
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a share of a size, as near as a threshold needs it"
                )]
                Amount::Percent(percent, most) => ((all as f64 * percent / 100.0) as u64).min(most),
            };
            (available < below).then_some(Short { signal: mark.signal, below, available })
        };
        self.marks.iter().filter_map(met).collect()
    }
}

/// What the Node tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pressure {
    pub(crate) memory: bool,
    pub(crate) disk: bool,
}

/// When each pressure was last seen.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    memory: Option<Timestamp>,
    disk: Option<Timestamp>,
}

impl Seen {
    /// Takes note of a look, and says what is to be told.
    fn step(&mut self, short: &[Short], transition: Duration, now: Timestamp) -> Pressure {
        if short.iter().any(|short| short.signal == Signal::Memory) {
            self.memory = Some(now);
        }
        if short.iter().any(|short| short.signal != Signal::Memory) {
            self.disk = Some(now);
        }
        let transition = SignedDuration::try_from(transition).unwrap_or(SignedDuration::MAX);
        let lasts = |at: Option<Timestamp>| {
            // A clock that was set back ends no pressure.
            at.is_some_and(|at| now <= at || now.duration_since(at) < transition)
        };
        Pressure { memory: lasts(self.memory), disk: lasts(self.disk) }
    }
}

/// A pod that may be ended.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate {
    uid: PodUid,
    container: String,
    priority: i32,
    used: u64,
    asked: u64,
}

/// Who goes first, by the kubelet's order: who uses more than it asked for, then the lowest priority, then who uses most beyond what it
/// asked for.
fn victim(candidates: Vec<Candidate>) -> Option<Candidate> {
    candidates.into_iter().filter(|pod| pod.priority < CRITICAL).max_by_key(|pod| {
        let beyond = i128::from(pod.used) - i128::from(pod.asked);
        (pod.used > pod.asked, Reverse(pod.priority), beyond, Reverse(pod.uid.clone()))
    })
}

/// The message of an eviction.
fn message(short: &Short, victim: &Candidate) -> String {
    let mut text = short.to_string();
    if victim.used > victim.asked {
        let (used, asked) = (victim.used >> 10, victim.asked >> 10);
        let resource = short.signal.resource();
        let container = &victim.container;
        text = format!(
            "{text}Container {container} was using {used}Ki, request is {asked}Ki, has larger consumption of {resource}. "
        );
    }
    text
}

/// Why a node under pressure doesn't take a pod, as the kubelet: short of memory, it takes those that said how much they need.
pub(crate) fn refusal(pod: &Pod, pressure: Pressure) -> Option<String> {
    if pod::spec(pod).and_then(|spec| spec.priority).unwrap_or(0) >= CRITICAL {
        return None;
    }
    let condition = match pressure {
        Pressure { disk: true, .. } => "DiskPressure",
        Pressure { memory: true, .. } if Requests::of(pod) == Requests::default() => "MemoryPressure",
        _ => return None,
    };
    Some(format!("The node had condition: [{condition}]. "))
}

/// Looks for ever. `told` has what the Node is to tell.
pub(crate) async fn keep(world: Arc<World>, eviction: Eviction, node: Node, told: watch::Sender<Pressure>) {
    let mut seen = Seen::default();
    let mut leaving: Option<PodUid> = None;
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let mut short = eviction.short(&look(&world).await);
        if short.iter().any(|short| short.signal != Signal::Memory) {
            // What nobody uses goes before what somebody does.
            reclaim(&world).await;
            short = eviction.short(&look(&world).await);
        }
        let pressure = seen.step(&short, eviction.transition, Timestamp::now());
        let before = *told.borrow();
        if before != pressure {
            told.send_replace(pressure);
            tell(&world, &node, before, pressure);
        }
        world.ledger.set_pressure(pressure);
        let Some(worst) = short.first() else { continue };
        if leaving.as_ref().is_some_and(|uid| still_runs(&world, uid)) {
            // What it used is free when it is gone: one at a time.
            continue;
        }
        let text = format!("Attempting to reclaim {}", worst.signal.resource());
        world.events.node(&node, Kind::Warning, "EvictionThresholdMet", text);
        leaving = match victim(candidates(&world, worst.signal).await) {
            None => None,
            Some(victim) => {
                let text = message(worst, &victim);
                tracing::warn!(pod = %victim.uid, threshold = worst.signal.name(), "a pod is evicted: {text}");
                if let Some(handle) = world.pods().get(&victim.uid) {
                    handle.wanted.send_modify(|wanted| wanted.evicted = Some(text));
                }
                Some(victim.uid)
            }
        };
    }
}

async fn look(world: &World) -> Left {
    let (dir, images) = (world.records.dir_root().to_owned(), world.store.dir().to_owned());
    // A look that failed saw nothing: no pod is ended for it.
    tokio::task::spawn_blocking(move || Left::of(&host_usage(&dir, &images))).await.unwrap_or_default()
}

/// Removes the images that nobody uses.
async fn reclaim(world: &World) {
    let store = world.store.clone();
    let all = Prune { down_to: Some(0), ..Prune::default() };
    match tokio::task::spawn_blocking(move || store.prune(all)).await {
        Ok(Ok(pruned)) if pruned.bytes > 0 => {
            tracing::info!(bytes = pruned.bytes, "removed images that nobody uses, because the disk is nearly full");
        }
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::warn!(error = error_chain(&error), "images can't be removed to make room"),
        Err(error) => tracing::warn!(%error, "removing images to make room failed"),
    }
}

fn tell(world: &World, node: &Node, before: Pressure, now: Pressure) {
    let name = &world.name;
    let say = |reason: &'static str| {
        world.events.node(node, Kind::Normal, reason, format!("Node {name} status is now: {reason}"));
    };
    match (before.memory, now.memory) {
        (false, true) => say("NodeHasInsufficientMemory"),
        (true, false) => say("NodeHasSufficientMemory"),
        _ => {}
    }
    match (before.disk, now.disk) {
        (false, true) => say("NodeHasDiskPressure"),
        (true, false) => say("NodeHasNoDiskPressure"),
        _ => {}
    }
}

fn still_runs(world: &World, uid: &PodUid) -> bool {
    world.pods().get(uid).is_some_and(|handle| !handle.view.borrow().quiet)
}

/// The pods that could go, with what they use of what runs short.
async fn candidates(world: &Arc<World>, signal: Signal) -> Vec<Candidate> {
    let agent = Agent { world: Arc::clone(world) };
    let mut all = Vec::new();
    for view in world.views() {
        let (Some(pod), Some(record)) = (&view.pod, &view.record) else { continue };
        if record.terminal.is_some() || record.stop.is_some() {
            continue;
        }
        let asked = Requests::of(pod);
        let (used, asked) = match signal {
            Signal::Memory => (memory(&agent, &view).await, asked.memory),
            Signal::NodeFs | Signal::NodeInodes | Signal::ImageFs => (disk(world, &view).await, asked.ephemeral),
        };
        let container = pod::machine_container(pod).map(|container| container.name.clone()).unwrap_or_default();
        let priority = pod::spec(pod).and_then(|spec| spec.priority).unwrap_or(0);
        all.push(Candidate { uid: record.uid.clone(), container, priority, used, asked });
    }
    all
}

async fn memory(agent: &Agent, view: &View) -> u64 {
    let machine = match &view.machine {
        Some(machine) => machine.stats().await.map_or(0, |stats| stats.rss),
        None => 0,
    };
    let sidecars = agent.sidecar_stats(view.crew.as_ref()).await;
    sidecars.iter().map(|one| one.usage.memory_working_set_bytes).fold(machine, u64::saturating_add)
}

/// Bytes of the pod's machine, its logs and what its containers share with it.
async fn disk(world: &World, view: &View) -> u64 {
    let machine = view.machine.as_ref().and_then(|machine| world.machines.directory(machine.id()).ok());
    let machine = machine.map(|dir| dir.path().to_owned());
    let record = view.record.as_ref().map(|record| world.records.dir(&record.uid));
    let measured = tokio::task::spawn_blocking(move || {
        [machine, record].into_iter().flatten().map(|dir| occupied(&dir)).fold(0, u64::saturating_add)
    });
    measured.await.unwrap_or(0)
}

/// Bytes that a directory occupies. What goes away meanwhile occupies none.
fn occupied(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(meta) = path.symlink_metadata() else { return 0 };
    let own = meta.blocks().saturating_mul(512);
    if !meta.is_dir() {
        return own;
    }
    let Ok(entries) = path.read_dir() else { return own };
    entries.filter_map(Result::ok).map(|entry| occupied(&entry.path())).fold(own, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn fs(available: u64, capacity: u64) -> FsUsage {
        FsUsage {
            capacity_bytes: capacity,
            available_bytes: available,
            used_bytes: capacity.saturating_sub(available),
            inodes: 1000,
            inodes_free: 500,
        }
    }

    fn left(memory: u64, node: u64, images: u64) -> Left {
        Left { memory: Some((memory, 8 << 30)), node: Some(fs(node, 1000 * MIB)), images: Some(fs(images, 1000 * MIB)) }
    }

    #[test]
    fn thresholds_are_written_as_the_kubelets() {
        let text = "memory.available<100Mi,nodefs.available<10%|10Gi,nodefs.inodesFree<5%,imagefs.available<15%|15Gi";
        assert_eq!(text.parse(), Ok(Eviction::default()));
        let kubelets = "nodefs.available<10%,imagefs.available<15%".parse::<Eviction>().unwrap();
        // On a disk of 1000 GiB a share alone is a lot of room to leave empty.
        let large = |free: u64| Left {
            node: Some(fs(free << 30, 1000 << 30)),
            images: Some(fs(free << 30, 1000 << 30)),
            ..Left::default()
        };
        assert_eq!((kubelets.short(&large(99)).len(), Eviction::default().short(&large(99)).len()), (2, 0));
        assert_eq!((Eviction::default().short(&large(14)).len(), Eviction::default().short(&large(9)).len()), (1, 2));
        assert_eq!(" memory.available < 1Gi ".parse::<Eviction>().unwrap().marks.len(), 1);
        assert_eq!("".parse::<Eviction>().unwrap().short(&left(0, 0, 0)), []);
        for bad in [
            "memory<1Gi",
            "memory.available>1Gi",
            "memory.available<x",
            "nodefs.available<101%",
            "nodefs.available<10Gi|10%",
            "memory.available",
        ] {
            let error = bad.parse::<Eviction>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{bad:?} is no threshold: SIGNAL<AMOUNT")), "{error}");
        }
    }

    #[test]
    fn pressure_begins_below_a_threshold_and_lasts_a_while() {
        let eviction = Eviction::default();
        let signals = |left: Left| eviction.short(&left).iter().map(|short| short.signal).collect::<Vec<_>>();
        assert_eq!(signals(left(100 * MIB, 100 * MIB, 150 * MIB)), []);
        assert_eq!(signals(left(100 * MIB - 1, 100 * MIB, 150 * MIB)), [Signal::Memory]);
        assert_eq!(signals(left(1 << 30, 99 * MIB, 149 * MIB)), [Signal::NodeFs, Signal::ImageFs]);
        assert_eq!(signals(Left::default()), [], "what isn't known is no pressure");
        let at = |second| Timestamp::from_second(second).unwrap();
        let (mut seen, transition) = (Seen::default(), Duration::from_mins(5));
        let none = Pressure::default();
        let disk = Pressure { disk: true, memory: false };
        assert_eq!(seen.step(&[], transition, at(0)), none);
        let short = eviction.short(&left(1 << 30, 0, 1 << 30));
        assert_eq!(seen.step(&short, transition, at(10)), disk);
        assert_eq!(seen.step(&[], transition, at(309)), disk);
        assert_eq!(seen.step(&[], transition, at(5)), disk, "by a clock that was set back");
        assert_eq!(seen.step(&[], transition, at(310)), none);
    }

    #[test]
    fn who_takes_more_than_asked_goes_first_then_who_matters_least() {
        let pod = |name: &str, priority, used, asked| Candidate {
            uid: PodUid::parse(name).unwrap(),
            container: "vm".to_owned(),
            priority,
            used: used * MIB,
            asked: asked * MIB,
        };
        let first = |all: &[Candidate]| victim(all.to_vec()).map(|pod| pod.uid.to_string());
        let (within, beyond) = (pod("within", 0, 90, 100), pod("beyond", 100, 110, 100));
        assert_eq!(first(&[within.clone(), beyond.clone()]).as_deref(), Some("beyond"), "though it matters more");
        assert_eq!(first(&[within.clone(), pod("low", -1, 10, 100)]).as_deref(), Some("low"));
        assert_eq!(first(&[within.clone(), pod("more", 0, 95, 100)]).as_deref(), Some("more"));
        assert_eq!(first(&[pod("critical", CRITICAL, 900, 1)]), None);
        assert_eq!(first(&[]), None);
        let short = Short { signal: Signal::Memory, below: 100 * MIB, available: 51 * MIB };
        assert_eq!(
            message(&short, &beyond),
            "The node was low on resource: memory. Threshold quantity: 102400Ki, available: 52224Ki. Container vm was using 112640Ki, \
             request is 102400Ki, has larger consumption of memory. "
        );
        assert_eq!(
            message(&Short { signal: Signal::NodeInodes, below: 50, available: 3 }, &within),
            "The node was low on resource: inodes. Threshold quantity: 50, available: 3. "
        );
    }

    #[test]
    fn a_node_under_pressure_takes_only_some() {
        let pod = |spec: serde_json::Value| -> Pod { serde_json::from_value(json!({"spec": spec})).unwrap() };
        let modest = pod(json!({"containers": [{"name": "vm"}]}));
        let sized = pod(json!({"containers": [{"name": "vm", "resources": {"limits": {"memory": "1Gi"}}}]}));
        let critical = pod(json!({"priority": CRITICAL, "containers": [{"name": "vm"}]}));
        let (memory, disk) = (Pressure { memory: true, disk: false }, Pressure { memory: false, disk: true });
        assert_eq!(refusal(&modest, Pressure::default()), None);
        assert_eq!(refusal(&modest, memory).unwrap(), "The node had condition: [MemoryPressure]. ");
        assert_eq!(refusal(&sized, memory), None);
        assert_eq!(refusal(&sized, disk).unwrap(), "The node had condition: [DiskPressure]. ");
        assert_eq!(refusal(&critical, disk), None);
    }

    #[test]
    fn a_directory_occupies_what_its_files_do() {
        let dir = tempfile::tempdir().unwrap();
        let empty = occupied(dir.path());
        std::fs::create_dir(dir.path().join("deep")).unwrap();
        std::fs::write(dir.path().join("deep/file"), vec![1; 100 << 10]).unwrap();
        std::os::unix::fs::symlink("/", dir.path().join("link")).unwrap();
        let grown = occupied(dir.path()) - empty;
        assert!((100 << 10..200 << 10).contains(&grown), "{grown}");
        assert_eq!(occupied(&dir.path().join("none")), 0);
    }
}
