//! Probes: when they are asked, and what a row of answers means. Pure.
//!
//! As the kubelet (pkg/kubelet/prober/worker.go): a verdict needs `successThreshold` or `failureThreshold` equal answers in a
//! row; nothing but the startup probe is asked until that has passed once; a container that failed its liveness or startup
//! probe is asked no more.

use std::time::Duration;

use jiff::SignedDuration;
use k8s_openapi::api::core::v1::{Container, Probe};

/// What a probe is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Purpose {
    Startup,
    Liveness,
    Readiness,
}

impl Purpose {
    pub(crate) const ALL: [Self; 3] = [Self::Startup, Self::Liveness, Self::Readiness];

    pub(crate) fn of(self, container: &Container) -> Option<&Probe> {
        match self {
            Self::Startup => container.startup_probe.as_ref(),
            Self::Liveness => container.liveness_probe.as_ref(),
            Self::Readiness => container.readiness_probe.as_ref(),
        }
    }

    /// Whether a container has a probe of any kind.
    pub(crate) fn any(container: &Container) -> bool {
        Self::ALL.iter().any(|purpose| purpose.of(container).is_some())
    }

    /// As events begin.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }

    /// As it stands in a sentence.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Startup => "startup",
            Self::Liveness => "liveness",
            Self::Readiness => "readiness",
        }
    }
}

/// A probe's numbers, with the API's defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Timing {
    /// From the moment the container runs to the first question.
    pub(crate) delay: Duration,
    pub(crate) period: Duration,
    pub(crate) timeout: Duration,
    pub(crate) successes: u32,
    pub(crate) failures: u32,
    /// How long the container gets to end when this probe fails, if not as long as the pod says.
    pub(crate) grace: Option<SignedDuration>,
}

impl Timing {
    pub(crate) fn of(probe: &Probe) -> Self {
        let number = |value: Option<i32>, otherwise: u32| {
            value.and_then(|value| u32::try_from(value).ok()).filter(|value| *value > 0).unwrap_or(otherwise)
        };
        let seconds = |value, otherwise| Duration::from_secs(number(value, otherwise).into());
        Self {
            delay: seconds(probe.initial_delay_seconds, 0),
            period: seconds(probe.period_seconds, 10),
            timeout: seconds(probe.timeout_seconds, 1),
            successes: number(probe.success_threshold, 1),
            failures: number(probe.failure_threshold, 3),
            grace: probe.termination_grace_period_seconds.map(|seconds| SignedDuration::from_secs(seconds.max(0))),
        }
    }
}

/// Equal answers in a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Row {
    last: Option<bool>,
    length: u32,
}

impl Row {
    /// Takes one more answer; a verdict when there are enough of its kind.
    pub(crate) fn take(&mut self, good: bool, timing: &Timing) -> Option<bool> {
        self.length = if self.last == Some(good) { self.length.saturating_add(1) } else { 1 };
        self.last = Some(good);
        let wanted = if good { timing.successes } else { timing.failures };
        (self.length >= wanted).then_some(good)
    }
}

/// What the probes of a container say together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// The startup probe has passed, or there is none.
    pub(crate) started: bool,
    /// The readiness probe passes, or there is none.
    pub(crate) ready: bool,
    /// The container is to be restarted, and why.
    pub(crate) failed: Option<Failed>,
}

/// A container that failed its startup or liveness probe, or its postStart hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failed {
    /// What failed, as in "failed liveness probe".
    pub(crate) what: String,
    /// How long it gets to end, if not as long as the pod says.
    pub(crate) grace: Option<SignedDuration>,
}

impl Verdict {
    /// Before anything was asked. `known` is what an earlier agent showed of this same container: started, and ready.
    pub(crate) fn before(container: &Container, known: Option<(bool, bool)>) -> Self {
        let (was_started, was_ready) = known.unwrap_or_default();
        let started = container.startup_probe.is_none() || was_started;
        Self { started, ready: started && (container.readiness_probe.is_none() || was_ready), failed: None }
    }

    /// Takes the verdict of one probe.
    pub(crate) fn take(&mut self, purpose: Purpose, good: bool, has_readiness: bool, timing: &Timing) {
        match (purpose, good) {
            (Purpose::Startup, true) => {
                self.started = true;
                self.ready |= !has_readiness;
            }
            (Purpose::Readiness, good) => self.ready = good,
            (Purpose::Liveness, true) => {}
            (Purpose::Startup | Purpose::Liveness, false) => {
                self.failed = Some(Failed { what: format!("{} probe", purpose.word()), grace: timing.grace });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn timing(value: serde_json::Value) -> Timing {
        Timing::of(&serde_json::from_value(value).unwrap())
    }

    #[test]
    fn defaults_are_the_apis() {
        let got = timing(json!({}));
        let want = Timing {
            delay: Duration::ZERO,
            period: Duration::from_secs(10),
            timeout: Duration::from_secs(1),
            successes: 1,
            failures: 3,
            grace: None,
        };
        assert_eq!(got, want);
        let got =
            timing(json!({"initialDelaySeconds": 2, "periodSeconds": 1, "timeoutSeconds": 5, "successThreshold": 2,
            "failureThreshold": 1, "terminationGracePeriodSeconds": 4}));
        assert_eq!((got.delay, got.successes, got.failures), (Duration::from_secs(2), 2, 1));
        assert_eq!(got.grace, Some(SignedDuration::from_secs(4)));
    }

    #[test]
    fn a_verdict_needs_its_row() {
        let timing = timing(json!({"successThreshold": 2, "failureThreshold": 3}));
        let mut row = Row::default();
        let answers = [true, true, false, true, false, false, false, false, true];
        let verdicts = answers.map(|good| row.take(good, &timing));
        let want = [None, Some(true), None, None, None, None, Some(false), Some(false), None];
        assert_eq!(verdicts, want);
    }

    #[test]
    fn nothing_is_ready_before_it_has_started() {
        let container: Container = serde_json::from_value(json!({"name": "vm", "startupProbe": {}})).unwrap();
        let mut verdict = Verdict::before(&container, None);
        assert!(!verdict.started && !verdict.ready);
        verdict.take(Purpose::Startup, true, false, &timing(json!({})));
        assert!(verdict.started && verdict.ready, "without a readiness probe");
        assert!(Verdict::before(&container, Some((true, true))).ready, "an agent that comes back forgets nothing");
        let container: Container =
            serde_json::from_value(json!({"name": "vm", "startupProbe": {}, "readinessProbe": {}})).unwrap();
        let mut verdict = Verdict::before(&container, None);
        verdict.take(Purpose::Startup, true, true, &timing(json!({})));
        assert!(verdict.started && !verdict.ready);
    }

    proptest! {
        /// No verdict comes from fewer than its threshold of the last answers, and it always comes from as many.
        #[test]
        fn rows_are_counted(answers in proptest::collection::vec(any::<bool>(), 1..40), good in 1..5i32, bad in 1..5i32) {
            let timing = timing(json!({"successThreshold": good, "failureThreshold": bad}));
            let mut row = Row::default();
            for (at, answer) in answers.iter().enumerate() {
                let wanted = usize::try_from(if *answer { good } else { bad }).unwrap();
                let tail = answers[..=at].iter().rev().take_while(|other| *other == answer).count();
                prop_assert_eq!(row.take(*answer, &timing), (tail >= wanted).then_some(*answer));
            }
        }
    }
}
