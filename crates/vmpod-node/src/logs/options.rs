//! What a reader wants to see of a log: the query of `/containerLogs`.

use jiff::{SignedDuration, Timestamp};

use super::Stream;

/// Which part of a log to read, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Wait for more at the end, until the container has ended.
    pub follow: bool,
    /// Read the attempt before the current one.
    pub previous: bool,
    /// Begin every line with its time.
    pub timestamps: bool,
    /// Leave out what was written before this time.
    pub since: Option<Timestamp>,
    /// Begin this many lines before the end. Zero is not the same as absent: it shows nothing that exists.
    pub tail_lines: Option<u64>,
    /// Stop after this many bytes of output.
    pub limit_bytes: Option<u64>,
    /// Only this output.
    pub stream: Option<Stream>,
}

/// What is wrong with a query.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueryError {
    /// A value has the wrong form: HTTP 400.
    #[error("parameter {name} has the value {value:?}, which is not {wanted}")]
    Undecodable {
        /// The parameter.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it should have been.
        wanted: &'static str,
    },
    /// The values make no sense: HTTP 422.
    #[error("{0}")]
    Invalid(&'static str),
}

impl LogOptions {
    /// Reads the parameters of a query. Of a parameter given twice the first counts; unknown ones are ignored,
    /// both as in the kubelet.
    pub fn from_query<'a>(
        pairs: impl IntoIterator<Item = (&'a str, &'a str)>,
        now: Timestamp,
    ) -> Result<Self, QueryError> {
        let mut query = Query::default();
        for (name, value) in pairs {
            let slot = match name {
                "follow" => &mut query.follow,
                "previous" => &mut query.previous,
                "timestamps" => &mut query.timestamps,
                "sinceSeconds" => &mut query.since_seconds,
                "sinceTime" => &mut query.since_time,
                "tailLines" => &mut query.tail_lines,
                "limitBytes" => &mut query.limit_bytes,
                "stream" => &mut query.stream,
                _ => continue,
            };
            slot.get_or_insert(value);
        }
        query.options(now)
    }
}

#[derive(Default)]
struct Query<'a> {
    follow: Option<&'a str>,
    previous: Option<&'a str>,
    timestamps: Option<&'a str>,
    since_seconds: Option<&'a str>,
    since_time: Option<&'a str>,
    tail_lines: Option<&'a str>,
    limit_bytes: Option<&'a str>,
    stream: Option<&'a str>,
}

impl Query<'_> {
    fn options(self, now: Timestamp) -> Result<LogOptions, QueryError> {
        let since_seconds = integer("sinceSeconds", self.since_seconds)?;
        let since_time = time("sinceTime", self.since_time)?;
        let tail_lines = integer("tailLines", self.tail_lines)?;
        let limit_bytes = integer("limitBytes", self.limit_bytes)?;
        let since = match (since_seconds, since_time) {
            (Some(_), Some(_)) => {
                return Err(QueryError::Invalid("at most one of sinceTime and sinceSeconds may be given"));
            }
            (Some(seconds), None) if seconds < 1 => {
                return Err(QueryError::Invalid("sinceSeconds must be greater than 0"));
            }
            (Some(seconds), None) => {
                Some(now.checked_sub(SignedDuration::from_secs(seconds)).unwrap_or(Timestamp::MIN))
            }
            (None, since) => since,
        };
        let tail_lines = tail_lines
            .map(u64::try_from)
            .transpose()
            .map_err(|_| QueryError::Invalid("tailLines must be greater than or equal to 0"))?;
        let limit_bytes = limit_bytes
            .map(u64::try_from)
            .transpose()
            .ok()
            .filter(|limit| *limit != Some(0))
            .ok_or(QueryError::Invalid("limitBytes must be greater than 0"))?;
        let stream = match self.stream {
            None | Some("" | "All") => None,
            Some("Stdout") => Some(Stream::Stdout),
            Some("Stderr") => Some(Stream::Stderr),
            Some(_) => return Err(QueryError::Invalid("stream must be All, Stdout or Stderr")),
        };
        Ok(LogOptions {
            follow: flag(self.follow),
            previous: flag(self.previous),
            timestamps: flag(self.timestamps),
            since,
            tail_lines,
            limit_bytes,
            stream,
        })
    }
}

/// Kubernetes' reading of a boolean parameter: anything but `false` and `0` is true, the bare name as well.
fn flag(value: Option<&str>) -> bool {
    value.is_some_and(|value| value != "0" && !value.eq_ignore_ascii_case("false"))
}

fn integer(name: &'static str, value: Option<&str>) -> Result<Option<i64>, QueryError> {
    value
        .map(|value| {
            value.parse().map_err(|_| QueryError::Undecodable {
                name,
                value: value.to_owned(),
                wanted: "a whole number",
            })
        })
        .transpose()
}

fn time(name: &'static str, value: Option<&str>) -> Result<Option<Timestamp>, QueryError> {
    value
        .filter(|value| !value.is_empty())
        .map(|value| {
            value.parse().map_err(|_| QueryError::Undecodable {
                name,
                value: value.to_owned(),
                wanted: "a time in RFC 3339 form",
            })
        })
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(query: &str) -> Result<LogOptions, QueryError> {
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        LogOptions::from_query(
            pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))),
            "2026-01-02T03:04:05Z".parse().unwrap(),
        )
    }

    #[test]
    fn every_parameter_is_read() {
        let time = "2025-12-31T23:59:59.5Z";
        assert_eq!(
            parse(&format!(
                "follow=true&previous=1&timestamps&sinceTime={time}&tailLines=0&limitBytes=9&stream=Stderr&x=y"
            ))
            .unwrap(),
            LogOptions {
                follow: true,
                previous: true,
                timestamps: true,
                since: Some(time.parse().unwrap()),
                tail_lines: Some(0),
                limit_bytes: Some(9),
                stream: Some(Stream::Stderr),
            }
        );
        let since = parse("sinceSeconds=5&stream=All&follow=False&previous=0").unwrap();
        assert_eq!(since.since, Some("2026-01-02T03:04:00Z".parse().unwrap()));
        assert!(!since.follow && !since.previous && since.stream.is_none());
        assert_eq!(parse("").unwrap(), LogOptions::default());
        assert_eq!(parse("sinceSeconds=9223372036854775807").unwrap().since, Some(Timestamp::MIN));
    }

    #[test]
    fn wrong_forms_differ_from_wrong_values() {
        for query in ["tailLines=x", "tailLines=", "limitBytes=1.5", "sinceSeconds=1s", "sinceTime=yesterday"] {
            assert!(matches!(parse(query), Err(QueryError::Undecodable { .. })), "{query}");
        }
        for query in [
            "tailLines=-1",
            "limitBytes=0",
            "limitBytes=-1",
            "sinceSeconds=0",
            "sinceSeconds=1&sinceTime=2026-01-01T00:00:00Z",
            "stream=stdout",
        ] {
            assert!(matches!(parse(query), Err(QueryError::Invalid(_))), "{query}");
        }
    }
}
