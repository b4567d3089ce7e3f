//! A runner's life, from what is seen of it. Pure.
//!
//! ```text
//!  Pending ─▶ Starting ─▶ Provisioning ─▶ Idle ⇄ Busy ─▶ Gone
//!     │          │             │            │      │
//!     └──────────┴─────────────┴─▶ Failed   └──────┴─▶ Draining ─▶ Gone
//! ```
//!
//! What can't be seen changes nothing: a runner stays what it was when its CI system doesn't answer.

use jiff::{SignedDuration, Timestamp};
use vmpod_api::runner::Phase;

/// How long a machine may take from the wish for it until its guest answers.
pub const START: SignedDuration = SignedDuration::from_mins(15);
/// How long a guest that answers may take until the CI system has heard of it.
pub const PROVISION: SignedDuration = SignedDuration::from_mins(10);
/// A runner whose machine the CI system has lost from its list, after it was there, is given so long to come back.
pub const LOST: SignedDuration = SignedDuration::from_mins(2);

/// What is seen of a runner's pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Pod {
    /// There is none.
    #[default]
    Absent,
    /// It isn't up yet; the reason, when it says one that matters.
    Waiting(Option<String>),
    /// No node has room for it.
    Unschedulable,
    /// Its guest answers, and what configures it hasn't ended; why that doesn't even run, if it matters.
    Configuring(Option<String>),
    /// Its guest answers, and what configures it failed for good.
    Unprovisioned(String),
    /// Its guest answers, and nothing is left to do for it.
    Up,
    /// It ended well.
    Succeeded,
    /// It ended badly.
    Failed(String),
}

/// What the CI system knows of a runner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Work {
    /// It couldn't be asked.
    #[default]
    Unknown,
    /// It has never heard of it, or forgot it.
    Unheard,
    /// It waits for a job.
    Idle,
    /// It runs one.
    Busy,
}

/// A runner as it is seen now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The phase that was written last, and since when.
    pub phase: Phase,
    /// Since when it is in that phase.
    pub since: Timestamp,
    /// When it was made.
    pub created: Timestamp,
    /// Its pod.
    pub pod: Pod,
    /// What the CI system says.
    pub work: Work,
    /// Somebody wants it to go.
    pub draining: bool,
    /// How long what configures its guest may take; zero where nothing does.
    pub provision: SignedDuration,
}

/// The phase that a runner is in, and why, for people.
#[must_use]
pub fn phase(seen: &Seen, now: Timestamp) -> (Phase, Option<String>) {
    let over = |since: Timestamp, limit: SignedDuration| now.duration_since(since) > limit;
    let failed = |why: String| (Phase::Failed, Some(why));
    if seen.phase.is_over() {
        return (seen.phase, None);
    }
    let worked = matches!(seen.phase, Phase::Idle | Phase::Busy | Phase::Draining);
    match (&seen.pod, seen.work) {
        // It may have had a short job; the next look tells.
        (Pod::Succeeded, Work::Unknown) if !worked && !seen.draining => (seen.phase, None),
        // Whatever its guest did, it took no job: without this, a pool of them would make machines for ever.
        (Pod::Succeeded, Work::Unheard) if !worked && !seen.draining => {
            failed("its machine ended before the CI system had heard of it".to_owned())
        }
        (Pod::Succeeded, _) => (Phase::Gone, None),
        (Pod::Failed(why), _) if !worked => failed(format!("its machine failed: {why}")),
        // Its last job has its own verdict at the CI system.
        (Pod::Failed(why), _) => (Phase::Gone, Some(why.clone())),
        (Pod::Absent, _) if worked || seen.phase == Phase::Provisioning => {
            (Phase::Gone, Some("its machine was removed".to_owned()))
        }
        (Pod::Absent, _) if seen.draining => (Phase::Gone, None),
        (Pod::Absent, _) => (Phase::Pending, None),
        // Waiting for room is nobody's failure.
        (Pod::Unschedulable, _) => (Phase::Pending, Some("no node has room for it".to_owned())),
        (Pod::Waiting(why), Work::Unheard | Work::Unknown) if !worked => {
            if over(seen.created, START) && over(seen.since, START) {
                let why = why.as_deref().unwrap_or("its guest doesn't answer");
                return failed(format!("its machine didn't come up within {START:#}: {why}"));
            }
            (Phase::Starting, why.clone())
        }
        (_, Work::Busy) => (if seen.draining { Phase::Draining } else { Phase::Busy }, None),
        (_, Work::Idle) => (if seen.draining { Phase::Draining } else { Phase::Idle }, None),
        (_, Work::Unknown) if worked => (seen.phase, None),
        // Its last step may have been to start the runner there: while nobody can say whether that has a job, it stays.
        (Pod::Unprovisioned(why), Work::Unheard) if !worked => failed(format!("its provisioning failed: {why}")),
        (Pod::Configuring(why), Work::Unheard)
            if !worked && seen.phase == Phase::Provisioning && over(seen.since, seen.provision) =>
        {
            let why = why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
            failed(format!("its provisioning took longer than {:#}{why}", seen.provision))
        }
        (Pod::Configuring(why), _) if !worked => (Phase::Provisioning, why.clone()),
        (Pod::Unprovisioned(why), Work::Unknown) => (Phase::Provisioning, Some(why.clone())),
        (Pod::Up, Work::Unknown) => (Phase::Provisioning, None),
        (_, Work::Unheard) if worked => {
            if over(seen.since, LOST) && seen.phase == Phase::Idle {
                return (Phase::Gone, Some("the CI system has it no more".to_owned()));
            }
            (seen.phase, None)
        }
        (Pod::Up | Pod::Configuring(_) | Pod::Unprovisioned(_), Work::Unheard) => {
            let limit = PROVISION + seen.provision;
            if seen.phase == Phase::Provisioning && over(seen.since, limit) {
                return failed(format!("the CI system hasn't heard of it within {limit:#}"));
            }
            (Phase::Provisioning, None)
        }
        (Pod::Waiting(_) | Pod::Configuring(_), _) => (seen.phase, None),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn seen(phase: Phase, pod: Pod, work: Work) -> Seen {
        Seen { phase, since: at(0), created: at(0), pod, work, draining: false, provision: SignedDuration::ZERO }
    }

    #[test]
    fn a_life_goes_its_way() {
        let next = |phase_, pod, work| phase(&seen(phase_, pod, work), at(1)).0;
        assert_eq!(next(Phase::Pending, Pod::Absent, Work::Unheard), Phase::Pending);
        assert_eq!(next(Phase::Pending, Pod::Unschedulable, Work::Unheard), Phase::Pending);
        assert_eq!(next(Phase::Pending, Pod::Waiting(None), Work::Unheard), Phase::Starting);
        assert_eq!(next(Phase::Starting, Pod::Up, Work::Unheard), Phase::Provisioning);
        assert_eq!(next(Phase::Provisioning, Pod::Up, Work::Idle), Phase::Idle);
        assert_eq!(next(Phase::Idle, Pod::Up, Work::Busy), Phase::Busy);
        assert_eq!(next(Phase::Busy, Pod::Up, Work::Idle), Phase::Idle);
        assert_eq!(next(Phase::Busy, Pod::Succeeded, Work::Busy), Phase::Gone);
        assert_eq!(next(Phase::Starting, Pod::Succeeded, Work::Unheard), Phase::Failed);
        assert_eq!(next(Phase::Starting, Pod::Succeeded, Work::Idle), Phase::Gone, "a short job");
        assert_eq!(next(Phase::Starting, Pod::Succeeded, Work::Unknown), Phase::Starting, "nobody could say");
        assert_eq!(next(Phase::Idle, Pod::Succeeded, Work::Unheard), Phase::Gone);
        assert_eq!(next(Phase::Busy, Pod::Failed("x".to_owned()), Work::Idle), Phase::Gone);
        assert_eq!(next(Phase::Starting, Pod::Failed("x".to_owned()), Work::Unheard), Phase::Failed);
        assert_eq!(next(Phase::Idle, Pod::Absent, Work::Idle), Phase::Gone);
        let draining = |work| phase(&Seen { draining: true, ..seen(Phase::Idle, Pod::Up, work) }, at(1)).0;
        assert_eq!((draining(Work::Idle), draining(Work::Busy)), (Phase::Draining, Phase::Draining));
    }

    #[test]
    fn deadlines_end_what_never_gets_anywhere() {
        let late = at(START.as_secs() + 1);
        let (after, why) =
            phase(&seen(Phase::Starting, Pod::Waiting(Some("ErrImagePull".to_owned())), Work::Unheard), late);
        assert_eq!(after, Phase::Failed);
        assert!(why.unwrap().contains("ErrImagePull"));
        let late = at(PROVISION.as_secs() + 1);
        assert_eq!(phase(&seen(Phase::Provisioning, Pod::Up, Work::Unheard), late).0, Phase::Failed);
        // Nobody could be asked: that is no proof of anything.
        assert_eq!(phase(&seen(Phase::Provisioning, Pod::Up, Work::Unknown), late).0, Phase::Provisioning);
        // Waiting for room has no deadline.
        assert_eq!(phase(&seen(Phase::Pending, Pod::Unschedulable, Work::Unheard), at(1 << 30)).0, Phase::Pending);
    }

    #[test]
    fn a_guest_that_can_not_be_configured_has_failed_unless_it_may_have_a_job() {
        let (limit, no) = (SignedDuration::from_secs(600), || Pod::Unprovisioned("it ended with 2".to_owned()));
        let at_ = |second, phase_, pod, work| phase(&Seen { provision: limit, ..seen(phase_, pod, work) }, at(second));
        let open = || Pod::Configuring(None);
        assert_eq!(at_(1, Phase::Starting, open(), Work::Unheard).0, Phase::Provisioning);
        assert_eq!(at_(600, Phase::Provisioning, open(), Work::Unheard).0, Phase::Provisioning);
        let (after, why) = at_(601, Phase::Provisioning, open(), Work::Unheard);
        assert_eq!((after, why.unwrap().as_str()), (Phase::Failed, "its provisioning took longer than 10m"));
        let (after, why) = at_(1, Phase::Provisioning, no(), Work::Unheard);
        assert_eq!((after, why.unwrap().as_str()), (Phase::Failed, "its provisioning failed: it ended with 2"));
        // Its runner was started, and nobody can say whether it has a job.
        for pod in [open(), no()] {
            assert_eq!(at_(99_999, Phase::Provisioning, pod.clone(), Work::Unknown).0, Phase::Provisioning);
            assert_eq!(at_(1, Phase::Provisioning, pod.clone(), Work::Busy).0, Phase::Busy);
            assert_eq!(at_(1, Phase::Provisioning, pod.clone(), Work::Idle).0, Phase::Idle);
            assert_eq!(at_(1, Phase::Busy, pod, Work::Unknown).0, Phase::Busy);
        }
        // When it is done, the CI system has as long to hear of it as otherwise.
        assert_eq!(at_(601, Phase::Provisioning, Pod::Up, Work::Unheard).0, Phase::Provisioning);
        assert_eq!(at_(1201, Phase::Provisioning, Pod::Up, Work::Unheard).0, Phase::Failed);
    }

    fn any_phase() -> impl Strategy<Value = Phase> {
        proptest::sample::select(vec![
            Phase::Pending,
            Phase::Starting,
            Phase::Provisioning,
            Phase::Idle,
            Phase::Busy,
            Phase::Draining,
            Phase::Gone,
            Phase::Failed,
        ])
    }

    fn any_pod() -> impl Strategy<Value = Pod> {
        proptest::sample::select(vec![
            Pod::Absent,
            Pod::Waiting(None),
            Pod::Unschedulable,
            Pod::Configuring(None),
            Pod::Unprovisioned("x".to_owned()),
            Pod::Up,
            Pod::Succeeded,
            Pod::Failed("x".to_owned()),
        ])
    }

    proptest! {
        #[test]
        fn what_is_over_stays_over_and_a_running_job_never_fails(
            before in any_phase(), pod in any_pod(), draining: bool, now in 0..100_000i64,
            work in proptest::sample::select(vec![Work::Unknown, Work::Unheard, Work::Idle, Work::Busy]),
        ) {
            let seen = Seen { draining, ..seen(before, pod.clone(), work) };
            let (after, _) = phase(&seen, at(now));
            if before.is_over() {
                prop_assert_eq!(after, before);
            } else if before == Phase::Busy && matches!(pod, Pod::Up | Pod::Waiting(_) | Pod::Configuring(_) | Pod::Unprovisioned(_)) && work != Work::Idle {
                prop_assert!(!after.is_over(), "a runner with a job was given up: {:?}", after);
            }
            let answers = matches!(pod, Pod::Up | Pod::Configuring(_) | Pod::Unprovisioned(_));
            if work == Work::Unknown && answers && !before.is_over() {
                prop_assert!(!after.is_over(), "given up because nobody could be asked");
            }
        }
    }
}
