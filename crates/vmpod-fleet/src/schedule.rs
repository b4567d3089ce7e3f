//! The bounds of a pool at a moment, by its schedules. Pure.

use std::str::FromStr as _;

use croner::Cron;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use vmpod_api::pool::{Scale, Schedule};

/// Why a schedule can't be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// The time isn't one.
    #[error("{cron:?} is no time of a crontab: {why}")]
    Cron {
        /// As it is written.
        cron: String,
        /// Why not.
        why: String,
    },
    /// There is no such time zone.
    #[error("there is no time zone {zone:?}: write one as Asia/Bangkok")]
    Zone {
        /// As it is written.
        zone: String,
    },
}

/// How many runners there are at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Never fewer.
    pub min: u32,
    /// Never more.
    pub max: u32,
    /// So many beyond those that are wanted.
    pub idle: u32,
}

impl Bounds {
    /// The nearest number within them.
    #[must_use]
    pub fn clamp(self, wanted: u32) -> u32 {
        wanted.clamp(self.min.min(self.max), self.max)
    }
}

/// The bounds now. A schedule that can't be followed is left out, and told of.
#[must_use]
pub fn bounds(scale: &Scale, now: Timestamp) -> (Bounds, Option<ScheduleError>) {
    let mut bounds = Bounds { min: scale.min, max: scale.max, idle: scale.idle };
    let mut trouble = None;
    for schedule in &scale.schedules {
        match holds(schedule, now) {
            Ok(false) => {}
            Ok(true) => {
                bounds.min = schedule.min.unwrap_or(bounds.min);
                bounds.max = schedule.max.unwrap_or(bounds.max);
                bounds.idle = schedule.idle.unwrap_or(bounds.idle);
            }
            Err(error) => trouble = trouble.or(Some(error)),
        }
    }
    (bounds, trouble)
}

/// Whether a schedule holds now: whether it began, and not longer ago than it lasts.
fn holds(schedule: &Schedule, now: Timestamp) -> Result<bool, ScheduleError> {
    let cron = |why: String| ScheduleError::Cron { cron: schedule.cron.clone(), why };
    let zone =
        TimeZone::get(&schedule.time_zone).map_err(|_| ScheduleError::Zone { zone: schedule.time_zone.clone() })?;
    let times = Cron::from_str(&schedule.cron).map_err(|error| cron(error.to_string()))?;
    // The last beginning is the first one that was not too long ago, if that isn't in the future.
    let lasts = SignedDuration::from_secs(i64::from(schedule.seconds));
    let Ok(earliest) = now.checked_sub(lasts) else { return Ok(false) };
    match times.find_next_occurrence(&earliest.to_zoned(zone), false) {
        Ok(begins) => Ok(begins.timestamp() <= now),
        Err(croner::errors::CronError::TimeSearchLimitExceeded) => Ok(false),
        Err(error) => Err(cron(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn office() -> Schedule {
        Schedule {
            cron: "0 8 * * MON-FRI".to_owned(),
            time_zone: "Asia/Bangkok".to_owned(),
            seconds: 10 * 3600,
            min: Some(20),
            max: None,
            idle: Some(5),
        }
    }

    #[test]
    fn a_schedule_holds_from_its_time_for_its_length() {
        let scale = Scale { schedules: vec![office()], ..Scale::default() };
        let min = |text: &str| bounds(&scale, at(text)).0.min;
        // A Wednesday; Bangkok is seven hours ahead.
        assert_eq!(min("2026-11-25T00:59:59Z"), 0);
        assert_eq!(min("2026-11-25T01:00:00Z"), 20);
        assert_eq!(min("2026-11-25T10:59:59Z"), 20);
        assert_eq!(min("2026-11-25T11:00:00Z"), 0);
        assert_eq!(min("2026-11-28T03:00:00Z"), 0, "a Saturday");
    }

    #[test]
    fn where_two_hold_the_later_one_decides_what_it_names() {
        let lunch = Schedule { cron: "0 12 * * *".to_owned(), seconds: 3600, min: Some(3), idle: None, ..office() };
        let scale = Scale { schedules: vec![office(), lunch], ..Scale::default() };
        assert_eq!(bounds(&scale, at("2026-11-25T05:30:00Z")).0, Bounds { min: 3, max: 10, idle: 5 });
    }

    #[test]
    fn a_clock_that_is_set_forward_skips_no_day() {
        // 2026-03-29 has no 02:30 in Berlin.
        let early = Schedule { cron: "30 2 * * *".to_owned(), time_zone: "Europe/Berlin".to_owned(), ..office() };
        let scale = Scale { schedules: vec![early], ..Scale::default() };
        assert_eq!(bounds(&scale, at("2026-03-29T02:00:00Z")).0.min, 20);
    }

    #[test]
    fn what_is_no_time_is_told_and_changes_nothing() {
        for (cron, zone, word) in [("61 * * * *", "UTC", "crontab"), ("0 8 * * *", "Mars/Base", "time zone")] {
            let bad = Schedule { cron: cron.to_owned(), time_zone: zone.to_owned(), ..office() };
            let scale = Scale { schedules: vec![bad, office()], ..Scale::default() };
            let (bounds, trouble) = bounds(&scale, at("2026-11-25T05:30:00Z"));
            assert_eq!(bounds.min, 20);
            assert!(trouble.unwrap().to_string().contains(word));
        }
        // A day that never comes is no mistake that stops anything.
        let never = Schedule { cron: "0 8 30 2 *".to_owned(), ..office() };
        let scale = Scale { schedules: vec![never], ..Scale::default() };
        assert_eq!(bounds(&scale, at("2026-11-25T05:30:00Z")).0.min, 0);
    }
}
