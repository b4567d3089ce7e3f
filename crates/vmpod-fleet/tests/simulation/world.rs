//! Objects, nodes, guests, jobs and people. Every choice comes from one number.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use vmpod_fleet::provider::Seen;
use vmpod_fleet::{Clock, Metrics};

use crate::ci::Fate;

/// The kinds that the operator uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Pool,
    Runner,
    Pod,
    Secret,
    Node,
    Lease,
    Budget,
    Event,
}

impl Kind {
    pub(crate) fn of(plural: &str) -> Self {
        match plural {
            "runnerpools" => Self::Pool,
            "runners" => Self::Runner,
            "pods" => Self::Pod,
            "secrets" => Self::Secret,
            "nodes" => Self::Node,
            "leases" => Self::Lease,
            "poddisruptionbudgets" => Self::Budget,
            "events" => Self::Event,
            other => panic!("the simulated API has no {other}"),
        }
    }

    fn type_meta(self) -> (&'static str, &'static str) {
        match self {
            Self::Pool => ("vmpod.dev/v1alpha1", "RunnerPool"),
            Self::Runner => ("vmpod.dev/v1alpha1", "Runner"),
            Self::Pod => ("v1", "Pod"),
            Self::Secret => ("v1", "Secret"),
            Self::Node => ("v1", "Node"),
            Self::Lease => ("coordination.k8s.io/v1", "Lease"),
            Self::Budget => ("policy/v1", "PodDisruptionBudget"),
            Self::Event => ("v1", "Event"),
        }
    }
}

type Refused = (u16, &'static str);
type Name = (Kind, String, String);

/// A world that several hold.
#[derive(Clone)]
pub(crate) struct Shared(Arc<Mutex<World>>);

impl Shared {
    pub(crate) fn new(world: World) -> Self {
        Self(Arc::new(Mutex::new(world)))
    }

    pub(crate) fn with<T>(&self, work: impl FnOnce(&mut World) -> T) -> T {
        work(&mut self.0.lock().unwrap())
    }

    pub(crate) fn clock(&self) -> Clock {
        let start = self.with(|world| world.start);
        Arc::new(move || now(start))
    }
}

fn now(start: tokio::time::Instant) -> Timestamp {
    let began = Timestamp::from_second(1_700_000_000).unwrap();
    began.checked_add(start.elapsed()).unwrap()
}

/// What runs in a machine.
struct Guest {
    pool: String,
    machine: String,
    token: String,
    jobs: u32,
    /// When the machine answers, and when its agent has come up.
    ready: Timestamp,
    registers: Timestamp,
    /// It is one that never comes up.
    broken: bool,
    /// The job that it has, since when, and until when.
    job: Option<(u64, Timestamp, Timestamp)>,
}

/// A machine in the CI system's list.
struct Listed {
    busy_since: Option<Timestamp>,
    contacted: Timestamp,
}

struct Registration {
    token: String,
    machines: BTreeMap<String, Listed>,
}

/// The world.
pub(crate) struct World {
    pub(crate) start: tokio::time::Instant,
    seed: u64,
    random: StdRng,
    pub(crate) told: Vec<String>,
    objects: BTreeMap<Name, Value>,
    version: u64,
    /// What happened, with the version of each.
    log: VecDeque<(u64, Kind, &'static str, Value)>,
    /// Versions up to this one are forgotten.
    compacted: u64,
    /// Whoever watches. Not a `watch` channel: that one wakes them in an order of its own choice.
    watchers: Vec<UnboundedSender<()>>,
    made: u64,
    guests: BTreeMap<String, Guest>,
    registrations: BTreeMap<String, Registration>,
    registered: BTreeMap<String, u32>,
    waiting: BTreeMap<String, VecDeque<(u64, Timestamp)>>,
    done: BTreeSet<u64>,
    jobs: u64,
    trouble: bool,
    /// What each operator counts.
    pub(crate) metrics: [Metrics; 2],
    /// The writes that each operator has left before it dies, and until when nobody hears it.
    lives: [Option<u64>; 2],
    cut: [Option<Timestamp>; 2],
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let mut world = Self {
            start: tokio::time::Instant::now(),
            seed,
            random: StdRng::seed_from_u64(seed),
            told: Vec::new(),
            objects: BTreeMap::new(),
            version: 1,
            log: VecDeque::new(),
            compacted: 0,
            watchers: Vec::new(),
            made: 0,
            guests: BTreeMap::new(),
            registrations: BTreeMap::new(),
            registered: BTreeMap::new(),
            waiting: BTreeMap::new(),
            done: BTreeSet::new(),
            jobs: 0,
            trouble: true,
            metrics: [Metrics::default(), Metrics::default()],
            lives: [None; 2],
            cut: [None; 2],
        };
        for (name, site) in [("n1", "home"), ("n2", "home"), ("n3", "cloud")] {
            let node = json!({
                "metadata": {"name": name, "labels": {"site": site}}, "spec": {},
                "status": {"allocatable": {"cpu": "6", "memory": "64Gi"}},
            });
            world.put(Kind::Node, "", name, node, "ADDED");
        }
        for name in ["large", "small"] {
            world.make_pool(name);
        }
        world
    }

    fn now(&self) -> Timestamp {
        now(self.start)
    }

    /// A number below a bound.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.random.random_range(0..bound)
    }

    fn chance(&mut self, one_of: u64) -> bool {
        self.below(one_of) == 0
    }

    pub(crate) fn say(&mut self, what: &str) {
        let line = format!("{:>7.2} {what}", self.start.elapsed().as_secs_f64());
        if std::env::var_os("VMPOD_SIMULATION_SEED").is_some() {
            eprintln!("{line}");
        }
        self.told.push(line);
    }

    fn fail(&self, why: &str) -> ! {
        let last: Vec<&str> = self.told.iter().rev().take(12).rev().map(String::as_str).collect();
        panic!("seed {}: {why}\n{}", self.seed, last.join("\n"));
    }

    // What becomes of calls.

    /// An operator begins; it may die after some of its writes.
    pub(crate) fn begin(&mut self, operator: usize) {
        let lives = (self.trouble && !self.chance(3)).then(|| 1 + self.below(60));
        self.lives[operator] = lives;
        self.say(&format!("operator {operator} begins, to die after {lives:?} writes"));
    }

    pub(crate) fn fate(&mut self, operator: usize, writes: bool) -> Fate {
        let quick = Duration::from_millis(1 + self.below(20));
        let mut fate = Fate { before: quick, after: quick, ..Fate::default() };
        if !self.trouble {
            return fate;
        }
        let now = self.now();
        if self.chance(2000) {
            let until = now.checked_add(SignedDuration::from_secs(i64::try_from(5 + self.below(60)).unwrap()));
            self.cut[operator] = Some(until.unwrap());
            self.say(&format!("operator {operator} is cut off"));
        }
        if self.cut[operator].is_some_and(|until| now < until) {
            return Fate { lost_before: true, ..fate };
        }
        if self.chance(20) {
            fate.before = Duration::from_millis(self.below(3000));
            fate.after = Duration::from_millis(self.below(3000));
        }
        match self.below(60) {
            0 => fate.refused = Some([500, 503, 504][usize::try_from(self.below(3)).unwrap()]),
            1 => fate.lost_before = true,
            2 => fate.lost_after = true,
            _ => {}
        }
        if writes && let Some(left) = &mut self.lives[operator] {
            *left = left.saturating_sub(1);
            fate.crash = *left == 0;
        }
        fate
    }

    pub(crate) fn ci_fate(&mut self) -> Fate {
        let quick = Duration::from_millis(1 + self.below(100));
        let mut fate = Fate { before: quick, after: quick, ..Fate::default() };
        if self.trouble {
            match self.below(30) {
                0 => fate.lost_before = true,
                1 => fate.lost_after = true,
                2 => fate.before = Duration::from_millis(self.below(2000)),
                _ => {}
            }
        }
        fate
    }

    // The API.

    fn put(&mut self, kind: Kind, namespace: &str, name: &str, mut value: Value, what: &'static str) -> Value {
        self.version += 1;
        let (version, kind_name) = kind.type_meta();
        value["apiVersion"] = json!(version);
        value["kind"] = json!(kind_name);
        value["metadata"]["name"] = json!(name);
        if !namespace.is_empty() {
            value["metadata"]["namespace"] = json!(namespace);
        }
        value["metadata"]["resourceVersion"] = json!(self.version.to_string());
        if let Some(plain) = value.get("stringData").and_then(Value::as_object).cloned() {
            for (key, text) in plain {
                let bytes = k8s_openapi::ByteString(text.as_str().unwrap_or_default().as_bytes().to_vec());
                value["data"][key] = json!(bytes);
            }
            value.as_object_mut().unwrap().remove("stringData");
        }
        if value["metadata"].get("uid").is_none() {
            self.made += 1;
            value["metadata"]["uid"] = json!(format!("{:012}", self.made));
            value["metadata"]["creationTimestamp"] = json!(seconds(self.now()));
            value["metadata"]["generation"] = json!(1);
        }
        let key = (kind, namespace.to_owned(), name.to_owned());
        if what == "DELETED" {
            self.objects.remove(&key);
        } else {
            self.objects.insert(key, value.clone());
        }
        self.log.push_back((self.version, kind, what, value.clone()));
        if self.log.len() > 400 {
            self.compacted = self.log.pop_front().map_or(0, |(version, ..)| version);
        }
        self.watchers.retain(|watcher| watcher.send(()).is_ok());
        value
    }

    pub(crate) fn subscribe(&mut self) -> UnboundedReceiver<()> {
        let (sender, receiver) = unbounded_channel();
        self.watchers.push(sender);
        receiver
    }

    /// The lines of a watch since a version, after how long they come, and whether it breaks then.
    pub(crate) fn since(&mut self, kind: Kind, selector: Option<&str>, at: &mut u64) -> (Vec<Value>, u64, bool) {
        if *at < self.compacted {
            let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410, "reason": "Expired", "message": "too old"});
            return (vec![json!({"type": "ERROR", "object": status})], 0, true);
        }
        let selected = |value: &Value| selector.is_none_or(|key| value["metadata"]["labels"].get(key).is_some());
        let news: Vec<Value> = self
            .log
            .iter()
            .filter(|(version, of, _, value)| *version > *at && *of == kind && selected(value))
            .map(|(_, _, what, value)| json!({"type": what, "object": value}))
            .collect();
        *at = self.version;
        if news.is_empty() {
            return (news, 0, false);
        }
        let late = if self.trouble && self.chance(12) { self.below(8000) } else { self.below(30) };
        let breaks = self.trouble && self.chance(25);
        (news, late, breaks)
    }

    pub(crate) fn list(&self, kind: Kind, namespace: Option<&str>, selector: Option<&str>) -> Value {
        let selected = |value: &Value| {
            let labels = &value["metadata"]["labels"];
            selector.is_none_or(|selector| match selector.split_once('=') {
                Some((key, wanted)) => labels[key] == wanted,
                None => labels.get(selector).is_some(),
            })
        };
        let of = |(found, space, _): &Name| *found == kind && namespace.is_none_or(|wanted| wanted == space);
        let items: Vec<&Value> =
            self.objects.iter().filter(|(name, value)| of(name) && selected(value)).map(|(_, value)| value).collect();
        let (version, name) = kind.type_meta();
        json!({"apiVersion": version, "kind": format!("{name}List"), "metadata": {"resourceVersion": self.version.to_string()}, "items": items})
    }

    pub(crate) fn get(&self, kind: Kind, namespace: &str, name: &str) -> Option<Value> {
        self.objects.get(&(kind, namespace.to_owned(), name.to_owned())).cloned()
    }

    pub(crate) fn create(&mut self, kind: Kind, namespace: &str, mut value: Value) -> Result<Value, Refused> {
        let given = value["metadata"]["name"].as_str().filter(|name| !name.is_empty()).map(str::to_owned);
        let name = given.unwrap_or_else(|| {
            let prefix = value["metadata"]["generateName"].as_str().unwrap_or_default();
            format!("{prefix}{:05x}", self.below(1 << 20))
        });
        if self.get(kind, namespace, &name).is_some() {
            return Err((409, "AlreadyExists"));
        }
        if kind == Kind::Pod {
            value["status"] = json!({"phase": "Pending"});
        }
        self.say(&format!("{kind:?} {name} is made"));
        Ok(self.put(kind, namespace, &name, value, "ADDED"))
    }

    pub(crate) fn replace(&mut self, kind: Kind, namespace: &str, name: &str, value: Value) -> Result<Value, Refused> {
        let before = self.get(kind, namespace, name).ok_or((404, "NotFound"))?;
        if before["metadata"]["resourceVersion"] != value["metadata"]["resourceVersion"] {
            return Err((409, "Conflict"));
        }
        Ok(self.put(kind, namespace, name, value, "MODIFIED"))
    }

    pub(crate) fn patch(
        &mut self,
        kind: Kind,
        namespace: &str,
        name: &str,
        status: bool,
        content: &str,
        patch: Value,
    ) -> Result<Value, Refused> {
        let before = self.get(kind, namespace, name);
        let mut after = match (&before, content.contains("apply-patch")) {
            (Some(before), _) => before.clone(),
            (None, true) => json!({}),
            (None, false) => return Err((404, "NotFound")),
        };
        if content.contains("json-patch") {
            let patch: json_patch::Patch = serde_json::from_value(patch).unwrap();
            json_patch::patch(&mut after, &patch).map_err(|_| (422, "Invalid"))?;
        } else {
            let version = &patch["metadata"]["resourceVersion"];
            if version.is_string() && *version != after["metadata"]["resourceVersion"] {
                return Err((409, "Conflict"));
            }
            json_patch::merge(&mut after, &patch);
        }
        if let Some(before) = &before {
            // Each half is written by those who own it.
            if status {
                let new = after["status"].take();
                after = before.clone();
                after["status"] = new;
            } else if before.get("status").is_some() {
                after["status"] = before["status"].clone();
            }
            if before["spec"] != after["spec"] {
                let generation = before["metadata"]["generation"].as_u64().unwrap_or(0);
                after["metadata"]["generation"] = json!(generation + 1);
            }
            if *before == after {
                return Ok(after);
            }
        }
        let over = after["metadata"]["deletionTimestamp"].is_string() && kind != Kind::Pod;
        let held = after["metadata"]["finalizers"].as_array().is_some_and(|all| !all.is_empty());
        let what = match (&before, over && !held) {
            (None, _) => "ADDED",
            (_, true) => "DELETED",
            _ => "MODIFIED",
        };
        if what == "DELETED" || kind == Kind::Pod {
            self.say(&format!("{kind:?} {name}: {what}"));
        }
        Ok(self.put(kind, namespace, name, after, what))
    }

    pub(crate) fn delete(
        &mut self,
        kind: Kind,
        namespace: &str,
        name: &str,
        uid: Option<&str>,
    ) -> Result<Value, Refused> {
        let mut value = self.get(kind, namespace, name).ok_or((404, "NotFound"))?;
        if uid.is_some_and(|uid| value["metadata"]["uid"] != uid) {
            return Err((409, "Conflict"));
        }
        self.say(&format!("{kind:?} {name} is deleted"));
        let bound = value["spec"]["nodeName"].is_string();
        let held = value["metadata"]["finalizers"].as_array().is_some_and(|all| !all.is_empty());
        let going = value["metadata"]["deletionTimestamp"].is_string();
        if held || (kind == Kind::Pod && bound) {
            if going {
                return Ok(value);
            }
            let pod = value["metadata"]["uid"].as_str().unwrap_or_default();
            if let Some((_, since, _)) = self.guests.get(pod).and_then(|guest| guest.job)
                && self.now().duration_since(since) > SignedDuration::from_secs(20)
            {
                self.fail(&format!("Pod {name} was asked to go long after its job had begun"));
            }
            value["metadata"]["deletionTimestamp"] = json!(seconds(self.now()));
            value["metadata"]["deletionGracePeriodSeconds"] = value["spec"]["terminationGracePeriodSeconds"].clone();
            return Ok(self.put(kind, namespace, name, value, "MODIFIED"));
        }
        Ok(self.put(kind, namespace, name, value, "DELETED"))
    }

    // The CI system.

    pub(crate) fn register(&mut self, pool: &str, name: &str, kept: Option<&str>) -> String {
        let found = self.registrations.get(pool).map(|registration| registration.token.clone());
        match (found, kept) {
            (Some(token), Some(kept)) if token == kept => token,
            (found, _) => {
                let number = self.below(1 << 30);
                let token = format!("t{number}");
                self.say(&format!("pool {name} gets token {token}"));
                if found.is_none() {
                    *self.registered.entry(pool.to_owned()).or_default() += 1;
                }
                let fresh = Registration { token: token.clone(), machines: BTreeMap::new() };
                self.registrations.entry(pool.to_owned()).or_insert(fresh).token.clone_from(&token);
                token
            }
        }
    }

    pub(crate) fn waiting(&self, pool: &str) -> (u32, Option<Timestamp>) {
        let waiting = self.waiting.get(pool);
        let count = waiting.map_or(0, VecDeque::len);
        (u32::try_from(count).unwrap(), waiting.and_then(|waiting| waiting.front()).map(|(_, since)| *since))
    }

    pub(crate) fn machines(&self, pool: &str) -> BTreeMap<String, Seen> {
        let listed = self.registrations.get(pool).map(|registration| &registration.machines);
        let seen = |(machine, listed): (&String, &Listed)| {
            (machine.clone(), Seen { busy: listed.busy_since.is_some(), contacted: Some(listed.contacted) })
        };
        listed.into_iter().flatten().map(seen).collect()
    }

    pub(crate) fn is_busy(&self, pool: &str, machine: &str) -> bool {
        let listed = self.registrations.get(pool).and_then(|registration| registration.machines.get(machine));
        listed.is_some_and(|listed| listed.busy_since.is_some())
    }

    pub(crate) fn forget(&mut self, pool: &str, machine: &str) {
        if self.is_busy(pool, machine) {
            self.fail(&format!("machine {machine} is forgotten while it has a job"));
        }
        if let Some(registration) = self.registrations.get_mut(pool) {
            registration.machines.remove(machine);
        }
        self.say(&format!("machine {machine} is forgotten"));
    }

    pub(crate) fn unregister(&mut self, pool: &str) {
        let Some(registration) = self.registrations.remove(pool) else { return };
        if registration.machines.values().any(|listed| listed.busy_since.is_some()) {
            self.fail("a pool is unregistered while its machines have jobs");
        }
        self.say("a pool is unregistered");
    }

    // Nodes and guests.

    /// A second passes.
    pub(crate) fn step(&mut self) {
        self.collect();
        let pods: Vec<Value> =
            self.objects.iter().filter(|((kind, ..), _)| *kind == Kind::Pod).map(|(_, pod)| pod.clone()).collect();
        self.no_job_is_lost(&pods);
        for pod in pods {
            if pod["spec"]["nodeName"].is_null() {
                self.schedule(pod);
            } else {
                self.run(pod);
            }
        }
    }

    fn no_job_is_lost(&mut self, pods: &[Value]) {
        let there: BTreeSet<&str> = pods.iter().filter_map(|pod| pod["metadata"]["uid"].as_str()).collect();
        let lost: Vec<String> = self.guests.keys().filter(|uid| !there.contains(uid.as_str())).cloned().collect();
        for uid in lost {
            let guest = self.guests.remove(&uid).unwrap();
            if guest.job.is_some() {
                self.fail(&format!("the pod of machine {} went away in the middle of its job", guest.machine));
            }
        }
    }

    /// What belongs to something that is gone goes too.
    fn collect(&mut self) {
        let uids: BTreeSet<String> =
            self.objects.values().filter_map(|value| value["metadata"]["uid"].as_str()).map(str::to_owned).collect();
        let orphans: Vec<Name> = self
            .objects
            .iter()
            .filter(|(_, value)| {
                let owner = value["metadata"]["ownerReferences"][0]["uid"].as_str();
                owner.is_some_and(|owner| !uids.contains(owner))
            })
            .map(|(name, _)| name.clone())
            .collect();
        for (kind, namespace, name) in orphans {
            // It isn't there any more, or is on its way.
            self.delete(kind, &namespace, &name, None).ok();
        }
    }

    fn schedule(&mut self, mut pod: Value) {
        let cpu = |pod: &Value| {
            let text = pod["spec"]["containers"][0]["resources"]["requests"]["cpu"].as_str().unwrap_or("1");
            text.parse::<u64>().unwrap()
        };
        let site = pod["spec"]["nodeSelector"]["site"].as_str().map(str::to_owned);
        let mut used: BTreeMap<String, u64> = BTreeMap::new();
        for ((kind, ..), other) in &self.objects {
            let over = matches!(other["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
            if let (Kind::Pod, Some(node), false) = (kind, other["spec"]["nodeName"].as_str(), over) {
                *used.entry(node.to_owned()).or_default() += cpu(other);
            }
        }
        let fits = |node: &Value| {
            let name = node["metadata"]["name"].as_str().unwrap_or_default();
            let here = site.as_ref().is_none_or(|site| node["metadata"]["labels"]["site"] == *site);
            here && node["spec"]["unschedulable"] != true && used.get(name).copied().unwrap_or(0) + cpu(&pod) <= 6
        };
        let node = self.objects.iter().find(|((kind, ..), node)| *kind == Kind::Node && fits(node));
        let node = node.map(|(_, node)| node["metadata"]["name"].clone());
        let (namespace, name) = names(&pod);
        match node {
            Some(node) => {
                pod["spec"]["nodeName"] = node;
                let secret = self.get(Kind::Secret, &namespace, &name);
                let data = secret.map(|secret| secret["data"]["userdata"].clone()).unwrap_or_default();
                let data: k8s_openapi::ByteString = serde_json::from_value(data).unwrap_or_default();
                let data = String::from_utf8(data.0).unwrap();
                let words: Vec<String> = data.split(' ').map(str::to_owned).collect();
                let [pool, machine, jobs, token] = &words[..] else {
                    self.fail(&format!("Pod {name} has no user data"))
                };
                let ready = 3 + self.below(40);
                let registers = ready + 1 + self.below(10);
                let later = |seconds: u64| self.now().checked_add(Duration::from_secs(seconds)).unwrap();
                let (ready, registers) = (later(ready), later(registers));
                let broken = self.trouble && self.chance(25);
                let guest = Guest {
                    pool: pool.clone(),
                    machine: machine.clone(),
                    token: token.clone(),
                    jobs: jobs.parse().unwrap(),
                    ready,
                    registers,
                    broken,
                    job: None,
                };
                self.guests.insert(pod["metadata"]["uid"].as_str().unwrap().to_owned(), guest);
                pod["status"]["conditions"] = json!([{"type": "PodScheduled", "status": "True"}]);
                self.put(Kind::Pod, &namespace, &name, pod, "MODIFIED");
            }
            None if pod["status"]["conditions"].is_null() => {
                let full = json!([{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]);
                pod["status"]["conditions"] = full;
                self.put(Kind::Pod, &namespace, &name, pod, "MODIFIED");
            }
            None => {}
        }
    }

    fn run(&mut self, mut pod: Value) {
        let (namespace, name) = names(&pod);
        let uid = pod["metadata"]["uid"].as_str().unwrap().to_owned();
        let now = self.now();
        let going = pod["metadata"]["deletionTimestamp"].as_str().map(|text| text.parse::<Timestamp>().unwrap());
        let over = matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
        let Some(mut guest) = self.guests.remove(&uid) else {
            // It ended before.
            if going.is_some() {
                self.put(Kind::Pod, &namespace, &name, pod, "DELETED");
            }
            return;
        };
        if over || (going.is_some() && guest.job.is_none()) {
            if going.is_some() {
                self.say(&format!("the machine of {name} has gone"));
                self.put(Kind::Pod, &namespace, &name, pod, "DELETED");
            }
            return;
        }
        let grace = pod["metadata"]["deletionGracePeriodSeconds"].as_i64().unwrap_or(0);
        if going.is_some_and(|since| now.duration_since(since) > SignedDuration::from_secs(grace)) {
            self.fail(&format!("the grace period of {name} ended before its job"));
        }
        if now >= guest.ready && pod["status"]["phase"] == "Pending" {
            if guest.broken {
                pod["status"] = json!({"phase": "Failed", "reason": "ErrImagePull"});
                self.say(&format!("the machine of {name} fails"));
                self.put(Kind::Pod, &namespace, &name, pod, "MODIFIED");
                return;
            }
            pod["status"]["phase"] = json!("Running");
            pod["status"]["conditions"] = json!([{"type": "Ready", "status": "True"}]);
            self.put(Kind::Pod, &namespace, &name, pod.clone(), "MODIFIED");
        }
        if now >= guest.registers && self.work(&mut guest, going.is_some()) {
            let ended = json!({"terminated": {"exitCode": 0, "finishedAt": seconds(now)}});
            let container = json!({"name": "runner", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": ended});
            pod["status"] = json!({"phase": "Succeeded", "containerStatuses": [container]});
            self.say(&format!("the machine of {name} did its work"));
            self.put(Kind::Pod, &namespace, &name, pod, "MODIFIED");
            return;
        }
        self.guests.insert(uid, guest);
    }

    /// A guest's agent works for a second; whether it has done all its jobs.
    fn work(&mut self, guest: &mut Guest, going: bool) -> bool {
        let now = self.now();
        let Some(registration) = self.registrations.get_mut(&guest.pool) else { return false };
        let known = registration.token == guest.token;
        if guest.job.is_none() && !known {
            // A token that is no longer one: it asks, and is refused.
            return false;
        }
        let fresh = Listed { busy_since: None, contacted: now };
        let listed = registration.machines.entry(guest.machine.clone()).or_insert(fresh);
        listed.contacted = now;
        match guest.job {
            Some((job, _, until)) if now >= until => {
                listed.busy_since = None;
                guest.job = None;
                guest.jobs -= 1;
                if !self.done.insert(job) {
                    self.fail(&format!("job {job} ran twice"));
                }
                guest.jobs == 0
            }
            Some(_) => false,
            None if going => false,
            None => {
                let job = self.waiting.get_mut(&guest.pool).and_then(VecDeque::pop_front);
                if let Some((job, _)) = job {
                    listed.busy_since = Some(now);
                    let took = 5 + self.below(120);
                    guest.job = Some((job, now, now.checked_add(Duration::from_secs(took)).unwrap()));
                    self.say(&format!("job {job} begins on {}", guest.machine));
                }
                false
            }
        }
    }

    // People.

    fn make_pool(&mut self, name: &str) {
        let jobs = 1 + self.below(2);
        let pool = json!({
            "metadata": {"name": name, "namespace": "ci"},
            "spec": {
                "provider": {"http": {"url": "http://ci.example.com"}},
                "image": "debian:1",
                "resources": {"cpu": if name == "large" { "3" } else { "1" }, "memory": "1Gi"},
                "jobsPerRunner": jobs, "userData": "x",
                "scale": {"min": 0, "max": 6, "idle": self.below(2), "scaleDownSeconds": 30},
                "placements": [
                    {"name": "home", "nodeSelector": {"site": "home"}},
                    {"name": "cloud", "afterSeconds": 30, "returnSeconds": 60, "nodeSelector": {"site": "cloud"}},
                ],
                "rollout": {"maxSurge": 1, "maxUnavailable": self.below(2), "drainSeconds": 600},
            },
        });
        self.create(Kind::Pool, "ci", pool).unwrap();
    }

    fn pools(&self) -> Vec<(String, String)> {
        let pools = self
            .objects
            .iter()
            .filter(|((kind, ..), value)| *kind == Kind::Pool && value["metadata"]["deletionTimestamp"].is_null());
        pools.map(|((_, _, name), pool)| (name.clone(), pool["metadata"]["uid"].as_str().unwrap().to_owned())).collect()
    }

    fn change(&mut self, kind: Kind, namespace: &str, name: &str, patch: Value) {
        self.say(&format!("somebody changes {kind:?} {name}: {patch}"));
        self.patch(kind, namespace, name, false, "merge-patch", patch).unwrap();
    }

    /// What people do in a second of a bad day.
    pub(crate) fn people(&mut self) {
        let pools = self.pools();
        for (_, uid) in &pools {
            if self.chance(40) {
                for _ in 0..=self.below(4) {
                    self.jobs += 1;
                    let job = (self.jobs, self.now());
                    self.waiting.entry(uid.clone()).or_default().push_back(job);
                }
            }
        }
        if self.chance(300) && !pools.is_empty() {
            let (name, _) = pools[usize::try_from(self.below(pools.len() as u64)).unwrap()].clone();
            let version = self.below(1000);
            let patch = match self.below(4) {
                0 | 1 => json!({"spec": {"image": format!("debian:{version}")}}),
                2 => json!({"spec": {"scale": {"max": 3 + self.below(4)}}}),
                _ => json!({"spec": {"scale": {"idle": self.below(3)}}}),
            };
            self.change(Kind::Pool, "ci", &name, patch);
        }
        if self.chance(200) {
            let node = ["n1", "n2", "n3"][usize::try_from(self.below(3)).unwrap()];
            let off = self.chance(2);
            self.change(Kind::Node, "", node, json!({"spec": {"unschedulable": off}}));
        }
        if self.chance(900) && pools.len() > 1 {
            let (name, uid) = pools[usize::try_from(self.below(2)).unwrap()].clone();
            // Whoever deletes a pool knows that its waiting jobs wait for another.
            self.waiting.remove(&uid);
            self.say(&format!("somebody deletes pool {name}"));
            self.delete(Kind::Pool, "ci", &name, None).unwrap();
        }
        if self.pools().len() < 2 && self.chance(60) {
            let all: BTreeSet<String> =
                self.objects.keys().filter(|(kind, ..)| *kind == Kind::Pool).map(|(_, _, name)| name.clone()).collect();
            if let Some(name) = ["large", "small"].into_iter().find(|name| !all.contains(*name)) {
                self.make_pool(name);
            }
        }
        if self.chance(400) {
            self.compacted = self.version;
        }
    }

    /// The bad day is over.
    pub(crate) fn calm(&mut self) {
        self.say("calm");
        self.trouble = false;
        self.lives = [None; 2];
        self.cut = [None; 2];
        for node in ["n1", "n2", "n3"] {
            self.change(Kind::Node, "", node, json!({"spec": {"unschedulable": false}}));
        }
    }

    fn of_kind(&self, kind: Kind) -> Vec<(&str, &Value)> {
        self.objects.iter().filter(|((of, ..), _)| *of == kind).map(|((_, _, name), v)| (name.as_str(), v)).collect()
    }

    /// Whether any job still waits or runs.
    pub(crate) fn works(&self) -> bool {
        self.waiting.values().any(|waiting| !waiting.is_empty())
            || self.guests.values().any(|guest| guest.job.is_some())
    }

    /// Everything has come to rest.
    pub(crate) fn at_rest(&self) {
        let waiting: usize = self.waiting.values().map(VecDeque::len).sum();
        if waiting > 0 {
            let pools: Vec<String> = self.statuses().iter().map(ToString::to_string).collect();
            self.fail(&format!("{waiting} jobs still wait, {:?}:\n{}", self.waiting, pools.join("\n")));
        }
        let runners: BTreeSet<&str> = self.of_kind(Kind::Runner).into_iter().map(|(name, _)| name).collect();
        for kind in [Kind::Pod, Kind::Secret] {
            for (name, _) in self.of_kind(kind) {
                if !runners.contains(name) && !name.starts_with("vmpod-pool-") {
                    self.fail(&format!("{kind:?} {name} belongs to no runner"));
                }
            }
        }
        for (name, uid) in self.pools() {
            let pool = self.get(Kind::Pool, "ci", &name).unwrap();
            let of_pool: Vec<&Value> =
                self.of_kind(Kind::Runner).into_iter().map(|(_, r)| r).filter(|r| r["spec"]["pool"] == *name).collect();
            let idle = pool["spec"]["scale"]["idle"].as_u64().unwrap_or(0);
            let template = &pool["status"]["template"];
            let wanted = idle.min(pool["spec"]["scale"]["max"].as_u64().unwrap_or(0));
            if of_pool.len() as u64 != wanted || of_pool.iter().any(|runner| runner["spec"]["template"] != *template) {
                self.fail(&format!("pool {name} should have {wanted} runners of {template}: {of_pool:#?}"));
            }
            let machines: BTreeSet<String> = of_pool
                .iter()
                .map(|runner| format!("m-{}", runner["metadata"]["uid"].as_str().unwrap_or_default()))
                .collect();
            let listed = &self.registrations[&uid].machines;
            if let Some(ghost) = listed.keys().find(|machine| !machines.contains(*machine)) {
                self.fail(&format!("machine {ghost} is still in the list of pool {name}"));
            }
        }
        if let Some((pool, times)) = self.registered.iter().find(|(_, times)| **times > 1) {
            self.fail(&format!("pool {pool} was registered {times} times"));
        }
    }

    fn statuses(&self) -> Vec<Value> {
        self.of_kind(Kind::Pool).into_iter().map(|(_, pool)| pool["status"].clone()).collect()
    }

    pub(crate) fn end_all(&mut self) {
        for (name, _) in self.pools() {
            self.delete(Kind::Pool, "ci", &name, None).unwrap();
        }
    }

    pub(crate) fn nothing_left(&self) {
        for kind in [Kind::Pool, Kind::Runner, Kind::Pod, Kind::Secret, Kind::Budget] {
            if let Some((name, _)) = self.of_kind(kind).first() {
                let all: Vec<String> = [Kind::Pool, Kind::Runner, Kind::Pod]
                    .into_iter()
                    .flat_map(|kind| self.of_kind(kind))
                    .map(|(_, value)| value.to_string())
                    .collect();
                self.fail(&format!("{kind:?} {name} is left:\n{}", all.join("\n")));
            }
        }
        if !self.registrations.is_empty() {
            self.fail("a registration is left");
        }
        for metrics in &self.metrics {
            let text = metrics.render();
            if let Some(line) = text.lines().find(|line| line.contains("pool=")) {
                self.fail(&format!("a figure of a pool that is gone is left: {line}"));
            }
        }
        if self.done.is_empty() {
            self.fail("no job ever ran");
        }
    }
}

fn names(value: &Value) -> (String, String) {
    let text = |name: &str| value["metadata"][name].as_str().unwrap_or_default().to_owned();
    (text("namespace"), text("name"))
}

fn seconds(at: Timestamp) -> String {
    Timestamp::from_second(at.as_second()).unwrap().to_string()
}
