//! How long to wait before trying again.

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

/// The first wait, of crashed containers and of failed pulls.
const FIRST: SignedDuration = SignedDuration::from_secs(10);
/// The longest wait.
const LONGEST: SignedDuration = SignedDuration::from_secs(300);
/// Without a failure for this long, the next one counts as the first.
const FORGIVEN: SignedDuration = SignedDuration::from_secs(600);

/// A wait that doubles from 10 s to 300 s and is forgotten after ten quiet minutes, as the kubelet's do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Backoff {
    /// The wait before the next try and when it began, if a wait was ever due.
    wait: Option<(SignedDuration, Timestamp)>,
}

impl Backoff {
    /// A failure at `at`. It was well since `quiet_since`: when its last try began.
    pub(crate) fn fail(&mut self, at: Timestamp, quiet_since: Timestamp) {
        let wait = match self.wait {
            Some((wait, _)) if at.duration_since(quiet_since) < FORGIVEN => (wait * 2).min(LONGEST),
            _ => FIRST,
        };
        self.wait = Some((wait, at));
    }

    /// When the next try may happen; absent: now.
    pub(crate) fn until(&self) -> Option<Timestamp> {
        self.wait.map(|(wait, at)| at.saturating_add(wait).unwrap_or(Timestamp::MAX))
    }

    /// The current wait.
    pub(crate) fn wait(&self) -> SignedDuration {
        self.wait.map_or(SignedDuration::ZERO, |(wait, _)| wait)
    }
}

/// A duration as Go prints whole seconds: `10s`, `1m20s`, `5m0s`.
pub(crate) fn go_seconds(duration: SignedDuration) -> String {
    let seconds = duration.as_secs();
    if seconds < 60 { format!("{seconds}s") } else { format!("{}m{}s", seconds / 60, seconds % 60) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn waits_double_up_to_five_minutes_and_start_again_after_ten_quiet_ones() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.until(), None);
        let mut now = 1_000;
        let mut waits = Vec::new();
        for _ in 0..7 {
            backoff.fail(at(now), at(now - 1));
            waits.push(backoff.wait().as_secs());
            now = backoff.until().unwrap().as_second() + 1;
        }
        assert_eq!(waits, [10, 20, 40, 80, 160, 300, 300]);
        backoff.fail(at(now + 600), at(now));
        assert_eq!(backoff.wait().as_secs(), 10);
        assert_eq!(backoff.until(), Some(at(now + 610)));
    }

    #[test]
    fn durations_read_as_go_prints_them() {
        for (seconds, text) in [(10, "10s"), (59, "59s"), (60, "1m0s"), (80, "1m20s"), (300, "5m0s")] {
            assert_eq!(go_seconds(SignedDuration::from_secs(seconds)), text);
        }
    }
}
