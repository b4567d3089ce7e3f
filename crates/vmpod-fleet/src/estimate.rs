//! What a pool's jobs and machines were like of late, and how many machines must therefore wait for jobs. Pure.
//!
//! A machine that serves one job is an item in a store: jobs take items, and each that is taken is ordered anew and
//! arrives when it has started. With `B` items in the store or on their way, a job waits longer than `T` only if `B` others came
//! in the last `start - T`. So `B` is the least number that more jobs than that come in that time only once in twenty.
//! Jobs come in bunches; how much so is measured, and the bound is that of a negative binomial distribution with this spread, by
//! its first two moments. Machines that take several jobs come back by themselves, which makes the need smaller.

use jiff::{SignedDuration, Timestamp};

/// How fast the rate of jobs is forgotten.
const RATE: f64 = 300.0;
/// Until a machine has started, it is taken to need so long.
const START: f64 = 60.0;
/// Until a job has ended, it is taken to need so long.
const JOB: f64 = 300.0;
/// The weight of the newest start and of the newest job.
const NEWEST: f64 = 0.05;
/// The weight of the newest look in the measure of bunches.
const BUNCH: f64 = 0.02;
/// The greatest spread that is believed.
const SPREAD: f64 = 50.0;
/// So many standard deviations leave one case in twenty.
const ONE_IN_TWENTY: f64 = 1.645;

/// What was seen of a pool. Losing it costs time, never a job.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// Jobs that began since the last look.
    began: u32,
    /// How many waited at the last look, and when it was.
    waited: Option<(u32, Timestamp)>,
    /// Jobs that come, a second; and how much of it is from looks rather than from ignorance.
    rate: f64,
    known: f64,
    /// The variance of the jobs in a look, over their mean.
    spread: f64,
    /// Seconds from the wish for a machine until it waits for jobs.
    start: f64,
    /// Seconds of a job.
    job: f64,
}

impl Default for Estimate {
    fn default() -> Self {
        Self { began: 0, waited: None, rate: 0.0, known: 0.0, spread: 1.0, start: START, job: JOB }
    }
}

impl Estimate {
    /// A machine waits for its first job, so long after it was wished for.
    pub fn started(&mut self, after: SignedDuration) {
        self.start += NEWEST * (after.as_secs_f64().max(0.0) - self.start);
    }

    /// A job began.
    pub fn began(&mut self) {
        self.began = self.began.saturating_add(1);
    }

    /// A job ended, so long after it began.
    pub fn ended(&mut self, after: SignedDuration) {
        self.job += NEWEST * (after.as_secs_f64().max(0.0) - self.job);
    }

    /// So many jobs wait now. What came since the last look is what is more than then, and what began.
    pub fn look(&mut self, waiting: u32, now: Timestamp) {
        let Some((before, at)) = self.waited else {
            (self.waited, self.began) = (Some((waiting, now)), 0);
            return;
        };
        let passed = now.duration_since(at).as_secs_f64();
        if passed < 1.0 {
            return;
        }
        let came = (f64::from(waiting) + f64::from(self.began) - f64::from(before)).max(0.0);
        let expected = self.rate() * passed;
        if expected >= 0.5 && self.known > 0.5 {
            let spread = (came - expected).powi(2) / expected;
            self.spread += BUNCH * (spread.min(10.0 * SPREAD) - self.spread);
            self.spread = self.spread.clamp(1.0, SPREAD);
        }
        let keep = (-passed / RATE).exp();
        self.rate = self.rate * keep + came / passed * (1.0 - keep);
        self.known = self.known * keep + (1.0 - keep);
        (self.waited, self.began) = (Some((waiting, now)), 0);
    }

    /// Jobs that come, a second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        if self.known > 0.0 { self.rate / self.known.max(0.1) } else { 0.0 }
    }

    /// How long a machine takes until it waits for jobs.
    #[must_use]
    pub fn start(&self) -> SignedDuration {
        SignedDuration::try_from_secs_f64(self.start).unwrap_or_default()
    }

    /// How long a job takes.
    #[must_use]
    pub fn job(&self) -> SignedDuration {
        SignedDuration::try_from_secs_f64(self.job).unwrap_or_default()
    }

    /// How many machines must wait for jobs, or be on their way, beyond those that have jobs and those that waiting jobs
    /// take, so that nineteen of twenty jobs wait less than `target`. `busy` have a job now, and take `jobs` in their life.
    #[must_use]
    pub fn ahead(&self, target: SignedDuration, busy: u32, jobs: u32) -> u32 {
        let gap = self.start - target.as_secs_f64();
        if gap <= 0.0 {
            return 0;
        }
        let comes = self.rate() * gap;
        // Of the busy ones, those whose job ends meanwhile and isn't their last.
        let again = f64::from(busy) * (gap / self.job.max(1.0)).min(1.0) * (1.0 - 1.0 / f64::from(jobs.max(1)));
        let need = (comes - again).max(0.0) + ONE_IN_TWENTY * (comes * self.spread).sqrt();
        // Less than a tenth of a job is no reason for a machine.
        if comes < 0.1 { 0 } else { whole(need.ceil()) }
    }
}

/// A number of machines, at most ten thousand.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is bounded just before")]
fn whole(count: f64) -> u32 {
    count.clamp(0.0, 10_000.0) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// A pool that gets a job each `every` seconds, has looked for an hour, and whose machines take 45 seconds.
    fn steady(every: i64) -> Estimate {
        let mut estimate = Estimate::default();
        for _ in 0..200 {
            estimate.started(SignedDuration::from_secs(45));
            estimate.ended(SignedDuration::from_secs(200));
        }
        for second in (0..=3600).step_by(5) {
            for _ in 0..(second / every - (second - 5) / every) {
                estimate.began();
            }
            estimate.look(0, at(second));
        }
        estimate
    }

    #[test]
    fn what_is_seen_is_known_after_a_while() {
        let estimate = steady(2);
        assert!((estimate.rate() - 0.5).abs() < 0.05, "{}", estimate.rate());
        assert!((estimate.start().as_secs_f64() - 45.0).abs() < 1.0);
        assert!((estimate.job().as_secs_f64() - 200.0).abs() < 1.0);
    }

    #[test]
    fn machines_wait_when_starts_are_longer_than_jobs_may_wait() {
        let estimate = steady(1);
        let ahead = |seconds: i64| estimate.ahead(SignedDuration::from_secs(seconds), 0, 1);
        // 35 jobs come in the 35 seconds that a start takes too long; 45 or so in one case of twenty.
        assert!((40..60).contains(&ahead(10)), "{}", ahead(10));
        assert!(ahead(30) < ahead(10));
        assert_eq!((ahead(45), ahead(600)), (0, 0), "a new machine is there in time");
        assert_eq!(Estimate::default().ahead(SignedDuration::from_secs(1), 0, 1), 0, "nothing came, so nothing waits");
        // Machines that take more jobs than one come back.
        assert!(estimate.ahead(SignedDuration::from_secs(10), 200, 10) < ahead(10));
    }

    #[test]
    fn jobs_in_bunches_need_more() {
        let mut bunches = Estimate::default();
        for second in (0..7200).step_by(5) {
            for _ in 0..(if second % 60 == 0 { 60 } else { 0 }) {
                bunches.began();
            }
            bunches.look(0, at(second));
        }
        let target = SignedDuration::from_secs(10);
        assert!(bunches.ahead(target, 0, 1) > steady(1).ahead(target, 0, 1) * 3 / 2);
    }

    proptest! {
        #[test]
        fn nothing_that_is_seen_makes_nonsense(
            looks in proptest::collection::vec((0..2000u32, 0..400u32, -5..4000i64, -100..100_000i64), 0..40),
            target in 1..100_000i64, busy in 0..10_000u32, jobs in 0..2000u32,
        ) {
            let mut estimate = Estimate::default();
            let mut now = 1000;
            for (waiting, began, passed, took) in looks {
                (0..began).for_each(|_| estimate.began());
                estimate.started(SignedDuration::from_secs(took));
                estimate.ended(SignedDuration::from_secs(took));
                now += passed;
                estimate.look(waiting, at(now));
            }
            prop_assert!(estimate.rate().is_finite() && estimate.rate() >= 0.0);
            let ahead = estimate.ahead(SignedDuration::from_secs(target), busy, jobs);
            prop_assert!(ahead <= 10_000);
            prop_assert!(ahead >= estimate.ahead(SignedDuration::from_secs(target * 2), busy, jobs));
        }
    }
}
