//! Named points after each effect at which a test may let the agent "die".
//!
//! A crash is simulated by never going on: the task that reaches the chosen point waits for ever, and so does every
//! other task that reaches any point afterwards. The test then drops everything and opens it again, as a restarted
//! agent would. In production no plan is set, and a point costs one branch.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::watch;

/// A shared plan of when to die; the default never does.
#[derive(Clone, Debug, Default)]
pub struct FaultPoints(Option<Arc<Plan>>);

#[derive(Debug)]
struct Plan {
    /// Die at this hit, counted from 0.
    at: usize,
    hits: AtomicUsize,
    dead: watch::Sender<Option<String>>,
}

impl FaultPoints {
    /// Dies when the `at`-th point (from 0) is reached.
    #[must_use]
    pub fn crash_at(at: usize) -> Self {
        Self(Some(Arc::new(Plan { at, hits: AtomicUsize::new(0), dead: watch::Sender::new(None) })))
    }

    /// Counts points without ever dying, to learn how many a scenario has.
    #[must_use]
    pub fn count() -> Self {
        Self::crash_at(usize::MAX)
    }

    /// Marks a point. Returns at once, unless this is the chosen one or the agent is dead already.
    pub async fn hit(&self, name: &str) {
        let Some(plan) = &self.0 else { return };
        let hit = plan.hits.fetch_add(1, Ordering::SeqCst);
        if hit == plan.at {
            plan.dead.send_replace(Some(name.to_owned()));
        }
        if plan.dead.borrow().is_some() {
            std::future::pending::<()>().await;
        }
    }

    /// How many points were reached so far.
    #[must_use]
    pub fn hits(&self) -> usize {
        self.0.as_ref().map_or(0, |plan| plan.hits.load(Ordering::SeqCst))
    }

    /// Waits for the crash and names the point; never returns when none is planned.
    pub async fn crashed(&self) -> String {
        let Some(plan) = &self.0 else { return std::future::pending().await };
        let mut dead = plan.dead.subscribe();
        match dead.wait_for(Option::is_some).await {
            Ok(name) => name.clone().unwrap_or_default(),
            Err(_) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn everything_stops_at_the_chosen_point() {
        let faults = FaultPoints::crash_at(1);
        faults.hit("first").await;
        let other = faults.clone();
        let task = tokio::spawn(async move { other.hit("second").await });
        assert_eq!(faults.crashed().await, "second");
        assert!(tokio::time::timeout(Duration::from_millis(20), faults.hit("third")).await.is_err());
        assert!(!task.is_finished());
        assert_eq!(faults.hits(), 3);
    }

    #[tokio::test]
    async fn without_a_plan_nothing_happens() {
        FaultPoints::default().hit("x").await;
        let counting = FaultPoints::count();
        counting.hit("x").await;
        assert_eq!(counting.hits(), 1);
    }
}
