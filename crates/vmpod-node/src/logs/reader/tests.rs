use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use jiff::Timestamp;
use proptest::prelude::*;
use tokio::sync::watch;

use super::*;
use crate::logs::{Limits, Writer};

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

async fn output(path: &Path, options: LogOptions) -> String {
    let log = LogFile { path: path.to_owned(), live: None };
    let parts: Vec<_> = read(log, options).try_collect().await.unwrap();
    String::from_utf8(parts.concat()).unwrap()
}

/// Ten lines, one a second, stderr every third, over several files.
fn sample(directory: &Path, file_bytes: u64) -> PathBuf {
    let path = directory.join("0.log");
    let mut writer = Writer::open(&path, Limits { file_bytes, files: 100 }).unwrap();
    for line in 0..10_u64 {
        let stream = if line % 3 == 2 { Stream::Stderr } else { Stream::Stdout };
        let second = i64::try_from(line).unwrap();
        writer.append(writer.position().of(stream), stream, format!("{line}\n").as_bytes(), at(second)).unwrap();
    }
    path
}

#[tokio::test]
async fn each_option_does_what_it_says() {
    let directory = tempfile::tempdir().unwrap();
    for file_bytes in [u64::MAX, 150, 1] {
        let directory = directory.path().join(file_bytes.to_string());
        let path = sample(&directory, file_bytes);
        let all = LogOptions::default;
        let cases = [
            (all(), "0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n"),
            (LogOptions { tail_lines: Some(0), ..all() }, ""),
            (LogOptions { tail_lines: Some(3), ..all() }, "7\n8\n9\n"),
            (LogOptions { tail_lines: Some(99), ..all() }, "0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n"),
            (LogOptions { stream: Some(Stream::Stderr), ..all() }, "2\n5\n8\n"),
            (LogOptions { stream: Some(Stream::Stderr), tail_lines: Some(2), ..all() }, "5\n8\n"),
            (LogOptions { since: Some(at(7)), ..all() }, "7\n8\n9\n"),
            (LogOptions { since: Some(at(7)), tail_lines: Some(1), ..all() }, "9\n"),
            (LogOptions { limit_bytes: Some(5), ..all() }, "0\n1\n2"),
            (LogOptions { timestamps: true, tail_lines: Some(1), ..all() }, "2027-01-15T08:00:09.000000000Z 9\n"),
            (LogOptions { timestamps: true, limit_bytes: Some(4), ..all() }, "2027"),
        ];
        for (options, expected) in cases {
            assert_eq!(output(&path, options.clone()).await, expected, "{options:?} at {file_bytes}");
        }
    }
}

#[tokio::test]
async fn a_line_in_parts_has_one_timestamp_and_is_one_line_of_a_tail() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    let mut writer = Writer::open(&path, Limits::default()).unwrap();
    let long = "x".repeat(40_000);
    writer.append(0, Stream::Stdout, format!("a\n{long}\nprompt> ").as_bytes(), at(0)).unwrap();
    writer.finish(at(1)).unwrap();
    let all = LogOptions::default();
    assert_eq!(output(&path, all.clone()).await, format!("a\n{long}\nprompt> "));
    let tail = LogOptions { tail_lines: Some(2), ..all };
    assert_eq!(output(&path, tail.clone()).await, format!("{long}\nprompt> "));
    let stamped = output(&path, LogOptions { timestamps: true, ..tail }).await;
    assert_eq!(stamped, format!("2027-01-15T08:00:00.000000000Z {long}\n2027-01-15T08:00:01.000000000Z prompt> "));
}

#[tokio::test]
async fn damage_is_passed_over() {
    let directory = tempfile::tempdir().unwrap();
    let path = sample(directory.path(), u64::MAX);
    let good = std::fs::read_to_string(&path).unwrap();
    let (first, rest) = good.split_once('\n').unwrap();
    let junk = "j".repeat(200_000);
    std::fs::write(&path, format!("{first}\n{junk}\n\0\0\nnot a record\n{rest}2027-01-15T08:00:10Z stdout F torn"))
        .unwrap();
    assert_eq!(output(&path, LogOptions::default()).await, "0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n");
    assert_eq!(output(&path, LogOptions { tail_lines: Some(9), ..LogOptions::default() }).await.len(), 18);
    assert_eq!(output(&directory.path().join("none.log"), LogOptions::default()).await, "");
}

/// Everything a follower gets, collected while the log is written.
fn follow(log: LogFile, mut options: LogOptions) -> tokio::task::JoinHandle<String> {
    options.follow = true;
    tokio::spawn(async move {
        let parts: Vec<_> = read(log, options).try_collect().await.unwrap();
        String::from_utf8(parts.concat()).unwrap()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn following_survives_rotation_and_ends_with_the_writer() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    let mut writer = Writer::open(&path, Limits { file_bytes: 400, files: usize::MAX }).unwrap();
    let log = LogFile { path, live: Some(Live::Writer(writer.progress())) };
    let all = follow(log.clone(), LogOptions::default());
    let none = follow(log, LogOptions { tail_lines: Some(0), ..LogOptions::default() });
    let mut expected = String::new();
    let mut source = 0;
    for number in 0..1500 {
        let line = format!("line {number}\n");
        writer.append(source, Stream::Stdout, line.as_bytes(), at(0)).unwrap();
        source += line.len() as u64;
        expected += &line;
        if number % 150 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    writer.append(source, Stream::Stdout, b"end", at(0)).unwrap();
    writer.finish(at(0)).unwrap();
    assert!(all.await.unwrap() == expected + "end", "lines are missing or doubled");
    assert!(none.await.unwrap().ends_with("line 1499\nend"));
}

#[tokio::test]
async fn following_shows_a_line_at_once_and_ends_when_the_writer_is_dropped() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    let mut writer = Writer::open(&path, Limits::default()).unwrap();
    let log = LogFile { path, live: Some(Live::Writer(writer.progress())) };
    let mut lines = Box::pin(read(log, LogOptions { follow: true, ..LogOptions::default() }));
    for source in [0, 3] {
        writer.append(source, Stream::Stdout, b"hi\n", at(0)).unwrap();
        assert_eq!(lines.next().await.unwrap().unwrap(), "hi\n");
    }
    drop(writer);
    assert!(lines.next().await.is_none());
}

#[tokio::test]
async fn following_another_process_needs_no_word_from_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    let (ended, live) = watch::channel(false);
    let log = LogFile { path: path.clone(), live: Some(Live::Process(live)) };
    let mut lines = Box::pin(read(log, LogOptions { follow: true, ..LogOptions::default() }));
    let mut first = Box::pin(lines.next());
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut first).await.is_err());
    let mut writer = Writer::open(&path, Limits { file_bytes: 1, files: 100 }).unwrap();
    writer.append(0, Stream::Stdout, b"one\n", at(0)).unwrap();
    assert_eq!(first.await.unwrap().unwrap(), "one\n");
    writer.append(4, Stream::Stdout, b"two\n", at(0)).unwrap();
    assert_eq!(lines.next().await.unwrap().unwrap(), "two\n");
    writer.append(8, Stream::Stdout, b"three\n", at(0)).unwrap();
    ended.send(true).unwrap();
    assert_eq!(lines.next().await.unwrap().unwrap(), "three\n");
    assert!(lines.next().await.is_none());
}

#[tokio::test]
async fn a_limit_ends_following() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    let mut writer = Writer::open(&path, Limits::default()).unwrap();
    let log = LogFile { path, live: Some(Live::Writer(writer.progress())) };
    let some = follow(log, LogOptions { limit_bytes: Some(4), ..LogOptions::default() });
    writer.append(0, Stream::Stdout, b"abc\ndef\n", at(0)).unwrap();
    assert_eq!(some.await.unwrap(), "abc\n");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// What goes in comes out, and a tail is the end of it.
    #[test]
    fn reading_gives_back_what_was_written(
        lines in proptest::collection::vec("[a-z ]{0,12}", 0..60),
        long in proptest::option::of(0usize..60),
        unfinished in any::<bool>(),
        file_bytes in prop_oneof![Just(u64::MAX), 1u64..600],
        wanted in 0u64..70,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        let mut whole = String::new();
        for (index, line) in lines.iter().enumerate() {
            whole += line;
            if long == Some(index) {
                whole += &"y".repeat(70_000);
            }
            whole.push('\n');
        }
        if unfinished {
            whole += "no newline";
        }
        let mut writer = Writer::open(&path, Limits { file_bytes, files: usize::MAX }).unwrap();
        let mut source = 0;
        for piece in whole.as_bytes().chunks(37) {
            writer.append(source, Stream::Stdout, piece, at(0)).unwrap();
            source += piece.len() as u64;
        }
        writer.finish(at(0)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let all = runtime.block_on(output(&path, LogOptions::default()));
        prop_assert_eq!(&all, &whole);
        let tail = LogOptions { tail_lines: Some(wanted), ..LogOptions::default() };
        let tail = runtime.block_on(output(&path, tail));
        let parts: Vec<_> = whole.split_inclusive('\n').collect();
        let skipped = parts.len().saturating_sub(usize::try_from(wanted).unwrap());
        prop_assert_eq!(tail, parts[skipped..].concat());
    }
}
