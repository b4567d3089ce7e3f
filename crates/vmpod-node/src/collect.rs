//! Carries a container's output into its log, exactly once over any number of crashes.

use std::path::{Path, PathBuf};

use futures::StreamExt as _;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use vmpod_machine::{GuestError, MainProcess, Offset, StdStream, console};

use crate::logs::{Limits, Live, LogError, Progress, Stream, Writer};

/// Where output comes from.
pub(crate) enum Source {
    /// The main process in the guest.
    Main(MainProcess),
    /// The machine's console.
    Console(PathBuf),
}

/// A running collection. Dropping it ends it; nothing that was written is lost.
pub(crate) struct Collector {
    drained: watch::Receiver<bool>,
    live: watch::Receiver<Progress>,
    last: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Collector {
    /// Goes on where the log ends.
    pub(crate) fn start(log: &Path, source: Source) -> Result<Self, LogError> {
        let writer = Writer::open(log, Limits::default())?;
        let live = writer.progress();
        let (done, drained) = watch::channel(false);
        let last = CancellationToken::new();
        let stop = last.clone();
        let task = tokio::spawn(async move {
            let mut writer = writer;
            match source {
                Source::Main(process) => collect_main(&mut writer, &process).await,
                Source::Console(path) => collect_console(&mut writer, &path, stop).await,
            }
            if let Err(error) = writer.finish(Timestamp::now()) {
                tracing::warn!(error = crate::error_chain(&error), "the end of a container's output is lost");
            }
            done.send_replace(true);
        });
        Ok(Self { drained, live, last, task })
    }

    /// Becomes true when everything is in the log.
    pub(crate) fn drained(&self) -> watch::Receiver<bool> {
        self.drained.clone()
    }

    pub(crate) fn live(&self) -> Live {
        Live::Writer(self.live.clone())
    }

    /// Nothing more will come: what is there is read to its end.
    pub(crate) fn finish(&self) {
        self.last.cancel();
    }
}

async fn collect_main(writer: &mut Writer, process: &MainProcess) {
    let position = writer.position();
    let mut output = process.follow(Offset { stdout: position.stdout, stderr: position.stderr });
    while let Some(chunk) = output.next().await {
        match chunk {
            Ok(chunk) => {
                let length = u64::try_from(chunk.bytes.len()).unwrap_or(u64::MAX);
                let (stream, next) = match chunk.stream {
                    StdStream::Stdout => (Stream::Stdout, chunk.next.stdout),
                    StdStream::Stderr => (Stream::Stderr, chunk.next.stderr),
                };
                append(writer, next.saturating_sub(length), stream, &chunk.bytes).await;
            }
            Err(GuestError::Stopped) => return,
            Err(error) => {
                tracing::warn!(
                    error = crate::error_chain(&error),
                    "the main process's output can't be followed any more"
                );
                return;
            }
        }
    }
}

async fn collect_console(writer: &mut Writer, path: &Path, last: CancellationToken) {
    let mut output = std::pin::pin!(console::follow(path.to_owned(), writer.position().stdout, last));
    while let Some(chunk) = output.next().await {
        match chunk {
            Ok((start, bytes)) => append(writer, start, Stream::Stdout, &bytes).await,
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "the console can't be read any more");
                return;
            }
        }
    }
}

/// Appends, and waits while the disk is full: a line is late rather than lost.
async fn append(writer: &mut Writer, start: u64, stream: Stream, bytes: &[u8]) {
    let mut told = false;
    while let Err(error) = writer.append(start, stream, bytes, Timestamp::now()) {
        if !told {
            tracing::warn!(error = crate::error_chain(&error), "a container's output can't be written; trying again");
            told = true;
        }
        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    }
}
