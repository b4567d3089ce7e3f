//! `vmpod up` is killed fifty times at random moments while pods come and go.
//!
//! Every pod's main process rings at the test's own door, by name, when it runs. A pod never restarts, so nobody may ring
//! twice, and whoever succeeded must have rung. The seed is printed; `STORM_SEED` repeats its decisions.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use e2e::{Home, Up, eventually_within, leaks, pods};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::{Api, ResourceExt as _};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;

const KILLS: usize = 50;
/// Machines at once: the processors are few and everything is emulated.
const CROWD: usize = 3;

#[tokio::test(flavor = "multi_thread")]
async fn fifty_kills_lose_and_leak_nothing() -> Result<()> {
    let seed = match std::env::var_os("STORM_SEED") {
        Some(text) => text.to_string_lossy().parse().context("STORM_SEED isn't a number")?,
        None => rand::random::<u64>(),
    };
    say(&format!("STORM_SEED={seed}"));
    let mut random = StdRng::seed_from_u64(seed);
    let home = Home::with_tiny("storm").await?;
    let door = Door::open().await?;
    let mut storm = Storm { door, made: 0, ends: BTreeMap::new(), kills_with_machines: 0 };
    for kill in 0..KILLS {
        storm.round(&home, kill, &mut random).await.with_context(|| format!("kill {kill}, STORM_SEED={seed}"))?;
    }
    storm.calm(&home).await.with_context(|| format!("after the storm, STORM_SEED={seed}"))
}

struct Storm {
    door: Door,
    /// Pods made so far; each has a name of its own.
    made: usize,
    /// How pods were seen to end, by UID.
    ends: BTreeMap<String, String>,
    /// How many kills hit while machines ran.
    kills_with_machines: usize,
}

impl Storm {
    /// One life of `vmpod up`.
    async fn round(&mut self, home: &Home, kill: usize, random: &mut StdRng) -> Result<()> {
        let life = match random.random_range(0..10_u32) {
            // In the middle of its start, or of whatever pods do at first.
            0..7 => Duration::from_millis(random.random_range(100..3000)),
            // Long enough for guests to boot and commands to end.
            _ => Duration::from_millis(random.random_range(3000..11_000)),
        };
        let up = Up::spawn(home, &["--log", "warn"])?;
        match tokio::time::timeout(life, self.drive(&up, home, random)).await {
            Err(_) => {}
            Ok(result) => bail!("driving ended early: {:?}", result.map(drop)),
        }
        let machines = home.hypervisors();
        self.kills_with_machines += usize::from(machines > 0);
        up.kill().await?;
        say(&format!(
            "kill {kill} after {:.1} s with {machines} machines, {} pods made",
            life.as_secs_f64(),
            self.made
        ));
        Self::no_pod_has_two(home)
    }

    /// Makes and deletes pods and looks at them, until it is dropped.
    async fn drive(&mut self, up: &Up, home: &Home, random: &mut StdRng) -> Result<()> {
        while !up.kubeconfig().exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let api: Api<Pod> = Api::namespaced(up.client().await?, "default");
        loop {
            Self::no_pod_has_two(home)?;
            let all = self.look(&api).await?;
            let (over, alive): (Vec<_>, Vec<_>) = all.iter().partition(|pod| end(pod).is_some());
            let choice = random.random_range(0..10_u32);
            if alive.len() < CROWD && choice < 6 {
                self.made += 1;
                let pod = self.pod(&format!("p{}", self.made), random);
                api.create(&PostParams::default(), &serde_json::from_value(pod)?).await?;
            } else if let Some(pod) = pick(&alive, random).filter(|_| choice == 6) {
                api.delete(&pod.name_any(), &grace(random)).await?;
            } else if let Some(pod) = pick(&over, random).filter(|_| choice == 7 && over.len() > 3) {
                api.delete(&pod.name_any(), &DeleteParams::default()).await?;
            }
            tokio::time::sleep(Duration::from_millis(random.random_range(50..600))).await;
        }
    }

    /// A pod that rings, then ends at once or some seconds later or never.
    fn pod(&self, name: &str, random: &mut StdRng) -> serde_json::Value {
        let port = self.door.port;
        let after = match random.random_range(0..6_u32) {
            0..3 => "exit 0",
            3 => "exit 4",
            4 => "sleep 3; echo slept; exit 0",
            _ => "sleep 10000",
        };
        // 10.0.2.2 is the host, seen from a guest of QEMU's user network.
        let script = format!("echo start; echo $(hostname) | nc 10.0.2.2 {port}; {after}");
        let mut pod = pods::tiny(name, &["sh", "-c", &script]);
        pod["spec"]["terminationGracePeriodSeconds"] = serde_json::json!(2);
        pod
    }

    /// Reads all pods; an end that was seen once must stay.
    async fn look(&mut self, api: &Api<Pod>) -> Result<Vec<Pod>> {
        let all = api.list(&ListParams::default()).await?.items;
        for pod in &all {
            let uid = pod.uid().unwrap_or_default();
            let now = end(pod);
            if let Some(before) = self.ends.get(&uid) {
                ensure!(now.as_ref() == Some(before), "pod {} had ended with {before}, now {now:?}", pod.name_any());
            }
            if let Some(now) = now {
                self.ends.insert(uid, now);
            }
        }
        self.door.nobody_rang_twice()?;
        Ok(all)
    }

    /// A machine's name begins with its pod's UID, and is in its process's command line.
    fn no_pod_has_two(home: &Home) -> Result<()> {
        let mut machines: BTreeMap<String, usize> = BTreeMap::new();
        for process in leaks::hypervisors(home.path()) {
            *machines.entry(pod_uid(&process.words)?).or_default() += 1;
        }
        match machines.iter().find(|(_, count)| **count > 1) {
            None => Ok(()),
            Some((uid, count)) => bail!("pod {uid} has {count} machines"),
        }
    }

    /// After the last kill: everything finds its place, and nothing is left when the pods are gone.
    async fn calm(mut self, home: &Home) -> Result<()> {
        let up = home.up(&["--log", "warn"]).await?;
        let api: Api<Pod> = Api::namespaced(up.client().await?, "default");
        eventually_within(Duration::from_mins(2), "every machine belongs to a pod that runs", || async {
            let all = api.list(&ListParams::default()).await?.items;
            for process in leaks::hypervisors(home.path()) {
                let uid = pod_uid(&process.words)?;
                let pod = all.iter().find(|pod| pod.uid().as_deref() == Some(&uid));
                let pod = pod.with_context(|| format!("no pod has the machine {process}"))?;
                ensure!(end(pod).is_none(), "pod {} has ended and has a machine", pod.name_any());
            }
            for pod in &all {
                let running = pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running");
                ensure!(running || end(pod).is_some(), "pod {} is neither running nor over", pod.name_any());
            }
            Ok(())
        })
        .await?;
        let all = self.look(&api).await?;
        let rings = self.door.rings();
        for pod in all.iter().filter(|pod| end(pod).is_some_and(|end| end.starts_with("Succeeded"))) {
            ensure!(rings.get(&pod.name_any()) == Some(&1), "pod {} succeeded and never ran", pod.name_any());
        }
        let crashed: Vec<&String> = self.ends.values().filter(|end| end.contains("137")).collect();
        say(&format!(
            "{} pods, {} rang, {} seen to end ({} lost their machine), {} of {KILLS} kills with machines running",
            self.made,
            rings.len(),
            self.ends.len(),
            crashed.len(),
            self.kills_with_machines,
        ));
        ensure!(rings.len() >= 3, "the storm was too short for anybody to run");
        ensure!(self.kills_with_machines >= KILLS / 4, "few kills hit while machines ran");

        for pod in all {
            api.delete(&pod.name_any(), &DeleteParams::default()).await?;
        }
        eventually_within(Duration::from_secs(90), "all pods are gone", || async {
            let left = api.list(&ListParams::default()).await?.items;
            ensure!(left.is_empty(), "{} are left", left.len());
            Ok(())
        })
        .await?;
        home.assert_clean().await?;
        up.stop().await?;
        home.assert_no_process()?;
        // Nobody holds the image any more.
        home.vmpod(&["image", "rm", "tiny"]).await?.ok()?;
        let left = home.vmpod(&["image", "ls", "-o", "name"]).await?.ok()?;
        ensure!(left.trim().is_empty(), "somebody still holds {left}");
        Ok(())
    }
}

/// How a pod ended, when it did.
fn end(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let phase = status.phase.as_deref().filter(|phase| matches!(*phase, "Succeeded" | "Failed"))?;
    let container = status.container_statuses.as_deref().and_then(|all| all.first());
    let code = container.and_then(|c| c.state.as_ref()?.terminated.as_ref()).map(|ended| ended.exit_code);
    Some(format!("{phase} {code:?}"))
}

fn grace(random: &mut StdRng) -> DeleteParams {
    let seconds = random.random_range(0..3_u32);
    DeleteParams { grace_period_seconds: (seconds > 0).then_some(seconds), ..DeleteParams::default() }
}

fn pick<'a>(all: &[&'a Pod], random: &mut StdRng) -> Option<&'a Pod> {
    if all.is_empty() { None } else { all.get(random.random_range(0..all.len())).copied() }
}

/// The first UUID in a command line.
fn pod_uid(words: &str) -> Result<String> {
    let is_uuid = |text: &str| {
        text.char_indices().all(|(i, c)| if matches!(i, 8 | 13 | 18 | 23) { c == '-' } else { c.is_ascii_hexdigit() })
    };
    (0..words.len())
        .filter_map(|start| words.get(start..start + 36))
        .find(|text| is_uuid(text))
        .map(str::to_owned)
        .with_context(|| format!("no pod's UID is in {words}"))
}

/// Where main processes ring.
struct Door {
    port: u16,
    rings: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Door {
    async fn open() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let rings: Arc<Mutex<BTreeMap<String, usize>>> = Arc::default();
        let heard = Arc::clone(&rings);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let heard = Arc::clone(&heard);
                tokio::spawn(async move {
                    let mut name = String::new();
                    // A guest that dies while it rings has rung all the same, when its name was heard.
                    stream.read_to_string(&mut name).await.ok();
                    if let (Some(name), Ok(mut heard)) = (name.lines().next(), heard.lock()) {
                        *heard.entry(name.to_owned()).or_default() += 1;
                    }
                });
            }
        });
        Ok(Self { port, rings })
    }

    fn rings(&self) -> BTreeMap<String, usize> {
        self.rings.lock().map(|rings| rings.clone()).unwrap_or_default()
    }

    fn nobody_rang_twice(&self) -> Result<()> {
        match self.rings().iter().find(|(_, count)| **count > 1) {
            None => Ok(()),
            Some((name, count)) => bail!("the main process of pod {name} ran {count} times"),
        }
    }
}

fn say(text: &str) {
    drop(writeln!(std::io::stderr(), "{text}"));
}
