//! A container's log as the Docker API gives it, in the form that readers of `/containerLogs` expect.

use std::{io, task::Poll};

use bollard::{container::LogOutput, query_parameters::LogsOptionsBuilder};
use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt as _, stream::BoxStream};
use jiff::Timestamp;

use crate::{
    docker::{Docker, DockerError},
    logs::{self, LogOptions},
};

/// Lines of a log.
pub(crate) type Lines = BoxStream<'static, io::Result<Bytes>>;

/// The log of one life of a container. The engine always gives the times, and only whole seconds of `since` are its to judge.
pub(crate) async fn open(docker: &Docker, id: &str, options: LogOptions) -> Result<Lines, DockerError> {
    let stream = |stream| options.stream.is_none_or(|wanted| wanted == stream);
    let since = options.since.map_or(0, |since| since.as_second().clamp(0, i32::MAX.into()));
    let tail = options.tail_lines.map_or_else(|| "all".to_owned(), |lines| lines.to_string());
    let wanted = LogsOptionsBuilder::new()
        .follow(options.follow)
        .stdout(stream(logs::Stream::Stdout))
        .stderr(stream(logs::Stream::Stderr))
        .since(i32::try_from(since).unwrap_or(i32::MAX))
        .timestamps(true)
        .tail(&tail)
        .build();
    let output = docker.logs(id, wanted).await?;
    let output = output.map(|item| item.map(LogOutput::into_bytes).map_err(io::Error::other));
    Ok(shape(output, &options).boxed())
}

/// Lines with their times in front become lines as they are wanted.
fn shape<S: Stream<Item = io::Result<Bytes>> + Send + 'static>(
    output: S,
    options: &LogOptions,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static + use<S> {
    let mut output = Box::pin(output);
    let (since, timestamps, mut left) = (options.since, options.timestamps, options.limit_bytes);
    // A line may come in several pieces; only the first has a time in front.
    let mut middle = false;
    let mut drops = false;
    futures::stream::poll_fn(move |context| {
        loop {
            if left == Some(0) {
                return Poll::Ready(None);
            }
            let piece = match std::task::ready!(output.poll_next_unpin(context)) {
                None => return Poll::Ready(None),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                Some(Ok(piece)) => piece,
            };
            let mut out = BytesMut::new();
            for line in piece.split_inclusive(|byte| *byte == b'\n') {
                let (time, rest) = if middle { (None, line) } else { timed(line) };
                if !middle {
                    drops = since.zip(time).is_some_and(|(since, at)| at < since);
                }
                middle = !line.ends_with(b"\n");
                if !drops {
                    out.extend_from_slice(if timestamps { line } else { rest });
                }
            }
            if let Some(left) = &mut left {
                out.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= out.len() as u64;
            }
            if !out.is_empty() {
                return Poll::Ready(Some(Ok(out.freeze())));
            }
        }
    })
}

/// The time in front of a line, and the line.
fn timed(line: &[u8]) -> (Option<Timestamp>, &[u8]) {
    let Some(at) = line.iter().position(|byte| *byte == b' ') else { return (None, line) };
    let time = std::str::from_utf8(&line[..at]).ok().and_then(|text| text.parse().ok());
    if time.is_some() { (time, &line[at + 1..]) } else { (None, line) }
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt as _;

    use super::*;

    const LINES: [&str; 4] =
        ["2026-11-27T10:00:01.5Z one\n", "2026-11-27T10:00:02.25Z two ", "words\n", "2026-11-27T10:00:03Z three\n"];

    fn shaped(options: &LogOptions) -> String {
        let pieces = futures::stream::iter(LINES.map(|line| Ok(Bytes::from_static(line.as_bytes()))));
        let all = futures::executor::block_on(shape(pieces, options).try_collect::<Vec<_>>()).unwrap();
        String::from_utf8(all.concat()).unwrap()
    }

    #[test]
    fn lines_are_given_as_they_are_wanted() {
        assert_eq!(shaped(&LogOptions::default()), "one\ntwo words\nthree\n");
        assert_eq!(shaped(&LogOptions { timestamps: true, ..LogOptions::default() }), LINES.concat());
        let since = Some("2026-11-27T10:00:02.1Z".parse().unwrap());
        assert_eq!(shaped(&LogOptions { since, ..LogOptions::default() }), "two words\nthree\n");
        let since = Some("2026-11-27T10:00:02.3Z".parse().unwrap());
        assert_eq!(shaped(&LogOptions { since, ..LogOptions::default() }), "three\n");
        assert_eq!(shaped(&LogOptions { limit_bytes: Some(6), ..LogOptions::default() }), "one\ntw");
    }
}
