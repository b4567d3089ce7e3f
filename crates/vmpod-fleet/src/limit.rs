//! How long a CI system wants to be left alone: one answer for all pools that ask the same one.
//!
//! GitLab tells by `RateLimit-ResetTime` (an HTTP date), `RateLimit-Reset` (seconds since the epoch) and `Retry-After`
//! (seconds). Failures without such a word are answered with a pause that doubles.

use std::time::Duration;

use http::{HeaderMap, StatusCode};
use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimeParser;

/// The longest pause, whatever the other side says: a wrong clock there must not stop a fleet here for days.
const LONGEST: Duration = Duration::from_mins(15);
/// The longest pause that failures alone lead to.
const LONGEST_OF_FAILURES: Duration = Duration::from_mins(1);

/// What an answer says of further calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// It is well.
    Fine,
    /// Too many calls: not before then, if it says when.
    Limited(Option<Timestamp>),
    /// It is broken, or under maintenance: not before then, if it says when.
    Broken(Option<Timestamp>),
}

impl Heard {
    /// Reads an answer.
    pub(crate) fn of(status: StatusCode, headers: &HeaderMap, now: Timestamp) -> Self {
        if status == StatusCode::TOO_MANY_REQUESTS {
            return Self::Limited(reset(headers).or_else(|| retry_after(headers, now)));
        }
        if status.is_server_error() {
            return Self::Broken(retry_after(headers, now));
        }
        let remaining = number(headers, "ratelimit-remaining");
        // The last call that was allowed: the next would be refused, so it isn't made.
        match reset(headers) {
            Some(reset) if remaining == Some(0) => Self::Limited(Some(reset)),
            _ => Self::Fine,
        }
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

fn number(headers: &HeaderMap, name: &str) -> Option<i64> {
    text(headers, name)?.parse().ok()
}

fn reset(headers: &HeaderMap) -> Option<Timestamp> {
    let date = text(headers, "ratelimit-resettime").and_then(date);
    date.or_else(|| Timestamp::from_second(number(headers, "ratelimit-reset")?).ok())
}

fn date(text: &str) -> Option<Timestamp> {
    // HTTP writes GMT where the format of mail wants +0000.
    DateTimeParser::new().parse_timestamp(text.replace("GMT", "+0000")).ok()
}

fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Timestamp> {
    let told = text(headers, "retry-after")?;
    match told.parse::<u64>() {
        Ok(seconds) => now.checked_add(Duration::from_secs(seconds.min(LONGEST.as_secs()))).ok(),
        Err(_) => date(told),
    }
}

/// Whether and when to call again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limit {
    until: Option<Timestamp>,
    failures: u32,
}

impl Limit {
    /// When the next call may be made, if not now.
    pub(crate) fn wait(&self, now: Timestamp) -> Option<Timestamp> {
        self.until.filter(|until| now < *until)
    }

    /// Takes note of an answer. Returns when the next call may be made, if not now.
    pub(crate) fn hear(&mut self, heard: Heard, now: Timestamp) -> Option<Timestamp> {
        let told = match heard {
            Heard::Fine => {
                self.failures = 0;
                return self.wait(now);
            }
            Heard::Limited(told) | Heard::Broken(told) => told,
        };
        self.failures = self.failures.saturating_add(1);
        let pause = Duration::from_secs(1 << (self.failures - 1).min(10)).min(LONGEST_OF_FAILURES);
        let (shortest, longest) = (after(now, Duration::from_secs(1)), after(now, LONGEST));
        let until = told.unwrap_or_else(|| after(now, pause)).clamp(shortest, longest);
        // Two answers that crossed: the longer pause holds.
        self.until = Some(self.until.map_or(until, |old| old.max(until)).min(longest));
        self.until
    }
}

fn after(now: Timestamp, pause: Duration) -> Timestamp {
    now.checked_add(pause).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn gitlab_tells_in_three_ways() {
        let now = at(1_700_000_000);
        let date = "Tue, 14 Nov 2023 22:14:00 GMT";
        let heard = |status, pairs: &[(&'static str, &str)]| Heard::of(status, &headers(pairs), now);
        let limited = StatusCode::TOO_MANY_REQUESTS;
        assert_eq!(
            heard(limited, &[("ratelimit-resettime", date), ("retry-after", "5")]),
            Heard::Limited(Some(at(1_700_000_040)))
        );
        assert_eq!(heard(limited, &[("ratelimit-reset", "1700000050")]), Heard::Limited(Some(at(1_700_000_050))));
        assert_eq!(heard(limited, &[("retry-after", "5")]), Heard::Limited(Some(at(1_700_000_005))));
        assert_eq!(heard(limited, &[("retry-after", date)]), Heard::Limited(Some(at(1_700_000_040))));
        assert_eq!(heard(limited, &[]), Heard::Limited(None));
        assert_eq!(
            heard(StatusCode::SERVICE_UNAVAILABLE, &[("retry-after", "60")]),
            Heard::Broken(Some(at(1_700_000_060)))
        );
        let last = [("ratelimit-remaining", "0"), ("ratelimit-reset", "1700000050")];
        assert_eq!(heard(StatusCode::OK, &last), Heard::Limited(Some(at(1_700_000_050))));
        assert_eq!(heard(StatusCode::FORBIDDEN, &[]), Heard::Fine, "a refusal is an answer");
    }

    #[test]
    fn failures_lead_to_longer_pauses_and_one_success_forgets_them() {
        let (mut limit, mut now, mut pauses) = (Limit::default(), at(0), Vec::new());
        for _ in 0..9 {
            let until = limit.hear(Heard::Broken(None), now).unwrap();
            pauses.push(until.duration_since(now).as_secs());
            assert_eq!(limit.wait(now), Some(until));
            now = until;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(limit.hear(Heard::Fine, now), None);
        assert_eq!(limit.hear(Heard::Broken(None), now).unwrap().duration_since(now).as_secs(), 1);
    }

    proptest! {
        #[test]
        fn no_answer_stops_the_fleet_for_long(
            status in 100_u16..600,
            name in prop::sample::select(vec!["retry-after", "ratelimit-reset", "ratelimit-resettime", "ratelimit-remaining"]),
            value in "[ -~]{0,40}",
            number in any::<i64>(),
            times in 1_usize..20,
        ) {
            let now = at(1_700_000_000);
            let mut limit = Limit::default();
            for value in [value, number.to_string()] {
                let map = headers(&[(name, value.as_str()), ("ratelimit-remaining", "0")]);
                for _ in 0..times {
                    limit.hear(Heard::of(StatusCode::from_u16(status).unwrap(), &map, now), now);
                }
            }
            prop_assert!(limit.wait(after(now, LONGEST)).is_none());
        }
    }
}
