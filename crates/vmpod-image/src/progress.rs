//! Progress as a value: the pipeline publishes it, the command line draws it, events carry it.

use std::fmt;
use std::time::Duration;

/// How far a transfer is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Bytes finished, in the unit of `bytes_total`: compressed bytes for a pull or push, disk bytes for an import.
    pub bytes_done: u64,
    /// Bytes in all; 0 while unknown.
    pub bytes_total: u64,
    /// Of `bytes_done`, those that needed no transfer: found here, or at the other side, or kept from an earlier attempt.
    pub bytes_reused: u64,
    /// Bytes per second, smoothed over the last few seconds.
    pub rate: u64,
    /// Time since the start.
    pub elapsed: Duration,
}

/// The step of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Phase {
    /// The name is being looked up.
    #[default]
    Resolving,
    /// Another pull of the same image is under way; its result will be used.
    Waiting,
    /// Bytes are moving.
    Transferring,
    /// All bytes are here; they are being made durable.
    Finishing,
    /// Over.
    Done,
}

impl Progress {
    /// The time left at the present rate; none while there is no telling.
    #[must_use]
    pub fn eta(&self) -> Option<Duration> {
        if self.rate == 0 || self.bytes_total == 0 {
            return None;
        }
        Some(Duration::from_secs(self.bytes_total.saturating_sub(self.bytes_done).div_ceil(self.rate)))
    }

    /// Done, in parts of a thousand.
    #[must_use]
    pub fn permille(&self) -> u16 {
        if self.bytes_total == 0 {
            return if self.phase == Phase::Done { 1000 } else { 0 };
        }
        let permille = u128::from(self.bytes_done.min(self.bytes_total)) * 1000 / u128::from(self.bytes_total);
        u16::try_from(permille).unwrap_or(1000)
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.phase {
            Phase::Resolving => return f.write_str("looking the image up"),
            Phase::Waiting => return f.write_str("waiting for another pull of this image"),
            Phase::Finishing => return f.write_str("writing to disk"),
            Phase::Transferring | Phase::Done => {}
        }
        write!(f, "{} of {}", Bytes(self.bytes_done), Bytes(self.bytes_total))?;
        if self.phase == Phase::Done {
            return write!(f, " in {:.1} s", self.elapsed.as_secs_f64());
        }
        if self.rate > 0 {
            write!(f, ", {}/s", Bytes(self.rate))?;
        }
        if let Some(eta) = self.eta() {
            write!(f, ", {} s left", eta.as_secs())?;
        }
        Ok(())
    }
}

/// A number of bytes, printed with a binary unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let mut tenths = u128::from(self.0) * 10 / 1024;
        let mut unit = 0;
        while tenths >= 10 * 1024 && unit + 1 < UNITS.len() {
            tenths /= 1024;
            unit += 1;
        }
        write!(f, "{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
    }
}

/// Turns a growing count of bytes into progress. Time is an argument: durations since the start.
#[derive(Debug, Clone)]
pub struct Meter {
    progress: Progress,
    /// Bytes that really moved at the last sample, and when that was.
    sampled: (u64, Duration),
}

impl Meter {
    /// A meter at zero.
    #[must_use]
    pub fn new(bytes_total: u64) -> Self {
        Self { progress: Progress { bytes_total, ..Progress::default() }, sampled: (0, Duration::ZERO) }
    }

    /// Sets the bytes in all.
    pub fn total(&mut self, bytes: u64) {
        self.progress.bytes_total = bytes;
    }

    /// Enters a phase.
    pub fn phase(&mut self, phase: Phase) {
        self.progress.phase = phase;
    }

    /// Counts `bytes` as finished without a transfer.
    pub fn reuse(&mut self, bytes: u64) {
        self.progress.bytes_done += bytes;
        self.progress.bytes_reused += bytes;
    }

    /// Counts `bytes` as moved.
    pub fn advance(&mut self, bytes: u64) {
        self.progress.bytes_done += bytes;
    }

    /// Takes back `bytes` that turned out wrong and move again.
    pub fn retreat(&mut self, bytes: u64) {
        self.progress.bytes_done = self.progress.bytes_done.saturating_sub(bytes);
    }

    /// The progress at `elapsed` since the start.
    pub fn at(&mut self, elapsed: Duration) -> Progress {
        let moved = self.progress.bytes_done.saturating_sub(self.progress.bytes_reused);
        let (before, when) = self.sampled;
        let span = elapsed.saturating_sub(when);
        if span >= Duration::from_millis(250) {
            let millis = span.as_millis().max(1);
            let now = u128::from(moved.saturating_sub(before)) * 1000 / millis;
            let now = u64::try_from(now).unwrap_or(u64::MAX);
            // A new sample weighs as much as its span, at most all: about the last four seconds count.
            let weight = millis.min(4000);
            let mixed = (u128::from(self.progress.rate) * (4000 - weight) + u128::from(now) * weight) / 4000;
            self.progress.rate = if when.is_zero() { now } else { u64::try_from(mixed).unwrap_or(u64::MAX) };
            self.sampled = (moved, elapsed);
        }
        self.progress.elapsed = elapsed;
        self.progress.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_ignores_what_did_not_move() {
        let mut meter = Meter::new(10_000_000);
        meter.phase(Phase::Transferring);
        meter.reuse(5_000_000);
        meter.advance(1_000_000);
        let progress = meter.at(Duration::from_secs(1));
        assert_eq!(progress.rate, 1_000_000);
        assert_eq!(progress.eta(), Some(Duration::from_secs(4)));
        assert_eq!(progress.permille(), 600);
        assert_eq!(progress.to_string(), "5.7 MiB of 9.5 MiB, 976.5 KiB/s, 4 s left");
    }

    #[test]
    fn a_steady_stream_has_a_steady_rate() {
        let mut meter = Meter::new(0);
        for second in 1..20 {
            meter.advance(300);
            assert_eq!(meter.at(Duration::from_secs(second)).rate, 300);
        }
        assert_eq!(meter.at(Duration::from_secs(20)).eta(), None);
    }

    #[test]
    fn bytes_read_well() {
        for (bytes, text) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (64 << 30, "64.0 GiB"), (u64::MAX, "16383.9 PiB")]
        {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }
}
