//! A caller's streams and a process's in a container.

use std::pin::Pin;

use bollard::container::LogOutput;
use futures::{Stream, StreamExt as _};
use tokio::io::{AsyncWrite, AsyncWriteExt as _};

use crate::{
    docker::Docker,
    server::{Streams, TermSize},
};

/// Whose terminal has a new size.
pub(crate) enum Terminal {
    /// That of a command.
    Exec(Docker, String),
    /// That of a container's main process.
    Main(Docker, String),
}

impl Terminal {
    async fn resize(&self, size: TermSize) {
        match self {
            Self::Exec(docker, id) => docker.resize_exec(id, size.width, size.height).await,
            Self::Main(docker, id) => docker.resize(id, size.width, size.height).await,
        }
    }
}

/// Carries what a process writes to the caller, and what the caller types to the process, until the process writes no more; for a
/// caller that only types at a main process, until all of it has arrived.
pub(crate) async fn carry<E>(
    mut output: impl Stream<Item = Result<LogOutput, E>> + Unpin,
    mut input: Pin<Box<dyn AsyncWrite + Send>>,
    streams: Streams,
    terminal: Terminal,
) {
    let Streams { stdin, mut stdout, mut stderr, resize } = streams;
    let only_types = matches!(terminal, Terminal::Main(..)) && stdout.is_none() && stderr.is_none();
    let feed = async {
        if let Some(mut from) = stdin {
            // The process may close its input at any time; that is its own affair.
            tokio::io::copy(&mut from, &mut input).await.ok();
            input.shutdown().await.ok();
        }
        if !only_types {
            std::future::pending::<()>().await;
        }
    };
    let sizes = async {
        if let Some(mut sizes) = resize {
            while let Some(size) = sizes.recv().await {
                terminal.resize(size).await;
            }
        }
        std::future::pending::<()>().await;
    };
    let written = async {
        while let Some(Ok(piece)) = output.next().await {
            let to = if matches!(piece, LogOutput::StdErr { .. }) { &mut stderr } else { &mut stdout };
            // A caller that has gone doesn't end the process.
            if let Some(writer) = to
                && writer.write_all(&piece.into_bytes()).await.is_err()
            {
                *to = None;
            }
        }
        for mut writer in [stdout, stderr].into_iter().flatten() {
            writer.shutdown().await.ok();
        }
    };
    tokio::select! {
        () = written => {}
        () = feed => {}
        () = sizes => {}
    }
}
