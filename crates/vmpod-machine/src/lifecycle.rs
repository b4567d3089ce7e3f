//! A machine's life, as a pure function.
//!
//! ```text
//!              Start            Started            Stop / Kill
//!  Preparing ────────▶ Booting ────────▶ Running ─────────────▶ Stopping(deadline)
//!      │                  │                │ ▲                        │
//!      │                  │ StartFailed    │ │ Pause / Resume         │ Exited
//!      │ ◀───── Busy ─────┤                │ │                        │
//!      │ Stop / Kill      ▼                ▼ │                        ▼
//!      │               Failed            Paused ──── Exited ────▶ Stopped(exit)
//!      └──────────────────────────────────────────────────────────────▲
//! ```
//!
//! `Stopped` and `Failed` are final: a machine runs once, and what should run again is a new machine with a fresh disk.
//! Every input is allowed in every state; one that makes no sense there changes nothing, except that a final machine
//! refuses to start.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Where a machine is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Its directory is there (or being made); no process ever ran.
    Preparing,
    /// Its process is being started.
    Booting,
    /// Its process runs. Whether the guest answers is [`crate::Guest::ready`]'s affair.
    Running,
    /// It was told to stop and will be killed at the deadline.
    Stopping {
        /// When it is killed.
        deadline: Timestamp,
    },
    /// Its process is gone.
    Stopped(Exit),
    /// Its process holds still.
    Paused,
    /// Its memory is on disk and its process gone. Reserved for memory snapshots; not reached yet.
    Suspended,
    /// It never ran, for this reason.
    Failed(String),
}

impl State {
    /// Whether nothing can follow.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Stopped(_) | Self::Failed(_))
    }

    /// Whether a process may exist.
    #[must_use]
    pub fn is_live(&self) -> bool {
        matches!(self, Self::Booting | Self::Running | Self::Stopping { .. } | Self::Paused)
    }
}

/// How and when a machine's process ended; `exit.json` in its directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// What ended it.
    pub cause: ExitCause,
    /// When the end was seen. With [`ExitCause::Unseen`] that is later than the end itself.
    pub at: Timestamp,
    /// More for a person: the hypervisor's last words, say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// What ended a machine's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitCause {
    /// The guest shut itself down, asked or not.
    GuestShutdown,
    /// The guest crashed and its hypervisor was told to end then.
    GuestPanic,
    /// We, or another program on this host, ended the process.
    Killed,
    /// The hypervisor itself failed.
    HypervisorFailed,
    /// It was stopped before it ever ran.
    NeverStarted,
    /// It ended while no agent was looking and left no trace of the cause.
    Unseen,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.cause {
            ExitCause::GuestShutdown => "the guest shut down",
            ExitCause::GuestPanic => "the guest crashed",
            ExitCause::Killed => "the machine was killed",
            ExitCause::HypervisorFailed => "the hypervisor failed",
            ExitCause::NeverStarted => "the machine never started",
            ExitCause::Unseen => "the machine ended while the agent was away",
        })?;
        match &self.detail {
            Some(detail) => write!(f, ": {detail}"),
            None => Ok(()),
        }
    }
}

/// Something that happened to a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Somebody wants it to run.
    Start,
    /// Its process answers.
    Started,
    /// Its process couldn't be started.
    StartFailed(String),
    /// The host runs as many guests of its kind as it may: no process was started, and later one may be.
    Busy(String),
    /// Somebody wants it to stop, and to be killed at the deadline.
    Stop {
        /// When to kill it.
        deadline: Timestamp,
    },
    /// Somebody wants it gone now.
    Kill {
        /// Now.
        now: Timestamp,
    },
    /// It was told to stop a while ago and still runs.
    StillRuns,
    /// The deadline of [`State::Stopping`] passed.
    DeadlinePassed,
    /// Somebody wants it to hold still.
    Pause,
    /// Somebody wants it to go on.
    Resume,
    /// Its process is gone.
    Exited(Exit),
}

/// Something to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Start the process; answers with `Started` or `StartFailed`.
    Spawn,
    /// Press the power button.
    PowerDown,
    /// Tell the guest over its login to shut down: it may have no ear for the button.
    AskGuest,
    /// Kill the process.
    Kill,
    /// Stop the guest's processors.
    Pause,
    /// Let them run.
    Resume,
    /// Write the exit record. It is on disk before the new state is shown.
    Record(Exit),
}

/// An input that the state refuses.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a machine runs once and this one is {0}; create another")]
pub struct Denied(&'static str);

/// What follows from an input.
pub fn step(state: State, input: Input) -> Result<(State, Vec<Effect>), Denied> {
    use Effect as E;
    use Input as I;
    use State as S;
    Ok(match (state, input) {
        (S::Stopped(_), I::Start) => return Err(Denied("stopped")),
        (S::Failed(_), I::Start) => return Err(Denied("failed")),
        (state @ (S::Stopped(_) | S::Failed(_) | S::Suspended), _) => (state, vec![]),

        (S::Preparing, I::Start) => (S::Booting, vec![E::Spawn]),
        (S::Preparing, I::Stop { deadline: at } | I::Kill { now: at }) => {
            let exit = Exit { cause: ExitCause::NeverStarted, at, detail: None };
            (S::Stopped(exit.clone()), vec![E::Record(exit)])
        }
        // What couldn't start for want of room is as it was.
        (S::Preparing, _) | (S::Booting, I::Busy(_)) => (S::Preparing, vec![]),

        (_, I::Exited(exit)) => (S::Stopped(exit.clone()), vec![E::Record(exit)]),
        // A process that was told to stop while it was still starting, and then couldn't, simply failed.
        (S::Booting | S::Stopping { .. }, I::StartFailed(why)) | (S::Stopping { .. }, I::Busy(why)) => {
            (S::Failed(why), vec![])
        }

        (S::Booting, I::Started) => (S::Running, vec![]),
        (S::Booting, I::Stop { deadline }) => (S::Stopping { deadline }, vec![]),
        (S::Booting, I::Kill { now }) => (S::Stopping { deadline: now }, vec![]),

        (S::Running, I::Stop { deadline }) | (S::Stopping { deadline }, I::Started) => {
            (S::Stopping { deadline }, vec![E::PowerDown])
        }
        // A guest that holds still can't hear its power button.
        (S::Paused, I::Stop { deadline }) => (S::Stopping { deadline }, vec![E::Resume, E::PowerDown]),
        (S::Running | S::Paused, I::Kill { now }) => (S::Stopping { deadline: now }, vec![E::Kill]),
        (S::Running, I::Pause) => (S::Paused, vec![E::Pause]),
        (S::Paused, I::Resume) => (S::Running, vec![E::Resume]),

        // Somebody may shorten the time that is left and never lengthen it. The button is pressed again: a guest that
        // was booting the first time has not heard it.
        (S::Stopping { deadline }, I::Stop { deadline: other }) => {
            (S::Stopping { deadline: deadline.min(other) }, vec![E::PowerDown])
        }
        (S::Stopping { deadline }, I::Kill { now }) => (S::Stopping { deadline: deadline.min(now) }, vec![E::Kill]),
        (S::Stopping { deadline }, I::StillRuns) => (S::Stopping { deadline }, vec![E::PowerDown, E::AskGuest]),
        (S::Stopping { deadline }, I::DeadlinePassed) => (S::Stopping { deadline }, vec![E::Kill]),

        (state @ (S::Booting | S::Running | S::Paused | S::Stopping { .. }), _) => (state, vec![]),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn time(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn exit(second: i64) -> Exit {
        Exit { cause: ExitCause::GuestShutdown, at: time(second), detail: None }
    }

    fn input() -> impl Strategy<Value = Input> {
        prop_oneof![
            Just(Input::Start),
            Just(Input::Started),
            Just(Input::StartFailed("no".to_owned())),
            Just(Input::Busy("later".to_owned())),
            (0..100i64).prop_map(|s| Input::Stop { deadline: time(s) }),
            (0..100i64).prop_map(|s| Input::Kill { now: time(s) }),
            Just(Input::StillRuns),
            Just(Input::DeadlinePassed),
            Just(Input::Pause),
            Just(Input::Resume),
            (0..100i64).prop_map(|s| Input::Exited(exit(s))),
        ]
    }

    proptest! {
        #[test]
        fn any_history_keeps_the_promises(inputs in proptest::collection::vec(input(), 0..40)) {
            let mut state = State::Preparing;
            // A start that was refused for want of room made no process.
            let (mut spawned, mut refused, mut recorded) = (0, 0, 0);
            for input in inputs {
                let before = state.clone();
                match step(state.clone(), input.clone()) {
                    Err(_) => {
                        prop_assert!(before.is_final() && input == Input::Start);
                    }
                    Ok((after, effects)) => {
                        if before.is_final() {
                            prop_assert_eq!(&after, &before, "a final state was left");
                            prop_assert!(effects.is_empty());
                        }
                        for effect in &effects {
                            match effect {
                                Effect::Spawn => spawned += 1,
                                Effect::Record(_) => recorded += 1,
                                Effect::PowerDown
                                | Effect::AskGuest
                                | Effect::Kill
                                | Effect::Pause
                                | Effect::Resume => {
                                    prop_assert!(before.is_live(), "{effect:?} without a process");
                                }
                            }
                        }
                        if let (State::Stopping { deadline: old }, State::Stopping { deadline: new }) = (&before, &after) {
                            prop_assert!(new <= old, "the deadline moved away");
                        }
                        if matches!(before, State::Stopping { .. }) {
                            prop_assert!(!matches!(after, State::Running | State::Paused | State::Booting));
                        }
                        if before == State::Booting && after == State::Preparing {
                            refused += 1;
                        }
                        prop_assert_eq!(matches!(after, State::Stopped(_)), recorded == 1);
                        state = after;
                    }
                }
            }
            prop_assert!(spawned <= 1 + refused, "two processes");
            prop_assert!(recorded <= 1, "two exits");
        }
    }

    #[test]
    fn a_stop_during_boot_reaches_the_guest_when_it_is_up() {
        let (state, effects) = step(State::Booting, Input::Stop { deadline: time(9) }).unwrap();
        assert!(effects.is_empty());
        let (state, effects) = step(state, Input::Started).unwrap();
        assert_eq!((state, effects), (State::Stopping { deadline: time(9) }, vec![Effect::PowerDown]));
    }

    #[test]
    fn a_prepared_machine_stops_without_a_process() {
        let (state, effects) = step(State::Preparing, Input::Kill { now: time(5) }).unwrap();
        let exit = Exit { cause: ExitCause::NeverStarted, at: time(5), detail: None };
        assert_eq!((state, effects), (State::Stopped(exit.clone()), vec![Effect::Record(exit)]));
    }

    #[test]
    fn a_stopped_machine_never_starts_again() {
        let error = step(State::Stopped(exit(1)), Input::Start).unwrap_err();
        insta::assert_snapshot!(error, @"a machine runs once and this one is stopped; create another");
    }
}
