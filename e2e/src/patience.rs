//! Waiting for what nothing tells.

use std::time::Duration;

use anyhow::{Context as _, Result};

/// How long things may take under software emulation on a busy host.
pub const PATIENCE: Duration = Duration::from_mins(2);

/// Waits until `look` succeeds, for [`PATIENCE`].
pub async fn eventually<T, F: Future<Output = Result<T>>>(what: &str, look: impl FnMut() -> F) -> Result<T> {
    eventually_within(PATIENCE, what, look).await
}

/// Waits until `look` succeeds; its last failure tells why it never did.
pub async fn eventually_within<T, F: Future<Output = Result<T>>>(
    patience: Duration,
    what: &str,
    mut look: impl FnMut() -> F,
) -> Result<T> {
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        match look().await {
            Ok(found) => return Ok(found),
            Err(error) if tokio::time::Instant::now() >= deadline => {
                return Err(error).with_context(|| format!("{what}: not within {} s", patience.as_secs()));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}
