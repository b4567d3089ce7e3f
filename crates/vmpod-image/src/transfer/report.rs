//! Publishing progress.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::progress::{Meter, Phase, Progress};

/// Between two publications.
const PAUSE: Duration = Duration::from_millis(200);

/// Counts, and tells those who watch, a few times a second.
#[derive(Debug)]
pub(crate) struct Reporter {
    start: Instant,
    state: Mutex<(Meter, Duration)>,
    sender: watch::Sender<Progress>,
}

impl Reporter {
    pub(crate) fn new(sender: Option<watch::Sender<Progress>>) -> Self {
        let sender = sender.unwrap_or_else(|| watch::channel(Progress::default()).0);
        Self { start: Instant::now(), state: Mutex::new((Meter::new(0), Duration::ZERO)), sender }
    }

    pub(crate) fn sender(&self) -> &watch::Sender<Progress> {
        &self.sender
    }

    pub(crate) fn total(&self, bytes: u64) {
        self.change(true, |meter| meter.total(bytes));
    }

    pub(crate) fn phase(&self, phase: Phase) {
        self.change(true, |meter| meter.phase(phase));
    }

    pub(crate) fn reuse(&self, bytes: u64) {
        self.change(false, |meter| meter.reuse(bytes));
    }

    pub(crate) fn advance(&self, bytes: u64) {
        self.change(false, |meter| meter.advance(bytes));
    }

    pub(crate) fn retreat(&self, bytes: u64) {
        self.change(false, |meter| meter.retreat(bytes));
    }

    fn change(&self, publish: bool, change: impl FnOnce(&mut Meter)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (meter, published) = &mut *state;
        change(meter);
        let now = self.start.elapsed();
        if publish || now.saturating_sub(*published) >= PAUSE {
            *published = now;
            self.sender.send_replace(meter.at(now));
        }
    }
}
