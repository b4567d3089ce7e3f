//! Asks a container's probes, as long as it runs.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{
    action::{Action, Place, Where},
    pod::{self, PodUid},
    probe::{Purpose, Row, Timing, Verdict},
    run_config::RunConfig,
};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::{sync::watch, task::JoinSet};

/// The probes of one container, which end with this.
pub(crate) struct Prober {
    verdict: watch::Receiver<Verdict>,
    _tasks: JoinSet<()>,
}

/// Answers to the probes of the pods that are here, as `/metrics/probes` shows them.
#[derive(Debug, Default)]
pub(crate) struct Counts(Mutex<BTreeMap<(PodUid, String), Counted>>);

#[derive(Debug)]
struct Counted {
    namespace: String,
    pod: String,
    answers: BTreeMap<(Purpose, bool), u64>,
}

impl Counts {
    pub(crate) fn count(&self, uid: &PodUid, pod: &Pod, container: &str, purpose: Purpose, good: bool) {
        let mut all = self.lock();
        let counted = all.entry((uid.clone(), container.to_owned())).or_insert_with(|| Counted {
            namespace: pod::namespace(pod).to_owned(),
            pod: pod::name(pod).to_owned(),
            answers: BTreeMap::new(),
        });
        *counted.answers.entry((purpose, good)).or_default() += 1;
    }

    pub(crate) fn forget(&self, uid: &PodUid) {
        self.lock().retain(|(other, _), _| other != uid);
    }

    /// In the `OpenMetrics` format, with the kubelet's name and labels. Names in Kubernetes need no escapes.
    pub(crate) fn render(&self) -> String {
        let mut out = "# HELP prober_probe Answers to probes by result\n# TYPE prober_probe counter\n".to_owned();
        for ((uid, container), Counted { namespace, pod, answers }) in &*self.lock() {
            for ((purpose, good), number) in answers {
                let result = if *good { "successful" } else { "failed" };
                let purpose = purpose.title();
                let line = format!(
                    "prober_probe_total{{probe_type=\"{purpose}\",result=\"{result}\",container=\"{container}\",\
                     pod=\"{pod}\",namespace=\"{namespace}\",pod_uid=\"{uid}\"}} {number}\n"
                );
                out.push_str(&line);
            }
        }
        out + "# EOF\n"
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(PodUid, String), Counted>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is asked, and where.
pub(crate) struct Subject {
    pub(crate) at: Where,
    pub(crate) container: Container,
    pub(crate) run: Option<Arc<RunConfig>>,
    /// When the container began to run: delays count from here.
    pub(crate) since: Timestamp,
}

impl Prober {
    /// Starts asking; `tell` is given every answer, and of a bad one what was wrong.
    pub(crate) fn start(
        subject: Subject,
        known: Option<(bool, bool)>,
        tell: impl Fn(Purpose, Result<(), &str>) + Send + Sync + 'static,
    ) -> Self {
        let (send, verdict) = watch::channel(Verdict::before(&subject.container, known));
        let asker = Arc::new(Asker { subject, send, tell: Box::new(tell) });
        let mut tasks = JoinSet::new();
        for purpose in Purpose::ALL {
            if purpose.of(&asker.subject.container).is_some() {
                let asker = Arc::clone(&asker);
                tasks.spawn(async move { asker.ask(purpose).await });
            }
        }
        Self { verdict, _tasks: tasks }
    }

    pub(crate) fn verdict(&self) -> &watch::Receiver<Verdict> {
        &self.verdict
    }
}

/// Is given every answer, and of a bad one what was wrong.
type Tell = dyn Fn(Purpose, Result<(), &str>) + Send + Sync;

struct Asker {
    subject: Subject,
    send: watch::Sender<Verdict>,
    tell: Box<Tell>,
}

impl Asker {
    async fn ask(&self, purpose: Purpose) {
        let Subject { at, container, run, since } = &self.subject;
        let Some((probe, action)) = purpose.of(container).and_then(|probe| Some((probe, Action::of_probe(probe)?)))
        else {
            return;
        };
        let timing = Timing::of(probe);
        let mut changes = self.send.subscribe();
        if purpose == Purpose::Startup {
            if changes.borrow().started {
                return;
            }
        } else if changes.wait_for(|verdict| verdict.started || verdict.failed.is_some()).await.is_err() {
            return;
        }
        let passed = Duration::try_from(Timestamp::now().duration_since(*since)).unwrap_or_default();
        tokio::time::sleep(timing.delay.saturating_sub(passed)).await;
        let mut ticks = tokio::time::interval(timing.period);
        // A slow answer is followed by the next question a whole period later, and never by two at once.
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let has_readiness = container.readiness_probe.is_some();
        let place = Place { at, container, run: run.as_deref() };
        let mut row = Row::default();
        loop {
            ticks.tick().await;
            if self.send.borrow().failed.is_some() {
                return;
            }
            let answer = match tokio::time::timeout(timing.timeout, place.act(action)).await {
                Ok(answer) => answer,
                Err(_) => Err(format!("no answer within {} s", timing.timeout.as_secs())),
            };
            (self.tell)(purpose, answer.as_ref().copied().map_err(String::as_str));
            if let Some(good) = row.take(answer.is_ok(), &timing) {
                self.send.send_if_modified(|verdict| {
                    let before = verdict.clone();
                    verdict.take(purpose, good, has_readiness, &timing);
                    *verdict != before
                });
                if purpose == Purpose::Startup && good {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn probes_are_counted() {
        let pod: Pod = serde_json::from_value(
            json!({"metadata": {"name": "p", "namespace": "n"}, "spec": {"containers": [{"name": "vm"}]}}),
        )
        .unwrap();
        let (counts, uid) = (Counts::default(), PodUid::parse("u-1").unwrap());
        for good in [true, false, false] {
            counts.count(&uid, &pod, "vm", Purpose::Liveness, good);
        }
        let labels = r#"container="vm",pod="p",namespace="n",pod_uid="u-1""#;
        let text = counts.render();
        for (result, number) in [("successful", 1), ("failed", 2)] {
            let line = format!("prober_probe_total{{probe_type=\"Liveness\",result=\"{result}\",{labels}}} {number}\n");
            assert!(text.contains(&line), "{text}");
        }
        counts.forget(&uid);
        assert!(!counts.render().contains("u-1"));
    }
}
