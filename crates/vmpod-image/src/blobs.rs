//! Where the bytes of an image come from: a registry, or a layout on disk.

use std::error::Error;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;

use crate::digest::Digest;
use crate::format::Blob;

/// Bytes on their way.
pub(crate) type Body = BoxStream<'static, Result<Bytes, BlobError>>;

/// A source of blobs.
#[async_trait::async_trait]
pub(crate) trait Blobs: Send + Sync {
    /// The bytes of `blob` from `start` up to `end`. They aren't verified, and there may be fewer or more.
    async fn open(&self, blob: Blob, start: u64, end: u64) -> Result<Body, BlobError>;

    /// Whether a part costs no more than the part: false once a server was found to send all for any part.
    fn has_ranges(&self) -> bool;

    /// The source's name, for messages.
    fn place(&self) -> &str;

    /// Says that what came for `digest` wasn't it, so that it is taken from elsewhere if there is an elsewhere.
    fn distrust(&self, _digest: Digest) {}
}

/// Why bytes didn't come.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct BlobError {
    pub(crate) kind: BlobErrorKind,
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

/// What can be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BlobErrorKind {
    /// Trying again may help, after the time that the other side asked for.
    Transient(Option<Duration>),
    /// It isn't there.
    Missing,
    /// It isn't for us.
    Denied,
    /// Trying again doesn't help.
    Fatal,
}

impl BlobError {
    pub(crate) fn new(kind: BlobErrorKind, message: String) -> Self {
        Self { kind, message, source: None }
    }

    pub(crate) fn caused(
        kind: BlobErrorKind,
        message: String,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self { kind, message, source: Some(source.into()) }
    }

    /// Whether trying again later may help.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self.kind, BlobErrorKind::Transient(_))
    }
}

/// How often and how long to try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    /// Attempts in a row that bring nothing before giving up, at least 1.
    pub attempts: u32,
    /// The wait after the first failure; it doubles from then on.
    pub first: Duration,
    /// The longest wait, also when a server asks for more.
    pub longest: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self { attempts: 8, first: Duration::from_millis(250), longest: Duration::from_secs(30) }
    }
}

impl Retry {
    /// How long to wait after the failure number `failures` (from 1); none when it was the last attempt. `spread` (any number) keeps
    /// those who failed together from coming back together.
    #[must_use]
    pub fn wait(&self, failures: u32, asked: Option<Duration>, spread: u8) -> Option<Duration> {
        if failures >= self.attempts {
            return None;
        }
        let doubled = self.first.saturating_mul(1 << failures.saturating_sub(1).min(16));
        let spread = self.first.saturating_mul(u32::from(spread)) / 512;
        Some(doubled.max(asked.unwrap_or_default()).saturating_add(spread).min(self.longest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_end() {
        let retry = Retry { attempts: 5, first: Duration::from_secs(1), longest: Duration::from_secs(5) };
        let waits: Vec<_> = (1..=5).map(|failures| retry.wait(failures, None, 0).map(|wait| wait.as_secs())).collect();
        assert_eq!(waits, [Some(1), Some(2), Some(4), Some(5), None]);
        assert_eq!(retry.wait(1, Some(Duration::from_secs(3)), 0), Some(Duration::from_secs(3)));
        assert_eq!(retry.wait(1, Some(Duration::from_hours(1)), 0), Some(Duration::from_secs(5)));
        assert!(retry.wait(1, None, 255).unwrap() < Duration::from_millis(1500));
    }
}
