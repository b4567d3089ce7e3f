//! Controllers run in tasks of their own: one that panics begins anew, and nothing else ends with it.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// How long a controller that ended waits: what it fell over may still be there.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Keeps a controller running until `stop` is cancelled.
pub(crate) async fn keep<F>(name: &'static str, stop: CancellationToken, start: impl Fn() -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    loop {
        let ended = AbortOnDropHandle::new(tokio::spawn(start())).await;
        if stop.is_cancelled() {
            return;
        }
        match ended {
            Ok(()) => tracing::error!(controller = name, "a controller ended by itself; it begins anew"),
            Err(error) if error.is_panic() => {
                tracing::error!(controller = name, "a controller panicked; it begins anew");
            }
            // The runtime goes away.
            Err(_) => return,
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(AGAIN_AFTER) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn a_controller_that_panics_begins_anew_and_ends_nothing_else() {
        let stop = CancellationToken::new();
        let starts = Arc::new(AtomicUsize::new(0));
        let shaky = keep("shaky", stop.clone(), || {
            let (starts, stop) = (starts.clone(), stop.clone());
            async move {
                assert!(starts.fetch_add(1, Ordering::SeqCst) >= 2, "falls over twice");
                stop.cancelled().await;
            }
        });
        let other = keep("other", stop.clone(), || stop.clone().cancelled_owned());
        let watch = async {
            while starts.load(Ordering::SeqCst) < 3 {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            stop.cancel();
        };
        tokio::time::timeout(Duration::from_mins(1), async { tokio::join!(shaky, other, watch) }).await.unwrap();
        assert_eq!(starts.load(Ordering::SeqCst), 3);
    }
}
