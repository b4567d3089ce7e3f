//! What a container leaves to say when it ends: the file of its `terminationMessagePath`, or the end of its log where its
//! `terminationMessagePolicy` says so (<https://kubernetes.io/docs/tasks/debug/debug-application/determine-reason-pod-failure/>).

use std::{io::Read as _, path::Path, time::Duration};

use bytes::Bytes;
use futures::{Stream, TryStreamExt as _};
use k8s_openapi::api::core::v1::Container;
use vmpod_machine::{Exec, Guest};

use crate::logs::{self, LogFile, LogOptions};

/// The most bytes of a file that count (`MaxContainerTerminationMessageLength`).
pub(crate) const MOST: usize = 4096;
/// The most bytes and lines of a log (`MaxContainerTerminationMessageLogLength`, `…LogLines`).
const LOG_BYTES: usize = 2048;
const LOG_LINES: u64 = 80;
/// How long a guest may take to tell. Its container is over meanwhile, and waits.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where the file is in the container.
pub(crate) fn path(container: &Container) -> &str {
    container.termination_message_path.as_deref().filter(|path| !path.is_empty()).unwrap_or("/dev/termination-log")
}

/// Whether the end of the log stands in for a file that is empty.
pub(crate) fn falls_back(container: &Container) -> bool {
    container.termination_message_policy.as_deref() == Some("FallbackToLogsOnError")
}

/// The file in a guest whose main process has ended. A guest that doesn't tell says nothing.
pub(crate) async fn of_guest(guest: &Guest, container: &Container) -> Option<String> {
    let command = [r#"[ ! -f "$1" ] || exec head -c "$2" "$1""#, "vmpod", path(container), &MOST.to_string()];
    let told = async {
        let words = ["sh", "-c"].into_iter().chain(command);
        guest.exec(Exec::new(words)).await.ok()?.output().await.ok()
    };
    let (status, text, _) = tokio::time::timeout(PATIENCE, told).await.ok()??;
    if status.code() == 0 { words(&text) } else { None }
}

/// A file on this host.
pub(crate) fn of_file(path: &Path) -> Option<String> {
    let mut text = Vec::new();
    std::fs::File::open(path).ok()?.take(MOST as u64).read_to_end(&mut text).ok()?;
    words(&text)
}

/// The end of a log that nobody writes any more.
pub(crate) async fn of_log(log: &Path) -> Option<String> {
    of_lines(logs::read(LogFile { path: log.to_owned(), live: None }, of_a_log())).await
}

/// What of a log may count.
pub(crate) fn of_a_log() -> LogOptions {
    LogOptions { tail_lines: Some(LOG_LINES), ..LogOptions::default() }
}

/// The end of what was asked for with [`of_a_log`].
pub(crate) async fn of_lines<E>(lines: impl Stream<Item = Result<Bytes, E>>) -> Option<String> {
    let mut lines = std::pin::pin!(lines);
    let mut text: Vec<u8> = Vec::new();
    while let Ok(Some(piece)) = lines.try_next().await {
        text.extend_from_slice(&piece);
        let beyond = text.len().saturating_sub(LOG_BYTES);
        text.drain(..beyond);
    }
    words(&text)
}

fn words(bytes: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(bytes).into_owned();
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_file_counts_up_to_a_length_and_an_empty_one_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("said");
        assert_eq!(of_file(&file), None);
        std::fs::write(&file, "").unwrap();
        assert_eq!(of_file(&file), None);
        std::fs::write(&file, "why\n").unwrap();
        assert_eq!(of_file(&file).as_deref(), Some("why\n"));
        std::fs::write(&file, "x".repeat(5000)).unwrap();
        assert_eq!(of_file(&file).unwrap().len(), MOST);
    }

    #[test]
    fn the_pod_says_where_and_whether_the_log_will_do() {
        let container = |fields: serde_json::Value| -> Container { serde_json::from_value(fields).unwrap() };
        assert_eq!(path(&container(json!({"name": "a"}))), "/dev/termination-log");
        assert_eq!(path(&container(json!({"name": "a", "terminationMessagePath": "/tmp/x"}))), "/tmp/x");
        assert!(!falls_back(&container(json!({"name": "a", "terminationMessagePolicy": "File"}))));
        assert!(falls_back(&container(json!({"name": "a", "terminationMessagePolicy": "FallbackToLogsOnError"}))));
    }
}
